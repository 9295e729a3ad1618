"""Magnitudes of a weight's units apart from their directions, for updates in Tucker form.

A unit is what makes one output: a row of a linear layer, a kernel of a convolution, a column of an embedding. One value
a unit stands in a tensor that broadcasts against the weight, 1 long along all axes but that of the outputs. Where
groups of a transposed convolution share that axis, it has a first axis more, of the groups; so the shape alone says
which axis is meant, in a file too.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._tucker import mode_product, shrink


def unit_shape(shape: Sequence[int], axis_out: int, groups: int = 1) -> tuple[int, ...]:
    """Return the shape of one value a unit; ``groups`` are those that share the axis of the outputs."""
    one_each = [size if n == axis_out else 1 for n, size in enumerate(shape)]
    return (groups, *one_each) if groups > 1 else tuple(one_each)


def by_units(weight: Tensor, units: Sequence[int]) -> Tensor:
    """View a weight so that one value a unit, of shape ``units``, broadcasts against it."""
    return weight.reshape(units[0], -1, *weight.shape[1:]) if len(units) > weight.ndim else weight


def unit_norms(weight: Tensor, units: Sequence[int]) -> Tensor:
    """Return the length of each unit, in the shape ``units``."""
    seen = by_units(weight, units)
    return torch.linalg.vector_norm(seen, dim=[n for n, size in enumerate(units) if size == 1], keepdim=True)


def updated_norms(weight: Tensor, core: Tensor, factors: Sequence[Tensor], axis_out: int) -> Tensor:
    r"""Return the length of each unit of a weight plus a Tucker update, without forming the update.

    .. math:: \lVert w + d \rVert^2 = \lVert w \rVert^2 + 2 \langle w, d \rangle + \lVert d \rVert^2

    with both products taken among ranks. The error is the precision times (‖w‖² + ‖d‖²) / ‖w + d‖²: a unit that its
    update all but cancels, to a thousandth in float32, has no digit that is right.
    """
    others = [n for n in range(core.ndim) if n != axis_out]
    grown = mode_product(core, factors[axis_out], axis_out)
    turned = grown
    for n in others:
        turned = mode_product(turned, factors[n].T @ factors[n], n)
    both = (grown * (2 * shrink(weight, factors, but=axis_out) + turned)).sum(dim=others, keepdim=True)
    own = unit_norms(weight, unit_shape(weight.shape, axis_out))
    # Units that have no update keep the very bits of their length.
    return torch.where(both == 0, own, (own.square() + both).clamp_min(0).sqrt())


def growth(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return what units of given lengths are multiplied by to have their magnitudes: 1 for those of length 0."""
    there = norms > 0
    return torch.where(there, magnitude / torch.where(there, norms, 1), 1)


def with_magnitude(weight: Tensor, factor: Tensor) -> Tensor:
    """Return a weight whose units are multiplied by one value each."""
    return (by_units(weight, factor.shape) * factor).reshape(weight.shape)


def fits(units: Sequence[int], shape: Sequence[int]) -> bool:
    """Tell whether a tensor of the shape ``units`` is one value a unit of a weight of the shape ``shape``."""
    grouped = len(units) == len(shape) + 1
    if grouped and (units[0] < 2 or shape[0] % units[0]):
        return False
    own = units[1:] if grouped else units
    long = [size == side for size, side in zip(own, shape, strict=True) if size > 1] if len(own) == len(shape) else []
    return len(own) == len(shape) and len(long) <= 1 and all(long) and math.prod(units) > 0
