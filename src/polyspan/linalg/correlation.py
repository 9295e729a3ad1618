"""What two views of the same items share: canonical correlations, and centred kernel alignment."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ._namespace import detached, is_torch, namespace, swap, widen
from .svd import fix_signs


class CCAFit(NamedTuple):
    """Canonical directions of two views: ``(x - mean_in) @ weights_in`` goes with ``(y - mean_out) @ weights_out``.

    ``weights_in`` (d_in, k) and ``weights_out`` (d_out, k) give coordinates of unit variance (regularised variance,
    where there is a ridge), uncorrelated within a view; ``correlations`` (k,) are descending and in [0, 1].
    """

    weights_in: Any
    weights_out: Any
    correlations: Any
    mean_in: Any
    mean_out: Any


def cca(X: Any, Y: Any, k: int | None = None, *, reg: float | int = 0.0, rank: Any = None) -> CCAFit:
    r"""Find the k pairs of directions along which two views of the same items correlate most.

    With centred views and :math:`S_{xx} = X^\top X/n + \gamma_x I`, :math:`\gamma_x = \mathrm{reg}\cdot
    \operatorname{tr}(X^\top X/n)/d_x`, the SVD :math:`S_{xx}^{-1/2} S_{xy} S_{yy}^{-1/2} = U\,\mathrm{diag}(\rho)
    V^\top` gives the weights :math:`S_{xx}^{-1/2}U` and :math:`S_{yy}^{-1/2}V`. Whitening goes through the SVD of each
    view, which never squares its condition. Directions of a view below max(n, d) eps times its largest singular value
    are left out.

    Without ridge it overfits unless n is much larger than d_x + d_y (for n <= d_x every correlation is 1): use ``reg``
    (1e-3 is mild), or ``rank``, which first reduces each view to its principal components; ``rank=0.99`` is SVCCA.

    Weights are unique up to turns within equal correlations. Their torch gradients are infinite or NaN there, where a
    view has equal or vanishing singular values, and where d exceeds n - 1; those of the correlations, where two of
    them are equal.

    Parameters
    ----------
    X, Y : arrays of shape (n, d_in) and (n, d_out)
        Real and finite, row i of both is the same item; NumPy or torch.
    k : int, optional
        Pairs wanted; as many as there are by default.
    reg : float
        Ridge >= 0, as a share of each view's mean variance per feature.
    rank : int, float or pair of these, optional
        Principal components kept of each view: a number, or (a float in (0, 1]) the least number that holds this share
        of the variance. A pair is for X and for Y.

    Raises
    ------
    ValueError
        Fewer than ``k`` pairs exist, a view is constant, or shapes do not match.

    Notes
    -----
    Source: Hotelling 1936; Raghu et al. 2017 for SVCCA; catalogue entries ``plato-3d`` and ``convergent-learning``.
    """
    xp = namespace(X, Y)
    if X.ndim != 2 or Y.ndim != 2 or X.shape[0] != Y.shape[0] or 0 in (*X.shape, *Y.shape):
        raise ValueError(f"X and Y must have shapes (n, d_in) and (n, d_out), got {tuple(X.shape)}, {tuple(Y.shape)}")
    (A, narrow), (B, narrow_out) = widen(X), widen(Y)
    dtype = xp.result_type(A.dtype, B.dtype)
    A, B = xp.astype(A, dtype), xp.astype(B, dtype)
    _check_finite(X=A, Y=B)
    n, limits = X.shape[0], _ranks(rank)
    mean_in, mean_out = xp.mean(A, axis=0), xp.mean(B, axis=0)
    left, scores_in = _whitened(A - mean_in, reg, limits[0], "X")
    right, scores_out = _whitened(B - mean_out, reg, limits[1], "Y")
    fit = _pairs(left, swap(scores_in) @ scores_out / n, right, k)
    weights_in, weights_out, correlations = fit
    return CCAFit(
        narrow(weights_in), narrow_out(weights_out), narrow(correlations), narrow(mean_in), narrow_out(mean_out)
    )


def cca_from_moments(moments: Any, k: int | None = None, *, reg: float | int = 0.0, rank: Any = None) -> CCAFit:
    """Solve :func:`cca` from gathered second moments: views of any length, seen once.

    Working with squares it keeps half the digits: directions of a view whose variance is below d eps times the largest
    are left out.

    Parameters
    ----------
    moments : PairedMoments
        Anything with ``weight``, ``mean_in``, ``mean_out`` and the sums of centred products ``cov_in``, ``cross`` and
        ``cov_out``. ``moments.uncentred()`` gives directions about the origin.
    k, reg, rank
        As in :func:`cca`.

    Returns
    -------
    CCAFit
        float64 NumPy arrays.
    """
    cov_in, cross, cov_out = _sums(moments)
    if not moments.weight > 0:
        raise ValueError("moments must have seen rows, got weight 0")
    limits = _ranks(rank)
    left = _whitening(cov_in / moments.weight, reg, limits[0], "cov_in")
    right = _whitening(cov_out / moments.weight, reg, limits[1], "cov_out")
    fit = _pairs(left, left.T @ (cross / moments.weight) @ right, right, k)
    return CCAFit(*fit, np.asarray(moments.mean_in), np.asarray(moments.mean_out))


def svcca(X: Any, Y: Any, *, share: float | int = 0.99) -> Any:
    """Similarity of two representations: mean canonical correlation of their leading principal components, in [0, 1].

    Parameters
    ----------
    X, Y : arrays of shape (n, d_in) and (n, d_out)
        n must be several times the number of components kept, or everything looks alike.
    share : float
        Variance that the components of each view must hold, in (0, 1].

    Notes
    -----
    Source: Raghu et al. 2017; catalogue entry ``convergent-learning``.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    return namespace(X, Y).mean(cca(X, Y, rank=float(share)).correlations)


