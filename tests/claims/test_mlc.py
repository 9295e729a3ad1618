import os
from pathlib import Path

import numpy as np
import pytest

from polyspan.claims import measure, measure_claim
from polyspan.claims.mlc import (
    CLAIM,
    Pictures,
    on_digits,
    on_large_digits,
    planted,
    public,
    scramble,
    trial,
)
from polyspan.io import write_members


def few(seed):
    """Little training on fewer pictures, for the mechanics."""
    data = planted(seed)
    return Pictures(data.images[:120], data.labels[:120], np.array([20, 0.2, 0.15, 0, 0, 0, 0, 4, 4]))


@pytest.mark.slow
def test_without_groups_the_method_gains_nothing():
    control = measure(CLAIM, CLAIM.control)
    assert control.verdict == "fails"
    assert control.means["method"] < 0.4


def test_training_flattens_planted_orbits_and_finds_them():
    arms = trial(planted(0), 0)
    assert arms["method"] > max(0.97, arms["initial memberships"])
    assert arms["method"] > arms["k-means, pixels"] + 0.2
    assert arms["share of R_c that training takes away"] > 0.15
    assert abs(arms["share of R that training takes away"]) < 0.03


def test_no_label_reaches_an_arm():
    data = few(0)
    names = np.random.default_rng(0).permutation(6)
    renamed, plain = trial(data._replace(labels=names[data.labels]), 0), trial(data, 0)
    assert renamed == plain
    order = np.random.default_rng(1).permutation(120)
    shuffled = trial(data._replace(labels=data.labels[order]), 0)
    kept = [name for name in plain if name.startswith("share")]
    assert {name: shuffled[name] for name in kept} == {name: plain[name] for name in kept}
    assert shuffled["method"] < 0.35


def test_the_control_keeps_the_values_of_every_pixel_and_nothing_else():
    data = planted(3)
    spoilt = scramble(data, 3)
    np.testing.assert_array_equal(np.sort(spoilt.images, axis=0), np.sort(data.images, axis=0))
    assert np.mean(spoilt.images == data.images) < 0.05
    np.testing.assert_array_equal(spoilt.labels, data.labels)


def test_large_digits_are_the_small_ones_between_their_pixels():
    small, large = on_digits(0).images, on_large_digits(0).images
    assert large.shape == (1797, 16, 16)
    np.testing.assert_allclose(large.mean(axis=(1, 2)), small.mean(axis=(1, 2)), atol=0.05)


def test_a_user_measures_the_claim_on_pictures_of_their_own(tmp_path):
    path = tmp_path / "mine.safetensors"
    write_members(path, few(1)._asdict())
    found = measure_claim(CLAIM, data=path, seeds=1)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert found.worlds[0].means["method"] == pytest.approx(trial(few(1), 0)["method"])


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(os.environ.get("POLYSPAN_DATA", "/nowhere")).is_dir(), reason="POLYSPAN_DATA holds no data"
)
def test_faces_of_ten_pictures_each_are_too_few_to_sharpen():
    data = public("orl", 0, (5.0, 0.1, 0.1, 1, 0.2, 0.1, 0.02))
    assert data.images.shape == (400, 16, 16)
    arms = trial(data._replace(recipe=np.array([*data.recipe[:7], 160, 100])), 0)
    assert arms["method"] < arms["baseline"]
    assert arms["initial memberships"] > arms["k-means, pixels"]
