"""Names and layouts under which transformers keeps a model's tensors in files, where memory has others."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyspan.errors import require
from polyspan.io import TensorEntry, read_json

LAYER = re.compile(r"^.*?\.\d+\.")


def stored_form(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a model of transformers as its ``save_pretrained`` writes them.

    Stacked experts come apart, for instance, and layers get the names that other programs know. Tensors on the meta
    device show names and shapes alone.
    """
    loading: Any = require("transformers.core_model_loading", extra="hf")
    return loading.revert_weight_conversion(model, dict(state))


def file_names(folder: Path) -> dict[str, str]:
    """Return under which name the files of a checkpoint hold each tensor of its model, of those that are not changed.

    Empty where the folder holds no model of transformers.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    kinds = config.get("architectures") if isinstance(config, dict) else None
    if not kinds:
        return {}
    transformers: Any = require("transformers", extra="hf", purpose="an adapter with names of its own")
    kind = getattr(transformers, str(kinds[0]), None)
    if kind is None:
        return {}
    with torch.device("meta"):
        model = kind(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
    shown = {name: torch.empty_like(part) for name, part in model.state_dict().items()}
    names = {id(part): name for name, part in shown.items()}
    return {names[id(part)]: name for name, part in stored_form(model, shown).items() if id(part) in names}


def stored_form_entries(model: Any, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the same for entries, whose tensors are made when a file is written: one layer's at a time."""
    groups: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        match = LAYER.match(name)
        groups.setdefault(match[0] if match else "", {})[name] = entry
    found: dict[str, TensorEntry] = {}
    held = _Held(model)
    for group in groups.values():
        shown = {name: torch.empty(e.shape, dtype=e.dtype, device="meta") for name, e in group.items()}
        made = stored_form(model, shown)
        # What is passed on as it is needs no other tensor of its layer.
        taken = {name: entry for name, entry in group.items() if made.get(name) is not shown[name]}
        for name, part in made.items():
            if part is shown.get(name):
                found[name] = group[name]
            else:
                facts = part.dtype, tuple(part.shape)
                found[name] = TensorEntry(*facts, lambda taken=taken, name=name: held.take(taken, name))
    return found


class _Held:
    """The stored form of the layer from which the last tensor was taken."""

    def __init__(self, model: Any):
        self.model = model
        self.entries: Mapping[str, TensorEntry] = {}
        self.made: dict[str, Tensor] = {}

    def take(self, entries: Mapping[str, TensorEntry], name: str) -> Tensor:
        if entries is not self.entries:
            self.made = {}
            given = {given: entry.make() for given, entry in entries.items()}
            self.entries, self.made = entries, stored_form(self.model, given)
        return self.made[name].contiguous()