def pwcca(X: Any, Y: Any, *, reg: float | int = 0.0, rank: Any = None) -> Any:
    r"""Similarity of ``Y`` to ``X``: canonical correlations weighed by how much of X each direction accounts for.

    :math:`\sum_i \alpha_i\rho_i/\sum_i\alpha_i` with :math:`\alpha_i = \sum_j |\langle h_i, x_j\rangle|` over the
    features of X and its canonical variates h. In [0, 1], and not symmetric.

    Notes
    -----
    Source: Morcos et al. 2018; parameters as in :func:`cca`.
    """
    fit = cca(X, Y, reg=reg, rank=rank)
    xp = namespace(X)
    wide, narrow = widen(X)
    centred = wide - xp.mean(wide, axis=0)
    variates = centred @ xp.astype(fit.weights_in, wide.dtype)
    weights = xp.sum(xp.abs(swap(variates) @ centred), axis=1)
    return narrow(xp.sum(weights * xp.astype(fit.correlations, wide.dtype)) / xp.sum(weights))


def linear_cka(X: Any, Y: Any, *, debiased: bool = False) -> Float[Any, "..."]:
    r"""Similarity of two representations of n items that ignores rotation and scale: 1 if they agree up to these.

    With centred views, :math:`\lVert X^\top Y\rVert_F^2 / (\lVert X^\top X\rVert_F \lVert Y^\top Y\rVert_F)`, in
    [0, 1]; equal to :func:`kernel_cka` of the Gram matrices, and computed by whichever of the two forms is smaller.
    Unrelated views of many features do not score 0 but near :math:`1/\sqrt{(1+n/p)(1+n/q)}`; ``debiased`` estimates
    without this bias, in [-1, 1]. Gradients are finite wherever neither view is constant.

    Parameters
    ----------
    X, Y : arrays of shape (*b, n, p) and (*b, n, q)
        Real and finite, NumPy or torch; float16 and bfloat16 are computed in float32.
    debiased : bool
        Use the unbiased estimate of each term; n >= 4.

    Raises
    ------
    ValueError
        A view is constant, where the ratio is 0/0.

    Notes
    -----
    Source: Kornblith et al. 2019; Song et al. 2012 for the unbiased estimate; catalogue entry ``plato-3d``.
    """
    xp = namespace(X, Y)
    if X.ndim < 2 or Y.ndim < 2 or X.shape[:-1] != Y.shape[:-1] or 0 in (*X.shape[-2:], Y.shape[-1]):
        raise ValueError(f"X and Y must have shapes (*b, n, p) and (*b, n, q), got {tuple(X.shape)}, {tuple(Y.shape)}")
    (A, narrow), B = widen(X), widen(Y)[0]
    B = xp.astype(B, A.dtype)
    n, p, q = X.shape[-2], X.shape[-1], Y.shape[-1]
    _enough(n, debiased)
    _check_finite(X=A, Y=B)
    A, B = (_unit_spread(Z, name) for Z, name in ((A, "X"), (B, "Y")))
    if p * p + p * q + q * q > n * (p + q):
        return narrow(_alignment(A @ swap(A), B @ swap(B), debiased))
    squares = [xp.sum((swap(P) @ Q) ** 2, axis=(-2, -1)) for P, Q in ((A, B), (A, A), (B, B))]
    if not debiased:
        return narrow(squares[0] / xp.sqrt(squares[1] * squares[2]))
    # Of the Gram matrices without their diagonals only row sums and the diagonals are needed; rows sum to 0 with them.
    a, b = xp.sum(A**2, axis=-1), xp.sum(B**2, axis=-1)
    terms = [
        square
        - xp.sum(r * s, axis=-1)
        + xp.sum(r, axis=-1) * xp.sum(s, axis=-1) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * xp.sum(r * s, axis=-1)
        for square, (r, s) in zip(squares, ((a, b), (a, a), (b, b)), strict=True)
    ]
    return narrow(_ratio(*terms))


