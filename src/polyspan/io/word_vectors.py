"""Word vectors as word2vec, fastText and GloVe write them, text or binary, read as a stream.

Text is one word a line, followed by its numbers; a first line of two whole numbers (words, components) may stand
before. Binary is that line, then each word, a space, and its numbers in float32, little-endian, with or without a line
end. Numbers are float32, in which those tools compute. Words are kept as ids.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from polyspan.errors import CorruptFile, TooLarge, WrongContent

from ._door import PathLike, check_budget, file_size, open_binary, refuse_pickle, told
from ._row_streams import Piece, RowStream
from ._tables import ID
from .text import MAX_LINE_BYTES

HEADER = re.compile(rb"(\d{1,18})[ \t]+(\d{1,9})[ \t]*\r?\n")
NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
MAX_WORD_BYTES = 4096
READ_BYTES = 2**16
PARSED_CELLS = 2**17
"""Numbers that are turned from text at once: what bounds the memory beside the batch."""
BOM = b"\xef\xbb\xbf"


def open_word_text(path: PathLike) -> RowStream:
    """Open a text of word vectors; without a header line the lines are counted, which reads the file once.

    Raises
    ------
    WrongContent, CorruptFile
        It begins with no word and its numbers.
    """
    size = file_size(path)
    with open_binary(path) as file, told(path):
        head = file.read(64)
        refuse_pickle(path, head + file.read(512))
        file.seek(0)
        first = _line(path, file, 1).removeprefix(BOM)
        second = _line(path, file, 2)
        header = HEADER.fullmatch(first if first.endswith(b"\n") else first + b"\n")
        if header is not None and (len(second.split()) != 2 or int(header[2]) == 1):
            n_rows, dim = int(header[1]), int(header[2])
            # The shortest word and number take four bytes: "a 0\n".
            if n_rows * (2 * dim + 1) > size or not n_rows or not dim:
                raise CorruptFile(
                    path, found=f"{size:,} bytes", expected=f"{n_rows:,} words of {dim:,} numbers", where="line 1"
                )
        else:
            header, dim = None, len(first.split()) - 1
            if dim < 1:
                raise WrongContent(
                    path,
                    found=repr(first[:40]),
                    expected="a word and its numbers, with a space between",
                    where="line 1",
                )
            file.seek(0)
            n_rows, last = 0, b""
            while block := file.read(2**20):
                n_rows, last = n_rows + block.count(b"\n"), block
            n_rows += not last.endswith(b"\n")
    pieces = partial(_text_pieces, path, dim, header is not None)
    return RowStream(n_rows, dim, np.dtype(np.float32), pieces, id_name=ID)


def _line(path: PathLike, file: Any, number: int) -> bytes:
    line = file.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise TooLarge(
            path,
            found=f"a line of more than {MAX_LINE_BYTES:,} bytes",
            expected=f"lines of at most {MAX_LINE_BYTES:,}",
            where=f"line {number}",
        )
    return line


def _text_pieces(path: PathLike, dim: int, header: bool, rows: int, start: int) -> Iterator[Piece]:
    seen: set[str] = set()
    at = min(rows, max(1, PARSED_CELLS // dim))
    number, first = int(header), start
    words: list[str] = []
    lines: list[list[bytes]] = []
    blocks: list[np.ndarray] = []
    with open_binary(path) as file, told(path):
        if header:
            _line(path, file, 1)
        while line := _line(path, file, number + 1):
            number += 1
            word, cells = _cells(path, line.removeprefix(BOM) if number == 1 else line, dim, number)
            _once(path, seen, word, f"line {number}")
            if number - 1 - header < start:
                continue
            words.append(word)
            lines.append(cells)
            if len(lines) == at or len(words) == rows:
                blocks.append(_numbers(path, lines, dim, number))
                lines = []
            if len(words) == rows:
                yield first, np.concatenate(blocks), np.array(words, dtype=np.str_)
                first, words, blocks = first + rows, [], []
    if lines:
        blocks.append(_numbers(path, lines, dim, number))
    if words:
        yield first, np.concatenate(blocks), np.array(words, dtype=np.str_)


def _cells(path: PathLike, line: bytes, dim: int, number: int) -> tuple[str, list[bytes]]:
    """Split a line from its end: a word may hold spaces, but its last part may not be one number too many."""
    parts = line.strip(b" \t\r\n").rsplit(None, dim)
    if len(parts) != dim + 1:
        found = f"{max(len(parts) - 1, 0)} numbers after a word" if parts else "an empty line"
        raise WrongContent(path, found=found, expected=f"a word and {dim} numbers", where=f"line {number}")
    last = parts[0].rsplit(None, 1)
    if len(last) == 2 and NUMBER.fullmatch(last[1]):
        found = f"at least {dim + 1} numbers after a word"
        raise WrongContent(path, found=found, expected=f"a word and {dim} numbers", where=f"line {number}")
    return _decoded(path, parts[0], f"line {number}"), parts[1:]


def _numbers(path: PathLike, lines: list[list[bytes]], dim: int, last: int) -> np.ndarray:
    """Return the numbers of some lines, the last of which has this line number, as float32."""
    flat = [cell for cells in lines for cell in cells]
    try:
        values = np.array(list(map(float, flat)))
        fine = b"_" not in b" ".join(flat)  # Python reads 1_0 as ten
    except ValueError:
        fine = False
    if not fine:
        i, cell = next((i, cell) for i, cell in enumerate(flat) if NUMBER.fullmatch(cell) is None)
        where = f"line {last - len(lines) + 1 + i // dim}, number {i % dim}"
        raise WrongContent(path, found=repr(cell[:40]), expected="a number", where=where)
    with np.errstate(over="ignore"):
        made = values.astype(np.float32).reshape(len(lines), dim)
    bad = ~np.isfinite(made)
    if bad.any():
        row, place = (int(i[0]) for i in np.nonzero(bad))
        where = f"line {last - len(lines) + 1 + row}, number {place}"
        found = lines[row][place].decode("ascii", "replace")
        raise WrongContent(path, found=found, expected="finite numbers within float32", where=where)
    return made


def _decoded(path: PathLike, word: bytes, where: str) -> str:
    try:
        return word.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFile(
            path, found=f"byte 0x{word[error.start]:02x} in a word", expected="UTF-8", where=where
        ) from error


def _once(path: PathLike, seen: set[str], word: str, where: str) -> None:
    if word in seen:
        raise WrongContent(path, found=f"the word {word[:40]!r} a second time", expected="every word once", where=where)
    seen.add(word)


def open_word_binary(path: PathLike) -> RowStream:
    """Open a binary file of word2vec; its header says how many words of how many components follow.

    Raises
    ------
    UntrustedFile, CorruptFile
        It begins otherwise, or is shorter than its header says.
    """
    size = file_size(path)
    with open_binary(path) as file, told(path):
        head = file.read(2**10)
        header = HEADER.match(head)
    if header is None:
        refuse_pickle(path, head)
        raise CorruptFile(path, found=f"bytes {head[:12]!r}", expected="words and components, as text", where="byte 0")
    n_rows, dim = int(header[1]), int(header[2])
    # A word of one byte and a space.
    if not n_rows or not dim or header.end() + n_rows * (4 * dim + 2) > size:
        raise CorruptFile(
            path, found=f"{size:,} bytes", expected=f"{n_rows:,} words of {dim:,} float32 numbers", where="byte 0"
        )
    pieces = partial(_binary_pieces, path, n_rows, dim, header.end())
    return RowStream(n_rows, dim, np.dtype(np.float32), pieces, id_name=ID)


def _binary_pieces(path: PathLike, n_rows: int, dim: int, offset: int, rows: int, start: int) -> Iterator[Piece]:
    seen: set[str] = set()
    width, at = 4 * dim, 0
    check_budget(path, min(rows, n_rows) * width, None)
    with open_binary(path) as file, told(path):
        file.seek(offset)
        held, place = b"", 0
        while at < n_rows:
            stop = min(max(at, start) + rows, n_rows)
            first = max(at, start)
            made, words = np.empty((stop - first, dim), np.float32), []
            while at < stop:
                if len(held) - place < width + MAX_WORD_BYTES:
                    held, place = held[place:] + file.read(max(READ_BYTES, width + MAX_WORD_BYTES)), 0
                space = held.find(b" ", place, place + MAX_WORD_BYTES)
                if space < 0 or space + 1 + width > len(held):
                    raise CorruptFile(
                        path, found="no whole word and vector", expected=f"{n_rows} words", where=f"word {at}"
                    )
                word = _decoded(path, held[place:space].lstrip(b"\r\n"), f"word {at}")
                if not word:
                    raise CorruptFile(path, found="an empty word", expected="a word", where=f"word {at}")
                _once(path, seen, word, f"word {at}")
                if at >= first:
                    made[at - first] = np.frombuffer(held, "<f4", dim, space + 1)
                    words.append(word)
                at, place = at + 1, space + 1 + width
            if stop > first:
                yield first, made, np.array(words, dtype=np.str_)
        rest = held[place:] + file.read(2)
        if rest.strip(b"\r\n"):
            raise CorruptFile(path, found="bytes after the last word", expected=f"{n_rows} words, as its header says")
