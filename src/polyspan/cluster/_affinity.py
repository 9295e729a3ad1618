r"""Affinities of self-expression, and the clusters that they show; nothing of n by n is made unless it is given.

Points are rows X (n, d); row i of the coefficients C expresses point i by the others, :math:`C_{ii} = 0`.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator
from scipy.spatial import cKDTree

from polyspan.linalg import discretize_embedding, fix_signs, normalized_adjacency, truncated_eigh

BLOCK_BYTES = 2**25
EIGEN_TOL = 1e-6
DENSE_SIDE = 500
ONCE_FLOAT32 = 1e-6
TREE_SIDE = 8
ROUNDINGS = ("kmeans", "snem", "cluster_qr")


class Block(NamedTuple):
    """Coefficients of some points in triplets, how many rounds they took at most, and how many points had no end."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    rounds: int
    unfinished: int = 0


class Copies(NamedTuple):
    """Rows of one direction: ``kept`` (m,) are the first of each, row i is about factor[i] times row kept[group[i]]."""

    kept: np.ndarray
    group: np.ndarray
    factor: np.ndarray


def check_numbers(X: Any) -> None:
    """Refuse points in time and spans of it, which would become numbers without a word."""
    kind = getattr(X, "dtype", None)
    if isinstance(kind, np.dtype) and kind.kind in "mM":
        raise ValueError(f"X must hold numbers, got {kind}")


def find_copies(rows: np.ndarray) -> Copies:
    """Find rows that are one another up to sign, length and rounding; of no use is one as the other's only link.

    Rounding is a distance of unit rows of the root of the machine epsilon, 3e-4 in float32: nearer ones have a cosine
    of exactly 1. In float64, where that is 1e-8, it is 1e-6, so much as rows may differ that once were float32. Each
    copy is as near to the first of its kind. No distances of all pairs are taken.
    """
    n = len(rows)
    lead = np.where(rows[np.arange(n), (rows != 0).argmax(axis=1)] < 0, -1, 1).astype(rows.dtype)
    turned = np.ascontiguousarray(rows * lead[:, None] + 0)  # + 0 takes the sign off zeros
    seen: dict[bytes, int] = {}
    first = np.array([seen.setdefault(row.tobytes(), i) for i, row in enumerate(turned)])
    other = np.flatnonzero(first == np.arange(n))
    nearest = np.arange(n)
    nearest[other] = other[_firsts_within_rounding(rows[other])]
    first = nearest[first]
    kept = np.flatnonzero(first == np.arange(n))
    squares = np.square(rows[first]).sum(axis=1)
    factor = np.where(squares > 0, (rows * rows[first]).sum(axis=1) / np.where(squares > 0, squares, 1), 1)
    return Copies(kept, np.searchsorted(kept, first), factor.astype(rows.dtype))


def _firsts_within_rounding(rows: np.ndarray) -> np.ndarray:
    """Return, for each row, the first row whose line it shares within rounding, by a tree of a few coordinates.

    Sizes of coordinates along orthonormal directions are never further apart than two rows are, with either sign.
    """
    n, d = rows.shape
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    directions = rows / np.where(lengths > 0, lengths, 1)
    reach = max(float(np.finfo(rows.dtype).eps) ** 0.5, ONCE_FLOAT32)
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(d, min(d, TREE_SIDE))))[0].astype(rows.dtype)
    places = np.abs(directions @ axes).astype(np.float64)
    tree = cKDTree(places)
    around = 1.01 * reach  # products are rounded, too
    beside = np.asarray(tree.query(places, k=[2], distance_upper_bound=around)[0])[:, 0]
    first = np.arange(n)
    for i in np.flatnonzero(np.isfinite(beside)):
        if first[i] != i:
            continue
        near = np.array(tree.query_ball_point(places[i], around))
        near = near[(near > i) & (first[near] == near)]
        side = np.sign(directions[near] @ directions[i])
        apart = np.linalg.norm(side[:, None] * directions[near] - directions[i], axis=1)
        first[near[apart <= reach]] = i
    return first


def spread_copies(C: sp.csr_array, copies: Copies) -> sp.csr_array:
    """Return coefficients (n, n) from those of the kept rows (m, m): a copy is expressed by what its first row is."""
    n = len(copies.group)
    C = C[copies.group]
    C.data = C.data * np.repeat(copies.factor, np.diff(C.indptr))
    return sp.csr_array((C.data, copies.kept[C.indices], C.indptr), shape=(n, n))


