"""Pictures of language models of planes: losses beside one another, what a prediction depends on, angles of planes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import write_picture

from .grassmann_lm import GrassmannLM
from .grassmann_report import layer_plane_angles, token_influence


def plot_losses(losses: Mapping[str, Sequence[float | int]], path: Path | str, *, window: int = 20) -> Path:
    """Draw the training losses of several models over updates, each a running mean.

    Parameters
    ----------
    losses : mapping of str to sequence of float
        Nats a token, as :func:`polyspan.nn.train_next_token` returns them.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    window : int, default=20
        Updates a mean is taken over; fewer where a model has fewer.

    Raises
    ------
    ValueError
        There is nothing to draw.
    """
    if not losses or not all(len(values) for values in losses.values()) or window < 1:
        raise ValueError("losses must hold at least one loss a model, and window be at least 1")
    figure, (panel,) = _figure(1)
    for name, values in losses.items():
        width = min(window, len(values))
        mean = np.convolve(np.asarray(values, dtype=float), np.ones(width) / width, mode="valid")
        panel.plot(np.arange(width, len(values) + 1), mean, label=name)
    panel.set(xlabel="updates", ylabel="loss, nats a token")
    panel.legend(frameon=False)
    return _write(figure, path)


def plot_reach(model: GrassmannLM, ids: Any, path: Path | str) -> Path:
    """Draw how the last prediction depends on tokens before it, and how planes turn in each layer.

    Parameters
    ----------
    model : GrassmannLM
    ids : Tensor of shape (b, t), integers
        Texts longer than the largest offset and one more; better a little longer than the receptive field.
    path : path
        As in :func:`plot_losses`.
    """
    influence = token_influence(model, ids).double().mean(dim=0).cpu().numpy()[::-1]
    layers = layer_plane_angles(model, ids)
    figure, (left, right) = _figure(2)
    places = np.arange(len(influence))
    shown = influence > 0
    left.semilogy(places[shown], influence[shown], "o", markersize=3)
    left.axvline(model.receptive_field, color="0.5", linestyle="--", label="receptive field")
    left.set(xlabel="tokens before the last", ylabel="length of the gradient")
    left.legend(frameon=False)
    for number, layer in enumerate(layers, 1):
        degrees = np.rad2deg(layer.angles.double().cpu().numpy())
        order = np.argsort(layer.offsets)
        right.plot(np.array(layer.offsets)[order], degrees.mean(axis=1)[order], "o-", label=f"layer {number}")
    right.set(xlabel="offset", ylabel="turn of the plane to the next token, degrees", ylim=(0, 90))
    right.legend(frameon=False)
    return _write(figure, path)


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * panels, 3.2), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _write(figure: Any, path: Path | str) -> Path:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "polyspan"}):
        return write_picture(figure, path)
