import json

import numpy as np
import pytest

from polyspan.claims.franca import mosaics
from polyspan.cli.position import apply, fit, score
from polyspan.cluster import PositionalDisentangler
from polyspan.cluster.position_plots import _departures


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


@pytest.mark.parametrize("method", ["leace", "rasa", "position_mean"])
def test_the_picture_is_drawn_twice_alike_and_another_kind_is_told_first(features, tmp_path, method):
    for name in ("a", "b"):
        fit(features, out=tmp_path / f"{name}.safetensors", method=method, plot=tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    with pytest.raises(ValueError, match=r"path must end in .svg, .png or .pdf, got .*c.gif"):
        fit(features, out=tmp_path / "c.safetensors", method=method, plot=tmp_path / "c.gif")
    assert not (tmp_path / "c.safetensors").exists()


def test_means_of_places_that_are_taken_out_tell_nothing_any_more():
    X = mosaics(0, n=64).items
    fitted = {method: PositionalDisentangler(method=method).fit(X) for method in ("leace", "position_mean")}
    left = {method: _departures(made.transform(X)).mean() for method, made in fitted.items()}
    assert left["position_mean"] < 1e-6 < left["leace"] < _departures(X).mean()
    assert _departures(np.ones((3, 4, 2))).tolist() == [0, 0, 0, 0]


def test_the_source_is_never_overwritten(features, tmp_path):
    fit(features, out=tmp_path / "map.safetensors")
    with pytest.raises(ValueError, match="--out must be another file than the features"):
        apply(features, tmp_path / "map.safetensors", out=features)
