import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from polyspan.claims import measure, measure_claim
from polyspan.claims.s2cag import CLAIM, Vertices, planted, sampled, shuffle_attributes, trial
from polyspan.io import write_members


@cache
def on(world):
    return measure(CLAIM, world)


@pytest.mark.slow
def test_in_the_control_world_the_method_loses_what_it_lives_on():
    control, main = on("shuffled"), on("planted")
    assert control.verdict == "fails"
    assert control.means["method"] < 0.4
    assert main.means["method"] > 0.9
    assert control.means["method"] < control.means["spectral, graph only"]


@pytest.mark.slow
def test_links_and_words_together_beat_either_alone_where_planted():
    means = on("planted").means
    assert means["method"] > means["k-means, TF-IDF"] + 0.1
    assert means["method"] > means["spectral, graph only"] + 0.1


@pytest.mark.slow
def test_on_planted_groups_smoothing_alone_does_as_well():
    assert on("planted").verdict == "fails"
    assert abs(on("planted").gain) < 0.02


def test_shuffling_moves_whole_rows_of_attributes_and_nothing_else():
    data = planted(0)
    spoilt = shuffle_attributes(data, 3)
    np.testing.assert_array_equal(spoilt.edges, data.edges)
    np.testing.assert_array_equal(spoilt.labels, data.labels)
    rows, others = (np.sort(d.attributes.toarray() @ np.arange(1, 301)) for d in (data, spoilt))
    np.testing.assert_array_equal(rows, others)
    assert (spoilt.attributes != data.attributes).nnz > 0


def test_a_user_measures_the_claim_on_a_file_of_edges_rows_and_classes(tmp_path):
    data = planted(1)
    path = tmp_path / "mine.safetensors"
    write_members(path, data._replace(attributes=data.attributes.toarray())._asdict())
    found = measure_claim(CLAIM, data=path, seeds=1)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert found.worlds[0].means["method"] == pytest.approx(trial(data, 0)["method"])


def test_signed_attributes_are_compared_without_word_weights():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    X = rng.normal(size=(3, 8))[labels] * 2 + rng.normal(size=(90, 8))
    pairs = np.array([(i, j) for c in range(3) for i, j in rng.choice(np.flatnonzero(labels == c), (60, 2))]).T
    scores = trial(Vertices(pairs, X, labels), 0)
    assert scores["method"] > 0.95
    assert scores["baseline"] >= scores["k-means, smoothed unit rows"]


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(os.environ.get("POLYSPAN_DATA", "/nowhere")).is_dir(), reason="POLYSPAN_DATA holds no data"
)
def test_public_graphs_score_as_stated():
    acm, citeseer = (trial(sampled(name, 0), 0) for name in ("acm", "citeseer"))
    assert acm["method"] > 0.92
    assert acm["method"] > acm["k-means, TF-IDF"] + 0.03
    assert acm["method"] > acm["k-means, smoothed unit rows"] + 0.2
    assert citeseer["method"] > citeseer["k-means, TF-IDF"]
    assert abs(citeseer["method"] - citeseer["baseline"]) < 0.06
