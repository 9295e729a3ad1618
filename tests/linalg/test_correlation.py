import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA
from torch.autograd import gradcheck

from polyspan.linalg import (
    PairedMoments,
    cca,
    cca_from_moments,
    kernel_cka,
    linear_cka,
    linear_cka_from_moments,
    pwcca,
    svcca,
)

KINDS = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
DEBIASED = pytest.mark.parametrize("debiased", [False, True])


def views(n=200, p=6, q=4, seed=0, shared=3, offset=5.0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n, shared)) * [2.0, 1.0, 0.5][:shared]
    X = hidden @ rng.normal(size=(shared, p)) + rng.normal(size=(n, p)) + offset
    Y = hidden @ rng.normal(size=(shared, q)) + rng.normal(size=(n, q)) - offset
    return X, Y


def generalised_eigenvalues(X, Y, reg=0.0):
    """Solve CCA the literal way: one symmetric pencil of size p + q."""
    A, B = X - X.mean(axis=0), Y - Y.mean(axis=0)
    n, p, q = len(A), A.shape[1], B.shape[1]
    Sxx, Syy, Sxy = A.T @ A / n, B.T @ B / n, A.T @ B / n
    Sxx, Syy = Sxx + reg * np.trace(Sxx) / p * np.eye(p), Syy + reg * np.trace(Syy) / q * np.eye(q)
    joint = np.block([[np.zeros((p, p)), Sxy], [Sxy.T, np.zeros((q, q))]])
    return scipy.linalg.eigh(joint, scipy.linalg.block_diag(Sxx, Syy), eigvals_only=True)[::-1][: min(p, q)]


def gram_hsic(K, L):
    """Compute HSIC the literal way."""
    n = len(K)
    H = np.eye(n) - 1 / n
    return np.trace(K @ H @ L @ H) / (n - 1) ** 2


def gram_hsic_unbiased(K, L):
    """Compute the unbiased estimate the literal way: means over distinct pairs, triples and quadruples of items."""
    n = len(K)
    pair = triple = quadruple = 0.0
    for i in range(n):
        for j in set(range(n)) - {i}:
            pair += K[i, j] * L[i, j]
            for r in set(range(n)) - {i, j}:
                triple += K[i, j] * L[i, r]
                for s in set(range(n)) - {i, j, r}:
                    quadruple += K[i, j] * L[r, s]
    two, three = n * (n - 1), n * (n - 1) * (n - 2)
    return pair / two - 2 * triple / three + quadruple / (three * (n - 3))


def literal_cka(X, Y, hsic):
    K, L = X @ X.T, Y @ Y.T
    return hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))


@KINDS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("reg", [0.0, 0.1])
def test_correlations_solve_the_literal_eigenproblem(kind, dtype, reg):
    X, Y = (v.astype(dtype) for v in views())
    fit = cca(kind(X), kind(Y), reg=reg)
    assert all(part.dtype == kind(X).dtype for part in fit)
    tol = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(np.asarray(fit.correlations), generalised_eigenvalues(*views(), reg), atol=tol)


@KINDS
def test_canonical_coordinates_are_white_and_correlate_only_with_their_partner(kind):
    X, Y = views()
    fit = cca(kind(X), kind(Y), 3)
    A = (kind(X) - fit.mean_in) @ fit.weights_in
    B = (kind(Y) - fit.mean_out) @ fit.weights_out
    np.testing.assert_allclose(np.asarray(A.T @ A) / len(X), np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.asarray(B.T @ B) / len(X), np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.asarray(A.T @ B) / len(X), np.diag(np.asarray(fit.correlations)), atol=1e-12)
    np.testing.assert_allclose(np.asarray(fit.mean_in), X.mean(axis=0))
    leading = np.abs(np.asarray(fit.weights_in)).argmax(axis=0)
    assert (np.asarray(fit.weights_in)[leading, np.arange(3)] > 0).all()


