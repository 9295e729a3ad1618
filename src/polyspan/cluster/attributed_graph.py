"""Clusters of a graph whose vertices carry attributes, from one subspace of the attributes smoothed along the edges."""

import warnings
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator
from sklearn.base import BaseEstimator, ClusterMixin, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.preprocessing import normalize
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data

from polyspan.io import as_graph, check_sparse
from polyspan.linalg import (
    discretize_embedding,
    factored_conductance,
    factored_modularity,
    fix_signs,
    graph_modularity,
    knn_graph,
    normalized_adjacency,
    randomized_svd,
    truncated_eigh,
    truncated_svd,
)
from polyspan.run import map_tasks

DENSE_ADJACENCY_ENTRIES = 4 * 10**8
SMALL_BYTES = 2**25
EXACT_SIDE = 96
ARRAYS = ("labels_", "embedding_", "singular_values_", "conductance_", "rounding_objectives_")
FACTS = (
    "affinity_modularity_",
    "n_isolated_",
    "n_components_",
    "n_unattributed_",
    "signed_",
    "precomputed_",
    "n_features_in_",
)


class _Smoothing:
    r"""The matrix :math:`Z = \sum_{t=0}^T w_t P^t X` (n, d), applied without holding more than P and X do.

    :math:`P = D^{-1} N` with N symmetric, so one copy of N serves Z and its transpose; the sum is taken by Horner's
    rule, T products with N an application.

    Parameters
    ----------
    N : csr_array of shape (n, n)
        Symmetric.
    X : ndarray or csr_array of shape (n, d)
    weights : ndarray of shape (T + 1,)
    """

    def __init__(self, N: sp.csr_array, X: Any, weights: np.ndarray):
        self.N, self.X, self.weights = N, X, weights.astype(X.dtype)
        self.shape, self.dtype = X.shape, X.dtype
        self.Xt = X.T.tocsr() if sp.issparse(X) else X.T
        self.inverse_degree = 1 / np.asarray(N.sum(axis=1), dtype=X.dtype).reshape(-1, 1)

    def _along(self, Y: np.ndarray) -> np.ndarray:
        total = self.weights[-1] * Y
        for weight in self.weights[-2::-1]:
            total = self.N @ total
            total *= self.inverse_degree
            total += weight * Y
        return total

    def _against(self, Y: np.ndarray) -> np.ndarray:
        total = self.weights[-1] * Y
        for weight in self.weights[-2::-1]:
            total *= self.inverse_degree
            total = self.N @ total
            total += weight * Y
        return total

    def apply(self, V: np.ndarray) -> np.ndarray:
        """Return Z V (n, m) for V (d, m)."""
        return self._along(np.asarray(self.X @ V.astype(self.dtype, copy=False)))

    def apply_transposed(self, U: np.ndarray) -> np.ndarray:
        """Return Zᵀ U (d, m) for U (n, m)."""
        return np.asarray(self.Xt @ self._against(U.astype(self.dtype, copy=False)))

    def operator(self) -> LinearOperator:
        return _operator(self.shape, self.dtype, self.apply, self.apply_transposed)

    def toarray(self) -> np.ndarray:
        return self._along(self.X.toarray() if sp.issparse(self.X) else self.X)


def _operator(shape, dtype, forward: Callable, backward: Callable) -> LinearOperator:
    """Return a linear operator from two functions of blocks of columns."""
    return LinearOperator(
        shape,
        matvec=lambda v: forward(v.reshape(-1, 1)).ravel(),
        rmatvec=lambda u: backward(u.reshape(-1, 1)).ravel(),
        matmat=forward,
        rmatmat=backward,
        dtype=dtype,
    )


def _transpose(Z: Any) -> Any:
    """Return Zᵀ; of a real operator the adjoint, which conjugates no block."""
    return Z.H if isinstance(Z, LinearOperator) else Z.T


def _row_scaled(Z: Any, scale: np.ndarray) -> Any:
    """Return diag(scale) Z."""
    column = scale[:, None]
    if not isinstance(Z, LinearOperator):
        return column * Z
    return _operator(Z.shape, Z.dtype, lambda V: column * (Z @ V), lambda U: Z.H @ (column * U))


