import copy
import inspect

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from polyspan.nn import (
    ULSAM,
    insert_ulsam,
    mobilenet_v1,
    mobilenet_v2,
    model_cost,
    replace_with_ulsam,
    replaceable_blocks,
)
from polyspan.nn._model_surgery import find_modules

IMAGE = torch.empty(1, 3, 224, 224, device="meta")
SMALL = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(seed=0, **options):
    return mobilenet_v2(5, 0.25, small_input=True, generator=torch.Generator().manual_seed(seed), **options)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize(
    ("build", "params", "macs"), [(mobilenet_v1, 4.232e6, 568.7e6), (mobilenet_v2, 3.505e6, 300.8e6)]
)
def test_networks_cost_what_is_published_and_what_torch_counts(build, params, macs):
    model = build(device="meta").eval()
    cost = model_cost(model, IMAGE)
    assert cost.num_params == sum(p.numel() for p in model.parameters()) == pytest.approx(params, rel=1e-3)
    with FlopCounterMode(display=False) as counter:
        model(IMAGE)
    assert cost.num_macs == counter.get_total_flops() // 2 == pytest.approx(macs, rel=1e-3)
    assert sum(layer.num_params for layer in cost.layers) == cost.num_params
    assert sum(layer.num_macs for layer in cost.layers) == cost.num_macs
    assert cost.layers[0].output_shape == (1, 32, 112, 112)


@pytest.mark.parametrize(
    ("blocks", "params", "macs"),
    [
        ((12,), 3.28, 277.34),
        ((16,), 3.08, 284.54),
        ((9, 12), 3.23, 267.06),
        ((12, 15), 2.965, 261.88),
        ((15, 16), 2.77, 269.07),
        ((12, 13, 15, 16), 2.54, 223.98),
    ],
)
def test_replacing_bottlenecks_saves_what_the_paper_says(blocks, params, macs):
    """The paper rounds MobileNet-V2 to 3.4 million parameters before it subtracts."""
    names = [f"features.{i}" for i in blocks]
    _, report = replace_with_ulsam(mobilenet_v2(device="meta"), names, IMAGE)
    saved = report.before.num_params - report.after.num_params
    assert 3.4 - saved / 1e6 == pytest.approx(params, abs=0.016)
    assert report.after.num_macs / 1e6 == pytest.approx(macs, abs=1.0)
    assert report.changed == tuple(names)


def test_version_one_loses_or_gains_what_the_paper_says():
    _, replaced = replace_with_ulsam(mobilenet_v1(device="meta"), "features.9", IMAGE)
    assert replaced.after.num_params / 1e6 == pytest.approx(3.96, abs=0.01)
    assert replaced.after.num_macs / 1e6 == pytest.approx(517, abs=0.5)
    assert replaced.before.num_macs - replaced.after.num_macs == 512 * 9 * 196 + 512**2 * 196 - 2 * 512 * 196
    _, inserted = insert_ulsam(mobilenet_v1(device="meta"), "features.11", IMAGE)
    assert inserted.after.num_macs / 1e6 == pytest.approx(569.1, abs=0.2)
    assert inserted.after.num_params - inserted.before.num_params == 4 * 512 + 2 * 4
    assert replaced.params_share < 1 < inserted.params_share
    assert replaced.macs_share == replaced.after.num_macs / replaced.before.num_macs


def test_blocks_that_keep_their_shape_are_those_of_the_paper():
    found = replaceable_blocks(mobilenet_v2(device="meta"), IMAGE)
    whole = [block for block in found if block.kind == "InvertedResidual"]
    assert [block.name for block in whole] == [f"features.{i}" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]
    assert {(block.num_params, block.num_macs) for block in whole[-4:]} == {
        (118_272, 22_692_096),
        (320_000, 15_476_160),
    }
    assert whole[-1].shape == (1, 160, 7, 7)
    one = [block.name for block in replaceable_blocks(mobilenet_v1(device="meta"), IMAGE)]
    assert one == [f"features.{i}" for i in (3, 5, 7, 8, 9, 10, 11, 13)]
    singles = replaceable_blocks(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), torch.ones(1, 3, 2, 2), min_convs=1)
    assert [block.name for block in singles] == ["0"]


