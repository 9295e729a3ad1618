"""Take the position of patches out of dense features of a model that is already trained."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from polyspan.linalg import PairedMoments, ridge_from_moments

from ._erasure import Erasure, explained, leace, penalty, ridge_rounds, sgd_rounds
from ._positions import LEAST_IMAGES, TARGETS, Patches, as_array, as_patches, make_targets, unit_positions

METHODS = ("rasa", "leace", "position_mean")
SOLVERS = ("ridge", "sgd")
FLOATS = [np.float64, np.float32]
# A fit by another method must not leave these behind.
OF_ONE_METHOD = ("projector_", "offset_", "basis_", "position_means_", "positions_", "mean_")


def _takes_batches(estimator: Any) -> bool:
    if estimator.method == "rasa" and estimator.solver == "sgd":
        raise AttributeError("partial_fit needs solver='ridge': 'sgd' goes over all rows again and again")
    return True


class PositionalDisentangler(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    r"""Remove what tells the position of a patch from dense features, so that clusters and neighbours follow content.

    Position is found by regression of targets t, functions of (row, column), on features x. Three ways to remove it:

    - ``"rasa"``, in rounds: fit :math:`W` from what is left of the features to t, make its rows orthonormal, and
      project them out, :math:`x \leftarrow x - W^\top W x`. All rounds together are one orthogonal projector,
      :math:`I - BB^\top`. With ``solver="ridge"`` every round is a solve with running sums of products: one pass over
      the data serves them all. Each round removes as many directions as there are targets, and with them whatever
      content lies there: too many harm.
    - ``"leace"``, at once: :math:`x \leftarrow x - \Sigma^{1/2} U U^\top \Sigma^{-1/2} (x - \mu)`, U the left singular
      vectors of :math:`\Sigma^{-1/2} \mathrm{cov}(x, t) \mathrm{cov}(t)^{-1/2}`. No linear function of the result has
      any covariance with t, and no other affine map that reaches this changes the features less. Vectors whose
      singular value, a correlation, is within noise are left out: with them much content goes for nothing.
    - ``"position_mean"``: subtract from each patch the mean feature of its position. It needs the positions of the fit
      again, and does too little where the code of position is stronger in some images than in others.

    Row and column alone leave every curved function of position: with ``targets="cosine"`` one pass of LEACE takes the
    smooth ones out as well, which clustered patches better than rounds of RASA wherever both were tried. Whatever
    stands in the same place in all images (sky above ground) is position to every method: fit on flipped and turned
    crops where that is to stay. Only linear traces go. The fit depends on the scale of features; do not fit before a
    normalisation and apply after it.

    Source: catalogue entry ``franca``.

    Parameters
    ----------
    n_rounds : int, default=9
        Rounds of ``"rasa"``, at most.
    targets : {"row_col", "row", "cosine"} or callable, default="row_col"
        All coordinates, the first one, products of cosines up to ``order`` along each, or
        ``targets(positions (b, p) in [0, 1]) -> (b, t)``.
    order : int, default=3
        Highest number of half waves of ``"cosine"``: (order + 1)^p - 1 targets.
    solver : {"ridge", "sgd"}, default="ridge"
        Closed form, or the published training: mean squared error of a sigmoid without intercept, AdamW, a cosine of
        learning rates; slower and it removes less. For ``"rasa"``.
    alpha : float, default=1.0
        Ridge penalty, in rows: as if so many rows of noise with the features' mean variance had been added.
    orthogonal : bool, default=True
        Keep the rounds of ``"sgd"`` orthogonal. Without it, as published, later rounds put back some of what earlier
        ones removed, and the result is no projector.
    stop_r2 : float or None, default=0.02
        No further round of ``"rasa"`` once a share of at most this of the targets' variance is explained; directions of
        ``"leace"`` whose squared correlation with the targets is at most this stay. None removes all that is asked for.
    method : {"rasa", "leace", "position_mean"}, default="rasa"
    epochs, learning_rate : int and float, default=5 and 2e-4
        Passes and first step of ``"sgd"``.
    batch_rows : int, default=4096
        Patches in a step of ``"sgd"``.
    random_state : int, RandomState or None
        Of ``"sgd"``: first weights and order of rows.

    Attributes
    ----------
    projector_ : ndarray of shape (D, D)
        Features are mapped to ``x @ projector_.T + offset_``. Not with ``"position_mean"``.
    offset_ : ndarray of shape (D,)
        Zero for ``"rasa"``.
    basis_ : ndarray of shape (D, k)
        Orthonormal: the directions in which features are changed.
    r2_curve_ : ndarray of shape (rounds + 1,)
        Share of the targets' variance that ridge regression explains before the first round and after each, corrected
        for the number of features; negative by chance where nothing is left. For the other methods before and after,
        and NaN after ``"position_mean"``, whose result is not seen from sums.
    n_rounds_ : int
    position_means_ : ndarray of shape (n_positions, D)
        With ``"position_mean"``; ``positions_`` (n_positions, p) are theirs, and ``mean_`` (D,) is that of all.
    extent_ : ndarray of shape (2, p)
        Lowest and highest position of the fit.
    n_rows_seen_, n_features_in_ : int
    """

    def __init__(
        self,
        n_rounds=9,
        *,
        targets="row_col",
        order=3,
        solver="ridge",
        alpha=1.0,
        orthogonal=True,
        stop_r2=0.02,
        method="rasa",
        epochs=5,
        learning_rate=2e-4,
        batch_rows=4096,
        random_state=None,
    ):
        self.n_rounds = n_rounds
        self.targets = targets
        self.order = order
        self.solver = solver
        self.alpha = alpha
        self.orthogonal = orthogonal
        self.stop_r2 = stop_r2
        self.method = method
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_rows = batch_rows
        self.random_state = random_state

    def fit(self, X, y=None, *, positions=None, grid=None) -> "PositionalDisentangler":
        """Find what tells position.

        Parameters
        ----------
        X : array or tensor (B, h, w, D), (B, N, D) or (n, D), or path of such an array
            Features of patches without class and register tokens; files are mapped.
        y : array (n,) or (n, p), optional
            Another name for ``positions``.
        positions : array (n, p), (N, p) or (B, N, p), optional
            Where patches stand, in any unit; p = 1 for tokens of a text. Left out, the places of the grid.
        grid : (h, w), optional
            Of (B, N, D); left out, a square.

        Raises
        ------
        ValueError
            A parameter or the grid is wrong, positions or features are constant or not finite, there are fewer than 8
            images, or more directions would go than there are.
        """
        self._check_parameters()
        for name in ("_moments", "_sums", "n_features_in_", "feature_names_in_", *OF_ONE_METHOD):
            vars(self).pop(name, None)
        patches = self._patches(X, y, positions, grid, reset=True)
        if patches.n_images is not None and patches.n_images < LEAST_IMAGES:
            raise ValueError(f"X must hold at least {LEAST_IMAGES} images, got {patches.n_images}")
        self.extent_ = patches.extent
        self._gather(patches, self.extent_)
        self._finish(patches)
        return self

    @available_if(_takes_batches)
    def partial_fit(self, X, y=None, *, positions=None, grid=None) -> "PositionalDisentangler":
        """Add a batch of patches to the sums; grids may differ from batch to batch. Not for ``solver="sgd"``.

        After :meth:`fit` positions are in the unit of its own, and those of a grid shares of its sides, as ever. For
        targets that are not linear in positions they must lie within the lowest and highest of the fit, or without one
        in [0, 1]: a later batch could not change their scale.
        """
        self._check_parameters()
        first = not hasattr(self, "_moments") and not hasattr(self, "_sums")
        patches = self._patches(X, y, positions, grid, reset=first)
        low, high = patches.extent
        if first:
            self.extent_ = np.stack([np.zeros_like(low), np.ones_like(high)])
        extent = patches.extent if positions is None and y is None else self.extent_
        inside = unit_positions(patches.extent, extent)
        if self.targets not in ("row_col", "row") and (inside.min() < 0 or inside.max() > 1):
            least, most = self.extent_
            within = f"[{least.min():g}, {most.max():g}]"
            raise ValueError(f"positions must lie in {within} for partial_fit, got {low.min():g} to {high.max():g}")
        self._gather(patches, extent)
        self._finish(patches)
        return self

    def transform(self, X, *, positions=None, grid=None) -> np.ndarray:
        """Return features without position, in the shape of ``X``, in float64 for float64 and float32 otherwise.

        ``positions`` and ``grid`` are for ``method="position_mean"``, which refuses those that the fit has not seen.
        """
        check_is_fitted(self)
        X = as_array(X)
        X = X.astype(np.float32) if getattr(X, "dtype", None) == np.float16 else X
        shape = X.shape if getattr(X, "ndim", 2) > 2 else (-1,)
        if len(shape) > 2:
            rows = check_array(np.reshape(X, (-1, shape[-1])), dtype=FLOATS)
            if shape[-1] != self.n_features_in_:
                raise ValueError(f"X must have {self.n_features_in_} features, as in fit, got {shape[-1]}")
        else:
            rows = validate_data(self, X, reset=False, dtype=FLOATS)
            shape = rows.shape
        self._warn_of_norms(rows)
        if self.method == "position_mean":
            return self._less_means(rows, as_patches(np.reshape(rows, shape), positions, grid)).reshape(shape)
        left, right, centre = (part.astype(rows.dtype) for part in (self._left, self._right, self._centre))
        if 2 * left.shape[1] >= left.shape[0]:
            return (rows @ self.projector_.T.astype(rows.dtype) + self.offset_.astype(rows.dtype)).reshape(shape)
        # Two thin products instead of one with a D by D matrix.
        made = (rows @ right - centre @ right) @ left.T
        return np.subtract(rows, made, out=made).reshape(shape)

    def fit_transform(self, X, y=None, *, positions=None, grid=None, **fit_params) -> np.ndarray:
        """Fit, and return the features of ``X`` without position."""
        self.fit(X, y, positions=positions, grid=grid, **fit_params)
        return self.transform(X, positions=y if positions is None else positions, grid=grid)

    def as_module(self) -> Any:
        """Return the map as a frozen ``torch.nn.Linear`` on features (..., D)."""
        import torch

        self._check_linear()
        module = torch.nn.Linear(self.n_features_in_, self.n_features_in_)
        with torch.no_grad():
            module.weight.copy_(torch.as_tensor(self.projector_))
            module.bias.copy_(torch.as_tensor(self.offset_))
        return module.requires_grad_(False)

    def fold_into(self, model: Any, *, side: str = "output") -> Any:
        """Return a copy of a module that has the map in it: features cost nothing more to clean.

        A ``torch.nn.Linear`` that makes the features (``side="output"``) or takes them (``side="input"``) keeps its
        form. Of another module the last norm, called ``layernorm``, ``norm`` or ``post_layernorm``, is followed by the
        map, for all tokens alike.

        Raises
        ------
        ValueError
            The module has no such part, or its width is another.
        """
        import torch

        self._check_linear()
        if side not in ("output", "input"):
            raise ValueError(f"side must be 'output' or 'input', got {side!r}")
        d = self.n_features_in_
        made = copy.deepcopy(model)
        if isinstance(made, torch.nn.Linear):
            width = made.out_features if side == "output" else made.in_features
            if width != d:
                raise ValueError(f"model must have width {d} on its {side} side, got {width}")
            with torch.no_grad():
                P, offset = (torch.as_tensor(a).to(made.weight.device) for a in (self.projector_, self.offset_))
                W = made.weight.double()
                b = torch.zeros(made.out_features, dtype=W.dtype, device=W.device)
                b = b if made.bias is None else made.bias.double()
                W, b = (P @ W, P @ b + offset) if side == "output" else (W @ P, b + W @ offset)
                made.weight.copy_(W)
                if made.bias is None and bool((b != 0).any()):
                    made.bias = torch.nn.Parameter(b.to(made.weight.dtype))
                elif made.bias is not None:
                    made.bias.copy_(b)
            return made
        name = next((n for n in ("layernorm", "norm", "post_layernorm") if hasattr(made, n)), None)
        if name is None:
            raise ValueError(
                f"model must be a Linear or have layernorm, norm or post_layernorm, got {type(model).__name__}"
            )
        norm = getattr(made, name)
        like = next(iter(norm.parameters()), torch.zeros(d))
        if like.shape[-1] != d:
            raise ValueError(f"model must have features of width {d} after its {name}, got {like.shape[-1]}")
        setattr(made, name, torch.nn.Sequential(norm, self.as_module().to(like.device, like.dtype)))
        return made

    def save(self, path: Path | str, **about: Any) -> Path:
        """Write the map to one .safetensors file, atomically; ``about`` holds facts such as the model's name."""
        from polyspan.io import constructor_params, save_fitted

        check_is_fitted(self)
        if callable(self.targets):
            raise ValueError("targets must be named to be saved, got a function, which is code")
        init = constructor_params(self)
        facts = {name: getattr(self, name) for name in ("n_rounds_", "n_rows_seen_", "n_features_in_", "_unit")}
        facts["names"] = [str(name) for name in getattr(self, "feature_names_in_", ())]
        arrays = {name: getattr(self, name) for name in self._stored(self.method)}
        curve = [None if np.isnan(r) else float(r) for r in self.r2_curve_]
        params = {"init": init, "facts": facts, "curve": curve}
        return save_fitted(Path(path), kind=type(self).__name__, arrays=arrays, params=params, about=about)

    @classmethod
    def load(cls, path: Path | str) -> "PositionalDisentangler":
        """Read what :meth:`save` wrote; it transforms as before, and ``partial_fit`` starts anew.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds another class.
        """
        from polyspan.io import load_fitted

        found = load_fitted(Path(path), kind=cls.__name__)
        made = cls(**found.params["init"])
        facts = dict(found.params["facts"])
        names = facts.pop("names")
        if names:
            vars(made)["feature_names_in_"] = np.array(names, dtype=object)
        for name, value in facts.items():
            setattr(made, name, value)
        for name in cls._stored(made.method):
            setattr(made, name, np.array(found.arrays[name]))
        made.r2_curve_ = np.array([np.nan if r is None else r for r in found.params["curve"]])
        return made

    @staticmethod
    def _stored(method: str) -> tuple[str, ...]:
        if method == "position_mean":
            return ("position_means_", "positions_", "mean_", "extent_")
        return ("projector_", "offset_", "basis_", "extent_", "_left", "_right", "_centre")

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = tags.target_tags.multi_output = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _is_sgd(self) -> bool:
        return self.method == "rasa" and self.solver == "sgd"

    def _check_parameters(self) -> None:
        for name, least in (("n_rounds", 1), ("order", 1), ("epochs", 1), ("batch_rows", 1)):
            value = getattr(self, name)
            if not (isinstance(value, int | np.integer) and value >= least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name, among in (("method", METHODS), ("solver", SOLVERS)):
            if getattr(self, name) not in among:
                raise ValueError(f"{name} must be one of {among}, got {getattr(self, name)!r}")
        if not callable(self.targets) and self.targets not in TARGETS:
            raise ValueError(f"targets must be one of {TARGETS} or callable, got {self.targets!r}")
        if not 0 <= self.alpha < np.inf:
            raise ValueError(f"alpha must be finite and at least 0, got {self.alpha!r}")
        if not 0 < self.learning_rate < np.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate!r}")
        if self.stop_r2 is not None and not 0 <= self.stop_r2 < 1:
            raise ValueError(f"stop_r2 must lie in [0, 1) or be None, got {self.stop_r2!r}")

    def _check_linear(self) -> None:
        check_is_fitted(self)
        if self.method == "position_mean":
            raise ValueError("method must be 'rasa' or 'leace' for one linear map, got 'position_mean'")

    def _patches(self, X: Any, y: Any, positions: Any, grid: Any, *, reset: bool) -> Patches:
        positions = y if positions is None else positions
        X = as_array(X)
        if getattr(X, "ndim", 2) > 2:
            width = X.shape[-1]
            if reset:
                self.n_features_in_ = width
            elif width != self.n_features_in_:
                raise ValueError(f"X must have {self.n_features_in_} features, as before, got {width}")
        else:
            X = validate_data(self, X, reset=reset, dtype=FLOATS, ensure_min_samples=2)
        patches = as_patches(X, positions, grid)
        if not reset and hasattr(self, "extent_") and patches.positions.shape[-1] != self.extent_.shape[1]:
            raise ValueError(
                f"positions must have {self.extent_.shape[1]} coordinates, as before, got {patches.positions.shape[-1]}"
            )
        return patches

    def _gather(self, patches: Patches, extent: np.ndarray) -> None:
        """Add the sums of all rows to those that are there; ``extent`` (2, p) is the unit of their positions."""
        make = make_targets(self.targets, int(self.order))
        for number, (rows, places) in enumerate(patches.blocks()):
            if number == 0:
                lengths = np.linalg.norm(rows[:256], axis=1)
                self._unit = bool(np.all(np.abs(lengths - 1) < 1e-3))
            where = unit_positions(places, extent)
            if self.method == "position_mean":
                self._add_means(rows, where)
            t = np.asarray(make(where), dtype=np.float64)
            if t.ndim != 2 or len(t) != len(rows) or not np.isfinite(t).all():
                raise ValueError(f"targets must give finite numbers ({len(rows)}, t), got shape {t.shape}")
            if not hasattr(self, "_moments"):
                self._moments = PairedMoments(patches.width, t.shape[1])
            self._moments.update(rows, t)

    def _add_means(self, rows: np.ndarray, where: np.ndarray) -> None:
        if not hasattr(self, "_sums"):
            self._sums: dict[tuple[float, ...], list[Any]] = {}
        found, inverse = np.unique(np.round(where, 9), axis=0, return_inverse=True)
        counts = np.bincount(inverse.ravel(), minlength=len(found))
        sums = np.zeros((len(found), rows.shape[1]))
        np.add.at(sums, inverse.ravel(), rows)
        for key, total, count in zip(map(tuple, found), sums, counts, strict=True):
            entry = self._sums.setdefault(key, [0.0, 0])
            entry[0], entry[1] = entry[0] + total, entry[1] + int(count)

    def _finish(self, patches: Patches) -> None:
        """Make the map out of the sums."""
        moments = self._moments
        self.n_rows_seen_ = moments.n_rows
        spread = np.diag(moments.cov_out)
        # Positions may be equal along one side of the grid, but not along all.
        if not (spread > 1e-12 * moments.weight).any():
            raise ValueError("positions must differ, got the same one for all rows")
        scale = np.trace(moments.cov_in)
        if not scale > 1e-24 * moments.weight * max(float(np.square(moments.mean_in).sum()), 1e-300):
            raise ValueError("X must hold rows that differ, got constant features")
        if self.method == "position_mean":
            self._finish_means()
            return
        t, d = moments.cross.shape[1], moments.cross.shape[0]
        removed = t * int(self.n_rounds) if self.method == "rasa" else t
        if removed > d:
            what = f"n_rounds={self.n_rounds} times {t} targets need"
            if self.method != "rasa":
                what = f"{t} targets of order={self.order} need" if self.targets == "cosine" else f"{t} targets need"
            raise ValueError(f"{what} at least as many features, got n_features={d}")
        shared: dict[str, Any] = {"alpha": float(self.alpha), "stop": self.stop_r2}
        if self.method == "leace":
            self._keep(leace(moments, **shared))
        elif not self._is_sgd():
            self._keep(ridge_rounds(moments, n_rounds=int(self.n_rounds), **shared))
        else:
            make = make_targets(self.targets, int(self.order))
            found = sgd_rounds(
                moments,
                ((rows, make(unit_positions(where, self.extent_))) for rows, where in patches.blocks()),
                n_rounds=int(self.n_rounds),
                orthogonal=bool(self.orthogonal),
                epochs=int(self.epochs),
                learning_rate=float(self.learning_rate),
                batch_rows=int(self.batch_rows),
                seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
                **shared,
            )
            self._keep(found)

    def _keep(self, made: Erasure) -> None:
        self.projector_, self.offset_, self._left, self._right, self._centre, curve = made
        self.basis_ = np.linalg.qr(self._left)[0] if self._left.shape[1] else self._left
        self.r2_curve_, self.n_rounds_ = np.array(curve), len(curve) - 1

    def _finish_means(self) -> None:
        keys = sorted(self._sums)
        self.positions_ = np.array(keys)
        self.position_means_ = np.stack([self._sums[key][0] / self._sums[key][1] for key in keys])
        self.mean_ = self._moments.mean_in.copy()
        m = self._moments
        before = explained(m, m.cov_in, m.cross, len(m.mean_in), float(self.alpha))
        self.r2_curve_, self.n_rounds_ = np.array([before, np.nan]), 1

    def _less_means(self, rows: np.ndarray, patches: Patches) -> np.ndarray:
        index = {tuple(key): number for number, key in enumerate(self.positions_)}
        made, start = np.empty_like(rows), 0
        for part, where in patches.blocks():
            at = np.round(unit_positions(where, self.extent_), 9)
            known = [index.get(key, -1) for key in map(tuple, at)]
            if -1 in known:
                strange = at[known.index(-1)].tolist()
                raise ValueError(f"positions must be among those of the fit for 'position_mean', got {strange}")
            means = self.position_means_[known] - self.mean_
            made[start : start + len(part)] = part - means.astype(rows.dtype)
            start += len(part)
        return made

    def _warn_of_norms(self, rows: np.ndarray) -> None:
        if not self._unit and bool(np.all(np.abs(np.linalg.norm(rows[:256], axis=1) - 1) < 1e-3)):
            warnings.warn("rows of X have length 1, those of the fit had not: the map is for the others", stacklevel=3)


