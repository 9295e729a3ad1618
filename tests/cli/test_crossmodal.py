import json

import numpy as np
import pytest
from cyclopts import App

from polyspan.align import SubspaceAligner
from polyspan.claims.plato_3d import planted
from polyspan.cli.crossmodal import fit, match, retrieve
from polyspan.errors import WrongContent
from polyspan.io import read_csv, write_array, write_members


@pytest.fixture(scope="module")
def world():
    return planted(0)


@pytest.fixture
def files(world, tmp_path):
    for name, rows in world._asdict().items():
        write_array(tmp_path / f"{name}.npy", rows)
    return tmp_path


@pytest.fixture
def fitted(files):
    anchors = files / "anchors_x.npy", files / "anchors_y.npy"
    fit(*anchors, out=files / "map.safetensors", components="6", held_out=0.0)
    return files / "map.safetensors"


def queries(files):
    return files / "queries_x.npy", files / "queries_y.npy"


def test_the_commands_are_parsed_and_run(files, capsys):
    app = App(name="crossmodal")
    for name in ("fit", "match", "retrieve"):
        app.command(f"polyspan.cli.crossmodal:{name}", name=name)

    def run(*tokens):
        app([str(t) for t in tokens], exit_on_error=False, print_error=False, result_action="return_value")
        return capsys.readouterr()

    shown = run("fit", files / "anchors_x.npy", files / "anchors_y.npy", "-o", files / "map.safetensors").out
    assert "dimension\t5\n" in shown
    assert "directions shared\t5\n" in shown
    shown = run("match", files / "map.safetensors", *queries(files), "--paired", "-o", files / "pairs.csv").out
    assert float(shown.split("matched\t")[1].split("%")[0]) > 90
    shown = run("retrieve", files / "map.safetensors", *queries(files), "-k", 3, "--paired", "-o", files / "f.csv").out
    assert float(shown.split("found among 3\t")[1].split("%")[0]) > 90


def test_the_report_is_true(files, world, capsys):
    anchors = files / "anchors_x.npy", files / "anchors_y.npy"
    fit(*anchors, out=files / "map.safetensors", components="6", json=True)
    told = json.loads(capsys.readouterr().out)
    again = SubspaceAligner.load(files / "map.safetensors")
    whole = SubspaceAligner(6).fit(*world[:2])
    np.testing.assert_array_equal(again.similarity(*world[2:]), whole.similarity(*world[2:]))
    np.testing.assert_allclose(told["correlations"], whole.correlations_)
    assert told["held_out"]["n"] == 120
    assert told["held_out"]["n_shared"] == 6
    assert told["held_out"]["top_k"] > 0.95
    assert told["held_out"]["cka_shared"] > told["held_out"]["cka_raw"] + 0.5
    assert told["warnings"] == []


def test_streamed_files_give_what_files_in_memory_give(files, world, fitted):
    whole = SubspaceAligner(6).fit(*world[:2])
    anchors = files / "anchors_x.npy", files / "anchors_y.npy"
    fit(*anchors, out=files / "streamed.safetensors", components="6", held_out=0.0, batch_rows=77)
    for name in ("map", "streamed"):
        found = SubspaceAligner.load(files / f"{name}.safetensors")
        np.testing.assert_allclose(found.similarity(*world[2:]), whole.similarity(*world[2:]), atol=1e-8)
        assert found.n_anchors_ == 600


