"""Lists of edges, and the rows that say more about their nodes."""

import csv
from io import StringIO
from typing import Any, NamedTuple

import numpy as np

from polyspan.errors import WrongContent

from . import _tables
from ._adjacency import Graph, as_classes, as_features, from_edges
from ._door import PathLike, suffix_of
from ._slabs import no_member, npz_names
from ._sparse import check_sparse, read_npz_sparse
from .arrays import FVECS, MEMBERS, read_array
from .text import read_csv, read_text

EDGE_TEXTS = (".csv", ".tsv", ".txt", ".edges", ".edgelist")
LABELS = ("gnd", "Label", "Labels", "labels", "label", "y")


class _Edges(NamedTuple):
    first: np.ndarray
    second: np.ndarray
    weights: np.ndarray | None


def read_edges(path: PathLike, suffix: str, columns: tuple[str, str] | None, weight: str | None) -> _Edges:
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


def join_edges(path, edges: _Edges, attributes, labels, names, rules) -> Graph:
    """Number the nodes of an edge list, together with the rows that say more about them."""
    seen = np.unique(np.concatenate([edges.first, edges.second]))
    parts = []
    for source, name, one in ((attributes, names[0], False), (labels, names[1], True)):
        parts.append((source, *(read_nodes(source, name, names[2], one=one) if source is not None else (None, None))))
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
        by_row = [(source, rows.shape) for source, rows, _ in parts if rows is not None]
        if by_row:
            ids = _numbered(path, seen, *by_row[0])
    n = len(ids)
    A = from_edges(
        np.searchsorted(ids, edges.first), np.searchsorted(ids, edges.second), edges.weights, n, path=path, **rules
    )
    made = [None if rows is None else _by_id(source, rows, own, ids) for source, rows, own in parts]
    X = None if made[0] is None else as_features(made[0], n, attributes)
    y = None if made[1] is None else as_classes(made[1], n, labels)
    return Graph(A, X, y, ids)


def _numbered(path: PathLike, seen: np.ndarray, source: PathLike, shape: tuple[int, ...]) -> np.ndarray:
    """Return the ids of rows of ``source`` that carry none: 0..n-1 or 1..n where all ids lie there, else the sorted.

    Names have no order that rows could be in: item10 comes before item2 in one and after it in another.
    """
    if seen.dtype.kind != "i":
        raise WrongContent(path, found=f"nodes with names such as {seen[0]}", expected="a column id beside their rows")
    low, high, n_rows = int(seen[0]), int(seen[-1]), shape[0]
    if low >= 0 and high < n_rows:
        return np.arange(n_rows)
    if low >= 1 and high <= n_rows:
        return np.arange(1, n_rows + 1)
    if len(seen) != n_rows:
        turned = len(shape) > 1 and (shape[1] == len(seen) or (low >= 0 and high <= shape[1]))
        raise WrongContent(
            path,
            found=f"{len(seen)} nodes, {seen[0]} to {seen[-1]}",
            expected=f"nodes that the {n_rows} rows of {source} can belong to" + ("; is it transposed?" * turned),
        )
    return seen


def read_nodes(source: PathLike, name: str | None, id_column: str, one: bool = False) -> tuple[Any, np.ndarray | None]:
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
        return check_sparse(read_npz_sparse(source, npz_names(source), "", None), source), None
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


def by_number(source: PathLike, rows: Any, ids: np.ndarray | None, n: int) -> Any:
    """Return rows about the nodes of a matrix, whose ids are 0..n-1."""
    made = _by_id(source, rows, ids, np.arange(n))
    return as_classes(made, n, source) if made.ndim == 1 else as_features(made, n, source)
