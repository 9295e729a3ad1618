from inspect import unwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyspan.linalg import (
    grassmann_exp,
    grassmann_log,
    grassmann_retract,
    grassmann_tangent,
    grassmann_transport,
    principal_angles,
    projector,
    random_stiefel,
    subspace_distance,
)
from polyspan.linalg.grassmann import cos_sinc

TOL = {np.float32: 2e-5, np.float64: 1e-12}


def point_and_tangent(seed, d=7, k=3, batch=(), length=1.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    S = random_stiefel(d, k, rng=rng, batch=batch)
    G = grassmann_tangent(S, rng.normal(size=(*batch, d, k)))
    largest = np.linalg.norm(G, ord=2, axis=(-2, -1), keepdims=True)
    return S.astype(dtype), (G * length / largest).astype(dtype)


def literal_exp(S, G, t):
    """The textbook's geodesic, by the thin SVD of the tangent."""
    U, s, Vh = np.linalg.svd(G, full_matrices=False)
    return (S @ Vh.T * np.cos(t * s) + U * np.sin(t * s)) @ Vh


def literal_log(S, T):
    """The textbook's logarithm: arc tangents of the singular values of (I - SS')T(S'T)^-1."""
    U, s, Vh = np.linalg.svd((T - S @ (S.T @ T)) @ np.linalg.inv(S.T @ T), full_matrices=False)
    return U * np.arctan(s) @ Vh


def literal_transport(S, G, H, t):
    U, s, Vh = np.linalg.svd(G, full_matrices=False)
    return (-S @ Vh.T * np.sin(t * s) + U * (np.cos(t * s) - 1)) @ (U.T @ H) + H


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("d", "k"), [(5, 1), (7, 3), (8, 5), (4, 4)])
def test_the_logarithm_undoes_the_exponential_as_subspaces_and_as_tangents(d, k, dtype):
    S, G = point_and_tangent(d * k, d, k, batch=(4,), length=1.3, dtype=dtype)
    if d == k:
        G = np.zeros_like(G)
    T = grassmann_exp(S, G)
    assert T.dtype == dtype
    np.testing.assert_allclose(np.swapaxes(T, -1, -2) @ T, np.broadcast_to(np.eye(k), (4, k, k)), atol=TOL[dtype])
    np.testing.assert_allclose(grassmann_log(S, T), G, atol=5 * TOL[dtype])
    np.testing.assert_allclose(projector(grassmann_exp(S, grassmann_log(S, T))), projector(T), atol=5 * TOL[dtype])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.floats(1e-9, 1.5), k=st.integers(1, 4))
