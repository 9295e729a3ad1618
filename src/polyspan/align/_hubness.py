"""How unevenly a gallery is returned, and the cone that its vectors lie in."""

from typing import Any, NamedTuple

import numpy as np
from sklearn.utils.validation import check_array

from polyspan.linalg import top_k

from ._checks import check_count, scale_rows

FLOATS = [np.float64, np.float32]


class Hubness(NamedTuple):
    r"""How unevenly a gallery is returned.

    ``skewness`` is the third standardised moment of the k-occurrences: 0 where every item is returned equally often,
    about :math:`1/\sqrt{mk/n}` by chance alone, above 2 where a few items crowd out the rest. ``occurrences`` (n,)
    counts the lists an item is in; ``never_share`` in [0, 1] are the items in none; ``top_share`` in [0, 1] is the part
    of all places that the most returned hundredth of the items takes (one item at least).
    """

    skewness: float
    occurrences: np.ndarray
    never_share: float
    top_share: float


def hubness(queries: Any, gallery: Any, k: int = 10, *, metric: str = "cosine", exclude: Any = None) -> Hubness:
    r"""Measure how unevenly a gallery is returned: skewness of the counts :math:`N_k(x)` of lists that hold item x.

    Parameters
    ----------
    queries, gallery : arrays of shape (m, d) and (n, d)
        NumPy (a memory map will do) or torch, of one kind.
    k : int
        Length of a list. Where m k is much smaller than n, most items are never returned by chance alone.
    metric : {"cosine", "dot", "euclidean"}
    exclude : array of m ints, optional
        A gallery row that each query must not find: its own.

    Raises
    ------
    ValueError
        Widths differ, there is no row, a value is not finite, k is out of range, ``exclude`` is not one row a query, or
        the metric is unknown.
    """
    check_count("k", k)
    for name, rows in (("queries", queries), ("gallery", gallery)):
        _check_finite(rows, name)
    if exclude is not None:
        exclude = np.asarray(exclude)
        if exclude.shape != (len(queries),) or exclude.dtype.kind not in "iu":
            raise ValueError(
                f"exclude must be {len(queries)} whole numbers, one a query, got shape {exclude.shape}, {exclude.dtype}"
            )
    return count_hubs(np.asarray(top_k(queries, gallery, k, metric=metric, exclude=exclude).indices), gallery.shape[0])


