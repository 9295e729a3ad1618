"""Say whether two spaces share a subspace at all, how large it is, and what matching in it is worth."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from sklearn.utils.validation import check_array, check_consistent_length

from polyspan.linalg import PairedMoments, linear_cka, linear_cka_from_moments, ridge_from_moments
from polyspan.run import Progress, numpy_generator

from ._checks import check_count
from ._pair_matching import Match, PairMatching, row_marks, unit_rows
from .canonical_correlation import (
    CanonicalSubspaces,
    all_subspaces,
    canonical_subspaces,
    coordinate_correlations,
)
from .local_alignment import AnchorProducts, linear_local_cka
from .subspace_alignment import SubspaceAligner

HELD_SHUFFLES = 199


class SubspaceReport(NamedTuple):
    """What two views of the same items share.

    ``correlations`` (k,) are those of the fit on the anchors that were kept, ``held_out`` (k,) the same directions on
    the others, and ``shuffled`` (k,) the largest that shuffled pairs reached in the fit: with few anchors they are
    high. ``n_shared`` counts the leading directions whose held-out correlation is above what shuffled pairs reach
    there at most, 19 times in 20: ``shuffled_held_out``.
    ``cka_raw`` and ``cka_shared`` in [0, 1] are linear CKA of held-out rows, in the whole spaces and in the subspaces.
    ``x_share`` and ``y_share`` in [0, 1]: part of a view's variance that its own coordinates explain; the rest is
    private. ``ceiling`` in [0, 1]: the best expected share of first hits, below 1 where rows repeat. ``pairing_p`` in
    (0, 1]: share of shuffles of the held-out pairs whose mean correlation is as high; unlike
    :func:`polyspan.align.pairing_p_value` it looks where the views agree. ``warnings``: sentences.
    """

    n_anchors: int
    correlations: np.ndarray
    held_out: np.ndarray
    shuffled: np.ndarray
    shuffled_held_out: float
    n_shared: int
    cka_raw: float
    cka_shared: float
    x_share: float
    y_share: float
    ceiling: float
    pairing_p: float
    warnings: list[str]


class SizeScore(NamedTuple):
    """Scores of one route with k components (0 in the full spaces) and so many anchors, shares in [0, 1]."""

    method: str
    n_components: int
    n_anchors: int
    matching: float
    top_1: float
    top_k: float


def matching_accuracy(found: Any, truth: Any = None) -> float:
    """Share of items whose partner a one-to-one matching found, in [0, 1]; items left out count as missed.

    Parameters
    ----------
    found : Match or array of shape (a,)
        The column of each row.
    truth : array of shape (a,), optional
        The right column of each row; left out, row i belongs to column i.

    Raises
    ------
    ValueError
        ``truth`` has another length than an array ``found``, or none is given for a matching that leaves rows out.
    """
    rows, columns = (
        (found.rows, found.columns) if isinstance(found, Match) else (np.arange(len(found)), np.asarray(found))
    )
    truth = np.arange(1 + rows.max() if len(rows) else 0) if truth is None else np.asarray(truth)
    if (
        truth.ndim != 1
        or len(truth) < (len(rows) and 1 + rows.max())
        or (not isinstance(found, Match) and len(truth) != len(rows))
    ):
        raise ValueError(f"truth must be one column for each of the {len(rows)} rows, got shape {truth.shape}")
    return float(np.sum(truth[rows] == columns) / len(truth)) if len(truth) else 0.0


def topk_accuracy(scores: Any, k: int = 5, truth: Any = None) -> float:
    """Share of rows whose right column is among the k best, in [0, 1]; equal scores count by chance.

    A right column that t columns tie with (itself among them), below g better ones, is found with probability
    (k - g) / t: galleries with duplicates are neither favoured nor punished by the order of their rows.

    Parameters
    ----------
    scores : array of shape (a, b)
        More is nearer.
    k : int
        Between 1 and b.
    truth : array of shape (a,), optional
        The right column of each row; left out, row i belongs to column i.

    Raises
    ------
    ValueError
        ``k`` or ``truth`` does not fit, or a score is NaN.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores must have shape (a, b), got {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"scores must be numbers, got NaN in row {int(np.isnan(scores).any(axis=1).argmax())}")
    if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be between 1 and {scores.shape[1]}, got {k!r}")
    truth = np.arange(len(scores)) if truth is None else np.asarray(truth)
    if truth.shape != (len(scores),) or truth.min() < 0 or truth.max() >= scores.shape[1]:
        raise ValueError(f"truth must be one column of {scores.shape[1]} for each of {len(scores)} rows, got others")
    own = scores[np.arange(len(scores)), truth][:, None]
    better, tied = np.sum(scores > own, axis=1), np.sum(scores == own, axis=1)
    return float(np.mean(np.clip((k - better) / tied, 0.0, 1.0)))


