import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import aslinearoperator

from polyspan.linalg import (
    factored_conductance,
    factored_modularity,
    graph_modularity,
    knn_graph,
    normalized_adjacency,
)


def random_graph(seed, n=20, share=0.2):
    rng = np.random.default_rng(seed)
    A = np.triu((rng.random((n, n)) < share) * rng.uniform(0.5, 2, (n, n)), 1)
    return A + A.T


@given(n=st.integers(2, 30), seed=st.integers(0, 2**32 - 1), loops=st.sampled_from([0.0, 1.0, 0.5]))
@settings(max_examples=25, deadline=None)
def test_rows_sum_to_one_or_the_vertex_is_alone_and_eigenvalues_stay_within_one(n, seed, loops):
    A = random_graph(seed, n)
    rows = np.asarray(normalized_adjacency(A, "row", self_loops=loops).sum(axis=1)).ravel()
    np.testing.assert_allclose(rows, ((A.sum(axis=1) + loops) > 0).astype(float), atol=1e-12)
    S = normalized_adjacency(A, self_loops=loops).toarray()
    np.testing.assert_allclose(S, S.T, atol=1e-12)
    assert abs(np.linalg.eigvalsh(S)).max() <= 1 + 1e-12


def test_normalisation_agrees_with_the_dense_formula_in_the_width_of_the_input():
    A = random_graph(0)
    D = np.diag((A.sum(axis=1) + 1) ** -0.5)
    mine = normalized_adjacency(sp.coo_array(A.astype(np.float32)), self_loops=1.0)
    assert mine.dtype == np.float32
    assert mine.format == "csr"
    np.testing.assert_allclose(mine.toarray(), D @ (A + np.eye(20)) @ D, rtol=1e-5, atol=1e-7)


def test_neighbour_graph_joins_the_nearest_rows_by_hand():
    X = np.array([[0.0], [1.0], [3.0], [3.5]])
    chosen = knn_graph(X, 1, mode="distance", symmetric=False).toarray()
    expected = np.zeros((4, 4))
    expected[[0, 1, 2, 3], [1, 0, 3, 2]] = [1, 1, 0.5, 0.5]
    np.testing.assert_array_equal(chosen, expected)
    both = knn_graph(np.array([[0.0], [1.0], [3.0]]), 1).toarray()
    np.testing.assert_array_equal(both, [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize("resolution", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("kind", [np.asarray, sp.csr_array, sp.csc_matrix, aslinearoperator])
def test_modularity_agrees_with_networkx_on_the_formed_affinity(kind, resolution):
    rng = np.random.default_rng(3)
    F, labels = rng.random((15, 4)), rng.integers(0, 3, 15)
    W = F @ F.T
    # networkx counts a self loop twice in a degree; halved, the formed affinity is the one meant here.
    G = nx.from_numpy_array(W - np.diag(np.diag(W)) / 2)
    groups = [set(np.flatnonzero(labels == c)) for c in range(3)]
    theirs = nx.community.modularity(G, groups, resolution=resolution)
    assert factored_modularity(kind(F), labels, resolution=resolution) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_modularity_of_a_graph_is_that_of_networkx_and_of_any_labels(seed):
    A = random_graph(seed)
    labels = np.random.default_rng(seed).integers(3, size=20)
    groups = [set(np.flatnonzero(labels == c)) for c in range(3)]
    theirs = nx.community.modularity(nx.from_numpy_array(A), groups)
    assert graph_modularity(sp.csr_array(A), np.array(["c", "a", "b"])[labels]) == pytest.approx(theirs, abs=1e-12)
    assert graph_modularity(sp.csr_array(A), np.zeros(20)) == pytest.approx(0, abs=1e-12)
    assert graph_modularity(sp.csr_array((20, 20)), labels) == 0
    with pytest.raises(ValueError, match="labels must have one entry"):
        graph_modularity(sp.csr_array(A), labels[1:])


def test_conductance_agrees_with_its_definition_on_the_formed_affinity():
    rng = np.random.default_rng(4)
    F, labels = rng.random((15, 4)), rng.choice(["b", "a", "c"], 15)
    W = F @ F.T
    literal = [
        W[labels == c][:, labels != c].sum() / min(W[labels == c].sum(), W[labels != c].sum()) for c in ("a", "b", "c")
    ]
    np.testing.assert_allclose(factored_conductance(F, labels), literal, atol=1e-12)


def test_one_cluster_of_all_scores_zero_and_separate_blocks_score_best():
    F = np.kron(np.eye(2), np.ones((3, 1)))
    assert factored_modularity(F, np.zeros(6)) == pytest.approx(0, abs=1e-12)
    np.testing.assert_array_equal(factored_conductance(F, np.zeros(6)), [0.0])
    blocks = np.repeat([5, 7], 3)
    assert factored_modularity(F, blocks) == pytest.approx(0.5)
    np.testing.assert_allclose(factored_conductance(F, blocks), [0, 0], atol=1e-12)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"A must be square, got shape \(2, 3\)"):
        normalized_adjacency(np.ones((2, 3)))
    with pytest.raises(ValueError, match="kind must be 'symmetric' or 'row', got 'left'"):
        normalized_adjacency(np.eye(2), "left")
    with pytest.raises(ValueError, match=r"negative.*-1.0 at vertex 1"):
        normalized_adjacency(np.diag([1.0, -1.0]))
    with pytest.raises(ValueError, match="NaN degree, got nan at vertex 0"):
        normalized_adjacency(np.diag([np.nan, 1.0]))
    with pytest.raises(TypeError, match="A must be real"):
        normalized_adjacency(np.eye(2) * 1j)
    with pytest.raises(ValueError, match="k must be between 1 and n - 1 = 3, got 4"):
        knn_graph(np.eye(4), 4)
    with pytest.raises(ValueError, match="mode must be"):
        knn_graph(np.eye(4), 1, mode="weights")
    with pytest.raises(ValueError, match=r"labels must have one entry a row of F, \(3,\), got shape \(2,\)"):
        factored_modularity(np.eye(3), [0, 1])
    with pytest.raises(ValueError, match="sum to more than 0, got 0"):
        factored_conductance(np.zeros((3, 2)), [0, 1, 1])


def test_signed_affinities_give_nan_where_a_volume_is_negative():
    F = np.array([[2.0], [2.0], [-1.0]])
    shares = factored_conductance(F, [0, 0, 1])
    assert np.isnan(shares).all()
