import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from polyspan._testing_reader import check_reader
from polyspan.errors import CorruptFile, TooLarge, UnreadableFile, UntrustedFile, WrongContent
from polyspan.io import EmbeddingReader, read_array, transform_file

X = np.random.default_rng(0).normal(size=(103, 5)).astype(np.float32)
WORDS = ["the", "ü", "3", "0.5", ". . .", "at name@domain.com", *(f"w{i}" for i in range(97))]


def text_lines(words=WORDS, rows=X, header=False, end="\n"):
    lines = [f"{len(words)} {len(rows[0])}"] if header else []
    lines += [" ".join([word, *(repr(float(x)) for x in row)]) for word, row in zip(words, rows, strict=True)]
    return "".join(line + end for line in lines)


def binary(words, rows, end=b"\n"):
    made = f"{len(words)} {len(rows[0])}\n".encode()
    for word, row in zip(words, rows, strict=True):
        made += word.encode() + b" " + struct.pack(f"<{len(row)}f", *row) + end
    return made


def whole(path, rows=10, start=0):
    batches = list(EmbeddingReader(path, batch_rows=rows).batches(start))
    return np.concatenate([b.rows for b in batches]), np.concatenate([b.ids for b in batches])


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n", " \n"])
@pytest.mark.parametrize("suffix", [".vec", ".txt", ".glove"])
def test_a_text_of_word_vectors_is_read_in_batches_and_whole(tmp_path, header, end, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("\ufeff" + text_lines(header=header, end=end), encoding="utf-8", newline="")
    reader = EmbeddingReader(path, batch_rows=10)
    assert (reader.n_rows, reader.dim, reader.dtype, reader.id_column) == (103, 5, np.float32, "id")
    assert [b.start for b in reader.batches()] == list(range(0, 103, 10))
    for rows, start in ((10, 0), (103, 0), (1000, 0), (7, 60), (10, 102)):
        found, words = whole(path, rows, start)
        np.testing.assert_array_equal(found, X[start:])
        assert words.tolist() == WORDS[start:]
    np.testing.assert_array_equal(read_array(path), X)
    path.write_text(text_lines(header=header).rstrip("\n"), encoding="utf-8")
    np.testing.assert_array_equal(read_array(path), X)


@pytest.mark.parametrize("suffix", [".bin", ".w2v"])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_binary_of_word2vec_is_read_in_batches_and_whole(tmp_path, suffix, end):
    path = tmp_path / f"a{suffix}"
    words = [word.replace(" ", "_") for word in WORDS]
    path.write_bytes(binary(words, X, end))
    for rows, start in ((10, 0), (103, 0), (1000, 0), (7, 60), (10, 102)):
        found, seen = whole(path, rows, start)
        np.testing.assert_array_equal(found, X[start:])
        assert seen.tolist() == words[start:]
    np.testing.assert_array_equal(read_array(path), X)


@pytest.mark.parametrize(
    ("content", "words", "rows"),
    [
        ("5 3\n7 4\n", ["5", "7"], [[3], [4]]),
        ("2 1\ncat 3\ndog 4\n", ["cat", "dog"], [[3], [4]]),
        ("1 2\n7 3 4\n", ["7"], [[3, 4]]),
    ],
)
def test_a_header_is_told_from_a_word_that_is_a_number(tmp_path, content, words, rows):
    (tmp_path / "a.vec").write_text(content)
    found, seen = whole(tmp_path / "a.vec")
    assert (seen.tolist(), found.tolist()) == (words, rows)


def test_words_are_kept_as_ids_where_vectors_are_carried_into_a_table(tmp_path):
    (tmp_path / "a.vec").write_text(text_lines(header=True))
    transform_file(tmp_path / "a.vec", tmp_path / "b.parquet", lambda rows: 2 * rows, dim=5, batch_rows=25)
    found, words = whole(tmp_path / "b.parquet")
    np.testing.assert_array_equal(found, 2 * X)
    assert words.tolist() == WORDS


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        ("", WrongContent, "line 1"),
        ("cat\n", WrongContent, "line 1"),
        ("cat 1 2\ndog 3 4\ncat 5 6\n", WrongContent, "line 3.*'cat' a second time"),
        ("3 2\ncat 1 2\ndog 3 4\ncat 5 6\n", WrongContent, "line 4.*'cat' a second time"),
        ("cat 1 2\ndog 3\nowl 5 6\n", WrongContent, "line 2.*1 numbers"),
        ("cat 1 2\ndog 3 4 5\nowl 5 6\n", WrongContent, "line 2.*at least 3 numbers"),
        ("cat 1 2\n\nowl 5 6\n", WrongContent, "line 2.*an empty line"),
        ("cat 1 2\ndog nan 4\n", WrongContent, "line 2, number 0.*nan"),
        ("2 2\ncat 1 2\ndog 3 -inf\n", WrongContent, "line 3, number 1.*-inf"),
        ("cat 1 2\ndog 3 1e39\n", WrongContent, "line 2, number 1.*1e39.*float32"),
        ("cat 1 2\ndog 3 1_0\n", WrongContent, "line 2, number 1.*1_0"),
        ("cat 1 2\ndog 3 x\n", WrongContent, "line 2, number 1.*'x'"),
        ("3 2\ncat 1 2\ndog 3 4\n", CorruptFile, "found 2 rows"),
        ("1 2\ncat 1 2\ndog 3 4\n", CorruptFile, "found"),
        ("99999999999 300\ncat 1 2\n", CorruptFile, "line 1"),
        ("cat " + "1 " * 600_000 + "\n", TooLarge, "line 1"),
    ],
)
def test_what_is_wrong_with_a_text_is_named_by_its_line(tmp_path, content, error, said):
    path = tmp_path / "a.vec"
    path.write_text(content)
    with pytest.raises(error, match=said):
        read_array(path)
    with pytest.raises(error, match=said):
        whole(path, 2)


