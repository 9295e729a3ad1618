import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import sph_harm_y

from polyspan.nn import (
    GauntConvolution,
    GauntManyBody,
    GauntTensorProduct,
    SphericalTransform,
    convert_e3nn_layout,
    equivalent_e3nn_product,
    gaunt_coefficients,
    gaunt_path_weights,
    gaunt_tensor_product,
    harmonics_to_e3nn,
    random_rotation,
    real_spherical_harmonics,
)

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


def scipy_real(v, lmax):
    """Real harmonics with the polar axis along z, from scipy's complex ones."""
    theta, phi = np.arccos(v[:, 2]), np.arctan2(v[:, 1], v[:, 0])
    columns = []
    for l in range(lmax + 1):
        for m in range(-l, l + 1):
            Y = sph_harm_y(l, abs(m), theta, phi) * (-1) ** m
            columns.append(Y.real if m == 0 else math.sqrt(2) * (Y.real if m > 0 else Y.imag))
    return np.stack(columns, axis=1)


def test_harmonics_are_those_of_scipy_with_the_axes_renamed():
    v = torch.nn.functional.normalize(draw(60, 3), dim=-1)
    renamed = v.numpy()[:, [2, 0, 1]]
    np.testing.assert_allclose(real_spherical_harmonics(3 * v, 9).numpy(), scipy_real(renamed, 9), atol=1e-13)


def test_other_conventions_are_turned_into_e3nns_and_checked_on_the_way():
    v = torch.nn.functional.normalize(draw(60, 3), dim=-1).numpy()

    def other(v):
        return scipy_real(v, 4)[:, ::-1][
            :, np.concatenate([24 - np.arange(l * l, (l + 1) ** 2)[::-1] for l in range(5)])
        ]

    M = harmonics_to_e3nn(other, 4)
    np.testing.assert_allclose(M @ M.T, np.eye(25), atol=1e-12)
    x = draw(3, 25).numpy()
    ours = real_spherical_harmonics(torch.as_tensor(v), 4).numpy()
    np.testing.assert_allclose((x @ M) @ ours.T, x @ other(v).T, atol=1e-12)
    same = harmonics_to_e3nn(lambda v: real_spherical_harmonics(torch.as_tensor(v), 4).numpy(), 4)
    np.testing.assert_allclose(same, np.eye(25), atol=1e-12)


@pytest.mark.parametrize("weights", ["none", "per_degree", "shared"])
def test_a_convolution_is_the_product_with_the_harmonics_of_the_direction(weights):
    x, v = draw(9, 2, 9), draw(9, 3, seed=1)
    v[0], v[1], v[2] = torch.tensor([0, 2, 0]), torch.tensor([0, -1, 0]), torch.tensor([0, 0, 0])
    found = {}
    for route in (*ROUTES, "rotated"):
        layer = GauntConvolution(full(2, 2), 3, full(4, 2), weights=weights, method=route, layout="channels", dtype=D)
        if layer.weight is not None:
            with torch.no_grad():
                layer.weight.copy_(draw(layer.weight_numel, seed=5))
        found[route] = layer(x, v)
    if weights == "none":
        filters = real_spherical_harmonics(v, 3)[:, None] * math.sqrt(4 * math.pi)
        expected = gaunt_tensor_product(x, filters, 2, 3, 4, normalization="component")
        torch.testing.assert_close(found["dense"], expected)
    for route in ("separable", "fourier", "rotated"):
        torch.testing.assert_close(found[route], found["dense"], atol=1e-11, rtol=1e-11)


def test_a_convolution_turns_with_the_edge_and_its_gradient_is_finite_at_the_pole():
    layer = GauntConvolution(full(2, 2), 2, layout="channels", dtype=D)
    R = torch.as_tensor(random_rotation(rng=np.random.default_rng(3)))
    x, v = draw(5, 2, 9), draw(5, 3, seed=1)
    turn = wigner(R, 4)
    torch.testing.assert_close(layer(x @ turn[:9, :9].T, v @ R.T), layer(x, v) @ turn.T)
    v = torch.tensor([[0.0, 1, 0], [0, 0, 0]], dtype=D).requires_grad_()
    layer(x[:2], v).square().sum().backward()
    assert torch.isfinite(v.grad).all()
    pole = torch.tensor([[0.0, 1, 0]], dtype=D).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: layer(x[:1], v), pole)


