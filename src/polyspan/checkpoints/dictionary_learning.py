"""Learn a dictionary of atoms such that every row is near a sum of few of them."""

from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from polyspan.linalg import orthogonal_matching_pursuit

from ._dictionary_fit import ALGORITHMS, INITS, PURSUITS, fit_dictionary

FLOATS = [np.float64, np.float32]


class SparseDictionary(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Write rows as sums of few atoms: :math:`X \approx C D`, at most ``n_nonzero`` entries in each row of C.

    Solves :math:`\min \lVert X - CD \rVert_F^2` over unit atoms and sparse codes. Rows are not centred. The problem is
    not convex: what is found depends on the start, and another start gives other atoms of nearly the same error.

    - ``"ksvd"``: atoms of any direction, more of them than dimensions where wanted; least error.
    - ``"orthogonal"``: orthonormal atoms, updated in closed form; several times faster, at most d atoms.
    - ``"threshold"``: the leading right singular vectors, largest coefficients, one refit of the atoms; one pass.

    Unlike :class:`sklearn.decomposition.DictionaryLearning`, which penalises the sum of absolute coefficients, the
    count of coefficients is fixed, and fitting is matrix products on all rows at once.

    Source: Aharon, Elad and Bruckstein 2006; catalogue entry ``cospadi``.

    Parameters
    ----------
    n_components : int, optional
        Atoms m; the number of features where not given.
    n_nonzero : int, optional
        Most atoms a row may use; a tenth of the features, at least 1, where not given.
    algorithm : {"ksvd", "orthogonal", "threshold"}, default="ksvd"
    pursuit : {"exchange", "omp"}, default="exchange"
        How "ksvd" finds codes while it fits. "omp" is the published form, orthogonal matching pursuit from nothing in
        every sweep and atoms one by one. "exchange" keeps codes between sweeps and exchanges atoms where that lowers
        the error; its error never rises, and the same error costs a tenth of the time or less.
    max_iter : int, default=20
        Sweeps.
    init : {"svd", "random"}, default="svd"
        First atoms of "ksvd": leading right singular vectors, filled up with rows, or rows only.
    tol : float, default=1e-4
        End when two sweeps lower the error by less than this share of it.
    random_state : int, RandomState or None
        Which rows are drawn as first atoms.

    Attributes
    ----------
    components_ : ndarray of shape (m, d)
        Unit rows.
    error_history_ : ndarray of shape (sweeps,)
        Unexplained share of the squared norm of X after each sweep, and after a last refit.
    n_iter_ : int
    n_nonzero_ : int
    n_features_in_ : int
    """

    components_: np.ndarray
    n_nonzero_: int

    def __init__(
        self,
        n_components=None,
        n_nonzero=None,
        *,
        algorithm="ksvd",
        pursuit="exchange",
        max_iter=20,
        init="svd",
        tol=1e-4,
        random_state=None,
    ):
        self.n_components = n_components
        self.n_nonzero = n_nonzero
        self.algorithm = algorithm
        self.pursuit = pursuit
        self.max_iter = max_iter
        self.init = init
        self.tol = tol
        self.random_state = random_state

    def fit(self, X, y=None) -> "SparseDictionary":
        """Fit atoms to the rows of ``X`` (n, d); ``y`` is ignored.

        Raises
        ------
        ValueError
            A parameter is out of range, or a value is not finite.
        """
        X = validate_data(self, X, dtype=FLOATS)
        m, s = self._sizes(X.shape[1])
        seed = int(check_random_state(self.random_state).randint(2**31))
        found = fit_dictionary(
            torch.from_numpy(np.array(X, dtype=np.float64)), m, s, algorithm=self.algorithm, pursuit=self.pursuit,
            init=self.init, max_iter=self.max_iter, tol=self.tol, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        self.components_ = np.ascontiguousarray(found.atoms.mT.numpy()).astype(X.dtype)
        self.error_history_ = np.array(found.errors)
        self.n_iter_ = len(found.errors)
        self.n_nonzero_ = s
        self._n_features_out = m
        return self

    def _sizes(self, d: int) -> tuple[int, int]:
        """Return atoms and non-zeros after checking every parameter against ``d`` features."""
        for name, known in (("algorithm", ALGORITHMS), ("pursuit", PURSUITS), ("init", INITS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        m = d if self.n_components is None else self.n_components
        s = max(1, min(m, d) // 10) if self.n_nonzero is None else self.n_nonzero
        most = d if self.algorithm != "ksvd" else None
        if not isinstance(m, Integral) or m < 1 or (most is not None and m > most):
            bound = "at least 1" if most is None else f"between 1 and the {d} features for {self.algorithm!r}"
            raise ValueError(f"n_components must be {bound}, got {m!r}")
        if not isinstance(s, Integral) or not 1 <= s <= m:
            raise ValueError(f"n_nonzero must be between 1 and n_components={m}, got {s!r}")
        if not isinstance(self.max_iter, Integral) or self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {self.max_iter!r}")
        if not isinstance(self.tol, Real) or not self.tol >= 0:
            raise ValueError(f"tol must not be negative, got {self.tol!r}")
        return int(m), int(s)

    def transform(self, X) -> np.ndarray:
        """Return codes (n, m) of rows ``X`` (n, d) by orthogonal matching pursuit."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=FLOATS)
        atoms = self.components_.T.astype(np.float64)
        codes = orthogonal_matching_pursuit(atoms, np.asarray(X, dtype=np.float64), n_nonzero=self.n_nonzero_)
        return codes.astype(X.dtype)

    def inverse_transform(self, codes) -> np.ndarray:
        """Return the rows (n, d) that ``codes`` (n, m) stand for."""
        check_is_fitted(self)
        return np.asarray(codes) @ self.components_

    def score(self, X, y=None) -> float:
        """Return the share of the squared norm of ``X`` that its codes explain, at most 1; ``y`` is ignored."""
        codes = self.transform(X)
        X = np.asarray(X, dtype=np.float64)
        total = float(np.sum(X**2))
        return 1.0 - float(np.sum((X - codes @ self.components_) ** 2)) / total if total > 0 else 1.0
