"""Squared angles between rotations with derivatives, for torch; kept apart so that NumPy users never import torch.

First and second derivatives are true. At half turns, where the angle has a kink, the half turned plane counts as
constant.
"""

import math
from typing import Any

import numpy as np
import torch
from scipy.special import zetac
from torch.autograd import forward_ad

from ._rotation_angles import NEARLY_HALF_TURN, angle_by_chord, angle_in_n, noise, pulls_near_half_turns
from ._rotation_maps import dot, nearest, root
from ._rotation_torch import as_numpy, has_tangent, of_outer_levels, undifferentiated

# Squared sine of half the angle t below which t / sin t is a sum of powers of it, with these coefficients.
SMALL = 1e-3
NEAR = math.pi - 2 * math.asin(math.sqrt(NEARLY_HALF_TURN))
POWERS = (1.0, 2 / 3, 8 / 15, 16 / 35, 128 / 315, 256 / 693)


def angle_of_tensors(R: Any, S: Any, squared: bool) -> Any:
    """Angles (*b,) from R to S (*b, n, n), or their squares summed over planes, with derivatives in both modes."""
    seen = undifferentiated(R, S)
    n = R.shape[-1]
    if seen is not None:
        found = _angle_by_chord(*seen) if n == 3 else angle_in_n(R, S)
        return found * found if squared else found
    if n == 3:
        if R.shape != S.shape:
            R, S = torch.broadcast_tensors(R, S)
        if as_numpy(R, S) is not None and not has_tangent(R, S):
            return Angle.apply(R, S, squared)
        square = _square_in_3(R, S)
    else:
        D = R.mT @ S
        square = _square_in_2(D) if n == 2 else _square_in_n(D)
    return square if squared else root(square)


def _square_in_2(D: Any) -> Any:
    sine, cosine = D[..., 1, 0] - D[..., 0, 1], D[..., 0, 0] + D[..., 1, 1]
    turn = torch.atan2(torch.where((sine.abs() <= noise(D)) & (cosine < 0), sine.detach(), sine), cosine)
    return turn * turn


def _square_in_n(D: Any) -> Any:
    Q = nearest(D, look=False)[0]
    square = (SquaredLength if torch.compiler.is_compiling() else SquaredLengthBothWays).apply(Q)[0]
    # Below the rounding of R'S the direction of a turn is noise. The square loses its value there, not its derivatives,
    # so that its root is flat.
    vague = square.detach() <= noise(D) ** 2
    return square - torch.where(vague, square.detach(), torch.zeros_like(square))


def _angle_by_chord(R: np.ndarray, S: np.ndarray) -> Any:
    """By torch's arc sine, which is several times as fast as NumPy's on many processors."""
    return torch.from_numpy(angle_by_chord(R, S, lambda x: torch.from_numpy(x).asin_()))


class Angle(torch.autograd.Function):
    """Angles t of matrices (*b, 3, 3) on the processor, or their squares: dt is ``(R - S) / (2 sin t)``, by the chord.

    Near half turns t is had from its sine, as in ``angle_by_chord``. Only those rows cost more than one product.
    """

    @staticmethod
    def forward(ctx: Any, R: Any, S: Any, squared: bool) -> Any:
        found = _angle_by_chord(R.detach().numpy(), S.detach().numpy())
        ctx.squared = squared
        ctx.save_for_backward(R, S, found)
        return found * found if squared else found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, Any, None]:
        (grad,), (R, S, t) = grads, ctx.saved_tensors
        seen = undifferentiated(R, S, grad)
        if seen is None:
            if not ctx.squared:
                grad = grad * _half_inverse(root(_square_in_3(R, S)))
            return *_pulls(R, S, grad), None
        if ctx.squared:
            grad = 2 * t * grad
        scale = torch.div(grad, t.sin().mul_(2))
        # The limit of 2 t / (2 sin t), times a gradient of 0.
        scale.masked_fill_(t == 0, 0)
        pull_R = (R - S).mul_(scale[..., None, None])
        pull_S = pull_R.neg() if ctx.needs_input_grad[1] else None
        near = (t.numpy().reshape(-1) > NEAR).nonzero()[0]
        if len(near):
            flat = [x.reshape(-1, 9) for x in seen[:2]]
            found = pulls_near_half_turns(*flat, near, grad.numpy().reshape(-1)[near], noise(R))
            for pull, part in zip((pull_R, pull_S), found, strict=True):
                if pull is not None:
                    pull.numpy().reshape(-1, 9)[near] = part
        return pull_R, pull_S, None


def _half_inverse(t: Any) -> Any:
    """Half of 1 / t, and 0 at 0."""
    zero = t == 0
    return torch.where(zero, torch.zeros_like(t), 0.5 / torch.where(zero, torch.ones_like(t), t))


