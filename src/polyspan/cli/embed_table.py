"""``polyspan embed-table train``, ``predict`` and ``report``: tables with categorical columns, from files."""

import math
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ._output import check_target, say, show_json, show_table
from ._places import check_places

TABLES = (".parquet", ".arrow", ".feather")

SCHEMES = {"multiplex": "one table for all", "hash": "a table a column", "collisionless": "a row a value"}


def train(
    source: Path,
    *,
    target: str,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    task: str = "classification",
    columns: list[str] | None = None,
    categorical: list[str] | None = None,
    budget_mb: float = 8.0,
    width: int = 16,
    lookups: int = 1,
    epochs: int = 3,
    optimizer: str = "adam",
    batch_rows: int = 65536,
    checkpoint: Path | None = None,
    compare: bool = False,
    device: str = "cpu",
    seed: int = 0,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Learn a column of a table from the others, all categorical ones in one hashed table of a fixed size.

    The file may be larger than memory. A tenth of the rows is held out; training stops when their loss rises twice.

    Parameters
    ----------
    source : Path
        .parquet, .arrow, .feather, .csv or .tsv (text tables are read whole). Rows should be in no order of the target.
    target : str
        Column to learn.
    out : Path
        The fitted model, one .safetensors file.
    task : str
        "classification" or "regression".
    columns : list of str
        Columns to learn from; all others where left out.
    categorical : list of str
        Columns to embed; all but those of floats where left out.
    budget_mb : float
        Size of the embedding table in MiB.
    width : int
        Numbers a row of the table.
    lookups : int
        Rows a value; more for columns that deserve more width.
    epochs : int
        Passes over the file, at most.
    optimizer : str
        "adam", or "row-adagrad" for tables much larger than a batch.
    batch_rows : int
        Rows in memory at a time.
    checkpoint : Path
        A .safetensors file that is written after each pass, and gone on from if it is there.
    compare : bool
        Train hashed tables of each column's own, of the same size in all, and a table with a row a value as well.
    device : str
        "cpu", "cuda:0", or "auto".
    seed : int
        Of weights, the order of rows, and which are held out.
    plot : Path
        Draw losses by pass, and which rows columns use and share, in the first rows of the file (.svg, .png or .pdf).
    json : bool
        Print JSON.
    """
    from polyspan.learn import UnifiedEmbeddingClassifier, UnifiedEmbeddingRegressor

    check_target(out, "--out", ".safetensors")
    check_target(checkpoint, "--checkpoint", ".safetensors")
    check_places(plot, read=(source,), out=out, checkpoint=checkpoint)
    if task not in ("classification", "regression"):
        raise ValueError(f"--task must be 'classification' or 'regression', got {task!r}")
    if not 0 < budget_mb < math.inf:
        raise ValueError(f"--budget-mb must be above 0 and finite, got {budget_mb}")
    if width < 1:
        raise ValueError(f"--width must be at least 1, got {width}")
    kind: Any = UnifiedEmbeddingClassifier if task == "classification" else UnifiedEmbeddingRegressor
    options: dict[str, Any] = {
        "categorical": categorical or "auto",
        "n_embeddings": max(2, int(budget_mb * 2**20 / (4 * width))),
        "chunk_dim": width,
        "n_lookups": lookups,
        "max_epochs": epochs,
        "optimizer": optimizer,
        "early_stopping": True,
        "device": device,
        "random_state": seed,
        "verbose": True,
    }
    schemes = list(SCHEMES) if compare else ["multiplex"]
    losses: dict[str, float] = {}
    sizes: dict[str, int] = {}
    fitted: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for scheme in reversed(schemes):
        say(f"training with {SCHEMES[scheme]}")
        model = kind(scheme=scheme, **options)
        kept = checkpoint if scheme == "multiplex" else None
        model.fit_file(source, target, columns=columns, batch_rows=batch_rows, checkpoint=kept)
        losses[scheme] = min(model.validation_losses_, default=float("nan"))
        fitted[scheme] = model
        sizes[scheme] = 0 if model.network_.embedding is None else model.network_.embedding.nbytes
        if scheme == "multiplex":
            model.save(out)
            facts = {
                "embedded": model.categorical_features_,
                "numbers": model.dense_features_,
                "epochs": model.n_iter_,
                "values_cut": model.n_truncated_,
                "parameters": sum(p.numel() for p in model.network_.parameters()),
                "file_bytes": out.stat().st_size,
            }
    if plot is not None:
        _draw({scheme: fitted[scheme] for scheme in schemes}, source, batch_rows, plot)
    result = {"out": str(out), **facts, "loss_held_out": losses, "table_bytes": sizes}
    if json:
        show_json(result)
        return
    rows = [("out", str(out)), ("embedded columns", ", ".join(facts["embedded"]))]
    rows += [("columns of numbers", ", ".join(facts["numbers"])), ("passes", str(facts["epochs"]))]
    rows += [("parameters", f"{facts['parameters']:,}"), ("bytes of the file", f"{facts['file_bytes']:,}")]
    for scheme in schemes:
        rows += [
            (f"loss held out, {SCHEMES[scheme]}", f"{losses[scheme]:.4f}"),
            (f"table, {SCHEMES[scheme]}", f"{sizes[scheme] / 2**20:.2f} MiB"),
        ]
    show_table("", ("what", "value"), rows)


def _draw(fitted: dict[str, Any], source: Path, batch_rows: int, plot: Path) -> None:
    """Draw what was learnt, and which rows of the one table the columns of the first rows use."""
    from polyspan.learn._table_files import TableFile
    from polyspan.learn.unified_embedding_training_plots import learnt_table, plot_learnt_tables, rows_used

    tables = {SCHEMES[scheme]: learnt_table(model) for scheme, model in fitted.items()}
    ours, used, collisions = fitted["multiplex"], None, None
    if ours.network_.embedding is not None:
        with TableFile(source, None, list(ours.feature_names_in_), batch_rows) as table:
            columns = table.first(batch_rows)
        used = rows_used(ours.network_.embedding, ours._read_columns(columns, reset=False))
        collisions = ours.collision_report(columns)
    plot_learnt_tables(tables, plot, used=used, collisions=collisions)


def predict(
    model: Path, source: Path, *, out: Annotated[Path, Parameter(name=("--out", "-o"))], batch_rows: int = 65536
) -> None:
    """Predict for every row of a table: probabilities of classes, or numbers.

    Parameters
    ----------
    model : Path
        What ``polyspan embed-table train`` wrote.
    source : Path
        A table with the columns of the training; others are ignored. Of the same kind of file where columns are dates
        or truth values, which are text in .csv and .tsv.
    out : Path
        Predictions, in the order of the rows (.parquet, .arrow, .feather, .csv or .tsv).
    batch_rows : int
        Rows in memory at a time.
    """
    import numpy as np

    from polyspan.io import write_columns
    from polyspan.learn._table_files import TableFile

    check_target(out, "--out", *TABLES, ".csv", ".tsv")
    check_places(read=(model, source), out=out)
    fitted = _load(model)
    parts = []
    with TableFile(source, None, list(fitted.feature_names_in_), batch_rows) as table:
        for _, columns, _ in table.batches():
            parts.append(fitted.predict_proba(columns) if hasattr(fitted, "classes_") else fitted.predict(columns))
    if not parts:
        raise ValueError(f"source must have at least one row, got 0 in {source}")
    made = np.concatenate(parts)
    if made.ndim == 1:
        write_columns(out, {"prediction": made})
    else:
        likeliest = fitted.classes_[made.argmax(axis=1)]
        shares = {f"probability of {name}": made[:, i] for i, name in enumerate(fitted.classes_)}
        write_columns(out, {"prediction": likeliest, **shares})
    say(f"wrote {len(made):,} predictions to {out}")


def report(model: Path, source: Path, *, batch_rows: int = 65536, plot: Path | None = None, json: bool = False) -> None:
    """Say which columns share rows of the table, and how much the network's readers of them see of one another.

    Parameters
    ----------
    model : Path
        What ``polyspan embed-table train`` wrote.
    source : Path
        A table with the columns of the training, whose first rows are looked at.
    batch_rows : int
        How many rows.
    plot : Path
        Draw both (.svg, .png or .pdf).
    json : bool
        Print JSON.
    """
    from polyspan.learn._table_files import TableFile

    check_places(plot, read=(model, source))
    fitted = _load(model)
    with TableFile(source, None, list(fitted.feature_names_in_), batch_rows) as table:
        columns = table.first(batch_rows)
    found, overlap = fitted.collision_report(columns), fitted.reader_overlap()
    if plot is not None:
        from polyspan.learn.unified_embedding_plots import plot_collisions

        plot_collisions(found, overlap, plot)
    if json:
        show_json({"collisions": {n: c._asdict() for n, c in found.items()}, "reader_overlap": overlap.tolist()})
        return
    head = (
        "column",
        "values",
        "told apart by no reader",
        "rows shared with other columns",
        "largest overlap of readers",
    )
    rows = []
    for i, (name, c) in enumerate(found.items()):
        others = [overlap[i, j] for j in range(len(found)) if j != i]
        rows.append(
            (name, str(c.n_values), f"{c.same_share:.4f}", f"{c.others_share:.4f}", f"{max(others, default=0.0):.3f}")
        )
    show_table("", head, rows)


def _load(path: Path) -> Any:
    """Read a classifier or a regressor, whichever the file holds."""
    from polyspan.io import load_fitted
    from polyspan.learn import UnifiedEmbeddingClassifier, UnifiedEmbeddingRegressor

    kinds: dict[str, Any] = {c.__name__: c for c in (UnifiedEmbeddingClassifier, UnifiedEmbeddingRegressor)}
    return kinds[load_fitted(path, kind=tuple(kinds)).kind].load(path)
