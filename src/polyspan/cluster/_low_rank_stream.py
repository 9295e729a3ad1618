"""Low-rank Gaussians from a stream of batches: one incremental PCA a component, weighted by memberships."""

from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from ._low_rank_fit import Parts, Rules, assembled, log_memberships, weighted_parts


class Sums(NamedTuple):
    """What is kept of all rows: leading directions (K, D, w), sums of squares along them (K, w) and in all (K,),
    means (K, D) and masses (K,). The width w is twice the rank where D allows, so that directions may change places.
    """

    directions: np.ndarray
    squares: np.ndarray
    total: np.ndarray
    means: np.ndarray
    mass: np.ndarray


def memberships(X: np.ndarray, parts: Parts) -> np.ndarray:
    """Return the posterior probabilities (n, K)."""
    joint = log_memberships(X, parts)
    return np.exp(joint - logsumexp(joint, axis=1, keepdims=True))


def begin(X: np.ndarray, R: np.ndarray, rules: Rules) -> Sums:
    """Return the sums of a first batch with memberships (n, K)."""
    D, d = X.shape[1], max(rules.ranks)
    width = min(2 * d, D - 1)
    wide = weighted_parts(X, R, rules._replace(ranks=(width,) * R.shape[1], noise=0.0, identity=False, floor=0.0))
    mass = R.sum(axis=0)
    gaps = [X - mean for mean in wide.means]
    total = np.array([r @ np.square(gap).sum(axis=1) for r, gap in zip(R.T, gaps, strict=True)])
    return Sums(wide.bases, wide.spectra * mass[:, None], total, wide.means, mass)


def add(sums: Sums, X: np.ndarray, R: np.ndarray, *, center: bool) -> Sums:
    """Return the sums with a batch more."""
    width = sums.squares.shape[1]
    directions, squares = sums.directions.copy(), sums.squares.copy()
    total, means, mass = sums.total.copy(), sums.means.copy(), sums.mass.copy()
    for k, r in enumerate(R.T):
        new = float(r.sum())
        if new < 1e-9:
            continue
        mean = r @ X / new if center else means[k]
        rows = (X - mean) * np.sqrt(r)[:, None]
        total[k] += np.vdot(rows, rows)
        stack = [directions[k].T * np.sqrt(squares[k])[:, None], rows]
        if center:
            # The spread between the two means is spread of the whole.
            between = np.sqrt(mass[k] * new / (mass[k] + new)) * (mean - means[k])
            total[k] += between @ between
            stack.append(between[None])
            means[k] += new / (mass[k] + new) * (mean - means[k])
        _, s, Vh = np.linalg.svd(np.concatenate(stack), full_matrices=False)
        directions[k], squares[k] = Vh[:width].T, s[:width] ** 2
        mass[k] += new
    return Sums(directions, squares, total, means, mass)


def summed_parts(sums: Sums, rules: Rules) -> Parts:
    """Return the mixture that the sums describe."""
    d, mass = max(rules.ranks), np.maximum(sums.mass, 1e-12)
    variances = sums.squares[:, :d] / mass[:, None]
    return assembled(sums.directions[:, :, :d], variances, sums.total / mass, sums.means, mass / mass.sum(), rules)
