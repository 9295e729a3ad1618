"""The search for a good mixture: starts, their comparison, and the best one finished, by each of three algorithms."""

import warnings
from typing import Any, NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from ._low_rank_fit import (
    Fit,
    Parts,
    Rules,
    expectation_maximisation,
    k_subspaces,
    many_k_subspaces,
    one_hot,
    outside_energy,
    row_blocks,
    weighted_parts,
)
from ._low_rank_stream import memberships

START_ROWS, SSC_ROWS, SHORT_ROUNDS, SUBSPACE_ROUNDS = 10_000, 4_000, 5, 30
STEPS_A_ROUND = 3


class Search(NamedTuple):
    """Rules of the fit, the point (D,) from which distances count, k-means groups (n,) of all rows where there are any,
    and how long and from where to search.
    """

    rules: Rules
    origin: np.ndarray
    groups: np.ndarray | None
    n_init: int
    init: str
    max_iter: int
    tol: float
    rng: Any
    label: str

    @property
    def n_components(self) -> int:
        """K."""
        return len(self.rules.ranks)

    def draw(self) -> np.random.Generator:
        """Return a generator that follows from the estimator's chance."""
        return np.random.default_rng(self.seed())

    def seed(self) -> int:
        """Return a seed that follows from the estimator's chance."""
        return int(self.rng.randint(2**31 - 1))


class Found(NamedTuple):
    """The fit, the objectives by which starts were compared, and the losses of all steps where there were steps."""

    fit: Fit
    objectives: np.ndarray
    history: np.ndarray | None = None


def some_rows(X: Any, most: int, rng: Any) -> np.ndarray:
    """Return at most so many rows, drawn and in their order, in float64."""
    if len(X) <= most:
        return np.asarray(X, dtype=np.float64)
    return np.asarray(X[np.sort(rng.choice(len(X), most, replace=False))], dtype=np.float64)


