import subprocess
import sys

import numpy as np
import pytest
import roma
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group
from torch.autograd import gradcheck, gradgradcheck

from polyspan.errors import NotConverged
from polyspan.linalg import nearest_isometry, nearest_rotation
from polyspan.linalg._namespace import namespace, widen

TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}
SHAPES = [(4, 4), (6, 3), (3, 6), (2, 5, 3), (2, 3, 4, 4)]


def gaussian(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("function", [nearest_isometry, nearest_rotation])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keeps_kind_and_dtype_and_torch_agrees_with_numpy(function, dtype):
    M = gaussian(5, 4, 4, dtype=dtype)
    ours, theirs = function(M), function(torch.from_numpy(M))
    assert ours.dtype == dtype
    assert theirs.dtype == torch.from_numpy(M).dtype
    np.testing.assert_allclose(ours, theirs.numpy(), atol=TOLERANCE[dtype])
    np.testing.assert_allclose(ours[2], function(M[2]), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_cast_back(dtype):
    M = torch.from_numpy(gaussian(6, 3)).to(dtype)
    Q = nearest_isometry(M)
    assert Q.dtype == dtype
    torch.testing.assert_close(Q, nearest_isometry(M.float()).to(dtype), atol=0, rtol=0)


def test_integers_give_float64():
    Q = nearest_isometry(np.array([[3, 0], [0, -2]]))
    np.testing.assert_array_equal(Q, np.diag([1.0, -1.0]))
    assert Q.dtype == np.float64


@pytest.mark.parametrize("method", ["svd", "newton-schulz"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_unitary_factor_of_scipy(shape, dtype, method):
    M = gaussian(*shape, seed=3, dtype=dtype)
    Q = nearest_isometry(M, method=method)
    assert Q.dtype == dtype
    for mine, matrix in zip(Q.reshape(-1, *shape[-2:]), M.reshape(-1, *shape[-2:]), strict=True):
        expected = scipy.linalg.polar(matrix.astype(np.float64), side="right" if shape[-2] >= shape[-1] else "left")[0]
        np.testing.assert_allclose(mine, expected, atol=10 * TOLERANCE[dtype])


@settings(max_examples=20, deadline=None)
@given(p=st.integers(1, 9), q=st.integers(1, 9), scale=st.floats(1e-6, 1e6), seed=st.integers(0, 10**6))
def test_scaling_and_turning_the_input_scale_and_turn_the_output(p, q, scale, seed):
    M = gaussian(p, q, seed=seed)
    U, V = (np.linalg.qr(gaussian(n, n, seed=seed + 1))[0] for n in (p, q))
    np.testing.assert_allclose(nearest_isometry(scale * U @ M @ V), U @ nearest_isometry(M) @ V, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_nearest_rotation_agrees_with_roma(n, dtype):
    M = torch.from_numpy(gaussian(40, n, n, seed=n, dtype=dtype))
    assert (torch.linalg.det(M) < 0).any()
    R = nearest_rotation(M)
    torch.testing.assert_close(R, roma.special_procrustes(M), atol=20 * TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(40, dtype=R.dtype))


def test_no_drawn_rotation_is_nearer():
    M = gaussian(4, 4, seed=1) @ np.diag([1, 1, 1, -1])
    best = np.linalg.norm(nearest_rotation(M) - M)
    drawn = ortho_group.rvs(4, size=400, random_state=0)
    drawn[:, 0] *= np.linalg.det(drawn)[:, None]
    assert best <= np.linalg.norm(drawn - M, axis=(-2, -1)).min()


@pytest.mark.parametrize("method", ["svd", "newton-schulz"])
@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_are_true_at_generic_points(shape, method):
    M = torch.from_numpy(gaussian(*shape, seed=7)).requires_grad_()
    assert gradcheck(lambda m: nearest_isometry(m, method=method), M)
    assert gradgradcheck(lambda m: nearest_isometry(m, method=method), M)


@pytest.mark.parametrize(
    "point",
    [
        torch.eye(4),
        -torch.eye(3),
        torch.eye(5, 3),
        torch.eye(3, 5),
        torch.linalg.qr(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]]))[0],
        torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0])),
    ],
    ids=["identity", "minus identity", "tall identity", "wide identity", "isometry", "repeated singular values"],
)
@pytest.mark.parametrize("method", ["svd", "newton-schulz"])
def test_derivatives_are_true_at_isometries(point, method):
    point = point.double().requires_grad_()
    assert gradcheck(lambda m: nearest_isometry(m, method=method), point)
    assert gradgradcheck(lambda m: nearest_isometry(m, method=method), point)


