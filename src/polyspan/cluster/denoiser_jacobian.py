"""What the Jacobian of a trained denoiser says: how many directions its data have, and along which it can be edited."""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyspan.errors import UntrustedFile
from polyspan.run import progress, torch_generator

from .low_rank_denoiser import heun_step, noise_levels

PREDICTIONS = ("epsilon", "v_prediction", "sample")
ENERGY_SHARE = 0.98
CHUNK = 16


class JacobianSpectrum(NamedTuple):
    """Leading singular triplets of a Jacobian at one point.

    ``values`` (k,) fall; ``directions`` (k, *shape) are unit changes of the input and ``responses`` (k, *shape) the
    unit changes of the output that they cause; ``energy`` is the sum of the squares of all singular values, estimated
    where not all were computed; ``n_products`` counts products with the Jacobian and its transpose.
    """

    values: Tensor
    directions: Tensor
    responses: Tensor
    energy: float
    n_products: int

    def rank(self, share: float = ENERGY_SHARE) -> int:
        """Return the fewest leading directions that hold more than a share of the energy.

        Where the computed ones do not reach it, one more than they are: the rank is at least that.
        """
        squares = self.values.double().square().cumsum(0).cpu().numpy()
        return int(np.searchsorted(squares, share * self.energy * (1 - 1e-12), side="right")) + 1 if self.energy else 0

    def participation(self) -> float:
        """Return (sum of squares)^2 / sum of fourth powers: a soft count of directions, 0 for no response."""
        fourth = float(self.values.double().pow(4).sum())
        return self.energy**2 / fourth if fourth else 0.0


class RankProfile(NamedTuple):
    """Ranks along sampling trajectories.

    ``sigmas`` (m,) fall; ``ranks`` and ``participation`` are (trajectories, m); ``values`` (trajectories, m, k) are
    singular values; ``intrinsic_dimension`` is the least mean rank over noise levels, found at ``sigma``.
    """

    sigmas: np.ndarray
    ranks: np.ndarray
    participation: np.ndarray
    values: np.ndarray
    intrinsic_dimension: float
    sigma: float


class EditDirections(NamedTuple):
    """Unit directions (k, *shape) by falling effect (k,); a share (k,) of it falls outside the mask."""

    directions: Tensor
    values: Tensor
    outside_share: Tensor


def as_denoiser(model: Any, alphas_cumprod: Any, *, prediction: str = "epsilon") -> Callable[[Tensor, Any], Tensor]:
    r"""Wrap a model of the discrete kind, ``model(x_t, t)``, as a denoiser ``(x, sigma) -> x0``.

    Such models see :math:`x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon`; the level is
    :math:`\sigma_t = \sqrt{(1-\bar\alpha_t)/\bar\alpha_t}`, and t is read off by linear interpolation in log σ. A level
    outside the schedule is an error. ``UNet2DModel`` of diffusers fits as it is, with its scheduler's
    ``alphas_cumprod`` and ``prediction_type``.

    Parameters
    ----------
    model : callable
        Returns a tensor, or an object with one in ``sample``.
    alphas_cumprod : array of shape (T,)
        Falling, in (0, 1).
    prediction : {"epsilon", "v_prediction", "sample"}
        Whether the model returns the noise, :math:`\sqrt{\bar\alpha}\varepsilon - \sqrt{1-\bar\alpha}x_0`, or x0. There
        is no way to tell from its shapes: see the scheduler's configuration.

    Raises
    ------
    ValueError
        ``prediction`` is not known, or the schedule does not fall within (0, 1).
    """
    _check_callable(model)
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    alphas = torch.as_tensor(alphas_cumprod).detach().double().cpu()
    if alphas.ndim != 1 or len(alphas) < 2 or not (alphas.diff() < 0).all() or not (alphas[-1] > 0 and alphas[0] < 1):
        raise ValueError(f"alphas_cumprod must fall within (0, 1), got shape {tuple(alphas.shape)}")
    logs = ((1 - alphas) / alphas).log() / 2
    low, high = math.exp(logs[0]), math.exp(logs[-1])

    def denoise(x: Tensor, sigma: Any) -> Tensor:
        levels = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1)
        if bool(((levels < low * (1 - 1e-6)) | (levels > high * (1 + 1e-6))).any()):
            raise ValueError(
                f"sigma must lie in the schedule, {low:.4g} to {high:.4g}, got {float(levels.min()):g} to "
                f"{float(levels.max()):g}"
            )
        schedule, wanted = logs.to(x.device), levels.log()
        after = torch.searchsorted(schedule, wanted).clamp(1, len(logs) - 1)
        share = (wanted - schedule[after - 1]) / (schedule[after] - schedule[after - 1])
        t = (after - 1 + share).clamp(0, len(logs) - 1).to(x.dtype)
        level = levels.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        root = (1 + level**2).rsqrt()
        made = model(x * root, t.expand(x.shape[0]) if t.numel() == 1 else t)
        made = getattr(made, "sample", made)
        if prediction == "epsilon":
            return x - level * made
        return made if prediction == "sample" else root * (x * root - level * made)

    return denoise


