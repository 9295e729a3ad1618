"""Rotations of SciPy as matrices, and back."""

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from ._rotation_input import read_matrix


def scipy_to_matrix(rotations: Any) -> Float[np.ndarray, "*b 3 3"]:
    """Return the matrices (*b, 3, 3) of SciPy's rotations, float64: (3, 3) of one, (n, 3, 3) of n.

    Parameters
    ----------
    rotations : scipy.spatial.transform.Rotation

    Raises
    ------
    ValueError
        It is no ``scipy.spatial.transform.Rotation``.
    """
    if not isinstance(rotations, Rotation):
        raise ValueError(f"rotations must be a scipy.spatial.transform.Rotation, got {type(rotations).__name__}")
    return np.asarray(rotations.as_matrix(), dtype=np.float64)


def matrix_to_scipy(R: Any, *, project: bool = False) -> Rotation:
    """Return SciPy's ``Rotation`` of matrices (*b, 3, 3), with as many axes; tensors are taken to the CPU.

    SciPy orthonormalises whatever it is given and says nothing; here other matrices than rotations are refused.

    Parameters
    ----------
    R : array or tensor of shape (*b, 3, 3)
    project : bool, default=False
        Take the nearest rotations instead of refusing.

    Raises
    ------
    ValueError
        A matrix is no rotation, not finite, or of another shape.
    """
    wide, _, _ = read_matrix(R.detach().cpu() if hasattr(R, "detach") else np.asarray(R), project, True, size=3)
    return Rotation.from_matrix(np.asarray(wide, dtype=np.float64))
