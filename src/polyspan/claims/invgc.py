"""Claim: pushing gallery vectors off their crowd finds more twins than any other correction from the same bank."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from polyspan.align import InverseGraphConvolution, OrthogonalMap
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


class Scene(NamedTuple):
    """What a correction may use: unit rows to be scored and both banks, and the similarities of each to the gallery."""

    gallery: np.ndarray
    queries: np.ndarray
    bank_gallery: np.ndarray
    bank_queries: np.ndarray
    scores: np.ndarray
    from_bank_gallery: np.ndarray
    from_bank_queries: np.ndarray

    @classmethod
    def of(cls, gallery, queries, bank_gallery, bank_queries) -> "Scene":
        """Compare queries and banks with the gallery once, for every correction to use."""
        rows = (queries, bank_gallery, bank_queries)
        return cls(gallery, queries, bank_gallery, bank_queries, *(side @ gallery.T for side in rows))


def centred(scene: Scene, *, both: bool, top: int = 0) -> np.ndarray:
    """Score without the banks' mean rows, and without their ``top`` principal directions ("all but the top").

    ``both`` cleans the queries as well as the gallery.
    """

    def clean(rows, bank):
        mean = bank.mean(axis=0)
        directions = np.linalg.eigh(np.cov(bank.T))[1][:, -top:] if top else np.zeros((len(mean), 0))
        made = rows - mean
        return normalize(made - (made @ directions) @ directions.T)

    queries = clean(scene.queries, scene.bank_queries) if both else scene.queries
    return queries @ clean(scene.gallery, scene.bank_gallery).T


def _log_mass(similarities: np.ndarray, beta: float) -> np.ndarray:
    """Logarithm of the sum of exp(beta s) down the columns."""
    top = similarities.max(axis=0)
    return beta * top + np.log(np.exp(beta * (similarities - top)).sum(axis=0))


def inverted_softmax(scene: Scene, *, beta: float, dual: float = 0.0) -> np.ndarray:
    """Score by the logarithm of exp(beta s) over its sum for the bank's queries, and ``dual`` for its gallery rows."""
    found = beta * scene.scores - _log_mass(scene.from_bank_queries, beta)
    if dual:
        found += dual * scene.scores - _log_mass(scene.from_bank_gallery, dual)
    return found


def dynamic_inverted_softmax(scene: Scene, *, beta: float) -> np.ndarray:
    """Score by the inverted softmax only those queries whose first row is some bank query's first row as well."""
    active = np.isin(scene.scores.argmax(axis=1), scene.from_bank_queries.argmax(axis=1))
    return np.where(active[:, None], inverted_softmax(scene, beta=beta), scene.scores)


def csls(scene: Scene, *, k: int) -> np.ndarray:
    """Score by 2 s less the mean similarity of a gallery row to its k nearest bank queries."""
    known = scene.from_bank_queries
    k = min(k, len(known))
    return 2 * scene.scores - np.partition(known, len(known) - k, axis=0)[len(known) - k :].mean(axis=0)


GRIDS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "full": (FULL_RATES, POOL_SHARES[-1:]),
    "local": (LOCAL_RATES, POOL_SHARES),
}
FAMILIES: dict[str, list[Callable[[Scene], np.ndarray]]] = {
    "centring": [partial(centred, both=both) for both in (False, True)],
    "all but the top": [partial(centred, both=both, top=top) for both in (False, True) for top in TOP],
    "inverted softmax": [partial(inverted_softmax, beta=beta) for beta in BETAS],
    "dynamic inverted softmax": [partial(dynamic_inverted_softmax, beta=beta) for beta in BETAS],
    "dual-bank softmax": [partial(inverted_softmax, beta=a, dual=b) for a in DUAL_BETAS for b in DUAL_BETAS],
    "CSLS": [partial(csls, k=k) for k in NEAREST],
}


def first_hits(scores: np.ndarray) -> float:
    """Share of queries whose own item scores best, in [0, 1]; ties count as misses."""
    own = np.diag(scores).copy()
    others = scores.copy()
    np.fill_diagonal(others, -np.inf)
    return float(np.mean(own > others.max(axis=1)))


def trial(data: Banks, seed: int) -> dict[str, float]:  # noqa: ARG001 - every arm is deterministic
    """Tune every correction on the same held-out pairs, and score it on other ones.

    The method is full or local, whichever scores better in tuning; the baseline is the family that does.
    """
    unit = Banks(*(normalize(part) for part in data))
    banks = (unit.bank_gallery, unit.bank_queries)
    tune, test = (
        Scene.of(*rows, *banks) for rows in ((unit.tune_gallery, unit.tune_queries), (unit.gallery, unit.queries))
    )
    arms = {"no correction": first_hits(test.scores)}
    tuned: dict[str, float] = {}
    for name, (rates, shares) in GRIDS.items():
        estimator = InverseGraphConvolution(adjacency=name, pool_share=shares[-1]).fit(banks[0], queries=banks[1])
        tuned[name] = estimator.tune(tune.gallery, tune.queries, rates=rates, pool_shares=shares).score
        arms[name] = first_hits(test.queries @ estimator.transform(test.gallery).T)
    for name, settings in FAMILIES.items():
        scores = [first_hits(setting(tune)) for setting in settings]
        tuned[name] = max(scores)
        arms[name] = first_hits(settings[int(np.argmax(scores))](test))
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
    baseline="best by the same pairs of centring, all but the top, three softmax normalisers and CSLS (68 settings)",
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
        "other vectors but no other scores."
    ),
)
