"""``polyspan cluster images``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ._output import say, show_json, show_table
from ._places import check_places
from .cluster import comparison_rows, write_labels
from .points import (
    LEARNED,
    METHODS,
    NUMBERS,
    check_names,
    compare_methods,
    count_clusters,
    few_groups,
    few_rows,
    learned_facts,
    pixels_in_rows,
    row_of,
    run_method,
    write_bases,
)

ARRAYS = (".npy", ".npz", ".mat", ".safetensors")


def images(
    source: Path,
    *,
    n_clusters: Annotated[int | None, Parameter(name=("--n-clusters", "-k"))] = None,
    method: str = "mlc",
    labels: Path | None = None,
    member: str | None = None,
    label_member: str | None = None,
    shape: str | None = None,
    pixel_order: Literal["row", "column"] | None = None,
    channels: Literal["auto", "first", "last"] = "auto",
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    side: int = 32,
    colour: bool = False,
    degrees: float = 10.0,
    shift: float = 0.1,
    scale: float = 0.15,
    flip: bool = False,
    contrast: float = 0.1,
    eta: float = 0.175,
    tcr_epochs: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    save: Path | None = None,
    checkpoint: Path | None = None,
    device: str = "auto",
    dim: int | None = None,
    option: list[str] | None = None,
    memberships: Path | None = None,
    bases: Path | None = None,
    compare: bool = False,
    seeds: int = 1,
    seed: int = 0,
    jobs: int = 1,
    report: Path | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Cluster images without labels, by training a network that gives each group a subspace of its own.

    Prints a report; labels go to --out, keyed by file name (or row number).

    Parameters
    ----------
    source : Path
        A folder of pictures (needs the extra "images"), or an array (.npy, .npz, .mat, .safetensors) of shape
        (n, h, w), (n, channels, h, w), (n, h, w, channels) or, flattened, (n, pixels). What is guessed of it stands in
        the report.
    n_clusters : int
        How many groups; the number of classes where there are true ones.
    method : str
        mlc, lhdsc, franca, or any other of "polyspan cluster points", which sees pixels in rows.
    labels : Path
        True classes, to score against (.npy, or .csv with columns label and, for the files of a folder, id). They are
        not used in clustering.
    member : str
        Which array of an .npz, .mat or .safetensors file holds the images; left out, the only one, or fea, features, X,
        images or data.
    label_member : str
        Which array of the same file holds true classes; left out, gnd, Label, Labels, labels, label or y if it is
        there. Where images are counted along the last axis, as in MATLAB, their number tells.
    shape : str
        Height and width of flattened images, such as 32x32; left out, a square.
    pixel_order : {"row", "column"}
        How images were flattened: row by row, or column by column, which is MATLAB's (Fortran) order. Left out, column
        for .mat and row for the others.
    channels : {"auto", "first", "last"}
        Where channels stand; found by itself where only one of the two places counts 1, 3 or 4.
    out : Path
        Where labels go: .parquet and .csv with columns id and label, .npy in the order of the names.
    side : int
        Pictures of a folder are brought to this height and width, in pixels.
    colour : bool
        Keep the colours of pictures; otherwise they are made grey.
    degrees : float
        For mlc, like all down to --device. Views of an image, which clusters will not tell apart, are turned by at most
        this,
    shift : float
        moved by at most this share of half the side,
    scale : float
        made larger or smaller by at most this share,
    flip : bool
        mirrored, and
    contrast : float
        given at most this share more or less contrast.
    eta : float
        How wide memberships are; the parameter that matters.
    tcr_epochs : int
        Passes of the first stage, which learns features from views alone; left out, as many as the size needs.
    epochs : int
        Passes of the second.
    batch_size : int
        Left out, a sixth of the images within 256 and 1024.
    save : Path
        Keep the fitted network, .safetensors.
    checkpoint : Path
        A .safetensors file that lets a run that was stopped go on.
    device : str
        "auto" takes an accelerator where there is one.
    dim : int
        For the other methods: dimension of the subspaces; left out, as the method has it.
    option : list[str]
        For the other methods: parameters as name=value, such as solver=ridge; may be repeated.
    memberships : Path
        How far each image belongs to each subspace, (n, clusters): .npy, .npz, .parquet or .safetensors.
    bases : Path
        Orthonormal bases of the subspaces found, one .safetensors file; for mlc those of the learned features.
    compare : bool
        Run the classical methods on the same pixels too, with their defaults.
    seeds : int
        Cluster with so many seeds, and report how far they agree.
    seed : int
        Of a network's first weights and all that is drawn.
    jobs : int
        Processes, where images are independent: for the other methods and for --compare; -1 is all cores.
    report : Path
        Write the report as JSON here too.
    plot : Path
        Draw rates, cosines and singular values, or embedding, affinity and angles (.svg, .png or .pdf).
    json : bool
        Print the report as JSON.
    """
    own = {
        "--degrees": degrees != 10.0,
        "--shift": shift != 0.1,
        "--scale": scale != 0.15,
        "--flip": flip,
        "--contrast": contrast != 0.1,
        "--eta": eta != 0.175,
        "--tcr-epochs": tcr_epochs is not None,
        "--epochs": epochs is not None,
        "--batch-size": batch_size is not None,
        "--save": save is not None,
        "--checkpoint": checkpoint is not None,
        "--device": device != "auto",
    }
    others = {
        "--dim": dim is not None,
        "--option": bool(option),
        "--jobs": jobs != 1 and not compare,
    }
    check_names(method, METHODS, out, seeds, seed=seed, dim=dim)
    places = {"out": out, "memberships": memberships, "bases": bases, "save": save, "report": report}
    places["checkpoint"] = checkpoint
    check_places(plot, read=(source, labels), **places)
    strange = [name for name, given in (others if method == "mlc" else own).items() if given]
    if strange:
        whose = "the other methods" if method == "mlc" else "--method mlc"
        raise ValueError(f"--method {method} must go without the options of {whose}, got {', '.join(strange)}")
    X, names, truth, reading = _read(
        source,
        side=side,
        colour=colour,
        member=member,
        label_member=label_member,
        shape=shape,
        pixel_order=pixel_order,
        channels=channels,
    )
    if labels is not None:
        from polyspan.io import read_labels

        truth = read_labels(labels, names)
        if len(truth) != len(X):
            raise ValueError(f"--labels must have one label an image, got {len(truth)} for {len(X)} images")
    k = count_clusters(n_clusters, truth, X)
    if method != "mlc":
        run_method(
            pixels_in_rows(X),
            names,
            truth,
            method=method,
            n_clusters=k,
            normalize=True,
            pca=None,
            dim=dim,
            option=option,
            out=out,
            memberships=memberships,
            bases=bases,
            compare=compare,
            seeds=seeds,
            seed=seed,
            jobs=jobs,
            report=report,
            plot=plot,
            json=json,
            image_shape=X.shape[1:],
            reading=reading,
        )
        return
    import time
    import warnings

    import numpy as np

    from polyspan.cluster import (
        ImageJitter,
        ManifoldLinearizingClustering,
        class_scores,
        clustering_report,
        seed_stability,
    )
    from polyspan.cluster import memberships as belonging
    from polyspan.io import write_array, write_json

    jitter = ImageJitter(degrees=degrees, shift=shift, scale=scale, flip=flip, contrast=contrast)
    given = {"tcr_epochs": tcr_epochs, "max_epochs": epochs, "batch_size": batch_size}
    options = {name: "auto" if value is None else value for name, value in given.items()}
    made = ManifoldLinearizingClustering(
        k,
        augment=jitter,
        eta=eta,
        checkpoint=checkpoint,
        device=device,
        random_state=seed,
        verbose=1,
        **options,
    )
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit(X)
    seconds = time.perf_counter() - started
    pixels = pixels_in_rows(X, unit=True)
    said = [*dict.fromkeys(str(w.message) for w in caught), *few_rows(pixels, k), *few_groups(made.labels_, k)]
    for message in said:
        say(f"warning: {message}")
    scores = {} if truth is None else {"scores": class_scores(truth, made.labels_)}
    told: dict[str, Any] = summary(made) | {"warnings": said, "reading": reading} | scores
    if seeds > 1:
        agreed = seed_stability(made, X, n_seeds=seeds)
        told["stability"] = {"seeds": seeds, "mean_ari": agreed.mean_ari, "min_ari": agreed.min_ari}
    if compare:
        given: dict[str, Any] = {"seed": seed, "jobs": jobs, "normalize": True}
        # One judge for all: the subspaces of the pixels that every method saw.
        judged = clustering_report(pixels, made.labels_, truth=truth, random_state=seed)
        others = compare_methods(pixels, truth, k, without=method, given=given)
        told["compared"] = [row_of(method, judged | {"seconds": round(seconds, 3)}), *others]
    if out is not None:
        write_labels(out, made.labels_, names)
        told["out"] = str(out)
    if memberships is not None:
        write_array(memberships, belonging(made.transform(X), made.subspaces_))
    if bases is not None:
        write_bases(bases, made.subspaces_, told, {"normalize": False})
    if save is not None:
        told["saved"] = str(made.save(save))
    if plot is not None:
        from polyspan.cluster.manifold_plots import plot_linearized

        plot_linearized(made, made.transform(X), plot)
    if report is not None:
        write_json(report, told)
    if json:
        show_json(told)
        return
    rows: list[tuple[str, str]] = [("images", f"{len(X)} of {' by '.join(map(str, X.shape[1:]))}")]
    rows += [("reading", note) for note in reading]
    rows += [
        (f"cluster {j}", f"{size} images in {rank} of {made.overall_rank_} directions")
        for j, (size, rank) in enumerate(zip(np.bincount(made.labels_), made.numerical_rank_, strict=True))
    ]
    rows += [(name, f"{told[name]:.2f}") for name in LEARNED if name in told]
    rows += [(name, f"{value:.4f}") for found in scores.values() for name, value in found.items()]
    if "stability" in told:
        s = told["stability"]
        rows.append(("stability", f"ARI {s['mean_ari']:.4f} over {s['seeds']} seeds, at least {s['min_ari']:.4f}"))
    show_table("", ("what", "value"), rows + ([("labels", str(out))] if out is not None else []))
    if compare:
        show_table("", ("method", *NUMBERS), comparison_rows(told["compared"], NUMBERS))


