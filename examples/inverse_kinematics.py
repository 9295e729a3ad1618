"""Let a small network find how the joints of a body are turned from where they are: inverse kinematics.

A figure of five joints takes random poses. The network sees where its joints are and answers with the rotation of
each; the loss is how far the joints come to lie from where they were. It is trained once per representation.

The system is the catalogue's ``rotation-continuity``.
"""

import torch
from torch import nn

from polyspan.nn import (
    euler_to_matrix,
    forward_kinematics,
    quaternion_to_matrix,
    random_rotation,
    rotation6d_to_matrix,
)

# Shoulder, elbow, hand, and a second limb of one bone less: who hangs from whom, and by which bone, in cm.
PARENTS = (-1, 0, 1, 0, 3)
BONES = torch.tensor([[0.0, 0, 0], [0, 30, 5], [0, 25, 3], [-20, 5, 0], [-30, 0, 4]])
FORMS = {
    "6D": (6, lambda x: rotation6d_to_matrix(x, check=False)),
    "quaternion": (4, lambda x: quaternion_to_matrix(x, order="wxyz", check=False)),
    "Euler": (3, lambda x: euler_to_matrix(x, sequence="XYZ", check=False)),
}


def places(R: torch.Tensor) -> torch.Tensor:
    return forward_kinematics(R, BONES, PARENTS)


def train(name: str, x: torch.Tensor, steps: int) -> nn.Module:
    torch.manual_seed(0)
    numbers, j = FORMS[name][0], len(PARENTS)
    model = nn.Sequential(
        nn.Linear(3 * j, 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, j * numbers)
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (128,), generator=generator)]
        optimiser.zero_grad()
        (pose(name, model, batch) - batch).square().mean().backward()
        optimiser.step()
        schedule.step()
    return model


def pose(name: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return where the joints come to lie by the rotations that the network answers with."""
    return places(FORMS[name][1](model((x / 30).flatten(1)).unflatten(1, (len(PARENTS), -1))))


def main(steps: int = 250) -> None:
    generator = torch.Generator().manual_seed(0)
    # The whole figure is turned in any way; each joint by a right angle at most.
    R = random_rotation(rng=generator, batch=(4000, len(PARENTS)), max_angle=torch.pi / 2)
    R[:, 0] = random_rotation(rng=generator, batch=(4000,))
    x = places(R)
    print("distance of joints from where they are, on poses not seen, cm")
    print("            mean    p99    max")
    for name in FORMS:
        model = train(name, x[:3000], steps)
        with torch.no_grad():
            far = (pose(name, model, x[3000:]) - x[3000:]).norm(dim=-1).flatten()
        print(f"{name:>10} {far.mean():6.2f} {far.quantile(0.99):6.2f} {far.max():6.1f}")


if __name__ == "__main__":
    main()
