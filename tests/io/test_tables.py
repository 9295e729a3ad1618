import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from polyspan.errors import CorruptFile, TooLarge, WrongContent
from polyspan.io import EmbeddingReader, read_array, write_array

X = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)


def save(path, table, **options):
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
    else:
        pa.feather.write_feather(table, str(path), compression="uncompressed")
    return path


def lists(rows, kind=None):
    return pa.array(rows, type=pa.list_(kind or pa.float32()))


@pytest.fixture(params=[".parquet", ".arrow"])
def path(request, tmp_path):
    return tmp_path / f"a{request.param}"


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), 3),
        pa.list_(pa.float64()),
        pa.list_(pa.float16(), 3),
    ],
    ids=str,
)
def test_every_kind_of_list_is_read(path, kind):
    half = "half" in str(kind)
    rows = X.astype(np.float16) if half else X
    save(path, pa.table({"v": pa.array(list(rows), type=kind), "n": range(7)}))
    found = read_array(path)
    np.testing.assert_array_equal(found, rows)
    assert found.dtype == (np.float64 if "double" in str(kind) else np.float32)


def test_integers_are_widened(path):
    save(path, pa.table({"v": lists([[1, 2], [3, 4]], pa.int8())}))
    found = read_array(path)
    assert found.dtype == np.float32
    assert found.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("kind", [None, 3])
def test_a_null_vector_is_named_and_shifts_nothing(path, kind):
    column = pa.array([[1.0, 2, 3], None, [4, 5, 6]], type=pa.list_(pa.float32(), kind or -1))
    save(path, pa.table({"v": column}))
    with pytest.raises(WrongContent, match="row 1"):
        read_array(path)
    with pytest.raises(WrongContent, match="row 1"):
        list(EmbeddingReader(path).batches())


def test_a_null_component_is_named(path):
    save(path, pa.table({"v": lists([[1.0, 2], [3, None]])}))
    with pytest.raises(WrongContent, match="row 1: found a null component"):
        read_array(path)


def test_ragged_rows_are_named_with_their_lengths(path):
    save(path, pa.table({"v": lists([[1.0, 2], [3, 4], [5]])}))
    with pytest.raises(WrongContent, match=r"row 2: found a vector of length 1; expected length 2"):
        read_array(path)


@pytest.mark.parametrize("row", [0, 3, 6])
def test_nan_is_named(path, row):
    rows = X.copy()
    rows[row, 1] = np.nan
    save(path, pa.table({"v": lists(list(rows))}))
    with pytest.raises(WrongContent, match=f"row {row}, column 1"):
        read_array(path)
    with pytest.raises(WrongContent, match=f"row {row}, column 1"):
        list(EmbeddingReader(path, batch_rows=2).batches())


def test_the_column_is_the_only_list_or_vector_or_named(path):
    save(path, pa.table({"a": lists(list(X)), "b": lists(list(X + 1)), "t": ["x"] * 7}))
    with pytest.raises(WrongContent, match="2 columns of lists: a, b"):
        read_array(path)
    np.testing.assert_array_equal(read_array(path, column="b"), X + 1)
    with pytest.raises(WrongContent, match="no column 'B'; expected one of: b"):
        read_array(path, column="B")
    with pytest.raises(WrongContent, match="column 't' of type string"):
        read_array(path, column="t")
    save(path, pa.table({"a": lists(list(X)), "vector": lists(list(X + 1))}))
    np.testing.assert_array_equal(read_array(path), X + 1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"t": ["x"]}, "0 columns of lists"),
        ({"v": pa.array([["x"]])}, "lists of string"),
        ({"v": pa.array([[{"a": 1}]])}, "lists of struct"),
        ({"v": pa.array([[1]], type=pa.list_(pa.decimal128(5, 2)))}, "lists of decimal"),
        ({"v": lists([])}, "no row"),
        ({"v": lists([[]])}, "length 0"),
    ],
)
def test_other_content_is_wrong(path, columns, message):
    save(path, pa.table(columns))
    with pytest.raises(WrongContent, match=message):
        read_array(path)


def test_broken_bytes_are_corrupt(path):
    data = save(path, pa.table({"v": lists(list(X))})).read_bytes()
    for broken in (b"", data[:5], data[:-1], data[:-20], b"x" + data, data[: len(data) // 2]):
        path.write_bytes(broken)
        with pytest.raises(CorruptFile):
            read_array(path)


def test_memory_is_limited(path):
    save(path, pa.table({"v": lists(list(X))}))
    with pytest.raises(TooLarge, match="84 bytes"):
        read_array(path, max_bytes=83)


def test_encrypted_parquet_and_old_feather_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PARE" + bytes(40) + b"PARE")
    with pytest.raises(WrongContent, match="encrypted"):
        read_array(tmp_path / "a.parquet")
    (tmp_path / "a.feather").write_bytes(b"FEA1" + bytes(40) + b"FEA1")
    with pytest.raises(WrongContent, match="version 1"):
        read_array(tmp_path / "a.feather")


def test_a_flipped_bit_in_a_page_of_ours_is_corrupt(tmp_path):
    path = write_array(tmp_path / "a.parquet", X)
    data = bytearray(path.read_bytes())
    at = bytes(data).index(X.tobytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match=r"(?i)crc"):
        read_array(path)


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_ids_come_with_their_rows_whatever_the_row_groups(path, rows):
    for ids in (pa.array(list("abcdefg")), pa.array(list("abcdefg")).dictionary_encode(), pa.array(range(7))):
        table = pa.table({"id": ids, "v": lists(list(X))})
        save(path, table, **({"row_group_size": 2} if path.suffix == ".parquet" else {}))
        batches = list(EmbeddingReader(path, batch_rows=rows).batches())
        np.testing.assert_array_equal(np.concatenate([b.rows for b in batches]), X)
        assert np.concatenate([b.ids for b in batches]).tolist() == table["id"].to_pylist()
        assert [b.start for b in batches] == list(range(0, 7, rows))
        late = list(EmbeddingReader(path, batch_rows=rows).batches(start=5))
        np.testing.assert_array_equal(np.concatenate([b.rows for b in late]), X[5:])


def test_id_columns_that_cannot_be_ids(path):
    save(path, pa.table({"key": [1.5] * 7, "holes": [None, *range(6)], "v": lists(list(X))}))
    with pytest.raises(WrongContent, match="ids of type double"):
        list(EmbeddingReader(path, id_column="key").batches())
    with pytest.raises(WrongContent, match="null id"):
        list(EmbeddingReader(path, id_column="holes").batches())
    with pytest.raises(WrongContent, match="no column 'none'; expected one of: holes, key, v"):
        EmbeddingReader(path, id_column="none")
    assert EmbeddingReader(path).id_column is None


def test_ids_and_metadata_are_written(path):
    write_array(path, X, ids=list("abcdefg"), column="emb", metadata={"model": "m"})
    (batch,) = EmbeddingReader(path).batches()
    assert batch.ids.tolist() == list("abcdefg")
    table = pq.read_table(path) if path.suffix == ".parquet" else pa.feather.read_table(path)
    assert table.schema.metadata[b"model"] == b"m"
    assert table.schema.field("emb").type.list_size == 3


def test_a_column_twice_is_corrupt(path):
    save(path, pa.Table.from_arrays([lists(list(X)), lists(list(X))], names=["v", "v"]))
    with pytest.raises(CorruptFile, match="twice"):
        read_array(path)
