"""Classical subspace clustering: points are expressed by one another, and those that need one another are a cluster.

Four ways to express, one way to cluster. All take unit rows, so that neither length nor sign of a point matters.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from polyspan.run import available_memory_bytes, map_tasks

from ._affinity import (
    ROUNDINGS,
    Block,
    RidgeExpression,
    SquaredAffinity,
    assemble,
    block_spans,
    find_copies,
    pursue,
    spectral_clusters,
    spread_copies,
    symmetric,
    threshold,
)
from ._elastic_net import elastic_net
from ._self_expression_files import from_arrays, listed, to_arrays

SHARE = 0.95
ARRAYS, MATRICES = ("labels_", "embedding_"), ("representation_", "affinity_")
FACTS = ("n_components_", "n_iter_", "n_features_in_")


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
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        _check_whole(self, ("n_clusters", 1), ("n_init", 1))
        if self.subspace_dim is not None:
            _check_whole(self, ("subspace_dim", 1))
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        if self.n_clusters > len(X):
            raise ValueError(f"n_clusters must be at most the number of rows, {len(X)}, got {self.n_clusters}")
        k = int(self.n_clusters)
        self._check(len(X))
        rows = _unit(X, bool(self.normalize))
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
        return _nearest(X, self.bases_)

    def labels_of_seed(self, X, seed: int) -> np.ndarray:
        """Return the labels that ``random_state=seed`` gives the rows that were fitted, (n,), without a new fit.

        Chance enters these methods by the rounding only; what the points are expressed by is kept.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="X has .* all-zero rows")
            return self._cluster(_unit(X, bool(self.normalize)), seed).labels

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

    def _cluster(self, rows: np.ndarray, random_state: Any) -> "_Clustered":
        """Round the affinity, and find the subspaces; points without a place in the embedding join the nearest."""
        seed, k = int(check_random_state(random_state).randint(2**31 - 1)), int(self.n_clusters)
        found = spectral_clusters(self.affinity_, k, rounding=self.rounding, n_init=int(self.n_init), seed=seed)
        placed = found.rows.any(axis=1)
        if not placed.any():
            # Rows that are all one direction have no others to be expressed by: they are one cluster.
            found.labels[:] = 0
            placed = np.ones(len(rows), dtype=bool)
        bases = [leading_directions(rows[placed & (found.labels == c)], self.subspace_dim) for c in range(k)]
        found.labels[~placed] = _nearest(rows[~placed], bases)
        return _Clustered(*found, bases)

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


