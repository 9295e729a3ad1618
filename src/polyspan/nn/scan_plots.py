"""Pictures of scan routes, and of how much routes disagree on an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import picture_path, write_picture

from .scan_routes import scan_routes

MOST_CELLS = 4096
TRUE, PREDICTED = ("#2f855a", "solid"), ("#c53030", "dashed")
"""Colours and styles of outlines."""


def plot_scan_routes(h: int, w: int, path: Path | str, patterns: Sequence[Any] = ()) -> Path:
    """Draw the routes of patterns over an h by w grid: the way, coloured from its start to its end.

    Parameters
    ----------
    h, w : int
        At most 4,096 cells.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    patterns : sequence of str, callable or array
        As :func:`~polyspan.nn.scan_routes` takes them; by default all that have a name.

    Raises
    ------
    ValueError
        The suffix is another, the grid is larger, or a pattern is no permutation of its cells.
    """
    import matplotlib as mpl
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    from .scan_routes import PATTERNS

    path = picture_path(path)
    if h * w > MOST_CELLS:
        raise ValueError(f"h * w must be at most {MOST_CELLS}, got {h * w}")
    drawn = list(patterns) or list(PATTERNS)
    found = [scan_routes(h, w, pattern) for pattern in drawn]
    rows = max(len(route.order) for route in found)
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(2.2 * len(drawn), 2.2 * rows + 0.3), layout="constrained")
        axes = figure.subplots(rows, len(drawn), squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for column, (pattern, route) in enumerate(zip(drawn, found, strict=True)):
            for axis, order in zip(axes[:, column], route.order, strict=False):
                points = np.column_stack([order % w, order // w]).astype(float)
                ways = LineCollection(list(np.stack([points[:-1], points[1:]], axis=1)), cmap="viridis")
                ways.set_array(np.arange(len(points) - 1))
                axis.add_collection(ways)
                axis.plot(*points[0], "o", color="#2f855a", markersize=5)
                axis.plot(*points[-1], "s", color="#c53030", markersize=4)
                axis.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5), aspect="equal")
            name = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", "given")
            axes[0, column].set_title(name)
        write_picture(figure, path)
    return path


def plot_segmentation(
    images: np.ndarray, masks: np.ndarray, shares: np.ndarray, path: Path | str, *, titles: Sequence[str] = ()
) -> Path:
    """Draw images with the outlines of the true masks (green) and of the predicted ones (red, dashed), and a key.

    Parameters
    ----------
    images : ndarray of shape (n, h, w) or (n, 3, h, w)
        At least one. Each is shown from its darkest to its brightest value; the first eight.
    masks : ndarray of shape (n, h, w), bool
    shares : ndarray of shape (n, h, w)
        Predicted probabilities, outlined at 0.5.
    path : path
        .svg, .png or .pdf; written atomically.
    titles : sequence of str

    Raises
    ------
    ValueError
        The suffix is another, shapes differ, or there is no image, or one of other than one or three channels.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    path = picture_path(path)
    images, masks, shares = (np.asarray(part) for part in (images, masks, shares))
    if masks.shape != shares.shape or images.shape[:1] + images.shape[-2:] != masks.shape:
        raise ValueError(
            f"images, masks and shares must agree, got shapes {images.shape}, {masks.shape} and {shares.shape}"
        )
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[1] != 3):
        raise ValueError(f"images must be (n, h, w) or (n, 3, h, w), got shape {images.shape}")
    if not len(images):
        raise ValueError(f"images must be at least one, got shape {images.shape}")
    n = min(len(images), 8)
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 8}):
        figure = Figure(figsize=(1.9 * n + 0.2, 2.45), layout="constrained")
        for i, axis in enumerate(figure.subplots(1, n, squeeze=False).flat):
            image = images[i] if images.ndim == 3 else np.moveaxis(images[i], 0, -1)
            low, high = float(image.min()), float(image.max())
            axis.imshow((image - low) / (high - low or 1.0), cmap="gray")
            for part, (colour, style) in ((masks[i].astype(float), TRUE), (shares[i], PREDICTED)):
                if part.min() < 0.5 <= part.max() and min(part.shape) > 1:
                    axis.contour(part, levels=[0.5], colors=colour, linestyles=style, linewidths=1.2)
            axis.set_axis_off()
            if i < len(titles):
                axis.set_title(titles[i])
        lines = ((TRUE, "true mask"), (PREDICTED, "predicted"))
        key = [Line2D([], [], color=colour, linestyle=style, label=name) for (colour, style), name in lines]
        figure.legend(handles=key, loc="outside lower center", ncols=2, frameon=False)
        write_picture(figure, path)
    return path
