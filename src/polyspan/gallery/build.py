"""Build the gallery: catalogue and evidence in, a folder of static pages out."""

import os
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from polyspan.catalog import Entry
from polyspan.catalog import entries as all_entries
from polyspan.errors import FileError, UnreadableFile, WrongContent
from polyspan.io import atomic_directory, check_directory, list_folder, make_folder, read_bytes, write_bytes

from ._charts import arms_chart, better_words, gain_chart, mini_chart
from ._evidence import Run, World, read_runs
from ._words import byte_size, count, day, duration, number_format, plain_number, python_markup, shown_authors, signed

HERE = Path(__file__).parent
OWN_FOLDERS = (HERE / "evidence", HERE.parents[2] / "evidence")
LEVEL_ORDER = ("full", "standard", "quick")
STATES = {
    "holds": "the whole interval of the gain lies above the margin, and the control fails, as it must",
    "fails": "in some world the whole interval lies below the margin",
    "open": "an interval crosses the margin, or the control did not fail",
    "unmeasured": "the system works; its claim has not been measured here",
    "planned": "polyspan does not have this system yet",
}
FAMILIES = {
    "align": ("Align", "Carry vectors from one embedding space into another."),
    "cluster": ("Cluster", "Find groups by the subspaces they lie on."),
    "checkpoints": ("Checkpoints", "Make, shrink and merge model files."),
    "nn": ("Layers", "Geometric layers for a network."),
    "learn": ("Learn", "Losses, regularisers and training with structure in the representation."),
    "scenes": ("Scenes", "Pictures, volumes, video and 3D scenes as few numbers."),
    "symbols": ("Symbols", "Vectors that carry records, words and set relations."),
    "sketch": ("Sketch", "Few weighted rows that stand for all of them."),
}
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class _System:
    """An entry with the runs of its claim, the one that speaks for it first."""

    entry: Entry
    runs: tuple[Run, ...]

    @property
    def lead(self) -> Run | None:
        return self.runs[0] if self.runs else None

    @property
    def state(self) -> str:
        if self.lead is not None:
            return self.lead.verdict
        return "unmeasured" if self.entry.status == "working" else "planned"

    @property
    def family(self) -> tuple[str, str]:
        return FAMILIES.get(self.entry.family, (self.entry.family.capitalize(), ""))

    @property
    def further(self) -> list[Run]:
        """One run of each other source, for the card: a user's verdict beside the project's."""
        first = {run.source: run for run in reversed(self.runs)}
        return [run for run in self.runs if run is first[run.source] and run is not self.lead]

    @property
    def words(self) -> str:
        """What the search finds that the card does not show."""
        e = self.entry
        return " ".join((e.slug, *e.aliases, *e.names, *e.authors, e.object, *self.family))

    @property
    def updated(self) -> str:
        return max([f"{self.entry.date.isoformat()}T00:00:00Z", *(run.created for run in self.runs)])


def project_evidence() -> Path:
    """Return the folder of the project's own evidence: inside an installed package, or at the root of a clone.

    Raises
    ------
    UnreadableFile
        There is none: the package was taken out of its clone.
    """
    found = _find_own()
    if found is None:
        raise UnreadableFile(OWN_FOLDERS[0], found="no folder", expected="the evidence that comes with polyspan")
    return found


def _find_own() -> Path | None:
    return next((folder for folder in OWN_FOLDERS if folder.is_dir()), None)


def build_gallery(
    out: Path | str,
    *,
    evidence: Sequence[Path | str] | None = None,
    entries: Sequence[Entry] | None = None,
    project: Path | str | None = None,
    base_url: str = "",
) -> Path:
    """Write the static site of all systems and verdicts into ``out`` and return that folder.

    Equal input gives equal bytes. The site is whole or not there: it is made beside ``out`` and renamed.

    Parameters
    ----------
    out : path
        A new or empty folder, or a gallery built before, which is replaced. Its parent must exist.
    evidence : sequence of paths, optional
        Folders of evidence files. The project's own folder is shown as polyspan's run, any other one beside it as
        yours. Only the project's own where not given.
    entries : sequence of Entry, optional
        The systems to show; the whole catalogue where not given.
    project : path, optional
        Which folder is the project's own; :func:`project_evidence` where not given.
    base_url : str
        ``http://`` or ``https://`` address at which the site will stand: the feed's links start with it.

    Raises
    ------
    WrongContent
        An evidence file lacks a field, holds a wrong one or contradicts itself; or ``out`` holds files that no
        gallery wrote, which would be lost.
    CorruptFile, UnreadableFile
        An evidence file is no JSON; a folder is missing.
    ValueError
        ``base_url`` is no web address, or an entry's slug or family cannot be part of one.
    """
    target = Path(os.path.realpath(out))
    base_url = _checked_base(base_url)
    systems = _systems(entries if entries is not None else all_entries(), evidence, project)
    _refuse_foreign(target)
    pages = _pages(systems, base_url)
    with atomic_directory(target, replace=True) as folder:
        for parent in sorted({str(Path(name).parent) for name in pages}):
            make_folder(folder / parent)
        for name, data in pages.items():
            write_bytes(folder / name, data, durable=False)
    return Path(out)


