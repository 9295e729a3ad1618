"""Make one expert of a group: averages, matching of hidden neurons, least squares from calibration, truncation."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from polyspan.linalg import PairedMoments, fix_signs, ridge_from_moments

from ._expert_capture import LayerInputs
from ._expert_layout import ExpertStack, stack_of
from ._expert_statistics import token_blocks

# Weight of an expert that no token chose, beside shares of tokens.
UNUSED = 1e-6
# Of the mean diagonal of a matrix of second moments.
RIDGE = 1e-3


class LowRank(NamedTuple):
    """A stack's maps as ``left @ right``: (k, out, r) and (k, r, in), by name of the map."""

    left: dict[str, Tensor]
    right: dict[str, Tensor]

    def dense(self, name: str) -> Tensor:
        return self.left[name] @ self.right[name]


def group_weights(frequencies: np.ndarray, members: Sequence[int]) -> Tensor:
    """Return the members' shares of use, which sum to 1; equal ones where none was used."""
    used = np.asarray(frequencies, dtype=np.float64)[list(members)]
    used = np.maximum(used, UNUSED) if used.any() else np.ones(len(used))
    return torch.from_numpy(used / used.sum())


def average(stack: ExpertStack, weights: Tensor) -> ExpertStack:
    """Return the weighted mean of a stack as a stack of one."""

    def mean(part: Tensor) -> Tensor:
        return torch.tensordot(weights.to(part.device, part.dtype), part, dims=1).unsqueeze(0)

    return stack.map(mean)


def match_neurons(stack: ExpertStack, reference: int) -> list[np.ndarray]:
    """Return, for each expert, which of its hidden neurons stands for each neuron of the reference.

    The matching makes the inner products of the neurons' weights, [gate | up | down] with their biases, largest in sum.
    """
    rows = [part for part in (stack.gate, stack.up, stack.down.mT) if part is not None]
    rows += [bias.unsqueeze(-1) for bias in (stack.gate_bias, stack.up_bias) if bias is not None]
    found = []
    for i in range(len(stack)):
        if i == reference:
            found.append(np.arange(stack.up.shape[1]))
            continue
        alike = sum((part[reference] @ part[i].mT for part in rows), torch.zeros((), device=stack.up.device))
        found.append(linear_sum_assignment(alike.double().cpu().numpy(), maximize=True)[1])
    return found


def match_activations(
    stack: ExpertStack, reference: int, inputs: LayerInputs, batch_tokens: int | None = None
) -> list[np.ndarray]:
    """Return the same as :func:`match_neurons`, by the correlations of hidden units over all tokens of the layer."""
    n, inner = stack.up.shape[:2]
    device = stack.up.device
    sums, squares = (torch.zeros(n, inner, dtype=torch.float64, device=device) for _ in range(2))
    cross = torch.zeros(n, inner, inner, dtype=torch.float64, device=device)
    for x, _ in token_blocks(inputs, stack, batch_tokens):
        hidden = stack.hidden(x).double()
        sums += hidden.sum(1)
        squares += hidden.square().sum(1)
        cross += hidden[reference].mT @ hidden
    m = len(inputs.x)
    means = sums / m
    spread = (squares / m - means.square()).clamp(min=0).sqrt()
    spread = torch.where(spread > 0, spread, 1)
    shared = cross / m - means[reference].unsqueeze(-1) * means.unsqueeze(1)
    alike = (shared / spread[reference].unsqueeze(-1) / spread.unsqueeze(1)).cpu().numpy()
    orders = [linear_sum_assignment(part, maximize=True)[1] for part in alike]
    orders[reference] = np.arange(inner)
    return orders


