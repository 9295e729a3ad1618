"""The network that lifts old vectors to new ones, its training, and its layers with batch norm folded in."""

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyspan.errors import NotConverged
from polyspan.run import Progress, layers_draw_from

from ._compatible_fit import Recipe, batches, factor, multilayer_perceptron

BRANCHES = ("old", "side", "mixer")
LEAST_LOG = -12.0
"""Bound on the logarithm of the loss expected of an item: without one, items fitted exactly weigh infinitely."""

Layers = dict[str, list[tuple[np.ndarray, np.ndarray]]]


class Lessons(NamedTuple):
    """What the network is to learn, one row an item; ``labels`` and ``head``, the new classifier's, or None."""

    old: np.ndarray
    side: np.ndarray
    new: np.ndarray
    labels: np.ndarray | None
    head: tuple[np.ndarray, np.ndarray] | None


class ForwardNetwork(nn.Module):
    """Two branches of two layers, for old vectors and for side-information, and a mixer of three on both together.

    Every layer but the last is linear without bias, then batch norm and ReLU. Widths: d to 2d to 2n for the old branch,
    s to 2s to 2n for the other, 4n to ``inner`` to ``inner`` to ``n_out`` for the mixer.
    """

    def __init__(self, d_old: int, d_side: int, d_new: int, inner: int, n_out: int):
        super().__init__()
        self.old = multilayer_perceptron(d_old, (2 * d_old, 2 * d_new))
        self.side = multilayer_perceptron(d_side, (2 * d_side, 2 * d_new))
        self.mixer = multilayer_perceptron(4 * d_new, (inner, inner)).append(nn.Linear(inner, n_out))

    def forward(self, old: Tensor, side: Tensor) -> Tensor:
        return self.mixer(torch.cat([self.old(old), self.side(side)], dim=1))


def fastfill_terms(out: Tensor, new: Tensor, labels: Tensor | None, head: Any, weight: float) -> dict[str, Tensor]:
    """Squared distance, cross-entropy of the new classifier, and both as a likelihood, (batch,) each.

    ``out`` (batch, n + 1) holds lifted vectors and, last, the logarithm s of the loss l that is expected of the item;
    the likelihood's term is :math:`(l e^{-s} + s) / 2`, least where s is the logarithm of the mean of l.
    """
    lifted, log_loss = out[:, :-1], out[:, -1].clamp(min=LEAST_LOG)
    terms = {"distance": (lifted - new).square().sum(dim=1)}
    terms["classes"] = torch.zeros_like(terms["distance"])
    if labels is not None and head is not None:
        terms["classes"] = F.cross_entropy(lifted @ head[0].T + head[1], labels, reduction="none")
    alike = terms["distance"] + weight * terms["classes"]
    return terms | {"total": 0.5 * (alike * torch.exp(-log_loss) + log_loss)}


def train_forward(
    network: ForwardNetwork, lessons: Lessons, weight: float | None, recipe: Recipe, generator: torch.Generator, device
) -> list[dict[str, float]]:
    """Train in place and return the mean terms of every epoch; ``weight`` None leaves only the mean squared error.

    From half of the epochs on, batch norm keeps its statistics, as at inference. A loss that is not finite ends
    training, with a warning, and gives back the weights that the last finite epoch began with: its losses were theirs.

    Raises
    ------
    NotConverged
        There is no such epoch but the first, which began by chance.
    """

    def tensor(a: np.ndarray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(a), dtype=torch.float32, device=device)

    old, side, new = (tensor(part) for part in lessons[:3])
    labels = None if lessons.labels is None else torch.as_tensor(lessons.labels, device=device)
    head = None if lessons.head is None else tuple(tensor(part) for part in lessons.head)
    network.to(device)
    optimiser = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    per_epoch = len(batches(len(old), recipe.batch_size, torch.Generator().manual_seed(0)))
    history: list[dict[str, float]] = []
    began = copy.deepcopy(network.state_dict())
    with Progress("training a forward map", recipe.max_iter, enabled=recipe.verbose) as shown:
        for epoch in range(recipe.max_iter):
            network.train(epoch < recipe.max_iter / 2)
            kept = copy.deepcopy(network.state_dict())
            sums: dict[str, Tensor] = {}
            for i, chosen in enumerate(batches(len(old), recipe.batch_size, generator)):
                rows = chosen.to(device)
                for group in optimiser.param_groups:
                    group["lr"] = recipe.learning_rate * factor(epoch * per_epoch + i, per_epoch, recipe)
                out = network(old[rows], side[rows])
                if weight is None:
                    terms = {"total": F.mse_loss(out, new[rows])}
                else:
                    marks = None if labels is None else labels[rows]
                    found = fastfill_terms(out, new[rows], marks, head, weight)
                    terms = {name: term.mean() for name, term in found.items()}
                optimiser.zero_grad(set_to_none=True)
                terms["total"].backward()
                optimiser.step()
                sums = {name: sums.get(name, 0) + term.detach() for name, term in terms.items()}
            means = {name: float(value) / per_epoch for name, value in sums.items()}
            if not all(map(math.isfinite, means.values())):
                network.load_state_dict(began)
                _stopped(len(history), recipe.learning_rate)
                break
            history.append(means)
            began = kept
            shown.advance(1, **means)
    network.cpu().eval()
    return history


def _stopped(n_epochs: int, learning_rate: float) -> None:
    text = f"the loss is no longer finite after {n_epochs} epochs; try a learning_rate below {learning_rate:g}"
    if n_epochs < 2:
        raise NotConverged(text)
    warnings.warn(text + "; the weights before the last of them are kept", stacklevel=5)


def new_network(
    d_old: int, d_side: int, d_new: int, inner: int, n_out: int, generator: torch.Generator
) -> ForwardNetwork:
    """Draw a network from a generator."""
    with layers_draw_from(generator):
        return ForwardNetwork(d_old, d_side, d_new, inner, n_out)


@torch.no_grad()
def folded(network: ForwardNetwork) -> Layers:
    """Return weights (in, out) and bias (out,) of every layer, float64, with the statistics of batch norm in them."""
    return {branch: _folded(list(getattr(network, branch))) for branch in BRANCHES}


def _folded(parts: Sequence[nn.Module]) -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for i, part in enumerate(parts):
        if not isinstance(part, nn.Linear):
            continue
        W = part.weight.double().numpy().T.copy()
        if part.bias is not None:
            found.append((W, part.bias.double().numpy().copy()))
            continue
        norm: Any = parts[i + 1]
        gain = (norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)).numpy()
        found.append((W * gain, norm.bias.double().numpy() - norm.running_mean.double().numpy() * gain))
    return found


def run_layers(layers: Layers, old: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Apply folded layers to rows, in their float width."""
    inner = [_hidden(layers["old"], old), _hidden(layers["side"], side)]
    mixed = _hidden(layers["mixer"][:-1], np.concatenate(inner, axis=1))
    W, b = layers["mixer"][-1]
    return mixed @ W.astype(mixed.dtype) + b.astype(mixed.dtype)


def _hidden(layers: Sequence[tuple[np.ndarray, np.ndarray]], rows: np.ndarray) -> np.ndarray:
    for W, b in layers:
        rows = np.maximum(rows @ W.astype(rows.dtype) + b.astype(rows.dtype), 0)
    return rows
