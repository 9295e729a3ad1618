import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.align import IdentityMap, MeanShift, OrthogonalMap, ResidualMLPMap, RidgeMap, load_aligner
from polyspan.errors import WrongContent
from polyspan.io import save_fitted

ALL = [
    OrthogonalMap(),
    RidgeMap(),
    MeanShift(),
    IdentityMap(),
    ResidualMLPMap(hidden=8, max_iter=5, random_state=0),
]


@parametrize_with_checks(
    [OrthogonalMap(), OrthogonalMap(shift=False), RidgeMap(), ResidualMLPMap(hidden=8, max_iter=5, random_state=0)]
)
def test_sklearn_contract(estimator, check):
    check(estimator)


@settings(max_examples=25)
@given(d=st.integers(2, 24), seed=st.integers(0, 2**32 - 1))
def test_recovers_a_planted_rotation_and_shift(d, seed):
    rng = np.random.default_rng(seed)
    Q, X = ortho_group.rvs(d, random_state=seed), rng.normal(size=(3 * d, d))
    fitted = OrthogonalMap().fit(X, X @ Q + rng.normal(size=d))
    np.testing.assert_allclose(fitted.rotation_, Q, atol=1e-8)
    assert fitted.residual_ < 1e-7


def test_the_map_of_a_model_to_itself_is_the_identity():
    X = np.random.default_rng(0).normal(size=(50, 6))
    np.testing.assert_allclose(OrthogonalMap().fit(X, X).transform(X), X, atol=1e-10)


def test_there_and_back_is_the_identity_for_equal_widths():
    X, Y = np.random.default_rng(0).normal(size=(2, 50, 6))
    fitted = OrthogonalMap(scale=True).fit(X, Y)
    np.testing.assert_allclose(fitted.inverse_transform(fitted.transform(X)), X, atol=1e-9)


def test_a_wider_target_keeps_every_inner_product():
    rng = np.random.default_rng(1)
    X, Y = rng.normal(size=(40, 4)), rng.normal(size=(40, 7))
    Z = OrthogonalMap(shift=False).fit(X, Y).transform(X)
    np.testing.assert_allclose(Z @ Z.T, X @ X.T, atol=1e-10)


def test_agrees_with_scipy():
    X, Y = np.random.default_rng(0).normal(size=(2, 50, 7))
    mine, theirs = OrthogonalMap(shift=False).fit(X, Y).rotation_, orthogonal_procrustes(X, Y)[0]
    np.testing.assert_allclose(mine, theirs, atol=1e-12)


def test_agrees_with_the_papers_formula_on_unit_rows():
    rng = np.random.default_rng(2)
    X, Y, texts, texts_b = rng.normal(size=(4, 60, 5))

    def unit(A):
        return A / np.linalg.norm(A, axis=1, keepdims=True)

    A, B = unit(X), unit(Y)
    U, _, Vt = np.linalg.svd((A - A.mean(0)).T @ (B - B.mean(0)))
    fitted = OrthogonalMap(normalize=True).fit(X, Y)
    np.testing.assert_allclose(fitted.transform(X), (A - A.mean(0)) @ U @ Vt + B.mean(0), atol=1e-10)
    fitted.add_modality("text", texts, texts_b[:30])
    expected = (unit(texts) - unit(texts).mean(0)) @ U @ Vt + unit(texts_b[:30]).mean(0)
    np.testing.assert_allclose(fitted.transform(texts, modality="text"), expected, atol=1e-10)
    plain = OrthogonalMap(normalize=True, rotation_only=True).fit(X, Y)
    np.testing.assert_allclose(plain.transform(texts), unit(texts) @ U @ Vt, atol=1e-10)


def test_residual_is_the_share_left_on_the_anchors():
    X, Y = np.random.default_rng(3).normal(size=(2, 50, 7))
    fitted = OrthogonalMap(scale=True).fit(X, Y)
    literal = np.linalg.norm(fitted.transform(X) - Y) / np.linalg.norm(Y - Y.mean(0))
    assert fitted.residual_ == pytest.approx(literal)


@pytest.mark.parametrize("n_batches", [2, 5])
def test_partial_fits_equal_one_fit(n_batches):
    X, Y = np.random.default_rng(4).normal(size=(2, 60, 5))
    streamed = OrthogonalMap()
    for rows in np.array_split(np.arange(60), n_batches):
        streamed.partial_fit(X[rows], Y[rows])
    whole = OrthogonalMap().fit(X, Y)
    np.testing.assert_allclose(streamed.rotation_, whole.rotation_, atol=1e-10)
    np.testing.assert_allclose(streamed.residual_, whole.residual_, atol=1e-10)
    assert streamed.n_anchors_ == 60


def test_too_few_anchors_still_give_an_isometry_and_say_what_they_determine():
    X, Y = np.random.default_rng(5).normal(size=(2, 4, 9))
    with pytest.warns(UserWarning, match="^4 anchors leave part of 9 dimensions open: they determine 3$"):
        fitted = OrthogonalMap().fit(X, Y)
    np.testing.assert_allclose(fitted.rotation_.T @ fitted.rotation_, np.eye(9), atol=1e-12)
    assert fitted.rank_ == 3


def test_anchors_as_many_as_the_narrower_space_or_the_rank_are_enough_and_batches_may_be_small():
    X, Y = np.random.default_rng(5).normal(size=(2, 6, 9))
    OrthogonalMap().fit(X, Y[:, :6])
    OrthogonalMap(rank=6).fit(X, Y)
    for options, Z in (({}, Y[:, :7]), ({"rank": 7}, Y)):
        with pytest.warns(UserWarning, match="^6 anchors leave part of 7 dimensions open"):
            OrthogonalMap(**options).fit(X, Z)
    streamed = OrthogonalMap().partial_fit(X[:3], Y[:3]).partial_fit(X[3:], Y[3:])
    assert streamed.rank_ == 5


