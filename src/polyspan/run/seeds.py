"""Seeds and generators: chance is passed in, never global."""

import contextlib
from collections.abc import Generator
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


@contextlib.contextmanager
def layers_draw_from(generator: Any, device: Any = "cpu") -> Generator[None]:
    """Let what draws from torch's global generator, such as new layers or dropout, draw from ``generator`` instead.

    The global generator is put back at the end, and ``generator``, one of the CPU, has gone on by what was drawn there.
    On a CUDA ``device`` the global generator begins at the seed of ``generator``.
    """
    import torch

    device = torch.device(device)
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.random.set_rng_state(generator.get_state())
        if cuda:
            torch.cuda.manual_seed(generator.initial_seed())
        yield
        generator.set_state(torch.random.get_rng_state())
