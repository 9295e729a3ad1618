import hashlib
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from polyspan.errors import CorruptFile, UnreadableFile, WrongContent
from polyspan.io import (
    EmbeddingReader,
    EmbeddingWriter,
    PartialRows,
    filled_rows,
    read_array,
    read_members,
    replace_vectors,
    swap_in,
    text_batches,
    vector_member,
    write_array,
    write_members,
)

X = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
WORK = {"by": "me"}


def opened(path, **changes):
    return PartialRows(path, **({"n_rows": 20, "dim": 4, "work": WORK} | changes))


def test_rows_filled_over_several_runs_are_the_array(tmp_path):
    path = tmp_path / "a" / "x.npy"
    for start in range(0, 20, 8):
        rows = opened(path)
        assert rows.filled == start
        rows.append(start, X[start : start + 8])
        rows.sync()
        rows.close()
    assert filled_rows(path) == 20
    np.testing.assert_array_equal(read_array(path), X)


def test_what_is_not_synced_counts_as_not_written(tmp_path):
    rows = opened(tmp_path / "x.npy")
    rows.append(0, X[:5])
    rows.sync()
    rows.append(5, X[5:9])
    assert (rows.filled, rows.written) == (5, 9)
    rows.close()
    again = opened(tmp_path / "x.npy")
    assert again.filled == again.written == 5
    again.close()


def test_rows_are_written_anew_wherever_they_stand(tmp_path):
    rows = opened(tmp_path / "x.npy", dtype=np.float16)
    rows.append(0, X)
    rows.rewrite([7, 2], np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32))
    rows.sync()
    rows.close()
    expected = X.astype(np.float16)
    expected[7], expected[2] = [1, 2, 3, 4], [5, 6, 7, 8]
    np.testing.assert_array_equal(read_array(tmp_path / "x.npy", dtype=np.float32), expected.astype(np.float32))


def test_rows_written_anew_count_after_a_kill(tmp_path):
    rows = opened(tmp_path / "x.npy")
    rows.append(0, X)
    rows.rewrite([3], np.zeros((1, 4), np.float32))
    rows.close()
    assert filled_rows(tmp_path / "x.npy") == 20
    np.testing.assert_array_equal(read_array(tmp_path / "x.npy")[3], np.zeros(4))


def test_a_file_cut_off_before_its_first_row_is_begun_again(tmp_path):
    rows = opened(tmp_path / "x.npy")
    rows.close()
    head = (tmp_path / "x.npy").read_bytes()[:128]
    for size in (0, 40, 128):
        (tmp_path / "x.npy").write_bytes(head[:size])
        rows = opened(tmp_path / "x.npy")
        rows.append(0, X)
        rows.sync()
        rows.close()
        np.testing.assert_array_equal(read_array(tmp_path / "x.npy"), X)
        (tmp_path / "x.npy").unlink()
        (tmp_path / "x.npy.journal").unlink()
        opened(tmp_path / "x.npy").close()
    (tmp_path / "x.npy").write_bytes(b"other" + head[5:])
    with pytest.raises(CorruptFile, match="both, or neither"):
        opened(tmp_path / "x.npy")
    (tmp_path / "x.npy").write_bytes(b"")
    rows = opened(tmp_path / "x.npy")
    rows.append(0, X)
    rows.sync()
    rows.close()
    (tmp_path / "x.npy").write_bytes(head)
    with pytest.raises(CorruptFile, match="both, or neither"):
        opened(tmp_path / "x.npy")


def test_other_work_other_writers_and_holes_are_refused(tmp_path):
    path = tmp_path / "x.npy"
    rows = opened(path)
    with pytest.raises(UnreadableFile, match="another run writing it"):
        opened(path)
    with pytest.raises(ValueError, match="start must be 0, the first row not written, got 3"):
        rows.append(3, X[:2])
    with pytest.raises(ValueError, match=r"rows must have shape \(b, 4\)"):
        rows.append(0, X[:, :3])
    with pytest.raises(ValueError, match="rows must be finite"):
        rows.append(0, np.full((1, 4), np.inf, np.float32))
    with pytest.raises(ValueError, match="20 in all"):
        rows.append(0, np.zeros((21, 4), np.float32))
    with pytest.raises(ValueError, match="one written row each"):
        rows.rewrite([0], X[:1])
    rows.append(0, X[:5])
    rows.sync()
    rows.close()
    with pytest.raises(ValueError, match="belongs to other work"):
        opened(path, work={"by": "you"})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFile, match="both, or neither"):
        opened(path)
    assert filled_rows(tmp_path / "none.npy") == 0


