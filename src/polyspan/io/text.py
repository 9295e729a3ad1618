"""Text, JSON, JSON lines, TOML and CSV with text cells, read within limits and written atomically."""

import codecs
import csv
import gzip
import json
import lzma
import math
import os
import tomllib
import zlib
from collections.abc import Iterable, Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Literal

from polyspan.errors import CorruptFile, TooLarge, UnreadableFile, WrongContent

from ._door import PathLike, file_size, open_binary, read_limited, told
from .atomic import atomic_path, real_target, sync_folder

MAX_BYTES = 256 * 2**20
MAX_LINE_BYTES = 2**20
MAX_DEPTH = 200


def read_bytes(path: PathLike, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return a file's bytes.

    Raises
    ------
    UnreadableFile, TooLarge
        It cannot be opened; it holds more than ``max_bytes``.
    """
    return read_limited(path, max_bytes)


def write_bytes(path: PathLike, data: bytes, *, durable: bool = True) -> Path:
    """Write bytes atomically and return the path; scratch files may do without waiting for the disk (``durable``)."""
    with atomic_path(path, durable=durable) as temp, open(temp, "wb") as file:
        file.write(data)
    return Path(path)


def read_text(path: PathLike, *, max_bytes: int = MAX_BYTES) -> str:
    r"""Return UTF-8 text with ``\n`` line ends and without a byte order mark; ``.gz`` and ``.xz`` are unpacked.

    Raises
    ------
    CorruptFile
        A byte is no UTF-8 (named), or a packed file breaks off.
    TooLarge
        The text, unpacked, takes more than ``max_bytes``.
    """
    data = _unpack(path, read_limited(path, max_bytes), max_bytes)
    return _decode(path, data).replace("\r\n", "\n").replace("\r", "\n")


def _decode(path: PathLike, data: bytes) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x}"
        raise CorruptFile(path, found=found, expected="UTF-8 text", where=f"byte {error.start}") from error


def _unpack(path: PathLike, data: bytes, max_bytes: int) -> bytes:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    opener = openers.get(Path(path).suffix.lower())
    if opener is None:
        return data
    try:
        with opener(BytesIO(data)) as file:
            unpacked = file.read(max_bytes + 1)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise CorruptFile(path, found=str(error), expected=f"a whole {Path(path).suffix} file") from error
    if len(unpacked) > max_bytes:
        raise TooLarge(path, found="more bytes, unpacked", expected=f"at most {max_bytes:,} bytes")
    return unpacked


def write_text(path: PathLike, text: str) -> Path:
    """Write text as UTF-8, atomically, and return the path."""
    return write_bytes(path, text.encode("utf-8"))


def read_json(path: PathLike, *, max_bytes: int = MAX_BYTES) -> Any:
    """Return the JSON value that a file holds.

    Raises
    ------
    CorruptFile
        No JSON, a key twice, NaN or infinity, a number beyond float64, half a surrogate pair, or nesting deeper than
        200: with these, two readers would see two things.
    """
    return parse_json(read_text(path, max_bytes=max_bytes), path)


def parse_json(text: str, path: PathLike, where: str = "") -> Any:
    """Return the JSON value of a text that came from ``path``; errors as of :func:`read_json`."""

    def refuse(found: str, place: str = "") -> CorruptFile:
        return CorruptFile(path, found=found, expected="JSON", where=", ".join(filter(None, (where, place))))

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            keys = [key for key, _ in items]
            raise refuse(f"the key {next(k for k in keys if keys.count(k) > 1)!r} twice in one object")
        return made

    def constant(name: str) -> Any:
        raise refuse(f"the number {name}")

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise refuse(f"the number {digits[:40]}, beyond float64")
        return value

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
        _check_depth(value)
        text.encode("utf-8")
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise refuse(error.msg, f"line {error.lineno}, column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise refuse("half a surrogate pair") from error
    except RecursionError as error:
        raise refuse(f"nesting deeper than {MAX_DEPTH}") from error
    except ValueError as error:
        raise refuse(str(error)) from error
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise RecursionError


def plain(value: Any, name: str = "value") -> Any:
    """Return ``value`` made of JSON types only: NumPy and torch scalars, arrays, tuples and paths are rewritten.

    Raises
    ------
    TypeError
        Naming the entry that has no JSON form.
    ValueError
        Naming the entry that is NaN or infinite.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite to be written as JSON, got {value}")
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name} must have keys that are str, got {key!r}")
        return {key: plain(value[key], f"{name}[{key!r}]") for key in value}
    if isinstance(value, list | tuple):
        return [plain(entry, f"{name}[{i}]") for i, entry in enumerate(value)]
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return plain(value.tolist(), name)
    raise TypeError(f"{name} must be made of JSON types, got {type(value).__name__}")


def dump_json(value: Any, *, indent: int | None = 1, name: str = "value") -> str:
    """Return ``value`` as JSON text: keys sorted, no NaN; the same value gives the same text."""
    return json.dumps(plain(value, name), sort_keys=True, allow_nan=False, ensure_ascii=False, indent=indent)


