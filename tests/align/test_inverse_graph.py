import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import skew
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.align import InverseGraphConvolution, hubness, mean_pairwise_cosine
from polyspan.errors import WrongContent
from polyspan.io import save_fitted
from polyspan.linalg import recall_at_k, top_k


def unit(X):
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def cone(seed, n, d=12, shift=1.5, blur=0.5, common=None):
    """Rows about one direction; the twin of a row is the same row blurred."""
    rng = np.random.default_rng(seed)
    common = np.ones(d) / np.sqrt(d) if common is None else common
    items = rng.normal(size=(n, d)) / np.sqrt(d)
    return shift * common + items, shift * common[::-1] + items + blur * rng.normal(size=(n, d)) / np.sqrt(d)


def dense_step(G, B, r, *, mean=True):
    """The official full adjacency, entry by entry: all similarities, minus their mean, over the bank's size."""
    S = G @ B.T
    return unit(G - r / len(B) * (S - (S.mean() if mean else 0.0)) @ B)


def dense_local_step(G, B, r, share, own=None):
    """The official LocalAdj: a dense matrix that is zero but for each row's k largest."""
    S, k = G @ B.T, int(share * len(B))
    A = np.zeros_like(S)
    for i, row in enumerate(S):
        if own is not None and own[i] >= 0:
            row[own[i]] = -np.inf
        best = np.argsort(-row)[:k]
        A[i, best] = row[best]
    return unit(G - r / k * A @ B)


def dense(G, BG, BQ, r_g, r_q, share=None):
    arms = [
        dense_step(G, B, r) if share is None else dense_local_step(G, B, r, share) for B, r in ((BG, r_g), (BQ, r_q))
    ]
    return unit(0.5 * arms[0] + 0.5 * arms[1])


ALL = [
    InverseGraphConvolution(),
    InverseGraphConvolution(mean="gallery"),
    InverseGraphConvolution(mean=None, rate_gallery=1e-6, normalize=False),
    InverseGraphConvolution(adjacency="local", pool_share=0.3, rate_gallery=0.5),
]


def expected_to_fail(estimator):
    found = {}
    if estimator.normalize:
        found["check_estimators_dtypes"] = "its integers hold an all-zero row, which has no direction and is refused"
    if estimator.mean == "gallery":
        found["check_methods_subset_invariance"] = "s0 is the mean over the rows given, as published"
    return found


@parametrize_with_checks(ALL, expected_failed_checks=expected_to_fail)
def test_sklearn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("share", [None, 0.1, 0.34])
@pytest.mark.parametrize(("r_g", "r_q"), [(0.0, 0.7), (1.0, 0.0), (0.4, 0.9)])
def test_agrees_with_the_official_dense_form(share, r_g, r_q):
    G, _ = cone(0, 60)
    BG, BQ = cone(1, 90)
    G, BG, BQ = unit(G), unit(BG), unit(BQ)
    options = {"adjacency": "full", "mean": "gallery"} if share is None else {"adjacency": "local", "pool_share": share}
    fitted = InverseGraphConvolution(r_g, r_q, block_rows=7, **options).fit(BG, queries=BQ)
    np.testing.assert_allclose(fitted.transform(G), dense(G, BG, BQ, r_g, r_q, share), atol=1e-12)
    np.testing.assert_allclose(fitted.transform(G * 3), fitted.transform(G), atol=1e-12)
    narrow = fitted.transform(G.astype(np.float32))
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(narrow, fitted.transform(G), atol=2e-5)


def test_without_a_mean_it_is_the_published_sum_and_without_queries_one_step():
    G, BG = unit(cone(0, 30)[0]), unit(cone(1, 50)[0])
    fitted = InverseGraphConvolution(0.6, mean=None).fit(BG)
    np.testing.assert_allclose(fitted.transform(G), dense_step(G, BG, 0.6, mean=False), atol=1e-12)
    assert fitted.n_bank_query_ == 0


def test_without_scaling_rows_keep_the_length_of_the_step():
    rng = np.random.default_rng(2)
    G, BG, BQ = rng.normal(size=(3, 40, 6))
    fitted = InverseGraphConvolution(0.3, 0.1, mean=None, normalize=False).fit(BG, queries=BQ)
    literal = 0.5 * (G - 0.3 / 40 * G @ BG.T @ BG) + 0.5 * (G - 0.1 / 40 * G @ BQ.T @ BQ)
    np.testing.assert_allclose(fitted.transform(G), literal, atol=1e-12)


