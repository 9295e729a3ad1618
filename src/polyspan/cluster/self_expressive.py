"""Classical subspace clustering: points are expressed by one another, and those that need one another are a cluster.

Four ways to express, one way to cluster. All take unit rows, so that neither length nor sign of a point matters.
"""

import math
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import scipy.sparse as sp

from polyspan.run import available_memory_bytes

from ._affinity import RidgeExpression, SquaredAffinity, assemble, block_spans, pursue, symmetric, threshold
from ._elastic_net import elastic_net
from ._self_expressive_base import (
    SelfExpressiveClustering,
    check_jobs,
    check_whole,
)


class ElasticNetSubspaceClustering(SelfExpressiveClustering):
    r"""Cluster points near subspaces by an elastic net: sparse enough to stay in a subspace, dense enough to connect.

    Each point solves :math:`\min_c \tau\lVert c\rVert_1 + \tfrac{1-\tau}{2}\lVert c\rVert_2^2 +
    \tfrac{\gamma_i}{2}\lVert x_i - X^\top c\rVert^2` over the others, exactly, on an active set that is exchanged until
    no other point is pulled in (the oracle region of You, Li, Robinson and Vidal 2016). :math:`\gamma_i` is ``gamma``
    times the least that gives point i any coefficient. With ``tau=1`` this is sparse subspace clustering (SSC).

    Points on the intersection of subspaces, and subspaces that are nearly parallel, are not told apart. Time is about
    n rounds of a small elastic net and n² d for products; memory is linear in n.
    Source: You et al., CVPR 2016; baseline of catalogue entries ``lhdsc`` and ``mlc``.

    Parameters
    ----------
    n_clusters : int, default=8
    tau : float, default=0.9
        Between 0 (excluded) and 1: share of the sparse penalty.
    gamma : float, default=50.0
        Above 1: weight of the fit.
    n_active : int, default=100
        Points that the active set begins with, and by which it grows at most.
    max_rounds : int, default=50
        Exchanges of the active set.
    normalize : bool, default=True
        Bring rows to unit length; otherwise long rows are preferred as expressions of others.
    subspace_dim : int, optional
        Rank of ``bases_``; left out, whatever holds 95 % of a cluster.
    rounding : {"kmeans", "snem", "cluster_qr"}, default="kmeans"
        How the embedding becomes groups; see :func:`polyspan.linalg.discretize_embedding` for the other two.
    n_init : int, default=20
        Starts of the rounding.
    n_jobs : int, default=1
        Processes; -1 is all cores.
    random_state : int, RandomState or None
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        tau=0.9,
        gamma=50.0,
        n_active=100,
        max_rounds=50,
        normalize=True,
        subspace_dim=None,
        rounding="kmeans",
        n_init=20,
        n_jobs=1,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.tau = tau
        self.gamma = gamma
        self.n_active = n_active
        self.max_rounds = max_rounds
        self.normalize = normalize
        self.subspace_dim = subspace_dim
        self.rounding = rounding
        self.n_init = n_init
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _check(self, n: int) -> None:
        check_whole(self, ("n_active", 1), ("max_rounds", 1))
        check_jobs(self)
        if not (isinstance(self.tau, Real) and 0 < self.tau <= 1):
            raise ValueError(f"tau must lie in (0, 1], got {self.tau!r}")
        if not (isinstance(self.gamma, Real) and 1 < self.gamma < math.inf):
            raise ValueError(f"gamma must be above 1 and finite, got {self.gamma!r}")

    def _express(self, rows: np.ndarray) -> sp.csr_array:
        options = {"tau": float(self.tau), "gamma": float(self.gamma), "n_active": int(self.n_active)}
        work = partial(elastic_net, **options, max_rounds=int(self.max_rounds))
        return self._in_blocks(rows, work, rows.shape[1] + 2 * int(self.n_active))


class OMPSubspaceClustering(SelfExpressiveClustering):
    """Cluster points near subspaces by orthogonal matching pursuit: the fastest of the sparse methods.

    Each point takes the other point that its residual is most correlated with, again and again, ``n_nonzero`` times or
    until ``tol``; coefficients are refitted by least squares. Few links are certain to be right and many clusters fall
    apart: where data are noisy, or a subspace holds many points, the elastic net connects better. One product with all
    points a step: n² d times ``n_nonzero``; memory is linear in n.
    Source: You, Robinson and Vidal, CVPR 2016; baseline of catalogue entry ``lhdsc``.

    Parameters
    ----------
    n_clusters : int, default=8
    n_nonzero : int, default=10
        Most points that express one; the dimension of the subspaces is a good number.
    tol : float, default=1e-6
        Length of the residual, as a share of the row's, at which it is done.
    normalize : bool, default=True
        Bring rows to unit length; otherwise long rows are preferred as expressions of others.
    subspace_dim : int, optional
        Rank of ``bases_``; left out, whatever holds 95 % of a cluster.
    rounding : {"kmeans", "snem", "cluster_qr"}, default="kmeans"
    n_init : int, default=20
        Starts of the rounding.
    n_jobs : int, default=1
        Processes; -1 is all cores.
    random_state : int, RandomState or None
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        n_nonzero=10,
        tol=1e-6,
        normalize=True,
        subspace_dim=None,
        rounding="kmeans",
        n_init=20,
        n_jobs=1,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.n_nonzero = n_nonzero
        self.tol = tol
        self.normalize = normalize
        self.subspace_dim = subspace_dim
        self.rounding = rounding
        self.n_init = n_init
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _check(self, n: int) -> None:
        check_whole(self, ("n_nonzero", 1))
        check_jobs(self)
        if not (isinstance(self.tol, Real) and 0 <= self.tol < 1):
            raise ValueError(f"tol must lie in [0, 1), got {self.tol!r}")

    def _express(self, rows: np.ndarray) -> sp.csr_array:
        most = min(int(self.n_nonzero), *rows.shape)
        work = partial(pursue, n_nonzero=int(self.n_nonzero), tol=float(self.tol))
        return self._in_blocks(rows, work, most * (2 * rows.shape[1] + most))


