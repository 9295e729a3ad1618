"""Training of low-rank denoisers by the diffusion loss, all restarts at once."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from polyspan.run import progress, torch_generator

from ._low_rank_density import log_joint, split_energy
from ._low_rank_fit import Parts, Rules

BATCH = 1024
RATE = 5e-2
LATEST, EARLIEST = 0.99, 0.01


class Trained(NamedTuple):
    """Mixtures of every restart, losses (R,) over the last tenth of the steps, and the loss of each step (steps, R)."""

    parts: list[Parts]
    losses: np.ndarray
    history: np.ndarray


def posterior_mean(
    x: Any, sigma: Any, s: Any, bases: Any, spectra: Any, means: Any, log_weights: Any, white: Any, clean: Any = None
) -> Any:
    r"""Return :math:`E[x_0 \mid s x_0 + \sigma\varepsilon = x]` of rows (n, D).

    Parameters
    ----------
    x : Tensor of shape (n, D)
    sigma, s : Tensor of shape (n, 1)
    bases, spectra, means, log_weights : Tensors of shape (K, D, d), (K, d), (K, D) and (K,)
    white : Tensor of shape (K,)
        Variance of x0 in every direction, beside the spectra.
    clean : Tensor of shape (n, D), optional
        Weights are then hard: one for the subspace that is nearest to the clean row.
    """
    energy = split_energy(x, bases, means, s)
    signal, noise = s * s, sigma * sigma
    outside = signal * white + noise
    if clean is None:
        weights = torch.softmax(log_joint(energy, spectra, log_weights, outside, signal, x.shape[-1]), dim=-1)
    else:
        nearest = split_energy(clean, bases, means).outside.argmin(dim=-1)
        weights = torch.nn.functional.one_hot(nearest, bases.shape[0]).to(x.dtype)
    along = spectra + white[:, None]
    shrink_in = s[..., None] * along / (signal[..., None] * along + noise[..., None])
    shrink_out = s * white / outside
    inner = weights[..., None] * (shrink_in - shrink_out[..., None]) * energy.coordinates
    side = bases.permute(1, 0, 2).reshape(x.shape[-1], -1)
    kept = weights * shrink_out
    return inner.flatten(1) @ side.T + (weights - kept * s) @ means + kept.sum(dim=-1, keepdim=True) * x


def draw_levels(n: int, generator: torch.Generator, like: Any) -> Any:
    """Draw noise levels sigma = t / (1 - t) with t uniform in (0.01, 0.99), (n, 1)."""
    t = torch.rand(n, 1, generator=generator, dtype=like.dtype, device=like.device)
    t = EARLIEST + (LATEST - EARLIEST) * t
    return t / (1 - t)


def loss_weight(sigma: Any) -> Any:
    """Return (1 + sigma^2) / sigma^2, by which errors of all noise levels count about alike."""
    return (1 + sigma**2) / sigma**2


def train_denoisers(
    X: np.ndarray, starts: list[Parts], rules: Rules, *, n_steps: int, seed: int, label: str
) -> Trained:
    """Train one denoiser a start by Adam on the same rows, noise levels and noise, in float64.

    Bases are the orthogonal factors of free matrices. Rows are measured in units in which the starts' mean variance
    along the subspaces is 1, so that the noise levels fit any data.
    """
    R, (K, D, d) = len(starts), starts[0].bases.shape
    kept = torch.as_tensor(np.arange(d) < np.array(rules.ranks)[:, None])
    origin = np.asarray(X, dtype=np.float64).mean(axis=0) if rules.center else np.zeros(D)
    rows = torch.as_tensor(np.asarray(X, dtype=np.float64) - origin)
    spread = float((rows**2).sum() / len(rows))
    scale = math.sqrt(max(spread / float(np.mean(rules.ranks)), 1e-300))
    rows = rows / scale
    generator = torch_generator(seed)
    A = torch.as_tensor(np.stack([p.bases for p in starts]))
    # A column of zeros, of a component of lower rank, needs a direction to have an orthogonal factor.
    A = torch.where(kept[:, None, :], A, torch.randn(A.shape, generator=generator, dtype=A.dtype)).requires_grad_()
    means = torch.as_tensor(
        np.stack([(p.means - origin) / scale for p in starts]) if rules.center else np.zeros((R, K, D))
    )
    spectra = np.stack([np.maximum(p.spectra / scale**2, 1e-2) for p in starts])
    log_spectra = torch.as_tensor(np.zeros((R, K, d)) if rules.identity else np.log(spectra))
    logits = torch.as_tensor(np.stack([np.log(np.maximum(p.weights, 1e-3)) for p in starts]))
    white = torch.full((K,), 0.0 if rules.noise is None else (rules.noise / scale) ** 2, dtype=torch.float64)
    free = [A, logits.requires_grad_()]
    free += [means.requires_grad_()] if rules.center else []
    free += [log_spectra.requires_grad_()] if not rules.identity else []

    def parts() -> tuple[Any, Any, Any, Any]:
        bases = torch.linalg.qr(A)[0] * kept[:, None, :]
        return bases, log_spectra.exp() * kept, means, torch.log_softmax(logits, dim=-1)

    optimizer = torch.optim.Adam(free, lr=RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    many = torch.func.vmap(posterior_mean, in_dims=(None, None, None, 0, 0, 0, 0, None))
    history = torch.zeros(n_steps, R, dtype=torch.float64)
    for step in progress(range(n_steps), label=label):
        x = rows
        if len(rows) > BATCH:
            x = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        sigma = draw_levels(len(x), generator, x)
        noisy = x + sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        made = many(noisy, sigma, torch.ones_like(sigma), *parts(), white)
        losses = (loss_weight(sigma) * (made - x).square().sum(dim=-1, keepdim=True)).mean(dim=(1, 2))
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        decay.step()
        history[step] = losses.detach()
    with torch.no_grad():
        bases, spectrum, centres, log_weights = (part.numpy() for part in parts())
    weights = np.exp(log_weights)
    done = [
        Parts(bases[r], spectrum[r] * scale**2, centres[r] * scale + origin, weights[r], np.zeros(K)) for r in range(R)
    ]
    tail = max(1, n_steps // 10)
    return Trained(done, history[-tail:].mean(dim=0).numpy(), history.numpy())
