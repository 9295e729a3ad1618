"""About which axes predicted rotations are off, in numbers and as a picture."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyspan.io import picture_path, write_picture
from polyspan.linalg._namespace import detached, is_torch, namespace

from .rotation import matrix_to_axis_angle
from .rotation_distance import geodesic_distance, rotation_errors


class AxisErrors(NamedTuple):
    """Errors about the axes of the body, in degrees: x, y, z.

    ``vectors`` (n, 3) are the rotation vectors that turn a target into its prediction, in the target's own frame;
    ``mean`` (3,), which is a bias, ``spread`` (3,), the standard deviation, and ``mean_absolute`` (3,) are theirs.
    """

    vectors: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    mean_absolute: np.ndarray


def rotation_axis_errors(predicted: Any, target: Any) -> AxisErrors:
    r"""Split the errors of predicted rotations (\*b, 3, 3) by the axes of the body.

    The vectors are those of :math:`R_{target}^\top R_{predicted}`, so a camera that is always read two degrees too far
    about its own x axis has a mean of (2, 0, 0) wherever it looks. Near half turns the vector's sign is arbitrary.

    Raises
    ------
    ValueError
        There are no rotations, shapes differ, or a matrix is no rotation.
    """
    if tuple(predicted.shape) != tuple(target.shape):
        raise ValueError(
            f"predicted must have the shape of target, {tuple(target.shape)}, got {tuple(predicted.shape)}"
        )
    namespace(predicted, target)
    R, S = (_numbers(x) for x in (predicted, target))
    if R.ndim < 2 or R.shape[-2:] != (3, 3) or not R.size:
        raise ValueError(f"predicted and target must be (*b, 3, 3) with at least one rotation, got shape {R.shape}")
    for name, x in (("predicted", R), ("target", S)):
        if not np.isfinite(x).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    matrix_to_axis_angle(S)  # refuses what is no rotation
    vectors = np.rad2deg(matrix_to_axis_angle(np.swapaxes(S, -1, -2) @ R)).reshape(-1, 3)
    return AxisErrors(vectors, vectors.mean(axis=0), vectors.std(axis=0), np.abs(vectors).mean(axis=0))


def plot_rotation_errors(predicted: Any, target: Any, path: Path | str) -> Path:
    """Draw how large the errors are, with the shares beyond 30 and 90 degrees, and about which axes of the body.

    Parameters
    ----------
    predicted, target : array or tensor of shape (*b, 3, 3)
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        As in :func:`rotation_axis_errors`, or the suffix is another one.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    axes, told = rotation_axis_errors(predicted, target), rotation_errors(predicted, target)
    angles = np.rad2deg(_numbers(geodesic_distance(predicted, target))).ravel()
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        widest = max(float(angles.max()), 1e-12)
        left.hist(angles, bins=60, range=(0, widest), color="#4a5568")
        left.axvline(told.median, color="#c05621", linewidth=1, linestyle="--", label=f"median {told.median:.3g}")
        left.axvline(told.p99, color="#2b6cb0", linewidth=1, linestyle=":", label=f"99 % below {told.p99:.3g}")
        beyond = f"{told.share_above_30:.2%} above 30, {told.share_above_90:.2%} above 90"
        left.set(title=f"Angle; {beyond}", xlabel="degrees", ylabel="rotations", xlim=(0, None))
        left.legend()
        for i, (name, colour) in enumerate(zip("xyz", ("#c05621", "#2f855a", "#2b6cb0"), strict=True)):
            label = f"{name}: {axes.mean[i]:.3g} ± {axes.spread[i]:.3g}"
            right.hist(axes.vectors[:, i], bins=60, range=(-widest, widest), histtype="step", color=colour, label=label)
        right.set(title="About the body's axes; mean and deviation", xlabel="degrees", ylabel="rotations")
        right.legend()
        write_picture(figure, path)
    return path


def _numbers(x: Any) -> np.ndarray:
    still = detached(x)
    return np.asarray(still.cpu().double() if is_torch(still) else still, dtype=np.float64)
