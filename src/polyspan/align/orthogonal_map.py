"""One orthogonal map between two embedding spaces, fitted on paired anchors, and the maps that it competes with."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted, check_random_state

from polyspan.linalg import PairedMoments, procrustes_from_moments, ridge_from_moments
from polyspan.run import pick_device

from ._aligner import Aligner, residual_share
from ._checks import check_count, check_number, finite_rows


class OrthogonalMap(Aligner):
    r"""Carry embeddings of space A into space B by a rotation and a shift of the mean.

    Solves :math:`\min_{Q^\top Q=I} \lVert (X-\mu_X)Q - (Y-\mu_Y) \rVert_F`: the polar factor of the
    cross-covariance; reflections are allowed. Where B is narrower than A no closed form exists; the map then maximises
    the inner product instead. Not unique where the anchors span fewer than min(d_A, d_B) directions (``rank_`` says how
    many they span): the open directions are then turned as little as can be. Where both models embed images and texts,
    the rotation fitted on images carries the texts as well; only the means differ, see :meth:`add_modality`.
    Source: catalogue entry ``canonicalize``.

    Parameters
    ----------
    shift : bool, default=True
        Fit both means. Switch off for unit vectors compared by cosine whose origin has meaning.
    rotation_only : bool, default=False
        Fit the rotation on centred anchors but apply no mean: the paper's variant without centring.
    scale : bool, default=False
        Fit one positive factor as well. It does nothing to cosines unless a mean is added afterwards.
    normalize : bool, default=False
        Scale every row to length 1 first, anchors and what is transformed: what the paper does.
    rank : int, optional
        Keep only that many leading directions of the cross-covariance (truncated spectrum).

    Attributes
    ----------
    rotation_ : ndarray of shape (n_features_in_, n_features_out)
    mean_in_, mean_out_ : ndarray of shape (n_features_in_,), (n_features_out,)
    scale_ : float
    singular_values_ : ndarray of shape (min(n_features_in_, n_features_out),)
        Of the cross-covariance sums, descending; where they near 0 the rotation is sensitive to the anchors.
    rank_ : int
        Directions that the anchors determine.
    n_anchors_ : int
    residual_ : float
        Unexplained share of the anchors' spread about the mean: 0 is exact, 1 explains nothing. From the moments, so
        it is the same after ``partial_fit``.
    modality_means_ : dict of str to (ndarray, ndarray)
        Means given by :meth:`add_modality`.
    """

    _arrays = ("rotation_", "mean_in_", "mean_out_", "singular_values_")
    _facts = ("scale_", "rank_", "residual_")

    def __init__(self, *, shift=True, rotation_only=False, scale=False, normalize=False, rank=None):
        self.shift = shift
        self.rotation_only = rotation_only
        self.scale = scale
        self.normalize = normalize
        self.rank = rank

    def fit(self, X, y, sample_weight=None) -> "OrthogonalMap":
        """Fit on anchors ``X`` (n, d_A) and ``y`` (n, d_B).

        Raises
        ------
        ValueError
            Row counts differ, fewer than two anchors, a value is not finite or so large or small that its square is
            not, or a row is all zero and directions are asked for (``normalize=True``).

        Warns
        -----
        UserWarning
            Fewer anchors than min(d_A, d_B), or than ``rank``: how rows that differ from all of them turn is then
            nobody's choice. Rows hold 8-bit codes, whose scale and offset nobody told.
        """
        super().fit(X, y, sample_weight)
        told = few_anchors(self.n_anchors_, self.n_features_in_, self._n_features_out, self.rank)
        if told is not None:
            warnings.warn(f"{told}: they determine {self.rank_}", stacklevel=2)
        return self

    def _fit_rows(self, X, Y, weights) -> None:
        if self.rank is not None:
            check_count("rank", self.rank)
        # How far the map carries rows that it does not keep whole hangs on their covariance.
        loses = X.shape[1] > Y.shape[1] or self.rank is not None
        moments = PairedMoments(X.shape[1], Y.shape[1], keep_cov_in=loses, keep_cov_out=False)
        self._moments = moments.update(X, Y, weights)
        self.modality_means_ = {}
        self._solve()

    def partial_fit(self, X, y, sample_weight=None) -> "OrthogonalMap":
        """Add a batch of anchors to those seen so far and refit; equal to one :meth:`fit` on all of them.

        That they are too few is not said, since others may come: see ``rank_``.

        Raises
        ------
        ValueError
            As :meth:`fit`; ``rank`` was set after the first anchors; or the map was read from a file, which does not
            keep the anchors' moments.
        """
        if not hasattr(self, "_moments"):
            if hasattr(self, "rotation_"):
                raise ValueError(
                    f"partial_fit must go on from anchors seen in this process, got a map of {self.n_anchors_} anchors "
                    "read from a file, which keeps none of them: fit anew"
                )
            super().fit(X, y, sample_weight)
            return self
        X, Y, weights = self._anchors(X, y, sample_weight, reset=False)
        if self.rank is not None and not self._moments.keep_cov_in:
            raise ValueError(f"rank must be set before the first anchors, got rank={self.rank} after them: fit anew")
        self._moments.update(X, Y, weights)
        self.n_anchors_ += len(X)
        self._solve()
        return self

    def _solve(self) -> None:
        moments = self._moments
        centred = self.shift or self.rotation_only
        fit = procrustes_from_moments(moments, shift=centred, scale=self.scale, rank=self.rank, tie_break="identity")
        self.rotation_, self.scale_ = fit.rotation, fit.scale
        self.singular_values_, self.rank_ = fit.singular_values, fit.rank
        still = self.rotation_only or not self.shift
        self.mean_in_ = np.zeros(moments.d_in) if still else fit.mean_in
        self.mean_out_ = np.zeros(self._n_features_out) if still else fit.mean_out
        used = moments if centred else moments.uncentred()
        mapped = self.scale_ * self.rotation_
        carried = np.sum((used.cov_in @ mapped) * mapped) if used.keep_cov_in else self.scale_**2 * used.spread_in
        rss = carried - 2 * np.sum(used.cross * mapped) + used.spread_out
        self.residual_ = float(np.sqrt(max(rss, 0.0) / (used.spread_out or 1.0)))

    def add_modality(self, name: str, X, y) -> "OrthogonalMap":
        """Learn the two means of a further modality from its own rows, which need not be paired.

        Parameters
        ----------
        name : str
        X, y : arrays of shape (m, d_A) and (l, d_B)
            For instance captions embedded by text tower A and by text tower B.
        """
        check_is_fitted(self)
        X, Y = self._directions(finite_rows(X, "X")), self._directions(finite_rows(y, "y"), "y")
        if (X.shape[1], Y.shape[1]) != self.rotation_.shape:
            raise ValueError(f"X and y must have widths {self.rotation_.shape}, got {X.shape[1]} and {Y.shape[1]}")
        self.modality_means_[name] = (X.mean(axis=0), Y.mean(axis=0))
        return self

    def transform(self, X, modality: str | None = None) -> np.ndarray:
        """Return ``X`` (m, d_A) as seen from space B, (m, d_B), in the float width of ``X``.

        Parameters
        ----------
        modality : str, optional
            Use the means that :meth:`add_modality` learnt under this name. A name never given falls back to no means,
            with a warning: that costs little, because the rotation does the work.
        """
        if modality is None:
            return super().transform(X)
        check_is_fitted(self)
        if modality not in self.modality_means_:
            warnings.warn(
                f"modality {modality!r} has no means (known: {sorted(self.modality_means_)}); none are applied",
                stacklevel=2,
            )
        still = (np.zeros_like(self.mean_in_), np.zeros_like(self.mean_out_))
        means = self.modality_means_.get(modality, still)
        own = self.mean_in_, self.mean_out_
        plain = super().transform(X)
        change = (means[1] - own[1]) - (means[0] - own[0]) @ (self.scale_ * self.rotation_)
        return plain + change.astype(plain.dtype)

    def _apply(self, X):
        Q = (self.scale_ * self.rotation_).astype(X.dtype)
        offset = (self.mean_out_ - self.mean_in_ @ (self.scale_ * self.rotation_)).astype(X.dtype)
        out = X @ Q
        if offset.any():
            out += offset
        return out

    def inverse_transform(self, Z) -> np.ndarray:
        """Return rows of space B (m, d_B) as seen from space A: exact where the widths are equal and rank is full.

        Into a wider A it is the isometry's transpose; from a wider B it loses what the map does not reach.
        With ``normalize=True`` it gives back directions: the lengths are gone.
        """
        check_is_fitted(self)
        Z = _as_wide(finite_rows(Z, "Z", keep=True), self.rotation_.shape[1])
        Q, a, b = (p.astype(Z.dtype) for p in (self.rotation_, self.mean_in_, self.mean_out_))
        return ((Z - b) / Z.dtype.type(self.scale_)) @ Q.T + a

    def _to_arrays(self):
        pairs = {
            f"modality:{side}:{name}": means[i]
            for name, means in self.modality_means_.items()
            for i, side in enumerate(("in", "out"))
        }
        return super()._to_arrays() | pairs

    def _from_arrays(self, arrays) -> None:
        names = sorted(key.split(":", 2)[2] for key in arrays if key.startswith("modality:in:"))
        self.modality_means_ = {
            name: tuple(arrays.pop(f"modality:{side}:{name}") for side in ("in", "out")) for name in names
        }
        super()._from_arrays(arrays)


def few_anchors(n: int, d_in: int, d_out: int, rank: int | None = None) -> str | None:
    """Say that so many anchors cannot determine a rotation, or None."""
    wanted = min(d_in, d_out) if rank is None else min(d_in, d_out, rank)
    return f"{n} anchors leave part of {wanted} dimensions open" if n < wanted else None


@contextmanager
def few_anchors_unsaid() -> Generator[None]:
    """Fit within it where the caller says itself, once, that anchors are few."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\d+ anchors leave part of ", category=UserWarning)
        yield


