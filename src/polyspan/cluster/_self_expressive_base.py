"""What the classical subspace clusterers share: rows, clusters of an affinity, subspaces, files."""

import warnings
from collections.abc import Callable
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from polyspan.run import map_tasks

from ._affinity import (
    ROUNDINGS,
    Block,
    SquaredAffinity,
    assemble,
    block_spans,
    check_numbers,
    find_copies,
    spectral_clusters,
    spread_copies,
    symmetric,
)
from ._self_expression_files import from_arrays, listed, to_arrays

SHARE = 0.95
ARRAYS, MATRICES = ("labels_", "embedding_"), ("representation_", "affinity_")
FACTS = ("n_components_", "n_iter_", "n_features_in_", "_fitted_on")
# Parameters of what comes after the points are expressed, and of how they are.
LATE = ("subspace_dim", "n_init", "rounding", "n_jobs", "random_state")


class Clustered(NamedTuple):
    """What :class:`~polyspan.cluster._affinity.Spectral` holds, and ``bases``."""

    labels: np.ndarray
    rows: np.ndarray
    pieces: int
    bases: list[np.ndarray]


class SelfExpressiveClustering(ClusterMixin, BaseEstimator):
    """What the four have in common: unit rows, coefficients, a symmetric affinity, spectral clustering, subspaces.

    A class of your own gives ``_express``, which returns the coefficients (n, n), dense or sparse. Subspaces go through
    the origin: do not take the mean off, and do not standardise columns.

    Of rows that are equal up to sign, length and rounding only the first expresses others in the sparse methods; its
    copies are expressed as it is. Each would else be the other's only link, and a cluster of its own. Rounding is a
    distance of unit rows of up to 3e-4 in float32 and 1e-6 in float64.

    Attributes
    ----------
    labels_ : ndarray of shape (n,)
    representation_ : csr array, ndarray or LinearOperator of shape (n, n)
        Row i expresses point i by the others.
    affinity_ : csr array, ndarray or LinearOperator of shape (n, n)
    embedding_ : ndarray of shape (n, n_clusters)
        Unit rows; zeros for a point without a place: it has no link, or lies in none of the ``n_clusters`` largest
        pieces. Its label is that of the nearest subspace, and it takes no part in ``bases_``.
    bases_ : list of ndarray of shape (n_features, rank)
        Orthonormal directions that hold 95 % of the squares of a cluster's rows, or ``subspace_dim`` of them.
    n_components_ : int
        Pieces of two or more points without a link between them into which a sparse affinity falls, or 1. Where they
        are as many as the clusters or more, the largest are the clusters.
    n_iter_ : int
        Rounds that the slowest point took.
    n_features_in_ : int
    """

    _fit_is_abstract = True

    n_clusters: Any
    subspace_dim: Any
    n_init: Any
    random_state: Any
    # Not every class has these as parameters.
    normalize: Any = True
    rounding: Any = "kmeans"
    n_jobs: Any = 1
    max_rounds: Any = 1

    def fit(self, X, y=None) -> "SelfExpressiveClustering":
        """Express and cluster the rows of ``X`` (n, d); ``y`` is ignored.

        Raises
        ------
        ValueError
            A parameter is out of range, a row is not finite, or there are fewer rows than clusters.
        """
        check_numbers(X)
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        check_whole(self, ("n_clusters", 1), ("n_init", 1))
        if self.subspace_dim is not None:
            check_whole(self, ("subspace_dim", 1))
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        if self.n_clusters > len(X):
            raise ValueError(f"n_clusters must be at most the number of rows, {len(X)}, got {self.n_clusters}")
        k = int(self.n_clusters)
        self._check(len(X))
        self._fitted_on = self._word(X)
        rows = unit_rows(X, bool(self.normalize))
        self.representation_ = self._express(rows)
        self.affinity_ = self._affinity(self.representation_)
        found = self._cluster(rows, self.random_state)
        self.labels_, self.bases_, self.n_components_ = found.labels, found.bases, found.pieces
        self.embedding_ = found.rows.astype(X.dtype)
        if self.n_components_ > k > 1:
            warnings.warn(
                f"the affinity falls into {self.n_components_} pieces for n_clusters={k}; the {k} largest are the "
                "clusters, points of the others join the nearest subspace; more links a point would join pieces",
                stacklevel=2,
            )
        n_found = len(np.unique(self.labels_))
        if n_found < k:
            warnings.warn(f"only {n_found} of n_clusters={k} clusters have a row", stacklevel=2)
        return self

    def predict(self, X) -> np.ndarray:
        """Return, for new rows, the cluster whose subspace leaves the least of them over, (n,).

        The methods label the points that were fitted only; this is an addition, and may give those points another
        label than ``labels_`` has.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return nearest(X, self.bases_)

    def labels_of_seed(self, X, seed: int) -> np.ndarray:
        """Return the labels that ``random_state=seed`` gives the rows that were fitted, (n,), without a new fit.

        Chance enters these methods by the rounding only; what the points are expressed by is kept.

        Raises
        ------
        ValueError
            X, or a parameter that matters to its expression, is not what was fitted.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        # Older files do not tell what was fitted.
        if len(X) != len(self.labels_) or (hasattr(self, "_fitted_on") and not self.is_fit_of(X)):
            raise ValueError(f"X must be the {len(self.labels_)} rows that were fitted, with the same parameters")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="X has .* all-zero rows")
            return self._cluster(unit_rows(X, bool(self.normalize)), seed).labels

    def is_fit_of(self, X) -> bool:
        """Return whether these rows were expressed, with the parameters that are set now."""
        known = getattr(self, "_fitted_on", None)
        return known is not None and known == self._word(check_array(X, dtype=[np.float64, np.float32]))

    def _word(self, X: np.ndarray) -> str:
        """Return a digest of rows and of the parameters that they are expressed by."""
        from polyspan.io import digest_array

        params = {name: str(value) for name, value in self.get_params().items() if name not in LATE}
        return f"{params} {digest_array(X)}"

    def save(self, path: Path | str) -> Path:
        """Write parameters, coefficients, affinity and clusters to one .safetensors file, atomically; no pickle."""
        from polyspan.io import constructor_params, save_fitted

        check_is_fitted(self)
        forms, arrays = {}, {name: getattr(self, name) for name in ARRAYS}
        for name in MATRICES:
            forms[name], parts = to_arrays(name, getattr(self, name))
            arrays |= parts
        arrays |= {f"bases_.{j}": basis for j, basis in enumerate(self.bases_)}
        params = {"init": constructor_params(self), "facts": {name: getattr(self, name) for name in FACTS}}
        return save_fitted(Path(path), kind=type(self).__name__, arrays=arrays, params=params | {"forms": forms})

    @classmethod
    def load(cls, path: Path | str) -> "SelfExpressiveClustering":
        """Read what :meth:`save` of the same class wrote.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds something else.
        """
        from polyspan.io import load_fitted

        found = load_fitted(Path(path), kind=cls.__name__)
        made = cls(**found.params["init"])
        for name, value in found.params["facts"].items():
            setattr(made, name, value)
        for name in ARRAYS:
            setattr(made, name, np.array(found.arrays[name]))
        made.bases_, expression = listed("bases_", found.arrays), None
        for name in MATRICES:
            form, n = found.params["forms"][name], len(made.labels_)
            expression = from_arrays(name, form, found.arrays, n, Path(path), expression=expression)
            setattr(made, name, expression)
        return made

    def _cluster(self, rows: np.ndarray, random_state: Any) -> Clustered:
        """Round the affinity, and find the subspaces; points without a place in the embedding join the nearest."""
        seed, k = int(check_random_state(random_state).randint(2**31 - 1)), int(self.n_clusters)
        found = spectral_clusters(self.affinity_, k, rounding=self.rounding, n_init=int(self.n_init), seed=seed)
        placed = found.rows.any(axis=1)
        if not placed.any():
            # Rows that are all one direction have no others to be expressed by: they are one cluster.
            found.labels[:] = 0
            placed = np.ones(len(rows), dtype=bool)
        bases = [leading_directions(rows[placed & (found.labels == c)], self.subspace_dim) for c in range(k)]
        found.labels[~placed] = nearest(rows[~placed], bases)
        return Clustered(*found, bases)

    def affinity_block(self, rows) -> np.ndarray:
        """Return the affinities among a few rows, dense, (b, b), whatever form ``affinity_`` has."""
        check_is_fitted(self)
        W, rows = self.affinity_, np.asarray(rows)
        if isinstance(W, SquaredAffinity):
            return W.block(rows)
        W = W[rows][:, rows]
        return W.toarray() if sp.issparse(W) else W

    def _check(self, n: int) -> None:
        """Look at the parameters of the method."""

    def _express(self, rows: np.ndarray) -> Any:
        raise NotImplementedError

    def _affinity(self, C: Any) -> Any:
        """Return (|C| + |C'|) / 2 after scaling rows to unit length, as is customary: all points weigh the same."""
        return symmetric(C, scaled=True)

    def _in_blocks(self, rows: np.ndarray, work: Callable[..., Block], columns: int) -> sp.csr_array:
        """Express all rows by blocks on ``n_jobs`` processes; a row needs ``columns`` numbers beside its products."""
        copies = find_copies(rows)
        rows = rows[copies.kept] if len(copies.kept) < len(rows) else rows
        n = len(rows)
        if n == 1:
            self.n_iter_ = 1
            return sp.csr_array((len(copies.group), len(copies.group)), dtype=rows.dtype)
        spans = block_spans(n, (n + columns) * rows.dtype.itemsize)
        workers = 1 if self.n_jobs is None else int(self.n_jobs)
        blocks = map_tasks(partial(work, rows), spans, workers=None if workers == -1 else workers)
        self.n_iter_ = max(1, *(block.rounds for block in blocks))
        unfinished = sum(block.unfinished for block in blocks)
        if unfinished:
            warnings.warn(
                f"{unfinished} points were not optimal after max_rounds={self.max_rounds}; raise it", stacklevel=4
            )
        C = assemble(blocks, n, rows.dtype)
        return spread_copies(C, copies) if len(copies.group) > n else C


