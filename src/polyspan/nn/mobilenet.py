"""MobileNet version 1 and 2, the compact networks that block surgery is measured on."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """Bottleneck of MobileNet-V2: widen by 1x1, filter each channel by 3x3, narrow by 1x1; plus the input if it fits.

    Parameters
    ----------
    in_channels, out_channels : int
    stride : int
    expansion : int
        How many times wider the middle is; at 1 there is no widening layer.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, expansion: int = 6, **factory: Any):
        super().__init__()
        wide = in_channels * expansion
        widen = [conv_norm(in_channels, wide, 1, act=nn.ReLU6, **factory)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *widen,
            conv_norm(wide, wide, 3, stride, groups=wide, act=nn.ReLU6, **factory),
            nn.Conv2d(wide, out_channels, 1, bias=False, **factory),
            nn.BatchNorm2d(out_channels, **factory),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Float[Tensor, "batch m h w"]) -> Float[Tensor, "batch m_out h_out w_out"]:
        """Return the next map."""
        return x + self.conv(x) if self.residual else self.conv(x)


class _MobileNet(nn.Module):
    def __init__(self, features: nn.Sequential, classifier: nn.Module):
        super().__init__()
        self.features, self.classifier = features, classifier

    def forward(self, x: Float[Tensor, "batch colours h w"]) -> Float[Tensor, "batch C"]:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def mobilenet_v1(
    num_classes: int = 1000,
    width: float | int = 1.0,
    *,
    in_channels: int = 3,
    small_input: bool = False,
    generator: torch.Generator | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build MobileNet-V1: a 3x3 stem and 13 depthwise-separable blocks, ``features.1`` to ``features.13``.

    The five equal ones, 512 to 512 channels, are ``features.7`` to ``features.11``.

    Parameters
    ----------
    num_classes : int
    width : float
        Multiplier of all channel counts, rounded down to whole channels.
    in_channels : int
        Of the image.
    small_input : bool
        For images of 32 by 32 or so: the first two halvings of the map are left out.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.
    """
    _check(num_classes, width, in_channels)
    factory: dict[str, Any] = {"device": "meta", "dtype": dtype}
    first = max(1, int(32 * width))
    layers: list[nn.Module] = [conv_norm(in_channels, first, 3, 1 if small_input else 2, act=nn.ReLU, **factory)]
    m, halvings = first, 0
    for channels, stride in V1:
        halvings += stride == 2
        step, out = 1 if small_input and stride == 2 and halvings == 1 else stride, max(1, int(channels * width))
        depthwise = conv_norm(m, m, 3, step, groups=m, act=nn.ReLU, **factory)
        layers.append(nn.Sequential(*depthwise, *conv_norm(m, out, 1, act=nn.ReLU, **factory)))
        m = out
    return initialise(_MobileNet(nn.Sequential(*layers), nn.Linear(m, num_classes, **factory)), device, generator)


def mobilenet_v2(
    num_classes: int = 1000,
    width: float | int = 1.0,
    *,
    in_channels: int = 3,
    small_input: bool = False,
    dropout: float | int = 0.2,
    generator: torch.Generator | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build MobileNet-V2: a stem, 17 bottlenecks ``features.1`` to ``features.17``, and a 1x1 head.

    Keys and shapes of the state dict are those of torchvision's ``mobilenet_v2``, so its weights load.

    Parameters
    ----------
    num_classes : int
    width : float
        Multiplier of the channel counts, rounded to multiples of 8; the head has 1280 channels at least.
    in_channels : int
        Of the image.
    small_input : bool
        For images of 32 by 32 or so: the first two halvings of the map are left out.
    dropout : float
        Before the linear layer, in [0, 1).
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.
    """
    _check(num_classes, width, in_channels)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    factory: dict[str, Any] = {"device": "meta", "dtype": dtype}
    m, last = _by_eight(32 * width), _by_eight(1280 * max(1.0, width))
    layers: list[nn.Module] = [conv_norm(in_channels, m, 3, 1 if small_input else 2, act=nn.ReLU6, **factory)]
    for stage, (expansion, channels, repeats, stride) in enumerate(V2):
        out = _by_eight(channels * width)
        first = 1 if small_input and stage == 1 else stride
        for i in range(repeats):
            layers.append(InvertedResidual(m, out, first if i == 0 else 1, expansion, **factory))
            m = out
    layers.append(conv_norm(m, last, 1, act=nn.ReLU6, **factory))
    head = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes, **factory))
    return initialise(_MobileNet(nn.Sequential(*layers), head), device, generator)


def conv_norm(
    m: int, out: int, kernel_size: int, stride: int = 1, *, groups: int = 1, act: type[nn.Module], **factory: Any
) -> nn.Sequential:
    """Convolution without bias that keeps the map's size but for its stride, batch norm, activation."""
    conv = nn.Conv2d(m, out, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False, **factory)
    return nn.Sequential(conv, nn.BatchNorm2d(out, **factory), act())


def _check(num_classes: int, width: float | int, in_channels: int) -> None:
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 < width < math.inf:
        raise ValueError(f"width must be positive and finite, got {width}")


def _by_eight(channels: float) -> int:
    """Round to a multiple of 8, 8 at least and at most a tenth below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


@torch.no_grad()
def initialise(model: nn.Module, device: Any, generator: torch.Generator | None) -> nn.Module:
    """Draw convolutions by He's rule over outgoing connections, and linear layers with deviation 0.01.

    The layers come without memory, so that torch's own initialisation draws nothing.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "meta":
        return model
    model.to_empty(device=device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight.shape[0] * module.weight[0, 0].numel() // module.groups
            module.weight.normal_(0, math.sqrt(2 / fan_out), generator=generator)
        elif isinstance(module, nn.Linear):
            module.weight.normal_(0, 0.01, generator=generator)
            module.bias.zero_()
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return model
