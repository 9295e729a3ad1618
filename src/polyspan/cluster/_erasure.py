"""Linear maps that take out of features what tells their position: from running sums, or by descent on rows."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import eigh, solve

from polyspan.linalg import PairedMoments

# A direction whose share of a round's weights is below this is rounding, not a direction.
TINY = 1e-9


class Erasure(NamedTuple):
    """The map ``x @ projector.T + offset``, which is x less ``left right^T (x - centre)``; R² before and after."""

    projector: np.ndarray
    offset: np.ndarray
    left: np.ndarray
    right: np.ndarray
    centre: np.ndarray
    curve: list[float]


def ridge_rounds(m: PairedMoments, *, n_rounds: int, alpha: float, stop: float | None) -> Erasure:
    """Regress and project, round by round, on the sums alone."""
    d = len(m.mean_in)
    B, S, C = np.zeros((d, 0)), m.cov_in, m.cross
    curve = [explained(m, S, C, d, alpha)]
    for _ in range(n_rounds):
        if stop is not None and curve[-1] <= stop:
            break
        fresh = _directions(_ridge(S, C, penalty(m, alpha)), B)
        if not fresh.shape[1]:
            break
        B = np.concatenate([B, fresh], axis=1)
        # Sums of projected rows are projected sums: no second pass.
        half = m.cov_in - B @ (B.T @ m.cov_in)
        S = half - (half @ B) @ B.T
        S, C = (S + S.T) / 2, m.cross - B @ (B.T @ m.cross)
        curve.append(explained(m, S, C, d - B.shape[1], alpha))
    return Erasure(np.eye(d) - B @ B.T, np.zeros(d), B, B, np.zeros(d), curve)


def sgd_rounds(
    m: PairedMoments,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    n_rounds: int,
    alpha: float,
    stop: float | None,
    orthogonal: bool,
    epochs: int,
    learning_rate: float,
    batch_rows: int,
    seed: int,
) -> Erasure:
    """Train each round as published, on rows and targets that all stand in memory."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows, targets = zip(*blocks, strict=True)
    X, T = (torch.as_tensor(np.concatenate(part).astype(np.float32)) for part in (rows, targets))
    n, d, t = len(X), X.shape[1], T.shape[1]
    A, B = np.eye(d), np.zeros((d, 0))
    curve = [explained(m, m.cov_in, m.cross, d, alpha)]
    batch = min(batch_rows, n)
    for _ in range(n_rounds):
        if stop is not None and curve[-1] <= stop:
            break
        W = torch.empty(t, d).uniform_(-(d**-0.5), d**-0.5, generator=generator).requires_grad_()
        optimizer = torch.optim.AdamW([W], lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-n // batch))
        for _ in range(epochs):
            order = torch.randperm(n, generator=generator)
            for start in range(0, n, batch):
                part = order[start : start + batch]
                optimizer.zero_grad(set_to_none=True)
                (torch.sigmoid(X[part] @ W.T) - T[part]).square().mean().backward()
                optimizer.step()
                schedule.step()
        U = _directions(W.detach().double().numpy().T, B if orthogonal else np.zeros((d, 0)))
        if not U.shape[1]:
            break
        A, B = A - U @ (U.T @ A), np.concatenate([B, U], axis=1)
        U32 = torch.as_tensor(U.astype(np.float32))
        X = X - (X @ U32) @ U32.T
        S = A @ m.cov_in @ A.T
        curve.append(explained(m, (S + S.T) / 2, A @ m.cross, max(d - B.shape[1], 0), alpha))
    left, values, right = np.linalg.svd(np.eye(d) - A)
    kept = values > TINY * max(values[0], 1e-300)
    return Erasure(A, np.zeros(d), left[:, kept] * values[kept], right[kept].T, np.zeros(d), curve)


def leace(m: PairedMoments, *, alpha: float, stop: float | None) -> Erasure:
    """Take out at once, with the least change, every direction that is correlated with a target."""
    d = len(m.mean_in)
    V, root = _half(m.cov_in / m.weight)
    # Whitened targets span what plain ones do, and their singular values are correlations, which say what is noise.
    T, root_t = _half(m.cov_out / m.weight)
    U, correlation, _ = np.linalg.svd((V.T @ (m.cross / m.weight) @ T) / root[:, None] / root_t, full_matrices=False)
    U = U[:, correlation**2 > max(stop or 0.0, TINY)]
    left, right = V @ (root[:, None] * U), V @ (U / root[:, None])
    P = np.eye(d) - left @ right.T
    S = P @ m.cov_in @ P.T
    curve = [
        explained(m, m.cov_in, m.cross, d, alpha),
        explained(m, (S + S.T) / 2, P @ m.cross, len(root) - U.shape[1], alpha),
    ]
    return Erasure(P, left @ (right.T @ m.mean_in), left, right, m.mean_in, curve)


def explained(m: PairedMoments, S: np.ndarray, C: np.ndarray, free: int, alpha: float) -> float:
    """Return the share of the targets' variance that ridge regression explains, corrected for its parameters."""
    W = _ridge(S, C, penalty(m, alpha))
    total = float(np.trace(m.cov_out))
    left = total - 2 * float(np.sum(W * C)) + float(np.sum(W * (S @ W)))
    return 1 - left / total * (m.weight - 1) / max(m.weight - 1 - free, 1.0)


def penalty(m: PairedMoments, alpha: float) -> float:
    """Return the ridge penalty that is worth ``alpha`` rows of noise with the features' mean variance."""
    return float(alpha) * float(np.trace(m.cov_in)) / (m.weight * len(m.mean_in))


def _half(S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the eigenvectors of a covariance that are not null, and the roots of their eigenvalues."""
    values, V = eigh(S)
    kept = values > max(values[-1], 0.0) * len(S) * 1e-12
    return V[:, kept], np.sqrt(values[kept])


def _ridge(S: np.ndarray, C: np.ndarray, weight: float) -> Any:
    # Without a penalty, directions that are gone have no inverse; this much of the trace is rounding.
    least = 1e-13 * max(float(np.trace(S)), 1e-300)
    return solve(S + max(weight, least) * np.eye(len(S)), C, assume_a="pos")


def _directions(W: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of the columns of W outside those of B; columns that are nothing there go."""
    size = np.linalg.norm(W)
    for _ in range(2):
        W = W - B @ (B.T @ W)
    if not size > 0 or not np.linalg.norm(W) > TINY * size:
        return np.zeros((len(W), 0))
    U, values, _ = np.linalg.svd(W, full_matrices=False)
    return U[:, values > TINY * size]
