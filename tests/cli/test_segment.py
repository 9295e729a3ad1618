import json

import numpy as np
import pytest

from polyspan.cli.segment import predict, train
from polyspan.errors import CorruptFile, WrongContent
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


def test_no_result_takes_the_place_of_what_is_read_or_of_another_result(files):
    before = (files / "x.npy").read_bytes()
    out = files / "m.safetensors"
    with pytest.raises(ValueError, match="--checkpoint must be another file than that of --out"):
        train(files / "x.npy", masks=files / "y.npy", out=out, checkpoint=out, **FEW)
    with pytest.raises(ValueError, match="--plot must be a file in a folder that is there"):
        train(files / "x.npy", masks=files / "y.npy", out=out, plot=files / "none" / "a.svg", **FEW)
    train(files / "x.npy", masks=files / "y.npy", out=out, **(FEW | {"steps": 1}))
    for read in ("x.npy", "y.npy"):
        with pytest.raises(ValueError, match="--out must be another file than a file that is read"):
            predict(out, data=files / "x.npy", masks=files / "y.npy", out=files / read)
    assert (files / "x.npy").read_bytes() == before


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


@pytest.fixture
def folders(files):
    """The pictures and masks of the arrays as files in two folders, masks with the ending of the ISIC set."""
    image = pytest.importorskip("PIL.Image")
    X, y = np.load(files / "x.npy"), np.load(files / "y.npy")
    for name in ("pictures", "masks"):
        (files / name).mkdir()
    low, high = X.min(), X.max()
    for i, (picture, mask) in enumerate(zip(X, y, strict=True)):
        grey = ((picture - low) / (high - low) * 255).astype(np.uint8)
        image.fromarray(grey).save(files / "pictures" / f"a{i:02}.png")
        image.fromarray((255 * (mask > 0)).astype(np.uint8)).save(files / "masks" / f"a{i:02}_segmentation.png")
    return files


def test_folders_of_pictures_teach_the_same_as_arrays_of_them(folders, capsys):
    image = pytest.importorskip("PIL.Image")
    X = np.stack([np.asarray(image.open(path)) for path in sorted((folders / "pictures").iterdir())])
    np.save(folders / "read.npy", X.astype(np.float32) / np.float32(255))
    for source, masks, out in (("read.npy", "y.npy", "array"), ("pictures", "masks", "folder")):
        train(folders / source, masks=folders / masks, out=folders / f"{out}.safetensors", **FEW)
    assert (folders / "array.safetensors").read_bytes() == (folders / "folder.safetensors").read_bytes()
    capsys.readouterr()
    predict(folders / "folder.safetensors", data=folders / "pictures", masks=folders / "masks", out=folders / "p.npy")
    predict(folders / "array.safetensors", data=folders / "read.npy", masks=folders / "y.npy", out=folders / "q.npy")
    np.testing.assert_array_equal(np.load(folders / "p.npy"), np.load(folders / "q.npy"))
    told = capsys.readouterr().out.splitlines()
    assert told[1 : len(told) // 2] == told[len(told) // 2 + 1 :]


def test_pictures_are_brought_to_a_size_and_read_in_colour_where_asked(folders, capsys):
    out = folders / "m.safetensors"
    train(folders / "pictures", masks=folders / "masks", out=out, size="6,10", colour=True, **FEW)
    assert Segmenter.load(out).model.in_channels == 3
    predict(out, data=folders / "pictures", out=folders / "p.npy", size="6,10")
    assert np.load(folders / "p.npy").shape[1:] == (6, 10)
    for size in ("6", "0,3", "6,x", "6,6,6"):
        with pytest.raises(ValueError, match=f"--size must be two whole numbers, height and width, .*, got '{size}'"):
            train(folders / "pictures", masks=folders / "masks", out=out, size=size, **FEW)
    with pytest.raises(ValueError, match=r"--size and --colour are for a folder of pictures, got x\.npy"):
        train(folders / "x.npy", masks=folders / "y.npy", out=out, size="6,10", **FEW)


def test_masks_in_a_folder_that_do_not_fit_are_told_with_their_file(folders):
    image = pytest.importorskip("PIL.Image")

    def refused(message, kind=ValueError):
        with pytest.raises(kind, match=message):
            train(folders / "pictures", masks=folders / "masks", out=folders / "m.safetensors", **FEW)

    first = folders / "masks" / "a00_segmentation.png"
    kept = first.read_bytes()
    image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(first)
    refused(r"masks must be binary, .* got values \[0, 1, 2, 3\] in .*a00_segmentation.png")
    image.fromarray(np.zeros((8, 9), dtype=np.uint8)).save(first)
    refused(r"a00_segmentation.png: found 8 by 9 pixels; expected 8 by 8, as a00.png", WrongContent)
    first.write_bytes(b"no picture")
    refused("a00_segmentation.png: found .*; expected a picture", CorruptFile)
    first.unlink()
    refused(r"masks must hold one mask a picture, .*, got none for a00.png in .*masks")
    first.write_bytes(kept)
    (folders / "masks" / "a00_other.png").write_bytes(kept)
    refused(r"masks must hold one mask a picture, .*, got a00_other.png and a00_segmentation.png for a00.png")
    for path in (folders / "masks").iterdir():
        path.unlink()
    refused(r".*masks must hold pictures .*, got none")
    image.fromarray(np.zeros((9, 8), dtype=np.uint8)).save(folders / "pictures" / "a00.png")
    refused(r"pictures must be of one size, or --size be given, got 9 by 8 in a00.png and 8 by 8 in a01.png")
