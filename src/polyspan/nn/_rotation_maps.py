"""The two maps from free vectors to rotations, Gram-Schmidt and nearest matrix, safe where they are not defined.

``look`` says whether values may decide what is computed, which spares work: not inside vmap or captured graphs. Where
nobody waits for it, outside those and on the processor, values are looked at anyway.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polyspan.linalg import nearest_rotation
from polyspan.linalg._namespace import detached, identity, is_torch, namespace, swap

WELL_APART = 1e-4
# One vector of numbers of a block; some thirty of them are in use at a time and fit the second cache of a core.
BLOCK_BYTES = 32768


def native(x: Any) -> Any:
    """Bring NumPy arrays to the machine's byte order, and longdouble, for which LAPACK has no functions, to float64.

    Raises
    ------
    TypeError
        An array holds dates, texts or objects, which NumPy would turn into numbers.
    """
    if is_torch(x):
        return x
    if x.dtype.kind not in "biufc":
        raise TypeError(f"arrays must hold real numbers, got {x.dtype}")
    if x.dtype.kind == "f" and x.dtype.itemsize > 8:
        # What leaves the range becomes infinite, which is refused by name.
        with np.errstate(over="ignore"):
            return x.astype(np.float64)
    return x.astype(x.dtype.newbyteorder("="), copy=False)


def dot(u: Any, v: Any) -> Any:
    """Inner products along the last axis; in torch neither a sum over three numbers nor its own function is fast."""
    if is_torch(u):
        import torch

        return torch.einsum("...i,...i->...", u, v)
    return namespace(u, v).vecdot(u, v)


def length(v: Any) -> Any:
    """Euclidean length along the last axis, with gradient 0 at 0."""
    return root(dot(v, v))


def root(square: Any) -> Any:
    """Square root with derivatives 0 at 0."""
    xp = namespace(square)
    if not is_torch(square):
        return np.sqrt(square)
    zero = square == 0
    return xp.where(zero, xp.zeros_like(square), xp.sqrt(xp.where(zero, xp.ones_like(square), square)))


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


def two_columns(x: Any, look: bool) -> tuple[Any, Any]:
    """Gram-Schmidt frames of six-vectors, completed where a direction is lost, and where that is."""
    xp = namespace(x)
    if look or _at_hand(x):
        R, fine = _frames(x)
        if bool(xp.all(fine)):
            return R, ~fine
    a, no_first = _near_one(x[..., :3], least_aligned(x[..., 3:]))
    b, no_second = _near_one(x[..., 3:], xp.zeros_like(x[..., 3:]))
    still, y = detached(a), detached(b)
    still = still / xp.sqrt(dot(still, still))[..., None]
    for _ in range(2):
        y = y - dot(still, y)[..., None] * still
    no_second = no_second | (dot(y, y) <= (8 * xp.finfo(y.dtype).eps) ** 2)
    b = xp.where(no_second[..., None], least_aligned(still), b)
    return _frames(xp.concat([a, b], axis=-1))[0], no_first | no_second


def _at_hand(x: Any) -> bool:
    if not is_torch(x):
        return True
    from ._rotation_torch import as_numpy

    return as_numpy(x) is not None


def _frames(x: Any) -> tuple[Any, Any]:
    if is_torch(x):
        from ._rotation_torch import framed

        R, fine = framed(x)
        return _apart(R), fine
    return gram_schmidt(x)


def _apart(R: Any) -> Any:
    """Copy what a gradient keeps, so that the caller may write into the result."""
    return R.clone() if R.requires_grad else R


def gram_schmidt(x: Any) -> tuple[Any, Any]:
    """Rotations of six-vectors: first column along the first three numbers, second the other three made orthogonal.

    Returns (*b, 3, 3), and (*b,) where all is well: no product leaves the range of floats, no halves nearly parallel.
    """
    R, fine = by_blocks(_frame, (x,), 9)
    return namespace(x).reshape(R, (*x.shape[:-1], 3, 3)), fine


def _frame(numbers: list[Any]) -> tuple[list[Any], Any]:
    """Gram-Schmidt. The part of b along a is taken out before the cross product, which then errs across a only."""
    xp = namespace(numbers[0])
    finfo = xp.finfo(numbers[0].dtype)
    # Products of four factors are formed.
    low, high = finfo.tiny**0.25, finfo.max**0.25 / 4
    a, b = numbers[:3], numbers[3:]
    aa, bb = sum3(a, a), sum3(b, b)
    inverse = 1 / xp.sqrt(aa)
    x = [part * inverse for part in a]
    along = sum3(x, b)
    z = cross3(x, [p - along * q for p, q in zip(b, x, strict=True)])
    zz = sum3(z, z)
    fine = (zz > 64 * finfo.eps * bb) & (aa > low) & (aa < high) & (bb > low) & (bb < high)
    inverse = 1 / xp.sqrt(zz)
    z = [part * inverse for part in z]
    y = cross3(z, x)
    return [part for row in zip(x, y, z, strict=True) for part in row], fine


def sum3(u: Any, v: Any) -> Any:
    return u[0] * v[0] + u[1] * v[1] + u[2] * v[2]


def cross3(u: Any, v: Any) -> Any:
    return [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]]


def entries(x: Any) -> list[Any]:
    """Numbers along the last axis, each a contiguous array: several times faster to compute with than a short axis."""
    if is_torch(x):
        return [part.contiguous() for part in x.unbind(-1)]
    return list(np.ascontiguousarray(np.moveaxis(x, -1, 0)))


def by_blocks(
    kernel: Callable[[list[Any]], tuple[list[Any], Any]], arrays: Sequence[Any], width: int, double: bool = False
) -> tuple[Any, Any]:
    """Apply ``kernel``, from entries to entries and a mark a row, to the last axes of ``arrays`` one after another.

    Returns (*b, width) and (*b,); ``double`` computes in float64. Not for tensors of which derivatives are asked for.
    On the processor the work is NumPy's, whose operations start sooner, in blocks of rows small enough for the cache
    and for reused memory.
    """
    if is_torch(arrays[0]):
        import torch

        from ._rotation_torch import as_numpy, joined

        seen = as_numpy(*arrays)
        if seen is None:
            parts, marks = kernel([part for x in arrays for part in entries(x.double() if double else x)])
            made = joined(parts) if parts else arrays[0].new_empty((*arrays[0].shape[:-1], 0))
            return made.to(arrays[0].dtype), marks
        found, marks = by_blocks(kernel, seen, width, double)
        return torch.from_numpy(found), torch.from_numpy(marks)
    narrow, batch = arrays[0].dtype, arrays[0].shape[:-1]
    dtype = np.dtype(np.float64 if double else narrow)
    flat = [x.reshape(-1, x.shape[-1]) for x in arrays]
    found, marks = np.empty((len(flat[0]), width), dtype=narrow), np.empty(len(flat[0]), dtype=bool)
    with np.errstate(all="ignore"):
        for start in range(0, len(marks), BLOCK_BYTES // dtype.itemsize):
            rows = slice(start, start + BLOCK_BYTES // dtype.itemsize)
            numbers = [part for x in flat for part in entries(x[rows].astype(dtype, copy=False))]
            parts, marks[rows] = kernel(numbers)
            for i, part in enumerate(parts):
                found[rows, i] = part
    return found.reshape(*batch, width), marks.reshape(batch)


def no_rotations(R: Any, tolerance: float) -> Any:
    """Mark matrices (*b, n, n) with an entry of R'R - I beyond ``tolerance``, or with a negative determinant."""
    xp = namespace(R)
    n = R.shape[-1]
    if n != 3:
        off = xp.max(xp.abs(swap(R) @ R - identity(n, R)), axis=(-2, -1))
        return (off > tolerance) | (xp.linalg.det(R) < 0)

    def kernel(numbers: list[Any]) -> tuple[list[Any], Any]:
        x, y, z = (numbers[j::3] for j in range(3))
        off = [sum3(x, x) - 1, sum3(y, y) - 1, sum3(z, z) - 1, sum3(x, y), sum3(y, z), sum3(z, x)]
        xp = namespace(*numbers)
        worst = functools.reduce(xp.maximum, (xp.abs(part) for part in off))
        return [], (worst > tolerance) | (sum3(cross3(x, y), z) < 0)

    return by_blocks(kernel, (xp.reshape(R, (*R.shape[:-2], 9)),), 0)[1]


