import pickle
from functools import partial

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import ElasticNet, Lasso, OrthogonalMatchingPursuit
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.cluster import (
    ElasticNetSubspaceClustering,
    LeastSquaresSubspaceClustering,
    OMPSubspaceClustering,
    SelfExpressiveClustering,
    ThresholdingSubspaceClustering,
)
from polyspan.cluster._affinity import find_copies
from polyspan.data import planted_subspaces
from polyspan.errors import CorruptFile, WrongContent
from polyspan.io import load_fitted, save_fitted
from polyspan.linalg import clustering_accuracy, principal_angles
from polyspan.run import measure_peak

pieces = pytest.mark.filterwarnings("ignore:the affinity falls into")
METHODS = [
    ElasticNetSubspaceClustering,
    OMPSubspaceClustering,
    LeastSquaresSubspaceClustering,
    ThresholdingSubspaceClustering,
]


def make(cls, k=3, **options):
    """Pursuit that goes on after a subspace of three dimensions is used up fits the noise, and links to anyone."""
    return cls(k, random_state=0, **({"n_nonzero": 3} if cls is OMPSubspaceClustering else {}), **options)


# Some checks give tables of two features, where every point lies in every subspace of two dimensions.
@pytest.mark.filterwarnings(
    "ignore:the affinity falls into", "ignore:only .* clusters have a row", "ignore:X has .* all-zero rows"
)
@parametrize_with_checks(
    [
        ElasticNetSubspaceClustering(),
        OMPSubspaceClustering(),
        LeastSquaresSubspaceClustering(),
        LeastSquaresSubspaceClustering(power=2, zero_diagonal=False),
        LeastSquaresSubspaceClustering(n_kept=5),
        ThresholdingSubspaceClustering(rounding="snem"),
    ],
    expected_failed_checks=lambda estimator: (
        {"check_clustering": "any two points of a plane express any other; pursuit prefers none"}
        if isinstance(estimator, OMPSubspaceClustering)
        else {}
    ),
)
def test_sklearn_contract(estimator, check):
    check(estimator)


def unit(X):
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def off_subspace_share(C, labels):
    C = np.abs(C.toarray())
    return (C * (labels[:, None] != labels)).sum() / C.sum()


@pieces
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(2, 4), cls=st.sampled_from(METHODS[:3]))
@settings(max_examples=16, deadline=None)
def test_independent_subspaces_are_found_exactly(seed, k, cls):
    world = planted_subspaces(seed, n_per=40, d=30, k=3, n_subspaces=k)
    fitted = make(cls, k, subspace_dim=3).fit(world.points)
    assert clustering_accuracy(world.labels, fitted.labels_) == 1.0
    for c in range(k):
        true = world.bases[np.bincount(world.labels[fitted.labels_ == c]).argmax()]
        assert principal_angles(true, fitted.bases_[c]).max() < 1e-6
    np.testing.assert_array_equal(fitted.predict(world.points), fitted.labels_)
    if cls in (ElasticNetSubspaceClustering, OMPSubspaceClustering):
        assert off_subspace_share(fitted.representation_, world.labels) < 1e-6


@pieces
@pytest.mark.parametrize("seed", range(6))
def test_thresholding_finds_most_of_independent_subspaces(seed):
    """It has no guarantee at 40 points of random subspaces: about one world in 300 is lost."""
    world = planted_subspaces(seed, n_per=40, d=30, k=3, n_subspaces=4)
    fitted = make(ThresholdingSubspaceClustering, 4, subspace_dim=3).fit(world.points)
    assert clustering_accuracy(world.labels, fitted.labels_) > 0.9


@pieces
@pytest.mark.parametrize("cls", METHODS)
def test_a_permutation_of_the_rows_permutes_the_answer(cls):
    world = planted_subspaces(1, n_per=40, d=20, k=3, n_subspaces=3, noise=0.02)
    order = np.random.default_rng(0).permutation(120)
    plain = make(cls).fit(world.points)
    moved = make(cls).fit(world.points[order])
    assert clustering_accuracy(plain.labels_[order], moved.labels_) == 1.0
    everywhere = np.arange(120)
    np.testing.assert_allclose(moved.affinity_block(everywhere), plain.affinity_block(order), atol=1e-9)


