"""Fine-tuning through a Tucker core, as a PEFT method; importing this registers it with peft."""

import math
import re
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyspan.errors import UnreadableFile, WrongContent, require

from ._tucker_layers import (
    CONVOLUTIONS,
    TuckerConv,
    TuckerEmbedding,
    TuckerLayer,
    TuckerLinear,
    channel_axes,
    frozen_weight,
    is_matrix_stored_in_by_out,
    weight_shape,
)
from .tucker_update import TuckerUpdate, adapter_from_delta, resolve_ranks, tucker_delta, tucker_ranks

peft: Any = require("peft", extra="hf", purpose="a Tucker adapter")
tuners: Any = require("peft.tuners.tuners_utils", extra="hf")
peft_types: Any = require("peft.utils.peft_types", extra="hf")
other: Any = require("peft.utils.other", extra="hf")
merge_utils: Any = require("peft.utils.merge_utils", extra="hf")
constants: Any = require("peft.utils.constants", extra="hf")

__all__ = [
    "TuckerAdapterConfig", "TuckerAdapterModel", "TuckerUpdate", "adapter_from_delta", "load_tucker_adapter",
    "tucker_delta", "tucker_ranks",
]  # fmt: skip

NAME = "tucker_adapter"
ALL_CONVOLUTIONS = "all-conv"
INITS = ("official", "small", "orthogonal")
SCALINGS = ("plain", "alpha_over_r")
PATHS = ("auto", "factored", "dense")
BIASES = ("none", "all", f"{NAME}_only")
COMBINATIONS = ("cat", "hooi", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


def _open_peft_type(name: str) -> Any:
    """Add a member to peft's closed enum of methods, so that one from outside can be registered."""
    kinds = peft_types.PeftType
    if name in kinds.__members__:
        return kinds[name]
    member = str.__new__(kinds, name)
    member._name_ = member._value_ = name
    kinds._member_names_.append(name)
    kinds._member_map_[name] = kinds._value2member_map_[name] = member
    type.__setattr__(kinds, name, member)
    return member


PEFT_TYPE = _open_peft_type(NAME.upper())


@dataclass
class TuckerAdapterConfig(peft.PeftConfig):
    r"""What is adapted, by which ranks, and how the update is scaled and begun; saved as ``adapter_config.json``.

    An adapter of a weight (I_1, ..., I_N) has sum I_n J_n + prod J_n parameters. The core begins at 0, so that a fresh
    adapter changes nothing, and the first step moves the core alone. The update's speed grows with the product of the
    factors' sizes: a learning rate found for one ``init`` or ``alpha`` does not carry over to another.
    Source: catalogue entry ``flora-nd``.

    Parameters
    ----------
    r_in, r_out : int, default=8
        Ranks of input and output channels; of an embedding, of its rows and columns. Where an axis is shorter, its
        rank is cut to it, with a warning; of depthwise convolutions, which have one input channel, without.
    r_spatial : int or sequence of int, optional
        Ranks along the sides of a kernel; one number is cut in silence where a side is shorter. Left out, sides are
        kept whole, which costs next to nothing for kernels of 3.
    alpha : float, default=4.0
        Factor of the update: the paper's s.
    scaling : {"plain", "alpha_over_r"}, default="plain"
        s is alpha, or alpha over the larger of both channel ranks.
    dropout : float, default=0.0
        Share of the adapter's inputs (an embedding's rows) put to zero in training, in [0, 1).
    target_modules : list of str or str, optional
        Ends of names, or one regular expression, or "all-linear", or "all-conv". Left out, the choice that peft has
        for LoRA in known language models.
    exclude_modules, modules_to_save, layers_to_transform, layers_pattern : optional
        As in ``peft.LoraConfig``. A head that is new must be in ``modules_to_save``: all else is frozen.
    trainable_token_indices : list of int, or dict of str to list of int, optional
        As in ``peft.LoraConfig``: rows of the embedding, or of layers by name, that are trained and saved too.
    bias : {"none", "all", "tucker_adapter_only"}, default="none"
        Which biases are trained and saved too.
    init : {"official", "small", "orthogonal"}, default="official"
        Of the factors: normal with variance 1/2J whatever the axis, as in the paper's code for images; normal with
        deviation 0.02, as in its code for text; or orthogonal columns of the first one's length.
    rank_pattern : dict, optional
        Name of a layer, or the end of it, to its ranks, one for each axis of the weight in its own order.
    alpha_pattern : dict, optional
        The same for alpha.
    path : {"auto", "factored", "dense"}, default="auto"
        Whether a convolution's update is applied by three small convolutions, or expanded to the size of the weight.
        Both give the same; "auto" takes the one of fewer multiplications, which is the second for depthwise kernels.
    strict : bool, default=False
        Refuse ranks that would be cut.
    seed : int, optional
        Of the factors; a layer's draw depends on its name and not on the other layers. Left out, torch's global
        generator.
    use_dora : bool, default=False
        As in ``peft.LoraConfig``: learn the length of each unit's weights, the magnitude, apart from their direction,
        :math:`m\, (W_0 + \Delta W) / \lVert W_0 + \Delta W \rVert`, of which the divisor gets no gradient. A unit is an
        output, of an embedding a column; one whose weights are all 0 keeps them until its update is not 0. Costs one
        more pass over the frozen weight each time.

    Raises
    ------
    ValueError
        A value is out of its range.
    """

    r_in: int = 8
    r_out: int = 8
    r_spatial: int | Sequence[int] | None = None
    alpha: float | int = 4.0
    scaling: str = "plain"
    dropout: float | int = 0.0
    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    trainable_token_indices: Any = None
    bias: str = "none"
    init: str = "official"
    rank_pattern: Any = field(default_factory=dict)
    alpha_pattern: Any = field(default_factory=dict)
    path: str = "auto"
    strict: bool = False
    seed: int | None = None
    use_dora: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        for name in ("r_in", "r_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        spatial = [self.r_spatial] if isinstance(self.r_spatial, int) else list(self.r_spatial or [])
        if any(rank < 1 for rank in spatial):
            raise ValueError(f"r_spatial must be at least 1, got {self.r_spatial}")
        self.r_spatial = self.r_spatial if self.r_spatial is None or isinstance(self.r_spatial, int) else spatial
        for name, value in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not (math.isfinite(value) and value != 0):
                raise ValueError(f"alpha must be finite and not 0, got {value} for {name}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name, known in (("scaling", SCALINGS), ("bias", BIASES), ("init", INITS), ("path", PATHS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform must be left out where target_modules is one expression, got both")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern must come with layers_to_transform, got it alone")

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, with sets in order, so that equal configurations are saved as equal bytes."""
        made = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in made.items()}

    def ranks_for(self, key: str, layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ranks for a layer, one an axis of its weight, and those that were asked for before cutting."""
        shape = weight_shape(layer)
        chosen = _by_name(self.rank_pattern, key)
        if chosen is not None:
            ranks = resolve_ranks(shape, tuple(chosen) if not isinstance(chosen, int) else chosen)
            return ranks, ranks
        asked = [0, 0, *shape[2:]]
        axis_out, axis_in = channel_axes(layer)
        asked[axis_out] = self.r_out
        # A depthwise kernel has one input channel, whatever rank is meant for the others.
        asked[axis_in] = 1 if getattr(layer, "groups", 1) > 1 and shape[axis_in] == 1 else self.r_in
        if getattr(layer, "groups", 1) > 1 and shape[axis_out] == 1:
            asked[axis_out] = 1
        if self.r_spatial is not None and len(shape) > 2:
            n = len(shape) - 2
            # One rank is meant for kernels of any size, and what is smaller is kept whole.
            whole = isinstance(self.r_spatial, int)
            spatial = [min(self.r_spatial, side) for side in shape[2:]] if whole else list(self.r_spatial)
            if len(spatial) != n:
                raise ValueError(f"r_spatial must be one rank or {n} for {key}, got {self.r_spatial}")
            asked[2:] = spatial
        return tuple(map(min, asked, shape)), tuple(asked)

    def scale_for(self, key: str, ranks: Sequence[int]) -> float:
        """Return the factor of a layer's update; ``ranks`` are those of its weight's axes."""
        alpha = _by_name(self.alpha_pattern, key)
        alpha = self.alpha if alpha is None else alpha
        return float(alpha / max(ranks[:2])) if self.scaling == "alpha_over_r" else float(alpha)


def _by_name(pattern: Mapping[str, Any], key: str) -> Any:
    """Return the entry whose expression matches the end of a layer's name; the first of them decides."""
    return next((value for name, value in pattern.items() if re.match(rf"(.*\.)?({name})$", key)), None)


class TuckerAdapterModel(tuners.BaseTuner):
    r"""A model whose chosen layers add a small core times one factor per dimension to their frozen weight.

    .. math:: W = W_0 + s\; G \times_1 A^{(1)} \times_2 \dots \times_N A^{(N)}

    so that height and width of a kernel stay dimensions, where LoRA flattens it into a matrix. Made by
    ``peft.get_peft_model(model, TuckerAdapterConfig(...))``; saving, loading, several adapters, switching, disabling,
    merging and taking apart are peft's own. A saved one is read by :func:`load_tucker_adapter`, or by peft once this
    class is imported: peft knows no way to find a method outside of itself, and says ``KeyError: 'TUCKER_ADAPTER'``.

    The update is never formed where three small products are cheaper, and merging puts it into the weight at no later
    cost. For a linear layer the form is LoRA with a square matrix in the middle: no structure is there to keep, and
    none to gain. Adapters cannot train what ``nn.MultiheadAttention`` reads without calling.
    Source: catalogue entry ``flora-nd``.

    Parameters
    ----------
    model : nn.Module
    config : TuckerAdapterConfig
    adapter_name : str

    Raises
    ------
    ValueError
        No layer matches (those that could be adapted are listed), a layer is of another kind, or ranks are out of
        range where ``strict``.
    """

    prefix = f"{NAME}_"
    tuner_layer_cls = TuckerLayer
    target_module_mapping = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into every layer that its configuration names."""
        config = self.peft_config[adapter_name]
        if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_CONVOLUTIONS:
            config.target_modules = {name for name, layer in _layers(model) if isinstance(layer, CONVOLUTIONS)}
        if config.target_modules is not None and kwargs.get("state_dict") is None:
            self._check_targets(model, config)
        self._cut: list[str] = []
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self._cut:
            warnings.warn(f"ranks larger than their axis were cut to it: {'; '.join(self._cut)}", stacklevel=2)

    def _check_targets(self, model: nn.Module, config: Any) -> None:
        """Refuse what cannot be adapted before any layer is replaced, so that the model stays as it was."""
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            return
        modules = dict(model.named_modules())
        inside = tuple(f"{name}." for name, layer in modules.items() if isinstance(layer, tuners.BaseTunerLayer))
        named = [n for n in modules if n and not n.startswith(inside) and self._check_target_module_exists(config, n)]
        for name in named:
            self._plan(config, name, modules[name], modules[name.rpartition(".")[0]])
        if not named:
            known = [name for name, _ in _layers(model)]
            shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
            raise ValueError(
                f"target_modules must match at least one layer, got {config.target_modules}; "
                f"layers that can be adapted: {shown or 'none'}"
            )

    def _plan(
        self, config: Any, key: str, target: Any, parent: nn.Module
    ) -> tuple[type[TuckerLayer], tuple[int, ...], str]:
        """Return the class that wraps a layer, its ranks, and what was cut, as words; or say why it cannot be."""
        base = target.get_base_layer() if isinstance(target, tuners.BaseTunerLayer) else target
        kind = _kind_of(base, key)
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"target_modules must not name {key}: nn.MultiheadAttention reads its weight without calling "
                "it, so that an adapter would do nothing"
            )
        if config.use_dora:
            frozen_weight(base)
        ranks, asked = config.ranks_for(key, base)
        told = f"{key} {asked} to {ranks} for a weight {weight_shape(base)}" if ranks != asked else ""
        if told and config.strict:
            raise ValueError(f"ranks must not exceed the weight's axes where strict, got {told}")
        return kind, ranks, told

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        kind, ranks, told = self._plan(peft_config, current_key, target, parent)
        self._cut += [told] if told else []
        layer = target if isinstance(target, TuckerLayer) else kind(target)
        scale = peft_config.scale_for(current_key, ranks)
        if layer is not target:
            layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, ranks, scale=scale, config=peft_config, key=current_key)
        if isinstance(parent, nn.TransformerEncoderLayer):
            layer.insist_on_calls()
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(child, other.AuxiliaryTrainingWrapper):
            # What it held is a whole module; the wrapper's weight may be a tensor that is computed anew each time.
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self.modules():
                if isinstance(layer, TuckerLayer) and adapter_name in layer.tucker_adapter_magnitude:
                    magnitude = layer.tucker_adapter_magnitude[adapter_name]
                    magnitude.data = magnitude.data.to(layer.tucker_adapter_core[adapter_name].dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Generator[None]:
        """Hand ``adapter_names`` of one call to every layer that has adapters: peft calls this around each forward."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names must be given in evaluation only, got a model in training mode")
        unknown = sorted(set(names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise ValueError(
                f"adapter_names must be among {sorted(self.peft_config)} or '__base__', got {unknown[0]!r}"
            )
        beams = kwargs.get("num_beams") or 1
        names = [name for name in names for _ in range(beams)]

        def give(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {**kwargs, "adapter_names": names}

        handles = [
            layer.register_forward_pre_hook(give, with_kwargs=True)
            for layer in self.modules()
            if isinstance(layer, (TuckerLayer, other.AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        made = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        present = model.state_dict()
        for key in made:
            layer, found, _ = key.partition(f".{cls.prefix}")
            if found and key not in present:
                raise ValueError(
                    f"the adapter must fit the model: it adapts {layer.removeprefix('base_model.model.')}, "
                    "where the model has no such layer"
                )
        return made

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float | int],
        adapter_name: str,
        combination_type: str = "cat",
        ranks: int | None = None,
        *,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Make a new adapter whose update is a weighted sum of others; it is not active until it is set.

        Parameters
        ----------
        adapters : sequence of str
            Present adapters.
        weights : sequence of float
            One for each.
        adapter_name : str
            Of the new one.
        combination_type : {"cat", "hooi", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"}
            "cat" is exact: ranks add up. "hooi", for which "svd" is peft's word, brings each layer's sum back to
            ``ranks``, or left out to the largest ranks of its parts. The others do so with what peft's function of
            that name makes of the layer's updates; "dare" draws from torch's global generator. What peft's "linear"
            and its like add up, factor by factor, is no sum of updates. Magnitudes grow by the weighted sum of what
            theirs grew, in each case.
        ranks : int, optional
            Of both channel axes, unless "cat".
        density : float, optional
            Share of entries that is kept, in [0, 1]: with the last four.
        majority_sign_method : {"total", "frequency"}
            With "ties_svd" and "dare_ties_svd".

        Raises
        ------
        ValueError
            An adapter is not there, the name is taken, another number of weights than of adapters, some but not all
            have magnitudes, or ``density`` is missing, out of range, or given where nothing is left out.
        """
        if not adapters or any(name not in self.peft_config for name in adapters):
            raise ValueError(f"adapters must be among {sorted(self.peft_config)}, got {list(adapters)}")
        if len(weights) != len(adapters):
            raise ValueError(f"weights must be one for each of {len(adapters)} adapters, got {len(weights)}")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name must be new, got {adapter_name!r}")
        with_dora = [name for name in adapters if self.peft_config[name].use_dora]
        if 0 < len(with_dora) < len(adapters):
            raise ValueError(f"adapters must all have use_dora or none, got it for {with_dora} of {list(adapters)}")
        if combination_type not in COMBINATIONS:
            raise ValueError(f"combination_type must be one of {COMBINATIONS}, got {combination_type!r}")
        thinned = combination_type in COMBINATIONS[3:]
        if thinned != (density is not None) or not 0 <= (density or 0) <= 1:
            wanted = "in [0, 1]" if thinned else "left out"
            raise ValueError(f"density must be {wanted} with {combination_type!r}, got {density}")
        made: dict[str, tuple[Tensor, Sequence[Tensor]]] = {}
        scales: dict[str, float] = {}
        for key, layer in self.model.named_modules():
            own = [name for name in adapters if isinstance(layer, TuckerLayer) and name in layer.tucker_adapter_core]
            if not own:
                continue
            shares = [float(w) for name, w in zip(adapters, weights, strict=True) if name in own]
            scales[key] = layer.tucker_adapter_scale[own[0]]
            if combination_type == "cat":
                made[key] = layer.weighted_sum(own, shares)
                continue
            deltas = [layer.get_delta_weight(name) for name in own]
            if thinned:
                by_sign = {"majority_sign_method": majority_sign_method} if "ties" in combination_type else {}
                combine = getattr(merge_utils, combination_type.removesuffix("_svd"))
                delta = combine(deltas, torch.tensor(shares).to(deltas[0]), density, **by_sign)
            else:
                delta = sum(w * each for w, each in zip(shares, deltas, strict=True))
            largest = tuple(max(sizes) for sizes in zip(*(layer.parameters_of(n)[0].shape for n in own), strict=True))
            found = adapter_from_delta(delta, largest if ranks is None else ranks, scale=scales[key])
            made[key] = found.core * found.scale, found.factors
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            target_modules=set(made),
            layers_to_transform=None,
            layers_pattern=None,
            exclude_modules=None,
            scaling="plain",
            rank_pattern={re.escape(key): list(core.shape) for key, (core, _) in made.items()},
            alpha_pattern={re.escape(key): scale for key, scale in scales.items()},
        )
        self.inject_adapter(self.model, adapter_name)
        parts = list(zip(adapters, map(float, weights), strict=True))
        for key, (core, factors) in made.items():
            self.model.get_submodule(key).put(adapter_name, core, factors, parts)


def load_tucker_adapter(model: nn.Module, path: Path | str, adapter_name: str = "default", **options: Any) -> Any:
    """Return a model with a saved adapter: ``peft.PeftModel.from_pretrained``, which must have met the adapter's class.

    In a process that has not imported polyspan's adapters, peft's own function, and ``load_adapter`` of transformers,
    end in ``KeyError: 'TUCKER_ADAPTER'``: call this one, or import ``TuckerAdapterConfig`` first.

    Parameters
    ----------
    model : nn.Module
        The base.
    path : path
        A folder that ``save_pretrained`` or :func:`extract_tucker_adapter` wrote, or an adapter's name on the hub.
    adapter_name : str
    **options
        Of ``PeftModel.from_pretrained``, such as ``is_trainable``.

    Raises
    ------
    WrongContent
        An adapter of another kind, which peft loads by itself.
    UnreadableFile
        Its folder has no weights in a .safetensors file; pickles are not read.
    ValueError
        It does not fit the model.
    """
    kind = peft.PeftConfig.from_pretrained(path, subfolder=options.get("subfolder")).peft_type
    if kind != PEFT_TYPE:
        raise WrongContent(path, found=f"an adapter of kind {kind}", expected=f"one of kind {PEFT_TYPE.value}")
    weights = Path(path) / (options.get("subfolder") or "") / "adapter_model.safetensors"
    if Path(path).is_dir() and not weights.is_file():
        raise UnreadableFile(weights, found="nothing", expected="weights in a .safetensors file")
    return peft.PeftModel.from_pretrained(model, path, adapter_name=adapter_name, **options)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and layer of all that can be adapted, and is no part of an adapter."""
    inside: tuple[str, ...] = ()
    for name, layer in model.named_modules():
        if isinstance(layer, tuners.BaseTunerLayer):
            inside = (*inside, f"{name}.")
        if (
            name
            and not name.startswith(inside)
            and (
                isinstance(layer, (nn.Linear, nn.Embedding, *CONVOLUTIONS, TuckerLayer))
                or is_matrix_stored_in_by_out(layer)
            )
        ):
            yield name, layer


def _kind_of(layer: Any, key: str) -> type[TuckerLayer]:
    """Return the class that wraps a layer, or say why none does."""
    if isinstance(getattr(layer, "weight", None), nn.parameter.UninitializedParameter):
        raise ValueError(f"{key} must have its sizes, got a lazy layer: run one batch through the model first")
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            raise ValueError(f"{key} must have no max_norm, which rewrites the frozen rows, got {layer.max_norm}")
        return TuckerEmbedding
    if isinstance(layer, CONVOLUTIONS):
        return TuckerConv
    if isinstance(layer, nn.Linear) or is_matrix_stored_in_by_out(layer):
        return TuckerLinear
    raise ValueError(
        f"target_modules must name linear layers, convolutions or embeddings, got {type(layer).__name__} at {key}"
    )


def _register() -> None:
    peft_types.register_peft_method(
        name=NAME, config_cls=TuckerAdapterConfig, model_cls=TuckerAdapterModel, is_mixed_compatible=False
    )


_register()
