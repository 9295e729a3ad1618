"""Claim: a wider embedding tied to old prototypes serves old and new indexes better than one of fixed width."""

from typing import Any, NamedTuple

import numpy as np

from polyspan.claims import Claim
from polyspan.data import dataset, digits

ALPHAS = (2.0, 10.0)


class Stages(NamedTuple):
    """Training rows (n, d) with labels from 0, test rows with theirs, and how training goes on.

    ``n_known`` (T,): the t-th model is trained on the rows whose label is below it. ``widths`` (3,): of the hidden
    layer (0: a small convolutional network on square images), of the first model's vectors, and of what each update
    adds. ``epochs`` (1,).
    """

    rows: np.ndarray
    labels: np.ndarray
    test_rows: np.ndarray
    test_labels: np.ndarray
    n_known: np.ndarray
    widths: np.ndarray
    epochs: np.ndarray


def planted(seed: int) -> Stages:
    """Twelve classes of three blobs each in 20 dimensions, which overlap; models know 4, 8, then all."""
    rng = np.random.default_rng(seed)
    centres = 1.1 * rng.normal(size=(12, 3, 20))

    def draw(n_per: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(12), n_per)
        rows = centres[labels, rng.integers(3, size=len(labels))] + rng.normal(size=(len(labels), 20))
        return rows.astype(np.float32), labels

    return Stages(*draw(60), *draw(40), np.array([4, 8, 12]), np.array([64, 8, 4]), np.array([15]))


def on_digits(seed: int) -> Stages:
    """Digits of scikit-learn: 900 to train on, 897 to search; 4, 7, then all 10 in random order."""
    rows, labels = digits()
    return _split(rows, labels, seed, 900, len(rows), [4, 7, 10], [64, 8, 4], 15)


def on_mnist(seed: int) -> Stages:
    """MNIST test images: 4,000 to train on, 2,000 others to search; 4, 7, then all 10 digits in random order."""
    found = dataset("mnist-t10k")
    rows = found.images.reshape(len(found.images), -1).astype(np.float32) / np.float32(found.scale)
    return _split(rows, found.labels, seed, 4000, 6000, [4, 7, 10], [0, 16, 8], 6)


def on_questions(seed: int) -> Stages:
    """BANKING77 by MiniLM, its own split: 38 intents, drawn at random, then all 77."""
    found = dataset("banking77")
    order = np.random.default_rng(seed).permutation(77)
    return Stages(
        found.embeddings,
        order[found.labels],
        found.query_embeddings,
        order[found.query_labels],
        np.array([38, 77]),
        np.array([256, 32, 16]),
        np.array([10]),
    )


def _split(rows, labels, seed, n_train, n, n_known, widths, epochs) -> Stages:
    rng = np.random.default_rng(seed)
    named = rng.permutation(labels.max() + 1)[labels]
    order = rng.permutation(len(rows))
    train, test = order[:n_train], order[n_train:n]
    facts = map(np.array, (n_known, widths, [epochs]))
    return Stages(rows[train], named[train], rows[test], named[test], *facts)


def shuffled(data: Stages, seed: int) -> Stages:
    """Deal the labels out anew, in training and test: there is nothing to be compatible with."""
    rng = np.random.default_rng([seed, 1])
    return data._replace(labels=rng.permutation(data.labels), test_labels=rng.permutation(data.test_labels))


def make_backbone(data: Stages, seed: int) -> Any:
    """Return "mlp", or a convolutional network of 28 by 28 images, seeded."""
    if int(data.widths[0]):
        return "mlp"
    from torch import nn

    from polyspan.run import layers_draw_from, torch_generator

    side = round(data.rows.shape[1] ** 0.5)
    with layers_draw_from(torch_generator(seed)):
        return nn.Sequential(
            nn.Unflatten(1, (1, side, side)),
            nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
        )


def train_model(data: Stages, rows: np.ndarray, stage: int, seed: int, old: Any = None, **options: Any) -> Any:
    """Train the model of a stage on the training rows of the classes that it knows."""
    from polyspan.align import CompatibleClassifier

    # Rates at which a plain last model scored best on training rows held out, with seeds that no trial uses.
    known = rows[data.labels[rows] < data.n_known[stage]]
    epochs = int(data.epochs[0])
    hidden, width, extra = (int(w) for w in data.widths)
    made = CompatibleClassifier(
        make_backbone(data, seed + 1000 * stage),
        hidden=(hidden, hidden),
        embedding_dim=width,
        max_iter=epochs,
        warmup=0.15 * epochs,
        batch_size=64 if len(data.rows) < 5000 else 128,
        random_state=seed + 1000 * stage,
        device="cpu",
        **{"extra_dim": extra, "learning_rate": 1e-2 if hidden else 3e-3, **options},
    )
    return made.fit(data.rows[known], data.labels[known], old=old)


