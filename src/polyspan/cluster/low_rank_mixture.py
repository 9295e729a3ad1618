"""Mixture of low-rank Gaussians: clusters that are subspaces, with densities, sampling and denoising."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logsumexp
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from polyspan.errors import WrongContent
from polyspan.linalg import fix_signs

from ._affinity import check_numbers
from ._low_rank_checks import check_parameters, check_parts, is_whole
from ._low_rank_fit import (
    Parts,
    Rules,
    common_rank,
    expectation_maximisation,
    log_memberships,
    one_hot,
    outside_energy,
    rank_list,
    row_blocks,
)
from ._low_rank_search import (
    START_ROWS,
    Search,
    k_means,
    search_denoising,
    search_em,
    search_k_subspaces,
    some_rows,
)
from ._low_rank_stream import add, begin, memberships, summed_parts

ALGORITHMS = {"em": search_em, "ksubspaces": search_k_subspaces, "denoising": search_denoising}
FLOATS = [np.float64, np.float32]
AUTO_SHARE, FEW = 0.9, 1.5
ARRAYS = ("bases_", "spectra_", "means_", "weights_", "noise_variance_")


class LowRankGaussianMixture(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):
    r"""Cluster rows by the low-dimensional subspaces that they lie near, with a density for every row.

    :math:`x \sim \sum_k \pi_k N(\mu_k, U_k\Lambda_kU_k^\top + a_kI)` with orthonormal :math:`U_k` of shape (D, d), the
    model under which a diffusion model's training is subspace clustering. Three ways to fit it:

    - ``"em"``: most likely parameters by expectation maximisation, one weighted PCA a component and round.
    - ``"ksubspaces"``: least distance to the nearest subspace, in turns of assignment and PCA. It is what the diffusion
      loss comes to where weights are hard.
    - ``"denoising"``: gradient descent on the diffusion loss of the mixture's own denoiser, weights soft. It shows that
      the loss finds the same subspaces; the other two find them sooner. Spectra and the white variance belong to rows
      whose noise is small.

    A component needs more rows than it has dimensions: with fewer no method finds its subspace, just above it all do
    where rows are clean, and with noise the error falls off smoothly (``samples_per_dimension_``, and
    :func:`sample_sufficiency` for your own rows). The three objectives have many local optima: starts matter more than
    rounds. Subspaces that are nested, or rows whose groups are compact blobs off any common subspace, are not what
    this is for; a variance that falls off slowly fits no rank well. New rows so large that a squared length over the
    white variance overflows, beyond about 1e150 times its root, are a ``ValueError`` in every method.

    Source: catalogue entry ``diffusion-subspace``.

    Parameters
    ----------
    n_components : int, default=1
        K.
    rank : int, sequence of K ints, "auto" or "bic", default="auto"
        Dimension d of the subspaces, between 1 and D - 1. ``"auto"`` takes the median over k-means groups of the
        directions that hold 90 % of a group's variance, at most so many that a group has 1.5 rows a dimension;
        ``"bic"`` fits 1, 2, 3, 4, 6, 8, 12 and so on by EM and takes the rank of the least BIC.
    algorithm : {"em", "ksubspaces", "denoising"}, default="em"
    center : bool, default=True
        Give every component a mean; otherwise all subspaces go through the origin.
    spectrum : {"free", "identity"}, default="free"
        Whether variances along the subspaces are fitted, or all the same.
    noise : "isotropic" or float, default="isotropic"
        Fit a white variance for each component, or take this standard deviation of a coordinate for all.
    n_init : int, default=20
        Starts. They are compared after 5 rounds of EM, after all rounds of K-subspaces or after training, on 10,000
        rows at most; the best is finished on all.
    init : {"kmeans", "random", "ssc"}, default="kmeans"
        Where starts come from: k-means, every second followed by K-subspaces; K-subspaces from random bases; or
        orthogonal matching pursuit, one start on 4,000 rows at most.
    max_iter : int, default=200
        Rounds of EM or K-subspaces; three gradient steps count as one.
    tol : float, default=1e-4
        EM ends when a round adds less to the mean log-likelihood, in nats a feature.
    reg : float, default=1e-3
        Least white variance, as a share of the mean variance of a coordinate.
    verbose : bool or int, default=0
        Show progress of training on stderr.
    random_state : int, RandomState or None

    Attributes
    ----------
    bases_ : ndarray of shape (K, D, d)
        Orthonormal, by falling variance, signs fixed; zeros in the last columns of components of lower rank.
    spectra_ : ndarray of shape (K, d)
        Variances along the columns beyond the white one.
    means_ : ndarray of shape (K, D)
    weights_ : ndarray of shape (K,)
    noise_variance_ : ndarray of shape (K,)
        White variance a of a coordinate.
    at_floor_ : ndarray of shape (K,), bool
        Where ``reg`` set the white variance, as for rows without noise or columns that are constant.
    labels_ : ndarray of shape (n,)
    ranks_ : ndarray of shape (K,)
    samples_per_dimension_ : ndarray of shape (K,)
        Rows of a component over its rank.
    lower_bound_ : float
        EM: mean log-likelihood of a row in nats. K-subspaces: share of the squared distances from the mean (from the
        origin without ``center``) that lies in the subspaces. Denoising: minus the loss.
    restarts_objective_ : ndarray of shape (starts,)
        The same, where starts were compared.
    converged_ : bool
    n_iter_ : int
    n_reseeded_ : int
        Times that an empty component was given the rows that fitted worst.
    loss_curve_ : ndarray of shape (steps,)
        Denoising: the loss of the best start at each step.
    n_features_in_ : int
    """

    bases_: np.ndarray
    spectra_: np.ndarray
    means_: np.ndarray
    weights_: np.ndarray
    noise_variance_: np.ndarray
    labels_: np.ndarray
    ranks_: np.ndarray
    n_features_in_: int

    def __init__(
        self,
        n_components=1,
        rank="auto",
        *,
        algorithm="em",
        center=True,
        spectrum="free",
        noise="isotropic",
        n_init=20,
        init="kmeans",
        max_iter=200,
        tol=1e-4,
        reg=1e-3,
        verbose=0,
        random_state=None,
    ):
        self.n_components = n_components
        self.rank = rank
        self.algorithm = algorithm
        self.center = center
        self.spectrum = spectrum
        self.noise = noise
        self.n_init = n_init
        self.init = init
        self.max_iter = max_iter
        self.tol = tol
        self.reg = reg
        self.verbose = verbose
        self.random_state = random_state

    def fit(self, X, y=None) -> "LowRankGaussianMixture":
        """Fit the mixture to the rows of ``X`` (n, D); ``y`` is ignored. A memory map is read block by block.

        Raises
        ------
        ValueError
            A parameter is out of range, a value is not finite, or by EM a component has no more rows than its rank.

        Warns
        -----
        UserWarning
            A component has fewer than 1.5 rows a dimension, or the mean is most of what subspaces through the origin
            would hold.
        ConvergenceWarning
            ``max_iter`` came first.
        """
        check_numbers(X)
        X = validate_data(self, X, dtype=FLOATS, ensure_min_samples=2, ensure_min_features=2)
        check_parameters(self, X.shape)
        vars(self).pop("loss_curve_", None)
        search = self._search(X)
        self._warn_of_the_mean()
        found = ALGORITHMS[self.algorithm](X, search)
        fit = found.fit
        self._keep(fit.parts, search.rules)
        self.restarts_objective_ = found.objectives
        if found.history is not None:
            self.loss_curve_ = found.history
        self.lower_bound_, self.converged_ = fit.objective, fit.settled
        self.n_iter_, self.n_reseeded_ = fit.rounds, fit.reseeded
        # Memberships of a fit that settled are those of its last parts.
        self.labels_ = fit.memberships.argmax(axis=1) if fit.settled else self._labels(X)
        self._sums = None
        self._judge_counts()
        if not fit.settled:
            warnings.warn(
                f"{self.algorithm} did not settle in max_iter={self.max_iter}; raise it, or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def fit_predict(self, X, y=None, **kwargs) -> np.ndarray:
        """Fit, and return the component of each row, (n,)."""
        return self.fit(X, y, **kwargs).labels_

    def partial_fit(self, X, y=None) -> "LowRankGaussianMixture":
        """Fit to the first batch of a stream, and update with every batch after it.

        Memberships of a batch are those under the mixture so far, and stay: a first batch that shows all components
        well is worth more than many later ones. Updates are one incremental PCA a component on twice its rank.
        ``lower_bound_`` is that of the first batch, ``labels_`` those of the last.
        """
        sums = getattr(self, "_sums", None)
        if sums is None:
            self.fit(X, y)
            X = validate_data(self, X, reset=False, dtype=np.float64)
            self._sums = begin(X, memberships(X, self._parts()), self._kept_rules)
            self._n_seen = np.bincount(self.labels_, minlength=len(self.weights_))
            return self
        X = validate_data(self, X, reset=False, dtype=np.float64)
        self._check_size(X)
        self._sums = add(sums, X, memberships(X, self._parts()), center=bool(self.center))
        self._keep(summed_parts(self._sums, self._kept_rules), self._kept_rules)
        self.labels_ = self._labels(X)
        self._n_seen = self._n_seen + np.bincount(self.labels_, minlength=len(self.weights_))
        self.samples_per_dimension_ = self._n_seen / self.ranks_
        return self

    @classmethod
    def from_parts(cls, bases, spectra, means, weights, noise_variance) -> "LowRankGaussianMixture":
        """Return a fitted mixture with given components, of the shapes of the attributes; it has no labels.

        Raises
        ------
        ValueError
            A shape does not fit, a number is not finite, bases have columns that are neither orthonormal nor zeros, or
            variances and weights are not at least 0.
        """
        given = zip(ARRAYS, (bases, spectra, means, weights, noise_variance), strict=True)
        parts = {name: np.asarray(part, dtype=np.float64) for name, part in given}
        check_parts(parts)
        bases = parts["bases_"]
        ranks = (np.square(bases).sum(axis=1) > 0.5).sum(axis=1)
        made = cls(len(bases), rank=tuple(int(r) for r in ranks))
        for name, part in parts.items():
            setattr(made, name, part)
        made.ranks_, made.n_features_in_, made._n_features_out = ranks, bases.shape[1], bases.shape[2]
        return made

    def predict(self, X) -> np.ndarray:
        """Return the component of each row, (n,): the most probable; after K-subspaces, the nearest subspace."""
        return self._labels(self._rows(X))

    def predict_proba(self, X) -> np.ndarray:
        """Return the probability of each component, (n, K)."""
        X = self._rows(X)
        return memberships(X, self._parts()).astype(X.dtype)

    def score_samples(self, X) -> np.ndarray:
        """Return the log-density of each row in nats, (n,), in float64."""
        return logsumexp(log_memberships(self._rows(X), self._parts()), axis=1)

    def score(self, X, y=None) -> float:
        """Return the mean log-density in nats."""
        return float(self.score_samples(X).mean())

    def bic(self, X) -> float:
        """Return the Bayesian information criterion on ``X``; less is better."""
        return -2 * len(X) * self.score(X) + self.n_parameters() * math.log(len(X))

    def aic(self, X) -> float:
        """Return the Akaike information criterion on ``X``; less is better."""
        return -2 * len(X) * self.score(X) + 2 * self.n_parameters()

    def n_parameters(self) -> int:
        """Return how many numbers the mixture has free."""
        check_is_fitted(self, "bases_")
        K, D, _ = self.bases_.shape
        bases = sum(int(D * d - d * (d + 1) // 2) for d in self.ranks_)
        spectra = int(self.ranks_.sum()) if self.spectrum == "free" else 1
        return bases + spectra + K * D * bool(self.center) + (K - 1) + K * (self.noise == "isotropic")

    def sample(self, n_samples=1) -> tuple[np.ndarray, np.ndarray]:
        """Draw rows (n, D) with their components (n,)."""
        check_is_fitted(self, "bases_")
        if not is_whole(n_samples) or n_samples < 1:
            raise ValueError(f"n_samples must be a whole number of at least 1, got {n_samples!r}")
        K, D, d = self.bases_.shape
        rng = check_random_state(self.random_state)
        labels = rng.choice(K, size=n_samples, p=self.weights_ / self.weights_.sum())
        inside = rng.standard_normal((n_samples, d)) * np.sqrt(self.spectra_[labels])
        white = rng.standard_normal((n_samples, D)) * np.sqrt(self.noise_variance_[labels])[:, None]
        X = self.means_[labels] + white
        for k in range(K):
            X[labels == k] += inside[labels == k] @ self.bases_[k].T
        return X, labels

    def transform(self, X) -> np.ndarray:
        """Return the coordinates of each row in the subspace of its own component, (n, d), zeros beyond its rank."""
        X = self._rows(X)
        labels, out = self._labels(X), np.zeros((len(X), self.bases_.shape[2]), X.dtype)
        for rows, block in row_blocks(X):
            for k in np.unique(labels[rows]):
                mine = labels[rows] == k
                out[rows][mine] = (block[mine] - self.means_[k]) @ self.bases_[k]
        return out

    def denoise(self, X, sigma=None) -> np.ndarray:
        """Return the best guess of the clean rows behind ``X``, (n, D).

        Parameters
        ----------
        sigma : float or array of shape (n,), optional
            Standard deviation, in a coordinate, of noise that ``X`` has beyond the rows of the fit; these count as
            clean, and the answer keeps their own white noise as far as it can be told. Left out, ``X`` is like the
            rows of the fit, and their white noise is what is taken off.

        Raises
        ------
        ValueError
            ``sigma`` is not above 0, or has another length than ``X``.
        """
        import torch

        from .low_rank_denoiser import LowRankDenoiser

        X = self._rows(X)
        if sigma is not None:
            sigma = np.asarray(sigma, dtype=np.float64)
            if sigma.ndim > 1 or (sigma.ndim and len(sigma) != len(X)):
                raise ValueError(f"sigma must be a number or one for each of {len(X)} rows, got shape {sigma.shape}")
            if not (np.isfinite(sigma).all() and (sigma > 0).all()):
                raise ValueError(f"sigma must be above 0 and finite, got {sigma.min():g}")
            sigma = np.broadcast_to(sigma, len(X)).copy()
        model = LowRankDenoiser.from_mixture(self, keep_noise=sigma is not None)
        out = np.empty(X.shape, X.dtype)
        for rows, block in row_blocks(X, wide=2 + self.bases_.shape[0] * self.bases_.shape[2] // X.shape[1]):
            x = torch.as_tensor(block)
            if sigma is not None:
                out[rows] = model(x, torch.as_tensor(sigma[rows])).numpy()
            else:
                out[rows] = self._projected(block)
        return out

    def save(self, path: Path | str) -> Path:
        """Write parameters and components to one .safetensors file, atomically; labels are not kept."""
        from polyspan.io import constructor_params, save_fitted

        check_is_fitted(self, "bases_")
        init = constructor_params(self)
        if isinstance(init["rank"], Sequence | np.ndarray) and not isinstance(init["rank"], str):
            init["rank"] = [int(r) for r in init["rank"]]
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return save_fitted(Path(path), kind=type(self).__name__, arrays=arrays, params={"init": init})

    @classmethod
    def load(cls, path: Path | str) -> "LowRankGaussianMixture":
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds something else.
        """
        from polyspan.io import load_fitted

        found = load_fitted(Path(path), kind=cls.__name__)
        try:
            made = cls.from_parts(*(np.array(found.arrays[name]) for name in ARRAYS))
        except (KeyError, ValueError) as error:
            raise WrongContent(Path(path), found=str(error), expected="the components of a mixture") from error
        return made.set_params(**found.params["init"])

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _rows(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "bases_")
        check_numbers(X)
        X = validate_data(self, X, reset=False, dtype=FLOATS)
        self._check_size(X)
        return X

    def _check_size(self, X: np.ndarray) -> None:
        """Refuse rows so far out that their log-density, a squared length over a variance, is no number."""
        room = np.finfo(np.float64).max / (16 * X.shape[1]) * min(1.0, float(self.noise_variance_.min()))
        most = math.sqrt(room) - float(np.abs(self.means_).max())
        if not max(float(X.max()), -float(X.min())) <= most:
            row = int(np.argmax(np.maximum(X.max(axis=1), -X.min(axis=1)) > most))
            raise ValueError(
                f"X must lie within ±{most:.3g}, where log-densities under this mixture are finite, got a value of "
                f"size {max(float(X[row].max()), -float(X[row].min())):.3g} at row {row}"
            )

    def _parts(self) -> Parts:
        return Parts(self.bases_, self.spectra_, self.means_, self.weights_, self.noise_variance_)

    def _labels(self, X: Any) -> np.ndarray:
        if self.algorithm == "ksubspaces":
            return outside_energy(X, self._parts()).argmin(axis=1)
        return log_memberships(X, self._parts()).argmax(axis=1)

    def _projected(self, block: np.ndarray) -> np.ndarray:
        """Return the posterior means of the low-rank parts, the white noise of each component being the noise."""
        R = memberships(block, self._parts())
        out = R @ self.means_
        shrink = self.spectra_ / np.where(self.spectra_ > 0, self.spectra_ + self.noise_variance_[:, None], 1)
        for k, basis in enumerate(self.bases_):
            out += ((block - self.means_[k]) @ basis * (R[:, k : k + 1] * shrink[k])) @ basis.T
        return out

    def _keep(self, parts: Parts, rules: Rules) -> None:
        bases = np.stack([fix_signs(basis) for basis in parts.bases])
        for name, part in zip(ARRAYS, (bases, *parts[1:]), strict=True):
            setattr(self, name, part)
        self.ranks_ = np.array(rules.ranks)
        self.at_floor_ = (parts.residual <= rules.floor * (1 + 1e-9)) & (rules.noise is None)
        self._kept_rules, self._n_features_out = rules, bases.shape[2]

    def _search(self, X: np.ndarray) -> Search:
        """Settle the floor, the origin and the ranks."""
        n, D = X.shape
        mean, square = np.zeros(D), 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for _, block in row_blocks(X):
                mean, square = mean + block.sum(axis=0) / n, square + float(np.vdot(block, block)) / n
            variance = max(square - float(mean @ mean), 0.0) / D if self.center else square / D
        if not math.isfinite(variance):
            raise ValueError("X must have squares that floats can hold, got values so large that they overflow")
        if square < 1e-290 and any(block.any() for _, block in row_blocks(X)):
            raise ValueError("X must have squares that floats can hold, got values so small that they vanish")
        self._mean_share = float(mean @ mean) / square if square > 0 else 0.0
        floor = max(float(self.reg) * variance, 1e-14 * max(square / D, 1e-200))
        noise, K = None if self.noise == "isotropic" else float(self.noise), int(self.n_components)
        known = not isinstance(self.rank, str)
        ranks = rank_list(self.rank, K) if known else (1,) * K
        search = Search(
            Rules(ranks, bool(self.center), self.spectrum == "identity", noise, floor),
            origin=mean if self.center else np.zeros(D),
            groups=None,
            n_init=int(self.n_init),
            init=self.init,
            max_iter=int(self.max_iter),
            tol=float(self.tol),
            rng=check_random_state(self.random_state),
            label="denoising" if self.verbose else "",
        )
        if known:
            return search
        rows = some_rows(X, START_ROWS, search.rng)
        groups = k_means(rows, K, search.rng)
        most = max(1, min(D - 1, int(np.bincount(groups, minlength=K).min() / FEW), (len(rows) - 1) // 2))
        rank = min(most, common_rank(rows, groups, AUTO_SHARE, center=search.rules.center))
        if self.rank == "bic":
            rank = self._rank_by_bic(rows, groups, search.rules, most)
        kept = groups if len(groups) == n else None
        return search._replace(rules=search.rules._replace(ranks=(rank,) * K), groups=kept)

    def _rank_by_bic(self, rows: np.ndarray, groups: np.ndarray, rules: Rules, most: int) -> int:
        K, found = int(self.n_components), {}
        for rank in [r for r in sorted({2**i for i in range(16)} | {3 * 2**i for i in range(15)}) if r <= most]:
            ranked = rules._replace(ranks=(rank,) * K)
            fit = expectation_maximisation(rows, one_hot(groups, K), ranked, max_iter=self.max_iter, tol=self.tol)
            probe = self.from_parts(*fit.parts).set_params(center=self.center, spectrum=self.spectrum, noise=self.noise)
            found[rank] = probe.bic(rows)
            if found[rank] > min(found.values()) + 0.2 * abs(min(found.values())):
                break
        return min(found, key=lambda rank: found[rank])

    def _warn_of_the_mean(self) -> None:
        if not self.center and self._mean_share > 0.5:
            warnings.warn(
                f"the mean of X holds {self._mean_share:.0%} of its squares and will be the first direction of every "
                "subspace; center=True gives components means of their own",
                stacklevel=3,
            )

    def _judge_counts(self) -> None:
        counts = np.bincount(self.labels_, minlength=len(self.weights_))
        self.samples_per_dimension_ = counts / self.ranks_
        k = int(self.samples_per_dimension_.argmin())
        if self.algorithm == "em" and counts[k] <= self.ranks_[k]:
            raise ValueError(
                f"rank must be below the rows of every component, got {self.ranks_[k]} for component {k} with "
                f"{counts[k]} rows: lower rank or n_components"
            )
        if self.samples_per_dimension_[k] < FEW:
            warnings.warn(
                f"component {k} has {counts[k]} rows for {self.ranks_[k]} dimensions: a subspace cannot be found from "
                f"fewer rows than it has dimensions, nor trusted below {FEW} times as many",
                stacklevel=3,
            )
