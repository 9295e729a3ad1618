"""The Grassmann manifold of k-dimensional subspaces of R^d: tangents, geodesics, logarithm, retractions, transport.

A point is any orthonormal basis S (d, k) of the subspace, a tangent any G (d, k) with S'G = 0. All matrix functions
below are entire functions of the k x k Gram matrix A = G'G, evaluated by polynomials in float64: no tall SVD, and the
torch derivative is finite everywhere, at the zero tangent and at repeated singular values too, where that of an SVD or
of an eigendecomposition is not.
"""

import math
from functools import cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from ._namespace import is_torch, namespace, swap, widen
from .basis import orthonormal_basis
from .polar import nearest_isometry

Retraction = Literal["qr", "polar", "cholesky"]
# Taylor terms of cos(sqrt(a)) and sin(sqrt(a))/sqrt(a) for 0 <= a <= 1/4: the first one left out is below 1e-18.
_TAYLOR = np.array([(-1) ** j / math.factorial(2 * j + odd) for odd in (0, 1) for j in range(8)]).reshape(4, 4)


def grassmann_tangent(S: Float[Any, "*b d k"], E: Float[Any, "*b d k"]) -> Float[Any, "*b d k"]:
    r"""Project an ambient gradient on the tangent space at S: :math:`G = E - S S^\top E`.

    Parameters
    ----------
    S : array of shape (*b, d, k)
        Orthonormal columns.
    E : array of shape (*b, d, k)
        Any matrix; for the gradient of a function of the subspace this is its Riemannian gradient.

    Notes
    -----
    Source: Edelman, Arias and Smith 1998, section 2.5.
    """
    S, E, narrow = _pair(S, E, "E")
    return narrow(E - S @ (swap(S) @ E))


def grassmann_exp(S: Float[Any, "*b d k"], G: Float[Any, "*b d k"], t: float = 1.0) -> Float[Any, "*b d k"]:
    r"""Follow the geodesic that leaves S with velocity G for time t; return an orthonormal basis of the subspace there.

    With :math:`A = G^\top G`, :math:`S\cos(t\sqrt A) + G\,\sin(t\sqrt A)/\sqrt A`, which equals the form by the SVD
    :math:`G=U\Sigma V^\top`, :math:`SV\cos(t\Sigma)V^\top + U\sin(t\Sigma)V^\top`. The basis is the one that is carried
    along without turning inside the subspace, so momenta kept as (d, k) matrices stay meaningful. The torch derivative
    is true and finite everywhere.

    Parameters
    ----------
    S : array of shape (*b, d, k)
        Orthonormal columns.
    G : array of shape (*b, d, k)
        A tangent: S'G = 0 (see :func:`grassmann_tangent`); otherwise the result is not orthonormal. Its singular values
        are angles in radians per unit of time.
    t : float
        Time. Rounding errors grow with the square of the angle: about 1e-16 times its square, in radians.

    Notes
    -----
    Source: Edelman, Arias and Smith 1998, theorem 2.3.
    """
    S, G, narrow = _pair(S, G, "G")
    cos, sinc = cos_sinc(_gram(G) * t**2)
    return narrow(S @ _as(cos, S) + G @ _as(sinc * t, S))


def grassmann_log(S: Float[Any, "*b d k"], T: Float[Any, "*b d k"]) -> Float[Any, "*b d k"]:
    r"""Return the shortest tangent G at S whose geodesic reaches the subspace T at time 1.

    With the basis of T turned towards S, :math:`T_* = T\,\mathrm{polar}(T^\top S)`, and :math:`C = S^\top T_*`, whose
    eigenvalues are the cosines of the principal angles, :math:`G = (T_* - SC)\,f(C)` where
    :math:`f(\cos\theta) = \theta/\sin\theta`. Singular values of G are the principal angles; its Frobenius norm is the
    geodesic distance.

    Where an angle is pi/2 there are several shortest tangents and this returns one; there alone the torch derivative
    is infinite or NaN. It is true and finite elsewhere, at S = T and at repeated angles too.

    Parameters
    ----------
    S, T : arrays of shape (*b, d, k)
        Orthonormal columns.

    Notes
    -----
    Source: Bendokat, Zimmermann and Absil 2024, section 5.2.
    """
    S, T, narrow = _pair(S, T, "T")
    T = T @ nearest_isometry(swap(T) @ S)
    cosines = swap(S) @ T
    H = T - S @ cosines
    # A second projection removes what rounding left along S where the angles are small.
    H = H - S @ (swap(S) @ H)
    return narrow(H @ _as(_angle_over_sine(_double((cosines + swap(cosines)) / 2)), S))


