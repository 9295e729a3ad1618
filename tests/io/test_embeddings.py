import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from polyspan.errors import CorruptFile, UnreadableFile, UntrustedFile, WrongContent
from polyspan.io import EmbeddingReader, EmbeddingWriter, read_array, read_members, transform_file, write_array

RNG = np.random.default_rng(0)
X = RNG.normal(size=(103, 5)).astype(np.float32)
Q = np.linalg.qr(RNG.normal(size=(5, 4)))[0].astype(np.float32)
SUFFIXES = (".npy", ".npz", ".safetensors", ".parquet", ".arrow")


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".fvecs"])
@pytest.mark.parametrize("rows", [1, 10, 103, 1000])
def test_batches_are_the_rows_in_order(tmp_path, suffix, rows):
    reader = EmbeddingReader(write_array(tmp_path / f"a{suffix}", X), batch_rows=rows)
    assert (reader.n_rows, reader.dim, reader.dtype) == (103, 5, np.float32)
    batches = list(reader.batches())
    np.testing.assert_array_equal(np.concatenate([b.rows for b in batches]), X)
    assert [b.start for b in batches] == list(range(0, 103, rows))
    np.testing.assert_array_equal(np.concatenate([b.rows for b in reader.batches(start=60)]), X[60:])
    assert list(reader.batches(start=103)) == []
    with pytest.raises(ValueError, match="read-only"):
        batches[0].rows[0, 0] = 1


def test_packed_foreign_and_narrow_files_are_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=X.astype(np.float16), y=np.arange(3))
    reader = EmbeddingReader(tmp_path / "a.npz", member="x", batch_rows=10)
    assert (reader.stored_dtype, reader.dtype) == ("float16", np.float32)
    for start in (0, 37):
        found = np.concatenate([b.rows for b in reader.batches(start)])
        np.testing.assert_array_equal(found, X.astype(np.float16)[start:])
    np.save(tmp_path / "a.npy", np.asfortranarray(X.astype(">f8")))
    found = np.concatenate([b.rows for b in EmbeddingReader(tmp_path / "a.npy", batch_rows=10).batches()])
    np.testing.assert_array_equal(found, X)
    assert found.dtype == np.float64
    brain = torch.from_numpy(X).to(torch.bfloat16)
    safetensors.torch.save_file({"x": brain}, tmp_path / "a.safetensors")
    (batch,) = EmbeddingReader(tmp_path / "a.safetensors").batches()
    np.testing.assert_array_equal(batch.rows, brain.float().numpy())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_writer_gives_the_bytes_of_the_whole(tmp_path, suffix):
    whole = write_array(tmp_path / f"a{suffix}", X)
    with EmbeddingWriter(tmp_path / f"b{suffix}", dim=5, n_rows=103) as writer:
        for start in range(0, 103, 20):
            writer.write(X[start : start + 20])
    np.testing.assert_array_equal(read_array(tmp_path / f"b{suffix}"), read_array(whole))
    if suffix in (".npy", ".npz"):
        assert (tmp_path / f"b{suffix}").read_bytes() == whole.read_bytes()
    if suffix != ".npz":
        with EmbeddingWriter(tmp_path / f"c{suffix}", dim=5, dtype=np.float16) as writer:
            writer.write(X)
        np.testing.assert_array_equal(read_array(tmp_path / f"c{suffix}"), X.astype(np.float16))
    assert hidden(tmp_path) == []


