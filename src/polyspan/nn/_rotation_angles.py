"""Angles between rotations: by the chord where nobody asks for derivatives, as roots of their squares where one may.

The square of an angle is smooth where rotations are equal, which the angle is not; the root is flat there.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from polyspan.linalg._namespace import identity, is_torch, namespace, swap

from ._rotation_maps import BLOCK_BYTES, length

# Squared cosine of half the angle: above it the chord magnifies what matrices are off rotations by up to its root's
# inverse, 32; the next rows cost more than they gain.
NEARLY_HALF_TURN = 2.0**-10


def angle(R: Any, S: Any, *, squared: bool = False) -> Any:
    """Angles (*b,) of the turns from R to S (*b, n, n) of one dtype, broadcast; ``squared``: summed over planes."""
    if is_torch(R):
        from ._rotation_angles_torch import angle_of_tensors

        return angle_of_tensors(R, S, squared)
    found = angle_by_chord(R, S) if R.shape[-1] == 3 else angle_in_n(R, S)
    return found * found if squared else found


def angle_in_n(R: Any, S: Any) -> Any:
    xp, n = namespace(R, S), R.shape[-1]
    D = swap(R) @ S
    if n == 2:
        return xp.abs(xp.atan2(D[..., 1, 0] - D[..., 0, 1], D[..., 0, 0] + D[..., 1, 1]))
    # |e^{it} - 1| = 2 sin(t/2) and |e^{it} + 1| = 2 cos(t/2) run in opposite orders, and every plane counts twice.
    eye = identity(n, D)
    sines, cosines = xp.linalg.svdvals(D - eye), xp.flip(xp.linalg.svdvals(D + eye), axis=-1)
    return length(2 * xp.atan2(sines, cosines)) / math.sqrt(2)


def _arcsine(x: np.ndarray) -> None:
    np.arcsin(x, out=x)


def angle_by_chord(R: np.ndarray, S: np.ndarray, arcsine: Callable[[np.ndarray], object] = _arcsine) -> np.ndarray:
    """Angle from |R - S|² = 8 sin² of its half, but near half turns, where that says little, from its own sine."""
    if R.shape != S.shape:
        R, S = np.broadcast_arrays(R, S)
    flat_R, flat_S = R.reshape(-1, 9), S.reshape(-1, 9)
    found, eighths = np.empty(len(flat_R), dtype=R.dtype), np.full(9, 0.125, dtype=R.dtype)
    block = BLOCK_BYTES // R.itemsize
    with np.errstate(over="ignore", invalid="ignore"):
        # Differences in blocks that stay in the cache.
        for start in range(0, len(found), block):
            gap = flat_R[start : start + block] - flat_S[start : start + block]
            np.dot(np.multiply(gap, gap, out=gap), eighths, out=found[start : start + block])
        near = (found > 1 - NEARLY_HALF_TURN).nonzero()[0]
        arcsine(np.sqrt(found, out=found))
        np.multiply(found, 2, out=found)
        if len(near):
            sine = _sine(_columns(flat_R, near), _columns(flat_S, near))
            found[near] = np.pi - np.arcsin(np.minimum(sine, 1, out=sine))
    return found.reshape(R.shape[:-2])


def _columns(T: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of (n, 9) as matrices (3, 3, m): contiguous along the last axis, which is fast to compute with."""
    return T.take(rows, axis=0).T.copy().reshape(3, 3, -1)


def _sine(R: np.ndarray, S: np.ndarray) -> np.ndarray:
    """Sine of the angle between matrices (3, 3, m): half the length of the axis in the skew part of R'S."""
    across, last = R[:2] * S[1:] - R[1:] * S[:2], R[2] * S[0] - R[0] * S[2]
    across, last = across[:, 0] + across[:, 1] + across[:, 2], last[0] + last[1] + last[2]
    return np.sqrt(across[0] * across[0] + across[1] * across[1] + last * last) / 2


def pulls_near_half_turns(
    R: np.ndarray, S: np.ndarray, rows: np.ndarray, grad: np.ndarray, least: float
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients in rows of R and S (n, 9), (m, 9) each, for ``grad`` (m,) in their angles.

    0 where twice the sine of the angle is not above ``least``.
    """
    R1, R2, S1, S2 = (_columns(T, rows)[below] for T in (R, S) for below in ([1, 2, 0], [2, 0, 1]))
    axis = (R1 * S2 - R2 * S1).sum(axis=1)
    square = (axis * axis).sum(axis=0)
    known = (square > least**2) & (square < 4)
    square = np.where(known, square, 1)
    turn = np.where(known, -grad / np.sqrt(square * (4 - square)), 0) * axis
    turn1, turn2 = turn[[1, 2, 0], None], turn[[2, 0, 1], None]
    pulls = S1 * turn2 - S2 * turn1, R2 * turn1 - R1 * turn2
    return tuple(pull.reshape(9, -1).T for pull in pulls)


def noise(R: Any) -> float:
    """Angles, and sines of them, that are rounding of products of rotations (*b, n, n)."""
    return 8 * R.shape[-1] * float(namespace(R).finfo(R.dtype).eps)
