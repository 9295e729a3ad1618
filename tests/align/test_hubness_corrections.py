import re
import tracemalloc
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import issparse
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.align import (
    CSLS,
    AllButTheTop,
    Centering,
    DualBankNormalization,
    InverseGraphConvolution,
    QueryBankNormalization,
)
from polyspan.errors import WrongContent
from polyspan.io import save_fitted
from polyspan.linalg import top_k


def unit(X):
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def made(seed, d=6, sizes=(31, 17, 23, 12)):
    """A gallery, queries, and a bank of each kind, about one direction."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, d)) + 0.3 for n in sizes]


def literal_softmax(Q, G, B, beta):
    """The published ratio, entry by entry: exp(beta s) over its sum for the bank."""
    return np.exp(beta * Q @ G.T) / np.exp(beta * B @ G.T).sum(axis=0)


def literal_dynamic(Q, G, B, beta, k):
    """The published form row by row, by its logarithm: rows whose first item is no bank query's stay as they are."""
    s, found = Q @ G.T, {int(j) for row in B @ G.T for j in np.argsort(-row, kind="stable")[:k]}
    soft = np.log(literal_softmax(Q, G, B, beta))
    return np.array([soft[i] if int(np.argmax(row)) in found else row for i, row in enumerate(s)])


def literal_csls(Q, G, BG, BQ, k):
    """The published scaling, pair by pair."""
    s = np.empty((len(Q), len(G)))
    for i, q in enumerate(Q):
        for j, g in enumerate(G):
            s[i, j] = 2 * q @ g - np.sort(BQ @ g)[-k:].mean() - np.sort(BG @ q)[-k:].mean()
    return s


def literal_top(X, bank, n):
    """The published postprocessing: mean and the first n right singular vectors of the centred bank."""
    mean = bank.mean(axis=0)
    V = np.linalg.svd(bank - mean, full_matrices=False)[2][:n]
    return unit(X - mean - ((X - mean) @ V.T) @ V)


LITERAL = {
    "inverted softmax": (
        QueryBankNormalization(7.0, dynamic=False),
        lambda Q, G, BG, BQ: np.log(literal_softmax(Q, G, BQ, 7.0)),
    ),
    "dynamic": (QueryBankNormalization(7.0, n_nearest=2), lambda Q, G, BG, BQ: literal_dynamic(Q, G, BQ, 7.0, 2)),
    "dual": (
        DualBankNormalization(3.0, 5.0),
        lambda Q, G, BG, BQ: np.log(literal_softmax(Q, G, BQ, 3.0) * literal_softmax(Q, G, BG, 5.0)),
    ),
    "CSLS": (CSLS(4), lambda Q, G, BG, BQ: literal_csls(Q, G, BG, BQ, 4)),
}
SCORED = [CSLS(3), DualBankNormalization(), QueryBankNormalization(), QueryBankNormalization(dynamic=False)]
VECTORS = [Centering(), AllButTheTop(2)]
OFF = {
    CSLS: {"n_neighbors": None},
    DualBankNormalization: {"beta_query": None, "beta_gallery": None},
    QueryBankNormalization: {"beta": None},
    Centering: {"sides": None},
    AllButTheTop: {"sides": None},
}


def turned(X):
    """Rows in another order; what is no matrix of numbers stays, to be refused."""
    return np.asarray(X)[::-1] if np.ndim(X) == 2 and not issparse(X) else X


class OneBankCSLS(CSLS):
    """Scikit-learn's checks have no bank of queries to give: the bank itself stands for it."""

    def fit(self, X, y=None):
        return super().fit(X, queries=turned(X))


class OneBankDual(DualBankNormalization):
    def fit(self, X, y=None):
        return super().fit(X, queries=turned(X))


class OneBankQueries(QueryBankNormalization):
    def fit(self, X, y=None):
        return super().fit(X, queries=turned(X))


CHECKED = [
    Centering(),
    Centering(normalize=False),
    AllButTheTop(1),
    AllButTheTop(1, normalize=False),
    Centering(sides=None),
]


def expected_to_fail(estimator):
    found = {}
    if getattr(estimator, "normalize", False):
        found["check_estimators_dtypes"] = "its integers hold an all-zero row, which has no direction and is refused"
    return found


@parametrize_with_checks(CHECKED, expected_failed_checks=expected_to_fail)
def test_sklearn_contract(estimator, check):
    check(estimator)