@settings(max_examples=25)
@given(n=st.integers(1, 40), a=st.integers(3, 40), d=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_rate_zero_gives_unit_rows_back_bit_for_bit(n, a, d, seed):
    rng = np.random.default_rng(seed)
    for dtype in (np.float32, np.float64):
        G = unit(rng.normal(size=(n, d)).astype(dtype))
        for options in ({}, {"mean": "gallery"}, {"adjacency": "local", "pool_share": 0.5}):
            fitted = InverseGraphConvolution(0, 0, **options).fit(
                rng.normal(size=(a, d)), queries=rng.normal(size=(a, d))
            )
            np.testing.assert_array_equal(fitted.transform(G), G)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), block_rows=st.integers(1, 50), share=st.sampled_from([None, 0.2]))
def test_a_row_is_corrected_alike_alone_in_any_block_and_in_any_order(seed, block_rows, share):
    G, BG = cone(seed, 31)[0], cone(seed + 1, 20)[0]
    options = {} if share is None else {"adjacency": "local", "pool_share": share}
    fitted = InverseGraphConvolution(0.8, block_rows=block_rows, **options).fit(BG)
    whole, order = fitted.transform(G), np.random.default_rng(seed).permutation(31)
    np.testing.assert_allclose(fitted.transform(G[order]), whole[order], atol=1e-12)
    np.testing.assert_allclose(fitted.transform(G[:1]), whole[:1], atol=1e-12)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([None, 0.2]))
def test_turning_all_vectors_turns_the_result(seed, share):
    (G, _), (BG, BQ) = cone(seed, 25), cone(seed + 1, 30)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(12, 12)))[0]
    options = {} if share is None else {"adjacency": "local", "pool_share": share}
    plain = InverseGraphConvolution(0.8, 0.5, **options).fit(BG, queries=BQ).transform(G)
    turned = InverseGraphConvolution(0.8, 0.5, **options).fit(BG @ turn, queries=BQ @ turn).transform(G @ turn)
    np.testing.assert_allclose(turned, plain @ turn, atol=1e-9)


def test_the_affine_step_is_the_step_and_shrinks_by_the_banks_spectrum():
    G, (BG, BQ) = unit(cone(0, 20)[0]), cone(1, 30)
    fitted = InverseGraphConvolution(0.7, 0.4).fit(BG, queries=BQ)
    arms = [unit(G @ M + b) for M, b in map(fitted.affine_step, ("gallery", "query"))]
    np.testing.assert_allclose(fitted.transform(G), unit(arms[0] + arms[1]), atol=1e-12)
    top = np.linalg.eigvalsh(unit(BG).T @ unit(BG) / 30)[-1]
    assert fitted.rate_limit_gallery_ == pytest.approx(1 / top)
    assert np.linalg.eigvalsh(fitted.affine_step()[0])[0] == pytest.approx(1 - 0.7 * top)


def test_banks_gathered_in_parts_equal_one_fit():
    (BG, BQ), G = cone(1, 90), cone(0, 10)[0]
    whole, parts = InverseGraphConvolution().fit(BG, queries=BQ), InverseGraphConvolution()
    for i in range(3):
        parts.partial_fit(BG[i::3], queries=BQ[i::3] if i else None)
    parts.partial_fit(BG[:1], queries=BQ[0::3])
    again = InverseGraphConvolution().fit(np.concatenate([BG, BG[:1]]), queries=BQ)
    np.testing.assert_allclose(parts.transform(G), again.transform(G), atol=1e-12)
    assert (whole.n_bank_gallery_, parts.n_bank_gallery_) == (90, 91)
    parts.fit(BG, queries=BQ)
    np.testing.assert_array_equal(parts.transform(G), whole.transform(G))
    assert not hasattr(InverseGraphConvolution(adjacency="local"), "partial_fit")


def test_a_gallery_in_parts_needs_its_mean_where_the_official_form_takes_it():
    (BG, BQ), G = cone(1, 40), cone(0, 30)[0]
    fitted = InverseGraphConvolution(mean="gallery").fit(BG, queries=BQ)
    mean = unit(G).mean(axis=0)
    parts = [fitted.transform(G[i : i + 10], gallery_mean=mean) for i in (0, 10, 20)]
    np.testing.assert_allclose(np.concatenate(parts), fitted.transform(G), atol=1e-12)
    with pytest.raises(ValueError, match="gallery_mean is for mean='gallery', got mean='bank'"):
        InverseGraphConvolution().fit(BG).transform(G, gallery_mean=mean)
    with pytest.raises(ValueError, match=r"12 finite numbers, got shape \(3,\)"):
        fitted.transform(G, gallery_mean=mean[:3])


