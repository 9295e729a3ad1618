"""Pictures of two networks compared unit by unit."""

from pathlib import Path

import numpy as np

from polyspan.io import picture_path, write_picture

from .unit_report import LayerComparison


def plot_comparison(layer: LayerComparison, path: Path | str) -> Path:
    """Draw the correlations in matched order, those of partners and favourites, and the price of few units.

    Left: units of A, best matched first, against their partners in the same order, so that pairs lie on the diagonal;
    units of B without a partner come last and dead units are left out. Middle: correlation with the one-to-one
    partner, with its standard error, and with the favourite, sorted by the favourite; the gap is what sharing costs.
    Right: half mean squared error of the few-to-one mapping by the number of units that it uses.

    Parameters
    ----------
    layer : LayerComparison
        One of ``compare_networks(...).layers``.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = picture_path(path)
    rows, columns = matched_order(layer)
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(11.4, 3.6), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        left, middle, right = figure.subplots(1, 3)
        shown = left.imshow(
            layer.correlations.between[np.ix_(rows, columns)], vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest"
        )
        left.set(title="Correlation, in matched order", xlabel="units of B", ylabel="units of A", xticks=[], yticks=[])
        figure.colorbar(shown, ax=left)
        live = np.flatnonzero(layer.correlations.live_in)
        order = live[np.argsort(-layer.semi.scores[live], kind="stable")]
        middle.plot(layer.semi.scores[order], color="#a0aec0", label="favourite")
        shown = {"fmt": ".", "color": "#2b6cb0", "markersize": 4, "elinewidth": 0.6, "label": "one-to-one partner"}
        errors = np.nan_to_num(layer.bipartite_errors[order])
        middle.errorbar(np.arange(len(order)), layer.bipartite.scores[order], yerr=errors, **shown)
        for (name, value), line in zip(layer.nulls.items(), ("--", ":", "-.", (0, (1, 4))), strict=False):
            middle.axhline(value, color="#c05621", linestyle=line, linewidth=1, label=f"mean of {name}")
        middle.set(title="Unit by unit", xlabel="units of A, by favourite", ylabel="correlation", ylim=(None, 1.02))
        middle.legend(fontsize=7)
        right.plot([row.n_units for row in layer.sparse], [row.half_mse for row in layer.sparse], "o-", color="#2f855a")
        right.axhline(layer.unexplained_single / 2, color="#a0aec0", linestyle="--", label="best single unit")
        right.axhline(0.5, color="black", linewidth=0.6, label="predicts nothing")
        right.set(title="Few to one, held out", xlabel="mean units of A a unit of B", ylabel="half squared error")
        right.set_ylim(bottom=0)
        right.legend(fontsize=7)
        write_picture(figure, path, dpi=120)
    return path


def matched_order(layer: LayerComparison) -> tuple[np.ndarray, np.ndarray]:
    """Return live units of A, best matched first and unmatched last, and live units of B: partners, then the others."""
    found = layer.bipartite
    paired = np.flatnonzero(found.indices >= 0)
    paired = paired[np.argsort(-found.scores[paired], kind="stable")]
    return np.append(paired, found.unmatched_in), np.append(found.indices[paired], found.unmatched_out)
