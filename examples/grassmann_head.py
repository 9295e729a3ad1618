"""Put a subspace head on a small network, train both, and look at what a class has become.

The network learns scikit-learn's digits with its linear classifier swapped for one subspace a class; the linear one is
trained alike for comparison. Afterwards the angles between subspaces say which digits are close, and the part of a
feature outside every subspace says that the image is no digit.

The system is the catalogue's ``grassmann-class``.
"""

import torch
from torch import nn

from polyspan.data import digits
from polyspan.nn import RiemannianSGD, replace_head


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Linear(64, 10))


def train(model: nn.Module, optimiser: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimiser.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
        schedule.step()
    model.eval()


def main(epochs: int = 20) -> None:
    pixels, labels = (torch.as_tensor(part) for part in digits())
    seen, unseen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(1)).split([1200, 597])

    linear = network(0)
    train(linear, torch.optim.SGD(linear.parameters(), lr=0.05, momentum=0.9), pixels[seen], labels[seen], epochs)

    model = network(0)
    head = replace_head(model, rank=4, generator=torch.Generator().manual_seed(0))
    train(model, RiemannianSGD(model.parameters(), lr=0.05), pixels[seen], labels[seen], epochs)

    with torch.no_grad():
        for name, net in (("linear head", linear), ("subspace head", model)):
            right = (net(pixels[unseen]).argmax(1) == labels[unseen]).float().mean()
            print(f"{name:>13}: {right:.1%} of unseen digits")
        angles = head.principal_angles()[..., 0].fill_diagonal_(torch.inf)
        a, b = divmod(int(angles.argmin()), 10)
        print(f"closest subspaces: {a} and {b}, {torch.rad2deg(angles[a, b]):.0f} degrees at their nearest")
        noise = torch.rand(597, 64, generator=torch.Generator().manual_seed(2))
        for name, images in (("digits", pixels[unseen]), ("noise", noise)):
            outside = head.residual(model[:-1](images)).min(dim=1).values.mean()
            print(f"{name:>13}: {outside:.2f} of a feature lies outside the nearest subspace")


if __name__ == "__main__":
    main()
