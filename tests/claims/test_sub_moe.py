import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from polyspan.checkpoints.expert_merging import RIVALS
from polyspan.claims import measure
from polyspan.claims.sub_moe import CLAIM, KEPT, STEPS, all_equal, cross_entropy, on_reference, on_wikitext, prepare

pytest.importorskip("transformers")
NEEDS_DATA = pytest.mark.skipif(
    not Path(os.environ.get("POLYSPAN_DATA", "/nowhere")).is_dir(), reason="POLYSPAN_DATA holds no data"
)


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory):
    """Models are trained for these tests, and kept no longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYSPAN_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def briefly(monkeypatch):
    """A third of the training, for what does not depend on how well a model was trained."""
    monkeypatch.setitem(STEPS, "quick", (100, 20))


@cache
def on(world):
    return measure(CLAIM, world, seeds=1)


@pytest.mark.slow
def test_every_rival_is_an_arm_on_the_same_tokens_at_the_same_numbers():
    found = on("scratch").means
    assert {"method", "baseline", "recommended", "unmerged, in all"} <= found.keys()
    assert set(RIVALS) - set(found) == {"published", "frequency pruning"}
    assert KEPT == (6, 4)
    for whole, name in (("baseline", "frequency pruning"), ("recommended", "recommended")):
        assert found[whole] == pytest.approx(np.mean([found[f"{name}, to {kept}"] for kept in KEPT]))


def test_what_the_text_says_of_the_recommended_procedure_is_measured_by_levels():
    assert CLAIM.levels["quick"] == ("scratch", "recommended")
    assert {"wikitext", "wikitext-recommended", "wikitext-upcycled"} == set(CLAIM.levels["standard"])
    assert on_reference(0, recommended=True).recommended.all()


@pytest.mark.slow
def test_averages_of_experts_trained_from_scratch_lose_more_than_dropping_the_least_used():
    found = on("scratch")
    assert found.gain < -10 * CLAIM.margin
    assert found.means["keep"] < found.means["method"]


@pytest.mark.slow
def test_matching_neurons_and_fitting_the_down_map_loses_a_fraction_of_that():
    found = on("recommended")
    assert found.means["method"] < 0.3 * found.means["published"]
    assert found.gain > -2 * CLAIM.margin
    assert found.means["method"] == on("scratch").means["recommended"]
    assert found.means["published"] == on("scratch").means["method"]
    assert found.means["baseline"] == on("scratch").means["baseline"]


@pytest.mark.slow
def test_the_control_refutes_it_where_all_experts_do_the_same(briefly):
    found = measure(CLAIM, CLAIM.control, seeds=1)
    assert abs(found.gain) < 1e-5
    assert all(abs(found.means[name]) < 1e-4 for name in ("method", "baseline", "keep", "recommended"))


def test_models_are_the_same_for_the_same_text_and_equal_experts_are_equal(briefly):
    data = on_reference(0)
    model, calibrating, scored = prepare(data, 0)
    again, *pieces = prepare(all_equal(data, 0), 0)
    assert all(torch.equal(a, b) for a, b in zip((calibrating, scored), pieces, strict=True))
    for ours, theirs in zip(model.model.layers, again.model.layers, strict=True):
        assert torch.equal(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)
        assert torch.equal(theirs.mlp.experts.down_proj[0], theirs.mlp.experts.down_proj[7])
        assert torch.equal(theirs.mlp.experts.down_proj[0], ours.mlp.experts.down_proj[0])
    assert cross_entropy(model, scored) < np.log(512) - 1
    assert calibrating.shape == (128, 48)


@NEEDS_DATA
def test_real_text_is_split_for_training_and_scoring():
    data = on_wikitext(0)
    assert data.large.all()
    assert len(data.train) > 10**6
    assert bytes(data.test[:5000]) not in bytes(data.train)
