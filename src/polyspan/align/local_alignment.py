"""How well a pair of items fits among paired anchors: kernel alignment with that one pair appended."""

from typing import Any, NamedTuple

import numpy as np

from ._checks import check_squares
from .canonical_correlation import checked_rows

KERNELS = ("linear", "rbf")
MEDIAN_ROWS = 2000
BLOCK = 1024


class AnchorProducts(NamedTuple):
    """What linear local CKA needs of n centred anchors: n, the sums X'Y (p, q), X'X (p, p) and Y'Y (q, q)."""

    n: float
    cross: np.ndarray
    gram_x: np.ndarray
    gram_y: np.ndarray


def local_cka(
    X_anchor: Any, Y_anchor: Any, X: Any, Y: Any, *, kernel: str = "linear", bandwidth: Any = None
) -> np.ndarray:
    r"""Score every pair of a row of ``X`` and a row of ``Y`` by the CKA of the anchors with that pair appended.

    For the linear kernel nothing is appended. With centred anchors, :math:`C = X_A^\top Y_A`, :math:`C_x = X_A^\top
    X_A`, :math:`c = n/(n+1)`, and u, v the queries less the anchors' means, the score is exactly

    .. math:: \frac{\lVert C\rVert_F^2 + 2c\,u^\top C v + c^2 |u|^2 |v|^2}
       {\sqrt{\lVert C_x\rVert_F^2 + 2c\,u^\top C_x u + c^2|u|^4}\;\sqrt{\lVert C_y\rVert_F^2 + 2c\,v^\top C_y v +
       c^2|v|^4}},

    so it ranks by the bilinear form :math:`u^\top C v`, plus terms of length. Directions of much variance rule C: in
    raw spaces it ranks poorly, in canonical coordinates well. Scores of n anchors differ by about 1/n of themselves
    and are therefore float64 whatever comes in; their size says nothing, their order does.

    For the Gaussian kernel :math:`\exp(-d^2/(2\sigma^2))` only the last row and column change with a pair: anchors
    cost n² once, a pair costs n.

    Source: catalogue entry ``plato-3d``; the closed form and the update are ours.

    Parameters
    ----------
    X_anchor, Y_anchor : arrays of shape (n, p) and (n, q)
        Paired rows; n >= 2.
    X, Y : arrays of shape (a, p) and (b, q)
        Queries, not paired.
    kernel : {"linear", "rbf"}
    bandwidth : float or pair of float, optional
        σ of the Gaussian kernel of X and of Y. Left out, σ² is the median of the non-zero squared distances among the
        anchors, or among 2,000 of them, evenly spaced. The published code takes that median again for each appended
        pair, which changes scores slightly.

    Returns
    -------
    ndarray of shape (a, b), float64
        In [0, 1].

    Raises
    ------
    ValueError
        Shapes do not fit, a value is not finite or its square would not be, the kernel is unknown, a bandwidth is not
        positive, or a view of the anchors is constant.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be 'linear' or 'rbf', got {kernel!r}")
    X_anchor, Y_anchor = (np.asarray(A) for A in (X_anchor, Y_anchor))
    if X_anchor.ndim != 2 or Y_anchor.ndim != 2 or len(X_anchor) != len(Y_anchor) or len(X_anchor) < 2:
        raise ValueError(
            "X_anchor and Y_anchor must be 2-d with one row an anchor, at least 2, got shapes "
            f"{X_anchor.shape} and {Y_anchor.shape}"
        )
    X_anchor, Y_anchor, X, Y = (
        checked_rows(rows, name, width).astype(np.float64)
        for rows, name, width in (
            (X_anchor, "X_anchor", X_anchor.shape[1]),
            (Y_anchor, "Y_anchor", Y_anchor.shape[1]),
            (X, "X", X_anchor.shape[1]),
            (Y, "Y", Y_anchor.shape[1]),
        )
    )
    for name, rows in (("X_anchor", X_anchor), ("Y_anchor", Y_anchor), ("X", X), ("Y", Y)):
        check_squares(rows, name)
    for name, rows in (("X_anchor", X_anchor), ("Y_anchor", Y_anchor)):
        if not np.ptp(rows, axis=0).any():
            raise ValueError(f"{name} must vary, got rows that are all equal")
    if kernel == "linear" and bandwidth is not None:
        raise ValueError(f"bandwidth is for kernel='rbf', got {bandwidth!r}")
    # About the anchors' mean, so that data far from the origin lose no digits.
    X, Y = X - X_anchor.mean(axis=0), Y - Y_anchor.mean(axis=0)
    A, B = (rows - rows.mean(axis=0) for rows in (X_anchor, Y_anchor))
    if kernel == "linear":
        if len(A) < A.shape[1] + B.shape[1]:
            return _linear_by_rows(A, B, X, Y)
        return linear_local_cka(AnchorProducts(float(len(A)), A.T @ B, A.T @ A, B.T @ B), X, Y)
    return _rbf_local_cka(A, B, X, Y, _bandwidths(bandwidth, A, B))


def linear_local_cka(anchors: AnchorProducts, U: np.ndarray, V: np.ndarray) -> np.ndarray:
    """Score queries that are centred by the anchors' means, ``U`` (a, p) and ``V`` (b, q), in float64: (a, b)."""
    own = [np.linalg.norm(gram) for gram in (anchors.gram_x, anchors.gram_y)]
    if not min(own) > 0:
        raise ValueError("anchors must vary in both views, got a view that is constant")
    # Views scaled to unit norm of their grams: fourth powers stay in range.
    U, V = (Z.astype(np.float64) / np.sqrt(size) for Z, size in zip((U, V), own, strict=True))
    C = anchors.cross / np.sqrt(own[0] * own[1])
    grams = anchors.gram_x / own[0], anchors.gram_y / own[1]
    inner = [np.einsum("ij,ij->i", Z @ gram, Z) for Z, gram in zip((U, V), grams, strict=True)]
    return _put_together(anchors.n, float(np.vdot(C, C)), (U @ C) @ V.T, (U, V), inner)


