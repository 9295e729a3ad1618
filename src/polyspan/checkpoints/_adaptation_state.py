"""What a merge that learns keeps on the disk, so that a killed run goes on and ends in the same bits."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyspan.io import load_fitted, remove_file, save_fitted

KIND = "MergeInProgress"


class Kept(NamedTuple):
    """Arrays and facts of a run at one step."""

    arrays: Mapping[str, np.ndarray]
    about: Mapping[str, Any]

    def tensor(self, name: str, like: Tensor) -> Tensor:
        return torch.from_numpy(self.arrays[name]).to(like)


class RunFile:
    """One .safetensors file of a run under way; ``work`` says whose it is, in JSON types. No path keeps nothing."""

    def __init__(self, path: Path | str | None, work: Mapping[str, Any]):
        self.path, self.work = None if path is None else Path(path), dict(work)

    def load(self) -> Kept | None:
        """Return what was kept, or None where there is nothing.

        Raises
        ------
        ValueError
            It is of other work.
        """
        if self.path is None or not self.path.exists():
            return None
        found = load_fitted(self.path, KIND, finite=False)
        differs = sorted(k for k in self.work.keys() | found.params.keys() if self.work.get(k) != found.params.get(k))
        if differs:
            raise ValueError(
                f"checkpoint {self.path} belongs to other work, which differs in {', '.join(differs)}: remove it, or "
                "give another path"
            )
        return Kept(found.arrays, found.about)

    def save(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        if self.path is not None:
            arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
            save_fitted(self.path, kind=KIND, arrays=arrays, params=self.work, about=about)

    def remove(self) -> None:
        if self.path is not None:
            remove_file(self.path)


def adam_tensors(optimiser: torch.optim.Adam, x: Tensor) -> dict[str, Tensor]:
    """Return the moments of the only parameter, with its step."""
    state = optimiser.state[x]
    return {"adam mean": state["exp_avg"], "adam square": state["exp_avg_sq"], "adam step": state["step"].reshape(1)}


def restore_adam(optimiser: torch.optim.Adam, x: Tensor, kept: Kept) -> None:
    """Put moments and step back."""
    step = kept.arrays["adam step"][0]
    optimiser.state[x] = {
        # Where an optimiser keeps its step depends on whether it is fused.
        "step": torch.tensor(step, device=x.device if optimiser.defaults["fused"] else "cpu"),
        "exp_avg": kept.tensor("adam mean", x),
        "exp_avg_sq": kept.tensor("adam square", x),
    }


def chance(generator: torch.Generator) -> dict[str, Tensor]:
    """Return the state of the run's generator and of torch's global one, which a network may draw from."""
    return {"generator": generator.get_state(), "global generator": torch.get_rng_state()}


def restore_chance(generator: torch.Generator, kept: Kept) -> None:
    generator.set_state(torch.from_numpy(kept.arrays["generator"]))
    torch.set_rng_state(torch.from_numpy(kept.arrays["global generator"]))


def plain(number: float) -> float | None:
    """Return a number as JSON knows it: None stands for what is not finite."""
    return number if math.isfinite(number) else None
