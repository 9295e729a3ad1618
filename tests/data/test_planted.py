import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import LogisticRegression

from polyspan.data import planted_gaussian_classes, planted_graph, planted_pair, planted_subspaces
from polyspan.run import measure_peak

WORLDS = [planted_subspaces, planted_graph, planted_pair, planted_gaussian_classes]


def arrays(world):
    for part in world:
        for array in part if isinstance(part, list) else [part]:
            yield array.toarray() if hasattr(array, "toarray") else array


@pytest.mark.parametrize("make", WORLDS)
def test_a_seed_makes_one_world_two_make_two_and_no_global_generator_moves(make):
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first, again, other = (list(arrays(make(seed))) for seed in (5, 5, 6))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1), k=st.integers(1, 4), extra=st.integers(0, 6), n_subspaces=st.integers(1, 4)
)  # fmt: skip
def test_points_without_noise_lie_on_the_subspace_of_their_label(seed, k, extra, n_subspaces):
    world = planted_subspaces(seed, n_per=k + 3, d=k + extra, k=k, n_subspaces=n_subspaces)
    assert np.bincount(world.labels).tolist() == [k + 3] * n_subspaces
    for label, Q in enumerate(world.bases):
        points = world.points[world.labels == label]
        np.testing.assert_allclose(Q.T @ Q, np.eye(k), atol=1e-12)
        np.testing.assert_allclose(points @ Q @ Q.T, points, atol=1e-12)
        assert np.linalg.matrix_rank(points) == k


def test_noise_is_the_spread_off_the_subspace_in_each_direction():
    world = planted_subspaces(0, n_per=2000, d=12, k=3, n_subspaces=2, noise=0.3)
    for label, Q in enumerate(world.bases):
        points = world.points[world.labels == label]
        off = points - points @ Q @ Q.T
        assert np.sqrt((off**2).sum() / (len(points) * 9)) == pytest.approx(0.3, rel=0.03)


def test_a_planted_graph_is_symmetric_without_loops_and_counts_words():
    world = planted_graph(1, n=300, n_clusters=3, d=61)
    A = world.adjacency.toarray()
    np.testing.assert_array_equal(A, A.T)
    assert set(np.unique(A)) == {0.0, 1.0}
    assert not A.diagonal().any()
    assert np.bincount(world.labels).tolist() == [100, 100, 100]
    words = world.attributes.toarray()
    np.testing.assert_array_equal(words, np.floor(words))
    assert words.min() >= 0
    assert words.sum(axis=1).mean() == pytest.approx(20, rel=0.1)
    assert (world.adjacency.dtype, world.attributes.dtype, world.labels.dtype) == (np.float32, np.float32, np.int64)


@pytest.mark.parametrize(("n_clusters", "mixing"), [(4, 0.3), (4, 0.0), (4, 1.0), (1, 0.5)])
def test_edges_are_as_frequent_as_the_formula_says(n_clusters, mixing):
    n, degree = 2000, 10.0
    world = planted_graph(2, n=n, n_clusters=n_clusters, d=40, degree=degree, mixing=mixing)
    same = world.labels[:, None] == world.labels[None, :]
    np.fill_diagonal(same, False)
    A = world.adjacency.toarray() > 0
    for mask, factor in ((same, mixing + n_clusters * (1 - mixing)), (~same & ~np.eye(n, dtype=bool), mixing)):
        if not mask.any():
            continue
        p = degree / n * factor
        # Four standard deviations, and the second order in degree / n.
        allowed = 4 * np.sqrt(2 * p / mask.sum()) + p * p
        assert abs(A[mask].mean() - p) <= allowed


