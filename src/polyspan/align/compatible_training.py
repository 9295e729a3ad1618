"""Train a new encoder whose vectors can be searched against the index of the old one, with no map between."""

import copy
import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import nn

from polyspan.errors import WrongContent
from polyspan.io import (
    classes_of,
    constructor_params,
    digest_array,
    dump_json,
    header_classes,
    load_fitted,
    save_fitted,
)
from polyspan.run import layers_draw_from, pick_device

from ._checks import check_count, check_kind, check_number
from ._compatible_fit import Encoder, Recipe, multilayer_perceptron, output_width, run_rows, train
from ._compatible_head import CompatibleOutput, OrthogonalCompatibleHead, OrthogonalCompatibleLoss
from ._orthogonal_transform import ORTHOGONAL_MAPS
from ._prototypes import as_rows, class_prototypes, prototype_separability, tell_of_lengths, unit_rows

__all__ = ["CompatibleClassifier", "CompatibleOutput", "OrthogonalCompatibleHead", "OrthogonalCompatibleLoss"]

FLOATS = [np.float64, np.float32]
WEIGHTINGS = ("equal", "separability")
PRECISIONS = ("float32", "bfloat16")


class CompatibleClassifier(ClassNamePrefixFeaturesOutMixin, ClassifierMixin, TransformerMixin, BaseEstimator):
    r"""Learn an encoder of feature rows from labels, whose vectors can be compared with those of an older encoder.

    ``fit(X, y, old=...)`` takes the old encoder, or its vectors of the training rows, and trains a backbone with
    :class:`OrthogonalCompatibleHead` and :class:`OrthogonalCompatibleLoss`. :meth:`transform` gives unit vectors of
    d + e numbers, d being the old width: new against new, compare all of them by cosine; new against old, the first d
    (``transform(X, width=d)``). A store of one fixed width can take old vectors padded with zeros
    (:func:`polyspan.align.pad_vectors`): inner products then rank old items as cosines do, but their scores are smaller
    than those of new items in the same store, by the length of each query's first d numbers.

    Without ``old`` it is a plain classifier by metric learning, the first of a chain: pass each model as ``old`` of
    the next, and the first numbers of all of them stay comparable. It needs classes: old prototypes of classes that the
    old model never saw may lie anywhere, and a weak old model holds the new one back.
    Source: catalogue entry ``orthogonal-compatible-alignment``.

    Parameters
    ----------
    backbone : "mlp" or torch.nn.Module, default="mlp"
        A module turns (n, n_features) into (n, f); images come as flat rows, so begin with ``nn.Unflatten``. It is
        copied with its weights; what it holds is where training starts.
    hidden : tuple of int, default=(256, 256)
        Widths of the hidden layers of "mlp", each with batch norm and ReLU.
    embedding_dim : int, default=32
        Width d where there is no old model; with one, its width counts.
    extra_dim : int, default=32
        Additional dimensions e where there is an old model.
    w_ce, w_bct, w_cos : float, default=5.0, 10.0, 5.0
        Weights of the terms of the loss.
    label_smoothing, tau : float, default=0.1, 1.0
    prototype_weights : {"equal", "separability"}, default="equal"
        With "separability" a class pulls the less, the more of its old vectors lie nearer to other classes.
    orthogonal_map : {"cayley", "matrix-exp", "householder", "retraction"}, default="cayley"
    use_transform : bool, default=True
        Let the classifier see the vector through the orthogonal layer.
    bias : bool, default=False
        Of that layer.
    learning_rate : float, default=3e-3
        Of Adam, after the warm-up and before its decay to 0. Logits are of unit vectors, so the classifier's weights
        must grow: a few hundred steps on small data may need 1e-2, thousands on a pretrained backbone 1e-3 or less.
    weight_decay : float, default=2**-15
    max_iter : int, default=20
        Epochs.
    warmup : float, default=1.0
        Epochs in which the learning rate rises.
    batch_size : int, default=128
    precision : {"float32", "bfloat16"}, default="float32"
        Of the forward pass in training.
    checkpoint : path-like or None
        A .safetensors file that is written after every epoch and from which an interrupted fit of the same data and
        settings goes on; removed at the end. Keep what it holds private: it is as good as the model.
    random_state : int, RandomState instance or None
    device : str, default="auto"
    verbose : bool, default=False

    Attributes
    ----------
    classes_ : ndarray of shape (C,)
    encoder_ : torch.nn.Module
        Backbone and head, in eval mode.
    prototypes_ : ndarray of shape (C, d) or None
        Where the old encoder puts the classes.
    class_means_ : ndarray of shape (C, d + e)
        Where this one puts them.
    separability_ : ndarray of shape (C,) or None
        See :func:`prototype_separability`; low values are classes that the old encoder cannot tell.
    old_dim_ : int
        Width of what is comparable with the old model, or ``embedding_dim``.
    old_unit_ : bool or None
        Whether the old vectors had length 1.
    history_ : list of dict
        Mean of every term, an epoch.
    n_iter_ : int
    """

    _facts: tuple[str, ...] = ("old_dim_", "old_unit_", "n_features_in_", "history_")

    classes_: np.ndarray
    encoder_: Encoder
    prototypes_: np.ndarray | None
    class_means_: np.ndarray
    old_dim_: int
    n_features_in_: int

    def __init__(
        self,
        backbone: Any = "mlp",
        *,
        hidden=(256, 256),
        embedding_dim=32,
        extra_dim=32,
        w_ce=5.0,
        w_bct=10.0,
        w_cos=5.0,
        label_smoothing=0.1,
        tau=1.0,
        prototype_weights="equal",
        orthogonal_map="cayley",
        use_transform=True,
        bias=False,
        learning_rate=3e-3,
        weight_decay=2**-15,
        max_iter=20,
        warmup=1.0,
        batch_size=128,
        precision="float32",
        checkpoint=None,
        random_state=None,
        device="auto",
        verbose=False,
    ):
        self.backbone = backbone
        self.hidden = hidden
        self.embedding_dim = embedding_dim
        self.extra_dim = extra_dim
        self.w_ce = w_ce
        self.w_bct = w_bct
        self.w_cos = w_cos
        self.label_smoothing = label_smoothing
        self.tau = tau
        self.prototype_weights = prototype_weights
        self.orthogonal_map = orthogonal_map
        self.use_transform = use_transform
        self.bias = bias
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.max_iter = max_iter
        self.warmup = warmup
        self.batch_size = batch_size
        self.precision = precision
        self.checkpoint = checkpoint
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X, y, old=None) -> "CompatibleClassifier":
        """Train on rows ``X`` (n, n_features) with labels ``y`` (n,) of any kind.

        Parameters
        ----------
        old : array of shape (n, d), fitted transformer, or callable, optional
            The old encoder's vectors of the same rows, or what makes them from ``X``.

        Raises
        ------
        ValueError
            A setting is out of range, there is one class only, old rows and ``X`` differ in number, an old row is zero
            or not finite, the backbone is too narrow, or a checkpoint is of another training.
        NotConverged
            The loss is not finite in the first epoch.

        Warns
        -----
        UserWarning
            Old vectors are not of length 1; an old model puts a class where it had another one; the loss stopped being
            finite.
        """
        return self._learn(X, y, old)

    def _learn(self, X, y, old, new=None) -> Any:
        check_kind(X, "X", 3)
        X, y = validate_data(self, X, y, dtype=FLOATS)
        check_classification_targets(y)
        self._check_parameters()
        classes, labels = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y must hold at least 2 classes, got 1 class: {classes[0]!r}")
        old_rows = None if old is None else self._old_rows(old, X)
        rng = check_random_state(self.random_state)
        generator = torch.Generator().manual_seed(int(rng.randint(2**31 - 1)))
        self.prototypes_ = self.separability_ = self.old_unit_ = None
        if old_rows is not None:
            unit = unit_rows(old_rows, "old")
            self.old_unit_ = tell_of_lengths(old_rows, "old", 3)
            self.prototypes_ = class_prototypes(unit, labels, len(classes))
            self.separability_ = prototype_separability(unit, labels, self.prototypes_)
            if isinstance(old, CompatibleClassifier):
                _tell_of_other_classes(old, classes, self.prototypes_)
        self.old_dim_ = int(self.embedding_dim if old_rows is None else old_rows.shape[1])
        beside = () if old_rows is None else self._beside(X, y, old_rows, new)
        encoder, loss = self._build(X, len(classes), generator), self._loss()
        device = pick_device(self.device)
        recipe = Recipe(
            self.learning_rate,
            self.weight_decay,
            self.max_iter,
            self.warmup,
            self.batch_size,
            self.precision,
            None if self.checkpoint is None else Path(self.checkpoint),
            self.verbose,
        )
        marks = "" if self.checkpoint is None else self._fingerprint(X, labels, old_rows, *beside)
        self.history_ = train(encoder.to(device), loss.to(device), X, labels, recipe, generator, marks, beside)
        self.encoder_ = encoder.eval().cpu()
        self.classes_, self.n_iter_ = classes, len(self.history_)
        self._n_features_out = encoder.head.width
        self.class_means_ = class_prototypes(self.transform(X), labels, len(classes))
        return self

    def _beside(self, X: np.ndarray, y: np.ndarray, old_rows: np.ndarray, new: Any) -> tuple[np.ndarray, ...]:
        """Return what the loss takes of each row besides its label."""
        return ()

    def _loss(self) -> nn.Module:
        return OrthogonalCompatibleLoss(
            self.prototypes_,
            w_ce=self.w_ce,
            w_bct=self.w_bct,
            w_cos=self.w_cos,
            label_smoothing=self.label_smoothing,
            tau=self.tau,
            class_weights=self.separability_ if self.prototype_weights == "separability" else None,
            dtype=torch.float32,
        )

    def transform(self, X, *, width: int | None = None) -> np.ndarray:
        """Return the vectors to store and search with, unit rows (n, d + e), in the float width of ``X``.

        Parameters
        ----------
        width : int, optional
            Return the first so many numbers, scaled to length 1 again, to search an index of that width: any width of
            an older model in the chain.
        """
        from .compatibility import truncate_vectors

        rows = self._run(X, "embed")
        return rows if width is None else truncate_vectors(rows, width)

    def decision_function(self, X) -> np.ndarray:
        """Return logits (n, C), or for two classes the second minus the first, (n,)."""
        logits = self._run(X, "logits")
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X) -> np.ndarray:
        """Return the softmax of the logits, (n, C)."""
        logits = self._run(X, "logits")
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exp / exp.sum(axis=1, keepdims=True)

    def predict(self, X) -> np.ndarray:
        """Return the class with the largest logit, (n,)."""
        best = self._run(X, "logits").argmax(axis=1)
        return self.classes_[best]

    def save(self, path: Path | str, **about: Any) -> Path:
        """Write the fitted encoder to one .safetensors file, atomically; a backbone of your own is kept by its weights.

        ``about`` holds facts, such as the name and date of the model.
        """
        check_is_fitted(self)
        init = constructor_params(self)
        own = isinstance(init["backbone"], nn.Module)
        init |= {"backbone": "module" if own else init["backbone"], "hidden": list(self.hidden), "checkpoint": None}
        facts = {name: getattr(self, name) for name in self._facts}
        facts["classes"] = header_classes(self.classes_)
        arrays = {f"encoder.{name}": value.cpu() for name, value in self.encoder_.state_dict().items()}
        for name in ("prototypes_", "separability_", "class_means_"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        params = {"init": init, "facts": facts}
        return save_fitted(Path(path), kind=type(self).__name__, arrays=arrays, params=params, about=about)

    @classmethod
    def load(cls, path: Path | str, *, backbone: nn.Module | None = None) -> "CompatibleClassifier":
        """Read an encoder that :meth:`save` wrote; from this class also one of :class:`BasisTransformationClassifier`.

        Parameters
        ----------
        backbone : nn.Module
            Where the encoder was fitted with a module of your own: one of the same make, whose weights do not matter.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the weights are of other widths than their backbone.
        ValueError
            The backbone is missing.
        """
        kinds = cls._kinds()
        found = load_fitted(Path(path), kind=tuple(kinds))
        init, facts = dict(found.params["init"]), dict(found.params["facts"])
        if init["backbone"] == "module" and backbone is None:
            raise ValueError(f"backbone must be the module that {path} was fitted with, got None")
        init["backbone"], init["hidden"] = backbone or init["backbone"], tuple(init["hidden"])
        made = kinds[found.kind](**init)
        made.classes_ = classes_of(facts.pop("classes"))
        for name, value in facts.items():
            setattr(made, name, value)
        for name in ("prototypes_", "separability_", "class_means_"):
            setattr(made, name, np.array(found.arrays[name]) if name in found.arrays else None)
        weights = {n[8:]: torch.as_tensor(np.array(v)) for n, v in found.arrays.items() if n.startswith("encoder.")}
        row = np.zeros((1, made.n_features_in_), np.float32)
        made.encoder_ = made._build(row, len(made.classes_), torch.Generator().manual_seed(0))
        try:
            made.encoder_.load_state_dict(weights)
        except RuntimeError as error:
            told = " ".join(str(error).split("\n")[1].split()) if "\n" in str(error) else str(error)
            raise WrongContent(path, found=told, expected="weights that fit the backbone") from None
        made.encoder_.eval()
        made.n_iter_, made._n_features_out = len(made.history_), made.encoder_.head.width
        return made

    @classmethod
    def _kinds(cls) -> dict[str, type["CompatibleClassifier"]]:
        """Return the classes, by name, whose files :meth:`load` reads."""
        from .basis_transformation import BasisTransformationClassifier

        return {kind.__name__: kind for kind in (CompatibleClassifier, BasisTransformationClassifier)}

    def _run(self, X, method: str) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=FLOATS)
        return run_rows(self.encoder_.to(pick_device(self.device)), X, method)

    def _build(self, X: np.ndarray, n_classes: int, generator: torch.Generator) -> Encoder:
        with layers_draw_from(generator):
            if isinstance(self.backbone, nn.Module):
                backbone = copy.deepcopy(self.backbone).cpu()
            else:
                backbone = multilayer_perceptron(X.shape[1], self.hidden)
            width = output_width(backbone, torch.tensor(X[:1], dtype=torch.float32))
            return Encoder(backbone, self._head(width, n_classes))

    def _head(self, width: int, n_classes: int) -> nn.Module:
        return OrthogonalCompatibleHead(
            width,
            self.old_dim_,
            n_classes,
            self.extra_dim if self.prototypes_ is not None else 0,
            orthogonal_map=self.orthogonal_map,
            use_transform=self.use_transform,
            bias=self.bias,
            dtype=torch.float32,
        )

    def _old_rows(self, old: Any, X: np.ndarray, name: str = "old") -> np.ndarray:
        """Return the vectors of the rows of ``X`` by another encoder, given as such, as a model or as a function."""
        if hasattr(old, "transform"):
            rows = old.transform(X)
        elif callable(old) and not hasattr(old, "shape"):
            rows = old(X)
        else:
            rows = old
        rows = as_rows(rows, name)
        if len(rows) != len(X):
            raise ValueError(f"{name} must have one vector a row of X ({len(X)}), got {len(rows)}")
        return rows

    def _fingerprint(self, *arrays) -> str:
        params = {name: value for name, value in self.get_params(deep=False).items() if name not in _NOT_IN_MARKS}
        params["backbone"] = str(self.backbone)
        params["random_state"] = str(self.random_state)
        marks = [digest_array(part) for part in arrays if part is not None]
        return hashlib.sha256((dump_json(params) + "".join(marks)).encode()).hexdigest()

    def _check_parameters(self) -> None:
        if not (self.backbone == "mlp" or isinstance(self.backbone, nn.Module)):
            raise ValueError(f"backbone must be 'mlp' or a torch module, got {self.backbone!r}")
        for name, allowed in (
            ("prototype_weights", WEIGHTINGS),
            ("orthogonal_map", ORTHOGONAL_MAPS),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name, least in (("embedding_dim", 1), ("extra_dim", 0), ("max_iter", 1), ("batch_size", 2)):
            check_count(name, getattr(self, name), least)
        if self.backbone == "mlp" and not (len(self.hidden) and min(self.hidden) >= 1):
            raise ValueError(f"hidden must hold at least one positive width, got {self.hidden!r}")
        check_number("learning_rate", self.learning_rate, positive=True)
        check_number("weight_decay", self.weight_decay)
        if not 0 <= self.warmup <= self.max_iter:
            raise ValueError(f"warmup must be between 0 and max_iter={self.max_iter} epochs, got {self.warmup}")


_NOT_IN_MARKS = ("checkpoint", "verbose", "device")


def _tell_of_other_classes(old: CompatibleClassifier, classes: np.ndarray, prototypes: np.ndarray) -> None:
    """Warn where the old model, on the new rows, puts a class next to another one than that of its name."""
    shared = [(i, int(np.flatnonzero(old.classes_ == c)[0])) for i, c in enumerate(classes) if c in old.classes_]
    if not shared:
        return
    means = old.class_means_ / np.linalg.norm(old.class_means_, axis=1, keepdims=True)
    nearest = (prototypes @ means.T).argmax(axis=1)
    moved = [(classes[i], old.classes_[nearest[i]]) for i, j in shared if nearest[i] != j]
    if moved:
        told = ", ".join(f"{new} lies where it had {was}" for new, was in moved[:5])
        warnings.warn(
            f"{len(moved)} of {len(shared)} classes of one name lie elsewhere for the old model: {told}; were classes "
            "renamed or reordered?",
            stacklevel=4,
        )
