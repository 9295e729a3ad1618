"""One way to read and set the experts of mixture-of-experts layers, stacked in one tensor or kept as modules."""

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Names of the three maps of an expert that is a module: gate, up, down; without a gate: up, down.
TRIPLES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
PAIRS = (("up_proj", "down_proj"), ("fc1", "fc2"), ("wi", "wo"))
ROUTERS = ("gate", "router")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
ADVICE = "load the model unquantised, in bfloat16 for instance, merge, and quantise the result"


@dataclass(frozen=True)
class ExpertStack:
    """Weights of n experts in one order of axes, whatever the checkpoint's own.

    ``gate`` and ``up`` (n, I, H), ``down`` (n, H, I); ``gate`` is None in plain MLPs. Biases (n, I), (n, I), (n, H).
    ``activation(gate, up)`` makes the hidden units (..., I) of their two inputs.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    activation: Callable[[Tensor | None, Tensor], Tensor]
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __len__(self) -> int:
        return len(self.up)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def numel(self) -> int:
        return sum(part.numel() for part in self.parts.values())

    def map(self, function: Callable[[Tensor], Tensor]) -> "ExpertStack":
        return replace(self, **{name: function(part) for name, part in self.parts.items()})

    def take(self, chosen: Sequence[int] | Tensor) -> "ExpertStack":
        rows = torch.as_tensor(chosen, dtype=torch.long)
        return self.map(lambda part: part[rows.to(part.device)])

    def hidden(self, x: Tensor) -> Tensor:
        """Return the hidden units (n, m, I) of every expert on every token ``x`` (m, H)."""
        gate = None if self.gate is None else _project(x, self.gate, self.gate_bias)
        return self.activation(gate, _project(x, self.up, self.up_bias))

    def outputs(self, x: Tensor) -> Tensor:
        """Return the outputs (n, m, H) of every expert on every token ``x`` (m, H)."""
        if x.device.type != "cpu":
            return self.grouped_outputs(x)
        # One expert after the other: its hidden units stay in a core's cache, where those of all would not.
        out = torch.empty(len(self), len(x), self.down.shape[1], dtype=x.dtype)
        for j in range(len(self)):
            gate = None if self.gate is None else F.linear(x, self.gate[j], _row(self.gate_bias, j))
            hidden = self.activation(gate, F.linear(x, self.up[j], _row(self.up_bias, j)))
            torch.mm(hidden, self.down[j].mT, out=out[j])
        return out if self.down_bias is None else out.add_(self.down_bias.unsqueeze(1))

    def grouped_outputs(self, x: Tensor) -> Tensor:
        """Return the same by three products of all experts at once, for devices where many small ones are slow."""
        out = self.hidden(x) @ self.down.mT
        return out if self.down_bias is None else out + self.down_bias.unsqueeze(1)


def _row(bias: Tensor | None, j: int) -> Tensor | None:
    return None if bias is None else bias[j]


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = (x @ weight.flatten(0, 1).mT).view(len(x), *weight.shape[:2]).movedim(1, 0)
    return out if bias is None else out + bias.unsqueeze(1)


def stack_of(stacks: Iterable[ExpertStack]) -> ExpertStack:
    """Put stacks of one kind behind one another."""
    given = list(stacks)
    return replace(given[0], **{name: torch.cat([s.parts[name] for s in given]) for name in given[0].parts})


class FusedGate:
    """The gating of an experts module of transformers, without its weights.

    No module itself: transformers would look in it for the weights of the class.
    """

    def __init__(self, experts: nn.Module):
        self.concatenated = getattr(experts, "is_concatenated", True)
        self.source: Any = copy.copy(experts)
        self.source._parameters, self.source._buffers = {}, {}

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return self.source.act_fn(up)
        # Some classes have the default gating only through a decorator of transformers, and some not at all.
        if not hasattr(self.source, "_apply_gate"):
            return self.source.act_fn(gate) * up
        both = torch.cat((gate, up), -1) if self.concatenated else torch.stack((gate, up), -1).flatten(-2)
        return self.source._apply_gate(both)


class ModuleGate:
    """The gating of an expert that is a module of its own: ``act(gate) * up``, or ``act(up)`` without a gate."""

    def __init__(self, act: Callable[[Tensor], Tensor]):
        self.act = act

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        return self.act(up) if gate is None else self.act(gate) * up


@dataclass(frozen=True)
class ExpertLayer:
    """One mixture-of-experts layer of a model: ``block`` holds ``experts`` and, mostly, a ``router``."""

    name: str
    block: nn.Module
    experts: Any
    router: nn.Module | None

    @property
    def fused(self) -> bool:
        return not isinstance(self.experts, nn.ModuleList)

    @property
    def n_experts(self) -> int:
        return len(self.experts.down_proj) if self.fused else len(self.experts)

    @property
    def top_k(self) -> int:
        """Experts a token; 1 where neither router nor block tells."""
        for holder in (self.router, self.block):
            for name in ("top_k", "num_experts_per_tok", "k"):
                value = getattr(holder, name, None)
                if isinstance(value, int):
                    return value
        return 1

    @property
    def router_weight(self) -> Tensor | None:
        weight = getattr(self.router, "weight", None)
        fits = isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) == self.n_experts
        return weight.detach() if fits else None

    def stack(self) -> ExpertStack:
        """Return the experts' weights: views where the layout allows it."""
        return fused_stack(self.experts) if self.fused else _module_stack(self.experts)


