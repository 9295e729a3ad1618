"""Merge checkpoint files tensor by tensor, into a sharded folder; a killed merge goes on where it was."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyspan.errors import UnreadableFile, WrongContent
from polyspan.io import (
    TENSOR_CODES,
    ShardedState,
    digest_file,
    dump_json,
    list_folder,
    make_folder,
    read_bytes,
    read_json,
    read_members,
    sweep_temporaries,
    tensor_bytes,
    write_bytes,
    write_json,
    write_tensor_blocks,
)
from polyspan.io.atomic import MANIFEST
from polyspan.io.torch_tensors import INDEX
from polyspan.run import Journal, map_tasks

from ._hub import local_checkpoint
from ._magnitude_rank import magnitude, magnitude_counts, ranked_bin, share_rank
from ._merge_states import ADAPTER, as_states, dtype_of, is_statistic, mergeable, shape_of
from .concrete_merging import load_mask
from .task_vectors import (
    Trimmed,
    changes,
    majority_sign,
    merge_rule,
    merged_blocks,
    sign_votes,
)

JOURNAL = "merge.journal.jsonl"
RECORD = "merge.json"
COPIED = 2**26
OWN = {"ties": ("density", "reduction", "scope"), "dare": ("density", "rescale", "elect", "seed")}
STREAMED = ("average", "task_arithmetic", "ties", "dare")
ALONE = {"workers": 1, "engine": "local", "address": None}


class MergedFiles(NamedTuple):
    """What :func:`merge_checkpoints` wrote.

    Attributes
    ----------
    path : Path
    shards : list of Path
    tensors, merged : int
        How many tensors there are, and how many of them were merged; the others are the base's.
    resumed : int
        Shards that an interrupted run had finished.
    """

    path: Path
    shards: list[Path]
    tensors: int
    merged: int
    resumed: int


def merge_checkpoints(
    base: Path | str,
    models: Mapping[str, Path | str],
    out: Path | str,
    *,
    method: str = "task_arithmetic",
    weights: Sequence[float | int] | None = None,
    mask: Path | str | None = None,
    ignore_keys: Sequence[str] = (),
    shard_bytes: int | None = None,
    workers: int | None = 1,
    engine: str = "local",
    address: str | None = None,
    verbose: bool = False,
    **parameters: Any,
) -> MergedFiles:
    """Merge files of any size into a folder of .safetensors shards, block by block.

    Tensors are read, merged and written in blocks of rows: memory grows neither with the number of layers nor with
    their sizes, except that a mask and the two factors of an adapter are held whole, and a tensor while its stored
    digest is compared. Shards are written atomically and journalled: the same call goes on after an interrupt, and
    ends in the same bytes, on any number of workers. The index, without which no one reads several shards, comes last.
    Other small files of the base's folder (configuration, tokenizer) are copied.
    Source: catalogue entry ``concrete-merging``.

    Parameters
    ----------
    base : path
        A .safetensors file, a folder of them, or a model's name on the hub.
    models : mapping of str to path
        By task; each what the base may be, or the folder of a LoRA or Tucker adapter of PEFT.
    out : path
        A folder: new, empty, or one that the same merge has begun.
    method : {"average", "task_arithmetic", "ties", "dare"}
    weights : sequence of float, optional
        One a model.
    mask : path, optional
        Logits that :meth:`ConcreteMerger.save_mask` wrote, for "task_arithmetic".
    ignore_keys : sequence of str
        Names or patterns whose tensors stay the base's.
    shard_bytes : int, optional
        Size that a shard does not exceed unless one tensor does; the largest tensor's where not given.
    workers, engine, address
        As of :func:`polyspan.run.map_tasks`, over which shards go: so many at most are merged side by side, each in
        memory of its own, and a merge into one shard is the work of one. Several workers find what TIES must know of
        the whole model, its limits and the majority of signs, in passes of their own before. Workers must see the
        files and the folder ``out``.
    verbose : bool
    **parameters
        Options of :func:`task_arithmetic`, :func:`ties` or :func:`dare`.

    Raises
    ------
    UnreadableFile, CorruptFile, UntrustedFile, WrongContent, TooLarge
        See :mod:`polyspan.errors`; ``out`` holding other files is ``UnreadableFile``.
    ValueError
        An option is outside its range, or names or shapes differ.
    """
    if method not in STREAMED:
        raise ValueError(f"method must be one of {STREAMED}, got {method!r}")
    if mask is not None and method != "task_arithmetic":
        raise ValueError(f"mask must go with method 'task_arithmetic', got {method!r}")
    base = local_checkpoint(base, files=True)
    models = {task: local_checkpoint(path, files=True) for task, path in models.items()}
    start = ShardedState(base)
    states = as_states(models, start)
    names = sorted(mergeable(start, states, ignore_keys))
    options: dict[str, Any] = {"weights": None if weights is None else [float(w) for w in weights]}
    if method == "average":
        _only(parameters, set(), method)
        # An average of weighted models is one whose weights sum to 1.
        total = math.fsum(weights) if weights is not None else len(states)
        if total == 0:
            raise ValueError("weights must not sum to 0 for an average")
        options |= {"scaling": 1 / total}
    else:
        _only(parameters, {"scaling", *OWN.get(method, ())}, method)
        options |= {"density": {"ties": 0.2, "dare": 0.5}.get(method, 1.0), **parameters}
    called = "task_arithmetic" if method == "average" else method
    kept = None if mask is None else load_mask(mask)
    # Options are looked at before anything is written.
    merge_rule(called, start, states, names, mask=kept, **options)

    fan: dict[str, Any] = {"workers": workers, "engine": engine, "address": address}
    sources = [base, *models.values()]
    own, *others = digest_sources(sources, label="reading" if verbose else "", **fan)
    header = {
        "method": method,
        "weights": options["weights"],
        "parameters": parameters,
        "ignore_keys": list(ignore_keys),
        "base": own,
        "models": dict(zip(models, others, strict=True)),
        "mask": None if mask is None else digest_file(mask),
        "shard_bytes": shard_bytes,
    }
    folder = Path(out)
    tensors = {name: (dtype_of(start, name), shape_of(start, name)) for name in start}
    parts = plan_parts(tensors, shard_bytes)
    journal, resumed = begin_shards(folder, parts, header)
    if engine == "local" and (workers == 1 or len(parts) == 1):
        found = {key: journal.done[key] for key in ("limits", "majority") if key in journal.done}
        rule = merge_rule(called, start, states, names, mask=kept, **options, **found)
        merged = set(names)
        write = partial(
            write_part, folder, tensors, lambda name: merged_blocks(name, start, states, rule, name in merged)
        )
    else:
        job = MergeJob(
            os.path.abspath(base), {task: os.path.abspath(path) for task, path in models.items()},
            os.path.abspath(folder), called, options, list(ignore_keys),
            None if mask is None else os.path.abspath(mask), {},
        )  # fmt: skip
        if called == "ties" and resumed < len(parts):
            job = job._replace(whole=_whole_model(job, parts, journal, fan, verbose=verbose))
        write = partial(_write_merged, job)
    map_tasks(write, parts, journal=journal, key=lambda part: part.file, label="merging" if verbose else "", **fan)
    finish_shards(folder, parts, tensors, journal, beside=base)
    return MergedFiles(folder, [folder / part.file for part in parts], len(tensors), len(names), resumed)


def _only(parameters: Mapping[str, Any], allowed: set[str], method: str) -> None:
    strange = sorted(parameters.keys() - allowed)
    if strange:
        raise ValueError(f"parameters of {method} must be among {sorted(allowed)}, got {strange[0]!r}")


def weight_files(path: Path) -> list[Path]:
    """Return the files that the weights of a checkpoint are in, and those that say how."""
    if not path.is_dir():
        return [path]
    return [*list_folder(path, "*.safetensors"), *(path / n for n in (INDEX, ADAPTER) if (path / n).is_file())]


def digests(path: Path | str) -> dict[str, str]:
    """Return the SHA-256 of each weight file of a checkpoint."""
    return {file.name: digest_file(file) for file in weight_files(Path(path))}


def digest_sources(sources: Sequence[Path], **fan: Any) -> list[dict[str, str]]:
    """Return :func:`digests` of several checkpoints; ``fan`` are options of :func:`polyspan.run.map_tasks`."""
    files = [weight_files(path) for path in sources]
    every = list(dict.fromkeys(os.path.abspath(file) for among in files for file in among))
    found = dict(zip(every, map_tasks(_digest, every, **fan), strict=True))
    return [{file.name: found[os.path.abspath(file)] for file in among} for among in files]


def _digest(path: str) -> str:
    # Of this module, so that a worker's first task imports torch: joblib ends workers that grow later.
    return digest_file(path)


class Part(NamedTuple):
    """One shard: its file's name, and its tensors in the order in which they lie there."""

    file: str
    names: list[str]


