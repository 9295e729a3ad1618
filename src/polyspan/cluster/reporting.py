"""What is worth knowing of a clustering of points, with true classes or without, in plain types."""

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from sklearn.base import clone
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

from polyspan.linalg import clustering_accuracy, principal_angles

from ._self_expressive_base import leading_directions
from .self_expressive import SelfExpressiveClustering

SILHOUETTE_ROWS = 2_000
NEAREST_PAIRS = 5
TINY = 1e-8


class Stability(NamedTuple):
    """Adjusted Rand index of all pairs of seeds, mean and least (1: always the same), and the labels (seeds, n)."""

    mean_ari: float
    min_ari: float
    labels: np.ndarray


def found_subspaces(X: Any, labels: Any, subspace_dim: int | None = None) -> list[np.ndarray]:
    """Return orthonormal bases (d, rank) of the clusters' leading directions through the origin, by sorted label.

    Parameters
    ----------
    X : array of shape (n, d)
    labels : array of shape (n,)
    subspace_dim : int, optional
        Left out, as many as hold 95 % of the cluster's squares.
    """
    X, labels = _checked(X, labels, "labels")
    if subspace_dim is not None and subspace_dim < 1:
        raise ValueError(f"subspace_dim must be at least 1, got {subspace_dim}")
    return [leading_directions(X[labels == c], subspace_dim) for c in np.unique(labels)]


def memberships(X: Any, bases: list[np.ndarray]) -> np.ndarray:
    r"""Return how far each row belongs to each of the found subspaces, (n, clusters); rows sum to one.

    :math:`u_{ic} \propto 1/r_{ic}^2` with :math:`r_{ic}^2` the share of row i outside subspace c: the memberships of
    fuzzy c-means (fuzzifier 2) where a subspace takes the place of a centre. A row of zeros belongs to all alike. More
    dimensions leave less outside: compare across clusters of one rank only.
    """
    X = np.asarray(X, dtype=np.float64)
    outside = np.stack([_outside(X, basis) for basis in bases], axis=1)
    near = 1 / np.maximum(outside, TINY)
    return near / near.sum(axis=1, keepdims=True)


def seed_stability(estimator: Any, X: Any, *, n_seeds: int = 5, **fit_params: Any) -> Stability:
    """Cluster with ``random_state`` 0, 1, ... and compare the answers: labels that hang on the seed are no finding.

    The self-expressive methods are fitted once, and one that was fitted to ``X`` is not fitted again, since chance
    enters them by the rounding only.

    Parameters
    ----------
    estimator : clusterer with ``random_state``
        Fitted or not; it is left alone.
    X : array of shape (n, d)
    n_seeds : int
        At least 2.
    **fit_params
        Given to every ``fit``, such as ``adjacency``.
    """
    if n_seeds < 2:
        raise ValueError(f"n_seeds must be at least 2, got {n_seeds}")
    if "random_state" not in estimator.get_params():
        raise ValueError(f"estimator must have random_state, got {type(estimator).__name__}")
    if isinstance(estimator, SelfExpressiveClustering):
        fitted = estimator if estimator.is_fit_of(X) else clone(estimator).fit(X)
        labels = np.stack([fitted.labels_of_seed(X, seed) for seed in range(n_seeds)])
    else:
        # A checkpoint is of one seed.
        alone = {"checkpoint": None} if "checkpoint" in estimator.get_params() else {}
        runs = (clone(estimator).set_params(random_state=seed, **alone) for seed in range(n_seeds))
        labels = np.stack([run.fit_predict(X, **fit_params) for run in runs])
    pairs = [adjusted_rand_score(labels[i], labels[j]) for i in range(n_seeds) for j in range(i)]
    return Stability(float(np.mean(pairs)), float(np.min(pairs)), labels)


def basis_angles(bases: list[np.ndarray]) -> np.ndarray:
    """Return the smallest principal angle between each two subspaces, (clusters, clusters), degrees; NaN if empty."""
    k = len(bases)
    angles = np.full((k, k), np.nan)
    for i in range(k):
        for j in range(i + 1):
            if min(bases[i].shape[1], bases[j].shape[1]):
                wide = (bases[i].astype(np.float64), bases[j].astype(np.float64))
                angles[i, j] = angles[j, i] = 0.0 if i == j else np.rad2deg(principal_angles(*wide)[0])
    return angles


def class_scores(truth: Any, labels: Any) -> dict[str, float]:
    """Return ``accuracy`` under the best one-to-one matching, ``nmi`` and ``ari`` of labels (n,) against classes."""
    return {
        "accuracy": clustering_accuracy(truth, labels),
        "nmi": float(normalized_mutual_info_score(truth, labels)),
        "ari": float(adjusted_rand_score(truth, labels)),
    }


