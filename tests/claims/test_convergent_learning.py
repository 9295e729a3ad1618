import os
from pathlib import Path

import numpy as np
import pytest

from polyspan.claims import measure, measure_claim
from polyspan.claims.convergent_learning import CLAIM, Activations, on_digits, on_mnist, rotate, trial
from polyspan.io import write_members


@pytest.fixture(scope="module")
def digits():
    return [on_digits(seed) for seed in range(3)]


@pytest.mark.slow
def test_without_its_units_the_method_loses_to_principal_components():
    control = measure(CLAIM, CLAIM.control, seeds=5)
    assert control.verdict == "fails"
    assert control.means["method"] == pytest.approx(control.means["4 random directions"], abs=0.04)


@pytest.mark.slow
def test_a_group_of_units_explains_what_no_single_unit_does(digits):
    for seed, data in enumerate(digits):
        arms = trial(data, seed)
        assert arms["1 unit"] + 0.1 < arms["method"] < arms["8 units"]
        assert arms["method"] > arms["4 random directions"] - 0.03


def test_units_that_are_the_same_need_no_other_basis():
    X = np.maximum(np.random.default_rng(0).normal(size=(600, 12)), 0)
    arms = trial(Activations(X, X[:, ::-1] + 0.1 * X), 0)
    assert arms["method"] > 0.99
    assert arms["baseline"] < arms["method"] - 0.2
    assert trial(rotate(Activations(X, X[:, ::-1]), 0), 0)["method"] < arms["method"] - 0.2


@pytest.mark.slow
def test_a_rotation_keeps_the_subspace_and_the_other_network(digits):
    data = digits[0]
    turned = rotate(data, 0)
    np.testing.assert_array_equal(turned.b, data.b)
    np.testing.assert_allclose(np.linalg.norm(turned.a, axis=1), np.linalg.norm(data.a, axis=1), rtol=1e-4)
    assert turned.a.dtype == np.float32
    assert trial(turned, 0)["4 principal components"] != trial(turned, 0)["method"]


def test_inputs_are_in_random_order_and_positions_of_one_stand_together(digits):
    data = digits[0]
    assert data.a.shape == data.b.shape == (897 * 16, 24)
    halves = data.a[: 448 * 16].mean(axis=0), data.a[448 * 16 :].mean(axis=0)
    np.testing.assert_allclose(*halves, rtol=0.25, atol=0.05)


@pytest.mark.slow
def test_a_user_measures_the_claim_on_two_tables(tmp_path):
    rng = np.random.default_rng(1)
    X = np.maximum(rng.normal(size=(400, 10)), 0)
    path = tmp_path / "mine.safetensors"
    write_members(path, {"a": X, "b": X[:, ::-1] + 0.2 * rng.normal(size=X.shape)})
    found = measure_claim(CLAIM, data=path, seeds=3)
    assert [(w.role, w.verdict) for w in found.worlds] == [("user", "holds"), ("control", "fails")]


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(os.environ.get("POLYSPAN_DATA", "/nowhere")).is_dir(), reason="POLYSPAN_DATA holds no data"
)
def test_on_mnist_the_units_of_convolutions_are_the_better_basis():
    arms = trial(on_mnist(0, "3"), 0)
    assert arms["method"] > arms["baseline"] + 0.03
    assert arms["method"] > arms["1 unit"] + 0.1