@pieces
@pytest.mark.parametrize("cls", METHODS)
def test_labels_cannot_reach_the_method_and_lengths_and_signs_do_not_matter(cls):
    world = planted_subspaces(2, n_per=30, d=20, k=3, n_subspaces=3, noise=0.05)
    plain = make(cls).fit(world.points)
    told = make(cls).fit(world.points, world.labels)
    np.testing.assert_array_equal(plain.labels_, told.labels_)
    rng = np.random.default_rng(0)
    turned = world.points * (rng.choice([-1, 1], 90) * np.exp(rng.normal(size=90)))[:, None]
    other = make(cls).fit(turned)
    np.testing.assert_allclose(plain.affinity_block(np.arange(90)), other.affinity_block(np.arange(90)), atol=1e-9)


@pieces
@pytest.mark.parametrize("cls", METHODS)
def test_the_same_seed_gives_the_same_bits_and_no_global_state_is_touched(cls):
    world = planted_subspaces(3, n_per=30, d=20, k=3, n_subspaces=3, noise=0.1)
    np.random.seed(5)  # noqa: NPY002 - to see that it is left alone
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    one, two = (cls(3, random_state=4).fit(world.points) for _ in range(2))
    np.testing.assert_array_equal(one.embedding_, two.embedding_)
    np.testing.assert_array_equal(one.labels_, two.labels_)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def noisy(seed=0, n_per=20, d=12):
    return planted_subspaces(seed, n_per=n_per, d=d, k=3, n_subspaces=3, noise=0.1)


@pieces
@pytest.mark.parametrize(
    ("tau", "gamma", "n_active"), [(0.9, 50.0, 100), (0.5, 20.0, 4), (1.0, 30.0, 7), (0.7, 3.0, 1)]
)
def test_elastic_net_is_the_optimum_that_scikit_learn_finds_on_each_row(tau, gamma, n_active):
    X = unit(noisy().points)
    fitted = ElasticNetSubspaceClustering(3, tau=tau, gamma=gamma, n_active=n_active, random_state=0).fit(X)
    C = fitted.representation_.toarray()
    assert not C.diagonal().any()
    for i in range(0, 60, 4):
        others = np.delete(X, i, axis=0)
        weight = np.abs(others @ X[i]).max() / (gamma * tau)
        options = {"alpha": weight / 12, "fit_intercept": False, "tol": 1e-13, "max_iter": 10**6}
        peer = Lasso(**options) if tau == 1 else ElasticNet(l1_ratio=tau, **options)
        np.testing.assert_allclose(np.delete(C[i], i), peer.fit(others.T, X[i]).coef_, atol=1e-6)


@pieces
def test_elastic_net_meets_the_conditions_of_its_optimum_to_rounding():
    X = unit(noisy(1, n_per=60).points)
    fitted = ElasticNetSubspaceClustering(3, tau=0.9, gamma=50.0, n_active=10, random_state=0).fit(X)
    C, G = fitted.representation_.toarray(), X @ X.T
    gamma = 50.0 * 0.9 / np.max(np.abs(G - np.diag(np.diag(G))), axis=1)
    pull = gamma[:, None] * (G - C @ G) - 0.1 * C
    on = C != 0
    np.testing.assert_allclose(pull[on], 0.9 * np.sign(C[on]), atol=1e-8)
    off = ~on & ~np.eye(180, dtype=bool)
    assert np.abs(pull[off]).max() <= 0.9 + 1e-6
    assert fitted.n_iter_ > 1


@pytest.mark.filterwarnings("ignore:the affinity falls into")
def test_elastic_net_says_where_it_was_not_done():
    with pytest.warns(UserWarning, match="points were not optimal after max_rounds=1; raise it"):
        ElasticNetSubspaceClustering(3, n_active=2, max_rounds=1, random_state=0).fit(noisy().points)