class ThresholdingSubspaceClustering(SelfExpressiveClustering):
    r"""Cluster points near subspaces by linking each to the few of largest absolute cosine: nothing is solved.

    Links weigh :math:`e^{-2\arccos|\cos|}`; orthogonal points are not linked. Fails where
    subspaces meet at small angles, which the other methods bear better. One product with all points, n² d; memory is
    linear in n.
    Source: Heckel and Bölcskei 2015; baseline of catalogue entry ``lhdsc``.

    Parameters
    ----------
    n_clusters : int, default=8
    n_neighbors : int, optional
        Links a point; left out, a twentieth of the points of a cluster of mean size, but 3 at least and 100 at most.
    subspace_dim : int, optional
        Rank of ``bases_``; left out, whatever holds 95 % of a cluster.
    rounding : {"kmeans", "snem", "cluster_qr"}, default="kmeans"
    n_init : int, default=20
        Starts of the rounding.
    n_jobs : int, default=1
        Processes; -1 is all cores.
    random_state : int, RandomState or None
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        n_neighbors=None,
        subspace_dim=None,
        rounding="kmeans",
        n_init=20,
        n_jobs=1,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.n_neighbors = n_neighbors
        self.subspace_dim = subspace_dim
        self.rounding = rounding
        self.n_init = n_init
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _check(self, n: int) -> None:
        check_jobs(self)
        if self.n_neighbors is not None:
            check_whole(self, ("n_neighbors", 1))

    def _express(self, rows: np.ndarray) -> sp.csr_array:
        q = int(self.n_neighbors or min(max(3, math.ceil(len(rows) / (20 * self.n_clusters))), 100))
        return self._in_blocks(rows, partial(threshold, n_neighbors=q), 3 * q)

    def _affinity(self, C: sp.csr_array) -> sp.csr_array:
        return symmetric(2 * C, scaled=False)


class LeastSquaresSubspaceClustering(SelfExpressiveClustering):
    r"""Cluster points near subspaces by ridge regression of each on the others, in closed form.

    Minimises :math:`\lVert X - CX\rVert_F^2 + \alpha\lVert C\rVert_F^2`, with zero diagonal or without. Coefficients
    spread over all points of a subspace, which connects well; noise spreads as well.

    The coefficients have rank d but for their diagonal; their absolute values, which the published affinity is made
    of, have not. So the published form holds three n x n matrices, for some ten thousand points. Two forms are linear
    in n: ``power=2`` takes squares as affinities and never makes a matrix of n x n, exactly, at n d² a product;
    ``n_kept`` keeps the largest affinities of each point, found in blocks, n² d once.
    Source: Lu et al., ECCV 2012; squares after Liu et al., PAMI 2013; baseline of catalogue entry ``lhdsc``.

    Parameters
    ----------
    n_clusters : int, default=8
    alpha : float, default=0.1
        Penalty, > 0, in squared units of a row.
    zero_diagonal : bool, default=True
        No point expresses itself (the published LSR1; otherwise LSR2).
    power : {1, 2}, default=1
        Affinities are absolute coefficients to this power.
    n_kept : int, optional
        Largest affinities that each point keeps; left out, all.
    normalize : bool, default=True
        Bring rows to unit length.
    subspace_dim : int, optional
        Rank of ``bases_``; left out, whatever holds 95 % of a cluster.
    rounding : {"kmeans", "snem", "cluster_qr"}, default="kmeans"
    n_init : int, default=20
        Starts of the rounding.
    random_state : int, RandomState or None
    """

    def __init__(
        self,
        n_clusters=8,
        *,
        alpha=0.1,
        zero_diagonal=True,
        power=1,
        n_kept=None,
        normalize=True,
        subspace_dim=None,
        rounding="kmeans",
        n_init=20,
        random_state=None,
    ):
        self.n_clusters = n_clusters
        self.alpha = alpha
        self.zero_diagonal = zero_diagonal
        self.power = power
        self.n_kept = n_kept
        self.normalize = normalize
        self.subspace_dim = subspace_dim
        self.rounding = rounding
        self.n_init = n_init
        self.random_state = random_state

    def _check(self, n: int) -> None:
        if not (isinstance(self.alpha, Real) and 0 < self.alpha < math.inf):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha!r}")
        if self.power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {self.power!r}")
        if self.n_kept is not None:
            check_whole(self, ("n_kept", 1))
        needed, free = 3 * n * n * 8, available_memory_bytes()
        if self.power == 1 and self.n_kept is None and needed > free:
            raise ValueError(
                f"X must have few enough rows for 3 matrices of n by n: {n} rows need {needed:,} bytes, {free:,} are "
                "free; power=2 or n_kept need no such matrix"
            )

    def _express(self, rows: np.ndarray) -> Any:
        alpha, hollow = float(self.alpha), bool(self.zero_diagonal)
        expression = RidgeExpression(rows, alpha, zero_diagonal=hollow)  # ty: ignore[no-matching-overload]
        self.n_iter_, self._sizes, n = 1, None, len(rows)
        if self.n_kept is not None:
            work = partial(expression.kept, n_kept=int(self.n_kept), power=int(self.power))
            blocks, sizes = zip(*(work(span) for span in block_spans(n, 4 * n * 8)), strict=True)
            self._sizes = assemble([b._replace(values=s) for b, s in zip(blocks, sizes, strict=True)], n, rows.dtype)
            return assemble(list(blocks), n, rows.dtype)
        return expression if self.power == 2 else expression.dense()

    def _affinity(self, C: Any) -> Any:
        sizes = self._sizes
        del self._sizes
        if isinstance(C, RidgeExpression):
            return SquaredAffinity(C)  # ty: ignore[no-matching-overload]
        return symmetric(C if sizes is None else sizes, scaled=False)