def duplicate_ceiling(rows: Any, k: int = 1) -> float:
    """Best expected share of hits among k, in [0, 1], where items that are equal rows have different partners.

    Parameters
    ----------
    rows : array of shape (n, d)
        Such as captions: m equal ones cannot be told apart, so that each finds its own, or is found, with probability
        k / m.
    k : int
        At least 1.
    """
    check_count("k", k)
    rows = check_array(rows, dtype=np.float64, input_name="rows")
    _, which, counts = np.unique(row_marks(rows), return_inverse=True, return_counts=True)
    return float(np.mean(np.minimum(1.0, k / counts[which])))


def crossmodal_scores(aligner: PairMatching, X: Any, Y: Any, *, k: int = 5) -> dict[str, Any]:
    """Measure matching and retrieval of a fitted aligner on paired rows that it has not seen.

    It takes a :class:`SubspaceAligner` and whatever else scores pairs: :class:`KernelCanonicalCorrelation`,
    :class:`ContrastiveProjections`, :class:`PrincipalSubspaceAligner` or :class:`RelativeRepresentation`.

    Returns
    -------
    dict
        ``n``; ``matching``, ``top_1``, ``top_k``: shares; ``k``; ``chance``: what a random ranking finds among k;
        ``ceiling``: see :func:`duplicate_ceiling`, at 1 and at k, the lower one of queries and gallery;
        ``warnings``: rows that equal an anchor's, which flatter the scores, and duplicates.

    Raises
    ------
    ValueError
        Row counts differ or are below 2.
    """
    scores = aligner.similarity(X, Y)
    n = len(scores)
    if scores.shape != (n, n) or n < 2:
        raise ValueError(f"X and Y must hold as many rows, at least 2, got {scores.shape[0]} and {scores.shape[1]}")
    k = min(k, n)
    said = []
    leaked = int(aligner.seen(X).sum())
    if leaked:
        said.append(f"{leaked} of {n} queries equal the row of an anchor: scores on them may be too good")
    sides = {"queries": X, "rows of the gallery": Y}
    first = {name: duplicate_ceiling(rows, 1) for name, rows in sides.items()}
    ceilings = {"at_1": min(first.values()), "at_k": min(duplicate_ceiling(rows, k) for rows in sides.values())}
    said += [
        f"{name} repeat: no more than {share:.1%} can be found first" for name, share in first.items() if share < 1
    ]
    return {
        "n": n,
        "k": k,
        "matching": matching_accuracy(aligner.match(X, Y), np.arange(n)),
        "top_1": topk_accuracy(scores, 1),
        "top_k": topk_accuracy(scores, k),
        "chance": k / n,
        "ceiling": ceilings,
        "warnings": said,
    }


