"""Compressed models in transformers: importing this teaches it to read them; saving, loading, dense export."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyspan.checkpoints._compressed_files import (
    CONFIG,
    DENSE_STEM,
    FORMAT,
    QUANT_METHOD,
    SHARD_BYTES,
    STEM,
    copy_beside,
    dense_weight,
    empty_layer,
    join_layers,
    model_config,
    stored_entries,
    write_model,
)
from polyspan.checkpoints._compressed_layers import PRODUCTS, LowRankLinear, SparseDictionaryLinear
from polyspan.checkpoints._compression import put
from polyspan.checkpoints._layer_methods import layer_config
from polyspan.errors import UnreadableFile, WrongContent, require
from polyspan.io import ShardedState, list_folder, make_folder, read_json, write_text

transformers: Any = require("transformers", extra="hf", purpose="a compressed model of transformers")
quantizers: Any = require("transformers.quantizers.auto", extra="hf")
quantizer_base: Any = require("transformers.quantizers.base", extra="hf")
quantization: Any = require("transformers.utils.quantization_config", extra="hf")

INDEX = f"{STEM}.safetensors.index.json"


class CompressedModelConfig(quantization.QuantizationConfigMixin):
    """Which layers of a model are compressed, and how; part of its ``config.json``.

    Parameters
    ----------
    layers : dict
        By name, the sizes and forms of each compressed layer in plain JSON types.
    format : int
        Version of the files.
    """

    def __init__(self, layers: dict[str, Any] | None = None, format: int = FORMAT, **_: Any):
        self.quant_method = QUANT_METHOD
        self.layers = layers or {}
        self.format = format
        if format != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {format}: a newer polyspan wrote this model")


class CompressedModelQuantizer(quantizer_base.HfQuantizer):
    """Puts empty compressed layers where the configuration names them, before transformers reads the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, told in self.quantization_config.layers.items():
            old: Any = model.get_submodule(name)
            made: Any = empty_layer(told, bias=old.bias is not None, dtype=old.weight.dtype)
            # Some models initialise projections by name; what is marked as initialised they pass over.
            made.weight = torch.empty(0)
            setattr(made.weight, "_is_hf_initialized", True)  # noqa: B010 - a tensor has no such attribute of its own
            put(model, name, made)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        join_layers(model, self.quantization_config.layers)
        for name in self.quantization_config.layers:
            layer: Any = model.get_submodule(name)
            del layer.weight
            layer.requires_grad_(False)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name in self.quantization_config.layers:
            put(model, name, _dense(model.get_submodule(name), dtype))
        return model

    def is_serializable(self) -> bool:
        """Keep ``save_pretrained`` from writing a file that programs without polyspan would fill with chance.

        Raises
        ------
        ValueError
            Always; it says how to save.
        """
        raise ValueError(
            "save_pretrained must not write a compressed model: without polyspan its model.safetensors would load with "
            "random layers; save it with polyspan.integrations.save_compressed, or dense with export_dense"
        )

    @property
    def is_trainable(self) -> bool:
        """Tell transformers that it is no target for its trainer."""
        return False


def _dense(module: Any, dtype: torch.dtype | None) -> nn.Module:
    """Return the layer of the kind that was there before: nn.Linear, or GPT-2's Conv1D."""
    if not module.transposed:
        return module.to_linear().to(dtype)
    kind = require("transformers.pytorch_utils", extra="hf").Conv1D
    dense = kind(module.out_features, module.in_features).to(module.weight_dtype())
    with torch.no_grad():
        dense.weight.copy_(dense_weight(module))
        if module.bias is not None:
            dense.bias.copy_(module.bias)
    return dense.to(dtype)


def register_compressed_models() -> None:
    """Let transformers know compressed models; done on import, and harmless to repeat."""
    if QUANT_METHOD not in quantizers.AUTO_QUANTIZER_MAPPING:
        quantizers.register_quantization_config(QUANT_METHOD)(CompressedModelConfig)
        quantizers.register_quantizer(QUANT_METHOD)(CompressedModelQuantizer)


register_compressed_models()


def compressed_layers(model: nn.Module) -> dict[str, Any]:
    """Return the form of every compressed layer of a model, by name, as it stands in ``config.json``.

    Layers that share a dictionary, or all but the bias, name the first that has it.
    """
    told: dict[str, Any] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, SparseDictionaryLinear | LowRankLinear):
            continue
        low = isinstance(module, LowRankLinear)
        whole, part = (module.right, module.left) if low else (module.values, module.dictionary)
        first = owners.setdefault(id(whole), name)
        owner = name if part is None else owners.setdefault(id(part), name)
        if first != name:
            told[name] = layer_config(module, owner=first, tied_to=first)
        else:
            told[name] = layer_config(module, owner=None if owner == name else owner)
    return told


