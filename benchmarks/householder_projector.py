"""Race the thin projector against the published layer and torch's parametrisations, at growing width.

All make one linear layer of rank 10 with equal singular values and apply it to 64 latents. The published layer forms
both full products of d reflections one by one; a second twin of it gathers them in the compact form first, which is
the best that its d x d parameters allow. Torch's parametrisations are raced twice: as square matrices, as the published
layer has them, and as two thin frames, which is as little as they can do.
"""

import torch
from torch import nn
from torch.nn.utils import parametrizations

from _runner import growth, peaks, race, save
from polyspan.linalg import householder_product
from polyspan.nn import HouseholderProjector
from polyspan.nn._reflection_frames import frame

WIDTHS = (128, 256, 512)
RANK, BATCH = 10, 64


class Published(nn.Module):
    """A = Q(U) S Q(V) with all d reflections of each side, by a loop as in the definition or gathered first."""

    def __init__(self, d, gathered):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.U, self.V = (nn.Parameter(0.05 * torch.randn(d, d, generator=g)) for _ in range(2))
        self.gathered = gathered

    def product(self, V):
        if self.gathered:
            return householder_product(V)
        unit = V / V.norm(dim=0)
        Q = eye = torch.eye(len(V))
        for j in range(V.shape[1]):
            v = unit[:, j : j + 1]
            Q = Q @ (eye - 2 * v @ v.T)
        return Q

    def forward(self, x):
        S = torch.diag((torch.arange(len(self.U)) < RANK).float())
        return x @ (self.product(self.U) @ S @ self.product(self.V)).T


class Torch(nn.Module):
    """The same layer out of torch's orthogonal parametrisation of two square matrices, or of two thin ones."""

    def __init__(self, d, kind, thin):
        super().__init__()
        width = RANK if thin else d
        left, right = nn.Linear(width, d, bias=False), nn.Linear(width, d, bias=False)
        self.left, self.right = (parametrizations.orthogonal(m, orthogonal_map=kind) for m in (left, right))

    def forward(self, x):
        return (x @ self.right.weight[:, :RANK]) @ self.left.weight[:, :RANK].T


def forward(layer, x):
    def run():
        with torch.no_grad():
            return layer(x)

    return run


def step(layer, x):
    def run():
        layer.zero_grad(set_to_none=True)
        layer(x).square().sum().backward()

    return run


def make_layers(d):
    kinds = ("matrix_exp", "cayley", "householder")
    return {
        "ours": HouseholderProjector(d, d, RANK, bias=False, gain=1.0, generator=torch.Generator().manual_seed(0)),
        "published, gathered": Published(d, True),
        **{f"torch, {kind}, square": Torch(d, kind, False) for kind in kinds},
        **{f"torch, {kind}, thin": Torch(d, kind, True) for kind in kinds},
    }


def training(d):
    """A training step of every layer."""
    x = torch.randn(BATCH, d, generator=torch.Generator().manual_seed(1))
    return {name: step(layer, x) for name, layer in make_layers(d).items()}


def races(d, *, loop=True):
    x = torch.randn(BATCH, d, generator=torch.Generator().manual_seed(1))
    size = {"d": d, "rank": RANK, "batch": BATCH}
    others = make_layers(d)
    ours = others.pop("ours")
    looped = {"published": Published(d, False)} if loop else {}
    Y = ours.in_vectors.detach()
    return [
        race(
            "layer, forward",
            {"ours": forward(ours, x), **{n: forward(m, x) for n, m in {**looped, **others}.items()}},
            size=size,
            repeats=3,
        ),
        race(
            "layer, forward and gradient",
            {"ours": step(ours, x), **{n: step(m, x) for n, m in others.items()}},
            size=size,
            repeats=3,
        ),
        race(
            "one frame",
            {"ours": lambda: frame(Y), "ground floor": lambda: householder_product(Y, RANK)},
            size=size,
            repeats=50,
        ),
        race(
            "applied as a plain layer",
            {"ours, merged": forward(ours.to_linear(), x), "ours": forward(ours, x)},
            size=size,
            repeats=50,
        ),
    ]


def main(widths=WIDTHS, *, stem="householder_projector"):
    torch.set_num_threads(1)
    by_size = [races(d) for d in widths]
    groups = {group[0]["name"]: list(group) for group in zip(*by_size, strict=True)}
    exponents = {name: growth(group, "d") for name, group in groups.items()}
    theirs = {arm: growth(groups["layer, forward"], "d", arm) for arm in groups["layer, forward"][0]["seconds"]}
    return save(
        stem,
        [record for records in by_size for record in records],
        growth=exponents,
        growth_of_the_forward_pass=theirs,
        peak_bytes_of_a_training_step={
            str(d): peaks(f"from householder_projector import training\narms = training({d})") for d in widths
        },
    )


if __name__ == "__main__":
    main()
