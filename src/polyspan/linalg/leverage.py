"""Leverage scores: how much each row of a matrix is needed to span its columns."""

from typing import Any

from jaxtyping import Float, Num

from ._namespace import detached, identity, namespace, swap, widen


def leverage_scores(A: Num[Any, "*b n d"], *, method: str = "qr") -> Float[Any, "*b n"]:
    r"""Leverage of each row, :math:`\ell_i = a_i^\top (A^\top A)^{+} a_i`, in [0, 1] with sum rank(A).

    It is the diagonal of the projector on the column space, and the largest share that row i can have in the length of
    Ax: the maximum over x of :math:`\langle a_i,x\rangle^2/\lVert Ax\rVert^2`.

    - ``"qr"``: 2 n d^2 operations, machine precision; needs independent columns (rows, where n < d).
    - ``"svd"``: about 6 n d^2 operations, machine precision; needs nothing. Singular values below max(n, d) eps times
      the largest count as 0.
    - ``"gram"``: n d^2 operations, mostly one product; the error is cond(A)^2 times machine precision, with A's columns
      brought to unit length. Needs independent columns, and cond(A) below eps^(-1/2).

    The torch gradient is finite where ``"qr"`` and ``"gram"`` are defined; that of ``"svd"`` is NaN at repeated
    singular values, as at orthonormal columns.

    Parameters
    ----------
    A : array of shape (*b, n, d)
        Real, NumPy or torch; float16 and bfloat16 are computed in float32.

    Raises
    ------
    ValueError
        ``"qr"`` or ``"gram"`` meets dependent columns.

    Notes
    -----
    Source: Drineas et al. 2012; catalogue entry ``lp-sensitivity``.
    """
    wide, narrow = _rows(A)
    xp = namespace(wide)
    *_, n, d = wide.shape
    tolerance = max(n, d) * float(xp.finfo(wide.dtype).eps)
    if method == "svd":
        U, s, _ = xp.linalg.svd(wide, full_matrices=False)
        kept = xp.astype(s > tolerance * s[..., :1], wide.dtype)
        return narrow(xp.sum(U**2 * kept[..., None, :], axis=-1))
    if method == "qr":
        Q, R = xp.linalg.qr(wide)
        _independent(
            xp.abs(xp.linalg.diagonal(R)), xp.linalg.vector_norm(R[..., : min(n, d)], axis=-2), tolerance, method
        )
        return narrow(xp.sum(Q**2, axis=-1))
    if method != "gram":
        raise ValueError(f"method must be 'qr', 'svd' or 'gram', got {method!r}")
    if n < d:
        raise ValueError(f"method='gram' needs at least as many rows as columns, got shape {tuple(A.shape)}; use 'svd'")
    # Unit columns leave the scores as they are, and spare the Gram matrix the spread of the columns' lengths.
    length = xp.linalg.vector_norm(wide, axis=-2, keepdims=True)
    wide = wide / xp.where(length > 0, length, xp.ones_like(length))
    gram = swap(wide) @ wide
    # The smallest eigenvalue is known to eps times the largest only: without it there is nothing left to invert.
    low = xp.linalg.eigvalsh(detached(gram))
    _independent(low[..., :1], low[..., -1:], tolerance, method)
    return narrow(xp.sum((wide @ swap(xp.linalg.inv(xp.linalg.cholesky(gram)))) ** 2, axis=-1))


def ridge_leverage_scores(A: Num[Any, "*b n d"], lam: float | int) -> Float[Any, "*b n"]:
    r"""Leverage under a ridge, :math:`a_i^\top (A^\top A + \lambda I)^{-1} a_i`, in [0, 1).

    Its sum is the effective dimension.

    Rows of a QR of A stacked on :math:`\sqrt\lambda I`: the Gram matrix, and
    with it half the digits, is avoided. With fewer rows than columns the n x n side is solved instead. Gradients are
    finite for every A.

    Parameters
    ----------
    A : array of shape (*b, n, d)
    lam : float
        Ridge, > 0, in units of A squared.

    Notes
    -----
    Source: Alaoui and Mahoney 2015.
    """
    if not lam > 0:
        raise ValueError(f"lam must be positive, got {lam}; leverage_scores has no ridge")
    wide, narrow = _rows(A)
    xp = namespace(wide)
    *_, n, d = wide.shape
    if n < d:
        gram = wide @ swap(wide)
        return narrow(xp.linalg.diagonal(xp.linalg.solve(gram + lam * identity(n, wide), gram)))
    ridge = xp.broadcast_to(lam**0.5 * identity(d, wide), (*wide.shape[:-2], d, d))
    Q, _ = xp.linalg.qr(xp.concat([wide, ridge], axis=-2))
    return narrow(xp.sum(Q[..., :n, :] ** 2, axis=-1))


def _rows(A: Any) -> tuple[Any, Any]:
    """Widen ``A`` after checking that it holds rows."""
    namespace(A)
    if A.ndim < 2 or 0 in A.shape[-2:]:
        raise ValueError(f"A must hold non-empty matrices (*b, n, d), got shape {tuple(A.shape)}")
    return widen(A)


def _independent(small: Any, large: Any, tolerance: float, method: str) -> None:
    """Refuse dependent columns, whose scores would be those of an arbitrary larger space."""
    xp = namespace(small)
    if not bool(xp.all(small > tolerance * large)):
        raise ValueError(f"A has linearly dependent columns, which method={method!r} cannot weigh; use method='svd'")
