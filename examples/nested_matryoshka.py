"""Cluster handwritten digits from coarse to fine, and keep only the first numbers of their features."""

from sklearn.neighbors import KNeighborsClassifier

from polyspan.cluster import NestedMatryoshkaClustering
from polyspan.data import digits
from polyspan.linalg import clustering_accuracy


def main(steps: int = 60) -> None:
    X, y = digits()
    images, half = X.reshape(-1, 8, 8), len(X) // 2
    options = {"hidden": 64, "bottleneck": 32, "n_layers": 2, "batch_size": 128, "lr": 3e-3, "random_state": 0}
    made = NestedMatryoshkaClustering(10, max_steps=steps, device="cpu", **options).fit(images)
    print(f"10 clusters, digits in that of their class: {clustering_accuracy(y, made.labels_):.1%}")
    for width, count, used in zip(made.widths_, made.n_prototypes_, made.history_[-1]["used"], strict=True):
        Z = made.transform(images, width=width)
        score = KNeighborsClassifier(5).fit(Z[:half], y[:half]).score(Z[half:], y[half:])
        print(
            f"first {width:2} of 64 numbers: {score:.1%} named by neighbours; {used:.0f} of {count} prototypes in use"
        )


if __name__ == "__main__":
    main()
