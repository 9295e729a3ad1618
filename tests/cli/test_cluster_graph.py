import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.io
import scipy.sparse as sp
from sklearn.cluster import KMeans

from polyspan.cli.cluster import graph
from polyspan.cluster import S2CAG, ModularityS2CAG, found_subspaces, graph_baselines, smoothed_attributes
from polyspan.cluster.plots import plot_clusters
from polyspan.data import planted_graph
from polyspan.errors import WrongContent
from polyspan.io import load_fitted, read_array, write_array
from polyspan.linalg import clustering_accuracy, graph_modularity, principal_angles

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def world():
    made = planted_graph(0, n=200, n_clusters=3, d=90, degree=12.0, mixing=0.1, words=25.0, topic_share=0.5)
    return made._replace(attributes=made.attributes.astype(np.float64))


@pytest.fixture
def files(world, tmp_path):
    upper = sp.coo_array(sp.triu(world.adjacency))
    lines = [f"v{i:03d},v{j:03d}" for i, j in zip(*upper.coords, strict=True)]
    (tmp_path / "edges.csv").write_text("\n".join(["source,target", *lines]) + "\n")
    write_array(
        tmp_path / "words.parquet", world.attributes.toarray(), ids=[f"v{i:03d}" for i in range(200)], column="vector"
    )
    (tmp_path / "classes.csv").write_text(
        "\n".join(["id,label", *(f"v{i:03d},{c}" for i, c in enumerate(world.labels))]) + "\n"
    )
    return tmp_path


def test_labels_are_written_by_the_ids_of_the_input_and_the_report_is_true(files, world, capsys):
    graph(
        files / "edges.csv",
        attributes=files / "words.parquet",
        labels=files / "classes.csv",
        out=files / "labels.parquet",
        report=files / "report.json",
        json=True,
    )
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((files / "report.json").read_text())
    table = pq.read_table(files / "labels.parquet").to_pydict()
    assert table["id"] == [f"v{i:03d}" for i in range(200)]
    fitted = S2CAG(3, random_state=0).fit(world.attributes, adjacency=world.adjacency)
    assert table["label"] == fitted.labels_.tolist()
    assert [c["size"] for c in told["clusters"]] == np.bincount(fitted.labels_).tolist()
    np.testing.assert_allclose([c["conductance"] for c in told["clusters"]], fitted.conductance_, rtol=1e-6)
    assert told["affinity_modularity"] == pytest.approx(fitted.affinity_modularity_, rel=1e-6)
    assert told["scores"]["accuracy"] == clustering_accuracy(world.labels, fitted.labels_) > 0.97
    assert told["edges"] == world.adjacency.nnz // 2
    assert set(told["seconds"]) == {"read", "select", "fit"}


@pytest.mark.parametrize("suffix", [".csv", ".npy"])
def test_every_label_format_holds_the_same_and_a_mat_file_needs_nothing_else(world, tmp_path, suffix, capsys):
    path, out = tmp_path / "graph.mat", tmp_path / f"labels{suffix}"
    scipy.io.savemat(
        path,
        {"W": sp.csc_matrix(world.adjacency), "fea": sp.csc_matrix(world.attributes), "gnd": world.labels[:, None]},
    )
    graph(path, out=out, method="m-s2cag", rounding="kmeans")
    shown = capsys.readouterr().out
    assert "accuracy\t" in shown
    assert "m-s2cag, order 10, decay 0.9" in shown
    expected = ModularityS2CAG(3, rounding="kmeans", random_state=0).fit(world.attributes, adjacency=world.adjacency)
    if suffix == ".npy":
        np.testing.assert_array_equal(np.load(out), expected.labels_)
    else:
        rows = list(csv.DictReader(out.read_text().splitlines()))
        assert [int(row["label"]) for row in rows] == expected.labels_.tolist()
        assert [int(row["id"]) for row in rows] == list(range(200))


def test_simpler_methods_run_on_the_same_graph_and_seeds_are_compared(files, world, capsys):
    given = {"attributes": files / "words.parquet", "labels": files / "classes.csv"}
    graph(files / "edges.csv", **given, compare=True, seeds=3, embedding=files / "e.npy", json=True)
    told = json.loads(capsys.readouterr().out)
    fitted = S2CAG(3, random_state=0).fit(world.attributes, adjacency=world.adjacency)
    np.testing.assert_allclose(read_array(files / "e.npy"), fitted.embedding_, atol=1e-9)
    assert told["stability"] == {"seeds": 3, "mean_ari": pytest.approx(1), "min_ari": pytest.approx(1)}
    rows = {row["method"]: row for row in told["compared"]}
    assert len(rows) == 8
    assert rows["s2cag"]["accuracy"] == told["scores"]["accuracy"]
    assert rows["s2cag"]["modularity"] == pytest.approx(graph_modularity(world.adjacency, fitted.labels_))
    smooth = smoothed_attributes(world.attributes, world.adjacency)
    expected = KMeans(3, n_init=10, random_state=0).fit_predict(smooth)
    assert rows["k-means, smoothed rows"]["accuracy"] == clustering_accuracy(world.labels, expected)
    assert rows["spectral, graph only"]["accuracy"] > 0.9
    graph(files / "edges.csv", **given, compare=True)
    assert "elastic net, smoothed rows\t" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--seed must be between 0 and 4294967295, got -1"):
        graph(files / "edges.csv", n_clusters=3, seed=-1)
    with pytest.raises(ValueError, match="--seeds must be at least 1, got 0"):
        graph(files / "edges.csv", **given, seeds=0)


