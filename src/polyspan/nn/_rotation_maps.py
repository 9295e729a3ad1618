"""The two maps from free vectors to rotations, Gram-Schmidt and nearest matrix, safe where they are not defined.

``look`` says whether values may decide what is computed, which spares work: not inside vmap or captured graphs.
"""

from typing import Any

import numpy as np

from polyspan.linalg import nearest_rotation
from polyspan.linalg._namespace import detached, identity, is_torch, namespace, swap

WELL_APART = 1e-4


def dot(u: Any, v: Any) -> Any:
    """Inner products along the last axis; in torch neither a sum over three numbers nor its own function is fast."""
    if is_torch(u):
        import torch

        return torch.einsum("...i,...i->...", u, v)
    return namespace(u, v).vecdot(u, v)


def length(v: Any) -> Any:
    """Euclidean length along the last axis, with gradient 0 at 0."""
    xp, square = namespace(v), dot(v, v)
    zero = square == 0
    return xp.where(zero, square, xp.sqrt(xp.where(zero, xp.ones_like(square), square)))


def unit(v: Any, instead: Any) -> tuple[Any, Any]:
    """Directions of ``v``, and where it has none: there stand the unit vectors ``instead``, with gradient 0."""
    scaled, lost = _near_one(v, instead)
    return scaled / namespace(v).sqrt(dot(scaled, scaled))[..., None], lost


def _near_one(v: Any, instead: Any) -> tuple[Any, Any]:
    """Divide by the largest entry, a constant that cancels, so that squares neither overflow nor vanish."""
    xp = namespace(v)
    size = xp.max(xp.abs(detached(v)), axis=-1, keepdims=True)
    lost = size < xp.finfo(v.dtype).tiny
    return xp.where(lost, instead, v / xp.where(lost, xp.ones_like(size), size)), lost[..., 0]


def one_hot(index: Any, like: Any, size: int) -> Any:
    """Rows of the identity, by comparison: indexing with a tensor does not go together with vmap."""
    xp = namespace(like)
    options = {"device": like.device} if is_torch(like) else {}
    return xp.astype(xp.arange(size, **options) == index[..., None], like.dtype)


def least_aligned(v: Any) -> Any:
    """Unit vector of the coordinate axis along which ``v`` has its smallest entry, the first of equals."""
    xp = namespace(v)
    return one_hot(xp.argmin(xp.abs(detached(v)), axis=-1), v, v.shape[-1])


def two_columns(a: Any, b: Any, look: bool) -> tuple[Any, Any]:
    """Rotation whose first column is along ``a`` and whose second is ``b`` made orthogonal, and where they are lost."""
    xp = namespace(a)
    lost = None
    if not look or not _plain(detached(a), detached(b)):
        a, no_first = _near_one(a, least_aligned(b))
        b, no_second = _near_one(b, xp.zeros_like(b))
        x, y = detached(a), detached(b)
        x = x / xp.sqrt(dot(x, x))[..., None]
        for _ in range(2):
            y = y - dot(x, y)[..., None] * x
        no_second = no_second | (dot(y, y) <= (8 * xp.finfo(y.dtype).eps) ** 2)
        b = xp.where(no_second[..., None], least_aligned(x), b)
        lost = no_first | no_second
    R = _frame(detached(a), detached(b))
    if is_torch(a):
        from ._rotation_torch import Frame

        R = Frame.apply(a, b, R)
    return R, xp.zeros(a.shape[:-1], dtype=xp.bool) if lost is None else lost


def _plain(a: Any, b: Any) -> bool:
    """Say whether every square stays in range and every b is well away from the line of a."""
    xp = namespace(a)
    finfo = xp.finfo(a.dtype)
    # Products of four factors are formed.
    low, high = finfo.tiny**0.25, finfo.max**0.25 / 4
    with np.errstate(over="ignore", invalid="ignore"):
        a, b = ([v[..., i] for i in range(3)] for v in (a, b))
        aa, bb, ab = _sum3(a, a), _sum3(b, b), _sum3(a, b)
        apart = aa * bb - ab * ab > 64 * finfo.eps * aa * bb
        fine = apart & (aa > low) & (aa < high) & (bb > low) & (bb < high)
    return bool(xp.all(fine))


def _frame(a: Any, b: Any) -> Any:
    """Gram-Schmidt. The part of b along a is taken out before the cross product, which then errs across a only.

    Written in entries: operations on whole arrays of one entry are several times faster than on an axis of three.
    """
    xp = namespace(a)
    a, b = ([v[..., i] for i in range(3)] for v in (a, b))
    size = xp.sqrt(_sum3(a, a))
    x = [part / size for part in a]
    along = _sum3(x, b)
    z = _cross3(x, [p - along * q for p, q in zip(b, x, strict=True)])
    size = xp.sqrt(_sum3(z, z))
    z = [part / size for part in z]
    y = _cross3(z, x)
    flat = xp.stack([part for row in zip(x, y, z, strict=True) for part in row], axis=-1)
    return xp.reshape(flat, (*flat.shape[:-1], 3, 3))


