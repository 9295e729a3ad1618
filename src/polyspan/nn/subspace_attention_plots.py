"""Picture of the attention of every group of channels, laid over the images."""

from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import picture_path, write_picture


def plot_attention_maps(images: Any, maps: Any, path: Path | str) -> Path:
    """Draw one row an image: the image, then the attention of each group over it, as multiples of uniform attention.

    Parameters
    ----------
    images : array or tensor of shape (n, h, w) or (n, h, w, 3)
        Grey of any range, or colours in [0, 1]; at most 12, so that they can be seen.
    maps : array or tensor of shape (n, g, h', w')
        From :meth:`polyspan.nn.ULSAM.attention_maps`; stretched over the image.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The shapes do not fit, or there are more images than can be seen.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    images, maps = (np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=float) for x in (images, maps))
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise ValueError(f"images must be (n, h, w) or (n, h, w, 3), got shape {images.shape}")
    if 0 in images.shape[1:]:
        raise ValueError(f"images must have at least one pixel, got shape {images.shape}")
    if maps.ndim != 4 or len(maps) != len(images):
        raise ValueError(f"maps must be ({len(images)}, groups, height, width), got shape {maps.shape}")
    if not 1 <= len(images) <= 12:
        raise ValueError(f"images must be 1 to 12, got {len(images)}")
    n, g, places = len(images), maps.shape[1], maps.shape[2] * maps.shape[3]
    most = max(float(maps.max()) * places, 1 + 1e-9)
    h, w = images.shape[1:3]
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(1.5 * (g + 1) + 1, 1.5 * n + 0.4), layout="constrained")
        panels = figure.subplots(n, g + 1, squeeze=False)
        for row, image, attention in zip(panels, images, maps, strict=True):
            for panel in row:
                panel.imshow(image, cmap="gray", extent=(0, w, h, 0))
                panel.set(xticks=[], yticks=[])
            for panel, values in zip(row[1:], attention, strict=True):
                shown = panel.imshow(values * places, cmap="magma", alpha=0.65, vmin=0, vmax=most, extent=(0, w, h, 0))
        panels[0, 0].set_title("image")
        for i in range(g):
            panels[0, i + 1].set_title(f"group {i}")
        figure.colorbar(shown, ax=panels, shrink=0.8, label="times uniform attention")
        write_picture(figure, path)
    return path
