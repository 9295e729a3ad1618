"""What the commands about maps, stores and galleries say where something is amiss."""

import json
import warnings

import numpy as np
import pytest

from polyspan.align import load_aligner, plan_upgrade
from polyspan.cli import run
from polyspan.cli.align import fit
from polyspan.cli.compare import compare
from polyspan.cli.compat import train
from polyspan.cli.doctor import doctor
from polyspan.cli.retrieve import debias
from polyspan.io import write_array

RNG = np.random.default_rng(0)


@pytest.fixture
def pair(tmp_path):
    rows = RNG.normal(size=(120, 6)).astype(np.float32)
    write_array(tmp_path / "a.npy", rows)
    write_array(tmp_path / "b.npy", rows @ np.linalg.qr(RNG.normal(size=(6, 6)))[0].astype(np.float32))
    return tmp_path


def test_the_relaxed_orthogonal_adapter_is_a_method(pair, capsys):
    out = pair / "m.safetensors"
    fit(pair / "a.npy", pair / "b.npy", out=out, method="relaxed-orthogonal", json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["held_out"]["cosine"]["after"] > 0.95
    assert run(["align", "score", str(out), str(pair / "a.npy"), str(pair / "b.npy")]) == 0


def test_an_all_zero_row_is_named_by_its_row_in_the_file(pair):
    rows = np.load(pair / "a.npy")
    rows[5] = 0
    write_array(pair / "zero.npy", rows)
    with pytest.raises(ValueError, match=r"zero\.npy must have no all-zero row .* got one at row 5"):
        fit(pair / "zero.npy", pair / "b.npy", out=pair / "m.safetensors")


def test_few_shuffles_are_said_to_tell_nothing(pair, capsys):
    compare(pair / "a.npy", pair / "a.npy", shuffles=5, json=True)
    caught = capsys.readouterr()
    assert "matches no better" not in caught.err
    assert "5 shuffles cannot tell" in caught.err
    assert "19 or more can" in " ".join(json.loads(caught.out)["warnings"])
    compare(pair / "a.npy", pair / "a.npy", shuffles=19, json=True)
    assert "shuffle" not in capsys.readouterr().err


def test_debias_says_where_hubs_grew_and_what_it_cannot_take(tmp_path, capsys):
    rng = np.random.default_rng(3)
    write_array(tmp_path / "g.npy", rng.normal(size=(200, 8)))
    write_array(tmp_path / "bank.npy", rng.normal(size=(50, 8)) + 3)
    write_array(tmp_path / "wide.npy", rng.normal(size=(50, 9)))
    write_array(tmp_path / "one.npy", rng.normal(size=(1, 8)))
    debias(tmp_path / "g.npy", out=tmp_path / "o.npy", bank_gallery=tmp_path / "bank.npy", rate_gallery=5.0, json=True)
    caught = capsys.readouterr()
    told = json.loads(caught.out)
    grown = told["hubness"]["after"]["skewness"] > told["hubness"]["before"]["skewness"]
    assert grown
    assert "hubs are worse than before by skewness" in caught.err
    with pytest.raises(ValueError, match=r"--bank-queries must have 8 components .* got 9"):
        debias(tmp_path / "g.npy", out=tmp_path / "p.npy", bank_queries=tmp_path / "wide.npy")
    with pytest.raises(ValueError, match="at least 2 rows to be measured by its own rows, got 1"):
        debias(tmp_path / "one.npy", out=tmp_path / "p.npy", bank_gallery=tmp_path / "bank.npy")


def test_doctor_says_what_takes_a_store(tmp_path, capsys):
    (tmp_path / "x.faiss").write_bytes(b"IxF2")
    (tmp_path / "lance" / "docs.lance").mkdir(parents=True)
    (tmp_path / "qdrant").mkdir()
    (tmp_path / "qdrant" / "meta.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, kind in (("x.faiss", "a FAISS index"), ("lance", "a LanceDB database"), ("qdrant", "a local Qdrant")):
        assert doctor(tmp_path / name) == 0
        shown = capsys.readouterr().out
        assert kind in shown
        assert "polyspan upgrade plan" in shown
    assert doctor(tmp_path / "empty") == 3


@pytest.mark.parametrize("dtype", [np.float16, np.int64])
def test_labels_may_be_a_column_and_of_half_width(tmp_path, dtype, capsys):
    rows, labels = RNG.normal(size=(60, 5)).astype(np.float32), np.arange(60) % 3
    write_array(tmp_path / "x.npy", rows)
    write_array(tmp_path / "y.npy", labels.astype(dtype)[:, None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path / "x.npy", tmp_path / "y.npy", out=tmp_path / "e.safetensors", hidden=(8,), dim=4, epochs=1)
    assert "classes\t3" in capsys.readouterr().out


def test_lengths_are_no_matter_where_an_upgrade_mends_them():
    old = np.random.default_rng(4).normal(size=(120, 8))
    new = old @ np.random.default_rng(5).normal(size=(8, 8)) + 1
    new /= np.linalg.norm(new, axis=1, keepdims=True)
    told = "new vectors are of one length, carried ones are not"
    assert not any(told in said for said in plan_upgrade(old, new, n_rows=120, renormalize=True).warnings)
    assert any(told in said for said in plan_upgrade(old, 7 * new, n_rows=120, renormalize=True).warnings)
    assert any(told in said for said in plan_upgrade(old, new, n_rows=120).warnings)


def test_options_that_a_method_does_not_take_are_refused(pair):
    options = {"out": pair / "m.safetensors"}
    with pytest.raises(ValueError, match="--rank must go with --method orthogonal, got 3 and --method ridge"):
        fit(pair / "a.npy", pair / "b.npy", **options, method="ridge", rank=3)
    with pytest.raises(ValueError, match=r"--no-shift must go with .*, got --method mean-shift"):
        fit(pair / "a.npy", pair / "b.npy", **options, method="mean-shift", shift=False)
    fit(pair / "a.npy", pair / "b.npy", **options, method="ridge", shift=False)
    assert not load_aligner(options["out"])[0].shift
