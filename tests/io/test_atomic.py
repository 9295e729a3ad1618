import builtins
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from polyspan.errors import CorruptFile, UnreadableFile
from polyspan.io import (
    EmbeddingWriter,
    atomic_directory,
    atomic_path,
    check_directory,
    read_array,
    read_json,
    read_members,
    remove_folder,
    sweep_temporaries,
    write_array,
    write_json,
    write_members,
    write_text,
)


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_a_file_appears_with_what_the_umask_leaves_and_a_replaced_one_keeps_its_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
        (tmp_path / "a").chmod(0o600)
        write_text(tmp_path / "a", "y")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_a_symbolic_link_is_followed_and_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    write_text(tmp_path / "link", "one")
    write_text(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "two"
    assert hidden(tmp_path) == hidden(tmp_path / "real") == []


def test_an_error_inside_leaves_the_old_file_and_no_temporary(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a") as temp:
        temp.write_bytes((tmp_path / "none").read_bytes())
    assert (tmp_path / "a").read_text() == "old"
    assert hidden(tmp_path) == []


def test_an_interrupt_inside_leaves_the_old_file_and_no_temporary(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a"):
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    assert hidden(tmp_path) == []


def test_a_folder_and_a_missing_folder_are_named(tmp_path):
    with pytest.raises(UnreadableFile, match="found a folder"):
        write_text(tmp_path, "x")
    with pytest.raises(UnreadableFile, match="no folder"):
        write_text(tmp_path / "none" / "a", "x")


def test_an_error_about_another_file_keeps_its_own_kind(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        os.stat(tmp_path / "other")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EXDEV, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "replace", "open", "chmod"])
def test_whichever_call_fails_the_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch, call, code):
    path = tmp_path / "a.npy"
    old, new = np.zeros((3, 2)), np.ones((3, 2))
    write_array(path, old)
    real, failures, told = getattr(os, call), 0, []
    for n in range(1, 20):
        count = 0

        def failing(*args, n=n, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, failing)
        try:
            write_array(path, new)
        except UnreadableFile as error:
            failures += 1
            told.append((error.path, error.found))
        finally:
            monkeypatch.setattr(os, call, real)
        found = read_array(path)
        assert np.array_equal(found, old) or np.array_equal(found, new)
        assert hidden(tmp_path) == []
        if count < n:
            break
        write_array(path, old)
    assert failures == n - 1 >= 1
    assert set(told) == {(str(path), os.strerror(code))}
    assert np.array_equal(read_array(path), new)


@pytest.mark.parametrize("kind", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_whichever_open_fails_nothing_is_left(tmp_path, monkeypatch, kind):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    real = builtins.open
    for n in (1, 2, 3):
        count = 0

        def failing(*args, n=n, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                raise kind
            return real(*args, **kwargs)

        monkeypatch.setattr(builtins, "open", failing)
        try:
            write_json(path, {"new": 1})
        except (UnreadableFile, KeyboardInterrupt):
            monkeypatch.setattr(builtins, "open", real)
            assert read_json(path) == {"old": 1}
        finally:
            monkeypatch.setattr(builtins, "open", real)
        assert hidden(tmp_path) == []
        if count < n:
            break
    assert read_json(path) == {"new": 1}


def test_two_writers_at_once_leave_one_whole_file(tmp_path):
    path = tmp_path / "a.npy"
    values = [np.full((2000, 50), i, np.float32) for i in range(2)]
    threads = [threading.Thread(target=lambda v=v: [write_array(path, v) for _ in range(5)]) for v in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_array(path)
    assert found.min() == found.max()
    assert hidden(tmp_path) == []


def test_a_map_stays_valid_while_its_file_is_rewritten(tmp_path):
    path = tmp_path / "a.npy"
    write_array(path, np.ones((1000, 8)))
    mapped = read_array(path)
    write_array(path, np.zeros((2, 8)))
    assert mapped.sum() == 8000


def test_sweeping_takes_old_temporaries_of_ours_only(tmp_path):
    names = [".a.npy.0123456789abcdef.tmp", ".b.0123456789abcdef.tmp", ".mine.tmp", "c.tmp", ".d.npy.partial"]
    for name in names:
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (0, 0))
    os.utime(tmp_path / names[1])
    assert [p.name for p in sweep_temporaries(tmp_path)] == [names[0]]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])


def test_a_folder_appears_whole_with_its_manifest(tmp_path):
    with atomic_directory(tmp_path / "set") as temp:
        (temp / "part").mkdir()
        (temp / "part" / "a.txt").write_text("hello")
        assert not (tmp_path / "set").exists()
    assert check_directory(tmp_path / "set") == ["part/a.txt"]
    assert hidden(tmp_path) == []
    with pytest.raises(UnreadableFile, match="something of that name"), atomic_directory(tmp_path / "set"):
        pass
    with atomic_directory(tmp_path / "set", replace=True) as temp:
        (temp / "b").write_text("new")
    assert check_directory(tmp_path / "set") == ["b"]
    assert hidden(tmp_path) == []


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    with atomic_directory(tmp_path / "set") as temp:
        (temp / "a").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "set", replace=True) as temp:
        (temp / "a").write_bytes((tmp_path / "none").read_bytes())
    assert (tmp_path / "set" / "a").read_text() == "old"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("n", [1, 2])
