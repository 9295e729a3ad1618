"""Affine maps by ridge regression, from rows or from streamed moments."""

from typing import Any, NamedTuple

import numpy as np

from .moments import PairedMoments


class RidgeFit(NamedTuple):
    """The map ``(x - mean_in) @ weights + mean_out``; ``alpha`` is the penalty that was used."""

    weights: np.ndarray
    mean_in: np.ndarray
    mean_out: np.ndarray
    alpha: float


ALPHAS = tuple(10.0**e for e in range(-4, 4))


def ridge_map(X: Any, Y: Any, *, alpha: float | str = "gcv", shift: bool = True, weights: Any = None) -> RidgeFit:
    r"""Solve :math:`\min_W \lVert X W - Y \rVert_F^2 + \alpha \lVert W \rVert_F^2` on centred rows.

    Parameters
    ----------
    X, Y : arrays of shape (n, d_in) and (n, d_out)
    alpha : float or "gcv"
        Penalty, in the squared units of X; ``"gcv"`` takes the one of eight powers of ten, relative to the mean
        eigenvalue of XᵀX, with the least generalised cross-validation error.
    shift : bool
        Centre both sides.
    weights : array of shape (n,), optional

    Raises
    ------
    ValueError
        Shapes differ or alpha is negative.
    """
    moments = PairedMoments(X.shape[1], Y.shape[1]).update(X, Y, weights)
    return ridge_from_moments(moments, alpha=alpha, shift=shift)


def ridge_from_moments(moments: PairedMoments, *, alpha: float | str = "gcv", shift: bool = True) -> RidgeFit:
    r"""Fit as :func:`ridge_map` from streamed moments: one eigendecomposition of XᵀX serves every alpha.

    The generalised cross-validation error of alpha is :math:`n\,\mathrm{RSS}(\alpha) / (n - \mathrm{df}(\alpha))^2`; it
    needs the second moments of Y. Where n <= df, that is, where the fit interpolates, the alpha is passed over.
    """
    used = moments if shift else moments.uncentred()
    values, vectors = np.linalg.eigh(used.cov_in)
    values = np.clip(values, 0.0, None)
    turned = vectors.T @ used.cross
    n = moments.weight - (1.0 if shift else 0.0)
    if alpha == "gcv":
        if not moments.keep_cov_out:
            raise ValueError("alpha='gcv' needs moments with keep_cov_out=True, got moments without")
        unit = values.mean() or 1.0
        candidates = [a * unit for a in ALPHAS]
        alpha = min(candidates, key=lambda a: _gcv(a, values, turned, float(np.trace(used.cov_out)), n))
    if isinstance(alpha, str) or not alpha >= 0:
        raise ValueError(f"alpha must be non-negative or 'gcv', got {alpha!r}")
    shrunk = values + alpha
    inverse = np.divide(1.0, shrunk, out=np.zeros_like(shrunk), where=shrunk > values[-1] * len(values) * 1e-16)
    return RidgeFit(vectors @ (inverse[:, None] * turned), used.mean_in, used.mean_out, float(alpha))


def _gcv(alpha: float, values: np.ndarray, turned: np.ndarray, total: float, n: float) -> float:
    gain = np.sum(turned**2, axis=1)
    shrink = 1.0 / (values + alpha)
    rss = total - np.sum(gain * (2 * shrink - values * shrink**2))
    free = n - np.sum(values * shrink)
    return np.inf if free <= 0 else n * max(rss, 0.0) / free**2
