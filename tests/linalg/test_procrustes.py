import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group

from polyspan.linalg import PairedMoments, procrustes, procrustes_from_moments


@settings(max_examples=20)
@given(d=st.integers(2, 16), seed=st.integers(0, 10**6))
def test_recovers_a_planted_rotation_scale_and_shift(d, seed):
    rng = np.random.default_rng(seed)
    Q, X, b = ortho_group.rvs(d, random_state=seed), rng.normal(size=(3 * d, d)), rng.normal(size=d)
    fit = procrustes(X, 2.5 * X @ Q + b, shift=True, scale=True)
    np.testing.assert_allclose(fit.rotation, Q, atol=1e-8)
    np.testing.assert_allclose(fit.scale, 2.5, rtol=1e-8)
    np.testing.assert_allclose((X - fit.mean_in) @ fit.rotation * fit.scale + fit.mean_out, 2.5 * X @ Q + b, atol=1e-7)
    assert fit.rank == d


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_agrees_with_scipy(dtype):
    X, Y = np.random.default_rng(0).normal(size=(2, 50, 7)).astype(dtype)
    fit = procrustes(X, Y)
    theirs, total = scipy.linalg.orthogonal_procrustes(X, Y)
    assert fit.rotation.dtype == dtype
    np.testing.assert_allclose(fit.rotation, theirs, atol=1e-5 if dtype == np.float32 else 1e-12)
    np.testing.assert_allclose(fit.singular_values.sum(), total, rtol=1e-5 if dtype == np.float32 else 1e-12)


def test_no_other_isometry_comes_nearer():
    rng = np.random.default_rng(1)
    X, Y = rng.normal(size=(30, 5)), rng.normal(size=(30, 5))
    best = np.linalg.norm(X @ procrustes(X, Y).rotation - Y)
    others = [np.linalg.norm(X @ ortho_group.rvs(5, random_state=i) - Y) for i in range(200)]
    assert best < min(others)


@pytest.mark.parametrize(("d_in", "d_out"), [(6, 4), (4, 6)])
def test_unequal_widths_give_an_isometry_that_maximises_the_inner_product(d_in, d_out):
    rng = np.random.default_rng(2)
    X, Y = rng.normal(size=(40, d_in)), rng.normal(size=(40, d_out))
    fit = procrustes(X, Y)
    Q = fit.rotation
    np.testing.assert_allclose(Q.T @ Q if d_in >= d_out else Q @ Q.T, np.eye(min(d_in, d_out)), atol=1e-12)
    np.testing.assert_allclose(np.trace(Q.T @ X.T @ Y), np.linalg.svd(X.T @ Y, compute_uv=False).sum())


def test_weights_count_as_repeated_rows():
    rng = np.random.default_rng(3)
    X, Y, w = rng.normal(size=(12, 3)), rng.normal(size=(12, 3)), rng.integers(1, 4, size=12)
    weighted = procrustes(X, Y, shift=True, weights=w)
    repeated = procrustes(np.repeat(X, w, axis=0), np.repeat(Y, w, axis=0), shift=True)
    np.testing.assert_allclose(weighted.rotation, repeated.rotation, atol=1e-10)
    np.testing.assert_allclose(weighted.mean_in, repeated.mean_in, atol=1e-12)


def test_too_few_anchors_turn_open_directions_as_little_as_can_be():
    X = np.random.default_rng(4).normal(size=(3, 8))
    same = procrustes(X, X, tie_break="identity")
    assert same.rank == 3
    np.testing.assert_allclose(same.rotation, np.eye(8), atol=1e-9)
    Y = X @ ortho_group.rvs(8, random_state=0)
    turned = procrustes(X, Y, tie_break="identity").rotation
    np.testing.assert_allclose(turned.T @ turned, np.eye(8), atol=1e-12)
    np.testing.assert_allclose(X @ turned, Y, atol=1e-9)


def test_anchors_of_zeros_give_the_identity():
    fit = procrustes(np.zeros((4, 3)), np.zeros((4, 3)), shift=True, scale=True, tie_break="identity")
    np.testing.assert_array_equal(fit.rotation, np.eye(3))
    assert (fit.scale, fit.rank) == (1.0, 0)


def test_a_truncated_map_keeps_only_the_leading_directions():
    X, Y = np.random.default_rng(5).normal(size=(2, 60, 6))
    U, _, Vt = np.linalg.svd(X.T @ Y)
    fit = procrustes(X, Y, rank=2)
    np.testing.assert_allclose(fit.rotation, U[:, :2] @ Vt[:2], atol=1e-12)
    assert fit.rank == 2


def test_streamed_batches_give_the_same_map_as_all_rows():
    X, Y = np.random.default_rng(6).normal(size=(2, 100, 5))
    moments = PairedMoments(5, 5)
    for a in range(0, 100, 13):
        moments.update(X[a : a + 13], Y[a : a + 13])
    np.testing.assert_allclose(
        procrustes_from_moments(moments, shift=True).rotation, procrustes(X, Y, shift=True).rotation, atol=1e-12
    )


def test_torch_rows_give_torch_maps_in_their_own_width():
    X, Y = (torch.as_tensor(a) for a in np.random.default_rng(7).normal(size=(2, 20, 4)).astype(np.float32))
    fit = procrustes(X, Y, shift=True)
    assert fit.rotation.dtype == torch.float32
    np.testing.assert_allclose(fit.rotation.numpy(), procrustes(X.numpy(), Y.numpy(), shift=True).rotation, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"rank": 0}, "rank must be"), ({"rank": 4}, "rank must be"), ({"tie_break": "none"}, "tie_break must be")],
)
def test_parameters_out_of_range_are_named(kwargs, message):
    X = np.eye(3)
    with pytest.raises(ValueError, match=message):
        procrustes(X, X, **kwargs)


def test_unpaired_row_counts_and_no_rows_are_refused():
    with pytest.raises(ValueError, match="equal, positive row counts"):
        procrustes(np.eye(3), np.eye(3)[:2])
    with pytest.raises(ValueError, match="equal, positive row counts"):
        procrustes(np.zeros((0, 3)), np.zeros((0, 3)))
