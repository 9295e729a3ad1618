"""Equivariant convolution over edges: features times the spherical harmonics of a direction."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ._gaunt_paths import harmonic_scale, pack, spread
from ._irreps import Irrep, read_irreps, write_irreps
from ._polar_product import PolarProduct
from ._sphere_product import has_tangent
from .gaunt_product import GauntTensorProduct
from .spherical_transform import real_spherical_harmonics

METHODS = ("auto", "dense", "separable", "fourier", "rotated")


class GauntConvolution(nn.Module):
    r"""Message of an edge: the Gaunt product of a neighbour's features with the harmonics of the edge's direction.

    With :math:`g(v)=\sum_l w_l \sum_m Y_{lm}(r)\,Y_{lm}(v)` the filter of direction r, the message holds the
    coefficients of :math:`f_x g`. Summing messages over neighbours is left to the caller, as is the radial network
    that gives the weights. ``method="rotated"`` turns every edge to the pole first, where the filter does not depend on
    the longitude and all orders m part; angles have no gradient at the pole itself, so this route refuses directions
    that need one, backward or forward. Source: catalogue entry ``gaunt``.

    Parameters
    ----------
    irreps_in : str or e3nn.o3.Irreps
        As for :class:`GauntTensorProduct`.
    lmax_filter : int
        Degree of the filter.
    irreps_out : str or e3nn.o3.Irreps, optional
    paths : {"even", "all"}, default="even"
        See :class:`GauntTensorProduct`; "rotated" has the even paths only.
    weights : {"none", "per_degree", "shared"}, default="per_degree"
        One weight for each channel and irrep of the input, the filter and the output; or one for all channels, in which
        case the filter is the same for all, and cheaper.
    method : {"auto", "dense", "separable", "fourier", "rotated"}, default="auto"
        "auto" chooses between dense and separable.
    normalization, layout, internal_weights, check_finite
        As there; :math:`Y(r)` has the same normalization as the features.

    Attributes
    ----------
    irreps_in, irreps_filter, irreps_out : str
    weight_numel : int
    weight : Parameter of shape (weight_numel,), or None

    Raises
    ------
    ValueError
        As for :class:`GauntTensorProduct`; or ``lmax_filter`` is negative.
    """

    def __init__(
        self,
        irreps_in: Any,
        lmax_filter: int,
        irreps_out: Any = None,
        *,
        paths: str = "even",
        weights: str = "per_degree",
        method: str = "auto",
        normalization: str = "component",
        layout: str = "e3nn",
        internal_weights: bool = True,
        check_finite: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if lmax_filter < 0:
            raise ValueError(f"lmax_filter must be at least 0, got {lmax_filter}")
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if method == "rotated" and paths != "even":
            raise ValueError(f"method='rotated' has the even paths only, got paths={paths!r}")
        mul = read_irreps(irreps_in, "irreps_in")[0].mul
        self._filter = tuple(Irrep(mul if weights == "per_degree" else 1, l, (-1) ** l) for l in range(lmax_filter + 1))
        self.irreps_filter, self.lmax_filter, self.method = write_irreps(self._filter), lmax_filter, method
        self.layout, self.check_finite, self.normalization = layout, check_finite, normalization
        self.product = GauntTensorProduct(
            irreps_in,
            self.irreps_filter,
            irreps_out,
            paths=paths,
            weights=weights,
            method="auto" if method == "rotated" else method,
            normalization=normalization,
            layout=layout,
            internal_weights=internal_weights,
            device=device,
            dtype=dtype,
        )
        self.irreps_in, self.irreps_out = self.product.irreps_in1, self.product.irreps_out
        self.weight_numel = self.product.weight_numel
        self.polar: PolarProduct | None = None
        if method == "rotated":
            irreps = self.product._in1, self._filter, self.product._out
            factors = [[harmonic_scale(part.l, normalization) for part in parts] for parts in irreps]
            self.polar = PolarProduct(irreps, (factors[0], factors[1], factors[2]), device=device, dtype=dtype)

    @property
    def weight(self) -> nn.Parameter | None:
        """The weights, where they are internal."""
        return self.product.weight

    def forward(
        self,
        x: Float[Tensor, "*batch d"],
        vectors: Float[Tensor, "*edges xyz"],
        weight: Float[Tensor, "*rows w"] | None = None,
    ) -> Float[Tensor, "*out d3"]:
        r"""Return the message of every edge.

        Parameters
        ----------
        x : tensor of shape (\*edges, Σ mul (2l + 1)), or (\*edges, mul, Σ (2l + 1)) in layout "channels"
            Features of the node at the far end.
        vectors : tensor of shape (\*edges, 3)
            Of any length; that of length 0 has the scalar part of the filter only.
        weight : tensor of shape (\*edges, weight_numel), optional
            Where weights are not internal.

        Raises
        ------
        ValueError
            A shape is another, a value is not finite if checked, or directions need derivatives in the rotated route.
        """
        if vectors.shape[-1:] != (3,):
            raise ValueError(f"vectors must end in 3 components, got shape {tuple(vectors.shape)}")
        if self.check_finite and not (torch.isfinite(vectors).all() and torch.isfinite(x).all()):
            raise ValueError("x and vectors must be finite, got NaN or infinity")
        product = self.product
        first = product._unpack(product._read(x, 0, product.compute_dtype), product._in1)
        if self.polar is not None:
            if vectors.requires_grad or has_tangent(vectors):
                raise ValueError("vectors must not need derivatives with method='rotated'; the other routes give them")
            w1, w2, w3 = product._split_weights(weight, first.dtype)
            if w1 is not None:
                first = first * spread(w1, product._in1)
            z = self.polar(first, vectors, first.new_ones(1, len(self._filter)) if w2 is None else w2)
            if w3 is not None:
                z = z * spread(w3, product._out)
        else:
            y = real_spherical_harmonics(vectors.to(first.dtype), self.lmax_filter).unsqueeze(-2)
            y = y * y.new_tensor(_scale_all(self._filter, self.normalization))
            z = product.multiply(first, y, weight)
        z = z.to(torch.promote_types(x.dtype, vectors.dtype))
        return z if self.layout == "channels" else pack(z, product._out)

    def extra_repr(self) -> str:
        return f"{self.irreps_in} * {self.irreps_filter} -> {self.irreps_out}, method={self.method!r}"


def _scale_all(irreps: tuple[Irrep, ...], normalization: str) -> list[float]:
    return [harmonic_scale(part.l, normalization) for part in irreps for _ in range(2 * part.l + 1)]
