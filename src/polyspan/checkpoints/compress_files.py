"""Compress a checkpoint of any size layer by layer into a folder that loads back; a killed run goes on where it was."""

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyspan.errors import CorruptFile, UnreadableFile
from polyspan.io import ShardedState, digest_array, digest_file, list_folder, make_folder, write_json, write_tensor_file
from polyspan.run import Journal, map_tasks, pick_device

from ._calibration import find_layers, gather_grams, trace_sites, warn_of_few, weight_dtypes, weight_of
from ._compressed_files import (
    DENSE_STEM,
    SHARD_BYTES,
    STEM,
    copy_beside,
    model_config,
    read_layers,
    remove_files,
    stored_entries,
    write_layers,
    write_model,
)
from ._compression import (
    LayerReport,
    Unit,
    install,
    layer_reports,
    module_bytes,
    module_parameters,
    plan_units,
    put,
    reached,
    site_names,
    unit_grams,
    windows,
)
from ._expert_layout import expert_layers
from ._hub import local_checkpoint
from ._layer_methods import Settings, Sizes, check_settings, compress_unit, group_size, layer_config, named_method
from ._text_models import calibration_batches, check_ids, longest_context, open_model, perplexity
from .merge_files import digests

JOURNAL = "compress.journal.jsonl"
REPORT = "compression.json"
CONTEXT = 128
WORK = "work-"
FORMAT = 2
COMPARED = ("svd", "svd-llm", "asvd", "basis-sharing", "wanda", "magnitude")


class MethodReport(NamedTuple):
    """One way to compress the model: mean error of its layers, numbers and bytes of all tensors, perplexity.

    Where coefficients stand is in the bytes, and no number. Perplexity is None where it was not asked for, or is no
    finite number.
    """

    method: str
    mean_error: float
    parameters: int
    bytes: int
    perplexity: float | None


class CompressedFiles(NamedTuple):
    """What :func:`compress_checkpoint` wrote.

    Attributes
    ----------
    path : Path
    files : list of Path
        Weight files.
    layers : list of LayerReport
        Of the method; errors, sizes and bytes layer by layer.
    methods : list of MethodReport
        The model before ("dense"), the method, and what it was compared with.
    bytes_before, bytes_after : int
        True sizes of the weight files.
    resumed : int
        Units that an interrupted run had finished.
    """

    path: Path
    files: list[Path]
    layers: list[LayerReport]
    methods: list[MethodReport]
    bytes_before: int
    bytes_after: int
    resumed: int


class _Job(NamedTuple):
    """One unit by one method."""

    settings: Settings
    unit: Unit

    @property
    def key(self) -> str:
        return f"{self.settings.method}/{self.unit.name}"


