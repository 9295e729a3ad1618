import numpy as np
import pytest

from polyspan.claims import measure
from polyspan.claims.grassmann_class import (
    CLAIM,
    Embedded,
    clafic,
    crowded,
    on_digits,
    redraw,
    separate,
    shifted,
    trial,
)


@pytest.mark.slow
def test_trained_subspaces_win_where_classes_share_strong_directions():
    found = measure(CLAIM, world="crowded", seeds=3)
    assert found.verdict == "holds"
    assert found.gain > 0.2
    assert found.means["logistic regression"] < 0.35


@pytest.mark.slow
def test_the_control_refutes_it_where_pca_is_the_answer_already():
    assert measure(CLAIM, world=CLAIM.control, seeds=3).verdict == "fails"


@pytest.mark.slow
def test_no_linear_classifier_reads_the_world_of_separate_subspaces_but_subspaces_do():
    arms = trial(separate(0), 0)
    assert max(arms["logistic regression"], arms["cosine softmax"]) < 0.35
    assert min(arms["method"], arms["baseline"]) > 0.9


@pytest.mark.slow
def test_classes_that_differ_by_their_mean_only_are_no_place_for_subspaces():
    arms = trial(shifted(0), 0)
    assert arms["logistic regression"] > arms["one trained direction a class"] > arms["method"] + 0.1


@pytest.mark.slow
def test_every_arm_beats_chance_on_digits_and_subspaces_beat_vectors():
    arms = trial(on_digits(0), 0)
    assert min(arms.values()) > 0.9
    assert arms["method"] > arms["logistic regression"] + 0.005
    assert arms["method"] > arms["one trained direction a class"] + 0.01


def test_untrained_arm_takes_each_class_in_order_and_spans_it():
    X, y = crowded(1, n_per=20, noise=0.0)
    bases = clafic(X, y, 12)
    for c in range(8):
        rows = X[y == c]
        np.testing.assert_allclose(rows @ bases[c] @ bases[c].T, rows, atol=1e-4)


def test_redrawing_keeps_labels_and_each_class_second_moment_in_its_leading_directions():
    data = on_digits(0)
    made = redraw(data, 0)
    assert isinstance(made, Embedded)
    np.testing.assert_array_equal(made.labels, data.labels)
    for c in range(10):
        before, after = (d.embeddings[data.labels == c] for d in (data, made))
        top = np.linalg.svd(before, full_matrices=False)[2][0]
        np.testing.assert_allclose(np.mean((after @ top) ** 2), np.mean((before @ top) ** 2), rtol=0.35)
