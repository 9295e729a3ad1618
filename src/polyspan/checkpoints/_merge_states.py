"""Checkpoints as mappings from names to tensors: modules, .safetensors files and folders, adapters of PEFT."""

import fnmatch
import math
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyspan.errors import WrongContent
from polyspan.io import ShardedState, read_json

from ._stored_names import file_names

ADAPTER, TUCKER = "adapter_config.json", "TUCKER_ADAPTER"
STATISTICS = ("running_mean", "running_var")
SHOWN = 10
# Numbers worked on at once: few enough for a core's cache, and for nothing beside a tensor.
BLOCK = 2**18


class AdaptedState(Mapping[str, Tensor]):
    r"""A base with an adapter added, tensor by tensor: :math:`W + \frac{\alpha}{r} B A` of LoRA, or a Tucker core."""

    _scales: Any

    def __init__(self, base: Mapping[str, Tensor], path: Path | str):
        self.path, self.base = Path(path), base
        config = read_json(self.path / ADAPTER)
        kind = config.get("peft_type") if isinstance(config, dict) else None
        if kind not in ("LORA", TUCKER) or config.get("use_dora") or config.get("bias", "none") != "none":
            raise WrongContent(
                self.path / ADAPTER,
                found=f"peft_type {kind!r}" + (" with DoRA or biases" if kind in ("LORA", TUCKER) else ""),
                expected="a plain LoRA or Tucker adapter; merge other adapters into their base first",
            )
        self.config = config
        self._factors = ShardedState(self.path / "adapter_model.safetensors")
        self._pairs: dict[str, tuple[str, ...]] = {}
        self._whole: dict[str, str] = {}
        if kind == TUCKER:
            self._find_cores()
        for key in self._factors if kind == "LORA" else ():
            name = key.removeprefix("base_model.model.")
            match = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", name)
            if match is None and "lora_" not in name:
                self._whole[name] = key
            elif match is None:
                raise WrongContent(self.path, found=f"tensor {key}", expected="factors lora_A and lora_B of weights")
            elif match[2] == "A":
                other = key.replace(".lora_A.", ".lora_B.")
                if other not in self._factors:
                    raise WrongContent(self.path, found=f"no tensor {other!r}", expected=f"one beside {key}")
                self._pairs[match[1] + ".weight"] = (key, other)
        self._modules = {name: name.removesuffix(".weight") for name in self._pairs}
        missing = [name for name in (*self._pairs, *self._whole) if name not in base]
        if missing and isinstance(base, ShardedState):
            self._rename(file_names(base.path))
            missing = [name for name in (*self._pairs, *self._whole) if name not in base]
        if missing:
            raise WrongContent(self.path, found=f"an update of {missing[0]}", expected="names that the base has")

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def _rename(self, names: Mapping[str, str]) -> None:
        """Go by the names of the base's files, where PEFT goes by those of the model in memory."""
        self._pairs = {names.get(name, name): keys for name, keys in self._pairs.items()}
        self._whole = {names.get(name, name): key for name, key in self._whole.items()}
        self._modules = {names.get(f"{module}.weight", name): module for name, module in self._modules.items()}

    def _scale(self, module: str, rank: int) -> float:
        def said(patterns: Mapping[str, Any], default: Any) -> Any:
            found = [v for key, v in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)]
            return found[0] if found else default

        alpha = said(self.config.get("alpha_pattern") or {}, self.config.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._whole:
            return self._factors[self._whole[name]]
        if name not in self._pairs:
            return self.base[name]
        return self.rows(name, 0, shape_of(self.base, name)[0])

    def rows(self, name: str, lo: int, hi: int) -> Tensor:
        """Return rows ``lo`` to ``hi`` of a tensor; of an update no other rows are made."""
        if name in self._whole:
            return rows_of(self._factors, self._whole[name], lo, hi)
        weight = rows_of(self.base, name, lo, hi)
        if name not in self._pairs:
            return weight
        if self.config["peft_type"] == TUCKER:
            return weight.float() + self._tucker_rows(name, lo, hi).to(weight.device)
        A, B = (self._factors[key].float().flatten(1) for key in self._pairs[name])
        left, right = (A.mT, B.mT) if self.config.get("fan_in_fan_out") else (B, A)
        shape = shape_of(self.base, name)
        if (len(left), right.shape[1]) != (shape[0], math.prod(shape[1:])):
            raise WrongContent(
                self.path,
                found=f"an update of {len(left)} by {right.shape[1]}",
                expected=f"{shape[0]} by {math.prod(shape[1:])}",
                where=name,
            )
        # The sum stays in float32: in the base's own 16 bits a small update would drown.
        scale = self._scale(self._modules[name], len(A))
        with one_thread():
            update = left[lo:hi] @ right
        return weight.float() + scale * update.view(weight.shape).to(weight.device)

    def _find_cores(self) -> None:
        from .tucker_adapter import TuckerAdapterConfig

        self._scales = TuckerAdapterConfig.from_peft_type(**self.config)
        parts: dict[str, dict[str, str]] = {}
        for key in self._factors:
            name = key.removeprefix("base_model.model.")
            match = re.fullmatch(r"(.+)\.tucker_adapter_(core|axis\d+)", name)
            if match is None:
                self._whole[name.replace(".base_layer.", ".")] = key
            else:
                parts.setdefault(match[1], {})[match[2]] = key
        for module, found in parts.items():
            n = len(self._factors.shape(found["core"])) if "core" in found else 0
            wanted = ["core", *(f"axis{i}" for i in range(n))]
            if sorted(found) != sorted(wanted):
                raise WrongContent(
                    self.path, found=f"{', '.join(sorted(found))} of {module}", expected="a core, its axes"
                )
            self._pairs[f"{module}.weight"] = tuple(found[part] for part in wanted)

    def _tucker_rows(self, name: str, lo: int, hi: int) -> Tensor:
        from .tucker_update import tucker_delta

        core, *factors = (self._factors[key].float() for key in self._pairs[name])
        found, shape = tuple(map(len, factors)), shape_of(self.base, name)
        if found != shape:
            raise WrongContent(self.path, found=f"an update of shape {found}", expected=f"{shape}", where=name)
        scale = self._scales.scale_for(self._modules[name], core.shape)
        with one_thread():
            return tucker_delta(core, [factors[0][lo:hi], *factors[1:]], scale)


@contextmanager
def one_thread() -> Generator[None]:
    """Keep torch to one thread inside the block: products and sums have then the same bits on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_state(source: Any, base: Mapping[str, Tensor] | None = None, *, name: str = "finetuned") -> Mapping[str, Tensor]:
    """Return a checkpoint as a mapping; a folder with ``adapter_config.json`` is added to ``base``.

    Raises
    ------
    ValueError
        It is neither module, state dict nor path, or an adapter stands where a base must be.
    """
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        wrong = next((k for k, v in source.items() if not isinstance(v, Tensor)), None) if _plain(source) else None
        if wrong is not None:
            raise ValueError(f"{name} must map names to tensors, got {type(source[wrong]).__name__} for {wrong!r}")
        return source
    if isinstance(source, str | Path):
        if (Path(source) / ADAPTER).is_file():
            if base is None:
                raise ValueError(f"{name} must be a whole checkpoint, got the adapter {source}")
            return AdaptedState(base, source)
        return ShardedState(source)
    raise ValueError(f"{name} must be a module, a state dict or a path, got {type(source).__name__}")


def _plain(source: Mapping) -> bool:
    return not isinstance(source, ShardedState | AdaptedState)


def as_states(finetuned: Any, base: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """Return checkpoints by task; a sequence is numbered.

    Raises
    ------
    ValueError
        There is none, or one state dict was given alone.
    """
    if isinstance(finetuned, Mapping) and any(isinstance(v, Tensor) for v in finetuned.values()):
        raise ValueError("finetuned must hold checkpoints by task, got one state dict")
    if isinstance(finetuned, Mapping):
        named = {str(task): source for task, source in finetuned.items()}
    elif isinstance(finetuned, Sequence) and not isinstance(finetuned, str):
        named = {str(i): source for i, source in enumerate(finetuned)}
    else:
        raise ValueError(f"finetuned must be a mapping or a list of checkpoints, got {type(finetuned).__name__}")
    if not named:
        raise ValueError("finetuned must hold at least one checkpoint, got none")
    return {task: as_state(source, base, name=f"finetuned[{task!r}]") for task, source in named.items()}


def shape_of(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return a tensor's shape without reading it where the file's header says it."""
    if isinstance(state, AdaptedState) and name not in state._whole:
        return shape_of(state.base, name)
    return state.shape(name) if isinstance(state, ShardedState) else tuple(state[name].shape)


def dtype_of(state: Mapping[str, Tensor], name: str) -> torch.dtype:
    """Return a tensor's dtype without reading it where the file's header says it."""
    if isinstance(state, AdaptedState):
        return dtype_of(state.base, name)
    return state.dtype(name) if isinstance(state, ShardedState) else state[name].dtype


def rows_of(state: Mapping[str, Tensor], name: str, lo: int, hi: int) -> Tensor:
    """Return rows of a tensor without reading others where a file holds it; a tensor without axes is one row."""
    if isinstance(state, ShardedState | AdaptedState) and shape_of(state, name):
        return state.rows(name, lo, hi)
    tensor = state[name].detach()
    return tensor[lo:hi] if tensor.ndim else tensor.reshape(1)


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the spans of rows, of about ``BLOCK`` numbers each, in which a tensor is worked on."""
    n = shape[0] if shape else 1
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for lo in range(0, n, step):
        yield lo, min(n, lo + step)


def is_ignored(name: str, ignore_keys: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore_keys)


def is_statistic(name: str) -> bool:
    """Tell whether a buffer is a running mean or variance, which is averaged and never masked."""
    return name.rsplit(".", 1)[-1] in STATISTICS


def mergeable(base: Mapping[str, Tensor], states: Mapping[str, Mapping], ignore_keys: Sequence[str] = ()) -> list[str]:
    """Return the names of the base's float tensors that are merged, after comparing names and shapes.

    Raises
    ------
    ValueError
        Checkpoints differ in names or shapes; the first ten are listed.
    """
    if isinstance(ignore_keys, str):
        raise ValueError(f"ignore_keys must be a list of patterns, got the string {ignore_keys!r}")
    names = [name for name in base if not is_ignored(name, ignore_keys)]
    known = set(names)
    for task, state in states.items():
        missing = [f"{name} is missing" for name in names if name not in state]
        extra = [
            f"{name} is not in the base" for name in state if name not in known and not is_ignored(name, ignore_keys)
        ]
        other = [
            (name, shape_of(base, name), shape_of(state, name))
            for name in names
            if name in state and shape_of(base, name) != shape_of(state, name)
        ]
        told = missing + extra + [f"{name} is {b} in the base and {a} there" for name, b, a in other]
        if told:
            more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
            resized = any(len(a) == len(b) and a[0] != b[0] and a[1:] == b[1:] for _, b, a in other if a and b)
            advice = (
                "; rows differ as after resizing a vocabulary: cut the embeddings back, or name them in ignore_keys"
                if resized
                else "; name them in ignore_keys to keep the base's"
            )
            shown = "; ".join(told[:SHOWN]) + more
            raise ValueError(f"finetuned[{task!r}] must have the names and shapes of base, got: {shown}{advice}")
    return [name for name in names if dtype_of(base, name).is_floating_point]