class RidgeMap(Aligner):
    r"""Carry embeddings of space A into space B by the least-squares affine map with a ridge penalty.

    :math:`\min_W \lVert (X-\mu_X) W - (Y-\mu_Y) \rVert_F^2 + \alpha \lVert W \rVert_F^2`. Free of the isometry, it fits
    better where anchors are many, and shrinks directions of little variance, which costs retrieval on the query side.
    Source: catalogue entry ``canonicalize``, strongest baseline.

    Parameters
    ----------
    alpha : float or "gcv", default="gcv"
        Penalty in squared units of X; ``"gcv"`` chooses by generalised cross-validation.
    shift : bool, default=True
    normalize : bool, default=False

    Attributes
    ----------
    weights_ : ndarray of shape (n_features_in_, n_features_out)
    mean_in_, mean_out_ : ndarray
    alpha_ : float
    residual_ : float
    n_anchors_ : int
    """

    _arrays = ("weights_", "mean_in_", "mean_out_")
    _facts = ("alpha_", "residual_")

    def __init__(self, alpha: Any = "gcv", *, shift=True, normalize=False):
        self.alpha = alpha
        self.shift = shift
        self.normalize = normalize

    def _fit_rows(self, X, Y, weights) -> None:
        if self.alpha != "gcv":
            check_number("alpha", self.alpha)
        moments = PairedMoments(X.shape[1], Y.shape[1]).update(X, Y, weights)
        fit = ridge_from_moments(moments, alpha=self.alpha, shift=self.shift)
        self.weights_, self.mean_in_, self.mean_out_, self.alpha_ = fit
        self.residual_ = residual_share(self._apply(X), Y, self.mean_out_)

    def _apply(self, X):
        W, offset = self.weights_, self.mean_out_ - self.mean_in_ @ self.weights_
        return X @ W.astype(X.dtype) + offset.astype(X.dtype)


