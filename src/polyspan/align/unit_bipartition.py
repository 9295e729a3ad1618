"""A graph of units cut in two, again and again, where it is cheapest: a tree of groups."""

from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh


class Bipartition(NamedTuple):
    """Groups found by recursive bipartition, and the tree of them.

    Node 0 is all vertices; split s cuts node ``splits[s]`` into nodes 2s + 1 and 2s + 2 at the normalised cut
    ``cuts[s]``, in [0, 2]. ``labels`` (m,) is each vertex's group and ``leaves`` (k,) each group's node.
    """

    labels: np.ndarray
    splits: np.ndarray
    cuts: np.ndarray
    leaves: np.ndarray


def recursive_bipartition(A: np.ndarray, k: int) -> Bipartition:
    r"""Cut a graph with affinities ``A`` (m, m) into k groups, one of them in two at a time.

    Each group is ordered by the second eigenvector of the random walk within it, and cut at the place of the least
    normalised cut, :math:`\mathrm{cut}(S, T) / \mathrm{vol}(S) + \mathrm{cut}(S, T) / \mathrm{vol}(T)`, all within
    the group; of all groups the one with the least cut is cut next. So groups for k are unions of those for k + 1.
    The diagonal of ``A`` must be positive.
    Source: Shi and Malik 2000.
    """
    nodes = [np.arange(len(A))]
    offers = {0: best_cut(A)} if len(A) > 1 else {}
    splits, cuts = [], []
    while len(splits) < k - 1:
        node = min(offers, key=lambda i: (offers[i][0], i))
        cost, first = offers.pop(node)
        splits.append(node)
        cuts.append(cost)
        for side in (first, ~first):
            members = nodes[node][side]
            if len(members) > 1:
                offers[len(nodes)] = best_cut(A[np.ix_(members, members)])
            nodes.append(members)
    leaves = [i for i in range(len(nodes)) if i not in splits]
    labels = np.empty(len(A), dtype=np.int64)
    for group, leaf in enumerate(leaves):
        labels[nodes[leaf]] = group
    return Bipartition(labels, np.array(splits, dtype=np.int64), np.array(cuts), np.array(leaves, dtype=np.int64))


def best_cut(A: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the least normalised cut along the second eigenvector, and which vertices (m,) are on the first side.

    The side that holds vertex 0 is the first: the sign of an eigenvector is free.
    """
    m, volume = len(A), A.sum(axis=1)
    root = np.sqrt(volume)
    S = A / root[:, None] / root - 2 * np.outer(root, root) / volume.sum()
    # The first eigenvector is known and put last: of a graph in parts its eigenvalue is that of others too.
    walk = eigh((S + S.T) / 2, subset_by_index=(m - 1, m - 1))[1][:, 0] / root
    order = np.argsort(walk, kind="stable")
    inside = np.cumsum(np.cumsum(A[np.ix_(order, order)], axis=0), axis=1).diagonal()[:-1]
    before = np.cumsum(volume[order])[:-1]
    cut = np.maximum(before - inside, 0.0)
    costs = cut / before + cut / (volume.sum() - before)
    first = np.zeros(m, dtype=bool)
    first[order[: int(costs.argmin()) + 1]] = True
    return float(costs.min()), first if first[0] else ~first
