"""Transport plans and doubly stochastic matrices: scores turned into weights with given row and column sums."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from polyspan.errors import NotConverged

from ._namespace import detached, is_torch, namespace, swap, widen

# Rounds in each stage that only prepares the potentials of the next, cooler one.
_WARM_ROUNDS = 20
# Range of logits within which exponentials and their sums stay far from both ends of float32.
_NARROW = 30.0


def sinkhorn(
    scores: Any,
    row: Any = None,
    col: Any = None,
    *,
    temperature: Any = 1.0,
    max_iter: int = 1000,
    tol: float | None = 1e-6,
    start_temperature: float | None = None,
    implicit: bool = False,
    must_converge: bool = False,
) -> Float[Any, "*b n m"]:
    r"""Spread mass over pairs by their scores, with given row and column sums.

    The plan :math:`P_{ij} = \exp(K_{ij}/T + u_i + v_j)` with :math:`P1 = r` and :math:`P^\top 1 = c`: the maximiser of
    :math:`\langle K, P\rangle + T\,H(P)` among such plans, H the entropy. Rounds of log-domain scaling, columns first
    and rows last, so that rows are exact and ``tol`` speaks of the columns. Scores of any size are safe; the rounds
    needed grow as the range of scores over T, and at worst exponentially in it.

    The torch gradient goes through the rounds, or with ``implicit`` solves for it at the last plan: memory of one plan
    instead of one a round, a linear system of the smaller side, and exact only for a converged plan. It is finite
    everywhere, also where T is so small that the plan is a permutation. Close to a permutation both sums and gradients
    settle slowly: there a small ``tol`` on sums still leaves the plan, and an implicit gradient, less exact; and rounds
    that start at the solution, as with scores that are log-weights of such a plan, end before their derivative has
    settled (at least log2(1/tol) of them are run under autograd), so prefer ``implicit``.

    Gradients with respect to ``row`` and ``col`` hold along changes that keep both totals equal; across them they are
    arbitrary. NumPy has no gradients and ignores ``implicit``.

    Parameters
    ----------
    scores : array of shape (*b, n, m)
        Larger attracts more mass; -inf forbids a pair. float16 and bfloat16 are computed in float32.
    row, col : arrays of shape (n,) or (*b, n), and (m,) or (*b, m), optional
        Sums >= 0 with one total; a sum of 0 empties the row. Each is uniform by default, with the total of the other,
        or with total 1.
    temperature : float or tensor
        T > 0, in units of the scores; a tensor that broadcasts with ``scores`` may carry gradients.
    max_iter : int
        Rounds, each one a column and a row step.
    tol : float or None
        Stop once columns miss their sums by less than this share of the total mass (but not less than rounding of
        ``scores / temperature`` allows). None runs exactly ``max_iter`` rounds.
    start_temperature : float, optional
        Start here and halve down to ``temperature``, handing potentials on: fewer rounds where T is far below the range
        of the scores. Needs a float ``temperature``.
    implicit : bool
        Differentiate implicitly.
    must_converge : bool
        Raise, rather than return, a plan that does not reach ``tol``.

    Raises
    ------
    NotConverged
        ``must_converge``, and ``max_iter`` rounds were not enough.
    ValueError
        Sums are negative or their totals differ, or a row or column that needs mass has no allowed pair.

    Notes
    -----
    Source: Cuturi 2013; Luise et al. 2018 for the implicit gradient; catalogue entries ``franca`` and ``mlc``.
    """
    xp = namespace(scores, row, col)
    if scores.ndim < 2 or 0 in scores.shape[-2:]:
        raise ValueError(f"scores must hold non-empty matrices (*b, n, m), got shape {tuple(scores.shape)}")
    wide, narrow = widen(scores)
    logits = wide / _temperature(temperature, wide)
    if must_converge and tol is None:
        raise ValueError("must_converge needs a tol, got None")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    r, c = _sums(wide, row, col)
    log_r, log_c = _log(r), _log(c)
    _check_support(detached(logits), detached(r), detached(c))
    u = xp.zeros_like(detached(log_r))
    for hot in _stages(start_temperature, temperature):
        warm = detached(logits) * (temperature / hot)
        # What one temperature hands to the next are potentials in units of the scores.
        u = _rounds(warm, detached(log_r), detached(log_c), u * (temperature / hot), _WARM_ROUNDS, 1e-3)[0]
        u = u * (hot / temperature)
    for_graph = detached if implicit else _as_it_is
    u, v, error = _rounds(for_graph(logits), for_graph(log_r), for_graph(log_c), u, max_iter, tol)
    if must_converge and error is not None:
        raise NotConverged(
            f"columns still miss their sums by {error:.1e} of the total after {max_iter} rounds, tol={tol:g}"
        )
    plan = xp.exp(for_graph(logits) + u[..., :, None] + v[..., None, :])
    if implicit and is_torch(plan):
        from ._sinkhorn_torch import TransportPlan

        plan = TransportPlan.apply(logits, r, c, plan)
    return narrow(plan)


def doubly_stochastic(
    scores: Any,
    *,
    temperature: Any = 1.0,
    symmetric: bool = True,
    max_iter: int = 1000,
    tol: float | None = 1e-6,
    implicit: bool = False,
    must_converge: bool = False,
) -> Float[Any, "*b n n"]:
    r"""Turn square scores into positive weights whose rows and columns each sum to 1.

    With symmetric scores the plan :math:`\Gamma_{ij} = \exp(K_{ij}/T + u_i + u_j)` needs one potential only, found by
    the damped iteration :math:`u \leftarrow \tfrac12(u - \log\sum_j\exp(K_{ij}/T + u_j))`, and is symmetric to the bit;
    rows and columns then miss 1 by at most ``tol``. Without ``symmetric`` it is :func:`sinkhorn` with sums of 1, whose
    rows are exact.

    Gradients as in :func:`sinkhorn`; of symmetric scores, they are symmetric.

    Parameters
    ----------
    scores : array of shape (*b, n, n)
        -inf forbids a pair.
    temperature, max_iter, implicit, must_converge
        As in :func:`sinkhorn`.
    symmetric : bool
        Scores must be symmetric up to rounding.
    tol : float or None
        Largest distance of a row's sum from 1 (a mean over columns without ``symmetric``).

    Raises
    ------
    ValueError
        Scores are not square, or with ``symmetric`` not symmetric.

    Notes
    -----
    Source: Knight, Ruiz and Uçar 2014; catalogue entry ``mlc``.
    """
    xp = namespace(scores)
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2] or scores.shape[-1] == 0:
        raise ValueError(f"scores must hold square matrices (*b, n, n), got shape {tuple(scores.shape)}")
    wide, narrow = widen(scores)
    if not symmetric:
        ones = xp.ones_like(detached(wide)[..., 0])
        plan = sinkhorn(
            wide,
            ones,
            ones,
            temperature=temperature,
            max_iter=max_iter,
            tol=tol,
            implicit=implicit,
            must_converge=must_converge,
        )
        return narrow(plan)
    if must_converge and tol is None:
        raise ValueError("must_converge needs a tol, got None")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    given = scores.dtype if xp.isdtype(scores.dtype, "real floating") else wide.dtype
    exact = _check_symmetric(detached(wide), float(xp.finfo(given).eps))
    logits = _mean_with_transpose(wide, exact) / _temperature(temperature, wide)
    one = xp.ones_like(detached(logits)[..., 0])
    _check_support(detached(logits), one, one)
    if implicit:
        u, error = _damped_rounds(detached(logits), max_iter, tol)
        plan = _symmetric_plan(detached(logits), u)
        if is_torch(plan):
            from ._sinkhorn_torch import SymmetricPlan

            plan = SymmetricPlan.apply(logits, plan)
    else:
        u, error = _damped_rounds(logits, max_iter, tol)
        plan = _symmetric_plan(logits, u)
    if must_converge and error is not None:
        raise NotConverged(f"a row still misses the sum of 1 by {error:.1e} after {max_iter} rounds, tol={tol:g}")
    return narrow(plan)


def _as_it_is(x: Any) -> Any:
    return x


def _symmetric_plan(logits: Any, u: Any) -> Any:
    # The sum of the two potentials first: floating-point addition commutes but does not associate.
    return namespace(u).exp(logits + (u[..., :, None] + u[..., None, :]))


def _rounds(
    logits: Any, log_r: Any, log_c: Any, u: Any, max_iter: int, tol: float | None
) -> tuple[Any, Any, float | None]:
    """Alternate the two scalings from row potential u; the last value is the error where it exceeds ``tol``."""
    xp = namespace(logits)
    mass, target = xp.exp(detached(log_c)), _resolvable(tol, logits)
    v = error = None
    least = _least_rounds(target, logits)
    for number in range(max_iter):
        fresh = _scaling(log_c, _logsumexp(logits + u[..., :, None], -2))
        if v is not None and target is not None:
            # The columns of the plan before this step: what they should be, times the factor that this step applies.
            factor = xp.exp(_difference(detached(v), detached(fresh)))
            missed = xp.sum(mass * xp.abs(factor - 1), axis=-1) / xp.sum(mass, axis=-1)
            if number >= least and float(xp.max(missed)) <= target:
                return u, v, None
        v = fresh
        u = _scaling(log_r, _logsumexp(logits + v[..., None, :], -1))
    if target is not None:
        sums = xp.sum(xp.exp(detached(logits) + detached(u)[..., :, None] + detached(v)[..., None, :]), axis=-2)
        error = float(xp.max(xp.sum(xp.abs(sums - mass), axis=-1) / xp.sum(mass, axis=-1)))
        error = None if error <= target else error
    return u, v, error


def _damped_rounds(logits: Any, max_iter: int, tol: float | None) -> tuple[Any, float | None]:
    """Average the potential with its full update; the second value is the error where it exceeds ``tol``."""
    xp = namespace(logits)
    target = _resolvable(tol, logits)
    top = xp.max(detached(logits))
    # On an accelerator the range is not asked for: reading it would make the device wait.
    on_host = not is_torch(logits) or logits.device.type == "cpu"
    if on_host and float(top) - float(xp.min(detached(logits))) <= _NARROW:
        # No sum can overflow or vanish: exponentials are taken once, and a round is a product with a vector.
        weights = xp.exp(logits - top)

        def full_update(u):
            return -xp.log(xp.squeeze(weights @ xp.exp(u + top / 2)[..., :, None], axis=-1)) - top / 2

        u = -(xp.log(xp.sum(weights, axis=-1)) + top) / 2
    else:

        def full_update(u):
            return -_logsumexp(logits + u[..., None, :], -1)

        u = -_logsumexp(logits, -1) / 2
    error = None
    least = _least_rounds(target, logits)
    for number in range(max_iter):
        full = full_update(u)
        if target is not None:
            error = float(xp.max(xp.abs(xp.exp(detached(u) - detached(full)) - 1)))
            if number >= least and error <= target:
                return u, None
        u = (u + full) / 2
    if target is not None:
        last = detached(full_update(u))
        error = float(xp.max(xp.abs(xp.exp(detached(u) - last) - 1)))
        error = None if error <= target else error
    return u, error


def _logsumexp(x: Any, axis: int) -> Any:
    """Sum in the log domain; of nothing but -inf it is -inf, without a NaN in the gradient."""
    xp = namespace(x)
    top = xp.max(detached(x), axis=axis, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    total = xp.sum(xp.exp(x - top), axis=axis)
    empty = total == 0
    log = xp.log(xp.where(empty, xp.ones_like(total), total))
    log = xp.where(empty, xp.full_like(total, -xp.inf), log)
    return log + xp.squeeze(top, axis=axis)


def _log(x: Any) -> Any:
    """Logarithm with log 0 = -inf and gradient 0 there."""
    xp = namespace(x)
    positive = x > 0
    return xp.where(positive, xp.log(xp.where(positive, x, xp.ones_like(x))), xp.full_like(x, -xp.inf))


def _scaling(log_sum: Any, found: Any) -> Any:
    """Return the potential that brings sums to what they should be; an empty row is emptied, whatever it holds."""
    xp = namespace(found)
    empty = xp.isinf(detached(log_sum))
    return xp.where(empty, log_sum, log_sum - xp.where(empty, xp.zeros_like(found), found))


def _difference(a: Any, b: Any) -> Any:
    """Subtract, where both may be -inf for an empty column, which then has not moved."""
    xp = namespace(a)
    empty = xp.isinf(a) & xp.isinf(b)
    zero = xp.zeros_like(a)
    return xp.where(empty, zero, xp.where(empty, zero, a) - xp.where(empty, zero, b))


def _resolvable(tol: float | None, logits: Any) -> float | None:
    """Raise ``tol`` to what rounding of the logits leaves of a sum."""
    if tol is None:
        return None
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    xp = namespace(logits)
    known = detached(logits)
    size = float(xp.max(xp.abs(xp.where(xp.isfinite(known), known, xp.zeros_like(known)))))
    return max(tol, 8 * float(xp.finfo(known.dtype).eps) * (1 + size))


def _least_rounds(target: float | None, logits: Any) -> int:
    """Count the rounds that autograd needs, even from a start that is the solution, at which its derivative is not."""
    if target is None or not (is_torch(logits) and logits.requires_grad):
        return 0
    return math.ceil(-math.log2(min(target, 1.0)))


def _temperature(temperature: Any, like: Any) -> Any:
    xp = namespace(like)
    if is_torch(temperature) or getattr(temperature, "ndim", 0) > 0:
        namespace(like, temperature)
        known = detached(temperature)
        sound = bool(xp.all((known > 0) & xp.isfinite(known)))
        scaled = xp.astype(temperature, like.dtype)
    else:
        scaled = float(temperature)
        sound = 0 < scaled < float("inf")
    if not sound:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    return scaled


def _stages(start: float | None, temperature: Any) -> list[float]:
    """Return temperatures above the last, halved one by one."""
    if start is None:
        return []
    if not isinstance(temperature, int | float) or not start >= temperature:
        raise ValueError(f"start_temperature must be at least temperature={temperature}, a float, got {start}")
    stages = []
    while start > temperature:
        stages.append(start)
        start /= 2
    return stages


def _sums(scores: Any, row: Any, col: Any) -> tuple[Any, Any]:
    """Return both marginals in the precision of the scores, checked."""
    xp = namespace(scores)
    *batch, n, m = scores.shape
    given = []
    for name, sums, size in (("row", row, n), ("col", col, m)):
        if sums is None:
            given.append(None)
            continue
        if sums.shape not in {(size,), (*batch, size)}:
            shapes = f"({size},) or {(*batch, size)}"
            raise ValueError(f"{name} must have shape {shapes}, got {tuple(sums.shape)}")
        known = detached(sums)
        if not bool(xp.all((known >= 0) & xp.isfinite(known))):
            raise ValueError(f"{name} must hold finite sums that are not negative")
        given.append(xp.astype(sums, scores.dtype))
    r, c = given
    if r is None and c is None:
        r = xp.ones_like(detached(scores)[..., :, 0]) / n
    if r is None:
        r = xp.sum(c, axis=-1, keepdims=True) / n * xp.ones_like(detached(scores)[..., :, 0])
    if c is None:
        c = xp.sum(r, axis=-1, keepdims=True) / m * xp.ones_like(detached(scores)[..., 0, :])
    mass, other = xp.sum(detached(r), axis=-1), xp.sum(detached(c), axis=-1)
    if not bool(xp.all(mass > 0)):
        raise ValueError("row and col must hold some mass, got sums that are all zero")
    if not bool(xp.all(xp.abs(mass - other) <= 8 * max(n, m) ** 0.5 * float(xp.finfo(scores.dtype).eps) * mass)):
        raise ValueError(f"row and col must have one total, got {_one(mass)} and {_one(other)}")
    return xp.broadcast_to(r, (*batch, n)), xp.broadcast_to(c, (*batch, m))


def _one(totals: Any) -> str:
    return f"{float(totals):g}" if totals.ndim == 0 else f"{totals.tolist()}"


def _check_support(logits: Any, r: Any, c: Any) -> None:
    """Refuse NaN and +inf, and rows or columns that need mass but may not have any."""
    xp = namespace(logits)
    if _all_finite(logits) and bool(xp.all(r > 0)) and bool(xp.all(c > 0)):
        return
    if bool(xp.any(xp.isnan(logits) | (logits == xp.inf))):
        raise ValueError("scores must be finite or -inf")
    allowed = (logits > -xp.inf) & (r > 0)[..., :, None] & (c > 0)[..., None, :]
    for name, sums, axis in (("row", r, -1), ("column", c, -2)):
        if bool(xp.any((sums > 0) & ~xp.any(allowed, axis=axis))):
            raise ValueError(f"scores forbid every pair of a {name} that needs mass")


def _mean_with_transpose(x: Any, symmetric: bool) -> Any:
    """Average a matrix with its transpose, which is slow to read where it is the same to the bit; gradients too."""
    if not symmetric:
        return (x + swap(x)) / 2
    if not is_torch(x):
        return x
    from ._sinkhorn_torch import SymmetricMatrix

    return SymmetricMatrix.apply(x)


def _all_finite(x: Any) -> bool:
    """Whether a sum of all numbers is finite, which says that each is; False does not say that one is not."""
    xp = namespace(x)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(xp.isfinite(xp.sum(x)))


def _check_symmetric(scores: Any, eps: float) -> bool:
    """Refuse scores that are not symmetric up to rounding, and return whether they are to the bit."""
    xp = namespace(scores)
    turned, unequal = swap(scores), False
    if not _all_finite(scores):
        both = xp.isfinite(scores) & xp.isfinite(turned)
        unequal = bool(xp.any(both != xp.isfinite(scores)))
        zero = xp.zeros_like(scores)
        scores, turned = xp.where(both, scores, zero), xp.where(both, turned, zero)
    apart, size = float(xp.max(xp.abs(scores - turned))), float(xp.max(xp.abs(scores)))
    if unequal or apart > 64 * eps * max(size, 1e-300):
        raise ValueError("scores must be symmetric; use symmetric=False for scores that are not")
    return apart == 0
