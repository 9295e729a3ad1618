"""Tucker decomposition of tensors: mode products, leading bases of unfoldings, HOSVD, HOOI and the cheapest ranks."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tucker(NamedTuple):
    """A tensor as ``core`` times one factor an axis: ``factors[n]`` is (I_n, J_n) with orthonormal columns.

    ``error`` is the share of the tensor's squared norm that is left out, in [0, 1]; 0 for a tensor of zeros.
    """

    core: Tensor
    factors: tuple[Tensor, ...]
    error: float


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Lay a tensor out as a matrix (I_n, product of the others): its rows run along axis ``mode``."""
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiply axis ``mode`` of a tensor, of size J, by a matrix (I, J): that axis is I long afterwards."""
    return (tensor.movedim(mode, -1) @ matrix.T).movedim(-1, mode)


def expand_core(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Multiply every axis of a core by its factor, the axis that grows least first, so that little is in memory."""
    made = core
    for mode in sorted(range(core.ndim), key=lambda n: factors[n].shape[0] / factors[n].shape[1]):
        made = mode_product(made, factors[mode], mode)
    return made


def shrink(tensor: Tensor, bases: Sequence[Tensor], but: int | None = None) -> Tensor:
    """Multiply every axis (save ``but``) by the transpose of its basis, the axis that shrinks most first."""
    made = tensor
    for mode in sorted(range(tensor.ndim), key=lambda n: bases[n].shape[1] / bases[n].shape[0]):
        made = made if mode == but else mode_product(made, bases[mode].T, mode)
    return made


def leading_basis(matrix: Tensor, k: int) -> Tensor:
    """Return k orthonormal columns (m, k) that hold most of a matrix (m, n): its leading left singular vectors.

    Found as eigenvectors of the smaller Gram matrix: directions whose singular value is below the square root of the
    precision times the largest are rounding, which hardly matters to the product with them.
    """
    m, n = matrix.shape
    if m <= n:
        vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(-1)[:, :k]
    elif k <= n:
        right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(-1)[:, :k]
        vectors = torch.linalg.qr(matrix @ right).Q
    else:
        vectors = torch.linalg.svd(matrix, full_matrices=True).U[:, :k]
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


@torch.no_grad()
def tucker(tensor: Tensor, ranks: Sequence[int], *, max_iter: int = 50, tol: float = 1e-9) -> Tucker:
    """Return the Tucker form of given ranks by higher-order orthogonal iteration (HOOI), begun at the HOSVD.

    Each step projects on the bases of all axes but one and takes the leading basis of what is left, so that the error
    never rises; it ends at a stationary point, not surely at the best one. For a matrix it is the truncated SVD.
    Computed in float64.
    """
    wide = tensor.detach().to(torch.float64)
    total = float(wide.square().sum())
    order = range(wide.ndim)
    factors = [leading_basis(unfold(wide, n), ranks[n]) for n in order]
    core = shrink(wide, factors)
    kept = float(core.square().sum())
    for _ in range(max_iter if any(ranks[n] < wide.shape[n] for n in order) else 0):
        for n in order:
            if ranks[n] < wide.shape[n]:
                factors[n] = leading_basis(unfold(shrink(wide, factors, but=n), n), ranks[n])
        core = shrink(wide, factors)
        before, kept = kept, float(core.square().sum())
        if kept - before <= tol * total:
            break
    error = max(0.0, 1.0 - kept / total) if total > 0 else 0.0
    return Tucker(core, tuple(factors), error)


def num_parameters(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Count the numbers of a Tucker form: one factor an axis, and the core."""
    return sum(i * j for i, j in zip(shape, ranks, strict=True)) + math.prod(ranks)


@torch.no_grad()
def cheapest_ranks(
    tensor: Tensor, *, error: float | None = None, parameters: int | None = None
) -> tuple[tuple[int, ...], float]:
    """Return the ranks of fewest numbers whose error is at most ``error``, or of least error within ``parameters``.

    All ranks are looked at: the squared HOSVD core, summed from the front along every axis, holds the share that each
    truncation keeps. HOOI at the ranks found is at least as exact. Returned with the error of the truncation.
    """
    wide = tensor.detach().to(torch.float64)
    total = float(wide.square().sum())
    # No axis can use more ranks than the others have entries.
    most = [min(size, wide.numel() // size) for size in wide.shape]
    kept = shrink(wide, [leading_basis(unfold(wide, n), most[n]) for n in range(wide.ndim)]).square_()
    cost = torch.zeros((), dtype=torch.float64)
    volume = torch.ones((), dtype=torch.float64)
    for n, size in enumerate(wide.shape):
        kept = kept.cumsum(n)
        along = torch.arange(1, most[n] + 1, dtype=torch.float64)
        along = along.reshape([-1 if m == n else 1 for m in range(wide.ndim)])
        cost, volume = cost + size * along, volume * along
    left = (1.0 - kept / total).clamp_min(0.0) if total > 0 else torch.zeros_like(kept)
    cost = (cost + volume).to(left.device)
    if error is not None:
        # Ties in cost go to the smaller error: both are put in order by one key.
        allowed = left <= error + 1e-12
        score = torch.where(allowed, cost + left, torch.inf)
    else:
        allowed = cost <= float(parameters or 0)
        score = torch.where(allowed, left + cost * 1e-15, torch.inf)
    best = int(score.argmin())
    if not bool(allowed.flatten()[best]):
        least = num_parameters(wide.shape, [1] * wide.ndim)
        raise ValueError(f"parameters must be at least {least} for shape {tuple(wide.shape)}, got {parameters}")
    index = [int(i) for i in torch.unravel_index(torch.tensor(best), kept.shape)]
    return tuple(i + 1 for i in index), float(left.flatten()[best])


def direct_sum(cores: Sequence[Tensor]) -> Tensor:
    """Set cores along the diagonal of one larger core, zeros elsewhere: the core of a sum of Tucker forms."""
    ends = [list(itertools.accumulate(sizes)) for sizes in zip(*(c.shape for c in cores), strict=True)]
    made = cores[0].new_zeros([e[-1] for e in ends])
    for i, core in enumerate(cores):
        made[tuple(slice(e[i] - size, e[i]) for e, size in zip(ends, core.shape, strict=True))] = core
    return made
