"""Leading singular and eigenvectors of large matrices: randomised, by ARPACK, with signs and order fixed."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, aslinearoperator, eigsh

from polyspan.errors import NotConverged

from ._namespace import detached, is_torch, namespace, swap, widen


class SVD(NamedTuple):
    """Leading singular triplets: ``U`` (m, k), ``s`` (k,) descending and ``Vh`` (k, n), so that A is near U s Vh."""

    U: Any
    s: Any
    Vh: Any


class Eigen(NamedTuple):
    """Extreme eigenpairs: ``values`` (k,) descending and orthonormal columns ``vectors`` (n, k)."""

    values: Any
    vectors: Any


def fix_signs(U: Any, Vh: Any = None) -> Any:
    """Flip columns so that the entry of largest magnitude of each is positive; rows of ``Vh`` follow.

    Singular and eigenvectors are defined up to sign; this makes them repeat across machines. Entries within the square
    root of machine precision of the largest count as equal, and the first of them decides, so that rounding cannot.
    Zero columns stay as they are. It breaks only where an entry sits at that margin, and cannot help with repeated
    singular values, whose vectors may turn.

    Parameters
    ----------
    U : array of shape (*b, d, k)
        Real columns, NumPy or torch.
    Vh : array of shape (*b, k, n), optional
        Partners: row j is flipped with column j, which leaves U s Vh as it is.

    Returns
    -------
    array, or two arrays where ``Vh`` is given
    """
    xp = namespace(U, Vh)
    if U.ndim < 2 or 0 in U.shape[-2:]:
        raise ValueError(f"U must hold non-empty matrices (*b, d, k), got shape {tuple(U.shape)}")
    if xp.isdtype(U.dtype, "complex floating"):
        raise TypeError(f"U must be real, got {U.dtype}")
    if Vh is not None and (Vh.ndim != U.ndim or Vh.shape[-2] != U.shape[-1]):
        raise ValueError(f"Vh must have a row for each column of U {tuple(U.shape)}, got shape {tuple(Vh.shape)}")
    wide = detached(widen(U)[0])
    size = xp.abs(wide)
    margin = 1 - float(xp.finfo(wide.dtype).eps) ** 0.5
    first = xp.argmax(xp.astype(size >= margin * xp.max(size, axis=-2, keepdims=True), xp.int8), axis=-2)
    leading = xp.take_along_axis(wide, first[..., None, :], axis=-2)
    sign = xp.astype(xp.where(leading < 0, -xp.ones_like(leading), xp.ones_like(leading)), U.dtype)
    return U * sign if Vh is None else (U * sign, Vh * xp.astype(swap(sign), Vh.dtype))


def randomized_svd(A: Any, k: int, *, rng: Any, oversampling: int = 10, n_iter: int = 4, method: str = "power") -> SVD:
    r"""Approximate the k leading singular triplets of a large matrix from a few products with random blocks.

    With a Gaussian block :math:`\Omega` of k + oversampling columns and an orthonormal basis Q of a space that holds
    the range of A nearly, :math:`A \approx Q(Q^\top A)`, whose SVD is small.

    - ``"power"``: Q spans :math:`(AA^\top)^q A\Omega`, re-orthonormalised at each half step. Errors fall as
      :math:`(s_{k+p}/s_k)^{2q+1}`.
    - ``"krylov"``: Q spans all of :math:`A\Omega,\dots,(AA^\top)^q A\Omega`, with full re-orthogonalisation. The same
      products with A, exponentially better in q where the spectrum decays slowly; (q + 1)(k + p) columns of memory.

    Where k-th and later singular values hardly differ, the vectors are some within that cluster, though the singular
    values are accurate; :func:`truncated_svd` gives all digits. torch results carry no gradient.

    Parameters
    ----------
    A : array of shape (m, n), scipy.sparse matrix, scipy LinearOperator or torch tensor
        Real and finite; a LinearOperator must know its transpose. float16 and bfloat16 are computed in float32.
    k : int
        Triplets wanted, at most min(m, n).
    rng : numpy.random.Generator, or torch.Generator for a tensor
        Source of the Gaussian block: it is advanced.
    oversampling : int
        Extra columns p >= 0 in the block.
    n_iter : int
        Products q >= 0 with A A'.
    method : {"power", "krylov"}

    Returns
    -------
    SVD
        Signs as in :func:`fix_signs`, singular values descending.

    Notes
    -----
    Source: Halko, Martinsson and Tropp 2011; Musco and Musco 2015.
    """
    if method not in {"power", "krylov"}:
        raise ValueError(f"method must be 'power' or 'krylov', got {method!r}")
    if oversampling < 0 or n_iter < 0:
        raise ValueError(f"oversampling and n_iter must not be negative, got {oversampling} and {n_iter}")
    pair = _products(A, rng)
    _check_rank(k, min(pair.shape), "k", "min(m, n)")
    start = pair.forward(pair.draw(min(k + oversampling, *pair.shape)))
    xp = namespace(start)
    if not bool(xp.all(xp.isfinite(start))):
        raise ValueError("A must be finite, but its product with a random block is not")
    Q = xp.linalg.qr(start)[0]
    if method == "power":
        for _ in range(n_iter):
            Q = xp.linalg.qr(pair.forward(xp.linalg.qr(pair.backward(Q))[0]))[0]
        W = pair.backward(Q)
    else:
        Q, W = _krylov(pair, Q, n_iter)
    # W = A'Q is tall: A is near Q W', and the right vectors are those of W.
    right, s, turn = xp.linalg.svd(W, full_matrices=False)
    U, Vh = fix_signs(Q @ swap(turn)[:, :k], swap(right)[:k])
    return SVD(*(xp.astype(part, pair.dtype) for part in (U, s[:k], Vh)))


def truncated_eigh(
    A: Any,
    k: int,
    *,
    which: str = "largest",
    tol: float = 0.0,
    rng: np.random.Generator | None = None,
    v0: np.ndarray | None = None,
    max_iter: int | None = None,
    complete: bool = True,
) -> Eigen:
    """Compute the k largest or smallest eigenpairs of a large symmetric matrix by ARPACK, from products with it.

    Never forms an n x n array, except where n <= max(2 k + 1, 20): ARPACK's own basis would then be as large as the
    matrix, which is made dense and solved directly. Float32 arrays are solved in float64, and results cast back.

    Ties: the vectors of a repeated value span its space but are otherwise free, and depend on the start vector. Lanczos
    iterations may overlook further copies of a repeated value (a graph of several like components has them);
    ``complete`` looks for such a copy outside the vectors found until there is none. Where values k and k + 1 are
    equal, which copy is left out is arbitrary.

    Parameters
    ----------
    A : array of shape (n, n), scipy.sparse matrix or scipy LinearOperator
        Real, finite and symmetric; symmetry is probed with two vectors.
    k : int
        Between 1 and n.
    which : {"largest", "smallest"}
        By value, not by magnitude. Either way the order is descending: the smallest of all comes last.
    tol : float
        Relative accuracy of the values; 0 is machine precision.
    rng : numpy.random.Generator, optional
        Draws the start vector. Without it and without ``v0`` the start is fixed: all ones, tilted by an irrational
        sequence, because the vector of ones is itself an eigenvector of many graphs' matrices.
    v0 : array of shape (n,), optional
        Start vector, not zero.
    max_iter : int, optional
        Bound on restarts, 10 n by default.
    complete : bool
        Look for overlooked copies, at the price of a second, shorter run.

    Raises
    ------
    NotConverged
        ARPACK did not reach ``tol`` in ``max_iter`` restarts, or broke down.

    Notes
    -----
    Source: Lehoucq, Sorensen and Yang, *ARPACK Users' Guide*.
    """
    if which not in {"largest", "smallest"}:
        raise ValueError(f"which must be 'largest' or 'smallest', got {which!r}")
    operator, dtype = _operator(A)
    n = operator.shape[0]
    if operator.shape[1] != n:
        raise ValueError(f"A must be square, got shape {operator.shape}")
    _check_rank(k, n, "k", "n")
    start = _start_vector(n, v0, rng)
    image, probe = _apply(operator, start), _weyl(n, 2**0.5)
    _check_finite(image)
    other = _apply(operator, probe)
    scale = float(np.linalg.norm(image) * np.linalg.norm(probe) + np.linalg.norm(other) * np.linalg.norm(start))
    if abs(float(image @ probe - other @ start)) > float(np.finfo(operator.dtype).eps) ** 0.5 * scale:
        raise ValueError("A must be symmetric: two vectors x and y gave x'Ay different from y'Ax")
    sign = 1.0 if which == "largest" else -1.0
    if _is_small(n, k):
        dense = operator.matmat(np.eye(n, dtype=operator.dtype))
        values, vectors = np.linalg.eigh((dense + dense.T) / 2)
        values, vectors = (values[-k:], vectors[:, -k:]) if sign > 0 else (values[:k], vectors[:, :k])
    else:
        values, vectors = _extreme(operator, k, sign, start, tol, max_iter, complete)
    order = np.argsort(-values, kind="stable")
    return Eigen(values[order].astype(dtype), fix_signs(vectors[:, order]).astype(dtype))


def truncated_svd(
    A: Any,
    k: int,
    *,
    tol: float = 0.0,
    rng: np.random.Generator | None = None,
    v0: np.ndarray | None = None,
    max_iter: int | None = None,
    complete: bool = True,
) -> SVD:
    r"""Compute the k leading singular triplets of a large matrix to full accuracy, from products with it.

    ARPACK runs on the smaller of :math:`A^\top A` and :math:`AA^\top`, never formed, and its vectors are refined by a
    step with A itself. Squaring hides singular values below :math:`\sqrt\epsilon\,s_1`: they are sought anew in the
    complement of those already found, so that errors of all values are of the order of :math:`\epsilon\,s_1`.

    Never forms a matrix of the size of A, except where min(m, n) <= max(2 k + 1, 20): A is then made dense. Ties and
    further parameters as in :func:`truncated_eigh`; the vectors of singular values near 0 (relative to the first, and
    machine precision) are an arbitrary orthonormal completion.

    Parameters
    ----------
    A : array of shape (m, n), scipy.sparse matrix or scipy LinearOperator
        Real and finite; a LinearOperator must know its transpose. Float32 arrays are solved in float64.
    k : int
        Between 1 and min(m, n).
    tol : float
        Relative accuracy of the squared singular values; 0 is machine precision.
    v0 : array of shape (min(m, n),), optional
        Start vector on the smaller side.

    Raises
    ------
    NotConverged
        ARPACK did not reach ``tol`` in ``max_iter`` restarts, or broke down.
    """
    operator, dtype = _operator(A)
    size = min(operator.shape)
    _check_rank(k, size, "k", "min(m, n)")
    wide = operator.shape[0] < operator.shape[1]
    tall: Any = operator.T if wide else operator
    start = _start_vector(size, v0, rng)
    if _is_small(size, k):
        dense = tall.matmat(np.eye(size, dtype=operator.dtype))
        _check_finite(dense)
        U, s, Vh = scipy.linalg.svd(dense, full_matrices=False)
    else:
        _check_finite(_apply(tall, start))
        U, s, Vh = _by_levels(tall, k, start, tol, max_iter, complete)
    if wide:
        U, Vh = Vh.T, U.T
    U, Vh = fix_signs(U[:, :k], Vh[:k])
    return SVD(U.astype(dtype), s[:k].astype(dtype), Vh.astype(dtype))


def _by_levels(A: Any, k: int, start: np.ndarray, tol: float, max_iter: int | None, complete: bool) -> tuple:
    """Find right vectors of a tall A level by level, each level where the squared spectrum still has its digits."""
    m, n = A.shape
    eps = float(np.finfo(A.dtype).eps)
    V, top = np.zeros((n, 0), A.dtype), 0.0
    while V.shape[1] < k:

        def normal(x: np.ndarray, found: np.ndarray = V) -> np.ndarray:
            x = x - found @ (found.T @ x)
            y = A.rmatvec(A.matvec(x))
            return y - found @ (found.T @ y)

        squared = LinearOperator((n, n), matvec=normal, dtype=A.dtype)
        fresh = _extreme(squared, k - V.shape[1], 1.0, start, tol, max_iter, complete)[1]
        fresh = np.linalg.qr(fresh - V @ (V.T @ fresh))[0]
        _, s, turned = _refine(A, fresh)
        top = max(top, float(s[0]))
        sound = int(np.sum(s > eps**0.25 * s[0]))
        if sound == 0 or s[min(sound, len(s) - 1)] <= m * eps * top:
            sound = len(s)
        # Refining turns the vectors a little out of the complement of the earlier ones.
        V = np.linalg.qr(np.concatenate([V, turned[:sound].T], axis=1))[0]
    return _refine(A, V)


def _refine(A: Any, V: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take one step of subspace iteration from right vectors V (n, k), and the SVD of A restricted to its result."""
    U = np.linalg.qr(A.matmat(V))[0]
    right, s, turn = np.linalg.svd(A.rmatmat(U), full_matrices=False)
    return U @ turn.T, s, right.T


