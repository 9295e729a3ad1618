"""Claim: pushing gallery vectors off their crowd finds more twins than any other correction from the same bank."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from polyspan.align import (
    CSLS,
    AllButTheTop,
    Centering,
    DualBankNormalization,
    InverseGraphConvolution,
    OrthogonalMap,
    QueryBankNormalization,
)
from polyspan.claims import Claim
from polyspan.data import dataset, digits
from polyspan.linalg import cca

FULL_RATES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
LOCAL_RATES = (0.0, 1.0, 2.0, 4.0)
POOL_SHARES = (0.02, 0.1)
BETAS = (1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 14.0, 17.0, 20.0, 24.0, 28.0, 34.0, 40.0, 60.0)
DUAL_BETAS = (0.5, 3.0, 10.0, 20.0)
NEAREST = (1, 2, 3, 4, 5, 7, 10, 14, 20, 30, 40, 50)
TOP = (1, 2, 3, 5, 10)


class Banks(NamedTuple):
    """Three disjoint sets of items, each embedded (n, d) as gallery and as queries; row i of both is one item.

    ``bank_*`` make the correction, ``tune_*`` choose its settings, ``gallery`` and ``queries`` are scored.
    """

    gallery: np.ndarray
    queries: np.ndarray
    bank_gallery: np.ndarray
    bank_queries: np.ndarray
    tune_gallery: np.ndarray
    tune_queries: np.ndarray


def planted(seed: int, *, n=250, d=48, pull=2.0, spread=0.6, noise=0.8, hub=True) -> Banks:
    """Twins with noise of their own, all drawn towards one direction; gallery items by unequal amounts.

    An item's pull is ``pull`` times a log-normal amount of log-spread ``spread``: strongly pulled items are hubs.
    ``hub=False`` leaves the pull out, and with it all that a correction could take away.
    """
    rng = np.random.default_rng(seed)
    direction = normalize(rng.normal(size=(1, d)))

    def view(items):
        blurred = items + noise * rng.normal(size=items.shape) / np.sqrt(d)
        pulls = pull * np.exp(spread * rng.normal(size=(len(items), 1))) if hub else 0.0
        return normalize(blurred + pulls * direction)

    found = []
    for size in (n, 2 * n, n):
        items = rng.normal(size=(size, d)) / np.sqrt(d)
        found += [view(items), view(items)]
    return Banks(*found)


def split(gallery: np.ndarray, queries: np.ndarray, sizes: tuple[int, int, int], seed: int) -> Banks:
    """Draw test, bank and tuning items from paired rows."""
    order = np.random.default_rng(seed).permutation(len(gallery))[: sum(sizes)]
    parts = np.split(order, np.cumsum(sizes)[:-1])
    return Banks(*(side[rows] for rows in parts for side in (gallery, queries)))


def on_digits(seed: int, *, d=128) -> Banks:
    """Scikit-learn's handwritten digits by two random networks, each of which sees its own half of the pixels.

    Rectified features are never negative, so that they lie in a narrow cone. The second network's vectors are joined to
    the first's by an orthogonal map fitted on 500 images that are used for nothing else.
    """
    pixels, _ = digits()
    rng = np.random.default_rng(seed)

    def embed():
        weights = rng.normal(size=(64, d)) * (rng.random((64, 1)) < 0.5)
        return normalize(np.maximum(pixels @ weights, 0.0))

    first, second = embed(), embed()
    order = rng.permutation(len(pixels))
    fitting, rest = order[:500], order[500:]
    mapped = OrthogonalMap(shift=False).fit(second[fitting], first[fitting]).transform(second[rest])
    return split(first[rest], normalize(mapped), (250, 500, 250), seed)


@cache
def _two_encoders() -> tuple[np.ndarray, np.ndarray, int]:
    """Embed the questions of BANKING77 by latent semantic analysis of their words (256) and by MiniLM (384).

    The third value is how many of the rows, the first, are training questions.
    """
    found = dataset("banking77")
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit(found.texts)
    semantic = TruncatedSVD(256, random_state=0).fit(words.transform(found.texts))
    rows = semantic.transform(words.transform([*found.texts, *found.query_texts])).astype(np.float32)
    return normalize(rows), np.concatenate([found.embeddings, found.query_embeddings]), len(found.texts)


def on_questions(seed: int, *, forward: bool = True) -> Banks:
    """Bank customers' questions by two encoders, joined by an orthogonal map fitted on 3,000 of them.

    The word encoder's vectors, mapped, search MiniLM's (``forward``), or the other way round. Banks and tuning items
    come from the training questions, items to be scored from the test questions.
    """
    words, minilm, n_train = _two_encoders()
    rng = np.random.default_rng(seed)
    fitting, bank, tune = np.split(rng.permutation(n_train)[:7000], [3000, 6000])
    test = n_train + rng.permutation(len(words) - n_train)[:2000]
    mapped = normalize(OrthogonalMap(shift=False).fit(words[fitting], minilm[fitting]).transform(words))
    sides = (minilm, mapped) if forward else (mapped, minilm)
    return Banks(*(side[rows] for rows in (test, bank, tune) for side in sides))


def on_articles(seed: int) -> Banks:
    """Wikipedia articles by image and text, joined by canonical correlation: a space without a common direction."""
    found = dataset("wikipedia-crossmodal")
    order = np.random.default_rng(seed).permutation(found.train)
    fitting, bank, tune = np.split(order, [1000, 1700])
    image, text = (side.astype(np.float64) for side in (found.image, found.text))
    fit = cca(image[fitting], text[fitting], 20, reg=1e-3)
    gallery = normalize((image - fit.mean_in) @ fit.weights_in)
    queries = normalize((text - fit.mean_out) @ fit.weights_out)
    return Banks(*(side[rows] for rows in (found.test, bank, tune) for side in (gallery, queries)))


GRIDS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "full": (FULL_RATES, POOL_SHARES[-1:]),
    "local": (LOCAL_RATES, POOL_SHARES),
}
SIDES = ("gallery", "both")
FAMILIES: dict[str, tuple[Any, list[dict[str, Sequence]]]] = {
    "centring": (Centering(), [{"sides": SIDES}]),
    "all but the top": (AllButTheTop(sides=None), [{"sides": [side], "n_components": TOP} for side in SIDES]),
    "inverted softmax": (QueryBankNormalization(dynamic=False), [{"beta": BETAS}]),
    "dynamic inverted softmax": (QueryBankNormalization(), [{"beta": BETAS}]),
    "dual-bank softmax": (
        DualBankNormalization(),
        [{"beta_query": [a], "beta_gallery": [b]} for a in DUAL_BETAS for b in DUAL_BETAS],
    ),
    "CSLS": (CSLS(n_neighbors=None), [{"n_neighbors": NEAREST}]),
}
NONE: dict[str, dict[str, Sequence]] = {
    name: {key: [None] for key in grid[0] if key != "n_components"} for name, (_, grid) in FAMILIES.items()
}
"""No correction, which each family may choose as well."""


def allowed(fitted: Any, grid: list[dict[str, Sequence]]) -> list[dict[str, Sequence]]:
    """Leave out of a grid what the banks are too small for."""
    most = {"n_neighbors": min(fitted.n_bank_gallery_, fitted.n_bank_query_)}
    if isinstance(fitted, AllButTheTop):
        spanned = (len(fitted.directions_gallery_), len(fitted.directions_query_))
        most["n_components"] = min(fitted.n_features_in_ - 1, *spanned)
    kept: list[dict[str, Sequence]] = [
        {key: [v for v in part[key] if key not in most or v <= most[key]] for key in part} for part in grid
    ]
    return [part for part in kept if all(part.values())]


def all_scores(correction: Any, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Return the scores of all pairs by a fitted correction, of scores or of vectors."""
    if hasattr(correction, "score"):
        return correction.score(queries, gallery)
    return correction.transform_queries(queries) @ correction.transform(gallery).T


