"""Adapters from checkpoint files and back: extract one from a base and a tuned model, or merge one into a base."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyspan.errors import UnreadableFile, WrongContent
from polyspan.io import (
    TENSOR_CODES,
    ShardedState,
    atomic_directory,
    digest_file,
    read_json,
    read_members,
    remove_folder,
    tensor_bytes,
    write_json,
    write_members,
    write_tensor_blocks,
)
from polyspan.run import Journal, map_tasks, progress

from ._hub import local_checkpoint
from ._merge_states import row_blocks, rows_of
from ._tucker import cheapest_ranks, num_parameters
from ._tucker_magnitude import fits, growth, unit_norms, with_magnitude
from .merge_files import digest_sources, digests, write_shards
from .tucker_plots import RankCurve, rank_curve
from .tucker_update import adapter_from_delta, tucker_delta

ROOT = "base_model.model."
PREFIX = "tucker_adapter_"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
JOURNAL = "extract.journal.jsonl"


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


class Pair(NamedTuple):
    """One tensor of a base and of a tuned checkpoint, by the files in which they lie."""

    name: str
    base: str
    tuned: str

    def update(self) -> tuple[np.ndarray, Tensor] | None:
        """Return the base's tensor, and tuned minus base in float64; None where they are equal."""
        a, b = (read_members(file, [self.name])[self.name] for file in (self.base, self.tuned))
        if np.array_equal(a, b):
            return None
        return a, torch.from_numpy(np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64))


def tensor_pairs(base: ShardedState, tuned: ShardedState) -> dict[str, Pair]:
    """Return the tensors of two checkpoints by name, in order; of the files only headers are read.

    Raises
    ------
    WrongContent
        The two do not hold the same names and shapes; the first that does not fit is named.
    """
    for one, other in ((base, tuned), (tuned, base)):
        missing = next((name for name in sorted(one) if name not in other), None)
        if missing is not None:
            raise WrongContent(other.path, found=f"no tensor {missing}", expected=f"the tensors of {one.path}")
    for name in sorted(base):
        if base.shape(name) != tuned.shape(name):
            raise WrongContent(
                tuned.path,
                found=f"shape {tuned.shape(name)}",
                expected=f"{base.shape(name)} as in the base",
                where=f"tensor {name}",
            )
    return {name: Pair(name, *(os.path.abspath(s.file(name)) for s in (base, tuned))) for name in sorted(base)}


def adaptable(state: ShardedState, name: str, only: re.Pattern[str] | None) -> bool:
    """Tell whether a tensor is the weight of a layer that can be adapted, and that ``only`` names."""
    key = name.removesuffix(".weight")
    return len(state.shape(name)) > 1 and key != name and (only is None or only.search(key) is not None)


def layer_names(only: str | None) -> re.Pattern[str] | None:
    """Return the expression by which layers are chosen, None where all are."""
    try:
        return None if only is None else re.compile(only)
    except re.error as error:
        raise ValueError(f"only must be a regular expression, got {only!r}: {error}") from None