def grassmann_retract(
    S: Float[Any, "*b d k"], G: Float[Any, "*b d k"], method: Retraction = "qr"
) -> Float[Any, "*b d k"]:
    r"""Move from S along G at less cost than the geodesic: an orthonormal basis of the span of S + G.

    All three methods reach the same subspace, whose angles to S are the arc tangents of the singular values of G, and
    differ in its basis. ``"qr"`` keeps the order of columns (see :func:`orthonormal_basis`), ``"polar"`` is the basis
    nearest to S + G, ``"cholesky"`` equals ``"qr"`` but touches the tall matrix in products only; it squares the
    condition number, so S + G must not be near rank deficiency, which a tangent G excludes.

    Parameters
    ----------
    S : array of shape (*b, d, k)
        Orthonormal columns.
    G : array of shape (*b, d, k)
    method : {"qr", "polar", "cholesky"}
    """
    S, G, narrow = _pair(S, G, "G")
    X = S + G
    if method == "qr":
        return narrow(orthonormal_basis(X))
    if method == "polar":
        return narrow(nearest_isometry(X))
    if method != "cholesky":
        raise ValueError(f"method must be 'qr', 'polar' or 'cholesky', got {method!r}")
    xp = namespace(X)
    return narrow(X @ swap(xp.linalg.inv(xp.linalg.cholesky(swap(X) @ X))))


def grassmann_transport(
    S: Float[Any, "*b d k"], G: Float[Any, "*b d k"], H: Float[Any, "*b d k"], t: float = 1.0
) -> Float[Any, "*b d k"]:
    r"""Carry a tangent H at S in parallel along the geodesic of :func:`grassmann_exp` to its point at time t.

    With :math:`A = G^\top G`,
    :math:`H - \bigl(S\,\tfrac{\sin t\sqrt A}{\sqrt A} + G\,\tfrac{1-\cos t\sqrt A}{A}\bigr)\,G^\top H`: an isometry
    from the tangents at S to those at the basis that :func:`grassmann_exp` returns. The torch derivative is true and
    finite everywhere.

    Parameters
    ----------
    S : array of shape (*b, d, k)
        Orthonormal columns.
    G, H : arrays of shape (*b, d, k)
        Tangents at S.
    t : float

    Notes
    -----
    Source: Edelman, Arias and Smith 1998, theorem 2.4.
    """
    wide, G, narrow = _pair(S, G, "G")
    _, H, _ = _pair(S, H, "H")
    A = _gram(G) * t**2
    sinc = cos_sinc(A)[1]
    half = cos_sinc(A / 4)[1]
    inner = _double(swap(G) @ H)
    # (1 - cos x) / x^2 is half the square of the sinc of x/2, free of cancellation.
    return narrow(H - wide @ _as(sinc @ inner * t, H) - G @ _as(half @ half @ inner * (t**2 / 2), H))


