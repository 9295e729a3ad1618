r"""Doubly stochastic memberships of a batch by damped rounds, with their gradient in closed form.

With :math:`L = K/\eta`, the rounds are :math:`u_{t+1} = \tfrac12(u_t - \ell_t)` with
:math:`\ell_t = \log\sum_j\exp(L_{ij} + u_{t,j})`, from :math:`u_0 = -\tfrac12\log\sum_j\exp L_{ij}`, and
:math:`\Gamma_{ij} = \exp(L_{ij} + u_i + u_j)` with the last u. A loss with derivative G by them has
:math:`\Gamma\circ(G + \sum_t \alpha_t\xi_t^\top)` by L: each round adds a matrix of rank one, since its exponentials
are those of :math:`\Gamma` with rows and columns rescaled. So a step holds two matrices n x n whatever the number of
rounds, and takes the exponentials of one.
"""

import math
from typing import Any

import torch
from torch import Tensor

from polyspan.linalg import doubly_stochastic

# Range of logits within which exponentials, their sums and their ratios stay far from both ends of float32.
NARROW = 30.0


def memberships_by_rounds(C: Tensor, eta: float, n_iter: int, absolute: bool) -> Tensor:
    """Project the kernel of rows C (*b, n, d), float32 or wider, by exactly ``n_iter`` damped rounds."""
    # No cosine exceeds the largest square of a row, by the inequality of Cauchy and Schwarz.
    largest = float(C.detach().square().sum(-1).max()) if C.numel() else math.nan
    if not largest / eta * (1 if absolute else 2) <= NARROW:
        return _in_the_log_domain(C, eta, n_iter, absolute)
    return _Memberships.apply(C, eta, n_iter, absolute)[0]


def _in_the_log_domain(C: Tensor, eta: float, n_iter: int, absolute: bool) -> Tensor:
    kernel = C @ C.mT
    kernel = kernel.abs() if absolute else kernel
    return doubly_stochastic(kernel, temperature=eta, max_iter=n_iter, tol=None)


class _Memberships(torch.autograd.Function):
    """Memberships, and what the gradient needs beside them: the sign of the kernel and the potentials of the rounds."""

    @staticmethod
    def forward(C: Tensor, eta: float, n_iter: int, absolute: bool) -> tuple[Tensor, ...]:
        kernel = C @ C.mT
        turned = _transposed(kernel)
        if not torch.equal(kernel, turned):
            kernel = kernel.add_(turned).div_(2)
        weights = torch.abs(kernel, out=turned) if absolute else kernel
        weights = weights.div_(eta).exp_()
        potentials, sums = [torch.zeros_like(C[..., 0])], []
        u = None
        for _ in range(n_iter + 1):
            last = potentials[-1]
            sums.append((weights @ last.exp().unsqueeze(-1)).squeeze(-1).log())
            u = -sums[0] / 2 if u is None else (u - sums[-1]) / 2
            potentials.append(u)
        # The sum of the two potentials in one factor: (w x) y is not (w y) x to the bit.
        row = potentials[-1].exp()
        gamma = weights.mul_(row.unsqueeze(-1) * row.unsqueeze(-2))
        sign = kernel.sign_() if absolute else C.new_zeros(())
        return gamma, sign, torch.stack(potentials, -1), torch.stack(sums, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        C, ctx.eta, ctx.n_iter, ctx.absolute = inputs
        ctx.mark_non_differentiable(*output[1:])
        # No zeros in the shape of the outputs that nobody differentiates.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(C, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad: Tensor | None = grads[0]
        if grad is None:
            return None, None, None, None
        C, gamma, sign, potentials, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Somebody differentiates the gradient: the rounds themselves can be.
            again = _in_the_log_domain(C, ctx.eta, ctx.n_iter, ctx.absolute)
            return torch.autograd.grad(again, C, grad, create_graph=True)[0], None, None, None
        both = _transposed(grad).add_(grad)
        by_u = torch.linalg.vecdot(both, gamma)
        last = potentials[..., -1]
        left, right = [], []
        for t in range(ctx.n_iter, -1, -1):
            # exp(L + u_t) is gamma with columns times exp(u_t - u) and rows times exp(-u).
            across = (potentials[..., t] - last).exp()
            along = -by_u / 2 * (-sums[..., t] - last).exp()
            left.append(along)
            right.append(across)
            pulled = across * (gamma @ along.unsqueeze(-1)).squeeze(-1)
            by_u = by_u / 2 + pulled
        first, second = torch.stack(left + right, -1), torch.stack(right + left, -1)
        both += first @ second.mT
        both *= gamma
        if ctx.absolute:
            both *= sign
        return both @ C / ctx.eta, None, None, None


def _transposed(matrix: Tensor) -> Tensor:
    """Return a transpose in memory of its own: read through strides it would take seven times as long."""
    return matrix.mT.clone(memory_format=torch.contiguous_format)
