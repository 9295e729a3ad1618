"""Conversions between two forms of rotations that are no matrices: all pairs, through the matrix.

``<from>_to_<to>(x, **options)`` takes the options of ``<from>_to_matrix`` and of ``matrix_to_<to>`` together, such as
``quaternion_to_euler(q, order="wxyz", sequence="XYZ")``. Precision is lost at no step: float16 and bfloat16 stay in
float32 in between. Where a pair breaks is where its first half does, or its second; see :mod:`polyspan.nn.rotation`,
which also holds the two between quaternions and axis-angle, as those need no matrix.
"""

import inspect
from collections.abc import Callable
from typing import Any

from polyspan.linalg._namespace import namespace, widen

from ._rotation_maps import native
from .rotation import (
    axis_angle_to_matrix,
    euler_to_matrix,
    matrix_to_axis_angle,
    matrix_to_euler,
    matrix_to_quaternion,
    matrix_to_rotation5d,
    matrix_to_rotation6d,
    matrix_to_rotation9d,
    quaternion_to_matrix,
    rotation5d_to_matrix,
    rotation6d_to_matrix,
    rotation9d_to_matrix,
)


def _through_matrix(name: str, there: Callable, back: Callable) -> Callable[..., Any]:
    """Make ``name``, the conversion ``there`` to the matrix and ``back`` from it, with the options of both."""
    options = {
        key: option
        for half in (there, back)
        for key, option in inspect.signature(half).parameters.items()
        if option.kind is option.KEYWORD_ONLY and key != "project"
    }
    check = options.pop("check")
    first = next(iter(inspect.signature(there).parameters.values()))
    own = {half: [key for key in inspect.signature(half).parameters if key in options] for half in (there, back)}

    def convert(x: Any, *, check: bool = True, **given: Any) -> Any:
        unknown = sorted(given.keys() - options.keys())
        if unknown:
            raise TypeError(f"{name} takes the options {sorted(options)} and 'check', got {unknown}")
        namespace(x)
        wide, narrow = widen(native(x))
        R = there(wide, check=check, **{key: given[key] for key in own[there] if key in given})
        return narrow(back(R, check=check, **{key: given[key] for key in own[back] if key in given}))

    source, target = name.split("_to_")
    halves = f":func:`{source}_to_matrix` and :func:`matrix_to_{target}`"
    convert.__name__ = convert.__qualname__ = name
    convert.__doc__ = f"Turn {WORDS[source]} into {WORDS[target]}.\n\nOptions and errors are those of {halves}."
    convert.__dict__["__signature__"] = inspect.Signature([first, *options.values(), check])
    return convert


WORDS = {
    "quaternion": "quaternions (*b, 4)",
    "axis_angle": "rotation vectors (*b, 3)",
    "euler": "Euler angles (*b, 3)",
    "rotation5d": "five-vectors (*b, 5)",
    "rotation6d": "six-vectors (*b, 6)",
    "rotation9d": "matrices row by row (*b, 9)",
}

quaternion_to_euler = _through_matrix("quaternion_to_euler", quaternion_to_matrix, matrix_to_euler)
quaternion_to_rotation5d = _through_matrix("quaternion_to_rotation5d", quaternion_to_matrix, matrix_to_rotation5d)
quaternion_to_rotation6d = _through_matrix("quaternion_to_rotation6d", quaternion_to_matrix, matrix_to_rotation6d)
quaternion_to_rotation9d = _through_matrix("quaternion_to_rotation9d", quaternion_to_matrix, matrix_to_rotation9d)
axis_angle_to_euler = _through_matrix("axis_angle_to_euler", axis_angle_to_matrix, matrix_to_euler)
axis_angle_to_rotation5d = _through_matrix("axis_angle_to_rotation5d", axis_angle_to_matrix, matrix_to_rotation5d)
axis_angle_to_rotation6d = _through_matrix("axis_angle_to_rotation6d", axis_angle_to_matrix, matrix_to_rotation6d)
axis_angle_to_rotation9d = _through_matrix("axis_angle_to_rotation9d", axis_angle_to_matrix, matrix_to_rotation9d)
euler_to_quaternion = _through_matrix("euler_to_quaternion", euler_to_matrix, matrix_to_quaternion)
euler_to_axis_angle = _through_matrix("euler_to_axis_angle", euler_to_matrix, matrix_to_axis_angle)
euler_to_rotation5d = _through_matrix("euler_to_rotation5d", euler_to_matrix, matrix_to_rotation5d)
euler_to_rotation6d = _through_matrix("euler_to_rotation6d", euler_to_matrix, matrix_to_rotation6d)
euler_to_rotation9d = _through_matrix("euler_to_rotation9d", euler_to_matrix, matrix_to_rotation9d)
rotation5d_to_quaternion = _through_matrix("rotation5d_to_quaternion", rotation5d_to_matrix, matrix_to_quaternion)
rotation5d_to_axis_angle = _through_matrix("rotation5d_to_axis_angle", rotation5d_to_matrix, matrix_to_axis_angle)
rotation5d_to_euler = _through_matrix("rotation5d_to_euler", rotation5d_to_matrix, matrix_to_euler)
rotation5d_to_rotation6d = _through_matrix("rotation5d_to_rotation6d", rotation5d_to_matrix, matrix_to_rotation6d)
rotation5d_to_rotation9d = _through_matrix("rotation5d_to_rotation9d", rotation5d_to_matrix, matrix_to_rotation9d)
rotation6d_to_quaternion = _through_matrix("rotation6d_to_quaternion", rotation6d_to_matrix, matrix_to_quaternion)
rotation6d_to_axis_angle = _through_matrix("rotation6d_to_axis_angle", rotation6d_to_matrix, matrix_to_axis_angle)
rotation6d_to_euler = _through_matrix("rotation6d_to_euler", rotation6d_to_matrix, matrix_to_euler)
rotation6d_to_rotation5d = _through_matrix("rotation6d_to_rotation5d", rotation6d_to_matrix, matrix_to_rotation5d)
rotation6d_to_rotation9d = _through_matrix("rotation6d_to_rotation9d", rotation6d_to_matrix, matrix_to_rotation9d)
rotation9d_to_quaternion = _through_matrix("rotation9d_to_quaternion", rotation9d_to_matrix, matrix_to_quaternion)
rotation9d_to_axis_angle = _through_matrix("rotation9d_to_axis_angle", rotation9d_to_matrix, matrix_to_axis_angle)
rotation9d_to_euler = _through_matrix("rotation9d_to_euler", rotation9d_to_matrix, matrix_to_euler)
rotation9d_to_rotation5d = _through_matrix("rotation9d_to_rotation5d", rotation9d_to_matrix, matrix_to_rotation5d)
rotation9d_to_rotation6d = _through_matrix("rotation9d_to_rotation6d", rotation9d_to_matrix, matrix_to_rotation6d)
