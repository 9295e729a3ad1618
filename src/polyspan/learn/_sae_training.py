"""Steps of training of a sparse autoencoder, over a store of activations, with checkpoints inside of a pass."""

import contextlib
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polyspan.errors import NotConverged
from polyspan.run import Progress, first_interrupt_finishes

from ._sae_codes import SparseCodes
from .activation_store import ActivationStore
from .polynomial_sae_module import PolynomialSAEModule

SAMPLE_ROWS = 8_192
LARGEST = 50.0
RANGE = 1e-18, 1e18
THRESHOLD_RATE = 0.01
WINDOW = 50
"""Steps whose losses are read together, and after which latents are looked at anew: reading waits for the device."""


class StepLoss(NamedTuple):
    """``total`` is what is minimised; ``mse`` a row's mean squared length of what is missing; the rest is detached."""

    total: Tensor
    mse: Tensor
    codes: SparseCodes
    largest: Tensor


def step_loss(
    module: PolynomialSAEModule, x: Tensor, dead: Tensor, *, aux_coef: float | int = 1.0, l0_coef: float | int = 1.0
) -> StepLoss:
    r"""Return the loss of a batch ``x`` (b, d).

    The mean of :math:`\lVert x - \hat x\rVert^2`; plus the same for each prefix of "matryoshka", decoded by the
    factors of the prefix; plus, where latents are ``dead`` (m,), what the d/2 of them that come nearest to firing leave
    of the residual by their linear directions, times min(dead / (d/2), 1); plus for "jumprelu" the variance times
    :math:`(L_0 / k - 1)^2`.
    """
    codes, count = module.train_codes(x)
    y, a = module.sparse_decode(codes)
    residual = x - y
    mse = residual.square().sum(dim=1).mean()
    total = mse
    for width in module.width_limits:
        total = total + (x - module.sparse_decode(codes.below(width))[0]).square().sum(dim=1).mean()
    if count is not None and l0_coef:
        variance = (x - x.mean(dim=0)).square().sum(dim=1).mean()
        total = total + l0_coef * variance * (count / module.k - 1) ** 2
    if dead.dtype == torch.bool:
        dead = dead.nonzero()[:, 0]
    if aux_coef and len(dead):
        total = total + aux_coef * _dead_loss(module, x, residual.detach(), dead)
    detached = SparseCodes(codes.indices, codes.values.detach(), codes.offsets)
    largest = a.detach().abs().max() if module.order > 1 else a.new_zeros(())
    return StepLoss(total, mse.detach(), detached, largest)


