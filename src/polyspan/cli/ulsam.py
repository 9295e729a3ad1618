"""``polyspan ulsam report``, ``replace`` and ``insert``: subspace attention in compact networks, and what it saves."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ._output import check_target, say, show_json, show_table
from ._pictures import Out, check_drawing
from ._places import check_places

NAMES = ("mobilenet-v1", "mobilenet-v2")
LAYER_COLUMNS = ("layer", "class", "output", "parameters", "parameters after", "MACs", "MACs after")
BLOCK_COLUMNS = ("block", "class", "map", "parameters", "MACs", "share of parameters", "share of MACs")
FACT_COLUMNS = ("layer", "map", "divergence, nats", "peak, times uniform", "distance of groups")


class _Source(NamedTuple):
    """A network, how to make it without attention, and the files it was read from."""

    model: Any
    network: dict[str, Any]
    files: tuple[Path, ...]


def report(
    model: str,
    *,
    input: str,
    blocks: str | None = None,
    how: Literal["replace", "insert"] = "replace",
    groups: int = 4,
    classes: int | None = None,
    width: float | None = None,
    small_input: bool = False,
    image: Path | None = None,
    mean: str | None = None,
    std: str | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Count parameters and multiply-adds layer by layer, without attention and with it, and list replaceable blocks.

    Costs are those of convolutions, linear layers and attention for one pass of --input, whole batch. Nothing is
    written but the plot.

    Parameters
    ----------
    model : str
        mobilenet-v1 or mobilenet-v2, a .safetensors file that polyspan ulsam wrote, or the folder of a Hugging Face
        image classifier.
    input : str
        Batch, channels, height and width, by commas, such as 1,3,224,224.
    blocks : str
        Blocks by their names, by commas: say what putting attention there would give. Left out, what the network has.
    how : {"replace", "insert"}
        Whether attention would stand in the place of blocks, or behind them.
    groups : int
        Groups of channels, each with a map of its own; divides the channels.
    classes : int
        Of a named network; 1000 where left out.
    width : float
        Of a named network: multiplier of its channels; 1 where left out.
    small_input : bool
        Of a named network: leave out its first two halvings, for images of 32 by 32 or so.
    image : Path
        A picture that attention is looked at on: a picture file, brought to the size of --input, or an array (.npy)
        (h, w) or (channels, h, w) of that size.
    mean : str
        Taken off the picture's values, which lie in [0, 1] for picture files: one number, or one a channel by commas.
    std : str
        What it is divided by afterwards.
    plot : Path
        Draw what each layer attends to over --image (.svg, .png or .pdf).
    json : bool
        Print JSON.
    """
    shape = _shape(input)
    check_drawing(plot, "--plot")
    if plot is not None and image is None:
        raise ValueError("--plot needs --image, the picture that maps are drawn over")
    options = _options(model, shape, classes, width, small_input)
    check_places(plot, read=(*_files(model), image))
    source = _read(model, options, None, 0, counted_only=image is None)
    x = None if image is None else _picture(image, shape, mean, std)
    before, candidates = _plain_cost(source, shape)
    if blocks is None:
        after, changed = _cost(source.model, shape), []
    else:
        made = _operate(source.model, how, _names(blocks), shape, {"num_groups": groups}, 0)
        after, changed = made.after, list(made.changed)
    facts = [] if x is None else _attention(source.model, x, plot)
    _tell(source, facts, before, after, changed, candidates, plot, json, {})


