"""Run a saved causal language model layer by layer, with one layer's weights in memory at a time."""

import re
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyspan.errors import WrongContent, require
from polyspan.io import ShardedState

from ._expert_layout import ADVICE, ExpertLayer, find_expert_layers
from .transformers_bars import quiet_transformers

LAYER = re.compile(r"^(.*?)\.(\d+)(?:\.|$)")


class StreamedModel:
    """A causal language model of transformers whose layers are loaded from a checkpoint when they are needed.

    Names and layouts of the file are turned into the model's by transformers itself, as ``from_pretrained`` does.
    Outside the layers, embeddings, norm and head are loaded at once.

    Parameters
    ----------
    path : path
        Folder with ``config.json`` and .safetensors files.
    device : device
    layers_only : bool
        Leave embeddings, norm and head out.

    Raises
    ------
    MissingExtra
        transformers is not installed.
    WrongContent
        The checkpoint is quantised, no causal language model, or its tensors do not fill the model.
    ValueError
        The model has no layers with experts.
    """

    def __init__(self, path: Path | str, device: Any = "cpu", *, layers_only: bool = False):
        transformers: Any = require("transformers", extra="hf", purpose="reading a model of experts")
        self.path, self.device = Path(path), torch.device(device)
        self.config = read_config(self.path)
        self.state = ShardedState(self.path)
        if type(self.config) not in transformers.AutoModelForCausalLM._model_mapping:
            raise WrongContent(
                self.path, found=f"a model of type {self.config.model_type}", expected="a causal language model"
            )
        with torch.device("meta"):
            # Other implementations refuse some dtypes, and merged experts take the place of all of them.
            self.model = transformers.AutoModelForCausalLM.from_config(self.config, experts_implementation="eager")
        self.model.eval().requires_grad_(False)
        self.experts = find_expert_layers(self.model)
        found = [match for layer in self.experts if (match := LAYER.match(layer.name))]
        stems = sorted({match[1] for match in found})
        if len(stems) != 1 or len(found) != len(self.experts):
            raise ValueError(f"model must have its experts in one list of layers, got them in {stems}")
        self.layers: nn.ModuleList = self.model.get_submodule(stems[0])
        self.numbers = [int(match[2]) for match in found]
        self._leaf = re.compile(rf"(?:^|\.){re.escape(stems[0].rpartition('.')[2])}\.(\d+)\.")
        self._revive_buffers()
        if layers_only:
            return
        self._load([name for name in self.state if self.number_of(name) is None])
        self.model.tie_weights()
        self._check_loaded(lambda name: not name.startswith(f"{stems[0]}."))

    def number_of(self, name: str) -> int | None:
        """Return the number of the layer that a tensor of the file belongs to, None outside of them."""
        match = self._leaf.search(name)
        return int(match[1]) if match else None

    def _revive_buffers(self) -> None:
        """Compute the buffers that no file holds, such as rotary frequencies."""
        for module in self.model.modules():
            lost = [n for n in module._non_persistent_buffers_set if module._buffers.get(n) is not None]
            for name in lost:
                module._buffers[name] = torch.zeros_like(module._buffers[name], device=self.device)
            if lost:
                self.model._init_weights(module)

    def _load(self, names: Iterable[str]) -> None:
        loading: Any = require("transformers.core_model_loading", extra="hf")
        mapping: Any = require("transformers.conversion_mapping", extra="hf")
        modeling: Any = require("transformers.modeling_utils", extra="hf")
        given = {name: self.state[name] for name in names}
        # Transforms gather tensors in themselves, so every load has its own.
        config = modeling.LoadStateDictConfig(weight_mapping=mapping.get_model_conversion_mapping(self.model))
        with quiet_transformers():
            loading.convert_and_load_state_dict_in_model(self.model, given, config)
        for module in self.model.modules():
            for held in (module._parameters, module._buffers):
                for name, part in held.items():
                    if part is not None and not part.is_meta and part.device != self.device:
                        moved = part.to(self.device)
                        held[name] = nn.Parameter(moved, requires_grad=False) if held is module._parameters else moved

    def _check_loaded(self, wanted: Callable[[str], bool]) -> None:
        held = (*self.model.named_parameters(), *self.model.named_buffers())
        missing = [name for name, part in held if wanted(name) and part.is_meta]
        if missing:
            raise WrongContent(self.path, found=f"no tensor for {missing[0]}", expected="all weights of the model")

    @contextmanager
    def loaded(self, number: int) -> Generator[nn.Module]:
        """Have one layer's weights inside the block; yield the layer."""
        layer = self.layers[number]
        self._load([name for name in self.state if self.number_of(name) == number])
        prefix = next(name for name, module in self.model.named_modules() if module is layer)
        self._check_loaded(lambda name: name.startswith(f"{prefix}."))
        try:
            yield layer
        finally:
            for module in layer.modules():
                for name, part in module._parameters.items():
                    if part is not None:
                        module._parameters[name] = nn.Parameter(torch.empty_like(part, device="meta"), False)
                for name, part in module._buffers.items():
                    if part is not None and name not in module._non_persistent_buffers_set:
                        module._buffers[name] = torch.empty_like(part, device="meta")

    def expert_layer(self, number: int) -> ExpertLayer | None:
        """Return the experts of a layer, None where it is dense."""
        return self.experts[self.numbers.index(number)] if number in self.numbers else None

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the first layer for ids (b, t)."""
        seen: list[Tensor] = []
        self._call(ids, lambda i, x, _: seen.append(x) if i == 0 else None)
        return seen[0]

    @torch.no_grad()
    def run_layer(self, number: int, ids: Tensor, x: Tensor) -> Tensor:
        """Return what leaves a loaded layer for ids (b, t) and what entered it (b, t, H)."""
        made: list[Any] = []

        def at(i: int, _: Tensor, options: dict[str, Any]) -> None:
            if i == number:
                made.append(type(self.layers[number]).forward(self.layers[number], x.to(self.device), **options))

        self._call(ids, at)
        return made[0][0] if isinstance(made[0], tuple) else made[0]

    @torch.no_grad()
    def loss(self, ids: Tensor, x: Tensor) -> float:
        """Return the summed cross-entropy of the next tokens, in nats, for what leaves the last layer."""
        last = len(self.layers) - 1
        logits = self._call(ids, lambda i, _, __: x.to(self.device) if i == last else None).logits
        if logits.shape[:2] != ids.shape:
            raise ValueError(f"model must give logits {tuple(ids.shape)} of its layers' output, got {logits.shape[:2]}")
        targets = ids[:, 1:].to(logits.device).flatten()
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum"))

    def _call(self, ids: Tensor, at: Callable[[int, Tensor, dict[str, Any]], Tensor | None]) -> Any:
        """Run all but the layers; each layer passes on what ``at`` returns for it, or its input where that is None."""

        def passing(i: int) -> Any:
            def forward(x: Tensor, **options: Any) -> Tensor:
                made = at(i, x, options)
                return x if made is None else made

            return forward

        for i, layer in enumerate(self.layers):
            layer.forward = passing(i)
        try:
            return self.model(input_ids=ids.to(self.device), use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward


def read_config(path: Path) -> Any:
    """Return the configuration of an unquantised checkpoint.

    Raises
    ------
    WrongContent
        The folder holds a quantised model, or the configuration of none.
    """
    transformers: Any = require("transformers", extra="hf", purpose="reading a model of experts")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WrongContent(path, found=f"no configuration of a model ({error})", expected="config.json") from error
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise WrongContent(path, found=f"a model quantised by {method}", expected=f"plain weights; {ADVICE}")
    return config


def text_pieces(path: Path, text: str, length: int, samples: int | None) -> Tensor:
    """Return the first pieces (samples, length) of a text's tokens, by the tokenizer of a checkpoint.

    Raises
    ------
    ValueError
        The text is shorter than two pieces.
    WrongContent
        The folder has no tokenizer.
    """
    transformers: Any = require("transformers", extra="hf", purpose="reading a tokenizer")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WrongContent(path, found=f"no tokenizer ({error})", expected="one, or calibration ids (b, t)") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    n = len(ids) // length if samples is None else min(samples, len(ids) // length)
    if n < 2:
        raise ValueError(f"calibration must hold two pieces of {length} tokens or more, got {len(ids)} tokens")
    return ids[: n * length].view(n, length)
