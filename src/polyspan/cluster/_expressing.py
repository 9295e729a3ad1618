"""Two ways to the coefficients that express all layers at once: in closed form, and by steps that stop early."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._affinity import RidgeExpression
from ._deep_layers import Layers
from ._deep_stages import Stages
from ._self_expression import expression_loss, ridge_coefficients

START = 1e-8


@torch.no_grad()
def closed_form(layers: Layers, rows: Tensor, *, ridge: float, hollow: bool) -> tuple[Any, float]:
    """Return ridge coefficients (n, n), and the loss that they leave.

    A :class:`RidgeExpression`, which holds factors, where points outnumber the layers' numbers, else a tensor.
    ``ridge`` is the penalty for one layer; ``hollow`` keeps the diagonal zero.
    """
    found = layers.expressed(rows)
    alpha, V = ridge * len(found), torch.cat(found, dim=1)
    if len(V) <= V.shape[1]:
        G = V @ V.T
        C = ridge_coefficients(G, alpha, zero_diagonal=hollow)
        return C, float(expression_loss(C, G)[0])
    wide = V.cpu().numpy()
    expression = RidgeExpression(wide, alpha, zero_diagonal=hollow)  # ty: ignore[no-matching-overload]
    return expression, float(np.square(wide - expression @ wide.astype(np.float64)).sum())


def early_stopped(layers: Layers, rows: Tensor, stages: Stages, *, rate: float, hollow: bool, trained: bool) -> Tensor:
    """Return coefficients (n, n) by Adam from nearly zero; where the loss is no longer finite, the last good ones.

    ``trained`` trains the network along.
    """
    n, V = len(rows), layers.joined(rows)
    G = V @ V.T
    C = torch.full((n, n), START, dtype=rows.dtype, device=rows.device)
    if hollow:
        C.fill_diagonal_(0)
    good = C.clone()
    parameters = list(layers.network.parameters()) if trained else []
    C.requires_grad_(trained)
    optimizer = torch.optim.Adam([C, *parameters], lr=rate)

    def step(_: int) -> tuple[float, bool]:
        if trained:
            optimizer.zero_grad(set_to_none=True)
            V = torch.cat(layers.expressed(rows), dim=1)
            loss = (C @ V - V).square().sum()
            loss.backward()
        else:
            loss, C.grad = expression_loss(C, G)
        value = float(loss.detach())
        if math.isfinite(value):
            good.copy_(C.detach())
            if hollow and C.grad is not None:
                C.grad.fill_diagonal_(0)
            optimizer.step()
        return value, False

    stages.run("express", step)
    return good if stages.stopped_by["express"] == "diverged" else C.detach()
