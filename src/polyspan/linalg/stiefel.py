"""The Stiefel manifold of orthonormal k-frames in R^d: tangents, geodesics, logarithm, retractions.

Unlike on the Grassmann manifold the frame itself is the point. Two metrics are in use: ``"euclidean"``, that of the
surrounding space, and ``"canonical"``, that of the rotations which carry one frame to another; they agree on motions
out of the span and weigh rotations inside it 2 to 1.
"""

from typing import Any, Literal

from jaxtyping import Float

from polyspan.errors import NotConverged

from ._namespace import is_torch, namespace, swap
from .basis import orthonormal_basis
from .grassmann import _pair
from .polar import nearest_isometry

StiefelMetric = Literal["euclidean", "canonical"]


def stiefel_tangent(
    S: Float[Any, "*b d k"], E: Float[Any, "*b d k"], metric: StiefelMetric = "euclidean"
) -> Float[Any, "*b d k"]:
    r"""Turn the ambient gradient E of a function of frames into its Riemannian gradient at S.

    ``"euclidean"`` is the orthogonal projection on the tangents :math:`\{G: S^\top G + G^\top S = 0\}`,
    :math:`E - S\,\mathrm{sym}(S^\top E)`; ``"canonical"`` is :math:`E - S E^\top S`, which is no projection: it doubles
    the part of a tangent that turns the frame inside its span.

    Parameters
    ----------
    S : array of shape (*b, d, k)
        Orthonormal columns.
    E : array of shape (*b, d, k)

    Notes
    -----
    Source: Edelman, Arias and Smith 1998, sections 2.2 and 2.4.
    """
    _check_metric(metric)
    S, E, narrow = _pair(S, E, "E")
    if metric == "canonical":
        return narrow(E - S @ (swap(E) @ S))
    inner = swap(S) @ E
    return narrow(E - S @ ((inner + swap(inner)) / 2))


def stiefel_exp(
    S: Float[Any, "*b d k"], G: Float[Any, "*b d k"], t: float = 1.0, *, metric: StiefelMetric = "euclidean"
) -> Float[Any, "*b d k"]:
    r"""Follow the geodesic that leaves the frame S with velocity G for time t.

    Euclidean metric, with :math:`A = S^\top G`:

    .. math:: [S\;G]\exp\left(t\begin{bmatrix}A&-G^\top G\\I&A\end{bmatrix}\right)
              \begin{bmatrix}I\\0\end{bmatrix}e^{-tA}.

    Canonical metric: :math:`\exp(t(PS^\top - SP^\top))\,S` with :math:`P = (I-\tfrac12SS^\top)G`, by exponentials of
    size 4k, never d. The torch derivative is true and finite everywhere, the zero tangent included. For ``"euclidean"``
    orthonormality is kept up to rounding that grows with the exponential of the angle: keep t‖G‖ below about 5.

    Parameters
    ----------
    S : array of shape (*b, d, k)
        Orthonormal columns.
    G : array of shape (*b, d, k)
        A tangent: S'G antisymmetric.
    t : float
    metric : {"euclidean", "canonical"}

    Notes
    -----
    Source: Edelman, Arias and Smith 1998, sections 2.2.2 and 2.4.2.
    """
    _check_metric(metric)
    S, G, narrow = _pair(S, G, "G")
    xp = namespace(S)
    k = S.shape[-1]
    S = S + 0 * G
    inner = swap(S) @ G
    if metric == "euclidean":
        eye = inner * 0 + _eye(S, k)
        block = _block(inner, -(swap(G) @ G), eye, inner)
        return narrow(xp.concat([S, G], axis=-1) @ _expm(t * block)[..., :k] @ _expm(-t * inner))
    U, V = _generator(S, t * G)
    Z = swap(V) @ U
    # The upper right block of exp([[Z, I], [0, 0]]) is (exp(Z) - I)/Z, also where Z is singular.
    zero = Z * 0
    phi = _expm(_block(Z, zero + _eye(S, 2 * k), zero, zero))[..., : 2 * k, 2 * k :]
    return narrow(S + U @ (phi @ (swap(V) @ S)))