def write_json(path: PathLike, value: Any) -> Path:
    """Write ``value`` as JSON with sorted keys, atomically, and return the path.

    Raises
    ------
    TypeError, ValueError
        An entry has no JSON form, or is NaN or infinite; it is named.
    """
    return write_text(path, dump_json(value) + "\n")


def read_toml(path: PathLike, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the table of a TOML file; what is no TOML is ``CorruptFile``."""
    text = read_text(path, max_bytes=max_bytes)
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise CorruptFile(path, found=str(error) or "deep nesting", expected="TOML") from error


def read_jsonl(
    path: PathLike,
    *,
    torn: Literal["error", "drop"] = "error",
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Any]:
    """Yield the JSON value of each line; empty lines are passed over.

    Parameters
    ----------
    path : path-like
        A file of one JSON value a line.
    torn : {"error", "drop"}
        What to do with a last line that was not finished: it is ``CorruptFile``, or it is left out.
    max_line_bytes : int
        A longer line is ``TooLarge``.
    """
    with open_binary(path) as file:
        number = 0
        while True:
            with told(path):
                line = file.readline(max_line_bytes + 1)
            if not line:
                return
            number += 1
            if len(line) > max_line_bytes:
                raise TooLarge(
                    path,
                    found=f"a line of more than {max_line_bytes:,} bytes",
                    expected=f"lines of at most {max_line_bytes:,}",
                    where=f"line {number}",
                )
            unfinished = not line.endswith(b"\n")
            if not line.strip():
                continue
            try:
                value = parse_json(_decode(path, line), path, f"line {number}")
            except CorruptFile:
                if unfinished and torn == "drop":
                    return
                raise
            yield value


def write_jsonl(path: PathLike, values: Iterable[Any]) -> Path:
    """Write one JSON value a line, atomically, and return the path."""
    with atomic_path(path) as temp, open(temp, "w", encoding="utf-8", newline="\n") as file:
        for i, value in enumerate(values):
            file.write(dump_json(value, indent=None, name=f"values[{i}]") + "\n")
    return Path(path)


def append_line(path: PathLike, line: str, *, sync: bool = True) -> None:
    """Append one line of text in a single write, making the file where there is none.

    With ``sync`` it is on the disk when this returns. Not atomic: a machine that stops may leave the last line torn,
    which :func:`read_lines` tells apart.

    Raises
    ------
    ValueError
        The line holds a line break.
    UnreadableFile
        The place may not be written to, or the disk is full.
    """
    if "\n" in line:
        raise ValueError(f"line must hold no line break, got {line[:60]!r}")
    target = real_target(path)
    fresh = not target.exists()
    with told(path, "a file that can be appended to"):
        descriptor = os.open(target, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o666)
        try:
            rest = memoryview((line + "\n").encode("utf-8"))
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if fresh and sync:
            sync_folder(target.parent)


def read_lines(path: PathLike, *, max_bytes: int = MAX_BYTES) -> tuple[list[str], bool]:
    """Return the finished lines of a file that :func:`append_line` wrote, and whether a torn last one was left out."""
    data = read_limited(path, max_bytes)
    whole = data[: data.rfind(b"\n") + 1]
    return _decode(path, whole).split("\n")[:-1], len(whole) < len(data)


def read_csv(path: PathLike, *, max_bytes: int = MAX_BYTES) -> dict[str, list[str]]:
    """Return the columns of a ``.csv`` or ``.tsv`` file by the names in its header line, every cell as text.

    Raises
    ------
    CorruptFile
        A row has more or fewer cells than the header (the line is named), or a quote is never closed.
    WrongContent
        The header names a column twice, or the file is empty.
    """
    text = read_text(path, max_bytes=max_bytes)
    delimiter = "\t" if Path(path).suffix.lower() == ".tsv" else ","
    lines = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(lines, [])
        if not header:
            raise WrongContent(path, found="no header line", expected="the names of the columns", where="line 1")
        if len(set(header)) != len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise WrongContent(path, found=f"column {twice!r} twice", expected="distinct names", where="line 1")
        rows = []
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(header):
                raise CorruptFile(
                    path,
                    found=f"{len(cells)} cells",
                    expected=f"{len(header)} as in the header",
                    where=f"line {lines.line_num}",
                )
            rows.append(cells)
    except csv.Error as error:
        raise CorruptFile(path, found=str(error), expected="CSV", where=f"line {lines.line_num}") from error
    return {name: [cells[i] for cells in rows] for i, name in enumerate(header)}


def list_folder(path: PathLike, pattern: str = "*") -> list[Path]:
    """Return the entries of a folder that match ``pattern``, sorted by name; hidden ones are left out."""
    if not Path(path).is_dir():
        file_size(path)
        raise UnreadableFile(path, found="a file", expected="a folder")
    with told(path, "a folder that can be listed"):
        return sorted(entry for entry in Path(path).glob(pattern) if not entry.name.startswith("."))
