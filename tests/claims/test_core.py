import gc
import json
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest

from polyspan.claims import (
    Claim,
    find_claim,
    judge,
    measure,
    measure_claim,
    read_evidence,
    read_user_data,
    write_evidence,
)
from polyspan.errors import WrongContent
from polyspan.io import write_json, write_members
from polyspan.testing import check_claim


@pytest.fixture(autouse=True)
def _nothing_old_to_collect():
    """Memory is measured after a collection, which in a process that holds many tests' modules takes half a second."""
    gc.freeze()
    yield
    gc.unfreeze()


class Sample(NamedTuple):
    values: np.ndarray


def world(effect):
    def make(seed):
        return Sample(effect + np.random.default_rng(seed).normal(scale=0.1, size=50))

    return make


def trial(data, seed):
    return {"method": float(data.values.mean()), "baseline": 0.0}


def make_claim(**changes):
    parts = {
        "slug": "canonicalize",
        "statement": "The mean is above zero.",
        "method": "sample mean",
        "baseline": "zero",
        "metric": "mean",
        "margin": 0.1,
        "worlds": {"planted": world(0.5), "weak": world(0.1), "none": world(0.0)},
        "control": "none",
        "trial": trial,
        "user_data": Sample,
        "spoil": lambda data, seed: Sample(data.values - data.values.mean()),
    }
    return Claim(**(parts | changes))


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.5, 0.52, 0.48, 0.5], "holds"),
        ([0.0, 0.01, -0.01, 0.0], "fails"),
        ([0.3, -0.3, 0.5, 0.0], "open"),
        ([0.5, 0.5], "open"),
        ([0.5, 0.5, 0.1, 0.1], "open"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(gains, verdict):
    assert judge(gains, 0.125)[0] == verdict


def test_a_gain_of_exactly_the_margin_neither_holds_nor_fails():
    assert judge([0.25, 0.25, 0.25], 0.25)[0] == "open"


def test_the_interval_covers_the_true_gain_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = judge(rng.normal(loc=1.0, size=20), 0.0)[1]
        covered += low < 1.0 < high
    assert 0.86 < covered / 200 < 0.99


def test_a_planted_effect_holds_and_none_fails():
    claim = make_claim()
    assert measure(claim, world="planted").verdict == "holds"
    assert measure(claim, world="none").verdict == "fails"
    assert measure(claim, world="none").role == "control"


def test_fewer_is_better_where_the_claim_says_so():
    flipped = make_claim(
        better="lower", trial=lambda data, seed: {"method": 0.0, "baseline": float(data.values.mean())}
    )
    found = measure(flipped, world="planted")
    assert found.verdict == "holds"
    assert found.gain == pytest.approx(0.5, abs=0.05)


def test_arms_are_paired_by_seed():
    rng = np.random.default_rng(1)
    levels = rng.normal(scale=10, size=8)
    paired = make_claim(trial=lambda data, seed: {"method": levels[seed] + 1.0, "baseline": levels[seed]})
    assert measure(paired).interval == pytest.approx((1.0, 1.0))


def test_workers_do_not_change_what_is_measured():
    claim = make_claim()
    assert measure(claim, workers=2, seeds=4).trials == measure(claim, workers=1, seeds=4).trials


def test_evidence_holds_all_that_a_repetition_needs(tmp_path):
    evidence = measure_claim(make_claim(), seeds=4)
    assert (evidence.verdict, evidence.control_ok) == ("holds", True)
    path = write_evidence(evidence, tmp_path)
    assert path.name == "canonicalize.quick.json"
    found = read_evidence(path)
    assert found["machine"]["threads"] >= 1
    assert {"polyspan", "numpy", "torch", "scikit-learn"} <= found["versions"].keys()
    main, control = found["worlds"]
    assert (main["role"], control["role"]) == ("main", "control")
    assert main["seeds"] == [0, 1, 2, 3]
    assert len(main["data_digest"]) == 64
    assert main["data_digest"] != control["data_digest"]
    assert main["interval"][0] <= main["gain"] <= main["interval"][1]
    assert measure_claim(make_claim(), seeds=4).worlds[0].data_digest == main["data_digest"]


def test_a_control_that_holds_keeps_the_claim_open():
    assert measure_claim(make_claim(worlds={"planted": world(0.5), "none": world(0.5)}), seeds=4).verdict == "open"


def test_a_main_world_that_fails_refutes_the_claim():
    refuted = make_claim(levels={"quick": ("planted", "weak")}, margin=0.3)
    assert measure_claim(refuted, seeds=5).verdict == "fails"


def test_a_users_file_runs_both_arms_and_its_own_control(tmp_path):
    path = tmp_path / "mine.npz"
    write_members(path, {"values": np.full(20, 0.7)})
    evidence = measure_claim(make_claim(), data=path, seeds=3)
    assert [w.role for w in evidence.worlds] == ["user", "control"]
    assert evidence.verdict == "holds"
    assert write_evidence(evidence, tmp_path).name == "canonicalize.user.json"


def test_a_users_file_without_the_members_is_refused(tmp_path):
    path = tmp_path / "mine.npz"
    write_members(path, {"other": np.zeros(3)})
    with pytest.raises(WrongContent, match="values"):
        read_user_data(make_claim(), path)
    with pytest.raises(ValueError, match="not possible for canonicalize"):
        read_user_data(make_claim(user_data=None), path)


def test_a_journal_of_the_same_claim_is_continued_and_of_another_is_not(tmp_path):
    calls = []

    def counting(data, seed):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return trial(data, seed)

    claim, journal = make_claim(trial=counting), tmp_path / "run.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measure_claim(claim, seeds=4, journal=journal)
    assert journal.exists()
    evidence = measure_claim(claim, seeds=4, journal=journal)
    assert len(calls) == 3 + 8 - 2
    assert not journal.exists()
    assert evidence.worlds[0].trials == measure_claim(make_claim(), seeds=4).worlds[0].trials


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"better": "more"}, "better must be"),
        ({"control": "nowhere"}, "control must be"),
        ({"levels": {"quick": ("none",)}}, "must name main worlds"),
        ({"levels": {"daily": ("planted",)}}, "levels must be among"),
    ],
)
def test_a_claim_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_claim(**changes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_arm_that_is_not_finite_is_an_error_and_no_verdict(value):
    broken = make_claim(trial=lambda data, seed: {"method": value, "baseline": 0.0})
    with pytest.raises(ValueError, match="finite numbers"):
        measure(broken)


def test_a_trial_without_a_baseline_is_an_error():
    with pytest.raises(ValueError, match="'method' and 'baseline'"):
        measure(make_claim(trial=lambda data, seed: {"method": 1.0}))


def test_unknown_worlds_levels_and_systems_are_named():
    with pytest.raises(ValueError, match="world must be one of"):
        measure(make_claim(), world="mars")
    with pytest.raises(ValueError, match="level must be"):
        measure_claim(make_claim(), level="standard")
    with pytest.raises(ValueError, match="planned"):
        find_claim("weyl-polyhedron")


def test_the_checker_catches_a_control_that_holds_and_a_trial_that_meddles():
    check_claim(make_claim())
    with pytest.raises(AssertionError, match="control world"):
        check_claim(make_claim(worlds={"planted": world(0.5), "none": world(0.5)}))

    def meddle(data, seed):
        result = trial(data, seed)
        data.values[:] = 0
        return result

    with pytest.raises(AssertionError, match="changes the data"):
        check_claim(make_claim(trial=meddle))
    wandering = iter(np.linspace(0, 0.001, 1000))
    with pytest.raises(AssertionError, match="two results"):
        check_claim(
            make_claim(trial=lambda d, s: {"method": float(d.values.mean()) + next(wandering), "baseline": 0.0})
        )


def test_a_file_that_is_no_evidence_is_refused(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"schema": 99, "slug": "x"})
    with pytest.raises(WrongContent, match="schema 1"):
        read_evidence(path)


@pytest.mark.slow
def test_a_claim_killed_in_the_middle_goes_on_and_ends_the_same(tmp_path):
    command = [
        sys.executable,
        "-m",
        "polyspan.cli",
        "claim",
        "canonicalize",
        "--seeds",
        "3",
        "--json",
        "--out",
        str(tmp_path / "evidence"),
    ]
    env = os.environ | {"POLYSPAN_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "home" / "journals" / "canonicalize.quick.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.wait()
    kept = journal.read_bytes().count(b"\n")
    assert kept >= 4
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    whole = subprocess.run(
        command, env=env | {"POLYSPAN_HOME": str(tmp_path / "other")}, capture_output=True, text=True, check=True
    )
    first, second = (json.loads(run.stdout)[0]["worlds"] for run in (again, whole))
    assert [w["trials"] for w in first] == [w["trials"] for w in second]
