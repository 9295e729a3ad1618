"""``polyspan projector train`` and ``traverse``: a small generator from a file of pictures, and walks along directions.

Apart from the commands on checkpoints, which need no generator.
"""

from pathlib import Path
from typing import Any

from ._output import check_target, show_json, show_table
from ._pictures import Out, check_drawing, count_to_measure, read_pictures
from ._places import check_places

# Products of directions of bfloat16 weights are off by a hundredth at most.
ORTHONORMAL = 0.02


def train(
    source: Path,
    *,
    out: Out,
    rank: int = 10,
    latent: int = 16,
    width: int = 64,
    layers: int = 3,
    steps: int = 500,
    fine_tune: int = 100,
    batch_size: int = 64,
    rate: float = 3e-3,
    held_out: float = 0.2,
    device: str = "auto",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Train a small generator on pictures, make its layers low-rank orthogonal, and fine-tune it shortly.

    It is the decoder of a fully connected autoencoder whose latents are like standard normal ones; meant for pictures
    of up to a few thousand pixels. How much of held-out pictures stays unexplained is said before the projection,
    after it, and after fine-tuning: the share of their squared distance from the mean picture.

    Parameters
    ----------
    source : Path
        Pictures: an array (.npy) of shape (n, h, w) or (n, channels, h, w), of any range, which is brought to [0, 1].
    out : Path
        The generator, one .safetensors file, for polyspan projector traverse and polyspan.nn.StyleGenerator.load.
    rank : int
        Directions each layer keeps; 0 leaves the layers free.
    latent : int
        Numbers of a latent.
    width : int
        Features of a layer.
    layers : int
        How many.
    steps : int
        Mini-batch steps of training.
    fine_tune : int
        Mini-batch steps after the projection.
    batch_size : int
        Pictures a step.
    rate : float
        Learning rate at the first step; a third of it for fine-tuning.
    held_out : float
        Share of the pictures kept for measuring: at least one, and never all.
    device : str
        "auto" takes an accelerator where there is one.
    seed : int
        Of the held-out pictures, the weights and the order of batches.
    json : bool
        Print JSON.
    """
    import numpy as np
    import torch

    from polyspan.nn import StyleAutoencoder, project_model, train_autoencoder
    from polyspan.run import pick_device, torch_generator

    check_target(out, "--out", ".safetensors")
    check_places(read=(source,), out=out)
    for option, value in {"--latent": latent, "--width": width, "--layers": layers, "--batch-size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    for option, value in {"--steps": steps, "--fine-tune": fine_tune}.items():
        if value < 0:
            raise ValueError(f"{option} must be at least 0, got {value}")
    if not 0 <= rank <= min(latent, width):
        raise ValueError(f"--rank must be between 0 and {min(latent, width)}, of --latent and --width, got {rank}")
    if not 0 < rate < np.inf:
        raise ValueError(f"--rate must be above 0 and finite, got {rate}")
    X = read_pictures(source).astype(np.float32)
    low, high = float(X.min()), float(X.max())
    if not low < high:
        raise ValueError(f"pictures must not all be of one value, got {low:g} everywhere in {source}")
    n = count_to_measure(len(X), held_out, least=1, why="one to train on")
    order = np.random.default_rng(seed).permutation(len(X))
    place = pick_device(device)
    images = torch.tensor((X[order] - low) / (high - low), device=place)
    test, kept = images[:n], images[n:]
    rng = torch_generator(seed, device=place)
    model = StyleAutoencoder(X.shape[1:], latent, width, layers, generator=rng, device=place)
    spread = (test - kept.mean(dim=0)).square().mean()

    @torch.no_grad()
    def unexplained() -> float:
        return float((model(test) - test).square().mean() / spread)

    options: dict[str, Any] = {"generator": rng, "batch_size": batch_size, "verbose": True}
    train_autoencoder(model, kept, steps, learning_rate=rate, **options)
    told: dict[str, Any] = {"trained on": len(kept), "measured on": n, "unexplained, free layers": unexplained()}
    if rank:
        report = project_model(model.generator, rank=rank)
        told["unexplained, projected"] = unexplained()
        train_autoencoder(model, kept, fine_tune, learning_rate=rate / 3, **options)
        told["unexplained, fine-tuned"] = unexplained()
        told["layers"] = [
            {"layer": layer.name, "kept_share": layer.kept_share, "turned, radians": report.drift()[layer.name]}
            for layer in report.layers
        ]
    model.generator.save(out, picture_range=[low, high], trained_on=len(kept), seed=seed)
    told["out"] = str(out)
    if json:
        show_json(told)
        return
    rows = [[name, f"{value:.4g}" if isinstance(value, float) else str(value)] for name, value in told.items()
            if name != "layers"]  # fmt: skip
    rows += [
        [layer["layer"], f"{layer['kept_share']:.4f} kept, turned by {layer['turned, radians']:.3f} rad"]
        for layer in told.get("layers", ())
    ]
    show_table("", ("", ""), rows)


def traverse(
    generator: Path,
    *,
    directions: Path | None = None,
    layer: str | None = None,
    count: int | None = None,
    reach: float = 3.0,
    columns: int = 7,
    samples: int = 64,
    plot: Path | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Walk along directions of a generator: how much each changes pictures, and a picture of the walks.

    Changes are root mean squared differences of pixels for a unit step from latents that are drawn. The last row is a
    step along a random direction at right angles to all of the layer: 0 where it is low-rank orthogonal.

    Parameters
    ----------
    generator : Path
        What polyspan projector train, or StyleGenerator.save, wrote.
    directions : Path
        Directions (.npz or .safetensors) as polyspan projector directions writes them; left out, those of the
        generator's own low-rank orthogonal layers.
    layer : str
        Which layer's; left out, that whose directions change pictures most.
    count : int
        How many, the first ones; left out, all.
    reach : float
        Walk from minus to plus this far, in units of the latent, whose entries are standard normal.
    columns : int
        Pictures a walk, at least 2.
    samples : int
        Latents that changes are measured on, at least 2.
    plot : Path
        Draw the walks of the first latent: a row a direction, a column a place (.svg, .png or .pdf).
    seed : int
        Of the latents.
    json : bool
        Print JSON.
    """
    import torch

    from polyspan.nn import (
        Directions,
        StyleGenerator,
        direction_strengths,
        discover_directions,
        interpretable_path_length,
        load_directions,
    )
    from polyspan.run import torch_generator

    check_drawing(plot, "--plot")
    check_places(plot, read=(generator, directions))
    if not 0 < reach < float("inf"):
        raise ValueError(f"--reach must be above 0 and finite, got {reach}")
    for option, value in {"--columns": columns, "--samples": samples}.items():
        if value < 2:
            raise ValueError(f"{option} must be at least 2, got {value}")
    model = StyleGenerator.load(generator)
    if directions is not None:
        found = load_directions(directions)
    elif any(name.endswith("affine.in_vectors") for name in model.state_dict()):
        found = discover_directions(model)
    else:
        raise ValueError(f"--directions must be given: the layers of {generator} are free, without any of their own")
    if layer is not None and layer not in found:
        raise ValueError(f"--layer must be one of {', '.join(found)}, got {layer!r}")
    sets = {name: _checked(model, name, part) for name, part in found.items() if layer in (None, name)}
    rng = torch_generator(seed)
    latents = torch.randn(samples, model.latent_dim, generator=rng).to(model.constant)
    strengths = {name: direction_strengths(model, name, part, latents) for name, part in sets.items()}
    name = max(strengths, key=lambda name: float(strengths[name].square().mean()))
    whole = sets[name]
    if count is not None and not 1 <= count <= len(whole.vectors):
        raise ValueError(f"--count must be between 1 and {len(whole.vectors)}, got {count}")
    chosen = Directions(*(part[:count] for part in whole))
    outside = torch.randn(model.latent_dim, generator=rng).to(chosen.vectors)
    changes = strengths[name][:count].tolist()
    told: dict[str, Any] = {
        "layer": name,
        "directions": [
            {"direction": i + 1, "value": float(value), "change a unit step": change}
            for i, (value, change) in enumerate(zip(chosen.values, changes, strict=True))
        ],
        "change a unit step outside": None,
        "path length along them": interpretable_path_length(model, {name: chosen}, latents, rng=rng),
        "plot": None if plot is None else str(plot),
    }
    if len(whole.vectors) < model.latent_dim:
        # The second time takes out what rounding left.
        for _ in range(2):
            outside = outside - outside @ whole.vectors.mT @ whole.vectors
        rest = Directions((outside / outside.norm())[None], chosen.values[:1])
        told["change a unit step outside"] = float(direction_strengths(model, name, rest, latents)[0])
    if plot is not None:
        from polyspan.nn.traversal_plots import plot_traversals

        amounts = torch.linspace(-reach, reach, columns).tolist()
        plot_traversals(model, latents[0], chosen, plot, layer=name, amounts=amounts, max_rows=len(chosen.vectors))
    if json:
        show_json(told)
        return
    rows = [[str(i + 1), f"{float(chosen.values[i]):.4g}", f"{change:.4g}"] for i, change in enumerate(changes)]
    if told["change a unit step outside"] is not None:
        rows.append(["outside", "", f"{told['change a unit step outside']:.4g}"])
    rows.append(["path length", "", f"{told['path length along them']:.4g}"])
    show_table(f"Directions of {name}", ("direction", "value", "change a unit step"), rows)


def _checked(model: Any, name: str, found: Any) -> Any:
    """Return a layer's directions in the generator's dtype if they are orthonormal ones of its latents."""
    import torch

    from polyspan.nn import Directions

    known = [f"layers.{i}.affine" for i in range(len(model.layers))]
    if name not in known:
        raise ValueError(f"--directions must be of layers of the generator, {', '.join(known)}, got {name!r}")
    vectors, values = (part.detach().to(model.constant) for part in found)
    if vectors.ndim != 2 or vectors.shape[1] != model.latent_dim:
        raise ValueError(
            f"--directions must be rows of {model.latent_dim} numbers, as latents are, got {tuple(vectors.shape)}"
        )
    off = vectors.double() @ vectors.double().mT - torch.eye(len(vectors), dtype=torch.float64)
    if not bool(off.abs().max() < ORTHONORMAL):
        raise ValueError(f"--directions must be orthonormal rows, got rows off by {float(off.abs().max()):.2g}")
    return Directions(vectors, values)
