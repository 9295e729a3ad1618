"""Pairs and triples of latents that fire together: counted from sparse codes, ranked, and as directions."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

PIECE = 2**22


class Interactions(NamedTuple):
    """Sets of latents that fire together, strongest first.

    ``latents`` (t, 2) or (t, 3) int64, ascending in a row. ``norms`` (t,): length of what a unit product of their codes
    adds to the reconstruction. ``strengths`` (t,): that times the mean product over all rows, or the length alone.
    ``shares`` (t,) in [0, 1]: rows in which they fire together. ``n_sets`` counts all sets that fire together, and
    ``correlation`` in [-1, 1] is that of their lengths with their shares: near 0, an interaction is no mere sign of
    co-occurrence. NaN where either does not vary.
    """

    latents: np.ndarray
    strengths: np.ndarray
    norms: np.ndarray
    shares: np.ndarray
    n_sets: int
    correlation: float


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


def check_ranking(ranks: Sequence[int], top: int, degree: int, by: str) -> None:
    """Refuse what :func:`ranked` cannot rank, before any code is made.

    Raises
    ------
    ValueError
        A parameter is out of range, or a decoder of these ranks has no such term.
    """
    if degree not in (2, 3):
        raise ValueError(f"degree must be 2 or 3, got {degree}")
    if by not in ("data", "norm"):
        raise ValueError(f"by must be 'data' or 'norm', got {by!r}")
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    if not ranks[degree - 1]:
        raise ValueError(f"degree must be one that the decoder has, with ranks {tuple(ranks)}, got {degree}")


def ranked(module: Any, scale: float, codes: Iterable[Any], n: int, *, top: int, degree: int, by: str) -> Interactions:
    """Return the ``top`` sets of latents that fire together in n rows of sparse codes, of a module and its scale."""
    import torch

    found = co_firing(codes, degree)
    read = module.pair_directions if degree == 2 else module.triple_directions
    norms = np.empty(len(found.latents))
    with torch.no_grad():
        for start in range(0, len(norms), 2**16):
            part = torch.from_numpy(found.latents[start : start + 2**16]).to(module.W_enc.device)
            norms[start : start + len(part)] = read(part).norm(dim=1).cpu().numpy()
    # In units of activations: codes are of those times the scale, and so is what they add.
    norms /= scale
    shares = found.counts / n
    strengths = norms * found.sums / n if by == "data" else norms
    order = np.argsort(-strengths, kind="stable")[:top]
    spread = len(norms) > 1 and norms.std() > 0 and shares.std() > 0
    correlation = float(np.corrcoef(norms, shares)[0, 1]) if spread else float("nan")
    return Interactions(found.latents[order], strengths[order], norms[order], shares[order], len(norms), correlation)


def steering_direction(module: Any, scale: float, latents: int | Sequence[int], interaction: bool) -> np.ndarray:
    """Return what one to three latents add together at codes of 1, (d,), in units of activations.

    Raises
    ------
    ValueError
        There are not one to three distinct latents, or one is not there.
    """
    import torch

    chosen = [latents] if isinstance(latents, int | np.integer) else list(latents)
    m = module.num_latents
    if not 1 <= len(chosen) <= 3 or len(set(chosen)) < len(chosen) or not all(0 <= i < m for i in chosen):
        raise ValueError(f"latents must be one to three distinct numbers from 0 to {m - 1}, got {chosen}")
    with torch.no_grad():
        made = module.linear_decoder()[chosen].sum(dim=0)
        at = made.device
        if interaction and len(chosen) > 1:
            pairs = torch.tensor(list(combinations(chosen, 2)), device=at)
            made = made + module.pair_directions(pairs).sum(dim=0)
        if interaction and len(chosen) == 3:
            made = made + module.triple_directions(torch.tensor([chosen], device=at))[0]
    return made.cpu().numpy() / scale
