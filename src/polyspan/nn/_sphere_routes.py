"""Three ways from coefficients to values on a grid and back: dense tables, separable steps, Fourier series.

Every route turns a product of three functions on the sphere into a sum over a grid on which that integral is exact. The
weights of the grid are folded into the tables, for products as cube roots, one a function, so that the same tables
serve the product and, with their roles exchanged, all its derivatives.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor

from ._sphere import azimuth, harmonics_on_grid, latitude_tables, legendre, sphere_grid

# A block of rows whose grid values take about this many floats stays in a core's cache.
CACHE_FLOATS = {"dense": 2**17, "separable": 2**18, "fourier": 2**18}
LEAST_ROWS = 16


class Axis(NamedTuple):
    """Degrees of one of the three functions, in the order of its components, and a factor for each."""

    degrees: tuple[int, ...]
    factors: tuple[float, ...]

    @property
    def lmax(self) -> int:
        """Largest degree."""
        return max(self.degrees)

    @property
    def width(self) -> int:
        """Number of components."""
        return sum(2 * l + 1 for l in self.degrees)

    def expand(self) -> NDArray[np.float64]:
        """Return the factor of every component."""
        return np.repeat(np.array(self.factors), [2 * l + 1 for l in self.degrees])

    def places(self) -> dict[tuple[int, int], int]:
        """Return the position of every (l, m)."""
        pairs = [(l, m) for l in self.degrees for m in range(-l, l + 1)]
        return {pair: i for i, pair in enumerate(pairs)}


class Shape(NamedTuple):
    """What a route must know of a product beside its tables; ``torus`` is the size of the Fourier route's grid."""

    method: str
    kind: str
    degree: int
    n_tables: int
    chunks: tuple[tuple[tuple[int, int], ...], ...]
    torus: tuple[int, int]

    def turned(self, order: tuple[int, int, int]) -> "Shape":
        """Return the shape with the three functions in another order."""
        return self._replace(chunks=tuple(self.chunks[i] for i in order))


def build(
    method: str,
    kind: str,
    axes: tuple[Axis, Axis, Axis],
    degree: int,
    *,
    shares: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3),
) -> tuple[Shape, list[NDArray]]:
    """Return the shape of a product and its tables, the same number for each of the three functions.

    The tables of a function hold the weights of the grid to the power of its share; the shares add up to 1.
    """
    made = [_TABLES[method](axis, degree, kind == "bracket", share) for axis, share in zip(axes, shares, strict=True)]
    chunks = tuple(_chunks(axis.lmax) for axis in axes)
    shape = Shape(method, kind, degree, len(made[0]), chunks, torus_size(degree))
    return shape, [table for tables in made for table in tables]


