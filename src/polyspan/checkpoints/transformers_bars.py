"""Progress bars of transformers, which show the loading of each model."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from polyspan.errors import require


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Keep transformers' bars from the screen, and let them be as they were afterwards.

    Raises
    ------
    MissingExtra
        transformers is not installed.
    """
    logging: Any = require("transformers.utils.logging", extra="hf")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