def test_an_item_of_the_bank_is_not_pushed_away_from_itself():
    BG = unit(cone(1, 50)[0])
    own = np.where(np.arange(50) % 5 == 0, -1, np.arange(50))
    local = InverseGraphConvolution(0.9, adjacency="local", pool_share=0.1).fit(BG)
    np.testing.assert_allclose(local.transform(BG, own=own), dense_local_step(BG, BG, 0.9, 0.1, own), atol=1e-12)
    full = InverseGraphConvolution(0.9).fit(BG)
    A = BG @ BG.T - np.mean(BG @ BG.T)
    A[own >= 0, own[own >= 0]] = 0
    np.testing.assert_allclose(full.transform(BG, own=own), unit(BG - 0.9 / 50 * A @ BG), atol=1e-12)
    with pytest.raises(ValueError, match=r"own must lie in -1\.\.49"):
        full.transform(BG, own=own + 10)
    with pytest.raises(ValueError, match="own must be 50 whole numbers"):
        full.transform(BG, own=own[:3])


def test_a_saved_correction_corrects_alike(tmp_path):
    (BG, BQ), G = cone(1, 40), cone(0, 10)[0]
    for i, options in enumerate(({}, {"adjacency": "local", "pool_share": 0.2})):
        for j, queries in enumerate((None, BQ)):
            fitted = InverseGraphConvolution(0.7, **options).fit(BG, queries=queries)
            path = fitted.save(tmp_path / f"{i}{j}.safetensors", model="one")
            np.testing.assert_array_equal(InverseGraphConvolution.load(path).transform(G), fitted.transform(G))
    save_fitted(tmp_path / "other.safetensors", kind="OrthogonalMap", arrays={"a": np.ones(2)}, params={})
    with pytest.raises(WrongContent, match="OrthogonalMap"):
        InverseGraphConvolution.load(tmp_path / "other.safetensors")


def recall(queries, gallery):
    return recall_at_k(top_k(queries, gallery, 1).indices, np.arange(len(queries)))


def test_in_a_cone_tuning_finds_a_rate_that_helps_and_flattens_the_hubs():
    common = np.random.default_rng(9).normal(size=12)
    common /= np.linalg.norm(common)
    made = [cone(seed, 300, blur=0.6, common=common) for seed in (1, 2, 3)]
    (BG, BQ), (VG, VQ), (G, Q) = made
    fitted = InverseGraphConvolution().fit(BG, queries=BQ)
    choice = fitted.tune(VG, VQ)
    after = fitted.transform(G)
    assert len(choice.table) == 64
    assert choice.score == choice.table[0].score > max(r.score for r in choice.table if r[:2] == (0.0, 0.0)) + 0.1
    assert (fitted.rate_gallery, fitted.rate_query) == choice[:2]
    assert recall(Q, after) > recall(Q, G) + 0.1
    assert hubness(Q, after).skewness < hubness(Q, G).skewness - 0.3
    direction = unit(BQ).mean(axis=0)
    assert np.std(after @ direction) < 0.8 * np.std(unit(G) @ direction)


def test_without_the_mean_similarity_the_cone_opens_and_with_it_the_mean_stays():
    BG, G = cone(1, 2000)[0], cone(2, 2000)[0]
    before = mean_pairwise_cosine(G)
    opened = InverseGraphConvolution(0.8, mean=None).fit(BG).transform(G)
    assert mean_pairwise_cosine(opened) < before - 0.2
    assert mean_pairwise_cosine(opened, nearest=1) < mean_pairwise_cosine(G, nearest=1)
    M, b = InverseGraphConvolution(0.8).fit(BG).affine_step()
    mean = unit(BG).mean(axis=0)
    assert np.linalg.norm(mean @ M + b - mean) < 0.05 * np.linalg.norm(mean)