def table_bytes(method: str, kind: str, axes: tuple[Axis, Axis, Axis], degree: int, itemsize: int) -> int:
    """Return the memory that the tables of a dense route would take; the others take little."""
    if method != "dense":
        return 0
    nodes = (degree // 2 + 1) * (degree + 1)
    return sum(axis.width for axis in axes) * nodes * (3 if kind == "bracket" else 1) * itemsize


@lru_cache(maxsize=16)
def _dense_tables(axis: Axis, degree: int, gradient: bool, share: float) -> tuple[NDArray, ...]:
    grid = sphere_grid(degree)
    weight = np.repeat(grid.weight**share, len(grid.a)) * axis.expand()[:, None]

    def flat(part: str) -> NDArray:
        return harmonics_on_grid(axis.degrees, degree, part).reshape(axis.width, -1) * weight

    if not gradient:
        return (flat("value"),)
    return flat("value"), np.concatenate([flat("south"), flat("east")], axis=1)


def _chunks(lmax: int) -> tuple[tuple[int, int], ...]:
    """Cut the orders 0 .. lmax into runs: within a run, all are padded to the length of the first."""
    size = max(2, (lmax + 1) // 4)
    return tuple((m, min(m + size, lmax + 1)) for m in range(0, lmax + 1, size))


def _orders(chunk: tuple[int, int]) -> list[int]:
    return [m for k in range(*chunk) for m in ((k, -k) if k else (0,))]


@lru_cache(maxsize=64)
def _separable_tables(axis: Axis, degree: int, gradient: bool, share: float) -> tuple[NDArray, ...]:
    grid, P, lmax, places = sphere_grid(degree), latitude_tables(axis.lmax, degree), axis.lmax, axis.places()
    factor = dict(zip(axis.degrees, axis.factors, strict=True))
    root = grid.weight**share
    fields = (P.value, P.slope, P.shear) if gradient else (P.value,)
    gather, stacks, slot, back = [], [[] for _ in fields], 0, np.zeros(axis.width, dtype=np.int64)
    for chunk in _chunks(lmax):
        for m in _orders(chunk):
            for l in range(chunk[0], lmax + 1):
                there = (l, m) in places
                # What is not there reads any component, times 0.
                gather.append(places[l, m] if there else 0)
                if there:
                    back[places[l, m]] = slot
                slot += 1
                for stack, field in zip(stacks, fields, strict=True):
                    stack.append(field[l, abs(m)] * root * factor[l] if there else np.zeros_like(root))
    orders = [m for chunk in _chunks(lmax) for m in _orders(chunk)]
    waves = [np.stack([azimuth(m, grid.a)[i] for m in orders]) for i in range(1 + gradient)]
    return np.array(gather), back, *(np.stack(stack) for stack in stacks), *waves


@lru_cache(maxsize=64)
def _fourier_tables(axis: Axis, degree: int, gradient: bool, share: float) -> tuple[NDArray, ...]:  # noqa: ARG001
    # Nodes of the torus have equal weights; the measure of the sphere is in the way back alone.
    lmax, places = axis.lmax, axis.places()
    factor = dict(zip(axis.degrees, axis.factors, strict=True))
    scale = np.array([factor.get(l, 0.0) for l in range(lmax + 1)])
    plus = np.array([[places.get((l, m), 0) for l in range(lmax + 1)] for m in range(lmax + 1)])
    minus = np.array([[places.get((l, -m), 0) for l in range(lmax + 1)] for m in range(lmax + 1)])
    # The functions are continued over the far half of the circle; an even number of shifted nodes misses the poles.
    n, u = 2 * lmax + 2, np.arange(-lmax, lmax + 1)
    theta = 2 * np.pi * (np.arange(n) + 0.5) / n
    P = legendre(lmax, np.cos(theta), np.sin(theta))
    half = np.where(np.arange(lmax + 1) > 0, np.sqrt(0.5), 1.0)
    wave = np.exp(-1j * np.outer(u, theta)) / n

    def series(field: NDArray, turn: complex = 1.0) -> NDArray:
        made = np.einsum("un,lmn->mul", wave, field * scale[:, None, None]) * half[:, None, None] * turn
        return np.stack([made.real, made.imag], axis=-1)

    # Even orders are cosine series and odd ones sine series; each makes a polynomial with the sine of the measure.
    reach = torus_size(degree)[0] // 2
    long = np.arange(-reach, reach + 1)
    cosine, weight = np.polynomial.legendre.leggauss((reach + lmax) // 2 + 2)
    b = np.arccos(cosine)
    Q = legendre(lmax, cosine, np.sin(b)).value * scale[:, None, None]
    even, odd = np.cos(np.outer(long, b)) * weight, np.sin(np.outer(long, b)) * weight
    orders = np.arange(lmax + 1)
    kernel = np.where((orders % 2 == 0)[:, None, None], even[None], 1j * odd[None])
    integral = np.einsum("mun,lmn->mul", kernel, Q) * 2 * np.pi
    integral *= np.where(orders > 0, np.sqrt(2), 1.0)[:, None, None]
    back = np.stack([integral.real, integral.imag], axis=-1)
    pick = np.array([[abs(m) * (lmax + 1) + l, m < 0] for l in axis.degrees for m in range(-l, l + 1)])
    parts = [series(P.value)] + ([series(P.slope), series(P.shear, 1j)] if gradient else [])
    return plus, minus, pick[:, 0], pick[:, 1].astype(np.float64), back, *parts


def torus_size(degree: int) -> tuple[int, int]:
    """Return the nodes of the torus in the two angles that resolve all products of two of the three functions."""
    return next_fast_len(2 * degree + 1), next_fast_len(degree + 1, real=True)


_TABLES = {"dense": _dense_tables, "separable": _separable_tables, "fourier": _fourier_tables}


def n_nodes(shape: Shape) -> int:
    """Return the number of grid values of one function."""
    if shape.method == "fourier":
        return math.prod(shape.torus)
    return (shape.degree // 2 + 1) * (shape.degree + 1)


def to_grid(x: Tensor, shape: Shape, position: int, tables: tuple[Tensor, ...], part: str = "value") -> Tensor:
    """Return values, or both parts of the gradient side by side, of rows of coefficients of function ``position``.

    Dense and Fourier values have rows first, separable ones rows last; products and :func:`from_grid` do not mind.
    """
    if shape.method == "dense":
        return x @ tables[part != "value"]
    if shape.method == "separable":
        gather, n_fields = tables[0], (len(tables) - 1) // 2
        parts = [(2, -2 if n_fields > 1 else -1)] if part == "value" else [(3, -2), (4, -1)]
        ordered = x.T.index_select(0, gather)
        return torch.cat([_spread(ordered, tables[i], tables[j], shape.chunks[position]) for i, j in parts])
    fields = (5,) if part == "value" else (6, 7)
    return torch.stack([_torus(x, tables, torch.view_as_complex(tables[i]), shape.torus) for i in fields]).squeeze(0)


def _spread(ordered: Tensor, latitude: Tensor, wave: Tensor, chunks: tuple[tuple[int, int], ...]) -> Tensor:
    """Sum over degrees on each latitude, order by order, then over orders: (n_a, n_b rows)."""
    n_b, rows = latitude.shape[1], ordered.shape[1]
    made, slot, lmax = [], 0, chunks[-1][1] - 1
    for first, end in chunks:
        n_m, n_l = 2 * (end - first) - (first == 0), lmax + 1 - first
        size = n_m * n_l
        P = latitude[slot : slot + size].view(n_m, n_l, n_b)
        made.append(torch.bmm(P.mT, ordered[slot : slot + size].view(n_m, n_l, rows)))
        slot += size
    return wave.T @ torch.cat(made).view(-1, n_b * rows)


def _torus(x: Tensor, tables: tuple[Tensor, ...], series: Tensor, size: tuple[int, int]) -> Tensor:
    """Return values on the torus (rows, n_theta, n_psi) from the two-dimensional Fourier series."""
    plus, minus = tables[:2]
    n, m = size
    n_m, _, n_l = series.shape
    rows, lmax = len(x), n_l - 1
    negative = x.T[minus.flatten()].view(n_m, n_l, rows)
    order = torch.arange(n_m, device=x.device).view(-1, 1, 1)
    coefficients = torch.complex(x.T[plus.flatten()].view(n_m, n_l, rows), torch.where(order > 0, -negative, 0.0))
    found = torch.bmm(series, coefficients).permute(2, 1, 0)
    padded = found.new_zeros(rows, n, m // 2 + 1)
    kept = min(n_m, m // 2 + 1)
    padded[:, : lmax + 1, :kept] = found[:, lmax:, :kept]
    padded[:, n - lmax :, :kept] = found[:, :lmax, :kept]
    return torch.fft.irfft2(padded, s=(n, m), norm="forward")


def from_grid(values: Tensor, shape: Shape, position: int, tables: tuple[Tensor, ...]) -> Tensor:
    """Return the coefficients (rows, components) of a function on the grid: the adjoint of :func:`to_grid`."""
    if shape.method == "dense":
        # A product with few columns is several times as fast as one with few rows; the result is a transposed view.
        return (tables[0] @ values.T).T if values.dim() == 2 else values @ tables[0].T
    if shape.method == "separable":
        back, latitude, wave = tables[1], tables[2], tables[-2 if len(tables) > 4 else -1]
        n_b = latitude.shape[1]
        orders = (wave @ values).view(len(wave), n_b, -1)
        made, slot, m0, chunks = [], 0, 0, shape.chunks[position]
        lmax = chunks[-1][1] - 1
        for first, end in chunks:
            n_m, n_l = 2 * (end - first) - (first == 0), lmax + 1 - first
            P = latitude[slot : slot + n_m * n_l].view(n_m, n_l, n_b)
            made.append(torch.bmm(P, orders[m0 : m0 + n_m]).view(n_m * n_l, -1))
            slot, m0 = slot + n_m * n_l, m0 + n_m
        return torch.cat(made).index_select(0, back).T
    pick, negative, back = tables[2].long(), tables[3], torch.view_as_complex(tables[4])
    n_m, n_u, n_l = back.shape
    spectrum = torch.fft.rfft2(values, norm="forward")[..., :n_m]
    reach = n_u // 2
    ordered = torch.cat([spectrum[:, -reach:], spectrum[:, : reach + 1]], dim=1) if reach else spectrum[:, :1]
    found = torch.bmm(back.mT, ordered.permute(2, 1, 0)).reshape(n_m * n_l, -1)[pick]
    return torch.where(negative[:, None] > 0, -found.imag, found.real).T


def multiply(u: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """Return the product of values, or the bracket of two gradients, on the grid."""
    if shape.kind == "gaunt":
        return u * v
    dim = -1 if shape.method == "dense" else 0
    (us, ue), (vs, ve) = u.chunk(2, dim=dim), v.chunk(2, dim=dim)
    made = us * ve - ue * vs
    return made.squeeze(0) if shape.method == "fourier" else made
