"""Classify sequences, or pairs of sentence embeddings, by mixing their parts as planes."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .grassmann_mixing import CausalGrassmannMixing, GrassmannBlock, check_mask, check_tokens, reset_linears


class GrassmannSequenceClassifier(nn.Module):
    """Head for the token features of an encoder, or any sequence of vectors: mixing, mean over tokens, logits.

    A linear map to the head's width, blocks that mix with tokens on both sides, the mean over real tokens, LayerNorm
    and a linear map to logits. Sizes are those told of the paper's head for sentence pairs; how its windows of eight
    tokens lie is not told, and here each token has its own.

    Breaks: nothing but the pairs knows the order of tokens, so the features should carry positions where order matters.
    A sequence without a real token has the logits of the bias. Source: catalogue entry ``grassmann-mixing``.

    Parameters
    ----------
    in_features : int
        Width of the features.
    num_classes : int
        At least 2.
    d_model, r, num_layers, num_heads, ffn : int
        Width inside, reduced width, blocks, parts of the reduced width, width of the feed-forward networks.
    offsets : sequence of int, default=(1, ..., 7)
        In both directions: a window of eight tokens.
    dropout : float, default=0.1
    mixing : dict, optional
        Further arguments of :class:`CausalGrassmannMixing`.
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        An argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        d_model: int = 256,
        r: int = 64,
        num_layers: int = 2,
        *,
        offsets: Sequence[int] = tuple(range(1, 8)),
        num_heads: int = 4,
        ffn: int = 512,
        dropout: float | int = 0.1,
        mixing: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_sizes(in_features, num_classes)
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.in_features = in_features
        place: dict[str, Any] = {"device": torch.get_default_device() if device is None else device, "dtype": dtype}
        options = {"causal": False, "num_heads": num_heads} | (mixing or {})
        self.projection = nn.utils.skip_init(nn.Linear, in_features, d_model, **place)
        block: dict[str, Any] = {"ffn": ffn, "mixing": options, "generator": generator}
        self.blocks = nn.ModuleList(
            GrassmannBlock(d_model, r, offsets, dropout, **block, **place) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model, **place)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.utils.skip_init(nn.Linear, d_model, num_classes, **place)
        reset_linears(self.projection, generator)
        reset_linears(self.classifier, generator)

    def forward(
        self, x: Float[Tensor, "*batch t features"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "*batch C"]:
        """Return logits (*batch, num_classes); the mask (*batch, t) is True or 1 where a token is real."""
        check_tokens(x, self.in_features)
        real = check_mask(attention_mask, x, x.shape[:-1])
        h = self.projection(x)
        for block in self.blocks:
            h = block(h, real)
        weight = real.unsqueeze(-1)
        mean = (h * weight).sum(dim=-2) / weight.sum(dim=-2).clamp(min=1)
        return self.classifier(self.dropout(self.norm(mean)))


class GrassmannPairHead(nn.Module):
    """Head for two sentence embeddings, such as premise and hypothesis: the plane that they span, gated, and logits.

    Both are mapped to the head's width and treated as a sequence of two: the second is mixed with the plane of both,
    as in :class:`CausalGrassmannMixing`, and the logits are linear in the two results side by side. Embeddings that are
    equal span no plane, and only the gate is left of the mixing. Source: catalogue entry ``grassmann-mixing``.

    Parameters
    ----------
    in_features : int
    num_classes : int
        At least 2.
    d_model, r, num_heads : int
    dropout : float, default=0.1
    mixing : dict, optional
        Further arguments of :class:`CausalGrassmannMixing`.
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        An argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        d_model: int = 256,
        r: int = 64,
        *,
        num_heads: int = 1,
        dropout: float | int = 0.1,
        mixing: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_sizes(in_features, num_classes)
        place: dict[str, Any] = {"device": torch.get_default_device() if device is None else device, "dtype": dtype}
        self.in_features = in_features
        options: dict[str, Any] = {"num_heads": num_heads, "generator": generator} | (mixing or {})
        self.projection = nn.utils.skip_init(nn.Linear, in_features, d_model, **place)
        self.mixing = CausalGrassmannMixing(d_model, r, (1,), dropout, **options, **place)
        self.classifier = nn.utils.skip_init(nn.Linear, 2 * d_model, num_classes, **place)
        reset_linears(self.projection, generator)
        reset_linears(self.classifier, generator)

    def forward(
        self, first: Float[Tensor, "*batch features"], second: Float[Tensor, "*batch features"]
    ) -> Float[Tensor, "*batch C"]:
        """Return logits (*batch, num_classes) of pairs of embeddings."""
        if first.shape != second.shape:
            raise ValueError(
                "first and second must be as large as each other, "
                f"got shapes {tuple(first.shape)} and {tuple(second.shape)}"
            )
        if first.shape[-1:] != (self.in_features,):
            width = first.shape[-1] if first.ndim else "a number"
            raise ValueError(f"first and second must have width {self.in_features}, got {width}")
        h = self.projection(torch.stack([first, second], dim=-2))
        return self.classifier(self.mixing(h).flatten(-2))


def _check_sizes(in_features: int, num_classes: int) -> None:
    if in_features < 1:
        raise ValueError(f"in_features must be at least 1, got {in_features}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
