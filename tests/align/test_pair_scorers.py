import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import ortho_group
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.align import CanonicalCorrelation, SubspaceAligner, crossmodal_scores, topk_accuracy
from polyspan.align.pair_scorers import (
    ContrastiveProjections,
    KernelCanonicalCorrelation,
    PrincipalSubspaceAligner,
    RelativeRepresentation,
)
from polyspan.errors import NotConverged, WrongContent
from polyspan.linalg import cca, svcca


def unit(Z):
    return Z / np.linalg.norm(Z, axis=-1, keepdims=True)


def views(seed=0, n=260, shared=4, own=3, d_x=9, d_y=8, noise=0.2):
    """Two linear views of shared factors, each with factors of its own."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(n, shared))
    made = [np.c_[factors, rng.normal(size=(n, own))] @ rng.normal(size=(shared + own, d)) for d in (d_x, d_y)]
    return [rows + noise * rng.normal(size=rows.shape) + 2.0 for rows in made]


def held(seed=0, n=60, **options):
    X, Y = views(seed, **options)
    return X[n:], Y[n:], X[:n], Y[:n]


SCORERS = [
    RelativeRepresentation(20),
    PrincipalSubspaceAligner(3),
    PrincipalSubspaceAligner(0.9, route="cca"),
    KernelCanonicalCorrelation(3),
    KernelCanonicalCorrelation(2, kernel="linear", n_landmarks=7),
    ContrastiveProjections(3, max_iter=2, device="cpu"),
]


@parametrize_with_checks(SCORERS)
def test_sklearn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: str(scorer)[:60])
def test_every_scorer_takes_the_place_of_the_subspace_aligner(scorer):
    X, Y, A, B = held()
    X, A = X.astype(np.float32), A.astype(np.float32)
    fitted = scorer.fit(X, Y)
    left, right = fitted.transform_x(A), fitted.transform_y(B)
    assert (left.dtype, right.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(fitted.similarity(A, B), unit(left) @ unit(right).T, atol=1e-5)
    found = fitted.retrieve(A, B, 3).indices
    scores = fitted.similarity(A, B)
    np.testing.assert_allclose(np.take_along_axis(scores, found, axis=1), -np.sort(-scores, axis=1)[:, :3], atol=1e-5)
    told = crossmodal_scores(fitted, A, B)
    assert told["chance"] == pytest.approx(5 / 60)
    assert told["matching"] == pytest.approx(np.mean(fitted.match(A, B).columns == np.arange(60)))
    assert fitted.seen(X).all()
    assert not fitted.seen(A).any()


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: str(scorer)[:60])
def test_a_saved_scorer_scores_bit_for_bit_as_before(scorer, tmp_path):
    X, Y, A, B = held()
    fitted = clone(scorer).fit(X, Y)
    path = fitted.save(tmp_path / "it.safetensors", views="texts and shapes")
    again = type(scorer).load(path)
    np.testing.assert_array_equal(again.similarity(A, B), fitted.similarity(A, B))
    assert again.match(A, B, candidates=5).rows.tolist() == fitted.match(A, B, candidates=5).rows.tolist()
    assert again.get_params() == fitted.get_params()
    public = {name for name in vars(fitted) if name.endswith("_") and not name.startswith("_")}
    for name in public:
        np.testing.assert_array_equal(getattr(again, name), getattr(fitted, name), err_msg=name)
    with pytest.raises(WrongContent, match=type(scorer).__name__):
        SubspaceAligner.load(path)
    with pytest.raises(ValueError, match=r"8 features"):
        again.transform_y(A)


def test_relative_coordinates_agree_with_loops_and_ignore_turns():
    X, Y, A, B = held(1)
    fitted = RelativeRepresentation(7).fit(X, Y)
    np.testing.assert_array_equal(fitted.references_, np.linspace(0, 199, 7).astype(int))

    def cosines(rows, anchors):
        mean = anchors.mean(axis=0)
        return np.array([[unit(r - mean) @ unit(anchors[j] - mean) for j in fitted.references_] for r in rows])

    known = cosines(X, X)
    expected = (cosines(A, X) - known.mean(axis=0)) / known.std(axis=0)
    np.testing.assert_allclose(fitted.transform_x(A), expected, atol=1e-10)
    Q = ortho_group.rvs(8, random_state=0)
    turned = RelativeRepresentation(7).fit(X, Y @ Q)
    np.testing.assert_allclose(turned.similarity(A, B @ Q), fitted.similarity(A, B), atol=1e-10)


def test_a_turned_copy_is_found_whole():
    X = views(2)[0]
    Q = ortho_group.rvs(9, random_state=1)
    for scorer in (
        RelativeRepresentation(50),
        PrincipalSubspaceAligner(1.0, reg=0.0),
        PrincipalSubspaceAligner(9, route="cca", reg=0.0),
    ):
        fitted = scorer.fit(X[60:], X[60:] @ Q)
        assert topk_accuracy(fitted.similarity(X[:60], X[:60] @ Q), 1) == 1.0


def test_principal_components_and_a_ridge_map_agree_with_scikit_learn():
    X, Y, A, B = held(3)
    fitted = PrincipalSubspaceAligner(4, reg=0.05).fit(X, Y)
    one, two = PCA(4, whiten=True).fit(X), PCA(4, whiten=True).fit(Y)
    ridge = Ridge(alpha=0.05 * (len(X) - 1)).fit(one.transform(X), two.transform(Y))
    expected = unit(ridge.predict(one.transform(A))) @ unit(two.transform(B)).T
    np.testing.assert_allclose(fitted.similarity(A, B), expected, atol=1e-10)
    assert fitted.n_components_ == [4, 4]


def test_svcca_has_the_correlations_of_the_similarity_of_that_name():
    X, Y = views(4)
    fitted = PrincipalSubspaceAligner(0.9, route="cca", reg=0.0).fit(X, Y)
    np.testing.assert_allclose(fitted.correlations_, cca(X, Y, rank=0.9).correlations, atol=1e-8)
    assert np.mean(fitted.correlations_) == pytest.approx(float(svcca(X, Y, share=0.9)), abs=1e-8)
    for view, rows in ((0, X), (1, Y)):
        kept = np.cumsum(PCA().fit(rows).explained_variance_ratio_)
        k = fitted.n_components_[view]
        assert kept[k - 1] >= 0.9 > kept[k - 2]


def centred_kernel(A, sigma):
    squared = np.array([[np.sum((a - b) ** 2) for b in A] for a in A])
    H = np.eye(len(A)) - 1 / len(A)
    return H @ np.exp(-squared / (2 * sigma**2)) @ H


def test_kernel_correlations_solve_the_generalised_eigenproblem():
    X, Y = views(5, n=40)
    fitted = KernelCanonicalCorrelation(4, reg=0.02).fit(X, Y)
    K, L = (centred_kernel(A, sigma) for A, sigma in zip((X, Y), fitted.bandwidths_, strict=True))
    zero = np.zeros_like(K)
    ridged = [M + 0.02 * np.trace(M) * np.eye(40) for M in (K, L)]
    values, vectors = scipy.linalg.eig(
        np.block([[zero, L], [K, zero]]), np.block([[ridged[0], zero], [zero, ridged[1]]])
    )
    order = np.argsort(-values.real)[:4]
    np.testing.assert_allclose(fitted.correlations_, values.real[order], atol=1e-8)
    for i, at in enumerate(order):
        for M, half, mine in zip(
            (K, L), np.split(vectors[:, at].real, 2), (fitted.transform_x(X), fitted.transform_y(Y)), strict=True
        ):
            assert abs(np.corrcoef(M @ half, mine[:, i])[0, 1]) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("n_landmarks", [2000, 30])
def test_a_linear_kernel_is_canonical_correlation_and_few_landmarks_that_span_it_lose_nothing(n_landmarks):
    X, Y, A, B = held(6, d_x=8, d_y=8)
    fitted = KernelCanonicalCorrelation(3, kernel="linear", reg=0.01, n_landmarks=n_landmarks).fit(X, Y)
    plain = CanonicalCorrelation(3, reg=0.01 * 8).fit(X, Y)
    np.testing.assert_allclose(fitted.correlations_, plain.correlations_, atol=1e-8)
    sides = plain.transform(A), plain.transform_y(B)
    expected = unit(sides[0] * plain.correlations_) @ unit(sides[1]).T
    np.testing.assert_allclose(fitted.similarity(A, B), expected, atol=1e-7)
    assert len(fitted.landmarks_) == min(n_landmarks, 200)


@pytest.mark.parametrize("n_landmarks", [2000, 100])
def test_kernels_find_partners_that_no_linear_subspace_does(n_landmarks):
    """The second view is the first without signs: their coordinates are uncorrelated, and determine each other."""
    X = np.random.default_rng(7).normal(size=(400, 2))
    Y = np.abs(X)
    fitted = KernelCanonicalCorrelation(10, n_landmarks=n_landmarks).fit(X[100:], Y[100:])
    linear = SubspaceAligner(2).fit(X[100:], Y[100:])
    assert topk_accuracy(fitted.similarity(X[:100], Y[:100]), 5) > 0.5
    assert topk_accuracy(linear.similarity(X[:100], Y[:100]), 5) < 0.2


def test_the_contrastive_loss_is_the_symmetric_cross_entropy_of_scaled_cosines():
    X, Y = views(8, n=50)
    fitted = ContrastiveProjections(3, max_iter=1, batch_size=50, learning_rate=1e-12, weight_decay=0, device="cpu")
    scores = fitted.fit(X, Y).similarity(X, Y) / 0.07
    ways = [np.mean([np.log(np.sum(np.exp(row))) - row[i] for i, row in enumerate(S)]) for S in (scores, scores.T)]
    assert fitted.history_ == [pytest.approx(np.mean(ways), rel=1e-4)]
    assert fitted.scale_ == pytest.approx(1 / 0.07, rel=1e-6)


def test_trained_projections_find_partners_and_of_shuffled_anchors_nothing():
    X, Y, A, B = held(9)
    state = torch.random.get_rng_state()
    settings = {"max_iter": 60, "batch_size": 100, "learning_rate": 1e-2, "device": "cpu"}
    fitted, again = (ContrastiveProjections(6, **settings).fit(X, Y) for _ in range(2))
    np.testing.assert_array_equal(fitted.transform_x(A), again.transform_x(A))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fitted.history_[-1] < 0.5 * fitted.history_[0]
    assert topk_accuracy(fitted.similarity(A, B), 5) > 0.5
    shuffled = ContrastiveProjections(6, **settings).fit(X, Y[np.random.default_rng(0).permutation(len(Y))])
    # Three standard errors above the chance of 5 in 60.
    assert topk_accuracy(shuffled.similarity(A, B), 5) < 5 / 60 + 3 * np.sqrt(5 / 60 * 55 / 60 / 60)


def test_a_loss_that_is_lost_is_told():
    X, Y = views(12, n=40)
    with pytest.raises(NotConverged, match=r"no longer finite after .* epochs; try a learning_rate below 1e"):
        ContrastiveProjections(3, learning_rate=1e30, max_iter=5, batch_size=10, device="cpu").fit(X, Y)


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        (RelativeRepresentation(0), "n_references must be at least 1, got 0"),
        (PrincipalSubspaceAligner(0), "n_components must be at least 1, got 0"),
        (PrincipalSubspaceAligner(1.5), r"n_components must be a whole number or a share in \(0, 1\], got 1.5"),
        (PrincipalSubspaceAligner(True), r"n_components must be a whole number or a share in \(0, 1\], got True"),
        (PrincipalSubspaceAligner(route="pls"), "route must be one of .* got 'pls'"),
        (PrincipalSubspaceAligner(reg=-1), "reg must be finite and at least 0, got -1"),
        (KernelCanonicalCorrelation(kernel="poly"), "kernel must be one of .* got 'poly'"),
        (KernelCanonicalCorrelation(reg=0), "reg must be positive, got 0"),
        (KernelCanonicalCorrelation(0), "n_components must be at least 1, got 0"),
        (KernelCanonicalCorrelation(n_landmarks=1), "n_landmarks must be at least 2, got 1"),
        (ContrastiveProjections(max_iter=0), "max_iter must be at least 1, got 0"),
        (ContrastiveProjections(batch_size=1), "batch_size must be at least 2, got 1"),
        (ContrastiveProjections(learning_rate=0), "learning_rate must be positive, got 0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(scorer, words):
    with pytest.raises(ValueError, match=words):
        scorer.fit(*views(10, n=20))


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: str(scorer)[:60])
def test_anchors_and_rows_that_cannot_be_used_are_refused(scorer):
    X, Y, A, B = held(11)
    for left, right, words in (
        (X[:1], Y[:1], "at least 2 anchors, got 1 sample"),
        (X, 0 * Y + 1, "y must vary from row to row, got a constant view"),
        (X * 1e150, Y, "X must be of a size whose squares fit"),
        (X, Y[:7], "inconsistent numbers of samples"),
    ):
        with pytest.raises(ValueError, match=words):
            scorer.fit(left, right)
    fitted = scorer.fit(X, Y)
    with pytest.raises(ValueError, match="y must have 8 features, got 9"):
        fitted.similarity(A, A)
    with pytest.raises(ValueError, match="k must be between 1 and the 60 rows of the gallery, got 0"):
        fitted.retrieve(A, B, 0)
