"""Vectors and ids in the columns of Parquet and Arrow files, batch by batch."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyspan.errors import CorruptFile, TooLarge, WrongContent

from ._door import PathLike, file_size, open_binary, refuse_pickle, told
from ._slabs import no_member

PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather", ".ipc")
TABLES = PARQUET + ARROW
VECTOR, ID = "vector", "id"


@contextmanager
def _arrow_told(path: PathLike, what: str) -> Generator[None]:
    """Sort Arrow's errors: broken bytes raise several of them, some as OSError without a number."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowMemoryError as error:
        raise TooLarge(path, found="more than the memory holds", expected="content that fits in memory") from error
    except pa.ArrowNotImplementedError as error:
        raise WrongContent(path, found=_first_line(error), expected=f"a {what} file of plain columns") from error
    except (pa.ArrowException, ValueError, KeyError, IndexError, OverflowError) as error:
        raise CorruptFile(path, found=_first_line(error), expected=f"a whole {what} file") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise CorruptFile(path, found=_first_line(error), expected=f"a whole {what} file") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["a broken file"])[0][:200]


class Table(NamedTuple):
    """An open table: ``batches(columns, rows, start)`` yields (first row, Arrow record batch)."""

    path: PathLike
    schema: Any
    n_rows: int
    source: Any

    @property
    def what(self) -> str:
        return "Parquet" if _is_parquet(self.path) else "Arrow"

    def batches(self, columns: list[str], rows: int, start: int = 0) -> Iterator[tuple[int, Any]]:
        """Yield record batches of about ``rows`` rows from row ``start`` on, each checked in full."""
        with told(self.path), _arrow_told(self.path, self.what):
            pieces = self._parquet(columns, rows, start) if _is_parquet(self.path) else self._arrow(columns, start)
            for first, batch in pieces:
                batch.validate(full=True)
                for at in range(max(0, start - first), batch.num_rows, rows):
                    yield first + at, batch.slice(at, rows)

    def _parquet(self, columns, rows, start):
        facts = self.source.metadata
        first = 0
        for group in range(facts.num_row_groups):
            held = facts.row_group(group).num_rows
            if first + held > start:
                at = first
                for batch in self.source.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                    if at + batch.num_rows > start:
                        yield at, batch
                    at += batch.num_rows
                if at - first != held:
                    raise CorruptFile(
                        self.path, found=f"{at - first} rows", expected=f"{held}", where=f"row group {group}"
                    )
            first += held

    def _arrow(self, columns, start):
        first = 0
        for i in range(self.source.num_record_batches):
            batch = self.source.get_batch(i)
            if first + batch.num_rows > start:
                yield first, batch.select(columns)
            first += batch.num_rows


def _is_parquet(path: PathLike) -> bool:
    return Path(path).suffix.lower() in PARQUET


@contextmanager
def open_table(path: PathLike) -> Generator[Table]:
    """Open a Parquet or Arrow file, of which only the footer is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = file_size(path)
    with open_binary(path) as file, told(path):
        head = file.read(8)
        file.seek(max(0, size - 4))
        tail = file.read(4)
        if b"PARE" in (head[:4], tail):
            raise WrongContent(path, found="an encrypted Parquet file", expected="one that is not encrypted")
        right = head[:4] == b"PAR1" if _is_parquet(path) else head[:6] == b"ARROW1"
        if not right:
            file.seek(0)
            refuse_pickle(path, file.read(2**16))
            if head[:4] == b"FEA1":
                raise WrongContent(path, found="Feather version 1", expected="version 2, which is Arrow")
            expected = "PAR1" if _is_parquet(path) else "ARROW1 (an Arrow file; a stream has no footer)"
            raise CorruptFile(path, found=f"bytes {head[:6]!r}", expected=expected, where="byte 0")
    with told(path), _arrow_told(path, "Parquet" if _is_parquet(path) else "Arrow"):
        if _is_parquet(path):
            source = pq.ParquetFile(str(path), memory_map=True, page_checksum_verification=True)
            table = Table(path, source.schema_arrow, source.metadata.num_rows, source)
        else:
            source = pa.ipc.open_file(pa.memory_map(str(path)))
            n_rows = 0
            for i in range(source.num_record_batches):
                n_rows += source.get_batch(i).num_rows
            table = Table(path, source.schema, n_rows, source)
        names = table.schema.names
        if len(set(names)) != len(names):
            raise CorruptFile(path, found="a column name twice", expected="distinct names")
    yield table


def vector_column(table: Table, column: str | None) -> str:
    """Return the column that holds the vectors: the one named, the only list, or ``vector``."""
    names = [field.name for field in table.schema if _is_list(field.type)]
    if column is not None:
        if column not in table.schema.names:
            close = [name for name in table.schema.names if name.lower() == column.lower()]
            raise no_member(table.path, column, close or names or table.schema.names, "column")
        if column not in names:
            raise WrongContent(
                table.path,
                found=f"column {column!r} of type {table.schema.field(column).type}",
                expected="a column of lists of numbers",
            )
        chosen = column
    elif len(names) == 1:
        chosen = names[0]
    elif VECTOR in names:
        chosen = VECTOR
    else:
        raise WrongContent(
            table.path,
            found=f"{len(names)} columns of lists" + (f": {', '.join(names)}" if names else ""),
            expected="one, or column= naming it",
        )
    _item_type(table, chosen)
    return chosen


def id_column(table: Table, column: str | None) -> str | None:
    """Return the column that holds the ids: the one named, or ``id`` where there is one."""
    if column is None:
        return ID if ID in table.schema.names and not _is_list(table.schema.field(ID).type) else None
    if column not in table.schema.names:
        raise no_member(table.path, column, table.schema.names, "column")
    return column


def _is_list(kind: Any) -> bool:
    import pyarrow.types as t

    return t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)


def _item_type(table: Table, column: str) -> np.dtype:
    import pyarrow.types as t

    item = table.schema.field(column).type.value_type
    if not (t.is_floating(item) or t.is_integer(item)):
        raise WrongContent(
            table.path, found=f"lists of {item}", expected="lists of float or int", where=f"column {column}"
        )
    return np.dtype(item.to_pandas_dtype())


def item_dtype(table: Table, column: str) -> np.dtype:
    """Return the stored dtype of a column's numbers."""
    return _item_type(table, column)


