"""The Q of a QR by Cholesky factors of the Gram matrix: for columns that are nearly orthonormal already."""

import math

import numpy as np
import torch
from torch import Tensor

from polyspan.linalg import orthonormal_basis

NEAR = 0.5
"""Up to this distance of X'X from the identity one pass is exact to rounding: cond(X)² is at most 3.

The distance is the largest sum of a row's absolute values, which no eigenvalue exceeds; of many columns, where that is
far too large, the root of the Frobenius norm of the square, which none exceeds either.
"""
PASSES = 4


def cholesky_qr(X: Tensor) -> Tensor:
    r"""Return the Q of :math:`X = QR` with positive diagonal of R, (d, k), without a gradient.

    Each pass is :math:`Q = X L^{-\top}` with :math:`LL^\top = X^\top X`, nearly all of it two products of matrices; R
    is triangular with positive diagonal by construction. A pass leaves
    :math:`\lVert Q^\top Q - I\rVert \approx \epsilon\,\mathrm{cond}(X)^2`, so columns that were orthonormal before a
    small step need one pass, others two (CholeskyQR2). Where the Gram matrix has no Cholesky factor it is shifted by
    :math:`11(dk + k(k+1))\epsilon\lVert X\rVert_F^2`, and where passes do not help, as for dependent columns, the
    Householder QR is taken, whose Q is orthonormal whatever X is.

    Parameters
    ----------
    X : tensor of shape (d, k)
        float32 or float64, k <= d, finite.

    Raises
    ------
    ValueError
        X has more columns than rows, or is not finite.

    Notes
    -----
    Source: Yamamoto et al. 2015; Fukaya et al. 2020 for the shift.
    """
    if X.ndim != 2 or X.shape[1] > X.shape[0]:
        raise ValueError(f"X must be a matrix (d, k) with k <= d, got shape {tuple(X.shape)}")
    Q = X.detach().clone(memory_format=torch.contiguous_format)
    for _ in range(PASSES if X.shape[1] else 0):
        gram, distance = _gram(Q)
        if not math.isfinite(distance):
            break
        if not _divide(Q, gram):
            d, k = X.shape
            shift = 11 * (d * k + k * (k + 1)) * torch.finfo(Q.dtype).eps * gram.trace()
            if not _divide(Q, gram + shift * torch.eye(k, dtype=Q.dtype, device=Q.device)):
                break
        elif distance <= NEAR:
            return Q
    if not bool(torch.isfinite(X).all()):
        raise ValueError("X must be finite")
    return orthonormal_basis(X.detach()).contiguous()


def cholesky_qr_(X: Tensor) -> Tensor:
    """Put :func:`cholesky_qr` of ``X``, which must be contiguous, in its place: without a copy where one pass does."""
    if X.ndim == 2 and 0 < X.shape[1] <= X.shape[0]:
        gram, distance = _gram(X)
        if distance <= NEAR and _divide(X, gram):
            return X
    return X.copy_(cholesky_qr(X))


def _gram(Q: Tensor) -> tuple[Tensor, float]:
    """Return Q'Q and its distance from the identity."""
    gram = _squared(Q)
    gap = gram.clone()
    gap.diagonal().sub_(1)
    distance = float(gap.abs().sum(dim=1).max())
    if NEAR < distance < math.inf:
        # A product of the small matrix with itself, where a pass more would take two of the large one.
        distance = min(distance, float(torch.linalg.matrix_norm(_squared(gap))) ** 0.5)
    return gram, distance


def _squared(X: Tensor) -> Tensor:
    """Return X'X; on CPU NumPy sees that both factors are one, and makes only half of the symmetric product."""
    if X.device.type != "cpu":
        return X.T @ X
    x = X.numpy()
    # Whether squares are too large for the type is seen by their distance from the identity.
    with np.errstate(over="ignore", invalid="ignore"):
        return torch.from_numpy(x.T @ x)


def _divide(Q: Tensor, gram: Tensor) -> bool:
    """Replace Q by Q L⁻ᵀ in place; false, and Q as it was, where the Gram matrix is not positive definite.

    On CPU by the triangular solver of BLAS in Q's own memory, with half the operations of a product. Elsewhere a
    product with the inverse of the small factor is several times as fast as solving for all rows of Q; what it loses by
    a factor that is far from the identity, the next pass makes good.
    """
    if Q.device.type == "cpu":
        return _divide_on_cpu(Q.numpy(), gram.numpy())
    L, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        return False
    inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False)
    Q.copy_(Q @ inverse.T)
    return True


def _divide_on_cpu(Q: np.ndarray, gram: np.ndarray) -> bool:
    from scipy.linalg import blas, lapack

    wide = Q.dtype == np.float64
    factorise, solve = (lapack.dpotrf, blas.dtrsm) if wide else (lapack.spotrf, blas.strsm)
    # Both work on columns: what is a row here is a column there, and the symmetric matrix is its own transpose.
    L, info = factorise(gram.T, lower=1)
    if info:
        return False
    made = solve(1.0, L, Q.T, lower=1, overwrite_b=1)
    if not np.may_share_memory(made, Q):
        # Of a matrix that is not contiguous the solver takes a copy.
        Q[:] = made.T
    return True
