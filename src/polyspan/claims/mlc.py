"""Claim: training that flattens groups into subspaces clusters better than the features it starts from."""

import warnings
from typing import Any, NamedTuple

import numpy as np

from polyspan.claims import Claim
from polyspan.data import dataset, digits
from polyspan.linalg import clustering_accuracy

BATCH, WIDTH, HIDDEN = 128, 32, 128
NEIGHBOURS = (5, 10, 20)


class Pictures(NamedTuple):
    """Grey images (n, h, w), the class (n,) of each, and how to train.

    ``recipe`` (9,): degrees, shift, scale, flip, contrast, shade and noise of :class:`polyspan.cluster.ImageJitter`,
    which say what views count as the same picture; steps of total coding rate, and of rate reduction.
    """

    images: np.ndarray
    labels: np.ndarray
    recipe: np.ndarray


TINY, SHORT, LONG = (100, 60), (160, 100), (420, 210)
HANDWRITING = (20.0, 0.2, 0.15, 0, 0, 0, 0)
OBJECTS = (10.0, 0.1, 0.15, 0, 0.2, 0, 0.02)
FACES = (5.0, 0.1, 0.1, 1, 0.2, 0.1, 0.02)
LIT_FACES = (5.0, 0.1, 0.1, 1, 0.5, 0.5, 0.02)


def planted(seed: int) -> Pictures:
    """Six smooth random pictures of 8 by 8, each in 50 copies, turned, moved, scaled, with noise: curved groups."""
    import torch

    from polyspan.cluster import ImageJitter

    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(6, 1, 5, 5, generator=generator)
    pictures = torch.nn.functional.interpolate(small, size=(8, 8), mode="bilinear").repeat_interleave(50, dim=0)
    seen = ImageJitter(degrees=40, shift=0.3, scale=0.2, noise=0.3)(pictures, generator)
    order = torch.randperm(300, generator=generator)
    return Pictures(seen[order, 0].numpy(), np.repeat(np.arange(6), 50)[order.numpy()], np.array(HANDWRITING + TINY))


def on_digits(seed: int) -> Pictures:  # noqa: ARG001 - the seed draws networks and starts
    """All 1,797 of scikit-learn's digits, 8 by 8 pixels."""
    images, labels = digits()
    return Pictures(images.reshape(-1, 8, 8), labels, np.array(HANDWRITING + SHORT))


def on_large_digits(seed: int) -> Pictures:  # noqa: ARG001
    """The same digits at 16 by 16, so that turning them blurs less, and trained for longer."""
    from scipy.ndimage import zoom

    data = on_digits(0)
    images = zoom(data.images, (1, 2, 2), order=1, mode="nearest", grid_mode=True)
    return data._replace(images=images, recipe=np.array(HANDWRITING + LONG))