def replace(
    model: str,
    *,
    input: str,
    blocks: str,
    out: Out,
    groups: int = 4,
    kernel: int = 3,
    norm: bool = True,
    residual: bool = True,
    weights: Path | None = None,
    classes: int | None = None,
    width: float | None = None,
    small_input: bool = False,
    seed: int = 0,
    image: Path | None = None,
    mean: str | None = None,
    std: str | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Put attention in the place of blocks, which makes a network smaller, and write it.

    A block must return a map of the shape that it is given. The attention starts from chance: train or fine-tune the
    network afterwards (polyspan.nn.load_attention_network), and compare it with one in which
    torch.nn.Identity() stands in the same places.

    Parameters
    ----------
    model : str
        mobilenet-v1 or mobilenet-v2, a .safetensors file that polyspan ulsam wrote, or the folder of a Hugging Face
        image classifier.
    input : str
        Batch, channels, height and width, by commas, such as 1,3,224,224.
    blocks : str
        Blocks by their names, by commas, such as features.12,features.15; polyspan ulsam report lists them.
    out : Path
        The network, one .safetensors file that these commands read again.
    groups : int
        Groups of channels, each with a map of its own; divides the channels.
    kernel : int
        Width of the max-pool, odd.
    norm : bool
        Batch norms and ReLU, which the authors' code has and the paper's figure has not.
    residual : bool
        Add what comes in to what is attended to.
    weights : Path
        Weights of a named network by their names, a .safetensors file; left out, it starts from chance.
    classes : int
        Of a named network; 1000 where left out.
    width : float
        Of a named network: multiplier of its channels; 1 where left out.
    small_input : bool
        Of a named network: leave out its first two halvings, for images of 32 by 32 or so.
    seed : int
        Of what starts from chance.
    image : Path
        A picture that attention is looked at on: a picture file, brought to the size of --input, or an array (.npy)
        (h, w) or (channels, h, w) of that size.
    mean : str
        Taken off the picture's values, which lie in [0, 1] for picture files: one number, or one a channel by commas.
    std : str
        What it is divided by afterwards.
    plot : Path
        Draw what each layer attends to over --image (.svg, .png or .pdf).
    json : bool
        Print JSON.
    """
    how: dict[str, Any] = {"num_groups": groups, "kernel_size": kernel, "norm": norm, "residual": residual}
    named = (classes, width, small_input)
    _change("replace", model, input, blocks, out, how, weights, named, seed, (image, mean, std), plot, json)


def insert(
    model: str,
    *,
    input: str,
    blocks: str,
    out: Out,
    groups: int = 4,
    kernel: int = 3,
    norm: bool = True,
    residual: bool = True,
    weights: Path | None = None,
    classes: int | None = None,
    width: float | None = None,
    small_input: bool = False,
    seed: int = 0,
    image: Path | None = None,
    mean: str | None = None,
    std: str | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Put attention behind blocks, at a few numbers a channel, and write the network.

    The attention starts from chance and is close to the identity: fine-tune the network afterwards
    (polyspan.nn.load_attention_network).

    Parameters
    ----------
    model : str
        mobilenet-v1 or mobilenet-v2, a .safetensors file that polyspan ulsam wrote, or the folder of a Hugging Face
        image classifier.
    input : str
        Batch, channels, height and width, by commas, such as 1,3,224,224.
    blocks : str
        Blocks by their names, by commas, such as features.11; each must return a map.
    out : Path
        The network, one .safetensors file that these commands read again.
    groups : int
        Groups of channels, each with a map of its own; divides the channels.
    kernel : int
        Width of the max-pool, odd.
    norm : bool
        Batch norms and ReLU, which the authors' code has and the paper's figure has not.
    residual : bool
        Add what comes in to what is attended to.
    weights : Path
        Weights of a named network by their names, a .safetensors file; left out, it starts from chance.
    classes : int
        Of a named network; 1000 where left out.
    width : float
        Of a named network: multiplier of its channels; 1 where left out.
    small_input : bool
        Of a named network: leave out its first two halvings, for images of 32 by 32 or so.
    seed : int
        Of what starts from chance.
    image : Path
        A picture that attention is looked at on: a picture file, brought to the size of --input, or an array (.npy)
        (h, w) or (channels, h, w) of that size.
    mean : str
        Taken off the picture's values, which lie in [0, 1] for picture files: one number, or one a channel by commas.
    std : str
        What it is divided by afterwards.
    plot : Path
        Draw what each layer attends to over --image (.svg, .png or .pdf).
    json : bool
        Print JSON.
    """
    how: dict[str, Any] = {"num_groups": groups, "kernel_size": kernel, "norm": norm, "residual": residual}
    named = (classes, width, small_input)
    _change("insert", model, input, blocks, out, how, weights, named, seed, (image, mean, std), plot, json)


def _change(
    how: str,
    model: str,
    given: str,
    blocks: str,
    out: Path,
    sizes: dict[str, Any],
    weights: Path | None,
    named: tuple[int | None, float | None, bool],
    seed: int,
    looked_at: tuple[Path | None, str | None, str | None],
    plot: Path | None,
    json: bool,
) -> None:
    from polyspan.nn.subspace_attention_files import save_attention_network

    shape = _shape(given)
    check_target(out, "--out", ".safetensors")
    check_target(weights, "--weights", ".safetensors")
    check_drawing(plot, "--plot")
    image = looked_at[0]
    if plot is not None and image is None:
        raise ValueError("--plot needs --image, the picture that maps are drawn over")
    options = _options(model, shape, *named)
    if weights is not None and model not in NAMES:
        raise ValueError(f"--weights is for {' and '.join(NAMES)}, got {model}, which brings its own")
    files = _files(model)
    check_places(plot, read=(*files, weights, image), out=out)
    names = _names(blocks)
    source = _read(model, options, weights, seed)
    x = None if image is None else _picture(image, shape, *looked_at[1:])
    before, candidates = _plain_cost(source, shape)
    made = _operate(source.model, how, names, shape, sizes, seed)
    facts = [] if x is None else _attention(source.model, x, plot)
    save_attention_network(source.model, out, source.network)
    if model in NAMES and weights is None:
        say("the network starts from chance, as no --weights were given")
    say("the attention starts from chance: train or fine-tune the network")
    _tell(source, facts, before, made.after, list(made.changed), candidates, plot, json, {"out": str(out)})


def _shape(text: str) -> tuple[int, ...]:
    parts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if len(parts) != 4 or min(parts) < 1:
        raise ValueError(
            "--input must be four whole numbers above 0 by commas, batch, channels, height and width, such as "
            f"1,3,224,224, got {text!r}"
        )
    return tuple(parts)


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise ValueError(f"--blocks must be names of modules by commas, got {text!r}")
    return names


def _options(
    model: str, shape: tuple[int, ...], classes: int | None, width: float | None, small_input: bool
) -> dict[str, Any]:
    """Return how to make a named network; others bring that with them."""
    if model not in NAMES:
        given = {"--classes": classes is not None, "--width": width is not None, "--small-input": small_input}
        if any(given.values()):
            wrong = ", ".join(option for option, there in given.items() if there)
            raise ValueError(f"{wrong} {'is' if ',' not in wrong else 'are'} for {' and '.join(NAMES)}, got {model}")
        return {}
    classes, width = 1000 if classes is None else classes, 1.0 if width is None else width
    if classes < 1:
        raise ValueError(f"--classes must be at least 1, got {classes}")
    if not 0 < width < math.inf:
        raise ValueError(f"--width must be positive and finite, got {width}")
    return {
        "kind": model, "num_classes": classes, "width": float(width), "in_channels": shape[1],
        "small_input": small_input,
    }  # fmt: skip


def _files(model: str) -> tuple[Path, ...]:
    """Return the files of a model, after looking at whether it is one."""
    from polyspan.io import list_folder

    if model in NAMES:
        return ()
    path = Path(model)
    if path.is_dir():
        return (path, *list_folder(path))
    if path.suffix.lower() != ".safetensors":
        raise ValueError(
            f"model must be {', '.join(NAMES)}, a .safetensors file or the folder of a Hugging Face image classifier, "
            f"got {model!r}"
        )
    return (path,)


def _read(
    model: str, options: dict[str, Any], weights: Path | None, seed: int, *, counted_only: bool = False
) -> _Source:
    """Return a network in eval mode; one with a name has no memory where it is only counted."""
    from polyspan.nn.subspace_attention_files import load_attention_network, plain_network, read_image_classifier
    from polyspan.run import torch_generator

    if model in NAMES:
        made = plain_network(options, generator=torch_generator(seed), device="meta" if counted_only else None)
        if weights is not None:
            _fill(made, weights)
        return _Source(made.eval(), options, ())
    path = Path(model)
    found = read_image_classifier(path) if path.is_dir() else load_attention_network(path)
    return _Source(found.model, found.network, (path,))


def _fill(model: Any, weights: Path) -> None:
    """Copy weights of a file into a network; where they do not fit, say which."""
    from polyspan.errors import WrongContent
    from polyspan.io import ShardedState

    state, own = ShardedState(weights), model.state_dict()
    expected = f"the weights of the network: see --classes, --width and --input, got {len(own)} names"
    # Files from before torch counted batches have no such numbers, and nothing here needs them.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    extra = [name for name in state if name not in own]
    if missing or extra:
        found = f"missing {_few(missing)}, unexpected {_few(extra)}"
        raise WrongContent(weights, found=found, expected=expected)
    wrong = [f"{name} {state.shape(name)} for {tuple(own[name].shape)}" for name in state
             if state.shape(name) != tuple(own[name].shape)]  # fmt: skip
    if wrong:
        raise WrongContent(weights, found=f"other shapes: {_few(wrong)}", expected=expected)
    model.load_state_dict({name: state[name].clone() for name in state}, strict=False)


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5]) or 'none'}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"


