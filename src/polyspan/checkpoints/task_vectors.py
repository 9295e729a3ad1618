"""Differences between fine-tuned checkpoints and their base, and the ways to add them up without data."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyspan.run import torch_generator

from ._magnitude_rank import largest_share
from ._merge_states import (
    as_state,
    as_states,
    is_statistic,
    mergeable,
    one_thread,
    row_blocks,
    rows_of,
    shape_of,
)

# Changes of one block of rows, a task each, made anew at each call.
Deltas = Callable[[], Iterator[Tensor]]
# From a name to the merged change of its tensor, block by block.
Rule = Callable[[str], Iterator[Tensor]]


class TaskVector:
    r"""What fine-tuning changed: :math:`\tau = \theta - \theta_0` for each named float tensor, to be added elsewhere.

    Task vectors of one base can be added, subtracted and scaled. Integers are left out, running means and variances of
    batch normalisation too: they are no weights, and half of such a difference means nothing. The base must be the
    checkpoint that was fine-tuned; the difference to another one is noise as long as the weights.
    Source: catalogue entry ``concrete-merging``.

    Parameters
    ----------
    base, finetuned : module, mapping of str to Tensor, or path
        A path is a .safetensors file, a folder of them, or (``finetuned`` only) the folder of a LoRA or Tucker
        adapter of PEFT.
    ignore_keys : sequence of str
        Names, or patterns such as ``"*.embed_tokens.*"``, that take no part.

    Attributes
    ----------
    tensors : dict of str to Tensor
        In float32, or float64 where the base is.
    skipped : list of str
        Names of the base that are in no task vector.

    Raises
    ------
    ValueError
        Names or shapes differ; the first ten are listed.
    """

    def __init__(self, base: Any, finetuned: Any, *, ignore_keys: Sequence[str] = ()):
        start = as_state(base, name="base")
        end = as_state(finetuned, start)
        names = [name for name in mergeable(start, {"": end}, ignore_keys) if not is_statistic(name)]
        self.tensors = {name: _delta(start[name], end[name]) for name in names}
        self.skipped = [name for name in start if name not in self.tensors]

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], skipped: list[str]) -> "TaskVector":
        made = cls.__new__(cls)
        made.tensors, made.skipped = tensors, skipped
        return made

    def __add__(self, other: "TaskVector") -> "TaskVector":
        if self.tensors.keys() != other.tensors.keys():
            differ = sorted(self.tensors.keys() ^ other.tensors.keys())
            raise ValueError(f"task vectors must have the same names, got {', '.join(differ[:10])} in one only")
        return self._of({name: t + other.tensors[name] for name, t in self.tensors.items()}, self.skipped)

    def __mul__(self, factor: float | int) -> "TaskVector":
        return self._of({name: t * factor for name, t in self.tensors.items()}, self.skipped)

    __rmul__ = __mul__

    def __neg__(self) -> "TaskVector":
        return self * -1

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        return self + -other

    def norm(self) -> float:
        """Return the length of all tensors as one vector."""
        return math.sqrt(sum(float(t.double().square().sum()) for t in self.tensors.values()))

    def cosine(self, other: "TaskVector") -> float:
        """Return the cosine with another task vector: near 0 where the tasks changed other weights; 0 if one is 0."""
        inner = sum(float((t.double() * other.tensors[name].double()).sum()) for name, t in self.tensors.items())
        return inner / ((self.norm() * other.norm()) or 1.0)

    def apply_to(self, base: Any, scaling: float | int = 1.0) -> dict[str, Tensor]:
        """Return base + scaling · tau as new tensors in the base's dtype; a scaling below 0 forgets the task.

        Raises
        ------
        ValueError
            The base lacks a name of the task vector, or has another shape.
        """
        state = as_state(base, name="base")
        wrong = [n for n, t in self.tensors.items() if n not in state or state[n].shape != t.shape]
        if wrong:
            raise ValueError(f"base must have the tensors of the task vector, got none of that shape for {wrong[:10]}")
        return {
            name: _moved(value, scaling * self.tensors[name]) if name in self.tensors else value.detach().clone()
            for name, value in state.items()
        }


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _delta(start: Tensor, end: Tensor) -> Tensor:
    wide = _wide(start.dtype)
    return end.detach().to(start.device, wide) - start.detach().to(wide)


def _moved(start: Tensor, change: Tensor) -> Tensor:
    """Return start + change in start's dtype, added in float32 at least, in the memory of ``change``."""
    return change.to(start.device).add_(start.detach()).to(start.dtype)


