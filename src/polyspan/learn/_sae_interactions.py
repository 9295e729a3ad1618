"""Pairs and triples of latents that fire together, counted from sparse codes."""

from collections.abc import Iterable
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

PIECE = 2**22


class CoFiring(NamedTuple):
    """Sets of latents (p, 2) or (p, 3), ascending; how many rows each fired in; the sum over rows of their product."""

    latents: np.ndarray
    counts: np.ndarray
    sums: np.ndarray


def co_firing(codes: Iterable[Any], degree: int) -> CoFiring:
    """Count sets of 2 or 3 latents in batches of sparse codes (b, m): only those that fire together are ever made.

    Pairs are the product of the codes with themselves; triples are listed row by row, k³/6 a row.
    """
    count = _pairs if degree == 2 else _triples
    found, width = None, 0
    for batch in codes:
        width = batch.shape[1]
        part = count(batch)
        found = part if found is None else _joined([found, part])
    if found is None:
        raise ValueError("codes must be at least one batch, got none")
    powers = width ** np.arange(degree - 1, -1, -1, dtype=np.int64)
    return CoFiring(found[0][:, None] // powers % width, found[1], found[2])


Keyed = tuple[np.ndarray, np.ndarray, np.ndarray]


def _joined(parts: list[Keyed]) -> Keyed:
    """Add up counts and sums of equal keys."""
    keys = np.concatenate([part[0] for part in parts])
    distinct, place = np.unique(keys, return_inverse=True)
    counts = np.bincount(place, np.concatenate([part[1] for part in parts]), len(distinct))
    sums = np.bincount(place, np.concatenate([part[2] for part in parts]), len(distinct))
    return distinct, counts.astype(np.int64), sums


def _pairs(codes: Any) -> Keyed:
    codes = codes.astype(np.float64)
    fired = codes.copy()
    fired.data = np.ones_like(fired.data)
    from scipy.sparse import triu

    sums, counts = (triu(part.T @ part, k=1).tocsr() for part in (codes, fired))
    # Both have the same places, for codes are positive: sorted, they stand in one order.
    for part in (sums, counts):
        part.sort_indices()
    rows = np.repeat(np.arange(codes.shape[1], dtype=np.int64), np.diff(counts.indptr))
    return rows * codes.shape[1] + counts.indices, np.rint(counts.data).astype(np.int64), sums.data


def _triples(codes: Any) -> Keyed:
    m = codes.shape[1]
    parts: list[Keyed] = []
    sizes = np.diff(codes.indptr)
    for size in np.unique(sizes[sizes >= 3]).tolist():
        places = np.array(list(combinations(range(size), 3)), np.int64).T
        rows = np.flatnonzero(sizes == size)
        step = max(1, PIECE // places.shape[1])
        for start in range(0, len(rows), step):
            at = codes.indptr[rows[start : start + step]][:, None] + np.arange(size)
            latents, values = codes.indices[at].astype(np.int64), codes.data[at].astype(np.float64)
            i, j, h = (latents[:, place] for place in places)
            products = values[:, places[0]] * values[:, places[1]] * values[:, places[2]]
            keys = ((i * m + j) * m + h).reshape(-1)
            parts.append(_joined([(keys, np.ones(len(keys)), products.reshape(-1))]))
    if not parts:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    return _joined(parts)
