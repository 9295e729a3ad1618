"""What the classifier and the regressor have in common: columns to keys and numbers, training, files."""

import copy
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import assert_all_finite, check_random_state
from sklearn.utils.validation import check_is_fitted, column_or_1d

from polyspan.io import load_fitted
from polyspan.run import Progress

from ._cross_files import restore_estimator, write_estimator
from ._epoch_keeper import EpochKeeper
from ._file_training import EARLY_STOPPING_ROWS, Rows, fit_table
from ._lookup_plan import SCHEMES
from ._older_files import all_entries
from ._table_columns import is_dense, is_listed, numbers, read_columns
from ._value_keys import PAD, value_keys
from .categorical_hashing import column_specs

PREDICT_ROWS = 8192


class CrossEstimator(BaseEstimator):
    """Fit :class:`CrossNetwork` to a table; the target's meaning is the subclass's."""

    _fit_is_abstract = True

    n_features_in_: int
    feature_names_in_: np.ndarray
    categorical_features_: list[str]
    dense_features_: list[str]
    n_truncated_: int
    network_: Any

    def __init__(
        self,
        *,
        categorical="auto",
        n_embeddings=2**16,
        chunk_dim=16,
        n_lookups=1,
        salt_groups=None,
        n_shards=1,
        scheme="multiplex",
        max_len=16,
        combiner="mean",
        n_cross=1,
        hidden=(64,),
        optimizer="adam",
        learning_rate=2e-3,
        table_learning_rate=0.05,
        batch_size="auto",
        max_epochs=10,
        early_stopping="auto",
        validation_fraction=0.1,
        n_iter_no_change=2,
        absent="error",
        device="cpu",
        random_state=None,
        verbose=False,
    ):
        self.categorical = categorical
        self.n_embeddings = n_embeddings
        self.chunk_dim = chunk_dim
        self.n_lookups = n_lookups
        self.salt_groups = salt_groups
        self.n_shards = n_shards
        self.scheme = scheme
        self.max_len = max_len
        self.combiner = combiner
        self.n_cross = n_cross
        self.hidden = hidden
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.table_learning_rate = table_learning_rate
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.absent = absent
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    # The target, by the subclass.

    def _learn_target(self, y: np.ndarray, classes: Any = None) -> None:
        raise NotImplementedError

    def _noted(self, y: np.ndarray, before: Any) -> Any:
        """Return what is to be kept of some targets, and of those ``before``, to learn from all of them later."""
        raise NotImplementedError

    def _learn_noted(self, noted: Any) -> None:
        """Learn from what was kept of all targets."""
        raise NotImplementedError

    def _target(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return targets for the loss, and weights."""
        raise NotImplementedError

    def _losses(self, out: Any, target: Any) -> Any:
        """Return the loss of each row."""
        raise NotImplementedError

    @property
    def _num_out(self) -> int:
        raise NotImplementedError

    def _facts(self) -> dict[str, Any]:
        """Return what was learnt of the target, in JSON types."""
        raise NotImplementedError

    def _set_facts(self, facts: Mapping[str, Any]) -> None:
        raise NotImplementedError

    # Columns.

    def _check_parameters(self) -> None:
        for name, least in (("max_epochs", 1), ("n_iter_no_change", 1), ("max_len", 1), ("n_cross", 0)):
            value = getattr(self, name)
            if not isinstance(value, Real) or not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        for name in ("learning_rate", "table_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.batch_size != "auto" and not int(self.batch_size) >= 1:
            raise ValueError(f"batch_size must be 'auto' or at least 1, got {self.batch_size}")
        if self.early_stopping not in ("auto", True, False):
            raise ValueError(f"early_stopping must be 'auto', True or False, got {self.early_stopping!r}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        if self.optimizer not in ("adam", "row-adagrad"):
            raise ValueError(f"optimizer must be 'adam' or 'row-adagrad', got {self.optimizer!r}")
        if self.absent not in ("error", "missing"):
            raise ValueError(f"absent must be 'error' or 'missing', got {self.absent!r}")

    def _read_columns(self, X: Any, *, reset: bool) -> dict[str, Any]:
        return read_columns(self, X, reset=reset, absent=self.absent)[0]

    def _learn_columns(self, columns: Mapping[str, Any]) -> None:
        """Choose which columns are embedded, and take the scale of the others."""
        if isinstance(self.categorical, str):
            if self.categorical != "auto":
                raise ValueError(f"categorical must be 'auto' or name columns, got {self.categorical!r}")
            chosen = [name for name, column in columns.items() if not is_dense(column)]
        else:
            chosen = [c if isinstance(c, str) else f"x{c}" for c in self.categorical]
            strange = [name for name in chosen if name not in columns]
            if strange:
                raise ValueError(f"categorical must name columns of X, got {strange[:5]}")
        self.categorical_features_ = [name for name in columns if name in set(chosen)]
        self.dense_features_ = [name for name in columns if name not in set(chosen)]
        self._lists = {n: int(self.max_len) for n in self.categorical_features_ if is_listed(columns[n])}
        self.n_truncated_ = 0

    def _keys(self, columns: Mapping[str, Any]) -> np.ndarray:
        found = [value_keys(columns[name], name, self._lists.get(name)) for name in self.categorical_features_]
        self._truncated = sum(part.n_truncated for part in found)
        parts = [part.dense() for part in found]
        n = len(next(iter(columns.values())))
        return np.concatenate([part.reshape(n, -1) for part in parts], axis=1) if parts else np.zeros((n, 0), np.int64)

    def _numbers(self, columns: Mapping[str, Any]) -> np.ndarray:
        n = len(next(iter(columns.values())))
        made = np.empty((n, len(self.dense_features_)))
        for i, name in enumerate(self.dense_features_):
            made[:, i] = numbers(columns[name], name)
            if not np.isfinite(made[:, i]).all():
                where = f"X, column {name!r} of numbers (fill it, or name it in categorical)"
                assert_all_finite(made[:, i], input_name=where)
        return made

    def _learn_scale(self, dense: np.ndarray) -> None:
        self._mean, self._scale = dense.mean(axis=0), dense.std(axis=0)
        self._scale[self._scale <= 1e-12 * np.abs(self._mean)] = 1.0
        self._scale[self._scale == 0] = 1.0

    def _scaled(self, dense: np.ndarray) -> np.ndarray:
        return ((dense - self._mean) / self._scale).astype(np.float32)

    # The network.

    def _build(self, vocabularies: Mapping[str, np.ndarray] | None, rng: Any) -> None:
        from polyspan.run import pick_device, torch_generator

        from ._cross_network import CrossNetwork
        from .unified_embedding import UnifiedEmbedding

        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {tuple(SCHEMES)}, got {self.scheme!r}")
        self._seed = int(rng.randint(2**31 - 1))
        generator = torch_generator(self._seed)
        embedding = None
        if self.categorical_features_:
            sizes = None if vocabularies is None else {n: max(len(v), 1) for n, v in vocabularies.items()}
            specs = column_specs(
                self.categorical_features_,
                self.n_lookups,
                self.salt_groups,
                max_len=self._lists,
                combiner=self.combiner,
                sizes=sizes,
            )
            embedding = UnifiedEmbedding(
                specs,
                self.n_embeddings,
                self.chunk_dim,
                n_shards=self.n_shards,
                scheme=self.scheme,
                sparse=self.optimizer == "row-adagrad",
                vocabularies=vocabularies if self.scheme == "collisionless" else None,
                generator=generator,
            )
        self.network_ = CrossNetwork(
            embedding,
            len(self.dense_features_),
            self._num_out,
            num_cross=self.n_cross,
            hidden=tuple(self.hidden),
            generator=generator,
        ).to(pick_device(self.device))
        self._make_optimizers()
        self.loss_curve_: list[float] = []
        self.n_iter_ = 0

    def _make_optimizers(self) -> None:
        import torch

        from ._row_adagrad import RowAdagrad

        net = self.network_
        table = [] if net.embedding is None else [net.embedding.weight]
        if self.optimizer == "row-adagrad" and table:
            rest = [p for name, p in net.named_parameters() if name != "embedding.weight"]
            self._optimizers = [
                torch.optim.Adam(rest, lr=self.learning_rate),
                RowAdagrad(table, lr=self.table_learning_rate),
            ]
        else:
            self._optimizers = [torch.optim.Adam(net.parameters(), lr=self.learning_rate)]

    def _vocabularies(self, keys: np.ndarray) -> dict[str, np.ndarray] | None:
        """Return the distinct keys of each feature, for the schemes that need them."""
        if self.scheme not in SCHEMES or SCHEMES[self.scheme][0] == "shared":
            return None
        made, at = {}, 0
        for name in self.categorical_features_:
            width = self._lists.get(name, 1)
            found = np.unique(keys[:, at : at + width])
            made[name] = found[found != PAD]
            at += width
        return made

    # Training.

    def _batch_rows(self, n: int) -> int:
        return int(np.clip(n // 100, 8, 1024)) if self.batch_size == "auto" else int(self.batch_size)

    def _step(self, rows: Rows) -> float:
        import torch

        at = self.network_.head.out.weight.device
        keys, dense, target = (torch.from_numpy(np.ascontiguousarray(part)).to(at) for part in rows[:3])
        losses = self._losses(self.network_(keys, dense), target)
        if rows.weight is None:
            loss = losses.mean()
        else:
            weight = torch.from_numpy(rows.weight).to(at)
            loss = (losses * weight).sum() / weight.sum().clamp(min=1e-12)
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        return loss.item()

    def _pass(self, rows: Rows, order: np.ndarray, batch: int, shown: Progress | None = None) -> None:
        """Take one step a batch over the rows in this order."""
        self.network_.train()
        for start in range(0, len(order), batch):
            self.loss_curve_.append(self._step(rows.take(order[start : start + batch])))
            if shown is not None:
                shown.advance(loss=self.loss_curve_[-1])
        self.network_.eval()

    def _held_loss(self, rows: Rows) -> float:
        """Mean loss of rows that are not trained on, without weights."""
        import torch

        out = torch.from_numpy(self._outputs(rows.keys, rows.dense))
        return float(self._losses(out, torch.from_numpy(rows.target)).double().mean())

    def _outputs(self, keys: np.ndarray, dense: np.ndarray) -> np.ndarray:
        """Return outputs (n, num_out) in float64, in which a row's result does not depend on its neighbours."""
        import torch

        net = self.network_.eval()
        at = net.head.out.weight.device
        wide = torch.float32 if at.type == "mps" else torch.float64
        head = copy.deepcopy(net.head).to(wide)
        with torch.no_grad():
            done = []
            for start in range(0, len(keys), PREDICT_ROWS):
                rows = slice(start, start + PREDICT_ROWS)
                x = net.features(torch.from_numpy(keys[rows]).to(at), torch.from_numpy(dense[rows]).to(at))
                done.append(head(x.to(wide)).double().cpu().numpy())
        return np.concatenate(done)

    def _fit(self, X: Any, y: Any, classes: Any = None) -> "CrossEstimator":
        self._check_parameters()
        columns = self._read_columns(X, reset=True)
        y = self._checked_target(y, columns)
        self._learn_target(y, classes)
        self._learn_columns(columns)
        keys, dense = self._keys(columns), self._numbers(columns)
        self.n_truncated_ = self._truncated
        self._learn_scale(dense)
        rng = check_random_state(self.random_state)
        self._build(self._vocabularies(keys), rng)
        rows = Rows(keys, self._scaled(dense), *self._target(y))
        n = len(keys)
        stops = n > EARLY_STOPPING_ROWS if self.early_stopping == "auto" else self.early_stopping
        train, held = self._split(y, rng) if stops else (np.arange(n), np.arange(0))
        batch = self._batch_rows(n)
        steps = -(-len(train) // batch)
        held_rows = rows.take(held)
        with Progress("training", self.max_epochs * steps, enabled=bool(self.verbose)) as shown:
            keeper = EpochKeeper(self, self.n_iter_no_change)
            for _ in range(self.max_epochs):
                self._pass(rows, rng.permutation(train), batch, shown)
                self.n_iter_ += 1
                if stops and keeper.take(self._held_loss(held_rows)):
                    break
        keeper.restore()
        return self

    def _split(self, y: np.ndarray, rng: Any) -> tuple[np.ndarray, np.ndarray]:
        order = rng.permutation(len(y))
        n_held = max(1, int(len(y) * self.validation_fraction))
        if n_held >= len(y):
            raise ValueError(f"early_stopping needs at least 2 rows, got n_samples = {len(y)}")
        return np.sort(order[n_held:]), order[:n_held]

    def _checked_target(self, y: Any, columns: Mapping[str, Any]) -> np.ndarray:
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        y = column_or_1d(y, warn=True)
        n = len(next(iter(columns.values())))
        if len(y) != n:
            raise ValueError(f"X and y must have one length, got {n} rows and {len(y)} targets")
        if n == 0:
            raise ValueError("X must have at least one row, got 0 sample(s)")
        return y

    def _partial_fit(self, X: Any, y: Any, classes: Any = None) -> "CrossEstimator":
        first = not hasattr(self, "network_")
        self._check_parameters()
        columns = self._read_columns(X, reset=first)
        y = self._checked_target(y, columns)
        if first:
            self._learn_target(y, classes)
            self._learn_columns(columns)
        keys, dense = self._keys(columns), self._numbers(columns)
        if first:
            self._learn_scale(dense)
            self._build(self._vocabularies(keys), check_random_state(self.random_state))
        self.n_truncated_ += self._truncated
        rows = Rows(keys, self._scaled(dense), *self._target(y))
        self._pass(rows, np.arange(len(keys)), 1024 if self.batch_size == "auto" else int(self.batch_size))
        self.n_iter_ += 1
        return self

    def _raw(self, X: Any) -> np.ndarray:
        """Return the network's outputs (n, num_out) for a table."""
        check_is_fitted(self, "network_")
        columns = self._read_columns(X, reset=False)
        return self._outputs(self._keys(columns), self._scaled(self._numbers(columns)))

    def collision_report(self, X: Any) -> dict[str, Any]:
        """Say for each embedded column how many of its values in ``X`` share rows of the table.

        Raises
        ------
        ValueError
            No column is embedded.
        """
        return self._embedding().collision_report(self._read_columns(X, reset=False))

    def reader_overlap(self) -> np.ndarray:
        """Return how much the first layer's readers of the embedded columns see of one another, (T, T) in [0, 1].

        Raises
        ------
        ValueError
            No column is embedded.
        """
        embedding = self._embedding()
        return embedding.reader_overlap(self.network_.head.first)

    def _embedding(self) -> Any:
        check_is_fitted(self, "network_")
        if self.network_.embedding is None:
            raise ValueError(f"a categorical column is needed, the fit had only numbers: {self.dense_features_[:5]}")
        return self.network_.embedding

    def fit_file(
        self,
        path: Path | str,
        target: str,
        *,
        columns: Any = None,
        batch_rows: int = 65536,
        checkpoint: Path | str | None = None,
    ) -> "CrossEstimator":
        """Fit on a Parquet, Arrow, CSV or TSV file of any size; ``batch_rows`` of it are in memory at a time.

        One pass takes the target's classes and the scale of numbers; each epoch is a pass more. Rows are shuffled
        inside ``batch_rows`` only: a file that is sorted by its target should be shuffled beforehand. With early
        stopping, which rows are held out follows from their number in the file. (A CSV or TSV is read whole.)

        Parameters
        ----------
        path : path
        target : str
            Column of the target.
        columns : sequence of str, optional
            Columns to learn from; all others where left out.
        batch_rows : int
        checkpoint : path, optional
            A .safetensors file that is written after each epoch; one that is there already, of the same data and
            parameters, is gone on from.

        Raises
        ------
        ValueError
            A column is missing, or the checkpoint is of other parameters or another file.
        FileError
            One of its five kinds: the file is broken, or is no table.
        """
        from ._table_files import TableFile

        self._check_parameters()
        with TableFile(path, target, columns, batch_rows) as table:
            fit_table(self, table, None if checkpoint is None else Path(checkpoint))
        return self

    # Files of fitted estimators.

    def save(self, path: Path | str) -> Path:
        """Write the fitted estimator, the state of its training included, to one .safetensors file, atomically."""
        check_is_fitted(self, "network_")
        return write_estimator(self, Path(path), {}, {})

    @classmethod
    def load(cls, path: Path | str) -> Any:
        """Read an estimator that :meth:`save` wrote; training can go on by ``partial_fit``.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds something else.
        """
        found = load_fitted(Path(path), kind=cls.__name__)
        with all_entries(Path(path), found.header):
            params = dict(found.params["init"])
            params["hidden"] = tuple(params["hidden"])
            made = cls(**params)
            restore_estimator(made, found)
        return made
