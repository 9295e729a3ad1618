"""Race the removal of position from sums against the published training, and its application against its planes.

Both fits work on features in memory. Published: 9 rounds of 5 passes of AdamW over sigmoid regressions; it would run
the backbone in every pass, which is left out here, in its favour. Applied: 18 directions at once against one after
another, copies included. Target: no less explained variance removed, in a fifth of the time.

The system is the catalogue's ``franca``.
"""

import numpy as np
import torch

from _runner import growth, race, save
from polyspan.cluster import PositionalDisentangler, position_r2
from polyspan.cluster._positions import grid_positions

SIZES = ((32, 16, 96), (64, 16, 192))
ROUNDS = 9


def features(n, side, d):
    """Noise, and 15 smooth functions of place in directions of their own, float32 (n, side, side, d)."""
    rng = np.random.default_rng(0)
    where = grid_positions(side, side)
    waves, phases = rng.normal(scale=2.5, size=(15, 2)), rng.uniform(0, 6.28, 15)
    code = np.cos(where @ waves.T + phases) * 0.85 ** np.arange(15)
    axes = np.linalg.qr(rng.normal(size=(d, 15)))[0]
    X = rng.standard_normal((n, side * side, d), dtype=np.float32)
    gain = np.exp(0.3 * rng.normal(size=(n, 1, 1)))
    return (X + 4 * gain * (code @ axes.T)).astype(np.float32).reshape(n, side, side, d)


def published_fit(X, steps_rate=2e-3):
    """Nine rounds of 5 passes over batches of 16 images; features are cleaned anew before every step, as published."""
    n, h, w, d = X.shape
    x = torch.as_tensor(X).reshape(n, h * w, d)
    t = torch.as_tensor(grid_positions(h, w), dtype=torch.float32).expand(n, -1, -1)
    generator, planes = torch.Generator().manual_seed(0), []
    for _ in range(ROUNDS):
        weight = torch.empty(2, d).uniform_(-(d**-0.5), d**-0.5, generator=generator).requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=steps_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5 * -(-n // 16))
        for _ in range(5):
            order = torch.randperm(n, generator=generator)
            for start in range(0, n, 16):
                part = order[start : start + 16]
                batch = published_apply(x[part], planes)
                optimizer.zero_grad(set_to_none=True)
                (torch.sigmoid(batch @ weight.T) - t[part]).square().mean().backward()
                optimizer.step()
                schedule.step()
        planes.append(weight.detach())
    return planes


def published_apply(x, planes):
    """Take each direction out of (b, n, d) by itself, with the direction repeated to the features' shape."""
    for weight in planes:
        row = weight[0] / weight[0].norm()
        column = weight[1] - (weight[1] @ row) * row
        column = column / column.norm()
        for direction in (row, column):
            repeated = direction.repeat(x.shape[0], x.shape[1], 1)
            x = x - (x * repeated).sum(dim=-1, keepdim=True) * repeated
    return x


def main() -> None:
    fits, applied, left = [], [], {}
    for n, side, d in SIZES:
        X = features(n, side, d)
        size = {"images": n, "patches": side * side, "d": d, "numbers": n * side * side * d}
        few, found = n > 32, []
        fit = PositionalDisentangler(ROUNDS, stop_r2=None).fit
        arms = {
            "polyspan, 9 rounds": lambda X=X, fit=fit: fit(X),
            "published training": lambda X=X, found=found: found.append(published_fit(X)),
        }
        erase = PositionalDisentangler(method="leace", targets="cosine")
        arms["polyspan, erasure of cosines"] = lambda X=X, e=erase: e.fit(X)
        fits.append(race("fit", arms, size=size, repeats=1 if few else 3, warmup=0 if few else 1))
        made, planes = fit(X), found[-1]
        flat = torch.as_tensor(X).reshape(n, side * side, d)
        arms = {
            "polyspan": lambda X=X, m=made: m.transform(X),
            "planes one by one": lambda x=flat, p=planes: published_apply(x, p),
        }
        applied.append(race("apply", arms, size=size, repeats=3))
        left[f"d={d}"] = {
            "before": position_r2(X),
            "ours": position_r2(made.transform(X)),
            "published": position_r2(published_apply(flat, planes).numpy().reshape(X.shape)),
            "erasure of cosines": position_r2(erase.transform(X)),
        }
    save(
        "positional_disentangling",
        fits + applied,
        growth_in_numbers={"fit": growth(fits, "numbers"), "apply": growth(applied, "numbers")},
        held_out_r2=left,
    )


if __name__ == "__main__":
    main()
