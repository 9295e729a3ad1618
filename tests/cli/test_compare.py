import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from polyspan.align import compare_networks
from polyspan.align.unit_plots import matched_order, plot_comparison
from polyspan.cli.compare import compare
from polyspan.errors import WrongContent
from polyspan.io import write_array, write_members

ORDER = [4, 0, 3, 1, 5, 2]


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    X = np.maximum(rng.normal(size=(500, 6)), 0).astype(np.float32)
    Y = X[:, ORDER] + 0.3 * rng.normal(size=(500, 6)).astype(np.float32)
    X[:, 2] = 0.5
    write_array(tmp_path / "a.npy", X)
    write_members(tmp_path / "b.npz", {"fc": Y, "other": Y[:3]})
    return tmp_path


def test_the_report_is_that_of_the_function_and_the_matching_is_written(files, capsys):
    a, b = files / "a.npy", files / "b.npz"
    compare(a, b, member_b="fc", out=files / "m.csv", report=files / "report.json", json=True)
    caught = capsys.readouterr()
    told = json.loads(caught.out)
    assert told == json.loads((files / "report.json").read_text())
    assert "1 units of the first network" in caught.err
    with np.load(b) as members:
        expected = compare_networks(np.load(a), members["fc"], nulls=("shuffle", "rotation"), random_state=0)[0]
    for key in ("mean_bipartite", "cka", "unexplained_all", "p_value", "n_above_null"):
        assert told[key] == pytest.approx(getattr(expected, key))
    assert (told["layer_in"], told["layer_out"], told["out"]) == (str(a), str(b), str(files / "m.csv"))
    rows = list(csv.DictReader((files / "m.csv").read_text().splitlines()))
    partners = [int(row["partner"]) for row in rows]
    assert [ORDER[p] for i, p in enumerate(partners) if i != 2] == [0, 1, 3, 4, 5]
    assert partners[2] == -1
    np.testing.assert_allclose([float(row["correlation"]) for row in rows], expected.bipartite.scores, rtol=1e-6)
    np.testing.assert_allclose([float(row["correlation_error"]) for row in rows], expected.bipartite_errors, rtol=1e-6)
    assert told["errors"] == expected.errors


def test_rows_of_one_input_stay_together(files, capsys):
    a, b = files / "a.npy", files / "b.npz"
    compare(a, b, member_b="fc", rows_per_item=5, json=True)
    told = json.loads(capsys.readouterr().out)
    with np.load(b) as members:
        options = {"nulls": ("shuffle", "rotation"), "rows_per_item": 5, "random_state": 0}
        expected = compare_networks(np.load(a), members["fc"], **options)[0]
    assert told["n_items"] == 100
    assert told["errors"] == expected.errors


def test_the_table_tells_nulls_prices_and_groups(files, capsys):
    write_array(files / "b.npy", np.load(files / "b.npz")["fc"])
    paths = files / "a.npy", files / "b.npy"
    compare(*paths, untrained_a=paths[0], untrained_b=paths[1], clusters=2, out=files / "m.parquet")
    shown = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert shown["dead units"] == "1 and 0"
    assert shown["against shuffles"] == "p = 0.048, 5 of 5 units above all"
    assert shown["one to one"].split()[2].rstrip(",") == shown["one to one, untrained"]
    assert shown["groups (units of a, of b)"].count("(") == 2
    assert float(shown["few to one, penalty 0.01"].split()[3].rstrip(",")) < 0.2
    assert pq.read_table(files / "m.parquet").column("unit").to_pylist() == list(range(6))
    compare(*paths, shuffles=0, bootstraps=0)
    plain = capsys.readouterr().out
    assert "against shuffles" not in plain
    assert "±" not in plain


