import numpy as np
import pytest
import scipy.io

from polyspan.errors import CorruptFile, WrongContent
from polyspan.io import read_labelled, read_labels, write_array, write_columns, write_members


@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 5)])
def test_a_vector_is_a_vector_however_it_was_kept(tmp_path, shape):
    write_array(tmp_path / "y.npy", np.arange(5).reshape(shape))
    found = read_labels(tmp_path / "y.npy")
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, np.arange(5))


def test_a_matrix_a_fraction_and_nothing_are_no_labels(tmp_path):
    for values in (np.ones((5, 2), int), np.array([0.5, 1.0]), np.zeros(0, int), np.zeros((0, 1), int)):
        write_array(tmp_path / "y.npy", values)
        with pytest.raises(WrongContent):
            read_labels(tmp_path / "y.npy")


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ","), (".tsv", "\t")])
def test_a_table_is_joined_by_id_or_taken_in_order(tmp_path, suffix, mark):
    path = tmp_path / f"y{suffix}"
    path.write_text("\n".join(mark.join(row) for row in [("id", "label"), ("b", "1"), ("a", "0"), ("c", "2")]) + "\n")
    assert read_labels(path, np.array(["a", "b"])).tolist() == ["0", "1"]
    assert read_labels(path).tolist() == ["1", "0", "2"]
    with pytest.raises(WrongContent, match="found no label of 'd'"):
        read_labels(path, ["d"])


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("values", [[1, 0, 2], [1.0, 0.0, 2.0], ["x", "y", "z"]])
def test_a_table_of_another_kind_is_read_as_a_text_table_is(tmp_path, suffix, values):
    path = write_columns(tmp_path / f"y{suffix}", {"id": ["b", "a", "c"], "label": values})
    found = read_labels(path)
    assert found.tolist() == values
    assert found.dtype.kind in "iU"
    assert read_labels(path, np.array(["a", "b"])).tolist() == [values[1], values[0]]
    with pytest.raises(WrongContent, match="found no label of 'd'"):
        read_labels(path, ["d"])
    numbered = write_columns(tmp_path / f"n{suffix}", {"id": [7, 5], "label": values[:2]})
    assert read_labels(numbered, np.array([5, 7])).tolist() == [values[1], values[0]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0.5, 1.0]}, "at column label: found fractions"),
        ({"id": ["a", "a"], "label": [0, 1]}, "at column id: found a more than once"),
    ],
)
def test_a_table_of_no_labels_is_refused_by_its_column(tmp_path, columns, message):
    with pytest.raises(WrongContent, match=message):
        read_labels(write_columns(tmp_path / "y.parquet", columns))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,label\na,1\n\nb,\n", "at line 4, column label: found an empty cell"),
        ("id,label\na,1\nb,  \n", "at line 3, column label: found an empty cell"),
        ("id,label\n,1\nb,2\n", "at line 2, column id: found an empty cell"),
        ("id,label\na,1\nb,2\n\na,1\n", "at line 5, column id: found 'a' again, which line 2 has"),
        ('id,label\n"a\nx",1\nb,\n', "at line 4, column label: found an empty cell"),
        ("id,kind\na,1\n", "columns id, kind; expected a column label"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_its_line_and_column(tmp_path, text, message):
    path = tmp_path / "y.csv"
    path.write_text(text)
    for ids in (None, ["a"]):
        with pytest.raises(WrongContent, match=message):
            read_labels(path, ids)


def test_rows_and_labels_of_one_file_are_found_by_usual_names(tmp_path):
    X, y = np.arange(12.0).reshape(4, 3), np.arange(4)
    scipy.io.savemat(tmp_path / "f.mat", {"fea": X, "gnd": y[:, None], "other": np.ones((2, 2))})
    write_members(tmp_path / "f.npz", {"rows": X, "y": y})
    write_members(tmp_path / "g.npz", {"rows": X, "more": X, "kinds": y})
    for name, options, names in (
        ("f.mat", {}, ("fea", "gnd")),
        ("f.npz", {}, ("rows", "y")),
        ("g.npz", {"member": "more"}, ("more", None)),
        ("g.npz", {"member": "more", "label_member": "kinds"}, ("more", "kinds")),
    ):
        found = read_labelled(tmp_path / name, **options)
        assert (found.name, found.label_name) == names
        np.testing.assert_array_equal(found.array, X)
        assert (found.labels is None) == (names[1] is None)
    with pytest.raises(WrongContent, match="found 3 arrays: kinds, more, rows"):
        read_labelled(tmp_path / "g.npz")
    with pytest.raises(WrongContent, match="none"):
        read_labelled(tmp_path / "f.mat", member="none")
    (tmp_path / "cut.mat").write_bytes((tmp_path / "f.mat").read_bytes()[:200])
    with pytest.raises(CorruptFile):
        read_labelled(tmp_path / "cut.mat")
