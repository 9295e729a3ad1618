"""A classifier and a regressor for tables with categorical columns, over one embedding table."""

import datetime
from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import assert_all_finite
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from ._cross_estimator import CrossEstimator

DATES = (datetime.date, datetime.time, datetime.timedelta, np.datetime64, np.timedelta64)

PARAMETERS = """categorical : "auto" or sequence of str or int, default="auto"
        Columns to embed, by name or place. "auto" takes all but those of floats, which enter as numbers.
    n_embeddings : int, default=2**16
        Rows of the table, from 2 to 2³¹ - 1.
    chunk_dim : int, default=16
        Width of a row.
    n_lookups : int or dict of str to int, default=1
        Rows a value, by column where they differ.
    salt_groups : dict of str to str, optional
        Columns of one group send equal values to equal rows: for columns of one vocabulary.
    n_shards : int, default=1
    scheme : str, default="multiplex"
        As of :class:`~polyspan.learn.UnifiedEmbedding`; the schemes that split the table take sizes or vocabularies
        from the rows of the fit.
    max_len : int, default=16
        Of columns of lists; what is longer is cut, and counted in ``n_truncated_``.
    combiner : {"mean", "sum", "none"}, default="mean"
        Of a list's values.
    n_cross : int, default=1
        Cross layers.
    hidden : sequence of int, default=(64,)
        Widths of the hidden layers behind them.
    optimizer : {"adam", "row-adagrad"}, default="adam"
        "row-adagrad" moves only the rows of the table that a batch reads, by Adagrad with one step size a row, and the
        rest by Adam: for tables much larger than a batch. Adam moves every row at every step.
    learning_rate, table_learning_rate : float, default=2e-3, 0.05
        Of Adam, and of "row-adagrad" for the table.
    batch_size : int or "auto", default="auto"
        "auto" is a hundredth of the rows, from 8 to 1,024.
    max_epochs : int, default=10
        Web-scale click models see their data once; more epochs than a few overfit rare values.
    early_stopping : bool or "auto", default="auto"
        Hold out ``validation_fraction`` of the rows, stop after ``n_iter_no_change`` epochs without a lower loss on
        them, and keep the best weights. "auto" does so above 10,000 rows.
    validation_fraction : float, default=0.1
    n_iter_no_change : int, default=2
    absent : {"error", "missing"}, default="error"
        What to do when a column of the fit is not there at ``predict``: refuse, or take its values as missing.
    device : str, default="cpu"
        ``"auto"`` takes an accelerator where there is one.
    random_state : int, RandomState or None
    verbose : bool, default=False
        Show progress on stderr."""

ATTRIBUTES = """network_ : torch.nn.Module
        The network; ``network_.embedding`` is the :class:`~polyspan.learn.UnifiedEmbedding`.
    categorical_features_, dense_features_ : list of str
        Columns that are embedded, and that enter as numbers scaled to mean 0 and spread 1.
    loss_curve_ : list of float
        Loss of each mini-batch.
    validation_losses_ : list of float
        Mean loss on rows held out, an epoch; empty without early stopping.
    n_iter_ : int
        Epochs taken.
    n_truncated_ : int
        Values that lists lost to ``max_len``.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Only where columns have names."""


