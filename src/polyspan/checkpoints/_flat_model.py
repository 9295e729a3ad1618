"""A network whose weights lie in one vector, so that masks, merges and their gradients are a few passes over memory."""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ._merge_states import as_states, is_statistic, mergeable

LABELS = ("labels", "label")
PIECE = 2**16
"""Entries of a vector that stay in the processor's cache from one operation to the next."""


class FlatModel:
    """A copy of the base in evaluation mode; ``theta`` are its merged weights, whose gradient ``leaves`` collect.

    ``base`` and ``theta`` are (P,). ``tau`` is (T, P), or (1, P) with the sum over tasks where ``summed``. ``leaves``
    are views of ``theta`` by name, and have a ``grad`` after a backward pass, which :meth:`forget` drops.
    """

    def __init__(
        self,
        base: nn.Module,
        finetuned: Any,
        ignore_keys: Sequence[str] = (),
        *,
        summed: bool = False,
        device: Any = None,
    ):
        state = base.state_dict()
        states = as_states(finetuned, state)
        self.tasks = list(states)
        self.aliases = _aliases(base)
        merged = mergeable(state, states, [*ignore_keys, *self.aliases])
        self.names = [name for name in merged if not is_statistic(name)]
        if not self.names:
            raise ValueError("base must have float tensors that are not in ignore_keys, got none")
        self.skipped = [name for name in state if name not in self.names and name not in self.aliases]
        dtype = torch.promote_types(max((state[n].dtype for n in self.names), key=lambda d: d.itemsize), torch.float32)
        device = state[self.names[0]].device if device is None else torch.device(device)
        self.dtypes = {name: value.dtype for name, value in state.items()}
        self.sizes = [state[name].numel() for name in self.names]
        ends = list(itertools.accumulate(self.sizes))
        self.slices = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        self.shapes = [state[name].shape for name in self.names]

        def flat(source: Mapping[str, Tensor]) -> Tensor:
            return torch.cat([source[name].detach().to(device, dtype).flatten() for name in self.names])

        self.base = flat(state)
        self.tau = torch.zeros(1 if summed else len(states), len(self.base), dtype=dtype, device=device)
        for i, source in enumerate(states.values()):
            for name, part in zip(self.names, self.slices, strict=True):
                self._add_change(0 if summed else i, part, source[name].detach().to(device, dtype).flatten())
        self.fixed = {name: state[name].detach().to(device, copy=True) for name in self.skipped}
        for name in self.skipped:
            if is_statistic(name) and name in merged:
                self.fixed[name] = torch.stack([s[name].detach().to(device, dtype) for s in states.values()]).mean(0)
        for name, value in self.fixed.items():
            self.fixed[name] = value.to(dtype) if value.is_floating_point() else value
        self.module = copy.deepcopy(base).to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.theta = self.base.clone()
        self.leaves = {
            name: self.theta[part].view(shape).detach().requires_grad_()
            for name, part, shape in zip(self.names, self.slices, self.shapes, strict=True)
        }
        self._means: list[Tensor] = []

    def _add_change(self, row: int, part: slice, value: Tensor) -> None:
        """Add what a checkpoint changes of one tensor to a task vector."""
        for piece in pieces(part, self.tau):
            new = value[piece.start - part.start : piece.stop - part.start]
            self.tau[row, piece].add_(new - self.base[piece])

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network at ``theta``; the backward pass adds to the gradients of ``leaves``."""
        return functional_call(self.module, {**self.leaves, **self.fixed}, args, kwargs)

    def forget(self) -> None:
        """Drop all gradients: the next backward pass then leaves its own where they are, and adds nothing up."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def _gradient(self, k: int) -> Tensor:
        """Return the gradient of one tensor, flat; it is 0 where the network does not use it."""
        leaf = self.leaves[self.names[k]]
        return (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).flatten()

    def not_finite(self) -> str | None:
        """Return the name of the first tensor of the base or of a fine-tuned checkpoint with NaN or infinity."""
        parts = zip(self.names, self.slices, strict=True)
        return next(
            (name for name, part in parts if not bool((self.base[part] + self.tau[:, part].sum(0)).isfinite().all())),
            next((name for name, value in self.fixed.items() if not bool(value.isfinite().all())), None),
        )

    def alike(self, batches: Mapping[str, Any]) -> dict[str, Any]:
        """Return batches with tensors under the name of the network's first argument, where others come with names."""
        if not any(isinstance(batch, Mapping) for batch in batches.values()):
            return dict(batches)
        name = next(iter(inspect.signature(self.module.forward).parameters), None)
        return {
            task: {name: batch} if isinstance(batch, Tensor) and name is not None else batch
            for task, batch in batches.items()
        }

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Return a vector (P,) as new tensors by name, in its own dtype."""
        return {
            name: flat[part].view(shape).clone()
            for name, part, shape in zip(self.names, self.slices, self.shapes, strict=True)
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return the network at ``theta`` as new tensors, in the dtypes and under all names of the base."""
        made = {name: value.to(self.dtypes[name], copy=True) for name, value in self.named(self.theta).items()}
        made |= {name: value.to(self.dtypes[name], copy=True) for name, value in self.fixed.items()}
        return {name: made[self.aliases.get(name, name)] for name in self.dtypes}

    @torch.no_grad()
    def merge(self, weights: Tensor, mask: Tensor | None = None) -> None:
        """Set theta = base + Σ w_i tau_i mask / mean(mask); ``weights`` (rows of tau, tensors), the mean a tensor's.

        The means are kept for the gradients, which are those at the mask of the last merge.
        """
        self._means = [] if mask is None else [_mean(mask[part]) for part in self.slices]
        for k, part in enumerate(self.slices):
            change, scale = self._change(k, part, weights)
            if mask is not None:
                scale = scale / self._means[k]
            for piece in pieces(part, self.theta):
                made, tau = self.theta[piece], change[piece.start - part.start : piece.stop - part.start]
                if mask is not None:
                    tau = torch.mul(tau, mask[piece], out=made)
                torch.addcmul(self.base[piece], tau, scale, out=made)

    def _change(self, k: int, part: slice, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return a vector and a number whose product is the weighted sum of the task vectors of one tensor."""
        if len(self.tau) == 1:
            return self.tau[0, part], weights[0, k]
        return torch.mv(self.tau[:, part].T, weights[:, k]), torch.ones_like(weights[0, k])

    @torch.no_grad()
    def mask_gradient(self, weights: Tensor, mask: Tensor, temperature: float, out: Tensor) -> Tensor:
        r"""Gradient of the loss, whose gradient g in theta the leaves hold, in the logits x of the mask.

        With S = Σ w tau, N entries and mean μ, θ = θ_0 + S m / μ gives
        ∂L/∂m = (g S - Σ(g S m) / (N μ)) / μ, and m = sigmoid((noise + x) / λ) gives ∂m/∂x = m (1 - m) / λ.
        """
        for k, part in enumerate(self.slices):
            change, scale = self._change(k, part, weights)
            g, mean, shares = self._gradient(k), self._means[k], []
            for piece in pieces(part, out):
                own = slice(piece.start - part.start, piece.stop - part.start)
                shares.append(torch.dot(torch.mul(change[own], g[own], out=out[piece]), mask[piece]))
            if not shares:
                continue
            shift = torch.stack(shares).sum() / ((part.stop - part.start) * mean)
            scale = scale / (mean * temperature)
            for piece in pieces(part, out):
                made = out[piece].sub_(shift)
                torch.ops.aten.sigmoid_backward.grad_input(made, mask[piece], grad_input=made).mul_(scale)
        return out

    @torch.no_grad()
    def weight_gradient(self, mask: Tensor | None, out: Tensor) -> Tensor:
        """Gradient of the loss in the weights (T, tensors): products of its gradient with the masked task vectors."""
        for k, part in enumerate(self.slices):
            g = self._gradient(k)
            if mask is not None:
                g = (g * mask[part]).div_(self._means[k])
            out[:, k] = self.tau[:, part] @ g
        return out


def pieces(part: slice, x: Tensor) -> Iterator[slice]:
    """Cut a part of a vector into pieces that fit the processor's cache; other devices take it whole."""
    step = PIECE if x.device.type == "cpu" else max(part.stop - part.start, 1)
    for start in range(part.start, part.stop, step):
        yield slice(start, min(start + step, part.stop))


def _mean(mask: Tensor) -> Tensor:
    # A sampled mask of a tiny tensor may be all zeros; its change is then zero, not NaN.
    return mask.mean().clamp_(min=torch.finfo(mask.dtype).tiny)


def _aliases(module: nn.Module) -> dict[str, str]:
    """Return names of tied tensors with the first name of each: one tensor has one mask."""
    first: dict[int, str] = {}
    everything = itertools.chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    )
    return {name: first[id(t)] for name, t in everything if first.setdefault(id(t), name) != name}


