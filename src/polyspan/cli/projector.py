"""``polyspan projector convert`` and ``directions``: low-rank orthogonal weights in a generator's checkpoint."""

import math
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from ._output import check_target, say, show_json, show_table
from ._pictures import Out
from ._places import check_places

VECTORS = ("out_vectors", "in_vectors", "signs", "gain")
PARAMETRISED = {
    "parametrizations.weight.original0": "out_vectors",
    "parametrizations.weight.original1": "in_vectors",
    "parametrizations.weight.0.signs": "signs",
    "parametrizations.weight.0.fixed_gain": "gain",
    "parametrizations.weight.original2": "gain",
}
NUMERICAL_RANK = 1e-6


def convert(
    checkpoint: Path,
    *,
    weights: str,
    out: Out,
    rank: int = 10,
    gain: str = "mean",
    directions: Path | None = None,
    json: bool = False,
) -> None:
    """Make weights of a checkpoint low-rank orthogonal, and say what each layer lost.

    Each becomes a multiple of a partial isometry on its leading singular directions. Names, shapes and dtypes stay, all
    other tensors as well: the code that made the checkpoint loads the result. Fine-tune it shortly afterwards; weights
    are not held orthogonal then, for which polyspan.nn.project_model is there.

    Parameters
    ----------
    checkpoint : Path
        A .safetensors file, or a folder of them.
    weights : str
        Names of weights, with * and ?, alternatives between bars, such as "*.affine.weight|*.modulation.weight".
    out : Path
        The converted checkpoint, one .safetensors file.
    rank : int
        Directions each weight keeps.
    gain : str
        The singular value that they all get: "mean", that of the weight's leading ones, or a number.
    directions : Path
        Keep the directions as well (.npz or .safetensors), which the weights alone do not tell: any turn of them within
        their space gives the same weight.
    json : bool
        Print JSON.
    """
    from polyspan.io import ShardedState, save_fitted, write_tensor_file
    from polyspan.nn import Directions, project_weights, save_directions

    check_target(out, "--out", ".safetensors")
    check_target(directions, "--directions", ".npz", ".safetensors")
    size = _gain(gain)
    state = ShardedState(checkpoint)
    check_places(read=_files(checkpoint, state), out=out, directions=directions)
    with warnings.catch_warnings():
        # What it says of a weight's rank is said below, with the weight's name.
        warnings.filterwarnings("ignore", "weight has numerical rank", UserWarning)
        try:
            made, found = project_weights(state, weights, rank, gain=size)
        except ValueError as error:
            if str(error).startswith("pattern "):
                raise ValueError(f"--weights{str(error).removeprefix('pattern')}") from None
            raise
    layers = [_lost(name, state[name], made[name], vectors) for name, vectors in found.items()]
    header = _header(checkpoint)
    if header is None:
        write_tensor_file(out, made)
    else:
        save_fitted(out, arrays=made, **header)
    if directions is not None:
        kept = {
            layer["weight"].removesuffix(".weight"): Directions(
                _wide(vectors), _wide(vectors).new_full((rank,), layer["gain"])
            )
            for layer, vectors in zip(layers, found.values(), strict=True)
        }
        save_directions(kept, directions)
    doubts = [
        f"{layer['weight']} has a rank below {rank}: the directions beyond it are arbitrary"
        for layer in layers
        if layer["spread"] * NUMERICAL_RANK >= 1
    ]
    for doubt in doubts:
        say(f"warning: {doubt}")
    if json:
        written = None if directions is None else str(directions)
        show_json({"out": str(out), "directions": written, "rank": rank, "layers": layers, "warnings": doubts})
        return
    rows = [
        [
            layer["weight"], " x ".join(map(str, layer["shape"])), f"{layer['kept_share']:.4f}",
            f"{layer['changed']:.4f}", f"{layer['spread']:.3g}", f"{layer['gain']:.4g}",
        ]
        for layer in layers
    ]  # fmt: skip
    show_table(f"Rank {rank} in {out}", ("weight", "shape", "kept", "changed", "spread", "gain"), rows)


def directions(
    checkpoint: Path,
    *,
    out: Out,
    method: Literal["householder", "sefa"] = "householder",
    weights: str | None = None,
    count: int | None = None,
    json: bool = False,
) -> None:
    """Export the directions of a checkpoint's layers, unit rows, with the strength of each.

    Parameters
    ----------
    checkpoint : Path
        A .safetensors file, or a folder of them.
    out : Path
        Directions (.npz or .safetensors): members LAYER/vectors and LAYER/values.
    method : {"householder", "sefa"}
        Those of low-rank orthogonal layers as polyspan.nn.project_model puts them into a model, or the right singular
        vectors of plain weights.
    weights : str
        Names of weights, as for convert; must be given for sefa. Left out, all low-rank orthogonal layers.
    count : int
        How many of each layer, the first ones; left out, all.
    json : bool
        Print JSON.
    """
    from polyspan.io import ShardedState
    from polyspan.nn import discover_directions, save_directions

    check_target(out, "--out", ".npz", ".safetensors")
    if method == "sefa" and weights is None:
        raise ValueError("--weights must be given for --method sefa, such as '*.affine.weight'")
    if count is not None and count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    state = ShardedState(checkpoint)
    check_places(read=_files(checkpoint, state), out=out)
    model, names = _plain_layers(state, weights or "") if method == "sefa" else _projected_layers(state, weights)
    try:
        found = discover_directions(model, names, method, num_directions=count)
    except ValueError as error:
        if str(error).startswith("num_directions "):
            raise ValueError(f"--count{str(error).removeprefix('num_directions')}") from None
        raise
    save_directions(found, out)
    if json:
        told = [
            {"layer": name, "size": made.vectors.shape[1], "values": made.values.tolist()}
            for name, made in found.items()
        ]
        show_json({"out": str(out), "method": method, "layers": told})
        return
    rows = [
        [name, *map(str, made.vectors.shape), f"{float(made.values[0]):.4g}", f"{float(made.values[-1]):.4g}"]
        for name, made in found.items()
    ]
    show_table(f"Directions in {out}", ("layer", "directions", "size", "first value", "last value"), rows)


