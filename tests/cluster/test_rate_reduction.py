import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyspan.cluster import CodingRate, DoublyStochastic, RateReductionLoss, TotalCodingRateLoss, _class_rate
from polyspan.linalg import class_coding_rate, doubly_stochastic
from polyspan.testing import ModuleCase, check_module


def unit(*shape, seed=0, dtype=torch.float64):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.nn.functional.normalize(rows, dim=-1)


def rows(batch, generator):
    return (torch.nn.functional.normalize(torch.randn(batch, 7, 4, generator=generator), dim=-1),)


def two_views(batch, generator):
    return (*rows(batch, generator), *rows(batch, generator))


def with_memberships(batch, generator):
    weights = torch.rand(batch, 7, 7, generator=generator) + 0.1
    return (*rows(batch, generator), weights / weights.sum(-1, keepdim=True))


CASES = [
    ModuleCase(lambda **kw: CodingRate(**kw), rows, compiles=False),
    ModuleCase(lambda **kw: TotalCodingRateLoss(**kw), two_views, compiles=False),
    ModuleCase(lambda **kw: RateReductionLoss(**kw), with_memberships, compiles=False),
    ModuleCase(lambda **kw: RateReductionLoss(top=3, frobenius=0.05, **kw), with_memberships, compiles=False),
    ModuleCase(lambda **kw: DoublyStochastic(0.3, **kw), rows, compiles=False),
    ModuleCase(lambda **kw: DoublyStochastic(0.3, symmetric=False, absolute=False, **kw), rows, compiles=False),
]


@pytest.mark.parametrize("case", CASES)
def test_modules_keep_the_promises_of_layers(case):
    check_module(case)


def literal(Z, memberships, eps2):
    """The sum over clusters as it is written, by determinants."""
    n, d = Z.shape
    total = 0.0
    for column in memberships.T:
        mass = column.sum()
        matrix = torch.eye(d, dtype=Z.dtype) + d / (mass * eps2) * Z.T @ (column.unsqueeze(1) * Z)
        total = total + mass * torch.logdet(matrix) / (2 * n)
    return total


