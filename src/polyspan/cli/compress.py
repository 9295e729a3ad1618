"""``polyspan compress``: a smaller checkpoint from a large one, by any of several methods."""

import inspect
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter

from ._output import say, show_json, show_table
from ._places import check_picture

HELD_OUT = 10
MOST_CONTEXT, MOST_EXPERT_CONTEXT = 1024, 2048
OF_LAYERS = (
    "layer_ratio", "target", "sequential", "dense", "coef_dtype", "rho", "groups", "index_cost", "max_iter",
    "memory_bytes", "device_map", "skip_bad_batches",
)  # fmt: skip
OF_EXPERTS = ("experts", "preset", "export")


class Request(NamedTuple):
    """One command line, as it is handed to the method that it names."""

    model: str
    out: Path
    calib: Path
    eval: Path | None
    method: str
    ratio: float
    layer_ratio: list[str]
    rho: float
    groups: int
    target: list[str]
    index_cost: str
    coef_dtype: str | None
    sequential: bool
    dense: bool
    compare: bool
    plot: Path | None
    context: int | None
    max_tokens: int
    batch_size: int
    max_iter: int
    memory_bytes: int
    shard_bytes: int | None
    experts: int | None
    preset: str
    export: str
    device: str | None
    device_map: str | None
    skip_bad_batches: bool
    seed: int
    workers: int | None
    engine: str
    address: str | None
    json: bool


def compress(
    model: str,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    calib: Path,
    method: str = "sparse-dictionary",
    ratio: float = 0.3,
    layer_ratio: Annotated[list[str] | None, Parameter(negative="")] = None,
    eval: Path | None = None,
    rho: float = 2.0,
    groups: int = 1,
    target: Annotated[list[str] | None, Parameter(negative="")] = None,
    index_cost: str = "bitmask",
    coef_dtype: str | None = None,
    sequential: bool = False,
    dense: bool = False,
    compare: bool = False,
    plot: Path | None = None,
    context: int | None = None,
    max_tokens: int = 262_144,
    batch_size: int = 8,
    max_iter: int = 20,
    memory_bytes: int = 2**32,
    shard_bytes: int | None = None,
    experts: int | None = None,
    preset: str = "recommended",
    export: str = "merged",
    device: str | None = None,
    device_map: str | None = None,
    skip_bad_batches: bool = False,
    seed: int = 0,
    workers: int | None = 1,
    engine: str = "local",
    address: str | None = None,
    json: bool = False,
) -> None:
    """Make a language model's checkpoint smaller without training it, from some text like that it will see.

    Every projection is written as a small dictionary times sparse coefficients, fitted to what the text makes of its
    inputs. The method experts merges those of mixture-of-experts models instead, and leaves all else. Run the same
    command again after an interrupt and it goes on. The result loads by load_compressed or load_merged_experts of
    polyspan.integrations; with --dense it is an ordinary checkpoint of the old size.

    Parameters
    ----------
    model : str
        Folder of a checkpoint, or a model's name on the hub.
    out : Path
        Folder of the result.
    calib : Path
        Text file; with more tokens than layers have inputs. Or a .npz or .safetensors file of the network's arguments,
        one row an item, for models that read no text.
    method : str
        sparse-dictionary, orthogonal (faster), threshold (fastest); svd, svd-llm, asvd, basis-sharing, wanda,
        magnitude; or experts.
    ratio : float
        Share of each layer's bytes to save.
    layer_ratio : list of str
        NAME=RATIO for layers of that name or pattern; others keep --ratio.
    eval : Path
        Text on which perplexity is measured, of models that predict text; the last tenth of the calibration text, held
        out, where not given.
    rho : float
        Atoms over coefficients of an output.
    groups : int
        So many consecutive layers of one role share a dictionary.
    target : list of str
        Names of layers to compress; the usual projections where not given.
    index_cost : str
        What places of coefficients count: bitmask, coo or none.
    coef_dtype : str
        float32, bfloat16, float16 or int8; the model's own where not given.
    sequential : bool
        Calibrate each layer on the model compressed so far: better, and slower.
    dense : bool
        Write dense weights, for programs that know nothing of polyspan.
    compare : bool
        Measure low-rank and pruning methods at the same ratio beside it.
    plot : Path
        Draw layers and methods (.svg, .png or .pdf).
    context : int
        Tokens of a piece of text; the model's longest, at most 1,024 (2,048 for experts), where not given.
    max_tokens : int
        Most tokens of calibration.
    batch_size : int
        Pieces at a time.
    max_iter : int
        Sweeps of the dictionary's fit.
    memory_bytes : int
        Memory for Gram matrices; less makes more passes over the text.
    shard_bytes : int
        Size of weight files.
    experts : int
        Of the method experts: how many a layer are kept; as --ratio says where not given.
    preset : str
        Of the method experts: recommended, or published.
    export : str
        Of the method experts: merged (exact; needs polyspan to load), hf, or hf-repeated.
    device : str
        Such as cuda:0.
    device_map : str
        Such as auto, for models larger than the device.
    skip_bad_batches : bool
        Leave out inputs that give NaN or infinity.
    seed : int
        For random choices.
    workers : int
        Processes, or workers of a cluster.
    engine : str
        Where layers are fitted: local, dask or ray.
    address : str
        Of the cluster.
    json : bool
        Print JSON.
    """
    request = Request(
        model, out, calib, eval, method, ratio, layer_ratio or [], rho, groups, target or [], index_cost, coef_dtype,
        sequential, dense, compare, plot, context, max_tokens, batch_size, max_iter, memory_bytes, shard_bytes, experts,
        preset, export, device, device_map, skip_bad_batches, seed, workers, engine, address, json,
    )  # fmt: skip
    (merge_experts if method == "experts" else compress_layers)(request)