def _dead_loss(module: PolynomialSAEModule, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    half = max(1, module.in_features // 2)
    pre = torch.addmm(module.b_enc[dead], x - module.b_dec, module.W_enc[:, dead])
    top = pre.topk(min(half, len(dead)), dim=1)
    b, n = top.values.shape
    offsets = torch.arange(b, device=pre.device) * n
    codes = SparseCodes(dead[top.indices].reshape(-1), top.values.reshape(-1), offsets)
    made = codes.weigh(module.W_dec) if module.order == 1 else codes.weigh(module._factor(1)) @ module.C1.T
    return min(len(dead) / half, 1.0) * (made - residual).square().sum(dim=1).mean()


def mean_norm_scale(rows: np.ndarray) -> float:
    """Return the power of two that brings rows (n, d) nearest to a mean length of √d: folding it is exact.

    Raises
    ------
    ValueError
        Their squares are too large or too small for float32, in which they are trained on.
    """
    largest = float(np.abs(rows).max())
    if largest and not RANGE[0] <= largest <= RANGE[1]:
        raise ValueError(
            f"X must have a largest number from {RANGE[0]:g} to {RANGE[1]:g}, whose square float32 holds, got "
            f"{largest:.3g}; scale it"
        )
    mean = float(np.linalg.norm(rows.astype(np.float64), axis=1).mean())
    return 2.0 ** round(math.log2(math.sqrt(rows.shape[1]) / mean)) if mean > 0 else 1.0


@torch.no_grad()
def set_start(module: PolynomialSAEModule, rows: Tensor) -> None:
    """Set what is taken from data: the bias of a tied start is their mean, a threshold lets k latents fire."""
    if module.init == "tied":
        module.b_dec.copy_(rows.mean(dim=0))
    if module.activation == "jumprelu":
        pre = module.pre_activations(rows[: max(1, 2**22 // module.num_latents)])
        cut = pre.reshape(-1).topk(min(module.k * len(pre), pre.numel())).values[-1].clamp(min=1e-3)
        module.threshold.fill_(float(cut))
        module.bandwidth.fill_(float(cut) / 2)


class Trainer:
    """The state of a training: the optimiser, when each latent last fired, and the losses so far.

    A step leaves on the device what it found. :attr:`losses` reads it, as every window's last step does.
    """

    def __init__(self, made: Any, module: PolynomialSAEModule, scale: float, seed: int):
        self.made, self.module, self.scale, self.seed = made, module, scale, seed
        self.optimizer = torch.optim.Adam(module.parameters(), lr=made.learning_rate, fused=True)
        self.since_fired = torch.zeros(module.num_latents, dtype=torch.int64, device=module.W_enc.device)
        self.dead = self.since_fired[:0]
        self.n_steps = self.n_tokens = 0
        self._losses: list[float] = []
        self._unread: list[Tensor] = []
        self._warned = False

    def restore(self, losses: list[float], n_tokens: int, since_fired: Tensor, dead: Tensor) -> None:
        """Set what a checkpoint holds, beside the module and the optimiser; ``dead`` are numbers of latents."""
        self._losses, self.n_steps, self.n_tokens = losses, len(losses), n_tokens
        self.since_fired.copy_(since_fired)
        self.dead = dead.to(self.since_fired.device)

    def step(self, rows: np.ndarray, share: float = 0.0) -> None:
        """Take one step on rows (b, d); ``share`` of the training lies behind it.

        A loss that is not finite changes no parameter.

        Raises
        ------
        NotConverged
            A loss of the window is no longer finite.
        """
        made, module = self.made, self.module
        if self.n_steps % min(WINDOW, made.dead_after) == 0:
            self.dead = (self.since_fired >= made.dead_after).nonzero()[:, 0]
        x = torch.from_numpy(np.ascontiguousarray(rows, np.float32)).to(module.W_enc.device) * self.scale
        module.train()
        found = step_loss(module, x, self.dead, aux_coef=made.aux_coef, l0_coef=made.l0_coef)
        self.optimizer.zero_grad(set_to_none=True)
        found.total.backward()
        if made.clip_norm:
            torch.nn.utils.clip_grad_norm_(module.parameters(), made.clip_norm)
        fall = (1 + math.cos(math.pi * share)) / 2 if made.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = made.learning_rate * fall
        # As under torch.amp, the optimiser itself leaves out a step that is marked so, without a wait.
        self.optimizer.found_inf = (~torch.isfinite(found.total.detach())).float()  # ty: ignore[missing-attribute]
        self.optimizer.step()
        self.n_steps += 1
        if self.n_steps % made.retract_every == 0:
            module.retract_(made.retraction)
        self._note(found)
        self._unread.append(torch.stack([found.total.detach(), found.mse, found.largest]))
        self.n_tokens += len(rows)
        module.eval()
        if self.n_steps % WINDOW == 0:
            self._read()

    @torch.no_grad()
    def _note(self, found: StepLoss) -> None:
        """Keep count of what fired, and of the threshold at which as many fire as in training."""
        values = found.codes.values
        firing = values > 0
        fired = torch.zeros_like(self.since_fired).index_add_(0, found.codes.indices, firing.long())
        self.since_fired.add_(1).masked_fill_(fired > 0, 0)
        if self.module.activation in ("batchtopk", "matryoshka") and len(values):
            least = torch.where(firing, values, math.inf).min()
            threshold = self.module.threshold
            moved = torch.where(threshold == 0, least, torch.lerp(threshold, least, THRESHOLD_RATE))
            threshold.copy_(torch.where(torch.isfinite(least), moved, threshold))

    def _read(self) -> None:
        """Read what the steps found since the last time, refuse what is not finite, and warn of large numbers."""
        if not self._unread:
            return
        first, found = len(self._losses), torch.stack(self._unread).tolist()
        self._unread = []
        self._losses += [mse / self.scale**2 for total, mse, _ in found if math.isfinite(total)]
        self.n_steps = len(self._losses)
        for step, (total, _, largest) in enumerate(found, start=first):
            if not math.isfinite(total):
                raise NotConverged(
                    f"the loss is {total} at step {step}: the largest |zU| was {largest:.3g}; lower learning_rate, or "
                    "normalize"
                )
            if not self._warned and largest > LARGEST:
                self._warned = True
                warnings.warn(
                    f"|zU| reaches {largest:.3g}, more than {LARGEST:g}: its powers may explode; set normalize=True or "
                    "lower learning_rate",
                    stacklevel=2,
                )

    @property
    def losses(self) -> list[float]:
        """Mean squared error of each step.

        Raises
        ------
        NotConverged
            A loss that was not read yet is not finite.
        """
        self._read()
        return self._losses

    @property
    def last_loss(self) -> float | str:
        """The last loss that was read, without a wait."""
        return self._losses[-1] if self._losses else "not read yet"

    @property
    def dead_share(self) -> float:
        """Share of latents that did not fire in the last ``dead_after`` steps, or in the later half of fewer."""
        window = max(1, min(self.made.dead_after, (self.n_steps + 1) // 2))
        return float((self.since_fired >= window).double().mean())


def train_on(
    made: Any, trainer: Trainer, store: ActivationStore, n_steps: int, batch: int, checkpoint: Path | None, every: int
) -> None:
    """Take steps up to number ``n_steps``, from where the trainer stands; write the checkpoint now and then."""
    per_pass = store.n_batches(batch)
    label = f"{made.module_.num_latents} latents"
    facts = None if checkpoint is None else store.facts()
    guard = first_interrupt_finishes() if checkpoint is not None else contextlib.nullcontext()
    with guard as asked, Progress(label, n_steps, enabled=bool(made.verbose)) as shown:
        shown.advance(trainer.n_steps)
        while trainer.n_steps < n_steps:
            epoch, start = divmod(trainer.n_steps, per_pass)
            with contextlib.closing(store.batches(batch, seed=trainer.seed, epoch=epoch, start=start)) as batches:
                for rows in batches:
                    trainer.step(rows, trainer.n_steps / n_steps)
                    shown.advance(loss=trainer.last_loss)
                    done = trainer.n_steps
                    stopped = asked is not None and asked.requested
                    if checkpoint is not None and (done % every == 0 or done == n_steps or stopped):
                        made._write(checkpoint, batch, facts)
                    if stopped:
                        raise KeyboardInterrupt
                    if done >= n_steps:
                        break
