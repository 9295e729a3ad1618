"""Rotations as numbers: quaternions, axis-angle, Euler angles, 5D, 6D, n-D and 9D, each to and from the matrix.

Matrices R act on columns; all maps take any leading dimensions, NumPy arrays and torch tensors, and keep dtype and
device (float16 and bfloat16 are computed in float32; integers and NumPy's longdouble in float64, which they become).
NumPy arrays come out in the machine's byte order. Whatever the numbers are, as long as they are finite, the matrix that
comes out is a rotation. Conversions between two forms that are no matrices stand in :mod:`polyspan.nn.rotation_grid`.

``check`` is an option of every conversion: it refuses numbers that are not finite and matrices that are no rotations,
and warns of input at which the map is not continuous. It waits for an accelerator at each call, is left out of
compiled and exported graphs and on the device "meta", and must be switched off inside ``torch.vmap``.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float

from polyspan.linalg import orthonormal_basis
from polyspan.linalg._namespace import detached, identity, is_torch, namespace, swap

from ._rotation_input import read_matrix, read_numbers, row_by_row, warn
from ._rotation_maps import (
    by_blocks,
    dot,
    entries,
    length,
    nearest,
    one_hot,
    sum3,
    two_columns,
    unit,
)

Order = Literal["wxyz", "xyzw"]
Convention = Literal["columns", "rows", "interleaved"]

PROBABLY_DEGREES = 4 * math.pi
SCALES_5D = (math.sqrt(2) + 1, math.sqrt(2) + 1, math.sqrt(2))


def quaternion_to_matrix(q: Any, *, order: Order, check: bool = True) -> Float[Any, "*b 3 3"]:
    r"""Turn quaternions of any length but 0 into rotations: :math:`(w^2-|v|^2)I + 2vv^\top + 2w[v]_\times`, over |q|².

    q and -q give one rotation, so that every way back has a break. Quaternions of length 0 give the identity, with
    gradient 0 and a warning.

    Parameters
    ----------
    q : array of shape (*b, 4)
    order : {"wxyz", "xyzw"}
        Where the real part w stands; there is no default, as libraries disagree.
    check : bool, default=True
        See the module's text.
    """
    wide, narrow, check = read_numbers(q, 4, "q", check)
    made, lost = unit(_reordered(wide, order, to="wxyz"), instead=identity(4, wide)[0])
    warn(check, lost, "quaternions have length 0 and became the identity")
    return narrow(_quaternion_matrix(made))


def matrix_to_quaternion(R: Any, *, order: Order, project: bool = False, check: bool = True) -> Float[Any, "*b 4"]:
    """Return the unit quaternion with w >= 0; at half turns, where w is 0, the largest component is positive.

    Discontinuous there, as every such map must be: a path through a half turn jumps to the opposite quaternion.

    Parameters
    ----------
    R : array of shape (*b, 3, 3)
    order : {"wxyz", "xyzw"}
    project : bool, default=False
        Take the nearest rotation first instead of refusing matrices that are none.
    check : bool, default=True

    Raises
    ------
    ValueError
        With ``check`` and without ``project``, where R'R is off the identity by more than 1e-3 or det R < 0.
    """
    wide, narrow, _ = read_matrix(R, project, check, size=3)
    return narrow(_reordered(_matrix_quaternion(wide), order, to=order))


def axis_angle_to_matrix(v: Any, *, check: bool = True) -> Float[Any, "*b 3 3"]:
    """Turn rotation vectors, unit axis times angle in radians, into rotations; smooth everywhere, 0 included.

    Vectors longer than 4 pi are taken as they are, with a warning: they may be degrees.

    Parameters
    ----------
    v : array of shape (*b, 3)
    check : bool, default=True
    """
    wide, narrow, check = read_numbers(v, 3, "v", check)
    q, long = _vector_quaternion(wide)
    warn(check, long, "rotation vectors are longer than 4 pi: radians are expected, not degrees")
    return narrow(_quaternion_matrix(q))


def matrix_to_axis_angle(R: Any, *, project: bool = False, check: bool = True) -> Float[Any, "*b 3"]:
    """Return the shortest rotation vector, of length 0 to pi radians; discontinuous at half turns.

    Accurate, and with a finite gradient, at the identity and at half turns. Parameters and errors as in
    :func:`matrix_to_quaternion`.
    """
    wide, narrow, _ = read_matrix(R, project, check, size=3)
    return narrow(_quaternion_vector(_matrix_quaternion(wide)))


def quaternion_to_axis_angle(q: Any, *, order: Order, check: bool = True) -> Float[Any, "*b 3"]:
    """Return the shortest rotation vector (*b, 3) of quaternions (*b, 4) of any length; see the maps to the matrix."""
    wide, narrow, check = read_numbers(q, 4, "q", check)
    made, lost = unit(_reordered(wide, order, to="wxyz"), instead=identity(4, wide)[0])
    warn(check, lost, "quaternions have length 0 and became the identity")
    return narrow(_quaternion_vector(_upper(made)))


def axis_angle_to_quaternion(v: Any, *, order: Order, check: bool = True) -> Float[Any, "*b 4"]:
    """Return the unit quaternion with w >= 0 (*b, 4) of rotation vectors (*b, 3); see the maps to the matrix."""
    wide, narrow, check = read_numbers(v, 3, "v", check)
    q, long = _vector_quaternion(wide)
    warn(check, long, "rotation vectors are longer than 4 pi: radians are expected, not degrees")
    return narrow(_reordered(_upper(q), order, to=order))


def euler_to_matrix(angles: Any, *, sequence: str, degrees: bool = False, check: bool = True) -> Float[Any, "*b 3 3"]:
    """Turn three angles about coordinate axes into rotations.

    Parameters
    ----------
    angles : array of shape (*b, 3)
        Radians; more than 4 pi is warned about, as it may be degrees.
    sequence : str
        Three axes, no two neighbours equal. Capitals turn about the moved axes: ``"XYZ"`` is Rx(a) Ry(b) Rz(c). Small
        letters turn about the fixed ones: ``"xyz"`` is Rz(c) Ry(b) Rx(a). There is no default, as fields disagree.
    degrees : bool, default=False
        Whether the angles are degrees.
    check : bool, default=True
    """
    axes, fixed = _axes(sequence)
    wide, narrow, check = read_numbers(angles, 3, "angles", check)
    if degrees:
        wide = wide * (math.pi / 180)
    else:
        long = namespace(wide).any(namespace(wide).abs(wide) > PROBABLY_DEGREES, axis=-1)
        warn(check, long, "triples hold an angle above 4 pi: radians are expected, or degrees=True")
    first, second, third = (_turn(axis, wide[..., i]) for i, axis in enumerate(axes))
    return narrow(third @ second @ first if fixed else first @ second @ third)


def matrix_to_euler(
    R: Any, *, sequence: str, degrees: bool = False, project: bool = False, check: bool = True
) -> Float[Any, "*b 3"]:
    """Return the three angles: outer ones in [-pi, pi], the middle one in [-pi/2, pi/2], or [0, pi] if they share axes.

    Discontinuous where an outer angle passes pi, and near gimbal lock (the middle angle at an end of its range): there
    only one outer angle is determined, the third is set to 0 with a warning, and the gradient is finite but says
    nothing. The angles always give R back.

    Parameters
    ----------
    R : array of shape (*b, 3, 3)
    sequence, degrees :
        As in :func:`euler_to_matrix`.
    project, check :
        As in :func:`matrix_to_quaternion`.
    """
    axes, fixed = _axes(sequence)
    wide, narrow, check = read_matrix(R, project, check, size=3)
    angles, locked = _matrix_angles(wide, axes[::-1] if fixed else axes, keep_first=not fixed)
    warn(check, locked, "rotations are in gimbal lock; their third angle is set to 0")
    if fixed:
        angles = angles[::-1]
    found = namespace(wide).stack(angles, axis=-1)
    return narrow(found * (180 / math.pi) if degrees else found)


def rotation6d_to_matrix(x: Any, *, convention: Convention = "columns", check: bool = True) -> Float[Any, "*b 3 3"]:
    r"""Turn any six numbers into rotations by Gram-Schmidt: :math:`x=a/|a|`, y = b made orthogonal to x, x × y.

    The continuous representation of the paper: its way back is continuous on all rotations. The map itself breaks only
    where a is 0 or b is parallel to a. There the missing direction is taken from the coordinate axis that is least
    aligned with the other one (six zeros give the identity), its gradient is 0, and a warning counts the rows.

    Parameters
    ----------
    x : array of shape (*b, 6)
    convention : {"columns", "rows", "interleaved"}
        Whether the six numbers stand for the first two columns of R one after the other (as in the paper), its first
        two rows (as in PyTorch3D), or its first two columns entry by entry, ``R[:, :2].reshape(6)``.
    check : bool, default=True

    Notes
    -----
    Source: catalogue entry ``rotation-continuity``.
    """
    wide, narrow, check = read_numbers(x, 6, "x", check)
    R, lost = two_columns(_in_halves(wide, convention), check)
    warn(check, lost, "six-vectors hold two parallel vectors, or a zero one, and were completed")
    return narrow(swap(R) if convention == "rows" else R)


def matrix_to_rotation6d(
    R: Any, *, convention: Convention = "columns", project: bool = False, check: bool = True
) -> Float[Any, "*b 6"]:
    """Return the first two columns (or rows): continuous on all rotations.

    Parameters and errors as in :func:`rotation6d_to_matrix` and :func:`matrix_to_quaternion`.
    """
    wide, narrow, _ = read_matrix(R, project, check, size=3)
    xp = namespace(wide)
    if convention == "interleaved":
        parts = [wide[..., i, j] for i in range(3) for j in range(2)]
    elif convention in ("columns", "rows"):
        parts = [wide[..., i, j] if convention == "columns" else wide[..., j, i] for j in range(2) for i in range(3)]
    else:
        raise ValueError(f"convention must be 'columns', 'rows' or 'interleaved', got {convention!r}")
    return narrow(xp.stack(parts, axis=-1))


def rotation5d_to_matrix(x: Any, *, check: bool = True) -> Float[Any, "*b 3 3"]:
    r"""Turn any five numbers into rotations: a stereographic projection unfolds three of them into four.

    With :math:`b = (\sqrt2+1, \sqrt2+1, \sqrt2) \cdot (x_3,x_4,x_5)` the rotation is that of the six-vector
    :math:`(2|b|x_1, 2|b|x_2, |b|^2-1;\; b)`, which is the paper's map without its division by |b|. Breaks where b is 0
    or the two halves are parallel; completed there as in :func:`rotation6d_to_matrix`.

    Parameters
    ----------
    x : array of shape (*b, 5)
        Numbers in [-1, 1] reach all rotations.
    check : bool, default=True

    Notes
    -----
    Source: catalogue entry ``rotation-continuity``.
    """
    wide, narrow, check = read_numbers(x, 5, "x", check)
    xp = namespace(wide)
    # Divided by the square of the larger of 1 and the largest entry of b, so that nothing overflows.
    size = xp.max(xp.abs(detached(wide[..., 2:])), axis=-1, keepdims=True)
    m = xp.where(size > 1, size, xp.ones_like(size))
    scaled = xp.stack([wide[..., 2 + i] / m[..., 0] * scale for i, scale in enumerate(SCALES_5D)], axis=-1)
    norm = length(scaled)[..., None]
    third = norm**2 - (1 / m) ** 2
    R, lost = two_columns(xp.concat([2 * norm * (wide[..., :2] / m), third, scaled], axis=-1), check)
    warn(check, lost, "five-vectors lie where the map is not defined and were completed")
    return narrow(R)


def matrix_to_rotation5d(R: Any, *, project: bool = False, check: bool = True) -> Float[Any, "*b 5"]:
    """Return five numbers in [-1, 1], continuous on all rotations.

    Parameters and errors as in :func:`matrix_to_quaternion`.
    """
    wide, narrow, _ = read_matrix(R, project, check, size=3)
    xp = namespace(wide)
    w = xp.concat([wide[..., 2, :1], wide[..., :, 1]], axis=-1)
    w = w / xp.sqrt(dot(w, w))[..., None]
    b = w[..., 1:] / (1 - w[..., :1])
    parts = [wide[..., 0, 0], wide[..., 1, 0], *(b[..., i] / scale for i, scale in enumerate(SCALES_5D))]
    return narrow(xp.stack(parts, axis=-1))


def rotation9d_to_matrix(x: Any, *, check: bool = True) -> Float[Any, "*b 3 3"]:
    """Turn any nine numbers, a 3 x 3 matrix row by row, into the nearest rotations (special Procrustes).

    Breaks where the nearest rotation is not unique: where the two smallest singular values are 0, or are equal and the
    determinant is negative. One of them is taken there, with gradient 0, and a warning counts the rows.

    Parameters
    ----------
    x : array of shape (*b, 9)
        float32 and narrower are solved in closed form, many times faster than by SVD; on accelerators with ``check``
        only, and not inside ``torch.vmap`` or captured graphs.
    check : bool, default=True

    Notes
    -----
    Source: Levinson et al. 2020; see :func:`polyspan.linalg.nearest_rotation`.
    """
    return _procrustes(x, 3, check)


def matrix_to_rotation9d(R: Any, *, project: bool = False, check: bool = True) -> Float[Any, "*b 9"]:
    """Return the entries of R row by row.

    Parameters and errors as in :func:`matrix_to_quaternion`.
    """
    wide, narrow, _ = read_matrix(R, project, check, size=3)
    return narrow(row_by_row(wide))


def rotationnd_to_matrix(x: Any, *, check: bool = True) -> Float[Any, "*b n n"]:
    r"""Turn any n(n-1) numbers, n-1 columns one after the other, into rotations of n dimensions; n = 3 is the 6D map.

    Gram-Schmidt on the columns; the last column is the one that makes the determinant 1. Breaks where a column depends
    on those before it: it is then replaced by another, with gradient 0 and a warning. For all orthogonal matrices,
    reflections included, take :func:`polyspan.linalg.orthonormal_basis` of n columns.

    Parameters
    ----------
    x : array of shape (*b, n(n-1))
        2, 6, 12, 20 ... numbers.
    check : bool, default=True

    Notes
    -----
    Source: catalogue entry ``rotation-continuity``.
    """
    n = _dimension(x)
    wide, narrow, check = read_numbers(x, n * (n - 1), "x", check)
    xp = namespace(wide)
    X = swap(xp.reshape(wide, (*wide.shape[:-1], n - 1, n)))
    size = xp.max(xp.abs(detached(X)), axis=-2, keepdims=True)
    X = X / xp.where(size >= xp.finfo(X.dtype).tiny, size, xp.ones_like(size))
    still = detached(X)
    basis = orthonormal_basis(still)
    # An entry of R's diagonal that is rounding noise against its column: no direction is left.
    lost = xp.abs(xp.sum(basis * still, axis=-2)) <= 8 * n * xp.finfo(X.dtype).eps * xp.sqrt(
        xp.sum(still * still, axis=-2)
    )
    warn(check, xp.any(lost, axis=-1), "rows hold linearly dependent columns and were completed")
    Q = orthonormal_basis(xp.where(lost[..., None, :], basis, X))
    return narrow(xp.concat([Q, _last_column(Q)], axis=-1))


def matrix_to_rotationnd(R: Any, *, project: bool = False, check: bool = True) -> Float[Any, "*b m"]:
    """Return all columns of R but the last, one after the other: n(n-1) numbers, continuous on all rotations.

    Parameters and errors as in :func:`matrix_to_quaternion`, for R (*b, n, n) with n >= 2.
    """
    wide, narrow, _ = read_matrix(R, project, check, size=None)
    return narrow(row_by_row(swap(wide[..., :-1])))


def _in_halves(x: Any, convention: str) -> Any:
    """Bring six-vectors to the order of the two columns, or rows, one after the other."""
    if convention in ("columns", "rows"):
        return x
    if convention == "interleaved":
        xp = namespace(x)
        return xp.concat([x[..., ::2], x[..., 1::2]], axis=-1)
    raise ValueError(f"convention must be 'columns', 'rows' or 'interleaved', got {convention!r}")


def _reordered(q: Any, order: str, to: str) -> Any:
    """Bring quaternions from ``order`` to wxyz, or from wxyz to ``order`` where that is the target."""
    if order not in ("wxyz", "xyzw"):
        raise ValueError(f"order must be 'wxyz' or 'xyzw', got {order!r}")
    if order == "wxyz":
        return q
    parts = [q[..., 3:], q[..., :3]] if to == "wxyz" else [q[..., 1:], q[..., :1]]
    return namespace(q).concat(parts, axis=-1)


def _quaternion_matrix(q: Any) -> Any:
    """Matrix of unit quaternions in the order wxyz."""
    xp = namespace(q)
    w, x, y, z = (q[..., i] for i in range(4))
    xx, yy, zz = 2 * x * x, 2 * y * y, 2 * z * z
    xy, xz, yz, wx, wy, wz = 2 * x * y, 2 * x * z, 2 * y * z, 2 * w * x, 2 * w * y, 2 * w * z
    entries = [1 - yy - zz, xy - wz, xz + wy, xy + wz, 1 - xx - zz, yz - wx, xz - wy, yz + wx, 1 - xx - yy]
    return xp.reshape(xp.stack(entries, axis=-1), (*q.shape[:-1], 3, 3))


def _matrix_quaternion(R: Any) -> Any:
    """Unit quaternions wxyz with w >= 0 of rotations (*b, 3, 3)."""
    flat = namespace(R).reshape(R, (*R.shape[:-2], 9))
    if is_torch(R):
        from ._rotation_torch import joined

        return joined(_row_of_quaternion(entries(flat)))
    return by_blocks(lambda numbers: (_row_of_quaternion(numbers), False), (flat,), 4)[0]


def _row_of_quaternion(numbers: list[Any]) -> list[Any]:
    """The row of 4qq' with the largest diagonal entry, which is at least 1, made a unit quaternion."""
    a, b, c, d, e, f, g, h, i = numbers
    xp = namespace(a)
    rows = [
        [1 + a + e + i, h - f, c - g, d - b],
        [h - f, 1 + a - e - i, b + d, c + g],
        [c - g, b + d, 1 - a + e - i, f + h],
        [d - b, c + g, f + h, 1 - a - e + i],
    ]
    row, best = rows[0], detached(rows[0][0])
    for k in range(1, 4):
        more = detached(rows[k][k]) > best
        row = [xp.where(more, new, old) for new, old in zip(rows[k], row, strict=True)]
        best = xp.where(more, detached(rows[k][k]), best)
    size = xp.sqrt(sum3(row, row) + row[3] * row[3])
    size = xp.where(row[0] < 0, -size, size)
    return [part / size for part in row]


