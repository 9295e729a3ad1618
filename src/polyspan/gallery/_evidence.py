"""Evidence files as the gallery shows them: every field checked, since a user may have got the file from anyone."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from polyspan.claims import LEVELS, read_evidence
from polyspan.errors import WrongContent
from polyspan.io import list_folder

VERDICTS = ("holds", "fails", "open")
ROLES = ("main", "control", "user")
MAX_TEXT = 4000
MAX_NUMBER = 1e100
# What neither XML nor a page can show: control characters, surrogates, non-characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm of a trial in one world: its mean over seeds, the interval of that mean, the value at each seed."""

    name: str
    mean: float
    interval: tuple[float, float]
    trials: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class World:
    """One world of a run; ``gain`` is signed so that more is better, in units of the metric."""

    name: str
    role: str
    verdict: str
    gain: float
    interval: tuple[float, float]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    data_digest: str
    wall_s: float
    peak_bytes: float

    def arm(self, name: str) -> Arm:
        """Return an arm; ``"method"`` and ``"baseline"`` are always there."""
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One evidence file; ``source`` says in words whose run it is, ``own`` whether it is the project's."""

    source: str
    own: bool
    file: str
    slug: str
    level: str
    statement: str
    method: str
    baseline: str
    metric: str
    better: str
    margin: float
    why: str
    verdict: str
    control: str
    control_ok: bool
    worlds: tuple[World, ...]
    machine: dict[str, Any]
    versions: dict[str, str]
    created: str
    wall_s: float
    peak_bytes: float

    @property
    def on_user_data(self) -> bool:
        """Whether the run was made on a user's own file."""
        return any(world.role == "user" for world in self.worlds)

    @property
    def about(self) -> str:
        """What was run: a level of the project's worlds, or the claim on a user's own file."""
        return "own data" if self.on_user_data else self.level

    @property
    def lead(self) -> World:
        """The world that a card shows: the first main world with the run's verdict, so that none is hidden."""
        main = [world for world in self.worlds if world.role != "control"]
        return next((world for world in main if world.verdict == self.verdict), main[0])


def read_runs(folder: Path, source: str, *, own: bool, slugs: Iterable[str]) -> list[Run]:
    """Read every ``*.json`` of a folder, by name.

    Raises
    ------
    WrongContent
        A file is no evidence, lacks a field, holds one of another type, contradicts itself, or is about a system that
        is not in the catalogue; the file and the field are named.
    CorruptFile, UnreadableFile
        A file is no JSON (NaN included), or cannot be read.
    """
    known = set(slugs)
    runs = []
    for path in list_folder(folder, "*.json"):
        run = _read_run(path, source, own)
        if run.slug not in known:
            raise WrongContent(path, found=f"slug {run.slug!r}", expected="a system of the catalogue", where="slug")
        runs.append(run)
    return runs


def _read_run(path: Path, source: str, own: bool) -> Run:
    fields = _Fields(path, read_evidence(path))
    run = Run(
        source=source,
        own=own,
        file=path.name,
        slug=fields.text("slug"),
        level=fields.choice("level", LEVELS),
        statement=fields.text("statement"),
        method=fields.text("method"),
        baseline=fields.text("baseline"),
        metric=fields.text("metric"),
        better=fields.choice("better", ("higher", "lower")),
        margin=fields.number("margin"),
        why=fields.text("why", may_be_empty=True),
        verdict=fields.choice("verdict", VERDICTS),
        control=fields.text("control", may_be_empty=True),
        control_ok=fields.flag("control_ok"),
        worlds=tuple(_read_world(world) for world in fields.objects("worlds")),
        machine=fields.scalars("machine"),
        versions={key: str(value) for key, value in fields.scalars("versions").items()},
        created=fields.moment("created"),
        wall_s=fields.number("wall_s", low=0.0),
        peak_bytes=fields.number("peak_bytes", low=0.0),
    )
    _check_verdicts(fields, run)
    return run


def _read_world(fields: "_Fields") -> World:
    means, intervals, trials = (fields.inside(key) for key in ("means", "intervals", "trials"))
    names = list(means.value)
    for name in ("method", "baseline"):
        if name not in names:
            means.refuse(name, f"the arms {names}", f"an arm {name!r}")
    seeds = tuple(int(seed) for seed in fields.numbers("seeds", whole=True))
    arms = tuple(
        Arm(
            name=means.printable(name, name),
            mean=means.number(name),
            interval=intervals.pair(name),
            trials=trials.numbers(name, length=len(seeds)),
        )
        for name in sorted(names, key=lambda name: (name != "method", name != "baseline", name))
    )
    return World(
        name=fields.text("world"),
        role=fields.choice("role", ROLES),
        verdict=fields.choice("verdict", VERDICTS),
        gain=fields.number("gain"),
        interval=fields.pair("interval"),
        arms=arms,
        seeds=seeds,
        data_digest=fields.text("data_digest", may_be_empty=True),
        wall_s=fields.number("wall_s", low=0.0),
        peak_bytes=fields.number("peak_bytes", low=0.0),
    )


