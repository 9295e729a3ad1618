"""Adapters from checkpoint files and back: extract one from a base and a tuned model, or merge one into a base."""

import math
import os
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyspan.errors import UnreadableFile, WrongContent
from polyspan.io import (
    ShardedState,
    atomic_directory,
    digest_file,
    make_folder,
    read_json,
    read_members,
    remove_folder,
    write_json,
    write_members,
)
from polyspan.run import Journal, map_tasks, progress

from ._checkpoint_sizes import ADAPTER_WEIGHTS, CheckpointSize, checkpoint_size
from ._hub import local_checkpoint
from ._merge_states import ADAPTER
from ._tucker import cheapest_ranks, num_parameters
from ._tucker_merging import PREFIX, ROOT, write_adapted
from ._tucker_scores import adapter_perplexities, low_rank, plan_evaluation
from .merge_files import digest_sources
from .tucker_plots import RankCurve, rank_curve
from .tucker_update import adapter_from_delta

CONFIG = ADAPTER
JOURNAL = "extract.journal.jsonl"


class ExtractedLayer(NamedTuple):
    """One weight whose update went into an adapter.

    ``error`` is the share of the update's squared norm left out, ``change`` the update's norm over the weight's. Where
    it was compared, ``lora_*`` tell the same of LoRA: the best matrix of the largest rank that has no more parameters,
    or of rank 1 where that has more already.
    """

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    parameters: int
    error: float
    change: float
    lora_rank: int | None = None
    lora_parameters: int | None = None
    lora_error: float | None = None


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
    sizes : dict of str to CheckpointSize
        ``parameters`` and ``bytes`` of the files of "base", "tuned" and "adapter".
    perplexity : dict of str to float
        Of "base", "tuned", "base with adapter" and, where compared, "base with LoRA"; empty where there was no text.
    """

    path: Path
    layers: list[ExtractedLayer]
    saved: list[str]
    left_out: list[str]
    kept_share: float
    sizes: dict[str, CheckpointSize]
    perplexity: dict[str, float]


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
    compare: bool = False,
    evaluation: Path | str | None = None,
    context: int | None = None,
    max_tokens: int | None = None,
    device: Any = None,
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
    compare : bool
        Say of each layer what LoRA of as many parameters would leave out: its truncated SVD, rows along the first axis.
    evaluation : path, optional
        Text file, held out from every training, on which perplexities are measured, of causal language models: ``base``
        is then a folder with configuration and tokenizer.
    context : int, optional
        Tokens of a piece of text; the model's longest, at most 1,024, where not given.
    max_tokens : int, optional
        Most tokens of the text.
    device : device, optional
        On which models are measured.
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
    _check_apart(target, base=base, tuned=tuned, **({} if evaluation is None else {"evaluation": Path(evaluation)}))
    if evaluation is None and (context is not None or max_tokens is not None or device is not None):
        raise ValueError("context, max_tokens and device must go with evaluation, got no text")
    scoring = None
    if evaluation is not None:
        scoring = plan_evaluation(base, tuned, evaluation, context=context, max_tokens=max_tokens, device=device)
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
    options |= {"compare": True} if compare else {}
    journal = Journal(work / JOURNAL, {"base": digested[0], "tuned": digested[1], **options})
    _forget_torn(journal, work, wanted)
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
        numbers = num_parameters(shape, ranks)
        layers.append(ExtractedLayer(key, shape, ranks, numbers, told["error"], told["change"], *told.get("lora", ())))
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

    def write(folder: Path) -> None:
        write_members(folder / ADAPTER_WEIGHTS, tensors, metadata={"format": "pt"})
        write_json(folder / CONFIG, config.to_dict())

    perplexity: dict[str, float] = {}
    if scoring is not None and evaluation is not None:
        # Before there is a result, so that the same call goes on with this too.
        write(make_folder(work / "adapter"))
        rival = {f"{layer.name}.weight": layer.lora_rank for layer in layers if layer.lora_rank is not None}
        perplexity = adapter_perplexities(
            scoring, work, evaluation, journal, lora=rival if compare else None, saved=saved, verbose=verbose
        )
    with atomic_directory(out, replace=replace) as folder:
        write(folder)
    remove_folder(work)
    weighed = {name: checkpoint_size(p) for name, p in (("base", base), ("tuned", tuned), ("adapter", target))}
    kept_share = 1.0 - lost / total if total > 0 else 1.0
    return Extraction(target, layers, saved, left_out, kept_share, weighed, perplexity)


def _check_apart(out: Path, **read: Path) -> None:
    """Refuse a result that would take the place of what it is made of."""
    target = out.resolve()
    for name, path in read.items():
        place = path.resolve()
        if target == place or target in place.parents or (target.exists() and place in target.parents):
            raise ValueError(f"out must be another place than {name}, which it is made of, got {out}")


def _forget_torn(journal: Journal, work: Path, layers: Iterable[str]) -> None:
    """Take layers whose file is missing or changed out of what is done."""
    for name in layers:
        told = journal.done.get(name)
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
    told = {
        "file": path.name,
        "digest": digest_file(path),
        "ranks": list(ranks),
        "error": made.error,
        "size": size,
        "change": math.sqrt(size) / (float(np.linalg.norm(weight.astype(np.float64))) or 1.0),
    }
    if options.get("compare"):
        told["lora"] = list(low_rank(delta, num_parameters(delta.shape, ranks)))
    return told


def merge_tucker_adapter(
    base: Path | str,
    adapter: Path | str,
    out: Path | str,
    *,
    name: str = CONFIG,
    shard_bytes: int | None = None,
    workers: int | None = 1,
    engine: str = "local",
    address: str | None = None,
    verbose: bool = False,
) -> list[str]:
    """Add an adapter to the weights of a base checkpoint, without building the model; return the names that changed.

    For a model that is built, ``merge_and_unload`` does the same. In memory are, of each worker, the adapter and one of
    the layers that it changes; sums are in float64, and weights keep the dtype of the base. The same call goes on after
    an interrupt and ends in the same bytes, on any number of workers, each of which has one thread. One file is put
    together from shards in a hidden folder beside it, which takes as much space again until the end.
    Source: catalogue entry ``flora-nd``.

    Parameters
    ----------
    base : path or str
        As for :func:`extract_tucker_adapter`.
    adapter : path
        Folder that peft or :func:`extract_tucker_adapter` wrote.
    out : path
        A .safetensors file; or a folder of shards, beside which the base's configuration and tokenizer are put.
    name : str
        Of the configuration in that folder.
    shard_bytes : int, optional
        Size of the files in a folder; that of the largest tensor where not given.
    workers, engine, address
        As of :func:`polyspan.run.map_tasks`, over which shards go. Workers must see the files and the folder of
        ``out``.
    verbose : bool
        Show progress.

    Raises
    ------
    WrongContent
        The folder holds another kind of adapter, or one of a layer that the base does not have, or of another shape.
    UnreadableFile
        ``out`` is a folder of other files, or in a folder that is not there.
    ValueError
        A sum is too large for the base's dtype, or ``out`` would take the place of what is read.
    """
    source, folder = local_checkpoint(base, files=True), Path(adapter)
    _check_apart(Path(out), base=source, adapter=folder)
    return write_adapted(
        source, folder, Path(out), name=name, shard_bytes=shard_bytes, verbose=verbose, workers=workers,
        engine=engine, address=address,
    )  # fmt: skip


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