def _squared_chord(R: Any, S: Any) -> tuple[Any, Any, Any, Any]:
    """R - S, an eighth of its square, and where that is nearly 1 and nearly 0."""
    gap = R - S
    y = (gap * gap).sum(dim=(-2, -1)) / 8
    return gap, y, y.detach() > 1 - NEARLY_HALF_TURN, y.detach() < SMALL


def _powers(y: Any, coefficients: Any) -> Any:
    total = torch.zeros_like(y)
    for coefficient in reversed(tuple(coefficients)):
        total = total * y + coefficient
    return total


def _axis(R: Any, S: Any) -> tuple[Any, Any, Any]:
    """Axis times 2 sin of the angle, its square made one of a half turn's neighbour, and where it is none."""
    axis = torch.linalg.cross(R, S, dim=-2).sum(dim=-1)
    square = dot(axis, axis)
    known = (square.detach() > noise(R) ** 2) & (square.detach() < 4)
    return axis, torch.where(known, square, torch.ones_like(square)), known


def _square_in_3(R: Any, S: Any) -> Any:
    """Squares of ``Angle``'s by what torch differentiates itself: for vmap, forward mode, graphs and accelerators."""
    _, y, near, small = _squared_chord(R, S)
    t = 2 * torch.asin(torch.sqrt(torch.where(near | small, torch.full_like(y, 0.25), y)))
    series = 4 * y * _powers(y, (c / (k + 1) for k, c in enumerate(POWERS)))
    axis, square, known = _axis(R, S)
    turned = math.pi - torch.asin(torch.sqrt(square) / 2)
    # No longer a neighbour of a half turn: all of one, or sines that no rotations have.
    end = torch.full_like(turned, math.pi / 2)
    turned = torch.where(known, turned, torch.where(dot(axis, axis).detach() < 4, 2 * end, end))
    return torch.where(near, turned * turned, torch.where(small, series, t * t))


def _pulls(R: Any, S: Any, grad: Any) -> tuple[Any, Any]:
    """Gradients of squared angles in R and S for one in its result, by operations that torch differentiates."""
    gap, y, near, small = _squared_chord(R, S)
    safe = torch.where(near | small, torch.full_like(y, 0.25), y)
    ratio = torch.asin(torch.sqrt(safe)) / torch.sqrt(safe * (1 - safe))
    ratio = torch.where(near, torch.zeros_like(y), torch.where(small, _powers(y, POWERS), ratio))
    pull = (grad * ratio)[..., None, None] * gap
    turned_R, turned_S = _pulls_near_half_turns(R, S, torch.where(near, grad, torch.zeros_like(grad)))
    return turned_R + pull, turned_S - pull


def _pulls_near_half_turns(R: Any, S: Any, grad: Any) -> tuple[Any, Any]:
    axis, square, known = _axis(R, S)
    size = torch.sqrt(square)
    t = math.pi - torch.asin(size / 2)
    scale = torch.where(known, -2 * grad * t / (size * torch.sqrt(4 - square)), torch.zeros_like(t))
    turn = (scale[..., None] * axis)[..., None].expand_as(R)
    return torch.linalg.cross(S, turn, dim=-2), torch.linalg.cross(turn, R, dim=-2)


class SquaredLength(torch.autograd.Function):
    """Sum over planes of the squared angles of rotations Q (*b, n, n), with the basis and angles that it is read from.

    A change Q W of Q, with W antisymmetric, changes it by the inner product of W with log Q: nothing is divided by
    differences of angles, unlike in derivatives of singular values, each of which is a double one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(Q: Any) -> tuple[Any, Any, Any, Any]:
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        # |e^{it} + 1| = 2 cos(t/2) and |e^{it} - 1| = 2 sin(t/2). Vectors of nearly equal cosines are mixed, which
        # matters near half turns only; there these cosines are far apart, relative to rounding.
        _, cosines, Vh = torch.linalg.svd(Q + eye)
        V = Vh.mT.contiguous()
        angles = 2 * torch.atan2(torch.linalg.vector_norm((Q - eye) @ V, dim=-2), cosines)
        moving = cosines > noise(Q)
        return (angles * angles).sum(dim=-1) / 2, V, angles, moving

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        Q, *basis = ctx.saved_tensors
        return grads[0][..., None, None] * (Q @ _logarithm(Q, *basis))


class SquaredLengthBothWays(SquaredLength):
    """``SquaredLength`` with its forward derivative, and with second ones; torch.compile takes neither."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        SquaredLength.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        Q, *basis = ctx.saved_tensors
        return grads[0][..., None, None] * (Q @ Logarithm.apply(Q, *basis))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, None, None, None]:
        with forward_ad._set_fwd_grad_enabled(True):
            Q, *basis = of_outer_levels(ctx)
            moved = ((Q @ Logarithm.apply(Q, *basis)) * tangents[0]).sum(dim=(-2, -1))
            return moved, None, None, None


