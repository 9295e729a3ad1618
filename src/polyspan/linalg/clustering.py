"""From a spectral embedding to groups, and from groups to the classes that were meant."""

from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import qr
from scipy.optimize import linear_sum_assignment


class Discretized(NamedTuple):
    """Labels (n,) in 0..k-1 of the best start, and the objective of every start in the order they were made."""

    labels: np.ndarray
    objectives: np.ndarray


def discretize_embedding(
    Y: np.ndarray,
    *,
    method: str = "snem",
    n_clusters: int | None = None,
    n_init: int = 10,
    max_iter: int = 100,
    rng: np.random.Generator | None = None,
) -> Discretized:
    r"""Turn an embedding with orthonormal columns into groups, not depending on signs or rotation of its columns.

    Every method looks for the partition, with normalised indicator C (n, k), that makes
    :math:`\operatorname{tr}(C^\top Y Y^\top C) = \sum_c \lVert\sum_{i\in c} y_i\rVert^2 / |c|` large; minus this, up to
    a constant, is the k-means cost of the rows of Y.

    * ``"snem"``: repeat :math:`R = Y^\top C`, :math:`l_i = \arg\max_j (YR)_{ij}`. The first start is ``"cluster_qr"``;
      the others take k rows of Y that are as orthogonal as can be, from a random first row. Starts are rows of Y, so
      the outcome turns with it. The step does not climb at every turn: the best partition met is kept.
    * ``"kmeans"``: scikit-learn's k-means on the rows. Slower; often reaches the larger objective.
    * ``"cluster_qr"``: one column-pivoted QR (Damle, Minden, Ying), without chance. It wants embeddings whose trivial
      vector has been kept.

    A wide spread of the objective over starts says that the groups are not to be trusted.
    Source: catalogue entry ``s2cag``.

    Parameters
    ----------
    Y : ndarray of shape (n, p)
        Rows are items.
    method : {"snem", "kmeans", "cluster_qr"}, default="snem"
    n_clusters : int, optional
        k, by default p. Only ``"kmeans"`` can have k != p.
    n_init : int, default=10
        Starts; ``"cluster_qr"`` has one.
    max_iter : int, default=100
        Rounds a start, fewer where a fixed point is reached.
    rng : Generator
        Needed by ``"snem"`` and ``"kmeans"``.

    Raises
    ------
    ValueError
        More clusters than rows, NaN, or a method that cannot have the number of clusters.
    """
    Y = np.asarray(Y)
    if Y.ndim != 2 or not Y.shape[1]:
        raise ValueError(f"Y must be a matrix (n, p) with p >= 1, got shape {Y.shape}")
    if not np.isfinite(Y).all():
        raise ValueError("Y must be finite, got NaN or infinity")
    n, p = Y.shape
    k = p if n_clusters is None else int(n_clusters)
    if not 1 <= k <= n:
        raise ValueError(f"n_clusters must be between 1 and the number of rows {n}, got {k}")
    if n_init < 1:
        raise ValueError(f"n_init must be at least 1, got {n_init}")
    if method not in ("snem", "kmeans", "cluster_qr"):
        raise ValueError(f"method must be 'snem', 'kmeans' or 'cluster_qr', got {method!r}")
    if method != "kmeans" and k != p:
        raise ValueError(f"method {method!r} needs one column of Y a cluster, got {p} columns for {k} clusters")
    if method == "cluster_qr":
        labels = _qr_labels(Y)
        return Discretized(labels, np.array([_objective(Y, labels, k)]))
    if rng is None:
        raise ValueError(f"rng must be a Generator for method {method!r}, got None")
    if method == "kmeans":
        runs = [_kmeans(Y, k, max_iter, rng) for _ in range(n_init)]
    else:
        starts = [_qr_labels(Y)] + [_orthogonal_rows(Y, int(rng.integers(n))) for _ in range(n_init - 1)]
        runs = [_snem(Y, labels, max_iter) for labels in starts]
    objectives = np.array([value for _, value in runs])
    return Discretized(runs[int(objectives.argmax())][0], objectives)


