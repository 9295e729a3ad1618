"""Arrays in and out of .npy, .npz, .safetensors, .parquet, .arrow, .csv, .fvecs and .mat; streams are read, too."""

import hashlib
import logging
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.errors import CorruptFile, WrongContent

from . import _csv, _mat, _tables
from ._door import PathLike, check_budget, suffix_of
from ._row_streams import HDF5, JSON_LINES, STREAMED, check_options, is_word_binary, open_stream, read_stream
from ._slabs import (
    TENSOR_TYPES,
    Slab,
    check_numbers,
    fvecs_rows,
    fvecs_slab,
    no_member,
    npy_header,
    npy_slab,
    npz_names,
    npz_slabs,
    stored_digests,
    tensor_header,
    tensor_slabs,
)
from .atomic import atomic_path
from .digest import digest_array
from .json_vectors import holds_lists
from .text import dump_json

log = logging.getLogger("polyspan.io")

FVECS = (".fvecs", ".bvecs", ".ivecs")
TEXTS = (".csv", ".tsv")
MEMBERS = (".npz", ".safetensors", ".mat")
READS = (".npy", ".npz", ".safetensors", *_tables.TABLES, *TEXTS, *FVECS, ".mat", *STREAMED)
WRITES = (".npy", ".npz", ".safetensors", *_tables.TABLES, ".csv", ".fvecs")
CODES = {np.dtype(stored): code for code, stored in TENSOR_TYPES.items() if code != "BF16"}
BLOCK = 2**22


def read_array(
    path: PathLike,
    *,
    member: str | None = None,
    column: str | None = None,
    ndim: int | None = 2,
    dtype: Any = None,
    mmap: bool = True,
    finite: bool = True,
    booleans: bool = False,
    max_bytes: int | None = None,
) -> np.ndarray:
    """Return one array of numbers from a file; the suffix says how it is read.

    Parameters
    ----------
    path : path-like
        ``.npy``, ``.npz``, ``.safetensors``, ``.parquet``, ``.arrow``, ``.feather``, ``.csv``, ``.tsv``, ``.fvecs``,
        ``.bvecs``, ``.ivecs`` or ``.mat``; and word vectors, HDF5 and JSON lists as of :class:`EmbeddingReader`.
    member : str, optional
        Which array of a ``.npz``, ``.safetensors``, ``.mat`` or HDF5 file; may be left out where there is one.
    column : str, optional
        Which list column of a table, of JSON lines or of CSV; left out, the only one, or ``vector``.
    ndim : 2, 1 or None
        The number of dimensions that is asked for; with 1 or 2 no side may be 0. ``None`` takes any.
    dtype : dtype, optional
        Left out: float32 and float64 stay, narrower floats (bfloat16 too), int8, int16 and their unsigned kin become
        float32, wider integers float64. An integer dtype accepts whole numbers only, for labels and indices,
        and no floats from where on they cannot hold every one (2^53 for float64).
    mmap : bool
        Map the file instead of reading it wherever its bytes are the result. A map is never writable.
    finite : bool
        Refuse NaN and infinity, naming the first row.
    booleans : bool
        Take true and false as 1 and 0, as for masks; arrays of them are refused otherwise.
    max_bytes : int, optional
        The most memory the array may take; left out, what is free. A map takes none.

    Raises
    ------
    UnreadableFile, CorruptFile, UntrustedFile, WrongContent, TooLarge
        See :mod:`polyspan.errors`; sizes are compared with the file before anything is allocated.
    """
    if ndim not in (None, 1, 2):
        raise ValueError(f"ndim must be 1, 2 or None, got {ndim!r}")
    suffix = ".bin" if is_word_binary(path) else suffix_of(path, READS)
    if suffix in STREAMED:
        check_options(suffix, column, member)
    if member is not None and suffix not in (*MEMBERS, *HDF5):
        raise ValueError(f"member is for {', '.join(MEMBERS)}, got {member!r} for {suffix}")
    if column is not None and suffix not in (*_tables.TABLES, *TEXTS, *JSON_LINES):
        raise ValueError(f"column is for {', '.join(_tables.TABLES)}, got {column!r} for {suffix}")
    if suffix in _tables.TABLES:
        raw = _read_vectors(path, column, max_bytes)
    elif suffix in STREAMED or (suffix in TEXTS and (column is not None or holds_lists(path))):
        raw = read_stream(path, open_stream(path, suffix, column=column, member=member), max_bytes)
    elif suffix in TEXTS:
        raw = _csv.read_csv(path, dtype is not None and np.dtype(dtype).kind in "iu")
    elif suffix in FVECS:
        slab = fvecs_slab(path)
        raw = fvecs_rows(slab)
    elif suffix == ".mat":
        raw = _read_mat_member(path, member, max_bytes)
    else:
        slab = _one_slab(path, suffix, member, max_bytes, booleans)
        _check_shape(path, slab.shape, ndim, slab.member)
        raw = _raw(slab, mmap, max_bytes)
        if slab.brain:
            check_budget(path, 2 * slab.nbytes, max_bytes, slab.member)
            raw = widen_brain(raw)
    _check_shape(path, raw.shape, ndim, member or column or "")
    made = _convert(path, raw, dtype, finite, max_bytes)
    if not mmap and not made.flags.owndata:
        made = made.copy()
    return made


