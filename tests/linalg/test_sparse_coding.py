import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp_gram

from polyspan.linalg import ksvd_update, mod_update, orthogonal_matching_pursuit

KINDS = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
EXACT = pytest.mark.parametrize("exact", [False, True], ids=["approximate", "exact"])


def atoms(d=12, m=20, seed=0):
    D = np.random.default_rng(seed).normal(size=(d, m))
    return D / np.linalg.norm(D, axis=0)


def problem(n=40, d=12, m=20, s=3, seed=0, noise=0.1):
    """Make rows of s atoms each, and some noise."""
    rng = np.random.default_rng(seed)
    D, codes = atoms(d, m, seed), np.zeros((n, m))
    for row in codes:
        row[rng.choice(m, s, replace=False)] = rng.choice([-1, 1], s) * rng.uniform(1, 2, s)
    return D, codes @ D.T + noise * rng.normal(size=(n, d)), codes


def literal_pursuit(D, x, n_nonzero, tol=0.0):
    """Choose atom by atom and refit by least squares in the space of the data."""
    chosen, gamma, rest = [], np.zeros(0), x
    length = np.linalg.norm(D, axis=0)
    while len(chosen) < n_nonzero and np.linalg.norm(rest) > tol:
        chosen.append(int(np.abs(rest @ D / length).argmax()))
        gamma = np.linalg.lstsq(D[:, chosen], x, rcond=None)[0]
        rest = x - D[:, chosen] @ gamma
    code = np.zeros(D.shape[1])
    code[chosen] = gamma
    return code


def loss(D, X, codes):
    return np.linalg.norm(X - codes @ D.T)


@KINDS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_nonzero", [1, 3, 8])
def test_pursuit_agrees_with_scikit_learn_and_with_the_literal_one(kind, dtype, n_nonzero):
    D, X, _ = problem()
    codes = orthogonal_matching_pursuit(kind(D.astype(dtype)), kind(X.astype(dtype)), n_nonzero=n_nonzero)
    assert codes.dtype == kind(X.astype(dtype)).dtype
    tol = 1e-4 if dtype == np.float32 else 1e-11
    theirs = orthogonal_mp_gram(D.T @ D, D.T @ X.T, n_nonzero_coefs=n_nonzero).T
    np.testing.assert_allclose(np.asarray(codes), theirs, atol=tol)
    np.testing.assert_allclose(np.asarray(codes), [literal_pursuit(D, x, n_nonzero) for x in X], atol=tol)


@KINDS
@pytest.mark.parametrize("limit", [None, 4])
def test_each_row_ends_at_its_own_tolerance(kind, limit):
    D, X, _ = problem(200, noise=0.3)
    X *= np.geomspace(0.05, 5, 200)[:, None]
    codes = np.asarray(orthogonal_matching_pursuit(kind(D), kind(X), tol=0.8, n_nonzero=limit))
    np.testing.assert_allclose(codes, [literal_pursuit(D, x, limit or 12, 0.8) for x in X], atol=1e-9)
    counts = (codes != 0).sum(axis=1)
    assert counts.min() == 0
    assert len(set(counts)) >= 4
    residuals = np.linalg.norm(X - codes @ D.T, axis=1)
    assert (residuals[counts < (limit or 12)] <= 0.8).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), s=st.integers(1, 6), block=st.sampled_from([1, 2000, 2**30]))
def test_residuals_are_orthogonal_to_the_atoms_used_and_blocks_change_nothing(seed, s, block):
    D, X, _ = problem(15, seed=seed, noise=0.5)
    codes = orthogonal_matching_pursuit(D, X, n_nonzero=s, block_bytes=block)
    used = codes != 0
    assert (used.sum(axis=1) <= s).all()
    np.testing.assert_allclose(((X - codes @ D.T) @ D)[used], 0, atol=1e-9)
    np.testing.assert_allclose(codes, orthogonal_matching_pursuit(D, X, n_nonzero=s), atol=1e-10)


def test_incoherent_atoms_are_recovered():
    D = np.hstack([np.eye(64), np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0]])
    truth = np.zeros((50, 128))
    rng = np.random.default_rng(1)
    for row in truth:
        row[rng.choice(128, 3, replace=False)] = rng.choice([-1, 1], 3) * rng.uniform(1, 2, 3)
    codes = orthogonal_matching_pursuit(D, truth @ D.T, n_nonzero=10)
    found = np.abs(codes - truth).max(axis=1) < 1e-9
    assert found.mean() > 0.9
    # Once a row is explained it takes no further atoms, though it may.
    assert ((codes != 0).sum(axis=1)[found] == 3).all()


