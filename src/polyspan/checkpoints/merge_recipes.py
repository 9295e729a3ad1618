"""Recipes of merges in YAML, in the style of mergekit, and the merge that a recipe asks for."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyspan.errors import WrongContent, require
from polyspan.io import ShardedState, digest_file, read_members, read_text

from ._hub import local_checkpoint
from ._merge_states import ADAPTER
from ._stored_names import stored_form
from .concrete_merging import ConcreteMerger, adamerging, write_mask
from .merge_files import (
    ALONE,
    STREAMED,
    MergedFiles,
    check_new,
    digests,
    merge_checkpoints,
    weight_files,
    write_shards,
)

LEARNT = ("adamerging", "concrete")
NAMES = {
    "linear": "average", "dare_linear": "dare", "dare_ties": "dare", "concrete_task_arithmetic": "concrete",
    "concrete_adamerging": "concrete",
}  # fmt: skip


class MergeRecipe(NamedTuple):
    """What a merge is made of; paths are as the recipe's folder sees them.

    Attributes
    ----------
    method : str
        "average", "task_arithmetic", "ties", "dare", "adamerging" or "concrete".
    base : Path
    models : dict of str to Path
        By task; a file, a folder, or the folder of a LoRA or Tucker adapter.
    parameters : dict of str to JSON types
        Options of the method.
    weights : list of float, or None
        One a model.
    inputs : dict of str to Path
        Unlabelled inputs by task; empty for methods that need none.
    heads : dict of str to Path
        Weights (classes, d) by task; empty where the network gives logits.
    network : str
        Class of transformers that reads the base, for methods that need inputs.
    ignore_keys : list of str
    """

    method: str
    base: Path
    models: dict[str, Path]
    parameters: dict[str, Any]
    weights: list[float] | None
    inputs: dict[str, Path]
    heads: dict[str, Path]
    network: str
    ignore_keys: list[str]


def read_recipe(path: Path | str, *, method: str | None = None) -> MergeRecipe:
    """Read a merge recipe in the style of mergekit.

    ``merge_method``, ``base_model`` and ``models`` (a list of ``model`` with ``parameters: {weight: ...}``, and here
    also ``name``, ``inputs`` and ``head``) say what is merged; ``parameters`` are options of the method, ``density``
    and ``lambda`` (our ``scaling``) among them. ``ignore_keys`` and ``network`` are ours. An entry that would be
    ignored is an error.
    Source: catalogue entry ``concrete-merging``.

    Parameters
    ----------
    path : path
        A .yaml file; paths in it are relative to its folder. OWNER/NAME that is not there is a name on the hub.
    method : str, optional
        Instead of the recipe's own.

    Raises
    ------
    MissingExtra
        PyYAML is not installed.
    WrongContent
        It is no YAML, or an entry is missing, unknown or of another kind; it is named.
    """
    yaml = require("yaml", extra="hf", purpose="reading a merge recipe")
    path = Path(path)
    text = read_text(path)
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise WrongContent(path, found=f"no YAML ({error})", expected="a merge recipe") from error
    known = {"merge_method", "base_model", "models", "parameters", "ignore_keys", "network"}
    _entries(path, found, known, {"base_model", "models"}, "the recipe")
    if not isinstance(found["base_model"], str):
        raise WrongContent(path, found=repr(found["base_model"]), expected="a path or name", where="base_model")
    called = str(method or found.get("merge_method") or "task_arithmetic").replace("-", "_")
    name = NAMES.get(called, called)
    if name not in (*STREAMED, *LEARNT):
        raise WrongContent(
            path, found=f"merge_method {called!r}", expected=f"one of {', '.join((*STREAMED, *LEARNT, *NAMES))}"
        )
    options = dict(_entries(path, found.get("parameters") or {}, None, set(), "parameters"))
    if "lambda" in options:
        if "scaling" in options:
            raise WrongContent(path, found="lambda and scaling", expected="one of them", where="parameters")
        options["scaling"] = options.pop("lambda")
    if called == "dare_ties":
        options.setdefault("elect", True)
    if called.startswith("concrete_"):
        options.setdefault("method", called.removeprefix("concrete_"))
    models: dict[str, Path] = {}
    parts: dict[str, dict[str, Path]] = {"inputs": {}, "head": {}}
    weights, densities = [], set()
    if not isinstance(found["models"], list) or not found["models"]:
        raise WrongContent(path, found="no list of models", expected="at least one", where="models")
    for i, entry in enumerate(found["models"]):
        where = f"models[{i}]"
        _entries(path, entry, {"model", "name", "parameters", "inputs", "head"}, {"model"}, where)
        for key in ("model", "inputs", "head"):
            if not isinstance(entry.get(key, ""), str):
                raise WrongContent(path, found=f"{key} {entry[key]!r}", expected="a path or name", where=where)
        # Of a folder all of its name: what follows the last point may be half of a version.
        task = str(entry.get("name") or Path(str(entry["model"])).name.removesuffix(".safetensors"))
        if task in models:
            raise WrongContent(path, found=f"{task!r} twice", expected="a name of its own for each model", where=where)
        models[task] = _place(path.parent, str(entry["model"]))
        own = _entries(path, entry.get("parameters") or {}, {"weight", "density"}, set(), f"{where}.parameters")
        for key, value in own.items():
            # Gradients over layers and filters by name are lists in mergekit.
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise WrongContent(path, found=f"{key} {value!r}", expected="one number", where=f"{where}.parameters")
        weights.append(own.get("weight", 1.0))
        densities.add(own.get("density"))
        for key, kept in parts.items():
            if key in entry:
                kept[task] = path.parent / str(entry[key])
    if len(densities) > 1:
        raise WrongContent(path, found="models of several densities", expected="one density for all", where="models")
    density = densities.pop()
    if density is not None:
        options["density"] = density
    base = _place(path.parent, found["base_model"])
    ignored = found.get("ignore_keys") or []
    if not isinstance(ignored, list) or not all(isinstance(pattern, str) for pattern in ignored):
        raise WrongContent(path, found=repr(ignored), expected="a list of names or patterns", where="ignore_keys")
    return MergeRecipe(
        name, base, models, options, None if set(weights) == {1.0} else weights, parts["inputs"], parts["head"],
        str(found.get("network") or ""), ignored,
    )  # fmt: skip


def _place(folder: Path, given: str) -> Path:
    """Return where a checkpoint lies as seen from a folder; OWNER/NAME that is not there is a name on the hub."""
    there = folder / given
    named = given.count("/") == 1 and given[0] not in "./" and Path(given).suffix != ".safetensors"
    return Path(given) if named and not there.exists() else there


def _entries(path: Path, found: Any, known: set[str] | None, needed: set[str], where: str) -> dict:
    if not isinstance(found, dict):
        raise WrongContent(path, found=type(found).__name__, expected="entries with names", where=where)
    strange = sorted(map(str, found.keys() - known)) if known is not None else []
    if strange:
        raise WrongContent(
            path, found=f"entry {strange[0]!r}", expected=f"{', '.join(sorted(known or ()))}", where=where
        )
    missing = sorted(needed - found.keys())
    if missing:
        raise WrongContent(path, found=f"no {missing[0]}", expected=missing[0], where=where)
    return found


def merge_recipe(
    recipe: MergeRecipe, out: Path | str, *, mask: Path | str | None = None, **options: Any
) -> MergedFiles:
    """Carry out a recipe: tensor by tensor where no data are needed, else with the network in memory.

    A learnt merge needs, of every model, ``inputs``: a .npz or .safetensors file whose members are arguments of the
    network, one row an item; and the ``network``, a class of transformers that reads base and models, such as
    "AutoModel". ``head`` files hold a ``weight`` (classes, d); without them the network must give logits. What has been
    learnt is kept in a file beside ``out`` until the end: the same call goes on after an interrupt.
    Source: catalogue entry ``concrete-merging``.

    Parameters
    ----------
    recipe : MergeRecipe
    out : path
        A folder, as for :func:`merge_checkpoints`.
    mask : path, optional
        Where the learnt logits go ("concrete"), or, with "task_arithmetic", where they are read.
    **options
        ``shard_bytes``, ``workers``, ``engine``, ``address`` and ``verbose``, as for :func:`merge_checkpoints`; a
        learnt merge runs in this process.

    Raises
    ------
    MissingExtra
        transformers is not installed.
    ValueError
        Inputs or the network are missing, an option is outside its range, a learnt merge is to be fanned out, or its
        mask would take the place of what is read.
    WrongContent
        A checkpoint lacks weights of the network.
    """
    recipe = recipe._replace(
        base=local_checkpoint(recipe.base, files=True),
        models={task: local_checkpoint(path, files=True) for task, path in recipe.models.items()},
    )
    if recipe.method in STREAMED:
        return merge_checkpoints(
            recipe.base, recipe.models, out, method=recipe.method, weights=recipe.weights, mask=mask,
            ignore_keys=recipe.ignore_keys, **options, **recipe.parameters,
        )  # fmt: skip
    if mask is not None and recipe.method != "concrete":
        raise ValueError(f"mask must go with 'concrete' or 'task_arithmetic', got {recipe.method!r}")
    read = [file for path in (recipe.base, *recipe.models.values()) for file in weight_files(path)]
    read += [*recipe.inputs.values(), *recipe.heads.values()]
    if mask is not None and Path(mask).resolve() in {file.resolve() for file in read}:
        raise ValueError(f"mask must be another file than those that are read, got {mask}")
    for name, value in ALONE.items():
        if options.pop(name, value) != value:
            raise ValueError(f"{name} must be {value!r} for {recipe.method!r}, which learns from the whole network")
    if recipe.weights is not None:
        raise ValueError(f"weights must be left out of a recipe for {recipe.method!r}, which learns them")
    check_new(Path(out))
    lacking = [task for task in recipe.models if task not in recipe.inputs]
    if lacking:
        raise ValueError(f"models must each have inputs for {recipe.method!r}, got none for {', '.join(lacking)}")
    transformers = require("transformers", extra="hf", purpose="a merge that learns")
    kind = getattr(transformers, recipe.network, None) if recipe.network else None
    if not hasattr(kind, "from_pretrained"):
        raise ValueError(f"network must be a class of transformers such as 'AutoModel', got {recipe.network!r}")
    base, unread = _network(kind, recipe.base)
    finetuned = {
        task: path if (path / ADAPTER).is_file() else _network(kind, path)[0] for task, path in recipe.models.items()
    }
    loaders = {task: _tensors(path) for task, path in recipe.inputs.items()}
    heads = {task: _weight(path) for task, path in recipe.heads.items()} or None
    called = adamerging if recipe.method == "adamerging" else ConcreteMerger
    known = inspect.signature(called).parameters.keys() - {"base", "finetuned", "loaders", "heads", "checkpoint"}
    strange = sorted(recipe.parameters.keys() - known)
    if strange:
        raise ValueError(f"parameters of {recipe.method!r} must be among {sorted(known)}, got {strange[0]!r}")
    given: dict[str, Any] = {"verbose": options.get("verbose", False), **recipe.parameters}
    given.setdefault("ignore_keys", recipe.ignore_keys)
    # Beside the folder, which holds nothing but what is whole.
    given["checkpoint"] = Path(out).with_name(f".{Path(out).name}.merging.safetensors")
    if recipe.method == "adamerging":
        state = adamerging(base, finetuned, loaders, heads, **given).state_dict
    else:
        checkpoint = given.pop("checkpoint")
        merger = ConcreteMerger(**given).fit(base, finetuned, loaders, heads, checkpoint=checkpoint)
        state = merger.merged_state_dict()
        if mask is not None:
            write_mask(mask, _file_names(base, merger.logits_, recipe.base))
    state = _file_names(base, state, recipe.base)
    merged, kept = sum(part.is_floating_point() for part in state.values()), ShardedState(recipe.base)
    # What the network has no place for, such as a head of the base's own, is the base's.
    state |= {name: kept[name] for name in unread if name in kept}
    header = {
        "method": recipe.method,
        "parameters": recipe.parameters,
        "base": digests(recipe.base),
        "models": {task: digests(path) for task, path in recipe.models.items()},
        "inputs": {task: digest_file(path) for task, path in recipe.inputs.items()},
        "heads": {task: digest_file(path) for task, path in recipe.heads.items()},
        "shard_bytes": options.get("shard_bytes"),
    }
    facts = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    shards, resumed = write_shards(Path(out), facts, lambda name: [state[name]], header, beside=recipe.base, **options)
    return MergedFiles(Path(out), shards, len(facts), merged, resumed)


def _network(kind: Any, path: Path) -> tuple[Any, list[str]]:
    """Return a checkpoint's network, and which of the checkpoint's tensors it has no place for.

    Raises
    ------
    WrongContent
        The checkpoint lacks weights of the network, which transformers would fill with chance.
    """
    # No file of another kind is read: those may run code.
    network, told = kind.from_pretrained(path, output_loading_info=True, local_files_only=True, use_safetensors=True)
    missing = sorted(told["missing_keys"])
    if missing:
        called = type(network).__name__
        raise WrongContent(path, found=f"no {missing[0]} of {called}", expected="a network whose weights are all there")
    return network, sorted(told["unexpected_keys"])


def _file_names(network: Any, state: Mapping[str, Tensor], base: Path) -> dict[str, Tensor]:
    """Return tensors under the names and in the layouts that the base's files have, which other merges compare."""
    found, kept = stored_form(network, state), ShardedState(base)
    # A network that is part of another, such as an encoder below a head, has its name in front there.
    inner = {f"{network.base_model_prefix}.{name}": part for name, part in found.items()}
    return inner if found.keys().isdisjoint(kept) and inner.keys() <= kept.keys() else found


def _tensors(path: Path) -> Mapping[str, Tensor]:
    found = {name: torch.from_numpy(rows) for name, rows in read_members(path).items()}
    lengths = {len(rows) if rows.ndim else 0 for rows in found.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise WrongContent(path, found=f"members of lengths {sorted(lengths)}", expected="as many rows in each")
    return found


def _weight(path: Path) -> Tensor:
    found = read_members(path)
    name = "weight" if "weight" in found else next(iter(found))
    if len(found) > 1 and name != "weight":
        raise WrongContent(path, found=f"members {', '.join(sorted(found))}", expected="a weight (classes, d)")
    return torch.from_numpy(found[name])
