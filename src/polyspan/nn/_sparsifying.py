"""One step of sparse coding in a learnt dictionary, as a layer."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ._rate_attention import empty_linear, fill_linear


class SparsifyingISTA(nn.Module):
    r"""Make tokens sparse by proximal gradient steps in a learnt dictionary.

    Each step lowers :math:`\tfrac12\lVert y-Dz\rVert^2+\lambda\lVert z\rVert_1` over z >= 0:
    :math:`z\leftarrow\mathrm{ReLU}(z+\eta D^\top(y-Dz)-\eta\lambda)`. A complete dictionary (d, d) starts at z = y and
    returns the code itself. An overcomplete one (d, m) starts at z = 0 and returns a linear read-out of the code.

    Breaks: a step is sure to descend only while :math:`\eta\le1/\lVert D\rVert_2^2`, which is not enforced; at the
    start :math:`\lVert D\rVert_2^2` is about 8 for a complete dictionary and the default 0.1 is small enough. Tokens
    may become all zero. Source: catalogue entry ``crate``.

    Parameters
    ----------
    dim : int
        Width d of the tokens.
    dict_size : int, optional
        Number m of atoms, more than ``dim``; complete where not given.
    eta : float, default=0.1
        Step size, > 0.
    lambd : float, default=0.1
        Price of an entry, >= 0, in the units of y.
    n_steps : int, default=1
        With an overcomplete dictionary the first step from 0 uses no residual: take 2 or more.
    nonneg : bool, default=True
        Codes >= 0; otherwise the threshold is two-sided, :math:`\mathrm{sign}(u)\max(|u|-\eta\lambda,0)`.
    residual : bool, default=False
        Return y plus the result.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.

    Attributes
    ----------
    weight : nn.Parameter
        The dictionary D, (d, m); columns are atoms.

    Raises
    ------
    ValueError
        An argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        dict_size: int | None = None,
        eta: float | int = 0.1,
        lambd: float | int = 0.1,
        n_steps: int = 1,
        nonneg: bool = True,
        residual: bool = False,
        *,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        size = dim if dict_size is None else dict_size
        if not 1 <= dim <= size:
            raise ValueError(f"dict_size must be at least dim={dim}, which must be at least 1, got {dict_size}")
        if not (0 < eta < math.inf and 0 <= lambd < math.inf):
            raise ValueError(f"eta must be positive and lambd at least 0, both finite, got {eta} and {lambd}")
        if n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, got {n_steps}")
        self.dim, self.dict_size, self.n_steps = dim, size, n_steps
        self.eta, self.lambd, self.nonneg, self.residual = float(eta), float(lambd), nonneg, residual
        self.weight = nn.Parameter(torch.empty(dim, size, device=device, dtype=dtype))
        self.readout = empty_linear(size, dim, False, device, dtype) if size > dim else None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw dictionary and read-out uniformly: entries within the square root of 6 / m, variance 2 / m."""
        bound = math.sqrt(6 / self.dict_size)
        self.weight.uniform_(-bound, bound, generator=generator)
        if self.readout is not None:
            fill_linear(self.readout, generator)

    def codes(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch m"]:
        """Return the sparse code of each token after ``n_steps`` steps."""
        if y.shape[-1:] != (self.dim,):
            raise ValueError(f"y must have width {self.dim}, got shape {tuple(y.shape)}")
        D, z = self.weight, y if self.readout is None else None
        for _ in range(self.n_steps):
            # One product with D' for both terms of the gradient: two products a step in place of three.
            left = y if z is None else y - F.linear(z, D)
            back = self.eta * F.linear(left, D.mT)
            z = self._shrink(back if z is None else z + back)
        assert z is not None
        return z

    def _shrink(self, u: Tensor) -> Tensor:
        if self.nonneg:
            return F.relu(u - self.eta * self.lambd)
        return F.softshrink(u, self.eta * self.lambd)

    def forward(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return the codes, or their read-out where the dictionary is overcomplete."""
        z = self.codes(y)
        out = z if self.readout is None else self.readout(z)
        return y + out if self.residual else out

    def extra_repr(self) -> str:
        return f"dim={self.dim}, dict_size={self.dict_size}, eta={self.eta:g}, lambd={self.lambd:g}"
