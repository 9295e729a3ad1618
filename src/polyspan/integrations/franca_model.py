"""Vision transformers of Franca and DINOv2 as Hugging Face models, from weights of the authors' code."""

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyspan.errors import require
from polyspan.io import read_members

HEADS = ("dino_head.", "ibot_head.")
HEAD_WIDTH = 64
PLAIN = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
# One name of the authors' is several of transformers', in equal parts by rows; transformers has renamed some.
BLOCK: dict[str, tuple[tuple[str, ...], ...]] = {
    "norm1": (("norm1",),),
    "norm2": (("norm2",),),
    "attn.qkv": (
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    ),
    "attn.proj": (("attention.o_proj",), ("attention.output.dense",)),
    "ls1": (("layer_scale1",),),
    "ls2": (("layer_scale2",),),
    "mlp.fc1": (("mlp.fc1",),),
    "mlp.fc2": (("mlp.fc2",),),
    "mlp.w12": (("mlp.gate_proj", "mlp.up_proj"), ("mlp.weights_in",)),
    "mlp.w3": (("mlp.down_proj",), ("mlp.weights_out",)),
}


def convert_franca_checkpoint(source: Path | str | Mapping[str, Any], *, num_heads: int | None = None) -> Any:
    """Make a ``Dinov2Model`` of transformers from weights of Franca's code, or of DINOv2's, which it grew out of.

    Sizes are told from the shapes. A teacher or student under its name, prefixes such as ``backbone.`` and blocks in
    chunks (``blocks.0.3.``) are understood; projection heads are left out, for which there is
    ``NestedMatryoshkaHead.from_state_dict``. Positions are those of the checkpoint's own grid; transformers turns them
    to other sizes of image. Weights that Franca's authors publish are for research, not for commerce: a warning says
    so. Source: catalogue entry ``franca``.

    Parameters
    ----------
    source : path or mapping
        A .safetensors or .npz file, or weights by name as ``torch.load(file, weights_only=True)`` gives them; .pth
        files themselves are refused, since reading them can run code.
    num_heads : int, optional
        Not told by any shape; width / 64, as of all published sizes, where not given.

    Returns
    -------
    transformers.Dinov2Model
        In evaluation mode, on the CPU.

    Raises
    ------
    ValueError
        Weights are missing or left over (they are listed), or sizes do not fit together.
    MissingExtra
        transformers is not installed.
    FileError
        The file cannot be used.
    """
    transformers: Any = require("transformers", extra="hf", purpose="a vision transformer")
    state = _flat(read_members(source) if isinstance(source, str | Path) else source)
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight")
    missing = [name for name in needed if name not in state]
    numbers = sorted({int(found[1]) for name in state if (found := _block(name))})
    if missing or numbers != list(range(len(numbers))) or not numbers:
        lost = missing or [f"blocks.{i}" for i in range(max(numbers, default=0) + 1) if i not in numbers]
        raise ValueError(f"source must hold a whole vision transformer, got none of {', '.join(lost)}")
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    if side * side != state["pos_embed"].shape[1] - 1:
        raise ValueError(f"pos_embed must be of a square grid, got {state['pos_embed'].shape[1] - 1} patches")
    heads = width // HEAD_WIDTH if num_heads is None else num_heads
    if heads < 1 or width % heads:
        raise ValueError(f"num_heads must divide the width {width}, got {heads}")
    gated = any(name.endswith("mlp.w12.weight") for name in state)
    inner = next(value for name, value in state.items() if name.endswith(("mlp.fc1.weight", "mlp.w3.weight")))
    config = transformers.Dinov2Config(
        hidden_size=width, num_hidden_layers=len(numbers), num_attention_heads=heads, num_channels=channels,
        patch_size=patch, image_size=side * patch, use_swiglu_ffn=gated,
        qkv_bias=any(name.endswith("attn.qkv.bias") for name in state),
    )  # fmt: skip
    if not gated:
        config.mlp_ratio = _ratio(inner.shape[0], width)
    with torch.device("meta"):
        model = transformers.Dinov2Model(config)
    wanted = model.state_dict()
    made: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        names = _renamed(name, wanted)
        if not names:
            unknown.append(name)
        made |= dict(zip(names, value.chunk(len(names)) if names else (), strict=True))
    if "mask_token" not in state:
        made["embeddings.mask_token"] = torch.zeros(1, width)
    lost = sorted(wanted.keys() - made.keys())
    other = [n for n in made if n in wanted and made[n].shape != wanted[n].shape]
    if lost or unknown or other:
        raise ValueError(
            f"source must hold the weights of one network, got none for {lost[:10]}, left over {unknown[:10]}, and of "
            f"another shape {[(n, tuple(made[n].shape), tuple(wanted[n].shape)) for n in other[:3]]}"
        )
    model = transformers.Dinov2Model(config)
    model.load_state_dict({name: value.float() for name, value in made.items()})
    warnings.warn(
        "weights published by the authors of Franca may be used for research only, not commercially", UserWarning,
        stacklevel=2,
    )  # fmt: skip
    return model.eval()


def _flat(source: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return tensors by the plain names of the backbone, heads left out."""
    state: Any = source
    for key in ("model", "state_dict", "teacher", "student"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    found = {}
    for name, value in state.items():
        short = re.sub(r"^(module\.|teacher\.|student\.|backbone\.|_orig_mod\.)*", "", name)
        if not short.startswith(HEADS):
            found[short] = torch.as_tensor(value)
    return found


def _block(name: str) -> re.Match | None:
    return re.fullmatch(r"blocks\.(?:\d+\.)?(\d+)\.(.+)\.(weight|bias|gamma)", name)


def _renamed(name: str, wanted: Mapping[str, Any]) -> list[str]:
    """Return what transformers calls a weight, or the parts of it; nothing where it has no place."""
    if name in PLAIN:
        return [PLAIN[name]]
    found = _block(name)
    if found is None:
        return []
    leaf = "lambda1" if found[3] == "gamma" else found[3]
    for names in BLOCK.get(found[2], ()):
        whole = [f"encoder.layer.{found[1]}.{part}.{leaf}" for part in names]
        if all(one in wanted for one in whole):
            return whole
    return []


def _ratio(inner: int, width: int) -> int:
    if inner % width:
        raise ValueError(f"hidden units must be a multiple of the width {width}, got {inner}")
    return inner // width
