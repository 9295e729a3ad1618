"""Race the scan against the literal loop, and a stack of heads against heads one after another.

Target: 2 items, 96 channels with 16 states, at 4,096 steps at least 10 times as fast as the loop, forwards.

The system is the catalogue's ``mhs-vm``.
"""

import torch
from torch.nn import functional as F

from _runner import growth, peaks, race, save
from polyspan.nn import MultiHeadScan2d, selective_scan
from polyspan.run import thread_limits

B, D, N = 2, 96, 16
LENGTHS = (256, 1024, 4096)
SIDES = (16, 32)


def problem(L, *, gradient=False):
    g = torch.Generator().manual_seed(0)
    u, raw = torch.randn(2, B, D, L, generator=g)
    inputs, outputs = torch.randn(2, B, N, L, generator=g)
    A = -torch.arange(1.0, N + 1).repeat(D, 1)
    return [x.requires_grad_(gradient) for x in (u, F.softplus(raw - 4), A, inputs, outputs)]


def literal(u, delta, A, inputs, outputs):
    """Mamba's Python reference in our words: decays and inputs of all steps first, then a loop over the steps."""
    decays = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    entering = torch.einsum("bdl,bnl,bdl->bdln", delta, inputs, u)
    h, out = u.new_zeros(u.shape[0], *A.shape), []
    # unbind, not an index a step: the derivative of an index is a tensor of zeros as long as the whole sequence.
    for decay, entry, weights in zip(decays.unbind(2), entering.unbind(2), outputs.unbind(2), strict=True):
        h = decay * h + entry
        out.append(torch.einsum("bdn,bn->bd", h, weights))
    return torch.stack(out, dim=2)


def backwards(scan, parts):
    def once():
        for x in parts:
            x.grad = None
        scan(*parts).sum().backward()

    return once


def training(L):
    """Forwards and backwards by either way."""
    parts = problem(L, gradient=True)
    return {"blocks": backwards(selective_scan, parts), "the literal loop": backwards(literal, parts)}


class OneAfterAnother(torch.nn.Module):
    """The same heads as modules of one head each: a scan a head."""

    def __init__(self, module):
        super().__init__()
        scan, width = module.scan, module.scan.head_channels
        self.module, self.heads = module, torch.nn.ModuleList()
        for i, pattern in enumerate(scan.patterns):
            head = MultiHeadScan2d(width, 1, (pattern,), scan.d_state, with_proj=False)
            rows = slice(i * scan.num_routes, (i + 1) * scan.num_routes)
            with torch.no_grad():
                head.to_subspaces.weight.copy_(torch.eye(width))
                for name, parameter in head.scan.named_parameters():
                    parameter.copy_(getattr(scan, name)[rows])
            self.heads.append(head)

    def forward(self, x):
        parts = self.module.to_subspaces(x).chunk(len(self.heads), dim=-1)
        y = torch.cat([head(part) for head, part in zip(self.heads, parts, strict=True)], dim=-1)
        return self.module.output(self.module.norm(y))


def main(lengths=LENGTHS, sides=SIDES, repeats=3) -> None:
    forwards, both, heads, off = [], [], [], {}
    for L in lengths:
        size = {"b": B, "D": D, "N": N, "L": L}
        parts = problem(L)
        off[str(L)] = float((selective_scan(*parts) - literal(*parts)).abs().max())
        arms = {"blocks": lambda p=parts: selective_scan(*p), "the literal loop": lambda p=parts: literal(*p)}
        forwards.append(race("forwards", arms, size=size, repeats=repeats))
        both.append(race("forwards and backwards", training(L), size=size, repeats=max(repeats - 2, 1)))
    for side in sides:
        module = MultiHeadScan2d(96, generator=torch.Generator().manual_seed(0))
        apart, x = OneAfterAnother(module), torch.randn(1, side, side, 96, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(apart(x), module(x), rtol=1e-3, atol=1e-4)
            arms = {"stacked": lambda m=module, x=x: m(x), "one after another": lambda m=apart, x=x: m(x)}
            heads.append(race("heads", arms, size={"side": side, "channels": 96, "pixels": side**2}, repeats=repeats))
    largest = max(forwards, key=lambda record: record["size"]["L"])
    save(
        "multi_head_scan",
        forwards + both + heads,
        growth_in_steps={"forwards": growth(forwards, "L"), "forwards and backwards": growth(both, "L")},
        growth_in_pixels=growth(heads, "pixels"),
        peak_bytes_forwards_and_backwards={
            str(L): peaks(f"from multi_head_scan import training\narms = training({L})") for L in lengths
        },
        largest_difference=off,
        ten_times_at_the_largest=largest["ratio"]["the literal loop"]["median"] >= 10,
    )


if __name__ == "__main__":
    with thread_limits(1):
        main()
