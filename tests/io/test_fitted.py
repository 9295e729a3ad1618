import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from polyspan.errors import CorruptFile, UntrustedFile, WrongContent
from polyspan.io import (
    classes_of,
    constructor_params,
    header_classes,
    inspect_file,
    load_fitted,
    save_fitted,
    write_array,
    write_members,
)

GOLDEN = Path(__file__).parent / "golden"
ARRAYS = {"rotation": np.eye(3)[:, :2], "mean": np.arange(3, dtype=np.float32), "counts": np.array([1, 2])}


def saved(path, **changes):
    given = {"kind": "Map", "arrays": ARRAYS, "params": {"shift": True}, "about": {"model": "m"}, **changes}
    return save_fitted(path / "a.safetensors", **given)


def rewrite(path, change):
    """Write the file anew with another header, and lengths that are right."""
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    ours = json.loads(header["__metadata__"]["polyspan"])
    change(ours)
    header["__metadata__"]["polyspan"] = json.dumps(ours)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])
    return path


def test_what_is_saved_is_loaded_equal_and_twice_the_same_bytes(tmp_path):
    path = saved(tmp_path, data_digest="abc", params={"alpha": np.float64(0.1), "rank": None, "names": ("a", "ü")})
    found = load_fitted(path, kind="Map")
    assert found.kind == "Map"
    assert found.params == {"alpha": 0.1, "rank": None, "names": ["a", "ü"]}
    assert found.about == {"model": "m"}
    assert found.header["data"] == "abc"
    assert set(found.header["versions"]) == {"polyspan", "numpy", "python"}
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(found.arrays[name], value)
        assert found.arrays[name].dtype == value.dtype
        assert found.arrays[name].flags.writeable
    before = path.read_bytes()
    saved(tmp_path, data_digest="abc", params={"names": ["a", "ü"], "rank": None, "alpha": 0.1})
    assert path.read_bytes() == before


def test_tensors_are_saved_as_arrays(tmp_path):
    path = saved(tmp_path, arrays={"w": torch.arange(4.0, requires_grad=True)})
    np.testing.assert_array_equal(load_fitted(path).arrays["w"], np.arange(4.0))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda p: p.stem)
def test_files_of_every_schema_that_is_read_still_load(path):
    assert path.stat().st_size < 1000
    found = load_fitted(path, kind=("OrthogonalMap", "Other"))
    assert found.header["schema"] == int(path.stem.removeprefix("fitted-schema-"))
    assert found.params == {"init": {"shift": True}, "facts": {"n_anchors_": 4}}
    assert found.about == {"source": {"model": "old"}}
    np.testing.assert_array_equal(found.arrays["rotation_"], [[0.0, 1.0], [-1.0, 0.0]])
    np.testing.assert_array_equal(found.arrays["mean_in_"], np.float32([0.5, -2.0]))


def test_every_single_flipped_bit_is_found(tmp_path):
    data = saved(tmp_path).read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(data), 60):
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.safetensors").write_bytes(broken)
        try:
            found = load_fitted(tmp_path / "a.safetensors", kind="Map")
        except (CorruptFile, WrongContent):
            continue
        # Text about the thing carries no digest; its numbers do.
        for name, value in ARRAYS.items():
            np.testing.assert_array_equal(found.arrays[name], value)
        assert at < len(data) - sum(v.nbytes for v in ARRAYS.values())


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda h: h.update(schema=99), WrongContent, "schema 99; expected schema 1"),
        (lambda h: h.pop("schema"), WrongContent, "save_fitted"),
        (lambda h: h.update(kind=3), CorruptFile, "kind = 3"),
        (lambda h: h.update(params=[]), CorruptFile, "params"),
        (lambda h: h["sha256"].pop("mean"), CorruptFile, "digests"),
        (lambda h: h.update(sha256=None), CorruptFile, "digests"),
        (lambda h: h["sha256"].update(mean="0" * 64), CorruptFile, "tensor mean"),
    ],
)
def test_other_headers_are_told(tmp_path, change, kind, message):
    with pytest.raises(kind, match=message):
        load_fitted(rewrite(saved(tmp_path), change))