def _linear_by_rows(A: np.ndarray, B: np.ndarray, U: np.ndarray, V: np.ndarray) -> np.ndarray:
    """Score the same from products of rows, which are the smaller ones where anchors are fewer than features."""
    K, L = A @ A.T, B @ B.T
    own = np.linalg.norm(K), np.linalg.norm(L)
    P, R = U @ (A.T / own[0]), V @ (B.T / own[1])
    inner = [np.einsum("ij,ij->i", Z, Z) for Z in (P, R)]
    return _put_together(
        float(len(A)), float(np.vdot(K / own[0], L / own[1])), P @ R.T, (U / own[0] ** 0.5, V / own[1] ** 0.5), inner
    )


def _put_together(n: float, shared: float, scores: np.ndarray, sides: Any, inner: Any) -> np.ndarray:
    r"""Return the scores, in the place of :math:`u^\top C v`; all in units in which both grams have norm 1.

    ``shared`` is the square norm of C, ``sides`` are u and v, and ``inner`` their products with the own grams.
    """
    c = n / (n + 1.0)
    squares = [np.einsum("ij,ij->i", Z, Z) for Z in sides]
    scores *= 2 * c
    scores += shared + np.multiply.outer(c * squares[0], c * squares[1])
    for quadratic, square, axis in zip(inner, squares, (1, 0), strict=True):
        scores /= np.expand_dims(np.sqrt(1.0 + 2 * c * quadratic + (c * square) ** 2), axis)
    return scores


def _bandwidths(bandwidth: Any, X: np.ndarray, Y: np.ndarray) -> list[float]:
    if bandwidth is None:
        return [median_bandwidth(A, name) for A, name in ((X, "X_anchor"), (Y, "Y_anchor"))]
    pair = np.asarray(bandwidth, dtype=np.float64)
    if pair.shape not in ((), (1,), (2,)):
        raise ValueError(f"bandwidth must be one number or two, one a view, got shape {pair.shape}")
    if not (np.isfinite(pair).all() and (pair > 0).all()):
        raise ValueError(f"bandwidth must be positive and finite, got {bandwidth!r}")
    return [float(sigma) for sigma in np.broadcast_to(pair, (2,))]


def median_bandwidth(A: np.ndarray, name: str) -> float:
    rows = A[np.unique(np.linspace(0, len(A) - 1, min(len(A), MEDIAN_ROWS)).astype(int))]
    squared = squared_distances(rows, rows)[np.triu_indices(len(rows), 1)]
    squared = squared[squared > 0]
    if not len(squared):
        raise ValueError(f"{name} must vary, got rows that are all equal")
    return float(np.sqrt(np.median(squared)))


def squared_distances(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Return squared distances (a, b); what is below the rounding of the expanded square is 0."""
    squares = np.einsum("ij,ij->i", A, A)[:, None] + np.einsum("ij,ij->i", B, B)
    found = squares - 2 * (A @ B.T)
    found[found < 64 * np.finfo(np.float64).eps * squares] = 0.0
    return found


def _rbf_local_cka(X_anchor, Y_anchor, X, Y, bandwidths) -> np.ndarray:
    def kernel(A, B, sigma):
        return np.exp(squared_distances(A, B) / (-2 * sigma**2))

    n = len(X_anchor)
    rows = np.zeros((2, n))
    inner = np.zeros(3)  # <K, L>, <K, K>, <L, L>
    for start in range(0, n, BLOCK):
        part = slice(start, start + BLOCK)
        K, L = (kernel(A[part], A, sigma) for A, sigma in zip((X_anchor, Y_anchor), bandwidths, strict=True))
        rows[0, part], rows[1, part] = K.sum(axis=1), L.sum(axis=1)
        inner += [np.vdot(K, L), np.vdot(K, K), np.vdot(L, L)]
    a, b = kernel(X, X_anchor, bandwidths[0]), kernel(Y, Y_anchor, bandwidths[1])
    N = n + 1.0

    def hsic(own, products, first, second, r, s):
        """Centred inner product of two kernels with a row and column appended, from sums alone.

        ``products`` are a'b of the new columns, ``first`` and ``second`` the columns, ``r`` and ``s`` the row sums.
        """
        A, B = first.sum(axis=1), second.sum(axis=1)
        left, right = first @ s, second @ r
        if products.ndim == 2:
            A, left = A[:, None], left[:, None]
        shared = r @ s + left + right + products + (A + 1) * (B + 1)
        return own + 2 * products + 1 - 2 / N * shared + (r.sum() + 2 * A + 1) * (s.sum() + 2 * B + 1) / N**2

    scores = hsic(inner[0], a @ b.T, a, b, rows[0], rows[1])
    own_x = hsic(inner[1], np.einsum("ij,ij->i", a, a), a, a, rows[0], rows[0])
    own_y = hsic(inner[2], np.einsum("ij,ij->i", b, b), b, b, rows[1], rows[1])
    return scores / np.sqrt(np.outer(own_x, own_y))
