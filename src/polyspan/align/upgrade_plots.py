"""Picture of an upgrade plan: recall of every way against how much of the store it embeds again."""

from pathlib import Path

from polyspan.io import picture_path, write_picture

from .upgrade_plan import STRATEGIES, UpgradePlan

MARKS = dict(zip(STRATEGIES, "xv^os", strict=True))


def plot_upgrade_plan(plan: UpgradePlan, path: Path | str) -> Path:
    """Draw predicted recall with its interval against the share embedded again, one point a row of the plan.

    A bar of the colour of a point is what is expected among all rows of the store, where the plan tells it.

    Parameters
    ----------
    plan : UpgradePlan
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = picture_path(path)
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        maps = sorted({row.aligner for row in plan.table})
        colours = {name: mpl.colormaps["tab10"](i) for i, name in enumerate(maps)}
        for row in plan.table:
            low, high = row.interval
            axis.errorbar(
                row.share,
                row.recall,
                yerr=[[max(row.recall - low, 0)], [max(high - row.recall, 0)]],
                marker=MARKS[row.strategy],
                color=colours[row.aligner],
                capsize=2,
                linestyle="none",
                label=f"{row.strategy} {row.aligner}".strip() if row.strategy != "backfill" else None,
            )
            if row.store_recall is not None:
                axis.plot(row.share, row.store_recall, marker="_", markersize=12, color=colours[row.aligner])
        best = plan.table[plan.recommended]
        axis.plot(
            best.share, best.recall, marker="o", markersize=14, fillstyle="none", color="black", label="recommended"
        )
        if any(row.store_recall is not None for row in plan.table):
            axis.plot([], [], marker="_", markersize=12, color="grey", linestyle="none", label="expected in the store")
        axis.set(xlabel="share of the store embedded again", ylabel=f"recall@{plan.k}", ylim=(0, 1.05))
        figure.legend(loc="outside right upper", fontsize=7)
        write_picture(figure, path, dpi=120)
    return path
