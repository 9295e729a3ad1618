"""Ways to write a unit of layers smaller by one budget: sparse dictionaries, low rank, pruning."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._calibration import whiten
from ._compressed_layers import LowRankLinear, SparseDictionaryLinear
from ._dictionary_fit import ALGORITHMS, PURSUITS, fit_dictionary, refit
from ._sparse_storage import (
    COEF_DTYPES,
    INDEX_COSTS,
    coefficient_bytes,
    largest_dictionary,
    mask_bytes,
    most_nonzero,
    stored_bytes,
)

LOW_RANK = ("svd", "svd-llm", "asvd", "basis-sharing")
PRUNED = ("wanda", "magnitude")
METHODS = (*ALGORITHMS, *LOW_RANK, *PRUNED)
ALIASES = {"sparse-dictionary": "ksvd", "cospadi": "ksvd", "svdllm": "svd-llm"}


class Settings(NamedTuple):
    """What is the same for every unit of one method; ``word_bytes`` counts a number, None as the model stores it."""

    method: str = "ksvd"
    rho: float | int = 2.0
    pursuit: str = "exchange"
    index_cost: str = "bitmask"
    coef_dtype: str | None = None
    word_bytes: int | None = None
    max_iter: int = 20
    tol: float | int = 1e-4
    seed: int = 0


class Sizes(NamedTuple):
    """Atoms (or rank) and non-zeros of an output (0 for low rank) that a budget pays."""

    atoms: int
    nonzero: int


class CompressedLayer(NamedTuple):
    """A layer's module, without bias, and the share of its outputs' squared norm on calibration that is lost."""

    module: Any
    error: float


class CompressedUnit(NamedTuple):
    """The layers of one unit, the first owning what they share; the ridge of the whitening and the sweeps made."""

    layers: list[CompressedLayer]
    eps: float
    sweeps: int


def named_method(method: str) -> str:
    """Return a method's own name.

    Raises
    ------
    ValueError
        There is no such method.
    """
    name = ALIASES.get(method, method)
    if name not in METHODS:
        raise ValueError(f"method must be one of {(*METHODS, *ALIASES)}, got {method!r}")
    return name


def group_size(method: str, groups: int) -> int:
    """Return how many layers share a basis: dictionaries as asked, Basis Sharing at least two, others none."""
    if method == "basis-sharing":
        return max(2, groups)
    return groups if method in ALGORITHMS else 1


def check_settings(settings: Settings) -> None:
    """Raise ``ValueError`` for what is out of range."""
    named_method(settings.method)
    for name, known in (("pursuit", PURSUITS), ("index_cost", INDEX_COSTS), ("coef_dtype", (None, *COEF_DTYPES))):
        if getattr(settings, name) not in known:
            raise ValueError(f"{name} must be one of {known}, got {getattr(settings, name)!r}")
    if not (math.isfinite(settings.rho) and settings.rho >= 1):
        raise ValueError(f"rho must be at least 1, got {settings.rho}")
    if settings.max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {settings.max_iter}")
    if not 0 <= settings.seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {settings.seed}")
    if settings.word_bytes is not None and settings.word_bytes not in (2, 4, 8):
        raise ValueError(f"word_bytes must be 2, 4 or 8, got {settings.word_bytes}")


def unit_sizes(
    settings: Settings, name: str, d_in: int, d_out: int, count: int, ratio: float | int, dtype: torch.dtype
) -> Sizes | None:
    """Return the sizes that make ``count`` layers (d_in, d_out) smaller by ``ratio``; None where nothing ever could.

    Raises
    ------
    ValueError
        The ratio is not in (0, 1), or leaves no atom; the largest that is possible is named.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be in (0, 1), got {ratio} for {name}")
    word = settings.word_bytes or dtype.itemsize
    dense, wide = d_in * d_out * count * word, d_out * count
    budget = (1 - ratio) * dense
    coef = COEF_DTYPES.get(settings.coef_dtype or "", dtype)
    if settings.method in LOW_RANK:
        least = word * (d_in + wide)
        found = Sizes(int(budget // least), 0)
        enough = found.atoms
    elif settings.method in PRUNED:
        marks = mask_bytes(wide, d_in) + (4 * wide if coef == torch.int8 else 0)
        each = coefficient_bytes(word, coef) * wide
        least = marks + each
        found = Sizes(d_in, min(d_in, int((budget - marks) // each)))
        enough = found.nonzero
    else:
        options: dict[str, Any] = {"word": word, "coef": coef, "index_cost": settings.index_cost}
        least = stored_bytes(d_in, wide, math.ceil(settings.rho), 1, **options)
        m, s = largest_dictionary(d_in, wide, budget, settings.rho, **options)
        if settings.method != "ksvd" and m > d_in:
            # Orthonormal atoms are at most as many as dimensions; what is left over pays coefficients.
            m, s = d_in, most_nonzero(d_in, wide, d_in, budget, **options)
        found = Sizes(m, s)
        enough = s
    if enough >= 1:
        return found
    if least >= dense:
        return None
    raise ValueError(
        f"ratio must leave room for one atom: for {name} ({d_in} x {d_out}) it is at most {1 - least / dense:.3f}, "
        f"got {ratio}"
    )


@torch.no_grad()
def compress_unit(
    weights: Sequence[Tensor], grams: Sequence[Tensor], sizes: Sizes, settings: Settings, dtype: torch.dtype
) -> CompressedUnit:
    """Write weights W (d_in, d_out), with outputs as columns, of layers whose inputs have Gram matrices ``grams``.

    Several weights share one dictionary or left factor, fitted to all of them and to the sum of their Gram matrices.
    """
    # Contiguous, so that the same numbers take the same course whatever layout they come in.
    wide = [w.double().contiguous() for w in weights]
    W, gram = torch.cat(wide, dim=1), torch.stack([*grams]).sum(dim=0)
    if settings.method in LOW_RANK:
        modules, eps = _low_rank(W, gram, sizes.atoms, settings.method, len(weights), dtype)
        sweeps = 0
    elif settings.method in PRUNED:
        modules, eps, sweeps = _pruned(W, gram, sizes.nonzero, settings, len(weights), dtype), 0.0, 0
    else:
        modules, eps, sweeps = _dictionary(W, gram, sizes, settings, len(weights), dtype)
    layers = [
        CompressedLayer(module, functional_error(w, module.weight_matrix().double().mT, g))
        for module, w, g in zip(modules, wide, grams, strict=True)
    ]
    return CompressedUnit(layers, eps, sweeps)


def functional_error(weight: Tensor, made: Tensor, gram: Tensor) -> float:
    r"""Return :math:`\lVert X(W-\hat W)\rVert^2 / \lVert XW\rVert^2` from :math:`G=X^\top X`; 0 where both are 0."""
    off = weight - made
    lost, total = (float((part * (gram @ part)).sum()) for part in (off, weight))
    return max(lost, 0.0) / total if total > 0 else 0.0


def _low_rank(W: Tensor, gram: Tensor, rank: int, method: str, count: int, dtype: torch.dtype) -> tuple[list, float]:
    """Cut the singular value decomposition of W, seen through the inputs' metric or through their sizes."""
    if method == "svd":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        eps = 0.0
    elif method == "asvd":
        # The published scale is the root of the mean magnitude of each input; a Gram matrix knows the quadratic mean.
        size = gram.diagonal().clamp(min=0).pow(0.25)
        size = torch.where(size > 0, size, size.max() if float(size.max()) > 0 else 1)
        U, S, Vh = torch.linalg.svd(size[:, None] * W, full_matrices=False)
        U, eps = U / size[:, None], 0.0
    else:
        factor, eps = whiten(gram)
        U, S, Vh = torch.linalg.svd(factor.mT @ W, full_matrices=False)
        U = torch.linalg.solve_triangular(factor.mT, U, upper=True)
    rank = min(rank, len(S))
    root = S[:rank].sqrt()
    left, right = (U[:, :rank] * root).to(dtype), (root[:, None] * Vh[:rank]).to(dtype)
    made: list[LowRankLinear] = []
    for part in right.chunk(count, dim=1):
        module = LowRankLinear(W.shape[0], part.shape[1], rank, False, shared=bool(made), device=W.device, dtype=dtype)
        module.right.copy_(part)
        if made:
            module.share_left(made[0])
        else:
            module.left.copy_(left)
        made.append(module)
    return made, eps


def _pruned(W: Tensor, gram: Tensor, keep: int, settings: Settings, count: int, dtype: torch.dtype) -> list:
    """Keep of each output the ``keep`` weights that are largest, by themselves or times the norm of their input."""
    rows = W.mT
    scores = rows.abs() * (gram.diagonal().clamp(min=0).sqrt() if settings.method == "wanda" else 1)
    places = scores.topk(keep, dim=1, sorted=False).indices
    kept = torch.zeros_like(rows).scatter_(1, places, rows.gather(1, places))
    options: dict[str, Any] = {"coef_dtype": settings.coef_dtype, "dtype": dtype}
    return [SparseDictionaryLinear.from_codes(None, part, keep, **options) for part in kept.chunk(count)]


def _dictionary(
    W: Tensor, gram: Tensor, sizes: Sizes, settings: Settings, count: int, dtype: torch.dtype
) -> tuple[list, float, int]:
    """Fit D and S in the inputs' metric: with G = C C', the error of X W is that of C' W."""
    factor, eps = whiten(gram)
    Y = (factor.mT @ W).mT.contiguous()

    def importance(atoms: Tensor) -> Tensor:
        return torch.linalg.vector_norm(torch.linalg.solve_triangular(factor.mT, atoms, upper=True), dim=0).sqrt()

    found = fit_dictionary(
        Y, sizes.atoms, sizes.nonzero, algorithm=settings.method, pursuit=settings.pursuit,
        max_iter=settings.max_iter, tol=settings.tol, generator=torch.Generator().manual_seed(settings.seed),
        importance=importance,
    )  # fmt: skip
    D = torch.linalg.solve_triangular(factor.mT, found.atoms, upper=True)
    # One factor for all atoms, so that they are of size 1 in the model's own units, whatever that of activations.
    scale = torch.linalg.vector_norm(D, dim=0).mean()
    D = (D / scale).to(dtype)
    # What is stored is rounded: coefficients are fitted once more, to the atoms as they will be read.
    rounded = factor.mT @ D.double()
    length = torch.linalg.vector_norm(rounded, dim=0)
    length = torch.where(length > 0, length, 1)
    codes = refit(rounded / length, Y, found.codes) / length
    made: list[SparseDictionaryLinear] = []
    for part in codes.chunk(count):
        module = SparseDictionaryLinear.from_codes(
            D, part, sizes.nonzero, coef_dtype=settings.coef_dtype, index_cost=settings.index_cost, dtype=dtype
        )
        if made:
            module.dictionary_kind = "shared"
            module.share_dictionary(made[0])
        made.append(module)
    return made, eps, len(found.errors)


def layer_config(module: Any, *, owner: str | None = None, tied_to: str | None = None) -> dict[str, Any]:
    """Return in JSON types what :func:`layer_from_config` needs to make an empty layer of the same form."""
    told: dict[str, Any] = {
        "in": module.in_features, "out": module.out_features, "transposed": module.transposed,
    }  # fmt: skip
    if isinstance(module, LowRankLinear):
        told |= {"kind": "low-rank", "rank": module.rank}
    elif isinstance(module, SparseDictionaryLinear):
        told |= {
            "kind": "sparse", "atoms": module.num_atoms, "nonzero": module.num_nonzero,
            "coef_dtype": module.coef_dtype, "index_cost": module.index_cost,
            "dictionary": "none" if module.dictionary_kind == "none" else "own" if owner is None else "shared",
        }  # fmt: skip
    else:
        raise TypeError(f"module must be a compressed layer, got {type(module).__name__}")
    return told | ({} if owner is None else {"owner": owner}) | ({} if tied_to is None else {"tied_to": tied_to})


def layer_from_config(
    told: dict[str, Any], *, bias: bool, device: Any = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return the empty layer that :func:`layer_config` told; what it shares is joined afterwards."""
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if told["kind"] == "low-rank":
        made = LowRankLinear(told["in"], told["out"], told["rank"], bias, shared="owner" in told, **options)
    else:
        made = SparseDictionaryLinear(
            told["in"], told["out"], told["atoms"], told["nonzero"], bias, coef_dtype=told["coef_dtype"],
            index_cost=told["index_cost"], dictionary=told["dictionary"], **options,
        )  # fmt: skip
    made.transposed = told["transposed"]
    return made