@pytest.mark.parametrize("route", ["dense", "separable"])
def test_powers_are_repeated_products_cut_off_at_the_end_only(route):
    layer = GauntManyBody(
        full(2),
        full(3),
        correlation=4,
        weights="none",
        method=route,
        normalization="integral",
        layout="channels",
        dtype=D,
    )
    x = draw(900, 9)
    found, power, degree = layer.powers(x[:, None])[:, :, 0], x, 2
    torch.testing.assert_close(found[0], torch.nn.functional.pad(x, (0, 7)))
    for n in range(1, 4):
        power, degree = gaunt_tensor_product(power, x, degree, 2), degree + 2
        torch.testing.assert_close(found[n], power[:, :16], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(layer(x[:, None])[:, 0], found.sum(dim=0))
    small = x[:2, None].clone().requires_grad_()
    assert torch.autograd.gradcheck(layer, small, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, small, fast_mode=True)


def test_every_kind_of_node_has_weights_of_its_own():
    layer = GauntManyBody(full(1, 3), correlation=3, num_elements=2, layout="channels", dtype=D)
    with torch.no_grad():
        layer.weight.copy_(draw(*layer.weight.shape, seed=2))
    x, kinds = draw(4, 3, 4), torch.tensor([0, 1, 1, 0])
    powers = layer.powers(x)
    for i, kind in enumerate(kinds):
        w = layer.weight[kind][..., [0, 1, 1, 1]]
        torch.testing.assert_close(layer(x, kinds)[i], (w * powers[:, i]).sum(dim=0))
    packed = GauntManyBody(full(1, 3), correlation=3, num_elements=2, dtype=D)
    packed.load_state_dict(layer.state_dict())
    torch.testing.assert_close(
        packed(convert_e3nn_layout(x, full(1, 3), to="e3nn"), kinds),
        convert_e3nn_layout(layer(x, kinds), full(1, 3), to="e3nn"),
    )


@pytest.mark.parametrize("route", ["dense", "separable"])
def test_a_transform_goes_to_the_grid_and_back(route):
    transform = SphericalTransform(3, 8, method=route, dtype=D)
    b, a = np.meshgrid(transform.latitudes, transform.longitudes, indexing="ij")
    v = torch.as_tensor(np.stack([np.sin(b) * np.sin(a), np.cos(b), np.sin(b) * np.cos(a)], axis=-1))
    x = draw(2, 5, 16)
    values = transform(x)
    torch.testing.assert_close(values, torch.einsum("...d,bad->...ba", x, real_spherical_harmonics(v, 3)))
    torch.testing.assert_close(transform.from_grid(values), x)


COMPILED = """
import torch
from polyspan.nn import GauntConvolution, GauntManyBody, GauntTensorProduct
irreps = "2x0e+2x1o+2x2e"
for layer, widths in (
    (GauntTensorProduct(irreps, irreps, weights="per_degree", paths="all"), (18, 18)),
    (GauntTensorProduct(irreps, irreps, method="separable"), (18, 18)),
    (GauntTensorProduct(irreps, irreps, method="fourier", paths="all"), (18, 18)),
    (GauntManyBody(irreps), (18,)),
    (GauntConvolution(irreps, 2), (18, 3)),
):
    generator, found = torch.Generator().manual_seed(0), []
    inputs = [torch.randn(3, n, generator=generator) for n in widths]
    for f in (layer, torch.compile(layer, fullgraph=True, backend="eager")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        z = f(*leaves)
        z.square().sum().backward()
        found.append([z.detach()] + [x.grad for x in leaves])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
print("same")
"""


@pytest.mark.slow
def test_layers_compile_in_one_graph_with_their_gradients():
    # In a process of its own: the type checks of the tests cannot be compiled.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr


def kinds(x, elements):
    return GauntManyBody("4x0e", num_elements=2, dtype=D)(x, elements)


def test_functions_refuse_what_they_cannot_use():
    x = draw(3, 4)
    for call, words in (
        (lambda: gaunt_tensor_product(x, x, 1, 2), "y must end in 9 components for degree 2"),
        (lambda: gaunt_tensor_product(x, x, -1, 1), "lmax1 must be at least 0"),
        (lambda: gaunt_tensor_product(x.int(), x, 1, 1), "x must hold floats"),
        (lambda: gaunt_tensor_product(x, x, 1, 1, method="best"), "method must be one of"),
        (lambda: gaunt_tensor_product(x, x, 1, 1, normalization="best"), "normalization must be one of"),
        (lambda: gaunt_coefficients(1, -1, 0), "l2 must be at least 0"),
        (lambda: gaunt_path_weights("1x0e", "1x0e", paths="odd"), "paths must be one of"),
        (lambda: convert_e3nn_layout(x, "2x1o"), r"x must end in \(6,\)"),
        (lambda: convert_e3nn_layout(x, "2x1o+1x0e"), "one multiplicity"),
        (lambda: real_spherical_harmonics(x, 2), "vectors must end in 3"),
        (lambda: real_spherical_harmonics(x[:, :3], -1), "lmax must be at least 0"),
        (lambda: SphericalTransform(3, 5), "degree must be at least 2 lmax = 6"),
        (lambda: SphericalTransform(-1), "lmax must be at least 0"),
        (lambda: SphericalTransform(1, method="fourier"), "method must be 'auto'"),
        (lambda: SphericalTransform(1, dtype=D)(x[:, :3]), "x must end in 4 components"),
        (lambda: SphericalTransform(1, dtype=D).from_grid(x), r"values must end in \(2, 3\)"),
        (lambda: harmonics_to_e3nn(lambda v: v, 1), "harmonics must return real values of shape"),
        (lambda: harmonics_to_e3nn(lambda v: np.abs(scipy_real(v, 1)), 1), "harmonics must have degree 1"),
        (lambda: harmonics_to_e3nn(lambda v: scipy_real(v, 1)[:, [0, 1, 1, 2]], 1), "dependent columns for degree 1"),
        (lambda: GauntConvolution("1x0e", -1), "lmax_filter must be at least 0"),
        (lambda: GauntConvolution("1x0e", 1, method="best"), "method must be one of"),
        (lambda: GauntConvolution("1x0e", 1, method="rotated", paths="all"), "has the even paths only"),
        (lambda: GauntConvolution("1x0e", 1)(x[:, :1], x), "vectors must end in 3"),
        (lambda: GauntManyBody("1x0e", correlation=0), "correlation must be at least 1"),
        (lambda: GauntManyBody("1x0e", weights="each"), "weights must be one of"),
        (lambda: GauntManyBody("1x0e", num_elements=0), "num_elements must be at least 1"),
        (lambda: GauntManyBody("1x1e"), "pseudo-tensor 1e"),
        (lambda: GauntManyBody("2x0e", "1x0e"), "irreps_out must have the multiplicity of irreps_in, 2"),
        (lambda: GauntManyBody("2x0e", dtype=D)(x), "x must end in 2 components"),
        (lambda: GauntManyBody("4x0e", num_elements=2, dtype=D)(x), "elements must be given"),
        (lambda: kinds(x, torch.tensor([0, 1, 2])), r"elements must lie in \[0, 2\), got 2"),
        (lambda: kinds(x, torch.tensor([0, -1, 1])), r"elements must lie in \[0, 2\), got -1"),
        (lambda: kinds(x, torch.tensor([0.0, 1, 1])), "elements must hold integers, got torch.float32"),
        (lambda: kinds(x, torch.tensor([True, False, True])), "elements must hold integers, got torch.bool"),
        (lambda: kinds(x, torch.tensor([0, 1])), r"elements must broadcast to the batch \(3,\), got shape \(2,\)"),
        (lambda: kinds(x, torch.tensor([[0, 1, 1]])), r"elements must broadcast to the batch \(3,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    steered = GauntConvolution("1x0e", 1, method="rotated", dtype=D)
    for derive in (
        lambda v: steered(x[:, :1], v.clone().requires_grad_()),
        lambda v: torch.func.grad(lambda v: steered(x[:, :1], v).sum())(v),
        lambda v: torch.func.jvp(lambda v: steered(x[:, :1], v), (v,), (torch.ones_like(v),)),
    ):
        with pytest.raises(ValueError, match="vectors must not need derivatives"):
            derive(x[:, :3])
    steered(x[:, :1].clone().requires_grad_(), x[:, :3]).sum().backward()
    with pytest.raises(TypeError, match="x and y must both be tensors, or both arrays, got Tensor and ndarray"):
        gaunt_tensor_product(x, x.numpy(), 1, 1)
    with pytest.raises(ValueError, match="product must have weights='none'"):
        equivalent_e3nn_product(GauntTensorProduct("1x0e", "1x0e", weights="shared"))


def test_harmonics_of_a_direction_do_not_depend_on_the_length_of_the_vector():
    v = draw(6, 3)
    for dtype, sizes in ((D, (1e-300, 1e-160, 1e200)), (torch.float32, (1e-36, 1e-25, 1e25))):
        expected = real_spherical_harmonics(v.to(dtype), 3)
        for size in sizes:
            torch.testing.assert_close(real_spherical_harmonics((v * size).to(dtype), 3), expected)


def test_second_derivatives_are_finite_where_an_edge_has_length_zero():
    v = torch.cat([torch.zeros(1, 3, dtype=D), draw(2, 3)])
    layer = GauntConvolution(full(2, 2), 3, dtype=D)
    x = draw(3, 18)

    def loss(v):
        return layer(x, v).pow(2).sum()

    both = torch.autograd.functional.hessian(loss, v)
    assert torch.isfinite(both).all()
    torch.testing.assert_close(torch.func.hessian(loss)(v), both)
    # Each edge acts for itself, so the others' are what they are without it.
    torch.testing.assert_close(
        both[1:, :, 1:], torch.autograd.functional.hessian(lambda v: layer(x[1:], v).pow(2).sum(), v[1:])
    )
    # Of weights too, as when forces are a part of the loss.
    leaf = v.clone().requires_grad_()
    force = torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0]
    force.pow(2).sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_kinds_of_nodes_may_be_any_integers_and_broadcast(dtype):
    layer = GauntManyBody(full(1, 3), num_elements=3, dtype=D)
    with torch.no_grad():
        layer.weight.copy_(draw(*layer.weight.shape, seed=2))
    x, elements = draw(4, 5, 12), torch.tensor([0, 2, 1, 1, 0])
    expected = torch.stack([layer(frame, elements) for frame in x])
    torch.testing.assert_close(layer(x, elements.to(dtype)), expected)
    torch.testing.assert_close(torch.vmap(layer)(x, elements.expand(4, 5)), expected)
    torch.testing.assert_close(torch.vmap(layer)(x.transpose(0, 1), elements).transpose(0, 1), expected)


def test_features_without_memory_get_shapes():
    irreps, x, v = full(2, 8), torch.empty(700, 72, device="meta"), torch.empty(700, 3, device="meta")
    assert GauntTensorProduct(irreps, irreps, device="meta")(x, x).shape == (700, 200)
    assert GauntManyBody(irreps, device="meta")(x).shape == (700, 72)
    assert GauntConvolution(irreps, 2, device="meta")(x, v).is_meta


@pytest.mark.parametrize("dtype", [">f8", ">f4", np.longdouble])
def test_arrays_of_any_order_of_bytes_strides_and_rights_are_multiplied(dtype):
    x, y = draw(6, 9).numpy().astype(dtype), draw(6, 4, seed=1).numpy().astype(dtype)
    width = np.float32 if dtype == ">f4" else np.float64
    expected = gaunt_tensor_product(x.astype(width), y.astype(width), 2, 1)
    assert expected.dtype == width
    x.flags.writeable = y.flags.writeable = False
    np.testing.assert_array_equal(gaunt_tensor_product(x, y, 2, 1), expected)
    turned = gaunt_tensor_product(x.astype(width)[::-1], np.asfortranarray(y.astype(width)[::-1]), 2, 1)
    np.testing.assert_allclose(turned, expected[::-1], rtol=1e-5 if width == np.float32 else 1e-13, atol=1e-7)


def differentiated(f, x, change):
    """Compare what torch.func makes of a function with autograd, rows with batches, and all with one another."""

    def loss(x):
        return f(x).pow(3).sum()

    leaf = x.clone().requires_grad_()
    slope = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x), slope)
    torch.testing.assert_close(torch.vmap(f)(x), f(x))
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x), slope)
    z, moved = torch.func.jvp(f, (x,), (change,))
    torch.testing.assert_close(z, f(x))
    torch.testing.assert_close(moved, torch.autograd.functional.jvp(f, x, change)[1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, change)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(f(dual)).tangent, moved)
    along = torch.autograd.functional.vhp(loss, x, change)[1]
    torch.testing.assert_close(torch.func.jvp(torch.func.grad(loss), (x,), (change,))[1], along)
    torch.testing.assert_close(torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (change,))[1])(x), along)