def stiefel_log(
    S: Float[Any, "*b d k"],
    T: Float[Any, "*b d k"],
    *,
    metric: StiefelMetric = "euclidean",
    tol: float | None = None,
    max_iter: int = 200,
) -> Float[Any, "*b d k"]:
    r"""Find the tangent G at S whose geodesic reaches the frame T at time 1, by shooting.

    Each round shoots a geodesic, carries what is missing at its end, :math:`T - \exp_S(G)`, back to S by projections
    along the way, and adds it to G. Converges linearly, and reliably only where T lies within about pi/2 of S; beyond
    the cut locus (geodesic distance at least 0.89 pi) the result need not be the shortest tangent.

    Parameters
    ----------
    S, T : arrays of shape (*b, d, k)
        Orthonormal columns.
    tol : float, optional
        Largest accepted Frobenius distance between T and the end of the geodesic; 100 eps sqrt(k) where not given.
    max_iter : int

    Raises
    ------
    NotConverged
        The end of some geodesic of the batch did not come within ``tol`` of its T.

    Notes
    -----
    Source: Bryner 2017; Zimmermann and Hueper 2022.
    """
    _check_metric(metric)
    S, T, narrow = _pair(S, T, "T")
    xp = namespace(S)
    enough = tol if tol is not None else 100 * xp.finfo(S.dtype).eps * S.shape[-1] ** 0.5
    G = stiefel_tangent(S, T - S)
    error = float("inf")
    for _ in range(max_iter):
        missing = T - stiefel_exp(S, G, metric=metric)
        error = (
            float(xp.max(xp.linalg.matrix_norm(missing.detach() if is_torch(missing) else missing)))
            if missing.size
            else 0.0
        )
        if error <= enough:
            return narrow(G)
        if not error < 1e3:
            break
        for t in (1.0, 0.75, 0.5, 0.25):
            missing = stiefel_tangent(stiefel_exp(S, G, t, metric=metric), missing)
        G = G + stiefel_tangent(S, missing)
    raise NotConverged(f"shooting left a frame at distance {error:.1e} from its target, more than {enough:.1e}")


def stiefel_retract(
    S: Float[Any, "*b d k"], G: Float[Any, "*b d k"], method: Literal["qr", "polar", "cayley"] = "qr"
) -> Float[Any, "*b d k"]:
    r"""Move from the frame S along a tangent G at less cost than the geodesic; the frame reached agrees to first order.

    ``"qr"`` and ``"polar"`` orthonormalise S + G; ``"polar"`` agrees to second order in the Euclidean metric.
    ``"cayley"`` is :math:`(I-\tfrac12W)^{-1}(I+\tfrac12W)S` with the canonical generator
    :math:`W = PS^\top-SP^\top`, by a solve of size 2k: it agrees to second order in the canonical metric and can be
    undone by -W. The torch derivatives of all three are finite at every tangent.

    Parameters
    ----------
    S : array of shape (*b, d, k)
        Orthonormal columns.
    G : array of shape (*b, d, k)
        A tangent: S'G antisymmetric.
    method : {"qr", "polar", "cayley"}

    Notes
    -----
    Source: Absil, Mahony and Sepulchre 2008, section 4.1; Wen and Yin 2013.
    """
    S, G, narrow = _pair(S, G, "G")
    if method == "qr":
        return narrow(orthonormal_basis(S + G))
    if method == "polar":
        return narrow(nearest_isometry(S + G))
    if method != "cayley":
        raise ValueError(f"method must be 'qr', 'polar' or 'cayley', got {method!r}")
    U, V = _generator(S, G)
    system = _eye(S, U.shape[-1]) - swap(V) @ U / 2
    return narrow(S + U @ namespace(S).linalg.solve(system, swap(V) @ S))


def _generator(S: Any, G: Any) -> tuple[Any, Any]:
    """Factors U, V (*b, d, 2k) of the antisymmetric W = UV' = PS' - SP' whose rotation exp(W) moves S along G."""
    xp = namespace(S)
    P = G - S @ (swap(S) @ G) / 2
    S = S + P * 0
    return xp.concat([P, S], axis=-1), xp.concat([S, -P], axis=-1)


def _block(a: Any, b: Any, c: Any, d: Any) -> Any:
    xp = namespace(a)
    return xp.concat([xp.concat([a, b], axis=-1), xp.concat([c, d], axis=-1)], axis=-2)


def _expm(X: Any) -> Any:
    if is_torch(X):
        import torch

        return torch.linalg.matrix_exp(X)
    from scipy.linalg import expm

    return expm(X)


def _eye(like: Any, size: int) -> Any:
    return namespace(like).eye(size, dtype=like.dtype, **({"device": like.device} if is_torch(like) else {}))


def _check_metric(metric: str) -> None:
    if metric not in ("euclidean", "canonical"):
        raise ValueError(f"metric must be 'euclidean' or 'canonical', got {metric!r}")
