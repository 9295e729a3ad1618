"""Arrays in the IDX format of MNIST and its kin, packed or not."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from polyspan.errors import CorruptFile, WrongContent

from ._door import PathLike, check_budget, file_size, open_binary, refuse_pickle, told

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: PathLike, *, ndim: int | None = None, max_bytes: int | None = None) -> np.ndarray:
    """Return the array of an ``idx1-ubyte``, ``idx3-ubyte``, … file; ``.gz`` is unpacked.

    Parameters
    ----------
    path : path-like
    ndim : int, optional
        The number of dimensions that is asked for: 1 for labels, 3 for images.
    max_bytes : int, optional
        The most memory that the array may take.

    Returns
    -------
    ndarray
        In the stored dtype, native byte order.

    Raises
    ------
    UnreadableFile, CorruptFile, UntrustedFile, WrongContent, TooLarge
        The header's sizes are compared with the data that follow.
    """
    packed = Path(path).suffix.lower() == ".gz"
    with open_binary(path) as raw, told(path):
        refuse_pickle(path, raw.read(512))
        raw.seek(0)
        file = gzip.GzipFile(fileobj=raw) if packed else raw
        try:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in TYPES or head[3] == 0:
                raise CorruptFile(path, found=f"bytes {head!r}", expected="the magic of IDX", where="byte 0")
            dtype, sides = np.dtype(TYPES[head[2]]), head[3]
            if ndim is not None and sides != ndim:
                raise WrongContent(path, found=f"{sides} dimensions", expected=f"{ndim}")
            lengths = file.read(4 * sides)
            if len(lengths) < 4 * sides:
                raise CorruptFile(path, found="a short header", expected=f"{sides} sizes", where=f"byte {len(lengths)}")
            shape = struct.unpack(f">{sides}I", lengths)
            n_bytes = math.prod(shape) * dtype.itemsize
            # Deflate packs at most 1032 to 1: a header that asks for more than that cannot be right.
            if n_bytes > file_size(path) * (1032 if packed else 1):
                raise CorruptFile(
                    path, found=f"shape {shape}", expected="a size that the file can hold", where="byte 4"
                )
            check_budget(path, n_bytes, max_bytes)
            data = file.read(n_bytes + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise CorruptFile(path, found=str(error), expected="a whole gzip file") from error
    if len(data) != n_bytes:
        found = "more" if len(data) > n_bytes else f"{len(data):,}"
        raise CorruptFile(path, found=f"{found} bytes of data", expected=f"{n_bytes:,} for shape {shape}")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