def test_tuning_scores_what_transform_gives():
    (BG, BQ), (VG, VQ) = cone(1, 60), cone(2, 40, blur=0.3)
    fitted = InverseGraphConvolution(adjacency="local", pool_share=0.2).fit(BG, queries=BQ)
    choice = fitted.tune(VG, VQ, rates=(0, 0.5), pool_shares=(0.1, 0.5), k=2)
    assert {row.pool_share for row in choice.table} == {0.1, 0.5}
    for row in choice.table:
        fitted.set_params(rate_gallery=row.rate_gallery, rate_query=row.rate_query, pool_share=row.pool_share)
        assert row.score == recall_at_k(top_k(VQ, fitted.transform(VG), 2).indices, np.arange(40))
    alone = InverseGraphConvolution().fit(BG).tune(VG, VQ, rates=(0, 1.0))
    assert [row.rate_query for row in alone.table] == [1.0, 1.0]


def test_any_of_several_right_rows_is_a_hit_and_ties_go_to_no_correction():
    (BG, BQ), (VG, _) = cone(1, 60), cone(2, 40)
    choice = (
        InverseGraphConvolution()
        .fit(BG, queries=BQ)
        .tune(VG, VG[:10], np.stack([np.arange(10, 20), np.arange(10)], axis=1), rates=(0.5, 0.0))
    )
    assert choice[:4] == (0.0, 0.0, None, 1.0)
    with pytest.raises(ValueError, match="rates must hold 0"):
        InverseGraphConvolution().fit(BG).tune(VG, VG, rates=(1.0,))
    with pytest.raises(ValueError, match="relevant must be given for 10 queries and 40"):
        InverseGraphConvolution().fit(BG).tune(VG, VG[:10])
    with pytest.raises(ValueError, match=r"one row a query \(10\), got 3"):
        InverseGraphConvolution().fit(BG).tune(VG, VG[:10], [1, 2, 3])


@settings(max_examples=25)
@given(n=st.integers(2, 30), m=st.integers(1, 30), seed=st.integers(0, 2**32 - 1))
def test_hubness_is_the_skewness_of_the_counts(n, m, seed):
    rng = np.random.default_rng(seed)
    queries, gallery = rng.normal(size=(m, 4)), rng.normal(size=(n, 4))
    found = hubness(queries, gallery, 1)
    counts = np.bincount(np.argmax(unit(queries) @ unit(gallery).T, axis=1), minlength=n)
    np.testing.assert_array_equal(found.occurrences, counts)
    assert found.skewness == pytest.approx(skew(counts) if np.ptp(counts) else 0.0, abs=1e-9)
    assert found.never_share == np.mean(counts == 0)
    assert found.top_share == counts.max() / m


def test_a_hub_is_seen_and_own_rows_are_not():
    gallery = np.eye(200)
    assert hubness(gallery, gallery, 1).skewness == 0.0
    gallery[0] = 1.0
    found = hubness(gallery, gallery, 1, exclude=np.arange(200))
    assert found.occurrences[0] == 199
    assert found.skewness > 10
    assert found.never_share > 0.9
    assert found.top_share > 0.99


