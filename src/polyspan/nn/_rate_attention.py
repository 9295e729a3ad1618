"""Attention whose query, key and value are one projection: a step that compresses tokens towards learnt subspaces."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from polyspan.linalg import coding_rate_gradient

from ._autocast import without_autocast

STEPS = ("published", "eq10", "exact")


def empty_linear(d_in: int, d_out: int, bias: bool, device: Any, dtype: torch.dtype | None) -> nn.Linear:
    """Make an ``nn.Linear`` without drawing its weights, so that no generator is touched."""
    device = torch.get_default_device() if device is None else device
    return nn.utils.skip_init(nn.Linear, d_in, d_out, bias=bias, device=device, dtype=dtype)


@torch.no_grad()
def fill_linear(layer: nn.Linear, generator: torch.Generator | None) -> None:
    """Draw weights and bias uniformly within one over the square root of the inputs, as ``nn.Linear`` does."""
    bound = 1 / math.sqrt(layer.in_features)
    layer.weight.uniform_(-bound, bound, generator=generator)
    if layer.bias is not None:
        layer.bias.uniform_(-bound, bound, generator=generator)


class SubspaceSelfAttention(nn.Module):
    r"""Move every token towards the learnt subspaces that explain it; the result is added to the tokens.

    With columns as tokens, Z (d, N), bases :math:`U_k` (d, p), :math:`W_k=U_k^\top Z` and :math:`\gamma` being
    ``step_size``, the increment is

    - "published": :math:`\gamma\sum_k V_k W_k\,\mathrm{softmax}(s\,W_k^\top W_k)`, attention with one projection for
      query, key and value, as in the authors' networks;
    - "eq10": the same less :math:`\gamma Z`, the step that the paper derives and its networks leave out;
    - "exact": :math:`-\gamma\sum_k V_k (I+\beta W_kW_k^\top)^{-1}W_k` with :math:`\beta=p/(N\epsilon^2)`, the negative
      gradient of the rate :math:`R^c=\sum_k\tfrac12\log\det(I+\beta W_k^\top W_k)` times :math:`\gamma/\beta`. It has
      no attention map and takes time linear in N.

    :math:`V_k` is a free matrix, or :math:`U_k` itself where ``tied_output``.

    Breaks: "published" makes tokens longer, and the rate that it should lower can rise by that alone. Brought to one
    length again it is "eq10" at a step size of 0.5, and both let the rate of all tokens collapse along with that within
    the subspaces, where "exact" keeps it. Without a normalisation between steps "eq10" and "exact" shrink tokens to
    nothing, and with many steps "exact" moves them out of all subspaces. They are steps of descent only where
    ``tied_output`` and the bases are orthonormal; neither is enforced. Source: catalogue entry ``crate``.

    Parameters
    ----------
    dim : int
        Width d of the tokens.
    num_heads : int
        Number K of subspaces.
    head_dim : int, optional
        Dimension p of each; ``dim / num_heads`` where not given.
    step : {"published", "eq10", "exact"}, default="published"
    tied_output : bool, default=False
        Take the bases for the way back as well. Otherwise it is a matrix of its own, which a single head of full width
        does without in "published" and "eq10", as in the authors' code.
    scale : {"sqrt"} or float, default="sqrt"
        Factor s before the softmax: :math:`1/\sqrt p` as in the authors' code, or a number > 0; 1 is the paper's.
    bias : bool, default=True
        Of the way back.
    causal : bool, default=False
        A token sees only itself and those before; not possible with "exact", whose rate is one of all tokens.
    dropout : float, default=0.0
        Share of attention weights (in "exact", of projected entries), and of the output, dropped in training.
    eps2 : float, default=0.5
        Squared distortion of "exact", > 0, in the squared units of the projected tokens.
    step_size : float, optional
        :math:`\gamma` > 0; where not given, 1 with "published" and 0.5 with the others.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.

    Attributes
    ----------
    projection : nn.Linear
        Weight (K p, d): the transposed bases, head by head.

    Raises
    ------
    ValueError
        An argument is out of range, or "exact" is asked to be causal.
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
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        head_dim = head_width(dim, num_heads, head_dim)
        if step not in STEPS:
            raise ValueError(f"step must be one of {STEPS}, got {step!r}")
        if not (scale == "sqrt" if isinstance(scale, str) else 0 < scale < math.inf):
            raise ValueError(f"scale must be 'sqrt' or a positive number, got {scale!r}")
        if causal and step == "exact":
            raise ValueError("causal must be False with step='exact', whose rate is one of all tokens, got True")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if not 0 < eps2 < math.inf:
            raise ValueError(f"eps2 must be positive and finite, got {eps2}")
        if step_size is not None and not 0 < step_size < math.inf:
            raise ValueError(f"step_size must be positive and finite, got {step_size}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_dim
        self.step, self.tied_output, self.causal = step, tied_output, causal
        self.scale = head_dim**-0.5 if isinstance(scale, str) else float(scale)
        self.dropout, self.eps2 = float(dropout), float(eps2)
        self.step_size = float(step_size) if step_size is not None else 1.0 if step == "published" else 0.5
        inner = num_heads * head_dim
        self.projection = empty_linear(dim, inner, False, device, dtype)
        self.output: nn.Linear | None = None
        if tied_output:
            shape = torch.empty(dim, device=device, dtype=dtype) if bias else None
            self.output_bias = None if shape is None else nn.Parameter(shape)
        else:
            self.output_bias = None
            if step == "exact" or not (num_heads == 1 and head_dim == dim):
                self.output = empty_linear(inner, dim, bias, device, dtype)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights as ``nn.Linear`` does; a tied output starts with a bias of 0."""
        fill_linear(self.projection, generator)
        if self.output is not None:
            fill_linear(self.output, generator)
        if self.output_bias is not None:
            self.output_bias.zero_()

    @property
    def bases(self) -> Tensor:
        """Bases (K, d, p) of the subspaces, as they are: not made orthonormal."""
        return self.projection.weight.unflatten(0, (self.num_heads, self.head_dim)).mT

    def project(self, x: Float[Tensor, "*batch t d"]) -> Float[Tensor, "*batch K t p"]:
        """Return each token's coordinates along each subspace."""
        return self.projection(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(-2, -3)

    def forward(
        self, x: Float[Tensor, "*batch t d"], mask: Bool[Tensor, "*batch t"] | None = None
    ) -> Float[Tensor, "*batch t d"]:
        """Return what is to be added to the tokens; 0 for those where ``mask``, true for real tokens, is false."""
        check_tokens(x, self.dim, mask)
        w = self.project(x)
        moved = self._rate_step(w, mask) if self.step == "exact" else self._attend(w, mask)
        moved = self._back(moved.transpose(-2, -3).flatten(-2))
        if self.step == "eq10":
            moved = moved - x
        if self.step_size != 1:
            moved = self.step_size * moved
        moved = F.dropout(moved, self.dropout, self.training) if self.dropout else moved
        return moved if mask is None else moved.masked_fill(~mask[..., None], 0.0)

    def attention_map(
        self, x: Float[Tensor, "*batch t d"], mask: Bool[Tensor, "*batch t"] | None = None
    ) -> Float[Tensor, "*batch K t t"]:
        """Return the attention weights, rows summing to 1; with "exact", those that "published" would have."""
        check_tokens(x, self.dim, mask)
        w = self.project(x)
        logits = self.scale * (w @ w.mT)
        allowed = self._allowed(x.shape[-2], mask, x.device)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        return logits.softmax(dim=-1)

    def _allowed(self, t: int, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """Which token sees which, broadcast to (*batch, K, t, t); every token sees itself, so that no row is empty."""
        causal = torch.ones(t, t, dtype=torch.bool, device=device).tril() if self.causal else None
        if mask is None:
            return causal
        seen = mask[..., None, None, :] | torch.eye(t, dtype=torch.bool, device=device)
        return seen if causal is None else seen & causal

    def _attend(self, w: Tensor, mask: Tensor | None) -> Tensor:
        drop = self.dropout if self.training else 0.0
        if mask is None:
            return F.scaled_dot_product_attention(w, w, w, dropout_p=drop, is_causal=self.causal, scale=self.scale)
        allowed = self._allowed(w.shape[-2], mask, w.device)
        return F.scaled_dot_product_attention(w, w, w, attn_mask=allowed, dropout_p=drop, scale=self.scale)

    def _rate_step(self, w: Tensor, mask: Tensor | None) -> Tensor:
        """Return -(I + beta W W')^-1 W for every head, rows being tokens, in float32 or wider."""
        t, p = w.shape[-2:]
        rows = w.to(torch.promote_types(w.dtype, torch.float32))
        beta = p / (t * self.eps2)
        grow: Tensor | float = 1.0
        if mask is not None:
            # Of fewer tokens each weighs more in beta; rows scaled by the root of that say the same.
            grow = (t / mask.sum(-1).clamp_min(1)).to(rows.dtype).sqrt()[..., None, None, None]
            rows = rows.masked_fill(~mask[..., None, :, None], 0.0) * grow
        with without_autocast(w):
            step = coding_rate_gradient(rows, math.sqrt(self.eps2)) / (-beta * grow)
        return F.dropout(step.to(w.dtype), self.dropout, self.training)

    def _back(self, heads: Tensor) -> Tensor:
        if self.tied_output:
            return F.linear(heads, self.projection.weight.mT, self.output_bias)
        return heads if self.output is None else self.output(heads)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, step={self.step!r}"


def check_tokens(x: Tensor, dim: int, mask: Tensor | None = None) -> None:
    """Refuse what are no tokens (*batch, t, dim), one or more, or a mask that is not theirs."""
    if x.ndim < 2:
        raise ValueError(f"x must be (*batch, t, {dim}), got shape {tuple(x.shape)}")
    if x.shape[-1] != dim:
        raise ValueError(f"x must have width {dim}, got shape {tuple(x.shape)}")
    if x.shape[-2] == 0:
        raise ValueError(f"x must hold at least one token, got shape {tuple(x.shape)}")
    if mask is None:
        return
    own = x.shape[:-1]
    # One mask may serve several items of a batch.
    fits = 1 <= mask.ndim <= len(own) and mask.shape[-1] == own[-1]
    fits = fits and all(m in (1, n) for m, n in zip(mask.shape[::-1], own[::-1], strict=False))
    if not fits or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be {tuple(own)}, true for real tokens, of bool, got {tuple(mask.shape)} of {mask.dtype}"
        )


def head_width(dim: int, num_heads: int, head_dim: int | None) -> int:
    """Return the width of a head: as given, or an equal share of ``dim``."""
    if dim < 1 or num_heads < 1:
        raise ValueError(f"dim and num_heads must be at least 1, got {dim} and {num_heads}")
    if head_dim is None:
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim={dim} where head_dim is not given, got {num_heads}")
        return dim // num_heads
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    return head_dim