def test_a_word_that_is_no_utf_8_and_files_that_are_others_are_refused(tmp_path):
    (tmp_path / "a.vec").write_bytes(b"cat 1 2\nd\xffg 3 4\n")
    with pytest.raises(CorruptFile, match=r"line 2.*0xff"):
        whole(tmp_path / "a.vec")
    for name in ("p.vec", "p.bin", "p.w2v"):
        (tmp_path / name).write_bytes(pickle.dumps({"x": [1.0]}))
        for read in (EmbeddingReader, read_array):
            with pytest.raises(UntrustedFile, match="runs code"):
                read(tmp_path / name)
    with pytest.raises(UnreadableFile):
        read_array(tmp_path / "none.bin")
    (tmp_path / "a.vec").write_text(text_lines())
    for name in ("column", "member", "id_column"):
        with pytest.raises(ValueError, match=f"{name} must be left out for .vec, got 'x'"):
            EmbeddingReader(tmp_path / "a.vec", **{name: "x"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (binary(["a", "b", "a"], X[:3]), "word 2.*'a' a second time"),
        (binary(["a", "b", "c"], X[:3])[:-3], "word 2|bytes"),
        (binary(["a", "b", "c"], X[:3]) + b"tail", "after the last word"),
        (b"9999999999 300\na ", "9,999,999,999 words"),
        (binary(["a", "", "c"], X[:3]), "word 1.*an empty word"),
        (binary(["a" * 5000], X[:1]), "word 0"),
        (binary(["a", "b"], [X[0], [np.nan, *X[1][1:]]]), "row 1, column 0"),
    ],
)
def test_what_is_wrong_with_a_binary_is_named_by_its_word(tmp_path, content, said):
    path = tmp_path / "a.w2v"
    path.write_bytes(content)
    with pytest.raises((CorruptFile, WrongContent), match=said):
        read_array(path)
    with pytest.raises((CorruptFile, WrongContent), match=said):
        whole(path, 2)


@pytest.mark.parametrize("suffix", [".vec", ".bin"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    peaks = []
    for n in (1000, 4000):
        rows = np.random.default_rng(1).integers(-9, 9, size=(n, 48)).astype(np.float32)
        words = [f"w{i}" for i in range(n)]
        path = tmp_path / f"{n}{suffix}"
        path.write_bytes(text_lines(words, rows).encode() if suffix == ".vec" else binary(words, rows))
        tracemalloc.start()
        total = sum(float(b.rows.sum()) for b in EmbeddingReader(path, batch_rows=500).read())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == rows.sum(dtype=np.float64)
    # Words are held to see that none comes twice: about 110 bytes each, against 192 bytes of numbers.
    assert peaks[1] < peaks[0] + 3000 * 150
    assert peaks[1] < 6 * os.path.getsize(tmp_path / f"4000{suffix}")


def test_broken_word_vectors_give_one_of_five_errors(tmp_path):
    (tmp_path / "a.vec").write_text(text_lines(WORDS[:12], X[:12], header=True))
    (tmp_path / "b.txt").write_text(text_lines(WORDS[:12], X[:12]))
    (tmp_path / "c.w2v").write_bytes(binary(["a", "b", "c"], X[:3]))
    check_reader("polyspan.io:read_array", sorted(tmp_path.iterdir()), mutations=200)
