"""What the Grassmann layer is compared with: attention, and mixers with the same offsets that know no planes.

Each has the arguments of ``CausalGrassmannMixing.forward`` and can stand as ``mixing`` in a GrassmannBlock.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .grassmann_mixing import check_offsets, reset_linears


class CausalAttention(nn.Module):
    """Multi-head causal self-attention with four d by d matrices."""

    def __init__(self, d_model: int, num_heads: int, *, dropout: float = 0.0, generator: Any = None):
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"num_heads must divide d_model={d_model}, got {num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.inputs = nn.utils.skip_init(nn.Linear, d_model, 3 * d_model)
        self.output = nn.utils.skip_init(nn.Linear, d_model, d_model)
        reset_linears(self, generator)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, state: None = None) -> Tensor:
        """Mix tokens (b, t, d)."""
        q, k, v = self.inputs(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        share = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=share)
        return F.dropout(self.output(y.transpose(1, 2).flatten(-2)), self.dropout, self.training)


class ShiftedMixing(nn.Module):
    """The Grassmann layer without wedge: one matrix for the reduced token beside each shifted one, mean and gate."""

    def __init__(self, d_model: int, r: int, offsets: Sequence[int], *, symmetric: bool = False, generator: Any = None):
        super().__init__()
        self.offsets, self.symmetric = check_offsets(offsets), symmetric
        self.reduction = nn.utils.skip_init(nn.Linear, d_model, r)
        self.pair = nn.utils.skip_init(nn.Linear, r * (r + 1) // 2 if symmetric else 2 * r, d_model)
        self.gating = nn.utils.skip_init(nn.Linear, 2 * d_model, d_model)
        self.layer_norm = nn.LayerNorm(d_model)
        reset_linears(self, generator)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, state: None = None) -> Tensor:
        """Mix tokens (b, t, d)."""
        z, t = self.reduction(x), x.shape[1]
        past = F.pad(z, (0, 0, max(self.offsets), 0))
        shifted = [past[:, max(self.offsets) - o :][:, :t] for o in self.offsets]
        count = sum((torch.arange(t, device=x.device) >= o).to(z.dtype) for o in self.offsets)
        if self.symmetric:
            i, j = torch.triu_indices(z.shape[-1], z.shape[-1], device=x.device)
            products = (z[..., i] * s[..., j] + z[..., j] * s[..., i] for s in shifted)
            mean = sum(p / torch.linalg.vector_norm(p, dim=-1, keepdim=True).clamp(min=1e-8) for p in products)
        else:
            mean = torch.cat([z * torch.as_tensor(count).unsqueeze(-1), torch.stack(shifted).sum(dim=0)], dim=-1)
        share = torch.as_tensor(count).unsqueeze(-1)
        g = self.pair(mean / share.clamp(min=1)) * (share > 0)
        alpha = torch.sigmoid(self.gating(torch.cat([x, g], dim=-1)))
        return self.layer_norm(alpha * x + (1 - alpha) * g)


class NoMixing(nn.Module):
    """Nothing: every token for itself."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, state: None = None) -> Tensor:
        """Return zeros, which a block adds to the tokens."""
        return torch.zeros_like(x)


def replace_mixing(blocks: Iterable[Any], rival: str, *, num_heads: int, generator: Any = None) -> None:
    """Put a rival in the place of the Grassmann layer of every block, of its width, reduced width and offsets.

    ``rival`` is "attention", "concatenation" (the same offsets without planes) or "none".
    """
    for block in blocks:
        own = block.mixing
        if rival == "attention":
            block.mixing = CausalAttention(own.d_model, num_heads, generator=generator)
        elif rival == "concatenation":
            block.mixing = ShiftedMixing(own.d_model, own.r, own.offsets, generator=generator)
        elif rival == "none":
            block.mixing = NoMixing()
        else:
            raise ValueError(f"rival must be 'attention', 'concatenation' or 'none', got {rival!r}")
