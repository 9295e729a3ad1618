"""What a graph is: its symmetric adjacency, attributes and labels, checked."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp

from ._door import PathLike
from ._sparse import check_sparse, refusal

MAX_DENSE = 20_000
Symmetrize = Literal["error", "max", "min", "mean", "sum"]
Duplicates = Literal["max", "sum", "error"]


class Graph(NamedTuple):
    """An undirected graph of n nodes.

    ``adjacency`` is CSR (n, n), symmetric, with weights >= 0 and self loops as they came; ``attributes`` (n, d) is CSR
    or an array, ``labels`` int64 (n,), and ``ids`` (n,) holds the name of each node: int64 or text.
    """

    adjacency: sp.csr_array
    attributes: sp.csr_array | np.ndarray | None = None
    labels: np.ndarray | None = None
    ids: np.ndarray | None = None


def as_adjacency(matrix: Any, path: PathLike | None, symmetrize: Symmetrize) -> sp.csr_array:
    """Return a checked symmetric adjacency with float weights >= 0."""
    if symmetrize not in ("error", "max", "min", "mean", "sum"):
        raise ValueError(f"symmetrize must be 'error', 'max', 'min', 'mean' or 'sum', got {symmetrize!r}")
    A = check_sparse(matrix, path)
    if A.shape[0] != A.shape[1]:
        raise refusal(path, f"shape {A.shape}", "a square adjacency")
    if A.shape[0] == 0:
        raise refusal(path, "no node", "a graph of at least one node")
    A = A.astype(A.dtype if A.dtype in (np.float32, np.float64) else np.float64)
    if A.nnz and A.data.min() < 0:
        at = int(np.argmin(A.data))
        row = int(np.searchsorted(A.indptr, at, side="right")) - 1
        raise refusal(path, f"weight {A.data[at]}", "weights >= 0", f"row {row}, column {A.indices[at]}")
    difference = sp.csr_array(A - A.T)
    difference.eliminate_zeros()
    if difference.nnz == 0:
        return A
    if symmetrize == "error":
        row = int(np.searchsorted(difference.indptr, 0, side="right")) - 1
        raise refusal(
            path,
            f"{difference.nnz:,} entries that differ from their mirror",
            "a symmetric adjacency, or symmetrize='max', 'min', 'mean' or 'sum'",
            f"row {row}, column {difference.indices[0]}",
        )
    off = A - sp.diags_array(A.diagonal(), format="csr")
    joined = {
        "max": lambda: A.maximum(A.T),
        "min": lambda: A.minimum(A.T),
        "mean": lambda: (A + A.T) / 2,
        "sum": lambda: A + off.T,
    }[symmetrize]()
    made = sp.csr_array(joined).astype(A.dtype)
    made.eliminate_zeros()
    made.sort_indices()
    return made


def check_dense(shape: Sequence[int], path: PathLike | None) -> None:
    n = max(shape)
    if n > MAX_DENSE:
        raise refusal(
            path,
            f"a dense adjacency of {n:,} nodes, {n * n * 8 / 2**30:.1f} GiB as float64",
            f"a scipy.sparse matrix for more than {MAX_DENSE:,} nodes",
        )


def from_edges(
    first: np.ndarray,
    second: np.ndarray,
    weights: np.ndarray | None,
    n: int,
    *,
    path: PathLike | None,
    duplicates: Duplicates,
    directed: bool,
    symmetrize: Symmetrize,
) -> sp.csr_array:
    """Return the adjacency of edges between node numbers 0..n-1."""
    if duplicates not in ("max", "sum", "error"):
        raise ValueError(f"duplicates must be 'max', 'sum' or 'error', got {duplicates!r}")
    values = np.ones(len(first)) if weights is None else np.asarray(weights, dtype=np.float64)
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        raise refusal(path, f"weight {values[bad[0]]}", "finite weights >= 0", f"edge {bad[0]}")
    if not directed:
        first, second = np.minimum(first, second), np.maximum(first, second)
    key = first.astype(np.int64) * n + second
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    if duplicates == "error" and len(starts) < len(key):
        again = order[np.setdiff1d(np.arange(len(key)), starts)[0]]
        raise refusal(path, "an edge that was there before", "every edge once", f"edge {again}")
    if len(key):
        joined = (np.add if duplicates == "sum" else np.maximum).reduceat(values[order], starts)
        rows, columns = np.divmod(key[order][starts], n)
    else:
        joined, rows, columns = values, first, second
    A = sp.coo_array((joined, (rows, columns)), shape=(n, n)).tocsr()
    if not directed:
        A = A + sp.triu(A, 1).T
    return as_adjacency(A, path, symmetrize if directed else "error")


def as_features(X: Any, n: int, path: PathLike | None) -> sp.csr_array | np.ndarray:
    """Return attributes of n nodes: CSR where they are sparse or mostly zero, in float."""
    if sp.issparse(X):
        X = check_sparse(X, path)
    else:
        X = np.asarray(X)
        if X.ndim != 2 or X.dtype.kind not in "fiub":
            raise refusal(path, f"shape {X.shape}, dtype {X.dtype}", "numbers, (n, d)", name="attributes")
        if X.dtype.kind == "f" and not np.isfinite(X).all():
            row = int(np.flatnonzero(~np.isfinite(X).all(axis=1))[0])
            raise refusal(path, "NaN or infinity", "finite numbers", f"row {row}", "attributes")
    if X.shape[0] != n or X.shape[1] == 0:
        raise refusal(path, f"attributes of shape {X.shape}", f"one row a node, {n}", name="attributes")
    narrow = X.dtype.itemsize <= (4 if X.dtype.kind == "f" else 2)
    X = X.astype(np.float32 if narrow else np.float64)
    if not sp.issparse(X) and X.size and np.count_nonzero(X) < 0.1 * X.size:
        X = sp.csr_array(X)
    return X


def as_classes(y: np.ndarray, n: int, path: PathLike | None) -> np.ndarray:
    """Return labels of n nodes as int64: MATLAB keeps them as uint8, whose sums overflow, or as double."""
    y = np.atleast_1d(y)
    if y.shape != (n,):
        raise refusal(path, f"labels of shape {y.shape}", f"one a node, {n}", name="labels")
    if y.dtype.kind == "U":
        return np.unique(y, return_inverse=True)[1].astype(np.int64)
    if y.dtype.kind not in "fiub" or not np.array_equal(y, np.floor(y) if y.dtype.kind == "f" else y):
        raise refusal(path, f"labels of dtype {y.dtype}", "whole numbers or text", name="labels")
    return y.astype(np.int64)
