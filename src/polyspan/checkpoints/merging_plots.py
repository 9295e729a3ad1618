"""Picture of a merge: how entropy fell while the mask was learnt, and what each task gained beside other merges."""

from pathlib import Path

import numpy as np

from polyspan.io import atomic_path

from .concrete_merging import ConcreteMerger, MergeReport

SUFFIXES = (".svg", ".png", ".pdf")
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

    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path must end in .svg, .png or .pdf, got {path}")
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
        kept = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {"Software": None}}
        with atomic_path(path) as temp:
            figure.savefig(temp, format=path.suffix.lstrip("."), metadata=kept[path.suffix])
    return path
