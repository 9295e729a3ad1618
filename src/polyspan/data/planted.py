"""Worlds whose truth is known: subspaces, attributed graphs, pairs of models, classes that are subspaces."""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp


class PlantedSubspaces(NamedTuple):
    """Points (n, d) on a union of subspaces, labels (n,), and the bases, a list of (d, k) with orthonormal columns."""

    points: np.ndarray
    labels: np.ndarray
    bases: list[np.ndarray]


class PlantedGraph(NamedTuple):
    """A symmetric adjacency (n, n) in CSR without self loops, sparse word counts (n, d), and labels (n,)."""

    adjacency: sp.csr_array
    attributes: sp.csr_array
    labels: np.ndarray


class PlantedPair(NamedTuple):
    """The same images and texts embedded by two models, (n, d) each; row i of both models is one item."""

    images_a: np.ndarray
    images_b: np.ndarray
    texts_a: np.ndarray
    texts_b: np.ndarray


class PlantedClasses(NamedTuple):
    """Training and test features (n, d) of classes that are zero-mean Gaussians, each on a subspace of its own.

    Labels are int64 (n,); ``bases`` (C, d, k) has orthonormal columns.
    """

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    bases: np.ndarray


def planted_subspaces(
    seed: int, *, n_per: int = 100, d: int = 30, k: int = 4, n_subspaces: int = 5, noise: float = 0.0
) -> PlantedSubspaces:
    """Draw ``n_per`` standard normal points on each of ``n_subspaces`` random k-dimensional subspaces of R^d.

    ``noise`` is the standard deviation of what is added to every coordinate. Points are shuffled. The subspaces are
    independent while ``n_subspaces * k <= d``.

    Raises
    ------
    ValueError
        A count is below 1, ``k`` is above ``d``, or ``noise`` is negative.
    """
    _check_counts(n_per=n_per, d=d, k=k, n_subspaces=n_subspaces)
    _check_subspace(d, k, noise)
    rng = np.random.default_rng(seed)
    bases = [np.linalg.qr(rng.normal(size=(d, k)))[0] for _ in range(n_subspaces)]
    points = np.concatenate([rng.normal(size=(n_per, k)) @ Q.T for Q in bases])
    points += noise * rng.normal(size=points.shape)
    order = rng.permutation(len(points))
    return PlantedSubspaces(points[order], np.repeat(np.arange(n_subspaces), n_per)[order], bases)


def planted_graph(
    seed: int,
    *,
    n: int = 600,
    n_clusters: int = 4,
    d: int = 200,
    degree: float = 8.0,
    mixing: float = 0.3,
    words: float = 20.0,
    topic_share: float = 0.3,
) -> PlantedGraph:
    r"""Draw a block model whose nodes carry word counts; built edge by edge, so that millions of edges take seconds.

    Two nodes are joined with probability :math:`(\delta/n)(\mu + C(1-\mu)\,[\text{same group}])` for the mean degree δ,
    the mixing μ and C groups, to first order in δ/n.

    Parameters
    ----------
    n, n_clusters : int
        Nodes, in groups of equal expected size.
    d : int
        Words, shared out among the groups as topics of ``d // n_clusters``.
    degree : float
        Expected edges a node, before duplicates fall together.
    mixing : float
        Share of edges whose other end is drawn from all nodes, in [0, 1]; 1 leaves a graph without groups.
    words : float
        Expected words a node.
    topic_share : float
        Share of a node's words from its own group's topic; the others come from all words. 0 leaves attributes
        without groups.

    Raises
    ------
    ValueError
        A share outside [0, 1], a negative mean, or more groups than nodes or words.
    """
    _check_counts(n=n, n_clusters=n_clusters, d=d)
    for name, value in (("degree", degree), ("words", words)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    for name, value in (("mixing", mixing), ("topic_share", topic_share)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    if n_clusters > min(n, d):
        raise ValueError(f"n_clusters must be at most min(n, d)={min(n, d)}, got {n_clusters}")
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % n_clusters)
    by_group = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=n_clusters)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])

    n_edges = rng.poisson(n * degree / 2)
    left = rng.integers(n, size=n_edges)
    group = labels[left]
    own = by_group[starts[group] + (rng.random(n_edges) * sizes[group]).astype(np.int64)]
    right = np.where(rng.random(n_edges) < mixing, rng.integers(n, size=n_edges), own)
    keep = left != right
    half = sp.coo_array((np.ones(keep.sum(), dtype=np.float32), (left[keep], right[keep])), shape=(n, n)).tocsr()
    adjacency = (half + half.T).tocsr()
    adjacency.data[:] = 1.0

    n_words = rng.poisson(words, size=n)
    who = np.repeat(np.arange(n), n_words)
    topic = d // n_clusters
    from_topic = labels[who] * topic + rng.integers(topic, size=len(who))
    word = np.where(rng.random(len(who)) < topic_share, from_topic, rng.integers(d, size=len(who)))
    attributes = sp.coo_array((np.ones(len(who), dtype=np.float32), (who, word)), shape=(n, d)).tocsr()
    return PlantedGraph(adjacency, attributes, labels.astype(np.int64))


def planted_pair(seed: int, *, n: int = 400, d: int = 32, noise: float = 0.6, one_map: bool = True) -> PlantedPair:
    """Make model B from model A by a rotation, a shift and noise; ``one_map=False`` turns texts another way.

    ``noise`` is the standard deviation of what is added to every coordinate of model B; model A is standard normal.

    Raises
    ------
    ValueError
        A count is below 1, or ``noise`` is negative.
    """
    _check_counts(n=n, d=d)
    _check_subspace(d, d, noise)
    rng = np.random.default_rng(seed)
    turn, other = (np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(2))
    (images, texts), blur, shift = rng.normal(size=(2, n, d)), rng.normal(size=(2, n, d)), rng.normal(size=d)
    images_b, texts_b = images @ turn, texts @ (turn if one_map else other)
    return PlantedPair(images, images_b + shift + noise * blur[0], texts, texts_b + shift + noise * blur[1])


def planted_gaussian_classes(
    seed: int, *, n_classes: int = 8, d: int = 40, k: int = 4, n_per: int = 100, n_test: int = 100, noise: float = 0.25
) -> PlantedClasses:
    r"""Draw classes that share the mean zero and differ by subspace only: no linear classifier can tell them apart.

    A row of class c is :math:`S_c z + \sigma\varepsilon` with z and ε standard normal and σ the ``noise``.

    Parameters
    ----------
    n_classes, d, k : int
        Classes, features, and dimension of each class's subspace.
    n_per, n_test : int
        Training and test rows a class.
    noise : float
        Standard deviation of what is added to every coordinate.

    Raises
    ------
    ValueError
        A count is below 1, ``k`` is above ``d``, or ``noise`` is negative.
    """
    _check_counts(n_classes=n_classes, d=d, k=k, n_per=n_per, n_test=n_test)
    _check_subspace(d, k, noise)
    rng = np.random.default_rng(seed)
    bases = np.linalg.qr(rng.normal(size=(n_classes, d, k)))[0]

    def draw(rows):
        labels = rng.permutation(np.repeat(np.arange(n_classes), rows))
        codes = rng.normal(size=(len(labels), k))
        return np.einsum("ndk,nk->nd", bases[labels], codes) + noise * rng.normal(size=(len(labels), d)), labels

    train, train_labels = draw(n_per)
    test, test_labels = draw(n_test)
    return PlantedClasses(train, train_labels, test, test_labels, bases)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_subspace(d: int, k: int, noise: float) -> None:
    if k > d:
        raise ValueError(f"k must be at most d={d}, got {k}")
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
