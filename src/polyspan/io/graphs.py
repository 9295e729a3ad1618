"""Attributed graphs in files and in other libraries' objects, as one sparse symmetric matrix."""

import csv
from collections.abc import Sequence
from io import StringIO
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp

from polyspan.errors import CorruptFile, WrongContent

from . import _tables
from ._door import PathLike, suffix_of
from ._mat import mat_names, read_mat
from ._slabs import check_numbers, no_member, npy_slab, npz_names, npz_slabs
from ._sparse import check_sparse, refusal
from .arrays import FVECS, MEMBERS, read_array
from .text import read_csv, read_text

MAX_DENSE = 20_000
EDGE_TEXTS = (".csv", ".tsv", ".txt", ".edges", ".edgelist")
READS = (".npz", ".mat", ".npy", *_tables.TABLES, *EDGE_TEXTS)
ADJACENCY = ("W", "A", "adj", "adjacency", "Network", "network")
ATTRIBUTES = ("fea", "features", "X", "attributes", "Attributes", "attr")
LABELS = ("gnd", "Label", "Labels", "labels", "label", "y")

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


def _adjacency(matrix: Any, path: PathLike | None, symmetrize: Symmetrize) -> sp.csr_array:
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


def _check_dense(shape: Sequence[int], path: PathLike | None) -> None:
    n = max(shape)
    if n > MAX_DENSE:
        raise refusal(
            path,
            f"a dense adjacency of {n:,} nodes, {n * n * 8 / 2**30:.1f} GiB as float64",
            f"a scipy.sparse matrix for more than {MAX_DENSE:,} nodes",
        )