def _one_slab(path: PathLike, suffix: str, member: str | None, max_bytes: int | None, booleans: bool) -> Slab:
    if suffix == ".npy":
        slab = npy_slab(path)
    elif suffix == ".npz":
        if member is None:
            member = _only(path, npz_names(path))
        slab = npz_slabs(path, [member], max_bytes)[member]
    else:
        tensors = tensor_slabs(path, refuse_types=False)
        name = _only(path, list(tensors.slabs)) if member is None else member
        if name not in tensors.slabs:
            raise no_member(path, name, list(tensors.slabs))
        slab = tensors.slabs[name]
        check_numbers(slab, booleans=booleans)
        check_digest(slab, stored_digests(path, tensors.metadata).get(name))
    check_numbers(slab, booleans=booleans)
    return slab


def _only(path: PathLike, names: list[str]) -> str:
    if len(names) != 1:
        raise WrongContent(
            path, found=f"{len(names)} arrays: {', '.join(sorted(names)[:20])}", expected="one, or member= naming it"
        )
    return names[0]


def _raw(slab: Slab, mmap: bool, max_bytes: int | None) -> np.ndarray:
    return slab.map() if mmap and slab.packed is None else slab.read(max_bytes)


def _check_shape(path: PathLike, shape: tuple[int, ...], ndim: int | None, where: str) -> None:
    if ndim is None:
        return
    if len(shape) != ndim:
        raise WrongContent(path, found=f"shape {shape}", expected=f"{ndim} dimension{'s'[: ndim > 1]}", where=where)
    if 0 in shape:
        raise WrongContent(path, found=f"shape {shape}", expected="at least one row and one column", where=where)


