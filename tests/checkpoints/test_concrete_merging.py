import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from polyspan.checkpoints import ConcreteMerger, TaskVector, adamerging, load_mask, task_arithmetic, ties
from polyspan.checkpoints._adaptation import Adaptation, concrete_sample
from polyspan.checkpoints._flat_model import PIECE, Feed, FlatModel, Heads, entropy
from polyspan.checkpoints.merging_plots import plot_merge
from polyspan.errors import CorruptFile

TASKS = ("a", "b", "c")


def network(seed, *layers):
    made = nn.Sequential(*(layers or (nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=generator))
    return made


def tuned(base, tasks=TASKS, size=0.4):
    made = {}
    for i, task in enumerate(tasks):
        made[task], generator = copy.deepcopy(base), torch.Generator().manual_seed(100 + i)
        with torch.no_grad():
            for p in made[task].parameters():
                p += size * torch.randn(p.shape, generator=generator)
    return made


def rows(seed=0, n=40, d=6, tasks=TASKS):
    generator = torch.Generator().manual_seed(seed)
    return {task: torch.randn(n, d, generator=generator) for task in tasks}


def heads(seed=1, classes=4, d=5, tasks=TASKS):
    generator = torch.Generator().manual_seed(seed)
    return {task: torch.randn(classes, d, generator=generator) for task in tasks}


@pytest.fixture
def world():
    base = network(0)
    return base, tuned(base), rows(), heads()


def cosine_logits(features, head, scale=12.0):
    return scale * F.normalize(features, dim=-1) @ F.normalize(head, dim=-1).T


def literal_merge(base, finetuned, weights, mask):
    """Task vector by task vector, tensor by tensor, through autograd."""
    state = {}
    for k, (name, start) in enumerate(base.state_dict().items()):
        total = start.double()
        for i, model in enumerate(finetuned.values()):
            total = total + weights[i, k] * (model.state_dict()[name] - start).double() * mask[name] / mask[name].mean()
        state[name] = total
    return state


def literal_loss(base, state, inputs, given):
    module, total = copy.deepcopy(base).double(), 0
    for task, x in inputs.items():
        p = cosine_logits(functional_call(module, state, (x.double(),)), given[task].double()).softmax(-1)
        total = total - (p * p.log()).sum(-1).mean()
    return total


@given(seed=st.integers(0, 10**6), temperature=st.sampled_from([0.3, 0.5, 1.0]))
@settings(max_examples=10, deadline=None)
def test_gradients_of_mask_and_weights_are_those_of_autograd(seed, temperature):
    base = network(seed)
    finetuned, inputs, given_heads = tuned(base), rows(seed, n=8), heads(seed)
    flat = FlatModel(base, finetuned)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(flat.base), generator=generator)
    u = torch.rand(len(flat.base), generator=generator).clamp(1e-6, 1 - 1e-6)
    w = torch.rand(3, len(flat.names), generator=generator)
    mask = torch.sigmoid((u.logit() + x) / temperature)
    flat.merge(w, mask)
    for task, batch in inputs.items():
        entropy(cosine_logits(flat.call(batch), given_heads[task])).backward()
    mine = flat.mask_gradient(w, mask, temperature, torch.empty_like(x))
    mine_w = flat.weight_gradient(mask, torch.empty_like(w))

    x64, w64 = x.double().requires_grad_(), w.double().requires_grad_()
    soft = torch.sigmoid((u.double().logit() + x64) / temperature)
    parts = dict(
        zip(flat.names, (soft[s].view(shape) for s, shape in zip(flat.slices, flat.shapes, strict=True)), strict=True)
    )
    literal_loss(base, literal_merge(base, finetuned, w64, parts), inputs, given_heads).backward()
    torch.testing.assert_close(mine.double(), x64.grad, atol=2e-5, rtol=2e-3)
    torch.testing.assert_close(mine_w.double(), w64.grad, atol=2e-4, rtol=2e-3)


def test_a_summed_task_vector_gives_the_same_merge_and_gradient_as_equal_weights(world):
    base, finetuned, inputs, given = world
    found = []
    for summed in (True, False):
        flat = FlatModel(base, finetuned, summed=summed)
        mask = torch.rand(len(flat.base), generator=torch.Generator().manual_seed(1))
        w = torch.full((len(flat.tau), len(flat.names)), 0.3)
        flat.merge(w, mask)
        entropy(cosine_logits(flat.call(inputs["a"]), given["a"])).backward()
        found.append((flat.theta, flat.mask_gradient(w, mask, 0.5, torch.empty_like(mask))))
    assert len(FlatModel(base, finetuned, summed=True).tau) == 1
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


