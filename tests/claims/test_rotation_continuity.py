from functools import cache

import numpy as np
import pytest

from polyspan.claims import measure, measure_claim
from polyspan.claims.rotation_continuity import CAP, CLAIM, Posed, clouds, entries, narrow
from polyspan.io import write_members
from polyspan.nn import axis_angle_to_matrix, geodesic_distance, random_rotation


@cache
def on(world):
    return measure(CLAIM, world, seeds=3)


@pytest.mark.slow
def test_six_numbers_win_where_targets_are_all_rotations():
    found = on("entries")
    assert found.verdict == "holds"
    assert found.means["method"] < 3
    assert found.means["6D, largest error"] < 12
    assert found.means["baseline, largest error"] > 90
    assert found.means["9D, nearest rotation"] < 1.2 * found.means["method"]


@pytest.mark.slow
def test_the_control_refutes_it_where_no_representation_has_to_tear():
    found = on(CLAIM.control)
    assert found.verdict == "fails"
    assert max(found.means[name] for name in ("method", "quaternion", "axis-angle", "Euler angles")) < 3


def test_worlds_hold_what_they_say():
    data = entries(0, n=500)
    np.testing.assert_array_equal(data.features, data.rotations.reshape(500, 9))
    assert geodesic_distance(data.rotations, np.eye(3, dtype=np.float32)).max() > 3
    capped = entries(0, n=500, max_angle=CAP)
    assert geodesic_distance(capped.rotations, np.eye(3, dtype=np.float32)).max() <= CAP + 1e-5
    turned = clouds(0, n=500)
    points = turned.features.reshape(500, 8, 3) @ turned.rotations
    assert np.std(points, axis=0).max() < 0.1 * points.std()


def test_spoilt_data_is_the_part_of_it_around_one_rotation():
    rng = np.random.default_rng(0)
    away = axis_angle_to_matrix(np.array([0.0, 2.5, 1.0]))
    R = np.concatenate(
        [random_rotation(rng=rng, batch=(400,)), away @ random_rotation(rng=rng, batch=(100,), max_angle=0.2)]
    )
    made = narrow(Posed(R.reshape(-1, 9), R), 0)
    assert len(made.rotations) == 100
    assert geodesic_distance(made.rotations, np.eye(3)).max() < 1.2
    kept = made.features.reshape(-1, 3, 3)
    left = kept @ np.swapaxes(made.rotations, 1, 2)
    np.testing.assert_allclose(left, np.broadcast_to(left[0], left.shape), atol=1e-12)


@pytest.mark.slow
def test_a_user_measures_the_claim_on_features_and_rotations(tmp_path):
    data = entries(1, n=1200)
    path = tmp_path / "mine.npz"
    write_members(path, data._asdict())
    found = measure_claim(CLAIM, data=path, seeds=1)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert found.worlds[0].gain > CLAIM.margin > found.worlds[1].gain