def task_arithmetic(
    base: Any,
    finetuned: Any,
    *,
    scaling: float | int = 0.3,
    weights: Sequence[float | int] | None = None,
    mask: Mapping[str, Tensor] | None = None,
    ignore_keys: Sequence[str] = (),
) -> dict[str, Tensor]:
    r"""Merge by adding task vectors: :math:`\theta_0 + s \sum_i w_i \tau_i`; needs no data.

    With ``scaling=1/T`` it is the plain average. Breaks where tasks pull the same weights in opposite directions.
    Running means and variances are averaged, integers are the base's.
    Source: catalogue entry ``concrete-merging``.

    Parameters
    ----------
    base : module, mapping of str to Tensor, or path
    finetuned : mapping of str to checkpoint, or sequence of checkpoints
        T of them; each what ``base`` may be, or the folder of a LoRA or Tucker adapter.
    scaling : float, default=0.3
    weights : sequence of T floats, optional
        One a task; 1 each where not given.
    mask : mapping of str to Tensor, optional
        Entries in [0, 1] for each changed tensor, such as ``ConcreteMerger.mask_``; changes are multiplied by
        mask / mean(mask), the mean over one tensor.
    ignore_keys : sequence of str
        Names or patterns whose tensors stay the base's.

    Returns
    -------
    dict of str to Tensor
        New tensors in the base's dtypes; nothing given is changed.

    Raises
    ------
    ValueError
        Names or shapes differ, there is no checkpoint, or there are not T weights.
    """
    return _merge(base, finetuned, "task_arithmetic", ignore_keys, scaling=scaling, weights=weights, mask=mask)


def ties(
    base: Any,
    finetuned: Any,
    *,
    density: float | int = 0.2,
    scaling: float | int = 0.3,
    reduction: str = "sum",
    scope: str = "model",
    weights: Sequence[float | int] | None = None,
    ignore_keys: Sequence[str] = (),
) -> dict[str, Tensor]:
    r"""Merge by TIES: trim small changes, elect a sign an entry, and add up the changes that agree with it.

    The share ``density`` of each task's entries that is largest in magnitude stays (entries equal to the smallest of
    them too). The elected sign is that of the sum; where the sum is 0 it is the sign of the majority of all entries.
    One threshold for the whole model can empty small tensors altogether: ``scope="tensor"`` has one for each.
    Source: catalogue entry ``concrete-merging``.

    Parameters
    ----------
    base, finetuned, weights, ignore_keys
        As in :func:`task_arithmetic`; weights multiply before signs are elected.
    density : float in (0, 1], default=0.2
    scaling : float, default=0.3
        With "mean" values about 1 are usual.
    reduction : {"sum", "mean"}, default="sum"
        Of the changes that agree and are not trimmed.
    scope : {"model", "tensor"}, default="model"

    Returns
    -------
    dict of str to Tensor

    Raises
    ------
    ValueError
        As :func:`task_arithmetic`, or an option is none of those named.
    """
    options = {"density": density, "scaling": scaling, "reduction": reduction, "scope": scope, "weights": weights}
    return _merge(base, finetuned, "ties", ignore_keys, **options)


