import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from polyspan.linalg import (
    class_coding_rate,
    coding_rate,
    coding_rate_gradient,
    orthonormal_basis,
    rate_reduction,
)

KINDS = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
SHAPES = pytest.mark.parametrize(("n", "d"), [(20, 4), (4, 20), (6, 6), (1, 3), (3, 1)])


def unit_rows(*shape, seed=0, dtype=np.float64):
    Z = np.random.default_rng(seed).normal(size=shape)
    return (Z / np.linalg.norm(Z, axis=-1, keepdims=True)).astype(dtype)


def soft(n, C, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).dirichlet(np.ones(C), size=n).astype(dtype)


def literal_rate(Z, weight, eps):
    """Half a log-determinant of the weighted second moment, class by class and with no shortcut."""
    (_, d), mass = Z.shape, weight.sum()
    return 0.5 * np.linalg.slogdet(np.eye(d) + d / (mass * eps**2) * Z.T @ np.diag(weight) @ Z)[1]


def literal_class_rate(Z, memberships, eps):
    return sum(w.sum() / len(Z) * literal_rate(Z, w, eps) for w in memberships.T if w.sum() > 0)


@KINDS
@DTYPES
@SHAPES
@pytest.mark.parametrize("eps", [0.1, 0.5, 2])
def test_rate_is_that_of_the_formula(n, d, eps, kind, dtype):
    Z = unit_rows(3, n, d, dtype=dtype)
    rate = coding_rate(kind(Z), eps)
    assert rate.dtype == kind(Z).dtype
    expected = [literal_rate(z.astype(np.float64), np.ones(n), eps) for z in Z]
    np.testing.assert_allclose(np.asarray(rate), expected, rtol=3e-5 if dtype == np.float32 else 1e-11)


@KINDS
@DTYPES
@SHAPES
@pytest.mark.parametrize("C", [1, 3, 8])
def test_class_rate_is_that_of_the_formula_for_few_and_many_classes(n, d, C, kind, dtype):
    Z, memberships = unit_rows(2, n, d, dtype=dtype), soft(n, C, dtype=dtype)
    rate = class_coding_rate(kind(Z), kind(memberships), 0.3)
    assert rate.dtype == kind(Z).dtype
    expected = [literal_class_rate(z.astype(np.float64), memberships.astype(np.float64), 0.3) for z in Z]
    np.testing.assert_allclose(np.asarray(rate), expected, rtol=3e-5 if dtype == np.float32 else 1e-11)
    batched = np.stack([memberships, soft(n, C, seed=1, dtype=dtype)])
    np.testing.assert_allclose(np.asarray(class_coding_rate(kind(Z), kind(batched), 0.3))[0], expected[0], rtol=3e-5)
    single = np.asarray(class_coding_rate(kind(Z[0]), kind(batched), 0.3))
    np.testing.assert_allclose(
        single[1], literal_class_rate(Z[0].astype(float), batched[1].astype(float), 0.3), rtol=3e-5
    )


@SHAPES
@pytest.mark.parametrize("C", [2, 8])
def test_block_size_does_not_matter(n, d, C):
    Z, memberships = unit_rows(n, d), soft(n, C)
    whole = class_coding_rate(Z, memberships)
    for max_bytes in (1, 2000):
        np.testing.assert_allclose(class_coding_rate(Z, memberships, max_bytes=max_bytes), whole)


def test_every_row_as_the_centre_of_its_own_soft_class():
    """With columns of sum 1 the rate is 1/(2n) times the sum of log det(I + d/eps^2 Z' diag(column) Z)."""
    n, d, eps = 12, 5, 0.4
    Z, G = unit_rows(n, d), soft(n, n)
    for _ in range(200):
        G = (G + G.T) / 2
        G /= G.sum(axis=0)
    G = (G + G.T) / 2
    expected = sum(np.linalg.slogdet(np.eye(d) + d / eps**2 * Z.T @ np.diag(g) @ Z)[1] for g in G.T) / (2 * n)
    np.testing.assert_allclose(class_coding_rate(Z, G, eps), expected, rtol=1e-6)


def test_rate_within_subspaces_is_the_rate_of_the_projections():
    Z, U, eps = unit_rows(15, 8), orthonormal_basis(unit_rows(3, 8, 2, seed=1)), 0.5
    beta = 2 / (15 * eps**2)
    expected = sum(0.5 * np.linalg.slogdet(np.eye(15) + beta * (Z @ u) @ (Z @ u).T)[1] for u in U)
    np.testing.assert_allclose(coding_rate(Z @ U, eps).sum(), expected)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 15), d=st.integers(1, 15), C=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_knowing_the_classes_never_costs_and_turning_changes_nothing(n, d, C, seed):
    Z, memberships = unit_rows(n, d, seed=seed), soft(n, C, seed=seed)
    gain = rate_reduction(Z, memberships)
    assert gain >= -1e-12
    assert coding_rate(Z) >= 0
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    order = np.random.default_rng(seed).permutation(n)
    np.testing.assert_allclose(rate_reduction((Z @ turn)[order], memberships[order]), gain, atol=1e-10)


