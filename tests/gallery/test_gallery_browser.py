"""The pages as a browser shows them: a real Chromium, where there is one."""

import shutil
import threading

import pytest

from polyspan.catalog import FAMILIES, entries
from polyspan.gallery.serve import make_server

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH; Debian's package `chromium` brings one"),
    pytest.mark.slow,
]
ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
ENTRIES = entries()
MEASURED = f"systems/{ENTRIES[0].slug}.html"
PLANNED = f"systems/{next(e.slug for e in ENTRIES[4:] if e.status == 'planned')}.html"
PAGES = ["index.html", MEASURED, PLANNED, "verdicts.html", f"families/{ENTRIES[0].family}.html"]


@pytest.fixture(scope="module")
def address(site):
    server = make_server(site, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.address
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the dev group brings playwright")
    with playwright.sync_playwright() as engine:
        running = engine.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield running
        running.close()


@pytest.fixture
def visit(browser, address):
    """Open a page; at the end no script has complained, and nothing failed or was asked of anyone else."""
    contexts, trouble = [], []

    def open_page(path, base=address, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        # Aborted: the reader had gone to the next page while the icon was still on its way.
        page.on(
            "requestfailed", lambda r: None if "ABORTED" in (r.failure or "") else trouble.append(f"failed: {r.url}")
        )
        page.on("request", lambda r: None if r.url.startswith(base) else trouble.append(f"outside: {r.url}"))
        page.on("response", lambda r: None if r.status < 400 else trouble.append(f"{r.status}: {r.url}"))
        page.goto(base + path, wait_until="load")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []


def shown(page):
    return page.locator(".card:visible").count()


def shown_titles(page):
    return page.locator(".card:visible h3").all_inner_texts()


@pytest.mark.parametrize("path", PAGES)
def test_pages_load_without_a_complaint(visit, path):
    page = visit(path)
    assert page.title()
    assert page.locator("h1").count() == 1


def test_pages_load_from_the_disk_as_well(visit, site):
    page = visit("index.html", base=f"file://{site}/")
    page.get_by_label("Search", exact=True).fill(ENTRIES[0].slug)
    assert shown_titles(page)[0] == ENTRIES[0].title


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        ("attributed graph", lambda e: e.slug == "s2cag"),
        ("PROCRUSTES", lambda e: any("procrustes" in a.lower() for a in e.aliases)),
        ("S2CAG", lambda e: e.slug == "s2cag"),
    ],
)
def test_search_finds_words_of_title_other_names_and_summary_as_one_types(visit, words, fits):
    page = visit("index.html")
    field = page.get_by_label("Search", exact=True)
    field.press_sequentially(words)
    found = shown_titles(page)
    assert set(found) >= {e.title for e in ENTRIES if fits(e)} != set()
    assert len(found) < len(ENTRIES)
    status = page.get_by_role("status")
    assert status.inner_text() == f"{len(found)} of {len(ENTRIES)} systems"
    assert status.get_attribute("aria-live") == "polite"
    assert "q=" in page.url
    page.reload()
    assert field.input_value() == words
    assert shown_titles(page) == found


def test_every_word_must_begin_a_word_and_accents_do_not_matter(visit):
    page = visit("index.html")
    field = page.get_by_label("Search", exact=True)
    field.fill(ENTRIES[0].title.split()[0][:6].upper().replace("A", "Á"))
    assert ENTRIES[0].title in shown_titles(page)
    field.fill("zzzz")
    assert shown(page) == 0
    assert page.locator(".year:visible").count() == 0
    assert page.get_by_role("status").inner_text() == f"0 of {len(ENTRIES)} systems"
    page.get_by_role("button", name="Show all again").click()
    assert shown(page) == len(ENTRIES)
    assert page.evaluate("document.activeElement.id") == "q"
    assert "#" not in page.url


def test_families_filter_in_place_and_the_address_keeps_it(visit):
    page = visit("index.html")
    for family in FAMILIES:
        members = [e.title for e in ENTRIES if e.family == family]
        page.locator(f"[data-filter={family}]").click()
        assert shown_titles(page) == members
        assert page.locator(".chips [aria-current]").count() == 1
        assert f"family={family}" in page.url
    page = visit("index.html#family=align&working=1")
    assert shown_titles(page) == [e.title for e in ENTRIES if e.family == "align" and e.status == "working"]
    assert page.get_by_label("works today").is_checked()


