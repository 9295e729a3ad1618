"""Statistics of one layer's experts over calibration tokens, in blocks: similarity, usage, output norms, means."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._expert_capture import LayerInputs
from ._expert_layout import ExpertStack

FIELDS = ("gram", "counts", "norms", "gated_norms", "mean_gram", "logit_gram", "weight_gram")
BLOCK_BYTES = {"cpu": 2**24, "cuda": 2**29}


@dataclass(frozen=True)
class ExpertStatistics:
    r"""What clustering and pruning need of a layer with n experts, over m tokens.

    Attributes
    ----------
    n_tokens : int
    gram : ndarray of shape (n, n)
        :math:`\frac1m \sum_l \cos(E_i(x_l), E_j(x_l))`; the cosine with an output of zeros is 0.
    counts : ndarray of shape (n,)
        Tokens that chose each expert.
    norms, gated_norms : ndarray of shape (n,)
        Mean over those tokens of the output's norm, and of the router's weight times it; 0 where there are none.
    mean_gram : ndarray of shape (n, n)
        Inner products of the experts' mean outputs over all tokens.
    logit_gram : ndarray of shape (n, n)
        Cosines between the experts' router logits over the tokens; zeros where the router is not known.
    weight_gram : ndarray of shape (n, n)
        Cosines between the experts' weights.
    """

    n_tokens: int
    gram: np.ndarray
    counts: np.ndarray
    norms: np.ndarray
    gated_norms: np.ndarray
    mean_gram: np.ndarray
    logit_gram: np.ndarray
    weight_gram: np.ndarray

    @property
    def frequencies(self) -> np.ndarray:
        """Share of the tokens that chose each expert; they sum to the experts a token."""
        return self.counts / self.n_tokens

    def members(self) -> dict[str, np.ndarray]:
        """Return arrays to be kept in a file; :meth:`from_members` reads them."""
        return {"n_tokens": np.array([self.n_tokens]), **{name: getattr(self, name) for name in FIELDS}}

    @classmethod
    def from_members(cls, members: dict[str, np.ndarray]) -> "ExpertStatistics":
        return cls(int(members["n_tokens"][0]), **{name: members[name] for name in FIELDS})


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which experts are run: half precisions widen to float32."""
    return torch.promote_types(dtype, torch.float32)


def token_blocks(inputs: LayerInputs, stack: ExpertStack, batch_tokens: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of tokens and gates on the experts' device, in their dtype.

    Where ``batch_tokens`` is not given, outputs of all experts on a block take about 16 MiB; on a GPU, with their
    hidden units, 512 MiB.
    """
    if batch_tokens is None:
        kind = stack.up.device.type
        wide = stack.up.shape[2] if kind == "cpu" else 3 * stack.up.shape[1] + stack.up.shape[2]
        budget = BLOCK_BYTES.get(kind, BLOCK_BYTES["cuda"])
        batch_tokens = max(64, min(4096, budget // (len(stack) * wide * stack.up.dtype.itemsize)))
    for x, gates in zip(inputs.x.split(batch_tokens), inputs.gates.split(batch_tokens), strict=True):
        yield x.to(stack.up.device, stack.up.dtype), gates.to(stack.up.device, stack.up.dtype)


@torch.no_grad()
def expert_statistics(
    stack: ExpertStack, inputs: LayerInputs, router: Tensor | None = None, *, batch_tokens: int | None = None
) -> ExpertStatistics:
    """Run every expert on every token, block by block, and keep sums only: memory is that of one block.

    Parameters
    ----------
    stack : ExpertStack
        In float32 or wider.
    inputs : LayerInputs
    router : Tensor of shape (n, H), optional
        The router's weight, for the similarity of logits.
    batch_tokens : int, optional
        Tokens a block.

    Raises
    ------
    ValueError
        An expert's output is not finite.
    """
    n, m = len(stack), len(inputs.x)
    sums: dict[str, Any] = {name: torch.zeros(n, n, dtype=torch.float64) for name in ("gram", "logits")}
    means = torch.zeros(n, stack.down.shape[1], dtype=torch.float64)
    counts, norms, gated = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
    for x, gates in token_blocks(inputs, stack, batch_tokens):
        out = stack.outputs(x)
        sizes = torch.linalg.vector_norm(out, dim=-1)
        if not torch.isfinite(sizes).all():
            j = int((~torch.isfinite(sizes)).any(dim=1).nonzero()[0])
            raise ValueError(f"experts must give finite outputs on the calibration tokens, got others from expert {j}")
        chosen = (gates != 0).mT
        counts += chosen.sum(1).cpu()
        norms += (sizes * chosen).sum(1, dtype=torch.float64).cpu()
        gated += (sizes * gates.mT.abs()).sum(1, dtype=torch.float64).cpu()
        means += out.sum(1).double().cpu()
        # Divide in place: a second block of outputs would be the largest thing there is.
        rows = out.div_(torch.where(sizes > 0, sizes, 1).unsqueeze(-1)).flatten(1)
        sums["gram"] += (rows @ rows.mT).double().cpu()
        if router is not None:
            logits = x.double() @ router.to(x.device, torch.float64).mT
            sums["logits"] += (logits.mT @ logits).cpu()
    used = torch.where(counts > 0, counts, 1)
    means /= m
    weights = torch.zeros(n, n, dtype=torch.float64)
    for part in stack.parts.values():
        flat = part.flatten(1)
        weights += (flat @ flat.mT).double().cpu()
    return ExpertStatistics(
        m,
        *(np.asarray(part) for part in (
            _symmetric(sums["gram"] / m), counts, norms / used, gated / used, _symmetric(means @ means.mT),
            _cosines(sums["logits"]), _cosines(weights),
        )),
    )  # fmt: skip


def _symmetric(gram: Tensor) -> Tensor:
    return (gram + gram.mT) / 2


def _cosines(gram: Tensor) -> Tensor:
    sizes = gram.diagonal().clamp(min=0).sqrt()
    sizes = torch.where(sizes > 0, sizes, 1)
    return _symmetric(gram / sizes / sizes.unsqueeze(1))