def uniform_numbers(generator, n, bits=32):
    """One half and each word of a generator that an integer seeds, word by word, as the docstring says."""
    words = np.random.PCG64(int(torch.randint(2**63 - 1, (), generator=generator)))
    made = []
    while len(made) < n:
        word = int(words.random_raw())
        # Words of 32 bits come two at a time, the lower half first on the machines that tests run on.
        parts = [word & (2**32 - 1), word >> 32] if bits == 32 else [word]
        made += [0.5 + (k - 2**bits * (k >= 2 ** (bits - 1))) / 2**bits for k in parts]
    return torch.tensor(made[:n], dtype=torch.float32 if bits == 32 else torch.float64)


def test_the_mask_of_a_few_steps_is_that_of_a_literal_loop(world):
    base, finetuned, inputs, given = world
    merger = ConcreteMerger(lr=0.05, steps=6, batch_size=8, seed=3).fit(base, finetuned, inputs, given)
    feed = Feed(inputs, list(TASKS), 8, torch.Generator().manual_seed(4))
    noise = torch.Generator().manual_seed(3)
    names, shapes = zip(*((n, t.shape) for n, t in base.state_dict().items()), strict=True)
    x = torch.zeros(sum(s.numel() for s in shapes), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([x], lr=0.05)
    history = []
    for _ in range(6):
        u = uniform_numbers(noise, len(x)).double()
        soft = torch.sigmoid((u.log() - (1 - u).log() + x) / 0.5).split([s.numel() for s in shapes])
        mask = {n: m.view(s) for n, m, s in zip(names, soft, shapes, strict=True)}
        state = literal_merge(base, finetuned, torch.full((3, len(names)), 0.3), mask)
        loss = literal_loss(base, state, {task: feed.next(task) for task in TASKS}, given)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(float(loss.detach()) / 3)
    assert merger.history_["mask"] == pytest.approx(history, rel=1e-4)
    mine = torch.cat([merger.logits_[n].flatten() for n in names]).double()
    torch.testing.assert_close(mine, x.detach(), atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_adamerging_is_adam_on_the_entropy_by_weights(world, granularity):
    base, finetuned, inputs, given = world
    found = adamerging(base, finetuned, inputs, given, granularity=granularity, lr=0.02, steps=5, batch_size=8, seed=1)
    feed = Feed(inputs, list(TASKS), 8, torch.Generator().manual_seed(2))
    names = list(base.state_dict())
    w = torch.full((3, 1 if granularity == "task" else len(names)), 0.3, dtype=torch.float64, requires_grad=True)
    ones = {n: torch.ones(t.shape, dtype=torch.float64) for n, t in base.state_dict().items()}
    optimiser = torch.optim.Adam([w], lr=0.02)
    for _ in range(5):
        state = literal_merge(base, finetuned, w.expand(3, len(names)), ones)
        loss = literal_loss(base, state, {task: feed.next(task) for task in TASKS}, given)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for i, task in enumerate(TASKS):
        assert list(found.weights[task].values()) == pytest.approx(w[i].expand(len(names)).tolist(), abs=1e-4)
    final = literal_merge(base, finetuned, w.detach().expand(3, len(names)), ones)
    torch.testing.assert_close(found.state_dict, {n: t.float() for n, t in final.items()}, atol=1e-4, rtol=1e-4)


class Named(nn.Module):
    """A network whose input has a name, and which may give its features in one of several forms."""

    def __init__(self, form="rows"):
        super().__init__()
        self.inner, self.form = network(0), form

    def forward(self, x):
        found = self.inner(x)
        return found.T if self.form == "columns" else SimpleNamespace(pooler_output=found)


def adaptation(base, inputs, given, **options):
    options = {"batch_size": 8, **options}
    return Adaptation(ConcreteMerger(**options), base, tuned(base), inputs, given, summed=True)


@pytest.mark.parametrize(
    "case",
    ["tensors", "names", "tensors and names", "several rows", "several classes", "tokens", "no heads", "own heads"],
)
def test_one_pass_for_all_tasks_gives_what_a_pass_a_task_gives(case):
    base, inputs, given = network(0), rows(), heads()
    if "names" in case:
        base = Named()
        inputs = {t: {"x": x} if case == "names" or t == "b" else x for t, x in inputs.items()}
    if case == "several rows":
        inputs["b"] = inputs["b"][:5]
    if case == "several classes":
        given["b"] = given["b"][:3]
    if case == "tokens":
        inputs = {task: x.reshape(20, 2, 6) for task, x in inputs.items()}
    if case == "no heads":
        given = None
    if case == "own heads":
        given = {task: network(i, nn.Linear(5, 4), nn.Tanh()) for i, task in enumerate(TASKS)}
    found = []
    for joint in (True, False):
        run, counts, calls = adaptation(base, inputs, given, joint=joint), {}, []
        run.flat.module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found.append((run.losses(counts), {name: leaf.grad for name, leaf in run.flat.leaves.items()}, counts))
        assert len(calls) == (1 if joint else 3)
    torch.testing.assert_close(found[0][:2], found[1][:2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=0, atol=0)


@pytest.mark.parametrize("case", ["lengths", "kinds", "function", "columns", "batch statistics"])
def test_tasks_that_cannot_share_a_pass_have_one_each(case):
    base, inputs, given = network(0), rows(), heads()
    if case == "lengths":
        base, given = network(0, nn.Linear(1, 5)), heads()
        inputs = {task: torch.randn(40, 3 + i, 1) for i, task in enumerate(TASKS)}
    if case == "kinds":
        inputs["b"] = inputs["b"] > 0
        base = network(0, Widened(), nn.Linear(6, 5))
    if case == "function":
        given = lambda call, x, task: call(x)  # noqa: E731
    if case == "columns":
        base, inputs = Named("columns"), rows(n=8)
    if case == "batch statistics":
        base = network(0, nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False, track_running_stats=False))
    run, calls = adaptation(base, inputs, given), []
    run.flat.module.register_forward_pre_hook(lambda *_: calls.append(1))
    if case == "columns":
        assert run.heads.together(run.flat.call, inputs) is None
        return
    assert torch.isfinite(run.losses({})).all()
    assert len(calls) == 3


class Widened(nn.Module):
    """Takes inputs of any kind of number."""

    def forward(self, x):
        return x.to(torch.float32)


def test_a_sample_has_the_distribution_of_the_binary_concrete():
    x = torch.full((40_000,), 0.8)
    drawn = concrete_sample(x, 0.5, torch.Generator().manual_seed(0), out=torch.empty_like(x))
    # P(m > c) = sigmoid(x - λ logit(c)), from its definition.
    for c in (0.1, 0.5, 0.9):
        share = float(torch.sigmoid(torch.tensor(0.8 - 0.5 * math.log(c / (1 - c)))))
        assert float((drawn > c).float().mean()) == pytest.approx(share, abs=0.01)
    assert torch.isfinite(drawn).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 7, PIECE, 2 * PIECE + 3])
