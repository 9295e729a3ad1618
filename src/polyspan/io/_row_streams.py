"""Files of vectors that can only be read from the front: what all of them give, and which reader a suffix means."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyspan.errors import CorruptFile

from ._door import PathLike, check_budget, open_binary

WORD_TEXTS = (".vec", ".glove", ".txt")
WORD_BINARIES = (".w2v", ".bin")
HDF5 = (".h5", ".hdf5")
JSON_LINES = (".jsonl", ".ndjson")
JSON_CELLS = (".csv", ".tsv")
STREAMED = (*WORD_TEXTS, *WORD_BINARIES, *HDF5, *JSON_LINES)

Piece = tuple[int, np.ndarray, np.ndarray | None]


class RowStream(NamedTuple):
    """An opened file: ``pieces(rows, start)`` yields (first row, rows (b, d), ids (b,) or None) of at most ``rows``.

    ``stored`` is the dtype of the rows; ``column`` and ``member`` are the names that were chosen, ``id_name`` that of
    the ids, or None where there are none.
    """

    n_rows: int
    dim: int
    stored: np.dtype
    pieces: Callable[[int, int], Iterator[Piece]]
    column: str | None = None
    member: str | None = None
    id_name: str | None = None


def is_word_binary(path: PathLike) -> bool:
    """Tell whether a ``.bin`` file begins as word2vec's does, with two numbers in a line: no pickle does.

    A ``.bin`` that does not is left to the refusal of files that run code.
    """
    from .word_vectors import HEADER

    if Path(path).suffix.lower() != ".bin":
        return False
    with open_binary(path) as file:
        return HEADER.match(file.read(64)) is not None


def open_stream(
    path: PathLike, suffix: str, *, column: str | None = None, member: str | None = None, id_column: str | None = None
) -> RowStream:
    """Open a file whose suffix is one of ``STREAMED`` or, for lists in cells, ``JSON_CELLS``."""
    if suffix in WORD_TEXTS:
        from .word_vectors import open_word_text

        return open_word_text(path)
    if suffix in WORD_BINARIES:
        from .word_vectors import open_word_binary

        return open_word_binary(path)
    if suffix in HDF5:
        from .hdf5_vectors import open_hdf5

        return open_hdf5(path, member, id_column)
    from .json_vectors import open_json_lists

    return open_json_lists(path, suffix, column, id_column)


def check_options(suffix: str, column: str | None, member: str | None, id_column: str | None = None) -> None:
    """Refuse the name of a place that files of this suffix do not have."""
    given: dict[str, Any] = {}
    if suffix in (*WORD_TEXTS, *WORD_BINARIES):
        given = {"column": column, "member": member, "id_column": id_column}
    elif suffix in HDF5:
        given = {"column": column}
    elif suffix in (*JSON_LINES, *JSON_CELLS):
        given = {"member": member}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} must be left out for {suffix}, got {value!r}")


def read_stream(path: PathLike, stream: RowStream, max_bytes: int | None) -> np.ndarray:
    """Return all rows of a stream, (n, d), in the stored dtype."""
    check_budget(path, stream.n_rows * stream.dim * stream.stored.itemsize, max_bytes)
    made = np.empty((stream.n_rows, stream.dim), stream.stored)
    done = 0
    for first, rows, _ in stream.pieces(8192, 0):
        if first != done or done + len(rows) > len(made):
            raise CorruptFile(path, found=f"more than {len(made)} rows", expected=f"{len(made)}, as its header says")
        made[done : done + len(rows)] = rows
        done += len(rows)
    if done != len(made):
        raise CorruptFile(path, found=f"{done} rows", expected=f"{len(made)}, as its header says")
    return made