@pieces
@pytest.mark.parametrize("n_nonzero", [1, 2, 5])
def test_matching_pursuit_is_that_of_scikit_learn_on_each_row(n_nonzero):
    X = unit(noisy(2).points)
    C = OMPSubspaceClustering(3, n_nonzero=n_nonzero, random_state=0).fit(X).representation_.toarray()
    for i in range(60):
        peer = OrthogonalMatchingPursuit(n_nonzero_coefs=n_nonzero, fit_intercept=False)
        np.testing.assert_allclose(np.delete(C[i], i), peer.fit(np.delete(X, i, axis=0).T, X[i]).coef_, atol=1e-9)


@pieces
def test_matching_pursuit_ends_where_the_residual_is_small_and_takes_rows_of_any_length():
    world = planted_subspaces(4, n_per=20, d=12, k=3, n_subspaces=2)
    fitted = OMPSubspaceClustering(2, n_nonzero=10, random_state=0).fit(world.points)
    assert fitted.n_iter_ == 3
    assert np.diff(fitted.representation_.indptr).max() == 3
    scale = np.exp(np.random.default_rng(0).normal(size=40))[:, None]
    raw = OMPSubspaceClustering(2, n_nonzero=10, normalize=False, random_state=0).fit(scale * world.points)
    np.testing.assert_allclose(raw.representation_ @ (scale * world.points), scale * world.points, atol=1e-9)


def literal_ridge(X, alpha, zero_diagonal):
    n = len(X)
    if not zero_diagonal:
        return X @ np.linalg.inv(X.T @ X + alpha * np.eye(X.shape[1])) @ X.T
    D = np.linalg.inv(X @ X.T + alpha * np.eye(n))
    C = -np.diag(1 / np.diag(D)) @ D
    return C - np.diag(np.diag(C))


@pytest.mark.parametrize("zero_diagonal", [True, False])
@pytest.mark.parametrize("d", [12, 90])
def test_least_squares_is_the_published_formula_in_every_form(zero_diagonal, d):
    X = unit(noisy(3, d=d).points)
    C = literal_ridge(X, 0.1, zero_diagonal)
    options = {"zero_diagonal": zero_diagonal, "random_state": 0}
    dense = LeastSquaresSubspaceClustering(3, **options).fit(X)
    np.testing.assert_allclose(dense.representation_, C, atol=1e-10)
    W = (np.abs(C) + np.abs(C.T)) / 2
    np.testing.assert_allclose(dense.affinity_, W, atol=1e-10)
    squared = LeastSquaresSubspaceClustering(3, power=2, **options).fit(X)
    V = np.random.default_rng(0).normal(size=(60, 2))
    np.testing.assert_allclose(squared.representation_ @ V, C @ V, atol=1e-10)
    np.testing.assert_allclose(squared.representation_.T @ V, C.T @ V, atol=1e-10)
    S = (C**2 + C.T**2) / 2
    np.testing.assert_allclose(squared.affinity_ @ V, S @ V, atol=1e-10)
    np.testing.assert_allclose(squared.affinity_block(np.arange(5, 9)), S[5:9, 5:9], atol=1e-12)
    all_kept = LeastSquaresSubspaceClustering(3, n_kept=60, **options).fit(X)
    np.testing.assert_allclose(all_kept.affinity_.toarray(), W, atol=1e-10)
    np.testing.assert_allclose(all_kept.representation_.toarray(), C, atol=1e-10)
    few = LeastSquaresSubspaceClustering(3, n_kept=4, power=2, **options).fit(X).affinity_.toarray()
    largest = S * (np.sort(S, axis=1)[:, -4, None] <= S)
    np.testing.assert_allclose(few, (largest + largest.T) / 2, atol=1e-10)