def _from_edges(
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
    return _adjacency(A, path, symmetrize if directed else "error")


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
            found = Graph(_adjacency(sp.csr_array(matrix), path, symmetrize))
        else:
            edges = _read_edges(path, suffix, columns, weight_column)
            return _join_edges(
                path, edges, attributes, labels, (attributes_name, labels_name, id_column),
                {"duplicates": duplicates, "directed": directed, "symmetrize": symmetrize},
            )  # fmt: skip
    n = found.adjacency.shape[0]
    if attributes is not None:
        rows, ids = _read_nodes(attributes, attributes_name, id_column)
        found = found._replace(attributes=_by_number(attributes, rows, ids, n))
    if labels is not None:
        rows, ids = _read_nodes(labels, labels_name, id_column, one=True)
        found = found._replace(labels=_by_number(labels, rows, ids, n))
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
        _check_dense(A.shape, path)
        A = sp.csr_array(A)
    A = _adjacency(A, path, symmetrize)
    n = A.shape[0]
    X = y = None
    if chosen[1] is not None:
        X = _features(found[chosen[1]], n, path)
    if chosen[2] is not None:
        y = _classes(np.asarray(found[chosen[2]]).squeeze(), n, path)
    return Graph(A, X, y)


def _pick(path: PathLike, there: list[str], name: str | None, usual: tuple[str, ...]) -> str | None:
    if name is not None:
        if name not in there:
            raise no_member(path, name, there, "variable")
        return name
    return next((candidate for candidate in usual if candidate in there), None)


def _features(X: Any, n: int, path: PathLike | None) -> sp.csr_array | np.ndarray:
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


def _classes(y: np.ndarray, n: int, path: PathLike | None) -> np.ndarray:
    """Return labels of n nodes as int64: MATLAB keeps them as uint8, whose sums overflow, or as double."""
    y = np.atleast_1d(y)
    if y.shape != (n,):
        raise refusal(path, f"labels of shape {y.shape}", f"one a node, {n}", name="labels")
    if y.dtype.kind == "U":
        return np.unique(y, return_inverse=True)[1].astype(np.int64)
    if y.dtype.kind not in "fiub" or not np.array_equal(y, np.floor(y) if y.dtype.kind == "f" else y):
        raise refusal(path, f"labels of dtype {y.dtype}", "whole numbers or text", name="labels")
    return y.astype(np.int64)


def _read_npz_graph(path, names, symmetrize, max_bytes) -> Graph:
    there = npz_names(path)
    prefix = names[0] if names[0] is not None else ("" if "shape" in there or "adj_shape" not in there else "adj_")
    A = _adjacency(_npz_sparse(path, there, prefix, max_bytes), path, symmetrize)
    n = A.shape[0]
    X = y = None
    wanted = names[1] if names[1] is not None else ("attr_" if "attr_shape" in there else "attributes")
    if wanted + "shape" in there:
        X = _features(check_sparse(_npz_sparse(path, there, wanted, max_bytes), path), n, path)
    elif wanted in there:
        X = _features(read_array(path, member=wanted, max_bytes=max_bytes), n, path)
    elif names[1] is not None:
        raise no_member(path, wanted, there)
    target = names[2] if names[2] is not None else "labels"
    if target in there:
        y = _classes(read_array(path, member=target, ndim=1, dtype=np.int64), n, path)
    elif names[2] is not None:
        raise no_member(path, target, there)
    return Graph(A, X, y)


def _npz_sparse(path: PathLike, there: list[str], prefix: str, max_bytes: int | None) -> Any:
    """Return the sparse matrix whose parts are members of a .npz file, with the checks that SciPy leaves out."""
    parts = {"data", "shape"} | ({"indices", "indptr"} if prefix + "indptr" in there else {"row", "col"})
    if prefix + "offsets" in there:
        parts = {"data", "shape", "offsets"}
    missing = sorted(prefix + part for part in parts if prefix + part not in there)
    if missing:
        raise WrongContent(
            path, found=f"no member {missing[0]!r} among {', '.join(sorted(there)[:20])}",
            expected="a matrix of scipy.sparse.save_npz",
        )  # fmt: skip
    slabs = npz_slabs(path, [prefix + part for part in sorted(parts)], max_bytes)
    arrays = {}
    for name, slab in slabs.items():
        part = name.removeprefix(prefix)
        check_numbers(slab, booleans=part == "data")
        if part != "data" and (slab.dtype.kind not in "iu" or len(slab.shape) != 1):
            raise WrongContent(
                path, found=f"{slab.dtype} {slab.shape}", expected="1-d integers", where=f"member {name}"
            )
        arrays[part] = slab.read(max_bytes).astype(slab.dtype.newbyteorder("="), copy=False)
    kind = _npz_format(path, there, prefix, parts)
    shape = tuple(int(side) for side in arrays["shape"])
    if len(shape) != 2 or min(shape) < 0:
        raise WrongContent(path, found=f"shape {shape}", expected="two sides", where=f"member {prefix}shape")
    if max(shape) > 2**40:
        raise CorruptFile(path, found=f"shape {shape}", expected="sides that fit", where=f"member {prefix}shape")
    return _assemble(path, kind, shape, arrays)


def _assemble(path: PathLike, kind: str, shape: Any, arrays: dict[str, Any]) -> Any:
    data = arrays["data"]
    try:
        if kind == "coo":
            made = sp.coo_array((data, (arrays["row"], arrays["col"])), shape=shape)
        elif kind == "dia":
            made = sp.dia_array((data, arrays["offsets"]), shape=shape)
        else:
            indices, indptr = (arrays[part].astype(np.int64, copy=False) for part in ("indices", "indptr"))
            # A side larger than the pointers is refused by SciPy before it allocates.
            makers: dict[str, Any] = {"csr": sp.csr_array, "csc": sp.csc_array, "bsr": sp.bsr_array}
            made = makers[kind]((data, indices, indptr), shape=shape)
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise CorruptFile(path, found=str(error), expected="valid sparse indices") from error
    return made


def _npz_format(path: PathLike, there: list[str], prefix: str, parts: set[str]) -> str:
    """Return the sparse format that a file names, as far as it agrees with the members."""
    usual = "dia" if "offsets" in parts else ("csr" if "indptr" in parts else "coo")
    if prefix + "format" not in there:
        return usual
    slab = npz_slabs(path, [prefix + "format"], None)[prefix + "format"]
    if slab.dtype.kind not in "SU" or slab.shape != () or slab.nbytes > 64:
        raise WrongContent(path, found=f"format of dtype {slab.dtype}", expected="csr, csc, coo, bsr or dia")
    value = slab.read(None)[()]
    name = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
    allowed = {"csr": ("csr", "csc", "bsr"), "coo": ("coo",), "dia": ("dia",)}[usual]
    if name not in allowed:
        raise WrongContent(path, found=f"format {name!r}", expected=" or ".join(allowed), where="member format")
    return name


def _dense_npy(path: PathLike) -> bool:
    shape = npy_slab(path).shape
    if len(shape) == 2 and shape[0] == shape[1] and shape[0] > 2:
        _check_dense(shape, path)
        return True
    return False


class _Edges(NamedTuple):
    first: np.ndarray
    second: np.ndarray
    weights: np.ndarray | None


def _read_edges(path: PathLike, suffix: str, columns: tuple[str, str] | None, weight: str | None) -> _Edges:
    if suffix == ".npy":
        pairs = read_array(path, dtype=np.int64)
        if 2 not in pairs.shape:
            raise WrongContent(path, found=f"shape {pairs.shape}", expected="edge_index (2, m) or (m, 2)")
        first, second = pairs if pairs.shape[0] == 2 else pairs.T
        return _Edges(np.array(first), np.array(second), None)
    if suffix in _tables.TABLES:
        with _tables.open_table(path) as table:
            names = table.schema.names
            if columns is None and len(names) < 2:
                raise WrongContent(path, found=f"{len(names)} columns", expected="two columns of nodes")
            one, two = columns or (names[0], names[1])
            weight = weight if weight is not None else ("weight" if "weight" in names else None)
            ends = [_tables.read_column(table, name) for name in (one, two)]
            values = None if weight is None else _tables.read_column(table, weight)
        return _Edges(*_same_kind(path, *ends), _weights(path, values))
    return _text_edges(path, suffix, columns, weight)


def _weights(path: PathLike, values: np.ndarray | None) -> np.ndarray | None:
    if values is not None and values.dtype.kind not in "fiu":
        raise WrongContent(path, found="weights that are text", expected="numbers")
    return values


def _same_kind(path: PathLike, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    for ends in (first, second):
        if ends.dtype.kind not in "iU":
            raise WrongContent(path, found=f"nodes of dtype {ends.dtype}", expected="integers or text")
    if first.dtype.kind != second.dtype.kind:
        return first.astype(np.str_), second.astype(np.str_)
    return first, second


def _text_edges(path: PathLike, suffix: str, columns: tuple[str, str] | None, weight: str | None) -> _Edges:
    """Return the edges of a text: cells between commas, tabs or blanks; integers stay integers."""
    lines = [
        (number, line)
        for number, line in enumerate(read_text(path, max_bytes=2**30).split("\n"), start=1)
        if line.strip() and not line.lstrip().startswith(("#", "%"))
    ]
    if not lines:
        raise WrongContent(path, found="no edge", expected="at least one")
    sample = lines[min(1, len(lines) - 1)][1]
    delimiter = "," if suffix == ".csv" else "\t" if suffix == ".tsv" else "," if "," in sample else "\t"
    if suffix not in (".csv", ".tsv") and delimiter not in sample:
        cells = [(number, line.split()) for number, line in lines]
    else:
        texts = csv.reader(StringIO("\n".join(line for _, line in lines)), delimiter=delimiter)
        cells = [(number, [c.strip() for c in row]) for (number, _), row in zip(lines, texts, strict=False)]
    header = _edge_header(cells)
    at = _edge_columns(path, header, columns, weight, len(cells[0][1]))
    body = cells[1:] if header else cells
    widest = max(i for i in at if i is not None)
    for number, row in body:
        if len(row) <= widest or not row[at[0]] or not row[at[1]]:
            raise WrongContent(
                path, found=f"{len(row)} cells", expected="two nodes" + (" and a weight" if at[2] is not None else ""),
                where=f"line {number}",
            )  # fmt: skip
    ends = [[row[i] for _, row in body] for i in at[:2]]
    if all(_is_integer(cell) for column in ends for cell in column):
        first, second = (np.array([int(cell) for cell in column], dtype=np.int64) for column in ends)
    else:
        first, second = (np.array(column, dtype=np.str_) for column in ends)
    if at[2] is None:
        return _Edges(first, second, None)
    values = []
    for number, row in body:
        try:
            values.append(float(row[at[2]]))
        except ValueError:
            raise WrongContent(path, found=repr(row[at[2]][:40]), expected="a weight", where=f"line {number}") from None
    return _Edges(first, second, np.array(values))


def _is_integer(cell: str) -> bool:
    body = cell[1:] if cell[:1] == "-" else cell
    return body.isascii() and body.isdigit() and len(body) < 19


def _edge_header(cells: list[tuple[int, list[str]]]) -> list[str] | None:
    """Return the header: a first line of known names, or one without a number above lines of numbers."""
    first = cells[0][1]
    usual = {"source", "target", "src", "dst", "from", "to", "u", "v", "weight", "head", "tail", "node1", "node2"}
    if sum(cell.lower() in usual for cell in first) >= 2:
        return first
    digits = [any(_is_integer(cell) for cell in row) for _, row in cells[:2]]
    return first if len(cells) > 1 and not digits[0] and digits[1] else None


def _edge_columns(path, header, columns, weight, n_cells) -> tuple[int, int, int | None]:
    if header is None:
        if columns is not None or weight is not None:
            raise WrongContent(path, found="no header line", expected="one that names the columns", where="line 1")
        return 0, 1, 2 if n_cells == 3 else None
    for name in (*(columns or ()), *((weight,) if weight is not None else ())):
        if name not in header:
            raise no_member(path, name, header, "column")
    one, two = (header.index(name) for name in columns) if columns else (0, 1)
    if weight is None and "weight" in header:
        weight = "weight"
    return one, two, None if weight is None else header.index(weight)


def _join_edges(path, edges: _Edges, attributes, labels, names, rules) -> Graph:
    """Number the nodes of an edge list, together with the rows that say more about them."""
    seen = np.unique(np.concatenate([edges.first, edges.second]))
    parts = []
    for source, name, one in ((attributes, names[0], False), (labels, names[1], True)):
        parts.append((source, *(_read_nodes(source, name, names[2], one=one) if source is not None else (None, None))))
    ids = seen
    known = [part_ids for _, _, part_ids in parts if part_ids is not None]
    if known:
        ids = np.unique(known[0])
        if ids.dtype.kind != seen.dtype.kind:
            raise WrongContent(
                path,
                found=f"node ids such as {seen[0]!r}",
                expected=f"ids such as {ids[0]!r} in {attributes or labels}",
            )
        unknown = np.setdiff1d(seen, ids)
        if len(unknown):
            shown = ", ".join(map(str, unknown[:5].tolist()))
            raise WrongContent(
                path, found=f"{len(unknown)} unknown nodes: {shown}", expected=f"ids of {attributes or labels}"
            )
    else:
        by_row = [len(rows) if not sp.issparse(rows) else rows.shape[0] for _, rows, _ in parts if rows is not None]
        if by_row:
            ids = _numbered(path, seen, by_row[0])
    n = len(ids)
    A = _from_edges(
        np.searchsorted(ids, edges.first), np.searchsorted(ids, edges.second), edges.weights, n, path=path, **rules
    )
    made = [None if rows is None else _by_id(source, rows, own, ids) for source, rows, own in parts]
    X = None if made[0] is None else _features(made[0], n, attributes)
    y = None if made[1] is None else _classes(made[1], n, labels)
    return Graph(A, X, y, ids)


def _numbered(path: PathLike, seen: np.ndarray, n_rows: int) -> np.ndarray:
    """Return the ids of n_rows rows that carry none: 0..n-1 or 1..n where all ids lie there, else the sorted ids.

    Names have no order that rows could be in: item10 comes before item2 in one and after it in another.
    """
    if seen.dtype.kind != "i":
        raise WrongContent(path, found=f"nodes with names such as {seen[0]}", expected="a column id beside their rows")
    low, high = int(seen[0]), int(seen[-1])
    if low >= 0 and high < n_rows:
        return np.arange(n_rows)
    if low >= 1 and high <= n_rows:
        return np.arange(1, n_rows + 1)
    if len(seen) != n_rows:
        raise WrongContent(
            path,
            found=f"{len(seen)} nodes, {seen[0]} to {seen[-1]}",
            expected=f"nodes that {n_rows} rows can belong to",
        )
    return seen


def _read_nodes(source: PathLike, name: str | None, id_column: str, one: bool = False) -> tuple[Any, np.ndarray | None]:
    """Return rows about nodes, and the ids of the rows where the file has them."""
    suffix = suffix_of(source, (".npy", *MEMBERS, *_tables.TABLES, ".csv", ".tsv", *FVECS))
    if suffix in _tables.TABLES:
        with _tables.open_table(source) as table:
            has = id_column in table.schema.names
            ids = _tables.read_column(table, id_column) if has else None
            if one:
                plain = [c for c in table.schema.names if c != id_column]
                rows = _tables.read_column(
                    table, name or ("label" if "label" in plain else plain[0] if plain else "label")
                )
                return rows, _distinct(source, ids)
        return read_array(source, column=name), _distinct(source, ids)
    if suffix in (".csv", ".tsv"):
        return _text_nodes(source, name, id_column, one)
    member = name if suffix in MEMBERS else None
    if suffix == ".npz" and not one and name is None and "shape" in npz_names(source):
        return check_sparse(_npz_sparse(source, npz_names(source), "", None), source), None
    if suffix == ".mat" and one:
        found = read_array(source, member=member, ndim=None, dtype=np.int64)
        return np.atleast_1d(found.squeeze()), None
    return read_array(source, member=member, ndim=1 if one else 2, dtype=np.int64 if one else None), None


def _text_nodes(source: PathLike, name: str | None, id_column: str, one: bool) -> tuple[np.ndarray, np.ndarray | None]:
    with_ids = id_column in read_text(source, max_bytes=2**30).split("\n", 1)[0].replace("\t", ",").split(",")
    if not with_ids and not one:
        return read_array(source), None
    if not with_ids and name is None:
        lines = [line.strip() for line in read_text(source).split("\n") if line.strip()]
        lines = lines[1:] if lines and lines[0].lower() in LABELS else lines
        return _text_values(lines), None
    table = read_csv(source)
    plain = [c for c in table if c != id_column] if name is None else [name]
    for column in plain:
        if column not in table:
            raise no_member(source, column, list(table), "column")
    n_rows = len(table[plain[0]]) if plain else 0
    if n_rows == 0:
        raise WrongContent(source, found="no row", expected="one a node")
    ids = _text_values(table[id_column]) if with_ids else None
    if one:
        return _text_values(table[plain[0]]), _distinct(source, ids)
    values = np.empty((n_rows, len(plain)))
    for j, column in enumerate(plain):
        for i, cell in enumerate(table[column]):
            try:
                values[i, j] = float(cell)
            except ValueError:
                raise WrongContent(
                    source, found=repr(cell[:40]), expected="a number", where=f"row {i}, column {column}"
                ) from None
    return values, _distinct(source, ids)


def _text_values(cells: list[str]) -> np.ndarray:
    if cells and all(map(_is_integer, cells)):
        return np.array([int(cell) for cell in cells], dtype=np.int64)
    return np.array(cells, dtype=np.str_)


def _distinct(source: PathLike, ids: np.ndarray | None) -> np.ndarray | None:
    if ids is not None:
        values, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            raise WrongContent(source, found=f"id {values[counts > 1][0]} twice", expected="one row a node")
    return ids


def _by_id(source: PathLike, rows: Any, own: np.ndarray | None, ids: np.ndarray) -> Any:
    """Return rows in the order of ``ids``."""
    n_rows = rows.shape[0]
    if own is None:
        if n_rows != len(ids):
            raise WrongContent(source, found=f"{n_rows} rows", expected=f"one a node, {len(ids)}")
        return rows
    if own.dtype.kind != ids.dtype.kind or not np.array_equal(np.sort(own), ids):
        raise WrongContent(source, found=f"ids of {n_rows} rows", expected=f"one row for each of {len(ids)} nodes")
    return rows[np.argsort(own)]


def _by_number(source: PathLike, rows: Any, ids: np.ndarray | None, n: int) -> Any:
    """Return rows about the nodes of a matrix, whose ids are 0..n-1."""
    made = _by_id(source, rows, ids, np.arange(n))
    return _classes(made, n, source) if made.ndim == 1 else _features(made, n, source)


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
        A, ids = _adjacency(obj.adjacency, None, symmetrize), obj.ids
        attributes = obj.attributes if attributes is None else attributes
        labels = obj.labels if labels is None else labels
    elif sp.issparse(obj):
        A = _adjacency(obj, None, symmetrize)
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
            _check_dense(array.shape, None)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
                raise ValueError(f"graph must have finite weights, got others at row {row}")
            A = _adjacency(sp.csr_array(array), None, symmetrize)
    else:
        raise TypeError(
            "graph must be a networkx graph, PyG Data, an edge_index, a scipy.sparse or a dense matrix, "
            f"got {type(obj).__name__}"
        )
    n = A.shape[0]
    X = None if attributes is None else _features(_numpy(attributes), n, None)
    y = None if labels is None else _classes(_numpy(labels), n, None)
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
    return _from_edges(
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
    return _adjacency(A, None, symmetrize), ids
