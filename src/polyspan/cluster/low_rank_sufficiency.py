"""Are there enough samples for the dimension? Subspaces of two halves of the rows are compared."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.utils import check_array, check_random_state

from polyspan.linalg import subspace_distance
from polyspan.run import progress

from .low_rank_mixture import LowRankGaussianMixture


class Sufficiency(NamedTuple):
    """Agreement of subspaces of two halves, by the number of rows in a half.

    ``rows`` (m,) in a half; ``per_dimension`` (m,) is rows / (K d); ``agreement`` (m,) in [0, 1] the mean over repeats
    of 1 less the error of the worst subspace; ``trials`` (m, repeats); ``chance`` the agreement of random subspaces.
    """

    rows: np.ndarray
    per_dimension: np.ndarray
    agreement: np.ndarray
    trials: np.ndarray
    chance: float


def subspace_errors(bases: Any, reference: Any) -> np.ndarray:
    r"""Return how far each reference subspace is from the one that is matched with it, (K,), in [0, 1].

    :math:`\lVert UU^\top - VV^\top\rVert_F / \sqrt{2d}`, with subspaces matched one to one so that the squares sum to
    the least. Random subspaces of small d in a large D are nearly 1 apart.

    Parameters
    ----------
    bases, reference : arrays of shape (K, D, d)
        Orthonormal columns.

    Raises
    ------
    ValueError
        Shapes differ.
    """
    found, true = np.asarray(bases, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if found.ndim != 3 or found.shape != true.shape:
        raise ValueError(f"bases and reference must have one shape (K, D, d), got {found.shape} and {true.shape}")
    away = subspace_distance(true[:, None], found[None], metric="projection-frobenius") / np.sqrt(2 * found.shape[2])
    own, other = linear_sum_assignment(away**2)
    return away[own, other]


def sample_sufficiency(
    X: Any,
    rank: int,
    n_components: int = 1,
    *,
    sizes: Sequence[int] | None = None,
    n_repeats: int = 5,
    label: str = "",
    random_state: Any = None,
    **options: Any,
) -> Sufficiency:
    """Measure whether rows are enough for subspaces of a dimension: fit two halves that share no row, and compare.

    Where rows are too few, or the model does not fit, the halves find different subspaces. Agreement is no proof of
    truth: a model that is wrong in the same way on both halves agrees with itself. Rows that are not independent, such
    as frames of one film, agree too well.

    Parameters
    ----------
    X : array of shape (n, D)
    rank, n_components : int
        d and K.
    sizes : sequence of int, optional
        Rows in a half; by default from K d to n / 2 in eight steps of equal ratio.
    n_repeats : int
        Random pairs of halves for each size.
    label : str
        Shown with progress on stderr; empty shows nothing.
    **options
        Of :class:`LowRankGaussianMixture`; K-subspaces from random bases where not given.

    Raises
    ------
    ValueError
        A size is above half of the rows, or below what a fit needs.
    """
    X = check_array(X, dtype=[np.float64, np.float32])
    n, D = X.shape
    if not 1 <= rank < D:
        raise ValueError(f"rank must be between 1 and n_features - 1 = {D - 1}, got {rank}")
    if n_components < 1 or n_repeats < 1:
        raise ValueError(f"n_components and n_repeats must be at least 1, got {n_components} and {n_repeats}")
    least = max(2, n_components)
    if sizes is None:
        start = min(max(least, n_components * rank), n // 2)
        sizes = np.unique(np.geomspace(start, n // 2, 8).round().astype(int)).tolist()
    if not len(sizes) or min(sizes) < least or max(sizes) > n // 2:
        raise ValueError(f"sizes must lie between {least} and half of the rows, {n // 2}, got {list(sizes)}")
    rng = check_random_state(random_state)
    options = {"algorithm": "ksubspaces", "init": "random"} | options
    trials = np.zeros((len(sizes), n_repeats))
    plan = [(i, r) for i in range(len(sizes)) for r in range(n_repeats)]
    for i, r in progress(plan, label=label):
        order = rng.permutation(n)[: 2 * sizes[i]]
        halves = []
        for rows in np.split(order, 2):
            fitted = LowRankGaussianMixture(n_components, rank, random_state=rng.randint(2**31 - 1), **options)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="component .* has .* rows for")
                halves.append(fitted.fit(X[rows]).bases_)
        trials[i, r] = 1 - subspace_errors(*halves).max()
    draw = np.random.default_rng(rng.randint(2**31 - 1))
    pairs = [np.linalg.qr(draw.normal(size=(2, n_components, D, rank)))[0] for _ in range(20)]
    chance = float(np.mean([1 - subspace_errors(*pair).max() for pair in pairs]))
    counts = np.array(sizes)
    return Sufficiency(counts, counts / (n_components * rank), trials.mean(axis=1), trials, chance)
