"""Exact nearest neighbours by blocks, and the scores that judge a ranking."""

from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from ._namespace import is_torch, namespace, widen

METRICS = ("cosine", "dot", "euclidean")


class Neighbours(NamedTuple):
    """``indices`` (n_queries, k) into the gallery, best first, and their ``scores``: more is nearer."""

    indices: Any
    scores: Any


def top_k(
    queries: Any,
    gallery: Any,
    k: int,
    *,
    metric: str = "cosine",
    block_rows: int = 8192,
    query_rows: int = 1024,
    exclude: Any = None,
) -> Neighbours:
    """Find the k best gallery rows of each query exactly, never holding more than one block of scores.

    Parameters
    ----------
    queries, gallery : arrays of shape (n_queries, d) and (n, d)
        NumPy (a memory map will do) or torch, of one kind.
    k : int
        Between 1 and n (n - 1 where ``exclude`` is given).
    metric : {"cosine", "dot", "euclidean"}
        Scores: cosine in [-1, 1] (a zero row scores 0 with everything), inner product, or the negative distance.
    block_rows, query_rows : int
        Gallery and query rows a block.
    exclude : array of n_queries ints, optional
        A gallery row that each query must not find: its own.

    Raises
    ------
    ValueError
        Widths differ, there is no query, k is out of range, ``exclude`` is not one a query, the metric is unknown, or
        rows or their products are not finite.

    Notes
    -----
    Equal scores are ordered by index within the retained candidates.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"queries and gallery must be 2-d of one width, got {tuple(queries.shape)} and {tuple(gallery.shape)}"
        )
    if not queries.shape[0]:
        raise ValueError(f"queries must hold at least one row, got shape {tuple(queries.shape)}")
    room = gallery.shape[0] - (exclude is not None)
    if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= room:
        raise ValueError(f"k must be between 1 and {room}, got {k!r}")
    if exclude is not None and len(exclude) != queries.shape[0]:
        raise ValueError(f"exclude must be one a query, {queries.shape[0]}, got {len(exclude)}")
    if metric not in METRICS:
        raise ValueError(f"metric must be 'cosine', 'dot' or 'euclidean', got {metric!r}")
    xp = namespace(queries, gallery)
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is refused below
        found = [
            _block_top_k(
                xp,
                queries[i : i + query_rows],
                gallery,
                k,
                metric,
                block_rows,
                None if exclude is None else exclude[i : i + query_rows],
            )
            for i in range(0, queries.shape[0], query_rows)
        ]
    indices, scores = (xp.concat([part[i] for part in found], axis=0) for i in range(2))
    # What is not finite sorts before all else, so that one look at the end suffices.
    if not bool(xp.all(xp.isfinite(scores))):
        _refuse(xp, queries, gallery, block_rows)
    return Neighbours(indices, scores)


def _refuse(xp: Any, queries: Any, gallery: Any, block_rows: int) -> None:
    """Raise ValueError that names the first row which is not finite, or says that products overflow."""
    for name, rows in (("queries", queries), ("gallery", gallery)):
        for start in range(0, rows.shape[0], block_rows):
            fine = xp.all(xp.isfinite(widen(rows[start : start + block_rows])[0]), axis=1)
            if not bool(xp.all(fine)):
                row = start + int(xp.nonzero(~fine)[0][0])
                raise ValueError(f"{name} must be finite, got NaN or infinity in row {row}")
    raise ValueError("queries and gallery must have finite products, got rows whose squares or products overflow")


def _block_top_k(xp, queries, gallery, k, metric, block_rows, exclude):
    Q = widen(queries)[0]
    if metric == "cosine":
        Q = _unit(xp, Q)
    best_scores = best_indices = None
    for start in range(0, gallery.shape[0], block_rows):
        G = xp.astype(widen(gallery[start : start + block_rows])[0], Q.dtype)
        if metric == "cosine":
            G = _unit(xp, G)
        scores = Q @ G.T
        if metric == "euclidean":
            squared = xp.sum(Q * Q, axis=1)[:, None] + xp.sum(G * G, axis=1)[None, :] - 2 * scores
            scores = -xp.sqrt(xp.clip(squared, 0.0, None))
        if exclude is not None:
            own = xp.asarray(exclude) - start
            rows = xp.nonzero((own >= 0) & (own < G.shape[0]))[0]
            scores[rows, own[rows]] = -xp.inf
        part_scores, part = _largest(scores, min(k, G.shape[0]))
        part = part + start
        if best_scores is not None:
            part_scores = xp.concat([best_scores, part_scores], axis=1)
            part = xp.concat([best_indices, part], axis=1)
            part_scores, order = _largest(part_scores, min(k, part_scores.shape[1]))
            part = xp.take_along_axis(part, order, axis=1) if not is_torch(part) else part.gather(1, order)
        best_scores, best_indices = part_scores, part
    return best_indices, best_scores


def _largest(scores, k):
    """Return the k largest of each row, descending, ties by position."""
    if is_torch(scores):
        values, order = scores.topk(k, dim=1, sorted=True)
        return values, order
    if k < scores.shape[1]:
        chosen = np.argpartition(scores, -k, axis=1)[:, -k:]
        chosen.sort(axis=1)
    else:
        chosen = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    values = np.take_along_axis(scores, chosen, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(chosen, order, axis=1)


def _unit(xp, X):
    norms = xp.linalg.vector_norm(X, axis=-1, keepdims=True)
    # A length that overflowed would make a row of zeros: not a number is found out.
    norms = xp.where(xp.isfinite(norms), norms, xp.asarray(xp.nan, dtype=norms.dtype))
    return X / xp.where(norms == 0, xp.ones_like(norms), norms)


def recall_at_k(found: Any, relevant: Any) -> float:
    """Share of the relevant items that a ranking holds, averaged over queries: in [0, 1].

    Parameters
    ----------
    found : array of shape (n_queries, k)
        Indices that were returned.
    relevant : array of shape (n_queries,) or (n_queries, r)
        The right ones: the twin of each query, or the exact neighbours that an approximation should find.
    """
    found, relevant = np.asarray(found), np.asarray(relevant)
    relevant = relevant.reshape(len(relevant), -1)
    if len(found) != len(relevant):
        raise ValueError(f"found and relevant must have one row a query, got {len(found)} and {len(relevant)} rows")
    return float(np.mean([np.isin(r, f).mean() for f, r in zip(found, relevant, strict=True)]))


def label_hits(query_labels: Any, gallery_labels: Any, indices: Any) -> np.ndarray:
    """Return which of the found rows carry the query's label, (n_queries, k) bool."""
    return np.asarray(gallery_labels)[np.asarray(indices)] == np.asarray(query_labels)[:, None]