class MergeJob(NamedTuple):
    """A merge of files as any process can take it up, from paths and plain values.

    ``options`` are those of :func:`~polyspan.checkpoints.task_vectors.merge_rule`, ``mask`` is a file of logits, and
    ``whole`` is what TIES knows of the whole model.
    """

    base: str
    models: dict[str, str]
    folder: str
    method: str
    options: dict[str, Any]
    ignore_keys: list[str]
    mask: str | None
    whole: dict[str, Any]

    def opened(self, part: Part) -> tuple[ShardedState, dict[str, Mapping[str, Tensor]], list[str]]:
        """Return base, models by task, and which of a shard's tensors are merged."""
        start = ShardedState(self.base)
        merged = set(mergeable(start, {}, self.ignore_keys))
        states = as_states({task: Path(path) for task, path in self.models.items()}, start)
        return start, states, [name for name in part.names if name in merged]


def _write_merged(job: MergeJob, part: Part) -> str:
    """Merge one shard from the files, and return its digest."""
    start, states, names = job.opened(part)
    mask = None
    if job.mask is not None:
        logits = read_members(job.mask, [name for name in names if not is_statistic(name)])
        mask = {name: torch.sigmoid(torch.from_numpy(x)) for name, x in logits.items()}
    rule = merge_rule(job.method, start, states, names, mask=mask, **job.options, **job.whole)
    tensors = {name: (dtype_of(start, name), shape_of(start, name)) for name in part.names}
    return write_part(
        Path(job.folder), tensors, lambda name: merged_blocks(name, start, states, rule, name in names), part
    )


