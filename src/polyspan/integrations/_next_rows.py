"""Next vectors of an upgrade: what makes them, for which items an encoder does, and how far they may lie off."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from polyspan.align import Aligner

from .encoders import Encoder
from .vector_tables import TableBatch

AGREES = 2e-3
"""How far a vector may lie from what is expected, as a share of its length: float16 needs so much."""


class Maker:
    """Makes next vectors of a batch: by the map where there is one, else by the encoder."""

    def __init__(self, aligner: Aligner | None, encoder: Encoder | None, texts: Any, unit: bool):
        self.aligner, self.encoder, self._texts, self._unit = aligner, encoder, texts, unit

    def __call__(self, batch: TableBatch) -> np.ndarray:
        """Return next vectors (b, dim) in the float width of the batch."""
        if self.aligner is None:
            return self.embed(self._texts(batch))
        return self._scaled(self.aligner.transform(batch.rows))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return what the encoder makes of texts, (b, dim)."""
        assert self.encoder is not None
        return self._scaled(self.encoder(texts))

    def _scaled(self, rows: np.ndarray) -> np.ndarray:
        if not self._unit:
            return rows
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(norms > 0, norms, 1)


class Chosen:
    """Which items are embedded again: a share of all keys by a hash of the key, or those of ``kept`` hashes, sorted."""

    def __init__(self, share: float, seed: int, kept: np.ndarray | None = None):
        self.share, self.seed, self._kept = share, seed, kept

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        """Return whether each key (b,) is among them."""
        if self._kept is not None:
            numbers = key_numbers(keys, self.seed)
            at = np.searchsorted(self._kept, numbers)
            return np.append(self._kept, -1)[at] == numbers
        if self.share in (0.0, 1.0):
            return np.full(len(keys), bool(self.share))
        return key_numbers(keys, self.seed) < self.share * 2**56


def key_numbers(keys: np.ndarray, seed: int) -> np.ndarray:
    """Return a whole number below 2^56 for each key (b,) that hangs on key and seed alone."""
    digests = (hashlib.blake2b(json.dumps([seed, key]).encode(), digest_size=7).digest() for key in plain_keys(keys))
    return np.fromiter((int.from_bytes(digest) for digest in digests), np.int64, len(keys))


def plain_keys(keys: np.ndarray) -> list[Any]:
    """Return keys as ints or text, which JSON can say."""
    return [key if isinstance(key, int | str) else str(key) for key in keys.tolist()]


def row_distances(rows: np.ndarray, wanted: np.ndarray, unit: bool) -> np.ndarray:
    """Return how far rows lie from what is wanted, as a share of its length; of directions where lengths are gone."""
    wanted = np.asarray(wanted, dtype=np.float64)
    norms = np.linalg.norm(wanted, axis=1)
    rows = np.asarray(rows, dtype=np.float64)
    if unit:
        wanted = wanted / np.where(norms > 0, norms, 1)[:, None]
        norms = np.ones(len(wanted))
    return np.linalg.norm(rows - wanted, axis=1) / np.where(norms > 0, norms, 1)
