"""Raw numbers that lie contiguously in a file: the headers of .npy, .npz, .safetensors and .fvecs say where."""

import ast
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from polyspan.errors import CorruptFile, FileError, TooLarge, UntrustedFile, WrongContent

from ._door import (
    CONVERT,
    PathLike,
    check_budget,
    check_ratio,
    corrupt_if_short,
    file_size,
    open_binary,
    refuse_pickle,
    told,
)
from .text import parse_json

NUMBERS = "real numbers: float, int or unsigned int"
MAX_HEADER = 2**16
MAX_MEMBERS = 10_000
MAX_TENSOR_HEADER = 100_000_000
BLOCK = 2**22
TENSOR_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "|b1",
}  # fmt: skip


class Slab(NamedTuple):
    """Where an array lies: ``member`` names it inside its file, ``packed`` holds the zip entry of a compressed one."""

    path: PathLike
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    fortran: bool = False
    brain: bool = False
    packed: zipfile.ZipInfo | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored(self) -> str:
        """Name of the stored dtype."""
        return "bfloat16" if self.brain else str(self.dtype.newbyteorder("="))

    def map(self) -> np.ndarray:
        """Return the stored numbers as a read-only map of the file."""
        if self.nbytes == 0:
            empty = np.empty(self.shape, self.dtype)
            empty.flags.writeable = False
            return empty
        with told(self.path):
            order = "F" if self.fortran else "C"
            mapped = np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape, order=order)
        return np.asarray(mapped)

    def read(self, max_bytes: int | None) -> np.ndarray:
        """Return the stored numbers in memory of their own."""
        check_budget(self.path, self.nbytes, max_bytes, self.member)
        with told(self.path):
            flat = np.empty(self.nbytes, np.uint8)
            view = flat.data
            if self.packed is not None:
                _unzip_into(self, view)
            else:
                with open_binary(self.path) as file:
                    file.seek(self.offset)
                    n = file.readinto(view)
                if n != self.nbytes:
                    raise CorruptFile(self.path, found="a file that shrank", expected=f"{self.nbytes:,} bytes")
        return flat.view(self.dtype).reshape(self.shape, order="F" if self.fortran else "C")


def parse_npy(path: PathLike, file: Any, n_bytes: int, where: str = "") -> Slab:
    """Return where the numbers of one .npy stream of ``n_bytes`` lie, counted from its own start.

    Python integers multiply the shape, so that no product overflows, and nothing is allocated.
    """

    def place(text: str) -> str:
        return ", ".join(filter(None, (where, text)))

    head = file.read(12)
    corrupt_if_short(path, n_bytes, 10, "the header of .npy")
    if head[:6] != b"\x93NUMPY":
        refuse_pickle(path, head + file.read(2**16))
        raise CorruptFile(path, found=f"bytes {head[:6]!r}", expected=r"b'\x93NUMPY'", where=place("byte 0"))
    version = head[6:8]
    if version not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise CorruptFile(path, found=f"format {head[6]}.{head[7]}", expected="1.0, 2.0 or 3.0", where=place("byte 6"))
    start = 10 if version == b"\x01\x00" else 12
    length = struct.unpack("<H", head[8:10])[0] if start == 10 else struct.unpack("<I", head[8:12].ljust(4, b"\0"))[0]
    if length > MAX_HEADER:
        raise CorruptFile(
            path, found=f"a header of {length:,} bytes", expected=f"at most {MAX_HEADER:,}", where=place("byte 8")
        )
    corrupt_if_short(path, n_bytes, start + length, "its header")
    raw = head[start:] + file.read(max(0, start + length - len(head)))
    dtype, fortran, shape = _npy_header(path, raw[:length], place("header"))
    slab = Slab(path, where.removeprefix("member "), shape, dtype, start + length, fortran)
    found = n_bytes - slab.offset
    if slab.nbytes > found and slab.nbytes > 2**40:
        # No file of this length was cut off; the header asks for memory that no machine has.
        raise TooLarge(
            path, found=f"a header of {slab.nbytes:,} bytes", expected=f"the {found:,} that follow", where=place("")
        )
    if slab.nbytes != found:
        raise CorruptFile(
            path,
            found=f"{found:,} bytes of data",
            expected=f"{slab.nbytes:,} for shape {shape} of {dtype}",
            where=place(f"byte {slab.offset}"),
        )
    return slab