def widen_brain(raw: np.ndarray) -> np.ndarray:
    """Return bfloat16 numbers, given as their 16 bits, as float32: the upper half of whose bits they are."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def wide_dtype(stored: np.dtype) -> np.dtype:
    """Return the float dtype that holds the numbers of a stored one: float32 up to 16 bits and for float32 itself."""
    narrow = stored.itemsize <= (4 if stored.kind == "f" else 2)
    return np.dtype(np.float32 if narrow else np.float64)


def _convert(path: PathLike, raw: np.ndarray, dtype: Any, finite: bool, max_bytes: int | None) -> np.ndarray:
    target = wide_dtype(raw.dtype) if dtype is None else np.dtype(dtype)
    if target.kind not in "fiu":
        raise ValueError(f"dtype must be a float or an integer dtype, got {target}")
    if raw.dtype != target:
        check_budget(path, raw.size * target.itemsize, max_bytes)
        log.info("%s: %s is widened to %s", path, raw.dtype, target)
    if target.kind == "f":
        made = raw if raw.dtype == target else raw.astype(target)
        if finite:
            check_finite(path, made)
        return made
    return _whole(path, raw, target)


def _whole(path: PathLike, raw: np.ndarray, target: np.dtype) -> np.ndarray:
    """Return the numbers as integers; a fraction, or one that does not fit, is ``WrongContent``.

    So is a float from where on its kind no longer holds every whole number (2^53 for float64): it may have been
    rounded from another, and two labels or ids would have become one.
    """
    limits = np.iinfo(target)
    if raw.dtype == np.float16:
        # Its infinity would compare as equal to the limits, which it cannot hold.
        raw = raw.astype(np.float64)
    if raw.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            bad = ~((raw == np.floor(raw)) & (raw >= limits.min) & (raw <= limits.max))
            apart = 2 ** (np.finfo(raw.dtype).nmant + 1)
            far = ~bad & ~(np.abs(raw) < apart)
        if not bad.any() and far.any():
            at = tuple(int(i[0]) for i in np.nonzero(far)) if raw.ndim else ()
            raise WrongContent(
                path,
                found=f"{raw[at]} as a {raw.dtype}, which may stand for its neighbours too",
                expected=f"integers from {apart} on",
                where=f"row {at[0]}" if at else "",
            )
    else:
        bad = (raw < limits.min) | (raw > limits.max)
    if bad.any():
        at = tuple(int(i[0]) for i in np.nonzero(bad)) if raw.ndim else ()
        raise WrongContent(
            path, found=f"{raw[at]}", expected=f"whole numbers of {target}", where=f"row {at[0]}" if at else ""
        )
    return raw if raw.dtype == target else raw.astype(target)


def check_finite(path: PathLike, array: np.ndarray, first: int = 0) -> None:
    """Raise ``WrongContent`` naming the first row that holds NaN or infinity; rows are counted from ``first``."""
    if array.dtype.kind != "f" or array.size == 0:
        return
    rows = array.reshape(1, 1) if array.ndim == 0 else array
    step = max(1, BLOCK // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        with np.errstate(invalid="ignore"):
            fine = np.isfinite(block.min()) and np.isfinite(block.max())
        if not fine:
            flat = block.reshape(len(block), -1)
            row, place = (int(i[0]) for i in np.nonzero(~np.isfinite(flat)))
            inner = tuple(int(i) for i in np.unravel_index(place, array.shape[1:])) if array.ndim > 1 else ()
            where = f"row {first + start + row}"
            if inner:
                where += f", column {place}" if len(inner) == 1 else f", index {inner}"
            raise WrongContent(path, found=str(flat[row, place]), expected="finite numbers", where=where)


def check_digest(slab: Slab, expected: str | None) -> None:
    """Raise ``CorruptFile`` where the bytes of a tensor differ from the digest that was stored with them."""
    if expected is None:
        return
    total = hashlib.sha256()
    raw = slab.map().reshape(-1)
    for start in range(0, len(raw), BLOCK):
        total.update(raw[start : start + BLOCK].data)
    if total.hexdigest() != expected:
        raise CorruptFile(
            slab.path, found="changed bytes", expected=f"SHA-256 {expected}", where=f"tensor {slab.member}"
        )


def _read_vectors(path: PathLike, column: str | None, max_bytes: int | None) -> np.ndarray:
    with _tables.open_table(path) as table:
        name = _tables.vector_column(table, column)
        dim = _tables.width(table, name)
        target = wide_dtype(_tables.item_dtype(table, name))
        check_budget(path, table.n_rows * dim * target.itemsize, max_bytes, f"column {name}")
        made = np.empty((table.n_rows, dim), target)
        done = 0
        for first, batch in table.batches([name], 65536):
            rows = _tables.to_rows(path, name, batch.column(name), first, dim)
            if first != done or done + len(rows) > len(made):
                raise CorruptFile(path, found="rows out of step", expected=f"{table.n_rows} rows")
            made[done : done + len(rows)] = rows
            done += len(rows)
        if done != len(made):
            raise CorruptFile(path, found=f"{done} rows", expected=f"{len(made)}, as its footer says")
    return made


def _read_mat_member(path: PathLike, member: str | None, max_bytes: int | None) -> np.ndarray:
    names = _mat.mat_names(path)
    name = _only(path, names) if member is None else member
    found = _mat.read_mat(path, [name], max_bytes=max_bytes)[name]
    if hasattr(found, "toarray"):
        check_budget(path, found.shape[0] * found.shape[1] * 8, max_bytes, f"member {name}")
        found = found.toarray()
    return np.ascontiguousarray(found)


def read_members(
    path: PathLike, names: list[str] | None = None, *, finite: bool = True, max_bytes: int | None = None
) -> dict[str, np.ndarray]:
    """Return several arrays of a ``.npz``, ``.safetensors`` or ``.mat`` file by name, each of any shape.

    Integers and booleans keep their dtype; floats narrower than float32 are widened to it.

    Parameters
    ----------
    path : path-like
    names : list of str, optional
        Which; left out, all.
    finite : bool
        Refuse NaN and infinity, naming member and row.
    max_bytes : int, optional
        The most memory that all together may take.

    Raises
    ------
    UnreadableFile, CorruptFile, UntrustedFile, WrongContent, TooLarge
        A missing member is ``WrongContent`` and the error lists those there are.
    """
    suffix = suffix_of(path, MEMBERS)
    if suffix == ".mat":
        return {k: np.asarray(v) for k, v in _mat.read_mat(path, names, max_bytes=max_bytes, dense=True).items()}
    digests: dict[str, str] = {}
    if suffix == ".npz":
        slabs = npz_slabs(path, names, max_bytes)
    else:
        tensors = tensor_slabs(path, refuse_types=False)
        missing = [name for name in names or () if name not in tensors.slabs]
        if missing:
            raise no_member(path, missing[0], list(tensors.slabs))
        slabs = tensors.slabs if names is None else {name: tensors.slabs[name] for name in names}
        digests = stored_digests(path, tensors.metadata)
    check_budget(path, sum(slab.nbytes for slab in slabs.values()), max_bytes)
    made = {}
    for name, slab in slabs.items():
        check_numbers(slab, booleans=True)
        check_digest(slab, digests.get(name))
        raw = slab.read(max_bytes)
        if slab.brain:
            raw = widen_brain(raw)
        raw = raw.astype(np.float32 if raw.dtype == np.float16 else raw.dtype.newbyteorder("="), copy=False)
        if finite:
            try:
                check_finite(path, raw)
            except WrongContent as error:
                where = f"member {name}, {error.where}"
                raise WrongContent(path, found=error.found, expected=error.expected, where=where) from None
        made[name] = raw
    return made


def as_numbers(array: Any, name: str = "array") -> np.ndarray:
    """Return an array-like or a torch tensor as a NumPy array of numbers, in native byte order.

    Raises
    ------
    ValueError
        It holds no real numbers.
    """
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if str(array.dtype) == "torch.bfloat16" else array
    made = np.asarray(array)
    if made.dtype.kind not in "fiub" or made.dtype.itemsize > 8:
        raise ValueError(f"{name} must hold real numbers, got dtype {made.dtype}")
    return made.astype(made.dtype.newbyteorder("="), copy=False)


def write_array(
    path: PathLike,
    array: Any,
    *,
    ids: Any = None,
    column: str = _tables.VECTOR,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write one array atomically in the format that the suffix names, and return the path.

    Parameters
    ----------
    path : path-like
        ``.npy``, ``.npz``, ``.safetensors``, ``.parquet``, ``.arrow``, ``.feather``, ``.csv`` or ``.fvecs``.
    array : array or tensor
        Finite numbers; rows of vectors, (n, d), for tables, ``.csv`` and ``.fvecs``.
    ids : sequence of int or str, optional
        One a row, for tables.
    column : str
        Name of the list column, or of the member in ``.npz`` and ``.safetensors``.
    metadata : mapping of str to str, optional
        Kept in tables and in ``.safetensors``.

    Raises
    ------
    ValueError
        Numbers that are not finite, ids of another length, or ids or metadata where the format has no place for them.
    UnreadableFile
        The place cannot be written to.
    """
    suffix = suffix_of(path, WRITES) if Path(path).suffix.lower() not in WRITES else Path(path).suffix.lower()
    made = as_numbers(array)
    try:
        check_finite(path, made)
    except WrongContent as error:
        raise ValueError(f"array must be finite, got {error.found} at {error.where}") from None
    if suffix in (*_tables.TABLES, ".csv", ".fvecs") and (made.ndim != 2 or made.shape[1] == 0):
        raise ValueError(f"array must be 2-d with at least one column for {suffix}, got shape {made.shape}")
    if ids is not None and suffix not in _tables.TABLES:
        raise ValueError(f"ids need a table ({', '.join(_tables.TABLES)}), got {suffix}")
    if metadata and suffix not in (*_tables.TABLES, ".safetensors"):
        raise ValueError(f"metadata needs a table or .safetensors, got {suffix}")
    if suffix in (".npz", ".safetensors"):
        return write_members(path, {column: made}, metadata=metadata)
    if suffix in _tables.TABLES:
        _write_table(path, made, ids, column, dict(metadata or {}))
        return Path(path)
    with atomic_path(path) as temp, open(temp, "wb") as file:
        if suffix == ".npy":
            file.write(npy_header(made.shape, made.dtype))
            _stream(file, made)
        elif suffix == ".csv":
            whole = made.dtype.kind in "iub"
            for row in made.tolist():
                file.write((",".join(str(int(v)) if whole else repr(v) for v in row) + "\n").encode())
        else:
            rows = np.empty((len(made), 1 + made.shape[1]), "<f4")
            rows[:, 0] = np.array(made.shape[1], "<i4").view("<f4")
            rows[:, 1:] = made
            _stream(file, rows)
    return Path(path)


