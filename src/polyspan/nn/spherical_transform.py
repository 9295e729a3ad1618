"""Spherical harmonics of directions, and the transform between coefficients and values on a grid."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ._lengths import safe_length
from ._sphere import harmonics_at, sphere_grid
from ._sphere_product import TableModule, choose_method
from ._sphere_routes import Axis, build, from_grid, to_grid


def real_spherical_harmonics(vectors: Float[Tensor, "*batch xyz"], lmax: int) -> Float[Tensor, "*batch components"]:
    r"""Return the orthonormal real harmonics of the directions of vectors, in e3nn's frame and order.

    Polynomials in x, y and z, so that gradients are finite everywhere, at the poles too, and every degree is possible
    (e3nn ends at 11). The zero vector has no direction: its degrees above 0 are zero, and so is their gradient for
    degrees above 1. Multiply by :math:`\sqrt{4\pi}` for "component" normalization.
    Source: catalogue entry ``gaunt``.

    Parameters
    ----------
    vectors : tensor of shape (\*batch, 3)
        Of any length.
    lmax : int

    Returns
    -------
    tensor of shape (\*batch, (lmax + 1)²)

    Raises
    ------
    ValueError
        The degree is negative, or vectors do not have three components.
    """
    if lmax < 0:
        raise ValueError(f"lmax must be at least 0, got {lmax}")
    if vectors.shape[-1:] != (3,):
        raise ValueError(f"vectors must end in 3 components, got shape {tuple(vectors.shape)}")
    dtype = vectors.dtype
    v = vectors.to(torch.promote_types(dtype, torch.float32))
    # Divided by the largest entry, a constant that cancels, so that no square leaves the range of floats.
    size = v.detach().abs().amax(dim=-1, keepdim=True)
    v = v / torch.where(size < torch.finfo(v.dtype).tiny, 1.0, size)
    length = safe_length(v)
    x, y, z = (v / torch.where(length > 0, length, 1.0)).unbind(-1)
    # Kept homogeneous in the vector, so that the zero vector gives zeros.
    square = x * x + y * y + z * z
    out: list[Any] = [None] * (lmax + 1) ** 2
    cos_part, sin_part, start = torch.ones_like(y), torch.zeros_like(y), math.sqrt(1 / (4 * math.pi))
    for m in range(lmax + 1):
        if m:
            cos_part, sin_part = cos_part * z - sin_part * x, sin_part * z + cos_part * x
            start *= math.sqrt((2 * m + 1) / (2 * m))
        before, now = torch.zeros_like(y), torch.full_like(y, start)
        for l in range(m, lmax + 1):
            out[l * l + l + m] = now * cos_part if m == 0 else math.sqrt(2) * now * cos_part
            if m:
                out[l * l + l - m] = math.sqrt(2) * now * sin_part
            A = math.sqrt((4 * (l + 1) ** 2 - 1) / ((l + 1) ** 2 - m * m))
            B = math.sqrt((l * l - m * m) / (4 * l * l - 1)) if l > m else 0.0
            before, now = now, A * (y * now - B * square * before)
    return torch.stack(out, dim=-1).to(dtype)


class SphericalTransform(TableModule):
    r"""Evaluate functions on the sphere on a grid, and find their coefficients again, exactly.

    The grid has Gauss-Legendre latitudes and equispaced longitudes; the nodes of angles b (from the y axis) and a (from
    z towards x) lie at (sin b sin a, cos b, sin b cos a). :meth:`from_grid` integrates against the harmonics: exact
    while the degree of the values plus ``lmax`` is at most ``degree``, and wrong, by aliasing, beyond it.
    Source: catalogue entry ``gaunt``.

    Parameters
    ----------
    lmax : int
        Degree of the coefficients (\*batch, (lmax + 1)²), those of the orthonormal harmonics.
    degree : int, optional
        Degree that the grid integrates exactly; 2 lmax where not given. For a product of two functions that is cut off
        at ``lmax``, take 3 lmax.
    method : {"auto", "dense", "separable"}, default="auto"

    Attributes
    ----------
    num_latitudes, num_longitudes : int
    latitudes, longitudes : ndarray of shape (num_latitudes,) and (num_longitudes,)
        The angles b and a of the nodes, radians.

    Raises
    ------
    ValueError
        The degree of the grid is too small to tell ``lmax`` apart, or the method is another.
    """

    def __init__(
        self, lmax: int, degree: int | None = None, *, method: str = "auto", device: Any = None, dtype: Any = None
    ):
        super().__init__()
        if lmax < 0:
            raise ValueError(f"lmax must be at least 0, got {lmax}")
        self.lmax, self.degree = lmax, 2 * lmax if degree is None else degree
        if self.degree < 2 * lmax:
            raise ValueError(f"degree must be at least 2 lmax = {2 * lmax}, got {degree}")
        if method not in ("auto", "dense", "separable"):
            raise ValueError(f"method must be 'auto', 'dense' or 'separable', got {method!r}")
        axis = Axis(tuple(range(lmax + 1)), (1.0,) * (lmax + 1))
        taken = choose_method(method, (axis, axis, axis), ("gaunt",), dtype)
        self._shape, exact = build(taken, "gaunt", (axis, axis, axis), self.degree, shares=(0.0, 0.0, 1.0))
        self.keep_tables(exact[: self._shape.n_tables] + exact[2 * self._shape.n_tables :], device, dtype)
        grid = sphere_grid(self.degree)
        self.latitudes, self.longitudes = grid.b.copy(), grid.a.copy()
        self.num_latitudes, self.num_longitudes = len(grid.b), len(grid.a)

    def to_grid(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch latitudes longitudes"]:
        r"""Return values (\*batch, num_latitudes, num_longitudes) of coefficients.

        Raises
        ------
        ValueError
            The width is not (lmax + 1)².
        """
        size = (self.lmax + 1) ** 2
        if x.shape[-1:] != (size,):
            raise ValueError(f"x must end in {size} components for lmax={self.lmax}, got shape {tuple(x.shape)}")
        rows = self.cast_input(x, "x").reshape(-1, size)
        values = to_grid(rows, self._shape, 0, self.tables[: self._shape.n_tables])
        if self._shape.method == "separable":
            values = values.view(self.num_longitudes, self.num_latitudes, len(rows)).permute(2, 1, 0)
        return values.reshape(*x.shape[:-1], self.num_latitudes, self.num_longitudes).to(x.dtype)

    def from_grid(self, values: Float[Tensor, "*batch latitudes longitudes"]) -> Float[Tensor, "*batch D"]:
        r"""Return the coefficients (\*batch, (lmax + 1)²) of values on the grid.

        Raises
        ------
        ValueError
            The values do not have the shape of the grid.
        """
        shape = (self.num_latitudes, self.num_longitudes)
        if tuple(values.shape[-2:]) != shape:
            raise ValueError(f"values must end in {shape}, got shape {tuple(values.shape)}")
        flat = self.cast_input(values, "values").reshape(-1, *shape)
        if self._shape.method == "separable":
            flat = flat.permute(2, 1, 0).reshape(shape[1], -1)
        else:
            flat = flat.reshape(len(flat), -1)
        found = from_grid(flat, self._shape, 2, self.tables[self._shape.n_tables :])
        return found.reshape(*values.shape[:-2], (self.lmax + 1) ** 2).to(values.dtype)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch latitudes longitudes"]:
        """Return values on the grid; see :meth:`to_grid`."""
        return self.to_grid(x)


def harmonics_to_e3nn(harmonics: Callable[[np.ndarray], np.ndarray], lmax: int) -> np.ndarray:
    """Return the matrix M that turns coefficients of other harmonics into those of e3nn's frame: ``x @ M``.

    Give the function that evaluates your harmonics; polar axis, order of m, signs and lengths are found from it, by
    integration. Where yours are those of e3nn already, M is the identity, which makes this a check as well.

    Parameters
    ----------
    harmonics : callable
        Unit vectors (n, 3) to values (n, (lmax + 1)²), with degree l in the columns l² .. (l + 1)² - 1.
    lmax : int

    Returns
    -------
    ndarray of shape ((lmax + 1)², (lmax + 1)²)
        Block-diagonal; orthogonal where yours are orthonormal.

    Raises
    ------
    ValueError
        The shape is another, or the columns of a degree do not span the real harmonics of that degree.
    """
    grid = sphere_grid(2 * lmax)
    b, a = (m.ravel() for m in np.meshgrid(grid.b, grid.a, indexing="ij"))
    v = np.stack([np.sin(b) * np.sin(a), np.cos(b), np.sin(b) * np.cos(a)], axis=-1)
    theirs = np.asarray(harmonics(v))
    if theirs.shape != (len(v), (lmax + 1) ** 2) or np.iscomplexobj(theirs):
        raise ValueError(
            f"harmonics must return real values of shape {(len(v), (lmax + 1) ** 2)}, got {theirs.dtype} {theirs.shape}"
        )
    ours = harmonics_at(lmax, v)
    M = (theirs * np.repeat(grid.weight, len(grid.a))[:, None]).T @ ours
    for l in range(lmax + 1):
        part = slice(l * l, (l + 1) ** 2)
        left = theirs[:, part] - ours[:, part] @ M[part, part].T
        if np.abs(left).max() > 1e-5 * max(np.abs(theirs[:, part]).max(), 1e-12):
            raise ValueError(
                f"harmonics must have degree {l} in columns {l * l} to {(l + 1) ** 2 - 1}, got other functions"
            )
        size = np.linalg.svd(M[part, part], compute_uv=False)
        if size[-1] < 1e-6 * size[0]:
            raise ValueError(f"harmonics must be independent, got {2 * l + 1} dependent columns for degree {l}")
        M[part, : l * l] = M[part, (l + 1) ** 2 :] = 0
    M[np.abs(M) < 1e-14] = 0
    return M
