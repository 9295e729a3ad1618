"""Claim: the units of a trained network are a better basis than others for predicting the units of its sibling."""

from typing import Any, NamedTuple

import numpy as np

from polyspan.align import ActivationCollector, SparseUnitMapping
from polyspan.claims import Claim
from polyspan.data import dataset, digits
from polyspan.linalg import PairedMoments, random_orthogonal

FEW = 4
PATH = tuple(float(a) for a in np.geomspace(1.0, 1e-3, 60))
POSITIONS = 16


class Activations(NamedTuple):
    """One layer of two networks on the same inputs, (n, d_A) and (n, d_B), inputs in random order.

    Rows of one input, such as positions of an image, stand together: the first half is fitted, the second is scored.
    """

    a: np.ndarray
    b: np.ndarray


def untrained_network(seed: int, *, channels: tuple[int, int], kernel: int, stride: int, side: int) -> Any:
    """Two convolutions and a linear layer for ten classes of images (side, side), with weights drawn by the seed."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    half = -(-(side // stride) // 2)
    layers = [
        nn.Conv2d(1, channels[0], kernel, stride=stride, padding=kernel // 2),
        nn.ReLU(),
        nn.Conv2d(channels[0], channels[1], 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(channels[1] * half**2, 10),
    ]
    return _drawn(layers, generator)


def untrained_dense(seed: int, *, d_in: int) -> Any:
    """Two dense hidden layers of 64 and 48 units, with weights drawn by the seed."""
    import torch
    from torch import nn

    layers = [nn.Linear(d_in, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)]
    return _drawn(layers, torch.Generator().manual_seed(seed))


def _drawn(layers: list, generator: Any) -> Any:
    from torch import nn

    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data.normal_(std=(2 / layer.weight[0].numel()) ** 0.5, generator=generator)
            layer.bias.data.zero_()
    return nn.Sequential(*layers).eval()


def train(network: Any, images: np.ndarray, labels: np.ndarray, seed: int, *, epochs: int, batch=64) -> Any:
    """Train by Adam and cross-entropy, batches drawn by the seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x, y = torch.as_tensor(images), torch.as_tensor(labels)
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            optimiser.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimiser.step()
    return network


def layer_of(network: Any, layer: str, images: np.ndarray, seed: int) -> np.ndarray:
    """Activations (images * positions, units) at 16 random positions at most, which are the seed's."""
    import torch

    with ActivationCollector(network, [layer]) as collect:
        parts = [collect(part)[layer] for part in torch.as_tensor(images).split(256)]
    found = np.concatenate(parts)
    n = found.shape[1]
    at = np.sort(np.random.default_rng(seed).choice(n, size=min(n, POSITIONS), replace=False))
    return found[:, at].reshape(-1, found.shape[2])


def siblings(
    images: np.ndarray, labels: np.ndarray, seed: int, *, make: Any, layer: str, n_train: int, n_test: int, epochs: int
) -> Activations:
    """Train two networks on the same images from two seeds, and run both on images that neither has seen."""
    order = np.random.default_rng(seed).permutation(len(images))
    seen, new = order[:n_train], order[n_train : n_train + n_test]
    networks = [train(make(2 * seed + i), images[seen], labels[seen], 2 * seed + i, epochs=epochs) for i in range(2)]
    return Activations(*(layer_of(network, layer, images[new], seed) for network in networks))


def on_digits(seed: int, *, epochs=10) -> Activations:
    """Second convolution (24 channels) of two networks trained on 900 of scikit-learn's digits, 8 by 8 pixels.

    ``epochs=0`` leaves them untrained.
    """
    images, labels = digits()
    images = images.reshape(-1, 1, 8, 8)

    def make(s):
        return untrained_network(s, channels=(16, 24), kernel=3, stride=1, side=8)

    return siblings(images, labels, seed, make=make, layer="3", n_train=900, n_test=897, epochs=epochs)


def on_digits_dense(seed: int) -> Activations:
    """Second hidden layer (48 units) of two networks without convolutions, trained on the same digits."""
    images, labels = digits()

    def make(s):
        return untrained_dense(s, d_in=64)

    return siblings(images, labels, seed, make=make, layer="3", n_train=900, n_test=897, epochs=20)


