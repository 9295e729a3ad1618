"""The work on one layer of a saved model of experts, as functions of paths and numbers that any process can run."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyspan.io import ShardedState, digest_file, read_members, remove_file, write_members, write_tensor_file
from polyspan.run import Journal, Progress

from ._expert_capture import Capture, LayerInputs
from ._expert_combining import LowRank
from ._expert_layout import ExpertLayer, ExpertStack, put_module
from ._expert_outcome import Outcome, in_bytes, install, layer_report, narrowed, wide_stack
from ._expert_statistics import ExpertStatistics, expert_statistics
from ._expert_stream import StreamedModel
from .expert_merging import ExpertMerger


class Job(NamedTuple):
    """A checkpoint, the folder of intermediate files, the settings of :class:`ExpertMerger`, and a device."""

    model: str
    folder: str
    options: dict[str, Any]
    device: str

    def file(self, kind: str, number: int) -> Path:
        return Path(self.folder) / f"work-{kind}-{number}.safetensors"

    @property
    def merger(self) -> ExpertMerger:
        return ExpertMerger(**self.options)


def _written(path: Path, state: dict[str, Tensor]) -> str:
    """Write an intermediate file, and return the digest of all of it, which the journal keeps."""
    return digest_file(write_tensor_file(path, state, digests=False))


def capture_layers(
    job: Job, stream: StreamedModel, ids: Tensor, batch_size: int, journal: Journal, shown: Progress
) -> None:
    """Run calibration ids (b, t) through the model and keep what reaches each layer's experts in files."""
    last, batches = max(stream.numbers), ids.split(batch_size)
    first = 0
    while first <= last and _is_done(job, journal, first, stream):
        first += 1
    if first > last:
        return
    if first and not job.file("hidden", first).is_file():
        # A piece in the middle was lost, and what led to it is no longer kept.
        first = 0
    if first:
        kept = ShardedState(job.file("hidden", first))
        hidden = [kept[str(i)] for i in range(len(batches))]
    else:
        hidden = [stream.embed(batch).cpu() for batch in batches]
    shown.advance(first)
    for number in range(first, last + 1):
        layer = stream.expert_layer(number)
        capture = Capture([layer] if layer else [])
        with stream.loaded(number), capture.attached():
            hidden = [stream.run_layer(number, batch, x).cpu() for batch, x in zip(batches, hidden, strict=True)]
        facts = {}
        if layer:
            found = capture.take(layer.name)
            facts["inputs"] = _written(job.file("inputs", number), found._asdict())
        after = job.file("hidden", number + 1)
        facts["hidden"] = _written(after, {str(i): x for i, x in enumerate(hidden)})
        journal.record(f"capture/{number}", facts)
        remove_file(job.file("hidden", number))
        shown.advance()


def _is_done(job: Job, journal: Journal, number: int, stream: StreamedModel) -> bool:
    """Say whether a layer was captured, its file is whole, and the work after it can go on from files."""
    facts = journal.done.get(f"capture/{number}")
    if facts is None or ("inputs" in facts and not _is_whole(job.file("inputs", number), facts["inputs"])):
        return False
    if f"capture/{number + 1}" in journal.done or number == max(stream.numbers):
        return True
    return _is_whole(job.file("hidden", number + 1), facts["hidden"])


def _is_whole(path: Path, digest: str) -> bool:
    return path.is_file() and digest_file(path) == digest


def forget_torn(job: Job, journal: Journal, kind: str, file: str, numbers: Sequence[int]) -> None:
    """Take pieces whose file is missing or changed out of what is done."""
    for number in numbers:
        facts = journal.done.get(f"{kind}/{number}")
        if facts is not None and not _is_whole(job.file(file, number), facts["digest"]):
            del journal.done[f"{kind}/{number}"]


def read_inputs(job: Job, number: int) -> LayerInputs:
    state = ShardedState(job.file("inputs", number))
    return LayerInputs(state["x"], state["gates"])


def read_statistics(job: Job, number: int) -> ExpertStatistics:
    return ExpertStatistics.from_members(read_members(job.file("statistics", number)))


def statistics_task(job: Job, number: int) -> dict[str, str]:
    """Gather the statistics of one layer, and keep them in a file."""
    stream = StreamedModel(job.model, job.device, layers_only=True)
    layer = stream.expert_layer(number)
    assert layer is not None
    with stream.loaded(number):
        found = expert_statistics(
            wide_stack(layer), read_inputs(job, number), layer.router_weight, batch_tokens=job.merger.batch_tokens
        )
    path = job.file("statistics", number)
    write_members(path, found.members())
    return {"digest": digest_file(path)}


