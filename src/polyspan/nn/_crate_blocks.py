"""Blocks of the rate-reduction transformer: compress then sparsify, and the mirror of both for decoders."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ._rate_attention import SubspaceSelfAttention, check_tokens, empty_linear, fill_linear
from ._sparsifying import SparsifyingISTA


class CRATEBlock(nn.Module):
    r"""One encoder layer: :math:`h = x + \mathrm{MSSA}(\mathrm{LN}\,x)`, then :math:`\mathrm{ISTA}(\mathrm{LN}\,h)`.

    Drop-in for ``nn.TransformerEncoderLayer(batch_first=True)`` with about a third of its parameters. There is no
    residual around the second half, so the tokens that leave are non-negative, and a token whose code is all zero
    cannot be brought back by what follows. With "eq10" and "exact" the compressed tokens are
    :math:`\mathrm{LN}\,x + \Delta`, the step itself, and not x plus the step of another point.
    Source: catalogue entry ``crate``.

    Parameters
    ----------
    dim, num_heads, head_dim, step, tied_output, scale, bias, causal, dropout, eps2, step_size
        As in :class:`SubspaceSelfAttention`.
    eta, lambd, n_steps, nonneg, dict_size
        As in :class:`SparsifyingISTA`.
    residual : bool, default=False
        Put a residual around the second half, as later networks with overcomplete dictionaries do.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        step: str = "published",
        tied_output: bool = False,
        scale: str | float | int = "sqrt",
        bias: bool = True,
        causal: bool = False,
        dropout: float | int = 0.0,
        eps2: float | int = 0.5,
        step_size: float | int | None = None,
        dict_size: int | None = None,
        eta: float | int = 0.1,
        lambd: float | int = 0.1,
        n_steps: int = 1,
        nonneg: bool = True,
        residual: bool = False,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual = residual
        self.attention_norm = nn.LayerNorm(dim, **factory)
        self.attention = SubspaceSelfAttention(
            dim, num_heads, head_dim, step=step, tied_output=tied_output, scale=scale, bias=bias, causal=causal,
            dropout=dropout, eps2=eps2, step_size=step_size, generator=generator, **factory,
        )  # fmt: skip
        self.ista_norm = nn.LayerNorm(dim, **factory)
        self.ista = SparsifyingISTA(
            dim, dict_size, eta=eta, lambd=lambd, n_steps=n_steps, nonneg=nonneg, generator=generator, **factory
        )

    def compress(
        self, x: Float[Tensor, "*batch t d"], mask: Bool[Tensor, "*batch t"] | None = None
    ) -> Float[Tensor, "*batch t d"]:
        """Return the tokens after the first half."""
        check_tokens(x, self.attention.dim, mask)
        z = self.attention_norm(x)
        return (x if self.attention.step == "published" else z) + self.attention(z, mask)

    def sparsify(self, h: Float[Tensor, "*batch t d"]) -> Float[Tensor, "*batch t d"]:
        """Return what the second half makes of compressed tokens."""
        out = self.ista(self.ista_norm(h))
        return h + out if self.residual else out

    def forward(
        self, x: Float[Tensor, "*batch t d"], mask: Bool[Tensor, "*batch t"] | None = None
    ) -> Float[Tensor, "*batch t d"]:
        """Return the tokens after both halves; ``mask`` is true for real tokens, and the others influence none."""
        return self.sparsify(self.compress(x, mask))


class CRATEDecoderBlock(nn.Module):
    r"""One decoder layer, the mirror of :class:`CRATEBlock`: :math:`y = A\,\mathrm{LN}\,x`, then :math:`y-\mathrm{MSSA}(\mathrm{LN}\,y)`.

    The matrix A (d, d) takes the place of the sparse code's dictionary, and the minus sign makes the compression undo
    itself. There is no residual around the first half. Source: catalogue entry ``crate``.

    Parameters
    ----------
    dim, num_heads, head_dim, tied_output, scale, bias, causal, dropout
        As in :class:`SubspaceSelfAttention`, whose "published" step is the only one that has a mirror.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.
    """  # noqa: E501 - the formula is one line

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        tied_output: bool = False,
        scale: str | float | int = "sqrt",
        bias: bool = True,
        causal: bool = False,
        dropout: float | int = 0.0,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.synthesis_norm = nn.LayerNorm(dim, **factory)
        self.synthesis = empty_linear(dim, dim, False, device, dtype)
        fill_linear(self.synthesis, generator)
        self.attention_norm = nn.LayerNorm(dim, **factory)
        self.attention = SubspaceSelfAttention(
            dim, num_heads, head_dim, tied_output=tied_output, scale=scale, bias=bias, causal=causal, dropout=dropout,
            generator=generator, **factory,
        )  # fmt: skip

    def forward(
        self, x: Float[Tensor, "*batch t d"], mask: Bool[Tensor, "*batch t"] | None = None
    ) -> Float[Tensor, "*batch t d"]:
        """Return the tokens after both halves."""
        check_tokens(x, self.attention.dim, mask)
        y = self.synthesis(self.synthesis_norm(x))
        return y - self.attention(self.attention_norm(y), mask)
