"""Principal directions of classes of features about the origin, from rows of every kind."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def leading_directions(X: Any, members: np.ndarray, k: int, normalize: bool, block_rows: int) -> Tensor:
    """Up to k orthonormal rows (r, d) that span most of a class's features; fewer where these have lower rank."""
    d = X.shape[1]
    narrow = len(members) <= d
    gram = torch.zeros(d, d, dtype=torch.float64)
    block = torch.zeros(0, d, dtype=torch.float64)
    for start in range(0, len(members), max(block_rows, d)):
        block = _rows(X, members[start : start + max(block_rows, d)])
        if normalize:
            block = _unit_rows(block)
        if not narrow:
            gram += block.T @ block
    if narrow:
        _, s, Vh = torch.linalg.svd(block, full_matrices=False)
    else:
        values, vectors = torch.linalg.eigh(gram)
        s, Vh = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1).T
    # Below this share a direction is rounding error of float32 features.
    found = int((s > 1e-6 * s.max()).sum()) if len(s) and s.max() > 0 else 0
    rows = Vh[: min(k, found)]
    if not len(rows):
        return rows.reshape(0, d)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0)


def refuse_unless_finite(X: Any, block_rows: int) -> None:
    """Refuse features with NaN or infinity, by their rows, before any is used."""
    wrong: list[int] = []
    for start in range(0, X.shape[0], block_rows):
        part = _rows(X, np.arange(start, min(start + block_rows, X.shape[0])))
        wrong += (start + (~torch.isfinite(part).all(dim=1)).nonzero().flatten()).tolist()
    if wrong:
        raise ValueError(f"X must be finite, got NaN or infinity in {len(wrong)} rows, such as {wrong[:10]}")


def _rows(X: Any, places: np.ndarray) -> Tensor:
    """Rows of a tensor, an array, a memory map or a CSR matrix, as float64 on the CPU."""
    if isinstance(X, Tensor):
        return X[torch.as_tensor(places, device=X.device)].to("cpu", torch.float64)
    taken = X[places]
    taken = taken.toarray() if hasattr(taken, "toarray") else taken
    return torch.as_tensor(np.asarray(taken, dtype=np.float64))


def _unit_rows(block: Tensor) -> Tensor:
    """Return the directions of rows; rows whose squares would leave the range of float64 are scaled before."""
    size = block.abs().amax(dim=1, keepdim=True)
    odd = (size > 0) & ((size < 1e-100) | (size > 1e100))
    block = block / torch.where(odd, size, 1.0)
    norm = torch.linalg.vector_norm(block, dim=1, keepdim=True)
    return block / torch.where(norm > 0, norm, 1.0)
