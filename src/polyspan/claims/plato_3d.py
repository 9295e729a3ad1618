"""Claim: of closed forms, matching inside the small subspaces in which two spaces agree finds most partners."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from polyspan.align import SubspaceAligner, local_cka, topk_accuracy
from polyspan.align.pair_scorers import (
    ContrastiveProjections,
    KernelCanonicalCorrelation,
    PairScorer,
    PrincipalSubspaceAligner,
    RelativeRepresentation,
)
from polyspan.claims import Claim
from polyspan.data import dataset, digits
from polyspan.linalg import PairedMoments, procrustes_from_moments, ridge_from_moments

SIZES = (2, 5, 10, 15, 20, None)  # None: 50, or as many as there are
RIDGES = (1e-3, 1e-2, 1e-1)
ROUTES = ("affine", "local_cka")
ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PCA_SIZES = (10, 20, 50)
RELATIVE = (30, 100, 300)
KERNEL_SIZES, KERNEL_RIDGES, LANDMARKS = (20, 50), (1e-5, 1e-4, 1e-3), 300
TOP, HELD_SHARE, MOST_HELD = 5, 0.2, 500


class Paired(NamedTuple):
    """Items embedded in two spaces, (n, d_x) and (n, d_y): anchors, whose pairs are known, and queries to be paired."""

    anchors_x: np.ndarray
    anchors_y: np.ndarray
    queries_x: np.ndarray
    queries_y: np.ndarray


def planted(seed: int, *, n=600, n_queries=200, shared=6, own=20, loud=3.0, noise=0.5, d_x=60, d_y=40) -> Paired:
    """Each view mixes the same few factors with louder ones of its own, and noise."""
    rng = np.random.default_rng(seed)
    total = n + n_queries
    factors = rng.normal(size=(total, shared))

    def view(d):
        private = loud * rng.normal(size=(total, own))
        mixed = np.concatenate([factors, private], axis=1) @ rng.normal(size=(shared + own, d))
        return mixed + noise * rng.normal(size=mixed.shape)

    return split(view(d_x), view(d_y), n_queries, n, None)


def all_shared(seed: int, *, n=600, n_queries=200, d=24, noise=1.0) -> Paired:
    """The second view is the first one turned and blurred: every direction is shared alike, and none is worth leaving.

    A subspace can only lose something here, and a map of the full spaces loses nothing.
    """
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n + n_queries, d))
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return split(X, X @ turn + noise * rng.normal(size=X.shape), n_queries, n, None)


def split(X: np.ndarray, Y: np.ndarray, n_queries: int, n_anchors: int, seed: int | None) -> Paired:
    """Take queries and anchors from paired rows, in their order or in one drawn from a seed."""
    order = np.arange(len(X)) if seed is None else np.random.default_rng(seed).permutation(len(X))
    queries, anchors = np.split(order[: n_queries + n_anchors], [n_queries])
    return Paired(X[anchors], Y[anchors], X[queries], Y[queries])


def on_digits(seed: int) -> Paired:
    """Scikit-learn's handwritten digits: the left half of an image (32 pixels) is to find its right half."""
    images = digits()[0].reshape(-1, 8, 8)
    left, right = (part.reshape(len(images), -1) for part in (images[:, :, :4], images[:, :, 4:]))
    return split(left, right, 300, 1200, seed)


@cache
def _shapes() -> tuple[np.ndarray, np.ndarray]:
    found = dataset("shapes3d-text")
    return found.texts, found.shapes


def on_shapes(seed: int, *, n_anchors: int, forward=True) -> Paired:
    """Captions (MiniLM) are to find 3D shapes (a point network that never saw a text), or the other way round."""
    texts, shapes = _shapes()
    return split(*((texts, shapes) if forward else (shapes, texts)), 500, n_anchors, seed)


def on_articles(seed: int) -> Paired:
    """Texts of Wikipedia articles are to find their images; the two features have little to do with one another."""
    found = dataset("wikipedia-crossmodal")
    test = np.random.default_rng(seed).permutation(found.test)[:500]
    return Paired(found.text[found.train], found.image[found.train], found.text[test], found.image[test])


