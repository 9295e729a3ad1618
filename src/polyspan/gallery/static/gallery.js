// Search, filters and copy buttons. Without this file every page can be read and every family has a page of its own.
"use strict";

(() => {
  const words = (text) =>
    text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];

  function search() {
    const field = document.getElementById("q");
    if (!field) return;
    const working = document.getElementById("working");
    const status = document.getElementById("count");
    const nothing = document.getElementById("nothing");
    const chips = [...document.querySelectorAll("[data-filter]")];
    const years = [...document.querySelectorAll(".year")];
    const cards = [...document.querySelectorAll(".card")].map((node) => ({
      node,
      words: words(`${node.textContent} ${node.dataset.words}`),
    }));
    let family = "";

    function show() {
      const wanted = words(field.value);
      let shown = 0;
      for (const card of cards) {
        const fits =
          (!family || card.node.dataset.family === family) &&
          (!working.checked || card.node.dataset.status === "working") &&
          wanted.every((word) => card.words.some((known) => known.startsWith(word)));
        card.node.hidden = !fits;
        shown += fits;
      }
      for (const year of years) year.hidden = !year.querySelector(".card:not([hidden])");
      for (const chip of chips) {
        if (chip.dataset.filter === family) chip.setAttribute("aria-current", "true");
        else chip.removeAttribute("aria-current");
      }
      const unit = shown === 1 ? status.dataset.one : status.dataset.many;
      status.textContent = shown === cards.length ? `${shown} ${unit}` : `${shown} of ${cards.length} ${status.dataset.many}`;
      nothing.hidden = shown > 0;
    }

    function remember() {
      const state = new URLSearchParams();
      if (field.value.trim()) state.set("q", field.value.trim());
      if (family) state.set("family", family);
      if (working.checked) state.set("working", "1");
      const hash = state.toString();
      history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    }

    function recall() {
      const hash = location.hash.slice(1);
      // The target of a skip link is no state.
      if (hash && !hash.includes("=")) return;
      const state = new URLSearchParams(hash);
      field.value = state.get("q") ?? "";
      const asked = state.get("family") ?? "";
      family = chips.some((chip) => chip.dataset.filter === asked) ? asked : "";
      working.checked = state.get("working") === "1";
      show();
    }

    function change() {
      show();
      remember();
    }

    for (const node of document.querySelectorAll("[data-js]")) node.hidden = false;
    field.addEventListener("input", change);
    working.addEventListener("change", change);
    for (const chip of chips) {
      chip.addEventListener("click", (event) => {
        // A new tab still gets the family's own page.
        if (event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        family = chip.dataset.filter;
        change();
      });
    }
    document.getElementById("clear").addEventListener("click", () => {
      field.value = family = "";
      working.checked = false;
      change();
      field.focus();
    });
    addEventListener("hashchange", recall);
    recall();
  }

  function copying() {
    const told = document.getElementById("copied");
    for (const button of document.querySelectorAll("[data-copy]")) {
      const source = document.getElementById(button.dataset.copy);
      button.hidden = false;
      button.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(source.textContent);
          button.textContent = told.textContent = "Copied";
        } catch {
          // No permission: select the text, so that the keyboard can copy it.
          getSelection().selectAllChildren(source);
          button.textContent = told.textContent = "Selected: press Ctrl+C";
        }
        setTimeout(() => {
          button.textContent = "Copy";
          told.textContent = "";
        }, 2500);
      });
    }
  }

  search();
  copying();
})();