def _npy_header(path: PathLike, raw: bytes, where: str) -> tuple[np.dtype, bool, tuple[int, ...]]:
    try:
        header = ast.literal_eval(raw.decode("utf-8").strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise CorruptFile(path, found="a header that is no literal", expected="a dict", where=where) from error
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise CorruptFile(
            path, found=f"header {str(header)[:60]}", expected="a dict of descr, fortran_order and shape", where=where
        )
    descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    whole = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
    if not isinstance(fortran, bool) or not whole or len(shape) > 32:
        raise CorruptFile(
            path, found=f"shape {str(shape)[:60]}, fortran_order {fortran!r}", expected="whole numbers", where=where
        )
    if not isinstance(descr, str):
        raise WrongContent(path, found="a structured array", expected=NUMBERS, where=where)
    try:
        dtype = np.dtype(descr)
    except (TypeError, ValueError, SyntaxError) as error:
        raise CorruptFile(path, found=f"dtype {descr[:60]!r}", expected="a dtype of NumPy", where=where) from error
    if dtype.hasobject:
        raise UntrustedFile(path, found="Python objects, which are pickled", expected=CONVERT, where=where)
    return dtype, fortran, shape


def check_numbers(slab: Slab, *, booleans: bool = False) -> None:
    """Raise ``WrongContent`` where an array holds no real numbers."""
    if slab.dtype.kind not in ("fiub" if booleans else "fiu") or slab.dtype.itemsize > 8:
        raise WrongContent(slab.path, found=f"dtype {slab.dtype}", expected=NUMBERS, where=slab.member)


def npy_slab(path: PathLike) -> Slab:
    """Return the only array of a .npy file."""
    with open_binary(path) as file, told(path):
        return parse_npy(path, file, file_size(path))


@contextmanager
def _archive(path: PathLike) -> Generator[tuple[BinaryIO, zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """Open a zip archive of arrays, and sort what zipfile raises for broken ones."""
    with open_binary(path) as file, told(path):
        head = file.read(512)
        if not head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            refuse_pickle(path, head + file.read(2**16))
            raise CorruptFile(path, found=f"bytes {head[:4]!r}", expected="a zip archive of arrays", where="byte 0")
        try:
            with zipfile.ZipFile(file) as archive:
                yield file, archive, _members(path, archive)
        except FileError:
            raise
        except (zipfile.BadZipFile, EOFError, ValueError, IndexError, struct.error, zlib.error, OverflowError) as error:
            raise CorruptFile(path, found=str(error) or "a broken archive", expected="a whole zip archive") from error
        except (RuntimeError, NotImplementedError) as error:
            raise WrongContent(path, found=str(error), expected="a zip archive without a password, deflated") from error


def npz_names(path: PathLike) -> list[str]:
    """Return the names of the arrays of a .npz file."""
    with _archive(path) as (_, _, infos):
        return list(infos)


def npz_heads(path: PathLike) -> dict[str, Slab | None]:
    """Return what the header of each array of a .npz file says, and None where it holds no plain array.

    Offsets count from the start of the member. Nothing but headers is read.
    """
    found: dict[str, Slab | None] = {}
    with _archive(path) as (_, archive, infos):
        for name, info in infos.items():
            with archive.open(info) as stream:
                try:
                    found[name] = parse_npy(path, stream, info.file_size, f"member {name}")
                except (UntrustedFile, WrongContent):
                    found[name] = None
    return found


def npz_slabs(path: PathLike, wanted: list[str] | None, max_bytes: int | None) -> dict[str, Slab]:
    """Return the arrays of a .npz file by name; ``wanted`` names some of them and ``None`` all.

    Members are read by name into memory, never extracted. Stored ones can be mapped: their CRC is compared first.
    """
    with _archive(path) as (file, archive, infos):
        missing = [name for name in wanted or () if name not in infos]
        if missing:
            raise no_member(path, missing[0], list(infos))
        names = list(infos) if wanted is None else wanted
        return {name: _zipped(path, file, archive, infos[name], name, max_bytes) for name in names}


def no_member(path: PathLike, name: str, names: list[str], what: str = "member") -> WrongContent:
    """Return the error that says which members there are."""
    shown = ", ".join(sorted(names)[:20]) + (", …" if len(names) > 20 else "")
    return WrongContent(path, found=f"no {what} {name!r}", expected=f"one of: {shown or 'none, the file is empty'}")


def _members(path: PathLike, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    entries = archive.infolist()
    if len(entries) > MAX_MEMBERS:
        raise TooLarge(path, found=f"{len(entries):,} members", expected=f"at most {MAX_MEMBERS:,}")
    infos: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        parts = entry.filename.replace("\\", "/").split("/")
        if entry.filename.endswith("data.pkl"):
            raise UntrustedFile(path, found="a torch archive holding a pickle", expected=CONVERT, where=entry.filename)
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise WrongContent(
                path, found=f"member {entry.filename!r}, outside the archive", expected="plain member names"
            )
        if entry.filename.endswith(".npy"):
            name = entry.filename.removesuffix(".npy")
            if name in infos:
                raise CorruptFile(path, found=f"member {name!r} twice", expected="distinct names")
            infos[name] = entry
    if not infos:
        raise WrongContent(path, found="no array", expected="at least one member that is .npy")
    return infos


def _zipped(
    path: PathLike,
    file: BinaryIO,
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    name: str,
    max_bytes: int | None,
) -> Slab:
    where = f"member {name}"
    check_ratio(path, info.compress_size, info.file_size, max_bytes, where)
    with archive.open(info) as stream:
        slab = parse_npy(path, stream, info.file_size, where)._replace(member=name)
    if info.compress_type != zipfile.ZIP_STORED:
        return slab._replace(packed=info)
    file.seek(info.header_offset)
    local = file.read(30)
    if len(local) < 30 or info.compress_size != info.file_size:
        raise CorruptFile(path, found="a broken member", expected="a whole zip archive", where=where)
    begin = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
    _check_crc(path, file, begin, info, where)
    return slab._replace(offset=begin + slab.offset)


def _check_crc(path: PathLike, file: BinaryIO, begin: int, info: zipfile.ZipInfo, where: str) -> None:
    crc, left = 0, info.file_size
    file.seek(begin)
    while left:
        block = file.read(min(BLOCK, left))
        if not block:
            raise CorruptFile(path, found="the end of the file", expected=f"{left:,} bytes more", where=where)
        crc, left = zlib.crc32(block, crc), left - len(block)
    if crc != info.CRC:
        raise CorruptFile(path, found=f"CRC {crc:08x}", expected=f"{info.CRC:08x}", where=where)


def _unzip_into(slab: Slab, view: memoryview) -> None:
    assert slab.packed is not None
    try:
        with (
            open_binary(slab.path) as file,
            zipfile.ZipFile(file) as archive,
            archive.open(slab.packed) as stream,
        ):
            stream.read(slab.offset)
            done = 0
            while done < len(view):
                block = stream.read(min(BLOCK, len(view) - done))
                if not block:
                    break
                view[done : done + len(block)] = block
                done += len(block)
            # Reading past the last byte makes zipfile compare the CRC.
            if done < len(view) or stream.read(1):
                raise CorruptFile(slab.path, found="a member of other length", expected="as its header says")
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise CorruptFile(
            slab.path, found=str(error), expected="a whole zip archive", where=f"member {slab.member}"
        ) from error


class Tensors(NamedTuple):
    """The tensors of a .safetensors file, where they lie, and the text metadata."""

    slabs: dict[str, Slab]
    metadata: dict[str, str]


def tensor_slabs(path: PathLike, *, refuse_types: bool = True) -> Tensors:
    """Return the tensors of a .safetensors file; the library checks the header, offsets and overlaps first."""
    from safetensors import SafetensorError, safe_open

    size = file_size(path)
    with open_binary(path) as file, told(path):
        head = file.read(8)
        corrupt_if_short(path, size, 10, "a .safetensors file")
        length = struct.unpack("<Q", head)[0]
        if length > min(size - 8, MAX_TENSOR_HEADER):
            refuse_pickle(path, head + file.read(2**16))
            raise CorruptFile(
                path, found=f"a header of {length:,} bytes", expected=f"at most {size - 8:,}", where="byte 0"
            )
        text = file.read(length)
    try:
        with told(path), safe_open(str(path), framework="np"):
            pass
    except SafetensorError as error:
        raise CorruptFile(path, found=str(error), expected="a whole .safetensors file") from error
    try:
        header = parse_json(text.decode("utf-8"), path, "header")
    except UnicodeDecodeError as error:
        raise CorruptFile(path, found="a header that is no UTF-8", expected="JSON", where="header") from error
    metadata = header.pop("__metadata__", None) or {}
    slabs = {}
    for name, facts in header.items():
        stored = TENSOR_TYPES.get(facts["dtype"])
        if stored is None and refuse_types:
            raise WrongContent(path, found=f"dtype {facts['dtype']}", expected=NUMBERS, where=f"tensor {name}")
        begin = 8 + length + facts["data_offsets"][0]
        dtype = np.dtype(stored or "V1")
        slabs[name] = Slab(path, name, tuple(facts["shape"]), dtype, begin, brain=facts["dtype"] == "BF16")
    return Tensors(slabs, metadata)


def stored_digests(path: PathLike, metadata: dict[str, str]) -> dict[str, str]:
    """Return the SHA-256 of each tensor that our own writer left in the metadata; none in foreign files."""
    if "polyspan" not in metadata:
        return {}
    header = parse_json(metadata["polyspan"], path, "metadata polyspan")
    digests = header.get("sha256") if isinstance(header, dict) else None
    if not isinstance(digests, dict) or not all(isinstance(v, str) for v in digests.values()):
        raise CorruptFile(path, found="metadata without digests", expected="sha256 of each tensor", where="metadata")
    return digests


def fvecs_slab(path: PathLike) -> Slab:
    """Return the rows of .fvecs, .bvecs or .ivecs, each led by its width as int32, with that width as first columns."""
    item = np.dtype({".fvecs": "<f4", ".ivecs": "<i4", ".bvecs": "u1"}[Path(path).suffix.lower()])
    size = file_size(path)
    corrupt_if_short(path, size, 5, "one row")
    with open_binary(path) as file, told(path):
        head = file.read(4)
        width = struct.unpack("<i", head)[0]
        row_bytes = 4 + width * item.itemsize
        if not 0 < width <= 2**20 or size % row_bytes:
            refuse_pickle(path, head + file.read(2**16))
            raise CorruptFile(
                path, found=f"width {width} and {size:,} bytes", expected="rows of one width", where="byte 0"
            )
    slab = Slab(path, "", (size // row_bytes, row_bytes), np.dtype("u1"), 0)
    widths = slab.map()[:, :4]
    wrong = np.flatnonzero((widths != np.frombuffer(head, np.uint8)).any(axis=1))
    if len(wrong):
        raise CorruptFile(path, found="another width", expected=f"width {width}", where=f"row {wrong[0]}")
    return slab._replace(dtype=item)


def fvecs_rows(slab: Slab) -> np.ndarray:
    """Return the numbers of a slab of :func:`fvecs_slab` as a read-only map without the widths."""
    raw = slab._replace(dtype=np.dtype("u1")).map()
    n, row_bytes = raw.shape
    width = (row_bytes - 4) // slab.dtype.itemsize
    return np.ndarray((n, width), slab.dtype, buffer=raw, offset=4, strides=(row_bytes, slab.dtype.itemsize))


def npy_header(shape: tuple[int, ...], dtype: np.dtype, room: int = 128) -> bytes:
    """Return a .npy header (format 1.0, C order) of at least ``room`` bytes, so that a later one can take its place."""
    text = f"{{'descr': {dtype.newbyteorder('<').str!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    total = max(room, -(-(10 + len(text) + 1) // 64) * 64)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", total - 10) + (text.ljust(total - 11) + "\n").encode()


def tensor_header(shapes: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], room: int = 0) -> bytes:
    """Return the length and the JSON of a .safetensors header for tensors in the order given.

    ``room`` is the least length of the JSON, filled up with spaces, so that a later header can take its place.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (code, shape) in shapes.items():
        end = at + math.prod(shape) * np.dtype(TENSOR_TYPES[code]).itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    total = -(-max(room, len(text)) // 8) * 8
    return struct.pack("<Q", total) + text.ljust(total)
