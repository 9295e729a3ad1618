"""Clusters of a graph whose vertices carry attributes, from one subspace of the attributes smoothed along the edges."""

import warnings
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.utils.validation import validate_data

from polyspan.linalg import factored_modularity, fix_signs, graph_modularity, randomized_svd, truncated_eigh
from polyspan.run import map_tasks

from ._graph_clusterer import EXACT_SIDE, AttributedGraphClusterer, check_adjacency, noise, smoothed_rows
from ._graph_smoothing import modularity_operator, row_scaled, slim, transpose


class S2CAG(AttributedGraphClusterer):
    r"""Group the vertices of a graph by their links and their attributes at once, without labels and without training.

    Attributes X are weighted, scaled to a normalised affinity, and smoothed along the edges,
    :math:`Z = \sum_{t=0}^{T} w_t P^t \hat X` with :math:`w_t \propto \alpha^t` and the random walk P. The k leading
    left singular vectors of Z after the trivial first one make
    :math:`\min_{Y^\top Y = I}\lVert Z - Y Y^\top Z\rVert_F`; they are rounded to groups. Nothing of size n x n is ever
    formed: time and memory are linear in edges and in the attributes' non-zeros.

    It breaks where attributes say nothing, since the graph enters only by smoothing them; where they span no more than
    k directions; and where a few dominant topics are not the groups that are meant. Compare with k-means on smoothed
    rows: it can tie. ``rounding_objectives_`` far apart warn of unreliable groups.

    It is transductive: labels belong to the vertices that were fitted, and there is no ``predict``. A new vertex
    changes the graph of all; fit again with it.

    Attributes below 0 have no degree in the method; they get one constant column, which turns cosines into
    :math:`1 + \cos \ge 0`. Source: catalogue entry ``s2cag``.

    Parameters
    ----------
    n_clusters : int, default=8
        k; below the number of attributes.
    order : int, default=10
        T, the number of hops.
    decay : float, default=0.9
        :math:`\alpha \ge 0`, weight of a hop relative to the one before; above 1 far hops count most.
    text_weighting : {"auto", "tfidf", "l2", None}, default="auto"
        ``"tfidf"`` for counts (and chosen for integers that are not negative), ``"l2"`` for rows of length 1 otherwise.
    solver : {"arpack", "randomized"}, default="arpack"
        Lanczos to tolerance ``tol``, or block Krylov with ``n_iter`` steps. Where one side of Z is small, neither: a
        full SVD.
    tol : float, default=1e-3
        Relative accuracy that ``"arpack"`` works to.
    oversampling, n_iter : int, default=10, 7
        Extra columns and steps of ``"randomized"``.
    rounding : {"snem", "kmeans", "cluster_qr"}, default="snem"
        See :func:`polyspan.linalg.discretize_embedding`; ``"cluster_qr"`` wants ``drop_first=False``. Without an
        adjacency, attributes that leave fewer directions than clusters are rounded by k-means, whatever is asked for.
    n_init : int, default=10
        Starts of the rounding; the one of the largest objective is kept.
    drop_first : bool, default=True
        Leave the trivial vector out.
    n_neighbors : int, default=10
        Of the neighbour graph that is built where ``fit`` gets no adjacency.
    precompute : {"auto", True, False}, default="auto"
        Hold Z (n, d), or apply it; both give the same. Chosen by counting multiplications and bytes.
    dtype : {None, float32, float64}, default=None
        Precision of the work; None keeps float32 and float64 attributes as they are.
    n_jobs : int, optional
        For the search of neighbours. Sparse products hold the interpreter's lock, so threads do not speed up the rest.
    random_state : int, RandomState instance or None
        Starts of the rounding, and the sketch of ``"randomized"``.

    Attributes
    ----------
    labels_ : ndarray of shape (n,)
        0 .. k - 1, the largest cluster first.
    embedding_ : ndarray of shape (n, k)
        Orthonormal columns, in the order of the singular values; signs fixed.
    memberships_ : ndarray of shape (n, clusters that are not empty)
        Rows of the relaxed indicator before rounding, not negative, with the sum 1. Made when asked for.
    singular_values_ : ndarray
        Of Z, descending, the trivial one first.
    affinity_modularity_ : float
        Of the labels under the affinity Z Zᵀ; needs no true classes. It falls as ``order`` grows, whatever the labels.
    conductance_ : ndarray of shape (clusters that are not empty,)
        Share of a cluster's affinity that leaves it, in [0, 1].
    rounding_objectives_ : ndarray of shape (n_init,)
    n_isolated_, n_components_ : int
        Vertices without a neighbour (their attributes place them); connected components.
    n_unattributed_ : int
        Rows that are all zero (the graph places them).
    signed_ : bool
        There were attributes below 0.
    joined_neighbors_ : bool
        There was no adjacency, and rows were joined to their neighbours.
    precomputed_ : bool
    n_features_in_ : int
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        order=10,
        decay=0.9,
        text_weighting="auto",
        solver="arpack",
        tol=1e-3,
        oversampling=10,
        n_iter=7,
        rounding="snem",
        n_init=10,
        drop_first=True,
        n_neighbors=10,
        precompute="auto",
        dtype=None,
        n_jobs=None,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.order = order
        self.decay = decay
        self.text_weighting = text_weighting
        self.solver = solver
        self.tol = tol
        self.oversampling = oversampling
        self.n_iter = n_iter
        self.rounding = rounding
        self.n_init = n_init
        self.drop_first = drop_first
        self.n_neighbors = n_neighbors
        self.precompute = precompute
        self.dtype = dtype
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _n_dropped(self) -> int:
        return int(bool(self.drop_first))

    def _embed(self, Z, k, rng):
        U, self.singular_values_ = self._top_svd(Z, k + self._n_dropped(), rng)
        return np.ascontiguousarray(U[:, self._n_dropped() :]), Z


class ModularityS2CAG(AttributedGraphClusterer):
    r"""Group the vertices of an attributed graph by the relaxed modularity of their smoothed attributes' affinity.

    With Z as in :class:`S2CAG`, :math:`\hat Z = \operatorname{diag}(Z 1)_+^{1/2} Z` and
    :math:`\omega = \hat Z\hat Z^\top 1`, the embedding is the k leading eigenvectors of
    :math:`\hat Z \hat Z^\top - \gamma\,\omega\omega^\top/(1^\top\omega)`, applied and never formed. No column is
    dropped: the second term has done so. Where two groups differ much in size it prefers to split the larger one, as
    modularity does. Attributes below 0 leave the scaling by row sums out, which has no meaning for them. Transductive,
    as :class:`S2CAG` is: there is no ``predict``.
    Source: catalogue entry ``s2cag``.

    Parameters
    ----------
    resolution : float, default=1.0
        :math:`\gamma \ge 0`; larger values favour smaller groups.
    n_clusters, order, decay, text_weighting, solver, tol, oversampling, n_iter, rounding, n_init
        As in :class:`S2CAG`.
    n_neighbors, precompute, dtype, n_jobs, random_state
        As in :class:`S2CAG`.

    Attributes
    ----------
    labels_, embedding_, memberships_, conductance_, rounding_objectives_, n_features_in_
        As in :class:`S2CAG`.
    affinity_modularity_ : float
        At ``resolution``, under the affinity of :math:`\hat Z`.
    singular_values_ : ndarray of shape (k,)
        Square roots of the eigenvalues, descending.
    n_isolated_, n_components_, n_unattributed_, signed_, joined_neighbors_, precomputed_
        As in :class:`S2CAG`.
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        order=10,
        decay=0.9,
        resolution=1.0,
        text_weighting="auto",
        solver="arpack",
        tol=1e-3,
        oversampling=10,
        n_iter=7,
        rounding="snem",
        n_init=10,
        n_neighbors=10,
        precompute="auto",
        dtype=None,
        n_jobs=None,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.order = order
        self.decay = decay
        self.resolution = resolution
        self.text_weighting = text_weighting
        self.solver = solver
        self.tol = tol
        self.oversampling = oversampling
        self.n_iter = n_iter
        self.rounding = rounding
        self.n_init = n_init
        self.n_neighbors = n_neighbors
        self.precompute = precompute
        self.dtype = dtype
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _check(self, X) -> int:
        if not isinstance(self.resolution, Real) or not 0 <= self.resolution < np.inf:
            raise ValueError(f"resolution must be a finite number of at least 0, got {self.resolution!r}")
        return super()._check(X)

    def _resolution(self) -> float:
        return float(self.resolution)

    def _embed(self, Z, k, rng):
        n, d = Z.shape
        if not self.signed_:
            scale = np.sqrt(np.maximum(Z @ np.ones(d, dtype=Z.dtype), 0))
            Z = row_scaled(Z, scale)
        omega = Z @ (transpose(Z) @ np.ones(n, dtype=Z.dtype))
        if not omega.sum(dtype=np.float64) > 0:
            raise ValueError("X must have an attribute that is not zero, got an affinity that sums to nothing")
        B = modularity_operator(Z, omega, self._resolution())
        if min(n, d) <= max(EXACT_SIDE, 2 * (k + 1)):
            # Every eigenvector of a positive eigenvalue lies in the span of Z.
            basis, _ = self._top_svd(Z, min(n, d), rng)
        elif self.solver == "randomized":
            # One eigenvalue of B may be negative and large; two spare directions leave room for it.
            options = {"oversampling": int(self.oversampling), "n_iter": int(self.n_iter), "method": "krylov"}
            basis = randomized_svd(B, min(k + 2, n), rng=rng, **options).U
        else:
            basis = truncated_eigh(B, k, which="largest", tol=self.tol, rng=np.random.default_rng(0)).vectors
        values, vectors = np.linalg.eigh(basis.T @ (B @ basis))
        values, vectors = values[::-1][:k], basis @ vectors[:, ::-1][:, :k]
        kept = values > max(values[0], 0) * noise(Z.dtype)
        self.singular_values_ = np.sqrt(values[kept]).astype(Z.dtype)
        return (np.ascontiguousarray(fix_signs(vectors[:, kept])) if kept.any() else vectors[:, :0]), Z


