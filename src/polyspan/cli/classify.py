"""``polyspan grassmann fit`` and ``report``: classes of embeddings as subspaces."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ._output import check_target, show_json, show_table
from ._pictures import check_drawing
from ._places import check_places

TABLES = (".parquet", ".arrow", ".feather")


def fit(
    source: Path,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    labels: Path | None = None,
    member: str | None = None,
    label_member: str = "labels",
    column: str | None = None,
    label_column: str = "label",
    dimension: int = 8,
    steps: int = 600,
    held_out: float = 0.2,
    seed: int = 0,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Fit one subspace a class on labelled embeddings.

    It is compared, on rows held out, with logistic regression and with each class's PCA; then fitted again on all rows
    and written.

    Parameters
    ----------
    source : Path
        Embeddings: .npz or .safetensors with labels in the same file, a table with a label column, or another vector
        file together with --labels.
    out : Path
        The fitted classifier, one .safetensors file.
    labels : Path
        Labels in a file of their own, one an item: .npy of whole numbers, or .csv with a column label.
    member : str
        Member that holds the embeddings.
    label_member : str
        Member that holds the labels.
    column : str
        Vector column of a table.
    label_column : str
        Label column of a table.
    dimension : int
        Dimensions a class.
    steps : int
        Mini-batch steps of training.
    held_out : float
        Share of the rows that the comparison is measured on; 0 leaves it out.
    seed : int
        Which rows are held out, and the order of batches.
    plot : Path
        Draw the angles between classes (.svg, .png or .pdf).
    json : bool
        Print JSON.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, train_test_split
    from sklearn.preprocessing import normalize

    from polyspan.nn import GrassmannClassifier

    check_target(out, "--out", ".safetensors")
    check_drawing(plot, "--plot")
    check_places(plot, read=(source, labels), out=out)
    if not 0 <= held_out < 1:
        raise ValueError(f"--held-out must be at least 0 and below 1, got {held_out}")
    X, y = _load(source, labels, member, label_member, column, label_column)
    model = GrassmannClassifier(dimension, max_iter=steps, random_state=seed)
    scores: dict[str, float] = {}
    if held_out:
        train, test, train_y, test_y = train_test_split(X, y, test_size=held_out, random_state=seed, stratify=y)
        untrained = GrassmannClassifier(dimension, max_iter=1, learning_rate=0.0, random_state=seed)
        linear = GridSearchCV(LogisticRegression(max_iter=500), {"C": [1.0, 10.0, 100.0]}, cv=3)
        scores = {
            "subspaces, trained": float(model.fit(train, train_y).score(test, test_y)),
            "subspaces of PCA": float(untrained.fit(train, train_y).score(test, test_y)),
            "logistic regression": float(linear.fit(normalize(train), train_y).score(normalize(test), test_y)),
        }
    model.fit(X, y)
    model.save(out)
    if plot is not None:
        from polyspan.nn.grassmann_plots import plot_class_angles

        plot_class_angles(model, plot)
    result: dict[str, Any] = {"out": str(out), "rows": len(X), "classes": len(model.classes_), "accuracy": scores}
    if json:
        show_json(result)
        return
    rows = [("out", str(out)), ("rows", str(len(X))), ("classes", str(len(model.classes_)))]
    rows += [(f"accuracy held out, {name}", f"{value:.4f}") for name, value in scores.items()]
    show_table("", ("what", "value"), rows)


def report(
    model: Path,
    source: Path,
    *,
    labels: Path | None = None,
    member: str | None = None,
    label_member: str = "labels",
    column: str | None = None,
    label_column: str = "label",
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Measure a fitted classifier on labelled embeddings, and say which classes lie close.

    Parameters
    ----------
    model : Path
        What ``polyspan grassmann fit`` wrote.
    source : Path
        Embeddings, as for fit.
    labels : Path
        As for fit.
    member : str
        Member that holds the embeddings.
    label_member : str
        Member that holds the labels.
    column : str
        Vector column of a table.
    label_column : str
        Label column of a table.
    plot : Path
        Draw the angles between classes (.svg, .png or .pdf).
    json : bool
        Print JSON.
    """
    import numpy as np

    from polyspan.nn import GrassmannClassifier

    check_drawing(plot, "--plot")
    check_places(plot, read=(model, source, labels))
    fitted = GrassmannClassifier.load(model)
    X, y = _load(source, labels, member, label_member, column, label_column)
    answers = fitted.predict(X)
    outside = float(fitted.residual(X).min(axis=1).mean())
    angles = np.rad2deg(fitted.principal_angles()[..., 0])
    above = np.triu_indices(len(angles), 1)
    nearest = np.argsort(angles[above], kind="stable")[:5]
    pairs: list[dict[str, Any]] = [
        {
            "classes": [str(fitted.classes_[above[0][i]]), str(fitted.classes_[above[1][i]])],
            "degrees": float(angles[above][i]),
        }
        for i in nearest
    ]
    recall = {str(c): float(np.mean(answers[y == c] == c)) for c in np.unique(y)}
    result = {"accuracy": float(np.mean(answers == y)), "outside": outside, "recall": recall, "nearest": pairs}
    if plot is not None:
        from polyspan.nn.grassmann_plots import plot_class_angles

        plot_class_angles(fitted, plot)
    if json:
        show_json(result)
        return
    rows = [("accuracy", f"{result['accuracy']:.4f}"), ("outside the nearest subspace", f"{outside:.3f}")]
    rows += [(f"recall of {name}", f"{value:.4f}") for name, value in recall.items()]
    rows += [(f"angle of {p['classes'][0]} and {p['classes'][1]}", f"{p['degrees']:.1f} degrees") for p in pairs]
    show_table("", ("what", "value"), rows)


def _load(
    source: Path, labels: Path | None, member: str | None, label_member: str, column: str | None, label_column: str
) -> tuple[Any, Any]:
    """Read embeddings (n, d) and labels (n,) from one file or from two."""
    import numpy as np

    from polyspan.io import EmbeddingReader, read_array, read_labels, read_members

    if labels is not None:
        X = read_array(source, member=member, column=column)
        y = read_labels(labels)
    elif source.suffix.lower() in TABLES:
        batches = list(EmbeddingReader(source, column=column, id_column=label_column).batches())
        X = np.concatenate([batch.rows for batch in batches])
        y = np.concatenate([np.asarray(batch.ids) for batch in batches])
    elif source.suffix.lower() in (".npz", ".safetensors"):
        found = read_members(source, [member or "embeddings", label_member])
        X, y = found[member or "embeddings"], found[label_member]
    else:
        raise ValueError(f"--labels must be given for {source.suffix} files, which hold no labels, got {source}")
    if len(X) != len(y):
        raise ValueError(f"there must be one label a row, got {len(X)} rows and {len(y)} labels")
    return X, y
