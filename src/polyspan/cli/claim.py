"""``polyspan claim``: measure claims again, with a live table."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ._output import say, show_json


def claim(
    *slugs: str,
    all: Annotated[bool, Parameter(negative="")] = False,
    family: str | None = None,
    level: Literal["quick", "standard", "full"] = "quick",
    data: Path | None = None,
    seeds: int | None = None,
    workers: int = 1,
    engine: Literal["local", "dask", "ray"] = "local",
    address: str | None = None,
    out: Path | None = None,
    check: Annotated[bool, Parameter(negative="")] = False,
    json: bool = False,
) -> int:
    """Measure claims again: method against baseline and control.

    A run that was killed goes on where it stopped.

    Parameters
    ----------
    slugs : str
        Systems, by slug or by any of their names.
    all : bool
        Every system that works.
    family : str
        Every working system of a family.
    level : {"quick", "standard", "full"}
        quick: bundled or generated data, seconds. standard: small real data sets (POLYSPAN_DATA), minutes. full: the
        paper's own recipe, with a GPU and the network.
    data : Path
        Run method and baseline on your own file (.npz or .safetensors with the members that the claim names).
    seeds : int
        How many seeds; the claim's own number where not given.
    workers : int
        Trials that run side by side.
    engine : {"local", "dask", "ray"}
        Where trials run.
    address : str
        The cluster's address, such as tcp://host:8786.
    out : Path
        Folder for the evidence; your own polyspan folder where not given.
    check : bool
        Exit with 1 unless every claim holds.
    json : bool
        Print the evidence as JSON.
    """
    from polyspan import catalog
    from polyspan.claims import find_claim, measure_claim, write_evidence
    from polyspan.errors import MissingExtra
    from polyspan.run import user_folder

    working = [e for e in catalog.entries() if e.status == "working"]
    chosen = [find_claim(slug) for slug in slugs]
    asked = {one.slug for one in chosen}
    if all or family is not None:
        found = [e.slug for e in working if (all or e.family == family) and e.slug not in asked]
        if not found and not chosen:
            raise ValueError(f"--family must have a working system, got {family!r}")
        chosen += [find_claim(slug) for slug in found]
    if not chosen:
        raise ValueError("name at least one system, or use --all or --family; polyspan list shows them")
    if data is not None and len(chosen) != 1:
        raise ValueError(f"--data goes with one system, got {len(chosen)}")
    folder = out or user_folder("evidence")
    results = []
    with _Table([c.slug for c in chosen], quiet=json) as table:
        for one in chosen:
            if data is None and not one.levels.get(level):
                table.update(one.slug, "no " + level + " level")
                continue
            table.update(one.slug, "measuring")
            journal = user_folder("journals") / f"{one.slug}.{'user' if data else level}.jsonl"
            try:
                evidence = measure_claim(
                    one,
                    level=level,
                    data=data,
                    seeds=seeds,
                    workers=workers,
                    engine=engine,
                    address=address,
                    journal=journal,
                    tell=table.tell(one.slug),
                )
            except MissingExtra as error:
                # Of all systems, those that cannot be measured here are told and left out; one that was named is not.
                if one.slug in asked:
                    raise
                table.update(one.slug, f"left out: {error}")
                continue
            write_evidence(evidence, folder)
            results.append(evidence)
            table.update(one.slug, evidence.verdict, evidence)
    if json:
        show_json([evidence.to_json() for evidence in results])
    else:
        say(f"evidence in {folder}")
    return int(check and any(evidence.verdict != "holds" for evidence in results))


class _Table:
    """A table of claims that is drawn anew while they run; in a pipe, one line a finished claim."""

    COLUMNS = ("system", "world", "verdict", "method", "baseline", "gain (95 % interval)", "time")

    def __init__(self, slugs: list[str], *, quiet: bool):
        self.state = dict.fromkeys(slugs, ("waiting", None))
        self.quiet, self.live = quiet, None

    def __enter__(self):
        import sys

        if not self.quiet and sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(self._draw(), refresh_per_second=4).__enter__()
        return self

    def __exit__(self, *error):
        if self.live is not None:
            self.live.__exit__(*error)

    def update(self, slug: str, status: str, evidence=None) -> None:
        self.state[slug] = (status, evidence)
        if self.live is not None:
            self.live.update(self._draw())
        elif evidence is not None and not self.quiet:
            for row in self._rows(slug):
                print("\t".join(row), flush=True)
        elif not self.quiet and status != "measuring":
            print(f"{slug}\t{status}", flush=True)

    def tell(self, slug: str):
        """Return what draws the state of a claim's trials, where the table is drawn at all."""
        if self.live is None:
            return None
        return lambda done, total: self.update(slug, f"trial {done} of {total}")

    def _rows(self, slug: str):
        status, evidence = self.state[slug]
        if evidence is None:
            return [(slug, "", status, "", "", "", "")]
        rows = [(slug, "all", evidence.verdict, "", "", "", f"{evidence.wall_s:.1f} s")]
        for w in evidence.worlds:
            low, high = w.interval
            gain = f"{w.gain:+.3f} ({low:+.3f} to {high:+.3f})"
            word = (
                w.verdict if w.role != "control" else f"{w.verdict}, as it must" if w.verdict == "fails" else w.verdict
            )
            world = w.world if w.role != "control" else f"{w.world} (control)"
            rows.append(
                ("", world, word, f"{w.means['method']:.3f}", f"{w.means['baseline']:.3f}", gain, f"{w.wall_s:.1f} s")
            )
        return rows

    def _draw(self):
        from rich.table import Table

        colours = {"holds": "green", "fails": "red", "open": "yellow"}
        table = Table()
        for column in self.COLUMNS:
            table.add_column(column)
        for slug in self.state:
            for row in self._rows(slug):
                style = colours.get(row[2], "") if row[0] else ""
                table.add_row(*row, style=style)
        return table
