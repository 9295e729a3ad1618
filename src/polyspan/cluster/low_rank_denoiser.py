"""The exact denoiser of a mixture of low-rank Gaussians, its loss, and sampling with it or with any other denoiser."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from ._low_rank_training import draw_levels, loss_weight, posterior_mean


class LowRankDenoiser(nn.Module):
    r"""Best guess of clean rows under a mixture of low-rank Gaussians, the optimum of a diffusion model.

    For :math:`x = s x_0 + \sigma\varepsilon` and :math:`x_0 \sim \sum_k \pi_k N(\mu_k, U_k\Lambda_kU_k^\top + a_kI)`,
    with :math:`r_k = x - s\mu_k` and :math:`\tau_{ki} = \lambda_{ki} + a_k`,

    .. math:: E[x_0 \mid x] = \sum_k w_k \Bigl(\mu_k + \frac{s a_k}{s^2a_k+\sigma^2} (I - U_kU_k^\top) r_k
              + U_k \operatorname{diag}\Bigl(\frac{s\tau_{ki}}{s^2\tau_{ki}+\sigma^2}\Bigr) U_k^\top r_k\Bigr),

    where the weights w are the posterior probabilities of the components. With the default a = 0, every answer is a
    mean of points in the subspaces, and the rank of the Jacobian is d where one component is certain, at most K d where
    none is. It knows no rows, only subspaces, so it cannot return a training sample from memory; a row far from all
    subspaces is still answered with confidence.

    All is computed in float64 (float32 where a device has none) and returned in the dtype of ``x``: squared lengths
    over σ² lose all digits of float32 at a σ of a thousandth of a row's length. Bases, spectra, means and weights are
    buffers: to learn them, fit a :class:`LowRankGaussianMixture`.
    Source: catalogue entry ``diffusion-subspace``.

    Parameters
    ----------
    bases : array of shape (K, D, d)
        Orthonormal columns; columns of zeros where a component has fewer than d.
    spectra : array of shape (K, d), optional
        Variances λ >= 0 along the columns; 1 where left out.
    means : array of shape (K, D), optional
        0 where left out.
    weights : array of shape (K,), optional
        Shares π > 0 with sum 1; equal where left out.
    noise_variance : array of shape (K,), optional
        Variance a >= 0 of clean rows in every direction; 0 where left out.

    Raises
    ------
    ValueError
        Shapes do not fit, columns are not orthonormal, or values are out of range.
    """

    bases: Tensor
    spectra: Tensor
    means: Tensor
    log_weights: Tensor
    noise_variance: Tensor

    def __init__(self, bases, spectra=None, means=None, weights=None, *, noise_variance=None, device=None, dtype=None):
        super().__init__()
        U = torch.as_tensor(bases)
        if U.ndim != 3 or 0 in U.shape or U.shape[2] > U.shape[1] or not U.is_floating_point():
            raise ValueError(
                f"bases must be floats of shape (K, D, d) with d <= D, got {U.dtype} of shape {tuple(U.shape)}"
            )
        (K, D, d), U = U.shape, U.detach().double()
        off = (U.mT @ U - torch.diag_embed((U.square().sum(dim=1) > 0.5).double())).abs().max()
        if not off < 1e-3:
            raise ValueError(f"bases must have orthonormal columns, or zeros, got products off by {float(off):.2g}")
        filled = U.square().sum(dim=1) > 0.5
        parts = {
            "spectra": (spectra, (K, d), filled.double()),
            "means": (means, (K, D), torch.zeros(K, D)),
            "weights": (weights, (K,), torch.full((K,), 1 / K)),
            "noise_variance": (noise_variance, (K,), torch.zeros(K)),
        }
        made = {name: _part(name, *part) for name, part in parts.items()}
        for name in ("spectra", "noise_variance"):
            if not made[name].min() >= 0:
                raise ValueError(f"{name} must be at least 0, got {float(made[name].min()):g}")
        if not (made["weights"].min() > 0 and abs(made["weights"].sum() - 1) < 1e-4):
            raise ValueError(f"weights must be above 0 with sum 1, got {made['weights'].tolist()}")
        made["log_weights"] = made.pop("weights").log()
        dtype = dtype or torch.get_default_dtype()
        for name, part in {"bases": U, **made}.items():
            self.register_buffer(name, part.to(device=device, dtype=dtype))

    @classmethod
    def from_mixture(cls, mixture: Any, *, keep_noise: bool = False, device=None, dtype=None) -> "LowRankDenoiser":
        """Return the denoiser of a fitted :class:`LowRankGaussianMixture`.

        Parameters
        ----------
        keep_noise : bool
            Whether the white noise of the fitted rows belongs to clean rows. By default it does not: the denoiser then
            takes it off too, and answers within the subspaces.
        """
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(mixture, "bases_")
        kind = {"device": device, "dtype": dtype or torch.float64}
        noise = mixture.noise_variance_ if keep_noise else None
        weights = mixture.weights_.clip(1e-12)
        weights = weights / weights.sum()
        return cls(mixture.bases_, mixture.spectra_, mixture.means_, weights, noise_variance=noise, **kind)

    def to_mixture(self) -> Any:
        """Return a fitted :class:`LowRankGaussianMixture` with these components; it holds no labels and no history.

        Raises
        ------
        ValueError
            A noise variance is 0: such a mixture has no density outside its subspaces.
        """
        from .low_rank_mixture import LowRankGaussianMixture

        if not self.noise_variance.min() > 0:
            raise ValueError("noise_variance must be above 0 for a mixture with a density, got 0")
        parts = (self.bases, self.spectra, self.means, self.log_weights.exp(), self.noise_variance)
        return LowRankGaussianMixture.from_parts(*(part.detach().cpu().double().numpy() for part in parts))

    def forward(
        self, x: Num[Tensor, "*batch d"], sigma: Any, s: Any = 1.0, clean: Tensor | None = None
    ) -> Float[Tensor, "*batch d"]:
        """Return the posterior mean of the clean rows.

        Parameters
        ----------
        x : Tensor of shape (*batch, D)
            s times clean rows, plus noise.
        sigma : float or Tensor of shape () or (*batch)
            Standard deviation of the noise in a coordinate, above 0. Values in tensors on an accelerator are not
            looked at, which would wait for it: where they are not above 0, expect NaN.
        s : float or Tensor of shape () or (*batch)
            Scale of the clean rows; at 0 the answer is the mean of the mixture.
        clean : Tensor of shape (*batch, D), optional
            Clean rows from which the weights are taken: 1 for the nearest subspace, 0 for all others. This is the
            denoiser of which the equivalence with subspace clustering is proved; nobody has clean rows in use.

        Raises
        ------
        ValueError
            Widths or shapes do not fit, or sigma is not above 0.
        TypeError
            ``x`` holds integers, such as images of bytes.
        """
        D = self.bases.shape[1]
        if not x.is_floating_point():
            raise TypeError(f"x must hold floats (scale images of bytes to the range of the fit), got {x.dtype}")
        if x.ndim < 1 or x.shape[-1] != D:
            raise ValueError(f"x must have {D} features in its last axis, got shape {tuple(x.shape)}")
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        batch = x.shape[:-1]
        levels = _level(sigma, "sigma", batch, x, wide, zero=False)
        scales = _level(s, "s", batch, x, wide, zero=True)
        rows = x.to(wide).reshape(-1, D)
        if clean is not None:
            if clean.shape != x.shape:
                raise ValueError(f"clean must have the shape of x, {tuple(x.shape)}, got {tuple(clean.shape)}")
            clean = clean.to(wide).reshape(-1, D)
        parts = (self.bases, self.spectra, self.means, self.log_weights, self.noise_variance)
        made = posterior_mean(rows, levels, scales, *(part.to(wide) for part in parts), clean=clean)
        return made.reshape(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        K, D, d = self.bases.shape
        return f"components={K}, features={D}, rank={d}"


def _part(name: str, value: Any, shape: tuple[int, ...], default: Tensor) -> Tensor:
    made = default if value is None else torch.as_tensor(value).detach()
    if tuple(made.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(made.shape)}")
    if not torch.isfinite(made).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return made.double()


def _level(value: Any, name: str, batch: tuple[int, ...], x: Tensor, wide: torch.dtype, *, zero: bool) -> Tensor:
    """Return a scale for every row, (rows, 1), after a look at its values where that costs nothing."""
    wanted = f"{name} must be {'at least' if zero else 'above'} 0 and finite"
    if not isinstance(value, Tensor):
        if not ((value >= 0 if zero else value > 0) and value < float("inf")):
            raise ValueError(f"{wanted}, got {value}")
        return torch.full((math.prod(batch), 1), float(value), dtype=wide, device=x.device)
    if value.ndim and value.shape != batch:
        raise ValueError(
            f"{name} must be a number or have the shape of the rows, {tuple(batch)}, got {tuple(value.shape)}"
        )
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        try:
            fine = bool(((value >= 0 if zero else value > 0) & torch.isfinite(value)).all())
        except RuntimeError:  # inside vmap no value can be read
            fine = True
        if not fine:
            raise ValueError(f"{wanted}, got {value.min():g} among {value.numel()}")
    return value.to(device=x.device, dtype=wide).expand(batch).reshape(-1, 1)


def denoising_loss(
    denoiser: Callable[..., Tensor],
    x: Float[Tensor, "n d"],
    *,
    n_draws: int = 1,
    hard: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Return the diffusion loss of a denoiser on clean rows, an average over drawn noise.

    :math:`E\,\tfrac{1+\sigma^2}{\sigma^2}\lVert D(x+\sigma\varepsilon, \sigma) - x\rVert^2` with
    :math:`\sigma = t/(1-t)` and t uniform in (0.01, 0.99). Levels do not follow the scale of the rows: bring their
    variance along the subspaces near 1 first. For one subspace through the origin, and equal spectra, the loss is a
    constant less a multiple of the squares that the subspace holds: least for PCA without centring. So it is for
    several with ``hard`` weights: least for K-subspaces.

    Parameters
    ----------
    denoiser : callable
        ``denoiser(x, sigma)`` with sigma of shape (n,); with ``hard``, a :class:`LowRankDenoiser`.
    n_draws : int
        Noise levels a row.
    hard : bool
        Take the weights of components from the clean rows.
    generator : Generator, optional
        Of the device of ``x``; a new one with seed 0 where left out.

    Raises
    ------
    ValueError
        ``n_draws`` is below 1.
    """
    if n_draws < 1:
        raise ValueError(f"n_draws must be at least 1, got {n_draws}")
    generator = generator or torch.Generator(device=x.device).manual_seed(0)
    rows = x.repeat(n_draws, 1)
    sigma = draw_levels(len(rows), generator, rows)
    noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype, device=rows.device)
    more = {"clean": rows} if hard else {}
    made = denoiser(rows + sigma * noise, sigma[:, 0], **more)
    return (loss_weight(sigma) * (made - rows).square().sum(dim=-1, keepdim=True)).mean()


