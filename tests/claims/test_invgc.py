import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.base import clone
from sklearn.model_selection import ParameterGrid
from sklearn.preprocessing import normalize

from polyspan.align import InverseGraphConvolution, hubness
from polyspan.claims import measure, measure_claim
from polyspan.claims.invgc import (
    CLAIM,
    FAMILIES,
    FULL_RATES,
    GRIDS,
    LOCAL_RATES,
    NONE,
    Banks,
    allowed,
    first_hits,
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


def test_both_arms_try_as_many_settings_and_the_baseline_none_besides():
    tried = len(FULL_RATES) ** 2 + len(LOCAL_RATES) ** 2 * len(GRIDS["local"][1])
    assert tried == sum(len(ParameterGrid(grid)) for _, grid in FAMILIES.values()) == 68
    assert "68" in CLAIM.method
    assert tried + sum(len(ParameterGrid(none)) for none in NONE.values()) == 74
    assert "74" in CLAIM.baseline


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


def literal(data, name, setting):
    """Scores of all pairs by the published formulas, and not by the library's corrections."""
    s, from_queries, from_gallery = (
        rows @ data.gallery.T for rows in (data.queries, data.bank_queries, data.bank_gallery)
    )
    if name in ("centring", "all but the top"):
        top = setting.get("n_components", 0)
        sides = [(data.gallery, data.bank_gallery), (data.queries, data.bank_queries)]
        made = []
        for rows, bank in sides:
            V = np.linalg.svd(bank - bank.mean(axis=0))[2][:top]
            centred = rows - bank.mean(axis=0)
            made.append(normalize(centred - centred @ V.T @ V))
        return (made[1] if setting["sides"] == "both" else data.queries) @ made[0].T
    if name == "CSLS":
        return 2 * s - np.sort(from_queries, axis=0)[-setting["n_neighbors"] :].mean(axis=0)
    if name == "dual-bank softmax":
        betas = setting["beta_query"], setting["beta_gallery"]
        return sum(
            beta * s - logsumexp(beta * b, axis=0) for beta, b in zip(betas, (from_queries, from_gallery), strict=True)
        )
    soft = setting["beta"] * s - logsumexp(setting["beta"] * from_queries, axis=0)
    if name == "inverted softmax":
        return soft
    return np.where(np.isin(s.argmax(axis=1), from_queries.argmax(axis=1))[:, None], soft, s)


def test_every_arm_is_what_its_published_formula_gives_under_the_setting_that_tuning_chose():
    data = planted(0, n=80)
    unit = Banks(*map(normalize, data))
    arms = trial(data, 0)
    for name, (estimator, grid) in FAMILIES.items():
        fitted = clone(estimator).fit(unit.bank_gallery, queries=unit.bank_queries)
        settings = [NONE[name], *allowed(fitted, grid)]
        choice = fitted.tune(unit.tune_gallery, unit.tune_queries, grid=settings)
        assert len(choice.table) == 1 + len(ParameterGrid(grid))
        best = max(
            first_hits(literal(unit._replace(gallery=unit.tune_gallery, queries=unit.tune_queries), name, setting))
            for setting in ParameterGrid(grid)
        )
        none = first_hits(unit.tune_queries @ unit.tune_gallery.T)
        assert choice.score == max(best, none)
        off = choice.params == dict.fromkeys(NONE[name])
        expected = unit.queries @ unit.gallery.T if off else literal(unit, name, choice.params)
        assert arms[name] == first_hits(expected)
    assert first_hits(np.eye(4)) == 1.0
    assert first_hits(np.ones((4, 4))) == 0.0


def test_banks_that_are_too_small_for_some_settings_leave_them_out():
    data = Banks(*(part[:, :8] for part in planted(0, n=40)))
    small = data._replace(bank_gallery=data.bank_gallery[:60], bank_queries=data.bank_queries[:30])
    fitted = clone(FAMILIES["CSLS"][0]).fit(small.bank_gallery, queries=small.bank_queries)
    assert max(allowed(fitted, FAMILIES["CSLS"][1])[0]["n_neighbors"]) == 30
    fitted = clone(FAMILIES["all but the top"][0]).fit(small.bank_gallery, queries=small.bank_queries[:4])
    assert allowed(fitted, FAMILIES["all but the top"][1])[0]["n_components"] == [1, 2, 3]
    assert trial(data, 0)["no correction"] > 0


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
