"""Two networks compared unit by unit on the same inputs, with what chance alone would give beside every number."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from polyspan.linalg import (
    PairedMoments,
    cca_from_moments,
    linear_cka_from_moments,
    random_orthogonal,
    ridge_from_moments,
)
from polyspan.run import Progress

from ._checks import check_count
from ._network_batches import array_batches, model_batches, scrambled_copy
from .unit_activations import CHANNELS, REDUCTIONS
from .unit_matching import UnitCorrelations, UnitMatching, match_units, unit_correlations
from .unit_sharing import ALPHAS, SparseUnitMapping, UnitCoClustering, unexplained_share

NULLS = ("shuffle", "rotation", "scramble")
LEAST_ROWS = 8
LEVEL, LEAST_SHUFFLES = 0.05, 19
"""A p-value above the first is told; with fewer shuffles than the second none can be that small."""


@dataclass(frozen=True, kw_only=True)
class SparseRow:
    """One penalty of the few-to-one mapping: half mean squared error on rows held out, and mean units a target."""

    alpha: float
    half_mse: float
    n_units: float


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
    cka, svcca, pwcca : float
        One-number summaries, in [0, 1].
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
    cka: float
    svcca: float
    pwcca: float
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return plain types; NaN scores become None, and the matrices of correlations are left out."""
        told = {key: value for key, value in vars(self).items() if key not in ("correlations", "bipartite", "semi")}
        told["nulls"] = dict(self.nulls)
        told["sparse"] = [dict(vars(row)) for row in self.sparse]
        told["clusters"] = [list(pair) for pair in self.clusters]
        told["matching"] = [
            {
                "unit": i,
                "partner": int(j) if j >= 0 else None,
                "correlation": float(r) if j >= 0 else None,
                "favourite": int(f) if f >= 0 else None,
                "favourite_correlation": float(s) if f >= 0 else None,
            }
            for i, (j, r, f, s) in enumerate(
                zip(self.bipartite.indices, self.bipartite.scores, self.semi.indices, self.semi.scores, strict=True)
            )
        ]
        return told


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


