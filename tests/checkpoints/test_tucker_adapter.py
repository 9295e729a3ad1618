"""Adapters with a Tucker core as a PEFT method: every layer, every thing that users of LoRA do, every refusal."""

import copy
import json
import math
import subprocess
import sys
import warnings

import numpy as np
import peft
import pytest
import torch
from peft.utils.peft_types import PeftType
from torch import nn
from torch.nn import functional as F

from polyspan.checkpoints import (
    TuckerAdapterConfig,
    TuckerAdapterModel,
    tucker_delta,
)
from polyspan.checkpoints._tucker import num_parameters
from polyspan.run import torch_generator


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch_generator(seed), dtype=dtype)


def literal(core, factors, scale):
    """The formula for a kernel, index by index."""
    sizes = [f.shape[0] for f in factors]
    made = torch.zeros(sizes, dtype=core.dtype)
    for target in np.ndindex(*sizes):
        for source in np.ndindex(*core.shape):
            term = core[source]
            for n in range(core.ndim):
                term = term * factors[n][target[n], source[n]]
            made[target] += scale * term
    return made


def stir(model, seed=1, adapter=None):
    """Give every core entries, as training would."""
    generator = torch_generator(seed)
    for name, parameter in model.named_parameters():
        if "tucker_adapter_core" in name and (adapter is None or name.endswith(adapter)):
            parameter.data.normal_(generator=generator)
    return model


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, dilation=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0)), (2, 4, 8, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 4, (1, 2, 3), padding=(0, 1, 1), bias=False), (2, 3, 4, 4, 4)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 6)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 6, 6)),
    "circular": (lambda: nn.Conv1d(4, 6, 5, padding="same", padding_mode="circular"), (2, 4, 7)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3, stride=2), (2, 6, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(5, 10, 3, groups=5, padding=1), (2, 5, 6, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2), (2, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(3, 3, 2, groups=3), (1, 3, 3, 3, 3)),
}


