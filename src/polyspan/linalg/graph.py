"""Graphs as SciPy sparse matrices: normalised adjacency, neighbour graphs, and the quality of a partition.

An affinity is *factored* where it is known as F Fᵀ with F (n, d): modularity and conductance then cost one product
with Fᵀ, and the n x n matrix is never formed.
"""

from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator


def _as_csr(A: Any, name: str = "A") -> sp.csr_array:
    """Return a square sparse matrix as CSR in a real floating type, its duplicates summed."""
    A = sp.csr_array(A)
    if A.shape[0] != A.shape[1]:
        raise ValueError(f"{name} must be square, got shape {A.shape}")
    if np.iscomplexobj(A):
        raise TypeError(f"{name} must be real, got dtype {A.dtype}")
    if A.dtype not in (np.float32, np.float64):
        A = A.astype(np.float64)
    return A


def _scaled(A: sp.csr_array, rows: np.ndarray, columns: np.ndarray | None = None) -> sp.csr_array:
    """Return diag(rows) A diag(columns) with new data on the old pattern."""
    data = A.data * np.repeat(rows, np.diff(A.indptr))
    if columns is not None:
        data *= columns[A.indices]
    return sp.csr_array((data, A.indices, A.indptr), shape=A.shape)


def normalized_adjacency(A: Any, kind: str = "symmetric", *, self_loops: float = 0.0) -> sp.csr_array:
    r"""Scale the weights of a graph by the degrees of their ends.

    With :math:`A' = A + s I` and its row sums :math:`D`: :math:`D^{-1/2} A' D^{-1/2}` (symmetric), whose eigenvalues
    lie in [-1, 1], or :math:`D^{-1} A'` (row), whose rows sum to one. A vertex of degree 0 keeps a row of zeros;
    degrees below 0, from signed weights, have no root and are refused.
    Source: any text on spectral graph theory.

    Parameters
    ----------
    A : sparse or dense matrix of shape (n, n)
        Weights, taken as they are: a directed graph is scaled by its out-degrees.
    kind : {"symmetric", "row"}
    self_loops : float, default=0.0
        Weight s that every vertex gets on top of a loop it may have.

    Returns
    -------
    csr_array of shape (n, n)
        In the float width of ``A``; float64 for integers.
    """
    if kind not in ("symmetric", "row"):
        raise ValueError(f"kind must be 'symmetric' or 'row', got {kind!r}")
    A = _as_csr(A)
    if self_loops:
        A = sp.csr_array(A + A.dtype.type(self_loops) * sp.eye_array(A.shape[0], dtype=A.dtype, format="csr"))
    degree = np.asarray(A.sum(axis=1), dtype=np.float64).ravel()
    if degree.size and not degree.min() >= 0:
        worst = int(np.flatnonzero(~(degree >= 0))[0])
        raise ValueError(f"A must have no negative and no NaN degree, got {degree[worst]} at vertex {worst}")
    power = -0.5 if kind == "symmetric" else -1.0
    scale = np.zeros_like(degree)
    np.power(degree, power, out=scale, where=degree > 0)
    scale = scale.astype(A.dtype)
    return _scaled(A, scale, scale if kind == "symmetric" else None)


def knn_graph(
    X: Any,
    k: int,
    *,
    mode: str = "connectivity",
    metric: str = "euclidean",
    symmetric: bool = True,
    n_jobs: int | None = None,
) -> sp.csr_array:
    """Join every row to its ``k`` nearest other rows.

    Ties, as among equal rows, are broken by the search's own order. Exact search: about n log n work in few dimensions,
    n² where there are many.

    Parameters
    ----------
    X : array or sparse matrix of shape (n, d)
    k : int
        Neighbours a row, at least 1 and below n.
    mode : {"connectivity", "distance"}
        Weights 1, or the distances.
    metric : str, default="euclidean"
        Any metric of :class:`sklearn.neighbors.NearestNeighbors`.
    symmetric : bool, default=True
        Keep an edge where either end chose it; otherwise row i holds only what i chose.

    Returns
    -------
    csr_array of shape (n, n)
        Without self loops, in float64 or, for float32 rows, float32.
    """
    from sklearn.neighbors import kneighbors_graph

    if mode not in ("connectivity", "distance"):
        raise ValueError(f"mode must be 'connectivity' or 'distance', got {mode!r}")
    n = X.shape[0]
    if not 1 <= k < n:
        raise ValueError(f"k must be between 1 and n - 1 = {n - 1}, got {k}")
    dtype = np.float32 if X.dtype == np.float32 else np.float64
    A = sp.csr_array(kneighbors_graph(X, int(k), mode=mode, metric=metric, include_self=False, n_jobs=n_jobs))
    A = A.astype(dtype)
    return sp.csr_array(A.maximum(A.T)) if symmetric else A


