"""Symmetric powers of equivariant features, as powers of a function on the sphere."""

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ._autocast import without_autocast
from ._gaunt_paths import LAYOUTS, NORMALIZATIONS, WEIGHTS, harmonic_scale, pack, unpack
from ._irreps import Irrep, check_channels, read_irreps, width, write_irreps
from ._rotation_torch import as_numpy
from ._sphere_product import TableModule, choose_method, transformed
from ._sphere_routes import CACHE_FLOATS, LEAST_ROWS, Axis, Shape, build, from_grid, n_nodes, to_grid


class _Powers(torch.autograd.Function):
    """Coefficients (n, rows, D2) of f, f², .., f^n from those of f; gradients find the values on the grid again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Shape, num: int, *tables: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tables)
        ctx.shape, ctx.num = shape, num
        block = max(LEAST_ROWS, CACHE_FLOATS[shape.method] // n_nodes(shape))
        if torch.compiler.is_compiling() or len(x) <= block:
            return _powers(x, shape, num, tables)
        return torch.cat([_powers(part, shape, num, tables) for part in x.split(block)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        x, *tables = ctx.saved_tensors
        return _pull_back(x, grads[0], ctx.shape, ctx.num, tuple(tables)), None, None, *([None] * len(tables))


def _powers(x: Tensor, shape: Shape, num: int, tables: tuple[Tensor, ...]) -> Tensor:
    k = shape.n_tables
    f = power = to_grid(x, shape, 0, tables[:k])
    made = [from_grid(power, shape, 1, tables[k:])]
    for _ in range(1, num):
        power = power * f
        made.append(from_grid(power, shape, 1, tables[k:]))
    return torch.stack(made)


def _apply(x: Tensor, shape: Shape, num: int, tables: tuple[Tensor, ...]) -> Tensor:
    return _powers(x, shape, num, tables) if transformed(x) else _Powers.apply(x, shape, num, *tables)


def _pull_back(x: Tensor, grad: Tensor, shape: Shape, num: int, tables: tuple[Tensor, ...]) -> Tensor:
    """Return the gradient Σ n f^(n-1) h_n in the coefficients of x, by operations that can be differentiated again."""
    k = shape.n_tables
    f = to_grid(x, shape, 0, tables[:k])
    total = num * to_grid(grad[num - 1], shape, 1, tables[k:])
    for n in range(num - 1, 0, -1):
        total = total * f + n * to_grid(grad[n - 1], shape, 1, tables[k:])
    return from_grid(total, shape, 0, tables[:k])


class GauntManyBody(TableModule):
    r"""Weighted sum of the powers of a feature with itself, :math:`\sum_{\nu=1}^{n} w_{\nu l}\, (x^{\nu})_l`.

    The many-body product of MACE in the Gaunt basis: with :math:`f_x` the function whose coefficients are x,
    :math:`x^\nu` has the coefficients of :math:`f_x^\nu`. All powers are taken at once on one grid, exact for degree
    n L + L_out; nothing is cut off in between, as that would make the result depend on the order of the products.
    Powers of large features overflow as all powers do; normalise before. Only natural parities exist: a power cannot
    tell a body from its mirror image. Source: catalogue entry ``gaunt``.

    Parameters
    ----------
    irreps_in : str or e3nn.o3.Irreps
        Such as "128x0e+128x1o+128x2e", with one multiplicity and parities (-1)^l.
    irreps_out : str or e3nn.o3.Irreps, optional
        ``irreps_in`` where not given.
    correlation : int, default=3
        Highest power n, at least 1.
    weights : {"per_degree", "shared", "none"}, default="per_degree"
        One weight for each power, channel and irrep of the output; the same for all channels; or 1 throughout. They
        start at 1 over the number of powers and over the root of ν!, the growth of a normal variable's powers.
    num_elements : int, optional
        Number of kinds of node, each with weights of its own; the kind of every node is then given to each call.
    method, normalization, layout
        As for :class:`GauntTensorProduct`; "fourier" is not there.
    check_finite : bool, default=False

    Attributes
    ----------
    irreps_in, irreps_out : str
    weight : Parameter of shape (num_elements or 1, correlation, mul or 1, irreps of the output), or None
    method : str
        The route taken.

    Raises
    ------
    ValueError
        Irreps are not those of a function on the sphere, or ``correlation`` is below 1.
    """

    def __init__(
        self,
        irreps_in: Any,
        irreps_out: Any = None,
        *,
        correlation: int = 3,
        weights: str = "per_degree",
        num_elements: int | None = None,
        method: str = "auto",
        normalization: str = "component",
        layout: str = "e3nn",
        check_finite: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        known = {
            "weights": (weights, WEIGHTS),
            "normalization": (normalization, NORMALIZATIONS),
            "layout": (layout, LAYOUTS),
            "method": (method, ("auto", "dense", "separable")),
        }
        for name, (value, allowed) in known.items():
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if correlation < 1:
            raise ValueError(f"correlation must be at least 1, got {correlation}")
        if num_elements is not None and (num_elements < 1 or weights == "none"):
            raise ValueError(f"num_elements must be at least 1, and needs weights, got {num_elements} with {weights!r}")
        self._in = read_irreps(irreps_in, "irreps_in")
        self._out = self._in if irreps_out is None else read_irreps(irreps_out, "irreps_out")
        mul = check_channels(self._in, "irreps_in", pseudo=False)
        if check_channels(self._out, "irreps_out", pseudo=False) != mul:
            raise ValueError(
                f"irreps_out must have the multiplicity of irreps_in, {mul}, got {write_irreps(self._out)}"
            )
        self.irreps_in, self.irreps_out = write_irreps(self._in), write_irreps(self._out)
        lmax = max(part.l for part in self._in)
        dead = [part.name for part in self._out if part.l > correlation * lmax]
        if dead:
            warnings.warn(f"irreps_out holds {', '.join(dead)}, above correlation x {lmax}: it is zero", stacklevel=2)
        self.correlation, self.num_elements = correlation, num_elements
        self.normalization, self.layout, self.check_finite = normalization, layout, check_finite
        first, last = self._axis(self._in, out=False), self._axis(self._out, out=True)
        degree = correlation * first.lmax + last.lmax
        # The size that decides on the route is that of the grid, so degrees are given as three that add up to its own.
        middle = Axis((degree - first.lmax - last.lmax,), (1.0,))
        self.method = choose_method(method, (first, middle, last), ("gaunt",), dtype)
        shape, exact = build(self.method, "gaunt", (first, first, last), degree, shares=(0.0, 0.0, 1.0))
        # The middle function, a power, has no coefficients of its own.
        self._shape = shape._replace(chunks=(shape.chunks[0], shape.chunks[2]))
        self.keep_tables(exact[: shape.n_tables] + exact[2 * shape.n_tables :], device, dtype)
        self.weight: nn.Parameter | None = None
        if weights != "none":
            size = (num_elements or 1, correlation, mul if weights == "per_degree" else 1, len(self._out))
            self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            self.reset_parameters()

    def _axis(self, irreps: tuple[Irrep, ...], *, out: bool) -> Axis:
        factors = [harmonic_scale(part.l, self.normalization) for part in irreps]
        return Axis(tuple(part.l for part in irreps), tuple(1 / f if out else f for f in factors))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every weight to 1 / (correlation √ν!)."""
        if self.weight is not None:
            powers = [1 / (self.correlation * math.sqrt(math.factorial(n))) for n in range(1, self.correlation + 1)]
            self.weight.copy_(torch.tensor(powers).view(1, -1, 1, 1).expand(self.weight.shape))

    def powers(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "n *out"]:
        r"""Return all powers, cut off at ``irreps_out``, without weights: (correlation, \*batch, mul, components)."""
        mul, size = self._in[0].mul, width(self._in)
        expected = (mul * size,) if self.layout == "e3nn" else (mul, size)
        if tuple(x.shape[-len(expected) :]) != expected:
            raise ValueError(
                f"x must end in {' x '.join(map(str, expected))} components, for {self.irreps_in} in layout "
                f"{self.layout!r}, got shape {tuple(x.shape)}"
            )
        if self.check_finite and not torch.isfinite(x).all():
            raise ValueError("x must be finite, got NaN or infinity")
        wide = self.cast_input(x, "x")
        if self.layout == "e3nn":
            wide = unpack(wide, self._in)
        rows = wide.reshape(-1, size)
        with without_autocast(rows):
            made = _apply(rows, self._shape, self.correlation, self.tables)
        return made.reshape(self.correlation, *wide.shape[:-1], made.shape[-1])

    def forward(
        self, x: Float[Tensor, "*batch d"], elements: Shaped[Tensor, "*nodes"] | None = None
    ) -> Float[Tensor, "*batch d2"]:
        r"""Return the weighted powers of features, with the kind (\*batch,) of every node where there are several.

        Raises
        ------
        ValueError
            A width is not that of the irreps; kinds are missing or not asked for, are no integers, do not broadcast to
            the batch, or one is none of the kinds (told where that needs no wait, on the CPU).
        """
        if (elements is None) != (self.num_elements is None):
            raise ValueError(
                f"elements must {'not ' if self.num_elements is None else ''}be given with "
                f"num_elements={self.num_elements}"
            )
        made = self.powers(x)
        if self.weight is not None:
            weight = self.weight.to(made.dtype)
            # (n, *batch or 1, mul or 1, irreps)
            weight = (
                weight[0]
                if elements is None
                else weight[_kinds(elements, len(weight), made.shape[1:-2])].movedim(-3, 0)
            )
            places = [i for i, part in enumerate(self._out) for _ in range(2 * part.l + 1)]
            weight = weight[..., places]
            if elements is None:
                weight = weight.reshape(self.correlation, *[1] * (made.dim() - 3), *weight.shape[1:])
            made = made * weight
        total = made.sum(dim=0).to(x.dtype)
        return total if self.layout == "channels" else pack(total, self._out)

    def extra_repr(self) -> str:
        return f"{self.irreps_in} -> {self.irreps_out}, correlation={self.correlation}, method={self.method!r}"


def _kinds(elements: Tensor, num: int, batch: tuple[int, ...]) -> Tensor:
    """Check the kinds of nodes, and return them as indices."""
    if elements.is_floating_point() or elements.is_complex() or elements.dtype == torch.bool:
        raise ValueError(f"elements must hold integers, got {elements.dtype}")
    lead = batch[len(batch) - elements.dim() :]
    if elements.dim() > len(batch) or any(k not in (1, n) for k, n in zip(elements.shape, lead, strict=True)):
        raise ValueError(f"elements must broadcast to the batch {tuple(batch)}, got shape {tuple(elements.shape)}")
    seen = as_numpy(elements)
    if seen is not None and seen[0].size:
        least, most = int(seen[0].min()), int(seen[0].max())
        if least < 0 or most >= num:
            raise ValueError(f"elements must lie in [0, {num}), got {least if least < 0 else most}")
    return elements.long()[(None,) * (len(batch) - elements.dim())]
