"""What both methods for attributed graphs share: checks, attributes, smoothing, rounding, quality numbers and files."""

import warnings
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
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
    knn_graph,
    randomized_svd,
    truncated_svd,
)
from polyspan.run import available_memory_bytes

from ._graph_smoothing import Smoothing, as_dense, hop_weights, slim, twice_looped
from ._self_expressive_base import leading_directions

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
    "joined_neighbors_",
    "precomputed_",
    "n_features_in_",
)


class AttributedGraphClusterer(ClusterMixin, BaseEstimator):
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
    n_features_in_: int

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
        self.joined_neighbors_ = not given
        A = slim(check_adjacency(adjacency, X) if given else self._neighbours(X))
        X = slim(X)
        self._describe(A, k)
        Xhat = self._weighted(X)
        if self.n_unattributed_ == X.shape[0]:
            raise ValueError("X must have an attribute that is not zero, got zeros alone")
        if given:
            self._check_directions(k, min(Xhat.shape) - self._n_dropped())
        F = Smoothing(twice_looped(A.astype(X.dtype)), Xhat, hop_weights(self.order, self.decay))
        self.precomputed_ = self._worth_precomputing(F, k) if self.precompute == "auto" else bool(self.precompute)
        rng = np.random.default_rng(check_random_state(self.random_state).randint(2**32, dtype=np.uint64))
        Z = F.toarray() if self.precomputed_ else F.operator()
        Y, affinity = self._embed(Z, k, rng)
        if given or not Y.shape[1]:
            self._check_directions(k, Y.shape[1])
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
    def memberships_(self):
        r"""How far each vertex belongs to each cluster, (n, clusters that are not empty); rows sum to one.

        With Y the embedding and C the normalised indicator of ``labels_`` (columns of length 1), the relaxed indicator
        is :math:`Y Y^\top C`: what the rounding takes the largest entry of. Its entry i, c adds up the coefficients by
        which the members of c express vertex i, over the root of their number. Memberships are its positive part, with
        rows brought to the sum 1; a vertex that no cluster speaks for belongs to all alike. Neither signs nor a turn of
        the embedding change them.

        The largest one is the label wherever the rounding ``"snem"`` ended at a fixed point of its step. Elsewhere they
        can differ: ``"kmeans"`` takes the nearest centre, and ``"cluster_qr"`` does not repeat.
        """
        check_is_fitted(self)
        Y, labels = self.embedding_.astype(np.float64), self.labels_
        sizes = np.bincount(labels)
        sums = np.stack([np.bincount(labels, weights=column) for column in Y.T], axis=1)
        relaxed = np.maximum(Y @ (sums / np.sqrt(sizes)[:, None]).T, 0)
        whole = relaxed.sum(axis=1, keepdims=True)
        return np.where(whole > 0, relaxed / np.where(whole > 0, whole, 1), 1 / len(sizes))

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

    def subspaces(self, X: Any, *, adjacency: Any = None, subspace_dim: int | None = None) -> list[np.ndarray]:
        """Return orthonormal bases (d, rank) of the clusters' leading directions through the origin, one a label.

        Rows are those that :func:`smoothed_attributes` gives: weighted attributes smoothed along the edges, unlike the
        embedding without scaling by their degrees, so that a basis lives in the attributes that were given.

        Parameters
        ----------
        X, adjacency
            As they were fitted: nothing of size (n, d) is kept from the fit.
        subspace_dim : int, optional
            Left out, as many as hold 95 % of the cluster's squares.

        Raises
        ------
        ValueError
            There is not one row a label; the clusterer was fitted with a graph and gets none; or rows of (n, d)
            numbers, which are dense once smoothed, do not fit.
        """
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], reset=False)
        n, d = X.shape
        if n != len(self.labels_):
            raise ValueError(f"X must be the {len(self.labels_)} rows that were fitted, got {n}")
        if subspace_dim is not None and not 1 <= subspace_dim <= d:
            raise ValueError(f"subspace_dim must be between 1 and the {d} attributes, got {subspace_dim}")
        X = X if self.dtype is None else X.astype(self.dtype, copy=False)
        needed, free = 3 * X.dtype.itemsize * n * d, available_memory_bytes()
        if needed > free:
            raise ValueError(
                f"X must have rows that fit into memory once smoothed, where they are dense, got shape {X.shape}: "
                f"bases take {needed / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB that are free; keep fewer "
                "attributes or use float32"
            )
        if adjacency is None and not self.joined_neighbors_:
            raise ValueError(
                "adjacency must be the graph that was fitted, got None: labels of a graph are not those of "
                "its attributes' neighbours"
            )
        A = slim(self._neighbours(X) if adjacency is None else check_adjacency(adjacency, X))
        Z = smoothed_rows(clone(self), X, A)
        return [leading_directions(Z[self.labels_ == c], subspace_dim) for c in range(int(self.labels_.max()) + 1)]

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

    def _check_directions(self, k: int, most: int) -> None:
        if k > most:
            beside = " beside the trivial one" if self._n_dropped() else ""
            raise ValueError(
                f"n_clusters must be at most {most}, the directions that the attributes leave{beside}, "
                f"got n_clusters={k} (n_features={self.n_features_in_})"
            )

    def _neighbours(self, X) -> sp.csr_array:
        return knn_graph(X, min(int(self.n_neighbors), X.shape[0] - 1), n_jobs=self.n_jobs)

    def _describe(self, A, k: int) -> None:
        """Count what a user should know of the graph, and warn where it falls apart into too many pieces."""
        linked = A - sp.diags_array(A.diagonal())
        self.n_isolated_ = int((np.asarray(abs(linked).sum(axis=1)).ravel() == 0).sum())
        self.n_components_ = int(sp.csgraph.connected_components(A, directed=False)[0])
        if self.n_isolated_ == A.shape[0]:
            warnings.warn("adjacency joins no two vertices: attributes alone make the groups", stacklevel=3)
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

    def _worth_precomputing(self, F: Smoothing, k: int) -> bool:
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
            U, s, _ = np.linalg.svd(Z if isinstance(Z, np.ndarray) else as_dense(Z), full_matrices=False)
            U, s = U[:, :r], s[:r]
        elif self.solver == "randomized":
            U, s, _ = randomized_svd(
                Z, r, rng=rng, oversampling=int(self.oversampling), n_iter=int(self.n_iter), method="krylov"
            )
        else:
            # The start vector is not the user's seed: the subspace is what it is, and chance belongs to the rounding.
            U, s, _ = truncated_svd(Z, r, tol=self.tol, rng=np.random.default_rng(0))
        kept = s > s[0] * noise(Z.dtype)
        return (fix_signs(U[:, kept]) if kept.any() else U[:, :0]), s[kept]

    def _resolution(self) -> float:
        return 1.0

    def _n_dropped(self) -> int:
        return 0

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


def smoothed_rows(reader: AttributedGraphClusterer, X: Any, A: sp.csr_array) -> np.ndarray:
    """Return the attributes weighted and smoothed as the reader's parameters say, (n, d), without scaling by degree."""
    rows = reader._weighted(slim(X), scaled=False)[:, : X.shape[1]]
    return Smoothing(twice_looped(A.astype(X.dtype)), slim(rows), hop_weights(reader.order, reader.decay)).toarray()


def check_adjacency(adjacency: Any, X: Any) -> sp.csr_array:
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
        sides = getattr(adjacency, "shape", ())
        if len(sides) == 2 and sides[1] == 2 != n:
            raise ValueError(
                f"adjacency must be square or an edge_index of shape (2, m), got {tuple(sides)}: transpose it"
            )
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


def noise(dtype: Any) -> float:
    """Return the share of the largest singular value below which Lanczos finds rounding, not directions."""
    return min(float(np.finfo(dtype).eps) ** (1 / 3), 1e-3)


def _by_size(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Renumber clusters, the largest first and ties by their first vertex, so that names do not hang on chance."""
    values, first, index, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -counts))
    rank = np.empty(len(values), dtype=np.int64)
    rank[order] = np.arange(len(values))
    return rank[index], order