def test_uniform_numbers_are_those_that_the_docstring_tells_in_pieces_of_any_length(dtype, n):
    # With logits 0 and temperature 1 a sample is the uniform numbers themselves.
    x = torch.zeros(n, dtype=dtype)
    drawn = concrete_sample(x, 1.0, torch.Generator().manual_seed(5), out=torch.empty_like(x))
    expected = uniform_numbers(torch.Generator().manual_seed(5), n, torch.finfo(dtype).bits)
    torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=2e-7)


def test_draws_follow_one_another_and_leave_the_global_generator_alone():
    x, generator = torch.zeros(70_000), torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    first, second = (concrete_sample(x, 1.0, generator, out=torch.empty_like(x)) for _ in range(2))
    again = concrete_sample(x, 1.0, torch.Generator().manual_seed(0), out=torch.empty_like(x))
    assert torch.equal(first, again)
    # Six deviations of the correlation of independent numbers, between draws and between halves of words.
    for a, b in ((first, second), (first[::2], first[1::2])):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 6 / len(a) ** 0.5
    assert float(first.mean()) == pytest.approx(0.5, abs=6 * (1 / 12 / len(x)) ** 0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_result_is_task_arithmetic_under_the_mask_and_entropy_has_fallen(world):
    base, finetuned, inputs, given = world
    merger = ConcreteMerger(lr=0.1, steps=60, batch_size=20).fit(base, finetuned, inputs, given)
    made = merger.merged_state_dict()
    torch.testing.assert_close(made, task_arithmetic(base, finetuned, mask=merger.mask_), atol=1e-6, rtol=1e-4)
    assert sum(merger.history_["mask"][-10:]) < 0.95 * sum(merger.history_["mask"][:10])
    model = merger.merged_model()
    x = inputs["a"]
    torch.testing.assert_close(model(x), functional_call(base, made, (x,)))
    for name, mask in merger.mask_.items():
        torch.testing.assert_close(mask, torch.sigmoid(merger.logits_[name]))
    assert merger.n_steps_ == 60
    assert merger.weights_ == {task: dict.fromkeys(base.state_dict(), pytest.approx(0.3)) for task in TASKS}


def test_a_mask_that_has_not_moved_is_task_arithmetic(world):
    base, finetuned, inputs, given = world
    merger = ConcreteMerger(lr=1e-9, steps=1, init_logit=2.0).fit(base, finetuned, inputs, given)
    torch.testing.assert_close(merger.merged_state_dict(), task_arithmetic(base, finetuned), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_with_adamerging_the_mask_is_frozen_and_the_weights_move_within_their_bounds(world, granularity):
    base, finetuned, inputs, given = world
    options = {"granularity": granularity, "lr": 0.05, "steps": 20, "weight_lr": 0.05, "weight_steps": 30}
    merger = ConcreteMerger("adamerging", **options).fit(base, finetuned, inputs, given)
    assert len(merger.history_["weights"]) == 30
    values = [v for by_name in merger.weights_.values() for v in by_name.values()]
    assert 0 <= min(values) < 0.29
    assert 0.31 < max(values) <= 1
    assert (len(set(values)) <= 3) == (granularity == "task")
    w = torch.tensor([list(merger.weights_[task].values()) for task in TASKS], dtype=torch.float64)
    final = literal_merge(base, finetuned, w, {n: m.double() for n, m in merger.mask_.items()})
    made = {n: t.double() for n, t in merger.merged_state_dict().items()}
    torch.testing.assert_close(made, final, atol=1e-5, rtol=1e-4)


def test_final_masks_are_the_mean_a_draw_or_zeros_and_ones(world):
    base, finetuned, inputs, given = world
    made = {
        kind: ConcreteMerger(steps=3, final_mask=kind, seed=5).fit(base, finetuned, inputs, given)
        for kind in ("mean", "sample", "bernoulli")
    }
    masks = {kind: torch.cat([m.flatten() for m in merger.mask_.values()]) for kind, merger in made.items()}
    assert set(masks["bernoulli"].tolist()) == {0.0, 1.0}
    assert masks["mean"].std() < 0.01
    assert masks["sample"].std() > 0.2
    torch.testing.assert_close(made["mean"].logits_, made["sample"].logits_, atol=0, rtol=0)


def test_one_seed_gives_one_result_and_global_chance_is_left_alone(world):
    base, finetuned, inputs, given = world
    before, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    loaders = {
        task: torch.utils.data.DataLoader(x, batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(0))
        for task, x in inputs.items()
    }
    ConcreteMerger(steps=3).fit(base, finetuned, loaders, given)
    one, two, other = (
        ConcreteMerger(steps=3, seed=seed).fit(base, finetuned, inputs, given).merged_state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_default_dtype() == dtype
    torch.testing.assert_close(one, two, atol=0, rtol=0)
    assert not torch.equal(one["0.weight"], other["0.weight"])


class Dying:
    """Batches that end in an interrupt after a number of draws, over all tasks."""

    def __init__(self, tensor, left):
        self.batches, self.left = tensor.split(7), left

    def __iter__(self):
        for batch in self.batches:
            self.left[0] -= 1
            if self.left[0] < 0:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize(
    ("options", "deaths"),
    [
        ({}, [0.5, 0.95]),
        ({"method": "adamerging", "weight_steps": 230, "final_mask": "bernoulli"}, [0.3, 0.85]),
        ({"method": "adamerging", "weight_steps": 230, "granularity": "task", "final_mask": "sample"}, [0.75, 0.95]),
    ],
)
def test_a_killed_run_goes_on_and_ends_in_the_same_bits(world, tmp_path, options, deaths):
    base, finetuned, inputs, given = world
    options = {"steps": 230, "lr": 0.05, "seed": 3, "stop": False, **options}
    draws = [10**9]

    def fit(left, **more):
        loaders = {task: Dying(tensor, left) for task, tensor in inputs.items()}
        return ConcreteMerger(**options).fit(base, finetuned, loaders, given, **more)

    whole = fit(draws)
    total = 10**9 - draws[0]
    path = tmp_path / "run.safetensors"
    for share in deaths:
        with pytest.raises(KeyboardInterrupt):
            fit([int(share * total)], checkpoint=path)
        assert path.exists()
    resumed = fit([10**9], checkpoint=path)
    assert not path.exists()
    assert resumed.history_ == whole.history_
    assert resumed.weights_ == whole.weights_
    for name, mask in whole.mask_.items():
        assert torch.equal(resumed.mask_[name], mask)
        assert torch.equal(resumed.merged_state_dict()[name], whole.merged_state_dict()[name])


def test_adamerging_goes_on_and_a_kept_run_is_not_taken_for_another(world, tmp_path):
    base, finetuned, inputs, given = world
    path = tmp_path / "run.safetensors"

    def merge(left, **more):
        loaders = {task: Dying(tensor, [left]) for task, tensor in inputs.items()}
        return adamerging(base, finetuned, loaders, given, steps=150, **more)

    whole = merge(10**9)
    with pytest.raises(KeyboardInterrupt):
        merge(120, checkpoint=path)
    for change in ({"lr": 0.5}, {"seed": 1}, {"ignore_keys": ["0.*"]}):
        with pytest.raises(ValueError, match=r"run\.safetensors belongs to other work, which differs in"):
            merge(10**9, checkpoint=path, **change)
    with pytest.raises(ValueError, match="differs in changes"):
        adamerging(base, tuned(base, size=0.5), inputs, given, steps=150, checkpoint=path)
    resumed = merge(10**9, checkpoint=path)
    assert resumed.history == whole.history
    assert resumed.weights == whole.weights
    path.write_bytes(b"cut off")
    with pytest.raises(CorruptFile, match=r"run\.safetensors"):
        merge(10**9, checkpoint=path)


@pytest.mark.parametrize("method", ["task_arithmetic", "adamerging"])
def test_the_base_and_the_checkpoints_are_not_changed(world, method):
    base, finetuned, inputs, given = world
    base.train()
    before = copy.deepcopy([m.state_dict() for m in (base, *finetuned.values())])
    merger = ConcreteMerger(method, steps=4, weight_steps=4).fit(base, finetuned, inputs, given)
    merger.merged_state_dict()["0.weight"].zero_()
    assert merger.merged_state_dict()["0.weight"].any()
    torch.testing.assert_close([m.state_dict() for m in (base, *finetuned.values())], before, atol=0, rtol=0)
    assert base.training
    assert all(p.requires_grad and p.grad is None for p in base.parameters())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x)))