def _example(model: Any, shape: tuple[int, ...]) -> Any:
    """Return zeros that a network takes, where its weights are."""
    import torch

    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(shape, device=like.device, dtype=like.dtype)


def _cost(model: Any, shape: tuple[int, ...]) -> Any:
    from polyspan.nn import model_cost

    try:
        with warnings.catch_warnings():
            # A map of one place is told where attention is put there.
            warnings.filterwarnings("ignore", "a map of one place", UserWarning)
            return model_cost(model, _example(model, shape))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--input must be what the network takes, got {shape}: {error}") from None


def _plain_cost(source: _Source, shape: tuple[int, ...]) -> tuple[Any, list[Any]]:
    """Return the cost of a network without attention, and its blocks that attention could replace."""
    from polyspan.nn import ULSAM, replaceable_blocks
    from polyspan.nn.subspace_attention_files import HUGGING_FACE, plain_network

    plain = source.model
    if any(isinstance(module, ULSAM) for module in plain.modules()):
        # On "meta" nothing is computed; not every network of others runs there.
        plain = plain_network(source.network, device=None if source.network["kind"] == HUGGING_FACE else "meta").eval()
    cost = _cost(plain, shape)
    return cost, replaceable_blocks(plain, _example(plain, shape))


def _operate(
    model: Any, how: str, names: list[str], shape: tuple[int, ...], sizes: Mapping[str, Any], seed: int
) -> Any:
    """Put attention into a network, and say in the command's words what is refused."""
    from polyspan.nn import insert_ulsam, replace_with_ulsam
    from polyspan.run import torch_generator

    operate = replace_with_ulsam if how == "replace" else insert_ulsam
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            # Sequences of tokens have three axes, too, and are no maps of pictures.
            how_made: dict[str, Any] = {"dims": 2, "generator": torch_generator(seed), **sizes}
            _, found = operate(model, names, _example(model, shape), **how_made)
        except ValueError as error:
            text = str(error)
            for ours, theirs in (("targets", "--blocks"), ("after", "--blocks")):
                text = f"{theirs}{text.removeprefix(ours)}" if text.startswith(f"{ours} ") else text
            raise ValueError(text.replace("num_groups", "--groups").replace("kernel_size", "--kernel")) from None
    for text in sorted({str(warning.message) for warning in told}):
        say(f"warning: {text}")
    return found


