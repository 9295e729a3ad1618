"""Products of two functions of given degrees, made once and kept, and arrays as the tensors that they multiply."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._gaunt_paths import axis_of
from ._irreps import Irrep
from ._rotation_maps import native
from ._sphere_product import SphereProduct, choose_method


def cached_product(*key: Any) -> SphereProduct:
    """Return the product for degrees, kind, method, normalisation, dtype and device, made once."""
    # Tables that a mode makes, such as that of fake tensors, are of no use outside of it.
    if type(torch.empty(0, device="cpu")) is not Tensor:
        return _made(*key)
    with torch.inference_mode(False):
        return _kept(*key)


@lru_cache(maxsize=32)
def _kept(*key: Any) -> SphereProduct:
    return _made(*key)


def _made(
    degrees: tuple[int, int, int], kind: str, method: str, normalization: str, dtype: Any, device: str
) -> SphereProduct:
    parts = [tuple(Irrep(1, l, (-1) ** l) for l in range(lmax + 1)) for lmax in degrees]
    axes = (
        axis_of(parts[0], normalization),
        axis_of(parts[1], normalization),
        axis_of(parts[2], normalization, out=True),
    )
    taken = choose_method(method, axes, (kind,), dtype)
    return SphereProduct(axes, kind, taken, device=torch.device(device), dtype=dtype)


def as_tensor(x: Any, name: str) -> Tensor:
    """Return an array of floats as a tensor, whatever its byte order, strides and leave to write to it."""
    array = np.asarray(x)
    if array.dtype.kind != "f":
        raise ValueError(f"{name} must hold floats, got {array.dtype}")
    return torch.from_numpy(np.require(native(array), requirements=("C", "W")))