def linear_cka_from_moments(moments: Any) -> float:
    """Compute :func:`linear_cka`, the biased form, from gathered second moments (see :func:`cca_from_moments`)."""
    cov_in, cross, cov_out = _sums(moments)
    sizes = [float(np.linalg.norm(part)) for part in (cov_in, cov_out)]
    if 0.0 in sizes:
        raise ValueError("moments must be of two views that vary, got one that is constant")
    # Divided one by one: the squares of sums over many rows may exceed the range of a float.
    return (float(np.linalg.norm(cross)) / sizes[0]) * (float(np.linalg.norm(cross)) / sizes[1])


def kernel_cka(K: Any, L: Any, *, debiased: bool = False) -> Float[Any, "..."]:
    r"""Alignment of two kernel matrices over the same n items, centred: 1 if they agree up to scale.

    :math:`\mathrm{HSIC}(K,L)/\sqrt{\mathrm{HSIC}(K,K)\,\mathrm{HSIC}(L,L)}` with :math:`\mathrm{HSIC}(K,L) =
    \operatorname{tr}(KHLH)`, :math:`H = I - 11^\top/n`; in [0, 1] for positive semidefinite kernels. ``debiased``
    uses the unbiased estimate of HSIC, which ignores diagonals, needs n >= 4, and may be negative.

    Parameters
    ----------
    K, L : arrays of shape (*b, n, n)
        Symmetric, NumPy or torch.

    Raises
    ------
    ValueError
        A centred kernel is 0.

    Notes
    -----
    Source: Cortes et al. 2012; Song et al. 2012 for the unbiased estimate.
    """
    xp = namespace(K, L)
    if K.shape != L.shape or K.ndim < 2 or K.shape[-1] != K.shape[-2] or K.shape[-1] == 0:
        raise ValueError(f"K and L must both have shape (*b, n, n), got {tuple(K.shape)} and {tuple(L.shape)}")
    (A, narrow), B = widen(K), widen(L)[0]
    B = xp.astype(B, A.dtype)
    _enough(K.shape[-1], debiased)
    _check_finite(K=A, L=B)
    scaled = []
    for kernel, name in ((A, "K"), (B, "L")):
        centred = kernel - xp.mean(kernel, axis=-1, keepdims=True)
        centred = centred - xp.mean(centred, axis=-2, keepdims=True)
        scaled.append(centred / _nonzero(centred, kernel, name))
    return narrow(_alignment(*scaled, debiased))


def _alignment(K: Any, L: Any, debiased: bool) -> Any:
    """Align two double-centred kernels."""
    xp = namespace(K)
    if debiased:
        # Centring in the sense of U-statistics: off-diagonal rows sum to 0, the diagonal is left out.
        K, L = _u_centred(K), _u_centred(L)
    return _ratio(*(xp.sum(P * Q, axis=(-2, -1)) for P, Q in ((K, L), (K, K), (L, L))))


def _u_centred(K: Any) -> Any:
    xp = namespace(K)
    n = K.shape[-1]
    off = xp.astype(~xp.eye(n, dtype=xp.bool, **({"device": K.device} if is_torch(K) else {})), K.dtype)
    K = K * off
    rows = xp.sum(K, axis=-1, keepdims=True)
    total = xp.sum(rows, axis=-2, keepdims=True)
    return off * (K - (rows + swap(rows)) / (n - 2) + total / ((n - 1) * (n - 2)))


def _ratio(cross: Any, one: Any, two: Any) -> Any:
    xp = namespace(cross)
    if not bool(xp.all(one > 0) & xp.all(two > 0)):
        raise ValueError("the debiased estimate of a view's own spread is not positive; more items are needed")
    return cross / xp.sqrt(one * two)


def _enough(n: int, debiased: bool) -> None:
    least = 4 if debiased else 2
    if n < least:
        raise ValueError(f"{'debiased ' if debiased else ''}CKA needs at least {least} items, got {n}")


def _unit_spread(Z: Any, name: str) -> Any:
    """Centre, and scale to unit spread, so that fourth powers stay in range."""
    xp = namespace(Z)
    centred = Z - xp.mean(Z, axis=-2, keepdims=True)
    return centred / _nonzero(centred, Z, name)


