"""Products of two functions on the sphere, in coefficients, with derivatives of every order and little memory."""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import forward_ad

from ._autocast import without_autocast
from ._sphere_routes import (
    CACHE_FLOATS,
    LEAST_ROWS,
    Axis,
    Shape,
    build,
    from_grid,
    multiply,
    n_nodes,
    table_bytes,
    to_grid,
)

# The table of a route that has one entry a component.
WIDTH_TABLE = {"dense": 0, "separable": 1, "fourier": 2}
METHODS = ("auto", "dense", "separable", "fourier")
MAX_TABLE_BYTES = 2**28
# Sum of the three degrees from which separable steps were faster on a CPU core; the Fourier route was faster nowhere.
SEPARABLE_FROM = 20


class TableModule(nn.Module):
    """A module whose tables follow it to any device and are made anew from float64 in any dtype.

    They are buffers that no state_dict holds. Below float32 they stay float32: products are computed there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._exact: dict[str, NDArray] = {}
        self.register_buffer("_dtype_mark", torch.empty(0), persistent=False)

    def keep_table(self, name: str, exact: NDArray, device: Any, dtype: torch.dtype | None) -> None:
        """Register a NumPy table: integers as they are, floats in the module's dtype."""
        dtype = dtype or torch.get_default_dtype()
        self._exact[name] = exact
        self._dtype_mark = torch.empty(0, device=device, dtype=dtype)
        self.register_buffer(name, self._cast(exact), persistent=False)

    def keep_tables(self, exact: Sequence[NDArray], device: Any, dtype: torch.dtype | None) -> None:
        """Register tables by number."""
        for i, table in enumerate(exact):
            self.keep_table(f"table_{i}", table, device, dtype)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """All numbered tables, those of the first function first."""
        return tuple(self.table(name) for name in self._exact)

    def table(self, name: str) -> Tensor:
        """Return a table as it is on the module's device."""
        return cast("Tensor", self._buffers[name])

    def _cast(self, exact: NDArray) -> Tensor:
        kind = self.compute_dtype if exact.dtype.kind == "f" else torch.int64
        return torch.from_numpy(exact).to(device=self._dtype_mark.device, dtype=kind)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which products are computed: float32 or wider."""
        return torch.promote_types(self._dtype_mark.dtype, torch.float32)

    def _apply(self, fn: Any, recurse: bool = True) -> "TableModule":
        before = self._dtype_mark
        super()._apply(fn, recurse)
        if (self._dtype_mark.dtype, self._dtype_mark.device) != (before.dtype, before.device):
            for name, exact in self._exact.items():
                setattr(self, name, self._cast(exact))
        return self

    def cast_input(self, x: Tensor, name: str) -> Tensor:
        """Return an input in the dtype of the tables.

        Raises
        ------
        ValueError
            It is wider than the module, whose tables would then limit its precision.
        """
        if not x.is_floating_point() or torch.promote_types(x.dtype, self.compute_dtype) != self.compute_dtype:
            raise ValueError(
                f"{name} must be a float tensor no wider than the module's {self.compute_dtype}, got {x.dtype}; "
                "move the module with .to(dtype) first"
            )
        return x.to(self.compute_dtype)


def transformed(*tensors: Tensor | None) -> bool:
    """Say whether a transform of functions or a forward derivative is at work, outside captured graphs.

    Functions of this package then give way to the operations they are made of, which torch transforms by itself: a
    Function that could be transformed would be one that torch.compile refuses.
    """
    if torch.compiler.is_compiling():
        return False
    # What torch itself asks before it applies a Function.
    return torch._C._are_functorch_transforms_active() or any(t is not None and has_tangent(t) for t in tensors)


def has_tangent(x: Tensor) -> bool:
    """Say whether a forward derivative is being taken along a tensor."""
    # Looked for only where some level can hold it, which is many times faster.
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _forward(
    x: Tensor, y: Tensor, shape: Shape, lead: tuple[int, ...], tables: tuple[Tensor, ...], plain: bool = False
) -> Tensor:
    k = shape.n_tables
    first, second, third = tables[:k], tables[k : 2 * k], tables[2 * k :]
    part = "value" if shape.kind == "gaunt" else "gradient"

    flat = x.dim() == y.dim() == 2 and len(x) == len(y) and len(lead) == 1

    def one(x: Tensor, y: Tensor) -> Tensor:
        values = multiply(to_grid(x, shape, 0, first, part), to_grid(y, shape, 1, second, part), shape)
        if not flat and values.shape[:-1] != lead:
            values = values.sum_to_size(*lead, values.shape[-1])
        return from_grid(values, shape, 2, third)

    rows = x.shape[0]
    block = max(LEAST_ROWS, CACHE_FLOATS[shape.method] // n_nodes(shape))
    if plain or not flat or torch.compiler.is_compiling() or rows <= block:
        return one(x, y)
    out = x.new_empty(len(third[WIDTH_TABLE[shape.method]]), rows)
    for i in range(0, rows, block):
        out[:, i : i + block] = one(x[i : i + block], y[i : i + block]).T
    return out.T


class _Product(torch.autograd.Function):
    """z = sum over the grid of f g h, linear in each: its derivatives are the same sum with the roles exchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, shape: Shape, lead: tuple[int, ...], *tables: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, *tables)
        ctx.shape, ctx.lead = shape, lead
        return _forward(x, y, shape, lead, tables)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        x, y, *tables = ctx.saved_tensors
        shape, k, grad = ctx.shape, ctx.shape.n_tables, grads[0]
        first, second, third = tables[:k], tables[k : 2 * k], tables[2 * k :]
        gx = gy = None
        # The bracket integrates to a form that changes sign with every exchange, so the cyclic order is kept.
        if ctx.needs_input_grad[0]:
            turned = shape.turned((1, 2, 0))
            gx = _Product.apply(y, grad, turned, tuple(x.shape[:-1]), *second, *third, *first)
        if ctx.needs_input_grad[1]:
            turned = shape.turned((2, 0, 1))
            gy = _Product.apply(grad, x, turned, tuple(y.shape[:-1]), *third, *first, *second)
        return gx, gy, None, None, *([None] * len(tables))