def clustering_report(
    X: Any,
    labels: Any,
    *,
    truth: Any = None,
    bases: list[np.ndarray] | None = None,
    representation: Any = None,
    stability: Stability | None = None,
    random_state: int = 0,
) -> dict[str, Any]:
    r"""Say how good a clustering of points into subspaces is.

    Without classes: ``residual_share``, the part of the squares outside a row's own subspace (falls with rank and with
    more clusters, like any inertia); ``silhouette`` of the sines between rows, :math:`\sqrt{1-\cos^2}`, on at most
    2,000 rows, in [-1, 1] (points far apart within one subspace count against it); the smallest angles between
    subspaces; ``stability`` over seeds.

    With classes: ``accuracy`` under the best one-to-one matching, ``nmi``, ``ari``; and of a sparse representation
    ``preserving_rate``, the share of points that only points of their own class express, and ``off_class_share``, the
    mean share of absolute coefficients outside it.

    Parameters
    ----------
    X : array of shape (n, d)
    labels : array of shape (n,)
        What was found; integers from 0.
    truth : array of shape (n,), optional
        Classes, of any type.
    bases : list of arrays (d, rank), optional
        One a label; left out, the leading directions of each cluster.
    representation : csr array of shape (n, n), optional
    stability : Stability, optional
    random_state : int
        Draws the rows of the silhouette.

    Returns
    -------
    dict
        Plain types; numbers that are not defined are None.
    """
    X, labels = _checked(X, labels, "labels")
    names = np.unique(labels)
    bases = found_subspaces(X, labels) if bases is None else bases
    if len(bases) <= int(names[-1]) and len(bases) != len(names):
        raise ValueError(f"bases must have one subspace a label, {int(names[-1]) + 1}, got {len(bases)}")
    by_label = dict(zip(names.tolist(), bases, strict=True)) if len(bases) == len(names) else dict(enumerate(bases))
    squares = np.square(X).sum(axis=1)
    left = np.zeros(len(X))
    for c in names:
        left[labels == c] = _outside(X[labels == c], by_label[int(c)]) * squares[labels == c]
    told: dict[str, Any] = {
        "n": len(X),
        "n_features": X.shape[1],
        "clusters": [
            {
                "label": int(c),
                "size": int((labels == c).sum()),
                "rank": int(by_label[int(c)].shape[1]),
                "residual_share": _share(left[labels == c].sum(), squares[labels == c].sum()),
            }
            for c in names
        ],
        "residual_share": _share(left.sum(), squares.sum()),
        "silhouette": _silhouette(X, labels, random_state),
        "nearest_subspaces": _nearest_pairs(names, [by_label[int(c)] for c in names]),
    }
    if stability is not None:
        told["stability"] = {
            "seeds": len(stability.labels),
            "mean_ari": stability.mean_ari,
            "min_ari": stability.min_ari,
        }
    if truth is not None:
        _, truth = _checked(X, truth, "truth")
        told["scores"] = class_scores(truth, labels)
        if sp.issparse(representation):
            told["scores"] |= _preserving(sp.coo_array(representation), np.unique(truth, return_inverse=True)[1])
    return told


def _checked(X: Any, labels: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    X, labels = np.asarray(X), np.asarray(labels)
    if X.ndim != 2:
        raise ValueError(f"X must be of shape (n, d), got {X.shape}")
    if labels.shape != X.shape[:1]:
        turned = "; X may be transposed" if labels.shape == X.shape[1:] else ""
        raise ValueError(f"{name} must have one entry for each of {len(X)} rows, got shape {labels.shape}{turned}")
    return X.astype(np.float64), labels


def _outside(X: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return the share of each row's square outside a subspace (n,); 0 for a row of zeros."""
    squares = np.square(X).sum(axis=1)
    rest = np.square(X - (X @ basis) @ basis.T.astype(np.float64)).sum(axis=1)
    return rest / np.where(squares > 0, squares, 1)


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0


def _silhouette(X: np.ndarray, labels: np.ndarray, seed: int) -> float | None:
    rows = np.arange(len(X))
    if len(X) > SILHOUETTE_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(len(X), SILHOUETTE_ROWS, replace=False))
    if not 2 <= len(np.unique(labels[rows])) < len(rows):
        return None
    norms = np.linalg.norm(X[rows], axis=1, keepdims=True)
    unit = X[rows] / np.where(norms > 0, norms, 1)
    sines = np.sqrt(np.maximum(1 - np.square(unit @ unit.T), 0))
    np.fill_diagonal(sines, 0)
    return float(silhouette_score(sines, labels[rows], metric="precomputed"))


def _nearest_pairs(names: np.ndarray, bases: list[np.ndarray]) -> list[dict[str, Any]]:
    angles = basis_angles(bases)
    first, second = np.triu_indices(len(bases), 1)
    between = angles[first, second]
    order = [int(p) for p in np.argsort(between, kind="stable") if np.isfinite(between[p])][:NEAREST_PAIRS]
    return [{"labels": [int(names[first[p]]), int(names[second[p]])], "degrees": float(between[p])} for p in order]


def _preserving(C: sp.coo_array, classes: np.ndarray) -> dict[str, float]:
    rows, columns = C.coords
    size, off = np.abs(C.data).astype(np.float64), classes[rows] != classes[columns]
    n = C.shape[0]
    whole = np.bincount(rows, weights=size, minlength=n)
    strayed = np.bincount(rows, weights=size * off, minlength=n)
    share = strayed / np.where(whole > 0, whole, 1)
    return {"preserving_rate": float(np.mean(share < TINY)), "off_class_share": float(share.mean())}
