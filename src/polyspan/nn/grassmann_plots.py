"""Picture of how near the class subspaces of a fitted classifier lie to one another."""

from pathlib import Path

import numpy as np

from polyspan.io import picture_path, write_picture

from .grassmann_classifier import GrassmannClassifier


def plot_class_angles(classifier: GrassmannClassifier, path: Path | str) -> Path:
    """Draw the smallest and the mean principal angle between every two classes, in degrees.

    Parameters
    ----------
    classifier : GrassmannClassifier
        Fitted.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    angles = np.rad2deg(classifier.principal_angles())
    names = [str(name) for name in classifier.classes_]
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for panel, title, values in zip(
            panels, ("Smallest angle", "Mean angle"), (angles[..., 0], np.nanmean(angles, axis=-1)), strict=True
        ):
            image = panel.imshow(values, vmin=0, vmax=90, cmap="viridis")
            panel.set(title=f"{title} between classes, degrees")
            if len(names) <= 40:
                panel.set_xticks(range(len(names)), names, rotation=90)
                panel.set_yticks(range(len(names)), names)
            figure.colorbar(image, ax=panel, shrink=0.8)
        write_picture(figure, path)
    return path
