"""How far rotations are from one another, losses made of it, uniform rotations, and where a path of them tears."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from polyspan.linalg import random_orthogonal
from polyspan.linalg._namespace import detached, is_torch, namespace, widen

from . import rotation
from ._rotation_angles import angle
from ._rotation_maps import length, native
from .rotation import _quaternion_matrix, axis_angle_to_matrix

Reduction = Literal["mean", "sum", "none"]
REPRESENTATIONS = ("quaternion", "axis_angle", "euler", "rotation5d", "rotation6d", "rotation9d")


def geodesic_distance(R: Any, S: Any) -> Float[Any, "*b"]:
    r"""Angle, in radians, of the turn from R to S; for n > 3 the length :math:`\sqrt{\sum\theta_k^2}` over planes.

    For n = 3 :math:`2\arcsin(|R-S|_F/2\sqrt2)`, within 4° of half turns :math:`\pi-\arcsin(|\omega|/2)` with ω the axis
    in the skew part of R'S. It is accurate to rounding from 0 on, where the arc cosine of the trace loses half of the
    digits; towards half turns what R and S are off rotations counts up to 32 times, about 5e-6 in float32. For n > 3
    derivatives are those of the angles of the rotation nearest to R'S. Meaningful for rotations only.

    The gradient has length 1 along rotations. First and second derivatives are true, at repeated angles as well, and 0
    at equality, where none is defined (that of the square, in :func:`geodesic_loss`, is true there). At half turns the
    distance has a kink; planes that turn by half a turn, to rounding, count as constant. Where two planes of n > 3 come
    near to half turns together, second derivatives grow beyond bounds. Third ones are refused for n > 3.

    Parameters
    ----------
    R, S : arrays of shape (*b, n, n)
        Leading dimensions broadcast; n >= 2.
    """
    R, S, narrow = _pair(R, S)
    return narrow(angle(R, S))


def chordal_distance(R: Any, S: Any) -> Float[Any, "*b"]:
    r"""Frobenius norm of R - S, which is :math:`2\sqrt2\,\sin(\theta/2)` for n = 3; its gradient is 0 at equality.

    Parameters as in :func:`geodesic_distance`.
    """
    R, S, narrow = _pair(R, S)
    D = R - S
    return narrow(length(namespace(D).reshape(D, (*D.shape[:-2], -1))))


def geodesic_loss(predicted: Any, target: Any, *, squared: bool = False, reduction: Reduction = "mean") -> Any:
    """Angles between predicted and target rotations (*b, n, n), or their squares, in radians, averaged.

    The plain angle pulls as hard on small errors as on large ones, and does not settle without a falling learning rate;
    the square does, and is smooth where rotations are equal.

    Parameters
    ----------
    squared : bool, default=False
    reduction : {"mean", "sum", "none"}
    """
    R, S, narrow = _pair(predicted, target)
    return _reduced(narrow(angle(R, S, squared=squared)), reduction)


def chordal_loss(predicted: Any, target: Any, *, reduction: Reduction = "mean") -> Any:
    r"""Squared Frobenius norm of the difference, :math:`8\sin^2(\theta/2)` for n = 3, averaged; smooth everywhere.

    Defined, and polynomial, for all matrices. Its pull vanishes at half turns, where the error is greatest.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}
    """
    R, S, narrow = _pair(predicted, target)
    xp, gap = namespace(R), R - S
    if reduction not in ("mean", "sum"):
        return _reduced(narrow(xp.sum(gap * gap, axis=(-2, -1))), reduction)
    # One sum over everything: sums over nine numbers at a time are slow.
    total = xp.sum(gap * gap)
    return narrow(total / math.prod(gap.shape[:-2]) if reduction == "mean" else total)


def random_rotation(
    n: int = 3,
    *,
    rng: Any,
    batch: tuple[int, ...] = (),
    max_angle: float | None = None,
    dtype: Any = None,
    device: Any = None,
) -> Any:
    """Draw rotations (*batch, n, n) uniformly: Haar measure, or with ``max_angle`` the part of it near the identity.

    Parameters
    ----------
    n : int, default=3
        At least 2.
    rng : numpy.random.Generator or torch.Generator
        Its kind decides the kind of the result.
    max_angle : float, optional
        Only turns by at most this many radians, in (0, pi]; n = 3 only.
    dtype, device : optional
        As in :func:`polyspan.linalg.random_orthogonal`, which draws for n other than 3.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    if max_angle is not None and (n != 3 or not 0 < max_angle <= math.pi):
        raise ValueError(f"max_angle must be in (0, pi] and needs n=3, got {max_angle} with n={n}")
    if n != 3:
        return random_orthogonal(n, rng=rng, batch=batch, special=True, dtype=dtype, device=device)
    if isinstance(rng, np.random.Generator):
        normal, uniform = rng.standard_normal((*batch, 4)), rng.random(batch)
    elif type(rng).__module__.startswith("torch"):
        import torch

        normal = torch.randn((*batch, 4), generator=rng, device=rng.device, dtype=torch.float64)
        uniform = torch.rand(batch, generator=rng, device=rng.device, dtype=torch.float64)
    else:
        raise TypeError(f"rng must be a numpy.random.Generator or a torch.Generator, got {type(rng).__name__}")
    if max_angle is None:
        R = _quaternion_matrix(normal / length(normal)[..., None])
    else:
        axis = normal[..., :3] / length(normal[..., :3])[..., None]
        R = axis_angle_to_matrix(_angle_of_share(uniform, max_angle)[..., None] * axis)
    if isinstance(R, np.ndarray):
        return R.astype(np.float64 if dtype is None else dtype)
    import torch

    return R.to(rng.device if device is None else device, torch.get_default_dtype() if dtype is None else dtype)


