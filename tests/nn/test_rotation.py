import inspect
import itertools
import math
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import roma
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import logm
from scipy.spatial.transform import Rotation
from scipy.stats import kstest
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import polyspan.nn as pn
from polyspan.linalg import nearest_rotation, orthonormal_basis
from polyspan.nn import (
    RotationHead,
    _rotation_torch,
    chordal_distance,
    chordal_loss,
    continuity_breaks,
    geodesic_distance,
    geodesic_loss,
    matrix_to_axis_angle,
    matrix_to_euler,
    matrix_to_quaternion,
    matrix_to_rotation5d,
    matrix_to_rotation6d,
    matrix_to_rotation9d,
    matrix_to_rotationnd,
    quaternion_to_euler,
    quaternion_to_matrix,
    random_rotation,
    rotation5d_to_matrix,
    rotation6d_to_matrix,
    rotation9d_to_matrix,
    rotation_errors,
    rotationnd_to_matrix,
)
from polyspan.nn.rotation_plots import plot_error_along_path
from polyspan.testing import ModuleCase, check_module

FORMS = ("quaternion", "axis_angle", "euler", "rotation5d", "rotation6d", "rotation9d")
OPTIONS = {"quaternion": {"order": "wxyz"}, "euler": {"sequence": "ZYX"}}
SIZES = {"quaternion": 4, "axis_angle": 3, "euler": 3, "rotation5d": 5, "rotation6d": 6, "rotation9d": 9}
SEQUENCES = ["".join(s) for s in itertools.product("XYZ", repeat=3) if s[0] != s[1] != s[2]]
EYE = np.eye(3)


def to_matrix(form, x, **options):
    return getattr(pn, f"{form}_to_matrix")(x, **OPTIONS.get(form, {}), **options)


def from_matrix(form, R, **options):
    return getattr(pn, f"matrix_to_{form}")(R, **OPTIONS.get(form, {}), **options)


def rotations(n=200, seed=0):
    return random_rotation(rng=np.random.default_rng(seed), batch=(n,))


def assert_rotations(R, tol=1e-12):
    R = np.asarray(R, dtype=np.float64)
    np.testing.assert_allclose(np.swapaxes(R, -1, -2) @ R, np.broadcast_to(np.eye(R.shape[-1]), R.shape), atol=tol)
    np.testing.assert_allclose(np.linalg.det(R), 1, atol=10 * tol)


def half_turns():
    axes = np.concatenate([EYE, rotations(20)[:, 0]])
    return 2 * axes[:, :, None] * axes[:, None, :] - EYE


# The contract


HEADS = [{"representation": r} for r in ("6d", "5d", "9d", "quaternion", "axis-angle", "euler")]
HEADS += [{"n": 4}, {"n": 2}, {"representation": "9d", "n": 4}, {"convention": "rows"}, {"bias_init": "uniform"}]


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_module_contract(options):
    def make(**factory):
        generator = None if factory["device"] == "meta" else torch.Generator().manual_seed(0)
        return RotationHead(5, generator=generator, **options, **factory)

    check_module(ModuleCase(make=make, inputs=lambda batch, g: (torch.randn(batch, 5, generator=g),)))


@pytest.mark.parametrize("source", [*FORMS, "matrix"])
@pytest.mark.parametrize("target", [*FORMS, "matrix"])
def test_every_form_becomes_every_other_and_torch_agrees_with_numpy(source, target):
    if source == target:
        return
    convert = getattr(pn, f"{source}_to_{target}")
    options = OPTIONS.get(source, {}) | OPTIONS.get(target, {})
    R = rotations(30).reshape(5, 6, 3, 3)
    x = R if source == "matrix" else from_matrix(source, R)
    made = convert(x, **options)
    back = made if target == "matrix" else to_matrix(target, made)
    np.testing.assert_allclose(back, R, atol=1e-12)
    np.testing.assert_allclose(convert(torch.tensor(x), **options).numpy(), made, atol=1e-12)
    np.testing.assert_allclose(convert(x[1, 2], **options), made[1, 2], atol=1e-14)
    narrow = convert(x.astype(np.float32), **options)
    assert narrow.dtype == np.float32
    assert convert(torch.tensor(x).bfloat16(), **options).dtype == torch.bfloat16
    assert convert(x[:0], **options).shape == (0, *made.shape[1:])
    np.testing.assert_allclose(narrow, made, atol=2e-5)
    assert convert.__doc__
    assert convert.__name__ == f"{source}_to_{target}"
    assert {"check", *options} <= set(inspect.signature(convert).parameters)


@pytest.mark.parametrize("form", FORMS)
def test_an_accelerator_is_followed_and_half_precision_is_computed_in_single(form):
    x = torch.randn(8, SIZES[form], generator=torch.Generator().manual_seed(0)).half()
    made = to_matrix(form, x)
    assert made.dtype == torch.float16
    assert torch.equal(made, to_matrix(form, x.float()).half())
    assert to_matrix(form, x.float().to("meta"), check=False).device.type == "meta"


# Laws


@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-300, 1e-160, 1e-3, 1.0, 1e3, 1e160, 1e300]))
@settings(max_examples=25, deadline=None)
def test_any_finite_numbers_give_a_rotation(seed, scale):
    rng = np.random.default_rng(seed)
    for form in ("quaternion", "rotation5d", "rotation6d", "rotation9d"):
        assert_rotations(to_matrix(form, scale * rng.normal(size=(5, SIZES[form]))))
    assert_rotations(rotationnd_to_matrix(scale * rng.normal(size=(5, 20))))


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 7))
@settings(max_examples=20, deadline=None)
def test_numbers_of_a_rotation_in_n_dimensions_give_it_back(seed, n):
    R = random_rotation(n, rng=np.random.default_rng(seed), batch=(4,))
    assert_rotations(R)
    np.testing.assert_allclose(rotationnd_to_matrix(matrix_to_rotationnd(R)), R, atol=1e-12)


def test_the_6d_map_is_the_n_d_map_and_its_conventions_differ_by_order_only():
    x = np.random.default_rng(0).normal(size=(50, 6))
    R = rotation6d_to_matrix(x)
    np.testing.assert_allclose(rotationnd_to_matrix(x), R, atol=1e-12)
    np.testing.assert_allclose(rotation6d_to_matrix(x, convention="rows"), R.swapaxes(-1, -2), atol=1e-15)
    woven = x.reshape(-1, 2, 3).swapaxes(-1, -2).reshape(-1, 6)
    np.testing.assert_allclose(rotation6d_to_matrix(woven, convention="interleaved"), R, atol=1e-15)
    for convention in ("columns", "rows", "interleaved"):
        numbers = matrix_to_rotation6d(R, convention=convention)
        np.testing.assert_allclose(rotation6d_to_matrix(numbers, convention=convention), R, atol=1e-12)
    np.testing.assert_array_equal(matrix_to_rotation6d(R), np.concatenate([R[..., 0], R[..., 1]], axis=-1))
    np.testing.assert_array_equal(matrix_to_rotation6d(R, convention="rows"), R[:, :2].reshape(-1, 6))
    np.testing.assert_array_equal(matrix_to_rotation6d(R, convention="interleaved"), R[..., :2].reshape(-1, 6))


