"""Keep rate-reduction transformers in files, and take over the weights of the authors' networks."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyspan.errors import WrongContent
from polyspan.io import load_fitted, read_members, save_fitted

from .masked_rate_autoencoder import CRATEMAE
from .rate_reduction_transformer import CRATE, SIZES

BLOCK = {
    "0.norm.weight": "attention_norm.weight",
    "0.norm.bias": "attention_norm.bias",
    "0.fn.qkv.weight": "attention.projection.weight",
    "0.fn.to_out.0.weight": "attention.output.weight",
    "0.fn.to_out.0.bias": "attention.output.bias",
    "1.norm.weight": "ista_norm.weight",
    "1.norm.bias": "ista_norm.bias",
    "1.fn.weight": "ista.weight",
}
DECODER = {
    "0.norm.weight": "synthesis_norm.weight",
    "0.norm.bias": "synthesis_norm.bias",
    "0.fn.weight": "synthesis.weight",
    "1.norm.weight": "attention_norm.weight",
    "1.norm.bias": "attention_norm.bias",
    "1.fn.qkv.weight": "attention.projection.weight",
    "1.fn.to_out.0.weight": "attention.output.weight",
    "1.fn.to_out.0.bias": "attention.output.bias",
}
PLAIN = {
    "cls_token": "cls_token",
    "pos_embedding": "positions",
    "to_patch_embedding.1.weight": "patch_norm.weight",
    "to_patch_embedding.1.bias": "patch_norm.bias",
    "to_patch_embedding.2.weight": "patch_embedding.weight",
    "to_patch_embedding.2.bias": "patch_embedding.bias",
    "to_patch_embedding.3.weight": "embedding_norm.weight",
    "to_patch_embedding.3.bias": "embedding_norm.bias",
    "mlp_head.0.weight": "head_norm.weight",
    "mlp_head.0.bias": "head_norm.bias",
    "mlp_head.1.weight": "head.weight",
    "mlp_head.1.bias": "head.bias",
}
PLAIN_MAE = {
    "cls_token": "cls_token",
    "mask_token": "mask_token",
    "decoder_pos_embed": "positions",
    "patch_embed.proj.weight": "patch_embedding.weight",
    "patch_embed.proj.bias": "patch_embedding.bias",
    "norm.weight": "head_norm.weight",
    "norm.bias": "head_norm.bias",
    "decoder_norm.weight": "decoder_norm.weight",
    "decoder_norm.bias": "decoder_norm.bias",
    "decoder_pred.weight": "prediction.weight",
    "decoder_pred.bias": "prediction.bias",
}
UNUSED = ("pos_embed", "decoder_embed.weight", "decoder_embed.bias")
"""In the authors' auto-encoders these stand in the file and take no part in the computation."""


