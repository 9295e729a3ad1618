"""Directions in a generator's latent space: find them, walk along them, measure how smooth the walk is."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polyspan.errors import WrongContent
from polyspan.io import read_members, write_members
from polyspan.linalg import fix_signs, randomized_svd

from .projector_surgery import projections

METHODS = ("householder", "sefa", "ganspace-pca", "jacobian")
Distance = Callable[[Tensor, Tensor], Tensor]


class Directions(NamedTuple):
    """Unit ``vectors`` (r, d), orthonormal rows, and what the method says of their strength: ``values`` (r,).

    Gains for "householder", singular values for "sefa", standard deviations of the latents for "ganspace-pca", root
    mean squared change (over latents; sum over pixels) of a picture a unit step for "jacobian".
    """

    vectors: Tensor
    values: Tensor


@torch.no_grad()
def discover_directions(
    model: nn.Module,
    layers: str | Sequence[str] | None = None,
    method: str = "householder",
    *,
    num_directions: int | None = None,
    latents: Tensor | None = None,
) -> dict[str, Directions]:
    r"""Return directions for layers of a generator that take its latent.

    - "householder": the r directions of a low-rank orthogonal layer, as they are. All have the same gain.
    - "jacobian": the same space, turned so that the directions change pictures independently on average and the
      strongest stands first: eigenvectors of :math:`V_r^\top E[J^\top J] V_r` with the generator's Jacobian J. On a
      free layer, all of the latent space.
    - "sefa": right singular vectors of the layer's weight.
    - "ganspace-pca": principal components of ``latents``, the same for each layer.

    Signs are fixed; equal values leave the vectors free to turn, but for "householder".
    Source: catalogue entry ``householder-projector``.

    Parameters
    ----------
    model : torch.nn.Module
        The generator: ``model(latents)`` gives pictures (needed for "jacobian" only).
    layers : str or list of str, optional
        Dotted names; left out, all low-rank orthogonal layers of the model.
    method : {"householder", "sefa", "ganspace-pca", "jacobian"}, default="householder"
    num_directions : int, optional
        How many of each layer, the first ones; left out, all there are.
    latents : Tensor of shape (n, d), optional
        Sample of latents, for "ganspace-pca" and "jacobian"; a few dozen do for the latter.

    Raises
    ------
    ValueError
        A layer is not there or is not of the kind the method needs, or latents are missing.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    projected = projections(model)
    names = [layers] if isinstance(layers, str) else list(projected) if layers is None else list(layers)
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise ValueError(f"layers must name modules of the model, got {name!r}; projected are {list(projected)}")
    if not names:
        raise ValueError("layers must be named where the model has no low-rank orthogonal layer, got none")
    if method in ("ganspace-pca", "jacobian") and (latents is None or latents.ndim != 2 or len(latents) < 2):
        got = None if latents is None else tuple(latents.shape)
        raise ValueError(f"latents must hold a sample (n, d) of at least two for {method!r}, got {got}")
    if latents is not None and not bool(torch.isfinite(latents).all()):
        raise ValueError("latents must be finite, got NaN or infinity")
    found = {}
    for name in names:
        if method == "householder":
            if name not in projected:
                raise ValueError(
                    f"layers must be low-rank orthogonal for 'householder', got {name!r}; see project_model"
                )
            vectors, gain = projected[name]
            made = Directions(vectors, gain.to(vectors).expand(len(vectors)))
        elif method == "sefa":
            made = _singular(known[name], name, num_directions)
        elif method == "ganspace-pca":
            assert latents is not None
            centred = latents - latents.mean(dim=0)
            _, s, Vh = torch.linalg.svd(centred, full_matrices=False)
            made = Directions(fix_signs(Vh.mT).mT, s / math.sqrt(len(latents) - 1))
        else:
            assert latents is not None
            start = projected[name][0] if name in projected else torch.eye(latents.shape[1]).to(latents)
            made = _by_jacobian(model, name, start, latents)
        if num_directions is not None and not 1 <= num_directions <= len(made.vectors):
            raise ValueError(f"num_directions must be between 1 and {len(made.vectors)}, got {num_directions}")
        found[name] = Directions(*(part[:num_directions] for part in made))
    return found


def _singular(module: nn.Module, name: str, num_directions: int | None) -> Directions:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(f"layers must have a matrix for a weight for 'sefa', got {name!r}, {type(module).__name__}")
    least = min(weight.shape)
    if num_directions is not None and 8 * num_directions < least and least > 512:
        rng = torch.Generator(device=weight.device).manual_seed(0)
        _, s, Vh = randomized_svd(weight, num_directions, rng=rng)
    else:
        _, s, Vh = torch.linalg.svd(weight, full_matrices=False)
    return Directions(fix_signs(Vh.mT).mT, s)


