"""What it will cost and give to move a vector store from an old embedding model to a new one, predicted on a sample."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import KFold

from polyspan.io import read_array, write_array
from polyspan.linalg import label_hits, top_k

from ._aligner import Aligner
from ._checks import scale_rows
from .choosing import check_target_width, default_candidates, pairing_p_value
from .orthogonal_map import few_anchors, few_anchors_unsaid

METRICS = ("cosine", "dot", "euclidean")
STRATEGIES = ("stay", "query", "gallery", "backfill", "re-embed")
RESAMPLES = 1000
UNPAIRED = 0.05
LARGEST_POOL = 4096
"""So many rows of the sample at most are searched together to see what the store would give; time is their square."""
CHANCE = 0.2
"""What of the true neighbours any k rows hold by chance, above which the sample is said to be too small."""
TIMED_ROWS = 8192
"""So many rows, the sample repeated, are read, mapped and written to estimate how long that takes for the store."""


class StrategyRow(NamedTuple):
    """One way to move and what it is predicted to give.

    ``strategy``: one of ``STRATEGIES``; ``aligner``: family, or ``""`` where no map is used; ``recall`` in [0, 1] with
    its 95 % ``interval``; ``share``: of the items that are embedded again; ``n_written``: vectors that are written;
    ``seconds`` and ``cost`` (in the unit of ``price_per_item``) for the whole store, or None where not known: the time
    of the encoder, and for carried vectors that of reading, mapping and writing, measured on the sample with the best
    map and files of vectors (a database may be slower); the cost is that of embedding alone. ``store_recall``: what is
    expected among all rows of the store, see :func:`plan_upgrade`, with its 95 % ``store_interval`` over queries; both
    None where it cannot be told.
    """

    strategy: str
    aligner: str
    recall: float
    interval: tuple[float, float]
    share: float
    n_written: int
    seconds: float | None
    cost: float | None
    store_recall: float | None = None
    store_interval: tuple[float, float] | None = None


class UpgradePlan(NamedTuple):
    """The table, best first; which row is recommended and why; and what is suspicious.

    ``aligners`` holds, by strategy, the best map fitted on all anchors: ``"gallery"`` carries old vectors to the new
    space, ``"query"`` new queries to the old space. ``table[recommended]`` is the recommended row.
    """

    table: list[StrategyRow]
    recommended: int
    reason: str
    aligners: dict[str, Aligner]
    k: int
    n_anchors: int
    n_rows: int
    warnings: list[str]


def plan_upgrade(
    old: Any,
    new: Any,
    *,
    n_rows: int,
    k: int = 10,
    labels: Any = None,
    candidates: Mapping[str, Aligner] | None = None,
    backfill_shares: Sequence[float] = (0.1, 0.3),
    loss: float = 0.05,
    seconds_per_item: float | None = None,
    price_per_item: float | None = None,
    renormalize: bool = False,
    metric: str = "cosine",
    n_splits: int = 3,
    random_state: int | None = 0,
) -> UpgradePlan:
    r"""Predict recall@k, time and cost of every way to move a store, on a sample that was really embedded again.

    The sample stands for the store. Each held-out fold is searched by its own new vectors (and by what the strategy
    makes of them), every query leaving out its own item:

    * ``stay``: old queries, old vectors; what users have now.
    * ``query``: new queries carried to the old vectors; nothing is written.
    * ``gallery``: old vectors carried to the new space, asked by new queries.
    * ``backfill``: as ``gallery``, and a share of the items embedded again, farthest from the mean of its class first
      where labels are given, else drawn at random.
    * ``re-embed``: new queries, new vectors: 1 by definition without labels.

    Without labels, recall@k is the share of the k neighbours that full re-embedding would give. With labels it is the
    share of queries with a hit of their label among the k.

    A fold is smaller than the store, which has more near neighbours to confuse, or more of one group. The k nearest of
    n rows are a share k/n of all, and of the m sampled rows that share is k m/n: ``store_recall`` is recall at so many
    among all sampled rows, of which the map of a fold carries all and those held out ask; between whole numbers it is
    linear in the logarithm. ``store_interval`` is a bootstrap over queries: another sample, and so other maps, are not
    in it. Few neighbours agree a little less often than many of the same share do. In a store of more than k times the
    sample that share is less than one row: recall then goes on along the step from 2 to 1, which may bend either way,
    and the upper end of the interval is that at one row. With 2,000 of the 10,003 rows of BANKING77 (latent semantic
    analysis to MiniLM, three samples) it said 0.53 to 0.54 for the gallery where 0.53 to 0.54 came out (recall of the
    folds: 0.65), 0.38 to 0.40 for queries where 0.39 did (0.55), and 0.27 to 0.29 for the store as it is, which has
    0.30. None with labels. What is recommended is chosen by it where it is known.

    Parameters
    ----------
    old, new : arrays of shape (n, d_A) and (n, d_B)
        The same sampled items by both models.
    n_rows : int
        Size of the store.
    k : int
    labels : array of shape (n,), optional
    candidates : mapping of str to aligner, optional
        See :func:`polyspan.align.default_candidates`.
    backfill_shares : sequence of float
        In (0, 1).
    loss : float
        Recall that may be given up against the best row for a cheaper one.
    seconds_per_item, price_per_item : float, optional
        Of the new encoder.
    renormalize : bool
        Carried vectors will be brought to length 1 where new ones have it: that theirs differ is no reason to warn.
    metric : {"cosine", "dot", "euclidean"}
        By what the store finds neighbours, the inner product or the distance; true neighbours are found by it, too.

    Raises
    ------
    ValueError
        Shapes do not fit, too few anchors, or a number out of range.
    """
    A, B = np.asarray(old), np.asarray(new)
    if A.ndim != 2 or B.ndim != 2 or len(A) != len(B):
        raise ValueError(f"old and new must be 2-d with one row an item, got shapes {A.shape} and {B.shape}")
    for name, rows in (("old", A), ("new", B)):
        if not np.isfinite(rows).all():
            bad = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise ValueError(f"{name} must be finite, got NaN or infinity at row {bad}")
    if len(A) < 4 * n_splits:
        raise ValueError(f"old must hold at least 4 anchors a fold ({4 * n_splits}), got {len(A)}")
    if n_rows < len(A):
        raise ValueError(f"n_rows must be at least the sample's {len(A)}, got {n_rows}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not all(0 < share < 1 for share in backfill_shares):
        raise ValueError(f"backfill_shares must lie in (0, 1), got {list(backfill_shares)}")
    if not 0 <= loss < 1:
        raise ValueError(f"loss must lie in [0, 1), got {loss}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    labels = None if labels is None else np.asarray(labels)
    if labels is not None and labels.shape != (len(A),):
        raise ValueError(f"labels must have shape ({len(A)},), got {labels.shape}")
    tried = dict(candidates or default_candidates(A.shape[1], B.shape[1], len(A), random_state))
    unit = renormalize and _of_length_1(B)
    hits, larger = _held_out_hits(A, B, labels, tried, backfill_shares, k, n_splits, random_state, n_rows, metric, unit)
    rng, larger_rng = (np.random.default_rng(seed) for seed in (random_state, [random_state or 0, 1]))
    rows = []
    for (strategy, name, share), found in hits.items():
        n_embedded = n_rows if strategy == "re-embed" else round(share * n_rows)
        rows.append(
            StrategyRow(
                strategy=strategy,
                aligner=name,
                recall=float(found.mean()),
                interval=_interval(found, rng),
                share=share,
                n_written=0 if strategy in ("stay", "query") else n_rows,
                seconds=_encoder_seconds(n_embedded, seconds_per_item),
                cost=None if price_per_item is None else n_embedded * price_per_item,
                **_in_store(larger[strategy, name, share], larger_rng),
            )
        )
    rows.sort(key=lambda row: (-row.recall, row.share, STRATEGIES.index(row.strategy)))
    chosen, reason = recommend(rows, loss)
    best = {s: next((r.aligner for r in rows if r.strategy == s), None) for s in ("gallery", "query")}
    aligners = {}
    for direction, name in best.items():
        if name is not None:
            source, target = (A, B) if direction == "gallery" else (B, A)
            aligners[direction] = _fitted(tried[name], source, target)
    if "gallery" in aligners:
        carrying = n_rows * _carrying_seconds(aligners["gallery"], A)
        rows = [
            row._replace(seconds=row.seconds + carrying)
            if row.strategy in ("gallery", "backfill") and row.seconds is not None
            else row
            for row in rows
        ]
    said = _suspicions(A, B, aligners, rows, renormalize)
    others = len(A) // n_splits - 1
    if labels is None and k > CHANCE * others:
        said.append(f"any {k} of the {others} others of a fold hold {min(k / others, 1):.0%} of the true: sample more")
    return UpgradePlan(rows, chosen, reason, aligners, k, len(A), n_rows, said)


def _fitted(candidate: Aligner, source: np.ndarray, target: np.ndarray) -> Aligner:
    """Fit a copy; that anchors are few the plan says itself."""
    with few_anchors_unsaid():
        made = clone(candidate).fit(source, target)
    check_target_width(made.transform(source[:1]), target, type(made).__name__)
    return made


def _encoder_seconds(n_embedded: int, seconds_per_item: float | None) -> float | None:
    """Return how long the encoder takes, or None where it is needed and its speed is not known."""
    if not n_embedded:
        return 0.0
    return None if seconds_per_item is None else n_embedded * seconds_per_item


def _carrying_seconds(aligner: Aligner, A: np.ndarray) -> float:
    """Measure how long a row takes to be read, mapped and written, in seconds."""
    rows = np.resize(A, (TIMED_ROWS, A.shape[1]))
    with tempfile.TemporaryDirectory() as folder:
        source = write_array(Path(folder) / "source.npy", rows)
        start = time.perf_counter()
        write_array(Path(folder) / "carried.npy", aligner.transform(read_array(source, mmap=False)))
        return (time.perf_counter() - start) / TIMED_ROWS


def _held_out_hits(
    A, B, labels, tried, shares, k, n_splits, random_state, n_rows, metric, unit
) -> tuple[dict[tuple[str, str, float], np.ndarray], dict[tuple[str, str, float], np.ndarray | None]]:
    """Return, by strategy, map and share, what every sampled query found, in [0, 1], (n,), and would in the store."""
    rng = np.random.default_rng(random_state)
    folds = [
        (fitting, held, rng.permutation(len(held)))
        for fitting, held in KFold(n_splits, shuffle=True, random_state=random_state).split(A)
    ]
    grown = _Growth(B, k, n_rows, np.random.default_rng(random_state), metric)
    hits: dict[tuple[str, str, float], np.ndarray] = {}
    larger: dict[tuple[str, str, float], np.ndarray | None] = {}

    def note(key: tuple[str, str, float], queries: list[np.ndarray], galleries: list[np.ndarray]) -> None:
        """Look at what a way makes of each fold's rows, (n_held, d), and of all rows, (n, d), by the fold's map."""
        hits[key] = np.zeros(len(A))
        for (_, held, _), asked, gallery in zip(folds, queries, galleries, strict=True):
            own, least = np.arange(len(held)), min(k, len(held) - 1)
            found = top_k(asked, gallery[held], least, metric=metric, exclude=own).indices
            if labels is None:
                true = top_k(B[held], B[held], least, metric=metric, exclude=own).indices
                hits[key][held] = _overlap(found, true)
            else:
                hits[key][held] = label_hits(labels[held], labels[held], found).any(axis=1)
        larger[key] = None if labels is not None else grown([held for _, held, _ in folds], queries, galleries)

    old, new = ([rows[held] for _, held, _ in folds] for rows in (A, B))
    note(("stay", "", 0.0), old, [A] * n_splits)
    note(("re-embed", "", 1.0), new, [B] * n_splits)
    for name, candidate in tried.items():
        back = [_fitted(candidate, B[fitting], A[fitting]).transform(B[held]) for fitting, held, _ in folds]
        mapped = [_fitted(candidate, A[fitting], B[fitting]).transform(A) for fitting, _, _ in folds]
        if unit:
            mapped = [scale_rows(made)[0] for made in mapped]
        note(("query", name, 0.0), back, [A] * n_splits)
        note(("gallery", name, 0.0), new, mapped)
        for share in shares:
            picked = np.concatenate(
                [
                    held[
                        (order if labels is None else _farthest_first(made[held], labels[held]))[
                            : round(share * len(held))
                        ]
                    ]
                    for (_, held, order), made in zip(folds, mapped, strict=True)
                ]
            )
            mixed = [np.array(made, dtype=np.result_type(made, B)) for made in mapped]
            for made in mixed:
                made[picked] = B[picked]
            note(("backfill", name, float(share)), new, mixed)
    return hits, larger


def _overlap(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return which share of the true neighbours each query found, (n,)."""
    return (found[:, :, None] == true[:, None, :]).any(axis=2).mean(axis=1)


