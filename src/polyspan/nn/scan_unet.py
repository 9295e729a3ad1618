"""U-shaped network of scan blocks for segmentation, and the weights of the authors' networks for it."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ._bare_layers import bare, draw
from .multi_head_scan import MHSBlock, SS2DBlock, check_map


class _Merge(nn.Module):
    """Halve the sides: four pixels side by side, LayerNorm, linear to ``wide`` channels."""

    def __init__(self, channels: int, wide: int, **how: Any):
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels, **how)
        self.linear = bare(nn.Linear, 4 * channels, wide, bias=False, **how)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.linear(self.norm(torch.cat(corners, dim=-1)))


class _Expand(nn.Module):
    """Multiply the sides by ``scale``: linear to scale² pixels of ``narrow`` channels, LayerNorm."""

    def __init__(self, channels: int, narrow: int, scale: int, **how: Any):
        super().__init__()
        self.scale = scale
        self.linear = bare(nn.Linear, channels, scale * scale * narrow, bias=False, **how)
        self.norm = nn.LayerNorm(narrow, **how)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        s = self.scale
        narrow = self.norm.normalized_shape[0]
        x = self.linear(x).view(b, h, w, s, s, narrow).permute(0, 1, 3, 2, 4, 5)
        return self.norm(x.reshape(b, h * s, w * s, narrow))


class MHSUNet(nn.Module):
    r"""Segment images of any size: encoder and decoder of scan blocks, skips added.

    Patches of ``patch_size`` pixels are embedded; each stage of the encoder ends by halving the sides, each of the
    decoder begins by doubling them, and the last expansion goes back to pixels. Sides that are no multiple of
    ``patch_size`` times :math:`2^{\mathrm{stages}-1}` are padded by their edges, and the output is cropped. Gives
    logits: apply ``sigmoid`` for one class, ``softmax`` over dimension 1 for more. The defaults, with 3 or 4 heads,
    are the source's network, 17.39 or 17.26 million parameters. Trained from scratch on few images it is no better
    than a small convolutional network.
    Source: catalogue entry ``mhs-vm``.

    Parameters
    ----------
    in_channels : int, default=3
        Where it is 3, grey images (b, 1, h, w) are taken too, and repeated.
    num_classes : int, default=1
    depths : sequence of int
        Blocks of each stage of the encoder.
    dims : sequence of int
        Channels of each stage. Pixels have a quarter of the first, at least 2, and are normalised; 4 tell more than 2.
    decoder_depths : sequence of int, optional
        Blocks of each stage of the decoder, from the deepest; by default those of the encoder backwards, with one
        less in the last.
    patch_size : int, default=4
    drop_path : float, default=0.2
        Of the deepest blocks; it grows evenly from 0 in the encoder and falls to 0 in the decoder.
    block : {"mhs", "ss2d"}, default="mhs"
        "ss2d" makes the rival network.
    init_std : float or None, default=0.02
        Spread of the linear layers at first, cut at 2; with None each is drawn by its own width, as torch does. The
        source's 0.02 suits its widths: networks of a few dozen channels hardly learn with it.
    generator : torch.Generator, optional
    block_options
        Arguments of :class:`MHSBlock` (and so of :class:`MultiHeadScan2d`) or :class:`SS2DBlock`, by name.

    Raises
    ------
    ValueError
        An argument is outside of what is stated above.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1,
        depths: Sequence[int] = (2, 2, 2, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        decoder_depths: Sequence[int] | None = None,
        *,
        patch_size: int = 4,
        drop_path: float | int = 0.2,
        block: str = "mhs",
        init_std: float | None = 0.02,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **block_options: Any,
    ):
        super().__init__()
        if in_channels < 1 or num_classes < 1 or patch_size < 1:
            raise ValueError(
                f"in_channels, num_classes and patch_size must be at least 1, got {in_channels}, {num_classes}, "
                f"{patch_size}"
            )
        if init_std is not None and not 0 < init_std < math.inf:
            raise ValueError(f"init_std must be positive and finite, or None, got {init_std}")
        if block not in ("mhs", "ss2d"):
            raise ValueError(f"block must be 'mhs' or 'ss2d', got {block!r}")
        if decoder_depths is None:
            decoder_depths = [*depths[:0:-1], max(depths[0] - 1, 1)] if depths else []
        if not len(depths) == len(dims) == len(decoder_depths) >= 1 or min(*depths, *decoder_depths, *dims) < 1:
            raise ValueError(
                "depths, dims and decoder_depths must be as long and hold numbers of at least 1, got "
                f"{tuple(depths)}, {tuple(dims)} and {tuple(decoder_depths)}"
            )
        if dims[0] < 8:
            raise ValueError(f"dims must begin with at least 8, got {dims[0]}: pixels have a quarter, normalised")
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels, self.num_classes, self.patch_size = in_channels, num_classes, patch_size
        self.init_std = init_std
        self.stride = patch_size * 2 ** (len(depths) - 1)
        self.config = {
            "in_channels": in_channels, "num_classes": num_classes, "depths": list(depths), "dims": list(dims),
            "decoder_depths": list(decoder_depths), "patch_size": patch_size, "drop_path": drop_path, "block": block,
            **block_options,
        }  # fmt: skip
        kind: Any = MHSBlock if block == "mhs" else SS2DBlock

        def stages(widths: Sequence[int], counts: Sequence[int], rates: list[float]) -> nn.ModuleList:
            rest = iter(rates)
            return nn.ModuleList(
                nn.Sequential(*(kind(c, next(rest), generator=generator, **how, **block_options) for _ in range(n)))
                for c, n in zip(widths, counts, strict=True)
            )

        up, down = list(dims)[::-1], list(dims)
        self.embedding = bare(nn.Conv2d, in_channels, dims[0], patch_size, stride=patch_size, **how)
        self.embedding_norm = nn.LayerNorm(dims[0], **how)
        self.encoder = stages(down, depths, _even(drop_path, sum(depths)))
        self.merges = nn.ModuleList(_Merge(a, b, **how) for a, b in itertools.pairwise(down))
        self.decoder = stages(up, decoder_depths, _even(drop_path, sum(decoder_depths))[::-1])
        self.expands = nn.ModuleList(_Expand(a, b, 2, **how) for a, b in itertools.pairwise(up))
        last = dims[0] // 4
        self.final = _Expand(dims[0], last, patch_size, **how)
        self.classes = bare(nn.Conv2d, last, num_classes, 1, **how)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every linear layer as ``init_std`` says, and convolutions as torch does."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and self.init_std is not None:
                nn.init.trunc_normal_(module.weight, std=self.init_std, generator=generator)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                draw(module, generator)

    def draw_paths(self, batch: int, device: Any = None) -> list[Tensor | None]:
        """Draw for each block, in the order in which they run, for which of so many pictures it counts.

        For training in one compiled graph, of which a generator is no part:
        ``torch.compile(net, fullgraph=True)(x, net.draw_paths(len(x)))``.
        """
        stages: Any = (*self.encoder, *self.decoder)
        return [block.draw_paths(batch, device) for stage in stages for block in stage]

    def forward(
        self, x: Float[Tensor, "b c h w"], paths: Sequence[Tensor | None] | None = None
    ) -> Float[Tensor, "b k h w"]:
        """Return logits (b, classes, h, w); ``paths`` from :meth:`draw_paths`, which are drawn where not given."""
        if x.ndim == 4 and x.shape[1] == 1 and self.in_channels == 3:
            x = x.expand(-1, 3, -1, -1)
        check_map(x, self.in_channels, channels_last=False)
        if 0 in x.shape[2:]:
            raise ValueError(f"x must have at least one pixel, got shape {tuple(x.shape)}")
        h, w = x.shape[-2:]
        x = F.pad(x, (0, -w % self.stride, 0, -h % self.stride), mode="replicate")
        x = self.embedding_norm(self.embedding(x).permute(0, 2, 3, 1))
        skips, drawn = [], iter(self.draw_paths(len(x), x.device) if paths is None else paths)
        encoder: Any = self.encoder
        for i, stage in enumerate(encoder):
            skips.append(x)
            for part in stage:
                x = part(x, next(drawn))
            x = self.merges[i](x) if i < len(self.merges) else x
        decoder: Any = self.decoder
        for i, stage in enumerate(decoder):
            x = self.expands[i - 1](x + skips[-i]) if i else x
            for part in stage:
                x = part(x, next(drawn))
        return self.classes(self.final(x).permute(0, 3, 1, 2))[..., :h, :w]


def _even(most: float | int, count: int) -> list[float]:
    return [most * i / max(count - 1, 1) for i in range(count)]
