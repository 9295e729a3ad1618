"""Claim: one subspace of smoothed attributes groups a graph better than k-means on the smoothed rows."""

import warnings
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from polyspan.claims import Claim
from polyspan.cluster import S2CAG, ModularityS2CAG, smoothed_attributes
from polyspan.data import dataset, planted_graph
from polyspan.linalg import clustering_accuracy

ORDER, DECAY = 10, 0.9
KEPT = 0.9


class Vertices(NamedTuple):
    """A graph as ``edges`` (2, m), either direction, with attributes (n, d) and the class (n,) of every vertex."""

    edges: np.ndarray
    attributes: Any
    labels: np.ndarray


def planted(seed: int) -> Vertices:
    """Block model of 600 vertices in 4 groups where neither links nor words suffice alone.

    About 5 edges a vertex, of which 4 in 10 go anywhere; about 20 words, of which 3 in 10 are of the group's topic.
    """
    world = planted_graph(seed, n=600, n_clusters=4, d=300, degree=5.0, mixing=0.4, words=20.0, topic_share=0.3)
    return Vertices(np.array(world.adjacency.nonzero()), world.attributes.astype(np.float64), world.labels)


def sampled(name: str, seed: int) -> Vertices:
    """Nine tenths of the vertices of a public graph, and the edges among them."""
    world = dataset(name)
    n = len(world.labels)
    rows = np.sort(np.random.default_rng(seed).choice(n, size=int(KEPT * n), replace=False))
    inner = sp.csr_array(world.adjacency)[rows][:, rows]
    return Vertices(np.array(inner.nonzero()), sp.csr_array(world.attributes)[rows].astype(float), world.labels[rows])


def shuffle_attributes(data: Vertices, seed: int) -> Vertices:
    """Give every vertex the attributes of another: what is left in them contradicts the graph."""
    order = np.random.default_rng([seed, 1]).permutation(data.attributes.shape[0])
    return data._replace(attributes=data.attributes[order])


def trial(data: Vertices, seed: int) -> dict[str, float]:
    """Cluster by every arm with the true number of groups; each k-means takes 10 starts, as the method's rounding does.

    The baseline has an advantage that no user has: of raw and unit rows, the labels choose.
    """
    from sklearn.cluster import KMeans, SpectralClustering
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.preprocessing import normalize

    X, n, k = data.attributes, len(data.labels), len(np.unique(data.labels))
    ones = np.ones(data.edges.shape[1], dtype=np.float64)
    A = sp.csr_array((ones, data.edges.astype(np.int32)), shape=(n, n))
    A = sp.csr_array(A.maximum(A.T).sign())
    means = KMeans(k, n_init=10, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="adjacency has .* components")
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        smooth = smoothed_attributes(X, A, order=ORDER, decay=DECAY)
        found = {
            "method": S2CAG(k, order=ORDER, decay=DECAY, random_state=seed).fit(X, adjacency=A),
            "M-S2CAG": ModularityS2CAG(k, order=ORDER, decay=DECAY, random_state=seed).fit(X, adjacency=A),
            "S2CAG, k-means rounding": S2CAG(k, order=ORDER, decay=DECAY, rounding="kmeans", random_state=seed).fit(
                X, adjacency=A
            ),
            "spectral, graph only": SpectralClustering(k, affinity="precomputed", random_state=seed).fit(A),
        }
        labels = {name: arm.labels_ for name, arm in found.items()}
        tables = {
            "k-means, smoothed rows": smooth,
            "k-means, smoothed unit rows": normalize(smooth),
            "k-means, TF-IDF": _weighted(X, TfidfTransformer, normalize),
        }
        labels |= {name: means.fit(rows).labels_ for name, rows in tables.items()}
    scores = {name: clustering_accuracy(data.labels, assigned) for name, assigned in labels.items()}
    return scores | {"baseline": max(scores["k-means, smoothed rows"], scores["k-means, smoothed unit rows"])}


def _weighted(X: Any, counts: Any, unit: Any) -> Any:
    """Weight attributes as the method does: TF-IDF for counts, unit rows otherwise."""
    values = X.data if sp.issparse(X) else X
    if (values >= 0).all() and np.array_equal(values, np.rint(values)):
        rows = sp.csr_array(counts().fit_transform(sp.csr_array(X)))
        return sp.csr_array((rows.data, rows.indices.astype(np.int32), rows.indptr.astype(np.int32)), shape=rows.shape)
    return unit(X)


CLAIM = Claim(
    slug="s2cag",
    statement="The leading subspace of smoothed attributes groups a graph better than k-means on the smoothed rows.",
    method=f"S2CAG, T={ORDER}, decay {DECAY}, 10 starts of its own rounding",
    baseline="k-means on the rows smoothed by the same hops and decay, raw or of unit length, whichever scores higher",
    metric="clustering accuracy, share of vertices in the group of their class",
    margin=0.02,
    worlds={
        "planted": planted,
        "acm": lambda seed: sampled("acm", seed),
        "citeseer": lambda seed: sampled("citeseer", seed),
        "shuffled": lambda seed: shuffle_attributes(planted(seed), seed),
    },
    control="shuffled",
    levels={"quick": ("planted",), "standard": ("planted", "acm", "citeseer")},
    trial=trial,
    user_data=Vertices,
    spoil=shuffle_attributes,
    why=(
        "It does not hold in general. Measured on nine tenths of the vertices, 5 draws: on ACM the method is right for "
        "92 to 93 % of the papers in every draw, where k-means on smoothed rows falls into a poor optimum now and then "
        "(86 % on average; 54 % with rows of unit length); on CiteSeer the two tie at 66 to 67 %; on 8 planted block "
        "models k-means on smoothed rows is ahead by one point (95.4 against 94.6 %). The method beats k-means on "
        "attributes alone and spectral clustering of the graph alone in all three, and hardly depends on the seed. "
        "Shuffled attributes leave it near chance, below the graph alone: attributes are what it lives on."
    ),
)
