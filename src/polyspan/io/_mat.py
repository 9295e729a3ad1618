"""Numbers in MATLAB files up to version 7.2.

Read here and not by SciPy, whose reader ends in a segmentation fault at one flipped bit of a length field.
"""

import math
import struct
import zlib
from io import BufferedReader
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from polyspan.errors import CorruptFile, WrongContent

from ._door import PathLike, check_budget, check_ratio, corrupt_if_short, file_size, open_binary, refuse_pickle, told
from ._slabs import no_member
from ._sparse import check_sparse

COMPRESSED, MATRIX = 15, 14
MAX_VARIABLES = 10_000
HEAD_BYTES = 4096
"""Flags, sizes and name of a variable lie within its first bytes."""
ITEMS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
SPARSE = 5
CLASSES = {
    1: "cell", 2: "struct", 3: "object", 4: "char", 5: "sparse", 6: "double", 7: "single", 8: "int8", 9: "uint8",
    10: "int16", 11: "uint16", 12: "int32", 13: "uint32", 14: "int64", 15: "uint64", 16: "function", 17: "opaque",
}  # fmt: skip


class Variable(NamedTuple):
    """One variable: what it is, and where its element lies; ``at`` counts inside the element, past the name."""

    name: str
    shape: tuple[int, ...]
    kind: int
    complex: bool
    at: int
    offset: int
    n_bytes: int
    unpacked: int | None

    @property
    def numeric(self) -> bool:
        return SPARSE <= self.kind <= 15


class _Part(NamedTuple):
    type: int
    begin: int
    n_bytes: int
    next: int


def mat_variables(path: PathLike, max_bytes: int | None = None) -> tuple[str, dict[str, Variable]]:
    """Return the byte order (``"<"`` or ``">"``) and the variables of a file, of which only the heads are read."""
    size = file_size(path)
    found: dict[str, Variable] = {}
    with open_binary(path) as file, told(path):
        order = _order(path, file, size)
        at = 128
        while at < size:
            file.seek(at)
            tag = file.read(8)
            if len(tag) < 8:
                raise CorruptFile(path, found="half a tag", expected="whole elements", where=f"byte {at}")
            kind, n_bytes = struct.unpack(order + "II", tag)
            if kind not in (COMPRESSED, MATRIX) or at + 8 + n_bytes > size:
                raise CorruptFile(
                    path,
                    found=f"an element of type {kind}, {n_bytes:,} bytes",
                    expected="a variable inside the file",
                    where=f"byte {at}",
                )
            head, unpacked = file.read(min(n_bytes, HEAD_BYTES)), None
            if kind == COMPRESSED:
                head, unpacked = _packed_head(path, head, order, at)
                check_ratio(path, n_bytes, unpacked, max_bytes, f"byte {at}")
            if head:
                variable = _head(path, head, order, at)._replace(offset=at + 8, n_bytes=n_bytes, unpacked=unpacked)
                if variable.name in found:
                    raise CorruptFile(path, found=f"variable {variable.name!r} twice", expected="distinct names")
                if variable.name:  # MATLAB keeps its own notes in a variable without a name
                    found[variable.name] = variable
            if len(found) > MAX_VARIABLES:
                raise WrongContent(path, found="more variables", expected=f"at most {MAX_VARIABLES:,}")
            at += 8 + n_bytes
    return order, found


def _order(path: PathLike, file: BufferedReader, size: int) -> str:
    head = file.read(128)
    if head.startswith((b"MATLAB 7.3", b"\x89HDF")):
        raise WrongContent(path, found="a MATLAB 7.3 file, which is HDF5", expected="version 7 or older: save with -v7")
    if head[126:128] not in (b"IM", b"MI"):
        refuse_pickle(path, head + file.read(2**16))
        corrupt_if_short(path, size, 128, "the header of .mat")
        raise CorruptFile(path, found=f"bytes {head[:8]!r}", expected="a MATLAB 5 to 7 file", where="byte 126")
    return "<" if head[126:128] == b"IM" else ">"


def _packed_head(path: PathLike, data: bytes, order: str, at: int) -> tuple[bytes, int]:
    try:
        inner = zlib.decompressobj().decompress(data, HEAD_BYTES)
    except zlib.error as error:
        raise CorruptFile(path, found=str(error), expected="a compressed variable", where=f"byte {at}") from error
    corrupt_if_short(path, len(inner), 8, "a tag")
    kind, unpacked = struct.unpack(order + "II", inner[:8])
    if kind != MATRIX:
        raise CorruptFile(path, found=f"an element of type {kind}", expected="a variable", where=f"byte {at}")
    return inner[8:], unpacked


