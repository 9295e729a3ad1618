"""Adagrad with one step size a row, for tables of which a batch reads a small part."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class RowAdagrad(torch.optim.Optimizer):
    r"""Move only the rows that a batch read: :math:`a_i \mathrel{+}= \tfrac1d\lVert g_i\rVert^2`, then
    :math:`w_i \mathrel{-}= \eta\, g_i / (\sqrt{a_i} + \epsilon)`.

    One number of state a row, in place of two a weight for Adam, and no row moves that was not read. Gradients may be
    sparse, whose repeated rows are summed first, or dense, whose zero rows are left.

    Parameters
    ----------
    params : iterable of Tensor of shape (M, d)
    lr : float, default=0.05
    eps : float, default=1e-8
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.05, eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; ``closure`` computes the loss anew, where it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    rows, grad = _read(weight.grad)
                    state = self.state[weight]
                    if not state:
                        state["step"] = torch.zeros(())
                        state["sum"] = torch.zeros_like(weight[:, 0])
                    state["step"] += 1
                    total = state["sum"].index_add_(0, rows, grad.square().mean(dim=1))[rows]
                    weight.index_add_(0, rows, grad / (total.sqrt() + group["eps"])[:, None], alpha=-group["lr"])
        return loss


def _read(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of the rows with a gradient, each once, and their gradients."""
    if grad.is_sparse:
        grad = grad.coalesce()
        return grad.indices()[0], grad.values()
    rows = grad.any(dim=1).nonzero()[:, 0]
    return rows, grad[rows]
