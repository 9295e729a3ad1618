"""Race the scores of a search against their usual form, and ways to keep a layer orthogonal against torch's own.

Targets: scores of 10,000 queries in as many rows at least 100 times as fast as the literal form; Cayley's map at least
4 times as fast as the matrix exponential at width 384.

Beside the times stand the average mAP that each way of compatible training reaches in the claim's planted world.

The system is the catalogue's ``orthogonal-compatible-alignment``.
"""

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from _runner import growth, race, save
from polyspan.align import CompatibleClassifier, OrthogonalCompatibleHead, compatibility_matrix, evaluate_compatibility
from polyspan.align.basis_transformation import BasisTransformationClassifier
from polyspan.claims.orthogonal_compatible_alignment import bct, planted

D, CLASSES = 160, 100
ROWS = (1_000, 3_000, 10_000)
WIDTHS = (160, 384)


def vectors(n):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % CLASSES
    rows = rng.normal(size=(CLASSES, D))[labels] + 2 * rng.normal(size=(n, D))
    return rows.astype(np.float32), labels


def literal(rows, labels):
    """All similarities; then, query by query, a sorted row for the hits and scikit-learn's average precision.

    Whether queries are the gallery is asked anew for each query by comparing two lists, as the usual code does.
    """
    U = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    S = U @ U.T
    hits, precision = np.zeros((len(rows), 2)), []
    for i in range(len(rows)):
        same = list(labels) == list(labels)
        keep = np.ones(len(rows), bool)
        keep[i] = not same
        right = labels[keep] == labels[i]
        order = np.argsort(-S[i, keep])
        hits[i] = [right[order[:k]].any() for k in (1, 5)]
        precision.append(average_precision_score(right, S[i, keep]))
    return hits.mean(axis=0), np.mean(precision)


def step(layer, x):
    layer.zero_grad()
    layer(x).square().sum().backward()


def reached():
    """Average mAP over queries and galleries of two models, 8 then 12 classes, and its parts; 3 seeds.

    BT2 costs two trainings: an independent model goes before.
    """
    ways = {
        "orthogonal": (CompatibleClassifier, {}),
        "BCT, 2": (CompatibleClassifier, bct(2.0)),
        "BCT, 10": (CompatibleClassifier, bct(10.0)),
        "BT2": (BasisTransformationClassifier, {}),
        "BT2, 4 times the epochs": (BasisTransformationClassifier, {"max_iter": 60}),
    }
    table = {}
    for seed in range(3):
        data = planted(seed)
        same = {"hidden": (64, 64), "embedding_dim": 8, "extra_dim": 4, "max_iter": 15, "warmup": 2, "batch_size": 64}
        same |= {"learning_rate": 1e-2, "random_state": seed, "device": "cpu"}
        known = data.labels < 8
        first = CompatibleClassifier(**same).fit(data.rows[known], data.labels[known])
        for name, (kind, options) in ways.items():
            second = kind(**{**same, **options}).fit(data.rows, data.labels, old=first)
            vectors = [model.transform(data.test_rows) for model in (first, second)]
            scores = compatibility_matrix(vectors, data.test_labels).scores
            table.setdefault(name, []).append([scores[0, 0], scores[1, 0], scores[1, 1]])
    found = {}
    for name, rows in table.items():
        found[name] = dict(zip(("old on old", "new on old", "new on new"), np.mean(rows, axis=0).round(4).tolist(), strict=True))  # noqa: E501 # fmt: skip
        print(f"  {name}: {found[name]}", flush=True)
    return found


def main() -> None:
    records, off = [], {}
    for n in ROWS:
        rows, labels = vectors(n)
        arms = {
            "polyspan": lambda r=rows, y=labels: evaluate_compatibility(r, r, y, y, True),
            "query by query": lambda r=rows, y=labels: literal(r, y),
        }
        if n == min(ROWS):
            mine, (_, precision) = arms["polyspan"]().scores, arms["query by query"]()
            off[str(n)] = abs(mine.map - float(precision))
        records.append(race("scores", arms, size={"n": n, "d": D}, repeats=1 if n > 5_000 else 2, warmup=0))
    maps = []
    for width in WIDTHS:
        x = torch.randn(512, width, generator=torch.Generator().manual_seed(0))
        made = {
            how: OrthogonalCompatibleHead(width, width // 2, 10, width - width // 2, orthogonal_map=how).transform
            for how in ("cayley", "retraction", "householder", "matrix-exp")
        }

        def free(layer=made["retraction"], x=x):
            step(layer, x)
            layer.retract_()

        theirs = nn.utils.parametrizations.orthogonal(nn.Linear(width, width, bias=False), orthogonal_map="matrix_exp")
        arms = {"polyspan, cayley": lambda m=made["cayley"], x=x: step(m, x), "polyspan, retraction": free}
        for how in ("householder", "matrix-exp"):
            arms[f"polyspan, {how}"] = lambda m=made[how], x=x: step(m, x)
        arms["torch, matrix exponential"] = lambda m=theirs, x=x: step(m, x)
        maps.append(race("one step", arms, size={"width": width, "batch": 512}, repeats=3))
    save(
        "compatibility",
        records + maps,
        reached=reached(),
        growth_in_rows={arm: growth(records, "n", arm) for arm in records[0]["seconds"]},
        difference_in_map=off,
        growth_in_width={arm: growth(maps, "width", arm) for arm in maps[0]["seconds"]},
    )


if __name__ == "__main__":
    main()
