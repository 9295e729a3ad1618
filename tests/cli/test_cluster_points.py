import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.io
from sklearn.cluster import KMeans

from polyspan.cli.points import COMPARED, METHODS, _make, points
from polyspan.cluster import (
    ElasticNetSubspaceClustering,
    LeastSquaresSubspaceClustering,
    ManifoldLinearizingClustering,
    clustering_report,
    memberships,
)
from polyspan.data import planted_subspaces
from polyspan.errors import WrongContent
from polyspan.io import load_fitted, read_array, write_array, write_members
from polyspan.linalg import clustering_accuracy, principal_angles

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def world():
    return planted_subspaces(0, n_per=30, d=15, k=3, n_subspaces=3, noise=0.01)


@pytest.fixture
def files(world, tmp_path):
    names = [f"p{i:03d}" for i in range(90)]
    write_array(tmp_path / "x.npy", world.points)
    write_array(tmp_path / "y.npy", world.labels)
    write_array(tmp_path / "x.parquet", world.points, ids=names, column="vector")
    backwards = [f"{name},{label}" for name, label in zip(names, world.labels, strict=True)][::-1]
    (tmp_path / "y.csv").write_text("\n".join(["id,label", *backwards]) + "\n")
    write_members(tmp_path / "both.npz", {"rows": world.points, "classes": world.labels})
    return tmp_path


def test_labels_memberships_bases_report_and_picture_are_written_and_true(files, world, capsys):
    points(
        files / "x.parquet",
        labels=files / "y.csv",
        out=files / "found.parquet",
        memberships=files / "u.npy",
        bases=files / "bases.safetensors",
        report=files / "report.json",
        plot=files / "picture.svg",
        dim=3,
        seeds=3,
        json=True,
    )
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((files / "report.json").read_text())
    fitted = ElasticNetSubspaceClustering(3, subspace_dim=3, random_state=0).fit(world.points)
    table = pq.read_table(files / "found.parquet").to_pydict()
    assert table["id"] == [f"p{i:03d}" for i in range(90)]
    assert table["label"] == fitted.labels_.tolist()
    assert told["scores"]["accuracy"] == clustering_accuracy(world.labels, fitted.labels_) == 1.0
    assert told["scores"]["off_class_share"] < 0.2
    assert told["stability"] == {"seeds": 3, "mean_ari": 1.0, "min_ari": 1.0}
    assert [c["size"] for c in told["clusters"]] == np.bincount(fitted.labels_).tolist()
    assert told["params"]["tau"] == 0.9
    unit = world.points / np.linalg.norm(world.points, axis=1, keepdims=True)
    np.testing.assert_allclose(read_array(files / "u.npy"), memberships(unit, fitted.bases_), atol=1e-9)
    kept = load_fitted(files / "bases.safetensors", "FoundSubspaces")
    assert kept.params == {"method": "ensc", "normalize": True, "n_clusters": 3}
    for c, basis in enumerate(fitted.bases_):
        assert principal_angles(kept.arrays[f"basis_{c}"], basis).max() < 1e-9
    first = (files / "picture.svg").read_bytes()
    points(files / "x.parquet", labels=files / "y.csv", plot=files / "picture.svg", dim=3)
    assert (files / "picture.svg").read_bytes() == first
    assert "accuracy\t1.0000" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_finds_clear_subspaces(files, method, capsys):
    option = {"omp": ["n_nonzero=3"], "franca": ["max_steps=10"]}.get(method)
    points(files / "x.npy", labels=files / "y.npy", method=method, option=option, json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == method
    if method not in ("kmeans", "spectral", "mlc", "franca"):  # the last two learn features: 90 points are too few
        assert told["scores"]["accuracy"] > 0.95


def test_every_method_takes_what_the_registry_says():
    given = {"seed": 3, "jobs": 2, "dim": 5, "normalize": False, "image": (4, 4)}
    for name, method in METHODS.items():
        made = _make(name, 4, given, []).get_params()
        assert made[method.clusters] == 4
        for option, parameter in method.takes.items():
            assert made[parameter] == given[option]
    assert set(COMPARED) <= set(METHODS)


def test_the_comparison_runs_the_others_on_the_same_rows(files, capsys, monkeypatch):
    monkeypatch.setattr("polyspan.cluster.self_expressive.available_memory_bytes", lambda: 1000)
    points(files / "both.npz", member="rows", label_member="classes", compare=True, json=True)
    told = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in told["compared"]}
    assert set(rows) == set(COMPARED)
    assert rows["ensc"]["accuracy"] == told["scores"]["accuracy"]
    assert rows["lsr"]["error"].startswith("X must have few enough rows")
    assert all(rows[name]["seconds"] >= 0 for name in COMPARED if name != "lsr")
    points(files / "both.npz", member="rows", label_member="classes", compare=True, method="tsc")
    shown = capsys.readouterr().out
    assert "lsr\tnot run: X must have few enough rows" in shown
    assert "kmeans\t0." in shown