def test_a_writer_says_what_is_wrong(tmp_path):
    for arguments, message in (
        ({"dim": 0}, "dim must be"),
        ({"dim": 2, "dtype": np.int64}, "dtype must be"),
        ({"dim": 2, "with_ids": True}, "ids need a table"),
    ):
        with pytest.raises(ValueError, match=message):
            EmbeddingWriter(tmp_path / "a.npy", **arguments)
    with pytest.raises(ValueError, match="n_rows must be given"):
        EmbeddingWriter(tmp_path / "a.npz", dim=2)
    with pytest.raises(ValueError, match="must end in"):
        EmbeddingWriter(tmp_path / "a.csv", dim=2)
    with pytest.raises(ValueError, match="inside the with block"):
        EmbeddingWriter(tmp_path / "a.npy", dim=2).write(X)
    for rows, message in ((X, r"\(b, 4\)"), (X[:, :4].astype(int), "floats"), (np.full((2, 4), np.nan), "row 0")):
        with pytest.raises(ValueError, match=message), EmbeddingWriter(tmp_path / "a.npy", dim=4) as writer:
            writer.write(rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", [*SUFFIXES, ".fvecs"])
@pytest.mark.parametrize("target", SUFFIXES)
def test_every_source_is_carried_to_every_target(tmp_path, source, target):
    given = write_array(tmp_path / f"a{source}", X)
    seen = []
    n = transform_file(
        given,
        tmp_path / f"b{target}",
        lambda rows: rows @ Q,
        dim=4,
        batch_rows=25,
        progress=lambda *at: seen.append(at),
    )
    assert n == 103
    assert seen == [(25, 103), (50, 103), (75, 103), (100, 103), (103, 103)]
    found = read_array(tmp_path / f"b{target}")
    np.testing.assert_allclose(found, X @ Q, rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32
    assert hidden(tmp_path) == []


def test_ids_and_column_names_are_kept(tmp_path):
    ids = [f"item {i}" for i in range(103)]
    write_array(tmp_path / "a.parquet", X, ids=ids, column="emb")
    table = pq.read_table(tmp_path / "a.parquet").rename_columns(["key", "emb"])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    for name in ("b.parquet", "b.arrow"):
        transform_file(
            tmp_path / "a.parquet", tmp_path / name, lambda rows: rows @ Q, dim=4, id_column="key", batch_rows=20
        )
        reader = EmbeddingReader(tmp_path / name, column="emb", id_column="key")
        (batch,) = reader.batches()
        assert batch.ids.tolist() == ids
        np.testing.assert_allclose(batch.rows, X @ Q, rtol=1e-5, atol=1e-6)
    transform_file(tmp_path / "a.parquet", tmp_path / "b.npz", lambda rows: rows, dim=5, target_column="new")
    assert list(read_members(tmp_path / "b.npz")) == ["new"]


def test_tensors_may_come_out_of_the_function(tmp_path):
    given = write_array(tmp_path / "a.npy", X)
    transform_file(given, tmp_path / "b.npy", lambda rows: torch.tensor(rows) @ torch.tensor(Q), dim=4)
    np.testing.assert_allclose(read_array(tmp_path / "b.npy"), X @ Q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", SUFFIXES)
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda rows: rows, r"\(b, 4\)"),
        (lambda rows: (rows @ Q)[:-1], "keep the number of rows"),
        (lambda rows: np.where(np.arange(25)[: len(rows), None] == 3, np.nan, rows @ Q), "row 3"),
        (lambda rows: (rows @ Q).astype(int), "floats"),
    ],
)
def test_a_function_that_gives_something_else_is_told_and_the_target_stays(tmp_path, target, fn, message):
    given = write_array(tmp_path / "a.npy", X)
    old = write_array(tmp_path / f"b{target}", X[:2])
    with pytest.raises(ValueError, match=message):
        transform_file(given, old, fn, dim=4, batch_rows=25)
    np.testing.assert_array_equal(read_array(old), X[:2])


def test_the_source_is_never_a_target_and_arguments_are_named(tmp_path):
    given = write_array(tmp_path / "a.npy", X)
    (tmp_path / "link.npy").symlink_to(given)
    with pytest.raises(ValueError, match="another file than source"):
        transform_file(given, tmp_path / "link.npy", lambda rows: rows, dim=5)
    with pytest.raises(ValueError, match="target must end in"):
        transform_file(given, tmp_path / "b.csv", lambda rows: rows, dim=5)
    with pytest.raises(ValueError, match=r"journal is for a \.npy"):
        transform_file(given, tmp_path / "b.parquet", lambda rows: rows, dim=5, journal=tmp_path / "j")
    with pytest.raises(ValueError, match="batch_rows"):
        EmbeddingReader(given, batch_rows=0)
    with pytest.raises(UnreadableFile, match="no folder"):
        transform_file(given, tmp_path / "none" / "b.npy", lambda rows: rows, dim=5)
    with pytest.raises(WrongContent, match="2 dimensions"):
        EmbeddingReader(write_array(tmp_path / "c.npy", np.ones(3)))
    (tmp_path / "c.pkl").write_bytes(b"x")
    with pytest.raises(UntrustedFile):
        EmbeddingReader(tmp_path / "c.pkl")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nan_in_a_source_is_named_from_the_thread_that_reads(tmp_path, suffix):
    rows = X.copy()
    rows[77, 2] = np.nan
    with_nan = tmp_path / f"a{suffix}"
    good = write_array(with_nan, X)
    data = good.read_bytes().replace(X[77].tobytes(), rows[77].tobytes())
    with_nan.write_bytes(data)
    before = threading.active_count()
    with pytest.raises((WrongContent, CorruptFile)) as caught:
        transform_file(with_nan, tmp_path / "b.npy", lambda r: r, dim=5, batch_rows=10)
    if suffix in (".npy", ".arrow", ".safetensors"):
        assert "row 77, column 2" in str(caught.value)
    assert not (tmp_path / "b.npy").exists()
    assert threading.active_count() == before


