"""Merge checkpoint files tensor by tensor, into a sharded folder; a killed merge goes on where it was."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyspan.errors import UnreadableFile
from polyspan.io import (
    digest_file,
    list_folder,
    make_folder,
    read_bytes,
    write_bytes,
    write_json,
    write_tensor_blocks,
)
from polyspan.io.atomic import MANIFEST
from polyspan.run import Journal, progress

from ._merge_states import ADAPTER, INDEX, ShardedState, as_states, dtype_of, mergeable, shape_of
from .concrete_merging import load_mask
from .task_vectors import merge_rule, merged_blocks

JOURNAL = "merge.journal.jsonl"
COPIED = 2**26
OWN = {"ties": ("density", "reduction", "scope"), "dare": ("density", "rescale", "elect", "seed")}
STREAMED = ("average", "task_arithmetic", "ties", "dare")
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16",
    torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
}  # fmt: skip


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
    verbose: bool = False,
    **parameters: Any,
) -> MergedFiles:
    """Merge files of any size into a folder of .safetensors shards, block by block.

    Tensors are read, merged and written in blocks of rows: memory grows neither with the number of layers nor with
    their sizes, except that a mask and the two factors of an adapter are held whole, and a tensor while its stored
    digest is compared. Shards are written atomically and journalled: the same call goes on after an interrupt, and
    ends in the same bytes. The index, without which no one reads several shards, comes last. Other small files of the
    base's folder (configuration, tokenizer) are copied.
    Source: catalogue entry ``concrete-merging``.

    Parameters
    ----------
    base : path
        A .safetensors file, or a folder of them.
    models : mapping of str to path
        By task; each what the base may be, or the folder of a LoRA adapter of PEFT.
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
    start = ShardedState(base)
    states = as_states({task: Path(path) for task, path in models.items()}, start)
    names = set(mergeable(start, states, ignore_keys))
    if method == "average":
        _only(parameters, set(), method)
        # An average of weighted models is one whose weights sum to 1.
        total = math.fsum(weights) if weights is not None else len(states)
        if total == 0:
            raise ValueError("weights must not sum to 0 for an average")
        rule = merge_rule("task_arithmetic", start, states, sorted(names), scaling=1 / total, weights=weights)
    else:
        allowed = {"scaling", *OWN.get(method, ())}
        _only(parameters, allowed, method)
        options: dict[str, Any] = {"density": {"ties": 0.2, "dare": 0.5}.get(method, 1.0), **parameters}
        kept = None if mask is None else load_mask(mask)
        rule = merge_rule(method, start, states, sorted(names), weights=weights, mask=kept, **options)

    header = {
        "method": method,
        "weights": None if weights is None else [float(w) for w in weights],
        "parameters": parameters,
        "ignore_keys": list(ignore_keys),
        "base": digests(base),
        "models": {task: digests(path) for task, path in models.items()},
        "mask": None if mask is None else digest_file(mask),
        "shard_bytes": shard_bytes,
    }
    folder = Path(out)
    tensors = {name: (dtype_of(start, name), shape_of(start, name)) for name in start}

    def made(name: str) -> Iterator[Tensor]:
        return merged_blocks(name, start, states, rule, name in names)

    shards, resumed = write_shards(
        folder, tensors, made, header, beside=Path(base), shard_bytes=shard_bytes, verbose=verbose
    )
    return MergedFiles(folder, shards, len(tensors), len(names), resumed)


def _only(parameters: Mapping[str, Any], allowed: set[str], method: str) -> None:
    strange = sorted(parameters.keys() - allowed)
    if strange:
        raise ValueError(f"parameters of {method} must be among {sorted(allowed)}, got {strange[0]!r}")


def digests(path: Path | str) -> dict[str, str]:
    """Return the SHA-256 of each weight file of a checkpoint."""
    path = Path(path)
    if path.is_dir():
        files = [*list_folder(path, "*.safetensors"), *(path / n for n in (INDEX, ADAPTER) if (path / n).is_file())]
    else:
        files = [path]
    return {file.name: digest_file(file) for file in files}


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
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    plan = list(plan_shards(tensors, shard_bytes))
    width = max(5, len(str(len(plan))))
    files = [f"model-{i:0{width}d}-of-{len(plan):0{width}d}.safetensors" for i in range(1, len(plan) + 1)]
    if len(plan) == 1:
        files = ["model.safetensors"]
    make_folder(folder)
    there = [entry.name for entry in list_folder(folder)]
    if there and JOURNAL not in there:
        raise UnreadableFile(folder, found=f"a folder with {there[0]}", expected="a new folder, or one of this merge")
    journal = Journal(folder / JOURNAL, header)
    resumed = 0
    for file, names in progress(list(zip(files, plan, strict=True)), label="merging", enabled=verbose):
        if file in journal.done and (folder / file).is_file() and digest_file(folder / file) == journal.done[file]:
            resumed += 1
            continue
        facts = {name: (CODES[tensors[name][0]], tensors[name][1]) for name in names}
        blocks = (as_bytes(block) for name in names for block in made(name))
        write_tensor_blocks(folder / file, facts, blocks, {"format": "pt"})
        journal.record(file, digest_file(folder / file))
    if len(plan) > 1:
        placed = {name: file for file, names in zip(files, plan, strict=True) for name in names}
        write_json(
            folder / INDEX, {"metadata": {"total_size": sum(map(_nbytes, tensors.values()))}, "weight_map": placed}
        )
    copy_others(beside, folder)
    journal.remove()
    return [folder / file for file in files], resumed


def as_bytes(block: Tensor) -> memoryview:
    """Return what a tensor of any dtype is in a file; on the CPU and in C order it is not copied."""
    return block.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


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
        kept = not entry.name.endswith(".index.json") and entry.name != MANIFEST
        if small and kept and not (folder / entry.name).exists():
            write_bytes(folder / entry.name, read_bytes(entry, max_bytes=COPIED))