def test_the_table_tells_errors_stability_and_the_tree_of_groups(files, capsys):
    compare(files / "a.npy", files / "b.npz", member_b="fc", clusters=3, report=files / "report.json")
    shown = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    told = json.loads((files / "report.json").read_text())
    assert shown["one to one"].startswith(
        f"mean correlation {told['mean_bipartite']:.3f} ± {told['errors']['mean_bipartite']:.3f}, "
    )
    stable = told["sparse"][0]["stability"]
    assert shown["few to one, penalty 0.1"].endswith(f", {stable:.2f} of them the same when drawn again")
    first, second = told["hierarchy"]
    leaves = [tuple(second["left"]), tuple(second["right"])]
    other = tuple(first["right"] if second["node"] == 1 else first["left"])
    inner = "[({},{}) ({},{})]".format(*leaves[0], *leaves[1])
    plain = "({},{})".format(*other)
    expected = f"[{inner} {plain}]" if second["node"] == 1 else f"[{plain} {inner}]"
    assert shown["groups as a tree"] == expected
    assert np.sum([*leaves, other], axis=0).tolist() == [5, 6], "every live unit stands in one group"


@pytest.mark.parametrize(("shuffles", "told"), [(5, 1), (19, 0)])
def test_warnings_are_those_of_the_function_and_too_few_shuffles_give_no_alarm(files, capsys, shuffles, told):
    write_array(files / "b.npy", np.load(files / "b.npz")["fc"])
    compare(files / "a.npy", files / "b.npy", shuffles=shuffles, json=True)
    caught = capsys.readouterr()
    expected = compare_networks(
        np.load(files / "a.npy"), np.load(files / "b.npy"), nulls=("shuffle",), n_shuffles=shuffles, random_state=0
    )[0]
    assert json.loads(caught.out)["warnings"] == expected.warnings
    assert caught.err.count("cannot tell whether rows belong together") == told
    assert "no better than shuffled rows" not in caught.err


def test_pictures_show_pairs_on_the_diagonal_and_have_equal_bytes_for_equal_input(files):
    a, b = np.load(files / "a.npy"), np.load(files / "b.npz")["fc"]
    layer = compare_networks(a, np.hstack([b, a[:, :1] + b[:, :1]]), random_state=0)[0]
    rows, columns = matched_order(layer)
    between = layer.correlations.between[np.ix_(rows, columns)]
    assert between.shape == (5, 7)
    np.testing.assert_array_equal(between.argmax(axis=1), np.arange(5))
    assert (np.diff(between.diagonal()) <= 0).all()
    for name in ("one.svg", "two.svg", "three.png"):
        plot_comparison(layer, files / name)
    assert (files / "one.svg").read_bytes() == (files / "two.svg").read_bytes()
    assert b"<svg" in (files / "one.svg").read_bytes()
    assert (files / "three.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="must end in"):
        plot_comparison(layer, files / "one.txt")
    compare(files / "a.npy", files / "b.npz", member_b="fc", plot=files / "four.svg", json=True)
    assert b"matched order" in (files / "four.svg").read_bytes() or (files / "four.svg").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "m.txt"}, "--out must end in"),
        ({"untrained_a": "a.npy"}, "must be given together"),
        ({"shuffles": -1}, "--shuffles must be at least 0"),
        ({"bootstraps": 1}, "--bootstraps must be 0 or at least 2, got 1"),
        ({"rows_per_item": 0}, "--rows-per-item must be at least 1, got 0"),
        ({"rows_per_item": 3}, "rows_per_item must divide the 500 rows"),
        ({"member_b": "other"}, "one row an input, got 500 and 3"),
    ],
)
def test_wrong_use_is_refused_by_name(files, options, message):
    options = {"member_b": "fc"} | {k: files / v if str(v).count(".") else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        compare(files / "a.npy", files / "b.npz", **options)


def test_rows_that_are_not_finite_are_refused_by_their_file(files):
    X = np.load(files / "a.npy")
    X[7, 1] = np.nan
    np.save(files / "bad.npy", X)
    with pytest.raises(WrongContent, match="row 7"):
        compare(files / "bad.npy", files / "b.npz", member_b="fc")