def dare(
    base: Any,
    finetuned: Any,
    *,
    density: float | int = 0.5,
    scaling: float | int = 0.3,
    rescale: bool = True,
    elect: bool = False,
    weights: Sequence[float | int] | None = None,
    seed: int = 0,
    ignore_keys: Sequence[str] = (),
) -> dict[str, Tensor]:
    r"""Merge by DARE: drop changes at random, divide the rest by the share kept, and add up.

    Each task and tensor has a generator of its own, seeded by their names: the order of tensors does not matter. The
    expectation is task arithmetic; at low density the result is noise where changes are few and large.
    Source: catalogue entry ``concrete-merging``.

    Parameters
    ----------
    base, finetuned, scaling, weights, ignore_keys
        As in :func:`task_arithmetic`.
    density : float in (0, 1], default=0.5
        Probability with which an entry is kept.
    rescale : bool, default=True
        Divide what is kept by ``density``.
    elect : bool, default=False
        Elect signs after dropping, as TIES does; the majority is then that of the tensor.
    seed : int, default=0

    Returns
    -------
    dict of str to Tensor

    Raises
    ------
    ValueError
        As :func:`task_arithmetic`, or density is outside (0, 1].
    """
    options = {"density": density, "scaling": scaling, "rescale": rescale, "elect": elect, "seed": seed}
    return _merge(base, finetuned, "dare", ignore_keys, **options, weights=weights)


def _merge(base: Any, finetuned: Any, method: str, ignore_keys: Sequence[str], **options: Any) -> dict[str, Tensor]:
    start = as_state(base, name="base")
    states = as_states(finetuned, start)
    names = mergeable(start, states, ignore_keys)
    rule = merge_rule(method, start, states, names, **options)
    merged = set(names)
    found = {}
    for name in start:
        out = torch.empty_like(start[name].detach(), memory_format=torch.contiguous_format)
        rows = out if out.ndim else out.view(1)
        blocks = merged_blocks(name, start, states, rule, name in merged)
        for (lo, hi), block in zip(row_blocks(tuple(out.shape)), blocks, strict=True):
            rows[lo:hi] = block
        found[name] = out
    return found


def merged_blocks(
    name: str, base: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]], rule: Rule, merged: bool
) -> Iterator[Tensor]:
    """Yield one tensor of the result in blocks of rows, in the base's dtype; in memory are a few blocks."""
    spans = list(row_blocks(shape_of(base, name)))
    if not merged:
        yield from (rows_of(base, name, *span) for span in spans)
    elif is_statistic(name):
        for span in spans:
            start = rows_of(base, name, *span)
            total = torch.zeros_like(start, dtype=_wide(start.dtype))
            for state in states.values():
                total += rows_of(state, name, *span).to(total.device, total.dtype)
            yield (total / len(states)).to(start.dtype)
    else:
        for span, change in zip(spans, rule(name), strict=True):
            yield _moved(rows_of(base, name, *span), change)


