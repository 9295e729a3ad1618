import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from polyspan.checkpoints import ExpertMerger, MergedExperts, calibrate_experts
from polyspan.checkpoints._expert_capture import LayerInputs, probe_gates, token_batches
from polyspan.checkpoints._expert_combining import (
    LowRank,
    group_weights,
    input_gram,
    low_rank,
    match_activations,
    match_neurons,
    merge_group,
    permuted,
    refit_down,
)
from polyspan.checkpoints._expert_groups import allocate, embedding, group_experts, windows, within_groups
from polyspan.checkpoints._expert_layout import ExpertLayer, ExpertStack, find_expert_layers, fused_parameters, stack_of
from polyspan.checkpoints._expert_statistics import expert_statistics
from polyspan.checkpoints.expert_merging import RIVALS
from polyspan.checkpoints.merged_experts import swiglu
from polyspan.testing import ModuleCase, check_module

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "experts_implementation": "eager",
}  # fmt: skip
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
CONFIGS = {
    "mixtral": ("MixtralConfig", {"intermediate_size": 24, "num_local_experts": 4}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            "intermediate_size": 32, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16,
            "num_experts": 4, "decoder_sparse_step": 1,
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig", {"intermediate_size": 32, "moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
    ),
    "olmoe": ("OlmoeConfig", {"intermediate_size": 24, "num_experts": 4, "eos_token_id": 2}),
    "deepseek-v2": (
        "DeepseekV2Config",
        {
            "intermediate_size": 24, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 1,
            "first_k_dense_replace": 1, **LATENT,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            "intermediate_size": 24, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1, **LATENT,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            "intermediate_size": 24, "num_local_experts": 4, "head_dim": 8, "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}  # fmt: skip


def small(kind="mixtral", dtype=torch.float32, seed=0, **changes):
    name, own = CONFIGS[kind]
    config = getattr(transformers, name)(**COMMON, num_experts_per_tok=2, **{**own, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape) * 0.2 if p.ndim > 1 else 1 + 0.1 * torch.randn(p.shape))
    return model.to(dtype).eval()


def tokens(n=8, length=20, seed=1):
    return torch.randint(0, 60, (n, length), generator=torch.Generator().manual_seed(seed))


def random_stack(n=3, hidden=6, inner=5, *, bias=False, gated=True, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    biases = {"up_bias": draw(n, inner), "down_bias": draw(n, hidden)} if bias else {}
    if bias and gated:
        biases["gate_bias"] = draw(n, inner)
    return ExpertStack(
        draw(n, inner, hidden) if gated else None, draw(n, inner, hidden), draw(n, hidden, inner), swiglu, **biases
    )


def random_inputs(stack, m=40, top_k=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, stack.up.shape[2], generator=generator, dtype=stack.up.dtype)
    top, index = torch.randn(m, len(stack), generator=generator, dtype=x.dtype).softmax(-1).topk(top_k)
    return LayerInputs(x, torch.zeros(m, len(stack), dtype=x.dtype).scatter(1, index, top))


def outputs_of(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


class Wrapped(nn.Module):
    """Routes by two tensors of floats, as a check of modules can feed them."""

    def __init__(self, **options):
        super().__init__()
        self.experts = MergedExperts(5, 3, 8, 6, **options)

    def forward(self, x, scores):
        top, index = scores.softmax(-1).topk(2)
        return self.experts(x, index, top)


@pytest.mark.parametrize("options", [{}, {"ranks": {"gate": 2, "up": 3, "down": 2}}, {"gated": False, "bias": True}])
def test_merged_experts_keep_the_promises_of_a_module(options):
    def inputs(batch, generator):
        return torch.randn(batch, 8, generator=generator), torch.randn(batch, 5, generator=generator)

    check_module(ModuleCase(lambda **factory: Wrapped(**options, **factory), inputs, compiles=False))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_layout_of_transformers_is_read_and_its_experts_compute_the_same(kind):
    model = small(kind, torch.float64)
    layers = find_expert_layers(model)
    assert len(layers) == (1 if kind.startswith("deepseek") else 2)
    layer, stack = layers[-1], layers[-1].stack()
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = torch.arange(7).unsqueeze(1) % len(stack)
    with torch.no_grad():
        own = layer.experts(x, index, torch.ones(7, 1, dtype=torch.float64))
    mine = stack.outputs(x)[index[:, 0], torch.arange(7)]
    torch.testing.assert_close(mine, own, atol=1e-12, rtol=0)
    for name, part in fused_parameters(stack, layer.experts).items():
        assert torch.equal(part, getattr(layer.experts, name))


@pytest.mark.parametrize("kind", CONFIGS)
def test_merging_equal_experts_changes_nothing_in_any_layout(kind):
    model = small(kind, torch.float64)
    for layer in find_expert_layers(model):
        for part in layer.experts.parameters():
            part.data[1::2] = part.data[::2]
    n = find_expert_layers(model)[0].n_experts
    for make in (ExpertMerger.published, ExpertMerger.recommended):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            merger = make(n // 2).fit(model, tokens())
        merged = merger.merge(model)
        # Norms of transformers round to float32, also in a wider model.
        torch.testing.assert_close(outputs_of(merged), outputs_of(model), atol=1e-5, rtol=0)
        for labels in merger.groups_.values():
            np.testing.assert_array_equal(labels, np.arange(n) // 2)
        assert merger.report_.parameters_after * 2 == merger.report_.parameters


def test_union_svd_without_truncation_is_the_average_by_frequency():
    stack, inputs = random_stack(4), random_inputs(random_stack(4))
    counts = (inputs.gates != 0).sum(0).double()
    merged, factors = merge_group(stack, [0, 1, 3], counts.numpy(), inputs)
    assert factors is None
    f = counts[[0, 1, 3]] / len(inputs.x)
    for name in ("gate", "up", "down"):
        W = stack.parts[name][[0, 1, 3]]
        U, S, Vh = torch.linalg.svd(torch.cat(list(W), dim=1), full_matrices=False)
        V = Vh.view(len(S), 3, -1).movedim(1, 0)
        published = U @ torch.diag(S) @ ((f[:, None, None] * V).sum(0) / f.sum())
        torch.testing.assert_close(merged.parts[name][0], published, atol=1e-12, rtol=0)


def test_whitened_truncation_is_the_published_equation():
    stack = random_stack(4, hidden=7, inner=6)
    inputs = random_inputs(stack, m=80)
    counts, members, ratio = (inputs.gates != 0).sum(0).double(), [0, 2, 3], 0.4
    merged, factors = merge_group(stack, members, counts.numpy(), inputs, intra_ratio=ratio)
    f = (counts[members] / counts[members].sum())[:, None, None]
    for name in ("gate", "up", "down"):
        W, roots = stack.parts[name][members], []
        for i in members:
            x = inputs.x[inputs.gates[:, i] != 0]
            rows = stack.take([i]).hidden(x)[0] if name == "down" else x
            C = rows.mT @ rows / len(rows)
            roots.append(torch.linalg.cholesky(C + 1e-3 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)))
        U, S, Vh = torch.linalg.svd(
            torch.cat([w @ s for w, s in zip(W, roots, strict=True)], dim=1), full_matrices=False
        )
        V = Vh.view(len(S), len(members), -1).movedim(1, 0)
        V_merged = (f * torch.stack([v @ torch.linalg.inv(s) for v, s in zip(V, roots, strict=True)])).sum(0)
        r = low_rank(*W.shape[1:], ratio)
        published = U[:, :r] @ torch.diag(S[:r]) @ V_merged[:r]
        torch.testing.assert_close(merged.parts[name][0], published, atol=1e-11, rtol=0)
        assert factors.left[name].shape[-1] == r
        torch.testing.assert_close(factors.dense(name)[0], published, atol=1e-11, rtol=0)


def test_factors_hold_the_share_of_numbers_that_was_asked_for():
    for ratio in (0.1, 0.5, 0.9):
        r = low_rank(64, 48, ratio)
        assert r * (64 + 48) <= (1 - ratio) * 64 * 48 < (r + 1) * (64 + 48)
    assert low_rank(4, 4, 0.99) == 1


@pytest.mark.parametrize("batch_tokens", [None, 7])
def test_statistics_are_those_of_a_literal_loop_over_experts_and_tokens(batch_tokens):
    stack = random_stack(4, bias=True)
    inputs = random_inputs(stack)
    router = torch.randn(4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = expert_statistics(stack, inputs, router, batch_tokens=batch_tokens)
    Y = torch.empty(4, 40, 6, dtype=torch.float64)
    for i, l in itertools.product(range(4), range(40)):
        x = inputs.x[l]
        h = F.silu(stack.gate[i] @ x + stack.gate_bias[i]) * (stack.up[i] @ x + stack.up_bias[i])
        Y[i, l] = stack.down[i] @ h + stack.down_bias[i]
    for i, j in itertools.product(range(4), range(4)):
        assert found.gram[i, j] == pytest.approx(float(F.cosine_similarity(Y[i], Y[j]).mean()), abs=1e-12)
        logits = inputs.x @ router.mT
        expected = float(F.cosine_similarity(logits[:, i], logits[:, j], dim=0))
        assert found.logit_gram[i, j] == pytest.approx(expected, abs=1e-12)
    for i in range(4):
        chosen = inputs.gates[:, i] != 0
        sizes = Y[i, chosen].norm(dim=1)
        assert found.counts[i] == int(chosen.sum())
        assert found.norms[i] == pytest.approx(float(sizes.mean()))
        assert found.gated_norms[i] == pytest.approx(float((inputs.gates[chosen, i] * sizes).mean()))
    torch.testing.assert_close(stack.outputs(inputs.x), Y, atol=1e-12, rtol=0)
    torch.testing.assert_close(stack.grouped_outputs(inputs.x), Y, atol=1e-12, rtol=0)
    means = Y.mean(1)
    np.testing.assert_allclose(found.mean_gram, means @ means.mT, atol=1e-12)
    assert found.frequencies.sum() == pytest.approx(2)
    again = type(found).from_members(found.members())
    np.testing.assert_array_equal(again.gram, found.gram)


def test_kernel_kmeans_sees_what_kmeans_on_the_normalised_outputs_would_see():
    stack = random_stack(6)
    inputs = random_inputs(stack)
    gram = expert_statistics(stack, inputs).gram
    Y = F.normalize(stack.outputs(inputs.x), dim=-1).flatten(1).numpy() / np.sqrt(len(inputs.x))
    np.testing.assert_allclose(embedding(gram) @ embedding(gram).T, Y @ Y.T, atol=1e-12)
    for k in (2, 3, 5):
        labels = group_experts(gram, k)
        centres = np.stack([Y[labels == g].mean(0) for g in range(k)])
        assert within_groups(gram, labels) == pytest.approx(((Y - centres[labels]) ** 2).sum())
        best = min(within_groups(gram, np.array(p)) for p in itertools.product(range(k), repeat=6) if len(set(p)) == k)
        assert within_groups(gram, labels) == pytest.approx(best)


def test_groups_are_numbered_by_their_first_member_and_none_is_empty():
    stack = random_stack(7)
    statistics = expert_statistics(stack, random_inputs(stack))
    for clustering, k in itertools.product(("kmeans", "hierarchical", "dominant", "random"), range(1, 8)):
        labels = group_experts(statistics.gram, k, clustering=clustering, frequencies=statistics.counts, seed=k)
        first = [int(np.flatnonzero(labels == g)[0]) for g in range(k)]
        assert first == sorted(first)
        assert labels.max() == k - 1
    same = np.ones((5, 5))
    assert len(np.unique(group_experts(same, 3))) == 3
    assert len(np.unique(group_experts(np.zeros((5, 5)), 3))) == 3


def test_dominant_groups_are_around_the_most_used_experts():
    gram = np.eye(4)
    gram[0, 3] = gram[3, 0] = gram[1, 2] = gram[2, 1] = 0.5
    labels = group_experts(gram, 2, clustering="dominant", frequencies=np.array([1, 9, 2, 8]))
    np.testing.assert_array_equal(labels, [0, 1, 1, 0])


def test_dynamic_programming_finds_the_best_shares():
    rng = np.random.default_rng(0)
    for _ in range(20):
        curves = [np.sort(rng.random(n))[::-1] * 10 for n in (4, 5, 3)]
        for c in curves:
            c[-1] = 0
        total, least = int(rng.integers(3, 13)), 1
        found = allocate(curves, total, least=least)

        def cost(ks, curves=curves):
            return sum(c[k - 1] / c[0] for c, k in zip(curves, ks, strict=True))

        best = min(cost(ks) for ks in itertools.product(*(range(1, len(c) + 1) for c in curves)) if sum(ks) == total)
        assert sum(found) == total
        assert cost(found) == pytest.approx(best)
    with pytest.raises(ValueError, match="total must be between 6 and 12, got 5"):
        allocate(curves, 5, least=2)
    assert [list(w) for w in windows(5, 2)] == [[0, 1], [2, 3], [4]]
    assert [list(w) for w in windows(3, None)] == [[0, 1, 2]]


def test_activations_are_matched_by_their_correlations():
    stack = random_stack(3, inner=6)
    inputs = random_inputs(stack)
    # A unit that is silent correlates with none.
    stack.up[2, 4] = 0
    found = match_activations(stack, 1, inputs, batch_tokens=11)
    H = stack.hidden(inputs.x).numpy()
    assert found[1].tolist() == list(range(6))
    for i in (0, 2):
        with np.errstate(invalid="ignore"):
            alike = np.nan_to_num(np.corrcoef(H[1], H[i], rowvar=False)[:6, 6:])
        best = max(itertools.permutations(range(6)), key=lambda p: sum(alike[a, b] for a, b in enumerate(p)))
        assert found[i].tolist() == list(best)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_matching_undoes_a_permutation_of_hidden_neurons(bias, gated):
    one = random_stack(1, inner=9, bias=bias, gated=gated)
    orders = [np.random.default_rng(i).permutation(9) for i in range(3)]
    stack = permuted(stack_of([one] * 3), orders)
    inputs = random_inputs(stack)
    torch.testing.assert_close(stack.outputs(inputs.x)[1], one.outputs(inputs.x)[0], atol=1e-12, rtol=0)
    for align in ("permutation", "activation"):
        aligned, _ = merge_group(stack, [0, 1, 2], np.ones(3), inputs, align=align, batch_tokens=7)
        torch.testing.assert_close(aligned.outputs(inputs.x), one.outputs(inputs.x), atol=1e-12, rtol=0)
    plain, _ = merge_group(stack, [0, 1, 2], np.ones(3), inputs)
    assert (plain.outputs(inputs.x) - one.outputs(inputs.x)).norm() > 0.1 * one.outputs(inputs.x).norm()
    assert match_neurons(stack, 1)[1].tolist() == list(range(9))


def test_the_down_map_is_the_ridge_solution_of_the_published_objective():
    stack = random_stack(3, bias=True)
    inputs = random_inputs(stack, m=60)
    start, _ = merge_group(stack, [0, 2], np.ones(3), inputs)
    found = refit_down(start, stack, [0, 2], inputs, batch_tokens=9)
    G = inputs.gates[:, [0, 2]]
    reached = (G != 0).any(1)
    total, x = G.sum(1, keepdim=True)[reached], inputs.x[reached]
    target = torch.einsum("mn,nmh->mh", G[reached], stack.take([0, 2]).outputs(x))
    H = total * start.hidden(x)[0]
    normal = H.mT @ H
    alpha = 1e-3 * normal.diagonal().mean()
    rest = target - total * start.down_bias - H @ start.down[0].mT
    step = torch.linalg.solve(normal + alpha * torch.eye(len(normal), dtype=normal.dtype), H.mT @ rest)
    torch.testing.assert_close(found.down[0], start.down[0] + step.mT, atol=1e-9, rtol=0)

    def loss(merged):
        return (target - total * merged.outputs(x)[0]).square().sum()

    assert loss(found) < loss(start)


def test_regression_means_weigh_experts_where_their_tokens_are():
    stack = random_stack(3)
    inputs = random_inputs(stack, m=80)
    counts = (inputs.gates != 0).sum(0).double()
    merged, _ = merge_group(stack, [0, 1, 2], counts.numpy(), inputs, refit="regmean")
    C = [input_gram(inputs.x[inputs.gates[:, i] != 0]) for i in range(3)]
    C = [c + 1e-3 * c.diagonal().mean() * torch.eye(6, dtype=torch.float64) for c in C]
    f = counts / counts.sum()
    normal = sum(w * c for w, c in zip(f, C, strict=True))
    ridge = 1e-3 * normal.diagonal().mean()
    for name in ("gate", "up"):
        W = stack.parts[name]
        right = sum(w * a @ c for w, a, c in zip(f, W, C, strict=True)) + ridge * (f[:, None, None] * W).sum(0)
        expected = right @ torch.linalg.inv(normal + ridge * torch.eye(6, dtype=torch.float64))
        torch.testing.assert_close(merged.parts[name][0], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_of_one_keeps_its_bits(dtype):
    model = small(dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        merger = ExpertMerger.recommended(3).fit(model, tokens())
    merged = merger.merge(model)
    for before, after in zip(find_expert_layers(model), merged.model.layers, strict=True):
        labels, made, own = merger.groups_[before.name], after.mlp.experts.stack(), before.stack()
        assert made.up.dtype == dtype
        alone = [g for g in range(3) if (labels == g).sum() == 1]
        assert len(alone) == 2
        for g in alone:
            i = int(np.flatnonzero(labels == g)[0])
            for name, part in made.parts.items():
                assert torch.equal(part[g], own.parts[name][i])


def test_token_weights_of_one_group_are_added():
    stack = random_stack(2, dtype=torch.float64)
    module = MergedExperts.from_stack(stack, [0, 1, 0, 1])
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = torch.tensor([[0, 2], [0, 1], [3, 1]] * 3)
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    Y = stack.outputs(x)
    expected = torch.stack([sum(weights[l, s] * Y[int(index[l, s]) % 2, l] for s in range(2)) for l in range(9)])
    torch.testing.assert_close(module(x, index, weights), expected, atol=1e-12, rtol=0)
    shut = module(x, torch.zeros_like(index), torch.zeros_like(weights))
    assert torch.equal(shut, torch.zeros_like(x))


def test_factors_compute_what_their_product_does():
    model = small(dtype=torch.float64)
    merger = ExpertMerger(2, intra_ratio=0.3, refit="down").fit(model, tokens(16))
    merged = merger.merge(model)
    experts = merged.model.layers[0].mlp.experts
    assert experts.ranks == {"gate": low_rank(24, 16, 0.3), "up": low_rank(24, 16, 0.3), "down": low_rank(16, 24, 0.3)}
    held = sum(p.numel() for layer in merged.model.layers for p in layer.mlp.experts.parameters())
    assert held == merger.report_.parameters_after
    whole = copy.deepcopy(merged)
    for layer in whole.model.layers:
        layer.mlp.experts = MergedExperts.from_stack(layer.mlp.experts.stack(), layer.mlp.experts.groups.tolist())
    torch.testing.assert_close(outputs_of(merged), outputs_of(whole), atol=1e-10, rtol=0)


def test_the_reported_error_is_that_of_the_layers_output():
    model = small(dtype=torch.float64)
    merger = ExpertMerger.published(2).fit(model, tokens())
    seen = []
    hooks = [
        model.model.layers[0].mlp.register_forward_hook(lambda _, args, out: seen.append((args[0], out))),
    ]
    outputs_of(model)
    hooks[0].remove()
    x, before = seen[0]
    with torch.no_grad():
        after = merger.merge(model).model.layers[0].mlp(x)
    expected = float((before - after).square().sum() / before.square().sum())
    assert merger.report_.layers[0].error == pytest.approx(expected, rel=1e-9)


class Block(nn.Module):
    """A block as transformers had it before experts were stacked: a list of MLPs, and a loop."""

    def __init__(self, names, hidden, inner, n):
        super().__init__()
        self.gate = nn.Linear(hidden, n, bias=False, dtype=torch.float64)
        self.experts = nn.ModuleList(Expert(names, hidden, inner) for _ in range(n))
        self.num_experts, self.top_k = n, 2
        self.shared = nn.Linear(hidden, hidden, dtype=torch.float64)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        top, index = self.gate(x).softmax(-1).topk(self.top_k)
        out = self.shared(x)
        for j in range(self.num_experts):
            token, slot = torch.where(index == j)
            out = out.index_add(0, token, self.experts[j](x[token]) * top[token, slot, None])
        return out.view(hidden_states.shape)


class Expert(nn.Module):
    def __init__(self, names, hidden, inner):
        super().__init__()
        self.names = names
        for name in names[:-1]:
            setattr(self, name, nn.Linear(hidden, inner, dtype=torch.float64))
        setattr(self, names[-1], nn.Linear(inner, hidden, dtype=torch.float64))
        self.act_fn = nn.GELU()

    def forward(self, x):
        inner = self.act_fn(getattr(self, self.names[0])(x))
        if len(self.names) == 3:
            inner = inner * getattr(self, self.names[1])(x)
        return getattr(self, self.names[-1])(inner)


class Listed(nn.Module):
    def __init__(self, names=("gate_proj", "up_proj", "down_proj"), hidden=8, inner=5, n=4):
        super().__init__()
        self.embed = nn.Embedding(60, hidden, dtype=torch.float64)
        self.layers = nn.ModuleList(Block(names, hidden, inner, n) for _ in range(2))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def listed(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Listed(**options)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("fc1", "fc2")])
def test_lists_of_experts_are_merged_in_their_own_block(names):
    model = listed(names=names)
    merger = ExpertMerger.recommended(3).fit(model, tokens(12))
    merged = merger.merge(model)
    ids = tokens()
    with torch.no_grad():
        assert not torch.allclose(merged(ids), model(ids))
    labels = merger.groups_["layers.0.experts"]
    experts = merged.layers[0].experts
    assert len({id(e) for e in experts}) == 3
    i, j = (np.flatnonzero(labels == g)[0] for g in np.unique(labels)[:2])
    assert experts[int(i)] is not experts[int(j)]
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stack = ExpertLayer("", model.layers[0], model.layers[0].experts, None).stack()
    for n, expert in enumerate(model.layers[0].experts):
        torch.testing.assert_close(stack.outputs(x)[n], expert(x), atol=1e-12, rtol=0)
    thin = ExpertMerger(3, intra_ratio=0.3).fit(model, tokens(12)).merge(model)
    with torch.no_grad():
        assert torch.isfinite(thin(ids)).all()
    assert isinstance(getattr(thin.layers[0].experts[0], names[-1]), nn.Sequential)


@pytest.mark.parametrize("hidden", [8, 3])
def test_probing_a_block_finds_the_weights_of_its_router(hidden):
    model = listed(hidden=hidden)
    layer = find_expert_layers(model)[1]
    x = torch.randn(2, 6, hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top, index = layer.block.gate(x.view(-1, hidden)).softmax(-1).topk(2)
    expected = torch.zeros(12, 4, dtype=torch.float64).scatter(1, index, top)
    found = probe_gates(layer, x)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert torch.equal(found != 0, expected != 0)


@pytest.mark.parametrize("pruning", ["frequency", "output_norm", "reap"])
def test_pruned_models_route_as_if_the_dropped_experts_were_never_chosen(pruning):
    model = small(dtype=torch.float64)
    merger = ExpertMerger(3, pruning=pruning).fit(model, tokens())
    pruned = merger.merge(model)
    shut = copy.deepcopy(model)
    for layer in find_expert_layers(shut):
        labels = merger.groups_[layer.name]
        statistics = merger.statistics_[layer.name]
        scores = {"frequency": statistics.counts, "output_norm": statistics.norms, "reap": statistics.gated_norms}
        assert np.flatnonzero(labels < 0).tolist() == [int(np.argmin(scores[pruning]))]
        dropped = torch.from_numpy(labels < 0)

        def hook(router, args, out, dropped=dropped):
            logits = out[0].masked_fill(dropped, float("-inf"))
            top, index = logits.softmax(-1).topk(2)
            return logits, top / top.sum(-1, keepdim=True), index

        layer.router.register_forward_hook(hook)
    torch.testing.assert_close(outputs_of(pruned), outputs_of(shut), atol=1e-6, rtol=0)
    assert all(np.isnan(layer.error) for layer in merger.report_.layers)


@pytest.mark.parametrize("name", RIVALS)
def test_a_calibration_serves_any_number_of_mergers(name):
    model = small()
    calibration = calibrate_experts(model, tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        once = ExpertMerger(3, **RIVALS[name]).fit(model, calibration)
        again = ExpertMerger(3, **RIVALS[name]).fit(model, tokens())
    for a, b in zip(once.report_.layers, again.report_.layers, strict=True):
        assert a.groups == b.groups
    ours, theirs = once.merge(model).state_dict(), again.merge(model).state_dict()
    assert all(torch.equal(part, theirs[key]) for key, part in ours.items())
    with pytest.raises(ValueError, match="batches must be a calibration of this model, got one of"):
        ExpertMerger(3).fit(small("deepseek-v2"), calibration)


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_makes_a_model_with_as_many_experts(name):
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        merger = ExpertMerger(3, **RIVALS[name]).fit(model, tokens())
    merged = merger.merge(model)
    assert [layer.n_kept for layer in merger.report_.layers] == [3, 3]
    assert torch.isfinite(outputs_of(merged)).all()
    expected = 2 * 3 * 3 * 16 * 24
    assert sum(p.numel() for layer in merged.model.layers for p in layer.mlp.experts.parameters()) == expected
    assert merger.report_.parameters_after == expected
    assert sum(layer.bytes_after for layer in merger.report_.layers) == 4 * expected


def test_recommended_beats_published_on_experts_without_common_neurons():
    model = small(dtype=torch.float64)
    errors = []
    for make in (ExpertMerger.published, ExpertMerger.recommended):
        merger = make(2).fit(model, tokens(16))
        errors.append([layer.error for layer in merger.report_.layers])
    assert all(b < 0.7 * a for a, b in zip(*errors, strict=True))


def test_adaptive_allocation_keeps_the_total_and_gives_more_to_the_layer_of_unlike_experts():
    model = small(dtype=torch.float64)
    experts = find_expert_layers(model)[0].experts
    for part in experts.parameters():
        part.data[2:] = part.data[:2]
    merger = ExpertMerger(3, allocation="adaptive").fit(model, tokens())
    kept = [layer.n_kept for layer in merger.report_.layers]
    assert kept == [2, 4]
    spread = ExpertMerger(3, allocation="adaptive", window=1).fit(model, tokens())
    assert [layer.n_kept for layer in spread.report_.layers] == [3, 3]


def test_fitting_changes_neither_the_model_nor_its_modes_nor_global_chance():
    model = small()
    model.train()
    model.model.layers[0].self_attn.eval()
    modes = [m.training for m in model.modules()]
    state = {name: part.clone() for name, part in model.state_dict().items()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    merger = ExpertMerger.published(3).fit(model, tokens())
    merged = merger.merge(model)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert merged.model.layers[0].self_attn.q_proj.weight is not model.model.layers[0].self_attn.q_proj.weight
    again = ExpertMerger.published(3).fit(model, tokens()).merge(model)
    assert all(
        torch.equal(a, b) for a, b in zip(merged.state_dict().values(), again.state_dict().values(), strict=True)
    )
    other = merger.merge(model)
    shared = {p.data_ptr() for p in merged.parameters()} & {p.data_ptr() for p in other.parameters()}
    assert not shared
    same = merger.merge(model, inplace=True)
    assert same is model
    assert isinstance(model.model.layers[1].mlp.experts, MergedExperts)


def test_batches_may_be_ids_or_mappings_and_masked_tokens_do_not_count():
    model, ids = small(), tokens(6, 12)
    whole = ExpertMerger.published(3).fit(model, ids).statistics_["model.layers.0.mlp.experts"]
    parts = ExpertMerger.published(3, batch_tokens=5).fit(model, [ids[:1], {"input_ids": ids[1:]}])
    np.testing.assert_allclose(parts.statistics_["model.layers.0.mlp.experts"].gram, whole.gram, atol=1e-6)
    padded = torch.cat([ids, ids.flip(0)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], dim=1)
    masked = ExpertMerger.published(3).fit(model, [{"input_ids": padded, "attention_mask": mask, "labels": padded}])
    found = masked.statistics_["model.layers.0.mlp.experts"]
    assert found.n_tokens == whole.n_tokens == 72
    np.testing.assert_allclose(found.gram, whole.gram, atol=1e-5)


def test_experts_that_no_token_chose_are_told_of_and_merged_with_next_to_no_weight():
    model = small(dtype=torch.float64)
    for layer in find_expert_layers(model):
        layer.experts.down_proj.data[3] = layer.experts.down_proj.data[0]
        layer.experts.gate_up_proj.data[3] = 1.01 * layer.experts.gate_up_proj.data[0]

        def hook(router, args, out):
            logits = out[0].clone()
            logits[:, 3] = -torch.inf
            top, index = logits.softmax(-1).topk(2)
            return logits, top, index

        layer.router.register_forward_hook(hook)
    with pytest.warns(UserWarning, match=r"no calibration token chose experts 3 of model.layers..\.mlp"):
        merger = ExpertMerger.published(3).fit(model, tokens())
    labels = merger.groups_["model.layers.0.mlp.experts"]
    assert labels[0] == labels[3]
    made = merger.merge(model).model.layers[0].mlp.experts.stack()
    own = find_expert_layers(model)[0].stack()
    torch.testing.assert_close(made.up[labels[0]], own.up[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(group_weights(np.zeros(4), [1, 2]), torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_too_few_tokens_for_a_fit_are_told_of():
    model = small(dtype=torch.float64)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        merger = ExpertMerger(2, refit="down").fit(model, tokens(1, 3))
    wanted = "calibration tokens reach a group of 3 experts of model.layers.0.mlp.experts with 24 hidden units"
    assert any(wanted in str(warning.message) for warning in told)
    assert np.isfinite([layer.error for layer in merger.report_.layers]).all()


def test_experts_of_zeros_and_one_token_do_no_harm():
    model = small(dtype=torch.float64)
    for layer in find_expert_layers(model):
        layer.experts.down_proj.data[:2] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for options in RIVALS.values():
            merger = ExpertMerger(2, **options).fit(model, tokens(1, 1))
            assert torch.isfinite(outputs_of(merger.merge(model))).all()


def test_calibration_that_is_not_finite_is_refused_where_it_is_first_seen():
    model = small()
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite activations, got NaN or infinity in the tokens of model.layers.1"):
        ExpertMerger(2).fit(model, tokens())
    broken = small()
    broken.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"experts must give finite outputs .* from expert 2"):
        ExpertMerger(2).fit(broken, tokens())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n_experts": 4}, r"n_experts must be between 2 \(experts a token\) and 3, got 4"),
        ({"n_experts": 1}, r"n_experts must be between 2 \(experts a token\) and 3, got 1"),
        ({"keep_ratio": 1.0}, "keep_ratio must be above 0 and below 1, got 1.0"),
        ({"keep_ratio": 0.1}, r"keep_ratio 0.1 of 4 must be between 2 \(experts a token\) and 3, got 0"),
        ({"clustering": "spectral"}, "clustering must be one of .* got 'spectral'"),
        ({"similarity": "cka"}, "similarity must be one of .* got 'cka'"),
        ({"allocation": "greedy"}, "allocation must be one of .* got 'greedy'"),
        ({"combine": "sum"}, "combine must be one of .* got 'sum'"),
        ({"align": "ot"}, "align must be one of .* got 'ot'"),
        ({"refit": "up"}, "refit must be one of .* got 'up'"),
        ({"pruning": "random"}, "pruning must be one of .* got 'random'"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"intra_ratio": 1.0}, "intra_ratio must be at least 0 and below 1, got 1.0"),
        ({"combine": "keep", "align": "permutation"}, "must go with combine='average', got 'keep'"),
        ({"pruning": "reap", "refit": "down"}, "pruning must go without"),
    ],
)
def test_options_outside_their_range_are_named(options, told):
    with pytest.raises(ValueError, match=told):
        ExpertMerger(**options).fit(small(), tokens())


def test_models_that_cannot_be_merged_say_why():
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{k: v for k, v in COMMON.items() if k != "experts_implementation"}, intermediate_size=24
        )
    )
    with pytest.raises(ValueError, match="got none in LlamaForCausalLM; looked for modules with stacked gate_up_proj"):
        ExpertMerger(2).fit(dense, tokens())
    quantised = small()
    quantised.model.layers[0].mlp.experts.gate_up_proj = nn.Parameter(
        torch.zeros(4, 48, 16, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(
        ValueError, match=r"must not be quantised, got torch.uint8 in model.layers.0.* load the model unq"
    ):
        ExpertMerger(2).fit(quantised, tokens())
    flagged = small()
    flagged.is_quantized, flagged.quantization_method = True, "bitsandbytes"
    with pytest.raises(ValueError, match="must not be quantised, got bitsandbytes"):
        ExpertMerger(2).fit(flagged, tokens())
    adapted = small()
    adapted._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match="model must be without adapters, got some of PEFT: merge them first"):
        ExpertMerger(2).fit(adapted, tokens())
    grouped = small("deepseek-v3")
    with pytest.raises(ValueError, match="must not route by groups to change router rows, got 2 groups"):
        ExpertMerger(4, pruning="frequency").fit(grouped, tokens())
    model = listed()
    for block in model.layers:
        block.gate = nn.Sequential(block.gate)
    with pytest.raises(ValueError, match="similarity 'router' needs a router"):
        ExpertMerger(3, similarity="router").fit(model, tokens())
    with pytest.raises(ValueError, match="model must have a router with a weight"):
        ExpertMerger(3, pruning="frequency").fit(model, tokens())


def test_merging_wants_a_fit_of_the_same_layers():
    with pytest.raises(ValueError, match="fit must be called first, got an ExpertMerger without groups"):
        ExpertMerger(2).merge(small())
    merger = ExpertMerger(2).fit(small(), tokens())
    with pytest.raises(ValueError, match="model must have the layers that were fitted"):
        merger.merge(small("deepseek-v2"))
    with pytest.raises(ValueError, match="num_groups must be between 1 and num_experts=3, got 4"):
        MergedExperts(3, 4, 8, 8)


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        (torch.zeros(2, 3), r"batches must be ids \(b, t\) of integers, got \(2, 3\) of torch.float32"),
        (torch.zeros(5, dtype=torch.long), r"batches must be ids \(b, t\)"),
        ([], "batches must hold at least one token each, got none"),
        ([torch.zeros(0, 4, dtype=torch.long)], "batches must hold at least one token each"),
        (["text"], "batches must hold ids .* got str"),
        ([{"labels": torch.zeros(1, 2)}], "mappings with input_ids, got dict"),
    ],
)
def test_batches_of_another_kind_are_named(batches, told):
    with pytest.raises(ValueError, match=told):
        token_batches(batches)


def test_factors_of_two_groups_are_put_behind_one_another():
    factors = LowRank({"up": torch.ones(1, 3, 2)}, {"up": torch.ones(1, 2, 4)})
    torch.testing.assert_close(factors.dense("up"), torch.full((1, 3, 4), 2.0))
