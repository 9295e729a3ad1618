import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from polyspan.linalg import householder_product, nearest_isometry, principal_angles
from polyspan.nn import HouseholderProjector, LowRankOrthogonal
from polyspan.nn._reflection_frames import frame, leading, reflections


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(d, p, seed=0, dtype=torch.float64, bias=True):
    made = nn.utils.skip_init(nn.Linear, d, p, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=gen(seed))
    return made


def projector(d, p, rank, *, seed=0, dtype=torch.float64, **options):
    return HouseholderProjector(d, p, rank, generator=gen(seed), dtype=dtype, **options)


def slow_product(V):
    """H_1 H_2 ... from the definition."""
    made = torch.eye(len(V), dtype=V.dtype)
    for v in V.T:
        made = made @ (torch.eye(len(V), dtype=V.dtype) - 2 * torch.outer(v, v) / v.dot(v))
    return made


@settings(max_examples=15, deadline=None)
@given(d=st.integers(1, 20), p=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_a_projector_has_r_equal_singular_values_and_no_other(d, p, seed):
    rank = 1 + seed % min(d, p)
    A = projector(d, p, rank, seed=seed, gain=0.7, init="random").weight.detach()
    values = torch.linalg.svdvals(A)
    torch.testing.assert_close(values[:rank], torch.full((rank,), 0.7, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (values[rank:] < 1e-12).all()


@settings(max_examples=15, deadline=None)
@given(d=st.integers(2, 16), p=st.integers(2, 16), seed=st.integers(0, 2**31))
def test_the_start_is_exactly_the_leading_directions_of_the_layer_with_their_mean_gain(d, p, seed):
    old, rank = linear(d, p, seed % 1000), 1 + seed % min(d, p)
    U, s, Vh = torch.linalg.svd(old.weight.detach())
    made = HouseholderProjector.from_linear(old, rank)
    torch.testing.assert_close(made.weight.detach(), s[:rank].mean() * U[:, :rank] @ Vh[:rank], atol=1e-10, rtol=0)
    assert torch.equal(made.bias, old.bias)
    overlap = (made.directions.detach() * Vh[:rank]).sum(dim=1).abs()
    torch.testing.assert_close(overlap, torch.ones(rank, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_layer_is_the_published_product_of_reflections():
    made = projector(8, 6, 3, gain="learned", init="random")
    U, V = slow_product(made.out_vectors.detach()), slow_product(made.in_vectors.detach())
    S = torch.zeros(6, 8, dtype=torch.float64)
    S[:3, :3] = torch.eye(3, dtype=torch.float64)
    x = torch.randn(5, 8, generator=gen(), dtype=torch.float64)
    torch.testing.assert_close(made(x).detach(), x @ (U @ S @ V.T).T + 1, atol=1e-12, rtol=0)


def test_frames_agree_with_the_ground_floor_and_batch():
    Y = torch.randn(4, 12, 5, generator=gen(), dtype=torch.float64)
    torch.testing.assert_close(frame(Y), householder_product(Y, 5), atol=1e-12, rtol=0)


def test_reflections_give_the_frame_back_with_signs_and_never_vanish():
    Q = torch.linalg.qr(torch.randn(9, 4, generator=gen(), dtype=torch.float64))[0]
    for frame_wanted in (Q, torch.eye(9, 4, dtype=torch.float64), -torch.eye(9, 4, dtype=torch.float64)):
        Y, signs = reflections(frame_wanted)
        torch.testing.assert_close(frame(Y) * signs, frame_wanted, atol=1e-12, rtol=0)
        assert (torch.linalg.vector_norm(Y, dim=0) >= 1).all()


def test_reflections_at_unit_vectors_flip_their_own_axes():
    for rank in (1, 3):
        torch.testing.assert_close(frame(torch.eye(5, rank)), -torch.eye(5, rank))


def test_two_equal_reflections_cancel_and_the_determinant_counts_them():
    v = torch.randn(6, 1, generator=gen(), dtype=torch.float64)
    torch.testing.assert_close(householder_product(torch.cat([v, v], dim=1)), torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(frame(torch.cat([v, v], dim=1)), torch.eye(6, 2, dtype=torch.float64))
    V = torch.randn(6, 6, generator=gen(), dtype=torch.float64)
    assert float(torch.linalg.det(frame(V))) == pytest.approx(1)
    assert float(torch.linalg.det(slow_product(V[:, :3]))) == pytest.approx(-1)


def test_at_full_rank_and_gain_one_the_weight_is_the_nearest_orthogonal_matrix():
    old = linear(16, 16, dtype=torch.float32)
    made = HouseholderProjector.from_linear(old, 16, 1.0)
    torch.testing.assert_close(made.weight.detach(), nearest_isometry(old.weight.detach()), atol=1e-5, rtol=0)


def test_merging_and_converting_again_changes_nothing():
    first = HouseholderProjector.from_linear(linear(10, 12, dtype=torch.float32), 4)
    merged = first.to_linear()
    x = torch.randn(3, 10, generator=gen())
    torch.testing.assert_close(merged(x), first(x), atol=1e-6, rtol=1e-6)
    again = HouseholderProjector.from_linear(merged, 4)
    torch.testing.assert_close(again.weight, first.weight, atol=1e-6, rtol=1e-6)


def test_a_step_along_a_direction_moves_the_output_by_the_gain_and_steps_do_not_interfere():
    made = projector(12, 9, 4, gain=0.5)
    free = linear(12, 9)
    w, V = torch.randn(12, generator=gen(), dtype=torch.float64), made.directions.detach()
    moved = torch.stack([made(w + 3 * v) - made(w) for v in V]).detach()
    torch.testing.assert_close(moved, 3 * made.responses.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(moved @ moved.T, 2.25 * torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)
    _, s, Vh = torch.linalg.svd(free.weight.detach())
    lengths = torch.stack([(free(w + v) - free(w)).norm() for v in Vh[:4]]).detach()
    torch.testing.assert_close(lengths, s[:4])
    assert float(s[0] / s[3]) > 1.2


def test_what_is_orthogonal_to_all_directions_changes_nothing_and_lengths_are_those_of_the_shadow():
    made = projector(12, 9, 4, bias=False, gain=2.0)
    x, V = torch.randn(5, 12, generator=gen(), dtype=torch.float64), made.directions.detach()
    inside = x @ V.T @ V
    torch.testing.assert_close(made(x - inside).detach(), torch.zeros(5, 9, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(made(x).norm(dim=1).detach(), 2 * (x @ V.T).norm(dim=1), atol=1e-12, rtol=1e-12)
    A, U = made.weight.detach(), made.responses.detach() / 2
    torch.testing.assert_close(A @ A.T, 4 * U.T @ U, atol=1e-12, rtol=0)


def test_training_keeps_the_singular_values_and_moves_the_directions():
    made = projector(12, 9, 4, dtype=torch.float32)
    gain, before = float(made.gain), made.directions.detach().clone()
    x, y = torch.randn(64, 12, generator=gen(1)), torch.randn(64, 9, generator=gen(2))
    optimiser = torch.optim.Adam(made.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (made(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    values = torch.linalg.svdvals(made.weight.detach())
    assert (values[:4] / gain - 1).abs().max() < 1e-5
    assert values[4:].max() < 1e-5
    assert losses[-1] < 0.8 * losses[0]
    assert float(principal_angles(made.directions.detach().T, before.T).max()) > 0.3
    V = made.directions.detach()
    assert (V @ V.T - torch.eye(4)).abs().max() < 1e-5


def test_a_learned_gain_learns_and_a_fixed_one_is_no_parameter():
    learned, fixed = (projector(6, 6, 2, gain=kind) for kind in ("learned", "mean"))
    x = torch.randn(4, 6, generator=gen(), dtype=torch.float64)
    learned(x).square().sum().backward()
    assert float(learned.gain.grad) != 0
    assert "gain" not in dict(fixed.named_parameters())
    assert float(learned.gain.detach()) == pytest.approx(float(fixed.gain))
    assert sum(p.numel() for p in fixed.parameters()) == 2 * (6 + 6) + 6


def test_gradients_and_second_derivatives_agree_with_finite_differences_at_random_and_at_the_start():
    old = linear(4, 5)
    for made in (
        projector(4, 5, 2, init="random", gain="learned"),
        HouseholderProjector.from_linear(old, 2, "learned"),
    ):
        x = torch.randn(2, 4, generator=gen(), dtype=torch.float64, requires_grad=True)
        parameters = tuple(p.detach().clone().requires_grad_() for p in made.parameters())
        names = [name for name, _ in made.named_parameters()]

        def output(x, *values, made=made, names=names):
            return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(output, (x, *parameters))
        assert torch.autograd.gradgradcheck(output, (x, *parameters))


def test_a_zero_reflection_vector_reflects_nothing_and_gets_no_gradient_instead_of_nan():
    made = projector(6, 6, 3, init="random")
    with torch.no_grad():
        made.in_vectors[:, 1] = 0
    made(torch.randn(2, 6, generator=gen(), dtype=torch.float64)).square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in made.parameters())
    assert (made.in_vectors.grad[:, 1] == 0).all()
    torch.testing.assert_close(
        frame(made.in_vectors.detach()), householder_product(made.in_vectors.detach(), 3), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_frames_are_built_in_single_precision(dtype):
    made = HouseholderProjector.from_linear(linear(16, 16, dtype=torch.float32).to(dtype), 4)
    assert frame(made.in_vectors).dtype == torch.float32
    gram = frame(made.in_vectors).mT @ frame(made.in_vectors)
    assert (gram - torch.eye(4)).abs().max() < 1e-5
    out = made(torch.ones(2, 16, dtype=dtype))
    assert out.dtype == dtype
    assert bool(torch.isfinite(out).all())


def test_under_autocast_frames_stay_in_single_precision():
    made = projector(16, 16, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = frame(made.in_vectors)
        out = made(torch.ones(2, 16))
    assert weight.dtype == torch.float32
    assert (weight.mT @ weight - torch.eye(4)).abs().max() < 1e-5
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), made(torch.ones(2, 16)), atol=0.05, rtol=0.05)


def test_as_a_parametrisation_it_starts_from_the_weight_trains_and_takes_a_new_one():
    layer = linear(8, 6)
    expected = HouseholderProjector.from_linear(layer, 3).weight.detach()
    parametrize.register_parametrization(layer, "weight", LowRankOrthogonal(3))
    torch.testing.assert_close(layer.weight.detach(), expected, atol=1e-12, rtol=0)
    layer(torch.ones(2, 8, dtype=torch.float64)).square().sum().backward()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimiser.step()
    values = torch.linalg.svdvals(layer.weight.detach())
    assert (layer.weight.detach() - expected).abs().max() > 1e-3
    assert float(values[:3].max() - values[:3].min()) < 1e-12
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
    other = linear(8, 6, seed=5)
    layer.weight = other.weight.detach()
    wanted = HouseholderProjector.from_linear(other, 3).weight.detach()
    torch.testing.assert_close(layer.weight.detach(), wanted, atol=1e-12, rtol=0)


def test_a_kernel_is_refused_unless_it_may_be_flattened():
    conv = nn.Conv2d(3, 6, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weight must be a matrix of floats, got shape \(6, 3, 2, 2\)"):
        parametrize.register_parametrization(conv, "weight", LowRankOrthogonal(4))
    parametrize.register_parametrization(conv, "weight", LowRankOrthogonal(4, flatten=True))
    values = torch.linalg.svdvals(conv.weight.detach().flatten(1))
    assert conv.weight.shape == (6, 3, 2, 2)
    assert float(values[3] / values[0]) == pytest.approx(1)
    assert float(values[4]) < 1e-12


def test_the_random_draw_comes_from_the_generator_only():
    state = torch.random.get_rng_state()
    a, b, c = (projector(6, 5, 2, seed=seed, init=init) for seed, init in ((0, "random"), (0, "random"), (1, "random")))
    d = projector(6, 5, 2, init="from_weight")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a.in_vectors, b.in_vectors)
    assert not torch.equal(a.in_vectors, c.in_vectors)
    values = torch.linalg.svdvals(d.weight.detach())
    assert 0 < float(values[0]) < 2
    assert float(a.gain) == 1


def test_the_published_vectors_of_a_trained_layer_do_not_span_its_directions_and_ours_do():
    from polyspan.claims.householder_projector import published_weight

    old = linear(24, 24)
    V = leading(old.weight, 4).into
    theirs = torch.linalg.svd(published_weight(old.weight, 4))[2][:4]
    ours = HouseholderProjector.from_linear(old, 4).directions.detach()
    assert float(principal_angles(ours.T, V).max()) < 1e-7
    assert float(principal_angles(theirs.T, V).max()) > math.radians(70)


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_a_rank_that_the_matrix_cannot_have_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank must be between 1 and 5, the smaller side of the matrix, got {rank}"):
        HouseholderProjector(5, 9, rank)
    with pytest.raises(ValueError, match=f"got {rank}"):
        HouseholderProjector.from_linear(nn.Linear(5, 9), rank)
    with pytest.raises(ValueError, match=f"got {rank}"):
        parametrize.register_parametrization(nn.Linear(5, 9), "weight", LowRankOrthogonal(rank))


@pytest.mark.parametrize("gain", ["median", 0.0, -1.0, math.inf, math.nan])
def test_a_gain_that_is_none_is_refused(gain):
    for make in (lambda: HouseholderProjector(5, 5, 2, gain=gain), lambda: LowRankOrthogonal(2, gain=gain)):
        with pytest.raises(ValueError, match="gain must be 'mean', 'learned' or a finite number above 0, got"):
            make()


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"init must be one of .*, got 'svd'"):
        HouseholderProjector(5, 5, 2, init="svd")
    with pytest.raises(ValueError, match=r"linear must be a torch\.nn\.Linear, got Conv1d"):
        HouseholderProjector.from_linear(nn.Conv1d(3, 3, 1), 2)
    with pytest.raises(ValueError, match=r"weight must be of shape \(5, 4\), got \(4, 5\)"):
        HouseholderProjector(4, 5, 2).set_weight_(torch.ones(4, 5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    old = nn.Linear(6, 5)
    with torch.no_grad():
        old.weight[2, 3] = bad
    with pytest.raises(ValueError, match="weight must be finite, got NaN or infinity"):
        HouseholderProjector.from_linear(old, 2)


def test_integer_weights_are_refused():
    with pytest.raises(ValueError, match=r"weight must be a matrix of floats, got .* torch.int8; .* dequantise"):
        leading(torch.ones(4, 4, dtype=torch.int8), 2)


def test_a_weight_of_too_low_a_rank_warns_and_is_completed():
    old = linear(6, 5)
    with torch.no_grad():
        old.weight[2:] = 0
    with pytest.warns(UserWarning, match="weight has numerical rank 2, below the rank 4 asked for"):
        made = HouseholderProjector.from_linear(old, 4)
    values = torch.linalg.svdvals(made.weight.detach())
    assert float(values[3] / values[0]) == pytest.approx(1)
    V = torch.linalg.svd(old.weight.detach())[2][:2]
    inside = made.directions.detach() @ V.T
    np.testing.assert_allclose(np.sort(np.linalg.svd(inside.numpy())[1]), 1, atol=1e-10)
