import math

import numpy as np
import pytest
import torch
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from polyspan.nn import gaunt_plots, gaunt_tensor_product, real_spherical_harmonics
from polyspan.nn.gaunt_plots import plot_gaunt_product

RNG = np.random.default_rng(0)
F, G = RNG.normal(size=9), RNG.normal(size=16)


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figure that is written."""
    figures = []

    def write_picture(figure, path):
        figure.canvas.draw()
        figures.append(figure)
        return path

    monkeypatch.setattr(gaunt_plots, "write_picture", write_picture)
    return figures


def surface(panel):
    """Corners (n, 4, 3) in e3nn's axes, and colours (n, 4), of the patches of a panel."""
    (patches,) = [part for part in panel.collections if isinstance(part, Poly3DCollection)]
    corners = np.asarray(patches._faces if hasattr(patches, "_faces") else patches._vec)
    # What matplotlib tells of colours in public is sorted by depth.
    return corners[..., [1, 2, 0]], patches._facecolor3d


def matrix(figure):
    panel = figure.axes[3]
    words = {tuple(int(c) for c in text.get_position())[::-1]: text.get_text() for text in panel.texts}
    return np.asarray(panel.images[0].get_array()), words


def norms(x, y, lmax_out, **options):
    """Norm over the sphere of the product of every two degrees, from their parts one by one."""
    found = np.zeros((math.isqrt(len(x)), math.isqrt(len(y))))
    for l1, l2 in np.ndindex(found.shape):
        f, g = np.zeros_like(x), np.zeros_like(y)
        f[l1**2 : (l1 + 1) ** 2], g[l2**2 : (l2 + 1) ** 2] = x[l1**2 : (l1 + 1) ** 2], y[l2**2 : (l2 + 1) ** 2]
        z = gaunt_tensor_product(f, g, len(found) - 1, found.shape[1] - 1, lmax_out, **options)
        found[l1, l2] = np.linalg.norm(z)
    return found


def test_surfaces_are_as_far_from_the_centre_as_the_functions_are_large(drawn, tmp_path):
    plot_gaunt_product(F, G, tmp_path / "a.svg")
    product = gaunt_tensor_product(F, G, 2, 3)
    for panel, coefficients in zip(drawn[0].axes, (F, G, product), strict=False):
        corners, _ = surface(panel)
        points = torch.as_tensor(corners.reshape(-1, 3))
        radius = points.norm(dim=1).numpy()
        values = real_spherical_harmonics(points, math.isqrt(len(coefficients)) - 1).numpy() @ coefficients
        # Directions close to the centre are lost in rounding.
        clear = radius > 1e-6
        most = float(panel.get_title().rsplit(" ", 1)[1])
        np.testing.assert_allclose(radius[clear] * most, np.abs(values[clear]), rtol=6e-3, atol=1e-6)
        assert radius.max() == pytest.approx(1)
    assert [panel.get_title().split(",")[0] for panel in drawn[0].axes[:3]] == ["f", "g", "f g"]


def test_positive_patches_are_red_and_negative_ones_blue(drawn, tmp_path):
    # One lobe up (the polar axis y) and one down, with opposite signs.
    plot_gaunt_product([0, 0, 1, 0], [1.0], tmp_path / "a.svg")
    for panel, sign in zip(drawn[0].axes, (1, 0, 1), strict=False):
        corners, colours = surface(panel)
        height, red = corners[..., 1].mean(axis=1), colours[:, 0] - colours[:, 2]
        if sign:
            assert (red[height > 0.1] > 0).all()
            assert (red[height < -0.1] < 0).all()
        else:
            assert (red > 0).all()
            assert panel.get_title() == "g, at most 0.282"