def test_a_swap_keeps_the_old_file_and_is_done_once(tmp_path):
    old, new, kept = (tmp_path / name for name in ("x.npy", "new.npy", "x.before.npy"))
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    for _ in range(2):
        swap_in(old, new, kept)
        assert (old.read_bytes(), kept.read_bytes(), new.exists()) == (b"new", b"old", False)
    new.write_bytes(b"newer")
    with pytest.raises(UnreadableFile, match="a file of that name"):
        swap_in(old, new, kept)
    kept.unlink()
    new.unlink()
    with pytest.raises(UnreadableFile, match="the file that is to take the place"):
        swap_in(old, new, kept)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".fvecs", ".parquet", ".arrow"])
def test_vectors_of_another_width_take_the_place_of_a_files(tmp_path, suffix):
    source, target, vectors = tmp_path / f"x{suffix}", tmp_path / f"y{suffix}", tmp_path / "v.npy"
    write_array(source, X)
    write_array(vectors, X[:, :3] * 2)
    replace_vectors(source, target, vectors, batch_rows=7)
    np.testing.assert_array_equal(read_array(target), X[:, :3] * 2)
    write_array(vectors, X[:19])
    with pytest.raises(WrongContent, match="19 rows; expected 20"):
        replace_vectors(source, target, vectors)
    with pytest.raises(ValueError, match="like source"):
        replace_vectors(source, tmp_path / "y.other", vectors)


@pytest.mark.parametrize("member", [None, "words"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_the_only_array_of_a_file_keeps_its_name(tmp_path, suffix, member):
    source, target = tmp_path / f"x{suffix}", tmp_path / f"y{suffix}"
    write_members(source, {"words": X})
    write_array(tmp_path / "v.npy", X[:, :3])
    replace_vectors(source, target, tmp_path / "v.npy", member=member)
    np.testing.assert_array_equal(read_members(target, ["words"])["words"], X[:, :3])


OTHERS = {
    "ids": np.array([f"k{i}" for i in range(20)]),
    "labels": np.arange(20) + 2**53,
    "half": X.astype(np.float16),
    "mask": X[:, 0] > 0,
    "empty": np.empty((0, 3), np.int8),
    "one": np.array(7, np.uint64),
    "columns": np.asfortranarray(X.astype(np.float64)),
    "objects": np.array([{"a": 1}, "b"], dtype=object),
    "records": np.zeros(3, np.dtype([("a", "<i4"), ("b", "<f8")])),
}


@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("place", [0, 4, 9])
def test_other_members_of_an_archive_are_kept_byte_by_byte_in_their_order(tmp_path, pack, place):
    source, target = tmp_path / "x.npz", tmp_path / "y.npz"
    names = [*OTHERS]
    names.insert(place, "vectors")
    pack(source, **{name: (OTHERS | {"vectors": X})[name] for name in names})
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr("read.me", "made by hand")
    write_array(tmp_path / "v.npy", X[:, :3] * 2)
    replace_vectors(source, target, tmp_path / "v.npy", member="vectors", batch_rows=7)
    np.testing.assert_array_equal(read_array(target, member="vectors"), X[:, :3] * 2)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target) as new:
        assert new.namelist() == old.namelist()
        for name in old.namelist():
            assert new.getinfo(name).compress_type == old.getinfo(name).compress_type
            assert (new.read(name) == old.read(name)) == (name != "vectors.npy")


def raw_tensors(path):
    """Each tensor's type, shape and bytes, and the metadata, as the format's own description says they lie."""
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:begin])
    metadata = header.pop("__metadata__", {})
    found = {}
    for name, facts in header.items():
        first, end = facts["data_offsets"]
        found[name] = (facts["dtype"], facts["shape"], whole[begin + first : begin + end])
    return found, metadata


