from functools import partial
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.cluster import S2CAG, ModularityS2CAG, select_order_decay
from polyspan.data import planted_graph
from polyspan.errors import CorruptFile, WrongContent
from polyspan.linalg import clustering_accuracy, factored_modularity, principal_angles
from polyspan.run import measure_peak

pieces = pytest.mark.filterwarnings("ignore:adjacency has .* components")
EASY: dict = {"n": 300, "n_clusters": 3, "d": 120, "degree": 10.0, "mixing": 0.1, "words": 30.0, "topic_share": 0.5}


def graph_world(seed, **options):
    world = planted_graph(seed, **options)
    return world._replace(attributes=world.attributes.astype(np.float64), adjacency=world.adjacency.astype(np.float64))


# An n-cluster answer needs more than n directions; the checks' tables of two features can run out of them.
@pytest.mark.filterwarnings("ignore:.*clusters are empty", "ignore:adjacency has .* components")
@parametrize_with_checks([S2CAG(), ModularityS2CAG(rounding="kmeans")])
def test_sklearn_contract(estimator, check):
    check(estimator)


@pieces
@given(k=st.integers(2, 5), seed=st.integers(0, 2**32 - 1), cls=st.sampled_from([S2CAG, ModularityS2CAG]))
@settings(max_examples=10, deadline=None)
def test_recovers_planted_groups(k, seed, cls):
    world = graph_world(seed, **EASY | {"n_clusters": k, "n": 100 * k})
    fitted = cls(k, random_state=0).fit(world.attributes, adjacency=world.adjacency)
    assert clustering_accuracy(world.labels, fitted.labels_) > 0.97
    assert fitted.affinity_modularity_ > 0.05
    assert (fitted.conductance_ < 1 - 1 / k + 0.1).all()


@pieces
@pytest.mark.parametrize("cls", [S2CAG, ModularityS2CAG])
@pytest.mark.parametrize("seed", range(3))
def test_a_permutation_of_the_vertices_permutes_the_labels(cls, seed):
    world = graph_world(seed, **EASY)
    order = np.random.default_rng(seed).permutation(len(world.labels))
    plain = cls(3, random_state=0).fit(world.attributes, adjacency=world.adjacency)
    moved = cls(3, random_state=0).fit(world.attributes[order], adjacency=world.adjacency[order][:, order])
    assert clustering_accuracy(moved.labels_, plain.labels_[order]) == 1.0
    np.testing.assert_allclose(moved.affinity_modularity_, plain.affinity_modularity_, rtol=1e-9)
    np.testing.assert_array_equal(np.bincount(moved.labels_), np.bincount(plain.labels_))


@pieces
def test_the_seed_moves_only_the_rounding_and_that_agrees_over_seeds():
    world = graph_world(4, **EASY | {"topic_share": 0.25, "mixing": 0.4})
    runs = [S2CAG(3, random_state=seed).fit(world.attributes, adjacency=world.adjacency) for seed in range(5)]
    for one, two in pairwise(runs):
        np.testing.assert_array_equal(one.embedding_, two.embedding_)
        assert clustering_accuracy(one.labels_, two.labels_) > 0.99


