import numpy as np
import pytest
from scipy.stats import ortho_group
from sklearn.model_selection import KFold

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


def ranked(queries, gallery, k, similarity, exclude=True):
    """Nearest gallery rows of each query by a loop over pairs."""
    found = []
    for i, q in enumerate(queries):
        scores = []
        for j, g in enumerate(gallery):
            dot = sum(a * b for a, b in zip(q, g, strict=True))
            long = np.sqrt(sum(a * a for a in q)) * np.sqrt(sum(b * b for b in g))
            apart = -sum((a - b) ** 2 for a, b in zip(q, g, strict=True))
            score = {"cosine": dot / long, "dot": dot, "euclidean": apart}[similarity]
            scores.append(-np.inf if exclude and i == j else score)
        found.append(np.argsort(-np.array(scores))[:k])
    return np.array(found)


def shared(found, wanted):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, wanted, strict=True)])


@pytest.fixture
def lengths_differ():
    rng = np.random.default_rng(4)
    X = rng.normal(size=(48, 3)) * 2.0 ** rng.integers(-2, 3, size=(48, 1))
    return X, X @ ortho_group.rvs(3, random_state=1) + 0.4 * rng.normal(size=(48, 3)) + 0.5


SIMILARITIES = ("cosine", "dot", "euclidean")


def test_recall_of_a_choice_is_by_the_similarity_asked_for(lengths_differ):
    X, Y = lengths_differ
    told = {}
    for similarity in SIMILARITIES:
        choice = choose_aligner(
            X, Y, metric="recall@3", similarity=similarity, candidates={"ridge": RidgeMap()}, directions=("gallery",)
        )
        folds = []
        for fitting, held in KFold(3, shuffle=True, random_state=0).split(X):
            mapped = RidgeMap().fit(X[fitting], Y[fitting]).transform(X[held])
            folds.append(
                shared(ranked(Y[held], mapped, 3, similarity), ranked(Y[held], Y[held], 3, similarity)),
            )
        np.testing.assert_allclose(choice.table[0].folds, folds, atol=1e-12)
        told[similarity] = choice.score
    assert len(set(told.values())) == 3


def test_recall_of_a_report_is_by_the_metric_asked_for(lengths_differ):
    X, Y = lengths_differ
    fitted = RidgeMap().fit(X[:24], Y[:24])
    mapped, new = fitted.transform(X[24:]), Y[24:]
    told = set()
    for metric in SIMILARITIES:
        report = alignment_report(fitted, X[24:], new, k=3, metric=metric)
        hits = ranked(new, mapped, 3, metric, exclude=False)
        twins = np.arange(len(new))[:, None]
        wanted = {
            "twin@1": np.mean(hits[:, :1] == twins),
            "twin@3": np.mean((hits == twins).any(axis=1)),
            "neighbours@3": shared(ranked(new, mapped, 3, metric), ranked(new, new, 3, metric)),
        }
        assert report["recall"] == pytest.approx(wanted)
        assert report["metric"] == metric
        told.add(tuple(report["recall"].values()))
    assert len(told) == 3


def test_the_mean_average_precision_is_by_the_similarity_asked_for(lengths_differ):
    X, Y = lengths_differ
    labels = (Y[:, 0] > 0).astype(int)
    for similarity in SIMILARITIES:
        choice = choose_aligner(
            X, Y, labels, metric="map", similarity=similarity, candidates={"ridge": RidgeMap()}, directions=("gallery",)
        )
        folds = []
        for fitting, held in KFold(3, shuffle=True, random_state=0).split(X):
            order = ranked(
                Y[held], RidgeMap().fit(X[fitting], Y[fitting]).transform(X[held]), len(held) - 1, similarity
            )
            relevant = labels[held][order] == labels[held][:, None]
            precise = np.cumsum(relevant, axis=1) / np.arange(1, len(held))
            folds.append(np.mean([p[r].mean() for p, r in zip(precise, relevant, strict=True) if r.any()]))
        np.testing.assert_allclose(choice.table[0].folds, folds, atol=1e-12)


def test_a_similarity_that_is_none_is_refused(turned):
    with pytest.raises(ValueError, match="similarity must be one of cosine, dot, euclidean, got 'l2'"):
        choose_aligner(*turned, similarity="l2")
    with pytest.raises(ValueError, match="metric must be one of cosine, dot, euclidean, got 'l2'"):
        alignment_report(OrthogonalMap().fit(*turned), *turned, metric="l2")
