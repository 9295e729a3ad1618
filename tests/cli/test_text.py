import json
import math

import numpy as np
import pytest

from polyspan.cli.text import score, train
from polyspan.errors import CorruptFile
from polyspan.nn import GrassmannLM

FEW = {"width": 8, "layers": 1, "reduced": 4, "offsets": "1,2", "length": 24, "steps": 6, "batch_size": 2}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("two vectors span a plane, and a plane has Plücker coordinates; " * 12, encoding="utf-8")
    return path


def test_train_measures_its_rivals_and_draws_and_score_says_the_same(text, tmp_path, capsys):
    out, picture, reach = tmp_path / "m.safetensors", tmp_path / "loss.svg", tmp_path / "reach.svg"
    train(text, out=out, compare=True, plot=picture, reach=reach, device="cpu", json=True, **FEW)
    said = json.loads(capsys.readouterr().out)
    assert [row["mixing"] for row in said["models"]] == ["planes", "attention", "concatenation", "none"]
    assert said["models"][0]["perplexity"] == pytest.approx(math.exp(said["models"][0]["nats a byte"]))
    assert all(path.read_text().count("<svg") == 1 for path in (picture, reach))
    whole = text.read_bytes()
    assert said["bytes to train"] + said["bytes to measure"] == len(whole)
    held = tmp_path / "held.txt"
    held.write_bytes(whole[said["bytes to train"] :])
    score(out, data=held, json=True)
    again = json.loads(capsys.readouterr().out)
    assert again["nats a byte"] == said["models"][0]["nats a byte"]
    assert GrassmannLM.load(out).config["offsets"] == [[1, 2]]
    train(text, out=tmp_path / "again.safetensors", device="cpu", **FEW)
    assert capsys.readouterr().out.splitlines()[0].startswith("mixing\tparameters")
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()


def test_no_picture_takes_the_place_of_another(text, tmp_path):
    picture = tmp_path / "a.svg"
    with pytest.raises(ValueError, match="--reach must be another file than that of --plot"):
        train(text, out=tmp_path / "m.safetensors", plot=picture, reach=picture, **FEW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_what_does_not_fit_is_said(text, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"plain \xff text")
    out = tmp_path / "m.safetensors"
    with pytest.raises(CorruptFile, match="byte 6"):
        train(bad, out=out, **FEW)
    for change, message in (
        ({"offsets": "1,x"}, "--offsets must be whole numbers by commas, got '1,x'"),
        ({"held_out": 1.0}, r"--held-out must be between 0 and 1, got 1.0"),
        ({"length": 600}, "the text must be longer than two pieces of 600 bytes"),
        ({"plot": tmp_path / "p.txt"}, "--plot must end in"),
        ({"out": tmp_path / "m.npz"}, "--out must end in .safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            train(text, **{"out": out} | FEW | change)
    assert not out.exists()
    assert np.all([not path.name.startswith("m.") for path in tmp_path.iterdir()])


def test_pieces_longer_than_trained_are_refused_by_the_name_of_their_option(text, tmp_path):
    model = GrassmannLM(256, 4, 1, 2, (1,), max_length=24).save(tmp_path / "m.safetensors")
    for length in (0, 25):
        with pytest.raises(ValueError, match=f"--length must be between 1 and 24, as trained, got {length}"):
            score(model, data=text, length=length)
