"""Tables on disk as named columns, a batch at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import read_csv
from polyspan.io._tables import TABLES, open_table

TEXT_TABLES = (".csv", ".tsv")


class TableFile:
    """A Parquet or Arrow file, read in batches of Arrow columns, or a text table, read whole.

    Cells of a text table that are empty are missing values, and columns whose other cells are all numbers are numbers.
    All else is text there, dates and truth values too: they are other values than those of a Parquet file.
    Dictionary-encoded columns stay so, and only their dictionaries are hashed.

    Parameters
    ----------
    path : path
    target : str
        Column that is given apart.
    columns : sequence of str, optional
        Columns to give; all but the target where left out.
    batch_rows : int
        Rows a batch.
    """

    def __init__(self, path: Path | str, target: str | None, columns: Sequence[str] | None, batch_rows: int):
        if batch_rows < 1:
            raise ValueError(f"batch_rows must be at least 1, got {batch_rows}")
        self.path, self.target, self.batch_rows = Path(path), target, batch_rows
        suffix = self.path.suffix.lower()
        if suffix not in (*TABLES, *TEXT_TABLES):
            raise ValueError(f"path must end in one of {', '.join((*TABLES, *TEXT_TABLES))}, got {self.path.name!r}")
        self._whole: dict[str, Any] | None = None
        self._context: Any = None
        self._table: Any = None
        if suffix in TEXT_TABLES:
            self._whole = {name: _typed(cells) for name, cells in read_csv(self.path).items()}
            names, self.n_rows = list(self._whole), len(next(iter(self._whole.values())))
        else:
            self._context = open_table(self.path)
            self._table = self._context.__enter__()
            names, self.n_rows = list(self._table.schema.names), self._table.n_rows
        wanted = [*(columns or ()), *([] if target is None else [target])]
        strange = [name for name in wanted if name not in names]
        if strange:
            raise ValueError(f"columns must be of {self.path.name}, which has {names[:20]}, got {strange[:5]}")
        self.names = list(columns) if columns is not None else [name for name in names if name != target]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"columns must be named once each, got {self.names}")
        if not self.names or target in self.names:
            raise ValueError(f"columns must be others than the target {target!r}, got {self.names}")

    def __enter__(self) -> "TableFile":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*error)
            self._context = None

    def facts(self) -> dict[str, Any]:
        """Return what tells this file and its use from others."""
        size = self.path.stat().st_size
        return {
            "name": self.path.name,
            "bytes": size,
            "n_rows": self.n_rows,
            "target": self.target,
            "columns": self.names,
        }

    def batches(self) -> Iterator[tuple[int, dict[str, Any], Any]]:
        """Yield (number of the first row, columns by name, target or None)."""
        wanted = [*self.names, *([] if self.target is None else [self.target])]
        if self._whole is not None:
            for start in range(0, self.n_rows, self.batch_rows):
                part = {name: self._whole[name][start : start + self.batch_rows] for name in wanted}
                yield (
                    start,
                    {name: part[name] for name in self.names},
                    None if self.target is None else part[self.target],
                )
            return
        for start, batch in self._table.batches(wanted, self.batch_rows):
            columns = {name: batch.column(name) for name in self.names}
            yield start, columns, None if self.target is None else _target(batch.column(self.target), self.target)

    def first(self, n: int) -> dict[str, Any]:
        """Return the columns of the first ``n`` rows, or of all where there are fewer, however the file groups them.

        Raises
        ------
        ValueError
            The file has no row.
        """
        parts, count = [], 0
        for _, columns, _ in self.batches():
            parts.append(columns)
            count += len(next(iter(columns.values())))
            if count >= n:
                break
        if not count:
            raise ValueError(f"{self.path.name} must have at least one row, got 0")
        if self._whole is not None:
            return {name: np.concatenate([part[name] for part in parts])[:n] for name in self.names}
        import pyarrow as pa

        return {name: pa.chunked_array([part[name] for part in parts]).slice(0, n) for name in self.names}


def _target(column: Any, name: str) -> np.ndarray:
    import pyarrow.types as t

    if column.null_count:
        raise ValueError(f"target {name!r} must have a value in every row, got {column.null_count} nulls")
    if t.is_dictionary(column.type):
        column = column.dictionary_decode()
    values = column.to_numpy(zero_copy_only=False)
    return np.asarray(values.tolist()) if values.dtype == object else values


def _typed(cells: list[str]) -> np.ndarray:
    """Return a column of text as whole numbers, numbers, or text with None where a cell is empty."""
    full = [cell for cell in cells if cell]
    for kind in (np.int64, np.float64):
        try:
            made = np.array(full, dtype=np.str_).astype(kind)
        except (ValueError, OverflowError):
            continue
        if kind is np.int64 and (len(full) < len(cells) or any(str(v) != c for v, c in zip(made, full, strict=True))):
            if any(str(v) != c for v, c in zip(made, full, strict=True)):
                break  # "007" is a name, and no number
            return np.array([int(c) if c else None for c in cells], dtype=object)
        filled = np.full(len(cells), np.nan) if kind is np.float64 else np.empty(len(cells), kind)
        filled[[bool(c) for c in cells]] = made
        return filled
    return np.array([cell or None for cell in cells], dtype=object)