def reciprocal_rank(hits: Any) -> float:
    """Mean of 1 / rank of the first hit, 0 where there is none; ``hits`` is (n_queries, k) bool, best first."""
    hits = np.asarray(hits, dtype=bool)
    first = hits.argmax(axis=1)
    return float(np.mean(np.where(hits.any(axis=1), 1.0 / (first + 1.0), 0.0)))


def mean_average_precision(
    queries: Any,
    gallery: Any,
    query_labels: Any,
    gallery_labels: Any,
    *,
    metric: str = "cosine",
    exclude_self: bool = False,
    query_rows: int = 512,
) -> float:
    """Average precision of the whole ranking of each query, averaged: in [0, 1].

    A gallery row is relevant where it has the query's label; queries that have no relevant row are left out.

    Raises
    ------
    ValueError
        No query has a relevant gallery row.
    """
    query_labels, gallery_labels = np.asarray(query_labels), np.asarray(gallery_labels)
    total, counted = 0.0, 0
    n = len(gallery_labels)
    for start in range(0, len(query_labels), query_rows):
        stop = min(start + query_rows, len(query_labels))
        own = np.arange(start, stop) if exclude_self else None
        order = top_k(queries[start:stop], gallery, n - exclude_self, metric=metric, block_rows=n, exclude=own).indices
        hits = label_hits(query_labels[start:stop], gallery_labels, np.asarray(order))
        ranks = np.arange(1, hits.shape[1] + 1)
        precision = np.cumsum(hits, axis=1) / ranks
        n_relevant = hits.sum(axis=1)
        some = n_relevant > 0
        total += float(((precision * hits).sum(axis=1)[some] / n_relevant[some]).sum())
        counted += int(some.sum())
    if counted == 0:
        raise ValueError("query_labels must share at least one label with gallery_labels, got none in common")
    return total / counted
