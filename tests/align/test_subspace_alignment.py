import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import LinearRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.align import (
    CanonicalCorrelation,
    OrthogonalMap,
    SubspaceAligner,
    choose_aligner,
    load_aligner,
    local_cka,
)
from polyspan.errors import WrongContent
from polyspan.linalg import kernel_cka, linear_cka

METHODS = ("affine", "local_cka", "cosine")


def views(seed, n=400, shared=4, own=6, d_x=14, d_y=11, noise=0.3):
    """Two linear views of shared factors, each with louder factors of its own."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(n, shared))
    mixes = [rng.normal(size=(shared + own, d)) for d in (d_x, d_y)]
    made = [np.concatenate([factors, 3 * rng.normal(size=(n, own))], axis=1) @ mix for mix in mixes]
    return [rows + noise * rng.normal(size=rows.shape) + 5.0 for rows in made]


def held(seed=0, n=60, **options):
    X, Y = views(seed, **options)
    return X[n:], Y[n:], X[:n], Y[:n]


@pytest.mark.filterwarnings("ignore:.*anchors are fewer than")
@parametrize_with_checks(
    [
        CanonicalCorrelation(),
        CanonicalCorrelation(1, reg=0.1),
        SubspaceAligner(),
        SubspaceAligner(1, method="local_cka", reg=0.0),
    ]
)
def test_sklearn_contract(estimator, check):
    check(estimator)


# Laws


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), reg=st.sampled_from([0.0, 1e-3, 0.3]))
def test_coordinates_are_white_and_only_partners_correlate(seed, reg):
    X, Y = views(seed, n=150)
    fitted = CanonicalCorrelation(5, reg=reg).fit(X, Y)
    A, B = fitted.transform(X, Y)
    ridge_x, ridge_y = (
        reg * np.mean(np.var(rows, axis=0)) * weights.T @ weights
        for rows, weights in ((X, fitted.x_weights_), (Y, fitted.y_weights_))
    )
    np.testing.assert_allclose(A.T @ A / len(A) + ridge_x, np.eye(5), atol=1e-7)
    np.testing.assert_allclose(B.T @ B / len(B) + ridge_y, np.eye(5), atol=1e-7)
    np.testing.assert_allclose(A.T @ B / len(A), np.diag(fitted.correlations_), atol=1e-7)
    assert (np.diff(fitted.correlations_) <= 0).all()


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_shared_factors_that_are_planted_are_found(seed):
    X, Y = views(seed, n=2000, d_x=12, d_y=12, noise=0.01)
    found = CanonicalCorrelation(6, reg=0.0).fit(X, Y).correlations_
    assert found[3] > 0.99
    assert found[4] < 0.2


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), method=st.sampled_from(METHODS))
def test_any_invertible_change_of_either_space_leaves_every_score_as_it_is(seed, method):
    X, Y, A, B = held(seed % 1000)
    rng = np.random.default_rng(seed)
    turn, stretch = (np.eye(d) + 0.3 * rng.normal(size=(d, d)) / np.sqrt(d) for d in (14, 11))
    plain = SubspaceAligner(4, method=method, reg=0.0).fit(X, Y).similarity(A, B)
    other = SubspaceAligner(4, method=method, reg=0.0).fit(X @ turn - 2, Y @ stretch + 1)
    np.testing.assert_allclose(other.similarity(A @ turn - 2, B @ stretch + 1), plain, atol=1e-6)


def test_private_coordinates_are_white_and_uncorrelated_with_the_shared_ones_and_complete_them():
    X, Y = views(1)
    fitted = CanonicalCorrelation(4, reg=0.0).fit(X, Y)
    for view, rows, mean in (("x", X, fitted.x_mean_), ("y", Y, fitted.y_mean_)):
        private = (rows - mean) @ fitted.private_weights(view)
        assert private.shape[1] == rows.shape[1] - 4
        np.testing.assert_allclose(private.T @ private / len(rows), np.eye(private.shape[1]), atol=1e-8)
        shared = fitted.transform(rows) if view == "x" else fitted.transform_y(rows)
        np.testing.assert_allclose(private.T @ shared / len(rows), 0.0, atol=1e-8)


def test_with_all_components_coordinates_lead_back_to_the_rows():
    X, Y = views(2)
    fitted = CanonicalCorrelation(11, reg=0.01).fit(X, Y)
    np.testing.assert_allclose(fitted.inverse_transform(fitted.transform_y(Y), "y"), Y, atol=1e-8)
    there = fitted.inverse_transform(fitted.transform(X))
    np.testing.assert_allclose(fitted.transform(there), fitted.transform(X), atol=1e-8)


@pytest.mark.parametrize("kind", [CanonicalCorrelation, SubspaceAligner])
def test_batches_and_weights_give_what_all_anchors_give_at_once(kind):
    X, Y = views(3)
    weights = np.random.default_rng(0).integers(0, 4, size=len(X))
    streamed = kind(4)
    for part in np.array_split(np.arange(len(X)), 7):
        streamed.partial_fit(X[part], Y[part], weights[part], solve=bool(part[-1] == len(X) - 1))
    repeated = kind(4).fit(np.repeat(X, weights, axis=0), np.repeat(Y, weights, axis=0))
    np.testing.assert_allclose(streamed.correlations_, repeated.correlations_, atol=1e-10)
    np.testing.assert_allclose(streamed.transform(X), repeated.transform(X), atol=1e-8)
    np.testing.assert_allclose(kind(4).fit(X, Y, weights).transform(X), streamed.transform(X), atol=1e-8)
    assert streamed.n_anchors_ == len(X)


def test_the_subspace_finds_partners_that_the_full_spaces_lose():
    X, Y, A, B = held(n=100, noise=1.0, d_x=30, d_y=26)
    own = np.arange(len(A))
    raw = np.mean(local_cka(X, Y, A, B).argmax(axis=1) == own)
    assert raw < 0.1
    for method in METHODS:
        found = SubspaceAligner(4, method=method).fit(X, Y).retrieve(A, B, 1).indices[:, 0]
        assert np.mean(found == own) > 0.4


# Oracles


def test_agrees_with_scikit_learns_iteration():
    X, Y = views(4)
    mine = CanonicalCorrelation(4, reg=0.0).fit(X, Y)
    theirs = CCA(4, scale=False, max_iter=5000, tol=1e-12).fit(X, Y)
    for ours, other in zip(mine.transform(X, Y), theirs.transform(X, Y), strict=True):
        cosines = np.sum(ours * other, axis=0) / np.linalg.norm(ours, axis=0) / np.linalg.norm(other, axis=0)
        np.testing.assert_allclose(np.abs(cosines), 1.0, atol=1e-4)


def test_with_all_components_and_no_ridge_the_map_is_least_squares():
    X, Y, A, _ = held()
    fitted = SubspaceAligner(reg=0.0).fit(X, Y)
    np.testing.assert_allclose(fitted.transform(A), LinearRegression().fit(X, Y).predict(A), atol=1e-7)


@pytest.mark.parametrize("reg", [0.0, 0.2])
def test_the_affine_route_is_least_squares_between_the_anchors_coordinates(reg):
    X, Y, A, B = held(5)
    fitted = SubspaceAligner(4, reg=reg).fit(X, Y)
    literal = LinearRegression().fit(fitted.transform_x(X), fitted.transform_y(Y))
    np.testing.assert_allclose(fitted.affine_, literal.coef_.T, atol=1e-8)
    if reg == 0:
        np.testing.assert_allclose(fitted.affine_, np.diag(fitted.correlations_), atol=1e-8)
    left, right = literal.predict(fitted.transform_x(A)), fitted.transform_y(B)
    cosines = (left @ right.T) / np.linalg.norm(left, axis=1)[:, None] / np.linalg.norm(right, axis=1)
    np.testing.assert_allclose(fitted.similarity(A, B), cosines, atol=1e-8)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_the_cosine_route_weighs_directions_by_their_correlations(power):
    X, Y, A, B = held(6)
    fitted = SubspaceAligner(4, method="cosine", rho_power=power).fit(X, Y)
    a, b, w = fitted.transform_x(A)[7], fitted.transform_y(B)[9], fitted.correlations_**power
    expected = np.sum(w * a * b) / np.sqrt(np.sum(w * a * a) * np.sum(w * b * b))
    assert fitted.similarity(A, B)[7, 9] == pytest.approx(expected, abs=1e-12)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 30), scale=st.sampled_from([1e-3, 1.0, 1e5]))
def test_linear_local_cka_equals_the_pair_appended(seed, n, scale):
    rng = np.random.default_rng(seed)
    X, Y, A, B = (scale * rng.normal(size=shape) + 1 for shape in ((n, 5), (n, 3), (4, 5), (6, 3)))
    literal = [[linear_cka(np.vstack([X, a]), np.vstack([Y, b])) for b in B] for a in A]
    np.testing.assert_allclose(local_cka(X, Y, A, B), literal, rtol=1e-9)


def gaussian(rows, sigma):
    return np.exp(-np.sum((rows[:, None] - rows) ** 2, axis=-1) / (2 * sigma**2))


def median_sigma(rows):
    squared = np.sum((rows[:, None] - rows) ** 2, axis=-1)
    return np.sqrt(np.median(squared[squared > 0]))


@pytest.mark.parametrize("bandwidth", [None, 1.7, (0.8, 3.0)])
def test_gaussian_local_cka_equals_the_pair_appended(bandwidth):
    rng = np.random.default_rng(0)
    X, Y, A, B = (rng.normal(size=shape) for shape in ((25, 5), (25, 3), (4, 5), (6, 3)))
    sigmas = (median_sigma(X), median_sigma(Y)) if bandwidth is None else np.broadcast_to(bandwidth, (2,))
    literal = [
        [kernel_cka(*(gaussian(np.vstack(z), s) for z, s in zip(((X, a), (Y, b)), sigmas, strict=True))) for b in B]
        for a in A
    ]
    np.testing.assert_allclose(local_cka(X, Y, A, B, kernel="rbf", bandwidth=bandwidth), literal, rtol=1e-10)


def test_the_median_taken_again_for_each_pair_changes_gaussian_scores_only_slightly():
    X, Y, A, B = held(7, n=20, d_x=5, d_y=4)
    mine = local_cka(X[:60], Y[:60], A, B, kernel="rbf")
    literal = np.array(
        [
            [kernel_cka(*(gaussian(rows, median_sigma(rows)) for rows in map(np.vstack, ((X[:60], a), (Y[:60], b)))))
             for b in B]
            for a in A
        ]
    )  # fmt: skip
    assert np.abs(mine - literal).max() < 0.02
    assert np.corrcoef(mine.ravel(), literal.ravel())[0, 1] > 0.95


def test_the_local_route_is_local_cka_of_the_coordinates():
    X, Y, A, B = held(8)
    fitted = SubspaceAligner(4, method="local_cka", reg=0.05).fit(X, Y)
    coordinates = [fitted.transform_x(X), fitted.transform_y(Y), fitted.transform_x(A), fitted.transform_y(B)]
    np.testing.assert_allclose(fitted.similarity(A, B), local_cka(*coordinates), rtol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_matching_and_retrieval_are_those_of_the_scores(method):
    X, Y, A, B = held(9)
    fitted = SubspaceAligner(4, method=method).fit(X, Y)
    scores = fitted.similarity(A, B[:40])
    found = fitted.match(A, B[:40])
    rows, columns = linear_sum_assignment(scores, maximize=True)
    np.testing.assert_array_equal((found.rows, found.columns), (rows, columns))
    for i, j, score, confidence in zip(*found, strict=True):
        rivals = np.concatenate([np.delete(scores[i], j), np.delete(scores[:, j], i)])
        assert score == scores[i, j]
        assert confidence == pytest.approx((score - rivals.max()) / scores.std())
    near = fitted.retrieve(A, B[:40], 3)
    np.testing.assert_array_equal(near.indices, np.argsort(-scores, axis=1)[:, :3])
    np.testing.assert_allclose(near.scores, -np.sort(-scores, axis=1)[:, :3], atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_matching_among_all_candidates_is_exact_and_among_few_nearly_so(method):
    X, Y, A, B = held(10, n=120)
    fitted = SubspaceAligner(4, method=method).fit(X, Y)
    whole, same, few = (fitted.match(A, B, candidates=c) for c in (None, 120, 15))
    np.testing.assert_array_equal(same.columns[np.argsort(same.rows)], whole.columns)
    assert sorted(few.columns) == sorted(set(few.columns))
    chosen = dict(zip(few.rows, few.columns, strict=True))
    assert np.mean([chosen.get(i) == j for i, j in zip(whole.rows, whole.columns, strict=True)]) > 0.9
    order = np.argsort(same.rows)
    np.testing.assert_allclose(same.scores[order], whole.scores, rtol=1e-12)
    np.testing.assert_allclose(same.confidence[order], whole.confidence, rtol=1e-6, atol=1e-9)


def test_rows_that_compete_for_one_candidate_are_left_out_rather_than_given_a_stranger():
    X, Y, A, B = held(11)
    fitted = SubspaceAligner(4).fit(X, Y)
    found = fitted.match(np.repeat(A[:1], 6, axis=0), B[:3], candidates=1)
    assert 1 <= len(found.rows) <= 3
    assert len(set(found.columns)) == len(found.columns)


def test_blocks_do_not_change_what_is_retrieved(monkeypatch):
    X, Y, A, B = held(12)
    fitted = SubspaceAligner(4, method="local_cka").fit(X, Y)
    whole = fitted.retrieve(A, B, 5)
    monkeypatch.setattr("polyspan.align._pair_matching.BLOCK_BYTES", 8 * len(B) * 7)
    for one, other in zip(whole, fitted.retrieve(A, B, 5), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


# As an aligner


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_aligner_scores_bit_for_bit_as_before(method, tmp_path):
    X, Y, A, B = held(13)
    fitted = SubspaceAligner(4, method=method, reg=0.01, rho_power=0.5).fit(X, Y)
    again, about = load_aligner(fitted.save(tmp_path / "it.safetensors", views="texts and shapes"))
    assert about == {"views": "texts and shapes"}
    np.testing.assert_array_equal(again.similarity(A, B), fitted.similarity(A, B))
    np.testing.assert_array_equal(again.transform(A), fitted.transform(A))
    np.testing.assert_array_equal(again.inverse_transform(B), fitted.inverse_transform(B))
    np.testing.assert_array_equal(again.seen(X), True)
    assert again.get_params() == fitted.get_params()
    with pytest.raises(WrongContent, match="SubspaceAligner"):
        OrthogonalMap.load(tmp_path / "it.safetensors")


def test_it_stands_among_the_aligners_to_choose_from():
    X, Y = views(14, noise=1.0)
    tried = {"subspace": SubspaceAligner("auto"), "orthogonal": OrthogonalMap()}
    choice = choose_aligner(X, Y, candidates=tried, metric="recall@10")
    assert {row.aligner for row in choice.table} == set(tried)
    assert isinstance(choice.aligner, SubspaceAligner)
    assert -1 <= choice.aligner.score(*((X, Y) if choice.direction == "gallery" else (Y, X))) <= 1


def test_the_way_back_is_the_map_fitted_the_other_way():
    X, Y, _, B = held(15)
    back = SubspaceAligner(4, reg=0.01).fit(X, Y).inverse_transform(B)
    np.testing.assert_allclose(back, SubspaceAligner(4, reg=0.01).fit(Y, X).transform(B), atol=1e-8)


def test_the_size_that_is_chosen_ranks_held_out_partners_best():
    X, Y, A, B = held(16, n=150)
    fitted = SubspaceAligner("auto", random_state=1).fit(X, Y)
    sizes, scores = zip(*fitted.tried_, strict=True)
    assert fitted.n_components_ == sizes[int(np.argmax(scores))]
    assert sizes[-1] == 11
    assert 3 <= fitted.n_components_ <= 7
    np.testing.assert_array_equal(
        fitted.similarity(A, B), SubspaceAligner(fitted.n_components_).fit(X, Y).similarity(A, B)
    )
    same = SubspaceAligner("auto", random_state=1).fit(X, Y)
    assert same.tried_ == fitted.tried_
    assert SubspaceAligner("auto", random_state=2).fit(X, Y).tried_ != fitted.tried_


def test_directions_only_where_they_are_asked_for():
    X, Y, A, B = held(17)
    fitted = SubspaceAligner(4, normalize=True).fit(X, Y)
    longer = np.random.default_rng(0).uniform(0.5, 2, size=(len(A), 1))
    np.testing.assert_allclose(fitted.similarity(longer * A, B * 3), fitted.similarity(A, B), atol=1e-10)
    assert fitted.seen(X).all()
    assert not fitted.seen(A).any()


@pytest.mark.parametrize("method", METHODS)
def test_single_precision_ranks_as_double_does(method):
    X, Y, A, B = held(18)
    fitted = SubspaceAligner(4, method=method).fit(X, Y)
    small = fitted.similarity(A.astype(np.float32), B.astype(np.float32))
    assert small.dtype == (np.float64 if method == "local_cka" else np.float32)
    assert np.mean(small.argmax(axis=1) == fitted.similarity(A, B).argmax(axis=1)) > 0.97
    assert fitted.transform(A.astype(np.float32)).dtype == np.float32
    assert fitted.inverse_transform(B.astype(np.float32)).dtype == np.float32


def test_chance_elsewhere_is_left_alone():
    X, Y = views(19)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    SubspaceAligner("auto").fit(X, Y)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


# Degenerate and bad input


def test_constant_features_take_no_part():
    X, Y, A, B = held(20)
    with_constant = [np.concatenate([rows, np.full((len(rows), 1), 7.0)], axis=1) for rows in (X, A)]
    plain = SubspaceAligner(4, reg=0.0).fit(X, Y).similarity(A, B)
    np.testing.assert_allclose(
        SubspaceAligner(4, reg=0.0).fit(with_constant[0], Y).similarity(with_constant[1], B), plain, atol=1e-6
    )
    with pytest.raises(ValueError, match="X must vary from row to row"):
        SubspaceAligner().fit(np.ones((30, 3)), Y[:30])


def test_repeated_columns_and_equal_views_are_no_trouble():
    X, _ = views(21)
    doubled = np.concatenate([X, X], axis=1)
    fitted = SubspaceAligner(reg=0.0).fit(doubled, X)
    np.testing.assert_allclose(fitted.correlations_, 1.0, atol=1e-8)
    np.testing.assert_allclose(fitted.transform(doubled), X, atol=1e-6)
    with pytest.raises(ValueError, match="n_components must be at most 14, the smaller rank of the two views, got 20"):
        CanonicalCorrelation(20, reg=0.0).fit(doubled, doubled)


@pytest.mark.parametrize("kind", [CanonicalCorrelation, SubspaceAligner])
def test_more_components_than_there_are_is_refused_and_none_takes_what_there_is(kind):
    X, Y = views(22)
    with pytest.raises(ValueError, match=r"n_components must be between 1 and 11, .*got 12"):
        kind(12).fit(X, Y)
    assert kind().fit(X, Y).n_components_ == 11
    wide = np.random.default_rng(0).normal(size=(200, 60))
    assert kind().fit(wide, wide).n_components_ == 50
    assert kind("all").fit(wide, wide).n_components_ == 60
    with pytest.raises(ValueError, match=r"between 1 and 9, .*anchors less one \(9\)"):
        kind(10).fit(X[:10], Y[:10])


@pytest.mark.parametrize("kind", [CanonicalCorrelation, SubspaceAligner])
def test_fewer_anchors_than_features_are_warned_about(kind):
    X, Y = views(23)
    with pytest.warns(UserWarning, match="24 anchors are fewer than the 25 features of both views"):
        kind().fit(X[:24], Y[:24])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind().fit(X[:25], Y[:25])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "n_components must be between 1 and 11"),
        ({"n_components": 2.5}, "got 2.5"),
        ({"n_components": True}, "got True"),
        ({"n_components": "most"}, "n_components must be a number, 'auto', 'all' or None, got 'most'"),
        ({"reg": -1.0}, "reg must be finite and at least 0, got -1.0"),
        ({"reg": np.nan}, "reg must be finite"),
        ({"method": "cca"}, "method must be 'affine', 'local_cka' or 'cosine', got 'cca'"),
        ({"rho_power": -0.5}, "rho_power must be finite and at least 0, got -0.5"),
    ],
)
def test_a_parameter_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SubspaceAligner(**options).fit(*views(0))


def test_unpaired_missing_and_infinite_rows_are_refused():
    X, Y = views(0)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        SubspaceAligner().fit(X, Y[:-1])
    for bad in (np.nan, np.inf):
        spoilt = Y.copy()
        spoilt[3, 2] = bad
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            SubspaceAligner().fit(X, spoilt)
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            SubspaceAligner().fit(X, Y).similarity(X, spoilt)
    with pytest.raises(ValueError, match="at least 2 anchors, got 1"):
        SubspaceAligner().fit(X[:1], Y[:1])
    with pytest.raises(ValueError, match="sample_weight must be finite"):
        SubspaceAligner().fit(X, Y, -np.ones(len(X)))
    with pytest.raises(ValueError, match="needs at least 10 anchors, got 9"):
        SubspaceAligner("auto").fit(X[:9], Y[:9])
    with pytest.raises(ValueError, match="for partial_fit, got 'auto'"):
        SubspaceAligner("auto").partial_fit(X, Y)


def test_queries_that_do_not_fit_are_refused(monkeypatch):
    X, Y, A, B = held(24)
    fitted = SubspaceAligner(4).fit(X, Y)
    with pytest.raises(ValueError, match="y must have 11 features, got 14"):
        fitted.similarity(A, A)
    with pytest.raises(ValueError, match="expecting 14 features"):
        fitted.similarity(B, B)
    with pytest.raises(ValueError, match="Z must have 11 features, got 14"):
        fitted.inverse_transform(A)
    for k in (0, 61, True):
        with pytest.raises(ValueError, match="k must be between 1 and the 60 rows of the gallery"):
            fitted.retrieve(A, B, k)
    with pytest.raises(ValueError, match="candidates must be at least 1, got 0"):
        fitted.match(A, B, candidates=0)
    monkeypatch.setattr("polyspan.align._pair_matching.available_memory_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="60 by 60: 86,400 bytes; give candidates="):
        fitted.match(A, B)
    assert len(fitted.match(A, B, candidates=60).rows) == 60
    with pytest.raises(ValueError, match="view must be 'x' or 'y', got 'z'"):
        CanonicalCorrelation().fit(X, Y).private_weights("z")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "poly"}, "kernel must be 'linear' or 'rbf', got 'poly'"),
        ({"bandwidth": 1.0}, "bandwidth is for kernel='rbf', got 1.0"),
        ({"kernel": "rbf", "bandwidth": 0.0}, "bandwidth must be positive and finite, got 0.0"),
        ({"X_anchor": np.ones((5, 3))}, "one row an anchor"),
        ({"X_anchor": np.ones((20, 3))}, "X_anchor must vary"),
        ({"X_anchor": np.ones((20, 3)), "kernel": "rbf"}, "X_anchor must vary, got rows that are all equal"),
        ({"X": np.ones((2, 4))}, "X must have 3 features, got 4"),
        ({"Y": np.full((2, 2), np.nan)}, "Input Y contains NaN"),
    ],
)
def test_local_cka_refuses_what_it_cannot_score(options, message):
    rng = np.random.default_rng(0)
    arrays = {"X_anchor": (20, 3), "Y_anchor": (20, 2), "X": (4, 3), "Y": (5, 2)}
    made = {name: rng.normal(size=shape) for name, shape in arrays.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        local_cka(**(made | options))
