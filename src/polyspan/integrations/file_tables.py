"""Files of vectors and FAISS indexes as stores that can be upgraded: the new file is made beside the old one."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.errors import UnreadableFile, WrongContent, require
from polyspan.io import (
    EmbeddingReader,
    atomic_path,
    digest_array,
    read_array,
    replace_vectors,
    text_batches,
    vector_member,
)

from ._swapped_file import SwappedFile
from .vector_tables import BATCH_ROWS, TableBatch, TableFacts, check_finite_rows

FAISS_FILES = (".faiss", ".index")
WRITABLE = (".npy", ".npz", ".safetensors", ".parquet", ".pq", ".arrow", ".feather", ".ipc", ".fvecs")
STORED = ("float16", "float32", "float64")


class FileTable(SwappedFile):
    """A file of vectors, (n, d), as a store; keys are row numbers.

    Of tables all other columns are kept, of ``.npz`` and ``.safetensors`` all other arrays, byte by byte. Next vectors
    have the stored float width of the old ones, or float32 where these were integers.

    Parameters
    ----------
    path : path-like
        ``.npy``, ``.npz``, ``.safetensors``, ``.parquet``, ``.arrow``, ``.feather`` or ``.fvecs``.
    column, id_column, text_column : str, optional
        Of a table: vectors, ids, and the text that was embedded.
    member : str, optional
        Which array of ``.npz`` or ``.safetensors``; left out, the only one of floats with two dimensions.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        column: str | None = None,
        id_column: str | None = None,
        text_column: str | None = None,
        member: str | None = None,
    ):
        super().__init__(path)
        if self.path.suffix.lower() in (".bvecs", ".ivecs"):
            raise WrongContent(path, found="whole numbers", expected="a store whose vectors may become floats")
        if member is None and self.path.suffix.lower() in (".npz", ".safetensors"):
            member = vector_member(self.path)
        self._given: dict[str, Any] = {"column": column, "member": member, "id_column": id_column}
        self.text_column = text_column
        self.reader = EmbeddingReader(self.path, **self._given)
        if self.path.suffix.lower() not in WRITABLE:
            found = f"suffix {self.path.suffix.lower()!r}"
            raise WrongContent(path, found=found, expected=f"one that can be written anew: {', '.join(WRITABLE)}")
        if text_column is not None:
            # Said now, and not when the first text is needed.
            next(text_batches(self.path, text_column, batch_rows=1))

    def _content(self, path: Path) -> str:
        facts = EmbeddingReader(path, **self._given).fingerprint()
        return f"{facts['ends_sha256']}:{facts['bytes']}"

    def _size(self) -> tuple[int, int, str]:
        stored = self.reader.stored_dtype
        kept = stored if stored in STORED and self.path.suffix.lower() != ".fvecs" else "float32"
        return self.reader.n_rows, self.reader.dim, kept

    def facts(self) -> TableFacts:
        """Look at the file; no metric is known of it."""
        self.reader = EmbeddingReader(self.path, **self._given)
        return self._common(metric=None, exact=True, unit=False)

    def _source(self, batch_rows: int, start: int = 0) -> Iterator[TableBatch]:
        reader = EmbeddingReader(self.path, **self._given, batch_rows=batch_rows)
        texts = None
        if self.text_column is not None:
            texts = text_batches(self.path, self.text_column, batch_rows=batch_rows, start=start)
        with contextlib.closing(reader.batches(start)) as batches:
            for batch in batches:
                keys = np.arange(batch.start, batch.start + len(batch.rows))
                yield TableBatch(keys, batch.rows, None if texts is None else next(texts), batch.ids)

    def _build(self, rows: Path) -> None:
        replace_vectors(self.path, self.next, rows, column=self._given["column"], member=self._given["member"])

    def pairs(self, batch_rows: int = BATCH_ROWS) -> Iterator[tuple[TableBatch, np.ndarray]]:
        """Yield every row in use with its next vector, from the file that will take the place."""
        self._check_sealed()
        place = {"column": self.reader.column, "member": self._given["member"]}
        new = EmbeddingReader(self.next, **place, batch_rows=batch_rows)
        with contextlib.closing(new.batches()) as batches:
            for old, made in zip(self._source(batch_rows), batches, strict=True):
                yield old, made.rows


