"""Maps between two frozen encoders that may leave the rotations as far as a threshold allows."""

import math
import warnings
from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted, check_random_state
from torch import Tensor

from polyspan.linalg import fix_signs, label_hits, nearest_isometry, procrustes, ridge_map, top_k
from polyspan.run import pick_device

from ._aligner import Aligner, residual_share
from ._checks import check_count, check_labels, check_number, finite_rows, rms_length
from ._paired_training import Maps, Recipe, gelu, held_out_loss, train
from .relaxed_linear import (
    check_threshold,
    deviation_from_isometry,
    relaxed_orthogonality,
    spectral_orthogonality,
)

MODES = ("relaxed", "orthogonal", "affine", "srip")
DIM_MATCHES = ("rect", "pad", "truncate", "pca")
LAMBDAS = (0.1, 0.2, 0.35, 0.53, 0.8)
MAX_SLOPE = 5.0
CHECKED_ROWS = 2000


class RelaxedOrthogonalAdapter(Aligner):
    r"""Let new queries search an old gallery, lift the gallery without embedding it again, and adapt both to labels.

    Both encoders stay frozen. The backward map :math:`B(x) = xW + b` carries **new** vectors into the space of the old
    (:meth:`transform`); the forward map :math:`\mathcal F` carries **old** vectors (:meth:`transform_old`) to where
    :math:`B` puts the new one of the same item, so that raw old, lifted old and adapted new vectors can be compared in
    one space. With h the old and x the new vector of an item, training minimises

    .. math:: w_1 \lVert \mathcal F(h) - B(x) \rVert^2 + w_2 \lVert B(x) - h \rVert^2
              + w_3 \,[ C(\mathcal F(h), B(x)) + C(\mathcal F(h), h) ] + \sigma(\alpha (N-\lambda))\, N,

    where C is the supervised contrastive cross-entropy over the batch and the last term is
    :func:`relaxed_orthogonality` of W. It starts from closed forms (Procrustes, then ridge), so ``max_iter=0`` is a
    useful map already. A larger threshold adapts more to the labels and spoils the new model more on other data: where
    that matters, keep it small, and look at ``deviation_`` and ``singular_values_``. It presumes that the new model is
    the better one, and warns where labelled anchors say otherwise. Whether rows are paired is not tested here: see
    :func:`polyspan.align.alignment_report`. Vectors are divided by their root mean square length inside, so that one
    set of weights serves every scale; W is then an isometry up to one factor.
    Source: catalogue entry ``lambda-orthogonality``; the warm start, ``dim_match`` other than ``"truncate"``, the
    relative threshold and its choice by held-out loss are ours.

    Parameters
    ----------
    mode : {"relaxed", "orthogonal", "affine", "srip"}, default="relaxed"
        ``"orthogonal"`` keeps W an isometry throughout (threshold 0, strictly), ``"affine"`` leaves out the penalty
        (threshold infinity), ``"srip"`` puts an older one in its place, :func:`spectral_orthogonality`, which looks at
        the worst direction only and knows no threshold.
    lam : float or "auto", default=0.53
        Threshold. ``"auto"`` learns it: of five relative values, the one with the least loss on a tenth of the anchors,
        held out. That tells nothing about data unlike the anchors.
    lam_scale : {"relative", "absolute"}, default="relative"
        Relative thresholds are in units of sqrt(k), k being the shorter side of W.
    steepness : float, default=1.0
        The factor alpha in the gate; N ends near the threshold only if this is large.
    loss_weights : tuple of three floats, default=(1.0, 1.0, 1.0)
        w₁, w₂ and w₃.
    temperature : float, default=0.1
        Of the contrastive softmax over cosines.
    forward : {"linear", "mlp"}, default="linear"
        ``"mlp"`` adds one hidden layer to the linear forward map, which starts at no effect.
    hidden : int, default=256
        Width of that layer.
    dim_match : {"rect", "pad", "truncate", "pca"}, default="rect"
        What to do where widths differ. ``"rect"``: a rectangular W into the old space. ``"pad"``: append zeros to the
        shorter vectors. ``"truncate"``: cut the longer ones, as in the paper. ``"pca"``: project the longer ones.
    init : {"procrustes", "random"}, default="procrustes"
    shift : bool, default=True
        Give B a bias. Without one the orthogonal mode keeps every cosine between new vectors.
    normalize : bool, default=False
        Scale every row to length 1 first.
    learning_rate : float, default=1e-3
        Of Adam.
    max_iter : int, default=10
        Epochs.
    batch_size : int, default=512
    random_state : int, RandomState instance or None
    device : str, default="auto"
    verbose : bool, default=False

    Attributes
    ----------
    weights_, bias_ : ndarray of shape (n_features_in_, n_features_out), (n_features_out,)
        The backward map, with what ``dim_match`` does to new vectors.
    forward_weights_, forward_bias_ : ndarray of shape (n_features_old_, n_features_out), (n_features_out,)
    deviation_ : float
        N of the fitted W.
    singular_values_ : ndarray of shape (k,)
        Of W, descending: how far lengths are stretched and shrunk.
    lam_ : float or None
        The threshold in units of N; None without the penalty.
    held_losses_ : list of (float, float)
        With ``lam="auto"``: relative threshold and held-out loss.
    contrast_ : {"labels", "pairs"}
        What counts as alike in C: items of one label, or without labels each item and itself.
    history_ : list of dict
        Mean of every term, an epoch.
    residual_ : float
        Unexplained share of the old anchors' spread after B.
    n_iter_ : int
        Epochs that were run.
    n_anchors_, n_features_old_ : int
    """

    _arrays = ("weights_", "bias_", "forward_weights_", "forward_bias_", "singular_values_")
    _optional = ("hidden_weights_", "hidden_bias_", "correction_weights_", "old_basis_")
    _facts = ("residual_", "deviation_", "lam_", "contrast_", "n_features_old_", "n_iter_")

    def __init__(
        self,
        mode="relaxed",
        *,
        lam: Any = 0.53,
        lam_scale="relative",
        steepness=1.0,
        loss_weights=(1.0, 1.0, 1.0),
        temperature=0.1,
        forward="linear",
        hidden=256,
        dim_match="rect",
        init="procrustes",
        shift=True,
        normalize=False,
        learning_rate=1e-3,
        max_iter=10,
        batch_size=512,
        random_state=None,
        device="auto",
        verbose=False,
    ):
        self.mode = mode
        self.lam = lam
        self.lam_scale = lam_scale
        self.steepness = steepness
        self.loss_weights = loss_weights
        self.temperature = temperature
        self.forward = forward
        self.hidden = hidden
        self.dim_match = dim_match
        self.init = init
        self.shift = shift
        self.normalize = normalize
        self.learning_rate = learning_rate
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X, y, labels=None) -> "RelaxedOrthogonalAdapter":  # ty: ignore[lost-keyword-for-regular-parameter]
        """Fit on anchors: row i of ``X`` (n, d_new) and row i of ``y`` (n, d_old) are one item by both encoders.

        Parameters
        ----------
        labels : array of shape (n,), optional
            Classes of the items, of any kind. Without them, or with one class only, each item is alike to itself
            alone.

        Raises
        ------
        ValueError
            A setting is out of range, rows or labels do not pair up, a value is not finite, or fewer than two anchors.
        """
        self._check_settings()
        X, Y, _ = self._anchors(X, y, None, reset=True)
        if len(X) < 2:
            raise ValueError(f"{type(self).__name__} needs at least 2 anchors, got {len(X)} sample")
        self.n_anchors_, self.n_features_old_ = len(X), Y.shape[1]
        rng = check_random_state(self.random_state)
        codes = self._codes(labels, X, Y, rng)
        self.contrast_ = "pairs" if codes is None else "labels"
        A, reducer = self._match_widths(X, Y)
        T = self._place(Y)
        self._n_features_out = T.shape[1]
        size_in, size_out = rms_length(A), rms_length(T)
        sides = A / size_in, T / size_out, Y / size_out
        k = min(A.shape[1], T.shape[1])
        seed = int(rng.randint(2**31 - 1))
        lam = self._threshold(sides, codes, k, seed)
        self.lam_ = lam if self.mode == "relaxed" else None
        maps, self.history_ = self._train(sides, codes, lam, seed)
        self.n_iter_ = len(self.history_)
        self.singular_values_ = np.linalg.svd(maps.backward, compute_uv=False)
        self.deviation_ = float(np.linalg.norm(self.singular_values_**2 - 1))
        self.weights_ = reducer(maps.backward) * (size_out / size_in)
        self.bias_ = maps.shift * size_out
        self.forward_weights_, self.forward_bias_ = maps.forward, maps.forward_shift * size_out
        self.hidden_weights_ = self.hidden_bias_ = self.correction_weights_ = None
        if maps.hidden is not None:
            self.hidden_weights_, self.hidden_bias_ = maps.hidden / size_out, maps.hidden_shift
            self.correction_weights_ = maps.correction * size_out
        self.residual_ = residual_share(self._apply(X), T, T.mean(axis=0))
        return self

    def _check_settings(self) -> None:
        for name, allowed in (
            ("mode", MODES),
            ("lam_scale", ("relative", "absolute")),
            ("forward", ("linear", "mlp")),
            ("dim_match", DIM_MATCHES),
            ("init", ("procrustes", "random")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.lam != "auto":
            if not isinstance(self.lam, Real) or not math.isfinite(self.lam):
                raise ValueError(
                    f"lam must be a finite number or 'auto', got {self.lam!r}; no threshold at all is mode='affine'"
                )
            check_threshold(self.lam, self.steepness)
        check_threshold(0, self.steepness)
        weights = np.asarray(self.loss_weights, dtype=np.float64)
        if weights.shape != (3,) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(f"loss_weights must be three non-negative numbers, got {self.loss_weights!r}")
        for name in ("temperature", "learning_rate"):
            check_number(name, getattr(self, name), positive=True)
        for name, least in (("max_iter", 0), ("batch_size", 2), ("hidden", 1)):
            check_count(name, getattr(self, name), least)

    def _codes(self, labels: Any, X: np.ndarray, Y: np.ndarray, rng: Any) -> np.ndarray | None:
        """Return classes numbered from 0, or None where there is nothing to tell apart."""
        if labels is None:
            return None
        labels = check_labels(labels, "labels")
        if labels.shape != (len(X),):
            raise ValueError(f"labels must have shape ({len(X)},), one an anchor, got {labels.shape}")
        classes, codes = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            warnings.warn("labels hold one class only; items are contrasted as pairs instead", stacklevel=3)
            return None
        rows = rng.permutation(len(X))[:CHECKED_ROWS]
        new, old = (_own_label_found(side[rows], codes[rows]) for side in (X, Y))
        if new < old - 1 / math.sqrt(len(rows)):  # twice the largest standard error of a share
            warnings.warn(
                f"the new encoder finds the label of {new:.1%} of the anchors, the old one of {old:.1%}: this system "
                "presumes a better new encoder; are X and y swapped?",
                stacklevel=3,
            )
        return codes

    def _match_widths(self, X: np.ndarray, Y: np.ndarray):
        """Return new vectors as W takes them, and what turns W into a map of whole new vectors; set the old side."""
        d_new, d_old = X.shape[1], Y.shape[1]
        least = min(d_new, d_old)
        self._width = {"rect": d_old, "pad": max(d_new, d_old)}.get(self.dim_match, least)
        self.old_basis_ = None
        if d_new == d_old or self.dim_match == "rect":
            return X, _as_it_is
        if self.dim_match == "pad":
            return _cut_or_pad(X, self._width), lambda W: W[:d_new]
        longer = X if d_new > d_old else Y
        basis = np.eye(longer.shape[1], least)
        if self.dim_match == "pca":
            centred = longer - longer.mean(axis=0)
            basis = fix_signs(np.linalg.eigh(centred.T @ centred)[1][:, : -least - 1 : -1])
        else:
            total = longer.var(axis=0).sum()
            lost = longer[:, least:].var(axis=0).sum() / (total or 1.0)
            warnings.warn(
                f"dim_match='truncate' drops {lost:.1%} of the variance of the longer vectors; 'rect' drops none",
                stacklevel=3,
            )
        if longer is Y:
            self.old_basis_ = basis if self.dim_match == "pca" else None
            return X, _as_it_is
        return X @ basis, lambda W: basis @ W

    def _place(self, Y: np.ndarray) -> np.ndarray:
        if self.old_basis_ is not None:
            return Y @ self.old_basis_.astype(Y.dtype)
        return _cut_or_pad(Y, self._width)

    def _threshold(self, sides, codes, k: int, seed: int) -> float:
        """Return the threshold in units of N, learnt where it is to be."""
        vars(self).pop("held_losses_", None)
        if self.mode != "relaxed":
            return math.inf
        if self.lam != "auto":
            if self.lam_scale == "relative":
                return float(self.lam) * math.sqrt(k)
            if self.lam > math.sqrt(k):
                warnings.warn(
                    f"lam={self.lam:g} is above sqrt({k})={math.sqrt(k):.3g}, the deviation of a map that shrinks all "
                    "to nothing: it will hardly ever act",
                    stacklevel=3,
                )
            return float(self.lam)
        n = len(sides[0])
        order = np.random.default_rng(seed).permutation(n)
        held, kept = order[: max(1, n // 10)], order[max(1, n // 10) :]
        self.held_losses_ = []
        for relative in LAMBDAS:
            maps, _ = self._train(
                [side[kept] for side in sides], None if codes is None else codes[kept], relative * math.sqrt(k), seed
            )
            rows = [side[held] for side in sides]
            loss = held_out_loss(maps, rows, None if codes is None else codes[held], self._recipe(math.inf))
            self.held_losses_.append((relative, loss))
        return min(self.held_losses_, key=lambda pair: pair[1])[0] * math.sqrt(k)

    def _recipe(self, lam: float, seed: int = 0) -> Recipe:
        chance = torch.Generator().manual_seed(seed)

        def penalty(W: Tensor) -> Tensor:
            if self.mode == "srip":
                return spectral_orthogonality(W, generator=chance)
            return relaxed_orthogonality(W, lam, steepness=self.steepness, max_slope=MAX_SLOPE)

        return Recipe(
            weights=tuple(map(float, self.loss_weights)),
            temperature=float(self.temperature),
            penalty=penalty if math.isfinite(lam) or self.mode == "srip" else None,
            deviation=deviation_from_isometry,
            strict=self.mode == "orthogonal",
            shift=self.shift,
            learning_rate=self.learning_rate,
            max_iter=self.max_iter,
            batch_size=self.batch_size,
            device=pick_device(self.device),
            verbose=self.verbose,
        )

    def _train(self, sides, codes, lam: float, seed: int):
        generator = torch.Generator().manual_seed(seed)
        return train(self._start(*sides, generator), sides, codes, self._recipe(lam, seed), generator)

    def _start(self, A: np.ndarray, T: np.ndarray, old: np.ndarray, generator: torch.Generator) -> Maps:
        """Return the maps that training starts from: closed forms, or chance."""
        d_in, d_out = A.shape[1], T.shape[1]
        hidden = None

        def drawn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).numpy()

        if self.init == "procrustes":
            fit = procrustes(A, T, shift=self.shift, tie_break="identity")
            W, shift = fit.rotation, fit.mean_out - fit.mean_in @ fit.rotation
            ridge = ridge_map(old, A @ W + shift)
            ahead, ahead_shift = ridge.weights, ridge.mean_out - ridge.mean_in @ ridge.weights
        else:
            # The spread of nn.Linear's own start, variance 1 / (3 d).
            W, shift = drawn(d_in, d_out) / math.sqrt(3 * d_in), np.zeros(d_out)
            ahead, ahead_shift = drawn(old.shape[1], d_out) / math.sqrt(3 * old.shape[1]), np.zeros(d_out)
            if self.mode == "orthogonal":
                W = nearest_isometry(W)
        if self.forward == "mlp":
            hidden = drawn(old.shape[1], self.hidden)  # rows of old vectors have length 1 here
        return Maps(W, shift, ahead, ahead_shift, hidden, np.zeros(self.hidden), np.zeros((self.hidden, d_out)))

    def _apply(self, X):
        return X @ self.weights_.astype(X.dtype) + self.bias_.astype(X.dtype)

    def transform_old(self, Y) -> np.ndarray:
        """Lift **old** vectors (m, d_old) by the forward map to where their new ones would be, in their float width.

        Rows are independent: a gallery of any size goes through in batches, for instance by
        :func:`polyspan.io.transform_file`.
        """
        Y = self._old_rows(Y)
        lifted = Y @ self.forward_weights_.astype(Y.dtype) + self.forward_bias_.astype(Y.dtype)
        if self.hidden_weights_ is None:
            return lifted
        parts = (self.hidden_weights_, self.hidden_bias_, self.correction_weights_)
        inner, shift, outer = (np.asarray(part, dtype=Y.dtype) for part in parts)
        return lifted + gelu(Y @ inner + shift) @ outer

    def place_old(self, Y) -> np.ndarray:
        """Return **old** vectors (m, d_old) as they stand in the shared space without any map.

        Unchanged, unless widths differ and ``dim_match`` cuts, projects or pads them.
        """
        return self._place(self._old_rows(Y))

    def _old_rows(self, Y) -> np.ndarray:
        check_is_fitted(self)
        Y = finite_rows(Y, "Y", keep=True)
        if Y.shape[1] != self.n_features_old_:
            raise ValueError(f"Y must have the {self.n_features_old_} features of old vectors, got {Y.shape[1]}")
        return self._directions(Y, "Y")

    def inverse_transform(self, Z) -> np.ndarray:
        """Return rows of the shared space (m, n_features_out) as new vectors: exact where W is square and regular.

        From a wider old space it drops what B does not reach; into a wider new one it gives the shortest answer.
        With ``normalize=True`` it gives back directions.
        """
        check_is_fitted(self)
        Z = finite_rows(Z, "Z", keep=True)
        if Z.shape[1] != len(self.bias_):
            raise ValueError(f"Z must have {len(self.bias_)} features, got {Z.shape[1]}")
        return (Z - self.bias_.astype(Z.dtype)) @ np.linalg.pinv(self.weights_).astype(Z.dtype)

    def score(self, X, y) -> float:
        """Return the mean cosine between ``transform(X)`` and the old vectors ``y``, placed in the shared space."""
        return super().score(X, self.place_old(y))

    def _to_arrays(self):
        there = {name: getattr(self, name, None) for name in self._optional}
        return super()._to_arrays() | {name: value for name, value in there.items() if value is not None}

    def _from_arrays(self, arrays) -> None:
        for name in self._optional:
            setattr(self, name, None)
        super()._from_arrays(arrays)
        self._width = len(self.bias_)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags


def _as_it_is(W: np.ndarray) -> np.ndarray:
    return W


def _cut_or_pad(A: np.ndarray, width: int) -> np.ndarray:
    return A[:, :width] if A.shape[1] >= width else np.pad(A, ((0, 0), (0, width - A.shape[1])))


def _own_label_found(rows: np.ndarray, codes: np.ndarray) -> float:
    """Share of rows whose nearest other row carries their label."""
    found = top_k(rows, rows, 1, exclude=np.arange(len(rows))).indices
    return float(label_hits(codes, codes, found).mean())
