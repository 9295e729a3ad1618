"""A folder of pictures as a dataset, read one by one."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyspan.errors import CorruptFile, require
from polyspan.io import list_folder, read_bytes

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class ImageFolder(torch.utils.data.Dataset):
    """Pictures of a folder, sorted by name, brought to (h, w) grey or (3, h, w) in colour, float32 in [0, 1]."""

    def __init__(self, folder: Path | str, shape: tuple[int, ...] | None):
        if shape is None or len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in (1, 3)):
            raise ValueError(
                f"image_shape must be (h, w), (1, h, w) or (3, h, w) to read a folder of pictures, got {shape}"
            )
        self._pictures: Any = require("PIL.Image", extra="images", purpose="a folder of pictures")
        self.shape = tuple(int(side) for side in shape)
        self.files = sorted(path for path in list_folder(Path(folder)) if path.suffix.lower() in PICTURES)
        if not self.files:
            raise ValueError(f"{folder} must hold pictures ({', '.join(PICTURES)}), got none")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        file, colour, (h, w) = self.files[index], self.shape[0] == 3 and len(self.shape) == 3, self.shape[-2:]
        try:
            with self._pictures.open(io.BytesIO(read_bytes(file))) as picture:
                plain = picture.convert("RGB" if colour else "L")
                plain = plain.resize((w, h), self._pictures.Resampling.BILINEAR)
        except (OSError, ValueError, self._pictures.DecompressionBombError) as error:
            raise CorruptFile(file, found=str(error), expected="a picture") from error
        pixels = np.asarray(plain, dtype=np.float32) / np.float32(255)
        return pixels.transpose(2, 0, 1).copy() if colour else pixels
