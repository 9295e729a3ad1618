"""Layers that add a Tucker-shaped update to a frozen layer: linear, convolutions of every kind, embeddings."""

import math
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyspan.errors import require
from polyspan.run import torch_generator

from ._tucker import direct_sum, expand_core, mode_product
from ._tucker_magnitude import growth, unit_norms, unit_shape, updated_norms, with_magnitude

require("peft", extra="hf", purpose="a Tucker adapter")
tuners: Any = require("peft.tuners.tuners_utils", extra="hf")
quantised: Any = require("peft.utils.integrations", extra="hf")

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PREFIX = "tucker_adapter_"
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def is_matrix_stored_in_by_out(layer: nn.Module) -> bool:
    """Tell whether a layer is transformers' ``Conv1D``: a linear layer whose weight is (in, out)."""
    return type(layer).__name__ == "Conv1D" and not isinstance(layer, nn.Conv1d) and hasattr(layer, "nf")


def channel_axes(layer: Any) -> tuple[int, int]:
    """Return the axes of a layer's weight that outputs and inputs run along; of an embedding, inputs are its rows."""
    turned = isinstance(layer, nn.Embedding) or getattr(layer, "transposed", False) or is_matrix_stored_in_by_out(layer)
    return (1, 0) if turned else (0, 1)


