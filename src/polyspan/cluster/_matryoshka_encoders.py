"""Small encoders for rows and images, views of them, and one way to call any encoder."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._manifold_network import ImageJitter


class RowEncoder(nn.Module):
    """One hidden layer beside a linear map, then a layer norm."""

    def __init__(self, width: int, hidden: int, d: int):
        super().__init__()
        self.direct = nn.Linear(width, d)
        self.body = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, d))
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.direct(x) + self.body(x))


class ConvEncoder(nn.Module):
    """Two convolutions for images (b, channels, h, w) of any size, pooled to 4 by 4, then a layer norm."""

    def __init__(self, channels: int, hidden: int, d: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(512, hidden),
            nn.ReLU(),
            nn.Linear(hidden, d),
        )
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x))


class PatchTransformer(nn.Module):
    """A small vision transformer: ``forward(images, mask) -> (class token (b, d), patch tokens (b, n, d))``.

    Position embeddings are interpolated for images of other sizes; masked patches are a learned token.
    """

    def __init__(
        self, channels: int, grid: tuple[int, int], patch: int, d: int, *, depth: int = 2, drop_path: float = 0.0
    ):
        super().__init__()
        self.grid, self.patch, self.drop_path = grid, patch, drop_path
        self.heads = next(k for k in (4, 2, 1) if d % k == 0)
        self.patch_embed = nn.Conv2d(channels, d, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], d))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(d),
                    "qkv": nn.Linear(d, 3 * d),
                    "out": nn.Linear(d, d),
                    "norm2": nn.LayerNorm(d),
                    "up": nn.Linear(d, 4 * d),
                    "down": nn.Linear(4 * d, d),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found = self.patch_embed(x)
        grid, tokens = tuple(found.shape[-2:]), found.flatten(2).mT
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        places = self.pos_embed
        if grid != self.grid:
            flat = places[:, 1:].mT.unflatten(2, self.grid)
            flat = F.interpolate(flat, size=grid, mode="bicubic", align_corners=False).flatten(2).mT
            places = torch.cat([places[:, :1], flat], dim=1)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + places
        blocks: Any = self.blocks
        for block in blocks:
            q, k, v = block["qkv"](block["norm1"](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self._dropped(block["out"](seen))
            x = x + self._dropped(block["down"](F.gelu(block["up"](block["norm2"](x)))))
        x = self.norm(x)
        return x[:, 0], x[:, 1:]

    def _dropped(self, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_path > 0):
            return branch
        kept = 1 - self.drop_path
        return branch * (torch.rand(len(branch), 1, 1, device=branch.device) < kept) / kept


@torch.no_grad()
def draw_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Draw first weights as torch does, but from the generator; tokens are truncated normals of deviation 0.02."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            bound = part.weight[0].numel() ** -0.5
            for parameter in part.parameters(recurse=False):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        for name, parameter in part.named_parameters(recurse=False):
            if name in ("cls_token", "mask_token", "pos_embed"):
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)


def make_encoder(
    kind: Any,
    width: int,
    shape: tuple[int, ...] | None,
    *,
    d: int,
    hidden: int,
    patch: int,
    drop_path: float,
    generator: torch.Generator,
) -> nn.Module:
    """Build the encoder: for rows of a width, for images of a shape, or a copy of the user's."""
    if isinstance(kind, nn.Module):
        return copy.deepcopy(kind)
    # Layers draw first weights from torch's global generator before ours replace them.
    with torch.random.fork_rng(devices=[]):
        if kind == "transformer":
            if shape is None:
                raise ValueError("image_shape must be given, or X be images, for encoder='transformer'")
            channels, h, w = shape
            if h % patch or w % patch:
                raise ValueError(f"patch_size must divide the sides of the images, {h} and {w}, got {patch}")
            made: nn.Module = PatchTransformer(channels, (h // patch, w // patch), patch, d, drop_path=drop_path)
        else:
            made = RowEncoder(width, hidden, d) if shape is None else ConvEncoder(shape[0], hidden, d)
    draw_weights(made, generator)
    return made


def encode(encoder: nn.Module, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the feature (b, d) of each item, and of its patches (b, n, d) where the encoder gives them.

    An encoder returns features, or (features, patches), or as in Hugging Face's vision models an object with
    ``last_hidden_state``, whose first token is the class and whose registers are left out.
    """
    if hasattr(encoder, "config") and hasattr(encoder, "main_input_name"):
        out: Any = encoder(x) if mask is None else encoder(x, bool_masked_pos=mask)
    else:
        out = encoder(x) if mask is None else encoder(x, mask)
    if hasattr(out, "last_hidden_state"):
        tokens = out.last_hidden_state
        registers = int(getattr(getattr(encoder, "config", None), "num_register_tokens", 0) or 0)
        return tokens[:, 0], tokens[:, 1 + registers :]
    if isinstance(out, tuple):
        return out[0], out[1]
    return out.flatten(1), None


@dataclass(frozen=True)
class RowJitter:
    """Draw another view of rows: normal noise, and a share of the coordinates set to the mean.

    ``noise`` is in units of the rows' overall deviation, ``drop`` a share in [0, 1).
    """

    noise: float = 0.3
    drop: float = 0.2

    def __call__(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(rows.shape, generator=generator).to(rows)
        kept = (torch.rand(rows.shape, generator=generator) >= self.drop).to(rows)
        return (rows + self.noise * noise) * kept


@dataclass(frozen=True)
class RandomCrop:
    """Cut a part of random place, area and aspect out of each image and bring it to ``size``.

    ``scale``: smallest and largest share of the area. Aspects are log-uniform within 3/4 and 4/3.
    """

    scale: tuple[float, float]
    size: tuple[int, int]

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        b = len(images)
        draws = torch.rand(4, b, generator=generator).to(images)
        low, high = self.scale
        area = low + (high - low) * draws[0]
        aspect = torch.exp((2 * draws[1] - 1) * math.log(4 / 3))
        tall, wide = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        down, across = (2 * draws[2] - 1) * (1 - tall), (2 * draws[3] - 1) * (1 - wide)
        zero = torch.zeros_like(tall)
        theta = torch.stack([torch.stack([wide, zero, across], 1), torch.stack([zero, tall, down], 1)], 1)
        grid = F.affine_grid(theta, [b, images.shape[1], *self.size], align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def make_views(augment: Any, shape: tuple[int, ...] | None) -> Callable[[Tensor, torch.Generator], Tensor] | None:
    """Return the augmentation of a name, a callable as it is, or None."""
    if augment == "auto":
        return RowJitter() if shape is None else ImageJitter()
    if augment == "image":
        if shape is None:
            raise ValueError("image_shape must be given, or X be images, for augment='image'")
        return ImageJitter()
    return augment
