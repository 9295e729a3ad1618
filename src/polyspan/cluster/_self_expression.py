r"""Self-expression: each point as a combination of the others, and the clusters that the coefficients show.

Rows are points: row i of C holds the coefficients of point i, so that :math:`X \approx CX`.
"""

import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from polyspan.linalg import truncated_eigh

from ._affinity import EIGEN_TOL

SMOOTH = 1e-12
FINE_ROWS = 10_000


def ridge_coefficients(G: Tensor, alpha: float | int, *, zero_diagonal: bool = True) -> Tensor:
    r"""Minimise :math:`\mathrm{tr}((I-C)G(I-C)^\top) + \alpha\lVert C\rVert_F^2` over C (n, n).

    Closed form: with :math:`M = (G+\alpha I)^{-1}` and zero diagonal :math:`C_{ij} = -M_{ij}/M_{ii}`, else
    :math:`C = I - \alpha M`. ``G`` (n, n) is the Gram matrix of the points; alpha > 0.
    """
    shifted = G.clone()
    shifted.diagonal().add_(alpha)
    M = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
    if not zero_diagonal:
        return torch.eye(len(M), dtype=M.dtype, device=M.device) - alpha * M
    C = -M / M.diagonal().unsqueeze(1)
    return C.fill_diagonal_(0)


def expression_loss(C: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\mathrm{tr}((I-C)G(I-C)^\top) = \lVert X-CX\rVert_F^2` and its gradient, by one product."""
    rest = G - C @ G
    return rest.diagonal().sum() - (rest * C).sum(), -2 * rest


def structured_norm(C: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\mathrm{tr}(Q^\top LQ)` and its gradient, for L the Laplacian of :math:`(|C|+|C^\top|)^{1/2}`.

    Q holds the one-hot ``labels`` (n,): the sum of the square roots of all affinities between different clusters. The
    root's slope at 0 is infinite: 1e-12 is added under it.
    """
    size = C.abs()
    W = (size + size.T + SMOOTH).sqrt()
    apart = labels.unsqueeze(1) != labels
    return (W * apart).sum(), C.sign() * apart / W


def leading_affinity(C: np.ndarray, d: int | None) -> sp.csr_array:
    """Symmetrise |C|, keep the d largest entries of every column (ties too; all without ``d``), symmetrise again."""
    A = (np.abs(C) + np.abs(C.T)) / 2
    if d is not None and d < len(A):
        least = np.partition(A, len(A) - d, axis=0)[len(A) - d]
        A = np.where(least <= A, A, 0)
    sparse = sp.csr_array(A)
    return sp.csr_array((sparse + sparse.T) / 2)


def leading_of_pairs(i: np.ndarray, j: np.ndarray, A: np.ndarray, n: int, d: int) -> tuple[sp.csr_array, np.ndarray]:
    """Return what :func:`leading_affinity` makes of pairs i <= j, each once, of affinities A, and all others zero.

    Also the d-th largest of each column, (n,), which the cut keeps at least; 0 where a column has fewer.
    """
    off = i != j
    column, row, value = np.concatenate([i, j[off]]), np.concatenate([j, i[off]]), np.concatenate([A, A[off]])
    order = np.lexsort((-value, column))
    column, row, value = column[order], row[order], value[order]
    ends = np.cumsum(np.bincount(column, minlength=n))
    at = np.concatenate([[0], ends[:-1]]) + d - 1
    least = np.where(at < ends, value[np.minimum(at, len(value) - 1)], 0)
    kept = (value >= least[column]) & (value > 0)
    sparse = sp.csr_array((value[kept], (row[kept], column[kept])), shape=(n, n))
    return sp.csr_array((sparse + sparse.T) / 2), least


class SpectralRounding:
    """Clusters of an affinity: leading vectors of I + D^-1/2 A D^-1/2, unit rows, k-means.

    Vectors have all digits up to 10,000 rows, and six beyond. The first call has ``n_init`` starts; later ones, if
    ``warm``, start from the clusters found before. ``rows`` (n, k) are those that were clustered last.
    """

    def __init__(self, k: int, n_init: int, seed: int):
        self.k, self.n_init, self.seed = k, n_init, seed
        self._last: np.ndarray | None = None
        self.rows = np.zeros((0, k))

    def __call__(self, A: sp.csr_array, *, warm: bool = False) -> np.ndarray:
        from sklearn.cluster import KMeans

        n = A.shape[0]
        root = 1 / np.sqrt(np.asarray(A.sum(axis=1)).ravel() + np.finfo(np.float64).eps)
        N = sp.csr_array(sp.diags_array(root) @ A.astype(np.float64) @ sp.diags_array(root) + sp.eye_array(n))
        N = (N + N.T) / 2
        tol = 0.0 if n <= FINE_ROWS else EIGEN_TOL
        vectors = truncated_eigh(N, self.k, tol=tol, rng=np.random.default_rng(self.seed)).vectors
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        self.rows = rows = vectors / np.where(norms > 0, norms, 1)
        if self.k == 1:
            return np.zeros(n, dtype=np.int64)
        start: Any = "k-means++"
        if warm and self._last is not None and len(np.unique(self._last)) == self.k:
            start = np.stack([rows[self._last == c].mean(axis=0) for c in range(self.k)])
        with warnings.catch_warnings():
            # Fewer distinct rows than clusters: scikit-learn warns, and the caller says it in its own words.
            warnings.filterwarnings("ignore", message="Number of distinct clusters")
            made = KMeans(
                self.k,
                init=start,
                n_init=self.n_init if isinstance(start, str) else 1,
                max_iter=1000,
                random_state=self.seed,
            ).fit(rows)
        self._last = made.labels_.astype(np.int64)
        return self._last
