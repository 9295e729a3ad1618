"""Claim: invariants made with Gaunt products serve as well as those made with Clebsch-Gordan products."""

from itertools import product
from typing import NamedTuple

import numpy as np

from polyspan.claims import Claim
from polyspan.data import dataset, digits
from polyspan.nn import gaunt_coefficients, gaunt_tensor_product, random_rotation

CHANNELS = 24
PENALTIES = (0.01, 0.1, 1.0)
LMAX = 6
HALF_ANGLE = 1.1
LARGE = 4000


class Functions(NamedTuple):
    """Functions on the sphere as coefficients (n, (L + 1)^2) in e3nn's order, and a class (n,) for each."""

    coefficients: np.ndarray
    labels: np.ndarray


def on_sphere(images: np.ndarray, labels: np.ndarray, seed: int, *, lmax: int = LMAX) -> Functions:
    """Paint pictures (n, h, w) around the pole of the sphere, and turn each by a rotation of its own."""
    import torch

    from polyspan.nn import real_spherical_harmonics

    rng = np.random.default_rng(seed)
    n, h, w = images.shape
    u, v = (np.tan(HALF_ANGLE) * 0.6 * (2 * np.arange(k) + 1 - k) / k for k in (h, w))
    places = np.stack(np.broadcast_arrays(v[None, :], 1.0, -u[:, None]), axis=-1).reshape(-1, 3)
    R = random_rotation(rng=rng, batch=(n,), dtype=np.float64)
    pixels, made = images.reshape(n, -1).astype(np.float64), []
    for start in range(0, n, 256):
        rows = slice(start, start + 256)
        turned = torch.as_tensor(places @ np.swapaxes(R[rows], 1, 2))
        made.append(np.einsum("np,npd->nd", pixels[rows], real_spherical_harmonics(turned, lmax).numpy()))
    coefficients = np.concatenate(made)
    return Functions((coefficients / np.sqrt(np.mean(coefficients**2) * coefficients.shape[1])), labels)


def spherical_digits(seed: int) -> Functions:
    """Handwritten digits of 8 by 8 pixels."""
    X, y = digits()
    return on_sphere(X.reshape(-1, 8, 8), y, seed)


