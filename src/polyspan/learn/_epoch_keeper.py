"""Which epoch was the best on rows held out, and when to stop."""

from collections.abc import Mapping
from typing import Any

import numpy as np


class EpochKeeper:
    """Keep the weights of the epoch with the least loss on rows held out, and say when to stop."""

    def __init__(self, estimator: Any, patience: int):
        self.estimator, self.patience = estimator, patience
        self.losses: list[float] = []
        self.best: dict[str, Any] | None = None

    @property
    def done(self) -> bool:
        """Whether the last epochs brought no better loss."""
        return bool(self.losses) and len(self.losses) - 1 - int(np.argmin(self.losses)) >= self.patience

    def take(self, loss: float) -> bool:
        """Note the loss of an epoch, keep its weights if it is the least, and say whether to stop."""
        self.losses.append(loss)
        if loss <= min(self.losses):
            self.best = {name: value.detach().clone() for name, value in self.estimator.network_.state_dict().items()}
        return self.done

    def restore(self) -> None:
        """Put the best weights back."""
        if self.best is not None:
            self.estimator.network_.load_state_dict(self.best)
        self.estimator.validation_losses_ = list(self.losses)

    def arrays(self) -> dict[str, np.ndarray]:
        return {} if self.best is None else {f"best {n}": v.cpu().numpy() for n, v in self.best.items()}

    def resume(self, losses: list[float], arrays: Mapping[str, np.ndarray]) -> None:
        import torch

        self.losses = list(losses)
        best = {n.removeprefix("best "): torch.from_numpy(np.array(v)) for n, v in arrays.items() if n[:5] == "best "}
        self.best = best or None
