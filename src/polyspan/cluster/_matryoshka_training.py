"""Training of an encoder by nested prototype heads: views, teacher, losses, schedules, a checkpoint after each pass."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyspan.errors import NotConverged
from polyspan.run import Progress

from ._manifold_network import Source
from ._matryoshka_encoders import RandomCrop, encode
from ._training_checkpoints import check_same_fit
from .matryoshka_head import NestedMatryoshkaHead, koleo_loss, prototype_loss, prototype_targets
from .patch_masking import mask_batch

KIND = "NestedMatryoshkaCheckpoint"
COLLAPSED = 1.5
LEAST_STEPS = 100


class Network(nn.Module):
    """An encoder, the head of its features and, for masked patches, the head of its patch tokens."""

    def __init__(self, encoder: nn.Module, head: NestedMatryoshkaHead, patch_head: NestedMatryoshkaHead | None):
        super().__init__()
        self.encoder, self.head, self.patch_head = encoder, head, patch_head


@dataclass(frozen=True)
class Plan:
    """What is to be done, and what a checkpoint must agree with."""

    steps: int
    batch: int
    views: Any
    crop: RandomCrop | None
    local: RandomCrop | None
    n_local: int
    mask: str | None
    mask_ratio: tuple[float, float]
    mask_probability: float
    grid: tuple[int, int] | None
    lr: float
    weight_decay: tuple[float, float]
    momentum: float
    student_temperature: float
    teacher_temperature: tuple[float, float]
    rounds: int
    koleo: float
    ibot: float
    clip: float
    warmup: float
    frozen: float
    patch_lr: float
    checkpoint: Path | None
    params: dict[str, str]
    verbose: bool


class Training:
    """Run a plan on a network; ``teacher`` is its moving average, and what users get."""

    def __init__(self, student: Network, source: Source, plan: Plan, generator: torch.Generator, device: Any):
        self.student, self.source, self.plan = student, source, plan
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.generator, self.device = generator, device
        self.history: list[dict[str, Any]] = []
        self.step = 0
        fast = [p for n, p in student.named_parameters() if p.requires_grad and "patch_embed" not in n]
        slow = [p for n, p in student.named_parameters() if p.requires_grad and "patch_embed" in n]
        groups = [{"params": fast, "share": 1.0}] + ([{"params": slow, "share": plan.patch_lr}] if slow else [])
        self.optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.999), weight_decay=plan.weight_decay[0])

    def run(self) -> None:
        """Take all steps, or those that a checkpoint has left."""
        plan = self.plan
        self._resume()
        devices = [self.device] if self.device.type == "cuda" else []
        with Progress("nested heads" if plan.verbose else "", plan.steps) as shown, torch.random.fork_rng(devices):
            shown.advance(self.step)
            while self.step < plan.steps:
                # Dropout draws from torch's own generator: it gets a state of ours, and its own back in the end.
                seed = int(torch.randint(2**31 - 1, (), generator=self.generator))
                torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())
                before, facts = self.step, self._pass()
                self._check(facts)
                self.history.append({"step": self.step, **facts})
                self._keep()
                shown.advance(self.step - before, loss=facts["loss"])

    def _pass(self) -> dict[str, Any]:
        seen, used = [], []
        self.student.train()
        self.teacher.train()
        for x in self.source.epoch(self.plan.batch, self.generator, self.device):
            if self.step >= self.plan.steps:
                break
            parts, usage = self._losses(x)
            self._update(sum(parts[1:], parts[0]))
            self.step += 1
            seen.append(torch.stack([p.detach() for p in parts]))
            used.append(usage)
        if not seen:
            raise ValueError(f"X must give batches of {self.plan.batch} rows, got none")
        dino, ibot, koleo = torch.stack(seen).mean(dim=0).tolist()
        share = torch.stack(used).mean(dim=0)
        levels = share.split(self.student.head.num_prototypes)
        counts = [float(torch.special.entr(p[p > 0]).sum().exp()) for p in levels]
        return {"loss": dino + ibot + koleo, "dino": dino, "ibot": ibot, "koleo": koleo, "used": counts}

    def _view(self, x: Tensor) -> Tensor:
        x = x if self.plan.crop is None else self.plan.crop(x, self.generator)
        return x if self.plan.views is None else self.plan.views(x, self.generator)

    def _losses(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the losses over levels, weighted, and how much the teacher uses each prototype of all levels."""
        plan, b, zero = self.plan, len(x), x.new_zeros(())
        whole = torch.cat([self._view(x), self._view(x)])
        share = self.step / max(1, plan.steps)
        cool, warm = plan.teacher_temperature
        hot = cool + (warm - cool) * min(1.0, share / 0.3)
        mask = None
        if plan.mask is not None and plan.grid is not None:
            options = {"kind": plan.mask, "ratio": plan.mask_ratio, "probability": plan.mask_probability}
            mask = mask_batch(2 * b, plan.grid, **options, generator=self.generator).to(x.device)
        with torch.no_grad():
            feature, patches = encode(self.teacher.encoder, whole)
            scores = self.teacher.head(feature)
            if not all(bool(torch.isfinite(s).all()) for s in scores):
                raise NotConverged(f"scores are no longer finite after {self.step} steps; try a smaller lr")
            targets = [prototype_targets(s, temperature=hot, rounds=plan.rounds) for s in scores]
            usage = torch.cat([torch.softmax(s.float() / hot, dim=1).mean(dim=0) for s in scores])
        own, own_patches = encode(self.student.encoder, whole, mask)
        total = zero
        for s, q in zip(self.student.head(own), targets, strict=True):
            # Each view against the teacher of the other.
            total = total + 2 * prototype_loss(s, q.roll(b, 0), temperature=plan.student_temperature).mean()
        for _ in range(plan.n_local):
            assert plan.local is not None
            part = plan.local(x, self.generator)
            part = part if plan.views is None else plan.views(part, self.generator)
            small, _ = encode(self.student.encoder, part)
            for s, q in zip(self.student.head(small), targets, strict=True):
                for other in q.chunk(2):
                    total = total + prototype_loss(s, other, temperature=plan.student_temperature).mean()
        dino = total / (2 * plan.n_local + 2)
        ibot = zero
        if mask is not None and patches is not None and own_patches is not None:
            ibot = plan.ibot * self._patch_loss(own_patches, patches, mask, hot)
        koleo = zero
        if plan.koleo:
            koleo = plan.koleo * sum((koleo_loss(half) for half in own.chunk(2)), zero)
        return [dino, ibot, koleo], usage

    def _patch_loss(self, own: Tensor, teacher: Tensor, mask: Tensor, hot: float) -> Tensor:
        """Return the cross entropy at masked patches: mean within an image, sum over images over their number."""
        assert self.student.patch_head is not None
        assert self.teacher.patch_head is not None
        weight = (1 / mask.sum(dim=1).clamp_min(1))[:, None].expand_as(mask)[mask] / len(mask)
        with torch.no_grad():
            scores = self.teacher.patch_head(teacher[mask])
            targets = [prototype_targets(s, temperature=hot, rounds=self.plan.rounds) for s in scores]
        pairs = zip(self.student.patch_head(own[mask]), targets, strict=True)
        losses = [prototype_loss(s, q, temperature=self.plan.student_temperature) for s, q in pairs]
        return (torch.stack(losses).sum(dim=0) * weight).sum()

    def _update(self, loss: Tensor) -> None:
        plan, share = self.plan, self.step / max(1, self.plan.steps)
        wave = 0.5 * (1 + math.cos(math.pi * share))
        first, last = plan.weight_decay
        rise = min(1.0, (self.step + 1) / max(1.0, plan.warmup * plan.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr * group["share"] * rise * max(wave, 0.001)
            group["weight_decay"] = last + (first - last) * wave
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if share < plan.frozen:
            for head in (self.student.head, self.student.patch_head):
                for parameter in () if head is None else head.last_layers.parameters():
                    parameter.grad = None
        nn.utils.clip_grad_norm_([p for p in self.student.parameters() if p.grad is not None], plan.clip)
        self.optimizer.step()
        momentum = 1 - (1 - plan.momentum) * wave
        with torch.no_grad():
            mine, theirs = self.teacher.parameters(), self.student.parameters()
            for kept, new in zip(mine, theirs, strict=True):
                kept.lerp_(new, 1 - momentum)
            for kept, new in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
                kept.copy_(new)

    def _check(self, facts: dict[str, Any]) -> None:
        if not math.isfinite(facts["loss"]):
            raise NotConverged(f"the loss is no longer finite after {self.step} steps; try a smaller lr")
        used, level = min((count, number) for number, count in enumerate(facts["used"]))
        if self.step >= LEAST_STEPS and used < COLLAPSED:
            n = self.student.head.num_prototypes[level]
            raise NotConverged(
                f"the teacher uses {used:.2f} of the {n} prototypes of level {level} after {self.step} steps: it has "
                "collapsed; try a smaller lr or a higher teacher_temperature"
            )

    def _signature(self) -> dict[str, Any]:
        return {
            "params": self.plan.params,
            "n": self.source.n,
            "mean": float(np.mean(self.source.mean)),
            "scale": self.source.scale,
        }

    def _keep(self) -> None:
        if self.plan.checkpoint is None:
            return
        from polyspan.io import save_fitted

        arrays: dict[str, Any] = {"generator": self.generator.get_state()}
        for whose, network in (("student", self.student), ("teacher", self.teacher)):
            arrays |= {f"{whose}.{name}": value for name, value in network.state_dict().items()}
        arrays |= {
            f"optimizer.{number}.{name}": torch.as_tensor(value)
            for number, entry in self.optimizer.state_dict()["state"].items()
            for name, value in entry.items()
            if value is not None
        }
        arrays = {name: value.detach().cpu().numpy() for name, value in arrays.items()}
        params = {"signature": self._signature(), "history": self.history, "step": self.step}
        save_fitted(self.plan.checkpoint, kind=KIND, arrays=arrays, params=params)

    def _resume(self) -> None:
        path = self.plan.checkpoint
        if path is None or not path.exists():
            return
        from polyspan.io import load_fitted

        found = load_fitted(path, kind=KIND)
        check_same_fit(path, found.params["signature"], self._signature())
        tensors = {name: torch.as_tensor(np.array(value)) for name, value in found.arrays.items()}
        for whose, network in (("student", self.student), ("teacher", self.teacher)):
            own = {n.removeprefix(f"{whose}."): t for n, t in tensors.items() if n.startswith(f"{whose}.")}
            network.load_state_dict(own)
        self.generator.set_state(tensors["generator"])
        state = self.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, part = name.split(".", 2)
                state["state"].setdefault(int(number), {})[part] = value
        self.optimizer.load_state_dict(state)
        self.history, self.step = list(found.params["history"]), int(found.params["step"])
