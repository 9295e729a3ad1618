"""Choose a map by what users do with it (retrieval), and say before a fit whether one can work."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import KFold
from sklearn.utils.validation import check_is_fitted

from polyspan.linalg import PairedMoments, label_hits, mean_average_precision, recall_at_k, top_k

from ._aligner import Aligner, residual_share
from ._checks import check_count, check_labels, check_squares, finite_rows, scale_rows
from .orthogonal_map import (
    IdentityMap,
    MeanShift,
    OrthogonalMap,
    ResidualMLPMap,
    RidgeMap,
    few_anchors,
    few_anchors_unsaid,
)

Direction = Literal["gallery", "query"]
DIRECTIONS: tuple[Direction, ...] = ("gallery", "query")
SIMILARITIES = ("cosine", "dot", "euclidean")


class AlignerScore(NamedTuple):
    """One row of the table: a candidate, a direction, its score by fold and their mean."""

    aligner: str
    direction: Direction
    score: float
    folds: tuple[float, ...]


class AlignerChoice(NamedTuple):
    """The winner, fitted on all anchors, with the whole table, best first.

    ``direction`` is ``"gallery"`` where the old vectors are to be carried to the new space (``aligner`` maps A to B)
    and ``"query"`` where new queries are to be carried to the old index (``aligner`` maps B to A).
    """

    aligner: Aligner
    direction: Direction
    score: float
    metric: str
    table: list[AlignerScore]


def default_candidates(d_in: int, d_out: int, n_anchors: int, random_state: Any = None) -> dict[str, Aligner]:
    """Return the aligners that are tried between two widths where none are named.

    These are the families of closed form that can be fitted there and, of 1,000 anchors or more, the residual MLP;
    those that are trained by many steps (:class:`RelaxedOrthogonalAdapter`, :class:`ForwardCompatibleMap`) are left to
    be named.
    """
    found: dict[str, Aligner] = {"orthogonal": OrthogonalMap(), "ridge": RidgeMap()}
    if n_anchors >= 1000:
        found["residual-mlp"] = ResidualMLPMap(random_state=random_state)
    if d_in == d_out:
        found |= {"mean-shift": MeanShift(), "no-map": IdentityMap()}
    return found


def choose_aligner(
    X: Any,
    Y: Any,
    labels: Any = None,
    *,
    metric: str = "recall@10",
    similarity: str = "cosine",
    candidates: Mapping[str, Aligner] | None = None,
    directions: Sequence[Direction] = ("gallery", "query"),
    n_splits: int = 3,
    random_state: int | None = 0,
) -> AlignerChoice:
    """Cross-validate every aligner in both directions by retrieval, and fit the winner on all anchors.

    Held-out anchors stand for a store. In direction ``"gallery"`` the held-out old vectors are mapped and searched by
    the true new ones; in ``"query"`` new queries are mapped and search the true old vectors. Every query leaves its own
    item out. What counts is the ranking that the new model alone would give, or the labels where they are given: never
    the cosine, which a shrinking map raises while it loses neighbours.

    Parameters
    ----------
    X, Y : arrays of shape (n, d_A) and (n, d_B)
        Anchors in the old and in the new space.
    labels : array of shape (n,), optional
        With labels, ``recall@k`` is the share of queries with a hit of their label among the k; ``map`` needs them.
    metric : str
        ``"recall@<k>"`` or ``"map"`` (mean average precision; needs labels).
    similarity : {"cosine", "dot", "euclidean"}
        How the store ranks, and the new model's own ranking is made.
    candidates : mapping of str to aligner, optional
        See :func:`default_candidates`.

    Raises
    ------
    ValueError
        The metric is unknown or needs labels; the similarity is unknown; labels are not one an anchor; a direction is
        unknown, or there is none, or no candidate, or one that maps to another width than the target's; fewer anchors
        than folds allow.
    """
    X, Y = np.asarray(X), np.asarray(Y)
    if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y):
        raise ValueError(f"X and Y must be 2-d with one row an anchor, got shapes {X.shape} and {Y.shape}")
    labels = None if labels is None else check_labels(labels, "labels")
    if labels is not None and labels.shape != (len(X),):
        raise ValueError(f"labels must have shape ({len(X)},), one an anchor, got {labels.shape}")
    if not len(directions) or not set(directions) <= set(DIRECTIONS):
        raise ValueError(f"directions must be some of {DIRECTIONS}, got {tuple(directions)}")
    check_count("n_splits", n_splits, 2)
    k = _parse_metric(metric, labels)
    _check_similarity("similarity", similarity)
    if len(X) < 4 * n_splits:
        raise ValueError(f"X must hold at least 4 anchors a fold ({4 * n_splits}), got {len(X)}")
    tried = candidates if candidates is not None else default_candidates(X.shape[1], Y.shape[1], len(X), random_state)
    if not tried:
        raise ValueError("candidates must hold at least one aligner, got none")
    folds = list(KFold(n_splits, shuffle=True, random_state=random_state).split(X))
    table = []
    for direction in directions:
        A, B = (X, Y) if direction == "gallery" else (Y, X)
        for name, candidate in tried.items():
            scores = []
            for fitting, held in folds:
                with few_anchors_unsaid():
                    # A fold has fewer than there are: what counts is the fit on all.
                    mapped = clone(candidate).fit(A[fitting], B[fitting]).transform(A[held])
                check_target_width(mapped, B, name)
                queries, gallery = (Y[held], mapped) if direction == "gallery" else (mapped, X[held])
                own = None if labels is None else labels[held]
                scores.append(_retrieval(queries, gallery, Y[held], own, k, similarity))
            table.append(AlignerScore(name, direction, float(np.mean(scores)), tuple(scores)))
    table.sort(key=lambda row: -row.score)
    best = table[0]
    A, B = (X, Y) if best.direction == "gallery" else (Y, X)
    return AlignerChoice(clone(tried[best.aligner]).fit(A, B), best.direction, best.score, metric, table)


def check_target_width(mapped: np.ndarray, target: np.ndarray, name: str) -> None:
    """Refuse a map into a space of its own, where the target's rows would have to be carried, too."""
    if mapped.shape[1] != target.shape[1]:
        raise ValueError(
            f"{name} must map to the {target.shape[1]} features of the target, got a map to {mapped.shape[1]}"
        )


