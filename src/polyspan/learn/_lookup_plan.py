"""Where each feature reads the table: salts, ranges of rows, and the row of a key, in NumPy and torch alike."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ._text_hashing import BLOCK, FIRST, GOLDEN, MASK, SECOND, hash_bytes, mix_in_place, mix_int

SCHEMES = {
    "multiplex": ("shared", "hash"),
    "multihash": ("shared", "sum"),
    "qr": ("shared", "product"),
    "hash": ("split", "hash"),
    "split-multihash": ("split", "sum"),
    "split-qr": ("split", "product"),
    "collisionless": ("own", "hash"),
}
"""Scheme: which rows a feature may use, and how the rows of one lookup make one chunk."""
COMBINERS = ("mean", "sum", "none")


@dataclass(frozen=True)
class FeatureSpec:
    """How one feature reads the table.

    Parameters
    ----------
    n_lookups : int
        Chunks; the feature's width is ``n_lookups * chunk_dim``.
    salt_group : str, optional
        Features of one group send equal values to equal rows. Left out, a feature shares with none.
    max_len : int, optional
        The feature is a list of at most this many values; left out, it has one value.
    combiner : {"mean", "sum", "none"}
        Of a list's values; "none" keeps every place apart.
    vocabulary_size : int, optional
        Number of distinct values, by which the schemes that split the table share it out.
    """

    n_lookups: int = 1
    salt_group: str | None = None
    max_len: int | None = None
    combiner: str = "mean"
    vocabulary_size: int | None = None

    def __post_init__(self):
        for name in ("n_lookups", "max_len", "vocabulary_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.combiner not in COMBINERS:
            raise ValueError(f"combiner must be one of {COMBINERS}, got {self.combiner!r}")

    @property
    def length(self) -> int:
        """Keys that the feature takes."""
        return self.max_len or 1


class LookupPlan(NamedTuple):
    """One entry a row that is read, all (s,): column of the key, salt, number of rows, and the first of them."""

    column: np.ndarray
    salt: np.ndarray
    size: np.ndarray
    offset: np.ndarray


def as_specs(features: Mapping[str, Any]) -> dict[str, FeatureSpec]:
    """Return one spec a feature, from numbers of lookups or specs.

    Raises
    ------
    ValueError
        There is no feature, or one is neither.
    """
    if not features:
        raise ValueError("features must name at least one feature, got none")
    made = {}
    for name, spec in features.items():
        if not isinstance(spec, FeatureSpec | int) or isinstance(spec, bool):
            raise ValueError(f"features[{name!r}] must be a number of lookups or a FeatureSpec, got {spec!r}")
        made[str(name)] = spec if isinstance(spec, FeatureSpec) else FeatureSpec(spec)
    if len(made) != len(features):
        raise ValueError(f"features must have distinct names, got {[str(name) for name in features]}")
    return made


def salt_of(group: str, lookup: int, seed: int) -> int:
    """Return the 64-bit salt of one lookup of a salt group: of its name alone, never of the order of features."""
    return mix_int(hash_bytes(group.encode()) ^ mix_int(((seed & MASK) * GOLDEN + lookup + 1) & MASK))


def check_table(num_embeddings: int, n_shards: int, n_lookups: int, scheme: str) -> None:
    """Refuse sizes of the table that cannot be, and warn of one that is too small to tell features apart.

    Raises
    ------
    ValueError
        The scheme is unknown, the table has fewer than 2 rows a shard or 2³¹ rows and more, or shards do not divide it.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {tuple(SCHEMES)}, got {scheme!r}")
    if n_shards < 1 or num_embeddings % n_shards:
        raise ValueError(f"n_shards must be at least 1 and divide {num_embeddings} rows, got {n_shards}")
    if n_shards > 1 and scheme != "multiplex":
        raise ValueError(f"n_shards must be 1 with scheme {scheme!r}, got {n_shards}")
    if not 2 * n_shards <= num_embeddings < 2**31:
        raise ValueError(
            f"the table must have at least 2 rows a shard and fewer than 2**31 rows, got {num_embeddings} in {n_shards}"
        )
    if num_embeddings < n_lookups and scheme != "collisionless":
        warnings.warn(
            f"the table has {num_embeddings} rows for {n_lookups} lookups: nearly every value shares its rows",
            stacklevel=4,
        )