def test_five_numbers_lie_in_the_unit_cube_and_fill_it():
    numbers = matrix_to_rotation5d(rotations(100_000))
    assert np.abs(numbers).max() <= 1 + 1e-12
    assert (np.abs(numbers).max(axis=0) > 0.95).all()


def test_continuous_forms_move_little_where_the_rotation_does_and_others_jump():
    rng = np.random.default_rng(0)
    R = np.concatenate([random_rotation(rng=rng, batch=(2000,)), half_turns()])
    near = R @ random_rotation(rng=rng, batch=(len(R),), max_angle=1e-4)
    moved = {f: np.linalg.norm(from_matrix(f, R) - from_matrix(f, near), axis=-1).max() for f in FORMS}
    assert max(moved[f] for f in ("rotation5d", "rotation6d", "rotation9d")) < 5e-4
    assert min(moved[f] for f in ("quaternion", "axis_angle", "euler")) > 1.0


def test_distance_is_a_metric_that_turns_leave_alone():
    rng = np.random.default_rng(0)
    for n in (2, 3, 5):
        A, B, C = (random_rotation(n, rng=rng, batch=(30,)) for _ in range(3))
        d = geodesic_distance(A, B)
        np.testing.assert_allclose(geodesic_distance(B, A), d, atol=1e-12)
        np.testing.assert_allclose(geodesic_distance(C @ A, C @ B), d, atol=1e-12)
        np.testing.assert_allclose(geodesic_distance(A @ C, B @ C), d, atol=1e-12)
        assert (d <= geodesic_distance(A, C) + geodesic_distance(C, B) + 1e-12).all()
        np.testing.assert_allclose(geodesic_distance(A, A), 0, atol=1e-7)


def test_chordal_distance_is_a_sine_of_half_the_angle():
    A, B = rotations(50), rotations(50, seed=1)
    half = geodesic_distance(A, B) / 2
    np.testing.assert_allclose(chordal_distance(A, B), 2 * math.sqrt(2) * np.sin(half), atol=1e-12)
    np.testing.assert_allclose(chordal_loss(A, B, reduction="none"), 8 * np.sin(half) ** 2, atol=1e-12)
    np.testing.assert_allclose(geodesic_loss(A, B, squared=True), np.mean(4 * half**2), atol=1e-12)
    np.testing.assert_allclose(geodesic_loss(A, B, reduction="sum"), np.sum(2 * half), atol=1e-12)


@pytest.mark.parametrize("most", [None, 1.0, math.pi])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_random_rotations_are_uniform(most, kind):
    rng = np.random.default_rng(3) if kind == "numpy" else torch.Generator().manual_seed(3)
    R = np.asarray(random_rotation(rng=rng, batch=(4000,), max_angle=most)).astype(np.float64)
    assert_rotations(R, tol=1e-12 if kind == "numpy" else 1e-6)
    end = most or math.pi
    angles = geodesic_distance(R, EYE)
    assert angles.max() <= end + 1e-6
    assert kstest(angles, lambda t: (t - np.sin(t)) / (end - math.sin(end))).pvalue > 1e-3
    axes = matrix_to_axis_angle(R) / angles[:, None]
    assert kstest(axes[:, 2], lambda z: (z + 1) / 2).pvalue > 1e-3


# Oracles


def test_agrees_with_scipy():
    R = rotations()
    theirs = Rotation.from_matrix(R)
    np.testing.assert_allclose(matrix_to_quaternion(R, order="xyzw"), theirs.as_quat(canonical=True), atol=1e-12)
    np.testing.assert_allclose(matrix_to_quaternion(R, order="wxyz")[:, 1:], theirs.as_quat(canonical=True)[:, :3])
    np.testing.assert_allclose(matrix_to_axis_angle(R), theirs.as_rotvec(), atol=1e-12)
    np.testing.assert_allclose(geodesic_distance(R, EYE), theirs.magnitude(), atol=1e-12)
    rng = np.random.default_rng(1)
    q, v = rng.normal(size=(200, 4)), 5 * rng.normal(size=(200, 3))
    np.testing.assert_allclose(quaternion_to_matrix(q, order="xyzw"), Rotation.from_quat(q).as_matrix(), atol=1e-12)
    turned = pn.axis_angle_to_matrix(v, check=False)
    np.testing.assert_allclose(turned, Rotation.from_rotvec(v).as_matrix(), atol=1e-12)


@pytest.mark.parametrize("sequence", SEQUENCES + [s.lower() for s in SEQUENCES])
def test_euler_angles_agree_with_scipy(sequence):
    R = rotations(60)
    mine = matrix_to_euler(R, sequence=sequence, degrees=True)
    theirs = Rotation.from_matrix(R).as_euler(sequence, degrees=True)
    np.testing.assert_allclose(mine, theirs, atol=1e-9)
    angles = 3 * np.random.default_rng(0).normal(size=(60, 3))
    np.testing.assert_allclose(
        pn.euler_to_matrix(angles, sequence=sequence), Rotation.from_euler(sequence, angles).as_matrix(), atol=1e-12
    )
    middle = 0.0 if sequence[0] == sequence[2] else math.pi / 2
    locked = pn.euler_to_matrix(np.array([0.4, middle, -1.1]), sequence=sequence)
    with pytest.warns(UserWarning, match="gimbal lock"):
        found = matrix_to_euler(locked, sequence=sequence)
    assert found[2] == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(pn.euler_to_matrix(found, sequence=sequence), locked, atol=1e-12)


def test_angles_give_the_rotation_back_however_near_to_gimbal_lock():
    for gap in (1e-3, 1e-6, 1e-9, 1e-12, 1e-15):
        for sequence, middle in (("XYZ", math.pi / 2 - gap), ("zxz", gap)):
            R = pn.euler_to_matrix(np.array([2.0, middle, -1.0]), sequence=sequence)
            found = matrix_to_euler(R, sequence=sequence, check=False)
            np.testing.assert_allclose(pn.euler_to_matrix(found, sequence=sequence), R, atol=2e-14)


