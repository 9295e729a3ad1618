"""The steps that lower the entropy of a merged network's predictions, by its mask or by its weights."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polyspan.io import digest_array
from polyspan.run import Progress, numpy_generator, torch_generator

from ._adaptation_state import Kept, RunFile, adam_tensors, chance, plain, restore_adam, restore_chance
from ._flat_model import (
    Feed,
    FlatModel,
    Heads,
    class_counts,
    entropies,
    entropy,
    mixes_rows,
    pieces,
    placed,
    split_labels,
)

WINDOW = 25
# Steps between two states on the disk: a multiple of the window, after which nothing is under way.
KEPT_EVERY = 100
RISE, COLLAPSE = 1.1, 0.95


class Adaptation:
    """One network that is being merged: its weights, its inputs, and the steps that lower entropy.

    ``options`` is the ConcreteMerger whose parameters say how.
    """

    def __init__(self, options: Any, base: nn.Module, finetuned: Any, loaders: Any, heads: Any, *, summed: bool):
        self.flat = FlatModel(base, finetuned, options.ignore_keys, summed=summed, device=options.device)
        theta, tasks = self.flat.theta, self.flat.tasks
        self.generator = torch_generator(options.seed, theta.device)
        self.feed = Feed(loaders, tasks, options.batch_size, torch_generator(options.seed + 1))
        self.heads = Heads(heads, tasks, options.normalize_logits, float(options.logit_scale), theta)
        if self.heads.unbounded:
            warnings.warn(
                f"heads of {', '.join(self.heads.unbounded)} are linear: entropy can fall because features grow, and "
                "the merge then gets worse; give weights of cosine heads with normalize_logits=True",
                stacklevel=4,
            )
        columns = 1 if options.granularity == "task" else len(self.flat.names)
        self.start = torch.full((len(self.flat.tau), columns), float(options.scaling), dtype=theta.dtype).to(theta)
        self.w = self.start.clone()
        self.verbose = options.verbose
        # A layer that normalises by its batch would see the tasks mixed.
        self.joint = options.joint and not any(mixes_rows(module) for module in self.flat.module.modules())
        self.history: list[float] = []
        self.stopped = ""
        self.rounds = 0

    def work(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Say in JSON types what is being merged and how, for what is kept of a run."""
        flat = self.flat
        digests = [digest_array(part.cpu().numpy()) for part in (flat.base, flat.tau)]
        return {**options, "tasks": flat.tasks, "names": flat.names, "base": digests[0], "changes": digests[1]}

    def _replay(self, kept: Kept) -> None:
        """Bring chance and inputs to where they were: batches that were used are drawn again and passed over."""
        for _ in range(kept.about["rounds"]):
            self._draw()
        restore_chance(self.generator, kept)

    def _draw(self) -> list[Any]:
        self.rounds += 1
        return [self.feed.next(task) for task in self.flat.tasks]

    def weights(self) -> Tensor:
        return self.w.expand(-1, len(self.flat.names))

    def named_weights(self) -> dict[str, dict[str, float]]:
        rows = self.weights().expand(len(self.flat.tasks), -1).tolist()
        return {
            task: dict(zip(self.flat.names, row, strict=True)) for task, row in zip(self.flat.tasks, rows, strict=True)
        }

    def losses(self, counts: dict[str, Tensor] | None = None) -> Tensor:
        """Entropy of each task's next batch (T,); the leaves of ``flat`` hold the gradient of their sum."""
        flat = self.flat
        flat.forget()
        drawn = zip(flat.tasks, self._draw(), strict=True)
        batches = {task: placed(batch, flat.theta.device, flat.theta.dtype) for task, batch in drawn}
        with torch.enable_grad():
            logits = self.heads.together(flat.call, flat.alike(batches)) if self.joint else None
            if logits is not None:
                losses = entropies(logits)
                losses.sum().backward()
            else:
                logits, made = [], []
                for task, inputs in batches.items():
                    given = self.heads(flat.call, inputs, task)
                    loss = entropy(given)
                    loss.backward()
                    made.append(loss)
                    logits.append(given.detach())
                losses = torch.stack(made)
        if counts is not None:
            for task, found in zip(flat.tasks, class_counts(logits), strict=True):
                counts[task] = counts[task] + found if task in counts else found
        return losses.detach()

    def learn_mask(self, options: Any, file: RunFile) -> Tensor:
        """Run Adam on the logits of the mask, and return the best ones."""
        flat, temperature = self.flat, float(options.temperature)
        x = torch.full_like(flat.theta, float(options.init_logit))
        x.grad = torch.empty_like(x)
        optimiser = torch.optim.Adam([x], lr=options.lr, fused=x.device.type in ("cpu", "cuda"))
        mask, watch = torch.empty_like(x), Watch(flat.tasks)
        entropies: list[Tensor] = []
        kept, begun = file.load(), 0
        if kept is not None:
            x.copy_(kept.tensor("logits", x))
            self.history, self.stopped = list(kept.about["history"]), kept.about["stopped"]
            if kept.about["phase"] == "weights":
                return x.detach()
            begun = len(self.history)
            restore_adam(optimiser, x, kept)
            watch.restore(kept, x)
            self._replay(kept)
        with Progress("learning the mask", options.steps, enabled=options.verbose) as shown:
            shown.advance(begun)
            for step in range(begun + 1, options.steps + 1):
                concrete_sample(x, temperature, self.generator, out=mask)
                if options.method == "adamerging":
                    self._inner_step(options, mask)
                flat.merge(self.weights(), mask)
                entropies.append(self.losses(watch.counts if options.stop else None).mean())
                flat.mask_gradient(self.weights(), mask, temperature, out=x.grad)
                optimiser.step()
                if step % WINDOW == 0 or step == options.steps:
                    # One wait for the device a window.
                    self.history += self._finite(entropies, step)
                    entropies = []
                    self.stopped = watch.look(self.history, x) if options.stop else ""
                    if self.stopped:
                        break
                if step % KEPT_EVERY == 0 and step < options.steps:
                    file.save(
                        {"logits": x, **adam_tensors(optimiser, x), **chance(self.generator), **watch.tensors()},
                        {
                            "phase": "mask",
                            "history": self.history,
                            "stopped": "",
                            "rounds": self.rounds,
                            **watch.about(),
                        },
                    )
                shown.advance(1)
        if self.stopped:
            warnings.warn(f"the mask stopped after {len(self.history)} steps: {self.stopped}", stacklevel=3)
            return watch.best
        return x.detach()

    def _inner_step(self, options: Any, mask: Tensor) -> None:
        """One step from ``scaling`` down the entropy; Adam's first step is the sign of the gradient."""
        self.w.copy_(self.start)
        self.flat.merge(self.weights(), mask)
        self.losses()
        gradient = self._weight_gradient(mask)
        self.w.sub_(options.inner_lr * gradient / (gradient.abs() + 1e-8))
        if options.clamp:
            self.w.clamp_(0, 1)

    def _weight_gradient(self, mask: Tensor | None) -> Tensor:
        full = torch.empty(len(self.flat.tau), len(self.flat.names), dtype=self.w.dtype, device=self.w.device)
        self.flat.weight_gradient(mask, full)
        return full.sum(dim=1, keepdim=True) if self.w.shape[1] == 1 else full

    def learn_weights(
        self, lr: float, steps: int, mask: Tensor | None, clamp: bool, file: RunFile, logits: Tensor | None = None
    ) -> list[float]:
        """Run Adam on the weights from ``scaling``, under a fixed mask; return the entropy of each step.

        ``mask`` is overwritten by the one that was kept, where a run goes on that has drawn it.
        """
        self.w.copy_(self.start)
        optimiser = torch.optim.Adam([self.w], lr=lr)
        history: list[float] = []
        entropies: list[Tensor] = []
        kept = file.load()
        if kept is not None and kept.about["phase"] == "weights":
            history = list(kept.about["weights history"])
            self.w.copy_(kept.tensor("weights", self.w))
            if mask is not None:
                mask.copy_(kept.tensor("mask", mask))
            restore_adam(optimiser, self.w, kept)
            self._replay(kept)
        begun = len(history)
        with Progress("learning the weights", steps, enabled=self.verbose) as shown:
            shown.advance(begun)
            for step in range(begun + 1, steps + 1):
                self.flat.merge(self.weights(), mask)
                entropies.append(self.losses().mean())
                self.w.grad = self._weight_gradient(mask)
                optimiser.step()
                if clamp:
                    self.w.clamp_(0, 1)
                if step % WINDOW == 0 or step == steps:
                    history += self._finite(entropies, step)
                    entropies = []
                if step % KEPT_EVERY == 0 and step < steps:
                    named = {"logits": logits, "mask": mask, "weights": self.w}
                    file.save(
                        {
                            **{name: tensor for name, tensor in named.items() if tensor is not None},
                            **adam_tensors(optimiser, self.w),
                            **chance(self.generator),
                        },
                        {
                            "phase": "weights",
                            "history": self.history,
                            "weights history": history,
                            "stopped": self.stopped,
                            "rounds": self.rounds,
                        },
                    )
                shown.advance(1)
        return history

    def _finite(self, entropies: Sequence[Tensor], step: int) -> list[float]:
        found = torch.stack(list(entropies)).tolist()
        if not all(map(math.isfinite, found)):
            bad = self.flat.not_finite()
            advice = f"base or finetuned holds NaN or infinity in {bad}" if bad else "look at the inputs and at lr"
            raise ValueError(f"entropy must be finite, got {found[-1]} by step {step}; {advice}")
        return found

    def final_mask(self, x: Tensor, kind: str, temperature: float) -> Tensor:
        if kind == "mean":
            return torch.sigmoid(x)
        if kind == "sample":
            return concrete_sample(x, temperature, self.generator, out=torch.empty_like(x))
        return torch.bernoulli(torch.sigmoid(x), generator=self.generator)

    @torch.no_grad()
    def accuracy(self, state: Mapping[str, Tensor], task: str, loaders: Mapping[str, Any]) -> float:
        """Share of a task's labelled items that are right under the weights ``state``."""
        if task not in loaders:
            raise ValueError(f"labelled_loaders must have batches for every task, got none for {task}")
        flat = self.flat
        weights = {name: placed(value, flat.theta.device, flat.theta.dtype) for name, value in state.items()}
        right = total = 0
        for item in loaders[task]:
            inputs, labels = split_labels(item)
            if labels is None:
                raise ValueError(f"labelled_loaders[{task!r}] must give inputs and labels, got inputs alone")
            inputs = placed(inputs, flat.theta.device, flat.theta.dtype)

            def call(*args: Any, **kwargs: Any) -> Any:
                return functional_call(flat.module, weights, args, kwargs)

            guess = self.heads(call, inputs, task).argmax(-1)
            right += int((guess == torch.as_tensor(labels, device=guess.device)).sum())
            total += guess.numel()
        if not total:
            raise ValueError(f"labelled_loaders[{task!r}] must give at least one batch, got none")
        return right / total


