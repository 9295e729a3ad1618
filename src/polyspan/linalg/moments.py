"""Means and centred second moments of paired rows, gathered batch by batch: all that Procrustes, ridge and CCA need."""

from typing import Any

import numpy as np

from ._namespace import is_torch


class PairedMoments:
    r"""Sums of paired rows x (d_in) and y (d_out) in one pass: weight, means and centred products.

    Batches are merged by the update of Chan, Golub and LeVeque, which never subtracts large numbers of like size, so
    data far from the origin lose nothing. All sums are float64, whatever the input.

    Parameters
    ----------
    d_in, d_out : int or None
        Widths; without ``d_out`` only the moments of x are kept.
    keep_cov_in, keep_cov_out : bool
        Whether ``cov_in`` and ``cov_out`` are gathered, at half the cost of ``cross`` each; they are (0, 0) otherwise.

    Attributes
    ----------
    weight : float
        Sum of the weights: the number of rows where none are given.
    n_rows : int
    mean_in, mean_out : ndarray of shape (d_in,), (d_out,)
    cov_in, cross, cov_out : ndarray of shape (d_in, d_in), (d_in, d_out), (d_out, d_out)
        **Sums** (not means) of the products of centred rows: ``cross`` is :math:`\sum_i w_i (x_i-\mu)(y_i-\nu)^\top`.
    spread_in, spread_out : float
        The traces of ``cov_in`` and ``cov_out``, which are known without them.
    """

    def __init__(self, d_in: int, d_out: int | None = None, *, keep_cov_in: bool = True, keep_cov_out: bool = True):
        self.weight, self.n_rows = 0.0, 0
        self.d_in, self.d_out, self.keep_cov_in, self.keep_cov_out = d_in, d_out, keep_cov_in, keep_cov_out
        self.mean_in, self.cov_in = np.zeros(d_in), np.zeros((d_in, d_in) if keep_cov_in else (0, 0))
        self.spread_in = self.spread_out = 0.0
        wide = 0 if d_out is None else d_out
        self.mean_out, self.cross = np.zeros(wide), np.zeros((d_in, wide))
        self.cov_out = np.zeros((wide, wide) if keep_cov_out else (0, 0))

    def update(self, X: Any, Y: Any = None, weights: Any = None) -> "PairedMoments":
        """Add rows ``X`` (b, d_in) and their partners ``Y`` (b, d_out); return self.

        Raises
        ------
        ValueError
            Widths or row counts differ from what was announced, or a weight is negative.
        """
        X, Y, w = _wide(X), None if Y is None else _wide(Y), None if weights is None else _wide(weights)
        if X.ndim != 2 or X.shape[1] != self.d_in:
            raise ValueError(f"X must have shape (b, {self.d_in}), got {X.shape}")
        if (Y is None) != (self.d_out is None):
            raise ValueError(
                f"Y must {'not ' if self.d_out is None else ''}be given to moments with d_out={self.d_out}"
            )
        if Y is not None and Y.shape != (len(X), self.d_out):
            raise ValueError(f"Y must have shape ({len(X)}, {self.d_out}), got {Y.shape}")
        if w is not None and (w.shape != (len(X),) or (w < 0).any()):
            raise ValueError(f"weights must be {len(X)} non-negative numbers, got shape {w.shape}")
        part = PairedMoments(0, None)
        part.d_in, part.d_out = self.d_in, self.d_out
        part.n_rows, part.weight = len(X), float(len(X) if w is None else w.sum())
        if part.weight == 0.0:
            return self
        part.mean_in, A = _centre(X, w)
        wA = A if w is None else A * w[:, None]
        part.spread_in = float(np.vdot(wA, A))
        if self.keep_cov_in:
            part.cov_in = wA.T @ A
        part.mean_out, part.cross, part.cov_out = self.mean_out, self.cross, self.cov_out
        if Y is not None:
            part.mean_out, B = _centre(Y, w)
            part.cross = wA.T @ B
            wB = B if w is None else B * w[:, None]
            part.spread_out = float(np.vdot(wB, B))
            if self.keep_cov_out:
                part.cov_out = wB.T @ B
        return self.merge(part)

    def merge(self, other: "PairedMoments") -> "PairedMoments":
        """Add what another gatherer has seen, as if its rows had come here; return self."""
        if (self.d_in, self.d_out) != (other.d_in, other.d_out):
            raise ValueError(f"other must hold widths {(self.d_in, self.d_out)}, got {(other.d_in, other.d_out)}")
        if other.weight == 0.0:
            return self
        total = self.weight + other.weight
        share = self.weight * other.weight / total
        step_in = other.mean_in - self.mean_in
        self.spread_in += other.spread_in + share * float(step_in @ step_in)
        if self.keep_cov_in:
            self.cov_in = self.cov_in + other.cov_in + share * np.outer(step_in, step_in)
        if self.d_out is not None:
            step_out = other.mean_out - self.mean_out
            self.cross = self.cross + other.cross + share * np.outer(step_in, step_out)
            self.spread_out += other.spread_out + share * float(step_out @ step_out)
            if self.keep_cov_out:
                self.cov_out = self.cov_out + other.cov_out + share * np.outer(step_out, step_out)
            self.mean_out = self.mean_out + step_out * (other.weight / total)
        self.mean_in = self.mean_in + step_in * (other.weight / total)
        self.weight, self.n_rows = total, self.n_rows + other.n_rows
        return self

    def uncentred(self) -> "PairedMoments":
        """Return a copy whose means are zero and whose products are taken about the origin."""
        plain = PairedMoments(self.d_in, self.d_out, keep_cov_in=self.keep_cov_in, keep_cov_out=self.keep_cov_out)
        plain.weight, plain.n_rows = self.weight, self.n_rows
        plain.spread_in = self.spread_in + self.weight * float(self.mean_in @ self.mean_in)
        if self.keep_cov_in:
            plain.cov_in = self.cov_in + self.weight * np.outer(self.mean_in, self.mean_in)
        if self.d_out is not None:
            plain.spread_out = self.spread_out + self.weight * float(self.mean_out @ self.mean_out)
            plain.cross = self.cross + self.weight * np.outer(self.mean_in, self.mean_out)
            if self.keep_cov_out:
                plain.cov_out = self.cov_out + self.weight * np.outer(self.mean_out, self.mean_out)
        return plain


def _wide(x: Any) -> np.ndarray:
    """Return a float64 NumPy view or copy of an array or of a detached tensor."""
    if is_torch(x):
        x = x.detach().double().cpu().numpy()
    return np.asarray(x, dtype=np.float64)


def _centre(X: np.ndarray, w: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    mean = X.mean(axis=0) if w is None else (w @ X) / w.sum()
    return mean, X - mean
