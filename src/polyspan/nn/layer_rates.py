"""Measure, layer by layer, whether a network compresses its tokens and makes them sparse."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from polyspan.linalg import coding_rate, random_orthogonal
from polyspan.run import progress, torch_generator

from ._autocast import without_autocast
from ._crate_blocks import CRATEBlock
from ._lengths import safe_length
from ._rate_attention import SubspaceSelfAttention

ITEMS = 256
"""How many items of a tensor are measured at once."""


class LayerRates(NamedTuple):
    """Means over items for each of L layers; rates in nats, NaN where a layer has no subspaces.

    ``rate``: of all tokens. ``rate_within``: within the layer's own subspaces, summed over them. ``rate_random``:
    within the same subspaces turned at random, which tells how much of a fall is compression towards what was learnt
    and how much is tokens growing alike. ``nonzero_share``: of entries, after the layer. ``dead_share``: of tokens that
    are all zero there. ``incoherence``: mean norm of U_i' U_j over pairs of subspaces, bases made orthonormal, 0 for
    orthogonal ones and at most the root of their dimension.
    """

    names: list[str]
    rate: np.ndarray
    rate_within: np.ndarray
    rate_random: np.ndarray
    nonzero_share: np.ndarray
    dead_share: np.ndarray
    incoherence: np.ndarray
    n_items: int

    def to_json(self) -> dict[str, Any]:
        """Return plain lists, for a report."""
        told = self._asdict()
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in told.items()}


def tokens_rate(Z: Float[Tensor, "*batch t d"], eps2: float | int) -> Float[Tensor, "*batch"]:
    """Return the rate of tokens brought to length 1 (zeros stay), in nats, never in half precision."""
    check_eps2(eps2)
    with without_autocast(Z):
        wide = Z.to(torch.promote_types(Z.dtype, torch.float32))
        # Not F.normalize: its gradient at 0 is the inverse of its eps.
        length = safe_length(wide)
        return coding_rate(wide / torch.where(length > 0, length, 1.0), math.sqrt(eps2))


def check_eps2(eps2: float | int) -> None:
    """Refuse a squared distortion that is not positive."""
    if not 0 < eps2 < math.inf:
        raise ValueError(f"eps2 must be positive and finite, got {eps2}")


def layer_report(
    model: nn.Module,
    batches: Tensor | Iterable[Any],
    *,
    eps2: float | int = 0.01,
    where: str = "half",
    layers: str | Sequence[str] | None = None,
    n_random: int = 4,
    seed: int = 0,
    label: str = "",
) -> LayerRates:
    r"""Measure coding rates and sparsity at every layer of a network, by hooks that are taken off again.

    For each head the tokens are projected by :math:`U_k` and brought to length 1;
    :math:`R^c=\sum_k\tfrac12\log\det(I+\tfrac{p}{N\epsilon^2}W_kW_k^\top)`, on p x p matrices where p < N.

    Parameters
    ----------
    model : nn.Module
        Put in evaluation mode for the time. Every :class:`CRATEBlock` in it is measured, in order, unless ``layers``.
    batches : Tensor, or iterable of tensor, or of tuples whose first entry is one
        A tensor holds the items along its first dimension and is passed to ``model`` 256 at a time. Batches are passed
        one by one; nothing is kept of them, so a set of any size can be measured.
    eps2 : float, default=0.01
        Squared distortion for tokens of length 1.
    where : {"half", "input"}, default="half"
        Rates between the layer's halves, tokens normalised without parameters, as the paper says; or of what enters its
        attention, as the authors' code measures. In other modules always after them.
    layers : str or sequence of str, optional
        Names of submodules that return tokens (B, N, d), of any network: a :class:`CRATEBlock`, or another for which
        only ``rate`` and the shares can be told.
    n_random : int, default=4
        How many random turns the rate within random subspaces is the mean of.
    seed : int, default=0
        Of the turns.
    label : str, optional
        Shows progress on stderr under this name.

    Raises
    ------
    ValueError
        Nothing can be measured, an argument is out of range, or tokens are not finite or fewer than 2; it names
        the layer.
    """
    check_eps2(eps2)
    if n_random < 1:
        raise ValueError(f"n_random must be at least 1, got {n_random}")
    if where not in ("half", "input"):
        raise ValueError(f"where must be 'half' or 'input', got {where!r}")
    known = dict(model.named_modules())
    names = [n for n, m in known.items() if isinstance(m, CRATEBlock)]
    if layers is not None:
        names = [layers] if isinstance(layers, str) else list(layers)
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise ValueError(f"layers must name submodules, got {missing or 'none, and the model has no CRATEBlock'}")
    if isinstance(batches, Tensor):
        if batches.ndim < 2:
            raise ValueError(f"batches must be batches, or items (n, ...), got a tensor of {batches.ndim} dimensions")
        batches = batches.split(ITEMS)
    taps = [_Tap(name, known[name], eps2, where, seed + i, n_random) for i, name in enumerate(names)]
    modes = {module: module.training for module in known.values()}
    n_items = 0
    try:
        for tap in taps:
            tap.attach()
        model.eval()
        with torch.no_grad():
            for batch in progress(batches, label=label, enabled=bool(label)):
                x = batch[0] if isinstance(batch, tuple | list) else batch
                if not isinstance(x, Tensor):
                    raise ValueError(f"batches must hold tensors, got {type(x).__name__}")
                model(x)
                n_items += len(x)
    finally:
        for tap in taps:
            tap.detach()
        for module, mode in modes.items():
            module.training = mode
    if n_items == 0:
        raise ValueError("batches must hold at least one item, got none")
    silent = [tap.name for tap in taps if tap.n != n_items]
    if silent:
        raise ValueError(f"layers must each be passed once an item, got another count for {silent}")
    columns = np.array([tap.sums for tap in taps]) / n_items
    return LayerRates(names, *columns.T, np.array([tap.incoherence for tap in taps]), n_items)


class _Tap:
    """Hooks on one layer, and the sums of what they saw."""

    def __init__(self, name: str, module: nn.Module, eps2: float, where: str, seed: int, n_random: int):
        self.shown = name or "the model"
        self.name, self.module, self.eps2, self.where = name, module, eps2, where
        self.sums, self.n, self.incoherence = np.zeros(5), 0, math.nan
        self.handles: list[Any] = []
        self.attention = module.attention if isinstance(module, CRATEBlock) else None
        if isinstance(self.attention, SubspaceSelfAttention):
            self.incoherence = incoherence(self.attention.bases.detach())
            self.random = turned(self.attention.bases.detach(), n_random, torch_generator(seed))

    def attach(self) -> None:
        block = self.module
        if isinstance(block, CRATEBlock):
            spot = block.ista_norm if self.where == "half" else block.attention
            self.handles.append(spot.register_forward_pre_hook(lambda _, args: self._rates(args[0])))
            self.handles.append(block.register_forward_hook(lambda _, __, out: self._shares(out)))
        else:
            self.handles.append(block.register_forward_hook(lambda _, __, out: self._plain(out)))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _checked(self, Z: Any) -> Tensor:
        if not isinstance(Z, Tensor) or Z.ndim != 3:
            raise ValueError(f"{self.shown} must return tokens (B, N, d), got {getattr(Z, 'shape', type(Z).__name__)}")
        if Z.shape[1] < 2:
            raise ValueError(f"{self.shown} must have at least 2 tokens, got {Z.shape[1]}")
        if not torch.isfinite(Z).all():
            raise ValueError(f"{self.shown} must have finite tokens, got NaN or infinity")
        return Z

    def _rates(self, Z: Tensor) -> None:
        Z = self._checked(Z).to(torch.promote_types(Z.dtype, torch.float32))
        Z = F.layer_norm(Z, Z.shape[-1:]) if self.where == "half" else Z
        assert self.attention is not None
        self.sums[0] += float(tokens_rate(Z, self.eps2).sum())
        self.sums[1] += float(within(Z, self.attention.bases.to(Z), self.eps2).sum())
        for bases in self.random.to(Z):
            self.sums[2] += float(within(Z, bases, self.eps2).sum()) / len(self.random)

    def _shares(self, Z: Tensor) -> None:
        Z = self._checked(Z)
        self.sums[3] += float((Z != 0).double().mean(dim=(1, 2)).sum())
        self.sums[4] += float((Z == 0).all(dim=-1).double().mean(dim=1).sum())
        self.n += len(Z)

    def _plain(self, Z: Any) -> None:
        Z = self._checked(Z[0] if isinstance(Z, tuple) else Z)
        self.sums[0] += float(tokens_rate(Z, self.eps2).sum())
        self.sums[1:3] = math.nan
        self._shares(Z)


def within(Z: Tensor, bases: Tensor, eps2: float | int) -> Tensor:
    """Return the rates (*b,) of tokens (*b, t, d) within subspaces (*b, K, d, p) or (K, d, p), summed over them."""
    return tokens_rate(Z.unsqueeze(-3) @ bases, eps2).sum(dim=-1)


def turned(bases: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return the bases (n, K, d, p) turned, all together, by ``n`` random isometries of the d dimensions."""
    Q = random_orthogonal(bases.shape[1], rng=generator, batch=(n,), dtype=torch.float64)
    return Q.to(bases.device)[:, None] @ bases.double()


