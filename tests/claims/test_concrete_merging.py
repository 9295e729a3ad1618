import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from polyspan.claims import measure, measure_claim
from polyspan.claims.concrete_merging import (
    ADA,
    CLAIM,
    CONCRETE,
    SCALINGS,
    TRIMS,
    VIEWS,
    arms,
    on_digits,
    on_mnist,
    on_objects,
    prepare,
    seen,
)  # fmt: skip
from polyspan.io import write_members

NEEDS_DATA = pytest.mark.skipif(
    not Path(os.environ.get("POLYSPAN_DATA", "/nowhere")).is_dir(), reason="POLYSPAN_DATA holds no data"
)


@cache
def on(world):
    return measure(CLAIM, world, seeds=2)


def test_no_baseline_has_fewer_settings_or_smaller_rates_than_masks():
    assert len(SCALINGS) == len(TRIMS) == len(CONCRETE) == 4
    assert {lr for _, lr in CONCRETE} <= {lr for lr, _ in ADA}
    found = {name: len(settings) for name, settings in arms(prepare(on_digits(0), 0), 0).items()}
    assert found == {"task arithmetic": 4, "TIES": 4, "AdaMerging": 6, "Concrete": 4}


@pytest.mark.slow
def test_masks_gain_where_inputs_are_those_of_the_tasks():
    found = on("digits")
    assert found.gain > 0
    assert found.means["Concrete task arithmetic"] > found.means["task arithmetic"] + CLAIM.margin
    assert found.means["method"] < found.means["each task's own network"]
    assert found.means["method"] > found.means["before fine-tuning"] + 0.02


@pytest.mark.slow
def test_the_control_refutes_it_where_inputs_say_nothing_of_the_tasks():
    found = on(CLAIM.control)
    assert found.gain < CLAIM.margin
    assert found.means["Concrete AdaMerging"] < on("digits").means["Concrete AdaMerging"] - 0.01
    assert found.means["task arithmetic"] == on("digits").means["task arithmetic"]


def test_views_are_four_bijections_of_the_pixels():
    images = np.random.default_rng(0).random((3, 4, 4)).astype(np.float32)
    for view in VIEWS:
        rows = seen(images, view)
        turned = 1 - rows if view == "inverted" else rows
        np.testing.assert_allclose(np.sort(turned, axis=1), np.sort(images.reshape(3, -1), axis=1), atol=1e-6)
    assert len({seen(images, view).tobytes() for view in VIEWS}) == 4
    np.testing.assert_array_equal(seen(images, "swapped").reshape(3, 4, 4)[:, :2, :2], images[:, 2:, 2:])


def test_parts_do_not_overlap_and_torn_inputs_keep_only_the_histogram():
    whole, torn = (prepare(on_digits(0, torn=t), 0) for t in (False, True))
    parts = [whole.adapt["upright"], *(rows["upright"][0][0] for rows in (whole.validation, whole.test))]
    rows = {tuple(row.tolist()) for part in parts for row in part}
    assert len(rows) == sum(map(len, parts))
    x, y = whole.adapt["turned"], torn.adapt["turned"]
    assert not torch.equal(x, y)
    torch.testing.assert_close(x.sort(dim=1).values, y.sort(dim=1).values)
    torch.testing.assert_close(whole.base.state_dict(), torn.base.state_dict(), atol=0, rtol=0)


@pytest.mark.slow
def test_a_user_measures_the_claim_on_pictures_of_their_own(tmp_path):
    data = on_digits(0)
    write_members(tmp_path / "mine.npz", {name: part[:1200] for name, part in data._asdict().items()})
    found = measure_claim(CLAIM, data=tmp_path / "mine.npz", seeds=1)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert found.worlds[0].gain > found.worlds[1].gain
    assert found.worlds[0].means["each task's own network"] > 0.9


@NEEDS_DATA
def test_real_sets_are_pooled_to_their_size():
    for data, shape, classes in ((on_mnist(0), (10_000, 14, 14), 10), (on_objects(0), (1440, 16, 16), 20)):
        assert data.images.shape == shape
        assert 0 <= data.images.min() < 0.1
        assert 0.8 < data.images.max() <= 1
        assert len(np.unique(data.labels)) == classes
