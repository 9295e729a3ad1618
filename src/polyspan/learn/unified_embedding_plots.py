"""Picture of which features share rows of one embedding table, and how much their readers see of one another."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from polyspan.io import picture_path, write_picture

from .unified_embedding import Collisions

SHOWN = 40


def plot_collisions(report: Mapping[str, Collisions], overlap: np.ndarray, path: Path | str) -> Path:
    """Draw collisions by feature as bars, and the overlap of readers as a map.

    Parameters
    ----------
    report : mapping of str to Collisions
        Of ``collision_report``; the first 40 features are shown.
    overlap : ndarray of shape (T, T)
        Of ``reader_overlap``, in the same order.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The suffix is another one, or the overlap has another size.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    if overlap.shape != (len(report), len(report)):
        raise ValueError(f"overlap must be {len(report)} by {len(report)}, got shape {overlap.shape}")
    names = list(report)[:SHOWN]
    places = np.arange(len(names))
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(9, 1.6 + 0.28 * max(len(names), 6)), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.barh(
            places - 0.2, [report[n].same_share for n in names], 0.4, color="#c05621", label="among its own values"
        )
        left.barh(
            places + 0.2, [report[n].others_share for n in names], 0.4, color="#a0aec0", label="with other features"
        )
        labels = [f"{n} ({report[n].n_values:,})" for n in names]
        left.set(title="Rows shared, by feature", xlabel="share", xlim=(0, 1), yticks=places, yticklabels=labels)
        left.invert_yaxis()
        left.legend(loc="lower right")
        shown = right.imshow(overlap[: len(names), : len(names)], vmin=0, vmax=1, cmap="viridis")
        right.set(title="Overlap of readers", xticks=places, yticks=places, yticklabels=names)
        right.set_xticks(places, names, rotation=90)
        figure.colorbar(shown, ax=right, shrink=0.8)
        write_picture(figure, path)
    return path