class _Growth:
    """Recall@k among as many rows as the store has: that of the same share of neighbours within the sample."""

    def __init__(self, B: np.ndarray, k: int, n_rows: int, rng: np.random.Generator, metric: str):
        self._metric = metric
        self._pool = rng.permutation(len(B))[:LARGEST_POOL]
        wanted = k * (len(self._pool) - 1) / max(n_rows - 1, 1)
        low, self._known = max(int(wanted), 1), k < len(self._pool)
        self._ks, self._weight = (low, low + 1), float(np.log(wanted / low) / np.log((low + 1) / low))
        if self._known:
            own = np.arange(len(self._pool))
            self._true = top_k(B[self._pool], B[self._pool], self._most, metric=metric, exclude=own).indices

    @property
    def _most(self) -> int:
        return min(self._ks[1], len(self._pool) - 1)

    def __call__(
        self, folds: list[np.ndarray], queries: list[np.ndarray], galleries: list[np.ndarray]
    ) -> np.ndarray | None:
        """Return it by query, (m,), or None where the sample is too small.

        Two columns, (m, 2), whose means are the recall and the most that it can be: of stores in which the sample's one
        nearest neighbour is not the least share that counts, both are the same.
        """
        if not self._known:
            return None
        found = np.empty_like(self._true)
        for held, asked, gallery in zip(folds, queries, galleries, strict=True):
            # A gallery of several maps would part neighbours: a store is carried by one.
            here = np.flatnonzero(np.isin(self._pool, held))
            at = np.searchsorted(held, self._pool[here])
            found[here] = top_k(asked[at], gallery[self._pool], self._most, metric=self._metric, exclude=here).indices
        low, high = (_overlap(found[:, :k], self._true[:, :k]) for k in self._ks)
        values = low + self._weight * (high - low)
        return np.stack([values, low if self._weight < 0 else values], axis=1)


