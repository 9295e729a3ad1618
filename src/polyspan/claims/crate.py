"""Claim: training makes a rate-reduction transformer compress its tokens towards the subspaces that it learns."""

from typing import Any, NamedTuple

import numpy as np

from polyspan.claims import Claim
from polyspan.data import dataset, digits, photograph, planted_subspaces

MEASURED = 200
HELD_OUT = 0.25


class Pictures(NamedTuple):
    """Grey images (n, h, w), the class (n,) of each, and how to train.

    ``recipe`` (8,): steps (0 leaves the network as it starts), batch, width, layers, heads, pixels of a patch's side,
    most pixels by which training images are moved, and whether a ViT of as many parameters is trained too (0 or 1).
    """

    images: np.ndarray
    labels: np.ndarray
    recipe: np.ndarray


def recipe(*, steps: int, batch: int, width: int, layers: int, patch: int, shift: int, vit: bool) -> np.ndarray:
    """Put a recipe in the order of :class:`Pictures`; four heads."""
    return np.array([steps, batch, width, layers, 4, patch, shift, float(vit)])


def planted(seed: int) -> Pictures:
    """Images (16, 16) of 16 patches, each on 3 of 16 dimensions: half of them the class's own, half shared."""
    rng = np.random.default_rng(seed)
    n, n_classes = 800, 4
    world = planted_subspaces(seed, n_per=n * 16, d=16, k=3, n_subspaces=n_classes + 1, noise=0.1)
    pools = [list(world.points[world.labels == j]) for j in range(n_classes + 1)]
    labels = rng.integers(n_classes, size=n)
    patches = np.array(
        [[pools[y if own else n_classes].pop() for own in rng.permutation(np.arange(16) < 8)] for y in labels]
    )
    images = patches.reshape(n, 4, 4, 4, 4).transpose(0, 1, 3, 2, 4).reshape(n, 16, 16)
    how = recipe(steps=160, batch=64, width=32, layers=4, patch=4, shift=0, vit=False)
    return Pictures(images.astype(np.float32), labels, how)


def on_digits(seed: int, *, steps: int = 200, vit: bool = False) -> Pictures:  # noqa: ARG001 - the seed draws networks
    """All 1,797 of scikit-learn's digits, in patches of 2 by 2 pixels."""
    images, labels = digits()
    how = recipe(steps=steps, batch=64, width=32, layers=4, patch=2, shift=1, vit=vit)
    return Pictures(images.reshape(-1, 8, 8), labels, how)


