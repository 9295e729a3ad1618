"""Orthonormal frames out of Householder reflections, and the reflections that give a wanted frame."""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from polyspan.linalg import fix_signs


def frame(Y: Tensor) -> Tensor:
    r"""First r columns of the product of the reflections in the r columns of Y (\*b, d, r), in float32 or wider.

    :math:`F = E_r - Y T Y_{:r}^\top` with :math:`T^{-1} = \mathrm{striu}(Y^\top Y) + \mathrm{diag}(Y^\top Y)/2`. This
    is :func:`polyspan.linalg.householder_product` for columns whose squared lengths are in range, for which a third of
    the operations suffices: the layers build two frames a step, and there each operation's start is what costs.
    """
    device = Y.device.type
    if not Y.is_meta and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return frame(Y)
    Y = Y.to(torch.promote_types(Y.dtype, torch.float32))
    d, r = Y.shape[-2:]
    gram = Y.mT @ Y
    half = 0.5 * gram.diagonal(dim1=-2, dim2=-1)
    # A zero column reflects nothing: its row and column of the Gram matrix are zero, so any pivot does.
    half = half + (half == 0)
    inverse = gram.triu(1) + torch.diag_embed(half)
    inner = torch.linalg.solve_triangular(inverse, Y[..., :r, :].mT, upper=True)
    return torch.eye(d, r, dtype=Y.dtype, device=Y.device) - Y @ inner


def reflections(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors Y (d, r) and signs (r,) in {-1, 1} with ``frame(Y) * signs`` equal to Q, orthonormal columns.

    Signs are what keeps every vector away from zero, where a reflection has no derivative and could never learn.
    """
    packed, _ = torch.geqrf(Q)
    Y = packed.tril(-1) + torch.eye(*Q.shape, dtype=Q.dtype, device=Q.device)
    return Y, torch.where((frame(Y) * Q).sum(dim=-2) < 0, -1.0, 1.0).to(Q.dtype)


class Leading(NamedTuple):
    """Leading singular vectors as columns, ``out`` (p, r) and ``into`` (d, r), all singular values, and the ratio kept.

    ``kept_share`` is the share of the squared singular values that are among the leading r.
    """

    out: Tensor
    values: Tensor
    into: Tensor
    kept_share: float


def leading(weight: Tensor, rank: int) -> Leading:
    """Decompose a matrix (p, d) in float64 where the device has it; signs are fixed.

    Raises
    ------
    ValueError
        It is no matrix of finite floats, or has no ``rank`` singular values.

    Warns
    -----
    UserWarning
        Its r-th singular value is below a millionth of the first.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight must be a matrix of floats, got shape {tuple(weight.shape)} and {weight.dtype}; flatten kernels, "
            "and dequantise integers, first"
        )
    if weight.dtype.itemsize < 2:
        raise ValueError(f"weight must be dequantised first, got {weight.dtype}")
    check_rank(rank, *weight.shape)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite, got NaN or infinity")
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    U, s, Vh = torch.linalg.svd(weight.detach().to(wide), full_matrices=False)
    U, Vh = fix_signs(U, Vh)
    if s[rank - 1] <= 1e-6 * s[0]:
        warnings.warn(
            f"weight has numerical rank {int((s > 1e-6 * s[0]).sum())}, below the rank {rank} asked for: "
            "the directions beyond it are arbitrary",
            UserWarning,
            stacklevel=3,
        )
    total = s.square().sum()
    kept = float(s[:rank].square().sum() / total) if total > 0 else 1.0
    return Leading(U[:, :rank], s, Vh[:rank].mT, kept)


def check_rank(rank: int, rows: int, columns: int) -> None:
    """Refuse a rank that a matrix (rows, columns) cannot have."""
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank must be between 1 and {min(rows, columns)}, the smaller side of the matrix, got {rank}")


def check_gain(gain: str | float | int) -> None:
    """Refuse a gain that is no name and no positive number."""
    if isinstance(gain, str) and gain in ("mean", "learned"):
        return
    if isinstance(gain, str) or not 0 < gain < math.inf:
        raise ValueError(f"gain must be 'mean', 'learned' or a finite number above 0, got {gain!r}")


class Start(NamedTuple):
    """Out-vectors (p, r), in-vectors (d, r), signs (2, r) of the columns of both frames, and the gain ()."""

    out: Tensor
    into: Tensor
    signs: Tensor
    gain: Tensor


def compose(out: Tensor, into: Tensor, signs: Tensor, gain: Tensor) -> Tensor:
    """Return the weight (p, d) of reflection vectors, in float32 or wider."""
    return (frame(out) * (gain * signs[0] * signs[1])) @ frame(into).mT


def start_from(weight: Tensor, rank: int, gain: str | float | int) -> Start:
    """Return what comes nearest to a weight, in its dtype."""
    if weight.is_meta:
        p, d = weight.shape
        return Start(*(weight.new_empty(shape) for shape in ((p, rank), (d, rank), (2, rank), ())))
    found = leading(weight, rank)
    (out, a), (into, b) = reflections(found.out), reflections(found.into)
    size = found.values[:rank].mean() if isinstance(gain, str) else torch.as_tensor(gain, dtype=out.dtype)
    return Start(*(part.to(weight) for part in (out, into, torch.stack([a, b]), size)))
