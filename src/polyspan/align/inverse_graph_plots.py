"""Pictures of a gallery before and after its hubs are taken out, and of several ways to do so."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polyspan.io import picture_path, write_picture

from .inverse_graph import Hubness
from .retrieval_report import ComparedCorrection


def plot_hubness(before: Hubness, after: Hubness, path: Path | str) -> Path:
    """Draw how often items are returned, by rank and as a histogram, before and after a correction.

    Parameters
    ----------
    before, after : Hubness
        Of the same queries with the gallery as it was and as it is.
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
    arms = (("before", before, "#a0aec0"), ("after", after, "#2f855a"))
    most = int(max(before.occurrences.max(), after.occurrences.max(), 1))
    bins = np.unique(np.concatenate([[0, 1], np.geomspace(1, most + 1, 24)]).round()) - 0.5
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, found, colour in arms:
            counts = np.sort(found.occurrences)[::-1]
            # A line of a million points says no more than one of a thousand.
            shown = np.unique(np.geomspace(1, len(counts), 1000).astype(int)) - 1
            left.plot(shown + 1, counts[shown], color=colour, label=f"{name}, skewness {found.skewness:.2f}")
            right.hist(found.occurrences, bins=bins, color=colour, alpha=0.7, label=name)
        left.set(title="Most returned items", xlabel="rank of the item", ylabel="lists that hold it", xscale="log")
        left.legend()
        right.set(title="Items by occurrence", xlabel="lists that hold an item", ylabel="items", yscale="log")
        right.set_xscale("symlog", linthresh=1)
        right.legend()
        write_picture(figure, path)
    return path


def plot_corrections(rows: Sequence[ComparedCorrection], path: Path | str) -> Path:
    """Draw recall and hubness of corrections that were compared, one under the other.

    Parameters
    ----------
    rows : sequence of ComparedCorrection
        Of :func:`compare_corrections`; all with the same ks.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The suffix is another one, or there is nothing to draw.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    if not rows:
        raise ValueError("rows must hold at least one correction, got none")
    colours = {"nothing": "#a0aec0", "vectors": "#2f855a", "scores": "#2b6cb0"}
    marks = ("o", "s", "D", "^", "v", "P")
    places = np.arange(len(rows))[::-1]
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(9, 1.2 + 0.34 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for y, row in zip(places, rows, strict=True):
            found = list(row.report.recall.items())
            left.plot([value for _, value in found], [y] * len(found), color=colours[row.changes], linewidth=1)
            for i, (_, value) in enumerate(found):
                left.plot(value, y, marks[i % len(marks)], color=colours[row.changes])
            right.barh(y, row.report.hubness.skewness, color=colours[row.changes], height=0.6)
        for i, k in enumerate(rows[0].report.recall):
            left.plot([], [], marks[i % len(marks)], color="#4a5568", label=f"recall@{k}")
        for kind in dict.fromkeys(row.changes for row in rows):
            right.barh(0, 0, color=colours[kind], label=f"changes {kind}")
        left.set(title="Queries with an answer in their list", xlabel="share of queries")
        left.set_yticks(places, [row.name for row in rows])
        left.legend(loc="best")
        right.axvline(0, color="#4a5568", linewidth=0.8)
        right.set(title="Hubness", xlabel="skewness of occurrences")
        right.legend(loc="best")
        write_picture(figure, path)
    return path
