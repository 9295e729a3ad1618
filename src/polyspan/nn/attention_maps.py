"""How sharp maps of attention are, and how far those of different groups lie apart."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class AttentionFacts(NamedTuple):
    """What maps of attention do, as means over images; uniform maps, which have learnt nothing, have 0, 1 and 0.

    Attributes
    ----------
    divergence : float
        Kullback-Leibler divergence from the uniform map, nats, in [0, log places].
    peak : float
        Largest attention of a map as a multiple of the uniform one, in [1, places].
    group_distance : float
        L1 distance of the maps of two groups, mean over all pairs, in [0, 2]; 0 for one group.
    """

    divergence: float
    peak: float
    group_distance: float


def attention_facts(maps: Float[Tensor, "batch groups *map"]) -> AttentionFacts:
    """Measure maps that sum to 1 over their places, such as those of :meth:`polyspan.nn.ULSAM.attention_maps`.

    Raises
    ------
    ValueError
        There is no map, or one is negative or does not sum to 1.
    """
    if maps.ndim < 3:
        raise ValueError(f"maps must be (batch, groups, *map), got shape {tuple(maps.shape)}")
    A = maps.detach().to(torch.promote_types(maps.dtype, torch.float32)).flatten(2)
    if not A.numel():
        raise ValueError(f"maps must hold at least one map, got shape {tuple(maps.shape)}")
    if bool((A < 0).any()) or not bool(((A.sum(-1) - 1).abs() < 1e-2).all()):
        raise ValueError("maps must be 0 or more and sum to 1 over their places, got others")
    places, g = A.shape[2], A.shape[1]
    divergence = torch.special.xlogy(A, A * places).sum(-1).mean()
    peak = A.amax(-1).mean() * places
    # One group against all at a time keeps the memory at that of the maps.
    apart = sum(float((A[:, i : i + 1] - A[:, i + 1 :]).abs().sum()) for i in range(g - 1))
    return AttentionFacts(float(divergence), float(peak), apart / max(1, len(A) * g * (g - 1) / 2))
