"""Product of a function on the sphere with a zonal filter: turned to the pole, the filter leaves every order alone."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._irreps import Irrep, width
from ._sphere import latitude_tables, quarter_turn, sphere_grid
from ._sphere_product import TableModule


class PolarProduct(TableModule):
    """Features (*edges, mul, D1) times filters about directions (*edges, 3), (*edges, mul, D3).

    ``factors`` are how much larger than orthonormal the harmonics of each degree are.
    """

    def __init__(
        self,
        irreps: tuple[tuple[Irrep, ...], tuple[Irrep, ...], tuple[Irrep, ...]],
        factors: tuple[list[float], list[float], list[float]],
        *,
        device: Any,
        dtype: Any,
    ):
        super().__init__()
        self.irreps = irreps
        lmax = [max(part.l for part in parts) for parts in irreps]
        degree = sum(lmax)
        grid = sphere_grid(degree)
        self.n_orders = min(lmax[0], lmax[2]) + 1
        orders = [m for k in range(self.n_orders) for m in sorted({k, -k})]
        measure = grid.weight * len(grid.a)
        for name, i in (("first", 0), ("last", 2)):
            parts, P = irreps[i], latitude_tables(lmax[i], degree).value
            start = dict(zip((p.l for p in parts), np.cumsum([0, *(2 * p.l + 1 for p in parts)]), strict=False))
            gather = np.zeros((len(orders), len(parts)), dtype=np.int64)
            table = np.zeros((len(orders), len(parts), len(grid.b)))
            back = np.full(width(parts), len(orders) * len(parts), dtype=np.int64)
            for j, m in enumerate(orders):
                for k, part in enumerate(parts):
                    if abs(m) <= part.l:
                        gather[j, k] = start[part.l] + part.l + m
                        back[gather[j, k]] = j * len(parts) + k
                        table[j, k] = P[part.l, abs(m)] * (
                            factors[i][k] if name == "first" else measure / factors[i][k]
                        )
            self._keep(name, {"table": table, "gather": gather.ravel(), "back": back}, device, dtype)
            flip = [start[p.l] + 2 * p.l - c for p in parts for c in range(2 * p.l + 1)]
            order = [m for p in parts for m in range(-p.l, p.l + 1)]
            self._keep(name, {"flip": np.array(flip), "order": np.array(order)}, device, dtype)
            self._keep(name, {f"turn_{p.l}": quarter_turn(p.l) for p in parts}, device, dtype)
        zonal = latitude_tables(lmax[1], degree).value[:, 0]
        pole = [np.sqrt((2 * p.l + 1) / (4 * np.pi)) * f * f for p, f in zip(irreps[1], factors[1], strict=True)]
        self.keep_table(
            "zonal", np.stack([zonal[p.l] * c for p, c in zip(irreps[1], pole, strict=True)]), device, dtype
        )

    def _keep(self, name: str, tables: dict[str, NDArray], device: Any, dtype: Any) -> None:
        for key, table in tables.items():
            self.keep_table(f"{name}_{key}", table, device, dtype)

    def forward(self, x: Tensor, vectors: Tensor, filters: Tensor) -> Tensor:
        """Multiply; ``filters`` (*edges or 1, mul or 1, degrees) holds the weight of each degree of the filter."""
        v = vectors.to(x.dtype)
        a, b = torch.atan2(v[..., 0], v[..., 2]), torch.atan2(torch.hypot(v[..., 0], v[..., 2]), v[..., 1])
        x = self._tilt(self._spin(x, a, "first"), b, "first")
        # A vector without a direction has the scalar part alone.
        whole = (v != 0).any(dim=-1)[..., None, None]
        scalar = torch.tensor([part.l == 0 for part in self.irreps[1]], device=x.device)
        g = torch.where(whole | scalar, filters, 0.0) @ self.table("zonal")
        batch = torch.broadcast_shapes(x.shape[:-1], g.shape[:-1])
        g = g.expand(*batch, g.shape[-1]).reshape(-1, g.shape[-1])
        first, last = self.table("first_table"), self.table("last_table")
        rows = x.expand(*batch, -1).reshape(-1, x.shape[-1])
        ordered = rows.T.index_select(0, self.table("first_gather")).view(*first.shape[:2], -1)
        values = torch.bmm(first.mT, ordered) * g.T
        made = torch.bmm(last, values).flatten(0, 1)
        # The last row stands for orders that the product cannot have.
        made = torch.cat([made, made.new_zeros(1, made.shape[1])]).index_select(0, self.table("last_back"))
        z = made.T.reshape(*batch, made.shape[0])
        return self._spin(self._tilt(z, -b, "last"), -a, "last")

    def _spin(self, x: Tensor, angle: Tensor, name: str) -> Tensor:
        """Return the functions v -> f(R v), R the turn about the polar axis by an angle (*edges)."""
        turn = angle[..., None, None] * self.table(f"{name}_order")
        return x * turn.cos() + x[..., self.table(f"{name}_flip")] * turn.sin()

    def _tilt(self, x: Tensor, angle: Tensor, name: str) -> Tensor:
        """Return v -> f(R v), R the turn about x: one about the polar axis between two quarter turns about z."""
        parts = self.irreps[0 if name == "first" else 2]
        return self._quarter(self._spin(self._quarter(x, name, parts, back=True), angle, name), name, parts, back=False)

    def _quarter(self, x: Tensor, name: str, parts: tuple[Irrep, ...], *, back: bool) -> Tensor:
        made = []
        for part, piece in zip(parts, x.split([2 * part.l + 1 for part in parts], dim=-1), strict=True):
            turn = self.table(f"{name}_turn_{part.l}")
            made.append(piece @ (turn if back else turn.mT))
        return torch.cat(made, dim=-1)
