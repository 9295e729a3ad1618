import numpy as np
import pytest
import torch

from polyspan.claims import measure_claim
from polyspan.claims.crate import CLAIM, Pictures, crops, on_digits, planted, recipe, transformer, trial, untrained
from polyspan.io import write_members
from polyspan.nn import CRATE


def few(seed, steps=6, vit=False):
    data = planted(seed)
    how = recipe(steps=steps, batch=16, width=16, layers=2, patch=4, shift=0, vit=vit)
    return Pictures(data.images[:80], data.labels[:80], how)


def test_without_training_the_learnt_subspaces_are_like_turned_ones():
    """One seed; that the verdict is "fails" over several is asked of every claim's control elsewhere."""
    arms = trial(CLAIM.worlds[CLAIM.control](0), 0)
    assert abs(arms["method"]) < 0.03
    assert abs(arms["baseline"]) < 0.03
    assert arms["method"] - arms["baseline"] < CLAIM.margin


@pytest.mark.slow
def test_training_makes_rates_fall_but_most_of_it_within_turned_subspaces_too():
    arms = trial(planted(0), 0)
    assert arms["method"] > 0.05
    assert arms["baseline"] > 0.5 * arms["method"]
    assert abs(arms["fall before training"]) < 0.03
    assert arms["below turned subspaces, last layer"] > 0
    assert arms["accuracy"] > 0.9


@pytest.mark.slow
def test_labels_dealt_out_anew_leave_accuracy_at_chance():
    data = planted(1)
    dealt = np.random.default_rng(0).permutation(data.labels)
    assert trial(data._replace(labels=dealt), 1)["accuracy"] < 0.4


def test_the_control_differs_by_the_training_only():
    data, spoilt = few(0, vit=True), untrained(few(0, vit=True), 0)
    np.testing.assert_array_equal(spoilt.images, data.images)
    np.testing.assert_array_equal(spoilt.recipe[1:-1], data.recipe[1:-1])
    assert spoilt.recipe[0] == spoilt.recipe[-1] == 0
    arms = trial(spoilt, 0)
    assert arms["method"] == arms["fall before training"]


def test_the_rival_has_nine_tenths_of_the_parameters_and_leaves_the_global_generator():
    state = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    ours = CRATE(28, 7, 10, 64, 6, 4, channels=1, generator=generator)
    count = sum(p.numel() for p in ours.parameters())
    rival = transformer(ours, 2, 4, generator)
    assert 0.85 < sum(p.numel() for p in rival.parameters()) / count < 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.isfinite(rival(torch.randn(2, 1, 28, 28, generator=generator))).all()
    assert "accuracy, ViT of as many parameters" in trial(few(0, vit=True), 0)


def test_photographs_and_digits_are_what_they_say():
    images, labels, how = crops(0)
    assert images.shape == (1200, 16, 16)
    assert 0 <= images.min() < images.max() <= 1
    assert np.bincount(labels).tolist() == [200] * 6
    assert how[5] == 4
    assert on_digits(0).images.shape == (1797, 8, 8)


def test_a_user_measures_the_claim_on_pictures_of_their_own(tmp_path):
    path = tmp_path / "mine.safetensors"
    write_members(path, few(1)._asdict())
    found = measure_claim(CLAIM, data=path, seeds=1)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert found.worlds[0].means["method"] == pytest.approx(trial(few(1), 0)["method"])