def crops(seed: int, *, steps: int = 160, vit: bool = False) -> Pictures:
    """Squares of 16 by 16 pixels from six grey photographs at half size; the class is the photograph."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for label, name in enumerate(("brick", "camera", "coins", "grass", "gravel", "text")):
        picture = photograph(name)
        h, w = (side // 2 for side in picture.shape)
        half = picture[: 2 * h, : 2 * w].reshape(h, 2, w, 2).mean(axis=(1, 3))
        rows, columns = rng.integers(h - 16, size=200), rng.integers(w - 16, size=200)
        images += [half[r : r + 16, c : c + 16] for r, c in zip(rows, columns, strict=True)]
        labels += [label] * 200
    how = recipe(steps=steps, batch=64, width=32, layers=4, patch=4, shift=1, vit=vit)
    return Pictures(np.array(images), np.array(labels), how)


def public(name: str, seed: int, *, patch: int, steps: int, shift: int, most: int = 6000) -> Pictures:
    """At most ``most`` images of a public set, white is 1."""
    found = dataset(name)
    rows = np.sort(np.random.default_rng(seed).permutation(len(found.labels))[:most])
    images = found.images[rows].astype(np.float32) / np.float32(found.scale)
    how = recipe(steps=steps, batch=128, width=64, layers=6, patch=patch, shift=shift, vit=True)
    return Pictures(images, found.labels[rows], how)


def untrained(data: Pictures, seed: int) -> Pictures:  # noqa: ARG001 - nothing is drawn
    """Leave the images and take the training away."""
    how = np.array(data.recipe, dtype=np.float64)
    how[0] = how[-1] = 0
    return data._replace(recipe=how)


def transformer(like: Any, layers: int, heads: int, generator: Any) -> Any:
    """Return a network like a CRATE, with ``layers`` plain pre-norm transformer layers of twice the width inside."""
    import torch

    width = like.config["dim"]
    with torch.device("meta"):
        made = [
            torch.nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        ]
    like.blocks = torch.nn.ModuleList(layer.to_empty(device="cpu") for layer in made)
    with torch.no_grad():
        for name, parameter in like.blocks.named_parameters():
            if parameter.ndim == 2:
                torch.nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
    return like


def trial(data: Pictures, seed: int) -> dict[str, float]:
    """Train on three quarters; measure rates, sparsity and accuracy on images that were held out."""
    import torch

    from polyspan.nn import CRATE, layer_report
    from polyspan.nn.image_training import Batches, ImageTraining, Recipe

    steps, batch, width, layers, heads, patch, shift, vit = (int(v) for v in np.asarray(data.recipe).ravel())
    images = np.asarray(data.images, dtype=np.float32)
    classes, labels = np.unique(np.asarray(data.labels), return_inverse=True)
    order = np.random.default_rng([seed, 1]).permutation(len(labels))
    held, train = np.split(order, [int(HELD_OUT * len(order))])
    flat, shape = images.reshape(len(images), -1), (1, *images.shape[1:])
    mean, spread = float(flat[train].mean()), float(flat[train].std()) or 1.0
    feed, test = (Batches(flat[rows], shape, mean, spread, "cpu") for rows in (train, held))
    how = Recipe(steps=steps, batch=batch, rate=3e-3, decay=0.05, shift=shift)
    measured = [test(slice(start, start + 100)) for start in range(0, min(MEASURED, len(held)), 100)]

    def network(generator: Any) -> CRATE:
        return CRATE(
            shape[1:], patch, len(classes), width, layers, heads, channels=1, patch_norm=patch * patch >= 16,
            generator=generator,
        )  # fmt: skip

    def accuracy(model: Any) -> float:
        with torch.no_grad():
            answers = [model(test(slice(s, s + 500))).argmax(dim=1) for s in range(0, len(held), 500)]
        return float(np.mean(torch.cat(answers).numpy() == labels[held]))

    def falls(told: Any) -> tuple[float, float, float]:
        kept = [1 - float(r[-1] / r[0]) for r in (told.rate_within, told.rate_random, told.rate)]
        return kept[0], kept[1], kept[2]

    generator = torch.Generator().manual_seed(seed)
    model = network(generator)
    start = falls(layer_report(model, measured, n_random=16, seed=seed))[0]
    ImageTraining(model, how, generator).run(feed, labels[train])
    told = layer_report(model, measured, n_random=16, seed=seed)
    own, random, whole = falls(told)
    gap = 1 - told.rate_within / told.rate_random
    arms = {
        "method": own,
        "baseline": random,
        "fall before training": start,
        "fall of the rate of all": whole,
        "below turned subspaces, first layer": float(gap[0]),
        "below turned subspaces, last layer": float(gap[-1]),
        "non-zero entries, first layer": float(told.nonzero_share[0]),
        "non-zero entries, last layer": float(told.nonzero_share[-1]),
        "accuracy": accuracy(model),
    }
    if vit:
        generator = torch.Generator().manual_seed(seed)
        rival = transformer(network(generator), max(1, round(layers / 3)), heads, generator)
        ImageTraining(rival, how, generator).run(feed, labels[train])
        arms["accuracy, ViT of as many parameters"] = accuracy(rival)
    return arms


CLAIM = Claim(
    slug="crate",
    statement=(
        "From the first layer of a trained CRATE to the last, the tokens' coding rate within the layers' learnt "
        "subspaces falls by more than within the same subspaces turned at random."
    ),
    method="the learnt subspaces; AdamW, cross-entropy, rates of held-out images between the halves of each layer",
    baseline="the same subspaces turned by a random isometry (mean of 16), the same tokens of the same network",
    metric="fall of the coding rate within subspaces from the first layer to the last, share",
    margin=0.01,
    worlds={
        "planted": planted,
        "digits": on_digits,
        "crops": crops,
        "long digits": lambda seed: on_digits(seed, steps=600, vit=True),
        "mnist": lambda seed: public("mnist-t10k", seed, patch=7, steps=400, shift=2),
        "coil20": lambda seed: public("coil20", seed, patch=8, steps=250, shift=2),
        "untrained": lambda seed: untrained(on_digits(seed), seed),
    },
    control="untrained",
    levels={"quick": ("planted", "digits", "crops"), "standard": ("long digits", "mnist", "coil20")},
    seeds={"quick": 3, "standard": 3},
    trial=trial,
    user_data=Pictures,
    spoil=untrained,
    why=(
        "Training does make the rate fall, by 5 to 25 % from the first layer to the last where an untrained network "
        "falls by less than 3 % either way; but most of it is tokens growing alike, since within turned subspaces it "
        "falls nearly as much. With 3 seeds: planted patches 14 % (turned 13 %), scikit-learn's digits 9 % (8 %) after "
        "200 steps and 10 % (8 %) after 600, squares of photographs 12 % (12 %), MNIST 22 % (20 %, every seed above "
        "the margin), COIL-20 18 % (19 %). Which sign the difference has depends on the seed where training is short. "
        "Learnt subspaces hold 1 to 6 % less than turned ones in the last layer of most networks. Sparsity does not "
        "grow with depth: an untrained network has 32 % of entries non-zero at its end, a trained one 38 to 46 %. "
        "Accuracy, not judged: MNIST 94.7 % after 400 steps and a ViT with 11 % fewer parameters 94.6 %; digits after "
        "600 steps 86 and 78 %; COIL-20 97 and 99 %. The rate was chosen on digits by accuracy; steps are few, for "
        "time: COIL-20 had 99.7 % in one run with 400 in place of 250. That the subspaces are "
        "compared with themselves turned, and not with random ones, was chosen after the quick worlds had been seen."
    ),
)
