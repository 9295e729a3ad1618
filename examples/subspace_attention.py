"""Shrink a compact network by attention in place of a block, and compare with the block simply removed.

The images are scikit-learn's digits, 8 by 8 pixels; the network has five equal blocks, the fourth of which goes.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from polyspan.data import digits
from polyspan.nn import ULSAM, attention_facts, replace_with_ulsam, replaceable_blocks


class Block(nn.Module):
    """Depthwise 3x3 and pointwise 1x1 convolution, added to the input."""

    def __init__(self, m: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(m, m, 3, padding=1, groups=m, bias=False), nn.BatchNorm2d(m), nn.ReLU(),
            nn.Conv2d(m, m, 1, bias=False), nn.BatchNorm2d(m),
        )  # fmt: skip

    def forward(self, x):
        return F.relu(x + self.body(x))


def train(model: nn.Module, X: torch.Tensor, y: torch.Tensor, generator: torch.Generator, passes: int) -> None:
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    steps = passes * (len(X) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps + 1)
    for _ in range(steps):
        rows = torch.randint(len(X), (64,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(model(X[rows]), y[rows]).backward()
        optimiser.step()
        schedule.step()


def main(passes: int = 3) -> None:
    images, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    X, y = torch.tensor(images).reshape(-1, 1, 8, 8)[order], torch.tensor(labels)[order]
    stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    blocks = [Block(32) for _ in range(5)]
    whole = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    names = [block.name for block in replaceable_blocks(whole, X[:1]) if block.kind == "Block"]
    print("blocks that keep the shape of their map:", ", ".join(names))

    small, report = replace_with_ulsam(copy.deepcopy(whole), names[3], X[:1], num_groups=4)
    removed = copy.deepcopy(whole)
    removed[4] = nn.Identity()
    print(f"parameters left {report.params_share:.1%}, multiply-adds left {report.macs_share:.1%}")
    for name, model in (("whole", whole), ("attention in its place", small), ("block removed", removed)):
        train(model, X[:1300], y[:1300], torch.Generator().manual_seed(1), passes)
        with torch.no_grad():
            share = (model.eval()(X[1300:]).argmax(1) == y[1300:]).double().mean()
        print(f"{name:>24}  {share:.1%} of the digits left out")
    attention = next(module for module in small.modules() if isinstance(module, ULSAM))
    facts = attention_facts(attention.attention_maps(small[:4](X[1300:])))
    print(f"largest attention {facts.peak:.1f} times uniform; groups lie {facts.group_distance:.2f} apart, of 2")


if __name__ == "__main__":
    main()
