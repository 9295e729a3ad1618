import copy
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import N
from sympy.physics.wigner import real_gaunt

from polyspan.nn import (
    GauntConvolution,
    GauntManyBody,
    GauntTensorProduct,
    convert_e3nn_layout,
    equivalent_e3nn_product,
    gaunt_coefficients,
    gaunt_tensor_product,
    random_rotation,
    real_spherical_harmonics,
)
from polyspan.nn import _gaunt_blocks as packing
from polyspan.nn import _sphere_product as engine
from polyspan.nn import gaunt_product as whole
from polyspan.nn._gaunt_half import RULES, half_sphere, has_half_sphere

ROUTES = ("dense", "separable", "fourier")
D = torch.float64


def draw(*shape, seed=0, dtype=D):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def full(lmax, mul=1):
    return "+".join(f"{mul}x{l}{'eo'[l % 2]}" for l in range(lmax + 1))


def wigner(R, lmax):
    """D with Y(R v) = D Y(v), from values alone."""
    v = draw(400, 3, seed=9)
    before, after = real_spherical_harmonics(v, lmax), real_spherical_harmonics(v @ R.T, lmax)
    found = torch.linalg.lstsq(before, after).solution.T
    blocks = [found[l * l : (l + 1) ** 2, l * l : (l + 1) ** 2] for l in range(lmax + 1)]
    return torch.block_diag(*blocks)


def literal(x, y, l1, l2, l3, *, bracket=False):
    """Sum over all couplings, block by block."""
    z = np.zeros((len(x), (l3 + 1) ** 2))
    for a in range(l1 + 1):
        for b in range(l2 + 1):
            for c in range(l3 + 1):
                G = gaunt_coefficients(a, b, c, bracket=bracket)
                left, right = x[:, a * a : (a + 1) ** 2], y[:, b * b : (b + 1) ** 2]
                z[:, c * c : (c + 1) ** 2] += np.einsum("na,nb,abc->nc", left, right, G)
    return z


# laws


