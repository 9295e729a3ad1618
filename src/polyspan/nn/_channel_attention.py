"""The attention modules that subspace attention is compared with: over channels, and over channels and places."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SqueezeExcitation(nn.Module):
    """Scale every channel by a number in [0, 1] that two linear layers make of all channels' means: 2m²/r numbers.

    Parameters
    ----------
    num_channels : int
        m.
    reduction : int, default=16
        r; the middle has m/r numbers, 1 at least.
    """

    def __init__(
        self, num_channels: int, reduction: int = 16, *, generator: torch.Generator | None = None, **factory: Any
    ):
        super().__init__()
        hidden = max(1, num_channels // reduction)
        self.squeeze = nn.Parameter(torch.empty(hidden, num_channels, **factory))
        self.excite = nn.Parameter(torch.empty(num_channels, hidden, **factory))
        _uniform(generator, self.squeeze, self.excite)

    def gate(self, means: Tensor) -> Tensor:
        """Return what comes before the sigmoid, for means (B, m)."""
        return F.linear(F.relu(F.linear(means, self.squeeze)), self.excite)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (B, m, h, w) with its channels scaled."""
        return x * torch.sigmoid(self.gate(x.mean(dim=(2, 3))))[:, :, None, None]

    def num_macs(self, *map_shape: int) -> int:
        """Return the multiply-adds for one item."""
        return self.squeeze.numel() + self.excite.numel()


class CBAM(nn.Module):
    """Scale channels by their means and maxima, then places by a 7x7 filter over channel mean and maximum.

    Parameters
    ----------
    num_channels, reduction : int
        As for :class:`SqueezeExcitation`; 2m²/r + 98 numbers.
    """

    def __init__(
        self, num_channels: int, reduction: int = 16, *, generator: torch.Generator | None = None, **factory: Any
    ):
        super().__init__()
        self.channels = SqueezeExcitation(num_channels, reduction, generator=generator, **factory)
        self.filter = nn.Parameter(torch.empty(1, 2, 7, 7, **factory))
        _uniform(generator, self.filter)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (B, m, h, w) with its channels, then its places, scaled."""
        gate = self.channels.gate(x.mean(dim=(2, 3))) + self.channels.gate(x.amax(dim=(2, 3)))
        x = x * torch.sigmoid(gate)[:, :, None, None]
        places = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return x * torch.sigmoid(F.conv2d(places, self.filter, padding=3))

    def num_macs(self, *map_shape: int) -> int:
        """Return the multiply-adds for one item."""
        return 2 * self.channels.num_macs() + self.filter.numel() * math.prod(map_shape)


@torch.no_grad()
def _uniform(generator: torch.Generator | None, *weights: Tensor) -> None:
    for weight in weights:
        bound = 1 / math.sqrt(weight[0].numel())
        weight.uniform_(-bound, bound, generator=generator)
