import gzip
import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import scipy.io
import scipy.sparse as sp

from polyspan._testing_reader import check_reader, mutate
from polyspan.io import save_fitted, write_array, write_members

X = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
W = sp.csr_array(np.eye(6) + np.eye(6, k=2) + np.eye(6, k=-2))


def npy(folder):
    np.save(folder / "a.npy", X)
    np.save(folder / "b.npy", np.asfortranarray(X.astype(">f8")))
    np.save(folder / "c.npy", X.astype(np.float16))


def npz(folder):
    np.savez(folder / "a.npz", x=X)
    np.savez_compressed(folder / "b.npz", x=X)


def tensors(folder):
    write_array(folder / "a.safetensors", X)


def members(folder):
    write_members(folder / "a.safetensors", {"a": X, "b": np.arange(4)})
    npz(folder)


def parquet(folder):
    write_array(folder / "a.parquet", X, ids=[f"i{k}" for k in range(12)])
    table = pa.table({"v": pa.array(X.tolist()), "id": pa.array(range(12)).dictionary_encode()})
    pq.write_table(table, folder / "b.parquet", compression="snappy")


def arrow(folder):
    write_array(folder / "a.arrow", X, ids=range(12))
    pa.feather.write_feather(pa.table({"v": pa.array(X.tolist())}), str(folder / "b.feather"), compression="lz4")


def rows(folder):
    write_array(folder / "a.csv", X)
    write_array(folder / "a.fvecs", X)


def matrices(folder):
    sp.save_npz(folder / "a.npz", W)
    sp.save_npz(folder / "b.npz", W.tocoo(), compressed=False)


def matlab(folder):
    for name, packed in (("a.mat", False), ("b.mat", True)):
        labels = np.arange(6, dtype=np.uint8)[:, None]
        scipy.io.savemat(folder / name, {"W": W.tocsc(), "fea": X[:6], "gnd": labels}, do_compression=packed)


def edges(folder):
    (folder / "a.csv").write_text("source,target,weight\n1,2,0.5\n2,3,1\n")
    np.save(folder / "a.npy", np.array([[0, 1, 2], [1, 2, 3]]))


def fitted(folder):
    save_fitted(folder / "a.safetensors", kind="K", arrays={"q": X}, params={"a": 1})


def texts(folder):
    (folder / "a.json").write_text(json.dumps({"a": [1, 2.5, {"b": None}], "c": "ü"}))


def idx(folder):
    raw = struct.pack(">4B3I", 0, 0, 8, 3, 2, 3, 4) + bytes(range(24))
    (folder / "a-idx3-ubyte").write_bytes(raw)
    (folder / "a-idx3-ubyte.gz").write_bytes(gzip.compress(raw))


def edge_list(folder):
    (folder / "a.csv").write_text('source,target,weight\n1,2,0.5\n"a ""b""",3,1\n')


def settings(folder):
    (folder / "a.toml").write_text('title = "x"\nsizes = [1, 2.5]\n[part]\nwhen = 2026-01-01\n')


def classes(folder):
    (folder / "a.csv").write_text('id,label\na,1\n"b ""c""",x\n\nd,1\n')
    np.save(folder / "a.npy", np.arange(6)[:, None])
    write_array(folder / "a.safetensors", np.arange(6))


def labelled(folder):
    np.savez(folder / "a.npz", images=X.reshape(12, 1, 5), labels=np.arange(12))
    write_members(folder / "a.safetensors", {"images": X, "y": np.arange(12)})


def everything(folder):
    for make in (npy, tensors, parquet, arrow, matlab):
        make(folder)


# One process for each reader: starting it takes longer than its 500 broken files a format.
READERS = {
    "read_array": (npy, npz, tensors, parquet, arrow, rows),
    "read_members": (members,),
    "read_labels": (classes,),
    "read_labelled": (labelled, matlab),
    "read_graph": (matrices, matlab, edges),
    "load_fitted": (fitted,),
    "read_json": (texts,),
    "read_idx": (idx,),
    "read_mat": (matlab,),
    "read_csv": (edge_list,),
    "read_toml": (settings,),
    "inspect_file": (everything,),
}


PLAIN = {
    "read_text": "any bytes that are UTF-8 are right",
    "read_bytes": "any bytes are right",
    "read_lines": "any lines that are UTF-8 are right",
    "read_jsonl": "yields line by line what read_json's parser makes of them",
}


def test_every_public_reader_is_fuzzed_or_has_a_reason():
    from polyspan.testing import public_members

    readers = {name for name in public_members("polyspan.io") if name.startswith(("read_", "load_", "inspect_"))}
    assert readers == READERS.keys() | PLAIN.keys()


@pytest.mark.parametrize(("read", "formats"), READERS.items(), ids=READERS.keys())
def test_broken_files_give_one_of_five_errors(tmp_path, read, formats):
    examples = []
    for make in formats:
        folder = tmp_path / make.__name__
        folder.mkdir()
        make(folder)
        examples += sorted(folder.iterdir())
    check_reader(f"polyspan.io:{read}", examples, mutations=500 * len(formats))


BAD = """
import ctypes, time
def raises(path): path.read_bytes().decode("ascii")
def crashes(path): ctypes.string_at(0) if path.read_bytes()[:1] != b"a" else None
def lingers(path):
    end = time.process_time() + (0.6 if path.read_bytes() != b"abc" else 0)
    while time.process_time() < end: pass
def swells(path): bytearray(300_000_000) if path.read_bytes() != b"abc" else None
def never(path): raise OSError("always")
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "UnicodeDecodeError"),
        ("crashes", "SIGSEGV"),
        ("lingers", "s of computing"),
        ("swells", "MemoryError"),
        ("never", "the valid file a"),
    ],
)
def test_a_reader_that_breaks_the_promise_is_found(tmp_path, monkeypatch, name, message):
    (tmp_path / "bad_reader.py").write_text(BAD)
    (tmp_path / "a").write_bytes(b"abc")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match=message):
        check_reader(f"bad_reader:{name}", [tmp_path / "a"], mutations=60, max_seconds=0.3)


def test_the_same_seed_breaks_files_the_same_way():
    import random

    data = bytes(range(256)) * 3
    made = [[mutate(data, random.Random(f"{seed} {i}")) for i in range(50)] for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert sum(broken != data for broken, _ in made[0]) > 45
    assert mutate(b"", random.Random(0))[1]
    with pytest.raises(ValueError, match="at least one file"):
        check_reader("polyspan.io:read_array", [])