def test_options_reach_the_method_and_projection_goes_first(files, world, capsys):
    points(
        files / "x.npy",
        n_clusters=3,
        method="lsr",
        option=["alpha=0.5", "zero_diagonal=false", "n_kept=none"],
        pca=10,
        normalize=False,
        out=files / "found.csv",
        bases=files / "bases.safetensors",
        json=True,
    )
    told = json.loads(capsys.readouterr().out)
    assert (told["n_features"], told["params"]["alpha"], told["params"]["zero_diagonal"]) == (10, 0.5, False)
    V = np.linalg.svd(world.points, full_matrices=False)[2][:10].T
    projection = load_fitted(files / "bases.safetensors").arrays["projection"]
    assert principal_angles(projection, V).max() < 1e-6
    made = LeastSquaresSubspaceClustering(3, alpha=0.5, zero_diagonal=False, normalize=False, random_state=0)
    expected = made.fit_predict(world.points @ projection)
    rows = list(csv.DictReader((files / "found.csv").read_text().splitlines()))
    assert [int(row["label"]) for row in rows] == expected.tolist()
    assert "scores" not in told
    assert "stability" not in told


def test_classes_in_a_column_of_the_same_table(files, world, capsys):
    write_array(files / "labelled.parquet", world.points, ids=world.labels, column="vector")
    points(files / "labelled.parquet", label_column="id", method="tsc", json=True)
    assert json.loads(capsys.readouterr().out)["scores"]["accuracy"] > 0.95


def test_matlab_keeps_classes_in_a_column_and_a_matrix_is_none(world, tmp_path, capsys):
    scipy.io.savemat(tmp_path / "w.mat", {"fea": world.points, "gnd": world.labels[:, None], "pair": np.ones((90, 2))})
    points(tmp_path / "w.mat", member="fea", label_member="gnd", json=True)
    assert json.loads(capsys.readouterr().out)["scores"]["accuracy"] == 1.0
    with pytest.raises(WrongContent, match=r"member pair: found shape \(90, 2\); expected one label a row"):
        points(tmp_path / "w.mat", member="fea", label_member="pair")