def test_tied_weights_have_one_mask_and_stay_tied():
    base = Tied()
    finetuned, inputs = tuned(base), rows(d=5)
    merger = ConcreteMerger(lr=0.1, steps=5).fit(base, finetuned, inputs, heads())
    assert list(merger.mask_) == ["embed.weight"]
    made = merger.merged_state_dict()
    torch.testing.assert_close(made["head.weight"], made["embed.weight"], atol=0, rtol=0)
    assert merger.merged_model().head.weight is not None
    assert not torch.equal(made["head.weight"], base.head.weight)


def test_running_statistics_are_averaged_and_never_masked():
    base = network(0, nn.Linear(6, 5), nn.BatchNorm1d(5))
    finetuned = tuned(base)
    for i, model in enumerate(finetuned.values()):
        model[1].running_mean.fill_(float(i))
    merger = ConcreteMerger(steps=2).fit(base, finetuned, rows(), heads())
    assert "1.running_mean" not in merger.mask_
    assert set(merger.skipped_) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    torch.testing.assert_close(merger.merged_state_dict()["1.running_mean"], torch.full((5,), 1.0))
    assert merger.merged_state_dict()["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_narrow_base_is_merged_in_float32_and_returned_in_its_own_dtype(world, dtype):
    base, finetuned, inputs, given = world
    found = ConcreteMerger(lr=0.05, steps=4).fit(base, finetuned, inputs, given).merged_state_dict()
    narrow = {task: model.to(dtype) for task, model in copy.deepcopy(finetuned).items()}
    merger = ConcreteMerger(lr=0.05, steps=4).fit(copy.deepcopy(base).to(dtype), narrow, inputs, given)
    made = merger.merged_state_dict()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in made.values()} == {dtype}
    assert {t.dtype for t in merger.mask_.values()} == {wide}
    if dtype != torch.float64:  # its noise is drawn in float64, and is other noise
        torch.testing.assert_close({n: t.float() for n, t in made.items()}, found, atol=0.05, rtol=0.05)