@pytest.mark.parametrize(
    "point",
    [torch.eye(3), torch.diag(torch.tensor([2.0, 1.0, -0.5])), torch.diag(torch.tensor([2.0, 1.0, 0.0]))],
    ids=["rotation", "negative determinant", "planar points"],
)
def test_derivatives_of_the_rotation_are_true_wherever_it_is_unique(point):
    point = point.double().requires_grad_()
    assert gradcheck(nearest_rotation, point)
    assert gradgradcheck(nearest_rotation, point)
    assert gradcheck(nearest_rotation, torch.from_numpy(gaussian(3, 4, 4, seed=2)).requires_grad_())


def test_gradient_is_not_finite_where_the_rotation_is_not_unique():
    M = torch.diag(torch.tensor([2.0, 1.0, -1.0])).requires_grad_()
    (nearest_rotation(M) * torch.arange(9.0).reshape(3, 3)).sum().backward()
    assert not M.grad.isfinite().all()


def test_gradients_agree_with_those_of_a_batch_mapped_by_functorch():
    M = torch.from_numpy(gaussian(6, 4, 3))
    weights = torch.from_numpy(gaussian(4, 3, seed=1))
    mapped = torch.func.vmap(torch.func.grad(lambda m: (nearest_isometry(m) * weights).sum()))(M)
    M.requires_grad_()
    (nearest_isometry(M) * weights).sum().backward()
    torch.testing.assert_close(mapped, M.grad)


def test_newton_schulz_says_when_it_has_not_converged():
    with pytest.raises(NotConverged, match="after 5 steps"):
        nearest_isometry(np.diag([1.0, 1e-6]), method="newton-schulz", max_iter=5)
    with pytest.raises(NotConverged, match="from the identity"):
        nearest_isometry(np.zeros((2, 2)), method="newton-schulz")
    np.testing.assert_allclose(nearest_isometry(np.diag([1.0, 1e-6]), method="newton-schulz"), np.eye(2), atol=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_extreme_scales_stay_accurate(scale):
    M = gaussian(5, 3)
    np.testing.assert_allclose(nearest_isometry(scale * M), nearest_isometry(M), atol=1e-12)


def test_empty_batches_pass_through():
    assert nearest_isometry(np.zeros((0, 3, 2))).shape == (0, 3, 2)
    assert nearest_rotation(torch.zeros(0, 3, 3)).shape == (0, 3, 3)


def test_errors_name_what_came():
    with pytest.raises(ValueError, match=r"square matrices \(\*b, n, n\), got shape \(2, 3, 4\)"):
        nearest_rotation(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="non-empty matrices"):
        nearest_isometry(np.zeros((3, 0)))
    with pytest.raises(ValueError, match="method must be"):
        nearest_isometry(np.eye(2), method="qr")
    with pytest.raises(TypeError, match="must be real, got complex128"):
        nearest_isometry(np.eye(2) * 1j)
    with pytest.raises(TypeError, match=r"all torch tensors, got numpy.ndarray, torch.Tensor"):
        namespace(np.eye(2), torch.eye(2))


def test_widening_leaves_wide_floats_alone():
    x = np.ones(3, np.float32)
    assert widen(x)[0] is x
    wide, narrow = widen(torch.ones(3, dtype=torch.bfloat16))
    assert (wide.dtype, narrow(wide).dtype) == (torch.float32, torch.bfloat16)


def test_numpy_users_do_not_import_torch():
    code = """
import sys, numpy as np, polyspan.linalg as la
A = la.random_stiefel(6, 2, rng=np.random.default_rng(0), batch=(3,))
la.nearest_isometry(A), la.nearest_rotation(np.eye(3)), la.complete_basis(A), la.pairwise_subspace_distance(A)
la.principal_vectors(A[0], A[1]), la.leverage_scores(A), la.rate_reduction(A[0], np.ones((6, 2)))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
