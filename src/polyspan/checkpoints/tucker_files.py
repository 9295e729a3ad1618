"""Adapters from checkpoint files and back: extract one from a base and a tuned model, or merge one into a base."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from polyspan.errors import UnreadableFile, WrongContent
from polyspan.io import atomic_directory, list_folder, read_json, read_members, write_json, write_members
from polyspan.run import progress

from ._tucker import cheapest_ranks, num_parameters
from .tucker_plots import RankCurve, rank_curve
from .tucker_update import adapter_from_delta, tucker_delta

ROOT = "base_model.model."
PREFIX = "tucker_adapter_"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"


class ExtractedLayer(NamedTuple):
    """One weight whose update went into an adapter.

    ``error`` is the share of the update's squared norm left out, ``change`` the update's norm over the weight's.
    """

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    parameters: int
    error: float
    change: float


class Extraction(NamedTuple):
    """What :func:`extract_tucker_adapter` wrote, layer by layer, and what it left out.

    Attributes
    ----------
    path : Path
        The adapter's folder.
    layers : list of ExtractedLayer
    saved : list of str
        Tensors of ``modules_to_save``, kept whole.
    left_out : list of str
        Tensors that differ and are in no adapter: biases, norms, and what ``only`` does not name.
    kept_share : float
        Share of the squared norm of all differences that the adapter holds, in [0, 1]; 1 where nothing differs.
    """

    path: Path
    layers: list[ExtractedLayer]
    saved: list[str]
    left_out: list[str]
    kept_share: float


class Checkpoint:
    """Tensors of a .safetensors file, or of a folder of them, read one by one where an index says where they lie."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._whole: dict[str, np.ndarray] | None = None
        if not self.path.is_dir():
            self._place = dict.fromkeys(self._read_whole(self.path), self.path)
        elif (self.path / INDEX).is_file():
            found = read_json(self.path / INDEX)
            shards = found.get("weight_map") if isinstance(found, dict) else None
            if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
                raise WrongContent(self.path / INDEX, found="no weight_map", expected="a file name for each tensor")
            if any(Path(name).name != name for name in shards.values()):
                raise WrongContent(
                    self.path / INDEX, found="a file outside the folder", expected="names of files in it"
                )
            self._place = {name: self.path / file for name, file in shards.items()}
        else:
            files = list_folder(self.path, "*.safetensors")
            if len(files) != 1:
                raise UnreadableFile(
                    self.path, found=f"{len(files)} .safetensors files", expected=f"one, or {INDEX} beside several"
                )
            self._place = dict.fromkeys(self._read_whole(files[0]), files[0])

    def _read_whole(self, file: Path) -> dict[str, np.ndarray]:
        # A file's names are not known before it is read: without an index all of it is in memory.
        self._whole = read_members(file)
        return self._whole

    def names(self) -> list[str]:
        """Return the names of all tensors, in order."""
        return sorted(self._place)

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def __getitem__(self, name: str) -> np.ndarray:
        if self._whole is not None:
            return self._whole[name]
        return read_members(self._place[name], [name])[name]