def adapted(make, *, path="auto", seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        base = nn.Sequential(make()).double()
    options = {"r_in": 2, "r_out": 2, "target_modules": ["0"], "seed": 0} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ranks larger")
        return stir(peft.get_peft_model(base, TuckerAdapterConfig(path=path, **options)))


@pytest.mark.parametrize("path", ["factored", "dense"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_computes_with_the_updated_weight_and_so_do_its_gradients(kind, path):
    make, shape = LAYERS[kind]
    model, x = adapted(make, path=path), draw(*shape)
    layer = model.base_model.model[0]
    core, factors = layer.parameters_of("default")
    twin = copy.deepcopy(layer.base_layer).requires_grad_(False)
    delta = literal(core.detach(), [f.detach() for f in factors], 4.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    twin.weight += delta
    out = model(x)
    torch.testing.assert_close(out, twin(x))
    # Gradients of core and factors, against autograd through the formula and the plain layer.
    mine = torch.autograd.grad((out * draw(*out.shape, seed=3)).sum(), [core, *factors])
    named = {"weight": layer.base_layer.weight + tucker_delta(core, factors, 4.0)}
    plain = torch.func.functional_call(layer.base_layer, named, (x,))
    theirs = torch.autograd.grad((plain * draw(*out.shape, seed=3)).sum(), [core, *factors])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_transposed_convolution_reaches_the_size_that_is_asked_for():
    layer = adapted(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), path="factored").base_model.model[0]
    x = draw(2, 4, 5, 5)
    twin = copy.deepcopy(layer.base_layer).requires_grad_(False)
    twin.weight += layer.get_delta_weight("default").detach()
    torch.testing.assert_close(layer(x, output_size=[12, 12]), twin(x, output_size=[12, 12]))


def test_an_embedding_adds_to_every_row_but_that_of_padding():
    model = adapted(lambda: nn.Embedding(7, 5, padding_idx=2))
    layer, x = model.base_model.model[0], torch.tensor([[0, 2, 6], [1, 1, 2]])
    expected = F.embedding(x, layer.base_layer.weight + layer.get_delta_weight("default"))
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model(x)[0, 1], layer.base_layer.weight[2])
    model(x).sum().backward()
    assert not layer.tucker_adapter_axis0["default"].grad[2].any()


def test_transformers_conv1d_which_stores_its_weight_in_by_out_is_a_linear_layer():
    from transformers.pytorch_utils import Conv1D

    model = adapted(lambda: Conv1D(5, 6), r_in=2, r_out=3)
    layer, x = model.base_model.model[0], draw(4, 6)
    assert layer.tucker_adapter_core["default"].shape == (2, 3)
    base = layer.base_layer
    torch.testing.assert_close(model(x), x @ (base.weight + layer.get_delta_weight("default")) + base.bias)


class Net(nn.Module):
    """A small network with each kind of layer that users adapt."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        h = torch.relu(self.point(torch.relu(self.depth(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.fc(h.mean(dim=(-2, -1)))))


TARGETS = ["stem", "depth", "point", "fc"]


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return Net()


def config(**options):
    return TuckerAdapterConfig(**({"r_in": 1, "r_out": 3, "target_modules": TARGETS, "seed": 0} | options))


X = draw(3, 1, 6, 6, dtype=torch.float32)


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trained(net):
    before = net(X)
    model = peft.get_peft_model(net, config(modules_to_save=["head"]))
    assert torch.equal(model(X), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("tucker_adapter_" in name or "modules_to_save" in name for name in trained)
    model(X).square().sum().backward()
    for name, p in model.named_parameters():
        if "axis" in name:
            assert not p.grad.any(), "while the core is 0, factors must get no gradient"
        elif "core" in name:
            assert p.grad.any(), f"{name} gets no gradient"
    sizes = {"stem": (8, 1, 3, 3), "depth": (8, 1, 3, 3), "point": (12, 8, 1, 1), "fc": (10, 12)}
    expected = sum(num_parameters(s, (3, 1, *s[2:])) for s in sizes.values())
    assert sum(p.numel() for n, p in model.named_parameters() if "tucker_adapter_" in n) == expected


def test_an_adapter_is_saved_small_and_loads_exactly(net, tmp_path):
    base = copy.deepcopy(net)
    model = stir(peft.get_peft_model(net, config(modules_to_save=["head"], r_spatial=2, bias="tucker_adapter_only")))
    model.base_model.model.stem.base_layer.bias.data += 1
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "README.md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "TUCKER_ADAPTER"
    for low in (False, True):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(
            torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
        )
        torch.testing.assert_close(loaded(X), model(X))


def test_several_adapters_are_switched_disabled_summed_and_deleted(net):
    plain = net(X)
    model = stir(peft.get_peft_model(net, config(seed=0)), adapter="default")
    one = model(X)
    model.add_adapter("second", config(seed=1, r_out=2, target_modules=["point", "fc"]))
    stir(model, seed=2, adapter="second")
    torch.testing.assert_close(model(X), one)
    model.set_adapter("second")
    two = model(X)
    assert not torch.allclose(one, two)
    assert {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    with model.disable_adapter():
        assert torch.equal(model(X), plain)
    model.base_model.set_adapter(["default", "second"])
    both = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.base_model.set_adapter(["default"])
    model.delete_adapter("second")
    assert torch.equal(model(X), one)
    assert not [n for n, _ in model.named_parameters() if "second" in n]


def test_merging_gives_plain_layers_and_unmerging_the_very_bits(net):
    plain = {name: p.clone() for name, p in net.state_dict().items()}
    model = stir(peft.get_peft_model(net, config()))
    expected = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    for name, p in model.base_model.model.named_parameters():
        if "base_layer" in name:
            assert torch.equal(p, plain[name.replace("base_layer.", "")])
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(X), Net_of(plain)(X))
    merged = model.merge_and_unload(safe_merge=True)
    assert {type(m) for m in merged.modules()} == {Net, nn.Conv2d, nn.Linear}
    torch.testing.assert_close(merged(X), expected, rtol=1e-4, atol=1e-5)


def Net_of(state):
    made = Net()
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("kind", ["cat", "hooi"])
def test_a_weighted_sum_of_adapters_is_their_sum(net, kind, tmp_path):
    base = copy.deepcopy(net)
    model = stir(peft.get_peft_model(net, config(r_in=2, r_out=2, target_modules=["point", "fc", "depth"])))
    model.add_adapter("b", config(r_in=2, r_out=2, seed=5, alpha=1.0, target_modules=["point", "fc"]))
    stir(model, seed=3, adapter="b")
    ranks = 12 if kind == "hooi" else None
    model.base_model.add_weighted_adapter(["default", "b"], [0.5, -2.0], "sum", kind, ranks)
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "tucker_adapter_core"):
            expected = 0.5 * layer.get_delta_weight("default")
            if name != "depth":
                expected = expected - 2 * layer.get_delta_weight("b")
            torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-4)
    model.set_adapter("sum")
    out = model(X)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "sum")
    torch.testing.assert_close(loaded(X), out)


def test_each_item_of_a_batch_can_have_an_adapter_of_its_own(net):
    plain = net(X)
    model = stir(peft.get_peft_model(net, config(modules_to_save=["head"])), adapter="default").eval()
    model.add_adapter("b", config(seed=1, modules_to_save=["head"]))
    stir(model, seed=4, adapter="b")
    model.base_model.model.head.modules_to_save["b"].bias.data += 1
    model.eval()
    one = model(X)
    model.set_adapter("b")
    two = model(X)
    mixed = model(X, adapter_names=["b", "__base__", "default"])
    torch.testing.assert_close(mixed, torch.stack([two[0], plain[1], one[2]]))
    torch.testing.assert_close(model(X), two)
    with pytest.raises(ValueError, match=r"must be among \['b', 'default'\] or '__base__', got 'c'"):
        model(X, adapter_names=["c", "b", "b"])
    with pytest.raises(ValueError, match="must be one for each of 3 inputs, got 2"):
        model(X, adapter_names=["b", "b"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"must come without merged adapters, got \['b'\] merged"):
        model(X, adapter_names=["b", "b", "b"])
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="in evaluation only"):
        model.train()(X, adapter_names=["b", "b", "b"])
    torch.testing.assert_close(model.eval()(X), two)


@pytest.mark.filterwarnings("ignore:.*(is_gradient|gradient)_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_language_model_trains_generates_saves_and_merges(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        base = LlamaForCausalLM(made).eval()
    default = peft.get_peft_model(copy.deepcopy(base), TuckerAdapterConfig(task_type="CAUSAL_LM", seed=0))
    assert [n.rsplit(".", 1)[-1] for n in default.base_model.targeted_module_names] == ["q_proj", "v_proj"]
    options = {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens", "q_proj", "lm_head"], "seed": 0}
    model = peft.get_peft_model(copy.deepcopy(base), TuckerAdapterConfig(**options))
    model.gradient_checkpointing_enable()
    tokens = torch.tensor([[3, 9, 4, 1, 7]])
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    out = model(input_ids=tokens).logits
    assert model.generate(input_ids=tokens, max_new_tokens=2).shape == (1, 7)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(input_ids=tokens).logits, out)
    torch.testing.assert_close(loaded.merge_and_unload()(input_ids=tokens).logits, out, rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_a_float32_adapter_and_autocast_works(net):
    model = stir(peft.get_peft_model(net.to(torch.bfloat16), config()))
    assert {p.dtype for n, p in model.named_parameters() if "tucker" in n} == {torch.float32}
    assert model(X.bfloat16()).dtype == torch.bfloat16
    exact = copy.deepcopy(model).float()(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(copy.deepcopy(model).float()(X).float(), exact, rtol=0.1, atol=0.1)


def test_a_merge_that_overflows_half_precision_is_refused_and_leaves_the_weight():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4).half()), config(target_modules=["0"]))
    layer = model.base_model.model[0]
    before = layer.base_layer.weight.clone()
    nn.init.constant_(layer.tucker_adapter_core["default"], 1e7)
    with pytest.raises(ValueError, match=r"finite, got NaN or infinity in torch.float16 from default"):
        model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, before)


class Packed(nn.Linear):
    """A linear layer whose weight is stored in bytes, as quantised layers do."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)
        self.weight = nn.Parameter(torch.ones(d_in * d_out // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return x.sum(dim=-1, keepdim=True).expand(*x.shape[:-1], self.out_features)


def test_a_quantised_base_is_adapted_untouched_and_never_merged():
    model = stir(peft.get_peft_model(nn.Sequential(Packed(6, 4)), config(target_modules=["0"])))
    layer, x = model.base_model.model[0], draw(2, 6, dtype=torch.float32)
    torch.testing.assert_close(model(x), layer.base_layer(x) + x @ layer.get_delta_weight("default").T)
    with pytest.raises(
        ValueError, match=r"merging needs a base weight of floating-point numbers, got Packed with torch"
    ):
        model.merge_adapter()


def test_dropout_acts_in_training_only_and_on_average_changes_nothing():
    for path in ("factored", "dense"):
        model = adapted(lambda: nn.Conv2d(4, 4, 3), path=path, dropout=0.4)
        x = draw(1, 4, 6, 6)
        model.eval()
        still = model(x).detach()
        torch.testing.assert_close(still, adapted(lambda: nn.Conv2d(4, 4, 3), path=path)(x))
        model.train()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(0)
            draws = torch.stack([model(x) for _ in range(1500)])
        assert not torch.allclose(draws[0], draws[1])
        assert float((draws.mean(dim=0) - still).abs().max()) < 6 * float(draws.std(dim=0).max()) / math.sqrt(1500)


def test_factors_begin_as_the_configuration_says_and_repeat_by_layer_name():
    def factor(**options):
        model = peft.get_peft_model(nn.Sequential(nn.Linear(500, 400)), config(r_in=8, target_modules=["0"], **options))
        return model.base_model.model[0].tucker_adapter_axis1["default"]

    assert float(factor().detach().std()) == pytest.approx(0.25, rel=0.05)
    assert float(factor(init="small").detach().std()) == pytest.approx(0.02, rel=0.05)
    square = factor(init="orthogonal")
    torch.testing.assert_close(square.T @ square, 500 / 16 * torch.eye(8), rtol=1e-4, atol=1e-3)
    assert torch.equal(factor(), factor())
    assert not torch.equal(factor(), factor(seed=1))


def test_the_global_generators_are_left_alone_where_a_seed_is_given(net):
    before = torch.get_rng_state()
    peft.get_peft_model(net, config())
    assert torch.equal(torch.get_rng_state(), before)


def test_scale_and_ranks_follow_their_patterns(net):
    model = peft.get_peft_model(
        net,
        config(
            r_in=2, r_out=4, alpha=8.0, scaling="alpha_over_r", target_modules=["point", "fc", "head"],
            rank_pattern={"point": [5, 3, 1, 1], "fc": 6}, alpha_pattern={"head": 1.0},
        ),
    )  # fmt: skip
    layers = model.base_model.model
    assert layers.point.tucker_adapter_core["default"].shape == (5, 3, 1, 1)
    assert layers.fc.tucker_adapter_core["default"].shape == (6, 6)
    assert layers.head.tucker_adapter_core["default"].shape == (4, 2)
    assert [m.tucker_adapter_scale["default"] for m in (layers.point, layers.fc, layers.head)] == [8 / 5, 8 / 6, 0.25]


def test_all_conv_and_all_linear_name_every_layer_of_their_kind(net):
    conv = peft.get_peft_model(copy.deepcopy(net), config(target_modules="all-conv"))
    assert conv.base_model.targeted_module_names == ["stem", "depth", "point"]
    linear = peft.get_peft_model(copy.deepcopy(net), config(target_modules="all-linear"))
    assert linear.base_model.targeted_module_names == ["fc", "head"]
    regex = peft.get_peft_model(copy.deepcopy(net), config(target_modules=r"st.*|fc"))
    assert regex.base_model.targeted_module_names == ["stem", "fc"]


def test_depthwise_convolutions_take_the_dense_path_and_wide_ones_the_factored():
    deep = peft.get_peft_model(nn.Sequential(nn.Conv2d(64, 64, 7, groups=64)), config(target_modules=["0"], r_in=8))
    wide = peft.get_peft_model(nn.Sequential(nn.Conv2d(64, 64, 3)), config(target_modules=["0"], r_in=8))
    assert deep.base_model.model[0].tucker_adapter_path == {"default": "dense"}
    assert wide.base_model.model[0].tucker_adapter_path == {"default": "factored"}


def test_it_learns_by_the_usual_loop_with_gradient_checkpointing(net):
    from torch.utils.checkpoint import checkpoint

    teacher = copy.deepcopy(net)
    with torch.no_grad():
        teacher.fc.weight += draw(10, 12, seed=8, dtype=torch.float32)
        target = teacher(X)
    model = peft.get_peft_model(net, config(r_in=4, r_out=4, target_modules=["point", "fc"]))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(80):
        optimiser.zero_grad()
        loss = (checkpoint(model, X, use_reentrant=False) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02 * losses[0]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_transformers_model_is_adapted_saved_and_loaded(tmp_path):
    from transformers import ConvNextConfig, ConvNextForImageClassification

    made = ConvNextConfig(
        num_channels=3, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, num_labels=3, image_size=16
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        base = ConvNextForImageClassification(made).eval()
    x = draw(2, 3, 16, 16, dtype=torch.float32)
    options = {"target_modules": r".*(dwconv|pwconv1|pwconv2)", "modules_to_save": ["classifier"], "r_in": 4}
    model = stir(peft.get_peft_model(copy.deepcopy(base), config(**options)))
    assert len(model.base_model.targeted_module_names) == 6
    out = model(pixel_values=x).logits
    assert not torch.allclose(out, base(pixel_values=x).logits)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(pixel_values=x).logits, out)
    torch.testing.assert_close(model.merge_and_unload()(pixel_values=x).logits, out, rtol=1e-4, atol=1e-5)


def test_peft_still_needs_its_enum_opened_for_a_method_from_outside():
    """When this fails, peft accepts methods from outside, and ``_open_peft_type`` can go."""
    from peft.utils import register_peft_method

    with pytest.raises(ValueError, match="please add an entry"):
        register_peft_method(name="a_method_of_nobody", config_cls=TuckerAdapterConfig, model_cls=TuckerAdapterModel)
    assert PeftType.TUCKER_ADAPTER == "TUCKER_ADAPTER"
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TUCKER_ADAPTER] is TuckerAdapterModel


def test_a_linear_adapter_converts_to_lora(net):
    model = stir(peft.get_peft_model(net, config(target_modules=["fc"], r_in=3)))
    before = model(X)
    lora = peft.convert_to_lora(model, rank=3)
    assert lora is not None
    config_, state = lora
    again = peft.get_peft_model(model.unload(), config_)
    peft.set_peft_model_state_dict(again, state)
    torch.testing.assert_close(again(X), before, rtol=1e-4, atol=1e-5)


def test_without_peft_updates_can_be_expanded_and_the_adapter_says_what_it_needs():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import torch\nfrom polyspan import checkpoints\nfrom polyspan.errors import MissingExtra\n"
        "print(float(checkpoints.tucker_delta(torch.ones(1, 1), [torch.ones(2, 1)] * 2, 3.0).sum()))\n"
        "try: checkpoints.TuckerAdapterConfig\nexcept MissingExtra as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == '12.0\na Tucker adapter needs peft; run: pip install "polyspan[hf]"\n'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_in": 0}, "r_in must be at least 1, got 0"),
        ({"r_out": -2}, "r_out must be at least 1, got -2"),
        ({"r_spatial": 0}, "r_spatial must be at least 1, got 0"),
        ({"r_spatial": [2, 0]}, r"r_spatial must be at least 1, got \[2, 0\]"),
        ({"alpha": 0.0}, "alpha must be finite and not 0, got 0.0"),
        ({"alpha_pattern": {"fc": math.inf}}, "alpha must be finite and not 0, got inf for fc"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"scaling": "rank"}, "scaling must be one of .*, got 'rank'"),
        ({"bias": "some"}, "bias must be one of .*, got 'some'"),
        ({"init": "kaiming"}, "init must be one of .*, got 'kaiming'"),
        ({"path": "fast"}, "path must be one of .*, got 'fast'"),
        ({"target_modules": "fc", "layers_to_transform": [1]}, "layers_to_transform must be left out"),
        ({"layers_pattern": "h"}, "layers_pattern must come with layers_to_transform"),
    ],
)
def test_a_wrong_configuration_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["nothing"]},
            r"got \{'nothing'\}; layers that can be adapted: stem, depth, point, fc, head",
        ),
        (
            {"r_out": 50, "strict": True},
            r"strict, got stem \(50, 1, 3, 3\) to \(8, 1, 3, 3\) for a weight \(8, 1, 3, 3\)",
        ),
        ({"r_spatial": [2, 2, 2]}, "r_spatial must be one rank or 2 for stem"),
        ({"target_modules": ["fc", "norm"]}, "layers, convolutions or embeddings, got BatchNorm1d at norm"),
        ({"rank_pattern": {"fc": [2, 2, 2]}}, r"ranks must be one for each axis of shape \(10, 12\)"),
        ({"rank_pattern": {"fc": [11, 2]}}, r"ranks\[0\] must be between 1 and 10, got 11"),
    ],
)
def test_a_configuration_that_does_not_fit_the_model_is_refused_and_leaves_it(net, options, message):
    if "norm" in options.get("target_modules", ()):
        net.norm = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(net, config(**options))
    assert {type(m) for m in net.modules()} <= {Net, nn.Conv2d, nn.Linear, nn.BatchNorm1d}, "the model is not as it was"
    assert all(p.requires_grad for p in net.parameters())