def test_memberships_and_bases_are_written_beside_the_labels(files, world, capsys):
    places = {"memberships": files / "u.npy", "bases": files / "b.safetensors", "out": files / "found.csv"}
    graph(files / "edges.csv", attributes=files / "words.parquet", n_clusters=3, dim=4, json=True, **places)
    told = json.loads(capsys.readouterr().out)
    fitted = S2CAG(3, random_state=0).fit(world.attributes, adjacency=world.adjacency)
    np.testing.assert_allclose(read_array(files / "u.npy"), fitted.memberships_, atol=1e-9)
    kept = load_fitted(files / "b.safetensors", "FoundSubspaces")
    assert kept.params == {"method": "s2cag", "order": 10, "decay": 0.9, "n_clusters": 3}
    Z = smoothed_attributes(world.attributes, world.adjacency)
    for c, basis in enumerate(found_subspaces(Z, fitted.labels_, 4)):
        assert principal_angles(kept.arrays[f"basis_{c}"], basis).max() < 1e-6
    assert [group["rank"] for group in told["clusters"]] == [4, 4, 4]
    assert {name: told[name] for name in places} == {name: str(path) for name, path in places.items()}
    graph(files / "edges.csv", attributes=files / "words.parquet", n_clusters=3, **places)
    shown = capsys.readouterr().out
    assert f"memberships\t{files / 'u.npy'}" in shown
    assert ", rank " in shown
    for dim, options in ((0, {"bases": places["bases"]}), (91, {"bases": places["bases"]})):
        with pytest.raises(ValueError, match=f"--dim must be between 1 and the 90 attributes, got {dim}"):
            graph(files / "edges.csv", attributes=files / "words.parquet", n_clusters=3, dim=dim, **options)
    with pytest.raises(ValueError, match="--dim must go with --bases, got 4 alone"):
        graph(files / "edges.csv", attributes=files / "words.parquet", n_clusters=3, dim=4)
    with pytest.raises(ValueError, match=r"--memberships must end in one of \.npy, .* got 'u.txt'"):
        graph(files / "edges.csv", attributes=files / "words.parquet", n_clusters=3, memberships=files / "u.txt")


def test_smoothed_rows_that_do_not_fit_are_said_and_the_others_run(world, monkeypatch):
    monkeypatch.setattr("polyspan.cluster.graph_comparison.available_memory_bytes", lambda: 1000)
    rows = {row.name: row for row in graph_baselines(world.attributes, world.adjacency, 3)}
    assert [name for name, row in rows.items() if row.labels is not None] == [
        "k-means, attributes",
        "spectral, graph only",
    ]
    assert all("more than is free" in row.error for row in rows.values() if row.labels is None)


def test_hops_are_chosen_without_labels_on_request(files, capsys):
    graph(files / "edges.csv", attributes=files / "words.parquet", n_clusters=3, select=True, json=True)
    told = json.loads(capsys.readouterr().out)
    assert len(told["selection"]) == 20
    assert (told["order"], told["decay"]) == (told["selection"][0]["order"], told["selection"][0]["decay"])
    assert "scores" not in told