def width(table: Table, column: str) -> int:
    """Return the number of components of a vector: from the type, or from the first row."""
    kind = table.schema.field(column).type
    if table.n_rows == 0:
        raise WrongContent(table.path, found="no row", expected="at least one", where=f"column {column}")
    if hasattr(kind, "list_size"):
        found = kind.list_size
    else:
        _, batch = next(table.batches([column], 1))
        found = len(to_rows(table.path, column, batch.column(column), 0, None)[0])
    if found == 0:
        raise WrongContent(table.path, found="vectors of length 0", expected="at least 1", where=f"column {column}")
    return found


def to_rows(path: PathLike, column: str, array: Any, first: int, dim: int | None) -> np.ndarray:
    """Return one batch of a list column as (b, d) numbers, in the stored dtype; nulls and ragged rows are errors.

    ``flatten()`` drops null lists and would shift every later row, so that they are counted first.
    """
    where = f"column {column}"
    if array.null_count:
        row = first + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise WrongContent(
            path, found=f"{array.null_count} null vectors in a batch", expected="none", where=f"{where}, row {row}"
        )
    if hasattr(array.type, "list_size"):
        lengths = None
        size = array.type.list_size
    else:
        lengths = array.value_lengths().to_numpy(zero_copy_only=False)
        size = int(lengths[0]) if len(lengths) else 0
    wanted = size if dim is None else dim
    if lengths is not None and (lengths != wanted).any():
        bad = int(np.flatnonzero(lengths != wanted)[0])
        raise WrongContent(
            path,
            found=f"a vector of length {lengths[bad]}",
            expected=f"length {wanted} as in row 0",
            where=f"{where}, row {first + bad}",
        )
    if size != wanted:
        raise WrongContent(path, found=f"vectors of length {size}", expected=f"length {wanted}", where=where)
    values = array.flatten()
    if values.null_count:
        at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise WrongContent(
            path, found="a null component", expected="numbers", where=f"{where}, row {first + at // max(size, 1)}"
        )
    return values.to_numpy(zero_copy_only=False).reshape(len(array), size)


def to_ids(path: PathLike, column: str, array: Any, first: int) -> np.ndarray:
    """Return one batch of an id column as int64 or as text; a null is an error."""
    import pyarrow as pa
    import pyarrow.types as t

    where = f"column {column}"
    if t.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.null_count:
        row = first + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise WrongContent(path, found="a null id", expected="an id in every row", where=f"{where}, row {row}")
    if t.is_integer(array.type):
        return array.cast(pa.int64()).to_numpy(zero_copy_only=False)
    if t.is_string(array.type) or t.is_large_string(array.type):
        return np.asarray(array.to_pylist(), dtype=np.str_)
    raise WrongContent(path, found=f"ids of type {array.type}", expected="integers or text", where=where)


def read_column(table: Table, column: str) -> np.ndarray:
    """Return a whole plain column: float64, int64 or text."""
    import pyarrow.types as t

    if column not in table.schema.names:
        raise no_member(table.path, column, table.schema.names, "column")
    parts = []
    for first, batch in table.batches([column], 65536):
        array = batch.column(column)
        if t.is_floating(array.type) and not array.null_count:
            parts.append(array.to_numpy(zero_copy_only=False).astype(np.float64))
        else:
            parts.append(to_ids(table.path, column, array, first))
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def arrow_vectors(rows: np.ndarray, item: Any) -> Any:
    """Return (b, d) rows as an Arrow array of fixed-size lists, without copying where they are contiguous."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(rows).reshape(-1), type=item)
    return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])


def arrow_schema(column: str, dim: int, dtype: np.dtype, ids: str | None, id_name: str = ID) -> Any:
    """Return the schema of a table of vectors: ids (``"int64"`` or ``"string"``) first, then the vectors."""
    import pyarrow as pa

    fields = [] if ids is None else [pa.field(id_name, pa.int64() if ids == "int64" else pa.string(), nullable=False)]
    item = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
    return pa.schema([*fields, pa.field(column, pa.list_(item, dim), nullable=False)])