def _gain(text: str) -> str | float:
    if text == "mean":
        return text
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise ValueError(f"--gain must be mean, or a finite number above 0, got {text!r}")
    return size


def _files(checkpoint: Path, state: Any) -> tuple[Path, ...]:
    return (checkpoint, *{state.file(name) for name in state})


def _header(checkpoint: Path) -> dict[str, Any] | None:
    """Return what a file of this library says beside its arrays, without which it could not be loaded; else None."""
    from polyspan.errors import WrongContent
    from polyspan.io import load_fitted

    if checkpoint.is_dir():
        return None
    try:
        found = load_fitted(checkpoint)
    except WrongContent:
        return None
    return {
        "kind": found.kind, "params": found.params, "about": found.about, "data_digest": found.header.get("data"),
    }  # fmt: skip


def _wide(tensor: Any) -> Any:
    """Return a tensor in float32 or wider, a copy where it is narrower."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _lost(name: str, before: Any, after: Any, vectors: Any) -> dict[str, Any]:
    """Say what a weight kept of its squared singular values, how far it moved, and how unequal the kept ones were."""
    import torch

    A, B, V = before.double(), after.double(), vectors.double()
    values, size = torch.linalg.svdvals(A @ V.mT), float(A.norm())
    last = float(values[-1])
    return {
        "weight": name,
        "shape": list(before.shape),
        "kept_share": float(values.square().sum()) / size**2 if size else 1.0,
        "changed": float((A - B).norm()) / size if size else 0.0,
        "spread": float(values[0]) / last if last else math.inf,
        "gain": float((B @ V.mT).norm()) / math.sqrt(len(V)),
    }


def _fits(name: str, pattern: str) -> bool:
    """Whether a name fits one of the patterns; a leading dot lets "*.weight" find one at the top as well."""
    return any(fnmatchcase(name, part) or fnmatchcase(f".{name}", part) for part in pattern.split("|"))


def _no_fit(pattern: str, candidates: list[str]) -> ValueError:
    shown = ", ".join(candidates[:12]) + (", ..." if len(candidates) > 12 else "")
    return ValueError(f"--weights must fit the name of a weight, got {pattern!r}; candidates are {shown or 'none'}")


def _plain_layers(state: Any, pattern: str) -> tuple[Any, list[str]]:
    """Return a model of nothing but the weights that fit, and the names of their layers."""
    from torch import nn

    chosen = [name for name in state if _fits(name, pattern)]
    if not chosen:
        raise _no_fit(pattern, [name for name in state if len(state.shape(name)) == 2])
    model, names = nn.Module(), []
    for name in chosen:
        if not state.dtype(name).is_floating_point:
            raise ValueError(f"{name}: weight must be of floats, got {state.dtype(name)}")
        layer = nn.Module()
        layer.weight = nn.Parameter(_wide(state[name]), requires_grad=False)
        names.append(name.removesuffix(".weight"))
        _place(model, names[-1], layer)
    return model, names


def _projected_layers(state: Any, pattern: str | None) -> tuple[Any, list[str]]:
    """Return a model of nothing but the low-rank orthogonal layers that fit, and their names."""
    from torch import nn

    from polyspan.errors import WrongContent
    from polyspan.nn import HouseholderProjector

    parts: dict[str, dict[str, str]] = {}
    for name in sorted(state):
        for ending, part in {**{part: part for part in VECTORS}, **PARAMETRISED}.items():
            if name.endswith(f".{ending}"):
                parts.setdefault(name.removesuffix(f".{ending}"), {})[part] = name
    whole = {layer: own for layer, own in parts.items() if set(own) == set(VECTORS)}
    if not whole:
        raise ValueError(
            f"{state.path} must hold low-rank orthogonal layers for --method householder, got none; --method sefa "
            "takes plain weights"
        )
    chosen = {layer: own for layer, own in whole.items() if pattern is None or _fits(f"{layer}.weight", pattern)}
    if not chosen:
        raise _no_fit(pattern or "", [f"{layer}.weight" for layer in whole])
    model = nn.Module()
    for layer, own in chosen.items():
        shapes = {part: state.shape(name) for part, name in own.items()}
        (p, r), (d, _) = (tuple(shapes[part]) if len(shapes[part]) == 2 else (0, 0) for part in VECTORS[:2])
        expected = {"out_vectors": (p, r), "in_vectors": (d, r), "signs": (2, r), "gain": ()}
        if shapes != expected or not 1 <= r <= min(p, d):
            raise WrongContent(
                state.path, found=f"shapes {shapes}", expected="(p, r), (d, r), (2, r) and ()", where=layer
            )
        made = HouseholderProjector(d, p, r, bias=False, device="meta")
        made.load_state_dict({part: _wide(state[name]) for part, name in own.items()}, assign=True)
        _place(model, layer, made)
    return model, list(chosen)


def _place(model: Any, name: str, layer: Any) -> None:
    """Put a layer into a model at its dotted name."""
    from torch import nn

    *folders, last = name.split(".")
    for folder in folders:
        if folder not in dict(model.named_children()):
            model.add_module(folder, nn.Module())
        model = model.get_submodule(folder)
    model.add_module(last, layer)
