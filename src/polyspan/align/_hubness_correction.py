"""What corrections of hubness share: banks that are checked, parameters that are tuned on pairs, and files."""

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.model_selection import ParameterGrid
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from polyspan.io import load_fitted, save_fitted
from polyspan.linalg import Neighbours

from ._checks import check_count, check_kind, check_squares
from ._hubness import FLOATS, checked_relevant, share_of_hits, unit_rows

Grid = Mapping[str, Sequence[Any]]


class CorrectionScore(NamedTuple):
    """Parameters that were tried, and the share of queries with a hit."""

    params: dict[str, Any]
    score: float


class CorrectionChoice(NamedTuple):
    """The parameters that won and their score, with the whole table, best first."""

    params: dict[str, Any]
    score: float
    table: list[CorrectionScore]


class HubnessCorrection(BaseEstimator):
    """What all corrections share: checks of the banks, tuning, and files."""

    normalize: bool
    block_rows: int
    n_features_in_: int
    _fitted_normalize: bool
    _off: ClassVar[Mapping[str, Any]]
    """Parameters that together leave everything as it is."""
    _facts: ClassVar[Sequence[str]]
    _arrays: ClassVar[Sequence[str]]

    def tune(
        self, gallery, queries, relevant=None, *, k: int = 1, grid: Grid | Sequence[Grid] | None = None
    ) -> CorrectionChoice:
        """Set parameters by retrieval on validation items, which must not be those of a later test; return the table.

        Parameters
        ----------
        gallery, queries : arrays of shape (n, d) and (m, d)
        relevant : array of shape (m,) or (m, r), optional
            Gallery rows that answer each query: any of them is a hit, and -1 fills up where a query has fewer. Left
            out, row i answers query i.
        k : int
            A query counts where a right row is among its first k.
        grid : mapping of parameter to values, or a sequence of such, optional
            All combinations of each are tried; left out, the class's own. One of them must be no correction. Equal
            scores go to no correction, then to the one that stands first.

        Raises
        ------
        ValueError
            No correction is not in the grid, a parameter cannot be tuned or is out of its range, rows do not match, or
            ``relevant`` holds other numbers than rows of the gallery.
        """
        self._check_fit()
        check_count("k", k)
        gallery, queries = self._checked_rows(gallery, "gallery"), self._checked_rows(queries, "queries")
        right = checked_relevant(relevant, len(queries), len(gallery))
        before = self.get_params()
        settings = self._settings(self._default_grid() if grid is None else grid)
        table = []
        try:
            for setting in settings:
                self.set_params(**setting)
                self._check_parameters()
            shared = self._shared(gallery, settings)
            for setting in settings:
                found = self.set_params(**setting)._search(queries, gallery, k, shared)
                table.append(CorrectionScore(setting, share_of_hits(found.indices, right)))
        finally:
            self.set_params(**before)
        table.sort(key=lambda row: (-row.score, not self._is_off(row.params)))
        self.set_params(**table[0].params)
        return CorrectionChoice(*table[0], table)

    @abstractmethod
    def retrieve(self, queries, gallery, k: int) -> Neighbours:
        """Find the k best gallery rows of each query."""

    @abstractmethod
    def _search(self, queries: np.ndarray, gallery: np.ndarray, k: int, shared: Mapping[tuple, Any]) -> Neighbours:
        """Find the k best gallery rows of each query, where rows are checked and some work is done before."""

    def _shared(self, gallery: np.ndarray, settings: list[dict[str, Any]]) -> dict[tuple, Any]:
        """Return what several settings need of a gallery, made once for all of them."""
        return {}

    def save(self, path: Path | str, **about: Any) -> Path:
        """Write the correction to one .safetensors file, atomically; ``about`` holds facts such as model names."""
        self._check_fit()
        arrays = {name: getattr(self, name) for name in self._arrays}
        return save_fitted(
            Path(path),
            kind=type(self).__name__,
            arrays={name: array for name, array in arrays.items() if array is not None},
            params={"init": self.get_params(), "facts": {name: getattr(self, name) for name in self._facts}},
            about=about,
        )

    @classmethod
    def load(cls, path: Path | str):
        """Read what :meth:`save` wrote; it corrects as before.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds another class.
        """
        found = load_fitted(Path(path), kind=cls.__name__)
        made = cls(**found.params["init"])
        for name, value in {**dict.fromkeys(cls._arrays), **found.params["facts"], **found.arrays}.items():
            setattr(made, name, value)
        made._fitted_normalize = bool(made.normalize)
        return made

    @abstractmethod
    def _check_parameters(self) -> None:
        """Refuse what is out of its range, for the banks too where they are known."""

    @abstractmethod
    def _default_grid(self) -> list[dict[str, list]]:
        """Return what is tried where no grid is given, as far as the banks allow it."""

    def _is_off(self, setting: Mapping[str, Any]) -> bool:
        return all(setting.get(name, getattr(self, name)) == value for name, value in self._off.items())

    def _settings(self, grid: Grid | Sequence[Grid]) -> list[dict[str, Any]]:
        fixed = {"normalize", "block_rows"}
        known = sorted(self.get_params().keys() - fixed)
        parts = [grid] if isinstance(grid, Mapping) else list(grid)
        for name, values in (item for part in parts for item in part.items()):
            if name not in known:
                raise ValueError(f"grid must name parameters among {known}, got {name!r}")
            if isinstance(values, str) or not len(values):
                raise ValueError(f"grid must give a sequence of values for {name}, got {values!r}")
        settings = list(ParameterGrid([{name: list(values) for name, values in part.items()} for part in parts]))
        if not any(map(self._is_off, settings)):
            off = " and ".join(f"{name}={value}" for name, value in self._off.items())
            raise ValueError(f"grid must hold {off}, which is no correction, got {grid}")
        return settings

    def _check_fit(self) -> None:
        check_is_fitted(self)
        self._check_parameters()
        if bool(self.normalize) != self._fitted_normalize:
            raise ValueError(f"normalize must be {self._fitted_normalize}, as fitted, got {self.normalize}: fit anew")

    def _check_shared(self) -> None:
        if not isinstance(self.normalize, bool | np.bool_):
            raise ValueError(f"normalize must be True or False, got {self.normalize!r}")
        check_count("block_rows", self.block_rows)

    def _banks(self, X, queries) -> tuple[np.ndarray, np.ndarray | None]:
        """Return both banks as they are, checked."""
        check_kind(X, "X", 3)
        check_kind(queries, "queries", 3)
        X = validate_data(self, X, dtype=FLOATS)
        if queries is not None:
            queries = check_array(queries, dtype=FLOATS, input_name="queries")
            if queries.shape[1] != X.shape[1]:
                raise ValueError(f"queries must have {X.shape[1]} features like X, got {queries.shape[1]}")
            if np.array_equal(X, queries):
                warnings.warn("queries are the rows of X: a gallery was given for a bank of queries", stacklevel=3)
        for name, bank in (("X", X), ("queries", queries)):
            if bank is not None and not self.normalize:
                check_squares(bank, name)
        self._fitted_normalize = bool(self.normalize)
        return X, queries

    def _checked_rows(self, X, name: str) -> np.ndarray:
        check_kind(X, name, 3)
        found = check_array(X, dtype=FLOATS, input_name=name)
        if found.shape[1] != self.n_features_in_:
            raise ValueError(f"{name} must have {self.n_features_in_} features like the banks, got {found.shape[1]}")
        if not self.normalize:
            check_squares(found, name)
        return found

    def _unit(self, X: np.ndarray, name: str, first: int = 0) -> np.ndarray:
        return unit_rows(X, name, first) if self.normalize else X

    def _unit_copy(self, X: np.ndarray, name: str) -> np.ndarray:
        """Return a bank to be kept: rows of length 1 where asked, and never the caller's own array."""
        made = self._unit(X, name)
        return made.copy() if made is X else made


def check_room(k: Any, most: int) -> None:
    """Refuse a length of a list that there are too few rows for."""
    check_count("k", k)
    if k > most:
        raise ValueError(f"k must be between 1 and {most}, got {k!r}")