def block_spans(n: int, row_bytes: int) -> list[tuple[int, int]]:
    """Cut n points into blocks whose working memory, ``row_bytes`` a point, stays within 32 MiB."""
    step = max(1, min(n, BLOCK_BYTES // max(row_bytes, 1)))
    return [(start, min(start + step, n)) for start in range(0, n, step)]


def assemble(blocks: list[Block], n: int, dtype: Any) -> sp.csr_array:
    """Put blocks together as CSR of shape (n, n)."""
    rows, columns, values = (np.concatenate([getattr(b, name) for b in blocks]) for name in Block._fields[:3])
    made = sp.csr_array((values.astype(dtype), (rows, columns)), shape=(n, n))
    made.eliminate_zeros()
    return made


def pursue(X: np.ndarray, span: tuple[int, int], *, n_nonzero: int, tol: float) -> Block:
    """Express points ``span`` by at most ``n_nonzero`` others each, chosen greedily (orthogonal matching pursuit).

    A point is finished once its residual is at most ``tol`` of its length, or no other point is correlated with it.
    Unlike :func:`polyspan.linalg.orthogonal_matching_pursuit` it never holds the Gram matrix of the atoms, which are
    the points: the chosen ones are orthogonalised as they come (twice, against rounding), and a step is one product of
    the block's residuals with all points.
    """
    start, stop = span
    points = X[start:stop]
    b, d = points.shape
    most = min(n_nonzero, d, len(X) - 1)
    rest, own = points.copy(), np.arange(start, stop)
    size = np.linalg.norm(points, axis=1)
    chosen = np.full((b, most), -1)
    Q, R = np.zeros((b, most, d), X.dtype), np.zeros((b, most, most), X.dtype)
    target = np.zeros((b, most), X.dtype)
    at, count = np.arange(b), np.zeros(b, np.intp)
    eps = np.finfo(X.dtype).eps * 10
    longest = np.linalg.norm(X, axis=1).max()
    for step in range(most):
        at = at[np.linalg.norm(rest[at], axis=1) > max(tol, eps) * size[at]]
        if not len(at):
            break
        fit = np.abs(rest[at] @ X.T)
        fit[np.arange(len(at)), own[at]] = -1
        if step:
            np.put_along_axis(fit, chosen[at, :step], -1, axis=1)
        best = fit.argmax(axis=1)
        useful = fit[np.arange(len(at)), best] > eps * size[at] * longest
        at, best = at[useful], best[useful]
        q, weights = X[best].copy(), np.zeros((len(at), step), X.dtype)
        before = np.linalg.norm(q, axis=1)
        for _ in range(2):
            part = np.einsum("bsd,bd->bs", Q[at, :step], q)
            q -= np.einsum("bsd,bs->bd", Q[at, :step], part)
            weights += part
        length = np.linalg.norm(q, axis=1)
        new = length > np.sqrt(np.finfo(X.dtype).eps) * before
        at, best, q, length, weights = at[new], best[new], q[new], length[new], weights[new]
        q /= length[:, None]
        chosen[at, step], Q[at, step] = best, q
        R[at, :step, step], R[at, step, step] = weights, length
        shadow = np.einsum("bd,bd->b", rest[at], q)
        target[at, step] = shadow
        rest[at] -= shadow[:, None] * q
        count[at] = step + 1
    triples = [(np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0, X.dtype))]
    for number in np.unique(count[count > 0]):
        which = np.flatnonzero(count == number)
        solved = np.linalg.solve(R[which, :number, :number], target[which, :number, None])[..., 0]
        triples.append((np.repeat(own[which], number), chosen[which, :number].ravel(), solved.ravel()))
    rows, columns, values = (np.concatenate(part) for part in zip(*triples, strict=True))
    return Block(rows, columns, values, int(count.max(initial=0)))


def threshold(X: np.ndarray, span: tuple[int, int], *, n_neighbors: int) -> Block:
    r"""Link unit rows ``span`` to ``n_neighbors`` others of largest :math:`|\cos|`, by :math:`e^{-2\arccos|\cos|}`."""
    start, stop = span
    own = np.arange(start, stop)
    cosine = np.abs(X[start:stop] @ X.T)
    cosine[np.arange(len(own)), own] = -1
    q = min(n_neighbors, len(X) - 1)
    columns = np.argpartition(-cosine, q - 1, axis=1)[:, :q]
    near = np.minimum(np.take_along_axis(cosine, columns, axis=1), 1)
    values = np.where(near > 0, np.exp(-2 * np.arccos(near)), 0)
    return Block(np.repeat(own, q), columns.ravel(), values.ravel(), 1)


class RidgeExpression(LinearOperator):
    r"""Ridge regression of every row on the others, as factors: :math:`C = \mathrm{diag}(w)(YY^\top-\mathrm{diag}(h))`.

    With :math:`X = U\Sigma V^\top` and :math:`Y = U\Sigma(\Sigma^2+\alpha)^{-1/2}` (n, r), :math:`X(X^\top X +
    \alpha I)^{-1}X^\top = YY^\top`, which is LSR2: w = 1, h = 0. With zero diagonal (LSR1) :math:`h_i = \lVert
    y_i\rVert^2` and :math:`w_i = 1/(1-h_i)`. r <= min(n, d), so that products with C, and with its squares
    :math:`C\circ C`, cost n r² at most and no n x n matrix.
    """

    def __init__(self, X: np.ndarray, alpha: float, *, zero_diagonal: bool):
        wide = X.astype(np.float64)
        n, d = wide.shape
        if d <= n:
            squares, V = np.linalg.eigh(wide.T @ wide)
            Y = wide @ (V / np.sqrt(np.maximum(squares, 0) + alpha))
        else:
            squares, U = np.linalg.eigh(wide @ wide.T)
            squares = np.maximum(squares, 0)
            Y = U * np.sqrt(squares / (squares + alpha))
        leverage = np.square(Y).sum(axis=1)
        self.Y, self.width = Y, X.dtype
        self.h = leverage if zero_diagonal else np.zeros(n)
        self.w = 1 / np.maximum(1 - leverage, np.finfo(np.float64).eps) if zero_diagonal else np.ones(n)
        super().__init__(np.float64, (n, n))  # ty: ignore[too-many-positional-arguments]

    @classmethod
    def of_factors(cls, Y: np.ndarray, h: np.ndarray, w: np.ndarray, width: Any) -> "RidgeExpression":
        """Return the expression that has these factors: (n, r), (n,), (n,), and gives rows in the width ``width``."""
        if Y.ndim != 2 or h.shape != (len(Y),) or w.shape != (len(Y),):
            raise ValueError(f"factors must have n rows each, got shapes {Y.shape}, {h.shape} and {w.shape}")
        made = cls.__new__(cls)  # ty: ignore[no-matching-overload]
        made.Y, made.h, made.w, made.width = Y, h, w, np.dtype(width)
        LinearOperator.__init__(made, np.float64, (len(Y), len(Y)))  # ty: ignore[too-many-positional-arguments]
        return made

    def _matmat(self, X):
        return self.w[:, None] * (self.Y @ (self.Y.T @ X) - self.h[:, None] * X)

    def _rmatmat(self, X):
        X = self.w[:, None] * X
        return self.Y @ (self.Y.T @ X) - self.h[:, None] * X

    def rows(self, span: Any) -> np.ndarray:
        """Return rows of C: (b, n) for a slice or indices of b points."""
        at = np.arange(len(self.h))[span]
        C = self.Y[at] @ self.Y.T
        C[np.arange(len(at)), at] -= self.h[at]
        return C * self.w[at, None]

    def dense(self) -> np.ndarray:
        """Return C (n, n) in the float width of X."""
        Y = self.Y.astype(self.width)
        C = Y @ Y.T
        if self.h.any():
            np.fill_diagonal(C, 0)
        C *= self.w.astype(self.width)[:, None]
        return C

    def kept(self, span: tuple[int, int], *, n_kept: int, power: int) -> tuple[Block, np.ndarray]:
        """Keep the ``n_kept`` largest of each row of the symmetric affinity: coefficients there, and affinities."""
        own = np.arange(*span)
        C, w = self.rows(slice(*span)), self.w**power
        size = np.abs(C / self.w[own, None]) ** power * ((w[own, None] + w) / 2)
        q = min(n_kept, size.shape[1])
        columns = np.argpartition(-size, q - 1, axis=1)[:, :q]
        values = np.take_along_axis(C, columns, axis=1).ravel()
        return Block(np.repeat(own, q), columns.ravel(), values, 1), np.take_along_axis(size, columns, axis=1).ravel()


class SquaredAffinity(LinearOperator):
    r"""The affinity :math:`(C\circ C + (C\circ C)^\top)/2` of a ridge expression, applied without being formed.

    :math:`((YY^\top)^{\circ 2}v)_i = y_i^\top (Y^\top\mathrm{diag}(v)Y)\,y_i`: exact, n r² a vector.
    """

    def __init__(self, expression: RidgeExpression):
        self.expression = expression
        super().__init__(np.float64, expression.shape)  # ty: ignore[too-many-positional-arguments]

    def _plain(self, v: np.ndarray) -> np.ndarray:
        Y, h = self.expression.Y, self.expression.h
        return np.einsum("nr,nr->n", Y @ (Y.T @ (v[:, None] * Y)), Y) - h**2 * v

    def _matvec(self, x):
        x, s = np.asarray(x, dtype=np.float64).ravel(), self.expression.w**2
        return (s * self._plain(x) + self._plain(s * x)) / 2 if self.expression.h.any() else self._plain(x)

    def _rmatvec(self, x):
        return self._matvec(x)

    def block(self, at: np.ndarray) -> np.ndarray:
        """Return the affinities among a few points (b, b)."""
        C = self.expression.rows(at)[:, at] ** 2
        return (C + C.T) / 2


def symmetric(C: Any, *, scaled: bool) -> Any:
    """Return (|C| + |C'|) / 2, sparse or dense; ``scaled`` brings rows to unit length first."""
    if not sp.issparse(C):
        W = np.abs(C)
        W += W.T.copy()
        W *= 0.5
        return W
    size = sp.csr_array(abs(C))
    if scaled:
        lengths = np.sqrt(np.asarray(size.multiply(size).sum(axis=1)).ravel())
        size.data = size.data / np.repeat(np.where(lengths > 0, lengths, 1), np.diff(size.indptr)).astype(C.dtype)
    return sp.csr_array((size + size.T) / 2)


class Spectral(NamedTuple):
    """``labels`` (n,), ``rows`` (n, k) of the embedding, and the ``pieces`` of two or more points of a sparse affinity.

    A row of zeros has no place in the embedding, and its label no meaning.
    """

    labels: np.ndarray
    rows: np.ndarray
    pieces: int


def spectral_clusters(W: Any, k: int, *, rounding: str, n_init: int, seed: int) -> Spectral:
    """Cluster by a symmetric affinity: array, sparse array or operator.

    The k leading vectors of D^-1/2 W D^-1/2, rows brought to unit length and rounded. Where W falls into k pieces or
    more, each a leading vector of its own, the k largest are the clusters and no vector need be sought.
    """
    n, pieces = W.shape[0], 1
    degree = np.asarray(W @ np.ones(n) if isinstance(W, LinearOperator) else W.sum(axis=1), dtype=np.float64).ravel()
    linked = np.flatnonzero(degree > 0)
    labels, rows = np.zeros(n, dtype=np.int64), np.zeros((n, k))
    if sp.issparse(W):
        W = sp.csr_array(W.astype(np.float64)[linked][:, linked])
        pieces, piece = sp.csgraph.connected_components(W, directed=False)
        if not len(linked) or pieces >= k > 1:
            largest = np.argsort(-np.bincount(piece, minlength=k), kind="stable")[:k]
            rows[linked] = piece[:, None] == largest
            labels[linked] = rows[linked].argmax(axis=1)
            return Spectral(labels, rows, int(pieces))
        N: Any = normalized_adjacency(W)
    else:
        linked = np.arange(n)
        root = np.where(degree > 0, degree, 1) ** -0.5 * (degree > 0)

        def apply(v):
            return root * (W @ (root * np.ravel(v)))

        N = LinearOperator(W.shape, matvec=apply, rmatvec=apply, dtype=np.float64)
    m = N.shape[0]
    if m <= DENSE_SIDE:
        # Nothing is gained by Lanczos, which breaks down where values are repeated many times.
        dense = N.toarray() if sp.issparse(N) else N @ np.eye(m)
        vectors = fix_signs(np.linalg.eigh((dense + dense.T) / 2)[1][:, ::-1][:, :k])
    else:
        vectors = truncated_eigh(N, min(k, m), tol=EIGEN_TOL, rng=np.random.default_rng(seed)).vectors
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    # What rounding leaves of an unlinked point's row must not be blown up to unit length.
    placed = (degree[linked] > 0)[:, None] & (norms > 0)
    unit = np.where(placed, vectors / np.where(norms > 0, norms, 1), 0)
    rows[linked, : unit.shape[1]] = unit
    if k > 1:
        turned = rows[linked] if rounding == "kmeans" else vectors
        labels[linked] = _round(turned, k, rounding, n_init, seed) if len(linked) > k else np.arange(len(linked))
    return Spectral(labels, rows, int(pieces))


def _round(rows: np.ndarray, k: int, rounding: str, n_init: int, seed: int) -> np.ndarray:
    if rounding != "kmeans":
        rng = np.random.default_rng(seed)
        return discretize_embedding(rows, method=rounding, n_init=n_init, rng=rng).labels
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        # Fewer distinct rows than clusters: scikit-learn warns, and the caller says it in its own words.
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        return KMeans(k, n_init=n_init, max_iter=1000, random_state=seed).fit(rows).labels_
