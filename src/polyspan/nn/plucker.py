"""Planes through the origin by their Plücker coordinates: two vectors in, one point of the Grassmannian out."""

from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from polyspan.linalg import orthonormal_basis, principal_angles

from ._lengths import safe_length


def plucker_coordinates(
    u: Float[Tensor, "*batch r"], v: Float[Tensor, "*batch r"], *, normalize: bool = True
) -> Float[Tensor, "*batch pairs"]:
    r"""Return the coordinates of the plane that two vectors span, :math:`p_{ij} = u_i v_j - u_j v_i` for i < j.

    Pairs are in the order of ``torch.triu_indices(r, r, 1)``: (0, 1), (0, 2), ..., (r - 2, r - 1), r (r - 1) / 2 in
    all. Swapping the vectors flips the sign. With ``normalize`` the result has length one and depends on the oriented
    plane alone: another basis of it gives the same, up to the sign of the change's determinant.

    Breaks: where the vectors are parallel there is no plane. The coordinates are zero there, and with ``normalize`` the
    gradient grows up to 1e8 on the way. Half precision is widened to float32 inside.
    Source: catalogue entry ``grassmann-mixing``.

    Parameters
    ----------
    u, v : Tensor of shape (\*batch, r)
        r at least 2.
    normalize : bool, default=True
        Divide by the length, or by 1e-8 where that is more.

    Raises
    ------
    ValueError
        The vectors have fewer than two coordinates, not as many as one another, or batches that do not go together.
    """
    r = _check_coordinates(u)
    if v.shape[-1:] != (r,):
        raise ValueError(f"v must have {r} coordinates, as u, got {v.shape[-1] if v.ndim else 'a number'}")
    try:
        torch.broadcast_shapes(u.shape, v.shape)
    except RuntimeError:
        raise ValueError(f"u and v must go together, got shapes {tuple(u.shape)} and {tuple(v.shape)}") from None
    wide = torch.promote_types(u.dtype, torch.float32)
    i, j = torch.triu_indices(r, r, 1, device=u.device)
    a, b = u.to(wide), v.to(wide)
    if normalize:
        # The part of v along u adds nothing to the plane, and taken off first it cannot swamp the rest in rounding.
        square = a.square().sum(dim=-1, keepdim=True)
        b = b - (a * b).sum(dim=-1, keepdim=True) / torch.where(square > 0, square, 1) * a
    p = a[..., i] * b[..., j] - a[..., j] * b[..., i]
    if normalize:
        p = p / safe_length(p).clamp(min=1e-8)
    return p.to(u.dtype)


def plucker_relations_residual(p: Float[Tensor, "*batch pairs"]) -> Float[Tensor, "*batch"]:
    r"""Say how far coordinates are from those of any plane: the largest violation of the Plücker relations.

    The largest of :math:`|p_{ij}p_{kl} - p_{ik}p_{jl} + p_{il}p_{jk}|` over i < j < k < l. Zero exactly where the
    coordinates belong to a plane; sums of several planes' coordinates do not, from r = 4 on. Below r = 4 there are no
    relations, and the result is zero. Time and memory grow with r to the fourth.
    Source: catalogue entry ``grassmann-mixing``.

    Parameters
    ----------
    p : Tensor of shape (\*batch, r (r - 1) / 2)
        In the order of :func:`plucker_coordinates`.

    Raises
    ------
    ValueError
        The number of coordinates is not r (r - 1) / 2 for any r.
    """
    if not p.ndim:
        raise ValueError("p must have r (r - 1) / 2 coordinates for some r, got a number")
    pairs = p.shape[-1]
    r = (1 + round((1 + 8 * pairs) ** 0.5)) // 2
    if pairs < 1 or r * (r - 1) // 2 != pairs:
        raise ValueError(f"p must have r (r - 1) / 2 coordinates for some r, got {pairs}")
    if r < 4:
        return p.new_zeros(p.shape[:-1])
    full = p.new_zeros(*p.shape[:-1], r, r)
    rows, columns = torch.triu_indices(r, r, 1, device=p.device)
    full[..., rows, columns] = p
    i, j, k, m = torch.tensor(list(combinations(range(r), 4)), device=p.device).T
    broken = full[..., i, j] * full[..., k, m] - full[..., i, k] * full[..., j, m] + full[..., i, m] * full[..., j, k]
    return broken.abs().amax(dim=-1)


def plane_angles(
    u: Float[Tensor, "*batch r"],
    v: Float[Tensor, "*batch r"],
    other_u: Float[Tensor, "*batch r"],
    other_v: Float[Tensor, "*batch r"],
) -> Float[Tensor, "*batch 2"]:
    """Return the two principal angles, in radians and rising, between the planes of two pairs of vectors.

    Their cosines multiply to the absolute inner product of the planes' normalised Plücker coordinates. For looking at
    layers, not for training: see :func:`polyspan.linalg.principal_angles`. A pair of parallel vectors has no plane, and
    its angles say nothing. Source: catalogue entry ``grassmann-mixing``.

    Parameters
    ----------
    u, v, other_u, other_v : Tensor of shape (*batch, r)
        r at least 2.

    Raises
    ------
    ValueError
        The vectors have fewer than two coordinates, or differ in shape.
    """
    _check_coordinates(u)
    shapes = [tuple(x.shape) for x in (u, v, other_u, other_v)]
    if len(set(shapes)) > 1:
        raise ValueError(f"all four vectors must have one shape, got {shapes}")
    first, second = (orthonormal_basis(torch.stack(pair, dim=-1)) for pair in ((u, v), (other_u, other_v)))
    return principal_angles(first, second)


def _check_coordinates(u: Tensor) -> int:
    """Return how many coordinates vectors have; planes need two."""
    r = u.shape[-1] if u.ndim else 0
    if r < 2:
        raise ValueError(f"u must have at least 2 coordinates, got {r if u.ndim else 'a number'}")
    return r