def _in_store(values: np.ndarray | None, rng: np.random.Generator) -> dict[str, Any]:
    """Return the mean over queries (m, 2) of what is expected, and its interval up to what is the most, in [0, 1]."""
    if values is None:
        return {}
    drawn = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(drawn[:, 0], 0.025), np.quantile(drawn[:, 1], 0.975)
    ends = np.clip([values[:, 0].mean(), low, high], 0.0, 1.0).tolist()
    return {"store_recall": ends[0], "store_interval": (ends[1], ends[2])}


def _of_length_1(rows: np.ndarray) -> bool:
    return bool(np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3))


def _farthest_first(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    from .backfilling import backfill_order

    return backfill_order(rows, labels)


def _interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile bootstrap of the mean over queries."""
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def recommend(rows: list[StrategyRow], loss: float) -> tuple[int, str]:
    """Take the cheapest row within ``loss`` of the best that moves; cost is items embedded, then vectors written."""
    values = [row.recall if row.store_recall is None else row.store_recall for row in rows]
    moves = [i for i, row in enumerate(rows) if row.strategy != "stay"]
    best = max(values[i] for i in moves)
    near = [i for i in moves if values[i] >= best - loss]
    chosen = min(near, key=lambda i: (rows[i].share, rows[i].n_written > 0, -values[i]))
    stay = next(value for value, row in zip(values, rows, strict=True) if row.strategy == "stay")
    told = f"the cheapest within {loss:.2f} of the best, {best:.3f}"
    if rows[chosen].share == 1:
        told = f"no cheaper way comes within {loss:.2f} of embedding everything again"
    if values[chosen] < stay:
        told += f"; the store as it is has {stay:.3f}"
    return chosen, told


def _suspicions(
    A: np.ndarray, B: np.ndarray, aligners: dict[str, Aligner], rows: list[StrategyRow], renormalize: bool
) -> list[str]:
    """Say what of the sample makes one doubt: rows unpaired, too few anchors, lengths that are lost."""
    said = []
    p = pairing_p_value(A, B)
    if p > UNPAIRED:
        said.append(f"old and new rows do not seem to belong together (permutation test, p = {p:.2f})")
    few = few_anchors(len(A), A.shape[1], B.shape[1])
    if few is not None:
        said.append(f"{few}: sample more")
    spread = [float(np.std(np.linalg.norm(X, axis=1)) / (np.mean(np.linalg.norm(X, axis=1)) or 1)) for X in (A, B)]
    if "gallery" in aligners:
        norms = np.linalg.norm(aligners["gallery"].transform(A), axis=1)
        mended = renormalize and _of_length_1(B)
        if spread[1] < 1e-3 and not mended and np.std(norms) > 0.01 * np.mean(norms):
            said.append("new vectors are of one length, carried ones are not: search by cosine, or normalise them")
    if spread[0] < 1e-3 < spread[1]:
        said.append("old vectors are of one length, new ones are not: if search is by inner product, lengths are lost")
    duplicates = len(A) - len(np.unique(A, axis=0))
    if duplicates:
        said.append(f"{duplicates} anchors repeat others")
    best = {s: max((r.recall for r in rows if r.strategy == s), default=0.0) for s in ("query", "gallery", "stay")}
    if max(best["query"], best["gallery"]) < best["stay"]:
        said.append("no map does as well as the store as it is: more anchors, or embed again")
    return said