def _apply(x: Tensor, y: Tensor, shape: Shape, lead: tuple[int, ...], tables: tuple[Tensor, ...]) -> Tensor:
    if transformed(x, y):
        return _forward(x, y, shape, lead, tables, plain=True)
    return _Product.apply(x, y, shape, lead, *tables)


def sphere_product(x: Tensor, y: Tensor, shape: Shape, tables: tuple[Tensor, ...]) -> Tensor:
    """Multiply coefficients (*batch, D1) and (*batch, D2), broadcast as torch does, into (*batch, D3)."""
    with without_autocast(x):
        return _sphere_product(x, y, shape, tables)


def _sphere_product(x: Tensor, y: Tensor, shape: Shape, tables: tuple[Tensor, ...]) -> Tensor:
    if x.shape[:-1] == y.shape[:-1]:
        batch = x.shape[:-1]
    else:
        batch = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        if shape.method == "dense":
            missing = len(batch) - x.dim() + 1, len(batch) - y.dim() + 1
            x, y = (t[(None,) * n] for t, n in zip((x, y), missing, strict=True))
            return _apply(x, y, shape, tuple(batch), tables)
        x, y = x.expand(*batch, -1), y.expand(*batch, -1)
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    made = _apply(x, y, shape, (len(x),), tables)
    return made.reshape(*batch, made.shape[-1])


class SphereProduct(TableModule):
    """The tables of one product, (..., D1) with (..., D2) to (..., D3), and the product itself."""

    def __init__(self, axes: tuple[Axis, Axis, Axis], kind: str, method: str, *, device: Any, dtype: Any) -> None:
        super().__init__()
        degree = sum(axis.lmax for axis in axes)
        self.shape, exact = build(method, kind, axes, degree)
        self.keep_tables(exact, device, dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Multiply tensors that are in the compute dtype."""
        return sphere_product(x, y, self.shape, self.tables)


def choose_method(method: str, axes: tuple[Axis, Axis, Axis], kinds: Sequence[str], dtype: Any) -> str:
    """Return the route that was asked for, or the faster one; never dense tables above :data:`MAX_TABLE_BYTES`.

    Raises
    ------
    ValueError
        No such route.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    degree = sum(axis.lmax for axis in axes)
    size = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32).itemsize
    needed = max(table_bytes("dense", kind, axes, degree, size) for kind in kinds)
    if method == "dense" and needed > MAX_TABLE_BYTES:
        warnings.warn(
            f"method='dense' would need {needed / 2**20:.0f} MiB of tables for degrees {[a.lmax for a in axes]}, "
            f"more than {MAX_TABLE_BYTES / 2**20:.0f} MiB: the separable route is taken",
            stacklevel=3,
        )
        return "separable"
    if method == "auto":
        return "dense" if degree < SEPARABLE_FROM and needed <= MAX_TABLE_BYTES else "separable"
    return method
