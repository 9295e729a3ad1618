"""The magnitude that a share of all entries reaches, counted over tensors that are streamed."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._merge_states import BLOCK


def largest_share(tensors: Callable[[], Iterator[Tensor]], share: float) -> float:
    """Return the magnitude that the given share of all entries reaches, exactly, in passes over streamed tensors.

    Magnitudes in float32 order as their bits do: one pass counts the upper 16 bits, the next the lower 16 of those in
    which the limit lies.
    """
    upper = magnitude_counts(tensors())
    if int(upper.sum()) == 0:
        return 0.0
    high, rank = ranked_bin(upper, share_rank(upper, share))
    low, _ = ranked_bin(magnitude_counts(tensors(), high), rank)
    return magnitude(high, low)


def magnitude_counts(tensors: Iterator[Tensor], high: int | None = None) -> Tensor:
    """Count (65,536,) the upper 16 bits of magnitudes in float32, or the lower 16 of those whose upper are ``high``."""
    total = torch.zeros(2**16, dtype=torch.int64)
    for tensor in tensors:
        for block in tensor.detach().flatten().split(BLOCK):
            bits = block.to(torch.float32).abs().view(torch.int32)
            part = bits >> 16 if high is None else bits[bits >> 16 == high] & 0xFFFF
            total += torch.bincount(part.to("cpu"), minlength=2**16)
    return total


def share_rank(counts: Tensor, share: float) -> int:
    """Return which of all counted entries, from the largest on, is the last of a share of them: 1 at least."""
    return max(1, round(share * int(counts.sum())))


def ranked_bin(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds the rank-th largest entry, and its rank within the bin."""
    above = counts.flip(0).cumsum(0).flip(0)
    at = int((above >= rank).sum()) - 1
    return at, rank - int(above[at] - counts[at])


def magnitude(high: int, low: int) -> float:
    """Return the number whose float32 has these upper and lower 16 bits."""
    return float(torch.tensor(high * 2**16 + low, dtype=torch.int32).view(torch.float32))
