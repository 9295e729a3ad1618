"""Orders in which the cells of a grid are visited: raster, snake, diagonal, spiral, Hilbert and Morton routes."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np


class ScanRoute(NamedTuple):
    """The routes of one pattern over an h by w grid, as permutations.

    Row r of ``order`` holds the flat index ``i * w + j`` of the cell that stands at each place of the sequence; row r
    of ``inverse`` the place at which each cell stands, so that ``order[r][inverse[r]]`` counts up from 0.

    Attributes
    ----------
    order, inverse : ndarray of shape (routes, h * w), int64
    """

    order: np.ndarray
    inverse: np.ndarray


def scan_routes(h: int, w: int, pattern: Any = "snake") -> ScanRoute:
    """Return the routes of a pattern over a grid, for reading an image as a sequence and for putting it back.

    Every pattern has two routes. They hold for all sizes, 1 by 1, single rows and single columns among them. Where a
    side is no power of two, "hilbert" and "morton" visit the cells of the smallest such square that lie in the grid,
    in its order, and steps may then be longer.
    Source: catalogue entry ``mhs-vm``; "hilbert" and "morton" are not part of it.

    Parameters
    ----------
    h, w : int
        Rows and columns, at least 1.
    pattern : str, callable or array
        "raster" (by rows, by columns), "snake" (the same, every second one backwards), "diagonal" (anti-diagonals, in
        turn down and up, and their mirror image), "spiral" (from the corner inwards, and its mirror image), "hilbert"
        or "morton" (and their transposes); or ``pattern(h, w)`` that returns, or an array that is, a permutation of
        the cells (h * w,) or several of them (routes, h * w).

    Returns
    -------
    ScanRoute
        Unpacks as ``order, inverse``.

    Raises
    ------
    ValueError
        A side is below 1, the name is not known, or a row is no permutation of 0 .. h * w - 1.
    """
    if h < 1 or w < 1:
        raise ValueError(f"h and w must be at least 1, got {h} and {w}")
    if isinstance(pattern, str):
        if pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {tuple(PATTERNS)}, a callable or an array, got {pattern!r}")
        return _named(h, w, pattern)
    given = np.asarray(pattern(h, w) if callable(pattern) else pattern)
    return _with_inverse(np.atleast_2d(given), h * w)


@lru_cache(maxsize=256)
def _named(h: int, w: int, pattern: str) -> ScanRoute:
    found = _with_inverse(np.stack([np.asarray(route).ravel() for route in PATTERNS[pattern](h, w)]), h * w)
    for array in found:  # they are shared by all callers
        array.flags.writeable = False
    return found


def _with_inverse(order: np.ndarray, n: int) -> ScanRoute:
    if order.ndim != 2 or order.dtype.kind not in "iu" or order.shape[1] != n or not len(order):
        raise ValueError(
            f"pattern must give whole numbers of shape (h * w,) or (routes, h * w) with h * w = {n}, "
            f"got {order.dtype} of shape {order.shape}"
        )
    order = order.astype(np.int64)
    for r, row in enumerate(order):
        if not np.array_equal(np.sort(row), np.arange(n)):
            missing = np.setdiff1d(np.arange(n), row)[:3]
            raise ValueError(f"pattern must visit every cell once; route {r} does not visit {missing.tolist()}")
    inverse = np.empty_like(order)
    np.put_along_axis(inverse, order, np.arange(n)[None], axis=1)
    return ScanRoute(order, inverse)


def _cells(h: int, w: int) -> np.ndarray:
    return np.arange(h * w).reshape(h, w)


def _raster(h: int, w: int) -> tuple[np.ndarray, ...]:
    cells = _cells(h, w)
    return cells, cells.T


def _turned(cells: np.ndarray) -> np.ndarray:
    """Reverse every second row, so that a row begins where the last one ended."""
    cells = cells.copy()
    cells[1::2] = cells[1::2, ::-1]
    return cells


def _snake(h: int, w: int) -> tuple[np.ndarray, ...]:
    cells = _cells(h, w)
    return _turned(cells), _turned(cells.T)


def _diagonal(h: int, w: int) -> tuple[np.ndarray, ...]:
    i, j = (part.ravel() for part in np.indices((h, w)))
    k = i + j
    # Odd anti-diagonals run down (growing row), even ones up.
    order = np.lexsort((np.where(k % 2 == 0, -i, i), k))
    return order, order // w * w + (w - 1 - order % w)


def _spiral(h: int, w: int) -> tuple[np.ndarray, ...]:
    left, pieces = _cells(h, w), []
    while left.size:
        pieces.append(left[0])
        left = np.rot90(left[1:])  # the right column becomes the first row
    order = np.concatenate(pieces)
    return order, (h - 1 - order // w) * w + order % w


def _hilbert(h: int, w: int) -> tuple[np.ndarray, ...]:
    side = 1 << max(h - 1, w - 1, 0).bit_length()

    def key(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y, place = x.copy(), y.copy(), np.zeros(x.shape, dtype=np.int64)
        s = side // 2
        while s:
            right, low = (x & s) > 0, (y & s) > 0
            place += s * s * ((3 * right) ^ low)
            flip = right & ~low
            x, y = (
                np.where(flip, s - 1 - (x & (s - 1)), x & (s - 1)),
                np.where(flip, s - 1 - (y & (s - 1)), y & (s - 1)),
            )
            x, y = np.where(low, x, y), np.where(low, y, x)
            s //= 2
        return place

    i, j = (part.ravel() for part in np.indices((h, w)))
    return np.argsort(key(j, i), kind="stable"), np.argsort(key(i, j), kind="stable")


def _morton(h: int, w: int) -> tuple[np.ndarray, ...]:
    bits = max(h - 1, w - 1, 0).bit_length()

    def key(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        return sum(
            (((high >> b) & 1) << (2 * b + 1) | ((low >> b) & 1) << (2 * b) for b in range(bits)), np.zeros_like(high)
        )

    i, j = (part.ravel() for part in np.indices((h, w)))
    return np.argsort(key(i, j), kind="stable"), np.argsort(key(j, i), kind="stable")


PATTERNS: dict[str, Callable[[int, int], tuple[np.ndarray, ...]]] = {
    "raster": _raster,
    "snake": _snake,
    "diagonal": _diagonal,
    "spiral": _spiral,
    "hilbert": _hilbert,
    "morton": _morton,
}
