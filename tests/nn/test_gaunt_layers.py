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
    ):
        with pytest.raises(ValueError, match=words):
            call()
    steered = GauntConvolution("1x0e", 1, method="rotated", dtype=D)
    with pytest.raises(ValueError, match="vectors must not need gradients"):
        steered(x[:, :1], x[:, :3].requires_grad_())
    with pytest.raises(ValueError, match="product must have weights='none'"):
        equivalent_e3nn_product(GauntTensorProduct("1x0e", "1x0e", weights="shared"))
