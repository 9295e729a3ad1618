"""Numbers of text tables, .csv and .tsv."""

from pathlib import Path

import numpy as np

from polyspan.errors import WrongContent

from ._door import PathLike
from .text import read_text


def read_csv(path: PathLike, whole: bool = False) -> np.ndarray:
    """Return the numbers of a text table, integers where ``whole`` and all are; a first line may be a header."""
    suffix = Path(path).suffix.lower()
    delimiter = "\t" if suffix == ".tsv" else ","
    rows: list[np.ndarray] = []
    for number, line in enumerate(read_text(path, max_bytes=2**30).split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.split(delimiter)
        try:
            values = _numbers(cells, whole)
        except ValueError:
            if number == 1:
                continue
            bad = next(i for i, cell in enumerate(cells) if not _is_number(cell))
            raise WrongContent(
                path, found=repr(cells[bad][:40]), expected="a number", where=f"line {number}, column {bad}"
            ) from None
        if rows and len(values) != len(rows[0]):
            raise WrongContent(
                path, found=f"{len(values)} numbers", expected=f"{len(rows[0])} as in row 0", where=f"line {number}"
            )
        rows.append(values)
    if not rows:
        raise WrongContent(path, found="no row of numbers", expected="at least one")
    return np.stack(rows)


def _numbers(cells: list[str], whole: bool) -> np.ndarray:
    """Return cells as float64, or as int64 where ``whole`` and all can be: a float would round those beyond 2^53."""
    if whole:
        try:
            return np.array([int(cell) for cell in cells], dtype=np.int64)
        except (ValueError, OverflowError):
            pass
    return np.array([float(cell) for cell in cells])


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
