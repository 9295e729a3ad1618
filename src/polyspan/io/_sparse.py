"""Sparse matrices whose indices nobody has checked, made safe to multiply."""

from typing import Any

import numpy as np
import scipy.sparse as sp

from polyspan.errors import CorruptFile, WrongContent

from ._door import PathLike, check_budget
from ._slabs import check_numbers, npz_slabs


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


def read_npz_sparse(path: PathLike, there: list[str], prefix: str, max_bytes: int | None) -> Any:
    """Return the sparse matrix whose parts are members of a .npz file, with the checks that SciPy leaves out."""
    parts = {"data", "shape"} | ({"indices", "indptr"} if prefix + "indptr" in there else {"row", "col"})
    if prefix + "offsets" in there:
        parts = {"data", "shape", "offsets"}
    missing = sorted(prefix + part for part in parts if prefix + part not in there)
    if missing:
        raise WrongContent(
            path, found=f"no member {missing[0]!r} among {', '.join(sorted(there)[:20])}",
            expected="a matrix of scipy.sparse.save_npz",
        )  # fmt: skip
    slabs = npz_slabs(path, [prefix + part for part in sorted(parts)], max_bytes)
    arrays = {}
    for name, slab in slabs.items():
        part = name.removeprefix(prefix)
        check_numbers(slab, booleans=part == "data")
        if part != "data" and (slab.dtype.kind not in "iu" or len(slab.shape) != 1):
            raise WrongContent(
                path, found=f"{slab.dtype} {slab.shape}", expected="1-d integers", where=f"member {name}"
            )
        arrays[part] = slab.read(max_bytes).astype(slab.dtype.newbyteorder("="), copy=False)
    kind = _npz_format(path, there, prefix, parts)
    shape = tuple(int(side) for side in arrays["shape"])
    if len(shape) != 2 or min(shape) < 0:
        raise WrongContent(path, found=f"shape {shape}", expected="two sides", where=f"member {prefix}shape")
    if max(shape) > 2**40:
        raise CorruptFile(path, found=f"shape {shape}", expected="sides that fit", where=f"member {prefix}shape")
    return _assemble(path, kind, shape, arrays)


def _assemble(path: PathLike, kind: str, shape: Any, arrays: dict[str, Any]) -> Any:
    data = arrays["data"]
    try:
        if kind == "coo":
            made = sp.coo_array((data, (arrays["row"], arrays["col"])), shape=shape)
        elif kind == "dia":
            made = sp.dia_array((data, arrays["offsets"]), shape=shape)
        else:
            indices, indptr = (arrays[part].astype(np.int64, copy=False) for part in ("indices", "indptr"))
            # A side larger than the pointers is refused by SciPy before it allocates.
            makers: dict[str, Any] = {"csr": sp.csr_array, "csc": sp.csc_array, "bsr": sp.bsr_array}
            made = makers[kind]((data, indices, indptr), shape=shape)
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise CorruptFile(path, found=str(error), expected="valid sparse indices") from error
    return made


def _npz_format(path: PathLike, there: list[str], prefix: str, parts: set[str]) -> str:
    """Return the sparse format that a file names, as far as it agrees with the members."""
    usual = "dia" if "offsets" in parts else ("csr" if "indptr" in parts else "coo")
    if prefix + "format" not in there:
        return usual
    slab = npz_slabs(path, [prefix + "format"], None)[prefix + "format"]
    if slab.dtype.kind not in "SU" or slab.shape != () or slab.nbytes > 64:
        raise WrongContent(path, found=f"format of dtype {slab.dtype}", expected="csr, csc, coo, bsr or dia")
    value = slab.read(None)[()]
    name = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
    allowed = {"csr": ("csr", "csc", "bsr"), "coo": ("coo",), "dia": ("dia",)}[usual]
    if name not in allowed:
        raise WrongContent(path, found=f"format {name!r}", expected=" or ".join(allowed), where="member format")
    return name
