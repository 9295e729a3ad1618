import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.special import logsumexp

from polyspan.align import InverseGraphConvolution, hubness
from polyspan.claims import measure, measure_claim
from polyspan.claims.invgc import (
    CLAIM,
    FAMILIES,
    FULL_RATES,
    GRIDS,
    LOCAL_RATES,
    Banks,
    Scene,
    csls,
    dynamic_inverted_softmax,
    first_hits,
    inverted_softmax,
    on_articles,
    on_digits,
    on_questions,
    planted,
    random_banks,
    trial,
)
from polyspan.io import write_members

NEEDS_DATA = pytest.mark.skipif(
    not Path(os.environ.get("POLYSPAN_DATA", "/nowhere")).is_dir(), reason="POLYSPAN_DATA holds no data"
)


@cache
def on(world):
    return measure(CLAIM, world, seeds=5)


def test_both_arms_try_as_many_settings():
    tried = len(FULL_RATES) ** 2 + len(LOCAL_RATES) ** 2 * len(GRIDS["local"][1])
    assert tried == sum(map(len, FAMILIES.values())) == 68
    assert "68" in CLAIM.method
    assert "68" in CLAIM.baseline


@pytest.mark.slow
def test_where_hubs_are_planted_it_gains_much_over_no_correction_and_nothing_over_the_best_other():
    found = on("planted")
    assert found.means["method"] > found.means["no correction"] + 0.25
    assert abs(found.gain) < 0.02
    assert found.verdict == "fails"


@pytest.mark.slow
def test_in_the_control_world_there_are_no_hubs_and_no_correction_gains():
    found = on(CLAIM.control)
    assert found.verdict == "fails"
    assert abs(found.means["method"] - found.means["no correction"]) < 0.01
    hubs, none = (hubness(d.queries, d.gallery).skewness for d in (planted(0), CLAIM.worlds[CLAIM.control](0)))
    assert hubs > 2.5
    assert none < 0.6


@pytest.mark.slow
def test_on_real_images_a_softmax_normaliser_is_stronger():
    found = on("digits")
    assert found.verdict == "fails"
    assert found.means["method"] > found.means["no correction"] + 0.02
    assert found.means["inverted softmax"] > found.means["method"] + 0.04
    data = on_digits(0)
    assert data.gallery.shape == data.queries.shape == (250, 128)


def test_normalisers_equal_their_formulas():
    rng = np.random.default_rng(0)
    G, Q, BG, BQ = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in rng.normal(size=(4, 30, 4)))
    scene = Scene.of(G, Q, BG, BQ)
    s, b = Q @ G.T, BQ @ G.T
    soft = np.exp(7 * s) / np.exp(7 * b).sum(axis=0)
    np.testing.assert_allclose(np.exp(inverted_softmax(scene, beta=7.0)), soft, rtol=1e-10)
    dual = soft * np.exp(3 * s) / np.exp(3 * (BG @ G.T)).sum(axis=0)
    np.testing.assert_allclose(np.exp(inverted_softmax(scene, beta=7.0, dual=3.0)), dual, rtol=1e-10)
    np.testing.assert_allclose(
        inverted_softmax(scene, beta=1e4), 1e4 * s - logsumexp(1e4 * b, axis=0), rtol=1e-9, atol=1e-6
    )
    np.testing.assert_allclose(csls(scene, k=3), 2 * s - np.sort(b, axis=0)[-3:].mean(axis=0))
    dynamic = dynamic_inverted_softmax(scene, beta=7.0)
    for i, row in enumerate(s):
        assert np.allclose(np.exp(dynamic[i]), soft[i]) == (row.argmax() in set(b.argmax(axis=1)))
    assert first_hits(np.eye(4)) == 1.0
    assert first_hits(np.ones((4, 4))) == 0.0


def test_banks_at_random_leave_the_gallery_almost_as_it_is():
    data = planted(0)
    spoilt = random_banks(data, 1)
    assert spoilt.gallery is data.gallery
    fitted = InverseGraphConvolution(0.5, 0.5).fit(spoilt.bank_gallery, queries=spoilt.bank_queries)
    moved = fitted.transform(data.gallery)
    assert np.sum(moved * data.gallery, axis=1).min() > 0.999


@pytest.mark.slow
def test_a_user_measures_the_claim_on_a_file_of_banks(tmp_path):
    data = planted(3)
    write_members(tmp_path / "mine.npz", data._asdict())
    found = measure_claim(CLAIM, data=tmp_path / "mine.npz", seeds=3)
    assert [w.role for w in found.worlds] == ["user", "control"]
    assert found.worlds[0].means["method"] == pytest.approx(trial(data, 0)["method"])
    assert found.worlds[1].verdict == "fails"


def test_rows_of_any_length_score_alike():
    data = planted(4)
    longer = Banks(*(3.0 * part for part in data))
    assert trial(longer, 0) == pytest.approx(trial(data, 0), abs=0.005)


@pytest.mark.slow
@NEEDS_DATA
def test_on_questions_the_local_form_helps_where_hubs_are_and_score_normalisers_help_more():
    there, back = (trial(on_questions(0, forward=forward), 0) for forward in (True, False))
    assert back["local"] > back["no correction"] + 0.12
    assert back["local"] > back["full"] + 0.1
    assert back["full"] > back["no correction"] + 0.01
    assert back["method"] > max(back["centring"], back["all but the top"]) + 0.05
    assert back["baseline"] > back["method"] + 0.08
    assert abs(there["method"] - there["no correction"]) < 0.02
    assert there["baseline"] > there["method"] + 0.04


@pytest.mark.slow
@NEEDS_DATA
def test_articles_have_no_cone_so_that_tuning_gains_nothing_and_a_large_rate_destroys():
    data = on_articles(0)
    scores = trial(data, 0)
    assert abs(scores["method"] - scores["no correction"]) < 0.01

    def recall_at_10(gallery):
        return np.mean((data.queries @ gallery.T).argsort(axis=1)[:, -10:] == np.arange(len(gallery))[:, None]) * 10

    with pytest.warns(UserWarning, match="above twice its limit"):
        fitted = InverseGraphConvolution(200.0, 200.0).fit(data.bank_gallery, queries=data.bank_queries)
    assert recall_at_10(fitted.transform(data.gallery)) < 0.3 * recall_at_10(data.gallery)