def test_ranks_beyond_an_axis_are_cut_with_one_warning_that_names_the_layers(net):
    with pytest.warns(UserWarning, match=r"were cut to it: stem \(8, 9, 3, 3\) to \(8, 1, 3, 3\).*; point") as seen:
        model = peft.get_peft_model(net, config(r_in=9, r_out=8))
    assert len([w for w in seen if "cut" in str(w.message)]) == 1
    assert "depth" not in str(seen[0].message)
    assert model.base_model.model.point.tucker_adapter_core["default"].shape == (8, 8, 1, 1)


@pytest.mark.parametrize(
    ("layer", "target", "message"),
    [
        (lambda: nn.BatchNorm2d(3), "0", "must name linear layers, convolutions or embeddings, got BatchNorm2d at 0"),
        (lambda: nn.Embedding(5, 4, max_norm=1.0), "0", "0 must have no max_norm"),
        (lambda: nn.LazyConv2d(4, 3), "0", "0 must have its sizes, got a lazy layer"),
        (lambda: nn.MultiheadAttention(8, 2), "out_proj", "MultiheadAttention reads its weight without calling it"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_refused(layer, target, message):
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(nn.Sequential(layer()), config(target_modules=[target]))


def test_loading_into_another_architecture_names_the_first_layer_that_does_not_fit(net, tmp_path):
    peft.get_peft_model(net, config(target_modules=["fc", "head"])).save_pretrained(tmp_path)
    other = nn.Sequential()
    other.add_module("fc", nn.Linear(12, 10))
    with pytest.raises(ValueError, match="it adapts head, where the model has no such layer"):
        peft.PeftModel.from_pretrained(other, tmp_path)
    narrow = nn.Sequential()
    narrow.add_module("fc", nn.Linear(7, 10))
    narrow.add_module("head", nn.Linear(10, 4))
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model.model.fc.tucker_adapter_axis1"):
        peft.PeftModel.from_pretrained(narrow, tmp_path)


def test_weighted_sums_refuse_what_is_not_there(net):
    model = peft.get_peft_model(net, config()).base_model
    for args, message in (
        ((["no"], [1.0], "s"), r"adapters must be among \['default'\], got \['no'\]"),
        ((["default"], [1.0, 2.0], "s"), "weights must be one for each of 1 adapters, got 2"),
        ((["default"], [1.0], "default"), "adapter_name must be new, got 'default'"),
        ((["default"], [1.0], "s", "ties"), "combination_type must be one of .*'hooi', .*, got 'ties'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*args)