@pieces
@given(k=st.integers(2, 5), seed=st.integers(0, 2**32 - 1), cls=st.sampled_from([S2CAG, ModularityS2CAG]))
@settings(max_examples=10, deadline=None)
def test_memberships_are_the_relaxed_indicator_and_its_largest_entry_is_the_label(k, seed, cls):
    world = graph_world(seed, **EASY | {"n_clusters": k, "n": 60 * k})
    fitted = cls(k, random_state=0).fit(world.attributes, adjacency=world.adjacency)
    U, Y, labels = fitted.memberships_, fitted.embedding_, fitted.labels_
    assert (U >= 0).all()
    np.testing.assert_allclose(U.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(U.argmax(axis=1), labels)
    i = seed % len(labels)
    coefficients = Y[i] @ Y.T
    literal = [max(coefficients[labels == c].sum() / (labels == c).sum() ** 0.5, 0) for c in range(k)]
    np.testing.assert_allclose(U[i], np.array(literal) / sum(literal), atol=1e-10)
    turned = np.linalg.qr(np.random.default_rng(seed).normal(size=(k, k)))[0]
    fitted.embedding_ = Y @ turned
    np.testing.assert_allclose(fitted.memberships_, U, atol=1e-10)


def test_memberships_of_a_vertex_that_nothing_speaks_for_are_equal():
    fitted = S2CAG(2, random_state=0).fit(np.random.default_rng(0).normal(size=(30, 6)))
    fitted.embedding_[3] = 0
    np.testing.assert_array_equal(fitted.memberships_[3], [0.5, 0.5])
    with pytest.raises(NotFittedError):
        _ = S2CAG().memberships_


@pieces
@pytest.mark.parametrize("options", [{}, {"precompute": False}])
@pytest.mark.parametrize("cls", [S2CAG, ModularityS2CAG])
def test_subspaces_are_the_leading_directions_of_the_smoothed_rows(cls, options):
    world = graph_world(4, **EASY)
    fitted = cls(3, order=4, decay=0.8, random_state=0, **options).fit(world.attributes, adjacency=world.adjacency)
    before = fitted.n_unattributed_
    P = literal_walk(world.adjacency.toarray())
    X = TfidfTransformer().fit_transform(world.attributes).toarray()
    Z = sum(0.8**t * np.linalg.matrix_power(P, t) @ X for t in range(5))
    for dim in (2, None):
        bases = fitted.subspaces(world.attributes, adjacency=world.adjacency, subspace_dim=dim)
        assert len(bases) == 3
        for c, basis in enumerate(bases):
            values, vectors = np.linalg.eigh(Z[fitted.labels_ == c].T @ Z[fitted.labels_ == c])
            held = np.cumsum(values[::-1]) / values.sum()
            rank = dim or int(np.searchsorted(held, 0.95)) + 1
            np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-10)
            assert principal_angles(basis, vectors[:, -rank:]).max() < 1e-5
    assert fitted.n_unattributed_ == before


def test_subspaces_of_a_graph_want_that_graph(tmp_path):
    world = graph_world(4, **EASY)
    fitted = S2CAG(3, random_state=0).fit(world.attributes, adjacency=world.adjacency)
    for one in (fitted, S2CAG.load(fitted.save(tmp_path / "m.safetensors"))):
        with pytest.raises(ValueError, match="adjacency must be the graph that was fitted, got None"):
            one.subspaces(world.attributes)


def test_subspaces_refuse_other_rows_and_what_does_not_fit(monkeypatch):
    X = np.random.default_rng(0).normal(size=(30, 6))
    fitted = S2CAG(2, random_state=0).fit(X)
    assert [basis.shape for basis in fitted.subspaces(X, subspace_dim=2)] == [(6, 2), (6, 2)]
    with pytest.raises(ValueError, match="X must be the 30 rows that were fitted, got 29"):
        fitted.subspaces(X[1:])
    with pytest.raises(ValueError, match="subspace_dim must be between 1 and the 6 attributes, got 7"):
        fitted.subspaces(X, subspace_dim=7)
    monkeypatch.setattr("polyspan.cluster._graph_clusterer.available_memory_bytes", lambda: 2**12)
    with pytest.raises(
        ValueError, match=r"smoothed.* got shape \(30, 6\): bases take 0.0 GiB .* keep fewer attributes"
    ):
        fitted.subspaces(X)


def literal_walk(A):
    n = len(A)
    A1 = A + np.eye(n)
    D1 = np.diag(A1.sum(axis=1) ** -0.5)
    A3 = D1 @ A1 @ D1 + np.eye(n)
    return np.diag(1 / A3.sum(axis=1)) @ A3


def literal_smoothing(A, X, T, alpha):
    """The paper's formula on dense matrices, hop by hop."""
    P, n = literal_walk(A), len(A)
    X = TfidfTransformer().fit_transform(X).toarray()
    v = X @ (X.T @ np.ones(n))
    v[v == 0] = 1
    F = np.diag(v**-0.5) @ X
    weights = [alpha**t for t in range(T + 1)]
    return sum(w * np.linalg.matrix_power(P, t) @ F for t, w in enumerate(weights)) / sum(weights)


