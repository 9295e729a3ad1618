"""Lengths of vectors that can be differentiated again and again, at zero too."""

import torch
from jaxtyping import Float
from torch import Tensor


def safe_length(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
    """Return the length of each vector, bit by bit ``torch.linalg.vector_norm``, with all derivatives 0 at zero.

    That function's own first derivative is 0 there, but its second is NaN, and a factor of 0 behind it does not mend
    NaN. So vectors of length zero are replaced before the norm and not after it.
    """
    with torch.no_grad():
        zero = torch.linalg.vector_norm(x, dim=-1, keepdim=True) == 0
    return torch.where(zero, 0, torch.linalg.vector_norm(torch.where(zero, 1, x), dim=-1, keepdim=True))