def merge_rule(
    method: str,
    base: Mapping[str, Tensor],
    states: Mapping[str, Mapping[str, Tensor]],
    names: Sequence[str],
    *,
    scaling: float | int = 0.3,
    weights: Sequence[float | int] | None = None,
    density: float | int = 1.0,
    reduction: str = "sum",
    scope: str = "model",
    rescale: bool = True,
    elect: bool = False,
    seed: int = 0,
    mask: Mapping[str, Tensor] | None = None,
    limits: Sequence[float] | None = None,
    majority: float | None = None,
) -> Rule:
    """Return the rule of a method: the change of a named tensor from the changes of all tasks, one read at a time.

    What TIES must know of the whole model, ``limits`` and ``majority``, is found when it is needed, unless it is given.
    """
    if not isinstance(scaling, float | int) or not math.isfinite(scaling):
        raise ValueError(f"scaling must be a finite number, got {scaling!r}")
    if not isinstance(density, float | int) or not 0 < density <= 1:
        raise ValueError(f"density must be a share in (0, 1], got {density!r}")
    w = [1.0] * len(states) if weights is None else [float(v) for v in weights]
    if len(w) != len(states) or not all(map(math.isfinite, w)):
        raise ValueError(f"weights must be {len(states)} finite numbers, one a checkpoint, got {weights!r}")

    def blocks(name: str) -> Iterator[Deltas]:
        return _blocks(name, base, states)

    if method == "task_arithmetic":
        factors = [scaling * v for v in w]
        if mask is not None:
            return _masked_rule(mask, base, names, blocks, factors)
        return lambda name: (_weighted_sum(deltas, factors) for deltas in blocks(name))
    if method == "dare":
        return _dare_rule(list(states), blocks, w, scaling, float(density), rescale, elect, seed)
    if method != "ties":
        raise ValueError(f"method must be 'task_arithmetic', 'ties' or 'dare', got {method!r}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    if scope not in ("model", "tensor"):
        raise ValueError(f"scope must be 'model' or 'tensor', got {scope!r}")
    trimmed = Trimmed(base, states, names, w, float(density), scope, limits)
    sign = _Majority(trimmed.sums, majority)
    return lambda name: (_agreeing(deltas, sign, reduction).mul_(scaling) for deltas in trimmed(name))


def _blocks(name: str, base: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Deltas]:
    for span in row_blocks(shape_of(base, name)):
        yield lambda span=span: (
            _delta(rows_of(base, name, *span), rows_of(state, name, *span)) for state in states.values()
        )


def changes(name: str, base: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield one task's change of a tensor in blocks of rows."""
    for span in row_blocks(shape_of(base, name)):
        yield _delta(rows_of(base, name, *span), rows_of(state, name, *span))


class Trimmed:
    """The changes that TIES adds up, by name of a tensor: small ones are 0, and all are weighted.

    Parameters
    ----------
    names : sequence of str
        Tensors that limits of the whole model, and signs of the majority, are found in.
    limits : sequence of float, optional
        Magnitude that a change must reach, a task each, for ``scope="model"``; found at first use where not given.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Tensor]],
        names: Sequence[str],
        weights: Sequence[float],
        density: float,
        scope: str,
        limits: Sequence[float] | None = None,
    ):
        self.base, self.states, self.weights, self.density, self.scope = base, states, weights, density, scope
        self.names = [name for name in names if not is_statistic(name)]
        self.limits = limits

    def _limits_of(self, among: Sequence[str]) -> list[float]:
        return [
            largest_share(lambda s=state: (b for name in among for b in changes(name, self.base, s)), self.density)
            for state in self.states.values()
        ]

    def __call__(self, name: str) -> Iterator[Deltas]:
        limits = None
        if self.density < 1 and self.scope == "tensor":
            limits = self._limits_of([name])
        elif self.density < 1:
            limits = self.limits = self._limits_of(self.names) if self.limits is None else self.limits

        def kept(deltas: Deltas) -> Iterator[Tensor]:
            for i, (delta, weight) in enumerate(zip(deltas(), self.weights, strict=True)):
                if limits is not None:
                    delta.masked_fill_(delta.float().abs() < limits[i], 0)
                yield delta if weight == 1 else delta.mul_(weight)

        for deltas in _blocks(name, self.base, self.states):
            yield lambda deltas=deltas: kept(deltas)

    def sums(self) -> Iterator[Tensor]:
        """Yield the sum over tasks, block by block, of all tensors."""
        ones = [1.0] * len(self.weights)
        return (_weighted_sum(deltas, ones) for name in self.names for deltas in self(name))


def _masked_rule(
    mask: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    names: Sequence[str],
    blocks: Callable[[str], Iterator[Deltas]],
    weights: Sequence[float],
) -> Rule:
    wrong = [n for n in names if not is_statistic(n) and (n not in mask or shape_of(mask, n) != shape_of(base, n))]
    if wrong:
        raise ValueError(f"mask must have an entry for each number of the base, got none for {', '.join(wrong[:10])}")

    def rule(name: str) -> Iterator[Tensor]:
        whole = mask[name]
        with one_thread():
            weight = rescaled(whole.to(_wide(whole.dtype)))
        weight = weight if weight.ndim else weight.reshape(1)
        for (lo, hi), deltas in zip(row_blocks(tuple(whole.shape)), blocks(name), strict=True):
            total = _weighted_sum(deltas, weights)
            yield total.mul_(weight[lo:hi].to(total.device, total.dtype))

    return rule


def rescaled(mask: Tensor) -> Tensor:
    """Return mask / mean(mask), so that the mask changes where, not how much; a mask of zeros stays one."""
    mean = mask.mean()
    return mask / torch.where(mean > 0, mean, 1)


class _Majority:
    """Sign of the majority of all elected signs; found only when an entry has no sign of its own, or given."""

    def __init__(self, sums: Callable[[], Iterator[Tensor]], sign: float | None = None):
        self._sums, self._sign = sums, sign

    def sign(self) -> float:
        if self._sign is None:
            self._sign = majority_sign(sign_votes(self._sums()))
        return self._sign


def sign_votes(sums: Iterator[Tensor]) -> int:
    """Return how many entries are above 0 less how many are below."""
    return sum(int(torch.sign(s).sum()) for s in sums)


def majority_sign(votes: int) -> float:
    return float(votes > 0) - float(votes < 0)


def _weighted_sum(deltas: Deltas, weights: Sequence[float]) -> Tensor:
    total = None
    for w, delta in zip(weights, deltas(), strict=True):
        total = delta.mul_(w) if total is None else total.add_(delta, alpha=w)
    assert total is not None
    return total


def _agreeing(deltas: Deltas, majority: _Majority, reduction: str) -> Tensor:
    """Add up the changes whose sign is the elected one; changes are made twice rather than kept."""
    elected = some = None
    for delta in deltas():
        if elected is None or some is None:
            elected, some = delta, delta != 0
        else:
            elected.add_(delta)
            some.logical_or_(delta != 0)
    assert elected is not None
    assert some is not None
    elected.sign_()
    undecided = some.logical_and_(elected == 0)
    if bool(undecided.any()):
        elected[undecided] = majority.sign()
    total = torch.zeros_like(elected)
    count = torch.zeros_like(elected) if reduction == "mean" else None
    for delta in deltas():
        differs = delta * elected <= 0
        total.add_(delta.masked_fill_(differs, 0))
        if count is not None:
            count.add_(differs.logical_not_())
    return total if count is None else total.div_(count.clamp_(min=1))


def _dare_rule(
    tasks: list[str],
    blocks: Callable[[str], Iterator[Deltas]],
    weights: list[float],
    scaling: float | int,
    density: float,
    rescale: bool,
    elect: bool,
    seed: int,
) -> Rule:
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    factors = [w / density if rescale else w for w in weights]

    def dropped(name: str) -> Iterator[Deltas]:
        """Blocks with entries dropped; each task draws from a generator of its own, row after row."""
        digests = [hashlib.sha256(f"{seed}/{task}/{name}".encode()).digest() for task in tasks]
        generators = [torch_generator(int.from_bytes(digest[:7], "big")) for digest in digests]
        for deltas in blocks(name):
            drops: list[Tensor] = []

            def made(deltas: Deltas = deltas, drops: list[Tensor] = drops) -> Iterator[Tensor]:
                for i, delta in enumerate(deltas()):
                    if i == len(drops):
                        # Signs are elected in two passes over the same draws.
                        drops.append(torch.rand(delta.shape, generator=generators[i]) >= density)
                    yield delta.masked_fill_(drops[i].to(delta.device), 0).mul_(factors[i])

            yield made

    ones = [1.0] * len(tasks)
    if not elect:
        return lambda name: (_weighted_sum(deltas, [float(scaling)] * len(tasks)) for deltas in dropped(name))

    def rule(name: str) -> Iterator[Tensor]:
        majority = _Majority(lambda: (_weighted_sum(deltas, ones) for deltas in dropped(name)))
        for deltas in dropped(name):
            yield _agreeing(deltas, majority, "sum").mul_(scaling)

    return rule