@given(
    n=st.integers(2, 12), d=st.integers(1, 9), seed=st.integers(0, 2**31), eps2=st.sampled_from([0.05, 0.5, 3.0]),
    max_bytes=st.sampled_from([1, 600, 3000, 2**27]),
)  # fmt: skip
def test_the_closed_gradient_is_that_of_the_literal_sum_for_any_memberships_and_blocks(n, d, seed, eps2, max_bytes):
    Z = unit(n, d, seed=seed).requires_grad_()
    members = torch.rand(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    loss = RateReductionLoss(eps2, max_bytes=max_bytes)
    mine, theirs = loss.rates(Z, members)[1], literal(Z, members, eps2)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(torch.autograd.grad(mine, (Z, members)), torch.autograd.grad(theirs, (Z, members)))


@given(
    n=st.integers(1, 12), d=st.integers(1, 9), n_classes=st.integers(1, 6), seed=st.integers(0, 2**31),
    max_bytes=st.sampled_from([1, 500, 2**27]), wide=st.booleans(),
)  # fmt: skip
def test_packed_and_full_matrices_give_one_rate_and_one_gradient(n, d, n_classes, seed, max_bytes, wide):
    Z = unit(n, d, seed=seed, dtype=torch.float64 if wide else torch.float32)
    members = torch.rand(n, n_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(Z.dtype)
    members[:, -1] = 0
    packed = _class_rate._packed_rate(Z, members, 0.2, max_bytes, True)
    full = _class_rate._dense_rate(Z, members, 0.2, max_bytes, True)
    torch.testing.assert_close(packed, full, rtol=1e-9 if wide else 1e-3, atol=1e-9 if wide else 1e-4)
    assert _class_rate._packed_rate(Z, members, 0.2, max_bytes, False)[0] == packed[0]


@pytest.mark.parametrize("spoil", [lambda Z, members: Z.fill_(math.nan), lambda Z, members: members.fill_(-1.0)])
def test_a_class_without_a_logarithm_is_refused(spoil):
    Z, members = unit(6, 3), torch.ones(6, 2, dtype=torch.float64)
    spoil(Z, members)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive"):
        _class_rate._packed_rate(Z, members, 0.1, 2**27, False)


@given(
    n=st.integers(1, 9), n_iter=st.integers(1, 6), seed=st.integers(0, 2**31), absolute=st.booleans(),
    length=st.sampled_from([0.01, 1.0, 30.0]),
)  # fmt: skip
def test_memberships_and_their_gradient_are_those_of_the_rounds_in_the_log_domain(n, n_iter, seed, absolute, length):
    # Rows of length 30 have logits that no exponential holds; unit rows take the closed form.
    C = (length * unit(2, n, 4, seed=seed)).requires_grad_()
    weight = torch.randn(2, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kernel = C @ C.mT
    expected = doubly_stochastic(kernel.abs() if absolute else kernel, temperature=0.2, max_iter=n_iter, tol=None)
    found = DoublyStochastic(0.2, n_iter, absolute=absolute)(C)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, found.mT)
    # By rows, by columns, and one number for all: however the derivative lies in memory.
    for slope in (weight, weight.mT.contiguous().mT, weight[:1, :1, :1].expand_as(weight)):
        mine, theirs = (torch.autograd.grad(gamma, C, slope, retain_graph=True)[0] for gamma in (found, expected))
        torch.testing.assert_close(mine, theirs)


def test_memberships_can_be_differentiated_twice_and_by_function_transforms():
    C, project = unit(5, 3).requires_grad_(), DoublyStochastic(0.3)
    assert torch.autograd.gradgradcheck(project, (C,))
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (slope,) = torch.autograd.grad(project(C), C, weight)
    torch.testing.assert_close(torch.func.grad(lambda rows: (project(rows) * weight).sum())(C.detach()), slope)


@given(seed=st.integers(0, 2**31), top=st.integers(1, 9))
def test_the_blocks_of_the_gram_matrix_give_the_rate_of_the_kept_entries(seed, top):
    Z = unit(10, 4, seed=seed)
    members = DoublyStochastic(0.2, 50)(Z)
    kept, index = members.T.topk(top, dim=1)
    cut = torch.zeros_like(members).T.scatter(1, index, kept).T
    cut = cut * members.sum(0) / cut.sum(0)
    torch.testing.assert_close(RateReductionLoss(0.1, top=top).rates(Z, members)[1], literal(Z, cut, 0.1))
    found = [RateReductionLoss(0.1, top=t)(Z, members) for t in (10, 11, None)]
    assert found[0] == found[1] == found[2]


def test_gradients_of_the_kept_entries_agree_with_finite_differences():
    Z = unit(8, 3).requires_grad_()
    members = torch.rand(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(RateReductionLoss(0.1, top=4), (Z, members))
    assert torch.autograd.gradcheck(RateReductionLoss(0.1), (Z, members))


def test_batches_are_loops_and_agree_with_the_ground_floor():
    Z, members = unit(2, 3, 6, 4), torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(2)).double()
    whole, within = RateReductionLoss(0.3).rates(Z, members)
    assert whole.shape == within.shape == (2, 3)
    torch.testing.assert_close(within, class_coding_rate(Z, members, math.sqrt(0.3)))
    torch.testing.assert_close(whole[1, 2], CodingRate(0.3)(Z[1, 2]))


def test_memberships_are_the_projection_of_the_absolute_cosine():
    C = unit(20, 5)
    gamma = DoublyStochastic(0.175, 500)(C)
    torch.testing.assert_close(gamma.sum(0), torch.ones(20, dtype=C.dtype))
    torch.testing.assert_close(
        gamma, doubly_stochastic((C @ C.T).abs(), temperature=0.175, tol=1e-13), atol=1e-6, rtol=1e-6
    )
    signs = torch.where(torch.arange(20) % 3 == 0, -1.0, 1.0).double().unsqueeze(1)
    torch.testing.assert_close(DoublyStochastic(0.175, 500)(signs * C), gamma)
    few = DoublyStochastic(0.175)(C)
    assert torch.equal(few, few.T)
    assert (few.sum(0) - 1).abs().max() < 0.02


def test_half_precision_is_widened_for_the_rates():
    Z = unit(32, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [CodingRate()(Z), RateReductionLoss()(Z, DoublyStochastic()(Z))]
    wide = Z.double()
    expected = [CodingRate()(wide), RateReductionLoss()(wide, DoublyStochastic()(wide))]
    np.testing.assert_allclose([float(x) for x in found], [float(x) for x in expected], rtol=1e-5)


def test_agreeing_views_and_spread_rows_lower_the_first_loss():
    Z = unit(64, 8)
    loss = TotalCodingRateLoss(0.1, 10)
    assert loss(Z, Z) < loss(Z, unit(64, 8, seed=1))
    torch.testing.assert_close(loss(Z, Z), loss(Z) - 10)
    assert loss(Z) < loss(Z[:1].expand(64, 8))


def test_an_empty_column_counts_nothing_and_has_a_finite_gradient():
    Z, members = unit(6, 3).requires_grad_(), torch.zeros(6, 2, dtype=torch.float64)
    members[:, 0] = 1
    members.requires_grad_()
    within = RateReductionLoss(0.1).rates(Z, members)[1]
    torch.testing.assert_close(within, CodingRate(0.1)(Z))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(within, (Z, members)))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: CodingRate(0), "eps2 must be positive and finite, got 0"),
        (lambda: RateReductionLoss(gamma=-1), "gamma and frobenius must be finite and at least 0, got -1"),
        (lambda: RateReductionLoss(top=0), "top must be at least 1 or None, got 0"),
        (lambda: RateReductionLoss(max_bytes=0), "max_bytes must be at least 1, got 0"),
        (lambda: TotalCodingRateLoss(weight=math.nan), "weight must be finite and at least 0, got nan"),
        (lambda: DoublyStochastic(0), "eta must be positive and finite, got 0"),
        (lambda: DoublyStochastic(n_iter=0), "n_iter must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(make, told):
    with pytest.raises(ValueError, match=told):
        make()