def smoothed_attributes(
    X: Any, adjacency: Any, *, order: int = 10, decay: float = 0.9, text_weighting: str | None = "auto"
) -> np.ndarray:
    r"""Return :math:`\sum_t w_t P^t X` (n, d), the weighted attributes smoothed along the edges, as an array.

    What k-means on smoothed rows takes, the cheap baseline of :class:`S2CAG`; the method itself scales X to a
    normalised affinity first and need not form the result. Parameters as in :class:`S2CAG`.
    """
    reader = S2CAG(1, order=order, decay=decay, text_weighting=text_weighting)
    X = validate_data(reader, X, accept_sparse="csr", dtype=[np.float64, np.float32])
    reader._check(X)
    return smoothed_rows(reader, X, slim(check_adjacency(adjacency, X)))


class OrderDecayRow(NamedTuple):
    """Score of one pair and what it is made of, and how far the objectives of its roundings lay apart."""

    order: int
    decay: float
    score: float
    graph_modularity: float
    attribute_modularity: float
    spread: float


class OrderDecayChoice(NamedTuple):
    """The best pair, and all of them, best first."""

    order: int
    decay: float
    table: list[OrderDecayRow]


ORDERS, DECAYS = (2, 5, 10, 20, 40), (0.7, 0.8, 0.9, 1.0)