def test_agrees_with_roma():
    x = torch.randn(100, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = rotation6d_to_matrix(x.flatten(1), convention="interleaved")
    torch.testing.assert_close(mine, roma.special_gramschmidt(x), atol=1e-12, rtol=0)
    M = torch.randn(100, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(rotation9d_to_matrix(M.flatten(1)), roma.special_procrustes(M), atol=1e-10, rtol=0)
    A, B = mine, torch.tensor(rotations(100))
    torch.testing.assert_close(geodesic_distance(A, B), roma.rotmat_geodesic_distance(A, B), atol=1e-6, rtol=0)


def literal_5d(a):
    """The published map, step by step, for one five-vector."""
    b = a[2:] * np.array([math.sqrt(2) + 1, math.sqrt(2) + 1, math.sqrt(2)])
    s2 = b @ b
    u = np.array([(s2 - 1) / (s2 + 1), *(2 * b / (s2 + 1))])
    u = u / np.linalg.norm(u[1:])
    first, second = np.array([a[0], a[1], u[0]]), u[1:]
    x = first / np.linalg.norm(first)
    z = np.cross(x, second) / np.linalg.norm(np.cross(x, second))
    return np.stack([x, np.cross(z, x), z], axis=-1)


def test_agrees_with_the_published_maps_step_by_step():
    a = np.random.default_rng(0).normal(size=(50, 5))
    np.testing.assert_allclose(rotation5d_to_matrix(a), np.stack([literal_5d(row) for row in a]), atol=1e-12)
    angles = np.random.default_rng(1).normal(size=3)
    (s1, s2, s3), (c1, c2, c3) = np.sin(angles[[0, 2, 1]]), np.cos(angles[[0, 2, 1]])
    literal = [
        [c2 * c3, -s2, c2 * s3],
        [c1 * s2 * c3 + s1 * s3, c1 * c2, c1 * s2 * s3 - s1 * c3],
        [s1 * s2 * c3 - c1 * s3, s1 * c2, s1 * s2 * s3 + c1 * c3],
    ]
    np.testing.assert_allclose(pn.euler_to_matrix(angles[[0, 2, 1]], sequence="XZY"), literal, atol=1e-14)


def test_n_d_and_9d_agree_with_the_ground_floor():
    x = np.random.default_rng(0).normal(size=(20, 20))
    Q = orthonormal_basis(x.reshape(20, 4, 5).swapaxes(1, 2))
    np.testing.assert_allclose(rotationnd_to_matrix(x)[..., :4], Q, atol=1e-12)
    M = np.random.default_rng(1).normal(size=(20, 3, 3))
    np.testing.assert_allclose(rotation9d_to_matrix(M.reshape(20, 9)), nearest_rotation(M), atol=1e-12)


def test_distance_in_n_dimensions_is_the_norm_of_the_logarithm():
    rng = np.random.default_rng(0)
    A, B = (random_rotation(5, rng=rng, batch=(10,)) for _ in range(2))
    theirs = [np.linalg.norm(logm(a.T @ b)) / math.sqrt(2) for a, b in zip(A, B, strict=True)]
    np.testing.assert_allclose(geodesic_distance(A, B), theirs, atol=1e-10)


# Degenerate points


@pytest.mark.parametrize("angle", [1e-12, 1e-8, 1e-5, 1e-3, 1e-3 + 1e-9, 0.01, 1.0, math.pi - 1e-6, math.pi])
def test_angles_are_accurate_from_nothing_to_half_a_turn(angle):
    v = np.array([0.6, 0.0, -0.8]) * angle
    R = pn.axis_angle_to_matrix(v)
    np.testing.assert_allclose(geodesic_distance(R, EYE), angle, rtol=1e-9, atol=1e-15)
    found = matrix_to_axis_angle(R)
    np.testing.assert_allclose(
        found if angle < math.pi else np.abs(found), v if angle < math.pi else np.abs(v), rtol=1e-9
    )
    single = geodesic_distance(R.astype(np.float32), EYE.astype(np.float32))
    assert abs(single - angle) < 1e-6
    big = np.diag([1.0, 1.0, 1.0, 1.0, 1.0])
    big[1:4, 1:4] = R
    np.testing.assert_allclose(geodesic_distance(big, np.eye(5)), angle, rtol=1e-9, atol=1e-14)


def generic(form):
    g = torch.Generator().manual_seed(5)
    return torch.randn(3, SIZES[form], generator=g, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_are_true_at_generic_points_and_so_are_second_ones(form):
    assert torch.autograd.gradcheck(lambda x: to_matrix(form, x), (generic(form),))
    assert torch.autograd.gradgradcheck(lambda x: to_matrix(form, x)[:1], (generic(form),))

    def there_and_back(x):
        return from_matrix(form, to_matrix(form, x, check=False), check=False)

    assert torch.autograd.gradcheck(there_and_back, (generic(form),))


def test_derivatives_of_n_dimensions_are_true_at_the_identity_too():
    for start in (torch.randn(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64), None):
        x = torch.eye(4, dtype=torch.float64)[:, :3].T.flatten() if start is None else start
        assert torch.autograd.gradcheck(rotationnd_to_matrix, (x.clone().requires_grad_(),))


@pytest.mark.parametrize("form", ["axis_angle", "quaternion", "rotation5d", "rotation6d", "rotation9d", "euler"])
def test_derivatives_are_true_at_the_numbers_of_the_identity(form):
    x = torch.tensor(from_matrix(form, EYE)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: to_matrix(form, x), (x,))


def tangent(R, w):
    """R turned by the rotation vector w, so that matrices off the rotations are never asked for."""
    return R @ pn.axis_angle_to_matrix(w, check=False)


@pytest.mark.parametrize("at", ["identity", "half turn", "small"])
def test_derivatives_of_the_way_back_are_true_along_rotations(at):
    R = {
        "identity": EYE,
        "half turn": half_turns()[5],
        "small": pn.axis_angle_to_matrix(np.array([3e-4, -9.53e-4, 0.0])),
    }[at]
    R = torch.tensor(R)
    w = torch.full((3,), 1e-3 if at == "half turn" else 0.0, dtype=torch.float64).requires_grad_()
    for form in ("axis_angle", "quaternion", "rotation5d", "rotation6d", "euler"):
        assert torch.autograd.gradcheck(lambda w, f=form: from_matrix(f, tangent(R, w), check=False), (w,)), form


LOST = {
    "quaternion": [[0.0] * 4],
    "axis_angle": [[0.0] * 3],
    "rotation5d": [[0.0] * 5, [0.3, 0.2, 0, 0, 0], [0, 0, 1 / (math.sqrt(2) + 1), 0, 0]],
    "rotation6d": [[0.0] * 6, [1, 2, 3, 2, 4, 6], [1, 2, 3, -1, -2, -3], [0, 0, 0, 1, 2, 3], [1, 2, 3, 0, 0, 0]],
    "rotation9d": [
        [0.0] * 9,
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [-1, 0, 0, 0, -1, 0, 0, 0, -1],
        [2, 0, 0, 0, 1, 0, 0, 0, -1],
    ],
    "rotationnd": [[0.0] * 12, [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], [*range(1, 5)] * 3],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", LOST)
def test_degenerate_numbers_give_rotations_with_a_finite_gradient_and_are_counted(form, dtype):
    g = torch.Generator().manual_seed(0)
    good = torch.randn(2, len(LOST[form][0]), generator=g, dtype=dtype)
    x = torch.cat([good, torch.tensor(LOST[form], dtype=dtype)]).requires_grad_()
    R = to_matrix(form, x, check=False)
    assert_rotations(R.detach(), tol=1e-5 if dtype == torch.float32 else 1e-12)
    grad = torch.autograd.grad((R * torch.arange(R.numel(), dtype=dtype).reshape(R.shape)).sum(), x)[0]
    assert torch.isfinite(grad).all()
    assert (grad[:2] != 0).any()
    if form == "axis_angle":
        to_matrix(form, x)
        return
    rows = list(range(2, x.shape[0]))[:5]
    with pytest.warns(UserWarning, match=rf"^{len(LOST[form])} .*; rows \[{str(rows)[1:-1]}\]"):
        checked = to_matrix(form, x)
    torch.testing.assert_close(checked, R, atol=1e-6, rtol=0)
    assert torch.isfinite(torch.autograd.grad(checked.sum(), x)[0]).all()


def test_six_numbers_without_a_direction_are_completed_as_documented():
    with pytest.warns(UserWarning, match="2 six-vectors"):
        R = rotation6d_to_matrix(np.array([[0.0] * 6, [0, 0, 2, 0, 0, -7]]))
    np.testing.assert_array_equal(R[0], EYE)
    np.testing.assert_array_equal(R[1], [[0, 1, 0], [0, 0, 1], [1, 0, 0]])


def test_closed_form_of_the_nearest_rotation_is_as_exact_as_the_svd():
    rng = np.random.default_rng(0)
    U, V = random_rotation(rng=rng, batch=(300,)), random_rotation(rng=rng, batch=(300,))
    for signed in ((3, 2, 1), (1, 1, 1), (1, 1e-3, 1e-4), (1, 1e-5, 0), (1, 1, -0.999), (2, 1, -0.5), (1, 0.5, 0)):
        M = (U * np.array(signed) @ V).astype(np.float32)
        closed = rotation9d_to_matrix(M.reshape(-1, 9))
        exact = nearest_rotation(M.astype(np.float64))
        gap = (signed[1] + signed[2]) / signed[0]
        np.testing.assert_allclose(closed, exact, atol=1e-6 / gap)
        torch.testing.assert_close(
            rotation9d_to_matrix(torch.tensor(M).flatten(1)).numpy(), closed, atol=1e-6 / gap, rtol=0
        )
        assert_rotations(closed, tol=2e-6)


def test_nearly_parallel_vectors_still_give_rotations():
    rng = np.random.default_rng(0)
    a, c = rng.normal(size=(2, 50, 3))
    for gap in (1e-3, 1e-6, 1e-9, 1e-12, 1e-14):
        assert_rotations(rotation6d_to_matrix(np.concatenate([a, -2 * a + gap * c], axis=-1), check=False))
        single = np.concatenate([a, a + gap * c], axis=-1).astype(np.float32)
        assert_rotations(rotation6d_to_matrix(single, check=False), tol=2e-6)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_losses_have_finite_gradients_at_equality_and_at_half_turns(n):
    R = torch.tensor(random_rotation(n, rng=np.random.default_rng(0), batch=(4,)))
    flip = torch.diag(torch.tensor([-1.0, -1.0, *[1.0] * (n - 2)], dtype=torch.float64))
    for S in (R, R @ flip, R.roll(1, 0)):
        P = R.clone().requires_grad_()
        for loss in (geodesic_loss, lambda a, b: geodesic_loss(a, b, squared=True), chordal_loss):
            assert torch.isfinite(torch.autograd.grad(loss(P, S), P)[0]).all()
        assert torch.isfinite(torch.autograd.grad(chordal_distance(P, S).sum(), P)[0]).all()
    assert torch.autograd.gradcheck(geodesic_distance, (R.clone().requires_grad_(), R.roll(1, 0)))
    w = torch.tensor([[0.3, 0.1, -0.2]], dtype=torch.float64, requires_grad=True)
    length = torch.autograd.grad(geodesic_distance(pn.axis_angle_to_matrix(w), torch.eye(3).double()).sum(), w)[
        0
    ].norm()
    assert length.item() == pytest.approx(1)


@pytest.mark.parametrize("form", FORMS)
def test_batches_made_by_vmap_are_batches(form):
    x = torch.randn(4, SIZES[form], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = to_matrix(form, x)
    found = torch.vmap(lambda row: to_matrix(form, row, check=False))(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.vmap(lambda R: from_matrix(form, R, check=False))(expected), from_matrix(form, expected)
    )
    rows = torch.vmap(torch.func.jacrev(lambda row: to_matrix(form, row, check=False)))(x)
    whole = torch.autograd.functional.jacobian(lambda x: to_matrix(form, x).sum(0), x)
    torch.testing.assert_close(rows, whole.movedim(2, 0))


def test_batches_of_n_dimensions_made_by_vmap_are_batches():
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.vmap(lambda row: rotationnd_to_matrix(row, check=False))(x)
    torch.testing.assert_close(found, rotationnd_to_matrix(x))


@pytest.mark.parametrize("form", ["rotation6d", "rotation9d", "quaternion"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_of_many_blocks_are_what_they_are_alone(form, dtype):
    x = np.random.default_rng(0).normal(size=(20_000, SIZES[form])).astype(dtype)
    R = to_matrix(form, x)
    for rows in (slice(0, 50), slice(4090, 4100), slice(8185, 8200), slice(19_950, 20_000)):
        np.testing.assert_allclose(to_matrix(form, x[rows]), R[rows], atol=8 * np.finfo(dtype).eps)
        np.testing.assert_allclose(from_matrix(form, R[rows]), from_matrix(form, R)[rows], atol=8 * np.finfo(dtype).eps)
    np.testing.assert_allclose(to_matrix(form, torch.tensor(x)).numpy(), R, atol=8 * np.finfo(dtype).eps)
    bad = R.copy()
    bad[[9000, 19_999]] *= 1.01
    with pytest.raises(ValueError, match=r"in 2 rows: \[9000, 19999\]"):
        from_matrix(form, bad)
    x[[8191, 8192], 1] = np.nan
    with pytest.raises(ValueError, match=r"must be finite.* in 2 rows: \[8191, 8192\]"):
        to_matrix(form, x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distance_is_accurate_over_all_angles(dtype):
    rng = np.random.default_rng(0)
    angles = np.concatenate([10.0 ** rng.uniform(-5, 0, 5000), math.pi - 10.0 ** rng.uniform(-8, 0, 5000)])
    axes = rng.normal(size=(10_000, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    R = random_rotation(rng=rng, batch=(10_000,)).astype(dtype)
    S = (R.astype(np.float64) @ pn.axis_angle_to_matrix(angles[:, None] * axes)).astype(dtype)
    unit = np.finfo(dtype).eps
    for found in (geodesic_distance(R, S), geodesic_distance(torch.tensor(R), torch.tensor(S)).numpy()):
        assert found.dtype == dtype
        error = np.abs(found - angles) / unit
        assert error[angles < 2].max() < 8
        # The chord magnifies the 8 units by the tangent of half the angle, up to 32 times.
        assert error.max() < 8 * 32
        assert error[angles > 3.1].max() < 64
        assert found.max() <= math.pi + unit


def test_distances_with_and_without_derivatives_agree():
    R, S = torch.tensor(rotations(40)), torch.tensor(rotations(40, seed=1))
    S[:5], S[5:10] = R[:5], R[5:10] @ torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    expected = geodesic_distance(R, S)
    close = partial(torch.testing.assert_close, atol=1e-13, rtol=0)
    found = geodesic_distance(R.clone().requires_grad_(), S)
    assert found.requires_grad
    close(found.detach(), expected)
    with torch.no_grad():
        close(geodesic_distance(R.clone().requires_grad_(), S), expected)
    for dims, arrays in (((0, 0), (R, S)), ((0, None), (R, S[0])), ((None, 0), (R[0], S))):
        mapped = torch.vmap(geodesic_distance, in_dims=dims)(*arrays)
        close(mapped, geodesic_distance(*arrays))
    turn = torch.randn(40, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, slope, *_ = torch.func.jvp(lambda P: geodesic_distance(P, S), (R,), (turn,))
    grad = torch.func.grad(lambda P: geodesic_distance(P, S).sum())(R)
    close(value, expected)
    torch.testing.assert_close(slope[10:], (grad * turn).sum((-2, -1))[10:])
    assert torch.isfinite(slope).all()


def test_captured_graphs_hold_no_values_of_the_tensors_they_were_captured_with():
    x, other = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def function(y):
        R = rotation6d_to_matrix(y)
        return geodesic_distance(R, rotation6d_to_matrix(y.flip(0))), matrix_to_quaternion(R, order="wxyz")

    torch.testing.assert_close(make_fx(function)(x)(other), function(other))


def test_means_of_chordal_losses_are_means_of_the_losses():
    R, S = rotations(30).reshape(5, 6, 3, 3), rotations(6, seed=1)
    rows = chordal_loss(R, S, reduction="none")
    assert rows.shape == (5, 6)
    assert chordal_loss(R, S) == pytest.approx(rows.mean(), rel=1e-12)
    assert chordal_loss(R, S, reduction="sum") == pytest.approx(rows.sum(), rel=1e-12)
    assert chordal_loss(R.astype(np.float16), S.astype(np.float16)).dtype == np.float16
    half = torch.tensor(R).bfloat16().requires_grad_()
    loss = chordal_loss(half, torch.tensor(S).bfloat16())
    assert loss.dtype == torch.bfloat16
    assert torch.isfinite(torch.autograd.grad(loss, half)[0]).all()


# The head


def test_an_untrained_head_turns_zero_into_the_identity():
    for representation in ("6d", "5d", "9d", "quaternion", "axis-angle", "euler"):
        head = RotationHead(4, representation, dtype=torch.float64)
        torch.testing.assert_close(head(torch.zeros(2, 4, dtype=torch.float64)), torch.eye(3).double().expand(2, 3, 3))
    torch.testing.assert_close(RotationHead(4, n=5)(torch.zeros(4)), torch.eye(5))
    drawn = [RotationHead(4, bias_init="uniform", generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0].bias, drawn[1].bias)
    assert not torch.equal(drawn[0].bias, drawn[2].bias)


def test_a_head_learns_rotations_in_three_and_in_four_dimensions():
    for n, representation in ((3, "6d"), (3, "9d"), (3, "5d"), (4, "6d")):
        g = torch.Generator().manual_seed(0)
        R = random_rotation(n, rng=g, batch=(100,))
        head = RotationHead(n * n, representation, n=n, generator=g)
        hidden = torch.nn.Sequential(torch.nn.Linear(n * n, n * n), head)
        with torch.no_grad():
            hidden[0].weight.copy_(torch.eye(n * n))
            hidden[0].bias.zero_()
        optimiser = torch.optim.Adam(hidden.parameters(), lr=0.02)
        before = geodesic_distance(hidden(R.flatten(1)), R).mean().item()
        for _ in range(100):
            optimiser.zero_grad()
            chordal_loss(hidden(R.flatten(1)), R).backward()
            optimiser.step()
        after = geodesic_distance(hidden(R.flatten(1)), R).mean().item()
        assert after < before / 4, (n, representation)


def test_numbers_of_a_head_are_what_it_turns_into_rotations():
    head = RotationHead(4, "5d", generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rotation5d_to_matrix(head.numbers(x)), head(x))
    assert "representation='5d'" in repr(head)


# Reports


def test_errors_of_known_turns_are_summed_up():
    degrees = np.array([0.0, 10.0, 20.0, 50.0, 180.0])
    R = rotations(5)
    predicted = R @ pn.axis_angle_to_matrix(np.deg2rad(degrees)[:, None] * np.array([0.0, 0.6, 0.8]))
    found = rotation_errors(torch.tensor(predicted), torch.tensor(R))
    assert found.mean == pytest.approx(52)
    assert found.median == pytest.approx(20)
    assert found.max == pytest.approx(180)
    assert (found.share_above_30, found.share_above_90) == (0.4, 0.2)
    with pytest.raises(ValueError, match="at least one rotation"):
        rotation_errors(R[:0], R[:0])


def test_a_full_turn_breaks_discontinuous_numbers_where_they_must_and_continuous_ones_nowhere():
    angles = np.linspace(0.01, 2 * math.pi - 0.01, 101)
    path = rotations(1)[0] @ pn.axis_angle_to_matrix(angles[:, None] * np.array([0.0, 0.6, 0.8]), check=False)
    assert continuity_breaks(path, "rotation6d") == continuity_breaks(path, "rotation9d") == []
    assert continuity_breaks(path, "rotation5d") == []
    centred = np.swapaxes(path[:1], 1, 2) @ path
    assert continuity_breaks(centred, "axis_angle") == [50]
    assert continuity_breaks(torch.tensor(centred), "quaternion", order="xyzw") == [50]
    assert continuity_breaks(np.repeat(path[:1], 5, axis=0), "rotation6d") == []
    assert continuity_breaks(path[:1], "rotation6d") == []


def test_the_picture_of_errors_along_a_path_is_written_alike_each_time(tmp_path):
    path = pn.axis_angle_to_matrix(np.linspace(0, 3, 30)[:, None] * np.array([0.0, 0.6, 0.8]))
    noisy = path @ random_rotation(rng=np.random.default_rng(0), batch=(30,), max_angle=0.1)
    written = [
        plot_error_along_path(path, {"6d": noisy, "exact": path}, tmp_path / f"{name}.svg").read_bytes()
        for name in "ab"
    ]
    assert written[0] == written[1]
    assert b"exact" in written[0] or len(written[0]) > 5000
    with pytest.raises(ValueError, match=r"predicted\['6d'\] must have the shape of target"):
        plot_error_along_path(path, {"6d": noisy[:-1]}, tmp_path / "c.svg")


# Bad input


def test_wrong_shapes_and_kinds_are_named():
    with pytest.raises(ValueError, match=r"x must be \(\*b, 6\), got shape \(2, 5\)"):
        rotation6d_to_matrix(np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"q must be \(\*b, 4\), got shape \(\)"):
        quaternion_to_matrix(np.array(1.0), order="wxyz")
    with pytest.raises(ValueError, match=r"R must be \(\*b, 3, 3\), got shape \(4, 4\)"):
        matrix_to_axis_angle(np.eye(4))
    with pytest.raises(ValueError, match=r"R must be \(\*b, n, n\) with n >= 2, got shape \(3, 2\)"):
        matrix_to_rotationnd(np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"2, 6, 12, 20 ... numbers, got shape \(7,\)"):
        rotationnd_to_matrix(np.ones(7))
    with pytest.raises(TypeError, match="expected arrays of one kind"):
        rotation6d_to_matrix([1, 0, 0, 0, 1, 0])
    with pytest.raises(TypeError, match="x must be real, got complex128"):
        rotation6d_to_matrix(np.ones(6) * 1j)
    with pytest.raises(TypeError, match="R must be real"):
        matrix_to_rotation6d(EYE * (1 + 0j))
    with pytest.raises(ValueError, match=r"two batches .* got shapes \(3, 3\) and \(2, 2\)"):
        geodesic_distance(EYE, np.eye(2))


def test_numbers_that_are_not_finite_are_refused_with_their_rows():
    x = np.ones((4, 6)) * np.arange(1, 7) ** 2
    x[1, 2], x[3, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"x must be finite, got NaN or infinity in 2 rows: \[1, 3\]"):
        rotation6d_to_matrix(x)
    R = np.stack([EYE] * 8)
    R[:7, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"R must be finite.* in 7 rows: \[0, 1, 2, 3, 4\] \.\.\."):
        matrix_to_quaternion(R, order="wxyz")


def test_matrices_that_are_no_rotations_are_refused_or_projected():
    R = rotations(3)
    bad = R.copy()
    bad[1] *= 1.01
    bad[2] = -bad[2]
    for form in FORMS:
        with pytest.raises(ValueError, match=r"R must hold rotations \(project=True .* in 2 rows: \[1, 2\]"):
            from_matrix(form, bad)
        found = to_matrix(form, from_matrix(form, bad[:2], project=True))
        np.testing.assert_allclose(found, R[:2], atol=1e-12)
    np.testing.assert_allclose(matrix_to_rotation6d(R + 1e-5), matrix_to_rotation6d(R), atol=2e-5)


def test_order_sequence_and_convention_are_explicit_and_checked():
    with pytest.raises(TypeError, match="order"):
        quaternion_to_matrix(np.ones(4))
    with pytest.raises(TypeError, match="sequence"):
        pn.euler_to_matrix(np.ones(3))
    with pytest.raises(TypeError, match="order"):
        quaternion_to_euler(np.ones(4), sequence="XYZ")
    with pytest.raises(TypeError, match=r"quaternion_to_euler takes the options .* got \['sequense'\]"):
        quaternion_to_euler(np.ones(4), order="wxyz", sequense="XYZ")
    for sequence in ("XXY", "XYz", "XY", "ABC", "XYZX"):
        with pytest.raises(ValueError, match="sequence must be three of the letters"):
            pn.euler_to_matrix(np.ones(3), sequence=sequence)


def test_degrees_taken_for_radians_are_warned_about():
    with pytest.warns(UserWarning, match="1 rotation vectors are longer than 4 pi"):
        pn.axis_angle_to_matrix(np.array([[0.0, 90.0, 0.0], [1, 0, 0]]))
    with pytest.warns(UserWarning, match="radians are expected, or degrees=True"):
        pn.euler_to_matrix(np.array([0.0, 90.0, 45.0]), sequence="XYZ")
    pn.euler_to_matrix(np.array([0.0, 90.0, 45.0]), sequence="XYZ", degrees=True)


def test_integers_are_computed_in_double():
    R = rotation6d_to_matrix(np.array([0, 2, 0, 0, 0, 3]))
    assert R.dtype == np.float64
    np.testing.assert_array_equal(R, [[0, 0, 1], [1, 0, 0], [0, 1, 0]])


def test_bad_options_of_heads_losses_and_generators_are_named():
    for kwargs, text in (
        ({"representation": "5d", "n": 4}, "n must be 3, or at least 2 with '6d' and '9d'"),
        ({"n": 1}, "n must be 3"),
        ({"n": 4, "convention": "rows"}, "convention must be 'columns'"),
    ):
        with pytest.raises(ValueError, match=text):
            RotationHead(4, **kwargs)
    with pytest.raises(ValueError, match="in_features must be at least 1"):
        RotationHead(0)
    with pytest.raises(ValueError, match=r"max_angle must be in \(0, pi\] and needs n=3, got 4"):
        random_rotation(rng=np.random.default_rng(0), max_angle=4.0)
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        random_rotation(1, rng=np.random.default_rng(0))
    with pytest.raises(TypeError, match=r"rng must be a numpy\.random\.Generator or a torch\.Generator"):
        random_rotation(rng=0)
    with pytest.raises(ValueError, match="representation must be one of"):
        continuity_breaks(rotations(3), "6d")
    with pytest.raises(ValueError, match=r"path must be \(n, 3, 3\)"):
        continuity_breaks(EYE, "rotation6d")


CONVERSIONS = {
    "quaternion": lambda R: matrix_to_quaternion(R, order="wxyz"),
    "axis-angle": matrix_to_axis_angle,
    "Euler": lambda R: matrix_to_euler(R, sequence="xyz"),
    "5D": matrix_to_rotation5d,
    "6D": matrix_to_rotation6d,
    "9D": matrix_to_rotation9d,
}


@pytest.mark.parametrize("name", CONVERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conversions_are_the_same_where_numpy_cannot_look(name, dtype, monkeypatch):
    R = random_rotation(rng=torch.Generator().manual_seed(0), batch=(7,)).to(dtype)
    expected = CONVERSIONS[name](R)
    slope = torch.func.grad(lambda R: CONVERSIONS[name](R).square().sum())(R)
    free = R.clone().requires_grad_()
    CONVERSIONS[name](free).square().sum().backward()
    torch.testing.assert_close(slope, free.grad)
    monkeypatch.setattr(_rotation_torch, "as_numpy", lambda *_: None)
    torch.testing.assert_close(CONVERSIONS[name](R), expected)
    with pytest.raises(ValueError, match="R must hold rotations"):
        CONVERSIONS[name](2 * R)


@pytest.mark.parametrize("name", CONVERSIONS)
@pytest.mark.parametrize("made", [torch.tensor, np.array])
def test_results_are_in_memory_of_their_own(name, made):
    R = made(random_rotation(rng=np.random.default_rng(0), batch=(4,)))
    kept = R.tolist()
    found = CONVERSIONS[name](R)
    found[...] = 0
    assert R.tolist() == kept


@pytest.mark.parametrize(
    ("width", "turned"), [(5, rotation5d_to_matrix), (6, rotation6d_to_matrix), (9, rotation9d_to_matrix)]
)
def test_results_with_a_gradient_may_be_written_to(width, turned):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0), requires_grad=True)
    R = turned(x)
    expected = torch.autograd.grad(turned(x)[[0, 1, 3, 4]].square().mul(torch.arange(9.0).view(3, 3)).sum(), x)[0]
    R[2] = torch.eye(3)
    R.square().mul(torch.arange(9.0).view(3, 3)).sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_the_nearest_rotation_of_torch_has_the_digits_of_numpy_and_any_scale():
    M = torch.randn(2000, 9, generator=torch.Generator().manual_seed(0))
    exact = rotation9d_to_matrix(M.double())
    for scale in (1e-12, 1.0, 1e12):
        found = rotation9d_to_matrix(M * scale)
        torch.testing.assert_close(found, torch.from_numpy(rotation9d_to_matrix(M.numpy() * np.float32(scale))))
    error = (rotation9d_to_matrix(M).double() - exact).abs()
    assert error.median() < 3e-8


@pytest.mark.parametrize(("width", "turned"), [(5, rotation5d_to_matrix), (6, rotation6d_to_matrix)])
def test_second_derivatives_go_through_vmap(width, turned):
    x = torch.randn(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(x):
        return (turned(x[None], check=False) * torch.arange(9.0, dtype=torch.float64).view(3, 3)).sum()

    fast, slow = (torch.autograd.functional.hessian(loss, x, vectorize=v) for v in (True, False))
    torch.testing.assert_close(fast, slow)


def test_distances_of_any_byte_order():
    R, S = (random_rotation(rng=np.random.default_rng(seed), batch=(5,)) for seed in (0, 1))
    np.testing.assert_array_equal(geodesic_distance(R.astype(">f8"), S.astype(">f8")), geodesic_distance(R, S))


def pairs_of_forms():
    """Every conversion with its options, 6D in all conventions, and numbers to put in."""
    R = rotations(7)
    for source, target in itertools.permutations([*FORMS, "matrix"], 2):
        x = R if source == "matrix" else from_matrix(source, R)
        options = OPTIONS.get(source, {}) | OPTIONS.get(target, {})
        yield partial(getattr(pn, f"{source}_to_{target}"), **options), x
        if target == "matrix":
            yield partial(getattr(pn, f"{source}_to_matrix"), **options, check=False), x
        if source == "matrix":
            yield partial(getattr(pn, f"matrix_to_{target}"), **options, check=False), x
            yield partial(getattr(pn, f"matrix_to_{target}"), **options, project=True), x
    for convention in ("rows", "interleaved"):
        yield partial(rotation6d_to_matrix, convention=convention), from_matrix("rotation6d", R)
        yield partial(matrix_to_rotation6d, convention=convention), R
    for form in ("axis_angle", "rotation6d", "euler"):
        options = OPTIONS.get(form, {})
        there, back = (partial(getattr(pn, name), order="xyzw", **options) for name in of_quaternions(form))
        yield there, matrix_to_quaternion(R, order="xyzw")
        yield back, from_matrix(form, R)
    for n in (2, 3, 4, 5):
        turns = random_rotation(n, rng=np.random.default_rng(n), batch=(7,))
        for options in ({}, {"check": False}, {"project": True}):
            yield partial(matrix_to_rotationnd, **options), turns
        yield partial(rotationnd_to_matrix), matrix_to_rotationnd(turns)


def of_quaternions(form):
    return f"quaternion_to_{form}", f"{form}_to_quaternion"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_functions_are_the_same_where_numpy_cannot_look(dtype, monkeypatch):
    margin = 64 * torch.finfo(dtype).eps
    converted = [(f, torch.tensor(x, dtype=dtype)) for f, x in pairs_of_forms()]
    expected = [f(x) for f, x in converted]
    R, S = (torch.tensor(rotations(7, seed), dtype=dtype) for seed in (0, 1))
    distances = [geodesic_distance, chordal_distance, geodesic_loss, chordal_loss, partial(geodesic_loss, squared=True)]
    apart = [f(R, S) for f in distances]
    with pytest.warns(UserWarning, match="six-vectors|matrices have more than one"):
        lost = [to_matrix(form, torch.tensor(LOST[form], dtype=dtype)) for form in ("rotation6d", "rotation9d")]
    monkeypatch.setattr(_rotation_torch, "as_numpy", lambda *_: None)
    for (f, x), made in zip(converted, expected, strict=True):
        torch.testing.assert_close(f(x), made, rtol=0, atol=margin, msg=lambda text, f=f: f"{f}: {text}")
    for f, made in zip(distances, apart, strict=True):
        torch.testing.assert_close(f(R, S), made, rtol=margin, atol=margin)
    with pytest.warns(UserWarning, match="six-vectors|matrices have more than one"):
        again = [to_matrix(form, torch.tensor(LOST[form], dtype=dtype)) for form in ("rotation6d", "rotation9d")]
    for made, before in zip(again, lost, strict=True):
        torch.testing.assert_close(made, before, rtol=0, atol=margin)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_result_shares_memory_with_the_input_or_with_another_result(kind, dtype):
    def place(array):
        return array.numpy() if isinstance(array, torch.Tensor) else array

    for f, x in pairs_of_forms():
        cases = [numbers.astype(dtype) for numbers in (x, x[:1], x[0])]
        if f.func.__name__.startswith("matrix_to"):
            cases.append(np.swapaxes(np.swapaxes(cases[0], 1, 2).copy(), 1, 2))
        for numbers in cases:
            given = torch.from_numpy(numbers) if kind == "torch" else numbers
            first, second = f(given), f(given)
            assert not np.shares_memory(place(first), place(given)), f
            assert not np.shares_memory(place(first), place(second)), f
            first[...] = 0


FREE = {
    "rotation5d": (5, rotation5d_to_matrix),
    "rotation6d": (6, rotation6d_to_matrix),
    "rows": (6, partial(rotation6d_to_matrix, convention="rows")),
    "rotation9d": (9, rotation9d_to_matrix),
    "projected": (9, lambda x: matrix_to_rotation6d(x.reshape(-1, 3, 3), project=True)),
}


def free(name, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    x, v = (torch.randn(4, FREE[name][0], generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    return FREE[name][1], x, v


@pytest.mark.parametrize("name", FREE)
def test_forward_derivatives_are_those_of_differences_and_of_the_backward_pass(name):
    f, x, v = free(name)
    results = torch.func.jvp(f, (x,), (v,))
    made, slope = results[0], results[1]
    torch.testing.assert_close(made, f(x))
    h = 1e-5
    torch.testing.assert_close(slope, (f(x + h * v) - f(x - h * v)) / (2 * h), atol=1e-7, rtol=1e-6)
    back = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(torch.func.jacfwd(f)(x), back)
    torch.testing.assert_close(torch.func.jacrev(f)(x), back)
    torch.testing.assert_close(torch.autograd.functional.jacobian(f, x, vectorize=True, strategy="forward-mode"), back)
    assert torch.autograd.gradcheck(
        f, (x.clone().requires_grad_(),), check_forward_ad=True, check_batched_forward_grad=True
    )
    f32, x32, v32 = free(name, torch.float32)
    torch.testing.assert_close(torch.func.jvp(f32, (x32,), (v32,))[1].double(), slope, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FREE)
def test_higher_derivatives_are_true_in_every_order_of_modes(name):
    f, x, v = free(name)

    def loss(x):
        R = f(x)
        return (R * torch.sin(torch.arange(R.numel(), dtype=R.dtype).reshape(R.shape) + R)).sum()

    expected = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(torch.func.hessian(loss)(x), expected)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacfwd(loss))(x), expected)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacfwd(loss))(x), expected)
    third = torch.autograd.functional.hessian(
        lambda x: (torch.autograd.grad(loss(x), x, create_graph=True)[0] * v).sum(), x
    )
    slope = torch.func.jacfwd(torch.func.jacfwd(lambda x: torch.func.jvp(loss, (x,), (v,))[1]))(x)
    torch.testing.assert_close(slope, third)
    slope = torch.func.jacfwd(torch.func.jacfwd(lambda x: (torch.func.grad(loss)(x) * v).sum()))(x)
    torch.testing.assert_close(slope, third)
    along = torch.einsum("ijkl,kl->ij", expected, v)
    # Forward mode over the backward pass, in which NumPy must not drop the tangent.
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), v)
        pull = torch.autograd.grad(loss(dual), dual)[0]
        found = forward_ad.unpack_dual(pull).tangent
    torch.testing.assert_close(found, along)


@pytest.mark.parametrize("form", ["rotation5d", "rotation6d", "rotation9d"])
def test_forward_derivatives_are_0_where_there_is_no_direction(form):
    g = torch.Generator().manual_seed(0)
    x = torch.tensor(LOST[form], dtype=torch.float64)
    v = torch.randn(x.shape, generator=g, dtype=torch.float64)
    with pytest.warns(UserWarning, match=f"^{len(x)} "):
        slope = torch.func.jvp(partial(to_matrix, form), (x,), (v,))[1]
    assert torch.isfinite(slope).all()
    back = torch.autograd.functional.jacobian(partial(to_matrix, form, check=False), x)
    torch.testing.assert_close(slope, torch.einsum("nijmk,mk->nij", back, v))
    if form == "rotation9d":
        assert not slope.any()


def test_results_with_a_tangent_may_be_written_to():
    for name in FREE:
        f, x, v = free(name)
        expected = torch.func.jvp(f, (x,), (v,))[1]
        with forward_ad.dual_level():
            made = f(forward_ad.make_dual(x, v))
            made[2] = 0
            found = forward_ad.unpack_dual(made).tangent
        expected[2] = 0
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [">f8", ">f4", ">f2", ">i4", np.longdouble])
def test_foreign_byte_orders_and_wide_floats_are_computed_in_native_ones(dtype):
    native = np.dtype(np.float64 if dtype == np.longdouble else np.dtype(dtype).newbyteorder("="))
    cases = pairs_of_forms()
    if dtype == ">i4":
        cases = [(f, np.stack([np.eye(x.shape[-1])] * 3)) for f, x in cases if x.ndim == 3]
    for f, x in cases:
        given = x.astype(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            made, expected = f(given), f(given.astype(native))
        assert np.dtype(made.dtype).isnative
        assert made.dtype == expected.dtype
        np.testing.assert_array_equal(made, expected)
        assert given.dtype == dtype
    R, S = rotations(5), rotations(5, 1)
    if dtype == ">i4":
        R, S = np.stack([EYE] * 5), np.stack([np.diag([1, -1, -1])] * 5)
    for f in (geodesic_distance, chordal_distance, geodesic_loss, chordal_loss):
        made, expected = f(R.astype(dtype), S.astype(dtype)), f(R.astype(native), S.astype(native))
        assert made.dtype == expected.dtype
        np.testing.assert_array_equal(made, expected)
    assert rotation_errors(R.astype(dtype), S.astype(dtype)) == rotation_errors(R.astype(native), S.astype(native))


def test_wide_floats_beyond_the_range_of_double_are_refused():
    if np.finfo(np.longdouble).max > np.finfo(np.float64).max:
        with pytest.raises(ValueError, match=r"x must be finite, got NaN or infinity in 1 rows: \[1\]"):
            rotation6d_to_matrix(np.array([[1, 0, 0, 0, 1, 0], [np.longdouble("1e400"), 0, 0, 0, 1, 0]]))


COMPILED = """
import torch
from polyspan.nn import matrix_to_rotation6d, rotation5d_to_matrix, rotation6d_to_matrix, rotation9d_to_matrix

def projected(x):
    return matrix_to_rotation6d(x.reshape(-1, 3, 3), project=True)

generator = torch.Generator().manual_seed(3)
for width, f in ((5, rotation5d_to_matrix), (6, rotation6d_to_matrix), (9, rotation9d_to_matrix), (9, projected)):
    x, found = torch.randn(4, width, generator=generator, dtype=torch.float64), []
    for turned in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        R = turned(leaf)
        (R * torch.arange(R.numel(), dtype=R.dtype).reshape(R.shape)).sum().backward()
        found.append((R.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1])
print("same")
"""


@pytest.mark.slow
def test_conversions_compile_in_one_graph_with_their_gradients():
    # In a process of its own: the type checks of the tests cannot be compiled.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr


@pytest.mark.parametrize("n", [2, 4, 5])
def test_the_nearest_rotation_in_n_dimensions_has_a_forward_derivative(n):
    g = torch.Generator().manual_seed(n)
    head = RotationHead(7, "9d", n=n, generator=g, dtype=torch.float64)
    x, change = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    R, moved = torch.func.jvp(head, (x,), (change,))
    torch.testing.assert_close(R, head(x))
    _, whole = torch.autograd.functional.jvp(head, x, change)
    torch.testing.assert_close(moved, whole)

    def loss(x):
        return (head(x) ** 3 * torch.arange(n * n).view(n, n)).sum()

    over = torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (change,))[1])(x)
    torch.testing.assert_close(over, torch.autograd.functional.vhp(loss, x, change)[1])


@pytest.mark.parametrize("kind", ["datetime64[s]", "timedelta64[s]", object, str])
def test_arrays_of_dates_texts_and_objects_are_refused(kind):
    for f, x in pairs_of_forms():
        with pytest.raises(TypeError, match="arrays must hold real numbers, got"):
            f(np.rint(x).astype(kind))
    R = np.stack([EYE] * 3).astype(int).astype(kind)
    with pytest.raises(TypeError, match="arrays must hold real numbers, got"):
        geodesic_distance(R, R)


def test_errors_of_predictions_that_are_not_finite_are_not_summed_up():
    R = rotations(9)
    R[[1, 4, 5, 6, 7, 8]] = np.nan
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity in 6 rows: \[1, 4, 5, 6, 7\] \.\.\."):
        rotation_errors(R, rotations(9))
    with pytest.raises(TypeError, match="expected arrays of one kind"):
        continuity_breaks([EYE, EYE], "rotation6d")