def test_a_flipped_bit_is_found_at_the_end_of_a_pass(tmp_path):
    path = write_array(tmp_path / "a.safetensors", X)
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match="SHA-256"):
        list(EmbeddingReader(path, batch_rows=10).batches())


def test_a_reader_that_is_left_early_ends_its_thread(tmp_path):
    before = threading.active_count()
    batches = EmbeddingReader(write_array(tmp_path / "a.npy", X), batch_rows=1).batches()
    next(batches)
    batches.close()
    assert threading.active_count() == before


class Stops:
    """A function that is interrupted after some batches, and counts the rows it saw."""

    def __init__(self, after):
        self.left, self.rows = after, 0

    def __call__(self, rows):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.rows += len(rows)
        return rows @ Q


def run(source, target, fn, **options):
    return transform_file(source, target, fn, dim=4, batch_rows=10, fingerprint="q", **options)


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr("polyspan.io.transforming.SYNC_BYTES", 1)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("after", [0, 1, 4, 10])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tmp_path, after):
    source = write_array(tmp_path / "a.npy", X)
    run(source, tmp_path / "whole.npy", lambda rows: rows @ Q)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "b.npy", Stops(after))
    assert not (tmp_path / "b.npy").exists()
    rest = Stops(-1)
    run(source, tmp_path / "b.npy", rest)
    assert rest.rows == 103 - 10 * after
    assert (tmp_path / "b.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert hidden(tmp_path) == []


@pytest.mark.usefixtures("small_steps")
def test_a_journal_elsewhere_with_a_torn_line_is_mended(tmp_path):
    source, journal = write_array(tmp_path / "a.npy", X), tmp_path / "work.journal"
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "b.npy", Stops(3), journal=journal)
    with journal.open("ab") as file:
        file.write(b'{"key": "30", "va')
    rest = Stops(-1)
    run(source, tmp_path / "b.npy", rest, journal=journal)
    assert rest.rows == 73
    np.testing.assert_allclose(read_array(tmp_path / "b.npy"), X @ Q, rtol=1e-5, atol=1e-6)
    assert not journal.exists()


@pytest.mark.usefixtures("small_steps")
def test_other_work_is_refused_and_what_differs_is_named(tmp_path):
    source, target = write_array(tmp_path / "a.npy", X), tmp_path / "b.npy"
    with pytest.raises(KeyboardInterrupt):
        run(source, target, Stops(3))
    with pytest.raises(ValueError, match="fn"):
        transform_file(source, target, Stops(-1), dim=4, batch_rows=10, fingerprint="other")
    with pytest.raises(ValueError, match="batch_rows"):
        transform_file(source, target, Stops(-1), dim=4, batch_rows=20, fingerprint="q")
    write_array(source, X + 1)
    with pytest.raises(ValueError, match="source"):
        run(source, target, Stops(-1))
    anew = Stops(-1)
    run(source, target, anew, resume=False)
    assert anew.rows == 103
    np.testing.assert_allclose(read_array(target), (X + 1) @ Q, rtol=1e-5, atol=1e-5)
    assert hidden(tmp_path) == []


@pytest.mark.usefixtures("small_steps")
def test_a_partial_file_that_lost_rows_is_corrupt_and_without_one_the_work_begins_anew(tmp_path):
    source, target = write_array(tmp_path / "a.npy", X), tmp_path / "b.npy"
    with pytest.raises(KeyboardInterrupt):
        run(source, target, Stops(3))
    partial = tmp_path / ".b.npy.partial"
    partial.write_bytes(partial.read_bytes()[:-200])
    with pytest.raises(CorruptFile, match="partial file"):
        run(source, target, Stops(-1))
    partial.unlink()
    anew = Stops(-1)
    run(source, target, anew)
    assert anew.rows == 103


def test_two_runs_at_one_target_are_refused(tmp_path):
    source, target = write_array(tmp_path / "a.npy", X), tmp_path / "b.npy"
    told = []

    def fn(rows):
        if not told:
            with pytest.raises(UnreadableFile, match="another run"):
                run(source, target, Stops(-1))
            told.append(True)
        return rows @ Q

    run(source, target, fn)
    assert told
    np.testing.assert_allclose(read_array(target), X @ Q, rtol=1e-5, atol=1e-6)


def test_a_failed_sync_leaves_the_target_and_the_next_run_ends_it(tmp_path, monkeypatch):
    import errno
    import os

    source, target = write_array(tmp_path / "a.npy", X), write_array(tmp_path / "b.npy", X)
    real, told = os.fsync, set()
    for n in range(1, 20):
        count = 0

        def failing(descriptor, n=n):
            nonlocal count
            count += 1
            if count == n:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(descriptor)

        monkeypatch.setattr(os, "fsync", failing)
        try:
            run(source, target, lambda rows: rows @ Q)
        except UnreadableFile as error:
            told.add(error.found)
        finally:
            monkeypatch.setattr(os, "fsync", real)
        assert read_array(target).shape in ((103, 5), (103, 4))
        if count < n:
            break
    assert told == {"No space left on device"}
    np.testing.assert_allclose(read_array(target), X @ Q, rtol=1e-5, atol=1e-6)
    assert hidden(tmp_path) == []