def select_order_decay(
    X: Any,
    adjacency: Any,
    n_clusters: Any,
    grid: Any = None,
    *,
    estimator: Any = None,
    workers: int = 1,
    random_state: int | None = 0,
    label: str = "",
) -> OrderDecayChoice:
    r"""Choose hops and decay without labels, by how modular the groups are in the graph and in the attributes.

    The score is :math:`\sqrt{Q_A Q_X}`, with the groups' modularity in the graph itself and under the affinity
    :math:`X X^\top` of the weighted attributes; below 0 either counts as 0. Neither knows of the smoothing, so pairs
    can be compared: ``affinity_modularity_`` cannot do that, because it is each pair's own and falls with every hop.
    A help and no oracle: it says which groups are in the data, not which of them are meant.

    Parameters
    ----------
    X, adjacency
        As in :meth:`S2CAG.fit`.
    n_clusters : int
    grid : iterable of (order, decay), optional
        By default orders 2, 5, 10, 20, 40 with decays 0.7, 0.8, 0.9, 1.
    estimator : S2CAG or ModularityS2CAG, optional
        Gives all other parameters; ``S2CAG()`` by default.
    workers : int, default=1
        Processes that share the grid.
    label : str
        Shows progress under this name.
    """
    pairs = [(o, a) for o in ORDERS for a in DECAYS] if grid is None else [(o, a) for o, a in grid]
    if not pairs:
        raise ValueError("grid must hold at least one pair (order, decay), got none")
    base = clone(S2CAG() if estimator is None else estimator)
    base.set_params(n_clusters=n_clusters, random_state=random_state)
    A = None if adjacency is None else check_adjacency(adjacency, X)
    rows = map_tasks(partial(_score_pair, base, X, A), pairs, workers=workers, label=label)
    table = sorted((OrderDecayRow(*row) for row in rows), key=lambda row: -row.score)
    return OrderDecayChoice(table[0].order, table[0].decay, table)


def _score_pair(base: Any, X: Any, A: Any, pair: tuple) -> tuple:
    order, decay = pair
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="adjacency has .* components")
        fitted = clone(base).set_params(order=order, decay=decay).fit(X, adjacency=A)
    if A is None:
        A = fitted._neighbours(validate_data(fitted, X, accept_sparse="csr", reset=False))
    in_graph = graph_modularity(A, fitted.labels_)
    in_attributes = factored_modularity(fitted._weighted(X, scaled=False), fitted.labels_)
    score = float(np.sqrt(max(in_graph, 0.0) * max(in_attributes, 0.0)))
    spread = float(np.ptp(fitted.rounding_objectives_))
    return int(order), float(decay), score, in_graph, in_attributes, spread
