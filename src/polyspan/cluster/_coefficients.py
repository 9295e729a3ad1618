r"""Coefficients of self-expression while a second stage shrinks them: all of them, or those that a cut can show.

The stage takes away :math:`\sum(|C_{ij}|+|C_{ji}|)^{1/2}` over the pairs whose labels differ. Its gradient at a pair
has to do with that pair alone, and Adam works entry by entry: what becomes of a pair follows from the two coefficients
that it began with and from the labels of every epoch. So pairs can be followed one by one, and few need be.
"""

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from polyspan.run import available_memory_bytes

from ._affinity import RidgeExpression, block_spans
from ._self_expression import SMOOTH, leading_affinity, leading_of_pairs, structured_norm

WEIGHT = 10.0
# Where the published rate was set, on faces, the largest coefficient of a row is about a tenth.
TENTH = 10.0
SPARE = 4
PAIR_BYTES = 200


def unit_of(affinity: sp.csr_array) -> float:
    """Return ten times the mean of the columns' largest affinities, or 1 where there are none.

    Least squares spreads a row over all points of a subspace, so that coefficients fall as 1/n. In this unit they do
    not, and steps of one length do the same to them whatever n is.
    """
    found = TENTH * float(affinity.max(axis=0).toarray().mean()) if affinity.nnz else 0.0
    return found or 1.0


class AllCoefficients:
    """The whole matrix C (n, n): the cut affinity of the moment, and steps of the second stage.

    ``relative`` counts steps in :func:`unit_of` the affinity and stops an entry at zero, where its loss is least.
    """

    def __init__(self, C: Tensor, d: int, *, rate: float, hollow: bool, relative: bool):
        self.C, self.d, self.hollow, self.relative, self.unit = C, d, hollow, relative, 1.0
        if relative:
            self.unit = unit_of(self.affinity())
            self.C = C / self.unit
        self.optimizer = torch.optim.Adam([self.C], lr=rate)

    def affinity(self) -> sp.csr_array:
        """Return the symmetric affinity of the ``d`` largest of each column."""
        return leading_affinity(self.matrix(), self.d)

    def step(self, labels: np.ndarray) -> float:
        """Take one step for these labels (n,), and return the loss before it."""
        loss, grad = structured_norm(self.C, torch.as_tensor(labels, device=self.C.device))
        self.C.grad = WEIGHT * (grad.fill_diagonal_(0) if self.hollow else grad)
        _advance(self.C, self.optimizer, stop=self.relative)
        return WEIGHT * float(loss) * self.unit**0.5

    def matrix(self) -> np.ndarray:
        """Return C as it is now."""
        return self.C.cpu().numpy() * self.unit


