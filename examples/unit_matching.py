"""Ask whether two networks that were trained from different seeds have learnt the same features.

Two small convolutional networks learn scikit-learn's digits; their channels are compared on digits that neither has
seen, beside what the same networks had in common before training.

The system is the catalogue's ``convergent-learning``.
"""

import torch
from torch import nn

from polyspan.align import compare_networks
from polyspan.data import digits


def network(seed: int) -> nn.Sequential:
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(24 * 16, 10)]
    generator = torch.Generator().manual_seed(seed)
    for layer in layers[::2]:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.normal_(std=(2 / layer.weight[0].numel()) ** 0.5, generator=generator)
            layer.bias.data.zero_()
    layers[-1].weight.data.normal_(std=0.05, generator=generator)
    return nn.Sequential(*layers)


def trained(seed: int, images: torch.Tensor, labels: torch.Tensor) -> nn.Sequential:
    made, generator = network(seed), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(made.parameters(), lr=2e-3)
    for _ in range(10):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(made(images[rows]), labels[rows]).backward()
            optimiser.step()
    return made.eval()


def main() -> None:
    pixels, labels = digits()
    images, classes = torch.as_tensor(pixels).reshape(-1, 1, 8, 8), torch.as_tensor(labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    seen, new = order[:900], order[900:]

    a, b = (trained(seed, images[seen], classes[seen]) for seed in (0, 1))
    before = network(0).eval(), network(1).eval()
    found = compare_networks(a, b, images[new], layers=["1", "3"], untrained=before, random_state=0)
    for layer, name in zip(found.layers, ("first", "second"), strict=True):
        scores = layer.bipartite.scores[layer.bipartite.indices >= 0]
        print(f"{name} convolution: partners correlate by {scores.min():.2f} to {scores.max():.2f}")
        chance = ", ".join(f"{value:.2f} ({what})" for what, value in layer.nulls.items())
        print(f"  {layer.mean_bipartite:.2f} on average, against {chance}")
        print(f"  not explained: {layer.unexplained_single:.0%} by the best unit, {layer.unexplained_all:.0%} by all")


if __name__ == "__main__":
    main()
