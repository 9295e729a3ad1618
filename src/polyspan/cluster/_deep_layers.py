"""The layers that deep self-expression expresses: the input, a network beside it, and what the network learns first."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyspan.errors import WrongContent

from ._conv_autoencoder import ConvAutoencoder

CHANNELS, KERNELS = (15,), (3,)
DEAD = 0.5


class Layers:
    """Rows, and what a network makes of them, at unit length where asked for.

    ``network`` is a :class:`ConvAutoencoder`, a Module of the user's or None; ``shape`` is (channels, h, w) of images;
    ``scale`` divides rows that are not brought to one length; ``which`` is "all", "input" or "last".
    """

    def __init__(self, network: Any, shape: Any, *, scale: float, which: str, normalize: bool):
        self.network, self.shape, self.scale, self.which, self.normalize = network, shape, scale, which, normalize

    def scaled(self, rows: Tensor) -> Tensor:
        """Return rows of root mean square 1 where rows are to count the same, else as they are."""
        if not self.normalize:
            return rows / self.scale
        return rows * (rows.shape[1] ** 0.5 / torch.linalg.vector_norm(rows, dim=1, keepdim=True))

    def images(self, rows: Tensor) -> Tensor:
        """Return scaled rows as the network takes them."""
        scaled = self.scaled(rows)
        return scaled if self.shape is None else scaled.reshape(len(rows), *self.shape)

    def expressed(self, rows: Tensor) -> list[Tensor]:
        """Return the flat layers that are expressed, input first; unit rows where asked for."""
        found = [self.scaled(rows)]
        if isinstance(self.network, ConvAutoencoder):
            found += [layer.flatten(1) for layer in self.network.layers(self.images(rows))]
        elif self.network is not None:
            found.append(self._answered(rows).flatten(1))
        if self.which == "last":
            found = found[-1:]
        if not self.normalize:
            return found
        # A row that a layer has lost altogether stays zero: it is then expressed by the other layers alone.
        tiny = torch.finfo(rows.dtype).tiny
        return [V / torch.linalg.vector_norm(V, dim=1, keepdim=True).clamp_min(tiny) for V in found]

    def _answered(self, rows: Tensor) -> Tensor:
        """Return what the user's Module makes of rows, which it is given in its own float width."""
        images = self.images(rows)
        own = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), images.dtype)
        made = self.network(images.to(own))
        if not (isinstance(made, Tensor) and made.ndim >= 2 and len(made) == len(rows)):
            found = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(f"encoder must return a row for each of {len(rows)}, got {found}")
        if not torch.isfinite(made.detach()).all():
            raise ValueError("encoder must return finite numbers, got NaN or infinity")
        return made.to(rows.dtype)

    @torch.no_grad()
    def joined(self, rows: Tensor) -> Tensor:
        """Return the layers that are expressed side by side, (n, width)."""
        return torch.cat(self.expressed(rows), dim=1)

    @torch.no_grad()
    def energies(self, rows: Tensor) -> list[float]:
        """Return the sum of squares of the input and of every layer of the convolutions."""
        found = [self.scaled(rows)]
        if isinstance(self.network, ConvAutoencoder):
            found += self.network.layers(self.images(rows))
        return [float(layer.square().sum()) for layer in found]


def make_convolutions(
    shape: Any, channels: Any, kernels: Any, *, like: Tensor, last_relu: bool, generator: torch.Generator
) -> ConvAutoencoder:
    """Return the autoencoder for images (channels, h, w), on the device and in the float width of ``like``."""
    if shape is None:
        raise ValueError("image_shape must be given, or X be images, for encoder='conv'")
    channels, kernels = tuple(channels or CHANNELS), tuple(kernels or KERNELS)
    if len(channels) != len(kernels) or min(channels + kernels) < 1:
        raise ValueError(f"channels and kernels must be equally many positive numbers, got {channels}, {kernels}")
    # Layers draw first weights from torch's global generator before ours replace them.
    with torch.random.fork_rng(devices=[]):
        network = ConvAutoencoder((shape[0], *channels), kernels, last_relu=last_relu, generator=generator)
    return network.to(like.device, like.dtype)


def pretrain(layers: Layers, rows: Tensor, kind: str, *, rate: float, mean_offset: bool, run: Any) -> float:
    """Train the convolutions by "reconstruction" or "distance"; ``run`` takes steps until the loss stands still.

    Returns the share of the mean image's error that reconstruction leaves; NaN for distances.
    """
    network, images = layers.network, layers.images(rows)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    if kind == "reconstruction":
        mean = images.mean(dim=0)
        if mean_offset:
            network.offset.data = mean

        def loss_of() -> Any:
            return (network(images) - images).square().sum()

    else:
        H = squared_distances(layers.scaled(rows))

        def loss_of() -> Any:
            found = [layers.scaled(rows), *(layer.flatten(1) for layer in network.layers(images))]
            return sum((H * squared_distances(V)).sum() for V in found) / len(found)

    def step(_: int) -> tuple[float, bool]:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return float(loss.detach()), False

    run(step)
    if kind == "distance":
        return math.nan
    with torch.no_grad():
        blank = (mean - images).square().sum()
        share = float((network(images) - images).square().sum() / blank) if blank else 0.0
    if not share <= DEAD:
        warnings.warn(
            f"the autoencoder leaves {share:.2f} of the mean image's error: its layers say little of the images; "
            "train longer, or use encoder='none'",
            stacklevel=4,
        )
    return share


def squared_distances(V: Tensor) -> Tensor:
    """Return squared distances of all pairs of rows, (n, n)."""
    squares = V.square().sum(dim=1)
    return (squares[:, None] + squares - 2 * V @ V.T).clamp_min(0)


def fill(network: Any, arrays: Mapping[str, Any], path: Path) -> None:
    """Give a network the weights of a file."""
    own = {name.removeprefix("network."): np.array(a) for name, a in arrays.items() if name.startswith("network.")}
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    # The mean image takes the place of one number a channel.
    wanted["offset"] = own["offset"].shape if "offset" in own else wanted["offset"]
    if wanted != {name: value.shape for name, value in own.items()}:
        raise WrongContent(path, found="weights of other shapes", expected="those of the encoder that was fitted")
    network.offset = torch.zeros(wanted["offset"], dtype=network.offset.dtype)
    network.load_state_dict({name: torch.as_tensor(value) for name, value in own.items()})
