"""Polar factors: the isometry, and the rotation, nearest to a matrix."""

import math
from typing import Any

from jaxtyping import Float, Num

from polyspan.errors import NotConverged

from ._namespace import detached, identity, is_torch, namespace, swap, widen


def nearest_isometry(M: Num[Any, "*b p q"], *, method: str = "svd", max_iter: int = 60) -> Float[Any, "*b p q"]:
    r"""Replace each matrix by the nearest one with orthonormal columns (p >= q) or orthonormal rows (p <= q).

    With the thin SVD :math:`M = U S V^\top` this is the polar factor :math:`U V^\top`, nearest in every unitarily
    invariant norm. Not unique where M has rank below min(p, q); the SVD then picks one.

    The torch derivative is the true one,

    .. math:: \mathrm dQ = U\,\frac{U^\top \mathrm dM V - V^\top \mathrm dM^\top U}{s_i + s_j}\,V^\top
              + (I-UU^\top)\,\mathrm dM\,V S^{-1} V^\top,

    finite at isometries and at repeated singular values; it is infinite or NaN where two singular values are 0, or one
    of a matrix that is not square. Higher derivatives are true as well.

    Parameters
    ----------
    M : array of shape (*b, p, q)
        Real and finite, NumPy or torch. float16 and bfloat16 are computed in float32.
    method : {"svd", "newton-schulz"}
        ``"newton-schulz"`` uses matrix products only, which suits accelerators; every factor 1.5 between the largest
        and the smallest singular value costs one step.
    max_iter : int
        Bound on Newton-Schulz steps; 60 reach a condition number of about 1e9.

    Raises
    ------
    NotConverged
        Newton-Schulz did not reach orthonormality in ``max_iter`` steps.

    Notes
    -----
    Source: Higham, *Functions of Matrices*, chapter 8.
    """
    wide, narrow = _matrices(M, "M")
    if method == "newton-schulz":
        return narrow(_newton_schulz(wide, max_iter))
    if method != "svd":
        raise ValueError(f"method must be 'svd' or 'newton-schulz', got {method!r}")
    if is_torch(wide):
        from ._polar_torch import Polar

        tall = wide.shape[-2] >= wide.shape[-1]
        Q = Polar.apply(wide if tall else swap(wide), False)[0]
        return narrow(Q if tall else swap(Q))
    U, _, Vh = namespace(wide).linalg.svd(wide, full_matrices=False)
    return narrow(U @ Vh)


def nearest_rotation(M: Any) -> Float[Any, "*b n n"]:
    r"""Replace each square matrix by the nearest rotation: orthogonal with determinant +1.

    :math:`U\,\mathrm{diag}(1,\dots,1,\det UV^\top)\,V^\top`, the last direction being that of the smallest singular
    value. Not unique where :math:`\det M < 0` and the two smallest singular values are equal, or where both are 0.

    The torch derivative is the true one; it divides by :math:`t_i + t_j` over pairs of *signed* singular values
    (the last one negative where :math:`\det M < 0`), so it is finite wherever the rotation is unique: at rotations, at
    repeated singular values, and at rank n-1 (planar point sets). Higher derivatives are true as well.

    Parameters
    ----------
    M : array of shape (*b, n, n)
        Real and finite, NumPy or torch; float16 and bfloat16 are computed in float32.

    Notes
    -----
    Source: Umeyama 1991; Levinson et al. 2020.
    """
    wide, narrow = _matrices(M, "M")
    if wide.shape[-1] != wide.shape[-2]:
        raise ValueError(f"M must hold square matrices (*b, n, n), got shape {tuple(M.shape)}")
    if is_torch(wide):
        from ._polar_torch import Polar

        return narrow(Polar.apply(wide, True)[0])
    xp = namespace(wide)
    U, _, Vh = xp.linalg.svd(wide, full_matrices=False)
    sign = xp.sign(xp.linalg.det(U @ Vh))[..., None, None]
    return narrow(U[..., :-1] @ Vh[..., :-1, :] + sign * (U[..., -1:] @ Vh[..., -1:, :]))


def _matrices(M: Any, name: str) -> tuple[Any, Any]:
    """Widen ``M`` after checking that it holds real, non-empty matrices."""
    xp = namespace(M)
    if M.ndim < 2 or 0 in M.shape[-2:]:
        raise ValueError(f"{name} must hold non-empty matrices (*b, p, q), got shape {tuple(M.shape)}")
    if xp.isdtype(M.dtype, "complex floating"):
        raise TypeError(f"{name} must be real, got {M.dtype}")
    return widen(M)


def _newton_schulz(M: Any, max_iter: int) -> Any:
    """Iterate X <- X (3I - X'X) / 2 from M over its Frobenius norm, which is inside the region of convergence."""
    xp = namespace(M)
    X = M if M.shape[-2] >= M.shape[-1] else swap(M)
    norm = xp.linalg.matrix_norm(X, keepdims=True)
    X = X / xp.where(norm > 0, norm, xp.ones_like(norm))
    eye = identity(X.shape[-1], X)
    if 0 in X.shape:
        return M
    error, enough = math.inf, (20 * X.shape[-1] ** 0.5 * xp.finfo(X.dtype).eps) ** 0.5
    for _ in range(max_iter):
        gram = swap(X) @ X
        X = 1.5 * X - 0.5 * (X @ gram)
        # Convergence is quadratic, so an error of sqrt(eps) before a step is one of eps after it; the derivative of the
        # iteration is one step behind.
        if error <= enough:
            return X if M.shape[-2] >= M.shape[-1] else swap(X)
        error = float(xp.max(xp.linalg.matrix_norm(detached(gram) - eye)))
    raise NotConverged(f"Newton-Schulz left X'X at distance {error:.1e} from the identity after {max_iter} steps")