def first_hits(scores: np.ndarray) -> float:
    """Share of queries whose own item scores best, in [0, 1]; ties count as misses."""
    own = np.diag(scores).copy()
    others = scores.copy()
    np.fill_diagonal(others, -np.inf)
    return float(np.mean(own > others.max(axis=1)))


def trial(data: Banks, seed: int) -> dict[str, float]:  # noqa: ARG001 - every arm is deterministic
    """Tune every correction on the same held-out pairs, no correction among its settings, and score it on other ones.

    The method is full or local, whichever scores better in tuning; the baseline is the family that does.
    """
    unit = Banks(*(normalize(part) for part in data))
    arms = {"no correction": first_hits(unit.queries @ unit.gallery.T)}
    tuned: dict[str, float] = {}
    for name, (rates, shares) in GRIDS.items():
        estimator = InverseGraphConvolution(adjacency=name, pool_share=shares[-1])
        estimator.fit(unit.bank_gallery, queries=unit.bank_queries)
        tuned[name] = estimator.tune(unit.tune_gallery, unit.tune_queries, rates=rates, pool_shares=shares).score
        arms[name] = first_hits(unit.queries @ estimator.transform(unit.gallery).T)
    for name, (estimator, grid) in FAMILIES.items():
        fitted = clone(estimator).fit(unit.bank_gallery, queries=unit.bank_queries)
        settings = [NONE[name], *allowed(fitted, grid)]
        tuned[name] = fitted.tune(unit.tune_gallery, unit.tune_queries, grid=settings).score
        arms[name] = first_hits(all_scores(fitted, unit.queries, unit.gallery))
    method = max(GRIDS, key=tuned.__getitem__)
    baseline = max(FAMILIES, key=tuned.__getitem__)
    return {"method": arms[method], "baseline": arms[baseline], **arms}


