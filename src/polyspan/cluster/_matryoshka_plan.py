"""Parameters of nested clustering: checked, and turned into a plan of training."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._manifold_network import Source
from ._matryoshka_encoders import RandomCrop, encode, make_views
from ._matryoshka_training import Network, Plan
from ._training_checkpoints import seed_word

MASKS = ("cyclic", "block")
ENCODERS = ("auto", "transformer")


def check_parameters(given: Any, n: int) -> None:
    """Refuse parameters out of range, for n rows."""
    whole = {"n_components": 1, "hidden": 1, "bottleneck": 1, "n_layers": 1, "patch_size": 1, "n_local": 0}
    whole |= {"max_steps": 1, "sinkhorn_rounds": 1, "n_prototypes": 2, "batch_size": 2, "n_clusters": 1}
    words = {"n_prototypes": "auto", "batch_size": "auto", "n_clusters": None}
    for name, least in whole.items():
        value = getattr(given, name)
        if name in words and (value is None if words[name] is None else isinstance(value, str) and value == "auto"):
            continue
        if not (isinstance(value, int | np.integer) and value >= least):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    for name in ("lr", "student_temperature", "clip"):
        if not 0 < getattr(given, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(given, name)!r}")
    for name in ("koleo_weight", "ibot_weight", "patch_lr_share"):
        if not 0 <= getattr(given, name) < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {getattr(given, name)!r}")
    for name in ("warmup_share", "frozen_share", "momentum", "mask_probability", "drop_path"):
        value = getattr(given, name)
        if name == "momentum" and isinstance(value, str) and value == "auto":
            continue
        if isinstance(value, str) or not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(given, name)!r}")
    for name, low, high in (
        ("local_scale", 0, 1),
        ("global_scale", 0, 1),
        ("mask_ratio", 0, 1),
        ("weight_decay", -1, math.inf),
        ("teacher_temperature", 0, math.inf),
    ):
        pair = getattr(given, name)
        if pair is not None and not (len(pair) == 2 and all(low < value <= high for value in pair)):
            raise ValueError(f"{name} must be two numbers above {low} and at most {high}, got {pair!r}")
    if not 0 < given.local_side <= 1:
        raise ValueError(f"local_side must lie above 0 and at most at 1, got {given.local_side!r}")
    if not (isinstance(given.encoder, torch.nn.Module) or given.encoder in ENCODERS):
        raise ValueError(f"encoder must be 'auto', 'transformer' or a Module, got {given.encoder!r}")
    if given.mask is not None and given.mask not in MASKS:
        raise ValueError(f"mask must be one of {MASKS} or None, got {given.mask!r}")
    if not (given.augment is None or callable(given.augment) or given.augment in ("auto", "image")):
        raise ValueError(f"augment must be callable, 'image', 'auto' or None, got {given.augment!r}")
    if given.n_clusters is not None and n < given.n_clusters:
        raise ValueError(f"X must have at least n_clusters={given.n_clusters} rows, got {n}")


def _pair(values: Any) -> tuple[float, float]:
    first, second = values
    return float(first), float(second)


def make_plan(given: Any, source: Source, batch: int, network: Network) -> Plan:
    """Turn the parameters of the clusterer into a plan of training."""
    shape = source.shape
    if shape is None and (given.n_local or given.global_scale is not None or given.mask is not None):
        raise ValueError("image_shape must be given, or X be images, for n_local, global_scale and mask")
    local = crop = grid = None
    patch = int(given.patch_size)
    if shape is not None:
        h, w = shape[1:]
        grid = (h // patch, w // patch)
        if given.global_scale is not None:
            crop = RandomCrop(_pair(given.global_scale), (h, w))
        sides = [max(patch, int(given.local_side * side) // patch * patch) for side in (h, w)]
        if given.n_local:
            local = RandomCrop(_pair(given.local_scale), (sides[0], sides[1]))
    if given.mask is not None and grid is not None and source.shape is not None:
        with torch.no_grad():
            patches = encode(copy.deepcopy(network.encoder).eval(), torch.zeros(1, *source.shape))[1]
        if patches is None or patches.shape[1] != math.prod(grid):
            raise ValueError(
                f"patch_size must give the encoder's {0 if patches is None else patches.shape[1]} patches, "
                f"got {patch}, which gives {grid[0]} by {grid[1]}"
            )
    momentum: Any = given.momentum
    momentum = min(0.994, max(0.8, 1 - 5 / given.max_steps)) if momentum == "auto" else float(momentum)
    params = {name: repr(value) for name, value in given.get_params(deep=False).items()}
    for name in ("checkpoint", "device", "encoder", "augment", "verbose", "n_clusters"):
        params.pop(name)
    params["random_state"] = seed_word(given.random_state)
    return Plan(
        steps=int(given.max_steps),
        batch=batch,
        views=make_views(given.augment, shape),
        crop=crop,
        local=local,
        n_local=int(given.n_local),
        mask=given.mask,
        mask_ratio=_pair(given.mask_ratio),
        mask_probability=float(given.mask_probability),
        grid=grid,
        lr=float(given.lr),
        weight_decay=_pair(given.weight_decay),
        momentum=momentum,
        student_temperature=float(given.student_temperature),
        teacher_temperature=_pair(given.teacher_temperature),
        rounds=int(given.sinkhorn_rounds),
        koleo=float(given.koleo_weight),
        ibot=float(given.ibot_weight),
        clip=float(given.clip),
        warmup=float(given.warmup_share),
        frozen=float(given.frozen_share),
        patch_lr=float(given.patch_lr_share),
        checkpoint=None if given.checkpoint is None else Path(given.checkpoint),
        params=params,
        verbose=bool(given.verbose),
    )
