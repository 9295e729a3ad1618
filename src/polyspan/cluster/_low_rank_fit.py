"""Fitting of low-rank Gaussians: weighted PCA by components, expectation maximisation, and K-subspaces."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp

from ._low_rank_density import split_energy

BLOCK_ENTRIES = 2**21
EXACT_SIDE = 128
# Up to this side, and from as many rows a component, one symmetric product that all steps read beats thin ones.
GRAM_SIDE, GRAM_WIDTHS = 1024, 16
NEGLIGIBLE = 1e-10
BATCH_ENTRIES = 2**24


class Parts(NamedTuple):
    """A mixture: bases (K, D, d), spectra (K, d), means (K, D), weights (K,) and white variance (K,).

    Components of lower rank than d have columns of zeros with variance 0.
    """

    bases: np.ndarray
    spectra: np.ndarray
    means: np.ndarray
    weights: np.ndarray
    residual: np.ndarray


class Rules(NamedTuple):
    """What the fit keeps to: ranks of the components, and how means, spectra and white variance are treated."""

    ranks: tuple[int, ...]
    center: bool
    identity: bool
    noise: float | None
    floor: float


class Fit(NamedTuple):
    """Parts, soft or hard memberships (n, K), the objective, rounds, whether it settled, and components re-seeded."""

    parts: Parts
    memberships: np.ndarray
    objective: float
    rounds: int
    settled: bool
    reseeded: int


def row_blocks(X: Any, wide: int = 1) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield slices of rows and those rows in float64; ``wide`` numbers stand beside each entry of a row."""
    step = max(64, BLOCK_ENTRIES // (X.shape[1] * wide))
    for start in range(0, len(X), step):
        rows = slice(start, start + step)
        yield rows, np.asarray(X[rows], dtype=np.float64)


def log_memberships(X: Any, parts: Parts) -> np.ndarray:
    """Return the logarithm of weight times density, (n, K)."""
    out = np.empty((len(X), len(parts.weights)))
    K, D, d = parts.bases.shape
    # Squared distances are differences of squares: rows far from the origin would lose all their digits.
    origin = parts.means.mean(axis=0)
    means = parts.means - origin
    side = parts.bases.transpose(1, 0, 2).reshape(D, K * d)
    offset = (means[:, None, :] @ parts.bases).ravel()
    along = parts.spectra + parts.residual[:, None]
    # Sums over the columns of every basis, plain and over their variances, by one product each.
    pick = np.repeat(np.eye(K), d, axis=0)
    over = pick / along.reshape(-1, 1)
    volume = np.log(along).sum(axis=1) + (D - d) * np.log(parts.residual) + D * math.log(2 * math.pi)
    constant = np.log(np.maximum(parts.weights, 1e-300)) - 0.5 * volume
    lengths = np.square(means).sum(axis=1)
    for rows, block in row_blocks(X, 4):
        x = block - origin
        c = x @ side
        c -= offset
        np.square(c, out=c)
        outside = np.maximum(np.vecdot(x, x)[:, None] - 2 * (x @ means.T) + lengths - c @ pick, 0)
        out[rows] = constant - 0.5 * (c @ over + outside / parts.residual)
    return out


def outside_energy(X: Any, parts: Parts) -> np.ndarray:
    """Return the squared distance of every row from each affine subspace, (n, K)."""
    origin = parts.means.mean(axis=0)
    blocks = (split_energy(block - origin, parts.bases, parts.means - origin).outside for _, block in row_blocks(X))
    return np.concatenate(list(blocks))


def weighted_parts(X: Any, R: np.ndarray, rules: Rules, old: Parts | None = None, *, rounds: int = 1) -> Parts:
    """Return the best mixture for memberships ``R`` (n, K): one weighted PCA a component.

    Exact for at most 128 features; otherwise the best subspaces in the span of the old bases and their
    images under the covariance, so that likelihood cannot fall. Matrices of D x D are made only where they are small
    and cheaper than thin products with the rows.
    """
    n, D = X.shape
    K, d = R.shape[1], max(rules.ranks)
    mass = np.maximum(R.sum(axis=0), 1e-12)
    means = np.zeros((K, D))
    if rules.center:
        means = sum((R[rows].T @ block for rows, block in row_blocks(X)), means) / mass[:, None]
    rounds = 4 if old is None else rounds
    if D <= EXACT_SIDE or (min(GRAM_SIDE, GRAM_WIDTHS * d * rounds) >= D and n >= K * D):
        S = np.zeros((K, D, D))
        for k, Y in _weighted_rows(X, R, means):
            S[k] += Y.T @ Y
        if D <= EXACT_SIDE:
            values, vectors = np.linalg.eigh(S)
            bases, values = vectors[:, :, ::-1][:, :, :d].copy(), values[:, ::-1][:, :d].copy()
            return assembled(
                bases, values / mass[:, None], np.trace(S, axis1=1, axis2=2) / mass, means, mass / n, rules
            )
        rows: _Rows | _Grams = _Grams(S)
    else:
        rows = _Rows(X, R, means)
    bases = _random_bases(K, D, d, np.random.default_rng(0)) if old is None else old.bases
    for _ in range(rounds):
        bases, values, trace = _ritz(rows, bases)
    return assembled(bases, values / mass[:, None], trace / mass, means, mass / n, rules)


def assembled(bases, values, trace, means, weights, rules: Rules) -> Parts:
    """Split variances (K, d) along the bases, and their total (K,), into spectra and white variance."""
    K, D, d = bases.shape
    ranks = np.array(rules.ranks)
    kept = np.arange(d) < ranks[:, None]
    values = np.where(kept, np.maximum(values, 0), 0)
    bases = bases * kept[:, None, :]
    if rules.noise is None:
        residual = np.maximum((trace - values.sum(axis=1)) / (D - ranks), rules.floor)
    else:
        residual = np.full(K, rules.noise**2)
    spectra = np.maximum(values - residual[:, None], 0) * kept
    if rules.identity:
        spectra = np.where(kept, np.sum(weights[:, None] * spectra) / np.sum(weights * ranks), 0)
    return Parts(bases, spectra, means, weights / weights.sum(), residual)


def _weighted_rows(X: Any, R: np.ndarray, means: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield component and rows less its mean, times the root of their membership, block by block."""
    for rows, block in row_blocks(X):
        for k, r in enumerate(R[rows].T):
            used = r > NEGLIGIBLE
            if used.any():
                Y = block[used] - means[k]
                Y *= np.sqrt(r[used])[:, None]
                yield k, Y


class _Rows(NamedTuple):
    """Weighted covariances times mass, as rows (n, D) with memberships (n, K) and means (K, D): never formed."""

    X: Any
    R: np.ndarray
    means: np.ndarray

    def images(self, bases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the images (K, D, d) of bases (K, D, d), and the traces (K,)."""
        images, trace = np.zeros(bases.shape), np.zeros(len(bases))
        for k, Y in _weighted_rows(*self):
            images[k] += Y.T @ (Y @ bases[k])
            trace[k] += np.vdot(Y, Y)
        return images, trace

    def seen_from(self, span: np.ndarray) -> np.ndarray:
        """Return the matrices (K, m, m) in the coordinates of a span (K, D, m)."""
        small = np.zeros((len(span), span.shape[2], span.shape[2]))
        for k, Y in _weighted_rows(*self):
            Z = Y @ span[k]
            small[k] += Z.T @ Z
        return small


class _Grams(NamedTuple):
    """The same as matrices (K, D, D)."""

    S: np.ndarray

    def images(self, bases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.S @ bases, np.trace(self.S, axis1=1, axis2=2)

    def seen_from(self, span: np.ndarray) -> np.ndarray:
        return np.swapaxes(span, 1, 2) @ (self.S @ span)


def _ritz(rows: _Rows | _Grams, bases: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of block iteration with Rayleigh-Ritz on the old bases and their images."""
    d = bases.shape[2]
    images, trace = rows.images(bases)
    span = np.linalg.qr(np.concatenate([bases, images / np.maximum(trace, 1e-300)[:, None, None]], axis=2))[0]
    values, vectors = np.linalg.eigh(rows.seen_from(span))
    return span @ vectors[:, :, ::-1][:, :, :d], values[:, ::-1][:, :d], trace


def _random_bases(K: int, D: int, d: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(K, D, d)))[0]


def one_hot(labels: np.ndarray, K: int) -> np.ndarray:
    """Return hard memberships (n, K)."""
    return np.eye(K)[labels]


def reseed(R: np.ndarray, fit: np.ndarray, rules: Rules) -> int:
    """Give components that hold less than one row the rows that fit worst, in place; return how many there were."""
    empty = np.flatnonzero(R.sum(axis=0) < 1)
    share = min(max(max(rules.ranks) + 1, len(R) // (10 * R.shape[1])), max(1, len(R) // (R.shape[1] + 1)))
    worst = np.argsort(fit, kind="stable")
    for number, k in enumerate(empty):
        rows = worst[number * share : (number + 1) * share]
        R[rows] = 0
        R[rows, k] = 1
    return len(empty)


def expectation_maximisation(
    X: Any, R: np.ndarray, rules: Rules, *, max_iter: int, tol: float, old: Parts | None = None
) -> Fit:
    """Climb the likelihood from memberships; ``objective`` is the mean log-likelihood of a row, in nats."""
    parts = weighted_parts(X, R, rules, old)
    bound, reseeded, settled, rounds = -np.inf, 0, False, 0
    for rounds in range(1, max_iter + 1):
        joint = log_memberships(X, parts)
        total = logsumexp(joint, axis=1)
        R, before, bound = np.exp(joint - total[:, None]), bound, float(total.mean())
        settled = bound - before < tol * X.shape[1]
        # A component that keeps dying is left dead after three revivals each.
        lost = reseed(R, total, rules) if reseeded < 3 * R.shape[1] else 0
        reseeded += lost
        if lost:
            bound, settled = -np.inf, False
        if settled or rounds == max_iter:
            break
        parts = weighted_parts(X, R, rules, parts)
    return Fit(parts, R, bound, rounds, settled, reseeded)


def k_subspaces(X: Any, labels: np.ndarray, rules: Rules, *, max_iter: int) -> Fit:
    """Alternate least distance and PCA from labels; ``objective`` is the share of the squares inside the subspaces."""
    K = len(rules.ranks)
    total = sum(float(np.vdot(block, block)) for _, block in row_blocks(X))
    parts, reseeded, settled, rounds = None, 0, False, 0
    left = np.zeros(len(X))
    while not settled and rounds < max_iter:
        rounds += 1
        R = one_hot(labels, K)
        if parts is not None and reseeded < 3 * K:
            reseeded += reseed(R, -left, rules)
        parts = weighted_parts(X, R, rules, parts, rounds=2)
        distances = outside_energy(X, parts)
        moved = distances.argmin(axis=1)
        left = distances[np.arange(len(X)), moved]
        settled = bool(np.array_equal(moved, R.argmax(axis=1)))
        labels = moved
    if parts is None or not settled:
        parts = weighted_parts(X, one_hot(labels, K), rules, parts, rounds=2)
    return Fit(parts, one_hot(labels, K), 1 - float(left.sum()) / max(total, 1e-300), rounds, settled, reseeded)


def many_k_subspaces(
    X: np.ndarray, n_init: int, rules: Rules, *, max_iter: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Run K-subspaces from random bases, all starts at once; return labels (n_init, n) and shares captured (n_init,).

    Rows are first turned into the space that they span, where that is narrower. Starts that settled leave the batch.
    """
    rows = np.asarray(X, dtype=np.float64)
    if len(rows) < rows.shape[1]:
        rows = rows @ np.linalg.qr(rows.T)[0]
    n, D = rows.shape
    K, d = len(rules.ranks), min(max(rules.ranks), D)
    kept = np.arange(d) < np.array(rules.ranks)[:, None]
    total, norms = max(float(np.vdot(rows, rows)), 1e-300), np.square(rows).sum(axis=1)
    outer = (rows[:, :, None] * rows[:, None, :]).reshape(n, D * D) if n * D * D <= BATCH_ENTRIES else None
    found, share = np.zeros((n_init, n), dtype=np.intp), np.zeros(n_init)
    step = max(1, BATCH_ENTRIES // (K * max(D * D, n * d)))
    for first in range(0, n_init, step):
        R = min(step, n_init - first)
        bases, means = _random_bases(R * K, D, d, rng).reshape(R, K, D, d), np.zeros((R, K, D))
        active, labels = np.arange(R), np.full((R, n), -1, dtype=np.intp)
        for _ in range(max_iter):
            offsets = (means[..., None, :] @ bases)[..., 0, :]
            c = np.tensordot(rows, bases, axes=(1, 2)) - offsets
            inside = np.square(c * kept).sum(axis=-1)
            cross = np.tensordot(rows, means, axes=(1, 2)) if rules.center else 0
            left = np.maximum(norms[:, None, None] - 2 * cross + np.square(means).sum(axis=-1) - inside, 0)
            moved = left.argmin(axis=-1).T
            share[first + active] = 1 - np.take_along_axis(left, moved.T[..., None], -1)[..., 0].sum(axis=0) / total
            going = (moved != labels[active]).any(axis=1)
            labels[active] = moved
            active, moved = active[going], moved[going]
            if not len(active):
                break
            W = (moved[:, None, :] == np.arange(K)[:, None]).astype(np.float64)
            means, bases = _hard_update(rows, W, outer, rules.center, d)
        found[first : first + R] = labels
    return found, share


def _hard_update(rows, W, outer, center: bool, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Return means (R, K, D) and bases (R, K, D, d) of hard memberships ``W`` (R, K, n)."""
    R, K, n = W.shape
    D = rows.shape[1]
    mass = np.maximum(W.sum(axis=-1), 1)
    means = (W @ rows) / mass[..., None] if center else np.zeros((R, K, D))
    if outer is not None:
        S = (W.reshape(R * K, n) @ outer).reshape(R, K, D, D)
    else:
        S = np.stack([[rows[w > 0].T @ rows[w > 0] for w in start] for start in W])
    S = S - mass[..., None, None] * means[..., :, None] * means[..., None, :]
    return means, np.linalg.eigh(S)[1][..., ::-1][..., :d]


def common_rank(X: Any, labels: np.ndarray, share: float, *, center: bool) -> int:
    """Return the median over groups of the directions that hold a share of the variance, at least 1."""
    counts = []
    for k in np.unique(labels):
        rows = np.asarray(X[labels == k], dtype=np.float64)
        if len(rows) < 3:
            continue
        s = np.linalg.svd(rows - rows.mean(axis=0) if center else rows, compute_uv=False) ** 2
        if s.sum() > 0:
            counts.append(int(np.searchsorted(np.cumsum(s), share * s.sum() * (1 - 1e-9))) + 1)
    return max(1, int(np.median(counts))) if counts else 1


def rank_list(rank: int | Sequence[int], K: int) -> tuple[int, ...]:
    """Return one rank a component."""
    return tuple(int(r) for r in rank) if isinstance(rank, Sequence | np.ndarray) else (int(rank),) * K
