import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from polyspan.align import (
    average_compatibility,
    compatibility_matrix,
    evaluate_compatibility,
    pad_vectors,
    truncate_vectors,
)
from polyspan.align.compatibility_plots import plot_compatibility
from polyspan.linalg import mean_average_precision


def unit(X):
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def vectors(seed, n=60, d=5, C=4):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % C
    return rng.normal(size=(C, d))[y] + rng.normal(size=(n, d)), y


def literal(Q, G, yq, yg, exclude_self, k):
    """One query at a time: sort, look at the first k, and take scikit-learn's average precision."""
    hits, precision = [], []
    for i in range(len(Q)):
        scores = unit(G) @ unit(Q[i : i + 1])[0]
        keep = np.arange(len(G)) != i if exclude_self else np.ones(len(G), bool)
        s, right = scores[keep], yg[keep] == yq[i]
        if not right.any():
            continue
        hits.append(right[np.argsort(-s, kind="stable")[:k]].any())
        precision.append(average_precision_score(right, s))
    return np.mean(hits), np.mean(precision)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), exclude_self=st.booleans(), rows=st.integers(1, 70))
def test_scores_equal_the_literal_ones_for_any_block_of_rows(seed, exclude_self, rows):
    (G, y), noise = vectors(seed), np.random.default_rng(seed + 1)
    Q = G + 0.5 * noise.normal(size=G.shape)
    found = evaluate_compatibility(Q, G, y, y, exclude_self, ks=(3,), query_rows=rows).scores
    top, precision = literal(Q, G, y, y, exclude_self, 3)
    assert found.cmc[3] == pytest.approx(top)
    assert found.map == pytest.approx(precision, abs=1e-12)
    assert found.n_queries == len(y)


def test_it_agrees_with_the_ground_floor_and_takes_tensors_and_names():
    X, y = vectors(0)
    names = np.array(["a", "b", "c", "d"])[y]
    found = evaluate_compatibility(torch.as_tensor(X), X, names, names, True).scores
    assert found.map == pytest.approx(mean_average_precision(X, X, y, y, exclude_self=True), abs=1e-12)


def test_an_encoder_that_maps_all_to_one_point_scores_nothing():
    y = np.arange(40) % 4
    found = evaluate_compatibility(np.ones((40, 3)), np.ones((40, 3)), y, y, True).scores
    assert found.cmc == {1: 0.0, 5: 0.0}
    assert found.map == pytest.approx(9 / 39)


def test_queries_without_an_answer_are_left_out():
    X, y = vectors(0, n=12)
    strange = np.where(np.arange(12) < 3, 99, y)
    assert evaluate_compatibility(X, X, strange, y).scores.n_queries == 9
    with pytest.raises(ValueError, match="query_labels must share a label with gallery_labels"):
        evaluate_compatibility(X, X, y + 50, y)


def test_the_criterion_compares_with_the_old_models_own_search():
    X, y = vectors(0, n=200)
    rng = np.random.default_rng(1)
    old = X + 1.5 * rng.normal(size=X.shape)
    better, worse = X, X + 6.0 * rng.normal(size=X.shape)
    found = evaluate_compatibility(better, old, y, y, True, reference=old)
    assert found.compatible
    assert found.gain["map"] == pytest.approx(found.scores.map - found.reference.map)
    assert not evaluate_compatibility(worse, old, y, y, True, reference=old).compatible
    ideal = evaluate_compatibility(X, X, y, y, True).scores
    share = evaluate_compatibility(better, old, y, y, True, reference=old, independent=ideal).update_gain
    assert share["map"] == pytest.approx(found.gain["map"] / (ideal.map - found.reference.map))
    assert evaluate_compatibility(better, old, y, y, True).compatible is None


def test_a_wider_vector_is_refused_with_both_ways_out():
    X, y = vectors(0)
    with pytest.raises(ValueError, match=r"got 5 and 3: .*widths='truncate'.*padded with zeros.*widths='pad'"):
        evaluate_compatibility(X, X[:, :3], y, y)
    cut = evaluate_compatibility(X, X[:, :3], y, y, widths="truncate").scores
    padded = evaluate_compatibility(X, X[:, :3], y, y, widths="pad").scores
    by_hand = evaluate_compatibility(truncate_vectors(X, 3), X[:, :3], y, y).scores
    assert cut == padded == by_hand


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), extra=st.integers(0, 6))
def test_padded_old_vectors_rank_by_inner_product_as_truncated_queries_do_by_cosine(seed, extra):
    rng = np.random.default_rng(seed)
    old, new = rng.normal(size=(30, 4)), unit(rng.normal(size=(7, 4 + extra)))
    padded = pad_vectors(old, 4 + extra)
    dots, cosines = new @ padded.T, truncate_vectors(new, 4) @ unit(old).T
    np.testing.assert_allclose(dots, cosines * np.linalg.norm(new[:, :4], axis=1, keepdims=True), atol=1e-12)
    np.testing.assert_allclose(truncate_vectors(padded, 4), unit(old))


