"""Put Grassmann mixing in the place of the attention of a finished network, for experiments."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .grassmann_mixing import CausalGrassmannMixing


class MixingAsAttention(nn.Module):
    """Grassmann mixing behind the call of ``nn.MultiheadAttention``, for self-attention; it returns no weights.

    Parameters
    ----------
    mixing : CausalGrassmannMixing
    batch_first : bool
        Whether tokens are (b, t, d) or (t, b, d).
    """

    # What torch's encoders look at before they take a fused path of attention, which they must not take here.
    in_proj_bias = None
    in_proj_weight = None
    _qkv_same_embed_dim = False

    def __init__(self, mixing: CausalGrassmannMixing, batch_first: bool = True):
        super().__init__()
        self.mixing, self.batch_first = mixing, batch_first

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Mix the queries; masks other than ``key_padding_mask`` (True or -inf at padding) say nothing here.

        Raises
        ------
        ValueError
            Keys or values are not the queries: this can take the place of self-attention only.
        """
        if key is not query or value is not query:
            raise ValueError("key and value must be the query itself, as in self-attention, got other tensors")
        real = None
        if key_padding_mask is not None:
            real = ~key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask == 0
        if self.batch_first or query.ndim == 2:
            return self.mixing(query, real), None
        return self.mixing(query.transpose(0, 1), real).transpose(0, 1), None


def replace_attention(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    *,
    causal: bool = True,
    generator: torch.Generator | None = None,
    **options: Any,
) -> list[str]:
    """Replace the ``nn.MultiheadAttention`` modules of a network by Grassmann mixing, in place; return their names.

    The new weights are random, so that the network has to be trained again, which a warning says. Cross-attention
    cannot be replaced; calling it afterwards is an error.

    Parameters
    ----------
    model : nn.Module
    layers : sequence of str, optional
        Names as ``model.named_modules()`` gives them; all where not given.
    causal : bool, default=True
        False where the attention saw tokens on both sides.
    generator : torch.Generator, optional
    **options
        Further arguments of :class:`CausalGrassmannMixing`.

    Raises
    ------
    ValueError
        A name is not that of an ``nn.MultiheadAttention``, or there is none.
    """
    found = {name: part for name, part in model.named_modules() if isinstance(part, nn.MultiheadAttention) and name}
    if not found:
        raise ValueError(f"model must hold an nn.MultiheadAttention, got none in {type(model).__name__}")
    wanted = list(found) if layers is None else list(layers)
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ValueError(f"layers must be among {list(found)}, got {unknown}")
    for name in wanted:
        old = found[name]
        weight = next(old.parameters())
        mixing = CausalGrassmannMixing(
            old.embed_dim, causal=causal, generator=generator, device=weight.device, dtype=weight.dtype, **options
        )
        model.set_submodule(name, MixingAsAttention(mixing, old.batch_first).train(old.training))
    warnings.warn(f"{len(wanted)} layers now have random weights: the network has to be trained again", stacklevel=2)
    return wanted
