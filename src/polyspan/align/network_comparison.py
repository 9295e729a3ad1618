"""Two networks compared unit by unit on the same inputs, with what chance alone would give beside every number."""

import copy
from collections.abc import Iterator, Mapping, Sequence
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
from .unit_bootstrap import BlockMoments
from .unit_matching import UnitCorrelations, UnitMatching, match_units, unit_correlations
from .unit_report import GroupSplit, LayerComparison, NetworkComparison, SparseRow
from .unit_sharing import ALPHAS, SparseUnitMapping, UnitCoClustering, support_stability, unexplained_share

NULLS = ("shuffle", "rotation", "scramble")
LEAST_ROWS = 8
LEVEL, LEAST_SHUFFLES = 0.05, 19
"""A p-value above the first is told; with fewer shuffles than the second none can be that small."""
LASSO_BOOTSTRAPS, LASSO_TARGETS = 10, 32
"""Draws and random targets over which the choice of units is compared: its mean needs no more, and each is a fit."""


def compare_networks(
    a: Any,
    b: Any,
    inputs: Any = None,
    *,
    layers: Sequence[Any] | None = None,
    untrained: tuple[Any, Any] | None = None,
    nulls: Sequence[str] = NULLS,
    n_shuffles: int = 20,
    n_bootstraps: int = 50,
    n_blocks: int = 20,
    alphas: Sequence[float] = ALPHAS,
    n_clusters: Any = "eigengap",
    reduce: str = "positions",
    channels: str = "auto",
    mask: str | None = None,
    max_positions: int | None = None,
    rows_per_item: int = 1,
    batch_rows: int = 65536,
    random_state: Any = None,
    label: str = "",
) -> NetworkComparison:
    r"""Say which units of two networks correspond one to one, few to one and many to many.

    Activations are seen once, in batches; what is kept are second moments, of (d_A + d_B)² numbers a layer and block of
    inputs, and one d_A d_B product a shuffle. Blocks of inputs are drawn again for standard errors: the positions of an
    image, which are not independent, stay together. Beside every matching stands what it finds where nothing
    corresponds:

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
    n_bootstraps : int
        Times that blocks are drawn again for standard errors, and at most 10 times for the stability of the few-to-one
        mappings, seen on 32 targets; 0 leaves both out.
    n_blocks : int
        Even, at least 4. With 20 a standard error is known to about 17 %, with 50 to 10 %; memory grows with it.
    alphas : sequence of float
        Penalties of the few-to-one mapping.
    n_clusters : int or "eigengap"
    reduce, channels : str
        See :class:`ActivationCollector`.
    mask : str, optional
        Key of mapping batches whose value (items, tokens) is 0 at padding, for instance ``"attention_mask"``: these
        positions are left out, and the others of one item stay together in halves, blocks and shuffles.
    max_positions : int, optional
        For models: take so many random positions of each batch, the same in both networks.
    rows_per_item : int
        For arrays: so many rows in a row are the positions of one input, in one order, and stay together as those of
        models do. Where rows that hang together are taken as inputs of their own, errors are too small.
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
    check_count("n_bootstraps", n_bootstraps, 0)
    check_count("n_blocks", n_blocks, 4)
    check_count("rows_per_item", rows_per_item)
    if n_blocks % 2 or n_bootstraps == 1:
        raise ValueError(f"n_blocks must be even and n_bootstraps not 1, got {n_blocks} and {n_bootstraps}")
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
    options |= {"batch_rows": batch_rows, "rows_per_item": rows_per_item, "seed": seed}
    options |= {"n_blocks": n_blocks if n_bootstraps else 2}
    models = _is_model(a)
    if models != _is_model(b):
        raise ValueError(f"a and b must both be models or both arrays, got {type(a).__name__} and {type(b).__name__}")
    if models and (inputs is None or layers is None):
        raise ValueError("inputs and layers must be given for models, got None")
    if models and rows_per_item != 1:
        raise ValueError(f"rows_per_item is for arrays; models give their positions, got {rows_per_item}")
    if models and iter(inputs) is inputs and ("scramble" in nulls or untrained is not None):
        raise ValueError("inputs must be something that starts again, as a list or DataLoader, got an iterator")
    gathered = _gather(a, b, inputs, layers, n_shuffles if "shuffle" in nulls else 0, label, options)
    others: dict[str, dict[tuple[str, str], _Gathered]] = {}
    if models and "scramble" in nulls:
        scrambled = [scrambled_copy(model, [seed, i]) for i, model in enumerate((a, b))]
        others["scramble"] = _gather(*scrambled, inputs, layers, 0, label, options | {"n_blocks": 2})
    if untrained is not None:
        others["untrained"] = _gather(*untrained, inputs, layers, 0, label, options | {"n_blocks": 2})
    found = []
    for i, (names, seen) in enumerate(gathered.items()):
        controls = {name: other[names] for name, other in others.items()}
        turn = np.random.default_rng([seed, 2, i]) if "rotation" in nulls else None
        found.append(_compare_layer(names, seen, controls, turn, alphas, n_clusters, n_bootstraps, seed))
    return NetworkComparison(layers=found)


class _Gathered:
    """Moments of blocks of the rows, and cross products of shuffled pairs, of one pair of layers."""

    def __init__(self, d_in: int, d_out: int, n_shuffles: int, n_blocks: int, rng: np.random.Generator):
        self.blocks = BlockMoments(d_in, d_out, n_blocks, rng)
        self.shuffled = np.zeros((n_shuffles, d_in, d_out))
        self.origin: tuple[np.ndarray, np.ndarray] | None = None
        self.smallest = np.inf

    @property
    def n_items(self) -> int:
        return self.blocks.n_items

    def add(self, X: np.ndarray, Y: np.ndarray, items: np.ndarray | None, rng: np.random.Generator) -> None:
        """Add paired activations, as :class:`BlockMoments` takes them; items alternate between the halves."""
        self.blocks.add(X, Y, items)
        n = len(X) if items is None else items[-1] + 1 if len(items) else 0
        self.smallest = min(self.smallest, n)
        if not len(self.shuffled):
            return
        X, Y = X.astype(np.float64), Y.astype(np.float64)
        if self.origin is None:
            self.origin = X.mean(axis=(0, 1)), Y.mean(axis=(0, 1))
        # About a point near the mean nothing is lost where the products' mean is taken off at the end.
        A, B = (X - self.origin[0]).reshape(-1, X.shape[2]).T, Y - self.origin[1]
        for i in range(len(self.shuffled)):
            order = rng.permutation(n)
            if items is not None:
                # Sequences change places, and their tokens stay in order, of whatever lengths they are.
                order = np.argsort(order[items], kind="stable")
            self.shuffled[i] += A @ B[order].reshape(-1, Y.shape[2])

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


def _together(halves: tuple[PairedMoments, PairedMoments]) -> PairedMoments:
    first, second = halves
    return PairedMoments(first.d_in, first.d_out).merge(first).merge(second)


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
    n_bootstraps: int,
    seed: int,
) -> LayerComparison:
    first, second = halves = seen.blocks.halves()
    total = _together(halves)
    if total.n_rows < LEAST_ROWS or not (first.n_rows >= 2 and second.n_rows >= 2):
        raise ValueError(f"a and b must have at least {LEAST_ROWS} rows, got {total.n_rows} sample(s)")
    found = unit_correlations(total)
    for side, live, name in (("a", found.live_in, names[0]), ("b", found.live_out, names[1])):
        if not live.any():
            raise ValueError(f"{side} must have a unit that varies, got none in {name!r}")
    matchings = match_units(found.between), match_units(found.between, method="semi")
    bipartite, semi = matchings
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
        nulls[name] = _mean(match_units(unit_correlations(_together(other.blocks.halves())).between).scores)
    numbers, _ = _numbers(halves, matchings)
    errors, own_errors = _errors(seen.blocks, matchings, n_bootstraps, seed)
    mapping = SparseUnitMapping(alpha=max(alphas), alphas=tuple(alphas)).fit_moments(first)
    stable = _stability(mapping, seen.blocks, found.live_out, n_bootstraps, seed)
    sparse = [
        SparseRow(
            alpha=float(alpha),
            half_mse=_held_out(mapping, i, first, second, total),
            n_units=float(mapping.n_nonzero_[i, found.live_out].mean()),
            stability=stable[i],
        )
        for i, alpha in enumerate(mapping.alphas_)
    ]
    groups = UnitCoClustering(n_clusters, random_state=seed).fit_correlations(found)
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
        nulls=nulls,
        p_value=p_value,
        n_above_null=int(np.sum(bipartite.scores[bipartite.indices >= 0] > max(best))) if best else None,
        sparse=sparse,
        clusters=[(int(p), int(q)) for p, q in groups.table_],
        hierarchy=_hierarchy(found, groups.n_clusters_),
        errors=errors,
        bipartite_errors=own_errors[0],
        semi_errors=own_errors[1],
        warnings=_warnings(seen, total, found, p_value),
        **numbers,
    )


def _numbers(
    halves: tuple[PairedMoments, PairedMoments], matchings: tuple[UnitMatching, UnitMatching]
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Return the numbers that sum a comparison up, by name, and each unit's correlation with its partners (d_A,)."""
    first, second = halves
    total = _together(halves)
    between = unit_correlations(total).between
    own = []
    for matching in matchings:
        paired = np.flatnonzero(matching.indices >= 0)
        scores = np.full(len(matching.indices), np.nan)
        scores[paired] = between[paired, matching.indices[paired]]
        own.append(scores)
    on = [unit_correlations(half).between for half in halves]
    learnt = match_units(on[0]).indices
    pairs = np.flatnonzero(learnt >= 0)
    favourite = match_units(on[0].T, method="semi", absolute=True).indices
    known = np.flatnonzero(favourite >= 0)
    ridge = ridge_from_moments(first)
    offset = ridge.mean_out - ridge.mean_in @ ridge.weights
    cca = cca_from_moments(total, rank=0.99)
    weights = np.abs(cca.weights_in.T @ total.cov_in).sum(axis=1)
    numbers = {
        "mean_bipartite": _mean(own[0]),
        "mean_semi": _mean(own[1]),
        "mean_held_out": _mean(on[1][pairs, learnt[pairs]]),
        "unexplained_single": 1 - _mean(on[1][favourite[known], known] ** 2),
        "unexplained_all": _mean(unexplained_share(second, ridge.weights, offset, total)),
        "cka": linear_cka_from_moments(total),
        "svcca": float(np.mean(cca.correlations)),
        "pwcca": float(weights @ cca.correlations / weights.sum()),
    }
    return numbers, own


