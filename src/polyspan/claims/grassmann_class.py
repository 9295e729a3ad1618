"""Claim: class subspaces that are trained classify better than those that PCA finds, at equal dimension."""

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import normalize

from polyspan.claims import Claim
from polyspan.data import dataset, digits, planted_gaussian_classes
from polyspan.linalg import truncated_svd
from polyspan.nn import GrassmannClassifier

RANK = 8
GAMMA = 25.0
MOST_TRAIN, MOST_TEST = 5000, 3000


class Embedded(NamedTuple):
    """Items embedded as rows (n, d), and their classes (n,)."""

    embeddings: np.ndarray
    labels: np.ndarray


def crowded(seed: int, *, n_classes=8, d=60, k=4, shared=8, n_per=200, strength=1.5, noise=0.25) -> Embedded:
    """Zero-mean classes, each on its own ``k`` directions and on ``shared`` stronger ones that all classes have.

    Eight directions of PCA are then spent on what the classes have in common.
    """
    rng = np.random.default_rng(seed)
    own = np.linalg.qr(rng.normal(size=(n_classes, d, k)))[0]
    common = np.linalg.qr(rng.normal(size=(d, shared)))[0]
    labels = np.repeat(np.arange(n_classes), n_per)
    rows = np.einsum("ndk,nk->nd", own[labels], rng.normal(size=(len(labels), k)))
    rows += strength * rng.normal(size=(len(labels), shared)) @ common.T + noise * rng.normal(size=rows.shape)
    return Embedded(rows.astype(np.float32), labels)


def separate(seed: int) -> Embedded:
    """Zero-mean classes on 4 directions each and isotropic noise: PCA is the maximum-likelihood answer already.

    In no level, as nothing can be gained there; every linear classifier stands near chance.
    """
    drawn = planted_gaussian_classes(seed)
    rows = np.concatenate([drawn.train, drawn.test]).astype(np.float32)
    return Embedded(rows, np.concatenate([drawn.train_labels, drawn.test_labels]))


def shifted(seed: int, *, n_classes=8, d=40, n_per=200, noise=0.4) -> Embedded:
    """Isotropic classes that differ by the direction of their mean only: one vector a class is all there is to know.

    In no level; it shows where not to use subspaces.
    """
    rng = np.random.default_rng(seed)
    means = normalize(rng.normal(size=(n_classes, d)))
    labels = np.repeat(np.arange(n_classes), n_per)
    rows = means[labels] + noise * rng.normal(size=(len(labels), d))
    return Embedded(rows.astype(np.float32), labels)


def on_digits(seed: int) -> Embedded:  # noqa: ARG001 - the seed splits, see trial
    """Scikit-learn's 1,797 handwritten digits, pixels as embeddings."""
    images, labels = digits()
    return Embedded(images.reshape(len(images), -1).astype(np.float32), labels)


def on_mnist(seed: int) -> Embedded:
    """The 10,000 test images of MNIST on their first 100 uncentred singular directions."""
    found = dataset("mnist-t10k")
    pixels = found.images.reshape(len(found.images), -1).astype(np.float32) / 255
    directions = truncated_svd(pixels, 100, rng=np.random.default_rng(seed))[2]
    return Embedded(pixels @ directions.T, found.labels)


def redraw(data: Embedded, seed: int) -> Embedded:
    """Redraw every class from its own PCA model, ``RANK`` Gaussian directions and isotropic noise: the control.

    What is left is what PCA knows, so that training has nothing to find. Permuted labels would be no control: both arms
    then stand at chance. Nor would ``shifted``: there every subspace loses to a linear classifier, PCA's even more.
    """
    rng = np.random.default_rng(seed)
    rows = np.array(data.embeddings, dtype=np.float64)
    for c in np.unique(data.labels):
        mine = data.labels == c
        _, s, Vh = np.linalg.svd(rows[mine], full_matrices=False)
        n, k = int(mine.sum()), min(RANK, len(s))
        rest = np.sqrt((s[k:] ** 2).sum() / max(1, n * (rows.shape[1] - k)))
        scales = np.sqrt(np.maximum(s[:k] ** 2 / n - rest**2, 0))
        rows[mine] = rng.normal(size=(n, k)) * scales @ Vh[:k] + rest * rng.normal(size=(n, rows.shape[1]))
    return Embedded(rows.astype(np.float32), data.labels)


