import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics import average_precision_score

from polyspan.linalg import label_hits, mean_average_precision, recall_at_k, reciprocal_rank, top_k

METRICS = {
    "cosine": lambda q, g: 1 - cdist(q, g, "cosine"),
    "dot": lambda q, g: q @ g.T,
    "euclidean": lambda q, g: -cdist(q, g),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("blocks", [(7, 3), (1000, 1000)])
def test_blocks_find_what_the_whole_matrix_shows(metric, blocks):
    rng = np.random.default_rng(0)
    Q, G = rng.normal(size=(11, 4)), rng.normal(size=(50, 4))
    found = top_k(Q, G, 5, metric=metric, block_rows=blocks[0], query_rows=blocks[1])
    scores = METRICS[metric](Q, G)
    order = np.argsort(-scores, axis=1)[:, :5]
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, order, 1), atol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_torch_finds_the_same_rows_as_numpy(metric):
    rng = np.random.default_rng(1)
    Q, G = rng.normal(size=(9, 6)).astype(np.float32), rng.normal(size=(40, 6)).astype(np.float32)
    mine = top_k(torch.as_tensor(Q), torch.as_tensor(G), 4, metric=metric, block_rows=11)
    np.testing.assert_array_equal(mine.indices.numpy(), top_k(Q, G, 4, metric=metric).indices)


def test_a_query_can_leave_its_own_row_out():
    X = np.random.default_rng(2).normal(size=(20, 3))
    assert (top_k(X, X, 1).indices[:, 0] == np.arange(20)).all()
    found = top_k(X, X, 19, exclude=np.arange(20), block_rows=6).indices
    assert all(i not in row for i, row in enumerate(found))
    tensor = torch.as_tensor(X)
    np.testing.assert_array_equal(
        top_k(tensor, tensor, 3, exclude=torch.arange(20), block_rows=6).indices, found[:, :3]
    )


def test_a_zero_row_scores_zero_by_cosine():
    found = top_k(np.zeros((1, 2)), np.eye(2), 2)
    np.testing.assert_array_equal(found.scores, [[0.0, 0.0]])
    np.testing.assert_array_equal(found.indices, [[0, 1]])


def test_recall_counts_twins_and_neighbour_sets():
    found = np.array([[0, 1], [2, 3], [5, 4]])
    assert recall_at_k(found, np.array([0, 0, 4])) == pytest.approx(2 / 3)
    assert recall_at_k(found, np.array([[0, 9], [2, 3], [8, 9]])) == pytest.approx(0.5)


def test_reciprocal_rank_is_zero_without_a_hit():
    hits = label_hits([1, 2, 3], [1, 2, 2], [[1, 0], [1, 2], [0, 1]])
    assert reciprocal_rank(hits) == pytest.approx((0.5 + 1 + 0) / 3)


def test_average_precision_agrees_with_scikit_learn():
    rng = np.random.default_rng(3)
    Q, G = rng.normal(size=(12, 3)), rng.normal(size=(30, 3))
    q, g = rng.integers(0, 4, size=12), rng.integers(0, 4, size=30)
    scores = METRICS["cosine"](Q, G)
    theirs = np.mean([average_precision_score(g == label, row) for label, row in zip(q, scores, strict=True)])
    assert mean_average_precision(Q, G, q, g, query_rows=5) == pytest.approx(theirs)


def test_average_precision_can_leave_the_query_out_of_the_gallery():
    X = np.array([[1.0, 0], [0.9, 0.1], [0, 1.0], [0.1, 0.9]])
    assert mean_average_precision(X, X, [0, 0, 1, 1], [0, 0, 1, 1], exclude_self=True) == 1.0
    with pytest.raises(ValueError, match="at least one label"):
        mean_average_precision(X, X, [5] * 4, [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"k": 0}, "k must be"), ({"k": 6}, "k must be"), ({"k": 1, "metric": "l1"}, "metric must be")],
)
def test_arguments_out_of_range_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        top_k(np.eye(5), np.eye(5), **kwargs)
    with pytest.raises(ValueError, match="one width"):
        top_k(np.eye(5), np.eye(4), 1)
    with pytest.raises(ValueError, match="k must be between 1 and 5, got True"):
        top_k(np.eye(5), np.eye(5), True)
    with pytest.raises(ValueError, match="queries must hold at least one row"):
        top_k(np.eye(5)[:0], np.eye(5), 1)
    with pytest.raises(ValueError, match="exclude must be one a query, 5, got 3"):
        top_k(np.eye(5), np.eye(5), 1, exclude=np.arange(3))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_named_and_never_found(metric, as_array, value):
    rng = np.random.default_rng(5)
    Q, G = np.abs(rng.normal(size=(9, 6))), np.abs(rng.normal(size=(40, 6)))
    for name, rows, row in (("queries", Q, 7), ("gallery", G, 23)):
        kept = rows[row, 2]
        rows[row, 2] = value
        with pytest.raises(ValueError, match=f"{name} must be finite, got NaN or infinity in row {row}"):
            top_k(as_array(Q), as_array(G), 3, metric=metric, block_rows=11, query_rows=4)
        rows[row, 2] = kept


@pytest.mark.parametrize("as_array", [np.asarray, torch.as_tensor])
def test_rows_whose_squares_overflow_are_no_zero_rows(as_array):
    G = np.eye(5, dtype=np.float32)
    G[3] *= 1e30
    with pytest.raises(ValueError, match="must have finite products"):
        top_k(as_array(np.eye(5, dtype=np.float32)), as_array(G), 2)