def test_a_truncated_spectrum_maps_only_the_leading_directions():
    X, Y = np.random.default_rng(6).normal(size=(2, 50, 6))
    assert np.linalg.matrix_rank(OrthogonalMap(rank=2).fit(X, Y).rotation_) == 2


def test_a_modality_without_means_falls_back_to_none_and_says_so():
    X, Y = np.random.default_rng(7).normal(size=(2, 50, 3))
    fitted = OrthogonalMap().fit(X, Y)
    with pytest.warns(UserWarning, match="'audio' has no means"):
        found = fitted.transform(X, modality="audio")
    np.testing.assert_allclose(found, X @ fitted.rotation_, atol=1e-12)


def test_ridge_agrees_with_scikit_learn_and_shift_with_the_means():
    X, Y = np.random.default_rng(8).normal(size=(2, 50, 4))
    np.testing.assert_allclose(RidgeMap(alpha=2.0).fit(X, Y).transform(X), Ridge(2.0).fit(X, Y).predict(X), atol=1e-10)
    np.testing.assert_allclose(MeanShift().fit(X, Y).transform(X), X - X.mean(0) + Y.mean(0), atol=1e-12)
    np.testing.assert_array_equal(IdentityMap().fit(X, Y).transform(X), X)


def test_the_residual_network_learns_what_no_affine_map_can():
    rng = np.random.default_rng(9)
    X = rng.normal(size=(3000, 4))
    Y = np.concatenate([X, np.abs(X)], axis=1)
    network = ResidualMLPMap(hidden=64, random_state=0).fit(X[:2500], Y[:2500])
    error = np.mean((network.transform(X[2500:]) - Y[2500:]) ** 2)
    assert error < 0.3 * np.mean((RidgeMap().fit(X[:2500], Y[:2500]).transform(X[2500:]) - Y[2500:]) ** 2)


def test_the_residual_network_repeats_by_seed_and_leaves_global_chance_alone():
    import torch

    X, Y = np.random.default_rng(10).normal(size=(2, 40, 3))
    state = torch.random.get_rng_state()
    a, b, c = (ResidualMLPMap(hidden=4, max_iter=3, random_state=s).fit(X, Y).transform(X) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("aligner", ALL, ids=lambda a: type(a).__name__)
def test_a_saved_map_transforms_alike(aligner, tmp_path):
    X, Y = np.random.default_rng(11).normal(size=(2, 40, 3))
    aligner.fit(X, Y)
    if isinstance(aligner, OrthogonalMap):
        aligner.add_modality("text", X + 1, Y)
    path = aligner.save(tmp_path / "map.safetensors", source="old", target="new")
    again, about = load_aligner(path)
    assert type(again) is type(aligner)
    assert about == {"source": "old", "target": "new"}
    np.testing.assert_array_equal(again.transform(X), aligner.transform(X))
    if isinstance(aligner, OrthogonalMap):
        np.testing.assert_array_equal(again.transform(X, modality="text"), aligner.transform(X, modality="text"))
    np.testing.assert_array_equal(type(aligner).load(path).transform(X), aligner.transform(X))


def test_a_file_of_another_class_is_refused(tmp_path):
    X = np.random.default_rng(12).normal(size=(10, 3))
    path = RidgeMap().fit(X, X).save(tmp_path / "map.safetensors")
    with pytest.raises(WrongContent, match="RidgeMap"):
        OrthogonalMap.load(path)
    foreign = save_fitted(tmp_path / "other.safetensors", kind="Dictionary", arrays={"atoms": X}, params={})
    with pytest.raises(WrongContent, match="fitted map"):
        load_aligner(foreign)


@pytest.mark.parametrize("aligner", ALL, ids=lambda a: type(a).__name__)
def test_float32_rows_stay_float32(aligner):
    X, Y = np.random.default_rng(13).normal(size=(2, 40, 3)).astype(np.float32)
    assert aligner.fit(X, Y).transform(X).dtype == np.float32


@pytest.mark.parametrize(
    ("X", "Y", "message"),
    [
        (np.ones((3, 2)), np.ones((4, 2)), "inconsistent numbers of samples"),
        (np.array([[1.0, np.nan], [0, 1]]), np.eye(2), "NaN"),
        (np.array([[1.0, 0], [0, 0]]), np.eye(2), "all-zero row .* row 1"),
        (np.eye(2)[:1], np.eye(2)[:1], "at least 2 anchors, got 1"),
    ],
)
def test_anchors_that_cannot_be_used_are_refused(X, Y, message):
    with pytest.raises(ValueError, match=message):
        OrthogonalMap(normalize=True).fit(X, Y)


def test_rows_of_another_width_are_refused():
    X, Y = np.random.default_rng(14).normal(size=(2, 20, 3))
    fitted = OrthogonalMap().fit(X, Y)
    with pytest.raises(ValueError, match="expecting 3 features"):
        fitted.transform(np.ones((2, 4)))
    with pytest.raises(ValueError, match="3 features, got 4"):
        fitted.inverse_transform(np.ones((2, 4)))
    with pytest.raises(ValueError, match="one width, got 3 and 2"):
        MeanShift().fit(X, Y[:, :2])
    with pytest.raises(ValueError, match="must have shape"):
        fitted.score(X, Y[:, :2])


def test_duplicates_and_constant_anchors_need_no_warning():
    X = np.ones((6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(OrthogonalMap().fit(X, 2 * X).transform(X), 2 * X)
        np.testing.assert_allclose(RidgeMap().fit(X, 2 * X).transform(X), 2 * X)
