import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from sklearn.utils.extmath import randomized_svd as sklearn_randomized_svd

from polyspan.errors import NotConverged
from polyspan.linalg import fix_signs, randomized_svd, truncated_eigh, truncated_svd

METHODS = pytest.mark.parametrize("method", ["power", "krylov"])


def generator(seed=0):
    return np.random.default_rng(seed)


def with_spectrum(m, n, s, seed=0):
    rng = generator(seed)
    U, V = (np.linalg.qr(rng.normal(size=(side, len(s))))[0] for side in (m, n))
    return (U * s) @ V.T


def kinds(A):
    """Return the same matrix in each form that the functions take."""
    return {"dense": A, "sparse": sp.csr_array(A), "old sparse": sp.csc_matrix(A), "operator": aslinearoperator(A)}


def close_up_to_nothing(found, U, s, Vh, tol):
    np.testing.assert_allclose(found.s, s, atol=tol)
    np.testing.assert_allclose((found.U * found.s) @ found.Vh, (U * s) @ Vh, atol=tol)
    np.testing.assert_allclose(found.U.T @ found.U, np.eye(len(s)), atol=tol)
    np.testing.assert_allclose(found.Vh @ found.Vh.T, np.eye(len(s)), atol=tol)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_signs_make_the_largest_entry_positive_and_keep_the_product(kind, dtype):
    rng = generator()
    U, Vh = rng.normal(size=(2, 7, 3)).astype(dtype), rng.normal(size=(2, 3, 5)).astype(dtype)
    left, right = fix_signs(kind(U), kind(Vh))
    assert left.dtype == kind(U).dtype
    assert right.dtype == kind(Vh).dtype
    left, right = np.asarray(left), np.asarray(right)
    leading = np.take_along_axis(left, np.abs(left).argmax(axis=1)[:, None], axis=1)
    assert (leading > 0).all()
    np.testing.assert_array_equal(np.abs(left), np.abs(U))
    np.testing.assert_allclose(left @ right, U @ Vh, atol=1e-2 if dtype == np.float16 else 1e-6)
    np.testing.assert_array_equal(np.asarray(fix_signs(kind(U))), left)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), flips=st.lists(st.sampled_from([-1.0, 1.0]), min_size=4, max_size=4))
def test_signs_do_not_depend_on_the_signs_that_came(seed, flips):
    U = generator(seed).normal(size=(6, 4))
    np.testing.assert_array_equal(fix_signs(U * np.array(flips)), fix_signs(U))


def test_entries_equal_up_to_rounding_let_the_first_decide():
    u = np.array([[-1.0], [1.0 + 1e-15], [0.5]])
    np.testing.assert_array_equal(fix_signs(u), -u)
    np.testing.assert_array_equal(
        fix_signs(u * (1 + np.array([[1e-12], [0], [0]]))), -u * (1 + np.array([[1e-12], [0], [0]]))
    )
    np.testing.assert_array_equal(fix_signs(np.zeros((3, 2))), np.zeros((3, 2)))


def test_signs_carry_gradients():
    U = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fix_signs, (U,))


def test_signs_refuse_partners_that_do_not_match():
    with pytest.raises(ValueError, match=r"Vh must have a row for each column of U \(4, 2\), got shape \(3, 4\)"):
        fix_signs(np.ones((4, 2)), np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"U must hold non-empty matrices"):
        fix_signs(np.ones(3))
    with pytest.raises(TypeError, match="U must be real, got complex128"):
        fix_signs(np.ones((3, 2), complex))


@METHODS
@pytest.mark.parametrize("form", ["dense", "sparse", "old sparse", "operator", "torch"])
@pytest.mark.parametrize(("m", "n"), [(60, 40), (40, 60)])
def test_randomized_svd_is_exact_at_low_rank(method, form, m, n):
    A = with_spectrum(m, n, np.array([9.0, 5, 2, 1, 0.5]))
    U, s, Vh = np.linalg.svd(A, full_matrices=False)
    if form == "torch":
        found = randomized_svd(torch.from_numpy(A), 5, rng=torch.Generator().manual_seed(0), method=method)
        found = type(found)(*(part.numpy() for part in found))
    else:
        found = randomized_svd(kinds(A)[form], 5, rng=generator(), method=method)
    close_up_to_nothing(found, U[:, :5], s[:5], Vh[:5], 1e-12)
    np.testing.assert_array_equal(found.U, fix_signs(found.U))


