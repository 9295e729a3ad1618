import json
import re

import numpy as np
import pytest

from polyspan.cli.crate import report, train
from polyspan.errors import WrongContent
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
    assert lines[0].startswith("layer\t")
    assert lines[1].startswith("1\t")
    assert lines[3] == "pictures\t60"


def test_what_does_not_fit_is_said(files):
    np.save(files / "flat.npy", np.ones((60, 64), dtype=np.float32))
    np.save(files / "few.npy", np.zeros(59, dtype=int))
    with pytest.raises(
        ValueError, match=r"pictures must be \(n, h, w\) or \(n, channels, h, w\), .*, got shape \(60, 64\)"
    ):
        train(files / "flat.npy", labels=files / "y.npy", out=files / "m.safetensors", **FEW)
    with pytest.raises(ValueError, match="one label a picture, got 60 pictures and 59 labels"):
        train(files / "x.npy", labels=files / "few.npy", out=files / "m.safetensors", **FEW)
    with pytest.raises(ValueError, match="--held-out must be between 0 and 1, got 0"):
        train(files / "x.npy", labels=files / "y.npy", out=files / "m.safetensors", held_out=0.0, **FEW)
    np.save(files / "none.npy", np.ones((0, 8, 8), dtype=np.float32))
    with pytest.raises(ValueError, match=r"pictures must be .* at least one .*, got shape \(0, 8, 8\)"):
        train(files / "none.npy", labels=files / "y.npy", out=files / "m.safetensors", **FEW)
    np.save(files / "wide.npy", np.zeros((60, 2), dtype=int))
    with pytest.raises(WrongContent, match=r"shape \(60, 2\); expected one label a row, \(n,\) or \(n, 1\)"):
        train(files / "x.npy", labels=files / "wide.npy", out=files / "m.safetensors", **FEW)
    for target in ({"out": files / "m.txt"}, {"checkpoint": files / "c.txt"}, {"plot": files / "p.txt"}):
        with pytest.raises(ValueError, match=f"--{next(iter(target))} must end in"):
            train(files / "x.npy", labels=files / "y.npy", **({"out": files / "m.safetensors"} | FEW | target))


def test_no_result_takes_the_place_of_another(files):
    out, picture = files / "m.safetensors", files / "a.svg"
    with pytest.raises(ValueError, match="--checkpoint must be another file than that of --out"):
        train(files / "x.npy", labels=files / "y.npy", out=out, checkpoint=out, **FEW)
    train(files / "x.npy", labels=files / "y.npy", out=out, **(FEW | {"steps": 1}))
    with pytest.raises(ValueError, match="--maps must be another file than that of --plot"):
        report(out, data=files / "x.npy", plot=picture, maps=picture)
    assert not picture.exists()


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_pictures_are_counted_and_the_least_is_named(files, count):
    np.save(files / "fx.npy", np.load(files / "x.npy")[:count])
    np.save(files / "fy.npy", np.arange(count))
    with pytest.raises(ValueError, match=f"there must be at least 3 pictures, one to measure on .*, got {count}"):
        train(files / "fx.npy", labels=files / "fy.npy", out=files / "m.safetensors", **FEW)


def test_three_pictures_are_enough_and_two_are_always_trained_on(files, capsys):
    np.save(files / "fx.npy", np.load(files / "x.npy")[:3])
    np.save(files / "fy.npy", np.arange(3))
    for held_out in (0.2, 0.99):
        train(files / "fx.npy", labels=files / "fy.npy", out=files / "m.safetensors", held_out=held_out, **FEW)
        assert "pictures\t3" in capsys.readouterr().out


def test_one_class_among_those_trained_on_is_said(files):
    np.save(files / "one.npy", np.full(60, 4))
    with pytest.raises(ValueError, match=r"the 48 pictures trained on must be .* got only 4; no other is among"):
        train(files / "x.npy", labels=files / "one.npy", out=files / "m.safetensors", **FEW)
    np.save(files / "fx.npy", np.load(files / "x.npy")[:3])
    unlucky = []
    for odd in range(3):  # whichever is kept for measuring, one of these leaves a single class
        np.save(files / "fy.npy", (np.arange(3) == odd).astype(int))
        try:
            train(files / "fx.npy", labels=files / "fy.npy", out=files / "m.safetensors", **FEW)
        except ValueError as error:
            unlucky.append(str(error))
    assert unlucky == ["the 2 pictures trained on must be of at least 2 classes, got only 0; try another --seed"]


def test_a_column_of_labels_is_as_good_as_a_row(files, capsys):
    np.save(files / "column.npy", np.load(files / "y.npy")[:, None])
    for labels in ("y.npy", "column.npy"):
        train(files / "x.npy", labels=files / labels, out=files / labels.replace("npy", "safetensors"), **FEW)
    assert (files / "y.safetensors").read_bytes() == (files / "column.safetensors").read_bytes()


def test_a_report_refuses_pictures_of_another_shape_with_as_many_pixels(files):
    out = files / "m.safetensors"
    train(files / "x.npy", labels=files / "y.npy", out=out, **FEW)
    for shape in ((4, 16), (4, 4, 4)):
        np.save(files / "other.npy", np.load(files / "x.npy").reshape(60, *shape))
        with pytest.raises(ValueError, match=re.escape(f"shape (1, 8, 8), (c, h, w) as fitted, got {shape}")):
            report(out, data=files / "other.npy", maps=files / "maps.png")
    assert not (files / "maps.png").exists()
    with pytest.raises(ValueError, match="--maps must end in"):
        report(out, data=files / "x.npy", maps=files / "maps.txt")


def test_a_table_of_named_classes_teaches_the_same_as_numbers_and_the_names_are_kept(files, capsys):
    y = np.load(files / "y.npy")
    (files / "names.csv").write_text("label\n" + "".join(f"{('dark', 'lit')[k]}\n" for k in y))
    found = {}
    for labels in ("y.npy", "names.csv"):
        train(files / "x.npy", labels=files / labels, out=files / f"{labels}.safetensors", json=True, **FEW)
        found[labels] = json.loads(capsys.readouterr().out)
    assert found["names.csv"]["layers"] == found["y.npy"]["layers"]
    assert found["names.csv"]["accuracy"] == found["y.npy"]["accuracy"]
    assert CrateClassifier.load(files / "names.csv.safetensors").classes_.tolist() == ["dark", "lit"]
    (files / "one.csv").write_text("label\n" + "lit\n" * 60)
    with pytest.raises(ValueError, match="must be of at least 2 classes, got only lit; no other is among the labels"):
        train(files / "x.npy", labels=files / "one.csv", out=files / "m.safetensors", **FEW)
