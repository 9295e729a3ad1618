import numpy as np
import pytest
import torch

from polyspan.claims import measure_claim
from polyspan.claims.mhs_vm import (
    CLAIM,
    Pictures,
    block_kinds,
    flatten,
    largest,
    network,
    on_digits,
    on_photographs,
    recipe,
    shades,
    trial,
)
from polyspan.io import write_members


def few(seed, *, dear=False, dense=False):
    """Hardly any training on small pictures, for the mechanics."""
    data = on_photographs(seed, n=40, side=8) if dense else shades(seed, n=60)
    return data._replace(recipe=recipe(3, 8, 8, 1, 2, 2, 1, dear))


def test_where_any_pixel_tells_the_class_both_arms_are_right_and_nothing_is_gained():
    """One seed; that the verdict is "fails" over several is asked of every claim's control elsewhere."""
    arms = trial(shades(0), 0)
    assert min(arms["method"], arms["baseline"]) > 0.98
    assert arms["method"] - arms["baseline"] < CLAIM.margin


def test_on_digits_both_arms_learn_and_the_method_is_smaller_and_no_better():
    arms = trial(on_digits(0), 0)
    assert min(arms["method"], arms["baseline"]) > 0.6
    assert arms["baseline"] > arms["method"]
    assert arms["parameters of blocks, share of the baseline's"] < 0.6


def test_on_photographs_both_arms_beat_calling_everything_moon():
    data = on_photographs(0)
    everything = 2 * data.targets.mean() / (1 + data.targets.mean())
    arms = trial(data, 0)
    assert min(arms["method"], arms["baseline"]) > everything + 0.05


def test_no_label_of_the_images_left_out_reaches_training():
    data = few(0)
    order = np.random.default_rng([0, 2]).permutation(60)
    labels = data.targets.copy()
    labels[order[42:]] = (labels[order[42:]] + 1) % 3
    plain, changed = trial(data, 0), trial(data._replace(targets=labels), 0)
    shown = "parameters of blocks, share of the baseline's"
    assert plain != changed
    assert plain[shown] == changed[shown]
    # A trial with the same labels for training can only differ in what it is scored on.
    back = trial(data._replace(targets=np.where(np.isin(np.arange(60), order[:42]), labels, data.targets)), 0)
    assert back == plain


def test_arms_differ_in_their_blocks_alone():
    arms = {
        name: network(kind, 8, 2, 2, 3, False, torch.Generator().manual_seed(1))
        for name, kind in block_kinds(2).items()
    }
    outside = {
        name: {key: value for key, value in net.state_dict().items() if not key.startswith("blocks")}
        for name, net in arms.items()
    }
    assert all(torch.equal(outside["method"][k], v) for k, v in outside["baseline"].items())
    assert arms["routes summed"].blocks[0].mix.scan.merge == "sum"
    assert not list(arms["no scan"].blocks[0].mix.parameters())
    assert {tuple(net(torch.zeros(1, 4, 4)).shape) for net in arms.values()} == {(1, 3)}


def test_the_dearer_arms_are_scored_where_the_recipe_asks_for_them():
    assert set(trial(few(1, dear=True), 1)) - set(trial(few(1), 1)) == {"routes summed", "no scan"}


def test_worlds_hold_what_they_say():
    data = on_photographs(0)
    inside, outside = data.images[data.targets == 1], data.images[data.targets == 0]
    assert abs(inside.mean() - outside.mean()) < 0.2
    assert abs(inside.std() - outside.std()) < 0.3
    assert 0.15 < data.targets.mean() < 0.5
    where = data.targets.mean(axis=0)  # a mask lies anywhere
    assert np.abs(where - where.mean()).max() < 0.14
    blobs = largest(0, n=40)
    bright = blobs.images > 0.65
    assert np.mean(bright[blobs.targets == 1]) > 0.8
    others = (bright & (blobs.targets == 0)).sum(axis=(1, 2))
    assert (others < blobs.targets.sum(axis=(1, 2)) + 40).all()
    assert np.median(others) > 40
    flat = flatten(data, 0)
    np.testing.assert_allclose(flat.images.std(axis=(1, 2)), 0, atol=1e-6)
    np.testing.assert_array_equal(flat.targets, data.targets)


def test_a_user_measures_the_claim_on_masks_of_their_own(tmp_path):
    data, path = few(2, dense=True), tmp_path / "mine.npz"
    write_members(path, data._asdict())
    found = measure_claim(CLAIM, data=path, seeds=1)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert found.worlds[0].means["method"] == pytest.approx(trial(Pictures(*data), 0)["method"])