def _parse_metric(metric: str, labels: np.ndarray | None) -> int | None:
    """Return k of ``recall@k``, or None for the mean average precision."""
    if metric == "map":
        if labels is None:
            raise ValueError("metric='map' needs labels, got none")
        return None
    head, _, tail = metric.partition("@")
    if head != "recall" or not tail.isdigit() or int(tail) < 1:
        raise ValueError(f"metric must be 'recall@<k>' or 'map', got {metric!r}")
    return int(tail)


def _check_similarity(name: str, similarity: str) -> None:
    if similarity not in SIMILARITIES:
        raise ValueError(f"{name} must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")


def _retrieval(queries, gallery, new, labels, k, similarity) -> float:
    """Score a ranking against the new model's own neighbours, or against labels; own items are left out."""
    if k is None:
        return mean_average_precision(queries, gallery, labels, labels, metric=similarity, exclude_self=True)
    k = min(k, len(gallery) - 1)
    own = np.arange(len(gallery))
    found = top_k(queries, gallery, k, metric=similarity, exclude=own).indices
    if labels is not None:
        return float(label_hits(labels, labels, found).any(axis=1).mean())
    return recall_at_k(found, top_k(new, new, k, metric=similarity, exclude=own).indices)


def pairing_p_value(X: Any, Y: Any, *, n_permutations: int = 199, max_rows: int = 500, random_state: int = 0) -> float:
    r"""Test whether rows of ``X`` and ``Y`` belong together: the share of shuffles that fit as well, in (0, 1].

    The statistic is :math:`\lVert X_c^\top Y_c \rVert_F^2`, the inner product of the two centred Gram matrices; under
    shuffled rows it is what chance gives. A value above 0.05 means that the anchors are probably not paired.

    Parameters
    ----------
    X, Y : arrays of shape (n, d_A) and (n, d_B)
    max_rows : int
        A seeded sample of the rows is enough, and bounds the cost by its square.

    Raises
    ------
    ValueError
        Row counts differ, a value is not finite, or a number is below 1.
    """
    check_count("n_permutations", n_permutations)
    check_count("max_rows", max_rows, 2)
    if len(X) != len(Y):
        raise ValueError(f"X and Y must have one row an item, got {len(X)} and {len(Y)} rows")
    rng = np.random.default_rng(random_state)
    rows = rng.permutation(len(X))[:max_rows]
    K, L = (_centred_gram(finite_rows(np.asarray(A)[rows], name)) for A, name in ((X, "X"), (Y, "Y")))
    observed = np.sum(K * L)
    shuffles = (rng.permutation(len(rows)) for _ in range(n_permutations))
    beaten = sum(np.sum(K * L[np.ix_(order, order)]) >= observed for order in shuffles)
    return float((1 + beaten) / (1 + n_permutations))