def _nonzero(centred: Any, original: Any, name: str) -> Any:
    """Return the norm of what is left after centring, outside the graph: the ratio does not depend on it."""
    xp = namespace(centred)
    norm, whole = (xp.linalg.matrix_norm(detached(x), keepdims=True) for x in (centred, original))
    if not bool(xp.all(norm > 8 * float(xp.finfo(norm.dtype).eps) * whole)):
        raise ValueError(f"{name} is constant over its items: its similarity to anything is 0/0")
    return norm


def _whitened(Z: Any, reg: float, limit: int | float | None, name: str) -> tuple[Any, Any]:
    """Return W (d, r) and ZW (n, r) for centred Z, where W'(Z'Z/n + ridge)W = I."""
    xp = namespace(Z)
    _check_reg(reg)
    n, d = Z.shape
    U, s, Vh = xp.linalg.svd(Z, full_matrices=False)
    known = detached(s)
    r = _kept(known**2, max(n, d) * float(xp.finfo(s.dtype).eps), limit, name)
    U, s, Vh = U[:, :r], s[:r], Vh[:r]
    length = xp.sqrt(s**2 / n + reg * xp.sum(Z**2) / (n * d))
    return swap(Vh) / length, U * (s / length)


def _whitening(cov: np.ndarray, reg: float, limit: int | float | None, name: str) -> np.ndarray:
    """Return W (d, r) with W'(cov + ridge)W = I."""
    _check_reg(reg)
    _check_finite(**{name: cov})
    values, V = np.linalg.eigh(cov)
    values, V = np.clip(values[::-1], 0.0, None), V[:, ::-1]
    r = _kept(values, (len(cov) * float(np.finfo(np.float64).eps)) ** 0.5, limit, name)
    return V[:, :r] / np.sqrt(values[:r] + reg * np.trace(cov) / len(cov))


def _kept(variances: Any, smallest: float, limit: int | float | None, name: str) -> int:
    """Count leading components: those above rounding, and no more than ``limit`` asks for."""
    xp = namespace(variances)
    r = int(xp.sum(variances > smallest**2 * variances[0]))
    if r == 0:
        raise ValueError(f"{name} is constant over its rows: it correlates with nothing")
    if limit is None:
        return r
    if isinstance(limit, int):
        return min(r, limit)
    held = xp.cumulative_sum(variances) / xp.sum(variances)
    # Rounding must not let a share of 1 ask for one component more than there are.
    return min(r, 1 + int(xp.sum(held < limit - 4 * float(xp.finfo(held.dtype).eps))))


def _pairs(left: Any, core: Any, right: Any, k: int | None) -> tuple[Any, Any, Any]:
    """Turn whitened coordinates of both views to their singular directions."""
    xp = namespace(core)
    most = min(core.shape)
    if k is not None and not 1 <= k <= most:
        raise ValueError(f"k must be between 1 and {most}, the smaller rank of the two views, got {k}")
    U, s, Vh = xp.linalg.svd(core, full_matrices=False)
    k = most if k is None else k
    weights_in, partner = fix_signs(left @ U[:, :k], Vh[:k])
    return weights_in, right @ swap(partner), xp.clip(s[:k], 0.0, 1.0)


def _ranks(rank: Any) -> tuple:
    """Read ``rank`` as one limit a view."""
    pair = tuple(rank) if isinstance(rank, tuple | list) else (rank, rank)
    if len(pair) != 2:
        raise ValueError(f"rank must be one value or a pair, got {len(pair)} values")
    limits = []
    for one in pair:
        whole = isinstance(one, int | np.integer) and not isinstance(one, bool)
        if one is not None and not (int(one) >= 1 if whole else isinstance(one, float) and 0 < one <= 1):
            raise ValueError(f"rank must be an int >= 1 or a share in (0, 1], got {one!r}")
        limits.append(int(one) if whole else one)
    return tuple(limits)


def _check_finite(**named: Any) -> None:
    for name, x in named.items():
        xp = namespace(x)
        if not bool(xp.all(xp.isfinite(x))):
            raise ValueError(f"{name} must be finite")


def _check_reg(reg: float) -> None:
    if not (math.isfinite(reg) and reg >= 0):
        raise ValueError(f"reg must be finite and not negative, got {reg}")


def _sums(moments: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sums of centred products, after checking that both views were gathered."""
    sums = tuple(np.asarray(getattr(moments, name), np.float64) for name in ("cov_in", "cross", "cov_out"))
    cov_in, cross, cov_out = sums
    if cross.shape != (len(cov_in), len(cov_out)) or 0 in cross.shape:
        raise ValueError(
            "moments must hold cov_in, cross and cov_out of two views, "
            f"got shapes {cov_in.shape}, {cross.shape} and {cov_out.shape}"
        )
    return cov_in, cross, cov_out
