"""Rows, ids and true classes of ``polyspan cluster points``, from any kind of file."""

from pathlib import Path
from typing import Any, NamedTuple

TEXT_BYTES = 2**30


MEMBERS = (".npz", ".mat", ".safetensors")


class Rows(NamedTuple):
    """Rows (n, d), their ids and true classes, or None; and a sentence for what was taken by its usual name."""

    X: Any
    ids: Any
    truth: Any
    reading: list[str]


def read_rows(source: Path, labels: Path | None, member, label_member, column, label_column) -> Rows:
    """Return rows of any kind of file, with what stands beside them."""
    import numpy as np

    from polyspan.io import EmbeddingReader, as_vector, read_array, read_labelled, read_labels, read_members

    ids = truth = None
    reading = []
    tables, texts = (".parquet", ".arrow", ".feather"), (".csv", ".tsv")
    kinds = {
        "--member": (member, source.suffix not in (*tables, *texts)),
        "--label-member": (label_member, source.suffix not in (*tables, *texts)),
        "--column": (column, source.suffix in tables),
        "--label-column": (label_column, source.suffix in (*tables, *texts)),
    }
    for option, (given, fits) in kinds.items():
        if given is not None and not fits:
            raise ValueError(f"{option} must go with another kind of file, got {given!r} for {source.name}")
    if source.suffix in texts:
        X, ids, truth = _read_text_table(source, label_column)
    elif source.suffix in tables:
        reader = EmbeddingReader(source, column=column)
        batches = list(reader.batches())
        X = np.concatenate([batch.rows for batch in batches])
        ids = None if batches[0].ids is None else np.concatenate([np.asarray(batch.ids) for batch in batches])
        if label_column is not None:
            batches = EmbeddingReader(source, column=column, id_column=label_column).batches()
            truth = np.concatenate([np.asarray(batch.ids) for batch in batches])
    else:
        if source.suffix in MEMBERS and member is None:
            found = read_labelled(source, label_member=label_member)
            member = found.name
            if label_member is None and labels is None and found.label_name is not None:
                truth = found.labels
                reading.append(
                    f"rows are {member} of shape {found.array.shape}, labels beside them are {found.label_name}"
                )
        X = read_array(source, member=member)
        if label_member is not None:
            truth = as_vector(source, read_members(source, [label_member])[label_member], f"member {label_member}")
    if labels is not None:
        truth = read_labels(labels, ids)
    if truth is not None and len(truth) != len(X):
        turned = "; is the file of rows transposed?" if len(truth) == X.shape[1] else ""
        raise ValueError(f"there must be one label a row, got {len(X)} rows and {len(truth)} labels{turned}")
    return Rows(X, ids, truth, reading)


def _read_text_table(source: Path, label_column: str | None) -> tuple[Any, Any, Any]:
    """Return the rows of a .csv or .tsv file, its column ``id`` and its classes; a class is never a feature."""
    import numpy as np

    from polyspan.io import check_cells, read_array, read_csv, read_text

    header = read_text(source, max_bytes=TEXT_BYTES).split("\n", 1)[0].rstrip("\r")
    names = [cell.strip().strip('"') for cell in header.split("\t" if source.suffix == ".tsv" else ",")]
    if label_column is not None and label_column not in names:
        raise ValueError(f"--label-column must be one of {', '.join(names[:20])}, got {label_column!r}")
    if label_column is None and "label" in names:
        raise ValueError(
            f"the column label of {source.name} must be named by --label-column, or taken out, got neither"
        )
    if label_column is None and "id" not in names:
        return read_array(source), None, None
    table = read_csv(source, max_bytes=TEXT_BYTES)
    for name in ("id", label_column):
        if name in table:
            check_cells(source, table[name], name, distinct=name == "id")
    truth = None if label_column is None else np.array(table.pop(label_column))
    ids = np.array(table.pop("id")) if "id" in table else None
    if not table:
        raise ValueError(f"{source.name} must have columns of numbers beside ids and labels, got none")
    return np.stack([_numbers(source, name, cells) for name, cells in table.items()], axis=1), ids, truth


def _numbers(source: Path, name: str, cells: list[str]) -> Any:
    import numpy as np

    from polyspan.errors import WrongContent

    try:
        values = np.array(cells, dtype=np.float64)
    except ValueError:
        values = np.full(len(cells), np.nan)
        for i, cell in enumerate(cells):
            try:
                values[i] = float(cell)
            except ValueError:
                where = f"row {i}, column {name}"
                raise WrongContent(source, found=repr(cell[:40]), expected="a number", where=where) from None
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise WrongContent(source, found=cells[row], expected="finite numbers", where=f"row {row}, column {name}")
    return values
