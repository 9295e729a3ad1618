"""Claim: blocks of multi-head scan are better than the usual 2D selective scan, at half of its parameters."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from polyspan.claims import Claim
from polyspan.data import dataset, digits, photograph

TEST_SHARE, CHOICE_SHARE = 0.3, 0.15
RATES = (2e-2, 6e-3)
DECAY, WARM = 0.01, 0.1


class Pictures(NamedTuple):
    """Grey images (n, h, w), what is to be told of them, and how: classes (n,) or masks (n, h, w) of 0 and 1.

    ``recipe`` holds steps, batch, channels, blocks, states, the side of a patch in pixels (it divides the sides of the
    images), how many rates are tried, and whether two more arms run: routes summed without a gate, and no scan.
    """

    images: np.ndarray
    targets: np.ndarray
    recipe: np.ndarray


def recipe(
    steps: int, batch: int, channels: int, blocks: int, states: int, patch: int, rates: int, dear: bool
) -> np.ndarray:
    """Return a training recipe as an array."""
    return np.array([steps, batch, channels, blocks, states, patch, rates, dear])


def on_digits(seed: int, *, steps=90) -> Pictures:
    """Handwritten digits of 8 by 8 pixels, a resample of 1,200."""
    X, y = digits()
    kept = np.random.default_rng([seed, 5]).choice(len(X), 1200, replace=False)
    return Pictures(X[kept].reshape(-1, 8, 8), y[kept], recipe(steps, 32, 16, 1, 4, 2, 1, False))


def on_photographs(seed: int, *, n=240, side=24, steps=90) -> Pictures:
    """Cut-outs of a photograph of grass with a patch of the moon in them, of any outline: which pixels are the moon's?

    Both photographs have the same mean and spread, so that no single pixel tells. Cut-outs to train and to test on
    come from the same photographs.
    """
    rng = np.random.default_rng(seed)
    pair = [photograph(name) for name in ("grass", "moon")]
    ground, patch = ((image - image.mean()) / image.std() for image in pair)
    # Rolled round the edges, a mask is as likely here as there: the place alone tells nothing.
    masks = np.stack(
        [np.roll(blob(rng, side, radius=0.35 * side), rng.integers(side, size=2), axis=(0, 1)) for _ in range(n)]
    )

    def cuts(image: np.ndarray) -> np.ndarray:
        corners = rng.integers(0, min(image.shape) - side, size=(n, 2))
        return np.stack([image[i : i + side, j : j + side] for i, j in corners])

    images = np.where(masks, cuts(patch), cuts(ground))
    return Pictures(images.astype(np.float32), masks.astype(np.int64), recipe(steps, 16, 16, 1, 4, 4, 1, False))


def blob(rng: np.random.Generator, side: int, *, radius: float, centre: Any = None) -> np.ndarray:
    """Return a mask (side, side) of a star-shaped blob with a wavy outline."""
    i, j = np.indices((side, side))
    ci, cj = rng.uniform(0.3 * side, 0.7 * side, size=2) if centre is None else centre
    angle, wave = np.arctan2(i - ci, j - cj), 0.0
    for k in (2, 3, 5):
        wave = wave + rng.uniform(0, 0.2) * np.cos(k * angle + rng.uniform(0, 2 * math.pi))
    return np.hypot(i - ci, j - cj) < radius * (1 + wave)


def largest(seed: int, *, n=400, side=32, steps=400) -> Pictures:
    """The largest of three blobs of one texture: a pixel of it looks like one of the others, only sizes tell."""
    rng = np.random.default_rng(seed)
    images, masks = rng.normal(0, 0.3, size=(n, side, side)), np.zeros((n, side, side), dtype=bool)
    quarters = np.array([(0.27, 0.27), (0.27, 0.73), (0.73, 0.27), (0.73, 0.73)])
    for i in range(n):
        centres = quarters[rng.permutation(4)[:3]] * side + rng.uniform(-1, 1, size=(3, 2))
        shapes = [blob(rng, side, radius=r * side, centre=c) for r, c in zip((0.2, 0.12, 0.12), centres, strict=True)]
        masks[i] = shapes[0] & ~shapes[1] & ~shapes[2]
        images[i] += shapes[0] | shapes[1] | shapes[2]
    return Pictures(images.astype(np.float32), masks.astype(np.int64), recipe(steps, 16, 16, 2, 8, 4, 2, True))


def on_mnist(seed: int) -> Pictures:
    """3,000 handwritten digits of 28 by 28 pixels, drawn from MNIST's test set."""
    found = dataset("mnist-t10k")
    kept = np.random.default_rng([seed, 5]).choice(len(found.labels), 3000, replace=False)
    return Pictures(found.images[kept] / np.float32(255), found.labels[kept], recipe(250, 32, 16, 2, 8, 4, 2, True))


