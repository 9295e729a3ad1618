"""Column-sparse coefficients on disk: values beside a packed bit mask or beside indices; whole, halved or in 8 bits."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

INDEX_COSTS = ("bitmask", "coo", "none")
COEF_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8,
}  # fmt: skip
MOST_INT16 = 2**15
LEVELS = 127


class Coefficients(NamedTuple):
    """``values`` (n, s) of each row at rising ``indices`` (n, s); ``scales`` (n, 1) where values are int8."""

    values: Tensor
    indices: Tensor
    scales: Tensor | None


def to_coefficients(codes: Tensor, s: int, dtype: torch.dtype) -> Coefficients:
    """Keep exactly ``s`` places of each row of ``codes`` (n, m), those of largest magnitude, and round to ``dtype``.

    Raises
    ------
    ValueError
        A coefficient does not fit in ``dtype``.
    """
    indices = codes.abs().topk(s, dim=1, sorted=False).indices.sort(dim=1).values
    values = codes.gather(1, indices)
    if dtype == torch.int8:
        scales = values.abs().amax(dim=1, keepdim=True) / LEVELS
        whole = (values / torch.where(scales > 0, scales, 1)).round()
        return Coefficients(whole.to(torch.int8), indices, scales.float())
    rounded = values.to(dtype)
    if not bool(rounded.isfinite().all()):
        raise ValueError(f"coef_dtype must hold coefficients up to {float(values.abs().max()):.3g}, got {dtype}")
    return Coefficients(rounded, indices, None)


def to_values(values: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return stored values (n, s) as numbers of ``dtype``."""
    return values.to(dtype) if scales is None else (values.float() * scales).to(dtype)


def index_dtype(m: int) -> torch.dtype:
    """Return the integer dtype that holds the indices of ``m`` atoms."""
    return torch.int16 if m <= MOST_INT16 else torch.int32


def mask_bytes(n: int, m: int) -> int:
    return -(-n * m // 8)


def pack_support(indices: Tensor, m: int) -> Tensor:
    """Return one bit for each of n x m places, (ceil(n m / 8),) uint8, the first in the lowest bit of a byte."""
    n = len(indices)
    bits = torch.zeros(8 * mask_bytes(n, m), dtype=torch.uint8, device=indices.device)
    places = indices.long() + m * torch.arange(n, device=indices.device)[:, None]
    bits[places.flatten()] = 1
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=indices.device)
    return (bits.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack_support(mask: Tensor, n: int, m: int) -> Tensor:
    """Return the places (n, m), bool, that :func:`pack_support` packed."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, None] >> shifts) & 1).bool().flatten()[: n * m].view(n, m)


def support_indices(support: Tensor, s: int) -> Tensor:
    """Return the indices (n, s) of ``s`` places in each row of a bool ``support`` (n, m).

    Raises
    ------
    ValueError
        A row has another number of places.
    """
    counts = support.sum(dim=1)
    if not bool((counts == s).all()):
        wrong = int((counts != s).nonzero()[0, 0])
        raise ValueError(f"mask must mark {s} coefficients of each output, got {int(counts[wrong])} in row {wrong}")
    return support.nonzero()[:, 1].view(-1, s)


def stored_bytes(d_in: int, d_out: int, m: int, s: int, *, word: int, coef: torch.dtype, index_cost: str) -> int:
    """Return the bytes of a dictionary (d_in, m) of numbers of ``word`` bytes and of coefficients of ``d_out`` outputs.

    ``index_cost`` says what places cost: a bit for each atom and output, an integer a coefficient, or nothing.
    """
    size = word * d_in * m + coefficient_bytes(word, coef) * s * d_out
    if coef == torch.int8:
        size += 4 * d_out
    if index_cost == "bitmask":
        size += mask_bytes(d_out, m)
    elif index_cost == "coo":
        size += index_dtype(m).itemsize * s * d_out
    return size


def coefficient_bytes(word: int, coef: torch.dtype) -> int:
    """A coefficient is never counted wider than the numbers of the model."""
    return min(word, coef.itemsize)


def largest_dictionary(
    d_in: int, d_out: int, budget: float | int, rho: float | int, *, word: int, coef: torch.dtype, index_cost: str
) -> tuple[int, int]:
    """Return the most atoms m, and s = m / rho of them an output, whose stored bytes are at most ``budget``."""

    def size(m: int) -> int:
        return stored_bytes(d_in, d_out, m, math.floor(m / rho), word=word, coef=coef, index_cost=index_cost)

    low, high = 0, max(1, int(budget) // max(1, word * d_in))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle - 1)
    return low, math.floor(low / rho)


def most_nonzero(
    d_in: int, d_out: int, m: int, budget: float | int, *, word: int, coef: torch.dtype, index_cost: str
) -> int:
    """Return the most coefficients an output, at most m, that ``budget`` bytes pay beside ``m`` given atoms."""
    empty = stored_bytes(d_in, d_out, m, 0, word=word, coef=coef, index_cost=index_cost)
    each = stored_bytes(d_in, d_out, m, 1, word=word, coef=coef, index_cost=index_cost) - empty
    return max(0, min(m, int((budget - empty) // each)))
