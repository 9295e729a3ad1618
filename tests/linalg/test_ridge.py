import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, Ridge, RidgeCV

from polyspan.linalg import PairedMoments, ridge_from_moments, ridge_map
from polyspan.linalg.ridge import ALPHAS


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 8)) + 3
    return X, X @ rng.normal(size=(8, 5)) + 0.5 * rng.normal(size=(60, 5)) - 1


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("shift", [True, False])
def test_agrees_with_scikit_learn(rows, alpha, shift):
    X, Y = rows
    fit = ridge_map(X, Y, alpha=alpha, shift=shift)
    theirs = Ridge(alpha=alpha, fit_intercept=shift).fit(X, Y)
    np.testing.assert_allclose((X - fit.mean_in) @ fit.weights + fit.mean_out, theirs.predict(X), atol=1e-8)


def test_no_penalty_is_least_squares(rows):
    X, Y = rows
    fit = ridge_map(X, Y, alpha=0.0)
    np.testing.assert_allclose(fit.weights, LinearRegression().fit(X, Y).coef_.T, atol=1e-9)


def test_no_penalty_on_collinear_columns_is_the_least_norm_solution():
    X = np.random.default_rng(1).normal(size=(20, 3))
    X = np.column_stack([X, X[:, 0]])
    Y = X @ np.ones((4, 1))
    fit = ridge_map(X, Y, alpha=0.0, shift=False)
    np.testing.assert_allclose(fit.weights, np.linalg.pinv(X) @ Y, atol=1e-8)


def test_generalised_cross_validation_agrees_with_its_definition(rows):
    X, Y = rows
    A, B = X - X.mean(0), Y - Y.mean(0)
    unit = np.trace(A.T @ A) / 8

    def error(alpha):
        hat = A @ np.linalg.solve(A.T @ A + alpha * np.eye(8), A.T)
        return np.sum((B - hat @ B) ** 2) / (59 - np.trace(hat)) ** 2

    best = min((a * unit for a in ALPHAS), key=error)
    np.testing.assert_allclose(ridge_map(X, Y).alpha, best)


def test_noise_asks_for_a_larger_penalty_than_signal():
    rng = np.random.default_rng(2)
    X, W = rng.normal(size=(40, 30)), rng.normal(size=(30, 3))
    noisy = ridge_map(X, X @ W + 20 * rng.normal(size=(40, 3))).alpha
    assert noisy > ridge_map(X, X @ W).alpha
    strong = RidgeCV(np.array(ALPHAS) * np.trace(X.T @ X) / 30).fit(X, X @ W + 20 * rng.normal(size=(40, 3))).alpha_
    assert strong > ridge_map(X, X @ W).alpha


def test_refuses_what_it_cannot_do(rows):
    X, Y = rows
    with pytest.raises(ValueError, match="alpha must be non-negative"):
        ridge_map(X, Y, alpha=-1.0)
    with pytest.raises(ValueError, match="keep_cov_out"):
        ridge_from_moments(PairedMoments(8, 5, keep_cov_out=False).update(X, Y))
