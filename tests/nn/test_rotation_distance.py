"""Derivatives of the distance between rotations, where it is smooth and where angles are 0, equal or half turns."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from polyspan.nn import chordal_distance, geodesic_distance, geodesic_loss, random_rotation

SQUARE = partial(geodesic_loss, squared=True, reduction="none")
MODES = (torch.func.jacfwd, torch.func.jacrev)


def rotations(n, seed, batch=()):
    return random_rotation(n, rng=torch.Generator().manual_seed(seed), batch=batch, dtype=torch.float64)


def skew(x, n):
    i, j = torch.triu_indices(n, n, 1)
    M = torch.zeros(n, n, dtype=x.dtype).index_put((i, j), x)
    return M - M.mT


def turn(angles, n):
    """A rotation by the angles in planes that are no coordinate planes, exactly so at half turns, and its logarithm."""
    D, L, Q = torch.eye(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64), rotations(n, 1)
    for k, a in enumerate(angles):
        c, s = (-1.0, 0.0) if a == math.pi else (math.cos(a), math.sin(a))
        D[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        L[2 * k + 1, 2 * k], L[2 * k, 2 * k + 1] = a, -a
    return Q @ D @ Q.mT, Q @ L @ Q.mT


def around(angles, n, distance):
    """The distance as a function of a small turn of one of two rotations, whose numbers are the entries of its log."""
    S, D = rotations(n, 2), turn(angles, n)[0]
    R = S @ D if any(angles) else S
    return lambda x: distance(S, R @ torch.matrix_exp(skew(x, n)))


def slope_and_curvature(f, n):
    zero = torch.zeros(n * (n - 1) // 2, dtype=torch.float64)
    return torch.autograd.functional.jacobian(f, zero), torch.autograd.functional.hessian(f, zero)


def square_in_closed_form(angles, n):
    """Gradient and Hessian of the squared distance: 2 log, and 2 (x/2) cot (x/2) of the differences x of its values."""
    L = turn(angles, n)[1]
    values, U = np.linalg.eigh(1j * L.numpy())
    half = (values[:, None] - values) / 2
    weights = np.where(np.abs(half) < 1e-9, 1, half / np.tan(np.where(half == 0, 1, half)))
    turned = [U.conj().T @ skew(e, n).numpy() @ U for e in torch.eye(n * (n - 1) // 2, dtype=torch.float64)]
    hessian = [[(weights * p * q.conj()).sum().real for q in turned] for p in turned]
    return 2 * L[tuple(torch.triu_indices(n, n, 1))], torch.tensor(hessian)


SMOOTH = [
    (3, (1.0,)), (3, (0.01,)), (3, (3.12,)), (4, (1.0, 0.3)), (4, (0.7, 0.7)), (4, (1e-3, 2e-3)), (4, (3.0, 0.2)),
    (5, (0.7, 0.7)), (5, (1.2, 0.0)), (5, (1e-6, 0.2)), (6, (2.0, 2.0, 2.0)), (6, (1.0, 1.0, 2.9)),
]  # fmt: skip


@pytest.mark.parametrize(("n", "angles"), SMOOTH)
def test_derivatives_are_those_of_the_closed_form_at_repeated_and_at_missing_angles_too(n, angles):
    """Margins: rounding over what formulas divide by, the angles and, to the second power, their distance from pi."""
    gradient, hessian = square_in_closed_form(angles, n)
    margin = 1e-13 / min(1.0, math.pi - max(angles)) ** 2
    close = partial(torch.testing.assert_close, rtol=0, atol=margin)
    slope, curvature = slope_and_curvature(around(angles, n, SQUARE), n)
    close(slope, gradient)
    close(curvature, hessian)
    distance = math.hypot(*angles)
    slope, curvature = slope_and_curvature(around(angles, n, geodesic_distance), n)
    close = partial(close, atol=margin / distance**2)
    close(slope, gradient / (2 * distance))
    close(curvature, (hessian / 2 - torch.outer(slope, slope)) / distance)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("distance", [geodesic_distance, SQUARE])
def test_derivatives_in_both_rotations_are_those_of_differences_off_the_rotations_as_well(n, distance):
    R, S = (rotations(n, seed, (2,)).requires_grad_() for seed in (3, 4))
    options = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(distance, (R, S), check_forward_ad=True, **options)
    assert torch.autograd.gradgradcheck(distance, (R, S), check_fwd_over_rev=True, check_rev_over_rev=True, **options)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_at_equality_the_square_is_a_bowl_and_the_distance_flat(n):
    slope, curvature = slope_and_curvature(around((), n, SQUARE), n)
    eye = torch.eye(len(slope), dtype=torch.float64)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-13)
    torch.testing.assert_close(curvature, 2 * eye, rtol=0, atol=1e-13)
    R = rotations(n, 2)
    for distance in (geodesic_distance, chordal_distance):
        P = R.clone().requires_grad_()
        first = torch.autograd.grad(distance(P, R), P, create_graph=True)[0]
        assert first.abs().max() == 0
        if first.requires_grad:
            assert torch.autograd.grad((first * R).sum(), P)[0].abs().max() == 0


HALF_TURNS = [
    (2, (math.pi,)), (3, (math.pi,)), (4, (math.pi, math.pi)), (4, (math.pi, 0.5)), (5, (math.pi, 0.0)),
    (6, (math.pi, math.pi, 0.5)),
]  # fmt: skip


@pytest.mark.parametrize(("n", "angles"), HALF_TURNS)
def test_planes_at_half_turns_count_as_constant(n, angles):
    others = [a if a < math.pi else 0.0 for a in angles]
    gradient = square_in_closed_form(others, n)[0]
    f = around(angles, n, SQUARE)
    slope, curvature = slope_and_curvature(f, n)
    assert f(torch.zeros_like(slope)).item() == pytest.approx(sum(a * a for a in angles), rel=1e-13)
    torch.testing.assert_close(slope, gradient, rtol=0, atol=1e-13)
    assert torch.isfinite(curvature).all()
    # With c the angles but for half turns, along c: d(c²) = 2 |c|, d²(c²) = 2.
    if gradient.any():
        along = gradient / gradient.norm()
        assert along @ curvature @ along == pytest.approx(2, abs=1e-12)
    else:
        turned = angles.count(math.pi)
        pairs = (n - 2 * turned) * (n - 2 * turned - 1) // 2
        expected = torch.tensor([0.0] * (len(slope) - pairs) + [2.0] * pairs, dtype=torch.float64)
        torch.testing.assert_close(torch.linalg.eigvalsh(curvature), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [3, 4, 5])
@pytest.mark.parametrize("distance", [geodesic_distance, SQUARE])
def test_second_derivatives_are_the_same_in_every_order_of_modes_and_through_vmap(n, distance):
    R, S = (rotations(n, seed, (3,)) for seed in (5, 6))
    if n == 3:  # near equality, and near a half turn, where other formulas hold
        R[1], R[2] = S[1] @ turn((0.01,), 3)[0], S[2] @ turn((3.12,), 3)[0]
    expected = torch.stack(
        [torch.autograd.functional.hessian(partial(distance, s), r) for r, s in zip(R, S, strict=True)]
    )
    for outer, inner in itertools.product(MODES, repeat=2):
        found = torch.vmap(outer(inner(distance, argnums=1), argnums=1))(S, R)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_many_rows_are_those_of_the_formula_for_all_rows(dtype):
    """Rows of several blocks, near equality and half turns among them, with and without a graph of the gradient."""
    R = random_rotation(rng=torch.Generator().manual_seed(7), batch=(10_000,), dtype=torch.float64)
    angles = torch.cat(
        [torch.logspace(-6, 0.49, 9998, dtype=torch.float64), torch.tensor([0.0, math.pi], dtype=torch.float64)]
    )
    c, s, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    D = torch.stack([c, -s, zero, s, c, zero, zero, zero, zero + 1], dim=-1).reshape(-1, 3, 3)
    R, S = R.to(dtype), (R @ D).to(dtype)
    S[-2] = R[-2]
    weights = torch.linspace(1, 2, len(R), dtype=dtype)
    for distance in (geodesic_distance, SQUARE):
        P, Q = R.clone().requires_grad_(), S.clone().requires_grad_()
        fast = torch.autograd.grad((distance(P, Q) * weights).sum(), (P, Q))
        formula = torch.autograd.grad((distance(P, Q) * weights).sum(), (P, Q), create_graph=True)
        for made, expected in zip(fast, formula, strict=True):
            assert torch.isfinite(made).all()
            error = (made - expected).abs().amax(dim=(-2, -1)) / torch.finfo(dtype).eps
            left = math.pi - angles
            # By the chord c the angle errs by eps / cos, and the gradient, (R - S) / (2 sin), by that over its sine;
            # by the sine itself only by one over that. Rows between may go either way. 64: two weights, two sides, and
            # sums of nine squares.
            assert (error * angles)[angles < 1.5].max() < 64
            assert (error * left**3)[(angles >= 1.5) & (left > 0.07)].max() < 64
            assert (error * left)[(left < 0.06) & (left > 0)].max() < 64
            assert error[-2:].max() == 0


def test_third_derivatives_in_n_dimensions_are_refused_and_not_wrong():
    R, S = rotations(4, 8), rotations(4, 9)

    def penalty(P):
        return torch.autograd.functional.hessian(partial(geodesic_distance, S), P, create_graph=True).square().sum()

    with pytest.raises(NotImplementedError, match="first and second derivatives, no third"):
        torch.autograd.grad(penalty(R.requires_grad_()), R)
    with pytest.raises(NotImplementedError, match="first and second derivatives, no third"):
        torch.func.jacfwd(torch.func.hessian(partial(geodesic_distance, S)))(R.detach())


def test_a_reflection_has_a_finite_distance_and_no_pull():
    R = torch.eye(4, dtype=torch.float64)
    P = (R * torch.tensor([1.0, 1.0, 1.0, -1.0])).requires_grad_()
    distance = geodesic_distance(P, R)
    assert math.isfinite(distance.item())
    assert torch.autograd.grad(distance, P)[0].abs().max() == 0
