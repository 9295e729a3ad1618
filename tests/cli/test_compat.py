import json

import numpy as np
import pytest

from polyspan.align import CompatibleClassifier
from polyspan.cli.compat import embed, evaluate, train
from polyspan.errors import WrongContent
from polyspan.io import write_array


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


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_classes_come_from_a_table_by_name_too(files, capsys, suffix):
    names = [("fine", "none", "poor")[i] for i in np.load(files / "y.npy") % 3]
    table = files / f"classes{suffix}"
    table.write_text("label\n" + "\n".join(names) + "\n")
    train(files / "X.npy", table, out=files / "named.safetensors", hidden=(16,), epochs=1, dim=4, json=True)
    assert json.loads(capsys.readouterr().out)["classes"] == 3
    assert CompatibleClassifier.load(files / "named.safetensors").classes_.tolist() == ["fine", "none", "poor"]
    numbers = files / "numbers.npy"
    np.save(numbers, np.load(files / "y.npy") % 3)
    scores = []
    for labels in (table, numbers):
        evaluate([files / "X.npy"], labels=labels, json=True)
        scores.append(json.loads(capsys.readouterr().out)["scores"])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_classes_beyond_two_to_the_53_stay_apart(files, capsys, suffix):
    y = 2**53 + np.arange(120) % 3
    labels = files / f"far{suffix}"
    write_array(labels, y)
    train(files / "X.npy", labels, out=files / "far-model.safetensors", hidden=(16,), epochs=1, dim=4, json=True)
    assert json.loads(capsys.readouterr().out)["classes"] == 3
    made = CompatibleClassifier.load(files / "far-model.safetensors")
    assert made.classes_.tolist() == [2**53, 2**53 + 1, 2**53 + 2]
    vectors = np.repeat(np.eye(3, dtype=np.float32), 40, axis=0)[np.argsort(np.argsort(y, kind="stable"))]
    np.save(files / "far-vectors.npy", vectors)
    evaluate([files / "far-vectors.npy"], labels=labels, json=True)
    assert json.loads(capsys.readouterr().out)["scores"] == [[1.0]], "other classes are no hits and no ties"


@pytest.mark.parametrize("value", [2.0**53 + 2, -(2.0**60), 2.0**62])
def test_floats_that_cannot_tell_neighbouring_classes_are_refused(files, value):
    for suffix in (".npy", ".npz", ".safetensors"):
        write_array(files / f"wide{suffix}", np.where(np.arange(120) == 7, value, 1.0))
        with pytest.raises(WrongContent, match=r"row 7: found .*float64.*integers from 9007199254740992"):
            evaluate([files / "X.npy"], labels=files / f"wide{suffix}")


def test_classes_that_are_not_whole_or_do_not_fit_are_refused(files):
    for bad in (np.where(np.arange(120) == 7, 0.5, 1.0), np.where(np.arange(120) == 7, 2**63, 1).astype(np.uint64)):
        np.save(files / "bad.npy", bad)
        with pytest.raises(WrongContent, match=r"row 7.*whole numbers of int64"):
            evaluate([files / "X.npy"], labels=files / "bad.npy")


def test_rows_and_widths_that_do_not_fit_are_named(files):
    np.save(files / "few.npy", np.arange(5))
    with pytest.raises(ValueError, match=r"labels must have one entry a row of .* \(120\), got 5"):
        train(files / "X.npy", files / "few.npy", out=files / "x.safetensors")
    with pytest.raises(ValueError, match="--width must be between 1 and 6, got 9"):
        embed(files / "new.safetensors", files / "X.npy", out=files / "x.npy", width=9)


def test_basis_transformation_follows_the_old_encoder_and_an_independent_one(files, capsys):
    X = np.load(files / "X.npy")
    options = {"hidden": (16,), "epochs": 1, "extra_dim": 2, "old": files / "old.safetensors", "method": "basis"}
    train(files / "X.npy", files / "y.npy", out=files / "basis.safetensors", json=True, **options)
    assert json.loads(capsys.readouterr().out)["comparable"] == 4
    embed(files / "basis.safetensors", files / "X.npy", out=files / "basis.npy")
    made = CompatibleClassifier.load(files / "basis.safetensors")
    assert type(made).__name__ == "BasisTransformationClassifier"
    np.testing.assert_allclose(np.load(files / "basis.npy"), made.transform(X), atol=1e-6)
    write_array(files / "independent.npy", X[:, :5])
    given = {"out": files / "given.safetensors", "new_vectors": files / "independent.npy"}
    train(files / "X.npy", files / "y.npy", **options, **given)
    assert not np.array_equal(CompatibleClassifier.load(given["out"]).transform(X), made.transform(X))
    with pytest.raises(ValueError, match="--new-vectors is for --method basis, got --method orthogonal"):
        train(files / "X.npy", files / "y.npy", **given)
    with pytest.raises(ValueError, match="--separability is for --method orthogonal"):
        train(files / "X.npy", files / "y.npy", out=files / "x.safetensors", separability=True, **options)
