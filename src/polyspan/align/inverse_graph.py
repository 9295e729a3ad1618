"""Take the hubs out of a retrieval gallery: push every vector away from its crowd, with no training."""

import warnings
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from polyspan.io import load_fitted, save_fitted
from polyspan.linalg import Neighbours, PairedMoments, top_k

from ._checks import check_count, check_kind, check_squares
from ._hubness import (
    FLOATS,
    Hubness,
    checked_relevant,
    hubness,
    mean_pairwise_cosine,
    mean_row,
    share_of_hits,
    unit_rows,
)

__all__ = [
    "Hubness",
    "InverseGraphConvolution",
    "RateChoice",
    "RateScore",
    "hubness",
    "mean_pairwise_cosine",
]

ADJACENCIES = ("full", "local")
MEANS = ("bank", "gallery", None)
BANKS = {"gallery": "X", "query": "queries"}
"""The argument that each bank comes by."""
RATES = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


class RateScore(NamedTuple):
    """One setting that was tried and the share of queries with a hit; ``pool_share`` is None where it plays no part."""

    rate_gallery: float
    rate_query: float
    pool_share: float | None
    score: float


class RateChoice(NamedTuple):
    """The setting that won and its score, with the whole table, best first."""

    rate_gallery: float
    rate_query: float
    pool_share: float | None
    score: float
    table: list[RateScore]


def _is_full(estimator: Any) -> bool:
    return estimator.adjacency == "full"


