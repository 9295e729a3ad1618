"""Images as rows of patches and back, and positions for them."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def pair(size: Any) -> tuple[int, int]:
    """Return a height and a width from one number or two."""
    sides = (size, size) if isinstance(size, Integral) else size
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(isinstance(n, Integral) for n in sides):
        raise ValueError(f"a size must be a whole number or two, height and width, got {size!r}")
    return int(sides[0]), int(sides[1])


def grid_of(image: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Return how many patches an image has down and across."""
    if min(*image, *patch) < 1 or image[0] % patch[0] or image[1] % patch[1]:
        raise ValueError(f"image_size must be a multiple of patch_size, got {image} and {patch}")
    return image[0] // patch[0], image[1] // patch[1]


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut images (B, c, h, w) into rows (B, N, p1 p2 c): patches by rows, in each pixels by rows, channels last."""
    batch, channels, h, w = images.shape
    (p, q), (rows, columns) = patch, (h // patch[0], w // patch[1])
    cut = images.reshape(batch, channels, rows, p, columns, q).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(batch, rows * columns, p * q * channels)


def unpatchify(rows: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Put rows (B, N, p1 p2 c) of :func:`patchify` together again."""
    (a, b), (p, q) = grid, patch
    cut = rows.reshape(len(rows), a, b, p, q, -1).permute(0, 5, 1, 3, 2, 4)
    return cut.reshape(len(rows), -1, a * p, b * q)


def check_images(images: Tensor, channels: int, size: tuple[int, int], patch: tuple[int, int], *, free: bool) -> None:
    """Refuse images of another number of channels or another size; ``free`` allows every multiple of the patch."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"images must be (B, {channels}, h, w), got shape {tuple(images.shape)}")
    found = (images.shape[2], images.shape[3])
    if free:
        grid_of(found, patch)
    elif found != size:
        raise ValueError(
            f"images must be {size[0]} by {size[1]} pixels, got {found[0]} by {found[1]}; "
            "interpolate_pos_encoding=True takes other multiples of the patch"
        )


def check_patch_mask(mask: Tensor | None, batch: int, num_patches: int) -> None:
    """Refuse a mask of patches that is not (B, N), or (1, N) for all images, bool."""
    if mask is None:
        return
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != num_patches or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be ({batch}, {num_patches}), true or false for each patch, "
            f"got {tuple(mask.shape)} of {mask.dtype}"
        )


def resize_positions(table: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Interpolate positions (1, 1 + N, d) of a grid to another one; the first row, of the class token, stays."""
    if grid == to:
        return table
    own, rest = table[:, :1], table[:, 1:]
    field = rest.unflatten(1, grid).permute(0, 3, 1, 2)
    wide = F.interpolate(field.float(), size=to, mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([own, wide.to(table.dtype).permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def sine_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed positions (1, 1 + N, d), float64: half of the entries for the column, half for the row, sines then cosines.

    Wavelengths run from 2 pi to 20,000 pi patches; the class token has zeros.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4 for sine-cosine positions, got {dim}")
    rates = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    parts = [torch.outer(place.flatten(), rates) for place in (columns, rows)]
    table = torch.cat([f(angle) for angle in parts for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])[None]
