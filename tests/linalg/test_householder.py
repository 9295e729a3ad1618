import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from polyspan.linalg import (
    apply_householder,
    compact_wy,
    householder_product,
    householder_vectors,
    orthonormal_basis,
)

TOLERANCE = {np.float32: 5e-6, np.float64: 1e-13}


def gaussian(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def literal_product(V):
    """Multiply the reflections one by one."""
    H = np.eye(len(V))
    for v in V.T:
        if v.any():
            H = H @ (np.eye(len(V)) - 2 * np.outer(v, v) / (v @ v))
    return H


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize(("d", "m"), [(6, 3), (5, 5), (3, 7), (1, 1), (4, 0)])
def test_product_is_that_of_the_reflections_one_by_one(d, m, kind, dtype):
    V = gaussian(2, d, m, seed=d + m, dtype=dtype)
    H = householder_product(kind(V))
    assert H.dtype == kind(V).dtype
    expected = np.stack([literal_product(v.astype(np.float64)) for v in V])
    np.testing.assert_allclose(np.asarray(H), expected, atol=TOLERANCE[dtype] * 10)
    np.testing.assert_allclose(np.linalg.det(expected), np.full(2, (-1.0) ** m), atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(d=st.integers(1, 10), m=st.integers(1, 10), n=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_rows_are_mapped_without_the_matrix(d, m, n, seed):
    V, X = gaussian(2, d, m, seed=seed), gaussian(n, d, seed=seed + 1)
    H = householder_product(V)
    np.testing.assert_allclose(apply_householder(V, X), X @ H, atol=1e-12)
    np.testing.assert_allclose(apply_householder(V, apply_householder(V, X), transpose=True)[1], X, atol=1e-12)
    np.testing.assert_allclose(householder_product(V, num_columns=d // 2), H[..., : d // 2], atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_torch_on_lapack_reflectors(dtype):
    """LAPACK's reflectors are unit lower triangular with a factor tau; the vectors alone decide the reflections."""
    packed, tau = torch.geqrf(torch.from_numpy(gaussian(3, 8, 5)).to(dtype))
    V = packed.tril(-1) + torch.eye(8, 5, dtype=dtype)
    expected = torch.linalg.householder_product(packed, tau)
    torch.testing.assert_close(
        householder_product(V, 5), expected, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0
    )


def test_compact_form_is_unit_columns_and_an_upper_triangle():
    V = gaussian(6, 4) * [1, 10, 1e-3, 5]
    unit, T = compact_wy(V)
    np.testing.assert_allclose(unit * np.linalg.norm(V, axis=0), V, atol=1e-13)
    np.testing.assert_array_equal(T, np.triu(T))
    np.testing.assert_allclose(np.eye(6) - unit @ T @ unit.T, literal_product(V), atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize(("d", "k"), [(7, 3), (5, 5), (1, 1), (4, 1)])
def test_vectors_rebuild_every_basis_signs_included(d, k, kind, dtype):
    Q = orthonormal_basis(gaussian(4, d, k, dtype=dtype))
    Q[1] *= -1
    V = householder_vectors(kind(Q))
    assert V.dtype == kind(Q).dtype
    np.testing.assert_allclose(np.asarray(householder_product(V, k)), Q, atol=10 * TOLERANCE[dtype])
    np.testing.assert_array_equal(np.asarray(V), np.tril(np.asarray(V)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tilt", [0.0, 1e-30, 1e-12, 1e-6, 1e-3])
def test_vectors_are_accurate_near_the_axes(tilt, dtype):
    Q = orthonormal_basis(np.eye(5, 3, dtype=dtype) + dtype(tilt) * gaussian(5, 3, dtype=dtype))
    for basis in (Q, -Q, Q[:, [1, 0, 2]]):
        np.testing.assert_allclose(householder_product(householder_vectors(basis), 3), basis, atol=TOLERANCE[dtype])


def test_a_basis_on_the_axes_needs_no_reflection():
    np.testing.assert_array_equal(householder_vectors(np.eye(4, 2)), np.zeros((4, 2)))
    np.testing.assert_array_equal(householder_vectors(np.zeros((4, 0))), np.zeros((4, 0)))


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_zero_columns_reflect_nothing(kind):
    V = gaussian(6, 4)
    V[:, [1, 3]] = 0
    np.testing.assert_allclose(np.asarray(householder_product(kind(V))), literal_product(V), atol=1e-13)
    np.testing.assert_array_equal(np.asarray(householder_product(kind(0 * V))), np.eye(6))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_length_of_the_vectors_does_not_matter(scale):
    V = gaussian(6, 3)
    np.testing.assert_allclose(householder_product(scale * V), householder_product(V), atol=1e-13)


def test_repeated_and_opposite_vectors_cancel():
    v = gaussian(5, 1)
    np.testing.assert_allclose(householder_product(np.hstack([v, v])), np.eye(5), atol=1e-14)
    np.testing.assert_allclose(householder_product(np.hstack([v, -3 * v])), np.eye(5), atol=1e-14)


def test_gradients_are_true_at_generic_points():
    V, X = (torch.from_numpy(gaussian(*s)).requires_grad_() for s in ((2, 5, 3), (4, 5)))
    assert gradcheck(householder_product, V)
    assert gradcheck(lambda v, x: apply_householder(v, x, transpose=True), (V, X))
    Q = orthonormal_basis(V).detach().requires_grad_()
    assert gradcheck(householder_vectors, Q)


def test_gradient_is_zero_at_zero_vectors_and_true_for_the_others():
    V = torch.from_numpy(gaussian(5, 3))
    V[:, 1] = 0
    V.requires_grad_()
    weights = torch.from_numpy(gaussian(5, 5, seed=1))
    (householder_product(V) * weights).sum().backward()
    without = V.detach()[:, [0, 2]].clone().requires_grad_()
    (householder_product(without) * weights).sum().backward()
    torch.testing.assert_close(V.grad[:, [0, 2]], without.grad)
    torch.testing.assert_close(V.grad[:, 1], torch.zeros(5, dtype=torch.float64))


def test_half_precision_is_computed_in_float32():
    V = torch.from_numpy(gaussian(8, 3)).bfloat16()
    H = householder_product(V)
    assert H.dtype == torch.bfloat16
    torch.testing.assert_close(H, householder_product(V.float()).bfloat16(), atol=0, rtol=0)
    X = torch.from_numpy(gaussian(4, 8, seed=1)).bfloat16()
    assert apply_householder(V, X).dtype == torch.bfloat16
    torch.testing.assert_close(
        apply_householder(V, X).float(), X.float() @ householder_product(V.float()), atol=0.03, rtol=0
    )


def test_errors_name_what_came():
    with pytest.raises(ValueError, match="num_columns must be between 0 and d=4, got 5"):
        householder_product(gaussian(4, 2), 5)
    with pytest.raises(ValueError, match=r"got \(3, 5\) and \(4, 2\)"):
        apply_householder(gaussian(4, 2), gaussian(3, 5))
    with pytest.raises(ValueError, match=r"got shape \(2, 3\)"):
        householder_vectors(gaussian(2, 3))