def test_words_come_from_the_own_topic_as_often_as_said():
    world = planted_graph(3, n=2000, n_clusters=4, d=80, topic_share=0.4)
    words = world.attributes.tocoo()
    own = words.data[words.col // 20 == world.labels[words.row]].sum() / words.data.sum()
    assert own == pytest.approx(0.4 + 0.6 / 4, abs=0.01)


def test_two_hundred_thousand_nodes_take_seconds_and_no_square_of_them():
    started = time.perf_counter()
    measured = measure_peak(lambda: planted_graph(0, n=200_000, n_clusters=10, d=2000, degree=20.0))
    assert time.perf_counter() - started < 30
    assert measured.result.adjacency.nnz / 2 == pytest.approx(2e6, rel=0.01)
    assert measured.peak_bytes < 2**30


@pytest.mark.parametrize("options", [{"degree": 0.0}, {"words": 0.0}, {"n": 1, "n_clusters": 1}])
def test_an_empty_graph_or_one_without_words_is_a_graph(options):
    world = planted_graph(0, **({"n": 20, "n_clusters": 2, "d": 6} | options))
    n = options.get("n", 20)
    assert world.adjacency.shape == (n, n)
    assert world.adjacency.nnz == 0 or "words" in options
    assert world.attributes.nnz > 0 or "words" in options


def test_one_rotation_carries_images_and_texts_and_two_do_not():
    for one_map, largest in ((True, 1e-10), (False, None)):
        pair = planted_pair(4, n=120, d=9, noise=0.0, one_map=one_map)
        images, images_b, texts, texts_b = (part - part.mean(axis=0) for part in pair)
        Q = orthogonal_procrustes(images, images_b)[0]
        np.testing.assert_allclose(images @ Q, images_b, atol=1e-10)
        off = np.linalg.norm(texts @ Q - texts_b) / np.linalg.norm(texts_b)
        assert off < largest if largest else off > 0.5


def test_noise_of_a_pair_is_what_the_map_leaves():
    pair = planted_pair(4, n=4000, d=9, noise=0.5)
    images, images_b = (part - part.mean(axis=0) for part in (pair.images_a, pair.images_b))
    off = images @ orthogonal_procrustes(images, images_b)[0] - images_b
    assert off.std() == pytest.approx(0.5, rel=0.03)


def test_classes_that_are_subspaces_are_told_apart_by_subspaces_and_not_by_planes():
    world = planted_gaussian_classes(0)
    assert world.train.shape == world.test.shape == (800, 40)
    assert np.bincount(world.train_labels).tolist() == np.bincount(world.test_labels).tolist() == [100] * 8
    np.testing.assert_allclose(
        np.swapaxes(world.bases, 1, 2) @ world.bases, np.broadcast_to(np.eye(4), (8, 4, 4)), atol=1e-12
    )
    planes = LogisticRegression(max_iter=500).fit(world.train, world.train_labels)
    assert planes.score(world.test, world.test_labels) < 0.3
    fitted = [np.linalg.svd(world.train[world.train_labels == c])[2][:4].T for c in range(8)]
    shadows = np.stack([np.linalg.norm(world.test @ Q, axis=1) for Q in fitted], axis=1)
    assert np.mean(shadows.argmax(axis=1) == world.test_labels) > 0.92


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (planted_subspaces, {"d": 3, "k": 4}, "k must be at most d=3, got 4"),
        (planted_subspaces, {"noise": -1.0}, "noise must be at least 0, got -1.0"),
        (planted_subspaces, {"n_per": 0}, "n_per must be at least 1, got 0"),
        (planted_graph, {"mixing": 1.5}, r"mixing must lie in \[0, 1\], got 1.5"),
        (planted_graph, {"topic_share": -0.1}, "topic_share must lie"),
        (planted_graph, {"degree": float("nan")}, "degree must be at least 0, got nan"),
        (planted_graph, {"n": 3, "n_clusters": 4}, r"n_clusters must be at most min\(n, d\)=3, got 4"),
        (planted_pair, {"n": 0}, "n must be at least 1, got 0"),
        (planted_gaussian_classes, {"k": 41}, "k must be at most d=40, got 41"),
    ],
)
def test_impossible_worlds_are_refused_by_the_name_of_the_argument(make, options, match):
    with pytest.raises(ValueError, match=match):
        make(0, **options)