@KINDS
def test_atoms_of_any_length_and_zero_atoms_do(kind):
    D, X, _ = problem()
    length = np.geomspace(1e-3, 1e3, 20)
    scaled = np.hstack([np.zeros((12, 1)), D * length])
    codes = np.asarray(orthogonal_matching_pursuit(kind(scaled), kind(X), n_nonzero=4))
    np.testing.assert_array_equal(codes[:, 0], np.zeros(40))
    np.testing.assert_allclose(codes[:, 1:] * length, orthogonal_matching_pursuit(D, X, n_nonzero=4), atol=1e-10)


@KINDS
def test_zero_rows_dependent_atoms_and_no_rows_end_quietly(kind):
    D, X, _ = problem()
    X[3] = 0
    twice = np.hstack([D[:, :3], D[:, :3], -D[:, :1]])
    codes = np.asarray(orthogonal_matching_pursuit(kind(twice), kind(X), n_nonzero=7))
    np.testing.assert_array_equal(codes[3], np.zeros(7))
    assert ((codes != 0).sum(axis=1) <= 3).all()
    together = codes[:, :3] + codes[:, 3:6] - np.pad(codes[:, 6:], [(0, 0), (0, 2)])
    np.testing.assert_allclose(together, X @ np.linalg.pinv(D[:, :3]).T, atol=1e-10)
    assert orthogonal_matching_pursuit(kind(D), kind(X[:0]), n_nonzero=2).shape == (0, 20)
    full = orthogonal_matching_pursuit(kind(atoms(5, 9)), kind(X[:, :5].copy()), tol=0.0)
    np.testing.assert_allclose(np.asarray(full) @ atoms(5, 9).T, X[:, :5], atol=1e-6)


def test_half_precision_is_coded_wider_and_carries_no_gradient():
    D, X, _ = (torch.from_numpy(x) for x in problem(noise=0.0))
    half = orthogonal_matching_pursuit(D.to(torch.bfloat16).requires_grad_(), X.to(torch.bfloat16), n_nonzero=3)
    assert half.dtype == torch.bfloat16
    assert not half.requires_grad
    error = torch.linalg.vector_norm(X - half.double() @ D.mT, dim=1) / torch.linalg.vector_norm(X, dim=1)
    assert float(error.median()) < 0.02


@KINDS
@EXACT
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_atom_update_is_the_literal_one(kind, exact, dtype):
    D, X, codes = (x.astype(dtype) for x in problem(noise=0.4))
    codes[:, 7] = 0
    update = ksvd_update(kind(D), kind(X), kind(codes), exact=exact)
    assert update.atoms.dtype == update.codes.dtype == kind(D).dtype
    A, C = D.astype(np.float64), codes.astype(np.float64)
    for j in range(20):
        rows = np.flatnonzero(C[:, j])
        if len(rows) == 0:
            continue
        rest = X[rows] - C[rows] @ A.T + np.outer(C[rows, j], A[:, j])
        u = np.linalg.svd(rest)[2][0] if exact else C[rows, j] @ rest
        u = u / np.linalg.norm(u) * (np.sign(u @ A[:, j]) if exact else 1)
        A[:, j], C[rows, j] = u, rest @ u
    rest = np.linalg.norm(X - C @ A.T, axis=1)
    A[:, 7] = X[rest.argmax()] / np.linalg.norm(X[rest.argmax()])
    tol = 1e-4 if dtype == np.float32 else 1e-10
    np.testing.assert_allclose(np.asarray(update.atoms), A, atol=tol)
    np.testing.assert_allclose(np.asarray(update.codes), C, atol=tol)


@EXACT
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_an_update_never_raises_the_error_keeps_the_support_and_unit_norms(exact, seed):
    D, X, codes = problem(noise=0.5, seed=seed)
    before = [x.copy() for x in (D, X, codes)]
    update = ksvd_update(D, X, codes, exact=exact)
    assert loss(update.atoms, X, update.codes) <= loss(D, X, codes) + 1e-12
    assert not update.codes[codes == 0].any()
    np.testing.assert_allclose(np.linalg.norm(update.atoms, axis=0), np.ones(20), atol=1e-12)
    for mine, kept in zip((D, X, codes), before, strict=True):
        np.testing.assert_array_equal(mine, kept)