def unit(Z: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(Z, axis=1, keepdims=True)
    return Z / np.where(norms > 0, norms, 1.0)


def _moments(data: Paired) -> PairedMoments:
    return PairedMoments(data.anchors_x.shape[1], data.anchors_y.shape[1]).update(data.anchors_x, data.anchors_y)


def subspace(data: Paired, *, k: int | str | None, route: str, reg: float) -> np.ndarray:
    """Score queries in canonical subspaces of dimension k."""
    return SubspaceAligner(k, method=route, reg=reg).fit(*data[:2]).similarity(*data[2:])


def ridge(data: Paired, *, alpha: float, centred: bool) -> np.ndarray:
    """Carry by a ridge map, ``alpha`` in mean variances; the cosine is about the anchors' mean or about the origin."""
    moments = _moments(data)
    fit = ridge_from_moments(moments, alpha=alpha * np.trace(moments.cov_in) / moments.d_in)
    origin = fit.mean_out if centred else np.zeros_like(fit.mean_out)
    return unit((data.queries_x - fit.mean_in) @ fit.weights + fit.mean_out - origin) @ unit(data.queries_y - origin).T


def scored(data: Paired, make: Callable[[], PairScorer]) -> np.ndarray:
    """Score queries by another aligner, fitted on the anchors."""
    return make().fit(*data[:2]).similarity(*data[2:])


def procrustes(data: Paired, *, scaling: str) -> np.ndarray:
    """Carry by a partial isometry, of rows as they are, centred, or with every feature at unit variance."""
    moments = _moments(data)
    X, Y, A, B = data
    if scaling == "standard":
        X, A = ((Z - moments.mean_in) / (np.std(data.anchors_x, axis=0) + 1e-12) for Z in (X, A))
        Y, B = ((Z - moments.mean_out) / (np.std(data.anchors_y, axis=0) + 1e-12) for Z in (Y, B))
        moments = PairedMoments(moments.d_in, moments.d_out).update(X, Y)
    fit = procrustes_from_moments(moments, shift=scaling != "none", scale=False)
    return unit((A - fit.mean_in) @ fit.rotation) @ unit(B - fit.mean_out).T


def local(data: Paired, *, kernel: str) -> np.ndarray:
    """Local CKA of the spaces as they are."""
    return local_cka(*data, kernel=kernel)


Family = list[Callable[[Paired], np.ndarray]]
METHOD: dict[str, Family] = {
    f"subspace, {name}": [partial(subspace, k=k, route=route, reg=reg) for k in SIZES for reg in RIDGES]
    for name, route in zip(("affine", "local CKA"), ROUTES, strict=True)
}
FAMILIES: dict[str, Family] = {
    "ridge map": [partial(ridge, alpha=alpha, centred=centred) for alpha in ALPHAS for centred in (False, True)],
    "PCA then ridge": [
        partial(scored, make=partial(PrincipalSubspaceAligner, k, reg=alpha))
        for k in PCA_SIZES
        for alpha in (1e-3, 1e-2, 1e-1)
    ],
    "Procrustes": [partial(procrustes, scaling=scaling) for scaling in ("none", "centre", "standard")],
    "local CKA": [partial(local, kernel=kernel) for kernel in ("linear", "rbf")],
    "relative": [partial(scored, make=partial(RelativeRepresentation, n)) for n in RELATIVE],
    "kernel CCA": [
        partial(scored, make=partial(KernelCanonicalCorrelation, k, reg=reg, n_landmarks=LANDMARKS))
        for k in KERNEL_SIZES
        for reg in KERNEL_RIDGES
    ],
    "white, all directions": [partial(subspace, k="all", route="affine", reg=reg) for reg in RIDGES],
}
REFERENCE: dict[str, Family] = {
    "trained projections": [partial(scored, make=partial(ContrastiveProjections, device="cpu"))]
}


def trial(data: Paired, seed: int) -> dict[str, float]:
    """Tune every family on the same anchors held back, fit it on all anchors, and score it on the queries.

    Projections that are trained are shown beside the arms: what training can reach where a closed form stops.
    """
    data = Paired(*(np.asarray(part, dtype=np.float64) for part in data))
    order = np.random.default_rng(seed).permutation(len(data.anchors_x))
    held, kept = np.split(order, [min(MOST_HELD, int(HELD_SHARE * len(order)))])
    tuning = Paired(data.anchors_x[kept], data.anchors_y[kept], data.anchors_x[held], data.anchors_y[held])
    arms, tuned = {}, {}
    for name, settings in (METHOD | FAMILIES | REFERENCE).items():
        scores = [topk_accuracy(setting(tuning), TOP) for setting in settings]
        tuned[name] = max(scores)
        arms[name] = topk_accuracy(settings[int(np.argmax(scores))](data), TOP)
    method, baseline = (max(part, key=tuned.__getitem__) for part in (METHOD, FAMILIES))
    return {"method": arms[method], "baseline": arms[baseline], **arms}


def share_all(data: Paired, seed: int) -> Paired:
    """Give the first view, turned, for the second: nothing is private any more, and no subspace is worth choosing."""
    d = data.anchors_x.shape[1]
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    return data._replace(anchors_y=data.anchors_x @ turn, queries_y=data.queries_x @ turn)


CLAIM = Claim(
    slug="plato-3d",
    statement="Of closed forms, matching in the small subspaces where two spaces agree finds most partners.",
    method="canonical subspaces and the affine or local-CKA route, tuned on anchors (36 settings)",
    baseline="best by the same anchors of ridge, PCA, Procrustes, local CKA, kernel CCA, relative, white (36 settings)",
    metric="partners among the first 5 of the other space, share of queries",
    margin=0.02,
    worlds={
        "planted": planted,
        "digits": on_digits,
        "shapes, 1,000 anchors": partial(on_shapes, n_anchors=1000),
        "shapes, 5,000 anchors": partial(on_shapes, n_anchors=5000),
        "shapes to captions": partial(on_shapes, n_anchors=1000, forward=False),
        "articles": on_articles,
        "all-shared": all_shared,
    },
    control="all-shared",
    levels={
        "quick": ("planted", "digits"),
        "standard": (
            "planted", "digits", "shapes, 1,000 anchors", "shapes, 5,000 anchors", "shapes to captions", "articles",
        ),
    },
    trial=trial,
    user_data=Paired,
    spoil=share_all,
    why=(
        "Kernel CCA, the one baseline that is not linear, finds more on all real data: 0.60 and 0.71 of the shapes "
        "with 1,000 and 5,000 anchors where the method finds 0.53 and 0.64, 0.10 of the articles against 0.08, and "
        "nearly twice as much on halves of digits, 0.66 against 0.37. Where the planted world is linear it finds 0.3 "
        "and the subspace all. Among linear forms the subspace pays where anchors are few and much of a space is its "
        "own: with 1,000 anchors the best other one finds 0.44 of the shapes, and local CKA without subspaces 0.1; the "
        "affine and the local route are about equal. With 5,000 anchors a whitened map of all directions does nearly "
        "as well, 0.62, so that most of the gain over a plain map is whitening. On articles, whose views share little, "
        "it gains nothing over a ridge map. Projections trained by InfoNCE on the same anchors are no closed form and "
        "not judged here; on shapes they find 0.67 and 0.76."
    ),
)  # fmt: skip
