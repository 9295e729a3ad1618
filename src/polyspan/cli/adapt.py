"""``polyspan adapt extract``, ``merge`` and ``ranks``: adapters with a Tucker core from checkpoint files, and back."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ._output import say, show_json, show_table
from ._places import check_picture, check_places


def extract(
    base: Path,
    tuned: Path,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    rank: int = 8,
    spatial_rank: int | None = None,
    error: float | None = None,
    only: str | None = None,
    save: Annotated[list[str] | None, Parameter(negative="")] = None,
    scale: float = 4.0,
    replace: bool = False,
    eval: Path | None = None,
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
    """Turn a fine-tuned checkpoint into a small adapter of its base, which peft loads.

    Run the same command again after an interrupt and it goes on. In Python, polyspan.checkpoints.load_tucker_adapter
    loads it; peft's own functions do so once polyspan.checkpoints.TuckerAdapterConfig has been imported.

    Parameters
    ----------
    base : Path
        A .safetensors file, a folder of them, or a model's name on the hub.
    tuned : Path
        The same model after fine-tuning.
    out : Path
        Folder of the adapter.
    rank : int
        Of both channel axes of each weight.
    spatial_rank : int
        Of the sides of kernels; left out, whole.
    error : float
        Choose each layer's ranks so that at most this share of its update is left out.
    only : str
        Expression that must be found in a layer's name.
    save : list of str
        Modules kept whole, such as a new head.
    scale : float
        The adapter's alpha.
    replace : bool
        Write over a folder that is there.
    eval : Path
        Text, held out from every training, on which base, tuned model and base with adapter are measured by perplexity.
    compare : bool
        Measure LoRA, the truncated SVD of the same updates at as many parameters, beside it.
    context : int
        Tokens of a piece of text; the model's longest, at most 1,024, where not given.
    max_tokens : int
        Most tokens of the text.
    device : str
        Such as cuda:0, for --eval.
    plot : Path
        Draw what each layer leaves out, bytes and perplexities (.svg, .png or .pdf).
    workers : int
        Processes, or workers of a cluster.
    engine : str
        Where layers are decomposed: local, dask or ray.
    address : str
        Of the cluster.
    json : bool
        Print JSON.
    """
    from polyspan.checkpoints import extract_tucker_adapter

    check_places(plot, read=(base, tuned, eval))
    if eval is None and (context is not None or max_tokens is not None or device is not None):
        raise ValueError("--context, --max-tokens and --device must go with --eval, got no text")
    found = extract_tucker_adapter(
        base, tuned, out, rank=rank, spatial_rank=spatial_rank, error=error, only=only, modules_to_save=save or (),
        scale=scale, replace=replace, compare=compare, evaluation=eval, context=context, max_tokens=max_tokens,
        device=device, workers=workers, engine=engine, address=address, verbose=True,
    )  # fmt: skip
    if plot is not None:
        from polyspan.checkpoints.extraction_plots import plot_extraction

        plot_extraction(found, plot)
    if json:
        told = {**found._asdict(), "path": str(found.path), "layers": [layer._asdict() for layer in found.layers]}
        show_json(told | {"sizes": {name: size._asdict() for name, size in found.sizes.items()}})
        return
    head = ["layer", "weight", "ranks", "parameters", "left out"]
    rows = [
        [layer.name, _by(layer.shape), _by(layer.ranks), str(layer.parameters), f"{layer.error:.3f}"]
        for layer in found.layers
    ]
    if compare:
        head += ["LoRA's rank", "parameters", "left out"]
        for row, layer in zip(rows, found.layers, strict=True):
            row += [str(layer.lora_rank), str(layer.lora_parameters), f"{layer.lora_error:.3f}"]
    show_table(f"Adapter in {found.path}", head, rows)
    _show_sizes(found.sizes)
    if found.perplexity:
        show_table("Perplexity", ("what", "perplexity"), [(n, f"{p:.2f}") for n, p in found.perplexity.items()])
    if found.left_out:
        say(f"{len(found.left_out)} tensors differ and are in no adapter: {', '.join(found.left_out[:5])}")
    say(f"the adapter holds {found.kept_share:.1%} of all differences, by squared norm")


def merge(
    base: Path,
    adapter: Path,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    shard_bytes: int | None = None,
    workers: int | None = 1,
    engine: str = "local",
    address: str | None = None,
    json: bool = False,
) -> None:
    """Add an adapter to the weights of its base, and write a plain checkpoint.

    Run the same command again after an interrupt and it goes on.

    Parameters
    ----------
    base : Path
        A .safetensors file, a folder of them, or a model's name on the hub.
    adapter : Path
        Folder with adapter_config.json.
    out : Path
        A .safetensors file; or a folder of them, with the base's configuration and tokenizer.
    shard_bytes : int
        Size of the files of a folder; left out, that of the largest tensor.
    workers : int
        Processes, or workers of a cluster.
    engine : str
        Where files are merged: local, dask or ray.
    address : str
        Of the cluster.
    json : bool
        Print JSON.
    """
    from polyspan.checkpoints import merge_tucker_adapter
    from polyspan.checkpoints._checkpoint_sizes import checkpoint_size

    if shard_bytes is not None and out.suffix == ".safetensors":
        raise ValueError(f"--shard-bytes must go with a folder as --out, got the file {out.name!r}")
    changed = merge_tucker_adapter(
        base, adapter, out, shard_bytes=shard_bytes, workers=workers, engine=engine, address=address, verbose=True
    )
    sizes = {name: checkpoint_size(p) for name, p in (("base", base), ("adapter", adapter), ("merged", out))}
    if json:
        told = {name: size._asdict() for name, size in sizes.items()}
        show_json({"out": str(out), "changed": changed, "sizes": told})
        return
    show_table(f"Changed in {out}", ("tensor",), [[name] for name in changed])
    _show_sizes(sizes)


def ranks(
    base: Path,
    tuned: Path,
    *,
    error: list[float] | None = None,
    only: str | None = None,
    plot: Path | None = None,
    workers: int | None = 1,
    engine: str = "local",
    address: str | None = None,
    json: bool = False,
) -> None:
    """Say which ranks the updates of a fine-tuned checkpoint need, layer by layer.

    Run the same command again after an interrupt and it goes on.

    Parameters
    ----------
    base : Path
        A .safetensors file, a folder of them, or a model's name on the hub.
    tuned : Path
        The same model after fine-tuning.
    error : list of float
        Shares of an update that may be left out; 0.5, 0.2 and 0.1 where not given.
    only : str
        Expression that must be found in a layer's name.
    plot : Path
        Draw the share left out by parameters, beside that of LoRA's matrix (.svg, .png or .pdf).
    workers : int
        Processes, or workers of a cluster.
    engine : str
        Where layers are measured: local, dask or ray.
    address : str
        Of the cluster.
    json : bool
        Print JSON.
    """
    from polyspan.checkpoints import advise_tucker_ranks
    from polyspan.checkpoints.tucker_plots import plot_rank_curves
    from polyspan.io import dump_json
    from polyspan.run import user_folder

    if plot is not None:
        check_picture(plot)
    errors = error or [0.5, 0.2, 0.1]
    # Nothing is written here but what is asked for: unfinished work is among the user's own files, one for a question.
    asked = [str(base.absolute()), str(tuned.absolute()), errors, only, plot is not None]
    name = hashlib.sha256(dump_json(asked, indent=None).encode()).hexdigest()[:16]
    advice = advise_tucker_ranks(
        base, tuned, errors=errors, only=only, curves=plot is not None, workers=workers, engine=engine,
        address=address, journal=user_folder("journals") / f"ranks-{name}.jsonl", verbose=True,
    )  # fmt: skip
    if plot is not None:
        plot_rank_curves({layer.name: layer.curve for layer in advice if layer.curve is not None}, plot)
    if json:
        show_json([{"layer": a.name, "shape": a.shape, "ranks": [r._asdict() for r in a.choices]} for a in advice])
        return
    rows = [
        [a.name, _by(a.shape), f"{c.error:g}", _by(c.ranks), str(c.parameters), f"{c.parameters / a.size:.1%}"]
        for a in advice
        for c in a.choices
    ]
    show_table("Fewest parameters", ("layer", "weight", "left out", "ranks", "parameters", "of the weight"), rows)


def _show_sizes(sizes: Mapping[str, Any]) -> None:
    rows = [(name, f"{size.parameters:,}", f"{size.bytes:,}") for name, size in sizes.items()]
    show_table("Files", ("checkpoint", "parameters", "bytes"), rows)


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