@settings(max_examples=25)
@given(n=st.integers(2, 20), m=st.integers(1, 20), seed=st.integers(0, 2**32 - 1), block_rows=st.integers(1, 9))
def test_mean_cosines_equal_the_matrix_of_all_pairs(n, m, seed, block_rows):
    rng = np.random.default_rng(seed)
    X, Y = rng.normal(size=(n, 3)) + 1, rng.normal(size=(m, 3))
    S = unit(X) @ unit(X).T
    off = S[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    assert mean_pairwise_cosine(X, block_rows=block_rows) == pytest.approx(off.mean())
    assert mean_pairwise_cosine(X, nearest=1) == pytest.approx(off.max(axis=1).mean())
    assert mean_pairwise_cosine(X, Y) == pytest.approx((unit(X) @ unit(Y).T).mean())
    assert mean_pairwise_cosine(X, Y, nearest=1) == pytest.approx((unit(X) @ unit(Y).T).max(axis=1).mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adjacency": "knn"}, "adjacency must be 'full' or 'local', got 'knn'"),
        ({"mean": "official"}, "mean must be 'bank', 'gallery' or None, got 'official'"),
        ({"pool_share": 0}, "pool_share must lie above 0 and at most at 1, got 0"),
        ({"pool_share": 1.5}, "pool_share must lie above 0 and at most at 1, got 1.5"),
        ({"block_rows": 0}, "block_rows must be at least 1, got 0"),
        ({"rate_query": -0.5}, "rate_query must be at least 0 (allow_negative=True adds instead), got -0.5"),
        ({"rate_gallery": np.nan}, "rate_gallery must be finite, got nan"),
        ({"adjacency": "local"}, "bank must hold at least 1 / pool_share = 100 rows, got n_samples=50"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    X = cone(0, 50)[0]
    with pytest.raises(ValueError, match=re.escape(message)):
        InverseGraphConvolution(**options).fit(X)


def test_a_negative_rate_pulls_together_where_it_is_allowed():
    G, _ = cone(0, 50)
    pulled = InverseGraphConvolution(-1.0, mean=None, allow_negative=True).fit(G).transform(G)
    assert mean_pairwise_cosine(pulled) > mean_pairwise_cosine(G) + 0.02


def test_a_rate_that_flips_and_grows_the_top_direction_is_warned_of():
    G, _ = cone(0, 50)
    limit = InverseGraphConvolution().fit(G).rate_limit_gallery_
    InverseGraphConvolution(1.9 * limit).fit(G)
    with pytest.warns(UserWarning, match="rate_gallery=.* above twice its limit"):
        InverseGraphConvolution(2.1 * limit).fit(G)


def test_rows_that_have_no_direction_are_named():
    G, BG = np.eye(4), np.eye(4)
    G[2] = 0
    with pytest.raises(ValueError, match="X must have no all-zero row when normalize=True, got one at row 2"):
        InverseGraphConvolution(block_rows=2).fit(BG).transform(G)
    with pytest.raises(ValueError, match="X must have no all-zero row"):
        InverseGraphConvolution().fit(G)
    with pytest.raises(ValueError, match="X must have no all-zero row, got one at row 2"):
        mean_pairwise_cosine(G)


def test_a_row_that_is_taken_away_whole_is_named_and_own_mends_it():
    B = np.eye(4)
    fitted = InverseGraphConvolution(adjacency="local", pool_share=0.25).fit(B)
    with pytest.raises(ValueError, match="rate_gallery must leave something of every row, got nothing at row 0"):
        fitted.transform(B)
    np.testing.assert_allclose(fitted.transform(B, own=np.arange(4)), B)
    with pytest.raises(ValueError, match="rate_gallery must leave something"):
        InverseGraphConvolution(mean=None).fit(np.ones((5, 3))).transform(np.ones((1, 3)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_and_other_widths_are_refused(bad):
    X, Q = cone(0, 10)
    spoilt = Q.copy()
    spoilt[3, 1] = bad
    with pytest.raises(ValueError, match=r"queries contains (NaN|infinity)"):
        InverseGraphConvolution().fit(X, queries=spoilt)
    with pytest.raises(ValueError, match="queries must have 12 features like X, got 5"):
        InverseGraphConvolution().fit(X, queries=Q[:, :5])
    with pytest.raises(ValueError, match="expecting 12 features"):
        InverseGraphConvolution().fit(X).transform(X[:, :5])
    with pytest.raises(ValueError, match="Y must have 12 features"):
        mean_pairwise_cosine(X, Q[:, :5])
    with pytest.raises(ValueError, match="at least 2 rows to pair, got 1"):
        mean_pairwise_cosine(X[:1])
    with pytest.raises(ValueError, match="side must be a bank"):
        InverseGraphConvolution().fit(X).affine_step("query")


def test_equal_rows_stay_equal_and_one_row_in_one_dimension_works():
    G = np.repeat(cone(0, 1)[0], 5, axis=0)
    made = InverseGraphConvolution().fit(cone(1, 30)[0]).transform(G)
    # To rounding: products of matrices may take the last rows of a block by other instructions.
    np.testing.assert_allclose(made, made[:1].repeat(5, axis=0), rtol=1e-14)
    np.testing.assert_array_equal(
        InverseGraphConvolution(0.25).fit([[3.0]]).transform([[2.0], [-4.0]]), [[1.0], [-1.0]]
    )


def test_memory_does_not_grow_with_the_square_of_the_gallery():
    from polyspan.run import measure_peak

    rng = np.random.default_rng(0)
    B = rng.standard_normal((500, 16), dtype=np.float32)
    G = rng.standard_normal((60_000, 16), dtype=np.float32)
    for options in ({}, {"adjacency": "local", "pool_share": 0.05}):
        fitted = InverseGraphConvolution(**options).fit(B)
        peak = measure_peak(lambda fitted=fitted: fitted.transform(G)).peak_bytes
        assert peak < 2**26, f"{peak / 2**20:.0f} MiB for a gallery of 4 MiB"