def merge_experts(request: Request) -> None:
    """Merge the experts of a mixture-of-experts model by :func:`polyspan.checkpoints.merge_expert_checkpoint`."""
    from ._compress_experts import compress_experts

    _refuse(request, OF_LAYERS, "methods for single layers")
    if request.experts is None and not 0 < request.ratio < 1:
        raise ValueError(f"--ratio must be in (0, 1), got {request.ratio}")
    from polyspan.checkpoints._hub import local_checkpoint
    from polyspan.checkpoints._text_models import longest_context

    _check_numbers(request)
    length = request.context or min(MOST_EXPERT_CONTEXT, longest_context(local_checkpoint(request.model)))
    compress_experts(
        request.model, request.out, calibration=request.calib, evaluation=request.eval, experts=request.experts,
        keep_ratio=1 - request.ratio, preset=request.preset, export=request.export, compare=request.compare,
        plot=request.plot, length=length, samples=max(2, request.max_tokens // length),
        batch_size=request.batch_size, shard_bytes=request.shard_bytes, device=request.device or "auto",
        workers=request.workers or 1, engine=request.engine, address=request.address, json=request.json,
        random_state=request.seed,
    )  # fmt: skip


def compress_layers(request: Request) -> None:
    """Compress linear layers by one of the methods of :func:`polyspan.checkpoints.compress_checkpoint`."""
    _refuse(request, OF_EXPERTS, "--method experts")
    _check_numbers(request)
    from polyspan.checkpoints._hub import local_checkpoint
    from polyspan.checkpoints._text_models import ARRAYS, check_model, longest_context, token_ids
    from polyspan.checkpoints.compress_files import COMPARED, compress_checkpoint, report_json
    from polyspan.checkpoints.compression_plots import plot_compression
    from polyspan.errors import WrongContent

    if request.plot is not None:
        check_picture(request.plot)
    folder = local_checkpoint(request.model)
    kind = check_model(folder)
    calibration: Any = request.calib
    held_out = None
    if request.calib.suffix not in ARRAYS:
        calibration = token_ids(folder, request.calib, limit=request.max_tokens)
    if request.eval is not None:
        held_out = token_ids(folder, request.eval)
        if len(held_out) < 2:
            raise WrongContent(request.eval, found="one token", expected="two at least, of which one is predicted")
    elif request.calib.suffix not in ARRAYS and kind.can_generate():
        kept = len(calibration) - len(calibration) // HELD_OUT
        calibration, held_out = calibration[:kept], calibration[kept:]
        if len(held_out) < 2:
            raise ValueError(f"--calib must have 20 tokens at least to hold some out, got {kept}; or give --eval")
        say(f"perplexity is measured on the last {len(held_out):,} tokens of {request.calib}, held out")
    else:
        say("perplexity is not measured: there is no text for it, or the model predicts none")
    context = request.context or min(MOST_CONTEXT, longest_context(folder))
    found = compress_checkpoint(
        folder, request.out, calibration=calibration, evaluation=held_out, method=request.method,
        ratio=_ratios(request.layer_ratio, request.ratio), rho=request.rho, groups=request.groups,
        targets=request.target or None, index_cost=request.index_cost, coef_dtype=request.coef_dtype,
        sequential=request.sequential, compare=COMPARED if request.compare else (), dense=request.dense,
        context=context, batch_size=request.batch_size, max_iter=request.max_iter,
        skip_bad_batches=request.skip_bad_batches, memory_bytes=request.memory_bytes, shard_bytes=request.shard_bytes,
        device=request.device, device_map=request.device_map, seed=request.seed, workers=request.workers,
        engine=request.engine, address=request.address, verbose=True,
    )  # fmt: skip
    if request.plot is not None:
        plot_compression(found, request.plot)
    if found.resumed:
        say(f"{found.resumed} units of layers were there from an interrupted run")
    if request.json:
        show_json({"out": str(found.path), "resumed": found.resumed, **report_json(found)})
        return
    rows = [
        [row.layer, f"{row.shape[0]} x {row.shape[1]}", str(row.atoms), str(row.nonzero), f"{row.bytes_before:,}",
         f"{row.bytes_after:,}", row.note or f"{row.error:.4f}"]
        for row in found.layers
    ]  # fmt: skip
    show_table(
        f"Layers in {found.path}", ("layer", "weight", "atoms", "non-zero", "bytes before", "after", "lost"), rows
    )
    methods = [
        [
            row.method, f"{row.mean_error:.4f}", f"{row.parameters:,}", f"{row.bytes:,}",
            "-" if row.perplexity is None else f"{row.perplexity:.2f}",
        ]
        for row in found.methods
    ]  # fmt: skip
    show_table("Methods", ("method", "mean lost", "parameters", "bytes", "perplexity"), methods)
    say(f"weight files: {found.bytes_before:,} bytes before, {found.bytes_after:,} after")


def _refuse(request: Request, names: tuple[str, ...], where: str) -> None:
    """Refuse options that the method would not look at."""
    defaults = inspect.signature(compress).parameters
    for name in names:
        if (getattr(request, name) or None) != (defaults[name].default or None):
            raise ValueError(f"--{name.replace('_', '-')} must go with {where}, got --method {request.method}")


def _check_numbers(request: Request) -> None:
    for name, number in (("context", request.context), ("max-tokens", request.max_tokens)):
        if number is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}")


def _ratios(given: list[str], other: float) -> Any:
    """Return the ratio of all layers, or ratios by pattern with that of all others last."""
    if not given:
        return other
    found: dict[str, float] = {}
    for entry in given:
        name, _, value = entry.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(f"--layer-ratio must be NAME=RATIO, got {entry!r}") from None
    return found | {"*": other}