def compress_checkpoint(
    model: Path | str,
    out: Path | str,
    *,
    calibration: Any,
    method: str = "sparse-dictionary",
    ratio: float | int | Mapping[str, float] = 0.3,
    evaluation: Tensor | None = None,
    rho: float | int = 2.0,
    groups: int = 1,
    targets: Sequence[str] | None = None,
    index_cost: str = "bitmask",
    coef_dtype: str | None = None,
    sequential: bool = False,
    compare: Sequence[str] = (),
    dense: bool = False,
    context: int | None = None,
    batch_size: int = 8,
    max_iter: int = 20,
    pursuit: str = "exchange",
    word_bytes: int | None = None,
    skip_bad_batches: bool = False,
    memory_bytes: int = 2**32,
    shard_bytes: int | None = None,
    device: Any = None,
    device_map: Any = None,
    seed: int = 0,
    workers: int | None = 1,
    engine: str = "local",
    address: str | None = None,
    verbose: bool = False,
) -> CompressedFiles:
    """Compress the projections of a Hugging Face checkpoint and write one that loads back in its compressed form.

    Weights are mapped, not read: in memory are activations, Gram matrices up to ``memory_bytes`` (as many passes over
    the text as that takes), and one unit of layers a worker. Each finished unit is on disk and journalled: the same
    call goes on after an interrupt, and ends in the same bytes. The weight file is called ``polyspan.safetensors``, so
    that transformers refuses it where polyspan is not loaded, instead of filling layers with chance;
    :func:`polyspan.integrations.load_compressed` reads it. Other small files of the folder are copied.
    Source: catalogue entry ``cospadi``.

    Parameters
    ----------
    model : path or str
        Folder of a checkpoint, or a model's name on the hub.
    out : path
        New, empty, or begun by the same call.
    calibration : path, Tensor of ids (n,) or (b, t), or sequence of batches
        A text file is tokenised by the model's own tokenizer; members of a .npz or .safetensors file are arguments of
        the model, one row an item. An encoder-decoder gets the first half of each piece of text, its decoder the rest.
    method : str
        "sparse-dictionary", "orthogonal", "threshold", or one of those of ``compare``.
    ratio, rho, groups, targets, index_cost, coef_dtype, sequential, max_iter, pursuit, word_bytes, skip_bad_batches,
    seed
        As of :class:`~polyspan.checkpoints.sparse_dictionary.SparseDictionaryCompressor`.
    evaluation : Tensor of ids (n,), optional
        Held-out text, two tokens or more, whose perplexity is measured before and after, for models that predict the
        next token.
    compare : sequence of {"svd", "svd-llm", "asvd", "basis-sharing", "wanda", "magnitude", ...}
        Methods measured beside at the same ratio, on the same Gram matrices; they are not written. ``coef_dtype`` is
        that of pruned weights too; factors of low rank stay in the model's own.
    dense : bool
        Write an ordinary checkpoint of dense weights, as large as the first, for programs that know nothing of this.
    context : int, optional
        Tokens of a piece of calibration or evaluation text; the model's longest, at most 128, where not given.
    batch_size : int
        Pieces at a time.
    memory_bytes : int
    shard_bytes : int, optional
        Largest weight file; an eighth of ``memory_bytes``, at most 512 MiB, where not given.
    device : device, optional
        Where the model is put for calibration and where layers are fitted; the CPU where not given.
    device_map : optional
        For ``from_pretrained`` instead: accelerate offloads what does not fit.
    workers, engine, address
        As of :func:`polyspan.run.map_tasks`, over which units go. Workers must see the folder ``out``.
    verbose : bool

    Raises
    ------
    UnreadableFile, CorruptFile, UntrustedFile, WrongContent, TooLarge
        See :mod:`polyspan.errors`; ``out`` holding other files is ``UnreadableFile``.
    ValueError
        An option is out of range or does not suit a layer, which is named; weights are quantised or compressed
        already; activations are not finite; or ``out`` was begun with other options.
    """
    folder, source = Path(out), local_checkpoint(model)
    main = Settings(named_method(method), float(rho), pursuit, index_cost, coef_dtype, word_bytes, max_iter, seed=seed)
    rivals = [main._replace(method=name) for name in dict.fromkeys(map(named_method, compare)) if name != main.method]
    for settings in (main, *rivals):
        check_settings(settings)
    if memory_bytes < 1 or (shard_bytes is not None and shard_bytes < 1):
        raise ValueError(f"memory_bytes and shard_bytes must be at least 1, got {memory_bytes} and {shard_bytes}")
    longest = longest_context(source)
    if context is None:
        context = min(CONTEXT, longest)
    if not 1 <= context <= longest:
        raise ValueError(f"context must be from 1 to {longest}, the most that the model takes, got {context}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    batches = calibration_batches(source, calibration, context=context, batch_size=batch_size)
    network = open_model(source, device_map=device_map)
    for batch in batches:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if isinstance(ids, Tensor):
            check_ids("calibration", ids, network)
    if evaluation is not None:
        if not network.can_generate():
            raise ValueError(f"evaluation must go with a model that predicts text, got a {type(network).__name__}")
        if evaluation.ndim != 1 or evaluation.is_floating_point() or len(evaluation) < 2:
            got = f"{tuple(evaluation.shape)} of {evaluation.dtype}"
            raise ValueError(f"evaluation must be token ids (n,) with n >= 2, got {got}")
        check_ids("evaluation", evaluation, network)
    stacks = expert_layers(network)
    if any(layer.fused for layer in stacks):
        warnings.warn(
            f"experts in {len(stacks)} layers, {stacks[0].name} first, stay as they are: merge_expert_checkpoint, or "
            "the method experts of the command, makes them fewer",
            UserWarning,
            stacklevel=2,
        )
    chosen = None if device is None else pick_device(device)
    if chosen is not None and device_map is None:
        network.to(chosen)
    limit = shard_bytes or max(1, min(SHARD_BYTES, memory_bytes // 8))
    methods = [main, *rivals]
    header = {
        "model": digests(source),
        "methods": [settings._asdict() for settings in methods],
        "ratio": list(map(list, ratio.items())) if isinstance(ratio, Mapping) else ratio,
        "groups": groups,
        "targets": None if targets is None else list(targets),
        "sequential": sequential,
        "skip_bad_batches": skip_bad_batches,
        "calibration": _digest(batches),
        "evaluation": None if evaluation is None else digest_array(evaluation.cpu().numpy()),
        "context": context,
        "batch_size": batch_size,
        "dense": dense,
        "shard_bytes": limit,
        "format": FORMAT,
    }
    options = _Options(
        ratio, groups, targets, sequential, skip_bad_batches, memory_bytes, chosen, verbose,
        {"workers": workers, "engine": engine, "address": address},
    )  # fmt: skip
    course = _Course(network, batches, methods, options)
    course.open(folder, header)
    course.run()
    measured = {"dense": course.perplexity("dense", evaluation, context)}
    files: list[Path] = []
    for settings in methods:
        told = course.install_all(settings)
        measured[settings.method] = course.perplexity(settings.method, evaluation, context)
        if settings is main:
            config = model_config(network, None if dense else told)
            entries = stored_entries(network, dense=dense)
            files = write_model(folder, entries, config, stem=DENSE_STEM if dense else STEM, shard_bytes=limit)
        course.take_out()
    whole = stored_entries(network).values()
    total, numbers = sum(entry.nbytes for entry in whole), sum(math.prod(entry.shape) for entry in whole)
    table = [MethodReport("dense", 0.0, numbers, total, measured["dense"])]
    for settings in methods:
        rows = course.reports(settings)
        size = total + sum(row.bytes_after - row.bytes_before for row in rows)
        table.append(
            MethodReport(
                settings.method, _mean(row.error for row in rows), numbers - course.numbers_saved(settings), size,
                measured[settings.method],
            )
        )  # fmt: skip
    layers = course.reports(main)
    copy_beside(source, folder)
    before = sum(path.stat().st_size for path in list_folder(source, "*.safetensors"))
    after = sum(path.stat().st_size for path in files)
    found = CompressedFiles(folder, files, layers, table, before, after, course.resumed)
    write_json(folder / REPORT, report_json(found))
    course.finish()
    left = [row.layer for row in layers if "calibration" in row.note]
    if left:
        warnings.warn(f"{len(left)} layers were not reached and stay dense: {left[0]}", UserWarning, stacklevel=2)
    return found


def report_json(found: CompressedFiles) -> dict[str, Any]:
    """Return a report in JSON types, without what differs from run to run."""
    return {
        "files": [path.name for path in found.files],
        "bytes_before": found.bytes_before,
        "bytes_after": found.bytes_after,
        "methods": [row._asdict() for row in found.methods],
        "layers": [row._asdict() for row in found.layers],
    }


class _Options(NamedTuple):
    """What a compression was asked for, besides its methods."""

    ratio: float | int | Mapping[str, float]
    groups: int
    targets: Sequence[str] | None
    sequential: bool
    skip_bad: bool
    memory_bytes: int
    device: Any
    verbose: bool
    tasks: dict[str, Any]


class _Course:
    """A compression under way: what is planned, what is done, and the files in which it lies."""

    folder: Path
    journal: Journal

    def __init__(self, network: Any, batches: list[Any], methods: list[Settings], options: _Options):
        self.network, self.batches, self.methods, self.options = network, batches, methods, options
        self.layers = find_layers(network, options.targets)
        self.sites = trace_sites(network, self.layers, batches)
        self.needed = site_names(self.sites, self.layers)
        self.widths = {layer.name: layer.d_in for layer in self.layers}
        self.dtypes = weight_dtypes(network, self.layers)
        self.tied = [layer for layer in self.layers if layer.tied_to is not None]
        self.before: dict[str, nn.Module] = {}
        self.units = {
            settings.method: plan_units(
                self.layers, self.sites, settings, options.ratio, group_size(settings.method, options.groups),
                self.dtypes,
            )
            for settings in methods
        }  # fmt: skip

    def open(self, folder: Path, header: dict[str, Any]) -> None:
        """Begin in a new folder, or go on in one that the same work has begun."""
        make_folder(folder)
        there = [entry.name for entry in list_folder(folder)]
        if there and JOURNAL not in there:
            raise UnreadableFile(
                folder, found=f"a folder with {there[0]}", expected="a new folder, or one of this compression"
            )
        self.folder, self.journal = folder, Journal(folder / JOURNAL, header)
        for key, value in list(self.journal.done.items()):
            if isinstance(value, dict) and "file" in value:
                path = folder / value["file"]
                if not path.is_file():
                    # Killed at the very end, while these were being removed: it is made once more.
                    del self.journal.done[key]
                elif digest_file(path) != value["digest"]:
                    raise CorruptFile(path, found="other bytes", expected=f"what {JOURNAL} recorded for {key}")
        self.resumed = sum("/" in key and not key.startswith("perplexity/") for key in self.journal.done)

    def run(self) -> None:
        """Compress every unit by every method; in sequence each method sees the model that it made itself."""
        memory, sequential = self.options.memory_bytes, self.options.sequential
        place = reached(self.sites, self.layers)
        for together in [[m] for m in self.methods] if sequential else [self.methods]:
            jobs = [
                _Job(settings, unit)
                for settings in together
                for unit in self.units[settings.method]
                if unit.sizes is not None
            ]
            jobs.sort(key=lambda job: place[job.unit.name])
            for part, _ in windows(jobs, self._sites_of, self.widths, memory, sequential=sequential):
                todo = [job for job in part if job.key not in self.journal.done]
                if todo:
                    self._compress(todo)
                if sequential:
                    for job in part:
                        self._install(job)
            self.take_out()

    def _sites_of(self, job: _Job) -> list[str]:
        return [site for layer in job.unit.layers for site in self.needed[layer.name]]

    def _compress(self, jobs: list[_Job]) -> None:
        names = dict.fromkeys(site for job in jobs for site in self._sites_of(job))
        found = gather_grams(
            self.network, {name: self.widths[name] for name in names}, self.batches, skip_bad=self.options.skip_bad,
            label="calibrating" if self.options.verbose else "",
        )  # fmt: skip
        warn_of_few(found)
        number = {layer.name: i for i, layer in enumerate(self.layers)}
        scratch: dict[Path, None] = {}
        items = []
        for job in jobs:
            grams = unit_grams(job.unit, self.needed, found)
            if grams is None:
                self.journal.record(job.key, {"note": "calibration shows it zeros only"})
                continue
            inputs = []
            for layer, gram in zip(job.unit.layers, grams, strict=True):
                path = self.folder / f"{WORK}input-{number[layer.name]}.safetensors"
                if path not in scratch:
                    weight = weight_of(self.network, layer)
                    write_tensor_file(path, {"weight": weight, "gram": gram})
                    scratch[path] = None
                inputs.append(str(path))
            assert job.unit.sizes is not None
            items.append(
                {
                    "key": job.key, "inputs": inputs, "names": [layer.name for layer in job.unit.layers],
                    "settings": job.settings._asdict(), "sizes": list(job.unit.sizes),
                    "out": str(self.folder / f"{WORK}{job.settings.method}-{number[job.unit.name]}.safetensors"),
                    "device": None if self.options.device is None else str(self.options.device),
                }
            )  # fmt: skip
        # A gram matrix lives on in its file only.
        found.grams.clear()
        map_tasks(
            _compress_item, items, journal=self.journal, key=lambda item: item["key"],
            label="compressing layers" if self.options.verbose else "", **self.options.tasks,
        )  # fmt: skip
        remove_files(list(scratch))

    def _install(self, job: _Job) -> dict[str, Any]:
        """Put a unit's finished layers into the model; return their configurations."""
        done = self.journal.done[job.key]
        if "note" in done:
            return {}
        modules = read_layers(self.folder / done["file"], done["configs"], self.dtypes[job.unit.name])
        assert [layer.name for layer in job.unit.layers] == list(modules)
        told = install(self.network, job.unit, list(modules.values()), self.tied)
        self.before |= told.pop("")
        return told

    def install_all(self, settings: Settings) -> dict[str, Any]:
        told: dict[str, Any] = {}
        for unit in self.units[settings.method]:
            if unit.sizes is not None:
                told |= self._install(_Job(settings, unit))
        return told

    def take_out(self) -> None:
        """Put the model's own layers back."""
        for name, module in self.before.items():
            put(self.network, name, module)
        self.before.clear()

    def perplexity(self, name: str, evaluation: Tensor | None, context: int) -> float | None:
        if evaluation is None:
            return None
        key = f"perplexity/{name}"
        if key not in self.journal.done:
            found = perplexity(self.network, evaluation, context=context)
            if not math.isfinite(found):
                warnings.warn(f"perplexity of {name} is {found} on the evaluation text", UserWarning, stacklevel=3)
            # JSON has no number for it.
            self.journal.record(key, found if math.isfinite(found) else None)
        return self.journal.done[key]

    def reports(self, settings: Settings) -> list[LayerReport]:
        rows: list[LayerReport] = []
        for unit in self.units[settings.method]:
            before = [layer.d_in * layer.d_out * self.dtypes[layer.name].itemsize for layer in unit.layers]
            done: dict[str, Any] = {"note": unit.note}
            if unit.sizes is not None:
                done = self.journal.done[_Job(settings, unit).key]
            if "note" in done:
                left = unit._replace(sizes=None, note=done["note"])
                rows += layer_reports(left, "", before, before, [0.0] * len(before))
            else:
                rows += layer_reports(
                    unit, settings.method, before, done["bytes"], done["errors"], ridge=done["ridge"],
                    sweeps=done["sweeps"],
                )  # fmt: skip
        return rows

    def numbers_saved(self, settings: Settings) -> int:
        """Return how many numbers fewer the model's tensors hold."""
        saved = 0
        for unit in self.units[settings.method]:
            done = {} if unit.sizes is None else self.journal.done[_Job(settings, unit).key]
            if "parameters" in done:
                saved += sum(layer.d_in * layer.d_out for layer in unit.layers) - sum(done["parameters"])
        return saved

    def finish(self) -> None:
        remove_files(list_folder(self.folder, f"{WORK}*.safetensors"))
        self.journal.remove()


def _compress_item(item: dict[str, Any]) -> dict[str, Any]:
    """Compress one unit from its input files into its own file; return what the journal keeps."""
    settings, out = Settings(**item["settings"]), Path(item["out"])
    states = [ShardedState(path) for path in item["inputs"]]
    device = torch.device(item["device"] or "cpu")
    weights, grams = ([state[name].to(device) for state in states] for name in ("weight", "gram"))
    found = compress_unit(weights, grams, Sizes(*item["sizes"]), settings, weights[0].dtype)
    modules = {name: layer.module for name, layer in zip(item["names"], found.layers, strict=True)}
    first = item["names"][0]
    write_layers(out, modules)
    return {
        "file": out.name,
        "digest": digest_file(out),
        "configs": {name: layer_config(m, owner=None if name == first else first) for name, m in modules.items()},
        "bytes": [module_bytes(module, shared=name != first) for name, module in modules.items()],
        "parameters": [module_parameters(module, shared=name != first) for name, module in modules.items()],
        "errors": [layer.error for layer in found.layers],
        "ridge": found.eps,
        "sweeps": found.sweeps,
    }


def _digest(batches: Sequence[Any]) -> str:
    total = hashlib.sha256()
    for batch in batches:
        for name, part in sorted(batch.items()) if isinstance(batch, Mapping) else [("", batch)]:
            total.update(
                name.encode() + (digest_array(part.cpu().numpy()) if isinstance(part, Tensor) else "").encode()
            )
    return total.hexdigest()


def _mean(values: Any) -> float:
    found = list(values)
    return math.fsum(found) / len(found) if found else 0.0