def random_banks(data: Banks, seed: int) -> Banks:
    """Give directions at random for the banks: what knows nothing of the crowd, and leaves it where it is."""
    rng = np.random.default_rng(seed)
    names = ("bank_gallery", "bank_queries")
    banks = {name: normalize(rng.normal(size=getattr(data, name).shape)) for name in names}
    return data._replace(**{name: bank.astype(getattr(data, name).dtype) for name, bank in banks.items()})


CLAIM = Claim(
    slug="invgc",
    statement="Pushing gallery vectors off their crowd finds more twins than any other correction from the same bank.",
    method="inverse graph convolution, full or local and its rates tuned on held-out pairs (68 settings)",
    baseline="best by these pairs of centring, all but the top, three softmax normalisers, CSLS and none (74 settings)",
    metric="recall@1 across two embeddings of an item, share of queries",
    margin=0.01,
    worlds={
        "planted": planted,
        "digits": on_digits,
        "questions": on_questions,
        "questions, reversed": lambda seed: on_questions(seed, forward=False),
        "articles": on_articles,
        "no-hubs": lambda seed: planted(seed, hub=False),
    },
    control="no-hubs",
    levels={"quick": ("planted", "digits"), "standard": ("planted", "digits", "questions", "questions, reversed")},
    trial=trial,
    user_data=Banks,
    spoil=random_banks,
    why=(
        "Against no correction it gains much where hubs are strong, by its local form: from 0.62 to 0.96 in the "
        "planted world, and from 0.55 to 0.71 where MiniLM's vectors search the word encoder's. There it equals or "
        "beats every other change of the vectors alone. But softmax normalisers, which use the same bank of queries "
        "to change scores, find 0.85 there, and gain 0.06 the other way round, where tuning leaves this method at "
        "rate 0 in three of five seeds and gains nothing in the others. It is worth its place where an index takes "
        "other vectors but no other scores, nor the one further dimension that would hold most of them."
    ),
)
