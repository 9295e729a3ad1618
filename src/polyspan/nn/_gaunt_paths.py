"""Which paths a product has and how large they are, and how features are packed."""

import math
import warnings
from itertools import product as pairs_of
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._irreps import Irrep, check_channels, read_irreps, write_irreps
from ._sphere import coupling_size
from ._sphere_routes import Axis

PATHS = ("even", "all")
WEIGHTS = ("none", "per_degree", "shared")
MODES = ("uuu", "uvuv")
LAYOUTS = ("e3nn", "channels")
NORMALIZATIONS = ("component", "integral", "norm")


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")
    return value


def harmonic_scale(l: int, normalization: str) -> float:
    """Return how much larger than the orthonormal harmonics those of a normalization are."""
    return {"integral": 1.0, "component": math.sqrt(4 * math.pi), "norm": math.sqrt(4 * math.pi / (2 * l + 1))}[
        normalization
    ]


def axis_of(irreps: tuple[Irrep, ...], normalization: str, *, out: bool = False) -> Axis:
    factors = tuple(harmonic_scale(part.l, normalization) for part in irreps)
    return Axis(tuple(part.l for part in irreps), tuple(1 / f for f in factors) if out else factors)


def path_kind(l1: int, l2: int, l3: int) -> str:
    return "gaunt" if (l1 + l2 + l3) % 2 == 0 else "bracket"


def path_size(a: Irrep, b: Irrep, c: Irrep, normalization: str) -> float:
    """Return the constant of a path, that is the norm of its block; 0 where there is none."""
    if c.p != a.p * b.p:
        return 0.0
    scale = harmonic_scale(a.l, normalization) * harmonic_scale(b.l, normalization)
    return coupling_size(a.l, b.l, c.l, path_kind(a.l, b.l, c.l)) * scale / harmonic_scale(c.l, normalization)


def joins(a: Irrep, b: Irrep, c: Irrep, paths: str) -> bool:
    """Tell whether a path of the product leads from a and b to c."""
    inside = abs(a.l - b.l) <= c.l <= a.l + b.l and c.p == a.p * b.p
    return inside and (path_kind(a.l, b.l, c.l) == "gaunt" or (paths == "all" and a.l * b.l > 0))


def _channels(mul1: int, mul2: int, mode: str) -> int:
    if mode == "uvuv":
        return mul1 * mul2
    if mul1 != mul2 and 1 not in (mul1, mul2):
        raise ValueError(
            f"irreps_in2 must have the multiplicity of irreps_in1, {mul1}, or 1 with channel_mode='uuu', got {mul2}; "
            "'uvuv' multiplies every channel with every other"
        )
    return max(mul1, mul2)


def _reachable(in1: tuple[Irrep, ...], in2: tuple[Irrep, ...], mul: int, paths: str) -> tuple[Irrep, ...]:
    most = max(part.l for part in in1) + max(part.l for part in in2)
    all_out = [Irrep(mul, l, s * (-1) ** l) for l in range(most + 1) for s in (1, -1)]
    return tuple(c for c in all_out if any(joins(a, b, c, paths) for a, b in pairs_of(in1, in2)))


def read_all(
    irreps_in1: Any, irreps_in2: Any, irreps_out: Any, paths: str, mode: str
) -> tuple[tuple[Irrep, ...], tuple[Irrep, ...], tuple[Irrep, ...]]:
    """Read and check the three lists; outputs are all that can be reached where they are not given."""
    in1, in2 = read_irreps(irreps_in1, "irreps_in1"), read_irreps(irreps_in2, "irreps_in2")
    mul1 = check_channels(in1, "irreps_in1", pseudo=paths == "all")
    mul2 = check_channels(in2, "irreps_in2", pseudo=paths == "all")
    mul = _channels(mul1, mul2, mode)
    if irreps_out is None:
        return in1, in2, _reachable(in1, in2, mul, paths)
    out = read_irreps(irreps_out, "irreps_out")
    found = check_channels(out, "irreps_out", pseudo=paths == "all")
    if found != mul:
        raise ValueError(f"irreps_out must have multiplicity {mul}, got {found} in {str(irreps_out)!r}")
    dead = [c.name for c in out if not any(joins(a, b, c, paths) for a, b in pairs_of(in1, in2))]
    if dead:
        warnings.warn(
            f"irreps_out holds {', '.join(dead)}, which no product of {write_irreps(in1)} and {write_irreps(in2)} "
            f"reaches with paths={paths!r}: it is zero",
            stacklevel=4,
        )
    return in1, in2, out


def spread(weights: Tensor, irreps: Any) -> Tensor:
    """Repeat the weight of each irrep over its components."""
    places = [i for i, part in enumerate(irreps) for _ in range(2 * part.l + 1)]
    return weights[..., places]


def columns(x: Tensor, irreps: tuple[Irrep, ...], own: list[int]) -> Tensor:
    """Return the components of some of the irreps."""
    if len(own) == len(irreps):
        return x
    pieces = x.split([2 * part.l + 1 for part in irreps], dim=-1)
    return torch.cat([pieces[i] for i in own], dim=-1)


def unpack(x: Any, irreps: tuple[Irrep, ...]) -> Any:
    """Turn e3nn's packing (*batch, Σ mul (2l + 1)) into (*batch, mul, Σ (2l + 1)); tensors and arrays."""
    mul, lead = irreps[0].mul, x.shape[:-1]
    if mul == 1:
        return x[..., None, :]
    pieces, start = [], 0
    for part in irreps:
        end = start + mul * (2 * part.l + 1)
        pieces.append(x[..., start:end].reshape(*lead, mul, 2 * part.l + 1))
        start = end
    return _join(pieces)


def pack(x: Any, irreps: tuple[Irrep, ...]) -> Any:
    """Turn (*batch, mul, Σ (2l + 1)) into e3nn's packing; tensors and arrays."""
    lead, mul, pieces, start = x.shape[:-2], x.shape[-2], [], 0
    if mul == 1:
        return x[..., 0, :]
    for part in irreps:
        end = start + 2 * part.l + 1
        pieces.append(x[..., start:end].reshape(*lead, mul * (end - start)))
        start = end
    return _join(pieces)


def _join(pieces: list[Any]) -> Any:
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces, dim=-1) if isinstance(pieces[0], Tensor) else np.concatenate(pieces, axis=-1)
