"""Put subspace attention behind blocks of a network or in their place, and count what that saves."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._model_cost import CONVS, ModelCost, Passage, model_cost, passages, run_once
from ._model_surgery import Where, find_modules, replace_module
from .subspace_attention import ULSAM


class Block(NamedTuple):
    """A block that keeps the shape of its map: dotted name, class, shape, and what it costs."""

    name: str
    kind: str
    shape: tuple[int, ...]
    num_params: int
    num_macs: int


class SurgeryReport(NamedTuple):
    """What surgery changed: names of the modules, and the cost of the model before and after, layer by layer."""

    changed: tuple[str, ...]
    before: ModelCost
    after: ModelCost

    @property
    def params_share(self) -> float:
        """Parameters after, as a share of those before."""
        return self.after.num_params / max(self.before.num_params, 1)

    @property
    def macs_share(self) -> float:
        """Multiply-adds after, as a share of those before."""
        return self.after.num_macs / max(self.before.num_macs, 1)


def replaceable_blocks(model: nn.Module, example_input: Any, *, min_convs: int = 2) -> list[Block]:
    """List the blocks of a network that :func:`replace_with_ulsam` can replace: their output has their input's shape.

    Containers of several blocks are listed with the blocks in them, in the order in which they run. Replacing a
    residual block x + f(x) leaves (1 + A) x, close to removing it: compare with the network without the block.

    Parameters
    ----------
    model : torch.nn.Module
        Run once in eval mode.
    example_input : tensor, or tuple or dict of arguments
    min_convs : int, default=2
        Convolutions that a block holds at least; 1 lists single layers, too.
    """
    named = {
        module: name
        for name, module in model.named_modules()
        if name and sum(isinstance(inner, CONVS) for inner in module.modules()) >= min_convs
    }
    cost = model_cost(model, example_input)
    found = []
    for module, calls in passages(model, example_input, list(named)).items():
        if all(_is_map(call.input_shape) and call.input_shape == call.output_shape for call in calls):
            name, shape = named[module], calls[0].output_shape
            macs = sum(layer.num_macs for layer in cost.layers if f"{layer.name}.".startswith(f"{name}."))
            params = sum(p.numel() for p in module.parameters() if p.requires_grad)
            found.append(Block(name, type(module).__name__, shape or (), params, macs))
    return found


def replace_with_ulsam(
    model: nn.Module,
    targets: Where,
    example_input: Any,
    num_groups: int = 4,
    check: bool = True,
    **options: Any,
) -> tuple[nn.Module, SurgeryReport]:
    """Put a :class:`ULSAM` in the place of blocks, to shrink a network; change the model in place and return it.

    Everything else keeps its weights. Where something is refused, nothing is changed. Train or fine-tune afterwards,
    and compare with the network in which ``torch.nn.Identity()`` stands in the same places.

    Parameters
    ----------
    model : torch.nn.Module
    targets : str, list of str, or predicate ``(name, module) -> bool``
        Blocks by their dotted names; of nested ones that a predicate chooses, the outermost.
    example_input : tensor, or tuple or dict of arguments
        Goes through the model twice, in eval mode, to see shapes and to count.
    num_groups : int, default=4
    check : bool, default=True
        Refuse blocks that change the shape of their map. Without, only what the rest of the model cannot take is.
    **options :
        For :class:`ULSAM`, such as ``residual`` or ``kernel_size``.

    Raises
    ------
    ValueError
        A name is unknown, a block does not run, changes its map's shape (both shapes are named), or has channels that
        the groups do not divide.
    """

    def refuse(name: str, call: Passage) -> None:
        if check and call.input_shape != call.output_shape:
            raise ValueError(
                f"targets must keep the shape of their map, got {name!r}, which turns {call.input_shape} into "
                f"{call.output_shape or 'no tensor'}"
            )

    def make(block: nn.Module, attention: ULSAM) -> nn.Module:  # noqa: ARG001 - the block is what goes
        return attention

    return _operate(model, targets, example_input, num_groups, options, "targets", True, refuse, make)


def insert_ulsam(
    model: nn.Module, after: Where, example_input: Any, num_groups: int = 4, **options: Any
) -> tuple[nn.Module, SurgeryReport]:
    r"""Put a :class:`ULSAM` behind modules of a network; change the model in place and return it.

    A module ``name`` becomes a ``Sequential`` of ``name.block``, with its weights, and ``name.attention``: load
    checkpoints of the plain network before. Where something is refused, nothing is changed.

    Parameters
    ----------
    model : torch.nn.Module
    after : str, list of str, or predicate ``(name, module) -> bool``
        Modules that return one map (B, m, \*map).
    example_input : tensor, or tuple or dict of arguments
        Goes through the model twice, in eval mode, to see shapes and to count.
    num_groups : int, default=4
    **options :
        For :class:`ULSAM`.

    Raises
    ------
    ValueError
        A name is unknown, a module does not run or returns no map, or the groups do not divide its channels.
    """
    return _operate(model, after, example_input, num_groups, options, "after", False, lambda *_: None, behind)


def behind(block: nn.Module, attention: ULSAM) -> nn.Module:
    """Return a block with attention behind it."""
    return nn.Sequential(OrderedDict(block=block, attention=attention)).train(block.training)


def attention_maps_of(model: nn.Module, example_input: Any) -> dict[str, Tensor]:
    r"""Return what each :class:`ULSAM` of a network attends to while one input goes through it, by dotted name.

    Maps (batch, groups, \*map) as of :meth:`ULSAM.attention_maps`, in the order in which the layers run; of a layer
    that runs several times, those of its first run.

    Parameters
    ----------
    model : torch.nn.Module
        Run once in eval mode.
    example_input : tensor, or tuple or dict of arguments
    """
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules() if isinstance(module, ULSAM)}
    found: dict[str, Tensor] = {}

    def record(module: Any, args: tuple, out: Any) -> None:  # noqa: ARG001 - the output is not the attention
        if names[module] not in found:
            found[names[module]] = module.attention_maps(args[0])

    run_once(model, example_input, list(names), record)
    return found


def _operate(
    model: nn.Module,
    where: Where,
    example_input: Any,
    num_groups: int,
    options: Mapping[str, Any],
    argument: str,
    by_input: bool,
    refuse: Callable[[str, Passage], None],
    make: Callable[[nn.Module, ULSAM], nn.Module],
) -> tuple[nn.Module, SurgeryReport]:
    """Check all places, then change them, and change them back where the model cannot take it."""
    chosen = find_modules(model, where, argument)
    seen = passages(model, example_input, list(chosen.values()))
    made = {}
    for name, block in chosen.items():
        if block not in seen:
            raise ValueError(f"{argument} must run when the example input goes through, got {name!r}, which does not")
        for call in seen[block]:
            refuse(name, call)
        shapes = [call.input_shape if by_input else call.output_shape for call in seen[block]]
        if (
            not all(_is_map(shape) for shape in shapes)
            or len({shape and (shape[1], len(shape)) for shape in shapes}) > 1
        ):
            what = "take" if by_input else "return"
            raise ValueError(f"{argument} must {what} one map (batch, channels, ...), got {name!r} with {shapes}")
        like = next((p for p in (*block.parameters(), *model.parameters()) if p.is_floating_point()), torch.empty(0))
        shape = shapes[0] or (0, 0)
        factory: dict[str, Any] = {"dims": len(shape) - 2, "device": like.device, "dtype": like.dtype}
        try:
            attention = ULSAM(shape[1], num_groups, **(factory | dict(options)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        made[name] = make(block, attention.train(block.training))
    before = model_cost(model, example_input)
    for name, block in chosen.items():
        replace_module(model, block, made[name])
    try:
        after = model_cost(model, example_input)
    except Exception as error:
        for name, block in chosen.items():
            replace_module(model, made[name], block)
        raise ValueError(
            f"{argument} {list(chosen)} leave a model that does not run, and were put back: {error}"
        ) from error
    return model, SurgeryReport(tuple(chosen), before, after)


def _is_map(shape: tuple[int, ...] | None) -> bool:
    return shape is not None and 3 <= len(shape) <= 5
