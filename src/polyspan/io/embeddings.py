"""Files of vectors of any size, read and written batch by batch in flat memory."""

import contextlib
import fcntl
import hashlib
import os
import queue
import threading
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyspan.errors import CorruptFile, UnreadableFile, WrongContent

from . import _tables
from ._door import PathLike, check_ratio, open_binary, suffix_of, told
from ._slabs import (
    Slab,
    check_numbers,
    fvecs_rows,
    fvecs_slab,
    no_member,
    npy_header,
    npy_slab,
    npz_names,
    npz_slabs,
    stored_digests,
    tensor_header,
    tensor_slabs,
)
from .arrays import CODES, FVECS, as_ids, check_finite, same_file, table_writer, wide_dtype, widen_brain
from .atomic import atomic_path, real_target, settle, sync_folder
from .text import dump_json

SOURCES = (".npy", ".npz", ".safetensors", *_tables.TABLES, *FVECS)
TARGETS = (".npy", ".npz", ".safetensors", *_tables.TABLES, ".fvecs")
BATCH_ROWS = 65536
ROOM = 1024
"""Bytes kept for the JSON of a .safetensors header, which is written last, when the number of rows is known."""
SYNC_BYTES = 64 * 2**20
"""How much is written between two entries of the journal, each of which waits for the disk."""


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
        ``.ivecs``.
    column, id_column : str, optional
        Columns of a table: the vectors (left out: the only list, or ``vector``) and the ids (left out: ``id``, if
        there is one).
    member : str, optional
        Which array of ``.npz`` or ``.safetensors``.
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
        On opening, from the header alone; and from :meth:`batches`, naming the row.
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
        self.suffix = suffix_of(path, SOURCES)
        if self.suffix not in _tables.TABLES and (column is not None or id_column is not None):
            raise ValueError(f"column and id_column are for tables, got them for {self.suffix}")
        if member is not None and self.suffix not in (".npz", ".safetensors"):
            raise ValueError(f"member is for .npz and .safetensors, got {member!r} for {self.suffix}")
        self.column, self.id_column = column, id_column
        self._digest: str | None = None
        self._slab: Slab | None = None
        if self.suffix in _tables.TABLES:
            self._open_table()
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
            "member": None if self._slab is None else self._slab.member,
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


class _Behind:
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

    def __enter__(self) -> "_Behind":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error