def _stream(file: Any, array: np.ndarray) -> None:
    """Write the values in C order, little endian, a block at a time."""
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, BLOCK // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        block = np.ascontiguousarray(rows[start : start + step], dtype=array.dtype.newbyteorder("<"))
        file.write(block.reshape(-1).view(np.uint8))


def as_ids(ids: Any, n: int) -> np.ndarray:
    """Return ids as int64 or text, one for each of n rows."""
    made = np.asarray(ids)
    if made.shape != (n,):
        raise ValueError(f"ids must be one a row, {n}, got shape {made.shape}")
    if made.dtype.kind in "iu":
        return made.astype(np.int64)
    if made.dtype.kind == "U":
        return made
    if made.dtype == object and all(isinstance(v, str) for v in made):
        return made.astype(np.str_)
    raise ValueError(f"ids must be int or str, got dtype {made.dtype}")


def _write_table(path: PathLike, rows: np.ndarray, ids: Any, column: str, metadata: dict[str, str]) -> None:
    import pyarrow as pa

    given = None if ids is None else as_ids(ids, len(rows))
    kind = None if given is None else ("int64" if given.dtype.kind == "i" else "string")
    schema = _tables.arrow_schema(column, rows.shape[1], rows.dtype, kind).with_metadata(metadata or None)
    with atomic_path(path) as temp, table_writer(path, temp, schema) as writer:
        for start in range(0, max(len(rows), 1), 65536):
            block = rows[start : start + 65536]
            columns = [] if given is None else [pa.array(given[start : start + 65536], type=schema.field(0).type)]
            columns.append(_tables.arrow_vectors(block, schema.field(column).type.value_type))
            writer.write_batch(pa.record_batch(columns, schema=schema))


