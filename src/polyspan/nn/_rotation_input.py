"""How conversions of rotations check what they are given: kinds, shapes, numbers, and matrices that are none."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from polyspan.linalg._namespace import detached, is_torch, namespace, widen

from ._rotation_maps import native, nearest, no_rotations

NOT_A_ROTATION = 1e-3


def read_numbers(x: Any, size: int, name: str, check: bool) -> tuple[Any, Callable[[Any], Any], bool]:
    """Widen ``x`` after checking its kind, its last dimension and, where values can be looked at, that it is finite."""
    xp = namespace(x)
    if xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(f"{name} must be real, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] != size:
        raise ValueError(f"{name} must be (*b, {size}), got shape {tuple(x.shape)}")
    wide, narrow = widen(native(x))
    check = check and not _traced(wide)
    if check:
        _refuse_unless_finite(wide, -1, name)
    return wide, narrow, check


def read_matrix(R: Any, project: bool, check: bool, size: int | None) -> tuple[Any, Callable[[Any], Any], bool]:
    """Widen matrices, project them on the rotations where asked to, and refuse others where they can be looked at."""
    xp = namespace(R)
    if xp.isdtype(R.dtype, "complex floating"):
        raise TypeError(f"R must be real, got {R.dtype}")
    if R.ndim < 2 or R.shape[-1] != R.shape[-2] or R.shape[-1] < 2 or (size and R.shape[-1] != size):
        expected = f"(*b, {size}, {size})" if size else "(*b, n, n) with n >= 2"
        raise ValueError(f"R must be {expected}, got shape {tuple(R.shape)}")
    R = native(R)
    wide, narrow = widen(R)
    check = check and not _traced(wide)
    if check:
        _refuse_unless_finite(wide, (-2, -1), "R")
    if project:
        return nearest(wide, check)[0], narrow, check
    if check:
        still = detached(wide)
        coarse = float(xp.finfo(R.dtype).eps) if xp.isdtype(R.dtype, "real floating") else 0.0
        bad = no_rotations(still, max(NOT_A_ROTATION, 4 * coarse))
        _refuse(bad, "R must hold rotations (project=True takes the nearest), got others")
    return wide, narrow, check


def row_by_row(x: Any) -> Any:
    """Entries (*b, p q) of (*b, p, q), in memory of their own, where reshaping alone may stay in the caller's."""
    if is_torch(x):
        import torch

        own = x.clone(memory_format=torch.contiguous_format)
    else:
        own = x.copy()
    return own.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _traced(x: Any) -> bool:
    """Whether there are no numbers to look at: in a graph that is captured, or on the device "meta"."""
    if not is_torch(x):
        return False
    from ._rotation_torch import traced

    return x.is_meta or traced()


def _places(marked: Any) -> tuple[int, list[int]]:
    """Count the marked items, and return the first five indices into the flattened batch."""
    xp = namespace(marked)
    found = [int(i) for i in xp.nonzero(xp.reshape(marked, (-1,)))[0]]
    return len(found), found[:5]


def _refuse(bad: Any, text: str) -> None:
    xp = namespace(bad)
    if bool(xp.any(bad)):
        count, first = _places(bad)
        raise ValueError(f"{text} in {count} rows: {first}{' ...' if count > len(first) else ''}")


def _refuse_unless_finite(x: Any, axis: int | tuple[int, int], name: str) -> None:
    """Refuse rows with NaN or infinity; a sum of all numbers that is finite says that there are none."""
    xp = namespace(x)
    with np.errstate(over="ignore", invalid="ignore"):
        total = xp.sum(detached(x))
    if not bool(xp.isfinite(total)):
        _refuse(~xp.all(xp.isfinite(x), axis=axis), f"{name} must be finite, got NaN or infinity")


def warn(check: bool, marked: Any, text: str) -> None:
    xp = namespace(marked)
    if check and bool(xp.any(marked)):
        count, first = _places(marked)
        where = f"{first}{' ...' if count > len(first) else ''}"
        warnings.warn(f"{count} {text}; rows {where}", UserWarning, stacklevel=3)