def _picture(image: Path, shape: tuple[int, ...], mean: str | None, std: str | None) -> tuple[Any, Any]:
    """Return a picture as it is drawn, (h, w) or (h, w, 3) in [0, 1], and as the network takes it, one of a batch."""
    import numpy as np

    from polyspan.io import read_array

    _, channels, h, w = shape
    if image.suffix.lower() == ".npy":
        found = read_array(image, ndim=None).astype(np.float32)
        found = found[None] if found.ndim == 2 else found
        if found.shape != (channels, h, w):
            raise ValueError(f"--image must be {(channels, h, w)}, as --input, got shape {found.shape} in {image}")
    elif channels in (1, 3):
        from polyspan.cluster.image_folder import PICTURES, ImageFolder

        if image.suffix.lower() not in PICTURES or not image.is_file():
            raise ValueError(f"--image must be a picture file ({', '.join(PICTURES)}) or a .npy array, got {image}")
        folder = ImageFolder(image.parent, (h, w) if channels == 1 else (3, h, w))
        found = folder[[path.name for path in folder.files].index(image.name)].reshape(channels, h, w)
    else:
        raise ValueError(f"--image must be a .npy array for {channels} channels, got {image.name}")
    low, high = float(found.min()), float(found.max())
    shown = found.transpose(1, 2, 0) if channels == 3 else found.mean(axis=0)
    if channels == 3 and not 0 <= low <= high <= 1:
        shown = (shown - low) / max(high - low, 1e-12)
    taken = (found - _by_channel("--mean", mean, channels, 0.0)) / _by_channel("--std", std, channels, 1.0)
    return shown, taken[None].astype(np.float32)


def _by_channel(option: str, text: str | None, channels: int, usual: float) -> Any:
    import numpy as np

    try:
        values = [usual] if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    least = -math.inf if option == "--mean" else 0.0
    if len(values) not in (1, channels) or not all(least < value < math.inf for value in values):
        kind = "finite" if option == "--mean" else "finite and above 0"
        raise ValueError(f"{option} must be one number, or {channels} by commas, {kind}, got {text!r}")
    return np.array(values, dtype=np.float32).reshape(-1, 1, 1)