@pieces
@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize(("order", "decay"), [(0, 0.5), (3, 0.0), (10, 0.9), (5, 1.0), (12, 1.8)])
def test_embedding_spans_the_subspace_of_the_dense_formula(order, decay, precompute):
    world = graph_world(5, **EASY | {"d": 150})
    A, X = world.adjacency.toarray(), world.attributes.toarray()
    U, s, _ = np.linalg.svd(literal_smoothing(A, X, order, decay), full_matrices=False)
    fitted = S2CAG(3, order=order, decay=decay, tol=1e-10, precompute=precompute, random_state=0)
    fitted.fit(sp.csr_array(X), adjacency=sp.coo_matrix(A))
    assert fitted.precomputed_ is precompute
    assert principal_angles(U[:, 1:4], fitted.embedding_).max() < 1e-6
    np.testing.assert_allclose(fitted.singular_values_, s[:4], rtol=1e-8)
    np.testing.assert_allclose(fitted.embedding_.T @ fitted.embedding_, np.eye(3), atol=1e-10)


@pieces
@pytest.mark.parametrize("options", [{}, {"precompute": True}, {"solver": "randomized", "n_iter": 20}])
@pytest.mark.parametrize("resolution", [0.5, 1.0])
def test_modularity_embedding_spans_the_leading_eigenvectors_of_the_dense_formula(resolution, options):
    world = graph_world(6, **EASY | {"d": 150})
    Z = literal_smoothing(world.adjacency.toarray(), world.attributes.toarray(), 6, 0.9)
    Z = np.diag(np.sqrt(Z.sum(axis=1))) @ Z
    omega = (Z @ Z.T).sum(axis=1)
    values, vectors = np.linalg.eigh(Z @ Z.T - resolution * np.outer(omega, omega) / omega.sum())
    fitted = ModularityS2CAG(3, order=6, resolution=resolution, tol=1e-10, random_state=0, **options)
    fitted.fit(world.attributes, adjacency=world.adjacency)
    assert principal_angles(vectors[:, -3:], fitted.embedding_).max() < 1e-5
    np.testing.assert_allclose(fitted.singular_values_**2, values[:-4:-1], rtol=1e-7)
    literal = factored_modularity(Z, fitted.labels_, resolution=resolution)
    np.testing.assert_allclose(fitted.affinity_modularity_, literal, rtol=1e-9)


@pieces
@pytest.mark.parametrize("cls", [S2CAG, ModularityS2CAG])
@pytest.mark.parametrize("precompute", [True, False])
def test_float32_keeps_its_width_and_the_subspace(cls, precompute):
    world = graph_world(7, **EASY)
    wide = cls(3, random_state=0, precompute=precompute).fit(world.attributes, adjacency=world.adjacency)
    slim = cls(3, random_state=0, precompute=precompute, dtype=np.float32)
    slim.fit(world.attributes, adjacency=world.adjacency)
    assert slim.embedding_.dtype == np.float32
    assert principal_angles(wide.embedding_.astype(np.float64), slim.embedding_.astype(np.float64)).max() < 1e-3
    np.testing.assert_array_equal(wide.labels_, slim.labels_)


@pieces
def test_every_kind_of_graph_gives_the_same_labels():
    world = graph_world(8, **EASY)
    A, X = world.adjacency, world.attributes
    expected = S2CAG(3, random_state=0).fit(X, adjacency=A).labels_
    torch = pytest.importorskip("torch")
    pairs = np.array(A.nonzero())

    class Data:
        edge_index, num_nodes = torch.as_tensor(pairs), A.shape[0]

    kinds = [
        A.toarray(),
        sp.csc_matrix(A),
        sp.coo_array(A),
        sp.lil_array(A).astype(bool),
        pairs,
        torch.as_tensor(pairs),
    ]
    kinds += [nx.from_scipy_sparse_array(A), Data()]
    for kind in kinds:
        np.testing.assert_array_equal(S2CAG(3, random_state=0).fit(X, adjacency=kind).labels_, expected)
    for rows in (X.toarray(), sp.csc_array(X), X.astype(np.int64)):
        np.testing.assert_array_equal(S2CAG(3, random_state=0).fit(rows, adjacency=A).labels_, expected)


@pieces
@pytest.mark.parametrize("cls", [S2CAG, ModularityS2CAG])
def test_signed_attributes_are_lifted_to_affinities_that_are_not_negative(cls):
    rng = np.random.default_rng(9)
    labels = np.repeat([0, 1, 2], 60)
    X = rng.normal(size=(3, 10))[labels] + 0.5 * rng.normal(size=(180, 10))
    fitted = cls(3, random_state=0).fit(X)
    assert fitted.signed_
    assert clustering_accuracy(labels, fitted.labels_) > 0.98
    assert ((fitted.conductance_ >= 0) & (fitted.conductance_ <= 1)).all()
    sparse = cls(3, random_state=0).fit(sp.csr_array(X))
    np.testing.assert_array_equal(sparse.labels_, fitted.labels_)


