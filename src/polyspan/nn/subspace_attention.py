"""Attention over the places of a feature map, one map for each group of channels, at a few numbers a channel."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
OFFICIAL = {
    "conv_dws.weight": "scale",
    "conv_dws.bias": "scale_bias",
    "conv_point.weight": "point",
    "conv_point.bias": "point_bias",
}


class _Folded(NamedTuple):
    """What is left of the weights once the batch norms are folded in, in float32 or wider."""

    scale: Tensor
    shift: Tensor | None
    point: Tensor
    offset: Tensor | None


class _GroupAttention(nn.Module):
    """What the trainable module and its folded form share: sizes, checks and the pool."""

    num_channels: int
    num_groups: int
    kernel_size: int
    dims: int
    residual: bool
    normed: bool

    def num_macs(self, *map_shape: int) -> int:
        """Return the multiply-adds for one item with a map of this shape: 2 a channel and place, as the paper counts.

        The pool, the softmax and the final weighting are not convolutions and are left out, as everywhere.
        """
        return 2 * self.num_channels * math.prod(map_shape)

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"x must hold floats, got {x.dtype}")
        if x.ndim != self.dims + 2 or x.shape[1] != self.num_channels:
            axes = ("length", "height, width", "depth, height, width")[self.dims - 1]
            raise ValueError(f"x must be (batch, {self.num_channels}, {axes}), got shape {tuple(x.shape)}")
        if 0 in x.shape[2:]:
            raise ValueError(f"x must have a map of at least one place, got shape {tuple(x.shape)}")
        if not torch.compiler.is_compiling() and math.prod(x.shape[2:]) == 1:
            warnings.warn(
                f"a map of one place has attention 1: the output is exactly {'2x' if self.residual else 'x'}",
                UserWarning,
                stacklevel=3,
            )

    def _pool(self, u: Tensor) -> Tensor:
        if self.kernel_size == 1:
            return u
        if self.dims == 2 and u.device.type == "cpu":
            # Torch's max-pool on CPU is some ten times as fast with channels last, copying included.
            u = u.contiguous(memory_format=torch.channels_last)
        return POOLS[self.dims](u, self.kernel_size, stride=1, padding=self.kernel_size // 2)

    def extra_repr(self) -> str:
        """Name the sizes, as torch's own layers do."""
        said = f"{self.num_channels}, num_groups={self.num_groups}, kernel_size={self.kernel_size}"
        return said + ("" if self.residual else ", residual=False") + ("" if self.dims == 2 else f", dims={self.dims}")


