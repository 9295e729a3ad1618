"""Every exception that polyspan defines: five for files, one for a missing extra, one for no convergence."""

import importlib
from types import ModuleType


class FileError(Exception):
    """A file could not be used; raised only as one of its five kinds.

    Parameters
    ----------
    path : str or path-like
        The file, as the user named it.
    found : str
        What is there.
    expected : str
        What would have been accepted.
    where : str, optional
        The byte, row, column or member at which it was seen.
    """

    def __init__(self, path, *, found: str, expected: str, where: str = ""):
        self.path, self.found, self.expected, self.where = str(path), found, expected, where
        super().__init__(self.path, found, expected, where)

    def __str__(self) -> str:
        place = f" at {self.where}" if self.where else ""
        return f"{self.path}{place}: found {self.found}; expected {self.expected}"

    def __reduce__(self):
        return _rebuild, (type(self), self.path, self.found, self.expected, self.where)


def _rebuild(kind, path, found, expected, where):
    """Make a file error anew in another process, where keyword-only arguments would be lost."""
    return kind(path, found=found, expected=expected, where=where)


class UnreadableFile(FileError):
    """The operating system does not give the file: missing, no permission, a folder, a device error, a full disk."""


class CorruptFile(FileError):
    """The bytes break their own format: truncated, wrong magic, offsets outside, a digest that differs."""


class UntrustedFile(FileError):
    """Reading would run code from the file: pickle in any wrapping."""


class WrongContent(FileError):
    """A valid file that holds another thing than was asked for: other shape, type, column, member, a NaN row."""


class TooLarge(FileError):
    """The content would not fit in the memory budget; told from the header, before anything is allocated."""


class MissingExtra(ImportError):
    """An optional package is not installed; the message holds the command that installs it."""


class NotConverged(RuntimeError):
    """An iteration ended without reaching its tolerance and the result would not be usable."""


def require(name: str, *, extra: str, purpose: str = "") -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Parameters
    ----------
    name : str
        Import name, for instance ``"faiss"``.
    extra : str
        The extra of polyspan that installs it, for instance ``"vectors"``.
    purpose : str, optional
        What needs it, as the start of the message: ``"rewriting a FAISS index"``.

    Raises
    ------
    MissingExtra
        The package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise
        what = purpose or "this"
        raise MissingExtra(f'{what} needs {name}; run: pip install "polyspan[{extra}]"', name=name) from None