class UnifiedEmbeddingClassifier(ClassifierMixin, CrossEstimator):
    __doc__ = rf"""Classify rows of a table with categorical columns, by DCN-V2 over one hashed embedding table.

    Columns may hold text, whole numbers, dates, lists of them and missing values; X is a DataFrame, an Arrow table, a
    mapping of columns or an array. Values never seen at the fit need nothing. Minimises cross-entropy.

    On small tables of few values, gradient boosting is the stronger choice and faster; this is for columns of many
    values, where boosting must bin or encode them. Numbers with NaN are refused: fill them, or name the column in
    ``categorical``, where NaN is a value like any other.
    Source: catalogue entry ``unified-embedding``.

    Parameters
    ----------
    {PARAMETERS}
    class_weight : dict, "balanced" or None, default=None
        Weights of classes in the loss.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    {ATTRIBUTES}
    """

    classes_: np.ndarray

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
        class_weight=None,
        absent="error",
        device="cpu",
        random_state=None,
        verbose=False,
    ):
        super().__init__(
            categorical=categorical,
            n_embeddings=n_embeddings,
            chunk_dim=chunk_dim,
            n_lookups=n_lookups,
            salt_groups=salt_groups,
            n_shards=n_shards,
            scheme=scheme,
            max_len=max_len,
            combiner=combiner,
            n_cross=n_cross,
            hidden=hidden,
            optimizer=optimizer,
            learning_rate=learning_rate,
            table_learning_rate=table_learning_rate,
            batch_size=batch_size,
            max_epochs=max_epochs,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            absent=absent,
            device=device,
            random_state=random_state,
            verbose=verbose,
        )
        self.class_weight = class_weight

    def fit(self, X, y) -> "UnifiedEmbeddingClassifier":
        """Fit on rows of columns ``X`` (n rows) and labels ``y`` (n,).

        Raises
        ------
        TypeError
            A value is neither text nor number nor date.
        ValueError
            A parameter is out of range, there is one class only, or a column of numbers holds NaN.
        """
        self._fit(X, y)
        return self

    def partial_fit(self, X, y, classes=None) -> "UnifiedEmbeddingClassifier":
        """Take one pass over more rows, in their order; for data larger than memory.

        The first call needs all ``classes``, takes the scale of numbers from its own rows, and for schemes that need
        vocabularies those as well.
        """
        if not hasattr(self, "network_") and classes is None:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        self._partial_fit(X, y, classes)
        return self

    def predict_proba(self, X) -> np.ndarray:
        """Return probabilities, (n, n_classes)."""
        out = self._raw(X)
        if out.shape[1] == 1:
            from scipy.special import expit

            return np.hstack([expit(-out), expit(out)])
        from scipy.special import softmax

        return softmax(out, axis=1)

    def decision_function(self, X) -> np.ndarray:
        """Return logits, (n, n_classes), or for two classes one, (n,), above 0 where the second is likelier."""
        out = self._raw(X)
        return out[:, 0] if out.shape[1] == 1 else out

    def predict(self, X) -> np.ndarray:
        """Return the likeliest class, (n,)."""
        out = self.decision_function(X)
        return self.classes_[(out > 0).astype(int) if out.ndim == 1 else out.argmax(axis=1)]

    def _learn_target(self, y: np.ndarray, classes: Any = None) -> None:
        if y.dtype.kind == "f":
            assert_all_finite(y, input_name="y")
        if y.dtype.kind in "mM" or (y.dtype == object and any(isinstance(v, DATES) for v in y)):
            raise ValueError("y must hold classes that are text or numbers, got dates; turn them into text")
        check_classification_targets(y)
        self.classes_ = np.unique(y if classes is None else classes)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least 2 classes, got 1 class: {self.classes_.tolist()[0]!r}")
        if classes is not None and self.class_weight == "balanced":
            raise ValueError("class_weight must be a dict in partial_fit, got 'balanced', which needs all rows")
        if isinstance(self.class_weight, str) and self.class_weight != "balanced":
            raise ValueError(f"class_weight must be 'balanced', a dict or None, got {self.class_weight!r}")
        self._weights = None
        if self.class_weight is not None:
            self._weights = compute_class_weight(self.class_weight, classes=self.classes_, y=y).astype(np.float32)

    def _target(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        strange = np.setdiff1d(y, self.classes_)
        if len(strange):
            raise ValueError(f"y must hold classes of the first call, {self.classes_[:10]}, got {strange[:5]}")
        labels = np.searchsorted(self.classes_, y)
        weights = None if self._weights is None else self._weights[labels]
        return (labels.astype(np.float32) if self._num_out == 1 else labels.astype(np.int64)), weights

    def _noted(self, y: np.ndarray, before: Any) -> np.ndarray:
        if self.class_weight == "balanced":
            raise ValueError("class_weight must be a dict for files, got 'balanced', which needs all rows")
        return np.unique(y) if before is None else np.union1d(before, y)

    def _learn_noted(self, noted: Any) -> None:
        self._learn_target(noted)

    def _losses(self, out, target):
        from torch.nn import functional as F

        if out.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(out[:, 0], target.to(out.dtype), reduction="none")
        return F.cross_entropy(out, target, reduction="none")

    @property
    def _num_out(self) -> int:
        return 1 if len(self.classes_) == 2 else len(self.classes_)

    def _facts(self) -> dict[str, Any]:
        weights = None if self._weights is None else self._weights.tolist()
        return {"dtype": self.classes_.dtype.str, "classes": self.classes_.tolist(), "weights": weights}

    def _set_facts(self, facts) -> None:
        dtype = facts["dtype"]
        self.classes_ = np.array(facts["classes"], dtype=object if dtype == "|O" else dtype)
        self._weights = None if facts["weights"] is None else np.array(facts["weights"], np.float32)


class UnifiedEmbeddingRegressor(RegressorMixin, CrossEstimator):
    __doc__ = rf"""Predict a number for rows of a table with categorical columns, by DCN-V2 over one embedding table.

    As :class:`UnifiedEmbeddingClassifier`, with the squared error of the target scaled to mean 0 and spread 1.
    Source: catalogue entry ``unified-embedding``.

    Parameters
    ----------
    {PARAMETERS}

    Attributes
    ----------
    {ATTRIBUTES}
    """

    def fit(self, X, y) -> "UnifiedEmbeddingRegressor":
        """Fit on rows of columns ``X`` (n rows) and targets ``y`` (n,).

        Raises
        ------
        TypeError
            A value is neither text nor number nor date.
        ValueError
            A parameter is out of range, a target is not finite, or a column of numbers holds NaN.
        """
        self._fit(X, y)
        return self

    def partial_fit(self, X, y) -> "UnifiedEmbeddingRegressor":
        """Take one pass over more rows, in their order; the first call sets the scale of numbers and targets."""
        self._partial_fit(X, y)
        return self

    def predict(self, X) -> np.ndarray:
        """Return predicted numbers, (n,) float64."""
        check_is_fitted(self, "network_")
        return self._raw(X)[:, 0] * self._target_scale + self._target_mean

    def _learn_target(self, y: np.ndarray, classes: Any = None) -> None:
        y = self._finite(y)
        self._target_mean = float(y.mean())
        self._target_scale = float(y.std()) or 1.0

    def _target(self, y: np.ndarray) -> tuple[np.ndarray, None]:
        return ((self._finite(y) - self._target_mean) / self._target_scale).astype(np.float32), None

    def _noted(self, y: np.ndarray, before: Any) -> tuple[int, float, float]:
        """Return number, mean and sum of squares about it, of these targets and those before."""
        y = self._finite(y)
        n, mean, square = len(y), float(y.mean()), float(np.square(y - y.mean()).sum())
        if before is None:
            return n, mean, square
        n0, mean0, square0 = before
        step = mean - mean0
        return n0 + n, mean0 + step * n / (n0 + n), square0 + square + step**2 * n0 * n / (n0 + n)

    def _learn_noted(self, noted: Any) -> None:
        n, self._target_mean, square = noted
        self._target_scale = float(np.sqrt(square / n)) or 1.0

    @staticmethod
    def _finite(y: np.ndarray) -> np.ndarray:
        if np.asarray(y).dtype.kind in "mM":
            raise ValueError(f"y must hold numbers, got {np.asarray(y).dtype}: subtract a date, and divide by a unit")
        try:
            y = np.asarray(y, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"y must hold numbers: {error}") from None
        if not np.isfinite(y).all():
            raise ValueError(f"y must be finite, got NaN or infinity in {int((~np.isfinite(y)).sum())} rows")
        return y

    def _losses(self, out, target):
        return (out[:, 0] - target).square()

    @property
    def _num_out(self) -> int:
        return 1

    def _facts(self) -> dict[str, Any]:
        return {"mean": self._target_mean, "scale": self._target_scale}

    def _set_facts(self, facts) -> None:
        self._target_mean, self._target_scale = facts["mean"], facts["scale"]
