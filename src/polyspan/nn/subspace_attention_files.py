"""Networks with subspace attention in files that bring the whole network back, layers and weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from polyspan.errors import WrongContent, require
from polyspan.io import load_fitted, save_fitted
from polyspan.run import layers_draw_from, torch_generator

from ._model_surgery import find_modules, replace_module
from .attention_surgery import behind
from .mobilenet import mobilenet_v1, mobilenet_v2
from .subspace_attention import ULSAM

BUILDERS = {"mobilenet-v1": mobilenet_v1, "mobilenet-v2": mobilenet_v2}
HUGGING_FACE = "hugging-face"
KIND = "AttentionNetwork"


class AttentionNetwork(NamedTuple):
    """A network and how to make it without attention, for :func:`plain_network`.

    ``network`` holds ``kind``, "mobilenet-v1", "mobilenet-v2" or "hugging-face", and the arguments of the builder, or
    ``config``, the Hugging Face configuration of an image classifier.
    """

    model: nn.Module
    network: dict[str, Any]


def plain_network(
    network: Mapping[str, Any], *, generator: torch.Generator | None = None, device: Any = None
) -> nn.Module:
    """Make the network that a description names, without attention and with weights from chance.

    Parameters
    ----------
    network : mapping
        As in :class:`AttentionNetwork`.
    generator : torch.Generator, optional
        Source of the weights; one of seed 0 where not given.
    device : optional
        "meta" makes a network without weights, for counting.

    Raises
    ------
    ValueError
        There is no such kind, or its arguments are out of range or none of its own.
    MissingExtra
        It is one of Hugging Face, and transformers is not installed.
    """
    said = dict(network)
    kind = said.pop("kind", None)
    generator = torch_generator(0) if generator is None else generator
    if kind == HUGGING_FACE:
        return _hugging_face(said.get("config"), generator, device)
    if kind not in BUILDERS:
        raise ValueError(f"network must be of kind {', '.join((*BUILDERS, HUGGING_FACE))}, got {kind!r}")
    try:
        return BUILDERS[kind](**said, generator=generator, device=device)
    except TypeError as error:
        raise ValueError(f"network must hold the arguments of {kind}, got {said}: {error}") from None


def read_image_classifier(folder: Path | str) -> AttentionNetwork:
    """Read an image classifier of Hugging Face from a folder, from .safetensors files alone and without code of it.

    Raises
    ------
    WrongContent
        The folder holds no image classifier that transformers knows, or not all of its weights; names are listed.
    MissingExtra
        transformers is not installed.
    """
    transformers: Any = require("transformers", extra="hf", purpose="a Hugging Face image classifier")
    folder = Path(folder)
    options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
    expected = "config.json and .safetensors weights of an image classifier"
    try:
        model, told = transformers.AutoModelForImageClassification.from_pretrained(
            str(folder), output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WrongContent(folder, found=str(error), expected=expected) from None
    if told["missing_keys"]:
        raise WrongContent(folder, found=f"no weights {sorted(told['missing_keys'])}", expected=expected)
    return AttentionNetwork(model.eval(), {"kind": HUGGING_FACE, "config": json.loads(model.config.to_json_string())})


def attention_places(model: nn.Module) -> list[dict[str, Any]]:
    """Say where a network has :class:`ULSAM` layers, instead of a block or behind it, and of which sizes.

    Each place has ``name``, that of the block, ``how``, "replace" or "insert", and the arguments of :class:`ULSAM`.
    Where one place lies in another, the outer one comes first.
    """
    places, inserted = [], set()
    for name, module in model.named_modules():
        behind_block = isinstance(module, nn.Sequential) and list(module._modules) == ["block", "attention"]
        if behind_block and isinstance(module.attention, ULSAM):
            inserted.add(module.attention)
            places.append({"name": name, "how": "insert", **module.attention.sizes()})
        elif isinstance(module, ULSAM) and module not in inserted:
            places.append({"name": name, "how": "replace", **module.sizes()})
    return places


def save_attention_network(model: nn.Module, path: Path | str, network: Mapping[str, Any]) -> Path:
    """Write a network and the places of its :class:`ULSAM` layers to one .safetensors file, atomically; no pickle.

    Weights in bfloat16 are widened.

    Parameters
    ----------
    model : torch.nn.Module
        What :func:`replace_with_ulsam` and :func:`insert_ulsam` made of the network, as often as you like; or itself.
    path : path
    network : mapping
        What it was before, as in :class:`AttentionNetwork`.

    Raises
    ------
    ValueError
        The model is another than the description with attention in these places; what differs is named.
    """
    places = attention_places(model)
    state = model.state_dict()
    expected = _with_attention(network, places, "meta").state_dict()
    wrong = [
        f"{name} {_shape(state.get(name))} for {_shape(expected.get(name))}"
        for name in (*expected, *(name for name in state if name not in expected))
        if _shape(state.get(name)) != _shape(expected.get(name))
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"network must describe the model, got {', '.join(wrong[:5])}{more}")
    arrays = {
        name: (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
        for name, value in state.items()
    }
    return save_fitted(Path(path), kind=KIND, arrays=arrays, params={"network": dict(network), "places": places})


def load_attention_network(path: Path | str) -> AttentionNetwork:
    """Read a network that :func:`save_attention_network` wrote, ready to evaluate.

    Raises
    ------
    FileError
        One of its five kinds; ``WrongContent`` where the file holds something else, or not all weights.
    MissingExtra
        It is one of Hugging Face, and transformers is not installed.
    """
    found = load_fitted(Path(path), kind=KIND)
    state = {name: torch.as_tensor(np.array(value)) for name, value in found.arrays.items()}
    try:
        network, places = dict(found.params["network"]), list(found.params["places"])
        model = _with_attention(network, places, "meta")
        model.load_state_dict(state, assign=True)
        if any(buffer.is_meta for buffer in model.buffers()):
            # What a network holds beside its weights, and writes to no file, is there only where it was made for real.
            model = _with_attention(network, places, None)
            model.load_state_dict(state, assign=True)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WrongContent(
            path, found=f"{error}", expected="a network, places of attention in it, and all of its weights"
        ) from None
    return AttentionNetwork(model.requires_grad_().eval(), network)


def _hugging_face(config: Any, generator: torch.Generator, device: Any) -> nn.Module:
    transformers: Any = require("transformers", extra="hf", purpose="a Hugging Face image classifier")
    said = dict(config) if isinstance(config, Mapping) else {}
    kind = said.pop("model_type", None)
    if not isinstance(kind, str):
        raise ValueError(f"network must hold config, with model_type in it, got {config!r}")
    made = transformers.AutoConfig.for_model(kind, **said)
    with layers_draw_from(generator), torch.device(torch.get_default_device() if device is None else device):
        return transformers.AutoModelForImageClassification.from_config(made, trust_remote_code=False)


def _with_attention(network: Mapping[str, Any], places: list[dict[str, Any]], device: Any) -> nn.Module:
    """Make a network with attention in given places, as surgery left it; weights are from chance."""
    model = plain_network(network, device=device)
    for place in places:
        sizes = dict(place)
        name, how = sizes.pop("name"), sizes.pop("how")
        block = find_modules(model, name, "places")[name]
        attention = ULSAM(**sizes, generator=torch_generator(0), device=device)
        if how not in ("replace", "insert"):
            raise ValueError(f"places must replace or insert, got {how!r} at {name}")
        replace_module(model, block, attention if how == "replace" else behind(block, attention))
    return model


def _shape(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)
