"""Merge the experts of a saved mixture-of-experts checkpoint, layer by layer; a killed run goes on where it was."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyspan.errors import TooLarge, UnreadableFile, WrongContent
from polyspan.io import (
    TENSOR_CODES,
    digest_array,
    digest_file,
    list_folder,
    make_folder,
    read_json,
    read_text,
    remove_file,
    tensor_bytes,
    write_json,
    write_tensor_blocks,
)
from polyspan.run import Journal, Progress, available_memory_bytes, map_tasks, pick_device, progress

from ._expert_jobs import (
    Job,
    capture_layers,
    forget_torn,
    merge_task,
    outcome_state,
    perplexities,
    read_inputs,
    read_outcome,
    read_statistics,
    statistics_task,
)
from ._expert_layout import COUNTS, ExpertLayer, check_reducible, fused_parameters, reduced_router
from ._expert_stream import StreamedModel, text_pieces
from ._hub import local_checkpoint
from .expert_merging import RIVALS, ExpertMerger, ExpertMergeReport, MergedLayer, Outcome, narrowed, wide_stack
from .merge_files import copy_others, digests, plan_shards

JOURNAL = "merge.journal.jsonl"
REPORT = "expert_merge_report.json"
EXPORTS = ("merged", "hf", "hf-repeated")
PRESETS = {"published": ExpertMerger.published, "recommended": ExpertMerger.recommended}
QUANT_METHOD = "polyspan_merged_experts"
HELD_OUT = 8
MAPS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
EXPERT = re.compile(
    r"^(?P<stem>.*\.experts)\.(?:(?P<j>\d+)\.)?(?P<map>gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)"
    r"(?P<kind>\.weight|\.bias|_bias)?$"
)


class ExpertCheckpoint(NamedTuple):
    """What :func:`merge_expert_checkpoint` wrote and measured.

    Attributes
    ----------
    path : Path
    shards : list of Path
    export : str
    report : ExpertMergeReport
        By layer: groups, frequencies, similarity, parameters, bytes, error of the layer's output.
    similarity : dict of str to ndarray of shape (n, n)
        Mean cosine of the experts' outputs, by layer.
    parameters, parameters_after : int
        Of the checkpoint.
    bytes, bytes_after : int
        Of its tensors.
    tokens : int
        That calibrated.
    perplexity : dict of str to float
        On the text for evaluation: "before", "after" with the router as it was, and with export "hf" also "hf", whose
        router rows are averaged.
    comparison : dict of str to float
        Perplexity of other ways to as many experts, by name; empty unless asked for.
    left_out : dict of str to str
        Why a way is not in the comparison.
    resumed : int
        Pieces of work that an interrupted run had finished.
    """

    path: Path
    shards: list[Path]
    export: str
    report: ExpertMergeReport
    similarity: dict[str, np.ndarray]
    parameters: int
    parameters_after: int
    bytes: int
    bytes_after: int
    tokens: int
    perplexity: dict[str, float]
    comparison: dict[str, float]
    left_out: dict[str, str]
    resumed: int


def merge_expert_checkpoint(
    model: Path | str,
    out: Path | str,
    *,
    calibration: Path | str | Tensor,
    experts: int | None = None,
    keep_ratio: float | int = 0.5,
    preset: str = "recommended",
    export: str = "merged",
    compare: bool = False,
    evaluation: Path | str | Tensor | None = None,
    length: int | None = None,
    samples: int | None = 128,
    batch_size: int = 8,
    shard_bytes: int | None = None,
    max_bytes: int | None = None,
    device: Any = "cpu",
    workers: int = 1,
    engine: str = "local",
    address: str | None = None,
    verbose: bool = False,
    **options: Any,
) -> ExpertCheckpoint:
    """Merge the experts of a checkpoint into fewer, with one layer's weights in memory at a time.

    Calibration runs through the model layer by layer, and what reaches the experts is kept in ``out`` until the end.
    Then statistics and merges of the layers are independent tasks, and tensors are written one after the other. The
    same call goes on after an interrupt, and ends in the same bytes.
    Source: catalogue entry ``sub-moe``.

    Parameters
    ----------
    model : path or str
        Folder of a checkpoint of transformers, or its name on the Hub.
    out : path
        A folder: new, empty, or one that the same merge has begun.
    calibration : path, or Tensor of shape (b, t)
        A text file, cut into ``samples`` pieces of ``length`` tokens, or ids.
    experts, keep_ratio
        As of :class:`ExpertMerger`.
    preset : {"recommended", "published"}
    export : {"merged", "hf", "hf-repeated"}
        ``"merged"``: k experts and an index behind the router as it was: exact, but read by
        :func:`polyspan.integrations.load_merged_experts` only. ``"hf"``: a plain checkpoint of k experts, whose router
        rows are averaged in each group: approximate. ``"hf-repeated"``: all n experts, with repeated weights: plain and
        exact, and no smaller.
    compare : bool
        Measure the perplexity of the other ways, in :data:`RIVALS`, too.
    evaluation : path, or Tensor of shape (b, t), optional
        For perplexity, ``samples`` pieces at most; where not given, every eighth piece of the calibration is held out
        for it.
    length : int, optional
        Tokens a piece; where not given, what the model can see, at most 2,048.
    samples : int or None
        Pieces of each text at most; None takes all.
    batch_size : int
        Pieces at once.
    shard_bytes : int, optional
        Size that a shard does not exceed unless one tensor does; the largest tensor's where not given.
    max_bytes : int, optional
        Memory that one layer may take; what is free where not given.
    device : device
        "auto" takes a GPU where there is one.
    workers, engine, address
        As of :func:`polyspan.run.map_tasks`: layers are fanned out.
    **options
        Further settings of :class:`ExpertMerger`.

    Raises
    ------
    MissingExtra
        transformers is not installed.
    UnreadableFile, CorruptFile, WrongContent, TooLarge
        See :mod:`polyspan.errors`; quantised checkpoints are ``WrongContent``, ``out`` holding other files is
        ``UnreadableFile``, and a layer that does not fit ``TooLarge``.
    ValueError
        An option is outside its range, the model has no experts, or its form cannot be exported as asked.
    """
    for name, value, allowed in (("preset", preset, tuple(PRESETS)), ("export", export, EXPORTS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    for name, number in (
        ("batch_size", batch_size),
        ("length", length),
        ("samples", samples),
        ("shard_bytes", shard_bytes),
    ):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    merger = PRESETS[preset](experts, keep_ratio=keep_ratio, **options)
    merger.check()
    if merger.pruning is not None and export != "hf":
        raise ValueError(f"export must be 'hf' where experts are dropped, got {export!r}")
    if merger.allocation == "adaptive" and export == "hf":
        raise ValueError("export 'hf' must have as many experts in every layer, got adaptive allocation")
    path, folder = local_checkpoint(model), Path(out)
    stream = StreamedModel(path, _device(device))
    merger.targets([layer.n_experts for layer in stream.experts], [layer.top_k for layer in stream.experts])
    if export == "hf":
        for layer in stream.experts:
            check_reducible(layer)
    check_memory(stream, max_bytes)
    calibrating, scored = _texts(path, stream, calibration, evaluation, length, samples)
    job = Job(str(path), str(folder), merger.options(), str(stream.device))
    header = {
        "model": digests(path), "options": job.options, "calibration": digest_array(calibrating.numpy()),
        "evaluation": digest_array(scored.numpy()), "batch_size": batch_size, "export": export, "compare": compare,
        "shard_bytes": shard_bytes,
    }  # fmt: skip
    journal = _begin(folder, header)
    resumed = len(journal.done)
    numbers = stream.numbers
    with Progress("calibration", max(numbers) + 1, enabled=verbose) as shown:
        capture_layers(job, stream, calibrating, batch_size, journal, shown)
    fan: dict[str, Any] = {"workers": workers, "engine": engine, "address": address, "journal": journal}
    forget_torn(job, journal, "statistics", "statistics", numbers)
    label = "statistics" if verbose else ""
    map_tasks(partial(statistics_task, job), numbers, key=lambda i: f"statistics/{i}", label=label, **fan)
    names = {number: layer.name for number, layer in zip(numbers, stream.experts, strict=True)}
    statistics = {names[number]: read_statistics(job, number) for number in numbers}
    groups = merger.group(statistics, [layer.top_k for layer in stream.experts])
    forget_torn(job, journal, "merge", "merged", numbers)
    items = [(number, groups[names[number]].tolist()) for number in numbers]
    label = "merging" if verbose else ""
    made = map_tasks(partial(merge_task, job), items, key=lambda item: f"merge/{item[0]}", label=label, **fan)
    reports = [_read_report(m["report"]) for m in made]
    labels = {number: report.groups for number, report in zip(numbers, reports, strict=True)}
    if "perplexity" not in journal.done:
        with Progress("perplexity", len(stream.layers), enabled=verbose) as shown:
            told = _measured(job, stream, statistics, labels, scored, batch_size, export, compare, journal, shown)
        journal.record("perplexity", told)
    found = journal.done["perplexity"]
    plan = ExportPlan(job, stream, labels, export)
    shards = _write_shards(folder, plan, journal, shard_bytes, verbose)
    # The journal sorts names.
    perplexity = {name: found["ours"][name] for name in ("before", "after", "hf") if name in found["ours"]}
    comparison = {name: found["rivals"][name] for name in RIVALS if name in found["rivals"]}
    before, after = _size(_facts(stream)), _size(plan.tensors)
    result = ExpertCheckpoint(
        folder, shards, export, ExpertMergeReport(reports), {name: s.gram for name, s in statistics.items()}, before[0],
        after[0], before[1], after[1], calibrating.numel(), perplexity, comparison, found["left_out"], resumed,
    )  # fmt: skip
    write_json(folder / REPORT, report_json(result))
    for entry in list_folder(folder, "work-*.safetensors"):
        remove_file(entry)
    journal.remove()
    return result


def _device(device: Any) -> torch.device:
    """Return a device with float64, in which sums and solutions are."""
    chosen = pick_device(device)
    if chosen.type != "mps":
        return chosen
    if device == "auto":
        return torch.device("cpu")
    raise ValueError("device must compute in float64, got mps, which does not")


def _read_report(told: dict[str, Any]) -> MergedLayer:
    return MergedLayer(**told)._replace(error=math.nan if told["error"] is None else told["error"])


def report_json(found: ExpertCheckpoint) -> dict[str, Any]:
    """Return a report as JSON types, without where and how it was run; errors of dropped experts, NaN, are null."""
    layers = [
        {**layer._asdict(), "error": None if math.isnan(layer.error) else layer.error} for layer in found.report.layers
    ]
    told = {name: value for name, value in found._asdict().items() if name not in ("path", "resumed")}
    told |= {
        "shards": [path.name for path in found.shards],
        "report": layers,
        "similarity": {name: gram.round(6).tolist() for name, gram in found.similarity.items()},
    }
    return told


def check_memory(stream: StreamedModel, max_bytes: int | None) -> None:
    """Compare what a layer takes, three times its experts in float32, with what is there.

    Raises
    ------
    TooLarge
        It is more.
    """
    budget = available_memory_bytes() if max_bytes is None else max_bytes
    for layer in stream.experts:
        needed = 3 * 4 * sum(p.numel() for p in layer.experts.parameters())
        if needed > budget:
            raise TooLarge(
                stream.path,
                found=f"experts that take {needed:,} bytes",
                expected=f"at most {budget:,}",
                where=layer.name,
            )


def _texts(
    path: Path, stream: StreamedModel, calibration: Any, evaluation: Any, length: int | None, samples: int | None
) -> tuple[Tensor, Tensor]:
    """Return ids for calibration and for evaluation."""
    sees = getattr(stream.config, "max_position_embeddings", None) or 2048
    length = min(2048, sees) if length is None else length

    def ids(given: Any, name: str, most: int | None) -> Tensor:
        if isinstance(given, Tensor):
            if given.ndim != 2 or given.is_floating_point() or 0 in given.shape or given.shape[1] < 2:
                raise ValueError(f"{name} must be ids (b, t) with t >= 2, got {tuple(given.shape)} of {given.dtype}")
            known = stream.model.get_input_embeddings().num_embeddings
            if int(given.min()) < 0 or int(given.max()) >= known:
                raise ValueError(
                    f"{name} must hold ids from 0 to {known - 1}, got {int(given.min())} to {int(given.max())}"
                )
            return given.cpu().long()
        return text_pieces(path, read_text(given), length, most)

    first = ids(calibration, "calibration", samples)
    if evaluation is not None:
        return first, ids(evaluation, "evaluation", samples)
    if len(first) < 2:
        raise ValueError(f"calibration must hold two pieces or more, or evaluation be given, got {len(first)}")
    held = torch.arange(len(first)) % HELD_OUT == min(HELD_OUT, len(first)) - 1
    return first[~held], first[held]


def _begin(folder: Path, header: dict[str, Any]) -> Journal:
    make_folder(folder)
    there = [entry.name for entry in list_folder(folder)]
    if there and JOURNAL not in there:
        raise UnreadableFile(folder, found=f"a folder with {there[0]}", expected="a new folder, or one of this merge")
    return Journal(folder / JOURNAL, header)


def _measured(
    job: Job,
    stream: StreamedModel,
    statistics: Mapping[str, Any],
    labels: Mapping[int, list[int]],
    ids: Tensor,
    batch_size: int,
    export: str,
    compare: bool,
    journal: Journal,
    shown: Progress,
) -> dict[str, Any]:
    """Return the perplexity before and after, and that of the rivals with why some are missing, as JSON types."""

    def ours(number: int, layer: ExpertLayer, *, reduced: bool = False) -> Outcome:
        like = layer.stack()
        found = read_outcome(job, number, labels[number], like)
        return found.map(lambda part: part.to(like.up.device))._replace(reduced=reduced)

    arms: dict[str, Any] = {"before": None, "after": ours}
    if export == "hf" and job.merger.pruning is None:
        arms["hf"] = partial(ours, reduced=True)
    left_out, rivals, same = {}, {}, []
    for name, settings in RIVALS.items() if compare else ():
        merger = ExpertMerger(
            job.merger.n_experts, keep_ratio=job.merger.keep_ratio, batch_tokens=job.merger.batch_tokens,
            random_state=job.merger.random_state, **settings,
        )  # fmt: skip
        if merger.options() == job.options:
            same.append(name)
            continue
        try:
            if merger.pruning is not None:
                for layer in stream.experts:
                    check_reducible(layer)
            groups = merger.group(statistics, [layer.top_k for layer in stream.experts])
        except ValueError as error:
            left_out[name] = str(error)
            continue
        rivals[name] = partial(_rival, job, merger, statistics, groups)
    found = perplexities(job, stream, ids, batch_size, {**arms, **rivals}, journal, shown)
    return {
        "ours": {name: found[name] for name in arms},
        "rivals": {**{name: found[name] for name in rivals}, **dict.fromkeys(same, found["after"])},
        "left_out": left_out,
    }


def _rival(job: Job, merger: ExpertMerger, statistics: Any, groups: Any, number: int, layer: ExpertLayer) -> Outcome:
    inputs = read_inputs(job, number)
    made = merger.combined(layer.name, wide_stack(layer), groups[layer.name], statistics[layer.name], inputs)
    return narrowed(made, layer.stack().up.dtype)


def _facts(stream: StreamedModel) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of the checkpoint."""
    return {name: (stream.state.dtype(name), stream.state.shape(name)) for name in stream.state}


