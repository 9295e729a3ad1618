"""Lengths of zero, and the layers built on them, under double backward: gradient penalties ask for it."""

import pytest
import torch

from polyspan.nn import CausalGrassmannMixing, SparseRateReductionLoss, plucker_coordinates
from polyspan.nn._lengths import safe_length
from polyspan.run import torch_generator


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch_generator(seed), dtype=dtype)


def weighted(y):
    """A sum that no symmetry makes constant."""
    return (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()


def twice(function, *inputs):
    """First and second derivatives of a function's weighted sum, the latter along one direction."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(weighted(function(*inputs)), inputs, create_graph=True)
    return first, torch.autograd.grad(sum(weighted(g) for g in first), inputs)


def mixing(norm, dtype=torch.float64, **options):
    return CausalGrassmannMixing(6, 4, (1, 2, 4), 0.0, norm, generator=torch_generator(0), dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_length_is_the_norm_to_the_bit_and_flat_at_zero(dtype):
    x = normal(5, 7, dtype=dtype)
    x[2] = 0
    assert torch.equal(safe_length(x), torch.linalg.vector_norm(x, dim=-1, keepdim=True))
    for tiny in (0.0, 1e-200 if dtype == torch.float64 else 1e-30):  # the second has squares of zero
        first, second = twice(safe_length, torch.full((1, 3), tiny, dtype=dtype))
        assert first[0].abs().max() == 0
        assert second[0].abs().max() == 0
    unknown = torch.tensor([[float("nan"), 0.0]], dtype=dtype)
    assert torch.isnan(safe_length(unknown)).all()


@pytest.mark.parametrize("norm", ["smooth", "l2", "none"])
@pytest.mark.parametrize("causal", [True, False])
def test_second_derivatives_of_the_mixing_are_right_with_the_sequences_start_in_it(norm, causal):
    """Five tokens and offsets to 4: most of the pairs reach before the start, into zeros."""
    module = mixing(norm, causal=causal)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "norm" not in name:
                p.mul_(20)
    x = normal(5, 6, seed=1).requires_grad_()
    weight = module.reduction.weight.detach().clone().requires_grad_()

    def mixed(x, weight):
        return torch.func.functional_call(module, {"reduction.weight": weight}, (x,))

    assert torch.autograd.gradcheck(mixed, (x, weight))
    assert torch.autograd.gradgradcheck(mixed, (x, weight))


@pytest.mark.parametrize("norm", ["smooth", "l2", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_of_zero_repeated_and_padded_ones_have_finite_second_derivatives(norm, dtype):
    module = mixing(norm, dtype, bias=False)
    x = normal(2, 7, 6, seed=1, dtype=dtype)
    x[0, 2], x[0, 5], x[1] = 0, x[0, 4], 0
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0]])
    for function in (module, lambda x: module(x, mask)):
        first, second = twice(function, x)
        assert torch.isfinite(first[0]).all()
        assert torch.isfinite(second[0]).all()
        assert second[0][0].abs().max() > 0


def test_second_derivatives_of_coordinates_are_right_and_finite_where_there_is_no_plane():
    u, v = normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    for normalize in (True, False):

        def coordinates(u, v, normalize=normalize):
            return plucker_coordinates(u, v, normalize=normalize)

        assert torch.autograd.gradgradcheck(coordinates, (u, v))
    nothing = torch.zeros(3, 4, dtype=torch.float64)
    for pair in ((nothing, nothing), (u.detach(), nothing), (nothing, v.detach()), (u.detach(), u.detach())):
        first, second = twice(plucker_coordinates, *pair)
        assert all(torch.isfinite(g).all() for g in (*first, *second))


def test_the_rate_loss_has_finite_second_derivatives_with_dead_tokens():
    loss = SparseRateReductionLoss()
    Z, U = normal(2, 5, 6), normal(2, 6, 3, seed=1)
    Z[0, 3] = 0
    first, second = twice(loss, Z, U)
    assert all(torch.isfinite(g).all() for g in (*first, *second))
    alive = normal(1, 4, 6).requires_grad_()
    assert torch.autograd.gradgradcheck(loss, (alive, U.requires_grad_()))