def tied_embedding(source: Path, state: ShardedState) -> str | None:
    """Return the embedding that is the output's weight too, where a language model's checkpoint holds one of the two.

    An adapter of it would act on the embedding alone, where merging changes both.
    """
    config = read_json(source / "config.json") if (source / "config.json").is_file() else {}
    size = config.get("vocab_size") if isinstance(config, dict) else None
    kinds = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(size, int) or not kinds or not re.search("ForCausalLM|LMHead|ConditionalGeneration", str(kinds)):
        return None
    tables = [name for name in state if len(state.shape(name)) == 2 and state.shape(name)[0] == size]
    return tables[0] if len(tables) == 1 else None


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
    workers: int | None = 1,
    engine: str = "local",
    address: str | None = None,
    verbose: bool = False,
) -> Extraction:
    """Turn a fine-tuned checkpoint into an adapter of its base, a folder that ``PeftModel.from_pretrained`` loads.

    The update of every weight with two axes or more is decomposed by HOOI, but for an embedding that is the output's
    weight too, which is left out. Updates of full rank, such as those of
    long training, compress badly: look at each layer's ``error``. Names must be those of the model that the adapter is
    for. Half precision is widened to float32.

    In memory are one layer a worker, and the adapter. Finished layers are kept in a folder beside ``out`` until the
    end: the same call goes on after an interrupt, and ends in the same bytes. So it does on any number of workers,
    each of which has one thread: several workers, not several threads, make it faster.
    Source: catalogue entry ``flora-nd``.

    Parameters
    ----------
    base, tuned : path
        A .safetensors file, or a folder with one, or with shards and their index; or a model's name on the hub.
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
    workers, engine, address
        As of :func:`polyspan.run.map_tasks`, over which layers go. Workers must see the files and the folder of
        ``out``.
    verbose : bool
        Show progress.

    Raises
    ------
    ValueError
        A rank, error or scale is out of range, no weight differs, other options began what is to go on, or ``out``
        would take the place of what is read.
    FileError
        A file cannot be read, or the two do not fit each other.
    """
    if rank < 1 or (spatial_rank is not None and spatial_rank < 1):
        raise ValueError(f"rank and spatial_rank must be at least 1, got {rank} and {spatial_rank}")
    if error is not None and not 0 <= error < 1:
        raise ValueError(f"error must be in [0, 1), got {error}")
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    target = Path(out)
    if (target.exists() or target.is_symlink()) and not replace:
        raise UnreadableFile(out, found="something of that name", expected="a new name, or replace=True")
    if not target.parent.is_dir():
        raise UnreadableFile(out, found=f"no folder {target.parent}", expected="a folder that exists")
    base, tuned = local_checkpoint(base, files=True), local_checkpoint(tuned, files=True)
    _check_apart(target, base=base, tuned=tuned)
    first, second = ShardedState(base), ShardedState(tuned)
    pairs = tensor_pairs(first, second)
    missing = [m for m in modules_to_save if not any(n.startswith(f"{m}.") for n in pairs)]
    if missing:
        raise ValueError(f"modules_to_save must name modules of the base, got {missing[0]!r}")
    saved = [n for n in pairs if any(n.startswith(f"{module}.") for module in modules_to_save)]
    tied, chosen = tied_embedding(base, first), layer_names(only)
    fit = (n for n in pairs if n not in saved and n != tied and adaptable(first, n, chosen))
    wanted = {name: pairs[name] for name in fit}
    if not wanted:
        raise ValueError(f"tuned must differ from base in a weight that can be adapted, got none in {tuned}")
    sizes: dict[str, float] = {}
    others = [name for name in pairs if name not in wanted]
    for name in progress(others, label="comparing", enabled=verbose):
        update = pairs[name].update()
        if update is not None:
            sizes[name] = float(update[1].square().sum())
    left_out = [name for name in sizes if name not in saved]

    fan: dict[str, Any] = {"workers": workers, "engine": engine, "address": address}
    digested = digest_sources([base, tuned], label="reading" if verbose else "", **fan)
    options = {"rank": rank, "spatial_rank": spatial_rank, "error": error, "scale": float(scale)}
    work = target.absolute().with_name(f".{target.name}.extracting")
    journal = Journal(work / JOURNAL, {"base": digested[0], "tuned": digested[1], **options})
    _forget_torn(journal, work)
    number = {name: i for i, name in enumerate(pairs)}
    map_tasks(
        partial(_extract_layer, str(work), options), [(number[name], pair) for name, pair in wanted.items()],
        journal=journal, key=lambda item: item[1].name, label="extracting" if verbose else "", inner_threads=1, **fan,
    )  # fmt: skip

    tensors: dict[str, np.ndarray] = {}
    layers: list[ExtractedLayer] = []
    errors = dict.fromkeys(left_out, 1.0)
    for name in wanted:
        told = journal.done[name]
        if told is None:
            continue
        key, shape, ranks = name.removesuffix(".weight"), first.shape(name), tuple(told["ranks"])
        for part, value in read_members(work / told["file"]).items():
            tensors[f"{ROOT}{key}.{PREFIX}{part}"] = value
        layers.append(ExtractedLayer(key, shape, ranks, num_parameters(shape, ranks), told["error"], told["change"]))
        sizes[name], errors[name] = told["size"], told["error"]
    if not layers:
        remove_folder(work)
        raise ValueError(f"tuned must differ from base in a weight that can be adapted, got none in {tuned}")
    total = lost = 0.0
    for name in sorted(sizes):
        total += sizes[name]
        lost += errors.get(name, 0.0) * sizes[name]
    for name in saved:
        tensors[ROOT + name] = np.asarray(read_members(second.file(name), [name])[name], dtype=np.float32)
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
    remove_folder(work)
    return Extraction(target, layers, saved, left_out, 1.0 - lost / total if total > 0 else 1.0)


def _check_apart(out: Path, **read: Path) -> None:
    """Refuse a result that would take the place of what it is made of."""
    target = out.resolve()
    for name, path in read.items():
        place = path.resolve()
        if target == place or target in place.parents or (target.exists() and place in target.parents):
            raise ValueError(f"out must be another place than {name}, which it is made of, got {out}")


