"""Claim: a generator keeps its pictures if its projections are made orthogonal from their own leading directions."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from polyspan.claims import Claim
from polyspan.data import dataset, digits

LATENT, WIDTH, RANK = 16, 64, 8
BATCH, RATE, FINE_RATE = 64, 3e-3, 1e-3
TRAIN_SHARE = 0.8


class Pictures(NamedTuple):
    """Grey pictures (n, h, w), values in [0, 1], and ``steps`` (2,): of training before the surgery, and after it."""

    images: np.ndarray
    steps: np.ndarray


def on_digits(seed: int) -> Pictures:
    """All bundled digits, 8 by 8, in an order of the seed."""
    X, _ = digits()
    return Pictures(X[np.random.default_rng(seed).permutation(len(X))].reshape(-1, 8, 8), np.array([500, 25]))


def public(name: str, seed: int, *, n: int, steps: tuple[int, int]) -> Pictures:
    """Up to n pictures of a public set at half their width, averaged over squares of four pixels."""
    found = dataset(name)
    order = np.random.default_rng(seed).permutation(len(found.images))[:n]
    images = np.asarray(found.images, dtype=np.float32)[order] / np.float32(found.scale)
    h, w = (side // 2 for side in images.shape[1:])
    return Pictures(images.reshape(-1, h, 2, w, 2).mean(axis=(2, 4)), np.array(steps))


def mnist(seed: int) -> Pictures:
    """Half of the 10,000 digits, 14 by 14."""
    return public("mnist-t10k", seed, n=5000, steps=(2000, 100))


def faces(seed: int) -> Pictures:
    """All 400 faces, 16 by 16."""
    return public("orl", seed, n=400, steps=(2000, 100))


def untrained(data: Pictures, seed: int) -> Pictures:  # noqa: ARG001 - nothing is drawn
    """Leave out the training before the surgery: the projections hold nothing yet that could be kept."""
    return data._replace(steps=np.array([0, int(np.asarray(data.steps)[1])]))


def published_weight(weight: Any, rank: int) -> Any:
    """Weight that the published code starts from, for a mean gain of the leading singular values of ``weight`` (p, d).

    It takes the packed result of LAPACK's QR, diagonal included, for reflection vectors, and the right singular vectors
    by rows where columns are needed: an exact one would be ``U[:, :rank] @ Vh[:rank]`` times the gain.
    """
    import torch

    from polyspan.linalg import householder_product

    U, s, Vh = torch.linalg.svd(weight.detach().double())
    left, right = (householder_product(torch.geqrf(side)[0]) for side in (U, Vh.mT))
    return (s[:rank].mean() * left[:, :rank] @ right[:rank]).to(weight)


def projected(model: Any, start: str, seed: int) -> Any:
    """Copy the autoencoder and make its generator's projections low-rank orthogonal, from a start of that name."""
    import torch

    from polyspan.nn import HouseholderProjector, project_model

    model = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(seed)
    free = {name: module.weight for name, module in model.generator.named_modules() if name.endswith(".affine")}
    project_model(model.generator, rank=RANK)
    for name, weight in free.items():
        layer = model.generator.get_submodule(name)
        gain = layer.gain.clone()
        if start == "published":
            layer.set_weight_(published_weight(weight, RANK))
        elif start == "random":
            p, d = weight.shape
            layer.set_weight_(HouseholderProjector(d, p, RANK, init="random", generator=rng).weight.detach())
        layer.gain.copy_(gain)
    return model


def truncated(model: Any) -> Any:
    """Copy the autoencoder with its projections as free products of rank r, from the same leading directions."""
    import torch
    from torch import nn

    model = copy.deepcopy(model)
    for layer in model.generator.layers:
        old = layer.affine
        U, s, Vh = torch.linalg.svd(old.weight.detach(), full_matrices=False)
        down, up = nn.utils.skip_init(nn.Linear, LATENT, RANK, bias=False), nn.utils.skip_init(nn.Linear, RANK, WIDTH)
        with torch.no_grad():
            down.weight.copy_(s[:RANK, None].sqrt() * Vh[:RANK])
            up.weight.copy_(U[:, :RANK] * s[:RANK].sqrt())
            up.bias.copy_(old.bias)
        layer.affine = nn.Sequential(down, up)
    return model