def _check_verdicts(fields: "_Fields", run: Run) -> None:
    """Refuse a file whose verdicts do not follow from its own numbers: somebody wrote them by hand."""
    for i, world in enumerate(run.worlds):
        low, high = world.interval
        if (world.verdict == "holds" and low <= run.margin) or (world.verdict == "fails" and high >= run.margin):
            found = f"{world.verdict!r} with the interval [{low:g}, {high:g}]"
            fields.refuse(f"worlds[{i}].verdict", found, f"what the margin {run.margin:g} makes of the interval")
    main = [world.verdict for world in run.worlds if world.role != "control"]
    if not main:
        fields.refuse("worlds", "control worlds only", "a main world")
    control_ok = all(world.verdict == "fails" for world in run.worlds if world.role == "control")
    follows = "fails" if "fails" in main else "holds" if control_ok and set(main) == {"holds"} else "open"
    if run.control_ok != control_ok:
        fields.refuse("control_ok", str(run.control_ok), f"{control_ok}, which follows from the control worlds")
    if run.verdict != follows:
        fields.refuse("verdict", repr(run.verdict), f"{follows!r}, which follows from the worlds")


class _Fields:
    """The fields of one JSON object, each asked for with its type; a wrong one names the file and the place."""

    def __init__(self, path: Path, value: dict[str, Any], place: str = ""):
        self.path, self.value, self.place = path, value, place

    def refuse(self, key: str, found: str, expected: str) -> NoReturn:
        where = f"{self.place}.{key}" if self.place else key
        raise WrongContent(self.path, found=found[:200], expected=expected, where=where[:200])

    def get(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        if key not in self.value:
            self.refuse(key, "nothing", expected)
        found = self.value[key]
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            self.refuse(key, repr(found)[:80], expected)
        return found

    def printable(self, key: str, text: str) -> str:
        if len(text) > MAX_TEXT:
            self.refuse(key, f"{len(text):,} characters", f"at most {MAX_TEXT:,}")
        if found := _UNPRINTABLE.search(text):
            self.refuse(key, f"the control character {found.group()!r}", "text that a page can show")
        return text

    def text(self, key: str, *, may_be_empty: bool = False) -> str:
        found = self.printable(key, self.get(key, str, "text"))
        if not found.strip() and not may_be_empty:
            self.refuse(key, "an empty text", "text")
        return found

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        found = self.get(key, str, f"one of {choices}")
        if found not in choices:
            self.refuse(key, repr(found)[:80], f"one of {choices}")
        return found

    def flag(self, key: str) -> bool:
        return self.get(key, bool, "true or false")

    def _finite(self, key: str, found: Any, low: float) -> float:
        expected = f"a number from {low:g} to {MAX_NUMBER:g}"
        if isinstance(found, bool) or not isinstance(found, int | float) or not low <= found <= MAX_NUMBER:
            self.refuse(key, repr(found)[:80], expected)
        return float(found)

    def number(self, key: str, *, low: float = -MAX_NUMBER) -> float:
        return self._finite(key, self.get(key, (int, float), "a number"), low)

    def numbers(self, key: str, *, length: int | None = None, whole: bool = False) -> tuple[float, ...]:
        expected = "a list of numbers" if length is None else f"{length} numbers, one a seed"
        found = self.get(key, list, expected)
        if not found or length not in (None, len(found)):
            self.refuse(key, f"{len(found)} entries", expected)
        if whole and not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in found):
            self.refuse(key, repr(found)[:80], "whole numbers")
        return tuple(self._finite(f"{key}[{i}]", entry, -MAX_NUMBER) for i, entry in enumerate(found))

    def pair(self, key: str) -> tuple[float, float]:
        low, high = self.numbers(key, length=2)
        if low > high:
            self.refuse(key, f"[{low:g}, {high:g}]", "the lower end first")
        return low, high

    def moment(self, key: str) -> str:
        expected = "a moment in UTC such as 2026-11-25T04:00:00Z"
        found = self.text(key)
        try:
            stamp = datetime.strptime(found, "%Y-%m-%dT%H:%M:%SZ")
        except ValueError:
            self.refuse(key, repr(found)[:80], expected)
        return stamp.isoformat() + "Z"

    def inside(self, key: str) -> "_Fields":
        place = f"{self.place}.{key}" if self.place else key
        return _Fields(self.path, self.get(key, dict, "an object"), place)

    def objects(self, key: str) -> list["_Fields"]:
        found = self.get(key, list, "a list of objects")
        for i, entry in enumerate(found):
            if not isinstance(entry, dict):
                self.refuse(f"{key}[{i}]", repr(entry)[:80], "an object")
        return [_Fields(self.path, entry, f"{key}[{i}]") for i, entry in enumerate(found)]

    def scalars(self, key: str) -> dict[str, Any]:
        inner = self.inside(key)
        for name, entry in inner.value.items():
            inner.printable(name, name)
            if isinstance(entry, str):
                inner.printable(name, entry)
            elif isinstance(entry, bool) or not (entry is None or isinstance(entry, int | float)):
                inner.refuse(name, repr(entry)[:80], "text, a number or null")
            elif entry is not None:
                inner._finite(name, entry, 0.0)
        return inner.value
