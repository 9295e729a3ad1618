"""Pictures of what the layers of a rate-reduction transformer do: rates, sparsity, and what each head looks at."""

from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import picture_path, write_picture

from .layer_rates import LayerRates

MOST_IMAGES, MOST_HEADS = 8, 12


def plot_layer_rates(told: LayerRates, path: Path | str) -> Path:
    """Draw the coding rates and the share of non-zero entries layer by layer.

    A fall within the learnt subspaces means compression towards them only as far as the line of the turned subspaces
    does not fall along with it.

    Parameters
    ----------
    told : LayerRates
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    """
    layers = np.arange(1, len(told.names) + 1)

    def draw(figure: Any) -> None:
        first, second = figure.subplots(1, 2)
        for values, name, style in (
            (told.rate_within, "within learnt subspaces", "o-"),
            (told.rate_random, "within the same, turned at random", "s--"),
            (told.rate, "all tokens", "^:"),
        ):
            if np.isfinite(values).any():
                first.plot(layers, values, style, label=name, markersize=4)
        first.set(title="Coding rate", xlabel="layer", ylabel="nats", ylim=(0, None))
        first.legend(frameon=False)
        second.plot(layers, told.nonzero_share, "o-", label="non-zero entries", markersize=4)
        second.plot(layers, told.dead_share, "s--", label="tokens all zero", markersize=4)
        second.set(title="Sparsity after the layer", xlabel="layer", ylabel="share", ylim=(-0.02, 1.02))
        second.legend(frameon=False)

    return _save(draw, (8.4, 3.4), path)


def plot_masks(images: Any, maps: Any, path: Path | str) -> Path:
    """Draw images beside the maps of their heads: how much the class token attends to each patch.

    Parameters
    ----------
    images : array of shape (n, c, h, w)
        At most 8 are drawn.
    maps : array of shape (n, K, a, b)
        From ``attention_maps``; at most 12 heads are drawn.
    path : path
        As in :func:`plot_layer_rates`.
    """
    images, maps = np.asarray(images, dtype=np.float64), np.asarray(maps, dtype=np.float64)
    if images.ndim != 4 or maps.ndim != 4 or len(images) != len(maps) or len(images) == 0:
        raise ValueError(
            f"images (n, c, h, w) and maps (n, K, a, b) must be as many, at least one, got {images.shape}, {maps.shape}"
        )
    images, maps = images[:MOST_IMAGES], maps[:MOST_IMAGES, :MOST_HEADS]

    def draw(figure: Any) -> None:
        grid = figure.subplots(len(images), 1 + maps.shape[1], squeeze=False)
        for row, image, heads in zip(grid, images, maps, strict=True):
            low, high = image.min(), image.max()
            shown = (image - low) / ((high - low) or 1.0)
            row[0].imshow(shown.transpose(1, 2, 0) if len(image) == 3 else shown.mean(axis=0), cmap="gray")
            for panel, head in zip(row[1:], heads, strict=True):
                panel.imshow(head, cmap="viridis", vmin=0)
            for panel in row:
                panel.set(xticks=[], yticks=[])
        for k, panel in enumerate(grid[0][1:], start=1):
            panel.set_title(f"head {k}")

    return _save(draw, (1.3 * (1 + maps.shape[1]), 1.35 * len(images) + 0.3), path)


def _save(draw: Any, size: tuple[float, float], path: Path | str) -> Path:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    with mpl.rc_context({"svg.hashsalt": "polyspan", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        write_picture(figure, path, dpi=120)
    return path
