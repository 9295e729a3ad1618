"""Race the rate within soft classes and the projection against their literal forms, and a fit against its size.

Targets: value and gradient as the literal form's (which makes every matrix and calls an LU log-determinant, as the
authors' successor code does), in less time; a fit's time linear in the images and its memory flat, where scikit-learn's
SpectralClustering grows with their square.

The system is the catalogue's ``mlc``.
"""

from functools import partial

import numpy as np
import torch
from sklearn.cluster import SpectralClustering

from _runner import growth, peak_in_child, race, save
from polyspan.cluster import DoublyStochastic, ManifoldLinearizingClustering, RateReductionLoss
from polyspan.data import planted_subspaces
from polyspan.linalg import class_coding_rate, coding_rate, coding_rate_gradient

EPS2, ETA = 0.1, 0.175
STEPS = ((256, 64), (512, 128), (1024, 128))
POINTS = (2_000, 8_000)
OPTIONS = {"hidden": 256, "n_components": 32, "batch_size": 256, "tcr_epochs": 1, "max_epochs": 2, "random_state": 0}


def unit(n, d):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(rows, dim=1)


def literal_rate(Z, memberships):
    n, d = Z.shape
    scaled = memberships.T.unsqueeze(2) * Z
    matrices = torch.eye(d) + d / (memberships.sum(0)[:, None, None] * EPS2) * (scaled.mT @ Z)
    return (memberships.sum(0) * torch.logdet(matrices)).sum() / (2 * n)


def literal_projection(C, rounds=5):
    """Half-steps of u and v in turn, each from all potentials, in the log domain; the gradient through v is cut."""
    logits = (C @ C.T).abs() / ETA
    u = v = torch.zeros(len(C))
    for half in range(rounds):
        if half % 2 == 0:
            u = u - torch.logsumexp(logits + u[:, None] + v, dim=1)
        else:
            v = (v - torch.logsumexp(logits + u[:, None] + v, dim=0)).detach()
    return (logits + u[:, None] + v).exp()


def step(rows, project, rate):
    Z = rows.clone().requires_grad_()
    value = rate(Z, project(Z))
    value.backward()
    return value.detach(), Z.grad


def exact(Z, memberships):
    return RateReductionLoss(EPS2).rates(Z, memberships)[1]


def top(Z, memberships):
    return RateReductionLoss(EPS2, top=32).rates(Z, memberships)[1]


def ground_floor(Z, memberships):
    return class_coding_rate(Z, memberships, EPS2**0.5)


def squares(_, memberships):
    return memberships.square().sum()


def points(n):
    return planted_subspaces(0, n_per=n // 10, d=40, k=4, n_subspaces=10, noise=0.05).points.astype(np.float32)


def peak(n):
    return peak_in_child(f"""
import numpy as np
from polyspan.cluster import ManifoldLinearizingClustering
from polyspan.io import read_array
made = ManifoldLinearizingClustering(10, membership_rows=1000, device="cpu", **{OPTIONS!r})
X = np.random.default_rng(0).normal(size=({n}, 40)).astype("f4")
made.fit(X[:600])
def main():
    made.fit(X)
""")


def main() -> None:
    torch.set_num_threads(1)
    steps, projections, gradients, agreement = [], [], [], {}
    for n, d in STEPS:
        rows, size = unit(n, d), {"n": n, "d": d}
        project = DoublyStochastic(ETA)
        rates = {
            "polyspan": exact,
            "literal": literal_rate,
            "autograd of linalg": ground_floor,
            "polyspan, top 32": top,
        }
        arms = {name: partial(step, rows, project, rate) for name, rate in rates.items()}
        steps.append(race("rate within soft classes, forward and backward", arms, size=size, repeats=3))
        found = {name: arm() for name, arm in arms.items()}
        agreement[f"{n} x {d}"] = {
            name: {
                "value": float(value),
                "gradient_off": float((gradient - found["literal"][1]).norm() / found["literal"][1].norm()),
            }
            for name, (value, gradient) in found.items()
        }
        pairs = {
            "polyspan": partial(step, rows, project, squares),
            "literal": partial(step, rows, literal_projection, squares),
        }
        projections.append(race("doubly stochastic projection, forward and backward", pairs, size=size, repeats=15))
        missed = {"polyspan": project(rows), "literal": literal_projection(rows)}
        agreement[f"{n} x {d}"]["columns miss 1 by"] = {k: float((g.sum(0) - 1).abs().max()) for k, g in missed.items()}

        def by_autograd(r=rows):
            Z = r.clone().requires_grad_()
            return torch.autograd.grad(coding_rate(Z, EPS2**0.5), Z)

        closed = {"closed form": lambda r=rows: coding_rate_gradient(r, EPS2**0.5), "autograd": by_autograd}
        gradients.append(race("gradient of the coding rate", closed, size=size, repeats=5))
    fits = []
    for n in POINTS:
        X = points(n)
        made = ManifoldLinearizingClustering(10, membership_rows=1000, device="cpu", **OPTIONS)
        spectral = SpectralClustering(10, random_state=0)
        arms = {
            "polyspan, 3 passes": lambda x=X, m=made: m.fit(x),
            "SpectralClustering": lambda x=X, s=spectral: s.fit(x),
        }
        fits.append(race("fit", arms, size={"n": n}, repeats=1, warmup=0))
    peaks = {str(n): peak(n) for n in (8_000, 32_000)}
    save(
        "manifold_linearizing",
        [*steps, *projections, *gradients, *fits],
        agreement=agreement,
        exponent_of_a_fit={arm: growth(fits, "n", arm) for arm in ("polyspan, 3 passes", "SpectralClustering")},
        peak_bytes_by_rows=peaks,
        peak_ratio=peaks["32000"] / peaks["8000"],
    )


if __name__ == "__main__":
    main()