def _centred_gram(A: np.ndarray) -> np.ndarray:
    """Return the Gram matrix (n, n) of centred rows, in units of their largest number."""
    A = A / (np.abs(A).max() or 1.0)
    A = A - A.mean(axis=0)
    return A @ A.T


def kernel_agreement(images_a: Any, texts_a: Any, images_b: Any, texts_b: Any) -> dict[str, float]:
    r"""Compare the cross-modal kernels of two models on the same images and texts: how well one map can serve both.

    The kernels are :math:`K_A = F_A G_A^\top` and :math:`K_B = F_B G_B^\top`, (n images, m texts). Where they are equal
    and the models give unit vectors in general position, the map between the models is orthogonal and the same for both
    modalities. Neither kernel is formed: everything follows from d-by-d products.

    Parameters
    ----------
    images_a, texts_a : arrays of shape (n, d_A) and (m, d_A)
    images_b, texts_b : arrays of shape (n, d_B) and (m, d_B)
        The same images and texts, in the same order, by the other model.

    Returns
    -------
    dict
        ``pearson``: correlation of the entries of the two kernels, in [-1, 1]; ``cka``: their inner product after
        centring rows and columns, normalised, in [-1, 1]. Both are 0 where a kernel is constant.
        Source: catalogue entry ``canonicalize``; the centred form for rectangular kernels is ours.

    Raises
    ------
    ValueError
        Items or widths do not fit, or a value is not finite or its square would not be.
    """
    names = ("images_a", "texts_a", "images_b", "texts_b")
    arrays = [finite_rows(A, name) for A, name in zip((images_a, texts_a, images_b, texts_b), names, strict=True)]
    for A, name in zip(arrays, names, strict=True):
        check_squares(A, name)
    # Neither measure depends on the scale of a view, and products of four views stay in range.
    arrays = [A / (np.abs(A).max() or 1.0) for A in arrays]
    fa, ga, fb, gb = arrays
    if len(fa) != len(fb) or len(ga) != len(gb) or fa.shape[1] != ga.shape[1] or fb.shape[1] != gb.shape[1]:
        raise ValueError(
            "images and texts must be the same items by both models, each of one width a model, got shapes "
            f"{[A.shape for A in arrays]}"
        )
    images = PairedMoments(fa.shape[1], fb.shape[1]).update(fa, fb)
    texts = PairedMoments(ga.shape[1], gb.shape[1]).update(ga, gb)

    def products(x, y):
        return (
            float(np.sum(x.cross * y.cross)),
            float(np.sum(x.cov_in * y.cov_in)),
            float(np.sum(x.cov_out * y.cov_out)),
        )

    cross, own_a, own_b = products(images, texts)
    cka = cross / np.sqrt(own_a * own_b) if own_a * own_b > 0 else 0.0
    cross, own_a, own_b = products(images.uncentred(), texts.uncentred())
    count = len(fa) * len(ga)
    sum_a = count * float(images.mean_in @ texts.mean_in)
    sum_b = count * float(images.mean_out @ texts.mean_out)
    cross, own_a, own_b = cross - sum_a * sum_b / count, own_a - sum_a**2 / count, own_b - sum_b**2 / count
    pearson = cross / np.sqrt(own_a * own_b) if min(own_a, own_b) > 0 else 0.0
    return {"pearson": float(pearson), "cka": float(cka)}


