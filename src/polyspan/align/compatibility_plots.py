"""Picture of a chain of models: who may search whose index."""

from pathlib import Path

import numpy as np

from polyspan.io import picture_path, write_picture

from .compatibility import CompatibilityMatrix


def plot_compatibility(matrix: CompatibilityMatrix, path: Path | str, names: list[str] | None = None) -> Path:
    """Draw a compatibility matrix: the score of each model's queries in each gallery, and whether it is an improvement.

    A tick stands where queries of the newer model find more in a gallery than those of the gallery's own model.

    Parameters
    ----------
    matrix : CompatibilityMatrix
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    names : list of T str, optional
        Of the models, oldest first; their numbers where left out.

    Raises
    ------
    ValueError
        The suffix is another one, or there is not one name a model.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path, C = picture_path(path), matrix.scores
    shown = [f"model {i + 1}" for i in range(len(C))] if names is None else list(names)
    if len(shown) != len(C):
        raise ValueError(f"names must hold one name a model ({len(C)}), got {len(shown)}")
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        side = 2.4 + 0.8 * len(C)
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(np.ma.masked_invalid(C), cmap="viridis", vmin=0, vmax=1)
        for i in range(len(C)):
            for j in range(i + 1):
                mark = "" if i == j else " ✓" if C[i, j] > C[j, j] else " ✗"
                ink = "black" if C[i, j] > 0.55 else "white"
                axes.text(j, i, f"{C[i, j]:.2f}{mark}", ha="center", va="center", color=ink)
        axes.set_xticks(range(len(C)), shown)
        axes.set_yticks(range(len(C)), shown)
        share = "" if np.isnan(matrix.average_compatibility) else f"compatible {matrix.average_compatibility:.0%}, "
        axes.set(title=f"{share}mean {matrix.average_score:.3f}", xlabel="gallery of", ylabel="queries of")
        figure.colorbar(image, ax=axes, label=matrix.metric)
        write_picture(figure, path)
    return path