def _attention(model: Any, x: tuple[Any, Any], plot: Path | None) -> list[dict[str, Any]]:
    """Measure what each layer attends to on a picture, and draw it."""
    import torch

    from polyspan.nn import attention_facts
    from polyspan.nn.attention_surgery import attention_maps_of
    from polyspan.nn.subspace_attention_plots import MOST_ROWS, plot_attention_layers

    like = _example(model, (1,))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a map of one place", UserWarning)
        maps = attention_maps_of(model, torch.from_numpy(x[1]).to(like))
    if not maps:
        raise ValueError("--image needs a network with attention, or --blocks that it is to stand at, got none")
    if plot is not None and len(maps) > MOST_ROWS:
        raise ValueError(f"--plot shows {MOST_ROWS} layers at most, got {len(maps)}")
    if plot is not None:
        plot_attention_layers(x[0], {name: found[0] for name, found in maps.items()}, plot)
    return [
        {"layer": name, "map": list(found.shape[1:]), **attention_facts(found)._asdict()}
        for name, found in maps.items()
    ]


def _within(name: str, place: str) -> bool:
    return f"{name}.".startswith(f"{place}.")


def _by_layer(before: Any, after: Any, inserted: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row a layer, in the order in which they run, with what it costs before and after.

    A layer of a block that has got attention behind it is the layer that it was, by another name.
    """

    def plain(name: str) -> str:
        for place in inserted:
            if _within(name, f"{place}.block"):
                name = f"{place}{name.removeprefix(f'{place}.block')}"
        return name

    old = {layer.name: layer for layer in before.layers}
    new = {plain(layer.name): layer for layer in after.layers}
    order, waiting = [], list(new)
    for name in old:
        while waiting and order and _within(order[-1], waiting[0]) and not _within(name, waiting[0]):
            # What stands in the place of a block comes behind its layers.
            order.append(waiting.pop(0))
        if name in waiting:
            cut = waiting.index(name) + 1
            order += waiting[:cut]
            del waiting[:cut]
        elif name not in order:
            order.append(name)
    rows = []
    for name in (*order, *waiting):
        was, now = old.get(name), new.get(name)
        kinds = dict.fromkeys(layer.kind for layer in (was, now) if layer is not None)
        shown: Any = was if now is None else now
        rows.append(
            {
                "layer": name,
                "class": " to ".join(kinds),
                "output": list(shown.output_shape),
                "parameters": was and was.num_params,
                "parameters_after": now and now.num_params,
                "macs": was and was.num_macs,
                "macs_after": now and now.num_macs,
            }
        )
    return rows


def _tell(
    source: _Source,
    facts: list[dict[str, Any]],
    before: Any,
    after: Any,
    changed: list[str],
    candidates: list[Any],
    plot: Path | None,
    json: bool,
    more: Mapping[str, Any],
) -> None:
    from polyspan.nn.subspace_attention_files import attention_places

    places = attention_places(source.model)
    inserted = [place["name"] for place in places if place["how"] == "insert"]
    rows = _by_layer(before, after, inserted)
    told: dict[str, Any] = {
        **more,
        "changed": changed,
        "attention": places,
        "parameters": before.num_params,
        "parameters_after": after.num_params,
        "parameters_share": after.num_params / max(before.num_params, 1),
        "macs": before.num_macs,
        "macs_after": after.num_macs,
        "macs_share": after.num_macs / max(before.num_macs, 1),
    } | ({} if plot is None else {"plot": str(plot)})
    blocks = [
        {
            "block": block.name,
            "class": block.kind,
            "map": list(block.shape),
            "parameters": block.num_params,
            "macs": block.num_macs,
            "parameters_share": block.num_params / max(before.num_params, 1),
            "macs_share": block.num_macs / max(before.num_macs, 1),
        }
        for block in candidates
    ]
    if json:
        show_json(told | {"layers": rows, "replaceable": blocks, "on image": facts})
        return
    cells = [[_cell(value) for value in row.values()] for row in rows]
    total = ["all", "", "", *(_cell(told[key]) for key in ("parameters", "parameters_after", "macs", "macs_after"))]
    show_table("Layers, in the order in which they run", LAYER_COLUMNS, [*cells, total])
    show_table("Blocks that attention can replace", BLOCK_COLUMNS, [[_cell(v) for v in row.values()] for row in blocks])
    if facts:
        show_table("Attention on the image", FACT_COLUMNS, [[_cell(v) for v in row.values()] for row in facts])
    shown = {
        "parameters left, share": told["parameters_share"], "MACs left, share": told["macs_share"],
        "attention at": ", ".join(place["name"] for place in places) or "no place", **more,
    }  # fmt: skip
    show_table("", ("what", "value"), [(name, _cell(value)) for name, value in shown.items()])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)
