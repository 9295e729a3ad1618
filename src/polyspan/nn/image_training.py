"""Train a classifier of small images: batches, shifts, warm-up and cosine, and checkpoints to go on from."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyspan.errors import NotConverged
from polyspan.run import Progress

from .lion import Lion

KIND = "ImageTrainingCheckpoint"


@dataclass(frozen=True)
class Recipe:
    """How to train: all that a checkpoint must agree with, too."""

    steps: int
    batch: int
    rate: float
    decay: float
    warmup: float = 0.1
    smoothing: float = 0.1
    shift: int = 0
    optimizer: str = "adamw"
    checkpoint: Path | None = None
    every: int = 100
    signature: dict[str, Any] = field(default_factory=dict)


class Batches:
    """Rows (n, c h w) of an array or memory map as images of mean 0 and spread 1, a batch at a time."""

    def __init__(self, X: Any, shape: tuple[int, int, int], mean: float, spread: float, device: Any):
        self.X, self.shape, self.mean, self.spread, self.device = X, shape, mean, spread, device

    def __call__(self, rows: Any) -> Tensor:
        """Return the images (B, c, h, w) of these rows, float32."""
        raw = np.asarray(self.X[rows], dtype=np.float32)
        x = torch.as_tensor((raw - np.float32(self.mean)) / np.float32(self.spread))
        return x.reshape(-1, *self.shape).to(self.device)


def moved(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Move each image by up to ``shift`` pixels down and across, edges repeated."""
    batch, _, h, w = images.shape
    if not shift:
        return images
    offsets = torch.randint(2 * shift + 1, (2, batch), generator=generator).to(images.device)
    wide = F.pad(images, (shift,) * 4, mode="replicate")
    rows = offsets[0, :, None] + torch.arange(h, device=images.device)
    columns = offsets[1, :, None] + torch.arange(w, device=images.device)
    item = torch.arange(batch, device=images.device)[:, None, None]
    return wide[item, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class ImageTraining:
    """Run a recipe on a network that maps images to logits."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        generator: torch.Generator,
        *,
        penalty: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] | None = None,
        label: str = "",
    ):
        self.model, self.recipe, self.generator, self.penalty, self.label = model, recipe, generator, penalty, label
        self.losses: list[float] = []
        self.order = torch.empty(0, dtype=torch.long)
        plain, decayed = [], []
        for name, parameter in model.named_parameters():
            free = parameter.ndim < 2 or name in ("positions", "cls_token")
            (plain if free else decayed).append(parameter)
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": recipe.decay}]
        make: Any = Lion if recipe.optimizer == "lion" else torch.optim.AdamW
        self.optimizer = make(groups, lr=recipe.rate)

    def run(self, batches: Batches, labels: np.ndarray) -> list[float]:
        """Train, or do what a checkpoint has left; return the loss of each step."""
        self._resume()
        targets = torch.as_tensor(labels)
        self.model.train()
        with Progress(self.label, self.recipe.steps) as shown:
            shown.advance(len(self.losses))
            while len(self.losses) < self.recipe.steps:
                if len(self.order) == 0:
                    self.order = torch.randperm(len(labels), generator=self.generator)
                rows, self.order = self.order[: self.recipe.batch].sort().values, self.order[self.recipe.batch :]
                loss = self._step(batches(rows.numpy()), targets[rows])
                self.losses.append(loss)
                if not math.isfinite(loss):
                    raise NotConverged(f"the loss is no longer finite after {len(self.losses)} steps; lower the rate")
                if len(self.losses) % self.recipe.every == 0:
                    self._keep()
                shown.advance(1, loss=loss)
        self.model.eval()
        return self.losses

    def _step(self, x: Tensor, y: Tensor) -> float:
        recipe, done = self.recipe, len(self.losses)
        warm = max(1, round(recipe.warmup * recipe.steps))
        slow = min(1.0, (done + 1) / warm)
        fall = 0.5 + 0.5 * math.cos(math.pi * max(0, done - warm) / max(1, recipe.steps - warm))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate * slow * fall
        x = moved(x, recipe.shift, self.generator)
        extra: Tensor | float = 0.0
        if self.penalty is None:
            logits = self.model(x)
        else:
            logits, extra = self.penalty(self.model, x)
        loss = F.cross_entropy(logits, y.to(logits.device), label_smoothing=recipe.smoothing) + extra
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def _keep(self) -> None:
        if self.recipe.checkpoint is None:
            return
        from polyspan.io import save_fitted

        arrays = {f"model.{name}": value.detach().cpu().numpy() for name, value in self.model.state_dict().items()}
        for number, entry in self.optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer.{number}.{k}": torch.as_tensor(v).cpu().numpy() for k, v in entry.items()}
        arrays["generator"] = self.generator.get_state().numpy()
        arrays["order"] = self.order.numpy() if len(self.order) else np.array([-1])
        params = {"signature": self.recipe.signature, "losses": self.losses}
        save_fitted(self.recipe.checkpoint, kind=KIND, arrays=arrays, params=params)

    def _resume(self) -> None:
        path = self.recipe.checkpoint
        if path is None or not path.exists():
            return
        from polyspan.io import load_fitted

        found = load_fitted(path, kind=KIND)
        told, mine = found.params["signature"], self.recipe.signature
        differs = [name for name in {*mine, *told} if told.get(name) != mine.get(name)]
        if differs:
            raise ValueError(
                f"checkpoint {path} must belong to this fit, got another {sorted(differs)}; remove it to begin anew"
            )
        tensors = {name: torch.as_tensor(np.array(value)) for name, value in found.arrays.items()}
        own = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.model.load_state_dict(own)
        state = self.optimizer.state_dict()
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, part = name.split(".", 2)
                state["state"].setdefault(int(number), {})[part] = tensor
        self.optimizer.load_state_dict(state)
        self.generator.set_state(tensors["generator"])
        self.order = tensors["order"][tensors["order"] >= 0]
        self.losses = list(found.params["losses"])