def save_crate(model: CRATE, path: Path | str) -> Path:
    """Write a network to one .safetensors file, atomically; no pickle. Weights in bfloat16 are widened."""
    arrays = {
        name: (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
        for name, value in model.state_dict().items()
    }
    return save_fitted(Path(path), kind="CRATE", arrays=arrays, params={"config": model.config})


def load_crate(path: Path | str) -> CRATE:
    """Read a network that :func:`save_crate` wrote, or that a :class:`CrateClassifier` saved.

    Raises
    ------
    FileError
        One of its five kinds; ``WrongContent`` where the file holds something else.
    """
    found = load_fitted(Path(path), kind=("CRATE", "CrateClassifier"))
    model = CRATE(**found.params["config"], device="meta")
    state = {name: torch.as_tensor(np.array(value)) for name, value in found.arrays.items() if name[0] != "_"}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise WrongContent(path, found=str(error), expected="the weights that its configuration asks for") from None
    return model.requires_grad_().eval()


def convert_official(
    source: Path | str | Mapping[str, Any],
    *,
    num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    channels: int = 3,
    eta: float | int = 0.1,
    lambd: float | int | None = None,
) -> CRATE | CRATEMAE:
    """Make a network from weights of the authors' code, a classifier's or a masked auto-encoder's.

    Widths, depth, patches, classes and image size (where patches form a square) are told from the shapes. Weights under
    ``state_dict`` or ``model``, and names that begin with ``module.``, as training on several cards leaves them, are
    understood; a missing head gives a network without one.

    Parameters
    ----------
    source : path or mapping
        A .safetensors or .npz file, or weights by name as ``torch.load(file, weights_only=True)`` gives them. The .pth
        files themselves are refused: reading them can run code.
    num_heads : int, optional
        Not told by any shape. Where not given, that of the published size of this width; networks of other makers may
        have another, and would then compute wrongly without a word.
    image_size : tuple of int, optional
        In pixels, where patches do not form a square.
    channels : int, default=3
    eta, lambd : float
        Of the sparse step; no shape tells them. ``lambd`` is 0.1 in a classifier and 0.5 in an auto-encoder.

    Raises
    ------
    ValueError
        Weights are missing or left over (they are listed), or the sizes do not fit together.
    FileError
        The file cannot be used.
    """
    state = _flat(read_members(source) if isinstance(source, str | Path) else source)
    mae = "decoder_pred.weight" in state or "patch_embed.proj.weight" in state
    plain = PLAIN_MAE if mae else PLAIN
    made: dict[str, torch.Tensor] = {}
    unknown = []
    for name, value in state.items():
        new = plain.get(name) or _block_name(name, mae)
        if new is not None:
            made[new] = value
        elif not (mae and name in UNUSED):
            unknown.append(name)
    needed = ["patch_embedding.weight", "positions", "cls_token", "blocks.0.attention.projection.weight"]
    missing = [name for name in needed if name not in made]
    if missing or unknown:
        raise ValueError(
            f"source must hold the weights of one network, got none for {missing} and, left over, {unknown}"
        )
    if mae:
        made["patch_embedding.weight"] = made["patch_embedding.weight"].permute(0, 2, 3, 1).flatten(1)
    dim, width = made["patch_embedding.weight"].shape
    patch, n = math.isqrt(width // channels), made["positions"].shape[1] - 1
    if patch * patch * channels != width:
        raise ValueError(f"channels must fit patches of {width} values, got {channels}")
    side = math.isqrt(n)
    if image_size is None and side * side != n:
        raise ValueError(f"image_size must be given for {n} patches, which form no square, got None")
    heads = num_heads or {d: h for d, _, h in SIZES.values()}.get(dim)
    if heads is None:
        raise ValueError(f"num_heads must be given for width {dim}, which is none of the published, got None")
    inner = made["blocks.0.attention.projection.weight"].shape[0]
    if inner % heads:
        raise ValueError(f"num_heads must divide {inner}, got {heads}")
    depth = 1 + max(int(name.split(".")[1]) for name in made if name.startswith("blocks."))
    size = image_size or (side * patch, side * patch)
    block = {"eta": eta, "lambd": (0.5 if mae else 0.1) if lambd is None else lambd}
    options: dict[str, Any] = {"head_dim": inner // heads, "channels": channels, "device": "meta"}
    if mae:
        deep = [int(name.split(".")[1]) for name in made if name.startswith("decoder_blocks.")]
        options |= {"decoder_depth": 1 + max(deep, default=0), "lambd": block.pop("lambd"), "block": block}
        model: CRATE | CRATEMAE = CRATEMAE(size, patch, dim, depth, heads, **options)
    else:
        classes = len(made["head.weight"]) if "head.weight" in made else 0
        model = CRATE(size, patch, classes, dim, depth, heads, block=block, **options)
        if not classes and "head_norm.weight" not in made:
            made["head_norm.weight"], made["head_norm.bias"] = torch.ones(dim), torch.zeros(dim)
    missing = sorted(set(model.state_dict()) - set(made))
    unknown = sorted(set(made) - set(model.state_dict()))
    if missing or unknown:
        raise ValueError(
            f"source must hold the weights of one network, got none for {missing} and, left over, {unknown}"
        )
    wrong = [n for n, value in model.state_dict().items() if value.shape != made[n].shape]
    if wrong:
        told = {n: (tuple(made[n].shape), tuple(model.state_dict()[n].shape)) for n in wrong}
        raise ValueError(f"source must have shapes that fit together, got (found, expected) {told}")
    model.load_state_dict({name: value.clone() for name, value in made.items()}, assign=True)
    if isinstance(model, CRATEMAE):
        model.positions.requires_grad_(False)
    return model.requires_grad_().eval()


def _flat(source: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Take weights out of what wraps them, without the prefix of parallel training."""
    for wrapper in ("state_dict", "model"):
        if isinstance(source.get(wrapper), Mapping):
            source = source[wrapper]
    return {
        name.removeprefix("module."): torch.as_tensor(value).detach()
        for name, value in source.items()
        if isinstance(value, np.ndarray | torch.Tensor)
    }


def _block_name(name: str, mae: bool) -> str | None:
    if not mae:
        found = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", name)
        return f"blocks.{found[1]}.{BLOCK[found[2]]}" if found and found[2] in BLOCK else None
    found = re.fullmatch(r"(decoder_blocks|blocks)\.(\d+)\.layers\.0\.(.+)", name)
    table = DECODER if name.startswith("decoder") else BLOCK
    return f"{found[1]}.{found[2]}.{table[found[3]]}" if found and found[3] in table else None
