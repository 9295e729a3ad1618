import json

import numpy as np
import pytest

from polyspan.align import CompatibleClassifier
from polyspan.cli.compat import embed, evaluate, train


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compat")
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    X = (3 * rng.normal(size=(3, 6))[y] + rng.normal(size=(120, 6))).astype(np.float32)
    np.save(folder / "X.npy", X)
    np.save(folder / "y.npy", y)
    options = {"hidden": (16,), "epochs": 4, "learning_rate": 1e-2, "batch_size": 32}
    train(folder / "X.npy", folder / "y.npy", out=folder / "old.safetensors", dim=4, **options)
    train(
        folder / "X.npy",
        folder / "y.npy",
        out=folder / "new.safetensors",
        old=folder / "old.safetensors",
        extra_dim=2,
        **options,
    )
    return folder


def test_a_chain_is_trained_embedded_and_measured(files, capsys):
    X, y = np.load(files / "X.npy"), np.load(files / "y.npy")
    for name in ("old", "new"):
        embed(files / f"{name}.safetensors", files / "X.npy", out=files / f"{name}.npy", batch_rows=50)
    new = CompatibleClassifier.load(files / "new.safetensors")
    np.testing.assert_allclose(np.load(files / "new.npy"), new.transform(X), atol=1e-6)
    embed(files / "new.safetensors", files / "X.npy", out=files / "cut.npy", width=4, json=True)
    np.testing.assert_allclose(np.load(files / "cut.npy"), new.transform(X, width=4), atol=1e-6)
    capsys.readouterr()
    names = [files / "old.npy", files / "new.npy"]
    evaluate(names, labels=files / "y.npy", plot=files / "matrix.svg", json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["scores"][0][1] is None
    assert 0 <= told["average_score"] <= 1
    assert (files / "matrix.svg").exists()
    evaluate(names, labels=files / "y.npy")
    assert "new.npy\told.npy" in capsys.readouterr().out
    assert len(y) == 120


def test_old_vectors_stand_for_an_old_encoder_and_not_beside_it(files, capsys):
    old = CompatibleClassifier.load(files / "old.safetensors").transform(np.load(files / "X.npy"))
    np.save(files / "vectors.npy", old)
    given = {"out": files / "other.safetensors", "old_vectors": files / "vectors.npy"}
    train(files / "X.npy", files / "y.npy", hidden=(16,), epochs=1, extra_dim=2, json=True, **given)
    told = json.loads(capsys.readouterr().out)
    assert (told["width"], told["comparable"]) == (6, 4)
    with pytest.raises(ValueError, match="exclude one another"):
        train(files / "X.npy", files / "y.npy", old=files / "old.safetensors", **given)


def test_rows_and_widths_that_do_not_fit_are_named(files):
    np.save(files / "few.npy", np.arange(5))
    with pytest.raises(ValueError, match=r"labels must have one entry a row of .* \(120\), got 5"):
        train(files / "X.npy", files / "few.npy", out=files / "x.safetensors")
    with pytest.raises(ValueError, match="--width must be between 1 and 6, got 9"):
        embed(files / "new.safetensors", files / "X.npy", out=files / "x.npy", width=9)
