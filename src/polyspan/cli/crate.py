"""``polyspan crate train`` and ``report``: a white-box transformer on pictures, measured layer by layer."""

from pathlib import Path
from typing import Any, Literal

from ._output import check_target, show_json, show_table
from ._pictures import Out, check_drawing, count_to_measure, read_pictures
from ._places import check_places

COLUMNS = ("layer", "rate within", "within turned", "rate", "non-zero", "all zero")


def train(
    source: Path,
    *,
    labels: Path,
    out: Out,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
    patch: int | None = None,
    step: Literal["published", "eq10", "exact"] = "published",
    steps: int = 500,
    batch_size: int = 128,
    rate: float = 3e-3,
    shift: int = 0,
    held_out: float = 0.2,
    checkpoint: Path | None = None,
    device: str = "auto",
    seed: int = 0,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Train a rate-reduction transformer on labelled pictures, and measure every layer on those held out.

    Parameters
    ----------
    source : Path
        Pictures: an array (.npy) of shape (n, h, w) or (n, channels, h, w).
    labels : Path
        A whole number for each (.npy), of shape (n,) or (n, 1), or a table (.csv, .tsv) with a column label; at least
        two classes.
    out : Path
        The trained network, one .safetensors file.
    dim : int
        Width of tokens.
    depth : int
        Layers.
    heads : int
        Subspaces a layer.
    patch : int
        Pixels of a patch's side; left out, four patches a side.
    step : {"published", "eq10", "exact"}
        How tokens are compressed.
    steps : int
        Mini-batch steps.
    batch_size : int
        Pictures a step.
    rate : float
        Learning rate at its highest.
    shift : int
        Most pixels by which pictures are moved while training.
    held_out : float
        Share of the pictures kept for measuring: at least one, and never so many that less than two are trained on.
    checkpoint : Path
        A .safetensors file that lets a run that was stopped go on.
    device : str
        "auto" takes an accelerator where there is one.
    seed : int
        Of the held-out pictures, the weights and the order of batches.
    plot : Path
        Draw rates and sparsity (.svg, .png or .pdf).
    json : bool
        Print JSON.
    """
    from sklearn.model_selection import train_test_split

    from polyspan.io import read_labels
    from polyspan.nn import CrateClassifier

    check_target(out, "--out", ".safetensors")
    check_target(checkpoint, "--checkpoint", ".safetensors")
    check_drawing(plot, "--plot")
    check_places(plot, read=(source, labels), out=out, checkpoint=checkpoint)
    X, y = read_pictures(source), read_labels(labels)
    if len(X) != len(y):
        raise ValueError(f"there must be one label a picture, got {len(X)} pictures and {len(y)} labels")
    n = count_to_measure(len(X), held_out, least=2, why="one of each of two classes to train on")
    kept, test, kept_y, test_y = train_test_split(X, y, test_size=n, random_state=seed)
    if len(found := set(kept_y.tolist())) < 2:
        whole = "no other is among the labels" if len({*found, *y.tolist()}) < 2 else "try another --seed"
        raise ValueError(
            f"the {len(kept)} pictures trained on must be of at least 2 classes, got only {found.pop()}; {whole}"
        )
    model = CrateClassifier(
        dim, depth, heads, patch_size=patch, block={"step": step}, max_iter=steps, batch_size=batch_size,
        learning_rate=rate, shift=shift, checkpoint=checkpoint, device=device, random_state=seed, verbose=True,
    ).fit(kept, kept_y)  # fmt: skip
    model.save(out)
    told = model.layer_report(test)
    facts = {
        "out": str(out),
        "pictures": len(X),
        "classes": len(model.classes_),
        "accuracy": float(model.score(test, test_y)),
    }
    _show(told, facts, plot, json)


def report(
    model: Path,
    *,
    data: Path,
    eps2: float = 0.01,
    where: Literal["half", "input"] = "half",
    plot: Path | None = None,
    maps: Path | None = None,
    json: bool = False,
) -> None:
    """Measure every layer of a trained network on pictures: coding rates and sparsity.

    Parameters
    ----------
    model : Path
        What ``polyspan crate train`` wrote.
    data : Path
        Pictures: an array (.npy) of the shape trained on.
    eps2 : float
        Squared distortion for tokens of length 1.
    where : {"half", "input"}
        Between a layer's halves, as the paper says, or before its attention, as its code measures.
    plot : Path
        Draw rates and sparsity (.svg, .png or .pdf).
    maps : Path
        Draw what each head of the last layer looks at, for the first eight pictures (.svg, .png or .pdf).
    json : bool
        Print JSON.
    """
    from polyspan.nn import CrateClassifier

    check_drawing(plot, "--plot")
    check_drawing(maps, "--maps")
    check_places(plot, read=(model, data), maps=maps)
    fitted, X = CrateClassifier.load(model), read_pictures(data)
    told = fitted.layer_report(X, eps2=eps2, where=where)
    facts: dict[str, Any] = {"pictures": len(X)}
    if maps is not None:
        from polyspan.nn.rate_report_plots import plot_masks

        first = X[:8].reshape(-1, *fitted.image_shape_)
        facts["maps"] = str(plot_masks(first, fitted.attention_maps(X[:8]), maps))
    _show(told, facts, plot, json)


def _show(told: Any, facts: dict[str, Any], plot: Path | None, json: bool) -> None:
    if plot is not None:
        from polyspan.nn.rate_report_plots import plot_layer_rates

        facts["plot"] = str(plot_layer_rates(told, plot))
    if json:
        show_json({"layers": told.to_json(), **facts})
        return
    columns = (told.rate_within, told.rate_random, told.rate)
    rows = [
        [str(i + 1), *(f"{c[i]:.2f}" for c in columns), f"{told.nonzero_share[i]:.3f}", f"{told.dead_share[i]:.3f}"]
        for i in range(len(told.names))
    ]
    show_table("Rates in nats, shares of entries and of tokens", COLUMNS, rows)
    show_table("", ("what", "value"), [(k, f"{v:.4f}" if isinstance(v, float) else str(v)) for k, v in facts.items()])
