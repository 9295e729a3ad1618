import csv
import json
import tracemalloc

import numpy as np
import pytest

from polyspan._testing_reader import check_reader
from polyspan.errors import CorruptFile, TooLarge, WrongContent
from polyspan.io import EmbeddingReader, read_array, transform_file, write_array

X = np.random.default_rng(0).normal(size=(103, 5))
IDS = [f"item, {i}\nof many" for i in range(103)]


def write(path, rows=X, ids=IDS, column="vector"):
    if path.suffix == ".jsonl":
        pairs = zip(ids, rows, strict=True)
        lines = [json.dumps({"id": i, column: list(map(float, row)), "tags": "x"}) for i, row in pairs]
        path.write_text("\n".join(lines) + "\n")
    else:
        with open(path, "w", newline="") as file:
            cells = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            cells.writerow(["id", column, "tags"])
            cells.writerows([i, json.dumps(list(map(float, row))), "x"] for i, row in zip(ids, rows, strict=True))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("column", ["vector", "emb"])
def test_lists_are_read_in_batches_and_whole_with_their_ids(tmp_path, suffix, column):
    path = write(tmp_path / f"a{suffix}", column=column)
    reader = EmbeddingReader(path, batch_rows=10)
    assert (reader.n_rows, reader.dim, reader.dtype, reader.column) == (103, 5, np.float64, column)
    for rows, start in ((10, 0), (103, 0), (1000, 0), (7, 60)):
        batches = list(EmbeddingReader(path, column=column, batch_rows=rows).batches(start))
        np.testing.assert_array_equal(np.concatenate([b.rows for b in batches]), X[start:])
        assert np.concatenate([b.ids for b in batches]).tolist() == IDS[start:]
    np.testing.assert_array_equal(read_array(path), X)
    np.testing.assert_array_equal(read_array(path, column=column), X)
    transform_file(path, tmp_path / "b.parquet", lambda rows: rows, dim=5)
    (batch,) = EmbeddingReader(tmp_path / "b.parquet").batches()
    assert batch.ids.tolist() == IDS


def test_lines_that_are_lists_and_whole_number_ids_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row.tolist()) for row in X) + "\n\n")
    np.testing.assert_array_equal(read_array(tmp_path / "a.jsonl"), X)
    assert EmbeddingReader(tmp_path / "a.jsonl").id_column is None
    write(tmp_path / "b.jsonl", ids=[2**60 + i for i in range(103)])
    (batch,) = EmbeddingReader(tmp_path / "b.jsonl").batches()
    assert batch.ids.tolist() == [2**60 + i for i in range(103)]
    (batch,) = EmbeddingReader(tmp_path / "b.jsonl", id_column="tags").batches()
    assert set(batch.ids.tolist()) == {"x"}


def test_a_csv_of_plain_numbers_is_read_as_before(tmp_path):
    path = write_array(tmp_path / "a.csv", X)
    np.testing.assert_array_equal(read_array(path), X)


GOOD = '{"id": "a", "v": [1, 2]}\n'


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        ("", WrongContent, "no row"),
        (GOOD + '{"id": "b", "v": [1]}\n', WrongContent, "row 1, column v.*length 1.*length 2"),
        (GOOD + '{"id": "b", "v": null}\n', WrongContent, "row 1, column v.*null"),
        (GOOD + '{"id": "b"}\n', WrongContent, "row 1, column v.*null"),
        (GOOD + '{"id": "b", "v": [1, null]}\n', WrongContent, "row 1, column v, number 1.*null"),
        (GOOD + '{"id": "b", "v": [1, true]}\n', WrongContent, "row 1, column v, number 1.*true"),
        (GOOD + '{"id": "b", "v": [1, "2"]}\n', WrongContent, "row 1, column v, number 1"),
        (GOOD + '{"id": "b", "v": [1, NaN]}\n', CorruptFile, "line 2.*NaN"),
        (GOOD + '{"id": "b", "v": [1, 1e999]}\n', CorruptFile, "line 2.*1e999"),
        (GOOD + '{"id": "b", "v": [1, ' + "9" * 400 + "]}\n", WrongContent, "row 1, column v, number 1"),
        (GOOD + '{"id": "b", "v": [1, 2], "v": [3, 4]}\n', CorruptFile, "line 2.*twice"),
        (GOOD + '{"id": "b", "v": [1, 2', CorruptFile, "line 2"),
        (GOOD + "7\n", WrongContent, "row 1.*int"),
        ('{"v": [1], "w": [2]}\n', WrongContent, "2 columns of lists: v, w"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(tmp_path, content, error, said):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(error, match=said):
        read_array(path)
    with pytest.raises(error, match=said):
        list(EmbeddingReader(path).batches())


def test_ids_of_two_kinds_missing_ones_and_missing_columns_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    kinds = (("7", "7.*str as in row 0"), ("null", "null.*integer or text"), ("1.5", "1.5.*integer or text"))
    for second, said in kinds:
        path.write_text(GOOD + f'{{"id": {second}, "v": [3, 4]}}\n')
        with pytest.raises(WrongContent, match=f"row 1, column id: found {said}"):
            list(EmbeddingReader(path).batches())
    with pytest.raises(WrongContent, match="'w'"):
        read_array(path, column="w")
    with pytest.raises(ValueError, match="member must be left out"):
        EmbeddingReader(path, member="w")


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        ('id,v\na,"[1, 2]"\nb,"[1]"\n', WrongContent, "line 3, column v.*length 1"),
        ('id,v\na,"[1, 2]"\nb\n', CorruptFile, "line 3.*1 cells"),
        ('id,v\na,"[1, 2]"\nb,"[1, x]"\n', CorruptFile, "line 3, column v"),
        ('id,v\na,"[1, 2]"\nb,""\n', CorruptFile, "line 3, column v"),
        ('id,v\na,"[1, 2]"\nb,"[1, 2\n', CorruptFile, "line"),
        ('id,v\na,"[' + "1," * 70_000 + '1]"\n', TooLarge, "line 2.*field"),
    ],
)
def test_what_is_wrong_with_a_cell_is_named_by_its_line(tmp_path, content, error, said):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(error, match=said):
        list(EmbeddingReader(path, column="v").batches())
    with pytest.raises(error, match=said):
        read_array(path, column="v")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    peaks = []
    for n in (100, 400):
        rows = np.random.default_rng(1).integers(-9, 9, size=(n, 64)).astype(float)
        path = write(tmp_path / f"{n}{suffix}", rows, [f"i{k}" for k in range(n)])
        tracemalloc.start()
        total = sum(float(b.rows.sum()) for b in EmbeddingReader(path, batch_rows=50).read())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == rows.sum()
    assert peaks[1] < 1.2 * peaks[0]


def test_broken_lists_give_one_of_five_errors(tmp_path):
    write(tmp_path / "a.jsonl", X[:12], IDS[:12])
    write(tmp_path / "b.csv", X[:12], IDS[:12])
    check_reader("polyspan.io:read_array", sorted(tmp_path.iterdir()), mutations=150)
