"""Take the hubs out of a gallery before it goes into an index.

The vectors are generated: 250 items embedded twice, as gallery and as queries, and all drawn towards one direction,
some more than others. A bank of 500 other items makes the correction; 250 more choose its rates.

The system is the catalogue's ``invgc``.
"""

import numpy as np
from sklearn.preprocessing import normalize

from polyspan.align import InverseGraphConvolution, hubness, mean_pairwise_cosine
from polyspan.linalg import recall_at_k, top_k


def two_views(rng: np.random.Generator, direction: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    items = rng.normal(size=(n, len(direction))) / np.sqrt(len(direction))

    def view() -> np.ndarray:
        blur = 0.8 * rng.normal(size=items.shape) / np.sqrt(len(direction))
        return normalize(items + blur + 2 * rng.lognormal(sigma=0.6, size=(n, 1)) * direction)

    return view(), view()


def main() -> None:
    rng = np.random.default_rng(0)
    direction = rng.normal(size=48)
    direction /= np.linalg.norm(direction)
    (gallery, queries), (bank, asked), (known, answers) = (two_views(rng, direction, n) for n in (250, 500, 250))

    def tell(name: str, rows: np.ndarray) -> None:
        found = recall_at_k(top_k(queries, rows, 1).indices, np.arange(len(queries)))
        uneven = hubness(queries, rows)
        print(
            f"{name:>12}  found first {found:.1%}, skewness of returns {uneven.skewness:.2f}, "
            f"never returned {uneven.never_share:.1%}, mean cosine {mean_pairwise_cosine(rows):.2f}"
        )

    tell("as it is", gallery)
    for adjacency in ("full", "local"):
        correction = InverseGraphConvolution(adjacency=adjacency, pool_share=0.1).fit(bank, queries=asked)
        choice = correction.tune(known, answers)
        tell(adjacency, correction.transform(gallery))
        print(f"{'':>12}  rates chosen: {choice.rate_gallery:g} off the gallery, {choice.rate_query:g} off the queries")


if __name__ == "__main__":
    main()
