"""Pictures of points clustered into subspaces: affinity by cluster, angles between subspaces, embedding."""

from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import picture_path, write_picture

from .plots import MAX_POINTS, MAX_ROWS, _even, _widest
from .reporting import basis_angles


def plot_subspaces(
    X: Any, labels: Any, bases: list[np.ndarray], path: Path | str, *, fitted: Any = None, history: Any = None
) -> Path:
    """Draw a clustering of points: embedding by cluster, affinity in block order, angles between found subspaces.

    Of many points an even sample is drawn: 5,000 in the embedding and 400 of the affinity at most. A method that
    learnt by steps gets its loss and the step where it stopped as a fourth picture.

    Parameters
    ----------
    X : array of shape (n, d)
    labels : array of shape (n,)
        Integers from 0.
    bases : list of arrays (d, rank)
        Orthonormal.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    fitted : estimator, optional
        Its ``affinity_block`` and ``embedding_`` are drawn; without them, absolute cosines of rows, and the rows.
    history : sequence of float or of mappings with "loss", optional
        Losses by step; left out, ``fitted.history_`` or ``fitted.losses_`` if there is one.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = picture_path(path)
    X, labels = np.asarray(X, dtype=np.float64), np.asarray(labels)
    if X.ndim != 2 or labels.shape != X.shape[:1]:
        raise ValueError(f"labels must have one entry a row of X {X.shape}, got shape {labels.shape}")
    losses = _losses(fitted, history)
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        n_panels = 3 + bool(len(losses))
        figure = Figure(figsize=(4.2 * n_panels, 3.8), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, n_panels)
        _draw_points(axes[0], getattr(fitted, "embedding_", X), labels, mpl.colormaps)
        _draw_affinity(figure, axes[1], X, labels, fitted)
        _draw_angles(figure, axes[2], bases)
        if len(losses):
            axes[3].plot(np.arange(1, len(losses) + 1), losses, color="black", linewidth=1)
            axes[3].axvline(len(losses), color="tab:red", linewidth=1, linestyle="--")
            axes[3].set(title=f"Loss; stopped after step {len(losses)}", xlabel="step")
        write_picture(figure, path, dpi=120)
    return path


def _draw_points(axis: Any, embedding: Any, labels: np.ndarray, colormaps: Any) -> None:
    colours = colormaps["tab20" if labels.max() >= 10 else "tab10"]
    rows = _even(len(labels), MAX_POINTS)
    points = _widest(np.asarray(embedding, dtype=np.float64))[rows]
    axis.scatter(*points.T, c=colours(labels[rows] % colours.N), s=6, linewidths=0, alpha=0.7, rasterized=True)
    axis.set(title="Embedding, two widest directions", xlabel="first", ylabel="second", xticks=[], yticks=[])


def _draw_affinity(figure: Any, axis: Any, X: np.ndarray, labels: np.ndarray, fitted: Any) -> None:
    order = np.argsort(labels, kind="stable")
    order = order[_even(len(order), MAX_ROWS)]
    if hasattr(fitted, "affinity_block"):
        W, name = np.asarray(fitted.affinity_block(order), dtype=np.float64), "affinity, share of its 99 % quantile"
        positive = W[W > 0]
        W = np.minimum(W / (np.quantile(positive, 0.99) if len(positive) else 1), 1)
    else:
        norms = np.linalg.norm(X[order], axis=1, keepdims=True)
        D = X[order] / np.where(norms > 0, norms, 1)
        W, name = np.abs(D @ D.T), "absolute cosine of two rows"
    shown = axis.imshow(W, vmin=0, vmax=1, cmap="Greys", interpolation="nearest")
    for edge in np.flatnonzero(np.diff(labels[order])) + 0.5:
        axis.axhline(edge, color="tab:red", linewidth=0.5)
        axis.axvline(edge, color="tab:red", linewidth=0.5)
    axis.set(title="Affinity, by cluster", xticks=[], yticks=[])
    figure.colorbar(shown, ax=axis, label=name)


def _draw_angles(figure: Any, axis: Any, bases: list[np.ndarray]) -> None:
    shown = axis.imshow(basis_angles(bases), vmin=0, vmax=90, cmap="viridis", interpolation="nearest")
    axis.set(title="Smallest angle between subspaces", xlabel="cluster", ylabel="cluster")
    if len(bases) <= 20:
        axis.set(xticks=range(len(bases)), yticks=range(len(bases)))
    figure.colorbar(shown, ax=axis, label="degrees")


def _losses(fitted: Any, history: Any) -> np.ndarray:
    """Return the losses by step (steps,), or none."""
    if history is None:
        history = getattr(fitted, "history_", getattr(fitted, "losses_", ()))
    values = [step.get("loss") if hasattr(step, "get") else step for step in history]
    return np.array([float(v) for v in values if v is not None])
