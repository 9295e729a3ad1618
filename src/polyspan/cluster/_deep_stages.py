"""Stages of deep self-expression: what is checked before them, and when each ends."""

import math
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from polyspan.run import available_memory_bytes

from ._affinity import check_numbers

STAGES = ("pretrain", "express", "structure")
PUBLISHED = {
    "pretrain": "distance",
    "layers": "all",
    "normalize_layers": False,
    "train_encoder": True,
    "zero_diagonal": False,
    "solver": "adam",
    "tol": 0.0,
    "max_epochs": (100, 180, 520),
    "clustering_refresh": 1,
}
CHOICES = {
    "mode": ("improved", "published"),
    "pretrain": ("reconstruction", "distance", "none"),
    "layers": ("all", "input", "last"),
    "solver": ("auto", "adam", "ridge"),
}
MATRICES, DISTANCES = 7, 5
STILL = 10


class Stages:
    """What happened in each stage: losses, epochs and reasons; ``shown`` is advanced once an epoch."""

    def __init__(self, settings: dict[str, Any], *, least: int, rate_of_tol: float, shown: Any):
        self.settings, self.least, self.tol, self.shown = settings, least, rate_of_tol, shown
        self.history: list[dict[str, Any]] = []
        self.n_epochs: dict[str, int] = {}
        self.stopped_by: dict[str, str] = {}

    def run(self, stage: str, step: Any) -> None:
        """Take steps until the loss stands still; ``step`` returns it, and True where it wants to end by itself."""
        most, tol = int(self.settings["max_epochs"][STAGES.index(stage)]), float(self.settings["tol"])
        tol *= 0.1 if stage == "pretrain" else 1
        before, by, epoch, still = math.nan, "max_epochs", 0, 0
        for epoch in range(1, most + 1):
            loss, done = step(epoch)
            self.history.append({"stage": stage, "epoch": epoch, "loss": loss})
            self.shown.advance()
            if not math.isfinite(loss):
                by = "diverged"
                warnings.warn(f"the loss of stage {stage!r} is no longer finite at epoch {epoch}", stacklevel=5)
                break
            if done:
                by = "labels"
                break
            # Where Adam overshoots, the loss stands still for an epoch and then goes on.
            still = still + 1 if abs(before - loss) <= tol * abs(before) else 0
            if epoch >= self.least and tol > 0 and still >= STILL:
                by = "tolerance"
                break
            before = loss
        self.n_epochs[stage], self.stopped_by[stage] = epoch if most else 0, by
        # How far pre-training came its error says.
        if by == "max_epochs" and most and tol > 0 and stage != "pretrain":
            way = ", or use solver='ridge'" if stage == "express" and not self.settings["train_encoder"] else ""
            warnings.warn(
                f"stage {stage!r} took all of its {most} epochs and its loss did not stand still: raise "
                f"max_epochs[{STAGES.index(stage)}], or tol={self.tol:g}{way}",
                ConvergenceWarning,
                stacklevel=5,
            )

    def closed_form(self, loss: float) -> None:
        """Note that expressing took no steps."""
        self.history.append({"stage": "express", "epoch": 1, "loss": loss})
        self.n_epochs["express"], self.stopped_by["express"] = 1, "closed form"


def as_numbers(X: Any) -> Any:
    """Make a list of images one array, and refuse what is neither rows nor images, or is points in time.

    Points in time become numbers without a word otherwise.
    """
    if isinstance(X, list | tuple) and len(X) and np.ndim(X[0]) >= 2:
        shapes = sorted({np.shape(image) for image in X})
        if len(shapes) > 1:
            raise ValueError(f"X must hold images of one size, got {shapes[0]} and {shapes[1]}")
        X = np.asarray(X)
    if getattr(X, "ndim", 2) > 4:
        raise ValueError(f"X must be rows (n, D) or images (n, h, w) or (n, channels, h, w), got shape {X.shape}")
    check_numbers(X)
    if getattr(X, "ndim", 2) == 4 and X.shape[3] in (1, 3, 4) and X.shape[1] not in (1, 3, 4):
        warnings.warn(
            f"X of shape {X.shape} is taken as {X.shape[1]} channels of {X.shape[2]} by {X.shape[3]} pixels; images "
            "with channels last must be transposed first",
            stacklevel=4,
        )
    return X


def check_shape(shape: Any) -> None:
    """Refuse an ``image_shape`` that is none."""
    if shape is not None and not (_listed(shape) and len(shape) in (2, 3) and all(_whole(side, 1) for side in shape)):
        raise ValueError(f"image_shape must be (h, w) or (channels, h, w) in whole numbers, got {shape!r}")


