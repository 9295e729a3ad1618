"""Match and retrieve across two embedding spaces trained apart, in the small subspaces in which they agree."""

from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data

from polyspan.linalg import PairedMoments

from ._aligner import Aligner
from ._checks import check_number, checked_weights
from ._pair_matching import Match, PairMatching, row_marks
from .canonical_correlation import (
    FLOATS,
    CanonicalSubspaces,
    all_subspaces,
    canonical_subspaces,
    checked_rows,
    warn_if_few,
)
from .local_alignment import AnchorProducts, linear_local_cka

__all__ = ["Match", "SubspaceAligner"]

METHODS = ("affine", "local_cka", "cosine")
SIZES = (2, 3, 5, 7, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500)
HELD_SHARE, MOST_HELD = 0.2, 1000
BLOCK_ROWS = 2**16


class SubspaceAligner(PairMatching, Aligner):
    r"""Join two spaces through the pair of subspaces in which paired anchors agree, and match or retrieve across.

    Canonical correlation (see :class:`CanonicalCorrelation`) gives coordinates a and b of both views, k of them, with
    correlations ρ. Three routes score a pair in these coordinates:

    - ``"affine"``: cosine of T(a) and b, where T is the least-squares map of the anchors' coordinates; without a ridge
      it is diag(ρ). It is not symmetric: the first view is carried to the second.
    - ``"local_cka"``: alignment of the anchors with the pair appended (see :func:`local_cka`), in closed form.
    - ``"cosine"``: cosine of :math:`\rho^{t/2} a` and :math:`\rho^{t/2} b`: direction i counts :math:`\rho_i^t`.

    :meth:`transform` carries rows of the first space to the second for any store that compares vectors there: T(a) is
    mapped back through the loadings of the second view. With all components and no ridge this is least squares; with
    fewer it is a least-squares map of rank k.

    It helps where much of the variance of either space is its own: raw local CKA then compares what is not shared.
    Where the shared part is wide and anchors are plenty, a full ridge map may find more: see :func:`choose_aligner`.
    k matters: few components lose detail, many are fitted to noise where anchors are few.

    Source: catalogue entry ``plato-3d``.

    Parameters
    ----------
    n_components : int, "auto", "all" or None, default=None
        Dimension k. ``"auto"`` holds a fifth of the anchors back and takes the k that ranks their partners best; None
        takes 50, or as many as there are.
    method : {"affine", "local_cka", "cosine"}, default="affine"
        Route of scores; it is read when scores are asked for, and can be set after the fit.
    reg : float, default=1e-3
        Ridge of the canonical correlation, as a share of each view's mean variance.
    rho_power : float, default=1.0
        t of the route ``"cosine"``; 0 leaves canonical coordinates as they are.
    normalize : bool, default=False
        Scale rows of both spaces to length 1 first.
    random_state : int, RandomState instance or None, default=0
        Which anchors ``"auto"`` holds back.

    Attributes
    ----------
    correlations_ : ndarray of shape (k,)
        In [0, 1], descending, on the anchors.
    x_mean_, x_weights_, x_loadings_ : ndarray of shape (d_A,), (d_A, k), (d_A, k)
        As in :class:`CanonicalCorrelation`; likewise ``y_`` for the second view.
    affine_ : ndarray of shape (k, k)
        T, acting on rows: ``a @ affine_``.
    gram_x_, gram_y_ : ndarray of shape (k, k)
        Sums of products of the anchors' coordinates, for local CKA.
    anchor_weight_ : float
        Sum of the anchors' weights, their number where none are given.
    anchor_marks_ : ndarray of shape (n_anchors_,), int64
        Sorted digests of the anchors' rows, by which :meth:`seen` knows them again.
    n_components_ : int
    n_anchors_ : int
    tried_ : list of (int, float)
        Of ``"auto"``: each k and the mean reciprocal rank of held-out partners, in [0, 1]. Not saved.
    """

    _arrays = (
        "x_mean_", "y_mean_", "x_weights_", "y_weights_", "x_loadings_", "y_loadings_", "correlations_", "affine_",
        "gram_x_", "gram_y_", "anchor_marks_",
    )  # fmt: skip
    _facts = ("n_components_", "anchor_weight_")

    x_mean_: np.ndarray
    y_mean_: np.ndarray
    x_weights_: np.ndarray
    y_weights_: np.ndarray
    x_loadings_: np.ndarray
    y_loadings_: np.ndarray
    correlations_: np.ndarray

    def __init__(
        self,
        n_components: Any = None,
        *,
        method="affine",
        reg: Any = 1e-3,
        rho_power: Any = 1.0,
        normalize=False,
        random_state=0,
    ):
        self.n_components = n_components
        self.method = method
        self.reg = reg
        self.rho_power = rho_power
        self.normalize = normalize
        self.random_state = random_state

    def fit(self, X, y, sample_weight=None) -> "SubspaceAligner":
        """Fit on anchors ``X`` (n, d_A) and ``y`` (n, d_B): row i of both is one item.

        Raises
        ------
        ValueError
            Row counts differ, fewer than two anchors, a value is not finite, a view is constant, or a parameter is out
            of its range.

        Warns
        -----
        UserWarning
            Fewer anchors than features of both views.
        """
        super().fit(X, y, sample_weight)
        return self

    def partial_fit(self, X, y, sample_weight=None, *, solve=True) -> "SubspaceAligner":
        """Add anchors to those seen so far; equal to one :meth:`fit` on all of them.

        Parameters
        ----------
        solve : bool
            Solve for the subspaces now. False only gathers, which is cheap: the last batch must solve.

        Raises
        ------
        ValueError
            As :meth:`fit`; ``n_components="auto"``, which needs all anchors at once; or the subspaces were read from a
            file, where the anchors' moments are not kept.

        Warns
        -----
        UserWarning
            It solves for fewer anchors than features of both views.
        """
        self._check_parameters()
        if self.n_components == "auto":
            raise ValueError("n_components must be a number or None for partial_fit, got 'auto'")
        vars(self).pop("tried_", None)
        first = not hasattr(self, "_moments")
        if first and hasattr(self, "x_weights_"):
            raise ValueError(
                f"partial_fit must go on from anchors seen in this process, got subspaces of {self.n_anchors_} anchors "
                "read from a file, which keeps none of them: fit anew"
            )
        X, Y, weights = self._anchors(X, y, sample_weight, reset=first)
        if first:
            self._start(X, Y)
        self._add(X, Y, weights)
        if solve:
            self._solve(self.n_components)
            warn_if_few(self._moments, 2)
        return self

    def _fit_rows(self, X, Y, weights) -> None:
        self._check_parameters()
        vars(self).pop("tried_", None)
        weights = checked_weights(weights, len(X))
        self._start(X, Y)
        self._add(X, Y, weights)
        self._solve(self._best_size(X, Y, weights) if self.n_components == "auto" else self.n_components)
        warn_if_few(self._moments, 4)

    def _start(self, X, Y) -> None:
        self._moments = PairedMoments(X.shape[1], Y.shape[1])
        self.anchor_marks_ = np.zeros(0, dtype=np.int64)

    def _add(self, X, Y, weights) -> None:
        self._moments.update(X, Y, weights)
        self.n_anchors_ = self._moments.n_rows
        self.anchor_marks_ = np.sort(np.concatenate([self.anchor_marks_, row_marks(X)]))

    def _solve(self, k: Any) -> None:
        self._take(canonical_subspaces(self._moments, k, self.reg), self._moments)

    def _take(self, found: CanonicalSubspaces, moments: PairedMoments) -> None:
        """Fill in all that scoring needs, from k-by-k matrices."""
        for name, value in found._asdict().items():
            setattr(self, f"{name}_", value)
        self.n_components_ = len(found.correlations)
        self.anchor_weight_ = float(moments.weight)
        self.gram_x_ = found.x_weights.T @ moments.cov_in @ found.x_weights
        self.gram_y_ = found.y_weights.T @ moments.cov_out @ found.y_weights
        self.affine_ = np.linalg.solve(self.gram_x_, moments.weight * np.diag(found.correlations))

    def _best_size(self, X, Y, weights) -> int:
        """Rank partners among anchors held back, for each k of one solution on the others."""
        if len(X) < 10:
            raise ValueError(f"n_components='auto' needs at least 10 anchors, got {len(X)}")
        order = check_random_state(self.random_state).permutation(len(X))
        held, kept = np.split(order, [min(MOST_HELD, max(2, int(HELD_SHARE * len(X))))])
        moments = PairedMoments(X.shape[1], Y.shape[1]).update(X[kept], Y[kept], _some(weights, kept))
        whole = all_subspaces(moments, self.reg)
        limit = min(len(whole.correlations), max(SIZES))
        trial = SubspaceAligner(method=self.method, reg=self.reg, rho_power=self.rho_power)
        sizes = sorted({k for k in SIZES if k < limit} | {limit})
        self.tried_ = []
        for k in sizes:
            trial._take(whole.first(k), moments)
            scores = trial._scores(trial._coordinates(X[held], "x"), trial._coordinates(Y[held], "y"))
            own = np.diag(scores)[:, None]
            ranks = np.sum(scores > own, axis=1) + (np.sum(scores == own, axis=1) + 1) / 2
            self.tried_.append((k, float(np.mean(1 / ranks))))
        return max(self.tried_, key=lambda row: (row[1], -row[0]))[0]

    def _apply(self, X):
        carried = self._coordinates(X, "x") @ self.affine_.astype(X.dtype)
        return carried @ self.y_loadings_.astype(X.dtype).T + self.y_mean_.astype(X.dtype)

    def inverse_transform(self, Z) -> np.ndarray:
        """Return rows of space B as seen from space A: the least-squares map of rank k the other way round.

        It is no inverse of :meth:`transform`: what both lose, neither gives back. With ``normalize=True`` rows are
        scaled to length 1 first, and lengths are not restored.
        """
        check_is_fitted(self)
        Z = checked_rows(Z, "Z", self._n_features_out)
        back = np.linalg.solve(self.gram_y_, self.anchor_weight_ * np.diag(self.correlations_)).astype(Z.dtype)
        carried = self._coordinates(self._directions(Z, "Z"), "y") @ back
        return carried @ self.x_loadings_.astype(Z.dtype).T + self.x_mean_.astype(Z.dtype)

    def transform_x(self, X) -> np.ndarray:
        """Return canonical coordinates (m, k) of rows of the first space, in their own float width."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=FLOATS)
        return self._coordinates(self._directions(X), "x")

    def transform_y(self, Y) -> np.ndarray:
        """Return canonical coordinates (m, k) of rows of the second space, in their own float width."""
        check_is_fitted(self)
        Y = checked_rows(Y, "y", self._n_features_out)
        return self._coordinates(self._directions(Y, "y"), "y")

    def _coordinates(self, rows: np.ndarray, view: str) -> np.ndarray:
        mean, weights = (getattr(self, f"{view}_{name}_").astype(rows.dtype) for name in ("mean", "weights"))
        if len(rows) <= BLOCK_ROWS:
            return (rows - mean) @ weights
        made = np.empty((len(rows), weights.shape[1]), dtype=rows.dtype)
        for start in range(0, len(rows), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            made[part] = (rows[part] - mean) @ weights
        return made

    def _directed(self, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return coordinates whose cosine is the score, for the two routes that have such."""
        if self.method == "local_cka":
            return None
        if self.method == "affine":
            return A @ self.affine_.astype(A.dtype), B
        scale = self.correlations_ ** (self.rho_power / 2)
        return A * scale.astype(A.dtype), B * scale.astype(B.dtype)

    def _scores(self, A: np.ndarray, B: np.ndarray) -> np.ndarray:
        if self.method == "local_cka":
            cross = self.anchor_weight_ * np.diag(self.correlations_)
            anchors = AnchorProducts(self.anchor_weight_, cross, self.gram_x_, self.gram_y_)
            return linear_local_cka(anchors, A, B)
        return super()._scores(A, B)

    def __sklearn_is_fitted__(self) -> bool:
        # Anchors that are only gathered make no subspaces yet.
        return hasattr(self, "x_weights_")

    def _check_parameters(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be 'affine', 'local_cka' or 'cosine', got {self.method!r}")
        if isinstance(self.n_components, str) and self.n_components not in ("auto", "all"):
            raise ValueError(f"n_components must be a number, 'auto', 'all' or None, got {self.n_components!r}")
        check_number("rho_power", self.rho_power)


def _some(weights: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if weights is None else weights[rows]
