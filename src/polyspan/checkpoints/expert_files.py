"""Merge the experts of a saved mixture-of-experts checkpoint, layer by layer; a killed run goes on where it was."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyspan.errors import TooLarge, UnreadableFile
from polyspan.io import digest_array, list_folder, make_folder, read_text, remove_file, write_json
from polyspan.run import Journal, Progress, available_memory_bytes, map_tasks, pick_device

from ._expert_export import EXPORTS, ExportPlan, check_exportable, tensor_facts, total_size, write_export
from ._expert_jobs import (
    Job,
    capture_layers,
    forget_torn,
    merge_task,
    perplexities,
    read_inputs,
    read_outcome,
    read_statistics,
    statistics_task,
)
from ._expert_layout import ExpertLayer, check_reducible
from ._expert_outcome import MergedLayer, Outcome, narrowed, wide_stack
from ._expert_stream import StreamedModel, text_pieces
from ._hub import local_checkpoint
from ._text_models import check_ids
from .expert_merging import RIVALS, ExpertMerger, ExpertMergeReport
from .merge_files import digests

JOURNAL = "merge.journal.jsonl"
REPORT = "expert_merge_report.json"
PRESETS = {"published": ExpertMerger.published, "recommended": ExpertMerger.recommended}
HELD_OUT = 8


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
    check_memory(stream, max_bytes)
    check_exportable(stream, export)
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
    shards = write_export(folder, plan, journal, shard_bytes, verbose=verbose)
    # The journal sorts names.
    perplexity = {name: found["ours"][name] for name in ("before", "after", "hf") if name in found["ours"]}
    comparison = {name: found["rivals"][name] for name in RIVALS if name in found["rivals"]}
    before, after = total_size(tensor_facts(stream)), total_size(plan.tensors)
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
            check_ids(name, given, stream.model)
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