def test_a_failed_rename_of_a_folder_puts_the_old_one_back(tmp_path, monkeypatch, n):
    with atomic_directory(tmp_path / "set") as temp:
        (temp / "a").write_text("old")
    real, count = os.rename, 0

    def failing(*args):
        nonlocal count
        count += 1
        if count == n:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(UnreadableFile), atomic_directory(tmp_path / "set", replace=True) as temp:
        (temp / "a").write_text("new")
    assert (tmp_path / "set" / "a").read_text() == "old"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "a").write_text("olx"), "other bytes"),
        (lambda f: (f / "a").write_text("longer"), "6 bytes"),
        (lambda f: (f / "a").unlink(), "no file a"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest"),
        (lambda f: (f / "manifest.json").write_text("{"), "no manifest"),
        (
            lambda f: (f / "manifest.json").write_text('{"files": {"../a": {"bytes": 1, "sha256": ""}}}'),
            "outside the folder",
        ),
    ],
)
def test_a_harmed_folder_is_corrupt(tmp_path, harm, message):
    with atomic_directory(tmp_path / "set") as temp:
        (temp / "a").write_text("old")
    harm(tmp_path / "set")
    with pytest.raises(CorruptFile, match=message):
        check_directory(tmp_path / "set")


WRITER = """
import sys, numpy as np
from polyspan.io import write_array, write_members
path = sys.argv[1]
print("ready", flush=True)
for i in range(10**6):
    value = np.full((20000, 25), i % 7, np.float32)
    write_members(path, {"a": value, "b": value}) if path.endswith(("z", "s")) else write_array(path, value)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet", ".arrow"])
def test_a_killed_writer_leaves_a_whole_file(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    delays = random.Random(suffix)
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        child.stdout.readline()
        while not path.exists():
            time.sleep(0.01)
        time.sleep(delays.uniform(0.0, 0.15))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        for value in read_members(path).values() if suffix in (".npz", ".safetensors") else [read_array(path)]:
            assert value.shape == (20000, 25)
            assert value.min() == value.max()
    sweep_temporaries(tmp_path, older_than_s=-1)
    assert hidden(tmp_path) == []


def test_members_and_writers_leave_nothing_where_they_fail(tmp_path):
    with pytest.raises(ValueError, match="plain names"):
        write_members(tmp_path / "a.npz", {"../a": np.ones(2)})
    for suffix in (".npy", ".npz", ".safetensors", ".parquet", ".arrow"):
        with pytest.raises(ValueError, match="in all"), EmbeddingWriter(tmp_path / f"a{suffix}", dim=2, n_rows=3) as w:
            w.write(np.ones((2, 2), np.float32))
        with pytest.raises(ValueError, match="shape"), EmbeddingWriter(tmp_path / f"a{suffix}", dim=2, n_rows=3) as w:
            w.write(np.ones((2, 3), np.float32))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_removed_with_all_in_it_and_one_that_is_not_there_is_no_error(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").write_text("x")
    remove_folder(tmp_path / "a")
    remove_folder(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