def _logarithm(Q: Any, V: Any, angles: Any, moving: Any) -> Any:
    """Logarithm without the planes of half turns, where it has two values whose mean is 0."""
    return V @ _logarithm_in_basis(Q, V, angles, moving) @ V.mT


def _logarithm_in_basis(Q: Any, V: Any, angles: Any, moving: Any) -> Any:
    ratio = torch.where(angles > 0, angles / torch.sin(angles), torch.ones_like(angles))
    ratio = torch.where(moving, ratio, torch.zeros_like(ratio))
    skew = V.mT @ (Q - Q.mT) @ V / 4
    both = moving[..., :, None] & moving[..., None, :]
    return torch.where(both, skew * (ratio[..., :, None] + ratio[..., None, :]), torch.zeros_like(skew))


class Logarithm(torch.autograd.Function):
    """Logarithm L of rotations; a change Q W of Q changes it by ``w(ad L) W + [L, W] / 2``, w(ix) = x/2 cot x/2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(Q: Any, V: Any, angles: Any, moving: Any) -> Any:
        return _logarithm(Q, V, angles, moving)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None, None, None]:
        Q, *basis = ctx.saved_tensors
        return Turned.apply(grads[0], Q, *basis, True), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            Q, *basis = of_outer_levels(ctx)
            return Turned.apply(tangents[0], Q, *basis, False)


class Turned(torch.autograd.Function):
    """Change of log Q for a change E of Q; ``back``: gradient in Q for a gradient E in log Q. Linear in E.

    A third derivative, that in Q, is not there, and refused.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(E: Any, Q: Any, V: Any, angles: Any, moving: Any, back: bool) -> Any:
        W = E if back else Q.mT @ E
        W = V.mT @ (W - W.mT) @ V / 2
        L = _logarithm_in_basis(Q, V, angles, moving)
        one, other = angles[..., :, None], angles[..., None, :]
        even, mixed = _of_sum_and_difference(one, other, moving[..., :, None] | moving[..., None, :])
        half = (L @ W - W @ L) / 2
        turned = V @ (even * W + mixed * (L @ W @ L) + (-half if back else half)) @ V.mT
        return Q @ turned if back else turned

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        *tensors, ctx.back = inputs
        ctx.save_for_backward(*tensors[1:])
        ctx.save_for_forward(*tensors[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if ctx.needs_input_grad[1]:
            raise NotImplementedError("distances of rotations of n > 3 have first and second derivatives, no third")
        return Turned.apply(grads[0], *ctx.saved_tensors, not ctx.back), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        if tangents[1] is not None:
            raise NotImplementedError("distances of rotations of n > 3 have first and second derivatives, no third")
        with forward_ad._set_fwd_grad_enabled(True):
            return Turned.apply(tangents[0], *of_outer_levels(ctx), ctx.back)


def _of_sum_and_difference(one: Any, other: Any, moving: Any) -> tuple[Any, Any]:
    """w(ad L) on the antisymmetric matrices of two planes with angles a and b: x and y of ``x W + y L W L``.

    There (ad L)² has the eigenvalues -(a + b)² and -(a - b)². With u and v the squares of a + b and a - b over 2 pi,
    w = 1 - 2 u / (1 - u) - 2 (c_1 u + c_2 u² + ...) with c_k = zeta(2k) - 1 < 4^(1-k), whose divided difference
    between u and v needs no division by u - v. Two half turned planes, where u = 1, count as constant.
    """
    u, v = (((one + sign * other) / (2 * math.pi)) ** 2 for sign in (1, -1))
    u = torch.where(moving, u, torch.zeros_like(u))
    between = -2 / ((1 - u) * (1 - v))
    power_of_v, mixed_powers = torch.ones_like(v), torch.ones_like(v)
    for k in range(1, 2 + math.ceil(-math.log(torch.finfo(u.dtype).eps, 4))):
        between = between - 2 * float(zetac(2 * k)) * mixed_powers
        power_of_v = power_of_v * v
        mixed_powers = mixed_powers * u + power_of_v
    half = (one - other) / 2
    of_difference = torch.where(half == 0, torch.ones_like(half), half / torch.tan(half))
    even, mixed = of_difference + (u - v) * between / 2, between / (2 * math.pi**2)
    zero = torch.zeros_like(even)
    return torch.where(moving, even, zero), torch.where(moving, mixed, zero)
