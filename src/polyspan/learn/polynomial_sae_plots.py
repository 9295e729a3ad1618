"""Pictures of a training of sparse autoencoders, and of the interactions that one has learnt."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from polyspan.io import picture_path, write_picture

from .polynomial_sae import Interactions

SHOWN = 30
POINTS = 300
COLOURS = ("#c05621", "#4a5568", "#2b6cb0", "#6b46c1")


def plot_training(curves: Mapping[str, Sequence[float]], path: Path | str) -> Path:
    """Draw mean squared errors by step, of one autoencoder or several.

    Parameters
    ----------
    curves : mapping of str to sequence of float
        ``loss_curve_`` by name; long ones are averaged to 300 points.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The suffix is another one, or there is no curve.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    if not curves:
        raise ValueError("curves must be at least one, got none")
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(6.5, 3.6), layout="constrained")
        axes = figure.subplots()
        for i, (name, values) in enumerate(curves.items()):
            parts = np.array_split(np.asarray(values, float), min(POINTS, len(values)))
            ends = np.cumsum([len(part) for part in parts])
            axes.plot(ends, [part.mean() for part in parts], color=COLOURS[i % len(COLOURS)], label=name)
        axes.set(title="What reconstructions miss", xlabel="step", ylabel="mean squared length", yscale="log")
        axes.legend()
        return write_picture(figure, path)


def plot_interactions(found: Interactions, path: Path | str) -> Path:
    """Draw the strongest interactions as bars, and the length of each against how often it fires.

    Parameters
    ----------
    found : Interactions
        Of :meth:`PolySAE.interactions`; bars show the first 30.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The suffix is another one, or there is no interaction.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    if not len(found.latents):
        raise ValueError("interactions must be at least one, got none")
    shown = min(SHOWN, len(found.latents))
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(9, 1.6 + 0.2 * max(shown, 12)), layout="constrained")
        left, right = figure.subplots(1, 2)
        places = np.arange(shown)
        labels = [" × ".join(map(str, row)) for row in found.latents[:shown].tolist()]
        left.barh(places, found.strengths[:shown], color=COLOURS[0])
        left.set(title="Strongest of latents that fire together", xlabel="strength", yticks=places, yticklabels=labels)
        left.set_ylabel("latents")
        left.invert_yaxis()
        right.scatter(found.shares, found.norms, s=8, color=COLOURS[2])
        right.set(title="Those listed", xlabel="share of rows in which they fire together", ylabel="length")
        return write_picture(figure, path)


def plot_probes(probes: Mapping[str, tuple[float, float]], path: Path | str) -> Path:
    """Draw F1 and accuracy of probes as bars, by what was probed.

    Parameters
    ----------
    probes : mapping of str to (F1, accuracy)
        Both in [0, 1]; such as of :func:`sparse_probe`, by name.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The suffix is another one, or there is no probe.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    if not probes:
        raise ValueError("probes must be at least one, got none")
    places, high = np.arange(len(probes)), 0.4
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(6.5, 1.4 + 0.5 * max(len(probes), 2)), layout="constrained")
        axes = figure.subplots()
        for i, (name, colour) in enumerate((("F1", COLOURS[0]), ("accuracy", COLOURS[2]))):
            values = [pair[i] for pair in probes.values()]
            axes.barh(places + (i - 0.5) * high, values, high, color=colour, label=name)
        axes.set(title="How well few columns tell labels", xlim=(0, 1), yticks=places, yticklabels=list(probes))
        axes.invert_yaxis()
        axes.legend(loc="lower right")
        return write_picture(figure, path)
