"""Vectors that are filled in over several runs, and files that change places while one always stands there."""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.errors import CorruptFile, UnreadableFile

from ._door import PathLike, told
from ._slabs import npy_header
from .atomic import make_folder, sync_folder
from .embedding_writing import finite_rows, shaped_rows
from .text import parse_json, read_lines
from .transforming import SYNC_BYTES, lock_partial, write_at


class PartialRows:
    """A ``.npy`` of vectors, (n, dim), that fills from the first row on and survives a kill.

    Rows count as filled once they are on the disk and the journal beside the file says so. Filled rows may be written
    anew in any order. One process at a time may have it open.

    Parameters
    ----------
    path : path-like
        The array; the journal is ``NAME.journal`` beside it. Both are made where they do not exist.
    n_rows, dim : int
    dtype : dtype
        float16, float32 or float64.
    work : dict
        JSON types that say what the rows are made of and how; a file of other work is refused.

    Attributes
    ----------
    filled : int
        Rows, from the first on, that are on the disk.
    written : int
        Rows, from the first on, that were written.

    Raises
    ------
    ValueError
        The journal is of other work; what differs is named.
    CorruptFile
        File and journal do not belong together.
    UnreadableFile
        The place cannot be written to, or another run has it open.
    """

    def __init__(self, path: PathLike, *, n_rows: int, dim: int, dtype: Any = np.float32, work: dict[str, Any]):
        from polyspan.run import Journal

        self.path, self.shape, self.dtype = Path(path), (n_rows, dim), np.dtype(dtype)
        self._row_bytes = dim * self.dtype.itemsize
        make_folder(self.path.parent)
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(lock_partial(self.path, path))
        try:
            kept = self.path.with_name(self.path.name + ".journal")
            if os.fstat(self._file).st_size == 0:
                Journal.discard(kept)
            header = npy_header(self.shape, self.dtype)
            self._offset = len(header)
            self._journal = Journal(kept, work | {"shape": list(self.shape), "dtype": self.dtype.str})
            self.filled = sum(self._journal.done.values())
            size = os.fstat(self._file).st_size
            if not self.filled and size <= len(header) and os.pread(self._file, size, 0) == header[:size]:
                # New, or cut off before there was room for a row.
                with told(path, "a place that can be written to"):
                    write_at(self._file, header, 0)
                    os.ftruncate(self._file, self._offset + n_rows * self._row_bytes)
            elif size != self._offset + n_rows * self._row_bytes or os.pread(self._file, self._offset, 0) != header:
                raise CorruptFile(path, found="an array that its journal does not fit", expected="both, or neither")
        except BaseException:
            self.close()
            raise
        self.written = self.filled

    def append(self, start: int, rows: Any) -> None:
        """Write the next rows (b, dim), which begin at ``start``; they are synced by and by, and by :meth:`sync`."""
        if start != self.written:
            raise ValueError(f"start must be {self.written}, the first row not written, got {start}")
        self._put(start, rows)
        self.written += len(rows)
        if (self.written - self.filled) * self._row_bytes >= SYNC_BYTES:
            self.sync()

    def rewrite(self, positions: Any, rows: Any) -> None:
        """Write rows anew: row ``positions[i]`` becomes ``rows[i]``; on the disk when this returns.

        What was appended is synced first: rows that do not count yet would be appended again, over these, after a kill.
        """
        positions = np.asarray(positions)
        if len(positions) != len(rows) or (
            len(positions) and not 0 <= positions.min() <= positions.max() < self.written
        ):
            raise ValueError(
                f"positions must name one written row each (0 to {self.written - 1}), got {len(positions)}"
            )
        self.sync()
        for at, row in zip(positions.tolist(), np.asarray(rows), strict=True):
            self._put(at, row[None])
        os.fsync(self._file)

    def _put(self, start: int, rows: Any) -> None:
        made = finite_rows(shaped_rows(rows, self.shape[1], start), start)
        if start + len(made) > self.shape[0]:
            raise ValueError(f"rows must be {self.shape[0]} in all, got {start + len(made)}")
        data = np.ascontiguousarray(made.astype(self.dtype, copy=False), self.dtype.newbyteorder("<"))
        with told(self.path, "a place that can be written to"):
            write_at(self._file, data.reshape(-1).view(np.uint8), self._offset + start * self._row_bytes)

    def sync(self) -> None:
        """Put on the disk what was appended, and note it."""
        if self.written > self.filled:
            os.fsync(self._file)
            self._journal.record(str(self.filled), self.written - self.filled)
            self.filled = self.written

    def close(self) -> None:
        """Let go of the file; what is not synced counts as not written."""
        self._stack.close()


def filled_rows(path: PathLike) -> int:
    """Return how many rows of a :class:`PartialRows` are on the disk, whoever has it open; 0 where there is none."""
    kept = Path(path).with_name(Path(path).name + ".journal")
    if not (Path(path).exists() and kept.exists()):
        return 0
    return sum(parse_json(line, kept, f"line {i}")["value"] for i, line in enumerate(read_lines(kept)[0][1:], start=2))


def swap_in(path: PathLike, incoming: PathLike, kept: PathLike) -> None:
    """Put ``incoming`` in the place of ``path``, which lives on under the name ``kept``.

    At every moment there is a whole file at ``path``, the old one or the new one. After a kill in between, the same
    call ends what was begun; once it is done it does nothing.

    Raises
    ------
    UnreadableFile
        A file is missing, ``kept`` is another file already, or the file system has no second names for a file.
    """
    path, incoming, kept = Path(path), Path(incoming), Path(kept)
    with told(path, "files of one folder that can be renamed"):
        if not incoming.exists():
            if kept.exists() and path.exists():
                return
            raise UnreadableFile(incoming, found="no such file", expected="the file that is to take the place")
        if not kept.exists():
            os.link(path, kept)
            sync_folder(path.parent)
        elif not os.path.samefile(path, kept):
            raise UnreadableFile(kept, found="a file of that name", expected="no file, to keep the old one under it")
        os.replace(incoming, path)
        sync_folder(path.parent)
