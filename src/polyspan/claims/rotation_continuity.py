"""Claim: a network that outputs rotations in six numbers errs less than one that outputs quaternions."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from polyspan.claims import Claim
from polyspan.linalg import nearest_rotation
from polyspan.nn import random_rotation

SIZES = {"rotation6d": 6, "rotation9d": 9, "quaternion": 4, "axis_angle": 3, "euler": 3}
DISCONTINUOUS = ("quaternion", "axis_angle", "euler")
OPTIONS = {"quaternion": {"order": "wxyz"}, "euler": {"sequence": "XYZ"}}
RATES = (3e-3, 1e-2)
WIDTH, BATCH, PASSES, LEAST_STEPS = 64, 64, 5, 300
CAP = math.radians(60)
LARGE = 45_000


class Posed(NamedTuple):
    """Features (n, d) of items, and the rotation (n, 3, 3) that belongs to each."""

    features: np.ndarray
    rotations: np.ndarray


def entries(seed: int, *, n=6000, max_angle=None) -> Posed:
    """Uniform rotations, and as features their own nine entries: the paper's sanity test."""
    R = random_rotation(rng=np.random.default_rng(seed), batch=(n,), max_angle=max_angle, dtype=np.float32)
    return Posed(R.reshape(n, 9), R)


def clouds(seed: int, *, n=6000, n_points=8) -> Posed:
    """Coordinates of one lopsided set of points, turned, blurred and in fixed order; the blur is a twentieth of it."""
    rng = np.random.default_rng(seed)
    R = random_rotation(rng=rng, batch=(n,), dtype=np.float32)
    points = rng.normal(size=(n_points, 3)).astype(np.float32) * np.array([1.0, 0.7, 0.4], dtype=np.float32)
    turned = points @ R.transpose(0, 2, 1)
    turned = turned + (0.05 * points.std() * rng.normal(size=turned.shape)).astype(np.float32)
    return Posed(turned.reshape(n, -1), R)


