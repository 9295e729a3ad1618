"""Principal angles between subspaces, their vectors, and the distances that are functions of them."""

import math
from typing import Any, NamedTuple

from jaxtyping import Float

from ._namespace import identity, is_torch, namespace, swap, widen

_METRICS = (
    "asimov",
    "binet-cauchy",
    "chordal",
    "fubini-study",
    "geodesic",
    "martin",
    "procrustes",
    "projection",
    "projection-frobenius",
)


class PrincipalVectors(NamedTuple):
    """Principal ``angles`` (*b, m), ascending radians, and the unit vectors between which they open.

    Column j of ``left`` (*b, d, m) lies in the first subspace, column j of ``right`` (*b, d, m) in the second.
    """

    angles: Any
    left: Any
    right: Any


def principal_angles(A: Any, B: Any) -> Float[Any, "*b m"]:
    r"""Angles between two subspaces, one for each of the m = min(k, l) dimensions, ascending, in [0, pi/2] radians.

    :math:`\theta_j = \operatorname{atan2}(\sigma_j, c_j)` with the singular values :math:`c` of :math:`A^\top B` and
    :math:`\sigma` of :math:`(I-AA^\top)B`: accurate to machine precision for tiny angles, where the arc cosine loses
    half the digits, and for right angles alike.

    The torch gradient is finite everywhere. An angle has a kink at 0 and at pi/2, and where two angles cross; there the
    gradient is one of the one-sided ones. Symmetric smooth functions of the angles do not notice the crossing.

    Parameters
    ----------
    A, B : arrays of shape (*b, d, k) and (*b, d, l)
        Bases with orthonormal columns (see :func:`orthonormal_basis`); leading dimensions broadcast. For others the
        result means nothing.

    Notes
    -----
    Source: Bjorck and Golub 1973; Knyazev and Argentati 2002.
    """
    A, B, narrow = _bases(A, B)
    xp = namespace(A)
    if A.shape[-1] < B.shape[-1]:
        A, B = B, A
    inner = swap(A) @ B
    cosines = xp.linalg.svdvals(inner)
    sines = xp.flip(xp.linalg.svdvals(B - A @ inner), axis=-1)
    return narrow(xp.atan2(sines, cosines))


def principal_vectors(A: Any, B: Any) -> PrincipalVectors:
    r"""Pairs of unit vectors, one from each subspace, that realise the principal angles.

    :math:`\langle a_i, b_j\rangle = \delta_{ij}\cos\theta_j` within orthonormal ``left`` and ``right``. Vectors are
    those of the cosines for angles above pi/4, and of the sines below, where the cosines cannot tell small angles
    apart. They are unique up to a joint sign only where the angles are distinct, and not meant to be differentiated:
    the torch gradient is infinite or NaN at repeated angles.

    Parameters
    ----------
    A, B : arrays of shape (*b, d, k) and (*b, d, l)
        Bases with orthonormal columns; leading dimensions broadcast.
    """
    A, B, narrow = _bases(A, B)
    if A.shape[-1] < B.shape[-1]:
        angles, right, left = principal_vectors(B, A)
        return PrincipalVectors(narrow(angles), narrow(left), narrow(right))
    xp = namespace(A)
    inner = swap(A) @ B
    U, cosines, Vh = xp.linalg.svd(inner, full_matrices=False)
    small = xp.astype(cosines**2 > 0.5, A.dtype)
    # Turn the columns of small angles among themselves until the sines are diagonal too. The other columns are kept
    # apart by entries above every sine, each of its own size, under the block of sines.
    order = xp.arange(2, 2 + B.shape[-1], dtype=A.dtype, **({"device": A.device} if is_torch(A) else {}))
    apart = (1 - small)[..., None, :] * order * identity(B.shape[-1], A)
    sines = ((B - A @ inner) @ swap(Vh)) * small[..., None, :]
    turn = xp.flip(swap(xp.linalg.svd(xp.concat([sines, apart], axis=-2), full_matrices=False)[2]), axis=-1)
    V = swap(Vh) @ turn
    image = inner @ V
    length = xp.linalg.vector_norm(image, axis=-2, keepdims=True)
    U = xp.where(xp.sum(image * U, axis=-2, keepdims=True) < 0, -U, U)
    U = xp.where(small[..., None, :] > 0, image / xp.where(length > 0, length, xp.ones_like(length)), U)
    return PrincipalVectors(narrow(principal_angles(A, B)), narrow(A @ U), narrow(B @ V))


