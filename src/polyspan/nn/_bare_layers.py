"""Layers whose weights are drawn from a generator, and from torch's global one only where none is given."""

from typing import Any, TypeVar

import torch
from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def bare(kind: type[Layer], *args: Any, device: Any = None, dtype: torch.dtype | None = None, **options: Any) -> Layer:
    """Make a layer without drawing its weights: they are uninitialised."""
    device = torch.get_default_device() if device is None else device
    return nn.utils.skip_init(kind, *args, device=device, dtype=dtype, **options)


@torch.no_grad()
def draw(layer: nn.Linear | nn.Conv2d, generator: torch.Generator | None) -> None:
    """Draw weights, and biases, as torch does for these layers."""
    bound = layer.weight[0].numel() ** -0.5
    layer.weight.uniform_(-bound, bound, generator=generator)
    if layer.bias is not None:
        layer.bias.uniform_(-bound, bound, generator=generator)
