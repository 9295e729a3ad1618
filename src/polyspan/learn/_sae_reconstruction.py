"""How well rows come back from their sparse codes, summed over batches."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np


class Reconstruction(NamedTuple):
    """How well rows come back.

    ``unexplained`` is the share of the variance that is missing, 0 is exact; ``mse`` the mean squared length of what is
    missing; ``n_active`` the mean number of latents that fire; ``cosine`` the mean cosine of rows and reconstructions;
    ``silent_share`` in [0, 1] are latents that fire in no row.
    """

    unexplained: float
    mse: float
    n_active: float
    cosine: float
    silent_share: float


def reconstruction(batches: Iterable[tuple[np.ndarray, Any, np.ndarray]], num_latents: int) -> Reconstruction:
    """Return the report of batches of rows (b, d), their codes as CSR arrays (b, m), and what is made of those."""
    n = missing = cosine = active = 0.0
    total = square = 0.0
    fired = np.zeros(num_latents, bool)
    shift = None
    for rows, codes, back in batches:
        wide, made = rows.astype(np.float64), back.astype(np.float64)
        shift = wide.mean(axis=0) if shift is None else shift
        missing += float(np.square(wide - made).sum())
        lengths = np.linalg.norm(wide, axis=1) * np.linalg.norm(made, axis=1)
        cosine += float(((wide * made).sum(axis=1) / np.where(lengths > 0, lengths, 1)).sum())
        total = total + (wide - shift).sum(axis=0)
        square += float(np.square(wide - shift).sum())
        active += codes.nnz
        fired[np.unique(codes.indices)] = True
        n += len(rows)
    variance = square - float(np.square(total).sum()) / n
    return Reconstruction(
        missing / variance if variance > 0 else float(missing > 0),
        missing / n,
        active / n,
        cosine / n,
        float(1 - fired.mean()),
    )