def public(name: str, seed: int, jitter: tuple[float | int, ...], *, most: int = 2000) -> Pictures:
    """At most ``most`` images of a public set, at half their size (means of 2 by 2 pixels), white is 1."""
    found = dataset(name)
    rows = np.sort(np.random.default_rng(seed).permutation(len(found.labels))[:most])
    images = found.images[rows].astype(np.float32) / np.float32(found.scale)
    n, h, w = images.shape
    small = images.reshape(n, h // 2, 2, w // 2, 2).mean(axis=(2, 4))
    return Pictures(small, found.labels[rows], np.array(jitter + LONG))


def scramble(data: Pictures, seed: int) -> Pictures:
    """Deal the values of every pixel out to the images anew: each pixel keeps its values, no groups are left."""
    flat = data.images.reshape(len(data.images), -1)
    return data._replace(images=np.random.default_rng([seed, 1]).permuted(flat, axis=0).reshape(data.images.shape))


def trial(data: Pictures, seed: int) -> dict[str, float]:
    """Cluster by every arm with the true number of groups; labels serve to score.

    The baseline has an advantage that no user has: of its arms, and of their numbers of neighbours, the labels choose.
    """
    from sklearn.cluster import KMeans, SpectralClustering

    from polyspan.cluster import (
        ElasticNetSubspaceClustering,
        ImageJitter,
        LeastSquaresSubspaceClustering,
        ManifoldLinearizingClustering,
    )

    names = ("degrees", "shift", "scale", "flip", "contrast", "shade", "noise")
    *values, tcr_steps, steps = (float(v) for v in np.asarray(data.recipe).ravel())
    views: dict[str, Any] = dict(zip(names, values, strict=True))
    jitter = ImageJitter(**(views | {"flip": bool(views["flip"])}))
    images, n, k = np.asarray(data.images, dtype=np.float32), len(data.labels), len(np.unique(data.labels))
    flat = images.reshape(n, -1)
    batch = min(BATCH, n)
    options: dict[str, Any] = {"n_clusters": k, "augment": jitter, "n_components": min(WIDTH, batch)}
    options |= {"hidden": HIDDEN, "batch_size": batch, "device": "cpu", "random_state": seed}
    options |= {"tcr_epochs": int(-(-tcr_steps // (n // batch))), "max_epochs": int(-(-steps // (n // batch)))}
    start = ManifoldLinearizingClustering(**(options | {"max_epochs": 0})).fit(images)
    made = ManifoldLinearizingClustering(**(options | {"init": start.module_})).fit(images)
    labels = {"method": made.labels_, "initial memberships": start.labels_}
    labels["k-means, pixels"] = KMeans(k, n_init=10, random_state=seed).fit_predict(flat)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        for m in NEIGHBOURS:
            arm = SpectralClustering(k, affinity="nearest_neighbors", n_neighbors=m, random_state=seed)
            labels[f"spectral, {m} neighbours, pixels"] = arm.fit_predict(flat)
        Z = start.transform(images)
        labels["least squares, initial features"] = LeastSquaresSubspaceClustering(k, random_state=seed).fit_predict(Z)
        if steps >= LONG[1]:
            # As slow as the training, and behind least squares wherever both were tried on other seeds.
            labels["elastic net, initial features"] = ElasticNetSubspaceClustering(k, random_state=seed).fit_predict(Z)
    scores = {name: clustering_accuracy(data.labels, found) for name, found in labels.items()}
    best = max(score for name, score in scores.items() if name != "method")
    last, first = made.history_[-1], made.history_[0]
    told = {"share of R_c that training takes away": 1 - last["class_rate"] / first["class_rate"]}
    told["share of R that training takes away"] = 1 - last["rate"] / first["rate"]
    return scores | {"baseline": best} | told


CLAIM = Claim(
    slug="mlc",
    statement=(
        "Training that flattens groups of images into subspaces while it clusters finds the classes better than the "
        "features it starts from, and than k-means and spectral clustering of pixels."
    ),
    method=(
        f"two views; steps of total coding rate, then of rate reduction: {TINY} on planted pictures, {SHORT} at 8 by 8 "
        f"pixels, {LONG} else"
    ),
    baseline=(
        "the best by the labels of: the initial memberships, least-squares and, where training is long, elastic-net "
        "self-expression of the initial features, k-means on pixels, and spectral clustering of the pixels' "
        f"{', '.join(map(str, NEIGHBOURS))} nearest neighbours"
    ),
    metric="clustering accuracy, share of images in the group of their class",
    margin=0.02,
    worlds={
        "planted": planted,
        "digits": on_digits,
        "digits-16": on_large_digits,
        "mnist": lambda seed: public("mnist-t10k", seed, HANDWRITING),
        "coil20": lambda seed: public("coil20", seed, OBJECTS),
        "orl": lambda seed: public("orl", seed, FACES),
        "yaleb": lambda seed: public("yaleb", seed, LIT_FACES),
        "scrambled": lambda seed: scramble(planted(seed), seed),
    },
    control="scrambled",
    levels={"quick": ("planted", "digits"), "standard": ("planted", "digits-16", "mnist", "coil20", "orl", "yaleb")},
    seeds={"quick": 3, "standard": 3},
    trial=trial,
    user_data=Pictures,
    spoil=scramble,
    why=(
        "It holds on handwriting and not on photographs. Measured with 3 seeds: 86 % of 2,000 images of MNIST, where "
        "the best other arm has 66 % and the start 57 %; 89 % of scikit-learn's digits at 16 by 16 pixels (other arms "
        "81 %, start 70 %), 84 % at 8 by 8 with less training. Planted orbits leave little to gain: 98 %, where "
        "least-squares self-expression of the start has 96 %. On COIL-20 training lifts the start from 69 to 78 %, "
        "below the 81 % of spectral clustering of 5 neighbours: objects that turn in space form clean curves in "
        "pixels. On ORL, with ten faces a person, a batch holds three of each "
        "and training harms the start (76 to 64 %); on Extended Yale B light outweighs identity in all arms and "
        "training sharpens the light (15 to 9 %; 5 neighbours 23 %). R_c falls by 16 to 34 % in all of them and R by "
        "less than 1 %: the objective is reached whether or not its groups are the classes. Batch, width and passes "
        "were chosen on digits under two other seeds out of eight settings; of the other arms the labels choose."
    ),
)
