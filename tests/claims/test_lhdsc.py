import numpy as np
import pytest

from polyspan.claims.lhdsc import CLAIM, on_digits, planted, scramble, trial
from polyspan.linalg import clustering_accuracy


@pytest.fixture(scope="module")
def small():
    data = planted(0)
    rows = np.flatnonzero(data.labels < 3)
    return data._replace(rows=data.rows[rows], labels=data.labels[rows])


def test_the_worlds_hold_what_they_say():
    data = planted(1)
    assert data.rows.shape == (150, 20)
    own = [np.linalg.svd(data.rows[data.labels == c], compute_uv=False) for c in range(6)]
    # Four directions hold nearly everything of a class, noise the rest.
    assert all(np.sum(s[:4] ** 2) > 0.6 * np.sum(s**2) for s in own)
    digits = on_digits(0)
    assert digits.rows.shape == (300, 8, 8)
    assert int(digits.dimension[0]) == 12
    assert np.array_equal(on_digits(0).labels, digits.labels)


def test_scrambling_keeps_the_values_of_a_row_and_loses_its_class(small):
    mixed = scramble(small, 0)
    np.testing.assert_array_equal(np.sort(mixed.rows, axis=1), np.sort(small.rows, axis=1))
    assert not np.array_equal(mixed.rows, small.rows)
    np.testing.assert_array_equal(mixed.labels, small.labels)


@pytest.mark.slow
def test_a_trial_scores_every_arm_on_the_same_rows_and_repeats(small):
    found = trial(small, 0)
    assert found == trial(small, 0)
    assert {"method", "baseline", "elastic net", "matching pursuit", "k-means"} <= found.keys()
    assert all(0 <= value <= 1 for value in found.values())
    assert found["baseline"] > 0.9


def test_labels_reach_no_arm(small):
    """Labels dealt out anew change the scores only as the score of the same clusters against them."""
    from polyspan.cluster import DeepSelfExpressiveClustering

    options = {"subspace_dim": 4, "device": "cpu", "random_state": 0, "solver": "ridge", "structure": False}
    fitted = DeepSelfExpressiveClustering(3, **options)
    labels = np.random.default_rng(0).permutation(small.labels)
    made = fitted.fit(small.rows, labels).labels_
    assert clustering_accuracy(small.labels, made) > 0.9


def test_the_claim_says_what_it_shares():
    assert CLAIM.control == "scrambled"
    assert CLAIM.margin > 0
