"""Files of vectors of any size, read batch by batch in flat memory."""

import contextlib
import hashlib
import os
import queue
import threading
import zipfile
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyspan.errors import CorruptFile, WrongContent

from . import _tables
from ._door import PathLike, check_ratio, open_binary, suffix_of, told
from ._row_streams import JSON_CELLS, STREAMED, RowStream, check_options, is_word_binary, open_stream
from ._slabs import (
    Slab,
    check_numbers,
    fvecs_rows,
    fvecs_slab,
    no_member,
    npy_slab,
    npz_names,
    npz_slabs,
    stored_digests,
    tensor_slabs,
)
from .arrays import FVECS, check_finite, wide_dtype, widen_brain

SOURCES = (".npy", ".npz", ".safetensors", *_tables.TABLES, *FVECS, *STREAMED, *JSON_CELLS)
BATCH_ROWS = 65536


class EmbeddingBatch(NamedTuple):
    """``rows`` (b, d) in float32 or float64, read-only; ``start`` counts from the file's first row; ``ids`` (b,)."""

    start: int
    rows: np.ndarray
    ids: np.ndarray | None = None


class EmbeddingReader:
    """Read a file of vectors, (n, d), batch by batch with one thread reading ahead.

    ``.npy``, stored ``.npz``, ``.safetensors`` and ``.fvecs`` are mapped: a batch of float32 or float64 is a view of
    the file. Every batch is checked for NaN and infinity. A digest that the file carries is compared at the end of a
    pass from the first row.

    Parameters
    ----------
    path : path-like
        ``.npy``, ``.npz``, ``.safetensors``, ``.parquet``, ``.arrow``, ``.feather``, ``.fvecs``, ``.bvecs`` or
        ``.ivecs``. Word vectors: ``.vec``, ``.glove`` or ``.txt`` (text), ``.w2v`` or ``.bin`` (binary of word2vec);
        words are ids, and none may come twice. ``.h5`` or ``.hdf5``. JSON lists of numbers: ``.jsonl``, ``.ndjson``,
        and ``.csv`` or ``.tsv`` with such lists in a column.
    column, id_column : str, optional
        Columns of a table, of JSON lines or of CSV: the vectors (left out: the only list, or ``vector``) and the ids
        (left out: ``id``, if there is one). Of HDF5 ``id_column`` is a dataset.
    member : str, optional
        Which array of ``.npz`` or ``.safetensors``, or which dataset of HDF5.
    batch_rows : int
        Rows a batch; the last one may be shorter.

    Attributes
    ----------
    n_rows, dim : int
    dtype : dtype
        Of the batches: float32 or float64.
    stored_dtype : str
        Of the file.
    id_column : str or None

    Raises
    ------
    UnreadableFile, CorruptFile, UntrustedFile, WrongContent, TooLarge
        On opening, from the header alone (texts without one are read through to count rows); and from :meth:`batches`,
        naming the row, or the line of a text.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        column: str | None = None,
        member: str | None = None,
        id_column: str | None = None,
        batch_rows: int = BATCH_ROWS,
    ):
        if batch_rows < 1:
            raise ValueError(f"batch_rows must be at least 1, got {batch_rows}")
        self.path, self.batch_rows = Path(path), batch_rows
        self.suffix = ".bin" if is_word_binary(path) else suffix_of(path, SOURCES)
        streamed = (*STREAMED, *JSON_CELLS)
        check_options(self.suffix, column, member, id_column)
        if self.suffix not in (*_tables.TABLES, *streamed) and (column is not None or id_column is not None):
            raise ValueError(f"column and id_column are for tables, got them for {self.suffix}")
        if member is not None and self.suffix not in (".npz", ".safetensors", *streamed):
            raise ValueError(f"member is for .npz and .safetensors, got {member!r} for {self.suffix}")
        self.column, self.id_column = column, id_column
        self._digest: str | None = None
        self._slab: Slab | None = None
        self._stream: RowStream | None = None
        if self.suffix in _tables.TABLES:
            self._open_table()
        elif self.suffix in streamed:
            self._open_streamed(member)
        else:
            self._open_slab(member)
        if self.n_rows == 0 or self.dim == 0:
            raise WrongContent(path, found=f"shape ({self.n_rows}, {self.dim})", expected="at least one row and column")

    def _open_table(self) -> None:
        with _tables.open_table(self.path) as table:
            self.column = _tables.vector_column(table, self.column)
            self.id_column = _tables.id_column(table, self.id_column)
            self.n_rows, self.dim = table.n_rows, _tables.width(table, self.column)
            stored = _tables.item_dtype(table, self.column)
        self.stored_dtype, self.dtype = str(stored), wide_dtype(stored)

    def _open_streamed(self, member: str | None) -> None:
        found = open_stream(self.path, self.suffix, column=self.column, member=member, id_column=self.id_column)
        self._stream, self.column, self.id_column = found, found.column, found.id_name
        self.n_rows, self.dim = found.n_rows, found.dim
        self.stored_dtype, self.dtype = str(found.stored), wide_dtype(found.stored)

    def _open_slab(self, member: str | None) -> None:
        if self.suffix in FVECS:
            slab = fvecs_slab(self.path)
            self.n_rows, self.dim = slab.shape[0], (slab.shape[1] - 4) // slab.dtype.itemsize
            self._slab, self.stored_dtype, self.dtype = slab, slab.stored, wide_dtype(slab.dtype)
            return
        if self.suffix == ".npy":
            slab = npy_slab(self.path)
        elif self.suffix == ".npz":
            # No budget: a packed member is streamed as well, so that only its ratio can do harm.
            name = self._member(member, npz_names(self.path))
            slab = npz_slabs(self.path, [name], 2**62)[name]
            if slab.packed is not None:
                check_ratio(self.path, slab.packed.compress_size, slab.packed.file_size, None, f"member {name}")
                if slab.fortran:
                    raise WrongContent(self.path, found="packed columns", expected="rows (C order), or no packing")
        else:
            found = tensor_slabs(self.path, refuse_types=False)
            slab = found.slabs[self._member(member, list(found.slabs))]
            check_numbers(slab)
            self._digest = stored_digests(self.path, found.metadata).get(slab.member)
        check_numbers(slab)
        if len(slab.shape) != 2:
            raise WrongContent(self.path, found=f"shape {slab.shape}", expected="2 dimensions", where=slab.member)
        self._slab = slab
        self.n_rows, self.dim = slab.shape
        self.stored_dtype = slab.stored
        self.dtype = np.dtype(np.float32) if slab.brain else wide_dtype(slab.dtype)

    def _member(self, member: str | None, names: list[str]) -> str:
        if member is None and len(names) != 1:
            shown = ", ".join(sorted(names)[:20])
            raise WrongContent(self.path, found=f"{len(names)} arrays: {shown}", expected="one, or member= naming it")
        if member is not None and member not in names:
            raise no_member(self.path, member, names)
        return member if member is not None else names[0]

    def batches(self, start: int = 0) -> Generator[EmbeddingBatch]:
        """Yield the rows from ``start`` on; one thread reads the next batch meanwhile."""
        if not 0 <= start <= self.n_rows:
            raise ValueError(f"start must lie in 0..{self.n_rows}, got {start}")
        return read_ahead(self.read(start))

    @property
    def random_access(self) -> bool:
        """Whether rows can be read without those before them: not of tables, nor of packed members."""
        return self._slab is not None and self._slab.packed is None

    def read(self, start: int = 0) -> Iterator[EmbeddingBatch]:
        """Yield the rows from ``start`` on, as :meth:`batches`, with nothing read ahead."""
        if self._stream is not None:
            pieces = self._streamed_batches(self._stream, start)
        else:
            pieces = self._table_batches(start) if self._slab is None else self._slab_batches(self._slab, start)
        expected = start
        for batch in pieces:
            if batch.start != expected:
                raise CorruptFile(self.path, found=f"row {batch.start}", expected=f"row {expected}")
            expected += len(batch.rows)
            check_finite(self.path, batch.rows, batch.start)
            yield batch
        if expected != self.n_rows:
            raise CorruptFile(self.path, found=f"{expected} rows", expected=f"{self.n_rows}, as its header says")

    def _streamed_batches(self, stream: RowStream, start: int) -> Iterator[EmbeddingBatch]:
        for first, rows, ids in stream.pieces(self.batch_rows, start):
            yield EmbeddingBatch(first, _fixed(rows.astype(self.dtype, copy=False)), ids)

    def _table_batches(self, start: int) -> Iterator[EmbeddingBatch]:
        assert self.column is not None
        names = [self.column] if self.id_column is None else [self.column, self.id_column]
        with _tables.open_table(self.path) as table:
            for first, batch in _regular(table.batches(names, self.batch_rows, start), self.batch_rows):
                stored = _tables.to_rows(self.path, self.column, batch.column(self.column), first, self.dim)
                ids = None
                if self.id_column is not None:
                    ids = _tables.to_ids(self.path, self.id_column, batch.column(self.id_column), first)
                yield EmbeddingBatch(first, _fixed(stored.astype(self.dtype, copy=False)), ids)

    def _slab_batches(self, slab: Slab, start: int) -> Iterator[EmbeddingBatch]:
        if slab.packed is not None:
            yield from self._packed_batches(slab, start)
            return
        mapped = fvecs_rows(slab) if self.suffix in FVECS else slab.map()
        total = hashlib.sha256() if self._digest is not None and start == 0 else None
        for at in range(start, self.n_rows, self.batch_rows):
            stored = mapped[at : at + self.batch_rows]
            if total is not None:
                total.update(np.ascontiguousarray(stored).data)
            rows = widen_brain(stored) if slab.brain else stored.astype(self.dtype, copy=False)
            if not rows.flags.c_contiguous:
                rows = np.ascontiguousarray(rows)
            yield EmbeddingBatch(at, _fixed(rows))
        if total is not None and total.hexdigest() != self._digest:
            raise CorruptFile(
                self.path, found="changed bytes", expected=f"SHA-256 {self._digest}", where=f"tensor {slab.member}"
            )

    def _packed_batches(self, slab: Slab, start: int) -> Iterator[EmbeddingBatch]:
        """Unpack a member as a stream; a later start costs unpacking what lies before."""
        row_bytes = self.dim * slab.dtype.itemsize
        assert slab.packed is not None
        try:
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(open_binary(self.path))
                stack.enter_context(told(self.path))
                stream = stack.enter_context(stack.enter_context(zipfile.ZipFile(file)).open(slab.packed))
                stream.seek(slab.offset + start * row_bytes)
                for at in range(start, self.n_rows, self.batch_rows):
                    n = min(self.batch_rows, self.n_rows - at)
                    data = stream.read(n * row_bytes)
                    if len(data) < n * row_bytes:
                        raise CorruptFile(self.path, found="a member that breaks off", expected=f"row {at}")
                    stored = np.frombuffer(data, slab.dtype).reshape(n, self.dim)
                    yield EmbeddingBatch(at, _fixed(stored.astype(self.dtype, copy=False)))
                stream.read(1)
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise CorruptFile(self.path, found=str(error), expected="a whole zip archive") from error

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this source from another: size, time, shape, and the digest of the first and last MiB."""
        with told(self.path):
            facts = os.stat(self.path)
        total = hashlib.sha256()
        with open_binary(self.path) as file, told(self.path):
            total.update(file.read(2**20))
            file.seek(max(0, facts.st_size - 2**20))
            total.update(file.read(2**20))
        return {
            "bytes": facts.st_size,
            "modified_ns": facts.st_mtime_ns,
            "shape": [self.n_rows, self.dim],
            "dtype": self.stored_dtype,
            "column": self.column,
            "member": self._slab.member if self._slab is not None else self._stream and self._stream.member,
            "ends_sha256": total.hexdigest(),
        }