def _extreme(
    A: Any, k: int, sign: float, start: np.ndarray, tol: float, max_iter: int | None, complete: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k eigenpairs of largest ``sign`` times value, all copies of repeated ones included."""
    V = _arpack(A, k, sign, start, tol, max_iter)
    values, V = _rayleigh_ritz(A, V)
    # Of a repeated value's space a Krylov sequence sees what its start sees: what it missed is orthogonal to the start.
    chance = np.random.default_rng(0)
    while complete:
        kept = sign * values
        low, spread = float(kept.min()), float(np.abs(kept).max())
        if spread == 0.0:
            break
        found, floor = V, sign * (low - spread)

        def outside(x: np.ndarray, found: np.ndarray = found, floor: float = floor) -> np.ndarray:
            along = found.T @ x
            y = _apply(A, x - found @ along)
            return y - found @ (found.T @ y) + floor * (found @ along)

        rest = LinearOperator(A.shape, matvec=outside, dtype=A.dtype)
        begin = chance.standard_normal(len(start))
        begin -= found @ (found.T @ begin)
        fine = max(float(np.finfo(A.dtype).eps) ** 0.5, tol)
        # A rough run tells, nearly always, that nothing outside comes near the least value found.
        for accuracy in (1e-3, fine, tol):
            extra = _arpack(rest, 1, sign, begin, accuracy, max_iter)
            rival = sign * float(_rayleigh_ritz(rest, extra)[0][0])
            if rival + max(accuracy, fine) * spread <= low + 2 * fine * spread:
                return values, V
        values, V = _rayleigh_ritz(A, np.linalg.qr(np.concatenate([V, extra], axis=1))[0])
        best = np.argsort(-sign * values, kind="stable")[:k]
        values, V = values[best], V[:, best]
    return values, V


def _rayleigh_ritz(A: Any, V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormalise to machine precision and read the eigenvalues off the restricted matrix."""
    V = np.linalg.qr(V)[0]
    inner = V.T @ np.stack([_apply(A, v) for v in V.T], axis=1)
    values, turn = np.linalg.eigh((inner + inner.T) / 2)
    return values, V @ turn


def _arpack(A: Any, k: int, sign: float, start: np.ndarray, tol: float, max_iter: int | None) -> np.ndarray:
    """Run ARPACK and return eigenvectors; its own restarts are seeded."""
    seeded: dict[str, Any] = {"rng": np.random.default_rng(0)} if "rng" in inspect.signature(eigsh).parameters else {}
    if not np.any(_apply(A, start)):
        # ARPACK refuses a start in the null space; a matrix that sends a random vector to 0 as well is 0.
        start = np.random.default_rng(0).standard_normal(len(start)).astype(A.dtype)
        if not np.any(_apply(A, start)):
            return np.eye(len(start), k, dtype=A.dtype)
    try:
        return eigsh(A, k, which="LA" if sign > 0 else "SA", v0=start, tol=tol, maxiter=max_iter, **seeded)[1]
    except ArpackNoConvergence as error:
        raise NotConverged(
            f"ARPACK found {len(error.eigenvalues)} of {k} eigenpairs to tol={tol:g}; raise max_iter or tol, or "
            "ask for fewer or more pairs, so that the cut falls into a gap"
        ) from None
    except ArpackError as error:
        raise NotConverged(f"ARPACK broke down: {error}") from None


def _krylov(pair: "_Products", Q: Any, n_iter: int) -> tuple[Any, Any]:
    """Grow the block Krylov basis from Q; directions that bring nothing new are dropped."""
    xp = namespace(Q)
    W = pair.backward(Q)
    last, threshold = W, 100 * float(xp.finfo(Q.dtype).eps)
    for _ in range(n_iter):
        new = pair.forward(last)
        size = xp.linalg.vector_norm(new)
        basis, R = xp.linalg.qr(new - Q @ (swap(Q) @ new))
        turn, gain, _ = xp.linalg.svd(R)
        fresh = int(xp.sum(gain > threshold * size))
        fresh = min(fresh, Q.shape[0] - Q.shape[1])
        if fresh == 0:
            break
        new = basis @ turn[:, :fresh]
        new = xp.linalg.qr(new - Q @ (swap(Q) @ new))[0]
        last = pair.backward(new)
        Q, W = xp.concat([Q, new], axis=1), xp.concat([W, last], axis=1)
    return Q, W


class _Products(NamedTuple):
    """A matrix as its products with blocks, the Gaussian draw that suits it, and the dtype of results."""

    shape: tuple[int, int]
    forward: Callable[[Any], Any]
    backward: Callable[[Any], Any]
    draw: Callable[[int], Any]
    dtype: Any


def _products(A: Any, rng: Any) -> _Products:
    """Read any kind of matrix as :class:`_Products`, drawing from ``rng``."""
    if is_torch(A):
        import torch

        if not isinstance(rng, torch.Generator):
            raise TypeError(f"rng must be a torch.Generator for a tensor, got {type(rng).__name__}")
        if A.ndim != 2 or A.layout != torch.strided or A.is_complex():
            raise ValueError(f"A must be a real, dense matrix (m, n), got {A.dtype}, {A.layout}, {tuple(A.shape)}")
        matrix, dtype = widen(A.detach())[0], A.dtype if A.is_floating_point() else torch.float64

        def draw(columns: int) -> Any:
            block = torch.randn(matrix.shape[1], columns, generator=rng, device=rng.device, dtype=matrix.dtype)
            return block.to(matrix.device)

        return _Products(tuple(matrix.shape), lambda X: matrix @ X, lambda X: matrix.mT @ X, draw, dtype)
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator, got {type(rng).__name__}")
    operator, dtype = _operator(A, widest=False)

    def draw_numpy(columns: int) -> np.ndarray:
        return rng.standard_normal((operator.shape[1], columns), dtype=operator.dtype)

    return _Products(operator.shape, operator.matmat, operator.rmatmat, draw_numpy, dtype)


def _operator(A: Any, *, widest: bool = True) -> tuple[Any, np.dtype]:
    """Return a real matrix as a LinearOperator in float64 (or its own precision), and the dtype of results."""
    if not isinstance(A, np.ndarray | LinearOperator) and not scipy.sparse.issparse(A):
        kind = f"{type(A).__module__}.{type(A).__name__}"
        raise TypeError(f"A must be a NumPy array, a scipy.sparse matrix or a scipy LinearOperator, got {kind}")
    if len(A.shape) != 2 or 0 in A.shape:
        raise ValueError(f"A must be a non-empty matrix (m, n), got shape {A.shape}")
    given = np.dtype(np.float64 if A.dtype is None else A.dtype)
    if given.kind not in "fiub":
        raise TypeError(f"A must be real, got {given}")
    dtype = given if given.kind == "f" else np.dtype(np.float64)
    working = np.dtype(np.float64) if widest or dtype.itemsize > 4 else np.dtype(np.float32)
    if isinstance(A, LinearOperator):
        # Its products have the precision they have; asking ARPACK for more would chase noise.
        working = np.dtype(np.float64) if dtype.itemsize > 4 else np.dtype(np.float32)
        return _cast(A, working), dtype
    return aslinearoperator(A.astype(working, copy=False)), dtype


def _cast(inner: Any, dtype: np.dtype) -> Any:
    """Return a user's operator as one whose products come in one dtype."""

    def in_dtype(product: str) -> Callable[[Any], Any]:
        return lambda x: np.asarray(getattr(inner, product)(x), dtype)

    products: Any = {name: in_dtype(name) for name in ("matvec", "rmatvec", "matmat", "rmatmat")}
    return LinearOperator(inner.shape, dtype=dtype, **products)


def _apply(A: Any, x: np.ndarray) -> np.ndarray:
    return np.asarray(A.matvec(x)).reshape(-1)


def _check_finite(x: np.ndarray) -> None:
    if not np.isfinite(x).all():
        raise ValueError("A must be finite, but its products are not")


def _check_rank(k: int, most: int, name: str, bound: str) -> None:
    if not 1 <= k <= most:
        raise ValueError(f"{name} must be between 1 and {bound}={most}, got {k}")


def _is_small(n: int, k: int) -> bool:
    """Say whether ARPACK's basis would fill the space: the matrix is then no larger than its work arrays."""
    return n <= max(2 * k + 1, 20)


def _weyl(n: int, step: float) -> np.ndarray:
    """Return ones plus the fractional parts of the multiples of an irrational ``step``."""
    return 1.0 + np.modf(np.arange(1, n + 1) * step)[0]


def _start_vector(n: int, v0: np.ndarray | None, rng: np.random.Generator | None) -> np.ndarray:
    if v0 is None:
        return _weyl(n, 5**0.5) if rng is None else rng.standard_normal(n)
    start = np.asarray(v0, np.float64)
    if start.shape != (n,) or not np.isfinite(start).all() or not start.any():
        raise ValueError(f"v0 must be {n} finite numbers, not all zero, got shape {start.shape}")
    return start
