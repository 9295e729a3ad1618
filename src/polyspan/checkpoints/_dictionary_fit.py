"""Fit dictionaries to rows: K-SVD by exchanges or by matching pursuit, orthogonal dictionaries, thresholded axes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from polyspan.linalg import ksvd_update, mod_update, nearest_isometry, orthogonal_matching_pursuit

ALGORITHMS = ("ksvd", "orthogonal", "threshold")
PURSUITS = ("exchange", "omp")
INITS = ("svd", "random")
REFITS, POLISH = 3, 8
THRESHOLD_RIDGE = 1e-3
FURTHER, FASTER, MOST_FURTHER = 0.5, 1.2, 1.5
FEW = 8
BLOCK_BYTES = 2**26


class DictionaryFit(NamedTuple):
    """Atoms (d, m), codes (n, m) and the unexplained share of the squared norm after each sweep."""

    atoms: Tensor
    codes: Tensor
    errors: list[float]


def fit_dictionary(
    Y: Tensor,
    m: int,
    s: int,
    *,
    algorithm: str = "ksvd",
    pursuit: str = "exchange",
    init: str = "svd",
    max_iter: int = 20,
    tol: float | int = 1e-4,
    generator: torch.Generator | None = None,
    importance: Callable[[Tensor], Tensor] | None = None,
) -> DictionaryFit:
    r"""Fit ``m`` atoms to the rows of ``Y`` (n, d), float64, so that each row is near a sum of at most ``s``.

    Parameters
    ----------
    algorithm : {"ksvd", "orthogonal", "threshold"}
    pursuit : {"exchange", "omp"}
        How K-SVD finds codes. ``"omp"`` is the published form: every sweep codes all rows anew by orthogonal matching
        pursuit and then updates atoms one by one; the error may rise, and the best sweep is kept. ``"exchange"`` keeps
        each row's atoms, exchanges some where that lowers its error, and updates all atoms at once; all of it is
        matrix products, and the error never rises; atoms are also carried on along their last change where that
        helps, which makes ten sweeps worth thirty.
    init : {"svd", "random"}
    max_iter : int
        Sweeps; "threshold" takes one.
    tol : float
        A fit ends when two sweeps together lower the error by less than this share of it.
    generator : torch.Generator, optional
        Chooses rows for atoms beyond the rank, and all of them with ``init="random"``.
    importance : callable, optional
        From atoms (d, m) to factors (m,), for "threshold": coefficients are chosen by their size times it.
    """
    total = float(Y.square().sum())
    D = _first_atoms(Y, m, "svd" if algorithm != "ksvd" else init, generator)
    if total == 0:
        return DictionaryFit(D, Y.new_zeros(len(Y), m), [0.0])
    if algorithm == "threshold":
        scores = Y @ D
        kept = _largest(scores if importance is None else scores * importance(D), s)
        D, codes = mod_update(Y, torch.where(kept, scores, 0), reg=THRESHOLD_RIDGE)
        return DictionaryFit(D, codes, [_lost(Y, D, codes) / total])
    if algorithm == "orthogonal":
        return _orthogonal(Y, D, s, total, max_iter, tol)
    if pursuit == "omp":
        return _by_omp(Y, D, s, total, max_iter, tol)
    return _by_exchange(Y, D, s, total, max_iter, tol)


def refit(D: Tensor, Y: Tensor, codes: Tensor) -> Tensor:
    """Return codes of the same supports that are nearly least squares for atoms ``D``, of about unit norm."""
    gram, kept = D.mT @ D, codes != 0
    parts = zip(codes.split(_rows(codes)), kept.split(_rows(codes)), (Y @ D).split(_rows(codes)), strict=True)
    return torch.cat([_conjugate_gradients(gram, b, c, k, POLISH) for c, k, b in parts])


def _first_atoms(Y: Tensor, m: int, init: str, generator: torch.Generator | None) -> Tensor:
    """Leading right singular vectors, then rows of ``Y`` at unit norm drawn without repetition, then axes."""
    n, d = Y.shape
    D = Y.new_zeros(d, m)
    led = 0
    if init == "svd":
        led = min(m, n, d)
        # The eigenvectors of the smaller product would have half the digits, which a start does not need.
        if d <= n:
            D[:, :led] = torch.linalg.eigh(Y.mT @ Y).eigenvectors.flip(1)[:, :led]
        else:
            D[:, :led] = torch.linalg.svd(Y, full_matrices=False).Vh[:led].mT
    if led == m:
        return D
    length = torch.linalg.vector_norm(Y, dim=1)
    alive = length.nonzero()[:, 0]
    drawn = alive[torch.randperm(len(alive), generator=generator).to(alive.device)][: m - led]
    D[:, led : led + len(drawn)] = (Y[drawn] / length[drawn, None]).mT
    for j in range(led + len(drawn), m):
        D[j % d, j] = 1
    return D


def _largest(scores: Tensor, s: int) -> Tensor:
    """Mark the ``s`` entries of largest magnitude of each row."""
    places = scores.abs().topk(s, dim=1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, places, True)


def _lost(Y: Tensor, D: Tensor, codes: Tensor) -> float:
    return float((Y - codes @ D.mT).square().sum())


def _settled(errors: list[float], tol: float | int) -> bool:
    return errors[-1] == 0 or (len(errors) > 2 and errors[-3] - errors[-1] < tol * errors[-3])


def _orthogonal(Y: Tensor, D: Tensor, s: int, total: float, max_iter: int, tol: float | int) -> DictionaryFit:
    errors: list[float] = []
    while True:
        # Of orthonormal atoms the largest coefficients are the best, and what they hold is what is explained.
        scores = Y @ D
        codes = torch.where(_largest(scores, s), scores, 0)
        errors.append(max(0.0, 1 - float(codes.square().sum()) / total))
        if len(errors) > max_iter or _settled(errors, tol):
            return DictionaryFit(D, codes, errors)
        D = nearest_isometry(Y.mT @ codes)


def _by_omp(Y: Tensor, D: Tensor, s: int, total: float, max_iter: int, tol: float | int) -> DictionaryFit:
    best, errors = None, []
    for _ in range(max_iter):
        codes = orthogonal_matching_pursuit(D, Y, n_nonzero=s)
        D, codes = ksvd_update(D, Y, codes)
        errors.append(_lost(Y, D, codes) / total)
        if best is None or errors[-1] <= min(errors):
            best = (D, codes)
        if _settled(errors, tol):
            break
    assert best is not None
    return DictionaryFit(*best, errors)


def _by_exchange(Y: Tensor, D: Tensor, s: int, total: float, max_iter: int, tol: float | int) -> DictionaryFit:
    codes, step = Y.new_zeros(len(Y), D.shape[1]), Y.new_ones(len(Y), 1)
    errors: list[float] = []
    before, further = None, FURTHER
    few = FEW * s <= D.shape[1]
    for _ in range(max_iter):
        # Sweeps go the same way for long: atoms are carried on along their last change, while that lowers the error.
        ahead = D if before is None else D + further * (D - before)
        ahead = ahead / torch.linalg.vector_norm(ahead, dim=0)
        tried, lengths = codes.clone(), step.clone()
        exchange(ahead, Y, tried, lengths, s)
        if few:
            _pursue(ahead, Y, tried, s)
        atoms, tried = mod_update(Y, tried)
        error = _lost(Y, atoms, tried) / total
        if errors and error > errors[-1]:
            before, further = None, further / 2
            errors.append(errors[-1])
            continue
        before, D, codes, step = D, atoms, tried, lengths
        further = min(MOST_FURTHER, FASTER * further)
        errors.append(error)
        if _settled(errors, tol):
            break
    codes = refit(D, Y, codes)
    errors.append(_lost(Y, D, codes) / total)
    return DictionaryFit(D, codes, errors)


def exchange(D: Tensor, Y: Tensor, codes: Tensor, step: Tensor, s: int) -> None:
    """Improve ``codes`` (n, m) over unit atoms in place: refit, exchange atoms, refit, and keep what lowers the error.

    A row's new atoms are the ``s`` largest entries of its codes plus ``step`` (n, 1) times the correlations of what is
    unexplained. Where the exchange did not help the row keeps its atoms, and its step is halved. Rows of zeros start.
    """
    gram = D.mT @ D
    height = _rows(codes)
    for first in range(0, len(codes), height):
        rows = slice(first, first + height)
        target, old, length = Y[rows] @ D, codes[rows], step[rows]
        old = _conjugate_gradients(gram, target, old, old != 0, REFITS)
        pull = old @ gram
        before = (old * (pull - 2 * target)).sum(dim=1)
        moved = old + length * (target - pull)
        kept = _largest(moved, s)
        new = _conjugate_gradients(gram, target, torch.where(kept, old, 0), kept, REFITS)
        after = (new * (new @ gram - 2 * target)).sum(dim=1)
        better = (after < before)[:, None]
        codes[rows] = torch.where(better, new, old)
        step[rows] = torch.where(better, length, length / 2)


def _pursue(D: Tensor, Y: Tensor, codes: Tensor, s: int) -> None:
    """Replace codes in place, row by row, where matching pursuit from nothing finds better ones.

    Exchanges stay near the atoms that a row began with. Of many that hardly matters; of few, all may be wrong.
    """
    fresh = orthogonal_matching_pursuit(D, Y, n_nonzero=s)
    old, new = ((Y - c @ D.mT).square().sum(dim=1, keepdim=True) for c in (codes, fresh))
    codes.copy_(torch.where(new < old, fresh, codes))


def _rows(codes: Tensor) -> int:
    return max(64, BLOCK_BYTES // (codes.shape[1] * codes.element_size()))


def _conjugate_gradients(gram: Tensor, target: Tensor, codes: Tensor, kept: Tensor, steps: int) -> Tensor:
    """Take steps towards each row's least squares on its support; the error of no row rises.

    Along a way whose curvature is lost in rounding, as of atoms that depend on one another, no step is taken: all that
    is left of the gradient there is rounding too, and the step would have any length.
    """
    rest = torch.where(kept, target - codes @ gram, 0)
    way, size = rest, rest.square().sum(dim=1, keepdim=True)
    tiny, flat = math.sqrt(torch.finfo(size.dtype).tiny), len(gram) * torch.finfo(size.dtype).eps
    for _ in range(steps):
        pulled = torch.where(kept, way @ gram, 0)
        curvature = (way * pulled).sum(dim=1, keepdim=True)
        curved = curvature > (flat * way.square().sum(dim=1, keepdim=True)).clamp(min=tiny)
        rate = torch.where(curved, size / torch.where(curved, curvature, 1), 0)
        codes = codes + rate * way
        rest = rest - rate * pulled
        fresh = rest.square().sum(dim=1, keepdim=True)
        way, size = rest + fresh / size.clamp(min=tiny) * way, fresh
    return codes
