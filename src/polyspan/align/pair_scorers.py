"""Other ways to compare rows of two spaces by paired anchors: what canonical subspaces are measured against."""

from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data

from polyspan.errors import NotConverged
from polyspan.io import load_fitted, save_fitted
from polyspan.linalg import PairedMoments, cca_from_moments, ridge_from_moments
from polyspan.run import pick_device

from ._checks import check_count, check_kind, check_number, check_squares
from ._pair_matching import PairMatching, row_marks, unit_rows
from .canonical_correlation import FLOATS, checked_rows
from .local_alignment import median_bandwidth, squared_distances

KERNELS = ("rbf", "linear")
ROUTES = ("affine", "cca")
FACTS = ("n_anchors_", "n_features_in_", "_n_features_out", "_width_y")


class PairScorer(PairMatching, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What these scorers share; a subclass defines ``_fit_pairs`` and ``_coordinates``, of means taken away or not.

    Its fit leaves in ``_sides``, for either view, the arrays and numbers that coordinates are made of. It names in
    ``_arrays`` and ``_facts`` the fitted arrays and numbers that people read: all of them make it up on disk.

    ``fit(X, y)`` takes anchors: row i of ``X`` (n, d_A) and row i of ``y`` (n, d_B) are two views of one item. As with
    :class:`SubspaceAligner`, ``transform_x`` and ``transform_y`` give coordinates (m, k) of either view, and
    ``similarity``, ``match`` and ``retrieve`` compare them by cosine. ``transform`` is ``transform_x``.
    """

    _fit_is_abstract = True
    _arrays: tuple[str, ...] = ()
    _facts: tuple[str, ...] = ()
    _sides: list[tuple[Any, ...]]
    n_anchors_: int
    n_features_in_: int
    _n_features_out: int
    _width_y: int

    def fit(self, X, y) -> "PairScorer":
        """Fit on anchors ``X`` (n, d_A) and ``y`` (n, d_B).

        Raises
        ------
        ValueError
            Row counts differ, fewer than two anchors, a value is not finite or its square would not be, a view is
            constant, or a parameter is out of its range.
        """
        check_kind(X, "X")
        check_kind(y, "y")
        X, Y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        Y = Y.reshape(len(Y), -1).astype(np.float64)
        if len(X) < 2:
            raise ValueError(f"{type(self).__name__} needs at least 2 anchors, got {len(X)} sample")
        for name, rows in (("X", X), ("y", Y)):
            check_squares(rows, name)
            if not np.ptp(rows, axis=0).any():
                raise ValueError(f"{name} must vary from row to row, got a constant view")
        self.n_anchors_, self._width_y = len(X), Y.shape[1]
        self.anchor_marks_ = np.sort(row_marks(X))
        self._fit_pairs(X, Y)
        return self

    def _fit_pairs(self, X: np.ndarray, Y: np.ndarray) -> None:
        raise NotImplementedError

    def _coordinates(self, rows: np.ndarray, view: int) -> np.ndarray:
        raise NotImplementedError

    def _directions(self, X: np.ndarray, name: str = "X") -> np.ndarray:
        return X

    def transform(self, X) -> np.ndarray:
        """Return coordinates (m, k) of rows of the first space, in their own float width."""
        return self.transform_x(X)

    def transform_x(self, X) -> np.ndarray:
        """Return coordinates (m, k) of rows of the first space, in their own float width."""
        check_is_fitted(self)
        return self._coordinates(validate_data(self, X, reset=False, dtype=FLOATS), 0)

    def transform_y(self, Y) -> np.ndarray:
        """Return coordinates (m, k) of rows of the second space, in their own float width."""
        check_is_fitted(self)
        return self._coordinates(checked_rows(Y, "y", self._width_y), 1)

    def save(self, path: Path | str, **about: Any) -> Path:
        """Write the fitted scorer to one .safetensors file, atomically; ``about`` holds facts such as model names."""
        check_is_fitted(self)
        arrays = {name: getattr(self, name) for name in ("anchor_marks_", *self._arrays) if hasattr(self, name)}
        for view, side in enumerate(self._sides):
            arrays |= {f"side_{view}_{place}": np.asarray(part) for place, part in enumerate(side)}
        facts = {name: getattr(self, name) for name in (*FACTS, *self._facts)}
        params = {"init": self.get_params(), "facts": facts}
        return save_fitted(Path(path), kind=type(self).__name__, arrays=arrays, params=params, about=about)

    @classmethod
    def load(cls, path: Path | str) -> "PairScorer":
        """Read a scorer that :meth:`save` wrote.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds another class.
        """
        found = load_fitted(Path(path), kind=cls.__name__)
        made = cls(**found.params["init"])
        for name, value in found.params["facts"].items():
            setattr(made, name, value)
        sides: tuple[list[Any], list[Any]] = [], []
        places = sorted(name for name in found.arrays if name.startswith("side_"))
        for name in places:
            part = np.asarray(found.arrays[name])
            sides[int(name.split("_")[1])].append(part if part.ndim else part.item())
        made._sides = [tuple(side) for side in sides]
        for name in set(found.arrays) - set(places):
            setattr(made, name, np.asarray(found.arrays[name]))
        return made

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = tags.target_tags.multi_output = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _white(rows: np.ndarray, mean: np.ndarray, basis: np.ndarray) -> np.ndarray:
    return (rows - mean.astype(rows.dtype)) @ basis.astype(rows.dtype)


class RelativeRepresentation(PairScorer):
    """Describe every row by its cosines to reference anchors: nothing is fitted but their places.

    Rows and references are taken about the anchors' mean, and the cosines to each reference are brought to mean 0 and
    deviation 1 over the anchors, so that no reference counts for more than another. References are anchors at even
    distances.
    Source: Moschella et al., "Relative Representations Enable Zero-Shot Latent Space Communication", 2023, who neither
    centre nor scale; a baseline of catalogue entry ``plato-3d``.

    Parameters
    ----------
    n_references : int, default=300
        Their number k; all anchors where they are fewer.

    Attributes
    ----------
    references_ : ndarray of k ints
        Rows of the anchors.
    n_anchors_ : int
    """

    _arrays = ("references_",)

    def __init__(self, n_references=300):
        self.n_references = n_references

    def _fit_pairs(self, X, Y) -> None:
        check_count("n_references", self.n_references)
        last = len(X) - 1
        self.references_ = np.unique(np.linspace(0, last, min(self.n_references, len(X))).astype(int))
        self._n_features_out = len(self.references_)
        self._sides = []
        for rows in (X, Y):
            mean = rows.mean(axis=0)
            places = unit_rows(rows[self.references_] - mean)
            known = unit_rows(rows - mean) @ places.T
            spread = known.std(axis=0)
            self._sides.append((mean, places, known.mean(axis=0), np.where(spread > 0, spread, 1.0)))

    def _coordinates(self, rows, view):
        mean, places, middle, spread = (part.astype(rows.dtype) for part in self._sides[view])
        return (unit_rows(rows - mean) @ places.T - middle) / spread


class PrincipalSubspaceAligner(PairScorer):
    """Keep the principal directions of each space alone, whitened, and join them afterwards: is a small space enough?

    - ``route="affine"``: a ridge map of the first view's components to the second's, compared by cosine;
    - ``route="cca"``: canonical correlation of the components (SVCCA), and the map by its correlations.

    Directions that are loud are kept, shared or not: where the shared ones are quiet it finds little.
    Source: Raghu et al., "SVCCA", 2017; baselines of catalogue entry ``plato-3d``.

    Parameters
    ----------
    n_components : int or float, default=50
        Principal components of each view, at most its rank; a float in (0, 1] keeps so large a share of its variance.
    route : {"affine", "cca"}, default="affine"
    reg : float, default=1e-2
        Ridge of the map or of the canonical correlation, as a share of the mean variance.

    Attributes
    ----------
    n_components_ : list of two ints
        Components that were kept of each view.
    correlations_ : ndarray of shape (k,)
        Of route ``"cca"``.
    n_anchors_ : int
    """

    _arrays = ("correlations_",)
    _facts = ("n_components_",)
    correlations_: np.ndarray

    def __init__(self, n_components: Any = 50, *, route="affine", reg: Any = 1e-2):
        self.n_components = n_components
        self.route = route
        self.reg = reg

    def _fit_pairs(self, X, Y) -> None:
        if self.route not in ROUTES:
            raise ValueError(f"route must be one of {ROUTES}, got {self.route!r}")
        check_number("reg", self.reg)
        k = self.n_components
        if isinstance(k, Integral) and not isinstance(k, bool):
            check_count("n_components", k)
        elif not (isinstance(k, Real) and not isinstance(k, bool) and 0 < k <= 1):
            raise ValueError(f"n_components must be a whole number or a share in (0, 1], got {k!r}")
        sides = [self._principal(rows) for rows in (X, Y)]
        self.n_components_ = [basis.shape[1] for _, basis in sides]
        parts = [_white(rows, *side) for rows, side in zip((X, Y), sides, strict=True)]
        moments = PairedMoments(*self.n_components_).update(*parts)
        if self.route == "affine":
            links = ridge_from_moments(moments, alpha=self.reg * len(X)).weights, np.eye(self.n_components_[1])
        else:
            found = cca_from_moments(moments, reg=self.reg)
            self.correlations_ = found.correlations
            links = found.weights_in * found.correlations, found.weights_out
        self._sides = [(*side, link) for side, link in zip(sides, links, strict=True)]
        self._n_features_out = links[0].shape[1]

    def _principal(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the whitening basis (d, k) of the leading components."""
        mean = rows.mean(axis=0)
        centred = rows - mean
        values, V = np.linalg.eigh(centred.T @ centred / len(rows))
        values, V = np.maximum(values[::-1], 0), V[:, ::-1]
        rank = int(np.sum(values > len(values) * np.finfo(np.float64).eps * values[0]))
        if isinstance(self.n_components, Integral):
            k = min(int(self.n_components), rank)
        else:
            shares = np.cumsum(values) / np.sum(values)
            k = min(int(np.searchsorted(shares, self.n_components - 1e-12)) + 1, rank)
        return mean, V[:, :k] / np.sqrt(values[:k])

    def _coordinates(self, rows, view):
        mean, basis, link = self._sides[view]
        return _white(rows, mean, basis) @ link.astype(rows.dtype)


class KernelCanonicalCorrelation(PairScorer):
    r"""Find functions of two views that correlate, linear ones only in the feature space of a kernel.

    With centred kernels K and L of the anchors, coefficients of the functions solve
    :math:`L\beta = \rho (K + n\gamma_x I)\alpha` and :math:`K\alpha = \rho (L + n\gamma_y I)\beta`, with
    :math:`\gamma` being ``reg`` times the view's total variance in feature space. Without a ridge any two views
    correlate perfectly: it decides all, so choose it on anchors held back. Solved by canonical correlation of explicit
    features that reproduce the kernel: exact up to ``n_landmarks`` anchors, in time of n cubed; with more, the kernel
    is Nyström's on so many anchors drawn at random.
    Scores are cosines of :math:`\rho a` and b, as the affine route of :class:`SubspaceAligner`.
    Source: Hardoon, Szedmak and Shawe-Taylor, "Canonical Correlation Analysis: An Overview with Application to Learning
    Methods", 2004; a baseline of catalogue entry ``plato-3d``.

    Parameters
    ----------
    n_components : int, default=20
        Pairs of functions k, at most what the kernels' ranks allow.
    kernel : {"rbf", "linear"}, default="rbf"
        ``"rbf"``: :math:`\exp(-d^2/(2\sigma^2))`, σ² the median of the squared distances among the anchors.
    reg : float, default=1e-3
        Above 0.
    n_landmarks : int, default=2000
    random_state : int, RandomState instance or None, default=0
        Which anchors are landmarks.

    Attributes
    ----------
    correlations_ : ndarray of shape (k,)
        In [0, 1], descending, shrunk by the ridge.
    landmarks_ : ndarray of ints
        Rows of the anchors.
    bandwidths_ : list of two floats
        σ of either view; 0 for the linear kernel.
    n_anchors_ : int
    """

    _arrays = ("correlations_", "landmarks_")
    _facts = ("bandwidths_",)

    def __init__(self, n_components=20, *, kernel="rbf", reg: Any = 1e-3, n_landmarks=2000, random_state=0):
        self.n_components = n_components
        self.kernel = kernel
        self.reg = reg
        self.n_landmarks = n_landmarks
        self.random_state = random_state

    def _fit_pairs(self, X, Y) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {KERNELS}, got {self.kernel!r}")
        check_number("reg", self.reg, positive=True)
        check_count("n_components", self.n_components)
        check_count("n_landmarks", self.n_landmarks, 2)
        rows = np.arange(len(X))
        if len(X) > self.n_landmarks:
            rows = np.sort(check_random_state(self.random_state).permutation(len(X))[: self.n_landmarks])
        self.landmarks_ = rows
        rbf = self.kernel == "rbf"
        self.bandwidths_ = [float(median_bandwidth(A, name)) if rbf else 0.0 for A, name in ((X, "X"), (Y, "y"))]
        sides = [self._features(A[rows], sigma) for A, sigma in zip((X, Y), self.bandwidths_, strict=True)]
        parts = [_raw(A, *side) for A, side in zip((X, Y), sides, strict=True)]
        moments = PairedMoments(parts[0].shape[1], parts[1].shape[1]).update(*parts)
        roots = []
        for cov in (moments.cov_in, moments.cov_out):
            # Features are centred at random points where there are landmarks; their covariance is full then.
            values, V = np.linalg.eigh(cov / moments.weight)
            total = float(np.sum(values))
            if not total > 0:
                raise ValueError("X and y must vary at the landmarks, got a view that is constant there")
            roots.append((V / np.sqrt(np.maximum(values, 0) + self.reg * total)) @ V.T)
        U, values, Vt = np.linalg.svd(roots[0] @ (moments.cross / moments.weight) @ roots[1], full_matrices=False)
        k = min(self.n_components, len(values))
        self.correlations_ = values[:k]
        links = roots[0] @ U[:, :k] * values[:k], roots[1] @ Vt[:k].T
        means = moments.mean_in, moments.mean_out
        self._sides = [(*side, mean, link) for side, mean, link in zip(sides, means, links, strict=True)]
        self._n_features_out = k

    def _features(self, landmarks: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Return landmarks, the map of kernel values at them to explicit features (m, r), and σ."""
        values, V = np.linalg.eigh(_kernel(landmarks, landmarks, sigma))
        kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
        return landmarks, V[:, kept] / np.sqrt(values[kept]), sigma

    def _coordinates(self, rows, view):
        landmarks, basis, sigma, mean, link = self._sides[view]
        return ((_raw(rows, landmarks, basis, sigma) - mean) @ link).astype(rows.dtype)


def _raw(rows: np.ndarray, landmarks: np.ndarray, basis: np.ndarray, sigma: float) -> np.ndarray:
    return _kernel(rows.astype(np.float64), landmarks, sigma) @ basis


def _kernel(A: np.ndarray, B: np.ndarray, sigma: float) -> np.ndarray:
    return A @ B.T if sigma == 0 else np.exp(squared_distances(A, B) / (-2 * sigma**2))


class ContrastiveProjections(PairScorer):
    """Train a linear projection of each space so that partners find each other in a batch: what training can reach.

    Both projections of rows of mean 0 and deviation 1 a feature are trained by AdamW on the symmetric cross-entropy
    from the softmax of scaled cosines to the partner (InfoNCE); the scale is learnt too, at most 100. No closed form:
    its result depends on the seed, the batch and the epochs, and on few anchors it learns them by heart.
    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, the loss; a
    reference of catalogue entry ``plato-3d``.

    Parameters
    ----------
    n_components : int, default=64
        Dimension k of the projections.
    max_iter : int, default=30
        Epochs.
    batch_size : int, default=256
    learning_rate : float, default=2e-3
    weight_decay : float, default=1e-2
    random_state : int, RandomState instance or None, default=0
    device : str, default="auto"

    Attributes
    ----------
    history_ : list of float
        Mean loss of every epoch.
    scale_ : float
        What cosines are multiplied by at the end.
    n_iter_ : int
    n_anchors_ : int
    """

    _facts = ("history_", "scale_", "n_iter_")

    def __init__(
        self,
        n_components=64,
        *,
        max_iter=30,
        batch_size=256,
        learning_rate=2e-3,
        weight_decay=1e-2,
        random_state=0,
        device="auto",
    ):
        self.n_components = n_components
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.random_state = random_state
        self.device = device

    def _fit_pairs(self, X, Y) -> None:
        import torch
        from torch.nn import functional as F

        for name, least in (("n_components", 1), ("max_iter", 1), ("batch_size", 2)):
            check_count(name, getattr(self, name), least)
        check_number("learning_rate", self.learning_rate, positive=True)
        check_number("weight_decay", self.weight_decay)
        device = pick_device(self.device)
        generator = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
        sides, norms, maps = [], [], []
        for rows in (X, Y):
            mean, spread = rows.mean(axis=0), rows.std(axis=0)
            spread = np.where(spread > 0, spread, 1.0)
            norms.append((mean, spread))
            sides.append(torch.as_tensor((rows - mean) / spread, dtype=torch.float32, device=device))
            drawn = torch.randn(rows.shape[1], self.n_components, generator=generator) / rows.shape[1] ** 0.5
            maps.append(drawn.to(device).requires_grad_())
        scale = torch.tensor(np.log(1 / 0.07), dtype=torch.float32, device=device, requires_grad=True)
        optimiser = torch.optim.AdamW([*maps, scale], lr=self.learning_rate, weight_decay=self.weight_decay)
        self.history_ = []
        for _ in range(self.max_iter):
            sums, seen = 0.0, 0
            for rows in torch.randperm(len(X), generator=generator).split(self.batch_size):
                left, right = (
                    F.normalize(side[rows.to(device)] @ W, eps=1e-6) for side, W in zip(sides, maps, strict=True)
                )
                logits, twins = left @ right.T * scale.exp().clamp(max=100), torch.arange(len(rows), device=device)
                loss = (F.cross_entropy(logits, twins) + F.cross_entropy(logits.T, twins)) / 2
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                sums, seen = sums + float(loss.detach()) * len(rows), seen + len(rows)
            self.history_.append(sums / seen)
            if not np.isfinite(sums):
                raise NotConverged(
                    f"the loss is no longer finite after {len(self.history_) - 1} epochs; try a learning_rate below "
                    f"{self.learning_rate:g}"
                )
        self.n_iter_ = len(self.history_)
        self.scale_ = float(scale.detach().exp().clamp(max=100))
        self._sides = [
            (mean, W.detach().double().cpu().numpy() / spread[:, None])
            for (mean, spread), W in zip(norms, maps, strict=True)
        ]
        self._n_features_out = self.n_components

    def _coordinates(self, rows, view):
        return _white(rows, *self._sides[view])

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags
