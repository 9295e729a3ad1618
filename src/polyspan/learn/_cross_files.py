"""Fitted classifiers and regressors of tables on disk, with the state of their training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import constructor_params, save_fitted

from ._older_files import check_names


def write_estimator(made: Any, path: Path, about: Mapping[str, Any], more: Mapping[str, np.ndarray]) -> Path:
    """Write a fitted estimator; ``about`` and ``more`` are facts and arrays of a training that is to go on."""
    init = {k: list(v) if isinstance(v, tuple) else v for k, v in constructor_params(made).items()}
    named = hasattr(made, "feature_names_in_")
    params = {
        "init": init,
        "names": [str(n) for n in made.feature_names_in_] if named else None,
        "n_features_in": made.n_features_in_,
        "categorical": made.categorical_features_,
        "dense": made.dense_features_,
        "lists": made._lists,
        "embedding": None if made.network_.embedding is None else made.network_.embedding.config(),
        "target": made._facts(),
        "seed": made._seed,
        "n_iter": made.n_iter_,
        "n_truncated": made.n_truncated_,
        "training": dict(about),
    }
    arrays: dict[str, np.ndarray] = {"mean": made._mean, "scale": made._scale}
    arrays["losses"] = np.array(made.loss_curve_)
    arrays |= {f"network {n}": v.detach().cpu().numpy() for n, v in made.network_.state_dict().items()}
    if made.network_.embedding is not None:
        arrays |= {f"vocabulary {n}": v for n, v in made.network_.embedding.vocabularies.items()}
    for i, optimizer in enumerate(made._optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            arrays |= {f"state {i} {j} {n}": np.asarray(v.detach().cpu().numpy()) for n, v in state.items()}
    arrays |= more
    arrays = {name: value.reshape(1) if value.ndim == 0 else value for name, value in arrays.items()}
    return save_fitted(path, kind=type(made).__name__, arrays=arrays, params=params)


def restore_estimator(made: Any, found: Any) -> None:
    """Give an estimator what :func:`write_estimator` wrote of it."""
    from polyspan.run import pick_device, torch_generator

    from ._cross_network import CrossNetwork
    from .unified_embedding import UnifiedEmbedding

    params, arrays = found.params, found.arrays
    made.n_features_in_ = params["n_features_in"]
    if params["names"] is not None:
        made.feature_names_in_ = np.array(params["names"], dtype=object)
    made.categorical_features_, made.dense_features_ = params["categorical"], params["dense"]
    made._lists, made._seed = params["lists"], params["seed"]
    made.n_iter_, made.n_truncated_ = params["n_iter"], params["n_truncated"]
    made._mean, made._scale = np.array(arrays["mean"]), np.array(arrays["scale"])
    made.loss_curve_ = arrays["losses"].tolist()
    made._set_facts(params["target"])
    embedding, generator = None, torch_generator(0)  # all that it draws is replaced
    if params["embedding"] is not None:
        words = {n: arrays[f"vocabulary {n}"] for n in made.categorical_features_ if f"vocabulary {n}" in arrays}
        embedding = UnifiedEmbedding.from_config(params["embedding"], vocabularies=words or None, generator=generator)
    made.network_ = CrossNetwork(
        embedding,
        len(made.dense_features_),
        made._num_out,
        num_cross=made.n_cross,
        hidden=tuple(made.hidden),
        generator=generator,
    )
    state = _tensors(arrays, "network ")
    check_names(made.network_.state_dict(), state)
    made.network_.load_state_dict(state)
    made.network_.to(pick_device(made.device)).eval()
    made._make_optimizers()
    for i, optimizer in enumerate(made._optimizers):
        state = optimizer.state_dict()
        for j in range(sum(len(group["params"]) for group in optimizer.param_groups)):
            mine = _tensors(arrays, f"state {i} {j} ")
            if mine:
                state["state"][j] = {n: v.reshape(()) if n == "step" else v for n, v in mine.items()}
        optimizer.load_state_dict(state)


def _tensors(arrays: Mapping[str, np.ndarray], head: str) -> dict[str, Any]:
    import torch

    return {n.removeprefix(head): torch.from_numpy(np.array(v)) for n, v in arrays.items() if n.startswith(head)}
