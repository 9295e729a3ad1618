import sys
import tracemalloc

import numpy as np
import pytest

from polyspan.errors import CorruptFile, MissingExtra, TooLarge, WrongContent
from polyspan.io import EmbeddingReader, read_array

X = np.random.default_rng(0).normal(size=(103, 5)).astype(np.float32)
IDS = [f"ü{i}" for i in range(103)]


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtra, match=r'needs h5py; run: pip install "polyspan\[hdf5\]"'):
        read_array(tmp_path / "a.h5")


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py")


@pytest.mark.parametrize("options", [{}, {"chunks": (10, 5), "compression": "gzip"}])
@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f8", "<i1"])
def test_a_dataset_is_read_in_batches_and_whole(tmp_path, h5py, options, kind):
    stored = (X * 10).astype(kind)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file.create_dataset("train/x", data=stored, **options)
        file["labels"] = np.arange(103)
        file["words"] = IDS
    for name in (None, "train/x", "/train/x"):
        np.testing.assert_array_equal(read_array(tmp_path / "a.hdf5", member=name), stored)
    for rows, start in ((10, 0), (1000, 0), (7, 60)):
        reader = EmbeddingReader(tmp_path / "a.hdf5", id_column="words", batch_rows=rows)
        batches = list(reader.batches(start))
        np.testing.assert_array_equal(np.concatenate([b.rows for b in batches]), stored[start:])
        assert np.concatenate([b.ids for b in batches]).tolist() == IDS[start:]
    (batch,) = EmbeddingReader(tmp_path / "a.hdf5", id_column="labels").batches()
    assert batch.ids.tolist() == list(range(103))


def test_what_is_wrong_with_a_dataset_is_said(tmp_path, h5py):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = X
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["y"], file["flat"], file["c"] = X, X, X[0], X.astype(complex)
        file["far"] = h5py.ExternalLink(str(other), "x")
        layout = h5py.VirtualLayout(shape=X.shape, dtype="f4")
        layout[:] = h5py.VirtualSource(str(other), "x", shape=X.shape)
        file.create_virtual_dataset("virtual", layout)
        bad = X.copy()
        bad[77, 3] = np.nan
        file["nan"] = bad
        file.create_dataset("ragged", (103,), dtype=h5py.vlen_dtype(np.int32))
        file["few"] = np.arange(102)
        file.create_dataset("bomb", shape=(2**27, 8), dtype="f8", chunks=(2**10, 8), compression="gzip")
    for member, error, said in (
        (None, WrongContent, "x, y"),
        ("z", WrongContent, "'z'"),
        ("flat", WrongContent, r"real numbers \(n, d\)"),
        ("c", WrongContent, "complex"),
        ("far", WrongContent, "'far'"),
        ("virtual", WrongContent, "other files"),
        ("nan", WrongContent, "row 77, column 3"),
    ):
        with pytest.raises(error, match=said):
            read_array(tmp_path / "a.h5", member=member)
        with pytest.raises(error, match=said):
            list(EmbeddingReader(tmp_path / "a.h5", member=member, batch_rows=10).batches())
    for ids, said in (("ragged", "103 integers or texts"), ("few", "103 integers or texts"), ("z", "'z'")):
        with pytest.raises(WrongContent, match=said):
            EmbeddingReader(tmp_path / "a.h5", member="x", id_column=ids)
    with pytest.raises(TooLarge, match="bomb"):
        EmbeddingReader(tmp_path / "a.h5", member="bomb")
    (tmp_path / "cut.h5").write_bytes(other.read_bytes()[:1000])
    (tmp_path / "text.h5").write_text("no HDF5")
    for name in ("cut.h5", "text.h5"):
        with pytest.raises(CorruptFile, match=name):
            read_array(tmp_path / name)


def test_memory_does_not_grow_with_the_file(tmp_path, h5py):
    peaks = []
    for n in (20_000, 80_000):
        with h5py.File(tmp_path / f"{n}.h5", "w") as file:
            file["x"] = np.ones((n, 32), np.float32)
        tracemalloc.start()
        total = sum(float(b.rows.sum()) for b in EmbeddingReader(tmp_path / f"{n}.h5", batch_rows=2000).read())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == 32 * n
    assert peaks[1] < 1.2 * peaks[0]