def test_loops_isolated_vertices_and_empty_rows_are_counted_and_placed():
    world = graph_world(10, **EASY | {"degree": 20.0})
    A, X = world.adjacency.tolil(), world.attributes.tolil()
    A[0] = A[:, 0] = A[1] = A[:, 1] = 0
    A[1, 1] = A[5, 5] = 2.0
    X[2] = X[3] = X[4] = 0
    fitted = S2CAG(3, random_state=0).fit(X.tocsr(), adjacency=A.tocsr())
    assert (fitted.n_isolated_, fitted.n_components_, fitted.n_unattributed_) == (2, 3, 3)
    assert clustering_accuracy(world.labels[:5], fitted.labels_[:5]) == 1.0


def test_more_pieces_than_clusters_are_said():
    world = graph_world(17, **EASY)
    pair = sp.coo_array(world.adjacency)
    inner = world.labels[pair.row] == world.labels[pair.col]
    A = sp.csr_array((pair.data[inner], (pair.row[inner], pair.col[inner])), shape=pair.shape)
    with pytest.warns(UserWarning, match="adjacency has 3 components of two or more vertices for n_clusters=2"):
        S2CAG(2, random_state=0).fit(world.attributes, adjacency=A)


def test_directed_graphs_are_symmetrised_with_a_warning():
    world = graph_world(11, **EASY)
    upper = sp.triu(world.adjacency).tocsr()
    expected = S2CAG(3, random_state=0, n_neighbors=3)
    with pytest.warns(UserWarning, match="adjacency is directed"):
        labels = expected.fit(world.attributes, adjacency=upper).labels_
    with pytest.warns(UserWarning, match="adjacency is directed"):
        again = expected.fit(world.attributes, adjacency=nx.from_scipy_sparse_array(upper, create_using=nx.DiGraph))
    np.testing.assert_array_equal(again.labels_, labels)


@pieces
def test_a_uint8_number_of_clusters_is_a_number():
    world = graph_world(12, **EASY)
    k = world.labels.astype(np.uint8).max() + np.uint8(1)
    assert isinstance(k, np.uint8)
    fitted = S2CAG(k, random_state=0).fit(world.attributes, adjacency=world.adjacency)
    assert fitted.embedding_.shape == (300, 3)
    assert clustering_accuracy(world.labels, fitted.labels_) > 0.97


def bad(change):
    world = graph_world(13, n=60, n_clusters=2, d=20)
    return change(world.adjacency.toarray(), world.attributes.toarray())


