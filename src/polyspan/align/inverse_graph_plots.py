"""Picture of a gallery before and after its hubs are taken out."""

from pathlib import Path

import numpy as np

from polyspan.io import picture_path, write_picture

from .inverse_graph import Hubness


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
