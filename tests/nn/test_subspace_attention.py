import inspect
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polyspan.nn import ULSAM, attention_facts
from polyspan.nn._channel_attention import CBAM, SqueezeExcitation
from polyspan.nn.subspace_attention_plots import plot_attention_maps


class Literal(nn.Module):
    """The formula, one group after another, with torch's own layers and the key names of the authors' code."""

    def __init__(self, m, g):
        super().__init__()
        size = m // g
        self.subspaces = nn.ModuleList(
            nn.ModuleDict(
                {
                    "conv_dws": nn.Conv2d(size, size, 1, groups=size),
                    "bn_dws": nn.BatchNorm2d(size, momentum=0.9),
                    "conv_point": nn.Conv2d(size, 1, 1),
                    "bn_point": nn.BatchNorm2d(1, momentum=0.9),
                }
            )
            for _ in range(g)
        )

    def forward(self, x):
        out = []
        for part, f in zip(self.subspaces, x.chunk(len(self.subspaces), dim=1), strict=True):
            u = torch.relu(part["bn_dws"](part["conv_dws"](f)))
            p = nn.functional.max_pool2d(u, 3, 1, 1)
            q = torch.relu(part["bn_point"](part["conv_point"](p)))
            a = torch.softmax(q.reshape(len(x), -1), dim=1).reshape(len(x), 1, *x.shape[2:])
            out.append(a * f + f)
        return torch.cat(out, dim=1)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(m=12, g=3, *, dims=2, seed=0, dtype=torch.float64, **options):
    """A module whose batch norms have seen data, and so have nothing left of their defaults."""
    generator = torch.Generator().manual_seed(seed)
    module = ULSAM(m, g, dims=dims, generator=generator, dtype=dtype, **options)
    with torch.no_grad():
        for norm in (module.scale_norm, module.point_norm):
            for value in (norm.weight, norm.running_var):
                value.uniform_(0.5, 2, generator=generator)
            for value in (norm.bias, norm.running_mean):
                value.normal_(0, 0.3, generator=generator)
    return module.eval()


@settings(max_examples=25, deadline=None)
@given(
    g=st.integers(1, 4), size=st.integers(1, 4), h=st.integers(1, 9), w=st.integers(2, 9), seed=st.integers(0, 2**31)
)
def test_every_group_is_scaled_by_one_plus_a_map_that_sums_to_one(g, size, h, w, seed):
    x = draw(2, g * size, h, w, seed=seed, dtype=torch.float64)
    module = trained(g * size, g, seed=seed)
    maps = module.attention_maps(x)
    assert maps.min() >= 0
    torch.testing.assert_close(maps.sum(dim=(2, 3)), torch.ones(2, g, dtype=torch.float64))
    expected = x * (1 + maps.repeat_interleave(size, dim=1))
    torch.testing.assert_close(module(x), expected)
    without = trained(g * size, g, seed=seed, residual=False)
    torch.testing.assert_close(without(x), expected - x)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), training=st.booleans())
def test_permuting_images_groups_or_turning_the_map_does_the_same_to_the_output(seed, training):
    module, x = trained(seed=seed).train(training), draw(4, 12, 5, 7, seed=seed, dtype=torch.float64)
    out = module(x)
    torch.testing.assert_close(module(x.flip(0)), out.flip(0))
    torch.testing.assert_close(module(x.mT).mT, out)
    torch.testing.assert_close(module(x.flip(2, 3)).flip(2, 3), out)