def _with(A, value, where=(3, 7)):
    A = A.copy()
    A[where] = A[where[::-1]] = value
    return A


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda A, X: (X, A[:, :50]), {}, "adjacency|edge_index"),
        (lambda A, X: (X, np.argwhere(A)), {}, r"edge_index of shape \(2, m\), got \(\d+, 2\): transpose it"),
        (lambda A, X: (X[:50], A), {}, r"got shape \(60, 60\) for X \(50, 20\)"),
        (lambda A, X: (X, _with(A, -2.0)), {}, "not negative, got -2.0 at row 3, column 7"),
        (lambda A, X: (X, _with(A, np.nan)), {}, "finite numbers, got nan at row 3, column 7"),
        (lambda A, X: (X, _with(A, np.inf)), {}, "finite numbers, got inf"),
        (lambda A, X: (X, A.astype(complex)), {}, "real numbers"),
        (lambda A, X: (X, A), {"n_clusters": 61}, "n_clusters must be at most the number of vertices, got .*61"),
        (lambda A, X: (X, A), {"n_clusters": 20}, r"must be at most \d+, the directions .*n_clusters=20"),
        (lambda A, X: (X[:, :2], A), {"n_clusters": 2}, "must be at most 1, the directions"),
        (lambda A, X: (np.ones((60, 5)), A), {}, "must be at most 0, the directions .* beside the trivial one"),
        (lambda A, X: (X, A), {"n_clusters": 0}, "n_clusters must be an integer of at least 1, got 0"),
        (lambda A, X: (X, A), {"n_clusters": 2.5}, "n_clusters must be an integer of at least 1, got 2.5"),
        (lambda A, X: (X, A), {"order": -1}, "order must be an integer of at least 0, got -1"),
        (lambda A, X: (X, A), {"decay": -0.5}, "decay must be a finite number of at least 0, got -0.5"),
        (lambda A, X: (X, A), {"decay": np.nan}, "decay must be a finite number of at least 0, got nan"),
        (lambda A, X: (X, A), {"tol": 2.0}, r"tol must lie in \[0, 1\), got 2.0"),
        (lambda A, X: (X, A), {"rounding": "magic"}, "rounding must be one of .* got 'magic'"),
        (lambda A, X: (X, A), {"dtype": "float16"}, "dtype must be None, float32 or float64, got 'float16'"),
        (
            lambda A, X: (X - 1, A),
            {"text_weighting": "tfidf"},
            "'tfidf' needs attributes that are not negative, got -1",
        ),
        (lambda A, X: (X * 0, A), {}, "X must have an attribute that is not zero"),
    ],
)
def test_bad_input_is_refused_with_its_name(change, options, message):
    X, A = bad(change)
    with pytest.raises(ValueError, match=message), np.errstate(all="ignore"):
        S2CAG(**{"n_clusters": 2} | options).fit(X, adjacency=A)


def test_modularity_refuses_its_own_bad_parameters():
    X, A = bad(lambda A, X: (X, A))
    with pytest.raises(ValueError, match="resolution must be a finite number of at least 0, got -1"):
        ModularityS2CAG(2, resolution=-1).fit(X, adjacency=A)
    with pytest.raises(ValueError, match="an attribute that is not zero"):
        ModularityS2CAG(2).fit(X * 0, adjacency=A)


@pytest.mark.parametrize(("cls", "most"), [(S2CAG, 19), (ModularityS2CAG, 20)])
def test_too_many_clusters_for_the_attributes_are_refused_before_any_work(cls, most):
    X, A = bad(lambda A, X: (X, A))
    hops = {"order": 10**7}  # a day of products with the matrix
    with pytest.raises(ValueError, match=f"n_clusters must be at most {most}, the directions .* got n_clusters=21"):
        cls(21, **hops).fit(X, adjacency=A)
    with pytest.raises(ValueError, match="X must have an attribute that is not zero, got zeros alone"):
        cls(2, **hops).fit(X * 0, adjacency=A)


def test_a_graph_without_edges_is_said_to_add_nothing():
    X, A = bad(lambda A, X: (X, A * 0))
    with pytest.warns(UserWarning, match="adjacency joins no two vertices: attributes alone make the groups"):
        fitted = S2CAG(2, random_state=0).fit(X, adjacency=A)
    assert fitted.n_isolated_ == 60


def test_a_huge_dense_adjacency_is_refused_before_it_is_touched():
    A = np.broadcast_to(np.float32(0), (100_000, 100_000))
    with pytest.raises(
        ValueError, match=r"\(100000, 100000\), which takes 74.5 GiB in float64; pass a scipy.sparse.csr_array"
    ):
        S2CAG(2).fit(np.eye(2), adjacency=A)


def test_a_table_of_few_features_is_clustered_in_the_directions_that_it_has():
    rng = np.random.default_rng(14)
    X = np.concatenate([rng.normal(size=(40, 2)) * 0.1 + c for c in ([3, 0], [0, 3], [-3, -3])])
    fitted = S2CAG(3, random_state=0).fit(X)
    assert fitted.embedding_.shape == (120, 2)
    assert clustering_accuracy(np.repeat([0, 1, 2], 40), fitted.labels_) == 1.0


@pieces
def test_fewer_groups_than_asked_for_are_said():
    world = graph_world(0, n=80, n_clusters=2, d=40, words=5.0)
    with pytest.warns(ConvergenceWarning, match="1 of n_clusters=10 clusters are empty"):
        fitted = S2CAG(10, n_init=1, random_state=0).fit(world.attributes, adjacency=world.adjacency)
    assert set(fitted.labels_) == set(range(9))
    assert len(fitted.conductance_) == 9


