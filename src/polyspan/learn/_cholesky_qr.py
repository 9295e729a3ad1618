"""The Q of a QR by Cholesky factors of the Gram matrix: for columns that are nearly orthonormal already."""

import numpy as np
import torch
from torch import Tensor

from polyspan.linalg import orthonormal_basis

NEAR = 0.5
"""Up to this distance of X'X from the identity one pass is exact to rounding: cond(X)² is at most 3."""
PASSES = 4
TRIANGULAR = 96
"""Columns from which the BLAS routines for triangles, at half the operations, are worth the way to them."""


def cholesky_qr(X: Tensor) -> Tensor:
    r"""Return the Q of :math:`X = QR` with positive diagonal of R, (d, k), without a gradient.

    Each pass is :math:`Q = X L^{-\top}` with :math:`LL^\top = X^\top X`, at half the operations of a Householder QR
    and all of them products of matrices; R is triangular with positive diagonal by construction. A pass leaves
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
    d, k = X.shape
    Q = X.detach().clone(memory_format=torch.contiguous_format)
    blas = k >= TRIANGULAR and Q.device.type == "cpu" and Q.dtype in (torch.float32, torch.float64)
    for _ in range(PASSES if k else 0):
        gram = _gram(Q, blas)
        distance = float(torch.linalg.matrix_norm(gram - torch.eye(k, dtype=Q.dtype, device=Q.device)))
        if not np.isfinite(distance):
            break
        if not _divide(Q, gram, blas):
            shift = 11 * (d * k + k * (k + 1)) * torch.finfo(Q.dtype).eps * gram.trace()
            if not _divide(Q, gram + shift * torch.eye(k, dtype=Q.dtype, device=Q.device), blas):
                break
        elif distance <= NEAR:
            return Q
    if not bool(torch.isfinite(X).all()):
        raise ValueError("X must be finite")
    return orthonormal_basis(X.detach()).contiguous()


def _gram(Q: Tensor, blas: bool) -> Tensor:
    """Return Q'Q; on CPU by the BLAS routine that computes one triangle only."""
    if not blas:
        return Q.T @ Q
    from scipy.linalg.blas import get_blas_funcs

    rows = Q.numpy().T
    (syrk,) = get_blas_funcs(("syrk",), (rows,))
    upper = torch.from_numpy(np.ascontiguousarray(syrk(1.0, rows)))
    return upper + upper.T - torch.diag(upper.diagonal())


def _divide(Q: Tensor, gram: Tensor, blas: bool) -> bool:
    """Replace Q by Q L⁻ᵀ in place; false, and Q as it was, where the Gram matrix is not positive definite."""
    L, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        return False
    if not blas:
        Q.copy_(torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False))
        return True
    from scipy.linalg.blas import get_blas_funcs

    # The transpose of Q, row by row in memory, is a matrix in BLAS's own order: it is solved where it stands.
    rows = Q.numpy().T
    (trsm,) = get_blas_funcs(("trsm",), (rows,))
    solved = trsm(1.0, np.asfortranarray(L.numpy()), rows, lower=1, overwrite_b=1)
    if not np.shares_memory(solved, rows):
        Q.copy_(torch.from_numpy(solved.T))
    return True
