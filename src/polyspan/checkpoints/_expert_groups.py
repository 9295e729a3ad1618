"""Which experts of a layer form a group, and how many groups each layer has."""

from collections.abc import Sequence

import numpy as np

from ._expert_statistics import ExpertStatistics

CLUSTERINGS = ("kmeans", "hierarchical", "dominant", "random")
SIMILARITIES = ("output", "mean_output", "router", "weight")
ALLOCATIONS = ("uniform", "adaptive")
STARTS = 20


def similarity_matrix(statistics: ExpertStatistics, similarity: str) -> np.ndarray:
    """Return the Gram matrix (n, n) by which experts are compared.

    Raises
    ------
    ValueError
        The router's logits are asked for and not known.
    """
    found = {
        "output": statistics.gram,
        "mean_output": statistics.mean_gram,
        "router": statistics.logit_gram,
        "weight": statistics.weight_gram,
    }[similarity]
    if similarity == "router" and not found.any():
        raise ValueError("similarity 'router' needs a router with a weight (n, H) beside the experts, got none")
    return found


def group_experts(
    gram: np.ndarray, k: int, *, clustering: str = "kmeans", frequencies: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """Return labels (n,) of k groups, numbered by their first member.

    Parameters
    ----------
    gram : ndarray of shape (n, n)
        Inner products of the experts.
    clustering : {"kmeans", "hierarchical", "dominant", "random"}
        k-means from the Gram matrix, best of 20 starts; average linkage on its distances; every expert to the most
        similar of the k most used ones; a random partition without empty groups.
    frequencies : ndarray of shape (n,), optional
        For "dominant".
    """
    n = len(gram)
    if k == n:
        return np.arange(n)
    if k == 1:
        return np.zeros(n, dtype=np.intp)
    if clustering == "random":
        rng = np.random.default_rng(seed)
        labels = np.concatenate([np.arange(k), rng.integers(k, size=n - k)])
        return _renumbered(rng.permutation(labels))
    if clustering == "dominant":
        assert frequencies is not None
        kept = most_used(frequencies, k)
        labels = gram[:, kept].argmax(axis=1)
        labels[kept] = np.arange(k)
        return _renumbered(labels)
    if clustering == "hierarchical":
        from sklearn.cluster import AgglomerativeClustering

        model = AgglomerativeClustering(k, metric="precomputed", linkage="average")
        return _renumbered(model.fit(_distances(gram)).labels_)
    return _renumbered(_kmeans(gram, k, seed))


def most_used(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the k experts of the largest scores, in the order of their numbers; ties go to the first."""
    return np.sort(np.argsort(-np.asarray(scores), kind="stable")[:k])


def _renumbered(labels: np.ndarray) -> np.ndarray:
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _distances(gram: np.ndarray) -> np.ndarray:
    square = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    distances = np.sqrt(np.maximum(square, 0))
    np.fill_diagonal(distances, 0)
    return distances


def embedding(gram: np.ndarray) -> np.ndarray:
    """Return points (n, r) whose inner products are the Gram matrix."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > len(gram) * np.finfo(float).eps * max(values[-1], 0)
    return vectors[:, kept] * np.sqrt(values[kept]) if kept.any() else np.zeros((len(gram), 1))


def _kmeans(gram: np.ndarray, k: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    points = embedding(gram)
    distinct = len(np.unique(points.round(12), axis=0))
    labels = KMeans(min(k, distinct), n_init=STARTS, random_state=seed % 2**32).fit(points).labels_
    # Equal experts make fewer than k groups; any of them may then be alone without cost.
    spare = k - len(np.unique(labels))
    for _ in range(spare):
        sizes = np.bincount(labels)
        labels[np.flatnonzero(labels == sizes.argmax())[-1]] = len(sizes)
    return labels


def within_groups(gram: np.ndarray, labels: np.ndarray) -> float:
    """Return the sum of squared distances to the means of the groups: what k-means makes small."""
    within = 0.0
    for label in np.unique(labels):
        block = gram[np.ix_(labels == label, labels == label)]
        within += np.trace(block) - block.sum() / len(block)
    return float(max(within, 0.0))


def allocate(curves: Sequence[np.ndarray], total: int, *, least: int = 1) -> list[int]:
    r"""Share ``total`` groups among layers so that :math:`\sum_l J_l(k_l) / J_l(1)` is least, by dynamic programming.

    Parameters
    ----------
    curves : sequence of ndarray of shape (n_l,)
        ``J_l(k)`` at index k - 1.
    total : int
        Between ``least`` a layer and ``n_l`` a layer, in sum.
    least : int
        Groups that each layer has at least.

    Raises
    ------
    ValueError
        ``total`` is outside its range.
    """
    low, high = least * len(curves), sum(map(len, curves))
    if not low <= total <= high:
        raise ValueError(f"total must be between {low} and {high}, got {total}")
    best, choices = np.array([0.0]), []
    # best[s]: least cost of the layers so far with s groups above the least number each.
    for curve in curves:
        cost = (np.asarray(curve) / (curve[0] if curve[0] > 0 else 1.0))[least - 1 :]
        made = np.full(len(best) + len(cost) - 1, np.inf)
        choice = np.zeros(len(made), dtype=int)
        for extra, value in enumerate(cost):
            at = slice(extra, extra + len(best))
            better = best + value < made[at]
            made[at] = np.where(better, best + value, made[at])
            choice[at][better] = extra
        best = made
        choices.append(choice)
    rest, found = total - low, []
    for choice in reversed(choices):
        extra = int(choice[rest])
        found.append(least + extra)
        rest -= extra
    return found[::-1]


def windows(n_layers: int, window: int | None) -> list[range]:
    """Return runs of ``window`` successive layers; None stands for all of them in one."""
    size = n_layers if window is None else window
    return [range(start, min(start + size, n_layers)) for start in range(0, n_layers, size)]