def jacobian_spectrum(
    model: Any,
    x: Tensor,
    sigma: float | int,
    k: int | None = 64,
    *,
    n_iter: int = 5,
    oversample: int = 8,
    n_probes: int = 8,
    chunk: int = CHUNK,
    generator: torch.Generator | None = None,
) -> JacobianSpectrum:
    r"""Singular values and directions of :math:`J = \partial D(x, \sigma)/\partial x` at one point.

    With ``k``, the leading ones in a block Krylov space of products with J and its transpose: (k + oversample)
    (2 n_iter + 1) products, fewer where J has fewer directions, and no matrix of the square of the inputs; ``2 (n_iter
    + 1)`` blocks of ``k + oversample`` vectors are held. Values come from below, the largest soonest; a flat spectrum
    needs more iterations. Without ``k``, all of them from the whole matrix.

    The energy of what is left is estimated by random probes: unbiased, with a relative error of about
    sqrt(2 / n_probes) of that part.

    Parameters
    ----------
    model : callable
        ``model(x, sigma) -> x0`` on a batch (1, *shape).
    x : Tensor of shape (*shape)
        One point, without a batch axis.
    k : int or None, default=64
    n_iter : int
    oversample : int
        Further directions that are carried along, for accuracy.
    n_probes : int
    chunk : int
        Products made at once by ``torch.func.vmap``; with 1 it is not used, for models that it cannot map.
    generator : Generator, optional
        On the CPU; a new one with seed 0 where left out.

    Raises
    ------
    ValueError
        ``k`` is below 1, ``sigma`` is not above 0, or the output has another shape than the input or is not finite.
    UntrustedFile
        ``model`` is a path to a pickle.

    Warns
    -----
    UserWarning
        Products with J are 0 though the model answers otherwise at another point.
    """
    _check_callable(model)
    _check_sigma(sigma)
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, or None for all, got {k}")
    generator = generator or torch_generator(0)
    # Made out here, so that a model may look at its value.
    level = x.new_full((1,), float(sigma))
    products = _Products(lambda z: model(z, level), x, chunk)
    n, shape = x.numel(), x.shape
    if k is None or k + oversample >= n:
        J = products.forward(torch.eye(n, dtype=x.dtype, device=x.device)).T
        _check_products(J, model, x, level)
        U, S, Vh = torch.linalg.svd(J)
        kept = n if k is None else min(k, n)
        energy = float(S.double().square().sum())
        return JacobianSpectrum(
            S[:kept], Vh[:kept].reshape(-1, *shape), U.T[:kept].reshape(-1, *shape), energy, products.count
        )
    V = torch.randn(n, k + oversample, generator=generator, dtype=torch.float64).to(x)
    V = torch.linalg.qr(V)[0]
    images = products.forward(V.T).T
    _check_products(images, model, x, level)
    V, found = _krylov(products, V, images, n_iter)
    U, S, Wh = torch.linalg.svd(found, full_matrices=False)
    V = V @ Wh.T
    energy = float(S.double().square().sum())
    if n_probes:
        probes = torch.randn(n, n_probes, generator=generator, dtype=torch.float64).to(x)
        rest = products.forward((probes - V @ (V.T @ probes)).T)
        energy += float(rest.double().square().sum()) / n_probes
    return JacobianSpectrum(S[:k], V.T[:k].reshape(-1, *shape), U.T[:k].reshape(-1, *shape), energy, products.count)


