"""``use_dora``: magnitudes of units learnt apart from their directions, against the formula and peft's own DoRA."""

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from polyspan.checkpoints import TuckerAdapterConfig
from polyspan.checkpoints._tucker import expand_core
from polyspan.checkpoints._tucker_magnitude import unit_norms, unit_shape, updated_norms
from polyspan.checkpoints.tucker_files import merge_tucker_adapter
from polyspan.errors import WrongContent
from polyspan.run import torch_generator

IDS = torch.tensor([[0, 2, 6], [1, 1, 2]])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch_generator(seed), dtype=dtype)


def conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 6)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), draw(4, 3, 6)),
    "in_by_out": (conv1d_of_transformers, draw(4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, dilation=2), draw(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0)), draw(2, 4, 8, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 4, (1, 2, 3), bias=False), draw(2, 3, 3, 3, 3)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), draw(4, 6, 6)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), draw(2, 4, 6, 6)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3, stride=2), draw(2, 6, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(5, 10, 3, groups=5, padding=1), draw(2, 5, 6, 6)),
    "one_output": (lambda: nn.Conv2d(4, 1, 3), draw(2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), draw(2, 4, 5)),
    "transposed_groups": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), draw(2, 4, 5, 5)),
    "transposed_depthwise": (lambda: nn.ConvTranspose2d(3, 3, 2, groups=3), draw(1, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(7, 5, padding_idx=2), IDS),
}


