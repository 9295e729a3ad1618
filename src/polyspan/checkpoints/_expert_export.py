"""What the checkpoint of a merged model of experts holds, in each form, and how it is written."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyspan.errors import WrongContent
from polyspan.io import TENSOR_CODES, digest_file, read_json, tensor_bytes, write_json, write_tensor_blocks
from polyspan.run import Journal, progress

from ._expert_jobs import Job, outcome_state, read_outcome
from ._expert_layout import (
    COUNTS,
    ExpertLayer,
    ExpertStack,
    check_reducible,
    expert_modules,
    fused_parameters,
    reduced_router,
)
from ._expert_outcome import Outcome
from ._expert_stream import StreamedModel
from ._stored_names import stored_form
from .merge_files import copy_others, plan_shards

EXPORTS = ("merged", "hf", "hf-repeated")
QUANT_METHOD = "polyspan_merged_experts"

Facts = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def tensor_facts(stream: StreamedModel) -> Facts:
    """Return dtype and shape of every tensor of the checkpoint."""
    return {name: (stream.state.dtype(name), stream.state.shape(name)) for name in stream.state}


def total_size(tensors: Facts) -> tuple[int, int]:
    """Return the number of parameters and of bytes."""
    counts = {name: math.prod(shape) for name, (_, shape) in tensors.items()}
    return sum(counts.values()), sum(n * tensors[name][0].itemsize for name, n in counts.items())


def check_exportable(stream: StreamedModel, export: str) -> None:
    """Compare the checkpoint with what an export needs, before anything is computed.

    Raises
    ------
    ValueError
        Rows of its router cannot be merged, where they must be.
    WrongContent
        Its experts, its routers or their number stand under names that are not known.
    """
    number = stream.numbers[0]
    layer = stream.expert_layer(number)
    assert layer is not None
    # What a file has is known once transformers has read a layer of it.
    with stream.loaded(number):
        stored_experts(stream, layer)
        if export == "hf":
            for each in stream.experts:
                check_reducible(each)
            count_names(stream)
            _stored(stream, _router_names(layer, reduced_router(layer, torch.eye(layer.n_experts))))


def count_names(stream: StreamedModel) -> list[str]:
    """Return the names under which the configuration says how many experts there are.

    Raises
    ------
    WrongContent
        There is none.
    """
    path, n = stream.path / "config.json", stream.experts[0].n_experts
    config = read_json(path)
    named = [name for name in COUNTS if config.get(name) == n]
    if not named:
        raise WrongContent(path, found=f"none of {', '.join(COUNTS)} that is {n}", expected="the number of experts")
    return named


def stored_experts(stream: StreamedModel, layer: ExpertLayer) -> dict[str, Tensor]:
    """Return the tensors of a layer's experts under the names of the file, on the meta device."""
    state = layer.experts.state_dict()
    return _stored(stream, {f"{layer.name}.{name}": part.to("meta") for name, part in state.items()})


