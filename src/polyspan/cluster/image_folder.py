"""A folder of pictures as a dataset, read one by one."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyspan.errors import CorruptFile, WrongContent, require
from polyspan.io import list_folder, read_bytes

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
DEEPEST = 2**16 - 1


class ImageFolder(torch.utils.data.Dataset):
    """Pictures of a folder, sorted by name, brought to (h, w) grey or (3, h, w) in colour, float32 in [0, 1].

    They are turned as their EXIF data says, and what is transparent becomes white; of a moving picture the first frame
    is taken. ``sizes`` holds the sizes (w, h) of those read so far, as they were before.

    Raises
    ------
    ValueError
        ``shape`` is none of these, or the folder holds no picture.
    CorruptFile, WrongContent
        While a picture is read: it is none, or it holds floats, whose range nobody knows.
    """

    def __init__(self, folder: Path | str, shape: tuple[int, ...] | None):
        if shape is None or len(shape) not in (2, 3) or min(shape) < 1 or (len(shape) == 3 and shape[0] not in (1, 3)):
            raise ValueError(
                f"image_shape must be (h, w), (1, h, w) or (3, h, w) to read a folder of pictures, got {shape}"
            )
        self._pictures: Any = require("PIL.Image", extra="images", purpose="a folder of pictures")
        self._ops: Any = require("PIL.ImageOps", extra="images", purpose="a folder of pictures")
        self.shape = tuple(int(side) for side in shape)
        self.files = sorted(path for path in list_folder(Path(folder)) if path.suffix.lower() in PICTURES)
        if not self.files:
            inner = [path.name for path in list_folder(Path(folder)) if path.is_dir()]
            deeper = f"; its {len(inner)} folders, such as {inner[0]}, are not looked into" if inner else ""
            raise ValueError(f"{folder} must hold pictures ({', '.join(PICTURES)}), got none{deeper}")
        self.sizes: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        file, colour, (h, w) = self.files[index], self.shape[0] == 3 and len(self.shape) == 3, self.shape[-2:]
        try:
            with self._pictures.open(io.BytesIO(read_bytes(file))) as picture:
                self.sizes.add(picture.size)
                plain, full = self._plain(file, picture, "RGB" if colour else "L")
                plain = plain.resize((w, h), self._pictures.Resampling.BILINEAR)
        except self._pictures.UnidentifiedImageError as error:
            raise CorruptFile(file, found="bytes of no known kind of picture", expected="a picture") from error
        except (OSError, ValueError, SyntaxError, self._pictures.DecompressionBombError) as error:
            raise CorruptFile(file, found=str(error), expected="a picture") from error
        pixels = np.asarray(plain, dtype=np.float32) / np.float32(full)
        if colour and pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        return pixels.transpose(2, 0, 1).copy() if colour else pixels

    def _plain(self, file: Path, picture: Any, mode: str) -> tuple[Any, int]:
        """Return a picture without turn and transparency, and the number that is full light in it."""
        turned = self._ops.exif_transpose(picture)
        if turned.mode == "F":
            raise WrongContent(file, found="pixels that are floats", expected="pixels of 8 or 16 bits")
        if turned.mode.startswith("I"):
            # Pillow would cut what is above 255.
            deep = turned.convert("I").convert("F")
            low, high = deep.getextrema()
            if low < 0 or high > DEEPEST:
                raise WrongContent(file, found=f"pixels from {low:g} to {high:g}", expected="pixels of 8 or 16 bits")
            return deep, DEEPEST
        if turned.has_transparency_data:
            above = turned.convert("RGBA")
            turned = self._pictures.alpha_composite(self._pictures.new("RGBA", above.size, "white"), above)
        return turned.convert(mode), 255
