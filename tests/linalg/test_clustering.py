from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group
from sklearn.cluster._spectral import cluster_qr

from polyspan.linalg import align_labels, clustering_accuracy, discretize_embedding

METHODS = ["snem", "kmeans", "cluster_qr"]


def noisy_indicator(seed, n=60, k=4, noise=0.02):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    C = np.eye(k)[labels] / np.sqrt(np.bincount(labels))
    Y = np.linalg.qr(C + noise * rng.normal(size=(n, k)))[0] @ ortho_group.rvs(k, random_state=seed % 2**32)
    return Y, labels


@pytest.mark.parametrize("method", METHODS)
@given(k=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_finds_planted_groups_under_any_rotation(method, k, seed):
    Y, labels = noisy_indicator(seed, k=k)
    found = discretize_embedding(Y, method=method, rng=np.random.default_rng(seed))
    assert clustering_accuracy(labels, found.labels) == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_signs_and_rotations_of_the_columns_do_not_matter_at_one_seed(method):
    rng = np.random.default_rng(0)
    Y = np.linalg.qr(rng.normal(size=(200, 5)) * [1, 2, 1, 0.5, 1] + rng.integers(0, 3, (200, 1)))[0]
    plain = discretize_embedding(Y, method=method, rng=np.random.default_rng(7))
    for seed in range(3):
        turned = Y @ ortho_group.rvs(5, random_state=seed)
        again = discretize_embedding(turned, method=method, rng=np.random.default_rng(7))
        np.testing.assert_allclose(again.objectives, plain.objectives, rtol=1e-9)
        assert clustering_accuracy(plain.labels, again.labels) == 1.0


def test_objective_is_the_trace_and_the_best_start_is_returned():
    Y = np.linalg.qr(np.random.default_rng(1).normal(size=(80, 6)))[0]
    labels, objectives = discretize_embedding(Y, n_init=8, rng=np.random.default_rng(2))
    C = np.eye(6)[labels]
    C = C / np.sqrt(np.maximum(C.sum(axis=0), 1))
    assert len(objectives) == 8
    assert objectives.max() == pytest.approx(np.trace(C.T @ Y @ Y.T @ C), rel=1e-10)
    kmeans_cost = sum(((Y[labels == c] - Y[labels == c].mean(axis=0)) ** 2).sum() for c in np.unique(labels))
    assert objectives.max() == pytest.approx((Y**2).sum() - kmeans_cost, rel=1e-10)


def test_pivoted_rounding_agrees_with_scikit_learn():
    Y, _ = noisy_indicator(5, noise=0.2)
    np.testing.assert_array_equal(discretize_embedding(Y, method="cluster_qr").labels, cluster_qr(Y))


def test_accuracy_agrees_with_trying_all_matchings():
    rng = np.random.default_rng(3)
    true, pred = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
    best = max(np.mean(np.array(names)[pred] == true) for names in permutations(range(4)))
    assert clustering_accuracy(true, pred) == best
    assert np.mean(align_labels(true, pred) == true) == best


def test_names_of_clusters_do_not_matter_and_need_not_be_numbers():
    true = np.array(["x", "x", "y", "y"])
    assert clustering_accuracy(true, [9, 9, 2, 2]) == 1.0
    np.testing.assert_array_equal(align_labels(true, [9, 9, 2, 2]), true)


def test_spare_clusters_are_errors_and_get_new_numbers():
    true, pred = np.array([0, 0, 0, 1, 1]), np.array([5, 5, 6, 7, 7])
    assert clustering_accuracy(true, pred) == 0.8
    np.testing.assert_array_equal(align_labels(true, pred), [0, 0, 2, 1, 1])
    assert clustering_accuracy(pred, true) == 0.8
    with pytest.raises(ValueError, match="true must have integer classes"):
        align_labels(np.array(list("aaabb")), pred)


@pytest.mark.parametrize("method", METHODS)
def test_equal_rows_and_zero_rows_do_not_break_any_method(method):
    Y = np.zeros((12, 3))
    Y[:4, 0] = Y[4:8, 1] = Y[8:11, 2] = 0.5
    found = discretize_embedding(Y, method=method, rng=np.random.default_rng(0))
    assert clustering_accuracy(np.repeat([0, 1, 2], [4, 4, 3]), found.labels[:11]) == 1.0


def test_one_cluster_holds_everything():
    labels, _ = discretize_embedding(np.full((5, 1), -(5**-0.5)), rng=np.random.default_rng(0))
    assert set(labels) == {0}


def test_wrong_arguments_are_named():
    rng, Y = np.random.default_rng(0), np.eye(5)[:, :2]
    with pytest.raises(ValueError, match="method must be"):
        discretize_embedding(Y, method="magic", rng=rng)
    with pytest.raises(ValueError, match="got 2 columns for 3 clusters"):
        discretize_embedding(Y, n_clusters=3, rng=rng)
    with pytest.raises(ValueError, match="n_clusters must be between 1 and the number of rows 5, got 6"):
        discretize_embedding(Y, method="kmeans", n_clusters=6, rng=rng)
    with pytest.raises(ValueError, match="rng must be a Generator"):
        discretize_embedding(Y)
    with pytest.raises(ValueError, match="Y must be finite"):
        discretize_embedding(np.full((3, 2), np.nan), rng=rng)
    with pytest.raises(ValueError, match="n_init must be at least 1, got 0"):
        discretize_embedding(Y, n_init=0, rng=rng)
    with pytest.raises(ValueError, match="Y must be a matrix"):
        discretize_embedding(Y[:, :0], rng=rng)
    with pytest.raises(ValueError, match="equally long and not empty"):
        clustering_accuracy([0, 1], [0])