def spherical_pictures(name: str, seed: int) -> Functions:
    """At most 4,000 pictures of a public set, with half the resolution."""
    found = dataset(name)
    chosen = np.random.default_rng([seed, 1]).permutation(len(found.images))[:LARGE]
    images = np.asarray(found.images)[chosen].astype(np.float64) / found.scale
    n, h, w = images.shape
    small = images.reshape(n, h // 2, 2, w // 2, 2).mean(axis=(2, 4))
    return on_sphere(small, np.asarray(found.labels)[chosen], seed, lmax=8)


def mirror(data: Functions, seed: int) -> Functions:
    """Put half of the functions in front of a mirror; the class is now on which side they are."""
    x = np.array(data.coefficients)
    lmax = int(np.sqrt(x.shape[1])) - 1
    flipped = np.random.default_rng([seed, 3]).permutation(len(x)) < len(x) // 2
    signs = np.array([1.0 if m >= 0 else -1.0 for l in range(lmax + 1) for m in range(-l, l + 1)])
    x[flipped] *= signs
    return Functions(x, flipped.astype(np.int64))


def degrees_of(x: np.ndarray) -> list[slice]:
    """Return the components of each degree."""
    return [slice(l * l, (l + 1) ** 2) for l in range(int(np.sqrt(x.shape[1])))]


def by_degree(z: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the inner product of both in every degree: (n, L + 1) invariants."""
    return np.stack([np.einsum("nd,nd->n", z[:, part], x[:, part]) for part in degrees_of(x)], axis=1)


def gaunt_invariants(x: np.ndarray, seed: int, *, bracket: bool = False) -> np.ndarray:
    """Return <(w1 x) (w2 x), x> in every degree for random weights w1, w2 of the degrees, (n, CHANNELS (L + 1))."""
    rng, parts = np.random.default_rng([seed, 4 + bracket]), degrees_of(x)
    lmax, made = len(parts) - 1, []
    repeats = [part.stop - part.start for part in parts]
    for _ in range(CHANNELS):
        w1, w2 = (np.repeat(rng.normal(size=lmax + 1), repeats) for _ in range(2))
        z = gaunt_tensor_product(x * w1, x * w2, lmax, lmax, lmax, bracket=bracket)
        made.append(by_degree(z, x))
    return np.concatenate(made, axis=1)


def clebsch_gordan_invariants(x: np.ndarray, seed: int, *, odd: bool = True) -> np.ndarray:
    """Return <sum of w_path (x_l1 x_l2)_l3, x_l3> for random weights of all paths, (n, CHANNELS (L + 1)).

    Without ``odd``, only paths with even l1 + l2 + l3 are taken: those that the Gaunt product has, each for itself.
    """
    rng, parts = np.random.default_rng([seed, 6]), degrees_of(x)
    made = []
    for l3, third in enumerate(parts):
        paths = []
        for (l1, first), (l2, second) in product(enumerate(parts), enumerate(parts)):
            # x times itself: the second order of two factors gives the same numbers again.
            if l1 > l2 or not l2 - l1 <= l3 <= l1 + l2 or (not odd and (l1 + l2 + l3) % 2):
                continue
            C = gaunt_coefficients(l1, l2, l3, bracket=(l1 + l2 + l3) % 2 == 1)
            C = C / (np.linalg.norm(C) or 1.0)
            inner = (x[:, third] @ C.reshape(-1, C.shape[2]).T).reshape(len(x), *C.shape[:2])
            paths.append(np.einsum("na,nab,nb->n", x[:, first], inner, x[:, second]))
        B = np.stack(paths, axis=1)
        made.append(B @ rng.normal(size=(B.shape[1], CHANNELS)))
    return np.concatenate(made, axis=1)


def multiplications(lmax: int) -> tuple[int, int]:
    """Return those of one product cut off at its own degree: on the grid, and with the non-zero Clebsch-Gordan numbers.

    The grid takes the cheaper of dense and separable steps; Clebsch-Gordan takes two for each non-zero number, and one
    for the weight of each path's output.
    """
    degree, D = 3 * lmax, (lmax + 1) ** 2
    n_b, n_a = degree // 2 + 1, degree + 1
    dense = n_b * n_a * (3 * D + 1)
    separable = 3 * n_b * D + n_b * n_a * (3 * (2 * lmax + 1) + 1)
    full = 0
    for l1, l2, l3 in product(range(lmax + 1), repeat=3):
        if abs(l1 - l2) <= l3 <= l1 + l2:
            C = gaunt_coefficients(l1, l2, l3, bracket=(l1 + l2 + l3) % 2 == 1)
            full += 2 * int(np.count_nonzero(C)) + 2 * l3 + 1
    return min(dense, separable) + 3 * D, full


def accuracy(features: np.ndarray, labels: np.ndarray, seed: int) -> float:
    """Train on half, choose the penalty on a sixth, score on a third."""
    from sklearn.linear_model import RidgeClassifier

    n = len(labels)
    order = np.random.default_rng([seed, 2]).permutation(n)
    train, choose, test = order[: n // 2], order[n // 2 : n * 2 // 3], order[n * 2 // 3 :]
    # Invariants of third order have heavy tails.
    X = np.cbrt(features)
    X = (X - X[train].mean(axis=0)) / (X[train].std(axis=0) + 1e-12)
    models = [RidgeClassifier(alpha=penalty * len(train) ** 0.5).fit(X[train], labels[train]) for penalty in PENALTIES]
    best = max(models, key=lambda model: model.score(X[choose], labels[choose]))
    return float(best.score(X[test], labels[test]))


def trial(data: Functions, seed: int) -> dict[str, float]:
    """Make as many invariants in each way, and train the same classifier on them."""
    x = np.asarray(data.coefficients, dtype=np.float64)
    power = by_degree(x, x) ** 1.5  # of third order too
    ours = np.concatenate([power, gaunt_invariants(x, seed)], axis=1)
    theirs = np.concatenate([power, clebsch_gordan_invariants(x, seed)], axis=1)
    even = np.concatenate([power, clebsch_gordan_invariants(x, seed, odd=False)], axis=1)
    both = np.concatenate([ours, gaunt_invariants(x, seed, bracket=True)], axis=1)
    grid, full = multiplications(int(np.sqrt(x.shape[1])) - 1)
    return {
        "method": accuracy(ours, data.labels, seed),
        "baseline": accuracy(theirs, data.labels, seed),
        "Clebsch-Gordan, even paths only": accuracy(even, data.labels, seed),
        "Gaunt and bracket, twice as many": accuracy(both, data.labels, seed),
        "lengths of each degree only": accuracy(power, data.labels, seed),
        "multiplications, Clebsch-Gordan over Gaunt": full / grid,
    }


CLAIM = Claim(
    slug="gaunt",
    statement="Invariants made with Gaunt products classify turned pictures on the sphere as well as the same number "
    "made with Clebsch-Gordan products, within two points of accuracy.",
    method="per-degree weights, product of functions on a grid, inner product with the input in every degree",
    baseline="one weight for each path of the full Clebsch-Gordan product, even and odd; otherwise the same",
    metric="accuracy of a ridge classifier on held-out functions, share",
    margin=-0.02,
    worlds={
        "digits": spherical_digits,
        "mnist": lambda seed: spherical_pictures("mnist-t10k", seed),
        "objects": lambda seed: spherical_pictures("coil20", seed),
        "mirror": lambda seed: mirror(spherical_digits(seed), seed),
    },
    control="mirror",
    levels={"quick": ("digits",), "standard": ("mnist", "objects")},
    seeds={"quick": 4, "standard": 5},
    trial=trial,
    user_data=Functions,
    spoil=mirror,
    why=(
        "At an equal number of invariants Gaunt products lose a little: 0.877 against 0.902 on 8 by 8 digits and 0.767 "
        "against 0.801 on MNIST, at the edge of the two points and beyond; nothing on objects seen from many sides, "
        "0.952 against 0.953. It is the odd paths that are missed, not the freedom of the weights: with a weight for "
        "every even path, Clebsch-Gordan itself has 0.873, 0.764 and 0.955. A product takes 2.7 "
        "(degree 6) or 4.5 (degree 8) times fewer multiplications than the non-zero Clebsch-Gordan numbers. Where "
        "classes are mirror images (control), all even paths are at chance, and only the bracket or the full product "
        "sees anything, 0.65 and 0.70."
    ),
)
