"""The network that linearises manifolds, where its rows come from, and how images are jittered."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BLOCK_ROWS = 2048


@dataclass(frozen=True)
class ImageJitter:
    """Draw another view of images (b, channels, h, w): turned, shifted, scaled, mirrored, lit otherwise.

    Interpolates linearly and repeats the border. Each image draws its own numbers from the generator. What is switched
    on here is what clusters will not depend on, so leave out what tells them apart (turning a 6 makes a 9).

    Parameters
    ----------
    degrees : float
        Rotations lie within this of 0.
    shift : float
        Largest move, as a share of half the image's side.
    scale : float
        Sizes lie within ``1 - scale`` and ``1 + scale``.
    flip : bool
        Mirror every second image, on average, left to right.
    contrast : float
        Factors on the deviation from the image's mean, within ``1 - contrast`` and ``1 + contrast``.
    shade : float
        Largest height of a linear ramp of light across the image, in units of the pixels.
    noise : float
        Standard deviation of what is added to every pixel.
    """

    degrees: float | int = 20.0
    shift: float | int = 0.2
    scale: float | int = 0.15
    flip: bool = False
    contrast: float | int = 0.0
    shade: float | int = 0.0
    noise: float | int = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        b = len(images)
        draws = (2 * torch.rand(8, b, generator=generator) - 1).to(images)
        angle, size = draws[0] * math.radians(self.degrees), 1 + draws[1] * self.scale
        mirror = torch.where(draws[4] < 0, -1.0, 1.0) if self.flip else torch.ones_like(angle)
        cos, sin = angle.cos() / size, angle.sin() / size
        first = torch.stack([cos * mirror, -sin, draws[2] * self.shift], dim=1)
        second = torch.stack([sin * mirror, cos, draws[3] * self.shift], dim=1)
        grid = nn.functional.affine_grid(torch.stack([first, second], 1), list(images.shape), align_corners=False)
        seen = nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
        if self.contrast:
            mean = seen.mean(dim=(1, 2, 3), keepdim=True)
            seen = mean + (1 + self.contrast * draws[5])[:, None, None, None] * (seen - mean)
        if self.shade:
            down, across = (torch.linspace(-1, 1, side).to(seen) for side in seen.shape[-2:])
            ramp = draws[6][:, None, None] * down[:, None] + draws[7][:, None, None] * across
            seen = seen + self.shade * ramp.unsqueeze(1)
        if self.noise:
            seen = seen + self.noise * torch.randn(seen.shape, generator=generator).to(seen)
        return seen


class TwoHeads(nn.Module):
    """A trunk with a feature head and a cluster head of one form; both give unit rows."""

    def __init__(self, trunk: nn.Module, make_head: Callable[[], nn.Module]):
        super().__init__()
        self.trunk, self.features, self.clusters = trunk, make_head(), make_head()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.trunk(x)
        return _unit_rows(self.features(found)), _unit_rows(self.clusters(found))

    def features_alone(self, x: Tensor) -> Tensor:
        """Return what ``forward`` returns first; the cluster head neither works nor sees the batch."""
        return _unit_rows(self.features(self.trunk(x)))

    @torch.no_grad()
    def copy_head(self) -> None:
        """Start the cluster head from the feature head: memberships need no training of their own."""
        self.clusters.load_state_dict(self.features.state_dict())


def _unit_rows(rows: Tensor) -> Tensor:
    # Unit rows of half precision would miss 1 by a thousandth, ten times what the rates then make of it.
    return nn.functional.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)


def make_network(
    width: int, shape: tuple[int, ...] | None, backbone: Any, hidden: int, d: int, generator: torch.Generator
) -> TwoHeads:
    """Build the network for rows (n, width), or for images of ``shape`` (channels, h, w), drawn from the generator.

    A backbone of the user's keeps its own weights; its output is flattened.
    """
    body: list[nn.Module] = []
    if backbone is not None:
        body += [copy.deepcopy(backbone), nn.Flatten()]
        example = torch.zeros(2, *(shape or (width,)))
        with torch.no_grad():
            width = nn.Sequential(*body).eval().cpu()(example).shape[1]
    elif shape is not None:
        channels, h, w = shape
        body += [nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
        body += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
        body += [nn.Flatten()]
        width = 32 * (-(-h // 4)) * (-(-w // 4))
    kept = len(body) if backbone is not None else 0
    trunk = nn.Sequential(*body, nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU())

    def head() -> nn.Module:
        return nn.Sequential(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, d))

    made = TwoHeads(trunk, head)
    for part in [*list(trunk)[kept:], made.features, made.clusters]:
        for layer in part.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                bound = layer.weight[0].numel() ** -0.5
                for parameter in layer.parameters():
                    nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return made


class Source:
    """Rows of an array, a memory map, a torch dataset or an embedding file, by batches, never all at once.

    Rows are centred and scaled by one mean and one number, found in a first pass: the network's first weights do not
    care for units, and float32 holds neither 1e200 nor differences of 1e-20.
    """

    def __init__(self, X: Any, shape: tuple[int, ...] | None = None):
        self.stream = hasattr(X, "batches") and hasattr(X, "n_rows")
        self.X, self.shape = X, shape
        self.n = X.n_rows if self.stream else len(X)
        self.mean, self.scale = np.zeros(1), 1.0

    @property
    def width(self) -> int:
        return self.X.dim if self.stream else int(np.asarray(self._rows([0])).shape[1])

    def _rows(self, index: Any) -> np.ndarray:
        """Rows by their numbers, flat, as they were given."""
        if hasattr(self.X, "__array__") or isinstance(self.X, np.ndarray):
            return np.asarray(self.X[index])
        items = [self.X[int(i)] for i in index]
        items = [item[0] if isinstance(item, tuple | list) else item for item in items]
        rows = np.stack([np.asarray(item, dtype=np.float32).ravel() for item in items])
        if not np.isfinite(rows).all():
            wrong = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise ValueError(f"X must be finite, got NaN or infinity in row {int(index[wrong])}")
        return rows

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows in their order, by blocks, raw."""
        if self.stream:
            for batch in self.X.batches():
                for start in range(0, len(batch.rows), BLOCK_ROWS):
                    yield batch.rows[start : start + BLOCK_ROWS]
            return
        for start in range(0, self.n, BLOCK_ROWS):
            yield self._rows(np.arange(start, min(start + BLOCK_ROWS, self.n)))

    def measure(self) -> None:
        """Find the mean and the scale, in one pass, safe for numbers that have no squares."""
        count, total, square, top = 0, 0.0, 0.0, 0.0
        shift = np.zeros(0)
        for block in self.blocks():
            rows = np.asarray(block, dtype=np.float64)
            if not count:
                shift = rows[0].copy()
            rows = rows - shift
            largest = float(np.abs(rows).max())
            if not np.isfinite(largest):
                raise ValueError("X must hold rows whose differences are finite in float64")
            if largest > top:
                total, square = total * (top / largest), square * (top / largest) ** 2
                top = largest
            if top > 0:
                total, square = total + (rows / top).sum(axis=0), square + float(((rows / top) ** 2).sum())
            count += len(rows)
        if top == 0:
            raise ValueError(f"X must hold at least 2 distinct rows, got {count} equal rows")
        width = len(shift)
        mean = total / count
        variance = square / (count * width) - float(np.mean(np.square(mean)))
        self.mean, self.scale = shift + top * mean, top * math.sqrt(max(variance, 1e-300))

    def tensor(self, rows: Any, device: Any, dtype: Any = torch.float32) -> Tensor:
        """Centre, scale and shape rows for the network."""
        flat = (np.asarray(rows, dtype=np.float64) - self.mean) / self.scale
        found = torch.as_tensor(flat).to(dtype).to(device)
        return found if self.shape is None else found.reshape(-1, *self.shape)

    def epoch(self, batch: int, generator: torch.Generator, device: Any) -> Iterator[Tensor]:
        """Mini-batches in random order; a stream is shuffled within what it hands out at once.

        A last batch shorter than the others is left out: rates depend on the size of a batch.
        """
        if not self.stream:
            order = torch.randperm(self.n, generator=generator).numpy()
            for start in range(0, self.n - batch + 1, batch):
                yield self.tensor(self._rows(np.sort(order[start : start + batch])), device)
            return
        rest: Any = None
        for block in self.X.batches():
            rows = np.asarray(block.rows)
            rows = rows if rest is None else np.concatenate([rest, rows])
            order = torch.randperm(len(rows), generator=generator).numpy()
            whole = len(rows) // batch * batch
            for start in range(0, whole, batch):
                yield self.tensor(rows[order[start : start + batch]], device)
            rest = rows[order[whole:]]