PAIRED = dict.fromkeys(
    ("check_fit_score_takes_y", "check_pipeline_consistency", "check_n_features_in_after_fitting"),
    "score() compares queries with a gallery, by pairs: it takes no y and gives no one number",
)


@parametrize_with_checks(
    [OneBankCSLS(1, normalize=False), OneBankDual(normalize=False), OneBankQueries(normalize=False)],
    expected_failed_checks=lambda _: PAIRED,
)
def test_sklearn_contract_of_corrections_of_scores(estimator, check):
    check(estimator)


def of(kind):
    return type(kind).__name__ + str(getattr(kind, "dynamic", ""))


@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("block_rows", [7, 2048])
def test_blocks_equal_the_published_formula_entry_by_entry(name, block_rows):
    correction, formula = LITERAL[name]
    for normalize in (True, False):
        G, Q, BG, BQ = (0.6 * rows for rows in made(3))
        fitted = clone(correction).set_params(block_rows=block_rows, normalize=normalize).fit(BG, queries=BQ)
        expected = formula(*(map(unit, (Q, G, BG, BQ)) if normalize else (Q, G, BG, BQ)))
        found = fitted.score(Q, G)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        order = np.argsort(-expected, axis=1, kind="stable")[:, :9]
        best = fitted.retrieve(Q, G, 9)
        np.testing.assert_array_equal(best.indices, order)
        np.testing.assert_array_equal(best.scores, np.take_along_axis(found, order, axis=1))
        again = fitted.retrieve(Q, G, 9, offsets=fitted.measure_gallery(G))
        np.testing.assert_array_equal(again.indices, best.indices)
        np.testing.assert_array_equal(again.scores, best.scores)
        narrow = fitted.score(Q.astype(np.float32), G.astype(np.float32))
        assert narrow.dtype == np.float32
        np.testing.assert_allclose(narrow, found, rtol=1e-4, atol=1e-4)


def test_the_dynamic_form_has_rows_of_both_kinds_there():
    G, Q, _, BQ = map(unit, made(3))
    dynamic = literal_dynamic(Q, G, BQ, 7.0, 2)
    plain = [np.array_equal(row, s) for row, s in zip(dynamic, Q @ G.T, strict=True)]
    assert 0 < sum(plain) < len(plain)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    block_rows=st.sampled_from([6, 13, 40]),
    which=st.integers(0, 3),
    k=st.integers(1, 31),
)
def test_retrieving_is_ordering_the_whole_matrix(seed, block_rows, which, k):
    G, Q, BG, BQ = made(seed)
    fitted = clone(SCORED[which]).set_params(block_rows=block_rows).fit(BG, queries=BQ)
    scores, found = fitted.score(Q, G), fitted.retrieve(Q, G, k)
    np.testing.assert_array_equal(found.indices, np.argsort(-scores, axis=1, kind="stable")[:, :k])
    np.testing.assert_array_equal(found.scores, -np.sort(-scores, axis=1)[:, :k])


