"""The interface of every map between two embedding spaces: fit on anchors, transform, score, save, load."""

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from polyspan.errors import WrongContent
from polyspan.io import Fitted, load_fitted, save_fitted

from ._checks import check_kind, check_squares, checked_weights, finite_rows, scale_rows


class Aligner(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What all aligners share; a subclass defines ``_fit_rows`` and ``_apply``.

    Rows are items. ``fit(X, y)`` takes anchors: row i of ``X`` (n, d_A) and row i of ``y`` (n, d_B) embed the same
    item by the two models. ``transform`` carries any (m, d_A) rows to (m, d_B), in their own float width.
    A subclass names in ``_arrays`` the fitted arrays and in ``_facts`` the fitted numbers that make it up on disk.
    """

    _arrays: tuple[str, ...] = ()
    _facts: tuple[str, ...] = ()
    normalize: bool
    n_anchors_: int
    n_features_in_: int
    _n_features_out: int

    def fit(self, X, y, sample_weight=None) -> "Aligner":
        """Fit on anchors ``X`` (n, d_A) and ``y`` (n, d_B).

        Raises
        ------
        ValueError
            Row counts differ, fewer than two anchors, a value is not finite or so large or small that its square is
            not, or a row is all zero and directions are asked for (``normalize=True``).

        Warns
        -----
        UserWarning
            Rows hold 8-bit codes, whose scale and offset nobody told.
        """
        X, Y, weights = self._anchors(X, y, sample_weight, reset=True)
        if len(X) < 2:
            raise ValueError(f"{type(self).__name__} needs at least 2 anchors, got {len(X)} sample")
        self.n_anchors_ = len(X)
        self._fit_rows(X, Y, weights)
        return self

    def transform(self, X) -> np.ndarray:
        """Return ``X`` (m, d_A) as seen from space B, (m, d_B), in its own width; float64 for float16 and integers."""
        check_is_fitted(self)
        check_kind(X, "X")
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return self._apply(self._directions(X))

    def inverse_transform(self, Z) -> np.ndarray:
        """Return rows of space B as seen from space A.

        Raises
        ------
        ValueError
            This kind of map has no inverse.
        """
        raise ValueError(f"{type(self).__name__} has no inverse; fit one from the target's space to the source's")

    def score(self, X, y) -> float:
        """Return the mean cosine between ``transform(X)`` and ``y``, in [-1, 1]; never choose an aligner by it.

        A map may raise the cosine and lower retrieval: see :func:`polyspan.align.choose_aligner`.
        """
        check_is_fitted(self)
        Z, Y = self.transform(X), finite_rows(y, "y")
        if Z.shape != Y.shape:
            raise ValueError(f"y must have shape {Z.shape}, got {Y.shape}")
        return float(np.mean(np.sum(scale_rows(Z)[0] * scale_rows(Y)[0], axis=1)))

    def save(self, path: Path | str, **about: Any) -> Path:
        """Write the fitted map to one .safetensors file, atomically; ``about`` holds facts such as model names."""
        check_is_fitted(self)
        return save_fitted(
            Path(path),
            kind=type(self).__name__,
            arrays=self._to_arrays(),
            params={"init": self.get_params(), "facts": {name: getattr(self, name) for name in self._stored_facts()}},
            about=about,
        )

    @classmethod
    def load(cls, path: Path | str) -> "Aligner":
        """Read a map that :meth:`save` wrote.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds another class.
        """
        return cls._from_fitted(load_fitted(Path(path), kind=cls.__name__))

    @classmethod
    def _from_fitted(cls, found: Fitted) -> "Aligner":
        made = cls(**found.params["init"])
        for name, value in found.params["facts"].items():
            setattr(made, name, value)
        made._from_arrays(dict(found.arrays))
        return made

    def _stored_facts(self) -> tuple[str, ...]:
        return ("n_anchors_", "n_features_in_", "_n_features_out", *self._facts)

    def _to_arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in self._arrays}

    def _from_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        for name, value in arrays.items():
            setattr(self, name, value)

    def _anchors(self, X, y, sample_weight, *, reset: bool):
        check_kind(X, "X", 4)
        check_kind(y, "y", 4)
        X, Y = validate_data(self, X, y, reset=reset, multi_output=True, y_numeric=True, dtype=np.float64)
        Y = Y.reshape(len(Y), -1).astype(np.float64)
        weights = checked_weights(sample_weight, len(X))
        X, Y = self._directions(X), self._directions(Y, "y")
        check_squares(X, "X")
        check_squares(Y, "y")
        if reset:
            self._n_features_out = Y.shape[1]
        elif Y.shape[1] != self._n_features_out:
            raise ValueError(f"y must have {self._n_features_out} features as before, got {Y.shape[1]}")
        return X, Y, weights

    def _directions(self, X: np.ndarray, name: str = "X") -> np.ndarray:
        """Return unit rows where ``normalize`` asks for them."""
        if not self.normalize:
            return X
        made, lengths = scale_rows(X)
        if not lengths.all():
            row = int(np.flatnonzero(lengths[:, 0] == 0)[0])
            raise ValueError(f"{name} must have no all-zero row when normalize=True, got one at row {row}")
        return made

    def _fit_rows(self, X: np.ndarray, Y: np.ndarray, weights: np.ndarray | None) -> None:
        raise NotImplementedError

    def _apply(self, X: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = tags.target_tags.multi_output = True
        return tags


def residual_share(mapped: np.ndarray, target: np.ndarray, mean: np.ndarray) -> float:
    """Unexplained share of the spread of ``target`` about ``mean``: 0 is exact, 1 explains nothing."""
    return float(np.linalg.norm(mapped - target) / (np.linalg.norm(target - mean) or 1.0))


def load_aligner(path: Path | str) -> tuple[Aligner, dict[str, Any]]:
    """Read a fitted map of any class, with the facts that were saved about it.

    Raises
    ------
    FileError
        One of its five kinds; ``WrongContent`` where the file holds no aligner.
    """
    from polyspan import align

    found = load_fitted(Path(path))
    kind = getattr(align, found.kind, None) if found.kind in dir(align) else None
    if not (isinstance(kind, type) and issubclass(kind, Aligner)):
        raise WrongContent(path, found=f"a fitted {found.kind}", expected="a fitted map between embedding spaces")
    return kind._from_fitted(found), dict(found.about)