def noise_levels(
    n_steps: int = 18, *, sigma_min: float | int = 0.002, sigma_max: float | int = 80.0, rho: float | int = 7.0
) -> Float[Tensor, "levels"]:
    r"""Return ``n_steps`` falling noise levels, evenly spaced in :math:`\sigma^{1/\rho}`, and 0 at the end, float64.

    Raises
    ------
    ValueError
        Not 0 < sigma_min <= sigma_max, or ``n_steps`` or ``rho`` out of range.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}")
    if not 0 < sigma_min <= sigma_max < float("inf"):
        raise ValueError(f"sigma_min and sigma_max must be 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}")
    if not rho > 0:
        raise ValueError(f"rho must be above 0, got {rho}")
    share = torch.linspace(0, 1, n_steps, dtype=torch.float64)
    levels = (sigma_max ** (1 / rho) + share * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


@torch.no_grad()
def sample_edm(
    denoiser: Callable[..., Tensor],
    latents: Tensor,
    *,
    n_steps: int = 18,
    sigma_min: float | int = 0.002,
    sigma_max: float | int = 80.0,
    rho: float | int = 7.0,
    watch: Callable[[Tensor, float], None] | None = None,
) -> Tensor:
    r"""Turn unit noise into samples by the probability flow of a denoiser, with Heun's second-order steps.

    :math:`dx/d\sigma = (x - D(x, \sigma))/\sigma` from ``sigma_max`` to 0 over :func:`noise_levels`; 2 n_steps - 1
    calls of the denoiser. To go on from rows x at a level σ, after an edit for instance, pass ``x / sigma`` with
    ``sigma_max=sigma``.

    Parameters
    ----------
    denoiser : callable
        ``denoiser(x, sigma) -> x0`` with sigma of shape (n,), x0 of the shape of x.
    latents : Tensor of shape (n, ...)
        Standard normal.
    watch : callable, optional
        ``watch(x, sigma)`` before every step.
    """
    levels = noise_levels(n_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho).tolist()
    x = latents * levels[0]
    for now, after in itertools.pairwise(levels):
        if watch is not None:
            watch(x, now)
        x = heun_step(denoiser, x, now, after)
    return x


@torch.no_grad()
def heun_step(denoiser: Callable[..., Tensor], x: Tensor, now: float, after: float) -> Tensor:
    """Go from one noise level to a lower one; to 0 by Euler's step, since there is no slope there."""
    slope = (x - denoiser(x, x.new_full(x.shape[:1], now))) / now
    ahead = x + (after - now) * slope
    if after > 0:
        there = (ahead - denoiser(ahead, x.new_full(x.shape[:1], after))) / after
        ahead = x + (after - now) * (slope + there) / 2
    return ahead
