"""Merge the experts of a mixture-of-experts model into fewer, without training, on unlabelled calibration texts."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from polyspan.run import progress, spawn_seeds

from ._expert_capture import LayerInputs, capture_inputs, token_batches
from ._expert_combining import join_groups, merge_group
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
from ._expert_layout import ExpertStack, check_reducible, find_expert_layers
from ._expert_outcome import MergedLayer, Outcome, in_bytes, install, layer_report, narrowed, wide_stack
from ._expert_statistics import ExpertStatistics, expert_statistics

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
