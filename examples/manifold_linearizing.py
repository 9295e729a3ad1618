"""Cluster handwritten digits without labels: learn features in which every digit is a subspace of its own.

Views of one image, turned and shifted a little, are all that the network is told.

The system is the catalogue's ``mlc``.
"""

from sklearn.cluster import KMeans

from polyspan.cluster import ImageJitter, ManifoldLinearizingClustering
from polyspan.data import digits
from polyspan.linalg import clustering_accuracy


def main() -> None:
    X, y = digits()
    options = {"image_shape": (8, 8), "augment": ImageJitter(), "n_components": 32, "hidden": 128, "batch_size": 128}
    options |= {"random_state": 0, "device": "cpu"}
    start = ManifoldLinearizingClustering(10, tcr_epochs=12, max_epochs=0, **options).fit(X[:1500])
    made = ManifoldLinearizingClustering(10, init=start.module_, max_epochs=8, **options).fit(X[:1500])

    found = {
        "k-means on pixels": KMeans(10, n_init=10, random_state=0).fit_predict(X[:1500]),
        "initial memberships": start.labels_,
        "after rate reduction": made.labels_,
    }
    for name, labels in found.items():
        print(f"{name:>22}  {clustering_accuracy(y[:1500], labels):.1%}")
    first, last = made.history_[0], made.history_[-1]
    print(
        f"rate of all features {first['rate']:.1f} -> {last['rate']:.1f} nats, "
        f"within clusters {first['class_rate']:.1f} -> {last['class_rate']:.1f}"
    )
    print(f"directions that a cluster fills: {sorted(made.numerical_rank_.tolist())} of {made.overall_rank_} in all")
    print(f"{'297 new images':>22}  {clustering_accuracy(y[1500:], made.predict(X[1500:])):.1%}")


if __name__ == "__main__":
    main()