def test_arrays_of_usual_names_need_not_be_named_and_are_told(world, tmp_path, capsys):
    scipy.io.savemat(tmp_path / "w.mat", {"fea": world.points, "gnd": world.labels[:, None]})
    points(tmp_path / "w.mat", method="tsc", json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["scores"]["accuracy"] == 1.0
    assert told["reading"] == ["rows are fea of shape (90, 15), labels beside them are gnd"]
    write_array(tmp_path / "other.npy", np.zeros(90, dtype=int))
    points(tmp_path / "w.mat", method="tsc", n_clusters=3, labels=tmp_path / "other.npy", json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["scores"]["accuracy"] < 0.5
    assert told["reading"] == []
    write_members(tmp_path / "two.npz", {"rows": world.points, "more": world.points})
    with pytest.raises(WrongContent, match="found 2 arrays: more, rows; expected one that a member option names"):
        points(tmp_path / "two.npz", n_clusters=3)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_ids_and_classes_of_a_text_table_are_no_features(world, tmp_path, suffix, capsys):
    mark, source = "," if suffix == ".csv" else "\t", tmp_path / f"t{suffix}"
    names = ["id", *(f"f{j}" for j in range(world.points.shape[1])), "kind"]
    rows = zip(world.points, world.labels, strict=True)
    lines = [mark.join([f"p{i}", *map(repr, row.tolist()), f"k{c}"]) for i, (row, c) in enumerate(rows)]
    source.write_text("\n".join([mark.join(names), *lines]) + "\n")
    points(source, label_column="kind", out=tmp_path / "found.csv", json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["n_features"], told["n_clusters"], told["scores"]["accuracy"]) == (world.points.shape[1], 3, 1.0)
    assert [row["id"] for row in csv.DictReader((tmp_path / "found.csv").read_text().splitlines())][:2] == ["p0", "p1"]
    first = 2 + world.labels.tolist().index(1)
    for text, message in (
        (source.read_text(), "found 'k"),
        (source.read_text().replace("k1\n", "\n", 1), f"at line {first}, column kind: found an empty cell"),
        (
            source.read_text().replace("p1" + mark, "p0" + mark, 1),
            "at line 3, column id: found 'p0' again, which line 2",
        ),
        (source.read_text().replace("kind", "label", 1), "the column label of .* must be named by --label-column"),
        (source.read_text().replace("p1" + mark, "p1" + mark + "x", 1), r"at row 1, column f0: found 'x"),
    ):
        source.write_text(text)
        with pytest.raises((ValueError, WrongContent), match=message):
            points(source, n_clusters=3, label_column="kind" if message.startswith("at ") else None)
        source.write_text("\n".join([mark.join(names), *lines]) + "\n")
    with pytest.raises(ValueError, match=r"--label-column must be one of id, f0, .*, got 'none'"):
        points(source, label_column="none")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("both.npz", {"member": "rows", "label_column": "y"}), ("x.parquet", {"member": "m"}),
        ("x.parquet", {"label_member": "m"}), ("x.npy", {"column": "c"}),
    ],
)  # fmt: skip
def test_options_of_another_kind_of_file_are_refused(files, name, option):
    with pytest.raises(ValueError, match="must go with another kind of file"):
        points(files / name, n_clusters=3, **option)


