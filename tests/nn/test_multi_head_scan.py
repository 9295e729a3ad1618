import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyspan.nn import (
    MHSBlock,
    MHSUNet,
    MultiHeadScan2d,
    ScanRoute,
    SS2DBlock,
    plot_scan_routes,
    scan_routes,
    selective_scan,
)
from polyspan.nn._route_scan import from_routes, route_disagreement, route_indices, to_routes

PATTERNS = ("raster", "snake", "diagonal", "spiral", "hilbert", "morton")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def image(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("pattern", "row", "expected"),
    [
        ("snake", 0, [0, 1, 2, 5, 4, 3, 6, 7, 8]),
        ("snake", 1, [0, 3, 6, 7, 4, 1, 2, 5, 8]),
        ("diagonal", 0, [0, 1, 3, 6, 4, 2, 5, 7, 8]),
        ("spiral", 0, [0, 1, 2, 5, 8, 7, 6, 3, 4]),
        ("spiral", 1, [6, 7, 8, 5, 2, 1, 0, 3, 4]),
        ("raster", 1, [0, 3, 6, 1, 4, 7, 2, 5, 8]),
    ],
)
def test_routes_of_three_by_three_are_the_sources(pattern, row, expected):
    assert scan_routes(3, 3, pattern).order[row].tolist() == expected


def test_routes_of_four_by_four_wind_as_drawn():
    diagonal = scan_routes(4, 4, "diagonal").order
    assert diagonal[0].tolist() == [0, 1, 4, 8, 5, 2, 3, 6, 9, 12, 13, 10, 7, 11, 14, 15]
    np.testing.assert_array_equal(diagonal[1], diagonal[0] // 4 * 4 + 3 - diagonal[0] % 4)
    assert scan_routes(4, 4, "hilbert").order[0].tolist() == [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3]
    assert scan_routes(4, 4, "morton").order[0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@given(h=st.integers(1, 9), w=st.integers(1, 9), pattern=st.sampled_from(PATTERNS))
@settings(max_examples=40, deadline=None)
def test_every_route_visits_every_cell_once_and_its_inverse_puts_them_back(h, w, pattern):
    order, inverse = scan_routes(h, w, pattern)
    assert order.shape == inverse.shape == (2, h * w)
    for there, back in zip(order, inverse, strict=True):
        np.testing.assert_array_equal(np.sort(there), np.arange(h * w))
        np.testing.assert_array_equal(there[back], np.arange(h * w))


@pytest.mark.parametrize(("h", "w"), [(5, 7), (8, 8), (1, 6)])
def test_snakes_and_spirals_go_from_neighbour_to_neighbour_and_hilbert_does_on_powers_of_two(h, w):
    for pattern in ("snake", "spiral", *(["hilbert"] if h == w == 8 else [])):
        for order in scan_routes(h, w, pattern).order:
            i, j = order // w, order % w
            assert set((np.abs(np.diff(i)) + np.abs(np.diff(j))).tolist()) == {1}


def test_a_route_of_ones_own_is_taken_and_checked():
    order = [2, 0, 1, 3]
    assert isinstance(scan_routes(2, 2, order), ScanRoute)
    assert scan_routes(2, 2, lambda h, w: order).inverse.tolist() == [[1, 2, 0, 3]]
    with pytest.raises(ValueError, match=r"route 0 does not visit \[3\]"):
        scan_routes(2, 2, [0, 1, 2, 2])
    with pytest.raises(ValueError, match="h \\* w = 4, got int64 of shape \\(1, 3\\)"):
        scan_routes(2, 2, [0, 1, 2])
    with pytest.raises(ValueError, match="whole numbers"):
        scan_routes(2, 2, [0.0, 1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="pattern must be one of"):
        scan_routes(2, 2, "zigzag")
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        scan_routes(0, 3)
    with pytest.raises(ValueError, match="read-only"):
        scan_routes(2, 2, "snake").order[0, 0] = 1


def test_what_goes_along_the_routes_comes_back_to_its_place():
    routes = [scan_routes(3, 5, pattern) for pattern in ("snake", "diagonal", "spiral")]
    there, back = route_indices(routes, "cpu")
    x = image(3, 15, 2, 4)
    sequences = to_routes(x, there)
    for head, route in enumerate(routes):
        for k in range(4):
            order = route.order[k // 2][:: -1 if k % 2 else 1].copy()
            assert torch.equal(sequences[4 * head + k], x[head, order])
    returned = from_routes(sequences.transpose(0, 1), back)
    assert torch.equal(returned, x.expand(4, -1, -1, -1, -1))
    assert torch.equal(returned.sum(dim=0), 4 * x)


def test_disagreement_of_four_routes_lies_between_two_thirds_and_two():
    rows = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 0], [0, 1, 2, 3]], dtype=torch.float64)
    found = route_disagreement(rows.T)
    torch.testing.assert_close(found, torch.tensor([2, 2 / 3, 0.8607], dtype=torch.float64), rtol=1e-4, atol=0)
    many = route_disagreement(image(4, 5000, dtype=torch.float64))
    assert 2 / 3 - 1e-3 < many.min() < 0.7
    assert 1.8 < many.max() < 2 + 1e-9
    six = route_disagreement(torch.eye(6, dtype=torch.float64)[:, :1])
    torch.testing.assert_close(six, torch.tensor([math.sqrt(6)], dtype=torch.float64), rtol=1e-4, atol=0)


def test_where_all_routes_agree_the_gate_is_shut_and_its_gradient_finite():
    y = torch.ones(4, 3, requires_grad=True)
    out = y.sum(dim=0) * torch.relu(route_disagreement(y) - 0.0)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(3))
    assert torch.equal(y.grad, torch.zeros(4, 3))


