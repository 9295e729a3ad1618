"""What a merge is worth: perplexities of base, models and merge on texts of their tasks, and of other ways to merge."""

import contextlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyspan.io import remove_folder
from polyspan.run import Progress

from ._hub import local_checkpoint
from ._merge_states import ADAPTER
from .compress_files import longest_context, open_model, perplexity, token_ids
from .merge_files import STREAMED, merge_checkpoints
from .merge_recipes import MergeRecipe

MOST_CONTEXT = 1024


class MergeScore(NamedTuple):
    """Perplexities of one checkpoint by text; ``kind`` is "base", "model", "merged" or "compared"."""

    name: str
    kind: str
    perplexity: dict[str, float]


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
        There is no text, or a way to compare is unknown.
    WrongContent
        A folder holds no language model of transformers, or no tokenizer, or a text no token.
    """
    if not texts:
        raise ValueError("texts must hold at least one text, got none")
    strange = [name for name in compare if name not in STREAMED]
    if strange:
        raise ValueError(f"compare must hold some of {', '.join(STREAMED)}, got {strange[0]!r}")
    base, merged = local_checkpoint(recipe.base), Path(merged)
    models = {task: local_checkpoint(path, files=True) for task, path in recipe.models.items()}
    ids = {name: token_ids(base, text, limit=max_tokens) for name, text in texts.items()}
    length = context or min(MOST_CONTEXT, longest_context(base, MOST_CONTEXT))

    def measured(name: str, kind: str, folder: Path) -> MergeScore:
        network = open_model(folder)
        network = network if device is None else network.to(device)
        found = {text: perplexity(network, part, context=length, batch_size=batch_size) for text, part in ids.items()}
        return MergeScore(name, kind, found)

    others = [method for method in compare if method != recipe.method]
    scores = []
    with Progress("measuring merges", 2 + len(models) + len(others), enabled=verbose) as shown:
        for name, kind, folder in [("base", "base", base), (recipe.method, "merged", merged)]:
            scores.append(measured(name, kind, folder))
            shown.advance()
        for task, path in models.items():
            if (Path(path) / ADAPTER).is_file():
                with _beside(merged, task) as folder:
                    # An average of one is the base with the adapter added.
                    merge_checkpoints(base, {task: path}, folder, method="average", ignore_keys=recipe.ignore_keys)
                    scores.append(measured(task, "model", folder))
            else:
                scores.append(measured(task, "model", Path(path)))
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