def summary(fitted: Any) -> dict[str, Any]:
    """Return what is worth knowing of a fit, in plain types."""
    import numpy as np

    return {
        "method": "mlc",
        "n": len(fitted.labels_),
        "clusters": [
            {"label": j, "size": int(size), "rank": int(rank), "cosine_within": float(fitted.cosines_[j, j])}
            for j, (size, rank) in enumerate(
                zip(np.bincount(fitted.labels_, minlength=fitted.n_clusters), fitted.numerical_rank_, strict=True)
            )
        ],
    } | learned_facts(fitted)


def _read(
    source: Path, *, side: int, colour: bool, member, label_member, shape: str | None, pixel_order, channels
) -> tuple[Any, Any, Any, list[str]]:
    """Return images (n, h, w) or (n, channels, h, w), their names, classes or None, and what was guessed of them."""
    import numpy as np

    from polyspan.cluster.image_arrays import images_of
    from polyspan.io import read_array, read_labelled

    suffix = source.suffix.lower()
    of_arrays = {"--shape": shape, "--pixel-order": pixel_order, "--channels": None if channels == "auto" else channels}
    of_members = {"--member": member, "--label-member": label_member}
    strange = {} if suffix in ARRAYS[1:] else of_members if suffix in ARRAYS else of_arrays | of_members
    for name, given in strange.items():
        if given is not None:
            raise ValueError(f"{name} must go with another kind of source, got {given!r} for {source.name}")
    if suffix not in ARRAYS:
        return _read_folder(source, side, colour)
    if colour or side != 32:
        raise ValueError(f"--side and --colour must go with a folder of pictures, got them for {source.name}")
    reading, truth = [], None
    if suffix == ".npy":
        array = read_array(source, ndim=None)
    else:
        array, name, truth, label_name = read_labelled(source, member=member, label_member=label_member)
        classes = "" if label_name is None else f", labels beside them are {label_name}"
        reading.append(f"images are {name} of shape {array.shape}{classes}")
    try:
        X, guessed = images_of(
            array,
            shape=None if shape is None else _sides(shape),
            channels=channels,
            pixel_order=pixel_order or ("column" if suffix == ".mat" else "row"),
            n_labels=None if truth is None else len(truth),
        )
    except ValueError as error:
        # The function names its parameters; the options are the same words.
        raise ValueError(f"{source.name}: {error}") from None
    return X, np.arange(len(X)), truth, reading + guessed


def _read_folder(source: Path, side: int, colour: bool) -> tuple[Any, Any, None, list[str]]:
    import numpy as np

    if side < 1:
        raise ValueError(f"--side must be at least 1, got {side}")
    from polyspan.cluster.image_folder import ImageFolder

    folder, reading = ImageFolder(source, (3, side, side) if colour else (side, side)), []
    X = np.stack([folder[i] for i in range(len(folder))])
    if len(folder.sizes) > 1 or any(w != h for w, h in folder.sizes):
        shown = ", ".join(f"{w} by {h}" for w, h in sorted(folder.sizes)[:3])
        more = ", ..." if len(folder.sizes) > 3 else ""
        reading.append(f"pictures of {len(folder.sizes)} sizes ({shown}{more}) were brought to {side} by {side}")
    return X, np.array([file.name for file in folder.files]), None, reading


def _sides(text: str) -> tuple[int, ...]:
    """Return height and width of a text such as 32x32."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() and int(side) for side in sides):
        raise ValueError(f"--shape must be height and width such as 32x32, got {text!r}")
    return tuple(int(side) for side in sides)
