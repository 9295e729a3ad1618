"""Where a user's own runs are kept."""

import os
import sys
from pathlib import Path


def user_folder(*parts: str) -> Path:
    r"""Return (and make) a folder for the user's own evidence, journals and gallery.

    ``$POLYSPAN_HOME`` where it is set, else the platform's place for user data: ``$XDG_DATA_HOME/polyspan`` or
    ``~/.local/share/polyspan``, ``~/Library/Application Support/polyspan``, ``%LOCALAPPDATA%\polyspan``.

    Raises
    ------
    ValueError
        A part leads out of the folder.
    UnreadableFile
        The folder cannot be made.
    """
    from polyspan.io import make_folder

    base = _base()
    folder = base.joinpath(*parts)
    if any(Path(part).is_absolute() or ".." in Path(part).parts for part in parts):
        raise ValueError(f"parts must stay inside {base}, got {parts}")
    return make_folder(folder)


def _base() -> Path:
    home = os.environ.get("POLYSPAN_HOME")
    if home:
        return Path(home).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "polyspan"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "polyspan"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "polyspan"
