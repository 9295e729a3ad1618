"""A small encoder of point clouds that learns without labels, for those who bring shapes but no encoder."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from polyspan.run import Progress, pick_device, torch_generator


class PointNetEncoder(nn.Module):
    r"""Embed a cloud of points by a network that sees each point alone, and pools: order and number do not matter.

    :math:`g([\max_i f(p_i), \operatorname{mean}_i f(p_i)])` with f a shared network 3-64-128-256 and g one of two
    layers. It turns with the cloud unless it is trained on turned views, and knows no scale but that of its training:
    see :func:`polyspan.align.normalize_points`.

    Source: catalogue entry ``plato-3d``; Qi et al. 2017.

    Parameters
    ----------
    embedding_dim : int, default=128
        Width d of an embedding.
    widths : tuple of int, default=(64, 128, 256)
        Layers of the shared network.
    """

    def __init__(self, embedding_dim: int = 128, widths: tuple[int, ...] = (64, 128, 256), *, device=None, dtype=None):
        super().__init__()
        if embedding_dim < 1 or not widths or min(widths) < 1:
            raise ValueError(f"embedding_dim and widths must be at least 1, got {embedding_dim} and {widths}")

        def linear(d_in: int, d_out: int) -> nn.Linear:
            return nn.Linear(d_in, d_out, device=device, dtype=dtype)

        layers: list[nn.Module] = []
        for d_in, d_out in zip((3, *widths[:-1]), widths, strict=True):
            layers += [linear(d_in, d_out), nn.ReLU()]
        self.points = nn.Sequential(*layers)
        self.head = nn.Sequential(linear(2 * widths[-1], widths[-1]), nn.ReLU(), linear(widths[-1], embedding_dim))

    def forward(self, points: Float[Tensor, "*batch n 3"]) -> Float[Tensor, "*batch d"]:
        if points.shape[-2] == 0:
            raise ValueError(f"points must hold at least one point a cloud, got shape {tuple(points.shape)}")
        each = self.points(points)
        return self.head(torch.cat([each.amax(dim=-2), each.mean(dim=-2)], dim=-1))


def train_point_encoder(
    clouds: Any,
    *,
    embedding_dim: int = 128,
    epochs: int = 4,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    temperature: float = 0.1,
    random_state: int = 0,
    device: str = "cpu",
) -> PointNetEncoder:
    """Train an encoder to know two views of one cloud from those of others (NT-Xent), with no labels and no text.

    A view is half of the points, turned about the third axis, with a jitter of 0.02.

    Parameters
    ----------
    clouds : array of shape (m, n, 3)
        Normalised, m >= 2 and n >= 4.
    temperature : float
        Above 0.
    random_state : int

    Raises
    ------
    ValueError
        Clouds have another shape or are not finite, or a number is out of range.
    """
    points = torch.as_tensor(np.asarray(clouds, dtype=np.float32))
    if points.ndim != 3 or points.shape[2] != 3 or points.shape[0] < 2 or points.shape[1] < 4:
        raise ValueError(f"clouds must have shape (m, n, 3) with m >= 2 and n >= 4, got {tuple(points.shape)}")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("clouds must be finite, got NaN or infinity")
    if epochs < 1 or batch_size < 2 or not temperature > 0 or not learning_rate > 0:
        raise ValueError(
            "epochs, batch_size - 1, temperature and learning_rate must be positive, got "
            f"{epochs}, {batch_size - 1}, {temperature} and {learning_rate}"
        )
    chosen, generator = pick_device(device), torch_generator(random_state)
    with torch.random.fork_rng(devices=[]):  # layers draw from the global generator first; its state must stay
        encoder, projector = PointNetEncoder(embedding_dim), nn.Linear(embedding_dim, 64)
    with torch.no_grad():
        for layer in [m for part in (encoder, projector) for m in part.modules() if isinstance(m, nn.Linear)]:
            layer.weight.normal_(std=(2 / layer.in_features) ** 0.5, generator=generator)
            layer.bias.zero_()
    encoder, projector = encoder.to(chosen), projector.to(chosen)
    optimiser = torch.optim.Adam([*encoder.parameters(), *projector.parameters()], lr=learning_rate)
    with Progress("training the point encoder", epochs) as shown:
        for _ in range(epochs):
            for rows in torch.randperm(len(points), generator=generator).split(batch_size):
                if len(rows) < 2:
                    continue
                views = torch.cat([_view(points[rows], generator) for _ in range(2)]).to(chosen)
                codes = nn.functional.normalize(projector(encoder(views)), dim=-1)
                logits = codes @ codes.T / temperature
                logits = logits.masked_fill(torch.eye(len(codes), dtype=torch.bool, device=chosen), -torch.inf)
                twins = torch.arange(len(codes), device=chosen).roll(len(rows))
                optimiser.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(logits, twins).backward()
                optimiser.step()
            shown.advance(1)
    return encoder.eval()


def _view(points: Tensor, generator: torch.Generator) -> Tensor:
    """Take half of each cloud's points, turn them about the third axis, and jitter them."""
    b, n, _ = points.shape
    kept = torch.rand(b, n, generator=generator).argsort(dim=1)[:, : n // 2]
    half = points.gather(1, kept[..., None].expand(-1, -1, 3))
    angle = 2 * torch.pi * torch.rand(b, generator=generator)
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros(b), torch.ones(b)
    turn = torch.stack([c, -s, zero, s, c, zero, zero, zero, one], dim=1).reshape(b, 3, 3)
    return half @ turn + 0.02 * torch.randn(half.shape, generator=generator)