def test_a_large_temperature_does_not_overflow():
    G, Q, BG, BQ = made(1)
    fitted = QueryBankNormalization(1e4, dynamic=False, normalize=False, block_rows=4).fit(BG, queries=BQ)
    expected = 1e4 * Q @ G.T - logsumexp(1e4 * BQ @ G.T, axis=0)
    np.testing.assert_allclose(fitted.score(Q, G), expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("correction", [*SCORED, *VECTORS], ids=of)
def test_none_leaves_everything_as_it_is(correction):
    G, Q, BG, BQ = made(2)
    fitted = clone(correction).set_params(**OFF[type(correction)]).fit(BG, queries=BQ)
    plain = top_k(Q, G, 5)
    np.testing.assert_array_equal(fitted.retrieve(Q, G, 5).indices, plain.indices)
    if hasattr(fitted, "score"):
        np.testing.assert_allclose(fitted.score(Q, G), unit(Q) @ unit(G).T, atol=1e-12)
    else:
        np.testing.assert_array_equal(fitted.transform(unit(G)), unit(G))
        np.testing.assert_array_equal(fitted.transform_queries(unit(Q)), unit(Q))


@pytest.mark.parametrize("block_rows", [3, 2048])
def test_centring_and_all_but_the_top_equal_their_formulas(block_rows):
    G, Q, BG, BQ = map(unit, made(4))
    for sides, n in product(("both", "gallery"), (0, 1, 3)):
        made_by = AllButTheTop(n, sides=sides, block_rows=block_rows) if n else Centering(sides=sides)
        fitted = made_by.fit(2 * BG, queries=3 * BQ)
        expected = literal_top(G, BG, n), literal_top(Q, BQ, n) if sides == "both" else Q
        np.testing.assert_allclose(fitted.transform(5 * G), expected[0], atol=1e-12)
        np.testing.assert_allclose(fitted.transform_queries(5 * Q), expected[1], atol=1e-12)
        order = np.argsort(-expected[1] @ expected[0].T, axis=1)[:, :4]
        np.testing.assert_array_equal(fitted.retrieve(Q, G, 4).indices, order)
        narrow = fitted.transform(G.astype(np.float32))
        assert narrow.dtype == np.float32
        np.testing.assert_allclose(narrow, expected[0], atol=2e-5)


def test_components_and_sides_are_read_at_each_use():
    G, _, BG, BQ = map(unit, made(4))
    fitted = AllButTheTop(1).fit(BG, queries=BQ).set_params(n_components=3, sides="gallery")
    np.testing.assert_allclose(fitted.transform(G), literal_top(G, BG, 3), atol=1e-12)
    assert AllButTheTop().fit(np.random.default_rng(0).normal(size=(300, 251)))._n_taken() == 3


def test_without_scaling_vectors_keep_the_length_that_is_left():
    G, Q, BG, BQ = made(4)
    fitted = Centering(normalize=False).fit(BG, queries=BQ)
    np.testing.assert_allclose(fitted.transform(G), G - BG.mean(axis=0), atol=1e-12)
    near = np.argsort(-(Q - BQ.mean(axis=0)) @ (G - BG.mean(axis=0)).T, axis=1)[:, :3]
    np.testing.assert_array_equal(fitted.retrieve(Q, G, 3).indices, near)


def test_without_a_bank_of_queries_only_a_gallery_is_corrected():
    G, Q, BG, _ = made(4)
    fitted = Centering().fit(BG)
    np.testing.assert_allclose(fitted.transform(G), literal_top(unit(G), unit(BG), 0), atol=1e-12)
    with pytest.raises(ValueError, match="queries must be given to fit for sides='both', got no bank of queries"):
        fitted.retrieve(Q, G, 3)
    assert fitted.set_params(sides="gallery").retrieve(Q, G, 3).indices.shape == (17, 3)
    choice = fitted.tune(G, Q, np.zeros(17, dtype=int))
    assert {row.params["sides"] for row in choice.table} == {"gallery", None}
    for correction in SCORED:
        with pytest.raises(ValueError, match=r"queries must be given: .* needs a bank of queries, got None"):
            clone(correction).fit(BG)


@pytest.mark.parametrize("correction", SCORED, ids=of)
def test_candidates_of_an_index_are_ordered_as_a_search_of_all_would_order_them(correction):
    G, Q, BG, BQ = map(unit, made(5))
    fitted = clone(correction).fit(BG, queries=BQ)
    offsets, everything = fitted.measure_gallery(G), fitted.retrieve(Q, G, 31)
    found = fitted.rerank(Q, top_k(Q, G, 31), offsets, k=6)
    np.testing.assert_array_equal(found.indices, everything.indices[:, :6])
    np.testing.assert_allclose(found.scores, everything.scores[:, :6], atol=1e-12)
    few = fitted.rerank(Q, top_k(Q, G, 8), offsets)
    for mine, all_of_them, kept in zip(few.indices, everything.indices, top_k(Q, G, 8).indices, strict=True):
        assert mine.tolist() == [j for j in all_of_them if j in set(kept)]


def test_an_index_of_inner_products_can_hold_the_offsets():
    G, Q, BG, BQ = map(unit, made(6))
    for correction in (CSLS(3), DualBankNormalization(), QueryBankNormalization(dynamic=False)):
        fitted = correction.fit(BG, queries=BQ)
        weight, offsets, active = fitted.measure_gallery(G)
        held, asked = np.column_stack([G, -offsets / weight]), np.column_stack([Q, np.ones(len(Q))])
        assert active is None
        np.testing.assert_array_equal(top_k(asked, held, 7, metric="dot").indices, fitted.retrieve(Q, G, 7).indices)


def hubs(seed, n=120, d=12):
    """Twins, of which the gallery's are more or less like every query: a gallery, its queries, and banks."""
    rng = np.random.default_rng(seed)
    direction = np.ones(d) / np.sqrt(d)

    def views(size):
        items = rng.normal(size=(size, d)) / np.sqrt(d)
        blur = 0.3 * rng.normal(size=(2, size, d)) / np.sqrt(d)
        return items + blur[0] + 0.5 * rng.normal(size=(size, 1)) * direction, items + blur[1] + 1.5 * direction

    return [*views(n), *views(2 * n)]


@pytest.mark.parametrize("correction", [*SCORED, *VECTORS], ids=of)
def test_tuning_tries_no_correction_scores_what_retrieving_gives_and_helps_where_hubs_are(correction):
    G, Q, BG, BQ = hubs(0)
    fitted = clone(correction).fit(BG, queries=BQ)
    choice = fitted.tune(G, Q)
    off = next(row for row in choice.table if all(row.params.get(k) is None for k in OFF[type(correction)]))
    assert off.score == np.mean(top_k(Q, G, 1).indices[:, 0] == np.arange(120))
    assert choice.score == choice.table[0].score >= off.score + 0.1
    for name, value in choice.params.items():
        assert getattr(fitted, name) == value
    for row in choice.table:
        found = clone(correction).set_params(**row.params).fit(BG, queries=BQ).retrieve(Q, G, 1).indices[:, 0]
        assert row.score == np.mean(found == np.arange(120))


@pytest.mark.parametrize("correction", [*SCORED, *VECTORS], ids=of)
def test_equal_scores_go_to_no_correction_and_a_grid_must_hold_it(correction):
    G, _, BG, BQ = hubs(1)
    fitted = clone(correction).fit(BG, queries=BQ)
    # Both rows of each answer are right, so that every setting finds all.
    choice = fitted.tune(G, G[:10], np.tile(np.arange(120), (10, 1)))
    assert choice.score == 1.0
    assert all(choice.params[name] is None for name in OFF[type(correction)])
    before = fitted.get_params()
    name, value = next(iter(OFF[type(correction)])), {"sides": "both", "n_neighbors": 3}
    wrong = {key: [value.get(key, 2.0)] for key in OFF[type(correction)]}
    with pytest.raises(ValueError, match=rf"grid must hold {name}=None.*, which is no correction, got"):
        fitted.tune(G, G, grid=wrong)
    with pytest.raises(ValueError, match=r"grid must name parameters among .*, got 'block_rows'"):
        fitted.tune(G, G, grid={"block_rows": [None]})
    with pytest.raises(ValueError, match=f"grid must give a sequence of values for {name}, got 'both'"):
        fitted.tune(G, G, grid={name: "both"})
    with pytest.raises(ValueError, match=f"{name} must "):
        fitted.tune(G, G, grid={name: [None, -1]})
    with pytest.raises(ValueError, match="relevant must be given for 10 queries and 120"):
        fitted.tune(G, G[:10])
    assert fitted.get_params() == before


def test_any_right_row_in_the_first_k_is_a_hit():
    G, Q, BG, BQ = hubs(2)
    relevant = np.stack([np.arange(120), (np.arange(120) + 1) % 120], axis=1)
    choice = CSLS().fit(BG, queries=BQ).tune(G, Q, relevant, k=3, grid=[{"n_neighbors": [None]}, {"n_neighbors": [2]}])
    for row in choice.table:
        found = CSLS(row.params["n_neighbors"]).fit(BG, queries=BQ).retrieve(Q, G, 3).indices
        assert row.score == np.mean([bool(set(f) & set(r)) for f, r in zip(found, relevant, strict=True)])


@pytest.mark.parametrize("correction", [*SCORED, *VECTORS], ids=of)
def test_a_saved_correction_corrects_alike(correction, tmp_path):
    G, Q, BG, BQ = made(7)
    fitted = clone(correction).fit(BG, queries=BQ)
    path = fitted.save(tmp_path / "fit.safetensors", model="one")
    found, expected = type(correction).load(path).retrieve(Q, G, 4), fitted.retrieve(Q, G, 4)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.scores, expected.scores)
    save_fitted(tmp_path / "other.safetensors", kind="OrthogonalMap", arrays={"a": np.ones(2)}, params={})
    with pytest.raises(WrongContent, match="OrthogonalMap"):
        type(correction).load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("correction", SCORED, ids=of)
