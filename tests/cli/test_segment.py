import json

import numpy as np
import pytest

from polyspan.cli.segment import predict, train
from polyspan.nn import Segmenter

FEW = {"widths": "16,16", "states": 2, "patch": 2, "steps": 40, "batch_size": 8, "rate": 2e-2, "device": "cpu"}


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    masks = np.zeros((20, 8, 8), dtype=np.uint8)
    for mask in masks:
        i, j = rng.integers(0, 4, size=2)
        mask[i : i + 4, j : j + 4] = 255
    np.save(tmp_path / "x.npy", (masks / 50.0 + rng.normal(0, 1, size=masks.shape)).astype(np.float32))
    np.save(tmp_path / "y.npy", masks)
    return tmp_path


def test_train_writes_measures_and_draws_and_predict_goes_on_from_it(files, capsys):
    out, shares = files / "m.safetensors", files / "p.npy"
    train(files / "x.npy", masks=files / "y.npy", out=out, plot=files / "held.svg", json=True, **FEW)
    said = json.loads(capsys.readouterr().out)
    assert (said["trained on"], said["measured on"]) == (16, 4)
    assert said["Dice, all pixels"] > 0.5
    assert (files / "held.svg").read_text().count("<svg") == 1
    predict(out, data=files / "x.npy", out=shares, masks=files / "y.npy", plot=files / "all.png", json=True)
    assert json.loads(capsys.readouterr().out)["pictures"] == 20
    X = np.load(files / "x.npy")
    np.testing.assert_allclose(np.load(shares), Segmenter.load(out).predict(X), atol=1e-6)
    predict(out, data=files / "x.npy", out=shares)
    assert capsys.readouterr().out.splitlines()[1] == "pictures\t20"


def test_what_does_not_fit_is_said(files):
    np.save(files / "flat.npy", np.ones((20, 64), dtype=np.float32))
    np.save(files / "few.npy", np.load(files / "y.npy")[:19])
    how = {"out": files / "m.safetensors", **FEW}
    with pytest.raises(ValueError, match=r"pictures must be \(n, h, w\) or \(n, channels, h, w\)"):
        train(files / "flat.npy", masks=files / "y.npy", **how)
    with pytest.raises(ValueError, match="one mask a picture, got 20 pictures and 19 masks"):
        train(files / "x.npy", masks=files / "few.npy", **how)
    with pytest.raises(ValueError, match=r"masks must be \(n, h, w\), got shape \(20, 64\)"):
        train(files / "x.npy", masks=files / "flat.npy", **how)
    with pytest.raises(ValueError, match="--held-out must be between 0 and 1, got 1"):
        train(files / "x.npy", masks=files / "y.npy", held_out=1.0, **how)
    with pytest.raises(ValueError, match="--widths must be whole numbers by commas, got '8;8'"):
        train(files / "x.npy", masks=files / "y.npy", **(how | {"widths": "8;8"}))
    with pytest.raises(ValueError, match="--plot needs --masks"):
        predict(files / "m.safetensors", data=files / "x.npy", out=files / "p.npy", plot=files / "a.svg")
    for target in ({"out": files / "m.txt"}, {"checkpoint": files / "c.txt"}, {"plot": files / "p.txt"}):
        with pytest.raises(ValueError, match=f"--{next(iter(target))} must end in"):
            train(files / "x.npy", masks=files / "y.npy", **(how | target))


def test_masks_that_do_not_fit_are_told_with_their_file_before_training(files):
    y, how = np.load(files / "y.npy"), {"out": files / "m.safetensors", **FEW}
    np.save(files / "grey.npy", y // 2 + 1)
    with pytest.raises(ValueError, match=r"masks must be binary, .* got values \[1.0, 128.0\] in .*grey.npy"):
        train(files / "x.npy", masks=files / "grey.npy", **how)
    np.save(files / "tall.npy", np.zeros((20, 9, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"masks must be 8 by 8 pixels, as the pictures, got 9 by 8 in .*tall.npy"):
        train(files / "x.npy", masks=files / "tall.npy", **how)
    np.save(files / "empty.npy", 0 * y)
    with pytest.raises(ValueError, match=r"must not all be empty, .* among the 16 trained on, of .*empty.npy"):
        train(files / "x.npy", masks=files / "empty.npy", **how)
    assert not (files / "m.safetensors").exists()
    train(files / "x.npy", masks=files / "y.npy", **(how | {"steps": 1}))
    with pytest.raises(ValueError, match=r"masks must be binary, .* in .*grey.npy"):
        predict(files / "m.safetensors", data=files / "x.npy", out=files / "p.npy", masks=files / "grey.npy")
    assert not (files / "p.npy").exists()


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_pictures_are_counted_and_the_least_is_named(files, count):
    for name in ("x", "y"):
        np.save(files / f"few-{name}.npy", np.load(files / f"{name}.npy")[:count])
    told = ["at least one", "there must be at least 2 pictures, one to measure on and one to train on, got 1"][count]
    with pytest.raises(ValueError, match=told):
        train(files / "few-x.npy", masks=files / "few-y.npy", out=files / "m.safetensors", **FEW)


def test_two_pictures_are_enough_and_one_is_always_trained_on(files, capsys):
    for name in ("x", "y"):
        np.save(files / f"few-{name}.npy", np.load(files / f"{name}.npy")[:2])
    for held_out in (0.2, 0.99):
        how = {"held_out": held_out, "json": True, **FEW, "steps": 1}
        train(files / "few-x.npy", masks=files / "few-y.npy", out=files / "m.safetensors", **how)
        said = json.loads(capsys.readouterr().out)
        assert (said["trained on"], said["measured on"]) == (1, 1)


def test_boolean_masks_and_masks_with_one_channel_teach_the_same(files, capsys):
    y = np.load(files / "y.npy")
    np.save(files / "bool.npy", y > 0)
    np.save(files / "channel.npy", y[:, None])
    for masks in ("y", "bool", "channel"):
        how = {"out": files / f"{masks}.safetensors", **FEW, "steps": 3}
        train(files / "x.npy", masks=files / f"{masks}.npy", **how)
    written = (files / "y.safetensors").read_bytes()
    assert written == (files / "bool.safetensors").read_bytes() == (files / "channel.safetensors").read_bytes()
    predict(files / "y.safetensors", data=files / "x.npy", out=files / "p.npy", masks=files / "bool.npy", json=True)
    assert "Dice, all pixels" in capsys.readouterr().out
