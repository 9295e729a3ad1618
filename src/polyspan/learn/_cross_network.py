"""DCN-V2 over concatenated embeddings and numbers: cross layers, then a plain network."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .unified_embedding import UnifiedEmbedding


class CrossHead(nn.Module):
    r"""Score rows (b, width): :math:`x_{l+1} = x_0 \odot (W_l x_l + b_l) + x_l`, then hidden layers, then outputs.

    Parameters
    ----------
    width : int
    num_out : int
        Outputs a row.
    num_cross : int
        Cross layers; 0 leaves a plain network.
    hidden : sequence of int
        Widths of the hidden layers.
    generator : torch.Generator
    """

    def __init__(
        self,
        width: int,
        num_out: int,
        *,
        num_cross: int = 1,
        hidden: Sequence[int] = (64,),
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.cross = nn.ModuleList(_linear(width, width, generator) for _ in range(num_cross))
        sizes = [width, *hidden]
        self.hidden = nn.ModuleList(_linear(a, b, generator) for a, b in pairwise(sizes))
        self.out = _linear(sizes[-1], num_out, generator)

    @property
    def first(self) -> nn.Module:
        """The layer that reads the embeddings."""
        return [*self.cross, *self.hidden, self.out][0]

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, num_out)."""
        first = x
        for layer in self.cross:
            x = first * layer(x) + x
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.out(x)


class CrossNetwork(nn.Module):
    """Embed keys, join numbers, and score.

    Parameters
    ----------
    embedding : UnifiedEmbedding or None
    num_dense : int
        Numbers a row.
    num_out : int
        Outputs a row.
    num_cross, hidden, generator
        Of :class:`CrossHead`.
    """

    def __init__(
        self,
        embedding: UnifiedEmbedding | None,
        num_dense: int,
        num_out: int,
        *,
        num_cross: int = 1,
        hidden: Sequence[int] = (64,),
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.embedding = embedding
        width = (0 if embedding is None else embedding.output_dim) + num_dense
        self.head = CrossHead(width, num_out, num_cross=num_cross, hidden=hidden, generator=generator)

    def features(self, keys: Tensor, dense: Tensor) -> Tensor:
        """Return (b, width) of keys (b, columns) int64 and numbers (b, num_dense)."""
        return dense if self.embedding is None else torch.cat([self.embedding(keys), dense], dim=1)

    def forward(self, keys: Tensor, dense: Tensor) -> Tensor:
        """Return (b, num_out)."""
        return self.head(self.features(keys, dense))


def _linear(fan_in: int, fan_out: int, generator: torch.Generator | None) -> nn.Linear:
    """Return ``nn.Linear`` drawn as it draws itself, but from the generator that is given."""
    layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
    bound = 1 / math.sqrt(max(fan_in, 1))
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
