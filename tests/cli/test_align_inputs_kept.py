"""Commands about maps, stores and networks never write over a file that they read."""

import numpy as np
import pytest

from polyspan.cli.compare import compare
from polyspan.cli.compat import embed, train
from polyspan.cli.crossmodal import fit, match, retrieve
from polyspan.cli.retrieve import debias
from polyspan.io import write_array, write_columns, write_members


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 3)).astype(np.float32)
    write_members(tmp_path / "a.safetensors", {"v": rows})
    write_columns(tmp_path / "a.csv", {"vector": np.array([" ".join(map(str, row)) for row in rows.tolist()])})
    write_array(tmp_path / "a.npy", rows)
    write_array(tmp_path / "b.npy", rows + rng.normal(size=rows.shape).astype(np.float32))
    write_array(tmp_path / "labels.npy", np.arange(40) % 2)
    fit(tmp_path / "a.npy", tmp_path / "b.npy", out=tmp_path / "map.safetensors", components="2")
    return tmp_path


WAYS = {
    "a gallery by a kept correction": (debias, ["a.safetensors"], {"save": "a.safetensors", "out": "o.npy"}),
    "a bank by a corrected gallery": (debias, ["a.npy"], {"bank_gallery": "b.npy", "out": "b.npy"}),
    "queries by a corrected gallery": (debias, ["a.npy"], {"queries": "b.npy", "out": "b.npy"}),
    "anchors by subspaces": (fit, ["a.safetensors", "b.npy"], {"out": "a.safetensors"}),
    "vectors by pairs": (match, ["map.safetensors", "a.csv", "b.npy"], {"out": "a.csv"}),
    "a gallery by what was found": (retrieve, ["map.safetensors", "b.npy", "a.csv"], {"out": "a.csv"}),
    "features by an encoder": (train, ["a.safetensors", "labels.npy"], {"out": "a.safetensors"}),
    "an old encoder by a new one": (
        train,
        ["a.npy", "labels.npy"],
        {"old": "map.safetensors", "out": "map.safetensors"},
    ),
    "an encoder by its vectors": (embed, ["map.safetensors", "a.npy"], {"out": "map.safetensors"}),
    "activations by a matching": (compare, ["a.csv", "b.npy"], {"out": "a.csv"}),
    "activations by a report": (compare, ["a.npy", "b.npy"], {"report": "b.npy"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_read_is_not_replaced(way, files):
    command, given, options = WAYS[way]
    before = {path: path.read_bytes() for path in files.iterdir()}
    with pytest.raises(ValueError, match="must be another file than a file that is read"):
        command(*(files / name for name in given), **{name: files / value for name, value in options.items()})
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_two_results_have_two_files(files):
    with pytest.raises(ValueError, match="--checkpoint must be another file than that of --out"):
        train(files / "a.npy", files / "labels.npy", out=files / "e.safetensors", checkpoint=files / "e.safetensors")


def test_a_name_that_cannot_be_written_is_refused_before_training(files, monkeypatch):
    monkeypatch.setattr("polyspan.io.read_array", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=r"--out must end in \.safetensors, got 'e\.txt'"):
        train(files / "a.npy", files / "labels.npy", out=files / "e.txt")
    with pytest.raises(ValueError, match=r"--out must end in \.safetensors, got 'm\.npz'"):
        fit(files / "a.npy", files / "b.npy", out=files / "m.npz")
    with pytest.raises(ValueError, match=r"--save must end in one of \.safetensors, got 's\.npz'"):
        debias(files / "a.npy", out=files / "o.npy", save=files / "s.npz")
    with pytest.raises(ValueError, match="--plot must be a file in a folder that is there"):
        compare(files / "a.npy", files / "b.npy", plot=files / "none" / "p.svg")
