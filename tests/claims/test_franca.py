import numpy as np
import pytest

from polyspan.claims.franca import CLAIM, displace, mosaics, on_digits, textures, trial
from polyspan.cluster import PositionalDisentangler, position_r2


@pytest.fixture(scope="module")
def patches():
    return mosaics(0, n=30)


def test_the_worlds_hold_what_they_say(patches):
    assert [len(part) for part in textures()] == [1024, 1024, 1024, 1024, 432, 1024]
    assert patches.items.shape == (30, 16, 16, 96)
    assert position_r2(patches.items) > 0.8
    assert position_r2(mosaics(0, n=30, gain=0.0).items) < 0.1
    np.testing.assert_array_equal(mosaics(0, n=30).items, patches.items)
    digits = on_digits(0)
    assert digits.items.shape == (1797, 8, 8)
    assert np.array_equal(on_digits(0).labels, digits.labels)


def test_displacing_keeps_patches_with_their_classes_and_loses_their_places(patches):
    moved = displace(patches, 0)
    assert position_r2(moved.items) < 0.1
    rows, other = (np.column_stack([d.items[3].reshape(256, -1), d.labels[3].ravel()]) for d in (patches, moved))
    np.testing.assert_array_equal(other[np.lexsort(other.T)], rows[np.lexsort(rows.T)])
    mixed = displace(on_digits(0), 0)
    np.testing.assert_array_equal(np.sort(mixed.items, axis=0), np.sort(on_digits(0).items, axis=0))


def test_rounds_help_patches_and_erasure_of_cosines_helps_more():
    found = trial(mosaics(0), 0)
    assert found["position R2 untouched"] > 0.85
    assert found["position R2 after rounds"] < 0.5
    assert found["method"] > found["baseline: untouched"] + 0.02
    assert found["method"] > found["without random directions"] + 0.02
    assert found["baseline: erasure of cosines"] > found["method"] + 0.05
    assert found["baseline"] == max(value for name, value in found.items() if name.startswith("baseline: "))


def test_where_no_place_is_coded_nothing_is_gained():
    found = trial(CLAIM.worlds[CLAIM.control](1), 1)
    assert found["method"] <= found["baseline"]
    assert found["method"] == found["baseline: untouched"]


def test_a_trial_scores_prefixes_of_both_networks_and_repeats():
    data = on_digits(0)
    small = data._replace(items=data.items[:300], labels=data.labels[:300], recipe=np.array([*data.recipe[:7], 20]))
    found = trial(small, 0)
    assert found == trial(small, 0)
    assert {"method", "baseline", "single head, all", "nested heads, PCA"} <= found.keys()
    assert all(0 <= value <= 1 for value in found.values())


def test_labels_reach_no_arm(patches):
    """Classes dealt out anew leave the maps as they were: they are fitted on places alone."""
    made = PositionalDisentangler().fit(patches.items)
    again = PositionalDisentangler().fit(patches._replace(labels=patches.labels[::-1]).items)
    np.testing.assert_array_equal(made.projector_, again.projector_)
    other = trial(
        patches._replace(labels=np.random.default_rng(0).permutation(patches.labels.ravel()).reshape(30, 16, 16)), 0
    )
    assert other["method"] < 0.4
    assert other["position R2 after rounds"] == trial(patches, 0)["position R2 after rounds"]


def test_the_claim_says_what_it_shares():
    assert CLAIM.control == "no-place"
    assert CLAIM.margin > 0
