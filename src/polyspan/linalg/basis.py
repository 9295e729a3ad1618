"""Orthonormal bases: made from spanning vectors, completed, projected on, and drawn at random."""

from typing import Any

import numpy as np
from jaxtyping import Float, Num

from ._namespace import namespace, swap, widen
from .householder import householder_product, householder_vectors


def orthonormal_basis(X: Num[Any, "*b d k"]) -> Float[Any, "*b d k"]:
    r"""Orthonormalise the columns of each matrix in order: column j of the result lies in the span of the first j.

    The factor Q of :math:`X = QR` with the diagonal of R made positive, which makes it unique and continuous. Breaks
    where the columns are linearly dependent: Q is then still orthonormal but spans more than X, and the torch
    derivative is infinite or NaN. At an orthonormal X it is finite.

    Parameters
    ----------
    X : array of shape (*b, d, k)
        Real, k <= d, NumPy or torch; float16 and bfloat16 are computed in float32.

    Notes
    -----
    Source: Golub and Van Loan, *Matrix Computations*, section 5.2.
    """
    xp = namespace(X)
    if X.ndim < 2 or X.shape[-1] > X.shape[-2]:
        raise ValueError(f"X must hold matrices (*b, d, k) with k <= d, got shape {tuple(X.shape)}")
    wide, narrow = widen(X)
    Q, R = xp.linalg.qr(wide)
    diagonal = xp.linalg.diagonal(R)
    sign = xp.where(diagonal < 0, -xp.ones_like(diagonal), xp.ones_like(diagonal))
    return narrow(Q * sign[..., None, :])


def complete_basis(Q: Num[Any, "*b d k"]) -> Float[Any, "*b d d"]:
    r"""Extend k orthonormal columns to a basis of the whole space; the first k columns are those of ``Q``, unchanged.

    The others, ``[..., k:]``, are the trailing columns of the product of the reflections that make up ``Q``: any
    rotation of them would do as well. In torch they are differentiable except where a reflection degenerates, which is
    where the first j columns of ``Q`` contain column j of the identity.

    Parameters
    ----------
    Q : array of shape (*b, d, k)
        Orthonormal columns, k <= d.
    """
    wide, narrow = widen(Q)
    rest = householder_product(householder_vectors(wide))[..., Q.shape[-1] :]
    return namespace(Q).concat([Q, narrow(rest)], axis=-1)


def projector(Q: Num[Any, "*b d k"]) -> Num[Any, "*b d d"]:
    r"""Orthogonal projector :math:`QQ^\top` on the span of orthonormal columns ``Q`` (*b, d, k)."""
    return Q @ swap(Q)


def project(x: Any, Q: Any) -> Any:
    r"""Part of each row of ``x`` inside the span of ``Q``: :math:`xQQ^\top`, without forming the projector.

    Parameters
    ----------
    x : array of shape (d,) or (*b, n, d)
    Q : array of shape (*b, d, k)
        Orthonormal columns. Leading dimensions broadcast: n rows (n, d) on C subspaces (C, d, k) give (C, n, d).
    """
    namespace(x, Q)
    if Q.ndim < 2 or x.shape[-1] != Q.shape[-2]:
        raise ValueError(f"rows of x must have the d of Q (*b, d, k), got {tuple(x.shape)} and {tuple(Q.shape)}")
    return (x @ Q) @ swap(Q)


def project_out(x: Any, Q: Any) -> Any:
    r"""Part of each row of ``x`` orthogonal to the span of ``Q``: :math:`x - xQQ^\top`; see :func:`project`."""
    return x - project(x, Q)


def random_stiefel(
    d: int, k: int, *, rng: Any, batch: tuple[int, ...] = (), dtype: Any = None, device: Any = None
) -> Any:
    """Draw matrices (*batch, d, k) with orthonormal columns, uniformly: Haar measure on the Stiefel manifold.

    The QR factor, with positive diagonal, of a Gaussian matrix.

    Parameters
    ----------
    d, k : int
        1 <= k <= d.
    rng : numpy.random.Generator or torch.Generator
        Its kind decides the kind of the result.
    dtype : optional
        A real floating dtype of that kind; float64 for NumPy, torch's default dtype for torch.
    device : optional
        torch only; the device of ``rng`` unless given.

    Notes
    -----
    Source: Mezzadri 2007.
    """
    if not 1 <= k <= d:
        raise ValueError(f"k must be between 1 and d={d}, got {k}")
    if isinstance(rng, np.random.Generator):
        dtype = np.dtype(np.float64 if dtype is None else dtype)
        drawn = rng.standard_normal((*batch, d, k)).astype(np.promote_types(dtype, np.float32))
        return orthonormal_basis(drawn).astype(dtype)
    if not type(rng).__module__.startswith("torch"):
        raise TypeError(f"rng must be a numpy.random.Generator or a torch.Generator, got {type(rng).__name__}")
    import torch

    dtype = torch.get_default_dtype() if dtype is None else dtype
    wide = torch.promote_types(dtype, torch.float32)
    drawn = torch.randn((*batch, d, k), generator=rng, device=rng.device, dtype=wide)
    return orthonormal_basis(drawn).to(rng.device if device is None else device, dtype)


def random_orthogonal(
    n: int,
    *,
    rng: Any,
    batch: tuple[int, ...] = (),
    special: bool = False,
    dtype: Any = None,
    device: Any = None,
) -> Any:
    """Draw orthogonal matrices (*batch, n, n), uniformly; with ``special`` only rotations, determinant +1.

    Parameters and errors as in :func:`random_stiefel`.
    """
    Q = random_stiefel(n, n, rng=rng, batch=batch, dtype=dtype, device=device)
    if special:
        xp = namespace(Q)
        wide, narrow = widen(Q)
        sign = narrow(xp.sign(xp.linalg.det(wide)))
        Q[..., 0] *= sign[..., None]
    return Q
