"""Orthogonal Procrustes: the isometry that carries one set of rows nearest to another."""

from typing import Any, NamedTuple

import numpy as np

from ._namespace import is_torch
from .moments import PairedMoments
from .polar import nearest_isometry


class ProcrustesFit(NamedTuple):
    """The map ``(x - mean_in) @ rotation * scale + mean_out`` and what its fit was like.

    ``rotation`` (d_in, d_out) has orthonormal columns where d_in >= d_out and orthonormal rows where d_in <= d_out
    (of rank ``rank`` only, where a truncation was asked for); ``singular_values`` are those of the cross-covariance,
    descending; ``rank`` is how many of them the rotation rests on.
    """

    rotation: Any
    scale: float
    mean_in: Any
    mean_out: Any
    singular_values: Any
    rank: int


def procrustes(
    X: Any,
    Y: Any,
    *,
    shift: bool = False,
    scale: bool = False,
    weights: Any = None,
    rank: int | None = None,
    tie_break: str | None = None,
) -> ProcrustesFit:
    r"""Solve :math:`\min_{Q} \sum_i w_i \lVert s (x_i-\mu) Q - (y_i-\nu) \rVert^2` over isometries Q.

    Q is the polar factor of the cross-covariance :math:`M = \sum_i w_i (x_i-\mu)(y_i-\nu)^\top`. Equal widths give the
    minimiser. Otherwise the map maximises the inner product :math:`\operatorname{tr} Q^\top M`; into a wider space that
    is the minimiser too, into a narrower one no closed form of the minimiser exists.

    Not unique where M has rank below min(d_in, d_out), as with fewer pairs than widths: see ``tie_break``.

    Parameters
    ----------
    X, Y : arrays of shape (n, d_in) and (n, d_out)
        Paired rows, NumPy or torch; the result is of X's kind, in X's float width, computed in float64.
    shift : bool
        Fit both means; otherwise both are zero.
    scale : bool
        Fit one factor ``s = sum(singular values) / sum of squares of X``; otherwise 1.
    weights : array of shape (n,), optional
        Non-negative.
    rank : int, optional
        Keep only that many leading pairs of directions; the rest of space A is dropped. The result is then no isometry.
    tie_break : {"identity"}, optional
        Where M leaves directions open (rank below both widths), turn the open part as little as can be: nearest to the
        identity. Without it the open part is whatever the SVD returns, which differs between machines.

    Raises
    ------
    ValueError
        Shapes, weights or rank are not as said; no rows.

    Notes
    -----
    Source: Schoenemann 1966; catalogue entry ``canonicalize``.
    """
    if np.ndim(X) != 2 or np.ndim(Y) != 2 or X.shape[0] != Y.shape[0] or X.shape[0] == 0:
        raise ValueError(
            f"X and Y must be 2-d with equal, positive row counts, got {tuple(X.shape)} and {tuple(Y.shape)}"
        )
    moments = PairedMoments(X.shape[1], Y.shape[1], keep_cov_in=False, keep_cov_out=False).update(X, Y, weights)
    fit = procrustes_from_moments(moments, shift=shift, scale=scale, rank=rank, tie_break=tie_break)
    if is_torch(X):
        return fit._replace(**{name: X.new_tensor(getattr(fit, name)) for name in _ARRAYS})
    dtype = X.dtype if X.dtype in (np.float32, np.float64) else np.float64
    return fit._replace(**{name: getattr(fit, name).astype(dtype) for name in _ARRAYS})


_ARRAYS = ("rotation", "mean_in", "mean_out", "singular_values")


def procrustes_from_moments(
    moments: PairedMoments,
    *,
    shift: bool = False,
    scale: bool = False,
    rank: int | None = None,
    tie_break: str | None = None,
) -> ProcrustesFit:
    """Fit as :func:`procrustes` from streamed moments; float64 NumPy arrays come out.

    Raises
    ------
    ValueError
        Nothing was gathered, or ``rank`` is not between 1 and min(d_in, d_out).
    """
    if moments.weight == 0.0:
        raise ValueError("moments must have gathered at least one row of positive weight, got none")
    used = moments if shift else moments.uncentred()
    M = used.cross
    least = min(M.shape)
    if rank is not None and not 1 <= rank <= least:
        raise ValueError(f"rank must be between 1 and min(d_in, d_out)={least}, got {rank}")
    if tie_break not in (None, "identity"):
        raise ValueError(f"tie_break must be 'identity' or None, got {tie_break!r}")
    U, s, Vt = np.linalg.svd(M, full_matrices=False)
    found = int(np.sum(s > (s[0] if s[0] > 0 else 1.0) * max(M.shape) * np.finfo(float).eps))
    if rank is not None:
        rotation = U[:, :rank] @ Vt[:rank]
        found = min(found, rank)
    elif found < least and tie_break == "identity":
        rotation = _complete_near_identity(U[:, :found], Vt[:found].T)
    else:
        rotation = U @ Vt
    spread = used.spread_in
    factor = float(s[:rank].sum() / spread) if scale and spread > 0 else 1.0
    return ProcrustesFit(rotation, factor, used.mean_in, used.mean_out, s, found)


def _complete_near_identity(U: np.ndarray, V: np.ndarray) -> np.ndarray:
    """Extend the partial isometry U Vᵀ to a full one, whose open part is nearest to the rectangular identity."""
    d_in, d_out = len(U), len(V)
    open_in, open_out = _complement(U), _complement(V)
    return U @ V.T + open_in @ nearest_isometry(open_in.T @ np.eye(d_in, d_out) @ open_out) @ open_out.T


def _complement(Q: np.ndarray) -> np.ndarray:
    return np.linalg.qr(Q, mode="complete")[0][:, Q.shape[1] :] if Q.shape[1] else np.eye(Q.shape[0])
