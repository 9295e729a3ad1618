import json

import numpy as np
import pytest

from polyspan.cli.crate import report, train
from polyspan.nn import CrateClassifier

FEW = {"dim": 8, "depth": 2, "heads": 2, "steps": 12, "batch_size": 16, "device": "cpu"}


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=60)
    X = rng.normal(size=(60, 8, 8)).astype(np.float32) + 3 * y[:, None, None] * (np.arange(8) < 4)
    np.save(tmp_path / "x.npy", X.astype(np.float32))
    np.save(tmp_path / "y.npy", y)
    return tmp_path


def test_train_writes_measures_and_draws_and_report_says_the_same(files, capsys):
    out, picture = files / "m.safetensors", files / "r.svg"
    train(files / "x.npy", labels=files / "y.npy", out=out, plot=picture, json=True, **FEW)
    said = json.loads(capsys.readouterr().out)
    assert said["classes"] == 2
    assert len(said["layers"]["rate_within"]) == 2
    assert picture.read_text().count("<svg") == 1
    report(out, data=files / "x.npy", maps=files / "maps.png", json=True)
    again = json.loads(capsys.readouterr().out)
    told = CrateClassifier.load(out).layer_report(np.load(files / "x.npy"))
    assert again["layers"]["rate_within"] == told.rate_within.tolist()
    assert (files / "maps.png").stat().st_size > 2000
    report(out, data=files / "x.npy", where="input")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1\t")
    assert lines[2] == "pictures\t60"


def test_what_does_not_fit_is_said(files):
    np.save(files / "flat.npy", np.ones((60, 64), dtype=np.float32))
    np.save(files / "few.npy", np.zeros(59, dtype=int))
    with pytest.raises(
        ValueError, match=r"pictures must be \(n, h, w\) or \(n, channels, h, w\), got shape \(60, 64\)"
    ):
        train(files / "flat.npy", labels=files / "y.npy", out=files / "m.safetensors", **FEW)
    with pytest.raises(ValueError, match="one label a picture, got 60 pictures and 59 labels"):
        train(files / "x.npy", labels=files / "few.npy", out=files / "m.safetensors", **FEW)
    with pytest.raises(ValueError, match="--held-out must be between 0 and 1, got 0"):
        train(files / "x.npy", labels=files / "y.npy", out=files / "m.safetensors", held_out=0.0, **FEW)
