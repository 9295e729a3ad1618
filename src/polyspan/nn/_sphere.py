"""Real spherical harmonics in e3nn's frame, their gradients, and grids on which products of them integrate exactly.

The polar axis is y: a unit vector is (x, y, z) = (sin b sin a, cos b, sin b cos a). Components are ordered by degree,
then m = -l .. l, and are orthonormal on the sphere. All tables are NumPy float64; modules cast them.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


class Legendre(NamedTuple):
    """Associated Legendre functions at some angles b, each (lmax + 1, lmax + 1, n) over l, m >= 0 and the angle.

    They are normalised on the sphere, without the sign of Condon and Shortley; ``slope`` is d/db and ``shear`` is
    m P / sin b.
    """

    value: Float
    slope: Float
    shear: Float


def legendre(lmax: int, cosine: Float, sine: Float) -> Legendre:
    """Return P_lm, dP_lm/db and m P_lm / sin b by recurrences that are stable to degrees of several hundred.

    A negative ``sine`` continues the functions to the far half of the circle. ``sine`` must not be 0.
    """
    P = np.zeros((lmax + 2, lmax + 1, len(cosine)))
    P[0, 0] = np.sqrt(1 / (4 * np.pi))
    for m in range(lmax + 1):
        if m:
            P[m, m] = np.sqrt((2 * m + 1) / (2 * m)) * sine * P[m - 1, m - 1]
        P[m + 1, m] = np.sqrt(2 * m + 3) * cosine * P[m, m]
        for l in range(m + 2, lmax + 1):
            A = np.sqrt((4 * l * l - 1) / (l * l - m * m))
            B = np.sqrt(((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1))
            P[l, m] = A * (cosine * P[l - 1, m] - B * P[l - 2, m])
    P = P[: lmax + 1]
    l, m = np.arange(lmax + 1.0)[:, None, None], np.arange(lmax + 1.0)[None, :, None]
    fall = np.sqrt(np.maximum((2 * l + 1) * (l * l - m * m), 0) / np.maximum(2 * l - 1, 1))
    below = np.concatenate([np.zeros_like(P[:1]), P[:-1]])
    return Legendre(P, (l * cosine * P - fall * below) / sine, m * P / sine)


class SphereGrid(NamedTuple):
    """Gauss-Legendre nodes in b (n_b), equispaced nodes in a (n_a), and the weight of each latitude (n_b).

    The weighted sum over all n_b n_a nodes is the integral over the sphere, exact to the degree that was asked for.
    """

    b: Float
    a: Float
    weight: Float


@lru_cache(maxsize=64)
def sphere_grid(degree: int) -> SphereGrid:
    """Return the smallest grid that integrates spherical polynomials of ``degree`` exactly."""
    cosine, weight = np.polynomial.legendre.leggauss(degree // 2 + 1)
    n_a = degree + 1
    return SphereGrid(np.arccos(cosine), 2 * np.pi * np.arange(n_a) / n_a, weight * 2 * np.pi / n_a)


def azimuth(m: int, a: Float) -> tuple[Float, Float]:
    """Return the factor of Y_lm that depends on a, and its derivative divided by |m| (0 for m = 0)."""
    if m == 0:
        return np.ones_like(a), np.zeros_like(a)
    k, root = abs(m), np.sqrt(2)
    if m > 0:
        return root * np.cos(k * a), -root * np.sin(k * a)
    return root * np.sin(k * a), root * np.cos(k * a)


@lru_cache(maxsize=32)
def latitude_tables(lmax: int, degree: int) -> Legendre:
    """Return the Legendre functions on the latitudes of ``sphere_grid(degree)``."""
    b = sphere_grid(degree).b
    return legendre(lmax, np.cos(b), np.sin(b))


def harmonics_on_grid(degrees: tuple[int, ...], degree: int, part: str = "value") -> Float:
    """Return Y, or a part of its gradient, of the listed degrees on a grid: (sum of 2l + 1, n_b, n_a).

    ``part`` is "value", "south" (dY/db) or "east" ((1 / sin b) dY/da).
    """
    a, P = sphere_grid(degree).a, latitude_tables(max(degrees), degree)
    field = {"value": P.value, "south": P.slope, "east": P.shear}[part]
    rows = [
        np.multiply.outer(field[l, abs(m)], azimuth(m, a)[part == "east"]) for l in degrees for m in range(-l, l + 1)
    ]
    return np.stack(rows)


def harmonics_at(lmax: int, vectors: Float) -> Float:
    """Return Y (n, (lmax + 1)^2) of unit vectors (n, 3), evaluated as polynomials in x, y and z."""
    x, y, z = np.moveaxis(vectors, -1, 0)
    out = np.empty((*vectors.shape[:-1], (lmax + 1) ** 2))
    cos_part, sin_part = np.ones_like(y), np.zeros_like(y)
    start = np.sqrt(1 / (4 * np.pi))
    for m in range(lmax + 1):
        if m:
            cos_part, sin_part = cos_part * z - sin_part * x, sin_part * z + cos_part * x
            start *= np.sqrt((2 * m + 1) / (2 * m))
        before, now = np.zeros_like(y), np.full_like(y, start)
        for l in range(m, lmax + 1):
            if m == 0:
                out[..., l * l + l] = now
            else:
                out[..., l * l + l + m] = np.sqrt(2) * now * cos_part
                out[..., l * l + l - m] = np.sqrt(2) * now * sin_part
            A = np.sqrt((4 * (l + 1) ** 2 - 1) / ((l + 1) ** 2 - m * m))
            B = np.sqrt((l * l - m * m) / (4 * l * l - 1)) if l > m else 0.0
            before, now = now, A * (y * now - B * before)
    return out


@lru_cache(maxsize=4096)
def coupling(l1: int, l2: int, l3: int, kind: str = "gaunt") -> Float:
    """Return the integral of Y_1 Y_2 Y_3 ("gaunt") or of {Y_1, Y_2} Y_3 ("bracket"), (2l1 + 1, 2l2 + 1, 2l3 + 1).

    {f, g} = (df/db dg/da - df/da dg/db) / sin b is the surface Poisson bracket. Both have the sign of e3nn's wigner_3j
    on every path.
    """
    degree = l1 + l2 + l3
    weight = np.repeat(sphere_grid(degree).weight, degree + 1)

    def flat(l: int, part: str = "value") -> Float:
        return harmonics_on_grid((l,), degree, part).reshape(2 * l + 1, -1)

    last = flat(l3) * weight
    if kind == "gaunt":
        pair = flat(l1)[:, None] * flat(l2)
    else:
        pair = flat(l1, "south")[:, None] * flat(l2, "east") - flat(l1, "east")[:, None] * flat(l2, "south")
    made = pair.reshape(-1, pair.shape[-1]) @ last.T
    made[np.abs(made) < 1e-13 * max(1.0, np.abs(made).max())] = 0.0
    found = made.reshape(2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1)
    found.flags.writeable = False
    return found


def coupling_size(l1: int, l2: int, l3: int, kind: str = "gaunt") -> float:
    """Return the constant c >= 0 that stands between a coupling and the wigner_3j of unit norm; 0 where none is."""
    even = (l1 + l2 + l3) % 2 == 0
    if even != (kind == "gaunt") or not abs(l1 - l2) <= l3 <= l1 + l2:
        return 0.0
    return float(np.linalg.norm(coupling(l1, l2, l3, kind)))


@lru_cache(maxsize=64)
def quarter_turn(l: int) -> Float:
    """Return J (2l + 1, 2l + 1) of the quarter turn about z that carries the y axis to the x axis: Y(R v) = J Y(v)."""
    degree = 2 * l
    grid = sphere_grid(degree)
    b, a = (m.ravel() for m in np.meshgrid(grid.b, grid.a, indexing="ij"))
    v = np.stack([np.sin(b) * np.sin(a), np.cos(b), np.sin(b) * np.cos(a)], axis=-1)
    turned = np.stack([v[:, 1], -v[:, 0], v[:, 2]], axis=-1)
    part = slice(l * l, (l + 1) ** 2)
    weight = np.repeat(grid.weight, len(grid.a))[:, None]
    return harmonics_at(l, turned)[:, part].T @ (weight * harmonics_at(l, v)[:, part])
