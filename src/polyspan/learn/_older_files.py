"""Fitted files of other versions: what they lack is said with the version that wrote them."""

import importlib.metadata
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyspan.errors import WrongContent


@contextmanager
def all_entries(path: Path, header: Mapping[str, Any]) -> Generator[None]:
    """Read entries of a fitted file inside of this.

    Raises
    ------
    WrongContent
        An entry is not there, or one is there that this version does not know.
    """
    try:
        yield
    except (KeyError, TypeError) as error:
        wrote = header["versions"].get("polyspan")
        mine = importlib.metadata.version("polyspan")
        raise WrongContent(
            path,
            found=f"a {header['kind']} that polyspan {wrote} wrote, with other entries: {error}",
            expected=f"the entries of polyspan {mine}; fit it anew, or use the version that wrote it",
        ) from error


def check_names(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse tensors that are not those of a module's state, before they are loaded.

    Raises
    ------
    KeyError
        Names differ, or shapes do.
    """
    other = sorted(set(wanted) ^ set(given))
    other += [name for name in wanted if name in given and wanted[name].numel() != given[name].numel()]
    if other:
        raise KeyError(", ".join(other[:5]))