@pytest.mark.parametrize("by", ["polyspan", "others"])
def test_other_tensors_of_a_file_are_kept_byte_by_byte_with_the_metadata(tmp_path, by):
    source, target = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    kept = {k: v for k, v in OTHERS.items() if k in ("labels", "half", "mask", "empty", "one", "columns")}
    if by == "polyspan":
        write_members(source, kept | {"vectors": X}, metadata={"owner": "me"})
    else:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in kept.items()}
        tensors |= {"brain": torch.ones(3, dtype=torch.bfloat16), "eight": torch.ones(5, dtype=torch.float8_e4m3fn)}
        save_file(tensors | {"vectors": torch.from_numpy(X)}, source, metadata={"owner": "me"})
    write_array(tmp_path / "v.npy", X[:, :3] * 2)
    replace_vectors(source, target, tmp_path / "v.npy", member="vectors", batch_rows=7)
    (old, told), (new, said) = raw_tensors(source), raw_tensors(target)
    assert {k: v for k, v in new.items() if k != "vectors"} == {k: v for k, v in old.items() if k != "vectors"}
    assert new["vectors"] == ("F32", [20, 3], (X[:, :3] * 2).tobytes())
    assert said["owner"] == told["owner"] == "me"
    with safe_open(target, "pt") as found:
        assert set(found.keys()) == set(old), "the format's own reader takes it"
    digests = json.loads(said["polyspan"])["sha256"]
    assert digests["vectors"] == hashlib.sha256(new["vectors"][2]).hexdigest()
    if by == "polyspan":
        assert digests.keys() == old.keys()
        assert read_members(target)["labels"].tolist() == OTHERS["labels"].tolist(), "digests are those of the bytes"


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_the_vectors_of_a_file_are_its_only_floats_of_two_dimensions(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write_members(path, {"a": X, "ids": np.arange(20), "weights": X[:, 0], "codes": X.astype(np.int8)})
    assert vector_member(path) == "a"
    write_members(path, {"codes": X.astype(np.int8)})
    assert vector_member(path) == "codes", "the only array, whatever it holds"
    write_members(path, {"a": X, "b": X, "ids": np.arange(20)})
    with pytest.raises(WrongContent, match=r"2 arrays of floats \(n, d\): a, b; expected one, or member= naming it"):
        vector_member(path)
    write_members(path, {"codes": X.astype(np.int8), "ids": np.arange(20)})
    with pytest.raises(WrongContent, match=r"no array of floats \(n, d\) among codes, ids; expected one"):
        replace_vectors(path, tmp_path / f"y{suffix}", path)
    assert not (tmp_path / f"y{suffix}").exists()
    if suffix == ".npz":
        np.savez(path, a=X, ids=OTHERS["objects"], rows=OTHERS["records"])
        assert vector_member(path) == "a"


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet", ".arrow"])
def test_vectors_of_half_width_are_written_in_half_width(tmp_path, suffix):
    source, target = tmp_path / f"x{suffix}", tmp_path / f"y{suffix}"
    write_array(source, X.astype(np.float16))
    write_array(tmp_path / "v.npy", X[:, :3].astype(np.float16))
    replace_vectors(source, target, tmp_path / "v.npy")
    made = EmbeddingReader(target)
    assert made.stored_dtype == EmbeddingReader(source).stored_dtype
    np.testing.assert_array_equal(read_array(target), X[:, :3].astype(np.float16).astype(np.float32))


def test_a_member_that_is_broken_is_named_and_no_file_is_made(tmp_path):
    source, target = tmp_path / "x.npz", tmp_path / "y.npz"
    np.savez(source, vectors=X, labels=np.arange(1000))
    raw = bytearray(source.read_bytes())
    raw[raw.index(np.arange(1000).tobytes()) + 40] ^= 1
    source.write_bytes(raw)
    write_array(tmp_path / "v.npy", X)
    with pytest.raises(CorruptFile, match="CRC"):
        replace_vectors(source, target, tmp_path / "v.npy", member="vectors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.npy", "x.npz"]


def test_texts_come_in_the_batches_of_the_vectors(tmp_path):
    texts = [f"t{i}" for i in range(20)]
    lists = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 4)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"vector": lists, "text": texts, "n": range(20)}), path, row_group_size=6)
    told = list(text_batches(path, "text", batch_rows=8, start=3))
    rows = [batch.rows for batch in EmbeddingReader(path, batch_rows=8).batches(3)]
    assert [len(part) for part in told] == [len(part) for part in rows]
    assert [text for part in told for text in part] == texts[3:]
    with pytest.raises(WrongContent, match="words"):
        list(text_batches(path, "words"))
    with pytest.raises(WrongContent, match="a column of text"):
        list(text_batches(path, "n"))
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(WrongContent, match="text, row 1"):
        list(text_batches(path, "text"))


def test_fvecs_are_written_batch_by_batch_and_hold_single_floats(tmp_path):
    with EmbeddingWriter(tmp_path / "x.fvecs", dim=4) as writer:
        writer.write(X[:9])
        writer.write(X[9:])
    np.testing.assert_array_equal(read_array(tmp_path / "x.fvecs"), X)
    write_array(tmp_path / "y.fvecs", X)
    assert (tmp_path / "x.fvecs").read_bytes() == (tmp_path / "y.fvecs").read_bytes()
    with pytest.raises(ValueError, match=r"dtype must be float32 for \.fvecs"):
        EmbeddingWriter(tmp_path / "x.fvecs", dim=4, dtype=np.float64)