@settings(max_examples=12, deadline=None)
@given(l1=st.integers(0, 4), l2=st.integers(0, 4), seed=st.integers(0, 1000), route=st.sampled_from(ROUTES))
def test_a_product_is_the_product_of_values_at_every_point(l1, l2, seed, route):
    x, y, v = draw(5, (l1 + 1) ** 2, seed=seed), draw(5, (l2 + 1) ** 2, seed=seed + 1), draw(40, 3, seed=seed + 2)
    z = gaunt_tensor_product(x, y, l1, l2, method=route)
    values = (x @ real_spherical_harmonics(v, l1).T) * (y @ real_spherical_harmonics(v, l2).T)
    torch.testing.assert_close(z @ real_spherical_harmonics(v, l1 + l2).T, values, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bracket", [False, True])
@pytest.mark.parametrize("degrees", [(0, 0, 0), (1, 0, 1), (2, 3, 4), (4, 4, 2), (1, 3, 5)])
@pytest.mark.filterwarnings("ignore:lmax_out")
def test_all_routes_agree_with_the_literal_sum_over_couplings(route, bracket, degrees):
    l1, l2, _ = degrees
    x, y = draw(7, (l1 + 1) ** 2).numpy(), draw(7, (l2 + 1) ** 2, seed=1).numpy()
    found = gaunt_tensor_product(x, y, *degrees, bracket=bracket, method=route)
    np.testing.assert_allclose(found, literal(x, y, *degrees, bracket=bracket), atol=1e-12 * 4 ** max(degrees))


@pytest.mark.parametrize("route", ROUTES)
def test_many_rows_go_in_blocks_and_give_what_few_rows_give(route):
    x, y = draw(1800, 25), draw(1800, 25, seed=1)
    shape = GauntTensorProduct(full(4), full(4), method=route, dtype=D).terms[0].shape
    assert engine.CACHE_FLOATS[route] // engine.n_nodes(shape) < 1800
    found = gaunt_tensor_product(x, y, 4, 4, method=route)
    torch.testing.assert_close(found[1710:1720], gaunt_tensor_product(x[1710:1720], y[1710:1720], 4, 4, method=route))


@given(seed=st.integers(0, 500))
@settings(max_examples=6, deadline=None)
def test_turning_the_inputs_turns_every_output(seed):
    R = torch.as_tensor(random_rotation(rng=np.random.default_rng(seed)))
    for paths, in1, in2 in (("even", full(2, 3), full(3, 3)), ("all", "3x1o+3x1e+3x0e+3x2o", "3x2e+3x1e+3x0o")):
        product = GauntTensorProduct(in1, in2, paths=paths, layout="channels", dtype=D)
        turn = [block_of(irreps, R) for irreps in (product.irreps_in1, product.irreps_in2, product.irreps_out)]
        x, y = draw(4, 3, len(turn[0]), seed=seed), draw(4, 3, len(turn[1]), seed=seed + 1)
        torch.testing.assert_close(
            product(x @ turn[0].T, y @ turn[1].T), product(x, y) @ turn[2].T, atol=1e-10, rtol=1e-10
        )


def block_of(irreps, R):
    degrees = [int(part.split("x")[1][:-1]) for part in irreps.split("+")]
    D_all = wigner(R, max(degrees))
    return torch.block_diag(*[D_all[l * l : (l + 1) ** 2, l * l : (l + 1) ** 2] for l in degrees])


def test_an_inversion_changes_the_sign_that_the_parity_of_each_irrep_says():
    product = GauntTensorProduct("2x0e+2x1o+2x1e", "2x1o+2x2o", paths="all", layout="channels", dtype=D)

    def signs(irreps):
        parts = [part.split("x")[1] for part in irreps.split("+")]
        return torch.tensor([1.0 if p[-1] == "e" else -1.0 for p in parts for _ in range(2 * int(p[:-1]) + 1)], dtype=D)

    x, y = draw(3, 2, 7), draw(3, 2, 8, seed=1)
    flipped = product(x * signs(product.irreps_in1), y * signs(product.irreps_in2))
    torch.testing.assert_close(flipped, product(x, y) * signs(product.irreps_out))


def test_it_commutes_and_associates_while_nothing_is_cut_off():
    x, y, z = draw(6, 4), draw(6, 9, seed=1), draw(6, 4, seed=2)
    xy, yx = gaunt_tensor_product(x, y, 1, 2), gaunt_tensor_product(y, x, 2, 1)
    torch.testing.assert_close(xy, yx)
    left = gaunt_tensor_product(xy, z, 3, 1)
    torch.testing.assert_close(left, gaunt_tensor_product(x, gaunt_tensor_product(y, z, 2, 1), 1, 3))
    cut = gaunt_tensor_product(gaunt_tensor_product(x, y, 1, 2, 2), z, 2, 1)
    # Products that were cut off in the middle have lost what would have come back.
    assert (cut - left[:, :16]).abs().max() > 0.01
    torch.testing.assert_close(
        gaunt_tensor_product(x, y, 1, 2, bracket=True), -gaunt_tensor_product(y, x, 2, 1, bracket=True)
    )


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("paths", ["even", "all"])
def test_first_and_second_derivatives_are_right(route, paths):
    out = "1x1o+1x3o" if paths == "even" else "1x1o+1x2o"
    product = GauntTensorProduct("1x0e+1x2e", "1x1o", out, paths=paths, method=route, dtype=D)
    inputs = (draw(2, 6).requires_grad_(), draw(2, 3, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(product, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(product, inputs, fast_mode=True)


def test_derivatives_are_right_where_one_input_is_shared_by_all_channels():
    for mode in ("uuu", "uvuv"):
        product = GauntTensorProduct("3x0e+3x1o", "1x1o" if mode == "uuu" else "2x1o", channel_mode=mode, dtype=D)
        x, y = draw(2, 12).requires_grad_(), draw(2, 3 if mode == "uuu" else 6, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(product, (x, y), fast_mode=True)
        assert torch.autograd.gradgradcheck(product, (x, y), fast_mode=True)


# oracles


def test_coefficients_are_those_of_sympy_up_to_the_sign_of_condon_and_shortley():
    for l1, l2, l3 in ((0, 0, 0), (1, 1, 2), (2, 1, 1), (2, 2, 2), (1, 2, 3)):
        G = gaunt_coefficients(l1, l2, l3)
        for m1 in range(-l1, l1 + 1):
            for m2 in range(-l2, l2 + 1):
                for m3 in range(-l3, l3 + 1):
                    theirs = float(N(real_gaunt(l1, l2, l3, m1, m2, m3)))
                    assert abs(G[l1 + m1, l2 + m2, l3 + m3]) == pytest.approx(abs(theirs), abs=1e-12)


def with_e3nn():
    return pytest.importorskip("e3nn.o3", reason="the oracle e3nn is in the extra equivariant")


def test_harmonics_and_couplings_are_e3nns():
    o3 = with_e3nn()
    v = draw(30, 3)
    theirs = o3.spherical_harmonics(list(range(8)), v, normalize=True, normalization="integral")
    torch.testing.assert_close(real_spherical_harmonics(v, 7), theirs, atol=1e-13, rtol=0)
    for l1, l2, l3 in ((1, 1, 1), (1, 1, 2), (2, 2, 3), (3, 2, 2), (4, 3, 3), (2, 2, 4)):
        bracket = (l1 + l2 + l3) % 2 == 1
        G, W = gaunt_coefficients(l1, l2, l3, bracket=bracket), o3.wigner_3j(l1, l2, l3, dtype=D).numpy()
        np.testing.assert_allclose(G, np.linalg.norm(G) * W, atol=1e-12)
    assert np.linalg.norm(gaunt_coefficients(1, 1, 1, bracket=True)) == pytest.approx(1.197, abs=5e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("in1", "in2", "out", "paths"),
    [
        (full(1, 4), full(1, 4), None, "even"),
        (full(3, 4), full(3, 4), None, "even"),
        (full(6, 2), full(6, 2), full(6, 2), "even"),
        ("2x3o+2x0e+2x2e", "2x4e+2x1o", "2x1o+2x5o+2x2e", "even"),
        (full(3, 4), full(2, 4), None, "all"),
        ("2x2e+2x0o+2x1e+2x1o", "2x1o+2x3e+2x2o", None, "all"),
        ("1x0e+1x1e+1x2e", "1x1e", "1x2e+1x1e", "all"),
    ],
)
def test_it_equals_its_e3nn_twin_to_1e_12(in1, in2, out, paths):
    with_e3nn()
    for normalization in ("component",) if len(in1) > 12 else ("component", "integral", "norm"):
        products = [
            GauntTensorProduct(in1, in2, out, paths=paths, normalization=normalization, method=route, dtype=D)
            for route in ROUTES
        ]
        before = torch.get_default_dtype()
        twin = equivalent_e3nn_product(products[0])
        assert torch.get_default_dtype() == before
        x, y = draw(9, twin.irreps_in1.dim), draw(9, twin.irreps_in2.dim, seed=1)
        expected = twin(x, y)
        for product in products:
            assert str(twin.irreps_out) == product.irreps_out
            assert (product(x, y) - expected).abs().max() < 1e-12 * expected.abs().max()
            narrow = product.to(torch.float32)(x.float(), y.float())
            assert (narrow - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_it_takes_e3nns_own_irreps_and_the_layout_is_e3nns():
    o3 = with_e3nn()
    irreps = o3.Irreps("3x0e + 3x1o")
    product = GauntTensorProduct(irreps, irreps, dtype=D)
    assert product.irreps_in1 == "3x0e+3x1o"
    assert o3.Irreps(product.irreps_out).dim == 27
    x = draw(5, 12)
    rows = convert_e3nn_layout(x, irreps)
    assert torch.equal(rows[:, 1], torch.cat([x[:, 1:2], x[:, 6:9]], dim=-1))
    assert torch.equal(convert_e3nn_layout(rows, irreps, to="e3nn"), x)
    np.testing.assert_array_equal(convert_e3nn_layout(x.numpy(), irreps), rows.numpy())


def test_worked_values():
    e = torch.eye(4, dtype=D)
    square = gaunt_tensor_product(e[2], e[2], 1, 1)
    expected = torch.zeros(9, dtype=D)
    expected[0], expected[6] = 0.282095, 0.252313
    torch.testing.assert_close(square, expected, atol=1e-6, rtol=0)
    for pair, index in (((1, 3), 4), ((1, 2), 5)):
        z = gaunt_tensor_product(e[pair[0]], e[pair[1]], 1, 1)
        assert float(z[index]) == pytest.approx(0.218510, abs=1e-6)
        assert float(z.abs().sum()) == pytest.approx(0.218510, abs=1e-6)
    x = draw(9)
    torch.testing.assert_close(gaunt_tensor_product(e[0, :1], x, 0, 2), x / math.sqrt(4 * math.pi))
    torch.testing.assert_close(gaunt_tensor_product(e[0, :1], x, 0, 2, normalization="component"), x)


def test_all_paths_hold_the_cross_product_and_even_ones_do_not():
    a, b = draw(300, 3), draw(300, 3, seed=1)
    odd = GauntTensorProduct("1x1o", "1x1o", "1x1e", paths="all", dtype=D)
    assert odd(a, b).norm() > 1
    cosine = torch.nn.functional.cosine_similarity(odd(a, b), torch.linalg.cross(a, b), dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    even = GauntTensorProduct("1x1o", "1x1o", dtype=D)
    assert even.irreps_out == "1x0e+1x2e"
    X = torch.cat([even(a, b), torch.ones(300, 1, dtype=D)], dim=1)
    target = torch.linalg.cross(a, b)
    left = target - X @ torch.linalg.lstsq(X, target).solution
    assert 1 - left.square().sum() / target.square().sum() < 0.05


# weights


def test_weights_multiply_each_degree_of_inputs_and_output():
    plain = GauntTensorProduct(full(1, 2), full(1, 2), layout="channels", dtype=D)
    for kind, mul in (("per_degree", 2), ("shared", 1)):
        product = GauntTensorProduct(full(1, 2), full(1, 2), weights=kind, layout="channels", dtype=D)
        assert product.weight_numel == mul * (2 + 2 + 3)
        with torch.no_grad():
            product.weight.copy_(draw(product.weight_numel, seed=4))
        w1, w2, w3 = (p.view(mul, -1) for p in product.weight.detach().split([mul * 2, mul * 2, mul * 3]))
        x, y = draw(5, 2, 4), draw(5, 2, 4, seed=1)
        scaled = plain(x * w1[:, [0, 1, 1, 1]], y * w2[:, [0, 1, 1, 1]]) * w3[:, [0, 1, 1, 1, 2, 2, 2, 2, 2]]
        torch.testing.assert_close(product(x, y), scaled)


def test_weights_from_outside_may_differ_from_row_to_row():
    product = GauntTensorProduct(full(1, 2), full(1, 2), weights="per_degree", internal_weights=False, dtype=D)
    assert product.weight is None
    x, y, w = draw(3, 8), draw(3, 8, seed=1), draw(3, product.weight_numel, seed=2)
    rows = torch.stack([product(x[i], y[i], w[i]) for i in range(3)])
    torch.testing.assert_close(product(x, y, w), rows)


@pytest.mark.parametrize("paths", ["even", "all"])
@pytest.mark.parametrize("normalization", ["component", "integral", "norm"])
def test_untrained_weights_give_unit_variance(paths, normalization):
    product = GauntTensorProduct(full(3), full(3), weights="shared", paths=paths, normalization=normalization, dtype=D)
    z = product(draw(20_000, 16), draw(20_000, 16, seed=1))
    torch.testing.assert_close(z.var(dim=0), torch.ones(z.shape[1], dtype=D), atol=0.12, rtol=0)


def test_all_pairs_of_channels_are_an_outer_product():
    product = GauntTensorProduct(full(1, 2), full(1, 3), channel_mode="uvuv", layout="channels", dtype=D)
    x, y = draw(4, 2, 4), draw(4, 3, 4, seed=1)
    z = product(x, y)
    assert product.irreps_out.startswith("6x0e")
    for u in range(2):
        for v in range(3):
            alone = gaunt_tensor_product(x[:, u], y[:, v], 1, 1, normalization="component")
            torch.testing.assert_close(z[:, 3 * u + v], alone)


# dtypes


def test_tables_are_made_anew_in_the_dtype_that_the_module_moves_to():
    x, y = draw(3, 9), draw(3, 9, seed=1)
    exact = GauntTensorProduct(full(2), full(2), dtype=D)(x, y)
    moved = GauntTensorProduct(full(2), full(2), dtype=torch.float32).to(torch.float16).to(D)
    torch.testing.assert_close(moved(x, y), exact, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(copy.deepcopy(moved)(x, y), exact, atol=1e-13, rtol=1e-13)
    assert not moved.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    product = GauntTensorProduct(full(2), full(2)).to(dtype)
    x, y = draw(3, 9).to(dtype), draw(3, 9, seed=1).to(dtype)
    wide = GauntTensorProduct(full(2), full(2))(x.float(), y.float())
    assert torch.equal(product(x, y), wide.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(GauntTensorProduct(full(2), full(2))(x.float(), y.float()), wide)


# degenerate cases and bad input


def test_single_rows_no_rows_and_broadcast_batches():
    product = GauntTensorProduct(full(1, 2), full(1, 2), dtype=D)
    x, y = draw(4, 1, 8), draw(3, 8, seed=1)
    z = product(x, y)
    assert z.shape == (4, 3, 18)
    torch.testing.assert_close(z[2, 1], product(x[2, 0], y[1]))
    assert product(x[:0], y).shape == (0, 3, 18)
    for route in ROUTES:
        other = GauntTensorProduct(full(1, 2), full(1, 2), method=route, dtype=D)
        torch.testing.assert_close(other(x, y), z)


def test_nan_stays_in_its_row_and_is_refused_if_asked():
    x, y = draw(3, 8), draw(3, 8, seed=1)
    x[1, 5] = math.nan
    for route in ROUTES:
        z = GauntTensorProduct(full(1, 2), full(1, 2), method=route, dtype=D)(x, y)
        assert torch.isnan(z[1]).any()
        assert torch.isfinite(z[[0, 2]]).all()
    with pytest.raises(ValueError, match="x must be finite, got NaN or infinity"):
        GauntTensorProduct(full(1, 2), full(1, 2), check_finite=True, dtype=D)(x, y)
    with pytest.raises(ValueError, match="x must be finite"):
        GauntManyBody(full(1, 2), check_finite=True, dtype=D)(x)
    with pytest.raises(ValueError, match="x and vectors must be finite"):
        GauntConvolution(full(1, 2), 1, check_finite=True, dtype=D)(x, y[:, :3])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"irreps_in1": "4x0e+2x1o"}, "one multiplicity for all irreps, got 2x1o beside 4x0e"),
        ({"irreps_in1": "4x0e+4x1e"}, r"irreps_in1 must have parity .* got the pseudo-tensor 1e; paths='all'"),
        ({"irreps_out": "4x1e"}, "irreps_out must have parity .* the only one that products of functions"),
        ({"irreps_in1": "4x0e+4x0e"}, "must name an irrep once, got 0e twice"),
        ({"irreps_in1": "4x0f"}, "irreps_in1 must be irreps such as '8x0e"),
        ({"irreps_in1": "0x0e"}, "irreps_in1 must hold at least one irrep"),
        ({"irreps_in2": "2x1o"}, "irreps_in2 must have the multiplicity of irreps_in1, 4, or 1"),
        ({"irreps_out": "2x0e"}, "irreps_out must have multiplicity 4, got 2"),
        ({"paths": "odd"}, "paths must be one of"),
        ({"weights": "all"}, "weights must be one of"),
        ({"method": "fast"}, "method must be one of"),
        ({"channel_mode": "uvw"}, "channel_mode must be one of"),
        ({"normalization": "unit"}, "normalization must be one of"),
        ({"layout": "rows"}, "layout must be one of"),
    ],
)
def test_a_product_that_cannot_be_says_why(options, words):
    with pytest.raises(ValueError, match=words):
        GauntTensorProduct(**{"irreps_in1": "4x0e+4x1o", "irreps_in2": "4x0e+4x1o", **options})


def test_inputs_that_do_not_fit_say_so():
    product = GauntTensorProduct(full(1, 2), full(1, 2))
    x = draw(3, 8, dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"y must end in 8 components, for 2x0e\+2x1o in layout 'e3nn', got shape \(3, 7\)"
    ):
        product(x, x[:, :7])
    with pytest.raises(ValueError, match=r"x must be a float tensor no wider than the module's torch.float32"):
        product(x.double(), x)
    with pytest.raises(RuntimeError):
        product(x, x[:2])
    with pytest.raises(ValueError, match="weight must not be given"):
        product(x, x, x)
    outside = GauntTensorProduct(full(1, 2), full(1, 2), weights="shared", internal_weights=False)
    with pytest.raises(ValueError, match=r"weight must be \(\*batch, 7\), got none"):
        outside(x, x)
    with pytest.raises(ValueError, match=r"weight must be \(\*batch, 7\), got shape \(3, 8\)"):
        outside(x, x, x)


def test_outputs_that_nothing_reaches_are_zero_with_a_warning():
    with pytest.warns(UserWarning, match="irreps_out holds 3o, which no product of 1x0e"):
        product = GauntTensorProduct("1x0e+1x1o", "1x1o", "1x3o+1x1o", dtype=D)
    z = product(draw(2, 4), draw(2, 3))
    assert not z[:, :7].any()
    assert z[:, 7:].any()
    with pytest.warns(UserWarning, match="lmax_out=3 is above lmax1"):
        assert not gaunt_tensor_product(draw(2, 4), draw(2, 4), 1, 1, 3)[:, 9:].any()
    with pytest.warns(UserWarning, match="irreps_out holds 3o, above correlation x 1"):
        GauntManyBody("1x0e+1x1o", "1x3o", correlation=2)


def test_tables_above_the_limit_switch_to_the_separable_route_with_a_warning(monkeypatch):
    monkeypatch.setattr(engine, "MAX_TABLE_BYTES", 10_000)
    with pytest.warns(UserWarning, match="method='dense' would need .* MiB of tables"):
        product = GauntTensorProduct(full(4), full(4), method="dense")
    assert product.methods == ("separable",)
    assert GauntTensorProduct(full(4), full(4)).methods == ("separable",)


def test_the_route_goes_from_dense_to_separable_as_degrees_grow():
    assert GauntTensorProduct(full(3), full(3)).methods == ("dense",)
    assert GauntTensorProduct(full(8), full(8)).methods == ("separable",)


# products of packed features, block by block


@pytest.fixture
def in_blocks(monkeypatch):
    """Make every product that can go block by block do so, with small blocks."""
    monkeypatch.setattr(packing, "BLOCK_FLOATS", 40_000)
    for route in ROUTES:
        monkeypatch.setitem(packing.CACHE_FLOATS, route, 6_000)
    went, real = [], whole.packed_product

    def packed_product(x, y, plan):
        went.append((plan.half, len(x) and -(-len(x) // plan.block(len(x)))))
        return real(x, y, plan)

    monkeypatch.setattr(whole, "packed_product", packed_product)
    return went


# The third has odd or even degrees only in one function each; the fourth has bracket paths only.
WHOLE = (
    (full(3, 5), full(2, 5), None, "even"),
    ("5x3o+5x0e+5x2e", "5x4e+5x1o", "5x1o+5x5o+5x2e", "even"),
    ("5x1o+5x3o", "5x0e+5x2e", "5x1o", "even"),
    ("5x1o", "5x2e", "5x2o", "all"),
)


@pytest.mark.parametrize("route", ["dense", "separable", "fourier"])
@pytest.mark.parametrize("layout", ["e3nn", "channels"])
@pytest.mark.parametrize(("in1", "in2", "out", "paths_of"), WHOLE)
def test_products_in_blocks_and_their_gradients_are_those_without(in_blocks, route, layout, in1, in2, out, paths_of):
    product = GauntTensorProduct(in1, in2, out, paths=paths_of, method=route, layout=layout, dtype=D)
    sizes = [sum(2 * int(part.split("x")[1][:-1]) + 1 for part in irreps.split("+")) for irreps in (in1, in2)]
    # No block divides the number of nodes.
    shapes = [(103, 5 * size) if layout == "e3nn" else (103, 5, size) for size in sizes]
    x, y = (draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes))
    found = product(x, y)
    assert in_blocks[0][0] == (route == "dense" and paths_of == "even")
    assert in_blocks[0][1] > 1
    weight = draw(*found.shape, seed=7)
    once = torch.autograd.grad(found, (x, y), weight, retain_graph=True)
    again = torch.autograd.grad(found, (x, y), weight, create_graph=True)
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(whole, "has_memory", lambda *tensors: False)
        n = len(in_blocks)
        expected = product(x, y)
        gradients = torch.autograd.grad(expected, (x, y), weight)
        assert len(in_blocks) == n
    for mine, theirs in zip((found, *once, *again), (expected, *gradients, *gradients), strict=True):
        assert (mine - theirs).abs().max() < 1e-12 * theirs.abs().max()


def test_half_of_the_sphere_is_taken_for_degrees_for_which_it_is_faster(in_blocks, monkeypatch):
    for lmax, out, method, half in (
        (8, 16, "auto", True),
        (15, 15, "auto", False),
        (8, 8, "separable", False),
        (8, 8, "dense", True),
    ):
        product = GauntTensorProduct(full(lmax, 2), full(lmax, 2), full(out, 2), method=method, dtype=D)
        x, y = draw(9, 2 * (lmax + 1) ** 2), draw(9, 2 * (lmax + 1) ** 2, seed=1)
        found = product(x, y)
        assert in_blocks.pop()[0] == half
        with monkeypatch.context() as plain:
            plain.setattr(whole, "has_memory", lambda *tensors: False)
            expected = product(x, y)
        assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    assert not in_blocks


@pytest.mark.parametrize("degree", [0, 1, 4, 12, 24, 25, 33, 44, 60])
def test_nodes_of_half_a_sphere_integrate_even_polynomials_and_are_fewer_than_latitudes_times_longitudes(degree):
    nodes, weight = half_sphere(degree)
    np.testing.assert_allclose(np.linalg.norm(nodes, axis=1), 1, atol=1e-15)
    assert np.linalg.norm(nodes[:, None] + nodes, axis=-1).min() > 1e-3
    even = degree - degree % 2
    l = np.repeat(np.arange(even + 1), 2 * np.arange(even + 1) + 1)
    found = weight @ real_spherical_harmonics(torch.from_numpy(nodes), even).numpy()[:, l % 2 == 0]
    # Of the harmonics, the constant alone has an integral.
    expected = np.zeros(len(found))
    expected[0] = math.sqrt(4 * math.pi)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert len(nodes) <= (even // 2 + 1) * (even + 1) * (0.5 if degree < 12 else 0.41) + 3


def test_degrees_without_a_rule_are_multiplied_on_the_whole_sphere(in_blocks, monkeypatch):
    assert has_half_sphere(RULES[-1])
    assert not has_half_sphere(RULES[-1] + 1)
    monkeypatch.setattr(whole, "has_half_sphere", lambda degree: degree < 8)
    x, y = draw(9, 18), draw(9, 18, seed=1)
    found = [GauntTensorProduct(full(2, 2), full(2, 2), full(out, 2), dtype=D)(x, y) for out in (3, 4)]
    assert [half for half, _ in in_blocks] == [True, False]
    torch.testing.assert_close(found[1][:, : found[0].shape[1]], found[0], atol=1e-12, rtol=1e-12)


def test_blocks_are_of_few_sizes_and_find_few_nodes_twice():
    for most in (1, 6, 23, 118):
        sizes = {n: packing._block(n, most) for n in range(1, 600)}
        assert all(1 <= size <= min(n, most) for n, size in sizes.items())
        assert len(set(sizes.values())) <= 40
        # Twice as many as the best, where batches are as small as a block, and few beside larger ones.
        assert all(-(-n // size) * size <= 1.25 * n for n, size in sizes.items() if n > 4 * most)
    assert [packing._block(32, most) for most in (6, 23, 118)] == [4, 16, 32]


@pytest.mark.parametrize(("paths", "out"), [("even", "4x1o+4x2e"), ("all", "4x1e+4x2o")])
@pytest.mark.parametrize("route", ROUTES[:2])
def test_gradients_for_many_outputs_at_once_are_those_one_by_one(in_blocks, route, paths, out):
    product = GauntTensorProduct(
        "4x1o+4x2e", "4x1o+4x2e" if paths == "even" else "4x1o", out, paths=paths, method=route, dtype=D
    )
    x, y = draw(5, 32).requires_grad_(), draw(5, 32 if paths == "even" else 12, seed=1).requires_grad_()
    z = product(x, y)
    assert in_blocks
    weights = draw(3, *z.shape, seed=2)
    at_once = torch.autograd.grad(z, (x, y), weights, retain_graph=True, is_grads_batched=True)
    for i, weight in enumerate(weights):
        for many, one in zip(at_once, torch.autograd.grad(z, (x, y), weight, retain_graph=True), strict=True):
            torch.testing.assert_close(many[i], one, atol=1e-12, rtol=1e-12)


def test_a_copy_of_a_product_that_has_multiplied_stands_on_its_own(in_blocks):
    product = GauntTensorProduct(full(2, 4), full(2, 4), dtype=torch.float32)
    x, y = draw(20, 36), draw(20, 36, seed=1)
    found = product(x.float(), y.float())
    other = copy.deepcopy(product).to(D)
    torch.testing.assert_close(other(x, y).float(), found, atol=1e-4, rtol=1e-4)
    assert torch.equal(product(x.float(), y.float()), found)
    with pytest.raises(ValueError, match=r"x must be a float tensor no wider than the module's torch.float32"):
        product(x, y)
    torch.testing.assert_close(product.to(D)(x, y), other(x, y), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("route", ["dense", "separable"])
def test_second_derivatives_in_blocks_are_right(in_blocks, route):
    product = GauntTensorProduct(full(2, 2), full(1, 2), full(2, 2), method=route, dtype=D)
    x, y = draw(3, 18).requires_grad_(), draw(3, 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(product, (x, y), fast_mode=True)
    assert torch.autograd.gradgradcheck(product, (x, y), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: product(x, y.detach()), x, fast_mode=True)
    assert in_blocks


@pytest.mark.parametrize("weights", ["per_degree", "shared"])
@pytest.mark.parametrize("layout", ["e3nn", "channels"])
def test_weights_act_in_blocks_as_they_do_without(in_blocks, monkeypatch, weights, layout):
    outside = GauntTensorProduct(
        full(1, 3), full(2, 3), weights=weights, layout=layout, internal_weights=False, dtype=D
    )
    own = GauntTensorProduct(full(1, 3), full(2, 3), weights=weights, layout=layout, dtype=D)
    shapes = ((7, 2, 12), (7, 2, 27)) if layout == "e3nn" else ((7, 2, 3, 4), (7, 2, 3, 9))
    x, y = (draw(*shape, seed=seed) for seed, shape in enumerate(shapes))
    one, each = draw(outside.weight_numel, seed=3), draw(7, 2, outside.weight_numel, seed=4)
    with torch.no_grad():
        own.weight.copy_(one)
    made = [own(x, y), outside(x, y, one), outside(x, y, each)]
    assert len(in_blocks) == 3
    monkeypatch.setattr(whole, "has_memory", lambda *tensors: False)
    for mine, theirs in zip(made, (own(x, y), outside(x, y, one), outside(x, y, each)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    assert len(in_blocks) == 3


def test_products_in_blocks_equal_e3nns_to_1e_12(in_blocks):
    with_e3nn()
    for lmax in (1, 2, 3, 4, 6):
        product = GauntTensorProduct(full(lmax, 2), full(lmax, 2), full(min(2 * lmax, 6), 2), dtype=D)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = equivalent_e3nn_product(product)
        x, y = draw(40, 2 * (lmax + 1) ** 2), draw(40, 2 * (lmax + 1) ** 2, seed=1)
        expected = twin(x, y)
        assert (product(x, y) - expected).abs().max() < 1e-12 * expected.abs().max()
        narrow = product.to(torch.float32)(x.float(), y.float())
        assert (narrow - expected).abs().max() < 1e-5 * expected.abs().max()
    assert len(in_blocks) == 10


def test_what_a_thread_keeps_serves_inference_training_autocast_and_other_threads(in_blocks):
    product = GauntTensorProduct(full(2, 4), full(2, 4), dtype=torch.float32)
    x, y = draw(50, 36, dtype=torch.float32), draw(50, 36, seed=1, dtype=torch.float32)
    with torch.inference_mode():
        first = product(x, y)
    kept = first.clone()
    leaf = x.clone().requires_grad_()
    product(leaf, y).sum().backward()
    assert torch.isfinite(leaf.grad).all()
    # Results own their memory: later products do not write to them.
    product(y, y)
    assert torch.equal(first, kept)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(product(x, y), kept)
    with ThreadPoolExecutor(4) as pool:
        for made in pool.map(lambda i: product(x * (i + 1), y), range(12)):
            assert made.shape == kept.shape
        found = list(pool.map(lambda _: product(x, y), range(12)))
    assert all(torch.equal(made, kept) for made in found)
    moved = product.to(D)
    torch.testing.assert_close(moved(x.double(), y.double()).float(), kept, atol=1e-5, rtol=1e-5)
    big = draw(2, 3, 36, dtype=torch.float32).to(D).mT.contiguous().mT
    torch.testing.assert_close(moved(big, big)[1, 2], moved(big[1, 2], big[1, 2]))


def test_batches_of_any_size_and_blocks_larger_than_what_is_kept(in_blocks, monkeypatch):
    monkeypatch.setattr(packing, "KEPT_FLOATS", 30_000)
    monkeypatch.setattr(packing, "MOST_TOOLS", 3)
    monkeypatch.setattr(packing, "_kept", packing._Kept())
    product = GauntTensorProduct(full(2, 2), full(2, 2), dtype=D)
    x, y = draw(700, 18), draw(700, 18, seed=1)
    expected = product(x, y)
    for n in (0, 1, 2, 63, 64, 65, 255, 256, 257, 699):
        torch.testing.assert_close(product(x[:n], y[:n]), expected[:n], atol=1e-12, rtol=1e-12)
    x[100, 3] = math.nan
    z = product(x, y)
    assert torch.isnan(z[100]).any()
    assert torch.isfinite(z[:100]).all()
    assert torch.isfinite(z[101:]).all()
    assert len(in_blocks) == 12


def test_single_channels_and_what_broadcasts_do_not_go_in_blocks():
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "packed_product", lambda *args: calls.append(args))
        product = GauntTensorProduct(full(2, 2), full(2, 2), dtype=D)
        product(draw(9000, 18), draw(18))
        GauntTensorProduct(full(2, 2), full(2, 1), dtype=D)(draw(9000, 18), draw(9000, 9))
        GauntTensorProduct(full(2, 1), full(2, 1), dtype=D)(draw(9000, 9), draw(9000, 9))
        GauntTensorProduct(full(2, 2), full(2, 2), paths="all", dtype=D)(draw(9000, 18), draw(9000, 18))
        assert not calls


IRREPS = "16x0e+16x1o+16x2e"


def drawn(n, width=144, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_default_device_of_the_moment_changes_no_memory_that_is_kept():
    x, y = drawn(37), drawn(37, seed=1)
    expected = GauntTensorProduct(IRREPS, IRREPS, IRREPS, dtype=torch.float64)(x, y).clone()
    for first in (11, 37):
        made = GauntTensorProduct(IRREPS, IRREPS, IRREPS, dtype=torch.float64)
        packing._places.cache_clear()
        packing._kept.tools.clear()
        packing._kept.memory.clear()
        with torch.device("meta"):
            torch.testing.assert_close(made(x[:first], y[:first]), expected[:first], rtol=0, atol=1e-12)
        for n in (37, 11):
            torch.testing.assert_close(made(x[:n], y[:n]), expected[:n], rtol=0, atol=1e-12)


def test_tables_made_in_a_mode_serve_outside_of_it():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        gaunt_tensor_product(torch.randn(5, 36), torch.randn(5, 36), 5, 5)
    with torch.inference_mode():
        gaunt_tensor_product(drawn(5, 36), drawn(5, 36, 1), 5, 5)
    x = drawn(5, 36).requires_grad_()
    gaunt_tensor_product(x, drawn(5, 36, 1), 5, 5).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("route", ["auto", *ROUTES])
@pytest.mark.parametrize("paths", ["even", "all"])
def test_transforms_of_functions_give_what_autograd_and_loops_give(route, paths):
    product = GauntTensorProduct(full(2, 8), full(1, 8), paths=paths, method=route, weights="per_degree", dtype=D)
    x, y, change = draw(4, 16, 72), draw(16, 32, seed=1), draw(16, 72, seed=2)
    weight = {"weight": product.weight.detach() * 1.5}

    def loss(x, weight):
        return torch.func.functional_call(product, weight, (x, y)).pow(3).sum()

    def by_autograd(x):
        x, w = x.clone().requires_grad_(), {"weight": weight["weight"].clone().requires_grad_()}
        return torch.autograd.grad(loss(x, w), (x, w["weight"]))

    loop = [by_autograd(row) for row in x]
    torch.testing.assert_close(torch.func.grad(loss)(x[0], weight), loop[0][0])
    torch.testing.assert_close(torch.func.grad(loss, 1)(x[0], weight)["weight"], loop[0][1])
    by_row = torch.vmap(torch.func.grad(loss, (0, 1)), in_dims=(0, None))(x, weight)
    torch.testing.assert_close(by_row[0], torch.stack([row for row, _ in loop]))
    torch.testing.assert_close(by_row[1]["weight"], torch.stack([w for _, w in loop]))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.vmap(product, in_dims=(0, None))(x, y), torch.stack([product(r, y) for r in x])
        )
    z, moved = torch.func.jvp(lambda x: product(x, y), (x[0],), (change,))
    torch.testing.assert_close(z, product(x[0], y))
    # A product is linear in each factor.
    torch.testing.assert_close(moved, product(change, y))
    along = torch.func.jvp(lambda x: torch.func.grad(loss)(x, weight), (x[0],), (change,))[1]
    torch.testing.assert_close(along, torch.autograd.functional.vhp(lambda x: loss(x, weight), x[0], change)[1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], change)
        tangent = torch.autograd.forward_ad.unpack_dual(product(dual, y)).tangent
    torch.testing.assert_close(tangent, moved)
