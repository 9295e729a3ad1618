"""Activations of two networks on the same inputs, batch by batch, from arrays, files or models."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import read_array

from .unit_activations import ActivationCollector

CHUNK = 1024


def _pairs(layers: Sequence[Any]) -> list[tuple[str, str]]:
    return [(layer, layer) if isinstance(layer, str) else (str(layer[0]), str(layer[1])) for layer in layers]


Batch = tuple[tuple[str, str], np.ndarray, np.ndarray, np.ndarray | None]
"""Names of a pair of layers, activations (items, positions, units) of both, and what item a token is of, or None."""


def array_batches(a: Any, b: Any, layers: Sequence[Any] | None, options: dict) -> Iterator[Batch]:
    """Yield batches (items, positions, units) that each span the whole table, so that sorted rows are shuffled well."""
    batch_rows, together = options["batch_rows"], options["rows_per_item"]
    sides = [{name: _table(x, name, side) for name, x in _named(given).items()} for side, given in (("a", a), ("b", b))]
    if layers is not None:
        names = _pairs(layers)
    elif all(len(side) == 1 for side in sides):
        names = [(next(iter(sides[0])), next(iter(sides[1])))]
    else:
        names = [(name, name) for name in sides[0] if name in sides[1]]
    if not names:
        raise ValueError(f"a and b must have a name in common, got {sorted(sides[0])} and {sorted(sides[1])}")
    for first, second in names:
        for side, name, label in ((sides[0], first, "a"), (sides[1], second, "b")):
            if name not in side:
                raise ValueError(f"layers must be names in {label}, {sorted(side)}, got {name!r}")
        X, Y = sides[0][first], sides[1][second]
        if len(X) != len(Y):
            raise ValueError(f"a and b must have one row an input, got {len(X)} and {len(Y)} rows in {first!r}")
        if len(X) % together:
            raise ValueError(f"rows_per_item must divide the {len(X)} rows of {first!r}, got {together}")
        n_batches = -(-len(X) // batch_rows)
        size = max(min(CHUNK, batch_rows) // together, 1) * together
        starts = range(0, len(X), size)
        for i in range(min(n_batches, len(starts))):
            mine = [slice(start, start + size) for start in starts[i::n_batches]]
            rows, partners = (np.concatenate([np.asarray(Z[part]) for part in mine]) for Z in (X, Y))
            rows, partners = (Z.reshape(-1, together, Z.shape[1]) for Z in (rows, partners))
            yield (first, second), rows, partners, None


def _named(given: Any) -> dict[str, Any]:
    return dict(given) if isinstance(given, Mapping) else {"units": given}


def _table(x: Any, name: str, side: str) -> np.ndarray:
    if isinstance(x, str | Path):
        return read_array(x, finite=False)
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x if x.element_size() >= 4 else x.float()).numpy()
    x = np.asarray(x)
    if x.ndim != 2 or 0 in x.shape or x.dtype.kind not in "fiub":
        raise ValueError(f"{side} must hold numbers of shape (n, d), got {x.shape} {x.dtype} for {name!r}")
    return x


def model_batches(a: Any, b: Any, inputs: Any, layers: Sequence[Any], options: dict) -> Iterator[Batch]:
    """Yield batches of every pair of layers, as both models run on the same inputs."""
    names = _pairs(layers)
    if not names:
        raise ValueError("layers must name at least one layer, got none")
    rng = np.random.default_rng([options["seed"], 4])
    how = {"reduce": options["reduce"], "channels": options["channels"]}
    sides = [sorted({pair[i] for pair in names}) for i in range(2)]
    with ActivationCollector(a, sides[0], **how) as left, ActivationCollector(b, sides[1], **how) as right:
        for batch in _batches(inputs):
            caught = left(batch), right(batch)
            for first, second in names:
                X, Y = caught[0][first], caught[1][second]
                if X.shape[:2] != Y.shape[:2]:
                    raise ValueError(
                        f"layers must give as many items and positions in both networks, got {X.shape[:2]} in "
                        f"{first!r} and {Y.shape[:2]} in {second!r}; reduce='mean' averages positions"
                    )
                yield (first, second), *_kept(X, Y, batch, rng, options)


def _kept(X: np.ndarray, Y: np.ndarray, batch: Any, rng: np.random.Generator, options: dict):
    """Leave out padding, so that tokens stand in one column with the numbers of their items, or positions beyond."""
    if options["mask"] is not None:
        if not isinstance(batch, Mapping) or options["mask"] not in batch:
            raise ValueError(f"mask must be a key of every batch, got {options['mask']!r}")
        keep = np.asarray(batch[options["mask"]]) != 0
        if keep.shape != X.shape[:2]:
            raise ValueError(f"mask must have shape (items, tokens) {X.shape[:2]}, got {keep.shape}")
        return X[keep][:, None], Y[keep][:, None], np.nonzero(keep)[0]
    most = options["max_positions"]
    if most is not None and most < X.shape[1]:
        at = np.sort(rng.choice(X.shape[1], size=most, replace=False))
        return X[:, at], Y[:, at], None
    return X, Y, None


def _batches(inputs: Any) -> Iterable[Any]:
    """Split a tensor or an array into batches of 256; pass batches through."""
    import torch

    if isinstance(inputs, np.ndarray):
        inputs = torch.as_tensor(inputs)
    return inputs.split(256) if isinstance(inputs, torch.Tensor) else inputs


def scrambled_copy(model: Any, seed: list[int]) -> Any:
    """Copy a model and put the entries of every parameter in random order: sizes stay, what was learnt goes."""
    import torch

    made = copy.deepcopy(model)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            order = torch.as_tensor(rng.permutation(parameter.numel()), device=parameter.device)
            parameter.copy_(parameter.reshape(-1)[order].reshape(parameter.shape))
    return made
