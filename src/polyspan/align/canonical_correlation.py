"""What two views of the same items share: the pair of subspaces along which they correlate most."""

import warnings
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from polyspan.linalg import PairedMoments, cca_from_moments

from ._checks import check_kind, check_number, check_squares, checked_weights

FLOATS = [np.float64, np.float32]
MOST = 50
VIEWS = ("x", "y")


class CanonicalSubspaces(NamedTuple):
    """Means, weights (d, k), loadings (d, k) of two views, and the k correlations of their coordinates, descending."""

    x_mean: np.ndarray
    y_mean: np.ndarray
    x_weights: np.ndarray
    y_weights: np.ndarray
    x_loadings: np.ndarray
    y_loadings: np.ndarray
    correlations: np.ndarray

    def first(self, k: int) -> "CanonicalSubspaces":
        """Return the leading k directions: those of a solution that asked for k."""
        return CanonicalSubspaces(*self[:2], *(part[:, :k] for part in self[2:6]), self.correlations[:k])


def canonical_subspaces(moments: PairedMoments, n_components: Any, reg: Any) -> CanonicalSubspaces:
    """Solve for the subspaces of gathered moments: so many directions, "all" of them, or None for at most 50.

    Raises
    ------
    ValueError
        A view is constant, ``reg`` is negative, or fewer than ``n_components`` pairs exist.
    """
    limit = min(moments.d_in, moments.d_out or 0, max(moments.n_rows - 1, 1))
    whole = isinstance(n_components, int | np.integer) and not isinstance(n_components, bool)
    if n_components not in (None, "all") and not (whole and 1 <= n_components <= limit):
        raise ValueError(
            f"n_components must be between 1 and {limit}, the least of the features of X ({moments.d_in}), those of y "
            f"({moments.d_out}) and the anchors less one ({moments.n_rows - 1}), or 'all', or None for at most {MOST}, "
            f"got {n_components!r}"
        )
    found = all_subspaces(moments, reg)
    rank = len(found.correlations)
    if n_components in (None, "all"):
        return found.first(rank if n_components == "all" else min(MOST, rank))
    if n_components > rank:
        raise ValueError(f"n_components must be at most {rank}, the smaller rank of the two views, got {n_components}")
    return found.first(n_components)


def all_subspaces(moments: PairedMoments, reg: Any) -> CanonicalSubspaces:
    """Solve for as many pairs of directions as the views have."""
    check_number("reg", reg)
    for name, cov in (("X", moments.cov_in), ("y", moments.cov_out)):
        if not np.trace(cov) > 0:
            raise ValueError(f"{name} must vary from row to row, got a constant view, which correlates with nothing")
    found = cca_from_moments(moments, reg=reg)
    weights = found.weights_in, found.weights_out
    covs = (ridged(cov / moments.weight, reg) for cov in (moments.cov_in, moments.cov_out))
    loadings = (cov @ W for cov, W in zip(covs, weights, strict=True))
    return CanonicalSubspaces(found.mean_in, found.mean_out, *weights, *loadings, found.correlations)


def ridged(cov: np.ndarray, reg: float) -> np.ndarray:
    """Add the ridge, a share of the mean variance, to a covariance."""
    return cov + reg * np.trace(cov) / len(cov) * np.eye(len(cov))


def warn_if_few(moments: PairedMoments, stacklevel: int) -> None:
    """Warn where correlations of pure noise are high: fewer anchors than features of both views."""
    width = moments.d_in + (moments.d_out or 0)
    if moments.n_rows < width:
        warnings.warn(
            f"{moments.n_rows} anchors are fewer than the {width} features of both views: correlations are too good "
            "to be true; raise reg, and compare with subspace_report's shuffled pairs",
            stacklevel=stacklevel + 1,
        )