def test_tables_hold_what_the_aligner_finds_and_another_route_can_be_taken(files, world, fitted, capsys):
    whole = SubspaceAligner.load(fitted).set_params(method="local_cka")
    match(fitted, *queries(files), out=files / "pairs.csv", method="local_cka", json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == "local_cka"
    pairs = whole.match(*world[2:])
    table = read_csv(files / "pairs.csv")
    np.testing.assert_array_equal([int(cell) for cell in table["column"]], pairs.columns)
    np.testing.assert_allclose([float(cell) for cell in table["confidence"]], pairs.confidence)
    assert told["doubtful"] == int(np.sum(pairs.confidence < 0))
    retrieve(fitted, *queries(files), k=4, out=files / "found.csv")
    table = read_csv(files / "found.csv")
    near = SubspaceAligner.load(fitted).retrieve(*world[2:], 4)
    np.testing.assert_array_equal([int(cell) for cell in table["item"]], near.indices.ravel())
    assert table["rank"][:5] == list("12341")


def test_without_a_file_the_pairs_are_printed(files, fitted, capsys):
    match(fitted, *queries(files), candidates=20, paired=True, json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["matching"] > 0.9
    assert np.mean(np.equal(*told["found"])) == pytest.approx(told["matching"] * 200 / len(told["found"][0]))
    retrieve(fitted, *queries(files), k=2, json=True)
    assert np.shape(json.loads(capsys.readouterr().out)["items"]) == (200, 2)
    match(fitted, *queries(files))
    assert len(capsys.readouterr().out.splitlines()) == 202


def test_shuffled_anchors_and_anchors_among_queries_are_warned_about(files, world, capsys):
    write_array(files / "shuffled.npy", np.random.default_rng(0).permutation(world.anchors_y))
    fit(files / "anchors_x.npy", files / "shuffled.npy", out=files / "map.safetensors", components="6", json=True)
    shown = capsys.readouterr()
    assert any("do not seem to belong together" in text for text in json.loads(shown.out)["warnings"])
    assert "warning: rows of the two views do not seem to belong together" in shown.err
    for command in (match, retrieve):
        command(files / "map.safetensors", files / "anchors_x.npy", files / "anchors_y.npy", paired=True)
        assert "600 of 600" in capsys.readouterr().err


def test_members_are_named_and_pictures_have_equal_bytes(files, world):
    write_members(files / "all.npz", world._asdict())
    for name in ("one.svg", "two.svg", "three.png"):
        fit(
            files / "all.npz",
            files / "all.npz",
            out=files / "map.safetensors",
            source_member="anchors_x",
            target_member="anchors_y",
            plot=files / name,
        )
    assert (files / "one.svg").read_bytes() == (files / "two.svg").read_bytes()
    assert b"<svg" in (files / "one.svg").read_bytes()
    assert (files / "three.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": "many"}, "--components must be a number from 1 up, auto or all, got 'many'"),
        ({"components": "0"}, "--components must be a number from 1 up"),
        ({"components": "41"}, "n_components must be between 1 and 40"),
        ({"held_out": 1.0}, "--held-out must be at least 0 and below 1, got 1.0"),
        ({"held_out": 0.001}, "--held-out must hold back at least 2 of 600 anchors, got 0.001"),
        ({"plot": "x.txt"}, "--plot must end in .svg, .png or .pdf, got 'x.txt'"),
        ({"plot": "x.svg", "held_out": 0.0}, "--plot must go with --held-out above 0"),
        ({"reg": -1.0}, "reg must be finite and at least 0, got -1.0"),
    ],
)
def test_wrong_use_is_said_and_nothing_is_written(files, options, message):
    from pathlib import Path

    before = {path.name for path in files.iterdir()}
    given = {key: Path(value) if key == "plot" else value for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        fit(files / "anchors_x.npy", files / "anchors_y.npy", out=files / "map.safetensors", **given)
    assert {path.name for path in files.iterdir()} == before


def test_files_that_do_not_fit_are_refused(files, world, fitted):
    with pytest.raises(ValueError, match=r"got 600 rows in .* and 200 in"):
        fit(files / "anchors_x.npy", files / "queries_y.npy", out=files / "map.safetensors")
    with pytest.raises(WrongContent, match="40 components; expected 60, as fitted"):
        match(fitted, files / "queries_y.npy", files / "queries_y.npy")
    for command in (match, retrieve):
        with pytest.raises(ValueError, match="--paired must have one row an item in both files, got 200 and 600"):
            command(fitted, files / "queries_x.npy", files / "anchors_y.npy", paired=True)
    with pytest.raises(ValueError, match="k must be between 1 and the 200 rows of the gallery, got 0"):
        retrieve(fitted, *queries(files), k=0)
