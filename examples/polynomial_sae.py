"""Find features of generated activations, and pairs that mean something else together than one by one.

The activations are sums of two of 20 directions; four pairs, met often, add a direction of their own, like a compound
whose sense is not in its words. A linear and a polynomial sparse autoencoder of equal size learn them, and the
polynomial one is asked which pairs interact.

The system is the catalogue's ``polysae``.
"""

import tempfile
from pathlib import Path

import numpy as np

from polyspan.io import write_array
from polyspan.learn import ActivationStore, PolySAE

PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))


def write_activations(path: Path, n: int, seed: int) -> None:
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    atoms, own = fixed.normal(size=(20, 16)), fixed.normal(size=(len(PAIRS), 16))
    chosen = np.argsort(rng.random((n, 20)), axis=1)[:, :2]
    which = rng.integers(2 * len(PAIRS), size=n)
    for i, pair in enumerate(PAIRS):
        chosen[which == i] = pair
    z = rng.uniform(0.75, 1.25, size=(n, 2))
    rows = (z[:, :, None] * atoms[chosen]).sum(axis=1)
    for i in range(len(PAIRS)):
        rows[which == i] += z[which == i].prod(axis=1, keepdims=True) * own[i]
    write_array(path, rows.astype(np.float16))


def main(n: int = 40_000, steps: int = 1_500) -> None:
    options = {
        "n_components": 20, "k": 2, "batch_size": 256, "max_tokens": 256 * steps, "learning_rate": 1e-2,
        "schedule": "cosine", "dead_after": 100, "random_state": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        past, later = Path(folder) / "past.npy", Path(folder) / "later.npy"
        write_activations(past, n, seed=0)
        write_activations(later, n // 10, seed=1)
        for order, said in ((1, "linear"), (3, "polynomial")):
            sae = PolySAE(order=order, ranks=(None, 8, 0), **options).fit(ActivationStore.from_files(past))
            found = sae.report(ActivationStore.from_files(later))
            print(
                f"{said:>10}: {found.unexplained:.2%} of the variance unexplained, {found.n_active:.2f} latents a row"
            )
        pairs = sae.interactions(ActivationStore.from_files(later), top=4)
        for latents, strength, share in zip(pairs.latents, pairs.strengths, pairs.shares, strict=True):
            print(
                f"latents {latents[0]:>2} and {latents[1]:>2}: strength {strength:.3f}, together in {share:.1%} of rows"
            )


if __name__ == "__main__":
    main()
