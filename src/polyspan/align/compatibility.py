"""Say whether vectors of a new encoder may search an index of an old one, over any number of updates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ._checks import check_count, check_labels
from ._prototypes import as_rows, unit_rows

WIDTHS = ("equal", "truncate", "pad")
METRICS = ("map", "top-1", "top-5")


class RetrievalScores(NamedTuple):
    """Scores of a search: ``cmc``, by k the share of queries with a hit in k; ``map``, mean average precision.

    All in [0, 1]. ``n_queries`` counts the queries that have an answer in the gallery; the others are left out.
    """

    cmc: dict[int, float]
    map: float
    n_queries: int


class Compatibility(NamedTuple):
    """Scores of new queries in an old gallery, and what they are compared with.

    ``reference``: old queries in the same gallery, or None. ``gain``: by metric, the score less the reference's.
    ``compatible``: whether the gain is positive in mean average precision and in the first of the ks, which is the
    criterion of backward compatibility; None without reference. ``update_gain``: by metric, the gain as a share of what
    an independently trained model gains in its own gallery; None where that is not given.
    """

    scores: RetrievalScores
    reference: RetrievalScores | None
    gain: dict[str, float] | None
    compatible: bool | None
    update_gain: dict[str, float] | None


class CompatibilityMatrix(NamedTuple):
    r"""Every model's queries in every earlier model's gallery.

    ``scores`` (T, T): row i is the model of the queries, column j that of the gallery; NaN above the diagonal. With C
    the scores, ``average_compatibility`` is the share of pairs i > j with :math:`C_{ij} > C_{jj}`, NaN for one model,
    and ``average_score`` the mean of C on and below the diagonal: the average multi-model compatibility and accuracy.
    """

    scores: np.ndarray
    average_compatibility: float
    average_score: float
    metric: str


def truncate_vectors(X: Any, width: int) -> np.ndarray:
    """Return the first ``width`` numbers of each row, scaled to length 1: what searches an older index by cosine.

    Parameters
    ----------
    X : array of shape (n, d)
    width : int
        Between 1 and d.

    Raises
    ------
    ValueError
        The width is out of range, or a row has nothing in its first numbers.
    """
    X = as_rows(X, "X")
    if not 1 <= width <= X.shape[1]:
        raise ValueError(f"width must be between 1 and {X.shape[1]}, got {width}")
    return unit_rows(X[:, :width], "the first numbers of X")


def pad_vectors(X: Any, width: int) -> np.ndarray:
    """Append zeros to old vectors, scaled to length 1, so that they fit a store of a newer model's width.

    For one query, inner products with padded old vectors rank as cosines of the first numbers do. They are smaller
    than those, by the length of the query's first numbers; so in a store that holds new vectors as well, old ones lose.

    Parameters
    ----------
    X : array of shape (n, d)
    width : int
        At least d.

    Raises
    ------
    ValueError
        The width is too small, or a row is zero.
    """
    X = unit_rows(as_rows(X, "X"), "X")
    if width < X.shape[1]:
        raise ValueError(f"width must be at least {X.shape[1]}, got {width}")
    return np.pad(X, ((0, 0), (0, width - X.shape[1])))


def evaluate_compatibility(
    query: Any,
    gallery: Any,
    query_labels: Any,
    gallery_labels: Any,
    exclude_self: bool = False,
    *,
    reference: Any = None,
    independent: RetrievalScores | None = None,
    ks: Sequence[int] = (1, 5),
    widths: str = "equal",
    query_rows: int = 512,
) -> Compatibility:
    """Measure how well new queries find items of their label in an old gallery, and whether that is an improvement.

    Vectors are compared by cosine. Items of equal score share the worst place among them, so that an encoder that maps
    all to one point scores nothing; the average precision then equals scikit-learn's. Memory grows with ``query_rows``
    times the gallery, not with the number of queries.
    Source: catalogue entry ``orthogonal-compatible-alignment``.

    Parameters
    ----------
    query : array of shape (m, d_new)
        NumPy or torch, of any length.
    gallery : array of shape (n, d_old)
    query_labels, gallery_labels : arrays of shape (m,) and (n,)
    exclude_self : bool
        Row i of queries and gallery are one item, which is not to be found.
    reference : array of shape (m, d_old), optional
        Old vectors of the queries, to be compared with.
    independent : RetrievalScores, optional
        Of an independently trained new model in its own gallery, the upper end of ``update_gain``.
    ks : sequence of int
        Lengths of the lists that are looked at.
    widths : {"equal", "truncate", "pad"}
        What to do where widths differ: refuse, cut the longer ones, or append zeros to the shorter ones. Both compare
        the common first numbers; cosines with padded vectors are smaller, the ranking of one query's is the same.

    Raises
    ------
    ValueError
        Widths differ and ``widths="equal"``; rows and labels do not match; a row is zero or not finite; no query has an
        item to be found; an argument is out of range.
    """
    score = _scores(query, gallery, query_labels, gallery_labels, exclude_self, ks, widths, query_rows)
    if reference is None:
        if independent is not None:
            raise ValueError("reference must be given with independent, got None")
        return Compatibility(score, None, None, None, None)
    reference = as_rows(reference, "reference")
    if len(reference) != len(query):
        raise ValueError(f"reference must hold one row a query ({len(query)}), got {len(reference)}")
    old = _scores(reference, gallery, query_labels, gallery_labels, exclude_self, ks, "equal", query_rows)
    mine, theirs = _by_name(score), _by_name(old)
    gain = {name: mine[name] - theirs[name] for name in mine}
    share = None
    if independent is not None:
        best = _by_name(independent)
        room = {name: best[name] - theirs[name] for name in gain if name in best}
        share = {name: gain[name] / room[name] if room[name] else float("nan") for name in room}
    passed = gain["map"] > 0 and gain[f"top-{min(ks)}"] > 0
    return Compatibility(score, old, gain, passed, share)


def compatibility_matrix(
    models: Sequence[Any],
    labels: Any,
    galleries: Sequence[Any] | None = None,
    gallery_labels: Any = None,
    *,
    metric: str = "map",
    exclude_self: bool | None = None,
    query_rows: int = 512,
) -> CompatibilityMatrix:
    """Measure a chain of models, each an update of the one before, against one another.

    Source: catalogue entry ``orthogonal-compatible-alignment``.

    Parameters
    ----------
    models : sequence of T arrays of shape (m, d_t)
        The same queries, embedded by each model, oldest first; widths may grow, and the first numbers are compared.
    labels : array of shape (m,)
    galleries : sequence of T arrays of shape (n, d_t), optional
        The same gallery by each model; left out, the queries are the gallery and a query's own row is left out.
    gallery_labels : array of shape (n,), optional
    metric : {"map", "top-1", "top-5"}
    exclude_self : bool, optional
        Whether row i of queries and gallery are one item; true where ``galleries`` is left out.

    Raises
    ------
    ValueError
        There is no model, or a model has other rows; see :func:`evaluate_compatibility`.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    if not len(models):
        raise ValueError("models must hold at least one array of vectors, got none")
    alone = galleries is None
    if alone != (gallery_labels is None):
        raise ValueError("galleries and gallery_labels must be given together, got one of them")
    stored, marks = (models, labels) if galleries is None else (galleries, gallery_labels)
    if len(stored) != len(models):
        raise ValueError(f"galleries must hold one array a model ({len(models)}), got {len(stored)}")
    for name, arrays in (("models", models), ("galleries", stored)):
        for i, rows in enumerate(arrays):
            if len(rows) != len(arrays[0]):
                raise ValueError(
                    f"{name} must hold the same items, got {len(arrays[0])} rows and {len(rows)} in number {i}"
                )
    own = alone if exclude_self is None else exclude_self
    ks = (1,) if metric != "top-5" else (5,)
    T = len(models)
    C = np.full((T, T), np.nan)
    for i in range(T):
        for j in range(i + 1):
            found = _scores(models[i], stored[j], labels, marks, own, ks, "truncate", query_rows)
            C[i, j] = _by_name(found)[metric]
    return CompatibilityMatrix(C, *average_compatibility(C), metric)