def table_writer(path: PathLike, temp: Path, schema: Any) -> Any:
    """Open a Parquet or Arrow writer on a temporary; ``path`` is the target whose suffix says which."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if Path(path).suffix.lower() in _tables.PARQUET:
        # Floats hardly pack; leaving compression and dictionaries out is what keeps writing as fast as the disk.
        return pq.ParquetWriter(
            str(temp), schema, compression="none", use_dictionary=False, write_statistics=False,
            write_page_checksum=True, store_schema=True,
        )  # fmt: skip
    return pa.ipc.new_file(str(temp), schema)


def write_members(path: PathLike, arrays: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None) -> Path:
    """Write named arrays atomically to ``.npz`` or ``.safetensors``, and return the path.

    The same arrays give the same bytes. ``.safetensors`` gets the SHA-256 of each tensor in its metadata, which
    reading compares; the key ``polyspan`` of the metadata is kept for it.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".npz", ".safetensors"):
        raise ValueError(f"path must end in .npz or .safetensors, got {suffix!r}")
    if metadata and suffix == ".npz":
        raise ValueError("metadata needs .safetensors, got .npz")
    made = {name: as_numbers(arrays[name], name) for name in sorted(arrays)}
    if not made:
        raise ValueError("arrays must hold at least one array, got none")
    if suffix == ".safetensors":
        write_tensors(path, made, {"sha256": {}}, dict(metadata or {}))
        return Path(path)
    with atomic_path(path) as temp, zipfile.ZipFile(temp, "w", zipfile.ZIP_STORED) as archive:
        for name, array in made.items():
            if not name or ".." in name.replace("\\", "/").split("/") or name.startswith("/"):
                raise ValueError(f"arrays must have plain names, got {name!r}")
            # A fixed date keeps the bytes equal from day to day.
            with archive.open(zipfile.ZipInfo(name + ".npy"), "w", force_zip64=True) as member:
                member.write(npy_header(array.shape, array.dtype))
                _stream(member, array)
    return Path(path)