class FaissTable(SwappedFile):
    """A FAISS index as a store; keys are positions.

    Of flat, IVF-flat or HNSW-flat kind: the new index is of the same kind with the same parameters, trained on the new
    vectors; ids are kept. An index of codes (PQ, SQ, ...) gives its vectors back approximately; it can be looked at,
    planned for and stamped, but not written anew: there, carry the queries, see :func:`wrap_queries`.

    Attributes
    ----------
    rewritable : bool
        Whether the index holds whole vectors.
    affine_queries : bool
        True: only affine maps go in front of an index.
    """

    affine_queries = True

    def __init__(self, path: Path | str):
        super().__init__(path)
        self._load()

    def _load(self) -> None:
        faiss = _faiss()
        self.index = read_index(self.path)
        self._whole, (self._inner, self.ids) = faiss.downcast_index(self.index), _inner(self.index, self.path)
        self.rewritable = isinstance(self._inner, faiss.IndexIVFFlat | faiss.IndexFlat | faiss.IndexHNSWFlat)

    def prepare(self, dim: int, space: Mapping[str, Any], work: Mapping[str, Any]) -> None:
        """Make room for the next vectors; see :class:`VectorTable`."""
        if not self.rewritable:
            raise ValueError(
                f"the index must hold whole vectors (flat, IVF flat, HNSW flat), got {_kind(self._inner)}; "
                "carry the queries to it instead, by strategy query or polyspan.integrations.wrap_queries"
            )
        lists = getattr(self._inner, "nlist", 0)
        if lists > self._inner.ntotal:
            raise ValueError(
                f"{self.path} must hold a vector for each of its {lists} lists, made anew of the next vectors, "
                f"got {self._inner.ntotal}; carry the queries to it instead, by strategy query"
            )
        super().prepare(dim, space, work)

    def _content(self, path: Path) -> str:
        inner, _ = _inner(self.index if path == self.path else read_index(path), path)
        n = min(inner.ntotal, 1000)
        ends = np.vstack([_vectors(inner, 0, n), _vectors(inner, inner.ntotal - n, n)])
        return f"{digest_array(ends)}:{inner.ntotal}"

    def _size(self) -> tuple[int, int, str]:
        return self._inner.ntotal, self._inner.d, "float32"

    def facts(self) -> TableFacts:
        """Look at the index, as it is on the disk now."""
        self._load()
        faiss = _faiss()
        metric = {faiss.METRIC_INNER_PRODUCT: "dot", faiss.METRIC_L2: "l2"}.get(self._inner.metric_type)
        return self._common(metric=metric, exact=self.rewritable, unit=False)

    def _source(self, batch_rows: int, start: int = 0) -> Iterator[TableBatch]:
        for first in range(start, self._inner.ntotal, batch_rows):
            n = min(batch_rows, self._inner.ntotal - first)
            keys, rows = np.arange(first, first + n), _vectors(self._inner, first, n)
            ids = None if self.ids is None else self.ids[first : first + n]
            check_finite_rows(self.path, keys if ids is None else ids, rows)
            yield TableBatch(keys, rows, ids=ids)

    def _build(self, rows: Path) -> None:
        vectors = read_array(rows, mmap=True)
        made = _same_kind(self._inner, vectors.shape[1])
        if not made.is_trained:
            picked = np.sort(np.random.default_rng(0).permutation(len(vectors))[: 256 * made.nlist])
            made.train(np.ascontiguousarray(vectors[picked]))
        if isinstance(self._whole, _faiss().IndexIDMap):
            made = type(self._whole)(made)
        for first in range(0, len(vectors), BATCH_ROWS):
            batch = np.ascontiguousarray(vectors[first : first + BATCH_ROWS])
            if self.ids is None:
                made.add(batch)
            else:
                made.add_with_ids(batch, self.ids[first : first + BATCH_ROWS])
        write_index(self.next, made)

    def pairs(self, batch_rows: int = BATCH_ROWS) -> Iterator[tuple[TableBatch, np.ndarray]]:
        """Yield every row in use with its next vector, from the index that will take the place."""
        self._check_sealed()
        new, ids = _inner(read_index(self.next), self.next)
        if new.ntotal != self._inner.ntotal or not np.array_equal(
            np.empty(0) if ids is None else ids, np.empty(0) if self.ids is None else self.ids
        ):
            raise WrongContent(self.next, found="other rows or ids", expected=f"those of {self.path}")
        for batch in self._source(batch_rows):
            yield batch, _vectors(new, int(batch.keys[0]), len(batch.keys))

    def switch(self, verb: str) -> None:
        """Cut over, roll back or forget; see :class:`VectorTable`."""
        super().switch(verb)
        self._load()


def _faiss() -> Any:
    return require("faiss", extra="vectors", purpose="a FAISS index")


def read_index(path: Path | str) -> Any:
    """Read a FAISS index; what FAISS cannot read is ``WrongContent``."""
    try:
        return _faiss().read_index(str(path))
    except RuntimeError as error:
        raise WrongContent(path, found=_reason(error), expected="a whole FAISS index") from error


def write_index(path: Path | str, index: Any) -> None:
    """Write a FAISS index atomically."""
    with atomic_path(path) as temp:
        try:
            _faiss().write_index(index, str(temp))
        except RuntimeError as error:
            raise UnreadableFile(path, found=_reason(error), expected="a place that can be written to") from error


def _reason(error: RuntimeError) -> str:
    """Return what FAISS says, without the place in its source, which it says first."""
    said = re.sub(r"^Error in .*? at \S+:\d+: (Error: )?('.*?' failed: )?", "", str(error).strip().splitlines()[0])
    return said[:200]