def test_banks_of_one_row_of_equal_rows_and_of_the_gallery_itself_give_finite_scores(correction):
    G, Q, BG, BQ = made(8)
    few = {"n_neighbors": 1} if isinstance(correction, CSLS) else {}
    for bank, asked in ((BG[:1], BQ[:1]), (np.ones((4, 6)), np.tile(BQ[:1], (5, 1))), (G, Q), (-BG, 1e-3 * BQ)):
        fitted = clone(correction).set_params(**few).fit(bank, queries=asked)
        scores = fitted.score(Q, G)
        assert np.isfinite(scores).all()
        assert np.ptp(scores) > 0.1
    # Of equal rows it is their number that counts, not how they are cut: a bank given twice ranks as given once.
    once, twice = (
        clone(correction).set_params(**few).fit(BG, queries=np.repeat(BQ, n, axis=0)).retrieve(Q, G, 31).indices
        for n in (1, 2)
    )
    np.testing.assert_array_equal(once, twice)


def test_vectors_lose_nothing_to_a_bank_of_one_row_but_that_row():
    G, _, BG, _ = map(unit, made(8))
    np.testing.assert_allclose(Centering().fit(BG[:1]).transform(G), unit(G - BG[:1]), atol=1e-12)
    np.testing.assert_allclose(Centering().fit(np.tile(BG[:1], (9, 1))).transform(G), unit(G - BG[:1]), atol=1e-12)
    with pytest.raises(ValueError, match="X must leave something of every row, got nothing at row 0; what the bank"):
        Centering().fit(BG[:1]).transform(BG)
    with pytest.raises(
        ValueError, match=r"at most the 0 directions that the gallery bank spans .*n_samples=1\), got 1"
    ):
        AllButTheTop().fit(BG[:1])
    with pytest.raises(ValueError, match=r"at most the 0 directions that the gallery bank spans"):
        AllButTheTop().fit(np.tile(BG[:1], (9, 1)))
    with pytest.raises(ValueError, match=r"at most the 2 directions that the query bank spans .*n_samples=3\), got 3"):
        AllButTheTop(3).fit(BG, queries=G[:3])
    assert AllButTheTop(3, sides="gallery").fit(BG, queries=G[:3]).directions_query_.shape == (2, 6)
    with pytest.raises(ValueError, match="n_components must be below the width, n_features=6, got 6"):
        AllButTheTop(6).fit(BG)
    flat = AllButTheTop(sides=None).fit(np.tile(BG[:1], (9, 1)), queries=BG)
    assert flat.tune(G, G).params == {"sides": None}