def average_compatibility(scores: Any) -> tuple[float, float]:
    """Return the average multi-model compatibility and the average multi-model score of a matrix, (T, T).

    The first is the share of pairs i > j with ``scores[i, j] > scores[j, j]``, NaN for one model; the second is the
    mean on and below the diagonal. What stands above it is not looked at.

    Raises
    ------
    ValueError
        The matrix is not square, or a value that counts is NaN.
    """
    C = np.asarray(scores, dtype=np.float64)
    if C.ndim != 2 or C.shape[0] != C.shape[1] or not len(C):
        raise ValueError(f"scores must be a square matrix, got shape {C.shape}")
    low = np.tril_indices(len(C))
    if np.isnan(C[low]).any():
        raise ValueError("scores must be numbers on and below the diagonal, got NaN")
    below = np.tril_indices(len(C), -1)
    better = C[below] > np.diag(C)[below[1]]
    return float(better.mean()) if len(better) else float("nan"), float(C[low].mean())


def _by_name(scores: RetrievalScores) -> dict[str, float]:
    return {**{f"top-{k}": value for k, value in scores.cmc.items()}, "map": scores.map}


def _common(query: Any, gallery: Any, widths: str) -> tuple[np.ndarray, np.ndarray]:
    if widths not in WIDTHS:
        raise ValueError(f"widths must be one of {WIDTHS}, got {widths!r}")
    Q, G = as_rows(query, "query"), as_rows(gallery, "gallery")
    a, b = Q.shape[1], G.shape[1]
    if a != b and widths == "equal":
        raise ValueError(
            f"query and gallery must have one width, got {a} and {b}: an index of an older model is searched with the "
            "first numbers of a newer one's vectors (widths='truncate') or is padded with zeros (widths='pad')"
        )
    if widths == "truncate":
        Q, G = Q[:, : min(a, b)], G[:, : min(a, b)]
    Q, G = unit_rows(Q, "query"), unit_rows(G, "gallery")
    if widths == "pad":
        Q, G = (np.pad(X, ((0, 0), (0, max(a, b) - X.shape[1]))) for X in (Q, G))
    return Q, G


