"""What commands on pictures share: how pictures are read, and how results are named."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ._output import check_target

Out = Annotated[Path, Parameter(name=("--out", "-o"))]


def read_pictures(source: Path) -> Any:
    """Return pictures (n, h, w) or (n, channels, h, w), at least one."""
    from polyspan.io import read_array

    X = read_array(source, ndim=None)
    if X.ndim not in (3, 4) or 0 in X.shape:
        raise ValueError(
            "pictures must be (n, h, w) or (n, channels, h, w), at least one and of at least one pixel, "
            f"got shape {X.shape} in {source}"
        )
    return X


def check_drawing(path: Path | None, option: str) -> None:
    """Refuse where a drawing cannot go by its name, before any work."""
    check_target(path, option, ".svg", ".png", ".pdf")


def count_to_measure(n: int, held_out: float, *, least: int, why: str) -> int:
    """Return how many of n pictures are kept for measuring: a share, at least one, with ``least`` left to train on."""
    import math

    if not 0 < held_out < 1:
        raise ValueError(f"--held-out must be between 0 and 1, got {held_out}")
    if n <= least:
        raise ValueError(f"there must be at least {least + 1} pictures, one to measure on and {why}, got {n}")
    return min(math.ceil(held_out * n), n - least)
