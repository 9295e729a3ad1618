"""What a file holds, or the first thing that is wrong with it."""

from pathlib import Path
from typing import Any

import numpy as np

from polyspan.errors import FileError

from . import _tables
from ._door import PathLike, file_size, refuse_pickled_suffix
from ._edge_lists import EDGE_TEXTS
from ._mat import CLASSES, mat_variables
from ._row_streams import HDF5, WORD_BINARIES, is_word_binary
from ._slabs import Slab, npy_slab, npz_slabs, tensor_slabs
from .arrays import FVECS, check_finite, read_array, read_members
from .embeddings import EmbeddingReader
from .fitted import load_fitted
from .graphs import read_graph
from .idx import read_idx
from .text import read_csv, read_json, read_jsonl, read_toml


def inspect_file(path: PathLike) -> dict[str, Any]:
    """Return what a file holds, read in full, for a person to look at.

    A file that cannot be used gives ``error`` (one of the five kinds), ``found``, ``expected`` and ``where`` instead;
    nothing is raised for it. Values are JSON types.
    """
    report: dict[str, Any] = {"path": str(path)}
    try:
        report["bytes"] = file_size(path)
        if not is_word_binary(path):
            refuse_pickled_suffix(path)
        report.update(_describe(Path(path)))
        report["usable"] = True
    except FileError as error:
        report.update(
            usable=False, error=type(error).__name__, found=error.found, expected=error.expected, where=error.where
        )
    return report


def _describe(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        slab = npy_slab(path)
        array = read_array(path, ndim=None)
        return {"holds": "an array", **_slab_facts(slab), **_row_facts(array)}
    if suffix in (".npz", ".safetensors"):
        return _describe_members(path, suffix)
    if suffix in _tables.TABLES:
        return _describe_table(path)
    if suffix in (*FVECS, *HDF5, *WORD_BINARIES, ".vec", ".glove"):
        reader = EmbeddingReader(path)
        for _ in reader.batches():
            pass
        return {"holds": "vectors", "rows": reader.n_rows, "dim": reader.dim, "dtype": reader.stored_dtype}
    if suffix == ".mat":
        facts = {name: f"{CLASSES[v.kind]} {v.shape}" for name, v in mat_variables(path)[1].items()}
        read_members(path)
        return {
            "holds": "MATLAB variables",
            **{f"variable {k}": v for k, v in facts.items()},
        }
    readers = {".json": read_json, ".toml": read_toml, ".jsonl": _count_lines}
    if suffix in readers:
        found = readers[suffix](path)
        size = {"entries": len(found)} if isinstance(found, dict | list) else {}
        return {"holds": f"{suffix[1:].upper()}", **size, **({"lines": found} if suffix == ".jsonl" else {})}
    if ("idx" in path.name and suffix in (".gz", "")) or suffix == ".idx" or path.name.endswith("-ubyte"):
        array = read_idx(path)
        return {"holds": "an IDX array", "shape": list(array.shape), "dtype": str(array.dtype)}
    if suffix in EDGE_TEXTS:
        return _describe_text(path)
    read_array(path)
    return {}


def _count_lines(path: Path) -> int:
    return sum(1 for _ in read_jsonl(path))


def _slab_facts(slab: Slab) -> dict[str, Any]:
    return {"shape": list(slab.shape), "dtype": slab.stored, "order": "columns" if slab.fortran else "rows"}


def _row_facts(array: np.ndarray) -> dict[str, Any]:
    """Return what decides how vectors are compared: are the rows of length 1, is one of them zero?"""
    if array.ndim != 2 or array.dtype.kind != "f" or array.size == 0:
        return {}
    rows = array[: 2**16].astype(np.float64)
    scale = np.abs(rows).max() or 1.0
    norms = np.linalg.norm(rows / scale, axis=1) * scale
    unit = bool(np.allclose(norms, 1.0, atol=1e-3))
    return {"unit rows": unit, "zero rows": int((norms == 0).sum()), "longest row": float(norms.max())}


def _describe_members(path: Path, suffix: str) -> dict[str, Any]:
    if suffix == ".safetensors":
        slabs, metadata = tensor_slabs(path, refuse_types=False)
        if '"kind"' in metadata.get("polyspan", ""):
            found = load_fitted(path)
            facts = {f"tensor {k}": f"{v.dtype} {v.shape}" for k, v in found.arrays.items()}
            return {"holds": f"a fitted {found.kind}", "versions": found.header["versions"], **facts}
    else:
        slabs = npz_slabs(path, None, None)
        if "indptr" in slabs or ("row" in slabs and "col" in slabs):
            return _describe_graph(path)
    for name, array in read_members(path).items():
        check_finite(path, array)
        del name
    return {"holds": "named arrays", **{f"member {k}": f"{s.stored} {s.shape}" for k, s in slabs.items()}}


def _describe_table(path: Path) -> dict[str, Any]:
    with _tables.open_table(path) as table:
        columns = {f"column {field.name}": str(field.type) for field in table.schema}
        rows = table.n_rows
    reader = EmbeddingReader(path)
    for _ in reader.batches():
        pass
    return {"holds": "a table of vectors", "rows": rows, "dim": reader.dim, **columns}


def _describe_graph(path: Path) -> dict[str, Any]:
    graph = read_graph(path, symmetrize="max")
    A = graph.adjacency
    return {
        "holds": "a graph",
        "nodes": A.shape[0],
        "edges": int((A.nnz + np.count_nonzero(A.diagonal())) // 2),
        "self loops": int(np.count_nonzero(A.diagonal())),
        "isolated nodes": int(np.count_nonzero(np.diff(A.indptr) == 0)),
    }


def _describe_text(path: Path) -> dict[str, Any]:
    if path.suffix.lower() in (".csv", ".tsv"):
        try:
            array = read_array(path)
        except FileError:
            table = read_csv(path)
            return {"holds": "a table of text", "rows": len(next(iter(table.values()))), "columns": list(table)}
        if array.shape[1] > 3:
            return {"holds": "an array", "shape": list(array.shape), **_row_facts(array)}
    return _describe_graph(path)
