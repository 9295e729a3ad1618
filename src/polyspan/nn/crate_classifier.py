"""Classify small images with a rate-reduction transformer behind scikit-learn's interface."""

import math
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

ROWS = 1024


class CrateClassifier(ClassifierMixin, BaseEstimator):
    r"""Train :class:`CRATE` on small images, given as arrays (n, h, w), (n, c, h, w) or flat rows.

    Pixels are brought to mean 0 and spread 1 over all training images; the loss is cross-entropy with label smoothing;
    the learning rate rises along a line and falls along a cosine. A few hundred images or steps are too few for it to
    beat a linear classifier of the pixels: it is for thousands. The network computes in float32, and its results are
    that wide whatever the images are: an image by itself and in a batch agree to that width only.
    Source: catalogue entry ``crate``.

    Parameters
    ----------
    dim, depth, n_heads : int, default=64, 4, 4
        Width of tokens, layers, subspaces a layer.
    image_shape : tuple of int, optional
        (h, w) or (c, h, w) of flat rows; where not given, a square if there is one, and otherwise one line.
    patch_size : int or tuple of int, optional
        In pixels; where not given, four patches a side or the next smaller number that divides it.
    block : dict, optional
        Further arguments of :class:`CRATEBlock`, such as ``{"step": "exact", "tied_output": True}``.
    pool : {"cls", "mean"}, default="cls"
    max_iter : int, default=500
        Mini-batch steps.
    batch_size : int, default=128
    learning_rate : float, default=1e-3
        At its highest.
    weight_decay : float, default=0.05
        On matrices.
    optimizer : {"adamw", "lion"}, default="adamw"
        The paper uses Lion, with a fifth of the rate and five times the decay.
    warmup : float, default=0.1
        Share of the steps in which the rate rises.
    label_smoothing : float, default=0.1
        In [0, 1).
    shift : int, default=0
        Most pixels by which training images are moved at random, down and across.
    rate_weights : sequence of float, optional
        One a layer: weights of :class:`SparseRateReductionLoss` in the training loss.
    checkpoint : path, optional
        A .safetensors file, written every ``checkpoint_every`` steps, from which the same fit goes on after it was
        stopped, to the same result; it is removed at the end.
    checkpoint_every : int, default=100
    device : str, default="cpu"
        ``"auto"`` takes an accelerator where there is one.
    random_state : int, RandomState or None
    verbose : bool, default=False
        Show progress on stderr.

    Attributes
    ----------
    model_ : CRATE
        In evaluation mode, float32, on the device.
    classes_ : ndarray of shape (n_classes,)
    image_shape_ : tuple of int
        (c, h, w).
    mean_, spread_ : float
        Of the training pixels.
    loss_curve_ : list of float
        Of each step's mini-batch, in nats.
    n_iter_ : int
    """

    def __init__(
        self,
        dim=64,
        depth=4,
        n_heads=4,
        *,
        image_shape=None,
        patch_size=None,
        block=None,
        pool="cls",
        max_iter=500,
        batch_size=128,
        learning_rate=1e-3,
        weight_decay=0.05,
        optimizer="adamw",
        warmup=0.1,
        label_smoothing=0.1,
        shift=0,
        rate_weights=None,
        checkpoint=None,
        checkpoint_every=100,
        device="cpu",
        random_state=None,
        verbose=False,
    ):
        self.dim = dim
        self.depth = depth
        self.n_heads = n_heads
        self.image_shape = image_shape
        self.patch_size = patch_size
        self.block = block
        self.pool = pool
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.warmup = warmup
        self.label_smoothing = label_smoothing
        self.shift = shift
        self.rate_weights = rate_weights
        self.checkpoint = checkpoint
        self.checkpoint_every = checkpoint_every
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X, y) -> "CrateClassifier":
        """Fit on images ``X`` (n, h, w), (n, c, h, w) or flat (n, c h w), in memory or mapped, and labels ``y`` (n,).

        Raises
        ------
        ValueError
            A parameter is out of range, the shape is not that of ``image_shape``, or there is one class only.
        NotConverged
            The loss is no longer finite.
        """
        from polyspan.io import remove_file
        from polyspan.run import pick_device

        from .image_training import Batches, ImageTraining

        self._check_parameters()
        shape = X.shape[1:] if getattr(X, "ndim", 0) > 2 else None
        X, y = validate_data(self, _flat(X), y, dtype=[np.float32, np.float64])
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least 2 classes, got 1 class: {self.classes_[0]}")
        self.image_shape_ = self._shape_of(X.shape[1], shape)
        self.mean_, self.spread_ = _moments(X)
        generator = _generator(check_random_state(self.random_state))
        device = pick_device(self.device)
        self.model_ = self._make(generator).to(device)
        batches = Batches(X, self.image_shape_, self.mean_, self.spread_, device)
        training = ImageTraining(
            self.model_,
            self._recipe(X, labels),
            generator,
            penalty=self._penalty(),
            label="training" if self.verbose else "",
        )
        self.loss_curve_ = training.run(batches, labels)
        self.n_iter_ = len(self.loss_curve_)
        if self.checkpoint is not None and Path(self.checkpoint).exists():
            remove_file(Path(self.checkpoint))
        return self

    def _check_parameters(self) -> None:
        counts = dict.fromkeys(("dim", "depth", "n_heads", "max_iter", "batch_size", "checkpoint_every"), 1)
        for name, least in (counts | {"shift": 0}).items():
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value}")
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.optimizer not in ("adamw", "lion"):
            raise ValueError(f"optimizer must be 'adamw' or 'lion', got {self.optimizer!r}")
        if self.rate_weights is not None and len(self.rate_weights) != self.depth:
            raise ValueError(f"rate_weights must be {self.depth} numbers, one a layer, got {len(self.rate_weights)}")

    def _shape_of(self, width: int, seen: tuple[int, ...] | None) -> tuple[int, int, int]:
        given = tuple(int(n) for n in self.image_shape) if self.image_shape is not None else seen
        if given is None:
            side = math.isqrt(width)
            given = (side, side) if side * side == width else (1, width)
        shape = _with_channels(given)
        if len(shape) != 3 or math.prod(shape) != width:
            raise ValueError(f"image_shape must be (h, w) or (c, h, w) with {width} values, got {given}")
        if seen is not None and _with_channels(seen) != shape:
            raise ValueError(f"X must hold images of image_shape {given}, got {seen}")
        return shape

    def _make(self, generator: Any, device: str | None = None):
        from ._patches import pair
        from .rate_reduction_transformer import CRATE

        channels, *size = self.image_shape_
        patch = self.patch_size
        if patch is None:
            patch = [side // max(k for k in range(1, 5) if side % k == 0) for side in size]
        p, q = pair(patch)
        return CRATE(
            size, [p, q], len(self.classes_), self.dim, self.depth, self.n_heads, channels=channels, pool=self.pool,
            # A norm takes away each patch's mean and contrast, which of a few values is most of what they tell.
            patch_norm=p * q * channels >= 16, block=dict(self.block or {}), generator=generator, device=device,
        )  # fmt: skip

    def _recipe(self, X: np.ndarray, labels: np.ndarray):
        from .image_training import Recipe

        params = {name: repr(value) for name, value in self.get_params().items()}
        for name in ("checkpoint", "checkpoint_every", "device", "verbose"):
            del params[name]
        facts = {"shape": list(X.shape), "mean": self.mean_, "spread": self.spread_, "labels": int(labels.sum())}
        return Recipe(
            steps=self.max_iter, batch=self.batch_size, rate=self.learning_rate, decay=self.weight_decay,
            warmup=self.warmup, smoothing=self.label_smoothing, shift=int(self.shift), optimizer=self.optimizer,
            checkpoint=None if self.checkpoint is None else Path(self.checkpoint), every=self.checkpoint_every,
            signature=params | facts,
        )  # fmt: skip

    def _penalty(self):
        if self.rate_weights is None:
            return None
        from .layer_rates import SparseRateReductionLoss

        loss = SparseRateReductionLoss([float(w) for w in self.rate_weights])

        def penalised(model, x):
            states = model.forward_states(x)
            return states.logits, loss.of(model, states).mean()

        return penalised

    def _batches(self, X):
        """Yield the images of checked rows, float32 as the network is."""
        import torch

        from .image_training import Batches

        check_is_fitted(self)
        shape = X.shape[1:] if getattr(X, "ndim", 0) > 2 else None
        if shape is not None and _with_channels(shape) != self.image_shape_:
            raise ValueError(f"X must hold images of shape {self.image_shape_}, (c, h, w) as fitted, got {shape}")
        X = validate_data(self, _flat(X), reset=False, dtype=[np.float32, np.float64])
        device = next(self.model_.parameters()).device
        batches = Batches(X, self.image_shape_, self.mean_, self.spread_, device)
        with torch.no_grad():
            for start in range(0, len(X), ROWS):
                yield batches(slice(start, start + ROWS))

    def _logits(self, X) -> np.ndarray:
        return np.concatenate([self.model_(x).cpu().numpy() for x in self._batches(X)])

    def decision_function(self, X) -> np.ndarray:
        """Return logits (n, n_classes), or for two classes the second minus the first, (n,), float32."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X) -> np.ndarray:
        """Return probabilities (n, n_classes), float32."""
        logits = self._logits(X)
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exp / exp.sum(axis=1, keepdims=True)

    def predict(self, X) -> np.ndarray:
        """Return the likeliest class of each image, (n,)."""
        best = self._logits(X).argmax(axis=1)
        return self.classes_[best]

    def features(self, X) -> np.ndarray:
        """Return what the head sees of each image before its norm, (n, dim), float32."""
        model: Any = getattr(self, "model_", None)
        made = [model.forward_head(model.forward_features(x), pre_logits=True).cpu().numpy() for x in self._batches(X)]
        return np.concatenate(made)

    def attention_maps(self, X, layer: int = -1) -> np.ndarray:
        """Return how much each head of a layer looks at each patch, (n, n_heads, patches down, patches across)."""
        return np.concatenate([self.model_.attention_maps(x, layer).cpu().numpy() for x in self._batches(X)])

    def layer_report(self, X, *, eps2: float = 0.01, where: str = "half"):
        """Return rates and sparsity layer by layer on images ``X``; see :func:`~polyspan.nn.layer_report`."""
        from .layer_rates import layer_report

        check_is_fitted(self)
        return layer_report(self.model_, self._batches(X), eps2=eps2, where=where)

    def save(self, path: Path | str) -> Path:
        """Write the fitted classifier to one .safetensors file, atomically; no pickle."""
        from polyspan.io import constructor_params, header_classes, save_fitted

        check_is_fitted(self)
        init = constructor_params(self)
        init["checkpoint"] = None if init["checkpoint"] is None else str(init["checkpoint"])
        facts = {
            name: getattr(self, name) for name in ("n_features_in_", "image_shape_", "mean_", "spread_", "loss_curve_")
        }
        params = {"init": init, "facts": facts, "classes": header_classes(self.classes_), "config": self.model_.config}
        arrays = {name: value.detach().cpu().numpy() for name, value in self.model_.state_dict().items()}
        return save_fitted(Path(path), kind=type(self).__name__, arrays=arrays, params=params)

    @classmethod
    def load(cls, path: Path | str) -> "CrateClassifier":
        """Read a classifier that :meth:`save` wrote.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds something else.
        """
        from polyspan.io import classes_of, load_fitted

        from .crate_checkpoints import load_crate

        found = load_fitted(Path(path), kind=cls.__name__)
        made = cls(**found.params["init"])
        for name, value in found.params["facts"].items():
            setattr(made, name, tuple(value) if name == "image_shape_" else value)
        made.classes_ = classes_of(found.params["classes"])
        made.model_ = load_crate(path)
        made.n_iter_ = len(made.loss_curve_)
        return made

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        # A hundred rows are too few for it.
        tags.classifier_tags.poor_score = True
        return tags


def _flat(X: Any) -> Any:
    """Flatten images to rows; what is no array of images passes, to be refused where all input is checked."""
    return X.reshape(len(X), math.prod(X.shape[1:])) if getattr(X, "ndim", 0) > 2 else X


def _with_channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an image as (c, h, w); one without channels has one."""
    return (1, *shape) if len(shape) == 2 else tuple(shape)


def _moments(X: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation over all entries in blocks, in float64; the spread of a constant is 1."""
    total = squares = 0.0
    first = float(X[0, 0])
    for start in range(0, len(X), ROWS):
        block = np.asarray(X[start : start + ROWS], dtype=np.float64) - first
        total, squares = total + block.sum(), squares + np.square(block).sum()
    mean = total / X.size
    spread = math.sqrt(max(squares / X.size - mean**2, 0.0))
    return float(mean + first), spread or 1.0


def _generator(rng: Any):
    """Seed a torch generator from a NumPy one."""
    import torch

    return torch.Generator().manual_seed(int(rng.randint(2**31 - 1)))