class Watch:
    """Looks every window whether entropy still falls and predictions are still spread over classes."""

    def __init__(self, tasks: Sequence[str]):
        self.tasks, self.counts = tasks, {}
        self.best, self.lowest = torch.empty(0), math.inf
        self.first = math.nan
        self.first_share: dict[str, float] = {}

    def tensors(self) -> dict[str, Tensor]:
        return {"best logits": self.best} if len(self.best) else {}

    def about(self) -> dict[str, Any]:
        return {"lowest": plain(self.lowest), "first": plain(self.first), "first share": self.first_share}

    def restore(self, kept: Kept, x: Tensor) -> None:
        """Go on from what was kept right after a window was looked at."""
        if "best logits" in kept.arrays:
            self.best = kept.tensor("best logits", x)
        lowest, first = kept.about["lowest"], kept.about["first"]
        self.lowest, self.first = math.inf if lowest is None else lowest, math.nan if first is None else first
        self.first_share = dict(kept.about["first share"])

    def look(self, history: Sequence[float], x: Tensor) -> str:
        """Return why to stop, or nothing; ``counts`` hold the window's predictions and are emptied."""
        window = history[-WINDOW:]
        mean = sum(window) / len(window)
        share = {task: float(c.max() / c.sum()) for task, c in self.counts.items()}
        self.counts.clear()
        if not self.first_share:
            self.first, self.first_share = mean, share
        fallen = [t for t in self.tasks if share[t] > COLLAPSE >= self.first_share[t]]
        if fallen:
            why = f"nearly all predictions of {', '.join(fallen)} are one class"
        elif mean > RISE * self.first:
            why = f"entropy rose from {self.first:.3g} to {mean:.3g}"
        else:
            why = ""
        if not why and mean < self.lowest:
            self.best, self.lowest = x.detach().clone(), mean
        elif why and not len(self.best):
            self.best = x.detach().clone()
        return why


