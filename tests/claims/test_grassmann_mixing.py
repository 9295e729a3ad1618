import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from polyspan.claims import measure_claim
from polyspan.claims.grassmann_mixing import (
    CLAIM,
    KEYS,
    OFFSETS,
    RATES,
    SMALL,
    Text,
    far_recall,
    network,
    planted,
    python_help,
    trial,
)
from polyspan.io import write_members
from polyspan.run import torch_generator


@cache
def on_small(world):
    """One trial a world, at the one of the two rates that both arms choose in these."""
    data = {"planted": planted, "recall": lambda seed: far_recall(python_help(seed), seed)}[world](0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polyspan.claims.grassmann_mixing.RATES", RATES[1:])
        return trial(data, 0)


@pytest.mark.slow
def test_planes_learn_a_language_of_words_as_fast_as_attention_and_faster():
    found = on_small("planted")
    assert found["method"] < found["baseline"] + CLAIM.margin
    assert 1 < found["method"] < 2.55


@pytest.mark.slow
def test_the_control_refutes_it_as_what_is_asked_lies_out_of_reach():
    found = on_small("recall")
    assert found["baseline"] < 1
    assert found["method"] == pytest.approx(math.log(len(KEYS)), abs=0.06)


def test_the_arms_are_of_one_size():
    found = on_small("planted")
    assert 0.9 < found["method, parameters"] / found["baseline, parameters"] < 1.02
    sizes = {
        mixer: sum(p.numel() for p in network(80, [64, 3, 16, 128], mixer, torch_generator(0)).parameters())
        for mixer in ("grassmann", "attention", "concatenation", "none")
    }
    assert sizes["none"] < sizes["concatenation"] < sizes["attention"]
    assert abs(sizes["grassmann"] / sizes["attention"] - 1) < 0.03


def test_the_margin_is_fifteen_percent_of_perplexity_a_word():
    assert math.exp(-5.6 * CLAIM.margin) == pytest.approx(1.15, abs=0.003)


def test_spoilt_text_asks_for_the_first_byte_of_each_piece_beyond_the_reach_of_all_layers():
    data = planted(0, length=6000)
    made = far_recall(data, 0)
    piece = int(made.recipe[3])
    rows = made.train.reshape(-1, piece)
    assert made.recipe[7] == 1
    assert (rows[:, -1:] == rows[:, :3]).all()
    assert set(rows[:, -1].tolist()) == set(KEYS)
    # The last byte is predicted at the place before it, which sees no further back than this.
    assert piece - 2 - max(OFFSETS) * made.recipe[1] > 2
    kept = data.train[: rows.size].reshape(-1, piece)
    np.testing.assert_array_equal(rows[:, 3:-1], kept[:, 3:-1])
    assert len(RATES) > 1


def test_a_recipe_of_another_length_is_refused():
    with pytest.raises(ValueError, match="recipe must hold 8 numbers, as Text says, got 3"):
        trial(Text(*planted(0, length=600)[:2], np.ones(3)), 0)


def test_worlds_hold_what_they_say():
    data = python_help(0)
    assert b"class" in bytes(data.train)
    assert b"statement" in bytes(data.test)
    assert bytes(data.test[:400]) not in bytes(data.train)
    language = planted(3)
    words = bytes(language.train).split(b" ")[1:-1]
    followers = {}
    for first, second in pairwise(words):
        followers.setdefault(first, set()).add(second)
    assert max(len(f) for f in followers.values()) <= 12
    np.testing.assert_array_equal(language.recipe, SMALL)


def test_a_user_measures_the_claim_on_texts_of_their_own(tmp_path):
    data = planted(1, length=12_000)
    path = tmp_path / "mine.npz"
    write_members(path, Text(data.train, data.test, np.array([16, 1, 4, 24, 4, 12, 1, 0]))._asdict())
    found = measure_claim(CLAIM, data=path, seeds=1)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert {"concatenation, same offsets", "no mixing"} <= set(found.worlds[0].means)
