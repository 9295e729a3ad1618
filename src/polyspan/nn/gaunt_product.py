"""Equivariant product of spherical-harmonic features, computed as a product of functions on the sphere."""

import math
import operator
import warnings
from itertools import product as pairs_of
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from polyspan.errors import require

from ._gaunt_blocks import HALF_BELOW, Plan, has_memory, packed_product
from ._gaunt_cache import as_tensor, cached_product
from ._gaunt_half import HalfSphere, has_half_sphere
from ._gaunt_paths import (
    LAYOUTS,
    MODES,
    NORMALIZATIONS,
    PATHS,
    WEIGHTS,
    axis_of,
    columns,
    joins,
    one_of,
    pack,
    path_kind,
    path_size,
    read_all,
    spread,
    unpack,
)
from ._irreps import Irrep, check_channels, read_irreps, width, write_irreps
from ._rotation_torch import traced
from ._sphere import coupling
from ._sphere_product import METHODS, SphereProduct, choose_method, transformed


class GauntTensorProduct(nn.Module):
    r"""Product of two equivariant features as functions on the sphere, in place of the Clebsch-Gordan product.

    With orthonormal real harmonics, :math:`z_{l_3m_3} = \sum x_{l_1m_1} y_{l_2m_2} \int Y_{l_1m_1} Y_{l_2m_2}
    Y_{l_3m_3}`: the coefficients of :math:`f_x f_y`, found by multiplying values on a grid on which the integral is
    exact. It costs O(L³) or O(L⁴) where Clebsch-Gordan costs O(L⁶), and equals ``e3nn.o3.TensorProduct`` with the path
    weights of :func:`gaunt_path_weights`; see :func:`equivalent_e3nn_product`.

    With ``paths="even"`` only paths with even l1 + l2 + l3 exist: no cross product, no pseudo-tensor, no way to tell a
    body from its mirror image, whatever the weights. ``paths="all"`` adds the surface bracket
    :math:`\{f, g\} = (\partial_b f\,\partial_a g - \partial_a f\,\partial_b g)/\sin b`, which has exactly the odd
    paths; its constants grow with the degrees. In both, the weight of a path is tied: it is a product of one number for
    each of the three degrees. Source: catalogue entry ``gaunt``.

    Parameters
    ----------
    irreps_in1, irreps_in2 : str or e3nn.o3.Irreps
        Such as "128x0e+128x1o+128x2e": each irrep once, in any order, with gaps if need be, and one multiplicity.
    irreps_out : str or e3nn.o3.Irreps, optional
        All irreps that can be reached, by degree, where not given.
    paths : {"even", "all"}, default="even"
        Pseudo-tensors (parity other than (-1)^l) come in and out only with "all".
    weights : {"none", "per_degree", "shared"}, default="none"
        One weight for each channel and irrep of both inputs and of the output, or the same for all channels. They
        start so that unit normal inputs give outputs of unit variance.
    method : {"auto", "dense", "separable", "fourier"}, default="auto"
        "dense" is three matrix products with the values of all harmonics on the grid; "separable" goes over latitudes
        and longitudes in turn; "fourier" is the paper's product on the torus by FFT. "auto" takes dense for small
        degrees and separable for larger ones. On a CPU, batches of equal shape go block by block through memory that a
        thread keeps: 4 MiB in float32, and 1 to 5 MiB of index tables for each size of block, of which there are few.
        Even paths that are dense, or small with "auto", are multiplied there at the fewer nodes of half a sphere. Under
        ``torch.func`` and forward derivatives all is plain operations, and values on the grid are kept.
    channel_mode : {"uuu", "uvuv"}, default="uuu"
        Channel by channel (a multiplicity of 1 goes with all), or all pairs of channels.
    normalization : {"component", "integral", "norm"}, default="component"
        Of the harmonics that features are coefficients of, as in e3nn: squared norm 2l + 1, (2l + 1) / 4π, or 1.
    layout : {"e3nn", "channels"}, default="e3nn"
        "e3nn" packs (\*batch, Σ mul (2l + 1)); "channels" is (\*batch, mul, Σ (2l + 1)), a little faster.
    internal_weights : bool, default=True
        Whether the weights are a parameter; otherwise they are given to each call, as from a radial network.
    check_finite : bool, default=False
        Refuse NaN and infinity, which otherwise pass through; waits for an accelerator at each call.

    Attributes
    ----------
    irreps_in1, irreps_in2, irreps_out : str
    weight_numel : int
        Number of weights: Σ mul · irreps over the inputs and the output, 0 without weights.
    weight : Parameter of shape (weight_numel,), or None
    methods : tuple of str
        The route of each kind of path.

    Raises
    ------
    ValueError
        An irrep stands twice, multiplicities differ, or an irrep cannot be had with these paths.
    """

    def __init__(
        self,
        irreps_in1: Any,
        irreps_in2: Any,
        irreps_out: Any = None,
        *,
        paths: str = "even",
        weights: str = "none",
        method: str = "auto",
        channel_mode: str = "uuu",
        normalization: str = "component",
        layout: str = "e3nn",
        internal_weights: bool = True,
        check_finite: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.paths, self.weights = one_of("paths", paths, PATHS), one_of("weights", weights, WEIGHTS)
        self.channel_mode = one_of("channel_mode", channel_mode, MODES)
        self.normalization = one_of("normalization", normalization, NORMALIZATIONS)
        self.layout, self.check_finite = one_of("layout", layout, LAYOUTS), check_finite
        one_of("method", method, METHODS)
        self._in1, self._in2, self._out = read_all(irreps_in1, irreps_in2, irreps_out, paths, channel_mode)
        self.irreps_in1, self.irreps_in2, self.irreps_out = map(write_irreps, (self._in1, self._in2, self._out))
        self._degrees = tuple(tuple(part.l for part in parts) for parts in (self._in1, self._in2, self._out))
        self._ends = tuple(
            (part[0].mul * width(part),) if layout == "e3nn" else (part[0].mul, width(part))
            for part in (self._in1, self._in2, self._out)
        )
        self._add_terms(method, device, dtype)
        channels = [1 if weights == "shared" else part[0].mul for part in (self._in1, self._in2, self._out)]
        numbers = len(self._in1), len(self._in2), len(self._slots)
        self._weight_shapes = tuple(zip(channels, numbers, strict=True))
        self.weight_numel = 0 if weights == "none" else sum(c * n for c, n in self._weight_shapes)
        self.weight: nn.Parameter | None = None
        if self.weight_numel and internal_weights:
            self.weight = nn.Parameter(torch.empty(self.weight_numel, device=device, dtype=dtype))
            self.reset_parameters()

    def _add_terms(self, method: str, device: Any, dtype: torch.dtype | None) -> None:
        """Make one product for each pair of kinds of input and each kind of path that some output needs."""
        self.terms, self._plan, self._slots = nn.ModuleList(), [], []
        half: HalfSphere | None = None
        for s1, s2, kind in pairs_of((1, -1), (1, -1), ("gaunt", "bracket") if self.paths == "all" else ("gaunt",)):
            own1 = [i for i, part in enumerate(self._in1) if part.natural == s1]
            own2 = [i for i, part in enumerate(self._in2) if part.natural == s2]
            fit = [(self._in1[i], self._in2[j]) for i in own1 for j in own2]
            own3 = [
                k
                for k, c in enumerate(self._out)
                if any(joins(a, b, c, self.paths) and path_kind(a.l, b.l, c.l) == kind for a, b in fit)
            ]
            if not own3:
                continue
            axes = (
                axis_of(tuple(self._in1[i] for i in own1), self.normalization),
                axis_of(tuple(self._in2[i] for i in own2), self.normalization),
                axis_of(tuple(self._out[i] for i in own3), self.normalization, out=True),
            )
            taken = choose_method(method, axes, (kind,), dtype)
            self.terms.append(SphereProduct(axes, kind, taken, device=device, dtype=dtype))
            slots = []
            for k in own3:
                if (kind, k) not in self._slots:
                    self._slots.append((kind, k))
                slots.append(self._slots.index((kind, k)))
            self._plan.append((own1, own2, own3, slots))
            degree = sum(axis.lmax for axis in axes)
            small = method == "auto" and degree < HALF_BELOW
            if kind == "gaunt" and (taken == "dense" or small) and has_half_sphere(degree):
                half = HalfSphere(axes, device=device, dtype=dtype)
        own = [len(part) for plan in self._plan for part in plan[:3]]
        # A single channel has nothing to unpack, and gains little.
        self._is_whole = (
            self.channel_mode == "uuu"
            and self._in1[0].mul == self._in2[0].mul > 1
            and own == [len(self._in1), len(self._in2), len(self._out)]
        )
        self.half_sphere = half if self._is_whole else None
        self._blocks: Plan | None = None
        self.methods = tuple(term.shape.method for term in self._products)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set input weights to 1, and those of the output so that unit normal inputs give unit variance."""
        if self.weight is None:
            return
        last = []
        for kind, k in self._slots:
            c = self._out[k]
            power = sum(
                path_size(a, b, c, self.normalization) ** 2
                for a, b in pairs_of(self._in1, self._in2)
                if joins(a, b, c, self.paths) and path_kind(a.l, b.l, c.l) == kind
            )
            shares = sum(other == k for _, other in self._slots)
            last.append(math.sqrt((2 * c.l + 1) / (power * shares)))
        flat = [1.0] * sum(c * n for c, n in self._weight_shapes[:2]) + last * self._weight_shapes[2][0]
        self.weight.copy_(torch.tensor(flat))

    def forward(
        self,
        x: Float[Tensor, "*batch d1"],
        y: Float[Tensor, "*other d2"],
        weight: Float[Tensor, "*rows w"] | None = None,
    ) -> Float[Tensor, "*out d3"]:
        r"""Multiply features; batches broadcast. ``weight`` (\*batch, weight_numel) where weights are not internal.

        Raises
        ------
        ValueError
            A width is not that of the irreps, weights are missing or too many, or a value is not finite if checked.
        """
        dtype = torch.promote_types(x.dtype, y.dtype)
        if self._is_whole and not torch.compiler.is_compiling():
            plan = self._plan_of_blocks()
            first, second = self._read(x, 0, plan.dtype), self._read(y, 1, plan.dtype)
            z = self._multiply_packed(first, second, weight, plan)
            if z is not None:
                return z.to(dtype)
        else:
            first, second = (self._read(t, i, self.compute_dtype) for i, t in enumerate((x, y)))
        z = self.multiply(self._unpack(first, self._in1), self._unpack(second, self._in2), weight).to(dtype)
        return z if self.layout == "channels" else pack(z, self._out)

    def _multiply_packed(self, x: Tensor, y: Tensor, weight: Tensor | None, plan: Plan) -> Tensor | None:
        """Multiply features as they are packed, where one product of whole features on a CPU is all there is to do."""
        batch = x.shape[: -len(self._ends[0])]
        if (
            not x.device.type == y.device.type == "cpu"
            # Fake tensors and other wrappers have no memory to work in.
            or not {type(x), type(y)} <= {Tensor, nn.Parameter}
            or not has_memory(x, y)
            # Transforms of functions and captured graphs must not see memory that is kept.
            or traced()
            or transformed(x, y, self.weight if weight is None else weight)
            or batch != y.shape[: len(batch)]
            or x.dim() != y.dim()
            or (weight is not None and weight.shape[:-1] not in ((), batch))
        ):
            return None
        w1, w2, w3 = self._split_weights(weight, x.dtype)
        if w1 is not None and w2 is not None:
            x, y = x * self._spread_packed(w1, self._in1), y * self._spread_packed(w2, self._in2)
        ends = [math.prod(end) for end in self._ends[:2]]
        z = packed_product(x.reshape(-1, ends[0]), y.reshape(-1, ends[1]), plan)
        z = z.reshape(*batch, *self._ends[2])
        return z if w3 is None else z * self._spread_packed(w3[..., self._plan[0][3]], self._out)

    def _plan_of_blocks(self) -> Plan:
        """Return the plan of products in blocks: the last one, or one made anew where the tables have changed."""
        tables = (self.half_sphere or self._products[0]).tables
        if self._blocks is None or not all(map(operator.is_, tables, self._blocks.flat_tables)):
            half, shape = self.half_sphere is not None, self._products[0].shape
            self._blocks = Plan(self._degrees, tables, shape, half, self._in1[0].mul, self.layout)
        return self._blocks

    def _spread_packed(self, weight: Tensor, irreps: tuple[Irrep, ...]) -> Tensor:
        """Repeat weights (*rows, mul or 1, irreps) over packed components."""
        wide = spread(weight, irreps)
        if self.layout == "channels":
            return wide
        return pack(wide.expand(*wide.shape[:-2], irreps[0].mul, wide.shape[-1]), irreps)

    def multiply(self, first: Tensor, second: Tensor, weight: Tensor | None = None) -> Tensor:
        r"""Multiply features that are (\*batch, mul, components) already, in the compute dtype, whatever the layout."""
        w1, w2, w3 = self._split_weights(weight, first.dtype)
        if w1 is not None and w2 is not None:
            first, second = first * spread(w1, self._in1), second * spread(w2, self._in2)
        if self.channel_mode == "uvuv":
            first, second = first.unsqueeze(-2), second.unsqueeze(-3)
        parts: list[list[Tensor]] = [[] for _ in self._out]
        for term, (own1, own2, own3, slots) in zip(self.terms, self._plan, strict=True):
            z = term(columns(first, self._in1, own1), columns(second, self._in2, own2))
            if self.channel_mode == "uvuv":
                z = z.flatten(-3, -2)
            if w3 is not None:
                z = z * spread(w3[..., slots], [self._out[k] for k in own3])
            if len(self.terms) == 1 and len(own3) == len(self._out):
                return z
            for k, piece in zip(own3, z.split([2 * self._out[k].l + 1 for k in own3], dim=-1), strict=True):
                parts[k].append(piece)
        batch = torch.broadcast_shapes(first.shape[:-1], second.shape[:-1])
        if self.channel_mode == "uvuv":
            batch = (*batch[:-2], batch[-2] * batch[-1])
        made = [
            sum(found[1:], start=found[0]) if found else first.new_zeros(*batch, 2 * part.l + 1)
            for part, found in zip(self._out, parts, strict=True)
        ]
        return torch.cat(made, dim=-1)

    @property
    def _products(self) -> list[SphereProduct]:
        return cast("list[SphereProduct]", list(self.terms._modules.values()))

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which values on the grid are computed: float32 or wider."""
        return self._products[0].compute_dtype if self._plan else torch.float32

    def _read(self, x: Tensor, i: int, dtype: torch.dtype) -> Tensor:
        """Check an input, and return it in the dtype of the tables."""
        name, expected = "xy"[i], self._ends[i]
        if x.shape[-len(expected) :] != expected:
            raise ValueError(
                f"{name} must end in {' x '.join(map(str, expected))} components, for "
                f"{(self.irreps_in1, self.irreps_in2)[i]} in layout {self.layout!r}, got shape {tuple(x.shape)}"
            )
        if self.check_finite and not torch.isfinite(x).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        return x if x.dtype == dtype or not self._plan else self._products[0].cast_input(x, name)

    def _unpack(self, x: Tensor, irreps: tuple[Irrep, ...]) -> Tensor:
        """Return features as (*batch, mul, components)."""
        return x if self.layout == "channels" else unpack(x, irreps)

    def _split_weights(self, weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        if weight is not None and (self.weight is not None or not self.weight_numel):
            raise ValueError(
                f"weight must not be given to a product with weights={self.weights!r}"
                + (" of its own" if self.weight_numel else "")
            )
        weight = self.weight if weight is None else weight
        if not self.weight_numel:
            return None, None, None
        if weight is None or weight.shape[-1] != self.weight_numel:
            got = "none" if weight is None else f"shape {tuple(weight.shape)}"
            raise ValueError(f"weight must be (*batch, {self.weight_numel}), got {got}")
        pieces = weight.to(dtype).split([c * n for c, n in self._weight_shapes], dim=-1)
        return tuple(p.unflatten(-1, shape) for p, shape in zip(pieces, self._weight_shapes, strict=True))

    def extra_repr(self) -> str:
        return (
            f"{self.irreps_in1} x {self.irreps_in2} -> {self.irreps_out}, paths={self.paths!r}, "
            f"weights={self.weights!r}, methods={self.methods}"
        )


def convert_e3nn_layout(x: Any, irreps: Any, *, to: str = "channels") -> Any:
    r"""Repack features between e3nn's order and one row a channel; tensors and NumPy arrays.

    Parameters
    ----------
    x : tensor or ndarray
        (\*batch, Σ mul (2l + 1)) for ``to="channels"``, (\*batch, mul, Σ (2l + 1)) for ``to="e3nn"``.
    irreps : str or e3nn.o3.Irreps
        With one multiplicity.
    to : {"channels", "e3nn"}, default="channels"

    Raises
    ------
    ValueError
        Multiplicities differ, or the shape is not that of the irreps.
    """
    parts = read_irreps(irreps, "irreps")
    mul, size = check_channels(parts, "irreps", pseudo=True), width(parts)
    expected = (mul * size,) if one_of("to", to, LAYOUTS) == "channels" else (mul, size)
    if tuple(x.shape[-len(expected) :]) != expected:
        raise ValueError(f"x must end in {expected} for {write_irreps(parts)}, got shape {tuple(x.shape)}")
    return unpack(x, parts) if to == "channels" else pack(x, parts)


def gaunt_coefficients(l1: int, l2: int, l3: int, *, bracket: bool = False) -> np.ndarray:
    r"""Return :math:`\int Y_{l_1m_1} Y_{l_2m_2} Y_{l_3m_3}` over the sphere, (2l1 + 1, 2l2 + 1, 2l3 + 1), float64.

    They vanish unless l1 + l2 + l3 is even and the triangle holds. With ``bracket`` the first two functions enter by
    their surface Poisson bracket, and the integral vanishes unless the sum is odd. Both are non-negative multiples of
    e3nn's ``wigner_3j``. Computed on a grid on which they are exact, to about 1e-15.

    Raises
    ------
    ValueError
        A degree is negative.
    """
    for name, l in (("l1", l1), ("l2", l2), ("l3", l3)):
        if l < 0:
            raise ValueError(f"{name} must be at least 0, got {l}")
    return coupling(l1, l2, l3, "bracket" if bracket else "gaunt").copy()


def gaunt_path_weights(
    irreps_in1: Any,
    irreps_in2: Any,
    irreps_out: Any = None,
    *,
    paths: str = "even",
    channel_mode: str = "uuu",
    normalization: str = "component",
) -> list[tuple[int, int, int, str, bool, float]]:
    """Return the instructions with which ``e3nn.o3.TensorProduct`` computes the same product.

    Each is (i_in1, i_in2, i_out, mode, has_weight, path_weight), where the path weight is the square of the path's
    constant, as e3nn takes its root. Use with ``irrep_normalization="none", path_normalization="none"``. Parameters are
    those of :class:`GauntTensorProduct`.

    Raises
    ------
    ValueError
        As for :class:`GauntTensorProduct`.
    """
    one_of("paths", paths, PATHS)
    one_of("normalization", normalization, NORMALIZATIONS)
    mode = one_of("channel_mode", channel_mode, MODES)
    in1, in2, out = read_all(irreps_in1, irreps_in2, irreps_out, paths, mode)
    return [
        (i, j, k, mode, mode == "uvuv", path_size(a, b, c, normalization) ** 2)
        for (i, a), (j, b), (k, c) in pairs_of(enumerate(in1), enumerate(in2), enumerate(out))
        if joins(a, b, c, paths)
    ]


def equivalent_e3nn_product(product: GauntTensorProduct) -> Any:
    """Build the ``e3nn.o3.TensorProduct`` that equals a product without weights; to compare, or to go back.

    Raises
    ------
    ValueError
        The product has weights, for which e3nn would need one a path, or pairs all channels.
    MissingExtra
        e3nn is not installed.
    """
    if product.weight_numel or product.channel_mode != "uuu" or product._in1[0].mul != product._in2[0].mul:
        raise ValueError("product must have weights='none' and equal channels multiplied one by one")
    o3 = require("e3nn.o3", extra="equivariant", purpose="the product of e3nn")
    instructions = gaunt_path_weights(
        product.irreps_in1,
        product.irreps_in2,
        product.irreps_out,
        paths=product.paths,
        normalization=product.normalization,
    )
    before = torch.get_default_dtype()
    try:
        # e3nn rounds its constants to the default dtype of the moment, so they are made in float64 and cast after.
        torch.set_default_dtype(torch.float64)
        twin = o3.TensorProduct(
            product.irreps_in1,
            product.irreps_in2,
            product.irreps_out,
            instructions,
            irrep_normalization="none",
            path_normalization="none",
        )
    finally:
        torch.set_default_dtype(before)
    return twin.to(product.compute_dtype)


def gaunt_tensor_product(
    x: Any,
    y: Any,
    lmax1: int,
    lmax2: int,
    lmax_out: int | None = None,
    *,
    bracket: bool = False,
    method: str = "auto",
    normalization: str = "integral",
) -> Any:
    r"""Multiply two functions on the sphere, given and returned by coefficients; tensors and NumPy arrays.

    Parameters
    ----------
    x, y : tensor or ndarray of shape (\*batch, (lmax1 + 1)²) and (\*batch, (lmax2 + 1)²)
        Component l² + l + m is the coefficient of Y_lm in e3nn's frame; batches broadcast. Below float32, the product
        is computed in float32.
    lmax_out : int, optional
        Degree at which the product is cut off; lmax1 + lmax2, which cuts nothing, where not given. Cutting in the
        middle of a longer product breaks associativity.
    bracket : bool, default=False
        Return the surface Poisson bracket {f, g} in place of f g; see :class:`GauntTensorProduct`.
    method, normalization
        As there.

    Returns
    -------
    tensor or ndarray of shape (\*batch, (lmax_out + 1)²)

    Raises
    ------
    ValueError
        A degree is negative, a width is not that of its degree, or there are no floats.
    TypeError
        One is a tensor, and the other is none.
    """
    lmax_out = lmax1 + lmax2 if lmax_out is None else lmax_out
    for name, l in (("lmax1", lmax1), ("lmax2", lmax2), ("lmax_out", lmax_out)):
        if l < 0:
            raise ValueError(f"{name} must be at least 0, got {l}")
    one_of("normalization", normalization, NORMALIZATIONS)
    one_of("method", method, METHODS)
    arrays = not isinstance(x, Tensor)
    if arrays == isinstance(y, Tensor):
        raise TypeError(f"x and y must both be tensors, or both arrays, got {type(x).__name__} and {type(y).__name__}")
    a, b = (as_tensor(x, "x"), as_tensor(y, "y")) if arrays else (x, y)
    for name, t, l in (("x", a, lmax1), ("y", b, lmax2)):
        if t.shape[-1:] != ((l + 1) ** 2,):
            raise ValueError(f"{name} must end in {(l + 1) ** 2} components for degree {l}, got shape {tuple(t.shape)}")
        if not t.is_floating_point():
            raise ValueError(f"{name} must hold floats, got {t.dtype}")
    dtype = torch.promote_types(a.dtype, b.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if lmax_out > lmax1 + lmax2:
        warnings.warn(
            f"lmax_out={lmax_out} is above lmax1 + lmax2 = {lmax1 + lmax2}: the degrees between are zero", stacklevel=2
        )
    kept = min(lmax_out, lmax1 + lmax2)
    kind = "bracket" if bracket else "gaunt"
    term = cached_product((lmax1, lmax2, kept), kind, method, normalization, wide, str(a.device))
    z = term(a.to(wide), b.to(wide)).to(dtype)
    if kept < lmax_out:
        z = nn.functional.pad(z, (0, (lmax_out + 1) ** 2 - (kept + 1) ** 2))
    return z.numpy() if arrays else z