@torch.no_grad()
def concrete_sample(x: Tensor, temperature: float, generator: torch.Generator, *, out: Tensor) -> Tensor:
    """Fill ``out`` with a draw of the binary Concrete distribution with logits ``x``, in (0, 1).

    On a CPU, in which most of the time went into uniform numbers, ``generator`` gives one integer a draw. It seeds
    NumPy's PCG64, and u = 1/2 + k / 2^b for its words k of b bits (the dtype's), read as signed integers in order.
    Other devices draw u from ``generator`` itself.
    """
    fill = _uniform_from(generator, out.dtype) if out.device.type == "cpu" else partial(_uniform, generator)
    for piece in pieces(slice(0, len(out)), out):
        made = fill(out[piece]).logit_(eps=torch.finfo(out.dtype).eps)
        made.add_(x[piece]).div_(temperature).sigmoid_()
    return out


def _uniform(generator: torch.Generator, out: Tensor) -> Tensor:
    return out.uniform_(generator=generator)


def _uniform_from(generator: torch.Generator, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return what fills one tensor after another with uniform numbers in [0, 1]."""
    words = numpy_generator(int(torch.randint(2**63 - 1, (), generator=generator))).bit_generator
    bits, half = torch.finfo(dtype).bits, torch.tensor(0.5, dtype=dtype)

    def fill(out: Tensor) -> Tensor:
        drawn = words.random_raw(-(-len(out) * bits // 64)).view(f"int{bits}")
        return torch.add(half, torch.from_numpy(drawn[: len(out)]), alpha=2.0**-bits, out=out)

    return fill
