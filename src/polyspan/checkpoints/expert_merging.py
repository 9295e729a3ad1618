"""Merge the experts of a mixture-of-experts model into fewer, without training, on unlabelled calibration texts."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from polyspan.run import progress, spawn_seeds

from ._expert_capture import LayerInputs, capture_inputs, token_batches
from ._expert_combining import LowRank, join_groups, merge_group
from ._expert_groups import (
    ALLOCATIONS,
    CLUSTERINGS,
    SIMILARITIES,
    allocate,
    group_experts,
    most_used,
    similarity_matrix,
    windows,
    within_groups,
)
from ._expert_layout import (
    ExpertLayer,
    ExpertStack,
    check_reducible,
    expert_modules,
    find_expert_layers,
    linear_names,
    put_module,
    reduced_router,
    set_router,
)
from ._expert_statistics import ExpertStatistics, compute_dtype, expert_statistics, token_blocks

COMBINES = ("average", "keep")
ALIGNS = (None, "permutation", "activation")
REFITS = (None, "down", "regmean")
PRUNINGS = (None, "frequency", "output_norm", "reap")
PUBLISHED: dict[str, Any] = {"clustering": "kmeans", "similarity": "output", "combine": "average"}
RECOMMENDED: dict[str, Any] = {**PUBLISHED, "align": "permutation", "refit": "down"}
#: Other ways to the same number of experts, by name: settings of :class:`ExpertMerger`.
RIVALS: dict[str, dict[str, Any]] = {
    "frequency pruning": {"pruning": "frequency"},
    "output-norm pruning": {"pruning": "output_norm"},
    "REAP": {"pruning": "reap"},
    "HC-SMoE": {"clustering": "hierarchical", "similarity": "mean_output"},
    "MC-SMoE": {"clustering": "dominant", "similarity": "router"},
    "random groups": {"clustering": "random"},
    "keep": {"combine": "keep"},
    "published": PUBLISHED,
    "recommended": RECOMMENDED,
}


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


class ExpertMergeReport(NamedTuple):
    """What :meth:`ExpertMerger.fit` found, by layer.

    Attributes
    ----------
    layers : list of MergedLayer
    """

    layers: list[MergedLayer]

    @property
    def parameters(self) -> int:
        """Parameters of the experts before."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def parameters_after(self) -> int:
        """Parameters of the experts after."""
        return sum(layer.parameters_after for layer in self.layers)


class ExpertCalibration(NamedTuple):
    """What calibration tokens tell of a model's experts, by layer: gathered once, for any number of mergers.

    Attributes
    ----------
    inputs : dict of str to LayerInputs
        Tokens (m, H) that reach each layer, and the weight (m, n) of each expert.
    statistics : dict of str to ExpertStatistics
    """

    inputs: dict[str, LayerInputs]
    statistics: dict[str, ExpertStatistics]


def calibrate_experts(
    model: nn.Module, batches: Any, *, batch_tokens: int | None = None, verbose: bool = False
) -> ExpertCalibration:
    """Run a model on calibration tokens, and every expert on every token that reaches its layer.

    Source: catalogue entry ``sub-moe``.

    Parameters
    ----------
    model, batches
        As of :meth:`ExpertMerger.fit`, which takes the result in the place of batches.
    batch_tokens : int, optional
        Tokens a block; where not given, a block takes about 16 MiB (512 on a GPU).

    Raises
    ------
    ValueError
        The model has no experts, or quantised ones; activations are not finite.
    """
    layers = find_expert_layers(model)
    capture = capture_inputs(model, layers, token_batches(batches))
    inputs = {layer.name: capture.take(layer.name) for layer in layers}
    statistics = {}
    for layer in progress(layers, label="experts' outputs", enabled=verbose):
        stack = wide_stack(layer)
        statistics[layer.name] = expert_statistics(
            stack, inputs[layer.name], layer.router_weight, batch_tokens=batch_tokens
        )
    return ExpertCalibration(inputs, statistics)


