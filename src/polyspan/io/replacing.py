"""A file of vectors written again with other vectors and everything else as it was."""

import hashlib
import json
import math
import shutil
import struct
import zipfile
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.errors import CorruptFile, WrongContent

from . import _tables
from ._door import PathLike, open_binary, told
from ._slabs import BLOCK, npy_header, npz_heads, tensor_slabs
from .arrays import CODES, table_writer
from .atomic import atomic_path
from .embedding_writing import EmbeddingWriter
from .embeddings import BATCH_ROWS, EmbeddingReader
from .text import dump_json, parse_json


def vector_member(path: PathLike) -> str:
    """Return the name of the array of a ``.npz`` or ``.safetensors`` file that holds its vectors.

    That is the only array of floats with two dimensions, or the only array.

    Raises
    ------
    FileError
        One of its five kinds; ``WrongContent`` where there are several such arrays, which are listed, or none.
    """
    if Path(path).suffix.lower() == ".npz":
        found = npz_heads(path)
    else:
        found = dict(tensor_slabs(path, refuse_types=False).slabs)
    floats = [
        name
        for name, slab in found.items()
        if slab is not None and len(slab.shape) == 2 and (slab.dtype.kind == "f" or slab.brain)
    ]
    if len(floats) == 1:
        return floats[0]
    if len(found) == 1:
        return next(iter(found))
    names = ", ".join(sorted(floats or found)[:20])
    what = f"{len(floats)} arrays of floats (n, d): {names}" if floats else f"no array of floats (n, d) among {names}"
    raise WrongContent(path, found=what, expected="one, or member= naming it")


def replace_vectors(
    source: PathLike,
    target: PathLike,
    vectors: PathLike,
    *,
    column: str | None = None,
    member: str | None = None,
    batch_rows: int = BATCH_ROWS,
) -> Path:
    """Write ``source`` to ``target`` with the rows of ``vectors`` for its own, atomically and in flat memory.

    Of a table all other columns, their order and the metadata are kept; of ``.npz`` and ``.safetensors`` all other
    arrays byte by byte, whatever they hold: nothing of them is unpickled. Widths may differ. The vectors get the dtype
    of ``vectors``.

    Parameters
    ----------
    source, target : path-like
        Two files of one suffix that :class:`EmbeddingReader` and :class:`EmbeddingWriter` take.
    vectors : path-like
        A ``.npy`` of shape (n, d) with as many rows.
    column, member : str, optional
        Where the vectors stand in ``source``; left out, see :class:`EmbeddingReader` and :func:`vector_member`.

    Raises
    ------
    FileError
        One of its five kinds; ``WrongContent`` where row counts differ, or several arrays may be the vectors.
    """
    source, target = Path(source), Path(target)
    if source.suffix.lower() != target.suffix.lower():
        raise ValueError(f"target must end in {source.suffix} like source, got {target.name!r}")
    has_members = source.suffix.lower() in (".npz", ".safetensors")
    if has_members and member is None:
        member = vector_member(source)
    old = EmbeddingReader(source, column=column, member=member, batch_rows=batch_rows)
    new = EmbeddingReader(vectors, batch_rows=batch_rows)
    if new.n_rows != old.n_rows:
        raise WrongContent(vectors, found=f"{new.n_rows} rows", expected=f"{old.n_rows}, as in {source}")
    if old.suffix in _tables.TABLES:
        _replace_column(source, target, new, old.column or _tables.VECTOR, batch_rows)
        return target
    if member is not None:
        (_replace_zipped if old.suffix == ".npz" else _replace_tensor)(source, target, new, member)
        return target
    made = EmbeddingWriter(target, dim=new.dim, dtype=new.stored_dtype, n_rows=new.n_rows)
    with made as writer, closing(new.batches()) as batches:
        for batch in batches:
            writer.write(batch.rows)
    return target