def differences(
    base: Checkpoint, tuned: Checkpoint, *, label: str = "", verbose: bool = False
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield name, base tensor and tuned tensor of all that differ.

    Raises
    ------
    WrongContent
        The two do not hold the same names and shapes; the first that does not fit is named.
    """
    for one, other in ((base, tuned), (tuned, base)):
        missing = next((name for name in one.names() if name not in other), None)
        if missing is not None:
            raise WrongContent(other.path, found=f"no tensor {missing}", expected=f"the tensors of {one.path}")
    for name in progress(base.names(), label=label, enabled=verbose):
        a, b = base[name], tuned[name]
        if a.shape != b.shape:
            raise WrongContent(
                tuned.path, found=f"shape {b.shape}", expected=f"{a.shape} as in the base", where=f"tensor {name}"
            )
        if not np.array_equal(a, b):
            yield name, a, b


def extract_tucker_adapter(
    base: Path | str,
    tuned: Path | str,
    out: Path | str,
    *,
    rank: int = 8,
    spatial_rank: int | None = None,
    error: float | None = None,
    only: str | None = None,
    modules_to_save: Sequence[str] = (),
    scale: float | int = 4.0,
    replace: bool = False,
    verbose: bool = False,
) -> Extraction:
    """Turn a fine-tuned checkpoint into an adapter of its base, a folder that ``PeftModel.from_pretrained`` loads.

    The update of every weight with two axes or more is decomposed by HOOI. Updates of full rank, such as those of
    long training, compress badly: look at each layer's ``error``. Names must be those of the model that the adapter is
    for. A single file of the base is in memory whole, and so is the one of the tuned model; with an index of shards,
    one tensor at a time. Half precision is widened to float32.
    Source: catalogue entry ``flora-nd``.

    Parameters
    ----------
    base, tuned : path
        A .safetensors file, or a folder with one, or with shards and their index.
    out : path
        Folder to make: all of it is there at the end, or nothing.
    rank : int, default=8
        Of the first two axes of each weight, cut where one is shorter.
    spatial_rank : int, optional
        Of the sides of kernels; left out, whole.
    error : float, optional
        Choose each layer's ranks instead: the fewest parameters that leave out this share of its squared norm at most.
    only : str, optional
        Expression that must be found in a layer's name.
    modules_to_save : sequence of str
        Modules whose tensors are kept whole: a new head.
    scale : float, default=4.0
        The adapter's alpha.
    replace : bool
        Write over a folder that is there.
    verbose : bool
        Show progress.

    Raises
    ------
    ValueError
        A rank, error or scale is out of range, or no weight differs.
    FileError
        A file cannot be read, or the two do not fit each other.
    """
    if rank < 1 or (spatial_rank is not None and spatial_rank < 1):
        raise ValueError(f"rank and spatial_rank must be at least 1, got {rank} and {spatial_rank}")
    if error is not None and not 0 <= error < 1:
        raise ValueError(f"error must be in [0, 1), got {error}")
    first, second = Checkpoint(base), Checkpoint(tuned)
    missing = [m for m in modules_to_save if not any(n.startswith(f"{m}.") for n in first.names())]
    if missing:
        raise ValueError(f"modules_to_save must name modules of the base, got {missing[0]!r}")
    tensors: dict[str, np.ndarray] = {}
    layers: list[ExtractedLayer] = []
    left_out: list[str] = []
    total = lost = 0.0
    for name, a, b in differences(first, second, label="extracting", verbose=verbose):
        delta = torch.from_numpy(np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64))
        size = float(delta.square().sum())
        total += size
        key = name.removesuffix(".weight")
        if any(name.startswith(f"{module}.") for module in modules_to_save):
            continue
        if delta.ndim < 2 or not name.endswith(".weight") or (only is not None and not re.search(only, key)):
            left_out.append(name)
            lost += size
            continue
        if error is None:
            sides = [s if spatial_rank is None else min(spatial_rank, s) for s in delta.shape[2:]]
            ranks = (*(min(rank, s) for s in delta.shape[:2]), *sides)
        else:
            ranks = cheapest_ranks(delta, error=error)[0]
        found = adapter_from_delta(delta, ranks, scale=scale)
        tensors[f"{ROOT}{key}.{PREFIX}core"] = found.core.float().numpy()
        for n, factor in enumerate(found.factors):
            tensors[f"{ROOT}{key}.{PREFIX}axis{n}"] = factor.float().numpy()
        change = float(np.sqrt(size) / (np.linalg.norm(a.astype(np.float64)) or 1.0))
        shape = tuple(delta.shape)
        layers.append(ExtractedLayer(key, shape, tuple(ranks), num_parameters(shape, ranks), found.error, change))
        lost += found.error * size
    if not layers:
        raise ValueError(f"tuned must differ from base in a weight that can be adapted, got none in {tuned}")
    saved = [n for n in first.names() if any(n.startswith(f"{module}.") for module in modules_to_save)]
    tensors |= {ROOT + name: np.asarray(second[name], dtype=np.float32) for name in saved}
    from .tucker_adapter import TuckerAdapterConfig

    config = TuckerAdapterConfig(
        alpha=float(scale),
        target_modules=[layer.name for layer in layers],
        modules_to_save=list(modules_to_save) or None,
        rank_pattern={re.escape(layer.name): list(layer.ranks) for layer in layers},
    )
    config.inference_mode = True
    with atomic_directory(out, replace=replace) as folder:
        write_members(folder / WEIGHTS, tensors, metadata={"format": "pt"})
        write_json(folder / CONFIG, config.to_dict())
    return Extraction(Path(out), layers, saved, left_out, 1.0 - lost / total if total > 0 else 1.0)


def merge_tucker_adapter(
    base: Path | str, adapter: Path | str, out: Path | str, *, name: str = CONFIG, verbose: bool = False
) -> list[str]:
    """Add an adapter to the weights of a base checkpoint, without building the model; return the names that changed.

    For a model that is built, ``merge_and_unload`` does the same. Everything is in memory; half precision is widened
    to float32.
    Source: catalogue entry ``flora-nd``.

    Parameters
    ----------
    base : path
        As for :func:`extract_tucker_adapter`.
    adapter : path
        Folder that peft or :func:`extract_tucker_adapter` wrote.
    out : path
        A .safetensors file.
    name : str
        Of the configuration in that folder.
    verbose : bool
        Show progress.

    Raises
    ------
    WrongContent
        The folder holds another kind of adapter, or one of a layer that the base does not have, or of another shape.
    """
    from .tucker_adapter import PEFT_TYPE, TuckerAdapterConfig

    settings, folder = read_json(Path(adapter) / name), Path(adapter)
    if not isinstance(settings, dict) or settings.get("peft_type") != str(PEFT_TYPE.value):
        kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise WrongContent(folder / name, found=f"an adapter of kind {kind}", expected=PEFT_TYPE.value)
    config = TuckerAdapterConfig.from_peft_type(**settings)
    tensors = {key.removeprefix(ROOT): value for key, value in read_members(folder / WEIGHTS).items()}
    model = Checkpoint(base)
    made = {key: model[key] for key in model.names()}
    changed: list[str] = []
    for key in progress(sorted(tensors), label="merging", enabled=verbose):
        layer, found, part = key.partition(f".{PREFIX}")
        if found and part != "core":
            continue
        target = f"{layer}.weight" if found else key.replace(".base_layer.", ".")
        if target not in made:
            raise WrongContent(folder / WEIGHTS, found=f"an adapter of {layer}", expected=f"a layer of {model.path}")
        value = np.asarray(tensors[key])
        if found:
            core = torch.from_numpy(value).double()
            factors = [torch.from_numpy(tensors[f"{layer}.{PREFIX}axis{n}"]).double() for n in range(core.ndim)]
            delta = tucker_delta(core, factors, config.scale_for(layer, core.shape)).numpy()
            value = delta if delta.shape != made[target].shape else (made[target] + delta).astype(made[target].dtype)
        if value.shape != made[target].shape:
            raise WrongContent(
                folder / WEIGHTS, found=f"shape {value.shape}", expected=f"{made[target].shape}", where=f"layer {layer}"
            )
        made[target] = value
        changed.append(target)
    write_members(out, made)
    return changed


class RankChoice(NamedTuple):
    """Ranks of fewest parameters that leave out at most the share ``error`` of an update."""

    error: float
    ranks: tuple[int, ...]
    parameters: int


class LayerAdvice(NamedTuple):
    """What :func:`advise_tucker_ranks` says of one weight of ``size`` numbers; ``curve`` is for drawing."""

    name: str
    shape: tuple[int, ...]
    size: int
    choices: list[RankChoice]
    curve: RankCurve | None


def advise_tucker_ranks(
    base: Path | str,
    tuned: Path | str,
    *,
    errors: Sequence[float] = (0.5, 0.2, 0.1),
    only: str | None = None,
    curves: bool = False,
) -> list[LayerAdvice]:
    """Return for every weight that differs which ranks its update needs.

    Source: catalogue entry ``flora-nd``.

    Parameters
    ----------
    base, tuned : path
        As for :func:`extract_tucker_adapter`.
    errors : sequence of float
        Shares of the squared norm that may be left out, each in [0, 1).
    only : str, optional
        Expression that must be found in a layer's name.
    curves : bool
        Measure the curve of :func:`~polyspan.checkpoints.tucker_plots.plot_rank_curves` too.

    Raises
    ------
    ValueError
        An error is out of range, or no weight differs.
    FileError
        A file cannot be read, or the two do not fit each other.
    """
    for error in errors:
        if not 0 <= error < 1:
            raise ValueError(f"errors must be in [0, 1), got {error}")
    advice = []
    for name, a, b in differences(Checkpoint(base), Checkpoint(tuned)):
        key = name.removesuffix(".weight")
        if a.ndim < 2 or key == name or (only is not None and not re.search(only, key)):
            continue
        delta = torch.from_numpy(np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64))
        choices = []
        for error in errors:
            ranks = cheapest_ranks(delta, error=error)[0]
            choices.append(RankChoice(float(error), ranks, num_parameters(delta.shape, ranks)))
        advice.append(LayerAdvice(key, tuple(a.shape), a.size, choices, rank_curve(delta) if curves else None))
    if not advice:
        raise ValueError(f"tuned must differ from base in a weight that can be adapted, got none in {tuned}")
    return advice