def nearest(M: Any, look: bool) -> tuple[Any, Any]:
    """Nearest rotations, with gradient 0 where they are not unique, and where that is."""
    xp = namespace(M)
    n = M.shape[-1]
    closed = n == 3 and M.dtype == xp.float32 and (look or _at_hand(M))
    if closed and not is_torch(M):
        return _mostly_closed_form(M)
    whole = detached(M)
    M = _scaled(M)
    still = detached(M)
    if n != 3:
        R = nearest_rotation(still)
        H = swap(R) @ still
        values = xp.linalg.eigvalsh((H + swap(H)) / 2)
        lost = values[..., 0] + values[..., 1] <= 8 * xp.finfo(M.dtype).eps * values[..., -1]
        if is_torch(M):
            from ._rotation_torch import nearest_in_n

            R = nearest_in_n(xp.where(lost[..., None, None], R, M))
        return R, lost
    if closed:
        # The closed form needs no scaling, which in float32 would cost digits.
        R, lost = _mostly_closed_form(whole)
    else:
        R = nearest_rotation(still)
        lost = pair_sums(R, still)[2]
    if is_torch(M):
        from ._rotation_torch import attached

        R = _apart(attached(M, R))
    return R, lost


def _scaled(M: Any) -> Any:
    """Divide matrices by their largest entry, which changes no rotation, so that no product overflows or vanishes."""
    xp = namespace(M)
    size = xp.max(xp.abs(detached(M)), axis=(-2, -1), keepdims=True)
    return M / xp.where(size >= xp.finfo(M.dtype).tiny, size, xp.ones_like(size))