def on_mnist(seed: int, layer: str) -> Activations:
    """First (32 channels) or second (48) convolution of two networks trained on 6,000 images of MNIST's test set."""
    found = dataset("mnist-t10k")
    images = (found.images / found.scale).astype(np.float32)[:, None]

    def make(s):
        return untrained_network(s, channels=(32, 48), kernel=5, stride=2, side=28)

    return siblings(images, found.labels, seed, make=make, layer=layer, n_train=6000, n_test=1000, epochs=2)


def rotate(data: Activations, seed: int) -> Activations:
    """Turn network A's layer by a random orthogonal matrix: the same subspace without its units."""
    Q = random_orthogonal(data.a.shape[1], rng=np.random.default_rng([seed, 1]))
    return data._replace(a=(data.a @ Q).astype(data.a.dtype))


def trial(data: Activations, seed: int) -> dict[str, float]:
    """Predict every unit of B from few coordinates of A's layer, in three bases, by one recipe; score on new rows.

    All bases are of the same standardised layer. The better of the two other bases is the baseline: it has an
    advantage that no user has, that the scored rows choose.
    """
    n = len(data.a) // 2
    A, B = (np.asarray(side, dtype=np.float64) for side in data)
    spread = A[:n].std(axis=0)
    A = (A[:, spread > 0] - A[:n, spread > 0].mean(axis=0)) / spread[spread > 0]
    _, s, Vh = np.linalg.svd(A[:n], full_matrices=False)
    turn = random_orthogonal(A.shape[1], rng=np.random.default_rng([seed, 2]))
    bases = {"units": A, "components": A @ Vh[s**2 > 1e-6 * np.sum(s**2)].T, "directions": A @ turn}
    whole = PairedMoments(A.shape[1], B.shape[1]).update(A, B)

    def explained(name, most):
        Z = bases[name]
        halves = [PairedMoments(Z.shape[1], B.shape[1]).update(Z[rows], B[rows]) for rows in (slice(n), slice(n, None))]
        mapping = SparseUnitMapping(alphas=PATH, max_units=most, refit=True, tol=1e-4).fit_moments(halves[0])
        return 1 - float(np.nanmean(mapping.unexplained(halves[1], relative_to=whole)))

    few = {name: explained(name, FEW) for name in bases}
    return {
        "method": few["units"],
        "baseline": max(few["components"], few["directions"]),
        f"{FEW} principal components": few["components"],
        f"{FEW} random directions": few["directions"],
        "1 unit": explained("units", 1),
        f"{2 * FEW} units": explained("units", 2 * FEW),
        f"{2 * FEW} principal components": explained("components", 2 * FEW),
    }


CLAIM = Claim(
    slug="convergent-learning",
    statement=(
        "Four units of a trained network predict a unit of another, trained from another seed, better than four "
        "principal components or random directions of the same layer do."
    ),
    method="four units at most, chosen for each target by Lasso and fitted again by least squares",
    baseline="four principal components or four random directions of the same layer, whichever scores higher, "
    "chosen and fitted in the same way",
    metric="share of a unit's variance explained on images that were not fitted, mean over units",
    margin=0.01,
    worlds={
        "digits": on_digits,
        "mnist-first": lambda seed: on_mnist(seed, "1"),
        "mnist-second": lambda seed: on_mnist(seed, "3"),
        "dense": on_digits_dense,
        "untrained": lambda seed: on_digits(seed, epochs=0),
        "rotated": lambda seed: rotate(on_digits(seed), seed),
    },
    control="rotated",
    levels={"quick": ("digits",), "standard": ("digits", "mnist-first", "mnist-second")},
    seeds={"quick": 6, "standard": 6},
    trial=trial,
    user_data=Activations,
    spoil=rotate,
    why=(
        "Measured over 6 pairs of networks: on MNIST units of convolutions are ahead of the better of the other bases "
        "by 5 points in the first layer and by 7 in the second (0.70 against 0.63 of the variance); on digits (24 "
        "channels, small maps) the two tie at 0.66. It also depends on how few is few: with eight terms the lead over "
        "principal components is 1.4 points on MNIST, and on digits they are ahead. Four was settled after a look at "
        "one, two, four and eight terms on three pairs. One unit alone explains 0.40 to 0.50. In the control A's layer "
        "is rotated, which keeps its subspace: the method then falls 2.7 points behind."
    ),
)