class ElasticNetSubspaceClustering(SelfExpressiveClustering):
    r"""Cluster points near subspaces by an elastic net: sparse enough to stay in a subspace, dense enough to connect.

    Each point solves :math:`\min_c \tau\lVert c\rVert_1 + \tfrac{1-\tau}{2}\lVert c\rVert_2^2 +
    \tfrac{\gamma_i}{2}\lVert x_i - X^\top c\rVert^2` over the others, exactly, on an active set that is exchanged until
    no other point is pulled in (the oracle region of You, Li, Robinson and Vidal 2016). :math:`\gamma_i` is ``gamma``
    times the least that gives point i any coefficient. With ``tau=1`` this is sparse subspace clustering (SSC).

    Points on the intersection of subspaces, and subspaces that are nearly parallel, are not told apart. Time is about
    n rounds of a small elastic net and n² d for products; memory is linear in n.
    Source: You et al., CVPR 2016; baseline of catalogue entries ``lhdsc`` and ``mlc``.

    Parameters
    ----------
    n_clusters : int, default=8
    tau : float, default=0.9
        Between 0 (excluded) and 1: share of the sparse penalty.
    gamma : float, default=50.0
        Above 1: weight of the fit.
    n_active : int, default=100
        Points that the active set begins with, and by which it grows at most.
    max_rounds : int, default=50
        Exchanges of the active set.
    normalize : bool, default=True
        Bring rows to unit length; otherwise long rows are preferred as expressions of others.
    subspace_dim : int, optional
        Rank of ``bases_``; left out, whatever holds 95 % of a cluster.
    rounding : {"kmeans", "snem", "cluster_qr"}, default="kmeans"
        How the embedding becomes groups; see :func:`polyspan.linalg.discretize_embedding` for the other two.
    n_init : int, default=20
        Starts of the rounding.
    n_jobs : int, default=1
        Processes; -1 is all cores.
    random_state : int, RandomState or None
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        tau=0.9,
        gamma=50.0,
        n_active=100,
        max_rounds=50,
        normalize=True,
        subspace_dim=None,
        rounding="kmeans",
        n_init=20,
        n_jobs=1,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.tau = tau
        self.gamma = gamma
        self.n_active = n_active
        self.max_rounds = max_rounds
        self.normalize = normalize
        self.subspace_dim = subspace_dim
        self.rounding = rounding
        self.n_init = n_init
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _check(self, n: int) -> None:
        _check_whole(self, ("n_active", 1), ("max_rounds", 1))
        _check_jobs(self)
        if not (isinstance(self.tau, Real) and 0 < self.tau <= 1):
            raise ValueError(f"tau must lie in (0, 1], got {self.tau!r}")
        if not (isinstance(self.gamma, Real) and 1 < self.gamma < math.inf):
            raise ValueError(f"gamma must be above 1 and finite, got {self.gamma!r}")

    def _express(self, rows: np.ndarray) -> sp.csr_array:
        options = {"tau": float(self.tau), "gamma": float(self.gamma), "n_active": int(self.n_active)}
        work = partial(elastic_net, **options, max_rounds=int(self.max_rounds))
        return self._in_blocks(rows, work, rows.shape[1] + 2 * int(self.n_active))


class OMPSubspaceClustering(SelfExpressiveClustering):
    """Cluster points near subspaces by orthogonal matching pursuit: the fastest of the sparse methods.

    Each point takes the other point that its residual is most correlated with, again and again, ``n_nonzero`` times or
    until ``tol``; coefficients are refitted by least squares. Few links are certain to be right and many clusters fall
    apart: where data are noisy, or a subspace holds many points, the elastic net connects better. One product with all
    points a step: n² d times ``n_nonzero``; memory is linear in n.
    Source: You, Robinson and Vidal, CVPR 2016; baseline of catalogue entry ``lhdsc``.

    Parameters
    ----------
    n_clusters : int, default=8
    n_nonzero : int, default=10
        Most points that express one; the dimension of the subspaces is a good number.
    tol : float, default=1e-6
        Length of the residual, as a share of the row's, at which it is done.
    normalize : bool, default=True
        Bring rows to unit length; otherwise long rows are preferred as expressions of others.
    subspace_dim : int, optional
        Rank of ``bases_``; left out, whatever holds 95 % of a cluster.
    rounding : {"kmeans", "snem", "cluster_qr"}, default="kmeans"
    n_init : int, default=20
        Starts of the rounding.
    n_jobs : int, default=1
        Processes; -1 is all cores.
    random_state : int, RandomState or None
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        n_nonzero=10,
        tol=1e-6,
        normalize=True,
        subspace_dim=None,
        rounding="kmeans",
        n_init=20,
        n_jobs=1,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.n_nonzero = n_nonzero
        self.tol = tol
        self.normalize = normalize
        self.subspace_dim = subspace_dim
        self.rounding = rounding
        self.n_init = n_init
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _check(self, n: int) -> None:
        _check_whole(self, ("n_nonzero", 1))
        _check_jobs(self)
        if not (isinstance(self.tol, Real) and 0 <= self.tol < 1):
            raise ValueError(f"tol must lie in [0, 1), got {self.tol!r}")

    def _express(self, rows: np.ndarray) -> sp.csr_array:
        most = min(int(self.n_nonzero), *rows.shape)
        work = partial(pursue, n_nonzero=int(self.n_nonzero), tol=float(self.tol))
        return self._in_blocks(rows, work, most * (2 * rows.shape[1] + most))


