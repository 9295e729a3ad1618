"""Race one training step of each kind of backward map, and the start in closed form against training from chance.

The peer is the step as the paper writes it: a strict map by the matrix exponential of a skew matrix, differentiated by
torch, one Adam step on all terms of the loss. Targets: our strict step several times as fast at width 512, and fewer
epochs than a tenth from the closed forms to the loss that a start by chance ends with.

Beside the times stand what older methods reach in the claim's planted world, in its two places.

The system is the catalogue's ``lambda-orthogonality``.
"""

import numpy as np
import torch

from _runner import growth, race, save
from polyspan.align import RelaxedOrthogonalAdapter, RidgeMap, backfill_curve, backfill_order, relaxed_orthogonality
from polyspan.align._paired_training import train
from polyspan.align.forward_compatible import FastFillMap, ForwardCompatibleMap
from polyspan.claims.lambda_orthogonality import planted, served
from polyspan.linalg import random_orthogonal

BATCH, STEPS = 512, 3
WIDTHS = (128, 256, 512)
ROWS = (20_000, 200_000)


def pair(n, d, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(64, size=n)
    new = rng.normal(size=(64, d))[labels] + 2 * rng.normal(size=(n, d))
    old = new @ random_orthogonal(d, rng=rng) + rng.normal(size=(n, d))
    return *(side / np.linalg.norm(side, axis=1, keepdims=True) for side in (new, old)), labels


def literal(new, old, labels, weight_of, penalty):
    """Take an Adam step a batch on the loss of the paper, written as its formulas stand; return the last loss."""
    d = new.shape[1]
    generator = torch.Generator().manual_seed(0)
    raw = (0.01 * torch.randn(d, d, generator=generator)).requires_grad_()
    bias, ahead_bias = (torch.zeros(d, requires_grad=True) for _ in range(2))
    ahead = (torch.randn(d, d, generator=generator) / d**0.5).requires_grad_()
    optimiser = torch.optim.Adam([raw, bias, ahead, ahead_bias], lr=1e-3)
    sides = torch.as_tensor(new).float(), torch.as_tensor(old).float(), torch.as_tensor(labels)

    def contrast(a, b, same):
        scores = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T / 0.1
        return torch.nn.functional.cross_entropy(scores, same)

    for x, h, y in zip(*(side.split(BATCH) for side in sides), strict=True):
        same = (y[:, None] == y[None]).float()
        same = same / same.sum(dim=1, keepdim=True)
        W = weight_of(raw)
        found, lifted = x @ W + bias, h @ ahead + ahead_bias
        loss = ((lifted - found) ** 2).sum(dim=1).mean() + ((found - h) ** 2).sum(dim=1).mean()
        loss = loss + contrast(lifted, found, same) + contrast(lifted, h, same) + penalty(W)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float(loss.detach())


def exponential(raw):
    upper = raw.triu(1)
    return torch.linalg.matrix_exp(upper - upper.T)


def paper_penalty(W):
    N = torch.sqrt(((W @ W.T - torch.eye(len(W))) ** 2).sum())
    return torch.sigmoid(N - 12) * N


def steps(mode, new, old, labels):
    """Take as many steps of ours, from the same kind of start."""
    generator = torch.Generator().manual_seed(0)
    model = RelaxedOrthogonalAdapter(mode, max_iter=1, batch_size=BATCH, device="cpu", init="random")
    start = model._start(new[:BATCH], old[:BATCH], old[:BATCH], generator)
    lam = 12.0 if mode == "relaxed" else float("inf")
    return train(start, (new, old, old), labels, model._recipe(lam), generator)


def fit(init, new, old, labels):
    model = RelaxedOrthogonalAdapter(init=init, max_iter=40, batch_size=BATCH, device="cpu", random_state=0)
    return model.fit(new, old, labels)


def epochs_to(target, history):
    """First epoch, from 1, whose loss is at most the target; None where none is."""
    totals = [sum(terms[name] for name in ("forward", "backward", "contrast", "penalty")) for terms in history]
    return next((i for i, total in enumerate(totals, start=1) if total <= target), None), totals[-1]


def literal_distances(lifted, labels):
    """Distances from class means by a loop over classes."""
    found = np.empty(len(lifted))
    for label in np.unique(labels):
        rows = labels == label
        found[rows] = np.linalg.norm(lifted[rows] - lifted[rows].mean(axis=0), axis=1)
    return np.argsort(-found, kind="stable")


class Lifted:
    """New vectors as they are, old ones lifted to them: what a map from old to new alone can offer."""

    def __init__(self, forward):
        self.forward = forward

    def transform(self, rows):
        return rows

    def transform_old(self, rows):
        return self.forward.transform(rows)


def reached_by_others():
    """Precision here and elsewhere of every kind of adapter, and the area of its order of backfilling; 3 seeds."""
    table = {}
    for seed in range(3):
        data = planted(seed)
        sides = data.anchors_new, data.anchors_old, data.anchor_labels
        same = {"max_iter": 30, "batch_size": 256, "random_state": seed, "device": "cpu"}
        small = {**same, "hidden": 256, "warmup": 2}
        made = {
            mode: RelaxedOrthogonalAdapter(mode, **same).fit(*sides)
            for mode in ("relaxed", "orthogonal", "affine", "srip")
        }
        made["soft orthogonality"] = RelaxedOrthogonalAdapter(lam=0.0, **same).fit(*sides)
        made["ridge"] = Lifted(RidgeMap().fit(*sides[1::-1]))
        made["FCT"] = Lifted(ForwardCompatibleMap(**small).fit(*sides[1::-1]))
        fastfill = FastFillMap(**small).fit(*sides[1::-1], sides[2])
        made["FastFill"] = Lifted(fastfill)
        for name, adapter in made.items():
            here, elsewhere = served(adapter, data)
            lifted, renewed = adapter.transform_old(data.test_old), adapter.transform(data.test_new)
            order = backfill_order(lifted, data.test_labels)
            if name == "FastFill":
                order = fastfill.backfill_order(data.test_old)
            area = backfill_curve(lifted, renewed, order, data.test_labels).area
            table.setdefault(name, []).append((here, elsewhere, area))
    found = {name: dict(zip(("here", "elsewhere", "backfilling"), np.round(np.mean(rows, axis=0), 4).tolist(), strict=True)) for name, rows in table.items()}  # noqa: E501 # fmt: skip
    for name, row in found.items():
        print(f"  {name}: {row}", flush=True)
    return found


def main() -> None:
    strict, relaxed, orders = [], [], []
    for d in WIDTHS:
        new, old, labels = pair(STEPS * BATCH, d)
        strict.append(
            race(
                f"{STEPS} strict steps",
                {
                    "polyspan": lambda: steps("orthogonal", new, old, labels),  # noqa: B023 - raced before the next
                    "matrix exponential": lambda: literal(new, old, labels, exponential, lambda W: 0.0),  # noqa: B023
                },
                size={"d": d, "batch": BATCH},
                repeats=3,
            )
        )
        relaxed.append(
            race(
                f"{STEPS} relaxed steps",
                {
                    "polyspan": lambda: steps("relaxed", new, old, labels),  # noqa: B023
                    "the formulas": lambda: literal(new, old, labels, lambda W: W, paper_penalty),  # noqa: B023
                },
                size={"d": d, "batch": BATCH},
                repeats=3,
            )
        )
    for n in ROWS:
        lifted, _, labels = pair(n, 64)
        arms = {"polyspan": lambda: backfill_order(lifted, labels), "loop over classes": lambda: literal_distances(lifted, labels)}  # noqa: B023, E501 # fmt: skip
        assert np.mean(arms["polyspan"]() == arms["loop over classes"]()) > 0.99
        orders.append(race("order of a gallery", arms, size={"n": n, "d": 64}, repeats=3))
    W = 1.2 * random_orthogonal(256, rng=np.random.default_rng(0))
    found, formula = (
        float(f(torch.as_tensor(W).float())) for f in (lambda M: relaxed_orthogonality(M, 12.0), paper_penalty)
    )
    new, old, labels = pair(2048, 128)
    chance = fit("random", new, old, labels)
    target = epochs_to(0.0, chance.history_)[1]
    started = fit("procrustes", new, old, labels)
    save(
        "relaxed_orthogonal",
        strict + relaxed + orders,
        growth_in_width={"strict": growth(strict, "d"), "relaxed": growth(relaxed, "d")},
        growth_of_the_peer_in_width=growth(strict, "d", "matrix exponential"),
        growth_in_rows=growth(orders, "n"),
        penalty_off_the_formula=abs(found - formula),
        epochs_to_the_loss_of_40_from_chance=epochs_to(target, started.history_)[0],
        reached=reached_by_others(),
        last_loss={"closed forms": epochs_to(0.0, started.history_)[1], "chance": target},
    )


if __name__ == "__main__":
    main()
