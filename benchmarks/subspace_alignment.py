"""Race canonical correlation against scikit-learn's iteration, and local CKA against the kernels formed pair by pair.

Beside the times stand what other scorers of pairs find in two worlds of the claim, untuned.

Targets: the closed form of local CKA at least 10,000 times as fast on 300 anchors and 20 x 20 queries; 30,000 anchors
of 512 and 1,280 features in less than 5 s.

The system is the catalogue's ``plato-3d``.
"""

import time

import numpy as np
from sklearn.cross_decomposition import CCA

from _runner import growth, peak_in_child, race, save
from polyspan.align import CanonicalCorrelation, SubspaceAligner, crossmodal_scores, local_cka
from polyspan.align.pair_scorers import (
    ContrastiveProjections,
    KernelCanonicalCorrelation,
    PrincipalSubspaceAligner,
    RelativeRepresentation,
)
from polyspan.claims.plato_3d import on_digits, planted

ROWS = (1_000, 3_000)
D_X, D_Y, K = 384, 128, 10
ANCHORS, QUERIES = (100, 300), 20
LARGE = (30_000, 512, 1_280)


def views(n: int, d_x: int, d_y: int, seed: int = 0, shared: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(n, shared)) * np.linspace(2, 0.5, shared)
    return tuple(factors @ rng.normal(size=(shared, d)) + 2 * rng.normal(size=(n, d)) for d in (d_x, d_y))


def literal_local_cka(X: np.ndarray, Y: np.ndarray, A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """For every pair: both kernels of the anchors with the pair appended, centred by products with H, and their CKA."""
    n = len(X) + 1
    H = np.eye(n) - 1 / n

    def hsic(K, L):
        return np.trace(K @ H @ L @ H) / (n - 1) ** 2

    scores = np.zeros((len(A), len(B)))
    for i, a in enumerate(A):
        K = np.vstack([X, a]) @ np.vstack([X, a]).T
        for j, b in enumerate(B):
            L = np.vstack([Y, b]) @ np.vstack([Y, b]).T
            scores[i, j] = hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))
    return scores


def streamed_peak(n: int) -> int:
    """Peak of anonymous memory, bytes, of a fit on n anchors that are made batch by batch, in a fresh process."""
    return peak_in_child(f"""
import numpy as np
from polyspan.align import SubspaceAligner
def main():
    rng, aligner = np.random.default_rng(0), SubspaceAligner(50)
    for start in range(0, {n}, 2000):
        X = rng.normal(size=(2000, {D_X}))
        aligner.partial_fit(X, X[:, :{D_Y}] + rng.normal(size=(2000, {D_Y})), solve=start + 2000 >= {n})
""")


def found_by_others() -> dict[str, dict[str, dict[str, float]]]:
    """Shares of partners matched and found among five, mean of 3 seeds, by every scorer with its own defaults."""
    made = {
        "canonical subspaces, affine": lambda: SubspaceAligner(10, reg=1e-2),
        "canonical subspaces, local CKA": lambda: SubspaceAligner(10, method="local_cka", reg=1e-2),
        "relative representations": RelativeRepresentation,
        "PCA then ridge": PrincipalSubspaceAligner,
        "SVCCA": lambda: PrincipalSubspaceAligner(0.99, route="cca"),
        "kernel CCA": KernelCanonicalCorrelation,
        "kernel CCA, 300 landmarks": lambda: KernelCanonicalCorrelation(n_landmarks=300),
        "trained projections": lambda: ContrastiveProjections(device="cpu"),
    }
    table = {}
    for world in (planted, on_digits):
        data = [world(seed) for seed in range(3)]
        table[world.__name__] = {"chance": {"top_k": 5 / len(data[0].queries_x)}}
        for name, make in made.items():
            told = [crossmodal_scores(make().fit(*pairs[:2]), *pairs[2:]) for pairs in data]
            table[world.__name__][name] = {
                what: round(float(np.mean([one[what] for one in told])), 4) for what in ("matching", "top_k")
            }
            print(f"  {world.__name__}, {name}: {table[world.__name__][name]}", flush=True)
    return table


def main() -> None:
    fits, scores, off = [], [], {}
    for n in ROWS:
        X, Y = views(n, D_X, D_Y)
        ours = CanonicalCorrelation(K, reg=0.0)
        theirs = CCA(K, scale=False, max_iter=2000)
        arms = {
            "polyspan": lambda e=ours, x=X, y=Y: e.fit(x, y),
            "scikit-learn": lambda e=theirs, x=X, y=Y: e.fit(x, y),
        }
        size = {"n": n, "d_x": D_X, "d_y": D_Y, "k": K}
        fits.append(race("canonical correlation", arms, size=size, repeats=2 if n == min(ROWS) else 1, warmup=0))
        a, b = theirs.transform(X, Y)
        found = np.array([np.corrcoef(p, q)[0, 1] for p, q in zip(a.T, b.T, strict=True)])
        off[f"correlations, {n}"] = float(np.abs(np.sort(found)[::-1] - ours.fit(X, Y).correlations_).max())
    for n in ANCHORS:
        X, Y = views(n + QUERIES, D_X, D_Y)
        args = X[QUERIES:], Y[QUERIES:], X[:QUERIES], Y[:QUERIES]
        kept = {}

        def literal(a=args, kept=kept):
            kept["scores"] = literal_local_cka(*a)

        local_cka(*args)
        arms = {"polyspan": lambda a=args: local_cka(*a), "pair by pair": literal}
        size = {"n": n, "queries": QUERIES, "d_x": D_X, "d_y": D_Y}
        scores.append(race("local CKA", arms, size=size, repeats=1 if n > 100 else 3, warmup=0))
        off[f"local CKA, {n}"] = float(np.abs(local_cka(*args) - kept["scores"]).max())
    X, Y = (rows.astype(np.float32) for rows in views(*LARGE))
    start = time.perf_counter()
    aligner = SubspaceAligner(50).fit(X, Y)
    large_s = time.perf_counter() - start
    print(f"  30,000 anchors of 512 and 1,280 features: {large_s:.2f} s", flush=True)
    start = time.perf_counter()
    aligner.match(X[:2000], Y[:2000])
    match_s = time.perf_counter() - start
    peaks = {str(n): streamed_peak(n) for n in (10_000, 40_000)}
    save(
        "subspace_alignment",
        fits + scores,
        growth_in_rows=growth(fits, "n"),
        growth_in_anchors={"polyspan": growth(scores, "n"), "pair by pair": growth(scores, "n", "pair by pair")},
        largest_difference=off,
        fit_of_30000_anchors_s=large_s,
        match_of_2000_s=match_s,
        streamed_peak_bytes=peaks,
        found=found_by_others(),
        ten_thousand_times_at_300={"met": scores[-1]["ratio"]["pair by pair"]["median"] > 10_000},
    )


if __name__ == "__main__":
    main()
