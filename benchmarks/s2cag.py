"""Race S2CAG against scikit-learn's spectral clustering and the paper's algorithm step by step, and watch memory.

Targets: time linear in edges, 50,000 vertices in less than 1 GiB, and the exact subspace where the literal form is
degrees off. The work is linear, and is counted beside the time; where the blocks of vectors leave a cache, time takes a
step, so the exponent is given between neighbouring sizes too.
"""

import itertools
import warnings

import numpy as np
import scipy.sparse as sp
from sklearn.cluster import SpectralClustering
from sklearn.feature_extraction.text import TfidfTransformer

from _runner import growth, peak_in_child, race, save
from polyspan.cluster import S2CAG, ModularityS2CAG
from polyspan.cluster._graph_smoothing import Smoothing
from polyspan.data import planted_graph
from polyspan.linalg import clustering_accuracy, principal_angles

K, D = 8, 500
WORLD = {"n_clusters": K, "d": D, "degree": 10.0, "mixing": 0.4, "words": 20.0, "topic_share": 0.3}
SIZES, RACED = (5_000, 20_000, 80_000, 200_000), (1_000, 4_000)


def slim(M):
    M = sp.csr_array(M).astype(np.float64)
    return sp.csr_array((M.data, M.indices.astype(np.int32), M.indptr.astype(np.int32)), shape=M.shape)


def make(n):
    world = planted_graph(0, n=n, **WORLD)
    return slim(world.adjacency), slim(world.attributes), world.labels


def literal(A, X, k, *, order=10, decay=0.9, n_iter=7):
    """The published algorithm as its steps say: dense attributes, plain power iteration, one start of the rounding."""
    n = A.shape[0]
    eye = sp.eye_array(n, format="csr")
    A = A + eye
    scale = sp.diags_array(np.asarray(A.sum(axis=1)).ravel() ** -0.5)
    A = scale @ A @ scale + eye
    P = sp.csr_array(sp.diags_array(1 / np.asarray(A.sum(axis=1)).ravel()) @ A)
    X = TfidfTransformer().fit_transform(X).toarray()
    degree = X @ X.sum(axis=0)
    X = X / np.sqrt(np.where(degree > 0, degree, 1))[:, None]
    Z = X
    for _ in range(order):
        Z = decay * (P @ Z) + X
    Q = np.random.default_rng(0).normal(size=(X.shape[1], k + 1 + 10))
    Q = Z @ Q
    for _ in range(n_iter):
        Q = Z @ (Z.T @ Q)
    Q = np.linalg.qr(Q)[0]
    Y = (Q @ np.linalg.svd(Q.T @ Z, full_matrices=False)[0])[:, 1 : k + 1]
    labels = Y.argmax(axis=1)
    for _ in range(100):
        C = np.eye(k)[labels]
        C /= np.sqrt(np.maximum(C.sum(axis=0), 1))
        labels = (Y @ (Y.T @ C)).argmax(axis=1)
    return Y, labels


def peak(n):
    """Peak of anonymous memory, bytes, of drawing a graph and one fit in a fresh process."""
    return peak_in_child(f"""
from polyspan.cluster import S2CAG
from polyspan.data import planted_graph
S2CAG(2, random_state=0).fit([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
def main():
    world = planted_graph(0, n={n}, **{WORLD!r})
    S2CAG({K}, random_state=0).fit(world.attributes, adjacency=world.adjacency)
""")


def multiplications(A, X):
    """Multiplications by entries of the graph in one fit, counted as the fit runs; None where it holds Z instead."""
    counted = []
    products = {name: getattr(Smoothing, name) for name in ("_along", "_against")}

    def counting(name):
        def product(self, Y):
            counted.append(self.N.nnz * (len(self.weights) - 1) * Y.shape[1])
            return products[name](self, Y)

        return product

    for name in products:
        setattr(Smoothing, name, counting(name))
    fitted = S2CAG(K, random_state=0).fit(X, adjacency=A)
    for name, product in products.items():
        setattr(Smoothing, name, product)
    return None if fitted.precomputed_ else sum(counted)


def work_growth(work):
    """Exponent of the multiplications in edges, over the sizes at which Z is applied and not held."""
    edges, counted = zip(*((e, w) for e, w in work.items() if w is not None), strict=True)
    return float(np.polyfit(np.log(edges), np.log(counted), 1)[0])


def main() -> None:
    warnings.filterwarnings("ignore", message="Graph is not fully connected")
    races, alone, quality, peaks, work = [], [], {}, {}, {}
    for n in RACED:
        A, X, labels = make(n)
        ours = S2CAG(K, random_state=0)
        spectral = SpectralClustering(K, affinity="precomputed", random_state=0)
        races.append(
            race(
                "cluster a graph",
                {
                    "polyspan S2CAG": lambda a=A, x=X, o=ours: o.fit(x, adjacency=a),
                    "the paper's steps": lambda a=A, x=X: literal(a, x, K),
                    "scikit-learn SpectralClustering, graph only": lambda a=A, s=spectral: s.fit(a),
                },
                size={"n": n, "edges": A.nnz // 2, "d": D},
                repeats=3,
            )
        )
        exact = S2CAG(K, tol=1e-12, random_state=0).fit(X, adjacency=A).embedding_
        Y, theirs = literal(A, X, K)
        quality[str(n)] = {
            "degrees_off": {
                "polyspan": float(np.degrees(principal_angles(exact, ours.embedding_).max())),
                "the paper's steps": float(np.degrees(principal_angles(exact, Y).max())),
            },
            "accuracy": {
                "polyspan": clustering_accuracy(labels, ours.labels_),
                "the paper's steps": clustering_accuracy(labels, theirs),
                "scikit-learn, graph only": clustering_accuracy(labels, spectral.labels_),
            },
        }
    for n in SIZES:
        A, X, _ = make(n)
        options = {"size": {"n": n, "edges": A.nnz // 2, "d": D}, "repeats": 3}
        fits = {
            "polyspan S2CAG": lambda a=A, x=X: S2CAG(K, random_state=0).fit(x, adjacency=a),
            "by modularity": lambda a=A, x=X: ModularityS2CAG(K, random_state=0).fit(x, adjacency=a),
            "in float32": lambda a=A, x=X: S2CAG(K, dtype=np.float32, random_state=0).fit(x, adjacency=a),
        }
        alone.append(race("growth", fits, **options))
        work[A.nnz // 2] = multiplications(A, X)
        print(f"  multiplications by entries of the graph: {work[A.nnz // 2]}", flush=True)
    for n in (12_500, 50_000):
        peaks[str(n)] = peak(n)
        print(f"  peak of memory at {n:,} vertices: {peaks[str(n)] / 2**20:.0f} MiB", flush=True)
    save(
        "s2cag",
        races + alone,
        exponent_in_edges=growth(alone, "edges"),
        exponent_between_sizes=[growth(pair, "edges") for pair in itertools.pairwise(alone)],
        multiplications_by_edges={str(edges): counted for edges, counted in work.items()},
        exponent_of_multiplications=work_growth(work),
        quality=quality,
        peak_bytes_by_vertices=peaks,
        peak_exponent=float(np.log(peaks["50000"] / peaks["12500"]) / np.log(4)),
        below_one_gib=peaks["50000"] < 2**30,
    )


if __name__ == "__main__":
    main()
