"""Optimiser whose every step has one length: the sign of a blended momentum."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    r"""Step by :math:`-\eta(\mathrm{sign}(\beta_1 m+(1-\beta_1)g)+\omega\theta)`, then :math:`m\leftarrow\beta_2m+(1-\beta_2)g`.

    Keeps one number a parameter where Adam keeps two. As all entries move by the same amount, learning rates are about
    a fifth of Adam's and weight decays five times as large. Source: catalogue entry ``crate``, whose networks it trains.

    Parameters
    ----------
    params : iterable
        Parameters or groups, as for any torch optimiser.
    lr : float, default=1e-4
        :math:`\eta` >= 0.
    betas : tuple of float, default=(0.9, 0.99)
        Each in [0, 1).
    weight_decay : float, default=0.0
        :math:`\omega` >= 0, decoupled.

    Raises
    ------
    ValueError
        A number is out of range.
    RuntimeError
        While stepping: a gradient is sparse.
    """  # noqa: E501 - the formula is one line

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | int = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float | int = 0.0,
    ):
        if not (0 <= lr < math.inf and 0 <= weight_decay < math.inf):
            raise ValueError(f"lr and weight_decay must be finite and at least 0, got {lr} and {weight_decay}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers, each at least 0 and below 1, got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure``, where given, computes the loss anew and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for theta in group["params"]:
                if theta.grad is None:
                    continue
                if theta.grad.is_sparse:
                    raise RuntimeError("Lion takes dense gradients, got a sparse one")
                state = self.state[theta]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(theta)
                m = state["momentum"]
                theta.mul_(1 - group["lr"] * group["weight_decay"])
                theta.add_(torch.lerp(theta.grad, m, first).sign_(), alpha=-group["lr"])
                m.lerp_(theta.grad, 1 - second)
        return loss
