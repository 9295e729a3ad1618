"""Push a model's activations along a direction while it runs, or put reconstructions in their place."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .activation_store import found_layer


@contextmanager
def steer(model: Any, layer: str, direction: Any, *, strength: float | int = 1.0) -> Generator[Any]:
    """Add ``strength`` times a direction to what a layer gives, at every token, inside of the block.

    Directions of latents, and of pairs with what their product adds, are those of :meth:`PolySAE.direction`.

    Parameters
    ----------
    model : torch.nn.Module
    layer : str
        Name of the submodule that the activations were taken from.
    direction : array or tensor of shape (d,)
    strength : float

    Raises
    ------
    ValueError
        The layer is not there, or gives another width, or the strength is no finite number.
    """
    import torch

    if not math.isfinite(strength):
        raise ValueError(f"strength must be finite, got {strength}")
    push = torch.as_tensor(np.asarray(direction), dtype=torch.float32) * strength

    def add(output: Any) -> Any:
        if push.shape != output.shape[-1:]:
            raise ValueError(f"direction must have the layer's width, {output.shape[-1]}, got {tuple(push.shape)}")
        return output + push.to(output.device, output.dtype)

    with _hooked(model, layer, add):
        yield model


@contextmanager
def spliced(model: Any, layer: str, sae: Any) -> Generator[Any]:
    """Put a fitted :class:`PolySAE`'s reconstructions in the place of what a layer gives, inside of the block.

    The loss of a language model in the block, beside that without it, says how much of what the model needs comes back.
    """
    import torch

    def replace(output: Any) -> Any:
        x = output.to(sae.module_.W_enc.device, torch.float32) * sae.scale_
        with torch.no_grad():
            return (sae.module_(x) / sae.scale_).to(output.device, output.dtype)

    with _hooked(model, layer, replace):
        yield model


@contextmanager
def _hooked(model: Any, layer: str, change: Any) -> Generator[None]:
    """Change what a layer gives; of a tuple, its first part."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:  # noqa: ARG001 - the form of a hook
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = found_layer(model, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