def position_r2(X: Any, positions: Any = None, *, grid: Any = None, alpha: float = 1.0, random_state: Any = 0) -> float:
    """Measure how well a ridge regression tells position from features: R² on images that it has not seen.

    One half of the images, or of loose rows, trains, the other tests, and the other way round. 1 is exact, 0 is nothing
    and below 0 worse than the mean.

    Parameters
    ----------
    X, positions, grid
        As :meth:`PositionalDisentangler.fit` takes them.
    alpha : float
        As there.
    random_state : int, RandomState or None
        Of the halves.

    Raises
    ------
    ValueError
        X or positions are wrong as there, or there are fewer than 2 images.
    """
    X = as_array(X)
    patches = as_patches(np.asarray(X), positions, grid)
    units = patches.n_images or patches.n_rows
    if units < 2:
        raise ValueError(f"X must hold at least 2 images or rows, got {units}")
    per = patches.n_rows // units
    second = np.zeros(units, dtype=bool)
    second[check_random_state(random_state).permutation(units)[units // 2 :]] = True
    row = np.repeat(second, per)
    make = make_targets("row_col", 1)
    blocks = [(rows, make(unit_positions(where, patches.extent))) for rows, where in patches.blocks()]
    rows, t = np.concatenate([r for r, _ in blocks]), np.concatenate([w for _, w in blocks])
    scores = []
    for train in (row, ~row):
        moments = PairedMoments(patches.width, t.shape[1]).update(rows[train], t[train])
        fitted = ridge_from_moments(moments, alpha=penalty(moments, alpha))
        told = (rows[~train] - fitted.mean_in) @ fitted.weights + fitted.mean_out
        off = t[~train] - t[~train].mean(axis=0)
        total = np.square(off).sum()
        if not total > 0:
            raise ValueError("positions must differ, got the same one for all rows")
        scores.append(1 - np.square(told - t[~train]).sum() / total)
    return float(np.mean(scores))