def _stored(stream: StreamedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in the form of the file, all of whose names it must have."""
    made = stored_form(stream.model, state)
    missing = [name for name in made if name not in stream.state]
    if missing:
        raise WrongContent(stream.path, found="experts or a router under names that are not known", expected=missing[0])
    return made


def _router_names(layer: ExpertLayer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    router = next(name for name, module in layer.block.named_children() if module is layer.router)
    return {f"{layer.name.rpartition('.')[0]}.{router}.{name}": part for name, part in tensors.items()}


def _expert_names(layer: ExpertLayer, stack: ExpertStack) -> dict[str, Tensor]:
    """Return a stack's weights by the names that the model has for them."""
    if layer.fused:
        made = fused_parameters(stack, layer.experts)
    else:
        made = nn.ModuleList(expert_modules(stack, layer.experts[0])).state_dict()
    return {f"{layer.name}.{name}": part for name, part in made.items()}


class ExportPlan:
    """The tensors of an exported checkpoint, each made when it is asked for.

    Parameters
    ----------
    labels : mapping of int to list of int
        Groups of the experts, by number of the layer.
    """

    def __init__(self, job: Job, stream: StreamedModel, labels: Mapping[int, list[int]], export: str):
        self.job, self.stream, self.labels, self.export = job, stream, labels, export
        self._held: tuple[int, dict[str, Tensor]] | None = None
        self._places: dict[str, int] = {}
        # Loading a layer tells transformers the form of the file, which is the same for all.
        with stream.loaded(stream.numbers[0]):
            before = {name for layer in stream.experts for name in stored_experts(stream, layer)}
        made: Facts = {}
        for number in stream.numbers:
            parts = self._layer(number)
            self._places |= dict.fromkeys(parts, number)
            made |= {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
        kept = {name: facts for name, facts in tensor_facts(stream).items() if name not in before}
        self.tensors: Facts = {**kept, **made}

    def __call__(self, name: str) -> Iterable[Tensor]:
        """Return a tensor in blocks."""
        if name not in self._places:
            return (self.stream.state[name],)
        number = self._places[name]
        if self._held is None or self._held[0] != number:
            self._held = (number, self._layer(number))
        return (self._held[1][name].contiguous(),)

    def _layer(self, number: int) -> dict[str, Tensor]:
        """Return the tensors that take the place of a layer's experts, and of its router where rows change."""
        layer = self.stream.expert_layer(number)
        assert layer is not None
        groups = self.labels[number]
        outcome = read_outcome(self.job, number, groups, layer.stack())
        if self.export == "merged":
            state = {**outcome_state(outcome), "groups": torch.tensor(groups)}
            return {f"{layer.name}.{name}": part for name, part in state.items()}
        state = _expert_names(layer, outcome.stack.take(groups) if self.export == "hf-repeated" else outcome.stack)
        if self.export == "hf":
            state |= self._router(number, layer, outcome)
        # A router that the file keeps wider than the experts stays so.
        return {n: part.to(self.stream.state.dtype(n)) for n, part in _stored(self.stream, state).items()}

    def _router(self, number: int, layer: ExpertLayer, outcome: Outcome) -> dict[str, Tensor]:
        with self.stream.loaded(number):
            return _router_names(layer, reduced_router(layer, outcome.router_rows()))

    def config(self) -> dict[str, Any]:
        """Return the configuration of the exported checkpoint."""
        config = read_json(self.stream.path / "config.json")
        if self.export == "hf-repeated":
            return config
        if self.export == "merged":
            layers = {}
            for number, groups in self.labels.items():
                layer = self.stream.expert_layer(number)
                assert layer is not None
                ranks = {
                    name.rpartition(".")[2].removesuffix("_left"): shape[-1]
                    for name, (_, shape) in self.tensors.items()
                    if name.startswith(f"{layer.name}.") and name.endswith("_left")
                }
                layers[layer.name] = {
                    "num_experts": len(groups), "num_groups": max(groups) + 1, "ranks": ranks or None,
                }  # fmt: skip
            return {**config, "quantization_config": {"quant_method": QUANT_METHOD, "layers": layers}}
        return {**config, **dict.fromkeys(count_names(self.stream), max(next(iter(self.labels.values()))) + 1)}


def write_export(
    folder: Path, plan: ExportPlan, journal: Journal, shard_bytes: int | None, *, verbose: bool
) -> list[Path]:
    """Write configuration, other small files, shards and, last, their index."""
    write_json(folder / "config.json", plan.config())
    copy_others(plan.stream.path, folder)
    # A plain reader that knows nothing of merged experts finds no model.safetensors, and says so.
    stem = "polyspan" if plan.export == "merged" else "model"
    parts = list(plan_shards(plan.tensors, shard_bytes))
    files = [f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = [f"{stem}.safetensors"]
    for file, names in progress(list(zip(files, parts, strict=True)), label="writing", enabled=verbose):
        if file in journal.done and (folder / file).is_file() and digest_file(folder / file) == journal.done[file]:
            continue
        facts = {name: (TENSOR_CODES[plan.tensors[name][0]], plan.tensors[name][1]) for name in names}
        write_tensor_blocks(folder / file, facts, _blocks(plan, names), {"format": "pt"})
        journal.record(file, digest_file(folder / file))
    if len(parts) > 1:
        placed = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        total = {"total_size": total_size(plan.tensors)[1]}
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": total, "weight_map": placed})
    return [folder / file for file in files]


def _blocks(plan: ExportPlan, names: list[str]) -> Iterator[memoryview]:
    for name in names:
        for block in plan(name):
            yield tensor_bytes(block)