@pytest.mark.parametrize("build", [mobilenet_v1, mobilenet_v2])
def test_the_stem_for_small_images_leaves_out_two_halvings(build):
    small_image = torch.empty(1, 3, 32, 32, device="meta")
    for options, side in (({}, 1), ({"small_input": True}, 4)):
        cost = model_cost(build(4, 0.25, device="meta", **options), small_image)
        assert cost.layers[-2].output_shape[2:] == (side, side)
        assert cost.layers[-1].output_shape == (1, 4)


def test_networks_take_chance_from_the_generator_only():
    state = torch.random.get_rng_state()
    assert same(small().state_dict(), small().state_dict())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not same(small().state_dict(), small(1).state_dict())
    for build in (mobilenet_v1, mobilenet_v2):
        for options, message in (
            ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
            ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
            ({"width": 0.0}, "width must be positive and finite, got 0.0"),
        ):
            with pytest.raises(ValueError, match=message):
                build(**options)
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, got 1"):
        mobilenet_v2(dropout=1)


def test_costs_of_all_kinds_of_layers_are_those_torch_counts():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ConvTranspose2d(6, 8, 2, stride=2), nn.BatchNorm2d(8),
        nn.Flatten(2), nn.Conv1d(8, 3, 5), nn.Linear(60, 7), nn.Linear(7, 7, bias=False),
    )  # fmt: skip
    x = torch.ones(3, 4, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert model_cost(model, x).num_macs == counter.get_total_flops() // 2


def test_a_shared_layer_holds_its_numbers_once_and_works_each_time():
    layer = nn.Linear(4, 4)
    cost = model_cost(nn.Sequential(layer, nn.ReLU(), layer), torch.ones(1, 4))
    assert (cost.num_params, cost.num_macs) == (20, 32)
    layer.weight.requires_grad_(False)
    assert model_cost(nn.Sequential(layer), torch.ones(1, 4)).num_params == 4


def test_counting_leaves_modes_and_statistics_alone_also_where_the_model_fails():
    model = small().train()
    model.features[3].eval()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    model_cost(model, SMALL)
    with pytest.raises(RuntimeError):
        model_cost(model, torch.ones(1, 7, 32, 32))
    assert [m.training for m in model.modules()] == modes
    assert same(model.state_dict(), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_replacing_keeps_all_other_weights_and_runs_like_the_parts():
    model = small().eval()
    before = copy.deepcopy(model.state_dict())
    returned, _ = replace_with_ulsam(
        model, ["features.5", "features.12"], SMALL, 8, generator=torch.Generator().manual_seed(0)
    )
    assert returned is model
    made = model.features[12]
    assert isinstance(made, ULSAM)
    assert (made.num_channels, made.num_groups, made.training) == (24, 8, False)
    after = model.state_dict()
    kept = {key: value for key, value in before.items() if not key.startswith(("features.5.", "features.12."))}
    assert same({key: after[key] for key in kept}, kept)
    x = SMALL
    for i, layer in enumerate(model.features):
        x = (
            x * (1 + layer.attention_maps(x).repeat_interleave(layer.num_channels // 8, 1))
            if i in (5, 12)
            else layer(x)
        )
    torch.testing.assert_close(model(SMALL), model.classifier(x.mean((2, 3))))


def test_inserting_keeps_the_block_and_adds_attention_behind_it():
    model = small().eval()
    plain, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    _, report = insert_ulsam(model, lambda name, _: name == "features.16", SMALL[:1], kernel_size=5)
    assert report.changed == ("features.16",)
    wrapped = model.features[16]
    assert wrapped.attention.kernel_size == 5
    after = model.state_dict()
    assert all(torch.equal(after[key.replace("features.16.", "features.16.block.")], v) for key, v in before.items())
    with torch.no_grad():
        wrapped.attention.point_norm.bias.fill_(-1e3)
    x = plain.features[:17](SMALL) * (1 + 1 / 16)
    torch.testing.assert_close(model(SMALL), plain.classifier(plain.features[17:](x).mean((2, 3))))
    assert report.after.num_macs - report.before.num_macs == 2 * 40 * 16


def test_a_predicate_takes_the_outermost_and_new_modules_follow_the_model():
    model = small(dtype=torch.float64).train()
    wanted = {block.name for block in replaceable_blocks(model, SMALL.double()) if block.num_params > 5000}
    _, report = replace_with_ulsam(model, lambda name, module: name in wanted, SMALL.double())
    assert set(report.changed) == {name for name in wanted if not name.endswith(".conv")}
    made = [m for m in model.modules() if isinstance(m, ULSAM)]
    assert len(made) == len(report.changed) > 2
    assert all(m.training and m.scale.dtype == torch.float64 for m in made)
    model(SMALL.double()).sum().backward()
    assert all(m.point.grad is not None for m in made)


def test_a_block_under_two_names_is_replaced_under_both():
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
    model = nn.Sequential(block, nn.ReLU(), block)
    replace_with_ulsam(model, "2", torch.ones(1, 8, 4, 4))
    assert isinstance(model[0], ULSAM)
    assert model[0] is model[2]


def test_sequences_and_volumes_take_attention_of_their_own_dims():
    for dims, conv in ((1, nn.Conv1d), (3, nn.Conv3d)):
        model = nn.Sequential(conv(2, 8, 3), nn.Sequential(conv(8, 8, 1), conv(8, 8, 1)))
        replace_with_ulsam(model, "1", (torch.ones(1, 2, *(6,) * dims),), dims=dims)
        insert_ulsam(model, "0", torch.ones(1, 2, *(6,) * dims))
        assert model[1].dims == model[0].attention.dims == dims


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.idle = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.pair = nn.LSTM(4, 4)
        self.last = nn.Linear(16, 2)

    def forward(self, *, image):
        h = self.first(image).flatten(2).mT
        return self.last(self.pair(h)[0].flatten(1))


REFUSED = [
    ("features.4", {}, r"the shape of their map, got 'features.4', which turns \(2, 8, 32, 32\) into \(2, 8, 16, 16\)"),
    ("features.11", {}, r"got 'features.11', which turns \(2, 16, 8, 8\) into \(2, 24, 8, 8\)"),
    (["features.12", "feature.15"], {}, "name modules of the model, got 'feature.15'; the nearest are features.15"),
    ([], {}, "targets must name a module of the model, got no name"),
    (["features.12", "features.12.conv"], {}, "got 'features.12.conv' inside 'features.12'"),
    (lambda *_: False, {}, "got a predicate that chooses none"),
    (["features.12", "features.5"], {"num_groups": 5}, "features.12: num_groups must divide num_channels=24, got 5"),
    ("classifier.0", {}, r"must take one map \(batch, channels, ...\), got 'classifier.0' with \[\(2, 1280\)\]"),
    ("features.12", {"kernel_size": 2}, "features.12: kernel_size must be odd and at least 1, got 2"),
    ("features.11", {"check": False}, r"targets \['features.11'\] leave a model that does not run, and were put back"),
]  # fmt: skip


@pytest.mark.parametrize(("targets", "options", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_replaced_is_refused_and_nothing_changes(targets, options, message):
    model = small().train()
    children, before = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        replace_with_ulsam(model, targets, SMALL, **options)
    assert dict(model.named_modules()) == children
    assert same(model.state_dict(), before)
    assert all(m.training for m in model.modules())


def test_without_the_check_a_block_that_halves_the_map_may_go():
    model = small()
    _, report = replace_with_ulsam(model, "features.4", SMALL[:1], check=False)
    assert report.after.layers[-1].output_shape == report.before.layers[-1].output_shape
    assert isinstance(model.features[4], ULSAM)


def test_inputs_by_name_run_and_modules_that_return_no_map_are_refused():
    model, batch = Named(), {"image": torch.ones(1, 4, 2, 2)}
    assert [layer.name for layer in model_cost(model, batch).layers] == ["first", "pair", "last"]
    with pytest.raises(
        ValueError, match=r"after must return one map \(batch, channels, ...\), got 'pair' with \[None\]"
    ):
        insert_ulsam(model, "pair", batch)
    with pytest.raises(ValueError, match="after must run when the example input goes through, got 'idle'"):
        insert_ulsam(model, "idle", batch)
    insert_ulsam(model, "first", batch, 2)
    assert model.first.attention.num_groups == 2


def test_a_block_that_sees_maps_of_two_widths_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(torch.cat([self.act(x)] * 2, dim=1))

    with pytest.raises(ValueError, match=r"got 'act' with \[\(1, 4, 3, 3\), \(1, 8, 3, 3\)\]"):
        insert_ulsam(Twice(), "act", torch.ones(1, 4, 3, 3))


@pytest.mark.parametrize("targets", [3, [nn.ReLU()]], ids=["number", "module"])
def test_targets_that_are_no_names_are_refused(targets):
    with pytest.raises(ValueError, match="targets must be names of modules or a predicate, got"):
        inspect.unwrap(find_modules)(nn.Sequential(nn.ReLU()), targets, "targets")
