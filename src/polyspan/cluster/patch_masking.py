"""Which patches of an image a network has to guess."""

import math

import torch
from torch import Tensor

ASPECT = 0.3
"""Visible blocks are between this and its inverse as high as wide."""


def block_mask(h: int, w: int, n_masked: int, generator: torch.Generator | None = None) -> Tensor:
    """Mask all of a grid but one block: True (h, w) where a patch is hidden, exactly ``n_masked`` times.

    The visible block has a log-uniform aspect, clipped to what fits, and a uniform place. Corners are hidden far more
    often than the middle; :func:`cyclic_mask` hides all alike. Source: catalogue entry ``franca``.

    Parameters
    ----------
    h, w : int
        The grid.
    n_masked : int
        Within 0 .. h w.
    generator : Generator, optional
        On the CPU; left out, torch's own.
    """
    if h < 1 or w < 1:
        raise ValueError(f"h and w must be at least 1, got {h} and {w}")
    if not 0 <= n_masked <= h * w:
        raise ValueError(f"n_masked must lie in 0 .. {h * w}, got {n_masked}")
    mask = torch.ones(h, w, dtype=torch.bool)
    seen = h * w - n_masked
    if seen == 0:
        return mask
    draw = torch.rand(3, generator=generator).tolist()
    aspect = math.exp((2 * draw[0] - 1) * math.log(1 / ASPECT))
    high = min(max(round(math.sqrt(seen * aspect)), -(-seen // w)), h, seen)
    wide = -(-seen // high)
    top, left = int(draw[1] * (h - high + 1)), int(draw[2] * (w - wide + 1))
    block = torch.arange(high * wide).reshape(high, wide) >= seen
    mask[top : top + high, left : left + wide] = block
    return mask


def cyclic_mask(h: int, w: int, n_masked: int, generator: torch.Generator | None = None) -> Tensor:
    """Mask all of a grid but one block that may run over its edges: every patch is hidden equally often.

    A :func:`block_mask`, rolled by uniform shifts along both sides. Source: catalogue entry ``franca``.

    Parameters
    ----------
    h, w : int
        The grid.
    n_masked : int
        Within 0 .. h w; so many patches are True in the result (h, w).
    generator : Generator, optional
        On the CPU; left out, torch's own.
    """
    mask = block_mask(h, w, n_masked, generator)
    down, right = torch.rand(2, generator=generator).tolist()
    return mask.roll((int(down * h), int(right * w)), (0, 1))


def mask_batch(
    b: int,
    grid: tuple[int, int],
    *,
    kind: str,
    ratio: tuple[float, float],
    probability: float,
    generator: torch.Generator,
) -> Tensor:
    """Draw masks (b, h w) for a batch: a share of the images, each with a ratio from a slice of its own, shuffled."""
    make = cyclic_mask if kind == "cyclic" else block_mask
    h, w = grid
    count = max(1, int(b * probability))
    masks = torch.zeros(b, h * w, dtype=torch.bool)
    low, high = ratio
    places = torch.randperm(b, generator=generator)[:count].tolist()
    for number, (place, u) in enumerate(zip(places, torch.rand(count, generator=generator).tolist(), strict=True)):
        share = low + (high - low) * (number + u) / count
        # One patch at least is hidden, and one is left to guess from.
        n_masked = min(max(1, int(h * w * share)), h * w - 1)
        masks[place] = make(h, w, n_masked, generator).flatten()
    return masks