class MeanShift(Aligner):
    """Carry embeddings into a space of the same width by the difference of the means alone.

    The weakest map worth fitting: it removes the offset between two models, not their rotation.
    Source: catalogue entry ``canonicalize``, baseline.

    Parameters
    ----------
    normalize : bool, default=False

    Attributes
    ----------
    shift_ : ndarray of shape (n_features_in_,)
    residual_ : float
    n_anchors_ : int
    """

    _arrays = ("shift_",)
    _facts = ("residual_",)

    def __init__(self, *, normalize=False):
        self.normalize = normalize

    def _fit_rows(self, X, Y, weights) -> None:
        _same_width(self, X, Y)
        self.shift_ = np.average(Y - X, axis=0, weights=weights)
        self.residual_ = residual_share(X + self.shift_, Y, np.average(Y, axis=0, weights=weights))

    def _apply(self, X):
        return X + self.shift_.astype(X.dtype)

    def inverse_transform(self, Z) -> np.ndarray:
        """Return rows of space B (m, d) as seen from space A."""
        check_is_fitted(self)
        Z = _as_wide(finite_rows(Z, "Z", keep=True), len(self.shift_))
        return Z - self.shift_.astype(Z.dtype)


class IdentityMap(Aligner):
    """Leave embeddings as they are: what a store does when the model is changed and nothing else.

    Parameters
    ----------
    normalize : bool, default=False

    Attributes
    ----------
    mean_out_ : ndarray of shape (n_features_in_,)
        Mean of the anchors in space B, about which the residual is taken.
    residual_ : float
    n_anchors_ : int
    """

    _arrays = ("mean_out_",)
    _facts = ("residual_",)

    def __init__(self, *, normalize=False):
        self.normalize = normalize

    def _fit_rows(self, X, Y, weights) -> None:
        _same_width(self, X, Y)
        self.mean_out_ = np.average(Y, axis=0, weights=weights)
        self.residual_ = residual_share(X, Y, self.mean_out_)

    def _apply(self, X):
        return X.copy()

    def inverse_transform(self, Z) -> np.ndarray:
        """Return ``Z`` unchanged."""
        check_is_fitted(self)
        return _as_wide(finite_rows(Z, "Z", keep=True), len(self.mean_out_)).copy()


