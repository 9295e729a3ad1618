"""Attributed graphs in files, as one sparse symmetric matrix."""

import numpy as np
import scipy.sparse as sp

from . import _tables
from ._adjacency import Duplicates, Graph, Symmetrize, as_adjacency, as_classes, as_features, check_dense
from ._door import PathLike, suffix_of
from ._edge_lists import EDGE_TEXTS, LABELS, by_number, join_edges, read_edges, read_nodes
from ._mat import mat_names, read_mat
from ._slabs import no_member, npy_slab, npz_names
from ._sparse import check_sparse, read_npz_sparse
from .arrays import read_array

READS = (".npz", ".mat", ".npy", *_tables.TABLES, *EDGE_TEXTS)
ADJACENCY = ("W", "A", "adj", "adjacency", "Network", "network")
ATTRIBUTES = ("fea", "features", "X", "attributes", "Attributes", "attr")


def read_graph(
    path: PathLike,
    *,
    attributes: PathLike | None = None,
    labels: PathLike | None = None,
    adjacency_name: str | None = None,
    attributes_name: str | None = None,
    labels_name: str | None = None,
    symmetrize: Symmetrize = "error",
    duplicates: Duplicates = "max",
    directed: bool = False,
    columns: tuple[str, str] | None = None,
    weight_column: str | None = None,
    id_column: str = "id",
    max_bytes: int | None = None,
) -> Graph:
    """Read a graph, and what is known about its nodes, from files.

    Parameters
    ----------
    path : path-like
        A matrix: ``.npz`` as ``scipy.sparse.save_npz`` writes it (or with the prefix ``adj_``), ``.mat`` with W (or A,
        adj, adjacency), fea and gnd; or edges: ``.csv``, ``.tsv``, ``.txt`` (one edge a line, with or without a
        header, ``#`` and ``%`` begin comments), ``.parquet``, ``.arrow``, or ``.npy`` as edge_index (2, m) or (m, 2);
        a square ``.npy`` of more than two nodes is a dense matrix.
    attributes : path-like, optional
        Rows of numbers, or a table with an id column. By row: row i belongs to node i of ``ids``; nodes without an
        edge are kept. By id: an edge to an id that is not there is ``WrongContent``.
    labels : path-like, optional
        Classes, by row or by id likewise; text is numbered in sorted order.
    adjacency_name, attributes_name, labels_name : str, optional
        Which variables of ``.mat`` or ``.npz``, and which columns of tables, where they have other names.
    symmetrize : {"error", "max", "min", "mean", "sum"}
        What to do with a matrix that is not symmetric, or with ``directed`` edges; ``"sum"`` keeps the diagonal.
    duplicates : {"max", "sum", "error"}
        An edge named twice, in either direction, counts once with its largest weight, or with the sum, or is refused.
    directed : bool
        Take edges as entries of a matrix, for ``symmetrize``; otherwise each line is an edge both ways.
    columns : (str, str), optional
        Names of the two columns of nodes; left out, the first two.
    weight_column : str, optional
        Name of the column of weights; left out, ``weight`` where there is one, or the third of a text without header.
    id_column : str
        The column of ``attributes`` and ``labels`` tables that says whose row it is.

    Returns
    -------
    Graph
        Self loops stay, weights are >= 0, stored zeros are dropped. Nodes of edge lists are ordered by id.

    Raises
    ------
    UnreadableFile, CorruptFile, UntrustedFile, WrongContent, TooLarge
        See :mod:`polyspan.errors`.
    """
    suffix = suffix_of(path, READS)
    names = (adjacency_name, attributes_name, labels_name)
    if suffix == ".mat":
        found = _read_mat_graph(path, names, symmetrize, max_bytes)
    elif suffix == ".npz":
        found = _read_npz_graph(path, names, symmetrize, max_bytes)
    else:
        dense = _dense_npy(path) if suffix == ".npy" else False
        if dense:
            matrix = read_array(path, max_bytes=max_bytes)
            found = Graph(as_adjacency(sp.csr_array(matrix), path, symmetrize))
        else:
            edges = read_edges(path, suffix, columns, weight_column)
            return join_edges(
                path, edges, attributes, labels, (attributes_name, labels_name, id_column),
                {"duplicates": duplicates, "directed": directed, "symmetrize": symmetrize},
            )  # fmt: skip
    n = found.adjacency.shape[0]
    if attributes is not None:
        rows, ids = read_nodes(attributes, attributes_name, id_column)
        found = found._replace(attributes=by_number(attributes, rows, ids, n))
    if labels is not None:
        rows, ids = read_nodes(labels, labels_name, id_column, one=True)
        found = found._replace(labels=by_number(labels, rows, ids, n))
    return found


def _read_mat_graph(path, names, symmetrize, max_bytes) -> Graph:
    there = mat_names(path)
    chosen = [
        _pick(path, there, name, usual) for name, usual in zip(names, (ADJACENCY, ATTRIBUTES, LABELS), strict=True)
    ]
    if chosen[0] is None:
        raise no_member(path, names[0] or "W", there, "variable")
    found = read_mat(path, [name for name in chosen if name is not None], max_bytes=max_bytes)
    A = found[chosen[0]]
    if not sp.issparse(A):
        check_dense(A.shape, path)
        A = sp.csr_array(A)
    A = as_adjacency(A, path, symmetrize)
    n = A.shape[0]
    X = y = None
    if chosen[1] is not None:
        X = as_features(found[chosen[1]], n, path)
    if chosen[2] is not None:
        y = as_classes(np.asarray(found[chosen[2]]).squeeze(), n, path)
    return Graph(A, X, y)


def _pick(path: PathLike, there: list[str], name: str | None, usual: tuple[str, ...]) -> str | None:
    if name is not None:
        if name not in there:
            raise no_member(path, name, there, "variable")
        return name
    return next((candidate for candidate in usual if candidate in there), None)


def _read_npz_graph(path, names, symmetrize, max_bytes) -> Graph:
    there = npz_names(path)
    prefix = names[0] if names[0] is not None else ("" if "shape" in there or "adj_shape" not in there else "adj_")
    A = as_adjacency(read_npz_sparse(path, there, prefix, max_bytes), path, symmetrize)
    n = A.shape[0]
    X = y = None
    wanted = names[1] if names[1] is not None else ("attr_" if "attr_shape" in there else "attributes")
    if wanted + "shape" in there:
        X = as_features(check_sparse(read_npz_sparse(path, there, wanted, max_bytes), path), n, path)
    elif wanted in there:
        X = as_features(read_array(path, member=wanted, max_bytes=max_bytes), n, path)
    elif names[1] is not None:
        raise no_member(path, wanted, there)
    target = names[2] if names[2] is not None else "labels"
    if target in there:
        y = as_classes(read_array(path, member=target, ndim=1, dtype=np.int64), n, path)
    elif names[2] is not None:
        raise no_member(path, target, there)
    return Graph(A, X, y)


def _dense_npy(path: PathLike) -> bool:
    shape = npy_slab(path).shape
    if len(shape) == 2 and shape[0] == shape[1] and shape[0] > 2:
        check_dense(shape, path)
        return True
    return False
