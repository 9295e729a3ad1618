import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.autograd import gradcheck

from polyspan.linalg import (
    complete_basis,
    orthonormal_basis,
    project,
    project_out,
    projector,
    random_orthogonal,
    random_stiefel,
)

TOLERANCE = {np.float32: 3e-6, np.float64: 1e-13}


def gaussian(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def gram_schmidt(X):
    """Literal twin of the QR basis: subtract what earlier columns explain, then normalise."""
    basis = []
    for x in X.T:
        for _ in range(2):
            x = x - sum((q @ x) * q for q in basis)
        basis.append(x / np.linalg.norm(x))
    return np.stack(basis, axis=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_torch_agrees_with_numpy_and_keeps_the_dtype(dtype):
    X = gaussian(3, 7, 4, dtype=dtype)
    for function in (orthonormal_basis, lambda A: complete_basis(orthonormal_basis(A))):
        mine, theirs = function(X), function(torch.from_numpy(X))
        assert mine.dtype == dtype
        assert theirs.dtype == torch.from_numpy(X).dtype
        np.testing.assert_allclose(mine, theirs.numpy(), atol=10 * TOLERANCE[dtype])
    half = orthonormal_basis(torch.from_numpy(X).bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_basis_is_gram_schmidt(dtype):
    X = gaussian(2, 8, 5, dtype=dtype)
    Q = orthonormal_basis(X)
    for mine, matrix in zip(Q, X, strict=True):
        np.testing.assert_allclose(mine, gram_schmidt(matrix.astype(np.float64)), atol=10 * TOLERANCE[dtype])


@settings(max_examples=20, deadline=None)
@given(d=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_completed_basis_is_orthogonal_and_starts_with_the_given_columns(d, k, seed):
    Q = orthonormal_basis(gaussian(d, min(d, k), seed=seed))
    full = complete_basis(Q)
    np.testing.assert_array_equal(full[:, : Q.shape[1]], Q)
    np.testing.assert_allclose(full.T @ full, np.eye(d), atol=1e-13)
    np.testing.assert_allclose(projector(Q) + projector(full[:, Q.shape[1] :]), np.eye(d), atol=1e-13)


@pytest.mark.parametrize("Q", [np.eye(4)[:, :2], -np.eye(4)[:, :2], np.eye(4)[:, 2:], np.eye(4)[:, :0]])
def test_completes_axes_and_nothing_at_all(Q):
    full = complete_basis(Q)
    np.testing.assert_allclose(full @ full.T, np.eye(4), atol=1e-15)


def test_projections_split_rows_without_the_projector():
    Q, x = orthonormal_basis(gaussian(3, 6, 2)), gaussian(5, 6, seed=1)
    inside, outside = project(x, Q), project_out(x, Q)
    np.testing.assert_allclose(inside, x @ projector(Q), atol=1e-13)
    np.testing.assert_allclose(inside + outside, np.broadcast_to(x, (3, 5, 6)), atol=1e-14)
    np.testing.assert_allclose(outside @ Q, np.zeros((3, 5, 2)), atol=1e-13)
    np.testing.assert_allclose(project(x[0], Q[0]), inside[0, 0], atol=1e-14)


def test_gradients_are_true_at_a_generic_point_and_at_orthonormal_columns():
    X = torch.from_numpy(gaussian(2, 5, 3)).requires_grad_()
    assert gradcheck(orthonormal_basis, X)
    assert gradcheck(orthonormal_basis, torch.eye(5, 3, dtype=torch.float64).requires_grad_())
    Q = orthonormal_basis(X).detach().requires_grad_()
    assert gradcheck(complete_basis, Q)
    assert gradcheck(lambda q: project_out(X.mT, q), Q)


def test_dependent_columns_still_give_orthonormal_ones():
    X = gaussian(5, 2)
    Q = orthonormal_basis(np.concatenate([X, X.sum(axis=1, keepdims=True)], axis=1))
    np.testing.assert_allclose(Q.T @ Q, np.eye(3), atol=1e-13)


def test_same_seed_same_draw_and_global_state_untouched():
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    for make in (np.random.default_rng, lambda s: torch.Generator().manual_seed(s)):
        one, two, three = (random_stiefel(6, 2, rng=make(s), batch=(3,)) for s in (0, 0, 1))
        assert (one == two).all()
        assert not (one == three).all()
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert (torch.get_rng_state() == torch_state).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_drawn_bases_are_orthonormal_in_the_dtype_asked_for(dtype):
    tolerance = {"float16": 5e-3, "float32": 3e-6, "float64": 1e-13}[dtype]
    for rng, kind in ((np.random.default_rng(0), np.dtype(dtype)), (torch.Generator(), getattr(torch, dtype))):
        Q = random_stiefel(9, 4, rng=rng, batch=(2, 3), dtype=kind)
        assert Q.dtype == kind
        wide = np.asarray(Q).astype(np.float64)
        np.testing.assert_allclose(
            wide.swapaxes(-1, -2) @ wide, np.broadcast_to(np.eye(4), (2, 3, 4, 4)), atol=tolerance
        )
    assert random_stiefel(3, 1, rng=torch.Generator()).dtype == torch.get_default_dtype()


def test_drawn_matrices_are_haar():
    """The squared first entry of a uniform unit vector is Beta(1/2, (d-1)/2); the trace has variance 1."""
    Q = random_orthogonal(5, rng=np.random.default_rng(0), batch=(4000,))
    for entry in (Q[:, 0, 0], Q[:, 4, 4], Q[:, 1, 3]):
        assert stats.kstest(entry**2, stats.beta(0.5, 2).cdf).pvalue > 1e-3
        assert stats.binomtest(int((entry > 0).sum()), 4000).pvalue > 1e-3
    trace = np.trace(Q, axis1=1, axis2=2)
    assert abs(trace.mean()) < 0.06
    assert abs(trace.var() - 1) < 0.1
    assert stats.binomtest(int((np.linalg.det(Q) > 0).sum()), 4000).pvalue > 1e-3


@pytest.mark.parametrize("rng", [np.random.default_rng(0), torch.Generator()], ids=["numpy", "torch"])
def test_special_matrices_are_rotations(rng):
    R = np.asarray(random_orthogonal(3, rng=rng, batch=(50,), special=True))
    np.testing.assert_allclose(np.linalg.det(R), np.ones(50), atol=1e-5)
    np.testing.assert_allclose(R @ R.swapaxes(1, 2), np.broadcast_to(np.eye(3), (50, 3, 3)), atol=1e-5)


def test_errors_name_what_came():
    with pytest.raises(ValueError, match=r"k <= d, got shape \(2, 3\)"):
        orthonormal_basis(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"k <= d, got shape \(2, 3\)"):
        complete_basis(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"got \(5, 4\) and \(3, 2\)"):
        project(np.zeros((5, 4)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="k must be between 1 and d=3, got 4"):
        random_stiefel(3, 4, rng=np.random.default_rng(0))
    with pytest.raises(TypeError, match="got int"):
        random_orthogonal(3, rng=0)
    with pytest.raises(TypeError, match="expected arrays of one kind"):
        project(np.zeros((5, 4)), torch.zeros(4, 2))
