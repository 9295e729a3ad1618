"""``polyspan compat train``, ``embed`` and ``evaluate``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from ._output import check_target, say, show_json, show_table
from ._places import check_places


def train(
    features: Path,
    labels: Path,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    old: Path | None = None,
    old_vectors: Path | None = None,
    method: Literal["orthogonal", "basis"] = "orthogonal",
    new_vectors: Path | None = None,
    dim: int = 32,
    extra_dim: int = 32,
    hidden: tuple[int, ...] = (256, 256),
    epochs: int = 20,
    learning_rate: float = 3e-3,
    batch_size: int = 128,
    separability: bool = False,
    checkpoint: Path | None = None,
    member: str | None = None,
    column: str | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Train an encoder of feature rows whose vectors can be compared with those of an older one.

    Without --old and --old-vectors it trains the first of a chain.

    Parameters
    ----------
    features : Path
        Training rows (.npy, .npz, .parquet, .arrow, .safetensors, .csv).
    labels : Path
        The class of each row: whole numbers (.npy, .npz, .safetensors, .mat), or a .csv or .tsv with a column label.
    out : Path
        The encoder, one .safetensors file.
    old : Path
        The older encoder, a file of this command.
    old_vectors : Path
        In its place, the older encoder's vectors of the same rows.
    method : {"orthogonal", "basis"}
        basis is the older method BT2: it trains an independent encoder first, and then one that follows both.
    new_vectors : Path
        With basis, an independent new encoder's vectors of the same rows, in place of the one that would be trained.
    dim : int
        Width of the vectors where there is no older encoder.
    extra_dim : int
        Numbers added to an older encoder's width.
    hidden : tuple of int
        Widths of the hidden layers.
    epochs : int
        Passes over the rows.
    learning_rate : float
        Of Adam.
    batch_size : int
        Rows a step.
    separability : bool
        Let classes pull less that the older encoder cannot tell.
    checkpoint : Path
        A .safetensors file from which a killed training goes on.
    member : str
        Member of an .npz or .safetensors file of features.
    column : str
        Column of a table of features.
    seed : int
        Of weights and batches.
    json : bool
        Print JSON.
    """
    from polyspan.align import BasisTransformationClassifier, CompatibleClassifier
    from polyspan.io import digest_file, read_array, read_labels

    if old is not None and old_vectors is not None:
        raise ValueError(f"--old and --old-vectors exclude one another, got {old} and {old_vectors}")
    if method != "basis" and new_vectors is not None:
        raise ValueError(f"--new-vectors is for --method basis, got --method {method}")
    if method == "basis" and separability:
        raise ValueError("--separability is for --method orthogonal, got --method basis")
    check_target(out, "--out", ".safetensors")
    check_places(read=(features, labels, old, old_vectors, new_vectors), out=out, checkpoint=checkpoint)
    X = read_array(features, member=member, column=column)
    y = read_labels(labels)
    if len(X) != len(y):
        raise ValueError(f"labels must have one entry a row of {features} ({len(X)}), got {len(y)}")
    older = None if old is None else CompatibleClassifier.load(old)
    if old_vectors is not None:
        older = read_array(old_vectors)
    shared: dict[str, Any] = {
        "hidden": hidden,
        "embedding_dim": dim,
        "extra_dim": extra_dim,
        "max_iter": epochs,
        "warmup": min(1.0, epochs),
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "checkpoint": checkpoint,
        "random_state": seed,
        "verbose": True,
    }
    if method == "basis":
        new = None if new_vectors is None else read_array(new_vectors)
        made = BasisTransformationClassifier(**shared).fit(X, y, old=older, new=new)
    else:
        weights = "separability" if separability else "equal"
        made = CompatibleClassifier(**shared, prototype_weights=weights).fit(X, y, old=older)
    source = None if old is None else digest_file(old)
    made.save(out, features=digest_file(features), old=source)
    width = made.class_means_.shape[1]
    facts = {
        "encoder": str(out),
        "rows": len(X),
        "classes": len(made.classes_),
        "width": width,
        "comparable": made.old_dim_ if older is not None else width,
        "epochs": made.n_iter_,
        "loss": made.history_[-1]["total"],
    }
    if made.separability_ is not None and made.separability_.min() < 0.5:
        weak = made.classes_[made.separability_ < 0.5].tolist()
        say(f"warning: the older encoder cannot tell {len(weak)} classes: {weak[:10]}; try --separability")
    if json:
        show_json(facts)
    else:
        show_table("", ("what", "value"), [(name, str(value)) for name, value in facts.items()])