def _scores(query, gallery, query_labels, gallery_labels, exclude_self, ks, widths, query_rows) -> RetrievalScores:
    """Count, for each item to be found, how many of its label and of all score as well or better.

    The gallery is sorted by label first, so that a query's items are one slice of its row of scores.
    """
    Q, G = _common(query, gallery, widths)
    y, marks = check_labels(query_labels, "query_labels"), check_labels(gallery_labels, "gallery_labels")
    for name, rows, found in (("query_labels", Q, y), ("gallery_labels", G, marks)):
        if found.shape != (len(rows),):
            raise ValueError(f"{name} must have shape {(len(rows),)}, got {found.shape}")
    if exclude_self and len(Q) != len(G):
        raise ValueError(f"exclude_self needs one gallery row a query, got {len(Q)} queries and {len(G)} rows")
    if not len(G):
        raise ValueError("gallery must hold at least one row, got none")
    if not len(ks):
        raise ValueError("ks must hold at least one length, got none")
    for k in ks:
        check_count("ks", k)
    check_count("query_rows", query_rows)
    kinds, codes = np.unique(marks, return_inverse=True)
    order = np.argsort(codes, kind="stable")
    place = np.empty(len(G), np.int64)
    place[order] = np.arange(len(G))
    ends = np.searchsorted(codes[order], np.arange(len(kinds) + 1))
    at = np.searchsorted(kinds, y).clip(max=len(kinds) - 1)
    known = kinds[at] == y
    G, dtype = G[order], np.promote_types(Q.dtype, G.dtype)
    first, precision = [], []
    for start in range(0, len(Q), query_rows):
        scores = (Q[start : start + query_rows] @ G.T).astype(dtype, copy=False)
        rows = np.arange(start, start + len(scores))
        if exclude_self:
            scores[rows - start, place[rows]] = -np.inf
        ascending = np.sort(scores, axis=1)
        for i in rows[known[rows]]:
            own = np.sort(scores[i - start, ends[at[i]] : ends[at[i] + 1]])
            own = own[own > -np.inf]
            if not len(own):
                continue
            # With ties a place is that of the last of them.
            places = len(G) - np.searchsorted(ascending[i - start], own, side="left")
            hits = len(own) - np.searchsorted(own, own, side="left")
            precision.append(np.mean(hits / places))
            first.append(places[-1] - hits[-1] + 1)
    if not first:
        raise ValueError("query_labels must share a label with gallery_labels, got no query with an item to be found")
    ranks = np.array(first)
    return RetrievalScores({int(k): float(np.mean(ranks <= k)) for k in ks}, float(np.mean(precision)), len(first))
