"""``polyspan cluster images``."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ._output import say, show_json, show_table
from .cluster import check_places, comparison_rows, write_labels
from .points import (
    METHODS,
    NUMBERS,
    check_names,
    compare_methods,
    count_clusters,
    pixels_in_rows,
    read_labels,
    run_method,
    write_bases,
)


def images(
    source: Path,
    *,
    n_clusters: Annotated[int | None, Parameter(name=("--n-clusters", "-k"))] = None,
    method: str = "mlc",
    labels: Path | None = None,
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
        A folder of pictures (needs the extra "images"), or an array (.npy) of shape (n, h, w) or (n, channels, h, w).
    n_clusters : int
        How many groups; the number of classes where there are true ones.
    method : str
        mlc, lhdsc, franca, or any other of "polyspan cluster points", which sees pixels in rows.
    labels : Path
        True classes, to score against (.npy, or .csv with columns label and, for the files of a folder, id). They are
        not used in clustering.
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
    check_names(method, METHODS, out, seeds)
    check_places(out=out, memberships=memberships, bases=bases, save=save, report=report, plot=plot)
    strange = [name for name, given in (others if method == "mlc" else own).items() if given]
    if strange:
        whose = "the other methods" if method == "mlc" else "--method mlc"
        raise ValueError(f"--method {method} must go without the options of {whose}, got {', '.join(strange)}")
    X, names = _read(source, side, colour)
    truth = None if labels is None else read_labels(labels, names)
    if truth is not None and len(truth) != len(X):
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
        )
        return
    import time
    import warnings

    import numpy as np
    from sklearn.base import clone

    from polyspan.cluster import ImageJitter, ManifoldLinearizingClustering, class_scores, seed_stability
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
    for warning in caught:
        say(f"warning: {warning.message}")
    scores = {} if truth is None else {"scores": class_scores(truth, made.labels_)}
    told: dict[str, Any] = summary(made) | {"warnings": [str(w.message) for w in caught]} | scores
    if seeds > 1:
        agreed = seed_stability(clone(made).set_params(checkpoint=None), X, n_seeds=seeds)
        told["stability"] = {"seeds": seeds, "mean_ari": agreed.mean_ari, "min_ari": agreed.min_ari}
    if compare:
        given: dict[str, Any] = {"seed": seed, "jobs": jobs, "normalize": True}
        others = compare_methods(pixels_in_rows(X, unit=True), truth, k, without=method, given=given)
        told["compared"] = [{"method": method, **scores.get("scores", {}), "seconds": round(seconds, 3)}, *others]
    if out is not None:
        write_labels(out, made.labels_, names)
        told["out"] = str(out)
    if memberships is not None:
        write_array(memberships, belonging(made.transform(X), made.subspaces_))
    if bases is not None:
        write_bases(bases, made.subspaces_, None, told, normalize=False)
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
    rows += [
        (f"cluster {j}", f"{size} images in {rank} of {made.overall_rank_} directions")
        for j, (size, rank) in enumerate(zip(np.bincount(made.labels_), made.numerical_rank_, strict=True))
    ]
    rows += [(name, f"{told[name]:.2f}") for name in ("rate", "class_rate", "effective_neighbors") if name in told]
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

    last = fitted.history_[-1] if fitted.history_ else {}
    return {
        "method": "mlc",
        "n": len(fitted.labels_),
        "eta": fitted.eta_,
        "clusters": [
            {"label": j, "size": int(size), "rank": int(rank), "cosine_within": float(fitted.cosines_[j, j])}
            for j, (size, rank) in enumerate(
                zip(np.bincount(fitted.labels_, minlength=fitted.n_clusters), fitted.numerical_rank_, strict=True)
            )
        ],
        "overall_rank": int(fitted.overall_rank_),
        "effective_neighbors": fitted.effective_neighbors_,
        **{name: last[name] for name in ("rate", "class_rate") if name in last},
    }


def _read(source: Path, side: int, colour: bool) -> tuple[Any, Any]:
    """Return images (n, h, w) or (n, channels, h, w), and their names."""
    import numpy as np

    from polyspan.io import read_array

    if source.suffix == ".npy":
        X = read_array(source, ndim=None)
        if X.ndim not in (3, 4):
            raise ValueError(f"images must be (n, h, w) or (n, channels, h, w), got shape {X.shape} in {source}")
        return X, np.arange(len(X))
    from polyspan.cluster.image_folder import ImageFolder

    folder = ImageFolder(source, (3, side, side) if colour else (side, side))
    return np.stack([folder[i] for i in range(len(folder))]), np.array([file.name for file in folder.files])
