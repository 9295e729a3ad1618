"""The course of a compression: which layers go together, in which order, and how they come into the model."""

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._calibration import TargetLayer
from ._compressed_layers import LowRankLinear, SparseDictionaryLinear
from ._layer_methods import Settings, Sizes, layer_config, layer_from_config, unit_sizes


class LayerReport(NamedTuple):
    """What became of one layer.

    ``shape`` is (inputs, outputs), ``atoms`` the dictionary's size, the rank, or the inputs of a pruned layer;
    ``nonzero`` are coefficients an output. Bytes are those stored, a shared dictionary counted at its owner. ``error``
    is the share of the outputs' squared norm on calibration that is lost; ``ridge`` what whitening had to add, as a
    share of the mean of the Gram matrix's diagonal. ``note`` says why a layer was left as it was.
    """

    layer: str
    shape: tuple[int, int]
    method: str
    atoms: int
    nonzero: int
    bytes_before: int
    bytes_after: int
    error: float
    ridge: float = 0.0
    sweeps: int = 0
    note: str = ""


class Unit(NamedTuple):
    """Layers that are compressed together; without sizes they stay as they are, for the reason in ``note``."""

    layers: list[TargetLayer]
    sizes: Sizes | None
    note: str = ""

    @property
    def name(self) -> str:
        return self.layers[0].name


def ratio_of(name: str, ratio: float | int | Mapping[str, float]) -> float | None:
    """Return the ratio for a layer: the number, or that of the first pattern that fits; None where none does."""
    if not isinstance(ratio, Mapping):
        return ratio
    last = name.rsplit(".", 1)[-1]
    return next((r for pattern, r in ratio.items() if last == pattern or fnmatch.fnmatchcase(name, pattern)), None)


def plan_units(
    layers: Sequence[TargetLayer],
    sites: Sequence[Sequence[str]],
    settings: Settings,
    ratio: float | int | Mapping[str, float],
    groups: int,
    dtypes: Mapping[str, torch.dtype],
) -> list[Unit]:
    """Return the units of one method in the order in which the model reaches them.

    ``groups`` layers of one role and shape in consecutive blocks share a dictionary; the last group may be shorter.

    Raises
    ------
    ValueError
        A ratio is out of range or too large for a layer, or ``groups`` is below 1.
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    for pattern in ratio if isinstance(ratio, Mapping) else ():
        if pattern != "*" and not any(ratio_of(layer.name, {pattern: 0.0}) is not None for layer in layers):
            raise ValueError(f"ratio must name layers that are compressed, got {pattern!r}, which fits none")
    order = reached(sites, layers)
    units: list[Unit] = []
    roles: dict[tuple, list[TargetLayer]] = {}
    for layer in layers:
        wanted = ratio_of(layer.name, ratio)
        if layer.tied_to is not None:
            continue
        if wanted is None:
            units.append(Unit([layer], None, "no ratio given"))
        elif layer.name not in order:
            units.append(Unit([layer], None, "not reached by calibration"))
        else:
            key = (layer.role, layer.d_in, layer.d_out, layer.transposed, wanted, dtypes[layer.name])
            if layer.block < 0 or groups == 1:
                key = (layer.name, *key)
            roles.setdefault(key, []).append(layer)
    for key, found in roles.items():
        members = sorted(found, key=lambda layer: layer.block)
        for start in range(0, len(members), groups):
            part = members[start : start + groups]
            first = part[0]
            sizes = unit_sizes(
                settings, first.name, first.d_in, first.d_out, len(part), float(key[-2]), dtypes[first.name]
            )
            units.append(Unit(part, sizes, "" if sizes else "too small to gain"))
    place = {layer.name: i for i, layer in enumerate(layers)}
    return sorted(units, key=lambda unit: (order.get(unit.name, math.inf), place[unit.name]))


def reached(sites: Sequence[Sequence[str]], layers: Sequence[TargetLayer]) -> dict[str, int]:
    """Return when the model comes to each layer that owns its weight, or to one that is tied to it, first."""
    order = {name: place for place, site in enumerate(sites) for name in site}
    found: dict[str, int] = {}
    for layer in layers:
        if layer.name in order:
            owner = layer.tied_to or layer.name
            found[owner] = min(order[layer.name], found.get(owner, len(sites)))
    return found


def site_names(sites: Sequence[Sequence[str]], layers: Sequence[TargetLayer]) -> dict[str, list[str]]:
    """Return for each layer that owns its weight the sites, by their first layer, whose Gram matrices it needs."""
    first = {name: site[0] for site in sites for name in site}
    needed: dict[str, list[str]] = {}
    for layer in layers:
        if layer.name in first:
            needed.setdefault(layer.tied_to or layer.name, []).append(first[layer.name])
    return needed


def windows(
    units: Sequence[Any], sites_of: Any, widths: Mapping[str, int], budget: float | int, *, sequential: bool
) -> Iterator[tuple[list[Any], list[str]]]:
    """Yield units with the sites that they need, as many at once as their Gram matrices fit in ``budget`` bytes.

    With ``sequential`` only those that need the same sites go together.
    """
    part: list[Any] = []
    open_sites: list[str] = []
    for unit in units:
        needed = sites_of(unit)
        fresh = [site for site in needed if site not in open_sites]
        size = sum(8 * widths[site] ** 2 for site in (*open_sites, *fresh))
        if part and (fresh if sequential else size > budget):
            yield part, open_sites
            part, open_sites, fresh = [], [], list(dict.fromkeys(needed))
        part.append(unit)
        open_sites = [*open_sites, *fresh]
    if part:
        yield part, open_sites


def unit_grams(unit: Unit, needed: Mapping[str, Sequence[str]], found: Any) -> list[Tensor] | None:
    """Return each layer's Gram matrix, summed over the sites of its weight; None where one saw nothing but zeros.

    ``found`` has ``grams``, by the first layer of a site.
    """
    made = []
    for layer in unit.layers:
        parts = [found.grams[site] for site in needed[layer.name] if site in found.grams]
        if not parts or not any(bool(part.diagonal().any()) for part in parts):
            return None
        made.append(parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0))
    return made


def put(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Set the submodule of that name, wherever the model has it, and return the one that was there."""
    before = model.get_submodule(name)
    for holder in model.modules():
        for leaf, child in holder._modules.items():
            if child is before:
                holder._modules[leaf] = module
    return before