def test_labels_in_a_loader_are_not_looked_at_and_it_is_said(world):
    base, finetuned, inputs, given = world
    plain = {task: list(x.split(10)) for task, x in inputs.items()}
    labelled = {task: [(x, torch.full((10,), 99)) for x in batches] for task, batches in plain.items()}
    labelled["c"] = [{"input": x, "labels": torch.zeros(10)} for x in plain["c"]]
    found = [ConcreteMerger(steps=6).fit(base, finetuned, loaders, given) for loaders in (plain, labelled)]
    torch.testing.assert_close(found[0].mask_, found[1].mask_, atol=0, rtol=0)
    assert [m.labels_ignored_ for m in found] == [[], ["a", "b", "c"]]


def test_networks_that_give_logits_outputs_or_need_a_function_are_served(world):
    base, finetuned, inputs, given = world
    scaled = ConcreteMerger(steps=3).fit(base, finetuned, inputs, given)

    def logits(call, x, task):
        return cosine_logits(call(x), given[task])

    by_function = ConcreteMerger(steps=3).fit(base, finetuned, inputs, logits)
    by_callables = ConcreteMerger(steps=3).fit(
        base, finetuned, inputs, {task: lambda f, t=task: cosine_logits(f, given[t]) for task in TASKS}
    )
    for found in (by_function, by_callables):
        torch.testing.assert_close(found.mask_, scaled.mask_, atol=1e-6, rtol=1e-5)
    whole = ConcreteMerger(steps=3).fit(base, finetuned, inputs)
    assert whole.n_steps_ == 3
    assert not torch.equal(whole.mask_["0.weight"], scaled.mask_["0.weight"])
    read = Heads(given, TASKS, True, 12.0, inputs["a"])
    out = read(lambda x: SimpleNamespace(pooler_output=base(x)), inputs["a"], "a")
    torch.testing.assert_close(out, cosine_logits(base(inputs["a"]), given["a"]))
    with pytest.raises(ValueError, match="base must return a tensor or an output with pooler_output"):
        read(lambda x: SimpleNamespace(other=x), inputs["a"], "a")