def _whole_model(
    job: MergeJob, parts: list[Part], journal: Journal, fan: dict[str, Any], *, verbose: bool
) -> dict[str, Any]:
    """Find what TIES must know of the whole model in passes over the shards, and keep it in the journal."""
    density, scope = float(job.options["density"]), job.options.get("scope", "model")
    if density < 1 and scope == "model":
        if "limits" not in journal.done:
            fanned = {**fan, "label": "trimming" if verbose else ""}
            journal.record("limits", _limits(job, parts, density, fanned))
        job = job._replace(whole={"limits": journal.done["limits"]})
    if "majority" not in journal.done:
        votes = map_tasks(partial(_votes, job), parts, label="electing" if verbose else "", **fan)
        journal.record("majority", majority_sign(sum(votes)))
    return {**job.whole, "majority": journal.done["majority"]}


def _limits(job: MergeJob, parts: list[Part], share: float, fan: dict[str, Any]) -> list[float]:
    """Return of each task what :func:`~polyspan.checkpoints._magnitude_rank.largest_share` would."""

    def summed(highs: list[int | None]) -> list[Tensor]:
        total = torch.zeros(len(highs), 2**16, dtype=torch.int64)
        for counted in map_tasks(partial(_counts, job, highs), parts, **fan):
            for row, (bins, counts) in zip(total, counted, strict=True):
                row[torch.from_numpy(bins)] += torch.from_numpy(counts)
        return list(total)

    uppers = summed([None] * len(job.models))
    if not any(int(upper.sum()) for upper in uppers):
        return [0.0] * len(uppers)
    places = [ranked_bin(upper, share_rank(upper, share)) for upper in uppers]
    lowers = summed([high for high, _ in places])
    return [magnitude(high, ranked_bin(low, rank)[0]) for (high, rank), low in zip(places, lowers, strict=True)]


def _counts(job: MergeJob, highs: list[int | None], part: Part) -> list[tuple[np.ndarray, np.ndarray]]:
    """Count the magnitudes of each task's changes in one shard; return which bins hold some, and how many."""
    start, states, merged = job.opened(part)
    names = [name for name in merged if not is_statistic(name)]
    found = []
    for state, high in zip(states.values(), highs, strict=True):
        counts = magnitude_counts((block for name in names for block in changes(name, start, state)), high).numpy()
        bins = np.flatnonzero(counts)
        found.append((bins, counts[bins]))
    return found


def _votes(job: MergeJob, part: Part) -> int:
    """Return how many signs that TIES elects in one shard are above 0, less how many are below."""
    start, states, names = job.opened(part)
    weights = job.options["weights"] or [1.0] * len(states)
    trimmed = Trimmed(
        start, states, names, weights, float(job.options["density"]), job.options.get("scope", "model"),
        job.whole.get("limits"),
    )  # fmt: skip
    return sign_votes(trimmed.sums())


def write_shards(
    folder: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    made: Callable[[str], Iterable[Tensor]],
    header: dict[str, Any],
    *,
    beside: Path,
    shard_bytes: int | None = None,
    verbose: bool = False,
) -> tuple[list[Path], int]:
    """Write tensors, made block by block, as shards with an index; return the shards and how many were there already.

    ``header`` identifies the work: a folder that other work has begun is refused by its journal. Small files that lie
    in the folder ``beside`` are copied.
    """
    parts = plan_parts(tensors, shard_bytes)
    journal, resumed = begin_shards(folder, parts, header)
    write = partial(write_part, folder, tensors, made)
    map_tasks(write, parts, workers=1, journal=journal, key=lambda p: p.file, label="merging" if verbose else "")
    finish_shards(folder, parts, tensors, journal, beside=beside)
    return [folder / part.file for part in parts], resumed