def fused_stack(experts: nn.Module) -> ExpertStack:
    """Return the weights of an experts module of transformers."""
    both = getattr(experts, "gate_up_proj", None)
    up_name = "up_proj" if both is None else "gate_up_proj"
    found = {
        "up": getattr(experts, up_name),
        "down": experts.down_proj,
        "up_bias": getattr(experts, f"{up_name}_bias", None),
        "down_bias": getattr(experts, "down_proj_bias", None),
    }
    known = {name: part.detach() for name, part in found.items() if isinstance(part, Tensor)}
    if getattr(experts, "is_transposed", False):
        known["up"], known["down"] = known["up"].mT, known["down"].mT
    parts: dict[str, Any] = {"gate": None, **known}
    if both is not None:
        concatenated = getattr(experts, "is_concatenated", True)
        parts["gate"], parts["up"] = _halves(known["up"], 1, concatenated)
        if "up_bias" in known:
            parts["gate_bias"], parts["up_bias"] = _halves(known["up_bias"], 1, concatenated)
    return ExpertStack(activation=FusedGate(experts), **parts)


def _halves(both: Tensor, dim: int, concatenated: bool) -> tuple[Tensor, Tensor]:
    if concatenated:
        first, second = both.chunk(2, dim)
        return first, second
    split = both.unflatten(dim, (-1, 2))
    return split.select(dim + 1, 0), split.select(dim + 1, 1)