def checked(estimator: Any, n: int) -> dict[str, Any]:
    """Look at the parameters of an estimator for n rows, and return those that a mode may override."""
    for name in ("n_clusters", "subspace_dim", "n_init", "clustering_refresh"):
        if not _whole(getattr(estimator, name), 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(estimator, name)!r}")
    if not _whole(estimator.min_epochs, 0):
        raise ValueError(f"min_epochs must be a whole number of at least 0, got {estimator.min_epochs!r}")
    for name, among in CHOICES.items():
        if getattr(estimator, name) not in among:
            raise ValueError(f"{name} must be one of {among}, got {getattr(estimator, name)!r}")
    encoder = estimator.encoder
    if not (isinstance(encoder, torch.nn.Module) or encoder in ("auto", "conv", "none")):
        raise ValueError(f"encoder must be 'auto', 'conv', 'none' or a Module, got {encoder!r}")
    for name in ("learning_rate", "ridge"):
        value = getattr(estimator, name)
        if not (isinstance(value, Real) and 0 < value < math.inf):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    if not (isinstance(estimator.tol, Real) and 0 <= estimator.tol < 1):
        raise ValueError(f"tol must lie in [0, 1), got {estimator.tol!r}")
    for name, least, count in (("max_epochs", 0, 3), ("channels", 1, None), ("kernels", 1, None)):
        value = getattr(estimator, name)
        if value is None and count is None:
            continue
        if not (_listed(value) and all(_whole(v, least) for v in value) and len(value) == (count or len(value)) > 0):
            words = "three whole numbers" if count else "one or more whole numbers"
            raise ValueError(f"{name} must be {words} of at least {least}, got {value!r}")
    if estimator.n_clusters > n:
        raise ValueError(f"n_clusters must be at most the number of rows, {n}, got {estimator.n_clusters}")
    if estimator.subspace_dim >= n:
        raise ValueError(f"subspace_dim must be below the number of rows, {n}, got {estimator.subspace_dim}")
    settings = {name: getattr(estimator, name) for name in PUBLISHED}
    if estimator.mode == "published":
        settings |= PUBLISHED
    if settings["solver"] == "ridge" and settings["train_encoder"]:
        raise ValueError("solver must be 'adam' or 'auto' where train_encoder=True, got 'ridge'")
    return settings


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)


def check_rows(X: np.ndarray, k: int, d: int, *, unit: bool) -> None:
    """Refuse a row without direction where rows are brought to ``unit`` length, and warn of what fills the cut."""
    n = len(X)
    if k * d > n:
        warnings.warn(
            f"{n} rows in {k} clusters are fewer than subspace_dim={d} a cluster: columns of the affinity reach into "
            "other clusters",
            stacklevel=3,
        )
    empty = ~X.any(axis=1)
    if unit and empty.any():
        row = int(empty.argmax())
        raise ValueError(f"X must have no all-zero row when normalize_layers=True, got one at row {row}")
    _, counts = np.unique(X, axis=0, return_counts=True)
    if counts.max() > d:
        warnings.warn(
            f"a row stands {counts.max()} times in X: its copies fill the {d} entries that a column keeps", stacklevel=3
        )


def check_memory(n: int, width: int, itemsize: int, *, solver: str, streamed: bool, settings: dict[str, Any]) -> None:
    """Refuse what would not fit into memory, in words, before anything of that size is made.

    ``width`` is how many numbers a point has in the layers that are expressed.
    """
    free = available_memory_bytes()
    if streamed:
        # The layers, twice, and three times in float64: rows, factors, and what the expression leaves.
        needed = n * width * (2 * itemsize + 24)
        if needed > free:
            raise ValueError(
                f"X must have few enough numbers for 5 arrays of n by {width}: {n} rows need {needed:,} bytes, "
                f"{free:,} are free; layers='input' is narrower, and so are leading directions of X"
            )
        return
    needed = MATRICES * n * n * itemsize
    if needed > free:
        if settings["train_encoder"]:
            way = "train_encoder=False, where solver='ridge' needs no such matrix"
        elif n <= width:
            way = (
                f"where points outnumber the {width} numbers that a point has in the layers expressed, solver='ridge' "
                "needs no such matrix: take layers='input', or leading directions of X"
            )
        else:
            way = "solver='ridge' needs no such matrix" if solver == "adam" else "sparse subspace clustering takes more"
        raise ValueError(
            f"X must have few enough rows for {MATRICES} matrices of n by n: {n} rows need {needed:,} bytes, "
            f"{free:,} are free; {way}"
        )


def check_distances(n: int, n_layers: int, itemsize: int) -> None:
    """Refuse pre-training by distances of all pairs where they do not fit into memory."""
    needed, free = DISTANCES * n_layers * n * n * itemsize, available_memory_bytes()
    if needed > free:
        raise ValueError(
            f"pretrain must be 'reconstruction' or 'none' for {n} rows: distances of all pairs in {n_layers} layers "
            f"need {needed:,} bytes, {free:,} are free"
        )
