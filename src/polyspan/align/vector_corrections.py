"""Corrections of hubness that change vectors: less their bank's mean, less its principal directions."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import validate_data

from polyspan.linalg import Neighbours, PairedMoments

from ._checks import check_count, check_kind
from ._hubness import FLOATS, unit_rows
from ._hubness_correction import HubnessCorrection, check_room
from ._score_blocks import ScoreBlocks

__all__ = ["AllButTheTop", "Centering"]

SIDES = ("both", "gallery", None)


class _VectorCorrection(ClassNamePrefixFeaturesOutMixin, TransformerMixin, HubnessCorrection):
    """A correction of vectors: less the mean of their side's bank, less some of its principal directions."""

    sides: str | None
    mean_gallery_: np.ndarray
    mean_query_: np.ndarray | None
    directions_gallery_: np.ndarray
    directions_query_: np.ndarray | None
    n_bank_gallery_: int
    n_bank_query_: int
    _spectral: ClassVar[bool]
    """Whether directions are taken out too."""
    _off: ClassVar[Mapping[str, Any]] = {"sides": None}
    _facts = ("n_features_in_", "_n_features_out", "n_bank_gallery_", "n_bank_query_")
    _arrays = ("mean_gallery_", "mean_query_", "directions_gallery_", "directions_query_")

    def fit(self, X, y=None, *, queries=None):
        """Learn the banks: ``X`` (a, d) of the gallery's kind and ``queries`` (b, d) of the queries' kind, unpaired.

        They should be other items than those to be corrected, such as the training split; ``y`` is not used. Without
        ``queries`` only a gallery can be corrected.

        Raises
        ------
        ValueError
            A parameter is out of its range, widths differ, a value is not finite, or a row is all zero though
            directions are asked for.

        Warns
        -----
        UserWarning
            Both banks hold the same rows.
        """
        self._check_shared()
        X, queries = self._banks(X, queries)
        self._n_features_out = X.shape[1]
        for side, bank, name in (("gallery", X, "X"), ("query", queries, "queries")):
            mean = directions = None
            if bank is not None:
                moments = PairedMoments(X.shape[1], keep_cov_in=self._spectral)
                for start in range(0, len(bank), self.block_rows):
                    moments.update(self._unit(bank[start : start + self.block_rows], name, start))
                mean, directions = moments.mean_in.copy(), self._principal(moments)
            setattr(self, f"mean_{side}_", mean)
            setattr(self, f"directions_{side}_", directions)
            setattr(self, f"n_bank_{side}_", 0 if bank is None else len(bank))
        self._check_parameters()
        return self

    def transform(self, X) -> np.ndarray:
        """Return the corrected gallery (n, d), unit rows, in the width of ``X``; float64 for float16 and integers.

        Raises
        ------
        ValueError
            A row is all zero, or nothing of it is left.
        """
        self._check_fit()
        check_kind(X, "X")
        X = validate_data(self, X, reset=False, dtype=FLOATS)
        return self._corrected(X, "X", "gallery")

    def transform_queries(self, queries) -> np.ndarray:
        """Return queries (m, d) as they are to search the corrected gallery: with ``sides="gallery"`` scaled only.

        Raises
        ------
        ValueError
            As in :meth:`transform`, or queries are to be corrected and there was no bank of them.
        """
        self._check_fit()
        return self._corrected(self._checked_rows(queries, "queries"), "queries", "query")

    def retrieve(self, queries, gallery, k: int) -> Neighbours:
        """Find the k best gallery rows of each query, both corrected, by cosine; without ``normalize`` inner product.

        Raises
        ------
        ValueError
            As in :meth:`transform` and :meth:`transform_queries`, or k is out of range.
        """
        self._check_fit()
        queries, gallery = self._checked_rows(queries, "queries"), self._checked_rows(gallery, "gallery")
        return self._search(queries, gallery, k, {})

    def _search(self, queries, gallery, k, shared):
        check_room(k, len(gallery))
        asked = self._corrected(queries, "queries", "query")
        made = self._corrected(gallery, "gallery", "gallery")
        return ScoreBlocks(asked, made, normalize=bool(self.normalize), block_rows=self.block_rows).best(k)

    def _principal(self, moments: PairedMoments) -> np.ndarray:
        """Return the principal directions that a bank spans about its mean, (r, d), the strongest first."""
        if not self._spectral:
            return np.zeros((0, len(moments.mean_in)))
        values, vectors = np.linalg.eigh(moments.cov_in / moments.weight)
        # The mean's own length bounds what rounding leaves where rows are all equal.
        size = float(values[-1]) + float(moments.mean_in @ moments.mean_in)
        spanned = values > len(values) * np.finfo(np.float64).eps * size
        return np.ascontiguousarray(vectors[:, spanned][:, ::-1].T)

    def _known_sides(self) -> list[str | None]:
        return [side for side in SIDES if side != "both" or self.mean_query_ is not None]

    @abstractmethod
    def _n_taken(self) -> int:
        """Return how many directions are taken out."""

    def _check_parameters(self) -> None:
        self._check_shared()
        if self.sides not in SIDES:
            raise ValueError(f"sides must be 'both', 'gallery' or None, got {self.sides!r}")

    def _corrected(self, X: np.ndarray, name: str, side: str) -> np.ndarray:
        taken = self.sides == "both" or (self.sides == "gallery" and side == "gallery")
        mean, directions = getattr(self, f"mean_{side}_"), getattr(self, f"directions_{side}_")
        if taken and mean is None:
            raise ValueError("queries must be given to fit for sides='both', got no bank of queries")
        out = np.empty(X.shape, X.dtype)
        for start in range(0, len(X), self.block_rows):
            rows = slice(start, start + self.block_rows)
            U = self._unit(X[rows], name, start)
            if taken:
                V = directions[: self._n_taken()].astype(U.dtype)
                U = U - mean.astype(U.dtype)
                U -= (U @ V.T) @ V
                if self.normalize:
                    U = unit_rows(U, name, start, made=True, advice="what the bank is made of is all of that row")
            out[rows] = U
        return out

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class Centering(_VectorCorrection):
    r"""Take the mean of a bank from vectors, of each side's own bank, and scale them to length 1 again.

    The plainest cure of a cone: what all vectors share tells none from another, and a hub is often a row with more of
    it than others. Unlike a map between the two sides it needs no pairs.

    Source: catalogue entry ``invgc``.

    Parameters
    ----------
    sides : {"both", "gallery", None}, default="both"
        Which vectors are corrected; None leaves all as they are, scaled to length 1. Read at each use.
    normalize : bool, default=True
        Scale rows to length 1, before and after. Without it they keep the length that the correction gives them.
    block_rows : int, default=2048
        Rows that are worked on at once.

    Attributes
    ----------
    mean_gallery_, mean_query_ : ndarray of shape (d,)
        Means of the banks' unit rows; the second is None where there is no bank of queries.
    directions_gallery_, directions_query_ : ndarray of shape (0, d)
    n_bank_gallery_, n_bank_query_ : int
    """

    _spectral = False

    def __init__(self, *, sides="both", normalize=True, block_rows=2048):
        self.sides = sides
        self.normalize = normalize
        self.block_rows = block_rows

    def _n_taken(self) -> int:
        return 0

    def _default_grid(self) -> list[dict[str, list]]:
        return [{"sides": self._known_sides()}]


