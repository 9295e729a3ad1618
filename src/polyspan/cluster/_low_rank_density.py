"""Densities of low-rank Gaussians plus white noise, by Woodbury: for rows of NumPy and of torch alike."""

import math
from typing import Any, NamedTuple

from array_api_compat import array_namespace


class Energy(NamedTuple):
    """Coordinates (n, K, d) of rows less each mean in each subspace, their squares (n, K), and those outside (n, K)."""

    coordinates: Any
    inside: Any
    outside: Any


def split_energy(x: Any, bases: Any, means: Any, s: Any = 1.0) -> Energy:
    """Split every row, less ``s`` times each component's mean, into its parts inside and outside each subspace.

    Parameters
    ----------
    x : array of shape (n, D)
    bases : array of shape (K, D, d)
        Orthonormal columns; columns of zeros are allowed.
    means : array of shape (K, D)
    s : float or array of shape (n, 1)
    """
    xp = array_namespace(x, bases)
    K, D, d = bases.shape
    side = xp.reshape(xp.permute_dims(bases, (1, 0, 2)), (D, K * d))
    offset = xp.squeeze(means[:, None, :] @ bases, axis=1)
    scale = s if isinstance(s, float) else s[..., None]
    c = xp.reshape(x @ side, (x.shape[0], K, d)) - scale * offset[None]
    square = xp.sum(x * x, axis=-1)[:, None] - 2 * s * (x @ means.T) + s * s * xp.sum(means * means, axis=-1)[None]
    inside = xp.sum(c * c, axis=-1)
    return Energy(c, inside, xp.clip(square - inside, 0.0))


def log_joint(energy: Energy, spectra: Any, log_weights: Any, white: Any, signal: Any, n_features: int) -> Any:
    r"""Return :math:`\log\pi_k + \log N(x; s\mu_k, s^2 U_k\Lambda_kU_k^\top + a_k I)`, (n, K).

    Parameters
    ----------
    energy : Energy
        Of the rows; see :func:`split_energy`.
    spectra : array of shape (K, d)
        Variances along the columns, 0 for columns of zeros.
    log_weights : array of shape (K,)
    white : array of shape (1, K) or (n, K)
        Variance a > 0 in every direction.
    signal : float or array of shape (n, 1)
        s².
    n_features : int
        D.
    """
    xp = array_namespace(energy.inside, spectra)
    scale = signal if isinstance(signal, float) else signal[..., None]
    along = scale * spectra[None] + white[..., None]
    squares = xp.sum(energy.coordinates**2 / along, axis=-1) + energy.outside / white
    volume = xp.sum(xp.log(along), axis=-1) + (n_features - spectra.shape[-1]) * xp.log(white)
    return log_weights[None] - 0.5 * (squares + volume + n_features * math.log(2 * math.pi))