def _upper(q: Any) -> Any:
    """Take of q and -q the one with w >= 0."""
    return namespace(q).where(q[..., :1] < 0, -q, q)


def _vector_quaternion(v: Any) -> tuple[Any, Any]:
    """Unit quaternion of a rotation vector (w of any sign), and where it is longer than 4 pi."""
    xp = namespace(v)
    square = dot(v, v)
    small = square < 1e-4
    angle = xp.sqrt(xp.where(small, xp.ones_like(square), square))
    # Near 0 the series of cos(t/2) and sin(t/2)/t: exact to the last digit of float64, and smooth.
    w = xp.where(small, 1 - square / 8 + square**2 / 384, xp.cos(angle / 2))
    factor = xp.where(small, 0.5 - square / 48 + square**2 / 3840, xp.sin(angle / 2) / angle)
    return xp.concat([w[..., None], factor[..., None] * v], axis=-1), detached(square) > PROBABLY_DEGREES**2


def _quaternion_vector(q: Any) -> Any:
    """Rotation vector of unit quaternions wxyz with w >= 0: 2 atan(|v| / w) v / |v|."""
    xp = namespace(q)
    w, v = q[..., 0], q[..., 1:]
    square = dot(v, v)
    small = square < 1e-6
    sine = xp.sqrt(xp.where(small, xp.ones_like(square), square))
    w_small = xp.where(small, w, xp.ones_like(w))
    ratio = xp.where(small, square, xp.zeros_like(square)) / w_small**2
    near = 2 * (1 - ratio / 3 + ratio**2 / 5) / w_small
    return xp.where(small, near, 2 * xp.atan2(sine, w) / sine)[..., None] * v