def merge_task(job: Job, item: tuple[int, list[int]]) -> dict[str, Any]:
    """Make the experts of one layer's groups, keep them in a file, and return the layer's report."""
    number, labels = item
    stream = StreamedModel(job.model, job.device, layers_only=True)
    layer = stream.expert_layer(number)
    assert layer is not None
    statistics, inputs = read_statistics(job, number), read_inputs(job, number)
    with stream.loaded(number):
        stack, dtype = wide_stack(layer), layer.stack().up.dtype
        outcome = job.merger.combined(layer.name, stack, np.asarray(labels), statistics, inputs)
        report = layer_report(layer.name, stack, outcome, statistics, inputs, job.merger.batch_tokens)
        path = write_tensor_file(job.file("merged", number), outcome_state(narrowed(outcome, dtype)), digests=False)
    told = in_bytes(report, dtype)._asdict()
    # JSON has no NaN.
    told["error"] = None if outcome.dropped else told["error"]
    return {"digest": digest_file(path), "report": told}


def outcome_state(outcome: Outcome) -> dict[str, Tensor]:
    """Return an outcome's tensors by the names that :class:`MergedExperts` has for them."""
    parts = outcome.stack.parts
    if outcome.factors is None:
        return parts
    made = {name: part for name, part in parts.items() if name.endswith("bias")}
    for side, held in zip(("left", "right"), outcome.factors, strict=True):
        made |= {f"{name}_{side}": part for name, part in held.items()}
    return made


def read_outcome(job: Job, number: int, groups: Sequence[int], like: ExpertStack) -> Outcome:
    """Return what :func:`merge_task` kept, in the kind of experts that ``like`` has; the file stays mapped."""
    state = ShardedState(job.file("merged", number))
    parts: dict[str, Any] = {"gate": None, **{name: state[name] for name in state if name in like.parts}}
    factors = None
    if any(name.endswith("_left") for name in state):
        maps = [name for name in ("gate", "up", "down") if name in like.parts]
        factors = LowRank(*({name: state[f"{name}_{side}"] for name in maps} for side in ("left", "right")))
        parts |= {name: factors.dense(name) for name in maps}
    return Outcome(ExpertStack(activation=like.activation, **parts), factors, np.asarray(groups))


@contextmanager
def installed(model: torch.nn.Module, layer: ExpertLayer, outcome: Outcome) -> Generator[None]:
    """Have an outcome in a layer's place inside the block."""
    holders = [layer.block] if layer.router is None else [layer.block, layer.router]
    plain = [{k: v for k, v in vars(holder).items() if isinstance(v, int)} for holder in holders]
    routers = [] if layer.router is None else list(layer.router.modules())
    held = [(dict(module._parameters), dict(module._buffers)) for module in routers]
    try:
        install(model, layer, outcome)
        yield
    finally:
        put_module(model, layer.name, layer.experts)
        for module, (parameters, buffers) in zip(routers, held, strict=True):
            module._parameters, module._buffers = parameters, buffers
        for holder, values in zip(holders, plain, strict=True):
            vars(holder).update(values)


def perplexities(
    job: Job,
    stream: StreamedModel,
    ids: Tensor,
    batch_size: int,
    arms: Mapping[str, Any],
    journal: Journal,
    shown: Progress,
) -> dict[str, float]:
    """Return the perplexity on ids (b, t) of the model as it is and with each arm's experts, in one pass over layers.

    An arm is ``outcome(number, layer) -> Outcome``, or None for the model as it is. What leaves a layer is kept in a
    file, so that a killed pass goes on after the last one.
    """
    batches, layers = ids.split(batch_size), range(len(stream.layers))
    first = next((n + 1 for n in reversed(layers) if _scored(job, journal, n)), 0)
    if first:
        kept = ShardedState(job.file("scored", first))
        hidden = {arm: [kept[f"{i}.{j}"] for j in range(len(batches))] for i, arm in enumerate(arms)}
    else:
        embedded = [stream.embed(batch).cpu() for batch in batches]
        hidden = {arm: embedded for arm in arms}  # noqa: C420 - no arm writes to the list they begin with
    shown.advance(first)
    for number in layers[first:]:
        layer = stream.expert_layer(number)
        with stream.loaded(number):
            for arm, outcome in arms.items():
                if layer is None or outcome is None:
                    hidden[arm] = _run(stream, number, batches, hidden[arm])
                    continue
                with installed(stream.model, layer, outcome(number, layer)):
                    hidden[arm] = _run(stream, number, batches, hidden[arm])
        state = {f"{i}.{j}": x for i, arm in enumerate(arms) for j, x in enumerate(hidden[arm])}
        journal.record(f"scored/{number}", {"digest": _written(job.file("scored", number + 1), state)})
        remove_file(job.file("scored", number))
        shown.advance()
    predicted = len(ids) * (ids.shape[1] - 1)
    losses = {
        arm: sum(stream.loss(batch, x) for batch, x in zip(batches, states, strict=True)) / predicted
        for arm, states in hidden.items()
    }
    return {arm: float(np.exp(loss)) for arm, loss in losses.items()}


def _scored(job: Job, journal: Journal, number: int) -> bool:
    facts = journal.done.get(f"scored/{number}")
    return facts is not None and _is_whole(job.file("scored", number + 1), facts["digest"])


def _run(stream: StreamedModel, number: int, batches: Sequence[Tensor], hidden: Sequence[Tensor]) -> list[Tensor]:
    return [stream.run_layer(number, batch, x).cpu() for batch, x in zip(batches, hidden, strict=True)]