def nearest(X: np.ndarray, bases: list[np.ndarray]) -> np.ndarray:
    """Return, for rows (n, d), which basis leaves the least of them over, (n,)."""
    kept = [np.square(X @ basis.astype(X.dtype)).sum(axis=1) for basis in bases]
    return np.argmax(np.stack(kept, axis=1), axis=1)


def check_whole(estimator: Any, *wanted: tuple[str, int]) -> None:
    """Refuse parameters that are no whole numbers of at least so much."""
    for name, least in wanted:
        value = getattr(estimator, name)
        if isinstance(value, bool | np.bool_) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_jobs(estimator: Any) -> None:
    """Refuse an ``n_jobs`` that is no number of processes."""
    jobs = estimator.n_jobs
    if jobs is not None and not (isinstance(jobs, Integral) and (jobs >= 1 or jobs == -1)):
        raise ValueError(f"n_jobs must be a whole number of at least 1, -1 or None, got {jobs!r}")


def unit_rows(X: np.ndarray, normalize: bool) -> np.ndarray:
    """Return rows at unit length, or as they are; say which are all zero, and so in every subspace."""
    peak = np.abs(X).max(axis=1, keepdims=True)
    empty = peak[:, 0] == 0
    if empty.any():
        warnings.warn(
            f"X has {empty.sum()} all-zero rows, the first at row {empty.argmax()}; they lie in every subspace and "
            "their labels mean nothing",
            stacklevel=3,
        )
        peak[empty] = 1
    if normalize:
        rows = X / peak  # first, so that squares of very large or small numbers stay finite
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(empty[:, None], 1, lengths).astype(X.dtype)
    if not 1e-12 < peak.min() <= peak.max() < 1e12:
        raise ValueError(f"X must lie within 1e-12 and 1e12 where normalize=False, got {peak.min()} to {peak.max()}")
    return X


def leading_directions(rows: np.ndarray, d: int | None = None) -> np.ndarray:
    """Return the leading directions of rows, through the origin: d of them, or those that hold 95 % of the squares."""
    if not len(rows):
        return np.zeros((rows.shape[1], 0), dtype=rows.dtype)
    _, s, Vh = np.linalg.svd(rows, full_matrices=False)
    if d is None:
        held = np.cumsum(s.astype(np.float64) ** 2)
        d = int(np.searchsorted(held, SHARE * held[-1])) + 1
    return np.ascontiguousarray(Vh[:d].T)
