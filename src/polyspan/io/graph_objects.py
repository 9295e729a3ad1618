"""Attributed graphs in other libraries' objects, as one sparse symmetric matrix."""

from typing import Any

import numpy as np
import scipy.sparse as sp

from ._adjacency import Graph, Symmetrize, as_adjacency, as_classes, as_features, check_dense, from_edges


def as_graph(
    obj: Any, *, attributes: Any = None, labels: Any = None, symmetrize: Symmetrize = "error", weight: str = "weight"
) -> Graph:
    """Return what another library calls a graph as a :class:`Graph`.

    Parameters
    ----------
    obj : Graph, networkx graph, PyG Data, scipy.sparse matrix, dense matrix or edge_index
        Anything with ``edge_index`` counts as PyG Data; its ``x`` and ``y`` become attributes and labels. An integer
        array or tensor of shape (2, m) is an edge_index, where an edge given twice counts once.
    attributes, labels : array-like, optional
        Rows about the nodes, in the order of the nodes; they take the place of those in ``obj``.
    symmetrize : {"error", "max", "min", "mean", "sum"}
        What to do with weights that differ from their mirror.
    weight : str
        The edge attribute of a networkx graph that holds weights; edges without it weigh 1.

    Raises
    ------
    ValueError
        Not square, negative or not finite weights, other row counts, or a dense matrix of more than 20,000 nodes.
    TypeError
        Nothing of the above.
    """
    ids = None
    if isinstance(obj, Graph):
        A, ids = as_adjacency(obj.adjacency, None, symmetrize), obj.ids
        attributes = obj.attributes if attributes is None else attributes
        labels = obj.labels if labels is None else labels
    elif sp.issparse(obj):
        A = as_adjacency(obj, None, symmetrize)
    elif hasattr(obj, "edge_index"):
        attributes = getattr(obj, "x", None) if attributes is None else attributes
        labels = getattr(obj, "y", None) if labels is None else labels
        n = _node_count(obj, attributes)
        weights = getattr(obj, "edge_weight", None)
        A = _edge_index(_numpy(obj.edge_index), None if weights is None else _numpy(weights), n, symmetrize)
    elif hasattr(obj, "adj") and hasattr(obj, "nodes") and hasattr(obj, "edges"):
        A, ids = _networkx(obj, symmetrize, weight)
    elif hasattr(obj, "shape") and hasattr(obj, "dtype"):
        array = _numpy(obj)
        if array.ndim == 2 and array.shape[0] == 2 and array.dtype.kind in "iu" and array.shape[1] != 2:
            A = _edge_index(array, None, None if attributes is None else attributes.shape[0], symmetrize)
        else:
            if array.ndim != 2:
                raise ValueError(f"graph must be 2-d, got shape {array.shape}")
            check_dense(array.shape, None)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
                raise ValueError(f"graph must have finite weights, got others at row {row}")
            A = as_adjacency(sp.csr_array(array), None, symmetrize)
    else:
        raise TypeError(
            "graph must be a networkx graph, PyG Data, an edge_index, a scipy.sparse or a dense matrix, "
            f"got {type(obj).__name__}"
        )
    n = A.shape[0]
    X = None if attributes is None else as_features(_numpy(attributes), n, None)
    y = None if labels is None else as_classes(_numpy(labels), n, None)
    return Graph(A, X, y, ids)


def _numpy(value: Any) -> Any:
    if sp.issparse(value):
        return value
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _node_count(data: Any, attributes: Any) -> int | None:
    if attributes is not None:
        return int(attributes.shape[0])
    count = getattr(data, "num_nodes", None)
    return None if count is None else int(count)


def _edge_index(pairs: np.ndarray, weights: np.ndarray | None, n: int | None, symmetrize: Symmetrize) -> sp.csr_array:
    if pairs.ndim != 2 or pairs.shape[0] != 2 or pairs.dtype.kind not in "iu":
        hint = "; transpose it" if pairs.ndim == 2 and pairs.shape[1] == 2 else ""
        raise ValueError(f"edge_index must be integers of shape (2, m){hint}, got {pairs.dtype} {pairs.shape}")
    if n is None:
        n = int(pairs.max()) + 1 if pairs.size else 0
    if n == 0:
        raise ValueError("edge_index must have at least one node, got none")
    if pairs.size and not (pairs.min() >= 0 and pairs.max() < n):
        raise ValueError(f"edge_index must lie in 0..{n - 1}, got {int(pairs.min())}..{int(pairs.max())}")
    # With weights both directions are listed and may differ; without, one listing is an edge both ways.
    return from_edges(
        pairs[0], pairs[1], weights, n, path=None, duplicates="max", directed=weights is not None, symmetrize=symmetrize
    )


def _networkx(graph: Any, symmetrize: Symmetrize, weight: str) -> tuple[sp.csr_array, np.ndarray]:
    from polyspan.errors import require

    nx = require("networkx", extra="graphs", purpose="reading a networkx graph")
    nodes = list(graph.nodes)
    if not nodes:
        raise ValueError("graph must have at least one node, got none")
    A = nx.to_scipy_sparse_array(graph, nodelist=nodes, weight=weight, dtype=np.float64, format="csr")
    whole = all(type(node) is int for node in nodes)
    ids = np.array(nodes, dtype=np.int64) if whole else np.array([str(node) for node in nodes], dtype=np.str_)
    return as_adjacency(A, None, symmetrize), ids
