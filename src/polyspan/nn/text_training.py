"""Train language models to predict the next token of a text, and score them; any model from ids to logits."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyspan.errors import NotConverged
from polyspan.run import progress

CHECKED = 50
"""After how many updates losses are looked at, which an accelerator has to be waited for."""


def train_next_token(
    model: nn.Module,
    ids: Tensor,
    *,
    steps: int,
    length: int = 128,
    batch_size: int = 8,
    learning_rate: float | int = 3e-3,
    warmup: int = 50,
    weight_decay: float | int = 0.01,
    clip: float | int = 1.0,
    stride: int = 1,
    counted: Tensor | None = None,
    penalty: Callable[[Any], Tensor] | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[int, float], Any] | None = None,
) -> list[float]:
    """Train on pieces drawn from a text with AdamW, a linear warm-up, a cosine to zero and clipped gradients.

    Models that are given the same text and generator seed see the same pieces in the same order.

    Parameters
    ----------
    model : nn.Module
        From ids (b, t) to logits (b, t, vocabulary), alone or as the ``logits`` of what a transformers model returns.
    ids : Tensor of shape (n,), integers
    steps : int
        How many updates.
    length : int, default=128
        Tokens predicted a piece.
    batch_size : int, default=8
        Pieces an update.
    learning_rate : float, default=3e-3
        At its peak, after ``warmup`` updates.
    weight_decay : float, default=0.01
        Of weights with two or more dimensions.
    clip : float, default=1.0
        Largest norm of the gradient.
    stride : int, default=1
        Pieces begin at multiples of it.
    counted : Tensor of shape (n,), bool, optional
        Which tokens are to be predicted; all where not given.
    penalty : callable, optional
        Given what the model returned, a number to add to the loss of each update.
    generator : torch.Generator, optional
        Chooses the pieces; torch's global one where not given.
    on_step : callable, optional
        Called with the number of updates made and the loss of the last.

    Returns
    -------
    list of float
        Loss of each update, nats a token.

    Raises
    ------
    ValueError
        An argument is out of range, or the text is shorter than one piece.
    NotConverged
        The loss is no longer finite; it is looked at every 50 updates and at the end.
    """
    _check_text(ids, length, counted)
    if steps < 1 or batch_size < 1 or stride < 1 or warmup < 0:
        raise ValueError(
            "steps, batch_size and stride must be at least 1 and warmup at least 0, "
            f"got {steps}, {batch_size}, {stride} and {warmup}"
        )
    for name, value, least in (
        ("learning_rate", learning_rate, "positive"),
        ("weight_decay", weight_decay, "at least 0"),
    ):
        if not 0 <= value < math.inf or (value == 0 and least == "positive"):
            raise ValueError(f"{name} must be {least} and finite, got {value}")
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        fused=ids.device.type in ("cpu", "cuda"),
    )

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    pieces = (len(ids) - length - 1) // stride + 1
    places = torch.arange(length + 1, device=ids.device)
    losses = []
    model.train()
    for step in progress(range(steps), label="training"):
        starts = stride * torch.randint(pieces, (batch_size, 1), generator=generator).to(ids.device)
        rows = starts + places
        piece = ids[rows].long()
        out = model(piece[:, :-1])
        loss = _loss(out, piece, None if counted is None else counted[rows], "mean")
        if penalty is not None:
            loss = loss + penalty(out)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        schedule.step()
        losses.append(loss.detach())
        if on_step is not None:
            on_step(step + 1, float(losses[-1]))
        if (step + 1) % CHECKED == 0 or step + 1 == steps:
            _check_finite(losses)
    model.eval()
    return torch.stack(losses).tolist()


@torch.no_grad()
def score_next_token(
    model: nn.Module, ids: Tensor, *, length: int = 128, batch_size: int = 32, counted: Tensor | None = None
) -> float:
    """Return the mean cross-entropy, nats a token, over consecutive pieces of a text.

    A piece does not see the one before, and what is left at the end, too short for a piece, is not scored.

    Parameters
    ----------
    model, ids, length, counted
        As of :func:`train_next_token`.
    batch_size : int, default=32

    Raises
    ------
    ValueError
        The text is shorter than one piece, no token in it counts, or ``batch_size`` is below 1.
    """
    _check_text(ids, length, counted)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    was_training = model.training
    model.eval()
    starts = torch.arange(0, len(ids) - length, length, device=ids.device)
    places = torch.arange(length + 1, device=ids.device)
    total, number = 0.0, 0
    for part in starts.split(batch_size):
        rows = part.unsqueeze(1) + places
        marks = None if counted is None else counted[rows]
        piece = ids[rows].long()
        total += float(_loss(model(piece[:, :-1]), piece, marks, "sum"))
        number += part.numel() * length if marks is None else int(marks[:, 1:].sum())
    model.train(was_training)
    if not number:
        raise ValueError("counted must be True somewhere in the pieces, got none")
    return total / number


def _loss(out: Any, ids: Tensor, counted: Tensor | None, reduction: str) -> Tensor:
    logits = getattr(out, "logits", out).flatten(0, 1).float()
    targets = ids[:, 1:].flatten()
    if counted is not None:
        targets = torch.where(counted[:, 1:].flatten(), targets, -100)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    if reduction == "sum":
        return loss
    return loss / (targets.numel() if counted is None else counted[:, 1:].sum().clamp(min=1))


def _check_finite(losses: list[Tensor]) -> None:
    bad = ~torch.stack(losses[-CHECKED:]).isfinite()
    if bool(bad.any()):
        first = len(losses) - len(bad) + int(bad.int().argmax()) + 1
        raise NotConverged(f"the loss is no longer finite after {first} updates; lower learning_rate")


def _check_text(ids: Tensor, length: int, counted: Tensor | None) -> None:
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be one row of integers, got shape {tuple(ids.shape)} of {ids.dtype}")
    if length < 1 or len(ids) <= length:
        raise ValueError(f"length must be at least 1 and below the {len(ids)} tokens of the text, got {length}")
    if counted is not None and counted.shape != ids.shape:
        raise ValueError(f"counted must have shape {tuple(ids.shape)}, got {tuple(counted.shape)}")
    if counted is not None and counted.dtype != torch.bool:
        raise ValueError(f"counted must be bool, got {counted.dtype}")
