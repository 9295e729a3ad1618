from functools import cache

import numpy as np
import pytest

from polyspan.claims import measure, measure_claim
from polyspan.claims.unified_embedding import CLAIM, Labelled, Table, on_digits, one_feature, planted, trial
from polyspan.io import write_members


@cache
def on(world):
    return measure(CLAIM, world, seeds=3)


@pytest.mark.slow
def test_a_shared_table_wins_where_readers_can_turn_away_from_one_another():
    found = on("planted")
    assert found.verdict == "holds"
    assert found.gain > 0.03
    assert found.means["angle between readers, shared table (degrees)"] > 60
    assert found.means["angle between readers, split tables (degrees)"] < 30
    assert found.means["a row a value"] > found.means["method"]


@pytest.mark.slow
def test_a_shared_table_wins_on_digits():
    found = on("digits")
    assert found.verdict == "holds"
    assert found.gain > 0.05


@pytest.mark.slow
def test_the_control_refutes_it_where_all_features_have_one_reader():
    found = on(CLAIM.control)
    assert found.verdict == "fails"
    # At least two thirds of the gain are the readers' doing.
    assert found.gain < on("planted").gain / 3


def test_worlds_hold_what_they_say():
    data = planted(0)
    assert isinstance(data, Table)
    assert [len(np.unique(c)) for c in data.values.T] == [2_000] * 4
    assert data.test.mean() == pytest.approx(0.2)
    first = np.bincount(data.values[:, 0])
    assert first[0] / first[99] == pytest.approx(100**0.8, rel=0.3)
    pixels = on_digits(0)
    assert set(np.unique(pixels.values)) <= set(range(17))
    assert pixels.labels.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
def test_a_user_measures_the_claim_on_values_and_labels(tmp_path):
    data = planted(1)
    path = tmp_path / "mine.npz"
    write_members(path, {"values": data.values[:4000], "labels": data.labels[:4000]})
    found = measure_claim(CLAIM, data=path, seeds=1)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert found.worlds[0].means["method"] > 0.55
    assert one_feature(Labelled(data.values, data.labels), 0).values.shape == (80_000, 1)


def test_user_data_of_another_form_is_refused():
    with pytest.raises(ValueError, match=r"values must be whole numbers \(n, T\) with n labels, got float64 \(5, 2\)"):
        trial(Labelled(np.zeros((5, 2)), np.zeros(5)), 0)
    with pytest.raises(ValueError, match=r"labels must be 0 or 1, got \[2\]"):
        trial(Labelled(np.zeros((5, 2), int), np.full(5, 2)), 0)
