"""Picture of a Gaunt product: two functions on the sphere, their product, and the paths between their degrees."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polyspan.io import picture_path, write_picture

from ._gaunt_paths import harmonic_scale
from .gaunt_product import gaunt_tensor_product
from .spherical_transform import real_spherical_harmonics

MOST_DEGREE = 8
MOST_LABELLED = 4


def plot_gaunt_product(
    x: Any,
    y: Any,
    path: Path | str,
    *,
    lmax_out: int | None = None,
    bracket: bool = False,
    normalization: str = "integral",
) -> Path:
    r"""Draw two functions on the sphere and their product as surfaces, and how much each pair of degrees gives to it.

    The distance of a surface from the centre is the size of the function in that direction, red where it is positive
    and blue where it is negative; every surface has a scale of its own. The polar axis of e3nn's frame, y, points up.
    The matrix shows the norm of :math:`f_{l_1} g_{l_2}` over the sphere, and, up to degree 4, the degrees
    :math:`l_3` that the paths from :math:`l_1` and :math:`l_2` lead to: every second one between their difference and
    their sum, since a product of functions has no others. Source: catalogue entry ``gaunt``.

    Parameters
    ----------
    x, y : array or tensor of shape ((lmax + 1)²,)
        Coefficients of f and g, of degree at most 8 each, so that they can be seen.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    lmax_out, bracket, normalization
        As for :func:`gaunt_tensor_product`; the bracket {f, g} has the paths that the product has not.

    Raises
    ------
    ValueError
        The suffix is another, coefficients are not those of a degree up to 8, or some are not finite.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    (f, lmax1), (g, lmax2) = _coefficients(x, "x"), _coefficients(y, "y")
    degree = lmax1 + lmax2 if lmax_out is None else lmax_out
    product = gaunt_tensor_product(f, g, lmax1, lmax2, degree, bracket=bracket, normalization=normalization)
    shares = gaunt_tensor_product(
        _by_degree(f)[:, None], _by_degree(g), lmax1, lmax2, degree, bracket=bracket, normalization=normalization
    )
    norms = np.linalg.norm(shares * _scales(degree, normalization), axis=-1)
    name = "{f, g}" if bracket else "f g"
    if degree < lmax1 + lmax2:
        name += f" to degree {degree}"
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(13, 4), layout="constrained")
        for i, (title, values) in enumerate((("f", f), ("g", g), (name, product))):
            _draw_surface(figure.add_subplot(1, 4, i + 1, projection="3d"), values, normalization, title)
        panel = figure.add_subplot(1, 4, 4)
        image = panel.imshow(norms, vmin=0, vmax=float(norms.max()) or 1.0, cmap="viridis", interpolation="nearest")
        panel.set(title="Norm of the product, by degrees", xlabel="degree of g", ylabel="degree of f")
        panel.set(xticks=range(lmax2 + 1), yticks=range(lmax1 + 1))
        if max(lmax1, lmax2) <= MOST_LABELLED:
            for l1, l2 in np.ndindex(norms.shape):
                words = " ".join(map(str, _reached(l1, l2, degree, bracket)))
                colour = "black" if norms[l1, l2] > 0.6 * norms.max() else "white"
                panel.text(l2, l1, words, ha="center", va="center", color=colour, fontsize=7)
        figure.colorbar(image, ax=panel, shrink=0.8)
        write_picture(figure, path)
    return path


def _coefficients(x: Any, name: str) -> tuple[NDArray[np.float64], int]:
    """Return coefficients and their degree."""
    values = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)
    lmax = math.isqrt(values.size) - 1
    if values.ndim != 1 or not 0 <= lmax <= MOST_DEGREE or (lmax + 1) ** 2 != values.size:
        raise ValueError(f"{name} must be ((lmax + 1)²,) with lmax from 0 to {MOST_DEGREE}, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return values, lmax


def _by_degree(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return one row for each degree, with the coefficients of that degree alone."""
    degree = np.sqrt(np.arange(len(x))).astype(int)
    return np.where(degree == np.arange(degree[-1] + 1)[:, None], x, 0.0)


def _scales(lmax: int, normalization: str) -> NDArray[np.float64]:
    """Return the size of every harmonic beside the orthonormal one."""
    return np.array([harmonic_scale(l, normalization) for l in range(lmax + 1) for _ in range(2 * l + 1)])


def _reached(l1: int, l2: int, lmax_out: int, bracket: bool) -> range:
    """Return the degrees to which the paths of two degrees lead."""
    return range(abs(l1 - l2) + bracket, min(l1 + l2 - bracket, lmax_out) + 1, 2)


def _draw_surface(panel: Any, coefficients: NDArray[np.float64], normalization: str, title: str) -> None:
    """Draw the function on a grid of directions that is finer for higher degrees."""
    from matplotlib import colormaps

    lmax = math.isqrt(len(coefficients)) - 1
    n = 24 + 4 * lmax
    b, a = np.meshgrid(np.linspace(0, np.pi, n + 1), np.linspace(0, 2 * np.pi, 2 * n + 1), indexing="ij")
    directions = np.stack([np.sin(b) * np.sin(a), np.cos(b), np.sin(b) * np.cos(a)], axis=-1)
    harmonics = real_spherical_harmonics(torch.as_tensor(directions), lmax).numpy()
    values = harmonics @ (_scales(lmax, normalization) * coefficients)
    most = float(np.abs(values).max())
    share = values / (most or 1.0)
    x, y, z = np.moveaxis(np.abs(share)[..., None] * directions, -1, 0)
    # A patch has the sign and size of its middle, so that none straddles a change of sign in the colour of one side.
    middle = (share[1:, 1:] + share[1:, :-1] + share[:-1, 1:] + share[:-1, :-1]) / 4
    colours = colormaps["RdBu_r"](0.5 + 0.5 * middle)
    panel.plot_surface(z, x, y, facecolors=colours, rstride=1, cstride=1, shade=False, linewidth=0)
    panel.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1), title=f"{title}, at most {most:.3g}")
    panel.set_box_aspect((1, 1, 1), zoom=1.6)
    panel.set_axis_off()