def test_reduction_prefers_classes_in_orthogonal_subspaces():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    right, wrong = np.eye(3)[labels], np.eye(3)[rng.permutation(labels)]
    Z = np.zeros((60, 6))
    Z[np.arange(60)[:, None], 2 * labels[:, None] + [0, 1]] = unit_rows(60, 2)
    assert rate_reduction(Z, right) > 3 * rate_reduction(Z, wrong)
    np.testing.assert_allclose(rate_reduction(Z, np.ones((60, 1))), 0, atol=1e-12)


@DTYPES
@SHAPES
def test_closed_form_gradient_is_that_of_autograd(n, d, dtype):
    Z = torch.from_numpy(unit_rows(2, n, d, dtype=dtype)).requires_grad_()
    coding_rate(Z, 0.3).sum().backward()
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    torch.testing.assert_close(coding_rate_gradient(Z.detach(), 0.3), Z.grad, atol=tolerance, rtol=10 * tolerance)
    np.testing.assert_allclose(coding_rate_gradient(Z.detach().numpy(), 0.3), Z.grad.numpy(), atol=10 * tolerance)


@SHAPES
def test_gradients_are_true(n, d):
    Z, memberships = (torch.from_numpy(a).requires_grad_() for a in (unit_rows(n, d), soft(n, 2)))
    assert gradcheck(coding_rate, Z)
    assert gradcheck(coding_rate_gradient, Z)
    assert gradcheck(rate_reduction, (Z, memberships))


def test_gradients_are_true_at_zero_rows_equal_rows_and_hard_memberships():
    Z = torch.from_numpy(np.repeat(unit_rows(1, 4), 6, axis=0))
    Z[0] = 0
    for rows in (Z, Z[:3]):
        hard = torch.eye(2, dtype=torch.float64)[[0, 1, 1, 0, 1, 0]][: len(rows)]
        assert gradcheck(lambda z, m=hard: rate_reduction(z, m), rows.clone().requires_grad_())
        # Memberships may only grow from zero, so their gradient there is compared with a forward difference.
        memberships = hard.clone().requires_grad_()
        rate = class_coding_rate(rows, memberships)
        rate.backward()
        step = torch.zeros_like(hard)
        step[1, 0] = 1e-7
        slope = (class_coding_rate(rows, hard + step) - rate) / 1e-7
        torch.testing.assert_close(memberships.grad[1, 0], slope.detach(), rtol=1e-4, atol=1e-5)


def test_zero_rows_and_empty_classes_take_no_room():
    Z, labels = unit_rows(10, 3), np.arange(10) % 2
    assert coding_rate(0 * Z) == 0
    np.testing.assert_allclose(class_coding_rate(Z, np.eye(3)[labels]), class_coding_rate(Z, np.eye(2)[labels]))
    memberships = torch.zeros(10, 2, dtype=torch.float64, requires_grad=True)
    rate = class_coding_rate(torch.from_numpy(Z), memberships)
    rate.backward()
    assert rate == 0
    torch.testing.assert_close(memberships.grad, torch.zeros(10, 2, dtype=torch.float64))


def test_half_precision_is_computed_in_float32():
    Z = torch.from_numpy(unit_rows(50, 8)).bfloat16()
    memberships = torch.eye(2)[torch.arange(50) % 2]
    assert coding_rate(Z).dtype == torch.bfloat16
    torch.testing.assert_close(coding_rate(Z), coding_rate(Z.float()).bfloat16(), atol=0, rtol=0)
    torch.testing.assert_close(
        class_coding_rate(Z, memberships), class_coding_rate(Z.float(), memberships).bfloat16(), atol=0, rtol=0
    )


def test_errors_name_what_came():
    Z = unit_rows(5, 3)
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        coding_rate(Z, 0)
    with pytest.raises(ValueError, match=r"non-empty matrices .* got shape \(0, 3\)"):
        coding_rate(Z[:0])
    with pytest.raises(ValueError, match=r"the n of Z .* got \(4, 2\) and \(5, 3\)"):
        class_coding_rate(Z, np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"non-negative, got a smallest value of -0.5"):
        rate_reduction(Z, np.full((5, 2), -0.5))
    with pytest.raises(TypeError, match="arrays of one kind"):
        class_coding_rate(Z, torch.ones(5, 2))