def cos_sinc(A: Any, doublings: int | None = None) -> tuple[Any, Any]:
    r"""Return :math:`\cos\sqrt A` and :math:`\sin\sqrt A/\sqrt A` of positive semidefinite matrices (*b, k, k).

    Both are entire functions of A: a Taylor polynomial of :math:`A/4^r`, then r double-angle steps. Float64 in, float64
    out.

    Parameters
    ----------
    doublings : int, optional
        r; enough for angles up to :math:`2^{r-1}` radians. Read off A where not given, which waits for an accelerator.
    """
    xp = namespace(A)
    if doublings is None:
        bound = float(xp.max(xp.linalg.trace(A.detach() if is_torch(A) else A))) if 0 not in A.shape else 0.0
        if not math.isfinite(bound):
            raise ValueError("G must be finite and of moderate length, got a tangent whose squared norm is not")
        doublings = max(0, math.ceil(math.log(4 * bound, 4))) if bound > 0 else 0
    eye = xp.eye(A.shape[-1], dtype=A.dtype, **({"device": A.device} if is_torch(A) else {}))
    A = A * 0.25**doublings
    A2 = A @ A
    A3, A4 = A2 @ A, A2 @ A2
    # Four sums of four powers by one small product: the low and the high half of each series.
    powers = xp.stack([xp.broadcast_to(eye, A.shape), A, A2, A3])
    sums = xp.reshape(_coefficients(A) @ xp.reshape(powers, (4, -1)), powers.shape)
    cos, sinc = sums[0] + A4 @ sums[1], sums[2] + A4 @ sums[3]
    for _ in range(doublings):
        cos, sinc = 2 * (cos @ cos) - eye, sinc @ cos
    return cos, sinc


def _coefficients(A: Any) -> Any:
    """Taylor coefficients (4, 4) in the kind of array and on the device of ``A``."""
    return _torch_coefficients(A.device) if is_torch(A) else _TAYLOR


@cache
def _torch_coefficients(device: Any) -> Any:
    import torch

    # A tensor made in inference mode could not take part in a gradient later on.
    with torch.inference_mode(False):
        return torch.as_tensor(_TAYLOR, device=device)


@cache
def _angle_over_sine_coefficients() -> tuple[float, ...]:
    """Chebyshev coefficients of theta/sin(theta) as a function of 2 cos(theta) - 1, for angles up to pi/2.

    The nearest singularity, theta = pi, lies at -3 there, so that coefficients fall by 5.8 each.
    """

    def value(x: np.ndarray) -> np.ndarray:
        theta = np.arccos((x + 1) / 2)
        return 1.0 / np.sinc(theta / np.pi)

    interpolate: Any = np.polynomial.chebyshev.chebinterpolate
    return tuple(float(c) for c in interpolate(value, 22))


def _angle_over_sine(C: Any) -> Any:
    """Apply theta/sin(theta) to matrices whose eigenvalues are cos(theta) in [0, 1], by Clenshaw's recurrence."""
    xp = namespace(C)
    eye = xp.eye(C.shape[-1], dtype=C.dtype, **({"device": C.device} if is_torch(C) else {}))
    X = 2 * C - eye
    coefficients = _angle_over_sine_coefficients()
    last, before = eye * coefficients[-1], eye * 0.0
    for c in coefficients[-2:0:-1]:
        last, before = 2 * (X @ last) - before + eye * c, last
    return X @ last - before + eye * coefficients[0]


def _gram(G: Any) -> Any:
    """G'G in float64."""
    A = _double(swap(G) @ G)
    return (A + swap(A)) / 2


def _double(x: Any) -> Any:
    xp = namespace(x)
    return xp.astype(x, xp.float64, copy=False)


def _as(x: Any, like: Any) -> Any:
    return namespace(x).astype(x, like.dtype, copy=False)


def _pair(S: Any, E: Any, name: str) -> tuple[Any, Any, Any]:
    """Check a basis and a matrix of its shape; return both widened, and the cast back to the dtype of S."""
    xp = namespace(S, E)
    if S.ndim < 2 or S.shape[-1] > S.shape[-2] or 0 in S.shape[-2:]:
        raise ValueError(f"S must hold bases (*b, d, k) with 1 <= k <= d, got shape {tuple(S.shape)}")
    if E.ndim < 2 or tuple(E.shape[-2:]) != tuple(S.shape[-2:]):
        raise ValueError(
            f"{name} must have the shape of S in its last two axes, {tuple(S.shape[-2:])}, got {tuple(E.shape)}"
        )
    if xp.isdtype(xp.result_type(S, E), "complex floating"):
        raise TypeError(f"S and {name} must be real, got {S.dtype} and {E.dtype}")
    wide, narrow = widen(S)
    return wide, xp.astype(E, wide.dtype, copy=False), narrow