def test_warnings_are_told_once_and_kept(files, world, capsys):
    write_array(files / "copies.npy", np.vstack([world.points, np.zeros((2, 15))]))
    points(files / "copies.npy", n_clusters=3, method="tsc", json=True)
    shown = capsys.readouterr()
    assert json.loads(shown.out)["warnings"][0].startswith("X has 2 all-zero rows, the first at row 90")
    assert "warning: X has 2 all-zero rows" in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--n-clusters must be given where there are no true classes"),
        ({"n_clusters": 91}, "--n-clusters must be between 1 and the 90 rows, got 91$"),
        ({"n_clusters": 3, "method": "magic"}, "--method must be one of ensc, ssc, .* got magic"),
        ({"n_clusters": 3, "seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"n_clusters": 3, "seed": -1, "method": "kmeans"}, "--seed must be between 0 and 4294967295, got -1"),
        ({"n_clusters": 3, "dim": 0, "method": "kmeans"}, "--dim must be at least 1, got 0"),
        ({"n_clusters": 3, "dim": -1, "method": "franca"}, "--dim must be at least 1, got -1"),
        ({"n_clusters": 3, "pca": 16}, r"--pca must be between 1 and min\(n, d\) = 15, got 16"),
        ({"n_clusters": 3, "option": ["tua=1"]}, "--option must be name=value with one of gamma, .* got 'tua=1'"),
        ({"n_clusters": 3, "option": ["tau=2"]}, r"tau must lie in \(0, 1\], got 2"),
        ({"n_clusters": 3, "option": ["tau=abc"]}, r"tau must lie in \(0, 1\], got 'abc'"),
        ({"n_clusters": 3, "option": ["gamma=abc"]}, "gamma must be above 1 and finite, got 'abc'"),
        ({"n_clusters": 3, "method": "omp", "option": ["tol=abc"]}, r"tol must lie in \[0, 1\), got 'abc'"),
        ({"n_clusters": 3, "method": "lsr", "option": ["alpha=abc"]}, "alpha must be positive and finite, got 'abc'"),
        ({"n_clusters": 3, "option": ["n_clusters=4"]}, "--option must leave n_clusters to the command's own options"),
        ({"n_clusters": 3, "option": ["random_state=7"]}, "--option must leave random_state to the command's own"),
        ({"n_clusters": 3, "memberships": Path("u.txt")}, r"--memberships must end in one of \.npy, .* got 'u.txt'"),
        ({"n_clusters": 3, "bases": Path("b.npy")}, r"--bases must end in one of \.safetensors, got 'b.npy'"),
        ({"n_clusters": 3, "plot": Path("p.foo")}, r"--plot must end in \.svg, \.png or \.pdf, got 'p\.foo'"),
        ({"n_clusters": 3, "out": Path("/none/l.csv")}, "--out must be a file in a folder that is there"),
    ],
)
def test_bad_options_are_refused_by_name(files, options, message):
    with pytest.raises(ValueError, match=message):
        points(files / "x.npy", **options)


def test_bad_files_are_refused(files, world):
    with pytest.raises(ValueError, match="--out must end in one of"):
        points(files / "x.npy", n_clusters=3, out=files / "found.txt")
    write_array(files / "turned.npy", np.ascontiguousarray(world.points.T))
    with pytest.raises(ValueError, match="15 rows and 90 labels; is the file of rows transposed"):
        points(files / "turned.npy", labels=files / "y.npy")
    with pytest.raises(ValueError, match="between 1 and the 15 rows, got 20; rows are points: is the file transposed"):
        points(files / "turned.npy", n_clusters=20)
    (files / "few.csv").write_text("id,label\np000,1\n")
    with pytest.raises(WrongContent, match="no label of 'p001'"):
        points(files / "x.parquet", labels=files / "few.csv")
    (files / "other.csv").write_text("id,kind\np000,1\n")
    with pytest.raises(WrongContent, match="columns id, kind"):
        points(files / "x.parquet", labels=files / "other.csv")
    write_array(files / "one.npy", np.zeros((3, 2, 2)))
    with pytest.raises(WrongContent):
        points(files / "one.npy", n_clusters=2)


def test_labels_come_as_a_column_too_and_outputs_never_replace_what_is_read(files, world, capsys):
    write_array(files / "column.npy", world.labels[:, None])
    points(files / "x.npy", labels=files / "column.npy", method="tsc", json=True)
    assert json.loads(capsys.readouterr().out)["scores"]["accuracy"] > 0.95
    before = (files / "x.npy").read_bytes()
    for options in ({"out": files / "x.npy"}, {"memberships": files / "x.npy"}, {"out": files / "y.npy"}):
        with pytest.raises(ValueError, match="must be another file than a file that is read"):
            points(files / "x.npy", labels=files / "y.npy", **options)
    with pytest.raises(ValueError, match="--memberships must be another file than that of --out"):
        points(files / "x.npy", n_clusters=3, out=files / "a.npy", memberships=files / "a.npy")
    assert (files / "x.npy").read_bytes() == before


def test_a_folder_that_may_not_be_written_to_is_told_first(files, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="--plot must be in a folder that may be written to"):
        points(files / "x.npy", n_clusters=3, plot=files / "p.svg")