def _axes(sequence: str) -> tuple[tuple[int, int, int], bool]:
    """Axes of a sequence such as "XYZ", and whether they are fixed ones (small letters)."""
    letters = sequence.lower()
    proper = len(letters) == 3 and set(letters) <= set("xyz") and letters[0] != letters[1] != letters[2]
    if not proper or sequence not in (letters, letters.upper()):
        raise ValueError(
            "sequence must be three of the letters XYZ (moved axes) or xyz (fixed axes), no two neighbours equal, "
            f"got {sequence!r}"
        )
    i, j, k = ("xyz".index(letter) for letter in letters)
    return (i, j, k), sequence == letters


def _turn(axis: int, angle: Any) -> Any:
    """Rotation (*b, 3, 3) by ``angle`` (*b,) about a coordinate axis."""
    xp = namespace(angle)
    c, s, zero, one = xp.cos(angle), xp.sin(angle), xp.zeros_like(angle), xp.ones_like(angle)
    j, k = (axis + 1) % 3, (axis + 2) % 3
    entries = {(axis, axis): one, (j, j): c, (j, k): -s, (k, j): s, (k, k): c}
    flat = [entries.get((p, q), zero) for p in range(3) for q in range(3)]
    return xp.reshape(xp.stack(flat, axis=-1), (*angle.shape, 3, 3))


