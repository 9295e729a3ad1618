"""Small tables of results: named columns of one length, such as ids and labels."""

import csv
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from ._door import PathLike
from .arrays import table_writer
from .atomic import atomic_path
from .text import write_text

COLUMN_FILES = (".parquet", ".arrow", ".feather", ".csv", ".tsv")


def write_columns(path: PathLike, columns: Mapping[str, Any]) -> Path:
    """Write named columns of numbers or text as a table, atomically, and return the path.

    Parameters
    ----------
    path : path-like
        ``.parquet``, ``.arrow``, ``.feather``, ``.csv`` or ``.tsv``.
    columns : mapping of str to array of shape (n,)

    Raises
    ------
    ValueError
        Another suffix, no columns, or columns of different lengths.
    UnreadableFile
        The place cannot be written to.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in COLUMN_FILES:
        raise ValueError(f"path must end in one of {', '.join(COLUMN_FILES)}, got {path.name!r}")
    arrays = {name: np.asarray(column) for name, column in columns.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"columns must be of one length, got {lengths}")
    if suffix in (".csv", ".tsv"):
        text = StringIO()
        writer = csv.writer(text, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(arrays)
        writer.writerows(zip(*(array.tolist() for array in arrays.values()), strict=True))
        return write_text(path, text.getvalue())
    import pyarrow as pa

    table = pa.table({name: pa.array(array.tolist()) for name, array in arrays.items()})
    with atomic_path(path) as temp, table_writer(path, temp, table.schema) as writer:
        writer.write_table(table)
    return path