def plan_parts(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], shard_bytes: int | None) -> list[Part]:
    """Return the shards that tensors go into, under the names that transformers looks for."""
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    plan = list(plan_shards(tensors, shard_bytes))
    if len(plan) == 1:
        return [Part("model.safetensors", plan[0])]
    width = max(5, len(str(len(plan))))
    return [Part(f"model-{i:0{width}d}-of-{len(plan):0{width}d}.safetensors", names) for i, names in enumerate(plan, 1)]


def begin_shards(folder: Path, parts: list[Part], header: dict[str, Any]) -> tuple[Journal, int]:
    """Begin in a new folder or go on in one of the same work; return its journal and how many shards are whole.

    A folder in which the same work has ended is work of which all is done.

    Raises
    ------
    UnreadableFile
        The folder holds other files.
    ValueError
        It belongs to other work.
    """
    # Which tensors a shard holds is part of the work: shards of one number may be cut elsewhere.
    plan = dump_json([list(part) for part in parts], indent=None)
    header = {**header, "plan": hashlib.sha256(plan.encode()).hexdigest()[:16]}
    check_new(folder, header)
    make_folder(folder)
    ended = _record(folder)
    journal = Journal(folder / JOURNAL, header)
    for file, digest in ended.get("files", {}).items():
        if file not in journal.done:
            journal.record(file, digest)
    # One run at a time has the folder: what is half written is of one that was killed.
    sweep_temporaries(folder, older_than_s=0)
    known = [part.file for part in parts if part.file in journal.done]
    for file in known:
        if not (folder / file).is_file() or digest_file(folder / file) != journal.done[file]:
            del journal.done[file]
    return journal, sum(file in journal.done for file in known)


def check_new(folder: Path, header: Mapping[str, Any] | None = None) -> None:
    """Refuse a folder of other files, or, where a header is given, one in which other work has ended.

    Raises
    ------
    UnreadableFile
    """
    there = [entry.name for entry in list_folder(folder)] if folder.is_dir() else []
    wanted = "a new folder, or one of this merge"
    if there and JOURNAL not in there and RECORD not in there:
        raise UnreadableFile(folder, found=f"a folder with {there[0]}", expected=wanted)
    ended = _record(folder)
    if header is not None and ended and ended.get("work") != json.loads(dump_json(dict(header))):
        raise UnreadableFile(folder, found="another merge", expected=wanted)


def _record(folder: Path) -> dict[str, Any]:
    """Return what the work that ended in a folder was, and the digests of its shards; empty where none has."""
    path = folder / RECORD
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise WrongContent(path, found=type(found).__name__, expected="what was merged")
    return found


def write_part(
    folder: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    made: Callable[[str], Iterable[Tensor]],
    part: Part,
) -> str:
    """Write one shard from tensors made block by block, and return its digest."""
    facts = {name: (TENSOR_CODES[tensors[name][0]], tensors[name][1]) for name in part.names}
    blocks = (tensor_bytes(block) for name in part.names for block in made(name))
    return digest_file(write_tensor_blocks(folder / part.file, facts, blocks, {"format": "pt"}))


def finish_shards(
    folder: Path,
    parts: list[Part],
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    journal: Journal,
    *,
    beside: Path,
) -> None:
    """Write the index of several shards, copy the small files of the folder ``beside``, and end the journal."""
    if len(parts) > 1:
        placed = {name: part.file for part in parts for name in part.names}
        write_json(
            folder / INDEX, {"metadata": {"total_size": sum(map(_nbytes, tensors.values()))}, "weight_map": placed}
        )
    copy_others(beside, folder)
    files = {part.file: journal.done[part.file] for part in parts}
    write_json(folder / RECORD, {"work": journal.header, "files": files})
    journal.remove()


def _nbytes(facts: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return facts[0].itemsize * math.prod(facts[1])


def plan_shards(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int | None) -> Iterator[list[str]]:
    """Yield the names of each shard of at most ``limit`` bytes, or of the largest tensor's where that is None."""
    limit = max(map(_nbytes, tensors.values()), default=0) if limit is None else limit
    names: list[str] = []
    total = 0
    # Wide items first within a shard: each tensor then begins at a multiple of its width, as maps need it.
    for name in sorted(tensors, key=lambda n: -tensors[n][0].itemsize):
        size = _nbytes(tensors[name])
        if names and total + size > limit:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        yield names


def copy_others(base: Path, folder: Path) -> None:
    """Copy what makes weights a model, configuration and tokenizer: no weights, nothing large, no manifest of others.

    What stands in ``folder`` already is kept.
    """
    if not base.is_dir():
        return
    weights = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx"}
    for entry in list_folder(base):
        small = entry.is_file() and entry.suffix not in weights and entry.stat().st_size <= COPIED
        kept = not entry.name.endswith(".index.json") and entry.name not in (MANIFEST, RECORD)
        if small and kept and not (folder / entry.name).exists():
            write_bytes(folder / entry.name, read_bytes(entry, max_bytes=COPIED))