def _matrix_angles(R: Any, axes: Sequence[int], keep_first: bool) -> tuple[list[Any], Any]:
    """Angles of R = R_i(a) R_j(b) R_l(c) about moved axes, and where they are in gimbal lock.

    c comes from the matrix that is left after a is undone, so that the three give R back however badly a and c are
    determined one by one. In lock c is 0, or a is, as the caller wants.
    """
    xp = namespace(R)
    i, j, last = axes
    k = 3 - i - j
    e = 1.0 if (j - i) % 3 == 1 else -1.0
    proper = last == i
    up, along = (R[..., j, i], -e * R[..., k, i]) if proper else (-e * R[..., j, k], R[..., k, k])
    spread = length(xp.stack([up, along], axis=-1))
    locked = detached(spread) <= 16 * xp.finfo(R.dtype).eps
    up_locked, along_locked = (e * R[..., k, j], R[..., j, j]) if keep_first else (xp.zeros_like(up), xp.ones_like(up))
    a = xp.atan2(xp.where(locked, up_locked, up), xp.where(locked, along_locked, along))
    b = xp.atan2(spread, R[..., i, i]) if proper else xp.atan2(e * R[..., i, k], spread)
    row = xp.cos(a)[..., None] * R[..., j, :] + e * xp.sin(a)[..., None] * R[..., k, :]
    c = xp.atan2(-e * row[..., k] if proper else e * row[..., i], row[..., j])
    return [a, b, c], locked


