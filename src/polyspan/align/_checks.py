"""What numbers and rows the systems of this family take, and how they say that they do not."""

import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np

LARGEST, SMALLEST = 1e140, 1e-140
"""Between them sums of squares keep all their digits in float64."""


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number, or below ``least``."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """Refuse what is no finite number of at least 0, or with ``positive`` above 0."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not np.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    if positive and value == 0:
        raise ValueError(f"{name} must be positive, got {value!r}")


def check_kind(X: Any, name: str, stacklevel: int = 2) -> None:
    """Refuse dates, texts and records, which would be turned into numbers without a word; warn of 8-bit codes."""
    dtype = getattr(X, "dtype", None)
    kind = getattr(dtype, "kind", "f")
    if kind in "mMSUV":
        raise ValueError(f"{name} must hold real numbers, got {dtype}")
    if kind in "iu" and dtype is not None and dtype.itemsize == 1:
        warnings.warn(
            f"{name} holds {dtype}: quantised codes are taken as they stand; bring them back to the vectors' own scale "
            "and offset first",
            stacklevel=stacklevel + 1,
        )


def check_squares(X: np.ndarray, name: str) -> None:
    """Refuse rows whose sums of squares would overflow or vanish."""
    if not X.size:
        return
    most = max(float(X.max()), -float(X.min()))
    if most > LARGEST or 0 < most < SMALLEST:
        raise ValueError(
            f"{name} must be of a size whose squares fit into float64 ({SMALLEST:g} to {LARGEST:g}), got values up to "
            f"{most:.3g}: scale it"
        )


def finite_rows(X: Any, name: str, *, keep: bool = False) -> np.ndarray:
    """Return finite rows (m, d), m at least 1: float64, or with ``keep`` in their own width where that is float32.

    A flat array is a column.
    """
    X = np.asarray(X)
    if X.dtype.kind not in "fiubO":
        raise ValueError(f"{name} must hold real numbers, got {X.dtype}")
    if not X.size:
        raise ValueError(f"{name} must hold at least one row and one feature, got shape {X.shape}")
    X = X.reshape(len(X), -1) if X.ndim else X.reshape(1, 1)
    X = X.astype(X.dtype if keep and X.dtype in (np.float32, np.float64) else np.float64, copy=False)
    if not np.isfinite(X).all():
        row = int(np.argmin(np.isfinite(X).all(axis=1)))
        raise ValueError(f"{name} must be finite, got NaN or infinity at row {row}")
    return X


def checked_weights(sample_weight: Any, n: int) -> np.ndarray | None:
    """Return one weight a row, or None."""
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape not in ((), (1,), (n,)):
        raise ValueError(f"sample_weight must be one number, or {n} of them, one a row, got shape {weights.shape}")
    weights = np.broadcast_to(weights, (n,))
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
        raise ValueError("sample_weight must be finite, non-negative and not all zero, got other values")
    return weights


def check_labels(labels: Any, name: str) -> np.ndarray:
    """Return classes of any one kind that can be told apart: no NaN, and no mixture such as numbers and None."""
    found = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if found.dtype.kind == "f" and np.isnan(found).any():
        raise ValueError(f"{name} must have no NaN, got one at row {int(np.argmax(np.isnan(found)))}")
    if found.dtype.kind == "O" and len({type(mark) for mark in found.ravel()}) > 1:
        kinds = sorted({type(mark).__name__ for mark in found.ravel()})
        raise ValueError(f"{name} must be of one kind, got {', '.join(kinds)}")
    return found


def scale_rows(X: np.ndarray, *, slack: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return rows (m, d) scaled to length 1, and their lengths (m, 1); rows of zeros stay.

    Rows whose squares overflow or vanish are brought to a middling size first. Rows whose length is within ``slack`` of
    1 are left bit for bit.
    """
    with np.errstate(over="ignore", under="ignore"):
        lengths = np.linalg.norm(X, axis=1, keepdims=True)
    limits = np.finfo(X.dtype)
    low, high = float(limits.tiny) ** 0.5 / float(limits.eps), float(limits.max) ** 0.5 * float(limits.eps)
    odd = np.flatnonzero(~((lengths[:, 0] > low) & (lengths[:, 0] < high)))
    divisors = np.where(np.abs(lengths - 1) <= slack, lengths.dtype.type(1), lengths) if slack else lengths.copy()
    divisors[odd] = 1
    made = X / divisors
    if len(odd):
        most = np.abs(X[odd]).max(axis=1, keepdims=True)
        rows = X[odd] / np.where(most > 0, most, 1)
        inner = np.linalg.norm(rows, axis=1, keepdims=True)
        made[odd] = rows / np.where(inner > 0, inner, 1)
        with np.errstate(over="ignore"):
            lengths[odd] = most * inner
    return made, lengths


def rms_length(A: np.ndarray) -> float:
    """Return the root mean square length of rows, or 1 where all are zero: what to divide by to lose the unit."""
    return float(np.sqrt(np.mean(np.sum(A**2, axis=1)))) or 1.0
