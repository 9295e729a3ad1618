"""Scores of queries against a gallery, made a block at a time: the whole matrix, the best rows, or ranks alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from polyspan.linalg import Neighbours

from ._hubness import unit_rows

Block = tuple[slice, slice, np.ndarray]


class ScoreBlocks:
    r"""Scores :math:`w \, q^\top g - o_g - o_q`, of which no more than ``block_rows`` squared are held at once.

    Every pass cuts the same blocks, so that a score has the same bits in each.

    Parameters
    ----------
    queries, gallery : ndarray of shape (m, d) and (n, d)
        Finite; the wider of their float widths is that of the scores.
    normalize : bool
        Scale rows to length 1 first.
    weight : float
        w above.
    offsets, query_offsets : ndarray of shape (n,) and (m,), optional
        o of the gallery's rows and of the queries; 0 where left out.
    active : ndarray of m bools, optional
        Queries whose scores are as above; those of the others are plain inner products.
    """

    def __init__(
        self, queries, gallery, *, normalize, block_rows, weight=1.0, offsets=None, query_offsets=None, active=None
    ):
        self.queries, self.gallery = queries, gallery
        self.dtype = np.result_type(queries.dtype, gallery.dtype)
        self.normalize, self.block_rows, self.weight = normalize, block_rows, self.dtype.type(weight)
        self.offsets = None if offsets is None else offsets.astype(self.dtype)
        self.query_offsets = None if query_offsets is None else query_offsets.astype(self.dtype)
        self.active = active

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and gallery rows."""
        return len(self.queries), len(self.gallery)

    def row_slices(self) -> Iterator[slice]:
        """Return the queries' blocks in turn."""
        return (slice(i, i + self.block_rows) for i in range(0, len(self.queries), self.block_rows))

    def of_rows(self, rows: slice) -> Iterator[Block]:
        """Return the blocks of some queries in turn: their rows, the gallery's, and the scores."""
        Q = self._unit(self.queries[rows], "queries", rows.start)
        for first in range(0, len(self.gallery), self.block_rows):
            columns = slice(first, first + self.block_rows)
            with np.errstate(over="ignore", invalid="ignore"):
                plain = Q @ self._unit(self.gallery[columns], "gallery", first).T
            if not (self.normalize or np.isfinite(plain).all()):
                raise ValueError("queries and gallery must have finite products, got others: scale them")
            yield rows, columns, self._corrected(plain, rows, columns)

    def matrix(self) -> np.ndarray:
        """Return all scores, (m, n)."""
        out = np.empty(self.shape, self.dtype)
        for rows in self.row_slices():
            for place, columns, scores in self.of_rows(rows):
                out[place, columns] = scores
        return out

    def best(self, k: int) -> Neighbours:
        """Return the k best rows of each query, best first, equal ones by index."""
        indices, values = np.empty((self.shape[0], k), np.intp), np.empty((self.shape[0], k), self.dtype)
        for rows in self.row_slices():
            kept, places = None, None
            for _, columns, scores in self.of_rows(rows):
                mine = np.broadcast_to(np.arange(columns.start, columns.start + scores.shape[1]), scores.shape)
                new, new_places = largest(scores, mine, k)
                if kept is not None:
                    new, new_places = np.concatenate([kept, new], axis=1), np.concatenate([places, new_places], axis=1)
                kept, places = largest(new, new_places, k)
            indices[rows], values[rows] = places, kept
        return Neighbours(indices, values)

    def ranks(self, right: np.ndarray) -> np.ndarray:
        """Return each query's rank of its best right row (m,), from 1; half of the wrong rows that tie count before it.

        ``right`` (m, r) holds no row twice for one query; -1 fills up, and a query of -1 alone has rank NaN.
        """
        out = np.full(self.shape[0], np.nan)
        for rows in self.row_slices():
            mine = right[rows]
            own = np.full(mine.shape, -np.inf, self.dtype)
            for _, columns, scores in self.of_rows(rows):
                local = mine - columns.start
                i, j = np.nonzero((mine >= 0) & (local >= 0) & (local < scores.shape[1]))
                own[i, j] = scores[i, local[i, j]]
            best = own.max(axis=1, keepdims=True)
            above, level = np.zeros(len(mine)), -np.sum((own == best) & (mine >= 0), axis=1).astype(np.float64)
            for _, _, scores in self.of_rows(rows):
                above += (scores > best).sum(axis=1)
                level += (scores == best).sum(axis=1)
            known = (mine >= 0).any(axis=1)
            out[rows] = np.where(known, 1.0 + above + level / 2, np.nan)
        return out

    def _unit(self, X: np.ndarray, name: str, first: int) -> np.ndarray:
        X = X.astype(self.dtype, copy=False)
        return unit_rows(X, name, first) if self.normalize else X

    def _corrected(self, plain: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        if self.weight == 1 and self.offsets is None and self.query_offsets is None:
            return plain
        found = plain * self.weight
        if self.offsets is not None:
            found -= self.offsets[columns]
        if self.query_offsets is not None:
            found -= self.query_offsets[rows, None]
        return found if self.active is None else np.where(self.active[rows, None], found, plain)


class MatrixBlocks(ScoreBlocks):
    """Scores that are there already, (m, n), looked at in the same way."""

    def __init__(self, scores: np.ndarray, *, block_rows: int):
        super().__init__(scores, scores.T, normalize=False, block_rows=block_rows)
        self.scores = scores

    def of_rows(self, rows: slice) -> Iterator[Block]:
        for first in range(0, self.shape[1], self.block_rows):
            columns = slice(first, first + self.block_rows)
            yield rows, columns, self.scores[rows, columns]


def largest(scores: np.ndarray, indices: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k largest scores of each row (all, where there are fewer), descending, and their indices.

    Equal scores stand by index, where indices ascend or the best of earlier blocks come first.
    """
    if k == 1:
        first = scores.argmax(axis=1)[:, None]
        return np.take_along_axis(scores, first, axis=1), np.take_along_axis(indices, first, axis=1)
    if k < scores.shape[1]:
        chosen = np.sort(np.argpartition(scores, -k, axis=1)[:, -k:], axis=1)
        scores, indices = np.take_along_axis(scores, chosen, axis=1), np.take_along_axis(indices, chosen, axis=1)
    order = np.lexsort((indices, -scores), axis=1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1)
