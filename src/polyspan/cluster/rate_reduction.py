"""Coding-rate losses and doubly stochastic memberships as torch modules, usable in any training loop."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polyspan.linalg import coding_rate, doubly_stochastic

from ._class_rate import ClassRate, SparseClassRate
from ._symmetric_memberships import memberships_by_rounds

BLOCK_BYTES = 2**27


class _Rate(nn.Module):
    """What the losses share: a squared distortion and float32 or wider whatever autocast says."""

    def __init__(self, eps2: float | int = 0.1, *, device=None, dtype=None):
        super().__init__()
        if not 0 < eps2 < math.inf:
            raise ValueError(f"eps2 must be positive and finite, got {eps2}")
        self.eps2 = float(eps2)

    def _rate(self, Z: Tensor) -> Tensor:
        with torch.autocast(Z.device.type, enabled=False):
            return coding_rate(Z, math.sqrt(self.eps2))

    def extra_repr(self) -> str:
        return f"eps2={self.eps2:g}"


class CodingRate(_Rate):
    r"""Nats that the rows of a batch take: :math:`\tfrac12\log\det(I+\tfrac{d}{n\epsilon^2}Z^\top Z)`.

    Large when unit rows spread over all directions. Batches smaller than d limit it by their rank. Never computed in
    half precision.
    Source: catalogue entry ``mlc``.

    Parameters
    ----------
    eps2 : float, default=0.1
        Squared distortion, > 0, in the squared units of the rows.
    """

    def forward(self, Z: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch"]:
        return self._rate(Z)


class TotalCodingRateLoss(_Rate):
    r"""Self-supervision without negatives: :math:`-R(\tfrac12(Z+Z')) - \lambda\,\tfrac1n\sum_i|z_i^\top z'_i|`.

    Z and Z' are unit rows of two views of the same items. Without a second view it is :math:`-R(Z)` alone, which
    spreads the rows and learns no invariance.
    Source: catalogue entry ``mlc``.

    Parameters
    ----------
    eps2 : float, default=0.1
    weight : float, default=10.0
        :math:`\lambda \ge 0`, nats for full agreement of the views.
    """

    def __init__(self, eps2: float | int = 0.1, weight: float | int = 10.0, *, device=None, dtype=None):
        super().__init__(eps2, device=device, dtype=dtype)
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be finite and at least 0, got {weight}")
        self.weight = float(weight)

    def forward(
        self, Z: Float[Tensor, "*batch n d"], other: Float[Tensor, "*batch n d"] | None = None
    ) -> Float[Tensor, "*batch"]:
        if other is None:
            return -self._rate(Z)
        agreement = torch.linalg.vecdot(Z, other).abs().mean(-1)
        return -self._rate((Z + other) / 2) - self.weight * agreement


class RateReductionLoss(_Rate):
    r"""Loss whose minimum flattens clusters into subspaces of their own: :math:`-R(Z) + \gamma R_c(Z,\Gamma)`.

    :math:`R_c = \sum_j\tfrac{m_j}{2n}\log\det(I+\tfrac{d}{m_j\epsilon^2}Z^\top\mathrm{diag}(\Gamma_j)Z)` with a soft
    cluster for every column of the memberships, :math:`m_j` its sum. The gradient is formed in closed form, block by
    block of columns, and cannot be differentiated again.

    Parameters
    ----------
    eps2 : float, default=0.1
    gamma : float, default=1.0
        Weight of R_c, >= 0.
    frobenius : float, default=0.0
        Adds ``frobenius / 2 * ||memberships||_F^2``; a later variant of the method uses 0.05.
    top : int, optional
        Keep only the ``top`` largest entries of each column, rescaled to the column's sum: matrices top x top in place
        of d x d. Exact only where the others are 0; wide memberships (large eta) lose most of their weight by it, so
        compare the loss with and without.
    max_bytes : int
        Most memory for one block of columns; a smaller number gives the same result, more slowly.

    Notes
    -----
    Source: catalogue entry ``mlc``.
    """

    def __init__(
        self,
        eps2: float | int = 0.1,
        gamma: float | int = 1.0,
        *,
        frobenius: float | int = 0.0,
        top: int | None = None,
        max_bytes: int = BLOCK_BYTES,
        device=None,
        dtype=None,
    ):
        super().__init__(eps2, device=device, dtype=dtype)
        if not (0 <= gamma < math.inf and 0 <= frobenius < math.inf):
            raise ValueError(f"gamma and frobenius must be finite and at least 0, got {gamma} and {frobenius}")
        if top is not None and top < 1:
            raise ValueError(f"top must be at least 1 or None, got {top}")
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        self.gamma, self.frobenius, self.top, self.max_bytes = float(gamma), float(frobenius), top, max_bytes

    def rates(
        self, Z: Float[Tensor, "*batch n d"], memberships: Float[Tensor, "*batch n C"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """Return R(Z) and R_c(Z, memberships), in nats."""
        if memberships.shape[:-1] != Z.shape[:-1]:
            raise ValueError(
                f"memberships must be (*b, n, C) with the *b and n of Z, got {tuple(memberships.shape)} and "
                f"{tuple(Z.shape)}"
            )
        wide = torch.promote_types(Z.dtype, torch.float32)
        rows, members = Z.to(wide), memberships.to(wide)
        with torch.autocast(Z.device.type, enabled=False):
            each = [x.reshape(-1, *x.shape[-2:]).unbind() for x in (rows, members)]
            within = [self._within(*pair) for pair in zip(*each, strict=True)]
        return self._rate(rows), torch.stack(within).reshape(Z.shape[:-2])

    def _within(self, Z: Tensor, members: Tensor) -> Tensor:
        if self.top is None or self.top >= len(Z):
            return ClassRate.apply(Z, members, self.eps2, self.max_bytes)
        kept, index = members.T.topk(self.top, dim=1)
        share = members.sum(0) / kept.sum(1).clamp_min(torch.finfo(kept.dtype).tiny)
        return SparseClassRate.apply(Z, kept * share.unsqueeze(1), index, self.eps2)

    def forward(
        self, Z: Float[Tensor, "*batch n d"], memberships: Float[Tensor, "*batch n C"]
    ) -> Float[Tensor, "*batch"]:
        whole, within = self.rates(Z, memberships)
        loss = self.gamma * within - whole
        if self.frobenius:
            loss = loss + self.frobenius / 2 * memberships.square().sum((-2, -1))
        return loss.to(Z.dtype)


class DoublyStochastic(nn.Module):
    r"""Soft memberships between the rows of a batch, each row and each column summing to 1.

    :math:`\Gamma_{ij} = \exp(K_{ij}/\eta + u_i + v_j)`, the entropic projection of :math:`K = |CC^\top|` for unit rows
    C: rows along one line belong together whatever their sign. With ``symmetric``, u = v is found by damped rounds and
    the result is symmetric; after few rounds its sums miss 1 a little (:func:`polyspan.linalg.doubly_stochastic`).

    Parameters
    ----------
    eta : float, default=0.175
        Entropy weight, > 0, in units of the cosine. Smaller is sharper; at 0.5 hardly anything of the structure of
        a batch of hundreds is left.
    n_iter : int, default=3
        Rounds; the gradient is that of the rounds, in closed form, and can be differentiated again.
    symmetric : bool, default=True
    absolute : bool, default=True
        The kernel is the absolute cosine; otherwise the cosine itself.

    Notes
    -----
    Source: catalogue entry ``mlc``.
    """

    def __init__(
        self,
        eta: float | int = 0.175,
        n_iter: int = 3,
        *,
        symmetric: bool = True,
        absolute: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not 0 < eta < math.inf:
            raise ValueError(f"eta must be positive and finite, got {eta}")
        if n_iter < 1:
            raise ValueError(f"n_iter must be at least 1, got {n_iter}")
        self.eta, self.n_iter, self.symmetric, self.absolute = float(eta), n_iter, symmetric, absolute

    def forward(self, C: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n n"]:
        with torch.autocast(C.device.type, enabled=False):
            rows = C.to(torch.promote_types(C.dtype, torch.float32))
            if self.symmetric:
                return memberships_by_rounds(rows, self.eta, self.n_iter, self.absolute).to(C.dtype)
            kernel = rows @ rows.mT
            kernel = kernel.abs() if self.absolute else kernel
            gamma = doubly_stochastic(kernel, temperature=self.eta, symmetric=False, max_iter=self.n_iter, tol=None)
            return gamma.to(C.dtype)

    def extra_repr(self) -> str:
        return f"eta={self.eta:g}, n_iter={self.n_iter}, symmetric={self.symmetric}"