class MergedExperts(nn.Module):
    r"""Fewer experts behind the router of more: token weights :math:`G_i` of a group's members are added.

    Takes the place of an experts module of transformers, ``forward(hidden_states, top_k_index, top_k_weights)``, and
    gives :math:`\sum_g (\sum_{i\in g} G_i(x)) E_g(x)`. The router stays as it was, so routing is exact.
    Source: catalogue entry ``sub-moe``.

    Parameters
    ----------
    num_experts : int
        n, that the router knows.
    num_groups : int
        k experts that there are.
    hidden_size, intermediate_size : int
    activation : callable
        ``activation(gate, up)`` of two tensors (..., I); SwiGLU where not given.
    gated : bool
        Whether experts have a gate; ``activation`` gets None for it otherwise.
    bias : bool
        Whether the maps have biases.
    ranks : mapping of str to int, optional
        Of "gate", "up" and "down", where maps are kept as two factors.
    """

    def __init__(
        self,
        num_experts: int,
        num_groups: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Callable[[Tensor | None, Tensor], Tensor] | None = None,
        gated: bool = True,
        bias: bool = False,
        ranks: Mapping[str, int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 1 <= num_groups <= num_experts:
            raise ValueError(f"num_groups must be between 1 and num_experts={num_experts}, got {num_groups}")
        self.num_experts, self.num_groups = num_experts, num_groups
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.gated, self.bias, self.ranks = gated, bias, None if ranks is None else dict(ranks)
        self.activation = swiglu if activation is None else activation
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.maps = ("gate", "up", "down") if gated else ("up", "down")
        for name in self.maps:
            out, fan_in = (hidden_size, intermediate_size) if name == "down" else (intermediate_size, hidden_size)
            if ranks is None:
                self.register_parameter(name, nn.Parameter(torch.empty(num_groups, out, fan_in, **factory)))
            else:
                self.register_parameter(
                    f"{name}_left", nn.Parameter(torch.empty(num_groups, out, ranks[name], **factory))
                )
                self.register_parameter(
                    f"{name}_right", nn.Parameter(torch.empty(num_groups, ranks[name], fan_in, **factory))
                )
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(num_groups, out, **factory)))
        self.register_buffer("groups", torch.arange(num_experts, device=device) % num_groups)
        self.groups: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim == 3:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            else:
                nn.init.zeros_(parameter)

    @classmethod
    def from_stack(
        cls,
        stack: ExpertStack,
        groups: Sequence[int],
        factors: LowRank | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> "MergedExperts":
        """Make the module of a stack of k experts, and of the factors of its maps where they are kept as such."""
        parts = {k: v for k, v in stack.parts.items() if factors is None or k.endswith("bias")}
        if factors is not None:
            parts |= {
                f"{name}_{side}": part
                for side, held in zip(("left", "right"), factors, strict=True)
                for name, part in held.items()
            }
        made = cls(
            len(groups), len(stack), stack.down.shape[1], stack.up.shape[1], activation=stack.activation,
            gated=stack.gate is not None, bias=stack.down_bias is not None, device="meta",
            ranks=None if factors is None else {name: left.shape[-1] for name, left in factors.left.items()},
        )  # fmt: skip
        state = {name: part.to(dtype or part.dtype).contiguous() for name, part in parts.items()}
        state["groups"] = torch.as_tensor(groups, dtype=torch.long, device=stack.up.device)
        made.load_state_dict(state, assign=True)
        return made

    def stack(self) -> ExpertStack:
        """Return the k experts as a stack; factors are multiplied out."""
        parts: dict[str, Any] = {"gate": None, **{name: self._weight(name) for name in self.maps}}
        if self.bias:
            parts |= {f"{name}_bias": getattr(self, f"{name}_bias").detach() for name in self.maps}
        return ExpertStack(activation=self.activation, **parts)

    def _weight(self, name: str) -> Tensor:
        if self.ranks is None:
            return getattr(self, name).detach()
        return (getattr(self, f"{name}_left") @ getattr(self, f"{name}_right")).detach()

    def _apply_map(self, name: str, group: int, x: Tensor) -> Tensor:
        bias = getattr(self, f"{name}_bias")[group] if self.bias else None
        if self.ranks is None:
            return nn.functional.linear(x, getattr(self, name)[group], bias)
        inner = nn.functional.linear(x, getattr(self, f"{name}_right")[group])
        return nn.functional.linear(inner, getattr(self, f"{name}_left")[group], bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sums (m, H) of the groups' outputs for tokens (m, H)."""
        places = self.groups[top_k_index]
        chosen = torch.zeros(len(places), self.num_groups, dtype=torch.bool, device=places.device)
        chosen.scatter_(1, places, True)
        # Routers may give float32 to a wider model: sums of weights are to be as wide as sums of outputs would be.
        wide = torch.promote_types(top_k_weights.dtype, hidden_states.dtype)
        weights = torch.zeros(chosen.shape, dtype=wide, device=places.device)
        weights = weights.scatter_add(1, places, top_k_weights.to(wide))
        out = torch.zeros_like(hidden_states)
        # All groups' tokens at once: two waits for the device, however many groups there are.
        by_group = chosen.mT.nonzero()[:, 1].split(chosen.sum(dim=0).tolist())
        for group, tokens in enumerate(by_group):
            if not len(tokens):
                continue
            x = hidden_states[tokens]
            gate = self._apply_map("gate", group, x) if self.gated else None
            made = self._apply_map("down", group, self.activation(gate, self._apply_map("up", group, x)))
            out.index_add_(0, tokens, (made * weights[tokens, group].unsqueeze(-1)).to(out.dtype))
        return out

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts in {self.num_groups} groups, ranks={self.ranks}"


def swiglu(gate: Tensor | None, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``, or ``silu(up)`` without a gate."""
    return nn.functional.silu(up) if gate is None else nn.functional.silu(gate) * up


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


class ExpertMerger:
    r"""Merge the experts of each layer of a mixture-of-experts model into fewer, guided by calibration tokens.

    Every expert is run on every token that reaches its layer. Experts are grouped by k-means on the mean cosine of
    their outputs, for which the n x n Gram matrix is enough, and a group becomes
    :math:`\sum_i f_i W_i / \sum_i f_i`, f the shares of tokens that chose i. The published union SVD,
    :math:`[W_1 \dots W_n] = U \Sigma [V_1 \dots V_n]^\top` with :math:`W = U \Sigma \sum_i f_i V_i^\top / \sum_i f_i`,
    *is* this average, as :math:`U \Sigma V_i^\top = W_i`; with truncation it is the average projected on
    :math:`U_r U_r^\top`.

    Hidden neurons of different experts have no common order, so an average mixes unrelated ones: ``align`` matches
    them first, and ``refit`` solves for the merged down map on the same tokens. Without both (:meth:`published`), on
    experts trained from scratch, averages do worse than dropping the least used experts; see the claim. With both
    (:meth:`recommended`) they do far better.

    Memory of ``fit``: the tokens that reach each layer, one layer's experts in float32, one block of outputs.
    For checkpoints that do not fit there is :func:`merge_expert_checkpoint`.
    Source: catalogue entry ``sub-moe``.

    Parameters
    ----------
    n_experts : int, optional
        Experts a layer to keep on average, from the experts a token to one less than there are.
    keep_ratio : float, default=0.5
        Instead, as a share of the experts of each layer.
    clustering : {"kmeans", "hierarchical", "dominant", "random"}
        k-means; average linkage; every expert to the most similar of the most used ones; a random partition.
    similarity : {"output", "mean_output", "router", "weight"}
        Mean cosine of the outputs; inner products of the mean outputs; cosine of router logits; of weights.
    allocation : {"uniform", "adaptive"}
        As many groups in every layer, or shared among the layers of a window so that the sum of
        :math:`J_l(k_l) / J_l(1)` is least, J the spread within groups. Experts of two layers never merge.
    window : int or None, default=2
        Successive layers that share their groups; None is all.
    combine : {"average", "keep"}
        Mean by frequency, or the group's most used expert.
    align : {None, "permutation", "activation"}
        Match hidden neurons with those of the group's most used expert, by the Hungarian method, before averaging: by
        their weights, which did better here, or by the correlations of what they do on the tokens.
    refit : {None, "down", "regmean"}
        Fit the down map to what the group gives together, by least squares; or average gate and up by regression on
        the tokens of each expert.
    intra_ratio : float, default=0.0
        Share of the parameters inside experts that truncation to two factors saves, in [0, 1).
    whiten : bool, default=True
        Truncate in the metric of each expert's own inputs.
    pruning : {None, "frequency", "output_norm", "reap"}
        Drop experts and their router rows instead of merging: the least used, those of the smallest outputs, or of the
        smallest outputs times router weights.
    batch_tokens : int, optional
        Tokens a block; where not given, a block takes about 16 MiB (512 on a GPU).
    random_state : int, default=0
    verbose : bool, default=False

    Attributes
    ----------
    groups_ : dict of str to ndarray of shape (n,)
        By layer.
    similarity_ : dict of str to ndarray of shape (n, n)
        Mean cosines of the outputs.
    statistics_ : dict of str to ExpertStatistics
    report_ : ExpertMergeReport
    """

    def __init__(
        self,
        n_experts: int | None = None,
        *,
        keep_ratio: float | int = 0.5,
        clustering: str = "kmeans",
        similarity: str = "output",
        allocation: str = "uniform",
        window: int | None = 2,
        combine: str = "average",
        align: str | None = None,
        refit: str | None = None,
        intra_ratio: float | int = 0.0,
        whiten: bool = True,
        pruning: str | None = None,
        batch_tokens: int | None = None,
        random_state: int = 0,
        verbose: bool = False,
    ):
        self.n_experts, self.keep_ratio, self.clustering, self.similarity = (
            n_experts,
            keep_ratio,
            clustering,
            similarity,
        )
        self.allocation, self.window, self.combine, self.align = allocation, window, combine, align
        self.refit, self.intra_ratio, self.whiten, self.pruning = refit, intra_ratio, whiten, pruning
        self.batch_tokens, self.random_state, self.verbose = batch_tokens, random_state, verbose

    @classmethod
    def published(cls, n_experts: int | None = None, **options: Any) -> "ExpertMerger":
        """Make the procedure as published: k-means on outputs, average by frequency."""
        return cls(n_experts, **{**PUBLISHED, **options})

    @classmethod
    def recommended(cls, n_experts: int | None = None, **options: Any) -> "ExpertMerger":
        """Make the procedure that did best here: neurons matched before averaging, down map fitted after it."""
        return cls(n_experts, **{**RECOMMENDED, **options})

    def options(self) -> dict[str, Any]:
        """Return the settings that decide the result."""
        return {
            name: value
            for name, value in vars(self).items()
            if not name.endswith("_") and name[0] != "_" and name != "verbose"
        }

    def fit(self, model: nn.Module, batches: Any) -> "ExpertMerger":
        """Find the groups, and make their experts.

        Parameters
        ----------
        model : nn.Module
            Of transformers, or any whose blocks hold a list named ``experts``. Not changed.
        batches : Tensor of shape (b, t), iterable of ids or of mappings with ``input_ids``, or ExpertCalibration
            Unlabelled; tokens outside ``attention_mask`` do not count.

        Raises
        ------
        ValueError
            An option is outside its range; the model has no such layers, or quantised ones; activations are not finite.

        Warns
        -----
        UserWarning
            Experts that no token chose; too few tokens for a fit.
        """
        self.check()
        layers = find_expert_layers(model)
        sizes = [layer.n_experts for layer in layers]
        self.targets(sizes, [layer.top_k for layer in layers])
        if self.pruning is not None:
            for layer in layers:
                check_reducible(layer)
        if isinstance(batches, ExpertCalibration):
            calibration = batches
        else:
            calibration = calibrate_experts(model, batches, batch_tokens=self.batch_tokens, verbose=self.verbose)
        inputs, statistics = calibration
        if set(statistics) != {layer.name for layer in layers}:
            raise ValueError(f"batches must be a calibration of this model, got one of {sorted(statistics)}")
        groups = self.group(statistics, [layer.top_k for layer in layers])
        self._outcomes: dict[str, Outcome] = {}
        reports = []
        for layer in progress(layers, label="merging", enabled=self.verbose):
            stack = wide_stack(layer)
            outcome = self.combined(layer.name, stack, groups[layer.name], statistics[layer.name], inputs[layer.name])
            report = layer_report(
                layer.name, stack, outcome, statistics[layer.name], inputs[layer.name], self.batch_tokens
            )
            reports.append(in_bytes(report, layer.stack().up.dtype))
            self._outcomes[layer.name] = narrowed(outcome, layer.stack().up.dtype)
        self.statistics_, self.groups_ = statistics, groups
        self.similarity_ = {name: found.gram for name, found in statistics.items()}
        self.report_ = ExpertMergeReport(reports)
        return self

    def merge(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Return the model with merged experts: a copy, of which experts are not copied twice, or itself.

        Raises
        ------
        ValueError
            ``fit`` was not called, or with a model of other layers.
        """
        if not hasattr(self, "_outcomes"):
            raise ValueError("fit must be called first, got an ExpertMerger without groups")
        layers = find_expert_layers(model)
        known = {layer.name: layer.n_experts for layer in layers}
        if known != {name: len(found.groups) for name, found in self._outcomes.items()}:
            raise ValueError(
                f"model must have the layers that were fitted, {sorted(self._outcomes)}, got {sorted(known)}"
            )
        if not inplace:
            # Experts are shared with the copy until they are replaced in it.
            model = copy.deepcopy(model, {id(layer.experts): layer.experts for layer in layers})
        for layer in find_expert_layers(model):
            install(model, layer, self._outcomes[layer.name].map(torch.clone))
        return model

    def check(self) -> None:
        """Compare the settings with their ranges.

        Raises
        ------
        ValueError
            One is outside; it is named.
        """
        for name, allowed in (
            ("clustering", CLUSTERINGS), ("similarity", SIMILARITIES), ("allocation", ALLOCATIONS),
            ("combine", COMBINES), ("align", ALIGNS), ("refit", REFITS), ("pruning", PRUNINGS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.n_experts is None and not 0 < self.keep_ratio < 1:
            raise ValueError(f"keep_ratio must be above 0 and below 1, got {self.keep_ratio}")
        if not 0 <= self.intra_ratio < 1:
            raise ValueError(f"intra_ratio must be at least 0 and below 1, got {self.intra_ratio}")
        if self.combine == "keep" and (self.align or self.refit == "regmean"):
            raise ValueError("align and refit='regmean' must go with combine='average', got 'keep'")
        if self.pruning is not None and (self.align or self.refit or self.intra_ratio or self.allocation != "uniform"):
            raise ValueError("pruning must go without align, refit, intra_ratio and adaptive allocation")
        for name in ("window", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def targets(self, sizes: Sequence[int], top_k: Sequence[int]) -> list[int]:
        """Return how many experts each layer keeps on average.

        Raises
        ------
        ValueError
            A number is below the experts a token, or not below those that there are.
        """
        found = []
        for n, least in zip(sizes, top_k, strict=True):
            k = self.n_experts if self.n_experts is not None else round(self.keep_ratio * n)
            if not least <= k < n:
                told = "n_experts" if self.n_experts is not None else f"keep_ratio {self.keep_ratio} of {n}"
                raise ValueError(f"{told} must be between {least} (experts a token) and {n - 1}, got {k}")
            found.append(k)
        return found

    def group(self, statistics: Mapping[str, ExpertStatistics], top_k: Sequence[int]) -> dict[str, np.ndarray]:
        """Return labels by layer, from statistics alone."""
        names = list(statistics)
        sizes = [len(statistics[name].gram) for name in names]
        numbers = self.targets(sizes, top_k)
        seeds = dict(zip(names, spawn_seeds(self.random_state, len(names)), strict=True))
        for name in names:
            unused = np.flatnonzero(statistics[name].counts == 0)
            if len(unused):
                warnings.warn(
                    f"no calibration token chose experts {', '.join(map(str, unused[:10]))} of {name}: they are "
                    "merged with next to no weight; bring more tokens",
                    UserWarning,
                    stacklevel=2,
                )
        if self.pruning is not None:
            return {name: self._kept(statistics[name], k) for name, k in zip(names, numbers, strict=True)}
        if self.allocation == "adaptive":
            curves = [self._curve(statistics[name], seeds[name]) for name in names]
            for run in windows(len(names), self.window):
                least = max(top_k[i] for i in run)
                shared = allocate([curves[i] for i in run], sum(numbers[i] for i in run), least=least)
                for i, k in zip(run, shared, strict=True):
                    numbers[i] = k
        return {name: self._labels(statistics[name], k, seeds[name]) for name, k in zip(names, numbers, strict=True)}

    def _labels(self, statistics: ExpertStatistics, k: int, seed: int) -> np.ndarray:
        gram = similarity_matrix(statistics, self.similarity)
        return group_experts(gram, k, clustering=self.clustering, frequencies=statistics.counts, seed=seed)

    def _curve(self, statistics: ExpertStatistics, seed: int) -> np.ndarray:
        gram = similarity_matrix(statistics, self.similarity)
        found = [within_groups(gram, self._labels(statistics, k, seed)) for k in range(1, len(gram) + 1)]
        # Starts of k-means may miss: more groups never cost more.
        return np.minimum.accumulate(found)

    def _kept(self, statistics: ExpertStatistics, k: int) -> np.ndarray:
        scores = {
            "frequency": statistics.counts, "output_norm": statistics.norms, "reap": statistics.gated_norms,
        }[str(self.pruning)]  # fmt: skip
        kept = most_used(scores, k)
        labels = np.full(len(scores), -1)
        labels[kept] = np.arange(k)
        return labels

    def combined(
        self,
        name: str,
        stack: ExpertStack,
        groups: np.ndarray,
        statistics: ExpertStatistics,
        inputs: LayerInputs | None,
    ) -> Outcome:
        """Return the experts of one layer's groups."""
        if self.pruning is not None:
            return Outcome(stack.take(np.flatnonzero(groups >= 0).tolist()), None, groups)
        made = [
            merge_group(
                stack, np.flatnonzero(groups == label).tolist(), statistics.frequencies, inputs, combine=self.combine,
                align=self.align, refit=self.refit, intra_ratio=self.intra_ratio, whiten=self.whiten,
                batch_tokens=self.batch_tokens, name=name,
            )
            for label in range(groups.max() + 1)
        ]  # fmt: skip
        stack, factors = join_groups(made)
        return Outcome(stack, factors, groups)


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