@pytest.mark.parametrize("correction", [*SCORED, *VECTORS], ids=of)
def test_rows_without_a_direction_or_a_number_and_other_widths_are_refused(correction):
    G, Q, BG, BQ = made(9)
    for name, place in (("X", 0), ("queries", 1)):
        banks = [BG.copy(), BQ.copy()]
        banks[place][3] = 0
        with pytest.raises(ValueError, match=f"{name} must have no all-zero row when normalize=True, got one at row 3"):
            clone(correction).fit(banks[0], queries=banks[1])
        for bad in (np.nan, np.inf):
            banks[place][3] = bad
            with pytest.raises(ValueError, match=r"(X|queries) contains (NaN|infinity)|Input X contains"):
                clone(correction).fit(banks[0], queries=banks[1])
    with pytest.raises(ValueError, match="queries must have 6 features like X, got 4"):
        clone(correction).fit(BG, queries=BQ[:, :4])
    with pytest.warns(UserWarning, match="queries are the rows of X"):
        clone(correction).fit(BG, queries=BG.copy())
    fitted = clone(correction).set_params(block_rows=2).fit(BG, queries=BQ)
    for place, name in ((0, "queries"), (1, "gallery")):
        given = [Q.copy(), G.copy()]
        given[place] = given[place][:, :2]
        with pytest.raises(ValueError, match=f"{name} must have 6 features like the banks, got 2"):
            fitted.retrieve(*given, 3)
        given = [Q.copy(), G.copy()]
        given[place][5] = 0
        with pytest.raises(ValueError, match=f"{name} must have no all-zero row when normalize=True, got one at row 5"):
            fitted.retrieve(*given, 3)
        given[place][5] = np.nan
        with pytest.raises(ValueError, match=f"{name} contains NaN"):
            fitted.retrieve(*given, 3)
    with pytest.raises(ValueError, match=r"k must be between 1 and 31, got 32"):
        fitted.retrieve(Q, G, 32)
    with pytest.raises(ValueError, match="normalize must be True, as fitted, got False: fit anew"):
        fitted.set_params(normalize=False).retrieve(Q, G, 3)