def embed(
    encoder: Path,
    features: Path,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    width: int | None = None,
    member: str | None = None,
    column: str | None = None,
    id_column: str | None = None,
    batch_rows: int = 16384,
    json: bool = False,
) -> None:
    """Embed a file of feature rows of any size; a killed run with an .npy target goes on.

    Parameters
    ----------
    encoder : Path
        A file of ``polyspan compat train``.
    features : Path
        Rows (.npy, .npz, .parquet, .arrow, .safetensors).
    out : Path
        Where the vectors go; the suffix says the format. Ids of a table are kept.
    width : int
        Only the first so many numbers, scaled to length 1, to search an index of that width.
    member : str
        Member of an .npz or .safetensors file.
    column : str
        Vector column of a table.
    id_column : str
        Id column of a table.
    batch_rows : int
        Rows a batch.
    json : bool
        Print JSON.
    """
    from polyspan.align import CompatibleClassifier
    from polyspan.io import EmbeddingReader, digest_file, transform_file
    from polyspan.run import Progress

    check_places(read=(encoder, features), out=out)
    model = CompatibleClassifier.load(encoder)
    full = model.class_means_.shape[1]
    if width is not None and not 1 <= width <= full:
        raise ValueError(f"--width must be between 1 and {full}, got {width}")
    n_rows = EmbeddingReader(features, member=member, column=column, id_column=id_column).n_rows
    with Progress(f"embedding {features.name}", n_rows) as shown:
        rows = transform_file(
            features,
            out,
            lambda X: model.transform(X, width=width),
            dim=width or full,
            member=member,
            column=column,
            id_column=id_column,
            batch_rows=batch_rows,
            fingerprint=f"{digest_file(encoder)}:{width}",
            progress=lambda done, _: shown.advance(done - shown.count),
        )
    if json:
        show_json({"out": str(out), "rows": rows, "width": width or full})
    else:
        show_table("", ("what", "value"), [("out", str(out)), ("rows", str(rows)), ("width", str(width or full))])


def evaluate(
    models: list[Path],
    *,
    labels: Path,
    metric: str = "map",
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Say which of several encoders, oldest first, may search whose index.

    Parameters
    ----------
    models : list of Path
        The same items embedded by each encoder, oldest first; a query's own row is not to be found.
    labels : Path
        The class of each item: whole numbers (.npy, .npz, .safetensors, .mat), or a .csv or .tsv with a column label.
    metric : {"map", "top-1", "top-5"}
        Mean average precision, or the share of queries with a hit among the first.
    plot : Path
        Draw the matrix (.svg, .png or .pdf).
    json : bool
        Print JSON.
    """
    import math

    from polyspan.align import compatibility_matrix
    from polyspan.io import read_array, read_labels

    check_places(plot, read=(*models, labels))
    y = read_labels(labels)
    made = compatibility_matrix([read_array(path) for path in models], y, metric=metric)
    if plot is not None:
        from polyspan.align.compatibility_plots import plot_compatibility

        plot_compatibility(made, plot, [path.stem for path in models])
    alone = math.isnan(made.average_compatibility)
    if json:
        scores = [[None if math.isnan(value) else float(value) for value in row] for row in made.scores]
        show_json(
            {
                "models": [str(path) for path in models],
                "metric": metric,
                "scores": scores,
                "average_compatibility": None if alone else made.average_compatibility,
                "average_score": made.average_score,
            }
        )
        return
    rows = []
    for i, path in enumerate(models):
        for j in range(i + 1):
            better = "" if i == j else "yes" if made.scores[i, j] > made.scores[j, j] else "no"
            rows.append((path.name, models[j].name, f"{made.scores[i, j]:.4f}", better))
    rows.append(("all", "", f"{made.average_score:.4f}", "" if alone else f"{made.average_compatibility:.0%}"))
    show_table("", ("queries", "gallery", metric, "compatible"), rows)
