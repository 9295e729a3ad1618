"""Classify embeddings by one subspace a class: GrassmannHead and RiemannianSGD behind scikit-learn's interface."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import check_is_fitted, validate_data

PREDICT_ROWS = 8192


class GrassmannClassifier(ClassifierMixin, BaseEstimator):
    r"""Give each class a k-dimensional subspace, and each row to the class whose subspace takes its longest shadow.

    Probabilities are the softmax of :math:`\gamma\lVert S_c^\top\hat x\rVert`; the subspaces minimise its cross-entropy
    by Riemannian SGD, starting from each class's PCA about the origin (which alone is the classical CLAFIC rule). Rows
    count by direction only, and x and -x are the same: classes that differ by their mean along one line, or by length,
    are told apart poorly; append a constant column where length and sign matter.
    Source: catalogue entry ``grassmann-class``.

    Parameters
    ----------
    n_components : int or sequence of int, default=8
        Dimension k of the subspaces, 1 <= k < n_features; a sequence gives one for each class in sorted order.
    gamma : float, default=25.0
        Inverse temperature.
    init : {"pca", "random"}, default="pca"
    learning_rate : float, default=0.1
        At the start; falls to 0 along a cosine over ``max_iter`` steps. Constant in :meth:`partial_fit`.
    momentum : float, default=0.9
    max_iter : int, default=600
        Number of mini-batch steps.
    batch_size : int, default=128
    early_stopping : bool, default=False
        Hold out ``validation_fraction`` of the rows (at least one), score them every ``eval_every`` steps, stop after
        ``n_iter_no_change`` scores that gain less than ``tol``, and keep the best subspaces.
    validation_fraction : float, default=0.1
    eval_every, n_iter_no_change : int
    tol : float, default=1e-4
        Gain in accuracy that counts.
    warm_start : bool, default=False
        Start ``fit`` from the subspaces of the last one, if it had the same classes and features.
    zero_features : {"error", "ignore"}, default="error"
        Refuse all-zero rows, or let them have equal probabilities (and weight in no gradient).
    device : str, default="cpu"
        ``"auto"`` takes an accelerator where there is one.
    random_state : int, RandomState or None
    verbose : bool, default=False
        Say the loss on stderr once a second.

    Attributes
    ----------
    bases_ : ndarray of shape (n_classes, n_features, k)
        Orthonormal columns, in the float width of X; zero columns beyond a class's own k.
    classes_ : ndarray of shape (n_classes,)
    n_iter_ : int
        Steps taken.
    loss_curve_ : list of float
        Cross-entropy of each step's mini-batch, in nats.
    validation_scores_ : list of float
        Accuracies on the rows held out; only with ``early_stopping``.
    """

    def __init__(
        self,
        n_components=8,
        *,
        gamma=25.0,
        init="pca",
        learning_rate=0.1,
        momentum=0.9,
        max_iter=600,
        batch_size=128,
        early_stopping=False,
        validation_fraction=0.1,
        eval_every=20,
        n_iter_no_change=5,
        tol=1e-4,
        warm_start=False,
        zero_features="error",
        device="cpu",
        random_state=None,
        verbose=False,
    ):
        self.n_components = n_components
        self.gamma = gamma
        self.init = init
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.eval_every = eval_every
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.warm_start = warm_start
        self.zero_features = zero_features
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X, y) -> "GrassmannClassifier":
        """Fit on rows ``X`` (n, d), dense, memory-mapped or CSR, and labels ``y`` (n,).

        Raises
        ------
        ValueError
            A parameter is out of range, there is one class only, or a row is all zero (unless ignored).
        """
        before = self._kept() if self.warm_start else None
        X, y = self._validated(X, y, reset=True)
        classes, labels = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y must hold at least 2 classes, got 1 class: {classes[0]!r}")
        self._check_parameters()
        rng = check_random_state(self.random_state)
        train, held = self._hold_out(labels, rng)
        self.classes_ = classes
        head = self._make_head(X, rng)
        same = before is not None and np.array_equal(before[0], classes)
        if same and before is not None and before[1].shape == self._shape(head):
            self._load_bases(head, before[1])
        else:
            self._initialise(head, X, labels, train, rng)
        self.loss_curve_ = []
        optimiser = self._optimiser(head)
        self._train(head, optimiser, X, labels, train, held, rng)
        self._store(head, optimiser)
        self.n_iter_ = len(self.loss_curve_)
        return self

    def partial_fit(self, X, y, classes=None) -> "GrassmannClassifier":
        """Take one pass over more rows, in their order, by mini-batches at the constant ``learning_rate``.

        For data larger than memory. The first call needs all ``classes`` and starts from the PCA of its own rows, so
        make the first chunk a large and mixed one; momentum is kept from call to call.
        """
        first = not hasattr(self, "bases_")
        if first and classes is None:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        X, y = self._validated(X, y, reset=first)
        self._check_parameters()
        if first:
            self.classes_ = unique_labels(classes)
            if len(self.classes_) < 2:
                raise ValueError(f"classes must hold at least 2 classes, got 1 class: {self.classes_[0]!r}")
        elif classes is not None and not np.array_equal(unique_labels(classes), self.classes_):
            raise ValueError(f"classes={classes!r} must be those of the first call, {self.classes_!r}")
        strange = np.setdiff1d(y, self.classes_)
        if len(strange):
            raise ValueError(f"y must hold classes of the first call, {self.classes_}, got {strange[:5]}")
        labels = np.searchsorted(self.classes_, y)
        rng = check_random_state(self.random_state)
        head = self._make_head(X, rng)
        if first:
            self._initialise(head, X, labels, np.arange(len(labels)), rng)
            self.loss_curve_ = []
        else:
            self._load_bases(head, self.bases_)
        optimiser = self._optimiser(head)
        if not first:
            self._load_momentum(head, optimiser)
        for start in range(0, len(labels), self.batch_size):
            self._step(head, optimiser, X, labels, np.arange(start, min(start + self.batch_size, len(labels))))
        self._store(head, optimiser)
        self.n_iter_ = len(self.loss_curve_)
        return self

    def decision_function(self, X) -> np.ndarray:
        """Return logits (n, n_classes), or for two classes the second minus the first, (n,)."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X) -> np.ndarray:
        """Return the softmax of the logits, (n, n_classes)."""
        logits = self._logits(X)
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exp / exp.sum(axis=1, keepdims=True)

    def predict(self, X) -> np.ndarray:
        """Return the class with the longest shadow, (n,)."""
        best = self._logits(X).argmax(axis=1)
        return self.classes_[best]

    def residual(self, X) -> np.ndarray:
        """Return the sine of the angle between each row and each class's subspace, (n, n_classes), in [0, 1]."""
        return self._by_batches(X, "residual")

    def principal_angles(self) -> np.ndarray:
        """Return the principal angles between classes, (n_classes, n_classes, k), ascending radians."""
        check_is_fitted(self)
        return self.to_head().principal_angles().numpy()

    def to_head(self):
        """Return the fitted :class:`~polyspan.nn.GrassmannHead`, to be put on a torch model."""
        import torch

        check_is_fitted(self)
        head = self._new_head(self.bases_.shape[1], torch.from_numpy(self.bases_[:0]).dtype, None)
        self._load_bases(head, self.bases_)
        head.zero_features = self.zero_features
        return head.eval()

    def save(self, path: Path | str) -> Path:
        """Write the fitted classifier to one .safetensors file, atomically; no pickle."""
        from polyspan.io import constructor_params, header_classes, save_fitted

        check_is_fitted(self)
        facts = {"n_features_in_": self.bases_.shape[1], "loss_curve_": self.loss_curve_}
        params = {"init": constructor_params(self), "facts": facts, "classes": header_classes(self.classes_)}
        arrays = {"bases": self.bases_, "momentum": self._momentum}
        return save_fitted(Path(path), kind=type(self).__name__, arrays=arrays, params=params)

    @classmethod
    def load(cls, path: Path | str) -> "GrassmannClassifier":
        """Read a classifier that :meth:`save` wrote.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds something else.
        """
        from polyspan.io import classes_of, load_fitted

        found = load_fitted(Path(path), kind=cls.__name__)
        made = cls(**found.params["init"])
        for name, value in found.params["facts"].items():
            setattr(made, name, value)
        made.classes_ = classes_of(found.params["classes"])
        made.bases_ = np.array(found.arrays["bases"])
        made._momentum = np.array(found.arrays["momentum"])
        made.n_iter_ = len(made.loss_curve_)
        return made

    def _validated(self, X, y, *, reset: bool):
        X, y = validate_data(self, X, y, reset=reset, accept_sparse="csr", dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self._check_rows(X)
        return X, y

    def _check_rows(self, X) -> None:
        """Refuse all-zero rows by their number, before any is used."""
        if self.zero_features not in ("error", "ignore"):
            raise ValueError(f"zero_features must be 'error' or 'ignore', got {self.zero_features!r}")
        if self.zero_features == "ignore":
            return
        wrong = np.concatenate(
            [
                start + np.flatnonzero(_tensor(X[start : start + PREDICT_ROWS]).norm(dim=1).numpy() == 0)
                for start in range(0, X.shape[0], PREDICT_ROWS)
            ]
        )
        if len(wrong):
            raise ValueError(
                f"X must have no all-zero row, got {len(wrong)}, at rows {wrong[:10].tolist()}; "
                "zero_features='ignore' lets them pass"
            )

    def _check_parameters(self) -> None:
        for name, least in (("max_iter", 1), ("batch_size", 1), ("eval_every", 1), ("n_iter_no_change", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.init not in ("pca", "random"):
            raise ValueError(f"init must be 'pca' or 'random', got {self.init!r}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")

    def _kept(self):
        return (self.classes_, self.bases_) if hasattr(self, "bases_") else None

    def _hold_out(self, labels: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
        if not self.early_stopping:
            return np.arange(len(labels)), np.arange(0)
        order = rng.permutation(len(labels))
        n_held = max(1, int(len(labels) * self.validation_fraction))
        held, train = order[:n_held], np.sort(order[n_held:])
        if len(np.unique(labels[train])) < len(np.unique(labels)):
            raise ValueError(
                f"early_stopping must leave every class a row to train on, got {len(labels)} rows of which "
                f"{n_held} are held out"
            )
        return train, held

    def _new_head(self, d: int, dtype: Any, generator: Any):
        from polyspan.nn import GrassmannHead
        from polyspan.run import pick_device

        wanted = np.atleast_1d(np.asarray(self.n_components))
        if wanted.dtype.kind not in "iu":
            raise ValueError(f"n_components must be an integer, or one for each class, got {self.n_components!r}")
        ranks = wanted.tolist()
        rank = ranks[0] if np.ndim(self.n_components) == 0 else ranks
        if not max(ranks) < d:
            raise ValueError(f"n_components must be below n_features = {d}, got n_components={self.n_components}")
        n_classes = len(self.classes_)
        # All rows have been checked, once and by their own numbers.
        options: dict[str, Any] = {"gamma": self.gamma, "zero_features": "ignore", "dtype": dtype}
        head = GrassmannHead(d, n_classes, rank, generator=generator, **options)
        return head.to(pick_device(self.device))

    def _make_head(self, X, rng):
        import torch

        dtype = torch.float32 if X.dtype == np.float32 else torch.float64
        return self._new_head(X.shape[1], dtype, _generator(rng))

    def _initialise(self, head, X, labels, train, rng) -> None:
        if self.init == "pca":
            rows = X if len(train) == len(labels) else X[train]
            head.reset_from_features(rows, labels[train], generator=_generator(rng))

    def _shape(self, head) -> tuple[int, ...]:
        return tuple(head.bases.shape)

    def _load_bases(self, head, bases: np.ndarray) -> None:
        import torch

        with torch.no_grad():
            head.weight.copy_(torch.as_tensor(np.ascontiguousarray(np.swapaxes(bases, 1, 2))))

    def _load_momentum(self, head, optimiser) -> None:
        import torch

        if self.momentum:
            optimiser.state[head.weight]["momentum_buffer"] = torch.as_tensor(self._momentum).to(head.weight).clone()
            optimiser.state[head.weight]["step"] = len(self.loss_curve_)

    def _optimiser(self, head):
        from polyspan.nn import RiemannianSGD

        return RiemannianSGD(head.parameters(), lr=self.learning_rate, momentum=self.momentum)

    def _train(self, head, optimiser, X, labels, train, held, rng) -> None:
        best, best_bases, waited, said = -np.inf, None, 0, time.monotonic()
        self.validation_scores_ = []
        order = np.arange(0)
        for step in range(self.max_iter):
            if len(order) == 0:
                order = rng.permutation(train)
            rows, order = np.sort(order[: self.batch_size]), order[self.batch_size :]
            optimiser.param_groups[0]["lr"] = self.learning_rate * (1 + np.cos(np.pi * step / self.max_iter)) / 2
            self._step(head, optimiser, X, labels, rows)
            if self.verbose and time.monotonic() - said > 1:
                said = time.monotonic()
                print(f"step {step + 1}/{self.max_iter}: loss {self.loss_curve_[-1]:.4f}", file=sys.stderr)
            if len(held) and (step + 1) % self.eval_every == 0:
                score = float(np.mean(self._run(head, X[held]).argmax(axis=1) == labels[held]))
                self.validation_scores_.append(score)
                waited = 0 if score > best + self.tol else waited + 1
                if score > best:
                    best, best_bases = score, head.weight.detach().clone()
                if waited >= self.n_iter_no_change:
                    break
        if best_bases is not None:
            head.weight.data.copy_(best_bases)
        if not self.early_stopping:
            del self.validation_scores_

    def _step(self, head, optimiser, X, labels, rows) -> None:
        import torch

        x = _tensor(X[rows]).to(head.weight.device)
        loss = torch.nn.functional.cross_entropy(head(x), torch.as_tensor(labels[rows]).to(x.device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        self.loss_curve_.append(loss.item())

    def _store(self, head, optimiser) -> None:
        self.bases_ = np.ascontiguousarray(head.bases.detach().cpu().numpy())
        buffer = optimiser.state[head.weight].get("momentum_buffer")
        self._momentum = np.zeros_like(np.swapaxes(self.bases_, 1, 2)) if buffer is None else buffer.cpu().numpy()

    def _logits(self, X) -> np.ndarray:
        return self._by_batches(X, "forward")

    def _by_batches(self, X, method: str) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, accept_sparse="csr", dtype=[np.float64, np.float32])
        self._check_rows(X)
        return self._run(self.to_head(), X, method)

    @staticmethod
    def _run(head, X, method: str = "forward") -> np.ndarray:
        import torch

        call = getattr(head, method)
        with torch.no_grad():
            done = [
                call(_tensor(X[start : start + PREDICT_ROWS]).to(head.weight.device)).cpu().numpy()
                for start in range(0, X.shape[0], PREDICT_ROWS)
            ]
        return np.concatenate(done)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        # Isotropic blobs that differ by their means only, as scikit-learn's checks draw, are not what it is for.
        tags.classifier_tags.poor_score = True
        return tags


def _generator(rng: Any):
    """Seed a torch generator from a NumPy one."""
    import torch

    return torch.Generator().manual_seed(int(rng.randint(2**31 - 1)))


def _tensor(rows: Any):
    """Rows of an array, a memory map or a CSR matrix as a tensor of their own memory.

    Directions count alone, so rows whose squares would leave the range of floats are divided by their largest entry.
    """
    import torch

    rows = np.array(rows.toarray() if hasattr(rows, "toarray") else rows)
    info, size = np.finfo(rows.dtype), np.abs(rows).max(axis=1, initial=0)
    odd = (size > 0) & ((size < info.tiny**0.25) | (size > info.max**0.25))
    rows[odd] /= size[odd, None]
    return torch.from_numpy(rows)