def k_means(rows: np.ndarray, K: int, rng: Any) -> np.ndarray:
    """Return labels of one k-means run."""
    from sklearn.cluster import KMeans

    if K == 1:
        return np.zeros(len(rows), dtype=np.intp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than components
        return KMeans(K, n_init=1, random_state=rng.randint(2**31 - 1)).fit(rows).labels_.astype(np.intp)


def _start_rows(X: Any, search: Search) -> np.ndarray:
    return some_rows(X, SSC_ROWS if search.init == "ssc" else START_ROWS, search.rng)


def _starts(rows: np.ndarray, search: Search) -> list[np.ndarray]:
    """Return labels of the given rows, one array a start, each once."""
    K = search.n_components
    if K == 1:
        return [np.zeros(len(rows), dtype=np.intp)]
    if search.init == "ssc":
        from .self_expressive import OMPSubspaceClustering

        kind = OMPSubspaceClustering(K, n_nonzero=max(search.rules.ranks), random_state=search.seed())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(the affinity falls|only .* clusters|X has .* all-zero)")
            return [kind.fit_predict(rows - search.origin)]
    if search.init == "random":
        centred = rows - search.origin
        found = list(
            many_k_subspaces(centred, search.n_init, search.rules, max_iter=SUBSPACE_ROUNDS, rng=search.draw())[0]
        )
    else:
        found = [search.groups] if search.groups is not None and len(search.groups) == len(rows) else []
        found += [k_means(rows, K, search.rng) for _ in range(search.n_init - len(found))]
        # Memberships of EM settle early, often between subspaces that cross; hard ones go on to move.
        found[1::2] = [
            k_subspaces(rows, labels, search.rules, max_iter=SUBSPACE_ROUNDS).memberships.argmax(axis=1)
            for labels in found[1::2]
        ]
    return list({labels.tobytes(): labels for labels in found}.values())


def search_em(X: Any, search: Search) -> Found:
    """Compare starts after a few rounds of EM, and finish the best on all rows."""
    rows, rules, K = _start_rows(X, search), search.rules, search.n_components
    starts = _starts(rows, search)
    # A single start has nothing to be compared with.
    rounds = SHORT_ROUNDS if len(starts) > 1 else 1
    tries = [
        expectation_maximisation(rows, one_hot(labels, K), rules, max_iter=rounds, tol=search.tol) for labels in starts
    ]
    objectives = np.array([found.objective for found in tries])
    best = tries[int(objectives.argmax())]
    R = best.memberships if len(rows) == len(X) else memberships(X, best.parts)
    done = expectation_maximisation(X, R, rules, max_iter=search.max_iter, tol=search.tol, old=best.parts)
    return Found(done._replace(reseeded=done.reseeded + best.reseeded), objectives)


def search_k_subspaces(X: Any, search: Search) -> Found:
    """Run K-subspaces from every start, and finish the best on all rows."""
    rows, rules, K = _start_rows(X, search), search.rules, search.n_components
    if search.init == "random" and K > 1:
        centred = rows - search.origin
        found, objectives = many_k_subspaces(centred, search.n_init, rules, max_iter=search.max_iter, rng=search.draw())
        labels = found[int(objectives.argmax())]
    else:
        tries = [k_subspaces(rows, labels, rules, max_iter=search.max_iter) for labels in _starts(rows, search)]
        objectives = 1 - np.array([_left_share(rows, found.parts, search.origin) for found in tries])
        labels = tries[int(objectives.argmax())].memberships.argmax(axis=1)
    if len(rows) < len(X):
        labels = outside_energy(X, weighted_parts(rows, one_hot(labels, K), rules)).argmin(axis=1)
    done = k_subspaces(X, labels, rules, max_iter=search.max_iter)
    return Found(done._replace(objective=1 - _left_share(X, done.parts, search.origin)), objectives)


def search_denoising(X: Any, search: Search) -> Found:
    """Train a denoiser from every start at once, and take the one of least loss at the end."""
    from ._low_rank_training import train_denoisers

    rows, rules, K = np.asarray(X, dtype=np.float64), search.rules, search.n_components
    if search.init == "random":
        draw = search.draw()
        shuffled = [draw.permuted(np.arange(len(rows)) % K) for _ in range(search.n_init if K > 1 else 1)]
        starts = [_turned(weighted_parts(rows, one_hot(labels, K), rules), draw) for labels in shuffled]
    else:
        starts = [weighted_parts(rows, one_hot(labels, K), rules) for labels in _starts(rows, search)]
    steps = STEPS_A_ROUND * search.max_iter
    done = train_denoisers(rows, starts, rules, n_steps=steps, seed=search.seed(), label=search.label)
    if not np.isfinite(done.losses).all():
        raise ValueError("X must have a spread that training can follow, got a loss that is not finite")
    best, tail = int(done.losses.argmin()), max(1, steps // 10)
    before = done.history[-2 * tail : -tail, best]
    # Losses of single steps scatter by far more than ten percent: means over a tenth of the steps are compared.
    settled = not len(before) or done.losses[best] > 0.9 * before.mean()
    parts = _with_white(rows, done.parts[best], rules)
    fit = Fit(parts, memberships(rows, parts), -float(done.losses[best]), steps, bool(settled), 0)
    return Found(fit, -done.losses, done.history[:, best])


def _with_white(rows: np.ndarray, parts: Parts, rules: Rules) -> Parts:
    """Add the white variance of rows about their subspaces, which was not trained, and sort the columns."""
    order = np.argsort(-parts.spectra, axis=1, kind="stable")
    bases = np.take_along_axis(parts.bases, order[:, None, :], axis=2)
    parts = parts._replace(bases=bases, spectra=np.take_along_axis(parts.spectra, order, axis=1))
    if rules.noise is not None:
        return parts._replace(residual=np.full(len(parts.weights), rules.noise**2))
    distances = outside_energy(rows, parts)
    own = one_hot(distances.argmin(axis=1), len(parts.weights))
    rest = (own * distances).sum(axis=0) / np.maximum(own.sum(axis=0), 1) / (rows.shape[1] - np.array(rules.ranks))
    return parts._replace(residual=np.maximum(rest, rules.floor))


def _turned(parts: Parts, rng: np.random.Generator) -> Parts:
    """Replace the bases by random ones, columns of zeros staying."""
    filled = np.square(parts.bases).sum(axis=1, keepdims=True) > 0.5
    return parts._replace(bases=np.linalg.qr(rng.normal(size=parts.bases.shape))[0] * filled)


def _left_share(X: Any, parts: Parts, origin: np.ndarray) -> float:
    """Return the share of squared distances from the origin that lies outside of the nearest subspace."""
    total = sum(float(np.square(block - origin).sum()) for _, block in row_blocks(X))
    return float(outside_energy(X, parts).min(axis=1).sum()) / max(total, 1e-300)