def compare_networks(
    a: Any,
    b: Any,
    inputs: Any = None,
    *,
    layers: Sequence[Any] | None = None,
    untrained: tuple[Any, Any] | None = None,
    nulls: Sequence[str] = NULLS,
    n_shuffles: int = 20,
    alphas: Sequence[float] = ALPHAS,
    n_clusters: Any = "eigengap",
    reduce: str = "positions",
    channels: str = "auto",
    mask: str | None = None,
    max_positions: int | None = None,
    batch_rows: int = 65536,
    random_state: Any = None,
    label: str = "",
) -> NetworkComparison:
    r"""Say which units of two networks correspond one to one, few to one and many to many.

    Activations are seen once, in batches; what is kept are second moments, of (d_A + d_B)² numbers a layer, and one
    d_A d_B product a shuffle. Beside every matching stands what it finds where nothing corresponds:

    * ``"shuffle"``: inputs of network B in another order. Positions keep their place, so that what units do at the
      border of every image survives it.
    * ``"rotation"``: B's layer turned by a random orthogonal matrix, which keeps every linear relation and takes the
      axes away. A matching that loses nothing by it is not about units.
    * ``"scramble"``: two copies of the models with every weight tensor's entries in random order (models only).
    * ``untrained=``: networks of your own, for instance as they were before training. Inputs alone make units alike.

    Two networks that saw different inputs, or the same in another order, look like a shuffle: see ``warnings``.
    Source: catalogue entry ``convergent-learning``.

    Parameters
    ----------
    a, b : arrays (n, d_A) and (n, d_B), paths to files of such, mappings of names to arrays, or torch modules
        Row i of both is the same input. Files are memory-mapped where their format allows.
    inputs : tensor, array, or iterable of batches
        For models: what they are run on. Batches may be tuples, whose first member counts, or mappings of keyword
        arguments. Each batch is shuffled within itself, so batches should be large, and inputs not sorted. An iterator
        can be run through only once: with the scramble or ``untrained`` give something that starts again, as a list or
        DataLoader without shuffling does.
    layers : sequence of str or of (str, str)
        For models, and for mappings where not all common names are meant: layers to compare, or pairs of them.
    untrained : pair like ``a`` and ``b``, optional
    nulls : sequence of {"shuffle", "rotation", "scramble"}
    n_shuffles : int
        20 allow p-values down to 1/21; with fewer than 19 none is below 0.05, and ``warnings`` says that they cannot
        tell whether rows belong together.
    alphas : sequence of float
        Penalties of the few-to-one mapping.
    n_clusters : int or "eigengap"
    reduce, channels : str
        See :class:`ActivationCollector`.
    mask : str, optional
        Key of mapping batches whose value (items, tokens) is 0 at padding, for instance ``"attention_mask"``: these
        positions are left out.
    max_positions : int, optional
        Take so many random positions of each batch, the same in both networks.
    batch_rows : int
        Rows a batch of arrays; items a batch of an ``inputs`` tensor are at most 256.
    random_state : int, RandomState instance or None
    label : str
        Show progress on stderr under this name.

    Raises
    ------
    ValueError
        Row counts differ, an activation is not finite, fewer than 8 rows, a layer does not exist or never varies, or
        an option does not fit.
    """
    unknown = [name for name in nulls if name not in NULLS]
    if unknown:
        raise ValueError(f"nulls must be among {NULLS}, got {unknown[0]!r}")
    check_count("n_shuffles", n_shuffles)
    check_count("batch_rows", batch_rows, LEAST_ROWS)
    if max_positions is not None:
        check_count("max_positions", max_positions)
    for name, value, allowed in (("reduce", reduce, REDUCTIONS), ("channels", channels, CHANNELS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if not len(alphas):
        raise ValueError("alphas must hold at least one penalty, got none")
    if untrained is not None and len(untrained) != 2:
        raise ValueError(f"untrained must be a pair like a and b, got {len(untrained)}")
    seed = int(check_random_state(random_state).randint(2**31 - 1))
    options = {"reduce": reduce, "channels": channels, "mask": mask, "max_positions": max_positions}
    options |= {"batch_rows": batch_rows, "seed": seed}
    models = _is_model(a)
    if models != _is_model(b):
        raise ValueError(f"a and b must both be models or both arrays, got {type(a).__name__} and {type(b).__name__}")
    if models and (inputs is None or layers is None):
        raise ValueError("inputs and layers must be given for models, got None")
    if models and iter(inputs) is inputs and ("scramble" in nulls or untrained is not None):
        raise ValueError("inputs must be something that starts again, as a list or DataLoader, got an iterator")
    gathered = _gather(a, b, inputs, layers, n_shuffles if "shuffle" in nulls else 0, label, options)
    others: dict[str, dict[tuple[str, str], _Gathered]] = {}
    if models and "scramble" in nulls:
        scrambled = [scrambled_copy(model, [seed, i]) for i, model in enumerate((a, b))]
        others["scramble"] = _gather(*scrambled, inputs, layers, 0, label, options)
    if untrained is not None:
        others["untrained"] = _gather(*untrained, inputs, layers, 0, label, options)
    found = []
    for i, (names, seen) in enumerate(gathered.items()):
        controls = {name: other[names] for name, other in others.items()}
        turn = np.random.default_rng([seed, 2, i]) if "rotation" in nulls else None
        found.append(_compare_layer(names, seen, controls, turn, alphas, n_clusters, seed))
    return NetworkComparison(layers=found)


class _Gathered:
    """Moments of both halves of the rows, and cross products of shuffled pairs, of one pair of layers."""

    def __init__(self, d_in: int, d_out: int, n_shuffles: int):
        self.halves = [PairedMoments(d_in, d_out) for _ in range(2)]
        self.shuffled = np.zeros((n_shuffles, d_in, d_out))
        self.origin: tuple[np.ndarray, np.ndarray] | None = None
        self.n_items, self.smallest = 0, np.inf

    def add(self, X: np.ndarray, Y: np.ndarray, rng: np.random.Generator) -> None:
        """Add paired activations (items, positions, units); items alternate between the halves."""
        for parity, half in enumerate(self.halves):
            mine = slice((parity + self.n_items) % 2, None, 2)
            if len(X[mine]):
                half.update(X[mine].reshape(-1, X.shape[2]), Y[mine].reshape(-1, Y.shape[2]))
        self.n_items += len(X)
        self.smallest = min(self.smallest, len(X))
        if not len(self.shuffled):
            return
        X, Y = X.astype(np.float64), Y.astype(np.float64)
        if self.origin is None:
            self.origin = X.mean(axis=(0, 1)), Y.mean(axis=(0, 1))
        # About a point near the mean nothing is lost where the products' mean is taken off at the end.
        A, B = (X - self.origin[0]).reshape(-1, X.shape[2]).T, Y - self.origin[1]
        for i in range(len(self.shuffled)):
            self.shuffled[i] += A @ B[rng.permutation(len(B))].reshape(-1, Y.shape[2])

    def total(self) -> PairedMoments:
        first = self.halves[0]
        return PairedMoments(first.d_in, first.d_out).merge(first).merge(self.halves[1])

    def shuffles(self, total: PairedMoments) -> Iterator[np.ndarray]:
        """Yield the correlations between shuffled rows."""
        if self.origin is None:
            return
        offset = total.weight * np.outer(total.mean_in - self.origin[0], total.mean_out - self.origin[1])
        for product in self.shuffled:
            yield _between(total, product - offset, total.cov_out)


def _between(total: PairedMoments, cross: np.ndarray, cov_out: np.ndarray) -> np.ndarray:
    """Correlations where the products between the networks, and those within the second, are others."""
    changed = copy.copy(total)
    changed.cross, changed.cov_out = cross, cov_out
    return unit_correlations(changed).between


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else 0.0


def _compare_layer(
    names: tuple[str, str],
    seen: _Gathered,
    controls: Mapping[str, _Gathered],
    turn: np.random.Generator | None,
    alphas: Sequence[float],
    n_clusters: Any,
    seed: int,
) -> LayerComparison:
    total, (first, second) = seen.total(), seen.halves
    if total.n_rows < LEAST_ROWS or not (first.n_rows >= 2 and second.n_rows >= 2):
        raise ValueError(f"a and b must have at least {LEAST_ROWS} rows, got {total.n_rows} sample(s)")
    found = unit_correlations(total)
    for side, live, name in (("a", found.live_in, names[0]), ("b", found.live_out, names[1])):
        if not live.any():
            raise ValueError(f"{side} must have a unit that varies, got none in {name!r}")
    bipartite, semi = match_units(found.between), match_units(found.between, method="semi")
    on = [unit_correlations(half).between for half in (first, second)]
    learnt = match_units(on[0]).indices
    pairs = np.flatnonzero(learnt >= 0)
    nulls, best, means = {}, [], []
    for between in seen.shuffles(total):
        scores = match_units(between).scores
        means.append(_mean(scores))
        best.append(np.nanmax(between))
    if means:
        nulls["shuffle"] = float(np.mean(means))
    if turn is not None:
        Q = random_orthogonal(len(found.live_out), rng=turn)
        nulls["rotation"] = _mean(match_units(_between(total, total.cross @ Q, Q.T @ total.cov_out @ Q)).scores)
    for name, other in controls.items():
        nulls[name] = _mean(match_units(unit_correlations(other.total()).between).scores)
    favourite = match_units(on[0].T, method="semi", absolute=True).indices
    known = np.flatnonzero(favourite >= 0)
    ridge = ridge_from_moments(first)
    offset = ridge.mean_out - ridge.mean_in @ ridge.weights
    mapping = SparseUnitMapping(alpha=max(alphas), alphas=tuple(alphas)).fit_moments(first)
    sparse = [
        SparseRow(
            alpha=float(alpha), half_mse=_held_out(mapping, i, first, second, total), n_units=float(counts.mean())
        )
        for i, (alpha, counts) in enumerate(zip(mapping.alphas_, mapping.n_nonzero_[:, found.live_out], strict=True))
    ]
    groups = UnitCoClustering(n_clusters, random_state=seed).fit_correlations(found)
    cca = cca_from_moments(total, rank=0.99)
    weights = np.abs(cca.weights_in.T @ total.cov_in).sum(axis=1)
    p_value = None if not means else (1 + sum(m >= _mean(bipartite.scores) for m in means)) / (1 + len(means))
    return LayerComparison(
        layer_in=names[0],
        layer_out=names[1],
        n_rows=total.n_rows,
        n_items=seen.n_items,
        correlations=found,
        bipartite=bipartite,
        semi=semi,
        n_dead_in=int((~found.live_in).sum()),
        n_dead_out=int((~found.live_out).sum()),
        mean_bipartite=_mean(bipartite.scores),
        mean_semi=_mean(semi.scores),
        mean_held_out=_mean(on[1][pairs, learnt[pairs]]),
        nulls=nulls,
        p_value=p_value,
        n_above_null=int(np.sum(bipartite.scores[bipartite.indices >= 0] > max(best))) if best else None,
        unexplained_single=1 - _mean(on[1][favourite[known], known] ** 2),
        unexplained_all=_mean(unexplained_share(second, ridge.weights, offset, total)),
        sparse=sparse,
        clusters=[(int(p), int(q)) for p, q in groups.table_],
        cka=linear_cka_from_moments(total),
        svcca=float(np.mean(cca.correlations)),
        pwcca=float(weights @ cca.correlations / weights.sum()),
        warnings=_warnings(seen, total, found, p_value),
    )


def _held_out(
    mapping: SparseUnitMapping, i: int, first: PairedMoments, second: PairedMoments, total: PairedMoments
) -> float:
    """Half mean squared error of penalty ``i`` on the second half, targets in units of their standard deviation."""
    s, t = (
        np.where(x > 0, x, 1.0)
        for x in (np.sqrt(np.diag(first.cov_in) / first.weight), np.sqrt(np.diag(first.cov_out) / first.weight))
    )
    weights = (mapping.coef_path_[i] * t[:, None] / s).T
    return 0.5 * _mean(unexplained_share(second, weights, first.mean_out - first.mean_in @ weights, total))


def _warnings(seen: _Gathered, total: PairedMoments, found: UnitCorrelations, p_value: float | None) -> list[str]:
    told, n_shuffles = [], len(seen.shuffled)
    if n_shuffles and 1 / (n_shuffles + 1) > LEVEL:
        # Rows that belong together have such a p as well: it says nothing of them.
        told.append(
            f"{n_shuffles} shuffles cannot tell whether rows belong together (p is at least "
            f"{1 / (n_shuffles + 1):.2f}): {LEAST_SHUFFLES} or more can"
        )
    elif p_value is not None and p_value > LEVEL:
        told.append(f"matches no better than shuffled rows (p = {p_value:.2f}): are the inputs the same, in one order?")
    dead = int((~found.live_in).sum()), int((~found.live_out).sum())
    if any(dead):
        told.append(f"{dead[0]} units of the first network and {dead[1]} of the second never vary and are left out")
    if total.n_rows < 4 * (total.d_in + (total.d_out or 0)):
        told.append(
            f"{total.n_rows} rows are few for {total.d_in} and {total.d_out} units: summaries are biased upward"
        )
    if seen.shuffled.size and seen.smallest < 16 and seen.n_items > seen.smallest:
        told.append(f"a batch of {seen.smallest} inputs hardly shuffles: the null is too high")
    return told


def _is_model(x: Any) -> bool:
    return hasattr(x, "named_modules") and hasattr(x, "parameters")


def _gather(
    a: Any, b: Any, inputs: Any, layers: Sequence[Any] | None, n_shuffles: int, label: str, options: dict
) -> dict[tuple[str, str], _Gathered]:
    """Go through all rows once."""
    seen: dict[tuple[str, str], _Gathered] = {}
    rng = np.random.default_rng([options["seed"], 3])
    if _is_model(a):
        batches = model_batches(a, b, inputs, layers or (), options)
    else:
        batches = array_batches(a, b, layers, options["batch_rows"])
    with Progress(label) as shown:
        for names, X, Y in batches:
            for side, x, name in (("a", X, names[0]), ("b", Y, names[1])):
                if not np.isfinite(x).all():
                    unit = int(np.argwhere(~np.isfinite(x))[0, 2])
                    raise ValueError(f"{side} must be finite, got NaN or infinity in unit {unit} of {name!r}")
            if names not in seen:
                seen[names] = _Gathered(X.shape[2], Y.shape[2], n_shuffles)
            seen[names].add(X, Y, rng)
            shown.advance()
    if not seen:
        raise ValueError("inputs must hold at least one batch, got none")
    return seen