def test_unknown_words_in_the_address_do_no_harm(visit):
    page = visit("index.html#family=%3Cscript%3E&q=%22%3E%3Cimg+src%3Dx%3E&x=1")
    assert shown(page) == 0
    assert page.get_by_label("Search", exact=True).input_value() == '"><img src=x>'
    page = visit("index.html#family=nonsense")
    assert shown(page) == len(ENTRIES)


def test_all_of_it_works_by_keyboard(visit):
    page = visit("index.html")
    page.keyboard.press("Tab")
    skip = page.locator(":focus")
    assert skip.inner_text() == "Skip to the content"
    assert skip.bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.type("subspace")
    found = shown(page)
    assert 0 < found < len(ENTRIES)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.get_by_label("works today").is_checked()
    assert shown(page) < found
    page.keyboard.press("Space")
    for _ in range(3):
        page.keyboard.press("Tab")
    chip = page.locator(":focus")
    outline = chip.evaluate("n => getComputedStyle(n).outlineStyle + getComputedStyle(n).outlineWidth")
    assert outline == "solid3px"
    page.keyboard.press("Enter")
    assert chip.get_attribute("aria-current") == "true"
    assert "q=subspace" in page.url
    assert "family=" in page.url


def test_a_card_leads_to_its_system_and_the_way_back_keeps_the_search(visit):
    page = visit("index.html")
    page.get_by_label("Search", exact=True).fill(ENTRIES[0].slug)
    before = shown_titles(page)
    # The title's link covers the whole card, so Playwright must not wait for the summary itself to be hit.
    page.locator(".card:visible .summary").first.click(force=True)
    page.wait_for_url(f"**/{MEASURED}", wait_until="load")
    page.go_back()
    page.wait_for_function("!document.querySelector('#q').closest('[hidden]')")
    assert shown_titles(page) == before


def test_the_copy_button_copies_the_snippet(visit, address):
    working = next(e for e in ENTRIES if e.status == "working")
    page = visit(f"systems/{working.slug}.html")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address.rstrip("/"))
    page.get_by_role("button", name="Copy: Python").click()
    page.wait_for_function("document.getElementById('copied').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()").strip() == working.snippet.strip()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_reader(visit, scheme):
    page = visit("index.html", color_scheme=scheme)
    channels = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(channels) / 3 > 200) == (scheme == "light")


def unfold(page):
    page.evaluate("document.querySelectorAll('details').forEach((node) => (node.open = true))")


@pytest.mark.parametrize("path", PAGES)
def test_a_phone_never_scrolls_sideways(visit, path):
    page = visit(path, viewport={"width": 360, "height": 740})
    unfold(page)
    for width in (360, 320):
        page.set_viewport_size({"width": width, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("path", PAGES)
def test_without_script_everything_is_there_to_read(visit, path):
    page = visit(path, java_script_enabled=False)
    if page.locator(".card").count():
        assert shown(page) == page.locator(".card").count()
        assert not page.locator("#q").is_visible()
        page.locator(".chips a").nth(1).click()
        page.wait_for_url("**/families/*", wait_until="load")
        assert shown(page) == sum(e.family == FAMILIES[0] for e in ENTRIES)
    for button in page.locator("button").all():
        assert not button.is_visible()


@pytest.mark.parametrize(
    ("path", "scheme", "width"),
    [(path, scheme, 1280) for path in ("index.html", MEASURED, "verdicts.html") for scheme in ("light", "dark")]
    + [(PLANNED, "light", 1280), (MEASURED, "light", 360), ("verdicts.html", "dark", 360)],
)
def test_axe_finds_nothing_to_blame(visit, path, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the dev group brings axe")
    page = visit(path, color_scheme=scheme, viewport={"width": width, "height": 900})
    unfold(page)
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_nothing_moves_for_those_who_asked_for_stillness(visit):
    page = visit("index.html", reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
