"""Derivatives of the maps to rotations, for torch; kept apart so that NumPy users never import torch.

All have a backward and, outside captured graphs, a forward derivative, written with differentiable operations on what
they saved, so that second derivatives are true as well, in whichever order of the two modes.
"""

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from polyspan.linalg._polar_torch import Polar, _Turn

from ._rotation_maps import by_blocks, cross3, entries, gram_schmidt, pair_sums, sum3


def traced() -> bool:
    """Say whether torch is capturing a graph, where no value may be looked at."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None


def as_numpy(*tensors: Any) -> tuple[Any, ...] | None:
    """NumPy's views of tensors; None where one is on an accelerator or inside vmap, and refuses it, or in a graph."""
    if traced():
        return None
    try:
        return tuple([x.detach().numpy() for x in tensors])
    except (RuntimeError, TypeError):
        return None


def undifferentiated(*tensors: Any) -> tuple[Any, ...] | None:
    """NumPy's views of tensors of which no derivative can be asked for, neither backward nor forward; or None."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    return None if has_tangent(*tensors) else as_numpy(*tensors)


def has_tangent(*tensors: Any) -> bool:
    """Say whether one of the tensors has a forward derivative in the current level."""
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def joined(parts: list[Any]) -> Any:
    """Stack tensors along a new last axis, by a transposed copy, which is faster."""
    return torch.stack(parts).movedim(0, -1).contiguous()


def framed(x: Any) -> tuple[Any, Any]:
    """Frames of x (*b, 6), and where all is well; torch.compile takes no Function that has a forward derivative."""
    return (Frame if torch.compiler.is_compiling() else FrameBothWays).apply(x)


def attached(M: Any, R: Any) -> Any:
    """R, the rotations nearest to M (*b, 3, 3), with the derivatives that they have in M; as ``framed``."""
    return (Nearest if torch.compiler.is_compiling() else NearestBothWays).apply(M, R)


def of_outer_levels(ctx: Any) -> list[Any]:
    """What a Function saved, without tangents of the level that its ``jvp`` serves, with those of levels around it.

    torch switches forward mode off in ``jvp``, where a second derivative, forward over forward, would be 0 unnoticed;
    switched on again, it must not see the level's own tangents.
    """
    return [_primal(saved) for saved in ctx.saved_tensors]


def _primal(x: Any) -> Any:
    """Return a tensor without tangents of the current level; torch does not take them off a batch made by vmap."""
    functorch = torch._C._functorch
    if not functorch.is_batchedtensor(x):
        return forward_ad.unpack_dual(x).primal
    inner = _primal(functorch.get_unwrapped(x))
    return functorch._add_batch_dim(inner, functorch.maybe_get_bdim(x), functorch.maybe_get_level(x))


class Frame(torch.autograd.Function):
    """Gram-Schmidt frames (*b, 3, 3) of the halves a and b of x (*b, 6), and where all is well, as ``gram_schmidt``.

    A change of a and b turns the frame by w with ``w.z = da.y / |a|``, ``w.y = -da.z / |a|`` and
    ``w.x = (db.z - (x.b / |a|) da.z) / y.b``: three numbers a row, where autograd would keep every intermediate.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Any) -> tuple[Any, Any]:
        return gram_schmidt(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, R = ctx.saved_tensors
        arrays = x, R.reshape(*R.shape[:-2], 9), grads[0].reshape(*R.shape[:-2], 9)
        if undifferentiated(*arrays) is not None:
            return by_blocks(lambda numbers: (_pulled_back(numbers), False), arrays, 6)[0]
        return joined(_pulled_back([part for array in arrays for part in entries(array)]))


def _pulled_back(numbers: list[Any]) -> list[Any]:
    """Gradient in a and b from a, b, the frame R and the gradient in R, all by entries."""
    a, b, R, pulls = numbers[:3], numbers[3:6], numbers[6:15], numbers[15:]
    x, y, z = columns = [R[j::3] for j in range(3)]
    torques = [cross3(columns[j], pulls[j::3]) for j in range(3)]
    torque = [first + second + third for first, second, third in zip(*torques, strict=True)]
    along_x, along_y, along_z = (sum3(column, torque) for column in columns)
    pull = along_x / sum3(y, b)
    size = sum3(x, a)
    turn_y, turn_z = along_z / size, (along_y + pull * sum3(x, b)) / size
    return [*(turn_y * p - turn_z * q for p, q in zip(y, z, strict=True)), *(pull * part for part in z)]


def _pushed_on(numbers: list[Any]) -> list[Any]:
    """Change of the frame R, from a, b, R and the changes of a and b, all by entries."""
    a, b, R, da, db = numbers[:3], numbers[3:6], numbers[6:15], numbers[15:18], numbers[18:]
    x, y, z = (R[j::3] for j in range(3))
    size = sum3(x, a)
    turn_y, turn_z = -sum3(z, da) / size, sum3(y, da) / size
    turn_x = (sum3(z, db) + sum3(x, b) * turn_y) / sum3(y, b)
    return [
        part
        for p, q, r in zip(x, y, z, strict=True)
        for part in (turn_z * q - turn_y * r, turn_x * r - turn_z * p, turn_y * p - turn_x * q)
    ]


class FrameBothWays(Frame):
    """``Frame`` with its forward derivative too."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        Frame.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], output[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, None]:
        with forward_ad._set_fwd_grad_enabled(True):
            x, R = of_outer_levels(ctx)
            arrays = x, R.reshape(*R.shape[:-2], 9), tangents[0]
            moved = joined(_pushed_on([part for array in arrays for part in entries(array)]))
            return moved.reshape(R.shape), None


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
        return _turned(*ctx.saved_tensors, grads[0]), None


class NearestBothWays(Nearest):
    """``Nearest`` with its forward derivative too."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        Nearest.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return _turned(*of_outer_levels(ctx), tangents[0])


def nearest_in_n(M: Any) -> Any:
    """Nearest rotations to M (*b, n, n) with derivatives, backward and, outside captured graphs, forward."""
    return (Polar if torch.compiler.is_compiling() else PolarBothWays).apply(M, True)[0]


class PolarBothWays(Polar):
    """``Polar`` of square matrices with its forward derivative too: the map of ``backward``, its own transpose."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        Polar.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        return _turned_in_n(*ctx.saved_tensors, grads[0]), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, None, None]:
        with forward_ad._set_fwd_grad_enabled(True):
            return _turned_in_n(*of_outer_levels(ctx), tangents[0]), None, None


def _turned_in_n(M: Any, Q: Any, V: Any, s: Any, E: Any) -> Any:
    """Change of Q for a change E of square M, and gradient in M for a gradient E in Q."""
    H, inner = Q.mT @ M, Q.mT @ E
    return Q @ TurnBothWays.apply(inner - inner.mT, (H + H.mT) / 2, V, s)


class TurnBothWays(_Turn):
    """``_Turn``, the W of H W + W H = K, with its forward derivative: that of K - dH W - W dH."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _Turn.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, Any, None, None]:
        H, V, s, W = ctx.saved_tensors
        turn = TurnBothWays.apply((grads[0] - grads[0].mT) / 2, H, V, s)
        return turn, turn @ W + W @ turn, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            H, V, s, W = of_outer_levels(ctx)
            dK, dH = (torch.zeros_like(H) if t is None else t for t in tangents[:2])
            return TurnBothWays.apply(dK - dH @ W - W @ dH, H, V, s)


def _turned(M: Any, R: Any, E: Any) -> Any:
    """Change of R for a change E of M, and gradient in M for a gradient E in R."""
    adjugate, determinant, lost = pair_sums(R, M)
    turn = adjugate @ _vee(R.mT @ E)
    # Both branches are finite, so that no derivative of the one that is not taken is NaN.
    safe = torch.where(lost, torch.ones_like(determinant), determinant)[..., None]
    turn = torch.where(lost[..., None], torch.zeros_like(turn[..., 0]), turn[..., 0] / safe)
    return torch.linalg.cross(turn.unsqueeze(-2).expand_as(R), R, dim=-1).neg()


def _vee(A: Any) -> Any:
    """Axis (*b, 3, 1) of A - A'."""
    return torch.stack(
        [A[..., 2, 1] - A[..., 1, 2], A[..., 0, 2] - A[..., 2, 0], A[..., 1, 0] - A[..., 0, 1]], dim=-1
    ).unsqueeze(-1)
