"""What a picture of a fitted mixture shows beside its spectra: ranks along the noise, and agreement of two halves."""

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state

from .denoiser_jacobian import RankProfile, rank_profile
from .low_rank_denoiser import LowRankDenoiser, noise_levels
from .low_rank_sufficiency import Sufficiency, sample_sufficiency

MAX_ROWS, N_LEVELS, N_SIZES, FULL_SIDE = 4_000, 9, 5, 256


def mixture_profile(mixture: Any, *, seed: int = 0, label: str = "") -> RankProfile:
    """Follow the mixture's own denoiser from noise to samples, at levels from 20 to 1/100 of its widest direction.

    Parameters
    ----------
    mixture : LowRankGaussianMixture
        Fitted.
    seed : int
        Of the trajectories' starts.
    label : str
        Shown with progress on stderr; empty shows nothing.
    """
    widest = float(np.sqrt((mixture.spectra_.max(axis=1) + mixture.noise_variance_).max()))
    levels = noise_levels(N_LEVELS, sigma_min=0.01 * widest, sigma_max=20 * widest)[:-1]
    D = mixture.bases_.shape[1]
    k = None if D <= FULL_SIDE else min(D, int(sum(mixture.ranks_)) + 8)
    model = LowRankDenoiser.from_mixture(mixture)
    generator = torch.Generator().manual_seed(seed)
    return rank_profile(
        model, levels.tolist(), 4, shape=(D,), k=k, dtype=torch.float64, generator=generator, label=label
    )


def mixture_sufficiency(mixture: Any, X: np.ndarray, *, seed: int = 0, label: str = "") -> Sufficiency | None:
    """Fit halves of at most 4,000 drawn rows at the mixture's mean rank, and compare; None where rows are too few.

    Parameters
    ----------
    mixture : LowRankGaussianMixture
        Fitted.
    X : array of shape (n, D)
        The rows that were fitted.
    seed : int
        Of the draws.
    label : str
        Shown with progress on stderr; empty shows nothing.
    """
    rng = check_random_state(seed)
    drawn = X[np.sort(rng.permutation(len(X))[:MAX_ROWS])]
    K, rank = len(mixture.ranks_), max(1, round(float(np.mean(mixture.ranks_))))
    least, most = max(2, K * (rank + 1)), len(drawn) // 2
    if least > most:
        return None
    sizes = np.unique(np.geomspace(least, most, N_SIZES).round().astype(int)).tolist()
    options = {"center": mixture.center, "random_state": rng, "label": label}
    with warnings.catch_warnings():
        # The fit that is pictured has said so.
        warnings.filterwarnings("ignore", message="the mean of X holds")
        return sample_sufficiency(drawn, rank, K, sizes=sizes, n_repeats=3, **options)
