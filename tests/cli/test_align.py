import json
from typing import get_args

import numpy as np
import pytest

from polyspan.align import ForwardCompatibleMap, alignment_report, load_aligner
from polyspan.cli import run
from polyspan.cli.align import Method, _families, fit, score
from polyspan.io import read_array, write_array


@pytest.fixture(params=[(12, 12), (12, 17), (17, 12)])
def files(request, tmp_path):
    """Rows of one latent space in two embedding spaces, of one width or of two."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(300, 8))
    for name, width in zip("xy", request.param, strict=True):
        turn = np.linalg.qr(rng.normal(size=(width, 8)))[0].T
        rows = latent @ turn + 0.01 * rng.normal(size=(300, width))
        write_array(tmp_path / f"{name}.npy", rows.astype(np.float32))
    return tmp_path, request.param[0] == request.param[1]


@pytest.mark.parametrize("method", ["orthogonal", "ridge", "auto"])
def test_spaces_of_one_width_or_two_are_aligned_reported_and_scored(files, method, capsys):
    folder, alike = files
    x, y, out = folder / "x.npy", folder / "y.npy", folder / "map.safetensors"
    fit(x, y, out=out, method=method, json=True)
    told = json.loads(capsys.readouterr().out)["held_out"]
    assert (told["cosine"]["before"] is not None) == alike
    assert told["recall"]["twin@1"] > 0.9
    X, Y = np.load(x), np.load(y)
    assert load_aligner(out)[0].score(X, Y) > 0.9
    fit(x, y, out=folder / "again.safetensors", method=method)
    shown = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert shown["cosine"].endswith(" after")
    assert shown["cosine"].startswith("- before, ") != alike
    score(out, x, y)
    shown = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert shown["cosine"].startswith("- before, ") != alike
    assert "nan" not in shown["cosine"]


@pytest.fixture
def pair(tmp_path):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(120, 6)).astype(np.float32)
    write_array(tmp_path / "x.npy", rows)
    write_array(tmp_path / "x.safetensors", rows)
    write_array(tmp_path / "y.npy", rows @ np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32))
    return tmp_path


def test_no_result_takes_the_place_of_what_it_is_made_of(pair, capsys):
    x, y, out = pair / "x.safetensors", pair / "y.npy", pair / "map.safetensors"
    before = x.read_bytes()
    (pair / "link.safetensors").symlink_to("x.safetensors")
    for place in (x, pair / "link.safetensors"):
        assert run(["align", "fit", str(x), str(y), "--out", str(place)]) == 2
        assert "must be another file than the vectors" in capsys.readouterr().err
    assert x.read_bytes() == before
    fit(x, y, out=out)
    kept = out.read_bytes()
    assert run(["align", "apply", str(out), str(x), "--out", str(out)]) == 2
    assert "must be another file than the map" in capsys.readouterr().err
    assert out.read_bytes() == kept


def test_a_picture_of_no_kind_is_refused_before_a_map_is_written(pair, capsys):
    assert run(["align", "fit", *map(str, (pair / "x.npy", pair / "y.npy")), "-o", str(pair / "m.safetensors"),
                "--plot", str(pair / "m.doc")]) == 2  # fmt: skip
    assert "--plot must end in .svg" in capsys.readouterr().err
    assert not (pair / "m.safetensors").exists()


def test_an_all_zero_row_is_named_by_its_row_in_the_file_that_is_carried(pair, capsys):
    fit(pair / "x.npy", pair / "y.npy", out=pair / "m.safetensors")
    rows = np.load(pair / "x.npy")
    rows[77] = 0
    write_array(pair / "zero.npy", rows)
    command = ["align", "apply", str(pair / "m.safetensors"), str(pair / "zero.npy"), "--out", str(pair / "c.npy")]
    assert run([*command, "--batch-rows", "50"]) == 2
    assert "zero.npy must have no all-zero row for this map, got one at row 77" in capsys.readouterr().err
    assert not (pair / "c.npy").exists()


def test_anchors_that_are_equal_or_repeated_are_said(pair, capsys):
    fit(pair / "x.npy", pair / "x.npy", out=pair / "m.safetensors")
    assert "warning: source and target hold the same vectors" in capsys.readouterr().err
    for name in ("x", "y"):
        write_array(pair / f"{name}{name}.npy", np.tile(np.load(pair / f"{name}.npy"), (2, 1)))
    fit(pair / "xx.npy", pair / "yy.npy", out=pair / "m.safetensors", json=True)
    caught = capsys.readouterr()
    assert "warning: 120 of 240 anchors repeat others" in caught.err
    assert json.loads(caught.out)["warnings"] == [line.removeprefix("warning: ") for line in caught.err.splitlines()]
    fit(pair / "x.npy", pair / "y.npy", out=pair / "m.safetensors")
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("option", ["-k", "--k"])
def test_k_is_asked_for_with_one_dash_or_two(pair, capsys, option):
    fit(pair / "x.npy", pair / "y.npy", out=pair / "m.safetensors")
    capsys.readouterr()
    assert run(["align", "score", *(str(pair / n) for n in ("m.safetensors", "x.npy", "y.npy")), option, "3"]) == 0
    assert "twin@3" in capsys.readouterr().out


def test_anchors_too_few_for_a_rotation_are_said_once_and_raise_nothing(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_array(tmp_path / f"{name}.npy", rng.normal(size=(8, 12)).astype(np.float32))
    fit(tmp_path / "a.npy", tmp_path / "b.npy", out=tmp_path / "map.safetensors", method="orthogonal")
    assert capsys.readouterr().err.count("anchors leave part of 12 dimensions open") == 1


def test_srip_is_fitted_saved_and_read(files):
    folder, _ = files
    fit(folder / "x.npy", folder / "y.npy", out=folder / "map.safetensors", method="srip")
    aligner, about = load_aligner(folder / "map.safetensors")
    assert about["method"] == "srip"
    carried, wanted = aligner.transform(read_array(folder / "x.npy")), read_array(folder / "y.npy")
    assert np.sum((carried - wanted) ** 2) < np.sum((wanted - wanted.mean(axis=0)) ** 2)


def test_the_method_of_each_name_is_of_its_own_kind():
    made = _families(shift=True, rank=None, normalize=False, seed=3)
    assert isinstance(made["forward-compatible"], ForwardCompatibleMap)
    assert (made["srip"].mode, made["relaxed-orthogonal"].mode) == ("srip", "relaxed")
    assert made["forward-compatible"].random_state == made["srip"].random_state == 3
    assert set(made) | {"auto"} == set(get_args(Method))


def test_fit_and_score_judge_recall_by_the_metric_asked_for(tmp_path, capsys):
    rng = np.random.default_rng(4)
    X = rng.normal(size=(90, 3)) * 2.0 ** rng.integers(-2, 3, size=(90, 1))
    Y = X @ rng.normal(size=(3, 3)) + 0.4 * rng.normal(size=(90, 3)) + 0.5
    x, y = write_array(tmp_path / "x.npy", X), write_array(tmp_path / "y.npy", Y)
    told, scored = {}, {}
    for metric in ("cosine", "dot", "euclidean"):
        out = tmp_path / f"{metric}.safetensors"
        fit(x, y, out=out, method="auto", metric=metric, json=True)
        told[metric] = json.loads(capsys.readouterr().out)
        score(out, x, y, k=3, json=True)
        of_the_map = json.loads(capsys.readouterr().out)
        score(tmp_path / "cosine.safetensors", x, y, k=3, metric=metric, json=True)
        scored[metric] = json.loads(capsys.readouterr().out)
        assert of_the_map["metric"] == scored[metric]["metric"] == told[metric]["held_out"]["metric"] == metric
        aligner = load_aligner(tmp_path / "cosine.safetensors")[0]
        assert scored[metric]["recall"] == alignment_report(aligner, X, Y, k=3, metric=metric)["recall"]
    assert len({tuple(report["recall"].values()) for report in scored.values()}) == 3
    assert len({tuple(report["held_out"]["recall"].values()) for report in told.values()}) == 3
    assert len({tuple(row["score"] for row in report["table"]) for report in told.values()}) == 3
