"""Race the fused module against the loop over groups that the authors wrote, in eval mode and in training steps.

The twin is written from the formula with torch's own layers: per group a depthwise and a pointwise convolution, two
batch norms, a max-pool and a softmax. Target: at least as fast at every size, several times at one image in eval mode.

The system is the catalogue's ``ulsam``.
"""

import torch
from torch import nn

from _runner import growth, peaks, race, save
from polyspan.nn import ULSAM

SIZES = ((1, 96, 4), (1, 512, 1), (1, 512, 4), (1, 512, 16), (16, 512, 1), (16, 512, 4), (16, 512, 16))
SIDE = 14


class Loop(nn.Module):
    def __init__(self, m, g):
        super().__init__()
        size = m // g
        self.subspaces = nn.ModuleList(
            nn.ModuleDict(
                {
                    "conv_dws": nn.Conv2d(size, size, 1, groups=size),
                    "bn_dws": nn.BatchNorm2d(size),
                    "conv_point": nn.Conv2d(size, 1, 1),
                    "bn_point": nn.BatchNorm2d(1),
                }
            )
            for _ in range(g)
        )

    def forward(self, x):
        out = []
        for part, f in zip(self.subspaces, torch.chunk(x, len(self.subspaces), dim=1), strict=True):
            u = torch.relu(part["bn_dws"](part["conv_dws"](f)))
            p = nn.functional.max_pool2d(u, 3, 1, 1)
            q = torch.relu(part["bn_point"](part["conv_point"](p)))
            a = torch.softmax(q.flatten(2), dim=2).view_as(q).expand_as(f)
            out.append(a * f + f)
        return torch.cat(out, dim=1)


def step(module, x):
    x = x.detach().requires_grad_()
    module(x).square().sum().backward()


def training(B, m, g):
    """A training step of either way."""
    generator = torch.Generator().manual_seed(0)
    x, loop = torch.randn(B, m, SIDE, SIDE, generator=generator), Loop(m, g)
    module = ULSAM.from_official_state_dict(loop.state_dict()).train()
    return {"polyspan, step": lambda: step(module, x), "loop over groups, step": lambda: step(loop, x)}


def main() -> None:
    torch.set_num_threads(1)
    records, off = {"eval": [], "training step": []}, 0.0
    for B, m, g in SIZES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(B, m, SIDE, SIDE, generator=generator)
        loop = Loop(m, g)
        loop(torch.randn(8, m, SIDE, SIDE, generator=generator))  # running statistics that are not the defaults
        module = ULSAM.from_official_state_dict(loop.state_dict())
        fused = module.eval().fuse()
        loop.eval()
        size = {"batch": B, "channels": m, "groups": g, "places": SIDE**2}
        with torch.inference_mode():
            off = max(off, float((fused(x) - loop(x)).abs().max()), float((module(x) - loop(x)).abs().max()))
            arms = {"polyspan, fused": lambda f=fused, x=x: f(x), "polyspan, eval": lambda f=module, x=x: f(x)}
            arms["loop over groups, eval"] = lambda f=loop, x=x: f(x)
            records["eval"].append(race("eval", arms, size=size, repeats=30 if B == 1 else 9, warmup=3))
        if B > 1:
            loop.train()
            module.train()
            arms = {"polyspan, step": lambda f=module, x=x: step(f, x)}
            arms["loop over groups, step"] = lambda f=loop, x=x: step(f, x)
            records["training step"].append(race("training step", arms, size=size, repeats=9, warmup=2))
    few = [r for r in records["eval"] if r["size"]["groups"] == 4 and r["size"]["channels"] == 512]
    save(
        "subspace_attention",
        records["eval"] + records["training step"],
        peak_bytes_of_a_training_step={
            f"{B} pictures, {g} groups": peaks(
                f"from subspace_attention import training\narms = training({B}, {m}, {g})"
            )
            for B, m, g in SIZES
            if B > 1
        },
        largest_difference=off,
        growth_in_batch={"eval": growth(few, "batch")},
        growth_in_batch_of_the_loop={"eval": growth(few, "batch", "loop over groups, eval")},
    )


if __name__ == "__main__":
    main()
