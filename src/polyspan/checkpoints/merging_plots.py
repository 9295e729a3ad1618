"""Pictures of a merge: how its mask was learnt, what each task gained, and what it carries of each task's change."""

from pathlib import Path

import numpy as np

from polyspan.io import picture_path, write_picture

from .concrete_merging import ConcreteMerger, MergeReport
from .merge_geometry import MergeGeometry

SMOOTHED = 25


def plot_merge(merger: ConcreteMerger, report: MergeReport, path: Path | str) -> Path:
    """Draw the entropy by step, as it is and as a mean of 25 steps, and accuracy by task for each way of merging.

    Parameters
    ----------
    merger : ConcreteMerger
        After ``fit``.
    report : MergeReport
        Of its ``evaluate``.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The suffix is another one.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    tasks = list(next(iter(report.accuracy.values())))
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 2))
        for name, colour in (("mask", "#2b6cb0"), ("weights", "#c05621")):
            entropy = np.asarray(merger.history_[name])
            if len(entropy):
                width = min(SMOOTHED, len(entropy))
                left.plot(np.arange(1, len(entropy) + 1), entropy, color=colour, alpha=0.3)
                smooth = np.convolve(entropy, np.full(width, 1 / width), mode="valid")
                left.plot(np.arange(width, len(entropy) + 1), smooth, color=colour, label=name)
        left.set(title="Entropy of predictions", xlabel="step", ylabel="mean over tasks, nats")
        left.legend()
        wide = 0.8 / len(report.accuracy)
        for i, (method, found) in enumerate(report.accuracy.items()):
            places = np.arange(len(tasks)) + (i - (len(report.accuracy) - 1) / 2) * wide
            label = f"{method}, mean {report.mean(method):.1%}"
            right.bar(places, [found[task] for task in tasks], wide, label=label)
        right.set(title="Accuracy on labelled items", ylim=(0, 1))
        right.set_xticks(range(len(tasks)), tasks)
        right.legend(loc="lower right", fontsize=7)
        return write_picture(figure, path)


def plot_merge_geometry(found: MergeGeometry, path: Path | str) -> Path:
    """Draw the cosines between tasks' changes, and the share of each that the merge carries, tensor by tensor.

    Parameters
    ----------
    found : MergeGeometry
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The suffix is another one.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    T, m = found.carried.shape
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(10, max(3.2, 1.6 + 0.35 * T)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 2))
        image = left.imshow(found.cosines, vmin=-1, vmax=1, cmap="RdBu_r")
        for i in range(T):
            for j in range(T):
                value = found.cosines[i, j]
                left.text(j, i, f"{value:.2f}", ha="center", va="center", color="w" if abs(value) > 0.6 else "k")
        left.set(title="Cosine between changes")
        left.set_xticks(range(T), found.tasks, rotation=45, ha="right")
        left.set_yticks(range(T), found.tasks)
        figure.colorbar(image, ax=left, shrink=0.8)
        image = right.imshow(found.carried, vmin=-0.25, vmax=1.25, cmap="viridis", aspect="auto", interpolation="none")
        right.set(title="Share of each task's change that the merge carries", xlabel="tensors, in the file's order")
        right.set_yticks(range(T), found.tasks)
        right.set_xlim(-0.5, m - 0.5)
        figure.colorbar(image, ax=right, extend="both")
        return write_picture(figure, path)
