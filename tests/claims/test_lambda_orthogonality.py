import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from polyspan.align import RelaxedOrthogonalAdapter
from polyspan.claims import measure
from polyspan.claims.lambda_orthogonality import (
    CLAIM,
    KINDS,
    Encoders,
    Halfway,
    backfilled,
    forget_labels,
    on_digits,
    on_questions,
    planted,
    precision,
    served,
    trial,
)

NEEDS_DATA = pytest.mark.skipif(
    not Path(os.environ.get("POLYSPAN_DATA", "/nowhere")).is_dir(), reason="POLYSPAN_DATA holds no data"
)
OTHERS = ("rotation", "soft rotation", "SRIP", "affine", "halfway")


@cache
def on(world):
    return measure(CLAIM, world, seeds=3)


@pytest.mark.slow
def test_where_it_is_planted_a_threshold_beats_both_ends_and_soft_orthogonality_but_not_the_average_of_the_ends():
    found = on("planted")
    assert found.verdict == "fails"
    assert found.means["method"] > found.means["rotation"] + 0.02
    assert found.means["method"] > found.means["soft rotation"] + 0.02
    assert found.means["method"] < found.means["halfway"]
    for here, elsewhere in zip(found.trials["relaxed, here"], found.trials["relaxed, elsewhere"], strict=True):
        assert here > 0.6
        assert elsewhere > 0.9


@pytest.mark.slow
def test_leaving_the_rotations_further_serves_the_data_at_hand_better_and_other_data_worse():
    means = on("planted").means
    ladder = ("soft rotation", "relaxed", "affine")
    here, elsewhere = ([means[f"{name}, {where}"] for name in ladder] for where in ("here", "elsewhere"))
    assert here == sorted(here)
    assert elsewhere == sorted(elsewhere, reverse=True)
    assert here[1] > here[0] + 0.05
    assert elsewhere[0] - elsewhere[1] < 0.01
    assert elsewhere[0] - elsewhere[2] > 0.05


@pytest.mark.slow
def test_on_real_images_it_beats_the_rotation_and_no_more():
    found = on("digits")
    assert found.verdict == "fails"
    assert found.means["method"] > found.means["rotation"] + 0.005
    assert found.means["baseline"] >= found.means["halfway"] > found.means["rotation"]


@pytest.mark.slow
def test_in_the_control_world_labels_tell_nothing_and_nothing_is_gained():
    found = on(CLAIM.control)
    assert found.verdict == "fails"
    assert abs(found.gain) < 0.005


def test_the_baseline_is_the_best_of_the_others_and_the_score_the_mean_of_both_places():
    data = planted(1, n=200)
    scores = trial(data, 1)
    assert scores["baseline"] == max(scores[name] for name in OTHERS)
    for name in (*KINDS, "halfway"):
        both = (scores[f"{name}, here"] + scores[f"{name}, elsewhere"]) / 2
        assert both == pytest.approx(scores["method" if name == "relaxed" else name])


def test_without_a_bias_the_strict_map_leaves_the_new_model_exactly_as_good_as_it_is():
    data = planted(2, n=300)
    strict = RelaxedOrthogonalAdapter("orthogonal", shift=False, max_iter=10, random_state=0, device="cpu")
    strict.fit(data.anchors_new, data.anchors_old, data.anchor_labels)
    carried = strict.transform(data.other_new)
    own = precision(data.other_new, data.other_new, data.other_labels)
    assert precision(carried, carried, data.other_labels) == pytest.approx(own, abs=1e-9)


def test_halfway_is_the_map_with_the_average_of_the_weights():
    data = planted(3, n=200)
    ends = [
        RelaxedOrthogonalAdapter(mode, max_iter=3, random_state=0, device="cpu").fit(
            data.anchors_new, data.anchors_old, data.anchor_labels
        )
        for mode in ("orthogonal", "affine")
    ]
    weights, bias = (np.mean([getattr(end, name) for end in ends], axis=0) for name in ("weights_", "bias_"))
    np.testing.assert_allclose(Halfway(*ends).transform(data.test_new), data.test_new @ weights + bias, atol=1e-12)
    here, elsewhere = served(Halfway(*ends), data)
    assert 0 < here < elsewhere < 1


def test_anchors_and_other_data_share_no_class_and_spoilt_anchors_no_label():
    data = on_digits(0)
    assert set(data.anchor_labels) == set(data.test_labels) == {5, 6, 7, 8, 9}
    assert set(data.other_labels) == {0, 1, 2, 3, 4}
    spoilt = forget_labels(data, 0)
    assert np.mean(spoilt.anchor_labels == data.anchor_labels) < 0.4
    assert isinstance(spoilt, Encoders)
    np.testing.assert_array_equal(np.sort(spoilt.anchor_labels), np.sort(data.anchor_labels))


def test_the_farthest_items_first_is_the_better_order_by_precision():
    areas = [backfilled(on_digits(seed), seed) for seed in range(2)]
    for area in areas:
        assert area["farthest first"] > area["random"] + 0.005
        assert area["random"] > area["nearest first"] + 0.005


@pytest.mark.slow
@NEEDS_DATA
def test_on_questions_new_queries_search_the_old_gallery_better_than_old_ones_and_the_order_of_backfilling_counts():
    data = on_questions(0)
    adapter = RelaxedOrthogonalAdapter(max_iter=0).fit(data.anchors_new, data.anchors_old, data.anchor_labels)
    asked = adapter.transform(data.test_new)
    old = precision(data.test_old, data.test_old, data.test_labels)
    assert precision(asked, adapter.place_old(data.test_old), data.test_labels) > old + 0.1
    area = backfilled(data, 0)
    assert area["farthest first"] > area["random"] + 0.005
    assert area["random"] > area["nearest first"] + 0.005
