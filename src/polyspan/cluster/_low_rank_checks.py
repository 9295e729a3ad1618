"""What a mixture of low-rank Gaussians is given: parameters of a fit, or finished components."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

ALGORITHMS, STARTS = ("em", "ksubspaces", "denoising"), ("kmeans", "random", "ssc")
CLOSE = 1e-3


def check_parameters(estimator: Any, shape: tuple[int, int]) -> None:
    """Refuse parameters of an estimator that are out of range for rows of a shape."""
    for name in ("n_components", "n_init", "max_iter"):
        value = getattr(estimator, name)
        if not is_whole(value) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    for name, allowed in (("algorithm", ALGORITHMS), ("init", STARTS), ("spectrum", ("free", "identity"))):
        if getattr(estimator, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(estimator, name)!r}")
    for name in ("tol", "reg"):
        if not isinstance(getattr(estimator, name), Real) or not 0 < getattr(estimator, name) < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {getattr(estimator, name)!r}")
    noise: Any = estimator.noise
    if noise != "isotropic" and not (isinstance(noise, Real) and 0 < float(noise) < math.inf):
        raise ValueError(f"noise must be 'isotropic' or a standard deviation above 0, got {noise!r}")
    n, D = shape
    if estimator.n_components > n:
        raise ValueError(f"n_components must be at most n_samples={n}, got {estimator.n_components}")
    if isinstance(estimator.rank, str):
        if estimator.rank not in ("auto", "bic"):
            raise ValueError(f"rank must be whole numbers, 'auto' or 'bic', got {estimator.rank!r}")
        return
    several = isinstance(estimator.rank, Sequence | np.ndarray)
    ranks: list[Any] = list(estimator.rank) if several else [estimator.rank]
    if several and len(ranks) != estimator.n_components:
        raise ValueError(f"rank must have one number for each of {estimator.n_components} components, got {len(ranks)}")
    for rank in ranks:
        if not is_whole(rank) or not 1 <= rank <= D - 1:
            raise ValueError(f"rank must be between 1 and n_features - 1 = {D - 1}, got {rank!r}")


def check_parts(parts: dict[str, np.ndarray]) -> None:
    """Refuse components that make no density."""
    if parts["bases_"].ndim != 3 or 0 in parts["bases_"].shape:
        raise ValueError(f"bases must have shape (K, D, d), got {parts['bases_'].shape}")
    K, D, d = parts["bases_"].shape
    shapes = {"spectra_": (K, d), "means_": (K, D), "weights_": (K,), "noise_variance_": (K,)}
    for name, part in parts.items():
        word = name.removesuffix("_")
        if part.shape != shapes.get(name, part.shape):
            raise ValueError(f"{word} must have shape {shapes[name]}, got {part.shape}")
        if not np.isfinite(part).all():
            raise ValueError(f"{word} must be finite, got NaN or infinity")
        if name in ("spectra_", "weights_", "noise_variance_") and not (part >= 0).all():
            raise ValueError(f"{word} must be at least 0, got {part.min():g}")
    U = parts["bases_"]
    filled = np.square(U).sum(axis=1, keepdims=True) > 0.5
    off = float(np.abs(U.transpose(0, 2, 1) @ U - np.eye(d) * filled).max())
    if off > CLOSE:
        raise ValueError(f"bases must have orthonormal columns, or zeros, got products off by {off:.2g}")
    if abs(parts["weights_"].sum() - 1) > CLOSE:
        raise ValueError(f"weights must add up to 1, got {parts['weights_'].sum():g}")


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number, which True is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)
