"""Next vectors on their way into a LanceDB table: pieces on the disk, whose rows are found again by id."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.errors import WrongContent
from polyspan.io import atomic_path, list_folder, make_folder
from polyspan.io._tables import open_table

ID, OLD, NEXT = "id", "old", "next"
ABOUT = b"polyspan:work"


def row_sums(rows: np.ndarray, texts: Sequence[Any] | None = None) -> np.ndarray:
    """Return the CRC-32 of each vector's bytes, and of its text's where they are given, (b,) uint32.

    It tells whether a vector and its text are those that were seen before.
    """
    sums = map(zlib.crc32, np.ascontiguousarray(rows))
    if texts is not None:
        said = (b"" if text is None else b"\0" + str(text).encode() for text in texts)
        sums = map(zlib.crc32, said, sums)
    return np.fromiter(sums, np.uint32, len(rows))


def vector_lists(rows: np.ndarray, kind: Any) -> Any:
    """Return finite rows (b, d) as an Arrow array of fixed-size lists, rounded to the width of ``kind``."""
    rows = np.asarray(rows)
    if rows.ndim != 2 or rows.shape[1] != kind.list_size:
        raise ValueError(f"next vectors must have shape (b, {kind.list_size}), got {rows.shape}")
    with np.errstate(over="ignore"):
        made = np.ascontiguousarray(rows, dtype=kind.value_type.to_pandas_dtype())
    if not np.isfinite(made).all():
        raise ValueError(f"next vectors must be finite as {made.dtype}, got NaN or infinity")
    return _lists(made, kind)


def _lists(rows: np.ndarray, kind: Any) -> Any:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), kind.list_size).cast(kind)


def _keys(ids: Any) -> np.ndarray:
    """Return an int64 for each id, the same for the same id in this process; others may share it."""
    import pyarrow as pa

    if pa.types.is_integer(ids.type):
        return ids.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids))


class Spool:
    """Next vectors with their ids, in a folder of files that are each whole and synced once they have their names.

    With each stands a sum of the vector, and of the text, that it was made of, so that an item that changed is not
    found. Of two next vectors of one id the later counts.

    Parameters
    ----------
    folder : path-like
        Made with the first piece.
    work : mapping
        JSON types that say what is made and how; pieces of other work are refused.
    id_kind, kind : pyarrow.DataType
        Of ids, and of next vectors.
    """

    def __init__(self, folder: Path, work: Mapping[str, Any], id_kind: Any, kind: Any):
        self.folder, self.id_kind, self.kind = folder, id_kind, kind
        self.about = json.dumps(work, sort_keys=True).encode()

    def is_of(self, work: Mapping[str, Any]) -> bool:
        """Tell whether pieces are of this work."""
        return self.about == json.dumps(work, sort_keys=True).encode()

    def _names(self) -> list[Path]:
        return list_folder(self.folder, "*.arrow") if self.folder.is_dir() else []

    def add(self, ids: Any, sums: np.ndarray, rows: np.ndarray) -> None:
        """Write a piece, with the :func:`row_sums` of what it was made of; it is on the disk when this returns."""
        import pyarrow as pa

        if ids.null_count:
            raise WrongContent(self.folder, found="an id missing", expected="an id of its own for each row")
        fields = [pa.field(ID, self.id_kind), pa.field(OLD, pa.uint32()), pa.field(NEXT, self.kind)]
        schema = pa.schema(fields, metadata={ABOUT: self.about})
        columns = [ids, pa.array(sums), vector_lists(rows, self.kind)]
        make_folder(self.folder)
        last = self._names()[-1:]
        number = int(last[0].stem.partition("-")[0]) + 1 if last else 0
        # Two runs at once must not write one name.
        path = self.folder / f"{number:08d}-{os.getpid()}.arrow"
        with atomic_path(path) as temp, pa.ipc.new_file(str(temp), schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))

    def held(self) -> "Held":
        """Look at what is there now."""
        return Held(self, self._names())


class Held:
    """What a spool held when it was looked at: ids and sums in memory, vectors in their files."""

    def __init__(self, spool: Spool, paths: list[Path]):
        import pyarrow as pa

        self.paths, self.kind = paths, spool.kind
        self._mapped: tuple[int, np.ndarray] | None = None
        ids, sums, keys = [pa.array([], spool.id_kind)], [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
        for path in paths:
            batch = self._piece(path, spool.about)
            ids.append(batch.column(ID))
            sums.append(batch.column(OLD).to_numpy())
            keys.append(_keys(batch.column(ID)))
        self._starts = np.cumsum([0, *map(len, ids[1:])])
        # Joined, and so copied: a slice would keep its file mapped.
        self._ids, self._sums, found = pa.concat_arrays(ids), np.concatenate(sums), np.concatenate(keys)
        self._order = np.argsort(found, kind="stable")
        self._sorted = found[self._order]

    def _piece(self, path: Path, about: bytes | None = None) -> Any:
        with open_table(path) as table:
            if about is not None and (table.schema.metadata or {}).get(ABOUT) != about:
                raise WrongContent(path, found="next vectors of another upgrade", expected="those of the one under way")
            return next(table.batches(table.schema.names, table.n_rows))[1]

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, ids: Any, sums: np.ndarray | None = None) -> np.ndarray:
        """Return where each id's vector stands, (b,), or -1; with ``sums`` (b,) it must be made of what has these."""
        import pyarrow as pa
        import pyarrow.compute as pc

        keys = _keys(ids)
        at = np.searchsorted(self._sorted, keys, side="right") - 1
        places = np.full(len(keys), -1)
        left = np.flatnonzero(at >= 0)
        # One round, but for different ids of one hash: these are a few places lower.
        while len(left := left[self._sorted[at[left]] == keys[left]]):
            there = self._order[at[left]]
            same = pc.call_function("equal", [self._ids.take(pa.array(there)), ids.take(pa.array(left))])
            same = same.fill_null(False).to_numpy(zero_copy_only=False)
            places[left[same]] = there[same]
            left = left[~same]
            at[left] -= 1
            left = left[at[left] >= 0]
        if sums is not None:
            found = np.flatnonzero(places >= 0)
            places[found[self._sums[places[found]] != sums[found]]] = -1
        return places

    def sums(self, places: np.ndarray) -> np.ndarray:
        """Return the sums, (b,), of what the vectors that stand there were made of."""
        return self._sums[places]

    def take(self, places: np.ndarray) -> Any:
        """Return the vectors that stand there, (b, dim), as an Arrow array of fixed-size lists."""
        made = np.empty((len(places), self.kind.list_size), self.kind.value_type.to_pandas_dtype())
        piece = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(piece):
            mine = piece == number
            made[mine] = self._rows(int(number))[places[mine] - self._starts[number]]
        return _lists(made, self.kind)

    def _rows(self, number: int) -> np.ndarray:
        if self._mapped is None or self._mapped[0] != number:
            lists = self._piece(self.paths[number]).column(NEXT)
            self._mapped = number, lists.flatten().to_numpy().reshape(-1, self.kind.list_size)
        return self._mapped[1]
