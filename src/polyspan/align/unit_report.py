"""What a comparison of two networks unit by unit says: one record a pair of layers."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .unit_matching import UnitCorrelations, UnitMatching


@dataclass(frozen=True, kw_only=True)
class SparseRow:
    """One penalty of the few-to-one mapping: half mean squared error on rows held out, and mean units a target.

    ``stability``: how far the same units are chosen where inputs are drawn again, in [0, 1], the mean over 32
    targets of common units over units of either choice; None without bootstraps.
    """

    alpha: float
    half_mse: float
    n_units: float
    stability: float | None


class GroupSplit(NamedTuple):
    """One cut of the tree of groups.

    Node 0 is all live units; split number s cuts ``node`` into nodes 2s + 1 and 2s + 2, which hold ``left`` and
    ``right`` (units of the first network, units of the second), at the normalised ``cut`` in [0, 2].
    """

    node: int
    cut: float
    left: tuple[int, int]
    right: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class LayerComparison:
    """What two layers share.

    Shares and errors "on held-out rows" are learnt on half of the rows and measured on the other. Means are over live
    units.

    Attributes
    ----------
    layer_in, layer_out : str
    n_rows, n_items : int
        Samples, and the inputs that they come from: with positions there are many rows an item, not independent.
    correlations : UnitCorrelations
    bipartite, semi : UnitMatching
    n_dead_in, n_dead_out : int
        Units that never vary, left out everywhere.
    mean_bipartite, mean_semi : float
        Mean correlation with the partner, in [-1, 1].
    mean_held_out : float
        The same for a one-to-one matching on held-out rows.
    nulls : dict of str to float
        Mean one-to-one correlation where there is nothing to find: ``shuffle``, ``rotation``, ``scramble``,
        ``untrained``.
    p_value : float or None
        Share of shuffles that match as well, counting the data itself; None without shuffles.
    n_above_null : int or None
        Pairs that correlate more than the best pair of any shuffle.
    unexplained_single, unexplained_all : float
        Share of a unit's variance not predicted, on held-out rows, by its best single unit and by all (ridge).
    sparse : list of SparseRow
        Few-to-one mappings between the two, least penalty last.
    clusters : list of (int, int)
        Many-to-many groups: units of the first and of the second network in each.
    hierarchy : list of GroupSplit
        The same number of groups by cutting in two again and again.
    cka, svcca, pwcca : float
        One-number summaries, in [0, 1].
    errors : dict of str to float
        Standard errors of ``mean_bipartite``, ``mean_semi``, ``mean_held_out``, ``unexplained_single``,
        ``unexplained_all``, ``cka``, ``svcca`` and ``pwcca`` by bootstrap over inputs; empty without bootstraps, NaN
        with fewer than four inputs. Partners stay those of all rows, which changes the error of their mean
        correlation by less than its own error; held-out maps are learnt anew from what is drawn.
    bipartite_errors, semi_errors : ndarray of shape (d_A,)
        Likewise of the correlation with each partner; NaN where there is none.
    warnings : list of str
    """

    layer_in: str
    layer_out: str
    n_rows: int
    n_items: int
    correlations: UnitCorrelations
    bipartite: UnitMatching
    semi: UnitMatching
    n_dead_in: int
    n_dead_out: int
    mean_bipartite: float
    mean_semi: float
    mean_held_out: float
    nulls: dict[str, float]
    p_value: float | None
    n_above_null: int | None
    unexplained_single: float
    unexplained_all: float
    sparse: list[SparseRow]
    clusters: list[tuple[int, int]]
    hierarchy: list[GroupSplit]
    cka: float
    svcca: float
    pwcca: float
    errors: dict[str, float]
    bipartite_errors: np.ndarray
    semi_errors: np.ndarray
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return plain types; NaN scores become None, and the matrices of correlations are left out."""
        left_out = ("correlations", "bipartite", "semi", "bipartite_errors", "semi_errors")
        told = {key: value for key, value in vars(self).items() if key not in left_out}
        told["nulls"] = dict(self.nulls)
        told["errors"] = {name: _or_none(value) for name, value in self.errors.items()}
        told["sparse"] = [dict(vars(row)) for row in self.sparse]
        told["clusters"] = [list(pair) for pair in self.clusters]
        told["hierarchy"] = [
            {"node": split.node, "cut": split.cut, "left": list(split.left), "right": list(split.right)}
            for split in self.hierarchy
        ]
        found, favourite = self.bipartite, self.semi
        told["matching"] = [
            {
                "unit": i,
                "partner": int(found.indices[i]) if found.indices[i] >= 0 else None,
                "correlation": _or_none(found.scores[i]),
                "correlation_error": _or_none(self.bipartite_errors[i]),
                "favourite": int(favourite.indices[i]) if favourite.indices[i] >= 0 else None,
                "favourite_correlation": _or_none(favourite.scores[i]),
                "favourite_error": _or_none(self.semi_errors[i]),
            }
            for i in range(len(found.indices))
        ]
        return told


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class NetworkComparison:
    """The comparison of two networks, one :class:`LayerComparison` a pair of layers."""

    layers: list[LayerComparison]

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {"layers": [layer.to_json() for layer in self.layers]}

    def __getitem__(self, layer: str | int) -> LayerComparison:
        """Return a layer by its number or by the first network's name for it."""
        if isinstance(layer, int):
            return self.layers[layer]
        for found in self.layers:
            if found.layer_in == layer:
                return found
        raise KeyError(layer)