def trial(data: Pictures, seed: int) -> dict[str, float]:
    """Train one autoencoder on four fifths, branch off every arm, fine-tune each for few more steps, score.

    All arms see the same batches and noise. The baseline is the better of the two other starts on the rest.
    """
    import torch

    from polyspan.nn import StyleAutoencoder, train_autoencoder

    images = torch.tensor(np.asarray(data.images), dtype=torch.float32)
    n = int(TRAIN_SHARE * len(images))
    train, test = images[:n], images[n:]
    steps, more = (int(count) for count in np.asarray(data.steps))
    rng = torch.Generator().manual_seed(seed)
    model = StyleAutoencoder(tuple(images.shape[1:]), LATENT, WIDTH, generator=rng)
    train_autoencoder(model, train, steps, generator=rng, learning_rate=RATE, batch_size=BATCH)
    spread = float((test - train.mean(dim=0)).square().mean())

    @torch.no_grad()
    def error(made: Any) -> float:
        return 100 * float((made(test) - test).square().mean()) / spread

    starts: dict[str, Callable[[], Any]] = {
        "exact": lambda: projected(model, "exact", seed),
        "published start": lambda: projected(model, "published", seed),
        "random start": lambda: projected(model, "random", seed),
        "free product of rank 8": lambda: truncated(model),
        "free matrices, rank 16": lambda: copy.deepcopy(model),
    }
    arms, before = {}, {}
    for name, make in starts.items():
        arms[name] = make()
        before[name] = error(arms[name])
        rng = torch.Generator().manual_seed(seed + 1)
        train_autoencoder(arms[name], train, more, generator=rng, learning_rate=FINE_RATE, batch_size=BATCH)
    after = {name: error(made) for name, made in arms.items()}
    return {
        "method": after["exact"],
        "baseline": min(after["published start"], after["random start"]),
        **{name: value for name, value in after.items() if name != "exact"},
        "exact, before fine-tuning": before["exact"],
        "published, before fine-tuning": before["published start"],
        "random, before fine-tuning": before["random start"],
        **_directions(arms["exact"], arms["free matrices, rank 16"], test, spread, seed),
    }


def _directions(ours: Any, free: Any, test: Any, spread: float, seed: int) -> dict[str, float]:
    """Compare the directions of the projector with SeFa's of the free generator, at the layer in the middle."""
    import torch

    from polyspan.nn import Directions, direction_strengths, discover_directions, interpretable_path_length

    layer = f"layers.{len(free.generator.layers) // 2}.affine"
    facts = {}
    for label, model, method in (("projector", ours, "householder"), ("SeFa", free, "sefa")):
        generator = model.generator
        with torch.no_grad():
            latents = model.encode(test)[0][:64]
        found = discover_directions(generator, [layer], method, num_directions=RANK)
        # The right factor of the full decomposition holds the directions' space first, and what is beyond it.
        basis = torch.linalg.svd(found[layer].vectors.detach())[2]
        everything = direction_strengths(generator, layer, Directions(basis, torch.ones(len(basis))), latents)
        strengths = direction_strengths(generator, layer, found[layer], latents)
        rng = torch.Generator().manual_seed(seed)
        facts[f"variation of the directions' strength, {label}"] = float(strengths.std() / strengths.mean())
        facts[f"path length along the directions, {label}"] = (
            100 * interpretable_path_length(generator, found, latents, rng=rng, batch_size=8) / spread
        )
        facts[f"directions of 16 that change pictures, {label}"] = float((everything > 1e-5 * everything.max()).sum())
    return facts


CLAIM = Claim(
    slug="householder-projector",
    statement="A generator keeps its pictures if its projections become orthogonal from their own leading directions.",
    method="Householder projectors of rank 8 from the exact leading singular vectors, a twentieth of the steps more",
    baseline="the better of the published start and a random one, same rank, gain, batches and steps",
    metric="squared error of held-out pictures through the autoencoder, per cent of their variance",
    better="lower",
    margin=5.0,
    worlds={
        "digits": on_digits,
        "mnist": mnist,
        "faces": faces,
        "untrained": lambda seed: untrained(on_digits(seed), seed),
    },
    control="untrained",
    levels={"quick": ("digits",), "standard": ("mnist", "faces")},
    seeds={"quick": 4, "standard": 5},
    trial=trial,
    user_data=Pictures,
    spoil=untrained,
    why=(
        "The start decides: on digits the error after 25 steps is 31 per cent from the exact start, 83 from the "
        "published one and 76 from a random one; before them it is 62, 235 and 222. The published start, a slip of "
        "the code and not of the idea, is no better than chance. Orthogonality itself neither costs nor gains "
        "pictures: a free product of the same rank and start ends at 31, too, and free matrices of rank 16 at 26. "
        "What it buys is that exactly 8 of the 16 directions of a layer change anything. Along them strengths are "
        "only a little more even than along SeFa's (variation 0.18 against 0.22), and paths are not smoother (1.4 "
        "against 1.2): equal gains in the styles are not equal changes of pictures. An untrained generator (control) "
        "has nothing to keep, and no start is better."
    ),
)