def weight_shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of the weight as if it were not packed: a quantised weight may be stored in another."""
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    return tuple(layer.weight.shape)


def frozen_weight(layer: Any) -> Tensor:
    """Return the weight as numbers: of a quantised layer, what peft makes of it.

    Raises
    ------
    ValueError
        peft knows no way to unpack it.
    """
    weight = layer.weight
    if type(weight) not in (nn.Parameter, Tensor):
        # Only for these: peft's function is none that torch.compile can follow.
        weight = quantised.dequantize_module_weight(layer)
    weight = weight.detach()
    if not weight.is_floating_point() or tuple(weight.shape) != weight_shape(layer):
        raise ValueError(
            f"use_dora needs a base weight of floating-point numbers, got {type(layer).__name__} with {weight.dtype}"
        )
    return weight


def _as_it_is(*_: Any) -> None:
    """Leave an output as it is."""


class TuckerLayer(tuners.BaseTunerLayer):
    """What all layers share: parameters, their first values, merging, and the sum over active adapters.

    A subclass gives ``_delta_forward(x, name, result)``, what one adapter's update adds to the output ``result``, and
    ``_plain(x, result)``, what the base weight makes of x without the bias. Where an adapter has magnitudes, outputs
    without the bias are those of base and update times one factor a channel.
    """

    adapter_layer_names: tuple[str, ...] = (f"{PREFIX}core",)
    drops_inputs = True
    other_param_names = (f"{PREFIX}scale", f"{PREFIX}dropout", f"{PREFIX}path")

    def _start(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        layer: Any = self.get_base_layer()
        self.shape = weight_shape(layer)
        self.axis_out, self.axis_in = channel_axes(layer)
        # One container an axis of the weight, so that a file of an adapter needs no word on the kind of layer.
        self.tucker_names = (f"{PREFIX}core", *(f"{PREFIX}axis{n}" for n in range(len(self.shape))))
        self.adapter_layer_names = (*self.tucker_names, f"{PREFIX}magnitude")
        self.shared_by = getattr(layer, "groups", 1) if getattr(layer, "transposed", False) else 1
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.tucker_adapter_scale: dict[str, float] = {}
        self.tucker_adapter_path: dict[str, str] = {}
        self.tucker_adapter_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None

    def parameters_of(self, adapter: str) -> tuple[Tensor, list[Tensor]]:
        """Return core and factors of one adapter."""
        core, *factors = (getattr(self, name)[adapter] for name in self.tucker_names)
        return core, factors

    def update_layer(
        self, adapter_name: str, ranks: Sequence[int], *, scale: float | int, config: Any, key: str
    ) -> None:
        """Add an adapter whose core is 0, and whose factors are drawn as the configuration says."""
        layer: Any = self.get_base_layer()
        self.tucker_adapter_scale[adapter_name] = float(scale)
        self.tucker_adapter_path[adapter_name] = self._choose_path(ranks) if config.path == "auto" else config.path
        self.tucker_adapter_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        generator = None
        if config.seed is not None:
            # The layer's own name, so that the draw does not depend on which other layers are adapted.
            generator = torch_generator(config.seed + zlib.crc32(key.encode()))
        device = None if generator is not None else layer.weight.device
        self.tucker_adapter_core[adapter_name] = nn.Parameter(torch.zeros(tuple(ranks), device=device))
        for n, (size, rank) in enumerate(zip(self.shape, ranks, strict=True)):
            factor = torch.empty(size, rank, device=device)
            if config.init == "orthogonal":
                nn.init.orthogonal_(factor, gain=math.sqrt(size / (2 * rank)), generator=generator)
            else:
                std = 0.02 if config.init == "small" else 1 / math.sqrt(2 * rank)
                factor.normal_(std=std, generator=generator)
            if n == self.axis_in and getattr(layer, "padding_idx", None) is not None:
                factor[layer.padding_idx] = 0  # the row of padding keeps its vector: it gets no gradient either
            getattr(self, f"{PREFIX}axis{n}")[adapter_name] = nn.Parameter(factor)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.use_dora:
            # Not rounded to half precision, in which a fresh adapter would not be the base's function any more.
            norms = unit_norms(self._base_weight(), unit_shape(self.shape, self.axis_out, self.shared_by))
            self.tucker_adapter_magnitude[adapter_name] = nn.Parameter(norms)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def weighted_sum(self, names: Sequence[str], weights: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        """Return core and factors of the exact weighted sum of adapters: ranks add up, as far as axes are long."""
        parts = [self.parameters_of(name) for name in names]
        core = direct_sum(
            [w * self.tucker_adapter_scale[name] * part[0] for w, name, part in zip(weights, names, parts, strict=True)]
        )
        factors = [torch.cat(side, dim=1) for side in zip(*(part[1] for part in parts), strict=True)]
        for n, factor in enumerate(factors):
            if factor.shape[1] > factor.shape[0]:
                core, factors[n] = mode_product(core, factor, n), torch.eye(len(factor)).to(factor)
        return core, factors

    @torch.no_grad()
    def put(
        self, adapter_name: str, core: Tensor, factors: Sequence[Tensor], parts: Sequence[tuple[str, float]]
    ) -> None:
        """Give an adapter other ranks and values; ``core`` holds the scale.

        Where it has magnitudes, they grow by what those of ``parts`` grew, each times its weight.
        """
        kind = self.tucker_adapter_core[adapter_name]
        made = [core / self.tucker_adapter_scale[adapter_name], *factors]
        for name, value in zip(self.tucker_names, made, strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(
                value.to(kind.device, kind.dtype), requires_grad=kind.requires_grad
            )
        if adapter_name in self.tucker_adapter_magnitude:
            found, start = self.tucker_adapter_magnitude, self.tucker_adapter_magnitude[adapter_name].clone()
            for name, weight in parts:
                found[adapter_name].add_(weight * (found[name] - start) if name in found else 0)

    def insist_on_calls(self) -> None:
        """Keep ``nn.TransformerEncoderLayer`` from its fast path, which in eval mode reads weights without calling.

        It takes none where a part of it has a hook.
        """
        if not self._forward_hooks:
            self.register_forward_hook(_as_it_is)

    def _choose_path(self, ranks: Sequence[int]) -> str:
        return "factored"

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update of the weight, in float32 or wider."""
        core, factors = self.parameters_of(adapter)
        kind = torch.promote_types(core.dtype, torch.float32)
        # Autocast would round the update to half precision before it meets the weight.
        with torch.autocast(core.device.type, enabled=False):
            return expand_core(core.to(kind), [f.to(kind) for f in factors]) * self.tucker_adapter_scale[adapter]

    def _base_weight(self) -> Tensor:
        """Return the frozen weight in float32 or wider, as it was before anything was merged."""
        weight = frozen_weight(self.get_base_layer()) if self._unmerged is None else self._unmerged
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def _growth(self, name: str) -> Tensor:
        """Return what an adapter's magnitudes make of units that have its update; lengths get no gradient."""
        magnitude = self.tucker_adapter_magnitude[name]
        with torch.no_grad(), torch.autocast(magnitude.device.type, enabled=False):
            weight = self._base_weight()
            if self.shared_by > 1:
                norms = unit_norms(weight + self.get_delta_weight(name).to(weight.dtype), magnitude.shape)
            else:
                core, factors = self.parameters_of(name)
                core = core.to(weight.dtype) * self.tucker_adapter_scale[name]
                norms = updated_norms(weight, core, [f.to(weight.dtype) for f in factors], self.axis_out)
            # In the magnitudes' own precision, so that what has not been trained is a factor of 1.
            norms = norms.to(magnitude.dtype)
        return growth(magnitude, norms)

    def _updated(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        """Return a weight with the updates of adapters, one after the other, in float32 or wider."""
        made = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in names:
            made = made + self.get_delta_weight(name)
            if name in self.tucker_adapter_magnitude:
                made = with_magnitude(made, self._growth(name).to(made.dtype))
        return made

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # What magnitudes do is in no update, which is all that is converted.
        return isinstance(self.get_base_layer(), nn.Linear) and adapter_name not in self.tucker_adapter_magnitude

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters, or those named, to the base weight; it is checked for overflow in any case.

        The weight as it was is kept until :meth:`unmerge`, which puts back its very bits.
        """
        names = [
            name for name in tuners.check_adapters_to_merge(self, adapter_names) if name in self.tucker_adapter_core
        ]
        if not names:
            return
        layer: Any = self.get_base_layer()
        weight = layer.weight.data
        if not weight.is_floating_point() or tuple(weight.shape) != self.shape:
            raise ValueError(
                f"merging needs a base weight of floating-point numbers, got {type(layer).__name__} with "
                f"{weight.dtype}; use the adapter beside the quantised layer, or dequantise the model first"
            )
        made = self._updated(weight, names).to(weight.dtype)
        if not bool(made.isfinite().all()):
            raise ValueError(
                f"merged weight must be finite, got NaN or infinity in {weight.dtype} from {', '.join(names)} "
                f"on {type(layer).__name__}{self.shape}"
            )
        if self._unmerged is None:
            self._unmerged = weight
        layer.weight.data = made
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge."""
        if not self.merged or self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer: Any = self.get_base_layer()
        layer.weight.data = self._unmerged.to(layer.weight.device, layer.weight.dtype)
        self._unmerged = None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus what every active adapter adds.

        With ``adapter_names``, one for each item of the batch, every item has the adapter of its own.
        """
        own = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if own is not None and not self.disable_adapters:
            return self._forward_each(x, own, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.tucker_adapter_core]
        together = self._one_call(x, names, *args, **kwargs) if names else None
        if together is not None:
            return together
        result = self.base_layer(x, *args, **kwargs)
        kind = result.dtype
        for name in names:
            result = self._adapted(x, name, result)
        return result.to(kind)

    def _forward_each(self, x: Tensor, own: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(own) != len(x):
            raise ValueError(f"adapter_names must be one for each of {len(x)} inputs, got {len(own)}")
        if self.merged:
            raise ValueError(f"adapter_names must come without merged adapters, got {self.merged_adapters} merged")
        result = self.base_layer(x, *args, **kwargs)
        made = result.clone()
        for name in dict.fromkeys(own):
            if name in self.tucker_adapter_core:
                rows = [i for i, other in enumerate(own) if other == name]
                made[rows] = self._adapted(x[rows], name, result[rows]).to(result.dtype)
        return made

    def _one_call(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor | None:
        """Return the whole output from one call of the base operation, where that is cheaper, else None."""
        return None

    def _adapted(self, x: Tensor, name: str, result: Tensor) -> Tensor:
        """Return an output after one more adapter, which acts as if all before it were the base."""
        drop = self.tucker_adapter_dropout[name]
        seen = self._dropped(x, name, self.tucker_adapter_core[name].dtype)
        added = self._delta_forward(seen, name, result)
        if name not in self.tucker_adapter_magnitude:
            return result + added
        if self.training and isinstance(drop, nn.Dropout) and self.drops_inputs:
            # Both parts of the weight see the same inputs.
            plain = self._plain(seen, result)
        else:
            bias = getattr(self.get_base_layer(), "bias", None)
            plain = result if bias is None else result - self._along_channels(bias)
        factor = self._along_channels(self._growth(name))
        return result + (factor - 1) * plain + factor * added

    def _along_channels(self, values: Tensor) -> Tensor:
        """Lay one value a channel out as it broadcasts against outputs."""
        return values.flatten()

    def _plain(self, x: Tensor, result: Tensor) -> Tensor:
        raise NotImplementedError

    def _delta_forward(self, x: Tensor, name: str, result: Tensor) -> Tensor:
        raise NotImplementedError

    def _dropped(self, x: Tensor, name: str, kind: torch.dtype) -> Tensor:
        if not self.drops_inputs:
            return x
        x = self.tucker_adapter_dropout[name](x)
        return x if torch.is_autocast_enabled(x.device.type) else self._cast_input_dtype(x, kind)

    def __repr__(self) -> str:
        return "tucker." + super().__repr__()


class TuckerLinear(TuckerLayer, nn.Module):
    """A linear layer: x A_in G A_outᵀ, three thin products; its (out, in) update is never formed."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self._start(base_layer)

    def _delta_forward(self, x: Tensor, name: str, result: Tensor) -> Tensor:
        core, factors = self.parameters_of(name)
        middle = core if self.axis_in == 0 else core.T
        hidden = _product(x, factors[self.axis_in])
        return _product(_product(hidden, middle * self.tucker_adapter_scale[name]), factors[self.axis_out].T)

    def _plain(self, x: Tensor, result: Tensor) -> Tensor:
        weight = frozen_weight(self.get_base_layer()).to(x.dtype)
        return _product(x, weight if self.axis_in == 0 else weight.T)

    def _one_call(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor | None:
        if not (x.is_nested and self.tucker_adapter_magnitude):
            return None
        # Nested tensors, which torch's own encoder makes in evaluation, are not multiplied channel by channel.
        layer: Any = self.get_base_layer()
        return F.linear(x, self._updated(layer.weight, names).to(x.dtype), layer.bias)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x @ matrix``, also of nested tensors, which torch's own encoder makes of padded rows."""
    return F.linear(x, matrix.T) if x.is_nested else x @ matrix


class TuckerConv(TuckerLayer, nn.Module):
    """A convolution of any kind: 1x1 to J_in channels, a small kernel to J_out, and 1x1 to the output's.

    The small kernel has stride, dilation and padding of the base. Padding commutes with the first 1x1, which has no
    bias, also where it reflects or wraps. Groups share the factor of the axis that they have in common.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self._start(base_layer)

    def _choose_path(self, ranks: Sequence[int]) -> str:
        """Weigh multiplications an output position: three small convolutions there and back, or one weight gradient.

        Many groups, depthwise above all, make the small kernels as large as the base's own.
        """
        layer: Any = self.get_base_layer()
        taps, g = math.prod(layer.kernel_size), layer.groups
        j_in, j_out = ranks[self.axis_in], ranks[self.axis_out]
        thin = layer.in_channels * j_in + g * taps * j_in * j_out + layer.out_channels * j_out
        return "factored" if 3 * thin < taps * layer.in_channels * layer.out_channels / g else "dense"

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, extra: Any = 0) -> Tensor:
        """Apply the base's own operation with another weight; ``extra`` is the output padding where transposed."""
        layer: Any = self.get_base_layer()
        n = len(layer.kernel_size)
        if layer.transposed:
            return TRANSPOSED[n](x, weight, bias, layer.stride, layer.padding, extra, layer.groups, layer.dilation)
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        return CONV[n](x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)

    def _output_padding(self, x: Tensor, size: Sequence[int]) -> Any:
        """Return what a transposed convolution must add to reach the spatial size (n,) of its output."""
        layer: Any = self.get_base_layer()
        if not layer.transposed:
            return 0
        n = len(layer.kernel_size)
        least = [
            (side - 1) * s - 2 * p + d * (k - 1) + 1
            for side, s, p, d, k in zip(
                x.shape[-n:], layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True
            )
        ]
        return tuple(a - b for a, b in zip(size, least, strict=True))

    def _one_call(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor | None:
        layer: Any = self.get_base_layer()
        plain = self.base_layer is layer and not args and not kwargs and not layer.transposed
        dropping = self.training and any(isinstance(self.tucker_adapter_dropout[n], nn.Dropout) for n in names)
        if not plain or dropping or any(self.tucker_adapter_path[name] != "dense" for name in names):
            return None
        return self._convolve(x, self._updated(layer.weight, names).to(layer.weight.dtype), layer.bias)

    def _plain(self, x: Tensor, result: Tensor) -> Tensor:
        layer: Any = self.get_base_layer()
        extra = self._output_padding(x, result.shape[-len(layer.kernel_size) :])
        return self._convolve(x, layer.weight.to(x.dtype), None, extra)

    def _along_channels(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *(1,) * (len(self.shape) - 2))

    def _delta_forward(self, x: Tensor, name: str, result: Tensor) -> Tensor:
        layer: Any = self.get_base_layer()
        core, factors = self.parameters_of(name)
        n, g = len(layer.kernel_size), layer.groups
        extra = self._output_padding(x, result.shape[-n:])
        if self.tucker_adapter_path[name] == "dense":
            return self._convolve(x, self.get_delta_weight(name).to(core.dtype), None, extra)
        taps = (1,) * n
        kernel = core * self.tucker_adapter_scale[name]
        for mode in range(2, core.ndim):
            kernel = mode_product(kernel, factors[mode], mode)
        a_in, a_out = factors[self.axis_in], factors[self.axis_out]
        if layer.transposed:
            # The factor of the inputs has a row for each channel of each group; that of the outputs is shared.
            shrink = a_in.reshape(g, -1, a_in.shape[1]).transpose(1, 2).reshape(g * a_in.shape[1], -1)
            grow = a_out.repeat(g, 1)
        else:
            shrink, grow = a_in.T.repeat(g, 1), a_out
        kernel = kernel.repeat(g, *(1,) * (n + 1)) if g > 1 else kernel
        hidden = CONV[n](x, shrink.reshape(*shrink.shape, *taps), groups=g)
        hidden = self._convolve(hidden, kernel, None, extra)
        return CONV[n](hidden, grow.reshape(*grow.shape, *taps), groups=g)


class TuckerEmbedding(TuckerLayer, nn.Module):
    """An embedding: the rows of the first factor that are asked for, times core and second factor."""

    drops_inputs = False  # which are indices; dropout acts on the factor's rows

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self._start(base_layer)

    def _delta_forward(self, x: Tensor, name: str, result: Tensor) -> Tensor:
        layer: Any = self.get_base_layer()
        core, factors = self.parameters_of(name)
        rows = F.embedding(
            x, factors[0], padding_idx=layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq,
            sparse=layer.sparse,
        )  # fmt: skip
        rows = self.tucker_adapter_dropout[name](rows)
        added = (rows @ (core * self.tucker_adapter_scale[name])) @ factors[1].T
        scale = self._get_embed_scale()
        return added if scale is None else added * scale.to(added.dtype)
