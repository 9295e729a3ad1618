"""Derivatives of two maps to rotations, for torch; kept apart so that NumPy users never import torch.

Both are written with differentiable operations on what they saved, so that second derivatives are true as well.
"""

from typing import Any

import torch

from ._rotation_maps import dot, pair_sums


class Frame(torch.autograd.Function):
    """Attach to a rotation R its derivative in the vectors a and b of which it is the Gram-Schmidt frame.

    A change of a and b turns the frame by w with ``w.z = da.y / |a|``, ``w.y = -da.z / |a|`` and
    ``w.x = (db.z - (x.b / |a|) da.z) / y.b``: three numbers a row, where autograd would keep every intermediate.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Any, b: Any, R: Any) -> Any:  # noqa: ARG004
        return R.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, Any, None]:
        a, b, R = ctx.saved_tensors
        x, y, z = R.unbind(-1)
        torque = sum(torch.linalg.cross(R, grads[0], dim=-2).unbind(-1))
        along_x, along_y, along_z = (dot(column, torque)[..., None] for column in (x, y, z))
        pull = along_x / dot(y, b)[..., None]
        grad_a = along_z * y - (along_y + pull * dot(x, b)[..., None]) * z
        return grad_a / torch.linalg.vector_norm(a, dim=-1, keepdim=True), pull * z, None


class Nearest(torch.autograd.Function):
    """Attach to R, the rotation nearest to a 3 x 3 matrix M, its derivative; 0 where the rotation is not unique.

    With H = R'M a change E of M turns R by ``R [w]`` with ``(tr(H) I - H) w = vee(R'E - E'R)``, which is its own
    transpose: a 3 x 3 system, where the derivative of the SVD's vectors divides by differences of singular values.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(M: Any, R: Any) -> Any:  # noqa: ARG004
        return R.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        M, R = ctx.saved_tensors
        adjugate, determinant, lost = pair_sums(R, M)
        turn = adjugate @ _vee(R.mT @ grads[0])
        # Both branches are finite, so that no derivative of the one that is not taken is NaN.
        safe = torch.where(lost, torch.ones_like(determinant), determinant)[..., None]
        turn = torch.where(lost[..., None], torch.zeros_like(turn[..., 0]), turn[..., 0] / safe)
        return torch.linalg.cross(turn.unsqueeze(-2).expand_as(R), R, dim=-1).neg(), None


def _vee(A: Any) -> Any:
    """Axis (*b, 3, 1) of A - A'."""
    return torch.stack(
        [A[..., 2, 1] - A[..., 1, 2], A[..., 0, 2] - A[..., 2, 0], A[..., 1, 0] - A[..., 0, 1]], dim=-1
    ).unsqueeze(-1)