def _systems(entries: Iterable[Entry], evidence, project) -> list[_System]:
    entries = sorted(entries, key=lambda e: (-e.date.toordinal(), e.slug))
    for found in entries:
        for field, value in (("slug", found.slug), ("family", found.family)):
            if not _SLUG.fullmatch(value):
                raise ValueError(
                    f"entries must have a {field} of lower-case letters, digits and hyphens, got {value!r}"
                )
    own = _find_own() if project is None else Path(project)
    folders = [own or project_evidence()] if evidence is None else [Path(folder) for folder in evidence]
    slugs = [found.slug for found in entries]
    runs: dict[str, list[Run]] = {slug: [] for slug in slugs}
    for folder, source, is_own in _sources(folders, own):
        for run in read_runs(folder, source, own=is_own, slugs=slugs):
            runs[run.slug].append(run)
    # The project's run speaks first; among its levels the one that asks most.
    order = {level: i for i, level in enumerate(LEVEL_ORDER)}
    return [
        _System(e, tuple(sorted(runs[e.slug], key=lambda run: (not run.own, run.on_user_data, order[run.level]))))
        for e in entries
    ]


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _sources(folders: Sequence[Path], own: Path | None) -> list[tuple[Path, str, bool]]:
    """Name each folder once: polyspan's own run, or yours, with the folder's name where there are several."""
    distinct = list({os.path.realpath(folder): folder for folder in folders}.values())
    foreign = [folder for folder in distinct if own is None or not _same(folder, own)]
    named = []
    for folder in distinct:
        is_own = folder not in foreign
        yours = "your run" if len(foreign) == 1 else f"your run in {folder.parent.name}/{folder.name}"
        named.append((folder, "polyspan’s run" if is_own else yours, is_own))
    return named


def _checked_base(base_url: str) -> str:
    if not base_url:
        return ""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"base_url must be an http or https address of a folder, got {base_url!r}")
    return base_url.rstrip("/") + "/"


def _refuse_foreign(target: Path) -> None:
    """Refuse to replace a folder in which anything lies that no earlier build wrote."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UnreadableFile(target, found="a file", expected="a folder to write the gallery to")
    there = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_symlink() or path.is_file()}
    if not there:
        return
    expected = "a new or empty folder, or a gallery built before and left as it was"
    try:
        written = {*check_directory(target), "manifest.json"}
    except FileError as error:
        raise WrongContent(target, found="files that no gallery wrote", expected=expected) from error
    if not {"index.html", "feed.xml", "verdicts.html"} <= written:
        raise WrongContent(target, found="a folder that is no gallery", expected=expected)
    if foreign := sorted(there - written):
        raise WrongContent(target, found=f"{foreign[0]!r}, which no gallery wrote", expected=expected)


def _pages(systems: Sequence[_System], base_url: str) -> dict[str, bytes]:
    """Return every file of the site by its name in the folder."""
    env = Environment(
        loader=PackageLoader("polyspan.gallery", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {
        "day": day, "duration": duration, "byte_size": byte_size, "python": python_markup, "code_url": code_url,
    }  # fmt: skip
    families = [name for name in FAMILIES if any(s.entry.family == name for s in systems)]
    families += sorted({s.entry.family for s in systems} - set(families))
    tally = Counter(s.state for s in systems)
    shared: dict[str, Any] = {
        "count": count,
        "shown_authors": shown_authors,
        "better_words": better_words,
        "states": STATES,
        "n_systems": len(systems),
        "n_working": sum(s.entry.status == "working" for s in systems),
        "tally": [(state, tally[state]) for state in STATES if tally[state]],
        "families": [(name, *_family_words(name), sum(s.entry.family == name for s in systems)) for name in families],
    }

    def render(template: str, **values: Any) -> bytes:
        return env.get_template(template).render(shared | values).encode("utf-8")

    pages = {
        "index.html": render("index.html", root="", family=None, years=_by_year(systems)),
        "verdicts.html": render("verdicts.html", root="", rows=_verdict_rows(systems), systems=systems),
        "feed.xml": render("feed.xml", systems=systems, base=base_url, feed=_feed_facts(systems)),
    }
    for name in families:
        members = [s for s in systems if s.entry.family == name]
        pages[f"families/{name}.html"] = render("index.html", root="../", family=name, years=_by_year(members))
    for i, system in enumerate(systems):
        values = {
            "newer": systems[i - 1].entry if i else None,
            "older": systems[i + 1].entry if i + 1 < len(systems) else None,
            "related": [s for s in systems if s.entry.family == system.entry.family and s is not system][:5],
        }
        pages[f"systems/{system.entry.slug}.html"] = render(
            "system.html", root="../", system=system, e=system.entry, charts=_gain_charts(system.runs),
            runs=_run_facts(system.runs), **values,
        )  # fmt: skip
    for path in list_folder(HERE / "static"):
        pages[f"static/{path.name}"] = read_bytes(path)
    return pages


def _family_words(name: str) -> tuple[str, str]:
    return FAMILIES.get(name, (name.capitalize(), ""))


def _by_year(systems: Sequence[_System]) -> list[tuple[int, list[dict[str, Any]]]]:
    """Return years, newest first, each with what its cards show."""
    return [
        (year, [_card(system) for system in members])
        for year, members in groupby(systems, key=lambda s: s.entry.date.year)
    ]


def _card(system: _System) -> dict[str, Any]:
    chart = mini_chart(system.lead, f"mini-{system.entry.slug}") if system.lead else Markup()
    return {"system": system, "e": system.entry, "chart": chart}


def _run_facts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return what a system's page shows of each run: charts, and the same numbers as text for its tables."""
    facts, seen = [], set()
    for i, run in enumerate(runs, start=1):
        key, source = f"run-{i}", run.source if run.own else run.source[0].upper() + run.source[1:]
        worlds = [_world_facts(run, world, f"{key}-world-{j}") for j, world in enumerate(run.worlds, start=1)]
        title = f"{source}: {run.about if run.on_user_data else run.about + ' level'}"
        first = run.source not in seen
        facts.append({
            "run": run, "key": key, "title": title, "first": first, "reason": _reason(run), "worlds": worlds,
        })  # fmt: skip
        seen.add(run.source)
    return facts


