"""Race the layer against a plain transformer layer of equal width, and against a literal twin of the authors' layer.

Targets: the twin's numbers at 1.25 times its speed or better; a third of the plain layer's parameters and less of its
time; and the layer report by small matrices against the authors' log-determinants of N x N. The twin is written from
the published description: attention with the softmax written out, three products in the sparse step.

The system is the catalogue's ``crate``.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from _runner import growth, peaks, race, save
from polyspan.nn import CRATEBlock
from polyspan.nn.layer_rates import within

WIDTH, HEADS, BATCH = 384, 6, 2
TOKENS = (49, 197, 577)


class Twin(nn.Module):
    """The authors' layer with the weights of ours."""

    def __init__(self, ours):
        super().__init__()
        self.ours = ours

    def forward(self, x):
        o = self.ours
        w = o.attention.project(o.attention_norm(x))
        heads = ((w @ w.mT) * o.attention.scale).softmax(dim=-1) @ w
        x = x + o.attention.output(heads.transpose(1, 2).flatten(2))
        y, D = o.ista_norm(x), o.ista.weight
        once = F.linear(y, D)
        return F.relu(y + 0.1 * (F.linear(y, D.T) - F.linear(once, D.T)) - 0.01)


def plain():
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)


def forward(layer, x):
    def run():
        with torch.no_grad():
            layer(x)

    return run


def both(layer, x):
    def run():
        layer.zero_grad(set_to_none=True)
        layer(x).sum().backward()

    return run


def literal_rates(Z, U):
    """Log-determinants of N x N matrices."""
    w = F.normalize(Z.unsqueeze(-3) @ U, dim=-1)
    n, p = w.shape[-2:]
    return torch.logdet(torch.eye(n) + p / (n * 0.01) * w @ w.mT).sum(-1) / 2


def make_layers(generator):
    ours = CRATEBlock(WIDTH, HEADS, generator=generator)
    exact = CRATEBlock(WIDTH, HEADS, step="exact", generator=generator)
    return {"polyspan": ours, "literal twin": Twin(ours), "nn.TransformerEncoderLayer": plain(), "exact step": exact}


def training(t):
    """A training step of every layer on t tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, t, WIDTH, generator=generator)
    return {name: both(layer, x) for name, layer in make_layers(generator).items()}


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = make_layers(generator)
    ours = layers["polyspan"]
    parameters = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    records = {"forward": [], "training": [], "report": []}
    off = {}
    for t in TOKENS:
        x = torch.randn(BATCH, t, WIDTH, generator=generator)
        size = {"tokens": t, "batch": BATCH, "width": WIDTH}
        off[str(t)] = float((ours(x) - layers["literal twin"](x)).detach().abs().max())
        for name, kind in (("forward", forward), ("training", both)):
            arms = {arm: kind(layer, x) for arm, layer in layers.items()}
            records[name].append(race(name, arms, size=size, repeats=7))
        U, Z = ours.attention.bases.detach(), ours.attention_norm(x).detach()
        found = [float(np.abs(a - b).max()) for a, b in [(within(Z, U, 0.01).numpy(), literal_rates(Z, U).numpy())]]
        off[f"{t}, report"] = found[0]
        arms = {"p x p": lambda Z=Z, U=U: within(Z, U, 0.01), "N x N": lambda Z=Z, U=U: literal_rates(Z, U)}
        records["report"].append(race("report", arms, size=size, repeats=3))
    save(
        "rate_reduction_transformer",
        [record for found in records.values() for record in found],
        parameters=parameters,
        growth_in_tokens={name: growth(found, "tokens") for name, found in records.items()},
        growth_of_the_exact_step=growth(records["forward"], "tokens", "exact step"),
        peak_bytes_of_a_training_step={
            str(t): peaks(f"from rate_reduction_transformer import training\narms = training({t})") for t in TOKENS
        },
        largest_difference=off,
    )


if __name__ == "__main__":
    main()