def _forget_torn(journal: Journal, work: Path) -> None:
    """Take layers whose file is missing or changed out of what is done."""
    for name, told in list(journal.done.items()):
        if told is not None:
            path = work / told["file"]
            if not path.is_file() or digest_file(path) != told["digest"]:
                del journal.done[name]


def _extract_layer(work: str, options: dict[str, Any], item: tuple[int, Pair]) -> dict[str, Any] | None:
    """Decompose the update of one weight into a file; return what the journal keeps, None where nothing differs."""
    number, pair = item
    found = pair.update()
    if found is None:
        return None
    weight, delta = found
    rank, spatial = options["rank"], options["spatial_rank"]
    if options["error"] is None:
        sides = [s if spatial is None else min(spatial, s) for s in delta.shape[2:]]
        ranks = (*(min(rank, s) for s in delta.shape[:2]), *sides)
    else:
        ranks = cheapest_ranks(delta, error=options["error"])[0]
    made = adapter_from_delta(delta, ranks, scale=options["scale"])
    size = float(delta.square().sum())
    tensors = {"core": made.core, **{f"axis{n}": factor for n, factor in enumerate(made.factors)}}
    path = Path(work) / f"layer-{number:05d}.safetensors"
    write_members(path, {name: tensor.float().numpy() for name, tensor in tensors.items()})
    return {
        "file": path.name,
        "digest": digest_file(path),
        "ranks": list(ranks),
        "error": made.error,
        "size": size,
        "change": math.sqrt(size) / (float(np.linalg.norm(weight.astype(np.float64))) or 1.0),
    }


