"""Which representation of rotations a small network learns best on rows of one's own."""

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from polyspan.errors import NotConverged
from polyspan.io import picture_path, write_picture
from polyspan.run import layers_draw_from, pick_device, progress, torch_generator

from ._rotation_input import read_matrix
from .rotation_distance import RotationErrors, chordal_loss, rotation_errors
from .rotation_head import SIZES, RotationHead


class ComparedRepresentation(NamedTuple):
    """What networks with one representation came to on rows held out.

    ``trials`` holds the errors of each seed, ``mean``, ``median``, ``p99`` and ``max`` their averages over the seeds in
    degrees, and ``spread`` the standard deviation of ``mean`` over them, 0 for one seed.
    """

    representation: str
    mean: float
    median: float
    p99: float
    max: float
    spread: float
    trials: tuple[RotationErrors, ...]


def compare_representations(
    X: Any,
    R: Any,
    representations: Sequence[str] = tuple(SIZES),
    *,
    seeds: int = 3,
    hidden: Sequence[int] = (128, 128),
    max_iter: int = 100,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    held_out: float = 0.2,
    device: str = "cpu",
    label: str = "",
) -> list[ComparedRepresentation]:
    """Train the same network with each representation of its output, and measure the angles on rows held out.

    For every seed all networks get the same split, the same batches, the same hidden layers to start from, and the same
    number of steps; the loss is :func:`chordal_loss`. Look at the largest errors before the mean: those of
    discontinuous representations are rare and near half a turn.
    Source: catalogue entry ``rotation-continuity``.

    Parameters
    ----------
    X : array of shape (n, d)
        Rows; each column is brought to mean 0 and deviation 1 on the training part.
    R : array of shape (n, 3, 3)
        Rotation that belongs to each row.
    representations : sequence of {"6d", "5d", "9d", "quaternion", "axis-angle", "euler"}
    seeds : int
        Splits and starts.
    hidden : sequence of int
        Widths of the hidden layers, with ReLU.
    max_iter : int
        Passes over the training rows.
    batch_size : int
    learning_rate : float
        Of Adam, falling to 0 on a cosine.
    held_out : float
        Share of the rows that errors are measured on.
    device : str
    label : str
        Shown with progress on stderr; empty shows nothing.

    Returns
    -------
    list of ComparedRepresentation
        The smallest mean first.

    Raises
    ------
    ValueError
        A setting is out of range, rows do not pair up, a value is not finite, or a matrix is no rotation.
    NotConverged
        A loss is no longer finite.
    """
    names = list(dict.fromkeys(representations))
    unknown = [name for name in names if name not in SIZES]
    if unknown or not names:
        raise ValueError(f"representations must be some of {tuple(SIZES)}, got {unknown or 'none'}")
    counts = {"seeds": seeds, "max_iter": max_iter, "batch_size": batch_size}
    counts |= {f"hidden[{i}]": width for i, width in enumerate(hidden)}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be finite and above 0, got {learning_rate!r}")
    rows, targets = np.asarray(X, dtype=np.float64), np.asarray(R, dtype=np.float64)
    if rows.ndim != 2 or targets.shape != (len(rows), 3, 3):
        raise ValueError(f"X and R must be (n, d) and (n, 3, 3), got shapes {rows.shape} and {targets.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"X must be finite, got NaN or infinity at row {int(np.argwhere(~np.isfinite(rows))[0, 0])}")
    read_matrix(targets, False, True, size=3)
    n_held = round(held_out * len(rows))
    if not 0 < held_out < 1 or n_held < 1 or n_held == len(rows):
        raise ValueError(f"held_out must leave rows on both sides of {len(rows)}, got {held_out!r}")
    place = pick_device(device)
    found: dict[str, list[RotationErrors]] = {name: [] for name in names}
    for seed, name in progress([(s, n) for s in range(seeds) for n in names], label=label):
        order = torch.randperm(len(rows), generator=torch_generator(seed)).numpy()
        held, kept = order[:n_held], order[n_held:]
        mean, spread = rows[kept].mean(axis=0), rows[kept].std(axis=0)
        scaled = (rows - mean) / np.where(spread > 0, spread, 1)
        x, y = (torch.as_tensor(a, dtype=torch.float32, device=place) for a in (scaled, targets))
        network = _trained(x[kept], y[kept], name, list(hidden), max_iter, batch_size, learning_rate, seed)
        with torch.no_grad():
            found[name].append(rotation_errors(network(x[held]).double(), y[held].double()))
    made = [_summary(name, trials) for name, trials in found.items()]
    return sorted(made, key=lambda row: row.mean)


def _trained(
    x: torch.Tensor,
    y: torch.Tensor,
    representation: Any,
    hidden: list[int],
    max_iter: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> nn.Module:
    """Train one network; equal seeds draw equal hidden layers and equal batches whatever the representation."""
    generator = torch_generator(seed + 1)
    layers: list[nn.Module] = []
    widths = [x.shape[1], *hidden]
    with layers_draw_from(generator):
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
    head = RotationHead(widths[-1], representation, check=False, generator=torch_generator(seed + 2))
    network = nn.Sequential(*layers, head).to(x.device)
    steps = max_iter * -(-len(x) // batch_size)
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(max_iter):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
            optimiser.zero_grad(set_to_none=True)
            loss = chordal_loss(network(x[rows]), y[rows])
            loss.backward()
            optimiser.step()
            schedule.step()
    if not bool(torch.isfinite(loss)):
        raise NotConverged(f"training with {representation} left the finite numbers: lower learning_rate")
    return network.eval()


def _summary(name: str, trials: list[RotationErrors]) -> ComparedRepresentation:
    numbers = np.array([trial[:4] for trial in trials])
    mean, median, p99, largest = (float(value) for value in numbers.mean(axis=0))
    return ComparedRepresentation(name, mean, median, p99, largest, float(numbers[:, 0].std()), tuple(trials))


def plot_representations(rows: Sequence[ComparedRepresentation], path: Path | str) -> Path:
    """Draw mean, 99th percentile and largest error of each representation, with a mark for every seed.

    Parameters
    ----------
    rows : sequence of ComparedRepresentation
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The suffix is another one, or there is nothing to draw.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    if not rows:
        raise ValueError("rows must hold at least one representation, got none")
    places = np.arange(len(rows))
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(7, 1.2 + 0.45 * len(rows)), layout="constrained")
        axes = figure.subplots()
        shown = (("mean", "#2f855a"), ("p99", "#2b6cb0"), ("max", "#c05621"))
        for i, (name, colour) in enumerate(shown):
            heights = places + (i - 1) * 0.27
            axes.barh(heights, [getattr(row, name) for row in rows], 0.25, color=colour, label=name)
            for height, row in zip(heights, rows, strict=True):
                values = [getattr(trial, name) for trial in row.trials]
                axes.plot(values, [height] * len(values), "|", color="black", markersize=6)
        axes.set(title="Errors on rows held out", xlabel="degrees", yticks=places)
        axes.set_yticklabels([row.representation for row in rows])
        axes.set_xscale("symlog", linthresh=0.1)
        axes.invert_yaxis()
        axes.legend()
        write_picture(figure, path)
    return path