@METHODS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_randomized_svd_keeps_the_dtype_and_finds_a_decaying_spectrum(method, dtype):
    A = with_spectrum(80, 50, 0.7 ** np.arange(50)).astype(dtype)
    found = randomized_svd(A, 6, rng=generator(), method=method)
    assert {part.dtype for part in found} == {np.dtype(dtype)}
    U, s, Vh = np.linalg.svd(A.astype(np.float64), full_matrices=False)
    close_up_to_nothing(found, U[:, :6], s[:6], Vh[:6], 1e-5 if dtype == np.float32 else 1e-9)
    tensor = randomized_svd(torch.from_numpy(A), 6, rng=torch.Generator().manual_seed(1), method=method)
    assert {part.dtype for part in tensor} == {torch.from_numpy(A).dtype}
    np.testing.assert_allclose(tensor.s.numpy(), s[:6], atol=1e-5 if dtype == np.float32 else 1e-9)


def test_krylov_is_far_nearer_than_power_and_power_equals_scikit_learn_where_the_spectrum_is_flat():
    A = with_spectrum(300, 200, 1 / np.arange(1, 201) ** 0.3)
    true = np.linalg.svd(A, compute_uv=False)[:8]
    error = {
        method: np.abs(randomized_svd(A, 8, rng=generator(), n_iter=6, method=method).s - true).max()
        for method in ("power", "krylov")
    }
    theirs = sklearn_randomized_svd(A, 8, n_iter=6, power_iteration_normalizer="QR", random_state=0)[1]
    assert error["krylov"] < 1e-4
    assert error["krylov"] < error["power"] / 100
    assert error["power"] < 2 * np.abs(theirs - true).max()