def scores_by_size(
    X: Any,
    y: Any,
    X_query: Any,
    Y_query: Any,
    *,
    sizes: Sequence[int] = (2, 5, 10, 20, 50, 100),
    n_anchors: Sequence[int] | None = None,
    methods: Sequence[str] = ("affine", "local_cka"),
    k: int = 5,
    reg: float = 1e-3,
) -> list[SizeScore]:
    """Measure matching and retrieval over subspace dimensions and numbers of anchors, and in the full spaces.

    One decomposition serves all dimensions. In the full spaces ``affine`` is a ridge map whose penalty generalised
    cross-validation chooses.

    Parameters
    ----------
    X, y : arrays of shape (n, d_A) and (n, d_B)
        Anchors.
    X_query, Y_query : arrays of shape (m, d_A) and (m, d_B)
        Other pairs. To choose a dimension by this table, use pairs that are not those you will report on.
    sizes : sequence of int
        Dimensions; those above what the anchors allow are left out.
    n_anchors : sequence of int, optional
        The first so many anchors are used; all of them where left out.
    methods : sequence of str
        As in :class:`polyspan.align.SubspaceAligner`.
    k : int
        Length of the lists of ``top_k``.

    Raises
    ------
    ValueError
        Rows do not pair, or no size or number of anchors is possible.
    """
    X, Y = _paired(X, y, "X", "y")
    A, B = _paired(X_query, Y_query, "X_query", "Y_query")
    k = min(k, len(A))
    table = []
    for n in (len(X),) if n_anchors is None else n_anchors:
        if not 2 <= n <= len(X):
            raise ValueError(f"n_anchors must lie between 2 and {len(X)}, got {n}")
        moments = PairedMoments(X.shape[1], Y.shape[1]).update(X[:n], Y[:n])
        whole = all_subspaces(moments, reg)
        limit = len(whole.correlations)
        possible = sorted({int(size) for size in sizes if 1 <= size <= limit})
        if not possible:
            raise ValueError(f"sizes must hold a dimension between 1 and {limit}, got {list(sizes)}")
        for method in methods:
            for size in possible:
                aligner = aligner_of(whole.first(size), moments, method=method, reg=reg)
                table.append(_size_score(method, size, n, aligner.similarity(A, B), k))
            if method in ("affine", "local_cka"):
                scores = full_space_scores(method, moments, A, B)
                table.append(_size_score(method, 0, n, scores, k))
    return table