def _fixed(rows: np.ndarray) -> np.ndarray:
    rows.flags.writeable = False
    return rows


def _regular(batches: Iterator[tuple[int, Any]], rows: int) -> Iterator[tuple[int, Any]]:
    """Join and cut Arrow batches so that all but the last have ``rows`` rows, wherever row groups end."""
    import pyarrow as pa

    held: list[Any] = []
    first = n = 0
    for at, batch in batches:
        if n == 0:
            first = at
        held.append(batch)
        n += batch.num_rows
        while n >= rows:
            joined = pa.concat_batches(held) if len(held) > 1 else held[0]
            yield first, joined.slice(0, rows)
            held = [joined.slice(rows)] if n > rows else []
            first, n = first + rows, n - rows
    if n:
        yield first, pa.concat_batches(held) if len(held) > 1 else held[0]


def text_batches(path: PathLike, column: str, *, batch_rows: int = BATCH_ROWS, start: int = 0) -> Generator[list[str]]:
    """Yield a text column of a table in the batches in which :class:`EmbeddingReader` yields its vectors.

    Raises
    ------
    FileError
        One of its five kinds; ``WrongContent`` where there is no such column, it holds no text, or a text is missing.
    """
    import pyarrow.types as t

    suffix_of(path, _tables.TABLES)
    with _tables.open_table(path) as table:
        if column not in table.schema.names:
            raise no_member(path, column, table.schema.names, "column")
        kind = table.schema.field(column).type
        if not (t.is_string(kind) or t.is_large_string(kind)):
            raise WrongContent(path, found=f"column {column!r} of type {kind}", expected="a column of text")
        for first, batch in _regular(table.batches([column], batch_rows, start), batch_rows):
            found = batch.column(column)
            if found.null_count:
                row = first + int(np.flatnonzero(found.is_null().to_numpy(zero_copy_only=False))[0])
                raise WrongContent(path, found="no text", expected="one in every row", where=f"{column}, row {row}")
            yield found.to_pylist()


_END = object()


def read_ahead(items: Iterator[Any], depth: int = 1) -> Generator[Any]:
    """Yield ``items`` while a thread makes the next ``depth``; its errors are raised here, and it ends with us."""
    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: Any) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(entry, timeout=0.05)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:
            put((_END, error))
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, name="polyspan-read", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stop.set()
        thread.join()
