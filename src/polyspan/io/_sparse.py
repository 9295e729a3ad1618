"""Sparse matrices whose indices nobody has checked, made safe to multiply."""

from typing import Any

import numpy as np
import scipy.sparse as sp

from polyspan.errors import CorruptFile, WrongContent

from ._door import PathLike, check_budget


def check_sparse(matrix: Any, path: PathLike | None = None) -> sp.csr_array:
    """Return a sparse matrix as CSR in canonical form, after every index has been checked.

    SciPy trusts index arrays: a column past the end, or row pointers that fall, end in a segmentation fault at the
    first product. Entries that occur twice are summed, stored zeros are dropped, columns are sorted.

    Parameters
    ----------
    matrix : scipy.sparse array or matrix
        It is not changed.
    path : path-like, optional
        The file it came from.

    Raises
    ------
    CorruptFile
        An index is out of range, with ``path``; without one, ValueError.
    WrongContent
        A value is no finite real number, with ``path``; without one, ValueError.
    """

    def broken(error: object) -> Exception:
        if path is None:
            return ValueError(f"matrix must be a valid sparse matrix, got {error}")
        return CorruptFile(path, found=str(error), expected="valid sparse indices")

    if not sp.issparse(matrix) or matrix.ndim != 2:
        raise refusal(path, f"a {type(matrix).__name__}", "a 2-d scipy.sparse matrix", name="matrix")
    if matrix.dtype.kind not in "fiub" or matrix.dtype.itemsize > 8:
        raise refusal(path, f"values of dtype {matrix.dtype}", "real numbers", name="matrix")
    if path is not None:
        # Row pointers are the one part whose size no stored index bounds.
        check_budget(path, 8 * (matrix.shape[0] + 1), None, "row pointers")
    try:
        if matrix.format in ("csr", "csc", "bsr"):
            # SciPy's own check looks at no pointer where the last one is 0.
            if len(matrix.indptr) == 0 or matrix.indptr[0] != 0 or (np.diff(matrix.indptr) < 0).any():
                raise ValueError("index pointers must begin at 0 and never fall")
            matrix.check_format(full_check=True)
        elif matrix.format == "coo":
            for coordinates, side in zip(matrix.coords, matrix.shape, strict=True):
                if len(coordinates) and not (coordinates.min() >= 0 and coordinates.max() < side):
                    raise ValueError("index values must lie inside the shape")
        made = sp.csr_array(matrix, copy=True)
        made.check_format(full_check=True)
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise broken(error) from error
    made.sum_duplicates()
    if made.dtype.kind == "f" and not np.isfinite(made.data).all():
        at = int(np.flatnonzero(~np.isfinite(made.data))[0])
        row = int(np.searchsorted(made.indptr, at, side="right")) - 1
        raise refusal(path, str(made.data[at]), "finite numbers", f"row {row}, column {made.indices[at]}", "matrix")
    made.eliminate_zeros()
    return made


def refusal(path: PathLike | None, found: str, expected: str, where: str = "", name: str = "graph") -> Exception:
    """Return WrongContent for what a file holds, and ValueError for what an argument holds."""
    if path is not None:
        return WrongContent(path, found=found, expected=expected, where=where)
    return ValueError(f"{name} must be {expected}, got {found}" + (f" at {where}" if where else ""))
