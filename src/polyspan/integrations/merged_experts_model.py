"""Checkpoints with merged experts as Hugging Face models: importing this teaches transformers how to read them."""

from pathlib import Path
from typing import Any

import torch

from polyspan.checkpoints._expert_export import QUANT_METHOD
from polyspan.checkpoints._expert_layout import FusedGate, expert_layers, put_module
from polyspan.checkpoints.merged_experts import MergedExperts
from polyspan.errors import WrongContent, require
from polyspan.io import read_json
from polyspan.io._slabs import tensor_slabs

quantisers: Any = require("transformers.quantizers.auto", extra="hf", purpose="reading merged experts")
bases: Any = require("transformers.quantizers.base", extra="hf")
configs: Any = require("transformers.utils.quantization_config", extra="hf")
transformers: Any = require("transformers", extra="hf")

FILES = ("polyspan.safetensors", "polyspan.safetensors.index.json")


class MergedExpertsConfig(configs.QuantizationConfigMixin):
    """Which experts of a model were merged, and into how many; the registry of quantisers is how files say so.

    Parameters
    ----------
    layers : dict of str to dict
        By name of the experts' module: ``num_experts``, ``num_groups`` and ``ranks``.
    """

    def __init__(self, layers: dict[str, dict[str, Any]] | None = None, **_: Any):
        self.quant_method = QUANT_METHOD
        self.layers = layers or {}


class MergedExpertsQuantizer(bases.HfQuantizer):
    """Puts empty merged experts in their places before weights are read."""

    # A model whose experts are not merged yet is none that this could read.
    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        for layer in expert_layers(model):
            facts = self.quantization_config.layers.get(layer.name)
            if facts is None:
                continue
            stack = layer.stack()
            merged = MergedExperts(
                facts["num_experts"], facts["num_groups"], stack.down.shape[1], stack.up.shape[1],
                activation=FusedGate(layer.experts), gated=stack.gate is not None, bias=stack.down_bias is not None,
                ranks=facts["ranks"], device="meta", dtype=stack.up.dtype,
            )  # fmt: skip
            put_module(model, layer.name, merged)
        return model

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register_merged_experts() -> None:
    """Teach transformers' loaders the form; importing this module has done it already."""
    if QUANT_METHOD not in quantisers.AUTO_QUANTIZATION_CONFIG_MAPPING:
        quantisers.register_quantization_config(QUANT_METHOD)(MergedExpertsConfig)
        quantisers.register_quantizer(QUANT_METHOD)(MergedExpertsQuantizer)


def load_merged_experts(path: Path | str, *, dtype: torch.dtype | str = "auto", **options: Any) -> Any:
    """Read a causal language model that :func:`merge_expert_checkpoint` wrote with export "merged", bit for bit.

    Source: catalogue entry ``sub-moe``.

    Parameters
    ----------
    path : path
    dtype : dtype or "auto"
        The checkpoint's own where not given.
    **options
        Of ``from_pretrained``: ``device_map`` for instance.

    Raises
    ------
    WrongContent
        The folder holds a model of another form.
    UnreadableFile, CorruptFile
        Its configuration cannot be read.
    """
    path = Path(path)
    told = read_json(path / "config.json")
    method = (told.get("quantization_config") or {}).get("quant_method") if isinstance(told, dict) else None
    file = next((name for name in FILES if (path / name).is_file()), None)
    if method != QUANT_METHOD or file is None:
        found = f"quant_method {method!r}" if method != QUANT_METHOD else f"none of {', '.join(FILES)}"
        raise WrongContent(path, found=found, expected="a checkpoint with merged experts")
    _check_files(path, file)
    register_merged_experts()
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    config.transformers_weights = file
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, **options
    )
    return model.eval()


def _check_files(path: Path, file: str) -> None:
    """Compare the headers of the weight files with their lengths, before a reader that tells less of what is wrong."""
    names = {file}
    if file.endswith(".json"):
        placed = read_json(path / file)
        names = set(placed["weight_map"].values()) if isinstance(placed, dict) and "weight_map" in placed else set()
        if not names or any(Path(name).name != name for name in names):
            raise WrongContent(path / file, found="no weight_map of files beside it", expected="a file for each tensor")
    for name in names:
        tensor_slabs(path / name, refuse_types=False)


register_merged_experts()
