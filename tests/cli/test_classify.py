import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyspan.cli.classify import fit, report
from polyspan.data import planted_gaussian_classes
from polyspan.io import write_members
from polyspan.nn import GrassmannClassifier


@pytest.fixture(scope="module")
def data():
    return planted_gaussian_classes(0, n_classes=4, n_per=60, n_test=40)


def test_fit_compares_writes_and_draws_and_report_measures(data, tmp_path, capsys):
    np.savez(tmp_path / "train.npz", embeddings=data.train, labels=data.train_labels)
    np.save(tmp_path / "test.npy", data.test)
    np.save(tmp_path / "test-labels.npy", data.test_labels)
    out, picture = tmp_path / "heads.safetensors", tmp_path / "angles.svg"
    fit(tmp_path / "train.npz", out=out, dimension=4, steps=100, plot=picture, json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["classes"] == 4
    assert said["accuracy"]["subspaces, trained"] > said["accuracy"]["logistic regression"] + 0.2
    assert picture.read_text().count("<svg") == 1
    report(out, tmp_path / "test.npy", labels=tmp_path / "test-labels.npy", json=True)
    said = json.loads(capsys.readouterr().out)
    fitted = GrassmannClassifier.load(out)
    assert said["accuracy"] == fitted.score(data.test, data.test_labels)
    assert len(said["nearest"]) == 5
    report(out, tmp_path / "test.npy", labels=tmp_path / "test-labels.npy")
    assert "recall of 3\t" in capsys.readouterr().out


def test_a_table_with_named_classes_is_read(data, tmp_path, capsys):
    names = np.array(["ant", "bee", "cat", "dog"])[data.train_labels]
    vectors = pa.array(list(data.train), type=pa.list_(pa.float64()))
    pq.write_table(pa.table({"vector": vectors, "kind": names}), tmp_path / "train.parquet")
    fit(tmp_path / "train.parquet", out=tmp_path / "h.safetensors", label_column="kind", steps=20, held_out=0.0)
    assert "classes\t4" in capsys.readouterr().out
    assert list(GrassmannClassifier.load(tmp_path / "h.safetensors").classes_) == ["ant", "bee", "cat", "dog"]


def test_what_does_not_fit_is_said(data, tmp_path):
    np.save(tmp_path / "x.npy", data.train)
    np.save(tmp_path / "y.npy", data.train_labels[:-1])
    with pytest.raises(ValueError, match=r"--labels must be given for \.npy files"):
        fit(tmp_path / "x.npy", out=tmp_path / "h.safetensors")
    with pytest.raises(ValueError, match="one label a row, got 240 rows and 239 labels"):
        fit(tmp_path / "x.npy", labels=tmp_path / "y.npy", out=tmp_path / "h.safetensors")
    with pytest.raises(ValueError, match="--held-out must be at least 0 and below 1, got 1"):
        fit(tmp_path / "x.npy", labels=tmp_path / "y.npy", out=tmp_path / "h.safetensors", held_out=1.0)


def test_a_classifier_does_not_take_the_place_of_what_it_is_fitted_on(data, tmp_path):
    source = tmp_path / "train.safetensors"
    write_members(source, {"embeddings": data.train, "labels": data.train_labels})
    before = source.read_bytes()
    with pytest.raises(ValueError, match="--out must be another file than a file that is read"):
        fit(source, out=source, dimension=2, steps=1, held_out=0.0)
    assert source.read_bytes() == before
    out = tmp_path / "heads.safetensors"
    fit(source, out=out, dimension=2, steps=1, held_out=0.0)
    with pytest.raises(ValueError, match=r"--plot must be|must end in"):
        report(out, source, plot=source)
    assert source.read_bytes() == before
