import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from polyspan.nn import compare_representations, geodesic_distance, plot_representations

QUICK = {"seeds": 2, "hidden": (64,), "max_iter": 40, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def turns():
    """Rotations drawn evenly, told by three points that turn along: some are near half turns."""
    R = Rotation.random(800, random_state=0).as_matrix()
    return R.reshape(-1, 9), R


@pytest.fixture(scope="module")
def compared(turns):
    return compare_representations(*turns, ("6d", "quaternion", "axis-angle"), **QUICK)


def test_what_breaks_at_half_turns_errs_by_far_the_most_there(compared):
    found = {row.representation: row for row in compared}
    assert found["6d"].max < 30
    assert found["quaternion"].max > 60
    assert found["axis-angle"].max > 60
    assert [row.mean for row in compared] == sorted(row.mean for row in compared)
    assert compared[0].representation == "6d"


def test_numbers_are_averages_of_the_trials(compared):
    for row in compared:
        assert len(row.trials) == 2
        for name in ("mean", "median", "p99", "max"):
            assert getattr(row, name) == pytest.approx(np.mean([getattr(t, name) for t in row.trials]))
        assert row.spread == pytest.approx(np.std([t.mean for t in row.trials]))


def test_equal_seeds_give_equal_bits_and_leave_the_global_generators_alone(turns, compared):
    states = torch.random.get_rng_state(), str(np.random.get_state())  # noqa: NPY002 - it must stay as it is
    again = compare_representations(*turns, ("axis-angle", "6d"), **QUICK)
    assert {row.representation: row for row in again}["6d"] == {row.representation: row for row in compared}["6d"]
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert str(np.random.get_state()) == states[1]  # noqa: NPY002


def test_a_turn_of_the_world_is_learnt_as_well(turns):
    X, R = turns
    world = Rotation.random(random_state=0).as_matrix()
    (row,) = compare_representations(X, world @ R, ("6d",), **QUICK)
    assert row.max < 30
    # Rows that say nothing leave the angle to chance: nothing is learnt about what is held out.
    told = np.rad2deg(geodesic_distance(R[:1], R)).mean()
    (blind,) = compare_representations(np.ones((len(X), 1)), R, ("6d",), **QUICK)
    assert blind.mean > 0.5 * told


def test_the_picture_has_equal_bytes(compared, tmp_path):
    first, again = (plot_representations(compared, tmp_path / name) for name in ("a.svg", "b.svg"))
    assert first.read_bytes() == again.read_bytes()
    assert all(f"<!-- {name} -->" in first.read_text() for name in ("6d", "quaternion", "axis-angle", "p99"))
    with pytest.raises(ValueError, match="rows must hold at least one representation, got none"):
        plot_representations([], tmp_path / "a.svg")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"representations": ("7d",)}, r"representations must be some of .*, got \['7d'\]"),
        ({"representations": ()}, "representations must be some of .*, got none"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1, got 0"),
        ({"hidden": (8, 0)}, r"hidden\[1\] must be a whole number of at least 1, got 0"),
        ({"learning_rate": -1.0}, r"learning_rate must be finite and above 0, got -1.0"),
        ({"held_out": 0.0}, "held_out must leave rows on both sides of 800, got 0.0"),
        ({"held_out": 0.9999}, "held_out must leave rows on both sides of 800"),
    ],
)
def test_settings_out_of_range_are_refused(turns, change, told):
    with pytest.raises(ValueError, match=told):
        compare_representations(*turns, **change)


def test_rows_that_do_not_pair_are_not_finite_or_turn_nothing_are_refused(turns):
    X, R = turns
    with pytest.raises(ValueError, match=r"X and R must be \(n, d\) and \(n, 3, 3\), got shapes \(800, 9\) and \(799"):
        compare_representations(X, R[1:])
    with pytest.raises(ValueError, match="X must be finite, got NaN or infinity at row 3"):
        compare_representations(np.where(np.arange(800)[:, None] == 3, np.nan, X), R)
    with pytest.raises(ValueError, match="R must hold rotations"):
        compare_representations(X, 2 * R)
