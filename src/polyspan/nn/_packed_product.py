"""Products of packed features in blocks that a processor's cache holds, over half of the sphere where it is enough."""

import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._sphere import azimuth, latitude_tables, sphere_grid
from ._sphere_product import TableModule
from ._sphere_routes import CACHE_FLOATS, Axis, Shape, from_grid, multiply, n_nodes, to_grid

# A block whose values and coefficients take this many floats was fastest on a CPU core, and products with fewer values
# on the grid were faster without blocks.
BLOCK_FLOATS = 3 * 2**18
LEAST_VALUES = 2**10
# Sum of the three degrees below which half of the sphere was faster than separable steps.
HALF_BELOW = 26
# What a thread keeps at most between calls: memory for one block, for either pass, and views of it.
KEPT_FLOATS = 2 * BLOCK_FLOATS
MOST_TOOLS = 64


@lru_cache(maxsize=16)
def _half_tables(axis: Axis, degree: int) -> tuple[NDArray, NDArray]:
    """Return the even and the odd harmonics of a function at the nodes of half a sphere, (nodes, components) each.

    An integral of three harmonics is zero unless they are an even function together, so one node of every two opposite
    ones is enough. The two stand apart, and the product of values at the other node follows from them. Weights of the
    nodes are folded in as cube roots.
    """
    degree -= degree % 2
    grid = sphere_grid(degree)
    P, half = latitude_tables(axis.lmax, degree).value, (degree // 2 + 1) // 2
    # Opposite nodes of the equator lie on it: half of the circle is enough there.
    n_equator = (degree // 2 + 1) % 2 * (degree // 2 + 1)
    equator = np.pi * np.arange(n_equator) / max(n_equator, 1)
    full = np.repeat(2 * grid.weight[:half], len(grid.a))
    weight = np.concatenate([full, np.full(n_equator, grid.weight[half] * len(grid.a) / max(n_equator, 1))])

    def harmonic(l: int, m: int) -> NDArray:
        north = np.multiply.outer(P[l, abs(m), :half], azimuth(m, grid.a)[0])
        return np.concatenate([north.ravel(), P[l, abs(m), half] * azimuth(m, equator)[0]])

    made = [
        [f * harmonic(l, m) for l, f in zip(*axis, strict=True) if l % 2 == odd for m in range(-l, l + 1)]
        for odd in (0, 1)
    ]
    even, odd = (np.reshape(rows, (-1, len(weight))).T * np.cbrt(weight)[:, None] for rows in made)
    return even, odd


class HalfSphere(TableModule):
    """The tables of a dense product over half of the sphere, even and odd ones for each of the three functions."""

    def __init__(self, axes: tuple[Axis, Axis, Axis], *, device: Any, dtype: Any) -> None:
        super().__init__()
        degree = sum(axis.lmax for axis in axes)
        self.keep_tables([table for axis in axes for table in _half_tables(axis, degree)], device, dtype)


@lru_cache(maxsize=64)
def _places(degrees: tuple[int, ...], mul: int, nodes: int, apart: bool, layout: str) -> tuple[Tensor, Tensor]:
    """Return where a block of nodes holds its components, (components, rows), and where those hold its numbers.

    A row is a channel of a node. Components stand in their order, or the even degrees before the odd ones if apart.
    """
    size = sum(2 * l + 1 for l in degrees)
    node, channel = np.arange(nodes)[:, None] * mul * size, np.arange(mul)
    starts = np.cumsum([0, *(2 * l + 1 for l in degrees)])
    order = sorted(range(len(degrees)), key=lambda i: degrees[i] % 2) if apart else range(len(degrees))
    rows = []
    for i in order:
        n = 2 * degrees[i] + 1
        first, step = (mul * starts[i], n) if layout == "e3nn" else (starts[i], size)
        rows += [node + first + channel * step + m for m in range(n)]
    places = np.stack(rows).reshape(size, nodes * mul)
    stride = _stride(nodes * mul)
    # What pads a row reads any number, and nothing reads it.
    read = np.pad(places, ((0, 0), (0, stride - nodes * mul)))
    write = np.empty(places.size, dtype=np.int64)
    write[places] = np.arange(size)[:, None] * stride + np.arange(nodes * mul)
    with torch.inference_mode(False):
        return torch.from_numpy(read), torch.from_numpy(write)


def _stride(rows: int) -> int:
    """Return a length of rows that does not put all components on the same few lines of a cache."""
    return rows + 16 if rows % 256 == 0 else rows


class Packed(NamedTuple):
    """A product of packed features (n, mul Σ (2l + 1)): three functions in one order, and what is needed of each.

    Tables are those of :class:`HalfSphere` if ``half``, and otherwise those of the route in ``shape``.
    """

    degrees: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    tables: tuple[tuple[Tensor, ...], ...]
    shape: Shape
    half: bool
    mul: int
    layout: str

    def turned(self, order: tuple[int, int, int]) -> "Packed":
        """Return the product with the three functions in another order."""
        return self._replace(
            degrees=tuple(self.degrees[i] for i in order),
            widths=tuple(self.widths[i] for i in order),
            tables=tuple(self.tables[i] for i in order),
            shape=self.shape.turned(order),
        )

    @property
    def grid(self) -> int:
        """Number of values of one function."""
        return len(self.tables[0][0]) if self.half else n_nodes(self.shape)

    def block(self, n: int) -> int:
        """Return the number of nodes in a block, of ``n`` nodes, whose values suit the cache."""
        rows = CACHE_FLOATS[self.shape.method] // self.grid
        if self.half:
            rows = BLOCK_FLOATS // (6 * self.grid + sum(self.widths))
        most = max(1, rows // self.mul)
        # Of few sizes, so that few places are kept whatever the sizes of batches.
        step = max(1, most // 16)
        blocks = -(-n // most)
        nodes = -(-n // blocks // step) * step
        if nodes > n >= step:
            nodes = -(-n // (blocks + 1) // step) * step
        return min(nodes, most, n)


class _Reader:
    """Gathers the components of one function from block after block, and finds their values."""

    def __init__(self, plan: Packed, i: int, memory: Tensor, values: Tensor, nodes: int) -> None:
        places, _ = _places(plan.degrees[i], plan.mul, nodes, plan.half, plan.layout)
        self.places, self.flat = places.view(-1), memory
        self.components, self.values, self.steps = memory.view(places.shape), values, []
        if plan.half:
            parts = self.components.split([table.shape[1] for table in plan.tables[i]])
            self.steps = list(zip(plan.tables[i], parts, self.values, strict=True))

    def __call__(self, x: Tensor) -> None:
        torch.index_select(x.reshape(-1), 0, self.places, out=self.flat)
        for table, part, place in self.steps:
            torch.mm(table, part, out=place)


class _Writer:
    """Finds the components of values, and puts them into block after block of a result."""

    def __init__(self, plan: Packed, i: int, memory: Tensor, values: Tensor, nodes: int) -> None:
        _, self.places = _places(plan.degrees[i], plan.mul, nodes, plan.half, plan.layout)
        self.flat, self.components, self.values, self.steps = memory, memory.view(plan.widths[i], -1), values, []
        if plan.half:
            parts = self.components.split([table.shape[1] for table in plan.tables[i]])
            self.steps = [(t.T, v, part) for t, v, part in zip(plan.tables[i], self.values, parts, strict=True)]

    def __call__(self, out: Tensor) -> None:
        for table, values, part in self.steps:
            torch.mm(table, values, out=part)
        torch.index_select(self.flat, 0, self.places, out=out.view(-1))


def _multiply_halves(f: Tensor, g: Tensor, out: Tensor) -> None:
    (fe, fo), (ge, go), (even, odd) = f, g, out
    torch.mul(fe, ge, out=even).addcmul_(fo, go)
    torch.mul(fe, go, out=odd).addcmul_(fo, ge)


class _Kept(threading.local):
    """Memory, readers and writers that a thread keeps from call to call.

    A page that is new to the process costs more than what is done with it, and so do many views of small blocks.
    """

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}
        self.tools: dict[tuple, tuple[Packed, list[_Reader], list[_Writer]]] = {}

    def take(self, dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Return vectors that stay valid until the next call."""
        total = sum(sizes)
        # Memory that is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            if total > KEPT_FLOATS:
                return torch.empty(total, dtype=dtype, device="cpu").split(sizes)
            if dtype not in self.memory:
                self.memory[dtype] = torch.empty(KEPT_FLOATS, dtype=dtype, device="cpu")
            return self.memory[dtype][:total].split(sizes)

    def tools_of(
        self, plan: Packed, dtype: torch.dtype, nodes: int, readers: int, writers: tuple[int, ...]
    ) -> tuple[Packed, list[_Reader], list[_Writer]]:
        """Return readers of the first functions and writers, for blocks of as many nodes."""
        # What is kept holds the tables, so that their identities are theirs alone.
        tables = tuple(id(table) for tables in plan.tables for table in tables)
        key = (tables, plan.degrees, plan.mul, plan.layout, nodes, readers, writers)
        if key not in self.tools:
            if len(self.tools) >= MOST_TOOLS:
                self.tools.clear()
            stride, n_grid = _stride(nodes * plan.mul), plan.grid if plan.half else 0
            n_values = readers + 1
            sizes = (2 * n_values * n_grid * stride, *(width * stride for width in plan.widths))
            flat, *memory = self.take(dtype, sizes)
            values = flat.view(n_values, 2, n_grid, stride)
            with torch.inference_mode(False):
                read = [_Reader(plan, i, memory[i], values[i], nodes) for i in range(readers)]
                write = [_Writer(plan, i, memory[i], values[-1], nodes) for i in writers]
            if sum(sizes) > KEPT_FLOATS:
                return plan, read, write
            self.tools[key] = plan, read, write
        return self.tools[key]


_kept = _Kept()


def _blocks(
    plan: Packed, like: Tensor, readers: int, writers: tuple[int, ...]
) -> Iterator[tuple[slice, list[_Reader], list[_Writer], Tensor]]:
    """Go over all nodes block by block, with readers of the first functions, writers, and memory for a product."""
    n = len(like)
    if not n:
        return
    nodes = plan.block(n)
    _, read, write = _kept.tools_of(plan, like.dtype, nodes, readers, writers)
    for start in range(0, n, nodes):
        # The last block overlaps the one before it where nodes do not divide, and finds the same again.
        first = min(start, n - nodes)
        yield slice(first, first + nodes), read, write, write[0].values


def _multiply_packed(x: Tensor, y: Tensor, plan: Packed) -> Tensor:
    out, shape = x.new_empty(len(x), plan.mul * plan.widths[2]), plan.shape
    part = "value" if shape.kind == "gaunt" else "gradient"
    for here, (f, g), (write,), product in _blocks(plan, x, 2, (2,)):
        f(x[here])
        g(y[here])
        if plan.half:
            _multiply_halves(f.values, g.values, product)
        else:
            first, second = (to_grid(t.components.T, shape, i, plan.tables[i], part) for i, t in enumerate((f, g)))
            write.components.copy_(from_grid(multiply(first, second, shape), shape, 2, plan.tables[2]).T)
        write(out[here])
    return out


def _both_gradients(x: Tensor, y: Tensor, grad: Tensor, plan: Packed) -> tuple[Tensor, Tensor]:
    """Return the gradients of both factors of a product over half of the sphere, from values found once."""
    gx, gy = x.new_empty(x.shape), y.new_empty(y.shape)
    for here, (f, g, h), (write_x, write_y), product in _blocks(plan, x, 3, (0, 1)):
        f(x[here])
        g(y[here])
        h(grad[here])
        # Components that have been read are no longer needed: what is written takes their memory.
        _multiply_halves(g.values, h.values, product)
        write_x(gx[here])
        _multiply_halves(f.values, h.values, product)
        write_y(gy[here])
    return gx, gy


class _PackedProduct(torch.autograd.Function):
    """A form that is linear in three functions: its derivatives are the same form with the roles exchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, plan: Packed) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.plan = plan
        return _multiply_packed(x, y, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (x, y), plan, grad, needed = ctx.saved_tensors, ctx.plan, grads[0], ctx.needs_input_grad
        if plan.half and needed[0] and needed[1] and not torch.is_grad_enabled():
            return *_both_gradients(x, y, grad, plan), None
        # The cyclic order is kept, for the sign of brackets.
        gx = _PackedProduct.apply(y, grad, plan.turned((1, 2, 0))) if needed[0] else None
        gy = _PackedProduct.apply(grad, x, plan.turned((2, 0, 1))) if needed[1] else None
        return gx, gy, None


def packed_product(x: Tensor, y: Tensor, plan: Packed) -> Tensor:
    """Multiply features (n, mul Σ (2l + 1)) in blocks whose values stay in a CPU's cache."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast(device_type="cpu", enabled=False):
            return _PackedProduct.apply(x, y, plan)
    return _PackedProduct.apply(x, y, plan)