def test_a_group_for_every_row_is_refused_by_spectral_and_the_comparison_goes_on(files, world, capsys):
    write_array(files / "few.npy", world.points[::9])
    with pytest.raises(ValueError, match="--n-clusters must be below the 10 rows for spectral, got 10"):
        points(files / "few.npy", n_clusters=10, method="spectral")
    points(files / "few.npy", n_clusters=10, method="kmeans", compare=True, json=True)
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["compared"]}
    assert rows["spectral"]["error"] == "--n-clusters must be below the 10 rows for spectral, got 10"
    assert "seconds" in rows["tsc"]


def test_one_group_and_rows_that_are_all_equal_are_said_in_the_singular(files, capsys):
    write_array(files / "same.npy", np.ones((12, 4)))
    points(files / "same.npy", n_clusters=2, method="kmeans", json=True)
    told = json.loads(capsys.readouterr().out)["warnings"]
    assert "all 12 rows are equal: 2 groups cannot be told apart" in told
    assert "1 group was found of the 2 that were asked for" in told


def test_equal_rows_and_empty_groups_are_said(files, world, capsys):
    write_array(files / "equal.npy", np.repeat(world.points[:3], 10, axis=0))
    for k, expected in ((3, []), (5, ["only 3 of the 30 rows differ: 5 groups cannot be told apart"])):
        points(files / "equal.npy", n_clusters=k, method="kmeans", json=True)
        told = json.loads(capsys.readouterr().out)["warnings"]
        assert [w for w in told if w.startswith("only")] == expected
        assert ("3 groups were found of the 5 that were asked for" in told) == (k == 5)


def test_bases_and_memberships_of_an_empty_group_keep_their_number(files, world, capsys, monkeypatch):
    class Gap(KMeans):
        def fit(self, X, y=None):
            super().fit(X)
            self.labels_ = np.array([0, 2, 3])[world.labels]
            return self

    monkeypatch.setattr("sklearn.cluster.KMeans", Gap)
    places = {"memberships": files / "u.npy", "bases": files / "b.safetensors"}
    points(files / "x.npy", n_clusters=4, method="kmeans", dim=3, json=True, **places)
    told = json.loads(capsys.readouterr().out)
    assert [c["label"] for c in told["clusters"]] == [0, 2, 3]
    kept = load_fitted(places["bases"], "FoundSubspaces")
    assert sorted(kept.arrays) == ["basis_0", "basis_2", "basis_3"]
    assert (kept.params["n_clusters"], kept.about["sizes"]) == (4, [30, 0, 30, 30])
    for c, basis in zip((0, 2, 3), world.bases, strict=True):
        assert principal_angles(kept.arrays[f"basis_{c}"], basis).max() < 0.1
    np.testing.assert_array_equal(read_array(places["memberships"]).argmax(axis=1), np.array([0, 2, 3])[world.labels])


def test_subspaces_of_groups_with_means_of_their_own_go_through_the_origin(files, world, capsys):
    rows = world.points + 3 * np.eye(15)[world.labels]
    write_array(files / "off.npy", rows)
    given = {"method": "diffusion-subspace", "normalize": False, "labels": files / "y.npy", "json": True}
    points(files / "off.npy", **given, option=["center=true", "rank=3"], memberships=files / "u.npy")
    told = json.loads(capsys.readouterr().out)
    assert told["scores"]["accuracy"] == 1.0
    expected = clustering_report(rows, world.labels)["residual_share"]
    assert told["residual_share"] == pytest.approx(expected)
    np.testing.assert_array_equal(
        np.unique(np.stack([read_array(files / "u.npy").argmax(axis=1), world.labels]), axis=1).shape, (2, 3)
    )


