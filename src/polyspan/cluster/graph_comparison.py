"""What a clustering of an attributed graph is compared with: attributes alone, links alone, and both more simply."""

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from polyspan.errors import NotConverged
from polyspan.linalg import truncated_svd
from polyspan.run import available_memory_bytes

from ._graph_smoothing import slim
from .attributed_graph import smoothed_attributes
from .self_expressive import ElasticNetSubspaceClustering, OMPSubspaceClustering, ThresholdingSubspaceClustering


class GraphBaseline(NamedTuple):
    """One way to group the vertices: ``labels`` (n,), or None and why not in ``error``; ``seconds`` it took."""

    name: str
    labels: np.ndarray | None
    seconds: float
    error: str | None = None


def graph_baselines(
    X: Any,
    adjacency: Any,
    n_clusters: int,
    *,
    order: int = 10,
    decay: float = 0.9,
    n_init: int = 10,
    random_state: int | None = 0,
) -> Iterator[GraphBaseline]:
    """Yield the groups that simpler methods find in the same graph, one method after another.

    k-means on the attributes and on the rows that :func:`smoothed_attributes` makes of them (raw and of length 1),
    spectral clustering of the graph alone, and the subspace clusterings of points (elastic net, orthogonal matching
    pursuit, thresholding) on the ``max(20, 5 n_clusters)`` leading directions of the smoothed rows. Smoothed rows are
    dense: where (n, d) of them do not fit into free memory, those that need them say so.

    Parameters
    ----------
    X : array or sparse matrix of shape (n, d)
    adjacency : sparse matrix of shape (n, n)
    n_clusters : int
    order, decay : int and float
        Of the smoothing; see :class:`S2CAG`.
    n_init : int
        Starts of every k-means.
    random_state : int, optional
    """
    from sklearn.cluster import KMeans, SpectralClustering
    from sklearn.preprocessing import normalize

    X, A = slim(X), slim(sp.csr_array(adjacency).astype(np.float64))
    kept: list[np.ndarray] = []

    def smooth() -> np.ndarray:
        if not kept:
            needed = 2 * 8 * X.shape[0] * X.shape[1]
            if needed > available_memory_bytes():
                raise MemoryError(f"smoothed rows take {needed / 2**30:.1f} GiB, more than is free")
            kept.append(np.asarray(smoothed_attributes(X, A, order=order, decay=decay)))
        return kept[0]

    def leading() -> np.ndarray:
        if len(kept) < 2:
            # In all of their directions smoothed rows are so alike that thousands of them express each other.
            rank = min(max(20, 5 * n_clusters), min(X.shape) - 1)
            kept.append(smooth() @ truncated_svd(smooth(), rank).Vh.T)
        return kept[1]

    means = KMeans(n_clusters, n_init=n_init, random_state=random_state)
    chance = {"n_init": n_init, "random_state": random_state}
    spectral = SpectralClustering(n_clusters, affinity="precomputed", **chance)
    subspaces = {
        "elastic net, smoothed rows": ElasticNetSubspaceClustering(n_clusters, **chance),
        "matching pursuit, smoothed rows": OMPSubspaceClustering(n_clusters, **chance),
        "thresholding, smoothed rows": ThresholdingSubspaceClustering(n_clusters, **chance),
    }
    ways: dict[str, Callable[[], np.ndarray]] = {
        "k-means, attributes": lambda: means.fit_predict(X),
        "k-means, smoothed rows": lambda: means.fit_predict(smooth()),
        "k-means, smoothed unit rows": lambda: means.fit_predict(normalize(smooth())),
        "spectral, graph only": lambda: spectral.fit_predict(A),
    }
    ways |= {name: lambda made=made: made.fit_predict(leading()) for name, made in subspaces.items()}
    for name, way in ways.items():
        started = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                labels, error = way(), None
        except (ValueError, NotConverged, MemoryError) as told:
            labels, error = None, " ".join(str(told).split())
        yield GraphBaseline(name, labels, time.perf_counter() - started, error)