def merge_tucker_adapter(
    base: Path | str,
    adapter: Path | str,
    out: Path | str,
    *,
    name: str = CONFIG,
    shard_bytes: int | None = None,
    verbose: bool = False,
) -> list[str]:
    """Add an adapter to the weights of a base checkpoint, without building the model; return the names that changed.

    For a model that is built, ``merge_and_unload`` does the same. In memory are the adapter and one of the layers that
    it changes; sums are in float64, and weights keep the dtype of the base.
    Source: catalogue entry ``flora-nd``.

    Parameters
    ----------
    base : path or str
        As for :func:`extract_tucker_adapter`.
    adapter : path
        Folder that peft or :func:`extract_tucker_adapter` wrote.
    out : path
        A .safetensors file; or a folder of shards, beside which the base's configuration and tokenizer are put, and in
        which the same call goes on after an interrupt.
    name : str
        Of the configuration in that folder.
    shard_bytes : int, optional
        Size of the files in a folder; that of the largest tensor where not given.
    verbose : bool
        Show progress.

    Raises
    ------
    WrongContent
        The folder holds another kind of adapter, or one of a layer that the base does not have, or of another shape.
    ValueError
        A sum is too large for the base's dtype, or ``out`` would take the place of what is read.
    """
    from .tucker_adapter import PEFT_TYPE, TuckerAdapterConfig

    settings, folder = read_json(Path(adapter) / name), Path(adapter)
    if not isinstance(settings, dict) or settings.get("peft_type") != str(PEFT_TYPE.value):
        kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise WrongContent(folder / name, found=f"an adapter of kind {kind}", expected=PEFT_TYPE.value)
    config = TuckerAdapterConfig.from_peft_type(**settings)
    tensors = {key.removeprefix(ROOT): torch.from_numpy(x) for key, x in read_members(folder / WEIGHTS).items()}
    source = local_checkpoint(base, files=True)
    _check_apart(Path(out), base=source, adapter=folder)
    model = ShardedState(source)
    # Of each tensor that changes: its adapter's core, or None and what takes its place; and magnitudes, if any.
    changed: dict[str, tuple[Tensor | None, list[Tensor], Tensor | None]] = {}
    for key, value in sorted(tensors.items()):
        layer, found, part = key.partition(f".{PREFIX}")
        if found and part != "core":
            continue
        target = f"{layer}.weight" if found else key.replace(".base_layer.", ".")
        if target not in model:
            raise WrongContent(folder / WEIGHTS, found=f"an adapter of {layer}", expected=f"a layer of {model.path}")
        parts = [tensors[f"{layer}.{PREFIX}axis{n}"] for n in range(value.ndim)] if found else [value]
        shape = tuple(len(factor) for factor in parts) if found else tuple(value.shape)
        if shape != model.shape(target):
            raise WrongContent(
                folder / WEIGHTS, found=f"shape {shape}", expected=f"{model.shape(target)}", where=f"layer {layer}"
            )
        units = tensors.get(f"{layer}.{PREFIX}magnitude") if found else None
        if (found and config.use_dora and units is None) or (units is not None and not fits(units.shape, shape)):
            raise WrongContent(
                folder / WEIGHTS,
                found="no magnitudes" if units is None else f"magnitudes of shape {tuple(units.shape)}",
                expected=f"one a unit of a weight {shape}",
                where=f"layer {layer}",
            )
        changed[target] = (value if found else None, parts, units)

    def made(key: str) -> Iterator[Tensor]:
        if key not in changed:
            yield from (rows_of(model, key, *span) for span in row_blocks(model.shape(key)))
            return
        core, parts, units = changed[key]
        if core is None:
            yield parts[0].to(model.dtype(key))
            return
        scale = config.scale_for(key.removesuffix(".weight"), core.shape)
        delta = tucker_delta(core.double(), [factor.double() for factor in parts], scale)
        summed = model[key].double() + delta
        if units is not None:
            summed = with_magnitude(summed, growth(units.double(), unit_norms(summed, units.shape)))
        summed = summed.to(model.dtype(key))
        if not bool(torch.isfinite(summed).all()):
            raise ValueError(f"base must hold sums with the adapter, got {model.dtype(key)}, too narrow for {key}")
        yield summed

    facts = {key: (model.dtype(key), model.shape(key)) for key in model}
    if Path(out).suffix == ".safetensors":
        order = sorted(facts, key=lambda key: -facts[key][0].itemsize)
        shown = progress(order, label="merging", enabled=verbose)
        blocks = (tensor_bytes(block) for key in shown for block in made(key))
        codes = {key: (TENSOR_CODES[facts[key][0]], facts[key][1]) for key in order}
        write_tensor_blocks(Path(out), codes, blocks, {"format": "pt"})
    else:
        header = {"base": digests(source), "adapter": digests(folder), "settings": digest_file(folder / name)}
        write_shards(Path(out), facts, made, header, beside=source, shard_bytes=shard_bytes, verbose=verbose)
    return sorted(changed)


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
    workers: int | None = 1,
    engine: str = "local",
    address: str | None = None,
    journal: Path | str | None = None,
    verbose: bool = False,
) -> list[LayerAdvice]:
    """Return for every weight that differs which ranks its update needs.

    In memory is one layer a worker, which has one thread, so that advice is the same on any number of them.
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
    workers, engine, address
        As of :func:`polyspan.run.map_tasks`, over which layers go. Workers must see the files.
    journal : path, optional
        Where finished layers are kept until the end, so that the same call goes on after an interrupt; a journal of
        other files or options is begun anew.
    verbose : bool
        Show progress.

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
    base, tuned = local_checkpoint(base, files=True), local_checkpoint(tuned, files=True)
    first, second = ShardedState(base), ShardedState(tuned)
    tied, chosen = tied_embedding(base, first), layer_names(only)
    pairs = tensor_pairs(first, second)
    wanted = [pair for name, pair in pairs.items() if name != tied and adaptable(first, name, chosen)]
    fan: dict[str, Any] = {"workers": workers, "engine": engine, "address": address}
    options = {"errors": [float(error) for error in errors], "curves": curves}
    kept = None
    if journal is not None:
        digested = digest_sources([base, tuned], label="reading" if verbose else "", **fan)
        header = {"base": digested[0], "tuned": digested[1], **options}
        try:
            kept = Journal(journal, header)
        except ValueError:
            Journal.discard(journal)
            kept = Journal(journal, header)
    told = map_tasks(
        partial(_advise_layer, options), wanted, journal=kept, key=lambda pair: pair.name,
        label="choosing ranks" if verbose else "", inner_threads=1, **fan,
    )  # fmt: skip
    advice = []
    for pair, found in zip(wanted, told, strict=True):
        if found is not None:
            shape = first.shape(pair.name)
            choices = [RankChoice(error, tuple(ranks), parameters) for error, ranks, parameters in found["choices"]]
            curve = RankCurve(*map(np.array, found["curve"])) if curves else None
            advice.append(LayerAdvice(pair.name.removesuffix(".weight"), shape, math.prod(shape), choices, curve))
    if kept is not None:
        kept.remove()
    if not advice:
        raise ValueError(f"tuned must differ from base in a weight that can be adapted, got none in {tuned}")
    return advice


def _advise_layer(options: dict[str, Any], pair: Pair) -> dict[str, Any] | None:
    """Return the ranks that the update of one weight needs, as JSON types; None where nothing differs."""
    found = pair.update()
    if found is None:
        return None
    delta = found[1]
    choices = []
    for error in options["errors"]:
        ranks = cheapest_ranks(delta, error=error)[0]
        choices.append([error, list(ranks), num_parameters(delta.shape, ranks)])
    curve = [part.tolist() for part in rank_curve(delta)] if options["curves"] else None
    return {"choices": choices, "curve": curve}