def test_krylov_stops_at_the_rank_and_fills_what_is_missing_with_zeros():
    A = with_spectrum(40, 30, np.array([3.0, 2.0]))
    found = randomized_svd(A, 5, rng=generator(), oversampling=2, n_iter=5, method="krylov")
    np.testing.assert_allclose(found.s, [3, 2, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(found.U.T @ found.U, np.eye(5), atol=1e-12)
    for method in ("power", "krylov"):
        zero = randomized_svd(np.zeros((12, 9)), 3, rng=generator(), method=method)
        np.testing.assert_array_equal(zero.s, np.zeros(3))
        np.testing.assert_allclose(zero.U.T @ zero.U, np.eye(3), atol=1e-12)
        full = randomized_svd(with_spectrum(6, 4, np.array([4.0, 3, 2, 1])), 4, rng=generator(), method=method)
        np.testing.assert_allclose(full.s, [4, 3, 2, 1], atol=1e-12)


def test_chance_comes_from_the_generator_alone():
    A = generator().normal(size=(50, 40))
    first, again, other = (randomized_svd(A, 3, rng=generator(seed), n_iter=0).s for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    state = torch.random.get_rng_state()
    randomized_svd(torch.from_numpy(A), 3, rng=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_half_precision_is_computed_wider_and_carries_no_gradient():
    A = torch.from_numpy(with_spectrum(30, 20, 0.5 ** np.arange(20)))
    half = randomized_svd(A.to(torch.bfloat16).requires_grad_(), 3, rng=torch.Generator().manual_seed(0))
    assert half.s.dtype == torch.bfloat16
    assert not half.s.requires_grad
    np.testing.assert_allclose(half.s.float().numpy(), [1, 0.5, 0.25], rtol=0.02)


def test_randomized_svd_names_what_is_wrong():
    A, rng = np.eye(5), generator()
    with pytest.raises(ValueError, match=r"k must be between 1 and min\(m, n\)=5, got 6"):
        randomized_svd(A, 6, rng=rng)
    with pytest.raises(ValueError, match="method must be 'power' or 'krylov', got 'block'"):
        randomized_svd(A, 2, rng=rng, method="block")
    with pytest.raises(ValueError, match="oversampling and n_iter must not be negative, got -1 and 4"):
        randomized_svd(A, 2, rng=rng, oversampling=-1)
    with pytest.raises(TypeError, match=r"rng must be a numpy\.random\.Generator, got int"):
        randomized_svd(A, 2, rng=0)
    with pytest.raises(TypeError, match=r"rng must be a torch\.Generator for a tensor, got Generator"):
        randomized_svd(torch.eye(5), 2, rng=rng)
    with pytest.raises(ValueError, match="A must be finite"):
        randomized_svd(np.where(A > 0, np.nan, A), 2, rng=rng)
    with pytest.raises(TypeError, match="A must be real, got complex128"):
        randomized_svd(A.astype(complex), 2, rng=rng)
    with pytest.raises(TypeError, match=r"A must be a NumPy array, .*, got builtins\.list"):
        randomized_svd([[1.0]], 1, rng=rng)
    with pytest.raises(ValueError, match=r"A must be a non-empty matrix \(m, n\), got shape \(2, 3, 4\)"):
        randomized_svd(np.ones((2, 3, 4)), 1, rng=rng)


@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("form", ["dense", "sparse", "old sparse", "operator"])
@pytest.mark.parametrize("k", [3, 30])
def test_truncated_eigh_agrees_with_the_dense_solver(which, form, k):
    A = generator().normal(size=(60, 60))
    A = A + A.T
    values, vectors = np.linalg.eigh(A)
    wanted = slice(None, k) if which == "smallest" else slice(-k, None)
    found = truncated_eigh(kinds(A)[form], k, which=which)
    np.testing.assert_allclose(found.values, values[wanted][::-1], atol=1e-11)
    np.testing.assert_allclose(found.vectors, fix_signs(vectors[:, wanted][:, ::-1]), atol=1e-9)


@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_every_copy_of_a_repeated_value_is_found(k, which):
    path = sp.diags_array([np.ones(59), np.ones(59)], offsets=[1, -1])
    A = sp.block_diag([path] * 5).tocsr()
    true = np.sort(np.linalg.eigvalsh(A.toarray()))[::-1]
    found = truncated_eigh(A, k, which=which)
    np.testing.assert_allclose(found.values, true[:k] if which == "largest" else true[-k:], atol=1e-12)
    np.testing.assert_allclose(A @ found.vectors, found.vectors * found.values, atol=1e-7)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(k), atol=1e-12)


def test_the_fixed_start_also_finds_vectors_orthogonal_to_ones():
    cycle = sp.csr_array(np.roll(np.eye(50), 1, axis=0) + np.roll(np.eye(50), -1, axis=0))
    np.testing.assert_allclose(truncated_eigh(cycle, 3).values, [2, *[2 * np.cos(2 * np.pi / 50)] * 2], atol=1e-12)


def test_the_start_vector_decides_no_value_and_repeats_bit_by_bit():
    A = sp.random_array((300, 300), density=0.05, rng=generator())
    A = (A + A.T).tocsr()
    first, again = truncated_eigh(A, 4), truncated_eigh(A, 4)
    np.testing.assert_array_equal(first.vectors, again.vectors)
    for other in (truncated_eigh(A, 4, rng=generator(3)), truncated_eigh(A, 4, v0=np.eye(300)[0])):
        np.testing.assert_allclose(other.values, first.values, atol=1e-12)
        np.testing.assert_allclose(other.vectors, first.vectors, atol=1e-8)


def test_float32_matrices_are_solved_in_float64():
    A = generator().normal(size=(80, 80)).astype(np.float32)
    A = A + A.T
    found = truncated_eigh(A, 4)
    assert found.values.dtype == found.vectors.dtype == np.float32
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(A.astype(np.float64))[::-1][:4], rtol=1e-7)
    operator = LinearOperator((80, 80), matvec=lambda x: A @ x, rmatvec=lambda x: A.T @ x, dtype=np.float32)
    np.testing.assert_allclose(truncated_eigh(operator, 4).values, found.values, rtol=1e-5)
    np.testing.assert_allclose(truncated_svd(operator, 4).s, truncated_svd(A, 4).s, rtol=1e-5)


def test_zero_and_identity_matrices_have_their_values():
    for matrix, value in ((sp.csr_array((100, 100)), 0.0), (sp.eye_array(100).tocsr(), 1.0)):
        for found in (truncated_eigh(matrix, 3), truncated_eigh(matrix, 3, which="smallest")):
            np.testing.assert_allclose(found.values, np.full(3, value), atol=1e-14)
            np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(3), atol=1e-13)
        np.testing.assert_allclose(truncated_svd(matrix, 3).s, np.full(3, value), atol=1e-14)
    rank_one = truncated_eigh(np.outer(np.ones(50), np.ones(50)), 3, v0=np.eye(50)[0] - np.eye(50)[1])
    np.testing.assert_allclose(rank_one.values, [50, 0, 0], atol=1e-12)


@pytest.mark.parametrize("form", ["dense", "sparse", "old sparse", "operator"])
@pytest.mark.parametrize(("m", "n"), [(90, 50), (50, 90)])
@pytest.mark.parametrize("k", [4, 40])
def test_truncated_svd_agrees_with_the_dense_solver(form, m, n, k):
    A = generator().normal(size=(m, n))
    U, s, Vh = np.linalg.svd(A, full_matrices=False)
    U, Vh = fix_signs(U[:, :k], Vh[:k])
    found = truncated_svd(kinds(A)[form], k)
    np.testing.assert_allclose(found.s, s[:k], atol=1e-12)
    np.testing.assert_allclose(found.U, U, atol=1e-9)
    np.testing.assert_allclose(found.Vh, Vh, atol=1e-9)


def test_small_singular_values_keep_their_digits_though_the_matrix_is_squared():
    s = 10.0 ** -np.arange(30)
    A = with_spectrum(200, 120, s)
    found = truncated_svd(A, 13)
    np.testing.assert_allclose(found.s, s[:13], atol=1e-15)
    np.testing.assert_allclose(A @ found.Vh.T, found.U * found.s, atol=1e-14)
    np.testing.assert_allclose(found.U.T @ found.U, np.eye(13), atol=1e-13)
    true = np.linalg.svd(A)[0][:, :9]
    np.testing.assert_allclose(np.abs(np.sum(true * found.U[:, :9], axis=0)), np.ones(9), atol=1e-9)


def test_truncated_svd_completes_a_matrix_of_lower_rank():
    found = truncated_svd(with_spectrum(60, 50, np.array([2.0, 1.0])), 5)
    np.testing.assert_allclose(found.s, [2, 1, 0, 0, 0], atol=1e-14)
    np.testing.assert_allclose(found.U.T @ found.U, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(found.Vh @ found.Vh.T, np.eye(5), atol=1e-12)


def test_arpack_that_does_not_converge_says_so():
    A = sp.diags_array(np.linspace(0, 1, 3000))
    for call in (truncated_eigh, truncated_svd):
        with pytest.raises(NotConverged, match=r"ARPACK found \d of 5 eigenpairs to tol=0"):
            call(A.tocsr(), 5, max_iter=2)


def test_truncated_solvers_name_what_is_wrong():
    A = generator().normal(size=(60, 60))
    with pytest.raises(ValueError, match="A must be symmetric"):
        truncated_eigh(A, 2)
    walk = A @ A.T
    walk = np.abs(walk) / np.abs(walk).sum(axis=1, keepdims=True)
    with pytest.raises(ValueError, match="A must be symmetric"):
        truncated_eigh(walk, 2)
    with pytest.raises(ValueError, match=r"A must be square, got shape \(3, 2\)"):
        truncated_eigh(np.ones((3, 2)), 1)
    with pytest.raises(ValueError, match="which must be 'largest' or 'smallest', got 'LM'"):
        truncated_eigh(A + A.T, 2, which="LM")
    with pytest.raises(ValueError, match="k must be between 1 and n=60, got 0"):
        truncated_eigh(A + A.T, 0)
    with pytest.raises(ValueError, match=r"v0 must be 60 finite numbers, not all zero, got shape \(60,\)"):
        truncated_eigh(A + A.T, 2, v0=np.zeros(60))
    with pytest.raises(TypeError, match=r"A must be a NumPy array, .*, got torch\.Tensor"):
        truncated_svd(torch.eye(30), 2)
    for call in (truncated_eigh, truncated_svd):
        for size in (10, 60):
            with pytest.raises(ValueError, match="A must be finite"):
                call(np.full((size, size), np.nan), 2)


def test_integers_and_booleans_are_solved_in_float64():
    A = sp.csr_array(generator().integers(0, 2, size=(70, 40)))
    for matrix in (A, A.astype(bool), A.toarray()):
        found = truncated_svd(matrix, 3)
        assert found.s.dtype == np.float64
        np.testing.assert_allclose(found.s, np.linalg.svd(A.toarray().astype(float), compute_uv=False)[:3])


def test_numpy_users_load_no_torch():
    code = "import numpy as np, sys; from polyspan.linalg import *; truncated_svd(np.eye(40), 2); "
    code += "randomized_svd(np.eye(40), 2, rng=np.random.default_rng(0)); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
