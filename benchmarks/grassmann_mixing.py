"""Race the Grassmann layer against causal attention over sequence length, and against its literal form.

Attention is torch's fused kernel with the four projections of a layer. The literal form lays out the coordinates of
every offset and projects each, as reproductions of the paper do. Targets: time linear in length (growth below 1.2 where
attention's is above 1.4), faster than attention from about 2 d tokens on, at least three times as fast as the literal
form, and a token read in the same time however many were read before.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from _runner import growth, peaks, race, save
from polyspan.nn import CausalGrassmannMixing
from polyspan.nn._rival_mixers import CausalAttention

D, R, HEADS = 256, 32, 4
LENGTHS = (512, 1024, 2048, 4096, 8192)
LITERAL = (512, 1024, 2048)
TRAINED = (512, 2048)
READ = (64, 1024, 16_384)


class Literal(nn.Module):
    """The same layer with the same weights: coordinates of all offsets, one projection each, mean."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer, t = self.layer, x.shape[1]
        z = layer.reduction(x)
        i, j = torch.triu_indices(layer.r, layer.r, 1)
        total, count = torch.zeros_like(x), torch.zeros(t, 1)
        for o in layer.offsets:
            u, v = z[:, o:], z[:, : t - o]
            p = u[..., i] * v[..., j] - u[..., j] * v[..., i]
            p = p / torch.linalg.vector_norm(p, dim=-1, keepdim=True).clamp(min=1e-8)
            total = total + F.pad(layer.plane(p), (0, 0, o, 0))
            count[o:] += 1
        g = total / count.clamp(min=1)
        alpha = torch.sigmoid(layer.gating(torch.cat([x, g], dim=-1)))
        return layer.layer_norm(alpha * x + (1 - alpha) * g)


def step(module, x):
    module(x.detach().requires_grad_()).square().sum().backward()


def training(t):
    """A training step of every arm on t tokens."""
    generator = torch.Generator().manual_seed(0)
    layer = CausalGrassmannMixing(D, R, norm="l2", generator=generator).eval()
    others = CausalAttention(D, HEADS, generator=generator).eval(), Literal(layer)
    x = torch.randn(1, t, D, generator=generator)
    names = "polyspan, step", "causal attention, step", "the literal form, step"
    return {name: partial(step, module, x) for name, module in zip(names, (layer, *others), strict=True)}


def main(lengths=LENGTHS, literal_lengths=LITERAL, trained=TRAINED, read=READ, repeats=5) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    layer = CausalGrassmannMixing(D, R, norm="l2", generator=generator).eval()
    attention = CausalAttention(D, HEADS, generator=generator).eval()
    literal, forward, both, reading, off = Literal(layer), [], [], [], 0.0
    for t in lengths:
        x = torch.randn(1, t, D, generator=generator)
        arms = {"polyspan": lambda x=x: layer(x), "causal attention": lambda x=x: attention(x)}
        with torch.inference_mode():
            if t in literal_lengths:
                arms["the literal form"] = lambda x=x: literal(x)
                off = max(off, float((layer(x) - literal(x)).abs().max()))
            forward.append(race("forward", arms, size={"t": t, "d": D, "r": R}, repeats=repeats))
    for t in trained:
        size = {"t": t, "d": D, "r": R}
        both.append(race("forward and backward", training(t), size=size, repeats=min(3, repeats)))
    with torch.inference_mode():
        for t in read:
            state = layer(torch.randn(1, t, D, generator=generator), state=layer.init_state(1))[1]
            token = torch.randn(1, 1, D, generator=generator)
            keys, values = torch.randn(2, 1, HEADS, t + 1, D // HEADS, generator=generator)

            def attend(token=token, keys=keys, values=values):
                q, k, v = attention.inputs(token).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
                keys[:, :, -1:], values[:, :, -1:] = k, v
                y = F.scaled_dot_product_attention(q, keys, values)
                return attention.output(y.transpose(1, 2).flatten(-2))

            arms = {
                "polyspan, one token": lambda s=state, x=token: layer(x, state=s),
                "attention with a cache, one token": attend,
            }
            reading.append(race("one token more", arms, size={"read": t, "d": D, "r": R}, repeats=20 * repeats))
    save(
        "grassmann_mixing",
        forward + both + reading,
        peak_bytes_of_a_training_step={
            str(t): peaks(f"from grassmann_mixing import training\narms = training({t})") for t in trained
        },
        growth_in_length={arm: growth(forward, "t", arm) for arm in ("polyspan", "causal attention")},
        growth_in_tokens_read={
            arm: growth(reading, "read", arm) for arm in ("polyspan, one token", "attention with a cache, one token")
        },
        faster_than_attention_from=min(
            (r["size"]["t"] for r in forward if r["ratio"]["causal attention"]["median"] > 1), default=None
        ),
        largest_difference_from_the_literal_form=off,
    )


if __name__ == "__main__":
    main()
