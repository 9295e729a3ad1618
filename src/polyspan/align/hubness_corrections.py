"""Corrections of hubness that change the scores of a search, by banks of known vectors."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import numpy as np

from polyspan.linalg import Neighbours, top_k

from ._checks import check_count
from ._hubness_correction import HubnessCorrection, check_room
from ._score_blocks import ScoreBlocks, largest

__all__ = ["CSLS", "DualBankNormalization", "GalleryOffsets", "QueryBankNormalization"]

BETAS = (1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 14.0, 20.0, 28.0, 40.0, 60.0)
DUAL_BETAS = (0.5, 3.0, 10.0, 20.0)
NEAREST = (1, 2, 3, 5, 7, 10, 14, 20, 30, 50)


class GalleryOffsets(NamedTuple):
    """What a bank says of a gallery, to be kept beside its index.

    ``offsets`` (n,) are taken from each row's similarities after these are multiplied by ``weight``; ``active`` (n,)
    are the rows whose finding as first lets a query be corrected, or None where every query is.
    """

    weight: float
    offsets: np.ndarray
    active: np.ndarray | None


class _ScoreCorrection(HubnessCorrection):
    """A correction of scores: similarities times a weight, less an offset of each gallery row that its bank gives."""

    n_bank_gallery_: int
    n_bank_query_: int
    bank_gallery_: np.ndarray | None
    bank_query_: np.ndarray | None
    _kept: ClassVar[Sequence[str]]
    """The banks that the scores need."""
    _facts = ("n_features_in_", "n_bank_gallery_", "n_bank_query_")
    _arrays = ("bank_gallery_", "bank_query_")

    def fit(self, X, y=None, *, queries=None):
        """Keep the banks: ``X`` (a, d) of the gallery's kind and ``queries`` (b, d) of the queries' kind, unpaired.

        They should be other items than those to be searched, such as the training split; ``y`` is not used.

        Raises
        ------
        ValueError
            There is no bank of queries, a parameter is out of its range, widths differ, a value is not finite, or a row
            is all zero though directions are asked for.

        Warns
        -----
        UserWarning
            Both banks hold the same rows.
        """
        self._check_shared()
        X, queries = self._banks(X, queries)
        if queries is None:
            raise ValueError(f"queries must be given: {type(self).__name__} needs a bank of queries, got None")
        self.n_bank_gallery_, self.n_bank_query_ = len(X), len(queries)
        made = self._unit_copy(X, "X")  # what is not kept is looked at all the same
        self.bank_gallery_ = made if "gallery" in self._kept else None
        self.bank_query_ = self._unit_copy(queries, "queries")
        self._check_parameters()
        return self

    def measure_gallery(self, gallery) -> GalleryOffsets:
        """Return what the bank says of a ``gallery`` (n, d): once for all searches in it.

        An index of inner products can hold it too: with a weight w and offsets o, no ``active`` and unit rows g and
        queries q, the inner product of (g, -o / w) and (q, 1) ranks as the corrected scores do.

        Raises
        ------
        ValueError
            Widths differ, a value is not finite, or a row is all zero though directions are asked for.
        """
        self._check_fit()
        return self._measured(self._checked_rows(gallery, "gallery"), {})

    def score(self, queries, gallery, *, offsets: GalleryOffsets | None = None) -> np.ndarray:
        """Return the corrected scores of all pairs, (m, n): more is nearer; rows are made by blocks.

        Parameters
        ----------
        queries, gallery : arrays of shape (m, d) and (n, d)
        offsets : GalleryOffsets, optional
            What :meth:`measure_gallery` said of this gallery; measured anew where left out.

        Raises
        ------
        ValueError
            As in :meth:`measure_gallery`, or ``offsets`` are those of another gallery.
        """
        return self._blocks(queries, gallery, offsets).matrix()

    def retrieve(self, queries, gallery, k: int, *, offsets: GalleryOffsets | None = None) -> Neighbours:
        """Find the k best gallery rows of each query by corrected scores, never holding the matrix of all pairs.

        Raises
        ------
        ValueError
            As in :meth:`score`, or k is out of range.
        """
        blocks = self._blocks(queries, gallery, offsets)
        check_room(k, blocks.shape[1])
        return blocks.best(k)

    def rerank(self, queries, found: Neighbours, offsets: GalleryOffsets, *, k: int | None = None) -> Neighbours:
        """Order again what an index found: candidates and their similarities, best first, as a store returns them.

        A row that the index did not return cannot come up: ask it for some times as many as are wanted.

        Parameters
        ----------
        queries : array of shape (m, d)
        found : Neighbours
            ``indices`` (m, c) into the gallery that ``offsets`` is of, and ``scores`` (m, c): cosines, or inner
            products without ``normalize``.
        k : int, optional
            How many to keep; all c where left out.

        Raises
        ------
        ValueError
            Shapes do not match, an index is no row of the gallery, a score is not finite, or k is above c.
        """
        self._check_fit()
        queries = self._checked_rows(queries, "queries")
        indices, scores = np.asarray(found.indices), np.asarray(found.scores)
        if indices.ndim != 2 or indices.shape != scores.shape or len(indices) != len(queries):
            raise ValueError(
                f"found must hold indices and scores (m, c) of {len(queries)} queries, got {indices.shape} and "
                f"{scores.shape}"
            )
        n = len(offsets.offsets)
        if indices.dtype.kind not in "iu" or indices.min() < 0 or indices.max() >= n:
            raise ValueError(
                f"found must hold rows of the gallery, 0..{n - 1}, got {indices.dtype} from {indices.min()} to "
                f"{indices.max()}"
            )
        if not np.isfinite(scores).all():
            raise ValueError("found must hold finite scores, got NaN or infinity")
        k = indices.shape[1] if k is None else k
        check_room(k, indices.shape[1])
        made = scores * offsets.weight - offsets.offsets[indices]
        own = self._query_offsets(queries)
        if own is not None:
            made -= own[:, None]
        if offsets.active is not None:
            first = np.take_along_axis(indices, scores.argmax(axis=1)[:, None], axis=1)
            made = np.where(offsets.active[first], made, scores)
        values, places = largest(made.astype(np.result_type(scores.dtype, np.float32)), indices, k)
        return Neighbours(places, values)

    def _blocks(self, queries, gallery, offsets: GalleryOffsets | None) -> ScoreBlocks:
        self._check_fit()
        queries, gallery = self._checked_rows(queries, "queries"), self._checked_rows(gallery, "gallery")
        known = self._measured(gallery, {}) if offsets is None else offsets
        if len(known.offsets) != len(gallery):
            raise ValueError(f"offsets must be those of the gallery's {len(gallery)} rows, got {len(known.offsets)}")
        return self._scored(queries, gallery, known, self._query_offsets(queries))

    def _search(self, queries, gallery, k, shared):
        check_room(k, len(gallery))
        return self._scored(queries, gallery, self._measured(gallery, shared), None).best(k)

    def _scored(
        self, queries: np.ndarray, gallery: np.ndarray, known: GalleryOffsets, query_offsets: np.ndarray | None
    ) -> ScoreBlocks:
        options = {"normalize": bool(self.normalize), "block_rows": self.block_rows}
        active = None
        if known.active is not None:
            active = known.active[ScoreBlocks(queries, gallery, **options).best(1).indices[:, 0]]
        return ScoreBlocks(
            queries,
            gallery,
            weight=known.weight,
            offsets=known.offsets,
            query_offsets=query_offsets,
            active=active,
            **options,
        )

    def _measured(self, gallery: np.ndarray, shared: Mapping[tuple, Any]) -> GalleryOffsets:
        if self._is_off({}):
            return GalleryOffsets(1.0, np.zeros(len(gallery)), None)
        found = self._what_banks_say(gallery, shared)
        if not np.isfinite(found.offsets).all():
            row = int(np.argmin(np.isfinite(found.offsets)))
            raise ValueError(f"gallery must have finite products with the banks, got other ones at row {row}: scale it")
        return found

    @abstractmethod
    def _what_banks_say(self, gallery: np.ndarray, shared: Mapping[tuple, Any]) -> GalleryOffsets:
        """Return the weight, the offsets and the active rows of a gallery."""

    def _query_offsets(self, queries: np.ndarray) -> np.ndarray | None:
        """Return what is taken from all scores of a query (m,), or None: it changes no ranking."""
        return None

    def _log_mass(self, gallery: np.ndarray, side: str, beta: float, shared: Mapping[tuple, Any]) -> np.ndarray:
        key = ("mass", side, beta)
        return shared[key] if key in shared else self._log_masses(gallery, side, [beta])[0]

    def _log_masses(self, gallery: np.ndarray, side: str, betas: Sequence[float]) -> np.ndarray:
        """Logarithms of the sums over a bank of exp(beta s) by gallery row, (betas, n), a block of pairs at a time."""
        bank = getattr(self, f"bank_{side}_")
        found = np.empty((len(betas), len(gallery)))
        for start in range(0, len(gallery), self.block_rows):
            rows = slice(start, start + self.block_rows)
            G = self._unit(gallery[rows], "gallery", start)
            tops, masses = np.full((len(betas), len(G)), -np.inf), np.zeros((len(betas), len(G)))
            for first in range(0, len(bank), self.block_rows):
                with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is refused at the end
                    S = G @ bank[first : first + self.block_rows].T.astype(G.dtype, copy=False)
                    for i, beta in enumerate(betas):
                        T = S * S.dtype.type(beta)
                        top = np.maximum(tops[i], T.max(axis=1))
                        T -= top[:, None].astype(T.dtype)
                        masses[i] = masses[i] * np.exp(tops[i] - top) + np.exp(T, out=T).sum(axis=1, dtype=np.float64)
                        tops[i] = top
            found[:, rows] = tops + np.log(masses)
        return found

    def _nearest(self, rows: np.ndarray, name: str, side: str, n: int) -> np.ndarray:
        """Similarities of rows to their n nearest of a bank, (m, n), the nearest first, a block of pairs at a time."""
        bank = getattr(self, f"bank_{side}_")
        found = []
        for start in range(0, len(rows), self.block_rows):
            U = self._unit(rows[start : start + self.block_rows], name, start)
            found.append(top_k(U, bank, n, metric="dot", block_rows=self.block_rows).scores)
        return np.concatenate(found)


class _SoftmaxCorrection(_ScoreCorrection):
    """A correction by sums of exponentials over banks, of which several temperatures share the products of vectors."""

    @abstractmethod
    def _betas(self, params: Mapping[str, Any]) -> dict[str, float | None]:
        """Return the inverse temperature of each bank."""

    def _shared(self, gallery, settings):
        found = {}
        for side in self._kept:
            tried = (self._betas(self.get_params() | setting)[side] for setting in settings)
            betas = sorted({beta for beta in tried if beta is not None})
            masses = self._log_masses(gallery, side, betas) if betas else []
            found |= {("mass", side, beta): mass for beta, mass in zip(betas, masses, strict=True)}
        return found


class QueryBankNormalization(_SoftmaxCorrection):
    r"""Divide each gallery row's scores by what a bank of queries gives it: the inverted softmax, and its dynamic form.

    The published score is the ratio :math:`e^{\beta s(q,g)} / \sum_{b} e^{\beta s(b,g)}` over bank queries b; here it
    is its logarithm, which does not overflow:

    .. math:: \beta\, s(q, g) - \log \sum_b e^{\beta s(b, g)}.

    A row that many bank queries are near is a hub and loses most. The dynamic form corrects a query only where its
    nearest row is among the ``n_nearest`` of some bank query; the scores of the others stay similarities, so that
    scores compare within one query only. Where no bank query resembles the queries to come it can do harm; the dynamic
    form then does less.

    Source: Bogolin et al., "Cross Modal Retrieval with Querybank Normalisation"; the inverted softmax is Smith et
    al.'s, "Offline bilingual word vectors, orthogonal transformations and the inverted softmax". Catalogue entry
    ``invgc``.

    Parameters
    ----------
    beta : float or None, default=20.0
        Inverse temperature, above 0, in one over the unit of a similarity; None leaves scores as they are.
    n_nearest : int, default=1
        For the dynamic form: how many rows of each bank query are those that let a query be corrected.
    dynamic : bool, default=True
    normalize : bool, default=True
        Similarities are cosines; without it inner products, of rows as they are.
    block_rows : int, default=2048
        Rows of either side that are compared at once.

    Attributes
    ----------
    bank_query_ : ndarray of shape (b, d)
    n_bank_gallery_, n_bank_query_ : int
        Rows of the banks; that of the gallery's kind plays no part here.
    """

    _off: ClassVar[Mapping[str, Any]] = {"beta": None}
    _kept = ("query",)

    def __init__(self, beta=20.0, *, n_nearest=1, dynamic=True, normalize=True, block_rows=2048):
        self.beta = beta
        self.n_nearest = n_nearest
        self.dynamic = dynamic
        self.normalize = normalize
        self.block_rows = block_rows

    def _check_parameters(self) -> None:
        self._check_shared()
        check_beta("beta", self.beta)
        check_count("n_nearest", self.n_nearest)
        if not isinstance(self.dynamic, bool | np.bool_):
            raise ValueError(f"dynamic must be True or False, got {self.dynamic!r}")

    def _default_grid(self) -> list[dict[str, list]]:
        return [{"beta": [None, *BETAS]}]

    def _betas(self, params):
        return {"query": params["beta"]}

    def _shared(self, gallery, settings):
        found = super()._shared(gallery, settings)
        params = [self.get_params() | setting for setting in settings]
        nearest = {p["n_nearest"] for p in params if p["dynamic"] and p["beta"] is not None}
        return found | {("active", n): self._active(gallery, n) for n in nearest}

    def _what_banks_say(self, gallery, shared):
        offsets = self._log_mass(gallery, "query", self.beta, shared)
        if not self.dynamic:
            return GalleryOffsets(float(self.beta), offsets, None)
        key = ("active", self.n_nearest)
        active = shared[key] if key in shared else self._active(gallery, self.n_nearest)
        return GalleryOffsets(float(self.beta), offsets, active)

    def _active(self, gallery: np.ndarray, n: int) -> np.ndarray:
        """Return which gallery rows are among the n best of some bank query, (n_gallery,) bool."""
        assert self.bank_query_ is not None
        blocks = ScoreBlocks(self.bank_query_, gallery, normalize=bool(self.normalize), block_rows=self.block_rows)
        active = np.zeros(len(gallery), dtype=bool)
        active[blocks.best(min(n, len(gallery))).indices.ravel()] = True
        return active


class DualBankNormalization(_SoftmaxCorrection):
    r"""Divide each gallery row's scores by what two banks give it: one of queries, and one of its own kind.

    The published score is the product of two inverted softmaxes of the same similarity; here it is its logarithm:

    .. math:: (\beta_q + \beta_g)\, s(q, g) - \log \sum_{b} e^{\beta_q s(b, g)} - \log \sum_{c} e^{\beta_g s(c, g)}

    over bank queries b and bank gallery rows c. The authors' code reads the second bank for both sums; this is the
    formula as the article gives it. A bank that holds the gallery's own items takes most from those that have few like
    them: give other ones.

    Source: Wang, Jian & Xue, "Balance Act: Mitigating Hubness in Cross-Modal Retrieval with Query and Gallery Banks".
    Catalogue entry ``invgc``.

    Parameters
    ----------
    beta_query : float or None, default=1 / 1.99
    beta_gallery : float or None, default=3.0
        Inverse temperatures above 0; None leaves that bank out, and both None leave scores as they are.
    normalize : bool, default=True
        Similarities are cosines; without it inner products, of rows as they are.
    block_rows : int, default=2048
        Rows of either side that are compared at once.

    Attributes
    ----------
    bank_gallery_, bank_query_ : ndarray of shape (a, d) and (b, d)
    n_bank_gallery_, n_bank_query_ : int
    """

    _off: ClassVar[Mapping[str, Any]] = {"beta_query": None, "beta_gallery": None}
    _kept = ("gallery", "query")

    def __init__(self, beta_query=1 / 1.99, beta_gallery=3.0, *, normalize=True, block_rows=2048):
        self.beta_query = beta_query
        self.beta_gallery = beta_gallery
        self.normalize = normalize
        self.block_rows = block_rows

    def _check_parameters(self) -> None:
        self._check_shared()
        check_beta("beta_query", self.beta_query)
        check_beta("beta_gallery", self.beta_gallery)

    def _default_grid(self) -> list[dict[str, list]]:
        return [{"beta_query": [None, *DUAL_BETAS], "beta_gallery": [None, *DUAL_BETAS]}]

    def _betas(self, params):
        return {"query": params["beta_query"], "gallery": params["beta_gallery"]}

    def _what_banks_say(self, gallery, shared):
        weight, offsets = 0.0, np.zeros(len(gallery))
        for side, beta in self._betas(self.get_params()).items():
            if beta is not None:
                weight += beta
                offsets = offsets + self._log_mass(gallery, side, beta, shared)
        return GalleryOffsets(weight, offsets, None)


class CSLS(_ScoreCorrection):
    r"""Cross-domain similarity local scaling: a similarity less how near both sides are to others.

    .. math:: 2\, s(q, g) - r(g) - r(q),

    r(g) the mean similarity of a gallery row to its k nearest bank queries, r(q) that of a query to its k nearest rows
    of the gallery's bank. A hub is near many queries and has a large r(g). r(q) is the same for all rows of a query:
    it orders pairs of different queries, and no list of one.

    Source: Conneau, Lample, Ranzato, Denoyer & Jégou, "Word translation without parallel data". Catalogue entry
    ``invgc``.

    Parameters
    ----------
    n_neighbors : int or None, default=10
        k, at most the rows of the smaller bank; None leaves scores as they are.
    normalize : bool, default=True
        Similarities are cosines; without it inner products, of rows as they are.
    block_rows : int, default=2048
        Rows of either side that are compared at once.

    Attributes
    ----------
    bank_gallery_, bank_query_ : ndarray of shape (a, d) and (b, d)
    n_bank_gallery_, n_bank_query_ : int
    """

    _off: ClassVar[Mapping[str, Any]] = {"n_neighbors": None}
    _kept = ("gallery", "query")

    def __init__(self, n_neighbors=10, *, normalize=True, block_rows=2048):
        self.n_neighbors = n_neighbors
        self.normalize = normalize
        self.block_rows = block_rows

    def _check_parameters(self) -> None:
        self._check_shared()
        if self.n_neighbors is None:
            return
        check_count("n_neighbors", self.n_neighbors)
        if hasattr(self, "n_bank_query_") and self.n_neighbors > self._room():
            raise ValueError(
                f"n_neighbors must be at most the rows of the smaller bank, n_samples={self._room()}, got "
                f"{self.n_neighbors}"
            )

    def _room(self) -> int:
        return min(self.n_bank_query_, self.n_bank_gallery_)

    def _default_grid(self) -> list[dict[str, list]]:
        return [{"n_neighbors": [None, *(n for n in NEAREST if n <= self._room())]}]

    def _shared(self, gallery, settings):
        most = max((self.get_params() | setting)["n_neighbors"] or 0 for setting in settings)
        return {("near",): self._nearest(gallery, "gallery", "query", most)} if most else {}

    def _what_banks_say(self, gallery, shared):
        known = shared.get(("near",))
        near = self._nearest(gallery, "gallery", "query", self.n_neighbors) if known is None else known
        return GalleryOffsets(2.0, near[:, : self.n_neighbors].mean(axis=1, dtype=np.float64), None)

    def _query_offsets(self, queries):
        if self.n_neighbors is None:
            return None
        near = self._nearest(queries, "queries", "gallery", self.n_neighbors)
        return near.mean(axis=1, dtype=np.float64)


def check_beta(name: str, beta: Any) -> None:
    """Refuse what is no inverse temperature."""
    if beta is None:
        return
    if isinstance(beta, bool | np.bool_) or not isinstance(beta, Real) or not np.isfinite(beta) or beta <= 0:
        raise ValueError(f"{name} must be finite and above 0, or None, got {beta!r}")
