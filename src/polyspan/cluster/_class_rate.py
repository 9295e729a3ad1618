r"""Rate of a batch within soft classes, one centred at every row, with its gradient in closed form.

For memberships :math:`\Gamma` (n, C) with column sums :math:`m_j` and
:math:`M_j = I + \tfrac{d}{m_j\epsilon^2} Z^\top\mathrm{diag}(\Gamma_j) Z` the rate is
:math:`R_c = \sum_j \tfrac{m_j}{2n}\log\det M_j`, and

* :math:`\partial R_c/\partial Z = \tfrac{d}{n\epsilon^2}\sum_j \mathrm{diag}(\Gamma_j) Z M_j^{-1}`,
* :math:`\partial R_c/\partial\Gamma_{ij} = \tfrac{d}{2n\epsilon^2} z_i^\top M_j^{-1} z_i
  + \tfrac{1}{2n}(\log\det M_j - d + \mathrm{tr} M_j^{-1})`.

Both come out of one pass over blocks of classes, so the memory of a step does not grow with the number of classes. On
the CPU :math:`M_j` and its inverse stay in LAPACK's rectangular full packed form, d (d + 1) / 2 numbers in which
products of matrices write and read them: nothing is spread out, cleared or copied between the three large products.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

# Packed matrices of one block: few enough to stay in a processor's cache between the products.
CACHED_BYTES = 2**22


class ClassRate(torch.autograd.Function):
    """R_c of Z (n, d) and memberships (n, C); first derivatives only."""

    @staticmethod
    def forward(ctx: Any, Z: Tensor, memberships: Tensor, eps2: float, max_bytes: int) -> Tensor:
        wants = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        n, d = Z.shape
        small = n * d * (d + 1) * Z.element_size() <= max_bytes
        # What is captured for a compiler has no numbers that LAPACK could read.
        packed = small and Z.device.type == "cpu" and not torch.compiler.is_compiling()
        way = _packed_rate if packed else _dense_rate
        rate, *grads = way(Z, memberships, eps2, max_bytes, wants)
        ctx.save_for_backward(*grads)
        return rate

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_rows, by_members = ctx.saved_tensors
        return grads[0] * by_rows, grads[0] * by_members, None, None


class SparseClassRate(torch.autograd.Function):
    r"""R_c where class j has weights (C, m) on the rows ``index`` (C, m) only: m x m blocks of the Gram matrix.

    :math:`\log\det(I_d + a Z_S^\top D Z_S) = \log\det(I_m + a D^{1/2} Z_S Z_S^\top D^{1/2})`.
    """

    @staticmethod
    def forward(ctx: Any, Z: Tensor, weights: Tensor, index: Tensor, eps2: float) -> Tensor:
        (n, d), m = Z.shape, weights.shape[1]
        mass = weights.sum(1)
        gain = _gain(mass, d, eps2)
        block = (Z @ Z.T)[index.unsqueeze(2), index.unsqueeze(1)]
        root = (weights * gain.unsqueeze(1)).sqrt()
        shifted = root.unsqueeze(2) * block * root.unsqueeze(1)
        shifted.diagonal(dim1=1, dim2=2).add_(1)
        factor = torch.linalg.cholesky(shifted)
        logdet = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
        if any(ctx.needs_input_grad[:2]):
            inverse = torch.cholesky_inverse(factor)
            scaled = block * root.unsqueeze(1)
            quad = block.diagonal(dim1=1, dim2=2) - ((scaled @ inverse) * scaled).sum(2)
            trace = d - m + inverse.diagonal(dim1=1, dim2=2).sum(1)
            own = (logdet - d + trace).unsqueeze(1)
            by_weights = (d / eps2 * quad + own) / (2 * n)
            pull = root.unsqueeze(2) * inverse * root.unsqueeze(1) * (mass / (2 * n))[:, None, None]
            flat = (index.unsqueeze(2) * n + index.unsqueeze(1)).flatten()
            by_gram = Z.new_zeros(n * n).index_add_(0, flat, pull.flatten()).view(n, n)
            ctx.save_for_backward((by_gram + by_gram.T) @ Z, by_weights)
        return (mass * logdet).sum() / (2 * n)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_rows, by_weights = ctx.saved_tensors
        return grads[0] * by_rows, grads[0] * by_weights, None, None


def _gain(mass: Tensor, d: int, eps2: float) -> Tensor:
    """Return d / (m eps2); where a column is empty, any finite number will do."""
    return d / (eps2 * torch.where(mass > 0, mass, torch.ones_like(mass)))


def _dense_rate(Z: Tensor, members: Tensor, eps2: float, max_bytes: int, wants: bool) -> tuple[Tensor, ...]:
    n, d = Z.shape
    mass = members.sum(0)
    gain = _gain(mass, d, eps2)
    triangle = d * (d + 1) // 2
    packed = n * triangle * Z.element_size() <= max_bytes
    by_rows, by_members = torch.zeros_like(Z), torch.zeros_like(members)
    step = max(1, max_bytes // ((3 * d * d + (triangle if packed else 2 * n * d)) * Z.element_size()))
    low, left = torch.tril_indices(d, d, device=Z.device)
    # Products of two entries of a row, once for every unordered pair: half the work of the full outer products.
    outer = Z[:, low] * Z[:, left] if packed else Z
    pulled = torch.zeros_like(outer) if packed and wants else by_rows
    twice = torch.where(low == left, 1.0, 2.0).to(Z)
    rate = Z.new_zeros(())
    for start in range(0, members.shape[1], step):
        part = slice(start, start + step)
        weight, a = members[:, part], gain[part]
        if packed:
            matrix = Z.new_zeros(weight.shape[1], d, d)
            # Cholesky reads the lower triangle only.
            matrix[:, low, left] = (weight * a).T @ outer
        else:
            matrix = (weight.T.unsqueeze(2) * Z).mT @ Z * a[:, None, None]
        matrix.diagonal(dim1=1, dim2=2).add_(1)
        factor = torch.linalg.cholesky(matrix)
        logdet = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
        rate += (mass[part] * logdet).sum()
        if not wants:
            continue
        inverse = torch.cholesky_inverse(factor)
        own = logdet - d + inverse.diagonal(dim1=1, dim2=2).sum(1)
        if packed:
            flat = inverse[:, low, left]
            quad = outer @ (flat * twice).T
            pulled.addmm_(weight, flat)
        else:
            turned = Z @ inverse
            quad = torch.linalg.vecdot(turned, Z).T
            by_rows += torch.einsum("nc,cnd->nd", weight, turned)
        by_members[:, part] = d / eps2 * quad + own
    if wants and packed:
        for start in range(0, n, step):
            rows = slice(start, start + step)
            matrix = Z.new_zeros(len(Z[rows]), d, d)
            matrix[:, low, left] = pulled[rows]
            matrix[:, left, low] = pulled[rows]
            by_rows[rows] = (matrix @ Z[rows].unsqueeze(2)).squeeze(2)
    return rate / (2 * n), by_rows * (d / (n * eps2)), by_members / (2 * n)


@cache
def _layout(d: int) -> tuple[Tensor, Tensor]:
    """Return row and column of every number of a packed (d, d) matrix, row >= column."""
    numbers = np.arange(d * d, dtype=np.float64).reshape(d, d, order="F")
    packed = torch.as_tensor(lapack.dtrttf(numbers, uplo="L")[0].astype(np.int64))
    return packed % d, packed // d


def _packed_rate(Z: Tensor, members: Tensor, eps2: float, max_bytes: int, wants: bool) -> tuple[Tensor, ...]:
    """Do what ``_dense_rate`` does, with symmetric matrices packed; on the CPU."""
    (n, d), n_classes = Z.shape, members.shape[1]
    mass = members.sum(0)
    gain = _gain(mass, d, eps2)
    low, left = _layout(d)
    entries = len(low)
    diagonal = torch.nonzero(low == left).ravel()
    twice = torch.where(low == left, 1.0, 2.0).to(Z)
    factor, invert = (lapack.spftrf, lapack.spftri) if Z.dtype == torch.float32 else (lapack.dpftrf, lapack.dpftri)
    columns = Z.T.contiguous()
    # Products of two entries of a row, once for every unordered pair: half the work of the full outer products.
    outer = columns[low].mul_(columns[left])
    step = max(1, min(n_classes, min(max_bytes, CACHED_BYTES) // (entries * Z.element_size())))
    block = Z.new_empty(step, entries)
    by_members, pulled = torch.zeros_like(members), torch.zeros_like(outer if wants else outer[:0])
    rate = Z.new_zeros(())
    for start in range(0, n_classes, step):
        part = slice(start, start + step)
        weight = members[:, part]
        matrices = block[: weight.shape[1]]
        torch.mm((weight * gain[part]).T, outer.T, out=matrices)
        matrices[:, diagonal] += 1
        each = matrices.numpy()
        failed = any(factor(d, matrix, uplo="L", overwrite_a=1)[1] for matrix in each)
        logdet = 2 * matrices[:, diagonal].log().sum(1)
        # Not every LAPACK stops at NaN.
        if failed or not bool(torch.isfinite(logdet).all()):
            raise torch.linalg.LinAlgError(
                "Z must be finite and memberships not negative, got a class whose matrix is not positive definite"
            )
        rate += (mass[part] * logdet).sum()
        if not wants:
            continue
        for matrix in each:
            invert(d, matrix, uplo="L", overwrite_a=1)
        own = logdet - d + matrices[:, diagonal].sum(1)
        pulled.addmm_(matrices.T, weight.T)
        quad = (matrices.mul_(twice) @ outer).T
        by_members[:, part] = quad.mul_(d / eps2).add_(own)
    by_rows = torch.zeros_like(columns)
    if wants:
        at = torch.empty(d, d, dtype=torch.int64)
        at[low, left] = at[left, low] = torch.arange(entries)
        for i in range(d):
            by_rows[i] = (pulled[at[i]] * columns).sum(0)
    return rate / (2 * n), by_rows.T * (d / (n * eps2)), by_members / (2 * n)
