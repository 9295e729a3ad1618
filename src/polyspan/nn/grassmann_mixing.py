"""Mix the tokens of a sequence in linear time, without attention: pairs of tokens read as planes, gated back."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ._lengths import safe_length
from ._rotation_torch import as_numpy

NORMS = ("smooth", "l2", "none")
GATES = ("concat", "none")
OFFSETS = (1, 2, 4, 8, 12, 16)
SMOOTH = 1e-4
"""Share of the product of two tokens' lengths that "smooth" adds to the length of their wedge."""
FEW = 64
"""With at most so many tokens, selecting coordinates is cheaper than laying out the antisymmetric weight."""


class MixingState(NamedTuple):
    """What a layer keeps of the past: the reduced tokens it can still pair, and which of them are real.

    ``past`` (*batch, w, r) and ``valid`` (*batch, w) bool, w being the largest offset: its size does not depend on how
    much was read.
    """

    past: Tensor
    valid: Tensor


def check_offsets(offsets: Any) -> tuple[int, ...]:
    """Return offsets as a tuple of plain integers, after looking at them."""
    found = tuple(offsets) if isinstance(offsets, Iterable) else ()
    whole = all(isinstance(o, Integral) and not isinstance(o, bool) and o >= 1 for o in found)
    if not found or not whole or len(set(found)) < len(found):
        raise ValueError(f"offsets must be distinct integers of at least 1, one or more, got {offsets}")
    return tuple(int(o) for o in found)


def check_dropout(dropout: float | int) -> None:
    """Refuse a share that leaves nothing, or that is none."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")


def check_tokens(x: Tensor, width: int) -> None:
    """Refuse what is no sequence of tokens of this width."""
    if x.ndim < 2:
        raise ValueError(f"x must be (*batch, t, {width}), got shape {tuple(x.shape)}")
    if x.shape[-1] != width:
        raise ValueError(f"x must have width {width}, got {x.shape[-1]}")


def check_mask(mask: Tensor | None, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a mask of real tokens as bool; all are where none is given."""
    if mask is None:
        return torch.ones(tuple(shape), dtype=torch.bool, device=x.device)
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"attention_mask must have shape {tuple(shape)}, one entry a token, got {tuple(mask.shape)}")
    if mask.is_floating_point():
        # Masks that are added to logits, 0 where a token is real, would be read the wrong way round.
        seen = as_numpy(mask)
        if seen is not None and (strange := seen[0][(seen[0] != 0) & (seen[0] != 1)]).size:
            raise ValueError(f"attention_mask must be 1 where a token is real and 0 elsewhere, got {strange[0]}")
    return mask.to(torch.bool)