def rank_profile(
    model: Any,
    sigmas: Sequence[float | int] | None = None,
    n_trajectories: int = 4,
    *,
    shape: Sequence[int],
    k: int | None = None,
    share: float = ENERGY_SHARE,
    chunk: int = CHUNK,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    label: str = "",
    generator: torch.Generator | None = None,
) -> RankProfile:
    """Follow a denoiser from noise to samples, and count the directions of its Jacobian at every level.

    The count is the fewest singular values that hold more than ``share`` of the squares. At small levels it is the
    dimension of the data around a sample, where the denoiser has learnt it; at the largest the denoiser answers with
    one mean and little is left to count. Counts differ between trajectories: look at several.

    Parameters
    ----------
    model : callable
        ``model(x, sigma) -> x0`` on batches (n, *shape); see :func:`as_denoiser`.
    sigmas : sequence of float, optional
        Falling levels, above 0, that are also the steps of sampling; the 18 of :func:`noise_levels` where left out.
    n_trajectories : int
    shape : sequence of int
        Of one sample.
    k : int, optional
        Leading singular values only; see :func:`jacobian_spectrum`. All where left out.
    label : str
        Shown with progress on stderr; empty shows nothing.
    generator : Generator, optional
        On the CPU.

    Raises
    ------
    ValueError
        Levels do not fall, or the model is no denoiser: at the least level it does not give a finished sample back,
        as one that returns noise does not.
    """
    _check_callable(model)
    levels = np.array(noise_levels()[:-1].tolist() if sigmas is None else list(sigmas), dtype=np.float64)
    if levels.ndim != 1 or not len(levels) or not (np.diff(levels) < 0).all() or not levels[-1] > 0:
        raise ValueError(f"sigmas must fall and stay above 0, got {levels.tolist()}")
    if n_trajectories < 1:
        raise ValueError(f"n_trajectories must be at least 1, got {n_trajectories}")
    generator = generator or torch_generator(0)
    latents = torch.randn(n_trajectories, *shape, generator=generator, dtype=torch.float64).to(device, dtype)
    path = _trajectories(model, latents, levels)
    _check_denoiser(model, path[-1], float(levels[-1]))
    found = [
        [
            jacobian_spectrum(model, points[i], float(sigma), k, chunk=chunk, generator=generator)
            for points, sigma in zip(path, levels, strict=False)
        ]
        for i in progress(range(n_trajectories), label=label)
    ]
    ranks = np.array([[at.rank(share) for at in line] for line in found])
    mean = ranks.mean(axis=0)
    least = int(mean.argmin())
    return RankProfile(
        levels,
        ranks,
        np.array([[at.participation() for at in line] for line in found]),
        np.array([[at.values.double().cpu().numpy() for at in line] for line in found]),
        float(mean[least]),
        float(levels[least]),
    )


def jacobian_directions(
    model: Any,
    x: Tensor,
    sigma: float | int,
    k: int = 4,
    mask: Tensor | None = None,
    *,
    n_outside: int = 16,
    n_iter: int = 5,
    chunk: int = CHUNK,
    generator: torch.Generator | None = None,
) -> EditDirections:
    """Find the changes of a noisy row that change the denoised one most: steps along them are edits.

    Take them at a middle level, where the coarse content is settled and details are not; add a multiple of one to
    ``x`` and go on sampling, ``sample_edm(model, (x + a * v)[None] / sigma, sigma_max=sigma)``. With a mask, directions
    are those that act most within it, after the ``n_outside`` that act most outside it are projected out.

    Parameters
    ----------
    model, n_iter, chunk, generator
        As in :func:`jacobian_spectrum`.
    x : Tensor of shape (*shape)
        One noisy row.
    k : int
    mask : Tensor of shape (*shape), bool, optional
        Where the edit may act.
    n_outside : int
        More keep the rest stiller and leave less to edit with; 0 only restricts the effect that is counted.

    Raises
    ------
    ValueError
        The mask has another shape or kind, is empty or full, or leaves fewer than k directions.
    """
    _check_callable(model)
    _check_sigma(sigma)
    generator, n, shape = generator or torch_generator(0), x.numel(), x.shape
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    more: dict[str, Any] = {"n_iter": n_iter, "chunk": chunk, "generator": generator, "n_probes": 0}
    if mask is None:
        found = jacobian_spectrum(model, x, sigma, k, **more)
        return EditDirections(found.directions, found.values, torch.zeros_like(found.values))
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool of shape {tuple(shape)}, got {mask.dtype} of shape {tuple(mask.shape)}")
    if not 0 < int(mask.sum()) < n:
        raise ValueError(f"mask must mark some of the {n} values and not all, got {int(mask.sum())}")
    if n_outside < 0 or k + n_outside > n:
        raise ValueError(f"k + n_outside must be at most {n}, with n_outside at least 0, got {k} + {n_outside}")
    held = x.new_zeros(n, 0)
    if n_outside:
        outside = jacobian_spectrum(lambda z, s: model(z, s) * ~mask, x, sigma, n_outside, **more)
        # Directions without an effect outside need not be held.
        active = outside.values > 1e-6 * outside.values[0].clamp_min(1e-30)
        held = outside.directions[active].reshape(-1, n).T

    def inner(z: Tensor, s: Any) -> Tensor:
        step = (z - x).reshape(len(z), n)
        free = step - step @ held @ held.T
        return model(x + free.reshape(z.shape), s) * mask

    found = jacobian_spectrum(inner, x, sigma, k, **more)
    level = x.new_full((1,), float(sigma))
    products = _Products(lambda z: model(z, level), x, chunk)
    effect = products.forward(found.directions.reshape(-1, n)).square()
    total = effect.sum(dim=1)
    share = (effect * ~mask.reshape(-1)).sum(dim=1) / total.clamp_min(torch.finfo(x.dtype).tiny)
    return EditDirections(found.directions, found.values, share)


