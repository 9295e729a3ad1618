"""Picture of how far predicted rotations are off along a path of true ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import picture_path, write_picture

from .rotation_distance import geodesic_distance


def plot_error_along_path(target: Any, predicted: Mapping[str, Any], path: Path | str) -> Path:
    """Draw the angle between predicted and true rotations over how far the path has turned: breaks stand out as peaks.

    Parameters
    ----------
    target : array of shape (n, 3, 3)
        True rotations in the order of the path, such as one slow full turn.
    predicted : mapping of str to array of shape (n, 3, 3)
        What each network or representation makes of it, by name.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The target is no path, or a prediction has another shape.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    if target.ndim != 3 or not len(target):
        raise ValueError(f"target must be (n, 3, 3), n >= 1, got shape {tuple(target.shape)}")
    for name, rotations in predicted.items():
        if rotations.shape != target.shape:
            raise ValueError(
                f"predicted[{name!r}] must have the shape of target, {tuple(target.shape)}, "
                f"got {tuple(rotations.shape)}"
            )
    along = np.concatenate([[0.0], np.cumsum(_degrees(target[:-1], target[1:]))])
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        panel = figure.subplots()
        styles = ("-", "--", "-.", ":")
        for i, (name, rotations) in enumerate(predicted.items()):
            panel.plot(along, _degrees(rotations, target), styles[i % len(styles)], label=name, linewidth=1.4)
        # Linear below a tenth of a degree, so that an error of 0 has a place.
        panel.set_yscale("symlog", linthresh=0.1)
        panel.set(ylim=(0, 200), xlabel="turned along the path, degrees", ylabel="error, degrees")
        panel.set_yticks([0, 0.1, 1, 10, 100, 180], ["0", "0.1", "1", "10", "100", "180"])
        panel.grid(alpha=0.3)
        if predicted:
            panel.legend()
        write_picture(figure, path)
    return path


def _degrees(R: Any, S: Any) -> np.ndarray:
    angles = geodesic_distance(R, S)
    angles = angles.detach().cpu().numpy() if hasattr(angles, "detach") else angles
    return np.rad2deg(np.asarray(angles, dtype=np.float64))
