"""Sparse codes of a batch, and the ways to choose which latents fire."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from torch.nn import functional as F


class SparseCodes(NamedTuple):
    """Codes of b rows: ``indices`` and ``values`` (s,), those of row i from ``offsets[i]`` on, ``offsets`` (b,).

    Values may be 0: a latent that was chosen, or nearly, and does not fire.
    """

    indices: Tensor
    values: Tensor
    offsets: Tensor

    def weigh(self, table: Tensor, power: int = 1) -> Tensor:
        """Return (b, r): for each row the sum of its latents' rows of ``table`` (m, r) times values to a power."""
        values = self.values if power == 1 else self.values**power
        if not (_sparse_on(table) and table.requires_grad and gradients_by_hand(table)):
            return F.embedding_bag(self.indices, table, self.offsets, mode="sum", per_sample_weights=values)
        made = F.embedding_bag(self.indices, table.detach(), self.offsets, mode="sum", per_sample_weights=values)
        return _Weighed.apply(made, table, values.detach(), self.indices, self.offsets)

    def by_latent(self, num_latents: int) -> "SparseCodes":
        """Return the codes latent by latent: ``indices`` are rows, and ``offsets`` (m,). On CPU, without gradients."""
        from scipy.sparse import csr_array

        pointers = np.append(self.offsets.numpy(), len(self.indices))
        shape = len(self.offsets), num_latents
        placed = csr_array((self.values.detach().numpy(), self.indices.numpy(), pointers), shape=shape).tocsc()
        return SparseCodes(*(torch.from_numpy(part) for part in (placed.indices, placed.data, placed.indptr[:-1])))

    def below(self, width: int) -> "SparseCodes":
        """Return the codes of the first ``width`` latents, the others set to 0."""
        return self._replace(values=torch.where(self.indices < width, self.values, 0.0))

    def dense(self, num_latents: int) -> Tensor:
        """Return codes (b, m)."""
        b = len(self.offsets)
        counts = torch.diff(self.offsets, append=self.offsets.new_tensor([len(self.indices)]))
        rows = torch.repeat_interleave(torch.arange(b, device=self.offsets.device), counts)
        made = self.values.new_zeros(b, num_latents)
        return made.index_put((rows, self.indices), self.values)

    def csr(self, num_latents: int) -> Any:
        """Return codes (b, m) as a SciPy array, without zeros and with sorted indices."""
        from scipy.sparse import csr_array

        values, indices = (part.detach().cpu().numpy() for part in (self.values, self.indices))
        pointers = np.append(self.offsets.cpu().numpy(), len(indices))
        # Copied, for zeros are taken out in place.
        made = csr_array((values, indices, pointers), shape=(len(self.offsets), num_latents), copy=True)
        made.eliminate_zeros()
        made.sort_indices()
        return made


def top_k(pre: Tensor, k: int) -> SparseCodes:
    """Take the k largest of each row of ``pre`` (b, m), and of those what is positive."""
    indices = _largest(pre, k)
    offsets = torch.arange(pre.shape[0], device=pre.device) * k
    return SparseCodes(indices.reshape(-1), pre.gather(1, indices).reshape(-1).relu(), offsets)


def batch_top_k(pre: Tensor, k: int) -> SparseCodes:
    """Take the k b largest of all of ``pre`` (b, m), and of those what is positive: k a row on average."""
    flat = pre.reshape(-1)
    chosen = _largest(flat[None], k * pre.shape[0])[0]
    chosen = chosen[flat[chosen] > 0].sort().values
    return _ragged(flat[chosen], chosen, pre)


def _largest(pre: Tensor, k: int) -> Tensor:
    """Return the numbers (b, k) of the k largest of each row of ``pre`` (b, m), in any order."""
    if k and _sparse_on(pre) and not is_compiling():
        found = _selected(pre.detach().numpy(), k)
        if found is not None:
            return torch.from_numpy(found)
    return pre.topk(k, dim=-1, sorted=False).indices


