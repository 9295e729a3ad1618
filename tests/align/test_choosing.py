import numpy as np
import pytest
from scipy.stats import ortho_group

from polyspan.align import (
    OrthogonalMap,
    RidgeMap,
    alignment_report,
    choose_aligner,
    kernel_agreement,
    pairing_p_value,
)


@pytest.fixture
def turned():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(150, 12))
    return X, X @ ortho_group.rvs(12, random_state=0) + 0.3 * rng.normal(size=(150, 12))


def test_the_winner_finds_neighbours_that_no_map_misses(turned):
    X, Y = turned
    choice = choose_aligner(X, Y, metric="recall@5")
    scores = {(row.aligner, row.direction): row.score for row in choice.table}
    assert choice.score == max(scores.values())
    assert choice.score > scores["no-map", "gallery"] + 0.3
    assert {row.direction for row in choice.table} == {"gallery", "query"}
    assert [row.score for row in choice.table] == sorted((row.score for row in choice.table), reverse=True)


def test_the_winner_is_fitted_on_all_anchors_in_its_direction(turned):
    X, Y = turned
    choice = choose_aligner(X, Y, candidates={"orthogonal": OrthogonalMap()}, directions=("query",))
    np.testing.assert_array_equal(choice.aligner.rotation_, OrthogonalMap().fit(Y, X).rotation_)


def test_labels_change_what_counts_as_a_hit(turned):
    X, Y = turned
    labels = (Y[:, 0] > 0).astype(int)
    by_label = choose_aligner(X, Y, labels, metric="recall@5", candidates={"ridge": RidgeMap()})
    by_map = choose_aligner(X, Y, labels, metric="map", candidates={"ridge": RidgeMap()})
    assert by_label.score > 0.9
    assert 0.5 < by_map.score < by_label.score


def test_a_score_depends_on_the_seed_only_through_the_folds(turned):
    X, Y = turned
    first, same = (choose_aligner(X, Y, random_state=3).table for _ in range(2))
    assert first == same


@pytest.mark.parametrize("metric", ["cosine", "recall@", "recall@0", "map"])
def test_a_metric_that_is_no_retrieval_is_refused(turned, metric):
    with pytest.raises(ValueError, match="metric"):
        choose_aligner(*turned, metric=metric)


def test_unpaired_anchors_look_like_shuffles(turned):
    X, Y = turned
    assert pairing_p_value(X, Y) == pytest.approx(1 / 200)
    ps = [pairing_p_value(X, np.random.default_rng(i).permutation(Y), random_state=i) for i in range(20)]
    assert 0.25 < np.mean(ps) < 0.75


def literal_agreement(fa, ga, fb, gb):
    K, L = fa @ ga.T, fb @ gb.T
    pearson = np.corrcoef(K.ravel(), L.ravel())[0, 1]

    def centre(M):
        return M - M.mean(0) - M.mean(1, keepdims=True) + M.mean()

    Kc, Lc = centre(K), centre(L)
    return pearson, np.sum(Kc * Lc) / np.linalg.norm(Kc) / np.linalg.norm(Lc)


def test_kernel_agreement_equals_the_kernels_formed_in_full():
    rng = np.random.default_rng(1)
    fa, ga = rng.normal(size=(30, 5)), rng.normal(size=(20, 5)) + 1
    fb, gb = fa @ rng.normal(size=(5, 7)) + 0.5, ga @ rng.normal(size=(5, 7))
    found = kernel_agreement(fa, ga, fb, gb)
    np.testing.assert_allclose([found["pearson"], found["cka"]], literal_agreement(fa, ga, fb, gb), atol=1e-10)


def test_one_rotation_for_both_modalities_agrees_fully_and_constants_not_at_all():
    rng = np.random.default_rng(2)
    (f, g), Q = rng.normal(size=(2, 40, 6)), ortho_group.rvs(6, random_state=0)
    assert kernel_agreement(f, g, f @ Q, g @ Q) == pytest.approx({"pearson": 1.0, "cka": 1.0})
    assert kernel_agreement(f, g, np.zeros((40, 6)), g) == {"pearson": 0.0, "cka": 0.0}
    with pytest.raises(ValueError, match="same items"):
        kernel_agreement(f, g, f[:5], g)


def test_the_report_sees_good_pairs_shuffled_pairs_and_a_swapped_map(turned):
    X, Y = turned
    fitted = OrthogonalMap().fit(X[:100], Y[:100])
    good = alignment_report(fitted, X[100:], Y[100:])
    assert good["warnings"] == []
    assert good["recall"]["twin@1"] > 0.8
    assert good["cosine"]["after"] > good["cosine"]["before"] + 0.5
    shuffled = alignment_report(fitted, X[100:], np.random.default_rng(0).permutation(Y[100:]))
    assert any("belong together" in said for said in shuffled["warnings"])
    swapped = alignment_report(fitted, Y[100:], X[100:])
    assert any("swapped" in said for said in swapped["warnings"])
    with pytest.warns(UserWarning, match="6 anchors leave part of 12"):
        fitted = OrthogonalMap().fit(X[:6], Y[:6])
    few = alignment_report(fitted, X[100:], Y[100:])
    assert any("6 anchors leave part" in said for said in few["warnings"])


def test_that_anchors_are_few_is_said_of_the_winner_and_not_of_folds(turned):
    X, Y = turned
    candidates = {"orthogonal": OrthogonalMap()}
    choose_aligner(X[:14], Y[:14], candidates=candidates, directions=("query",))
    with pytest.warns(UserWarning, match="anchors leave part of") as caught:
        choose_aligner(np.hstack([X[:14], X[:14]]), np.hstack([Y[:14], Y[:14]]), candidates=candidates)
    assert [str(told.message).split()[0] for told in caught] == ["14"]
