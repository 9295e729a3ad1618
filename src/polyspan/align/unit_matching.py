"""Which unit of one network is which unit of another: correlations gathered in one pass, and matchings on them."""

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment

from ._checks import check_count, finite_rows

METHODS = ("bipartite", "semi", "greedy")


class UnitCorrelations(NamedTuple):
    """Correlations of the units of two networks, in [-1, 1]; NaN in the row and the column of a dead unit.

    ``between`` (d_A, d_B), ``within_in`` (d_A, d_A), ``within_out`` (d_B, d_B); ``live_in`` and ``live_out`` are False
    for units that never vary, ``n_rows`` is the number of rows seen.
    """

    between: np.ndarray
    within_in: np.ndarray
    within_out: np.ndarray
    live_in: np.ndarray
    live_out: np.ndarray
    n_rows: int


class UnitMatching(NamedTuple):
    """Partner of every unit of the first network.

    ``indices`` (d_A,) int64 holds the unit of the second network, -1 where there is none; ``scores`` (d_A,) the signed
    correlation with it, NaN where there is none. ``unmatched_in`` and ``unmatched_out`` list the live units that have
    no partner, or whom nobody chose.
    """

    indices: np.ndarray
    scores: np.ndarray
    unmatched_in: np.ndarray
    unmatched_out: np.ndarray


def deviations(sums: np.ndarray, mean: np.ndarray, weight: float) -> np.ndarray:
    """Return standard deviations (d,) from sums of squares about the mean; 0 for units that vary by rounding only."""
    spread = np.sqrt(np.maximum(sums, 0.0) / weight)
    return np.where(spread > 1e-12 * np.abs(mean), spread, 0.0)


def unit_correlations(moments: Any) -> UnitCorrelations:
    r"""Correlate all units of two networks from second moments gathered in one pass.

    :math:`c_{ij} = E[(x_i-\mu_i)(y_j-\nu_j)]/(\sigma_i\sigma_j)`. A unit that never varies has no correlation: it is
    NaN, and marked as dead. With positions of an image as rows, rows are not independent: the error of a correlation
    is that of the number of images, not of rows.
    Source: catalogue entry ``convergent-learning``.

    Parameters
    ----------
    moments : PairedMoments
        Of the activations of both networks on the same inputs; see :class:`polyspan.linalg.PairedMoments`.

    Raises
    ------
    ValueError
        Fewer than two rows were seen, or the moments are not finite.
    """
    if not moments.n_rows >= 2 or not moments.weight > 0:
        raise ValueError(f"moments must have seen at least 2 rows, got {moments.n_rows} sample")
    parts = (moments.cov_in, moments.cross, moments.cov_out, moments.mean_in, moments.mean_out)
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError("moments must be finite, got NaN or infinity: an activation is not finite, or overflows")
    s = deviations(np.diag(moments.cov_in), moments.mean_in, moments.weight)
    t = deviations(np.diag(moments.cov_out), moments.mean_out, moments.weight)
    return UnitCorrelations(
        _scaled(moments.cross / moments.weight, s, t),
        _scaled(moments.cov_in / moments.weight, s, s),
        _scaled(moments.cov_out / moments.weight, t, t),
        s > 0,
        t > 0,
        int(moments.n_rows),
    )


def _scaled(products: np.ndarray, s: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Divide by both deviations, one by one since their product may underflow; NaN where one is 0."""
    rows, columns = (np.where(x > 0, x, np.nan) for x in (s, t))
    return np.clip(products / rows[:, None] / columns, -1.0, 1.0)


def match_units(between: Any, *, method: str = "bipartite", absolute: bool = False) -> UnitMatching:
    r"""Give every unit of one network its partner in another, from their correlations.

    * ``"bipartite"``: the one-to-one assignment with the largest sum of correlations (Hungarian). A unit may lose its
      favourite to another that needs it more.
    * ``"semi"``: every unit takes its favourite; partners may be shared.
    * ``"greedy"``: one to one, the strongest pair first; quicker, and its sum is never larger.

    The gap between ``"semi"`` and ``"bipartite"`` shows units that several others resemble. Every matching finds
    partners in noise too: compare with shuffled rows, see :func:`compare_networks`.
    Source: catalogue entry ``convergent-learning``.

    Parameters
    ----------
    between : array of shape (d_A, d_B)
        Correlations, or any score where more is more alike. A row or column that is all NaN is a dead unit and gets
        no partner.
    method : {"bipartite", "semi", "greedy"}
    absolute : bool
        Match by magnitude, so that a unit may be the negative of its partner; scores keep their sign.

    Raises
    ------
    ValueError
        The array is no matrix, infinite, or NaN in a row and column that are not.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    given = np.asarray(between)
    if given.dtype.kind not in "fiub":
        raise ValueError(f"between must hold real numbers, got {given.dtype}")
    scores = given.astype(np.float64)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"between must have shape (d_A, d_B) with both at least 1, got {scores.shape}")
    missing = np.isnan(scores)
    live_in, live_out = ~missing.all(axis=1), ~missing.all(axis=0)
    alive = scores[np.ix_(live_in, live_out)]
    if not np.isfinite(alive).all():
        raise ValueError("between must be finite but for whole rows or columns of NaN, got others")
    rows, columns = np.flatnonzero(live_in), np.flatnonzero(live_out)
    wanted = np.abs(alive) if absolute else alive
    if not alive.size:
        chosen = np.zeros((2, 0), dtype=np.intp)
    elif method == "bipartite":
        chosen = np.stack(linear_sum_assignment(wanted, maximize=True))
    elif method == "semi":
        chosen = np.stack([np.arange(len(rows)), wanted.argmax(axis=1)])
    else:
        chosen = _greedy(wanted)
    indices = np.full(len(scores), -1, dtype=np.int64)
    found = np.full(len(scores), np.nan)
    indices[rows[chosen[0]]] = columns[chosen[1]]
    found[rows[chosen[0]]] = alive[chosen[0], chosen[1]]
    return UnitMatching(indices, found, np.setdiff1d(rows, rows[chosen[0]]), np.setdiff1d(columns, columns[chosen[1]]))


