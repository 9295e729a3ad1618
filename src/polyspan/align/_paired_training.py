"""Training of a backward and a forward map on paired vectors of two frozen encoders."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from polyspan.linalg import nearest_isometry
from polyspan.run import Progress

HELD_ROWS = 2048
TERMS = ("forward", "backward", "contrast", "penalty")


class Maps(NamedTuple):
    """Backward ``x @ backward + shift``; forward ``h @ forward + forward_shift``, plus a hidden layer or None."""

    backward: Any
    shift: Any
    forward: Any
    forward_shift: Any
    hidden: Any
    hidden_shift: Any
    correction: Any

    def carry(self, x: Any) -> Any:
        return x @ self.backward + self.shift

    def lift(self, h: Any) -> Any:
        out = h @ self.forward + self.forward_shift
        if self.hidden is None:
            return out
        return out + F.gelu(h @ self.hidden + self.hidden_shift) @ self.correction


class Recipe(NamedTuple):
    """What is minimised and how; ``strict`` keeps the backward map an isometry, ``penalty`` None leaves that out."""

    weights: Sequence[float]
    temperature: float
    penalty: Callable[[Tensor], Tensor] | None
    deviation: Callable[[Tensor], Tensor]
    strict: bool
    shift: bool
    learning_rate: float
    max_iter: int
    batch_size: int
    device: Any
    verbose: bool


def gelu(x: np.ndarray) -> np.ndarray:
    """The exact GELU, as in training."""
    from scipy.special import erf

    return 0.5 * x * (1 + erf(x / np.sqrt(2).astype(x.dtype)))


def contrast(queries: Tensor, candidates: Tensor, same: Tensor, temperature: float) -> Tensor:
    """Cross-entropy from the softmax of cosines to the uniform choice among candidates of the query's kind.

    ``same`` (n_queries, n_candidates) is 1 where kinds agree; every query has one such candidate at least.
    """
    scores = _unit(queries) @ _unit(candidates).T / temperature
    return -((F.log_softmax(scores, dim=1) * same).sum(dim=1) / same.sum(dim=1)).mean()


def _unit(x: Tensor) -> Tensor:
    # Not F.normalize, whose gradient at a row of zeros is 1e12; lengths are near 1 here.
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-6)


def losses(maps: Maps, new: Tensor, placed: Tensor, old: Tensor, same: Tensor, temperature: float) -> list[Tensor]:
    """Forward, backward and contrastive term of one batch, unweighted; squared distances are summed over features."""
    adapted, lifted = maps.carry(new), maps.lift(old)
    return [
        (lifted - adapted).square().sum(dim=1).mean(),
        (adapted - placed).square().sum(dim=1).mean(),
        contrast(lifted, adapted, same, temperature) + contrast(lifted, placed, same, temperature),
    ]


def same_kind(codes: Tensor) -> Tensor:
    return (codes[:, None] == codes[None, :]).float()


def train(start: Maps, sides: Sequence[np.ndarray], codes: np.ndarray | None, recipe: Recipe, generator):
    """Train from ``start`` on new, placed and old rows; return float64 maps and the mean terms of every epoch.

    A loss that is no longer finite ends training, with a warning, and gives back the maps of the least loss so far.
    """
    if recipe.max_iter == 0:
        return start, []
    device = recipe.device
    new, placed, old = (torch.as_tensor(np.ascontiguousarray(s), dtype=torch.float32, device=device) for s in sides)
    kinds = torch.arange(len(new), device=device) if codes is None else torch.as_tensor(codes, device=device)
    maps = Maps(*(None if p is None else torch.as_tensor(p, dtype=torch.float32, device=device).clone() for p in start))
    frozen = {"hidden", "hidden_shift", "correction"} if maps.hidden is None else set()
    if not recipe.shift:
        frozen.add("shift")
    learnt = [p.requires_grad_() for name, p in zip(Maps._fields, maps, strict=True) if name not in frozen]
    optimiser = torch.optim.Adam(learnt, lr=recipe.learning_rate)
    best, least, history = _copied(maps), math.inf, []
    with Progress("training adapters", recipe.max_iter, enabled=recipe.verbose) as shown:
        for _ in range(recipe.max_iter):
            before = _copied(maps)
            sums, steps = torch.zeros(len(TERMS), device=device), 0
            for rows in torch.randperm(len(new), generator=generator).to(device).split(recipe.batch_size):
                sums += _step(maps, new[rows], placed[rows], old[rows], kinds[rows], recipe, optimiser)
                steps += 1
            terms = dict(zip(TERMS, (sums / steps).tolist(), strict=True))
            terms["deviation"] = float(recipe.deviation(maps.backward.detach()))
            if not all(map(math.isfinite, terms.values())):
                warnings.warn(
                    f"the loss is no longer finite after {len(history)} epochs; the best maps before are kept; try a "
                    "smaller learning_rate",
                    stacklevel=4,
                )
                maps = best
                break
            history.append(terms)
            total = _total(recipe, terms)
            if total <= least:
                best, least = before, total  # the losses of an epoch are those of the maps that it began with
            shown.advance(**terms)
    found = Maps(*(None if p is None else p.detach().double().cpu().numpy() for p in maps))
    if maps.hidden is None:
        found = found._replace(hidden_shift=start.hidden_shift, correction=start.correction)
    return (found._replace(backward=nearest_isometry(found.backward)) if recipe.strict else found), history


def _step(maps: Maps, new, placed, old, kinds, recipe: Recipe, optimiser) -> Tensor:
    """Take one step and return the terms before it."""
    W = maps.backward
    terms = losses(maps, new, placed, old, same_kind(kinds), recipe.temperature)
    terms.append(W.new_zeros(()) if recipe.penalty is None else recipe.penalty(W))
    optimiser.zero_grad(set_to_none=True)
    total = terms[-1]
    for weight, term in zip(recipe.weights, terms, strict=False):
        total = total + weight * term
    total.backward()
    if recipe.strict:
        before = W.detach().clone()
    optimiser.step()
    if recipe.strict:
        with torch.no_grad():
            W.copy_(_onto_isometries(before, W))
    return torch.stack(terms).detach()


@torch.no_grad()
def _onto_isometries(before: Tensor, after: Tensor) -> Tensor:
    """Step from an isometry to the isometry near where Adam went, by matrix products only.

    A step of length 0.5 at most leaves singular values in [0.5, 1.5], from where five Newton-Schulz steps reach 1 to
    single precision; the first guess needs no norm, and nothing waits for an accelerator.
    """
    step = after - before
    X = before + step * (0.5 / torch.linalg.matrix_norm(step).clamp(min=0.5))
    X = X if X.shape[0] >= X.shape[1] else X.T
    for _ in range(5):
        X = 1.5 * X - 0.5 * (X @ (X.T @ X))
    return X if after.shape[0] >= after.shape[1] else X.T


def _total(recipe: Recipe, terms: Mapping[str, float]) -> float:
    weights = dict(zip(TERMS, (*recipe.weights, 1.0), strict=True))
    return sum(weight * terms[name] for name, weight in weights.items())


def _copied(maps: Maps) -> Maps:
    return Maps(*(None if p is None else p.detach().clone() for p in maps))


@torch.no_grad()
def held_out_loss(maps: Maps, sides: Sequence[np.ndarray], codes: np.ndarray | None, recipe: Recipe) -> float:
    """Return the loss without penalty on other rows, of which 2,048 at most are looked at."""
    wide = Maps(*(None if p is None else torch.as_tensor(p) for p in maps))
    rows = [torch.as_tensor(np.ascontiguousarray(side[:HELD_ROWS]), dtype=torch.float64) for side in sides]
    kinds = torch.arange(len(rows[0])) if codes is None else torch.as_tensor(codes[:HELD_ROWS])
    terms = losses(wide, *rows, same_kind(kinds).double(), recipe.temperature)
    return float(sum(weight * term for weight, term in zip(recipe.weights, terms, strict=True)))
