"""What reaches the experts of a model on calibration texts: tokens, and the router's weight for each expert."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._expert_layout import ExpertLayer

# A power of two, by which dividing is exact; half precision holds its products with weights up to 32.
UNIT = 2**10


class LayerInputs(NamedTuple):
    """Tokens ``x`` (m, H) that reach a layer, and ``gates`` (m, n): the weight of each expert, 0 where not chosen."""

    x: Tensor
    gates: Tensor


class Capture:
    """Gathers :class:`LayerInputs` of layers while a model runs, on the CPU, in the model's own dtype.

    ``kept`` (m,) bool says which tokens of the batch at hand count; None counts all.
    """

    def __init__(self, layers: Iterable[ExpertLayer]):
        self.layers = list(layers)
        self.kept: Tensor | None = None
        self._parts: dict[str, list[LayerInputs]] = {layer.name: [] for layer in self.layers}

    @contextmanager
    def attached(self) -> Generator["Capture"]:
        """Listen to the layers inside the block."""
        with ExitStack() as stack:
            for layer in self.layers:
                hook = self._fused(layer) if layer.fused else self._listed(layer)
                stack.callback(hook.remove)
            yield self

    def take(self, name: str) -> LayerInputs:
        """Return what a layer received, and forget it.

        Raises
        ------
        ValueError
            Nothing reached the layer, or NaN or infinity did.
        """
        parts, self._parts[name] = self._parts[name], []
        if not parts or not sum(len(part.x) for part in parts):
            raise ValueError(f"batches must bring tokens to every layer, got none for {name}")
        found = LayerInputs(*(torch.cat(column) for column in zip(*parts, strict=True)))
        for told, part in (("tokens", found.x), ("router weights", found.gates)):
            wrong = (~torch.isfinite(part)).any(dim=1).nonzero()
            if len(wrong):
                raise ValueError(
                    f"batches must give finite activations, got NaN or infinity in the {told} of {name}, first at "
                    f"token {int(wrong[0])} of {len(part)}"
                )
        return found

    def _keep(self, layer: ExpertLayer, x: Tensor, gates: Tensor) -> None:
        x, gates = x.detach().flatten(0, -2), gates.detach()
        if self.kept is not None:
            kept = self.kept.to(x.device)
            x, gates = x[kept], gates[kept]
        # Blocks may write to their inputs later on.
        self._parts[layer.name].append(LayerInputs(x.to("cpu", copy=True), gates.to("cpu", copy=True)))

    def _fused(self, layer: ExpertLayer) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            given = [*args, *kwargs.values()]
            if len(given) < 3:
                raise ValueError(f"model must route with indices and weights, got {len(given)} inputs to {layer.name}")
            x, index, weights = given[:3]
            gates = torch.zeros(len(index), layer.n_experts, dtype=weights.dtype, device=weights.device)
            self._keep(layer, x, gates.scatter_add_(1, index.long(), weights))

        return layer.experts.register_forward_pre_hook(hook, with_kwargs=True)

    def _listed(self, layer: ExpertLayer) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._keep(layer, x, probe_gates(layer, x))

        return layer.block.register_forward_pre_hook(hook, with_kwargs=True)


@torch.no_grad()
def probe_gates(layer: ExpertLayer, x: Tensor) -> Tensor:
    """Return the weight (m, n) of each expert in a block whose forward is not known, for tokens ``x`` (..., H).

    The block's output is linear in those of its experts, so experts that answer unit vectors show their weights, and
    experts that answer 0 show the rest. Units are long, so that rounding of the rest does not hide weights.
    """
    n, width, forward = layer.n_experts, x.shape[-1], type(layer.block).forward

    def run(first: int | None) -> Tensor:
        def answer(j: int) -> Any:
            def hook(_: nn.Module, __: tuple, out: Tensor) -> Tensor:
                unit = torch.zeros_like(out)
                if first is not None and first <= j < first + width:
                    unit[..., j - first] = UNIT
                return unit

            return hook

        experts: Any = layer.experts
        hooks = [expert.register_forward_hook(answer(j)) for j, expert in enumerate(experts)]
        try:
            out = forward(layer.block, x.clone())
        finally:
            for hook in hooks:
                hook.remove()
        return (out[0] if isinstance(out, tuple) else out).reshape(-1, width)

    rest = run(None)
    found = [(run(first) - rest)[:, : min(width, n - first)] / UNIT for first in range(0, n, width)]
    return torch.cat(found, dim=1)


def token_batches(batches: Any, batch_size: int = 8) -> list[dict[str, Tensor]]:
    """Return calibration batches as keyword arguments of a model; a tensor of ids (b, t) is cut into batches.

    Raises
    ------
    ValueError
        There is none, or a batch is no ids and no mapping with ``input_ids``.
    """
    if isinstance(batches, Tensor):
        if batches.ndim != 2 or batches.is_floating_point():
            raise ValueError(f"batches must be ids (b, t) of integers, got {tuple(batches.shape)} of {batches.dtype}")
        batches = batches.split(batch_size)
    made = []
    for batch in batches:
        if isinstance(batch, Tensor):
            made.append({"input_ids": batch})
        elif isinstance(batch, Mapping) and "input_ids" in batch:
            made.append({name: part for name, part in batch.items() if name in ("input_ids", "attention_mask")})
        else:
            raise ValueError(f"batches must hold ids (b, t) or mappings with input_ids, got {type(batch).__name__}")
    if not made or not all(batch["input_ids"].numel() for batch in made):
        raise ValueError("batches must hold at least one token each, got none")
    return made


@torch.no_grad()
def capture_inputs(model: nn.Module, layers: list[ExpertLayer], batches: list[dict[str, Tensor]]) -> Capture:
    """Run a model over batches in eval mode, as router noise is off there, and gather what reaches its layers."""
    capture = Capture(layers)
    device = next(model.parameters()).device
    # Submodules may have modes of their own, which are put back one by one.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with capture.attached():
            for batch in batches:
                mask = batch.get("attention_mask")
                capture.kept = None if mask is None else mask.flatten().bool()
                model(**{name: part.to(device) for name, part in batch.items()})
    finally:
        for module, mode in modes:
            module.training = mode
    return capture