def full_space_scores(method: str, moments: PairedMoments, X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """Score pairs without any subspace: by a ridge map and cosine, or by local CKA of the spaces as they are."""
    if method == "local_cka":
        anchors = AnchorProducts(moments.weight, moments.cross, moments.cov_in, moments.cov_out)
        return linear_local_cka(anchors, X - moments.mean_in, Y - moments.mean_out)
    fit = ridge_from_moments(moments)
    return unit_rows((X - fit.mean_in) @ fit.weights + fit.mean_out) @ unit_rows(Y).T


def aligner_of(found: CanonicalSubspaces, moments: PairedMoments, **params: Any) -> SubspaceAligner:
    """Return a fitted aligner on subspaces that are known already."""
    aligner = SubspaceAligner(len(found.correlations), **params)
    aligner.n_features_in_, aligner._n_features_out = moments.d_in, moments.d_out or 0
    aligner.n_anchors_, aligner.anchor_marks_ = moments.n_rows, np.zeros(0, dtype=np.int64)
    aligner._take(found, moments)
    return aligner


def _size_score(method: str, size: int, n: int, scores: np.ndarray, k: int) -> SizeScore:
    from scipy.optimize import linear_sum_assignment

    matched = linear_sum_assignment(scores, maximize=True)[1]
    found = (topk_accuracy(scores, 1), topk_accuracy(scores, k))
    return SizeScore(method, size, n, matching_accuracy(matched), *found)


def subspace_report(
    X: Any,
    y: Any,
    *,
    n_components: int | None = None,
    reg: float = 1e-3,
    held_share: float = 0.2,
    n_shuffles: int = 19,
    random_state: int = 0,
) -> SubspaceReport:
    """Fit canonical subspaces on most anchors, and hold them against the others and against shuffled pairs.

    Canonical correlations of a fit are high for noise as well, near 1 where anchors are as few as features. What
    counts is what remains on anchors held out, and what shuffled pairs do not reach.

    Parameters
    ----------
    X, y : arrays of shape (n, d_A) and (n, d_B)
        Anchors, at least 10.
    n_components, reg
        As in :class:`polyspan.align.CanonicalCorrelation`.
    held_share : float
        Part of the anchors that is held out, above 0 and below 1.
    n_shuffles : int
        Shuffled fits, of which ``shuffled`` is the largest: with 19 chance exceeds it once in 20 times.

    Raises
    ------
    ValueError
        Rows do not pair, are fewer than 10, or a parameter is out of range.
    """
    X, Y = _paired(X, y, "X", "y")
    if len(X) < 10:
        raise ValueError(f"X must hold at least 10 anchors, got {len(X)}")
    if not 0 < held_share < 1:
        raise ValueError(f"held_share must lie above 0 and below 1, got {held_share}")
    if n_shuffles < 1:
        raise ValueError(f"n_shuffles must be at least 1, got {n_shuffles}")
    rng = numpy_generator(random_state)
    order = rng.permutation(len(X))
    held, kept = np.split(order, [min(len(X) - 2, max(3, int(held_share * len(X))))])
    moments = PairedMoments(X.shape[1], Y.shape[1]).update(X[kept], Y[kept])
    found = canonical_subspaces(moments, n_components, reg)
    k = len(found.correlations)
    A, B = (X[held] - found.x_mean) @ found.x_weights, (Y[held] - found.y_mean) @ found.y_weights
    held_out = coordinate_correlations(A, B)
    white_x, white_y = (
        _white(rows[kept] - mean, cov / moments.weight, reg)
        for rows, mean, cov in ((X, found.x_mean, moments.cov_in), (Y, found.y_mean, moments.cov_out))
    )
    shuffled = np.zeros(k)
    with Progress("shuffling pairs", n_shuffles) as shown:
        for _ in range(n_shuffles):
            core = white_x[rng.permutation(len(kept))].T @ white_y / len(kept)
            shuffled = np.maximum(shuffled, np.linalg.svd(core, compute_uv=False)[:k])
            shown.advance(1)
    by_chance = np.array([coordinate_correlations(A, B[rng.permutation(len(held))]) for _ in range(HELD_SHUFFLES)])
    shuffled_held = float(np.quantile(by_chance.max(axis=1), 0.95))
    above = held_out > shuffled_held
    n_shared = int(k if above.all() else np.argmin(above))
    p = float((1 + np.sum(by_chance.mean(axis=1) >= held_out.mean())) / (1 + HELD_SHUFFLES))
    ceiling = min(duplicate_ceiling(X), duplicate_ceiling(Y))
    said = []
    if p > 0.05:
        said.append(f"rows of the two views do not seem to belong together (permutation test, p = {p:.2f})")
    if n_shared == 0:
        said.append("no direction correlates on held-out anchors above shuffled pairs: there is nothing to match by")
    width = X.shape[1] + Y.shape[1]
    if len(kept) < width:
        said.append(f"{len(kept)} anchors are fewer than the {width} features of both views: raise reg")
    if ceiling < 1:
        said.append(f"rows repeat: no more than {ceiling:.1%} of all items can be found first")
    for name, rows in (("X", X), ("y", Y)):
        flat = int(np.sum(np.ptp(rows, axis=0) == 0))
        if flat:
            said.append(f"{flat} features of {name} are constant and take no part")
    return SubspaceReport(
        n_anchors=len(X),
        correlations=found.correlations,
        held_out=held_out,
        shuffled=np.minimum(shuffled, 1.0),
        shuffled_held_out=shuffled_held,
        n_shared=n_shared,
        cka_raw=float(linear_cka_from_moments(PairedMoments(moments.d_in, moments.d_out).update(X[held], Y[held]))),
        cka_shared=float(linear_cka(A, B)),
        x_share=_explained(moments.cov_in, found.x_weights),
        y_share=_explained(moments.cov_out, found.y_weights),
        ceiling=ceiling,
        pairing_p=p,
        warnings=said,
    )


def _paired(X: Any, Y: Any, name: str, other: str) -> tuple[np.ndarray, np.ndarray]:
    X, Y = (check_array(rows, dtype=np.float64, input_name=n) for rows, n in ((X, name), (Y, other)))
    check_consistent_length(X, Y)
    return X, Y


def _white(centred: np.ndarray, cov: np.ndarray, reg: float) -> np.ndarray:
    """Return coordinates (n, r) of unit regularised variance."""
    values, V = np.linalg.eigh(cov)
    kept = values > len(cov) * np.finfo(np.float64).eps * values[-1]
    return centred @ (V[:, kept] / np.sqrt(values[kept] + reg * np.trace(cov) / len(cov)))


def _explained(cov: np.ndarray, weights: np.ndarray) -> float:
    """Share of a view's variance that regression on its coordinates explains."""
    products = cov @ weights
    return float(np.trace(np.linalg.solve(weights.T @ products, products.T @ products)) / np.trace(cov))