class ULSAM(_GroupAttention):
    r"""Attention over places for compact networks: (B, m, \*map) to the same shape, at 4m + 2g numbers.

    The channels fall into g groups of G = m/g neighbours. Group n gets one map of attention,

    .. math:: A_n = \operatorname{softmax}_{places}\; r(p_n^\top \operatorname{maxpool}_{k}\, r(s \odot F_n)),
              \qquad \text{out}_n = (1 + A_n) \odot F_n,

    with one number s a channel, G numbers p_n a group, and r a batch norm and a ReLU. Put it behind a block, or in its
    place (:func:`insert_ulsam`, :func:`replace_with_ulsam`).

    It is close to the identity: as A_n sums to 1, a map of hw places is multiplied by 1 + 1/hw on average and by 2 at
    most, and gradients into the attention shrink like 1/hw. On maps of 56 by 56 or more it hardly learns; on one place
    it is the doubling 2x, which is warned about; a single such image leaves the running statistics alone.
    Where all logits of a group are 0, behind the ReLU, its attention is
    uniform. In training the batch norms let one image's NaN reach the whole batch; in eval mode it stays in its group.
    Source: catalogue entry ``ulsam``.

    Parameters
    ----------
    num_channels : int
        m, at least 1.
    num_groups : int, default=4
        g, a divisor of m.
    kernel_size : int, default=3
        Width k of the max-pool along every axis, odd; 1 leaves it out.
    bias : bool, default=False
        Biases before the batch norms, as the authors' code has (5m + 3g numbers); the batch norms cancel them.
    bn_momentum : float, default=0.1
        Weight of the newest batch in the running statistics. The authors' code has 0.9, which keeps little else.
    residual : bool, default=True
        Add the input; without it the output is about hw times smaller.
    norm : bool, default=True
        The batch norms and the ReLU. Without them it is what the paper draws and counts: 2m numbers.
    dims : {1, 2, 3}, default=2
        Axes of the map behind batch and channels.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.

    Raises
    ------
    ValueError
        An argument is out of its range; for ``num_groups`` the nearest divisors are named.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 4,
        kernel_size: int = 3,
        bias: bool = False,
        bn_momentum: float | int = 0.1,
        residual: bool = True,
        *,
        norm: bool = True,
        dims: int = 2,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_groups(num_channels, num_groups)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        if not 0 < bn_momentum <= 1:
            raise ValueError(f"bn_momentum must be above 0 and at most 1, got {bn_momentum}")
        if dims not in NORMS:
            raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
        self.num_channels, self.num_groups, self.kernel_size = num_channels, num_groups, kernel_size
        self.residual, self.dims, self.normed = residual, dims, norm
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        ones = (1,) * dims
        # Shapes of a depthwise and of a grouped 1x1 convolution, which is what these weights are.
        self.scale = nn.Parameter(torch.empty(num_channels, 1, *ones, **factory))
        self.point = nn.Parameter(torch.empty(num_groups, num_channels // num_groups, *ones, **factory))
        self.scale_bias = nn.Parameter(torch.empty(num_channels, **factory)) if bias else None
        self.point_bias = nn.Parameter(torch.empty(num_groups, **factory)) if bias else None
        self.scale_norm = NORMS[dims](num_channels, momentum=bn_momentum, **factory) if norm else None
        self.point_norm = NORMS[dims](num_groups, momentum=bn_momentum, **factory) if norm else None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights as torch's convolutions do, and set the batch norms back."""
        for weight, bias, fan_in in (
            (self.scale, self.scale_bias, 1),
            (self.point, self.point_bias, self.point[0].numel()),
        ):
            bound = 1 / math.sqrt(fan_in)
            for parameter in (weight, bias):
                if parameter is not None and not parameter.is_meta:
                    parameter.uniform_(-bound, bound, generator=generator)
        for norm in (self.scale_norm, self.point_norm):
            if norm is not None:
                norm.reset_parameters()

    def forward(self, x: Tensor) -> Float[Tensor, "batch channels *map"]:
        r"""Return the map (B, m, \*map) with every group weighted by 1 plus its attention, in the dtype of ``x``.

        Raises
        ------
        TypeError
            ``x`` holds no floats.
        ValueError
            It has another number of axes or channels, or a map without places.
        """
        self._check(x)
        # One value a channel has no variance, and decides nothing: attention is 1 on one place.
        alone = self.normed and math.prod(x.shape[2:]) == 1 and x.shape[0] == 1
        logits = self._batch_logits(x) if self.training and not alone else _logits(x, self._folded(), self)
        return _weighted(x, _softmax(logits), self.residual)

    @torch.no_grad()
    def attention_maps(self, x: Tensor) -> Float[Tensor, "batch groups *map"]:
        r"""Return the attention (B, g, \*map) as in eval mode, float32 or wider: every map is 0 or more and sums to 1.

        Running statistics are used and left alone, also while the module is in training mode.
        """
        self._check(x)
        return _softmax(_logits(x, self._folded(), self)).unflatten(-1, x.shape[2:])

    def sizes(self) -> dict[str, Any]:
        """Return the arguments that make a layer of these sizes, as JSON types."""
        norm: Any = self.scale_norm
        return {
            "num_channels": self.num_channels, "num_groups": self.num_groups, "kernel_size": self.kernel_size,
            "bias": self.scale_bias is not None, "residual": self.residual, "norm": self.normed, "dims": self.dims,
        } | ({} if norm is None else {"bn_momentum": float(norm.momentum)})  # fmt: skip

    def fuse(self) -> "nn.Module":
        """Return the module for inference: batch norms folded into m scales and shifts, m weights and g offsets.

        It computes what this module computes in eval mode, and has nothing to train.
        """
        return FusedULSAM(self)

    def _batch_logits(self, x: Tensor) -> Tensor:
        """Logits (B, g, places) by the statistics of this batch, which the running ones take in."""
        u = x * self.scale.view(-1, *(1,) * self.dims)
        if self.scale_bias is not None:
            u = u + self.scale_bias.view(-1, *(1,) * self.dims)
        if self.scale_norm is not None:
            u = F.relu(self.scale_norm(u))
        q = _group_sums(self._pool(u), self.point.flatten(1))
        if self.point_bias is not None:
            q = q + self.point_bias.unsqueeze(-1)
        if self.point_norm is not None:
            # The norm of a group is over batch and places, whatever the number of axes.
            q = F.relu(self.point_norm(q.unflatten(-1, x.shape[2:]))).flatten(2)
        return q

    def _folded(self) -> _Folded:
        scale, shift = _fold(self.scale.flatten(), self.scale_bias, self.scale_norm)
        gain, offset = _fold(torch.ones_like(self.point[:, 0].flatten()), self.point_bias, self.point_norm)
        return _Folded(scale, shift, self.point.flatten(1) * gain.unsqueeze(-1), offset)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as torch does, but where keys or shapes are other ones (``strict``), say which and change nothing."""
        if strict:
            own = self.state_dict()
            missing = [key for key in own if key not in state_dict]
            extra = [key for key in state_dict if key not in own]
            if missing or extra:
                raise RuntimeError(
                    f"state_dict must have the keys of this ULSAM; missing: {missing}, unexpected: {extra}; "
                    "nothing was loaded"
                )
            wrong = {
                key: (tuple(state_dict[key].shape), tuple(value.shape))
                for key, value in own.items()
                if state_dict[key].shape != value.shape
            }
            if wrong:
                raise RuntimeError(
                    f"state_dict must have the shapes of this ULSAM; (found, expected): {wrong}; nothing was loaded"
                )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @classmethod
    def from_official_state_dict(cls, state_dict: Mapping[str, Tensor], **options: Any) -> "ULSAM":
        """Make the module from a state dict of the authors' code, which keeps every group apart.

        Parameters
        ----------
        state_dict : mapping of str to tensor
            Keys ``subspaces.{n}.conv_dws.weight`` and so on, with or without a prefix common to all.
        **options :
            As for the class; ``bias=True`` and ``bn_momentum=0.9``, as that code has, where not given.

        Raises
        ------
        ValueError
            No key names a subspace, keys are missing (named) or groups differ in size.
        """
        heads = {key.split("subspaces.")[0] for key in state_dict if "subspaces." in key}
        if len(heads) != 1:
            raise ValueError(f"state_dict must hold 'subspaces.N.' keys of one module, got prefixes {sorted(heads)}")
        prefix = heads.pop() + "subspaces."
        numbers = {int(key.removeprefix(prefix).split(".")[0]) for key in state_dict if key.startswith(prefix)}
        g = max(numbers) + 1
        norms = {
            f"{theirs}.{name}": f"{ours}.{name}"
            for theirs, ours in (("bn_dws", "scale_norm"), ("bn_point", "point_norm"))
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        }
        names = OFFICIAL | norms
        wanted = [f"{prefix}{n}.{key}" for n in range(g) for key in names]
        # Checkpoints from before torch counted batches have no such number.
        missing = [key for key in wanted if key not in state_dict and not key.endswith("num_batches_tracked")]
        if missing:
            raise ValueError(f"state_dict must hold all keys of {g} subspaces, missing: {missing}")
        made = {}
        for theirs, ours in names.items():
            parts = [state_dict.get(f"{prefix}{n}.{theirs}", torch.tensor(0)) for n in range(g)]
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"{theirs} must have one shape in all groups, got {[tuple(p.shape) for p in parts]}")
            made[ours] = parts[0] if parts[0].ndim == 0 else torch.cat(list(parts))
        weight = made["scale"]
        options = {"bias": True, "bn_momentum": 0.9, "device": weight.device, "dtype": weight.dtype, **options}
        module = cls(len(weight), g, **options)
        if module.scale_bias is None:
            # What a bias adds, the batch norm takes away again with its mean.
            made["scale_norm.running_mean"] = made["scale_norm.running_mean"] - made.pop("scale_bias")
            made["point_norm.running_mean"] = made["point_norm.running_mean"] - made.pop("point_bias")
        module.load_state_dict(made)
        return module


class FusedULSAM(_GroupAttention):
    """A :class:`ULSAM` whose batch norms are folded in, for inference; made by :meth:`ULSAM.fuse`.

    Parameters
    ----------
    source : ULSAM
    """

    scale: Tensor
    shift: Tensor | None
    point: Tensor
    offset: Tensor | None

    def __init__(self, source: ULSAM):
        super().__init__()
        self.num_channels, self.num_groups, self.dims = source.num_channels, source.num_groups, source.dims
        self.kernel_size, self.residual, self.normed = source.kernel_size, source.residual, source.normed
        for name, value in source._folded()._asdict().items():
            self.register_buffer(name, None if value is None else value.detach().clone())
        self.eval()

    def forward(self, x: Tensor) -> Float[Tensor, "batch channels *map"]:
        """Return what the source returns in eval mode."""
        self._check(x)
        folded = _Folded(self.scale, self.shift, self.point, self.offset)
        return _weighted(x, _softmax(_logits(x, folded, self)), self.residual)


def check_groups(num_channels: int, num_groups: int) -> None:
    """Raise ValueError unless the groups divide the channels, naming the nearest divisors."""
    if num_channels < 1:
        raise ValueError(f"num_channels must be at least 1, got {num_channels}")
    if not 1 <= num_groups <= num_channels:
        raise ValueError(f"num_groups must be between 1 and num_channels={num_channels}, got {num_groups}")
    if num_channels % num_groups:
        below = next(g for g in range(num_groups, 0, -1) if num_channels % g == 0)
        above = next(g for g in range(num_groups, num_channels + 1) if num_channels % g == 0)
        raise ValueError(
            f"num_groups must divide num_channels={num_channels}, got {num_groups}; the nearest divisors are "
            f"{below} and {above}"
        )


def _fold(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Scale and shift of ``norm(weight * x + bias)`` with running statistics, in float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    if norm is None:
        return weight, bias
    gain = norm.weight.to(wide) * torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    mean = norm.running_mean.to(wide) if bias is None else norm.running_mean.to(wide) - bias
    return weight * gain, norm.bias.to(wide) - mean * gain


def _logits(x: Tensor, folded: _Folded, module: _GroupAttention) -> Tensor:
    """Logits (B, g, places) from folded weights, in float32 or wider behind the sums over channels."""
    ones = (1,) * module.dims
    scale = folded.scale.to(x.dtype).view(-1, *ones)
    u = x * scale if folded.shift is None else torch.addcmul(folded.shift.to(x.dtype).view(-1, *ones), x, scale)
    if module.normed:
        u = F.relu(u)
    q = _group_sums(module._pool(u), folded.point.to(x.dtype))
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    if folded.offset is not None:
        q = q + folded.offset.unsqueeze(-1)
    return F.relu(q) if module.normed else q


def _group_sums(p: Tensor, point: Tensor) -> Tensor:
    """Weighted sums (B, g, places) of a map (B, m, *map) over the channels of every group, by weights (g, G)."""
    grouped = p.unflatten(1, point.shape).flatten(3)
    return torch.matmul(point.unsqueeze(1), grouped).squeeze(2)


def _softmax(logits: Tensor) -> Tensor:
    """Attention over places in float32 or wider: the sum over places is lost in half precision."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _weighted(x: Tensor, attention: Tensor, residual: bool) -> Tensor:
    """``(1 + A) x``, or ``A x`` without the residual, in the dtype and memory format of ``x``."""
    g = attention.shape[1]
    grouped = x.unflatten(1, (g, x.shape[1] // g))
    weights = attention.to(x.dtype).unflatten(-1, x.shape[2:]).unsqueeze(2)
    made = torch.addcmul(grouped, grouped, weights) if residual else grouped * weights
    return made.flatten(1, 2)