def _indicator(labels: Any, n: int, dtype: Any) -> tuple[np.ndarray, sp.csc_array]:
    """Return the sorted distinct labels and the 0/1 matrix (n, clusters) of who is where."""
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise ValueError(f"labels must have one entry a row of F, ({n},), got shape {labels.shape}")
    values, index = np.unique(labels, return_inverse=True)
    one = np.ones(n, dtype=dtype)
    return values, sp.csc_array((one, (np.arange(n), index)), shape=(n, len(values)))


def _cluster_weights(F: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Return, a cluster of F Fᵀ, the affinity inside and the volume; and the affinity in all."""
    n = F.shape[0]
    _, C = _indicator(labels, n, F.dtype if np.issubdtype(F.dtype, np.floating) else np.float64)
    if isinstance(F, LinearOperator):
        sums = F.T @ C.toarray()
    else:
        sums = (C.T @ F).T
        sums = sums.toarray() if sp.issparse(sums) else np.asarray(sums)
    sums = sums.astype(np.float64)
    whole = sums.sum(axis=1)
    inside, volume, total = (sums**2).sum(axis=0), sums.T @ whole, float(whole @ whole)
    if not total > 0:
        raise ValueError(f"F must have an affinity F Fᵀ whose entries sum to more than 0, got {total}")
    return inside, volume, total


def factored_modularity(F: Any, labels: Any, *, resolution: float = 1.0) -> float:
    r"""Newman's modularity of a partition under the affinity F Fᵀ, which is not formed.

    With :math:`\omega = F F^\top 1`, :math:`w = 1^\top\omega` and the 0/1 indicator C:
    :math:`\left(\lVert F^\top C\rVert_F^2 - \gamma \lVert \omega^\top C\rVert^2 / w\right) / w`. At resolution 1 it
    lies in [-1/2, 1) where the affinity has no negative entry, and one cluster of all scores 0; signed affinities may
    leave that range. The diagonal of F Fᵀ counts as self loops.
    Source: textbook (Newman), resolution after Reichardt and Bornholdt.

    Parameters
    ----------
    F : array, sparse matrix or LinearOperator of shape (n, d)
    labels : array of shape (n,)
    resolution : float, default=1.0

    Raises
    ------
    ValueError
        The affinities sum to nothing, or labels do not match the rows.
    """
    inside, volume, total = _cluster_weights(F, labels)
    return float((inside.sum() - resolution * (volume @ volume) / total) / total)


def factored_conductance(F: Any, labels: Any) -> np.ndarray:
    r"""Share of every cluster's affinity that leaves it, under the affinity F Fᵀ, which is not formed.

    :math:`\mathrm{cut}(c) / \min(\mathrm{vol}(c), \mathrm{vol}(\bar c))`, in [0, 1] where the affinity has no negative
    entry: 0 is cut off from the rest. A cluster that holds everything, or nothing but rows without affinity, scores 0;
    where signed affinities make a volume negative the number means nothing and is NaN.
    Source: textbook.

    Parameters
    ----------
    F : array, sparse matrix or LinearOperator of shape (n, d)
    labels : array of shape (n,)

    Returns
    -------
    ndarray of shape (clusters,)
        In the order of the sorted labels.
    """
    inside, volume, total = _cluster_weights(F, labels)
    cut, side = np.maximum(volume - inside, 0.0), np.minimum(volume, total - volume)
    tiny = total * np.finfo(np.float64).eps * 8
    share = np.zeros_like(cut)
    np.divide(cut, side, out=share, where=side > tiny)
    share[side < -tiny] = np.nan
    return share


def graph_modularity(A: Any, labels: Any) -> float:
    r"""Newman's modularity of a partition of a graph: :math:`\sum_c \mathrm{in}_c / w - (\mathrm{vol}_c / w)^2`.

    Weights of a loop count once. In [-1/2, 1) where no weight is negative; a graph without edges scores 0.
    Source: textbook (Newman).

    Parameters
    ----------
    A : sparse matrix of shape (n, n)
        Symmetric.
    labels : array of shape (n,)

    Raises
    ------
    ValueError
        ``labels`` do not match the rows.
    """
    A = _as_csr(A)
    _, C = _indicator(labels, A.shape[0], np.float64)
    volume = np.asarray(C.T @ A.sum(axis=1), dtype=np.float64).ravel()
    total = float(volume.sum())
    if total == 0:
        return 0.0
    inside = float((C.T @ A @ C).diagonal().sum())
    return inside / total - float(volume @ volume) / total**2
