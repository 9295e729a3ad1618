"""``polyspan segment train`` and ``predict``: outline things in pictures with a network of scan blocks."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ._output import show_json, show_table


def train(
    source: Path,
    *,
    masks: Path,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    widths: str = "16,32,64",
    states: int = 8,
    patch: int = 4,
    block: Literal["mhs", "ss2d"] = "mhs",
    steps: int = 1000,
    batch_size: int = 8,
    rate: float = 1e-2,
    held_out: float = 0.2,
    checkpoint: Path | None = None,
    device: str = "auto",
    seed: int = 0,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Train on pictures and their masks, and measure on pictures held out.

    Parameters
    ----------
    source : Path
        Pictures: an array (.npy) of shape (n, h, w) or (n, channels, h, w).
    masks : Path
        Their masks: an array (.npy) of shape (n, h, w), of 0 and 1 or of 0 and 255.
    out : Path
        The trained network, one .safetensors file.
    widths : str
        Channels of each stage, by commas; each is a multiple of 4, the first at least 8.
    states : int
        States a channel.
    patch : int
        Pixels of a patch's side.
    block : {"mhs", "ss2d"}
        Multi-head scan, or the usual 2D selective scan.
    steps : int
        Mini-batch steps.
    batch_size : int
        Pictures a step.
    rate : float
        Learning rate at its highest.
    held_out : float
        Share of the pictures kept for measuring, at least one.
    checkpoint : Path
        A .safetensors file that lets a run that was stopped go on.
    device : str
        "auto" takes an accelerator where there is one.
    seed : int
        Of the held-out pictures, the weights and the order of batches.
    plot : Path
        Draw the first pictures held out with both outlines (.svg, .png or .pdf).
    json : bool
        Print JSON.
    """
    import numpy as np

    from polyspan.nn import MHSUNet, train_segmentation
    from polyspan.run import pick_device, torch_generator

    if not 0 < held_out < 1:
        raise ValueError(f"--held-out must be between 0 and 1, got {held_out}")
    try:
        dims = [int(width) for width in widths.split(",")]
    except ValueError:
        raise ValueError(f"--widths must be whole numbers by commas, got {widths!r}") from None
    X, y = _pictures(source), _masks(masks)
    if len(X) != len(y):
        raise ValueError(f"there must be one mask a picture, got {len(X)} pictures and {len(y)} masks")
    if len(X) < 2:
        raise ValueError(f"there must be at least two pictures, one of them to measure on, got {len(X)}")
    order = np.random.default_rng(seed).permutation(len(X))
    n = min(max(1, round(held_out * len(X))), len(X) - 1)
    test, kept = order[:n], order[n:]
    generator = torch_generator(seed)
    model = MHSUNet(
        1 if X.ndim == 3 else X.shape[1], 1, [2] * len(dims), dims, patch_size=patch, block=block, d_state=states,
        init_std=None, generator=generator,
    ).to(pick_device(device))  # fmt: skip
    found = train_segmentation(
        model, X[kept], y[kept], max_iter=steps, batch_size=batch_size, learning_rate=rate, checkpoint=checkpoint,
        generator=generator, verbose=True,
    )  # fmt: skip
    found.save(out)
    _report({"out": str(out), "trained on": len(kept)}, X[test], y[test], found.predict(X[test]), plot, json)


def predict(
    model: Path,
    *,
    data: Path,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    masks: Path | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Write the probability of every pixel of some pictures, and measure it where masks are given.

    Parameters
    ----------
    model : Path
        What ``polyspan segment train`` wrote.
    data : Path
        Pictures: an array (.npy) with as many channels as trained on, of any size.
    out : Path
        Probabilities (n, h, w), a .npy file.
    masks : Path
        True masks (.npy).
    plot : Path
        Draw the first pictures with both outlines (.svg, .png or .pdf); needs --masks.
    json : bool
        Print JSON.
    """
    from polyspan.io import write_array
    from polyspan.nn import Segmenter

    if plot is not None and masks is None:
        raise ValueError("--plot needs --masks, to draw both outlines")
    X = _pictures(data)
    y = None if masks is None else _masks(masks)
    shares = Segmenter.load(model).predict(X)
    write_array(out, shares)
    _report({"out": str(out), "pictures": len(X)}, X, y, shares, plot, json)


def _pictures(source: Path) -> Any:
    from polyspan.io import read_array

    X = read_array(source, ndim=None)
    if X.ndim not in (3, 4):
        raise ValueError(f"pictures must be (n, h, w) or (n, channels, h, w), got shape {X.shape} in {source}")
    return X


def _masks(source: Path) -> Any:
    from polyspan.io import read_array

    y = read_array(source, ndim=None)
    if y.ndim != 3:
        raise ValueError(f"masks must be (n, h, w), got shape {y.shape} in {source}")
    return y


def _report(facts: dict[str, Any], X: Any, y: Any, shares: Any, plot: Path | None, json: bool) -> None:
    if y is not None:
        from polyspan.nn import segmentation_scores

        scores = segmentation_scores(y, shares)
        facts |= {
            "measured on": len(X),
            "Dice, all pixels": scores.dice,
            "IoU, all pixels": scores.iou,
            "Dice, mean of pictures": float(scores.image_dice.mean()),
            "Dice, worst picture": float(scores.image_dice.min()),
        }
        if plot is not None:
            from polyspan.nn import plot_segmentation

            titles = [f"Dice {value:.2f}" for value in scores.image_dice[:8]]
            X = X if X.ndim == 3 or X.shape[1] == 3 else X[:, 0]
            facts["plot"] = str(plot_segmentation(X, y > 0, shares, plot, titles=titles))
    if json:
        show_json(facts)
        return
    show_table("", ("what", "value"), [(k, f"{v:.4f}" if isinstance(v, float) else str(v)) for k, v in facts.items()])
