from functools import cache

import numpy as np
import pytest

from polyspan.claims import measure, measure_claim
from polyspan.claims.gaunt import (
    CLAIM,
    Functions,
    clebsch_gordan_invariants,
    gaunt_invariants,
    mirror,
    multiplications,
    on_sphere,
    spherical_digits,
)
from polyspan.io import write_members


@cache
def on(world):
    return measure(CLAIM, world, seeds=3)


@pytest.mark.slow
def test_gaunt_invariants_tell_turned_digits_apart_nearly_as_well():
    found = on("digits")
    assert found.gain > -0.06
    assert found.means["method"] > found.means["lengths of each degree only"] + 0.2


@pytest.mark.slow
def test_the_control_refutes_it_where_only_mirror_images_differ():
    found = on(CLAIM.control)
    assert found.verdict == "fails"
    assert abs(found.means["method"] - 0.5) < 0.05
    assert found.means["baseline"] > 0.62
    # What the even paths cannot see, the bracket can.
    assert found.means["Gaunt and bracket, twice as many"] > 0.6


def test_invariants_of_both_arms_do_not_change_with_a_rotation_but_only_one_survives_the_mirror():
    images = np.random.default_rng(0).random((1, 5, 5)).repeat(2, axis=0)
    data = on_sphere(images, np.zeros(2, dtype=int), 0, lmax=4)
    a, b = data.coefficients
    assert np.abs(a - b).max() > 0.1 * np.abs(a).max()
    both = np.stack([a, b])
    for made in (
        gaunt_invariants(both, 0),
        gaunt_invariants(both, 0, bracket=True),
        clebsch_gordan_invariants(both, 0),
    ):
        np.testing.assert_allclose(made[0], made[1], atol=1e-9 * np.abs(made).max())
    turned = mirror(Functions(both, data.labels), 0)
    assert sorted(turned.labels) == [0, 1]
    even, odd = gaunt_invariants(turned.coefficients, 0), gaunt_invariants(turned.coefficients, 0, bracket=True)
    np.testing.assert_allclose(even[0], even[1], atol=1e-9 * np.abs(even).max())
    np.testing.assert_allclose(odd[0], -odd[1], atol=1e-9 * np.abs(odd).max())


def test_multiplications_grow_as_the_theory_says():
    grid = [multiplications(l)[0] for l in (3, 6, 9)]
    full = [multiplications(l)[1] for l in (3, 6, 9)]
    assert np.log(grid[2] / grid[0]) / np.log(3) < 3.2
    assert np.log(full[2] / full[0]) / np.log(3) > 3.8
    assert full[2] / grid[2] > full[1] / grid[1] > full[0] / grid[0]


@pytest.mark.slow
def test_a_user_measures_the_claim_on_functions_and_classes(tmp_path):
    path = tmp_path / "mine.npz"
    data = spherical_digits(5)
    write_members(path, Functions(data.coefficients[:600], data.labels[:600])._asdict())
    found = measure_claim(CLAIM, data=path, seeds=1)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert found.worlds[0].gain > found.worlds[1].gain
