"""SHA-256 of files and of arrays: what says that two things are the same."""

import hashlib

import numpy as np

from ._door import PathLike, open_binary, told


def digest_file(path: PathLike) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open_binary(path) as file, told(path):
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_array(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's dtype, shape and values, as 64 hexadecimal digits.

    Byte order, memory layout and mapping make no difference; dtype and shape do.

    Raises
    ------
    TypeError
        The array holds Python objects, whose bytes are addresses.
    """
    if array.dtype.hasobject:
        raise TypeError(f"array must hold numbers or text, got dtype {array.dtype}")
    little = array.dtype.newbyteorder("<")
    total = hashlib.sha256(f"{little.str}{tuple(array.shape)}".encode())
    rows = array.reshape(1, -1) if array.ndim < 2 else array
    step = max(1, 2**22 // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        total.update(np.ascontiguousarray(rows[start : start + step], dtype=little).tobytes())
    return total.hexdigest()
