"""Products of packed features in blocks that a processor's cache holds, over half of the sphere where it is enough."""

import threading
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._sphere_routes import CACHE_FLOATS, Shape, from_grid, multiply, n_nodes, to_grid

# A block whose values and coefficients take this many floats was fastest on a CPU core.
BLOCK_FLOATS = 2**19
# Sum of the three degrees below which half of the sphere was faster than separable steps.
HALF_BELOW = 45
# What a thread keeps at most between calls: memory for one block, for either pass, and views of it.
KEPT_FLOATS = 2 * BLOCK_FLOATS
MOST_TOOLS = 64


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


@lru_cache(maxsize=1024)
def _block(n: int, most: int) -> int:
    """Return the number of nodes in a block, ``most`` or fewer, with which ``n`` nodes take least time."""
    # Of few sizes, so that few places are kept whatever the sizes of batches.
    step = 1 << max(1, min(n, most) // 8).bit_length() - 1
    sizes = range(step, min(n, most) + 1, step)
    # The last block overlaps the one before it, and every block has a cost of its own.
    return min(sizes, key=lambda nodes: -(-n // nodes) * (nodes + most / 16))


def _stride(rows: int) -> int:
    """Return a length of rows that does not put all components on the same few lines of a cache."""
    return rows + 16 if rows % 256 == 0 else rows


class Plan:
    """A product of packed features (n, mul Σ (2l + 1)): three functions in one order, and what is needed of each.

    Tables are two a function, even and odd, if ``half``, and otherwise those of the route in ``shape``. It is looked up
    by identity, and serves all calls with the same tables.
    """

    def __init__(
        self,
        degrees: tuple[tuple[int, ...], ...],
        tables: tuple[Tensor, ...],
        shape: Shape,
        half: bool,
        mul: int,
        layout: str,
    ) -> None:
        k = len(tables) // 3
        self.degrees, self.flat_tables = degrees, tables
        self.tables = tables[:k], tables[k : 2 * k], tables[2 * k :]
        self.widths = tuple(sum(2 * l + 1 for l in part) for part in degrees)
        self.shape, self.half, self.mul, self.layout = shape, half, mul, layout
        self.dtype = tables[0].dtype if half else tables[-1].dtype
        self.grid = len(tables[0]) if half else n_nodes(shape)
        self._turned: dict[tuple[int, int, int], Plan] = {}

    def turned(self, order: tuple[int, int, int]) -> "Plan":
        """Return the product with the three functions in another order."""
        if order not in self._turned:
            self._turned[order] = Plan(
                tuple(self.degrees[i] for i in order),
                tuple(table for i in order for table in self.tables[i]),
                self.shape.turned(order),
                self.half,
                self.mul,
                self.layout,
            )
        return self._turned[order]

    def rows(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> int:
        """Return how many numbers a row takes while some functions are read and others written, over half a sphere."""
        first, last = (max(self.grid, *(self.widths[i] for i in some)) for some in (inputs, outputs))
        return first + (2 * len(inputs) - 1) * self.grid + last

    def block(self, n: int) -> int:
        """Return the number of nodes in a block, of ``n`` nodes, whose values suit the cache."""
        rows = BLOCK_FLOATS // self.rows((0, 1), (2,)) if self.half else CACHE_FLOATS[self.shape.method] // self.grid
        return _block(n, max(1, rows // self.mul))


class _Reader:
    """Gathers the components of one function from a block, and finds its even and odd values."""

    def __init__(self, plan: Plan, i: int, memory: Tensor, values: tuple[Tensor, ...], nodes: int) -> None:
        places, _ = _places(plan.degrees[i], plan.mul, nodes, plan.half, plan.layout)
        self.places, self.flat = places.view(-1), memory
        self.components, self.values, self.steps = memory.view(places.shape), values, []
        if plan.half:
            parts = self.components.split([table.shape[1] for table in plan.tables[i]])
            self.steps = list(zip(plan.tables[i], parts, values, strict=True))

    def __call__(self, x: Tensor) -> None:
        torch.index_select(x, 0, self.places, out=self.flat)
        for table, part, place in self.steps:
            torch.mm(table, part, out=place)


class _Writer:
    """Finds the components of values, and puts them into a block of a result."""

    def __init__(self, plan: Plan, i: int, memory: Tensor, values: tuple[Tensor, ...], nodes: int) -> None:
        _, self.places = _places(plan.degrees[i], plan.mul, nodes, plan.half, plan.layout)
        self.flat, self.components, self.steps = memory, memory.view(plan.widths[i], -1), []
        if plan.half:
            parts = self.components.split([table.shape[1] for table in plan.tables[i]])
            self.steps = [(t.T, v, part) for t, v, part in zip(plan.tables[i], values, parts, strict=True)]

    def __call__(self, out: Tensor) -> None:
        for table, values, part in self.steps:
            torch.mm(table, values, out=part)
        torch.index_select(self.flat, 0, self.places, out=out)


def _multiply_halves(f: tuple[Tensor, ...], g: tuple[Tensor, ...], even: Tensor) -> None:
    """Put the even part of a product into ``even``, and its odd part in place of that of ``f`` that is even."""
    (fe, fo), (ge, go) = f, g
    torch.mul(fe, ge, out=even).addcmul_(fo, go)
    fe.mul_(go).addcmul_(fo, ge)


def _multiply_by_route(x: Tensor, y: Tensor, plan: Plan) -> Tensor:
    """Multiply rows of components by the steps of a route over the whole sphere."""
    shape, part = plan.shape, "value" if plan.shape.kind == "gaunt" else "gradient"
    first, second = (to_grid(t, shape, i, plan.tables[i], part) for i, t in enumerate((x, y)))
    return from_grid(multiply(first, second, shape), shape, 2, plan.tables[2])


class _Tools:
    """What the product, or both of its gradients, of one block after another needs: memory, readers and writers."""

    def __init__(self, plan: Plan, nodes: int, gradients: bool, memory: "_Kept") -> None:
        self.plan, stride = plan, _stride(nodes * plan.mul)
        if not plan.half:
            self.n_floats = sum(plan.widths) * stride
            *parts, last = memory.take(plan.dtype, tuple(width * stride for width in plan.widths))
            self.read = [_Reader(plan, i, part, (), nodes) for i, part in enumerate(parts)]
            self.write = [_Writer(plan, 2, last, (), nodes)]
            return
        inputs, outputs = ((0, 2, 1), (0, 1)) if gradients else ((0, 1), (2,))
        rows, n_values = plan.rows(inputs, outputs), 2 * len(inputs) + 1
        self.n_floats = rows * stride
        (flat,) = memory.take(plan.dtype, (self.n_floats,))
        # Components are read where the even part of the product will stand, and are written where the odd values of the
        # last input have stood: the less memory a block takes, the more of it is in the cache.
        ahead, g = max(0, *(plan.widths[i] - plan.grid for i in inputs)) * stride, plan.grid * stride
        values = flat[ahead : ahead + n_values * g].view(n_values, plan.grid, stride)
        self.spare, *places = values.unbind()
        pairs = {i: (places[2 * k], places[2 * k + 1]) for k, i in enumerate(inputs)}
        self.read = [_Reader(plan, i, flat[: plan.widths[i] * stride], pairs[i], nodes) for i in sorted(inputs)]
        end = flat[ahead + (n_values - 1) * g :]
        product = [(self.spare, pairs[i][0]) for i in ((1, 0) if gradients else (0,))]
        self.write = [
            _Writer(plan, i, end[: plan.widths[i] * stride], place, nodes)
            for i, place in zip(outputs, product, strict=True)
        ]

    def multiply(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        """Multiply a block."""
        (f, g), (write,), plan = self.read, self.write, self.plan
        f(x)
        g(y)
        if plan.half:
            _multiply_halves(f.values, g.values, self.spare)
        else:
            write.components.copy_(_multiply_by_route(f.components.T, g.components.T, plan).T)
        write(out)

    def differentiate(self, x: Tensor, y: Tensor, grad: Tensor, gx: Tensor, gy: Tensor) -> None:
        """Find both gradients of a block over half of the sphere, from values found once."""
        (f, g, h), (write_x, write_y) = self.read, self.write
        f(x)
        g(y)
        h(grad)
        _multiply_halves(g.values, h.values, self.spare)
        write_x(gx)
        _multiply_halves(f.values, h.values, self.spare)
        write_y(gy)


class _Kept(threading.local):
    """Memory and tools that a thread keeps from call to call.

    A page that is new to the process costs more than what is done with it, and so do many views of small blocks.
    """

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}
        self.tools: dict[tuple[Plan, int, bool], _Tools] = {}

    def take(self, dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Return vectors that stay valid until the next call."""
        total = sum(sizes)
        if total > KEPT_FLOATS:
            return torch.empty(total, dtype=dtype, device="cpu").split(sizes)
        if dtype not in self.memory:
            self.memory[dtype] = torch.empty(KEPT_FLOATS, dtype=dtype, device="cpu")
        return self.memory[dtype][:total].split(sizes)

    def tools_of(self, plan: Plan, nodes: int, gradients: bool) -> _Tools:
        """Return tools for blocks of as many nodes."""
        key = plan, nodes, gradients
        if key in self.tools:
            return self.tools[key]
        # Memory that is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            made = _Tools(plan, nodes, gradients, self)
        if made.n_floats <= KEPT_FLOATS:
            if len(self.tools) >= MOST_TOOLS:
                self.tools.clear()
            self.tools[key] = made
        return made


_kept = _Kept()


def _cut(x: Tensor, nodes: int) -> list[Tensor]:
    """Cut into flat blocks of as many nodes: where they do not divide, the last overlaps the one before it."""
    (n, width), flat = x.shape, x.reshape(-1)
    if n == nodes:
        return [flat]
    starts = [min(start, n - nodes) * width for start in range(0, n, nodes)]
    return [flat[start : start + nodes * width] for start in starts]


def _multiply(x: Tensor, y: Tensor, plan: Plan) -> Tensor:
    out = x.new_empty(len(x), plan.mul * plan.widths[2])
    if len(x):
        nodes = plan.block(len(x))
        tools = _kept.tools_of(plan, nodes, False)
        for block in zip(_cut(x, nodes), _cut(y, nodes), _cut(out, nodes), strict=True):
            tools.multiply(*block)
    return out


def _both_gradients(x: Tensor, y: Tensor, grad: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    gx, gy = x.new_empty(x.shape), y.new_empty(y.shape)
    if len(x):
        nodes = plan.block(len(x))
        tools = _kept.tools_of(plan, nodes, True)
        for block in zip(*(_cut(t, nodes) for t in (x, y, grad, gx, gy)), strict=True):
            tools.differentiate(*block)
    return gx, gy


def _multiply_plainly(x: Tensor, y: Tensor, plan: Plan) -> Tensor:
    """Multiply by operations that torch takes apart itself, for tensors that stand for a batch of them."""

    def order(i: int) -> Tensor:
        places, _ = _places(plan.degrees[i], plan.mul, 1, plan.half, plan.layout)
        return places[:, : plan.mul].reshape(-1)

    # (n, components, mul)
    first, second = (t.index_select(1, order(i)).view(len(t), -1, plan.mul) for i, t in enumerate((x, y)))
    if plan.half:
        (fe, fo), (ge, go) = (
            [table @ part for table, part in zip(tables, t.split([k.shape[1] for k in tables], dim=1), strict=True)]
            for t, tables in zip((first, second), plan.tables[:2], strict=True)
        )
        values = fe * ge + fo * go, fe * go + fo * ge
        made = torch.cat([table.T @ part for table, part in zip(plan.tables[2], values, strict=True)], dim=1)
    else:
        rows = _multiply_by_route(*(t.mT.reshape(-1, t.shape[1]) for t in (first, second)), plan)
        made = rows.reshape(len(x), plan.mul, -1).mT
    return made.reshape(len(x), -1).index_select(1, order(2).argsort())


def has_memory(*tensors: Tensor) -> bool:
    """Say whether tensors have memory to read: those that stand for a batch, or for none, have not."""
    try:
        for x in tensors:
            x.data_ptr()
    except RuntimeError:
        return False
    return True


class _PackedProduct(torch.autograd.Function):
    """A form that is linear in three functions: its derivatives are the same form with the roles exchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.plan = plan
        return _multiply(x, y, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (x, y), plan, grad, needed = ctx.saved_tensors, ctx.plan, grads[0], ctx.needs_input_grad
        # A batch of gradients that are to be taken at once comes as one tensor, which has no memory.
        solid = has_memory(x, y, grad)
        if solid and plan.half and needed[0] and needed[1] and not torch.is_grad_enabled():
            return *_both_gradients(x, y, grad, plan), None
        product = _PackedProduct.apply if solid else _multiply_plainly
        # The cyclic order is kept, for the sign of brackets.
        gx = product(y, grad, plan.turned((1, 2, 0))) if needed[0] else None
        gy = product(grad, x, plan.turned((2, 0, 1))) if needed[1] else None
        return gx, gy, None


def packed_product(x: Tensor, y: Tensor, plan: Plan) -> Tensor:
    """Multiply features (n, mul Σ (2l + 1)) in blocks whose values stay in a CPU's cache."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast(device_type="cpu", enabled=False):
            return packed_product(x, y, plan)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return _PackedProduct.apply(x, y, plan)
    return _multiply(x, y, plan)