class RotationErrors(NamedTuple):
    """Errors of predicted rotations: degrees, and shares of rows in [0, 1]."""

    mean: float
    median: float
    p99: float
    max: float
    share_above_30: float
    share_above_90: float


def rotation_errors(predicted: Any, target: Any) -> RotationErrors:
    """Summarise the angles between predicted and target rotations (*b, n, n); look at ``max`` before ``mean``.

    Raises
    ------
    ValueError
        There are no rotations, or one is not finite.
    """
    angles = detached(geodesic_distance(predicted, target))
    degrees = np.rad2deg(np.asarray(angles.cpu().double() if is_torch(angles) else angles, dtype=np.float64)).ravel()
    if not len(degrees):
        raise ValueError("predicted and target must hold at least one rotation, got none")
    wrong = np.flatnonzero(~np.isfinite(degrees))
    if len(wrong):
        raise ValueError(
            f"predicted and target must be finite, got NaN or infinity in {len(wrong)} rows: {wrong[:5].tolist()}"
            + (" ..." if len(wrong) > 5 else "")
        )
    return RotationErrors(
        float(degrees.mean()),
        float(np.median(degrees)),
        float(np.quantile(degrees, 0.99)),
        float(degrees.max()),
        float(np.mean(degrees > 30)),
        float(np.mean(degrees > 90)),
    )


def continuity_breaks(path: Any, representation: str, *, factor: float = 10.0, **options: Any) -> list[int]:
    """Find the steps of a path of rotations at which its numbers jump although the rotations do not.

    A step breaks where the numbers move more than ``factor`` times as far, per radian turned, as in the median step.
    What breaks here is what a network has to learn as a cliff; "rotation6d" and "rotation9d" never do.

    Parameters
    ----------
    path : array of shape (n, 3, 3)
        Consecutive rotations, close enough that a turn between two is small.
    representation : {"quaternion", "axis_angle", "euler", "rotation5d", "rotation6d", "rotation9d"}
    factor : float, default=10.0
    **options :
        Of ``matrix_to_<representation>``: ``order``, ``sequence``, ``convention``.

    Returns
    -------
    list of int
        Every i for which the step from row i to row i + 1 breaks.
    """
    if representation not in REPRESENTATIONS:
        raise ValueError(f"representation must be one of {REPRESENTATIONS}, got {representation!r}")
    namespace(path)
    if path.ndim != 3:
        raise ValueError(f"path must be (n, 3, 3), got shape {tuple(path.shape)}")
    numbers = getattr(rotation, f"matrix_to_{representation}")(path, **options)
    moved, turned = length(numbers[1:] - numbers[:-1]), geodesic_distance(path[:-1], path[1:])
    still = [detached(part) for part in (moved, turned)]
    moved, turned = (np.asarray(p.cpu() if is_torch(p) else p, dtype=np.float64) for p in still)
    if not len(moved):
        return []
    # Repeated rotations turn by rounding noise; it must not count as a steep step.
    rate = moved / np.maximum(turned, 1e-3 * max(turned.max(), 1e-300))
    return [int(i) for i in np.flatnonzero(rate > factor * np.median(rate[turned > 0]))] if turned.any() else []


def _pair(R: Any, S: Any) -> tuple[Any, Any, Any]:
    """Widen two batches of square matrices of one size."""
    xp = namespace(R, S)
    if R.ndim < 2 or S.ndim < 2 or R.shape[-1] < 2 or not (R.shape[-1] == R.shape[-2] == S.shape[-1] == S.shape[-2]):
        raise ValueError(
            f"expected two batches (*b, n, n) of square matrices, got shapes {tuple(R.shape)} and {tuple(S.shape)}"
        )
    R, S = native(R), native(S)
    if R.dtype == S.dtype and R.dtype in (xp.float32, xp.float64):
        return R, S, lambda y: y
    (a, narrow), (b, other) = widen(R), widen(S)
    wide = xp.result_type(a, b)
    return xp.astype(a, wide), xp.astype(b, wide), narrow if a.dtype == wide else other


def _reduced(values: Any, reduction: str) -> Any:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if reduction == "none":
        return values
    return namespace(values).mean(values) if reduction == "mean" else namespace(values).sum(values)


def _angle_of_share(share: Any, most: float) -> Any:
    """Invert the share of rotations within an angle t, (t - sin t) / (most - sin most), by bisection."""
    xp = namespace(share)
    goal = share * (most - math.sin(most))
    low, high = xp.zeros_like(share), xp.full_like(share, most)
    for _ in range(53):
        middle = (low + high) / 2
        short = middle - xp.sin(middle) < goal
        low, high = xp.where(short, middle, low), xp.where(short, high, middle)
    return (low + high) / 2