@pytest.mark.parametrize("route", ["dense", "separable"])
@pytest.mark.parametrize("layout", ["e3nn", "channels"])
def test_transforms_of_powers_give_what_autograd_and_loops_give(route, layout):
    layer = GauntManyBody(full(2, 3), full(3, 3), method=route, layout=layout, dtype=D)
    shape = (5, 27) if layout == "e3nn" else (5, 3, 9)
    x = draw(*shape)
    differentiated(layer, x, draw(*shape, seed=1))

    def loss(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,)).pow(2).sum()

    torch.testing.assert_close(
        torch.func.grad(loss)(layer.weight.detach()), torch.autograd.grad(loss(layer.weight), layer.weight)[0]
    )


@pytest.mark.parametrize("options", [{"method": route} for route in (*ROUTES, "rotated")] + [{"paths": "all"}], ids=str)
def test_transforms_of_convolutions_give_what_autograd_and_loops_give(options):
    layer = GauntConvolution(full(2, 3), 2, dtype=D, **options)
    x, v = draw(5, 27), draw(5, 3, seed=2)
    messages = torch.vmap(layer)(x, v)
    torch.testing.assert_close(messages, layer(x, v))
    if options.get("method") == "rotated":
        torch.testing.assert_close(
            torch.func.jvp(lambda x: layer(x, v), (x,), (draw(5, 27, seed=1),))[1], layer(draw(5, 27, seed=1), v)
        )
        return
    joint = torch.cat([x, v], dim=1)
    differentiated(lambda j: layer(j[..., :27], j[..., 27:]), joint, draw(5, 30, seed=1))
