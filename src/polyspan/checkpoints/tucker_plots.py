"""Picture of how well updates of weights compress: as a Tucker core, and as a low-rank matrix."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyspan.io import picture_path, write_picture

from ._tucker import cheapest_ranks, num_parameters


class RankCurve(NamedTuple):
    """Share of an update left out, (m,), by the parameters of its Tucker form and of LoRA's matrix, (m,) each."""

    parameters: np.ndarray
    tucker: np.ndarray
    matrix: np.ndarray


def rank_curve(delta: Tensor, points: int = 12) -> RankCurve:
    """Return the errors of both forms at equal parameters; the matrix has the first axis as rows, as LoRA takes it.

    The matrix form is read between whole ranks, which flatters it.
    """
    shape = tuple(delta.shape)
    matrix = delta.detach().reshape(shape[0], -1).to(torch.float64)
    s2 = torch.linalg.svdvals(matrix).square().numpy()
    total = float(s2.sum()) or 1.0
    per_rank = sum(matrix.shape)
    least = max(num_parameters(shape, [1] * len(shape)), per_rank)
    sizes = np.unique(np.geomspace(least, max(delta.numel(), least), points).astype(int))
    left = np.append(1.0, 1.0 - np.cumsum(s2) / total).clip(0)
    return RankCurve(
        sizes,
        np.array([cheapest_ranks(delta, parameters=int(size))[1] for size in sizes]),
        np.interp(sizes / per_rank, np.arange(len(left)), left),
    )


def plot_rank_curves(curves: Mapping[str, RankCurve], path: Path | str, *, most: int = 12) -> Path:
    """Draw, for each layer, the share left out by parameters: what rank an update needs, and what form suits it.

    Parameters
    ----------
    curves : mapping of str to RankCurve
        By layer; the first ``most`` are drawn.
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
        raise ValueError("curves must hold at least one layer, got none")
    shown: Sequence[str] = list(curves)[:most]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
        axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for axis, name in zip(axes, shown, strict=False):
            curve = curves[name]
            axis.plot(curve.parameters, curve.matrix, color="#a0aec0", label="matrix (LoRA)")
            axis.plot(curve.parameters, curve.tucker, color="#2f855a", label="Tucker core")
            axis.set(title=name, xscale="log", ylim=(0, 1), xlabel="parameters", ylabel="share left out")
        for axis in axes[len(shown) :]:
            axis.set_visible(False)
        axes[0].legend()
        write_picture(figure, path)
    return path
