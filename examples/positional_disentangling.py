"""Take the place of patches out of their features, so that clusters follow what patches show.

Patches of six photographs, as a patch embedding with a code of place would describe them: log energies of their
derivatives, 96 numbers each, with the code added. The photographs are known, and serve to score the clusters.
"""

from sklearn.cluster import KMeans

from polyspan.claims.franca import mosaics
from polyspan.cluster import PositionalDisentangler, position_r2
from polyspan.linalg import clustering_accuracy

SETTINGS = {
    "9 rounds": {"n_rounds": 9},
    "rows and columns": {"method": "leace"},
    "15 cosines": {"method": "leace", "targets": "cosine"},
    "position means": {"method": "position_mean"},
}


def main(n: int = 40, n_init: int = 3) -> None:
    data = mosaics(0, n=n)  # (n, 16, 16, 96); dense features of your own model have this form
    half = n // 2
    known, rest, truth = data.items[:half], data.items[half:], data.labels[half:].ravel()

    def tell(name, features) -> None:
        groups = KMeans(6, n_init=n_init, random_state=0).fit_predict(features.reshape(len(truth), -1))
        score = clustering_accuracy(truth, groups)
        print(f"{name:>18}  R2 of place {position_r2(features):5.2f}, in the cluster of their photograph {score:.1%}")

    tell("untouched", rest)
    for name, options in SETTINGS.items():
        tell(name, PositionalDisentangler(**options).fit(known).transform(rest))


if __name__ == "__main__":
    main()
