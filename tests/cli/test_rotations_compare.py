import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from polyspan.cli.rotations_compare import compare
from polyspan.io import write_array
from polyspan.nn import compare_representations

QUICK = {"seeds": 2, "hidden": [32], "passes": 5, "learning_rate": 3e-3}


@pytest.fixture
def files(tmp_path):
    rotations = Rotation.random(200, random_state=0)
    write_array(tmp_path / "x.npy", rotations.as_matrix().reshape(-1, 9))
    write_array(tmp_path / "q.npy", rotations.as_quat())
    return tmp_path


def test_the_table_is_that_of_the_function_and_is_drawn(files, capsys):
    given = {"from_": "quaternion", "order": "xyzw", "representation": ["6d", "quaternion"], **QUICK}
    compare(files / "x.npy", targets=files / "q.npy", plot=files / "p.svg", json=True, **given)
    told = json.loads(capsys.readouterr().out)
    R = Rotation.random(200, random_state=0).as_matrix()
    rows = compare_representations(
        R.reshape(-1, 9), R, ("6d", "quaternion"), seeds=2, hidden=(32,), max_iter=5, learning_rate=3e-3
    )
    assert [row["representation"] for row in told["representations"]] == [row.representation for row in rows]
    # Targets pass through quaternions, which rounds them.
    for said, row in zip(told["representations"], rows, strict=True):
        assert said["mean"] == pytest.approx(row.mean, rel=1e-3)
        assert said["share_above_90"] == pytest.approx(np.mean([t.share_above_90 for t in row.trials]), abs=0.02)
    assert "<!-- Errors on rows held out -->" in (files / "p.svg").read_text()
    compare(files / "x.npy", targets=files / "q.npy", **given)
    assert "6d\t" in capsys.readouterr().out


def test_wrong_use_is_said_before_anything_is_trained(files):
    x, q = files / "x.npy", files / "q.npy"
    with pytest.raises(ValueError, match="--order must be given for quaternion"):
        compare(x, targets=q, from_="quaternion")
    with pytest.raises(ValueError, match=r"--representation must be among 6d, .*, got '7d'"):
        compare(x, targets=q, from_="quaternion", order="xyzw", representation=["7d"])
    with pytest.raises(ValueError, match="--plot must be another file than"):
        compare(files / "p.svg", targets=q, from_="quaternion", order="xyzw", plot=files / "p.svg")
    write_array(files / "few.npy", np.eye(4)[:3])
    with pytest.raises(ValueError, match=r"--targets must hold one rotation a row of x.npy, 200, got 3"):
        compare(x, targets=files / "few.npy", from_="quaternion", order="xyzw")