def home_of(module: Any) -> torch.device:
    """Return where a layer computes; accelerate says so where it keeps the weight elsewhere."""
    if not module.weight.is_meta:
        return module.weight.device
    return torch.device(getattr(module._hf_hook, "execution_device", None) or "cpu")


def bias_of(module: Any) -> Tensor | None:
    """Return a layer's bias where it computes, or None; one that accelerate keeps elsewhere is fetched."""
    bias = getattr(module, "bias", None)
    if bias is not None and bias.is_meta:
        bias = module._hf_hook.weights_map["bias"]
    return None if bias is None else bias.to(home_of(module))


def with_bias(module: nn.Module, bias: Tensor | None) -> nn.Module:
    """Give a compressed layer a copy of a bias."""
    kept = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    module.register_parameter("bias", kept)
    return module


def join(module: nn.Module, owner: nn.Module, *, whole: bool) -> None:
    """Let a layer take the dictionary or left factor of ``owner``, or with ``whole`` everything but the bias."""
    if isinstance(module, LowRankLinear) and isinstance(owner, LowRankLinear):
        if whole:
            module.right = owner.right
        module.share_left(owner)
    elif isinstance(module, SparseDictionaryLinear) and isinstance(owner, SparseDictionaryLinear):
        if whole:
            module.share_coefficients(owner)
        else:
            module.share_dictionary(owner)
    else:
        raise TypeError(f"owner must be a {type(module).__name__}, got {type(owner).__name__}")


def install(model: nn.Module, unit: Unit, modules: Sequence[Any], tied: Sequence[TargetLayer]) -> dict[str, Any]:
    """Put a unit's compressed modules in place of its layers, and of those tied to them; return their configurations.

    ``model`` keeps the biases. The modules that were there are returned under the key ``""``.
    """
    told: dict[str, Any] = {"": {}}
    for number, (layer, module) in enumerate(zip(unit.layers, modules, strict=True)):
        old = model.get_submodule(layer.name)
        bias = bias_of(old)
        module.to(home_of(old))
        module.transposed = layer.transposed
        module.requires_grad_(False)
        told[""][layer.name] = put(model, layer.name, with_bias(module, bias).eval())
        told[layer.name] = layer_config(module, owner=unit.name if number else None)
        for other in tied:
            if other.tied_to != layer.name:
                continue
            before = model.get_submodule(other.name)
            bias = bias_of(before)
            twin: Any = layer_from_config(
                told[layer.name], bias=bias is not None, dtype=_dtype(module), device=_device(module)
            )
            join(twin, module, whole=True)
            twin.transposed = other.transposed
            told[""][other.name] = put(model, other.name, with_bias(twin, bias).eval())
            told[other.name] = layer_config(twin, owner=layer.name, tied_to=layer.name)
    return told


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _device(module: nn.Module) -> torch.device:
    return next(iter((*module.parameters(), *module.buffers()))).device


def module_bytes(module: nn.Module, *, shared: bool) -> int:
    """Return the bytes that a layer's tensors take when stored, without bias; nothing for what it shares."""
    return sum(t.numel() * t.element_size() for t in _stored(module, shared=shared).values())


def module_parameters(module: nn.Module, *, shared: bool) -> int:
    """Return how many numbers those tensors hold; where coefficients stand is none."""
    return sum(t.numel() for name, t in _stored(module, shared=shared).items() if name not in ("mask", "indices"))


def _stored(module: nn.Module, *, shared: bool) -> dict[str, Tensor]:
    left_out = {"bias", "dictionary", "left"} if shared else {"bias"}
    return {name: t for name, t in module.state_dict().items() if name not in left_out}


def layer_reports(
    unit: Unit,
    method: str,
    before: Sequence[int],
    after: Sequence[int],
    errors: Sequence[float],
    *,
    ridge: float = 0.0,
    sweeps: int = 0,
) -> list[LayerReport]:
    """Return the report of a unit's layers; without sizes they are reported as left alone."""
    atoms, nonzero = unit.sizes or (0, 0)
    return [
        LayerReport(
            layer.name, (layer.d_in, layer.d_out), method if unit.sizes else "", atoms, nonzero, old, new, error, ridge,
            sweeps, unit.note,
        )
        for layer, old, new, error in zip(unit.layers, before, after, errors, strict=True)
    ]  # fmt: skip
