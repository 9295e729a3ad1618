"""What a claim is, and how it is measured: paired arms over seeds, a bootstrapped gain, a verdict."""

import hashlib
import importlib
import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from polyspan import catalog
from polyspan.errors import WrongContent
from polyspan.io import digest_array, make_folder, read_json, read_members, write_json
from polyspan.run import Journal, machine_facts, map_tasks, measure_peak

LEVELS = ("quick", "standard", "full")
SCHEMA = 1
RESAMPLES = 10_000
Verdict = Literal["holds", "fails", "open"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One falsifiable sentence about a system, and the experiment that can refute it.

    Parameters
    ----------
    slug : str
        The system's catalogue key.
    statement : str
        What is claimed, in one sentence.
    method, baseline : str
        What the two arms are, in words. The baseline is the strongest fair one: same data, seed, budget and tuning.
    metric : str
        What ``trial`` returns an arm, with its unit.
    margin : float
        The gain of the method over the baseline must lie above it, in units of the metric. Below 0 it states
        non-inferiority.
    worlds : mapping of str to callable
        A name to ``world(seed) -> data``; the data is usually a NamedTuple of arrays. Worlds of real data read it
        through :mod:`polyspan.data` and use the seed to resample.
    control : str
        The world in which the method must not gain: where the claim's own reason is absent.
    trial : callable
        ``trial(data, seed) -> {"method": float, "baseline": float, ...}``; further arms are shown, not judged.
    better : {"higher", "lower"}
    levels : mapping of str to sequence of str
        Which main worlds belong to ``quick`` (bundled or generated data, seconds), ``standard`` (small real sets,
        minutes) and ``full`` (the paper's recipe). A level that is missing has nothing to measure.
    seeds : mapping of str to int
        How many seeds a level takes.
    user_data : NamedTuple class, optional
        The members that ``--data FILE`` must hold; without it the claim cannot run on a user's file.
    spoil : callable, optional
        ``spoil(data, seed) -> data`` takes from a user's data what the method lives on: the control on ``--data``.
    why : str
        Where the method does and does not win, as measured; shown on its page.
    """

    slug: str
    statement: str
    method: str
    baseline: str
    metric: str
    margin: float
    worlds: Mapping[str, Callable[[int], Any]]
    control: str
    trial: Callable[[Any, int], Mapping[str, float]]
    better: str = "higher"
    levels: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"quick": ("planted",)})
    seeds: Mapping[str, int] = field(default_factory=lambda: {"quick": 8, "standard": 5, "full": 3})
    user_data: type | None = None
    spoil: Callable[[Any, int], Any] | None = None
    why: str = ""

    def __post_init__(self):
        if self.better not in ("higher", "lower"):
            raise ValueError(f"better must be 'higher' or 'lower', got {self.better!r}")
        if self.control not in self.worlds:
            raise ValueError(f"control must be one of the worlds {sorted(self.worlds)}, got {self.control!r}")
        for level, names in self.levels.items():
            if level not in LEVELS:
                raise ValueError(f"levels must be among {LEVELS}, got {level!r}")
            unknown = [name for name in names if name not in self.worlds]
            if unknown or self.control in names:
                raise ValueError(
                    f"levels[{level!r}] must name main worlds among {sorted(self.worlds)}, got {list(names)}"
                )


@dataclass(frozen=True, kw_only=True)
class WorldEvidence:
    """What was measured in one world; ``gain`` is signed so that more is better, in units of the metric."""

    world: str
    role: Literal["main", "control", "user"]
    verdict: Verdict
    gain: float
    interval: tuple[float, float]
    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    trials: dict[str, list[float]]
    seeds: list[int]
    data_digest: str
    wall_s: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A claim at one level with all that is needed to measure it again."""

    slug: str
    level: str
    statement: str
    method: str
    baseline: str
    metric: str
    better: str
    margin: float
    why: str
    verdict: Verdict
    control: str
    control_ok: bool
    worlds: list[WorldEvidence]
    machine: dict
    versions: dict
    created: str
    wall_s: float
    peak_bytes: int
    schema: int = SCHEMA

    def to_json(self) -> dict:
        """Return plain JSON types; see :func:`write_evidence`."""
        return asdict(self)


def find_claim(slug: str) -> Claim:
    """Return the claim of a system, by its slug or by any of its names in the catalogue.

    Raises
    ------
    ValueError
        No system is called that, or it is only planned and has no claim yet.
    """
    found = catalog.entry(slug)
    module = "polyspan.claims." + found.slug.replace("-", "_")
    try:
        return importlib.import_module(module).CLAIM
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(
            f"slug must name a system that has a claim, got {found.slug!r}, which is {found.status}"
        ) from None


def _digest(data: Any) -> str:
    """SHA-256 over the arrays of a world's data, in the order of its fields."""
    total = hashlib.sha256()
    for part in data if isinstance(data, tuple) else (data,):
        if hasattr(part, "indptr"):
            total.update("".join(map(digest_array, (part.data, part.indices, part.indptr))).encode())
        elif part is not None:
            total.update(digest_array(np.asarray(part)).encode())
    return total.hexdigest()


def _one_trial(claim: Claim, user_data: Any, item: tuple[str, int]) -> dict:
    """Make one world at one seed, run every arm on it, and return JSON types."""
    world, seed = item
    if world == "user":
        data = user_data
    elif world == "user-spoilt":
        assert claim.spoil is not None
        data = claim.spoil(user_data, seed)
    else:
        data = claim.worlds[world](seed)
    measured = measure_peak(partial(claim.trial, data, seed))
    arms = {name: float(value) for name, value in measured.result.items()}
    if not {"method", "baseline"} <= arms.keys():
        raise ValueError(f"trial must return 'method' and 'baseline', got {sorted(arms)} from {claim.slug}")
    bad = [name for name, value in arms.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"trial must return finite numbers, got {arms[bad[0]]} for {bad[0]!r} in {world!r}, seed {seed}"
        )
    return {"arms": arms, "digest": _digest(data), "wall_s": measured.wall_s, "peak_bytes": int(measured.peak_bytes)}


def _bootstrap(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Percentile interval of the mean; the resampling is seeded, so equal trials give equal intervals."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def judge(gains: Iterable[float], margin: float, confidence: float = 0.95) -> tuple[Verdict, tuple[float, float]]:
    """Say whether paired gains hold above ``margin``: the bootstrapped interval lies above it, below it, or across.

    Fewer than three seeds are always *open*: their spread says nothing.
    """
    values = np.array(list(gains), dtype=np.float64)
    low, high = _bootstrap(values, confidence)
    if len(values) >= 3 and low > margin:
        return "holds", (low, high)
    if len(values) >= 3 and high < margin:
        return "fails", (low, high)
    return "open", (low, high)


def _world_evidence(claim, world, role, seeds, results, confidence) -> WorldEvidence:
    names = list(results[0]["arms"])
    trials = {name: [result["arms"][name] for result in results] for name in names}
    sign = 1.0 if claim.better == "higher" else -1.0
    gains = [sign * (m - b) for m, b in zip(trials["method"], trials["baseline"], strict=True)]
    verdict, interval = judge(gains, claim.margin, confidence)
    return WorldEvidence(
        world=world,
        role=role,
        verdict=verdict,
        gain=float(np.mean(gains)),
        interval=interval,
        means={name: float(np.mean(values)) for name, values in trials.items()},
        intervals={name: _bootstrap(np.asarray(values), confidence) for name, values in trials.items()},
        trials=trials,
        seeds=list(seeds),
        data_digest=hashlib.sha256("".join(r["digest"] for r in results).encode()).hexdigest(),
        wall_s=float(sum(r["wall_s"] for r in results)),
        peak_bytes=max(r["peak_bytes"] for r in results),
    )


def measure(
    claim: Claim, world: str | None = None, *, seeds: int | None = None, workers: int = 1, confidence: float = 0.95
) -> WorldEvidence:
    """Measure one world of a claim and judge it.

    Parameters
    ----------
    world : str, optional
        One of ``claim.worlds``; the first quick world where not given.
    seeds : int, optional
        Seeds ``0 .. seeds - 1``; the claim's own number for ``quick`` where not given.

    Raises
    ------
    ValueError
        The world is not one of the claim's.
    """
    world = world or claim.levels["quick"][0]
    if world not in claim.worlds:
        raise ValueError(f"world must be one of {sorted(claim.worlds)}, got {world!r}")
    chosen = range(claim.seeds["quick"] if seeds is None else seeds)
    results = map_tasks(partial(_one_trial, claim, None), [(world, seed) for seed in chosen], workers=workers)
    role = "control" if world == claim.control else "main"
    return _world_evidence(claim, world, role, chosen, results, confidence)


def read_user_data(claim: Claim, path: Path) -> Any:
    """Read the members that a claim wants from a user's .npz or .safetensors file.

    Raises
    ------
    ValueError
        The claim cannot run on a user's file.
    WrongContent
        A member is missing, or no two of them fit together where the claim says they must.
    """
    if claim.user_data is None:
        raise ValueError(f"--data is not possible for {claim.slug}: its claim is about the worlds that it makes itself")
    members = read_members(path, list(claim.user_data._fields))  # ty: ignore[missing-attribute]
    return claim.user_data(**members)


class _TellingJournal(Journal):
    """A journal that says how far the work is."""

    def __init__(self, path: Path, header: dict, tell: Callable[[int, int], None] | None, total: int):
        super().__init__(path, header)
        self.tell, self.total = tell, total

    def record(self, key: str, value: Any) -> None:
        super().record(key, value)
        if self.tell is not None:
            self.tell(len(self.done), self.total)


def _fingerprint(claim: Claim) -> str:
    """Digest of the claim's own source: trials measured by another text are not continued."""
    source = inspect.getsource(inspect.getmodule(claim.trial) or type(claim))
    return hashlib.sha256(source.encode()).hexdigest()


def measure_claim(
    claim: Claim,
    *,
    level: str = "quick",
    data: Path | None = None,
    seeds: int | None = None,
    workers: int = 1,
    engine: str = "local",
    address: str | None = None,
    journal: Path | None = None,
    tell: Callable[[int, int], None] | None = None,
    confidence: float = 0.95,
) -> Evidence:
    """Measure every world of a level and the control, and put the evidence together.

    Parameters
    ----------
    level : {"quick", "standard", "full"}
    data : path, optional
        A user's own file: method and baseline run on it, and on what ``claim.spoil`` makes of it, in place of the
        level's worlds.
    journal : path, optional
        Where finished trials are kept, so that a killed run goes on; a journal of another claim text, level, file or
        version is thrown away.
    tell : callable, optional
        ``tell(done, total)`` after each trial, in place of a progress bar; needs the journal.

    Raises
    ------
    ValueError
        The level has no worlds, or the claim takes no user data.
    """
    started = time.perf_counter()
    if level not in LEVELS:
        raise ValueError(f"level must be one of {LEVELS}, got {level!r}")
    user = None if data is None else read_user_data(claim, data)
    if user is not None:
        plan = [("user", "user")] + ([("user-spoilt", "control")] if claim.spoil else [])
    elif claim.levels.get(level):
        plan = [(world, "main") for world in claim.levels[level]] + [(claim.control, "control")]
    else:
        raise ValueError(f"level must be one that {claim.slug} has, {sorted(claim.levels)}, got {level!r}")
    count = claim.seeds.get(level, 5) if seeds is None else seeds
    if count < 1:
        raise ValueError(f"seeds must be at least 1, got {count}")
    items = [(world, seed) for world, _ in plan for seed in range(count)]
    facts = machine_facts()
    kept = None
    if journal is not None:
        header = {
            "slug": claim.slug,
            "level": level,
            "claim": _fingerprint(claim),
            "data": None if user is None else _digest(user),
            "polyspan": facts["versions"]["polyspan"],
        }
        try:
            kept = _TellingJournal(journal, header, tell, len(items))
        except ValueError:
            Journal.discard(journal)
            kept = _TellingJournal(journal, header, tell, len(items))
    results = map_tasks(
        partial(_one_trial, claim, user),
        items,
        workers=workers,
        engine=engine,
        address=address,
        journal=kept,
        key=lambda item: f"{item[0]}/{item[1]}",
        label="" if tell else f"{claim.slug} ({level})",
    )
    worlds = [
        _world_evidence(claim, world, role, range(count), results[i * count : (i + 1) * count], confidence)
        for i, (world, role) in enumerate(plan)
    ]
    main = [w.verdict for w in worlds if w.role != "control"]
    controls = [w.verdict for w in worlds if w.role == "control"]
    control_ok = all(verdict == "fails" for verdict in controls)
    if kept is not None:
        kept.remove()
    return Evidence(
        slug=claim.slug,
        level=level,
        statement=claim.statement,
        method=claim.method,
        baseline=claim.baseline,
        metric=claim.metric,
        better=claim.better,
        margin=claim.margin,
        why=claim.why,
        verdict=_overall(main, control_ok),
        control=next((w.world for w in worlds if w.role == "control"), ""),
        control_ok=control_ok,
        worlds=worlds,
        machine=facts["machine"],
        versions=facts["versions"],
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        wall_s=round(time.perf_counter() - started, 3),
        peak_bytes=max(w.peak_bytes for w in worlds),
    )


def _overall(main: Sequence[str], control_ok: bool) -> Verdict:
    """A claim holds where every main world holds and the control fails; one world that fails refutes it."""
    if "fails" in main:
        return "fails"
    return "holds" if control_ok and all(verdict == "holds" for verdict in main) else "open"


def write_evidence(evidence: Evidence, folder: Path) -> Path:
    """Write ``<slug>.<level>.json`` (``<slug>.user.json`` for a user's own file) atomically; return its path."""
    kind = "user" if any(w.role == "user" for w in evidence.worlds) else evidence.level
    path = make_folder(folder) / f"{evidence.slug}.{kind}.json"
    write_json(path, evidence.to_json())
    return path


def read_evidence(path: Path) -> dict:
    """Read one evidence file as JSON types.

    Raises
    ------
    WrongContent
        It is no evidence of a schema that this version knows.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or "slug" not in found:
        raise WrongContent(path, found="JSON that is no evidence", expected=f"evidence of schema {SCHEMA}")
    return found