def _mostly_closed_form(M: Any) -> tuple[Any, Any]:
    """Nearest rotations to float32 matrices without an SVD, but for the few near those that have several."""
    xp = namespace(M)
    R, apart = by_blocks(_closed_form, (xp.reshape(M, (*M.shape[:-2], 9)),), 9, double=True)
    R, lost = xp.reshape(R, (-1, 3, 3)), xp.reshape(~apart, (-1,))
    if bool(xp.any(lost)):
        rows = xp.nonzero(lost)[0]
        left = _scaled(xp.reshape(M, (-1, 3, 3))[rows])
        R[rows] = nearest_rotation(left)
        lost[rows] = pair_sums(R[rows], left)[2]
    return xp.reshape(R, M.shape), xp.reshape(lost, M.shape[:-2])


def _closed_form(numbers: list[Any]) -> tuple[list[Any], Any]:
    """Nearest rotation to M in closed form, and where it may be trusted.

    R = ((k + |M|²) M + l C - M M'M) / (k l - det M) with k = (l² - |M|²) / 2, the cofactors C, and l the sum of the
    signed singular values, the largest root of (l² - |M|²)² - 8 l det M - 4 |C|². Newton's method comes to it from
    above. In float64 that leaves more digits than float32 holds.
    Source: Markley 1993.
    """
    xp = namespace(numbers[0])
    M = [numbers[:3], numbers[3:6], numbers[6:]]
    C = [cross3(M[1], M[2]), cross3(M[2], M[0]), cross3(M[0], M[1])]
    gram = {(i, j): sum3(*([row[k] for row in M] for k in (i, j))) for i in range(3) for j in range(i, 3)}
    determinant = sum3(M[0], C[0])
    square, cofactors = gram[0, 0] + gram[1, 1] + gram[2, 2], sum(sum3(row, row) for row in C)
    total, step = xp.sqrt(3 * square), square
    eightfold, fourfold = 8 * determinant, 4 * cofactors
    for _ in range(12):
        inner = total * total - square
        step = (inner * inner - total * eightfold - fourfold) / (4 * total * inner - eightfold)
        total = total - step
    k = (total * total - square) / 2
    bottom = k * total - determinant
    # Where the root is almost a double one, Newton's steps only halve and are not done; NaN, of 0 / 0, is not apart.
    apart = (bottom > WELL_APART * total**3) & (xp.abs(step) < 1e-7 * total)
    inverse = 1 / bottom
    p, q = (k + square) * inverse, total * inverse
    R = []
    for row, cofactor in zip(M, C, strict=True):
        scaled = [part * inverse for part in row]
        for j in range(3):
            column = [gram[min(i, j), max(i, j)] for i in range(3)]
            R.append(p * row[j] + q * cofactor[j] - sum3(scaled, column))
    return R, apart


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