@pytest.mark.parametrize("bracket", [False, True])
def test_the_matrix_holds_norms_and_the_degrees_that_paths_lead_to(drawn, tmp_path, bracket):
    plot_gaunt_product(F, torch.as_tensor(G), tmp_path / "a.svg", bracket=bracket)
    values, words = matrix(drawn[0])
    np.testing.assert_allclose(values, norms(F, G, 5, bracket=bracket), atol=1e-12)
    assert set(words) == set(np.ndindex(3, 4))
    for (l1, l2), text in words.items():
        reached = [
            l3
            for l3 in range(6)
            if np.abs(gaunt_plots.gaunt_tensor_product(*units(l1, l2), l1, l2, bracket=bracket)[..., part(l3)]).max(
                initial=0
            )
            > 1e-9
        ]
        assert [int(l3) for l3 in text.split()] == reached
    assert drawn[0].axes[2].get_title().startswith("{f, g}, " if bracket else "f g, ")


def units(l1, l2):
    """All pairs of single coefficients of two degrees."""
    return np.eye((l1 + 1) ** 2)[l1**2 :, None], np.eye((l2 + 1) ** 2)[l2**2 :]


def part(l3):
    return slice(l3**2, (l3 + 1) ** 2)


def test_a_product_that_is_cut_off_says_so_and_shows_what_is_left(drawn, tmp_path):
    plot_gaunt_product(F, G, tmp_path / "a.svg", lmax_out=2)
    values, words = matrix(drawn[0])
    np.testing.assert_allclose(values, norms(F, G, 2), atol=1e-12)
    assert words[1, 2] == "1"
    assert words[2, 3] == "1"
    assert drawn[0].axes[2].get_title().startswith("f g to degree 2, ")


def test_the_normalization_of_coefficients_changes_nothing_but_what_they_mean(drawn, tmp_path):
    scales = {name: gaunt_plots._scales(3, name) for name in ("integral", "component", "norm")}
    for name, scale in scales.items():
        plot_gaunt_product(F / scale[:9], G / scale, tmp_path / "a.svg", normalization=name)
    first = drawn[0]
    for other in drawn[1:]:
        np.testing.assert_allclose(matrix(other)[0], matrix(first)[0], atol=1e-12)
        for i in range(3):
            np.testing.assert_allclose(surface(other.axes[i])[0], surface(first.axes[i])[0], atol=1e-9)


def test_zero_and_high_degrees_can_be_drawn(drawn, tmp_path):
    plot_gaunt_product(np.zeros(4), G, tmp_path / "a.png")
    assert not matrix(drawn[0])[0].any()
    assert [panel.get_title().split()[-1] for panel in drawn[0].axes[:3:2]] == ["0", "0"]
    plot_gaunt_product(RNG.normal(size=36), [1.0], tmp_path / "a.png")
    assert not matrix(drawn[1])[1]


def test_equal_input_is_written_with_equal_bytes(tmp_path):
    first, second = (plot_gaunt_product(F[:4], G[:4], tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert first != plot_gaunt_product(F[:4], G[:4], tmp_path / "c.svg", bracket=True).read_bytes()
    # One patch for each cell of three grids of directions.
    assert first.count(b"<path") > 2 * 28 * 56 + 32 * 64
    assert plot_gaunt_product(F[:4], G[:4], tmp_path / "d.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("x", "y", "path", "words"),
    [
        (F, G, "a.txt", "path must end in"),
        (F[:8], G, "a.svg", r"x must be \(\(lmax \+ 1\)²,\) with lmax from 0 to 8, got shape \(8,\)"),
        (F, G[None], "a.svg", r"y must be .* got shape \(1, 16\)"),
        (np.zeros(100), G, "a.svg", r"x must be .* got shape \(100,\)"),
        (F[:0], G, "a.svg", r"x must be .* got shape \(0,\)"),
        (F, np.full(4, np.nan), "a.svg", "y must be finite, got NaN or infinity"),
    ],
)
def test_what_cannot_be_drawn_says_why(tmp_path, x, y, path, words):
    with pytest.raises(ValueError, match=words):
        plot_gaunt_product(x, y, tmp_path / path)
    with pytest.raises(ValueError, match="normalization must be one of"):
        plot_gaunt_product(F, G, tmp_path / "a.svg", normalization="unit")
    assert not list(tmp_path.iterdir())
