"""Race the correction against its literal dense form, and watch memory up to a million rows.

Targets: the full step at least 8 times as fast at 2,000 x 10,000 x 384, and a million rows of 384 in less than 4 GiB,
where the dense form would need 40 GB for its similarities alone.
"""

import numpy as np

from _runner import growth, peak_in_child, race, save
from polyspan.align import InverseGraphConvolution

D, BANK, SHARE = 384, 10_000, 0.01
ROWS = (2_000, 20_000, 200_000)
DENSE_ROWS = (2_000, 20_000)
MILLION = {"full": 10_000, "local": 1_000}


def unit(X):
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def rows(seed, n):
    return unit(np.random.default_rng(seed).standard_normal((n, D), dtype=np.float32) + np.float32(0.05))


def dense_full(G, B, r=1.0):
    """All similarities less their mean, times the bank."""
    S = G @ B.T
    return unit(G - r / len(B) * (S - S.mean()) @ B)


def dense_local(G, B, r=1.0):
    """A dense matrix of zeros, filled row by row with each row's largest similarities, times the bank."""
    S, k = G @ B.T, int(SHARE * len(B))
    A = np.zeros_like(S)
    for i in range(len(S)):
        near = np.argpartition(-S[i], k)[:k]
        A[i, near] = S[i, near]
    return unit(G - r / k * A @ B)


def peak(kind, n, bank, arm):
    """Peak of anonymous memory, bytes, of making n rows and correcting them in a fresh process."""
    run = (
        f"InverseGraphConvolution(adjacency={kind!r}, pool_share={SHARE}, mean='gallery').fit(B).transform(G)"
        if arm == "ours"
        else f"invgc.dense_{kind}(G, B)"
    )
    return peak_in_child(f"""
import sys
sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
import numpy as np
import invgc
from polyspan.align import InverseGraphConvolution
B = invgc.rows(1, {bank})
def main():
    G = np.random.default_rng(0).standard_normal(({n}, {D}), dtype=np.float32)
    {"G /= np.linalg.norm(G, axis=1, keepdims=True)" if arm == "dense" else ""}
    {run}
""")


def main() -> None:
    B = rows(1, BANK)
    fitted = {
        "full": InverseGraphConvolution(mean="gallery").fit(B),
        "local": InverseGraphConvolution(adjacency="local", pool_share=SHARE).fit(B),
    }
    literal = {"full": dense_full, "local": dense_local}
    records, off, peaks = {"full": [], "local": []}, {}, {}
    for n in ROWS:
        G = rows(0, n)
        for kind, estimator in fitted.items():
            arms = {f"polyspan, {kind}": lambda e=estimator, g=G: e.transform(g)}
            if n <= max(DENSE_ROWS):
                arms["the dense form"] = lambda f=literal[kind], g=G: f(g, B)
                off[f"{kind} {n}"] = float(np.abs(arms[f"polyspan, {kind}"]() - arms["the dense form"]()).max())
            few = n > min(DENSE_ROWS)
            records[kind].append(
                race(kind, arms, size={"n": n, "bank": BANK, "d": D}, repeats=1 if few else 3, warmup=0 if few else 1)
            )
        del G
    for kind in fitted:
        for n, arm in ((2_000, "ours"), (2_000, "dense"), (20_000, "ours"), (20_000, "dense")):
            peaks[f"{kind}, {n}, {arm}"] = peak(kind, n, BANK, arm)
            print(f"  {kind} {arm} at {n:,} rows: {peaks[f'{kind}, {n}, {arm}'] / 2**20:.0f} MiB", flush=True)
        peaks[f"{kind}, 200000, ours"] = peak(kind, 200_000, BANK, "ours")
    for kind, bank in MILLION.items():
        peaks[f"{kind}, 1000000, ours"] = peak(kind, 1_000_000, bank, "ours")
        print(f"  {kind} at 1,000,000 rows: {peaks[f'{kind}, 1000000, ours'] / 2**30:.2f} GiB", flush=True)
    save(
        "invgc",
        records["full"] + records["local"],
        growth_in_rows={kind: growth(found, "n") for kind, found in records.items()},
        largest_difference=off,
        peak_bytes=peaks,
        a_million_below_four_gib={kind: peaks[f"{kind}, 1000000, ours"] < 2**32 for kind in MILLION},
    )


if __name__ == "__main__":
    main()
