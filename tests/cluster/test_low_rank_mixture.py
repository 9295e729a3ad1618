import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.cluster import (
    LowRankDenoiser,
    LowRankGaussianMixture,
    plot_low_rank,
    rank_profile,
    sample_sufficiency,
    subspace_errors,
)
from polyspan.cluster._low_rank_fit import Rules, expectation_maximisation, many_k_subspaces, one_hot, weighted_parts
from polyspan.cluster._low_rank_studies import mixture_profile, mixture_sufficiency
from polyspan.cluster.points_plots import plot_subspaces
from polyspan.data import planted_subspaces
from polyspan.errors import CorruptFile, WrongContent
from polyspan.linalg import clustering_accuracy, principal_angles
from polyspan.run import measure_peak

few = pytest.mark.filterwarnings("ignore:component .* has .* rows for")


@few
@pytest.mark.filterwarnings("ignore:the mean of X holds")
@parametrize_with_checks(
    [
        LowRankGaussianMixture(),
        LowRankGaussianMixture(2, rank=1, algorithm="ksubspaces", init="random"),
        LowRankGaussianMixture(2, algorithm="denoising", max_iter=5, n_init=2),
    ]
)
def test_sklearn_contract(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # five rounds of training settle nothing
        check(estimator)


def crossing(seed=0, *, n=400, d=12, noise=0.05):
    """Two subspaces of dimension 3 that cross at means which are not 0, one with weight 0.7."""
    rng = np.random.default_rng(seed)
    bases = np.linalg.qr(rng.normal(size=(2, d, 3)))[0]
    means, labels = rng.normal(size=(2, d)), (rng.random(n) < 0.3).astype(int)
    inside = rng.normal(size=(n, 3)) * [2.0, 1.5, 1.0]
    X = means[labels] + np.einsum("ndk,nk->nd", bases[labels], inside) + noise * rng.normal(size=(n, d))
    return X, labels, bases, means


def dense_parts(m):
    return [
        (m.means_[k], m.bases_[k] * m.spectra_[k] @ m.bases_[k].T + m.noise_variance_[k] * np.eye(m.n_features_in_))
        for k in range(len(m.weights_))
    ]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), algorithm=st.sampled_from(["em", "ksubspaces"]))
