"""Where patches stand: features as rows with their positions, block by block, and functions of position as targets."""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LEAST_IMAGES = 8
BLOCK_ROWS = 16384
TARGETS = ("row_col", "row", "cosine")


class Patches(NamedTuple):
    """Features with positions: ``rows`` gives blocks of rows (b, D); ``n_images`` is None for loose rows."""

    X: Any
    positions: np.ndarray
    n_rows: int
    width: int
    n_images: int | None
    extent: np.ndarray

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield rows and positions by blocks of whole images, or of loose rows; memory maps are read as they come."""
        if self.n_images is None:
            for start in range(0, self.n_rows, BLOCK_ROWS):
                part = slice(start, start + BLOCK_ROWS)
                yield checked(self.X[part], start), self.positions[part]
            return
        own = self.positions.ndim == 3
        per_image = self.n_rows // self.n_images
        step = max(1, BLOCK_ROWS // per_image)
        for start in range(0, self.n_images, step):
            images = np.asarray(self.X[start : start + step])
            where = (
                self.positions[start : start + step]
                if own
                else np.broadcast_to(self.positions, (len(images), *self.positions.shape))
            )
            rows = checked(images.reshape(-1, self.width), start * per_image)
            yield rows, where.reshape(len(rows), -1)


def checked(rows: Any, start: int) -> np.ndarray:
    """Return rows as an array of floats; refuse NaN and infinity by the number of the row."""
    rows = np.asarray(rows)
    if rows.dtype.kind != "f" or rows.dtype.itemsize < 4:
        rows = rows.astype(np.float32)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(f"X must be finite, got NaN or infinity in row {start + int(np.flatnonzero(~finite)[0])}")
    return rows


def as_array(X: Any) -> Any:
    """Open a path (mapped where the format allows) and take a tensor off its device; arrays pass through."""
    if isinstance(X, str | Path):
        from polyspan.io import read_array

        return read_array(X, ndim=None, finite=False)
    if hasattr(X, "detach"):
        X = X.detach().cpu()
        return X.float().numpy() if str(X.dtype) == "torch.bfloat16" else X.numpy()
    return X


def as_patches(X: Any, positions: Any, grid: Any) -> Patches:
    """Put features of patches and their positions together.

    Loose rows (n, D) need ``positions``; images (B, h, w, D) have their grid; (B, N, D) a square one, ``grid``, or
    ``positions`` (N, p) of all images or (B, N, p) of each.
    """
    if X.ndim == 2:
        if positions is None:
            raise ValueError(
                "This estimator requires y to be passed, but the target y is None: positions (n, p) of the rows "
                f"must be given for X of shape {X.shape}, or X be (B, h, w, D) or (B, N, D)"
            )
        where = _numbers(positions)
        if where.ndim == 1:
            where = where[:, None]
        if where.ndim != 2 or len(where) != len(X):
            raise ValueError(f"positions must have shape ({len(X)}, p), got {where.shape}")
        return Patches(X, where, len(X), X.shape[1], None, _extent(where))
    if X.ndim not in (3, 4):
        raise ValueError(f"X must be (n, D), (B, N, D) or (B, h, w, D), got shape {X.shape}")
    n_images, width, n = X.shape[0], X.shape[-1], math.prod(X.shape[1:-1])
    if n_images * n == 0:
        raise ValueError(f"X must hold at least one patch, got shape {X.shape}")
    if positions is not None:
        where = _numbers(positions)
        if where.shape == (n,):
            where = where[:, None]
        elif X.ndim == 4 and where.shape[:-1] == X.shape[1:-1]:
            where = where.reshape(n, -1)
        if where.shape[:-1] not in ((n,), (n_images, n)):
            raise ValueError(f"positions must have shape ({n}, p) or ({n_images}, {n}, p), got {where.shape}")
        return Patches(X, where, n_images * n, width, n_images, _extent(where))
    if X.ndim == 4 and grid is not None and tuple(grid) != X.shape[1:3]:
        raise ValueError(f"grid must be {X.shape[1:3]}, as X has it, or None, got {tuple(grid)}")
    h, w = X.shape[1:-1] if X.ndim == 4 else _grid(n, grid)
    where = grid_positions(h, w)
    return Patches(X, where, n_images * n, width, n_images, np.array([[0.0, 0.0], [1.0, 1.0]]))


def grid_positions(h: int, w: int) -> np.ndarray:
    """Return (row, column) of every cell of a grid in raster order, (h w, 2), each in [0, 1]."""
    rows, columns = np.meshgrid(np.arange(h) / max(h - 1, 1), np.arange(w) / max(w - 1, 1), indexing="ij")
    return np.stack([rows.ravel(), columns.ravel()], axis=1)


def _grid(n: int, grid: Any) -> tuple[int, int]:
    if grid is not None:
        h, w = (int(side) for side in grid)
        if h < 1 or w < 1 or h * w != n:
            raise ValueError(f"grid must be (h, w) with h * w = {n} patches, got {tuple(grid)}")
        return h, w
    side = math.isqrt(n)
    if side * side == n:
        return side, side
    extra = next((k for k in (1, 5) if n > k and math.isqrt(n - k) ** 2 == n - k), None)
    hint = ""
    if extra is not None:
        what = "a class token" if extra == 1 else "a class token and 4 registers"
        hint = f"; {n - extra} is a square: leave out {what} first"
    raise ValueError(f"grid must be given for {n} patches an image, which is not a square{hint}")


def _numbers(positions: Any) -> np.ndarray:
    where = np.asarray(as_array(positions))
    if where.dtype.kind == "O":
        where = where.astype(np.float64)
    if where.dtype.kind not in "fiub":
        raise ValueError(f"positions must be numbers, got dtype {where.dtype}")
    where = where.astype(np.float64)
    if not np.isfinite(where).all():
        raise ValueError("positions must be finite, got NaN or infinity")
    return where


def _extent(where: np.ndarray) -> np.ndarray:
    flat = where.reshape(-1, where.shape[-1])
    return np.stack([flat.min(axis=0), flat.max(axis=0)])


def unit_positions(where: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """Scale positions such that ``extent`` (2, p), lowest and highest, becomes 0 and 1."""
    low, high = extent
    span = high - low
    return (where - low) / np.where(span > 0, span, 1.0)


def make_targets(kind: str | Callable, order: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from positions (b, p) in [0, 1] to targets (b, t)."""
    if not isinstance(kind, str):
        return kind
    if kind == "row":
        return lambda where: where[:, :1]
    if kind == "row_col":
        return lambda where: where

    def cosine(where: np.ndarray) -> np.ndarray:
        waves = np.cos(np.pi * np.arange(order + 1) * where[:, :, None])
        made = [
            np.prod([waves[:, axis, power] for axis, power in enumerate(powers)], axis=0)
            for powers in itertools.product(range(order + 1), repeat=where.shape[1])
            if any(powers)
        ]
        return np.stack(made, axis=1)

    return cosine