@pytest.mark.parametrize("cls", [S2CAG, ModularityS2CAG])
def test_choosing_hops_without_labels_is_near_the_best_of_the_grid(cls):
    world = graph_world(15, n=400, n_clusters=4, d=200, degree=5.0, mixing=0.3, words=20.0, topic_share=0.2)
    grid = [(0, 0.0), (1, 0.9), (4, 0.9), (10, 1.0), (100, 1.1)]
    choice = select_order_decay(world.attributes, world.adjacency, 4, grid, estimator=cls())
    share = {}
    for order, decay in grid:
        fitted = cls(4, order=order, decay=decay, random_state=0).fit(world.attributes, adjacency=world.adjacency)
        share[order, decay] = clustering_accuracy(world.labels, fitted.labels_)
    assert share[choice.order, choice.decay] > max(share.values()) - 0.05
    assert max(share.values()) > share[0, 0.0] + 0.2
    assert [row.score for row in choice.table] == sorted((r.score for r in choice.table), reverse=True)


def test_scores_of_the_choice_are_two_modularities():
    world = graph_world(16, **EASY)
    (row,) = select_order_decay(world.attributes, world.adjacency, 3, [(5, 0.9)]).table
    fitted = S2CAG(3, order=5, random_state=0).fit(world.attributes, adjacency=world.adjacency)
    groups = [set(np.flatnonzero(fitted.labels_ == c)) for c in range(3)]
    G = nx.from_scipy_sparse_array(world.adjacency)
    assert row.graph_modularity == pytest.approx(nx.community.modularity(G, groups), abs=1e-12)
    tfidf = TfidfTransformer().fit_transform(world.attributes)
    assert row.attribute_modularity == pytest.approx(factored_modularity(tfidf, fitted.labels_), abs=1e-12)
    assert row.score == pytest.approx((row.graph_modularity * row.attribute_modularity) ** 0.5)
    table = select_order_decay(world.attributes.toarray(), None, 3, [(1, 0.5)], workers=1).table
    assert table[0].graph_modularity > 0
    with pytest.raises(ValueError, match="grid must hold at least one pair"):
        select_order_decay(world.attributes, world.adjacency, 3, [])


@pieces
def test_memory_grows_with_the_edges_and_not_with_their_square():
    peaks = {}
    for n in (4_000, 16_000):
        world = graph_world(0, n=n, n_clusters=4, d=400)
        fit = partial(S2CAG(4, random_state=0).fit, world.attributes, adjacency=world.adjacency)
        peaks[n] = measure_peak(fit).peak_bytes
    assert peaks[16_000] < 16_000**2 / 4


@pytest.mark.parametrize("cls", [S2CAG, ModularityS2CAG])
@pytest.mark.parametrize("dtype", [None, "float32", np.float32])
def test_a_saved_clustering_comes_back_whole(tmp_path, cls, dtype):
    X = np.random.default_rng(0).normal(size=(60, 8))
    fitted = cls(3, random_state=0, dtype=dtype).fit(X)
    back = cls.load(fitted.save(tmp_path / "fit.safetensors"))
    assert back.get_params() == fitted.get_params()
    assert vars(back).keys() == vars(fitted).keys()
    for name, value in vars(fitted).items():
        np.testing.assert_array_equal(getattr(back, name), value)
        assert np.asarray(getattr(back, name)).dtype == np.asarray(value).dtype
    blob = bytearray((tmp_path / "fit.safetensors").read_bytes())
    blob[-3] ^= 1
    (tmp_path / "torn.safetensors").write_bytes(blob)
    with pytest.raises(CorruptFile):
        cls.load(tmp_path / "torn.safetensors")
    other = ModularityS2CAG if cls is S2CAG else S2CAG
    with pytest.raises(WrongContent, match=f"a fitted {other.__name__}"):
        other.load(tmp_path / "fit.safetensors")
    with pytest.raises(NotFittedError):
        cls().save(tmp_path / "none.safetensors")


@pytest.mark.parametrize("cls", [S2CAG, ModularityS2CAG])
def test_there_is_no_predict_and_it_is_said_why(cls):
    fitted = cls(2, random_state=0).fit(np.random.default_rng(0).normal(size=(30, 5)))
    assert not hasattr(fitted, "predict")
    with pytest.raises(AttributeError, match="is transductive and has no predict"):
        fitted.predict(np.zeros((2, 5)))
