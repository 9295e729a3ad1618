"""``polyspan merge``."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ._output import say, show_json, show_table
from ._places import check_picture


def merge(
    config: Path,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    method: str | None = None,
    scaling: float | None = None,
    density: float | None = None,
    mask: Path | None = None,
    shard_bytes: int | None = None,
    eval: Annotated[list[str] | None, Parameter(negative="")] = None,
    compare: bool = False,
    context: int | None = None,
    max_tokens: int | None = None,
    device: str | None = None,
    plot: Path | None = None,
    workers: int | None = 1,
    engine: str = "local",
    address: str | None = None,
    json: bool = False,
) -> None:
    """Merge fine-tuned checkpoints of one base into one that serves all their tasks.

    Task arithmetic, TIES, DARE and averages read one tensor at a time; run the same command again after an interrupt
    and it goes on. AdaMerging and Concrete masks need unlabelled inputs and the whole network in memory.

    Parameters
    ----------
    config : Path
        A recipe in YAML, as of mergekit: merge_method, base_model, models, parameters. Models are folders, files, LoRA
        or Tucker adapters, or names on the hub.
    out : Path
        Folder of the merged checkpoint.
    method : str
        Instead of the recipe's: average, task-arithmetic, ties, dare, dare-ties, adamerging, concrete.
    scaling : float
        How much of the summed changes is added; instead of the recipe's.
    density : float
        Share of changes that TIES and DARE keep; instead of the recipe's.
    mask : Path
        Where the logits of a Concrete mask are written, or, for task-arithmetic, read.
    shard_bytes : int
        Size of the files; left out, that of the largest tensor.
    eval : list of str
        Texts on which base, models and merge are measured by perplexity: NAME=FILE, or a file; may be repeated.
    compare : bool
        Measure averages, task arithmetic, TIES and DARE of the same models on these texts too.
    context : int
        Tokens of a piece of text; the model's longest, at most 1,024, where not given.
    max_tokens : int
        Most tokens of each text.
    device : str
        Such as cuda:0, for --eval.
    plot : Path
        Picture of the angles between the tasks' changes and of how much of each is left: .svg, .png or .pdf.
    workers : int
        Processes, or workers of a cluster.
    engine : str
        Where files are merged: local, dask or ray.
    address : str
        Of the cluster.
    json : bool
        Print JSON.
    """
    from polyspan.checkpoints import merge_geometry, merge_recipe, read_recipe, score_merge
    from polyspan.checkpoints._checkpoint_sizes import checkpoint_size
    from polyspan.checkpoints.merge_files import STREAMED
    from polyspan.checkpoints.merge_scores import plan_scoring
    from polyspan.checkpoints.merging_plots import plot_merge_geometry

    if plot is not None:
        check_picture(plot)
    texts = _texts(eval or [])
    if not texts and (compare or context is not None or max_tokens is not None or device is not None):
        raise ValueError("--compare, --context, --max-tokens and --device must go with --eval, got no text")
    recipe = read_recipe(config, method=method)
    given = {"scaling": scaling, "density": density}
    parameters = {**recipe.parameters, **{name: value for name, value in given.items() if value is not None}}
    recipe = recipe._replace(parameters=parameters)
    scoring: dict[str, Any] = {"context": context, "max_tokens": max_tokens, "device": device}
    scoring["compare"] = STREAMED if compare else ()
    if texts:
        plan_scoring(recipe, texts, **scoring)
    found = merge_recipe(
        recipe, out, mask=mask, shard_bytes=shard_bytes, workers=workers, engine=engine, address=address, verbose=True
    )
    if found.resumed:
        say(f"{found.resumed} of {len(found.shards)} files were there from an interrupted run")
    if plot is not None:
        plot_merge_geometry(
            merge_geometry(recipe.base, recipe.models, found.path, ignore_keys=recipe.ignore_keys), plot
        )
    scores = []
    if texts:
        scores = score_merge(recipe, found.path, texts, **scoring, verbose=True)
    sizes = [("base", "base", recipe.base), *(("model", task, path) for task, path in recipe.models.items())]
    sizes += [("merged", recipe.method, found.path)] + ([("mask", mask.name, mask)] if mask is not None else [])
    weighed = [(name, kind, checkpoint_size(path)) for kind, name, path in sizes]
    result = {
        "out": str(found.path),
        "method": recipe.method,
        "models": list(recipe.models),
        "parameters": parameters,
        "files": [path.name for path in found.shards],
        "tensors": found.tensors,
        "merged": found.merged,
        "resumed": found.resumed,
        "sizes": [{"name": name, "kind": kind, **size._asdict()} for name, kind, size in weighed],
        "scores": [row._asdict() for row in scores],
    }
    if json:
        show_json(result)
        return
    rows = [
        ("out", result["out"]),
        ("method", recipe.method),
        ("models", ", ".join(recipe.models)),
        ("files", str(len(found.shards))),
        ("tensors", f"{found.tensors}, {found.merged} of them merged"),
    ]
    show_table("", ("what", "value"), rows)
    cells = [[name, kind, f"{size.parameters:,}", f"{size.bytes:,}"] for name, kind, size in weighed]
    show_table("Files", ("checkpoint", "what", "parameters", "bytes"), cells)
    if scores:
        cells = [[row.name, row.kind, *(f"{row.perplexity[text]:.2f}" for text in texts)] for row in scores]
        show_table("Perplexity", ("checkpoint", "what", *texts), cells)


def _texts(given: list[str]) -> dict[str, Path]:
    """Return text files by name; a file without one has that of the file."""
    found: dict[str, Path] = {}
    for entry in given:
        name, mark, file = entry.partition("=")
        path = Path(file if mark else entry)
        name = name if mark else path.stem
        if name in found:
            raise ValueError(f"--eval must give each text a name of its own, got {name!r} twice")
        found[name] = path
    return found
