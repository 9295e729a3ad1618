"""Training on a file, batch by batch, with a checkpoint after each pass."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.utils import check_random_state

from polyspan.io import load_fitted
from polyspan.run import Progress

from ._cross_files import restore_estimator, write_estimator
from ._epoch_keeper import EpochKeeper
from ._text_hashing import mix

EARLY_STOPPING_ROWS = 10_000


class Rows(NamedTuple):
    """Keys (n, columns) int64, scaled numbers (n, p) float32, targets (n,) and weights (n,) float32 or None."""

    keys: np.ndarray
    dense: np.ndarray
    target: np.ndarray
    weight: np.ndarray | None

    def take(self, rows: Any) -> "Rows":
        """Return some of the rows."""
        return Rows(*(None if part is None else part[rows] for part in self))  # ty: ignore[invalid-argument-type]


def fit_table(made: Any, table: Any, checkpoint: Path | None) -> None:
    """Fit an estimator to a :class:`~._table_files.TableFile`, from the checkpoint if it is there."""
    stops = table.n_rows > EARLY_STOPPING_ROWS if made.early_stopping == "auto" else made.early_stopping
    facts = {"file": table.facts(), "stops": bool(stops)}
    rng = check_random_state(made.random_state)
    keeper = EpochKeeper(made, made.n_iter_no_change)
    if checkpoint is not None and checkpoint.exists():
        _resume(made, checkpoint, facts, keeper)
    else:
        _scan(made, table, rng)
    share = made.validation_fraction if stops else 0.0
    batch = made._batch_rows(table.n_rows)
    while made.n_iter_ < made.max_epochs and not keeper.done:
        order_rng = np.random.default_rng([made._seed, made.n_iter_])
        label = f"epoch {made.n_iter_ + 1} of {made.max_epochs}"
        with Progress(label, table.n_rows, enabled=bool(made.verbose)) as shown:
            total, count = 0.0, 0
            for rows, held in _file_rows(made, table, share):
                train = order_rng.permutation(np.flatnonzero(~held))
                made._pass(rows, train, batch)
                made.n_truncated_ += made._truncated if made.n_iter_ == 0 else 0
                shown.advance(len(held), loss=made.loss_curve_[-1] if made.loss_curve_ else 0.0)
            if stops:
                for rows, held in _file_rows(made, table, share):
                    if held.any():
                        total += made._held_loss(rows.take(held)) * held.sum()
                        count += int(held.sum())
        made.n_iter_ += 1
        if stops and count:
            keeper.take(total / count)
        if checkpoint is not None:
            write_estimator(made, checkpoint, {**facts, "keeper": keeper.losses}, keeper.arrays())
    keeper.restore()


def _scan(made: Any, table: Any, rng: Any) -> None:
    """Take classes, the scale of numbers, and vocabularies where the scheme needs them, in one pass."""
    targets: Any = None
    found: dict[str, np.ndarray] = {}
    count, total, square = 0, None, None
    for _, columns, y in table.batches():
        if total is None:
            made.n_features_in_ = len(columns)
            made.feature_names_in_ = np.array(list(columns), dtype=object)
            made._learn_columns(columns)
        targets = made._noted(np.asarray(y), targets)
        dense = made._numbers(columns)
        if total is None:
            shift, total, square = dense.mean(axis=0), np.zeros(dense.shape[1]), np.zeros(dense.shape[1])
        total, square = total + (dense - shift).sum(axis=0), square + np.square(dense - shift).sum(axis=0)
        count += len(dense)
        for name, keys in (made._vocabularies(made._keys(columns)) or {}).items():
            found[name] = np.union1d(found[name], keys) if name in found else keys
    if total is None or square is None:
        raise ValueError("the file must have at least one row, got 0")
    made._learn_noted(targets)
    mean = total / count
    made._mean, made._scale = shift + mean, np.sqrt(np.maximum(square / count - mean**2, 0))
    made._scale[made._scale <= 1e-12 * np.abs(made._mean)] = 1.0
    made._scale[made._scale == 0] = 1.0
    made._build(found or None, rng)


def _file_rows(made: Any, table: Any, share: float) -> Iterator[tuple[Rows, np.ndarray]]:
    """Yield rows of the file, and which of them are held out, by their numbers."""
    for first, columns, values in table.batches():
        y = np.asarray(values)
        place = mix(np.arange(first, first + len(y), dtype=np.uint64) + np.uint64(made._seed + 1))
        held = (place >> np.uint64(11)).astype(np.float64) / 2.0**53 < share
        rows = Rows(made._keys(columns), made._scaled(made._numbers(columns)), *made._target(y))
        yield rows, held


def _resume(made: Any, path: Path, facts: Mapping[str, Any], keeper: EpochKeeper) -> None:
    """Go on from a checkpoint, which must be of the same file and parameters but for the number of epochs."""
    found = load_fitted(path, kind=type(made).__name__)
    mine = {k: list(v) if isinstance(v, tuple) else v for k, v in made.get_params().items()}
    free = ("max_epochs", "verbose", "device", "n_iter_no_change")
    other = [k for k, v in mine.items() if k not in free and found.params["init"].get(k) != v]
    if other or any(found.params["training"].get(k) != v for k, v in facts.items()):
        what = ", ".join(f"{k}={found.params['init'].get(k)!r}" for k in other) or "another file or target"
        raise ValueError(f"checkpoint must be of this training, got {path.name} with {what}")
    restore_estimator(made, found)
    keeper.resume(found.params["training"]["keeper"], found.arrays)
