import numpy as np
import pytest
import torch

from polyspan.claims import measure_claim
from polyspan.claims.ulsam import (
    BLOCKS,
    CLAIM,
    PLACE,
    Pictures,
    everywhere,
    flatten,
    network,
    on_digits,
    planted,
    trial,
    variants,
)
from polyspan.io import write_members
from polyspan.nn import ULSAM

FACTS = ("attention", "largest", "distance", "parameters", "multiply")


def few(seed, *, dear=0):
    """Hardly any training on small pictures, for the mechanics."""
    data = planted(seed, n=150, side=8)
    return data._replace(recipe=np.array([0.6, 1, dear]))


@pytest.mark.slow
def test_where_no_place_is_worth_more_than_another_every_arm_is_right_and_nothing_is_gained():
    """One seed; that the verdict is "fails" over several is asked of every claim's control elsewhere."""
    arms = trial(everywhere(0), 0)
    assert min(arms[name] for name in ("method", "baseline", "whole network")) > 0.98
    assert arms["method"] - arms["baseline"] < CLAIM.margin


@pytest.mark.slow
def test_on_digits_a_sixth_goes_the_network_stays_good_and_the_attention_learns():
    arms = trial(on_digits(0), 0)
    assert arms["parameters left, share"] < 0.85
    assert arms["multiply-adds left, share"] < 0.85
    assert arms["method"] > 0.93
    assert arms["method"] > arms["whole network"] - 0.03
    assert arms["attention against uniform, nats"] > 0.05
    assert arms["largest attention, times uniform"] > 1.5
    assert arms["distance of two groups' attention, L1"] > 0.2


def test_arms_start_from_the_same_weights_and_differ_in_one_block():
    generator, example = torch.Generator().manual_seed(0), torch.zeros(1, 1, 8, 8)
    whole = network(8, 4, generator)
    state = torch.random.get_rng_state()
    arms = variants(whole, example, generator, dear=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(arms) == 7
    kept = {key: value for key, value in whole.state_dict().items() if not key.startswith(f"{PLACE}.")}
    for name, model in arms.items():
        found = {key.replace(".block.", "."): value for key, value in model.state_dict().items()}
        assert all(torch.equal(found[key], value) for key, value in kept.items()), name
        assert model is not whole
    assert isinstance(arms["method"].get_submodule(PLACE), ULSAM)
    assert arms["method"].get_submodule(PLACE).num_groups == 4
    assert not list(arms["baseline"].get_submodule(PLACE).parameters())
    equal = [type(layer).__name__ for layer in whole.features]
    assert equal.count("InvertedResidual") == BLOCKS + 1


def test_no_label_of_the_images_left_out_reaches_training():
    data = few(0)
    order = np.random.default_rng([0, 1]).permutation(150)
    labels = data.labels.copy()
    labels[order[90:]] = (labels[order[90:]] + 1) % 6
    plain, changed = trial(data, 0), trial(data._replace(labels=labels), 0)
    facts = [name for name in plain if name.startswith(FACTS)]
    assert len(facts) == 5
    assert {name: plain[name] for name in facts} == {name: changed[name] for name in facts}
    assert plain != changed


def test_the_dearer_arms_are_scored_where_the_recipe_asks_for_them():
    assert set(trial(few(1, dear=1), 1)) - set(trial(few(1), 1)) == {
        "replaced, one group",
        "replaced by squeeze-and-excitation",
        "replaced by CBAM",
        "inserted after the last block",
    }


def test_worlds_hold_what_they_say():
    data = planted(0)
    loud = np.abs(data.images) > 1.2
    rows, columns = loud.any(axis=2).sum(axis=1), loud.any(axis=1).sum(axis=1)
    assert np.median(rows) <= 5
    assert np.median(columns) <= 5
    tiled = everywhere(0)
    blocks = tiled.images.reshape(-1, 3, 3, 3, 3).mean(axis=(1, 3))
    for label in range(6):
        glyph = np.sign(blocks[tiled.labels == label])
        assert np.mean(glyph == glyph[0]) > 0.99
    flat = flatten(data, 0)
    np.testing.assert_allclose(flat.images.std(axis=(1, 2)), 0, atol=1e-6)
    np.testing.assert_array_equal(flat.labels, data.labels)


def test_a_user_measures_the_claim_on_pictures_of_their_own(tmp_path):
    data, path = few(2), tmp_path / "mine.npz"
    write_members(path, data._asdict())
    found = measure_claim(CLAIM, data=path, seeds=1)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert found.worlds[0].means["method"] == pytest.approx(trial(Pictures(*data), 0)["method"])
