"""Sparse codes of a batch, and the ways to choose which latents fire."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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
        return F.embedding_bag(self.indices, table, self.offsets, mode="sum", per_sample_weights=values)

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
    values, indices = pre.topk(k, dim=-1, sorted=False)
    offsets = torch.arange(pre.shape[0], device=pre.device) * k
    return SparseCodes(indices.reshape(-1), values.reshape(-1).relu(), offsets)


def batch_top_k(pre: Tensor, k: int) -> SparseCodes:
    """Take the k b largest of all of ``pre`` (b, m), and of those what is positive: k a row on average."""
    flat = pre.reshape(-1)
    chosen = flat.topk(k * pre.shape[0], sorted=False).indices
    chosen = chosen[flat[chosen] > 0].sort().values
    return _ragged(flat[chosen], chosen, pre)


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
        b, m = len(x), W.shape[1]
        of_bias = grad.new_zeros(m).index_add(0, indices, grad)
        codes, from_centre = SparseCodes(indices, grad, offsets), x - centre
        sparse = grad.device.type == "cpu" and grad.dtype in (torch.float32, torch.float64)
        if sparse and not ctx.needs_input_grad[1]:
            from scipy.sparse import csr_array

            pointers = np.append(offsets.numpy(), len(indices))
            placed = csr_array((grad.numpy(), indices.numpy(), pointers), shape=(b, m))
            of_x, of_W = None, torch.from_numpy(placed.T @ from_centre.numpy()).T
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
