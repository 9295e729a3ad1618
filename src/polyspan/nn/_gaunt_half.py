"""Values of functions at few nodes of half a sphere, at which products of three of them integrate exactly."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import lebedev_rule

from ._sphere import harmonics_at
from ._sphere_product import TableModule
from ._sphere_routes import Axis

# Degrees to which there are rules of Lebedev, which are symmetric about the centre.
RULES = (*range(3, 32, 2), *range(35, 132, 6))


@lru_cache(maxsize=16)
def half_sphere(degree: int) -> tuple[NDArray, NDArray]:
    """Return nodes (n, 3), one of every two opposite ones, and weights that integrate even polynomials of ``degree``.

    A rule of Lebedev needs about three quarters of the nodes that latitudes and longitudes need. Few of its weights are
    negative, in the rules for degrees 13, 25 and 27. An odd degree is that of even polynomials one below it.
    """
    rule = next(rule for rule in RULES if rule >= degree - degree % 2)
    nodes, weight = lebedev_rule(rule)
    x, y, z = nodes
    north = (y > 0) | ((y == 0) & ((x > 0) | ((x == 0) & (z > 0))))
    return nodes.T[north], 2 * weight[north]


@lru_cache(maxsize=16)
def _half_tables(axis: Axis, degree: int) -> tuple[NDArray, NDArray]:
    """Return the even and the odd harmonics of a function at the nodes of half a sphere, (nodes, components) each.

    An integral of three harmonics is zero unless they are an even function together, so one node of every two opposite
    ones is enough. The two stand apart, and the product of values at the other node follows from them. Weights of the
    nodes are folded in as cube roots.
    """
    nodes, weight = half_sphere(degree)
    values = harmonics_at(axis.lmax, nodes) * np.cbrt(weight)[:, None]
    even, odd = (
        np.concatenate(
            [np.empty((len(nodes), 0))]
            + [f * values[:, l * l : (l + 1) ** 2] for l, f in zip(*axis, strict=True) if l % 2 == parity],
            axis=1,
        )
        for parity in (0, 1)
    )
    return even, odd


def has_half_sphere(degree: int) -> bool:
    """Say whether there is a rule for products of three functions whose degrees add up to ``degree``."""
    return degree - degree % 2 <= RULES[-1]


class HalfSphere(TableModule):
    """The tables of a dense product over half of the sphere, even and odd ones for each of the three functions."""

    def __init__(self, axes: tuple[Axis, Axis, Axis], *, device: Any, dtype: Any) -> None:
        super().__init__()
        degree = sum(axis.lmax for axis in axes)
        self.keep_tables([table for axis in axes for table in _half_tables(axis, degree)], device, dtype)