class CausalGrassmannMixing(nn.Module):
    r"""Token mixing in the place of self-attention: each token is paired with a few earlier ones, in linear time.

    With :math:`z_t = W_r x_t + b_r \in R^r`, every earlier token at an offset :math:`\Delta` gives the plane
    :math:`\hat p = z_t\wedge z_{t-\Delta} / |z_t\wedge z_{t-\Delta}|` in Plücker coordinates,

    .. math:: g_t = \frac{1}{|W_t|}\sum_{\Delta\in W_t} (W_p\,\hat p_{t,\Delta} + b_p), \quad
        \alpha = \sigma(W_g[x_t; g_t] + b_g), \quad y_t = \mathrm{LN}(\alpha x_t + (1 - \alpha) g_t)

    over the offsets :math:`W_t` that reach a real token; :math:`g_t = 0` where none does. As the wedge is linear in
    its second vector, the mean over offsets is taken before it: one wedge and one product a token, however many
    offsets. So the weights cannot tell the offsets apart, unless ``per_offset_weight``.

    Breaks: nothing further back than the largest offset is seen, and N layers see no further than N times that, where
    attention sees all. Tokens in one direction have no plane; there "l2" has gradients up to 1e8, "smooth" has not.
    The first token, which has no past, is scaled by its gate alone. Wedges are computed in float32 where the input is
    narrower. Source: catalogue entry ``grassmann-mixing``.

    Parameters
    ----------
    d_model : int
        Width d of the tokens.
    r : int, default=32
        Reduced width, at least 2 a head.
    offsets : sequence of int, default=(1, 2, 4, 8, 12, 16)
        How many tokens back, distinct, at least 1.
    dropout : float, default=0.1
        Share of the output's entries dropped in training.
    norm : {"smooth", "l2", "none"}, default="smooth"
        What the wedge is divided by: its length and 1e-4 of the product of both tokens' lengths; its length, or 1e-8,
        as in reproductions of the paper; nothing, which is known to diverge in training.
    gate : {"concat", "none"}, default="concat"
        "none" returns the mixed part alone: for blocks whose residual is the skip.
    out_proj : bool, default=False
        A d by d matrix behind it all. Descriptions of the paper's layer have none, but the sizes told of its models
        would need one.
    causal : bool, default=True
        Otherwise tokens are paired with those as far ahead, too: for encoders and classifiers.
    num_heads : int, default=1
        Equal parts of the reduced width, each with planes of its own; divides r.
    per_offset_weight : bool, default=False
        Learn a factor for each offset (and direction) before the mean.
    layer_norm : bool, default=True
        Whether LN stands before the dropout.
    bias : bool, default=True
    generator : torch.Generator, optional
        Source of the weights, normal with deviation 0.02; torch's global one where not given.

    Attributes
    ----------
    reduction : nn.Linear
        d to r.
    plane : nn.Linear
        Plücker coordinates, head by head, to d; each head's are in the order of :func:`plucker_coordinates`.
    gating : nn.Linear or None
        2 d to d.
    reach : int
        The largest offset, in tokens.

    Raises
    ------
    ValueError
        An argument is out of range.
    """

    def __init__(
        self,
        d_model: int,
        r: int = 32,
        offsets: Sequence[int] = OFFSETS,
        dropout: float | int = 0.1,
        norm: str = "smooth",
        gate: str = "concat",
        out_proj: bool = False,
        causal: bool = True,
        bias: bool = True,
        *,
        num_heads: int = 1,
        per_offset_weight: bool = False,
        layer_norm: bool = True,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model must be at least 1, got {d_model}")
        if num_heads < 1 or r % num_heads or r // num_heads < 2:
            raise ValueError(f"r must be at least 2 a head and a multiple of num_heads={num_heads}, got {r}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        if gate not in GATES:
            raise ValueError(f"gate must be one of {GATES}, got {gate!r}")
        check_dropout(dropout)
        self.d_model, self.r, self.num_heads = d_model, r, num_heads
        self.offsets = check_offsets(offsets)
        self.reach = max(self.offsets)
        self.norm, self.gate, self.causal = norm, gate, causal
        place: dict[str, Any] = {"device": torch.get_default_device() if device is None else device, "dtype": dtype}
        head = r // num_heads

        def linear(d_in: int, d_out: int) -> nn.Linear:
            return nn.utils.skip_init(nn.Linear, d_in, d_out, bias=bias, **place)

        self.reduction = linear(d_model, r)
        self.plane = linear(num_heads * head * (head - 1) // 2, d_model)
        self.gating = linear(2 * d_model, d_model) if gate == "concat" else None
        count = len(self.offsets) * (1 if causal else 2)
        self.offset_weight = nn.Parameter(torch.empty(count, **place)) if per_offset_weight else None
        self.layer_norm = nn.LayerNorm(d_model, **place) if layer_norm else None
        self.dropout = nn.Dropout(dropout)
        self.output = linear(d_model, d_model) if out_proj else None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights again."""
        reset_linears(self, generator)
        if self.offset_weight is not None:
            self.offset_weight.fill_(1)
        if self.layer_norm is not None:
            self.layer_norm.reset_parameters()

    def init_state(self, *batch: int) -> MixingState:
        """Return the state before the first token, for sequences in a batch of the given size (none, one or more)."""
        weight = self.reduction.weight
        past = torch.zeros(*batch, self.reach, self.r, device=weight.device, dtype=weight.dtype)
        return MixingState(past, torch.zeros(*batch, self.reach, dtype=torch.bool, device=weight.device))

    def forward(
        self, x: Float[Tensor, "*batch t d"], attention_mask: Tensor | None = None, state: MixingState | None = None
    ) -> Float[Tensor, "*batch t d"] | tuple[Float[Tensor, "*batch t d"], MixingState]:
        """Mix tokens (*batch, t, d); with a state, go on from it, and return the state after the last token, too.

        Parameters
        ----------
        x : Tensor of shape (*batch, t, d)
        attention_mask : Tensor of shape (*batch, t), optional
            True or 1 where a token is real. Others are not paired, and what comes out at their places means nothing.
        state : MixingState, optional
            From :meth:`init_state`, or from the call before.

        Raises
        ------
        ValueError
            A shape does not fit, or a state is given and the layer is not causal.
        """
        check_tokens(x, self.d_model)
        if state is not None and not self.causal:
            raise ValueError("state must be None where causal is False, got a state")
        t = x.shape[-2]
        if state is None and 1 < t <= min(self.offsets) and not torch.compiler.is_compiling():
            warnings.warn(
                f"no offset reaches within {t} tokens, the smallest is {min(self.offsets)}: nothing is mixed",
                stacklevel=2,
            )
        z = self.reduction(x)
        real = check_mask(attention_mask, x, x.shape[:-1])
        ahead = 0 if self.causal else self.reach
        if state is None:
            z_all = F.pad(z, (0, 0, self.reach, ahead))
            real_all = F.pad(real, (self.reach, ahead))
        else:
            expected = (*x.shape[:-2], self.reach, self.r)
            if state.past.shape != expected:
                raise ValueError(f"state must hold a past of shape {expected}, got {tuple(state.past.shape)}")
            if state.valid.shape != expected[:-1]:
                raise ValueError(f"state must mark a past of shape {expected[:-1]}, got {tuple(state.valid.shape)}")
            z_all = torch.cat([state.past.to(z.dtype), z], dim=-2)
            real_all = torch.cat([state.valid, real], dim=-1)
        g = self._mixed(z, z_all, real_all)
        y = g
        if self.gating is not None:
            alpha = torch.sigmoid(self.gating(torch.cat([x, g.to(x.dtype)], dim=-1)))
            y = g + alpha * (x - g)
        if self.layer_norm is not None:
            y = self.layer_norm(y)
        y = self.dropout(y)
        if self.output is not None:
            y = self.output(y)
        if state is None:
            return y
        return y, MixingState(z_all[..., t:, :], real_all[..., t:])

    def _mixed(self, z: Tensor, z_all: Tensor, real_all: Tensor) -> Tensor:
        """Return the mean over offsets of the projected planes, (*batch, t, d)."""
        t = z.shape[-2]
        wide = torch.promote_types(z.dtype, torch.float32)
        starts = [self.reach - o for o in self.offsets]
        if not self.causal:
            starts += [self.reach + o for o in self.offsets]
        others = torch.stack([z_all[..., s : s + t, :] for s in starts], dim=-3).to(wide)
        others = others.unflatten(-1, (self.num_heads, -1))
        real = torch.stack([real_all[..., s : s + t] for s in starts], dim=-2)
        count = real.sum(dim=-2)
        token = z.to(wide).unflatten(-1, (self.num_heads, -1))
        length = safe_length(token)
        unit = token / torch.where(length > 0, length, 1)
        along, lengths = unit.unsqueeze(-4), length.unsqueeze(-4)
        # What of the other token is orthogonal to this one: the length of the wedge by the Gram determinant would
        # cancel where tokens are nearly parallel.
        across = others - (others * along).sum(dim=-1, keepdim=True) * along
        if self.norm == "smooth":
            size = safe_length(others)
            divisor = safe_length(across) + SMOOTH * size
            factor = 1 / torch.where(size > 0, divisor, 1)
        elif self.norm == "l2":
            wedge = lengths * safe_length(across)
            factor = lengths / wedge.clamp(min=1e-8)
        else:
            factor = lengths.expand(*others.shape[:-1], 1)
        share = real / count.clamp(min=1).to(wide).unsqueeze(-2)
        if self.offset_weight is not None:
            share = share * self.offset_weight.to(wide).unsqueeze(-1)
        mean = (across * (factor * share[..., None, None])).sum(dim=-4)
        return self._project(unit, mean) * (count > 0).unsqueeze(-1)

    def _project(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the projection of the wedge of two vectors (*batch, t, heads, r / heads), (*batch, t, d)."""
        head = a.shape[-1]
        weight, bias = self.plane.weight, self.plane.bias
        i, j = torch.triu_indices(head, head, 1, device=a.device)
        if math.prod(a.shape[:-2]) <= FEW:
            p = a[..., i] * b[..., j] - a[..., j] * b[..., i]
            return F.linear(p.flatten(-2).to(weight.dtype), weight, bias)
        # One product with the weight laid out as antisymmetric matrices: selecting coordinates has a slow gradient.
        upper = weight.new_zeros(self.d_model, self.num_heads, head, head)
        upper[..., i, j] = weight.unflatten(-1, (self.num_heads, -1))
        outer = a.unsqueeze(-1) * b.unsqueeze(-2)
        return F.linear(outer.flatten(-3).to(weight.dtype), (upper - upper.mT).flatten(1), bias)

    def extra_repr(self) -> str:
        """Say what the layer is made of."""
        return f"{self.d_model}, r={self.r}, offsets={self.offsets}, norm={self.norm}, causal={self.causal}"


@torch.no_grad()
def reset_linears(module: nn.Module, generator: torch.Generator | None) -> None:
    """Draw all linear maps and embeddings of a module from a normal of deviation 0.02; biases are zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.weight.normal_(0, 0.02, generator=generator)
        if isinstance(part, nn.Linear) and part.bias is not None:
            part.bias.zero_()


class GrassmannBlock(nn.Module):
    """One layer of a language model: mixing of tokens, then a feed-forward network of each.

    With ``norm_first``, h + Mix(LN(h)), then h + FFN(LN(h)); otherwise m = Mix(h), whose gate is the only skip, then
    LN(m + FFN(m)). Reproductions of the paper differ in this. Any module with the arguments of
    :class:`CausalGrassmannMixing` can take the place of ``mixing``. Source: catalogue entry ``grassmann-mixing``.

    Parameters
    ----------
    d_model : int
    r, offsets, dropout
        Of :class:`CausalGrassmannMixing`; the dropout is the feed-forward network's as well.
    ffn : int, optional
        Inner width of the feed-forward network; four times d_model where not given.
    norm_first : bool, default=True
    mixing : dict, optional
        Further arguments of :class:`CausalGrassmannMixing`.
    generator : torch.Generator, optional

    Attributes
    ----------
    gradient_checkpointing : bool
        Where True, training keeps the block's input alone and computes the rest again on the way back: less memory, the
        same gradients, about a third more time.
    checkpoint_function : callable
        ``(function, *arguments) -> result`` that does so; torch's without re-entry unless another is set.
    """

    gradient_checkpointing: bool = False
    checkpoint_function: Callable[..., Any] = staticmethod(partial(checkpoint, use_reentrant=False))

    def __init__(
        self,
        d_model: int,
        r: int = 32,
        offsets: Sequence[int] = OFFSETS,
        dropout: float | int = 0.1,
        *,
        ffn: int | None = None,
        norm_first: bool = True,
        mixing: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        place: dict[str, Any] = {"device": torch.get_default_device() if device is None else device, "dtype": dtype}
        ffn = 4 * d_model if ffn is None else ffn
        if ffn < 1:
            raise ValueError(f"ffn must be at least 1, got {ffn}")
        self.norm_first = norm_first
        options: dict[str, Any] = {"generator": generator, **place, **(mixing or {})}
        self.mixing: Any = CausalGrassmannMixing(d_model, r, offsets, dropout, **options)
        self.mixing_norm = nn.LayerNorm(d_model, **place) if norm_first else None
        self.ffn_norm = nn.LayerNorm(d_model, **place)
        self.ffn = nn.Sequential(
            nn.utils.skip_init(nn.Linear, d_model, ffn, **place),
            nn.GELU(),
            nn.utils.skip_init(nn.Linear, ffn, d_model, **place),
            nn.Dropout(dropout),
        )
        reset_linears(self.ffn, generator)

    def forward(
        self, x: Float[Tensor, "*batch t d"], attention_mask: Tensor | None = None, state: MixingState | None = None
    ) -> Float[Tensor, "*batch t d"] | tuple[Float[Tensor, "*batch t d"], MixingState]:
        """Pass tokens (*batch, t, d) through; arguments and result as of :class:`CausalGrassmannMixing`."""
        kept = () if state is None else tuple(state)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            found = self.checkpoint_function(self._passed, x, attention_mask, *kept)
        else:
            found = self._passed(x, attention_mask, *kept)
        return found[0] if state is None else (found[0], type(state)(*found[1:]))

    def _passed(self, x: Tensor, attention_mask: Tensor | None, *kept: Tensor) -> tuple[Tensor, ...]:
        """Return the block's tokens and the parts of the state after: tensors side by side, as a checkpoint needs."""
        h = x if self.mixing_norm is None else self.mixing_norm(x)
        found = self.mixing(h, attention_mask, MixingState(*kept) if kept else None)
        m, after = found if kept else (found, ())
        if self.norm_first:
            h = x + m
            h = h + self.ffn(self.ffn_norm(h))
        else:
            h = self.ffn_norm(m + self.ffn(m))
        return (h, *after)