def test_the_method_of_a_comparison_is_judged_as_the_others_are(files, world, capsys):
    given = {"method": "diffusion-subspace", "option": ["rank=1", "n_init=2"], "normalize": False, "seed": 3}
    points(files / "x.npy", labels=files / "y.npy", compare=True, json=True, out=files / "found.npy", **given)
    told = json.loads(capsys.readouterr().out)
    expected = clustering_report(world.points, read_array(files / "found.npy", ndim=1))["residual_share"]
    assert told["compared"][0]["residual_share"] == pytest.approx(expected)
    assert told["residual_share"] > 2 * expected  # of its own subspaces, which have one dimension


def test_mlc_tells_writes_and_draws_the_subspaces_of_the_features_that_it_learned(files, world, capsys, monkeypatch):
    drawn = {}

    def draw(fitted, Z, path):
        drawn.update(labels=fitted.labels_, features=Z, path=path)

    monkeypatch.setattr("polyspan.cluster.manifold_plots.plot_linearized", draw)
    places = {"memberships": files / "u.npy", "bases": files / "b.safetensors", "plot": files / "p.svg"}
    quick = ["max_epochs=2", "tcr_epochs=2", "device=cpu"]
    points(files / "x.npy", labels=files / "y.npy", method="mlc", option=quick, compare=True, json=True, **places)
    told = json.loads(capsys.readouterr().out)
    unit = world.points / np.linalg.norm(world.points, axis=1, keepdims=True)
    made = ManifoldLinearizingClustering(3, max_epochs=2, tcr_epochs=2, device="cpu", random_state=0).fit(unit)
    Z = made.transform(unit)
    np.testing.assert_allclose(read_array(places["memberships"]), memberships(Z, made.subspaces_), atol=1e-5)
    kept = load_fitted(places["bases"], "FoundSubspaces")
    assert [kept.arrays[f"basis_{c}"].shape for c in range(3)] == [basis.shape for basis in made.subspaces_]
    assert kept.params["normalize"] is False
    assert [c["rank"] for c in told["clusters"]] == made.numerical_rank_.tolist()
    assert told["n_features"] == 15
    assert told["learned"]["n_features"] == Z.shape[1]
    assert told["learned"]["class_rate"] == pytest.approx(made.history_[-1]["class_rate"], rel=1e-4)
    np.testing.assert_allclose(drawn["features"], Z, atol=1e-5)
    # Beside other methods it is judged on the rows that all of them saw.
    expected = clustering_report(unit, made.labels_)
    assert told["compared"][0]["residual_share"] == pytest.approx(expected["residual_share"])
    assert told["params"]["verbose"] == 1
    points(files / "x.npy", labels=files / "y.npy", method="mlc", option=quick)
    assert f"of the {Z.shape[1]} features that were learned" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["mlc", "kmeans"])
def test_rows_of_zeros_are_said_by_every_method(files, world, capsys, method):
    rows = world.points.copy()
    rows[[4, 9]] = 0
    write_array(files / "zeros.npy", rows)
    option = ["max_epochs=1", "tcr_epochs=1"] if method == "mlc" else None
    points(files / "zeros.npy", n_clusters=3, method=method, option=option)
    assert "warning: X has 2 all-zero rows, the first at row 4; they lie in every subspace" in capsys.readouterr().err
    points(files / "zeros.npy", n_clusters=3, method="ensc")
    assert capsys.readouterr().err.count("all-zero rows") == 1


def test_options_may_be_lists_and_those_of_a_wrong_kind_are_refused_by_name(files, capsys):
    told = {"n_clusters": 3, "method": "franca", "json": True}
    points(files / "x.npy", **told, option=["widths=8,64", "max_steps=2", "weight_decay=0.01,0.1"])
    assert json.loads(capsys.readouterr().out)["n"] == 90
    with pytest.raises(ValueError, match="widths must be a sequence of whole numbers, got 3"):
        points(files / "x.npy", **told, option=["widths=3", "max_steps=2"])
    with pytest.raises(ValueError, match="--option must give values of the kind that mlc takes, got backbone=resnet"):
        points(files / "x.npy", **told | {"method": "mlc"}, option=["backbone=resnet"])