def test_other_files_are_told(tmp_path):
    with pytest.raises(WrongContent, match="a fitted Map; expected a fitted Other"):
        load_fitted(saved(tmp_path), kind="Other")
    with pytest.raises(WrongContent, match="save_fitted"):
        load_fitted(write_members(tmp_path / "b.safetensors", {"x": np.ones(2)}))
    (tmp_path / "c.pth").write_bytes(b"x")
    with pytest.raises(UntrustedFile, match="safetensors"):
        load_fitted(tmp_path / "c.pth")
    with pytest.raises(WrongContent, match="NaN"):
        load_fitted(saved(tmp_path, arrays={"x": np.array([np.nan])}))
    assert np.isnan(load_fitted(saved(tmp_path, arrays={"x": np.array([np.nan])}), finite=False).arrays["x"]).all()


def test_what_cannot_be_saved_is_named(tmp_path):
    for changes, kind, message in (
        ({"params": {"f": print}}, TypeError, "params.*f"),
        ({"params": {"f": float("inf")}}, ValueError, "f"),
        ({"arrays": {}}, ValueError, "at least one"),
        ({"arrays": {"a": np.array(["x"])}}, ValueError, "a must hold real numbers"),
    ):
        with pytest.raises(kind, match=message):
            saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"\.safetensors"):
        save_fitted(tmp_path / "a.npz", kind="K", arrays=ARRAYS, params={})
    assert list(tmp_path.iterdir()) == []


def test_a_doctor_says_what_a_file_holds_or_what_is_wrong(tmp_path):
    assert inspect_file(saved(tmp_path))["holds"] == "a fitted Map"
    units = write_array(tmp_path / "u.npy", np.eye(3, dtype=np.float32))
    found = inspect_file(units)
    assert found["usable"]
    assert found["shape"] == [3, 3]
    assert found["unit rows"]
    assert found["zero rows"] == 0
    np.save(tmp_path / "n.npy", np.array([[1.0], [np.nan]]))
    found = inspect_file(tmp_path / "n.npy")
    assert (found["usable"], found["error"], found["where"]) == (False, "WrongContent", "row 1, column 0")
    (tmp_path / "m.pth").write_bytes(b"x")
    assert inspect_file(tmp_path / "m.pth")["error"] == "UntrustedFile"
    assert inspect_file(tmp_path / "none")["error"] == "UnreadableFile"
    assert inspect_file(tmp_path)["error"] == "UnreadableFile"
    write_array(tmp_path / "t.parquet", np.eye(3), ids=["a", "b", "c"])
    assert inspect_file(tmp_path / "t.parquet")["rows"] == 3
    (tmp_path / "e.csv").write_text("a,b\nx,y\ny,z\n")
    assert inspect_file(tmp_path / "e.csv")["holds"] == "a table of text"
    (tmp_path / "e.txt").write_text("1 2\n2 3\n")
    assert inspect_file(tmp_path / "e.txt")["edges"] == 2
    json.dumps([inspect_file(p) for p in tmp_path.iterdir()])


@pytest.mark.parametrize(
    "classes",
    [
        np.array([-1, 3]), np.array([0.5, 2.0], np.float32), np.array([False, True]), np.array(["a", "ü"]),
        np.array(["a", "long"], dtype=object),
    ],
)  # fmt: skip
def test_classes_go_through_a_header_as_they_are(tmp_path, classes):
    path = saved(tmp_path, params={"classes": header_classes(classes)})
    found = classes_of(load_fitted(path).params["classes"])
    assert found.dtype == classes.dtype
    assert found.tolist() == classes.tolist()


@pytest.mark.parametrize(
    ("given", "kept"), [(3, 3), (np.int64(3), 3), (None, None), (np.random.RandomState(0), None)]
)  # fmt: skip
def test_parameters_of_an_estimator_keep_a_seed_and_no_state_of_a_generator(given, kept):
    found = constructor_params(KMeans(4, random_state=given))
    assert found == KMeans(4, random_state=kept).get_params()
    assert type(found["random_state"]) is type(kept)