def lookup_plan(
    specs: Mapping[str, FeatureSpec],
    num_embeddings: int,
    *,
    scheme: str = "multiplex",
    n_shards: int = 1,
    seed: int = 0,
) -> LookupPlan:
    """Lay out every row that is read: by feature, then place in its list, then lookup, then row of the lookup."""
    layout, base = SCHEMES[scheme]
    ranges = _split(specs, num_embeddings) if layout == "split" else dict.fromkeys(specs, (0, num_embeddings))
    per_shard = num_embeddings // n_shards
    entries: list[tuple[int, int, int, int]] = []
    column = 0
    for name, spec in specs.items():
        first, rows = ranges[name]
        group = spec.salt_group or name
        for _ in range(spec.length):
            for lookup in range(spec.n_lookups):
                if layout == "split":
                    # A table of n_lookups * d wide rows: all its chunks are found by one hash.
                    start, size, number = first + lookup * (rows // spec.n_lookups), rows // spec.n_lookups, 0
                else:
                    shard = (hash_bytes(group.encode()) + lookup) % n_shards
                    start, size, number = shard * per_shard, per_shard, lookup
                if base == "hash":
                    entries.append((column, salt_of(group, number, seed), size, start))
                    continue
                half = size // 2 if base == "product" else size
                second = (start + half, size - half) if base == "product" else (start, size)
                entries.append((column, salt_of(group, 2 * number, seed), half, start))
                entries.append((column, salt_of(group, 2 * number + 1, seed), second[1], second[0]))
            column += 1
    columns, salts, sizes, offsets = zip(*entries, strict=True)
    signed = np.array(salts, np.uint64).view(np.int64)
    return LookupPlan(np.array(columns), signed, np.array(sizes, np.int64), np.array(offsets, np.int64))


def _split(specs: Mapping[str, FeatureSpec], num_embeddings: int) -> dict[str, tuple[int, int]]:
    """Share the rows out in proportion to vocabularies (all equal where unknown), at least 2 a lookup."""
    need = np.array([2 * spec.n_lookups for spec in specs.values()])
    if need.sum() > num_embeddings:
        raise ValueError(f"num_embeddings must be at least {need.sum()} to be split, got {num_embeddings}")
    sizes = [spec.vocabulary_size or 1 for spec in specs.values()]
    if any(spec.vocabulary_size is None for spec in specs.values()):
        sizes = [1] * len(sizes)
    weights = np.array(sizes, float) * [spec.n_lookups for spec in specs.values()]
    bounds = np.round(np.concatenate([[0], np.cumsum(weights) / weights.sum()]) * (num_embeddings - need.sum()))
    rows = np.diff(bounds).astype(int) + need
    starts = np.concatenate([[0], np.cumsum(rows)[:-1]])
    return {name: (int(start), int(count)) for name, start, count in zip(specs, starts, rows, strict=True)}


def rows_of(keys: np.ndarray, plan: LookupPlan, *, out: np.ndarray | None = None) -> np.ndarray:
    """Return the rows (n, s) of keys (n, columns) int64: the top 32 bits of the salted hash, scaled to the range.

    They are written to ``out`` (n, s) where it is given, which may be the keys of one column with one lookup.
    """
    salt, size, offset = plan.salt.view(np.uint64), plan.size.astype(np.uint64), plan.offset.astype(np.uint64)
    n, s, half = len(keys), len(salt), np.uint64(32)
    made = np.empty((n, s), np.uint64) if out is None else out.view(np.uint64)
    step = max(1, BLOCK // s)
    powers = [int(number).bit_length() - 1 for number in size]
    # A range of 2^p rows takes the highest p bits, of which there are less than 31.
    highest = np.array([64 - p for p in powers], np.uint64) if all(size == [2**p for p in powers]) else None

    spare = np.empty((min(step, n), s), np.uint64)
    for at in range(0, n, step):
        some, h = keys[at : at + step].view(np.uint64), made[at : at + step]
        # The keys of one column are as many as its lookups need by broadcasting.
        np.bitwise_xor(some if some.shape[1] == 1 else some[:, plan.column], salt, out=h)
        mix_in_place(h, spare[: len(h)], high_bits_only=highest is not None)
        if highest is not None:
            np.right_shift(h, highest, out=h)
        else:
            np.right_shift(h, half, out=h)
            np.multiply(h, size, out=h)
            np.right_shift(h, half, out=h)
        if offset.any():
            np.add(h, offset, out=h)
    return made.view(np.int64)


def rows_of_tensor(keys: Any, salt: Any, size: Any, offset: Any) -> Any:
    """Return :func:`rows_of` for torch tensors (..., s) int64, whose products wrap and whose shifts carry the sign."""
    x = keys ^ salt
    x = _folded(x, 30).mul_(_signed(FIRST))
    x = _folded(x, 27).mul_(_signed(SECOND))
    x = _folded(x, 31)
    return x.bitwise_right_shift_(32).bitwise_and_(2**32 - 1).mul_(size).bitwise_right_shift_(32).add_(offset)


def _folded(x: Any, n: int) -> Any:
    """Return ``x ^ (x >> n)`` with a shift that brings zeros in; made in place, for hashing is bound by memory."""
    return (x >> n).bitwise_and_(2 ** (64 - n) - 1).bitwise_xor_(x)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
