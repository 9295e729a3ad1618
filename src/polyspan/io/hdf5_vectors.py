"""Vectors in a dataset of an HDF5 file, read slice by slice."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from polyspan.errors import CorruptFile, TooLarge, WrongContent, require

from ._door import MAX_RATIO, RATIO_FLOOR, PathLike, open_binary, refuse_pickle, told
from ._row_streams import Piece, RowStream
from ._slabs import no_member

MAGIC = b"\x89HDF\r\n\x1a\n"


def open_hdf5(path: PathLike, member: str | None, id_column: str | None) -> RowStream:
    """Open a dataset (n, d) of real numbers: the one named by its path in the file, or the only one of two dimensions.

    Raises
    ------
    MissingExtra
        h5py is not installed.
    CorruptFile, WrongContent, TooLarge
        The file is none or is broken; the dataset is not there, is of another kind, or lies in another file; it is
        packed to less than a hundredth.
    """
    h5py = _h5py()
    with open_binary(path) as head, told(path):
        start = head.read(512)
    if not start.startswith(MAGIC):
        refuse_pickle(path, start)
        raise CorruptFile(path, found=f"bytes {start[:8]!r}", expected=f"{MAGIC!r}", where="byte 0")
    with _opened(path) as names:
        if member is None:
            member = _only(path, [name for name, facts in names.items() if len(facts.shape) == 2])
        found = _dataset(path, names, member)
        if found.dtype.kind not in "fiu" or found.dtype.itemsize > 8 or len(found.shape) != 2:
            raise WrongContent(
                path, found=f"{found.dtype} of shape {found.shape}", expected="real numbers (n, d)", where=member
            )
        n_bytes = found.shape[0] * found.shape[1] * found.dtype.itemsize
        packed = found.id.get_storage_size()
        if n_bytes > RATIO_FLOOR and n_bytes > MAX_RATIO * packed:
            raise TooLarge(
                path,
                found=f"{packed:,} bytes that unpack to {n_bytes:,}",
                expected=f"at most {MAX_RATIO} times",
                where=f"dataset {member}",
            )
        n_rows, dim = found.shape
        if id_column is not None:
            ids = _dataset(path, names, id_column)
            if ids.shape != (n_rows,) or not (ids.dtype.kind in "iu" or h5py.check_string_dtype(ids.dtype)):
                raise WrongContent(
                    path,
                    found=f"{ids.dtype} of shape {ids.shape}",
                    expected=f"{n_rows} integers or texts",
                    where=id_column,
                )
        stored = found.dtype.newbyteorder("=")
    return RowStream(n_rows, dim, stored, partial(_pieces, path, member, id_column, n_rows), None, member, id_column)


def _h5py() -> Any:
    return require("h5py", extra="hdf5", purpose="reading an HDF5 file")


@contextmanager
def _opened(path: PathLike) -> Generator[dict[str, Any]]:
    """Open the file with the datasets that lie in it; links that lead elsewhere are not followed."""
    h5py = _h5py()
    try:
        with h5py.File(str(path), "r") as file:
            names: dict[str, Any] = {}
            file.visititems(lambda name, held: names.update({name: held}) if isinstance(held, h5py.Dataset) else None)
            yield names
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
        found = (str(error).splitlines() or ["a broken file"])[0][:200]
        raise CorruptFile(path, found=found, expected="a whole HDF5 file") from error


def _only(path: PathLike, names: list[str]) -> str:
    if len(names) != 1:
        shown = ", ".join(sorted(names)[:20])
        raise WrongContent(path, found=f"{len(names)} datasets: {shown}", expected="one, or member= naming it")
    return names[0]


def _dataset(path: PathLike, names: dict[str, Any], name: str) -> Any:
    name = name.strip("/")
    if name not in names:
        raise no_member(path, name, list(names), "dataset")
    found = names[name]
    if found.is_virtual or found.external:
        raise WrongContent(path, found="a dataset that lies in other files", expected="one in this file", where=name)
    return found


def _pieces(path: PathLike, member: str, id_column: str | None, n_rows: int, rows: int, start: int) -> Iterator[Piece]:
    with _opened(path) as names:
        found = _dataset(path, names, member)
        ids = None if id_column is None else _dataset(path, names, id_column)
        for first in range(start, n_rows, rows):
            held = np.asarray(found[first : first + rows])
            yield first, held.astype(held.dtype.newbyteorder("="), copy=False), _ids(path, ids, first, rows)


def _ids(path: PathLike, ids: Any, first: int, rows: int) -> np.ndarray | None:
    if ids is None:
        return None
    held = ids[first : first + rows]
    if held.dtype.kind in "iu":
        return held.astype(np.int64)
    try:
        return np.array([text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in held], np.str_)
    except UnicodeDecodeError as error:
        raise CorruptFile(path, found="a text that is not UTF-8", expected="UTF-8", where=f"row {first}") from error
