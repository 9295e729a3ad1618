"""Matrices of self-expression as named arrays of a file, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from polyspan.errors import WrongContent

from ._affinity import RidgeExpression, SquaredAffinity

CSR = ("data", "indices", "indptr")
FACTORS = ("Y", "h", "w")


def to_arrays(name: str, matrix: Any) -> tuple[str, dict[str, np.ndarray]]:
    """Return what form a matrix (n, n) has, and its arrays under ``name``; squares have none beside the expression."""
    if sp.issparse(matrix):
        return "csr", {f"{name}.{part}": getattr(matrix, part) for part in CSR}
    if isinstance(matrix, SquaredAffinity):
        return "squared", {}
    if isinstance(matrix, RidgeExpression):
        return f"ridge {np.dtype(matrix.width).name}", {f"{name}.{part}": getattr(matrix, part) for part in FACTORS}
    return "dense", {name: np.asarray(matrix)}


def from_arrays(name: str, form: str, arrays: Mapping[str, Any], n: int, path: Path, *, expression: Any = None) -> Any:
    """Return the matrix (n, n) that :func:`to_arrays` took apart; ``expression`` is what squares are of.

    Raises
    ------
    WrongContent
        The arrays make no such matrix.
    """
    try:
        if form == "squared" and isinstance(expression, RidgeExpression):
            return SquaredAffinity(expression)  # ty: ignore[no-matching-overload]
        if form == "csr":
            parts = tuple(np.array(arrays[f"{name}.{part}"]) for part in CSR)
            matrix = sp.csr_array(parts, shape=(n, n))
            matrix.check_format(full_check=True)
            return matrix
        kind, _, width = form.partition(" ")
        if kind == "ridge":
            matrix = RidgeExpression.of_factors(*(np.array(arrays[f"{name}.{part}"]) for part in FACTORS), width)
        else:
            matrix = np.array(arrays[name])
    except (KeyError, TypeError, ValueError) as error:
        raise WrongContent(path, found=f"{name} of form {form!r}: {error}", expected=f"a matrix of {n} rows") from error
    if matrix.shape != (n, n):
        raise WrongContent(path, found=f"{name} of shape {matrix.shape}", expected=f"a matrix of {n} rows")
    return matrix


def listed(name: str, arrays: Mapping[str, Any]) -> list[np.ndarray]:
    """Return the arrays ``name.0``, ``name.1`` and so on."""
    count = sum(key.startswith(f"{name}.") for key in arrays)
    return [np.array(arrays[f"{name}.{j}"]) for j in range(count)]
