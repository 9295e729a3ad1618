"""Claim: one hashed table for all features predicts better than a hashed table a feature, row for row."""

import math
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

from polyspan.claims import Claim
from polyspan.data import data_folder, digits
from polyspan.io import read_text
from polyspan.learn import UnifiedEmbedding, UnifiedEmbeddingClassifier

DIM = 16
N_FEATURES, N_VALUES, N_ROWS, ZIPF = 4, 2_000, 80_000, 0.8
BATCH, EPOCHS, STEPS, STEP = 1_024, 8, 50, 3e-3
WINDOW = 2
N_PLACES = 230_000
DISTORTION = 0.75


class Table(NamedTuple):
    """Values (n, T) int64 of T features, labels (n,) 0 or 1, ``test`` (n,) bool, and the network that learns them.

    ``share`` in (0, 1] are the table's rows beside the distinct values. ``kind`` is 0 for one linear layer whose
    readers start equal, 1 for the same with one reader for all features, and 2 for DCN-V2.
    """

    values: np.ndarray
    labels: np.ndarray
    test: np.ndarray
    share: float
    kind: int


class Labelled(NamedTuple):
    """What a user brings: values (n, T) of whole numbers, one column a feature, and labels (n,) 0 or 1."""

    values: np.ndarray
    labels: np.ndarray


def planted(seed: int, *, share: float = 0.1, kind: int = 0) -> Table:
    """Four features of Zipf values; the log-odds of the label are the sum of a normal weight for each value."""
    rng = np.random.default_rng(seed)
    odds = 1 / np.arange(1, N_VALUES + 1) ** ZIPF
    values = rng.choice(N_VALUES, size=(N_ROWS, N_FEATURES), p=odds / odds.sum())
    weights = rng.normal(size=(N_FEATURES, N_VALUES))
    logits = weights[np.arange(N_FEATURES), values].sum(axis=1)
    labels = rng.random(N_ROWS) < 1 / (1 + np.exp(-logits))
    return Table(values, labels.astype(np.int64), np.arange(N_ROWS) >= 0.8 * N_ROWS, share, kind)