def alignment_report(
    aligner: Aligner, X: Any, Y: Any, *, k: int = 10, metric: str = "cosine", random_state: int = 0
) -> dict[str, Any]:
    """Say what a fitted map does on paired rows it has not seen, and what is suspicious about them.

    Parameters
    ----------
    aligner : fitted aligner
    X, Y : arrays of shape (n, d_A) and (n, d_B)
        Row i of both embeds the same item.
    k : int
        Neighbours that recall looks at.
    metric : {"cosine", "dot", "euclidean"}
        How the store ranks: recall is by it.
    random_state : int
        Of the shuffles that the pairs are tested against.

    Returns
    -------
    dict
        ``n``; ``metric``; ``cosine`` before (None where widths differ) and after; ``recall`` at 1 and at k of each
        row's own twin and of the new model's neighbours, by the metric; ``unexplained``: residual share, of rows scaled
        to length 1 where the map was fitted on such; ``pairing_p``: see :func:`pairing_p_value`;
        ``warnings``: list of sentences: rows that seem unpaired, a direction that seems swapped, too few anchors.

    Raises
    ------
    ValueError
        Rows do not pair, are fewer than two, or are not of the map's widths (where these are the other way round, the
        error says so); the metric is unknown.
    """
    X, Y = np.asarray(X), np.asarray(Y)
    if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y) or len(X) < 2:
        raise ValueError(f"X and Y must be 2-d with one row an item, at least 2, got shapes {X.shape} and {Y.shape}")
    check_is_fitted(aligner)
    if X.shape[1] != Y.shape[1] and (Y.shape[1], X.shape[1]) == (aligner.n_features_in_, aligner._n_features_out):
        raise ValueError(
            f"X must have the {aligner.n_features_in_} features that the map takes, got {X.shape[1]}, which is what it "
            "gives: are X and Y swapped?"
        )
    check_count("k", k)
    _check_similarity("metric", metric)
    mapped = aligner.transform(X)
    check_target_width(mapped, Y, "aligner")
    n, twins = len(X), np.arange(len(X))
    k = min(k, n - 1)
    p = pairing_p_value(X, Y, random_state=random_state)
    said = []
    if p > 0.05:
        said.append(f"rows of the two files do not seem to belong together (permutation test, p = {p:.2f})")
    after = aligner.score(X, Y)
    if X.shape[1] == Y.shape[1]:
        other = aligner.score(Y, X)
        if other > after + 0.05:
            said.append(f"the map fits the other direction better (cosine {other:.2f} against {after:.2f}): swapped?")
    few = few_anchors(aligner.n_anchors_, X.shape[1], Y.shape[1])
    if few is not None:
        said.append(few)
    same = IdentityMap().fit(X, Y).score(X, Y) if X.shape[1] == Y.shape[1] else None
    wanted = scale_rows(Y.astype(np.float64))[0] if aligner.normalize else Y
    found = top_k(Y, mapped, k, metric=metric).indices
    neighbours = top_k(Y, mapped, k, metric=metric, exclude=twins).indices
    return {
        "n": n,
        "metric": metric,
        "cosine": {"before": same, "after": after},
        "recall": {
            "twin@1": recall_at_k(found[:, :1], twins),
            f"twin@{k}": recall_at_k(found, twins),
            f"neighbours@{k}": recall_at_k(neighbours, top_k(Y, Y, k, metric=metric, exclude=twins).indices),
        },
        "unexplained": residual_share(mapped, wanted, wanted.mean(axis=0)),
        "pairing_p": p,
        "warnings": said,
    }
