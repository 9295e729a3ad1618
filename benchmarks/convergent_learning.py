"""Race the shared-Gram Lasso against scikit-learn's, target by target, and the streamed comparison against the pieces
that one would put together; watch memory.

Targets: more than five times as fast as a loop of scikit-learn's Lasso, and a peak that does not grow with the rows.
"""

import warnings

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import SpectralClustering
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso

from _runner import growth, peak_in_child, race, save
from polyspan.align import SparseUnitMapping, UnitCoClustering, compare_networks, match_units, unit_correlations
from polyspan.linalg import PairedMoments

ALPHAS = (1e-1, 1e-2, 1e-3)
GROUPS = 16


def make(n, d, seed=0):
    """Two layers of rectified units that see the same d / 4 factors."""
    rng = np.random.default_rng(seed)
    Z = rng.normal(size=(n, d // 4))
    return [np.maximum(Z @ rng.normal(size=(d // 4, d)) + 0.5 * rng.normal(size=(n, d)), 0) for _ in range(2)]


def standard(X):
    return (X - X.mean(0)) / X.std(0)


def loop(X, Y, *, shared):
    """One scikit-learn Lasso a target and penalty; with ``shared`` all use one Gram matrix and warm starts."""
    X, Y = standard(X), standard(Y)
    weights = np.zeros((len(ALPHAS), Y.shape[1], X.shape[1]))
    gram = X.T @ X if shared else False
    for j in range(Y.shape[1]):
        fitted = Lasso(precompute=gram, fit_intercept=False, warm_start=shared, tol=1e-6, max_iter=5000)
        for i, alpha in enumerate(ALPHAS):
            weights[i, j] = fitted.set_params(alpha=alpha).fit(X, Y[:, j]).coef_
    return weights


def ours(X, Y):
    return SparseUnitMapping(alpha=ALPHAS[0], alphas=ALPHAS, tol=1e-6).fit(X, Y).coef_path_


def objective(X, Y, weights):
    X, Y = standard(X), standard(Y)
    paths = zip(ALPHAS, weights, strict=True)
    return float(np.mean([0.5 * np.mean((Y - X @ w.T) ** 2, axis=0) + a * np.abs(w).sum(1) for a, w in paths]))


def by_hand(X, Y):
    """Correlations by np.corrcoef on all rows, and SciPy's assignment."""
    between = np.corrcoef(X, Y, rowvar=False)[: X.shape[1], X.shape[1] :]
    return linear_sum_assignment(between, maximize=True)


def spectral_by_hand(X, Y):
    """The same graph of units, by np.corrcoef, given to scikit-learn's spectral clustering."""
    affinity = np.abs(np.corrcoef(X, Y, rowvar=False))
    return SpectralClustering(GROUPS, affinity="precomputed", n_init=10, random_state=0).fit_predict(affinity)


def streamed(X, Y):
    moments = PairedMoments(X.shape[1], Y.shape[1])
    for start in range(0, len(X), 8192):
        moments.update(X[start : start + 8192], Y[start : start + 8192])
    return match_units(unit_correlations(moments).between)


def peak(n):
    """Peak of anonymous memory, bytes, of comparing two memory-mapped files in a fresh process."""
    return peak_in_child(f"""
import tempfile
from pathlib import Path
import numpy as np
from polyspan.align import compare_networks
from polyspan.io import EmbeddingWriter
compare_networks(*np.random.default_rng(0).normal(size=(2, 64, 4)), n_shuffles=1, random_state=0)
folder = tempfile.TemporaryDirectory()
paths = [Path(folder.name) / name for name in ("a.npy", "b.npy")]
for i, path in enumerate(paths):
    rng = np.random.default_rng(i)
    with EmbeddingWriter(path, dim=64, dtype=np.float32, n_rows={n}) as writer:
        for start in range(0, {n}, 8192):
            writer.write(rng.normal(size=(min(8192, {n} - start), 64)).astype(np.float32))
def main():
    compare_networks(*paths, n_shuffles=2, batch_rows=8192, random_state=0)
""")


def main() -> None:
    warnings.simplefilter("ignore", ConvergenceWarning)
    lasso, matching, spectral, whole, excess = [], [], [], [], {}
    for n, d in ((2_000, 64), (8_000, 128)):
        X, Y = make(n, d)
        lasso.append(
            race(
                "few to one, three penalties",
                {
                    "polyspan SparseUnitMapping": lambda x=X, y=Y: ours(x, y),
                    "scikit-learn Lasso in a loop": lambda x=X, y=Y: loop(x, y, shared=False),
                    "the same on one Gram matrix, warm starts": lambda x=X, y=Y: loop(x, y, shared=True),
                },
                size={"n": n, "d": d},
                repeats=3,
            )
        )
        exact = objective(X, Y, SparseUnitMapping(alpha=ALPHAS[0], alphas=ALPHAS, tol=1e-12).fit(X, Y).coef_path_)
        excess[str(d)] = {
            "polyspan": objective(X, Y, ours(X, Y)) - exact,
            "scikit-learn": objective(X, Y, loop(X, Y, shared=True)) - exact,
        }
    for n, d in ((20_000, 128), (80_000, 128)):
        X, Y = make(n, d)
        options = {"size": {"n": n, "d": d}, "repeats": 3}
        arms = {
            "polyspan, streamed": lambda x=X, y=Y: streamed(x, y),
            "NumPy and SciPy": lambda x=X, y=Y: by_hand(x, y),
        }
        matching.append(race("correlate and match", arms, **options))
        arms = {
            "polyspan UnitCoClustering": lambda x=X, y=Y: UnitCoClustering(GROUPS, random_state=0).fit(x, y),
            "scikit-learn SpectralClustering": lambda x=X, y=Y: spectral_by_hand(x, y),
        }
        spectral.append(race("many to many, 16 groups", arms, **options))
        report = {"polyspan compare_networks": lambda x=X, y=Y: compare_networks(x, y, n_shuffles=5, random_state=0)}
        whole.append(race("whole report, 5 shuffles", report, **options))
    peaks = {str(n): peak(n) for n in (50_000, 200_000)}
    save(
        "convergent_learning",
        lasso + matching + spectral + whole,
        exponent_in_rows=growth(whole, "n"),
        exponent_in_units_of_the_lasso=growth(lasso, "d"),
        objective_above_the_least=excess,
        peak_bytes_by_rows=peaks,
        peak_growth=peaks["200000"] / peaks["50000"],
    )


if __name__ == "__main__":
    main()
