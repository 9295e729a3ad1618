"""Change the embedding model of a small archive without embedding it again.

The archive is scikit-learn's digits, embedded by an old model (40 principal components of the pixels), to be searched
by a new one (a random-feature network). Two hundred digits, embedded by both, are the anchors.
"""

import numpy as np
from sklearn.decomposition import PCA

from polyspan.align import choose_aligner
from polyspan.data import digits
from polyspan.linalg import label_hits, top_k


def main() -> None:
    pixels, labels = digits()
    rng = np.random.default_rng(0)
    old = PCA(40, random_state=0).fit_transform(pixels).astype(np.float32)
    new = np.tanh(pixels @ rng.normal(scale=0.5, size=(64, 48))).astype(np.float32)

    anchors, rest = np.split(rng.permutation(len(pixels)), [200])
    choice = choose_aligner(old[anchors], new[anchors], metric="recall@10")
    for row in choice.table:
        print(f"{row.aligner:>12} {row.direction:>8}-side  recall@10 {row.score:.3f}")

    gallery, queries = rest[:1200], rest[1200:]
    if choice.direction == "gallery":
        found = top_k(new[queries], choice.aligner.transform(old[gallery]), 1)
    else:
        found = top_k(choice.aligner.transform(new[queries]), old[gallery], 1)
    hits = label_hits(labels[queries], labels[gallery], found.indices).mean()
    full = label_hits(labels[queries], labels[gallery], top_k(new[queries], new[gallery], 1).indices).mean()
    print(f"same digit found first: {hits:.1%} without embedding again, {full:.1%} with the new model throughout")


if __name__ == "__main__":
    main()
