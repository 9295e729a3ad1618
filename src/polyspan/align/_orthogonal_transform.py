"""Square orthogonal layer, trained in one of four ways that cost differently."""

from typing import Any

import torch
from torch import Tensor, nn

from polyspan.linalg import householder_product, orthonormal_basis

ORTHOGONAL_MAPS = ("cayley", "matrix-exp", "householder", "retraction")
RETRACTION_STEPS = 3


class OrthogonalTransform(nn.Module):
    r"""Map rows by an orthogonal Q that is learnt, :math:`h \mapsto Q h` (plus a bias, if asked for).

    ``"cayley"``: :math:`Q = (I + A/2)^{-1}(I - A/2)\,B` and ``"matrix-exp"``: :math:`Q = e^{A} B`, with A skew and B a
    random orthogonal matrix that stays; both begin at B and keep its determinant. ``"householder"``: a product of
    reflections. ``"retraction"``: a free matrix; :meth:`retract_` after every step brings it back.
    """

    base: Tensor | None
    bias: Tensor | None

    def __init__(self, width: int, how: str, bias: bool, *, generator: Any, device: Any, dtype: Any):
        super().__init__()
        self.width, self.how = width, how
        self.raw = nn.Parameter(torch.empty(width, width, device=device, dtype=dtype))
        keeps = how in ("cayley", "matrix-exp")
        self.register_buffer("base", torch.empty_like(self.raw.data) if keeps else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(width, device=device, dtype=dtype)) if bias else None)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: Any = None) -> None:
        if self.raw.is_meta:
            return
        wide = torch.promote_types(self.raw.dtype, torch.float32)
        device = self.raw.device if generator is None else generator.device
        drawn = torch.randn(self.width, self.width, generator=generator, device=device, dtype=wide)
        if self.base is not None:
            self.base.copy_(orthonormal_basis(drawn))
            self.raw.zero_()
        else:
            self.raw.copy_(drawn if self.how == "householder" else orthonormal_basis(drawn))
        if self.bias is not None:
            self.bias.zero_()

    def matrix(self) -> Tensor:
        """Q in float32 or wider: neither a solve nor an exponential exists in half precision."""
        with torch.autocast(self.raw.device.type, enabled=False):
            raw = self.raw.to(torch.promote_types(self.raw.dtype, torch.float32))
            if self.how == "retraction":
                return raw
            if self.how == "householder":
                return householder_product(raw)
            lower = raw.tril(-1)
            skew = lower - lower.mT
            assert self.base is not None
            base = self.base.to(raw.dtype)
            if self.how == "matrix-exp":
                return torch.linalg.matrix_exp(skew) @ base
            eye = torch.eye(self.width, dtype=raw.dtype, device=raw.device)
            return torch.linalg.solve(eye + skew / 2, (eye - skew / 2) @ base)

    def forward(self, h: Tensor) -> Tensor:
        turned = h @ self.matrix().to(h.dtype).mT
        return turned if self.bias is None else turned + self.bias.to(h.dtype)

    @torch.no_grad()
    def retract_(self) -> None:
        """Bring a free matrix back by Newton-Schulz steps, which are matrix products only and wait for nothing.

        They converge from singular values below sqrt(3), where an optimiser's step leaves them; from further away the
        matrix is scaled down first, and several calls may be needed.
        """
        if self.how != "retraction":
            return
        X = self.raw.to(torch.promote_types(self.raw.dtype, torch.float32))
        eye = torch.eye(self.width, dtype=X.dtype, device=X.device)
        for _ in range(RETRACTION_STEPS):
            gram = X.mT @ X
            off = torch.linalg.matrix_norm(gram - eye)
            scale = torch.where(off < 1, torch.ones_like(off), torch.rsqrt(1 + off))
            X = scale * (1.5 * X - 0.5 * scale.square() * (X @ gram))
        self.raw.copy_(X)

    def extra_repr(self) -> str:
        return f"width={self.width}, how={self.how!r}"
