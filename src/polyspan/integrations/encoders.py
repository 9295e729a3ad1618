"""Encoders of a user's texts: any callable, or a sentence-transformers model on the disk."""

import hashlib
import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.errors import UnreadableFile, WrongContent, require


class Encoder:
    """A named encoder with what is known of its space, and how long an item took.

    Parameters
    ----------
    name : str
        What stamps and reports call the model.
    encode : callable
        ``encode(items) -> (n, d)`` floats, for a list of items.
    normalized : bool, optional
        Whether its vectors have length 1; left out, it is seen from the first batch.

    Attributes
    ----------
    n_encoded : int
    seconds : float
        Spent in ``encode`` so far.
    dim : int or None
        Known after the first batch.
    """

    def __init__(self, name: str, encode: Callable[[list[Any]], Any], *, normalized: bool | None = None):
        if not name:
            raise ValueError("name must say which model it is, got an empty one")
        self.name, self._encode, self.normalized = name, encode, normalized
        self.n_encoded, self.seconds = 0, 0.0
        self.dim: int | None = None

    def __call__(self, items: Sequence[Any]) -> np.ndarray:
        """Return one vector an item, (n, d), in float32 or float64.

        Raises
        ------
        ValueError
            The encoder gives another number of vectors, another width than before, or a number that is not finite.
        """
        items = list(items)
        started = time.perf_counter()
        made = self._encode(items)
        self.seconds += time.perf_counter() - started
        made = np.asarray(made.detach().cpu() if hasattr(made, "detach") else made)
        if made.ndim != 2 or len(made) != len(items) or (self.dim is not None and made.shape[1] != self.dim):
            wanted = f"({len(items)}, {'d' if self.dim is None else self.dim})"
            raise ValueError(f"encoder {self.name} must give vectors of shape {wanted}, got {made.shape}")
        made = made.astype(np.float64 if made.dtype == np.float64 else np.float32, copy=False)
        finite = np.isfinite(made).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"encoder {self.name} must give finite numbers, got others for item {int(finite.argmin())}"
            )
        self.dim = made.shape[1]
        self.n_encoded += len(items)
        if self.normalized is None and len(made):
            self.normalized = bool(np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-3))
        return made

    @property
    def seconds_per_item(self) -> float | None:
        """Mean time an item took, or None before the first."""
        return self.seconds / self.n_encoded if self.n_encoded else None

    @property
    def space(self) -> dict[str, Any]:
        """The stamp of its vectors; one batch must have been encoded."""
        if self.dim is None:
            raise ValueError(f"encoder {self.name} must have encoded something before its width is known, got nothing")
        return {"model": self.name, "dim": self.dim, "normalized": bool(self.normalized)}


def load_encoder(where: str | Path, *, device: str = "auto", batch_size: int = 64) -> Encoder:
    """Load an encoder by its address.

    Parameters
    ----------
    where : str or path
        A folder of a sentence-transformers model (nothing is ever downloaded), or ``package.module:function``, which is
        imported and called with a list of texts.
    device : str
        For a model; ``"auto"`` takes an accelerator where there is one.
    batch_size : int
        Texts the model sees at once.

    Raises
    ------
    UnreadableFile, WrongContent
        The folder is missing or holds no such model.
    ValueError
        There is no such function.
    """
    text = str(where)
    module, mark, function = text.partition(":")
    if mark and not Path(text).exists():
        return Encoder(text, _imported(module, function, text))
    folder = Path(text)
    if not folder.is_dir():
        raise UnreadableFile(folder, found="no such folder", expected="a model's folder, or module:function")
    if not ((folder / "modules.json").is_file() or (folder / "config.json").is_file()):
        raise WrongContent(folder, found="no modules.json or config.json", expected="a sentence-transformers model")
    from polyspan.run import pick_device

    library = require("sentence_transformers", extra="text", purpose="a sentence-transformers model")
    model = library.SentenceTransformer(str(folder), device=str(pick_device(device)), local_files_only=True)

    def encode(items: list[str]) -> np.ndarray:
        return model.encode(items, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)

    return Encoder(folder.resolve().name, encode)


def _imported(module: str, function: str, text: str) -> Callable[[list[Any]], Any]:
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"encoder must be a folder or module:function that can be imported, got {text} ({error})"
        ) from None
    if not callable(found):
        raise ValueError(f"encoder must name a function of a list of texts, got {text}, a {type(found).__name__}")
    return found


def digest_texts(texts: Sequence[str]) -> str:
    """Return the SHA-256 of texts in their order."""
    total = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()
