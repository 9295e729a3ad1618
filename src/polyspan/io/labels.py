"""True classes of rows, one a row: from arrays, or from text tables that are joined by id."""

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyspan.errors import WrongContent

from . import _tables
from ._door import PathLike, suffix_of
from ._edge_lists import LABELS
from ._mat import mat_names
from ._slabs import npz_names, tensor_slabs
from .arrays import MEMBERS, read_array
from .text import read_csv, read_text

LABEL_TABLES = (".csv", ".tsv")
ARRAYS = ("fea", "features", "X", "images", "data")


def read_labels(path: PathLike, ids: Any = None, *, member: str | None = None) -> np.ndarray:
    """Return one class a row, (n,): int64 from an array, text from a ``.csv`` or ``.tsv`` table, either from others.

    An array of shape (n, 1) or (1, n), as MATLAB and pandas make them, is a vector too.

    Parameters
    ----------
    path : path-like
        What :func:`read_array` reads, or a table (``.csv``, ``.tsv``, ``.parquet``, ``.arrow``, ``.feather``) with a
        column ``label`` and, where rows are joined, ``id``.
    ids : array of shape (n,), optional
        The names of the rows. A table with ids is brought to their order, and its further rows are left out; without
        ids, here or there, its rows are taken in the order of the file.
    member : str, optional
        Which array of a ``.npz``, ``.safetensors`` or ``.mat`` file.

    Raises
    ------
    WrongContent
        No column ``label``; an empty cell or an id that comes twice (line and column are named); a row without a label;
        an array that is no vector, or whose numbers are not whole.
    UnreadableFile, CorruptFile, UntrustedFile, TooLarge
        As of :func:`read_array` and :func:`read_csv`.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _tables.TABLES and (columns := _table_columns(path)):
        labels, own = columns
    elif suffix not in LABEL_TABLES:
        found = read_array(path, member=member, ndim=None, dtype=np.int64)
        return as_vector(path, found, member or "")
    else:
        table = read_csv(path)
        if "label" not in table:
            raise WrongContent(path, found=f"columns {', '.join(table)}", expected="a column label")
        check_cells(path, table["label"], "label")
        labels, own = np.array(table["label"]), table.get("id")
        if own is not None:
            check_cells(path, own, "id", distinct=True)
    if ids is None or own is None:
        return labels
    by_id = dict(zip(map(str, own), labels, strict=True))
    missing = [i for i in ids if str(i) not in by_id]
    if missing:
        raise WrongContent(path, found=f"no label of {str(missing[0])!r}", expected="one for each id of the rows")
    return np.array([by_id[str(i)] for i in ids])


def _table_columns(path: PathLike) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Return the columns ``label`` and ``id`` of a Parquet or Arrow table, if it has a column ``label``."""
    with _tables.open_table(path) as table:
        if "label" not in table.schema.names:
            return None
        labels = _tables.read_column(table, "label")
        own = _tables.read_column(table, "id") if "id" in table.schema.names else None
    if labels.dtype.kind == "f":
        whole = labels.astype(np.int64)
        if not np.array_equal(whole, labels):
            raise WrongContent(path, found="fractions", expected="whole numbers or text", where="column label")
        labels = whole
    if own is not None and len(np.unique(own)) < len(own):
        names, counts = np.unique(own, return_counts=True)
        raise WrongContent(
            path, found=f"{names[counts > 1][0]} more than once", expected="each once", where="column id"
        )
    return as_vector(path, labels, "column label"), own


def as_vector(path: PathLike, labels: np.ndarray, where: str = "") -> np.ndarray:
    """Return labels as a vector (n,), where (n, 1) and (1, n) are vectors too; any other shape is ``WrongContent``."""
    if labels.ndim == 2 and 1 in labels.shape:
        labels = labels.ravel()
    if labels.ndim != 1 or not len(labels):
        raise WrongContent(path, found=f"shape {labels.shape}", expected="one label a row, (n,) or (n, 1)", where=where)
    return labels


def check_cells(path: PathLike, cells: Sequence[str], column: str, *, distinct: bool = False) -> None:
    """Raise ``WrongContent`` at the first cell of a column that is empty or, with ``distinct``, was there before."""
    seen: dict[str, int] = {}
    for row, cell in enumerate(cells):
        if not cell.strip():
            where = f"line {_line(path, row)}, column {column}"
            raise WrongContent(path, found="an empty cell", expected="a value in every row", where=where)
        if distinct and cell in seen:
            where = f"line {_line(path, row)}, column {column}"
            found = f"{cell[:40]!r} again, which line {_line(path, seen[cell])} has"
            raise WrongContent(path, found=found, expected="each once", where=where)
        seen[cell] = row


def _line(path: PathLike, row: int) -> int:
    """Return the line, counted from 1, on which a row of a table ends; blank lines are no rows."""
    delimiter = "\t" if Path(path).suffix.lower() == ".tsv" else ","
    lines = csv.reader(StringIO(read_text(path, max_bytes=2**30), newline=""), delimiter=delimiter)
    number = -2  # the header, which is no row, makes it -1
    for cells in lines:
        number += bool(cells)
        if number == row:
            break
    return lines.line_num


class Labelled(NamedTuple):
    """Arrays of one file: ``array`` with its ``name``, and ``labels`` (n,) with theirs; None where there are none."""

    array: np.ndarray
    name: str
    labels: np.ndarray | None
    label_name: str | None


def read_labelled(path: PathLike, *, member: str | None = None, label_member: str | None = None) -> Labelled:
    """Return an array of a ``.npz``, ``.safetensors`` or ``.mat`` file in its own shape, and the labels beside it.

    Parameters
    ----------
    path : path-like
    member : str, optional
        Left out, the only array beside the labels, or the one with a usual name: fea, features, X, images, data.
    label_member : str, optional
        Left out, the one with a usual name: gnd, Label, Labels, labels, label, y; there may be none.

    Raises
    ------
    WrongContent
        No such array (those there are listed), none or several that it may be, or labels that are no vector of whole
        numbers.
    UnreadableFile, CorruptFile, UntrustedFile, TooLarge
        As of :func:`read_array`.
    """
    names = _names(path)
    usual = [name for name in names if name in LABELS and name != member]
    if label_member is None and len(usual) == 1:
        label_member = usual[0]
    if member is None:
        others = [name for name in names if name not in (*usual, label_member)]
        known = [name for name in others if name in ARRAYS]
        choice = known if known else others
        if len(choice) != 1:
            raise WrongContent(
                path,
                found=f"{len(names)} arrays: {', '.join(sorted(names)[:20])}",
                expected="one that a member option names, or one of a usual name",
            )
        member = choice[0]
    labels = None if label_member is None else read_labels(path, member=label_member)
    return Labelled(read_array(path, member=member, ndim=None), member, labels, label_member)


def _names(path: PathLike) -> list[str]:
    suffix = suffix_of(path, MEMBERS)
    if suffix == ".npz":
        return npz_names(path)
    return mat_names(path) if suffix == ".mat" else list(tensor_slabs(path, refuse_types=False).slabs)