def bct(alpha: float) -> dict[str, Any]:
    """Backward-compatible training: cross-entropy plus ``alpha`` times that against the old prototypes."""
    return {"extra_dim": 0, "use_transform": False, "w_ce": 1.0, "w_bct": alpha, "w_cos": 0.0}


def chain(data: Stages, rows: np.ndarray, first: Any, seed: int, **options: Any) -> list:
    """Train every later model to be compatible with the one before."""
    models = [first]
    for stage in range(1, len(data.n_known)):
        models.append(train_model(data, rows, stage, seed, models[-1], **options))
    return models


def mapped_scores(data: Stages, rows: np.ndarray, models: list) -> np.ndarray:
    """Matrix of independent models, a ridge map of the training rows carrying queries to each older space."""
    from polyspan.align import RidgeMap, evaluate_compatibility

    stored = [model.transform(data.test_rows) for model in models]
    scores = np.full((len(models), len(models)), np.nan)
    for i, new in enumerate(models):
        known = rows[data.labels[rows] < data.n_known[i]]
        for j in range(i + 1):
            queries = stored[i]
            if j < i:
                pairs = (model.transform(data.rows[known]) for model in (new, models[j]))
                queries = RidgeMap().fit(*pairs).transform(queries)
            found = evaluate_compatibility(queries, stored[j], data.test_labels, data.test_labels, True)
            scores[i, j] = found.scores.map
    return scores


def trial(data: Stages, seed: int) -> dict[str, float]:
    """Train every arm's chain on the same rows from the same first model, and average its compatibility matrix.

    A sixth of the training rows is held out of all arms: on them the baseline chooses its weight.
    """
    from polyspan.align import average_compatibility, compatibility_matrix

    order = np.random.default_rng([seed, 2]).permutation(len(data.rows))
    held, rows = np.sort(order[: len(order) // 6]), np.sort(order[len(order) // 6 :])

    def average(models: list, X: np.ndarray, y: np.ndarray) -> float:
        return compatibility_matrix([model.transform(X) for model in models], y).average_score

    first = train_model(data, rows, 0, seed)
    test = data.test_rows, data.test_labels
    others = {alpha: chain(data, rows, first, seed, **bct(alpha)) for alpha in ALPHAS}
    chosen = max(ALPHAS, key=lambda alpha: average(others[alpha], data.rows[held], data.labels[held]))
    alone = [first] + [train_model(data, rows, stage, seed) for stage in range(1, len(data.n_known))]
    carried = mapped_scores(data, rows, alone)
    return {
        "method": average(chain(data, rows, first, seed), *test),
        "baseline": average(others[chosen], *test),
        "method without orthogonal layer": average(chain(data, rows, first, seed, use_transform=False), *test),
        "method without extra dimensions": average(chain(data, rows, first, seed, extra_dim=0), *test),
        "independent models, ridge maps": average_compatibility(carried)[1],
        "independent models": average(alone, *test),
    }


CLAIM = Claim(
    slug="orthogonal-compatible-alignment",
    statement=(
        "Over a chain of updates, an embedding that grows and is tied to old prototypes searches old and new indexes "
        "better than backward-compatible training of fixed width."
    ),
    method="extra dimensions, orthogonal layer, prototype and cosine terms, the paper's weights",
    baseline="backward-compatible training (BCT), its weight chosen of 2 and 10 on held-out training rows",
    metric="average multi-model mAP: mean over each model's queries in its own and all earlier models' galleries",
    margin=0.005,
    worlds={
        "planted": planted,
        "digits": on_digits,
        "mnist": on_mnist,
        "banking77": on_questions,
        "shuffled": lambda seed: shuffled(planted(seed), seed),
    },
    control="shuffled",
    levels={"quick": ("planted", "digits"), "standard": ("planted", "digits", "mnist", "banking77")},
    seeds={"quick": 3, "standard": 3},
    trial=trial,
    user_data=Stages,
    spoil=shuffled,
    why=(
        "It fails: against backward-compatible training whose weight is chosen on held-out rows no gain is certain "
        "on any set, and on BANKING77 there is a small loss. Means over 3 seeds, method and baseline: planted "
        "classes 0.380 and 0.369, digits 0.654 and 0.649, MNIST 0.676 and 0.676, BANKING77 from 38 to 77 intents "
        "0.716 and 0.718; seeds differ by 1 to 2 points. What compatible training as such gives is large: "
        "independent models reach 0.29, 0.44, 0.45 and 0.50. Within the method the extra dimensions count where the "
        "first model is narrow (8 and 16 numbers: 1.6 to 3.4 points less without them) and not on BANKING77, whose "
        "first vectors have 32. The orthogonal layer is a linear map before a linear one; without it results change "
        "by -1.6 to +0.1 points. Independent models whose queries a ridge map carries, at 0.378, 0.653, 0.695 and "
        "0.663, are as good on digits and better on MNIST, and much worse on BANKING77; they need the map at each "
        "query. All sets are small, training is short, and classes are new at each stage; the paper's are CIFAR-100 "
        "and ImageNet."
    ),
)
