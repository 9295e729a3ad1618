"""``polyspan upgrade plan``, ``apply``, ``check``, ``cutover`` and ``rollback``."""

import re
import shlex
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ._output import check_target, say, show_json, show_table
from ._places import check_places

PLAN_COLUMNS = (
    "strategy",
    "map",
    "recall",
    "95 % interval",
    "embedded again",
    "written",
    "time",
    "cost of embedding",
    "in store",
)


def plan(
    store: str,
    *,
    encoder: str,
    texts: Path | None = None,
    labels: Path | None = None,
    sample: int = 2000,
    k: Annotated[int, Parameter(name=("-k", "--k"))] = 10,
    loss: float = 0.05,
    price: float | None = None,
    old_model: str | None = None,
    table: str | None = None,
    column: str | None = None,
    id_column: str | None = None,
    text_column: str | None = None,
    member: str | None = None,
    state: Path | None = None,
    device: str = "auto",
    seed: int = 0,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Predict what each way to a new embedding model gives and costs, on a sample that is really embedded.

    Writes into --state alone, never into the store.

    Parameters
    ----------
    store : str
        A file of vectors, a FAISS index (.faiss), a folder of LanceDB or Qdrant, or a postgresql:// or http:// address.
    encoder : str
        The new model: a sentence-transformers folder, or package.module:function, which takes a list of texts.
    texts : Path
        What was embedded, where the store does not hold it: .jsonl or .csv with id and text; or, for files, .txt or
        these two without id, one a row.
    labels : Path
        Classes of the rows, in their order (.npy or .csv with a column label): recall is then a hit of the same class.
    sample : int
        Rows that are embedded.
    k : int
        Recall is measured at so many.
    loss : float
        Recall that may be given up for a cheaper way.
    price : float
        Of embedding one item, in any unit.
    old_model : str
        What made the vectors in the store, where it has no stamp.
    table : str
        Table, collection or alias, where there are several.
    column : str
        The vectors, where there are several columns of them.
    id_column : str
        The ids.
    text_column : str
        The text that was embedded.
    member : str
        Which array of .npz or .safetensors; left out, the only one of floats, (n, d). The others are kept.
    state : Path
        Folder that remembers the upgrade; left out, STORE.upgrade (for databases, in the working folder).
    device : str
        For a model; "auto" takes an accelerator where there is one.
    seed : int
        Draws the sample.
    plot : Path
        Draw recall against the share embedded again (.svg, .png or .pdf).
    json : bool
        Print the plan as JSON.
    """
    from polyspan.integrations import Upgrade, load_encoder
    from polyspan.io import read_labels

    if re.search(r"://[^/@]*:[^/@]*@", store):
        raise ValueError(
            "store must be an address without a password, which would be kept: use PGPASSWORD or ~/.pgpass"
        )
    if k < 1:
        raise ValueError(f"-k must be at least 1, got {k}")
    if not 0 <= loss < 1:
        raise ValueError(f"--loss must be at least 0 and below 1, got {loss}")
    if price is not None and not price >= 0:
        raise ValueError(f"--price must be at least 0, got {price}")
    check_target(plot, "--plot", ".svg", ".png", ".pdf")
    check_places(plot)
    model = load_encoder(encoder, device=device)
    places = {"table": table, "column": column, "id_column": id_column, "text_column": text_column, "member": member}
    with _opened(store, places) as opened:
        upgrade = Upgrade(_state(store, state, table), opened, encoder=model, texts=_read_texts(texts))
        made = upgrade.plan(
            n_anchors=sample,
            k=k,
            old_model=old_model,
            labels=None if labels is None else read_labels(labels),
            seed=seed,
            loss=loss,
            price_per_item=price,
            renormalize=True,
        )
        # Not before: a plan that is refused must not put its encoder in the place of the one that was planned for.
        _keep_source(upgrade.folder, store, places, encoder, texts)
    for warning in made.warnings:
        say(f"warning: {warning}")
    if plot is not None:
        from polyspan.align.upgrade_plots import plot_upgrade_plan

        plot_upgrade_plan(made, plot)
    if json:
        told = made._asdict() | {"table": [row._asdict() for row in made.table]}
        told.pop("aligners")
        show_json(told | {"state": str(upgrade.folder)})
        return
    show_table(f"recall@{k} of {made.n_anchors} sampled rows", PLAN_COLUMNS, [_plan_row(row) for row in made.table])
    best = made.table[made.recommended]
    share = f" of {best.share:.0%}" if best.strategy == "backfill" else ""
    by = f" with the {best.aligner} map" if best.aligner else ""
    print(f"recommended: {best.strategy}{share}{by}: {made.reason}")
    if any(row.store_recall is not None for row in made.table):
        say(
            f"recall and its interval are of the sample; of all {made.n_rows} rows expect what the last column says, "
            "with its interval over queries"
        )
    say("time is an estimate: of the encoder, and of reading, mapping and writing a file of vectors, on the sample")
    say(f"nothing was written to the store; next: {_command('apply', upgrade.folder, '--apply')}")


def apply(
    state: Path,
    *,
    strategy: str | None = None,
    share: float | None = None,
    apply: Annotated[bool, Parameter(negative="")] = False,
    batch_rows: int | None = None,
    device: str = "auto",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Fill in next vectors beside those in use; without --apply, only say what would be done.

    A run that is killed goes on where it stopped when the same command is given again.

    Parameters
    ----------
    state : Path
        The folder of the upgrade, as "plan" named it.
    strategy : str
        query, gallery, backfill or re-embed; left out, what the plan recommends.
    share : float
        Of the items that a backfill embeds again; left out, as planned.
    apply : bool
        Really write.
    batch_rows : int
        Rows between two points from which a run goes on; left out, 65,536, or 1,024 that are embedded again.
    device : str
        For a model.
    seed : int
        Draws the items of a backfill.
    json : bool
        Print what was done as JSON.
    """
    from polyspan.io import read_json

    plan = _plan_of(state)
    source = read_json(state / "source.json")
    begun = _begun(state)
    asked = strategy is not None or share is not None
    chosen = strategy or begun.get("strategy") or plan["table"][plan["recommended"]]["strategy"]
    told: dict[str, Any] = {"store": source["store"], "strategy": chosen, "n_rows": plan["n_rows"]}
    told |= {"old": plan["old_space"], "new": plan["new_space"], "applied": apply}
    if not apply:
        told["would"] = _would(chosen, share, plan)
        given = {"--strategy": strategy, "--share": share, "--batch-rows": batch_rows}
        given |= {"--device": None if device == "auto" else device, "--seed": seed or None}
        options = [part for name, value in given.items() if value is not None for part in (name, value)]
        command = _command("apply", state, *options, "--apply")
        _show(told, json, [("would be done", told["would"]), ("to do it", command)])
        return
    with _remembered(state, device, needs_encoder=chosen in ("backfill", "re-embed")) as upgrade:
        ended = "rolled back" in upgrade.steps and upgrade.table.facts().next_dim is None
        if "stamped" not in upgrade.steps or ended or asked:
            # After a roll back the same way is gone again, if no other is asked for.
            same = begun if ended and not asked else {}
            upgrade.begin(chosen, share=same.get("share", share), seed=same.get("seed", seed))
        if chosen == "query":
            told["map"] = str(_carry_queries(upgrade, source["store"], state))
            _show(told, json, [("carries queries", told["map"]), _query_use(told["map"], plan["new_space"]["model"])])
            return
        told["made"] = upgrade.fill(batch_rows=batch_rows)
    _show(told, json, [("made now", f"{told['made']} vectors"), ("next", _command("check", state))])


def check(
    state: Path,
    *,
    bound: float | None = None,
    tol: float | None = None,
    sample: int = 256,
    device: str = "auto",
    json: bool = False,
) -> int:
    """Look at every next vector: none missing, all as the map or the model makes them, recall as predicted.

    Exit code 1 where something is wrong. Strategy query has no next vectors, and is refused.

    Parameters
    ----------
    state : Path
        The folder of the upgrade.
    bound : float
        Recall of the sample below which the check fails; left out, a little below what was predicted.
    tol : float
        Largest distance of a vector from what is expected, as a share of its length.
    sample : int
        So many of the items that a model embedded are embedded again.
    device : str
        For a model.
    json : bool
        Print what was seen as JSON.
    """
    from polyspan.errors import UnreadableFile

    _plan_of(state)
    _refuse_query(state)
    begun = _begun(state)
    if not begun:
        raise UnreadableFile(state, found="a plan alone", expected="an upgrade that polyspan upgrade apply has begun")
    embeds = begun["strategy"] in ("backfill", "re-embed")
    with _remembered(state, device, needs_encoder=embeds and sample > 0) as upgrade:
        seen = upgrade.check(n_embedded=sample, tol=tol, bound=bound)
    rows = [
        ("rows", f"{seen.n_rows}, {seen.n_missing} without a next vector"),
        ("compared", f"{seen.n_compared}, {seen.n_wrong} wrong, off by {seen.worst:.2g} at most"),
        ("recall of the sample", f"{seen.recall:.4f}, bound {seen.bound:.4f}"),
        ("verdict", "good" if seen.ok else "; ".join(seen.problems)),
    ]
    if seen.ok:
        rows.append(("next", _command("cutover", state)))
    elif any(problem.endswith("fill again") for problem in seen.problems):
        rows.append(("next", _command("apply", state, "--apply")))
    else:
        rows.append(("to give these vectors up", _command("cutover", state, "--forget")))
    _show(seen._asdict(), json, rows)
    return 0 if seen.ok else 1


def cutover(state: Path, *, forget: Annotated[bool, Parameter(negative="")] = False, json: bool = False) -> None:
    """Put the checked vectors in use, by one atomic act; the old ones stay until --forget.

    Parameters
    ----------
    state : Path
        The folder of the upgrade.
    forget : bool
        Remove what is not in use, for good: the old vectors after a cut-over, or next vectors that you do not want.
    json : bool
        Print what was done as JSON.
    """
    if not forget:
        _refuse_query(state)
    with _remembered(state) as upgrade:
        if forget:
            found = upgrade.table.facts()
            there = found.has_before or found.next_dim is not None
            upgrade.forget()
            told = "the vectors that are not in use" if there else "nothing: the store holds only vectors in use"
            _show({"forgotten": there}, json, [("removed", told)])
            return
        upgrade.cut_over()
        facts = upgrade.table.facts()
    told = {"in_use": facts.space, "dim": facts.dim, "n_rows": facts.n_rows}
    model = (facts.space or {}).get("model", "unnamed")
    rows = [("in use", f"{facts.n_rows} vectors of {model}, {facts.dim} wide"), ("old vectors", "kept")]
    rows += [("to go back", _command("rollback", state)), ("to remove them", _command("cutover", state, "--forget"))]
    _show(told, json, rows)


def rollback(state: Path, *, json: bool = False) -> None:
    """Put the old vectors in use again.

    Parameters
    ----------
    state : Path
        The folder of the upgrade.
    json : bool
        Print what was done as JSON.
    """
    _refuse_query(state)
    with _remembered(state) as upgrade:
        upgrade.roll_back()
        facts = upgrade.table.facts()
    model = (facts.space or {}).get("model", "unnamed")
    told = {"in_use": facts.space, "dim": facts.dim, "n_rows": facts.n_rows}
    rows = [("in use", f"{facts.n_rows} vectors of {model}, {facts.dim} wide")]
    _show(told, json, [*rows, ("to go on after all", _command("apply", state, "--apply"))])


def _command(step: str, state: Path, *options: Any) -> str:
    """Return a command as a shell takes it."""
    return shlex.join(["polyspan", "upgrade", step, str(state), *map(str, options)])


def _query_use(place: str, model: str) -> tuple[str, str]:
    if place.endswith(".faiss"):
        return "to use it", f"search this index by queries of {model} as they are"
    return "to use it", shlex.join(["polyspan", "align", "apply", place, "queries.npy", "--out", "carried.npy"])


def _begun(state: Path) -> dict[str, Any]:
    """Return what is remembered of an upgrade that was begun, or nothing."""
    from polyspan.io import read_json

    place = state / "upgrade.json"
    return read_json(place) if place.exists() else {}


def _show(told: dict[str, Any], json: bool, rows: list[tuple[str, str]]) -> None:
    if json:
        show_json(told)
    else:
        show_table("", ("what", "value"), rows)


def _state(store: str, state: Path | None, table: str | None) -> Path:
    """Return the folder of an upgrade: beside a file, else in the working folder."""
    if state is not None:
        return state
    path = Path(store)
    if path.is_file():
        return path.with_name(path.name + ".upgrade")
    name = path.name if path.is_dir() else "database"
    return Path(f"{name}-{table or 'vectors'}.upgrade")


@contextmanager
def _opened(store: str, places: dict[str, str | None]) -> Any:
    from polyspan.integrations import open_vector_table

    opened = open_vector_table(store, **places)
    try:
        yield opened
    finally:
        opened.sync()
        getattr(opened, "close", lambda: None)()


def _keep_source(folder: Path, store: str, places: dict[str, str | None], encoder: str, texts: Path | None) -> None:
    from polyspan.io import write_json

    told = {
        "store": store if _is_address(store) else _from_anywhere(store),
        "places": places,
        "encoder": _from_anywhere(encoder) if Path(encoder).exists() else encoder,
        "texts": None if texts is None else _from_anywhere(texts),
    }
    write_json(folder / "source.json", told)


def _is_address(store: str) -> bool:
    return store.startswith(("postgresql:", "postgres:", "http:", "https:")) or "://" in store


def _from_anywhere(path: Path | str) -> str:
    """Return a path that means the same in every working folder; a link stays one."""
    return str(Path(path).absolute())


def _plan_of(state: Path) -> dict[str, Any]:
    from polyspan.errors import UnreadableFile
    from polyspan.io import read_json

    if not (state / "plan.json").exists():
        raise UnreadableFile(state, found="no plan", expected="the folder that polyspan upgrade plan named")
    return read_json(state / "plan.json")


def _refuse_query(state: Path) -> None:
    """Say of strategy query what stands in the place of next vectors."""
    if _begun(state).get("strategy") == "query":
        raise ValueError(
            "strategy must be gallery, backfill or re-embed to check, cut over or roll back, got query: it has no next "
            f"vectors; carry vectors of new queries through {state / 'query_map.safetensors'} by polyspan align apply"
        )


@contextmanager
def _remembered(state: Path, device: str = "auto", *, needs_encoder: bool = False) -> Any:
    """Open the store of an upgrade again, as it was planned, with its encoder where one is needed."""
    from polyspan.integrations import Upgrade, load_encoder
    from polyspan.io import read_json

    _plan_of(state)
    source = read_json(state / "source.json")
    model = load_encoder(source["encoder"], device=device) if needs_encoder else None
    texts = _read_texts(Path(source["texts"])) if needs_encoder and source["texts"] is not None else None
    with _opened(source["store"], source["places"]) as opened:
        yield Upgrade(state, opened, encoder=model, texts=texts)


def _read_texts(path: Path | None) -> Any:
    """Return texts by id, or one a row where the file has no ids."""
    from polyspan.errors import WrongContent
    from polyspan.io import read_csv, read_jsonl, read_text

    if path is None:
        return None
    if path.suffix == ".txt":
        # Not by splitlines, which breaks a text at a form feed or a line separator of Unicode too.
        return [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]
    if path.suffix == ".jsonl":
        rows = [(row.get("id"), row.get("text")) for row in read_jsonl(path)]
    elif path.suffix in (".csv", ".tsv"):
        found = read_csv(path)
        if "text" not in found:
            raise WrongContent(path, found=f"columns {', '.join(found)}", expected="a column text, and id")
        rows = list(zip(found.get("id", [None] * len(found["text"])), found["text"], strict=True))
    else:
        raise ValueError(f"--texts must end in .jsonl, .csv, .tsv or .txt, got {path}")
    bad = next((i for i, (_, text) in enumerate(rows) if not isinstance(text, str)), None)
    if bad is not None:
        raise WrongContent(path, found="no text", expected="a text in every row", where=f"row {bad}")
    if all(key is None for key, _ in rows):
        return [text for _, text in rows]
    made: dict[Any, str] = {}
    for number, (key, text) in enumerate(rows):
        if not isinstance(key, int | str) or isinstance(key, bool):
            raise WrongContent(
                path, found=f"id {key!r}", expected="a number or a name in every row", where=f"row {number}"
            )
        if key in made:
            raise WrongContent(path, found=f"id {key} twice", expected="each id once", where=f"row {number}")
        made[key] = text
        # What is a number here may be written as a name in the store, and the reverse.
        if isinstance(key, int):
            made.setdefault(str(key), text)
        elif re.fullmatch(r"-?(0|[1-9][0-9]*)", key):
            made.setdefault(int(key), text)
    return made


def _carry_queries(upgrade: Any, store: str, state: Path) -> Path:
    """Return what carries queries: for FAISS an index that does it by itself, else the map."""
    from polyspan.integrations import FaissTable, wrap_queries

    if isinstance(upgrade.table, FaissTable):
        out = state / "with_queries.faiss"
        wrap_queries(store, upgrade.carry_queries(), out)
        return out
    return state / "query_map.safetensors"


def _would(strategy: str, share: float | None, plan: dict[str, Any]) -> str:
    n, dim = plan["n_rows"], plan["new_space"]["dim"]
    how = {
        "query": "",
        "gallery": "carried by the map",
        "backfill": "carried by the map, a share of them embedded again",
        "re-embed": "embedded again",
    }
    if strategy not in how:
        raise ValueError(f"--strategy must be one of {', '.join(how)}, got {strategy!r}")
    if share is not None and not (strategy == "backfill" and 0 < share < 1):
        raise ValueError(f"--share must lie in (0, 1) and goes with backfill, got {share} and {strategy}")
    if strategy == "query":
        return "queries of the new model are carried to the vectors as they are; the store gets a stamp if it has none"
    return f"{n} vectors, {dim} wide, {how[strategy]}, are written beside those in use"


def _in_store(row: Any) -> str:
    """Return predicted recall among all rows of a store with its interval, where it is known."""
    if row.store_recall is None:
        return ""
    low, high = row.store_interval
    return f"{row.store_recall:.3f} ({low:.3f} to {high:.3f})"


def _plan_row(row: Any) -> tuple[str, ...]:
    def seconds(value: float | None) -> str:
        if value is None:
            return ""
        if value < 10:
            return f"{value:.2g} s"
        return f"{value:.0f} s" if value < 600 else f"{value / 3600:.1f} h"

    return (
        row.strategy,
        row.aligner,
        f"{row.recall:.3f}",
        f"{row.interval[0]:.3f} to {row.interval[1]:.3f}",
        f"{row.share:.0%}",
        f"{row.n_written}",
        seconds(row.seconds),
        "" if row.cost is None else f"{row.cost:.2f}",
        _in_store(row),
    )
