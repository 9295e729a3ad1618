"""What an extracted adapter is worth: perplexities beside base, tuned model and LoRA, and what LoRA leaves out."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyspan.io import ShardedState, digest_file, dump_json, remove_folder
from polyspan.run import Journal, Progress

from ._merge_states import row_blocks, rows_of
from ._text_models import open_model, perplexity
from ._tucker_merging import write_adapted
from .merge_files import ALONE, merge_checkpoints, write_shards
from .merge_recipes import MergeRecipe
from .merge_scores import Scoring, plan_scoring

TUNED = "tuned"


class LowRank(NamedTuple):
    """LoRA's form of an update: its rank, its parameters, and the share of the squared norm that it leaves out."""

    rank: int
    parameters: int
    error: float


def low_rank(delta: Tensor, parameters: int) -> LowRank:
    """Return the best that LoRA can do with so many parameters: the truncated SVD of the update as a matrix.

    The matrix (m, n) has the first axis as rows, as LoRA takes it, and its rank r costs r (m + n) parameters. The rank
    is the largest that fits, but 1 where none does: LoRA then has more parameters than it was given.
    """
    matrix = delta.detach().flatten(1).to(torch.float64)
    per_rank = sum(matrix.shape)
    rank = min(max(1, parameters // per_rank), *matrix.shape)
    s2 = torch.linalg.svdvals(matrix).square()
    return LowRank(rank, rank * per_rank, float(s2[rank:].sum() / s2.sum()) if bool(s2.any()) else 0.0)


def low_rank_delta(delta: Tensor, rank: int) -> Tensor:
    """Return an update with all but the leading singular values of its matrix left out, in float64."""
    U, s, Vh = torch.linalg.svd(delta.flatten(1).to(torch.float64), full_matrices=False)
    return ((U[:, :rank] * s[:rank]) @ Vh[:rank]).reshape(delta.shape)


def plan_evaluation(
    base: Path, tuned: Path, text: Path | str, *, context: int | None, max_tokens: int | None, device: Any
) -> Scoring:
    """Look at all that perplexities need before any layer is decomposed; errors as of :func:`plan_scoring`."""
    recipe = MergeRecipe("average", base, {TUNED: tuned}, {}, None, {}, {}, "", [])
    return plan_scoring(recipe, {"text": text}, context=context, max_tokens=max_tokens, device=device)


def adapter_perplexities(
    scoring: Scoring,
    work: Path,
    text: Path | str,
    journal: Journal,
    *,
    lora: Mapping[str, int] | None,
    saved: Sequence[str],
    verbose: bool = False,
) -> dict[str, float]:
    """Return perplexities of base, tuned model, base with the adapter in ``work``, and base with LoRA where asked.

    One network is in memory at a time; what has to be merged for it is a folder in ``work`` for as long. What was
    measured is in the journal.

    Parameters
    ----------
    lora : mapping of str to int, optional
        Rank of each weight.
    saved : sequence of str
        Tensors that adapters keep whole.
    """
    base, tuned = scoring.base, scoring.models[TUNED]
    measured = work / "measured"

    def merged_tuned() -> None:
        # An average of one is that one: bare weights beside the base's files.
        merge_checkpoints(base, {TUNED: tuned}, measured, method="average")

    def with_adapter() -> None:
        write_adapted(
            base, work / "adapter", measured, name="adapter_config.json", shard_bytes=None, verbose=False, **ALONE
        )

    def with_lora() -> None:
        _write_low_rank(base, tuned, measured, lora or {}, saved)

    arms: dict[str, Callable[[], None] | Path] = {
        "base": base,
        "tuned": tuned if tuned.is_dir() else merged_tuned,
        "base with adapter": with_adapter,
    }
    if lora is not None:
        arms["base with LoRA"] = with_lora
    asked = [digest_file(text), len(scoring.ids["text"]), scoring.context, sorted(saved), sorted((lora or {}).items())]
    mark = hashlib.sha256(dump_json(asked, indent=None).encode()).hexdigest()[:16]
    with Progress("measuring perplexity", len(arms), enabled=verbose) as shown:
        for name, arm in arms.items():
            key = f"perplexity of {name}, {mark}"
            if key not in journal.done:
                remove_folder(measured)
                if not isinstance(arm, Path):
                    arm()
                network = open_model(arm if isinstance(arm, Path) else measured).to(scoring.device)
                # As text: JSON has no infinity.
                journal.record(key, repr(perplexity(network, scoring.ids["text"], context=scoring.context)))
            shown.advance()
    remove_folder(measured)
    return {name: float(journal.done[f"perplexity of {name}, {mark}"]) for name in arms}


def _write_low_rank(base: Path, tuned: Path, folder: Path, ranks: Mapping[str, int], saved: Sequence[str]) -> None:
    """Write the base with each update at LoRA's rank, and what is kept whole, into a folder."""
    first, second = ShardedState(base), ShardedState(tuned)
    whole = set(saved)

    def made(key: str) -> Iterator[Tensor]:
        if key in ranks:
            weight = first[key].double()
            yield (weight + low_rank_delta(second[key].double() - weight, ranks[key])).to(first.dtype(key))
            return
        source = second if key in whole else first
        yield from (rows_of(source, key, *span).to(first.dtype(key)) for span in row_blocks(first.shape(key)))

    facts = {key: (first.dtype(key), first.shape(key)) for key in first}
    write_shards(folder, facts, made, {"work": "low rank"}, beside=base)