def mixes_rows(module: nn.Module) -> bool:
    """Whether a layer normalises by the statistics of its batch even in evaluation mode."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None


class Feed:
    """Endless unlabelled batches a task, from any iterable of batches, or from tensors of inputs (n, ...)."""

    def __init__(self, loaders: Mapping[str, Any], tasks: Sequence[str], batch_size: int, generator: torch.Generator):
        lacking = [task for task in tasks if task not in loaders]
        if lacking:
            raise ValueError(f"loaders must have unlabelled inputs for every task, got none for {', '.join(lacking)}")
        self.labelled: set[str] = set()
        self._batches = {task: self._cycle(task, loaders[task], batch_size, generator) for task in tasks}

    def _cycle(self, task: str, source: Any, size: int, generator: torch.Generator) -> Iterator[Any]:
        while True:
            seen = 0
            if isinstance(source, Tensor | Mapping):
                n = len(source) if isinstance(source, Tensor) else len(next(iter(source.values())))
                for rows in torch.randperm(n, generator=generator).split(max(min(size, n), 1)):
                    # A last short batch would weigh its rows more.
                    if len(rows) and len(rows) == min(size, n):
                        seen += 1
                        yield taken(source, rows)
            else:
                for item in source:
                    seen += 1
                    inputs, labels = split_labels(item)
                    if labels is not None:
                        self.labelled.add(task)
                    yield inputs
            if not seen:
                raise ValueError(f"loaders[{task!r}] must give batches again and again, got none (a used-up iterator?)")

    def next(self, task: str) -> Any:
        return next(self._batches[task])


def taken(source: Any, rows: Tensor) -> Any:
    """Return rows of a tensor, or of every tensor of a mapping but its labels."""
    if isinstance(source, Tensor):
        return source.index_select(0, rows.to(source.device))
    return {name: taken(tensor, rows) for name, tensor in source.items() if name not in LABELS}


def split_labels(item: Any) -> tuple[Any, Any]:
    """Return a batch's inputs and its labels, None where it has none."""
    if isinstance(item, Mapping):
        labels = next((item[key] for key in LABELS if key in item), None)
        return {key: value for key, value in item.items() if key not in LABELS}, labels
    if isinstance(item, tuple | list):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def placed(inputs: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move inputs to the device; floats get the dtype in which the merge is computed."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: placed(value, device, dtype) for key, value in inputs.items()}
    return inputs


def joined(batches: Sequence[Any]) -> tuple[Any, list[int]] | None:
    """Return batches of one shape as one, with the rows of each; None where they do not fit together."""
    first = batches[0]
    if isinstance(first, Mapping):
        if not first or any(not isinstance(batch, Mapping) or batch.keys() != first.keys() for batch in batches):
            return None
        found = {key: joined([batch[key] for batch in batches]) for key in first}
        sizes = [one[1] if one is not None else None for one in found.values()]
        if sizes[0] is None or any(size != sizes[0] for size in sizes):
            return None
        return {key: one[0] for key, one in found.items() if one is not None}, sizes[0]
    if not all(isinstance(batch, Tensor) and batch.ndim for batch in batches):
        return None
    if len({(batch.shape[1:], batch.dtype) for batch in batches}) > 1:
        return None
    return torch.cat(list(batches)), [len(batch) for batch in batches]


class Heads:
    """Logits of each task from the merged network: by its own head, or by a function of the user's."""

    def __init__(self, heads: Any, tasks: Sequence[str], normalize: bool, scale: float, like: Tensor):
        self.given, self.normalize, self.scale = heads, normalize, scale
        self._stacked: Tensor | None = None
        if isinstance(heads, Mapping):
            lacking = [task for task in tasks if task not in heads]
            if lacking:
                raise ValueError(f"heads must have one for every task, got none for {', '.join(lacking)}")
            self.given = {task: self._checked(task, heads[task], like) for task in tasks}
            weights = [head for head in self.given.values() if isinstance(head, Tensor)]
            if len(weights) == len(tasks) and len({head.shape for head in weights}) == 1:
                self._stacked = torch.stack(weights)
        elif heads is not None and not callable(heads):
            raise ValueError(f"heads must be a mapping, a function or None, got {type(heads).__name__}")

    def _checked(self, task: str, head: Any, like: Tensor) -> Any:
        if isinstance(head, nn.Module):
            return copy.deepcopy(head).to(like.device, like.dtype).eval().requires_grad_(False)
        if not isinstance(head, Tensor):
            if callable(head):
                return head
            raise ValueError(f"heads[{task!r}] must be a weight (classes, d) or callable, got {type(head).__name__}")
        if head.ndim != 2:
            raise ValueError(f"heads[{task!r}] must be a weight (classes, d), got shape {tuple(head.shape)}")
        head = head.detach().to(like.device, like.dtype)
        return F.normalize(head, dim=1) if self.normalize else head

    @property
    def unbounded(self) -> list[str]:
        """Tasks with linear heads, whose entropy falls where features merely grow."""
        if not isinstance(self.given, Mapping):
            return []
        linear = nn.Linear if self.normalize else (nn.Linear, Tensor)
        return [task for task, head in self.given.items() if isinstance(head, linear)]

    def __call__(self, call: Callable[..., Any], inputs: Any, task: str) -> Tensor:
        if self.given is not None and not isinstance(self.given, Mapping):
            return self.given(call, inputs, task)
        return self._logits(self._features(call, inputs), task)

    def together(self, call: Callable[..., Any], batches: Mapping[str, Any]) -> Sequence[Tensor] | Tensor | None:
        """Return the logits of all tasks from one pass over their batches, or None where that cannot be.

        Batches must be of one shape, and the network must give rows for rows; a function as the head calls the
        network itself. Where tasks have as many rows and classes as one another the logits are one tensor (T, ...).
        """
        whole = joined(list(batches.values()))
        if whole is None or not (self.given is None or isinstance(self.given, Mapping)):
            return None
        inputs, sizes = whole
        features = self._features(call, inputs)
        if not features.ndim or len(features) != sum(sizes):
            return None
        if len(set(sizes)) > 1 or not (self.given is None or self._stacked is not None):
            return [self._logits(part, task) for task, part in zip(batches, features.split(sizes), strict=True)]
        by_task = features.unflatten(0, (len(sizes), sizes[0]))
        if self._stacked is None:
            return by_task
        # One product for all tasks: a head (C, d) by the features (n, d) of its own.
        rows = by_task.flatten(1, -2)
        logits = torch.bmm(F.normalize(rows, dim=-1) if self.normalize else rows, self._stacked.mT)
        return self.scale * logits if self.normalize else logits

    def _features(self, call: Callable[..., Any], inputs: Any) -> Tensor:
        made = call(**inputs) if isinstance(inputs, Mapping) else call(inputs)
        return _tensor_of(made, "logits" if self.given is None else "pooler_output")

    def _logits(self, features: Tensor, task: str) -> Tensor:
        if self.given is None:
            return features
        head = self.given[task]
        if not isinstance(head, Tensor):
            return head(features)
        if self.normalize:
            return self.scale * F.linear(F.normalize(features, dim=-1), head)
        return F.linear(features, head)


def _tensor_of(output: Any, attribute: str) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, attribute, None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"base must return a tensor or an output with {attribute}, got {type(output).__name__}; give heads as a "
            "function of (call, inputs, task)"
        )
    return found


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions over a batch of logits (..., C), in nats."""
    return _entropies(logits).mean()


def entropies(logits: Sequence[Tensor] | Tensor) -> Tensor:
    """Mean entropy of each task's predictions (T,), from logits of each, in nats."""
    if isinstance(logits, Tensor):
        return _entropies(logits).flatten(1).mean(dim=1)
    return torch.stack([entropy(own) for own in logits])


def _entropies(logits: Tensor) -> Tensor:
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(dim=-1)


def class_counts(logits: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """How often each class (C,) is the prediction, by task."""
    if isinstance(logits, Tensor):
        tasks, classes = len(logits), logits.shape[-1]
        found = logits.argmax(-1).flatten(1) + classes * torch.arange(tasks, device=logits.device)[:, None]
        return list(torch.bincount(found.flatten(), minlength=tasks * classes).view(tasks, classes))
    return [torch.bincount(own.argmax(-1).flatten(), minlength=own.shape[-1]) for own in logits]
