"""Parameters and multiply-adds of a model, layer by layer, counted while one input goes through it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class LayerCost(NamedTuple):
    """One layer: its dotted name, its class, trainable numbers of its own, multiply-adds, and the shape it returns."""

    name: str
    kind: str
    num_params: int
    num_macs: int
    output_shape: tuple[int, ...]


class ModelCost(NamedTuple):
    """Trainable numbers and multiply-adds of a whole model, and its layers in the order in which they first ran."""

    num_params: int
    num_macs: int
    layers: tuple[LayerCost, ...]


class Passage(NamedTuple):
    """One call of a module: shapes of its first input and of its output, None where that is no tensor."""

    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None


def model_cost(model: nn.Module, example_input: Any) -> ModelCost:
    """Count the parameters of a model and the multiply-adds of its convolutions and linear layers for one input.

    Convolutions, linear layers and modules with a method ``num_macs(*map_shape)`` are counted each time they run, for
    the batch that is given: pass a batch of one. Batch norms, activations and pools count parameters only, as is usual
    in tables of compact networks. What a module computes by functions, as attention does, is not seen. Parameters that
    are shared count once. On ``torch.device("meta")`` nothing is computed.

    Parameters
    ----------
    model : torch.nn.Module
        Run once in eval mode without gradients; its mode is put back.
    example_input : tensor, or tuple or dict of arguments

    Returns
    -------
    ModelCost
        ``num_params`` also counts what no layer that ran owns.
    """
    macs: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    names = {module: name for name, module in model.named_modules()}
    counted = {module: name for module, name in names.items() if _counts(module)}

    def record(module: nn.Module, args: tuple, out: Any) -> None:
        name = counted[module]
        shapes.setdefault(name, tuple(out.shape) if isinstance(out, Tensor) else ())
        macs[name] = macs.get(name, 0) + _macs(module, args[0] if args else None, out)

    run_once(model, example_input, list(counted), record)
    modules = {name: module for module, name in counted.items()}
    layers = tuple(
        LayerCost(name, type(modules[name]).__name__, _own_params(modules[name]), macs[name], shapes[name])
        for name in shapes
    )
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ModelCost(total, sum(macs.values()), layers)


def passages(model: nn.Module, example_input: Any, modules: list[nn.Module]) -> dict[nn.Module, list[Passage]]:
    """Return every call of the given modules while one input goes through the model, in the order of first calls."""
    found: dict[nn.Module, list[Passage]] = {}
    entered: dict[nn.Module, None] = {}

    def shape(value: Any) -> tuple[int, ...] | None:
        return tuple(value.shape) if isinstance(value, Tensor) else None

    def record(module: nn.Module, args: tuple, out: Any) -> None:
        found.setdefault(module, []).append(Passage(shape(args[0]) if args else None, shape(out)))

    handles = [m.register_forward_pre_hook(lambda module, _: entered.setdefault(module)) for m in modules]
    try:
        run_once(model, example_input, modules, record)
    finally:
        for handle in handles:
            handle.remove()
    return {module: found[module] for module in entered}


def run_once(model: nn.Module, example_input: Any, modules: list[nn.Module], record: Any) -> None:
    """Run the model in eval mode without gradients; call ``record(module, args, out)`` behind the given modules."""
    modes = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(record) for module in modules]
    try:
        model.eval()
        with torch.no_grad():
            if isinstance(example_input, dict):
                model(**example_input)
            elif isinstance(example_input, tuple | list):
                model(*example_input)
            else:
                model(example_input)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _counts(module: nn.Module) -> bool:
    return (
        isinstance(module, (*CONVS, *TRANSPOSED, nn.Linear))
        or callable(getattr(module, "num_macs", None))
        or bool(module._parameters)
    )


def _own_params(module: nn.Module) -> int:
    # A module that counts its own multiply-adds stands for all inside it.
    whole = callable(getattr(module, "num_macs", None))
    return sum(p.numel() for p in module.parameters(recurse=whole) if p.requires_grad)


def _macs(module: nn.Module, x: Any, out: Any) -> int:
    if callable(getattr(module, "num_macs", None)):
        return int(x.shape[0]) * int(module.num_macs(*x.shape[2:]))  # ty: ignore[not-callable]
    if isinstance(module, CONVS):
        return out.numel() * module.weight[0].numel()
    if isinstance(module, TRANSPOSED):
        return x.numel() * module.weight[0].numel()
    return out.numel() * module.in_features if isinstance(module, nn.Linear) else 0