def subspace_distance(A: Any, B: Any, metric: str = "geodesic") -> Float[Any, "*b"]:
    r"""Distance between two subspaces of the same dimension k, as a function of their principal angles.

    - ``"geodesic"``: :math:`\lVert\theta\rVert_2`, up to sqrt(k) pi/2.
    - ``"asimov"``: :math:`\max_j\theta_j`, up to pi/2.
    - ``"chordal"``: :math:`(\sum\sin^2\theta_j)^{1/2}`, up to sqrt(k).
    - ``"projection-frobenius"``: :math:`\lVert AA^\top-BB^\top\rVert_F`, sqrt(2) times chordal.
    - ``"projection"``: :math:`\lVert AA^\top-BB^\top\rVert_2=\max_j\sin\theta_j`, the gap, up to 1.
    - ``"procrustes"``: :math:`2(\sum\sin^2\frac{\theta_j}2)^{1/2}`, the distance of the closest bases, up to sqrt(2k).
    - ``"binet-cauchy"``: :math:`(1-\prod\cos^2\theta_j)^{1/2}`, up to 1.
    - ``"fubini-study"``: :math:`\arccos\prod\cos\theta_j`, up to pi/2.
    - ``"martin"``: :math:`(-\sum\log\cos^2\theta_j)^{1/2}`, without bound.

    All are accurate for subspaces that nearly agree, and all but ``"martin"`` (infinite at a right angle; no metric,
    as it fails the triangle inequality) have finite torch gradients everywhere, equal subspaces included. A distance
    has a kink at 0; there the gradient of ``"chordal"`` and ``"projection-frobenius"``, which need no SVD, is 0.
    ``"asimov"`` and ``"projection"`` also have kinks where the two largest angles are equal.

    Parameters
    ----------
    A, B : arrays of shape (*b, d, k)
        Bases with orthonormal columns; leading dimensions broadcast.
    metric : str
        As above; underscores do as well as hyphens.

    Notes
    -----
    Source: Edelman, Arias and Smith 1998, section 4.3; Ye and Lim 2016.
    """
    name = _metric(metric)
    A, B, narrow = _bases(A, B)
    if A.shape[-1] != B.shape[-1]:
        raise ValueError(
            f"A and B must have as many columns, got {A.shape[-1]} and {B.shape[-1]}; see principal_angles"
        )
    xp = namespace(A)
    norm = xp.linalg.vector_norm
    if name in {"chordal", "projection-frobenius"}:
        chordal = norm(B - A @ (swap(A) @ B), axis=(-2, -1))
        return narrow(chordal * math.sqrt(2) if name == "projection-frobenius" else chordal)
    angles = principal_angles(A, B)
    if name == "geodesic":
        return narrow(norm(angles, axis=-1))
    if name == "asimov":
        return narrow(angles[..., -1])
    if name == "projection":
        return narrow(xp.sin(angles[..., -1]))
    if name == "procrustes":
        return narrow(2 * norm(xp.sin(angles / 2), axis=-1))
    if name == "martin":
        square = xp.sum(xp.log1p(xp.tan(angles) ** 2), axis=-1)
        positive = square > 0
        return narrow(xp.where(positive, xp.sqrt(xp.where(positive, square, xp.ones_like(square))), square))
    # The product of cosines is the last of k + 1 spherical coordinates; the length of the others is its sine, free of
    # cancellation and with a gradient at 0.
    product, others = xp.ones_like(angles[..., 0]), []
    for j in range(angles.shape[-1]):
        others.append(product * xp.sin(angles[..., j]))
        product = product * xp.cos(angles[..., j])
    sine = norm(xp.stack(others, axis=-1), axis=-1)
    return narrow(sine if name == "binet-cauchy" else xp.atan2(sine, product))


def pairwise_subspace_distance(bases: Any, metric: str = "geodesic", *, max_bytes: int = 2**26) -> Float[Any, "C C"]:
    """Distances among C subspaces: symmetric, zero diagonal, each pair computed once by :func:`subspace_distance`.

    Parameters
    ----------
    bases : array of shape (C, d, k)
        Orthonormal columns.
    metric : str
        As in :func:`subspace_distance`.
    max_bytes : int
        Pairs are gathered in blocks whose copies of the bases stay below this (one pair at least).
    """
    xp = namespace(bases)
    if bases.ndim != 3 or bases.shape[0] == 0:
        raise ValueError(f"bases must be of shape (C, d, k) with C > 0, got {tuple(bases.shape)}")
    n, d, k = bases.shape
    options = {"device": bases.device} if is_torch(bases) else {}
    indices = xp.arange(n, **options)
    above = indices[:, None] < indices[None, :]
    rows, cols = xp.nonzero(above)
    step = max(1, max_bytes // (4 * d * k * bases.dtype.itemsize))
    blocks = [
        subspace_distance(bases[rows[i : i + step]], bases[cols[i : i + step]], metric)
        for i in range(0, rows.shape[0], step)
    ]
    wide, narrow = widen(bases[:1, 0, 0])
    flat = xp.concat([narrow(xp.zeros_like(wide)), *blocks])
    place = xp.zeros((n, n), dtype=indices.dtype, **options)
    place[rows, cols] = xp.arange(1, rows.shape[0] + 1, **options)
    return flat[place + swap(place)]


def _metric(metric: str) -> str:
    """Return the hyphenated name of a known metric."""
    name = metric.replace("_", "-")
    if name not in _METRICS:
        raise ValueError(f"metric must be one of {', '.join(_METRICS)}, got {metric!r}")
    return name


def _bases(A: Any, B: Any) -> tuple[Any, Any, Any]:
    """Check that two stacks of bases live in one space; return them widened to one dtype, with the cast back."""
    xp = namespace(A, B)
    if A.ndim < 2 or B.ndim < 2 or A.shape[-2] != B.shape[-2] or 0 in (A.shape[-1], B.shape[-1]):
        raise ValueError(f"A and B must be bases (*b, d, k) of one d, k > 0, got {tuple(A.shape)} and {tuple(B.shape)}")
    for name, basis in (("A", A), ("B", B)):
        if basis.shape[-1] > basis.shape[-2]:
            raise ValueError(f"{name} has more columns than rows, {tuple(basis.shape)}: its columns are no basis")
    dtype = xp.result_type(A, B)
    wide, narrow = widen(xp.astype(A, dtype, copy=False))
    return wide, xp.astype(B, wide.dtype, copy=False), narrow
