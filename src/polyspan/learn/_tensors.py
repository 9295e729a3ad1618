"""Torch tensors, wherever they are, as the arrays that columns and rows are read from."""

from typing import Any


def as_array(X: Any) -> Any:
    """Return a torch tensor as an array, of bfloat16 in float32, which holds it exactly; other objects as they are.

    NumPy by itself refuses tensors on a device, those with a gradient, and bfloat16.
    """
    if not hasattr(X, "detach"):
        return X
    X = X.detach().cpu()
    return (X.float() if str(X.dtype) == "torch.bfloat16" else X).numpy()
