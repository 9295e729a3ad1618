"""Pictures of what two spaces share, and of what matching in subspaces of each size is worth."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polyspan.io import picture_path, write_picture

from .subspace_reporting import SizeScore, SubspaceReport

COLOURS = {"affine": "#2b6cb0", "local_cka": "#2f855a", "cosine": "#b7791f"}


def plot_subspaces(report: SubspaceReport, table: Sequence[SizeScore], path: Path | str) -> Path:
    """Draw correlations against shuffled pairs, and matching and retrieval by the dimension of the subspace.

    Parameters
    ----------
    report : SubspaceReport
    table : sequence of SizeScore
        Of one number of anchors, see :func:`polyspan.align.scores_by_size`; dashed lines are the full spaces. Empty
        leaves these panels out.
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
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(11 if table else 4.2, 3.2), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, 3 if table else 1))
        steps = np.arange(1, len(report.correlations) + 1)
        panels[0].plot(steps, report.correlations, color="#a0aec0", label="fit")
        panels[0].plot(steps, report.held_out, color="#2f855a", label=f"held out, {report.n_shared} shared")
        panels[0].plot(steps, report.shuffled, color="#c53030", linestyle=":", label="fit to shuffled pairs")
        panels[0].axhline(report.shuffled_held_out, color="#c53030", linewidth=0.7, label="shuffled, held out")
        panels[0].set(title="Canonical correlations", xlabel="direction", ylabel="correlation")
        panels[0].legend()
        for panel, field, title in zip(
            panels[1:], ("top_k", "matching"), ("Found among the first", "One-to-one matching"), strict=False
        ):
            for method in dict.fromkeys(row.method for row in table):
                rows = [row for row in table if row.method == method]
                sized = sorted((row.n_components, getattr(row, field)) for row in rows if row.n_components)
                colour, name = COLOURS.get(method, "#4a5568"), method.replace("_", " ")
                panel.plot(*zip(*sized, strict=True), color=colour, marker="o", markersize=3, label=name)
                for row in rows:
                    if not row.n_components:
                        panel.axhline(
                            getattr(row, field),
                            color=colour,
                            linestyle="--",
                            linewidth=0.8,
                            label=f"{name}, no subspace",
                        )
            panel.set(title=title, xlabel="dimension", ylabel="share of queries", xscale="log", ylim=(0, None))
            panel.legend()
        write_picture(figure, path)
    return path
