"""What layers do that compute in float32 or wider whatever autocast says."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> Any:
    """Return a context in which autocast of the tensor's device, which may have none, is off."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device_type=device, enabled=False)
