import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from polyspan.nn import (
    matrix_to_scipy,
    plot_rotation_errors,
    rotation_axis_errors,
    rotation_errors,
    scipy_to_matrix,
)


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_errors_are_split_by_the_axes_of_the_body_wherever_it_looks(make):
    target = Rotation.random(500, random_state=0)
    degrees = np.random.default_rng(1).normal([2, 0, -1], [0.5, 3, 0.1], size=(500, 3))
    predicted = target * Rotation.from_rotvec(degrees, degrees=True)
    found = rotation_axis_errors(make(predicted.as_matrix()), make(target.as_matrix()))
    np.testing.assert_allclose(found.vectors, degrees, atol=1e-9)
    np.testing.assert_allclose(found.mean, degrees.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(found.spread, degrees.std(axis=0), atol=1e-9)
    np.testing.assert_allclose(found.mean_absolute, np.abs(degrees).mean(axis=0), atol=1e-9)
    # Lengths of the vectors are the angles that the summary is of.
    told = rotation_errors(predicted.as_matrix(), target.as_matrix())
    assert np.linalg.norm(found.vectors, axis=1).max() == pytest.approx(told.max, abs=1e-9)
    # A turn of the world changes nothing, as the axes are the body's.
    world = Rotation.random(random_state=2)
    turned = rotation_axis_errors((world * predicted).as_matrix(), (world * target).as_matrix())
    np.testing.assert_allclose(turned.vectors, degrees, atol=1e-8)


def test_the_picture_tells_both_and_is_the_same_bytes_for_the_same_rotations(tmp_path):
    target = Rotation.random(200, random_state=0)
    predicted = target * Rotation.from_rotvec(np.full((200, 3), [5.0, 0, 0]), degrees=True)
    given = predicted.as_matrix(), target.as_matrix()
    first, again = (plot_rotation_errors(*given, tmp_path / name) for name in ("a.svg", "b.svg"))
    assert first.read_bytes() == again.read_bytes()
    for text in ("Angle; 0.00% above 30, 0.00% above 90", "About the body's axes; mean and deviation", "x: 5 ±"):
        assert f"<!-- {text}" in first.read_text(), text
    with pytest.raises(ValueError, match=r"path must end in \.svg, \.png or \.pdf"):
        plot_rotation_errors(*given, tmp_path / "a.gif")


def test_what_is_no_rotation_has_no_axes():
    R = Rotation.random(3, random_state=0).as_matrix()
    with pytest.raises(ValueError, match=r"predicted must have the shape of target, \(3, 3, 3\), got \(2, 3, 3\)"):
        rotation_axis_errors(R[:2], R)
    with pytest.raises(ValueError, match=r"with at least one rotation, got shape \(0, 3, 3\)"):
        rotation_axis_errors(R[:0], R[:0])
    with pytest.raises(ValueError, match=r"must be \(\*b, 3, 3\)"):
        rotation_axis_errors(np.eye(4)[None], np.eye(4)[None])
    with pytest.raises(ValueError, match="R must hold rotations"):
        rotation_axis_errors(R, 2 * R)
    with pytest.raises(ValueError, match="predicted must be finite"):
        rotation_axis_errors(np.full_like(R, np.nan), R)


@pytest.mark.parametrize("shape", [(), (5,), (0,)])
def test_rotations_of_scipy_come_and_go(shape):
    rotations = Rotation.random(None if shape == () else shape[0], random_state=0) if shape != (0,) else None
    R = np.zeros((0, 3, 3)) if rotations is None else rotations.as_matrix()
    made = matrix_to_scipy(R)
    assert made.as_matrix().shape == (*shape, 3, 3)
    np.testing.assert_allclose(scipy_to_matrix(made), R, atol=1e-12)
    if rotations is not None:
        assert np.max(np.atleast_1d((made.inv() * rotations).magnitude())) < 1e-12
        np.testing.assert_allclose(matrix_to_scipy(torch.tensor(R)).as_matrix(), R, atol=1e-12)


def test_scipy_gets_rotations_and_nothing_else():
    R = Rotation.random(4, random_state=0).as_matrix()
    with pytest.raises(ValueError, match="R must hold rotations"):
        matrix_to_scipy(R * 1.1)
    with pytest.raises(ValueError, match="R must hold rotations"):
        matrix_to_scipy(np.diag([1.0, 1.0, -1.0]))
    nearest = matrix_to_scipy(R * 1.1, project=True).as_matrix()
    np.testing.assert_allclose(nearest, R, atol=1e-12)
    with pytest.raises(ValueError, match=r"must be a scipy.spatial.transform.Rotation, got ndarray"):
        scipy_to_matrix(R)
