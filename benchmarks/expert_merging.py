"""Race the streamed similarity of experts against a Python loop over experts, one forward each, that keeps outputs.

The loop is how HC-SMoE and its kin are usually written: each expert is called on the tokens, its outputs (n, m, d) are
kept, and cosines are taken pair by pair. Both see the same tokens and the same fused layer of Mixtral.

The system is the catalogue's ``sub-moe``.
"""

import torch
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from _runner import growth, peak_in_child, race, save
from polyspan.checkpoints._expert_capture import LayerInputs
from polyspan.checkpoints._expert_layout import fused_stack
from polyspan.checkpoints._expert_statistics import expert_statistics

SIZES = ((8, 1024, 128, 256), (32, 1024, 128, 256), (64, 2048, 128, 256))

PEAK = """
import sys
sys.path.insert(0, {folder!r})
import torch
from expert_merging import literal, make, streamed
torch.set_num_threads(1)
world = make(*{size!r})

def main():
    {arm}(world)
"""


def make(n, tokens, hidden, inner):
    generator = torch.Generator().manual_seed(n)
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=inner, num_local_experts=n, experts_implementation="eager"
    )
    experts = MixtralExperts(config).requires_grad_(False)
    for part in experts.parameters():
        part.copy_(torch.randn(part.shape, generator=generator) / part.shape[-1] ** 0.5)
    x = torch.randn(tokens, hidden, generator=generator)
    top, index = torch.randn(tokens, n, generator=generator).softmax(-1).topk(2)
    return experts, LayerInputs(x, torch.zeros(tokens, n).scatter(1, index, top))


def streamed(world):
    experts, inputs = world
    return torch.from_numpy(expert_statistics(fused_stack(experts), inputs).gram)


@torch.no_grad()
def literal(world):
    experts, (x, _) = world
    n = experts.num_experts
    outputs = []
    for j in range(n):
        index = torch.full((len(x), 1), j)
        outputs.append(experts(x, index, torch.ones(len(x), 1)))
    gram = torch.eye(n, dtype=torch.float64)
    for i in range(n):
        for j in range(i):
            gram[i, j] = gram[j, i] = F.cosine_similarity(outputs[i], outputs[j], dim=-1).mean()
    return gram


def main(sizes=SIZES, repeats=5):
    torch.set_num_threads(1)
    records = []
    for size in sizes:
        world = make(*size)
        torch.testing.assert_close(streamed(world), literal(world), atol=1e-5, rtol=0)
        named = dict(zip(("experts", "tokens", "hidden", "intermediate"), size, strict=True))
        arms = {"polyspan": lambda w=world: streamed(w), "a loop over experts": lambda w=world: literal(w)}
        records.append(race("similarity of experts", arms, size=named, repeats=repeats))
    folder = __file__.rpartition("/")[0]
    peaks = {arm: peak_in_child(PEAK.format(folder=folder, size=sizes[-1], arm=arm)) for arm in ("streamed", "literal")}
    save(
        "expert_merging",
        records,
        growth_in_experts=growth(records, "experts"),
        growth_of_the_loop=growth(records, "experts", "a loop over experts"),
        largest_ratio=records[-1]["ratio"]["a loop over experts"]["median"],
        peak_bytes=peaks,
    )


if __name__ == "__main__":
    main()
