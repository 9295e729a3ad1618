"""Sparse autoencoders on disk: their own files, with the state of training, and those of SAELens and PolySAE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyspan.errors import WrongContent
from polyspan.io import atomic_directory, load_fitted, read_json, read_members, save_fitted, write_json, write_members

from ._older_files import all_entries, check_names

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FREE = ("verbose", "device", "sparse_output")
"""Parameters that may differ between a checkpoint and the training that goes on from it."""


def _plain(params: Mapping[str, Any]) -> dict[str, Any]:
    made = {name: list(value) if isinstance(value, tuple) else value for name, value in params.items()}
    if not isinstance(made["random_state"], int | None):
        made["random_state"] = None
    return made


def write_estimator(made: Any, path: Path, training: Mapping[str, Any]) -> Path:
    """Write a fitted estimator; ``training`` says of which data and batches a checkpoint is."""
    trainer = made._trainer
    losses = np.array(trainer.losses, np.float64)
    params = {
        "init": _plain(made.get_params()),
        "module": made.module_.config(),
        "scale": made.scale_,
        "seed": trainer.seed,
        "n_tokens": trainer.n_tokens,
        "n_features_in": made.n_features_in_,
        "names": [str(n) for n in made.feature_names_in_] if hasattr(made, "feature_names_in_") else None,
        "training": dict(training),
    }
    arrays = {f"module {name}": value.detach().cpu().numpy() for name, value in made.module_.state_dict().items()}
    for i, state in trainer.optimizer.state_dict()["state"].items():
        arrays |= {f"state {i} {name}": value.detach().cpu().numpy() for name, value in state.items()}
    arrays["since fired"] = trainer.since_fired.cpu().numpy()
    arrays["dead"] = trainer.dead.cpu().numpy()
    arrays["losses"] = losses
    arrays = {name: value.reshape(1) if value.ndim == 0 else value for name, value in arrays.items()}
    return save_fitted(path, kind=type(made).__name__, arrays=arrays, params=params)


def read_estimator(kind: type, path: Path) -> Any:
    """Read what :func:`write_estimator` wrote."""
    found = load_fitted(path, kind=kind.__name__)
    with all_entries(path, found.header):
        init = dict(found.params["init"])
        for name in ("ranks", "lambda_init", "prefixes"):
            init[name] = None if init[name] is None else tuple(init[name])
        made = kind(**init)
        _restore(made, found)
    made._settle()
    return made


def _restore(made: Any, found: Any) -> None:
    import torch

    from polyspan.run import pick_device, torch_generator

    from ._sae_training import Trainer
    from .polynomial_sae_module import PolynomialSAEModule

    params, arrays = found.params, found.arrays
    made.n_features_in_ = params["n_features_in"]
    if params["names"] is not None:
        made.feature_names_in_ = np.array(params["names"], dtype=object)
    # All that the generator draws is replaced.
    module = PolynomialSAEModule(**params["module"], generator=torch_generator(0), dtype=torch.float32)
    mine = {name: value.shape for name, value in module.state_dict().items()}
    state = _tensors(arrays, "module ")
    check_names(module.state_dict(), state)
    module.load_state_dict({name: value.reshape(mine[name]) for name, value in state.items()})
    trainer = Trainer(made, module.to(pick_device(made.device)), params["scale"], params["seed"])
    whole = trainer.optimizer.state_dict()
    for i in range(len(whole["param_groups"][0]["params"])):
        part = _tensors(arrays, f"state {i} ")
        shape = list(module.parameters())[i].shape
        if part:
            whole["state"][i] = {n: v.reshape(() if n == "step" else shape) for n, v in part.items()}
    trainer.optimizer.load_state_dict(whole)
    since = torch.from_numpy(np.array(arrays["since fired"]))
    # The first files do not hold which latents are dead: it was looked at in each step, by this rule.
    dead = torch.from_numpy(np.array(arrays["dead"])) if "dead" in arrays else _silent(since, made.dead_after)
    trainer.restore(arrays["losses"].tolist(), params["n_tokens"], since, dead)
    made._adopt(trainer)


def _silent(since_fired: Any, steps: int) -> Any:
    """Return the numbers of the latents that have not fired for so many steps."""
    return (since_fired >= steps).nonzero()[:, 0]


def _tensors(arrays: Mapping[str, np.ndarray], head: str) -> dict[str, Any]:
    import torch

    return {n.removeprefix(head): torch.from_numpy(np.array(v)) for n, v in arrays.items() if n.startswith(head)}


def resume(made: Any, path: Path, batch: int, facts: Mapping[str, Any]) -> None:
    """Go on from a checkpoint, which must be of the same data and parameters.

    Raises
    ------
    ValueError
        It is of others; the parameters that differ are named.
    """
    found = load_fitted(path, kind=type(made).__name__)
    with all_entries(path, found.header):
        _resume(made, path, batch, facts, found)


def _resume(made: Any, path: Path, batch: int, facts: Mapping[str, Any], found: Any) -> None:
    mine, theirs = _plain(made.get_params()), found.params["init"]
    # A cosine's course hangs on its length; a constant rate's does not.
    free = (*FREE, "max_tokens") if made.schedule == "constant" else FREE
    other = [name for name in mine if name not in free and theirs.get(name) != mine[name]]
    if other or found.params["training"] != {"batch": batch, "data": facts}:
        what = ", ".join(f"{name}={theirs.get(name)!r}" for name in other) or "other data"
        raise ValueError(f"checkpoint must be of this training, got {path.name} with {what}")
    _restore(made, found)


# Files of SAELens and PolySAE.


def write_saelens(made: Any, folder: Path, metadata: Mapping[str, Any], placeholders: bool) -> Path:
    """Write ``cfg.json`` and ``sae_weights.safetensors`` with the scale folded in."""
    module, s = made.module_, made.scale_
    if module.cross_only and module.order > 1:
        raise ValueError("cross_only must be False for cfg.json and sae_weights.safetensors, which cannot say it")
    state = {name: value.detach().cpu().numpy() for name, value in module.state_dict().items()}
    arrays = {name: state[name] for name in ("W_enc", "b_enc", "b_dec")}
    jumps = module.activation != "topk"
    if jumps:
        filled = module.threshold.detach().cpu().expand(module.num_latents)
        arrays["threshold"] = np.ascontiguousarray(filled.numpy())
    config: dict[str, Any] = {
        "architecture": "jumprelu" if jumps else "topk",
        "d_in": module.in_features,
        "d_sae": module.num_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": dict(metadata),
    }
    if not jumps:
        config |= {"k": module.k, "rescale_acts_by_decoder_norm": False}
    if module.order == 1:
        arrays["W_dec"] = state["W_dec"]
    else:
        config["architecture"] = "poly_" + config["architecture"]
        config |= {
            "poly_ranks": list(module.ranks),
            "poly_order": sum(rank > 0 for rank in module.ranks),
            "shared_u": module.shared,
            "lambda2_init": module.lambda_init[0],
            "lambda3_init": module.lambda_init[1],
        }
        arrays |= {name: value for name, value in state.items() if name[0] in "UC" or name.startswith("lambda")}
    for name in ("W_dec", "C1", "C2", "C3", "b_dec"):
        if name in arrays:
            arrays[name] = arrays[name] / np.float32(s)
    arrays["W_enc"] = arrays["W_enc"] * np.float32(s)
    if placeholders and module.order > 1:
        arrays["W_dec"] = made.components_.astype(np.float32)
        empty = {"lambda2": np.zeros((), np.float32), "lambda3": np.zeros((), np.float32)}
        for i, rank in enumerate(module.ranks, start=1):
            empty[f"U{i}"] = np.zeros((module.num_latents, rank), np.float32)
            empty[f"C{i}"] = np.zeros((module.in_features, rank), np.float32)
        arrays = empty | arrays
    with atomic_directory(folder) as temp:
        write_members(temp / WEIGHTS, arrays)
        write_json(temp / CONFIG, config)
    return folder


def read_saelens(kind: type, folder: Path) -> Any:
    """Read ``cfg.json`` and ``sae_weights.safetensors`` into a fitted estimator of scale 1."""
    import torch

    from ._sae_training import Trainer
    from .polynomial_sae_module import PolynomialSAEModule

    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise WrongContent(folder / CONFIG, found=type(config).__name__, expected="an object")
    arrays = read_members(folder / WEIGHTS)
    about = _About(folder, config, arrays)
    options = about.options()
    arrays = about.folded()
    try:
        module = PolynomialSAEModule(**options, generator=None, device="meta", dtype=torch.float32)
    except ValueError as error:
        raise WrongContent(folder / CONFIG, found=str(error), expected="sizes that fit together") from error
    module = module.to_empty(device="cpu")
    state = module.state_dict()
    wanted = {name: value for name, value in state.items() if name != "bandwidth"}
    for name, value in wanted.items():
        about.need(name, tuple(value.shape))
        value.copy_(torch.from_numpy(np.array(arrays[name], np.float32)).reshape(value.shape))
    if module.activation == "jumprelu":
        thresholds = state["threshold"]
        if bool((thresholds < 0).any()):
            raise WrongContent(folder / WEIGHTS, found="a negative threshold", expected="none", where="threshold")
        state["bandwidth"].fill_(float(thresholds.mean().clamp(min=1e-3)) / 2)
    made = kind(
        n_components=module.num_latents,
        k=module.k,
        ranks=module.ranks,
        order=module.order,
        shared=module.shared,
        activation=module.activation,
        normalize=False,
    )
    made.n_features_in_ = module.in_features
    made._adopt(Trainer(made, module, 1.0, 0))
    made._settle()
    return made


class _About:
    """What a configuration says, checked against the weights beside it."""

    def __init__(self, folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.folder, self.config, self.arrays = folder, config, dict(arrays)

    def wrong(self, found: str, expected: str) -> WrongContent:
        return WrongContent(self.folder / CONFIG, found=found, expected=expected)

    def number(self, name: str, least: int = 1) -> int:
        value = self.config.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(f"{name} = {value!r}", f"a whole number from {least} on")
        return value

    def need(self, name: str, shape: tuple[int, ...]) -> None:
        path = self.folder / WEIGHTS
        if name not in self.arrays:
            raise WrongContent(path, found=f"tensors {sorted(self.arrays)}", expected=f"a tensor {name}")
        found = self.arrays[name].shape
        if found != shape and not (shape == () and found == (1,)):
            raise WrongContent(path, found=f"shape {found}", expected=f"{shape}", where=f"tensor {name}")

    def options(self) -> dict[str, Any]:
        """Return what makes the module."""
        config = self.config
        kind = config.get("architecture")
        if kind == "standard" and config.get("activation_fn_str") == "topk":
            # Before SAELens 6 the activation stood apart.
            kind, extra = "topk", config.get("activation_fn_kwargs")
            config["k"] = extra.get("k") if isinstance(extra, dict) else None
        if kind not in ("poly_topk", "poly_jumprelu", "topk", "jumprelu", "standard"):
            raise self.wrong(
                f"architecture = {kind!r}", "poly_topk, poly_jumprelu, topk, jumprelu or standard"
            )  # fmt: skip
        for name in ("normalize_activations", "reshape_activations"):
            if config.get(name, "none") not in ("none", None):
                raise self.wrong(f"{name} = {config[name]!r}", "'none'")
        d, m = self.number("d_in"), self.number("d_sae")
        jumps = not kind.endswith("topk")
        if kind == "standard":
            self.arrays["threshold"] = np.zeros(m, np.float32)
        made: dict[str, Any] = {
            "in_features": d,
            "num_latents": m,
            "k": min(32, m) if jumps else self.number("k"),
            "activation": "jumprelu" if jumps else "topk",
            "order": 1,
        }
        if not kind.startswith("poly_"):
            return made
        order, ranks = self.number("poly_order"), config.get("poly_ranks")
        if ranks is None:
            ranks = [self.config.get("poly_rank") or d] * 3
        if not (isinstance(ranks, list) and len(ranks) == 3 and all(type(r) is int and r >= 0 for r in ranks)):
            raise self.wrong(f"poly_ranks = {ranks!r}", "three whole numbers, none negative")
        if order > 3:
            raise self.wrong(f"poly_order = {order}", "1, 2 or 3")
        ranks = [rank if i < order else 0 for i, rank in enumerate(ranks)]
        return made | {"order": 3, "ranks": ranks, "shared": bool(config.get("shared_u", False))}

    def folded(self) -> dict[str, np.ndarray]:
        """Return the weights with rescaled codes and an uncentred input folded in."""
        arrays, m, d = self.arrays, self.config["d_sae"], self.config["d_in"]
        for name, shape in (("W_enc", (d, m)), ("b_enc", (m,)), ("b_dec", (d,))):
            self.need(name, shape)
        if self.config.get("rescale_acts_by_decoder_norm", False):
            self.need("W_dec", (m, d))
            norms = np.linalg.norm(arrays["W_dec"], axis=1)
            arrays["W_enc"], arrays["b_enc"] = arrays["W_enc"] * norms, arrays["b_enc"] * norms
            safe = np.where(norms > 0, norms, 1)
            for name in ("W_dec", "U_shared", "U1", "U2", "U3"):
                if name in arrays and arrays[name].ndim == 2 and len(arrays[name]) == m:
                    arrays[name] = arrays[name] / safe[:, None]
        if not self.config.get("apply_b_dec_to_input", True):
            arrays["b_enc"] = arrays["b_enc"] + arrays["b_dec"] @ arrays["W_enc"]
        return arrays
