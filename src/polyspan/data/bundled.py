"""Small real sets that come with Python, scikit-learn and scikit-image: no network, no files of their own."""

from typing import Any

import numpy as np

from polyspan.errors import require

PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cat", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "moon", "page",
    "retina", "rocket", "text",
)  # fmt: skip


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return 1,797 handwritten digits: pixels (n, 64) float32 in [0, 1], images of 8 by 8, and labels 0 to 9, int64."""
    X, y = _scikit_learn("digits")
    return X / np.float32(16), y


def iris() -> tuple[np.ndarray, np.ndarray]:
    """Return 150 irises: lengths and widths (n, 4) float32 in cm, and labels 0 to 2, int64."""
    return _scikit_learn("iris")


def wine() -> tuple[np.ndarray, np.ndarray]:
    """Return 178 wines: (n, 13) float32 chemical measurements in their own units, and labels 0 to 2, int64."""
    return _scikit_learn("wine")


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """Return 569 tumours: (n, 30) float32 measurements of cells in their own units, and labels 0, 1, int64."""
    return _scikit_learn("breast_cancer")


def _scikit_learn(name: str) -> tuple[np.ndarray, np.ndarray]:
    import sklearn.datasets

    found: Any = getattr(sklearn.datasets, f"load_{name}")()
    return found.data.astype(np.float32), found.target.astype(np.int64)


def photograph(name: str = "astronaut") -> np.ndarray:
    """Return one of scikit-image's own photographs, (h, w, 3) or, grey, (h, w), float32 in [0, 1].

    Parameters
    ----------
    name : str
        In colour ``astronaut``, ``cat``, ``coffee``, ``hubble_deep_field``, ``retina``, ``rocket``; grey ``brick``,
        ``camera``, ``coins``, ``grass``, ``gravel``, ``moon``, ``page``, ``text``.

    Raises
    ------
    ValueError
        It is not one of the pictures that come with the package (others would be fetched from the network).
    MissingExtra
        scikit-image is not installed.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"name must be one of {PHOTOGRAPHS}, got {name!r}")
    require("skimage", extra="images", purpose="a photograph")
    images = require("skimage.data", extra="images", purpose="a photograph")
    return np.asarray(getattr(images, name)(), dtype=np.float32) / np.float32(255)


def python_reference() -> str:
    """Return half a million characters of English: the parts of Python's language reference that come with Python.

    They are those of ``help()``, in the order of their names, a blank line between; other versions word some otherwise.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"
