import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from polyspan.linalg import (
    orthonormal_basis,
    pairwise_subspace_distance,
    principal_angles,
    principal_vectors,
    projector,
    random_orthogonal,
    random_stiefel,
    subspace_distance,
)

METRICS = [
    "asimov",
    "binet-cauchy",
    "chordal",
    "fubini-study",
    "geodesic",
    "martin",
    "procrustes",
    "projection",
    "projection-frobenius",
]
KINDS = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def basis(*shape, seed=0, dtype=np.float64):
    return orthonormal_basis(np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def planted(angles, d=9, seed=0, dtype=np.float64):
    """Two bases at the given principal angles, turned at random inside and outside."""
    rng, k = np.random.default_rng(seed), len(angles)
    frame = random_orthogonal(d, rng=rng)
    A, B = frame[:, :k], frame[:, :k] * np.cos(angles) + frame[:, k : 2 * k] * np.sin(angles)
    return [(Q @ random_orthogonal(k, rng=rng)).astype(dtype) for Q in (A, B)]


def literal_distance(angles, metric):
    s, c = np.sin(angles), np.cos(angles)
    return {
        "asimov": angles.max(),
        "binet-cauchy": np.sqrt(1 - np.prod(c**2)),
        "chordal": np.sqrt((s**2).sum()),
        "fubini-study": np.arccos(np.prod(c)),
        "geodesic": np.sqrt((angles**2).sum()),
        "martin": np.sqrt(np.log(1 / np.prod(c**2))),
        "procrustes": 2 * np.sqrt((np.sin(angles / 2) ** 2).sum()),
        "projection": s.max(),
        "projection-frobenius": np.sqrt(2 * (s**2).sum()),
    }[metric]


@KINDS
@DTYPES
@pytest.mark.parametrize(("k", "l"), [(3, 3), (4, 2), (2, 4), (1, 1), (6, 5)])
def test_angles_agree_with_scipy(k, l, kind, dtype):
    A, B = basis(5, 12, k, dtype=dtype), basis(5, 12, l, seed=1, dtype=dtype)
    angles = principal_angles(kind(A), kind(B))
    assert angles.dtype == kind(A).dtype
    expected = [
        np.sort(scipy.linalg.subspace_angles(a, b)) for a, b in zip(A.astype(float), B.astype(float), strict=True)
    ]
    np.testing.assert_allclose(np.asarray(angles), expected, atol=2e-6 if dtype == np.float32 else 1e-12)


@KINDS
@DTYPES
@pytest.mark.parametrize("smallest", [1e-12, 1e-9, 1e-6, 1e-3])
def test_tiny_and_right_angles_are_both_accurate(smallest, kind, dtype):
    planned = np.array([smallest, 3 * smallest, 0.5, np.pi / 2 - smallest])
    A, B = planted(planned, dtype=dtype)
    found = np.asarray(principal_angles(kind(A), kind(B)), dtype=np.float64)
    np.testing.assert_allclose(found, planned, atol=4e-7 if dtype == np.float32 else 2e-15)


@DTYPES
def test_subspaces_too_large_not_to_meet_have_zero_angles(dtype):
    angles = principal_angles(basis(5, 8, 6, dtype=dtype), basis(5, 8, 5, seed=1, dtype=dtype))
    np.testing.assert_allclose(angles[:, :3], np.zeros((5, 3)), atol=1e-6 if dtype == np.float32 else 2e-15)
    assert (angles[:, 3:] > 0.1).all()


@settings(max_examples=20, deadline=None)
@given(k=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_planted_angles_are_found_whatever_the_bases_and_the_order(k, seed):
    planned = np.sort(np.random.default_rng(seed).uniform(0, np.pi / 2, size=k))
    A, B = planted(planned, seed=seed)
    np.testing.assert_allclose(principal_angles(A, B), planned, atol=1e-13)
    np.testing.assert_allclose(principal_angles(B, A), planned, atol=1e-13)


@KINDS
@DTYPES
@pytest.mark.parametrize(
    "planned",
    [
        [0.3, 0.7, 1.1, 1.4],
        [0.0, 0.0, 0.5, np.pi / 2],
        [1e-6, 1e-3, np.pi / 2 - 1e-3, np.pi / 2],
        [np.pi / 4] * 4,
        [0.0] * 4,
        [np.pi / 2] * 4,
        [0.2, np.pi / 4, np.pi / 4, 1.5],
    ],
)
@pytest.mark.parametrize("drop", [0, 1, -1])
def test_principal_vectors_diagonalise_both_bases(planned, drop, kind, dtype):
    A, B = planted(np.array(planned), dtype=dtype)
    A, B = (A[:, 1:], B) if drop == 1 else (A, B[:, 1:]) if drop == -1 else (A, B)
    tolerance = 3e-6 if dtype == np.float32 else 1e-13
    angles, left, right = (np.asarray(x, dtype=np.float64) for x in principal_vectors(kind(A), kind(B)))
    m = len(angles)
    np.testing.assert_allclose(left.T @ left, np.eye(m), atol=tolerance)
    np.testing.assert_allclose(right.T @ right, np.eye(m), atol=tolerance)
    np.testing.assert_allclose(left.T @ right, np.diag(np.cos(angles)), atol=tolerance)
    np.testing.assert_allclose(projector(A.astype(float)) @ left, left, atol=tolerance)
    np.testing.assert_allclose(projector(B.astype(float)) @ right, right, atol=tolerance)
    # The angle between each pair, measured from the vectors alone, also where cosines cannot tell.
    between = 2 * np.arctan2(np.linalg.norm(left - right, axis=0), np.linalg.norm(left + right, axis=0))
    np.testing.assert_allclose(between, angles, atol=tolerance)


@KINDS
@DTYPES
@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_the_functions_of_the_angles_they_are_defined_as(metric, kind, dtype):
    A, B = basis(4, 8, 3, dtype=dtype), basis(4, 8, 3, seed=1, dtype=dtype)
    found = subspace_distance(kind(A), kind(B), metric)
    assert found.dtype == kind(A).dtype
    expected = [
        literal_distance(scipy.linalg.subspace_angles(a, b), metric)
        for a, b in zip(A.astype(float), B.astype(float), strict=True)
    ]
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5 if dtype == np.float32 else 1e-12)
    np.testing.assert_allclose(
        np.asarray(subspace_distance(kind(A), kind(B), metric.replace("-", "_"))), expected, rtol=1e-5
    )


def test_projection_distances_are_norms_of_the_difference_of_projectors():
    A, B = basis(8, 3), basis(8, 3, seed=1)
    difference = projector(A) - projector(B)
    np.testing.assert_allclose(subspace_distance(A, B, "projection"), np.linalg.norm(difference, 2))
    np.testing.assert_allclose(subspace_distance(A, B, "projection-frobenius"), np.linalg.norm(difference))


def test_procrustes_distance_is_that_of_the_best_turned_bases():
    A, B = basis(8, 3), basis(8, 3, seed=1)
    turn = scipy.linalg.polar(B.T @ A)[0]
    np.testing.assert_allclose(subspace_distance(A, B, "procrustes"), np.linalg.norm(A - B @ turn))


@pytest.mark.parametrize("metric", METRICS)
def test_distances_of_near_subspaces_keep_their_digits(metric):
    """To first order every distance is a norm of the angles."""
    planned = np.array([3e-9, 4e-9])
    A, B = planted(planned)
    size = planned.max() if metric in {"asimov", "projection"} else np.linalg.norm(planned)
    found = subspace_distance(A, B, metric)
    np.testing.assert_allclose(found, size * (np.sqrt(2) if metric == "projection-frobenius" else 1), rtol=1e-6)


@pytest.mark.parametrize("metric", [m for m in METRICS if m != "martin"])
def test_metrics_obey_the_triangle_inequality(metric):
    bases = random_stiefel(6, 2, rng=np.random.default_rng(0), batch=(12,))
    D = pairwise_subspace_distance(bases, metric)
    for i, j, k in itertools.permutations(range(12), 3):
        assert D[i, k] <= D[i, j] + D[j, k] + 1e-12


@KINDS
@pytest.mark.parametrize("metric", METRICS)
def test_pairwise_distances_are_those_of_the_pairs_for_every_block_size(metric, kind):
    bases = kind(basis(7, 6, 2))
    one = pairwise_subspace_distance(bases, metric)
    for i, j in itertools.product(range(7), repeat=2):
        if i != j:
            np.testing.assert_allclose(
                float(one[i, j]), float(subspace_distance(bases[i], bases[j], metric)), atol=1e-13
            )
    assert (one == one.T).all()
    assert (np.diagonal(np.asarray(one)) == 0).all()
    for max_bytes in (1, 1000):
        np.testing.assert_allclose(
            np.asarray(pairwise_subspace_distance(bases, metric, max_bytes=max_bytes)), np.asarray(one)
        )
    assert pairwise_subspace_distance(bases[:1], metric).tolist() == [[0.0]]


def test_pairwise_distances_pass_gradients_on():
    bases = torch.from_numpy(basis(3, 5, 2)).requires_grad_()
    assert gradcheck(lambda b: pairwise_subspace_distance(b, "chordal"), bases)
    half = pairwise_subspace_distance(bases.bfloat16(), "geodesic")
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_are_true_at_generic_points(metric):
    A, B = (torch.from_numpy(basis(2, 6, 2, seed=s)).requires_grad_() for s in (0, 1))
    assert gradcheck(lambda a, b: subspace_distance(a, b, metric), (A, B))


@pytest.mark.parametrize("shapes", [((6, 2), (6, 2)), ((6, 3), (6, 2)), ((6, 2), (6, 3))])
def test_gradients_of_angles_are_true_at_generic_points(shapes):
    A, B = (torch.from_numpy(basis(*s, seed=i)).requires_grad_() for i, s in enumerate(shapes))
    assert gradcheck(principal_angles, (A, B))


@pytest.mark.parametrize("power", [2, 4])
def test_symmetric_functions_have_true_gradients_at_zero_and_repeated_angles(power):
    """Sums of even powers of sines are smooth in the bases where the angles themselves have kinks."""
    for planned in ([0.0, 0.0], [0.4, 0.4], [0.0, 0.8]):
        A, B = (torch.from_numpy(Q).requires_grad_() for Q in planted(np.array(planned), d=5))
        assert gradcheck(lambda a, b: (principal_angles(a, b).sin() ** power).sum(), (A, B), atol=1e-5)
        if power == 2:
            assert gradcheck(lambda a, b: subspace_distance(a, b, "chordal") ** 2, (A, B))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("planned", [[0.0, 0.0], [0.4, 0.4], [0.0, np.pi / 2], [np.pi / 2, np.pi / 2]])
def test_gradients_are_finite_at_degenerate_points(metric, planned):
    for A, B in (planted(np.array(planned), d=5), (np.eye(5, 2), np.eye(5, 2)), (np.eye(5, 2), np.eye(5)[:, [2, 1]])):
        if metric == "martin" and (principal_angles(A, B) > 1.5).any():
            continue
        A, B = torch.from_numpy(A).requires_grad_(), torch.from_numpy(B).requires_grad_()
        subspace_distance(A, B, metric).backward()
        assert A.grad.isfinite().all()
        assert B.grad.isfinite().all()
        assert max(A.grad.abs().max(), B.grad.abs().max()) < 3


def test_chordal_gradient_vanishes_at_equal_subspaces():
    A = torch.eye(5, 2, dtype=torch.float64).requires_grad_()
    subspace_distance(A, torch.eye(5, 2, dtype=torch.float64), "chordal").backward()
    torch.testing.assert_close(A.grad, torch.zeros(5, 2, dtype=torch.float64))


def test_leading_dimensions_broadcast():
    A, B = basis(4, 1, 6, 2), basis(3, 6, 2, seed=1)
    D = subspace_distance(A, B)
    np.testing.assert_allclose(D[2, 1], subspace_distance(A[2, 0], B[1]))
    assert D.shape == (4, 3)


def test_errors_name_what_came():
    with pytest.raises(ValueError, match=r"one d, k > 0, got \(5, 2\) and \(6, 2\)"):
        principal_angles(basis(5, 2), basis(6, 2))
    with pytest.raises(ValueError, match="as many columns, got 2 and 3"):
        subspace_distance(basis(5, 2), basis(5, 3))
    with pytest.raises(ValueError, match=r"metric must be one of .*got 'hamming'"):
        subspace_distance(basis(5, 2), basis(5, 2), "hamming")
    with pytest.raises(ValueError, match="B has more columns than rows"):
        principal_angles(basis(2, 2), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"shape \(C, d, k\)"):
        pairwise_subspace_distance(basis(5, 2))
    with pytest.raises(TypeError, match="arrays of one kind"):
        principal_angles(basis(5, 2), torch.zeros(5, 2))