def _part(path: PathLike, data: bytes, at: int, order: str, *, whole: bool = True) -> _Part:
    """Return one piece of an element: up to four bytes stand inside the tag itself."""
    if at + 8 > len(data):
        raise CorruptFile(path, found="the end of a variable", expected="one more piece of it")
    word, n_bytes = struct.unpack_from(order + "II", data, at)
    if word >> 16:
        part = _Part(word & 0xFFFF, at + 4, word >> 16, at + 8)
        n_room = 4
    else:
        part = _Part(word, at + 8, n_bytes, at + 8 + -(-n_bytes // 8) * 8)
        n_room = len(data) - at - 8 if whole else n_bytes
    if part.n_bytes > n_room:
        raise CorruptFile(path, found=f"a piece of {part.n_bytes:,} bytes", expected=f"at most {n_room:,}")
    return part


def _head(path: PathLike, data: bytes, order: str, at: int) -> Variable:
    flags = _part(path, data, 0, order)
    if flags.type != 6 or flags.n_bytes != 8:
        raise CorruptFile(path, found="no flags", expected="the flags of a variable", where=f"byte {at}")
    word = struct.unpack_from(order + "I", data, flags.begin)[0]
    sides = _part(path, data, flags.next, order)
    if sides.type != 5 or sides.n_bytes % 4 or not 8 <= sides.n_bytes <= 128:
        raise CorruptFile(path, found="no sizes", expected="the sizes of a variable", where=f"byte {at}")
    shape = struct.unpack_from(f"{order}{sides.n_bytes // 4}i", data, sides.begin)
    if min(shape) < 0 or word & 0xFF not in CLASSES:
        raise CorruptFile(path, found=f"class {word & 0xFF}, shape {shape}", expected="a variable", where=f"byte {at}")
    name = _part(path, data, sides.next, order)
    if name.type != 1:
        raise CorruptFile(path, found="no name", expected="the name of a variable", where=f"byte {at}")
    text = data[name.begin : name.begin + name.n_bytes].decode("latin-1")
    return Variable(text, shape, word & 0xFF, bool(word & 0x800), name.next, 0, 0, None)


def _numbers(path: PathLike, data: bytes, at: int, order: str, where: str) -> tuple[np.ndarray, int]:
    part = _part(path, data, at, order)
    if part.type not in ITEMS:
        raise CorruptFile(path, found=f"values of type {part.type}", expected="numbers", where=where)
    dtype = np.dtype(order + ITEMS[part.type])
    if part.n_bytes % dtype.itemsize:
        raise CorruptFile(path, found=f"{part.n_bytes} bytes of {dtype}", expected="whole numbers of it", where=where)
    values = np.frombuffer(data, dtype, part.n_bytes // dtype.itemsize, part.begin)
    return values.astype(dtype.newbyteorder("=")), part.next


def _element(path: PathLike, file: BufferedReader, variable: Variable) -> bytes:
    file.seek(variable.offset)
    data = file.read(variable.n_bytes)
    if variable.unpacked is None:
        return data
    where = f"variable {variable.name}"
    try:
        stream = zlib.decompressobj()
        inner = stream.decompress(data, variable.unpacked + 9)
        stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error as error:
        raise CorruptFile(path, found=str(error), expected="a compressed variable", where=where) from error
    if len(inner) != variable.unpacked + 8 or not stream.eof:
        raise CorruptFile(path, found="other bytes, unpacked", expected=f"{variable.unpacked:,} bytes", where=where)
    return inner[8:]


def _value(path: PathLike, data: bytes, variable: Variable, order: str) -> Any:
    where = f"variable {variable.name}"
    if variable.kind != SPARSE:
        values, _ = _numbers(path, data, variable.at, order, where)
        if len(values) != math.prod(variable.shape):
            raise CorruptFile(path, found=f"{len(values)} numbers", expected=f"shape {variable.shape}", where=where)
        return values.reshape(variable.shape, order="F")
    rows, at = _numbers(path, data, variable.at, order, where)
    pointers, at = _numbers(path, data, at, order, where)
    values, _ = _numbers(path, data, at, order, where)
    if len(variable.shape) != 2 or rows.dtype.kind not in "iu" or pointers.dtype.kind not in "iu":
        raise CorruptFile(path, found="no sparse matrix", expected="integer indices and two sides", where=where)
    n = int(pointers[-1]) if len(pointers) else 0
    if not 0 <= n <= min(len(rows), len(values)):
        raise CorruptFile(path, found=f"{n} entries", expected=f"at most {len(values)}, as many as there", where=where)
    try:
        made = sp.csc_array((values[:n], rows[:n].astype(np.int64), pointers.astype(np.int64)), shape=variable.shape)
    except (ValueError, TypeError) as error:
        raise CorruptFile(path, found=str(error), expected="valid sparse indices", where=where) from error
    return check_sparse(made, path)


def mat_names(path: PathLike) -> list[str]:
    """Return the names of the numeric variables of a .mat file."""
    return [name for name, variable in mat_variables(path)[1].items() if variable.numeric]


def read_mat(
    path: PathLike, names: list[str] | None = None, *, max_bytes: int | None = None, dense: bool = False
) -> dict[str, Any]:
    """Return variables of a MATLAB file by name: arrays as stored, sparse ones as CSR that were checked in full.

    Parameters
    ----------
    path : path-like
        A file of version 5 to 7.2.
    names : list of str, optional
        Which; left out, every numeric one.
    max_bytes : int, optional
        The most memory that each may take.
    dense : bool
        Return sparse variables as arrays.

    Raises
    ------
    UnreadableFile, CorruptFile, UntrustedFile, WrongContent, TooLarge
        Version 7.3 (HDF5), complex numbers, structs, cells and text are ``WrongContent``.
    """
    order, found = mat_variables(path, max_bytes)
    wanted = [name for name, variable in found.items() if variable.numeric] if names is None else names
    made: dict[str, Any] = {}
    with open_binary(path) as file, told(path):
        for name in wanted:
            if name not in found:
                raise no_member(path, name, list(found), "variable")
            variable = found[name]
            where = f"variable {name}"
            if not variable.numeric or variable.complex:
                sort = "complex numbers" if variable.complex else f"a {CLASSES[variable.kind]}"
                raise WrongContent(path, found=sort, expected="real numbers", where=where)
            check_budget(path, variable.unpacked or variable.n_bytes, max_bytes, where)
            value = _value(path, _element(path, file, variable), variable, order)
            if dense and sp.issparse(value):
                check_budget(path, math.prod(variable.shape) * value.dtype.itemsize, max_bytes, where)
                value = value.toarray()
            made[name] = value
    return made
