"""Implicit derivatives of transport plans, for torch; kept apart so that NumPy users never import torch."""

from typing import Any

import torch


class TransportPlan(torch.autograd.Function):
    """The plan that was found for logits Z and sums r and c, with its derivative as if it were the exact one.

    A change of Z moves the plan P by ``P * (dZ + du + dv)`` where du (rows) and dv (columns) restore both sums. The
    transpose of that system is itself, ``[diag(r) P; P' diag(c)]``, singular along (1, -1); rows are eliminated (or
    columns, whichever leaves the smaller one), and the singular direction is pinned.
    """

    @staticmethod
    def forward(logits: Any, r: Any, c: Any, plan: Any) -> Any:  # noqa: ARG004
        return plan.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1], inputs[2], output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, Any, Any, None]:
        r, c, P = ctx.saved_tensors
        pull = grads[0] * P
        if P.shape[-1] <= P.shape[-2]:
            a, b = _both_multipliers(P, pull, r, c)
        else:
            b, a = _both_multipliers(P.mT, pull.mT, c, r)
        return pull - P * (a.unsqueeze(-1) + b.unsqueeze(-2)), a, b, None


def _both_multipliers(P: Any, pull: Any, r: Any, c: Any) -> tuple[Any, Any]:
    """Solve ``r a + P b = pull 1`` and ``P' a + c b = pull' 1`` for tall P; empty rows and columns get 0."""
    inverse = torch.where(r > 0, 1 / torch.where(r > 0, r, torch.ones_like(r)), torch.zeros_like(r)).unsqueeze(-1)
    rows, columns = pull.sum(-1, keepdim=True), pull.sum(-2).unsqueeze(-1)
    schur = torch.diag_embed(c) - P.mT @ (inverse * P)
    schur = schur + c.unsqueeze(-1) * c.unsqueeze(-2) / c.sum(-1)[..., None, None]
    # Where the plan falls apart into blocks there are more singular directions, along which the gradient vanishes
    # whatever the multipliers are: a ridge of rounding size keeps them finite.
    floor = c.shape[-1] * torch.finfo(c.dtype).eps
    schur = schur + torch.diag_embed(torch.where(c > 0, floor * c, torch.ones_like(c)))
    b = torch.linalg.solve(schur, columns - P.mT @ (inverse * rows))
    a = inverse * (rows - P @ b)
    return a.squeeze(-1), b.squeeze(-1)


class SymmetricPlan(torch.autograd.Function):
    """The symmetric plan that was found for symmetric logits, with its derivative as if rows summed to 1 exactly.

    The one potential moves by du with ``(I + P) du = -(P * dZ) 1``.
    """

    @staticmethod
    def forward(logits: Any, plan: Any) -> Any:  # noqa: ARG004
        return plan.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        (P,) = ctx.saved_tensors
        pull = grads[0] * P
        pull = (pull + pull.mT) / 2
        # I + P is singular where items fall into two sides that only see each other; see the ridge above.
        n = P.shape[-1]
        system = P + (1 + n * torch.finfo(P.dtype).eps) * torch.eye(n, dtype=P.dtype, device=P.device)
        a = torch.linalg.solve(system, pull.sum(-1, keepdim=True))
        return pull - P * (a + a.mT), None


class SymmetricMatrix(torch.autograd.Function):
    """A symmetric matrix itself, whose gradient is that of its mean with its transpose."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Any) -> Any:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # noqa: ARG004
        return (grads[0] + grads[0].mT) / 2
