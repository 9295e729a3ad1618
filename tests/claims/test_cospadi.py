import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from polyspan.checkpoints.layer_calibration import whiten
from polyspan.claims import measure, measure_claim
from polyspan.claims.cospadi import CLAIM, Layer, cross_entropy, on_wikitext, one_layer, one_subspace, settings, wrongly
from polyspan.io import write_members

NEEDS_DATA = pytest.mark.skipif(
    not Path(os.environ.get("POLYSPAN_DATA", "/nowhere")).is_dir(), reason="POLYSPAN_DATA holds no data"
)


@cache
def on(world):
    return measure(CLAIM, world, seeds=3)


@pytest.mark.slow
def test_dictionaries_lose_less_than_a_truncated_svd_of_the_same_bytes():
    found = on("layer")
    assert found.verdict == "holds"
    order = ["method", "K-SVD as published", "orthogonal", "threshold", "baseline", "ASVD"]
    costs = [found.means[name] for name in order]
    assert costs == sorted(costs)
    assert found.means["baseline"] == 1


@pytest.mark.slow
def test_the_control_refutes_it_where_one_subspace_holds_all_outputs():
    found = on("one-subspace")
    assert (found.role, found.verdict) == ("control", "fails")
    assert found.means["method"] > 2


def test_a_transposed_whitening_costs_part_of_the_gain():
    assert on("layer").means["K-SVD, wrong whitening"] > on("layer").means["method"] + 0.05
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)))
    C = whiten(X.mT @ X).factor
    A = torch.from_numpy(rng.normal(size=(6, 3)))
    slipped = float((A * (wrongly(X.mT @ X) @ A)).sum())
    assert slipped == pytest.approx(float((C @ A).square().sum()), rel=1e-9)


def test_every_arm_counts_the_same_bytes():
    assert {arm.word_bytes for arm in settings().values()} == {2}
    assert {arm.index_cost for arm in settings().values()} == {"bitmask"}
    assert one_subspace(0).weight.shape == one_layer(0).weight.shape
    assert not np.array_equal(one_layer(0).inputs, one_layer(0).held_out)


@pytest.mark.slow
def test_a_user_measures_the_claim_on_a_layer_of_their_own(tmp_path):
    write_members(tmp_path / "mine.npz", one_layer(5, d_in=32, d_out=48)._asdict())
    found = measure_claim(CLAIM, data=tmp_path / "mine.npz", seeds=3)
    assert found.verdict == "holds"
    assert found.control_ok
    write_members(tmp_path / "tiny.npz", one_layer(5, d_in=1, d_out=3, n=9)._asdict())
    with pytest.raises(ValueError, match=r"weight must be large enough to gain, got shape \(1, 3\)"):
        measure_claim(CLAIM, data=tmp_path / "tiny.npz", seeds=1)


@pytest.mark.slow
def test_a_trained_model_loses_less_by_dictionaries(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("POLYSPAN_HOME", str(tmp_path))
    found = measure(CLAIM, "reference", seeds=1)
    assert found.gain > CLAIM.margin
    assert found.means["method"] < found.means["orthogonal"] < 1
    assert found.means["SVD-LLM's own cost"] > 0.01


def test_the_score_is_the_mean_over_next_tokens():
    class Model(torch.nn.Module):
        def forward(self, ids):
            logits = torch.nn.functional.one_hot((ids + 1) % 7, 7).float()
            return type("Out", (), {"logits": logits})

    ids = torch.arange(70).view(5, 14) % 7
    expected = -float(torch.log_softmax(torch.tensor([1.0] + [0.0] * 6), 0)[0])
    assert cross_entropy(Model(), ids) == pytest.approx(expected, rel=1e-5)


@NEEDS_DATA
def test_the_real_text_is_read():
    data = on_wikitext(0, ratio=0.2)
    assert len(data.train) > 500_000
    assert len(data.test) > 50_000
    assert data.ratio.tolist() == [0.2]
    assert Layer._fields[0] == "weight"