def _by_jacobian(model: nn.Module, name: str, start: Tensor, latents: Tensor) -> Directions:
    zero = latents.new_zeros(len(start))

    def moved(t: Tensor) -> Tensor:
        with _shifted(model, name, t @ start.to(t)):
            return model(latents).flatten(1)

    with _at_rest(model):
        columns = [torch.func.jvp(moved, (zero,), (unit,))[1] for unit in torch.eye(len(start)).to(zero)]
    J = torch.stack([column.flatten() for column in columns])
    values, turn = torch.linalg.eigh(J.double() @ J.double().mT / len(latents))
    vectors = turn.flip(-1).mT.to(start) @ start
    return Directions(fix_signs(vectors.mT).mT, values.flip(-1).clamp(min=0).sqrt().to(start))


@contextmanager
def _at_rest(model: nn.Module) -> Generator[None]:
    """Put a model in evaluation mode while inside: pictures must neither be random nor change running statistics."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _shifted(model: nn.Module, layer: str | None, shift: Tensor) -> Generator[None]:
    """Add ``shift`` to the first argument of a layer, or of the model, while inside."""
    module = _layer(model, layer)
    reached = []

    def hook(_: nn.Module, args: tuple) -> tuple:
        reached.append(True)
        return (args[0] + shift, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not reached:
        raise ValueError(f"layer must run when the generator does, got {layer!r}, which does not")


def _layer(model: nn.Module, layer: str | None) -> nn.Module:
    if layer is None:
        return model
    known = dict(model.named_modules())
    if layer not in known:
        raise ValueError(f"layer must name a module of the generator, got {layer!r}")
    return known[layer]


@torch.no_grad()
def traverse(
    generator: nn.Module,
    latents: Float[Tensor, "n d"],
    direction: Float[Tensor, " e"],
    amounts: Sequence[float | int] | Tensor,
    layer: str | None = None,
) -> Tensor:
    r"""Return the pictures (t, n, \*shape) of latents moved by t amounts along a direction, at one layer only.

    All functions here run the generator in evaluation mode, and leave the mode as it was.

    Parameters
    ----------
    generator : torch.nn.Module
        ``generator(latents)`` gives pictures.
    latents : Tensor of shape (n, d)
    direction : Tensor of shape (d,)
        Of unit length, as :func:`discover_directions` returns it, where amounts are to be comparable.
    amounts : sequence of float
        In units of the latent; the published pictures take seven from -20 to 20 for latents of length near 20.
    layer : str, optional
        Whose latent is moved; left out, the generator's, for all layers.

    Raises
    ------
    ValueError
        A layer of that name does not exist or does not run, or the sizes of latents and direction differ.
    """
    if latents.shape[-1] != len(direction):
        raise ValueError(f"direction must have the size {latents.shape[-1]} of the latents, got {len(direction)}")
    made = []
    for t in torch.as_tensor(amounts).to(latents):
        with _at_rest(generator), _shifted(generator, layer, t * direction.to(latents)):
            made.append(generator(latents))
    if not made:
        raise ValueError("amounts must hold at least one number, got none")
    return torch.stack(made)


def _squared_difference(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each pair of pictures."""
    return (a - b).flatten(1).square().mean(dim=1)


@torch.no_grad()
def perceptual_path_length(
    generator: nn.Module,
    latents: Float[Tensor, "n d"],
    *,
    rng: torch.Generator,
    distance: Distance = _squared_difference,
    eps: float | int = 1e-2,
    batch_size: int = 64,
) -> float:
    r"""How fast pictures change along straight lines between latents: less is smoother.

    Mean of :math:`\mathrm{dist}(G(w_t), G(w_{t+\epsilon}))/\epsilon^2` at a random t of the line between each latent
    and a random other one, without the hundredth at each end. The published step is 1e-4, which in
    float32 leaves three digits of a squared difference of pixels; published distances are LPIPS.

    Parameters
    ----------
    generator : torch.nn.Module
    latents : Tensor of shape (n, d)
        Published: 5,000 of them.
    rng : torch.Generator
    distance : callable, default=mean squared difference of pixels
        ``distance(pictures, pictures) -> (n,)``.
    eps : float, default=0.01
        Step, as a share of the line.
    batch_size : int, default=64
    """
    _check_sample(latents, eps)
    n = len(latents)
    # A shift by 1 to n - 1 places, so that none is its own partner.
    partners = (torch.arange(n) + torch.randint(1, n, (n,), generator=rng)) % n
    t = torch.rand(n, 1, generator=rng).to(latents)
    lengths = []
    for rows in torch.arange(n).split(batch_size):
        a, b = latents[rows], latents[partners[rows]]
        at = torch.lerp(a, b, t[rows])
        with _at_rest(generator):
            before, after = generator(at), generator(at + eps * (b - a))
        lengths.append(distance(before, after) / eps**2)
    return _trimmed_mean(torch.cat(lengths))