def test_linear_heads_are_warned_of_because_entropy_falls_without_being_right(world):
    base, finetuned, inputs, given = world
    linear = {task: nn.Linear(5, 4) for task in TASKS}
    with pytest.warns(UserWarning, match="heads of a, b, c are linear: entropy can fall because features grow"):
        ConcreteMerger(steps=2).fit(base, finetuned, inputs, linear)
    with pytest.warns(UserWarning, match="are linear"):
        adamerging(base, finetuned, inputs, given, normalize_logits=False, steps=1)


def test_a_collapse_to_one_class_stops_with_a_warning_and_keeps_the_best_mask(world):
    base, finetuned, inputs, _ = world
    calls = {"n": 0}

    def collapsing(call, x, task):
        calls["n"] += 1
        logits = call(x)[:, :3]
        # From the third window on, one class takes all of task b.
        return logits + (torch.tensor([50.0, 0, 0]) if task == "b" and calls["n"] > 3 * 50 else 0)

    with pytest.warns(UserWarning, match="stopped after 75 steps: nearly all predictions of b are one class"):
        merger = ConcreteMerger(steps=200, lr=0.01).fit(base, finetuned, inputs, collapsing)
    assert merger.n_steps_ == 75
    assert "one class" in merger.stopped_
    two = ConcreteMerger(steps=50, lr=0.01, stop=False).fit(base, finetuned, inputs, lambda c, x, _: c(x)[:, :3])
    one = ConcreteMerger(steps=25, lr=0.01, stop=False).fit(base, finetuned, inputs, lambda c, x, _: c(x)[:, :3])
    assert any(torch.equal(merger.mask_["0.weight"], m.mask_["0.weight"]) for m in (one, two))


def test_rising_entropy_stops_with_a_warning(world):
    base, finetuned, inputs, _ = world
    calls = {"n": 0}

    def rising(call, x, _):
        calls["n"] += 1
        return call(x) * (0.1 if calls["n"] > 3 * 25 else 3.0)

    with pytest.warns(UserWarning, match=r"stopped after 50 steps: entropy rose from .* to"):
        ConcreteMerger(steps=200).fit(base, finetuned, inputs, rising)


