import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from polyspan.align import (
    CanonicalCorrelation,
    Match,
    RidgeMap,
    SubspaceAligner,
    crossmodal_scores,
    duplicate_ceiling,
    local_cka,
    matching_accuracy,
    scores_by_size,
    subspace_report,
    topk_accuracy,
)
from polyspan.align.subspace_plots import plot_subspaces
from polyspan.claims.plato_3d import planted
from polyspan.linalg import linear_cka


@pytest.fixture(scope="module")
def world():
    return planted(0)


@pytest.fixture(scope="module")
def report(world):
    return subspace_report(*world[:2], n_components=12)


def test_the_report_counts_the_factors_that_were_planted(report):
    assert report.n_shared == 6
    assert report.held_out[:6].min() > 0.8
    assert report.held_out[6:].max() < report.shuffled_held_out < 0.4
    assert report.pairing_p == pytest.approx(1 / 200)
    assert report.warnings == []
    assert report.cka_shared > report.cka_raw + 0.3
    assert 0.02 < report.y_share < 0.4


def test_fitted_correlations_of_noise_are_high_and_the_report_says_so(world):
    rng = np.random.default_rng(0)
    noise = subspace_report(world.anchors_x[:150], rng.permutation(world.anchors_y[:150]), n_components=5)
    assert noise.correlations[0] > 0.85
    assert noise.shuffled[0] > 0.85
    assert noise.n_shared == 0
    assert noise.pairing_p > 0.05
    assert (
        sum("do not seem to belong together" in text or "nothing to match by" in text for text in noise.warnings) == 2
    )
    few = subspace_report(world.anchors_x[:100], world.anchors_y[:100])
    assert any("80 anchors are fewer than the 100 features" in text for text in few.warnings)


def test_shares_and_cka_are_those_of_the_literal_regression(world):
    X, Y = world.anchors_x, world.anchors_y
    found = subspace_report(X, Y, n_components=4, random_state=3)
    order = np.random.default_rng(3).permutation(len(X))
    held, kept = np.split(order, [int(0.2 * len(X))])
    fitted = CanonicalCorrelation(4).fit(X[kept], Y[kept])
    A, B = fitted.transform(X[held], Y[held])
    np.testing.assert_allclose(found.correlations, fitted.correlations_, atol=1e-12)
    np.testing.assert_allclose(found.held_out, [np.corrcoef(a, b)[0, 1] for a, b in zip(A.T, B.T, strict=True)])
    assert found.cka_raw == pytest.approx(linear_cka(X[held], Y[held]))
    assert found.cka_shared == pytest.approx(linear_cka(A, B))
    centred = X[kept] - X[kept].mean(axis=0)
    coordinates = fitted.transform(X[kept])
    explained = coordinates @ np.linalg.lstsq(coordinates, centred, rcond=None)[0]
    assert found.x_share == pytest.approx(np.sum(explained**2) / np.sum(centred**2))


def test_duplicates_and_constant_features_are_told(world):
    X, Y = np.repeat(world.anchors_x[:300], 2, axis=0), world.anchors_y.copy()
    Y[:, :3] = 1.0
    found = subspace_report(X, Y, n_components=5)
    assert found.ceiling == 0.5
    assert any("no more than 50.0%" in text for text in found.warnings)
    assert any("3 features of y are constant" in text for text in found.warnings)


def test_a_table_over_sizes_holds_what_aligners_of_these_sizes_score(world):
    X, Y, A, B = world
    table = scores_by_size(X, Y, A, B, sizes=(2, 6, 1000), n_anchors=(300, 600), methods=("affine", "local_cka"))
    found = {(row.method, row.n_components, row.n_anchors): row for row in table}
    assert set(found) == {(m, k, n) for m in ("affine", "local_cka") for k in (0, 2, 6) for n in (300, 600)}
    for method in ("affine", "local_cka"):
        scores = SubspaceAligner(6, method=method).fit(X[:300], Y[:300]).similarity(A, B)
        row = found[method, 6, 300]
        assert (row.top_1, row.top_k) == (topk_accuracy(scores, 1), topk_accuracy(scores, 5))
        assert row.matching == np.mean(linear_sum_assignment(scores, maximize=True)[1] == np.arange(len(A)))
        assert row.top_k > found[method, 0, 300].top_k + 0.5
    raw = local_cka(X, Y, A, B)
    assert found["local_cka", 0, 600].top_k == topk_accuracy(raw, 5)
    carried = RidgeMap().fit(X, Y).transform(A)
    cosines = (carried @ B.T) / np.linalg.norm(carried, axis=1)[:, None] / np.linalg.norm(B, axis=1)
    assert found["affine", 0, 600].top_k == pytest.approx(topk_accuracy(cosines, 5))