def _size(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[int, int]:
    """Return the number of parameters and of bytes."""
    counts = {name: math.prod(shape) for name, (_, shape) in tensors.items()}
    return sum(counts.values()), sum(n * tensors[name][0].itemsize for name, n in counts.items())


class ExportPlan:
    """The tensors of an exported checkpoint, each made when it is asked for.

    Parameters
    ----------
    labels : mapping of int to list of int
        Groups of the experts, by number of the layer.
    """

    def __init__(self, job: Job, stream: StreamedModel, labels: Mapping[int, list[int]], export: str):
        self.job, self.stream, self.labels, self.export = job, stream, labels, export
        self._held: tuple[int, dict[str, Tensor]] | None = None
        self._places: dict[str, int] = {}
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        made: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for number in stream.numbers:
            parts = self._layer(number)
            self._places |= dict.fromkeys(parts, number)
            made |= {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
        for name, facts in _facts(stream).items():
            expert = stream.number_of(name) in stream.numbers and EXPERT.match(name)
            if name not in made and not expert:
                self.tensors[name] = facts
        self.tensors |= made

    def __call__(self, name: str) -> Iterable[Tensor]:
        """Return a tensor in blocks."""
        if name not in self._places:
            return (self.stream.state[name],)
        number = self._places[name]
        if self._held is None or self._held[0] != number:
            self._held = (number, self._layer(number))
        return (self._held[1][name],)

    def _layer(self, number: int) -> dict[str, Tensor]:
        """Return the tensors that take the place of a layer's experts, and of its router where rows change."""
        layer = self.stream.expert_layer(number)
        assert layer is not None
        groups = self.labels[number]
        outcome = read_outcome(self.job, number, groups, layer.stack())
        if self.export == "merged":
            state = {**outcome_state(outcome), "groups": torch.tensor(groups)}
            return {f"{layer.name}.{name}": part for name, part in state.items()}
        own = [name for name in self.stream.state if self.stream.number_of(name) == number and EXPERT.match(name)]
        if not own:
            raise WrongContent(
                self.stream.path, found="experts under names that are not known", expected=layer.name, where=layer.name
            )
        stack = outcome.stack.take(groups) if self.export == "hf-repeated" else outcome.stack
        made: dict[str, Tensor] = {}
        fused: dict[str, Tensor] = {}
        for name in own:
            match = EXPERT.match(name)
            assert match is not None
            kind = match["kind"] or ""
            if match["j"] is None:
                fused = fused or fused_parameters(stack, layer.experts)
                made[name] = fused[match["map"] + kind]
                continue
            part = stack.parts[MAPS[match["map"]] + ("_bias" if kind == ".bias" else "")]
            if int(match["j"]) < len(part):
                made[name] = part[int(match["j"])]
        if self.export == "hf":
            made |= self._router(number, layer, outcome, own[0])
        return made

    def _router(self, number: int, layer: ExpertLayer, outcome: Outcome, expert: str) -> dict[str, Tensor]:
        match = EXPERT.match(expert)
        assert match is not None
        stem = match["stem"].removesuffix("experts")
        router = next(name for name, module in layer.block.named_children() if module is layer.router)
        with self.stream.loaded(number):
            rows = reduced_router(layer, outcome.router_rows())
        made = {f"{stem}{router}.{name}": part for name, part in rows.items()}
        missing = [name for name in made if name not in self.stream.state]
        if missing:
            raise WrongContent(self.stream.path, found="a router under another name", expected=missing[0])
        # A router that the file keeps wider than the experts stays so.
        return {name: part.to(self.stream.state.dtype(name)) for name, part in made.items()}

    def config(self) -> dict[str, Any]:
        """Return the configuration of the exported checkpoint.

        Raises
        ------
        WrongContent
            It does not say how many experts there are.
        """
        path = self.stream.path / "config.json"
        config = read_json(path)
        if self.export == "hf-repeated":
            return config
        if self.export == "merged":
            layers = {}
            for number, groups in self.labels.items():
                layer = self.stream.expert_layer(number)
                assert layer is not None
                ranks = {
                    name.rpartition(".")[2].removesuffix("_left"): shape[-1]
                    for name, (_, shape) in self.tensors.items()
                    if name.startswith(f"{layer.name}.") and name.endswith("_left")
                }
                layers[layer.name] = {
                    "num_experts": len(groups), "num_groups": max(groups) + 1, "ranks": ranks or None,
                }  # fmt: skip
            return {**config, "quantization_config": {"quant_method": QUANT_METHOD, "layers": layers}}
        n = self.stream.experts[0].n_experts
        named = [name for name in COUNTS if config.get(name) == n]
        if not named:
            raise WrongContent(path, found=f"none of {', '.join(COUNTS)} that is {n}", expected="the number of experts")
        return {**config, **dict.fromkeys(named, max(next(iter(self.labels.values()))) + 1)}


def _write_shards(
    folder: Path, plan: ExportPlan, journal: Journal, shard_bytes: int | None, verbose: bool
) -> list[Path]:
    """Write configuration, other small files, shards and, last, their index."""
    write_json(folder / "config.json", plan.config())
    copy_others(plan.stream.path, folder)
    # A plain reader that knows nothing of merged experts finds no model.safetensors, and says so.
    stem = "polyspan" if plan.export == "merged" else "model"
    parts = list(plan_shards(plan.tensors, shard_bytes))
    files = [f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = [f"{stem}.safetensors"]
    for file, names in progress(list(zip(files, parts, strict=True)), label="writing", enabled=verbose):
        if file in journal.done and (folder / file).is_file() and digest_file(folder / file) == journal.done[file]:
            continue
        facts = {name: (TENSOR_CODES[plan.tensors[name][0]], plan.tensors[name][1]) for name in names}
        write_tensor_blocks(folder / file, facts, _blocks(plan, names), {"format": "pt"})
        journal.record(file, digest_file(folder / file))
    if len(parts) > 1:
        placed = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        total = {"total_size": _size(plan.tensors)[1]}
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": total, "weight_map": placed})
    return [folder / file for file in files]


def _blocks(plan: ExportPlan, names: list[str]) -> Iterator[memoryview]:
    for name in names:
        for block in plan(name):
            yield tensor_bytes(block)