def _greedy(wanted: np.ndarray) -> np.ndarray:
    """Return rows and columns (2, min) of pairs taken from the strongest down; ties go to the lower unit."""
    free_rows, free_columns = np.ones(wanted.shape[0], bool), np.ones(wanted.shape[1], bool)
    pairs: list[tuple[int, int]] = []
    for flat in np.argsort(-wanted, axis=None, kind="stable"):
        i, j = divmod(int(flat), wanted.shape[1])
        if free_rows[i] and free_columns[j]:
            free_rows[i] = free_columns[j] = False
            pairs.append((i, j))
            if len(pairs) == min(wanted.shape):
                break
    return np.array(pairs, dtype=np.intp).T


def unit_mutual_information(X: Any, Y: Any, *, n_bins: int = 16) -> np.ndarray:
    r"""Mutual information of every unit of one network with every unit of another, in nats: (d_A, d_B).

    Sees likeness that no line describes, where the correlation is 0. Units are cut at quantiles into at most
    ``n_bins`` bins (fewer where many values are equal, as after a ReLU). Histograms overestimate by about
    :math:`(b_x-1)(b_y-1)/2n`, which is taken off; estimates of independent units then scatter about 0, below it too.
    Give it to :func:`match_units` in place of correlations. Memory grows with d_A d_B n_bins².
    Source: catalogue entry ``convergent-learning``; Miller 1955 for the correction.

    Parameters
    ----------
    X, Y : arrays of shape (n, d_A) and (n, d_B)
        Row i of both is the same input.
    n_bins : int
        At least 2.

    Raises
    ------
    ValueError
        Row counts differ, or a value is not finite.
    """
    X, Y = np.asarray(X), np.asarray(Y)
    if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y) or 0 in (*X.shape, *Y.shape):
        raise ValueError(f"X and Y must have shapes (n, d_A) and (n, d_B) with one n, got {X.shape} and {Y.shape}")
    check_count("n_bins", n_bins, 2)
    X, Y = finite_rows(X, "X"), finite_rows(Y, "Y")
    n, (A, used_a), (B, used_b) = len(X), _binned(X, n_bins), _binned(Y, n_bins)
    joint = np.asarray((A.T @ B).todense(), dtype=np.float64).reshape(X.shape[1], n_bins, Y.shape[1], n_bins) / n
    p, q = joint.sum(axis=3)[:, :, :1], joint.sum(axis=1)[:1]
    chance = p[:, :, :, None] * q[:, None]
    logs = np.log(joint / np.where(chance > 0, chance, 1.0), out=np.zeros_like(joint), where=joint > 0)
    return np.einsum("ibjc,ibjc->ij", joint, logs) - np.outer(used_a - 1, used_b - 1) / (2 * n)


def _binned(X: np.ndarray, n_bins: int) -> tuple[sp.csr_array, np.ndarray]:
    """Return the indicator (n, d * n_bins) of each unit's bin, and how many bins each unit (d,) uses."""
    n, d = X.shape
    cuts = np.quantile(X, np.linspace(0, 1, n_bins + 1)[1:-1], axis=0)
    bins = np.stack([np.searchsorted(np.unique(cuts[:, j]), X[:, j]) for j in range(d)], axis=1)
    columns = (bins + n_bins * np.arange(d)).ravel()
    used = np.array([len(np.unique(bins[:, j])) for j in range(d)])
    return sp.csr_array((np.ones(n * d), columns, np.arange(0, n * d + 1, d)), shape=(n, d * n_bins)), used
