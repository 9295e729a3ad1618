"""Picture of a fit of :class:`ManifoldLinearizingClustering`: what training did, and the subspaces that it found."""

from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import picture_path, write_picture

from .plots import MAX_ROWS, _even, draw_angles, draw_key, draw_points


def plot_linearized(fitted: Any, Z: Any, path: Path | str) -> Path:
    """Draw the rates pass by pass, and of the learned features cosines, singular values, angles and two directions.

    Flat clusters show as blocks on the diagonal of the absolute cosines, as singular values that fall early, and as
    subspaces at large angles.

    Parameters
    ----------
    fitted : ManifoldLinearizingClustering
    Z : array of shape (n, d)
        Features of the rows that ``fitted.labels_`` belongs to; an even sample of 400 is drawn as cosines.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = picture_path(path)
    Z, labels = np.asarray(Z, dtype=np.float64), np.asarray(fitted.labels_)
    if Z.ndim != 2 or labels.shape != Z.shape[:1]:
        raise ValueError(f"Z must have a row for each of the {len(labels)} labels, got shape {Z.shape}")
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(12, 7), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        (first, second, third), (fourth, fifth, unused) = figure.subplots(2, 3)
        unused.set_axis_off()
        for name, told in (("rate", "all features"), ("class_rate", "within clusters")):
            points = [(number, h[name]) for number, h in enumerate(fitted.history_, start=1) if name in h]
            first.plot(*np.array(points).reshape(-1, 2).T, marker=".", label=told)
        first.set(title="Coding rate", xlabel="pass", ylabel="nats")
        first.legend(frameon=False)
        order = np.argsort(labels, kind="stable")
        order = order[_even(len(order), MAX_ROWS)]
        shown = second.imshow(np.abs(Z[order] @ Z[order].T), vmin=0, vmax=1, cmap="magma", interpolation="nearest")
        second.set(title="Absolute cosines, by cluster", xticks=[], yticks=[])
        for edge in np.flatnonzero(np.diff(labels[order])) + 0.5:
            second.axhline(edge, color="white", linewidth=0.5)
            second.axvline(edge, color="white", linewidth=0.5)
        figure.colorbar(shown, ax=second, label="absolute cosine of two features")
        colours = mpl.colormaps["tab20" if labels.max() >= 10 else "tab10"]
        for j in np.unique(labels):
            values = np.linalg.svd(Z[labels == j], compute_uv=False)
            third.plot(
                np.arange(1, len(values) + 1), values / values[0], color=colours(j % colours.N), linewidth=1, marker="."
            )
        third.set(
            title="Singular values of each cluster", xlabel="direction", ylabel="share of the largest", ylim=(0, 1.05)
        )
        if labels.max() < colours.N:
            draw_key(third, np.unique(labels), colours)
        draw_points(fourth, Z, labels)
        draw_angles(figure, fifth, fitted.subspaces_)
        write_picture(figure, path, dpi=120)
    return path