class CanonicalCorrelation(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Find the subspaces of two views of the same items in which they agree, by canonical correlation.

    With centred views and :math:`S_{xx} = X^\top X/n + \gamma_x I`, :math:`\gamma_x = \mathrm{reg}\cdot
    \operatorname{tr}(X^\top X/n)/d_x`, the SVD :math:`S_{xx}^{-1/2} S_{xy} S_{yy}^{-1/2} = U\,\mathrm{diag}(\rho)
    V^\top` gives the weights :math:`S_{xx}^{-1/2}U_k` and :math:`S_{yy}^{-1/2}V_k`. Coordinates have unit
    (regularised) variance and are uncorrelated within a view, so the least-squares map between them is the diagonal of
    the correlations. Only means and second moments are kept: anchors may be streamed by :meth:`partial_fit`.

    Without a ridge it overfits unless anchors are many times the features of both views: noise then correlates too
    (see :func:`polyspan.align.subspace_report`). It works with squares, so with ``reg=0`` directions of a view whose
    variance is below d eps times the largest are left out. Directions of equal correlation are determined up to turns.

    Source: catalogue entry ``plato-3d``.

    Parameters
    ----------
    n_components : int, "all" or None, default=None
        Dimension k of both subspaces. None takes 50, or as many as there are; a number that is too large is an error.
    reg : float, default=1e-3
        Ridge >= 0, as a share of each view's mean variance per feature.

    Attributes
    ----------
    correlations_ : ndarray of shape (k,)
        In [0, 1], descending, on the anchors: too high on few of them.
    x_weights_, y_weights_ : ndarray of shape (d, k)
        Coordinates are ``(x - x_mean_) @ x_weights_``.
    x_loadings_, y_loadings_ : ndarray of shape (d, k)
        The way back: ``z @ x_loadings_.T + x_mean_``.
    x_mean_, y_mean_ : ndarray of shape (d,)
    n_components_ : int
    n_anchors_ : int
    """

    x_mean_: np.ndarray
    y_mean_: np.ndarray
    x_weights_: np.ndarray
    y_weights_: np.ndarray
    n_features_in_: int

    def __init__(self, n_components: Any = None, *, reg: Any = 1e-3):
        self.n_components = n_components
        self.reg = reg

    def fit(self, X, y, sample_weight=None) -> "CanonicalCorrelation":
        """Fit on anchors: row i of ``X`` (n, d_x) and row i of ``y`` (n, d_y) are two views of one item.

        Raises
        ------
        ValueError
            Row counts differ, fewer than two anchors, a value is not finite, a view is constant, or ``n_components`` or
            ``reg`` is out of its range.

        Warns
        -----
        UserWarning
            Fewer anchors than features of both views.
        """
        if hasattr(self, "_moments"):
            del self._moments
        self._gather(X, y, sample_weight, reset=True)
        if self._moments.n_rows < 2:
            raise ValueError("CanonicalCorrelation needs at least 2 anchors, got 1 sample")
        self._solve()
        warn_if_few(self._moments, 2)
        return self

    def partial_fit(self, X, y, sample_weight=None, *, solve=True) -> "CanonicalCorrelation":
        """Add anchors to those seen so far; equal to one :meth:`fit` on all of them.

        Parameters
        ----------
        solve : bool
            Solve for the subspaces now. False only gathers, which is cheap: the last batch must solve.

        Warns
        -----
        UserWarning
            It solves for fewer anchors than features of both views.
        """
        self._gather(X, y, sample_weight, reset=not hasattr(self, "_moments"))
        if solve:
            self._solve()
            warn_if_few(self._moments, 2)
        return self

    def _gather(self, X, y, sample_weight, *, reset: bool) -> None:
        check_kind(X, "X", 3)
        check_kind(y, "y", 3)
        X, Y = validate_data(self, X, y, reset=reset, multi_output=True, y_numeric=True, dtype=np.float64)
        Y = Y.reshape(len(Y), -1).astype(np.float64)
        check_squares(X, "X")
        check_squares(Y, "y")
        if reset:
            self._moments = PairedMoments(X.shape[1], Y.shape[1])
        self._moments.update(X, Y, checked_weights(sample_weight, len(X)))
        self.n_anchors_ = self._moments.n_rows

    def _solve(self) -> "CanonicalCorrelation":
        found = canonical_subspaces(self._moments, self.n_components, self.reg)
        for name, value in found._asdict().items():
            setattr(self, f"{name}_", value)
        self.n_components_ = self._n_features_out = len(found.correlations)
        return self

    def transform(self, X, y=None):
        """Return the coordinates of ``X`` (m, k), or of both views where ``y`` is given, in their own float width."""
        check_is_fitted(self, "x_weights_")
        X = validate_data(self, X, reset=False, dtype=FLOATS)
        left = _coordinates(X, self.x_mean_, self.x_weights_)
        return left if y is None else (left, self.transform_y(y))

    def transform_y(self, Y) -> np.ndarray:
        """Return the coordinates (m, k) of rows of the second view (m, d_y)."""
        check_is_fitted(self, "x_weights_")
        return _coordinates(checked_rows(Y, "y", len(self.y_mean_)), self.y_mean_, self.y_weights_)

    def inverse_transform(self, Z, view="x") -> np.ndarray:
        """Return the rows of a view that coordinates ``Z`` (m, k) stand for; what is outside the subspace is its mean.

        Exact where k is the rank of the view.

        Raises
        ------
        ValueError
            ``view`` is neither ``"x"`` nor ``"y"``, or the width is not k.
        """
        check_is_fitted(self, "x_weights_")
        _check_view(view)
        Z = checked_rows(Z, "Z", self.n_components_)
        loadings, mean = (getattr(self, f"{view}_{name}_").astype(Z.dtype) for name in ("loadings", "mean"))
        return Z @ loadings.T + mean

    def private_weights(self, view="x") -> np.ndarray:
        """Return weights (d, r - k) of what a view of rank r does not share: white, and uncorrelated with the shared.

        ``(x - x_mean_) @ private_weights("x")`` are coordinates of unit (regularised) variance.

        Raises
        ------
        ValueError
            ``view`` is neither ``"x"`` nor ``"y"``.
        """
        check_is_fitted(self, "x_weights_")
        _check_view(view)
        moments = self._moments
        cov = ridged((moments.cov_in if view == "x" else moments.cov_out) / moments.weight, self.reg)
        values, V = np.linalg.eigh(cov)
        kept = values > len(cov) * np.finfo(np.float64).eps * values[-1]
        values, V = values[kept], V[:, kept]
        shared = np.sqrt(values)[:, None] * (V.T @ getattr(self, f"{view}_weights_"))
        rest = np.linalg.svd(shared, full_matrices=True)[0][:, shared.shape[1] :]
        return (V / np.sqrt(values)) @ rest

    def score(self, X, y) -> float:
        """Return the mean correlation of the coordinates of paired rows, in [-1, 1]."""
        A, B = self.transform(X, y)
        return float(np.mean(coordinate_correlations(A, B)))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = tags.target_tags.multi_output = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def coordinate_correlations(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Correlate column i of ``A`` (n, k) with column i of ``B`` (n, k); 0 where one is constant."""
    A, B = (Z.astype(np.float64) - Z.mean(axis=0, dtype=np.float64) for Z in (A, B))
    norms = np.linalg.norm(A, axis=0) * np.linalg.norm(B, axis=0)
    return np.sum(A * B, axis=0) / np.where(norms > 0, norms, 1.0)


def checked_rows(rows: Any, name: str, width: int) -> np.ndarray:
    """Return finite float rows (m, width); one column may come as a flat array."""
    rows = np.asarray(rows)
    if rows.ndim == 1 and width == 1:
        rows = rows[:, None]
    rows = check_array(rows, dtype=FLOATS, input_name=name)
    if rows.shape[1] != width:
        raise ValueError(f"{name} must have {width} features, got {rows.shape[1]}")
    return rows


def _coordinates(X: np.ndarray, mean: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (X - mean.astype(X.dtype)) @ weights.astype(X.dtype)


def _check_view(view: str) -> None:
    if view not in VIEWS:
        raise ValueError(f"view must be 'x' or 'y', got {view!r}")