class FollowedCoefficients:
    """The pairs of a ridge expression that the ``d`` largest entries of a column can be among; memory is linear in n.

    Of every column the 4 d largest affinities are followed. A step never makes an affinity larger, so that what is not
    followed stays at or below the least that is: where the d-th largest of a column is above that, the cut is the
    cut of the whole matrix. Columns where it is not are followed further, twice as many entries each time, from the
    first epoch on. Coefficients are found anew in blocks of rows, n² r operations.

    Parameters
    ----------
    expression : RidgeExpression
        Of rank r and width ``expression.width``.
    d : int
    rate : float
        Length of a step, in :func:`unit_of` the affinity.
    """

    def __init__(self, expression: RidgeExpression, d: int, *, rate: float):
        n, r = expression.Y.shape
        self.expression, self.d, self.rate, self.n = expression, d, rate, n
        self._narrow = expression.Y.astype(np.float32)
        lengths = np.linalg.norm(expression.Y, axis=1)
        # By so much products of narrow rows may be off.
        self._slack = 4 * np.finfo(np.float32).eps * r**0.5 * lengths * lengths.max() * expression.w.max()
        self._most, self._bound = np.zeros(n, dtype=np.int64), np.zeros(n)
        self._parts: list[_Pairs] = []
        self._known = np.zeros(0, dtype=np.int64)
        self._past: list[np.ndarray] = []
        self.unit = 1.0
        self._follow(np.arange(n), min(SPARE * d, n - 1))
        self.unit = unit_of(self._cut()[0])
        for part in self._parts:
            part.C /= self.unit

    def affinity(self) -> sp.csr_array:
        """Return the symmetric affinity of the ``d`` largest of each column."""
        while True:
            affinity, least = self._cut()
            doubtful = np.flatnonzero((least <= self._bound) & (self._bound > 0))
            if not len(doubtful):
                return affinity
            for most in np.unique(self._most[doubtful]):
                self._follow(doubtful[self._most[doubtful] == most], min(2 * int(most), self.n - 1))

    def step(self, labels: np.ndarray) -> float:
        """Take one step for these labels (n,), and return the loss of the pairs that are followed, before it."""
        self._past.append(labels)
        return WEIGHT * self.unit**0.5 * sum(part.step(labels) for part in self._parts)

    def matrix(self) -> RidgeExpression:
        """Return the expression, which is C before the second stage."""
        return self.expression

    def _cut(self) -> tuple[sp.csr_array, np.ndarray]:
        i, j, C = (np.concatenate([getattr(p, name) for p in self._parts], axis=-1) for name in ("i", "j", "values"))
        return leading_of_pairs(i, j, np.abs(C).sum(axis=0) / 2 * C.dtype.type(self.unit), self.n, self.d)

    def _follow(self, rows: np.ndarray, most: int) -> None:
        """Follow the ``most`` largest entries of some columns, from the first epoch on."""
        needed, free = PAIR_BYTES * len(rows) * most, available_memory_bytes()
        if needed > free:
            raise ValueError(
                f"X must have few enough ties among its affinities: the cut of {len(rows)} columns needs {most} "
                f"entries of each, {needed:,} bytes, and {free:,} are free; take copies out of X, or structure=False"
            )
        places = np.concatenate([self._largest(rows[a:b], most) for a, b in block_spans(len(rows), 8 * self.n)])
        own = np.repeat(rows, most)
        keys = np.unique(np.minimum(own, places) * self.n + np.maximum(own, places))
        keys = keys[~np.isin(keys, self._known, assume_unique=True)]
        self._known = np.union1d(self._known, keys)
        made = _Pairs(self.expression, keys // self.n, keys % self.n, rate=self.rate, unit=self.unit)
        for labels in self._past:
            made.step(labels)
        self._parts.append(made)

    def _largest(self, rows: np.ndarray, most: int) -> np.ndarray:
        """Return where the largest affinities of some columns are, (b · most,), and keep what the others are below."""
        w = self.expression.w.astype(np.float32)
        size = np.abs(self._narrow[rows] @ self._narrow.T)
        size *= (w[rows, None] + w) / 2
        hollow = bool(self.expression.h.any())
        if hollow:
            size[np.arange(len(rows)), rows] = -1
        found = torch.topk(torch.from_numpy(size), most, dim=1, sorted=False)
        least = found.values.amin(dim=1).numpy().astype(np.float64)
        # Where all entries are followed nothing is left out; a column of zeros has nothing that could be.
        rest = self.n - hollow > most
        self._bound[rows] = np.where(rest & (least > 0), least + self._slack[rows], 0)
        self._most[rows] = most
        return found.indices.numpy().ravel()


class _Pairs:
    """Some pairs i <= j: their two coefficients (2, pairs) in the unit of the stage, and their optimiser."""

    def __init__(self, expression: RidgeExpression, i: np.ndarray, j: np.ndarray, *, rate: float, unit: float):
        self.i, self.j = i, j
        Y, made = expression.Y, np.empty((2, len(i)), dtype=expression.width)
        for a, b in block_spans(len(i), 32 * Y.shape[1]):
            p, q = i[a:b], j[a:b]
            product = np.einsum("pr,pr->p", Y[p], Y[q]) - np.where(p == q, expression.h[p], 0)
            made[0, a:b], made[1, a:b] = expression.w[p] * product, expression.w[q] * product
        self.C = torch.as_tensor(made) / unit
        self.optimizer = torch.optim.Adam([self.C], lr=rate)

    @property
    def values(self) -> np.ndarray:
        return self.C.numpy()

    def step(self, labels: np.ndarray) -> float:
        apart = torch.as_tensor(labels[self.i] != labels[self.j])
        W = (self.C.abs().sum(dim=0) + SMOOTH).sqrt()
        self.C.grad = WEIGHT * self.C.sign() * apart / W
        _advance(self.C, self.optimizer, stop=True)
        return 2 * float((W * apart).sum())


def _advance(C: Tensor, optimizer: torch.optim.Optimizer, *, stop: bool) -> None:
    """Take a step; ``stop`` sets entries to zero that would pass it, where they then stay."""
    side = C.sign() if stop else None
    optimizer.step()
    if side is not None:
        C.mul_(C.sign() == side)
