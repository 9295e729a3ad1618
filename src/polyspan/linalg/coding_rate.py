"""Coding rate: the number of nats that a set of vectors takes, and how much of it classes explain."""

import math
from typing import Any

from jaxtyping import Float, Num

from ._namespace import detached, identity, namespace, swap, widen


def coding_rate(Z: Num[Any, "*b n d"], eps: float | int = 0.5) -> Float[Any, "*b"]:
    r"""Rate of n rows coded up to an error of ``eps``.

    :math:`R(Z) = \tfrac12\log\det(I + \tfrac{d}{n\epsilon^2} Z^\top Z)`.
    Nats, >= 0; 0 for zero rows; growing with the volume the rows span. The smaller of the d x d and the n x n form is
    factored by Cholesky, in float32 or wider. Breaks, with LinAlgError, where :math:`d\lVert Z\rVert_2^2/(n\epsilon^2)`
    exceeds the inverse of machine precision and Z has not full rank.

    The rate within k subspaces is the sum of ``coding_rate(Z @ U, eps)`` over bases U (C, d, k).

    Parameters
    ----------
    Z : array of shape (*b, n, d)
        Usually unit rows; NumPy or torch.
    eps : float
        Distortion (not its square), > 0, in the units of Z.

    Notes
    -----
    Source: Ma et al. 2007; catalogue entries ``crate`` and ``mlc``.
    """
    wide, narrow = _rows(Z, eps)
    return narrow(_log_det(_smaller_gram(wide), _gain(wide, eps)))


def coding_rate_gradient(Z: Num[Any, "*b n d"], eps: float | int = 0.5) -> Float[Any, "*b n d"]:
    r"""Gradient of :func:`coding_rate` in closed form.

    :math:`\alpha Z(I + \alpha Z^\top Z)^{-1}` with :math:`\alpha = d/(n\epsilon^2)`. Solved on the smaller side.
    In torch it may be differentiated in turn.

    Parameters
    ----------
    Z : array of shape (*b, n, d)
    eps : float
        As in :func:`coding_rate`.
    """
    wide, narrow = _rows(Z, eps)
    gain, gram = _gain(wide, eps), _smaller_gram(wide)
    inverse = namespace(wide).linalg.inv(identity(gram.shape[-1], wide) + gain * gram)
    return narrow(gain * (inverse @ wide if wide.shape[-2] < wide.shape[-1] else wide @ inverse))


def class_coding_rate(Z: Any, memberships: Any, eps: float | int = 0.5, *, max_bytes: int = 2**27) -> Float[Any, "..."]:
    r"""Rate left when rows are coded class by class.

    :math:`R_c = \sum_c \tfrac{m_c}{2n}\log\det(I + \tfrac{d}{m_c\epsilon^2} Z^\top \mathrm{diag}(\Gamma_c) Z)`.

    :math:`\Gamma_c` is column c of the memberships and :math:`m_c` its sum: 0 and 1 for hard labels, anything
    non-negative for soft ones, and an n x n doubly stochastic matrix where every row is the centre of its own class. An
    empty column counts 0; there the rate has no gradient and the torch gradient is 0.

    Parameters
    ----------
    Z : array of shape (*b, n, d)
    memberships : array of shape (n, C) or (*b, n, C)
        Non-negative; leading dimensions broadcast with those of Z.
    eps : float
        As in :func:`coding_rate`.
    max_bytes : int
        Classes are taken in blocks whose C matrices, of the smaller of the sizes d and n, stay below this. Under
        autograd the graph keeps all of them.

    Notes
    -----
    Source: Yu et al. 2020; catalogue entry ``mlc``.
    """
    namespace(Z, memberships)
    wide, narrow = _rows(Z, eps)
    xp = namespace(wide)
    if memberships.ndim < 2 or memberships.shape[-2] != wide.shape[-2]:
        raise ValueError(
            "memberships must be (*b, n, C) with the n of Z (*b, n, d), "
            f"got {tuple(memberships.shape)} and {tuple(Z.shape)}"
        )
    if bool(xp.any(memberships < 0)):
        raise ValueError(
            f"memberships must be non-negative, got a smallest value of {float(xp.min(detached(memberships)))}"
        )
    columns = swap(xp.astype(memberships, wide.dtype, copy=False))
    *_, n, d = wide.shape
    kernel = wide @ swap(wide) if n < d else None
    # With many classes one product on the n outer products of rows is cheapest; with few, these would be the larger.
    outer = None
    if kernel is None and columns.shape[-2] >= d:
        outer = xp.reshape(wide[..., :, None] * wide[..., None, :], (*wide.shape[:-1], d * d))
    entries = 3 * min(n, d) ** 2 + (n * d if kernel is None and outer is None else 0)
    step = max(1, max_bytes // max(1, math.prod(wide.shape[:-2]) * entries * wide.dtype.itemsize))
    total = 0
    for start in range(0, columns.shape[-2], step):
        weight = columns[..., start : start + step, :]
        mass = xp.sum(weight, axis=-1)
        gain = d / (eps**2 * xp.where(mass > 0, mass, xp.ones_like(mass)))
        if outer is not None:
            gram = weight @ outer
            rates = _log_det(xp.reshape(gram, (*gram.shape[:-1], d, d)), gain)
        elif kernel is None:
            scaled = weight[..., :, :, None] * wide[..., None, :, :]
            rates = _log_det(swap(wide)[..., None, :, :] @ scaled, gain)
        else:
            # No square root of the weights, whose derivative at 0 would be infinite; so the matrix is not symmetric.
            shifted = identity(n, wide) + gain[..., None, None] * weight[..., :, :, None] * kernel[..., None, :, :]
            rates = xp.linalg.slogdet(shifted)[1] / 2
        total = total + xp.sum(mass * rates, axis=-1) / n
    return narrow(total)


def rate_reduction(Z: Any, memberships: Any, eps: float | int = 0.5) -> Float[Any, "..."]:
    r"""What knowing the classes saves, in nats: :math:`\Delta R = R(Z) - R_c(Z,\Gamma)`.

    Large when classes fill subspaces of their own that together fill the space. Non-negative where every row of the
    memberships sums to 1. Arguments as in :func:`class_coding_rate`.

    Notes
    -----
    Source: Yu et al. 2020; catalogue entry ``mlc``.
    """
    return coding_rate(Z, eps) - class_coding_rate(Z, memberships, eps)


def _rows(Z: Any, eps: float | int) -> tuple[Any, Any]:
    """Widen ``Z`` after checking it and the distortion."""
    namespace(Z)
    if Z.ndim < 2 or 0 in Z.shape[-2:]:
        raise ValueError(f"Z must hold non-empty matrices (*b, n, d), got shape {tuple(Z.shape)}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    return widen(Z)


def _gain(Z: Any, eps: float | int) -> float:
    """Return d / (n eps^2)."""
    return Z.shape[-1] / (Z.shape[-2] * eps**2)


def _smaller_gram(Z: Any) -> Any:
    """Return Z'Z or ZZ', whichever is smaller: their non-zero eigenvalues are the same."""
    return Z @ swap(Z) if Z.shape[-2] < Z.shape[-1] else swap(Z) @ Z


def _log_det(gram: Any, gain: Any) -> Any:
    """Return half the log-determinant of ``I + gain * gram`` by Cholesky."""
    xp = namespace(gram)
    gain = gain if isinstance(gain, float) else gain[..., None, None]
    factor = xp.linalg.cholesky(identity(gram.shape[-1], gram) + gain * gram)
    return xp.sum(xp.log(xp.linalg.diagonal(factor)), axis=-1)
