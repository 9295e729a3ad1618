"""Teach a small network to read rotations off a set of points, once per representation, and look for large errors.

Eight points of a body are turned; the network sees their coordinates and answers with the rotation. On average the
heads do not differ that much. Along one slow full turn, those that cannot be continuous have to cross a cliff.

The system is the catalogue's ``rotation-continuity``.
"""

import math
import sys
from pathlib import Path

import torch
from torch import nn

from polyspan.nn import (
    RotationHead,
    axis_angle_to_matrix,
    chordal_loss,
    continuity_breaks,
    matrix_to_euler,
    random_rotation,
    rotation_errors,
)
from polyspan.nn.rotation_plots import plot_error_along_path

HEADS = ("6d", "9d", "quaternion", "euler")


def train(representation: str, x: torch.Tensor, R: torch.Tensor, steps: int) -> nn.Module:
    torch.manual_seed(0)
    head = RotationHead(64, representation)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU(), head)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,), generator=generator)
        optimiser.zero_grad()
        chordal_loss(model(x[rows]), R[rows]).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def main(steps: int = 400, picture: str | None = None) -> None:
    generator = torch.Generator().manual_seed(0)
    body = torch.randn(8, 3, generator=generator)
    R = random_rotation(rng=generator, batch=(5000,))
    turn = torch.linspace(0, 2 * math.pi, 361)[:, None] * torch.tensor([0.0, 0.6, 0.8])
    path = R[0] @ axis_angle_to_matrix(turn)
    x, along = (body @ rotations.mT for rotations in (R, path))

    predicted = {}
    print("      head   mean    p99    max, degrees on unseen rotations")
    for name in HEADS:
        model = train(name, x[:4000].flatten(1), R[:4000], steps)
        with torch.no_grad():
            found = rotation_errors(model(x[4000:].flatten(1)), R[4000:])
            predicted[name] = model(along.flatten(1))
        print(f"{name:>10} {found.mean:6.2f} {found.p99:6.2f} {found.max:6.1f}")
    worst = {name: rotation_errors(made, path).max for name, made in predicted.items()}
    print("largest error along one full turn:", ", ".join(f"{name} {most:.0f}" for name, most in worst.items()))

    spin = axis_angle_to_matrix(turn, check=False)
    breaks = continuity_breaks(spin, "euler", sequence="XYZ")
    before, after = (matrix_to_euler(spin[i], sequence="XYZ", degrees=True) for i in (breaks[0], breaks[0] + 1))
    print(f"Euler angles jump from {before.round().int().tolist()} to {after.round().int().tolist()} within one degree")
    if picture:
        print("written:", plot_error_along_path(path, predicted, Path(picture)))


if __name__ == "__main__":
    main(picture=sys.argv[1] if len(sys.argv) > 1 else None)