def test_squares_find_the_clusters_that_absolute_values_find():
    world = planted_subspaces(5, n_per=50, d=30, k=3, n_subspaces=4, noise=0.05)
    for options in ({}, {"power": 2}, {"n_kept": 20}):
        found = LeastSquaresSubspaceClustering(4, random_state=0, **options).fit_predict(world.points)
        assert clustering_accuracy(world.labels, found) > 0.98


@pieces
def test_thresholding_is_the_published_formula():
    X = unit(noisy(4).points)
    cosine = np.minimum(np.abs(X @ X.T), 1)
    np.fill_diagonal(cosine, -1)
    Z = np.zeros((60, 60))
    for i in range(60):
        near = np.argsort(-cosine[i])[:5]
        Z[i, near] = np.exp(-2 * np.arccos(cosine[i, near]))
    fitted = ThresholdingSubspaceClustering(3, n_neighbors=5, random_state=0).fit(X)
    np.testing.assert_allclose(fitted.affinity_.toarray(), Z + Z.T, atol=1e-12)


@pieces
@pytest.mark.parametrize("cls", METHODS[:2])
def test_affinity_is_symmetric_after_rows_of_unit_length(cls):
    fitted = make(cls).fit(noisy(5).points)
    C = np.abs(fitted.representation_.toarray())
    C = unit(C)
    np.testing.assert_allclose(fitted.affinity_.toarray(), (C + C.T) / 2, atol=1e-12)


@pieces
@pytest.mark.parametrize("cls", METHODS)
def test_float32_stays_and_agrees(cls):
    world = planted_subspaces(6, n_per=40, d=20, k=3, n_subspaces=3, noise=0.02)
    wide = make(cls).fit(world.points)
    slim = make(cls).fit(world.points.astype(np.float32))
    assert slim.representation_.dtype == slim.embedding_.dtype == slim.bases_[0].dtype == np.float32
    assert clustering_accuracy(wide.labels_, slim.labels_) == 1.0
    every = np.arange(120)
    difference = np.abs(wide.affinity_block(every) - slim.affinity_block(every))
    # A point whose choice hangs on the last digits may choose another.
    assert np.mean(difference.max(axis=1) > 1e-3) < 0.05


@pieces
@pytest.mark.parametrize("rounding", ["kmeans", "snem", "cluster_qr"])
def test_every_rounding_finds_what_is_clear(rounding):
    world = planted_subspaces(7, n_per=40, d=30, k=3, n_subspaces=4, noise=0.02)
    fitted = ElasticNetSubspaceClustering(4, rounding=rounding, random_state=0).fit(world.points)
    assert clustering_accuracy(world.labels, fitted.labels_) == 1.0


@pieces
@pytest.mark.parametrize("cls", [METHODS[0], METHODS[1], METHODS[3]])
def test_blocks_and_processes_do_not_change_the_answer(cls, monkeypatch):
    X = noisy(6).points
    plain = make(cls).fit(X)
    monkeypatch.setattr("polyspan.cluster._affinity.BLOCK_BYTES", 20_000)
    for n_jobs in (1, 2, None):
        other = make(cls, n_jobs=n_jobs).fit(X)
        np.testing.assert_allclose(other.representation_.toarray(), plain.representation_.toarray(), atol=1e-12)
        np.testing.assert_array_equal(other.labels_, plain.labels_)


@pieces
@pytest.mark.parametrize("cls", [METHODS[0], METHODS[1], METHODS[3]])
def test_copies_of_rows_do_not_fall_out_of_their_cluster(cls):
    world = planted_subspaces(8, n_per=30, d=20, k=3, n_subspaces=3, noise=0.02)
    sign = np.random.default_rng(0).choice([-1.0, 1.0], size=(90, 1))
    X = np.concatenate([world.points, sign * world.points, world.points])
    fitted = make(cls).fit(X)
    assert clustering_accuracy(np.tile(world.labels, 3), fitted.labels_) == 1.0
    assert fitted.n_components_ <= 3
    options = {"n_neighbors": 5} if cls is METHODS[3] else {}
    once, thrice = make(cls, **options).fit(world.points), make(cls, **options).fit(X)
    C = thrice.representation_.toarray()
    np.testing.assert_allclose(C[:90, :90], once.representation_.toarray(), atol=1e-12)
    assert not C[:, 90:].any()
    if cls is not METHODS[3]:
        lengths = np.linalg.norm(unit(X) - C @ unit(X), axis=1).reshape(3, 90)
        np.testing.assert_allclose(lengths, np.tile(lengths[0], (3, 1)), atol=1e-12)


