"""Picture of retrieval while a gallery is embedded again, by the order in which that is done."""

from collections.abc import Mapping
from pathlib import Path

from polyspan.io import picture_path, write_picture

from .backfilling import BackfillCurve

COLOURS = ("#2f855a", "#2b6cb0", "#a0aec0", "#b7791f", "#9b2c2c", "#553c9a")


def plot_backfilling(
    curves: Mapping[str, BackfillCurve],
    path: Path | str,
    *,
    score: str = "mean average precision",
    reference: float | None = None,
) -> Path:
    """Draw the score of retrieval over the share of the gallery that is embedded again, one line an order.

    Parameters
    ----------
    curves : mapping of str to BackfillCurve
        The name of an order to its curve; the area below stands in the legend.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    score : str
        What the curves hold.
    reference : float, optional
        Score to be reached, such as the new model's own; a dashed line.

    Raises
    ------
    ValueError
        The suffix is another one, or there is no curve.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    if not curves:
        raise ValueError("curves must hold at least one curve, got none")
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.subplots()
        for i, (name, curve) in enumerate(curves.items()):
            label = f"{name}, area {curve.area:.3f}"
            axes.plot(curve.shares, curve.scores, marker=".", color=COLOURS[i % len(COLOURS)], label=label)
        if reference is not None:
            axes.axhline(reference, color="#4a5568", linestyle="--", linewidth=1, label=f"reference {reference:.3f}")
        axes.set(xlabel="share of the gallery embedded again", ylabel=score)
        axes.legend()
        write_picture(figure, path)
    return path