def test_agrees_with_scikit_learn():
    X, Y = views(n=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = CCA(3, scale=False, max_iter=20000, tol=1e-14).fit(X, Y)
    fit = cca(X, Y, 3)
    turned = theirs.transform(X)
    mine = (X - fit.mean_in) @ fit.weights_in
    cosines = np.sum(mine * turned, axis=0) / np.linalg.norm(mine, axis=0) / np.linalg.norm(turned, axis=0)
    np.testing.assert_allclose(np.abs(cosines), np.ones(3), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), p=st.integers(2, 6), q=st.integers(2, 6))
def test_correlations_do_not_change_under_affine_maps_of_a_view(seed, p, q):
    X, Y = views(60, p, q, seed)
    rng = np.random.default_rng(seed + 1)
    mixed = X @ (np.eye(p) + 0.2 * rng.normal(size=(p, p))) + rng.normal(size=p)
    fit, again = cca(X, Y), cca(mixed, Y * 1e-6)
    np.testing.assert_allclose(again.correlations, fit.correlations, atol=1e-7)
    swapped = cca(Y, X)
    np.testing.assert_allclose(swapped.correlations, fit.correlations, atol=1e-10)


def test_badly_conditioned_views_keep_their_digits():
    X, Y = views()
    scale = 10.0 ** -np.arange(6) * [1, 1, 1, 1, 1, 1e-5]
    np.testing.assert_allclose(cca((X - X.mean(axis=0)) * scale, Y).correlations, cca(X, Y).correlations, atol=1e-6)


def test_a_duplicated_feature_changes_nothing_and_is_no_extra_pair():
    X, Y = views(p=3, q=5)
    twice = cca(np.hstack([X, X[:, :1] + X[:, 1:2]]), Y)
    np.testing.assert_allclose(twice.correlations, cca(X, Y).correlations, atol=1e-12)
    assert twice.weights_in.shape == (4, 3)
    with pytest.raises(ValueError, match="k must be between 1 and 3, the smaller rank of the two views, got 4"):
        cca(np.hstack([X, X[:, :1]]), Y, 4)


def test_fewer_rows_than_features_correlate_perfectly_unless_regularised():
    X, Y = np.random.default_rng(0).normal(size=(2, 12, 40))
    np.testing.assert_allclose(cca(X, Y).correlations, np.ones(11), atol=1e-12)
    assert cca(X, Y, reg=1.0).correlations.max() < 0.9
    np.testing.assert_allclose(cca(X, Y, reg=1.0).correlations, generalised_eigenvalues(X, Y, 1.0)[:11], atol=1e-12)


def test_rank_reduces_each_view_to_its_principal_components():
    X, Y = views()

    def reduced(Z, r):
        U, s, _ = np.linalg.svd(Z - Z.mean(axis=0), full_matrices=False)
        return U[:, :r] * s[:r]

    found = cca(X, Y, rank=(4, 2)).correlations
    np.testing.assert_allclose(found, generalised_eigenvalues(reduced(X, 4), reduced(Y, 2)), atol=1e-12)
    spread = np.linalg.svd(X - X.mean(axis=0), compute_uv=False) ** 2
    share = spread[:3].sum() / spread.sum()
    np.testing.assert_array_equal(cca(X, Y, rank=(float(share), 1.0)).correlations, cca(X, Y, rank=(3, 4)).correlations)
    np.testing.assert_allclose(svcca(X, Y, share=1.0), cca(X, Y).correlations.mean())
    assert svcca(X, X) == pytest.approx(1)


@pytest.mark.parametrize(("reg", "rank"), [(0.0, None), (0.05, None), (0.01, 2), (0.0, 0.9)])
def test_moments_gathered_in_batches_give_the_same_fit(reg, rank):
    X, Y = views()
    moments = PairedMoments(6, 4)
    for start in range(0, 200, 64):
        moments.update(X[start : start + 64], Y[start : start + 64])
    for mine, whole in zip(cca_from_moments(moments, reg=reg, rank=rank), cca(X, Y, reg=reg, rank=rank), strict=True):
        np.testing.assert_allclose(mine, whole, atol=1e-10)
    np.testing.assert_allclose(linear_cka_from_moments(moments), linear_cka(X, Y), rtol=1e-12)


