"""Pictures of walks along directions: a row a direction, a column an amount."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from polyspan.io import picture_path, write_picture

from .latent_directions import Directions, traverse


def plot_traversals(
    generator: nn.Module,
    latent: Tensor,
    directions: Directions,
    path: Path | str,
    *,
    layer: str | None = None,
    amounts: Sequence[float | int] = tuple(np.linspace(-3, 3, 7).tolist()),
    max_rows: int = 16,
) -> Path:
    """Draw the pictures of one latent moved along each direction; a last column shows where pixels change most.

    Parameters
    ----------
    generator : torch.nn.Module
        Gives pictures (h, w), (1, h, w) or (3, h, w).
    latent : Tensor of shape (d,)
    directions : Directions
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    layer : str, optional
        Whose latent is moved; left out, that of all layers.
    amounts : sequence of float
        In units of the latent.
    max_rows : int, default=16
        Directions drawn at most.

    Raises
    ------
    ValueError
        The suffix is another one, or the generator makes no pictures.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    rows = [
        _pictures(traverse(generator, latent[None], v, amounts, layer)[:, 0]) for v in directions.vectors[:max_rows]
    ]
    low, high = min(row.min() for row in rows), max(row.max() for row in rows)
    changes = [np.ptp(row, axis=0).reshape(*row.shape[1:3], -1).mean(axis=-1) for row in rows]
    most = max(*(change.max() for change in changes), 1e-12)
    width = len(amounts) + 1
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 8}):
        figure = Figure(figsize=(0.8 * width + 0.6, 0.8 * len(rows) + 0.4), layout="constrained")
        axes = figure.subplots(len(rows), width, squeeze=False)
        for i, (row, change) in enumerate(zip(rows, changes, strict=True)):
            for axis, amount, picture in zip(axes[i], amounts, row, strict=False):
                shown = (picture - low) / max(high - low, 1e-12) if picture.ndim == 3 else picture
                axis.imshow(
                    shown,
                    cmap="gray",
                    vmin=None if picture.ndim == 3 else low,
                    vmax=None if picture.ndim == 3 else high,
                )
                if i == 0:
                    axis.set_title(f"{amount:+.3g}")
            axes[i, -1].imshow(change, cmap="magma", vmin=0, vmax=most)
            axes[i, 0].set_ylabel(f"{i + 1}")
        axes[0, -1].set_title("range")
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
        figure.supylabel("direction")
        write_picture(figure, path)
    return path


def _pictures(images: Tensor) -> np.ndarray:
    """Return (t, h, w), or (t, h, w, 3) for colour."""
    found = images.detach().to(torch.float32).cpu().numpy()
    if found.ndim == 4 and found.shape[1] in (1, 3):
        return found[:, 0] if found.shape[1] == 1 else found.transpose(0, 2, 3, 1)
    if found.ndim != 3:
        raise ValueError(f"generator must make pictures (h, w), (1, h, w) or (3, h, w), got {found.shape[1:]}")
    return found