def test_planted_subspaces_are_found_with_their_numbers(seed, algorithm):
    X, labels, bases, means = crossing(seed, n=600)
    m = LowRankGaussianMixture(2, 3, algorithm=algorithm, init="random", random_state=0).fit(X)
    assert clustering_accuracy(labels, m.labels_) > 0.97
    assert subspace_errors(m.bases_, bases).max() < 0.05
    np.testing.assert_allclose(m.noise_variance_, 0.05**2, rtol=0.35)
    np.testing.assert_allclose(np.sort(m.weights_), np.sort(np.bincount(labels) / 600), atol=0.04)
    own = int(np.argmin(np.linalg.norm(m.bases_[0].T @ bases[0]) < np.linalg.norm(m.bases_[0].T @ bases[1])))
    # A mean is known up to its own subspace only in so far as the rows there tell.
    off = m.means_[0] - means[1 - own if np.linalg.norm(m.bases_[0].T @ bases[own]) < 1.5 else own]
    assert np.linalg.norm(off - m.bases_[0] @ (m.bases_[0].T @ off)) < 0.1


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), wide=st.booleans(), center=st.booleans())
def test_the_likelihood_never_falls(seed, wide, center):
    """Above 128 features subspaces are improved and not found anew: it must not fall there either."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(80, 300 if wide else 9)) * np.geomspace(3, 0.3, 300 if wide else 9)
    rules = Rules((2, 3), center, False, None, 1e-6)
    R, old, bounds = one_hot(rng.integers(2, size=80), 2), None, []
    for _ in range(8):
        found = expectation_maximisation(X, R, rules, max_iter=1, tol=1e-9, old=old)
        bounds.append(found.objective)
        R, old = found.memberships, found.parts
    assert np.diff(bounds).min() > -1e-8 * abs(bounds[0])


def test_one_component_is_principal_component_analysis_for_all_three_algorithms():
    X = crossing(3)[0]
    reference = PCA(4).fit(X)
    for algorithm in ("em", "ksubspaces", "denoising"):
        m = LowRankGaussianMixture(1, 4, algorithm=algorithm, random_state=0).fit(X)
        # Gradient steps end near the minimum, the others at it.
        off = subspace_angles(m.bases_[0], reference.components_.T).max()
        assert off < (0.08 if algorithm == "denoising" else 1e-6)
        if algorithm == "em":
            n = len(X)
            white = np.sum((X - reference.inverse_transform(reference.transform(X))) ** 2) / (n * 8)
            np.testing.assert_allclose(m.noise_variance_, white, rtol=1e-6)
            np.testing.assert_allclose(m.spectra_[0] + white, reference.explained_variance_ * (n - 1) / n, rtol=1e-6)
            exact = GaussianMixture(1, covariance_type="full", reg_covar=0).fit(X)
            assert m.score(X) < exact.score(X)
            full = LowRankGaussianMixture(1, 11, reg=1e-12).fit(X)
            assert full.score(X) == pytest.approx(exact.score(X), abs=1e-6)


def test_densities_are_those_of_dense_gaussians():
    X, *_ = crossing(1)
    m = LowRankGaussianMixture(2, (3, 2), random_state=0).fit(X)
    dense = [multivariate_normal(mean, cov).logpdf(X) for mean, cov in dense_parts(m)]
    joint = np.stack(dense, axis=1) + np.log(m.weights_)
    total = np.logaddexp(joint[:, 0], joint[:, 1])
    np.testing.assert_allclose(m.score_samples(X), total, rtol=1e-9, atol=1e-7)
    np.testing.assert_allclose(m.predict_proba(X), np.exp(joint - total[:, None]), atol=1e-9)
    np.testing.assert_array_equal(m.predict(X), joint.argmax(axis=1))
    np.testing.assert_array_equal(m.predict(X), m.labels_)
    n_free = (12 * 3 - 6) + (12 * 2 - 3) + 5 + 24 + 1 + 2
    assert m.n_parameters() == n_free
    assert m.bic(X) == pytest.approx(-2 * total.sum() + n_free * np.log(400))
    assert m.aic(X) == pytest.approx(-2 * total.sum() + 2 * n_free)
    assert m.lower_bound_ == pytest.approx(total.mean())


def test_an_em_round_is_the_slow_one_written_from_the_formulas():
    X, *_ = crossing(2, n=60)
    R = np.random.default_rng(0).dirichlet([1, 1], size=60)
    fast = weighted_parts(X, R, Rules((3, 3), True, False, None, 1e-9))
    for k in range(2):
        r = R[:, k]
        mean = np.average(X, axis=0, weights=r)
        S = sum(w * np.outer(x - mean, x - mean) for w, x in zip(r, X, strict=True)) / r.sum()
        values, vectors = np.linalg.eigh(S)
        white = values[:-3].mean()
        np.testing.assert_allclose(fast.means[k], mean, atol=1e-12)
        np.testing.assert_allclose(fast.residual[k], white, rtol=1e-10)
        np.testing.assert_allclose(fast.spectra[k], values[::-1][:3] - white, rtol=1e-9)
        P = vectors[:, -3:] @ vectors[:, -3:].T
        np.testing.assert_allclose(fast.bases[k] @ fast.bases[k].T, P, atol=1e-9)
        np.testing.assert_allclose(fast.weights[k], r.mean(), rtol=1e-12)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(40, 10), (12, 30), (40, 700)])
def test_batched_k_subspaces_ends_where_no_row_has_a_nearer_subspace(center, shape):
    rng = np.random.default_rng(0)
    X = rng.normal(size=shape)
    rules = Rules((2, 3), center, False, None, 1e-9)
    labels, share = many_k_subspaces(X, 6, rules, max_iter=200, rng=rng)
    for found, held in zip(labels, share, strict=True):
        left = np.zeros((len(X), 2))
        for k, d in enumerate((2, 3)):
            mine = X[found == k]
            mean = mine.mean(axis=0) if center and len(mine) else np.zeros(shape[1])
            U = np.linalg.svd(mine - mean, full_matrices=False)[2][:d].T
            left[:, k] = np.square(X - mean).sum(axis=1) - np.square((X - mean) @ U).sum(axis=1)
        np.testing.assert_array_equal(left.argmin(axis=1), found)
        assert 1 - left.min(axis=1).sum() / np.square(X).sum() == pytest.approx(held, abs=1e-9)


def test_the_fit_does_not_depend_on_where_the_origin_is_or_on_the_unit():
    X, *_ = crossing(4)
    plain = LowRankGaussianMixture(2, 3, random_state=0).fit(X)
    for moved in (X + 1e5, X * 1e-4, X * 2.0**30):
        m = LowRankGaussianMixture(2, 3, random_state=0).fit(moved)
        np.testing.assert_array_equal(m.labels_, plain.labels_)
        np.testing.assert_allclose(np.abs(np.sum(m.bases_ * plain.bases_, axis=1)), 1, atol=1e-5)


def test_float32_rows_give_the_fit_of_float64_and_float32_results():
    X, *_ = crossing(5)
    wide = LowRankGaussianMixture(2, 3, random_state=0).fit(X)
    narrow = LowRankGaussianMixture(2, 3, random_state=0).fit(X.astype(np.float32))
    np.testing.assert_array_equal(wide.labels_, narrow.labels_)
    np.testing.assert_allclose(wide.spectra_, narrow.spectra_, rtol=1e-4)
    for method in ("transform", "predict_proba", "denoise"):
        made = getattr(narrow, method)(X.astype(np.float32))
        assert made.dtype == np.float32
        np.testing.assert_allclose(made, getattr(wide, method)(X), atol=1e-3)


def test_samples_have_the_moments_of_the_mixture_and_their_own_labels():
    X, *_ = crossing(6)
    m = LowRankGaussianMixture(2, 3, random_state=0).fit(X)
    drawn, labels = m.sample(40_000)
    np.testing.assert_allclose(np.bincount(labels) / 40_000, m.weights_, atol=0.01)
    for k, (mean, cov) in enumerate(dense_parts(m)):
        np.testing.assert_allclose(drawn[labels == k].mean(axis=0), mean, atol=0.1)
        np.testing.assert_allclose(np.cov(drawn[labels == k].T, bias=True), cov, atol=0.15)
    assert np.mean(m.predict(drawn) == labels) > 0.98


def test_coordinates_put_a_row_back_into_its_own_subspace():
    X, *_ = crossing(7)
    m = LowRankGaussianMixture(2, (3, 2), random_state=0).fit(X)
    Z = m.transform(X)
    back = m.means_[m.labels_] + np.einsum("ndk,nk->nd", m.bases_[m.labels_], Z)
    off = np.square(X - back).sum(axis=1)
    assert np.mean(off) < 1.3 * np.mean(m.noise_variance_[m.labels_] * (12 - m.ranks_[m.labels_]))
    assert not Z[m.labels_ == 1, 2].any()


def test_denoising_beats_one_gaussian_and_equals_the_dense_posterior():
    X, *_ = crossing(8, noise=0.02)
    m = LowRankGaussianMixture(2, 3, random_state=0).fit(X)
    clean = crossing(8, n=800, noise=0.02)[0][400:]
    rng = np.random.default_rng(1)
    mean, cov = X.mean(axis=0), np.cov(X.T)
    for sigma in (0.1, 0.3, 1.0):
        noisy = clean + sigma * rng.normal(size=clean.shape)
        made = m.denoise(noisy, sigma)
        wiener = mean + (noisy - mean) @ np.linalg.solve(cov + sigma**2 * np.eye(12), cov)
        assert np.square(made - clean).sum() < 0.9 * np.square(wiener - clean).sum()
        np.testing.assert_allclose(made, dense_posterior(m, noisy, sigma), atol=1e-7)
    np.testing.assert_allclose(m.denoise(noisy[:5], np.full(5, 1.0)), made[:5], atol=1e-12)
    gaps = [np.square(part - projected(m, X)).max() for part in (m.denoise(X), X)]
    assert gaps[0] < 1e-10 < gaps[1]


def dense_posterior(m, X, sigma):
    eye = np.eye(X.shape[1])
    joint = [
        multivariate_normal(mean, cov + sigma**2 * eye).logpdf(X) + np.log(w)
        for w, (mean, cov) in zip(m.weights_, dense_parts(m), strict=True)
    ]
    w = np.exp(np.array(joint) - np.logaddexp(*joint))
    guesses = [mean + (X - mean) @ np.linalg.solve(cov + sigma**2 * eye, cov) for mean, cov in dense_parts(m)]
    return sum(wk[:, None] * guess for wk, guess in zip(w, guesses, strict=True))


def projected(m, X):
    """Return the posterior mean of the low-rank part, the white noise of a component being the noise, slowly."""
    out = np.zeros_like(X)
    for k, (mean, cov) in enumerate(dense_parts(m)):
        low = m.bases_[k] * m.spectra_[k] @ m.bases_[k].T
        out += m.predict_proba(X)[:, k : k + 1] * (mean + (X - mean) @ np.linalg.solve(cov, low))
    return out


def test_a_stream_of_batches_ends_near_the_fit_of_all_rows():
    X, labels, *_ = crossing(9, n=2000)
    m = LowRankGaussianMixture(2, 3, random_state=0)
    for rows in np.split(X, 8):
        m.partial_fit(rows)
    whole = LowRankGaussianMixture(2, 3, random_state=0).fit(X)
    assert clustering_accuracy(labels, m.predict(X)) > 0.97
    assert subspace_errors(m.bases_, whole.bases_).max() < 0.01
    np.testing.assert_allclose(np.sort(m.noise_variance_), np.sort(whole.noise_variance_), rtol=0.05)
    assert m.score(X) > whole.score(X) - 0.02
    np.testing.assert_allclose(m.samples_per_dimension_.sum() * 3, 2000)
    # A new fit begins anew.
    np.testing.assert_allclose(m.fit(X).means_, whole.means_)
    single = LowRankGaussianMixture(1, 3, random_state=0)
    for rows in np.split(X[:600], [200, 350, 351]):
        single.partial_fit(rows)
    reference = X[:600] - X[:600].mean(axis=0)
    np.testing.assert_allclose(single.means_[0], X[:600].mean(axis=0), atol=1e-12)
    total = single.spectra_.sum() + 12 * single.noise_variance_[0]
    assert total == pytest.approx(np.square(reference).sum() / 600, rel=1e-9)


def test_rank_is_chosen_by_energy_and_by_bic():
    X, *_ = crossing(10, noise=0.02)
    assert LowRankGaussianMixture(2, "bic", random_state=0).fit(X).ranks_.tolist() == [3, 3]
    flat = np.random.default_rng(0).normal(size=(300, 3)) @ np.random.default_rng(1).normal(size=(3, 20))
    assert LowRankGaussianMixture(1, "auto").fit(flat).ranks_[0] in (2, 3)
    assert LowRankGaussianMixture(1, "auto").fit(flat[:3]).ranks_[0] == 1


@pytest.mark.parametrize("init", ["kmeans", "random", "ssc"])
@pytest.mark.parametrize("algorithm", ["em", "ksubspaces"])
def test_every_start_serves_every_algorithm_and_a_seed_repeats(init, algorithm):
    world = planted_subspaces(0, n_per=60, d=20, k=3, n_subspaces=3, noise=0.02)
    options = {"algorithm": algorithm, "init": init, "center": False, "n_init": 10}
    m = LowRankGaussianMixture(3, 3, random_state=0, **options).fit(world.points)
    again = LowRankGaussianMixture(3, 3, random_state=0, **options).fit(world.points)
    np.testing.assert_array_equal(m.bases_, again.bases_)
    if init != "kmeans":  # which knows nothing of subspaces that cross at the origin
        assert clustering_accuracy(world.labels, m.labels_) > 0.97
    assert m.restarts_objective_.max() <= m.lower_bound_ + 1e-6
    assert not m.means_.any()


def test_training_by_the_diffusion_loss_finds_the_subspaces_of_k_subspaces():
    world = planted_subspaces(1, n_per=40, d=24, k=3, n_subspaces=2, noise=0.05)
    options = {"center": False, "init": "random", "random_state": 0}
    trained = LowRankGaussianMixture(2, 3, algorithm="denoising", n_init=8, **options).fit(world.points)
    twin = LowRankGaussianMixture(2, 3, algorithm="ksubspaces", **options).fit(world.points)
    assert subspace_errors(trained.bases_, twin.bases_).max() < 0.06
    assert subspace_errors(trained.bases_, np.stack(world.bases)).max() < 0.2
    assert len(trained.loss_curve_) == 600
    assert trained.loss_curve_[-60:].mean() == pytest.approx(-trained.lower_bound_)
    assert trained.converged_
    with pytest.warns(ConvergenceWarning, match="denoising did not settle in max_iter=10"):
        LowRankGaussianMixture(2, 3, algorithm="denoising", n_init=1, max_iter=10, **options).fit(world.points)


def test_spectrum_noise_and_ranks_are_kept_to():
    X, *_ = crossing(11)
    for algorithm in ("em", "ksubspaces", "denoising"):
        options = {"algorithm": algorithm, "spectrum": "identity", "noise": 0.1, "n_init": 3, "random_state": 0}
        m = LowRankGaussianMixture(2, (3, 2), **options).fit(X)
        np.testing.assert_allclose(m.noise_variance_, 0.01)
        np.testing.assert_allclose(m.spectra_[0], m.spectra_[0, 0])
        np.testing.assert_allclose(m.spectra_[1], [m.spectra_[0, 0]] * 2 + [0.0])
        assert not m.bases_[1, :, 2].any()
        assert not m.at_floor_.any()


def test_the_sample_says_how_many_rows_a_dimension_needs():
    world = planted_subspaces(0, n_per=150, d=24, k=4, n_subspaces=2)
    found = sample_sufficiency(world.points, 4, 2, sizes=[8, 24, 80], n_repeats=3, center=False, random_state=0)
    np.testing.assert_allclose(found.per_dimension, [1, 3, 10])
    assert found.agreement[0] < 0.6
    assert found.agreement[2] > 0.99
    assert found.chance < 0.2
    noise = np.random.default_rng(0).normal(size=(300, 24))
    assert sample_sufficiency(noise, 4, 2, sizes=[80], n_repeats=2, random_state=0).agreement[0] < 0.5
    again = sample_sufficiency(world.points, 4, 2, sizes=[8, 24, 80], n_repeats=3, center=False, random_state=0)
    np.testing.assert_array_equal(found.trials, again.trials)
    default = sample_sufficiency(world.points, 4, 1, n_repeats=1, random_state=0)
    assert default.rows[0] == 4
    assert default.rows[-1] == 150


def test_subspace_errors_are_matched_and_scaled():
    bases = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 20, 2)))[0]
    np.testing.assert_allclose(subspace_errors(bases[[2, 0, 1]], bases), 0, atol=1e-9)
    eye = np.eye(6)
    np.testing.assert_allclose(subspace_errors([eye[:, :2]], [eye[:, 2:4]]), 1)
    with pytest.raises(ValueError, match=r"one shape \(K, D, d\), got \(3, 20, 2\) and \(2, 20, 2\)"):
        subspace_errors(bases, bases[:2])


def test_a_saved_mixture_comes_back_whole(tmp_path):
    X, *_ = crossing(12)
    m = LowRankGaussianMixture(2, (3, 2), random_state=0, algorithm="ksubspaces").fit(X)
    back = LowRankGaussianMixture.load(m.save(tmp_path / "m.safetensors"))
    assert back.get_params() == m.get_params() | {"rank": [3, 2]}
    np.testing.assert_array_equal(back.predict(X), m.labels_)
    np.testing.assert_array_equal(back.score_samples(X), m.score_samples(X))
    np.testing.assert_array_equal(back.denoise(X, 0.3), m.denoise(X, 0.3))
    blob = bytearray((tmp_path / "m.safetensors").read_bytes())
    blob[-3] ^= 1
    (tmp_path / "torn.safetensors").write_bytes(blob)
    with pytest.raises(CorruptFile):
        LowRankGaussianMixture.load(tmp_path / "torn.safetensors")
    from polyspan.align import OrthogonalMap

    OrthogonalMap().fit(X, X).save(tmp_path / "other.safetensors")
    with pytest.raises(WrongContent):
        LowRankGaussianMixture.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "n_components must be a whole number of at least 1, got 0"),
        ({"n_components": 41}, "n_components must be at most n_samples=40, got 41"),
        ({"rank": 6}, "rank must be between 1 and n_features - 1 = 5, got 6"),
        ({"rank": 0}, "rank must be between 1 and n_features - 1 = 5, got 0"),
        ({"rank": (2, 2, 2)}, "rank must have one number for each of 2 components, got 3"),
        ({"rank": "aic"}, "rank must be whole numbers, 'auto' or 'bic', got 'aic'"),
        ({"algorithm": "vb"}, "algorithm must be one of em, ksubspaces, denoising, got 'vb'"),
        ({"init": "pca"}, "init must be one of kmeans, random, ssc, got 'pca'"),
        ({"spectrum": "flat"}, "spectrum must be one of free, identity, got 'flat'"),
        ({"noise": 0.0}, "noise must be 'isotropic' or a standard deviation above 0, got 0.0"),
        ({"noise": "white"}, "noise must be 'isotropic' or a standard deviation above 0, got 'white'"),
        ({"n_init": 0}, "n_init must be a whole number of at least 1, got 0"),
        ({"max_iter": 1.5}, "max_iter must be a whole number of at least 1, got 1.5"),
        ({"tol": -1}, "tol must be above 0 and finite, got -1"),
        ({"reg": 0}, "reg must be above 0 and finite, got 0"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    X = np.random.default_rng(0).normal(size=(40, 6))
    with pytest.raises(ValueError, match=re.escape(message)):
        LowRankGaussianMixture(**{"n_components": 2, "rank": 2} | options).fit(X)


def test_a_component_with_too_few_rows_is_named():
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(60, 8)), 50 + rng.normal(size=(4, 8))])
    with pytest.raises(
        ValueError, match=r"rank must be below the rows of every component, got 5 for component \d with 4"
    ):
        LowRankGaussianMixture(2, 5, random_state=0).fit(X)
    with pytest.warns(UserWarning, match=r"component \d has 4 rows for 5 dimensions: a subspace cannot be found"):
        LowRankGaussianMixture(2, 5, algorithm="ksubspaces", random_state=0).fit(X)
    with pytest.warns(UserWarning, match=r"component \d has 4 rows for 3 dimensions"):
        m = LowRankGaussianMixture(2, 3, random_state=0).fit(X)
    np.testing.assert_allclose(np.sort(m.samples_per_dimension_), [4 / 3, 20])


def test_a_mean_that_would_be_the_first_direction_is_warned_of():
    X = np.random.default_rng(0).normal(size=(100, 6)) + 3
    with pytest.warns(UserWarning, match=r"the mean of X holds 9\d% of its squares and will be the first direction"):
        m = LowRankGaussianMixture(1, 2, center=False).fit(X)
    assert np.abs(m.bases_[0, :, 0] @ np.ones(6)) / np.sqrt(6) > 0.99


def test_columns_that_are_constant_leave_the_floor_as_noise_and_it_is_said():
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(80, 3)), np.full((80, 5), 7.0)], axis=1)
    m = LowRankGaussianMixture(1, 3).fit(X)
    assert m.at_floor_.all()
    spread = np.square(X - X.mean(axis=0)).sum() / 80 / 8
    np.testing.assert_allclose(m.noise_variance_, 1e-3 * spread)
    assert np.isfinite(m.score_samples(X)).all()


@pytest.mark.filterwarnings("ignore:denoising did not settle")
@pytest.mark.parametrize("algorithm", ["em", "ksubspaces", "denoising"])
def test_rows_that_are_equal_or_repeated_do_no_harm(algorithm):
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(30, 6)) * [3, 2, 1, 0.2, 0.2, 0.2], 4, axis=0)
    once = LowRankGaussianMixture(1, 2, algorithm=algorithm, random_state=0)
    assert subspace_errors(once.fit(X).bases_, once.fit(X[::4]).bases_).max() < 0.05
    with pytest.warns(UserWarning, match="component 1 has 0 rows for 2 dimensions"):
        flat = LowRankGaussianMixture(2, 2, algorithm="ksubspaces", random_state=0).fit(np.ones((20, 6)))
    assert np.isfinite(flat.score_samples(np.ones((2, 6)))).all()


def test_a_component_that_lost_all_rows_is_given_the_worst_fitting_ones():
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(60, 2)) @ rng.normal(size=(2, 8)) for _ in range(2)])
    R = np.zeros((120, 2))
    R[:, 0] = 1
    found = expectation_maximisation(X, R, Rules((2, 2), True, False, None, 1e-6), max_iter=60, tol=1e-6)
    assert found.reseeded >= 1
    assert found.memberships.sum(axis=0).min() > 20


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_values_that_squares_cannot_hold_are_refused(bad):
    X = np.random.default_rng(0).normal(size=(40, 6))
    X[3, 2] = bad
    with pytest.raises(ValueError, match=r"(contains (NaN|infinity)|squares that floats)"):
        LowRankGaussianMixture(2, 2).fit(X)


@pytest.mark.parametrize("algorithm", ["em", "ksubspaces"])
def test_rows_have_finite_densities_or_are_refused_by_name(algorithm):
    X, *_ = crossing(12)
    m = LowRankGaussianMixture(2, (3, 2), random_state=0, algorithm=algorithm).fit(X)
    stream = LowRankGaussianMixture(2, (3, 2), random_state=0, algorithm=algorithm).partial_fit(X)
    calls = (m.predict, m.predict_proba, m.score_samples, m.score, m.transform, m.denoise, stream.partial_fit)
    for scale in (1e155, 1e200, 1e300, -1e300):
        far = X[:6].copy()
        far[4] *= scale
        for call in calls:
            with pytest.raises(ValueError, match=r"X must lie within ±.*got a value of size .*e\+\d+ at row 4"):
                call(far)
    large = X[:6] * 1e100
    np.testing.assert_allclose(m.predict_proba(large).sum(axis=1), 1)
    assert np.isfinite(m.score_samples(large)).all()
    # As far as is let in, all is finite.
    with pytest.raises(ValueError, match="X must lie") as told:
        m.predict(far)
    room = 0.99 * float(re.search(r"±(\S+),", str(told.value)).group(1))
    edge = X[:6] / np.abs(X[:6]).max() * room
    assert np.isfinite(m.score_samples(edge)).all()
    assert np.isfinite(m.predict_proba(edge)).all()
    assert np.isfinite(m.denoise(edge)).all()


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (0.0, "sigma must be above 0 and finite, got 0"),
        (-1, "sigma must be above 0 and finite, got -1"),
        (np.nan, "sigma must be above 0 and finite, got nan"),
        (np.ones(3), r"sigma must be a number or one for each of 400 rows, got shape \(3,\)"),
        (np.ones((400, 1)), r"sigma must be a number or one for each of 400 rows, got shape \(400, 1\)"),
    ],
)
def test_noise_levels_that_make_no_sense_are_refused(sigma, message):
    X, *_ = crossing(0)
    with pytest.raises(ValueError, match=message):
        LowRankGaussianMixture(2, 3, n_init=1, random_state=0).fit(X).denoise(X, sigma)


def test_other_bad_calls_say_what_is_wrong():
    X, *_ = crossing(0, n=50)
    m = LowRankGaussianMixture(1, 3).fit(X)
    with pytest.raises(ValueError, match="n_samples must be a whole number of at least 1, got 0"):
        m.sample(0)
    with pytest.raises(ValueError, match="expecting 12 features"):
        m.denoise(X[:, :5])
    for options, message in (
        ({"rank": 12}, "rank must be between 1 and n_features - 1 = 11, got 12"),
        ({"rank": 3, "sizes": [26]}, "sizes must lie between 2 and half of the rows, 25, got"),
        ({"rank": 3, "sizes": []}, "sizes must lie between"),
        ({"rank": 3, "n_repeats": 0}, "n_components and n_repeats must be at least 1, got 1 and 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            sample_sufficiency(X, **options)


@pytest.mark.filterwarnings("ignore:denoising did not settle")
def test_no_global_chance_is_used():
    X, *_ = crossing(0, n=60)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002 - it must stay as it is
    for algorithm in ("em", "ksubspaces", "denoising"):
        LowRankGaussianMixture(2, 2, algorithm=algorithm, n_init=2, max_iter=40, random_state=0).fit(X).sample(3)
    np.testing.assert_array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())


def test_memory_does_not_grow_with_the_rows(tmp_path):
    rows = np.lib.format.open_memmap(tmp_path / "rows.npy", mode="w+", dtype=np.float32, shape=(120_000, 128))
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(4, 128)).astype(np.float32)
    for start in range(0, len(rows), 20_000):
        rows[start : start + 20_000] = rng.standard_normal((20_000, 4), dtype=np.float32) @ mix
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    peak = measure_peak(lambda: LowRankGaussianMixture(2, 3, n_init=1, max_iter=2, tol=1.0).fit(mapped)).peak_bytes
    assert peak < 2**27, f"{peak / 2**20:.0f} MiB for 59 MiB of float32"


def test_pictures_are_the_same_bytes_for_the_same_numbers(tmp_path):
    world = planted_subspaces(0, n_per=40, d=12, k=2, n_subspaces=2, noise=0.05)
    m = LowRankGaussianMixture(2, 2, random_state=0, n_init=2).fit(world.points)
    halves = sample_sufficiency(world.points, 2, 2, sizes=[8, 40], n_repeats=2, random_state=0)
    profile = rank_profile(LowRankDenoiser.from_mixture(m).double(), [2.0, 0.1], 2, shape=(12,), dtype=torch.float64)
    both = [
        plot_low_rank(tmp_path / name, mixture=m, profile=profile, sufficiency=halves) for name in ("a.svg", "b.svg")
    ]
    assert both[0].read_bytes() == both[1].read_bytes()
    text = both[0].read_text()
    assert text.count("<!-- Least mean rank 2.0 -->") == 1
    assert "<!-- Agreement of two halves -->" in text
    assert plot_low_rank(tmp_path / "c.png", mixture=m).stat().st_size > 5000
    with pytest.raises(ValueError, match=r"path must end in .svg, .png or .pdf, got .*a.jpg"):
        plot_low_rank(tmp_path / "a.jpg", mixture=m)
    with pytest.raises(ValueError, match="one of mixture, profile and sufficiency must be given, got none"):
        plot_low_rank(tmp_path / "a.svg")


def test_the_picture_of_clusters_shows_ranks_along_the_noise_and_agreement_of_halves(tmp_path):
    world = planted_subspaces(0, n_per=60, d=12, k=2, n_subspaces=2, noise=0.01)
    m = LowRankGaussianMixture(2, 2, random_state=0, n_init=2, center=False).fit(world.points)
    profile = mixture_profile(m)
    assert profile.intrinsic_dimension == 2
    assert (profile.ranks[:, -1] == 2).all()
    halves = mixture_sufficiency(m, world.points)
    # Halves of all rows, fitted as the mixture was: each finds the planted subspaces.
    assert halves.rows[-1] == 60
    assert halves.agreement[-1] > 0.9 > halves.chance
    assert mixture_sufficiency(m, world.points[:10]) is None
    # Warnings are errors here: the mean, of which the fit has warned, is not told again at every half.
    mixture_sufficiency(m, world.points + 1)
    path = plot_subspaces(world.points, m.labels_, list(m.bases_), tmp_path / "a.svg", fitted=m)
    assert "<!-- Least mean rank 2.0 -->" in path.read_text()
    assert "<!-- Agreement of two halves -->" in path.read_text()
    few_rows = plot_subspaces(world.points[:10], m.labels_[:10], list(m.bases_), tmp_path / "b.svg", fitted=m)
    assert "<!-- Agreement of two halves -->" not in few_rows.read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bases": np.ones((2, 5))}, r"bases must have shape \(K, D, d\), got \(2, 5\)"),
        ({"bases": 2 * np.eye(5)[None, :, :2].repeat(2, axis=0)}, "bases must have orthonormal columns"),
        ({"spectra": np.ones((1, 2))}, r"spectra must have shape \(2, 2\), got \(1, 2\)"),
        ({"spectra": -np.ones((2, 2))}, "spectra must be at least 0, got -1"),
        ({"means": np.full((2, 5), np.nan)}, "means must be finite"),
        ({"weights": np.ones(2)}, "weights must add up to 1, got 2"),
        ({"noise_variance": np.array([0.1, -0.1])}, "noise_variance must be at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_components_that_make_no_density_are_refused(change, told):
    given = {
        "bases": np.eye(5)[None, :, :2].repeat(2, axis=0),
        "spectra": np.ones((2, 2)),
        "means": np.zeros((2, 5)),
        "weights": np.full(2, 0.5),
        "noise_variance": np.full(2, 0.1),
    }
    assert np.isfinite(LowRankGaussianMixture.from_parts(**given).score(np.ones((3, 5))))
    with pytest.raises(ValueError, match=told):
        LowRankGaussianMixture.from_parts(**(given | change))


def test_a_file_of_components_that_fit_nothing_is_wrong_content(tmp_path):
    rows = planted_subspaces(0, n_per=20, d=6, k=2, n_subspaces=2, noise=0.1).points
    fitted = LowRankGaussianMixture(2, 2, n_init=1, random_state=0).fit(rows)
    fitted.weights_ = fitted.weights_ * 3
    with pytest.raises(WrongContent, match="weights must add up to 1"):
        LowRankGaussianMixture.load(fitted.save(tmp_path / "mixture.safetensors"))


def test_rows_whose_squares_vanish_and_points_in_time_are_named():
    rows = planted_subspaces(0, n_per=20, d=6, k=2, n_subspaces=2, noise=0.1).points
    with pytest.raises(ValueError, match="values so small that they vanish"):
        LowRankGaussianMixture(2, 2, random_state=0).fit(1e-200 * rows)
    with pytest.raises(ValueError, match=r"X must hold numbers, got datetime64\[s\]"):
        LowRankGaussianMixture(2, 1, random_state=0).fit(np.arange(60).reshape(20, 3).astype("datetime64[s]"))


@pytest.mark.parametrize("center", [True, False])
def test_components_by_whole_matrices_are_those_by_thin_products(center, monkeypatch):
    rng = np.random.default_rng(0)
    X, R = rng.normal(size=(700, 160)) * np.geomspace(5, 0.1, 160), rng.dirichlet(np.ones(3), size=700)
    R[:100] = [1, 0, 0]
    rules = Rules((12, 12, 7), center, False, None, 1e-6)
    whole = weighted_parts(X, R, rules)
    again = weighted_parts(X, R, rules, whole)
    monkeypatch.setattr("polyspan.cluster._low_rank_fit.GRAM_SIDE", 0)
    for one, two in ((whole, weighted_parts(X, R, rules)), (again, weighted_parts(X, R, rules, whole))):
        for name in ("spectra", "means", "weights", "residual"):
            np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-9, atol=1e-12)
        for c, rank in enumerate(rules.ranks):
            assert principal_angles(one.bases[c][:, :rank], two.bases[c][:, :rank]).max() < 1e-6


def test_labels_of_a_fit_that_settled_are_those_of_predict():
    world = planted_subspaces(3, n_per=60, d=10, k=3, n_subspaces=3, noise=0.3)
    for algorithm in ("em", "ksubspaces"):
        fitted = LowRankGaussianMixture(3, 3, algorithm=algorithm, random_state=0).fit(world.points)
        assert fitted.converged_
        np.testing.assert_array_equal(fitted.labels_, fitted.predict(world.points))
