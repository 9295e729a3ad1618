"""What single latents tell of labels: sparse probes, and how far classes lie apart in a latent's codes."""

from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csc_array, issparse
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, column_or_1d

BLOCK = 2**22


class Probe(NamedTuple):
    """A probe on few columns, scored on rows held out.

    ``f1`` in [0, 1] is the mean over classes of the F1 score of "this class or another"; ``accuracy`` in [0, 1] the
    mean of their shares of right answers; ``latents`` (n_classes, k) are the columns that each class's probe reads,
    ``f1_by_class`` (n_classes,) and ``classes`` what belongs to them.
    """

    f1: float
    accuracy: float
    latents: np.ndarray
    f1_by_class: np.ndarray
    classes: np.ndarray


def sparse_probe(codes: Any, labels: Any, *, k: int = 1, test_share: float = 0.3, random_state: Any = None) -> Probe:
    """Tell each class from the others by a logistic regression on the k columns whose means differ the most.

    Columns are chosen and the regression is fitted on the rows that are not held out; classes are weighed alike. With
    two classes, the second is told from the first.

    Parameters
    ----------
    codes : array or sparse array of shape (n, m)
        Codes, or activations themselves, to compare with.
    labels : array of shape (n,)
    k : int
    test_share : float
        Rows held out, stratified, in (0, 1).
    random_state : int, RandomState or None
        Of the rows held out.

    Raises
    ------
    ValueError
        A class has fewer than 2 rows, there is one class only, or a parameter is out of range.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.model_selection import train_test_split

    X, y, classes = _checked(codes, labels)
    if not 1 <= k <= X.shape[1]:
        raise ValueError(f"k must be between 1 and the {X.shape[1]} columns, got {k}")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must lie between 0 and 1, got {test_share}")
    counts = np.bincount(y)
    if counts.min() < 2:
        raise ValueError(f"labels must name at least 2 rows a class, got {counts.min()} of {classes[counts.argmin()]}")
    train, test = train_test_split(
        np.arange(len(y)), test_size=test_share, stratify=y, random_state=check_random_state(random_state)
    )
    told = classes[1:] if len(classes) == 2 else classes
    chosen, scores, right = [], [], []
    for label in told:
        positive = classes[y] == label
        gap = np.abs(_mean(X[train], positive[train]) - _mean(X[train], ~positive[train]))
        columns = np.argsort(-gap, kind="stable")[:k]
        parts = [_dense(X[rows][:, columns]) for rows in (train, test)]
        # Latents differ in size: a common regularisation needs a common scale.
        spread = parts[0].std(axis=0)
        scale = np.where(spread > 0, spread, 1)
        fitted = LogisticRegression(class_weight="balanced").fit(parts[0] / scale, positive[train])
        found = fitted.predict(parts[1] / scale)
        chosen.append(columns)
        scores.append(f1_score(positive[test], found, zero_division=0.0))
        right.append(accuracy_score(positive[test], found))
    return Probe(float(np.mean(scores)), float(np.mean(right)), np.array(chosen), np.array(scores), told)


def latent_separation(codes: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    r"""Return how far each class's codes lie from the others', (n_classes, m), and the classes.

    The Wasserstein distance of a latent's codes within a class and outside of it,
    :math:`\int |F_{in}(t) - F_{out}(t)|\,dt`: the mean way that codes must be moved to make both alike. In units of the
    codes. With two classes there is one row, for the second.

    Parameters
    ----------
    codes : array or sparse array of shape (n, m)
    labels : array of shape (n,)

    Raises
    ------
    ValueError
        There is one class only, or lengths differ.
    """
    X, y, classes = _checked(codes, labels)
    told = classes[1:] if len(classes) == 2 else classes
    made = np.zeros((len(told), X.shape[1]))
    step = max(1, BLOCK // X.shape[0])
    columns = csc_array(X) if issparse(X) else X
    for start in range(0, X.shape[1], step):
        part = _dense(columns[:, start : start + step])
        order = np.argsort(part, axis=0)
        gaps = np.diff(np.take_along_axis(part, order, axis=0), axis=0)
        for i, label in enumerate(told):
            inside = (classes[y] == label)[order]
            shares = inside.cumsum(axis=0) / inside.sum(axis=0) - (~inside).cumsum(axis=0) / (~inside).sum(axis=0)
            made[i, start : start + step] = (np.abs(shares[:-1]) * gaps).sum(axis=0)
    return made, told


def _checked(codes: Any, labels: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    X = check_array(codes, accept_sparse="csr", dtype=[np.float64, np.float32])
    found = column_or_1d(labels)
    if len(found) != X.shape[0]:
        raise ValueError(f"labels must be one a row, {X.shape[0]}, got {len(found)}")
    classes, y = np.unique(found, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels must name at least 2 classes, got {len(classes)}")
    return X, y, classes


def _dense(part: Any) -> np.ndarray:
    return (part.toarray() if issparse(part) else np.asarray(part)).astype(np.float64)


def _mean(X: Any, rows: np.ndarray) -> np.ndarray:
    return np.asarray(X[rows].mean(axis=0), dtype=np.float64).reshape(-1)
