"""What a layer of experts becomes: merged or kept experts, their numbers, and how they take their place."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ._expert_capture import LayerInputs
from ._expert_combining import LowRank
from ._expert_layout import (
    ExpertLayer,
    ExpertStack,
    expert_modules,
    linear_names,
    put_module,
    reduced_router,
    set_router,
)
from ._expert_statistics import ExpertStatistics, compute_dtype, token_blocks
from .merged_experts import MergedExperts


class MergedLayer(NamedTuple):
    """What became of one layer.

    Attributes
    ----------
    name : str
        Of the experts' module.
    n_experts, n_kept : int
        Before and after.
    groups : list of int
        The group of each expert; -1 where it was dropped.
    frequencies : list of float
        Share of the calibration tokens that chose each expert.
    similarity : float
        Mean cosine of the outputs of two experts.
    parameters, parameters_after : int
        Of the experts.
    bytes, bytes_after : int
    error : float
        Of the layer's routed output on the calibration tokens: squared distance over squared size. NaN where experts
        were dropped, as tokens are then routed anew.
    """

    name: str
    n_experts: int
    n_kept: int
    groups: list[int]
    frequencies: list[float]
    similarity: float
    parameters: int
    parameters_after: int
    bytes: int
    bytes_after: int
    error: float


class Outcome(NamedTuple):
    """The k experts of a layer, their factors where truncated, and the group of each of n experts, -1 for dropped.

    ``reduced``: rows of the router are averaged in each group, where they would stay as they are otherwise.
    """

    stack: ExpertStack
    factors: LowRank | None
    groups: np.ndarray
    reduced: bool = False

    @property
    def dropped(self) -> bool:
        return bool((self.groups < 0).any())

    def map(self, function: Callable[[Tensor], Tensor]) -> "Outcome":
        factors = self.factors
        if factors is not None:
            factors = LowRank(*({name: function(part) for name, part in side.items()} for side in factors))
        return self._replace(stack=self.stack.map(function), factors=factors)

    @property
    def numel(self) -> int:
        if self.factors is None:
            return self.stack.numel
        biases = sum(part.numel() for name, part in self.stack.parts.items() if name.endswith("bias"))
        return biases + sum(part.numel() for side in self.factors for part in side.values())

    def router_rows(self) -> Tensor:
        """Return (k, n): the mean of the router's rows in each group, or the rows that are kept."""
        rows = (torch.from_numpy(self.groups) == torch.arange(len(self.stack)).unsqueeze(1)).double()
        return rows / rows.sum(1, keepdim=True)


def wide_stack(layer: ExpertLayer) -> ExpertStack:
    """Return a layer's experts in float32 or wider."""
    stack = layer.stack()
    return stack.map(lambda part: part.to(compute_dtype(part.dtype)))


def narrowed(outcome: Outcome, dtype: torch.dtype) -> Outcome:
    """Return an outcome in the dtype of the model's experts; float32 that came from it goes back bit for bit."""
    return outcome.map(lambda part: part.to(dtype))


def in_bytes(report: MergedLayer, dtype: torch.dtype) -> MergedLayer:
    return report._replace(
        bytes=report.parameters * dtype.itemsize, bytes_after=report.parameters_after * dtype.itemsize
    )


@torch.no_grad()
def layer_report(
    name: str,
    stack: ExpertStack,
    outcome: Outcome,
    statistics: ExpertStatistics,
    inputs: LayerInputs,
    batch_tokens: int | None = None,
) -> MergedLayer:
    """Measure the error of a layer's routed output, and put its numbers together."""
    error, size = 0.0, 0.0
    if not outcome.dropped:
        members = torch.from_numpy(outcome.groups).to(stack.up.device)
        for x, gates in token_blocks(inputs, stack, batch_tokens):
            whole = torch.einsum("mn,nmh->mh", gates, stack.outputs(x))
            summed = torch.zeros(len(x), len(outcome.stack), dtype=x.dtype, device=x.device).index_add_(
                1, members, gates
            )
            merged = torch.einsum("mn,nmh->mh", summed, outcome.stack.outputs(x))
            error += float((whole - merged).square().sum(dtype=torch.float64))
            size += float(whole.square().sum(dtype=torch.float64))
    gram, n = statistics.gram, len(stack)
    similar = float((gram.sum() - np.trace(gram)) / (n * (n - 1)))
    return MergedLayer(
        name, n, len(outcome.stack), outcome.groups.tolist(), statistics.frequencies.tolist(), similar, stack.numel,
        outcome.numel, 0, 0, float("nan") if outcome.dropped else error / (size or 1.0),
    )  # fmt: skip


def install(model: nn.Module, layer: ExpertLayer, outcome: Outcome) -> None:
    """Put merged or kept experts in a layer's place; rows of the router follow where experts were dropped."""
    groups = outcome.groups
    if outcome.dropped or outcome.reduced:
        set_router(layer, reduced_router(layer, outcome.router_rows()))
        groups = np.arange(len(outcome.stack))
    if layer.fused:
        put_module(model, layer.name, MergedExperts.from_stack(outcome.stack, groups.tolist(), outcome.factors))
        return
    assert isinstance(layer.experts, nn.ModuleList)
    made = expert_modules(outcome.stack, layer.experts[0])
    if outcome.factors is not None:
        for i, expert in enumerate(made):
            _factor(expert, outcome.factors, i)
    # The block's own loop runs over n places; members of a group share one module.
    put_module(model, layer.name, nn.ModuleList(made[group] for group in groups))


def _factor(expert: nn.Module, factors: LowRank, i: int) -> None:
    names = linear_names(expert)
    assert names is not None
    for role, name in zip(("gate", "up", "down")[3 - len(names) :], names, strict=True):
        left, right = factors.left[role][i], factors.right[role][i]
        bias = getattr(expert, name).bias
        pair = nn.Sequential(
            nn.Linear(right.shape[1], len(right), bias=False, device="meta"),
            nn.Linear(left.shape[1], len(left), bias=bias is not None, device="meta"),
        )
        state = {"0.weight": right.contiguous(), "1.weight": left.contiguous()}
        if bias is not None:
            state["1.bias"] = bias.detach()
        pair.load_state_dict(state, assign=True)
        setattr(expert, name, pair)
