"""Match and retrieve across two spaces whose rows have comparable coordinates."""

from collections.abc import Callable, Iterator
from numbers import Integral
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from sklearn.utils.validation import check_is_fitted, validate_data

from polyspan.linalg import Neighbours, top_k
from polyspan.run import available_memory_bytes

from ._checks import check_count, scale_rows

BLOCK_BYTES = 2**26


class Match(NamedTuple):
    """A one-to-one matching: row ``rows[i]`` of the first view goes with row ``columns[i]`` of the second.

    ``scores`` are theirs, and ``confidence`` is a pair's score less the best other score of its row and column, in
    standard deviations of all scores seen: below 0 where one of the two would rather have another partner, and
    infinite where there is no other.
    """

    rows: np.ndarray
    columns: np.ndarray
    scores: np.ndarray
    confidence: np.ndarray


class PairMatching:
    """Scores, matching and retrieval across two spaces, for whatever gives coordinates of both.

    A subclass has ``transform_x`` and ``transform_y``, ``_directions``, and the anchors' ``anchor_marks_``. Its scores
    are cosines of what ``_directed`` makes of the coordinates; where that is None it gives ``_scores`` itself.
    """

    anchor_marks_: np.ndarray
    _directions: Callable[..., np.ndarray]

    def transform_x(self, X) -> np.ndarray:
        """Return coordinates (m, k) of rows of the first space."""
        raise NotImplementedError

    def transform_y(self, Y) -> np.ndarray:
        """Return coordinates (m, k) of rows of the second space."""
        raise NotImplementedError

    def _check_parameters(self) -> None:
        """Refuse what may have been set since the fit."""

    def _directed(self, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return coordinates whose cosine is the score, or None where there are none such."""
        return A, B

    def _scores(self, A: np.ndarray, B: np.ndarray) -> np.ndarray:
        sides = self._directed(A, B)
        assert sides is not None
        left, right = (unit_rows(Z) for Z in sides)
        return left @ right.T

    def similarity(self, X, Y) -> np.ndarray:
        """Score every pair of a row of ``X`` (a, d_A) and a row of ``Y`` (b, d_B) by the route: (a, b).

        Cosines lie in [-1, 1]; local CKA in [0, 1], with differences of about one over the number of anchors, hence
        float64.

        Raises
        ------
        ValueError
            The scores do not fit into memory, or a parameter or the rows are not as said.
        """
        A, B = self._both(X, Y)
        _fits(len(A), len(B))
        return self._scores(A, B)

    def match(self, X, Y, *, candidates: int | None = None) -> Match:
        """Find the one-to-one matching of rows of ``X`` (a, d_A) and ``Y`` (b, d_B) with the largest sum of scores.

        Parameters
        ----------
        candidates : int, optional
            Consider only so many best partners of each row and of each column, in memory that grows with a + b. Rows
            that find no partner among them are left out, so fewer than min(a, b) pairs may come back. Left out, all
            scores are held at once and the matching is exact; it takes time that grows with the cube of a.

        Raises
        ------
        ValueError
            The scores do not fit into memory (give ``candidates``), or ``candidates`` is below 1.
        """
        A, B = self._both(X, Y)
        if candidates is None:
            _fits(len(A), len(B), "; give candidates= for a matching among the best partners only")
            scores = self._scores(A, B).astype(np.float64)
            rows, columns = linear_sum_assignment(scores, maximize=True)
            return _judged(rows, columns, scores)
        check_count("candidates", candidates)
        return self._sparse_match(A, B, int(candidates))

    def _sparse_match(self, A, B, candidates: int) -> Match:
        near = self._nearest(A, B, min(candidates, len(B)))
        rows = np.repeat(np.arange(len(A)), near.indices.shape[1])
        found = [(rows, near.indices.ravel(), near.scores.ravel().astype(np.float64))]
        back = self._nearest(A, B, min(candidates, len(A)), of_columns=True)
        columns = np.repeat(np.arange(len(B)), back.indices.shape[1])
        found.append((back.indices.ravel(), columns, back.scores.ravel().astype(np.float64)))
        rows, columns, scores = (np.concatenate(part) for part in zip(*found, strict=True))
        keep = np.unique(rows.astype(np.int64) * len(B) + columns, return_index=True)[1]
        rows, columns, scores = rows[keep], columns[keep], scores[keep]
        # Costs are positive, and a column of its own for every row, dearer than all others, makes a full matching
        # exist; the rows that end there have no partner.
        spread = float(np.std(scores)) or 1.0
        costs = 1.0 + (scores.max() - scores) / spread
        own = np.arange(len(A))
        graph = coo_array(
            (
                np.concatenate([costs, np.full(len(A), 2.0 * costs.max() * (min(len(A), len(B)) + 1))]),
                (np.concatenate([rows, own]), np.concatenate([columns, len(B) + own])),
            ),
            shape=(len(A), len(B) + len(A)),
        ).tocsr()
        taken_rows, taken = min_weight_full_bipartite_matching(graph)
        partnered = taken < len(B)
        taken_rows, taken = taken_rows[partnered], taken[partnered]
        order = np.lexsort((columns, rows))
        keys = (rows.astype(np.int64) * len(B) + columns)[order]
        chosen = scores[order][np.searchsorted(keys, taken_rows.astype(np.int64) * len(B) + taken)]
        rivals = np.full(len(taken_rows), -np.inf)
        for ends, mine in ((rows, taken_rows), (columns, taken)):
            best = np.full((2, int(ends.max()) + 1), -np.inf)
            np.maximum.at(best[0], ends, scores)
            first = scores == best[0][ends]
            repeated = np.bincount(ends[first], minlength=best.shape[1]) > 1
            np.maximum.at(best[1], ends[~first], scores[~first])
            best[1][repeated] = best[0][repeated]
            rivals = np.maximum(rivals, np.where(chosen == best[0][mine], best[1][mine], best[0][mine]))
        return Match(taken_rows, taken, chosen, (chosen - rivals) / spread)

    def retrieve(self, X, Y, k: int = 5) -> Neighbours:
        """Find the k best rows of the gallery ``Y`` (b, d_B) for each query ``X`` (a, d_A), in flat memory.

        Returns
        -------
        Neighbours
            ``indices`` (a, k) into the gallery, best first, and ``scores``.

        Raises
        ------
        ValueError
            ``k`` is not between 1 and b.
        """
        A, B = self._both(X, Y)
        if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= len(B):
            raise ValueError(f"k must be between 1 and the {len(B)} rows of the gallery, got {k!r}")
        return self._nearest(A, B, k)

    def _nearest(self, A, B, k: int, *, of_columns: bool = False) -> Neighbours:
        if (sides := self._directed(A, B)) is not None:
            return top_k(*(sides[::-1] if of_columns else sides), k)
        parts = [_best(block, k) for block in self._blocks(A, B, of_columns=of_columns)]
        return Neighbours(*(np.concatenate(side) for side in zip(*parts, strict=True)))

    def _blocks(self, A, B, *, of_columns: bool) -> Iterator[np.ndarray]:
        asked, other = (B, A) if of_columns else (A, B)
        step = max(1, BLOCK_BYTES // (8 * len(other)))
        for start in range(0, len(asked), step):
            part = asked[start : start + step]
            yield self._scores(A, part).T if of_columns else self._scores(part, B)

    def seen(self, X) -> np.ndarray:
        """Return which rows of ``X`` (m, d_A) equal an anchor's row bit for bit, (m,) bool: scores flatter there."""
        check_is_fitted(self)
        X = self._directions(validate_data(self, X, reset=False, dtype=np.float64))
        return np.isin(row_marks(X), self.anchor_marks_)

    def _both(self, X, Y) -> tuple[np.ndarray, np.ndarray]:
        self._check_parameters()
        A, B = self.transform_x(X), self.transform_y(Y)
        width = np.result_type(A, B)
        return A.astype(width, copy=False), B.astype(width, copy=False)


def unit_rows(Z: np.ndarray) -> np.ndarray:
    """Scale rows to length 1; a row of zeros stays."""
    return scale_rows(Z)[0]


def row_marks(X: np.ndarray) -> np.ndarray:
    """Digest float64 rows to 64 bits each, the same on every machine."""
    bits = (np.ascontiguousarray(X, dtype=np.float64) + 0.0).view(np.uint64)
    odd = np.arange(1, 2 * X.shape[1], 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (bits ^ (bits >> np.uint64(29))) * odd
    return (mixed ^ (mixed >> np.uint64(32))).sum(axis=1, dtype=np.uint64).view(np.int64)


def _fits(a: int, b: int, hint: str = "; use retrieve, or fewer rows") -> None:
    needed, free = 3 * 8 * a * b, available_memory_bytes()
    if needed > free:
        raise ValueError(f"X and Y must have scores that fit into memory, got {a} by {b}: {needed:,} bytes{hint}")


def _best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k largest of each row, descending, ties by position."""
    if k < scores.shape[1]:
        chosen = np.sort(np.argpartition(scores, -k, axis=1)[:, -k:], axis=1)
    else:
        chosen = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    values = np.take_along_axis(scores, chosen, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1), np.take_along_axis(values, order, axis=1)


def _judged(rows: np.ndarray, columns: np.ndarray, scores: np.ndarray) -> Match:
    chosen = scores[rows, columns]
    others = scores.copy()
    others[rows, columns] = -np.inf
    rivals = np.maximum(others.max(axis=1)[rows], others.max(axis=0)[columns])
    return Match(rows, columns, chosen, (chosen - rivals) / (float(np.std(scores)) or 1.0))