def fused_parameters(stack: ExpertStack, experts: nn.Module) -> dict[str, Tensor]:
    """Return what :func:`fused_stack` reads, in the layout of ``experts``, for any number of experts."""
    concatenated, transposed = getattr(experts, "is_concatenated", True), getattr(experts, "is_transposed", False)

    def joined(gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return up
        return torch.cat((gate, up), 1) if concatenated else torch.stack((gate, up), 2).flatten(1, 2)

    name = "up_proj" if stack.gate is None else "gate_up_proj"
    made = {name: joined(stack.gate, stack.up), "down_proj": stack.down}
    if transposed:
        made = {key: part.mT for key, part in made.items()}
    if stack.up_bias is not None:
        made[f"{name}_bias"] = joined(stack.gate_bias, stack.up_bias)
    if stack.down_bias is not None:
        made["down_proj_bias"] = stack.down_bias
    return {key: part.contiguous() for key, part in made.items()}


def linear_names(expert: nn.Module) -> tuple[str, ...] | None:
    """Return the names of an expert module's maps, gate first, or None where they are not known."""
    held = {name for name, part in expert.named_children() if isinstance(part, nn.Linear)}
    return next((names for names in (*TRIPLES, *PAIRS) if held == set(names)), None)


def _module_stack(experts: nn.ModuleList) -> ExpertStack:
    names = linear_names(experts[0])
    assert names is not None
    roles = names if len(names) == 3 else (None, *names)
    parts: dict[str, Any] = {"gate": None}
    for role, name in zip(("gate", "up", "down"), roles, strict=True):
        if name is None:
            continue
        maps = [getattr(expert, name) for expert in experts]
        parts[role] = torch.stack([m.weight.detach() for m in maps])
        if maps[0].bias is not None:
            parts[f"{role}_bias"] = torch.stack([m.bias.detach() for m in maps])
    return ExpertStack(activation=ModuleGate(_activation(experts[0])), **parts)


def _activation(expert: nn.Module) -> Any:
    for name in ("act_fn", "act", "activation", "activation_fn"):
        found = getattr(expert, name, None)
        if callable(found):
            return found
    return F.silu


def expert_modules(stack: ExpertStack, template: nn.Module) -> list[nn.Module]:
    """Return copies of an expert module that hold the weights of a stack."""
    names = linear_names(template)
    assert names is not None
    made = []
    for i in range(len(stack)):
        expert = copy.deepcopy(template)
        for role, name in zip(("gate", "up", "down")[3 - len(names) :], names, strict=True):
            weight, bias = stack.parts[role][i], stack.parts.get(f"{role}_bias")
            linear = getattr(expert, name)
            linear.weight = nn.Parameter(weight.to(linear.weight.dtype).contiguous())
            if bias is not None:
                linear.bias = nn.Parameter(bias[i].to(linear.bias.dtype).contiguous())
        made.append(expert)
    return made


def find_expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Return the mixture-of-experts layers of a model in the order of its modules; shared experts are left alone.

    Raises
    ------
    ValueError
        There are none, they are quantised, routed in another way, or have a norm behind them, or the model carries
        adapters.
    """
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("model must be without adapters, got some of PEFT: merge them first, by merge_and_unload")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(f"model must not be quantised, got {getattr(model, 'quantization_method', None)}: {ADVICE}")
    found = expert_layers(model)
    if not found:
        raise ValueError(
            f"model must have mixture-of-experts layers, got none in {type(model).__name__}; looked for modules with "
            "stacked gate_up_proj or up_proj and down_proj (n, ., .), and for lists named 'experts' whose items have "
            f"{', '.join('/'.join(names) for names in (*TRIPLES, *PAIRS))}"
        )
    for layer in found:
        _check_supported(layer)
    return found


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Return the mixture-of-experts layers of a model, whatever is in them; none where there are none."""
    found = []
    for name, module in model.named_modules():
        if not (_is_fused(module) or _is_list(name, module)):
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        router = next((getattr(block, r) for r in ROUTERS if isinstance(getattr(block, r, None), nn.Module)), None)
        found.append(ExpertLayer(name, block, module, router))
    return found


def _is_fused(module: nn.Module) -> bool:
    maps = [getattr(module, "gate_up_proj", getattr(module, "up_proj", None)), getattr(module, "down_proj", None)]
    return all(isinstance(m, Tensor) and m.ndim == 3 for m in maps)


def _is_list(name: str, module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or name.rpartition(".")[2] != "experts" or len(module) < 2:
        return False
    return linear_names(module[0]) is not None


def _check_supported(layer: ExpertLayer) -> None:
    if getattr(layer.experts, "has_post_expert_norm", False):
        raise ValueError(f"model must have experts without a norm behind them, got {type(layer.experts).__name__}")
    if layer.fused and not _takes_routes(type(layer.experts).forward):
        raise ValueError(
            "model must hand its experts tokens, indices and weights, got others for "
            f"{type(layer.experts).__name__} in {layer.name}"
        )
    weights = [p for p in layer.experts.parameters() if p.ndim > 1]
    narrow = next((p.dtype for p in weights if not p.is_floating_point() or p.dtype.itemsize < 2), None)
    if narrow is not None:
        raise ValueError(f"model must not be quantised, got {narrow} in {layer.name}: {ADVICE}")


def _takes_routes(forward: Callable) -> bool:
    """Tell whether a forward takes three arguments besides the module."""
    given = inspect.signature(forward).parameters.values()
    return len(given) > 3 or any(p.kind is p.VAR_POSITIONAL for p in given)


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set a submodule by its dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def check_reducible(layer: ExpertLayer) -> None:
    """Say whether rows of the router can be merged or dropped.

    Raises
    ------
    ValueError
        The router is not known, or picks experts by groups of rows.
    """
    if layer.router_weight is None:
        raise ValueError(f"model must have a router with a weight (n, H) beside {layer.name} to change its rows")
    grouped = max((getattr(layer.router, name, None) or 1) for name in ("num_group", "n_group"))
    if grouped > 1:
        raise ValueError(f"model must not route by groups to change router rows, got {grouped} groups in {layer.name}")


def reduced_router(layer: ExpertLayer, rows: Tensor) -> dict[str, Tensor]:
    """Return the router's tensors with ``rows`` (k, n) times what they hold for each of n experts."""
    check_reducible(layer)
    router, made = layer.router, {}
    assert router is not None
    for name, part in (*router.named_parameters(), *router.named_buffers()):
        # Some keep a number an expert as one row.
        row = part.numel() == layer.n_experts and part.shape[-1] == layer.n_experts
        held = part.detach().double().flatten() if row else part.detach().double()
        if row or (part.ndim and len(part) == layer.n_experts):
            wide = rows.to(part.device, torch.float64) @ held.flatten(min(1, held.ndim - 1))
            shape = (*part.shape[:-1], len(rows)) if row else (len(rows), *part.shape[1:])
            made[name] = wide.view(shape).to(part.dtype)
    return made


def set_router(layer: ExpertLayer, tensors: dict[str, Tensor]) -> None:
    """Give a layer's router other tensors, for another number of experts, and tell everyone that number."""
    router = layer.router
    assert router is not None
    for name, part in tensors.items():
        owner, _, leaf = name.rpartition(".")
        holder = router.get_submodule(owner)
        if leaf in holder._parameters:
            setattr(holder, leaf, nn.Parameter(part, requires_grad=getattr(holder, leaf).requires_grad))
        else:
            setattr(holder, leaf, part)
    if isinstance(router, nn.Linear):
        router.out_features = len(router.weight)
    k = len(next(iter(tensors.values())))
    for holder in (layer.block, router):
        for name in COUNTS:
            if isinstance(getattr(holder, name, None), int):
                setattr(holder, name, k)
