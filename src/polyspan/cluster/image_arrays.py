"""Arrays of images as they come: which axis counts, where the channels stand, and how rows of pixels were flattened."""

import math
from typing import Any, Literal

import numpy as np

CHANNELS = (1, 3, 4)
Channels = Literal["auto", "first", "last"]
PixelOrder = Literal["row", "column"]


def images_of(
    array: Any,
    *,
    shape: tuple[int, ...] | None = None,
    channels: Channels = "auto",
    pixel_order: PixelOrder = "row",
    n_labels: int | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Return images (n, h, w) or (n, channels, h, w), and a sentence for each thing that was taken for granted.

    Parameters
    ----------
    array : array of shape (n, h, w), (n, channels, h, w), (n, h, w, channels) or, of flattened images, (n, pixels)
        The images may be counted along the last axis instead, as MATLAB does; ``n_labels`` or ``shape`` tells.
    shape : (h, w), optional
        Of flattened images; left out, a square.
    channels : {"auto", "first", "last"}
        Where the channels of four axes stand; by itself it is found where only one of the two places counts 1, 3 or 4.
    pixel_order : {"row", "column"}
        How images were flattened: row by row, or column by column, as MATLAB flattens (``order="F"`` of NumPy).
    n_labels : int, optional
        How many labels came with the array.

    Raises
    ------
    ValueError
        The number of axes is another, the pixels do not fill ``shape``, or what counts, or where channels stand, has
        two answers or none.
    """
    X = np.asarray(array)
    said: list[str] = []
    if X.ndim not in (2, 3, 4):
        raise ValueError(
            f"images must be (n, h, w), (n, channels, h, w), (n, h, w, channels) or rows of pixels, got shape {X.shape}"
        )
    if 0 in X.shape:
        raise ValueError(f"images must be at least one, of at least one pixel, got shape {X.shape}")
    if shape is not None and X.ndim != 2:
        raise ValueError(f"shape must go with flattened images (n, pixels), got an array of shape {X.shape}")
    if channels != "auto" and X.ndim != 4:
        raise ValueError(f"channels must go with four axes, got {channels!r} for shape {X.shape}")
    if _counted_last(X, n_labels, shape):
        X = np.moveaxis(X, -1, 0)
        said.append(f"images are counted along the last axis: {X.shape[0]} of them")
    if X.ndim == 2:
        X, more = _unflattened(X, shape, pixel_order)
        return X, said + more
    if X.ndim == 4 and _channels_last(X.shape, channels):
        said.append(f"channels come last, {X.shape[-1]} of them: they were moved to the front")
        X = np.moveaxis(X, -1, 1)
    if X.ndim == 3 and n_labels is None and X.shape[0] == X.shape[1] != X.shape[2]:
        n, h, w = X.shape
        said.append(f"{n} images of {h} by {w}; are images counted along the last axis?")
    return np.ascontiguousarray(X), said


def _counted_last(X: np.ndarray, n_labels: int | None, shape: tuple[int, ...] | None) -> bool:
    """Tell by the labels, or by the pixels of an image, whether the last axis counts the images."""
    if n_labels is not None:
        if n_labels not in (X.shape[0], X.shape[-1]):
            raise ValueError(f"there must be one label an image, got {n_labels} labels and images of shape {X.shape}")
        return X.shape[0] != n_labels
    if shape is None or X.ndim != 2:
        return False
    return X.shape[1] != math.prod(shape) == X.shape[0]


def _unflattened(
    rows: np.ndarray, shape: tuple[int, ...] | None, pixel_order: PixelOrder
) -> tuple[np.ndarray, list[str]]:
    n_pixels, guess = rows.shape[1], ""
    if shape is None:
        side = math.isqrt(n_pixels)
        if side * side != n_pixels or side < 2:
            raise ValueError(
                f"shape must be given for images in rows of {n_pixels} pixels, which make no square, got none"
            )
        shape, guess = (side, side), ", a square by guess"
    if len(shape) != 2 or min(shape) < 1 or math.prod(shape) != n_pixels:
        sides = " by ".join(map(str, shape))
        raise ValueError(f"shape must be height and width of {n_pixels} pixels, got {sides} for shape {rows.shape}")
    h, w = shape
    said = f"rows of {n_pixels} pixels are images of {h} by {w}{guess}, flattened {pixel_order} by {pixel_order}"
    if pixel_order == "column":
        return np.ascontiguousarray(rows.reshape(len(rows), w, h).transpose(0, 2, 1)), [said]
    return np.ascontiguousarray(rows).reshape(len(rows), h, w), [said]


def _channels_last(shape: tuple[int, ...], channels: Channels) -> bool:
    if channels != "auto":
        return channels == "last"
    first, last = shape[1] in CHANNELS, shape[-1] in CHANNELS
    if first == last:
        why = "both the second axis and the last count" if first else "neither the second axis nor the last counts"
        raise ValueError(f"channels must be said to come first or last: {why} 1, 3 or 4 in shape {shape}")
    return last