def _errors(
    blocks: BlockMoments, matchings: tuple[UnitMatching, UnitMatching], n_bootstraps: int, seed: int
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Return standard errors of what :func:`_numbers` gives, over blocks that are drawn again."""
    rng, drawn = np.random.default_rng([seed, 6]), []
    if not n_bootstraps:
        return {}, [np.full(len(matching.indices), np.nan) for matching in matchings]
    for _ in range(n_bootstraps):
        drawn.append(_numbers(blocks.redrawn(rng), matchings))
    factor = blocks.inflation

    def spread(told: np.ndarray) -> np.ndarray:
        # Where a unit never varies in some draw, the others tell.
        there = np.isfinite(told)
        n = there.sum(axis=0)
        mean = np.where(there, told, 0.0).sum(axis=0) / np.maximum(n, 1)
        squares = np.where(there, (told - mean) ** 2, 0.0).sum(axis=0)
        return factor * np.sqrt(np.divide(squares, n - 1, out=np.full(squares.shape, np.nan), where=n > 1))

    errors = spread(np.array([list(numbers.values()) for numbers, _ in drawn]))
    own = [spread(np.stack([scores[i] for _, scores in drawn])) for i in range(2)]
    return dict(zip(drawn[0][0], errors.tolist(), strict=True)), own


def _stability(
    mapping: SparseUnitMapping, blocks: BlockMoments, live: np.ndarray, n_bootstraps: int, seed: int
) -> list[float | None]:
    """Return, by penalty, how far few-to-one mappings choose the same units where inputs are drawn again."""
    if not n_bootstraps:
        return [None] * len(mapping.alphas_)
    rng = np.random.default_rng([seed, 7])
    targets = np.sort(rng.permutation(np.flatnonzero(live))[:LASSO_TARGETS])
    resamples = (blocks.redrawn(rng)[0] for _ in range(min(n_bootstraps, LASSO_BOOTSTRAPS)))
    return [float(value) for value in support_stability(mapping, resamples, targets).mean(axis=1)]


def _hierarchy(found: UnitCorrelations, k: int) -> list[GroupSplit]:
    """Cut all units in two, again and again, into k groups, and count each side of each cut."""
    made = UnitCoClustering(k, method="recursive").fit_correlations(found)
    sizes = dict(zip(made.leaves_.tolist(), made.table_.tolist(), strict=True))
    for number in reversed(range(k - 1)):
        sides = sizes[2 * number + 1], sizes[2 * number + 2]
        sizes[int(made.splits_[number])] = [p + q for p, q in zip(*sides, strict=True)]
    return [
        GroupSplit(int(node), float(cut), tuple(sizes[2 * i + 1]), tuple(sizes[2 * i + 2]))
        for i, (node, cut) in enumerate(zip(made.splits_, made.cuts_, strict=True))
    ]


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
        batches = array_batches(a, b, layers, options)
    with Progress(label) as shown:
        for names, X, Y, items in batches:
            for side, x, name in (("a", X, names[0]), ("b", Y, names[1])):
                if not np.isfinite(x).all():
                    unit = int(np.argwhere(~np.isfinite(x))[0, 2])
                    raise ValueError(f"{side} must be finite, got NaN or infinity in unit {unit} of {name!r}")
            if names not in seen:
                dealing = np.random.default_rng([options["seed"], 5, len(seen)])
                seen[names] = _Gathered(X.shape[2], Y.shape[2], n_shuffles, options["n_blocks"], dealing)
            seen[names].add(X, Y, items, rng)
            shown.advance()
    if not seen:
        raise ValueError("inputs must hold at least one batch, got none")
    return seen
