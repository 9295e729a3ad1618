"""``polyspan segment train`` and ``predict``: outline things in pictures with a network of scan blocks."""

import io
from pathlib import Path
from typing import Any, Literal

from ._output import check_target, show_json, show_table
from ._pictures import Out, check_drawing, count_to_measure, read_pictures
from ._places import check_places


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
    size: str | None = None,
    colour: bool = False,
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
        Pictures: an array (.npy) of shape (n, h, w) or (n, channels, h, w), or a folder of picture files.
    masks : Path
        Their masks: an array (.npy) of shape (n, h, w), of 0 and 1, of 0 and 255 or of true and false, or a folder with
        a file for each picture, of its name or with an ending such as _mask behind it.
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
    size : str
        Height and width, by a comma, that a folder's pictures are brought to; left out, all must be of one size.
    colour : bool
        Read a folder's pictures in colour; left out, grey.
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
    check_places(plot, read=(source, masks), out=out, checkpoint=checkpoint)
    try:
        dims = [int(width) for width in widths.split(",")]
    except ValueError:
        raise ValueError(f"--widths must be whole numbers by commas, got {widths!r}") from None
    X, files = _pictures(source, size, colour)
    n = count_to_measure(len(X), held_out, least=1, why="one to train on")
    y = _masks(masks, X, files)
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
    size: str | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Write the probability of every pixel of some pictures, and measure it where masks are given.

    Parameters
    ----------
    model : Path
        What ``polyspan segment train`` wrote.
    data : Path
        Pictures: an array (.npy) with as many channels as trained on, of any size, or a folder of picture files.
    out : Path
        Probabilities (n, h, w), a .npy file; of a folder's pictures in the order of their names.
    masks : Path
        True masks, as for training.
    size : str
        As for training.
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
    check_places(plot, read=(model, data, masks), out=out)
    fitted = Segmenter.load(model)
    X, files = _pictures(data, size, data.is_dir() and fitted.model.in_channels == 3)
    y = None if masks is None else _masks(masks, X, files)
    shares = fitted.predict(X)
    write_array(out, shares)
    _report({"out": str(out), "pictures": len(X)}, X, y, shares, plot, json)


def _pictures(source: Path, size: str | None, colour: bool) -> tuple[Any, dict[Path, tuple[int, int]] | None]:
    """Return pictures and, of a folder, its files with the height and width that they have themselves."""
    if not source.is_dir():
        if size is not None or colour:
            raise ValueError(f"--size and --colour are for a folder of pictures, got {source.name}")
        return read_pictures(source), None
    import numpy as np

    from polyspan.cluster.image_folder import ImageFolder

    sides = {file: _opened(file).size[::-1] for file in ImageFolder(source, (1, 1)).files}
    if size is not None:
        given = [int(side) if side.strip().isdecimal() else 0 for side in size.split(",")]
        if len(given) != 2 or min(given) < 1:
            raise ValueError(f"--size must be two whole numbers, height and width, by a comma, got {size!r}")
        h, w = given
    else:
        first, (h, w) = next(iter(sides.items()))
        for file, (a, b) in sides.items():
            if (a, b) != (h, w):
                raise ValueError(
                    f"pictures must be of one size, or --size be given, got {h} by {w} in {first.name} and {a} by {b} "
                    f"in {file.name}"
                )
    pictures = ImageFolder(source, (3, h, w) if colour else (h, w))
    return np.stack([pictures[i] for i in range(len(pictures))]), sides


def _opened(file: Path) -> Any:
    """Return a picture as Pillow's, turned as it says."""
    from polyspan.errors import CorruptFile, require
    from polyspan.io import read_bytes

    pillow = require("PIL.Image", extra="images", purpose="a folder of pictures")
    ops = require("PIL.ImageOps", extra="images", purpose="a folder of pictures")
    try:
        return ops.exif_transpose(pillow.open(io.BytesIO(read_bytes(file))))
    except pillow.UnidentifiedImageError as error:
        raise CorruptFile(file, found="bytes of no known kind of picture", expected="a picture") from error
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise CorruptFile(file, found=str(error), expected="a picture") from error


def _mask_files(source: Path, files: dict[Path, tuple[int, int]], shape: tuple[int, int]) -> Any:
    """Return the masks (n, h, w) that a folder holds for the pictures of another one, brought to a shape."""
    import numpy as np

    from polyspan.cluster.image_folder import ImageFolder
    from polyspan.errors import CorruptFile, WrongContent, require
    from polyspan.nn.scan_segmentation import binary_masks

    pillow = require("PIL.Image", extra="images", purpose="a folder of masks")
    found, made = ImageFolder(source, (1, 1)).files, []
    for file, (h, w) in files.items():
        own = [path for path in found if path.stem == file.stem]
        own = own or [path for path in found if path.stem.startswith(f"{file.stem}_")]
        if len(own) != 1:
            told = " and ".join(path.name for path in own[:2]) or "none"
            raise ValueError(
                "masks must hold one mask a picture, of its name or with an ending such as _mask, "
                f"got {told} for {file.name} in {source}"
            )
        picture = _opened(own[0])
        if picture.size != (w, h):
            a, b = picture.size[::-1]
            raise WrongContent(own[0], found=f"{a} by {b} pixels", expected=f"{h} by {w}, as {file.name}")
        try:
            values = np.asarray(picture if len(picture.getbands()) == 1 else picture.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise CorruptFile(own[0], found=str(error), expected="a picture") from error
        if values.ndim == 3:
            if (values != values[..., :1]).any():
                raise WrongContent(own[0], found="pixels in colour", expected="a mask of two values")
            values = values[..., 0]
        try:
            mask = binary_masks(values[None])[0]
        except ValueError as error:
            raise ValueError(f"{error} in {own[0]}") from None
        whole = pillow.fromarray(mask.astype(np.uint8)).resize(shape[::-1], pillow.Resampling.NEAREST)
        made.append(np.asarray(whole) > 0)
    return np.stack(made)


def _masks(source: Path, pictures: Any, files: dict[Path, tuple[int, int]] | None) -> Any:
    """Return the masks of pictures, (n, h, w) bool; a single channel may stand before the sides."""
    from polyspan.io import read_array
    from polyspan.nn.scan_segmentation import binary_masks

    if source.is_dir():
        if files is None:
            raise ValueError(f"masks may be a folder only where the pictures are one, got {source}")
        return _mask_files(source, files, pictures.shape[-2:])
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