@pytest.mark.parametrize(
    ("correction", "message"),
    [
        (QueryBankNormalization(0.0), "beta must be finite and above 0, or None, got 0.0"),
        (QueryBankNormalization(np.inf), "beta must be finite and above 0, or None, got inf"),
        (QueryBankNormalization("x"), "beta must be finite and above 0, or None, got 'x'"),
        (QueryBankNormalization(n_nearest=0), "n_nearest must be at least 1, got 0"),
        (QueryBankNormalization(dynamic="yes"), "dynamic must be True or False, got 'yes'"),
        (QueryBankNormalization(normalize=2), "normalize must be True or False, got 2"),
        (DualBankNormalization(-1.0), "beta_query must be finite and above 0, or None, got -1.0"),
        (DualBankNormalization(beta_gallery=True), "beta_gallery must be finite and above 0, or None, got True"),
        (CSLS(0), "n_neighbors must be at least 1, got 0"),
        (CSLS(2.5), "n_neighbors must be a whole number, got 2.5"),
        (CSLS(24), "n_neighbors must be at most the rows of the smaller bank, n_samples=12, got 24"),
        (CSLS(block_rows=0), "block_rows must be at least 1, got 0"),
        (Centering(sides="query"), "sides must be 'both', 'gallery' or None, got 'query'"),
        (AllButTheTop(0), "n_components must be at least 1, got 0"),
    ],
)
def test_parameters_out_of_range_are_refused(correction, message):
    _, _, BG, BQ = made(0)
    with pytest.raises(ValueError, match=re.escape(message)):
        correction.fit(BG, queries=BQ)


def test_what_does_not_belong_together_is_refused():
    G, Q, BG, BQ = map(unit, made(0))
    fitted = CSLS(3).fit(BG, queries=BQ)
    offsets, found = fitted.measure_gallery(G), top_k(Q, G, 5)
    with pytest.raises(ValueError, match="offsets must be those of the gallery's 30 rows, got 31"):
        fitted.retrieve(Q, G[:30], 3, offsets=offsets)
    with pytest.raises(ValueError, match="found must hold indices and scores"):
        fitted.rerank(Q[:3], found, offsets)
    with pytest.raises(ValueError, match=r"found must hold rows of the gallery, 0\.\.30, got int64 from 1\d\d"):
        fitted.rerank(Q, found._replace(indices=found.indices + 100), offsets)
    with pytest.raises(ValueError, match="found must hold finite scores"):
        fitted.rerank(Q, found._replace(scores=found.scores * np.nan), offsets)
    with pytest.raises(ValueError, match="k must be between 1 and 5, got 6"):
        fitted.rerank(Q, found, offsets, k=6)
    large = QueryBankNormalization(normalize=False).fit(1e130 * BG, queries=1e130 * BQ)
    with pytest.raises(ValueError, match="gallery must have finite products with the banks, got other ones at row 0"):
        large.set_params(beta=1e60).score(Q, 1e130 * G)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_banks_are_the_estimators_own(normalize):
    G, Q, BG, BQ = map(unit, made(0))
    fitted = CSLS(3, normalize=normalize).fit(BG, queries=BQ)
    before = fitted.score(Q, G)
    BG[:], BQ[:] = 1.0, 1.0
    np.testing.assert_array_equal(fitted.score(Q, G), before)


def test_the_inverse_graph_retrieves_what_its_transform_gives():
    G, Q, BG, BQ = made(1)
    fitted = InverseGraphConvolution(0.7, 0.2).fit(BG, queries=BQ)
    found, expected = fitted.retrieve(Q, G, 4), top_k(unit(Q), fitted.transform(G), 4)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-12)
    with pytest.raises(ValueError, match="queries must have no all-zero row"):
        fitted.retrieve(0 * Q, G, 4)


def peak_of(run):
    """The most bytes that a call holds at once, however short."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_product_of_queries_and_gallery():
    rng = np.random.default_rng(0)
    G, Q = (rng.standard_normal((2_000, 8), dtype=np.float32) for _ in range(2))
    B = rng.standard_normal((300, 8), dtype=np.float32)
    for correction in (QueryBankNormalization(), CSLS(), Centering()):
        fitted = correction.set_params(block_rows=400).fit(B, queries=B[::-1])
        assert peak_of(lambda fitted=fitted: fitted.retrieve(Q, G, 5)) < 2**23
    dual = DualBankNormalization(block_rows=400).fit(B, queries=B[::-1])
    assert peak_of(lambda: dual.tune(G, Q, grid={"beta_query": [None, 5.0], "beta_gallery": [None]})) < 2**23
    # All scores at once, as a search through the whole matrix would hold them.
    assert peak_of(lambda: CSLS(1).fit(B, queries=B[::-1]).score(Q, G)) > 2000 * 2000 * 4
