"""Time and watch every subspace clusterer from 1,000 to 100,000 points, beside scikit-learn's spectral clustering.

Points lie near ten subspaces of five dimensions in R^30. Each fit runs in a process of its own, once a size, on one
thread; accuracy stands beside, since a fast wrong answer is no news. A method stops where its time would pass LIMIT_S,
or its n x n matrices the memory: which of the two is said. The two smaller sizes are raced in turns.
"""

import json
import math
import subprocess
import sys
import warnings
from functools import partial

from sklearn.cluster import SpectralClustering

from _runner import growth, race, save
from polyspan.cluster import ElasticNetSubspaceClustering, ThresholdingSubspaceClustering
from polyspan.data import planted_subspaces
from polyspan.run import available_memory_bytes

SIZES, RACED = (1_000, 4_000, 16_000, 100_000), (1_000, 4_000)
LIMIT_S = 600
K = 10
OURS = "from polyspan.cluster import *; made = "
SKLEARN = "from sklearn.cluster import SpectralClustering; made = SpectralClustering"
METHODS = {
    "elastic net": OURS + "ElasticNetSubspaceClustering(10, n_init=10, random_state=0)",
    "matching pursuit": OURS + "OMPSubspaceClustering(10, n_nonzero=5, n_init=10, random_state=0)",
    "thresholding": OURS + "ThresholdingSubspaceClustering(10, n_neighbors=10, n_init=10, random_state=0)",
    "least squares": OURS + "LeastSquaresSubspaceClustering(10, n_init=10, random_state=0)",
    "least squares, squared": OURS + "LeastSquaresSubspaceClustering(10, power=2, n_init=10, random_state=0)",
    "least squares, 10 kept": OURS + "LeastSquaresSubspaceClustering(10, n_kept=10, n_init=10, random_state=0)",
    "k-means": "from sklearn.cluster import KMeans; made = KMeans(10, n_init=10, random_state=0)",
    "scikit-learn spectral, rbf": SKLEARN + "(10, n_init=10, random_state=0)",
    "scikit-learn spectral, 10 neighbours": SKLEARN + "(10, affinity='nearest_neighbors', n_init=10, random_state=0)",
}
# Float64 matrices of n x n that are held at once.
DENSE = {"least squares": 1.5, "scikit-learn spectral, rbf": 3, "deep self-expression, Adam": 3.5}


def world(n):
    made = planted_subspaces(0, n_per=n // K, d=30, k=5, n_subspaces=K, noise=0.01)
    return made.points.astype("float32"), made.labels


def once(code, n):
    """Return seconds, peak bytes above the start, and accuracy of one fit in a fresh process."""
    source = f"""
import json, warnings
warnings.simplefilter("ignore")
{code}
from polyspan.data import planted_subspaces
from polyspan.linalg import clustering_accuracy
from polyspan.run import measure_peak
made.fit(planted_subspaces(1, n_per=40, d=30, k=5, n_subspaces=10).points.astype("float32"))
world = planted_subspaces(0, n_per={n // K}, d=30, k=5, n_subspaces={K}, noise=0.01)
rows = world.points.astype("float32")
found = measure_peak(lambda: made.fit(rows))
told = {{"seconds": found.wall_s, "peak_mb": found.peak_bytes / 2**20}}
print(json.dumps(told | {{"accuracy": clustering_accuracy(world.labels, made.labels_)}}))
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def foreseen(rows, n):
    """Return seconds at n: the growth between the last two sizes, and a third of a power more, but n² at most."""
    if len(rows) < 2:
        return 0.0
    one, two = rows[-2:]
    power = min(math.log(two["seconds"] / one["seconds"]) / math.log(two["n"] / one["n"]) + 1 / 3, 2)
    return two["seconds"] * (n / two["n"]) ** power


def climb(name, code, sizes=SIZES, limit_s=LIMIT_S, shortened=None):
    """Run one method size by size until it would take too long or too much.

    ``shortened`` says, for a size, with what other code it is run there, and in words what that leaves out.
    """
    rows, shortened = [], shortened or {}
    for n in sizes:
        needed = DENSE.get(name, 0) * n * n * 8
        if needed > 0.8 * available_memory_bytes():
            rows.append({"n": n, "stopped": f"needs {needed / 2**30:.0f} GiB for matrices of n x n"})
            break
        if n in shortened:
            short, words = shortened[n]
            rows.append({"n": n, "shortened": words} | once(short, n))
            continue
        guess = foreseen([row for row in rows if "seconds" in row], n)
        if guess > limit_s:
            rows.append({"n": n, "stopped": f"would take some {guess:.0f} s"})
            break
        rows.append({"n": n} | once(code, n))
    for row in rows:
        if "stopped" in row:
            print(f"{name:>38} n={row['n']:>7,}  {row['stopped']}", flush=True)
        else:
            told = f"{row['seconds']:8.2f} s  {row['peak_mb']:8.0f} MiB  accuracy {row['accuracy']:.3f}"
            print(f"{name:>38} n={row['n']:>7,}  {told}  {row.get('shortened', '')}".rstrip(), flush=True)
    return rows


def main() -> None:
    warnings.filterwarnings("ignore", message="Graph is not fully connected")
    warnings.filterwarnings("ignore", message="the affinity falls into")
    races = []
    for n in RACED:
        rows, _ = world(n)
        peer = {"affinity": "nearest_neighbors", "n_init": 10, "random_state": 0}
        arms = {
            "thresholding": ThresholdingSubspaceClustering(K, n_neighbors=10, n_init=10, random_state=0),
            "elastic net": ElasticNetSubspaceClustering(K, n_init=10, random_state=0),
            "scikit-learn spectral, 10 neighbours": SpectralClustering(K, **peer),
        }
        repeats = 5 if n == RACED[0] else 3
        fits = {name: partial(made.fit, rows) for name, made in arms.items()}
        races.append(race("fit", fits, size={"n": n}, repeats=repeats))
    table = {name: climb(name, code) for name, code in METHODS.items()}
    notes = {arm: growth(races, "n", arm) for arm in races[0]["seconds"]}
    save("subspace_clusterers", races, exponent_in_n=notes, by_size=table)


if __name__ == "__main__":
    main()
