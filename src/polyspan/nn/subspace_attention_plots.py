"""Picture of the attention of every group of channels, laid over the images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import picture_path, write_picture

MOST_ROWS = 12


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
    path = picture_path(path)
    images, maps = _numbers(images), _numbers(maps)
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise ValueError(f"images must be (n, h, w) or (n, h, w, 3), got shape {images.shape}")
    if 0 in images.shape[1:]:
        raise ValueError(f"images must have at least one pixel, got shape {images.shape}")
    if maps.ndim != 4 or len(maps) != len(images):
        raise ValueError(f"maps must be ({len(images)}, groups, height, width), got shape {maps.shape}")
    if not 1 <= len(images) <= MOST_ROWS:
        raise ValueError(f"images must be 1 to {MOST_ROWS}, got {len(images)}")
    return _draw([("", image, attention) for image, attention in zip(images, maps, strict=True)], path)


def plot_attention_layers(image: Any, layers: Mapping[str, Any], path: Path | str) -> Path:
    """Draw one row a layer: the image, then the attention of each group over it, as multiples of uniform attention.

    Parameters
    ----------
    image : array or tensor of shape (h, w) or (h, w, 3)
        Grey of any range, or colours in [0, 1].
    layers : mapping of str to array or tensor of shape (g, h', w')
        By name, at most 12, so that they can be seen; such as one image's of those of
        :func:`~polyspan.nn.attention_surgery.attention_maps_of`. Groups and maps may differ from layer to layer.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The shapes do not fit, or there are more layers than can be seen, or none.
    """
    path = picture_path(path)
    image = _numbers(image)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or 0 in image.shape:
        raise ValueError(f"image must be (h, w) or (h, w, 3), with at least one pixel, got shape {image.shape}")
    if not 1 <= len(layers) <= MOST_ROWS:
        raise ValueError(f"layers must be 1 to {MOST_ROWS}, got {len(layers)}")
    rows = [(name, image, _numbers(maps)) for name, maps in layers.items()]
    for name, _, maps in rows:
        if maps.ndim != 3 or 0 in maps.shape:
            raise ValueError(f"layers must be maps (groups, height, width), got shape {maps.shape} at {name}")
    return _draw(rows, path)


def _numbers(x: Any) -> np.ndarray:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=float)


def _draw(rows: list[tuple[str, np.ndarray, np.ndarray]], path: Path) -> Path:
    """Draw rows of a name, an image (h, w) or (h, w, 3) and its maps (g, h', w')."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    n, g = len(rows), max(len(maps) for _, _, maps in rows)
    most = max(1 + 1e-9, *(float(maps.max()) * maps[0].size for _, _, maps in rows))
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(1.5 * (g + 1) + 1, 1.5 * n + 0.4), layout="constrained")
        panels = figure.subplots(n, g + 1, squeeze=False)
        for row, (name, image, maps) in zip(panels, rows, strict=True):
            h, w = image.shape[:2]
            for panel in row[: len(maps) + 1]:
                panel.imshow(image, cmap="gray", extent=(0, w, h, 0))
                panel.set(xticks=[], yticks=[])
            for panel in row[len(maps) + 1 :]:
                panel.set_axis_off()
            if name:
                row[0].set_ylabel(name)
            for panel, values in zip(row[1:], maps, strict=False):
                uniform = values.size
                shown = panel.imshow(values * uniform, cmap="magma", alpha=0.65, vmin=0, vmax=most, extent=(0, w, h, 0))
        panels[0, 0].set_title("image")
        for i in range(g):
            panels[0, i + 1].set_title(f"group {i}")
        figure.colorbar(shown, ax=panels, shrink=0.8, label="times uniform attention")
        write_picture(figure, path)
    return path