def _sums(Y: np.ndarray, labels: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums (k, p) of the rows of every group, and the sizes (k,), at least 1."""
    sums = np.stack([np.bincount(labels, weights=column, minlength=k) for column in Y.T], axis=1)
    return sums, np.maximum(np.bincount(labels, minlength=k), 1)


def _objective(Y: np.ndarray, labels: np.ndarray, k: int) -> float:
    sums, sizes = _sums(Y, labels, k)
    return float(((sums**2).sum(axis=1) / sizes).sum())


def _snem(Y: np.ndarray, labels: np.ndarray, max_iter: int) -> tuple[np.ndarray, float]:
    k = Y.shape[1]
    best, best_value = labels, -np.inf
    for _ in range(max_iter):
        sums, sizes = _sums(Y, labels, k)
        value = float(((sums**2).sum(axis=1) / sizes).sum())
        if value > best_value:
            best, best_value = labels, value
        R = (sums / np.sqrt(sizes)[:, None]).T.astype(Y.dtype)
        moved = (Y @ R).argmax(axis=1)
        if np.array_equal(moved, labels):
            return best, best_value
        labels = moved
    value = _objective(Y, labels, k)
    return (labels, value) if value > best_value else (best, best_value)


def _qr_labels(Y: np.ndarray) -> np.ndarray:
    """Choose k rows by pivoting, turn Y so that they come nearest to the axes, and take the largest entry."""
    pivots = qr(Y.T, mode="r", pivoting=True)[-1][: Y.shape[1]]
    U, _, Vh = np.linalg.svd(Y[pivots].T)
    return np.abs(Y @ (U @ Vh)).argmax(axis=1)


def _orthogonal_rows(Y: np.ndarray, first: int) -> np.ndarray:
    """Choose k rows, each the one least along those before it, and give every row to the nearest in direction."""
    norms = np.linalg.norm(Y, axis=1, keepdims=True)
    D = Y / np.where(norms > 0, norms, 1)
    along = np.where(norms[:, 0] > 0, 0.0, np.inf)
    chosen = [first]
    for _ in range(Y.shape[1] - 1):
        along = along + np.abs(D @ D[chosen[-1]])
        chosen.append(int(along.argmin()))
    return (D @ D[chosen].T).argmax(axis=1)


def _kmeans(Y: np.ndarray, k: int, max_iter: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    from sklearn.cluster import KMeans

    seed = int(rng.integers(2**31 - 1))
    labels = KMeans(k, n_init=1, max_iter=max(max_iter, 1), random_state=seed).fit(Y).labels_.astype(np.intp)
    return labels, _objective(Y, labels, k)


def _contingency(true: Any, pred: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    true, pred = np.asarray(true), np.asarray(pred)
    if true.ndim != 1 or true.shape != pred.shape or not len(true):
        raise ValueError(f"true and pred must be equally long and not empty, got shapes {true.shape} and {pred.shape}")
    classes, t = np.unique(true, return_inverse=True)
    clusters, p = np.unique(pred, return_inverse=True)
    counts = np.bincount(t * len(clusters) + p, minlength=len(classes) * len(clusters))
    return classes, clusters, p, counts.reshape(len(classes), len(clusters))


def clustering_accuracy(true: Any, pred: Any) -> float:
    """Share of items whose cluster stands for their class under the best one-to-one matching (Hungarian).

    Clusters beyond the number of classes match nothing and count as errors, so many small clusters do not help.
    Source: textbook.

    Parameters
    ----------
    true, pred : array-like of shape (n,)
        Names of any kind; which name a cluster has does not matter.
    """
    _, _, p, counts = _contingency(true, pred)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(p))


def align_labels(true: Any, pred: Any) -> np.ndarray:
    """Rename clusters by the classes that they match best, one to one (Hungarian).

    Clusters without a class get new integers above the largest class, in the order of their old names.

    Parameters
    ----------
    true, pred : array-like of shape (n,)

    Returns
    -------
    ndarray of shape (n,)

    Raises
    ------
    ValueError
        There are more clusters than classes, and the classes are no integers that could be continued.
    """
    classes, clusters, p, counts = _contingency(true, pred)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    spare = np.setdiff1d(np.arange(len(clusters)), columns)
    if not len(spare):
        names = np.empty(len(clusters), dtype=classes.dtype)
    elif np.issubdtype(classes.dtype, np.integer):
        names = np.empty(len(clusters), dtype=np.int64)
        names[spare] = int(classes.max()) + 1 + np.arange(len(spare))
    else:
        raise ValueError(
            f"true must have integer classes where there are more clusters ({len(clusters)}) than classes "
            f"({len(classes)}), got dtype {classes.dtype}"
        )
    names[columns] = classes[rows]
    return names[p]
