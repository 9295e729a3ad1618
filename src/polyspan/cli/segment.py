"""``polyspan segment train`` and ``predict``: outline things in pictures with a network of scan blocks."""

from pathlib import Path
from typing import Any, Literal

from ._output import check_target, show_json, show_table
from ._pictures import Out, check_drawing, count_to_measure, read_pictures


def train(
    source: Path,
    *,
    masks: Path,
    out: Out,
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
        Their masks: an array (.npy) of shape (n, h, w), of 0 and 1, of 0 and 255 or of true and false.
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
        Share of the pictures kept for measuring: at least one, and never all.
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

    check_target(out, "--out", ".safetensors")
    check_target(checkpoint, "--checkpoint", ".safetensors")
    check_drawing(plot, "--plot")
    try:
        dims = [int(width) for width in widths.split(",")]
    except ValueError:
        raise ValueError(f"--widths must be whole numbers by commas, got {widths!r}") from None
    X = read_pictures(source)
    n = count_to_measure(len(X), held_out, least=1, why="one to train on")
    y = _masks(masks, X)
    order = np.random.default_rng(seed).permutation(len(X))
    test, kept = order[:n], order[n:]
    if not y[kept].any():
        raise ValueError(
            f"masks must not all be empty, got no pixel that belongs among the {len(kept)} trained on, of {masks}"
        )
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
    out: Out,
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
        True masks, as for training.
    plot : Path
        Draw the first pictures with both outlines (.svg, .png or .pdf); needs --masks.
    json : bool
        Print JSON.
    """
    from polyspan.io import write_array
    from polyspan.nn import Segmenter

    if plot is not None and masks is None:
        raise ValueError("--plot needs --masks, to draw both outlines")
    check_target(out, "--out", ".npy")
    check_drawing(plot, "--plot")
    X = read_pictures(data)
    y = None if masks is None else _masks(masks, X)
    shares = Segmenter.load(model).predict(X)
    write_array(out, shares)
    _report({"out": str(out), "pictures": len(X)}, X, y, shares, plot, json)


def _masks(source: Path, pictures: Any) -> Any:
    """Return the masks of pictures, (n, h, w) bool; a single channel may stand before the sides."""
    from polyspan.io import read_array
    from polyspan.nn.scan_segmentation import binary_masks

    y = read_array(source, ndim=None, booleans=True)
    if y.ndim == 4 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 3:
        raise ValueError(f"masks must be (n, h, w), got shape {y.shape} in {source}")
    if len(y) != len(pictures):
        raise ValueError(f"there must be one mask a picture, got {len(pictures)} pictures and {len(y)} masks")
    if y.shape[1:] != pictures.shape[-2:]:
        (h, w), (a, b) = pictures.shape[-2:], y.shape[1:]
        raise ValueError(f"masks must be {h} by {w} pixels, as the pictures, got {a} by {b} in {source}")
    try:
        return binary_masks(y)
    except ValueError as error:
        raise ValueError(f"{error} in {source}") from None


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
            facts["plot"] = str(plot_segmentation(X, y, shares, plot, titles=titles))
    if json:
        show_json(facts)
        return
    show_table("", ("what", "value"), [(k, f"{v:.4f}" if isinstance(v, float) else str(v)) for k, v in facts.items()])
