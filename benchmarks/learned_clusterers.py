"""Time and watch the clusterers that are trained, by number of points, beside the elastic net and spectral clustering.

The points and the processes are those of ``subspace_clusterers``; these methods take longer, so that the sizes are
smaller and a method stops where its time would pass LIMIT_S. On such points, which are subspaces already, training has
nothing to learn: this is about cost, and what the methods are worth is in their claims.
"""

from _runner import save
from subspace_clusterers import METHODS, OURS, climb

SIZES = (500, 1_000, 2_000, 10_000, 100_000)
LIMIT_S = 300
LEARNED = {
    "low-rank mixture, EM": OURS + "LowRankGaussianMixture(10, 5, init='random', center=False, random_state=0)",
    "deep self-expression": OURS + "DeepSelfExpressiveClustering(10, subspace_dim=5, device='cpu', random_state=0)",
    "deep self-expression, Adam": OURS
    + "DeepSelfExpressiveClustering(10, subspace_dim=5, solver='adam', device='cpu', random_state=0)",
    "manifold linearizing": OURS + "ManifoldLinearizingClustering(10, device='cpu', random_state=0)",
    "nested prototypes": OURS + "NestedMatryoshkaClustering(10, device='cpu', random_state=0)",
}
BESIDE = ("elastic net", "scikit-learn spectral, 10 neighbours")


def main() -> None:
    codes = LEARNED | {name: METHODS[name] for name in BESIDE}
    save("learned_clusterers", [], by_size={name: climb(name, code, SIZES, LIMIT_S) for name, code in codes.items()})


if __name__ == "__main__":
    main()