def _replace_column(source: Path, target: Path, new: EmbeddingReader, column: str, batch_rows: int) -> None:
    import pyarrow as pa

    with _tables.open_table(source) as table, atomic_path(target) as temp:
        at = table.schema.get_field_index(column)
        field = table.schema.field(at)
        item = pa.from_numpy_dtype(np.dtype(new.stored_dtype))
        kind = pa.field(column, pa.list_(item, new.dim), nullable=field.nullable, metadata=field.metadata)
        schema = table.schema.set(at, kind)
        with table_writer(target, temp, schema) as writer, closing(new.batches()) as rows:
            held, first = None, 0
            for _, batch in table.batches(table.schema.names, batch_rows):
                parts, wanted = [], batch.num_rows
                while wanted:
                    if held is None or first == len(held):
                        held, first = next(rows).rows, 0
                    parts.append(held[first : first + wanted])
                    first, wanted = first + len(parts[-1]), wanted - len(parts[-1])
                lists = [_tables.arrow_vectors(part.astype(new.stored_dtype, copy=False), item) for part in parts]
                columns = [*batch.columns]
                columns[at] = pa.concat_arrays(lists).cast(kind.type)
                writer.write_batch(pa.record_batch(columns, schema=schema))


def _replace_zipped(source: Path, target: Path, new: EmbeddingReader, member: str) -> None:
    """Copy an archive member by member, each packed as it was, in their order."""
    try:
        with (
            open_binary(source) as file,
            told(source),
            zipfile.ZipFile(file) as old,
            atomic_path(target) as temp,
            zipfile.ZipFile(temp, "w") as made,
        ):
            for info in old.infolist():
                entry = zipfile.ZipInfo(info.filename, info.date_time)
                entry.compress_type, entry.external_attr = info.compress_type, info.external_attr
                with made.open(entry, "w", force_zip64=True) as stream:
                    if info.filename == member + ".npy":
                        _stream_rows(stream.write, new, npy_header((new.n_rows, new.dim), np.dtype(new.stored_dtype)))
                    else:
                        with old.open(info) as held:
                            shutil.copyfileobj(held, stream, BLOCK)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise CorruptFile(source, found=str(error), expected="a whole zip archive") from error
    except (RuntimeError, NotImplementedError) as error:
        raise WrongContent(source, found=str(error), expected="a zip archive without a password, deflated") from error


def _replace_tensor(source: Path, target: Path, new: EmbeddingReader, member: str) -> None:
    """Copy a file of tensors with its metadata; a digest of the vectors is written, and those of the others stay."""
    total = hashlib.sha256()
    _stream_rows(total.update, new)
    with open_binary(source) as file, told(source):
        # What stands in the header was looked at when the reader was opened.
        begin = 8 + struct.unpack("<Q", file.read(8))[0]
        header = parse_json(file.read(begin - 8).decode("utf-8"), source, "header")
        metadata = header.pop("__metadata__", None) or {}
        about = parse_json(metadata["polyspan"], source, "metadata polyspan") if "polyspan" in metadata else {}
        about = about | {"sha256": about.get("sha256", {}) | {member: total.hexdigest()}}
        metadata = metadata | {"polyspan": dump_json(about, indent=None)}
        spans = {name: facts["data_offsets"] for name, facts in header.items()}
        dtype = np.dtype(new.stored_dtype)
        header[member] = {"dtype": CODES[dtype], "shape": [new.n_rows, new.dim]}
        n_bytes = {name: end - start for name, (start, end) in spans.items()}
        n_bytes[member] = new.n_rows * new.dim * dtype.itemsize
        # Wide items first: every tensor then begins at a multiple of its own width, as maps need it.
        order = sorted(spans, key=lambda name: -(n_bytes[name] // max(1, math.prod(header[name]["shape"]))))
        laid: dict[str, Any] = {"__metadata__": metadata}
        at = 0
        for name in order:
            laid[name] = header[name] | {"data_offsets": [at, at + n_bytes[name]]}
            at += n_bytes[name]
        text = json.dumps(laid, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        text = text.ljust(-(-len(text) // 8) * 8)
        with atomic_path(target) as temp, open(temp, "wb") as made:
            made.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                if name == member:
                    _stream_rows(made.write, new)
                    continue
                file.seek(begin + spans[name][0])
                left = n_bytes[name]
                while left:
                    block = file.read(min(BLOCK, left))
                    if not block:
                        raise CorruptFile(source, found="a file that shrank", expected=f"{left:,} bytes more")
                    made.write(block)
                    left -= len(block)


def _stream_rows(write: Any, new: EmbeddingReader, head: bytes = b"") -> None:
    """Give the vectors, little endian and in rows, to ``write``, a batch at a time."""
    if head:
        write(head)
    dtype = np.dtype(new.stored_dtype).newbyteorder("<")
    with closing(new.batches()) as batches:
        for batch in batches:
            write(np.ascontiguousarray(batch.rows, dtype).reshape(-1).view(np.uint8))
