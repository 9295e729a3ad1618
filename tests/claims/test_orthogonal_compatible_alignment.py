from functools import cache

import numpy as np
import pytest

from polyspan.align import RidgeMap, compatibility_matrix
from polyspan.claims import measure_claim
from polyspan.claims.orthogonal_compatible_alignment import (
    ALPHAS,
    CLAIM,
    bct,
    chain,
    make_backbone,
    mapped_scores,
    on_digits,
    planted,
    shuffled,
    train_model,
    trial,
)
from polyspan.io import write_members


def few(data, epochs=15):
    """A sixth of the test rows and a half of the training rows."""
    return data._replace(
        rows=data.rows[::2],
        labels=data.labels[::2],
        test_rows=data.test_rows[::6],
        test_labels=data.test_labels[::6],
        epochs=np.array([epochs]),
    )


@cache
def on(world):
    return trial(CLAIM.worlds[world](0), 0)


@pytest.mark.slow
@pytest.mark.parametrize("world", ["planted", "digits"])
def test_compatible_chains_are_near_one_another_and_far_above_independent_models(world):
    found = on(world)
    assert found["method"] > found["independent models"] + 0.05
    assert found["baseline"] > found["independent models"] + 0.05
    assert abs(found["method"] - found["baseline"]) < 0.05


@pytest.mark.slow
def test_with_labels_dealt_out_anew_every_arm_is_at_chance():
    found = on(CLAIM.control)
    shares = np.bincount(planted(0).test_labels) / len(planted(0).test_labels)
    assert max(found.values()) < np.sum(shares**2) + 0.02
    assert abs(found["method"] - found["baseline"]) < 0.005


def test_worlds_name_classes_anew_and_keep_the_split():
    data = on_digits(3)
    assert data.rows.shape == (900, 64)
    assert data.test_rows.shape == (897, 64)
    assert set(data.labels) == set(data.test_labels) == set(range(10))
    assert data.n_known.tolist() == [4, 7, 10]
    assert not np.array_equal(data.labels, on_digits(4).labels)
    np.testing.assert_array_equal(on_digits(3).rows, data.rows)


def test_shuffling_keeps_rows_and_the_number_of_each_label():
    data = planted(0)
    spoilt = shuffled(data, 0)
    assert spoilt.rows is data.rows
    np.testing.assert_array_equal(np.bincount(spoilt.labels), np.bincount(data.labels))
    assert np.mean(spoilt.labels == data.labels) < 0.2


def test_a_model_sees_only_the_classes_of_its_stage_and_the_baseline_does_not_grow():
    data = few(planted(0), 2)
    rows = np.arange(len(data.rows))
    first = train_model(data, rows, 0, 0)
    assert first.classes_.tolist() == [0, 1, 2, 3]
    grown, fixed = chain(data, rows, first, 0), chain(data, rows, first, 0, **bct(ALPHAS[0]))
    assert [m.transform(data.rows[:1]).shape[1] for m in grown] == [8, 12, 16]
    assert [m.transform(data.rows[:1]).shape[1] for m in fixed] == [8, 8, 8]
    assert grown[0] is fixed[0]
    assert all(epoch["cos"] > 0 for epoch in fixed[1].history_)
    assert fixed[1].w_cos == 0


def test_independent_models_are_carried_by_a_map_of_training_rows():
    data = few(planted(0), 2)
    rows = np.arange(len(data.rows))
    models = [train_model(data, rows, stage, 0) for stage in range(2)]
    data = data._replace(n_known=data.n_known[:2])
    found = mapped_scores(data, rows, models)
    known = data.rows[data.labels < 8]
    moved = (
        RidgeMap()
        .fit(models[1].transform(known), models[0].transform(known))
        .transform(models[1].transform(data.test_rows))
    )
    stored = [model.transform(data.test_rows) for model in models]
    plain = compatibility_matrix(stored, data.test_labels).scores
    assert found[0, 0] == pytest.approx(plain[0, 0])
    assert found[1, 1] == pytest.approx(plain[1, 1])
    by_hand = compatibility_matrix([stored[0], moved], data.test_labels, stored, data.test_labels, exclude_self=True)
    assert found[1, 0] == pytest.approx(by_hand.scores[1, 0])


def test_images_get_a_convolutional_network_that_follows_from_its_seed():
    data = planted(0)._replace(rows=np.zeros((4, 784), np.float32), widths=np.array([0, 16, 8]))
    states = [make_backbone(data, seed).state_dict() for seed in (1, 1, 2)]
    assert all(bool((states[0][name] == states[1][name]).all()) for name in states[0])
    assert not bool((states[0]["1.weight"] == states[2]["1.weight"]).all())
    assert make_backbone(planted(0), 0) == "mlp"


@pytest.mark.slow
def test_a_user_measures_the_claim_on_a_file(tmp_path):
    data = few(planted(1), 3)
    write_members(tmp_path / "mine.npz", data._asdict())
    found = measure_claim(CLAIM, data=tmp_path / "mine.npz", seeds=1)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert found.worlds[0].means["method"] == pytest.approx(trial(data, 0)["method"])
