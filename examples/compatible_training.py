"""Update an image search twice without embedding the index again.

Handwritten digits of scikit-learn: the first model knows 4 of them, the second 7, the third all. Each is trained to be
compatible with the one before, so queries of the newest search the oldest index.

The system is the catalogue's ``orthogonal-compatible-alignment``.
"""

import numpy as np

from polyspan.align import CompatibleClassifier, compatibility_matrix, evaluate_compatibility
from polyspan.data import digits


def main(n_train: int = 900, max_iter: int = 15) -> None:
    rows, labels = digits()
    order = np.random.default_rng(0).permutation(len(rows))
    train, test = order[:n_train], order[n_train:]
    models: list[CompatibleClassifier] = []
    for n_known in (4, 7, 10):
        known = train[labels[train] < n_known]
        model = CompatibleClassifier(
            hidden=(64, 64),
            embedding_dim=8,
            extra_dim=4,
            max_iter=max_iter,
            batch_size=64,
            learning_rate=1e-2,
            random_state=0,
            device="cpu",
        )
        models.append(model.fit(rows[known], labels[known], old=models[-1] if models else None))
        print(f"trained on {n_known} digits: vectors of {model.transform(rows[:1]).shape[1]} numbers")
    matrix = compatibility_matrix([model.transform(rows[test]) for model in models], labels[test])
    print("mean average precision, queries of each model (row) in the index of each (column):")
    for i, row in enumerate(matrix.scores):
        print(f"  model {i + 1}  " + "  ".join(f"{score:.3f}" for score in row[: i + 1]))
    print(f"updates that improve an old index: {matrix.average_compatibility:.0%}; mean {matrix.average_score:.3f}")
    old, newest = models[0].transform(rows[test]), models[-1].transform(rows[test], width=8)
    found = evaluate_compatibility(newest, old, labels[test], labels[test], True, reference=old)
    assert found.gain is not None
    print(
        f"newest queries in the first index: {found.scores.map:.3f}, {found.gain['map']:+.3f} against the first model's"
    )


if __name__ == "__main__":
    main()