def test_scores_of_queries_that_were_anchors_are_told_from_others(world):
    fitted = SubspaceAligner(6).fit(*world[:2])
    good = crossmodal_scores(fitted, *world[2:])
    assert good["warnings"] == []
    assert good["matching"] > 0.9
    assert good["chance"] == 5 / 200
    mixed = [np.concatenate([new, old[:50]]) for new, old in zip(world[2:], world[:2], strict=True)]
    told = crossmodal_scores(fitted, *mixed)
    assert told["warnings"] == ["50 of 250 queries equal the row of an anchor: scores on them may be too good"]
    doubled = crossmodal_scores(fitted, np.repeat(world.queries_x[:30], 2, axis=0), world.queries_y[:60])
    assert doubled["ceiling"] == {"at_1": 0.5, "at_k": 1.0}
    assert "no more than 50.0% can be found first" in doubled["warnings"][0]


def test_ties_count_by_chance_and_ceilings_are_reached_by_a_perfect_ranking():
    assert topk_accuracy(np.ones((4, 8)), 2) == 0.25
    assert topk_accuracy(np.eye(5), 1) == 1.0
    assert topk_accuracy(-np.eye(5), 4) == 0.0
    assert topk_accuracy(np.eye(5)[:, ::-1], 1, truth=[4, 3, 2, 1, 0]) == 1.0
    rows = np.array([[0.0], [1.0], [1.0], [1.0], [2.0], [2.0]])
    perfect = -np.abs(rows - rows.T)
    for k in (1, 2, 3):
        assert duplicate_ceiling(rows, k) == pytest.approx(topk_accuracy(perfect, k))
    assert duplicate_ceiling([[0.0], [-0.0]]) == 0.5


def test_a_matching_is_judged_by_all_rows_also_those_left_out():
    assert matching_accuracy([0, 2, 1, 3]) == 0.5
    assert matching_accuracy([2, 0], truth=[2, 1]) == 0.5
    part = Match(np.array([0, 3]), np.array([0, 3]), np.ones(2), np.ones(2))
    assert matching_accuracy(part, np.arange(4)) == 0.5


def test_pictures_have_equal_bytes_and_only_known_suffixes(report, world, tmp_path):
    table = scores_by_size(*world, sizes=(2, 6))
    first, second = (plot_subspaces(report, table, tmp_path / f"{i}.svg").read_bytes() for i in range(2))
    assert first == second
    assert b"<svg" in first
    assert plot_subspaces(report, [], tmp_path / "less.svg").read_bytes() != first
    with pytest.raises(ValueError, match=r"path must end in \.svg, \.png or \.pdf"):
        plot_subspaces(report, table, tmp_path / "x.gif")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X, Y: subspace_report(X[:9], Y[:9]), "at least 10 anchors, got 9"),
        (lambda X, Y: subspace_report(X, Y[:-1]), "inconsistent numbers of samples"),
        (lambda X, Y: subspace_report(X, Y, held_share=1.0), "held_share must lie above 0 and below 1, got 1.0"),
        (lambda X, Y: subspace_report(X, Y, n_shuffles=0), "n_shuffles must be at least 1, got 0"),
        (lambda X, Y: subspace_report(X, Y * np.nan), "y contains NaN"),
        (lambda X, Y: subspace_report(X * 0, Y), "X must vary from row to row"),
        (lambda X, Y: scores_by_size(X, Y, X, Y, sizes=(99,)), "sizes must hold a dimension between 1 and 40, got"),
        (lambda X, Y: scores_by_size(X, Y, X, Y, n_anchors=(1,)), "n_anchors must lie between 2 and 600, got 1"),
        (lambda X, Y: topk_accuracy(X, 61), "k must be between 1 and 60, got 61"),
        (lambda X, Y: topk_accuracy(X[0]), r"scores must have shape \(a, b\), got \(60,\)"),
        (lambda X, Y: topk_accuracy(X), "truth must be one column of 60 for each of 600 rows"),
        (lambda X, Y: matching_accuracy([1, 0], truth=[1]), "truth must be one column for each of the 2 rows"),
        (
            lambda X, Y: crossmodal_scores(SubspaceAligner(2).fit(X, Y), X[:5], Y[:6]),
            "as many rows, at least 2, got 5 and 6",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(world, call, message):
    with pytest.raises(ValueError, match=message):
        call(world.anchors_x, world.anchors_y)
