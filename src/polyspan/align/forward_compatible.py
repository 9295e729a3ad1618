"""Networks that lift old vectors to where the new encoder would put them: older ways to save embedding again."""

from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data

from polyspan.run import pick_device

from ._aligner import Aligner, residual_share
from ._checks import (
    check_count,
    check_kind,
    check_labels,
    check_number,
    check_squares,
    finite_rows,
    rms_length,
    scale_rows,
)
from ._compatible_fit import Recipe
from ._forward_network import (
    BRANCHES,
    LEAST_LOG,
    Layers,
    Lessons,
    folded,
    new_network,
    run_layers,
    train_forward,
)

BLOCK_ROWS = 4096


class ForwardCompatibleMap(Aligner):
    r"""Lift old vectors to the new encoder's space by a network with batch norm: forward-compatible training (FCT).

    The new encoder stays as it is; the gallery is transformed. A branch for the old vector (d to 2d to 2n) and one for
    side-information, that is, a vector of the item kept beside the old one for the day of an update (s to 2s to 2n),
    are joined and mixed (4n to 2048 to 2048 to n), with batch norm and ReLU after every layer but the last, and trained
    by the mean squared error to the new vectors. Without side-information both branches take the old vector. In the
    first half of the epochs batch norm sees batches, then its statistics stay. It has millions of weights: on few
    anchors a ridge map is better (:class:`RidgeMap`), and faster by far. Batch norm is folded into the layers after
    training. Vectors are divided by their root mean square length inside, so the unit does not matter.
    Source: Ramanujan et al., "Forward Compatible Training for Large-Scale Embedding Retrieval Systems", 2022, by the
    authors' code; a baseline of catalogue entry ``lambda-orthogonality``.

    Parameters
    ----------
    hidden : int, default=2048
        Width of the mixer.
    learning_rate : float, default=5e-4
        Of Adam, after the warm-up and before its decay to 0.
    weight_decay : float, default=2**-15
    max_iter : int, default=80
        Epochs.
    warmup : float, default=5.0
        Epochs in which the learning rate rises.
    batch_size : int, default=1024
    normalize : bool, default=False
        Scale every row to length 1 first, side-information excepted.
    random_state : int, RandomState instance or None
    device : str, default="auto"
    verbose : bool, default=False

    Attributes
    ----------
    layers_ : dict of lists of (weights, bias)
        Of the branches "old" and "side" and of the "mixer".
    n_features_side_ : int or None
    residual_ : float
        Unexplained share of the new anchors' spread.
    history_ : list of dict
        Mean of every term, an epoch.
    n_iter_ : int
        Epochs that were run.
    n_anchors_ : int
    """

    _facts = ("residual_", "n_iter_", "n_features_side_", "history_")
    layers_: Layers
    n_features_side_: int | None

    def __init__(
        self,
        *,
        hidden=2048,
        learning_rate=5e-4,
        weight_decay=2**-15,
        max_iter=80,
        warmup=5.0,
        batch_size=1024,
        normalize=False,
        random_state=None,
        device="auto",
        verbose=False,
    ):
        self.hidden = hidden
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.max_iter = max_iter
        self.warmup = warmup
        self.batch_size = batch_size
        self.normalize = normalize
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X, y, side=None) -> "ForwardCompatibleMap":  # ty: ignore[lost-keyword-for-regular-parameter]
        """Fit on anchors: row i of ``X`` (n, d_old) and row i of ``y`` (n, d_new) are one item by both encoders.

        Parameters
        ----------
        side : array of shape (n, s), optional
            Side-information of the same items; :meth:`transform` then wants it too.

        Raises
        ------
        ValueError
            A setting is out of range, rows do not pair up, a value is not finite, or fewer than two anchors.
        NotConverged
            The loss is not finite in the first or second epoch.

        Warns
        -----
        UserWarning
            The loss stopped being finite later; the weights that the last finite epoch began with are kept.
        """
        return self._learn(X, y, side)

    def _learn(self, X, y, side, labels=None, classifier=None) -> Any:
        self._check_settings()
        X, Y, _ = self._anchors(X, y, None, reset=True)
        if len(X) < 2:
            raise ValueError(f"{type(self).__name__} needs at least 2 anchors, got {len(X)} sample")
        self.n_anchors_ = len(X)
        S = X if side is None else finite_rows(side, "side")
        if len(S) != len(X):
            raise ValueError(f"side must have one row an anchor ({len(X)}), got {len(S)}")
        check_squares(S, "side")
        self.n_features_side_ = None if side is None else S.shape[1]
        codes, head = self._head(labels, classifier, Y)
        sizes = [rms_length(A) for A in (X, S, Y)]
        generator = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
        weight = self._class_weight()
        n_out = Y.shape[1] + (weight is not None)
        network = new_network(X.shape[1], S.shape[1], Y.shape[1], self.hidden, n_out, generator)
        if head is not None:
            head = head[0] * sizes[2], head[1]
        lessons = Lessons(X / sizes[0], S / sizes[1], Y / sizes[2], codes, head)
        recipe = Recipe(
            self.learning_rate,
            self.weight_decay,
            self.max_iter,
            self.warmup,
            self.batch_size,
            "float32",
            None,
            self.verbose,
        )
        self.history_ = train_forward(network, lessons, weight, recipe, generator, pick_device(self.device))
        self.n_iter_ = len(self.history_)
        self.layers_ = folded(network)
        for branch, size in zip(BRANCHES, sizes[:2], strict=False):
            W, b = self.layers_[branch][0]
            self.layers_[branch][0] = W / size, b
        W, b = self.layers_["mixer"][-1]
        scale = np.full(n_out, sizes[2])
        scale[Y.shape[1] :] = 1.0  # what is expected of an item is a share of the vectors' mean squared length
        self.layers_["mixer"][-1] = W * scale, b * scale
        self.residual_ = residual_share(self._run(X, S)[:, : Y.shape[1]], Y, Y.mean(axis=0))
        return self

    def _class_weight(self) -> float | None:
        return None

    def _head(self, labels, classifier, Y) -> tuple[np.ndarray | None, tuple[np.ndarray, np.ndarray] | None]:
        return None, None

    def _check_settings(self) -> None:
        for name, least in (("hidden", 1), ("max_iter", 1), ("batch_size", 2)):
            check_count(name, getattr(self, name), least)
        check_number("learning_rate", self.learning_rate, positive=True)
        check_number("weight_decay", self.weight_decay)
        check_number("warmup", self.warmup)
        if self.warmup > self.max_iter:
            raise ValueError(f"warmup must be between 0 and max_iter={self.max_iter} epochs, got {self.warmup}")

    def transform(self, X, side=None) -> np.ndarray:
        """Return old vectors ``X`` (m, d_old) as the new encoder would give them, (m, d_new), in their own width.

        Parameters
        ----------
        side : array of shape (m, s), optional
            Side-information of the same items, if and only if it was fitted with some.
        """
        return self._run(*self._rows(X, side))[:, : self._n_features_out]

    def score(self, X, y, side=None) -> float:
        """Return the mean cosine between ``transform(X, side)`` and ``y``, in [-1, 1]."""
        Z, Y = self.transform(X, side), finite_rows(y, "y")
        if Z.shape != Y.shape:
            raise ValueError(f"y must have shape {Z.shape}, got {Y.shape}")
        return float(np.mean(np.sum(scale_rows(Z)[0] * scale_rows(Y)[0], axis=1)))

    def _rows(self, X, side) -> tuple[np.ndarray, np.ndarray]:
        check_is_fitted(self)
        check_kind(X, "X")
        X = self._directions(validate_data(self, X, reset=False, dtype=[np.float64, np.float32]))
        if self.n_features_side_ is None:
            if side is not None:
                raise ValueError("side must be None for a map that was fitted without side-information, got rows")
            return X, X
        if side is None:
            raise ValueError(f"side must hold {self.n_features_side_} features of side-information a row, got None")
        S = finite_rows(side, "side")
        if S.shape != (len(X), self.n_features_side_):
            raise ValueError(f"side must have shape {(len(X), self.n_features_side_)}, got {S.shape}")
        return X, S.astype(X.dtype)

    def _run(self, X: np.ndarray, S: np.ndarray) -> np.ndarray:
        blocks = range(0, len(X), BLOCK_ROWS)
        return np.concatenate([run_layers(self.layers_, X[i : i + BLOCK_ROWS], S[i : i + BLOCK_ROWS]) for i in blocks])

    def _to_arrays(self) -> dict[str, np.ndarray]:
        return {
            f"{branch}.{i}.{name}": part
            for branch in BRANCHES
            for i, layer in enumerate(self.layers_[branch])
            for name, part in zip(("weights", "bias"), layer, strict=True)
        }

    def _from_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        self.layers_ = {
            branch: [
                (arrays[f"{branch}.{i}.weights"], arrays[f"{branch}.{i}.bias"])
                for i in range(sum(name.startswith(f"{branch}.") for name in arrays) // 2)
            ]
            for branch in BRANCHES
        }

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags


class FastFillMap(ForwardCompatibleMap):
    r"""Lift old vectors so that the new classifier still tells them, and say which items to embed again first.

    The network of :class:`ForwardCompatibleMap` with one more output: s, the logarithm of the loss expected of an item.
    With :math:`l = \lVert \mathcal F(h) - x \rVert^2 + w\,CE(\kappa(\mathcal F(h)), y)`, where :math:`\kappa` is the
    new model's frozen linear classifier and squares are of vectors of root mean square length 1, training minimises the
    mean of :math:`(l e^{-s} + s)/2`: the Gaussian likelihood of a residual of variance :math:`e^s`.
    :meth:`backfill_order` puts the most uncertain items first, and needs no labels of the gallery. Items that the
    network has learnt by heart seem certain: order a gallery it was not fitted on.
    Source: Jaeckle et al., "FastFill: Efficient Compatible Model Update", 2023; a baseline of catalogue entry
    ``lambda-orthogonality``. Its abstract says what is combined, its equations could not be read: the form of the
    likelihood, one variance an item on top of a shared trunk, and the weight of 1 are ours.

    Parameters
    ----------
    class_weight : float, default=1.0
        The factor w.
    hidden, learning_rate, weight_decay, max_iter, warmup, batch_size, normalize, random_state, device, verbose
        As in :class:`ForwardCompatibleMap`.

    Attributes
    ----------
    classifier_weights_, classifier_bias_ : ndarray of shape (C, d_new) and (C,), or None
        The new classifier; None without labels.
    layers_, n_features_side_, residual_, history_, n_iter_, n_anchors_
        As there; ``history_`` also has the terms ``distance`` and ``classes``.
    """

    def __init__(
        self,
        *,
        class_weight=1.0,
        hidden=2048,
        learning_rate=5e-4,
        weight_decay=2**-15,
        max_iter=80,
        warmup=5.0,
        batch_size=1024,
        normalize=False,
        random_state=None,
        device="auto",
        verbose=False,
    ):
        super().__init__(
            hidden=hidden,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            max_iter=max_iter,
            warmup=warmup,
            batch_size=batch_size,
            normalize=normalize,
            random_state=random_state,
            device=device,
            verbose=verbose,
        )
        self.class_weight = class_weight

    def fit(self, X, y, labels=None, side=None, classifier=None) -> "FastFillMap":  # ty: ignore[incompatible-method-override]
        """Fit on anchors: row i of ``X`` (n, d_old) and row i of ``y`` (n, d_new) are one item by both encoders.

        Parameters
        ----------
        labels : array of shape (n,), optional
            Classes of the items, of any kind. Without them only the distance is learnt.
        side : array of shape (n, s), optional
        classifier : object with ``coef_``, ``intercept_`` and ``classes_``, optional
            The new model's own, as scikit-learn's linear classifiers are: it must know every label. Where there is
            none, a logistic regression is fitted on the new anchors.

        Raises
        ------
        ValueError
            As in :meth:`ForwardCompatibleMap.fit`; or labels are not one an anchor, there is one class only, or the
            classifier is of another width or does not know a label.
        NotConverged
            The loss is not finite in the first or second epoch.
        """
        return self._learn(X, y, side, labels, classifier)

    def uncertainty(self, X, side=None) -> np.ndarray:
        """Return the loss expected of every row of ``X`` (m, d_old), (m,): a share of the new mean squared length."""
        logs = self._run(*self._rows(X, side))[:, -1]
        return np.exp(np.maximum(logs, LEAST_LOG))

    def backfill_order(self, X, side=None) -> np.ndarray:
        """Return the rows of a gallery of old vectors (m, d_old) in the order to embed them again: m ints."""
        return np.argsort(-self.uncertainty(X, side), kind="stable")

    def _class_weight(self) -> float:
        return float(self.class_weight)

    def _check_settings(self) -> None:
        super()._check_settings()
        check_number("class_weight", self.class_weight)

    def _head(self, labels, classifier, Y):
        self.classifier_weights_ = self.classifier_bias_ = None
        if labels is None:
            if classifier is not None:
                raise ValueError("labels must be given with a classifier, got None")
            return None, None
        labels = check_labels(labels, "labels")
        if labels.shape != (len(Y),):
            raise ValueError(f"labels must have shape ({len(Y)},), one an anchor, got {labels.shape}")
        if classifier is None:
            from sklearn.linear_model import LogisticRegression

            if len(np.unique(labels)) < 2:
                raise ValueError(f"labels must hold at least 2 classes, got 1 class: {labels[0]}")
            size = rms_length(Y)
            classifier = LogisticRegression(max_iter=1000).fit(Y / size, labels)
            W, b = _two_rows(classifier)
            W = W / size
        else:
            W, b = _two_rows(classifier)
        known = np.asarray(classifier.classes_)
        if W.shape != (len(known), Y.shape[1]) or b.shape != (len(known),):
            raise ValueError(
                f"classifier must have weights of shape {(len(known), Y.shape[1])} for the new vectors, got {W.shape}"
            )
        strange = np.setdiff1d(labels, known)
        if len(strange):
            raise ValueError(f"classifier must know every label, got {len(strange)} others, such as {strange[0]}")
        order = np.argsort(known)
        self.classifier_weights_, self.classifier_bias_ = W, b
        return order[np.searchsorted(known, labels, sorter=order)], (W, b)

    def _to_arrays(self) -> dict[str, np.ndarray]:
        head = {"classifier_weights": self.classifier_weights_, "classifier_bias": self.classifier_bias_}
        return super()._to_arrays() | {name: part for name, part in head.items() if part is not None}

    def _from_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        super()._from_arrays(arrays)
        self.classifier_weights_ = arrays.get("classifier_weights")
        self.classifier_bias_ = arrays.get("classifier_bias")


def _two_rows(classifier: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (C, n) and bias (C,); for two classes scikit-learn keeps the second's less the first's."""
    W = np.atleast_2d(np.asarray(classifier.coef_, np.float64))
    b = np.atleast_1d(np.asarray(classifier.intercept_, np.float64))
    if len(classifier.classes_) == 2 and len(W) == 1:
        return np.vstack([np.zeros_like(W), W]), np.concatenate([np.zeros_like(b), b])
    return W, b