def narrow(data: Posed, seed: int) -> Posed:  # noqa: ARG001 - nothing is drawn
    """Keep the fifth of the items whose rotations are nearest to their mean, and turn the mean to the identity."""
    R = np.asarray(data.rotations)
    M = nearest_rotation(R.mean(axis=0))
    centred = np.swapaxes(M, 0, 1) @ R
    kept = np.argsort(-np.trace(centred, axis1=1, axis2=2), kind="stable")[: max(len(R) // 5, 3)]
    return Posed(np.asarray(data.features)[kept], centred[kept])


def train(X: Any, R: Any, seed: int) -> Callable[[Any], dict[tuple[str, float], Any]]:
    """Train one network per representation and learning rate side by side; return the map from features to rotations.

    Three hidden layers, leaky ReLU, mean squared difference of matrices, Adam, as in the paper; 64 units, a cosine
    schedule, and five passes over the rows (300 steps at least) for each. All start from the same weights and see the
    same batches.
    """
    import torch

    from polyspan import nn

    generator = torch.Generator().manual_seed(seed)
    arms = [(name, rate) for name in SIZES for rate in RATES]
    rates = torch.tensor([rate for _, rate in arms])[:, None, None]
    widths = [X.shape[1], WIDTH, WIDTH, WIDTH, max(SIZES.values())]
    weights = []
    for fan_in, fan_out in itertools.pairwise(widths):
        for rows in (fan_in, 1):
            drawn = (2 * torch.rand(1, rows, fan_out, generator=generator) - 1) / math.sqrt(fan_in)
            weights.append(drawn.expand(len(arms), -1, -1).clone().requires_grad_())
    optimiser = torch.optim.Adam(weights, lr=1.0)
    steps = max(LEAST_STEPS, PASSES * len(X) // BATCH)

    def rotations(x: Any) -> Any:
        h = x.expand(len(arms), -1, -1)
        for i in range(0, len(weights), 2):
            h = torch.baddbmm(weights[i + 1], h, weights[i])
            h = torch.nn.functional.leaky_relu(h) if i + 2 < len(weights) else h
        made = []
        for i, (name, size) in enumerate(SIZES.items()):
            raw = h[i * len(RATES) : (i + 1) * len(RATES), :, :size]
            made.append(getattr(nn, f"{name}_to_matrix")(raw, check=False, **OPTIONS.get(name, {})))
        return torch.cat(made)

    for step in range(steps):
        rows = torch.randint(len(X), (BATCH,), generator=generator)
        optimiser.zero_grad(set_to_none=True)
        (rotations(X[rows]) - R[rows]).square().mean(dim=(1, 2, 3)).sum().backward()
        before = [w.detach().clone() for w in weights]
        optimiser.step()
        # Adam's step at rate 1 is shortened to each network's own rate.
        rate = rates * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.no_grad():
            for w, old in zip(weights, before, strict=True):
                w.copy_(torch.lerp(old, w, rate))

    @torch.no_grad()
    def predict(x: Any) -> dict[tuple[str, float], Any]:
        return dict(zip(arms, rotations(x), strict=True))

    return predict


def trial(data: Posed, seed: int) -> dict[str, float]:
    """Train on two thirds, choose learning rates on a twelfth, score on the rest; each arm has the same two rates.

    The baseline is the one of the discontinuous representations that is best on the rows that choose.
    """
    import torch

    from polyspan.nn import geodesic_distance

    n = len(data.rotations)
    order = np.random.default_rng([seed, 2]).permutation(n)
    X = torch.tensor(np.asarray(data.features).reshape(n, -1)[order], dtype=torch.float32)
    R = torch.tensor(np.asarray(data.rotations)[order], dtype=torch.float32)
    a, b = n * 2 // 3, n * 3 // 4
    spread, mean = torch.std_mean(X[:a], dim=0, correction=0)
    X = (X - mean) / torch.where(spread > 0, spread, 1.0)
    predict = train(X[:a], R[:a], seed)

    def errors(rows: slice) -> dict[tuple[str, float], np.ndarray]:
        return {
            arm: np.rad2deg(geodesic_distance(made, R[rows]).numpy().astype(np.float64))
            for arm, made in predict(X[rows]).items()
        }

    choosing, held_out = errors(slice(a, b)), errors(slice(b, n))

    def best(names: Iterable[str]) -> np.ndarray:
        return held_out[min((arm for arm in choosing if arm[0] in names), key=lambda arm: choosing[arm].mean())]

    method, baseline = best(["rotation6d"]), best(DISCONTINUOUS)
    return {
        "method": float(method.mean()),
        "baseline": float(baseline.mean()),
        "6D, largest error": float(method.max()),
        "baseline, largest error": float(baseline.max()),
        "9D, nearest rotation": float(best(["rotation9d"]).mean()),
        "quaternion": float(best(["quaternion"]).mean()),
        "axis-angle": float(best(["axis_angle"]).mean()),
        "Euler angles": float(best(["euler"]).mean()),
    }


CLAIM = Claim(
    slug="rotation-continuity",
    statement="A network that outputs rotations in six numbers errs less than with quaternions, axis-angle or Euler.",
    method="6D output, Gram-Schmidt, squared difference of matrices, the better of two learning rates",
    baseline="the best of quaternion, axis-angle and Euler output in the same network, loss, steps and two rates",
    metric="mean angle between predicted and true rotation on held-out rows, degrees",
    better="lower",
    margin=0.5,
    worlds={
        "entries": entries,
        "entries-large": lambda seed: entries(seed, n=LARGE),
        "clouds-large": lambda seed: clouds(seed, n=LARGE),
        "cap": lambda seed: entries(seed, max_angle=CAP),
    },
    control="cap",
    levels={"quick": ("entries",), "standard": ("entries-large", "clouds-large")},
    seeds={"quick": 4, "standard": 5},
    trial=trial,
    user_data=Posed,
    spoil=narrow,
    why=(
        "Six numbers win wherever targets cover all rotations: 2.3 against 7.7 degrees after 300 steps, 0.9 against "
        "4.7 after 2,300, and 1.8 against 6.4 from eight blurred points. The mean hides the reason: the largest error "
        "is 3 to 7 degrees for six numbers, and 160 to 180 for the others. Among rotations within 60 degrees of one "
        "(control) nothing has to tear, and axis-angle is the best of all, 0.7 against 1.2 degrees. Nine numbers "
        "projected by SVD, which are continuous too, are a little better than six in every world."
    ),
)