def as_source(X: Any, shape: Sequence[int] | None) -> tuple[Any, tuple[int, ...] | None, bool]:
    """Return rows (n, features) or something that gives them, the shape of an image, and whether X is an array.

    Paths are opened (mapped where the format allows), loaders give up their dataset, images (n, h, w) and
    (n, channels, h, w) are flattened.
    """
    given = None if shape is None else tuple(int(side) for side in shape)
    if given is not None and (len(given) not in (2, 3) or min(given) < 1):
        raise ValueError(f"image_shape must be (h, w) or (channels, h, w), got {shape!r}")
    if isinstance(X, str | Path):
        from polyspan.io import read_array

        X = read_array(X, ndim=None)
    if hasattr(X, "batches") and hasattr(X, "n_rows"):
        return X, _channels_first(given), False
    if isinstance(X, torch.utils.data.DataLoader):
        X = X.dataset
    if isinstance(X, torch.utils.data.Dataset):
        if not hasattr(X, "__len__"):
            raise ValueError("X must be a dataset with a length and items by number, got an IterableDataset")
        first = X[0]
        first = np.asarray(first[0] if isinstance(first, tuple | list) else first)
        return X, _channels_first(given or (first.shape if first.ndim in (2, 3) else None)), False
    if isinstance(X, Tensor):
        X = X.detach().cpu().numpy()
    if getattr(X, "ndim", 2) in (3, 4) and isinstance(X, np.ndarray):
        given = given or X.shape[1:]
        X = X.reshape(len(X), -1)
    return X, _channels_first(given), True


def _channels_first(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return (1, *shape) if shape is not None and len(shape) == 2 else shape
