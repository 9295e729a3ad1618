"""Masked auto-encoder made of rate-reduction blocks: an encoder that compresses and a decoder that is its mirror."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ._crate_blocks import CRATEBlock, CRATEDecoderBlock
from ._patches import check_images, grid_of, pair, patchify, resize_positions, sine_positions, unpatchify
from ._rate_attention import empty_linear


class CRATEMAE(nn.Module):
    r"""Learn features by completing images of which three quarters of the patches are hidden.

    Hidden patches are replaced by one learnt token after the embedding; all positions, with a class token and fixed
    sine-cosine places, pass through :class:`CRATEBlock` layers, a norm, as many layers :class:`CRATEDecoderBlock` of
    the same width, a norm and a linear read-out of pixels. :meth:`loss` is the mean squared error on hidden patches.
    Encoder and decoder see every position, so hiding saves no time, unlike in a ViT's masked auto-encoder.
    The encoder's weights are named as those of :class:`CRATE`, which computes the same from them where it has neither
    ``patch_norm`` nor ``embedding_norm``.
    Source: catalogue entry ``crate``.

    Parameters
    ----------
    image_size, patch_size : int or tuple of int
        In pixels.
    dim, depth, num_heads : int
        Of encoder and decoder; ``dim`` a multiple of 4.
    decoder_depth : int, optional
        ``depth`` where not given.
    head_dim : int, optional
        ``dim / num_heads`` where not given.
    channels : int, default=3
    mask_ratio : float, default=0.75
        Share of patches hidden, in (0, 1); at least one is hidden and one is shown.
    norm_pixels : bool, default=False
        Compare with patches whose pixels have been brought to mean 0 and variance 1.
    lambd : float, default=0.5
        Price of an entry in the encoder; five times that of the classifiers.
    gradient_checkpointing : bool, default=False
    block : dict, optional
        Further arguments of the encoder's blocks.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.

    Raises
    ------
    ValueError
        Sizes do not fit, an argument is out of range, or images of another size or number of channels come.
    """

    positions: Tensor

    def __init__(
        self,
        image_size: int | tuple[int, int] | list[int],
        patch_size: int | tuple[int, int] | list[int],
        dim: int,
        depth: int,
        num_heads: int,
        *,
        decoder_depth: int | None = None,
        head_dim: int | None = None,
        channels: int = 3,
        mask_ratio: float = 0.75,
        norm_pixels: bool = False,
        lambd: float | int = 0.5,
        gradient_checkpointing: bool = False,
        block: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.image_size, self.patch_size = pair(image_size), pair(patch_size)
        self.grid = grid_of(self.image_size, self.patch_size)
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {mask_ratio}")
        if self.num_patches < 2:
            raise ValueError(f"there must be at least 2 patches, got image_size {image_size}, patch_size {patch_size}")
        decoder_depth = depth if decoder_depth is None else decoder_depth
        if min(depth, decoder_depth, channels) < 1:
            raise ValueError(
                f"depth, decoder_depth and channels must be at least 1, got {depth}, {decoder_depth} and {channels}"
            )
        self.channels, self.mask_ratio, self.norm_pixels = channels, mask_ratio, norm_pixels
        self.gradient_checkpointing = gradient_checkpointing
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = self.patch_size[0] * self.patch_size[1] * channels
        self.patch_embedding = empty_linear(width, dim, True, device, dtype)
        self.register_buffer("positions", sine_positions(dim, self.grid).to(device, dtype or torch.get_default_dtype()))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory))
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim, **factory))
        heads: dict[str, Any] = {"num_heads": num_heads, "head_dim": head_dim, "generator": generator, **factory}
        own = {"lambd": lambd, **(block or {})}
        self.blocks = nn.ModuleList(CRATEBlock(dim, **heads, **own) for _ in range(depth))
        self.head_norm = nn.LayerNorm(dim, **factory)
        self.decoder_blocks = nn.ModuleList(CRATEDecoderBlock(dim, **heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim, **factory)
        self.prediction = empty_linear(dim, width, True, device, dtype)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw linear maps by Xavier's uniform rule with biases 0, dictionaries as they are, tokens N(0, 0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        self.cls_token.normal_(std=0.02, generator=generator)
        self.mask_token.normal_(std=0.02, generator=generator)

    @property
    def num_patches(self) -> int:
        """Number N of patches of an image of the size trained on."""
        return self.grid[0] * self.grid[1]

    def draw_mask(
        self, batch: int, generator: torch.Generator | None = None, *, num_patches: int | None = None
    ) -> Bool[Tensor, "b n"]:
        """Draw which patches are hidden (true), equally many in each image, on the device of ``generator``."""
        n = self.num_patches if num_patches is None else num_patches
        if n < 2:
            raise ValueError(f"num_patches must be at least 2, got {n}")
        hidden = min(max(n - int(n * (1 - self.mask_ratio)), 1), n - 1)
        device = self.cls_token.device if generator is None else generator.device
        order = torch.rand(batch, n, generator=generator, device=device).argsort(dim=1)
        return (order < hidden).to(self.cls_token.device)

    def encode(
        self,
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"] | None = None,
        *,
        interpolate_pos_encoding: bool = False,
    ) -> Float[Tensor, "b t d"]:
        """Return the encoder's tokens (B, 1 + N, d), class token first; patches where ``mask`` is true are hidden."""
        check_images(images, self.channels, self.image_size, self.patch_size, free=interpolate_pos_encoding)
        x = self.patch_embedding(patchify(images, self.patch_size))
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask must be {tuple(x.shape[:2])}, true or false for each patch, "
                f"got {tuple(mask.shape)} of {mask.dtype}"
            )
        hidden = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        x = torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        grid = (images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1])
        x = x + resize_positions(self.positions, self.grid, grid)
        return self.head_norm(self._through(self.blocks, x))

    def decode(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b n q"]:
        """Return the pixels of each patch (B, N, p p c), channels last, from the encoder's tokens."""
        x = self.decoder_norm(self._through(self.decoder_blocks, tokens))
        return self.prediction(x)[:, 1:]

    def _through(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                from torch.utils.checkpoint import checkpoint

                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"] | None = None,
        *,
        interpolate_pos_encoding: bool = False,
    ) -> Float[Tensor, "b n q"]:
        """Return the predicted pixels of each patch; no mask hides nothing."""
        return self.decode(self.encode(images, mask, interpolate_pos_encoding=interpolate_pos_encoding))

    def targets(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n q"]:
        """Return the pixels that are to be predicted, patch by patch."""
        check_images(images, self.channels, self.image_size, self.patch_size, free=True)
        rows = patchify(images, self.patch_size)
        if not self.norm_pixels:
            return rows
        spread, mean = torch.var_mean(rows, dim=-1, keepdim=True)
        return (rows - mean) / (spread + 1e-6).sqrt()

    def loss(
        self,
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"] | None = None,
        *,
        predicted: Float[Tensor, "b n q"] | None = None,
        generator: torch.Generator | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Float[Tensor, ""]:
        """Return the mean squared error on hidden patches; a mask is drawn where none is given."""
        if mask is None:
            n = (images.shape[-2] // self.patch_size[0]) * (images.shape[-1] // self.patch_size[1])
            mask = self.draw_mask(len(images), generator, num_patches=n)
        if predicted is None:
            predicted = self(images, mask, interpolate_pos_encoding=interpolate_pos_encoding)
        targets = self.targets(images)
        if predicted.shape != targets.shape:
            raise ValueError(
                f"predicted must have shape {tuple(targets.shape)}, as the patches, got {tuple(predicted.shape)}"
            )
        error = (predicted - targets).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum().clamp_min(1)

    @torch.no_grad()
    def complete(
        self,
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"],
        *,
        interpolate_pos_encoding: bool = False,
    ) -> Float[Tensor, "b c h w"]:
        """Return the images with their hidden patches filled in; with ``norm_pixels``, by their own mean and spread."""
        made = self(images, mask, interpolate_pos_encoding=interpolate_pos_encoding)
        rows, (p, q) = patchify(images, self.patch_size), self.patch_size
        if self.norm_pixels:
            spread, mean = torch.var_mean(rows, dim=-1, keepdim=True)
            made = made * (spread + 1e-6).sqrt() + mean
        grid = (images.shape[2] // p, images.shape[3] // q)
        return unpatchify(torch.where(mask[..., None], made, rows), grid, self.patch_size)
