"""Files of vectors of any size, written batch by batch in flat memory."""

import contextlib
import hashlib
import queue
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.errors import WrongContent

from . import _tables
from ._door import PathLike
from ._slabs import npy_header, tensor_header
from .arrays import CODES, as_ids, check_finite, table_writer
from .atomic import atomic_path
from .text import dump_json

TARGETS = (".npy", ".npz", ".safetensors", *_tables.TABLES, ".fvecs")
ROOM = 1024
"""Bytes kept for the JSON of a .safetensors header, which is written last, when the number of rows is known."""


class EmbeddingWriter:
    """Write a file of vectors batch by batch; the file appears, whole and synced, when the ``with`` block ends well.

    Parameters
    ----------
    path : path-like
        ``.npy``, ``.npz`` (stored), ``.safetensors``, ``.parquet``, ``.arrow``, ``.feather`` or ``.fvecs``.
    dim : int
        Components of a vector.
    dtype : dtype
        float16, float32 or float64, in which they are stored; ``.fvecs`` knows float32 only.
    n_rows : int, optional
        How many rows will come; needed for ``.npz``, and compared where it is given.
    column : str
        Name of the list column or of the member.
    with_ids : bool
        Whether ids come with the rows; for tables only.
    id_column : str
        Name of the column of ids.

    Raises
    ------
    ValueError
        Rows of another width, rows that are not finite, ids missing or twice given, or another number of rows.
    UnreadableFile
        The place cannot be written to.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        dim: int,
        dtype: Any = np.float32,
        n_rows: int | None = None,
        column: str = _tables.VECTOR,
        with_ids: bool = False,
        id_column: str = _tables.ID,
    ):
        self.path, self.dim, self.dtype = Path(path), dim, np.dtype(dtype)
        self.n_rows, self.column, self.with_ids, self.id_column = n_rows, column, with_ids, id_column
        self.suffix = self.path.suffix.lower()
        if self.suffix not in TARGETS:
            raise ValueError(f"path must end in one of {', '.join(TARGETS)}, got {self.path.name!r}")
        if self.dtype.kind != "f" or self.dtype.itemsize > 8:
            raise ValueError(f"dtype must be float16, float32 or float64, got {self.dtype}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if with_ids and self.suffix not in _tables.TABLES:
            raise ValueError(f"ids need a table ({', '.join(_tables.TABLES)}), got {self.suffix}")
        if self.suffix == ".fvecs" and self.dtype != np.float32:
            raise ValueError(f"dtype must be float32 for .fvecs, got {self.dtype}")
        if self.suffix == ".npz" and n_rows is None:
            raise ValueError("n_rows must be given for .npz, whose header comes first, got None")
        self.written = 0
        self._stack = contextlib.ExitStack()
        self._open = False

    def __enter__(self) -> "EmbeddingWriter":
        temp = self._stack.enter_context(atomic_path(self.path))
        self._open = True
        try:
            self._start(temp)
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _start(self, temp: Path) -> None:
        if self.suffix in _tables.TABLES:
            self._table: Any = None
            self._temp = temp
            return
        self._file: Any = self._stack.enter_context(temp.open("wb"))
        if self.suffix == ".npy":
            self._file.write(npy_header((self.n_rows or 0, self.dim), self.dtype))
        elif self.suffix == ".safetensors":
            self._total = hashlib.sha256()
            self._file.write(self._tensor_header())
        elif self.suffix == ".npz":
            archive = self._stack.enter_context(zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED))
            entry = archive.open(zipfile.ZipInfo(self.column + ".npy"), "w", force_zip64=True)
            self._file = self._stack.enter_context(entry)
            self._file.write(npy_header((self.n_rows or 0, self.dim), self.dtype))

    def _tensor_header(self) -> bytes:
        about = {"polyspan": dump_json({"sha256": {self.column: self._total.hexdigest()}}, indent=None)}
        return tensor_header({self.column: (CODES[self.dtype], (self.written, self.dim))}, about, ROOM)

    def write(self, rows: Any, ids: Any = None) -> None:
        """Append rows (b, d) and, where ids were announced, one id a row."""
        if not self._open:
            raise ValueError("write must be called inside the with block, got a writer that is not open")
        made = finite_rows(shaped_rows(rows, self.dim, self.written), self.written).astype(self.dtype, copy=False)
        if (ids is not None) != self.with_ids:
            raise ValueError(f"ids must be given iff with_ids, got with_ids={self.with_ids} and ids={ids is not None}")
        if self.n_rows is not None and self.written + len(made) > self.n_rows:
            raise ValueError(f"rows must be {self.n_rows} in all, got {self.written + len(made)}")
        if self.suffix in _tables.TABLES:
            self._write_batch(made, None if ids is None else as_ids(ids, len(made)))
        else:
            data = np.ascontiguousarray(made, made.dtype.newbyteorder("<")).view(np.uint8)
            if self.suffix == ".fvecs":
                width = np.array([self.dim], "<i4").view(np.uint8)
                data = np.hstack([np.broadcast_to(width, (len(data), 4)), data])
            data = data.reshape(-1)
            if self.suffix == ".safetensors":
                self._total.update(data.data)
            self._file.write(data)
        self.written += len(made)

    def _write_batch(self, rows: np.ndarray, ids: np.ndarray | None) -> None:
        import pyarrow as pa

        if self._table is None:
            kind = None if ids is None else ("int64" if ids.dtype.kind == "i" else "string")
            schema = _tables.arrow_schema(self.column, self.dim, self.dtype, kind, self.id_column)
            self._schema = schema
            self._table = self._stack.enter_context(table_writer(self.path, self._temp, schema))
        columns = [] if ids is None else [pa.array(ids, type=self._schema.field(self.id_column).type)]
        columns.append(_tables.arrow_vectors(rows, self._schema.field(self.column).type.value_type))
        self._table.write_batch(pa.record_batch(columns, schema=self._schema))

    def __exit__(self, kind, error, trace) -> None:
        self._open = False
        if kind is None:
            try:
                self._finish()
            except BaseException as late:
                self._stack.__exit__(type(late), late, late.__traceback__)
                raise
        self._stack.__exit__(kind, error, trace)

    def _finish(self) -> None:
        if self.n_rows is not None and self.written != self.n_rows:
            raise ValueError(f"rows must be {self.n_rows} in all, got {self.written}")
        if self.suffix in _tables.TABLES and self._table is None:
            raise ValueError("rows must be at least one, got none")
        if self.suffix in (".npy", ".safetensors"):
            self._file.seek(0)
            header = self._tensor_header() if self.suffix == ".safetensors" else None
            self._file.write(header or npy_header((self.written, self.dim), self.dtype))


def shaped_rows(rows: Any, dim: int, first: int) -> np.ndarray:
    """Return rows (b, dim) as a float array, NaN and infinity unseen; rows are counted from ``first``."""
    made = np.asarray(rows.detach().cpu() if hasattr(rows, "detach") else rows)
    if made.ndim != 2 or made.shape[1] != dim:
        raise ValueError(f"rows must have shape (b, {dim}), got {made.shape} at row {first}")
    if made.dtype.kind != "f" or made.dtype.itemsize > 8:
        raise ValueError(f"rows must be floats, got dtype {made.dtype} at row {first}")
    return made


def finite_rows(made: np.ndarray, first: int) -> np.ndarray:
    """Return the rows after looking for NaN and infinity."""
    try:
        check_finite("rows", made, first)
    except WrongContent as error:
        raise ValueError(f"rows must be finite, got {error.found} at {error.where}") from None
    return made


class Behind:
    """Run calls in order on one thread, at most ``depth`` behind; the first error is raised at the next call."""

    def __init__(self, work: Callable[..., None], depth: int = 1):
        self._work, self._queue, self._error = work, queue.Queue(depth), None
        self._thread = threading.Thread(target=self._run, name="polyspan-write", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (args := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._work(*args)
                except BaseException as error:
                    self._error = error

    def __call__(self, *args: Any) -> None:
        if self._error is None:
            self._queue.put(args)
        else:
            raise self._error

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error