def _modularity_operator(Z: Any, omega: np.ndarray, resolution: float) -> LinearOperator:
    """Return Z Zᵀ - γ ω ωᵀ / (1ᵀω) (n, n), symmetric, applied through Z."""
    factor, Zt = Z.dtype.type(resolution / float(omega.sum(dtype=np.float64))), _transpose(Z)

    def apply(V):
        V = V.astype(Z.dtype, copy=False)
        return Z @ (Zt @ V) - factor * np.outer(omega, omega @ V)

    return _operator((Z.shape[0],) * 2, Z.dtype, apply, apply)


class _AttributedGraphClusterer(ClusterMixin, BaseEstimator):
    """What both methods share: checks, attributes, smoothing, rounding and quality numbers."""

    n_clusters: Any
    order: Any
    decay: Any
    text_weighting: Any
    solver: Any
    tol: Any
    oversampling: Any
    n_iter: Any
    rounding: Any
    n_init: Any
    n_neighbors: Any
    precompute: Any
    dtype: Any
    n_jobs: Any
    random_state: Any

    def _embed(self, Z: Any, k: int, rng: np.random.Generator) -> tuple[np.ndarray, Any]:
        """Return the embedding (n, <= k), and the factor (n, d) of the affinity that it belongs to."""
        raise NotImplementedError

    def fit(self, X, y=None, *, adjacency=None):
        """Cluster the vertices of a graph.

        Parameters
        ----------
        X : array or sparse matrix of shape (n, d)
            Attributes, one row a vertex. The labels must not be among them: nothing could tell.
        y : ignored
        adjacency : optional
            The graph: a SciPy sparse matrix or array, a dense matrix (n, n), a ``networkx.Graph``, a PyG ``Data`` or an
            ``edge_index`` (2, m). Weights are not negative; loops are welcome; a directed graph is symmetrised with a
            warning. Without it every row of ``X`` is joined to its ``n_neighbors`` nearest rows.

        Raises
        ------
        ValueError
            An argument is out of its range, the graph and the rows do not fit together, or the attributes span too few
            directions for ``n_clusters``.
        """
        X = validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], ensure_min_samples=2)
        if self.dtype is not None:
            if np.dtype(self.dtype) not in (np.float32, np.float64):
                raise ValueError(f"dtype must be None, float32 or float64, got {self.dtype!r}")
            X = X.astype(self.dtype, copy=False)
        k = self._check(X)
        given = adjacency is not None
        A = slim(_check_adjacency(adjacency, X) if given else self._neighbours(X))
        X = slim(X)
        self._describe(A, k)
        Xhat = self._weighted(X)
        F = _Smoothing(_twice_looped(A.astype(X.dtype)), Xhat, _hop_weights(self.order, self.decay))
        self.precomputed_ = self._worth_precomputing(F, k) if self.precompute == "auto" else bool(self.precompute)
        rng = np.random.default_rng(check_random_state(self.random_state).randint(2**32, dtype=np.uint64))
        Z = F.toarray() if self.precomputed_ else F.operator()
        Y, affinity = self._embed(Z, k, rng)
        if Y.shape[1] < k and (given or not Y.shape[1]):
            raise ValueError(
                f"n_clusters must be below the number of directions that the attributes span, got n_clusters={k} where "
                f"they span {Y.shape[1] + self._n_dropped()} (n_features={X.shape[1]})"
            )
        method = self.rounding if Y.shape[1] == k else "kmeans"
        labels, self.rounding_objectives_ = discretize_embedding(
            Y, method=method, n_clusters=k, n_init=self.n_init, rng=rng
        )
        self.labels_, order = _by_size(labels)
        if len(order) < k:
            warnings.warn(
                f"{k - len(order)} of n_clusters={k} clusters are empty: fewer groups were found",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.embedding_ = Y
        self.affinity_modularity_ = factored_modularity(affinity, self.labels_, resolution=self._resolution())
        self.conductance_ = factored_conductance(affinity, self.labels_)
        return self

    @property
    def predict(self):
        """No method: the labels belong to the vertices that were fitted.

        Raises
        ------
        AttributeError
            Always, and says what to do instead.
        """
        raise AttributeError(
            f"{type(self).__name__} is transductive and has no predict: labels_ belong to the vertices that were "
            "fitted, and a new vertex changes the graph of all; fit again with it, in X and in adjacency"
        )

    def save(self, path: Path | str) -> Path:
        """Write parameters, labels, embedding and quality numbers to one .safetensors file, atomically; no pickle."""
        from polyspan.io import constructor_params, save_fitted

        check_is_fitted(self)
        init = constructor_params(self)
        if not isinstance(init["dtype"], str | None):
            init["dtype"] = {"numpy": np.dtype(init["dtype"]).name}
        arrays = {name: getattr(self, name) for name in ARRAYS}
        params = {"init": init, "facts": {name: getattr(self, name) for name in FACTS}}
        return save_fitted(Path(path), kind=type(self).__name__, arrays=arrays, params=params)

    @classmethod
    def load(cls, path: Path | str) -> Any:
        """Read what :meth:`save` of the same class wrote.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds something else.
        """
        from polyspan.io import load_fitted

        found = load_fitted(Path(path), kind=cls.__name__)
        init = dict(found.params["init"])
        if isinstance(init["dtype"], dict):
            init["dtype"] = np.dtype(init["dtype"]["numpy"]).type
        made = cls(**init)
        for name, value in found.params["facts"].items():
            setattr(made, name, value)
        for name in ARRAYS:
            setattr(made, name, np.array(found.arrays[name]))
        return made

    def _check(self, X) -> int:
        """Check the parameters before any work and return the number of clusters as an int of Python."""
        # k = labels.max() of a uint8 array is a uint8, and k + 1 or 2 k of it would wrap around.
        whole = {"n_clusters": 1, "order": 0, "n_init": 1, "n_iter": 0, "oversampling": 0, "n_neighbors": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool | np.bool_) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not isinstance(self.decay, Real) or not 0 <= self.decay < np.inf:
            raise ValueError(f"decay must be a finite number of at least 0, got {self.decay!r}")
        if not isinstance(self.tol, Real) or not 0 <= self.tol < 1:
            raise ValueError(f"tol must lie in [0, 1), got {self.tol!r}")
        choices = {
            "text_weighting": ("auto", "tfidf", "l2", None),
            "solver": ("arpack", "randomized"),
            "rounding": ("snem", "kmeans", "cluster_qr"),
            "precompute": ("auto", True, False),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        k, n = int(self.n_clusters), X.shape[0]
        if k > n:
            raise ValueError(f"n_clusters must be at most the number of vertices, got n_clusters={k} for n_samples={n}")
        return k

    def _neighbours(self, X) -> sp.csr_array:
        return knn_graph(X, min(int(self.n_neighbors), X.shape[0] - 1), n_jobs=self.n_jobs)

    def _describe(self, A, k: int) -> None:
        """Count what a user should know of the graph, and warn where it falls apart into too many pieces."""
        linked = A - sp.diags_array(A.diagonal())
        self.n_isolated_ = int((np.asarray(abs(linked).sum(axis=1)).ravel() == 0).sum())
        self.n_components_ = int(sp.csgraph.connected_components(A, directed=False)[0])
        pieces = self.n_components_ - self.n_isolated_
        if pieces > k:
            warnings.warn(
                f"adjacency has {pieces} components of two or more vertices for n_clusters={k}; only attributes can "
                "join components",
                stacklevel=3,
            )

    def _weighted(self, X: Any, *, scaled: bool = True) -> Any:
        """Weight attributes; return diag(v)^(-1/2) X with v = X (Xᵀ 1): times its transpose, a normalised affinity."""
        data = X.data if sp.issparse(X) else X
        signed = bool(data.size) and data.min() < 0
        weighting = self.text_weighting
        if weighting == "auto":
            weighting = "tfidf" if not signed and np.array_equal(data, np.rint(data)) else "l2"
        if weighting == "tfidf":
            if signed:
                raise ValueError(f"text_weighting 'tfidf' needs attributes that are not negative, got {data.min()}")
            X = sp.csr_array(TfidfTransformer().fit_transform(sp.csr_array(X))).astype(X.dtype)
        elif weighting == "l2":
            X = normalize(X)
        lengths = np.sqrt(np.asarray(X.multiply(X).sum(axis=1) if sp.issparse(X) else np.square(X).sum(axis=1)).ravel())
        self.n_unattributed_ = int((lengths == 0).sum())
        self.signed_ = bool(signed)
        if signed:
            # Cosines below 0 are no affinities and their row sums may vanish; one constant column lifts all of them.
            column = np.full((X.shape[0], 1), lengths.max(), dtype=X.dtype)
            X = sp.hstack([X, sp.csr_array(column)], format="csr") if sp.issparse(X) else np.hstack([X, column])
        if not scaled:
            return X
        degree = np.asarray(X @ np.asarray(X.sum(axis=0)).ravel(), dtype=np.float64).ravel()
        degree[degree <= 0] = 1
        scale = (degree**-0.5).astype(X.dtype)
        return sp.csr_array(sp.diags_array(scale) @ X) if sp.issparse(X) else X * scale[:, None]

    def _worth_precomputing(self, F: _Smoothing, k: int) -> bool:
        """Compare multiplications, and let Z take memory only in proportion to what is held anyway."""
        n, d = F.shape
        size = F.dtype.itemsize
        held = F.N.nnz * (size + 4) + (F.X.nnz * 2 * (size + 4) if sp.issparse(F.X) else n * d * size)
        if n * d * size > max(4 * held, SMALL_BYTES):
            return False
        if min(n, d) <= EXACT_SIDE:
            return True
        x = F.X.nnz if sp.issparse(F.X) else n * d
        hops, columns = F.N.nnz * (len(F.weights) - 1), 4 * max(2 * (k + 1), 20)
        return hops * d + 2 * columns * n * d < 2 * columns * (x + hops)

    def _top_svd(self, Z, r: int, rng) -> tuple[np.ndarray, np.ndarray]:
        """Return the left singular vectors (n, <= r) whose singular values stand out of rounding, and those values."""
        n, d = Z.shape
        r = min(r, n, d)
        if min(n, d) <= max(EXACT_SIDE, 2 * r):
            U, s, _ = np.linalg.svd(Z if isinstance(Z, np.ndarray) else _dense(Z), full_matrices=False)
            U, s = U[:, :r], s[:r]
        elif self.solver == "randomized":
            U, s, _ = randomized_svd(
                Z, r, rng=rng, oversampling=int(self.oversampling), n_iter=int(self.n_iter), method="krylov"
            )
        else:
            # The start vector is not the user's seed: the subspace is what it is, and chance belongs to the rounding.
            U, s, _ = truncated_svd(Z, r, tol=self.tol, rng=np.random.default_rng(0))
        kept = s > s[0] * _noise(Z.dtype)
        return (fix_signs(U[:, kept]) if kept.any() else U[:, :0]), s[kept]

    def _resolution(self) -> float:
        return 1.0

    def _n_dropped(self) -> int:
        return 0

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class S2CAG(_AttributedGraphClusterer):
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
        See :func:`polyspan.linalg.discretize_embedding`; ``"cluster_qr"`` wants ``drop_first=False``.
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


class ModularityS2CAG(_AttributedGraphClusterer):
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
    labels_, embedding_, conductance_, rounding_objectives_, n_features_in_
        As in :class:`S2CAG`.
    affinity_modularity_ : float
        At ``resolution``, under the affinity of :math:`\hat Z`.
    singular_values_ : ndarray of shape (k,)
        Square roots of the eigenvalues, descending.
    n_isolated_, n_components_, n_unattributed_, signed_, precomputed_
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
            Z = _row_scaled(Z, scale)
        omega = Z @ (_transpose(Z) @ np.ones(n, dtype=Z.dtype))
        if not omega.sum(dtype=np.float64) > 0:
            raise ValueError("X must have an attribute that is not zero, got an affinity that sums to nothing")
        B = _modularity_operator(Z, omega, self._resolution())
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
        kept = values > max(values[0], 0) * _noise(Z.dtype)
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
    A = slim(_check_adjacency(adjacency, X))
    rows = reader._weighted(slim(X), scaled=False)[:, : X.shape[1]]
    return _Smoothing(_twice_looped(A.astype(X.dtype)), slim(rows), _hop_weights(order, decay)).toarray()


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
    A = None if adjacency is None else _check_adjacency(adjacency, X)
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


def _check_adjacency(adjacency: Any, X: Any) -> sp.csr_array:
    """Return any kind of graph as a symmetric CSR matrix with finite weights that are not negative."""
    n = X.shape[0]
    dense = isinstance(adjacency, np.ndarray) and adjacency.ndim == 2 and adjacency.shape[0] == adjacency.shape[1]
    if dense and adjacency.size > DENSE_ADJACENCY_ENTRIES:
        raise ValueError(
            f"adjacency must be sparse at this size, got a dense matrix of shape {adjacency.shape}, which takes "
            f"{adjacency.size * 8 / 2**30:.1f} GiB in float64; pass a scipy.sparse.csr_array, a networkx graph or an "
            "edge_index"
        )
    if dense or sp.issparse(adjacency):
        A = check_sparse(sp.csr_array(adjacency) if dense else adjacency)
        A = A.astype(A.dtype if A.dtype in (np.float32, np.float64) else np.float64)
        negative = np.flatnonzero(A.data < 0)
        if len(negative):
            row = int(np.searchsorted(A.indptr, negative[0], side="right")) - 1
            raise ValueError(
                "adjacency must hold weights that are not negative, "
                f"got {A.data[negative[0]]} at row {row}, column {A.indices[negative[0]]}"
            )
        directed = A.shape[0] == A.shape[1] and _asymmetric(A)
        A = sp.csr_array(A.maximum(A.T)) if directed else A
    else:
        networkx = hasattr(adjacency, "adj")
        directed = networkx and adjacency.is_directed()
        A = as_graph(adjacency, attributes=None if networkx else X, symmetrize="max").adjacency
    if A.shape != (n, n):
        raise ValueError(
            f"adjacency must be square with a row for each of the {n} rows of X, got shape {A.shape} for X {X.shape}"
        )
    if directed:
        warnings.warn("adjacency is directed; each pair of vertices keeps the larger of its two weights", stacklevel=3)
    return A


def _asymmetric(A: sp.csr_array) -> bool:
    """Say whether weights differ from their mirror by more than rounding."""
    difference = A - A.T
    return bool(difference.nnz) and float(abs(difference).max()) > 1e-6 * float(A.data.max())


def slim(M: Any) -> Any:
    """Return a sparse matrix with 32-bit indices where they suffice: half the bytes of every product."""
    if not sp.issparse(M) or max(M.nnz, *M.shape) >= 2**31:
        return M
    return sp.csr_array((M.data, M.indices.astype(np.int32), M.indptr.astype(np.int32)), shape=M.shape)


def _twice_looped(A: sp.csr_array) -> sp.csr_array:
    """Return N = D^(-1/2) (A + I) D^(-1/2) + I; the walk is N over its row sums."""
    A = normalized_adjacency(A, "symmetric", self_loops=1.0)
    return sp.csr_array(A + sp.eye_array(A.shape[0], dtype=A.dtype, format="csr"))


def _hop_weights(order: int, decay: float) -> np.ndarray:
    """Return w_t, proportional to decay^t and summing to one, without overflow where decay > 1."""
    hops = np.arange(int(order) + 1)
    powers = float(decay) ** (hops - (hops[-1] if decay > 1 else 0)).astype(np.float64)
    return powers / powers.sum()


def _dense(F: LinearOperator) -> np.ndarray:
    """Return an operator (n, d) with one small side as an array."""
    n, d = F.shape
    return F @ np.eye(d, dtype=F.dtype) if d <= n else (F.H @ np.eye(n, dtype=F.dtype)).T


def _noise(dtype: Any) -> float:
    """Return the share of the largest singular value below which Lanczos finds rounding, not directions."""
    return min(float(np.finfo(dtype).eps) ** (1 / 3), 1e-3)


def _by_size(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Renumber clusters, the largest first and ties by their first vertex, so that names do not hang on chance."""
    values, first, index, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -counts))
    rank = np.empty(len(values), dtype=np.int64)
    rank[order] = np.arange(len(values))
    return rank[index], order