def _procrustes(x: Any, n: int, check: bool) -> Any:
    """Nearest rotations to matrices (*b, n²) row by row."""
    wide, narrow, check = read_numbers(x, n * n, "x", check)
    R, lost = nearest(namespace(wide).reshape(wide, (*wide.shape[:-1], n, n)), check)
    warn(check, lost, "matrices have more than one nearest rotation")
    return narrow(R)


def _dimension(x: Any) -> int:
    """Find n for a last dimension of n(n-1)."""
    namespace(x)
    m = x.shape[-1] if x.ndim else 0
    n = (1 + math.isqrt(1 + 4 * m)) // 2
    if n < 2 or n * (n - 1) != m:
        raise ValueError(f"x must be (*b, n(n-1)), 2, 6, 12, 20 ... numbers, got shape {tuple(x.shape)}")
    return n


def _last_column(Q: Any) -> Any:
    """Column that completes (*b, n, n-1) orthonormal columns to a rotation: what they leave of a coordinate axis."""
    xp = namespace(Q)
    still = detached(Q)
    axis = one_hot(xp.argmin(xp.sum(still * still, axis=-1), axis=-1), Q, Q.shape[-2])[..., None]
    column = axis - Q @ (swap(Q) @ axis)
    column = column - Q @ (swap(Q) @ column)
    column = column / xp.sqrt(xp.sum(column * column, axis=-2, keepdims=True))
    mirrored = xp.linalg.det(xp.concat([still, detached(column)], axis=-1)) < 0
    return xp.where(mirrored[..., None, None], -column, column)