def permuted(stack: ExpertStack, orders: Sequence[np.ndarray]) -> ExpertStack:
    """Put each expert's hidden neurons in another order; what it computes stays the same."""
    index = torch.from_numpy(np.stack(orders)).to(stack.up.device)

    def rows(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        return part.gather(1, index if part.ndim == 2 else index.unsqueeze(-1).expand_as(part))

    up, down = rows(stack.up), rows(stack.down.mT)
    assert up is not None
    assert down is not None
    return replace(
        stack, gate=rows(stack.gate), up=up, down=down.mT, gate_bias=rows(stack.gate_bias), up_bias=rows(stack.up_bias)
    )


def input_gram(x: Tensor) -> Tensor:
    """Return the mean of x xᵀ over rows, in float64; zeros where there are none."""
    wide = x.double()
    return wide.mT @ wide / max(1, len(x))


def _routed(inputs: LayerInputs, expert: int, stack: ExpertStack) -> Tensor:
    return inputs.x[inputs.gates[:, expert] != 0].to(stack.up.device, stack.up.dtype)


def regression_mean(stack: ExpertStack, weights: Tensor, grams: Sequence[Tensor]) -> ExpertStack:
    r"""Average gate and up by :math:`(\sum_i f_i W_i C_i)(\sum_i f_i C_i)^{-1}`, C the Gram matrices of routed tokens.

    A ridge of 1e-3 of the mean diagonal draws towards the plain average, which remains where there are no tokens.
    """
    plain = average(stack, weights)
    normal = sum((w * C for w, C in zip(weights, grams, strict=True)), torch.zeros_like(grams[0]))
    ridge = RIDGE * normal.diagonal().mean()
    if float(ridge) == 0:
        return plain
    factor = torch.linalg.cholesky(normal + ridge * torch.eye(len(normal), dtype=normal.dtype, device=normal.device))

    def solved(part: Tensor, mean: Tensor) -> Tensor:
        right = sum(
            (w * W.double() @ C for w, W, C in zip(weights, part, grams, strict=True)), ridge * mean[0].double()
        )
        return torch.cholesky_solve(right.mT, factor).mT.to(part.dtype).unsqueeze(0)

    gate = None if stack.gate is None or plain.gate is None else solved(stack.gate, plain.gate)
    return replace(plain, gate=gate, up=solved(stack.up, plain.up))


def refit_down(
    merged: ExpertStack,
    stack: ExpertStack,
    members: Sequence[int],
    inputs: LayerInputs,
    *,
    batch_tokens: int | None = None,
    name: str = "",
) -> ExpertStack:
    r"""Fit the down map of a merged expert by least squares to what its members give together.

    Minimises :math:`\sum_x \lVert \sum_{i\in Q} G_i(x) E_i(x) - (\sum_{i\in Q} G_i(x)) W h(x) \rVert^2`, h the merged
    hidden units, with a ridge of 1e-3 of the mean diagonal towards the W that is there.

    Warns
    -----
    UserWarning
        Fewer tokens than hidden units reach the group.
    """
    own = stack.take(members)
    moments = PairedMoments(merged.up.shape[1], merged.down.shape[1], keep_cov_out=False)
    for x, gates in token_blocks(inputs, own, batch_tokens):
        chosen = gates[:, list(members)]
        reached = (chosen != 0).any(dim=1)
        if not reached.any():
            continue
        chosen, tokens = chosen[reached], x[reached]
        total = chosen.sum(1, keepdim=True)
        target = torch.einsum("mn,nmh->mh", chosen, own.outputs(tokens))
        hidden = merged.hidden(tokens)[0]
        moments.update(total * hidden, target - total * merged.outputs(tokens)[0])
    if moments.n_rows < merged.up.shape[1]:
        warnings.warn(
            f"{moments.n_rows} calibration tokens reach a group of {len(members)} experts of {name or 'a layer'} "
            f"with {merged.up.shape[1]} hidden units: the fit of its down map leans on the average; bring more tokens",
            UserWarning,
            stacklevel=2,
        )
    if not moments.n_rows:
        return merged
    plain = moments.uncentred()
    alpha = RIDGE * float(np.trace(plain.cov_in)) / len(plain.cov_in)
    step = torch.from_numpy(ridge_from_moments(plain, alpha=alpha, shift=False).weights)
    return replace(merged, down=merged.down + step.mT.to(merged.down).unsqueeze(0))


def low_rank(n_out: int, n_in: int, ratio: float) -> int:
    """Return the rank at which two factors hold ``1 - ratio`` of a matrix's numbers, at least 1."""
    return max(1, int((1 - ratio) * n_out * n_in / (n_out + n_in)))


def shared_directions(weights: Tensor, grams: Sequence[Tensor] | None, rank: int) -> Tensor:
    r"""Return the leading left singular vectors (out, r) of :math:`[W_1 S_1 \dots W_n S_n]`, :math:`S S^\top = C`.

    They are eigenvectors of :math:`\sum_i W_i C_i W_i^\top`, so neither the wide matrix nor S is made; without Gram
    matrices S is the identity.
    """
    wide = weights.double()
    if grams is None:
        outer = sum((W @ W.mT for W in wide), torch.zeros((), dtype=wide.dtype, device=wide.device))
    else:
        outer = sum(
            (W @ C @ W.mT for W, C in zip(wide, grams, strict=True)),
            torch.zeros((), dtype=wide.dtype, device=wide.device),
        )
    return fix_signs(torch.linalg.eigh(outer)[1].flip(-1)[:, :rank])


def truncate(
    merged: ExpertStack, own: ExpertStack, ratio: float, grams: Mapping[str, Sequence[Tensor]] | None
) -> tuple[ExpertStack, LowRank]:
    """Project each map of a merged expert on the directions that its members share, and return the factors as well."""
    left, right = {}, {}
    for name in ("gate", "up", "down"):
        if name not in merged.parts:
            continue
        weight = merged.parts[name][0]
        rank = low_rank(*weight.shape, ratio)
        U = shared_directions(own.parts[name], None if grams is None else grams[name], rank)
        left[name] = U.to(weight.dtype).unsqueeze(0)
        right[name] = (U.mT @ weight.double()).to(weight.dtype).unsqueeze(0)
    factors = LowRank(left, right)
    return replace(merged, **{name: factors.dense(name) for name in left}), factors


def merge_group(
    stack: ExpertStack,
    members: Sequence[int],
    frequencies: np.ndarray,
    inputs: LayerInputs | None,
    *,
    combine: str = "average",
    align: str | None = None,
    refit: str | None = None,
    intra_ratio: float = 0.0,
    whiten: bool = True,
    batch_tokens: int | None = None,
    name: str = "",
) -> tuple[ExpertStack, LowRank | None]:
    """Return the expert (a stack of one) that stands for a group; a group of one stays as it is unless truncated."""
    own = stack.take(members)
    weights = group_weights(frequencies, members)
    needs = intra_ratio > 0 and whiten
    grams = None
    if inputs is not None and (needs or (refit == "regmean" and len(members) > 1)):
        grams = [_ridged(input_gram(_routed(inputs, i, stack))) for i in members]
    if len(members) == 1 or combine == "keep":
        merged = own.take([int(weights.argmax())])
    else:
        first = int(weights.argmax())
        if align == "permutation":
            own = permuted(own, match_neurons(own, first))
        elif align == "activation":
            assert inputs is not None
            own = permuted(own, match_activations(own, first, inputs, batch_tokens))
        if refit == "regmean":
            assert grams is not None
            merged = regression_mean(own, weights, grams)
        else:
            merged = average(own, weights)
    factors = None
    if intra_ratio > 0:
        whitened: dict[str, Sequence[Tensor]] | None = None
        if needs:
            assert inputs is not None
            assert grams is not None
            hidden = [_hidden_gram(own, i, _routed(inputs, j, stack)) for i, j in enumerate(members)]
            whitened = {"gate": grams, "up": grams, "down": hidden}
        merged, factors = truncate(merged, own, intra_ratio, whitened)
    if refit == "down" and len(members) > 1:
        assert inputs is not None
        merged = refit_down(merged, stack, members, inputs, batch_tokens=batch_tokens, name=name)
        if factors is not None:
            U = factors.left["down"]
            right = {**factors.right, "down": U.mT @ merged.down}
            factors = LowRank(factors.left, right)
            merged = replace(merged, down=factors.dense("down"))
    return merged, factors


def _hidden_gram(own: ExpertStack, i: int, x: Tensor) -> Tensor:
    return _ridged(input_gram(own.take([i]).hidden(x)[0]))


def _ridged(gram: Tensor) -> Tensor:
    """Keep a Gram matrix positive definite, as its Cholesky factor needs; that of no tokens becomes the identity."""
    mean = gram.diagonal().mean()
    if float(mean) == 0:
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return gram + RIDGE * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def join_groups(found: Sequence[tuple[ExpertStack, LowRank | None]]) -> tuple[ExpertStack, LowRank | None]:
    """Put the experts of all groups behind one another."""
    stack = stack_of([one for one, _ in found])
    factors = [factors for _, factors in found if factors is not None]
    if not factors:
        return stack, None
    joined = [
        {name: torch.cat([getattr(f, side)[name] for f in factors]) for name in factors[0].left}
        for side in ("left", "right")
    ]
    return stack, LowRank(*joined)