def _krylov(products: "_Products", V: Tensor, images: Tensor, n_iter: int) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis (n, m) of the powers of J'J times V (n, b), and its images under J, (n, m)."""
    block = V
    for _ in range(n_iter):
        pulled = products.backward(torch.linalg.qr(images[:, -block.shape[1] :])[0].T).T
        rest = pulled - V @ (V.T @ pulled)
        Q, R = torch.linalg.qr(rest - V @ (V.T @ rest))
        turn, sizes, _ = torch.linalg.svd(R)
        # What is left of a space that is exhausted is rounding, of any direction.
        new = sizes > 100 * torch.finfo(V.dtype).eps * torch.linalg.vector_norm(pulled)
        block = (Q @ turn)[:, new][:, : len(V) - V.shape[1]]
        if not block.shape[1]:
            break
        block = torch.linalg.qr(block - V @ (V.T @ block))[0]
        V = torch.cat([V, block], dim=1)
        images = torch.cat([images, products.forward(block.T).T], dim=1)
    return V, images


class _Products:
    """Rows times the Jacobian's transpose, and rows times the Jacobian, in chunks."""

    def __init__(self, model: Callable[[Tensor], Tensor], x: Tensor, chunk: int):
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.model, self.x, self.chunk, self.count = model, x[None].detach(), chunk, 0
        made, self.pull, *_ = torch.func.vjp(model, self.x)
        if made.shape != self.x.shape:
            raise ValueError(
                f"model must return the shape of its input, {tuple(self.x.shape)}, got {tuple(made.shape)}"
            )

    def forward(self, rows: Tensor) -> Tensor:
        """Return J v for every row v, (m, n)."""
        return self._each(lambda v: torch.func.jvp(self.model, (self.x,), (v.reshape(self.x.shape),))[1], rows)

    def backward(self, rows: Tensor) -> Tensor:
        """Return J' u for every row u, (m, n)."""
        return self._each(lambda u: self.pull(u.reshape(self.x.shape))[0], rows)

    def _each(self, product: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        self.count += len(rows)
        if self.chunk == 1:
            return torch.stack([product(row).reshape(-1) for row in rows]).detach()
        return torch.func.vmap(product, chunk_size=self.chunk)(rows.contiguous()).reshape(len(rows), -1).detach()


def _trajectories(model: Callable[..., Tensor], latents: Tensor, levels: np.ndarray) -> list[Tensor]:
    """Return the points (n, *shape) at every level, and the samples at the end."""
    path, x = [], latents * float(levels[0])
    for now, after in itertools.pairwise(levels.tolist()):
        path.append(x)
        x = heun_step(model, x, now, after)
    path.append(x)
    with torch.no_grad():
        path.append(model(x, x.new_full(x.shape[:1], float(levels[-1]))))
    return path


@torch.no_grad()
def _check_denoiser(model: Callable[..., Tensor], samples: Tensor, sigma: float) -> None:
    again = model(samples, samples.new_full(samples.shape[:1], sigma))
    off = float((again - samples).norm() / samples.norm().clamp_min(1e-30))
    if not off < 0.5:
        raise ValueError(
            f"model must return clean rows, and so give finished samples back at the least level {sigma:g}, got "
            f"rows off by {off:.2g} of their length: does it predict noise? wrap it by as_denoiser"
        )


@torch.no_grad()
def _check_products(found: Tensor, model: Callable[..., Tensor], x: Tensor, level: Tensor) -> None:
    """Refuse products with a Jacobian that are no numbers, and warn where they are 0 though the answer moves."""
    if not torch.isfinite(found).all():
        raise ValueError("model must return finite numbers with finite derivatives, got NaN or infinity")
    if not found.any() and not torch.equal(model(x[None], level), model(x[None] + level, level)):
        warnings.warn(
            "model answers otherwise at other points and has no derivative: it cuts its gradient off (detach, "
            "no_grad, NumPy), and what is returned is nought",
            stacklevel=3,
        )


def _check_sigma(sigma: Any) -> None:
    if not (sigma > 0 and sigma < math.inf):
        raise ValueError(f"sigma must be above 0 and finite, got {sigma}")


def _check_callable(model: Any) -> None:
    if isinstance(model, str | Path):
        if Path(model).suffix in (".pkl", ".pickle", ".pt", ".pth", ".ckpt"):
            raise UntrustedFile(
                model,
                found="a pickled network, which runs code as it is read",
                expected="the network itself: load it where you trust it, or convert its weights to safetensors first",
            )
        raise TypeError(f"model must be a callable (x, sigma) -> x0, got the path {model}")
    if not callable(model):
        raise TypeError(f"model must be a callable (x, sigma) -> x0, got {type(model).__name__}")