def test_a_saved_mask_merges_as_the_merger_does(world, tmp_path):
    base, finetuned, inputs, given = world
    merger = ConcreteMerger(lr=0.1, steps=20).fit(base, finetuned, inputs, given)
    mask = load_mask(merger.save_mask(tmp_path / "mask.safetensors"))
    torch.testing.assert_close(mask, merger.mask_, atol=1e-3, rtol=0)
    made = task_arithmetic(base, finetuned, mask=mask)
    torch.testing.assert_close(made, merger.merged_state_dict(), atol=2e-3, rtol=2e-3)


def test_the_report_holds_the_accuracy_of_the_merge_and_its_rivals(world):
    base, finetuned, inputs, given = world
    labelled = {}
    for task, x in inputs.items():
        with torch.no_grad():
            labelled[task] = list(
                zip(x.split(15), cosine_logits(finetuned[task](x), given[task]).argmax(-1).split(15), strict=True)
            )
    merger = ConcreteMerger(steps=10, lr=0.05, weight_steps=5).fit(base, finetuned, inputs, given)
    report = merger.evaluate(labelled, rivals=("individual", "average", "task_arithmetic", "ties", "adamerging"))
    assert report.accuracy["individual"] == dict.fromkeys(TASKS, 1.0)
    states = {
        "merged": merger.merged_state_dict(),
        "average": task_arithmetic(base, finetuned, scaling=1 / 3),
        "task_arithmetic": task_arithmetic(base, finetuned),
        "ties": ties(base, finetuned),
        "adamerging": adamerging(base, finetuned, inputs, given, steps=5).state_dict,
    }
    for name, state in states.items():
        for task, x in inputs.items():
            y = torch.cat([labels for _, labels in labelled[task]])
            right = cosine_logits(functional_call(base, state, (x,)), given[task]).argmax(-1) == y
            assert report.accuracy[name][task] == pytest.approx(float(right.float().mean())), name
    assert report.mean("individual") == 1
    with pytest.raises(ValueError, match="must give inputs and labels, got inputs alone"):
        merger.evaluate({task: [x] for task, x in inputs.items()})
    with pytest.raises(ValueError, match="labelled_loaders must have batches for every task, got none for b"):
        merger.evaluate({"a": labelled["a"]})
    with pytest.raises(ValueError, match=r"rivals must be among .* got 'fisher'"):
        merger.evaluate(labelled, rivals=("fisher",))


def test_ignored_tensors_stay_the_bases(world):
    base, finetuned, inputs, given = world
    merger = ConcreteMerger(steps=3, ignore_keys=["2.*"]).fit(base, finetuned, inputs, given)
    assert list(merger.mask_) == ["0.weight", "0.bias"]
    torch.testing.assert_close(merger.merged_state_dict()["2.weight"], base.state_dict()["2.weight"], atol=0, rtol=0)
    with pytest.raises(ValueError, match="base must have float tensors that are not in ignore_keys"):
        ConcreteMerger(ignore_keys=["*"]).fit(base, finetuned, inputs, given)


