"""Updates of weights as a small core times one factor an axis: expand them, extract them, choose their ranks."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ._tucker import cheapest_ranks, expand_core, tucker


class TuckerUpdate(NamedTuple):
    """What :func:`adapter_from_delta` found: an update as ``scale`` times ``core`` times one factor an axis.

    Attributes
    ----------
    core : Tensor
        (J_1, ..., J_N), in the order of the weight's axes.
    factors : tuple of Tensor
        One (I_n, J_n) an axis, with orthogonal columns of length sqrt(I_n / 2 J_n).
    scale : float
    error : float
        Share of the update's squared norm that is left out, in [0, 1].
    """

    core: Tensor
    factors: tuple[Tensor, ...]
    scale: float
    error: float


def tucker_delta(core: Tensor, factors: Sequence[Tensor], scale: float | int = 1.0) -> Tensor:
    r"""Expand the update of a weight from its core and factors.

    .. math:: \Delta W = s\; G \times_1 A^{(1)} \times_2 \dots \times_N A^{(N)},\qquad
        \Delta W_{oipq} = s \sum_{abcd} G_{abcd} A^{(1)}_{oa} A^{(2)}_{ib} A^{(3)}_{pc} A^{(4)}_{qd}

    Axes are those of the weight as torch stores it: (out, in, height, width) for a convolution. The paper's code has
    its first two axes the other way round: swap the core's first two axes and the first two factors of its adapters.

    The whole update is in memory, as large as the weight; adapters avoid it while they train.
    Source: catalogue entry ``flora-nd``.

    Parameters
    ----------
    core : Tensor, shape (J_1, ..., J_N)
    factors : sequence of Tensor, shapes (I_n, J_n)
    scale : float, default=1.0

    Returns
    -------
    Tensor, shape (I_1, ..., I_N)

    Raises
    ------
    ValueError
        Another number of factors than the core has axes, or a factor that does not fit its axis.
    """
    if len(factors) != core.ndim:
        raise ValueError(f"factors must be one for each of the {core.ndim} axes of core, got {len(factors)}")
    for n, factor in enumerate(factors):
        if factor.ndim != 2 or factor.shape[1] != core.shape[n]:
            raise ValueError(
                f"factors[{n}] must be (size, {core.shape[n]}), as core is {tuple(core.shape)}, "
                f"got {tuple(factor.shape)}"
            )
    return expand_core(core, factors) * scale


def adapter_from_delta(
    delta: Tensor,
    ranks: int | Sequence[int | None],
    *,
    scale: float | int = 4.0,
    max_iter: int = 50,
    tol: float = 1e-9,
) -> TuckerUpdate:
    """Turn an update of a weight, such as tuned minus base, into the core and factors of an adapter.

    Tucker decomposition by higher-order orthogonal iteration, which lowers the error at every step but may end beside
    the best one. Factors get the size that they have in a fresh adapter, so that training can go on from here at the
    same learning rate. Computed in float64, returned in the dtype of ``delta``.
    Source: catalogue entry ``flora-nd``.

    Parameters
    ----------
    delta : Tensor, shape (I_1, ..., I_N)
        N at least 2.
    ranks : int or sequence of int or None
        J_n in [1, I_n] for every axis; None keeps an axis whole. One number holds for the first two axes, the channels
        of a kernel, cut where an axis is shorter, and the others are kept whole.
    scale : float, default=4.0
        The adapter's factor s, which the core is divided by.
    max_iter : int, default=50
        Rounds over all axes, at least 0 (HOSVD).
    tol : float, default=1e-9
        Stop when a round lowers the error by no more than this share.

    Returns
    -------
    TuckerUpdate

    Raises
    ------
    ValueError
        A vector or scalar, numbers that are not finite, ranks out of range or of another number, or a scale of 0.
    """
    _check_delta(delta)
    wanted = resolve_ranks(delta.shape, ranks)
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    if max_iter < 0:
        raise ValueError(f"max_iter must be at least 0, got {max_iter}")
    found = tucker(delta, wanted, max_iter=max_iter, tol=tol)
    # A fresh factor has entries of variance 1 / 2J, hence columns of squared length I / 2J.
    sizes = [math.sqrt(f.shape[0] / (2 * f.shape[1])) for f in found.factors]
    core = found.core / (scale * math.prod(sizes))
    factors = tuple((f * size).to(delta.dtype) for f, size in zip(found.factors, sizes, strict=True))
    return TuckerUpdate(core.to(delta.dtype), factors, float(scale), found.error)


def tucker_ranks(delta: Tensor, *, error: float | None = None, parameters: int | None = None) -> tuple[int, ...]:
    """Advise ranks for an adapter from an update of the full weight, or from a sample of its gradient.

    Looks at every choice of ranks at once, by the truncations of the HOSVD; that takes about five times the update's
    memory in float64.
    Source: catalogue entry ``flora-nd``.

    Parameters
    ----------
    delta : Tensor, shape (I_1, ..., I_N)
    error : float, optional
        The largest share of the squared norm that may be left out, in [0, 1): the ranks of fewest parameters.
    parameters : int, optional
        The most parameters that factors and core may have together: the ranks of least error.

    Returns
    -------
    tuple of int
        One rank an axis.

    Raises
    ------
    ValueError
        Not exactly one of ``error`` and ``parameters`` is given, or the budget is below that of ranks 1.
    """
    _check_delta(delta)
    if (error is None) == (parameters is None):
        raise ValueError(f"exactly one of error and parameters must be given, got error={error}, {parameters=}")
    if error is not None and not 0 <= error < 1:
        raise ValueError(f"error must be in [0, 1), got {error}")
    return cheapest_ranks(delta, error=error, parameters=parameters)[0]


def resolve_ranks(shape: Sequence[int], ranks: int | Sequence[int | None]) -> tuple[int, ...]:
    """Return one rank an axis; see :func:`adapter_from_delta`."""
    if isinstance(ranks, int):
        if ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {ranks}")
        return tuple(min(ranks, size) if n < 2 else size for n, size in enumerate(shape))
    if len(ranks) != len(shape):
        raise ValueError(f"ranks must be one for each axis of shape {tuple(shape)}, got {tuple(ranks)}")
    made = tuple(size if rank is None else rank for rank, size in zip(ranks, shape, strict=True))
    for n, (rank, size) in enumerate(zip(made, shape, strict=True)):
        if not 1 <= rank <= size:
            raise ValueError(f"ranks[{n}] must be between 1 and {size}, got {rank}")
    return made


def _check_delta(delta: Tensor) -> None:
    if delta.ndim < 2:
        raise ValueError(f"delta must have at least 2 axes, got shape {tuple(delta.shape)}")
    if 0 in delta.shape:
        raise ValueError(f"delta must not be empty, got shape {tuple(delta.shape)}")
    if not delta.is_floating_point():
        raise ValueError(f"delta must hold floating-point numbers, got {delta.dtype}")
    if not bool(delta.isfinite().all()):
        raise ValueError("delta must be finite, got NaN or infinity")
