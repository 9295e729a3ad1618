"""Time and watch the clusterers that are trained, by number of points, beside the elastic net and spectral clustering.

The points and the processes are those of ``subspace_clusterers``. A method whose time would pass LIMIT_S takes, at the
sizes named in SHORTENED, a fixed number of steps instead of what it takes by itself, and the row says so: its time is
that of so many steps and of all that is done once, and its accuracy is that of a training that was cut off. On such
points, which are subspaces already, training has
nothing to learn: this is about cost, and what the methods are worth is in their claims.
"""

from _runner import save
from subspace_clusterers import METHODS, OURS, climb

SIZES = (500, 1_000, 2_000, 10_000, 100_000)
LIMIT_S = 600
LEARNED = {
    "low-rank mixture, EM": OURS + "LowRankGaussianMixture(10, 5, init='random', center=False, random_state=0)",
    "deep self-expression": OURS + "DeepSelfExpressiveClustering(10, subspace_dim=5, device='cpu', random_state=0)",
    "deep self-expression, Adam": OURS
    + "DeepSelfExpressiveClustering(10, subspace_dim=5, solver='adam', device='cpu', random_state=0)",
    "manifold linearizing": OURS + "ManifoldLinearizingClustering(10, device='cpu', random_state=0)",
    "nested prototypes": OURS + "NestedMatryoshkaClustering(10, device='cpu', random_state=0)",
}
SHORTENED = {
    "deep self-expression, Adam": {
        10_000: (
            OURS + "DeepSelfExpressiveClustering(10, subspace_dim=5, solver='adam', structure=False, tol=0.0, "
            "max_epochs=(0, 3, 0), device='cpu', random_state=0)",
            "3 steps of the first stage, of up to 1,000, and no second stage",
        )
    },
    "manifold linearizing": {
        100_000: (
            OURS + "ManifoldLinearizingClustering(10, tcr_epochs=1, max_epochs=1, device='cpu', random_state=0)",
            "1 pass of each stage, where the second takes 20",
        )
    },
}
BESIDE = ("elastic net", "scikit-learn spectral, 10 neighbours")


def main() -> None:
    codes = LEARNED | {name: METHODS[name] for name in BESIDE}
    found = {name: climb(name, code, SIZES, LIMIT_S, SHORTENED.get(name)) for name, code in codes.items()}
    save("learned_clusterers", [], by_size=found)


if __name__ == "__main__":
    main()
