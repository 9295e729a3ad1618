"""Sparse codes over a dictionary of atoms, and the updates that fit the atoms to the codes."""

import math
from typing import Any, NamedTuple

from ._namespace import detached, identity, is_torch, namespace, swap, widen

# Working set of a block of rows: near the size of a core's cache, or large enough to fill an accelerator.
_CPU_BLOCK_BYTES = 2**23
_ACCELERATOR_BLOCK_BYTES = 2**28


class DictionaryUpdate(NamedTuple):
    """Unit-norm ``atoms`` (d, m), and the ``codes`` (n, m) that go with them: X is near ``codes @ atoms.T``."""

    atoms: Any
    codes: Any


def orthogonal_matching_pursuit(
    D: Any,
    X: Any,
    *,
    n_nonzero: int | None = None,
    tol: float | None = None,
    block_bytes: int | None = None,
) -> Any:
    r"""Code each row of ``X`` by few atoms, chosen greedily: X is near ``codes @ D.T``.

    Each step takes the atom most correlated with what is still unexplained and refits all coefficients by least
    squares, :math:`\min_\gamma \lVert x - D_I\gamma\rVert`. Residuals are never formed: all rows advance together on
    the Gram matrix :math:`D^\top D`, with a progressive Cholesky factor for each row, in blocks of bounded memory.

    A row ends early once its residual meets ``tol``, or is orthogonal to all atoms up to rounding, or when the next
    atom depends on those chosen. Gram form halves the digits: residuals are resolved down to :math:`\sqrt\epsilon
    \lVert x\rVert`, coefficients to :math:`\epsilon\,\mathrm{cond}(D_I)^2`. Atoms of any length do (they are compared
    at unit length); zero atoms are never chosen. Ties go to the first atom, except that rounding decides between
    atoms that are equal up to sign. torch codes carry no gradient, for the choice has none.

    Parameters
    ----------
    D : array of shape (d, m)
        Atoms are columns. NumPy or torch; float16 and bfloat16 are computed in float32.
    X : array of shape (n, d)
    n_nonzero : int, optional
        Most atoms a row may use, 1 to m. Without it, ``tol`` alone ends a row, at min(d, m) atoms at the latest.
    tol : float, optional
        Residual norm, in the units of X, at which a row ends; the squared ``tol`` of scikit-learn is this one's square.
    block_bytes : int, optional
        Working memory of a block of rows: 8 MiB on a CPU, near its cache, and 256 MiB elsewhere.

    Returns
    -------
    array of shape (n, m)
        Dense, with at most ``n_nonzero`` entries a row that are not 0.

    Notes
    -----
    Source: Rubinstein, Zibulevsky and Elad 2008; catalogue entry ``cospadi``.
    """
    D, X, narrow = _pair(D, X)
    xp = namespace(X)
    (n, d), m = X.shape, D.shape[1]
    if n_nonzero is None and tol is None:
        raise ValueError("n_nonzero or tol must be given, got neither")
    if n_nonzero is not None and not 1 <= n_nonzero <= m:
        raise ValueError(f"n_nonzero must be between 1 and the {m} atoms of D, got {n_nonzero}")
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    most = min(d, m) if n_nonzero is None else min(n_nonzero, d, m)
    length = xp.linalg.vector_norm(D, axis=0)
    unit = D / xp.where(length > 0, length, xp.ones_like(length))
    gram = swap(unit) @ unit
    codes = xp.zeros((n, m), dtype=X.dtype, **_device(X))
    if block_bytes is None:
        block_bytes = _ACCELERATOR_BLOCK_BYTES if is_torch(X) and X.device.type != "cpu" else _CPU_BLOCK_BYTES
    row_bytes = X.dtype.itemsize * m * (most + 3)
    step = max(1, int(block_bytes) // row_bytes)
    if tol is not None:
        # Rows of many possible atoms mostly end early: few are in work at a time, but each block costs as many steps.
        step = max(step, min(64, 4 * int(block_bytes) // row_bytes))
    for start in range(0, n, step):
        _pursue(unit, gram, X[start : start + step], most, tol, codes[start : start + step])
    return narrow(codes / xp.where(length > 0, length, xp.ones_like(length)))


def _pursue(unit: Any, gram: Any, X: Any, most: int, tol: float | None, codes: Any) -> None:
    """Write the codes of one block of rows over unit atoms into ``codes``."""
    xp = namespace(X)
    n, m = codes.shape
    eps = float(xp.finfo(X.dtype).eps)
    options = _device(X)
    rows = xp.arange(n, **options)
    correlation = X @ unit
    energy = xp.sum(X * X, axis=1)
    floor = 16 * eps * xp.sqrt(energy)
    # Row t of `seen` is what atom number t adds to the space, orthonormalised, correlated with every atom.
    seen = xp.empty((n, most, m), dtype=X.dtype, **options)
    factor = xp.zeros((n, most, most), dtype=X.dtype, **options)
    along = xp.zeros((n, most), dtype=X.dtype, **options)
    chosen = xp.zeros((n, most), dtype=xp.int64, **options)
    used = xp.zeros((n, most), dtype=xp.bool, **options)
    # Which row of the block stands at each place; places of rows that ended are squeezed out once half of them have.
    place, left, alive = rows, energy, xp.ones(n, dtype=xp.bool, **options)
    enough = 0.0 if tol is None else tol * tol
    for t in range(most):
        pick = xp.argmax(xp.abs(correlation), axis=1)
        here = rows[: pick.shape[0]]
        value, known = correlation[here, pick], seen[here, :t, pick]
        pivot = 1 - xp.sum(known * known, axis=1)
        alive = alive & (xp.abs(value) > floor) & (pivot > 16 * m * eps)
        if tol is not None:
            alive = alive & (left > enough)
        number = int(xp.sum(xp.astype(alive, xp.int64)))
        if number == 0:
            break
        if 2 * number < pick.shape[0]:
            keep = xp.nonzero(alive)[0]
            squeezed = xp.empty((number, most, m), dtype=X.dtype, **options)
            squeezed[:, :t] = seen[keep, :t]
            seen = squeezed
            place, left, floor, alive, correlation, pick, value, known, pivot = (
                x[keep] for x in (place, left, floor, alive, correlation, pick, value, known, pivot)
            )
        root = xp.sqrt(xp.where(alive, pivot, xp.ones_like(pivot)))
        gain = xp.where(alive, value, xp.zeros_like(value)) / root
        fresh = gram[pick]
        if t:
            fresh -= (known[:, None, :] @ seen[:, :t])[:, 0]
            factor[place, t, :t] = known
        fresh /= root[:, None]
        correlation -= gain[:, None] * fresh
        left = left - gain * gain
        seen[:, t], factor[place, t, t], along[place, t] = fresh, root, gain
        chosen[place, t], used[place, t] = pick, alive
    _back_substitute(factor, along, used)
    for t in range(most):
        hit = xp.nonzero(used[:, t])[0]
        codes[hit, chosen[hit, t]] = along[hit, t]


def _back_substitute(factor: Any, along: Any, used: Any) -> None:
    """Turn ``along`` into coefficients, L' g = along, in place; unused places stay 0."""
    xp = namespace(along)
    for t in range(along.shape[1] - 1, -1, -1):
        diagonal = factor[:, t, t]
        later = xp.sum(factor[:, t + 1 :, t] * along[:, t + 1 :], axis=1)
        solved = (along[:, t] - later) / xp.where(used[:, t], diagonal, xp.ones_like(diagonal))
        along[:, t] = xp.where(used[:, t], solved, xp.zeros_like(solved))


def ksvd_update(D: Any, X: Any, codes: Any, *, exact: bool = False) -> DictionaryUpdate:
    r"""Improve atoms one by one, each with the coefficients of the rows that use it; where codes are 0 they stay 0.

    Atom j and its coefficients become the leading singular pair of what the other atoms leave of its rows, or with
    ``exact=False`` one power step towards it, several times cheaper. :math:`\lVert X - CD^\top\rVert_F` never rises.
    An atom that no row uses is replaced by the row that is then fitted worst, at unit norm (each row only once), with
    codes of 0 until the next pursuit. Atoms come out with unit norm.

    Parameters
    ----------
    D : array of shape (d, m)
    X : array of shape (n, d)
    codes : array of shape (n, m)
    exact : bool

    Returns
    -------
    DictionaryUpdate
        New arrays; the given ones are left alone.

    Notes
    -----
    Source: Aharon, Elad and Bruckstein 2006; Rubinstein, Zibulevsky and Elad 2008; catalogue entry ``cospadi``.
    """
    _coded(X, codes)
    if D.shape != (X.shape[1], codes.shape[1]):
        raise ValueError(
            f"D must have shape {(X.shape[1], codes.shape[1])} to go with X and codes, got {tuple(D.shape)}"
        )
    (X, D, codes), narrow = _wide(X=X, D=D, codes=codes)
    xp = namespace(X, D)
    atoms, codes = xp.asarray(D, copy=True), xp.asarray(codes, copy=True)
    error = X - codes @ swap(atoms)
    idle = []
    for j in range(atoms.shape[1]):
        rows = xp.nonzero(codes[:, j])[0]
        if rows.shape[0] == 0:
            idle.append(j)
            continue
        gain = codes[rows, j]
        rest = error[rows] + gain[:, None] * atoms[:, j]
        if exact:
            direction = xp.linalg.svd(rest, full_matrices=False)[2][0]
            direction = direction * (1 - 2 * xp.astype(xp.sum(direction * atoms[:, j]) < 0, direction.dtype))
        else:
            direction = gain @ rest
        size = xp.linalg.vector_norm(direction)
        if not float(size) > 0:
            # These rows are fitted without the atom.
            error[rows], codes[rows, j] = rest, 0
            idle.append(j)
            continue
        direction = direction / size
        gain = rest @ direction
        atoms[:, j], codes[rows, j] = direction, gain
        error[rows] = rest - gain[:, None] * direction
    _replace(atoms, X, error, idle)
    return DictionaryUpdate(narrow(atoms), narrow(codes))


def mod_update(X: Any, codes: Any, *, reg: float | int = 0.0) -> DictionaryUpdate:
    r"""Fit all atoms at once to the codes by least squares (the method of optimal directions).

    :math:`D^\top = (C^\top C + \lambda I)^{-1} C^\top X` with :math:`\lambda = \mathrm{reg}\cdot
    \operatorname{tr}(C^\top C)/m`. Atoms are then brought to unit norm and codes scaled against it, which leaves the
    product as it is. Without ridge, codes whose columns are dependent get the solution of least norm. Unused atoms are
    replaced by the rows fitted worst, as in :func:`ksvd_update`.

    Parameters
    ----------
    X : array of shape (n, d)
    codes : array of shape (n, m)
    reg : float
        Ridge >= 0, as a share of the mean energy of an atom's coefficients.

    Returns
    -------
    DictionaryUpdate

    Notes
    -----
    Source: Engan, Aase and Husøy 1999; catalogue entry ``cospadi``.
    """
    if not (math.isfinite(reg) and reg >= 0):
        raise ValueError(f"reg must be finite and not negative, got {reg}")
    _coded(X, codes)
    (X, codes), narrow = _wide(X=X, codes=codes)
    xp = namespace(X)
    gram, target = swap(codes) @ codes, swap(codes) @ X
    m = codes.shape[1]
    if reg > 0:
        ridge = reg * float(xp.linalg.trace(gram)) / m
        used = xp.astype(xp.linalg.diagonal(gram) == 0, gram.dtype)
        # A unit on the diagonal of an unused atom keeps codes that are all 0 solvable; its row of the target is 0.
        solved = xp.linalg.solve(gram + (ridge + used[:, None]) * identity(m, gram), target)
    else:
        values, V = xp.linalg.eigh(gram)
        sound = values > m * float(xp.finfo(gram.dtype).eps) * values[-1]
        inverse = xp.where(sound, 1 / xp.where(sound, values, xp.ones_like(values)), xp.zeros_like(values))
        solved = V @ (inverse[:, None] * (swap(V) @ target))
    length = xp.linalg.vector_norm(solved, axis=1)
    tiny = float(xp.finfo(length.dtype).eps) * float(xp.max(length))
    kept = (length > tiny) & (xp.linalg.diagonal(gram) > 0)
    scale = xp.where(kept, length, xp.ones_like(length))
    atoms = swap(solved / scale[:, None])
    codes = codes * xp.where(kept, length, xp.zeros_like(length))
    idle = [j for j, alive in enumerate(kept.tolist()) if not alive]
    atoms = xp.asarray(atoms, copy=True)
    atoms[:, idle] = 0
    _replace(atoms, X, X - codes @ swap(atoms), idle)
    return DictionaryUpdate(narrow(atoms), narrow(codes))


def _replace(atoms: Any, X: Any, error: Any, idle: list[int]) -> None:
    """Put the worst fitted rows, at unit norm, in the place of idle atoms; where none is left, the axes."""
    xp = namespace(X)
    if not idle:
        return
    lost, length = xp.sum(error * error, axis=1), xp.linalg.vector_norm(X, axis=1)
    worst = xp.argsort(xp.where(length > 0, lost, -xp.ones_like(lost)), descending=True, stable=True).tolist()
    worst = [i for i in worst if float(length[i]) > 0]
    d = atoms.shape[0]
    axes = identity(d, atoms)
    for number, j in enumerate(idle):
        atoms[:, j] = X[worst[number]] / length[worst[number]] if number < len(worst) else axes[:, j % d]


def _device(like: Any) -> dict[str, Any]:
    return {"device": like.device} if is_torch(like) else {}


def _pair(D: Any, X: Any) -> tuple[Any, Any, Any]:
    """Return atoms and rows in one wide dtype, and the way back, after checking their shapes."""
    namespace(D, X)
    if D.ndim != 2 or X.ndim != 2 or D.shape[0] != X.shape[1] or 0 in D.shape:
        raise ValueError(f"D and X must have shapes (d, m) and (n, d), got {tuple(D.shape)} and {tuple(X.shape)}")
    (X, D), narrow = _wide(X=X, D=D)
    return D, X, narrow


def _coded(X: Any, codes: Any) -> None:
    """Check that rows and codes fit together."""
    namespace(X, codes)
    if X.ndim != 2 or codes.ndim != 2 or X.shape[0] != codes.shape[0] or 0 in (*X.shape, *codes.shape):
        raise ValueError(f"X and codes must have shapes (n, d) and (n, m), got {tuple(X.shape)}, {tuple(codes.shape)}")


def _wide(**named: Any) -> tuple[list[Any], Any]:
    """Widen arrays to the dtype of the first, outside the graph; also return the way back to its own dtype."""
    first, narrow = widen(next(iter(named.values())))
    xp, wide = namespace(first), []
    for name, x in named.items():
        known = xp.astype(detached(x), first.dtype)
        if not bool(xp.all(xp.isfinite(known))):
            raise ValueError(f"{name} must be finite")
        wide.append(known)
    return wide, narrow