class ResidualMLPMap(Aligner):
    r"""Carry embeddings of space A into space B by the ridge map plus a small neural correction.

    :math:`f(x) = r(x) + W_2\,\mathrm{gelu}(W_1 x + b_1) + b_2`, where r is :class:`RidgeMap` and W₂ starts at zero, so
    that training starts from the ridge map and can only leave it where a tenth of the anchors, held out, gains by it.
    Loss: mean squared error plus one minus cosine. Needs thousands of anchors before it pays.
    Source: catalogue entry ``canonicalize``, baseline.

    Parameters
    ----------
    hidden : int, default=256
        Width of the hidden layer.
    max_iter : int, default=100
        Epochs at most; it stops when the held-out loss has not fallen for ten.
    learning_rate : float, default=1e-3
    batch_size : int, default=256
    normalize : bool, default=False
    random_state : int, RandomState instance or None
    device : str, default="cpu"

    Attributes
    ----------
    residual_ : float
    n_iter_ : int
        Epochs that were run.
    n_anchors_ : int
    """

    _arrays = ("weights_", "mean_in_", "mean_out_", "hidden_weight_", "hidden_bias_", "out_weight_", "out_bias_")
    _facts = ("residual_", "n_iter_")

    def __init__(
        self,
        *,
        hidden=256,
        max_iter=100,
        learning_rate=1e-3,
        batch_size=256,
        normalize=False,
        random_state=None,
        device="cpu",
    ):
        self.hidden = hidden
        self.max_iter = max_iter
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.normalize = normalize
        self.random_state = random_state
        self.device = device

    def fit(self, X, y) -> "Aligner":  # ty: ignore[incompatible-method-override]
        """Fit on anchors ``X`` (n, d_A) and ``y`` (n, d_B); batches are drawn at random, so weights are not taken."""
        return super().fit(X, y)

    def _fit_rows(self, X, Y, weights) -> None:
        import torch

        for name, least in (("hidden", 1), ("max_iter", 0), ("batch_size", 1)):
            check_count(name, getattr(self, name), least)
        check_number("learning_rate", self.learning_rate, positive=True)
        device = pick_device(self.device)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(X), generator=generator).numpy()
        n_held = max(1, len(X) // 10)
        held, kept = order[:n_held], order[n_held:]
        moments = PairedMoments(X.shape[1], Y.shape[1]).update(X[kept], Y[kept])
        self.weights_, self.mean_in_, self.mean_out_, _ = ridge_from_moments(moments)
        spread = float(np.sqrt(np.mean((X - self.mean_in_) ** 2))) or 1.0

        def tensor(a):
            return torch.as_tensor(np.ascontiguousarray(a), dtype=torch.float32, device=device)

        inputs, target = tensor((X - self.mean_in_) / spread), tensor(Y)
        start = tensor((X - self.mean_in_) @ self.weights_ + self.mean_out_)
        first = torch.randn(X.shape[1], self.hidden, generator=generator) / np.sqrt(X.shape[1])
        parts = [
            first.to(device).requires_grad_(),
            torch.zeros(self.hidden, device=device, requires_grad=True),
            torch.zeros(self.hidden, Y.shape[1], device=device, requires_grad=True),
            torch.zeros(Y.shape[1], device=device, requires_grad=True),
        ]
        optimiser = torch.optim.AdamW(parts, lr=self.learning_rate, weight_decay=1e-2)
        unit = float(np.mean((Y - self.mean_out_) ** 2)) or 1.0
        if not 1e-15 < unit**0.5 < 1e15:
            raise ValueError(f"y must vary by 1e-15 to 1e15 to be trained on in float32, got {unit**0.5:.3g}: scale it")

        def loss(rows):
            guess = start[rows] + torch.nn.functional.gelu(inputs[rows] @ parts[0] + parts[1]) @ parts[2] + parts[3]
            squared = (guess - target[rows]).square().mean(dim=1) / unit
            return (squared + 1 - torch.nn.functional.cosine_similarity(guess, target[rows])).mean()

        def held_loss():
            with torch.no_grad():
                return float(loss(held_rows))

        held_rows, kept_rows = torch.as_tensor(held, device=device), torch.as_tensor(kept)
        best, waited, best_parts = held_loss(), 0, [p.detach().clone() for p in parts]
        self.n_iter_ = 0
        while self.n_iter_ < self.max_iter and waited < 10:
            shuffled = kept_rows[torch.randperm(len(kept_rows), generator=generator)].to(device)
            for rows in shuffled.split(self.batch_size):
                optimiser.zero_grad(set_to_none=True)
                loss(rows).backward()
                optimiser.step()
            self.n_iter_ += 1
            now = held_loss()
            waited += 1
            if now < best:
                best, waited, best_parts = now, 0, [p.detach().clone() for p in parts]
        first, bias, last, last_bias = (p.double().cpu().numpy() for p in best_parts)
        self.hidden_weight_, self.hidden_bias_ = first / spread, bias - (self.mean_in_ / spread) @ first
        self.out_weight_, self.out_bias_ = last, last_bias
        self.residual_ = residual_share(self._apply(X), Y, self.mean_out_)

    def _apply(self, X):
        from scipy.special import erf

        W, a, b, W1, b1, W2, b2 = (getattr(self, name).astype(X.dtype) for name in self._arrays)
        inner = X @ W1 + b1
        hidden = 0.5 * inner * (1 + erf(inner / np.sqrt(2).astype(X.dtype)))
        return (X - a) @ W + b + hidden @ W2 + b2

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags


def _as_wide(Z: np.ndarray, width: int) -> np.ndarray:
    if Z.shape[1] != width:
        raise ValueError(f"Z must have {width} features, got {Z.shape[1]}")
    return Z


def _same_width(aligner: Aligner, X: np.ndarray, Y: np.ndarray) -> None:
    if X.shape[1] != Y.shape[1]:
        raise ValueError(f"{type(aligner).__name__} needs spaces of one width, got {X.shape[1]} and {Y.shape[1]}")
