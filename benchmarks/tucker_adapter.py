"""Race the factored adapter against one that expands its update at every step, as the paper's code does.

Targets: forward and backward of the adapter alone at least 3 times as fast for convolutions of 256 channels, and 10
times for linear layers of 4,096; with the frozen layer, which both must run, whatever that leaves. Depthwise kernels,
for which expanding is cheaper, show that the choice of way is right there too.

The system is the catalogue's ``flora-nd``.
"""

import peft
import torch
from torch import nn
from torch.nn import functional as F

from _runner import growth, peak_in_child, race, save
from polyspan.checkpoints import TuckerAdapterConfig
from polyspan.run import torch_generator

CONVOLUTIONS = ({"channels": 128, "side": 28, "batch": 8}, {"channels": 256, "side": 56, "batch": 16})
LINEARS = (
    {"features": 1024, "tokens": 512},
    {"features": 4096, "tokens": 512},
    {"features": 4096, "tokens": 2048},
)
DEPTHWISE = {"channels": 256, "side": 28, "batch": 8}
RANK = 16


def adapted(layer, **options):
    options = {"r_in": RANK, "r_out": RANK, "target_modules": ["0"], "seed": 0} | options
    model = peft.get_peft_model(nn.Sequential(layer), TuckerAdapterConfig(**options))
    for name, parameter in model.named_parameters():
        if "core" in name:
            parameter.data.normal_(generator=torch_generator(0))
    return model.base_model.model[0]


class Expanding(nn.Module):
    """The paper's own way: factors in the order in, out, height, width; the whole update, then a second operation."""

    def __init__(self, layer):
        super().__init__()
        core, factors = layer.parameters_of("default")
        self.core = nn.Parameter(core.detach().transpose(0, 1).clone())
        order = [factors[1], factors[0], *factors[2:]]
        self.factors = nn.ParameterList([f.detach().clone() for f in order])
        self.base, self.scale = layer.base_layer, 4.0

    def delta(self):
        made = self.core
        for factor in self.factors:  # the first axis is multiplied and goes to the end, until all have been
            made = torch.tensordot(made, factor, dims=([0], [1]))
        return self.scale * made.transpose(0, 1)

    def forward(self, x):
        if isinstance(self.base, nn.Linear):
            return F.linear(x, self.delta())
        base = self.base
        return F.conv2d(x, self.delta(), None, base.stride, base.padding, base.dilation, base.groups)


def step(function, x, parameters):
    """Return a closure that runs forward and backward, and gives all gradients."""
    inputs = [x, *parameters]

    def run():
        out = function(x)
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return run


def race_layer(name, layer, x, size, repeats, **options):
    """Race the adapter alone, then with the frozen layer; return both records and the largest relative difference."""
    ours = adapted(layer, **options)
    theirs = Expanding(ours)
    with torch.no_grad():
        result = ours.base_layer(x)
    core, factors = ours.parameters_of("default")
    own, their = [core, *factors], [theirs.core, *theirs.factors]
    alone = {
        "factored": step(lambda x: ours._delta_forward(x, "default", result), x, own),
        "expanding": step(theirs, x, their),
    }
    a, b = (run() for run in alone.values())
    off = float((a[0] - b[0]).abs().max() / b[0].abs().max())
    whole = {
        "polyspan": step(ours, x, own),
        "expanding": step(lambda x: theirs.base(x) + theirs(x), x, their),
        "frozen layer alone": step(theirs.base, x, []),
    }
    records = []
    if not options:
        records.append(race(f"{name}, adapter alone", alone, size=size, repeats=repeats))
    records.append(race(f"{name}, whole layer", whole, size=size, repeats=repeats))
    return records, off


def peaks(channels, side, batch):
    """Peak of anonymous memory, bytes, of forward and backward of both adapters alone."""
    made = {}
    for arm in ("factored", "expanding"):
        made[arm] = peak_in_child(f"""
import sys
sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
import torch
import tucker_adapter as bench
layer = bench.adapted(torch.nn.Conv2d({channels}, {channels}, 3, padding=1))
x = torch.randn({batch}, {channels}, {side}, {side}, requires_grad=True)
twin = bench.Expanding(layer)
def main():
    function = twin if {arm == "expanding"} else (lambda x: layer._delta_forward(x, "default", x))
    parameters = list(twin.parameters())[:1] if {arm == "expanding"} else [layer.parameters_of("default")[0]]
    bench.step(function, x, parameters)()
""")
        print(f"  {arm}: {made[arm] / 2**20:.0f} MiB", flush=True)
    return made


def main() -> None:
    generator = torch_generator(1)

    def images(channels, side, batch):
        return torch.randn(batch, channels, side, side, generator=generator).requires_grad_()

    conv, linear, off = [], [], {}
    for size in CONVOLUTIONS:
        layer = nn.Conv2d(size["channels"], size["channels"], 3, padding=1)
        found, off[f"convolution {size}"] = race_layer("convolution", layer, images(**size), size, 3)
        conv += found
    for size in LINEARS:
        x = torch.randn(size["tokens"], size["features"], generator=generator).requires_grad_()
        layer = nn.Linear(size["features"], size["features"])
        found, off[f"linear {size}"] = race_layer("linear", layer, x, size, 3)
        linear += found
    deep = nn.Conv2d(DEPTHWISE["channels"], DEPTHWISE["channels"], 7, padding=3, groups=DEPTHWISE["channels"])
    depthwise, off["depthwise"] = race_layer("depthwise", deep, images(**DEPTHWISE), DEPTHWISE, 3, r_in=1)
    alone = {kind: [r for r in found if "alone" in r["name"]] for kind, found in (("c", conv), ("l", linear))}
    save(
        "tucker_adapter",
        conv + linear + depthwise,
        growth_in_channels=growth(alone["c"], "channels"),
        growth_in_features=growth([alone["l"][0], alone["l"][1]], "features"),
        largest_difference=off,
        convolution_at_least_3_times=[r["ratio"]["expanding"]["median"] for r in alone["c"]],
        linear_at_least_10_times=[r["ratio"]["expanding"]["median"] for r in alone["l"]],
        peak_bytes=peaks(**CONVOLUTIONS[-1]),
    )


if __name__ == "__main__":
    main()