def test_moments_without_a_second_view_or_rows_are_refused():
    with pytest.raises(ValueError, match="moments must hold cov_in, cross and cov_out of two views, got shapes"):
        cca_from_moments(PairedMoments(3))
    with pytest.raises(ValueError, match="moments must have seen rows, got weight 0"):
        cca_from_moments(PairedMoments(3, 2))
    flat = SimpleNamespace(cov_in=np.eye(2), cov_out=np.zeros((2, 2)), cross=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="got one that is constant"):
        linear_cka_from_moments(flat)


@KINDS
def test_projection_weighting_follows_its_definition(kind):
    X, Y = views()
    fit = cca(X, Y)
    A = X - X.mean(axis=0)
    H = A @ fit.weights_in
    alpha = [sum(abs(H[:, i] @ A[:, j]) for j in range(A.shape[1])) for i in range(4)]
    np.testing.assert_allclose(float(pwcca(kind(X), kind(Y))), np.average(fit.correlations, weights=alpha), rtol=1e-12)
    assert float(pwcca(kind(X), kind(X))) == pytest.approx(1)


@pytest.mark.parametrize("reg", [0.0, 0.1])
def test_cca_is_differentiable_where_spectra_are_simple(reg):
    X, Y = (torch.from_numpy(v).requires_grad_() for v in views(15, 4, 3))
    assert gradcheck(lambda A, B: tuple(cca(A, B, 2, reg=reg)[:3]), (X, Y), atol=1e-6)


def test_cca_names_what_is_wrong():
    X, Y = views()
    for bad, message in (
        ({"reg": -1.0}, "reg must be finite and not negative, got -1.0"),
        ({"rank": 0}, r"rank must be an int >= 1 or a share in \(0, 1\], got 0"),
        ({"rank": (1, 1.5)}, r"rank must be an int >= 1 or a share in \(0, 1\], got 1.5"),
        ({"rank": (1, 2, 3)}, "rank must be one value or a pair, got 3 values"),
        ({"k": 5}, "k must be between 1 and 4"),
    ):
        with pytest.raises(ValueError, match=message):
            cca(X, Y, **bad)
    with pytest.raises(ValueError, match=r"X and Y must have shapes .* got \(200, 6\), \(199, 4\)"):
        cca(X, Y[1:])
    with pytest.raises(ValueError, match="Y is constant over its rows"):
        cca(X, np.zeros_like(Y))
    with pytest.raises(ValueError, match="X must be finite"):
        cca(np.where(X > 6, np.inf, X), Y)
    with pytest.raises(TypeError, match="expected arrays of one kind"):
        cca(X, torch.from_numpy(Y))
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        svcca(X, Y, share=0)


@KINDS
@DEBIASED
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("p", "q"), [(3, 2), (30, 20)], ids=["features", "gram"])
def test_alignment_is_the_literal_gram_formula(kind, debiased, dtype, p, q):
    X, Y = views(9, p, q)
    expected = literal_cka(X, Y, gram_hsic_unbiased if debiased else gram_hsic)
    found = linear_cka(kind(X.astype(dtype)), kind(Y.astype(dtype)), debiased=debiased)
    assert found.dtype == kind(X.astype(dtype)).dtype
    tol = 1e-4 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(float(found), expected, atol=tol)
    kernels = (kind((v @ v.T).astype(dtype)) for v in (X, Y))
    np.testing.assert_allclose(float(kernel_cka(*kernels, debiased=debiased)), expected, atol=10 * tol)