@pieces
@pytest.mark.parametrize("cls", [METHODS[0], METHODS[1], METHODS[3]])
@pytest.mark.parametrize(
    ("kind", "off"), [(np.float64, 0.0), (np.float64, 1e-8), (np.float64, 4e-7), (np.float32, 1e-5)]
)
def test_copies_within_rounding_and_of_another_length_do_not_fall_out_either(cls, kind, off):
    world = planted_subspaces(8, n_per=30, d=20, k=3, n_subspaces=3, noise=0.02)
    rng = np.random.default_rng(1)
    length = rng.choice([-1.0, 1.0], size=(90, 1)) * rng.uniform(0.1, 10, size=(90, 1))
    jitter = off * np.linalg.norm(world.points, axis=1, keepdims=True) * unit(rng.normal(size=(90, 20)))
    X = np.concatenate([world.points, length * (world.points + jitter), world.points / 3]).astype(kind)
    options = {"n_neighbors": 5} if cls is METHODS[3] else {}
    fitted, once = make(cls, **options).fit(X), make(cls, **options).fit(X[:90])
    assert fitted.n_components_ <= 3
    assert clustering_accuracy(np.tile(world.labels, 3), fitted.labels_) == 1.0
    C = fitted.representation_.toarray()
    assert not C[:, 90:].any()
    np.testing.assert_allclose(C[:90, :90], once.representation_.toarray(), atol=1e-6 if kind is np.float32 else 1e-12)


@pieces
def test_copies_of_another_length_are_expressed_in_their_own_length():
    world = planted_subspaces(8, n_per=30, d=20, k=3, n_subspaces=3)
    X = np.concatenate([world.points, -2.5 * world.points])
    C = make(OMPSubspaceClustering, normalize=False).fit(X).representation_.toarray()
    np.testing.assert_allclose(C[90:], -2.5 * C[:90], atol=1e-9)
    assert not C[:, 90:].any()


def test_copies_are_those_that_all_pairs_of_rows_show():
    """Oracle: angles of all pairs, first come first kept; rows just out of reach are no copies."""
    rng = np.random.default_rng(2)
    for kind, reach in ((np.float64, 1e-6), (np.float32, float(np.finfo(np.float32).eps) ** 0.5)):
        base = unit(rng.normal(size=(40, 6)))
        parts = [base]
        for share in (0.5, 0.9, 1.2, 3.0):
            across = rng.normal(size=base.shape)
            across = unit(across - (across * base).sum(axis=1, keepdims=True) * base)
            parts.append(rng.choice([-1, 1], size=(40, 1)) * unit(base + share * reach * across))
        rows = rng.permutation(np.concatenate([*parts, np.zeros((2, 6))])).astype(kind)
        wide = rows.astype(np.float64)
        wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-300)
        first = np.arange(len(rows))
        for i in range(len(rows)):
            if first[i] == i:
                off = np.minimum(*(np.linalg.norm(wide + side * wide[i], axis=1) for side in (-1, 1)))
                first[(first == np.arange(len(rows))) & (np.arange(len(rows)) > i) & (off <= reach)] = i
        found = find_copies(rows)
        np.testing.assert_array_equal(found.kept[found.group], first)
        np.testing.assert_allclose(found.factor[:, None] * rows[first], rows, atol=2 * reach)
        assert 81 < len(found.kept) < 202 - 60


