import numpy as np
import pytest

from polyspan.align import OrthogonalMap, RidgeMap
from polyspan.claims import measure
from polyspan.claims.canonicalize import (
    CLAIM,
    Captioned,
    Upgraded,
    captions,
    first_answers,
    on_digits,
    planted,
    shuffle_texts,
    trial,
    two_towers,
)
from polyspan.data import digits
from polyspan.linalg import top_k


@pytest.fixture
def only_linear(monkeypatch):
    """Leave the residual MLP out, which stands beside the arms that are compared and takes the longest."""
    monkeypatch.setattr("polyspan.claims.canonicalize.ResidualMLPMap", lambda **_: RidgeMap())


@pytest.mark.slow
@pytest.mark.usefixtures("only_linear")
def test_the_claim_holds_on_digits():
    assert measure(CLAIM, world="digits", seeds=5).verdict == "holds"


@pytest.mark.slow
@pytest.mark.usefixtures("only_linear")
def test_the_claim_fails_in_its_control_world_and_not_where_planted():
    assert measure(CLAIM, world=CLAIM.control, seeds=3).verdict == "fails"
    assert measure(CLAIM, world="planted", seeds=3).gain > 0


@pytest.mark.usefixtures("only_linear")
def test_no_arm_loses_by_the_length_of_what_it_carries(monkeypatch):
    class Shrinking(RidgeMap):
        def transform(self, X):
            return 0.1 * super().transform(X)

    plain = trial(planted(1), 1)
    monkeypatch.setattr("polyspan.claims.canonicalize.RidgeMap", Shrinking)
    assert trial(planted(1), 1) == plain


def test_captions_name_the_digit_and_put_every_measure_into_thirds():
    pixels, labels = digits()
    words = captions(pixels.reshape(-1, 8, 8), labels)
    np.testing.assert_array_equal(words[:, :10].argmax(axis=1), labels)
    np.testing.assert_array_equal(words.sum(axis=1), np.full(len(words), 4.0))
    shares = words[:, 10:].mean(axis=0)
    assert shares.min() > 0.28
    assert shares.max() < 0.39


def test_a_heavier_image_is_never_called_lighter():
    images = np.zeros((9, 8, 8))
    for i in range(9):
        images[i, 2:6, 2 : 3 + i // 2] = 0.1 * (i + 1)
    ink = captions(images, np.zeros(9, dtype=int))[:, 10:13].argmax(axis=1)
    assert (np.diff(ink) >= 0).all()


def test_a_two_tower_model_learns_to_match_what_it_saw_described():
    pixels, labels = digits()
    words = captions(pixels.reshape(-1, 8, 8), labels)
    eye, mouth = two_towers(pixels[:600], words[:600], 0, hidden=128, d=64, epochs=60)
    kinds = np.unique(words, axis=0)
    found = top_k(eye(pixels[600:900]), mouth(kinds), 1).indices[:, 0]
    right = kinds[found][:, :10].argmax(axis=1) == labels[600:900]
    assert right.mean() > 0.8


@pytest.mark.slow
def test_anchors_and_scored_captions_have_no_caption_in_common_and_the_world_repeats():
    first, second = on_digits(3), on_digits(3)
    assert isinstance(first, Captioned)
    for mine, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(mine, other)
    own = top_k(first.texts_a, first.texts_a, 1).indices[:, 0]
    np.testing.assert_array_equal(own, np.arange(len(own)))
    assert len(first.anchors) < len(first.images_a) / 4


def test_shuffled_texts_leave_nothing_to_find():
    scores = trial(shuffle_texts(planted(0), 0), 0)
    assert max(scores.values()) < 0.05


def test_recentring_texts_is_what_the_aligner_does_with_means_of_a_modality():
    world = planted(1)
    fitted = OrthogonalMap().fit(world.images_a, world.images_b).add_modality("text", world.texts_a, world.texts_b)
    plain = fitted.transform(world.texts_a)
    moved = plain - plain.mean(axis=0) + world.texts_b.mean(axis=0)
    np.testing.assert_allclose(fitted.transform(world.texts_a, modality="text"), moved, atol=1e-9)


def test_an_upgrade_by_a_turn_finds_the_class_again_and_one_by_unpaired_anchors_does_not():
    rng = np.random.default_rng(0)
    centres, labels, asked = 4 * rng.normal(size=(6, 12)), np.arange(300) % 6, np.arange(90) % 6
    new, queries = centres[labels] + rng.normal(size=(300, 12)), centres[asked] + rng.normal(size=(90, 12))
    turn = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    store = Upgraded(new @ turn, new, labels, queries @ turn, queries, asked, rng.choice(300, size=60, replace=False))
    assert first_answers(store, OrthogonalMap()) == 1.0
    unpaired = store._replace(new=rng.permutation(new))
    assert first_answers(unpaired, OrthogonalMap()) < 0.5
