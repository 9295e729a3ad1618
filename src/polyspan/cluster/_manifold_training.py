"""Training of the manifold-linearising network: both stages, batch by batch, with checkpoints after each pass."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyspan.errors import NotConverged
from polyspan.run import Progress

from ._manifold_network import Source, TwoHeads
from ._training_checkpoints import check_same_fit
from .rate_reduction import DoublyStochastic, RateReductionLoss, TotalCodingRateLoss

CLIP = 5.0
ROUNDS = 3
KIND = "ManifoldLinearizingCheckpoint"


@dataclass(frozen=True)
class Plan:
    """What is to be done: both stages' lengths and losses, and what a checkpoint must agree with."""

    tcr_epochs: int
    epochs: int
    batch: int
    n_clusters: int
    n_views: int
    augment: Any
    eta: Any
    tcr: TotalCodingRateLoss
    loss: RateReductionLoss
    optimizer: str
    rates: tuple[float, float]
    decays: tuple[float, float]
    bfloat16: bool
    checkpoint: Path | None
    params: dict[str, str]
    verbose: bool


class Training:
    """Run a plan on a network; what has been reached is whole after every pass."""

    def __init__(self, network: TwoHeads, source: Source, plan: Plan, generator: torch.Generator, device: Any):
        self.network, self.source, self.plan = network, source, plan
        self.generator, self.device = generator, device
        self.history: list[dict[str, Any]] = []
        self.eta = float("nan") if plan.eta == "auto" else float(plan.eta)
        self.optimizer: Any = None

    def run(self) -> None:
        """Train both stages, or what a checkpoint has left of them."""
        plan = self.plan
        self._resume()
        total = plan.tcr_epochs + plan.epochs
        label = "manifold linearising" if plan.verbose else ""
        with Progress(label, total) as shown:
            shown.advance(len(self.history))
            while len(self.history) < total:
                done = len(self.history)
                if done in (0, plan.tcr_epochs):
                    self._begin(done)
                facts = self._tcr_pass() if done < plan.tcr_epochs else self._main_pass()
                wrong = [name for name, value in facts.items() if not math.isfinite(value)]
                if wrong:
                    raise NotConverged(f"{wrong[0]} is no longer finite after {done + 1} passes; try a smaller lr")
                stage = "tcr" if done < plan.tcr_epochs else "main"
                self.history.append(
                    {"stage": stage, "epoch": done - (plan.tcr_epochs if stage == "main" else 0), **facts}
                )
                self._keep()
                shown.advance(1, **facts)
        if math.isnan(self.eta) or not plan.epochs:
            self._begin(plan.tcr_epochs)

    def _begin(self, done: int) -> None:
        """Start a stage: a fresh optimiser, and before the second the copy of the head and the choice of eta."""
        main = done >= self.plan.tcr_epochs
        if main:
            self.network.copy_head()
            if math.isnan(self.eta):
                self.eta = self._choose_eta()
        self._make_optimizer(main)

    def _make_optimizer(self, main: bool) -> None:
        network, plan = self.network, self.plan
        body = [*network.trunk.parameters(), *network.features.parameters()]
        groups: list[dict[str, Any]] = [{"params": body, "weight_decay": plan.decays[0]}]
        if main:
            groups.append({"params": list(network.clusters.parameters()), "weight_decay": plan.decays[1]})
        if plan.optimizer == "adam":
            # All of a parameter's step in one pass over its memory, where the device has that.
            fused = self.device.type in ("cpu", "cuda")
            self.optimizer = torch.optim.Adam(groups, lr=plan.rates[main], fused=fused)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=plan.rates[main], momentum=0.9)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self._precision():
            Z, C = self.network(x)
        return self._finite(Z), self._finite(C)

    def _features(self, x: Tensor) -> Tensor:
        with self._precision():
            return self._finite(self.network.features_alone(x))

    def _finite(self, rows: Tensor) -> Tensor:
        if not bool(torch.isfinite(rows.detach()).all()):
            raise NotConverged(f"features are no longer finite after {len(self.history)} passes; try a smaller lr")
        return rows

    def _precision(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.plan.bfloat16)

    def _view(self, x: Tensor) -> Tensor:
        return x if self.plan.augment is None else self.plan.augment(x, self.generator)

    def _tcr_pass(self) -> dict[str, float]:
        seen = []
        self.network.train()
        for x in self.source.epoch(self.plan.batch, self.generator, self.device):
            if self.plan.augment is None:
                loss = self.plan.tcr(self._features(x))
                seen.append(torch.stack([-loss.detach(), torch.ones_like(loss)]))
            else:
                # Both views through the batch norms at once: they share one distribution.
                Z, other = self._features(torch.cat([self._view(x), self._view(x)])).chunk(2)
                loss = self.plan.tcr(Z, other)
                agreement = torch.linalg.vecdot(Z, other).abs().mean().detach()
                seen.append(torch.stack([-loss.detach() - self.plan.tcr.weight * agreement, agreement]))
            self._step(loss)
        rate, agreement = torch.stack(seen).mean(dim=0).tolist()
        return {"rate": rate, "agreement": agreement}

    def _main_pass(self) -> dict[str, float]:
        seen, project = [], DoublyStochastic(self.eta, ROUNDS)
        self.network.train()
        for x in self.source.epoch(self.plan.batch, self.generator, self.device):
            views = [self._heads(self._view(x)) for _ in range(self.plan.n_views)]
            Z = torch.nn.functional.normalize(torch.stack([z for z, _ in views]).sum(dim=0), dim=1)
            gamma = torch.stack([project(c) for _, c in views]).mean(dim=0)
            rate, within = self.plan.loss.rates(Z, gamma)
            self._step(self.plan.loss.gamma * within - rate)
            seen.append(torch.stack([rate.detach(), within.detach()]))
        rate, within = torch.stack(seen).mean(dim=0).tolist()
        return {"rate": rate, "class_rate": within}

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self.optimizer.step()

    @torch.no_grad()
    def _choose_eta(self) -> float:
        """Bisect for the eta at which a row of a batch has about batch / (2k) effective neighbours."""
        # A copy of the generator: what is drawn here must not move the passes that follow.
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        x = next(iter(self.source.epoch(self.plan.batch, generator, self.device)))
        _, C = self.network.eval()(x)
        target = max(2.0, len(C) / (2 * self.plan.n_clusters))
        low, high = 0.01, 2.0
        neighbours = math.nan
        for _ in range(20):
            eta = math.sqrt(low * high)
            gamma = DoublyStochastic(eta, 30)(C)
            neighbours = float(torch.special.entr(gamma).sum(dim=1).exp().mean())
            low, high = (eta, high) if neighbours < target else (low, eta)
        eta = math.sqrt(low * high)
        if not 0.5 < neighbours / target < 2:
            warnings.warn(
                f"eta='auto' ended at {eta:.2g}, with {neighbours:.1f} effective neighbours a row in place of "
                f"{target:.1f}: the features that training starts from show no groups of that size",
                stacklevel=2,
            )
        return eta

    def _signature(self) -> dict[str, Any]:
        source = self.source
        return {
            "params": self.plan.params,
            "n": source.n,
            "mean": float(np.mean(source.mean)),
            "scale": source.scale,
            "augment": repr(self.plan.augment) if "object at 0x" not in repr(self.plan.augment) else "own",
        }

    def _keep(self) -> None:
        if self.plan.checkpoint is None:
            return
        from polyspan.io import save_fitted

        arrays = {f"module.{name}": value for name, value in self.network.state_dict().items()}
        state = self.optimizer.state_dict()["state"]
        arrays |= {
            f"optimizer.{number}.{name}": torch.as_tensor(value)
            for number, entry in state.items()
            for name, value in entry.items()
            if value is not None
        }
        arrays["generator"] = self.generator.get_state()
        arrays = {name: value.detach().cpu().numpy() for name, value in arrays.items()}
        eta = None if math.isnan(self.eta) else self.eta
        params = {"signature": self._signature(), "history": self.history, "eta": eta}
        save_fitted(self.plan.checkpoint, kind=KIND, arrays=arrays, params=params)

    def _resume(self) -> None:
        path = self.plan.checkpoint
        if path is None or not path.exists():
            return
        from polyspan.io import load_fitted

        found = load_fitted(path, kind=KIND)
        check_same_fit(path, found.params["signature"], self._signature())
        self.history = list(found.params["history"])
        self.eta = float("nan") if found.params["eta"] is None else float(found.params["eta"])
        own = {name.removeprefix("module."): a for name, a in found.arrays.items() if name.startswith("module.")}
        self.network.load_state_dict({name: torch.as_tensor(np.array(value)) for name, value in own.items()})
        self.generator.set_state(torch.as_tensor(np.array(found.arrays["generator"])))
        if not self.history:
            return
        self._make_optimizer(self.history[-1]["stage"] == "main")
        state = self.optimizer.state_dict()
        for name, value in found.arrays.items():
            if name.startswith("optimizer."):
                _, number, part = name.split(".", 2)
                state["state"].setdefault(int(number), {})[part] = torch.as_tensor(np.array(value))
        self.optimizer.load_state_dict(state)