WORK = """
import sys, time, numpy as np
import polyspan.io.transforming as e
e.SYNC_BYTES = 1
Q = np.load(sys.argv[3])
def fn(rows):
    time.sleep(0.004)
    return rows @ Q
print("ready", flush=True)
e.transform_file(sys.argv[1], sys.argv[2], fn, dim=8, batch_rows=50, fingerprint="q")
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    rng, delays = np.random.default_rng(1), random.Random(1)
    source = write_array(tmp_path / "a.npy", rng.normal(size=(6000, 16)).astype(np.float32))
    turn = write_array(tmp_path / "q.npy", rng.normal(size=(16, 8)).astype(np.float32))
    command = [sys.executable, "-c", WORK, str(source)]
    subprocess.run([*command, str(tmp_path / "whole.npy"), str(turn)], check=True, capture_output=True)
    journal, kept = tmp_path / ".b.npy.journal", []
    for _ in range(6):
        child = subprocess.Popen([*command, str(tmp_path / "b.npy"), str(turn)], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(delays.uniform(0.02, 0.12))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if journal.exists():
            kept.append(sum(1 for line in journal.read_bytes().split(b"\n") if line.endswith(b"}")) - 1)
    assert kept == sorted(kept)
    assert kept[-1] > kept[0]
    subprocess.run([*command, str(tmp_path / "b.npy"), str(turn)], check=True, capture_output=True)
    assert (tmp_path / "b.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    # A kill in the middle of a rename leaves a temporary, which is swept after a day.
    assert [name for name in hidden(tmp_path) if not name.endswith(".tmp")] == []


MEMORY = """
import sys, json, threading, time, numpy as np
from polyspan.io import transform_file
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
import pyarrow.parquet
Q = np.eye(64, dtype=np.float32)
peak, stop = [0], threading.Event()
def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
start = anonymous()
thread = threading.Thread(target=watch)
thread.start()
transform_file(sys.argv[1], sys.argv[2], lambda rows: rows @ Q, dim=64, batch_rows=8192)
stop.set()
thread.join()
print(json.dumps(peak[0] - start))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells anonymous memory")
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    # Freed pieces go back to the system at once: what allocators keep is 40 MB more or less, whatever the file.
    kept = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    peaks, sizes = [], []
    for n in (60_000, 960_000):
        source = tmp_path / f"{n}{suffix}"
        with EmbeddingWriter(source, dim=64, n_rows=n) as writer:
            for _ in range(0, n, 20_000):
                writer.write(np.ones((20_000, 64), np.float32))
        command = [sys.executable, "-c", MEMORY, str(source), str(tmp_path / f"out{suffix}")]
        ran = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **kept})
        peaks.append(json.loads(ran.stdout))
        sizes.append(source.stat().st_size)
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 8


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet"])
def test_half_precision_stays_half_precision_unless_another_is_asked_for(tmp_path, suffix):
    halves = X.astype(np.float16)
    source = write_array(tmp_path / f"a{suffix}", halves)
    run(source, tmp_path / f"b{suffix}", lambda rows: rows @ Q)
    assert EmbeddingReader(tmp_path / f"b{suffix}").stored_dtype == "float16"
    expected = (halves.astype(np.float32) @ Q).astype(np.float16)
    np.testing.assert_array_equal(read_array(tmp_path / f"b{suffix}"), expected.astype(np.float32))
    run(source, tmp_path / f"c{suffix}", lambda rows: rows @ Q, dtype=np.float32)
    np.testing.assert_array_equal(read_array(tmp_path / f"c{suffix}"), halves.astype(np.float32) @ Q)
    run(source, tmp_path / "d.fvecs", lambda rows: (rows @ Q).astype(np.float32))
    assert EmbeddingReader(tmp_path / "d.fvecs").stored_dtype == "float32"


def test_a_number_that_the_stored_width_cannot_hold_is_refused_by_row(tmp_path):
    source = write_array(tmp_path / "a.npy", np.ones((40, 4), dtype=np.float16))

    def fn(rows):
        made = rows[:, :4].astype(np.float32)
        made[7] = 1e5
        return made

    with pytest.raises(ValueError, match="float16 can hold, got 100000 at row 7"):
        run(source, tmp_path / "b.npy", fn)
    with pytest.raises(ValueError, match="dtype must be float16, float32 or float64, got int8"):
        run(source, tmp_path / "c.npy", lambda rows: rows, dtype=np.int8)
