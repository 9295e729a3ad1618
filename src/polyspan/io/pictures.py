"""Pictures on the disk: .svg, .png and .pdf, written atomically, with equal bytes for equal drawings."""

from pathlib import Path
from typing import Any

from ._door import PathLike
from .atomic import atomic_path

# What a file would say of the hour and the program that drew it.
UNDATED: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None}, ".png": {"Software": None}, ".pdf": {"CreationDate": None},
}  # fmt: skip


def picture_path(path: PathLike) -> Path:
    """Return the path of a picture that :func:`write_picture` can write: ask before the work that is to be drawn.

    Raises
    ------
    ValueError
        Its suffix is none of .svg, .png and .pdf.
    """
    path = Path(path)
    if path.suffix not in UNDATED:
        raise ValueError(f"path must end in .svg, .png or .pdf, got {path}")
    return path


def write_picture(figure: Any, path: PathLike, *, dpi: float | int | None = None) -> Path:
    """Write a figure of matplotlib atomically, in the format of the suffix, without date and name of the program.

    For equal bytes of .svg set ``svg.hashsalt`` while the figure is made and written.

    Raises
    ------
    ValueError
        The suffix is none of .svg, .png and .pdf.
    UnreadableFile
        The place may not be written to.
    """
    path = picture_path(path)
    with atomic_path(path) as temp:
        figure.savefig(temp, dpi=dpi or "figure", format=path.suffix[1:], metadata=UNDATED[path.suffix])
    return path