def count_hubs(found: np.ndarray, n: int) -> Hubness:
    """Measure how unevenly lists (m, k) return the n rows of a gallery."""
    counts = np.bincount(found.ravel(), minlength=n)
    centred = counts - counts.mean()
    spread = float(np.mean(centred**2))
    skewness = float(np.mean(centred**3)) / spread**1.5 if spread > 0 else 0.0
    leaders = np.sort(counts)[::-1][: max(1, len(counts) // 100)]
    return Hubness(skewness, counts, float(np.mean(counts == 0)), float(leaders.sum() / counts.sum()))


def mean_pairwise_cosine(X: Any, Y: Any = None, *, nearest: int | None = None, block_rows: int = 8192) -> float:
    r"""Measure the cone that vectors lie in: the mean cosine over pairs, in [-1, 1], in linear time.

    Over all pairs of different rows of X it is :math:`(\lVert \sum_i u_i \rVert^2 - n) / (n(n-1))` of unit rows u; over
    pairs of a row of X and one of Y the inner product of the two mean unit rows.

    Parameters
    ----------
    X, Y : arrays of shape (n, d) and (m, d)
    nearest : int, optional
        Only each row's so many nearest others (of Y, where given), found exactly by blocks in quadratic time.

    Raises
    ------
    ValueError
        Fewer than two rows, a row is all zero or not finite, or widths differ.
    """
    check_count("block_rows", block_rows)
    X = _checked_rows(X, "X")
    Y = None if Y is None else _checked_rows(Y, "Y")
    if Y is not None and Y.shape[1] != X.shape[1]:
        raise ValueError(f"Y must have {X.shape[1]} features like X, got {Y.shape[1]}")
    if Y is None and len(X) < 2:
        raise ValueError(f"X must have at least 2 rows to pair, got {len(X)}")
    if nearest is not None:
        own = np.arange(len(X)) if Y is None else None
        check_count("nearest", nearest)
        found = top_k(X, X if Y is None else Y.astype(X.dtype), nearest, block_rows=block_rows, exclude=own)
        return float(np.mean(found.scores, dtype=np.float64))
    mean = mean_row(X, block_rows)
    if Y is not None:
        return float(mean @ mean_row(Y, block_rows))
    n = len(X)
    return float((n * (mean @ mean) - 1.0) / (n - 1))


def _check_finite(rows: Any, name: str, block_rows: int = 8192) -> None:
    """Refuse a gallery or queries, of NumPy or torch, that are empty or not finite; a memory map is read by blocks."""
    if not len(rows):
        raise ValueError(f"{name} must hold at least one row, got shape {tuple(rows.shape)}")
    for start in range(0, len(rows), block_rows):
        part = rows[start : start + block_rows]
        finite = np.isfinite(np.asarray(part.detach().cpu().double() if hasattr(part, "detach") else part))
        if not finite.all():
            row = start + int(np.argmin(finite.reshape(len(part), -1).all(axis=1)))
            raise ValueError(f"{name} must be finite, got NaN or infinity at row {row}")


def _checked_rows(X: Any, name: str) -> np.ndarray:
    found = check_array(X, dtype=FLOATS, input_name=name)
    some = found.any(axis=1)
    if not some.all():
        raise ValueError(f"{name} must have no all-zero row, got one at row {int(np.argmin(some))}")
    return found


def checked_relevant(relevant: Any, n_queries: int, n_gallery: int) -> np.ndarray:
    """Return the gallery rows that answer each query, (m, r) whole numbers, -1 where a query has fewer than r."""
    if relevant is None and n_queries != n_gallery:
        raise ValueError(f"relevant must be given for {n_queries} queries and {n_gallery} gallery rows")
    right = np.arange(n_queries) if relevant is None else np.asarray(relevant)
    right = right.reshape(len(right), -1)
    if len(right) != n_queries:
        raise ValueError(f"relevant must have one row a query ({n_queries}), got {len(right)}")
    if right.dtype.kind not in "iu" or right.min() < -1 or right.max() >= n_gallery:
        raise ValueError(
            f"relevant must hold rows of the gallery, 0..{n_gallery - 1}, or -1, got {right.dtype} from "
            f"{right.min()} to {right.max()}"
        )
    return right


def share_of_hits(found: Any, right: np.ndarray) -> float:
    """Share of queries with any of their right rows (m, r) among those found (m, k): in [0, 1]."""
    return float(np.mean((np.asarray(found)[:, :, None] == right[:, None, :]).any(axis=(1, 2))))


def unit_rows(
    X: np.ndarray, name: str, first: int = 0, *, made: bool = False, advice: str = "take a smaller rate"
) -> np.ndarray:
    """Return rows of length 1; those that have it up to rounding are left bit for bit.

    ``made`` rows are what a correction leaves of unit rows: of length 0 up to rounding, they have no direction, and the
    error gives ``advice``. ``first`` is the place of the first row among those of ``name``.
    """
    eps = np.finfo(X.dtype).eps
    scaled, norms = scale_rows(X, slack=8 * float(eps))
    gone = norms[:, 0] <= (64 * eps if made else 0)
    if gone.any():
        row = first + int(np.argmax(gone))
        if made:
            raise ValueError(f"{name} must leave something of every row, got nothing at row {row}; {advice}")
        raise ValueError(f"{name} must have no all-zero row when normalize=True, got one at row {row}")
    return scaled


def mean_row(X: np.ndarray, block_rows: int, *, unit: bool = True) -> np.ndarray:
    """Return the mean row in float64, of unit rows where asked; a block at a time."""
    total = np.zeros(X.shape[1])
    for start in range(0, len(X), block_rows):
        rows = X[start : start + block_rows].astype(np.float64)
        total += (scale_rows(rows)[0] if unit else rows).sum(axis=0)
    return total / len(X)
