import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from polyspan.linalg import leverage_scores, orthonormal_basis, ridge_leverage_scores

METHODS = ["qr", "svd", "gram"]
KINDS = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def gaussian(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@KINDS
@DTYPES
@pytest.mark.parametrize("method", METHODS)
def test_scores_are_the_diagonal_of_the_hat_matrix(method, kind, dtype):
    A = gaussian(3, 20, 4, dtype=dtype)
    scores = leverage_scores(kind(A), method=method)
    assert scores.dtype == kind(A).dtype
    expected = [np.diagonal(a @ np.linalg.pinv(a)) for a in A.astype(np.float64)]
    np.testing.assert_allclose(np.asarray(scores), expected, atol=1e-5 if dtype == np.float32 else 1e-13)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None)
@given(d=st.integers(1, 6), n=st.integers(7, 30), seed=st.integers(0, 10**6))
def test_scores_sum_to_the_rank_and_do_not_depend_on_the_basis_of_columns(method, d, n, seed):
    A = gaussian(n, d, seed=seed)
    scores = leverage_scores(A, method=method)
    np.testing.assert_allclose(scores.sum(), d)
    assert (scores >= 0).all()
    assert (scores <= 1 + 1e-12).all()
    turn = np.linalg.qr(gaussian(d, d, seed=seed + 1))[0]
    np.testing.assert_allclose(leverage_scores(A @ turn * 7, method=method), scores, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_that_alone_fills_a_direction_has_score_one(method):
    A = np.vstack([gaussian(10, 3) * [1, 1, 0], [[0.0, 0.0, 1e-5]]])
    np.testing.assert_allclose(leverage_scores(A, method=method)[-1], 1)


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_invariant_to_badly_scaled_columns(method):
    A = gaussian(30, 4)
    np.testing.assert_allclose(
        leverage_scores(A * [1, 1e-8, 1e8, 1], method="qr" if method == "svd" else method),
        leverage_scores(A),
        atol=1e-12,
    )


def test_dependent_columns_are_weighed_by_svd_and_refused_by_the_others():
    A = gaussian(12, 3)
    twice = np.hstack([A, A @ gaussian(3, 2, seed=1)])
    np.testing.assert_allclose(leverage_scores(twice, method="svd"), leverage_scores(A), atol=1e-12)
    for method, matrix in (("qr", twice), ("gram", twice), ("qr", 0 * A), ("gram", 0 * A)):
        with pytest.raises(ValueError, match=f"linearly dependent columns, which method='{method}'"):
            leverage_scores(matrix, method=method)
    np.testing.assert_array_equal(leverage_scores(0 * A, method="svd"), np.zeros(12))


def test_wide_matrices_need_every_row():
    np.testing.assert_allclose(leverage_scores(gaussian(3, 8)), np.ones(3))
    np.testing.assert_allclose(leverage_scores(gaussian(3, 8), method="svd"), np.ones(3))


@KINDS
@DTYPES
@pytest.mark.parametrize(("n", "d"), [(20, 4), (4, 20), (5, 5)])
@pytest.mark.parametrize("lam", [1, 1e-3, 1e3])
def test_ridge_scores_are_those_of_the_formula(n, d, lam, kind, dtype):
    A = gaussian(2, n, d, dtype=dtype)
    scores = ridge_leverage_scores(kind(A), lam)
    assert scores.dtype == kind(A).dtype
    expected = [np.diagonal(a @ np.linalg.solve(a.T @ a + lam * np.eye(d), a.T)) for a in A.astype(np.float64)]
    np.testing.assert_allclose(np.asarray(scores), expected, rtol=1e-4 if dtype == np.float32 else 1e-11)


def test_ridge_scores_reach_leverage_scores_as_the_ridge_vanishes():
    A = gaussian(30, 4) * [1, 1e-3, 1, 1]
    np.testing.assert_allclose(ridge_leverage_scores(A, 1e-24), leverage_scores(A), atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_true_at_generic_points(method):
    A = torch.from_numpy(gaussian(2, 6, 3)).requires_grad_()
    assert gradcheck(lambda a: leverage_scores(a, method=method), A)
    assert gradcheck(lambda a: ridge_leverage_scores(a, 0.3), A)
    assert gradcheck(lambda a: ridge_leverage_scores(a.mT, 0.3), A)


@pytest.mark.parametrize("method", ["qr", "gram"])
def test_gradients_are_true_at_orthonormal_columns(method):
    Q = torch.from_numpy(orthonormal_basis(gaussian(6, 3))).requires_grad_()
    assert gradcheck(lambda a: leverage_scores(a, method=method), Q)


def test_ridge_gradients_are_true_at_dependent_and_zero_columns():
    A = torch.from_numpy(gaussian(6, 1) @ gaussian(1, 3)).requires_grad_()
    assert gradcheck(lambda a: ridge_leverage_scores(a, 0.3), A)
    assert gradcheck(lambda a: ridge_leverage_scores(0 * a, 0.3), A)
    assert gradcheck(lambda a: ridge_leverage_scores(a.mT, 0.3), A)


def test_half_precision_is_cast_back():
    A = torch.from_numpy(gaussian(10, 3)).bfloat16()
    torch.testing.assert_close(leverage_scores(A), leverage_scores(A.float()).bfloat16(), atol=0, rtol=0)


def test_errors_name_what_came():
    with pytest.raises(ValueError, match="method must be"):
        leverage_scores(gaussian(5, 2), method="lu")
    with pytest.raises(ValueError, match=r"at least as many rows as columns, got shape \(2, 5\)"):
        leverage_scores(gaussian(2, 5), method="gram")
    with pytest.raises(ValueError, match="lam must be positive, got 0"):
        ridge_leverage_scores(gaussian(5, 2), 0)
    with pytest.raises(ValueError, match=r"non-empty matrices .* got shape \(0, 2\)"):
        leverage_scores(np.zeros((0, 2)))