@torch.no_grad()
def interpretable_path_length(
    generator: nn.Module,
    directions: Mapping[str, Directions],
    latents: Float[Tensor, "n d"],
    *,
    rng: torch.Generator,
    distance: Distance = _squared_difference,
    eps: float | int = 1e-2,
    batch_size: int = 64,
) -> float:
    r"""How fast pictures change along the directions found: :func:`perceptual_path_length` with steps along those.

    Each batch moves at one random layer along one random direction, by :math:`\epsilon`.

    Parameters
    ----------
    generator : torch.nn.Module
    directions : mapping of str to Directions
        By layer, from :func:`discover_directions`.
    latents : Tensor of shape (n, d)
    rng : torch.Generator
    distance : callable, default=mean squared difference of pixels
    eps : float, default=0.01
        Step in units of the latent; the published ones are 1e-4 and 1.
    batch_size : int, default=64
    """
    _check_sample(latents, eps)
    names = list(directions)
    if not names:
        raise ValueError("directions must hold at least one layer, got none")
    lengths = []
    for rows in torch.arange(len(latents)).split(batch_size):
        name = names[int(torch.randint(len(names), (), generator=rng))]
        vectors = directions[name].vectors
        direction = vectors[int(torch.randint(len(vectors), (), generator=rng))]
        before, after = traverse(generator, latents[rows], direction, [0.0, eps], name)
        lengths.append(distance(before, after) / eps**2)
    return _trimmed_mean(torch.cat(lengths))


@torch.no_grad()
def direction_strengths(
    generator: nn.Module, layer: str, directions: Directions, latents: Float[Tensor, "n d"], step: float | int = 1.0
) -> Float[Tensor, " r"]:
    """Return the root mean squared change of the pixels for a step along each direction, at one layer.

    Parameters
    ----------
    generator : torch.nn.Module
    layer : str
    directions : Directions
    latents : Tensor of shape (n, d)
    step : float, default=1.0
        In units of the latent.
    """
    with _at_rest(generator):
        at = generator(latents)
    moved = [traverse(generator, latents, v, [float(step)], layer)[0] - at for v in directions.vectors]
    return torch.stack([change.square().mean().sqrt() for change in moved])


def _check_sample(latents: Tensor, eps: float) -> None:
    if len(latents) < 2:
        raise ValueError(f"latents must be a sample of at least two, got {len(latents)}")
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents must be finite, got NaN or infinity")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be above 0 and finite, got {eps}")


def _trimmed_mean(lengths: Tensor) -> float:
    """Mean without the hundredth of the values at each end, rounded down."""
    cut = len(lengths) // 100
    return float(lengths.sort().values[cut : len(lengths) - cut].mean())


def save_directions(directions: Mapping[str, Directions], path: Path | str) -> Path:
    """Write directions to .npz or .safetensors, atomically: members ``<layer>/vectors`` and ``<layer>/values``."""
    arrays = {
        f"{name}/{part}": getattr(found, part).detach().cpu().numpy()
        for name, found in directions.items()
        for part in Directions._fields
    }
    return write_members(Path(path), arrays)


def load_directions(path: Path | str) -> dict[str, Directions]:
    """Read what :func:`save_directions` wrote.

    Raises
    ------
    FileError
        One of its five kinds; ``WrongContent`` where the file holds something else.
    """
    members = {name: torch.as_tensor(array) for name, array in read_members(path).items()}
    names = sorted({name.rpartition("/")[0] for name in members})
    found: dict[str, Any] = {}
    for name in names:
        parts = [members.get(f"{name}/{part}") for part in Directions._fields]
        vectors, values = parts
        if not (name and vectors is not None and values is not None and vectors.shape[:1] == values.shape):
            raise WrongContent(path, found=f"members {sorted(members)}", expected="<layer>/vectors and <layer>/values")
        found[name] = Directions(vectors, values)
    return found
