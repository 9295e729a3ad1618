"""Where an encoder puts classes: the mean of its unit vectors, gathered in batches."""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from ._checks import scale_rows

UNIT_TOLERANCE = 1e-3


def as_rows(X: Any, name: str) -> np.ndarray:
    """Return vectors as a 2-d float array, from NumPy or torch."""
    X = X.detach().cpu().numpy() if hasattr(X, "detach") else np.asarray(X)
    if X.ndim != 2 or X.shape[1] == 0:
        raise ValueError(f"{name} must be 2-d, one vector a row, got shape {X.shape}")
    if X.dtype.kind not in "fiubO":
        raise ValueError(f"{name} must hold real numbers, got {X.dtype}")
    return X if X.dtype in (np.float32, np.float64) else X.astype(np.float64)


def unit_rows(X: np.ndarray, name: str, first: int = 0) -> np.ndarray:
    """Scale rows to length 1; a row that has no direction is refused by its number."""
    if not np.isfinite(X).all():
        row = first + int(np.flatnonzero(~np.isfinite(X).all(axis=1))[0])
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {row}")
    made, lengths = scale_rows(X)
    if not lengths.all():
        raise ValueError(f"{name} must have no all-zero row, got one at row {first + int(np.argmin(lengths[:, 0]))}")
    return made


def tell_of_lengths(X: np.ndarray, name: str, stacklevel: int) -> bool:
    """Return whether rows are unit vectors, and warn where they are not: only their direction is used."""
    lengths = scale_rows(X)[1]
    unit = bool(np.all(np.abs(lengths - 1) < UNIT_TOLERANCE))
    if not unit:
        warnings.warn(
            f"{name} holds vectors of length {lengths.min():.3g} to {lengths.max():.3g}, not 1: they are scaled to "
            "length 1, so search the old index by cosine, not by inner product",
            stacklevel=stacklevel + 1,
        )
    return unit


def class_prototypes(
    embeddings: Any,
    labels: Any = None,
    n_classes: int | None = None,
    *,
    renormalize: bool = False,
    allow_empty: bool = False,
) -> np.ndarray:
    r"""Return where an encoder puts each class, :math:`p_c = \operatorname{mean}_{i: y_i = c} x_i / \lVert x_i\rVert`.

    A class need not be one the encoder was trained on. Prototypes are shorter than 1, the more so the more a class is
    spread: as weights of a classifier that gives compact classes larger logits. Take the rows without augmentation.
    Source: catalogue entry ``orthogonal-compatible-alignment``.

    Parameters
    ----------
    embeddings : array of shape (n, d), or iterable of (rows, labels) pairs
        NumPy (a memory map will do) or torch; batches are added up, so that all rows need never be in memory.
    labels : array of n ints, optional
        From 0 to ``n_classes - 1``; left out where batches bring their own.
    n_classes : int, optional
        One more than the largest label, where left out.
    renormalize : bool
        Scale prototypes to length 1, which the paper does not.
    allow_empty : bool
        Give a class without rows the zero vector instead of an error; such a class is left out of the alignment.

    Returns
    -------
    ndarray of shape (n_classes, d)
        In the float width of the rows.

    Raises
    ------
    ValueError
        Rows and labels differ in number, a label is out of range, a class has no row, a row is zero or not finite.

    Warns
    -----
    UserWarning
        Rows are not of length 1.
    """
    batches: Iterable = _blocks(embeddings, labels) if labels is not None else embeddings
    if labels is None and hasattr(embeddings, "shape"):
        raise ValueError("labels must be given with an array of embeddings, got None")
    sums, counts, told, first, dtype = np.zeros((0, 0)), np.zeros(0, np.int64), False, 0, np.dtype(np.float32)
    for rows, marks in batches:
        X, y = as_rows(rows, "embeddings"), _labels(marks)
        if len(X) != len(y):
            raise ValueError(f"labels must have one entry a row of embeddings ({len(X)}), got {len(y)}")
        if not len(X):
            continue
        most = int(y.max()) + 1
        if y.min() < 0 or (n_classes is not None and most > n_classes):
            bound = "at least 0" if n_classes is None else f"between 0 and n_classes - 1 = {n_classes - 1}"
            raise ValueError(f"labels must be {bound}, got {y.min()} to {y.max()}")
        if sums.shape[1] not in (0, X.shape[1]):
            raise ValueError(f"embeddings must have one width, got {sums.shape[1]} and then {X.shape[1]}")
        unit = unit_rows(X, "embeddings", first)
        told = told or not tell_of_lengths(X, "embeddings", 2)
        size = max(most, len(sums), n_classes or 0)
        grown = np.zeros((size, X.shape[1]))
        grown[: len(sums)] = sums if sums.size else 0.0
        np.add.at(grown, y, unit.astype(np.float64))
        sums, counts = grown, np.bincount(y, minlength=size) + np.pad(counts, (0, size - len(counts)))
        dtype, first = np.promote_types(dtype, X.dtype), first + len(X)
    if not first:
        raise ValueError("embeddings must hold at least one row, got none")
    empty = np.flatnonzero(counts == 0)
    if len(empty) and not allow_empty:
        raise ValueError(
            f"every class must have a row, got none of {len(empty)} classes, the first {empty[:10].tolist()}; "
            "allow_empty=True leaves them out of the alignment"
        )
    means = sums / np.maximum(counts, 1)[:, None]
    if renormalize:
        lengths = np.linalg.norm(means, axis=1, keepdims=True)
        means = means / np.where(lengths > 0, lengths, 1.0)
    return means.astype(dtype)


def _labels(marks: Any) -> np.ndarray:
    y = np.asarray(marks.detach().cpu() if hasattr(marks, "detach") else marks)
    if y.ndim != 1 or (len(y) and y.dtype.kind not in "iu"):
        raise ValueError(f"labels must be one-dimensional integers from 0, got shape {y.shape} of {y.dtype}")
    return y.astype(np.int64)


def _blocks(embeddings: Any, labels: Any, block_rows: int = 16384) -> Iterable:
    y = _labels(labels)
    if len(y) != len(embeddings):
        raise ValueError(f"labels must have one entry a row of embeddings ({len(embeddings)}), got {len(y)}")
    return ((embeddings[i : i + block_rows], y[i : i + block_rows]) for i in range(0, len(y), block_rows))


def prototype_separability(embeddings: Any, labels: Any, prototypes: Any) -> np.ndarray:
    """Return for each class the share of its rows whose nearest prototype by cosine is its own, (n_classes,) in [0, 1].

    Classes that the old encoder never saw may lie on top of others; their prototypes are then a poor place to pull new
    vectors to, and this is a weight that says so. A class without rows gets 0.
    Source: catalogue entry ``orthogonal-compatible-alignment``; the weighting is ours.

    Parameters
    ----------
    embeddings : array of shape (n, d)
    labels : array of n ints
    prototypes : array of shape (n_classes, d)
    """
    P = as_rows(prototypes, "prototypes")
    lengths = np.linalg.norm(P, axis=1, keepdims=True)
    there = lengths[:, 0] > 0
    U = P / np.where(lengths > 0, lengths, 1.0)
    right, counts = np.zeros(len(P)), np.zeros(len(P))
    for rows, y in _blocks(embeddings, labels):
        scores = unit_rows(as_rows(rows, "embeddings"), "embeddings") @ U.T
        scores[:, ~there] = -np.inf
        counts += np.bincount(y, minlength=len(P))
        right += np.bincount(y[scores.argmax(axis=1) == y], minlength=len(P))
    return right / np.maximum(counts, 1)
