import gzip
import json
import lzma
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyspan.errors import CorruptFile, TooLarge, UnreadableFile, WrongContent
from polyspan.io import (
    append_line,
    digest_array,
    digest_file,
    list_folder,
    make_folder,
    parse_json,
    read_bytes,
    read_csv,
    read_json,
    read_jsonl,
    read_lines,
    read_text,
    read_toml,
    remove_file,
    write_json,
    write_jsonl,
    write_text,
)

TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=TREES)
@settings(max_examples=25)
def test_what_is_written_as_json_is_read_back_equal(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "a.json"
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    assert read_json(write_json(path, value)) == value


def test_numpy_scalars_arrays_and_paths_have_a_json_form(tmp_path):
    value = {"a": np.float32(0.5), "b": np.arange(3), "c": (1, np.int64(2)), "d": tmp_path, "e": np.bool_(True)}
    found = read_json(write_json(tmp_path / "a.json", value))
    assert found == {"a": 0.5, "b": [0, 1, 2], "c": [1, 2], "d": str(tmp_path), "e": True}


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ({"a": [1.0, float("nan")]}, ValueError, r"value\['a'\]\[1\] must be finite"),
        ({"a": object()}, TypeError, r"value\['a'\] must be made of JSON types, got object"),
        ({1: 2}, TypeError, "keys that are str, got 1"),
    ],
)
def test_what_has_no_json_form_is_named_and_nothing_is_written(tmp_path, value, kind, message):
    with pytest.raises(kind, match=message):
        write_json(tmp_path / "a.json", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, column 1"),
        ('{"a": 1', "line 1"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ("[NaN]", "the number NaN"),
        ("[-Infinity]", "the number -Infinity"),
        ("[1e999]", "beyond float64"),
        ("[" * 2000 + "]" * 2000, "nesting deeper"),
        ("[" * 202 + "]" * 202, "nesting deeper"),
        ('{"a":' * 100_000, "nesting deeper"),
        ('["\\ud800"]', "half a surrogate pair"),
        ("9" * 5000, "digits"),
    ],
)
def test_json_that_two_readers_would_read_differently_is_corrupt(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CorruptFile, match=message):
        read_json(tmp_path / "a.json")


def test_byte_order_mark_and_line_ends_make_no_difference(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a":\r\n1}\r\n')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc")
    assert read_text(tmp_path / "a.txt") == "a\nb\nc"


def test_bytes_that_are_no_utf8_are_placed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xffc")
    with pytest.raises(CorruptFile, match=r"byte 2.*0xff"):
        read_text(tmp_path / "a.txt")


def test_packed_text_is_read_within_the_limit(tmp_path):
    for suffix, pack in ((".gz", gzip.compress), (".xz", lzma.compress)):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(pack(b"hello\n" * 1000))
        assert read_text(path) == "hello\n" * 1000
        with pytest.raises(TooLarge):
            read_text(path, max_bytes=5000)
        path.write_bytes(pack(b"hello\n" * 1000)[:-9])
        with pytest.raises(CorruptFile):
            read_text(path)


def test_what_is_no_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableFile, match="No such file"):
        read_text(tmp_path / "none")
    with pytest.raises(UnreadableFile, match="a folder"):
        read_bytes(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableFile, match="pipe"):
        read_bytes(tmp_path / "pipe")
    with pytest.raises(UnreadableFile, match="found a file"):
        list_folder(write_text(tmp_path / "a", "x"))
    assert "Name:" in read_text("/proc/self/status")


def test_lines_of_json_come_back_and_a_torn_last_one_is_told(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": 1}, [2], "x"])
    assert list(read_jsonl(path)) == [{"a": 1}, [2], "x"]
    path.write_text('{"a": 1}\n\n{"b"')
    with pytest.raises(CorruptFile, match="line 3"):
        list(read_jsonl(path))
    assert list(read_jsonl(path, torn="drop")) == [{"a": 1}]
    path.write_text('{"a": 1\n{"b": 2}\n')
    with pytest.raises(CorruptFile, match="line 1"):
        list(read_jsonl(path, torn="drop"))
    path.write_text(json.dumps("x" * 2**20) + "\n")
    with pytest.raises(TooLarge, match="line 1"):
        list(read_jsonl(path))
    path.write_bytes(b"\xef\xbb\xbf1\r\n2")
    assert list(read_jsonl(path)) == [1, 2]


def test_appended_lines_are_whole_or_told_apart(tmp_path):
    path = tmp_path / "journal"
    for line in ("one", "zwei ü"):
        append_line(path, line)
    assert read_lines(path) == (["one", "zwei ü"], False)
    with path.open("ab") as file:
        file.write("drü".encode()[:-1])
    assert read_lines(path) == (["one", "zwei ü"], True)
    with pytest.raises(ValueError, match="line break"):
        append_line(path, "a\nb")
    remove_file(path)
    remove_file(path)
    assert list_folder(tmp_path) == []


def test_a_table_of_text_is_read_by_column(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"a, ""b""",x\nc,y\n')
    assert read_csv(tmp_path / "a.csv") == {"text": ['a, "b"', "c"], "label": ["x", "y"]}


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("a,b\n1\n", CorruptFile, "line 2.*1 cells"),
        ("a,a\n1,2\n", WrongContent, "'a' twice"),
        ("", WrongContent, "no header"),
        ('a\n"x\n', CorruptFile, "line 2"),
    ],
)
def test_a_broken_table_of_text_is_told(tmp_path, text, kind, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(kind, match=message):
        read_csv(tmp_path / "a.csv")


def test_toml_and_folders(tmp_path):
    folder = make_folder(tmp_path / "a" / "b")
    assert read_toml(write_text(folder / "x.toml", "a = 1\n")) == {"a": 1}
    with pytest.raises(CorruptFile, match="TOML"):
        read_toml(write_text(folder / "y.toml", "a = \n"))
    write_text(folder / ".hidden", "")
    assert [p.name for p in list_folder(folder)] == ["x.toml", "y.toml"]
    assert [p.name for p in list_folder(folder, "x*")] == ["x.toml"]


def test_parse_json_names_its_place():
    with pytest.raises(CorruptFile, match="file at line 3"):
        parse_json("{", "file", "line 3")


def test_digests_tell_dtype_and_shape_but_not_layout(tmp_path):
    X = np.arange(12.0).reshape(3, 4)
    assert digest_array(X) == digest_array(np.asfortranarray(X)) == digest_array(X.astype(">f8"))
    others = [X.astype(np.float32), X.reshape(4, 3), X.reshape(-1), X + 1]
    assert len({digest_array(x) for x in [X, *others]}) == 5
    assert digest_array(np.array(3.0)) != digest_array(np.array([3.0]))
    assert len(digest_array(np.empty((0, 3)))) == 64
    with pytest.raises(TypeError, match="object"):
        digest_array(np.array([object()]))
    assert digest_file(write_text(tmp_path / "a", "abc")).startswith("ba7816bf")
