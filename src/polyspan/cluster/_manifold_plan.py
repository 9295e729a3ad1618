"""What :class:`ManifoldLinearizingClustering` was asked for, checked and turned into a plan of training."""

import math
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from ._manifold_network import Source
from ._manifold_training import Plan
from ._training_checkpoints import seed_word
from .rate_reduction import RateReductionLoss, TotalCodingRateLoss

TCR_STEPS, TCR_STEPS_ALONE, STEPS, EPOCHS = 200, 50, 100, 20


def check_parameters(given: Any, n: int) -> None:
    """Refuse parameters of :class:`ManifoldLinearizingClustering` that are out of range for n rows."""
    whole = ("n_clusters", 1), ("n_views", 1), ("membership_rows", 2)
    sizes = ("n_components", 1), ("hidden", 1), ("tcr_epochs", 0), ("max_epochs", 0), ("batch_size", 2)
    for name, least in whole + sizes:
        value = getattr(given, name)
        if (name, least) in sizes and isinstance(value, str) and value == "auto":
            continue
        if isinstance(value, bool) or not (isinstance(value, int | np.integer) and value >= least):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    for name in ("eps2", "gamma", "tcr_weight", "tcr_lr", "lr", "weight_decay", "cluster_weight_decay"):
        if not isinstance(getattr(given, name), Real):
            raise ValueError(f"{name} must be a number, got {getattr(given, name)!r}")
    for name in ("tcr_lr", "lr", "weight_decay", "cluster_weight_decay"):
        if not 0 <= getattr(given, name) < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {getattr(given, name)!r}")
    if given.optimizer not in ("adam", "sgd"):
        raise ValueError(f"optimizer must be 'adam' or 'sgd', got {given.optimizer!r}")
    if given.eta != "auto" and (isinstance(given.eta, str) or not 0 < given.eta < math.inf):
        raise ValueError(f"eta must be a positive number or 'auto', got {given.eta!r}")
    if not (given.augment is None or callable(given.augment) or given.augment == "image"):
        raise ValueError(f"augment must be callable, 'image' or None, got {given.augment!r}")
    if n < 2 * given.n_clusters:
        raise ValueError(
            f"X must have at least 2 rows a cluster, {2 * given.n_clusters} for k={given.n_clusters}, got {n}"
        )
    if given.membership_rows < 2 * given.n_clusters:
        raise ValueError(f"membership_rows must be at least 2 a cluster, got {given.membership_rows}")


def make_plan(given: Any, source: Source, batch: int, views: Any) -> Plan:
    """Return what training is to do, with what was left to it filled in."""
    steps = max(1, source.n // batch)
    tcr, main = given.tcr_epochs, given.max_epochs
    if tcr == "auto":
        tcr = -(-(TCR_STEPS if views is not None else TCR_STEPS_ALONE) // steps)
    if main == "auto":
        main = max(EPOCHS, -(-STEPS // steps))
    params = {name: repr(value) for name, value in given.get_params(deep=False).items() if name != "verbose"}
    for name in ("checkpoint", "device", "backbone", "augment", "init"):
        params.pop(name)
    params["random_state"] = seed_word(given.random_state)
    return Plan(
        tcr_epochs=0 if given.init != "tcr" else int(tcr),
        epochs=int(main),
        batch=batch,
        n_clusters=int(given.n_clusters),
        n_views=int(given.n_views) if views is not None else 1,
        augment=views,
        eta=given.eta,
        tcr=TotalCodingRateLoss(given.eps2, given.tcr_weight),
        loss=RateReductionLoss(given.eps2, given.gamma, top=given.membership_top),
        optimizer=given.optimizer,
        rates=(float(given.tcr_lr), float(given.lr)),
        decays=(float(given.weight_decay), float(given.cluster_weight_decay)),
        bfloat16=bool(given.bfloat16),
        checkpoint=None if given.checkpoint is None else Path(given.checkpoint),
        params=params | {"tcr_epochs": str(tcr), "max_epochs": str(main)},
        verbose=bool(given.verbose),
    )
