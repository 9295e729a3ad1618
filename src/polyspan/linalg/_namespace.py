"""Let one text serve NumPy arrays and torch tensors: their namespace, their working precision, their transpose."""

from collections.abc import Callable
from typing import Any

from array_api_compat import array_namespace, is_torch_array


def namespace(*arrays: Any) -> Any:
    """Return the array namespace that all ``arrays`` share; ``None`` entries are skipped.

    Lists and scalars, and NumPy arrays mixed with torch tensors, raise TypeError: a silent conversion would move data
    between devices or drop gradients.
    """
    try:
        return array_namespace(*(a for a in arrays if a is not None))
    except TypeError:
        kinds = ", ".join(f"{type(a).__module__}.{type(a).__name__}" for a in arrays if a is not None)
        raise TypeError(f"expected arrays of one kind, all NumPy arrays or all torch tensors, got {kinds}") from None


def is_torch(x: Any) -> bool:
    """Say whether ``x`` is a torch tensor, without importing torch when it is not."""
    return is_torch_array(x)


def widen(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return ``x`` in a precision LAPACK accepts, and the function that casts a result back to the dtype of ``x``.

    float16 and bfloat16 become float32, integers and booleans become float64 (whose results then stay float64);
    float32, float64 and complex arrays pass through untouched.
    """
    xp = namespace(x)
    if not xp.isdtype(x.dtype, ("real floating", "complex floating")):
        return xp.astype(x, xp.float64), lambda y: y
    if x.dtype.itemsize < 4:
        return xp.astype(x, xp.float32), lambda y: xp.astype(y, x.dtype)
    return x, lambda y: y


def swap(x: Any) -> Any:
    """Transpose the last two axes of ``x`` (*b, p, q) -> (*b, q, p)."""
    return namespace(x).matrix_transpose(x)


def detached(x: Any) -> Any:
    """Return ``x`` outside the autograd graph: for tests of convergence, and for scale factors that cancel."""
    return x.detach() if is_torch(x) else x


def identity(size: int, like: Any, num_columns: int | None = None) -> Any:
    """Return the identity matrix, or its first columns, in the kind, dtype and device of ``like``."""
    options = {"device": like.device} if is_torch(like) else {}
    return namespace(like).eye(size, num_columns, dtype=like.dtype, **options)
