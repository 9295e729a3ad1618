"""The polar factor's derivative, for torch; kept apart so that NumPy users never import torch."""

from typing import Any

import torch


class Polar(torch.autograd.Function):
    """Polar factor Q of (*b, p, q), p >= q, or the nearest rotation, with its true derivatives of every order.

    With H = Q'M, whose eigenvalues are the (signed) singular values s, a change E of M changes Q by
    ``Q W + (I - QQ') E / H``, where the antisymmetric W solves ``H W + W H = Q'E - E'Q``. This map is its own transpose
    (it is the Hessian of the sum of s), and divides by sums of s only: it is finite at isometries, where the derivative
    of the SVD's vectors is not.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(M: Any, special: bool) -> tuple[Any, Any, Any]:
        U, s, Vh = torch.linalg.svd(M, full_matrices=False)
        if special:
            flip = torch.ones_like(s)
            flip[..., -1] = torch.linalg.det(U @ Vh).sign()
            U, s = U * flip.unsqueeze(-2), s * flip
        return U @ Vh, Vh.mT.contiguous(), s

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        grad = grads[0]
        M, Q, V, s = ctx.saved_tensors
        H, inner = Q.mT @ M, Q.mT @ grad
        H = (H + H.mT) / 2
        out = Q @ _Turn.apply(inner - inner.mT, H, V, s)
        if Q.shape[-2] > Q.shape[-1]:
            out = out + torch.linalg.solve_ex(H, grad - Q @ inner, left=False)[0]
        return out, None


class _Turn(torch.autograd.Function):
    """Solve H W + W H = K for antisymmetric K and W, given H = V diag(s) V' in both forms; H only carries gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(K: Any, H: Any, V: Any, s: Any) -> Any:  # noqa: ARG004
        sums = s.unsqueeze(-1) + s.unsqueeze(-2)
        # The diagonal of K is 0, and so is that of W, even where one singular value is 0.
        sums = torch.where(torch.eye(s.shape[-1], dtype=torch.bool, device=s.device), torch.ones_like(sums), sums)
        rotated = V.mT @ K @ V
        return V @ ((rotated - rotated.mT) / (2 * sums)) @ V.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, Any, None, None]:
        (grad,) = grads
        H, V, s, W = ctx.saved_tensors
        turn = _Turn.apply((grad - grad.mT) / 2, H, V, s)
        return turn, turn @ W + W @ turn, None, None
