import json

import numpy as np
import pytest

from polyspan.claims.franca import mosaics
from polyspan.cli.position import apply, fit, score
from polyspan.cluster import PositionalDisentangler


@pytest.fixture
def features(tmp_path):
    np.save(tmp_path / "f.npy", mosaics(0, n=16).items)
    return tmp_path / "f.npy"


@pytest.mark.parametrize("method", ["leace", "rasa", "position_mean"])
def test_what_is_fitted_applies_and_scores(features, tmp_path, capsys, method):
    fitted, out = tmp_path / "map.safetensors", tmp_path / "clean.npy"
    fit(features, out=fitted, method=method, json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == 16
    assert told["r2_curve"][0] > 0.5
    apply(features, fitted, out=out)
    expected = PositionalDisentangler.load(fitted).transform(np.load(features))
    np.testing.assert_array_equal(np.load(out), expected)
    capsys.readouterr()
    score(features, cleaned=out, json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["r2_cleaned"] < told["r2"]


def test_rows_are_streamed_and_keep_their_number(features, tmp_path, capsys):
    rows = np.load(features).reshape(-1, 96)
    np.save(tmp_path / "rows.npy", rows)
    fit(features, out=tmp_path / "map.safetensors")
    apply(tmp_path / "rows.npy", tmp_path / "map.safetensors", out=tmp_path / "clean.npy")
    made = PositionalDisentangler.load(tmp_path / "map.safetensors")
    np.testing.assert_allclose(np.load(tmp_path / "clean.npy"), made.transform(rows), atol=1e-5)
    assert "4096, 96" in capsys.readouterr().out


def test_the_source_is_never_overwritten(features, tmp_path):
    fit(features, out=tmp_path / "map.safetensors")
    with pytest.raises(ValueError, match="--out must be another file than the features"):
        apply(features, tmp_path / "map.safetensors", out=features)