def made(make, *, seed=0, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return nn.Sequential(make()).to(dtype)


def config(**options):
    return TuckerAdapterConfig(
        **({"r_in": 2, "r_out": 2, "target_modules": ["0"], "seed": 0, "use_dora": True} | options)
    )


def adapted(base, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ranks larger")
        return peft.get_peft_model(base, config(**options))


def stir(model, seed=1, adapter=""):
    """Give cores and magnitudes other values, as training would."""
    generator = torch_generator(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(adapter) and "tucker_adapter_core" in name:
            parameter.data.normal_(generator=generator)
        elif name.endswith(adapter) and "tucker_adapter_magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def literal(layer, delta, magnitude):
    """m (W + dW) / |W + dW|, unit by unit; norms are constants."""
    base, weight = layer.get_base_layer(), layer.get_base_layer().weight.detach() + delta
    groups = base.groups if getattr(base, "transposed", False) else 1
    outputs = magnitude.numel()
    parts = []
    for o, m in enumerate(magnitude.flatten()):
        if getattr(base, "transposed", False):
            inputs = weight.shape[0] // groups
            j, within = divmod(o, outputs // groups)
            unit = weight[j * inputs : (j + 1) * inputs, within]
        elif layer.axis_out == 1:
            unit = weight[:, o]
        else:
            unit = weight[o]
        parts.append(m * unit / unit.detach().square().sum().sqrt())
    if getattr(base, "transposed", False):
        rows = [torch.stack(parts[j * outputs // groups : (j + 1) * outputs // groups], 1) for j in range(groups)]
        return torch.cat(rows)
    return torch.stack(parts, dim=layer.axis_out)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_fresh_adapter_is_exactly_the_base(kind):
    make, x = LAYERS[kind]
    for dtype in (torch.float64, torch.bfloat16):
        base, x = made(make, dtype=dtype), x if kind == "embedding" else x.to(dtype)
        for path in ("factored", "dense"):
            model = adapted(copy.deepcopy(base), path=path)
            assert torch.equal(model(x), base(x))
            assert model.base_model.model[0].tucker_adapter_magnitude["default"].dtype != torch.bfloat16


@pytest.mark.parametrize("path", ["factored", "dense"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_has_directions_of_the_updated_weight_and_lengths_of_the_magnitudes(kind, path):
    make, x = LAYERS[kind]
    model = stir(adapted(made(make), path=path))
    layer = model.base_model.model[0]
    core, factors = layer.parameters_of("default")
    magnitude = layer.tucker_adapter_magnitude["default"]
    weight = literal(layer, expand_core(core, factors) * 4.0, magnitude)
    out = model(x)
    plain = torch.func.functional_call(layer.base_layer, {"weight": weight}, (x,))
    if kind == "embedding":
        # torch reads the gradient of a row of padding as 0 whatever is computed from it afterwards.
        plain = weight[x]
    torch.testing.assert_close(out, plain)
    chosen = draw(*out.shape, seed=3)
    mine = torch.autograd.grad((out * chosen).sum(), [core, *factors, magnitude])
    theirs = torch.autograd.grad((plain * chosen).sum(), [core, *factors, magnitude])
    for n, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if kind == "embedding" and n == 1:
            a, b = (g[[i for i in range(7) if i != 2]] for g in (a, b))
        torch.testing.assert_close(a, b)


def twins(kind, *, dropout=0.0, names=("default",)):
    """One layer with our adapters and with peft's LoRA, both with magnitudes, of equal updates."""
    makes = {
        "linear": lambda: nn.Linear(6, 5),
        "conv1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
        "conv2d": lambda: nn.Conv2d(4, 6, 3, stride=2),
        "conv3d": lambda: nn.Conv3d(2, 3, 2),
        "embedding": lambda: nn.Embedding(7, 5),
    }
    base = made(makes[kind])
    lora = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0"], use_dora=True, lora_dropout=dropout)
    side = {"conv1d": (3,), "conv2d": (3, 3), "conv3d": (2, 2, 2)}.get(kind)
    shape = base[0].weight.shape
    own = config(
        dropout=0.0 if kind == "embedding" else dropout,
        rank_pattern={"0": [2, 2] if side is None else [2, *shape[1:]]},
    )
    ours, theirs = peft.get_peft_model(copy.deepcopy(base), own), peft.get_peft_model(copy.deepcopy(base), lora)
    for name in names[1:]:
        ours.add_adapter(name, copy.deepcopy(own))
        theirs.add_adapter(name, copy.deepcopy(lora))
    a, b = ours.base_model.model[0], theirs.base_model.model[0]
    for seed, name in enumerate(names):
        core, factors = a.parameters_of(name)
        if kind == "embedding":
            down, up = b.lora_embedding_A[name], b.lora_embedding_B[name]
        else:
            down, up = b.lora_A[name].weight, b.lora_B[name].weight
        down.data, up.data = draw(*down.shape, seed=seed), draw(*up.shape, seed=seed + 9)
        if side is None:
            core.data = torch.eye(2, dtype=torch.float64)
            factors[a.axis_out].data, factors[a.axis_in].data = up.data.clone(), down.data.T.clone()
        else:
            core.data, factors[0].data = down.data.clone(), up.data.reshape(-1, 2).clone()
            for factor in factors[1:]:
                factor.data = torch.eye(len(factor), dtype=torch.float64)
        lengths = b.lora_magnitude_vector[name].weight
        lengths.data = lengths.data * (1 + 0.2 * draw(*lengths.shape, seed=seed + 5).abs())
        found = a.tucker_adapter_magnitude[name]
        found.data = lengths.data.reshape(found.shape).clone()
    shapes = {"linear": (3, 6), "conv1d": (2, 4, 7), "conv2d": (2, 4, 7, 6), "conv3d": (2, 2, 4, 3, 3)}
    return ours, theirs, IDS if kind == "embedding" else draw(*shapes[kind], seed=7)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d", "embedding"])
def test_it_is_pefts_own_dora_where_the_update_is_a_product_of_matrices(kind, dropout):
    ours, theirs, x = twins(kind, dropout=dropout)
    a, b = ours.base_model.model[0], theirs.base_model.model[0]
    outs = []
    for model in (ours, theirs):
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(5)
            outs.append(model.train()(x))
    torch.testing.assert_close(*outs)
    chosen = draw(*outs[0].shape, seed=3)
    for out in outs:
        (out * chosen).sum().backward()
    core, factors = a.parameters_of("default")
    if kind == "embedding":
        pairs = [
            (factors[0].grad.T, b.lora_embedding_A["default"].grad),
            (factors[1].grad, b.lora_embedding_B["default"].grad),
        ]
    else:
        down, up = b.lora_A["default"].weight.grad, b.lora_B["default"].weight.grad
        pairs = [(factors[0].grad, up.reshape(-1, 2)), (factors[1].grad.T if kind == "linear" else core.grad, down)]
    pairs += [
        (a.tucker_adapter_magnitude["default"].grad.flatten(), b.lora_magnitude_vector["default"].weight.grad.flatten())
    ]
    for mine, other in pairs:
        assert mine.any()
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(ours.merge_and_unload()(x), theirs.merge_and_unload()(x))


def test_two_active_adapters_act_one_after_the_other_as_in_peft_and_merge_so():
    ours, theirs, x = twins("linear", names=("default", "b"))
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "b"])
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected)
    before = ours.base_model.model[0].base_layer.weight.clone()
    ours.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="now additionally merging b"):
        ours.merge_adapter(["b"])
    theirs.merge_adapter(["default", "b"], safe_merge=True)
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(ours.base_model.model[0].base_layer.weight, theirs.base_model.model[0].base_layer.weight)
    ours.unmerge_adapter()
    assert torch.equal(ours.base_model.model[0].base_layer.weight, before)
    torch.testing.assert_close(ours(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_adapters_are_saved_loaded_merged_in_the_model_and_merged_in_files(kind, tmp_path):
    make, x = LAYERS[kind]
    base, x = made(make, dtype=torch.float32), x if kind == "embedding" else x.float()
    model = stir(adapted(copy.deepcopy(base)))
    out = model(x)
    model.save_pretrained(tmp_path)
    assert not torch.allclose(out, base(x))
    for low in (False, True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="ranks larger")
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(loaded(x), out)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    assert merge_tucker_adapter(tmp_path / "base.safetensors", tmp_path, tmp_path / "m.safetensors") == ["0.weight"]
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), out)
    merged = model.merge_and_unload()
    assert type(merged[0]) is type(base[0])
    torch.testing.assert_close(
        load_file(tmp_path / "m.safetensors")["0.weight"], merged[0].weight, rtol=1e-5, atol=1e-5
    )


def test_files_whose_magnitudes_are_missing_or_of_another_shape_are_refused(tmp_path):
    base = made(lambda: nn.Linear(6, 5), dtype=torch.float32)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    adapted(base).save_pretrained(tmp_path)
    path, key = tmp_path / "adapter_model.safetensors", "base_model.model.0.tucker_adapter_magnitude"
    tensors = load_file(path)
    for wrong, message in ((None, "no magnitudes"), (torch.ones(4, 1), r"magnitudes of shape \(4, 1\)")):
        save_file({k: v for k, v in tensors.items() if k != key} | ({} if wrong is None else {key: wrong}), path)
        with pytest.raises(WrongContent, match=rf"found {message}; expected one a unit of a weight \(5, 6\)"):
            merge_tucker_adapter(tmp_path / "base.safetensors", tmp_path, tmp_path / "m.safetensors")


def test_units_whose_weights_are_all_zero_stay_finite_where_pefts_are_not_and_can_still_learn():
    base = made(lambda: nn.Linear(6, 5))
    base[0].weight.data[1] = 0
    x = draw(3, 6)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    assert theirs(x)[:, 1].isnan().all(), "peft has an answer now: have its"
    model = adapted(copy.deepcopy(base))
    layer = model.base_model.model[0]
    out = model(x)
    assert torch.equal(out, base(x))
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    stir(model)
    model.zero_grad()
    (model(x)[:, 1].sum()).backward()
    magnitude = layer.tucker_adapter_magnitude["default"]
    assert magnitude[1] == 0
    assert torch.equal(model(x)[:, 1], base(x)[:, 1])
    assert magnitude.grad[1] != 0
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight[1], torch.zeros(6, dtype=torch.float64))


def test_half_precision_and_autocast_stay_near_the_exact_function():
    base = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    x = draw(5, 16, dtype=torch.float32)
    exact = stir(adapted(copy.deepcopy(base), target_modules=["0", "2"]))
    expected = exact(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(exact(x).float(), expected, rtol=0.1, atol=0.1)
    half = copy.deepcopy(base).to(torch.bfloat16)
    for autocast, kind in ((True, torch.float32), (False, torch.bfloat16)):
        model = peft.get_peft_model(
            copy.deepcopy(half), config(target_modules=["0", "2"]), autocast_adapter_dtype=autocast
        )
        assert {p.dtype for n, p in model.named_parameters() if "tucker_adapter_" in n} == {kind}
        assert torch.equal(model(x.bfloat16()), half(x.bfloat16()))
        assert stir(model)(x.bfloat16()).dtype == torch.bfloat16


def test_each_item_of_a_batch_has_an_adapter_of_its_own():
    model = stir(adapted(made(lambda: nn.Linear(6, 5))), adapter="default")
    model.add_adapter("b", config(seed=1))
    stir(model, seed=2, adapter="b").eval()
    x = draw(3, 6)
    one, plain = model(x), model.base_model.model[0].base_layer(x)
    model.set_adapter("b")
    two = model(x)
    torch.testing.assert_close(
        model(x, adapter_names=["default", "__base__", "b"]), torch.stack([one[0], plain[1], two[2]])
    )
    model.delete_adapter("default")
    assert not [n for n, _ in model.named_parameters() if "default" in n]
    assert torch.equal(model(x), two)


def test_weighted_sums_add_what_magnitudes_grew_and_never_mix_kinds():
    model = stir(adapted(made(lambda: nn.Linear(6, 5))), adapter="default")
    model.add_adapter("b", config(seed=1))
    stir(model, seed=2, adapter="b")
    model.add_adapter("plain", config(use_dora=False))
    x, out = draw(3, 6), model(draw(3, 6))
    model.base_model.add_weighted_adapter(["default"], [1.0], "same")
    model.base_model.add_weighted_adapter(["default", "b"], [0.5, 2.0], "sum")
    layer = model.base_model.model[0]
    found = layer.tucker_adapter_magnitude
    start = layer.base_layer.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found["sum"], start + 0.5 * (found["default"] - start) + 2 * (found["b"] - start))
    model.set_adapter("same")
    torch.testing.assert_close(model(x), out)
    with pytest.raises(ValueError, match=r"must all have use_dora or none, got it for \['b'\] of \['b', 'plain'\]"):
        model.base_model.add_weighted_adapter(["b", "plain"], [1.0, 1.0], "mixed")


def test_what_is_no_update_of_the_weight_is_not_converted_to_lora():
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(stir(adapted(made(lambda: nn.Linear(6, 5)))), rank=2)


class Packed(nn.Linear):
    """A linear layer whose weight is stored in bytes."""

    def __init__(self):
        super().__init__(6, 4)
        self.weight = nn.Parameter(torch.ones(12, 1, dtype=torch.uint8), requires_grad=False)


def test_a_base_that_cannot_be_unpacked_is_refused_and_stays_as_it_was():
    net = nn.Sequential(Packed())
    with pytest.raises(
        ValueError, match=r"use_dora needs a base weight of floating-point numbers, got Packed with torch.u"
    ):
        peft.get_peft_model(net, config())
    assert type(net[0]) is Packed


def test_lengths_found_among_ranks_are_those_of_the_weight_that_is_formed():
    for shape, ranks, axis in (
        ((7, 5), (2, 3), 0),
        ((5, 8), (3, 3), 1),
        ((6, 4, 3, 2), (2, 3, 1, 2), 0),
        ((1, 6), (1, 2), 0),
    ):
        weight, core = draw(*shape), draw(*ranks, seed=1)
        factors = [draw(size, rank, seed=n) for n, (size, rank) in enumerate(zip(shape, ranks, strict=True))]
        formed = unit_norms(weight + expand_core(core, factors), unit_shape(shape, axis))
        torch.testing.assert_close(updated_norms(weight, core, factors, axis), formed)


@pytest.mark.parametrize("padded", [False, True])
def test_it_acts_in_torchs_own_encoder_in_evaluation_as_in_training(padded):
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        encoder, x = nn.TransformerEncoder(layer, num_layers=2), torch.randn(2, 4, 8)
    mask = torch.tensor([[False] * 4, [False] * 2 + [True] * 2]) if padded else None
    model = stir(adapted(encoder, target_modules=["linear1", "linear2"]))
    trained = model.train()(x, src_key_padding_mask=mask).detach()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nested tensors.*", UserWarning)
        seen = model.eval()(x, src_key_padding_mask=mask)
    keep = torch.ones(2, 4, dtype=torch.bool) if mask is None else ~mask
    torch.testing.assert_close(seen[keep], trained[keep], rtol=1e-4, atol=1e-4)


def test_magnitudes_are_learnt_towards_a_teacher_that_differs_in_lengths_alone():
    base = made(lambda: nn.Linear(6, 5))
    teacher = copy.deepcopy(base)
    teacher[0].weight.data *= torch.linspace(0.5, 2, 5, dtype=torch.float64)[:, None]
    x = draw(40, 6)
    target = teacher(x).detach()
    model = adapted(base)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(120):
        optimiser.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02 * losses[0]
