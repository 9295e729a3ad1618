"""Rows of a table by number, and their gradient summed into the table."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SUMMED_BY_SCIPY = (torch.float32, torch.float64)


class _Gather(torch.autograd.Function):
    """``weight[rows]`` whose gradient is a sparse product: many times as fast as that of ``F.embedding`` on CPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, rows: Tensor) -> Tensor:
        return weight.index_select(0, rows.reshape(-1)).view(*rows.shape, weight.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ARG004 - the form of a context
        weight, rows = inputs
        ctx.save_for_backward(rows)
        ctx.shape = weight.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # ty: ignore[incompatible-method-override]
        (rows,) = ctx.saved_tensors
        rows, grad = rows.reshape(-1), grad.reshape(-1, ctx.shape[1])
        if torch.is_grad_enabled() or grad.dtype not in SUMMED_BY_SCIPY:
            # Gradients of gradients need an operation that torch can differentiate.
            return grad.new_zeros(ctx.shape).index_add(0, rows, grad), None
        return _summed(rows, grad, ctx.shape[0]), None


def _summed(rows: Tensor, grad: Tensor, num_rows: int) -> Tensor:
    """Return (num_rows, d) sums of ``grad`` (n, d) by row: the product with a matrix of one 1 a column."""
    from scipy.sparse import csc_array

    n = len(rows)
    values = grad.contiguous().numpy()
    index = np.int32 if max(n, num_rows) < 2**31 - 1 else np.int64
    ones = np.ones(n, values.dtype)
    placed = csc_array((ones, rows.numpy().astype(index), np.arange(n + 1, dtype=index)), shape=(num_rows, n))
    return torch.from_numpy(placed @ values)


def gather_rows(weight: Tensor, rows: Tensor, *, sparse: bool = False) -> Tensor:
    """Return ``weight[rows]``, (..., d); with ``sparse``, its gradient holds the rows that were read, and no others."""
    if sparse or weight.device.type != "cpu" or torch.compiler.is_compiling():
        return F.embedding(rows, weight, sparse=sparse)
    return _Gather.apply(weight, rows)
