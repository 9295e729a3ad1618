"""Attributes smoothed along the edges of a graph: matrices and operators that are applied and need not be formed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator

from polyspan.linalg import normalized_adjacency


class Smoothing:
    r"""The matrix :math:`Z = \sum_{t=0}^T w_t P^t X` (n, d), applied without holding more than P and X do.

    :math:`P = D^{-1} N` with N symmetric, so one copy of N serves Z and its transpose; the sum is taken by Horner's
    rule, T products with N an application.

    Parameters
    ----------
    N : csr_array of shape (n, n)
        Symmetric.
    X : ndarray or csr_array of shape (n, d)
    weights : ndarray of shape (T + 1,)
    """

    def __init__(self, N: sp.csr_array, X: Any, weights: np.ndarray):
        self.N, self.X, self.weights = N, X, weights.astype(X.dtype)
        self.shape, self.dtype = X.shape, X.dtype
        self.Xt = X.T.tocsr() if sp.issparse(X) else X.T
        self.inverse_degree = 1 / np.asarray(N.sum(axis=1), dtype=X.dtype).reshape(-1, 1)

    def _along(self, Y: np.ndarray) -> np.ndarray:
        total = self.weights[-1] * Y
        for weight in self.weights[-2::-1]:
            total = self.N @ total
            total *= self.inverse_degree
            total += weight * Y
        return total

    def _against(self, Y: np.ndarray) -> np.ndarray:
        total = self.weights[-1] * Y
        for weight in self.weights[-2::-1]:
            total *= self.inverse_degree
            total = self.N @ total
            total += weight * Y
        return total

    def apply(self, V: np.ndarray) -> np.ndarray:
        """Return Z V (n, m) for V (d, m)."""
        return self._along(np.asarray(self.X @ V.astype(self.dtype, copy=False)))

    def apply_transposed(self, U: np.ndarray) -> np.ndarray:
        """Return Zᵀ U (d, m) for U (n, m)."""
        return np.asarray(self.Xt @ self._against(U.astype(self.dtype, copy=False)))

    def operator(self) -> LinearOperator:
        return _operator(self.shape, self.dtype, self.apply, self.apply_transposed)

    def toarray(self) -> np.ndarray:
        return self._along(self.X.toarray() if sp.issparse(self.X) else self.X)


def _operator(shape, dtype, forward: Callable, backward: Callable) -> LinearOperator:
    """Return a linear operator from two functions of blocks of columns."""
    return LinearOperator(
        shape,
        matvec=lambda v: forward(v.reshape(-1, 1)).ravel(),
        rmatvec=lambda u: backward(u.reshape(-1, 1)).ravel(),
        matmat=forward,
        rmatmat=backward,
        dtype=dtype,
    )


def transpose(Z: Any) -> Any:
    """Return Zᵀ; of a real operator the adjoint, which conjugates no block."""
    return Z.H if isinstance(Z, LinearOperator) else Z.T


def row_scaled(Z: Any, scale: np.ndarray) -> Any:
    """Return diag(scale) Z."""
    column = scale[:, None]
    if not isinstance(Z, LinearOperator):
        return column * Z
    return _operator(Z.shape, Z.dtype, lambda V: column * (Z @ V), lambda U: Z.H @ (column * U))


def modularity_operator(Z: Any, omega: np.ndarray, resolution: float) -> LinearOperator:
    """Return Z Zᵀ - γ ω ωᵀ / (1ᵀω) (n, n), symmetric, applied through Z."""
    factor, Zt = Z.dtype.type(resolution / float(omega.sum(dtype=np.float64))), transpose(Z)

    def apply(V):
        V = V.astype(Z.dtype, copy=False)
        return Z @ (Zt @ V) - factor * np.outer(omega, omega @ V)

    return _operator((Z.shape[0],) * 2, Z.dtype, apply, apply)


def slim(M: Any) -> Any:
    """Return a sparse matrix with 32-bit indices where they suffice: half the bytes of every product."""
    if not sp.issparse(M) or max(M.nnz, *M.shape) >= 2**31:
        return M
    return sp.csr_array((M.data, M.indices.astype(np.int32), M.indptr.astype(np.int32)), shape=M.shape)


def twice_looped(A: sp.csr_array) -> sp.csr_array:
    """Return N = D^(-1/2) (A + I) D^(-1/2) + I; the walk is N over its row sums."""
    A = normalized_adjacency(A, "symmetric", self_loops=1.0)
    return sp.csr_array(A + sp.eye_array(A.shape[0], dtype=A.dtype, format="csr"))


def hop_weights(order: int, decay: float) -> np.ndarray:
    """Return w_t, proportional to decay^t and summing to one, without overflow where decay > 1."""
    hops = np.arange(int(order) + 1)
    powers = float(decay) ** (hops - (hops[-1] if decay > 1 else 0)).astype(np.float64)
    return powers / powers.sum()


def as_dense(F: LinearOperator) -> np.ndarray:
    """Return an operator (n, d) with one small side as an array."""
    n, d = F.shape
    return F @ np.eye(d, dtype=F.dtype) if d <= n else (F.H @ np.eye(n, dtype=F.dtype)).T
