"""Convolutions that halve the image, and their exact adjoints: the network of deep self-expression."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvAutoencoder(nn.Module):
    """Convolutions of stride 2 with the padding that TensorFlow calls SAME, each with a ReLU, and their mirror image.

    Every layer of the decoder is the adjoint of its partner, so that any image size comes back. ``offset`` is added to
    the output and may hold the mean image. The output has a ReLU only where ``last_relu`` asks for it: with one, and
    large errors in the beginning, a decoder dies at its first steps.
    """

    def __init__(self, channels: Sequence[int], kernels: Sequence[int], *, last_relu: bool, generator: torch.Generator):
        super().__init__()
        pairs = list(zip(channels[:-1], channels[1:], kernels, strict=True))
        self.last_relu = last_relu
        self.kernels = list(kernels)
        self.offset: Tensor
        self.register_buffer("offset", torch.zeros(channels[0], 1, 1))
        self.down = nn.ModuleList(nn.Conv2d(a, b, size, stride=2) for a, b, size in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, size, stride=2) for a, b, size in reversed(pairs))
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.zero_()
                    continue
                # A transposed layer's weight has its inputs first.
                inputs = parameter.shape[0 if name.startswith("up") else 1]
                bound = (inputs * parameter[0, 0].numel()) ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)

    def layers(self, x: Tensor) -> list[Tensor]:
        """Return what every layer of the encoder makes of images (n, c, h, w)."""
        found = []
        for conv, kernel in zip(self.down, self.kernels, strict=True):
            x = torch.relu(conv(F.pad(x, _same(x, kernel))))
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return the images as they come back."""
        made = self.layers(x)
        z, sizes = made[-1], [x, *made[:-1]]
        for i, (conv, kernel, like) in enumerate(zip(self.up, self.kernels[::-1], reversed(sizes), strict=True)):
            left, _, top, _ = _same(like, kernel)
            # Where the kernel is 1 the adjoint ends one pixel short of an even size: nothing reached that pixel.
            h, w = like.shape[-2:]
            whole = [(side - 1) * 2 + kernel for side in z.shape[-2:]]
            z = conv(z, output_size=whole)[..., top : top + h, left : left + w]
            z = F.pad(z, (0, w - z.shape[-1], 0, h - z.shape[-2]))
            if i < len(self.up) - 1 or self.last_relu:
                z = torch.relu(z)
        return z + self.offset


def _same(x: Tensor, kernel: int) -> tuple[int, int, int, int]:
    """Left, right, top and bottom padding for ceil(size / 2) outputs."""
    made = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // 2) - 1) * 2 + kernel - size, 0)
        made += [total // 2, total - total // 2]
    return made[0], made[1], made[2], made[3]