def test_pictures_have_equal_bytes_for_equal_input_and_leave_nothing_behind(files):
    options = {"attributes": files / "words.parquet", "n_clusters": 3, "json": True}
    before = {path.name for path in files.iterdir()}
    for name in ("one.svg", "two.svg", "three.png"):
        graph(files / "edges.csv", plot=files / name, **options)
    assert (files / "one.svg").read_bytes() == (files / "two.svg").read_bytes()
    assert b"<svg" in (files / "one.svg").read_bytes()
    assert (files / "three.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in files.iterdir()} == before | {"one.svg", "two.svg", "three.png"}


def test_the_picture_has_the_angles_between_subspaces_where_bases_are_asked_for(files, monkeypatch):
    drawn = []
    monkeypatch.setattr("polyspan.cluster.plots.basis_angles", lambda bases: drawn.append(bases) or np.zeros((3, 3)))
    given = {"attributes": files / "words.parquet", "n_clusters": 3, "dim": 2}
    graph(files / "edges.csv", **given, plot=files / "p.svg", bases=files / "b.safetensors")
    kept = load_fitted(files / "b.safetensors", "FoundSubspaces").arrays
    for c in range(3):
        np.testing.assert_array_equal(drawn[0][c], kept[f"basis_{c}"])


def test_a_picture_of_one_column_and_of_many_points_is_drawn(tmp_path):
    rng = np.random.default_rng(0)
    many = plot_clusters(rng.normal(size=(20_000, 3)), rng.integers(0, 12, 20_000), tmp_path / "many.svg")
    assert many.stat().st_size < 2**20
    plot_clusters(np.ones((5, 1)), np.zeros(5, dtype=int), tmp_path / "flat.png")
    with pytest.raises(ValueError, match=r"path must end in .svg, .png or .pdf, got .*x.txt"):
        plot_clusters(np.ones((5, 1)), np.zeros(5, dtype=int), tmp_path / "x.txt")
    with pytest.raises(ValueError, match=r"one entry a row of embedding \(5, 1\), got shape \(4,\)"):
        plot_clusters(np.ones((5, 1)), np.zeros(4, dtype=int), tmp_path / "x.svg")


def test_wrong_use_is_said_before_and_after_reading(files, tmp_path):
    with pytest.raises(ValueError, match=r"--out must end in one of .parquet, .csv, .npy, got .*x.txt"):
        graph(files / "edges.csv", out=tmp_path / "x.txt")
    with pytest.raises(ValueError, match="--attributes must be given"):
        graph(files / "edges.csv", n_clusters=3)
    with pytest.raises(ValueError, match="--n-clusters must be given"):
        graph(files / "edges.csv", attributes=files / "words.parquet")
    whole = {"attributes": files / "words.parquet", "n_clusters": 3}
    with pytest.raises(ValueError, match=r"--select must go without --order and --decay, .* got 3 and 0\.9"):
        graph(files / "edges.csv", **whole, select=True, order=3)
    with pytest.raises(ValueError, match=r"--resolution must go with --method m-s2cag, got 2\.0 for s2cag"):
        graph(files / "edges.csv", **whole, resolution=2.0)
    (files / "more.csv").write_text((files / "edges.csv").read_text() + "v000,stranger\n")
    with pytest.raises(WrongContent, match="1 unknown nodes: stranger"):
        graph(files / "more.csv", attributes=files / "words.parquet", n_clusters=3)


def test_warnings_go_to_stderr_and_into_the_report(files, world, capsys):
    head, *lines = (files / "edges.csv").read_text().splitlines()
    same = [line for line in lines if world.labels[int(line[1:4])] == world.labels[int(line[6:9])]]
    kept = [line for line in same if "v00" not in line]
    (files / "fewer.csv").write_text("\n".join([head, *kept]) + "\n")
    graph(files / "fewer.csv", attributes=files / "words.parquet", n_clusters=2, json=True)
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert "warning: adjacency has 3 components of two or more vertices" in shown.err
    assert told["n_isolated"] == 10
    assert len(told["warnings"]) == 1


def test_cluster_qr_keeps_the_vector_that_it_wants(files, world, capsys):
    given = {"attributes": files / "words.parquet", "labels": files / "classes.csv", "rounding": "cluster_qr"}
    graph(files / "edges.csv", **given, json=True)
    fitted = S2CAG(3, rounding="cluster_qr", drop_first=False, random_state=0)
    fitted.fit(world.attributes, adjacency=world.adjacency)
    told = json.loads(capsys.readouterr().out)
    assert told["scores"]["accuracy"] == clustering_accuracy(world.labels, fitted.labels_) > 0.95
    graph(files / "edges.csv", **given, method="m-s2cag")
    assert "warning: cluster_qr finds groups by the trivial vector, which m-s2cag" in capsys.readouterr().err


def test_vertices_that_stand_alone_or_say_nothing_are_counted_in_the_table(world, tmp_path, capsys):
    A, X = world.adjacency.tolil(), world.attributes.toarray()
    A[[0, 1, 2]] = 0
    A[:, [0, 1, 2]] = 0
    X[[7, 8]] = 0
    sp.save_npz(tmp_path / "graph.npz", sp.csr_array(A.tocsr()))
    write_array(tmp_path / "words.npy", X)
    graph(tmp_path / "graph.npz", attributes=tmp_path / "words.npy", n_clusters=3)
    shown = capsys.readouterr().out
    assert "vertices without a neighbour\t3, placed by their attributes" in shown
    assert "vertices without attributes\t2, placed by the graph" in shown
    assert "components" not in shown


def test_the_picture_names_the_colours_where_they_are_distinct(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("polyspan.cluster.plots.write_picture", lambda figure, path, **_: figures.append(figure))
    rng = np.random.default_rng(0)
    for k in (3, 12, 21):
        plot_clusters(rng.normal(size=(60, 3)), np.arange(60) % k, tmp_path / "p.png")
    keys = [figure.axes[0].get_legend() for figure in figures]
    assert [[text.get_text() for text in key.get_texts()] for key in keys[:2]] == [
        [str(c) for c in range(k)] for k in (3, 12)
    ]
    assert keys[2] is None