def test_averages_of_a_matrix_by_hand():
    C = np.array([[0.5, 9.0, 9.0], [0.6, 0.7, 9.0], [0.4, 0.8, 0.9]])
    share, mean = average_compatibility(C)
    assert share == pytest.approx(2 / 3)
    assert mean == pytest.approx((0.5 + 0.6 + 0.7 + 0.4 + 0.8 + 0.9) / 6)
    alone = average_compatibility([[0.3]])
    assert np.isnan(alone[0])
    assert alone[1] == 0.3


def test_a_matrix_holds_every_pair_of_a_chain():
    X, y = vectors(0, n=80, d=6)
    models = [X[:, :3] + 0.5, X[:, :4], X]
    made = compatibility_matrix(models, y)
    assert np.isnan(made.scores[np.triu_indices(3, 1)]).all()
    for i in range(3):
        for j in range(i + 1):
            pair = evaluate_compatibility(models[i][:, : 3 + j + (j == 2)], models[j], y, y, True)
            assert made.scores[i, j] == pytest.approx(pair.scores.map)
    assert (made.average_compatibility, made.average_score) == average_compatibility(made.scores)
    other = compatibility_matrix(models, y, [m[:40] for m in models], y[:40], metric="top-5")
    assert other.metric == "top-5"
    assert (other.scores[np.tril_indices(3)] >= compatibility_matrix(models, y, metric="top-1").scores[2, 2] - 1).all()


def test_a_picture_of_a_matrix_repeats_and_refuses_what_it_cannot_write(tmp_path):
    X, y = vectors(0)
    matrix = compatibility_matrix([X[:, :3], X], y)
    made = [plot_compatibility(matrix, tmp_path / f"{i}.svg", ["old", "new"]).read_text() for i in range(2)]
    assert made[0] == made[1]
    assert plot_compatibility(matrix, tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"path must end in .svg, .png or .pdf"):
        plot_compatibility(matrix, tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"names must hold one name a model \(2\), got 1"):
        plot_compatibility(matrix, tmp_path / "b.svg", ["one"])


X, Y = vectors(0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: evaluate_compatibility(X, X, Y[:5], Y), r"query_labels must have shape \(60,\), got \(5,\)"),
        (lambda: evaluate_compatibility(X, X, Y, Y[:5]), r"gallery_labels must have shape \(60,\), got \(5,\)"),
        (lambda: evaluate_compatibility(X, X[:9], Y, Y[:9], True), "exclude_self needs one gallery row a query"),
        (lambda: evaluate_compatibility(X, X, Y, Y, ks=(0,)), "ks must be at least 1, got 0"),
        (lambda: evaluate_compatibility(X, X, Y, Y, widths="cut"), "widths must be one of .* got 'cut'"),
        (lambda: evaluate_compatibility(X * 0, X, Y, Y), "query must have no all-zero row, got one at row 0"),
        (lambda: evaluate_compatibility(X, X * np.nan, Y, Y), "gallery must be finite, got NaN or infinity in row 0"),
        (lambda: evaluate_compatibility(X[0], X, Y, Y), "query must be 2-d"),
        (
            lambda: evaluate_compatibility(X, X, Y, Y, independent=evaluate_compatibility(X, X, Y, Y).scores),
            "reference must be given with independent",
        ),
        (lambda: compatibility_matrix([], Y), "models must hold at least one array"),
        (lambda: compatibility_matrix([X], Y, metric="mrr"), "metric must be one of .* got 'mrr'"),
        (lambda: compatibility_matrix([X], Y, [X]), "galleries and gallery_labels must be given together"),
        (lambda: compatibility_matrix([X], Y, [X, X], Y), r"galleries must hold one array a model \(1\), got 2"),
        (lambda: average_compatibility(np.ones((2, 3))), r"scores must be a square matrix, got shape \(2, 3\)"),
        (lambda: average_compatibility([[1.0, 0], [np.nan, 1]]), "scores must be numbers on and below the diagonal"),
        (lambda: truncate_vectors(X, 6), "width must be between 1 and 5, got 6"),
        (lambda: truncate_vectors(np.eye(3), 2), "the first numbers of X must have no all-zero row, got one at row 2"),
        (lambda: pad_vectors(X, 4), "width must be at least 5, got 4"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
