"""Low-rank orthogonal projection for the latents of a generator: a handful of directions, each with the same gain."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ._reflection_frames import check_gain, check_rank, compose, frame, start_from

INITS = ("from_weight", "random")


class LowRankOrthogonal(nn.Module):
    r"""Parametrisation that keeps a weight a multiple of a partial isometry, :math:`A = g\,U_rV_r^\top`.

    For ``torch.nn.utils.parametrize.register_parametrization(layer, "weight", LowRankOrthogonal(rank))`` on any layer
    with a matrix for a weight. The layer's own factors stay in force, such as an equalised learning rate. The weight
    that it has, or is assigned later, gives the start: its r leading singular vectors, exactly. Training then moves the
    vectors of 2r reflections, r (p + d) numbers for a weight (p, d) and no constraint; the r singular values stay equal
    and the others zero, up to rounding.

    It breaks where a reflection vector is exactly zero: the weight is well defined there, but that vector gets no
    gradient. Starts are away from it, and gradients, which are orthogonal to the vectors, do not lead there. Squared
    lengths must be within the range of float32.
    Source: catalogue entry ``householder-projector``.

    Parameters
    ----------
    rank : int, default=10
        Number r of singular values that are not zero, from 1 to the smaller side of the weight.
    gain : {"mean", "learned"} or float, default="mean"
        Those singular values g: the mean of the r leading ones of the weight that it starts from, fixed; the same as a
        parameter; or a number above 0.
    flatten : bool, default=False
        Take kernels (p, ...) of convolutions as matrices (p, d); otherwise they are refused.

    Attributes
    ----------
    signs : Tensor of shape (2, r)
        Of the columns of the out-frame and of the in-frame, -1 or 1: they do not learn.
    """

    signs: Tensor
    fixed_gain: Tensor

    def __init__(self, rank: int = 10, *, gain: str | float | int = "mean", flatten: bool = False):
        super().__init__()
        check_gain(gain)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.rank, self.gain, self.flatten = rank, gain, flatten
        self._kernel: tuple[int, ...] = ()
        self.register_buffer("signs", torch.ones(2, rank))
        self.register_buffer("fixed_gain", torch.ones(()))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the reflection vectors (p, r) and (d, r), and the gain where it learns, that start from a weight.

        Raises
        ------
        ValueError
            It is no matrix of finite floats, or has no ``rank`` singular values.
        """
        self._kernel = tuple(weight.shape[1:]) if self.flatten else ()
        matrix = weight.flatten(1) if self.flatten else weight
        start = start_from(matrix, self.rank, self.gain)
        self.signs, self.fixed_gain = start.signs, start.gain
        return (start.out, start.into, *((start.gain.clone(),) if self.gain == "learned" else ()))

    def forward(
        self, out: Float[Tensor, "*batch p r"], into: Float[Tensor, "*batch d r"], gain: Float[Tensor, ""] | None = None
    ) -> Tensor:
        """Return the weight of reflection vectors, in their dtype."""
        factor = self.fixed_gain if gain is None else gain
        A = compose(out, into, self.signs, factor).to(out.dtype)
        return A.unflatten(-1, self._kernel) if self._kernel else A

    def directions(self, into: Float[Tensor, "d r"]) -> Float[Tensor, "r d"]:
        """Return the orthonormal directions, one a row, that belong to in-vectors."""
        return (frame(into) * self.signs[1]).mT.to(into.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, gain={self.gain!r}"


class HouseholderProjector(nn.Module):
    r"""Linear layer of r equal singular values, whose r directions each move the output by the same length.

    :math:`s = g\,U_r(V_r^\top w) + b`, with orthonormal frames :math:`U_r, V_r` as products of r Householder
    reflections each. Drop-in for the ``nn.Linear`` that turns a generator's latent w into the styles of a layer: a
    step t along direction j changes the styles by t g in length, steps along different directions are orthogonal, and
    whatever is orthogonal to all r changes nothing. The weight is never formed; frames cost O((p + d) r²) a call.

    The singular values being equal, r directions are one basis of their space among all, kept apart only by how the
    rest of the network treats them; :func:`discover_directions` can turn them by the generator's Jacobian. For the
    rest see :class:`LowRankOrthogonal`, the same thing for layers of another kind.
    Source: catalogue entry ``householder-projector``.

    Parameters
    ----------
    in_features, out_features : int
        Sizes d and p.
    rank : int, default=10
        From 1 to the smaller of both.
    bias : bool, default=True
    gain : {"mean", "learned"} or float, default="mean"
        The r singular values g: the mean of the leading ones of the weight that it starts from, fixed; the same as a
        parameter; or a number above 0.
    init : {"from_weight", "random"}, default="from_weight"
        Start from the leading singular vectors of a weight as ``nn.Linear`` draws it, or, with unit mean gain, from
        random reflections. Use :meth:`from_linear` for the weight of a trained layer.
    bias_init : float, default=1.0
        Of every entry: styles multiply, and 1 is what leaves things as they are.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.

    Attributes
    ----------
    out_vectors, in_vectors : Parameter of shape (p, r) and (d, r)
        Reflection vectors as columns, of any length above 0.
    signs : Tensor of shape (2, r)
        Of the columns of both frames, -1 or 1: they do not learn.
    gain : Tensor or Parameter of shape ()
    bias : Parameter of shape (p,), or None
    """

    signs: Tensor
    gain: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 10,
        bias: bool = True,
        gain: str | float | int = "mean",
        init: str = "from_weight",
        *,
        bias_init: float | int = 1.0,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_rank(rank, out_features, in_features)
        check_gain(gain)
        if init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {init!r}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.gain_kind, self.init, self.bias_init = gain, init, bias_init
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.out_vectors = nn.Parameter(torch.empty(out_features, rank, **factory))
        self.in_vectors = nn.Parameter(torch.empty(in_features, rank, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.register_buffer("signs", torch.ones(2, rank, **factory))
        if gain == "learned":
            self.gain = nn.Parameter(torch.ones((), **factory))
        else:
            self.register_buffer("gain", torch.ones((), **factory))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the frames as ``init`` says, and set gain and bias."""
        if self.bias is not None:
            self.bias.fill_(self.bias_init)
        if self.in_vectors.is_meta:
            return
        if self.init == "random":
            for vectors in (self.out_vectors, self.in_vectors):
                vectors.normal_(std=len(vectors) ** -0.5, generator=generator)
            self.signs.fill_(1.0)
            self.gain.fill_(1.0 if isinstance(self.gain_kind, str) else self.gain_kind)
            return
        bound = 1 / math.sqrt(self.in_features)
        drawn = self.in_vectors.new_empty(self.out_features, self.in_features, dtype=torch.float32)
        self.set_weight_(drawn.uniform_(-bound, bound, generator=generator))

    @torch.no_grad()
    def set_weight_(self, weight: Float[Tensor, "p d"]) -> None:
        """Start from a weight: take its r leading singular vectors exactly, and the gain as ``gain`` says.

        Raises
        ------
        ValueError
            The shape is another, or an entry is not finite.
        """
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"weight must be of shape {(self.out_features, self.in_features)}, got {tuple(weight.shape)}"
            )
        out, into, signs, gain = start_from(weight, self.rank, self.gain_kind)
        self.out_vectors.copy_(out)
        self.in_vectors.copy_(into)
        self.signs.copy_(signs)
        self.gain.copy_(gain)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Module, rank: int = 10, gain: str | float | int = "mean") -> "HouseholderProjector":
        """Make a projector that starts from the leading directions of a trained layer, with its bias, device and dtype.

        Raises
        ------
        ValueError
            ``linear`` is no ``nn.Linear`` of floats, or its weight is not finite or too small for the rank.

        Warns
        -----
        UserWarning
            The r-th singular value is below a millionth of the first.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        weight, bias = linear.weight, linear.bias
        made = cls(
            linear.in_features, linear.out_features, rank, bias is not None, gain, device="meta", dtype=weight.dtype
        ).to_empty(device=weight.device)
        made.set_weight_(weight)
        if made.bias is not None:
            made.bias.copy_(bias)
        return made.train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """Return a plain layer of the same weight, for deployment; :meth:`from_linear` of it has that weight again."""
        weight = self.weight
        made = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=weight.dtype
        ).to_empty(device=weight.device)
        made.weight.copy_(weight)
        if self.bias is not None:
            made.bias.copy_(self.bias)
        return made.train(self.training)

    @property
    def weight(self) -> Float[Tensor, "p d"]:
        """The matrix A, formed anew at each access; differentiable."""
        return compose(self.out_vectors, self.in_vectors, self.signs, self.gain).to(self.in_vectors.dtype)

    @property
    def directions(self) -> Float[Tensor, "r d"]:
        """Orthonormal directions in the latent space, one a row."""
        return (frame(self.in_vectors) * self.signs[1]).mT.to(self.in_vectors.dtype)

    @property
    def responses(self) -> Float[Tensor, "r p"]:
        """What a unit step along each direction adds to the output: orthogonal rows of length ``gain``."""
        return (frame(self.out_vectors) * (self.gain * self.signs[0])).mT.to(self.out_vectors.dtype)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch p"]:
        """Return the outputs of rows of latents."""
        into = frame(self.in_vectors) * (self.gain * self.signs[0] * self.signs[1])
        out = frame(self.out_vectors)
        # Under autocast the products run narrow, as those of nn.Linear do; the frames never.
        return F.linear(x @ into.to(x.dtype), out.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"gain={self.gain_kind!r}, bias={self.bias is not None}"
        )
