"""``polyspan adapt extract``, ``merge`` and ``ranks``: adapters with a Tucker core from checkpoint files, and back."""

import hashlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ._output import say, show_json, show_table


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

    found = extract_tucker_adapter(
        base, tuned, out, rank=rank, spatial_rank=spatial_rank, error=error, only=only, modules_to_save=save or (),
        scale=scale, replace=replace, workers=workers, engine=engine, address=address, verbose=True,
    )  # fmt: skip
    if json:
        show_json({**found._asdict(), "path": str(found.path), "layers": [layer._asdict() for layer in found.layers]})
        return
    rows = [
        [layer.name, _by(layer.shape), _by(layer.ranks), str(layer.parameters), f"{layer.error:.3f}"]
        for layer in found.layers
    ]
    show_table(f"Adapter in {found.path}", ("layer", "weight", "ranks", "parameters", "left out"), rows)
    if found.left_out:
        say(f"{len(found.left_out)} tensors differ and are in no adapter: {', '.join(found.left_out[:5])}")
    say(f"the adapter holds {found.kept_share:.1%} of all differences, by squared norm")


def merge(
    base: Path,
    adapter: Path,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    json: bool = False,
) -> None:
    """Add an adapter to the weights of its base, and write a plain checkpoint.

    Parameters
    ----------
    base : Path
        A .safetensors file, a folder of them, or a model's name on the hub.
    adapter : Path
        Folder with adapter_config.json.
    out : Path
        A .safetensors file; or a folder of them, with the base's configuration and tokenizer.
    json : bool
        Print JSON.
    """
    from polyspan.checkpoints import merge_tucker_adapter

    changed = merge_tucker_adapter(base, adapter, out, verbose=True)
    if json:
        show_json({"out": str(out), "changed": changed})
        return
    show_table(f"Changed in {out}", ("tensor",), [[name] for name in changed])


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
    from polyspan.io import dump_json, picture_path
    from polyspan.run import user_folder

    if plot is not None:
        picture_path(plot)
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


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
