"""A file of vectors carried through a map into another file, in flat memory and resumable."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.errors import CorruptFile, UnreadableFile

from . import _tables
from ._door import PathLike, told
from ._slabs import npy_header
from .arrays import same_file
from .atomic import real_target, settle, sync_folder
from .embedding_writing import TARGETS, Behind, EmbeddingWriter, finite_rows, shaped_rows
from .embeddings import BATCH_ROWS, EmbeddingBatch, EmbeddingReader

SYNC_BYTES = 64 * 2**20
"""How much is written between two entries of the journal, each of which waits for the disk."""


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
    dtype: Any = None,
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
    dtype : dtype, optional
        float16, float32 or float64, in which results are stored; left out, float16 where the source stores that and the
        target can, else as ``fn`` gives them.
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
        ``fn`` gives another shape, NaN or infinity, or a number beyond ``dtype`` (the row is named); or the journal is
        of other work (what differs is named).
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
    if dtype is None and reader.stored_dtype == "float16" and suffix != ".fvecs":
        dtype = np.float16

    def results(start: int) -> Iterator[tuple[EmbeddingBatch, np.ndarray]]:
        with contextlib.closing(reader.batches(start)) as batches:
            for batch in batches:
                made = shaped_rows(fn(batch.rows), dim, batch.start)  # the writing thread looks for NaN
                if len(made) != len(batch.rows):
                    raise ValueError(
                        f"fn must keep the number of rows, {len(batch.rows)}, got {len(made)} at row {batch.start}"
                    )
                yield batch, made if dtype is None else _stored_as(np.dtype(dtype), made, batch.start)
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
                behind = stack.enter_context(Behind(writer.write))
            behind(made, batch.ids if with_ids else None)
    return reader.n_rows


def _stored_as(dtype: np.dtype, rows: np.ndarray, first: int) -> np.ndarray:
    """Return rows in another float width; a finite number that is none there is refused."""
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise ValueError(f"dtype must be float16, float32 or float64, got {dtype}")
    with np.errstate(over="ignore"):
        made = rows.astype(dtype, copy=False)
    if made.itemsize < rows.itemsize:
        lost = np.flatnonzero((np.isinf(made) & np.isfinite(rows)).any(axis=1))
        if len(lost):
            most = np.abs(rows[lost[0]]).max()
            raise ValueError(f"fn must give numbers that {dtype} can hold, got {most:g} at row {first + lost[0]}")
    return made


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
            with Behind(write) as behind:
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
