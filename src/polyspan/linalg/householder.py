"""Products of Householder reflections in compact form: every orthonormal basis, parametrised without constraints."""

from typing import Any, NamedTuple

from jaxtyping import Float, Num

from ._namespace import detached, identity, is_torch, namespace, swap, widen


class CompactWY(NamedTuple):
    """The product ``I - V T V'`` of m reflections: ``V`` (*b, d, m) unit columns, ``T`` (*b, m, m) upper triangular."""

    V: Any
    T: Any


def compact_wy(V: Num[Any, "*b d m"]) -> CompactWY:
    r"""Gather a product of Householder reflections into one factored form, :math:`H_1\cdots H_m = I - VTV^\top`.

    :math:`H_j = I - 2 v_j v_j^\top / \lVert v_j\rVert^2`.
    The columns of the returned V are those given, made unit; :math:`T = (\mathrm{striu}(V^\top V) + I/2)^{-1}`.
    A zero column stands for the identity, :math:`H_j = I`. The reflection has no derivative at a zero column (it
    depends on the direction only); the torch gradient there is 0.

    Parameters
    ----------
    V : array of shape (*b, d, m)
        Reflection vectors as columns, of any length and number; NumPy or torch.

    Notes
    -----
    Source: Schreiber and Van Loan 1989; Joffrain et al. 2006.
    """
    xp = namespace(V)
    if V.ndim < 2:
        raise ValueError(f"V must hold reflection vectors as columns (*b, d, m), got shape {tuple(V.shape)}")
    wide, narrow = widen(V)
    unit, _ = _unit(wide)
    eye = identity(unit.shape[-1], unit)
    inverse = xp.triu(swap(unit) @ unit, k=1) + 0.5 * eye
    if is_torch(unit):
        T = xp.linalg.solve_triangular(inverse, eye.expand(inverse.shape), upper=True)
    else:
        T = xp.triu(xp.linalg.inv(inverse))
    return CompactWY(narrow(unit), narrow(T))


def householder_product(V: Num[Any, "*b d m"], num_columns: int | None = None) -> Float[Any, "*b d c"]:
    r"""First ``num_columns`` columns (default: all d) of the orthogonal matrix :math:`H_1 H_2 \cdots H_m`.

    With ``num_columns=m`` this reaches every matrix of m orthonormal columns, for O(d m^2) work. Its determinant, at
    full width, is -1 to the number of non-zero columns. Zero columns and gradients: see :func:`compact_wy`.

    Parameters
    ----------
    V : array of shape (*b, d, m)
    num_columns : int, optional
        Between 0 and d.
    """
    width = V.shape[-2] if num_columns is None else num_columns
    if not 0 <= width <= V.shape[-2]:
        raise ValueError(f"num_columns must be between 0 and d={V.shape[-2]}, got {num_columns}")
    wide, narrow = widen(V)
    unit, T = compact_wy(wide)
    return narrow(identity(unit.shape[-2], unit, width) - unit @ (T @ swap(unit[..., :width, :])))


def apply_householder(V: Any, X: Any, *, transpose: bool = False) -> Any:
    r"""Map rows by the product of reflections, ``X @ H`` with :math:`H = H_1\cdots H_m`, without forming H.

    Costs 4 n d m operations. ``transpose`` gives ``X @ H.T``, the inverse map.

    Parameters
    ----------
    V : array of shape (*b, d, m)
        Reflection vectors as columns; zero columns reflect nothing.
    X : array of shape (*b, n, d)
        Rows to map; leading dimensions broadcast.
    """
    xp = namespace(V, X)
    if V.ndim < 2 or X.ndim < 2 or X.shape[-1] != V.shape[-2]:
        raise ValueError(f"X (*b, n, d) must have the d of V (*b, d, m), got {tuple(X.shape)} and {tuple(V.shape)}")
    unit, T = compact_wy(widen(V)[0])
    wide, narrow = widen(X)
    dtype = xp.result_type(wide, unit)
    wide, unit, T = (xp.astype(a, dtype, copy=False) for a in (wide, unit, T))
    return narrow(wide - ((wide @ unit) @ (swap(T) if transpose else T)) @ swap(unit))


def householder_vectors(Q: Num[Any, "*b d k"]) -> Float[Any, "*b d k"]:
    r"""Reflection vectors whose product has ``Q`` as its first k columns: the inverse of :func:`householder_product`.

    Column j is sent to *plus* the j-th unit vector, so ``householder_product(V, k)`` is ``Q`` itself, signs included,
    for every Q with orthonormal columns (it is :func:`orthonormal_basis` of Q otherwise). Vectors are unit, zero above
    entry j, and zero altogether where nothing is to be reflected: there the map has no derivative, and the torch
    gradient is some finite value.

    Parameters
    ----------
    Q : array of shape (*b, d, k)
        Orthonormal columns, k <= d.

    Notes
    -----
    Source: Parlett, *The Symmetric Eigenvalue Problem*, section 6.3, for the form free of cancellation.
    """
    xp = namespace(Q)
    if Q.ndim < 2 or Q.shape[-1] > Q.shape[-2]:
        raise ValueError(f"Q must hold orthonormal columns (*b, d, k) with k <= d, got shape {tuple(Q.shape)}")
    rest, narrow = widen(Q)
    zeros, vectors = xp.zeros_like(rest), []
    for _ in range(Q.shape[-1]):
        head, tail = rest[..., :1, :1], rest[..., 1:, :1]
        size = xp.linalg.vector_norm(rest[..., :1], axis=-2, keepdims=True)
        unit, length = _unit(tail)
        # (head - size, tail); for a positive head, where that cancels, head - size = -length^2 / (head + size), and the
        # whole is divided by length, lest length^2 vanish.
        down = head > 0
        first = xp.where(down, -length / _or_one(xp.where(down, head + size, size)), head - size)
        after = xp.where(down, unit, tail)
        v, _ = _unit(xp.concat([first, after], axis=-2))
        vectors.append(xp.concat([zeros[..., : len(vectors), :1], v], axis=-2))
        rest = (rest[..., 1:] - 2 * v @ (swap(v) @ rest[..., 1:]))[..., 1:, :]
    return narrow(xp.concat(vectors, axis=-1)) if vectors else xp.zeros_like(Q)


def _unit(x: Any) -> tuple[Any, Any]:
    """Return columns over their lengths, and the lengths (*b, 1, m); zero columns stay zero."""
    xp = namespace(x)
    # A first rough scale keeps the squares of very small and very large columns from vanishing and overflowing.
    scale = xp.sum(xp.abs(detached(x)), axis=-2, keepdims=True)
    x = x / _or_one(scale)
    length = xp.linalg.vector_norm(x, axis=-2, keepdims=True)
    return x / _or_one(length), scale * length


def _or_one(x: Any) -> Any:
    """Replace zeros by ones, so that zero columns survive division by their own length."""
    xp = namespace(x)
    return xp.where(x > 0, x, xp.ones_like(x))