def _sum3(u: Any, v: Any) -> Any:
    return u[0] * v[0] + u[1] * v[1] + u[2] * v[2]


def _cross3(u: Any, v: Any) -> Any:
    return [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]]


def nearest(M: Any, look: bool) -> tuple[Any, Any]:
    """Nearest rotations, with gradient 0 where they are not unique, and where that is."""
    xp = namespace(M)
    n = M.shape[-1]
    size = xp.max(xp.abs(detached(M)), axis=(-2, -1), keepdims=True)
    M = M / xp.where(size >= xp.finfo(M.dtype).tiny, size, xp.ones_like(size))
    still = detached(M)
    if n != 3:
        R = nearest_rotation(still)
        H = swap(R) @ still
        values = xp.linalg.eigvalsh((H + swap(H)) / 2)
        lost = values[..., 0] + values[..., 1] <= 8 * xp.finfo(M.dtype).eps * values[..., -1]
        if is_torch(M):
            R = nearest_rotation(xp.where(lost[..., None, None], R, M))
        return R, lost
    if look and M.dtype == xp.float32:
        R, lost = _mostly_closed_form(still)
    else:
        R = nearest_rotation(still)
        lost = pair_sums(R, still)[2]
    if is_torch(M):
        from ._rotation_torch import Nearest

        R = Nearest.apply(M, R)
    return R, lost


def _mostly_closed_form(M: Any) -> tuple[Any, Any]:
    """Nearest rotations to float32 matrices without an SVD, but for the few near those that have several.

    R = ((k + |M|²) M + l C - M M'M) / (k l - det M) with k = (l² - |M|²) / 2, the cofactors C, and l the sum of the
    signed singular values, the largest root of (l² - |M|²)² - 8 l det M - 4 |C|². Newton's method comes to it from
    above. In float64 that leaves more digits than float32 holds.
    Source: Markley 1993.
    """
    xp = namespace(M)
    wide = xp.reshape(xp.astype(M, xp.float64), (-1, 3, 3))
    C = _cofactors(wide)
    determinant = dot(wide[:, 0], C[:, 0])
    square, cofactors = xp.sum(wide * wide, axis=(-2, -1)), xp.sum(C * C, axis=(-2, -1))
    total, step = xp.sqrt(3 * square), square
    for _ in range(8):
        inner = total * total - square
        slope = 4 * total * inner - 8 * determinant
        value = inner * inner - 8 * total * determinant - 4 * cofactors
        step = value / xp.where(slope > 0, slope, xp.ones_like(slope))
        total = total - step
    k = (total * total - square) / 2
    bottom = k * total - determinant
    # Where the root is almost a double one, Newton's steps only halve and are not done.
    apart = (bottom > WELL_APART * total**3) & (xp.abs(step) < 1e-7 * total)
    bottom = xp.where(apart, bottom, xp.ones_like(bottom))[:, None, None]
    R = (k + square)[:, None, None] * wide + total[:, None, None] * C - wide @ (swap(wide) @ wide)
    R = xp.astype(R / bottom, M.dtype)
    lost = ~apart
    if bool(xp.any(lost)):
        rows = xp.nonzero(lost)[0]
        left = xp.reshape(M, (-1, 3, 3))[rows]
        R[rows] = nearest_rotation(left)
        lost[rows] = pair_sums(R[rows], left)[2]
    return xp.reshape(R, M.shape), xp.reshape(lost, M.shape[:-2])


def pair_sums(R: Any, M: Any) -> tuple[Any, Any, Any]:
    """Adjugate and determinant of G = tr(H) I - H for H = R'M, and where R is not the only rotation nearest to M.

    The eigenvalues of G are the sums of two signed singular values of M. Their product over the sum of their products
    two by two is the smallest of them, to within a factor of 3.
    """
    xp = namespace(R, M)
    H = swap(R) @ M
    H = (H + swap(H)) / 2
    G = xp.linalg.trace(H)[..., None, None] * identity(3, H) - H
    adjugate = _cofactors(G)
    determinant = dot(G[..., 0, :], adjugate[..., 0, :])
    bound = 8 * xp.finfo(M.dtype).eps * xp.linalg.trace(G) * xp.linalg.trace(adjugate)
    return adjugate, determinant, detached(determinant) <= detached(bound)


def _cofactors(M: Any) -> Any:
    """Cofactors of (*b, 3, 3): each row is the cross product of the other two."""
    xp = namespace(M)
    a, b, c = (M[..., i, :] for i in range(3))
    return xp.stack([xp.linalg.cross(b, c), xp.linalg.cross(c, a), xp.linalg.cross(a, b)], axis=-2)
