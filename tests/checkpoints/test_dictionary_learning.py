import itertools

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.checkpoints import SparseDictionary
from polyspan.checkpoints._dictionary_fit import exchange, fit_dictionary, refit
from polyspan.linalg import ksvd_update, orthogonal_matching_pursuit


@parametrize_with_checks(
    [
        SparseDictionary(),
        SparseDictionary(pursuit="omp", init="random", max_iter=3),
        SparseDictionary(algorithm="orthogonal"),
        SparseDictionary(algorithm="threshold"),
    ]
)
def test_sklearn_contract(estimator, check):
    check(estimator)


def planted(n=300, d=12, m=18, s=2, seed=0):
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(m, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = np.zeros((n, m))
    for row in codes:
        row[rng.choice(m, s, replace=False)] = rng.normal(size=s) + 2 * rng.choice([-1, 1], s)
    return codes @ atoms, atoms


def skewed(n, d, seed=0):
    """Rows like whitened weights: Gaussian, with variances falling by 10 over the axes, turned."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return rng.normal(size=(n, d)) * np.sqrt(np.logspace(0, -1, d)) @ turn


@pytest.mark.parametrize("pursuit", ["exchange", "omp"])
def test_ksvd_finds_planted_atoms_beyond_the_dimension(pursuit):
    X, atoms = planted()
    fits = [
        SparseDictionary(18, 2, pursuit=pursuit, init="random", max_iter=30, tol=0, random_state=seed).fit(X)
        for seed in range(4)
    ]
    best = min(fits, key=lambda fit: fit.error_history_.min())
    nearest = np.abs(atoms @ best.components_.T).max(axis=1)
    assert np.mean(nearest > 0.99) >= 0.8
    assert best.score(X) > 0.95


def test_the_error_of_exchanges_and_of_orthogonal_atoms_never_rises_and_is_that_of_the_codes():
    X = skewed(80, 24)
    Y = torch.from_numpy(X)
    for algorithm in ("ksvd", "orthogonal"):
        found = fit_dictionary(Y, 16, 6, algorithm=algorithm, max_iter=30, tol=0)
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(found.errors))
        lost = float((Y - found.codes @ found.atoms.mT).square().sum() / Y.square().sum())
        assert lost == pytest.approx(found.errors[-1], rel=1e-9)
        assert int((found.codes != 0).sum(dim=1).max()) <= 6
        torch.testing.assert_close(torch.linalg.vector_norm(found.atoms, dim=0), torch.ones(16, dtype=torch.float64))


def test_the_published_form_is_omp_and_one_by_one_updates_and_keeps_its_best_sweep():
    Y = torch.from_numpy(skewed(60, 16))
    found = fit_dictionary(Y, 12, 4, pursuit="omp", max_iter=5, tol=0)
    D = torch.linalg.eigh(Y.mT @ Y).eigenvectors.flip(1)[:, :12]
    errors = []
    for _ in range(5):
        D, codes = ksvd_update(D, Y, orthogonal_matching_pursuit(D, Y, n_nonzero=4))
        errors.append(float((Y - codes @ D.mT).square().sum() / Y.square().sum()))
    assert found.errors == pytest.approx(errors, rel=1e-9)
    lost = float((Y - found.codes @ found.atoms.mT).square().sum() / Y.square().sum())
    assert lost == pytest.approx(min(errors), rel=1e-9)


def test_exchanges_reach_less_error_than_as_many_published_sweeps():
    for n, d, m, s in ((128, 64, 36, 18), (256, 48, 40, 16)):
        Y = torch.from_numpy(skewed(n, d))
        ours, theirs = (fit_dictionary(Y, m, s, pursuit=p, max_iter=12, tol=0) for p in ("exchange", "omp"))
        assert min(ours.errors) < min(theirs.errors)


def test_orthogonal_codes_are_the_best_of_all_supports():
    Y = torch.from_numpy(skewed(5, 6))
    found = fit_dictionary(Y, 5, 2, algorithm="orthogonal", max_iter=6, tol=0)
    torch.testing.assert_close(found.atoms.mT @ found.atoms, torch.eye(5, dtype=torch.float64))
    for y, codes in zip(Y, found.codes, strict=True):
        left = min(
            float((y - D @ (D.mT @ y)).square().sum())
            for D in (found.atoms[:, list(pair)] for pair in itertools.combinations(range(5), 2))
        )
        assert float((y - found.atoms @ codes).square().sum()) == pytest.approx(left, rel=1e-9)


def test_a_full_set_of_atoms_explains_everything():
    X = skewed(40, 8)
    for algorithm in ("ksvd", "orthogonal"):
        fitted = SparseDictionary(8, 8, algorithm=algorithm).fit(X)
        assert fitted.error_history_[-1] < 1e-12
        np.testing.assert_allclose(fitted.inverse_transform(fitted.transform(X)), X, atol=1e-8)


def test_an_exchange_lowers_the_error_of_every_row_and_a_refit_reaches_least_squares():
    Y, D = torch.from_numpy(skewed(70, 20)), torch.from_numpy(skewed(20, 30, seed=1))
    D = D / torch.linalg.vector_norm(D, dim=0)
    codes, step = orthogonal_matching_pursuit(D, Y, n_nonzero=4), torch.ones(70, 1, dtype=torch.float64)
    before = (Y - codes @ D.mT).square().sum(dim=1)
    exchange(D, Y, codes, step, 4)
    assert bool(((Y - codes @ D.mT).square().sum(dim=1) <= before + 1e-12).all())
    assert int((codes != 0).sum(dim=1).max()) <= 4
    fitted = refit(D, Y, codes)
    for y, row in zip(Y, fitted, strict=True):
        used = row != 0
        exact = torch.linalg.lstsq(D[:, used], y).solution
        torch.testing.assert_close(row[used], exact, atol=1e-6, rtol=1e-6)


def test_threshold_weighs_coefficients_by_what_importance_says():
    Y = torch.eye(3, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0]) + 0.01
    plain = fit_dictionary(Y, 3, 1, algorithm="threshold")
    told = fit_dictionary(Y, 3, 1, algorithm="threshold", importance=lambda D: torch.tensor([1e-6, 1e-6, 1.0]))
    assert plain.errors[-1] < told.errors[-1]
    assert int((told.codes != 0).sum(dim=0)[2]) == 3


@pytest.mark.parametrize("algorithm", ["ksvd", "orthogonal", "threshold"])
def test_zero_rows_get_zero_codes_and_equal_rows_or_rank_1_do_no_harm(algorithm):
    X = skewed(30, 6)
    X[[3, 17]] = 0
    codes = SparseDictionary(5, 2, algorithm=algorithm).fit(X).transform(X)
    assert np.isfinite(codes).all()
    assert not codes[[3, 17]].any()
    flat = np.outer(np.arange(1.0, 9.0), np.ones(6))
    fitted = SparseDictionary(5, 2, algorithm=algorithm).fit(flat)
    assert fitted.error_history_[-1] < 1e-6
    assert SparseDictionary(4, 2, algorithm=algorithm).fit(np.zeros((7, 6))).error_history_.tolist() == [0.0]


def test_equal_seeds_give_equal_atoms_and_more_atoms_than_rows_are_filled_up():
    X = skewed(9, 5)
    one, two = (SparseDictionary(12, 2, init="random", random_state=3, max_iter=4).fit(X) for _ in range(2))
    np.testing.assert_array_equal(one.components_, two.components_)
    np.testing.assert_allclose(np.linalg.norm(one.components_, axis=1), 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "d", "atoms", "s"), [(9, 5, 30, 3), (6, 3, 20, 3), (5, 2, 8, 2)])
def test_atoms_that_depend_on_one_another_leave_all_finite(n, d, atoms, s, dtype):
    for seed in range(10):
        X = np.random.default_rng(seed).normal(size=(n, d)) * np.logspace(0, -3, d)
        made = SparseDictionary(atoms, s, init="random", random_state=seed, max_iter=8).fit(X.astype(dtype))
        assert np.isfinite(made.components_).all()
        assert np.isfinite(made.transform(X.astype(dtype))).all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"algorithm": "lasso"}, r"algorithm must be one of .* got 'lasso'"),
        ({"pursuit": "lars"}, r"pursuit must be one of .* got 'lars'"),
        ({"init": "zeros"}, r"init must be one of .* got 'zeros'"),
        ({"n_components": 0}, "n_components must be at least 1, got 0"),
        ({"n_components": 9, "algorithm": "orthogonal"}, "between 1 and the 6 features for 'orthogonal', got 9"),
        ({"n_nonzero": 7}, "n_nonzero must be between 1 and n_components=6, got 7"),
        ({"max_iter": 0}, "max_iter must be at least 1, got 0"),
        ({"tol": -1.0}, "tol must not be negative, got -1.0"),
    ],
)
def test_parameters_out_of_range_are_named(options, told):
    with pytest.raises(ValueError, match=told):
        SparseDictionary(**options).fit(skewed(10, 6))