def on_coil20(seed: int) -> Pictures:  # noqa: ARG001 - the seed splits, it draws nothing here
    """1,440 photographs of 20 things from all sides, 32 by 32."""
    found = dataset("coil20")
    images = np.asarray(found.images, dtype=np.float32) / np.float32(found.scale)
    return Pictures(images, found.labels, recipe(200, 32, 16, 2, 8, 4, 2, True))


def shades(seed: int, *, n=240) -> Pictures:
    """Control: three shades of grey with faint noise; any pixel tells the class, and no order of pixels matters."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    images = y[:, None, None] - 1 + rng.normal(0, 0.02, size=(n, 8, 8))
    return Pictures(images.astype(np.float32), y, recipe(50, 32, 16, 1, 4, 2, 1, False))


def flatten(data: Pictures, seed: int) -> Pictures:  # noqa: ARG001 - nothing is drawn
    """Give every pixel the mean of its image, so that routes have nothing to find."""
    images = np.asarray(data.images, dtype=np.float32)
    return Pictures(np.broadcast_to(images.mean(axis=(1, 2), keepdims=True), images.shape).copy(), *data[1:])


def network(
    block: Callable[..., Any], channels: int, blocks: int, patch: int, outputs: int, dense: bool, generator: Any
) -> Any:
    """Patches, blocks, and a linear layer: on the mean over patches, or ``dense``, to the pixels of each patch."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.utils.skip_init(nn.Conv2d, 1, channels, patch, stride=patch)
            self.head = nn.utils.skip_init(nn.Linear, channels, patch * patch if dense else outputs)
            with torch.no_grad():  # before the blocks, so that all arms begin with the same
                for layer in (self.embed, self.head):
                    bound = layer.weight[0].numel() ** -0.5
                    layer.weight.uniform_(-bound, bound, generator=generator)
                    layer.bias.zero_()
            self.norm = nn.LayerNorm(channels)
            self.blocks = nn.Sequential(*(block(channels, generator=generator) for _ in range(blocks)))
            self.last = nn.LayerNorm(channels)

        def forward(self, x: Any) -> Any:
            y = self.last(self.blocks(self.norm(self.embed(x.unsqueeze(1)).permute(0, 2, 3, 1))))
            if not dense:
                return self.head(y.mean(dim=(1, 2)))
            b, h, w, _ = y.shape
            pixels = self.head(y).view(b, h, w, patch, patch).permute(0, 1, 3, 2, 4)
            return pixels.reshape(b, h * patch, w * patch)

    return Net()


def block_kinds(states: int) -> dict[str, Callable[..., Any]]:
    """The arms: which block, by name; each is called with its channels and a generator."""
    from torch import nn

    from polyspan.nn import MHSBlock, SS2DBlock

    def no_scan(channels: int, *, generator: Any) -> Any:
        made = SS2DBlock(channels, expand=1, d_state=1, generator=generator)
        made.mix = nn.Identity()
        return made

    return {
        "method": lambda c, *, generator: MHSBlock(c, d_state=states, generator=generator),
        "baseline": lambda c, *, generator: SS2DBlock(c, d_state=states, generator=generator),
        "routes summed": lambda c, *, generator: MHSBlock(c, d_state=states, merge="sum", generator=generator),
        "no scan": no_scan,
    }


def train(net: Any, X: Any, y: Any, steps: int, batch: int, rate: float, seed: int) -> None:
    """AdamW, warm-up and cosine, with the loss of the task: cross-entropy, or binary cross-entropy plus Dice."""
    import torch
    from torch.nn import functional as F

    from polyspan.nn import bce_dice_loss

    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=DECAY)
    warm = max(1, round(WARM * steps))
    for step in range(steps):
        rows = torch.randint(len(X), (batch,), generator=generator)
        logits = net(X[rows])
        loss = F.cross_entropy(logits, y[rows]) if y.ndim == 1 else bce_dice_loss(logits, y[rows])
        for group in optimiser.param_groups:
            fall = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / (steps - warm))
            group["lr"] = rate * min(1.0, (step + 1) / warm) * fall
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()