def save_compressed(
    model: Any, out: Path | str, *, tokenizer: Any = None, dense: bool = False, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write a transformers model with compressed layers to a folder that :func:`load_compressed` reads bit for bit.

    The weight file is ``polyspan.safetensors``, or several of that name and an index.

    Parameters
    ----------
    model : PreTrainedModel
        After :meth:`~polyspan.checkpoints.sparse_dictionary.SparseDictionaryCompressor.compress`.
    out : path
        New or empty.
    tokenizer : optional
        Saved beside it.
    dense : bool
        Write an ordinary checkpoint with the weights that the layers stand for.
    shard_bytes : int
        Largest weight file, unless one tensor is larger.

    Returns
    -------
    list of Path
        Weight files.

    Raises
    ------
    ValueError
        The model has no compressed layer.
    UnreadableFile
        The folder holds files, or cannot be written to.
    """
    told = compressed_layers(model)
    if not told:
        raise ValueError("model must have compressed layers, got none; save_pretrained saves dense models")
    folder = _new_folder(out)
    files = write_model(
        folder, stored_entries(model, dense=dense), model_config(model, None if dense else told),
        stem=DENSE_STEM if dense else STEM, shard_bytes=shard_bytes,
    )  # fmt: skip
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        write_text(folder / "generation_config.json", model.generation_config.to_json_string())
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return files


def load_compressed(path: Path | str, *, product: str = "auto", check: bool = True, **options: Any) -> Any:
    """Load a model that :func:`save_compressed` or ``polyspan compress`` wrote.

    Parameters
    ----------
    path : path
    product : str
        How coefficients are multiplied; see :class:`~polyspan.checkpoints.sparse_dictionary.SparseDictionaryLinear`.
    check : bool
        Compare the digest of every tensor first, which reads the files once more.
    **options
        For ``from_pretrained``: ``device_map``, ``dtype``, ``attn_implementation``, …

    Raises
    ------
    UnreadableFile, CorruptFile, WrongContent
        A file is missing or broken, or the folder holds another kind of model.
    """
    if product not in PRODUCTS:
        raise ValueError(f"product must be one of {PRODUCTS}, got {product!r}")
    folder = Path(path)
    told = read_json(folder / CONFIG)
    found = told.get("quantization_config") if isinstance(told, dict) else None
    if not isinstance(found, Mapping) or found.get("quant_method") != QUANT_METHOD:
        kind = found.get("quant_method") if isinstance(found, Mapping) else "dense weights"
        raise WrongContent(folder / CONFIG, found=f"{kind}", expected=f"quant_method {QUANT_METHOD}")
    kinds = told.get("architectures") or [None]
    if not hasattr(transformers, str(kinds[0])):
        raise WrongContent(folder / CONFIG, found=f"architectures {kinds}", expected="a class of transformers")
    if check:
        for file in _weight_files(folder):
            state = ShardedState(file)
            for name in state:
                state[name]
    config = transformers.AutoConfig.from_pretrained(folder)
    config.transformers_weights = INDEX if (folder / INDEX).is_file() else f"{STEM}.safetensors"
    kind = getattr(transformers, str(kinds[0]))
    model = kind.from_pretrained(folder, config=config, **{"dtype": "auto", **options}).eval()
    # transformers would save by the names of the file that it read, which are those in memory; a dense export is to
    # have those of the model's kind.
    model.__dict__.pop("_weight_conversions", None)
    for module in model.modules():
        if isinstance(module, SparseDictionaryLinear):
            module.product = product
    return model


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        placed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(placed, dict) or any(Path(str(name)).name != name for name in placed.values()):
            raise WrongContent(folder / INDEX, found="no weight_map", expected="names of files in the folder")
        return [folder / name for name in sorted(set(placed.values()))]
    return [folder / f"{STEM}.safetensors"]


def export_dense(model: Any, out: Path | str, *, tokenizer: Any = None, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write a compressed model, or the folder of one, as an ordinary checkpoint that every program reads.

    It has the error of the compressed model and the size of the dense one. Parameters and errors are those of
    :func:`save_compressed` and :func:`load_compressed`; a folder's tokenizer is copied.
    """
    if isinstance(model, Path | str):
        files = save_compressed(load_compressed(model), out, dense=True, shard_bytes=shard_bytes)
        copy_beside(Path(model), Path(out))
        return files
    return save_compressed(model, out, tokenizer=tokenizer, dense=True, shard_bytes=shard_bytes)


def _new_folder(out: Path | str) -> Path:
    folder = make_folder(out)
    there = list_folder(folder)
    if there:
        raise UnreadableFile(folder, found=f"a folder with {there[0].name}", expected="a new or empty folder")
    return folder
