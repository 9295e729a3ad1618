"""Where results may go: looked at before any work."""

from pathlib import Path

ARRAY_FILES = (".npy", ".npz", ".parquet", ".safetensors")
PLACES: dict[str, tuple[str, ...]] = dict.fromkeys(("memberships", "embedding"), ARRAY_FILES)
PLACES |= dict.fromkeys(("bases", "save", "checkpoint"), (".safetensors",))


def check_picture(plot: Path) -> None:
    """Refuse a picture that could not be drawn, in the words of the command."""
    from polyspan.io import picture_path

    try:
        picture_path(plot)
    except ValueError:
        raise ValueError(f"--plot must end in .svg, .png or .pdf, got {plot.name!r}") from None


def check_places(plot: Path | None = None, *, read: tuple[Path | None, ...] = (), **places: Path | None) -> None:
    """Refuse before any work what could not be written after it, and what would replace a file that is read."""
    import os

    if plot is not None:
        check_picture(plot)
    taken: dict[Path, str] = {path.resolve(): "a file that is read" for path in read if path is not None}
    for name, path in {"plot": plot, **places}.items():
        if path is None:
            continue
        known = PLACES.get(name)
        if known is not None and path.suffix.lower() not in known:
            raise ValueError(f"--{name} must end in one of {', '.join(known)}, got {path.name!r}")
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"--{name} must be a file in a folder that is there, got {path}")
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"--{name} must be in a folder that may be written to, got {path}")
        if path.resolve() in taken:
            raise ValueError(f"--{name} must be another file than {taken[path.resolve()]}, got {path}")
        taken[path.resolve()] = f"that of --{name}"
