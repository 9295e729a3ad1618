"""Pictures of points clustered into subspaces: affinity by cluster, angles between subspaces, embedding."""

from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from polyspan.io import picture_path, write_picture

from .plots import MAX_ROWS, _even, draw_angles, draw_points


def plot_subspaces(
    X: Any,
    labels: Any,
    bases: list[np.ndarray],
    path: Path | str,
    *,
    fitted: Any = None,
    history: Any = None,
    seed: int = 0,
    label: str = "",
) -> Path:
    """Draw a clustering of points: embedding by cluster, affinity in block order, angles between found subspaces.

    Of many points an even sample is drawn: 5,000 in the embedding and 400 of the affinity at most. A mixture gets three
    further pictures: variances of its components, ranks of its denoiser's Jacobian by noise level, and, where rows
    suffice, agreement of subspaces of two halves of at most 4,000 rows, which are fitted for it. A method that learnt
    by steps gets its loss and the step where it stopped.

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
        Its ``affinity_block`` or ``affinity_matrix_``, and its ``embedding_`` are drawn; without them, absolute cosines
        of rows, and the rows.
    history : sequence of float or of mappings with "loss", and "stage" where there are several, optional
        Losses by step; left out, ``fitted.history_`` or ``fitted.loss_curve_`` if there is one.
    seed : int
        Of the noise and the halves of a mixture.
    label : str
        Shown with progress of the work for a mixture, on stderr; empty shows nothing.
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
        more = _of_mixture(fitted, X, seed, label) if hasattr(fitted, "spectra_") else []
        n_panels = 3 + len(more) + bool(len(losses))
        figure = Figure(figsize=(4.2 * n_panels, 3.8), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, n_panels)
        draw_points(axes[0], getattr(fitted, "embedding_", X), labels)
        _draw_affinity(figure, axes[1], X, labels, fitted)
        draw_angles(figure, axes[2], bases)
        for axis, (draw, what) in zip(axes[3:], more, strict=False):
            draw(axis, what)
        if len(losses):
            _draw_losses(axes[-1], losses)
        write_picture(figure, path, dpi=120)
    return path


def _of_mixture(fitted: Any, X: np.ndarray, seed: int, label: str) -> list[tuple[Any, Any]]:
    """Return what draws and what is drawn of a mixture."""
    from ._low_rank_studies import mixture_profile, mixture_sufficiency
    from .low_rank_plots import draw_halves, draw_profile, draw_spectra

    parts = [
        (draw_spectra, fitted),
        (draw_profile, mixture_profile(fitted, seed=seed, label=label and f"{label}: ranks")),
    ]
    halves = mixture_sufficiency(fitted, X, seed=seed, label=label and f"{label}: halves")
    return parts if halves is None else [*parts, (draw_halves, halves)]


def _draw_affinity(figure: Any, axis: Any, X: np.ndarray, labels: np.ndarray, fitted: Any) -> None:
    order = np.argsort(labels, kind="stable")
    order = order[_even(len(order), MAX_ROWS)]
    W = _affinity_of(fitted, order)
    if W is not None:
        name, positive = "affinity, share of its 99 % quantile", W[W > 0]
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


def _affinity_of(fitted: Any, rows: np.ndarray) -> np.ndarray | None:
    """Return the affinity (rows, rows) that was clustered, where the method has one."""
    if hasattr(fitted, "affinity_block"):
        return np.asarray(fitted.affinity_block(rows), dtype=np.float64)
    whole = getattr(fitted, "affinity_matrix_", None)
    return whole[rows][:, rows].toarray().astype(np.float64) if sp.issparse(whole) else None


def _losses(fitted: Any, history: Any) -> list[tuple[str, float]]:
    """Return stage and loss of every step that has one, the stage empty where none is told."""
    if history is None:
        history = getattr(fitted, "history_", getattr(fitted, "loss_curve_", ()))
    steps = [(str(s.get("stage", "")), s.get("loss")) if hasattr(s, "get") else ("", s) for s in history]
    return [(stage, float(loss)) for stage, loss in steps if loss is not None]


def _draw_losses(axis: Any, losses: list[tuple[str, float]]) -> None:
    """Draw each stage's loss, which is a number of its own kind, as a curve of its own; far apart on a log scale."""
    values = np.array([loss for _, loss in losses])
    stages = list(dict.fromkeys(stage for stage, _ in losses))
    for stage in stages:
        steps = np.array([number for number, (name, _) in enumerate(losses) if name == stage])
        colour = {} if len(stages) > 1 else {"color": "black"}
        axis.plot(steps + 1, values[steps], linewidth=1, marker="." if len(steps) < 20 else "", label=stage, **colour)
    axis.axvline(len(losses), color="tab:red", linewidth=1, linestyle="--")
    axis.set(title=f"Loss; stopped after step {len(losses)}", xlabel="step")
    known = values[np.isfinite(values)]
    if len(known) and known.min() > 0 and known.max() > 100 * known.min():
        axis.set_yscale("log")
    if len(stages) > 1:
        axis.legend(frameon=False, fontsize=7)
