"""Transformer for images whose layers compress tokens towards learnt subspaces and then make them sparse."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ._crate_blocks import CRATEBlock, CRATEDecoderBlock
from ._patches import check_images, check_patch_mask, grid_of, pair, patchify, resize_positions
from ._rate_attention import SubspaceSelfAttention, empty_linear, fill_linear
from ._sparsifying import SparsifyingISTA

__all__ = [
    "CRATE",
    "CRATEBlock",
    "CRATEDecoderBlock",
    "CRATEStates",
    "SparsifyingISTA",
    "SubspaceSelfAttention",
    "crate_base",
    "crate_large",
    "crate_small",
    "crate_tiny",
]

SIZES = {"tiny": (384, 12, 6), "small": (576, 12, 12), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Width, depth and heads of the published networks."""


class CRATEStates(NamedTuple):
    """What a pass goes through: embedded tokens, and for each layer the tokens between its halves and after it.

    ``outputs`` has ``depth + 1`` tensors (B, 1 + N, d), the embedded tokens first; ``halves`` has ``depth``.
    """

    logits: Tensor
    outputs: list[Tensor]
    halves: list[Tensor]


class CRATE(nn.Module):
    r"""Classify images by the white-box transformer: patches, a class token, :class:`CRATEBlock` layers, a linear head.

    Patches are normalised, embedded, normalised again; positions and class token are learnt, standard normal at the
    start. The features of an image are its class token, or the mean of all tokens. About a third of the parameters of a
    ViT of equal width. At equal parameters the paper finds it a few points below a ViT on ImageNet.
    Source: catalogue entry ``crate``.

    Parameters
    ----------
    image_size, patch_size : int or tuple of int
        Height and width in pixels; the first must be a multiple of the second.
    num_classes : int
        0 leaves the head out: the output are the features.
    dim, depth, num_heads : int
        Width of tokens, number of layers, subspaces a layer.
    head_dim : int, optional
        Dimension of each subspace; ``dim / num_heads`` where not given.
    channels : int, default=3
    pool : {"cls", "mean"}, default="cls"
    dropout, emb_dropout : float, default=0.0
        In attention, and after the positions.
    patch_norm : bool, default=True
        Normalise each patch before it is embedded. A patch of one value would become 0: switch it off there.
    embedding_norm : bool, default=True
        Normalise each embedded patch. The encoder of :class:`CRATEMAE` has neither norm.
    causal : bool, default=False
        Tokens see only those before; the class token then stands last, so that it sees all.
    gradient_checkpointing : bool, default=False
        Compute layers again in the backward pass in place of keeping their insides.
    block : dict, optional
        Further arguments of :class:`CRATEBlock`, such as ``{"step": "exact", "tied_output": True, "eta": 0.05}``.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.

    Attributes
    ----------
    config : dict
        The arguments it was made with, in JSON types.

    Raises
    ------
    ValueError
        Sizes do not fit, or images of another size or number of channels come.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] | list[int],
        patch_size: int | tuple[int, int] | list[int],
        num_classes: int,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        channels: int = 3,
        pool: str = "cls",
        dropout: float | int = 0.0,
        emb_dropout: float | int = 0.0,
        patch_norm: bool = True,
        embedding_norm: bool = True,
        causal: bool = False,
        gradient_checkpointing: bool = False,
        block: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.image_size, self.patch_size = pair(image_size), pair(patch_size)
        self.grid = grid_of(self.image_size, self.patch_size)
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool must be 'cls' or 'mean', got {pool!r}")
        if depth < 1 or channels < 1 or num_classes < 0:
            raise ValueError(
                "depth and channels must be at least 1 and num_classes at least 0, "
                f"got {depth}, {channels} and {num_classes}"
            )
        if not 0 <= emb_dropout < 1:
            raise ValueError(f"emb_dropout must be at least 0 and below 1, got {emb_dropout}")
        self.channels, self.pool, self.causal, self.num_classes = channels, pool, causal, num_classes
        self.gradient_checkpointing = gradient_checkpointing
        self.emb_dropout = float(emb_dropout)
        self.config: dict[str, Any] = {
            "image_size": list(self.image_size), "patch_size": list(self.patch_size), "num_classes": num_classes,
            "dim": dim, "depth": depth, "num_heads": num_heads, "head_dim": head_dim, "channels": channels,
            "pool": pool, "dropout": dropout, "emb_dropout": emb_dropout, "patch_norm": patch_norm,
            "embedding_norm": embedding_norm, "causal": causal, "block": dict(block or {}),
        }  # fmt: skip
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = self.patch_size[0] * self.patch_size[1] * channels
        self.patch_norm = nn.LayerNorm(width, **factory) if patch_norm else nn.Identity()
        self.patch_embedding = empty_linear(width, dim, True, device, dtype)
        self.embedding_norm = nn.LayerNorm(dim, **factory) if embedding_norm else nn.Identity()
        self.positions = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], dim, **factory))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory))
        options: dict[str, Any] = {"dropout": dropout, "causal": causal, **(block or {})}
        self.blocks: Any = nn.ModuleList(
            CRATEBlock(dim, num_heads, head_dim, **options, generator=generator, **factory) for _ in range(depth)
        )
        self.head_norm = nn.LayerNorm(dim, **factory)
        self.head: Any = empty_linear(dim, num_classes, True, device, dtype) if num_classes else nn.Identity()
        fill_linear(self.patch_embedding, generator)
        if num_classes:
            fill_linear(self.head, generator)
        with torch.no_grad():
            self.positions.normal_(generator=generator)
            self.cls_token.normal_(generator=generator)

    @torch.no_grad()
    def reset_head(self, num_classes: int, *, generator: torch.Generator | None = None) -> None:
        """Put a fresh head for other classes on the network, for fine-tuning."""
        weight = self.patch_embedding.weight
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = self.config["num_classes"] = num_classes
        self.head = empty_linear(weight.shape[0], num_classes, True, weight.device, weight.dtype)
        fill_linear(self.head, generator)

    def embed(self, images: Tensor, *, interpolate_pos_encoding: bool = False) -> Tensor:
        """Return tokens (B, 1 + N, d) of images (B, c, h, w), with class token and positions."""
        check_images(images, self.channels, self.image_size, self.patch_size, free=interpolate_pos_encoding)
        rows = patchify(images, self.patch_size)
        x = self.embedding_norm(self.patch_embedding(self.patch_norm(rows)))
        grid = (images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + resize_positions(self.positions, self.grid, grid)
        x = F.dropout(x, self.emb_dropout, self.training) if self.emb_dropout else x
        return x.roll(-1, dims=1) if self.causal else x

    def _with_cls(self, mask: Tensor | None) -> Tensor | None:
        """Widen a mask (B, N) of patches by the class token, which is always there."""
        if mask is None:
            return None
        own = torch.ones_like(mask[:, :1])
        return torch.cat([mask, own] if self.causal else [own, mask], dim=1)

    def forward_features(
        self,
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"] | None = None,
        *,
        interpolate_pos_encoding: bool = False,
    ) -> Float[Tensor, "b t d"]:
        """Return the tokens (B, 1 + N, d) that leave the last layer; ``mask`` is false for patches to leave out."""
        x = self.embed(images, interpolate_pos_encoding=interpolate_pos_encoding)
        check_patch_mask(mask, len(x), x.shape[1] - 1)
        mask = self._with_cls(mask)
        for block in self.blocks:
            x = self._layer(block, x, mask)
        return x

    def _layer(self, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            return checkpoint(block, x, mask, use_reentrant=False)
        return block(x, mask)

    def forward_head(
        self, x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b n"] | None = None, *, pre_logits: bool = False
    ) -> Float[Tensor, "b _"]:
        """Return logits of tokens from :meth:`forward_features`, or the pooled features before norm and head."""
        if self.pool == "cls":
            pooled = x[:, -1] if self.causal else x[:, 0]
        elif mask is None:
            pooled = x.mean(dim=1)
        else:
            seen = self._with_cls(mask)
            assert seen is not None
            pooled = (x * seen[..., None]).sum(dim=1) / seen.sum(dim=1, keepdim=True)
        return pooled if pre_logits else self.head(self.head_norm(pooled))

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"] | None = None,
        *,
        interpolate_pos_encoding: bool = False,
    ) -> Float[Tensor, "b _"]:
        """Return logits (B, C), or normalised features (B, d) where there is no head."""
        tokens = self.forward_features(images, mask, interpolate_pos_encoding=interpolate_pos_encoding)
        return self.forward_head(tokens, mask)

    def forward_states(
        self,
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"] | None = None,
        *,
        interpolate_pos_encoding: bool = False,
    ) -> CRATEStates:
        """Return logits together with the tokens after each half of each layer."""
        x = self.embed(images, interpolate_pos_encoding=interpolate_pos_encoding)
        check_patch_mask(mask, len(x), x.shape[1] - 1)
        seen = self._with_cls(mask)
        outputs, halves = [x], []
        for block in self.blocks:
            h = block.compress(x, seen)
            x = block.sparsify(h)
            halves.append(h)
            outputs.append(x)
        return CRATEStates(self.forward_head(x, mask), outputs, halves)

    @torch.no_grad()
    def attention_maps(
        self, images: Float[Tensor, "b c h w"], layer: int = -1, *, interpolate_pos_encoding: bool = False
    ) -> Float[Tensor, "b K a b2"]:
        """Return for each head of a layer how much the class token attends to each patch, as a picture of the patches.

        In trained networks heads tend to fall on parts of the object; rows of the whole map sum to 1.
        """
        depth = len(self.blocks)
        if not -depth <= layer < depth:
            raise ValueError(f"layer must be between {-depth} and {depth - 1}, got {layer}")
        x = self.embed(images, interpolate_pos_encoding=interpolate_pos_encoding)
        at = range(depth)[layer]
        for block in self.blocks[:at]:
            x = block(x)
        block = self.blocks[at]
        maps = block.attention.attention_map(block.attention_norm(x))
        of_cls = maps[:, :, -1, :-1] if self.causal else maps[:, :, 0, 1:]
        rows = images.shape[2] // self.patch_size[0]
        return of_cls.unflatten(-1, (rows, of_cls.shape[-1] // rows))


def _sized(name: str, image_size: int | tuple[int, int], patch_size: Any, num_classes: int, options: dict) -> CRATE:
    dim, depth, heads = SIZES[name]
    return CRATE(image_size, patch_size, num_classes, dim, depth, heads, **options)


def crate_tiny(num_classes: int = 1000, *, image_size: Any = 224, patch_size: Any = 16, **options: Any) -> CRATE:
    """Make the published network of width 384, 12 layers, 6 heads: 6.09 million parameters at 1,000 classes."""
    return _sized("tiny", image_size, patch_size, num_classes, options)


def crate_small(num_classes: int = 1000, *, image_size: Any = 224, patch_size: Any = 16, **options: Any) -> CRATE:
    """Make the published network of width 576, 12 layers, 12 heads: 13.12 million parameters at 1,000 classes."""
    return _sized("small", image_size, patch_size, num_classes, options)


def crate_base(num_classes: int = 1000, *, image_size: Any = 224, patch_size: Any = 16, **options: Any) -> CRATE:
    """Make the published network of width 768, 12 layers, 12 heads: 22.80 million parameters at 1,000 classes."""
    return _sized("base", image_size, patch_size, num_classes, options)


def crate_large(num_classes: int = 1000, *, image_size: Any = 224, patch_size: Any = 16, **options: Any) -> CRATE:
    """Make the published network of width 1024, 24 layers, 16 heads: 77.64 million parameters at 1,000 classes."""
    return _sized("large", image_size, patch_size, num_classes, options)
