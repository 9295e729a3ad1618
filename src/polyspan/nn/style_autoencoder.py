"""A small generator whose latents modulate its layers, and the autoencoder that teaches it pictures."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from polyspan.errors import WrongContent
from polyspan.io import load_fitted, save_fitted
from polyspan.run import Progress

from .householder_projector import HouseholderProjector


class _StyleLayer(nn.Module):
    """``lrelu(norm(mix(h * affine(w))))``: features h modulated by the styles of a latent w."""

    def __init__(self, latent_dim: int, width: int, factory: dict[str, Any]):
        super().__init__()
        self.affine = nn.Linear(latent_dim, width, **factory)
        self.mix = nn.Linear(width, width, **factory)
        self.norm = nn.LayerNorm(width, **factory)

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.mix(h * self.affine(w))), 0.2)


class StyleGenerator(nn.Module):
    r"""Pictures (\*batch, \*shape) out of latents (\*batch, d) that act by modulation alone, as in style-based GANs.

    A learnt constant passes through layers that each multiply it by styles, a linear map ``layers.<i>.affine`` of the
    latent: the maps that :func:`project_model` replaces. Fully connected; meant for pictures of up to a few thousand
    pixels and for laptops.
    Source: catalogue entry ``householder-projector``.

    Parameters
    ----------
    shape : tuple of int
        Of one picture.
    latent_dim : int, default=16
        Size d.
    width : int, default=64
        Features of a layer.
    num_layers : int, default=3
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int = 16,
        width: int = 64,
        num_layers: int = 3,
        *,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (("latent_dim", latent_dim), ("width", width), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.shape, self.latent_dim = tuple(shape), latent_dim
        self.constant = nn.Parameter(torch.ones(width, **factory))
        self.layers = nn.ModuleList(_StyleLayer(latent_dim, width, factory) for _ in range(num_layers))
        self.output = nn.Linear(width, math.prod(self.shape), **factory)
        _draw(self, generator)

    def forward(self, w: Float[Tensor, "*batch d"]) -> Tensor:
        """Return one picture for each latent."""
        h = self.constant
        for layer in self.layers:
            h = layer(h, w)
        return self.output(h).unflatten(-1, self.shape)

    def save(self, path: Path | str, **about: Any) -> Path:
        """Write the generator to one .safetensors file, atomically; bfloat16 weights are widened.

        Parameters
        ----------
        path : path
        **about :
            Facts for the header, of JSON types.

        Raises
        ------
        ValueError
            A layer's projection is neither ``torch.nn.Linear`` nor :class:`HouseholderProjector`.
        """
        ranks: list[int | None] = []
        for i, layer in enumerate(self.layers):
            affine: Any = layer.affine
            if type(affine) not in (nn.Linear, HouseholderProjector):
                raise ValueError(
                    f"layers.{i}.affine must be Linear or HouseholderProjector to be saved, got {type(affine).__name__}"
                )
            ranks.append(None if isinstance(affine, nn.Linear) else affine.in_vectors.shape[1])
        config = {
            "shape": list(self.shape), "latent_dim": self.latent_dim, "width": len(self.constant),
            "num_layers": len(self.layers),
        }  # fmt: skip
        learned = [name for name, _ in self.named_parameters() if name.endswith("affine.gain")]
        arrays = {
            name: (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
            for name, value in self.state_dict().items()
        }
        params = {"config": config, "ranks": ranks, "learned_gains": learned}
        return save_fitted(Path(path), kind="StyleGenerator", arrays=arrays, params=params, about=about)

    @classmethod
    def load(cls, path: Path | str) -> "StyleGenerator":
        """Read a generator that :meth:`save` wrote, ready to evaluate, with its low-rank orthogonal layers.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds another kind of model, or weights are missing
            or left over, which are listed.
        """
        found = load_fitted(Path(path), kind="StyleGenerator")
        try:
            config, ranks, learned = (found.params[name] for name in ("config", "ranks", "learned_gains"))
            # Weights come from the file; until they do, none take up memory.
            config = dict(config)
            model = cls(tuple(config.pop("shape")), **config, device="meta")
            for i, (layer, rank) in enumerate(zip(model.layers, ranks, strict=True)):
                if rank is not None:
                    gain = "learned" if f"layers.{i}.affine.gain" in learned else "mean"
                    layer.affine = HouseholderProjector(
                        model.latent_dim, len(model.constant), rank, gain=gain, device="meta"
                    )
        except (KeyError, TypeError, ValueError) as error:
            raise WrongContent(
                path, found=f"params that make no generator: {error!r}", expected="the params of a StyleGenerator"
            ) from None
        state = {name: torch.as_tensor(np.array(value)) for name, value in found.arrays.items()}
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise WrongContent(path, found=str(error), expected="the weights that its configuration asks for") from None
        return model.requires_grad_().eval()


class StyleAutoencoder(nn.Module):
    """Variational autoencoder around a :class:`StyleGenerator`: from a set of pictures to a generator, in seconds.

    Source: catalogue entry ``householder-projector``.

    Parameters
    ----------
    shape : tuple of int
        Of one picture.
    latent_dim, width, num_layers : int
        Of the generator; the encoder has two layers of twice the width and the width.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int = 16,
        width: int = 64,
        num_layers: int = 3,
        *,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.generator = StyleGenerator(
            shape, latent_dim, width, num_layers, generator=generator, device=device, dtype=dtype
        )
        sizes = itertools.pairwise([math.prod(shape), 2 * width, width])
        hidden = [part for a, b in sizes for part in (nn.Linear(a, b, device=device, dtype=dtype), nn.LeakyReLU(0.2))]
        self.encoder = nn.Sequential(*hidden, nn.Linear(width, 2 * latent_dim, device=device, dtype=dtype))
        _draw(self.encoder, generator)

    def encode(self, images: Float[Tensor, "*batch"]) -> tuple[Tensor, Tensor]:
        """Return mean and logarithm of the standard deviation of the latents, (n, d) each."""
        mean, log_std = self.encoder(images.flatten(1)).chunk(2, dim=-1)
        return mean, log_std

    def forward(self, images: Float[Tensor, "*batch"]) -> Tensor:
        r"""Return the pictures (n, \*shape) as they come back from the means of their latents."""
        return self.generator(self.encode(images)[0])

    def loss(self, images: Tensor, generator: torch.Generator, kl_weight: float | int = 1e-5) -> Tensor:
        """Return the mean squared error of pictures from drawn latents, plus the weighted divergence from the prior."""
        mean, log_std = self.encode(images)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        made = self.generator(mean + log_std.exp() * noise)
        divergence = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(dim=-1).mean()
        return F.mse_loss(made, images) + kl_weight * divergence


@torch.no_grad()
def _draw(module: nn.Module, generator: torch.Generator | None) -> None:
    """Draw linear layers as torch does; biases of styles, which multiply, become 1."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
            if name.endswith("affine"):
                layer.bias.fill_(1.0)


def train_autoencoder(
    model: StyleAutoencoder,
    images: Tensor,
    steps: int,
    *,
    generator: torch.Generator,
    learning_rate: float | int = 1e-3,
    batch_size: int = 64,
    kl_weight: float | int = 1e-5,
    verbose: bool = False,
) -> StyleAutoencoder:
    """Train all parameters by Adam with a cosine schedule, in place; the same function fine-tunes after surgery.

    Parameters
    ----------
    model : StyleAutoencoder
    images : Tensor of shape (n, *shape)
    steps : int
        At least 0.
    generator : torch.Generator
        Source of batches and of noise, on the device of the images.
    learning_rate : float, default=1e-3
        At the first step.
    batch_size : int, default=64
    kl_weight : float, default=1e-5
    verbose : bool
        Show progress on stderr.

    Raises
    ------
    ValueError
        There are no images, their shape is another, ``steps`` is negative, or the loss is not finite.
    """
    if len(images) == 0:
        raise ValueError("images must hold at least one picture, got none")
    if images.shape[1:] != model.generator.shape:
        raise ValueError(f"images must be of shape (n, *{model.generator.shape}), got {tuple(images.shape)}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / max(steps, 1))
    )
    loss = torch.zeros(())
    with Progress("training the generator", steps, enabled=verbose) as shown:
        for step in range(steps):
            rows = torch.randint(len(images), (batch_size,), generator=generator, device=images.device)
            optimiser.zero_grad(set_to_none=True)
            loss = model.loss(images[rows], generator, kl_weight)
            loss.backward()
            optimiser.step()
            schedule.step()
            if verbose and step % 50 == 49:
                shown.advance(50, loss=float(loss.detach()))
    if not bool(torch.isfinite(loss.detach())):
        raise ValueError(
            f"images and learning_rate must give a finite loss, got {float(loss.detach())} after {steps} steps"
        )
    return model
