"""What the units of a torch model do, layer by layer, collected by hooks."""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

REDUCTIONS = ("positions", "mean")
CHANNELS = ("auto", "first", "last")


class ActivationCollector:
    """Collect the outputs of some layers while a torch model runs, as arrays (items, positions, units).

    A context manager: hooks are set on entry and taken off on exit, and the model is left as it was. In a convolution
    a unit is a channel, and every position of every image a sample of it. Outputs are copied as they leave the layer,
    so that an activation that works in place after it does not change them.

    Parameters
    ----------
    model : torch.nn.Module
        Left in the mode that it has; in training mode a warning says that dropout and batch statistics are on.
    layers : sequence of str
        Names as in ``model.named_modules()``; a ``module.`` that DataParallel puts in front may be left out.
    reduce : {"positions", "mean"}
        Keep every position, or average them.
    channels : {"auto", "first", "last"}
        Where the units of an output of three and more dimensions are. ``"auto"``: second in images and after a
        one-dimensional convolution or batch norm, last in sequences (items, tokens, units).

    Raises
    ------
    ValueError
        A layer does not exist (the message lists names that are close), or an option is unknown.
    """

    def __init__(self, model: Any, layers: Sequence[str], *, reduce: str = "positions", channels: str = "auto"):
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be one of {REDUCTIONS}, got {reduce!r}")
        if channels not in CHANNELS:
            raise ValueError(f"channels must be one of {CHANNELS}, got {channels!r}")
        self.model, self.reduce, self.channels = model, reduce, channels
        self._modules = {name: _find(model, name) for name in layers}
        self._caught: dict[str, list[Any]] = {name: [] for name in layers}
        self._hooks: list[Any] = []

    def __enter__(self) -> "ActivationCollector":
        if self.model.training:
            warnings.warn(
                "the model is in training mode, where dropout and batch statistics are on; call model.eval() first",
                stacklevel=2,
            )
        for name, module in self._modules.items():
            self._hooks.append(module.register_forward_hook(self._catcher(name)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for caught in self._caught.values():
            caught.clear()

    def _catcher(self, name: str):
        def catch(_module: Any, _inputs: Any, output: Any) -> None:
            self._caught[name].append(_first_tensor(output, name).detach().clone())

        return catch

    def __call__(self, batch: Any) -> dict[str, np.ndarray]:
        """Run one batch, without gradients, and return a layer's activations (items, positions, units) by its name.

        A tuple or list gives its first member to the model (what a DataLoader with labels yields), a mapping its
        keyword arguments. A layer that is called several times in one pass has the calls' positions one after another.

        Raises
        ------
        ValueError
            A layer was not called, or gave no floating-point tensor with a first dimension of items.
        """
        import torch

        for caught in self._caught.values():
            caught.clear()
        with torch.no_grad():
            if isinstance(batch, Mapping):
                self.model(**batch)
            else:
                self.model(batch[0] if isinstance(batch, tuple | list) else batch)
        silent = [name for name, caught in self._caught.items() if not caught]
        if silent:
            raise ValueError(f"layers must be called by the model's forward, got {silent[0]!r}, which is not")
        return {
            name: np.concatenate([self._arranged(x, name) for x in caught], axis=1)
            for name, caught in self._caught.items()
        }

    def _arranged(self, x: Any, name: str) -> np.ndarray:
        import torch

        if x.ndim < 2 or not x.is_floating_point():
            raise ValueError(f"layer {name!r} must give floats (items, ..., units), got {tuple(x.shape)} {x.dtype}")
        if self._channels_first(x, self._modules[name]):
            x = x.movedim(1, -1)
        x = x.reshape(x.shape[0], -1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        x = x.cpu().numpy()
        return x.mean(axis=1, keepdims=True, dtype=np.float64) if self.reduce == "mean" else x

    def _channels_first(self, x: Any, module: Any) -> bool:
        from torch import nn

        if x.ndim == 2 or self.channels == "last":
            return False
        return self.channels == "first" or x.ndim > 3 or isinstance(module, nn.Conv1d | nn.BatchNorm1d)


def _find(model: Any, name: str) -> Any:
    modules = dict(model.named_modules(remove_duplicate=False))  # a module that is shared has several names
    for key in (name, f"module.{name}", name.removeprefix("module.")):
        if key and key in modules:
            return modules[key]
    close = difflib.get_close_matches(name, [key for key in modules if key], 3, 0.3) or [key for key in modules if key]
    raise ValueError(f"layers must be names of modules, got {name!r}; there are {', '.join(close[:8])}")


def _first_tensor(output: Any, name: str) -> Any:
    """Return the output itself, or the first tensor of a tuple or of a mapping as transformers give them."""
    import torch

    members = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(members, tuple | list):
        members = next((m for m in members if isinstance(m, torch.Tensor)), None)
    if not isinstance(members, torch.Tensor):
        raise ValueError(f"layer {name!r} must give a tensor, got {type(output).__name__}")
    return members
