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
THRESHOLD_RATE = 0.01


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
    if aux_coef and bool(dead.any()):
        total = total + aux_coef * _dead_loss(module, x, residual.detach(), dead.nonzero()[:, 0])
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
    """Return the power of two that brings rows (n, d) nearest to a mean length of √d: folding it is exact."""
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
    """The state of a training: the optimiser, when each latent last fired, and the losses so far."""

    def __init__(self, made: Any, module: PolynomialSAEModule, scale: float, seed: int):
        self.made, self.module, self.scale, self.seed = made, module, scale, seed
        self.optimizer = torch.optim.Adam(module.parameters(), lr=made.learning_rate, fused=True)
        self.since_fired = torch.zeros(module.num_latents, dtype=torch.int64, device=module.W_enc.device)
        self.losses: list[float] = []
        self.n_tokens = 0
        self._warned = False

    def step(self, rows: np.ndarray, share: float = 0.0) -> float:
        """Take one step on rows (b, d); ``share`` of the training lies behind it. Return the mean squared error.

        Raises
        ------
        NotConverged
            The loss is no longer finite.
        """
        made, module = self.made, self.module
        x = torch.from_numpy(np.ascontiguousarray(rows, np.float32)).to(module.W_enc.device) * self.scale
        module.train()
        found = step_loss(
            module, x, self.since_fired >= made.dead_after, aux_coef=made.aux_coef, l0_coef=made.l0_coef
        )  # fmt: skip
        mse = float(found.mse)
        if not math.isfinite(mse):
            raise NotConverged(
                f"the loss is {mse} at step {len(self.losses)}: the largest |zU| was {float(found.largest):.3g}; lower "
                "learning_rate, or normalize"
            )
        self.optimizer.zero_grad(set_to_none=True)
        found.total.backward()
        if made.clip_norm:
            torch.nn.utils.clip_grad_norm_(module.parameters(), made.clip_norm)
        fall = (1 + math.cos(math.pi * share)) / 2 if made.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = made.learning_rate * fall
        self.optimizer.step()
        if (len(self.losses) + 1) % made.retract_every == 0:
            module.retract_(made.retraction)
        self._note(found)
        self.losses.append(mse / self.scale**2)
        self.n_tokens += len(rows)
        module.eval()
        return self.losses[-1]

    @torch.no_grad()
    def _note(self, found: StepLoss) -> None:
        """Keep count of what fired, and of the threshold at which as many fire as in training."""
        firing = found.codes.values > 0
        self.since_fired += 1
        self.since_fired[found.codes.indices[firing]] = 0
        if self.module.activation in ("batchtopk", "matryoshka") and bool(firing.any()):
            least = found.codes.values[firing].min()
            threshold = self.module.threshold
            threshold.copy_(torch.where(threshold == 0, least, torch.lerp(threshold, least, THRESHOLD_RATE)))
        if not self._warned and float(found.largest) > LARGEST:
            self._warned = True
            warnings.warn(
                f"|zU| reaches {float(found.largest):.3g}, more than {LARGEST:g}: its powers may explode; set "
                "normalize=True or lower learning_rate",
                stacklevel=2,
            )

    @property
    def dead_share(self) -> float:
        """Share of latents that did not fire in the last ``dead_after`` steps, or in the later half of fewer."""
        window = max(1, min(self.made.dead_after, (len(self.losses) + 1) // 2))
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
        shown.advance(len(trainer.losses))
        while len(trainer.losses) < n_steps:
            epoch, start = divmod(len(trainer.losses), per_pass)
            with contextlib.closing(store.batches(batch, seed=trainer.seed, epoch=epoch, start=start)) as batches:
                for rows in batches:
                    loss = trainer.step(rows, len(trainer.losses) / n_steps)
                    shown.advance(loss=loss)
                    done = len(trainer.losses)
                    stopped = asked is not None and asked.requested
                    if checkpoint is not None and (done % every == 0 or done == n_steps or stopped):
                        made._write(checkpoint, batch, facts)
                    if stopped:
                        raise KeyboardInterrupt
                    if done >= n_steps:
                        break
