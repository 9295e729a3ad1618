"""Multi-head scan of image feature maps in parallel subspaces, with the blocks that are made of it."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ._bare_layers import bare, draw
from ._route_scan import RouteScan

PATTERNS = ("snake", "diagonal", "spiral", "raster")


def check_map(x: Tensor, channels: int, *, channels_last: bool = True) -> None:
    """Refuse what is no feature map of so many channels."""
    if x.ndim != 4:
        axes = f"(b, h, w, {channels})" if channels_last else f"(b, {channels}, h, w)"
        raise ValueError(f"x must be {axes}, got shape {tuple(x.shape)}")
    found = x.shape[-1] if channels_last else x.shape[1]
    if found != channels:
        raise ValueError(f"x must have {channels} channels, got {found}")


class MultiHeadScan2d(nn.Module):
    r"""Mix the pixels of a feature map at linear cost: each head scans a subspace of its channels along its own routes.

    .. math:: y = W_o\,\mathrm{LN}\big[\,\mathrm{merge}_k\;\rho_k^{-1}\,\mathrm{scan}_k\,\rho_k\,(W_s x)_i\,\big]_i

    Head i takes the i-th slice of :math:`W_s x`, reads it as K sequences (two routes :math:`\rho` of its pattern, and
    their reverses), scans each by a selective scan of its own (:func:`~polyspan.nn.selective_scan`), puts them back in
    image order and merges them, elementwise. ``merge="cv"``, the source's scan-route attention, is
    :math:`\sum_k y_k\,\max(0, \mathrm{cv}(y) - t)` with the coefficient of variation cv of
    ``y - min(y)`` over the routes.

    The gate is 0, and passes no gradient, where all routes agree. Of four routes that disagree, cv lies between 2/3
    and 2: a threshold t below 2/3 screens nothing off and makes a smaller gate only, and one of 2 or more screens off
    everything, and is refused. The gate does not see the sign of a disagreement. All is computed in float32 or wider.
    Source: catalogue entry ``mhs-vm``; ``merge="attention"``, learnt thresholds, and the patterns "hilbert" and
    "morton" are ours.

    Parameters
    ----------
    channels : int
    num_heads : int, default=4
    patterns : sequence of str, callable or array
        As :func:`~polyspan.nn.scan_routes` takes them; head i has ``patterns[i % len(patterns)]``. All must have as
        many routes. A callable must serve 2 by 2 grids too; an array serves one size only. Where there is one that is
        no name, a compiled or exported module runs only in the process in which it was made.
    d_state : int, default=16
        States N a channel.
    dt_rank : int or "auto"
        Rank of the map to the lengths of steps; "auto" is a sixteenth of a head's channels, rounded up.
    merge : {"cv", "sum", "attention"}, default="cv"
        "attention" weighs routes by a softmax of their products with one learnt vector a head, which is 0, and the
        merge thus a sum, at first.
    threshold : float, default=0.5
        t, at least 0 and below √K.
    learn_threshold : bool, default=False
        Learn t, from ``threshold`` on.
    with_proj : bool, default=True
        Whether LayerNorm and :math:`W_o` follow the merge.
    channels_last : bool, default=True
        Whether maps are (b, h, w, channels) or (b, channels, h, w).
    uneven : {"raise", "pad"}, default="raise"
        What to do where ``num_heads`` does not divide ``channels``: "pad" rounds a head's channels up.
    backend : str, default="auto"
        Of :func:`~polyspan.nn.selective_scan`.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.

    Attributes
    ----------
    num_routes : int
        K, twice the routes of a pattern.

    Raises
    ------
    ValueError
        An argument is outside of what is stated above.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 4,
        patterns: Sequence[Any] = PATTERNS,
        d_state: int = 16,
        dt_rank: str | int = "auto",
        merge: str = "cv",
        threshold: float | int = 0.5,
        learn_threshold: bool = False,
        with_proj: bool = True,
        channels_last: bool = True,
        *,
        uneven: str = "raise",
        backend: str = "auto",
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 1 <= num_heads <= channels:
            raise ValueError(f"num_heads must be between 1 and channels={channels}, got {num_heads}")
        if uneven not in ("raise", "pad"):
            raise ValueError(f"uneven must be 'raise' or 'pad', got {uneven!r}")
        if channels % num_heads and (uneven == "raise" or not with_proj):
            raise ValueError(
                f"num_heads must divide channels={channels}, got {num_heads}; uneven='pad' rounds a head's channels up"
                + ("" if with_proj else ", which with_proj=False cannot undo")
            )
        self.channels, self.num_heads, self.channels_last = channels, num_heads, channels_last
        width = -(-channels // num_heads)
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = width * num_heads
        self.to_subspaces = bare(nn.Linear, channels, inner, bias=False, **how)
        self.scan = RouteScan(
            width, num_heads, patterns, d_state, dt_rank, merge, threshold, learn_threshold, backend,
            generator=generator, **how,
        )  # fmt: skip
        self.norm = nn.LayerNorm(inner, **how) if with_proj else None
        self.output = bare(nn.Linear, inner, channels, bias=False, **how) if with_proj else None
        self.reset_parameters(generator)

    @property
    def num_routes(self) -> int:
        """Sequences a head, K."""
        return self.scan.num_routes

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the projections as ``nn.Linear`` does, and the scan as its own method says."""
        self.scan.reset_parameters(generator)
        draw(self.to_subspaces, generator)
        if self.norm is not None and self.output is not None:
            self.norm.reset_parameters()
            draw(self.output, generator)

    def forward(self, x: Float[Tensor, "b p q r"]) -> Float[Tensor, "b p q r"]:
        """Mix a feature map."""
        check_map(x, self.channels, channels_last=self.channels_last)
        x = x if self.channels_last else x.permute(0, 2, 3, 1)
        y = self.scan(self.to_subspaces(x))
        if self.norm is not None and self.output is not None:
            y = self.output(self.norm(y))
        return y if self.channels_last else y.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        s = self.scan
        return (
            f"channels={self.channels}, num_heads={self.num_heads}, d_state={s.d_state}, dt_rank={s.dt_rank}, "
            f"merge={s.merge!r}, patterns={s.patterns}"
        )


class _ScanBlock(nn.Module):
    """Residual gated block: ``x + out(norm(mix(silu(conv(v)))) * silu(z))``, where ``v, z`` come from ``norm(x)``."""

    def __init__(
        self,
        channels: int,
        inner: int,
        mix: nn.Module,
        project_out: bool,
        drop_path: float | int,
        generator: torch.Generator | None,
        device: Any,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {drop_path}")
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels, self.drop_path, self.generator = channels, float(drop_path), generator
        self.input_norm = nn.LayerNorm(channels, **how)
        self.input = bare(nn.Linear, channels, 2 * inner, bias=False, **how)
        self.conv = bare(nn.Conv2d, inner, inner, 3, padding=1, groups=inner, **how)
        self.mix = mix
        self.norm = nn.LayerNorm(inner, **how)
        self.output = bare(nn.Linear, inner, channels, bias=False, **how) if project_out else None
        draw(self.input, generator)
        draw(self.conv, generator)
        if self.output is not None:
            draw(self.output, generator)

    def draw_paths(self, batch: int, device: Any = None) -> Tensor | None:
        """Draw for which of so many maps what is mixed counts, (b,) true or false; None where it counts for all.

        A generator is no part of a compiled graph: to compile a block that has one and drops paths, draw outside, and
        give :meth:`forward` what was drawn.
        """
        if not (self.training and self.drop_path):
            return None
        # A seeded generator is mostly the CPU's, wherever the maps are, and draws there only.
        place = device if self.generator is None else self.generator.device
        return torch.rand(batch, device=place, generator=self.generator) >= self.drop_path

    def forward(self, x: Float[Tensor, "b h w c"], kept: Tensor | None = None) -> Float[Tensor, "b h w c"]:
        """Mix a feature map, channels last; ``kept`` (b,) from :meth:`draw_paths`, which is drawn where not given."""
        check_map(x, self.channels)
        if kept is not None and kept.shape != x.shape[:1]:
            raise ValueError(f"kept must have shape {tuple(x.shape[:1])}, one a map, got {tuple(kept.shape)}")
        v, z = self.input(self.input_norm(x)).chunk(2, dim=-1)
        v = F.silu(self.conv(v.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        y = self.norm(self.mix(v)) * F.silu(z)
        y = y if self.output is None else self.output(y)
        kept = self.draw_paths(len(x), x.device) if kept is None else kept
        if kept is not None:
            y = y * kept.view(-1, 1, 1, 1).to(x.device, y.dtype) / (1 - self.drop_path)
        return x + y


class MHSBlock(_ScanBlock):
    r"""Residual block of :class:`MultiHeadScan2d`: depthwise 3 by 3 convolution, scan, gate; no output projection.

    .. math:: v, z = W\,\mathrm{LN}(x), \qquad x + \mathrm{LN}\,\mathrm{MHS}(\mathrm{SiLU}\,\mathrm{conv}\,v) \odot
        \mathrm{SiLU}(z)

    Maps are (b, h, w, channels). At 96 channels it has 0.56 times the parameters of :class:`SS2DBlock`.
    Source: catalogue entry ``mhs-vm``.

    Parameters
    ----------
    channels : int
    drop_path : float, default=0.0
        Share of the items of a batch that skip the block while training.
    scan
        Arguments of :class:`MultiHeadScan2d` by name.
    generator : torch.Generator, optional
        Of the weights, and of which items skip the block.
    """

    def __init__(
        self,
        channels: int,
        drop_path: float | int = 0.0,
        *,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **scan: Any,
    ):
        mix = MultiHeadScan2d(channels, generator=generator, device=device, dtype=dtype, **scan)
        super().__init__(channels, channels, mix, False, drop_path, generator, device, dtype)


class SS2DBlock(_ScanBlock):
    """Residual block of the usual 2D selective scan: twice the channels, one head, raster routes summed.

    The rival of :class:`MHSBlock`, with an output projection. Maps are (b, h, w, channels).
    Source: catalogue entry ``mhs-vm``, in which it is the baseline.

    Parameters
    ----------
    channels : int
    drop_path : float, default=0.0
        Share of the items of a batch that skip the block while training.
    expand : int, default=2
        Inner channels for one channel.
    d_state : int, default=16
    backend : str, default="auto"
        Of :func:`~polyspan.nn.selective_scan`.
    generator : torch.Generator, optional
        Of the weights, and of which items skip the block.
    """

    def __init__(
        self,
        channels: int,
        drop_path: float | int = 0.0,
        *,
        expand: int = 2,
        d_state: int = 16,
        backend: str = "auto",
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        if channels < 1 or expand < 1:
            raise ValueError(f"channels and expand must be at least 1, got {channels} and {expand}")
        inner, rank = expand * channels, -(-channels // 16)
        mix = RouteScan(
            inner, 1, ("raster",), d_state, rank, "sum", 0.0, False, backend,
            generator=generator, device=device, dtype=dtype,
        )  # fmt: skip
        super().__init__(channels, inner, mix, True, drop_path, generator, device, dtype)
