"""Picture of position in dense features: where on the grid their mean departs, before and after it is taken out."""

from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import picture_path, write_picture

from .positional_disentangling import PositionalDisentangler

IMAGES = 512


def plot_position(
    fitted: PositionalDisentangler, X: Any, path: Path | str, *, grid: tuple[int, int] | None = None
) -> Path:
    """Draw the share of variance that each place's mean explains, before and after, and R² of the targets.

    Of features without position the means of all places are alike, and the map is dark.

    Parameters
    ----------
    fitted : PositionalDisentangler
    X : array of shape (images, h, w, d) or (images, patches, d)
        The first 512 images are looked at.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    grid : (int, int), optional
        Height and width in patches; a square where not given.

    Raises
    ------
    ValueError
        The suffix is another one, or X has no places.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    if np.ndim(X) not in (3, 4):
        raise ValueError(f"X must be (images, h, w, d) or (images, patches, d), got {np.ndim(X)} axes")
    part = np.asarray(X[:IMAGES])
    cleaned = np.asarray(fitted.transform(part, grid=grid))
    maps = [_departures(rows) for rows in (part, cleaned)]
    side = round(maps[0].size ** 0.5)
    shape = part.shape[1:3] if part.ndim == 4 else grid or (side, side)
    most = max(float(maps[0].max()), 1e-12)
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
        before, after, rounds = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
        for axis, values, word in ((before, maps[0], "before"), (after, maps[1], "after")):
            image = axis.imshow(values.reshape(shape), vmin=0, vmax=most, cmap="magma", interpolation="none")
            axis.set(title=f"Share told by place, {word}", xticks=[], yticks=[])
        figure.colorbar(image, ax=[before, after], shrink=0.8, label="share of the variance")
        curve = np.asarray(fitted.r2_curve_, dtype=float)
        rounds.plot(np.arange(len(curve)), curve, "o-", color="#2b6cb0")
        low = min(0.0, np.nanmin(curve))
        rounds.set(title="Targets told by features", ylabel="R², mean over targets", ylim=(low, 1))
        if fitted.method == "rasa":
            rounds.set(xlabel="round", xticks=range(len(curve)))
        else:
            rounds.set_xticks(range(len(curve)), ["before", "after"])
        return write_picture(figure, path)


def _departures(rows: np.ndarray) -> np.ndarray:
    """Return, for each place, the squared distance of its mean to the mean of all, over the variance of all."""
    flat = rows.reshape(len(rows), -1, rows.shape[-1]).astype(np.float64)
    centre = flat.mean(axis=(0, 1))
    spread = np.square(flat - centre).sum(axis=-1).mean()
    return np.square(flat.mean(axis=0) - centre).sum(axis=-1) / (spread or 1.0)
