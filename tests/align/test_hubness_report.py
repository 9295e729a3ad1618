import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, skew

from polyspan.align import CSLS, AllButTheTop, Centering, InverseGraphConvolution, QueryBankNormalization, hubness
from polyspan.align.inverse_graph_plots import plot_corrections
from polyspan.align.retrieval_report import (
    compare_corrections,
    default_corrections,
    evaluate_retrieval,
    evaluate_scores,
    reversed_relevant,
)


def unit(X):
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def literal_ranks(scores, relevant):
    """Rank of each query's best answer: wrong rows that score more, and half of the wrong ones that score the same."""
    found = []
    for row, right in zip(scores, relevant, strict=True):
        answers = {int(j) for j in np.atleast_1d(right) if j >= 0}
        if answers:
            best = max(row[j] for j in answers)
            wrong = np.array([value for j, value in enumerate(row) if j not in answers])
            found.append(1 + np.sum(wrong > best) + np.sum(wrong == best) / 2)
    return np.array(found)


@settings(max_examples=25)
@given(m=st.integers(1, 12), n=st.integers(1, 15), r=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_recall_and_ranks_equal_a_count_by_hand_with_ties_and_several_answers(m, n, r, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, size=(m, n)).astype(float)
    relevant = rng.integers(-1, n, size=(m, r))
    relevant[0, 0] = rng.integers(n)
    found, ranks = evaluate_scores(scores, relevant, ks=(1, 3), hub_k=2), literal_ranks(scores, relevant)
    assert found.n_queries == len(ranks)
    assert found.recall == {1: np.mean(ranks <= 1), 3: np.mean(ranks <= 3)}
    assert found.mean_rank == pytest.approx(ranks.mean())
    assert found.median_rank == np.median(ranks)


def test_one_answer_has_the_average_rank_of_its_ties():
    scores = np.random.default_rng(0).integers(0, 4, size=(30, 30)).astype(float)
    expected = np.diag(rankdata(-scores, axis=1))
    assert evaluate_scores(scores).mean_rank == pytest.approx(expected.mean())
    equal = evaluate_scores(np.ones((8, 8)))
    assert equal.recall == {1: 0.0, 5: 1.0, 10: 1.0}
    assert equal.mean_rank == 4.5


@pytest.mark.parametrize("block_rows", [7, 2048])
def test_a_search_by_blocks_reports_what_the_matrix_of_cosines_does(block_rows):
    rng = np.random.default_rng(1)
    G, Q = rng.normal(size=(40, 6)) + 0.5, rng.normal(size=(25, 6)) + 0.5
    relevant = rng.integers(40, size=(25, 2))
    found = evaluate_retrieval(Q, G, relevant, block_rows=block_rows)
    expected = evaluate_scores(unit(Q) @ unit(G).T, relevant)
    assert found[:3] == expected[:3]
    np.testing.assert_array_equal(found.hubness.occurrences, hubness(Q, G).occurrences)
    assert found.hubness.skewness == pytest.approx(skew(found.hubness.occurrences))


def test_equal_rows_tie_in_every_block():
    Q = np.random.default_rng(2).normal(size=(3, 5))
    G = np.tile(np.random.default_rng(3).normal(size=(1, 5)), (48, 1))
    found = evaluate_retrieval(Q, G, [0, 20, 47], block_rows=16)
    assert found.mean_rank == 24.5
    assert found.recall == {1: 0.0, 5: 0.0, 10: 0.0}


def test_captions_find_their_image_and_images_any_of_their_captions():
    rng = np.random.default_rng(4)
    images = rng.normal(size=(20, 8))
    image_of = np.repeat(np.arange(20), 5)
    captions = images[image_of] + 0.9 * rng.normal(size=(100, 8))
    there = evaluate_retrieval(captions, images, image_of)
    back = evaluate_retrieval(images, captions, reversed_relevant(image_of, 20))
    S = unit(captions) @ unit(images).T
    assert (there.n_queries, back.n_queries) == (100, 20)
    assert there.recall[1] == np.mean(S.argmax(axis=1) == image_of)
    assert back.recall[1] == np.mean(image_of[S.argmax(axis=0)] == np.arange(20))
    assert back.recall[1] > there.recall[1]
    order = np.argsort(-S.T, axis=1)
    assert back.median_rank == np.median([1 + np.argmax(image_of[row] == i) for i, row in enumerate(order)])


def test_the_way_back_of_answers_holds_every_pair_once():
    relevant = np.array([[2, 2], [0, -1], [2, 0], [-1, -1]])
    np.testing.assert_array_equal(reversed_relevant(relevant, 4), [[1, 2], [-1, -1], [0, 2], [-1, -1]])
    np.testing.assert_array_equal(reversed_relevant([3, 1], 4), [[-1], [1], [-1], [0]])
    with pytest.raises(ValueError, match=r"relevant must hold rows of the gallery, 0\.\.3, or -1"):
        reversed_relevant([4], 4)


def banks(seed, d=12):
    rng = np.random.default_rng(seed)
    direction = np.ones(d) / np.sqrt(d)

    def views(n):
        items = rng.normal(size=(n, d)) / np.sqrt(d)
        blur = 0.3 * rng.normal(size=(2, n, d)) / np.sqrt(d)
        return items + blur[0] + 0.5 * rng.normal(size=(n, 1)) * direction, items + blur[1] + 1.5 * direction

    return [*views(120), *views(90)]


def test_any_correction_is_reported_by_its_own_scores():
    G, Q, BG, BQ = banks(0)
    for correction in (CSLS(3), QueryBankNormalization(dynamic=False)):
        fitted = correction.fit(BG, queries=BQ)
        assert evaluate_retrieval(Q, G, correction=fitted)[:3] == evaluate_scores(fitted.score(Q, G))[:3]
    for correction in (Centering(), AllButTheTop(2)):
        fitted = correction.fit(BG, queries=BQ)
        expected = evaluate_scores(fitted.transform_queries(Q) @ fitted.transform(G).T)
        assert evaluate_retrieval(Q, G, correction=fitted)[:3] == expected[:3]
    fitted = InverseGraphConvolution(1.0, 0.5).fit(BG, queries=BQ)
    assert evaluate_retrieval(Q, G, correction=fitted)[:3] == evaluate_scores(unit(Q) @ fitted.transform(G).T)[:3]
    with pytest.raises(ValueError, match="correction must be a fitted correction of hubness, got int"):
        evaluate_retrieval(Q, G, correction=3)


def test_every_correction_is_tuned_on_one_half_and_measured_on_the_other():
    G, Q, BG, BQ = banks(1)
    rows = compare_corrections(BG, BQ, G, Q, random_state=0)
    assert [row.name for row in rows] == ["no correction", *default_corrections(90, 90)]
    assert [row.changes for row in rows] == ["nothing"] + 4 * ["vectors"] + 4 * ["scores"]
    order = np.random.RandomState(0).permutation(120)
    tuning, held = np.sort(order[:60]), np.sort(order[60:])
    assert rows[0].report[:3] == evaluate_retrieval(Q[held], G, held)[:3]
    for row in rows[1:]:
        estimator, options = default_corrections(90, 90)[row.name]
        choice = estimator.fit(BG, queries=BQ).tune(G, Q[tuning], tuning, **options)
        assert row.tuned == choice.score == choice.table[0].score
        for name, value in row.params.items():
            assert getattr(estimator, name) == value
        again = evaluate_retrieval(Q[held], G, held, correction=estimator)
        assert row.report[:3] == again[:3]
        assert row.report.hubness.skewness == again.hubness.skewness
        assert row.wall_s > 0
        # At the least, the scores of one block of queries.
        assert 60 * 120 * 8 <= row.peak_bytes < 2**20
    by_name = {row.name: row.report.recall[1] for row in rows}
    assert by_name["inverted softmax"] > by_name["no correction"] + 0.1
    other = compare_corrections(BG, BQ, G, Q, corrections={}, random_state=1)
    assert [row.name for row in other] == ["no correction"]
    assert other[0].report.recall != rows[0].report.recall


def test_small_and_poor_banks_are_compared_by_what_they_allow():
    G, Q, BG, BQ = banks(2)
    small = {
        k: v for k, v in default_corrections(3, 2).items() if k in {"inverse graph, local", "all but the top", "CSLS"}
    }
    rows = compare_corrections(BG[:3], np.tile(BQ[:1], (2, 1)), G, Q, corrections=small, random_state=0)
    params = {row.name: row.params for row in rows}
    assert params["all but the top"] == {"sides": None}
    assert params["inverse graph, local"]["pool_share"] == 1.0
    assert params["CSLS"]["n_neighbors"] in {None, 1, 2}
    one = compare_corrections(BG[:2], BQ, G, Q[:2], [[3, -1], [4, 5]], corrections={"CSLS": (CSLS(None), {})})
    assert [row.report.n_queries for row in one] == [1, 1]
    with pytest.raises(ValueError, match="queries must hold at least 2 with an answer, to tune and to measure, got 1"):
        compare_corrections(BG, BQ, G, Q[:2], [-1, 5])


def test_what_cannot_be_reported_is_refused():
    G, Q, *_ = banks(3)
    with pytest.raises(ValueError, match="relevant must be given for 5 queries and 120 gallery rows"):
        evaluate_retrieval(Q[:5], G)
    with pytest.raises(ValueError, match="relevant must hold an answer of some query, got -1 alone"):
        evaluate_retrieval(Q[:2], G, [-1, -1])
    with pytest.raises(ValueError, match="queries must have 12 features like gallery, got 4"):
        evaluate_retrieval(Q[:, :4], G)
    with pytest.raises(ValueError, match="scores contains NaN"):
        evaluate_scores(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="ks must be at least 1, got 0"):
        evaluate_retrieval(Q, G, ks=(0,))
    with pytest.raises(ValueError, match="gallery must have no all-zero row"):
        evaluate_retrieval(Q, 0 * G)


def test_pictures_of_compared_corrections_name_them_and_have_equal_bytes(tmp_path):
    G, Q, BG, BQ = banks(4)
    some = {name: default_corrections(90, 90)[name] for name in ("centring", "CSLS")}
    rows = compare_corrections(BG, BQ, G, Q, corrections=some, random_state=0)
    for name in ("one.svg", "two.svg"):
        plot_corrections(rows, tmp_path / name)
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    for text in (b"no correction", b"centring", b"CSLS", b"recall@10", b"changes scores"):
        assert text in drawn
    with pytest.raises(ValueError, match="rows must hold at least one correction, got none"):
        plot_corrections([], tmp_path / "none.svg")
    with pytest.raises(ValueError, match="must end in"):
        plot_corrections(rows, tmp_path / "none.txt")


def test_memory_does_not_grow_with_the_product_of_queries_and_gallery():
    G, Q = (np.random.default_rng(i).standard_normal((2_000, 8), dtype=np.float32) for i in range(2))
    for run, bound in (
        (lambda: evaluate_retrieval(Q, G, block_rows=400), 2**23),
        (lambda: evaluate_retrieval(Q, G, correction=CSLS(3, block_rows=400).fit(G[:90], queries=Q[:80])), 2**23),
    ):
        tracemalloc.start()
        try:
            run()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < bound, f"{peak / 2**20:.1f} MiB, where all scores are {2000 * 2000 * 4 / 2**20:.0f} MiB"
