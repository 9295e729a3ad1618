from inspect import unwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm

from polyspan.errors import NotConverged
from polyspan.linalg import (
    complete_basis,
    grassmann_exp,
    grassmann_tangent,
    random_stiefel,
    stiefel_exp,
    stiefel_log,
    stiefel_retract,
    stiefel_tangent,
)

METRICS = ("euclidean", "canonical")


def frame_and_tangent(seed, d=6, k=3, batch=(), length=0.8):
    rng = np.random.default_rng(seed)
    S = random_stiefel(d, k, rng=rng, batch=batch)
    G = stiefel_tangent(S, rng.normal(size=(*batch, d, k)))
    return S, length * G / np.linalg.norm(G, ord=2, axis=(-2, -1), keepdims=True)


def literal_canonical(S, G):
    """The rotation of the whole space whose generator has no part outside S, applied to S."""
    whole = complete_basis(S)
    A, B = S.T @ G, whole[:, S.shape[1] :].T @ G
    block = np.block([[A, -B.T], [B, np.zeros((B.shape[0],) * 2)]])
    return whole @ expm(block)[:, : S.shape[1]]


def literal_euclidean(S, G, steps=2000):
    """Integrate the geodesic equation Y'' = -Y Y''Y' by leapfrog on the constraint."""
    Y, V, h = S.copy(), G.copy(), 1 / steps

    def acceleration(Y, V):
        return -Y @ (V.T @ V)

    for _ in range(steps):
        k1 = (V, acceleration(Y, V))
        k2 = (V + h / 2 * k1[1], acceleration(Y + h / 2 * k1[0], V + h / 2 * k1[1]))
        k3 = (V + h / 2 * k2[1], acceleration(Y + h / 2 * k2[0], V + h / 2 * k2[1]))
        k4 = (V + h * k3[1], acceleration(Y + h * k3[0], V + h * k3[1]))
        Y = Y + h / 6 * (k1[0] + 2 * k2[0] + 2 * k3[0] + k4[0])
        V = V + h / 6 * (k1[1] + 2 * k2[1] + 2 * k3[1] + k4[1])
    return Y


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("d", "k"), [(5, 1), (6, 3), (5, 4), (3, 3)])
def test_the_logarithm_undoes_the_exponential(d, k, metric):
    S, G = frame_and_tangent(d + k, d, k, batch=(3,))
    T = stiefel_exp(S, G, metric=metric)
    np.testing.assert_allclose(np.swapaxes(T, -1, -2) @ T, np.broadcast_to(np.eye(k), (3, k, k)), atol=1e-12)
    np.testing.assert_allclose(stiefel_log(S, T, metric=metric), G, atol=1e-11)


@pytest.mark.parametrize("metric", METRICS)
def test_float32_stays_float32_and_close(metric):
    S, G = frame_and_tangent(1)
    T = stiefel_exp(S.astype(np.float32), G.astype(np.float32), metric=metric)
    assert T.dtype == np.float32
    np.testing.assert_allclose(T, stiefel_exp(S, G, metric=metric), atol=5e-6)
    np.testing.assert_allclose(stiefel_log(S.astype(np.float32), T, metric=metric), G, atol=1e-4)


def test_agrees_with_the_literal_forms():
    S, G = frame_and_tangent(2, length=1.4)
    np.testing.assert_allclose(stiefel_exp(S, G, metric="canonical"), literal_canonical(S, G), atol=1e-12)
    np.testing.assert_allclose(stiefel_exp(S, G, metric="euclidean"), literal_euclidean(S, G), atol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_a_motion_out_of_the_span_is_the_grassmann_geodesic(metric):
    S, E = frame_and_tangent(3)
    G = grassmann_tangent(S, E)
    np.testing.assert_allclose(stiefel_exp(S, G, metric=metric), grassmann_exp(S, G), atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_tangents_are_antisymmetric_and_agree_with_geoopt(seed):
    geoopt = pytest.importorskip("geoopt")
    S, _ = frame_and_tangent(seed)
    E = np.random.default_rng(seed + 1).normal(size=S.shape)
    theirs = {"euclidean": geoopt.EuclideanStiefel(), "canonical": geoopt.CanonicalStiefel()}
    for metric, manifold in theirs.items():
        G = stiefel_tangent(S, E, metric)
        np.testing.assert_allclose(S.T @ G + G.T @ S, 0, atol=1e-12)
        expected = manifold.egrad2rgrad(torch.as_tensor(S), torch.as_tensor(E)).numpy()
        np.testing.assert_allclose(G, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "metric", "order"), [("qr", "euclidean", 1), ("polar", "euclidean", 2), ("cayley", "canonical", 2)]
)
def test_retractions_are_frames_and_follow_the_geodesic_to_their_order(method, metric, order):
    S, G = frame_and_tangent(4, batch=(2,))
    R = stiefel_retract(S, G, method)
    np.testing.assert_allclose(np.swapaxes(R, -1, -2) @ R, np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-12)
    gaps = [
        np.abs(stiefel_retract(S, h * G, method) - stiefel_exp(S, h * G, metric=metric)).max() for h in (1e-2, 1e-3)
    ]
    assert gaps[1] < 1.5 * 10.0 ** -(order + 1) * gaps[0]


@pytest.mark.parametrize("kind", ["generic", "zero", "rank one"])
def test_gradients_are_true_at_generic_and_at_degenerate_tangents(kind):
    S, G = (torch.as_tensor(x) for x in frame_and_tangent(5, d=5, k=2))
    if kind == "zero":
        G = G * 0
    if kind == "rank one":
        G = grassmann_tangent(S, G) * torch.tensor([1.0, 0.0])
    S, G = S.requires_grad_(), G.requires_grad_()
    for metric in METRICS:
        assert torch.autograd.gradcheck(lambda S, G, m=metric: stiefel_exp(S, G, metric=m), (S, G))
        assert torch.autograd.gradcheck(lambda S, G, m=metric: stiefel_tangent(S, G, m), (S, G))
    for method in ("qr", "polar", "cayley"):
        assert torch.autograd.gradcheck(lambda S, G, m=method: stiefel_retract(S, G, m), (S, G))


def test_the_logarithm_of_a_frame_at_itself_is_zero_and_has_the_identity_as_derivative():
    S, _ = (torch.as_tensor(x) for x in frame_and_tangent(6, d=5, k=2))
    assert not stiefel_log(S, S).any()
    E = stiefel_tangent(S, torch.ones_like(S))
    moved = stiefel_log(S, stiefel_exp(S, 1e-5 * E))
    torch.testing.assert_close(moved, 1e-5 * E, atol=1e-13, rtol=0)


def test_arguments_that_do_not_fit_are_named():
    S, G = frame_and_tangent(7)
    with pytest.raises(ValueError, match="metric must be 'euclidean' or 'canonical', got 'flat'"):
        unwrap(stiefel_exp)(S, G, metric="flat")
    with pytest.raises(ValueError, match="method must be 'qr', 'polar' or 'cayley', got 'svd'"):
        unwrap(stiefel_retract)(S, G, "svd")
    with pytest.raises(ValueError, match="E must have the shape of S"):
        unwrap(stiefel_tangent)(S, G[:, :2])
    with pytest.raises(NotConverged, match="shooting left a frame at distance"):
        unwrap(stiefel_log)(S, -S, max_iter=30)
