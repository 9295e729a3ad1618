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
    with pytest.raises(ValueError, match=r"--plot must end in .svg, .png or .pdf, got .c.gif"):
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
    for read in (features, tmp_path / "map.safetensors"):
        before = read.read_bytes()
        with pytest.raises(ValueError, match="--out must be another file than a file that is read"):
            apply(features, tmp_path / "map.safetensors", out=read)
        assert read.read_bytes() == before


def test_a_cleaned_file_of_another_shape_is_refused_with_both(features, tmp_path):
    X = np.load(features)
    for name, other, shape in (
        ("flat", X.reshape(16, 256, 96), r"\(16, 256, 96\) in flat.npy"),
        ("fewer", X[:12], r"\(12, 16, 16, 96\) in fewer.npy"),
        ("narrow", X[..., :5], r"\(16, 16, 16, 5\) in narrow.npy"),
    ):
        np.save(tmp_path / f"{name}.npy", other)
        with pytest.raises(ValueError, match=rf"--cleaned must have .* \(16, 16, 16, 96\) in f.npy, got {shape}"):
            score(features, cleaned=tmp_path / f"{name}.npy")


@pytest.mark.parametrize("n", [2, 7, 8])
def test_few_images_are_measured_and_it_is_said(tmp_path, capsys, n):
    np.save(tmp_path / "few.npy", mosaics(0, n=n).items)
    score(tmp_path / "few.npy", json=True)
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told["images"] == n
    assert told["r2"] > 0.5
    assert told["warnings"] == ([] if n == 8 else [f"R² of {n} images hangs on chance: give at least 8"])
    assert ("hangs on chance" in shown.err) == (n < 8)


def test_what_is_wrong_is_told_before_anything_is_written(features, tmp_path):
    np.save(tmp_path / "one.npy", np.load(features)[:1])
    np.save(tmp_path / "rows.npy", np.load(features).reshape(-1, 96))
    with pytest.raises(ValueError, match="at least 2 images"):
        score(tmp_path / "one.npy")
    with pytest.raises(ValueError, match=r"features must be \(images, h, w, d\) .* got shape \(4096, 96\)"):
        score(tmp_path / "rows.npy")
    with pytest.raises(ValueError, match=r"--grid must be that of the features, \(16, 16\), .* got \(8, 32\)"):
        fit(features, out=tmp_path / "map.safetensors", grid=(8, 32))
    with pytest.raises(ValueError, match="--plot must be a file in a folder that is there"):
        fit(features, out=tmp_path / "map.safetensors", plot=tmp_path / "none" / "p.svg")
    assert not (tmp_path / "map.safetensors").exists()


def test_places_of_another_kind_are_refused_by_the_option_before_any_work(features, tmp_path, monkeypatch):
    fit(features, out=tmp_path / "map.safetensors")
    monkeypatch.setattr("polyspan.cluster.PositionalDisentangler.fit", None)
    monkeypatch.setattr("polyspan.cluster.PositionalDisentangler.transform", None)
    with pytest.raises(ValueError, match=r"--out must end in \.safetensors, got 'map.npy'"):
        fit(features, out=tmp_path / "map.npy")
    for name in ("clean.txt", "clean.parquet"):
        with pytest.raises(ValueError, match=rf"--out must end in one of \.npy, .* images, got '{name}'"):
            apply(features, tmp_path / "map.safetensors", out=tmp_path / name)


def test_the_report_and_the_picture_say_what_was_taken_out_and_of_what_the_shares_are(features, tmp_path, capsys):
    out, plot = tmp_path / "map.safetensors", tmp_path / "p.svg"
    fit(features, out=out, plot=plot)
    shown = capsys.readouterr().out
    assert "method\tleace, 15 targets: cosine of order 3" in shown
    assert "R² of the targets, before and after\t0." in shown
    fit(features, out=out, method="rasa", rounds=2, targets="row")
    shown = capsys.readouterr().out
    assert "method\trasa, 1 targets: row" in shown
    assert "R² of the targets, before and after each round\t0." in shown


def test_more_targets_than_features_are_refused_by_what_can_be_changed(tmp_path):
    np.save(tmp_path / "narrow.npy", mosaics(0, n=16).items[..., :4])
    with pytest.raises(ValueError, match="15 targets of order=3 need at least as many features, got n_features=4"):
        fit(tmp_path / "narrow.npy", out=tmp_path / "map.safetensors")
    with pytest.raises(ValueError, match="n_rounds=9 times 2 targets need at least as many features, got n_features=4"):
        fit(tmp_path / "narrow.npy", out=tmp_path / "map.safetensors", method="rasa")


def test_features_with_channels_first_and_rows_without_places_are_refused_in_words(tmp_path):
    X = mosaics(0, n=16).items.reshape(16, 16, 16, 96)
    np.save(tmp_path / "first.npy", np.moveaxis(X, -1, 1))
    with pytest.raises(ValueError, match=r"look like \(images, d, h, w\), got shape \(16, 96, 16, 16\)"):
        fit(tmp_path / "first.npy", out=tmp_path / "map.safetensors")
    fit(tmp_path / "first.npy", out=tmp_path / "map.safetensors", grid=(96, 16))
    np.save(tmp_path / "f.npy", X)
    fit(tmp_path / "f.npy", out=tmp_path / "means.safetensors", method="position_mean")
    np.save(tmp_path / "rows.npy", X.reshape(-1, 96))
    with pytest.raises(ValueError, match=r"features must be \(images, h, w, d\) .* for position_mean, got rows"):
        apply(tmp_path / "rows.npy", tmp_path / "means.safetensors", out=tmp_path / "clean.npy")
