"""Small real sets that come with scikit-learn and scikit-image: no network, no files of their own."""

import numpy as np

from polyspan.errors import require


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's 1,797 handwritten digits: pixels (n, 64) float32 in [0, 1], rows of 8 by 8, and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.data / 16).astype(np.float32), found.target.astype(np.int64)


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """Return the 569 cell measurements of the Wisconsin set, (n, 30) float32 in their own units, and labels 0, 1."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    return found.data.astype(np.float32), found.target.astype(np.int64)


def photograph(name: str = "astronaut") -> np.ndarray:
    """Return one of scikit-image's own photographs, (h, w, 3) or (h, w) float32 in [0, 1].

    Raises
    ------
    MissingExtra
        scikit-image is not installed.
    ValueError
        It is not one of the pictures that come with the package (others would be fetched from the network).
    """
    within = ("astronaut", "camera", "cat", "chelsea", "coffee", "coins", "page", "text")
    if name not in within:
        raise ValueError(f"name must be one of {within}, got {name!r}")
    images = require("skimage.data", extra="images", purpose="a photograph")
    found = np.asarray(getattr(images, name)(), dtype=np.float32)
    return found / 255
