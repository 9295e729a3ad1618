"""Race a step of the Concrete mask against a literal loop over task vectors through autograd.

The literal loop is the published algorithm as it is usually written: at each step every task vector is multiplied by
the mask, divided by its mean and added, tensor by tensor, and autograd goes back through all of it. Target: a step at
least 3 times as fast on an MLP of 5 million weights.

Two races. "concrete step" is all of it: reading the checkpoints, and 40 times the mask, the merge, forward and backward
passes and Adam (the published runs take 2,000 steps). "mask, merge and their gradient" leaves the network out: one draw
of the mask, the merge of eight task vectors, and the way back from a given gradient of the merged weights to the mask's
logits. The network's products of matrices and the uniform numbers are as many in both arms, and bound the first race;
the literal loop draws its numbers by torch's generator, as published, and we draw ours by a faster one.
"""

import copy

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from _runner import growth, race, save
from polyspan.checkpoints import ConcreteMerger
from polyspan.checkpoints._adaptation import concrete_sample
from polyspan.checkpoints._flat_model import FlatModel

TASKS, CLASSES, BATCH, STEPS, FEATURES = 8, 10, 16, 40, 64
WIDTHS = (256, 512, 1536)


def network(width, generator):
    net = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, FEATURES)
    )
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / width**0.5)
    return net


def make(width):
    generator = torch.Generator().manual_seed(width)
    base = network(width, generator)
    finetuned = {}
    for task in range(TASKS):
        finetuned[f"task{task}"] = copy.deepcopy(base)
        with torch.no_grad():
            for p in finetuned[f"task{task}"].parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.2 / width**0.5)
    inputs = {task: torch.randn(4 * BATCH, width, generator=generator) for task in finetuned}
    heads = {task: torch.randn(CLASSES, FEATURES, generator=generator) for task in finetuned}
    return base, finetuned, inputs, heads


def literal(base, finetuned, inputs, heads, steps):
    """Mask every task vector at every step; return the logits of the mask."""
    generator = torch.Generator().manual_seed(0)
    start, taus = literal_parts(base, finetuned)
    x = {name: torch.zeros_like(p, requires_grad=True) for name, p in start.items()}
    optimiser = torch.optim.Adam(x.values(), lr=1e-3)
    for step in range(steps):
        merged = masked(x, taus, start, lambda name: torch.rand(x[name].shape, generator=generator))
        loss = torch.zeros(())
        for task, rows in inputs.items():
            batch = rows[step % 4 * BATCH :][:BATCH]
            features = functional_call(base, merged, (batch,))
            logp = torch.log_softmax(12 * F.normalize(features, dim=1) @ F.normalize(heads[task], dim=1).T, dim=1)
            loss = loss - (logp.exp() * logp).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return x


def masked(x, taus, start, uniform):
    """Return the merged weights by the literal loop; ``uniform`` draws the numbers for a name."""
    masks = {}
    for name in start:
        u = uniform(name).clamp(1e-7, 1 - 1e-7)
        m = torch.sigmoid((u.log() - (1 - u).log() + x[name]) / 0.5)
        masks[name] = m / m.mean()
    merged = dict(start)
    for tau in taus:
        merged = {name: merged[name] + 0.3 * (tau[name] * masks[name]) for name in merged}
    return merged


def without_network(world):
    """One mask, one merge, and the gradient of the logits from a given one of the weights, in both arms."""
    base, finetuned, _, _ = world
    flat = FlatModel(base, finetuned, summed=True)
    x, mask, found = (torch.zeros_like(flat.theta) for _ in range(3))
    own, their = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    weights = torch.full((1, len(flat.names)), 0.3)
    up = flat.named(torch.randn(flat.theta.shape, generator=torch.Generator().manual_seed(1)))
    for name, leaf in flat.leaves.items():
        leaf.grad = up[name]
    start, taus = literal_parts(base, finetuned)
    logits = {name: torch.zeros_like(p, requires_grad=True) for name, p in start.items()}

    def ours():
        concrete_sample(x, 0.5, own, out=mask)
        flat.merge(weights, mask)
        flat.mask_gradient(weights, mask, 0.5, found)

    def theirs(uniform=lambda name: torch.rand(start[name].shape, generator=their)):
        merged = masked(logits, taus, start, uniform)
        for one in logits.values():
            one.grad = None
        torch.autograd.backward(list(merged.values()), [up[name] for name in merged])

    ours()
    # With logits 0 and temperature 1 a sample is the uniform numbers themselves.
    same = flat.named(concrete_sample(x, 1.0, torch.Generator().manual_seed(0), out=torch.empty_like(x)))
    theirs(same.__getitem__)
    for name, part in flat.named(found).items():
        torch.testing.assert_close(part, logits[name].grad, rtol=1e-3, atol=1e-5)
    return {"polyspan": ours, "a literal loop over task vectors": theirs}


def literal_parts(base, finetuned):
    """Return the base's weights and the task vectors, by name."""
    start = {name: p.detach() for name, p in base.named_parameters()}
    return start, [{name: p.detach() - start[name] for name, p in net.named_parameters()} for net in finetuned.values()]


def steps_of(world, steps, **options):
    merger = ConcreteMerger(steps=steps, batch_size=BATCH, stop=False, **options)
    return merger.fit(*world)


def main(widths=WIDTHS, repeats=3):
    torch.set_num_threads(1)
    whole, alone = [], []
    for width in widths:
        world = make(width)
        parameters = sum(p.numel() for p in world[0].parameters())
        # Setting up (reading T checkpoints into task vectors) is in both arms.
        arms = {
            "polyspan": lambda w=world: steps_of(w, STEPS),
            "a literal loop over task vectors": lambda w=world: literal(*w, STEPS),
        }
        size = {"parameters": parameters, "tasks": TASKS, "batch": BATCH, "steps": STEPS}
        whole.append(race("concrete step", arms, size=size, repeats=repeats))
        size = {"parameters": parameters, "tasks": TASKS}
        alone.append(race("mask, merge and their gradient", without_network(world), size=size, repeats=9))
    ratio = "a literal loop over task vectors"
    save(
        "concrete_merging",
        whole + alone,
        growth_in_parameters=growth(whole, "parameters"),
        growth_in_parameters_without_network=growth(alone, "parameters"),
        largest_ratio=whole[-1]["ratio"][ratio]["median"],
        largest_ratio_without_network=alone[-1]["ratio"][ratio]["median"],
        targets={"concrete step": 3, "mask, merge and their gradient": 3},
    )


if __name__ == "__main__":
    main()
