"""``polyspan text train`` and ``score``: a small language model of planes on a text of one's own, beside its rivals."""

from pathlib import Path
from typing import Any

from ._output import check_target, show_json, show_table
from ._pictures import Out, check_drawing
from ._places import check_places

RIVALS = ("attention", "concatenation", "none")
"""What stands in the place of the planes with ``--compare``."""


def train(
    source: Path,
    *,
    out: Out,
    width: int = 64,
    layers: int = 3,
    reduced: int = 16,
    offsets: str = "1,2,4,8,12,16",
    length: int = 128,
    steps: int = 500,
    batch_size: int = 8,
    rate: float = 3e-3,
    held_out: float = 0.1,
    compare: bool = False,
    device: str = "auto",
    seed: int = 0,
    plot: Path | None = None,
    reach: Path | None = None,
    json: bool = False,
) -> None:
    """Train a model of the bytes of a text, and measure it on the end of the text, which is held out.

    Parameters
    ----------
    source : Path
        A text in UTF-8, also packed (.gz, .xz).
    out : Path
        The trained model, one .safetensors file.
    width : int
        Width of the tokens.
    layers : int
        Blocks.
    reduced : int
        Reduced width, in which pairs of tokens span planes.
    offsets : str
        How many bytes back partners stand, by commas.
    length : int
        Bytes a piece.
    steps : int
        Updates.
    batch_size : int
        Pieces an update.
    rate : float
        Learning rate at its highest.
    held_out : float
        Share of the text kept for measuring.
    compare : bool
        Train attention, the same offsets without planes, and no mixing, on the same pieces.
    device : str
        "auto" takes an accelerator where there is one.
    seed : int
        Of the weights and the pieces.
    plot : Path
        Draw the losses (.svg, .png or .pdf).
    reach : Path
        Draw what the last prediction depends on, and how planes turn in each layer (.svg, .png or .pdf).
    json : bool
        Print JSON.
    """
    import torch

    from polyspan.nn import GrassmannLM, score_next_token, train_next_token
    from polyspan.nn._rival_mixers import replace_mixing
    from polyspan.run import pick_device, torch_generator

    check_target(out, "--out", ".safetensors")
    check_drawing(plot, "--plot")
    check_drawing(reach, "--reach")
    check_places(plot, read=(source,), out=out, reach=reach)
    try:
        steps_back = [int(offset) for offset in offsets.split(",")]
    except ValueError:
        raise ValueError(f"--offsets must be whole numbers by commas, got {offsets!r}") from None
    if not 0 < held_out < 1:
        raise ValueError(f"--held-out must be between 0 and 1, got {held_out}")
    where = torch.device(pick_device(device))
    ids = _bytes(source).to(where)
    cut = len(ids) - max(round(held_out * len(ids)), length + 1)
    if cut <= length:
        raise ValueError(
            f"the text must be longer than two pieces of {length} bytes and one byte more each, got {len(ids)} bytes "
            f"in {source}; take a smaller --length"
        )
    losses: dict[str, list[float]] = {}
    rows: list[dict[str, Any]] = []
    kept: Any = None
    for mixer in ("planes", *(RIVALS if compare else ())):
        model = GrassmannLM(
            256,
            width,
            layers,
            reduced,
            steps_back,
            0.0,
            max_length=length,
            check=False,
            generator=torch_generator(seed),
        )
        if mixer != "planes":
            heads = max(h for h in (1, 2, 4) if width % h == 0)
            replace_mixing(model.blocks, mixer, num_heads=heads, generator=torch_generator(seed + 2))
        model.to(where)
        losses[mixer] = train_next_token(
            model, ids[:cut], steps=steps, length=length, batch_size=batch_size, learning_rate=rate,
            warmup=steps // 10, generator=torch_generator(seed + 1),
        )  # fmt: skip
        loss = score_next_token(model, ids[cut:], length=length)
        rows.append({"mixing": mixer, "parameters": sum(p.numel() for p in model.parameters())} | _measures(loss))
        kept = model if kept is None else kept
    kept.save(out)
    facts: dict[str, Any] = {"out": str(out), "bytes to train": cut, "bytes to measure": len(ids) - cut}
    if plot is not None:
        from polyspan.nn.grassmann_mixing_plots import plot_losses

        facts["plot"] = str(plot_losses(losses, plot))
    if reach is not None:
        from polyspan.nn.grassmann_mixing_plots import plot_reach

        facts["reach"] = str(plot_reach(kept, ids[cut:][None, : min(length, len(ids) - cut)], reach))
    if json:
        show_json({"models": rows, **facts})
        return
    show_table("On the text held out", tuple(rows[0]), [[_said(v) for v in row.values()] for row in rows])
    show_table("", ("what", "value"), [(k, str(v)) for k, v in facts.items()])


def score(model: Path, *, data: Path, length: int | None = None, json: bool = False) -> None:
    """Measure a trained model on another text.

    Parameters
    ----------
    model : Path
        What ``polyspan text train`` wrote.
    data : Path
        A text in UTF-8.
    length : int
        Bytes a piece; left out, as trained.
    json : bool
        Print JSON.
    """
    from polyspan.nn import GrassmannLM, score_next_token

    fitted = GrassmannLM.load(model)
    length = fitted.max_length if length is None else length
    if fitted.positions is not None and not 1 <= length <= fitted.max_length:
        raise ValueError(f"--length must be between 1 and {fitted.max_length}, as trained, got {length}")
    ids = _bytes(data)
    loss = score_next_token(fitted, ids, length=length)
    facts = {"bytes": len(ids)} | _measures(loss)
    if json:
        show_json(facts)
        return
    show_table("", ("what", "value"), [(k, _said(v)) for k, v in facts.items()])


def _bytes(source: Path) -> Any:
    import numpy as np
    import torch

    from polyspan.io import read_text

    return torch.from_numpy(np.frombuffer(read_text(source).encode(), np.uint8).copy())


def _measures(loss: float) -> dict[str, float]:
    import math

    return {"nats a byte": loss, "perplexity": math.exp(loss), "bits a byte": loss / math.log(2)}


def _said(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