class InverseGraphConvolution(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Correct a gallery in which a few items are returned for nearly every query, by a bank of known vectors.

    Each unit row u of the gallery steps away from the bank rows it resembles, once for a bank of gallery-like vectors
    and once for one of query-like vectors; the two unit results are averaged and scaled to length 1. Queries stay as
    they are, so any index and any inner-product or cosine search takes the result. A step over a bank B of N rows is

    .. math:: u - \tfrac{r}{N} \sum_j (s_j - s_0) B_j \quad\text{(full)}, \qquad
              u - \tfrac{r}{k} \sum_{j \in \mathrm{top}_k} s_j B_j \quad\text{(local)}, \qquad s_j = u^\top B_j,

    with k = ⌊pool_share · N⌋. The full step is affine, :math:`u (I - r B^\top B/N) + r s_0 \bar B`: it is applied
    through one d by d matrix, exact at any number of rows. It shrinks what rows differ by along the bank's strong
    directions, its mean first: a hub is a row with more of the mean than others. The mean itself is what s₀ gives back;
    without s₀ it shrinks too. The local step is an exact search by blocks. Neither makes a matrix of all pairs.

    It helps where vectors share a strong common component (a cone) and does nothing useful where they do not: large
    rates then destroy the ranking. Rates that move the mean (local, or without s₀) matter sharply: over an eigenvalue
    λ of :math:`B^\top B/N` a rate of 1/λ removes its direction and 2/λ reflects it; averaged with a rate of 0 for the
    other bank, 2/λ removes it too, and rates between may do harm. So choose both by :meth:`tune`, with 0 in the grid.
    Score normalisers that use the same query bank (:class:`QueryBankNormalization`, :class:`CSLS`) are often stronger,
    if the scores of a search can be changed; :func:`compare_corrections` says it of your vectors.

    Source: catalogue entry ``invgc``.

    Parameters
    ----------
    rate_gallery, rate_query : float, default=1.0
        Steps r from the two banks; 0 leaves vectors as they are. With unit rows 1 never changes a sign. They are read
        at :meth:`transform`, and can be set after the fit.
    adjacency : {"full", "local"}, default="full"
        Whether every bank row pushes, or only the nearest.
    pool_share : float, default=0.01
        For ``"local"``: the share of the bank that pushes, in (0, 1]; the bank must hold at least 1 / pool_share rows.
    mean : {"bank", "gallery", None}, default="bank"
        Where s₀ of the full step comes from: the gallery bank, at the fit, so that a row's result depends on no other
        row; the gallery given to ``transform``, as the authors' code does; or nowhere (s₀ = 0).
    normalize : bool, default=True
        Scale rows to length 1, before and after. Without it, rows and banks are taken as they are, and results keep the
        length that the step gives them; rates then have the unit of one over a squared length.
    allow_negative : bool, default=False
        Allow negative rates, which add what positive ones take away.
    block_rows : int, default=4096
        Rows that are worked on at once.

    Attributes
    ----------
    gram_gallery_, gram_query_ : ndarray of shape (d, d)
        BᵀB / N of the banks (full).
    mean_gallery_, mean_query_ : ndarray of shape (d,)
        Mean rows of the banks (full).
    bank_gallery_, bank_query_ : ndarray of shape (N, d)
        The banks themselves (local).
    rate_limit_gallery_, rate_limit_query_ : float or None
        One over the largest eigenvalue of BᵀB / N (full); above it the top direction changes its
        sign, above twice it grows.
    n_bank_gallery_, n_bank_query_ : int
        Rows of the banks; 0 where there is no query bank, and the gallery's step stands alone.
    """

    rate_gallery: float
    rate_query: float
    n_features_in_: int
    n_bank_gallery_: int
    n_bank_query_: int
    _fitted_adjacency: str
    mean_gallery_: np.ndarray
    rate_limit_gallery_: float | None
    rate_limit_query_: float | None

    def __init__(
        self,
        rate_gallery=1.0,
        rate_query=1.0,
        *,
        adjacency="full",
        pool_share=0.01,
        mean="bank",
        normalize=True,
        allow_negative=False,
        block_rows=4096,
    ):
        self.rate_gallery = rate_gallery
        self.rate_query = rate_query
        self.adjacency = adjacency
        self.pool_share = pool_share
        self.mean = mean
        self.normalize = normalize
        self.allow_negative = allow_negative
        self.block_rows = block_rows

    def fit(self, X, y=None, *, queries=None) -> "InverseGraphConvolution":
        """Learn the banks: ``X`` (a, d) of the gallery's kind and ``queries`` (b, d) of the queries' kind, unpaired.

        They should be other items than those to be corrected, such as the training split; ``y`` is not used.

        Raises
        ------
        ValueError
            A parameter is out of its range, widths differ, a value is not finite, a row is all zero though directions
            are asked for, or a bank is smaller than 1 / pool_share (local).

        Warns
        -----
        UserWarning
            A rate is more than twice its limit, or both banks hold the same rows.
        """
        return self._learn(X, queries, reset=True)

    @available_if(_is_full)
    def partial_fit(self, X, y=None, *, queries=None) -> "InverseGraphConvolution":
        """Add rows to the banks, which need never be in memory at once; a local step needs them, and lacks this."""
        return self._learn(X, queries, reset=not hasattr(self, "_moments"))

    def _learn(self, X, queries, *, reset: bool) -> "InverseGraphConvolution":
        self._check_parameters()
        check_kind(X, "X", 3)
        check_kind(queries, "queries", 3)
        X = validate_data(self, X, reset=reset, dtype=FLOATS)
        d = X.shape[1]
        self._n_features_out = d
        banks = {"gallery": X}
        if queries is not None:
            banks["query"] = check_array(queries, dtype=FLOATS, input_name="queries")
            if banks["query"].shape[1] != d:
                raise ValueError(f"queries must have {d} features like X, got {banks['query'].shape[1]}")
            if np.array_equal(X, banks["query"]):
                warnings.warn("queries are the rows of X: a gallery was given for a bank of queries", stacklevel=3)
        if not self.normalize:
            for side, bank in banks.items():
                check_squares(bank, BANKS[side])
        self._fitted_adjacency = self.adjacency
        if self.adjacency == "local":
            # A full fit before this one is over: partial_fit must not go on from it.
            self.__dict__.pop("_moments", None)
            for side in ("gallery", "query"):
                bank = self._unit(banks[side], BANKS[side]) if side in banks else np.zeros((0, d), X.dtype)
                setattr(self, f"bank_{side}_", bank)
                setattr(self, f"n_bank_{side}_", len(bank))
                setattr(self, f"rate_limit_{side}_", None)
                if len(bank):
                    self._pool(side, self.pool_share)
            self._know_rates()
            return self
        if reset:
            self._moments = {side: PairedMoments(d) for side in ("gallery", "query")}
        for side, bank in banks.items():
            for start in range(0, len(bank), self.block_rows):
                self._moments[side].update(self._unit(bank[start : start + self.block_rows], BANKS[side], start))
        for side, moments in self._moments.items():
            gram = moments.uncentred().cov_in / max(moments.weight, 1.0)
            largest = float(np.linalg.eigvalsh(gram)[-1])
            limit = 1.0 / largest if largest > 0 else None
            setattr(self, f"gram_{side}_", gram)
            setattr(self, f"mean_{side}_", moments.mean_in.copy())
            setattr(self, f"n_bank_{side}_", moments.n_rows)
            setattr(self, f"rate_limit_{side}_", limit)
        self._known_rates = {}
        self._tell_of_rates(4)
        return self

    def _tell_of_rates(self, stacklevel: int) -> None:
        """Warn of rates above twice their limit that were neither told of before nor chosen by :meth:`tune`."""
        for side in ("gallery", "query"):
            rate, limit = getattr(self, f"rate_{side}"), getattr(self, f"rate_limit_{side}_")
            if limit is not None and rate > 2 * limit and self._known_rates.get(side) != (rate, limit):
                warnings.warn(
                    f"rate_{side}={rate:g} is above twice its limit {limit:.3g}: the bank's top direction changes its "
                    "sign and grows",
                    stacklevel=stacklevel,
                )
        self._know_rates()

    def _know_rates(self) -> None:
        sides = ("gallery", "query")
        self._known_rates = {s: (getattr(self, f"rate_{s}"), getattr(self, f"rate_limit_{s}_")) for s in sides}

    def transform(self, X, *, own=None, gallery_mean=None) -> np.ndarray:
        """Return the corrected gallery (n, d), unit rows, in the width of ``X``; float64 for float16 and integers.

        Parameters
        ----------
        own : array of n ints, optional
            For items that are in the gallery bank themselves: their bank row, or -1. They are then not pushed away from
            themselves; without it a local step mostly shortens such a vector.
        gallery_mean : array of shape (d,), optional
            With ``mean="gallery"``, the mean unit row of a whole gallery of which ``X`` is a part.

        Raises
        ------
        ValueError
            A row is all zero, or the step takes all of it away; ``adjacency`` was set after the fit.

        Warns
        -----
        UserWarning
            A rate that was set after the fit is more than twice its limit.
        """
        self._check_fit()
        self._check_parameters()
        self._tell_of_rates(3)
        check_kind(X, "X")
        X = validate_data(self, X, reset=False, dtype=FLOATS)
        own = self._own_rows(own, len(X))
        offsets = self._mean_similarities(X, gallery_mean)
        out = np.empty(X.shape, X.dtype)
        for start in range(0, len(X), self.block_rows):
            rows = slice(start, start + self.block_rows)
            U = self._unit(X[rows], "X", start)
            pushes = self._pushes(U, offsets, None if own is None else own[rows], self.pool_share)
            out[rows] = self._combine(U, pushes, self._rates(), start)
        return out

    def retrieve(self, queries, gallery, k: int) -> Neighbours:
        """Find the k best rows of the corrected ``gallery`` (n, d) for each of ``queries`` (m, d), which stay.

        Scores are cosines, or inner products without ``normalize``; no matrix of all pairs is made.

        Raises
        ------
        ValueError
            As in :meth:`transform`, or k is out of range.
        """
        made = self.transform(gallery)
        queries = check_array(queries, dtype=FLOATS, input_name="queries")
        return top_k(self._unit(queries, "queries"), made, k, metric="cosine" if self.normalize else "dot")

    def tune(
        self,
        gallery,
        queries,
        relevant=None,
        *,
        k: int = 1,
        rates: Sequence[float | int] = RATES,
        pool_shares: Sequence[float | int] | None = None,
    ) -> RateChoice:
        """Set the rates by retrieval on validation items, which must not be those of a later test; return the table.

        Parameters
        ----------
        gallery, queries : arrays of shape (n, d) and (m, d)
        relevant : array of shape (m,) or (m, r), optional
            Gallery rows that answer each query: any of them is a hit, and -1 fills up where a query has fewer. Left
            out, row i answers query i.
        k : int
            A query counts where a right row is among its first k.
        rates : sequence of float
            Tried for both banks; must hold 0, which is no correction. Equal scores go to the smaller rates.
        pool_shares : sequence of float, optional
            Tried for ``adjacency="local"``; only ``pool_share`` where left out.

        Raises
        ------
        ValueError
            0 is not among the rates, a rate or share is out of its range, rows do not match, or ``relevant`` holds
            other numbers than rows of the gallery.
        """
        self._check_fit()
        check_count("k", k)
        for rate in rates:
            self._check_rate("rates", rate)
        for share in pool_shares or ():
            _check_share("pool_shares", share)
        if 0 not in rates:
            raise ValueError(f"rates must hold 0, which is no correction, got {list(rates)}")
        gallery = validate_data(self, gallery, reset=False, dtype=FLOATS)
        queries = check_array(queries, dtype=FLOATS, input_name="queries")
        right = checked_relevant(relevant, len(queries), len(gallery))
        local = self.adjacency == "local"
        shares = (pool_shares or (self.pool_share,)) if local else (self.pool_share,)
        U, offsets = self._unit(gallery, "gallery"), self._mean_similarities(gallery, None)
        sides = self._rates().keys()
        seen = self._unit(queries, "queries").astype(U.dtype, copy=False)
        table = []
        for share in shares:
            pushes = self._pushes(U, offsets, None, share, every=True)
            for rate_gallery in rates:
                for rate_query in rates if "query" in sides else (self.rate_query,):
                    chosen = {"gallery": rate_gallery, "query": rate_query}
                    made = self._combine(U, pushes, {side: chosen[side] for side in sides}, 0)
                    found = top_k(seen, made, k, metric="cosine" if self.normalize else "dot").indices
                    score = share_of_hits(found, right)
                    table.append(RateScore(float(rate_gallery), float(rate_query), share if local else None, score))
        table.sort(key=lambda row: (-row.score, abs(row.rate_gallery) + abs(row.rate_query)))
        best = table[0]
        self.rate_gallery, self.rate_query = best.rate_gallery, best.rate_query
        self.pool_share = best.pool_share if best.pool_share is not None else self.pool_share
        self._know_rates()
        return RateChoice(*best, table)

    def affine_step(self, side: str = "gallery") -> tuple[np.ndarray, np.ndarray]:
        """Return ``M`` (d, d) and ``b`` (d,) of the full step of one bank, ``u @ M + b`` before scaling to length 1.

        With ``mean="gallery"`` the offset depends on the gallery and is left out: b is 0.

        Raises
        ------
        ValueError
            The step is local, or there is no such bank.
        """
        self._check_fit()
        if self.adjacency != "full" or side not in self._rates():
            raise ValueError(f"side must be a bank of adjacency='full', got {side!r} of {self.adjacency!r}")
        rate = self._rates()[side]
        offset = np.dot(self.mean_gallery_, getattr(self, f"mean_{side}_")) if self.mean == "bank" else 0.0
        step = np.eye(self.n_features_in_) - rate * getattr(self, f"gram_{side}_")
        return step, rate * offset * getattr(self, f"mean_{side}_")

    def save(self, path: Path | str, **about: Any) -> Path:
        """Write the correction to one .safetensors file, atomically; ``about`` holds facts such as model names."""
        self._check_fit()
        return save_fitted(
            Path(path),
            kind=type(self).__name__,
            arrays={name: getattr(self, name) for name in self._stored()},
            params={"init": self.get_params(), "facts": {name: getattr(self, name) for name in _FACTS}},
            about=about,
        )

    @classmethod
    def load(cls, path: Path | str) -> "InverseGraphConvolution":
        """Read what :meth:`save` wrote; it transforms as before, and ``partial_fit`` starts anew.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds another class.
        """
        found = load_fitted(Path(path), kind=cls.__name__)
        made = cls(**found.params["init"])
        for name, value in {**found.params["facts"], **found.arrays}.items():
            setattr(made, name, value)
        made._fitted_adjacency = made.adjacency
        made._know_rates()
        return made

    def _stored(self) -> list[str]:
        kinds = ("bank",) if self.adjacency == "local" else ("gram", "mean")
        sides = ("gallery", "query") if self.adjacency == "full" else tuple(self._rates())
        return [f"{kind}_{side}_" for kind in kinds for side in sides]

    def _rates(self) -> dict[str, float]:
        """Return the rate of each bank that is there."""
        found = {"gallery": float(self.rate_gallery)}
        return found | ({"query": float(self.rate_query)} if self.n_bank_query_ else {})

    def _check_fit(self) -> None:
        check_is_fitted(self)
        if self.adjacency != self._fitted_adjacency:
            raise ValueError(
                f"adjacency must be {self._fitted_adjacency!r}, as fitted, got {self.adjacency!r}: fit anew"
            )

    def _check_parameters(self) -> None:
        if self.adjacency not in ADJACENCIES:
            raise ValueError(f"adjacency must be 'full' or 'local', got {self.adjacency!r}")
        if self.mean not in MEANS:
            raise ValueError(f"mean must be 'bank', 'gallery' or None, got {self.mean!r}")
        _check_share("pool_share", self.pool_share)
        check_count("block_rows", self.block_rows)
        for name in ("rate_gallery", "rate_query"):
            self._check_rate(name, getattr(self, name))

    def _check_rate(self, name: str, rate: Any) -> None:
        if isinstance(rate, bool | np.bool_) or not isinstance(rate, Real) or not np.isfinite(rate):
            raise ValueError(f"{name} must be finite, got {rate!r}")
        if rate < 0 and not self.allow_negative:
            raise ValueError(f"{name} must be at least 0 (allow_negative=True adds instead), got {rate}")

    def _pool(self, side: str, share: float) -> int:
        """Return how many bank rows push; the small term undoes rounding such as 0.29 * 100 = 28.999…."""
        n = getattr(self, f"n_bank_{side}_")
        k = int(share * n + 1e-9)
        if k < 1:
            raise ValueError(
                f"the {side} bank must hold at least 1 / pool_share = {1 / share:.4g} rows, got n_samples={n}"
            )
        return k

    def _own_rows(self, own, n: int) -> np.ndarray | None:
        if own is None:
            return None
        own = np.asarray(own)
        if own.shape != (n,) or own.dtype.kind not in "iu":
            raise ValueError(f"own must be {n} whole numbers, one a row of X, got shape {own.shape} of {own.dtype}")
        if own.min() < -1 or own.max() >= self.n_bank_gallery_:
            raise ValueError(f"own must lie in -1..{self.n_bank_gallery_ - 1}, got {own.min()}..{own.max()}")
        return own

    def _mean_similarities(self, X: np.ndarray, gallery_mean) -> dict[str, float]:
        """Return s₀ of each bank for the full step."""
        if gallery_mean is not None:
            if self.mean != "gallery":
                raise ValueError(f"gallery_mean is for mean='gallery', got mean={self.mean!r}")
            gallery_mean = np.asarray(gallery_mean, dtype=np.float64)
            if gallery_mean.shape != (X.shape[1],) or not np.isfinite(gallery_mean).all():
                raise ValueError(f"gallery_mean must be {X.shape[1]} finite numbers, got shape {gallery_mean.shape}")
        if self.adjacency == "local" or self.mean is None:
            return dict.fromkeys(self._rates(), 0.0)
        if self.mean == "bank":
            gallery_mean = self.mean_gallery_
        elif gallery_mean is None:
            gallery_mean = mean_row(X, self.block_rows, unit=self.normalize)
        return {side: float(gallery_mean @ getattr(self, f"mean_{side}_")) for side in self._rates()}

    def _pushes(self, U, offsets, own, share, *, every: bool = False) -> dict[str, np.ndarray]:
        """Return for each bank what a rate of 1 subtracts from unit rows ``U``; banks of rate 0 only with ``every``."""
        found = {}
        for side, rate in self._rates().items():
            if rate == 0 and not every:
                continue
            mine = own if side == "gallery" else None
            if self.adjacency == "full":
                push = U @ getattr(self, f"gram_{side}_").astype(U.dtype)
                push -= (offsets[side] * getattr(self, f"mean_{side}_")).astype(U.dtype)
                if mine is not None:
                    inside = np.flatnonzero(mine >= 0)
                    squared = np.sum(U[inside] ** 2, axis=1, keepdims=True)
                    push[inside] -= (squared - U.dtype.type(offsets[side])) / self.n_bank_gallery_ * U[inside]
            else:
                push = self._local_push(U, getattr(self, f"bank_{side}_"), self._pool(side, share), mine)
            found[side] = push
        return found

    @staticmethod
    def _local_push(U, bank, k, own):
        bank = bank.astype(U.dtype, copy=False)
        near = top_k(U, bank, k, metric="dot", exclude=own)
        ends = np.arange(0, U.shape[0] * k + 1, k)
        weights = sp.csr_array((near.scores.ravel(), near.indices.ravel(), ends), shape=(len(U), len(bank)))
        return (weights @ bank) / U.dtype.type(k)

    def _combine(self, U, pushes, rates, first) -> np.ndarray:
        arms = []
        for side, rate in rates.items():
            arm = (
                U if rate == 0 else self._unit(U - U.dtype.type(rate) * pushes[side], f"rate_{side}", first, made=True)
            )
            arms.append(arm)
        mean = arms[0] if len(arms) == 1 else (arms[0] + arms[1]) / U.dtype.type(2)
        return self._unit(mean, "rate_gallery and rate_query", first, made=True)

    def _unit(self, X: np.ndarray, name: str, first: int = 0, *, made: bool = False) -> np.ndarray:
        """Return unit rows where directions are asked for; rows of length 1 up to rounding are left bit for bit.

        ``made`` rows are what a step leaves of unit rows: of length 0 up to rounding, they have no direction.
        """
        if not self.normalize:
            return X
        return unit_rows(X, name, first, made=made, advice="take a smaller rate, or give own= for items of the bank")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _check_share(name: str, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
        raise ValueError(f"{name} must lie above 0 and at most at 1, got {share!r}")


_FACTS = (
    "n_features_in_",
    "_n_features_out",
    "n_bank_gallery_",
    "n_bank_query_",
    "rate_limit_gallery_",
    "rate_limit_query_",
)