def test_the_norm_of_the_logarithm_is_the_geodesic_distance(seed, length, k):
    S, G = point_and_tangent(seed, 9, k, length=length)
    T = grassmann_exp(S, G)
    np.testing.assert_allclose(np.linalg.norm(grassmann_log(S, T)), np.linalg.norm(G), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(np.linalg.norm(G), subspace_distance(S, T), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(
        np.sort(np.linalg.svd(G, compute_uv=False)), principal_angles(S, T), rtol=1e-8, atol=1e-14
    )


@pytest.mark.parametrize("length", [0.0, 1e-12, 0.3, 3.0, 40.0])
def test_agrees_with_the_literal_svd_forms(length):
    S, G = point_and_tangent(3, length=length) if length else (point_and_tangent(3)[0], np.zeros((7, 3)))
    H = grassmann_tangent(S, np.random.default_rng(4).normal(size=(7, 3)))
    tol = 1e-12 * max(1.0, length**2)
    np.testing.assert_allclose(grassmann_exp(S, G, 0.7), literal_exp(S, G, 0.7), atol=tol)
    np.testing.assert_allclose(grassmann_transport(S, G, H, 0.7), literal_transport(S, G, H, 0.7), atol=tol)
    if length < 2:
        T = random_stiefel(7, 3, rng=np.random.default_rng(5))
        np.testing.assert_allclose(grassmann_log(S, T), literal_log(S, T), atol=1e-11)


def test_agrees_with_geoopt_on_the_tangent_of_a_gradient():
    geoopt = pytest.importorskip("geoopt")
    S, _ = point_and_tangent(6)
    E = np.random.default_rng(7).normal(size=(7, 3))
    mine = grassmann_tangent(S, E)
    # The Stiefel gradient differs by the turns inside the span only.
    theirs = geoopt.EuclideanStiefel().egrad2rgrad(torch.as_tensor(S), torch.as_tensor(E)).numpy()
    np.testing.assert_allclose(mine, theirs - S @ (S.T @ theirs), atol=1e-12)
    np.testing.assert_allclose(S.T @ mine, 0, atol=1e-14)


def test_a_geodesic_taken_in_two_halves_with_transport_is_the_geodesic():
    S, G = point_and_tangent(8, length=1.1)
    half, velocity = grassmann_exp(S, G, 0.5), grassmann_transport(S, G, G, 0.5)
    np.testing.assert_allclose(half.T @ velocity, 0, atol=1e-12)
    np.testing.assert_allclose(grassmann_exp(half, velocity, 0.5), grassmann_exp(S, G), atol=1e-12)


def test_transport_keeps_inner_products_and_stays_tangent():
    S, G = point_and_tangent(9, batch=(5,), length=2.0)
    rng = np.random.default_rng(10)
    H, K = (grassmann_tangent(S, rng.normal(size=G.shape)) for _ in range(2))
    moved = [grassmann_transport(S, G, X) for X in (H, K)]
    np.testing.assert_allclose(np.swapaxes(grassmann_exp(S, G), -1, -2) @ moved[0], 0, atol=1e-12)
    np.testing.assert_allclose((moved[0] * moved[1]).sum((-2, -1)), (H * K).sum((-2, -1)), atol=1e-12)


def test_retractions_reach_one_subspace_and_follow_the_geodesic_to_first_order():
    S, G = point_and_tangent(11, batch=(3,), length=0.8)
    qr, polar, cholesky = (grassmann_retract(S, G, m) for m in ("qr", "polar", "cholesky"))
    np.testing.assert_allclose(cholesky, qr, atol=1e-12)
    np.testing.assert_allclose(projector(polar), projector(qr), atol=1e-12)
    np.testing.assert_allclose(np.tan(principal_angles(S, qr)), np.sort(np.linalg.svd(G, compute_uv=False)), atol=1e-12)
    gaps = [subspace_distance(grassmann_exp(S, h * G), grassmann_retract(S, h * G)).max() for h in (1e-2, 1e-3)]
    assert gaps[1] < 1e-2 * gaps[0]


def test_torch_gives_the_same_and_half_precision_is_kept():
    S, G = point_and_tangent(12, batch=(2,))
    s, g = torch.as_tensor(S), torch.as_tensor(G)
    T = grassmann_exp(S, G)
    np.testing.assert_allclose(grassmann_exp(s, g).numpy(), T, atol=1e-14)
    np.testing.assert_allclose(grassmann_log(s, torch.as_tensor(T)).numpy(), grassmann_log(S, T), atol=1e-12)
    np.testing.assert_allclose(grassmann_transport(s, g, g).numpy(), grassmann_transport(S, G, G), atol=1e-14)
    low = grassmann_exp(s.bfloat16(), g.bfloat16())
    assert low.dtype == torch.bfloat16
    np.testing.assert_allclose(low.float().numpy(), T, atol=3e-2)


def degenerate_tangents():
    S, G = (torch.as_tensor(x) for x in point_and_tangent(13, d=6, k=3, length=0.9))
    U = torch.linalg.svd(G, full_matrices=False)[0]
    repeated = U * 0.6
    return S, {"generic": G, "zero": G * 0, "repeated": repeated, "rank one": repeated * torch.tensor([1.0, 0, 0])}


@pytest.mark.parametrize("kind", ["generic", "zero", "repeated", "rank one"])
def test_gradients_are_true_at_generic_and_at_degenerate_tangents(kind):
    S, tangents = degenerate_tangents()
    S, G = S.requires_grad_(), tangents[kind].requires_grad_()
    assert torch.autograd.gradcheck(grassmann_exp, (S, G))
    assert torch.autograd.gradcheck(lambda S, G: grassmann_transport(S, G, G + S), (S, G))
    for method in ("qr", "polar", "cholesky"):
        assert torch.autograd.gradcheck(lambda S, G, m=method: grassmann_retract(S, G, m), (S, G))
    T = grassmann_exp(S, G).detach().requires_grad_()
    assert torch.autograd.gradcheck(grassmann_log, (S, T))
    assert torch.autograd.gradgradcheck(grassmann_exp, (S, G))


def test_orthogonal_subspaces_have_a_logarithm_of_right_angles():
    S, T = np.eye(6)[:, :2], np.eye(6)[:, 2:4]
    G = grassmann_log(S, T)
    np.testing.assert_allclose(np.linalg.svd(G, compute_uv=False), np.pi / 2, atol=1e-12)
    np.testing.assert_allclose(projector(grassmann_exp(S, G)), projector(T), atol=1e-12)


@pytest.mark.parametrize("doublings", [None, 9])
def test_a_fixed_number_of_doublings_serves_every_angle_up_to_200(doublings):
    angles = np.array([0.0, 1e-8, 1e-3, 0.5, 3.0, 20.0, 199.0])
    cos, sinc = cos_sinc(np.diag(angles**2), doublings)
    np.testing.assert_allclose(np.diag(cos), np.cos(angles), atol=1e-10)
    np.testing.assert_allclose(np.diag(sinc), np.sinc(angles / np.pi), atol=1e-10)


def test_arguments_that_do_not_fit_are_named():
    S, G = point_and_tangent(14)
    with pytest.raises(ValueError, match=r"S must hold bases .* got shape \(3, 7\)"):
        unwrap(grassmann_exp)(S.T, G.T)
    with pytest.raises(ValueError, match="G must have the shape of S"):
        unwrap(grassmann_exp)(S, G[:-1])
    with pytest.raises(ValueError, match="method must be 'qr', 'polar' or 'cholesky', got 'lu'"):
        unwrap(grassmann_retract)(S, G, "lu")
    with pytest.raises(ValueError, match="G must be finite"):
        unwrap(grassmann_exp)(S, G * np.nan)
    with pytest.raises(TypeError, match="must be real"):
        unwrap(grassmann_tangent)(S, G * 1j)
