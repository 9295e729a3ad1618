"""Seeds and generators: chance is passed in, never global."""

from typing import Any

import numpy as np


def spawn_seeds(seed: int, n: int) -> list[int]:
    """Return ``n`` independent seeds in [0, 2**32) that follow from one by ``numpy.random.SeedSequence``.

    The first k of n seeds are those that ``spawn_seeds(seed, k)`` returns, so more trials can be added to those done.
    Every library takes them: NumPy, torch and scikit-learn's ``random_state``.

    Raises
    ------
    ValueError
        ``seed`` or ``n`` is negative.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    return [int(child.generate_state(1)[0]) for child in np.random.SeedSequence(seed).spawn(n)]


def numpy_generator(seed: int | np.random.Generator | None) -> np.random.Generator:
    """Return a NumPy generator from a seed; a generator passes through, None draws fresh entropy."""
    return np.random.default_rng(seed)


def torch_generator(seed: int, device: Any = "cpu") -> Any:
    """Return a torch generator on ``device``, seeded; torch's global generator is not touched."""
    import torch

    return torch.Generator(device=device).manual_seed(seed)