def _inner(index: Any, path: Path) -> tuple[Any, np.ndarray | None]:
    """Return the index that holds the vectors, made ready to give them back, and the ids, if it has its own."""
    faiss = _faiss()
    whole = index
    index = faiss.downcast_index(index)
    ids = None
    if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
        ids = faiss.vector_to_array(index.id_map).copy()
        index = faiss.downcast_index(index.index)
    refused = WrongContent(
        path,
        found=f"{_kind(index)}, which gives no vectors back",
        expected="flat, IVF or HNSW, or codes that can be read; polyspan.integrations.wrap_queries takes any index",
    )
    held = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if isinstance(held, faiss.IndexIVF):
        # The lists of other kinds are packed: to ask these for their ids can end the process.
        if not isinstance(held, faiss.IndexIVFFlat | faiss.IndexIVFPQ | faiss.IndexIVFScalarQuantizer):
            raise refused
        own = _number_rows(held)
        ids = own if ids is None else ids
        held.make_direct_map()
    try:
        _vectors(index, 0, min(index.ntotal, 1))
    except RuntimeError as error:
        raise refused from error
    index.referenced_objects = [whole]  # what owns the memory must outlive this view of it
    return index, ids


def _kind(index: Any) -> str:
    """Return the name of an index's kind, with what it stands in front of."""
    faiss, name = _faiss(), type(index).__name__
    return f"{name} of {_kind(faiss.downcast_index(index.index))}" if name == "IndexPreTransform" else name


def _number_rows(index: Any) -> np.ndarray | None:
    """Give the rows of an IVF index in memory the numbers 0 to n - 1 in the order of their ids; return these (n,).

    FAISS gives vectors back by such numbers alone. None where the ids are these numbers already.
    """
    faiss, lists = _faiss(), index.invlists
    held = [faiss.rev_swig_ptr(lists.get_ids(i), n) for i in range(index.nlist) if (n := lists.list_size(i))]
    ids = np.concatenate(held) if held else np.empty(0, np.int64)
    order = np.argsort(ids, kind="stable")
    if np.array_equal(ids[order], np.arange(len(ids))):
        return None
    numbers = np.empty(len(ids), np.int64)
    numbers[order] = np.arange(len(ids))
    for view, part in zip(held, np.split(numbers, np.cumsum([len(view) for view in held])[:-1]), strict=True):
        view[:] = part
    return ids[order]


def _vectors(index: Any, first: int, n: int) -> np.ndarray:
    return index.reconstruct_n(int(first), int(n)) if n else np.empty((0, index.d), np.float32)


def _same_kind(old: Any, dim: int) -> Any:
    """Return an empty index of the kind of ``old`` for another width."""
    faiss = _faiss()
    if isinstance(old, faiss.IndexIVFFlat):
        quantizer = faiss.IndexFlat(dim, old.metric_type)
        made = faiss.IndexIVFFlat(quantizer, dim, old.nlist, old.metric_type)
        made.nprobe = old.nprobe
        made.own_fields = True
        quantizer.this.disown()
        return made
    if isinstance(old, faiss.IndexHNSWFlat):
        made = faiss.IndexHNSWFlat(dim, old.hnsw.nb_neighbors(1), old.metric_type)
        made.hnsw.efConstruction, made.hnsw.efSearch = old.hnsw.efConstruction, old.hnsw.efSearch
        return made
    return faiss.IndexFlat(dim, old.metric_type)


def wrap_queries(index: Path | str, aligner: Any, out: Path | str) -> None:
    r"""Write an index that takes queries of the new model and searches the old vectors; nothing else is copied.

    The map becomes FAISS's own :math:`q \mapsto Aq + b` in front of the index, whatever that is.

    Parameters
    ----------
    index : path-like
        The old index, of any kind; it is not changed.
    aligner : fitted aligner
        From the new space to the old one; affine on rows, or on unit rows (``normalize=True``).
    out : path-like

    Raises
    ------
    ValueError
        Widths differ, or the map is not affine.
    """
    faiss = _faiss()
    old = read_index(index)
    d_in, d_out = aligner.n_features_in_, aligner._n_features_out
    if d_out != old.d:
        raise ValueError(f"aligner must map to the index's {old.d} dimensions, got {d_out}")
    unit, basis = bool(aligner.normalize), np.eye(d_in)
    plus, minus = (np.asarray(aligner.transform(sign * basis), dtype=np.float64) for sign in (1, -1))
    b = (plus + minus).mean(axis=0) / 2
    A = (plus - minus) / 2
    probe = np.random.default_rng(0).normal(size=(64, d_in))
    rows = probe / np.linalg.norm(probe, axis=1, keepdims=True) if unit else probe
    if not np.allclose(rows @ A + b, aligner.transform(probe), rtol=1e-6, atol=1e-6):
        raise ValueError(f"aligner must be an affine map of rows, got a {type(aligner).__name__} that is none")
    linear = faiss.LinearTransform(d_in, d_out, True)
    faiss.copy_array_to_vector(np.ascontiguousarray(A.T, dtype=np.float32).ravel(), linear.A)
    faiss.copy_array_to_vector(b.astype(np.float32), linear.b)
    linear.is_trained = True
    wrapped = faiss.IndexPreTransform(linear, old)
    if unit:
        wrapped.prepend_transform(faiss.NormalizationTransform(d_in, 2.0))
    write_index(out, wrapped)
