"""Compressed models on disk: tensors one by one into shards, the configuration that says how to read them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyspan.io import ShardedState, TensorEntry, make_folder, remove_file, write_json, write_tensor_file

from ._compressed_layers import LowRankLinear, SparseDictionaryLinear
from ._compression import join, with_bias
from ._layer_methods import layer_from_config
from ._stored_names import stored_form_entries
from .merge_files import copy_others, plan_shards

QUANT_METHOD = "polyspan_compressed"
STEM, DENSE_STEM = "polyspan", "model"
CONFIG, MANIFEST = "config.json", "manifest.json"
SHARD_BYTES = 2**29
FORMAT = 1


def stored_entries(model: nn.Module, *, dense: bool = False) -> dict[str, TensorEntry]:
    """Return all tensors of a model that a file must hold, each once.

    With ``dense``, compressed layers are weights, and all have the names and layouts that other programs know.
    """
    entries: dict[str, TensorEntry] = {}
    seen: set[tuple] = set()
    kinds = SparseDictionaryLinear | LowRankLinear
    compressed = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    for name, stored in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if dense and owner in compressed and leaf != "bias":
            continue
        tensor = _fetched(model, name, stored)
        mark = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and mark in seen:
            continue
        seen.add(mark)
        entries[name] = TensorEntry(tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
    for name, module in compressed.items() if dense else ():
        shape = (module.out_features, module.in_features)
        shape = shape[::-1] if module.transposed else shape
        entries[f"{name}.weight"] = TensorEntry(
            module.weight_dtype(), shape, lambda module=module: dense_weight(module)
        )
    return stored_form_entries(model, entries) if dense else entries


def dense_weight(module: Any) -> Tensor:
    """Return the weight that a compressed layer stands for, in the layout of the layer that was there."""
    weight = module.weight_matrix()
    return weight.mT if module.transposed else weight


def _fetched(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor's numbers where accelerate keeps them elsewhere."""
    if not tensor.is_meta:
        return tensor
    owner, _, leaf = name.rpartition(".")
    kept = getattr(getattr(model.get_submodule(owner), "_hf_hook", None), "weights_map", None)
    if kept is None:
        raise ValueError(f"model must have weights, got {name} on the meta device without an offload")
    return kept[leaf]


def write_model(
    folder: Path,
    entries: Mapping[str, TensorEntry],
    config: dict[str, Any],
    *,
    stem: str,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write shards, their index where there are several, and the configuration; return the weight files."""
    make_folder(folder)
    plan = list(plan_shards({name: (e.dtype, e.shape) for name, e in entries.items()}, shard_bytes))
    width = max(5, len(str(len(plan))))
    files = [f"{stem}-{i:0{width}d}-of-{len(plan):0{width}d}.safetensors" for i in range(1, len(plan) + 1)]
    if len(plan) == 1:
        files = [f"{stem}.safetensors"]
    for file, names in zip(files, plan, strict=True):
        write_tensor_file(folder / file, {name: entries[name] for name in names})
    if len(plan) > 1:
        placed = {name: file for file, names in zip(files, plan, strict=True) for name in names}
        total = sum(entry.nbytes for entry in entries.values())
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": placed})
    write_json(folder / CONFIG, config)
    return [folder / file for file in files]


def model_config(model: Any, layers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the configuration of a transformers model in JSON types; with ``layers``, that of a compressed one."""
    told = json.loads(model.config.to_json_string(use_diff=True))
    for name in ("quantization_config", "transformers_weights"):
        told.pop(name, None)
    told["architectures"] = [type(model).__name__]
    told["dtype"] = str(model.dtype).removeprefix("torch.")
    if layers is not None:
        told["quantization_config"] = {"quant_method": QUANT_METHOD, "format": FORMAT, "layers": dict(layers)}
    return told


def empty_layer(told: dict[str, Any], *, bias: bool, dtype: torch.dtype) -> nn.Module:
    """Return a compressed layer without numbers, on the meta device; what it shares has no tensors of its own."""
    module = layer_from_config(told, bias=bias, device="meta", dtype=dtype)
    if "tied_to" in told:
        for name in ("values", "scales", "indices", "mask", "right"):
            if getattr(module, name, None) is not None:
                setattr(module, name, None)
    return module


def join_layers(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Give layers what they share, once the owners have their numbers."""
    for name, told in layers.items():
        if "owner" in told:
            join(model.get_submodule(name), model.get_submodule(told["owner"]), whole="tied_to" in told)


def write_layers(path: Path, modules: Mapping[str, nn.Module]) -> Path:
    """Write the modules of one unit; what the later ones share with the first is written once."""
    first = next(iter(modules))
    return write_tensor_file(
        path,
        {
            f"{name}/{leaf}": tensor
            for name, module in modules.items()
            for leaf, tensor in module.state_dict().items()
            if name == first or leaf not in ("dictionary", "left")
        },
    )


def read_layers(path: Path, configs: Mapping[str, dict[str, Any]], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the modules that :func:`write_layers` wrote, their tensors mapped from the file."""
    state = ShardedState(path)
    made: dict[str, nn.Module] = {}
    for name, told in configs.items():
        module = with_bias(layer_from_config(told, bias=False, device="meta", dtype=dtype), None)
        own = {leaf: state[f"{name}/{leaf}"] for leaf in module.state_dict()}
        module.load_state_dict(own, assign=True)
        if "owner" in told:
            join(module, made[told["owner"]], whole=False)
        made[name] = module.requires_grad_(False)
    return made


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what makes weights a model, tokenizer and the like; not the list of digests of the weights left behind."""
    copy_others(source, folder)
    if (source / MANIFEST).is_file():
        remove_file(folder / MANIFEST)


def remove_files(paths: list[Path]) -> None:
    for path in paths:
        remove_file(path)