@pytest.mark.parametrize(
    ("shape", "g"), [((4, 16, 14, 14), 4), ((3, 12, 5, 7), 1), ((2, 6, 1, 9), 6), ((5, 8, 3, 2), 2)]
)
def test_it_is_the_literal_loop_over_groups(shape, g):
    torch_state = torch.random.get_rng_state()
    literal = Literal(shape[1], g).double()
    torch.random.set_rng_state(torch_state)
    module = ULSAM.from_official_state_dict(literal.state_dict())
    assert module.scale_norm.momentum == 0.9
    x = draw(*shape, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = module.train()(mine), literal.train()(theirs)
    torch.testing.assert_close(out, expected)
    weights = draw(*shape, seed=1, dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    parts = literal.subspaces
    torch.testing.assert_close(module.scale.grad, torch.cat([p["conv_dws"].weight.grad for p in parts]))
    torch.testing.assert_close(module.point.grad, torch.cat([p["conv_point"].weight.grad for p in parts]))
    torch.testing.assert_close(module.scale_norm.weight.grad, torch.cat([p["bn_dws"].weight.grad for p in parts]))
    for name, theirs_name in (("scale_norm", "bn_dws"), ("point_norm", "bn_point")):
        for value in ("running_mean", "running_var"):
            expected = torch.cat([getattr(p[theirs_name], value) for p in parts])
            torch.testing.assert_close(getattr(getattr(module, name), value), expected)
    torch.testing.assert_close(module.eval()(x), literal.eval()(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"residual": False}, {"norm": False}, {"bias": True}, {"kernel_size": 1}])
def test_fused_it_computes_the_same_with_the_least_numbers(dims, options):
    module = ULSAM(12, 3, dims=dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64, **options)
    x = draw(3, 12, *(5, 4, 3)[:dims], dtype=torch.float64)
    module.train()(x)
    module.eval()
    fused = module.fuse()
    torch.testing.assert_close(fused(x), module(x), rtol=1e-12, atol=1e-12)
    assert not list(fused.parameters())
    held = sum(b.numel() for b in fused.buffers())
    assert held == (24 if options == {"norm": False} else 24 + 12 + 3)
    again = ULSAM(12, 3, dims=dims, dtype=torch.float64, **options).eval().fuse()
    again.load_state_dict(fused.state_dict())
    torch.testing.assert_close(again(x), fused(x))


def test_a_line_or_a_volume_is_a_plane_with_places_in_a_row():
    plane, line, volume = (trained(dims=dims, kernel_size=1) for dims in (2, 1, 3))
    line.load_state_dict({key: v.reshape(line.state_dict()[key].shape) for key, v in plane.state_dict().items()})
    volume.load_state_dict({key: v.reshape(volume.state_dict()[key].shape) for key, v in plane.state_dict().items()})
    x = draw(2, 12, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(line(x.flatten(2)), plane(x).flatten(2))
    torch.testing.assert_close(volume(x.unflatten(3, (2, 3))), plane(x).unflatten(3, (2, 3)))


def test_it_holds_the_numbers_that_are_said():
    def numbers(module):
        return sum(p.numel() for p in module.parameters())

    for m, g in ((16, 4), (512, 8), (24, 1)):
        assert numbers(ULSAM(m, g)) == 4 * m + 2 * g
        assert numbers(ULSAM(m, g, bias=True)) == 5 * m + 3 * g
        assert numbers(ULSAM(m, g, norm=False)) == 2 * m
    assert numbers(ULSAM(16, 4, bias=True)) == numbers(Literal(16, 4)) == 92


def test_the_costs_of_attention_modules_are_those_of_the_papers_table():
    """At 512 channels and 14 by 14: parameters, and multiply-adds in millions."""
    counts = {
        "ulsam": (ULSAM(512, 4, norm=False), 1e3, 0.2),
        "squeeze and excitation": (SqueezeExcitation(512), 33e3, 0.03),
        "cbam": (CBAM(512), 33e3, 0.05),
    }
    for module, params, macs in counts.values():
        assert sum(p.numel() for p in module.parameters()) == pytest.approx(params, rel=0.03)
        # CBAM's published number leaves out a part: 0.085 by its own formula.
        low, high = (macs, 2 * macs) if isinstance(module, CBAM) else (0.95 * macs, 1.1 * macs)
        assert low <= module.num_macs(14, 14) / 1e6 <= high
    assert sum(p.numel() for p in CBAM(512).parameters()) == 2 * 512**2 // 16 + 98


@pytest.mark.parametrize("kind", [SqueezeExcitation, CBAM])
def test_the_rivals_scale_and_never_turn_a_sign(kind):
    x = draw(2, 32, 5, 5)
    out = kind(32, generator=torch.Generator().manual_seed(0))(x)
    share = out / x
    assert share.min() > 0
    assert share.max() < 1
    if kind is SqueezeExcitation:
        torch.testing.assert_close(share, share.mean(dim=(2, 3), keepdim=True).expand_as(share))


def test_maps_are_those_of_eval_mode_and_leave_the_statistics_alone():
    module, x = trained().train(), draw(2, 12, 6, 6, dtype=torch.float64)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    maps = module.attention_maps(x)
    assert module.training
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    torch.testing.assert_close(module.eval()(x) / x, 1 + maps.repeat_interleave(4, dim=1))


def test_weights_come_from_the_generator_or_from_torchs_own():
    state = torch.random.get_rng_state()
    one, two = (ULSAM(8, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.scale, two.scale)
    assert one.scale.abs().max() <= 1
    assert one.point.abs().max() <= 0.5
    with torch.random.fork_rng():
        assert not torch.equal(ULSAM(8, 2).scale, ULSAM(8, 2).scale)


def test_where_all_logits_are_zero_attention_is_uniform():
    module = ULSAM(8, 2, dtype=torch.float64).eval()
    with torch.no_grad():
        module.point_norm.bias.fill_(-100)
    x = draw(2, 8, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(module(x), x * (1 + 1 / 20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_sum_of_a_large_map_and_the_dtype(dtype):
    wide = trained(dtype=torch.float32)
    narrow = trained(dtype=torch.float32).to(dtype)
    x = draw(2, 12, 40, 41)
    maps = narrow.attention_maps(x.to(dtype))
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(dim=(2, 3)), torch.ones(2, 3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps, wide.attention_maps(x), rtol=0.2, atol=1e-4)
    out = narrow(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wide(x), rtol=0.02, atol=0.02)
    # A half-precision map through a float32 module, and training in half precision.
    assert wide(x.to(dtype)).dtype == dtype
    trains = narrow.train()(x.to(dtype))
    assert trains.dtype == dtype
    assert torch.isfinite(trains).all()
    huge = torch.full((1, 12, 3, 3), 6e4 if dtype == torch.float16 else 1e30, dtype=dtype)
    assert not torch.isnan(ULSAM(12, 3).eval().to(dtype)(huge)).any()


def test_autocast_returns_what_it_is_given_and_is_near():
    module, x = trained(dtype=torch.float32), draw(2, 12, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for training in (False, True):
            out = module.train(training)(x)
            assert out.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = module.eval()(x)
    torch.testing.assert_close(near, module(x), rtol=0.01, atol=0.01)


def test_channels_last_goes_in_and_comes_out():
    module, x = trained(dtype=torch.float32), draw(2, 12, 7, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    for training in (False, True):
        out = module.train(training)(last)
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, module(x))


def test_it_exports_for_any_batch():
    module, x = trained(dtype=torch.float32), draw(3, 12, 7, 6)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(module, (x,), dynamic_shapes=shapes).module()
    more = draw(7, 12, 7, 6, seed=1)
    torch.testing.assert_close(exported(more), module(more))


def test_synchronised_batch_norms_take_the_place_of_its_own():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(trained())
    assert isinstance(converted.scale_norm, nn.SyncBatchNorm)
    x = draw(2, 12, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(converted.eval()(x), trained()(x))


def test_nan_stays_in_its_group_of_its_image():
    module, x = trained(dtype=torch.float32), draw(3, 12, 5, 5)
    clean = module(x)
    x[1, 5, 2, 3] = float("nan")
    out = module(x)
    assert out[1, 4:8].isnan().all()
    kept = torch.ones(3, 12, dtype=torch.bool)
    kept[1, 4:8] = False
    assert torch.equal(out[kept], clean[kept])


def test_an_empty_batch_is_an_empty_batch():
    assert trained()(torch.empty(0, 12, 4, 4, dtype=torch.float64)).shape == (0, 12, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((24, 5), "num_groups must divide num_channels=24, got 5; the nearest divisors are 4 and 6"),
        ((7, 2), "num_groups must divide num_channels=7, got 2; the nearest divisors are 1 and 7"),
        ((4, 8), "num_groups must be between 1 and num_channels=4, got 8"),
        ((4, 0), "num_groups must be between 1 and num_channels=4, got 0"),
        ((0, 1), "num_channels must be at least 1, got 0"),
        ((8, 2, 4), "kernel_size must be odd and at least 1, got 4"),
        ((8, 2, 3, False, 0.0), "bn_momentum must be above 0 and at most 1, got 0.0"),
    ],
)
def test_sizes_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ULSAM(*arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((12, 5, 5), r"x must be \(batch, 12, height, width\), got shape \(12, 5, 5\)"),
        ((2, 12, 5, 5, 5), r"got shape \(2, 12, 5, 5, 5\)"),
        ((2, 5, 5, 12), r"x must be \(batch, 12, height, width\), got shape \(2, 5, 5, 12\)"),
        ((2, 12, 0, 5), r"at least one place, got shape \(2, 12, 0, 5\)"),
    ],
)
def test_other_shapes_are_refused(shape, message):
    for module in (trained(), trained().train(), trained().fuse()):
        with pytest.raises(ValueError, match=message):
            module(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match=message):
        trained().attention_maps(torch.zeros(shape, dtype=torch.float64))


def test_whole_numbers_and_other_dims_are_refused():
    with pytest.raises(TypeError, match=r"x must hold floats, got torch\.int64"):
        trained()(torch.ones(1, 12, 3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="dims must be 1, 2 or 3, got 4"):
        ULSAM(8, 2, dims=4)
    with pytest.raises(ValueError, match=r"x must be \(batch, 12, length\)"):
        trained(dims=1)(torch.ones(1, 12, 3, 3))


def test_a_map_of_one_place_is_doubled_with_a_warning():
    module, x = trained(), draw(3, 12, 1, 1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="a map of one place has attention 1: the output is exactly 2x"):
        out = module(x)
    torch.testing.assert_close(out, 2 * x, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="exactly x"):
        torch.testing.assert_close(trained(residual=False)(x), x, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(draw(3, 12, 1, 2, dtype=torch.float64))


def test_a_state_that_lacks_keys_is_told_and_changes_nothing():
    module = trained()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    old = {key: value + 1 for key, value in module.state_dict().items() if not key.startswith("point_norm")}
    with pytest.raises(RuntimeError, match=r"missing: \['point_norm.weight', .*unexpected: \['more'\]; nothing was"):
        module.load_state_dict(old | {"more": torch.zeros(1)})
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert "point_norm.bias" in module.load_state_dict(old, strict=False).missing_keys
    torch.testing.assert_close(module.scale, before["scale"] + 1)


def test_official_weights_load_under_a_prefix_without_biases_and_not_by_halves():
    with torch.random.fork_rng():
        literal = Literal(8, 2).double()
    x = draw(4, 8, 5, 5, dtype=torch.float64)
    literal.train()(x)
    state = {f"features.3.{key}": value for key, value in literal.eval().state_dict().items()}
    for options in ({}, {"bias": False}, {"bias": False, "bn_momentum": 0.1}):
        module = ULSAM.from_official_state_dict(state, **options).eval()
        torch.testing.assert_close(module(x), literal(x))
    counted = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.testing.assert_close(ULSAM.from_official_state_dict(counted).eval()(x), literal(x))
    del state["features.3.subspaces.1.bn_point.bias"]
    with pytest.raises(ValueError, match=r"2 subspaces, missing: \['features.3.subspaces.1.bn_point.bias'\]"):
        ULSAM.from_official_state_dict(state)
    with pytest.raises(ValueError, match=r"keys of one module, got prefixes \[\]"):
        ULSAM.from_official_state_dict({"weight": x})
    counted["features.3.subspaces.1.conv_dws.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"conv_dws.bias must have one shape in all groups, got \[\(4,\), \(3,\)\]"):
        ULSAM.from_official_state_dict(counted)


def test_facts_tell_uniform_from_pointed_maps_and_equal_groups_from_apart():
    uniform = attention_facts(torch.full((3, 2, 4, 5), 1 / 20))
    assert uniform == pytest.approx((0, 1, 0), abs=1e-6)
    pointed = torch.zeros(3, 2, 4, 5, dtype=torch.float64)
    pointed[:, 0, 1, 1] = pointed[:, 1, 3, 2] = 1
    assert attention_facts(pointed) == pytest.approx((np.log(20), 20, 2))
    assert attention_facts(pointed[:, :1]).group_distance == 0
    three = torch.cat([pointed, pointed[:, :1]], dim=1)
    assert attention_facts(three).group_distance == pytest.approx(4 / 3)
    with pytest.raises(ValueError, match="sum to 1 over their places"):
        attention_facts(pointed * 2)
    with pytest.raises(ValueError, match=r"at least one map, got shape \(0, 2, 4, 5\)"):
        attention_facts(pointed[:0])


def test_maps_are_drawn_over_grey_and_coloured_images(tmp_path):
    maps = trained(4, 2).attention_maps(draw(2, 4, 4, 4, dtype=torch.float64))
    first = plot_attention_maps(draw(2, 16, 16), maps, tmp_path / "a.svg").read_text()
    assert first == plot_attention_maps(draw(2, 16, 16), maps, tmp_path / "b.svg").read_text()
    assert first.count("<image") >= 2 * 3
    assert first != plot_attention_maps(draw(2, 16, 16), maps.flip(1), tmp_path / "e.svg").read_text()
    plot_attention_maps(np.random.default_rng(0).random((2, 8, 8, 3)), maps, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"maps must be \(3, groups, height, width\), got shape \(2, 2, 4, 4\)"):
        plot_attention_maps(draw(3, 8, 8), maps, tmp_path / "d.svg")
    with pytest.raises(ValueError, match=r"images must be \(n, h, w\) or \(n, h, w, 3\), got shape \(2, 8, 8, 4\)"):
        plot_attention_maps(draw(2, 8, 8, 4), maps, tmp_path / "d.svg")
    with pytest.raises(ValueError, match="images must be 1 to 12, got 13"):
        plot_attention_maps(draw(13, 8, 8), np.zeros((13, 2, 4, 4)), tmp_path / "d.svg")
    assert not (tmp_path / "d.svg").exists()


def test_a_single_image_of_one_place_trains_too_and_leaves_the_statistics_alone():
    module, x = trained().train(), draw(1, 12, 1, 1, dtype=torch.float64).requires_grad_()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.warns(UserWarning, match="the output is exactly 2x"):
        out = module(x)
    torch.testing.assert_close(out, 2 * x, rtol=0, atol=0)
    out.sum().backward()
    assert (x.grad == 2).all()
    assert all(p.grad is None or (p.grad == 0).all() for p in module.parameters())
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


def test_a_state_of_another_shape_is_told_and_changes_nothing():
    module = ULSAM(12, 3, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    other = {name: value + 1 for name, value in ULSAM(8, 2).state_dict().items()}
    with pytest.raises(RuntimeError, match=r"shapes of this ULSAM; \(found, expected\): .*'scale': .*; nothing was"):
        module.load_state_dict({**other, "scale_norm.weight": before["scale_norm.weight"] + 1})
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_facts_of_what_are_no_maps_are_refused():
    with pytest.raises(ValueError, match=r"maps must be \(batch, groups, \*map\), got shape \(4,\)"):
        inspect.unwrap(attention_facts)(torch.full((4,), 0.25))


def test_images_without_pixels_are_not_drawn(tmp_path):
    with pytest.raises(ValueError, match=r"images must have at least one pixel, got shape \(2, 0, 8\)"):
        plot_attention_maps(np.zeros((2, 0, 8)), np.full((2, 1, 2, 2), 0.25), tmp_path / "a.svg")
