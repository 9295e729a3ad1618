"""Which items of a lifted gallery to embed again first, what that gains, and doing it in pieces."""

import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from polyspan.io import digest_array
from polyspan.linalg import label_hits, mean_average_precision, top_k
from polyspan.run import Journal

from ._checks import check_labels

BLOCK_ROWS = 65_536


class BackfillCurve(NamedTuple):
    """``scores`` of retrieval at each of the ``shares`` of the gallery embedded again, and the ``area`` below.

    The area is the mean score over shares from the first to the last, by the trapezoid rule.
    """

    shares: np.ndarray
    scores: np.ndarray
    area: float


def backfill_distances(batches: Callable[[], Iterable[Any]], labels: Any, *, metric: str = "euclidean") -> np.ndarray:
    """Distance of every lifted gallery vector from the mean of its class, (n,), in two passes over batches.

    Parameters
    ----------
    batches : callable
        Returns the rows anew, batch by batch, each time it is called: two passes, never all rows in memory.
    labels : array of shape (n,)
    metric : {"euclidean", "cosine"}
        1 - cosine, in [0, 2]; a row or mean of zeros is at distance 1.

    Raises
    ------
    ValueError
        The metric is unknown, rows are not finite, or there is not one label a row.
    """
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"metric must be 'euclidean' or 'cosine', got {metric!r}")
    classes, codes = np.unique(check_labels(labels, "labels"), return_inverse=True)
    means = _class_means(batches(), codes, len(classes))
    found, done = np.empty(len(codes)), 0
    for batch in batches():
        rows = np.asarray(batch, dtype=np.float64)
        mine = means[codes[done : done + len(rows)]]
        if metric == "euclidean":
            part = np.linalg.norm(rows - mine, axis=1)
        else:
            lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(mine, axis=1)
            part = 1 - np.sum(rows * mine, axis=1) / np.where(lengths > 0, lengths, np.inf)
        found[done : done + len(rows)] = part
        done += len(rows)
    return found


def _class_means(batches: Iterable[Any], codes: np.ndarray, n_classes: int) -> np.ndarray:
    """Return the mean row (n_classes, d) of every class in one pass."""
    sums, done = None, 0
    for batch in batches:
        rows = _checked(batch, done)
        own = codes[done : done + len(rows)]
        done += len(rows)
        if len(own) < len(rows):
            break
        sums = np.zeros((n_classes, rows.shape[1])) if sums is None else sums
        members = sp.csc_array((np.ones(len(own)), own, np.arange(len(own) + 1)), shape=(n_classes, len(own)))
        sums += members @ rows
    if sums is None or done != len(codes):
        more = " or more" if done > len(codes) else ""
        raise ValueError(f"labels must be one a row, got {len(codes)} labels for {done} rows{more}")
    return sums / np.bincount(codes, minlength=n_classes)[:, None]


def _checked(rows: Any, first: int) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"lifted must be 2-d, one row an item, got shape {rows.shape}")
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(f"lifted must be finite, got NaN or infinity at row {first + int(np.argmin(finite))}")
    return rows


def backfill_order(
    lifted: Any,
    labels: Any = None,
    *,
    metric: str = "euclidean",
    n_clusters: int | None = None,
    random_state: int | None = 0,
) -> np.ndarray:
    r"""Order in which to embed a gallery again: items farthest from the mean of their class first.

    They are the ones that the forward map lifted worst, or that lie where classes meet; each gains most, and stays
    longest in the way, while the mean of its class is right already. Equal distances keep the order of the rows. What
    the order gains is seen in mean average precision, where old and new differ much; it hardly moves the first hit.
    Source: catalogue entry ``lambda-orthogonality``.

    Parameters
    ----------
    lifted : array of shape (n, d)
        The gallery after :meth:`~polyspan.align.RelaxedOrthogonalAdapter.transform_old`; a memory map is read in
        blocks.
    labels : array of shape (n,), optional
        Classes. Without them k-means makes some, with a warning: no gain was measured that way.
    metric : {"euclidean", "cosine"}
    n_clusters : int, optional
        Clusters where there are no labels; left out, the square root of n.
    random_state : int, optional
        Of k-means.

    Returns
    -------
    ndarray of n ints
        Rows of ``lifted``, the first to be embedded first.

    Raises
    ------
    ValueError
        See :func:`backfill_distances`.
    """
    lifted = np.asarray(lifted) if not hasattr(lifted, "shape") else lifted
    if labels is None:
        from sklearn.cluster import MiniBatchKMeans

        warnings.warn("no labels: classes are made by k-means, and what the order gains is uncertain", stacklevel=2)
        rows = _checked(lifted, 0)
        k = n_clusters or max(1, round(len(rows) ** 0.5))
        labels = MiniBatchKMeans(min(k, len(rows)), random_state=random_state, n_init=3).fit(rows).labels_
    distances = backfill_distances(
        lambda: (lifted[i : i + BLOCK_ROWS] for i in range(0, len(lifted), BLOCK_ROWS)), labels, metric=metric
    )
    return np.argsort(-distances, kind="stable")


