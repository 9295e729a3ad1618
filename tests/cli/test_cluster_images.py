import io
import json

import numpy as np
import pytest
import scipy.io

from polyspan.cli.cluster_images import images
from polyspan.cli.points import COMPARED, pixels_in_rows
from polyspan.cluster import (
    ElasticNetSubspaceClustering,
    ManifoldLinearizingClustering,
    clustering_report,
    memberships,
)
from polyspan.data import digits
from polyspan.errors import CorruptFile, WrongContent
from polyspan.io import load_fitted, read_array, write_array
from polyspan.linalg import clustering_accuracy

QUICK = {"n_clusters": 3, "tcr_epochs": 2, "epochs": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def pixels():
    X, y = digits()
    return X[y < 3][:120].reshape(-1, 8, 8)


def test_an_array_of_images_is_clustered_reported_drawn_and_kept(pixels, tmp_path, capsys):
    source, out = tmp_path / "x.npy", tmp_path / "labels.csv"
    write_array(source, pixels)
    plot, save = tmp_path / "fit.svg", tmp_path / "fit.safetensors"
    images(source, **QUICK, out=out, plot=plot, save=save, json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["n"] == sum(c["size"] for c in told["clusters"]) == 120
    assert told["class_rate"] < told["rate"]
    labels = [int(line.split(",")[1]) for line in out.read_text().splitlines()[1:]]
    read = ManifoldLinearizingClustering.load(save)
    np.testing.assert_array_equal(read.labels_, labels)
    first = plot.read_bytes()
    images(source, **QUICK, plot=plot)
    assert plot.read_bytes() == first
    assert "cluster 2\t" in capsys.readouterr().out


@pytest.mark.parametrize("colour", [False, True])
def test_a_folder_of_pictures_is_read_in_the_order_of_its_names(pixels, tmp_path, capsys, colour):
    Image = pytest.importorskip("PIL.Image")
    for number, picture in enumerate(pixels[:40]):
        Image.fromarray((picture * 255).astype(np.uint8)).save(tmp_path / f"p{number:02}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    out = tmp_path / "labels.npy"
    images(tmp_path, **QUICK, side=8, colour=colour, out=out)
    assert "40 of 3 by 8 by 8" in capsys.readouterr().out if colour else "40 of 8 by 8"
    whole = pixels[:40] if not colour else np.repeat(pixels[:40, None], 3, axis=1)
    source = tmp_path / "same.npy"
    write_array(source, (np.floor(whole * 255) / 255).astype(np.float32))
    other = tmp_path / "other.npy"
    images(source, **QUICK, out=other)
    np.testing.assert_array_equal(np.load(out), np.load(other))


@pytest.mark.parametrize("method", ["lhdsc", "ensc"])
def test_other_methods_see_the_pixels_and_are_scored(pixels, tmp_path, capsys, method):
    source, classes, plot = tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "fit.svg"
    write_array(source, pixels)
    y = digits()[1]
    write_array(classes, y[y < 3][:120])
    images(source, method=method, labels=classes, dim=6, report=tmp_path / "told.json", plot=plot)
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["scores"]["accuracy"] > 0.8
    assert told["n"] == 120
    assert told["params"]["subspace_dim"] == 6
    assert plot.stat().st_size > 1000
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"must go without the options of --method mlc, got --eta"):
        images(source, n_clusters=3, method=method, eta=0.3)


def test_memberships_bases_seeds_and_a_comparison_go_with_mlc_too(pixels, tmp_path, capsys):
    write_array(tmp_path / "x.npy", pixels)
    y = digits()[1]
    write_array(tmp_path / "y.npy", y[y < 3][:120])
    images(
        tmp_path / "x.npy", **QUICK, labels=tmp_path / "y.npy", memberships=tmp_path / "u.npy",
        bases=tmp_path / "b.safetensors", save=tmp_path / "fit.safetensors", compare=True, seeds=2, json=True,
    )  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    made = ManifoldLinearizingClustering.load(tmp_path / "fit.safetensors")
    expected = memberships(made.transform(pixels), made.subspaces_)
    np.testing.assert_allclose(read_array(tmp_path / "u.npy"), expected, atol=1e-9)
    kept = load_fitted(tmp_path / "b.safetensors", "FoundSubspaces")
    for c, basis in enumerate(made.subspaces_):
        np.testing.assert_array_equal(kept.arrays[f"basis_{c}"], basis)
    assert told["stability"]["seeds"] == 2
    assert told["stability"]["min_ari"] <= told["stability"]["mean_ari"] < 1
    rows = {row["method"]: row for row in told["compared"]}
    assert set(rows) == {"mlc", *COMPARED}
    assert rows["mlc"]["accuracy"] == told["scores"]["accuracy"]
    judged = clustering_report(pixels_in_rows(pixels, unit=True), made.labels_)
    assert rows["mlc"]["silhouette"] == pytest.approx(judged["silhouette"])
    assert rows["mlc"]["residual_share"] == pytest.approx(judged["residual_share"])
    unit = pixels.reshape(120, -1) / np.linalg.norm(pixels.reshape(120, -1), axis=1, keepdims=True)
    fitted = ElasticNetSubspaceClustering(3, random_state=0).fit(unit)
    assert rows["ensc"]["accuracy"] == clustering_accuracy(y[y < 3][:120], fitted.labels_)
    images(
        tmp_path / "x.npy",
        n_clusters=3,
        method="ensc",
        memberships=tmp_path / "v.npy",
        bases=tmp_path / "c.safetensors",
    )
    np.testing.assert_allclose(read_array(tmp_path / "v.npy").sum(axis=1), 1)
    assert load_fitted(tmp_path / "c.safetensors").arrays["basis_0"].shape[0] == 64


def test_the_checkpoint_is_a_place_of_its_own_that_is_looked_at_first(pixels, tmp_path, monkeypatch):
    write_array(tmp_path / "x.npy", pixels)
    monkeypatch.setattr(ManifoldLinearizingClustering, "fit", None)
    kept = tmp_path / "fit.safetensors"
    for place, message in (
        (kept, "--checkpoint must be another file than that of --save"),
        (tmp_path / "none" / "c.safetensors", "--checkpoint must be a file in a folder that is there"),
        (tmp_path / "c.bin", r"--checkpoint must end in one of \.safetensors, got 'c.bin'"),
    ):
        with pytest.raises(ValueError, match=message):
            images(tmp_path / "x.npy", **QUICK, save=kept, checkpoint=place)


def test_options_of_other_methods_are_refused_with_mlc(pixels, tmp_path):
    write_array(tmp_path / "x.npy", pixels)
    with pytest.raises(ValueError, match=r"options of the other methods, got --dim, --jobs"):
        images(tmp_path / "x.npy", **QUICK, dim=3, jobs=2)
    with pytest.raises(ValueError, match="--method must be one of"):
        images(tmp_path / "x.npy", **QUICK, method="dbscan")


def test_bad_sources_and_names_are_named(pixels, tmp_path):
    pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match="must hold pictures"):
        images(tmp_path, **QUICK)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    with pytest.raises(CorruptFile, match=r"broken\.png"):
        images(tmp_path, **QUICK)
    flat = tmp_path / "flat.npy"
    write_array(flat, pixels.reshape(-1))
    with pytest.raises(ValueError, match=r"images must be \(n, h, w\)"):
        images(flat, **QUICK)
    with pytest.raises(ValueError, match="--out must end in one of"):
        images(flat, **QUICK, out=tmp_path / "labels.txt")
    buffer = io.BytesIO()
    np.save(buffer, np.full((9, 4, 4), np.nan))
    (tmp_path / "nan.npy").write_bytes(buffer.getvalue())
    with pytest.raises(WrongContent):
        images(tmp_path / "nan.npy", **QUICK)


@pytest.mark.parametrize("turned", [False, True])
def test_faces_of_matlab_need_no_option_and_the_report_says_what_was_guessed(pixels, tmp_path, capsys, turned):
    y = digits()[1]
    y = y[y < 3][:120]
    rows = np.stack([image.ravel(order="F") for image in pixels])
    members = {"features": rows.T, "Label": y[None]} if turned else {"fea": rows, "gnd": y[:, None]}
    scipy.io.savemat(tmp_path / "faces.mat", members)
    write_array(tmp_path / "same.npy", pixels)
    write_array(tmp_path / "y.npy", y[:, None])
    images(tmp_path / "faces.mat", method="lsr", n_clusters=3, out=tmp_path / "a.npy", json=True)
    told = json.loads(capsys.readouterr().out)
    images(tmp_path / "same.npy", method="lsr", labels=tmp_path / "y.npy", out=tmp_path / "b.npy", json=True)
    assert json.loads(capsys.readouterr().out)["scores"] == told["scores"]
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    assert told["reading"][-1].endswith("images of 8 by 8, a square by guess, flattened column by column")
    assert ("images are counted along the last axis: 120 of them" in told["reading"]) == turned
    name, classes = members
    options = {"member": name, "label_member": classes, "shape": "8x8", "pixel_order": "column"}
    images(tmp_path / "faces.mat", method="lsr", out=tmp_path / "a.npy", **options)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    assert "reading\trows of 64 pixels are images of 8 by 8, flattened column by column" in capsys.readouterr().out


def test_channels_that_come_last_are_moved_and_said_or_refused_where_nobody_knows(pixels, tmp_path, capsys):
    tinted = pixels[:, None] * np.array([1.0, 0.8, 0.5])[:, None, None]
    write_array(tmp_path / "first.npy", tinted)
    write_array(tmp_path / "last.npy", np.ascontiguousarray(tinted.transpose(0, 2, 3, 1)))
    for name in ("first", "last"):
        images(tmp_path / f"{name}.npy", **QUICK, out=tmp_path / f"{name}-labels.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "first-labels.npy"), np.load(tmp_path / "last-labels.npy"))
    assert "reading\tchannels come last, 3 of them: they were moved to the front" in capsys.readouterr().out
    write_array(tmp_path / "both.npy", tinted[..., :4])
    with pytest.raises(ValueError, match=r"both\.npy: channels must be said to come first or last"):
        images(tmp_path / "both.npy", **QUICK)
    images(tmp_path / "both.npy", method="kmeans", n_clusters=3, channels="first")


def test_options_of_another_kind_of_source_are_refused(pixels, tmp_path):
    write_array(tmp_path / "x.npy", pixels)
    for source, options, name in (
        ("x.npy", {"member": "fea"}, "--member"), ("x.npy", {"colour": True}, "--side and --colour"),
        (".", {"shape": "8x8"}, "--shape"), (".", {"side": 0}, "--side"), ("x.npy", {"shape": "8by8"}, "--shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            images(tmp_path / source, n_clusters=3, method="kmeans", **options)


def test_pictures_of_mixed_sizes_are_said(pixels, tmp_path, capsys):
    Image = pytest.importorskip("PIL.Image")
    for i, picture in enumerate(pixels[:9]):
        Image.fromarray((picture * 255).astype(np.uint8)).resize((8 + i % 2, 8)).save(tmp_path / f"p{i}.png")
    images(tmp_path, n_clusters=2, method="kmeans", side=8)
    assert "reading\tpictures of 2 sizes (8 by 8, 9 by 8) were brought to 8 by 8" in capsys.readouterr().out


def test_equal_images_and_axes_that_look_turned_are_said(pixels, tmp_path, capsys):
    write_array(tmp_path / "two.npy", np.repeat(pixels[[0, 50]], 20, axis=0))
    images(tmp_path / "two.npy", **QUICK)
    assert "warning: only 2 of the 40 rows differ: 3 groups cannot be told apart" in capsys.readouterr().err
    write_array(tmp_path / "turned.npy", np.moveaxis(pixels, 0, -1))
    images(tmp_path / "turned.npy", **QUICK)
    assert "reading\t8 images of 8 by 120; are images counted along the last axis?" in capsys.readouterr().out