def clafic(X: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """Bases (C, d, k) of each class's leading directions about the origin, without training: Watanabe's CLAFIC."""
    return np.stack([np.linalg.svd(X[y == c], full_matrices=False)[2][:k].T for c in np.unique(y)])


def cosine_softmax(X: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """Unit weight vectors (C, d) under the same temperature, loss, steps, batches and learning rate."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows, labels = torch.as_tensor(X), torch.as_tensor(y)
    weight = torch.stack([rows[labels == c].mean(0) for c in range(int(y.max()) + 1)])
    weight = torch.nn.functional.normalize(weight, dim=1).requires_grad_()
    optimiser = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 600)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(600):
        if not len(order):
            order = torch.randperm(len(rows), generator=generator)
        batch, order = order[:128], order[128:]
        logits = GAMMA * rows[batch] @ torch.nn.functional.normalize(weight, dim=1).T
        optimiser.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(logits, labels[batch]).backward()
        optimiser.step()
        schedule.step()
    return torch.nn.functional.normalize(weight.detach(), dim=1).numpy()


def logistic(X: np.ndarray, y: np.ndarray, seed: int) -> LogisticRegression:
    """Logistic regression with the better C of three on a fifth of the training rows, fitted on all of them."""
    fit, check, fit_y, check_y = train_test_split(X, y, test_size=0.2, random_state=seed, stratify=y)
    scores = {C: LogisticRegression(C=C, max_iter=500).fit(fit, fit_y).score(check, check_y) for C in (1, 10, 100)}
    return LogisticRegression(C=max(scores, key=scores.__getitem__), max_iter=500).fit(X, y)


def trial(data: Embedded, seed: int) -> dict[str, float]:
    """Split in halves (5,000 and 3,000 rows at most), fit every arm on unit rows of the one, score it on the other.

    Neither the method nor its baseline is tuned: both have dimension 8 and nothing else is chosen on the data.
    """
    X = normalize(np.asarray(data.embeddings, dtype=np.float32))
    y = np.unique(data.labels, return_inverse=True)[1]
    n = len(X)
    sizes = {"train_size": min(n // 2, MOST_TRAIN), "test_size": min(n - n // 2, MOST_TEST)}
    train, test, train_y, test_y = train_test_split(X, y, random_state=seed, stratify=y, **sizes)

    def score(answers: np.ndarray) -> float:
        return float(np.mean(answers == test_y))

    def shadows(bases: np.ndarray) -> np.ndarray:
        return np.linalg.norm(np.einsum("nd,cdk->nck", test, bases), axis=-1).argmax(1)

    fitted = {k: GrassmannClassifier(k, gamma=GAMMA, random_state=seed).fit(train, train_y) for k in (RANK, 1)}
    return {
        "method": score(fitted[RANK].predict(test)),
        "baseline": score(shadows(clafic(train, train_y, RANK))),
        "one trained direction a class": score(fitted[1].predict(test)),
        "logistic regression": score(logistic(train, train_y, seed).predict(test)),
        "cosine softmax": score((test @ cosine_softmax(train, train_y, seed).T).argmax(1)),
    }


CLAIM = Claim(
    slug="grassmann-class",
    statement="Class subspaces trained by cross-entropy classify better than each class's PCA of the same dimension.",
    method="GrassmannClassifier, 8 dimensions a class, started from PCA, 600 steps",
    baseline="CLAFIC: 8 uncentred principal directions a class, same decision rule, no training",
    metric="accuracy on held-out rows, share",
    margin=0.0,
    worlds={
        "crowded": crowded,
        "digits": on_digits,
        "mnist": on_mnist,
        "separate": separate,
        "shifted": shifted,
        "redrawn": lambda seed: redraw(on_digits(seed), seed),
    },
    control="redrawn",
    levels={"quick": ("crowded", "digits"), "standard": ("crowded", "digits", "mnist")},
    seeds={"quick": 6, "standard": 20},
    trial=trial,
    user_data=Embedded,
    spoil=redraw,
    why=(
        "Training wins by far where classes share strong directions, on which PCA spends its dimensions, and by almost "
        "2 points on MNIST with 5,000 rows. On the 898 rows of digits it makes no difference that can be told from "
        "chance, and where each class is Gaussian on its own directions (control) PCA is the better estimate. Either "
        "kind of subspace beats one vector a class by 2 points on digits and by 3 to 5 on MNIST. Where classes are "
        "isotropic and differ by their mean only, do not use subspaces: there logistic regression reads 0.79 of the "
        "rows right, one trained direction 0.65, and eight 0.46."
    ),
)
