"""Pictures of a fitted map."""

from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import picture_path, write_picture

from ._aligner import Aligner
from ._checks import scale_rows


def plot_alignment(aligner: Aligner, X: Any, Y: Any, path: Path | str) -> Path:
    """Draw the spectrum of the cross-covariance and the cosines of pairs before and after the map.

    Parameters
    ----------
    aligner : Aligner
        Fitted.
    X, Y : arrays of shape (n, d_A) and (n, d_B)
        Paired rows; the spectrum is of rows scaled to length 1 where the map was fitted on such.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    X, Y = np.asarray(X), np.asarray(Y)
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        A, B = (scale_rows(np.asarray(rows, np.float64))[0] if aligner.normalize else rows for rows in (X, Y))
        A, B = A - A.mean(axis=0), B - B.mean(axis=0)
        left.semilogy(np.maximum(np.linalg.svd(A.T @ B, compute_uv=False), 1e-300), color="#2b6cb0")
        left.set(title="Cross-covariance", xlabel="direction", ylabel="singular value")
        bins = np.linspace(-1, 1, 61)
        if X.shape[1] == Y.shape[1]:
            right.hist(_cosines(X, Y), bins=bins, alpha=0.6, color="#a0aec0", label="before")
        right.hist(_cosines(aligner.transform(X), Y), bins=bins, alpha=0.7, color="#2f855a", label="after")
        right.set(title="Cosine of each pair", xlabel="cosine", ylabel="pairs")
        right.legend()
        write_picture(figure, path)
    return path


def _cosines(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(A, axis=1) * np.linalg.norm(B, axis=1)
    return np.sum(A * B, axis=1) / np.where(norms > 0, norms, 1.0)