def literal_heads(module, x):
    """Every head by itself, every route by itself, through the literal loop."""
    b, h, w, _ = x.shape
    s, parts = module.scan, []
    for i, pattern in enumerate(s.patterns):
        part = (x @ module.to_subspaces.weight.T).chunk(s.num_heads, dim=-1)[i].flatten(1, 2).transpose(1, 2)
        ys = []
        for k in range(4):
            g, order = 4 * i + k, torch.tensor(scan_routes(h, w, pattern).order[k // 2].copy())
            order = order.flip(0) if k % 2 else order
            u = part[..., order]
            low, B, C = (s.input_weight[g] @ u).split([s.dt_rank, s.d_state, s.d_state], dim=1)
            y = selective_scan(
                u, s.step_weight[g] @ low, -s.log_rates[g].exp(), B, C, s.bypass[g], None, s.step_bias[g], True,
                backend="loop",
            )  # fmt: skip
            back = torch.empty_like(y)
            back[..., order] = y
            ys.append(back)
        y = torch.stack(ys)  # (routes, b, d, pixels)
        if s.merge == "attention":
            scores = torch.stack([(part * s.query[i][:, None]).sum(dim=1) for part in y]) / math.sqrt(y.shape[2])
            parts.append(4 * (scores.softmax(dim=0).unsqueeze(2) * y).sum(dim=0))
        else:
            cv = y.std(dim=0) / ((y - y.amin(dim=0)).mean(dim=0) + 1e-5)
            parts.append(y.sum(dim=0) * (1 if s.merge == "sum" else torch.relu(cv - 0.5)))
    y = torch.cat(parts, dim=1).transpose(1, 2).view(b, h, w, -1)
    return module.output(module.norm(y))


@pytest.mark.parametrize("merge", ["cv", "sum", "attention"])
def test_the_stacked_scan_is_each_head_and_route_by_itself(merge):
    module = MultiHeadScan2d(20, d_state=3, merge=merge, generator=seeded(), dtype=torch.float64)
    if merge == "attention":
        torch.nn.init.normal_(module.scan.query, generator=seeded(2))
    x = image(2, 3, 5, 20, dtype=torch.float64)
    torch.testing.assert_close(module(x), literal_heads(module, x))


def test_attention_begins_as_the_sum_of_routes():
    kw = {"num_heads": 2, "d_state": 2, "dtype": torch.float64}
    asked = MultiHeadScan2d(8, merge="attention", generator=seeded(), **kw)
    summed = MultiHeadScan2d(8, merge="sum", generator=seeded(), **kw)
    x = image(1, 4, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(asked(x), summed(x))


def test_channels_first_is_channels_last_turned():
    last = MultiHeadScan2d(8, d_state=2, generator=seeded())
    first = MultiHeadScan2d(8, d_state=2, channels_last=False, generator=seeded())
    x = image(2, 3, 4, 8)
    torch.testing.assert_close(first(x.permute(0, 3, 1, 2)), last(x).permute(0, 3, 1, 2))


def test_every_pixel_reaches_every_other_in_one_layer():
    module = MultiHeadScan2d(4, 2, d_state=2, merge="sum", with_proj=False, generator=seeded(), dtype=torch.float64)
    x = image(1, 5, 4, 4, dtype=torch.float64).requires_grad_()
    for i, j in ((0, 0), (2, 1), (4, 3)):
        (reach,) = torch.autograd.grad(module(x)[0, i, j].square().sum(), x)
        assert (reach.abs().sum(dim=-1) > 0).all()


def test_a_learnt_threshold_starts_where_it_is_told_moves_and_stays_inside():
    module = MultiHeadScan2d(8, d_state=2, threshold=0.9, learn_threshold=True, generator=seeded())
    torch.testing.assert_close(module.scan.current_threshold(), torch.tensor(0.9))
    fixed = MultiHeadScan2d(8, d_state=2, threshold=0.9, generator=seeded())
    x = image(2, 4, 4, 8)
    torch.testing.assert_close(module(x), fixed(x), rtol=1e-4, atol=1e-5)
    module(x).square().sum().backward()
    assert module.scan.threshold_logit.grad.abs() > 0
    with torch.no_grad():
        module.scan.threshold_logit.fill_(50.0)
    assert module.scan.current_threshold() <= 2


def test_a_threshold_below_two_thirds_screens_nothing_and_one_of_1_9_nearly_all():
    y = image(4, 1, 200, 1, 3, dtype=torch.float64)
    shut = {}
    for t in (0.0, 0.5, 1.9):
        scan = MultiHeadScan2d(3, 1, threshold=t, d_state=1).scan
        shut[t] = float((scan.merged(y) == 0).double().mean())
    assert shut[0.0] == shut[0.5] == 0
    assert shut[1.9] > 0.95


def test_steps_and_rates_begin_as_the_source_draws_them():
    scan = MultiHeadScan2d(256, generator=seeded()).scan
    steps = torch.nn.functional.softplus(scan.step_bias)
    assert 0.00099 < steps.min() < 0.0012
    assert 0.085 < steps.max() < 0.1001
    assert abs(float(steps.detach().log().mean()) - math.log(0.01)) < 0.15
    torch.testing.assert_close(scan.log_rates.exp(), torch.arange(1.0, 17).expand(16, 64, 16))
    assert scan.dt_rank == 4
    assert MultiHeadScan2d(96, device="meta").scan.dt_rank == 2


def test_the_same_generator_gives_the_same_weights_and_leaves_the_global_one_alone():
    state = torch.random.get_rng_state()
    a, b = (MHSUNet(1, 1, (1,), (8,), d_state=2, num_heads=2, generator=seeded(3)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_an_inference_run_first_does_no_harm_to_training():
    module = MultiHeadScan2d(8, d_state=2, generator=seeded())
    with torch.inference_mode():
        module(image(1, 3, 3, 8))
    module(image(1, 3, 3, 8)).sum().backward()
    assert torch.isfinite(module.to_subspaces.weight.grad).all()


def test_half_precision_maps_come_back_in_half_precision():
    module = MultiHeadScan2d(8, d_state=2, generator=seeded())
    x = image(1, 4, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = module(x)
    torch.testing.assert_close(rough.float(), module(x), rtol=0.1, atol=0.1)


def test_parameters_are_as_many_as_the_sources():
    norm = 2 * 96
    assert count(MHSBlock(96, device="meta")) == 58_944 + norm
    assert count(MHSBlock(96, num_heads=3, device="meta")) == 58_944 + norm
    assert count(SS2DBlock(96, device="meta")) == 105_216 + norm
    assert count(MHSUNet(device="meta", num_heads=3)) == 17_386_153
    assert count(MHSUNet(device="meta")) == 17_257_129


def test_blocks_are_their_formula():
    block = MHSBlock(8, num_heads=2, d_state=2, generator=seeded(), dtype=torch.float64)
    x = image(2, 3, 4, 8, dtype=torch.float64)
    v, z = (torch.nn.functional.layer_norm(x, (8,)) @ block.input.weight.T).chunk(2, dim=-1)
    v = torch.nn.functional.conv2d(v.permute(0, 3, 1, 2), block.conv.weight, block.conv.bias, padding=1, groups=8)
    mixed = torch.nn.functional.layer_norm(block.mix(torch.nn.functional.silu(v).permute(0, 2, 3, 1)), (8,))
    torch.testing.assert_close(block(x), x + mixed * torch.nn.functional.silu(z))


def test_drop_path_skips_items_while_training_and_keeps_the_mean():
    block = MHSBlock(4, 0.5, num_heads=2, d_state=2, generator=seeded())
    x = image(1, 2, 2, 4).expand(400, -1, -1, -1)
    moved = (block.train()(x) - x).flatten(1)
    whole = (block.eval()(x) - x).flatten(1)
    skipped = moved.abs().amax(dim=1) == 0
    assert 0.4 < skipped.float().mean() < 0.6
    torch.testing.assert_close(moved[~skipped], 2 * whole[~skipped])


def test_drop_path_draws_on_the_device_of_its_generator():
    # No accelerator is asked for: on one torch refuses a generator of the CPU, on "meta" it would leave it unused.
    generator = seeded()
    block = MHSBlock(4, 0.5, num_heads=2, d_state=2, generator=generator)
    block.mix = torch.nn.Identity()
    before = generator.get_state()
    assert block.to("meta").train()(torch.empty(3, 2, 2, 4, device="meta")).is_meta
    torch.rand(3, generator=(other := seeded()).set_state(before))
    assert torch.equal(generator.get_state(), other.get_state())


def test_any_size_of_image_is_padded_by_its_edges_and_cropped():
    net = MHSUNet(1, 2, (1, 1), (8, 8), num_heads=2, d_state=2, generator=seeded()).eval()
    x = image(1, 1, 13, 21)
    wide = torch.nn.functional.pad(x, (0, 3, 0, 3), mode="replicate")
    torch.testing.assert_close(net(x), net(wide)[..., :13, :21])
    assert net(image(1, 1, 1, 1)).isfinite().all()


def test_grey_images_are_repeated_for_a_network_of_colour():
    net = MHSUNet(3, 1, (1,), (8,), num_heads=2, d_state=2, generator=seeded()).eval()
    x = image(2, 1, 8, 8)
    assert torch.equal(net(x), net(x.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="x must have 3 channels, got 2"):
        net(image(1, 2, 8, 8))


def test_the_rival_network_has_the_same_shape_and_more_parameters():
    mine, rival = (MHSUNet(block=block, device="meta") for block in ("mhs", "ss2d"))
    assert count(rival) > 1.5 * count(mine)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiHeadScan2d(10, 4), "num_heads must divide channels=10, got 4; uneven='pad' rounds"),
        (lambda: MultiHeadScan2d(10, 4, with_proj=False, uneven="pad"), "which with_proj=False cannot undo"),
        (lambda: MultiHeadScan2d(8, 9), "num_heads must be between 1 and channels=8, got 9"),
        (lambda: MultiHeadScan2d(8, uneven="drop"), "uneven must be"),
        (lambda: MultiHeadScan2d(8, threshold=2.0), "threshold must be at least 0 and below 2, got 2.0"),
        (lambda: MultiHeadScan2d(8, threshold=-0.1), "threshold must be at least 0"),
        (lambda: MultiHeadScan2d(8, threshold=0, learn_threshold=True), "above 0 to be learnt"),
        (lambda: MultiHeadScan2d(8, merge="sum", learn_threshold=True), "learn_threshold must be False"),
        (lambda: MultiHeadScan2d(8, merge="mean"), "merge must be one of"),
        (lambda: MultiHeadScan2d(8, d_state=0), "d_state must be at least 1"),
        (lambda: MultiHeadScan2d(8, dt_rank=0), "dt_rank must be 'auto' or at least 1"),
        (lambda: MultiHeadScan2d(8, dt_rank="full"), "dt_rank must be 'auto' or at least 1"),
        (lambda: MultiHeadScan2d(8, backend="fpga"), "backend must be one of"),
        (lambda: MultiHeadScan2d(8, patterns=()), "patterns must hold at least one"),
        (lambda: MultiHeadScan2d(8, patterns=("zigzag",)), "pattern must be one of"),
        (lambda: MultiHeadScan2d(8, patterns=(7,)), "patterns must hold names, callables or arrays"),
        (lambda: MultiHeadScan2d(8, patterns=("snake", np.arange(4))), r"as many routes, got \[1, 2\]"),
        (lambda: MultiHeadScan2d(8)(image(1, 2, 2, 7)), "x must have 8 channels, got 7"),
        (lambda: MHSBlock(8, 1.0), "drop_path must be at least 0 and below 1"),
        (lambda: SS2DBlock(8, expand=0), "expand must be at least 1"),
        (lambda: MHSUNet(0), "must be at least 1, got 0"),
        (lambda: MHSUNet(block="cnn"), "block must be 'mhs' or 'ss2d'"),
        (lambda: MHSUNet(depths=(2, 2), dims=(8,)), "must be as long"),
        (lambda: MHSUNet(depths=(2,), dims=(4,)), "dims must begin with at least 8, got 4"),
    ],
)
def test_arguments_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_array_of_cells_serves_its_own_size_only():
    module = MultiHeadScan2d(4, 2, (np.array([0, 2, 1, 3]),), 2, generator=seeded())
    assert module.num_routes == 2
    assert module(image(1, 2, 2, 4)).isfinite().all()
    with pytest.raises(ValueError, match="h \\* w = 6"):
        module(image(1, 2, 3, 4))


def test_an_array_that_is_no_route_is_refused_at_once_and_later_changes_of_one_change_nothing():
    with pytest.raises(ValueError, match=r"route 1 does not visit \[3\]"):
        MultiHeadScan2d(4, 2, (np.array([[0, 1, 2, 3], [0, 1, 2, 2]]),), 2)
    route = np.array([0, 2, 1, 3])
    module, x = MultiHeadScan2d(4, 2, (route,), 2, generator=seeded()), image(1, 2, 2, 4)
    expected = MultiHeadScan2d(4, 2, (route.copy(),), 2, generator=seeded())(x)
    route[:] = [3, 2, 1, 0]
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


COMPILED = """
import numpy as np, torch
from polyspan.nn import MultiHeadScan2d

class Shuffled:
    def __init__(self, seed):
        self.seed = seed
    def __call__(self, h, w):
        return np.random.default_rng(self.seed).permutation(h * w)

def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

def results(call, module, x):
    module.zero_grad()
    y = call(x)
    y.square().sum().backward()
    return [y, *(p.grad.clone() for p in module.parameters())]

def made(*patterns):
    return MultiHeadScan2d(8, 2, patterns, 2, merge="sum", generator=torch.Generator().manual_seed(0))

route = np.array([[0, 2, 4, 1, 3, 5], [5, 4, 3, 2, 1, 0]])
small, large = (1, 2, 3, 8), (2, 4, 5, 8)
for module, shapes in (
    (made(Shuffled(0)), (small, large)), (made(Shuffled(1)), (small,)), (made("snake", route), (small,)),
):
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for x in map(lambda shape: draw(*shape), shapes):
        for mine, plain in zip(results(compiled, module, x), results(module, module, x), strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
    print("equal")
"""


@pytest.mark.slow
def test_routes_of_ones_own_compile_into_one_graph_which_is_not_taken_for_others():
    """In a process of its own, as shapes are not checked there: the checks are no part of a graph."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["equal"] * 3, done.stderr[-3000:]


def test_patterns_have_a_key_for_graphs_that_equal_arrays_and_copies_share_and_others_do_not():
    def keys(*patterns):
        return MultiHeadScan2d(4, 2, patterns, 2).scan.own_key

    there, back = np.arange(4), np.arange(4)[::-1]
    assert keys("snake") is None
    assert keys(there) == keys(there.tolist()) != keys(back)
    assert keys(lambda h, w: there[: h * w]) != keys(lambda h, w: there[: h * w])
    module = MultiHeadScan2d(4, 2, (there, back), 2)
    assert copy.deepcopy(module).scan.own_key == module.scan.own_key
    with pytest.raises(ValueError, match="runs only in the process that compiled it"):
        torch.ops.polyspan.scan_own_route_indices(2, 2, -1, 2, 2, torch.device("cpu"))


def test_uneven_channels_are_padded_where_asked():
    module = MultiHeadScan2d(10, 4, d_state=2, uneven="pad", generator=seeded())
    assert module.to_subspaces.out_features == 12
    y = module(image(1, 3, 3, 10))
    assert y.shape == (1, 3, 3, 10)
    assert y.std() > 0


def test_routes_are_drawn_with_equal_bytes(tmp_path):
    first, second = (plot_scan_routes(5, 7, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert first.count(b"<path") > 12 * 34  # a line a step, for twelve routes of 35 cells
    plot_scan_routes(2, 2, tmp_path / "own.png", ["snake", lambda h, w: [0, 2, 1, 3]])
    with pytest.raises(ValueError, match="path must end in"):
        plot_scan_routes(2, 2, tmp_path / "a.txt")
    with pytest.raises(ValueError, match="at most 4096, got 4225"):
        plot_scan_routes(65, 65, tmp_path / "a.svg")


@pytest.mark.parametrize("kind", [MultiHeadScan2d, MHSBlock])
def test_an_empty_batch_has_an_empty_result_and_no_gradient(kind):
    module = kind(8, generator=seeded())
    x = torch.randn(0, 5, 7, 8, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_routes_are_found_on_the_processor_whatever_device_is_the_default():
    module, x = MultiHeadScan2d(8, generator=seeded()), torch.randn(1, 3, 4, 8, generator=seeded(1))
    expected = module(x)
    fresh = MultiHeadScan2d(8, generator=seeded())
    with torch.device("meta"):
        torch.testing.assert_close(fresh(x), expected, rtol=0, atol=0)


def test_paths_drawn_outside_are_those_drawn_inside():
    x = image(4, 1, 16, 16)
    made = [
        MHSUNet(1, 2, (1, 2), (24, 24), drop_path=0.5, init_std=None, num_heads=2, d_state=2, generator=seeded())
        for _ in range(2)
    ]
    paths = made[0].train().draw_paths(4)
    assert [kept is None for kept in paths] == [True, *[False] * 4, True]
    assert torch.equal(made[0](x, paths), made[1].train()(x))
    other = made[0].draw_paths(4)
    assert not torch.equal(made[0](x, other), made[0](x, paths))
    assert made[0].eval().draw_paths(4) == [None] * 6
    with pytest.raises(ValueError, match=r"kept must have shape \(4,\), one a map, got \(3,\)"):
        made[1](x, made[1].draw_paths(3))