class ThresholdingSubspaceClustering(SelfExpressiveClustering):
    r"""Cluster points near subspaces by linking each to the few of largest absolute cosine: nothing is solved.

    Links weigh :math:`e^{-2\arccos|\cos|}`; orthogonal points are not linked. Fails where
    subspaces meet at small angles, which the other methods bear better. One product with all points, n² d; memory is
    linear in n.
    Source: Heckel and Bölcskei 2015; baseline of catalogue entry ``lhdsc``.

    Parameters
    ----------
    n_clusters : int, default=8
    n_neighbors : int, optional
        Links a point; left out, a twentieth of the points of a cluster of mean size, but 3 at least and 100 at most.
    subspace_dim : int, optional
        Rank of ``bases_``; left out, whatever holds 95 % of a cluster.
    rounding : {"kmeans", "snem", "cluster_qr"}, default="kmeans"
    n_init : int, default=20
        Starts of the rounding.
    n_jobs : int, default=1
        Processes; -1 is all cores.
    random_state : int, RandomState or None
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        n_neighbors=None,
        subspace_dim=None,
        rounding="kmeans",
        n_init=20,
        n_jobs=1,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.n_neighbors = n_neighbors
        self.subspace_dim = subspace_dim
        self.rounding = rounding
        self.n_init = n_init
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _check(self, n: int) -> None:
        _check_jobs(self)
        if self.n_neighbors is not None:
            _check_whole(self, ("n_neighbors", 1))

    def _express(self, rows: np.ndarray) -> sp.csr_array:
        q = int(self.n_neighbors or min(max(3, math.ceil(len(rows) / (20 * self.n_clusters))), 100))
        return self._in_blocks(rows, partial(threshold, n_neighbors=q), 3 * q)

    def _affinity(self, C: sp.csr_array) -> sp.csr_array:
        return symmetric(2 * C, scaled=False)


class LeastSquaresSubspaceClustering(SelfExpressiveClustering):
    r"""Cluster points near subspaces by ridge regression of each on the others, in closed form.

    Minimises :math:`\lVert X - CX\rVert_F^2 + \alpha\lVert C\rVert_F^2`, with zero diagonal or without. Coefficients
    spread over all points of a subspace, which connects well; noise spreads as well.

    The coefficients have rank d but for their diagonal; their absolute values, which the published affinity is made
    of, have not. So the published form holds three n x n matrices, for some ten thousand points. Two forms are linear
    in n: ``power=2`` takes squares as affinities and never makes a matrix of n x n, exactly, at n d² a product;
    ``n_kept`` keeps the largest affinities of each point, found in blocks, n² d once.
    Source: Lu et al., ECCV 2012; squares after Liu et al., PAMI 2013; baseline of catalogue entry ``lhdsc``.

    Parameters
    ----------
    n_clusters : int, default=8
    alpha : float, default=0.1
        Penalty, > 0, in squared units of a row.
    zero_diagonal : bool, default=True
        No point expresses itself (the published LSR1; otherwise LSR2).
    power : {1, 2}, default=1
        Affinities are absolute coefficients to this power.
    n_kept : int, optional
        Largest affinities that each point keeps; left out, all.
    normalize : bool, default=True
        Bring rows to unit length.
    subspace_dim : int, optional
        Rank of ``bases_``; left out, whatever holds 95 % of a cluster.
    rounding : {"kmeans", "snem", "cluster_qr"}, default="kmeans"
    n_init : int, default=20
        Starts of the rounding.
    random_state : int, RandomState or None
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        alpha=0.1,
        zero_diagonal=True,
        power=1,
        n_kept=None,
        normalize=True,
        subspace_dim=None,
        rounding="kmeans",
        n_init=20,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.alpha = alpha
        self.zero_diagonal = zero_diagonal
        self.power = power
        self.n_kept = n_kept
        self.normalize = normalize
        self.subspace_dim = subspace_dim
        self.rounding = rounding
        self.n_init = n_init
        self.random_state = random_state

    def _check(self, n: int) -> None:
        if not (isinstance(self.alpha, Real) and 0 < self.alpha < math.inf):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha!r}")
        if self.power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {self.power!r}")
        if self.n_kept is not None:
            _check_whole(self, ("n_kept", 1))
        needed, free = 3 * n * n * 8, available_memory_bytes()
        if self.power == 1 and self.n_kept is None and needed > free:
            raise ValueError(
                f"X must have few enough rows for 3 matrices of n by n: {n} rows need {needed:,} bytes, {free:,} are "
                "free; power=2 or n_kept need no such matrix"
            )

    def _express(self, rows: np.ndarray) -> Any:
        alpha, hollow = float(self.alpha), bool(self.zero_diagonal)
        expression = RidgeExpression(rows, alpha, zero_diagonal=hollow)  # ty: ignore[no-matching-overload]
        self.n_iter_, self._sizes, n = 1, None, len(rows)
        if self.n_kept is not None:
            work = partial(expression.kept, n_kept=int(self.n_kept), power=int(self.power))
            blocks, sizes = zip(*(work(span) for span in block_spans(n, 4 * n * 8)), strict=True)
            self._sizes = assemble([b._replace(values=s) for b, s in zip(blocks, sizes, strict=True)], n, rows.dtype)
            return assemble(list(blocks), n, rows.dtype)
        return expression if self.power == 2 else expression.dense()

    def _affinity(self, C: Any) -> Any:
        sizes = self._sizes
        del self._sizes
        if isinstance(C, RidgeExpression):
            return SquaredAffinity(C)  # ty: ignore[no-matching-overload]
        return symmetric(C if sizes is None else sizes, scaled=False)


class _Clustered(NamedTuple):
    """What :class:`~polyspan.cluster._affinity.Spectral` holds, and ``bases``."""

    labels: np.ndarray
    rows: np.ndarray
    pieces: int
    bases: list[np.ndarray]


def _nearest(X: np.ndarray, bases: list[np.ndarray]) -> np.ndarray:
    kept = [np.square(X @ basis.astype(X.dtype)).sum(axis=1) for basis in bases]
    return np.argmax(np.stack(kept, axis=1), axis=1)


def _check_whole(estimator: Any, *wanted: tuple[str, int]) -> None:
    for name, least in wanted:
        value = getattr(estimator, name)
        if isinstance(value, bool | np.bool_) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _check_jobs(estimator: Any) -> None:
    jobs = estimator.n_jobs
    if jobs is not None and not (isinstance(jobs, Integral) and (jobs >= 1 or jobs == -1)):
        raise ValueError(f"n_jobs must be a whole number of at least 1, -1 or None, got {jobs!r}")


def _unit(X: np.ndarray, normalize: bool) -> np.ndarray:
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
