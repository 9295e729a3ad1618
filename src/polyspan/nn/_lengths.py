"""Lengths of vectors that can be differentiated again and again, at zero too."""

import torch
from jaxtyping import Float
from torch import Tensor

from ._rotation_torch import as_numpy


def safe_length(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
    """Return the length of each vector, bit by bit ``torch.linalg.vector_norm``, with all derivatives 0 at zero.

    That function's own first derivative is 0 there, but its second is NaN, and a factor of 0 behind it does not mend
    NaN. So vectors of length zero are replaced before the norm and not after it.
    """
    with torch.no_grad():
        zero = torch.linalg.vector_norm(x, dim=-1, keepdim=True) == 0
    return torch.where(zero, 0, torch.linalg.vector_norm(torch.where(zero, 1, x), dim=-1, keepdim=True))


def shadow_length(x: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """Return what :func:`safe_length` does, without the last axis, and without its work where no length is zero.

    That is looked at only where nobody waits for it: on the CPU, outside of vmap and captured graphs.
    """
    norm = torch.linalg.vector_norm(x, dim=-1)
    seen = as_numpy(norm)
    return norm if seen is not None and seen[0].all() else safe_length(x).squeeze(-1)