@pieces
@pytest.mark.parametrize("cls", METHODS)
def test_constant_features_and_deficient_rank_change_nothing(cls):
    world = planted_subspaces(9, n_per=30, d=20, k=3, n_subspaces=3, noise=0.001)
    padded = np.hstack([world.points, np.zeros((90, 15))])
    plain, wide = (make(cls).fit(X) for X in (world.points, padded))
    np.testing.assert_allclose(plain.affinity_block(np.arange(90)), wide.affinity_block(np.arange(90)), atol=1e-9)
    constant = make(cls).fit(np.hstack([world.points, np.full((90, 1), 1e-3)]))
    assert clustering_accuracy(plain.labels_, constant.labels_) == 1.0


@pieces
@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_the_scale_of_the_data_does_not_matter(cls, scale):
    X = noisy(7).points
    plain, other = make(cls).fit(X), make(cls).fit(X * scale)
    assert clustering_accuracy(plain.labels_, other.labels_) == 1.0


@pytest.mark.filterwarnings("ignore:the affinity falls into", "ignore:only .* clusters have a row")
@pytest.mark.parametrize("cls", METHODS)
def test_one_cluster_and_as_many_as_rows(cls):
    X = noisy(8).points
    assert not make(cls, 1).fit_predict(X).any()
    fitted = make(cls, 60).fit(X)
    assert len(np.unique(fitted.labels_)) > 30
    assert fitted.predict(X).shape == (60,)


@pytest.mark.filterwarnings("ignore:the affinity falls into")
@pytest.mark.parametrize("cls", [METHODS[0], METHODS[1], METHODS[3]])
def test_equal_rows_are_one_cluster_and_it_is_said(cls):
    with pytest.warns(UserWarning, match="only 1 of n_clusters=2 clusters have a row"):
        fitted = make(cls, 2).fit(np.ones((6, 3)))
    assert len(set(fitted.labels_)) == 1
    assert fitted.representation_.nnz == 0