class AllButTheTop(_VectorCorrection):
    r"""Take the mean of a bank and its strongest principal directions from vectors, and scale them to length 1 again.

    .. math:: u - \mu - \sum_{i \le D} v_i v_i^\top (u - \mu)

    of the bank's mean :math:`\mu` and principal directions v about it. Directions in which the bank varies most are
    often such as frequency or length, which tell little; where they tell much, taking them does harm.

    Source: Mu & Viswanath, "All-but-the-Top: Simple and Effective Postprocessing for Word Representations". Catalogue
    entry ``invgc``.

    Parameters
    ----------
    n_components : int or None, default=None
        D, below d, at most what each bank spans about its mean. None: d / 100, rounded, at least 1.
    sides : {"both", "gallery", None}, default="both"
        Which vectors are corrected; None leaves all as they are, scaled to length 1. Read at each use, as
        ``n_components`` is.
    normalize : bool, default=True
        Scale rows to length 1, before and after. Without it they keep the length that the correction gives them.
    block_rows : int, default=2048
        Rows that are worked on at once.

    Attributes
    ----------
    mean_gallery_, mean_query_ : ndarray of shape (d,)
        Means of the banks' unit rows; the second is None where there is no bank of queries.
    directions_gallery_, directions_query_ : ndarray of shape (r, d)
        All principal directions that the banks span, the strongest first.
    n_bank_gallery_, n_bank_query_ : int
    """

    _spectral = True

    def __init__(self, n_components=None, *, sides="both", normalize=True, block_rows=2048):
        self.n_components = n_components
        self.sides = sides
        self.normalize = normalize
        self.block_rows = block_rows

    def _n_taken(self) -> int:
        return max(1, round(self.n_features_in_ / 100)) if self.n_components is None else self.n_components

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.n_components is not None:
            check_count("n_components", self.n_components)
        if self.sides is None or not hasattr(self, "n_bank_query_"):
            return
        n, d = self._n_taken(), self.n_features_in_
        if n >= d:
            raise ValueError(f"n_components must be below the width, n_features={d}, got {n}")
        for side, rows in (("gallery", self.n_bank_gallery_), ("query", self.n_bank_query_)):
            directions = getattr(self, f"directions_{side}_")
            if directions is not None and n > len(directions) and (side == "gallery" or self.sides == "both"):
                raise ValueError(
                    f"n_components must be at most the {len(directions)} directions that the {side} bank spans about "
                    f"its mean (n_samples={rows}), got {n}"
                )

    def _default_grid(self) -> list[dict[str, list]]:
        banks = [found for found in (self.directions_gallery_, self.directions_query_) if found is not None]
        room = min(self.n_features_in_ - 1, *map(len, banks))
        taken = [n for n in (1, 2, 3, 5, 10) if n <= room]
        sides = [side for side in self._known_sides() if side is not None]
        return [{"sides": [None]}, *([{"sides": sides, "n_components": taken}] if taken else [])]