def _world_facts(run: Run, world: World, key: str) -> dict[str, Any]:
    words = number_format([end for arm in world.arms for end in (*arm.interval, *arm.trials, arm.mean)])
    gain = number_format([world.gain, *world.interval])
    names = {"method": run.method, "baseline": run.baseline}
    return {
        "world": world,
        "key": key,
        "chart": arms_chart(run, world, key),
        "rows": [
            (arm.name, names.get(arm.name, ""), words(arm.mean), _interval(words, arm.interval)) for arm in world.arms
        ],
        "gain": (signed(gain(world.gain)), _interval(gain, world.interval)),
        "margin": plain_number(run.margin),
        "trials": [(seed, [words(arm.trials[i]) for arm in world.arms]) for i, seed in enumerate(world.seeds)],
    }


def _interval(words, ends: tuple[float, float]) -> str:
    return f"{words(ends[0])} to {words(ends[1])}"


def _reason(run: Run) -> str:
    """Say in one sentence why the verdict is what it is."""
    main = [world for world in run.worlds if world.role != "control"]
    if run.verdict == "holds":
        where = "in its world" if len(main) == 1 else f"in all {len(main)} worlds"
        control = ", and the control fails, as it must" if run.control else ""
        return f"The whole interval of the gain lies above the margin {where}{control}."
    if run.verdict == "fails":
        failed = ", ".join(world.name for world in main if world.verdict == "fails")
        return f"The whole interval of the gain lies below the margin in: {failed}."
    parts = []
    if crossed := [world.name for world in main if world.verdict == "open"]:
        parts.append(f"The interval of the gain crosses the margin, or has too few seeds, in: {', '.join(crossed)}.")
    if not run.control_ok:
        parts.append("The control did not clearly fail, so the gain may have another cause than the claimed one.")
    return " ".join(parts)


def _gain_charts(runs: Sequence[Run]) -> list[tuple[Run, Markup]]:
    """Return one chart of gains for each metric and margin, so that all runs of a system stand side by side."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.metric, run.better, run.margin), []).append(run)
    return [(group[0], gain_chart(group, f"gain-{i + 1}")) for i, group in enumerate(groups.values())]


def _verdict_rows(systems: Sequence[_System]) -> list[dict[str, Any]]:
    rows = []
    for system in systems:
        for run in system.runs:
            words = number_format([run.lead.gain, *run.lead.interval])
            rows.append({
                "e": system.entry,
                "family": system.family[0],
                "run": run,
                "gain": signed(words(run.lead.gain)),
                "interval": _interval(words, run.lead.interval),
                "margin": plain_number(run.margin),
            })  # fmt: skip
    return rows


def _feed_facts(systems: Sequence[_System]) -> dict[str, Any]:
    """Return ids that stay whatever the address, and the newest moment of any entry."""
    return {
        "id": _urn("gallery"),
        "ids": {s.entry.slug: _urn(f"systems/{s.entry.slug}") for s in systems},
        "updated": max((s.updated for s in systems), default="1970-01-01T00:00:00Z"),
    }


def _urn(name: str) -> str:
    return f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, 'polyspan:' + name)}"


def code_url(code: str) -> str:
    """Return the address of a code repository: ``owner/name`` is on GitHub."""
    return code if code.startswith(("https://", "http://")) else f"https://github.com/{quote(code)}"
