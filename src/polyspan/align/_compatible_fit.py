"""Training loop of compatible encoders: warm-up, cosine decay, a checkpoint an epoch, and a stop at a loss of NaN."""

import copy
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from polyspan.errors import NotConverged
from polyspan.io import load_fitted, remove_file, save_fitted
from polyspan.run import Progress, layers_draw_from

PREDICT_ROWS = 4096
KIND = "CompatibleTraining"


class Recipe(NamedTuple):
    """How to train; ``warmup`` counts epochs, ``precision`` is that of the forward pass."""

    learning_rate: float
    weight_decay: float
    max_iter: int
    warmup: float
    batch_size: int
    precision: str
    checkpoint: Path | None
    verbose: bool


class Encoder(nn.Module):
    """Backbone and head, which are trained together."""

    head: Any

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor):
        return self.head(self.backbone(x))

    def embed(self, x: Tensor) -> Tensor:
        return self.head.embed(self.backbone(x))

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)).logits


def multilayer_perceptron(n_features: int, hidden: Sequence[int]) -> nn.Sequential:
    """Linear, batch norm and ReLU a hidden layer; call it inside :func:`polyspan.run.layers_draw_from`."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(n_features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        n_features = width
    return nn.Sequential(*layers)


@torch.no_grad()
def output_width(backbone: nn.Module, row: Tensor) -> int:
    """Width of what a backbone makes of one row, which must be a vector."""
    was = backbone.training
    out = backbone.eval()(row)
    backbone.train(was)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(row):
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"backbone must turn (n, {row.shape[1]}) into (n, features), got {found} from one row")
    return out.shape[1]


def batches(n: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Shuffled rows; a last batch of one row, with which batch norm cannot do, joins the one before."""
    parts = list(torch.randperm(n, generator=generator).split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def factor(step: int, per_epoch: int, recipe: Recipe) -> float:
    """Learning rate as a share of the whole: linear from near 0, then half a cosine to 0."""
    warm, total = recipe.warmup * per_epoch, recipe.max_iter * per_epoch
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def train(
    encoder: Encoder,
    loss: nn.Module,
    rows: np.ndarray,
    labels: np.ndarray,
    recipe: Recipe,
    generator: torch.Generator,
    fingerprint: str,
    beside: Sequence[np.ndarray] = (),
) -> list[dict[str, float]]:
    """Train in place and return the mean terms of every epoch; with a checkpoint, go on after the last one written.

    ``loss`` is called with the encoder's output, the labels, and the batch's rows of what stands ``beside``. A loss
    that is not finite ends training at the epoch before, with a warning.

    Raises
    ------
    NotConverged
        The first epoch already gave a loss that is not finite.
    """
    device = next(encoder.parameters()).device
    optimiser = torch.optim.Adam(encoder.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    history = _resume(encoder, optimiser, recipe, generator, fingerprint)
    targets = torch.as_tensor(labels, device=device)
    others = [torch.as_tensor(part, dtype=torch.float32, device=device) for part in beside]
    per_epoch = len(batches(len(rows), recipe.batch_size, torch.Generator().manual_seed(0)))
    half = recipe.precision == "bfloat16"
    encoder.train()
    with (
        Progress("training a compatible encoder", recipe.max_iter, enabled=recipe.verbose) as shown,
        layers_draw_from(generator, device),
    ):
        shown.advance(len(history))
        for epoch in range(len(history), recipe.max_iter):
            kept = copy.deepcopy(encoder.state_dict())
            sums: dict[str, Any] = {}
            # The global generator is ours here.
            for i, chosen in enumerate(batches(len(rows), recipe.batch_size, torch.default_generator)):
                for group in optimiser.param_groups:
                    group["lr"] = recipe.learning_rate * factor(epoch * per_epoch + i, per_epoch, recipe)
                x, own = torch.as_tensor(rows[chosen.numpy()], dtype=torch.float32).to(device), chosen.to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    terms = loss(encoder(x), targets[own], *(part[own] for part in others))
                optimiser.zero_grad(set_to_none=True)
                terms["total"].backward()
                optimiser.step()
                encoder.head.retract_()
                sums = {name: sums.get(name, 0) + term.detach().float() for name, term in terms.items()}
            means = {name: float(value) / per_epoch for name, value in sums.items()}
            if not all(map(math.isfinite, means.values())):
                encoder.load_state_dict(kept)
                _stopped(len(history), recipe.learning_rate)
                break
            history.append(means)
            _keep(encoder, optimiser, recipe, history, fingerprint)
            shown.advance(1, **means)
    if recipe.checkpoint is not None:
        remove_file(recipe.checkpoint)
    return history


def _stopped(n_epochs: int, learning_rate: float) -> None:
    text = f"the loss is no longer finite after {n_epochs} epochs; try a learning_rate below {learning_rate:g}"
    if n_epochs == 0:
        raise NotConverged(text)
    warnings.warn(text + "; the weights of the epoch before are kept", stacklevel=5)


def _keep(encoder: Encoder, optimiser: Any, recipe: Recipe, history: list, fingerprint: str) -> None:
    """Write what is needed to go on: weights, Adam's moments and the state of chance."""
    if recipe.checkpoint is None:
        return
    arrays = {f"encoder.{name}": tensor.cpu() for name, tensor in encoder.state_dict().items()}
    state = optimiser.state_dict()["state"]
    arrays |= {f"adam.{i}.{name}": value.cpu() for i, found in state.items() for name, value in found.items()}
    arrays["chance"] = torch.random.get_rng_state()
    save_fitted(recipe.checkpoint, kind=KIND, arrays=arrays, params={"history": history, "of": fingerprint})


def _resume(encoder: Encoder, optimiser: Any, recipe: Recipe, generator: torch.Generator, fingerprint: str) -> list:
    if recipe.checkpoint is None or not recipe.checkpoint.exists():
        return []
    found = load_fitted(recipe.checkpoint, kind=KIND)
    if found.params["of"] != fingerprint:
        raise ValueError(
            f"checkpoint must be of this data and these settings, got {recipe.checkpoint} of another training; "
            "remove it or name another file"
        )
    arrays = {name: torch.as_tensor(np.array(value)) for name, value in found.arrays.items()}
    encoder.load_state_dict({name[8:]: value for name, value in arrays.items() if name.startswith("encoder.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in arrays.items():
        if name.startswith("adam."):
            _, index, what = name.split(".")
            moments.setdefault(int(index), {})[what] = value
    state = optimiser.state_dict()
    state["state"] = moments
    optimiser.load_state_dict(state)
    generator.set_state(arrays["chance"])
    return list(found.params["history"])


@torch.no_grad()
def run_rows(encoder: Encoder, rows: np.ndarray, method: str) -> np.ndarray:
    """Apply a method of the encoder by blocks of rows, in eval mode and in the float width of the rows."""
    wide = rows.dtype == np.float64
    device = next(encoder.parameters()).device
    call = getattr((copy.deepcopy(encoder).double() if wide else encoder).eval(), method)
    done = [
        call(torch.tensor(rows[start : start + PREDICT_ROWS], device=device)).cpu().numpy()
        for start in range(0, len(rows), PREDICT_ROWS)
    ]
    return np.concatenate(done)