def test_an_affinity_in_more_pieces_than_clusters_is_said():
    world = planted_subspaces(10, n_per=20, d=20, k=3, n_subspaces=4)
    few = np.isin(world.labels, [0, 1]) | (np.arange(80) % 3 > 0)
    X, labels = world.points[few], world.labels[few]
    with pytest.warns(UserWarning, match="the affinity falls into 4 pieces for n_clusters=2; the 2 largest"):
        fitted = ElasticNetSubspaceClustering(2, random_state=0).fit(X)
    assert fitted.n_components_ == 4
    clear = np.isin(labels, [0, 1])
    assert clustering_accuracy(labels[clear], fitted.labels_[clear]) == 1.0
    np.testing.assert_array_equal(fitted.embedding_.any(axis=1), clear)
    np.testing.assert_array_equal(fitted.predict(X), fitted.labels_)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (METHODS[0], {"tau": 0.0}, r"tau must lie in \(0, 1\], got 0.0"),
        (METHODS[0], {"gamma": 1.0}, "gamma must be above 1 and finite, got 1.0"),
        (METHODS[0], {"n_active": 0}, "n_active must be a whole number of at least 1, got 0"),
        (METHODS[0], {"max_rounds": 2.5}, "max_rounds must be a whole number of at least 1, got 2.5"),
        (METHODS[0], {"rounding": "magic"}, "rounding must be one of kmeans, snem, cluster_qr, got 'magic'"),
        (METHODS[1], {"n_nonzero": 0}, "n_nonzero must be a whole number of at least 1, got 0"),
        (METHODS[1], {"tol": -1.0}, r"tol must lie in \[0, 1\), got -1.0"),
        (METHODS[1], {"n_jobs": -2}, "n_jobs must be a whole number of at least 1, -1 or None, got -2"),
        (METHODS[2], {"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        (METHODS[2], {"power": 3}, "power must be 1 or 2, got 3"),
        (METHODS[2], {"n_kept": 0}, "n_kept must be a whole number of at least 1, got 0"),
        (METHODS[3], {"n_neighbors": 0}, "n_neighbors must be a whole number of at least 1, got 0"),
        (METHODS[3], {"n_clusters": True}, "n_clusters must be a whole number of at least 1, got True"),
        (METHODS[3], {"n_clusters": 61}, "n_clusters must be at most the number of rows, 60, got 61"),
        (METHODS[3], {"subspace_dim": 0}, "subspace_dim must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_parameters_are_refused_by_name(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**{"n_clusters": 3} | options).fit(noisy().points)


@pieces
@pytest.mark.parametrize("cls", METHODS)
def test_rows_in_every_subspace_are_said_and_change_nothing_for_the_others(cls):
    X = noisy().points
    plain = make(cls).fit(X)
    X = np.insert(X, [7, 20], 0, axis=0)
    with pytest.warns(UserWarning, match="X has 2 all-zero rows, the first at row 7; they lie in every subspace"):
        fitted = make(cls).fit(X)
    rest = np.delete(np.arange(62), [7, 21])
    np.testing.assert_allclose(fitted.affinity_block(rest), plain.affinity_block(np.arange(60)), atol=1e-12)
    assert not fitted.affinity_block(np.arange(62))[[7, 21]].any()
    assert not fitted.embedding_[[7, 21]].any()


def test_rows_too_long_to_square_are_refused_where_they_are_not_normalised():
    with pytest.raises(ValueError, match="X must lie within 1e-12 and 1e12 where normalize=False"):
        OMPSubspaceClustering(3, normalize=False).fit(noisy().points * 1e200)


def test_too_many_rows_for_dense_coefficients_are_refused_with_a_way_out(monkeypatch):
    monkeypatch.setattr("polyspan.cluster.self_expressive.available_memory_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="60 rows need 86,400 bytes, 1,000 are free; power=2 or n_kept"):
        LeastSquaresSubspaceClustering(3).fit(noisy().points)
    for options in ({"power": 2}, {"n_kept": 10}):
        LeastSquaresSubspaceClustering(3, random_state=0, **options).fit(noisy().points)


def test_a_fit_of_every_form_survives_pickling():
    X = noisy().points
    for options in ({}, {"power": 2}, {"n_kept": 10}):
        fitted = LeastSquaresSubspaceClustering(3, random_state=0, **options).fit(X)
        again = pickle.loads(pickle.dumps(fitted))
        np.testing.assert_array_equal(again.predict(X), fitted.predict(X))
        np.testing.assert_array_equal(again.affinity_ @ np.ones(60), fitted.affinity_ @ np.ones(60))


@pieces
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize(
    "made",
    [
        make(ElasticNetSubspaceClustering),
        make(OMPSubspaceClustering, subspace_dim=2),
        make(ThresholdingSubspaceClustering, rounding="snem"),
        make(LeastSquaresSubspaceClustering),
        make(LeastSquaresSubspaceClustering, power=2),
        make(LeastSquaresSubspaceClustering, n_kept=5),
    ],
    ids=["ensc", "omp", "tsc", "lsr", "lsr-squared", "lsr-kept"],
)
def test_a_saved_clustering_comes_back_whole(tmp_path, made, kind):
    X = noisy(3).points.astype(kind)
    fitted = made.fit(X)
    back = type(made).load(fitted.save(tmp_path / "fit.safetensors"))
    assert back.get_params() == fitted.get_params()
    assert vars(back).keys() == vars(fitted).keys()
    for name in ("labels_", "embedding_"):
        np.testing.assert_array_equal(getattr(back, name), getattr(fitted, name))
        assert getattr(back, name).dtype == getattr(fitted, name).dtype
    v = np.random.default_rng(0).normal(size=len(X))
    for name in ("representation_", "affinity_"):
        ours, theirs = getattr(back, name), getattr(fitted, name)
        assert type(ours) is type(theirs)
        np.testing.assert_array_equal(ours @ v, theirs @ v)
        assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(back.affinity_block([1, 5, 40]), fitted.affinity_block([1, 5, 40]))
    np.testing.assert_array_equal(back.predict(X), fitted.predict(X))
    np.testing.assert_array_equal(back.labels_of_seed(X, 7), fitted.labels_of_seed(X, 7))
    assert (back.n_components_, back.n_iter_) == (fitted.n_components_, fitted.n_iter_)


def test_files_that_hold_no_such_clustering_are_refused(tmp_path):
    path = make(OMPSubspaceClustering).fit(noisy().points).save(tmp_path / "fit.safetensors")
    with pytest.raises(WrongContent, match="a fitted OMPSubspaceClustering"):
        ElasticNetSubspaceClustering.load(path)
    blob = bytearray(path.read_bytes())
    blob[-3] ^= 1
    (tmp_path / "torn.safetensors").write_bytes(blob)
    with pytest.raises(CorruptFile):
        OMPSubspaceClustering.load(tmp_path / "torn.safetensors")
    with pytest.raises(NotFittedError):
        OMPSubspaceClustering().save(tmp_path / "none.safetensors")
    # Whole by its digests, but with a column that is no point.
    found = load_fitted(path)
    arrays = {name: np.array(value) for name, value in found.arrays.items()}
    arrays["affinity_.indices"][0] = 10_000
    save_fitted(tmp_path / "odd.safetensors", kind=found.kind, arrays=arrays, params=found.params)
    with pytest.raises(WrongContent, match="affinity_ of form 'csr'"):
        OMPSubspaceClustering.load(tmp_path / "odd.safetensors")


@pieces
def test_a_class_of_ones_own_needs_one_method():
    class Nearest(SelfExpressiveClustering):
        def __init__(self, n_clusters=8, *, subspace_dim=None, n_init=5, random_state=None):
            self.n_clusters, self.subspace_dim = n_clusters, subspace_dim
            self.n_init, self.random_state = n_init, random_state

        def _express(self, rows):
            self.n_iter_ = 1
            return sp.csr_array((rows @ rows.T) ** 8 - np.eye(len(rows)))

    world = planted_subspaces(11, n_per=40, d=30, k=2, n_subspaces=3)
    assert clustering_accuracy(world.labels, Nearest(3, random_state=0).fit_predict(world.points)) == 1.0


@pytest.mark.slow
@pieces
@pytest.mark.parametrize(
    "made",
    [
        ElasticNetSubspaceClustering(5, random_state=0, n_init=1),
        OMPSubspaceClustering(5, n_nonzero=3, random_state=0, n_init=1),
        ThresholdingSubspaceClustering(5, n_neighbors=5, random_state=0, n_init=1),
        LeastSquaresSubspaceClustering(5, power=2, random_state=0, n_init=1),
        LeastSquaresSubspaceClustering(5, n_kept=5, random_state=0, n_init=1),
    ],
    ids=["ensc", "omp", "tsc", "lsr-squared", "lsr-kept"],
)
def test_no_matrix_of_n_by_n_is_made(made):
    n = 8_000
    world = planted_subspaces(0, n_per=n // 5, d=20, k=3, n_subspaces=5)
    rows = world.points.astype(np.float32)
    peak = measure_peak(partial(made.fit, rows)).peak_bytes
    assert peak < n * n * 4
    assert clustering_accuracy(world.labels, made.labels_) > 0.9


@pytest.mark.parametrize("kind", [ElasticNetSubspaceClustering, OMPSubspaceClustering, ThresholdingSubspaceClustering])
def test_rows_that_are_all_alike_are_one_cluster_with_their_line(kind):
    made = kind(1).fit(np.ones((20, 4)))
    assert made.labels_.tolist() == [0] * 20
    np.testing.assert_allclose(np.abs(made.bases_[0]), np.full((4, 1), 0.5))
    assert made.predict(np.full((2, 4), 3.0)).tolist() == [0, 0]


def test_points_in_time_are_refused():
    X = np.arange(60).reshape(20, 3).astype("datetime64[s]")
    with pytest.raises(ValueError, match=r"X must hold numbers, got datetime64\[s\]"):
        OMPSubspaceClustering(2, random_state=0).fit(X)
