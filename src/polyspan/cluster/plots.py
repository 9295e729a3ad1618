"""Pictures of a clustering."""

from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import picture_path, write_picture
from polyspan.linalg import fix_signs

from .reporting import basis_angles

MAX_POINTS = 5_000
MAX_ROWS = 400


def plot_clusters(embedding: Any, labels: Any, path: Path | str, *, bases: list[np.ndarray] | None = None) -> Path:
    """Draw a spectral embedding in its two widest directions, and the affinity within it in the order of the clusters.

    The affinity of two items is the cosine of their rows; blocks on the diagonal are clusters. Of many items an even
    sample is drawn: 5,000 points and 400 rows of the affinity at most.

    Parameters
    ----------
    embedding : array of shape (n, k)
    labels : array of shape (n,)
        Integers from 0.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    bases : list of arrays (d, rank), optional
        Orthonormal bases of the clusters' subspaces: the smallest angles between them are drawn too.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = picture_path(path)
    Y, labels = np.asarray(embedding, dtype=np.float64), np.asarray(labels)
    if Y.ndim != 2 or labels.shape != Y.shape[:1]:
        raise ValueError(f"labels must have one entry a row of embedding {Y.shape}, got shape {labels.shape}")
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        n_panels = 2 + (bases is not None)
        figure = Figure(figsize=(4.2 * n_panels, 3.8), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        left, right, *further = figure.subplots(1, n_panels)
        draw_points(left, Y, labels)
        order = np.argsort(labels, kind="stable")
        order = order[_even(len(order), MAX_ROWS)]
        norms = np.linalg.norm(Y[order], axis=1, keepdims=True)
        D = Y[order] / np.where(norms > 0, norms, 1)
        shown = right.imshow(D @ D.T, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        for edge in np.flatnonzero(np.diff(labels[order])) + 0.5:
            right.axhline(edge, color="black", linewidth=0.5)
            right.axvline(edge, color="black", linewidth=0.5)
        right.set(title="Affinity, by cluster", xticks=[], yticks=[])
        figure.colorbar(shown, ax=right, label="cosine of two rows")
        if bases is not None:
            draw_angles(figure, further[0], bases)
        write_picture(figure, path, dpi=120)
    return path


def draw_points(axis: Any, embedding: Any, labels: np.ndarray) -> None:
    """Draw rows (n, d) in their two widest directions, coloured by cluster, with a key where colours are all distinct.

    Of more than 5,000 rows an even sample is drawn.
    """
    import matplotlib as mpl

    colours = mpl.colormaps["tab20" if labels.max() >= 10 else "tab10"]
    rows = _even(len(labels), MAX_POINTS)
    points = _widest(np.asarray(embedding, dtype=np.float64))[rows]
    axis.scatter(*points.T, c=colours(labels[rows] % colours.N), s=6, linewidths=0, alpha=0.7, rasterized=True)
    axis.set(title="Embedding, two widest directions", xlabel="first", ylabel="second", xticks=[], yticks=[])
    if labels.max() < colours.N:
        draw_key(axis, np.unique(labels), colours)


def draw_key(axis: Any, names: np.ndarray, colours: Any) -> None:
    """Put the clusters' colours and numbers beside a picture."""
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=colours(int(c)), marker="o", markersize=4, linestyle="", label=str(c)) for c in names]
    axis.legend(
        handles=marks, title="cluster", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7,
        title_fontsize=7, handletextpad=0.1, borderpad=0.1,
    )  # fmt: skip


def draw_angles(figure: Any, axis: Any, bases: list[np.ndarray]) -> None:
    """Draw the smallest principal angle between each two subspaces."""
    shown = axis.imshow(basis_angles(bases), vmin=0, vmax=90, cmap="viridis", interpolation="nearest")
    axis.set(title="Smallest angle between subspaces", xlabel="cluster", ylabel="cluster")
    if len(bases) <= 20:
        axis.set(xticks=range(len(bases)), yticks=range(len(bases)))
    figure.colorbar(shown, ax=axis, label="degrees")


def _even(n: int, most: int) -> np.ndarray:
    """Return at most ``most`` of 0 .. n - 1, evenly spread."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).astype(np.intp)


def _widest(Y: np.ndarray) -> np.ndarray:
    """Return the two principal components of the rows (n, 2); a missing second one is 0."""
    centred = Y - Y.mean(axis=0)
    V = fix_signs(np.linalg.svd(centred.T @ centred)[0][:, :2])
    points = centred @ V
    return points if points.shape[1] == 2 else np.hstack([points, np.zeros_like(points)])