@EXACT
def test_alternation_learns_a_planted_dictionary(exact):
    D, X, _ = problem(1500, 16, 20, 2, noise=0.01)
    learnt = X[np.random.default_rng(1).choice(1500, 20, replace=False)].T
    learnt = learnt / np.linalg.norm(learnt, axis=0)
    for _ in range(25):
        learnt, _ = ksvd_update(learnt, X, orthogonal_matching_pursuit(learnt, X, n_nonzero=2), exact=exact)
    assert (np.abs(D.T @ learnt).max(axis=1) > 0.99).mean() >= 0.8


@KINDS
@pytest.mark.parametrize("reg", [0.0, 0.3])
def test_all_atoms_at_once_solve_least_squares(kind, reg):
    _, X, codes = problem(noise=0.4)
    update = mod_update(kind(X), kind(codes), reg=reg)
    A, C = (np.asarray(part) for part in update)
    ridge = reg * (codes**2).sum() / 20
    solved = np.linalg.solve(codes.T @ codes + ridge * np.eye(20), codes.T @ X)
    np.testing.assert_allclose(C @ A.T, codes @ solved, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(A, axis=0), np.ones(20), atol=1e-12)
    np.testing.assert_array_equal(C != 0, codes != 0)
    if reg == 0:
        best = np.linalg.lstsq(codes, X, rcond=None)[0]
        np.testing.assert_allclose(codes @ best, C @ A.T, atol=1e-9)


@pytest.mark.parametrize("reg", [0.0, 0.3])
def test_unused_atoms_become_the_worst_fitted_rows_each_once(reg):
    D, X, codes = problem(noise=0.4)
    codes[:, [2, 9]] = 0
    for A, C in (mod_update(X, codes, reg=reg), ksvd_update(D, X, codes)):
        rest = np.linalg.norm(X - C @ A.T, axis=1)
        worst = np.argsort(-rest)[:2]
        np.testing.assert_allclose(A[:, [2, 9]], (X[worst] / np.linalg.norm(X[worst], axis=1, keepdims=True)).T)
        np.testing.assert_array_equal(C[:, [2, 9]], np.zeros((40, 2)))


@KINDS
def test_codes_that_are_all_zero_or_dependent_and_rows_that_run_out_have_an_answer(kind):
    D, X, codes = problem()
    for A, C in (
        mod_update(kind(X), kind(0 * codes)),
        mod_update(kind(X), kind(0 * codes), reg=0.1),
        ksvd_update(kind(D), kind(X), kind(0 * codes)),
        ksvd_update(kind(D), kind(0 * X), kind(codes)),
        ksvd_update(kind(D), kind(0 * X), kind(codes), exact=True),
        ksvd_update(kind(D), kind(X[:3]), kind(0 * codes[:3])),
    ):
        np.testing.assert_allclose(np.linalg.norm(np.asarray(A), axis=0), np.ones(20), atol=1e-12)
        assert np.isfinite(np.asarray(C)).all()
    dependent = codes.copy()
    dependent[:, 1] = 2 * dependent[:, 0]
    A, C = (np.asarray(part) for part in mod_update(kind(X), kind(dependent)))
    best = dependent @ np.linalg.lstsq(dependent, X, rcond=None)[0]
    np.testing.assert_allclose(C @ A.T, best, atol=1e-9)


def test_arguments_that_make_no_sense_are_named():
    D, X, codes = problem()
    for call, message in (
        (lambda: orthogonal_matching_pursuit(D, X), "n_nonzero or tol must be given, got neither"),
        (
            lambda: orthogonal_matching_pursuit(D, X, n_nonzero=21),
            "n_nonzero must be between 1 and the 20 atoms of D, got 21",
        ),
        (lambda: orthogonal_matching_pursuit(D, X, tol=-1.0), r"tol must not be negative, got -1\.0"),
        (
            lambda: orthogonal_matching_pursuit(D.T, X, tol=1.0),
            r"D and X must have shapes \(d, m\) and \(n, d\), got \(20, 12\)",
        ),
        (lambda: orthogonal_matching_pursuit(D, np.full_like(X, np.nan), tol=1.0), "X must be finite"),
        (lambda: ksvd_update(D, X, codes[1:]), r"X and codes must have shapes .* got \(40, 12\), \(39, 20\)"),
        (
            lambda: ksvd_update(D[:, 1:], X, codes),
            r"D must have shape \(12, 20\) to go with X and codes, got \(12, 19\)",
        ),
        (lambda: mod_update(X, codes, reg=-1.0), r"reg must be finite and not negative, got -1\.0"),
        (lambda: mod_update(np.full_like(X, np.inf), codes), "X must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="expected arrays of one kind"):
        orthogonal_matching_pursuit(torch.from_numpy(D), X, n_nonzero=1)
