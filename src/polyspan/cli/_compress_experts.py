"""The part of ``polyspan compress`` that merges the experts of mixture-of-experts models."""

from pathlib import Path
from typing import Any

from ._output import say, show_json, show_table
from ._places import check_picture


def compress_experts(
    model: Path | str,
    out: Path,
    *,
    calibration: Path,
    evaluation: Path | None = None,
    experts: int | None = None,
    keep_ratio: float = 0.5,
    preset: str = "recommended",
    export: str = "merged",
    compare: bool = False,
    plot: Path | None = None,
    length: int | None = None,
    samples: int | None = 128,
    batch_size: int = 8,
    shard_bytes: int | None = None,
    device: str = "auto",
    workers: int = 1,
    engine: str = "local",
    address: str | None = None,
    json: bool = False,
    **options: Any,
) -> None:
    """Merge the experts of a checkpoint into fewer, and say what was merged and what it cost.

    Parameters
    ----------
    model : path or str
        Folder of a checkpoint of transformers, or its name on the Hub.
    out : Path
        Folder of the merged checkpoint; an interrupted run goes on there.
    calibration, evaluation : Path
        Text files; without the second, every eighth piece of the first is held out for perplexity.
    plot : Path
        Picture of similarities, groups, use and perplexities: .svg, .png or .pdf.
    json : bool
        Print JSON.
    **options
        All others are those of :func:`polyspan.checkpoints.merge_expert_checkpoint`.
    """
    from polyspan.checkpoints import merge_expert_checkpoint, plot_expert_merge
    from polyspan.checkpoints.expert_files import report_json

    if plot is not None:
        check_picture(plot)
    found = merge_expert_checkpoint(
        model, out, calibration=calibration, evaluation=evaluation, experts=experts, keep_ratio=keep_ratio,
        preset=preset, export=export, compare=compare, length=length, samples=samples, batch_size=batch_size,
        shard_bytes=shard_bytes, device=device, workers=workers, engine=engine, address=address, verbose=True,
        **options,
    )  # fmt: skip
    if found.resumed:
        say(f"{found.resumed} pieces of work were there from an interrupted run")
    if plot is not None:
        say(f"drawn in {plot_expert_merge(found, plot)}")
    if json:
        show_json({**report_json(found), "out": str(found.path), "resumed": found.resumed})
        return
    rows = [
        [
            layer.name, f"{layer.n_experts} to {layer.n_kept}", _words(layer.groups), f"{layer.similarity:.2f}",
            f"{min(layer.frequencies):.2f} to {max(layer.frequencies):.2f}",
            "tokens are routed anew" if layer.error != layer.error else f"{layer.error:.1%}",
        ]
        for layer in found.report.layers
    ]  # fmt: skip
    columns = ("layer", "experts", "group of each", "mean cosine", "share of tokens", "error of output")
    show_table(f"{found.path}", columns, rows)
    say(
        f"{found.parameters:,} parameters became {found.parameters_after:,}, {found.bytes:,} bytes "
        f"{found.bytes_after:,}; {found.tokens:,} tokens calibrated"
    )
    told = {"before": "as it was", "after": "merged", "hf": "merged, with averaged router rows, as written"}
    scores = [[told[name], f"{value:.2f}"] for name, value in found.perplexity.items()]
    scores += [[name, f"{value:.2f}"] for name, value in found.comparison.items()]
    show_table("Perplexity", ("model", "perplexity"), scores)
    for name, why in found.left_out.items():
        say(f"{name} is left out: {why}")
    if export == "merged":
        say("read it with polyspan.integrations.load_merged_experts; for other readers there is --export hf")


def _words(groups: list[int]) -> str:
    return " ".join("-" if group < 0 else str(group) for group in groups)
