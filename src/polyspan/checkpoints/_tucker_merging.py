"""The weights of a base with a Tucker adapter added, tensor by tensor, in one process or in several."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyspan.errors import UnreadableFile, WrongContent
from polyspan.io import (
    TENSOR_CODES,
    ShardedState,
    digest_file,
    read_json,
    read_members,
    remove_folder,
    tensor_bytes,
    write_tensor_blocks,
)
from polyspan.run import map_tasks

from ._checkpoint_sizes import ADAPTER_WEIGHTS
from ._merge_states import row_blocks, rows_of
from ._tucker_magnitude import fits, growth, unit_norms, with_magnitude
from .merge_files import Part, begin_shards, digest_sources, finish_shards, plan_parts, write_part
from .tucker_update import tucker_delta

ROOT = "base_model.model."
PREFIX = "tucker_adapter_"


class Adapted:
    """A base whose tensors are made, when they are asked for, with an adapter added.

    ``changed`` names the tensors that differ from the base's. In memory are the adapter and one of the layers that it
    changes; sums are in float64, and weights keep the dtype of the base.

    Raises
    ------
    WrongContent
        The folder holds another kind of adapter, or one of a layer that the base does not have, or of another shape.
    """

    def __init__(self, base: Path, adapter: Path, name: str):
        from .tucker_adapter import PEFT_TYPE, TuckerAdapterConfig

        settings = read_json(adapter / name)
        if not isinstance(settings, dict) or settings.get("peft_type") != str(PEFT_TYPE.value):
            kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
            raise WrongContent(adapter / name, found=f"an adapter of kind {kind}", expected=PEFT_TYPE.value)
        self.config = TuckerAdapterConfig.from_peft_type(**settings)
        self.base = ShardedState(base)
        weights = adapter / ADAPTER_WEIGHTS
        tensors = {key.removeprefix(ROOT): torch.from_numpy(x) for key, x in read_members(weights).items()}
        # Of each tensor that changes: its adapter's core, or None and what takes its place; and magnitudes, if any.
        self.changed: dict[str, tuple[Tensor | None, list[Tensor], Tensor | None]] = {}
        for key, value in sorted(tensors.items()):
            layer, found, part = key.partition(f".{PREFIX}")
            if found and part != "core":
                continue
            target = f"{layer}.weight" if found else key.replace(".base_layer.", ".")
            if target not in self.base:
                raise WrongContent(weights, found=f"an adapter of {layer}", expected=f"a layer of {self.base.path}")
            parts = [tensors[f"{layer}.{PREFIX}axis{n}"] for n in range(value.ndim)] if found else [value]
            shape = tuple(len(factor) for factor in parts) if found else tuple(value.shape)
            if shape != self.base.shape(target):
                expected = f"{self.base.shape(target)}"
                raise WrongContent(weights, found=f"shape {shape}", expected=expected, where=f"layer {layer}")
            units = tensors.get(f"{layer}.{PREFIX}magnitude") if found else None
            if (found and self.config.use_dora and units is None) or (
                units is not None and not fits(units.shape, shape)
            ):
                raise WrongContent(
                    weights,
                    found="no magnitudes" if units is None else f"magnitudes of shape {tuple(units.shape)}",
                    expected=f"one a unit of a weight {shape}",
                    where=f"layer {layer}",
                )
            self.changed[target] = (value if found else None, parts, units)

    def facts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of every tensor."""
        return {key: (self.base.dtype(key), self.base.shape(key)) for key in self.base}

    def made(self, key: str) -> Iterator[Tensor]:
        """Yield the blocks of one tensor.

        Raises
        ------
        ValueError
            A sum is too large for the base's dtype.
        """
        base = self.base
        if key not in self.changed:
            yield from (rows_of(base, key, *span) for span in row_blocks(base.shape(key)))
            return
        core, parts, units = self.changed[key]
        if core is None:
            yield parts[0].to(base.dtype(key))
            return
        scale = self.config.scale_for(key.removesuffix(".weight"), core.shape)
        summed = base[key].double() + tucker_delta(core.double(), [factor.double() for factor in parts], scale)
        if units is not None:
            summed = with_magnitude(summed, growth(units.double(), unit_norms(summed, units.shape)))
        summed = summed.to(base.dtype(key))
        if not bool(torch.isfinite(summed).all()):
            raise ValueError(f"base must hold sums with the adapter, got {base.dtype(key)}, too narrow for {key}")
        yield summed


class AdaptedJob(NamedTuple):
    """What a worker makes shards of an adapted base from: paths, and the name of the adapter's configuration."""

    base: str
    adapter: str
    name: str
    folder: str


def write_adapted(
    base: Path, adapter: Path, out: Path, *, name: str, shard_bytes: int | None, verbose: bool, **fan: Any
) -> list[str]:
    """Write a base with an adapter added, as one file or as a folder of shards; return the names that changed.

    ``fan`` are options of :func:`polyspan.run.map_tasks`, over which shards go. One file is put together from shards
    in a folder beside it, which is kept for the same call after an interrupt; one of other work is begun anew.
    """
    one_file = out.suffix == ".safetensors"
    if one_file and not out.parent.is_dir():
        raise UnreadableFile(out, found=f"no folder {out.parent}", expected="a folder that exists")
    state = Adapted(base, adapter, name)
    facts = state.facts()
    parts = plan_parts(facts, None if one_file else shard_bytes)
    digested = digest_sources([base, adapter], label="reading" if verbose else "", **fan)
    header = {"base": digested[0], "adapter": digested[1], "settings": digest_file(adapter / name)}
    folder = out.absolute().with_name(f".{out.name}.merging") if one_file else out
    try:
        journal, _ = begin_shards(folder, parts, header)
    except ValueError:
        if not one_file:
            raise
        remove_folder(folder)
        journal, _ = begin_shards(folder, parts, header)
    if fan["engine"] == "local" and (fan["workers"] == 1 or len(parts) == 1):
        write: Any = partial(write_part, folder, facts, state.made)
    else:
        write = partial(
            _write_part, AdaptedJob(*(str(p.absolute()) for p in (base, adapter)), name, str(folder.absolute()))
        )
    map_tasks(
        write, parts, journal=journal, key=lambda part: part.file, label="merging" if verbose else "",
        inner_threads=1, **fan,
    )  # fmt: skip
    if one_file:
        _put_together(out, folder, parts, facts)
        remove_folder(folder)
    else:
        finish_shards(folder, parts, facts, journal, beside=base)
    return sorted(state.changed)


def _write_part(job: AdaptedJob, part: Part) -> str:
    """Write one shard in whatever process, and return its digest."""
    state = Adapted(Path(job.base), Path(job.adapter), job.name)
    tensors = {key: (state.base.dtype(key), state.base.shape(key)) for key in part.names}
    return write_part(Path(job.folder), tensors, state.made, part)


def _put_together(
    out: Path, folder: Path, parts: list[Part], facts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    """Write the tensors of shards into one file, a block of rows in memory at a time."""
    # Wide items first: each tensor then begins at a multiple of its width, as maps need it.
    order = sorted(facts, key=lambda key: -facts[key][0].itemsize)
    placed = {key: part.file for part in parts for key in part.names}

    def blocks() -> Iterator[memoryview]:
        for key in order:
            piece = ShardedState(folder / placed[key])
            for span in row_blocks(facts[key][1]):
                yield tensor_bytes(rows_of(piece, key, *span))

    codes = {key: (TENSOR_CODES[facts[key][0]], facts[key][1]) for key in order}
    write_tensor_blocks(out, codes, blocks(), {"format": "pt"})
