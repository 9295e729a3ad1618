"""Features that two networks share only as groups of units: few to one by Lasso, many to many by spectral clusters."""

import warnings
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from polyspan.linalg import PairedMoments, discretize_embedding

from ._checks import check_count, check_kind, check_number
from .unit_bipartition import recursive_bipartition
from .unit_matching import UnitCorrelations, deviations, unit_correlations

ALPHAS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
BLOCK = 32
SWEEPS, AGAIN = 5, 200
"""Sweeps between two looks at how far a fit is, and at most in fits whose choice of units alone counts."""
AFFINITIES = ("abs", "squared", "relu")
METHODS = ("spectral", "recursive")


class SparseUnitMapping(MultiOutputMixin, RegressorMixin, BaseEstimator):
    r"""Predict every unit of one network from few units of another, by Lasso.

    For each target y (a unit of B), :math:`\min_w \tfrac1{2n}\lVert y - Xw\rVert^2 + \alpha\lVert w\rVert_1` on
    standardised units, along a path of penalties. All targets share the Gram matrix of the inputs, so one sweep of
    coordinate descent serves them all, and rows are seen once (:meth:`fit_moments`). The loss of a target is half its
    mean squared error: 0.5 predicts nothing, 0 is exact.

    Where inputs are correlated, *which* units are chosen is unstable though the error is not. Lasso shrinks weights
    towards 0: ``refit=True`` fits the chosen units again without penalty.
    Source: catalogue entry ``convergent-learning``.

    Parameters
    ----------
    alpha : float, default=1e-3
        Penalty that ``predict`` uses, one of ``alphas``; not used with ``max_units``.
    alphas : tuple of float
        The path; 0 is least squares, of least norm where that is not unique.
    max_units : int, optional
        Predict each target at the smallest penalty of the path that uses so many units at most; where even the
        largest uses more, its largest weights are kept.
    refit : bool, default=False
        Least squares on the units that were chosen.
    standardize : bool, default=True
        Divide inputs and targets by their standard deviations first; without, only means are taken off.
    tol : float, default=1e-6
        Duality gap at which a target is done, as a share of its variance.
    max_iter : int, default=2000
        Sweeps a penalty.

    Attributes
    ----------
    alphas_ : ndarray of shape (n_alphas,)
        Descending.
    coef_path_ : ndarray of shape (n_alphas, n_targets, n_features_in_)
        Weights between standardised units.
    n_nonzero_ : ndarray of shape (n_alphas, n_targets)
    loss_half_mse_ : ndarray of shape (n_alphas, n_targets)
        On the rows that were fitted, in standardised units.
    alpha_ : ndarray of shape (n_targets,)
        Penalty used for each target.
    n_units_ : ndarray of shape (n_targets,)
        Units that predict each target.
    coef_, intercept_ : ndarrays of shape (n_targets, n_features_in_) and (n_targets,)
        In the units of the data, (n_features_in_,) and a float where y has one dimension.
    n_iter_ : int
        Sweeps in all.
    """

    def __init__(
        self, alpha=1e-3, *, alphas=ALPHAS, max_units=None, refit=False, standardize=True, tol=1e-6, max_iter=2000
    ):
        self.alpha = alpha
        self.alphas = alphas
        self.max_units = max_units
        self.refit = refit
        self.standardize = standardize
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X, y) -> "SparseUnitMapping":
        """Fit on activations ``X`` (n, d_A) and ``y`` (n, d_B) or (n,): row i of both is the same input."""
        check_kind(X, "X")
        check_kind(y, "y")
        X, Y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        if len(X) < 2:
            raise ValueError(f"SparseUnitMapping needs at least 2 rows, got {len(X)} sample")
        wide = Y.reshape(len(Y), -1)
        self._solve(PairedMoments(X.shape[1], wide.shape[1]).update(X, wide))
        if Y.ndim == 1:
            self.coef_, self.intercept_ = self.coef_[0], np.asarray(self.intercept_).item()
        return self

    def fit_moments(self, moments: Any) -> "SparseUnitMapping":
        """Fit on a :class:`polyspan.linalg.PairedMoments` of X and Y, gathered from any number of rows."""
        if not moments.n_rows >= 2:
            raise ValueError(f"moments must have seen at least 2 rows, got {moments.n_rows} sample")
        self.n_features_in_ = moments.d_in
        self._solve(moments)
        return self

    def _solve(self, moments: Any) -> None:
        path = np.array(sorted(set(map(float, self.alphas)), reverse=True))
        if not len(path) or not np.isfinite(path).all() or path[-1] < 0:
            raise ValueError(f"alphas must be finite numbers of at least 0, got {self.alphas!r}")
        if self.max_units is None and float(self.alpha) not in path:
            raise ValueError(f"alpha must be one of alphas {self.alphas!r}, got {self.alpha!r}")
        if self.max_units is not None:
            check_count("max_units", self.max_units)
        check_number("tol", self.tol)
        check_count("max_iter", self.max_iter)
        if not all(np.isfinite(part).all() for part in (moments.cov_in, moments.cross, moments.cov_out)):
            raise ValueError("moments must be finite, got NaN or infinity: a value is not finite, or its square is not")
        G, C, yy, scale_in, scale_out = self._standardised(moments)
        W, weights, self.n_iter_, stuck = np.zeros_like(C), [], 0, 0
        for alpha in path:
            W, sweeps, late = self._penalised(G, C, yy, float(alpha), W, self.max_iter)
            self.n_iter_, stuck = self.n_iter_ + sweeps, stuck + late
            weights.append(W.T.copy())
        if stuck:
            warnings.warn(
                f"{stuck} fits did not reach tol={self.tol} in max_iter={self.max_iter} sweeps",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.alphas_, self.coef_path_ = path, np.stack(weights)
        self.n_nonzero_ = np.count_nonzero(self.coef_path_, axis=2)
        self.loss_half_mse_ = np.stack([_half_mse(G, C, yy, w.T) for w in self.coef_path_])
        chosen = self._choose(G, C)
        self.n_units_ = np.count_nonzero(chosen, axis=1)
        self.coef_ = chosen * scale_out[:, None] / scale_in
        self.intercept_ = moments.mean_out - self.coef_ @ moments.mean_in

    def _standardised(self, moments: Any) -> tuple[np.ndarray, ...]:
        """Return the Gram matrix of inputs, their products with targets, targets' variances, and both scales."""
        n = moments.weight
        s = deviations(np.diag(moments.cov_in), moments.mean_in, n)
        t = deviations(np.diag(moments.cov_out), moments.mean_out, n)
        if self.standardize:
            scale_in, scale_out = (np.where(x > 0, x, 1.0) for x in (s, t))
        else:
            scale_in, scale_out = np.ones_like(s), np.ones_like(t)
        # Rounding noise of a constant unit must not become a regressor.
        G = np.where((s > 0)[:, None] & (s > 0), moments.cov_in / n / scale_in[:, None] / scale_in, 0.0)
        C = np.where((s > 0)[:, None] & (t > 0), moments.cross / n / scale_in[:, None] / scale_out, 0.0)
        yy = np.where(t > 0, np.diag(moments.cov_out) / n / scale_out**2, 0.0)
        return G, C, yy, scale_in, scale_out

    def _penalised(
        self, G: np.ndarray, C: np.ndarray, yy: np.ndarray, alpha: float, start: np.ndarray, max_iter: int
    ) -> tuple[np.ndarray, int, int]:
        """Return weights (d_A, targets) at one penalty, sweeps, and how many targets are not done."""
        if alpha:
            return _lasso(G, C, yy, alpha, start, self.tol, max_iter)
        live, W = np.flatnonzero(G.diagonal() > 0), np.zeros_like(C)
        W[live] = np.linalg.pinv(G[np.ix_(live, live)], rcond=1e-12, hermitian=True) @ C[live]
        return W, 0, 0

    def _choose(self, G: np.ndarray, C: np.ndarray) -> np.ndarray:
        """Return the weights (n_targets, d_A) that predict, and note their penalties."""
        n_targets = C.shape[1]
        if self.max_units is None:
            at = np.full(n_targets, int(np.flatnonzero(self.alphas_ == float(self.alpha))[0]))
        else:
            fits = self.n_nonzero_ <= self.max_units
            at = np.where(fits.any(axis=0), len(fits) - 1 - fits[::-1].argmax(axis=0), 0)
        self.alpha_ = self.alphas_[at]
        weights = self.coef_path_[at, np.arange(n_targets)].copy()
        for w, c in zip(weights, C.T, strict=True):
            support = np.flatnonzero(w)
            if self.max_units is not None and len(support) > self.max_units:
                w[np.argsort(-np.abs(w), kind="stable")[self.max_units :]] = 0.0
                support = np.flatnonzero(w)
            if self.refit and len(support):
                w[support] = np.linalg.lstsq(G[np.ix_(support, support)], c[support], rcond=1e-12)[0]
        return weights

    def predict(self, X) -> np.ndarray:
        """Return predicted units of B, (m, d_B) or (m,), in the float width of ``X`` (m, d_A)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return X @ self.coef_.T.astype(X.dtype) + np.asarray(self.intercept_, dtype=X.dtype)

    def unexplained(self, moments: Any, *, relative_to: Any = None) -> np.ndarray:
        """Return the share of each target's variance that is not predicted on other rows, given by their moments.

        (n_targets,), 0 is exact and 1 no better than the mean; above 1 it is worse. NaN where a target does not vary.
        The variance is that of the same rows, or of the moments ``relative_to``: a unit that is seldom active may
        hardly vary in a few rows.
        """
        check_is_fitted(self)
        weights, offset = np.atleast_2d(self.coef_).T, np.atleast_1d(self.intercept_)
        for name, seen in (("moments", moments), ("relative_to", relative_to)):
            if seen is not None and (seen.d_in, seen.d_out) != weights.shape:
                raise ValueError(f"{name} must be of widths {weights.shape}, as fitted, got {(seen.d_in, seen.d_out)}")
        return unexplained_share(moments, weights, offset, moments if relative_to is None else relative_to)


def unexplained_share(moments: Any, weights: np.ndarray, offset: np.ndarray, relative_to: Any) -> np.ndarray:
    """Mean squared error of ``x @ weights + offset`` over the variance of y, one number a target; NaN if it is dead."""
    bias = moments.mean_out - moments.mean_in @ weights - offset
    fitted = 2 * np.sum(moments.cross * weights, axis=0) - np.sum((moments.cov_in @ weights) * weights, axis=0)
    error = np.maximum(np.diag(moments.cov_out) - fitted, 0.0) / moments.weight + bias**2
    spread = deviations(np.diag(relative_to.cov_out), relative_to.mean_out, relative_to.weight) ** 2
    return np.divide(error, spread, out=np.full_like(error, np.nan), where=spread > 0)


def support_stability(mapping: SparseUnitMapping, resamples: Iterable[Any], targets: np.ndarray) -> np.ndarray:
    r"""Say how far the units that a mapping chose are chosen again: (n_alphas, len(targets)), in [0, 1].

    Mean of :math:`|S \cap S_b| / |S \cup S_b|` over resamples b, where S is the support of the fitted path and S_b that
    of the same path on :class:`polyspan.linalg.PairedMoments` of inputs drawn again. 1: always the same units; two
    supports that are both empty agree. A support of s of d units drawn at random would have about s / (2d - s), so
    that dense ones are stable whatever was learnt.
    Source: catalogue entry ``convergent-learning``; Kalousis, Prados and Hilario 2007 for the index.
    """
    own, again = mapping.coef_path_[:, targets] != 0, []
    for moments in resamples:
        G, C, yy, _, _ = mapping._standardised(moments)
        C, yy = C[:, targets], yy[targets]
        W, supports = np.zeros_like(C), []
        for alpha in mapping.alphas_:
            W, _, _ = mapping._penalised(G, C, yy, float(alpha), W, min(mapping.max_iter, AGAIN))
            supports.append(W.T != 0)
        other = np.stack(supports)
        common, either = (own & other).sum(axis=2), (own | other).sum(axis=2)
        again.append(np.where(either > 0, common / np.maximum(either, 1), 1.0))
    return np.mean(again, axis=0)


def _half_mse(G: np.ndarray, C: np.ndarray, yy: np.ndarray, W: np.ndarray) -> np.ndarray:
    return 0.5 * np.maximum(yy - 2 * np.sum(W * C, axis=0) + np.sum(W * (G @ W), axis=0), 0.0)


def _lasso(
    G: np.ndarray, C: np.ndarray, yy: np.ndarray, alpha: float, start: np.ndarray, tol: float | int, max_iter: int
) -> tuple[np.ndarray, int, int]:
    """Solve all targets from a warm start; return weights (d, targets), sweeps, and how many targets are not done.

    Targets that are done leave the sweep. Correlated inputs make coordinate descent crawl, so every few sweeps each
    target is also moved to the minimum of its present face, as far as no weight changes sign: this only descends.
    """
    W, left, sweeps = start.copy(), np.arange(C.shape[1]), 0
    while True:
        left = left[_gaps(G, C[:, left], yy[left], W[:, left], alpha) > tol * yy[left]]
        if not len(left) or sweeps >= max_iter:
            return W, sweeps, len(left)
        mine, targets = W[:, left], C[:, left]
        for _ in range(min(SWEEPS, max_iter - sweeps)):
            _sweep(G, targets, mine, alpha)
            sweeps += 1
        for w, c in zip(mine.T, targets.T, strict=True):
            _descend_face(G, c, w, alpha)
        W[:, left] = mine


def _gaps(G: np.ndarray, C: np.ndarray, yy: np.ndarray, W: np.ndarray, alpha: float) -> np.ndarray:
    """Return each target's duality gap: how far its objective is above the least, at most."""
    gradient, fitted = C - G @ W, np.sum(W * C, axis=0)
    residual = np.maximum(yy - fitted - np.sum(W * gradient, axis=0), 0.0)
    largest = np.abs(gradient).max(axis=0)
    s = alpha / np.maximum(largest, alpha)
    return 0.5 * (1 + s**2) * residual + alpha * np.abs(W).sum(axis=0) - s * (yy - fitted)


def _sweep(G: np.ndarray, C: np.ndarray, W: np.ndarray, alpha: float) -> None:
    """One cyclic pass of coordinate descent over all inputs for all targets, in place.

    Gradients are formed a block of inputs at a time by one product, and kept up to date within the block.
    """
    for first in range(0, len(G), BLOCK):
        rows = slice(first, first + BLOCK)
        gradient, inner = C[rows] - G[rows] @ W, G[rows, rows]
        for i, curvature in enumerate(inner.diagonal()):
            if curvature <= 0:
                continue
            old = W[first + i]
            wish = gradient[i] + curvature * old
            new = (wish - np.clip(wish, -alpha, alpha)) / curvature
            gradient[i + 1 :] -= inner[i + 1 :, i, None] * (new - old)
            W[first + i] = new


def _descend_face(G: np.ndarray, c: np.ndarray, w: np.ndarray, alpha: float) -> None:
    """Move one target, in place, to the least objective among weights of its present signs; those that reach 0 go."""
    for _ in range(8):
        support = np.flatnonzero(w)
        if not len(support):
            return
        old = w[support]
        try:
            factor = cho_factor(G[np.ix_(support, support)], check_finite=False)
        except LinAlgError:
            return
        aim = cho_solve(factor, c[support] - alpha * np.sign(old), check_finite=False)
        crosses = np.sign(aim) != np.sign(old)
        if not np.isfinite(aim).all():
            return
        if not crosses.any():
            w[support] = aim
            return
        reach = np.where(crosses, old / np.where(crosses, old - aim, 1.0), np.inf)
        first = int(reach.argmin())
        moved = old + reach[first] * (aim - old)
        moved[first] = 0.0
        w[support] = np.where(np.sign(moved) == np.sign(old), moved, 0.0)


class UnitCoClustering(BaseEstimator):
    r"""Group the units of two networks together, by what they respond to.

    All units of both are vertices; an edge weighs by their correlation. A group of (1, 1) units is one shared feature,
    (a, b) a shared subspace, (a, 0) what only the first network has.

    * ``"spectral"``: the k leading eigenvectors of :math:`D^{-1/2} A D^{-1/2}`, rows of unit length, k-means.
    * ``"recursive"``: the whole is cut in two where that is cheapest, then the group that is cheapest to cut, and so
      on: a tree, in which the groups for k are unions of those for k + 1. No chance is in it. What one cut parts
      wrongly no later one mends.

    With an eigengap that is not clear, neither is the number of groups: see ``eigenvalues_`` and ``stability_``.
    Source: catalogue entry ``convergent-learning``.

    Parameters
    ----------
    n_clusters : int or "eigengap", default="eigengap"
        ``"eigengap"`` takes the k >= 2 after which the eigenvalues fall most.
    affinity : {"abs", "squared", "relu"}, default="abs"
        How a correlation becomes a weight: its size, its square, or what of it is positive.
    method : {"spectral", "recursive"}, default="spectral"
    n_init : int, default=10
        Starts of k-means.
    random_state : int, RandomState instance or None

    Attributes
    ----------
    labels_in_, labels_out_ : ndarrays of shape (d_A,) and (d_B,)
        Group of each unit, -1 for a unit that never varies.
    n_clusters_ : int
    table_ : ndarray of shape (n_clusters_, 2)
        Units of the first and of the second network in each group; the largest group first.
    eigenvalues_ : ndarray
        Of the normalised affinity, descending, as many as were computed.
    stability_ : float
        Mean adjusted Rand index of the other starts with the best: 1 where all agree. NaN with ``"recursive"``, which
        has no starts.
    splits_, cuts_ : ndarrays of shape (n_clusters_ - 1,)
        With ``"recursive"``: node 0 is all live units, and split s cuts node ``splits_[s]`` into nodes 2s + 1 and
        2s + 2, at the normalised cut ``cuts_[s]`` in [0, 2], where 0 parts what nothing joins.
    leaves_ : ndarray of shape (n_clusters_,)
        With ``"recursive"``: the node of each group.
    """

    def __init__(
        self, n_clusters: Any = "eigengap", *, affinity="abs", method="spectral", n_init=10, random_state=None
    ):
        self.n_clusters = n_clusters
        self.affinity = affinity
        self.method = method
        self.n_init = n_init
        self.random_state = random_state

    def fit(self, X, y) -> "UnitCoClustering":
        """Group the columns of ``X`` (n, d_A) and of ``y`` (n, d_B) or (n,); row i of both is the same input."""
        check_kind(X, "X")
        check_kind(y, "y")
        X, Y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        if len(X) < 2:
            raise ValueError(f"UnitCoClustering needs at least 2 rows, got {len(X)} sample")
        Y = Y.reshape(len(Y), -1)
        return self._group(unit_correlations(PairedMoments(X.shape[1], Y.shape[1]).update(X, Y)))

    def fit_correlations(self, correlations: UnitCorrelations) -> "UnitCoClustering":
        """Group units whose correlations are known, see :func:`unit_correlations`."""
        self.n_features_in_ = len(correlations.live_in)
        return self._group(correlations)

    def _group(self, found: UnitCorrelations) -> "UnitCoClustering":
        if self.affinity not in AFFINITIES:
            raise ValueError(f"affinity must be one of {AFFINITIES}, got {self.affinity!r}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")
        check_count("n_init", self.n_init)
        live = np.concatenate([found.live_in, found.live_out])
        whole = np.block([[found.within_in, found.between], [found.between.T, found.within_out]])
        units, given = int(live.sum()), self.n_clusters
        if isinstance(given, str) and given != "eigengap":
            raise ValueError(f"n_clusters must be a number or 'eigengap', got {given!r}")
        counted = isinstance(given, Integral) and not isinstance(given, bool)
        if not isinstance(given, str) and not (counted and 1 <= given <= units):
            raise ValueError(f"n_clusters must be between 1 and the number of live units {units}, got {given!r}")
        if not units:
            raise ValueError("X and y must have a unit that varies, got none")
        A = whole[np.ix_(live, live)]
        A = {"abs": np.abs, "squared": np.square, "relu": lambda a: np.maximum(a, 0.0)}[self.affinity](A)
        root = np.sqrt(A.sum(axis=1))
        S = A / root[:, None] / root
        wanted = units if isinstance(given, str) else min(int(given) + 1, units)
        values, vectors = eigh((S + S.T) / 2, subset_by_index=(units - wanted, units - 1))
        self.eigenvalues_, vectors = values[::-1], vectors[:, ::-1]
        if not isinstance(given, str):
            k = int(given)
        elif units < 3:
            k = units
        else:
            k = 2 + int(np.argmax(self.eigenvalues_[1:-1] - self.eigenvalues_[2:]))
        cut = recursive_bipartition(A, k) if self.method == "recursive" else None
        groups = self._kmeans(vectors[:, :k], k) if cut is None else cut.labels
        labels = np.full(len(live), -1, dtype=np.int64)
        labels[live] = groups
        d = len(found.live_in)
        sizes = np.array([[np.sum(side == c) for side in (labels[:d], labels[d:])] for c in range(k)])
        order = np.lexsort((-sizes[:, 0], -sizes.sum(axis=1)))
        rank = np.append(np.argsort(order), -1)
        self.n_clusters_, self.table_ = k, sizes[order]
        self.labels_in_, self.labels_out_ = rank[labels[:d]], rank[labels[d:]]
        for name in ("splits_", "cuts_", "leaves_"):
            vars(self).pop(name, None)
        if cut is not None:
            self.splits_, self.cuts_, self.leaves_, self.stability_ = cut.splits, cut.cuts, cut.leaves[order], np.nan
        return self

    def _kmeans(self, Y: np.ndarray, k: int) -> np.ndarray:
        """Return the best labels (m,) of several starts, and note how far the others agree."""
        Y = Y / np.maximum(np.linalg.norm(Y, axis=1, keepdims=True), 1e-300)
        rng = np.random.default_rng(int(check_random_state(self.random_state).randint(2**31 - 1)))
        runs = [discretize_embedding(Y, method="kmeans", n_clusters=k, n_init=1, rng=rng) for _ in range(self.n_init)]
        best = max(range(len(runs)), key=lambda i: float(runs[i].objectives[0]))
        rest = [adjusted_rand_score(runs[best].labels, run.labels) for i, run in enumerate(runs) if i != best]
        self.stability_ = float(np.mean(rest)) if rest else 1.0
        return runs[best].labels

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = tags.target_tags.multi_output = True
        return tags