def _selected(rows: np.ndarray, k: int) -> np.ndarray | None:
    """Return the numbers (b, k) of the k largest, ascending, or None where some are equal or not numbers.

    NumPy selects the kth largest several times as fast as torch sorts the k; what is as large is counted after that.
    """
    b, m = rows.shape
    chosen = np.empty((b, k), np.int64)
    step = max(1, 2**18 // m)
    for start in range(0, b, step):
        part = rows[start : start + step]
        least = np.partition(part, m - k, axis=1)[:, m - k, None]
        found = np.flatnonzero(part >= least)
        if len(found) != len(part) * k:
            return None
        places = found.reshape(-1, k) - m * np.arange(len(part))[:, None]
        if (places[:, 0] < 0).any() or (places[:, -1] >= m).any():
            return None
        chosen[start : start + step] = places
    return chosen


def above(pre: Tensor, threshold: Tensor | float) -> SparseCodes:
    """Take what of ``pre`` (b, m) lies above a threshold that is not negative."""
    flat = pre.reshape(-1)
    chosen = (pre > threshold).reshape(-1).nonzero()[:, 0]
    return _ragged(flat[chosen], chosen, pre)


def encoded(codes: SparseCodes, x: Tensor, W: Tensor, bias: Tensor, centre: Tensor) -> Tensor:
    """Return the values of codes that were chosen from (x - centre) W + bias, (s,), with that product's gradient.

    It has as few terms as the codes: on CPU the gradient of the matrix is a sparse product, d k a row instead of d m.
    """
    return _Encoded.apply(codes.values, x, W, bias, centre, codes.indices, codes.offsets)


def jump(codes: SparseCodes, values: Tensor, threshold: Tensor, bandwidth: Tensor) -> tuple[SparseCodes, Tensor]:
    """Set to 0 what does not lie above its latent's threshold (m,); also return the mean number that does.

    Both have a gradient of the thresholds: the derivative of the step is estimated by a box of width ``bandwidth``
    about the threshold, so the codes must hold all that lies in it.
    """
    at = threshold[codes.indices]
    count = _Step.apply(values, at, bandwidth).sum() / len(codes.offsets)
    return codes._replace(values=_Jump.apply(values, at, bandwidth)), count


def _ragged(values: Tensor, chosen: Tensor, pre: Tensor) -> SparseCodes:
    """Put together codes from sorted places in the flattened ``pre``."""
    b, m = pre.shape
    starts = torch.arange(b, device=pre.device) * m
    return SparseCodes(chosen % m, values, torch.searchsorted(chosen, starts))


def polynomial(a: Tensor, bias: Tensor, linear: Tensor, higher: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    r"""Return :math:`b + a C_1^\top + \sum_p \lambda_p\, a_{:R_p}^{\circ p} C_p^\top`, (b, d).

    ``higher`` are (:math:`\lambda_2, C_2`) and, where there are cubes, (:math:`\lambda_3, C_3`), :math:`R_3 \le R_2`.
    """
    return _Polynomial.apply(a, bias, linear, *(part for pair in higher for part in pair))


def gradients_by_hand(x: Tensor) -> bool:
    """Whether gradients that are written out here apply: not in a capture of operations, nor in mixed precision."""
    return torch.is_grad_enabled() and not is_compiling() and not torch.is_autocast_enabled(x.device.type)


def _sparse_on(x: Tensor) -> bool:
    """Whether sparse products on CPU stand in for torch's, whose gradient of a table sorts and scatters."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


class _Weighed(torch.autograd.Function):
    """Sums of a table's rows, given with their gradient in the values; adds that of the table, a sum by latents."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, table: Tensor, values: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, offsets)
        ctx.num_latents = len(table)
        return made.view_as(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, offsets = ctx.saved_tensors
        of_table = SparseCodes(indices, values, offsets).by_latent(ctx.num_latents).weigh(grad.contiguous())
        return grad, of_table, None, None, None


class _Polynomial(torch.autograd.Function):
    """The polynomial by two products of matrices each way: one of the linear part, one of all higher powers."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, bias: Tensor, linear: Tensor, *higher: Tensor) -> Tensor:
        scales, maps = higher[::2], higher[1::2]
        powers = [a[:, : maps[0].shape[1]].square()]
        powers += [powers[0][:, : C.shape[1]] * a[:, : C.shape[1]] for C in maps[1:]]
        raised, scaled = torch.cat(powers, dim=1), torch.cat([s * C for s, C in zip(scales, maps, strict=True)], dim=1)
        ctx.save_for_backward(a, linear, raised, scaled, *higher)
        return torch.addmm(bias, a, linear.T).addmm_(raised, scaled.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, linear, raised, scaled, *higher = ctx.saved_tensors
        scales, maps = higher[::2], higher[1::2]
        of_a, of_raised, of_scaled = grad @ linear, grad @ scaled, grad.T @ raised
        given, start = [], 0
        for power, (scale, C) in enumerate(zip(scales, maps, strict=True), start=2):
            rank = C.shape[1]
            own, of_C = of_raised[:, start : start + rank], of_scaled[:, start : start + rank]
            lower = a if power == 2 else raised
            of_a[:, :rank].addcmul_(lower[:, :rank], own, value=power)
            given += [(of_C * C).sum(), scale * of_C]
            start += rank
        return of_a, grad.sum(dim=0), grad.T @ a, *given


class _Encoded(torch.autograd.Function):
    """Values of sparse codes, given; the gradient is that of the encoder at their places."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *encoder: Tensor) -> Tensor:
        ctx.save_for_backward(*encoder)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, _, centre, indices, offsets = ctx.saved_tensors
        m = W.shape[1]
        of_bias = grad.new_zeros(m).index_add(0, indices, grad)
        codes, from_centre = SparseCodes(indices, grad, offsets), x - centre
        if _sparse_on(grad) and not ctx.needs_input_grad[1]:
            of_x, of_W = None, codes.by_latent(m).weigh(from_centre).T
        else:
            dense = codes.dense(m)
            of_x, of_W = dense @ W.T, from_centre.T @ dense
        return None, of_x, of_W, of_bias, -(W @ of_bias), None, None


class _Jump(torch.autograd.Function):
    """x where x > threshold, otherwise 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: Tensor) -> Tensor:
        ctx.save_for_backward(x, threshold, bandwidth)
        return torch.where(x > threshold, x, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # ty: ignore[incompatible-method-override]
        x, threshold, bandwidth = ctx.saved_tensors
        near = ((x - threshold).abs() < bandwidth / 2).to(grad.dtype)
        return grad * (x > threshold), -grad * near * threshold / bandwidth, None


class _Step(torch.autograd.Function):
    """1 where x > threshold, otherwise 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: Tensor) -> Tensor:
        ctx.save_for_backward(x, threshold, bandwidth)
        return (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # ty: ignore[incompatible-method-override]
        x, threshold, bandwidth = ctx.saved_tensors
        near = ((x - threshold).abs() < bandwidth / 2).to(grad.dtype)
        return None, -grad * near / bandwidth, None