@DEBIASED
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), p=st.integers(1, 20), q=st.integers(1, 20))
def test_alignment_ignores_rotation_scale_and_shift(debiased, seed, p, q):
    X, Y = views(12, p, q, seed)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(p, p)))[0]
    base = linear_cka(X, Y, debiased=debiased)
    np.testing.assert_allclose(linear_cka(3e4 * X @ turn + 7, Y * 1e-4, debiased=debiased), base, atol=1e-9)
    np.testing.assert_allclose(linear_cka(Y, X, debiased=debiased), base, atol=1e-12)
    np.testing.assert_allclose(linear_cka(X, X @ turn, debiased=debiased), 1)
    assert -1 - 1e-12 <= base <= 1 + 1e-12


def test_debiasing_takes_unrelated_wide_views_to_zero_and_the_docstring_says_where_they_were():
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(40, 2, 50, 200))
    biased, debiased = (linear_cka(pairs[:, 0], pairs[:, 1], debiased=flag) for flag in (False, True))
    np.testing.assert_allclose(biased.mean(), 1 / (1 + 50 / 200), atol=0.01)
    assert abs(debiased.mean()) < 0.01


@KINDS
@DEBIASED
def test_batches_equal_loops(kind, debiased):
    X, Y = np.random.default_rng(0).normal(size=(2, 3, 2, 8, 4))
    found = np.asarray(linear_cka(kind(X), kind(Y), debiased=debiased))
    loop = [[linear_cka(X[i, j], Y[i, j], debiased=debiased) for j in range(2)] for i in range(3)]
    np.testing.assert_allclose(found, loop, rtol=1e-12)
    K, L = X @ X.swapaxes(-1, -2), Y @ Y.swapaxes(-1, -2)
    np.testing.assert_allclose(np.asarray(kernel_cka(kind(K), kind(L), debiased=debiased)), loop, rtol=1e-10)


@DEBIASED
@pytest.mark.parametrize(("p", "q"), [(3, 2), (12, 9)], ids=["features", "gram"])
def test_alignment_has_gradients_at_generic_equal_and_uncorrelated_views(debiased, p, q):
    X, Y = (torch.from_numpy(v).requires_grad_() for v in views(7, p, q, offset=0.5))
    assert gradcheck(lambda A, B: linear_cka(A, B, debiased=debiased), (X, Y))
    assert gradcheck(lambda A: linear_cka(A, A.detach(), debiased=debiased), (X,), atol=1e-6)
    assert gradcheck(lambda A, B: kernel_cka(A @ A.mT, B @ B.mT, debiased=debiased), (X, Y))
    one, other = torch.zeros(8, 2, dtype=torch.float64), torch.zeros(8, 2, dtype=torch.float64)
    one[0, 0], one[1, 0], other[2, 1], other[3, 1] = 1, -1, 1, -1
    assert gradcheck(lambda A, B: linear_cka(A, B, debiased=debiased), (one.requires_grad_(), other.requires_grad_()))


def test_half_precision_does_not_overflow():
    X, Y = (100 * torch.from_numpy(v) for v in views(50, 6, 4))
    for dtype in (torch.float16, torch.bfloat16):
        half = linear_cka(X.to(dtype), Y.to(dtype))
        assert half.dtype == dtype
        np.testing.assert_allclose(float(half), float(linear_cka(X, Y)), atol=0.02)


def test_alignment_names_what_is_wrong():
    X, Y = views(9)
    with pytest.raises(ValueError, match="Y is constant over its items: its similarity to anything is 0/0"):
        linear_cka(X, np.full_like(Y, 0.1))
    with pytest.raises(ValueError, match="K is constant over its items"):
        kernel_cka(np.ones((5, 5)), np.eye(5))
    with pytest.raises(ValueError, match="debiased CKA needs at least 4 items, got 3"):
        linear_cka(X[:3], Y[:3], debiased=True)
    with pytest.raises(ValueError, match="X must be finite"):
        linear_cka(np.where(X > 6, np.inf, X), Y)
    with pytest.raises(ValueError, match=r"X and Y must have shapes .* got \(9, 6\), \(8, 4\)"):
        linear_cka(X, Y[1:])
    with pytest.raises(ValueError, match=r"K and L must both have shape .* got \(3, 3\) and \(4, 4\)"):
        kernel_cka(np.eye(3), np.eye(4))
