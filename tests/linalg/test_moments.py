import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyspan.linalg import PairedMoments


def literal(X, Y, w):
    mx, my = w @ X / w.sum(), w @ Y / w.sum()
    A, B, W = X - mx, Y - my, np.diag(w)
    return mx, my, A.T @ W @ A, A.T @ W @ B, B.T @ W @ B


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 40), max_size=4))
def test_any_split_into_batches_gives_the_two_pass_sums(seed, cuts):
    rng = np.random.default_rng(seed)
    X, Y, w = rng.normal(size=(40, 3)), rng.normal(size=(40, 2)), rng.uniform(0.1, 2, size=40)
    moments = PairedMoments(3, 2)
    edges = [0, *sorted(cuts), 40]
    for a, b in itertools.pairwise(edges):
        moments.update(X[a:b], Y[a:b], w[a:b])
    found = moments.mean_in, moments.mean_out, moments.cov_in, moments.cross, moments.cov_out
    for mine, twin in zip(found, literal(X, Y, w), strict=True):
        np.testing.assert_allclose(mine, twin, atol=1e-11)
    assert moments.n_rows == 40
    np.testing.assert_allclose(moments.weight, w.sum())
    bare = PairedMoments(3, 2, keep_cov_in=False, keep_cov_out=False)
    for a, b in itertools.pairwise(edges):
        bare.update(X[a:b], Y[a:b], w[a:b])
    for whole, less in ((moments, bare), (moments.uncentred(), bare.uncentred())):
        np.testing.assert_allclose(less.cross, whole.cross, atol=1e-11)
        np.testing.assert_allclose([less.spread_in, less.spread_out], [whole.spread_in, whole.spread_out])
        np.testing.assert_allclose(
            [less.spread_in, less.spread_out], [np.trace(whole.cov_in), np.trace(whole.cov_out)], atol=1e-11
        )
        assert less.cov_in.size == less.cov_out.size == 0


def test_a_merge_equals_one_pass():
    X, Y = np.random.default_rng(0).normal(size=(2, 30, 4))
    one = PairedMoments(4, 4).update(X, Y)
    two = PairedMoments(4, 4).update(X[:11], Y[:11]).merge(PairedMoments(4, 4).update(X[11:], Y[11:]))
    np.testing.assert_allclose(two.cross, one.cross, atol=1e-12)
    np.testing.assert_allclose(two.cov_out, one.cov_out, atol=1e-12)


def test_data_far_from_the_origin_lose_nothing():
    X = np.random.default_rng(0).normal(size=(1000, 2))
    far = PairedMoments(2)
    for part in np.array_split(X + 1e8, 7):
        far.update(part)
    np.testing.assert_allclose(far.cov_in, (X - X.mean(0)).T @ (X - X.mean(0)), rtol=1e-6)


def test_uncentred_sums_are_products_about_the_origin():
    X, Y = np.random.default_rng(0).normal(size=(2, 20, 3)) + 2
    plain = PairedMoments(3, 3).update(X, Y).uncentred()
    np.testing.assert_allclose(plain.cross, X.T @ Y, atol=1e-11)
    np.testing.assert_allclose(plain.cov_in, X.T @ X, atol=1e-11)
    assert not plain.mean_in.any()


def test_half_precision_and_torch_rows_are_summed_in_float64():
    X = np.random.default_rng(0).normal(size=(5000, 2)).astype(np.float16)
    mine = PairedMoments(2).update(torch.as_tensor(X, dtype=torch.bfloat16).to(torch.float16))
    expected = X.astype(np.float64)
    assert mine.cov_in.dtype == np.float64
    np.testing.assert_allclose(
        PairedMoments(2).update(X).cov_in, (expected - expected.mean(0)).T @ (expected - expected.mean(0)), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("X", "Y", "w", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 2)), None, "X must have shape"),
        (np.zeros((2, 4)), np.zeros((3, 2)), None, "Y must have shape"),
        (np.zeros((2, 4)), None, None, "Y must be given"),
        (np.zeros((2, 4)), np.zeros((2, 2)), np.array([1.0, -1.0]), "weights must be"),
    ],
)
def test_shapes_and_weights_that_do_not_fit_are_named(X, Y, w, message):
    with pytest.raises(ValueError, match=message):
        PairedMoments(4, 2).update(X, Y, w)


def test_rows_without_weight_leave_everything_as_it_was():
    moments = PairedMoments(2, 2).update(np.eye(2), np.eye(2), np.zeros(2))
    assert moments.weight == 0
    assert moments.n_rows == 0
