"""Find modules of a network by name or by a predicate, and put others in their place."""

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches

from torch import nn

Where = str | Sequence[str] | Callable[[str, nn.Module], bool]


def find_modules(model: nn.Module, where: Where, argument: str) -> dict[str, nn.Module]:
    """Return the modules that names, or a predicate ``(name, module) -> bool``, choose; the model itself is none.

    Of nested modules that a predicate chooses, the outermost counts.

    Raises
    ------
    ValueError
        A name is not there (near ones are named), one chosen module lies inside another, or none is chosen.
    """
    named = {name: module for name, module in model.named_modules() if name}
    if callable(where):
        found: dict[str, nn.Module] = {}
        for name, module in named.items():
            if where(name, module) and not any(name.startswith(f"{outer}.") for outer in found):
                found[name] = module
        if not found:
            raise ValueError(f"{argument} must choose a module of the model, got a predicate that chooses none")
        return found
    names = [where] if isinstance(where, str) else list(where) if isinstance(where, Iterable) else [where]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{argument} must be names of modules or a predicate, got {where!r}")
    if not names:
        raise ValueError(f"{argument} must name a module of the model, got no name")
    # A shared module stands in named_modules under its first name only.
    everywhere = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    for name in names:
        if name not in everywhere:
            near = get_close_matches(name, everywhere, n=3, cutoff=0.5)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise ValueError(f"{argument} must name modules of the model, got {name!r}{hint}")
    for inner in names:
        for outer in names:
            if inner.startswith(f"{outer}."):
                raise ValueError(f"{argument} must not lie inside one another, got {inner!r} inside {outer!r}")
    return {name: everywhere[name] for name in dict.fromkeys(names)}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> list[str]:
    """Put ``new`` wherever ``old`` is a child, also under several names; return the names."""
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is old and name]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return names