def write_tensors(path: PathLike, arrays: dict[str, np.ndarray], about: dict, metadata: dict[str, str]) -> None:
    """Write a .safetensors file whose metadata ``polyspan`` is ``about`` with the digest of each tensor added."""
    if "polyspan" in metadata:
        raise ValueError("metadata must leave the key 'polyspan' to the library, got it")
    for name, array in arrays.items():
        if array.dtype.newbyteorder("<") not in CODES:
            raise ValueError(f"{name} must be of a dtype that .safetensors holds, got {array.dtype}")
    # Wide items first: every tensor then begins at a multiple of its own width, as maps need it.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    little = {name: np.ascontiguousarray(arrays[name], arrays[name].dtype.newbyteorder("<")) for name in order}
    little = {name: little[name].reshape(arrays[name].shape) for name in order}
    digests = {name: hashlib.sha256(little[name].reshape(-1).view(np.uint8).data).hexdigest() for name in order}
    stored = {**metadata, "polyspan": dump_json({**about, "sha256": digests}, indent=None, name="about")}
    shapes = {name: (CODES[little[name].dtype], tuple(little[name].shape)) for name in order}
    with atomic_path(path) as temp, open(temp, "wb") as file:
        file.write(tensor_header(shapes, stored))
        for name in order:
            _stream(file, little[name])


def write_tensor_blocks(
    path: PathLike, tensors: Mapping[str, tuple[str, tuple[int, ...]]], blocks: Iterable[Any], metadata: dict[str, str]
) -> Path:
    """Write a .safetensors file atomically from bytes that come in blocks, none of which is kept.

    Parameters
    ----------
    path : path-like
    tensors : mapping of str to (str, tuple of int)
        Name in the format ("F32", "BF16", ...) and shape, in the order in which their bytes come. Wide items first:
        every tensor then begins at a multiple of its own width, as maps need it.
    blocks : iterable of buffers
        Little-endian, C order; they need not end where a tensor does.
    metadata : dict of str to str

    Raises
    ------
    ValueError
        The blocks are not as many bytes as the tensors need.
    UnreadableFile
        The place may not be written to.
    """
    expected = sum(math.prod(shape) * np.dtype(TENSOR_TYPES[code]).itemsize for code, shape in tensors.values())
    with atomic_path(path) as temp, open(temp, "wb") as file:
        file.write(tensor_header(dict(tensors), metadata))
        written = sum(file.write(block) for block in blocks)
        if written != expected:
            raise ValueError(f"blocks must be {expected:,} bytes in all, got {written:,}")
    return Path(path)


def same_file(a: PathLike, b: PathLike) -> bool:
    """Tell whether two paths are one file."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def array_facts(array: np.ndarray) -> dict[str, Any]:
    """Return shape, dtype and digest of an array as JSON types."""
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": digest_array(array)}