def transform_file(
    source: PathLike,
    target: PathLike,
    fn: Callable[[np.ndarray], Any],
    *,
    dim: int,
    batch_rows: int = BATCH_ROWS,
    column: str | None = None,
    id_column: str | None = None,
    member: str | None = None,
    target_column: str | None = None,
    fingerprint: str = "",
    journal: PathLike | None = None,
    resume: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Carry every vector of a file through ``fn`` into another file, in flat memory, and return the number of rows.

    One thread reads ahead and one writes behind. The source is never changed; ids of a table are kept where the target
    is a table.

    With a ``.npy`` target a run that was killed goes on where it stopped: rows stand in ``.NAME.partial`` beside the
    target, and a journal holds which of them are on the disk. The result has the same bytes as that of an unbroken
    run. Other targets begin anew.

    Parameters
    ----------
    source, target : path-like
        See :class:`EmbeddingReader` and :class:`EmbeddingWriter`; not the same file.
    fn : callable
        ``fn(rows)`` maps (b, d) float rows, which it must not change, to (b, ``dim``) floats, array or tensor. Its
        result must depend on the rows alone.
    dim : int
        Components of a result.
    batch_rows : int
        Rows a batch: memory is about four batches.
    column, id_column, member : str, optional
        Where the vectors and ids stand in the source.
    target_column : str, optional
        Name of the target's column or member; left out, as in the source, or ``vector``.
    fingerprint : str
        What ``fn`` is, such as the digest of the map's file; a journal of other work is refused.
    journal : path-like, optional
        Where the journal of a ``.npy`` target stands; left out, ``.NAME.journal`` beside the target.
    resume : bool
        Go on where a killed run stopped; otherwise its rows are thrown away.
    progress : callable, optional
        Called as ``progress(rows done, rows in all)`` after each batch.

    Raises
    ------
    ValueError
        ``fn`` gives another shape, or NaN or infinity (the row is named); or the journal is of other work (what
        differs is named).
    UnreadableFile, CorruptFile, UntrustedFile, WrongContent, TooLarge
        About the source; UnreadableFile also where the target cannot be written, or another run is writing it.
    """
    if same_file(source, target):
        raise ValueError(f"target must be another file than source, got {target} twice")
    suffix = Path(target).suffix.lower()
    if suffix not in TARGETS:
        raise ValueError(f"target must end in one of {', '.join(TARGETS)}, got {Path(target).name!r}")
    if suffix != ".npy" and journal is not None:
        raise ValueError(f"journal is for a .npy target, got {journal} for {suffix}")
    reader = EmbeddingReader(source, column=column, member=member, id_column=id_column, batch_rows=batch_rows)

    def results(start: int) -> Iterator[tuple[EmbeddingBatch, np.ndarray]]:
        with contextlib.closing(reader.batches(start)) as batches:
            for batch in batches:
                made = shaped_rows(fn(batch.rows), dim, batch.start)  # the writing thread looks for NaN
                if len(made) != len(batch.rows):
                    raise ValueError(
                        f"fn must keep the number of rows, {len(batch.rows)}, got {len(made)} at row {batch.start}"
                    )
                yield batch, made
                if progress is not None:
                    progress(batch.start + len(made), reader.n_rows)

    if suffix == ".npy":
        _to_npy(reader, target, results, dim, fingerprint, journal, resume)
        return reader.n_rows
    name = target_column or reader.column or _tables.VECTOR
    with_ids = reader.id_column is not None and suffix in _tables.TABLES
    with contextlib.ExitStack() as stack:
        behind = None
        for batch, made in results(0):
            if behind is None:
                writer = stack.enter_context(
                    EmbeddingWriter(
                        target, dim=dim, dtype=made.dtype, n_rows=reader.n_rows, column=name, with_ids=with_ids,
                        id_column=reader.id_column or _tables.ID,
                    )
                )  # fmt: skip
                behind = stack.enter_context(_Behind(writer.write))
            behind(made, batch.ids if with_ids else None)
    return reader.n_rows


def _to_npy(reader, target, results, dim, fingerprint, journal, resume) -> None:
    """Write results into a partial file whose finished rows a journal holds; rename it at the end."""
    from polyspan.run import Journal

    real = real_target(target)
    partial = real.with_name(f".{real.name}.partial")
    record = real.with_name(f".{real.name}.journal") if journal is None else Path(journal)
    with lock_partial(partial, target) as descriptor:
        fresh = os.fstat(descriptor).st_size == 0
        if fresh or not resume:
            Journal.discard(record)
            os.ftruncate(descriptor, 0)
        header = {
            "source": reader.fingerprint(), "fn": fingerprint, "dim": dim, "batch_rows": reader.batch_rows,
        }  # fmt: skip
        done = Journal(record, header)
        start, dtype = _resumed(done, descriptor, reader, dim)
        mode = os.fstat(descriptor).st_mode & 0o777
        if real.exists():
            mode = real.stat().st_mode & 0o777
        state: dict[str, Any] = {"since": start, "dtype": dtype}

        def write(at: int, rows: np.ndarray) -> None:
            if state["dtype"] is None:
                state["dtype"] = rows.dtype
                write_at(descriptor, npy_header((reader.n_rows, dim), rows.dtype), 0)
            if rows.dtype != state["dtype"]:
                raise ValueError(f"fn must keep its dtype, {state['dtype']}, got {rows.dtype} at row {at}")
            finite_rows(rows, at)
            data = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
            row_bytes = dim * rows.dtype.itemsize
            write_at(descriptor, data, 128 + at * row_bytes)
            stop = at + len(rows)
            if (stop - state["since"]) * row_bytes >= SYNC_BYTES or stop == reader.n_rows:
                os.fsync(descriptor)
                done.record(str(state["since"]), {"stop": stop, "dtype": rows.dtype.str})
                state["since"] = stop

        with told(target, "a place that can be written to"):
            with _Behind(write) as behind:
                for batch, made in results(start):
                    behind(batch.start, made)
            settle(partial, real, mode)
    with told(target, "a place that can be written to"):
        done.remove()
        sync_folder(record.parent)


@contextlib.contextmanager
def lock_partial(partial: Path, target: PathLike) -> Generator[int]:
    """Open the partial file, which one run at a time may write; a killed run's lock goes with it.

    Where a file system grants every lock, two runs of the same work write the same bytes, and of other work the
    journal's header stops the second.
    """
    with told(target, "a folder that can be written to"):
        descriptor = os.open(partial, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UnreadableFile(target, found="another run writing it", expected="one run at a time") from error
        except OSError:
            pass
        yield descriptor
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: Any, at: int) -> None:
    rest = memoryview(data)
    while rest:
        n = os.pwrite(descriptor, rest, at)
        rest, at = rest[n:], at + n


def _resumed(done: Any, descriptor: int, reader: EmbeddingReader, dim: int) -> tuple[int, np.dtype | None]:
    """Return the first row that is not on the disk, and the dtype of those that are."""
    start, dtype = 0, None
    for key, value in done.done.items():
        if int(key) != start:
            raise CorruptFile(done.path, found=f"rows from {key}", expected=f"rows from {start}")
        start, dtype = int(value["stop"]), np.dtype(value["dtype"])
    if dtype is None:
        os.ftruncate(descriptor, 0)
        return 0, None
    header = npy_header((reader.n_rows, dim), dtype)
    needed = len(header) + start * dim * dtype.itemsize
    if os.fstat(descriptor).st_size < needed or os.pread(descriptor, len(header), 0) != header:
        raise CorruptFile(
            done.path, found="a partial file that does not match it", expected=f"{needed:,} bytes; remove both"
        )
    return start, dtype