def score(net: Any, X: Any, y: Any) -> float:
    """Accuracy, or the Dice coefficient of all pixels together."""
    import torch

    with torch.no_grad():
        logits = torch.cat([net(part) for part in X.split(256)])
    if y.ndim == 1:
        return float((logits.argmax(dim=1) == y).double().mean())
    found, true = logits > 0, y > 0
    return 2 * int((found & true).sum()) / max(int(found.sum()) + int(true.sum()), 1)


def trial(data: Pictures, seed: int) -> dict[str, float]:
    """Train each arm on the same rows in the same order, choose its rate on others, score it on the rest."""
    import torch

    steps, batch, channels, blocks, states, patch, n_rates, dear = (int(v) for v in data.recipe)
    images, targets = np.asarray(data.images, dtype=np.float32), np.asarray(data.targets).astype(np.int64)
    n = len(images)
    order = np.random.default_rng([seed, 2]).permutation(n)
    X, y = torch.as_tensor(images[order]), torch.as_tensor(targets[order])
    first, second = n - round((TEST_SHARE + CHOICE_SHARE) * n), n - round(TEST_SHARE * n)
    spread, mean = torch.std_mean(X[:first])
    X = (X - mean) / (spread if spread > 0 else 1.0)
    dense, outputs = y.ndim == 3, int(y.max()) + 1
    scores, sizes = {}, {}
    for name, kind in list(block_kinds(states).items())[: None if dear else 2]:
        tried = []
        for rate in RATES[:n_rates]:
            net = network(kind, channels, blocks, patch, outputs, dense, torch.Generator().manual_seed(seed))
            train(net, X[:first], y[:first], steps, batch, rate, seed)
            tried.append((score(net, X[first:second], y[first:second]), score(net, X[second:], y[second:])))
            sizes[name] = sum(p.numel() for p in net.blocks.parameters())
        scores[name] = max(tried, key=lambda pair: pair[0])[1]
    return scores | {"parameters of blocks, share of the baseline's": sizes["method"] / sizes["baseline"]}


CLAIM = Claim(
    slug="mhs-vm",
    statement=(
        "Blocks of multi-head scan classify and segment better than the usual 2D selective scan of the same width, "
        "with fewer parameters."
    ),
    method="four heads on snake, diagonal, spiral and raster routes, gate of disagreement at 0.5",
    baseline="blocks of twice the inner width, raster routes summed, output projection; same net, batches and rates",
    metric="accuracy on held-out images, or Dice coefficient of held-out pixels, share",
    margin=0.005,
    worlds={
        "digits": on_digits,
        "photographs": on_photographs,
        "largest": largest,
        "mnist": on_mnist,
        "coil20": on_coil20,
        "shades": shades,
    },
    control="shades",
    levels={"quick": ("digits", "photographs"), "standard": ("largest", "mnist", "coil20")},
    seeds={"quick": 3, "standard": 3},
    trial=trial,
    user_data=Pictures,
    spoil=flatten,
    why=(
        "In short training on small pictures it does not hold. On digits, 90 steps, the usual scan is right about "
        "84.3 % and ours about 77.0 %; finding the moon in grass they have a Dice coefficient of 0.730 and 0.720. "
        "On MNIST it is 85.1 % against 71.1 %, where the same block without its gate has 74.9 % and without any scan "
        "80.2 %, and on COIL-20 93.1 % against 90.7 %. "
        "The usual block has twice the inner width and an output projection; ours has 0.58 of its parameters, "
        "four channels a head, and a gate that is linear rather than selective: four routes that disagree do so by "
        "2/3 at least, so that a threshold of 0.5 shuts nothing off. In one trial on digits with 32 channels and 60 "
        "steps the routes summed without a gate did as well as with it (88.6 % against 88.1 %, and 92.2 % for the "
        "usual scan); the same block without any scan reached 83.6 %. Where any pixel tells the class (control) both "
        "are always right. Rate, steps and width were chosen in some nine trials by the held-out score of one seed "
        "that is not measured here, on the same digits; both arms share them. The photographs are the third pair "
        "tried: in the first both nets learnt a place, in the second nothing."
    ),
)
