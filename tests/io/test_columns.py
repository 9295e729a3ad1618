import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from polyspan.io import read_csv, write_columns

IDS, LABELS = np.array(["a", "b,c", 'd "e"']), np.array([2, 0, 1])


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_a_table_holds_the_columns_that_were_given(tmp_path, suffix):
    path = write_columns(tmp_path / f"x{suffix}", {"id": IDS, "label": LABELS})
    found = pq.read_table(path) if suffix == ".parquet" else feather.read_table(path)
    assert found.to_pydict() == {"id": IDS.tolist(), "label": LABELS.tolist()}


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_text_comes_back_whatever_it_holds(tmp_path, suffix):
    path = write_columns(tmp_path / f"x{suffix}", {"id": IDS, "label": LABELS})
    assert read_csv(path) == {"id": IDS.tolist(), "label": ["2", "0", "1"]}


def test_columns_that_do_not_fit_and_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one length"):
        write_columns(tmp_path / "x.csv", {"id": IDS, "label": LABELS[:2]})
    with pytest.raises(ValueError, match="must end in"):
        write_columns(tmp_path / "x.npy", {"id": IDS})
    with pytest.raises(ValueError, match="one length"):
        write_columns(tmp_path / "x.csv", {})
    assert not list(tmp_path.iterdir())
