"""Vectors as JSON lists of numbers: in a field of every line of JSON lines, or in the cells of a CSV column."""

import csv
import json
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from io import TextIOWrapper
from typing import Any

import numpy as np

from polyspan.errors import CorruptFile, TooLarge, WrongContent

from ._door import PathLike, open_binary, refuse_pickle, told
from ._row_streams import JSON_CELLS, Piece, RowStream
from ._slabs import no_member
from ._tables import ID, VECTOR
from .text import parse_json, read_jsonl

MAX_LINE_BYTES = 16 * 2**20
"""A list of a hundred thousand numbers and the text beside it."""

Record = tuple[str, dict[str, Any]]


def open_json_lists(path: PathLike, suffix: str, column: str | None, id_column: str | None) -> RowStream:
    """Open a file of JSON lists; it is read once to count the rows, so that a broken row is seen on opening.

    The column is the one named, the only one that holds a list in the first row, or ``vector``; ids are the column
    named, or ``id`` where there is one.

    Raises
    ------
    CorruptFile, WrongContent, TooLarge
        A row is no JSON object (or no CSV row), a field is missing, or is no list of numbers of the first row's length;
        the line is named.
    """
    with open_binary(path) as file, told(path):
        refuse_pickle(path, file.read(512))
    records = _cell_records if suffix in JSON_CELLS else _line_records
    n_rows, dim = 0, 0
    with closing(records(path)) as found:
        for where, record in found:
            if n_rows == 0:
                column = _list_column(path, record, column, where)
                if id_column is None and ID in record and column != ID:
                    id_column = ID
                dim = len(_numbers(path, record, column, None, where))
            n_rows += 1
    if column is None or not n_rows:
        raise WrongContent(path, found="no row", expected="at least one")
    pieces = partial(_pieces, path, records, column, id_column, dim)
    return RowStream(n_rows, dim, np.dtype(np.float64), pieces, column, None, id_column)


def holds_lists(path: PathLike) -> bool:
    """Tell whether a CSV file has a cell in its first row that begins as a JSON list does."""
    try:
        with closing(_cell_records(path)) as found:
            _, record = next(found, ("", {}))
    except (CorruptFile, WrongContent, TooLarge):
        return False  # what is wrong with it is said by the reader of plain numbers
    return any(cell.lstrip().startswith("[") for cell in record.values())


def _line_records(path: PathLike) -> Generator[Record]:
    for number, found in enumerate(read_jsonl(path, max_line_bytes=MAX_LINE_BYTES)):
        where = f"row {number}"
        value = {VECTOR: found} if isinstance(found, list) else found
        if not isinstance(value, dict):
            raise WrongContent(path, found=type(value).__name__, expected="an object or a list of numbers", where=where)
        yield where, value


def _cell_records(path: PathLike) -> Generator[Record]:
    with _csv_rows(path) as lines:
        header = next(lines, [])
        if len(set(header)) != len(header) or not header:
            raise WrongContent(path, found=f"columns {header[:20]}", expected="distinct names", where="line 1")
        for cells in lines:
            if not cells:
                continue
            where = f"line {lines.line_num}"
            if len(cells) != len(header):
                raise CorruptFile(
                    path, found=f"{len(cells)} cells", expected=f"{len(header)} as in the header", where=where
                )
            yield where, dict(zip(header, cells, strict=True))


@contextmanager
def _csv_rows(path: PathLike) -> Generator[Any]:
    delimiter = "\t" if str(path).lower().endswith(".tsv") else ","
    with open_binary(path) as file, told(path):
        lines = csv.reader(TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        try:
            yield lines
        except csv.Error as error:
            where = f"line {lines.line_num}"
            if "field limit" in str(error):
                raise TooLarge(path, found=str(error), expected="shorter cells", where=where) from error
            raise CorruptFile(path, found=str(error), expected="CSV", where=where) from error
        except UnicodeDecodeError as error:
            found = f"byte 0x{error.object[error.start]:02x}"
            where = f"line {lines.line_num + 1}"
            raise CorruptFile(path, found=found, expected="UTF-8 text", where=where) from error


def _list_column(path: PathLike, record: dict[str, Any], column: str | None, where: str) -> str:
    if column is not None:
        if column not in record:
            raise no_member(path, column, list(record), "column")
        return column
    lists = [
        name
        for name, value in record.items()
        if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))
    ]
    if len(lists) == 1:
        return lists[0]
    if VECTOR in lists:
        return VECTOR
    raise WrongContent(
        path,
        found=f"{len(lists)} columns of lists" + (f": {', '.join(lists[:20])}" if lists else ""),
        expected="one, or column= naming it",
        where=where,
    )


def _numbers(path: PathLike, record: dict[str, Any], column: str, dim: int | None, where: str) -> list[int | float]:
    """Return the list of a record, which must hold ``dim`` finite numbers; true and false are none."""
    place = f"{where}, column {column}"
    value = record.get(column)
    if isinstance(value, str):
        value = parse_json(value, path, place)
    if not isinstance(value, list) or not value:
        raise WrongContent(path, found=json.dumps(value)[:60], expected="a list of numbers", where=place)
    for i, number in enumerate(value):
        if isinstance(number, bool) or not isinstance(number, int | float) or abs(number) > sys.float_info.max:
            raise WrongContent(path, found=json.dumps(number)[:60], expected="a number", where=f"{place}, number {i}")
    if dim is not None and len(value) != dim:
        raise WrongContent(
            path, found=f"a vector of length {len(value)}", expected=f"length {dim} as in row 0", where=place
        )
    return value


def _id(path: PathLike, record: dict[str, Any], id_column: str, kind: type | None, where: str) -> Any:
    found = record.get(id_column)
    if isinstance(found, bool) or not isinstance(found, int | str) or (isinstance(found, int) and abs(found) >= 2**63):
        raise WrongContent(
            path, found=json.dumps(found)[:60], expected="an integer or text", where=f"{where}, column {id_column}"
        )
    if kind is not None and type(found) is not kind:
        raise WrongContent(
            path, found=repr(found)[:60], expected=f"{kind.__name__} as in row 0", where=f"{where}, column {id_column}"
        )
    return found


def _pieces(
    path: PathLike, records: Any, column: str, id_column: str | None, dim: int, rows: int, start: int
) -> Iterator[Piece]:
    held: list[np.ndarray] = []
    ids: list[Any] = []
    kind, first = None, start

    def piece() -> Piece:
        named = None if id_column is None else np.array(ids, dtype=np.str_ if kind is str else np.int64)
        return first, np.stack(held), named

    with closing(records(path)) as found:
        for number, (where, record) in enumerate(found):
            if id_column is not None and kind is None:
                kind = type(_id(path, record, id_column, None, where))
            if number < start:
                continue
            held.append(np.array(_numbers(path, record, column, dim, where), dtype=np.float64))
            if id_column is not None:
                ids.append(_id(path, record, id_column, kind, where))
            if len(held) == rows:
                yield piece()
                first, held, ids = first + rows, [], []
    if held:
        yield piece()