def backfill_curve(
    lifted: Any,
    renewed: Any,
    order: Any,
    labels: Any,
    *,
    queries: Any = None,
    query_labels: Any = None,
    shares: Sequence[float | int] = tuple(i / 10 for i in range(11)),
    metric: str = "map",
) -> BackfillCurve:
    """Measure retrieval while a gallery is embedded again in a given order, and the area under the curve.

    Parameters
    ----------
    lifted : array of shape (n, d)
        The gallery's old vectors, carried by the forward map.
    renewed : array of shape (n, d)
        The same items by the new encoder, carried by the backward map.
    order : array of n ints
        A permutation, such as :func:`backfill_order` gives.
    labels : array of shape (n,)
        A hit is an item of the query's label.
    queries, query_labels : arrays of shape (m, d) and (m,), optional
        Adapted new queries; left out, the gallery's own new vectors ask, each leaving out its own item.
    shares : sequence of float
        Ascending, in [0, 1].
    metric : {"map", "top1"}
        Mean average precision, or the share of queries whose first hit has their label.

    Raises
    ------
    ValueError
        Shapes do not fit, ``order`` is no permutation, or a setting is unknown.
    """
    lifted, renewed, labels, order = (np.asarray(part) for part in (lifted, renewed, labels, order))
    n = len(lifted)
    if lifted.ndim != 2 or lifted.shape != renewed.shape or labels.shape != (n,):
        raise ValueError(
            "lifted, renewed and labels must be of the same items in one space, "
            f"got shapes {lifted.shape}, {renewed.shape} and {labels.shape}"
        )
    if order.shape != (n,) or not np.array_equal(np.sort(order), np.arange(n)):
        raise ValueError(f"order must be a permutation of 0 to {n - 1}, got shape {order.shape} or repeated rows")
    steps = np.asarray(shares, dtype=np.float64)
    if steps.ndim != 1 or len(steps) < 2 or steps[0] < 0 or steps[-1] > 1 or (np.diff(steps) <= 0).any():
        raise ValueError(f"shares must ascend within [0, 1], two at least, got {list(shares)}")
    if metric not in ("map", "top1"):
        raise ValueError(f"metric must be 'map' or 'top1', got {metric!r}")
    if (queries is None) != (query_labels is None):
        raise ValueError("queries and query_labels must be given together, got one of them")
    own = queries is None
    asked, wanted = (renewed, labels) if own else (np.asarray(queries), np.asarray(query_labels))
    scores = []
    for share in steps:
        mixed = np.array(lifted)
        done = order[: round(share * n)]
        mixed[done] = renewed[done]
        if metric == "map":
            scores.append(mean_average_precision(asked, mixed, wanted, labels, exclude_self=own))
        else:
            found = top_k(asked, mixed, 1, exclude=np.arange(n) if own else None).indices
            scores.append(float(label_hits(wanted, labels, found).mean()))
    area = np.trapezoid(scores, steps) / (steps[-1] - steps[0])
    return BackfillCurve(steps, np.array(scores), float(area))


def backfill_batches(
    order: Any, journal: Path | str, *, batch_rows: int = 512, budget: int | None = None
) -> Generator[np.ndarray]:
    """Hand out an order batch by batch, and go on where the last run stopped.

    A batch counts as done when the next is asked for: work that dies in between gets the same batch again. Every run
    with one journal continues the one before, and ``batch_rows`` and ``budget`` may change between runs.

    Parameters
    ----------
    order : array of shape (n,)
        Rows of the gallery or their ids, first to last.
    journal : path-like
        Where it is kept what is done.
    batch_rows : int
    budget : int, optional
        Items in all, over all runs; the rest of the order is left as it is.

    Raises
    ------
    ValueError
        A number is out of range, or the journal is of another order.
    """
    order = np.asarray(order)
    if order.ndim != 1:
        raise ValueError(f"order must have shape (n,), got {order.shape}")
    if batch_rows < 1:
        raise ValueError(f"batch_rows must be at least 1, got {batch_rows}")
    if budget is not None and budget < 0:
        raise ValueError(f"budget must be at least 0, got {budget}")
    digest = digest_array(
        order if order.dtype.kind in "iuf" else np.frombuffer("\n".join(map(str, order)).encode(), np.uint8)
    )
    kept = Journal(journal, {"work": "backfill", "order": digest})
    end = len(order) if budget is None else min(budget, len(order))
    while (start := sum(kept.done.values())) < end:
        batch = order[start : min(start + batch_rows, end)]
        yield batch
        kept.record(str(start), len(batch))
