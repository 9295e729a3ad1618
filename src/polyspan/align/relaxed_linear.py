"""A linear layer that starts as an isometry, and what it costs a weight to leave the isometries."""

import math
from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from polyspan.linalg import orthonormal_basis


def relaxed_orthogonality(
    weight: Float[Tensor, "*batch out in"],
    lam: float | int,
    *,
    steepness: float | int = 1.0,
    relative: bool = False,
    max_slope: float | int | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Penalise a matrix for being further from an isometry than a threshold: the price of leaving the rotations.

    :math:`\sigma(\alpha (N - \lambda))\, N` with :math:`N = \lVert W W^\top - I \rVert_F`, taken over the shorter side
    of W. The gate :math:`\sigma` is soft: with a small steepness the penalty still pulls well below the threshold, with
    a large one its slope has a bump of about :math:`\alpha\lambda/4` there, which ``max_slope`` cuts. At an isometry
    the gradient is 0, not NaN. N grows with the square root of the width k: a matrix whose singular values are all
    :math:`1+\epsilon` has :math:`N \approx 2\epsilon\sqrt k`; hence ``relative``.
    Source: catalogue entry ``lambda-orthogonality``.

    Parameters
    ----------
    weight : tensor of shape (*batch, out, in)
        float16 and bfloat16 are computed in float32.
    lam : float, at least 0
        Threshold. 0 is the soft orthogonality of earlier work, N itself, at half to full weight; infinity no penalty.
    steepness : float, above 0
        The factor alpha in the gate.
    relative : bool
        Give ``lam`` in units of sqrt(min(out, in)).
    max_slope : float, optional
        Bound on the derivative by N; the value is unchanged.

    Raises
    ------
    ValueError
        ``lam`` is negative or NaN, ``steepness`` or ``max_slope`` is not positive, or ``weight`` is no matrix.
    """
    check_threshold(lam, steepness)
    if weight.ndim < 2:
        raise ValueError(f"weight must be a matrix (*batch, out, in), got shape {tuple(weight.shape)}")
    if max_slope is not None and not max_slope > 0:
        raise ValueError(f"max_slope must be positive, got {max_slope}")
    deviation = deviation_from_isometry(weight)
    if relative:
        lam = lam * math.sqrt(min(weight.shape[-2:]))
    gate = torch.sigmoid(steepness * (deviation - lam))
    penalty = gate * deviation
    if max_slope is None:
        return penalty
    slope = (gate + steepness * penalty * (1 - gate)).detach().clamp(max=max_slope)
    return penalty.detach() + slope * (deviation - deviation.detach())


def deviation_from_isometry(weight: Tensor) -> Tensor:
    """Return N, the Frobenius norm of the Gram matrix of the shorter side less the identity, (*batch)."""
    return torch.linalg.matrix_norm(_off_identity(weight))


def _off_identity(weight: Tensor) -> Tensor:
    """Return the Gram matrix of the shorter side less the identity, (*batch, k, k), in float32 or wider."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    short = wide if wide.shape[-2] <= wide.shape[-1] else wide.mT
    return short @ short.mT - torch.eye(short.shape[-2], dtype=wide.dtype, device=wide.device)


def spectral_orthogonality(
    weight: Float[Tensor, "*batch out in"],
    *,
    n_iter: int = 2,
    start: Float[Tensor, "*batch k"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Penalise the one direction in which a matrix is furthest from an isometry, found by power iteration.

    The spectral restricted isometry property (SRIP): :math:`\lVert A \rVert_2` with :math:`A = W W^\top - I` over the
    shorter side of W, estimated as :math:`\lVert A u \rVert / \lVert u \rVert` with :math:`u = A^{m-1} v` for
    ``n_iter=m`` and a random v. Never above the true norm; with the two products of the paper often well below it, as
    the gap between the largest two eigenvalues of A decides how fast it rises. The gradient is that of the estimate,
    and 0, not NaN, at an isometry. Soft orthogonality (:func:`relaxed_orthogonality` with ``lam=0``) sums over all
    directions instead.
    Source: Bansal, Chen and Wang, "Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?", 2018;
    a baseline of catalogue entry ``lambda-orthogonality``.

    Parameters
    ----------
    weight : tensor of shape (*batch, out, in)
        float16 and bfloat16 are computed in float32.
    n_iter : int, at least 1
        Products with A.
    start : tensor of shape (*batch, min(out, in)), optional
        The vector v; drawn anew at each call where not given.
    generator : torch.Generator, optional
        Source of v; torch's global one where not given.

    Raises
    ------
    ValueError
        ``weight`` is no matrix, ``n_iter`` is below 1, or ``start`` does not fit the shorter side.
    """
    if weight.ndim < 2:
        raise ValueError(f"weight must be a matrix (*batch, out, in), got shape {tuple(weight.shape)}")
    if n_iter < 1:
        raise ValueError(f"n_iter must be at least 1, got {n_iter}")
    A = _off_identity(weight)
    if start is None:
        device = A.device if generator is None else generator.device
        start = torch.randn(A.shape[:-1], generator=generator, device=device, dtype=A.dtype)
    if start.shape != A.shape[:-1]:
        raise ValueError(f"start must have shape {tuple(A.shape[:-1])}, got {tuple(start.shape)}")
    u, length = start.to(A), torch.ones(A.shape[:-2], device=A.device, dtype=A.dtype)
    for _ in range(n_iter):
        # A vector that A has put out stays zero, and so does its gradient.
        u = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
        u = (A @ u[..., None])[..., 0]
        length = torch.linalg.vector_norm(u, dim=-1)
    return length


def check_threshold(lam: Any, steepness: Any) -> None:
    """Refuse a threshold below 0 and a gate that is not steep at all."""
    if not lam >= 0:
        raise ValueError(f"lam must be at least 0, got {lam}")
    if not steepness > 0:
        raise ValueError(f"steepness must be positive, got {steepness}")


def orthogonality_penalty(
    model: nn.Module,
    lam: float | int = 0.53,
    *,
    steepness: float | int = 1.0,
    relative: bool = True,
    names: Collection[str] | None = None,
) -> Tensor:
    """Add up :func:`relaxed_orthogonality` over the linear layers of a model: a term for its training loss.

    Parameters
    ----------
    model : nn.Module
    lam, steepness, relative
        As there; ``relative`` gives every layer a threshold that suits its width.
    names : collection of str, optional
        Only these layers, as ``model.named_modules()`` calls them.

    Raises
    ------
    ValueError
        A name is no linear layer of the model, or there is none.
    """
    linear = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | RelaxedOrthogonalLinear)
    }
    chosen = list(linear) if names is None else list(names)
    unknown = [name for name in chosen if name not in linear]
    if unknown or not chosen:
        raise ValueError(f"names must be linear layers of the model, {sorted(linear)}, got {unknown or chosen}")
    parts = [relaxed_orthogonality(linear[name].weight, lam, steepness=steepness, relative=relative) for name in chosen]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


class RelaxedOrthogonalLinear(nn.Module):
    r"""Linear layer that starts as an isometry and says what it costs to leave it: add :meth:`penalty` to the loss.

    Drop-in for ``nn.Linear``, with the same names in its ``state_dict``. Nothing is enforced: without the penalty in
    the loss it is a plain linear layer.
    Source: catalogue entry ``lambda-orthogonality``.

    Parameters
    ----------
    in_features, out_features : int
    lam : float, default=0.53
        Threshold, see :func:`relaxed_orthogonality`; with ``relative`` in units of sqrt(min(in, out)).
    relative : bool, default=True
    steepness : float, default=1.0
    bias : bool, default=True
        Starts at zero.
    generator : torch.Generator, optional
        Source of the first weight; torch's global one where not given.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        lam: float | int = 0.53,
        *,
        relative: bool = True,
        steepness: float | int = 1.0,
        bias: bool = True,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if min(in_features, out_features) < 1:
            raise ValueError(f"in_features and out_features must be at least 1, got {in_features} and {out_features}")
        check_threshold(lam, steepness)
        self.in_features, self.out_features = in_features, out_features
        self.lam, self.relative, self.steepness = float(lam), relative, float(steepness)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw a random isometry; where ``out_features`` is the smaller side, its rows are orthonormal."""
        if self.weight.is_meta:
            return
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        device = self.weight.device if generator is None else generator.device
        tall = sorted(self.weight.shape, reverse=True)
        Q = orthonormal_basis(torch.randn(tall, generator=generator, device=device, dtype=wide))
        self.weight.copy_(Q if self.out_features >= self.in_features else Q.mT)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return ``x @ weight.T + bias``."""
        return F.linear(x, self.weight, self.bias)

    def penalty(self) -> Float[Tensor, ""]:
        """Return the penalty of the present weight, a scalar with a gradient."""
        return relaxed_orthogonality(self.weight, self.lam, steepness=self.steepness, relative=self.relative)

    @torch.no_grad()
    def deviation(self) -> float:
        """Return N, the distance of the Gram matrix from the identity; compare it with the threshold."""
        return float(deviation_from_isometry(self.weight))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, lam={self.lam:g}"
