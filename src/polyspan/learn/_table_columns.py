"""What people call a table, as named columns: DataFrames, Arrow tables, mappings, arrays and lists of rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.utils.validation import validate_data

from ._tensors import as_array

FLOAT_KINDS = "f"


def read_columns(estimator: Any, X: Any, *, reset: bool, absent: str | None = "error") -> tuple[dict[str, Any], bool]:
    """Return the columns by name, and whether they brought names of their own; learn them at the fit.

    Later, columns are taken by name in the order of the fit, and further ones are left out. ``absent="missing"`` gives
    a column that is not there missing values, ``"error"`` refuses; ``None`` takes whatever comes.
    """
    X = as_array(X)
    names = _names(X)
    if names is None:
        if isinstance(X, list) and X and isinstance(X[0], list | tuple):
            X = _object_rows(X)
        if absent is None:
            array = np.asarray(X) if not hasattr(X, "dtype") else X
            if array.ndim != 2:
                raise ValueError(f"X must have 2 dimensions, got {array.ndim}")
        else:
            array = validate_data(estimator, X, reset=reset, dtype=None, ensure_all_finite=False)
            if not reset and hasattr(estimator, "feature_names_in_"):
                return {str(n): array[:, i] for i, n in enumerate(estimator.feature_names_in_)}, True
        return {f"x{i}": _narrowed(array[:, i]) for i in range(array.shape[1])}, False
    labels, names = names, [str(name) for name in names]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"X must have distinct column names, got {twice!r} twice")
    if not names:
        raise ValueError("X must have at least one column, got 0 feature(s)")
    columns = {name: as_array(X[label]) for name, label in zip(names, labels, strict=True)}
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise ValueError(f"columns of X must be of one length, got {sorted(lengths)}")
    if lengths == {0}:
        raise ValueError("X must have at least one row, got 0 sample(s)")
    if reset:
        estimator.n_features_in_ = len(names)
        estimator.feature_names_in_ = np.array(names, dtype=object)
        return columns, True
    if absent is None:
        return columns, True
    known = getattr(estimator, "feature_names_in_", [f"x{i}" for i in range(estimator.n_features_in_)])
    missing = [str(name) for name in known if name not in columns]
    if missing and absent == "error":
        raise ValueError(f"X must hold every column of the fit, missing {missing[:5]}; absent='missing' allows it")
    n = lengths.pop()
    return {str(name): columns[name] if name in columns else np.full(n, np.nan) for name in known}, True


def _names(X: Any) -> list[Any] | None:
    """Return the column labels of a table, or None of what has none."""
    if isinstance(X, Mapping):
        return list(X)
    if hasattr(X, "column_names"):  # an Arrow table
        return list(X.column_names)
    if hasattr(X, "schema") and hasattr(X, "num_rows"):  # an Arrow record batch
        return list(X.schema.names)
    if hasattr(X, "columns") and (hasattr(X, "iloc") or hasattr(X, "get_column")):  # pandas, polars
        return list(X.columns)
    return None


def _object_rows(rows: list) -> Any:
    """Return rows of several kinds as objects, so that a number beside text stays a number."""
    kinds = {type(cell) for row in rows for cell in row}
    if len(kinds) > 1 and not kinds <= {int, float, bool}:
        made = np.empty((len(rows), len(rows[0])), dtype=object)
        for i, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise ValueError(f"rows of X must be of one length, got {len(row)} in row {i}, {len(rows[0])} in row 0")
            made[i] = row
        return made
    return rows


def _narrowed(column: np.ndarray) -> np.ndarray:
    """Return a column of objects that are all plain numbers as such."""
    if column.dtype != object:
        return column
    kinds = {type(value) for value in column}
    return column.astype(np.float64) if kinds <= {float, np.float64, np.float32} else column


def is_dense(column: Any) -> bool:
    """Whether a column holds numbers that measure: floats, which "auto" does not embed."""
    kind = getattr(column, "dtype", None)
    if isinstance(kind, np.dtype):
        return kind.kind in FLOAT_KINDS
    if hasattr(column, "type") and not isinstance(column, np.ndarray):
        import pyarrow.types as t

        return t.is_floating(column.type)
    if kind is not None:
        return str(kind).lower().startswith("float")
    return len(column) > 0 and all(isinstance(value, float) for value in column)


def is_listed(column: Any) -> bool:
    """Whether the cells of a column are lists."""
    if hasattr(column, "type") and not isinstance(column, np.ndarray):
        return "list" in str(column.type)
    if isinstance(getattr(column, "dtype", None), np.dtype) and column.dtype != object:
        return False
    for value in column:
        if value is not None and not isinstance(value, float):
            return isinstance(value, list | tuple | np.ndarray)
    return False


def numbers(column: Any, name: str) -> np.ndarray:
    """Return a column of numbers as float64, with NaN where there is none.

    Raises
    ------
    ValueError
        A value is no number.
    """
    if hasattr(column, "to_numpy"):
        try:
            column = column.to_numpy(zero_copy_only=False)
        except TypeError:
            column = column.to_numpy()
    try:
        return np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {name!r} must hold numbers, as at the fit: {error}") from None