def incoherence(bases: Float[Tensor, "K d p"]) -> float:
    """Return the mean Frobenius norm of U_i' U_j over pairs of subspaces, bases made orthonormal; NaN for one."""
    K = len(bases)
    if K < 2:
        return math.nan
    Q = torch.linalg.qr(bases.double())[0]
    products = torch.einsum("idp,jdq->ijpq", Q, Q)
    norms = torch.linalg.matrix_norm(products)
    return float(norms[~torch.eye(K, dtype=torch.bool, device=norms.device)].mean())


class SparseRateReductionLoss(nn.Module):
    r"""Ask of chosen layers what the architecture was derived from: :math:`R^c(Z;U)-R(Z)+\lambda\lVert Z^+\rVert_1/N`.

    Added, with small weights, to the loss of a task. Z are the tokens between a layer's halves and :math:`Z^+` those
    after it, from :meth:`CRATE.forward_states`; rates are of tokens brought to length 1.
    Breaks: each step factors a matrix for every head and item, which costs more than the attention of small networks;
    and where tokens grow alike both rates fall, so a low value alone is no sign of structure.
    Source: catalogue entry ``crate``.

    Parameters
    ----------
    weights : sequence of float, default=(1.0,)
        One for each layer, >= 0; a layer of weight 0 costs nothing.
    eps2 : float, default=0.01
        Squared distortion.
    lambd : float, default=0.1
        Price of an entry, >= 0.

    Raises
    ------
    ValueError
        An argument is out of range, or there are not as many layers as weights.
    """

    def __init__(
        self,
        weights: Sequence[float | int] = (1.0,),
        eps2: float | int = 0.01,
        lambd: float | int = 0.1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_eps2(eps2)
        if not weights or any(not 0 <= w < math.inf for w in weights):
            raise ValueError(f"weights must be finite, at least 0 and one a layer, got {weights}")
        if not 0 <= lambd < math.inf:
            raise ValueError(f"lambd must be finite and at least 0, got {lambd}")
        self.weights, self.eps2, self.lambd = tuple(float(w) for w in weights), float(eps2), float(lambd)

    def forward(self, halves: Any, bases: Any, outputs: Any = None) -> Float[Tensor, "*batch"]:
        """Return the weighted sum over layers for each item, nats.

        ``halves`` (B, N, d) and ``bases`` (K, d, p), or a sequence of each, one a layer; ``outputs`` like ``halves``,
        left out where sparsity is not to be asked for.
        """
        if isinstance(halves, Tensor):
            halves, bases, outputs = [halves], [bases], None if outputs is None else [outputs]
        outputs = [None] * len(halves) if outputs is None else outputs
        if not len(halves) == len(bases) == len(outputs) == len(self.weights):
            raise ValueError(
                f"there must be as many halves, bases and outputs as weights, {len(self.weights)}, "
                f"got {len(halves)}, {len(bases)} and {len(outputs)}"
            )
        total = 0 * halves[0].sum(dim=(-1, -2))
        for weight, Z, U, out in zip(self.weights, halves, bases, outputs, strict=True):
            if weight:
                price = 0 if out is None else self.lambd * out.abs().sum(dim=-1).mean(dim=-1)
                total = total + weight * (within(Z, U, self.eps2) - tokens_rate(Z, self.eps2) + price)
        return total

    def of(self, model: Any, states: Any) -> Float[Tensor, "*batch"]:
        """Return the loss of a :class:`CRATE` from what its ``forward_states`` gave."""
        bases = [block.attention.bases for block in model.blocks]
        return self(states.halves, bases, states.outputs[1:])

    def extra_repr(self) -> str:
        return f"weights={self.weights}, eps2={self.eps2:g}, lambd={self.lambd:g}"
