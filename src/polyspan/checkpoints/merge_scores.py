"""What a merge is worth: perplexities of base, models and merge on texts of their tasks, and of other ways to merge."""

import contextlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from polyspan.errors import WrongContent
from polyspan.io import remove_folder
from polyspan.run import Progress, pick_device

from ._hub import local_checkpoint
from ._merge_states import ADAPTER
from ._text_models import check_model, longest_context, open_model, perplexity, token_ids
from .merge_files import STREAMED, merge_checkpoints
from .merge_recipes import MergeRecipe

MOST_CONTEXT = 1024


class MergeScore(NamedTuple):
    """Perplexities of one checkpoint by text; ``kind`` is "base", "model", "merged" or "compared"."""

    name: str
    kind: str
    perplexity: dict[str, float]


class Scoring(NamedTuple):
    """What is measured: where base and models lie, tokens (n,) of each text, and how."""

    base: Path
    models: dict[str, Path]
    ids: dict[str, Tensor]
    context: int
    device: Any


def plan_scoring(
    recipe: MergeRecipe,
    texts: Mapping[str, Path | str],
    *,
    compare: Sequence[str] = (),
    context: int | None = None,
    max_tokens: int | None = None,
    device: Any = None,
) -> Scoring:
    """Look at everything that :func:`score_merge` needs before anything is merged or measured."""
    if not texts:
        raise ValueError("texts must hold at least one text, got none")
    strange = [name for name in compare if name not in STREAMED]
    if strange:
        raise ValueError(f"compare must hold some of {', '.join(STREAMED)}, got {strange[0]!r}")
    if context is not None and context < 1:
        raise ValueError(f"context must be at least 1, got {context}")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
    base = local_checkpoint(recipe.base)
    models = {task: local_checkpoint(path, files=True) for task, path in recipe.models.items()}
    for folder in (base, *(path for path in models.values() if path.is_dir() and not (path / ADAPTER).is_file())):
        kind = check_model(folder)
        if not kind.can_generate():
            raise WrongContent(folder, found=f"a {kind.__name__}", expected="a model that predicts text")
    ids = {name: token_ids(base, text, limit=max_tokens) for name, text in texts.items()}
    for name, part in ids.items():
        if len(part) < 2:
            raise WrongContent(texts[name], found="one token", expected="two at least, of which one is predicted")
    longest = longest_context(base)
    if context is not None and context > longest:
        raise ValueError(f"context must be at most {longest}, the longest that the model takes, got {context}")
    return Scoring(base, models, ids, context or min(MOST_CONTEXT, longest), pick_device(device or "cpu"))


def score_merge(
    recipe: MergeRecipe,
    merged: Path | str,
    texts: Mapping[str, Path | str],
    *,
    compare: Sequence[str] = (),
    context: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    device: Any = None,
    verbose: bool = False,
) -> list[MergeScore]:
    """Return perplexities of the base, of every model and of their merge, on a text of each task.

    A merge is good where it is near each task's own model on that task's text. For causal language models; one network
    is in memory at a time. Adapters, and the ways to merge that are compared, are written beside ``merged`` for as long
    as they are measured.
    Source: catalogue entry ``concrete-merging``.

    Parameters
    ----------
    recipe : MergeRecipe
    merged : path
        Folder of the merge.
    texts : mapping of str to path
        Text files by the name of what they are of; held out from every training.
    compare : sequence of {"average", "task_arithmetic", "ties", "dare"}
        Ways to merge the same models, with their own defaults, measured too.
    context : int, optional
        Tokens of a piece of text; the model's longest, at most 1,024, where not given.
    max_tokens : int, optional
        Most tokens of each text.
    batch_size : int
        Pieces at a time.
    device : device, optional
    verbose : bool

    Raises
    ------
    ValueError
        There is no text, a way to compare or a device is unknown, or a number is out of range.
    WrongContent
        A folder holds no language model of transformers, or no tokenizer, or a text no token.
    """
    scoring = plan_scoring(recipe, texts, compare=compare, context=context, max_tokens=max_tokens, device=device)
    base, models, merged = scoring.base, scoring.models, Path(merged)

    def measured(name: str, kind: str, folder: Path) -> MergeScore:
        network = open_model(folder).to(scoring.device)
        found = {
            text: perplexity(network, part, context=scoring.context, batch_size=batch_size)
            for text, part in scoring.ids.items()
        }
        return MergeScore(name, kind, found)

    others = [method for method in compare if method != recipe.method]
    scores = []
    with Progress("measuring merges", 2 + len(models) + len(others), enabled=verbose) as shown:
        for name, kind, folder in [("base", "base", base), (recipe.method, "merged", merged)]:
            scores.append(measured(name, kind, folder))
            shown.advance()
        for number, (task, path) in enumerate(models.items()):
            if (path / ADAPTER).is_file() or not path.is_dir():
                with _beside(merged, str(number)) as folder:
                    # An average of one is that one: an adapter added to the base, or bare weights beside its files.
                    merge_checkpoints(base, {task: path}, folder, method="average", ignore_keys=recipe.ignore_keys)
                    scores.append(measured(task, "model", folder))
            else:
                scores.append(measured(task, "model", path))
            shown.advance()
        for method in others:
            with _beside(merged, method) as folder:
                merge_checkpoints(base, models, folder, method=method, ignore_keys=recipe.ignore_keys)
                scores.append(measured(method, "compared", folder))
            shown.advance()
    return scores


@contextlib.contextmanager
def _beside(path: Path, name: str) -> Generator[Path]:
    """Have a new folder beside another for as long as a block runs."""
    folder = path.with_name(f".{path.name}.{name}.measured")
    remove_folder(folder)
    try:
        yield folder
    finally:
        remove_folder(folder)