def test_state_dicts_lists_and_files_are_taken_as_modules_are(world, tmp_path):
    from polyspan.io import write_members

    base, finetuned, inputs, given = world
    for task, model in finetuned.items():
        write_members(tmp_path / f"{task}.safetensors", {n: t.numpy() for n, t in model.state_dict().items()})
    found = ConcreteMerger(steps=3).fit(base, finetuned, inputs, given)
    paths = {task: tmp_path / f"{task}.safetensors" for task in TASKS}
    torch.testing.assert_close(ConcreteMerger(steps=3).fit(base, paths, inputs, given).mask_, found.mask_)
    numbered = [{str(i): part[task] for i, task in enumerate(TASKS)} for part in (inputs, given)]
    by_list = ConcreteMerger(steps=3).fit(base, list(finetuned.values()), *numbered)
    torch.testing.assert_close(by_list.mask_, found.mask_)
    labelled = {str(i): [(x, torch.zeros(len(x), dtype=torch.int64))] for i, x in enumerate(inputs.values())}
    assert set(by_list.evaluate(labelled).accuracy["individual"]) == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "fisher"}, r"method must be one of \('task_arithmetic', 'adamerging'\), got 'fisher'"),
        ({"granularity": "row"}, "granularity must be one of .* got 'row'"),
        ({"final_mask": "sign"}, "final_mask must be one of .* got 'sign'"),
        ({"temperature": 0}, "temperature must be a number above 0, got 0"),
        ({"lr": math.nan}, "lr must be a number above 0, got nan"),
        ({"inner_lr": -1}, "inner_lr must be a number above 0, got -1"),
        ({"logit_scale": 0.0}, "logit_scale must be a number above 0, got 0.0"),
        ({"scaling": math.inf}, "scaling must be finite, got inf"),
        ({"init_logit": math.nan}, "init_logit must be finite, got nan"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"weight_steps": -1}, "weight_steps must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_options_outside_their_range_are_named(world, options, told):
    with pytest.raises(ValueError, match=told):
        ConcreteMerger(**options).fit(*world)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda b, f, x, h: (b, f, {"a": x["a"]}, h),
            "loaders must have unlabelled inputs for every task, got none for b",
        ),
        (lambda b, f, x, h: (b, f, x, {"a": h["a"]}), "heads must have one for every task, got none for b, c"),
        (lambda b, f, x, h: (b, f, {**x, "b": iter([x["b"]])}, h), r"loaders\['b'\] must give batches again and again"),
        (lambda b, f, x, h: (b, f, {**x, "b": x["b"][:0]}, h), r"loaders\['b'\] must give batches again"),
        (
            lambda b, f, x, h: (b, f, x, {**h, "b": h["b"][0]}),
            r"heads\['b'\] must be a weight \(classes, d\), got shape",
        ),
        (lambda b, f, x, h: (b, f, x, {**h, "b": 3}), r"heads\['b'\] must be a weight \(classes, d\) or callable"),
        (lambda b, f, x, h: (b, f, x, 3), "heads must be a mapping, a function or None, got int"),
        (lambda b, f, x, h: (b, {}, x, h), "finetuned must hold at least one checkpoint"),
        (lambda b, f, x, h: (b, {**f, "b": nn.Linear(6, 5)}, x, h), r"finetuned\['b'\] must have the names and shapes"),
        (lambda b, f, x, h: (b, f, {**x, "c": x["c"] * math.nan}, h), "entropy must be finite, got nan by step"),
    ],
)
def test_bad_input_is_named(world, change, told):
    with pytest.raises(ValueError, match=told):
        ConcreteMerger(steps=3).fit(*change(*world))


def test_asking_before_fit_is_an_error():
    with pytest.raises(ValueError, match="fit must be called first"):
        ConcreteMerger().merged_state_dict()


def test_masks_and_task_vectors_have_the_same_names(world):
    base, finetuned, inputs, given = world
    merger = ConcreteMerger(steps=1).fit(base, finetuned, inputs, given)
    assert merger.mask_.keys() == TaskVector(base, finetuned["a"]).tensors.keys()


def test_the_picture_tells_every_task_and_method_and_repeats_its_bytes(world, tmp_path):
    base, finetuned, inputs, given = world
    merger = ConcreteMerger("adamerging", steps=30, weight_steps=3).fit(base, finetuned, inputs, given)
    labelled = {task: [(x, torch.zeros(len(x), dtype=torch.int64))] for task, x in inputs.items()}
    report = merger.evaluate(labelled, rivals=("individual", "ties"))
    one, two = (plot_merge(merger, report, tmp_path / f"{name}.svg") for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    text = one.read_text()
    for word in (*TASKS, "individual, mean", "ties, mean", "merged, mean", "weights"):
        assert f"<!-- {word}" in text
    with pytest.raises(ValueError, match=r"path must end in \.svg, \.png or \.pdf, got .*merge\.gif"):
        plot_merge(merger, report, tmp_path / "merge.gif")


@pytest.mark.parametrize("method", ["task_arithmetic", "adamerging"])
@pytest.mark.parametrize("where", ["base", "finetuned"])
def test_a_checkpoint_that_is_not_finite_is_told_by_the_tensor(world, method, where):
    base, finetuned, inputs, given = world
    name = list(base.state_dict())[1]
    with torch.no_grad():
        (base if where == "base" else finetuned["b"]).state_dict()[name].view(-1)[0] = torch.inf
    with pytest.raises(ValueError, match=f"entropy must be finite.*holds NaN or infinity in {name}"):
        ConcreteMerger(method, steps=2, weight_steps=1).fit(base, finetuned, inputs, given)