def on_digits(seed: int, *, share: float = 0.1) -> Table:
    """Is a handwritten digit odd, by the grey value of each of its pixels as a category?"""
    images, labels = digits()
    values = np.rint(16 * images).astype(np.int64)
    # A pixel that is nearly always white tells nothing and only takes time.
    values = values[:, (values > 0).mean(axis=0) > 0.05]
    test = np.zeros(len(labels), bool)
    test[np.random.default_rng(seed).permutation(len(labels))[: len(labels) // 3]] = True
    return Table(values, labels.astype(np.int64) % 2, test, share, 0)


def on_words(seed: int, *, share: float = 0.05) -> Table:
    """Is the word in the middle of five the true one, or one drawn at random? Words of WikiText-2, by place."""
    folder = data_folder("wikitext-2")
    words = (read_text(folder / "valid.txt") + read_text(folder / "test.txt")).split()
    _, ids = np.unique(np.array(words), return_inverse=True)
    rng = np.random.default_rng(seed)
    frequency = np.bincount(ids) ** DISTORTION
    end = int(0.85 * len(ids))
    places = np.concatenate(
        [
            rng.integers(WINDOW, end - WINDOW, size=200_000),
            rng.integers(end + WINDOW, len(ids) - WINDOW, size=N_PLACES - 200_000),
        ]
    )
    values = ids[places[:, None] + np.arange(-WINDOW, WINDOW + 1)]
    labels = rng.integers(2, size=N_PLACES)
    drawn = rng.choice(len(frequency), size=N_PLACES, p=frequency / frequency.sum())
    values[labels == 0, WINDOW] = drawn[labels == 0]
    return Table(values, labels, np.arange(N_PLACES) >= 200_000, share, 2)


def trial(data: Table | Labelled, seed: int) -> dict[str, float]:
    """Train the same network, from the same seed, on a shared table, on split tables and on a row a value."""
    table = data if isinstance(data, Table) else _tabled(data, seed)
    n_values = [len(np.unique(column)) for column in table.values.T]
    rows = max(2 * len(n_values), round(float(table.share) * sum(n_values)))
    if table.kind == 2:
        made = {scheme: _cross(table, scheme, rows, seed) for scheme in ("multiplex", "hash", "collisionless")}
        more = {"one salt for all features": _cross(table, "multiplex", rows, seed, one_salt=True)}
    else:
        found = {scheme: _linear(table, scheme, rows, n_values, seed) for scheme in ("multiplex", "hash")}
        made = {scheme: score for scheme, (score, _) in found.items()}
        more = {}
        if table.kind == 0:
            made["collisionless"] = _linear(table, "collisionless", rows, n_values, seed)[0]
            more = {
                "angle between readers, shared table (degrees)": found["multiplex"][1],
                "angle between readers, split tables (degrees)": found["hash"][1],
            }
    last = {"a row a value": made["collisionless"]} if "collisionless" in made else {}
    return {"method": made["multiplex"], "baseline": made["hash"], **last, **more}


def _columns(values: np.ndarray) -> dict[str, np.ndarray]:
    return {f"feature {t}": values[:, t] for t in range(values.shape[1])}


def _cross(table: Table, scheme: str, rows: int, seed: int, *, one_salt: bool = False) -> float:
    columns = _columns(table.values)
    model = UnifiedEmbeddingClassifier(
        n_embeddings=rows,
        chunk_dim=DIM,
        scheme=scheme,
        salt_groups=dict.fromkeys(columns, "all") if one_salt else None,
        max_epochs=2 if len(table.labels) > 100_000 else 4,
        early_stopping=False,
        random_state=seed,
    )
    model.fit(_columns(table.values[~table.test]), table.labels[~table.test])
    return float(roc_auc_score(table.labels[table.test], model.decision_function(_columns(table.values[table.test]))))


def _linear(table: Table, scheme: str, rows: int, n_values: list[int], seed: int) -> tuple[float, float]:
    """Return test AUC, and the mean angle in degrees between the features' readers, of one linear layer."""
    import torch

    from polyspan.learn import FeatureSpec
    from polyspan.run import torch_generator

    generator = torch_generator(seed)
    columns = _columns(table.values)
    layer = UnifiedEmbedding(
        {name: FeatureSpec(vocabulary_size=size) for name, size in zip(columns, n_values, strict=True)},
        rows,
        DIM,
        scheme=scheme,
        vocabularies=columns if scheme == "collisionless" else None,
        generator=generator,
    )
    shared = table.kind == 1
    reader = torch.full((1 if shared else len(n_values), DIM), 1 / math.sqrt(DIM)).requires_grad_()
    bias = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.Adam([layer.weight, reader, bias], lr=STEP)
    keys, labels = torch.from_numpy(table.values), torch.from_numpy(table.labels).float()
    held = torch.from_numpy(table.test)
    read = layer.rows(keys)

    def logits(places: Any) -> Any:
        return (torch.nn.functional.embedding(places, layer.weight) * reader).sum(dim=(1, 2)) + bias

    train = (~held).nonzero()[:, 0]
    size = min(BATCH, len(train) // STEPS)
    for _ in range(EPOCHS):
        for batch in train[torch.randperm(len(train), generator=generator)].split(size):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits(read[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        score = roc_auc_score(labels[held], logits(read[held]))
        unit = torch.nn.functional.normalize(reader.detach().double(), dim=1)
        cosines = (unit @ unit.T)[tuple(torch.triu_indices(len(unit), len(unit), 1))].clamp(-1, 1)
    angle = 0.0 if shared else math.degrees(torch.arccos(cosines).mean().item())
    return float(score), angle


def _tabled(data: Labelled, seed: int) -> Table:
    """Hold out a third of a user's rows."""
    values, labels = np.asarray(data.values), np.asarray(data.labels)
    if values.ndim != 2 or values.dtype.kind not in "iu" or len(values) != len(labels):
        raise ValueError(f"values must be whole numbers (n, T) with n labels, got {values.dtype} {values.shape}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(labels)[:5]}")
    test = np.zeros(len(labels), bool)
    test[np.random.default_rng(seed).permutation(len(labels))[: len(labels) // 3]] = True
    return Table(values.astype(np.int64), labels.astype(np.int64), test, 0.05, 2)


def one_feature(data: Labelled, seed: int) -> Labelled:  # noqa: ARG001 - the form of a spoiler
    """Keep the feature of the most values: with one feature, a shared table is a split one."""
    sizes = [len(np.unique(column)) for column in np.asarray(data.values).T]
    return data._replace(values=np.asarray(data.values)[:, [int(np.argmax(sizes))]])


CLAIM = Claim(
    slug="unified-embedding",
    statement="One hashed table that all features share predicts better than a hashed table a feature of as many rows.",
    method="rows shared by all features, hashed with a salt of each feature's own",
    baseline="the same network, each feature hashed into rows of its own, as many as fit its values",
    metric="area under the ROC curve on held-out rows, 0.5 is chance",
    margin=0.01,
    worlds={
        "planted": planted,
        "digits": on_digits,
        "words, 5 % of rows": on_words,
        "words, 1 % of rows": lambda seed: on_words(seed, share=0.01),
        "one-reader": lambda seed: planted(seed, kind=1),
    },
    control="one-reader",
    levels={"quick": ("planted", "digits"), "standard": ("planted", "words, 5 % of rows", "words, 1 % of rows")},
    seeds={"quick": 5, "standard": 5, "full": 3},
    trial=trial,
    user_data=Labelled,
    spoil=one_feature,
    why=(
        "With a tenth as many rows as values the shared table gains 0.06 in the planted world and 0.13 on digits, "
        "where it comes near a row a value. The reason shows in the readers of the linear layer, which start equal: on "
        "the shared table they end 88 degrees apart in the planted world and 47 on digits, so that collisions between "
        "features go unseen; on split tables, which have none, 8 and 18. With one reader for all features the gain is "
        "gone. It gains on words of WikiText-2 too, but there all features are of one vocabulary, and one salt for all "
        "of them gains more than salts of their own."
    ),
)
