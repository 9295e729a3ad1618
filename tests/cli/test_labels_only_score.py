"""True classes score and do nothing else: shuffled ones and none lead each command to the same files."""

import json

import numpy as np
import pytest
import scipy.sparse as sp

from polyspan.cli.cluster import graph
from polyspan.cli.cluster_images import images
from polyspan.cli.points import METHODS, points
from polyspan.data import planted_graph, planted_subspaces
from polyspan.io import load_fitted, read_array, write_array

QUICK = {
    "mlc": ["hidden=16", "tcr_epochs=1", "max_epochs=1"],
    "franca": ["max_steps=3"],
    "lhdsc": ["max_epochs=5,5,5", "min_epochs=2"],
    "omp": ["n_nonzero=3"],
}
SCORES = ("scores", "out", "seconds", "memberships", "bases", "labels", "compared", "reading")


def outcome(command, source, folder, classes, **options):
    """Run one command, and return what it wrote and told, without scores, seconds and places."""
    folder.mkdir()
    places = {"out": folder / "o.csv", "memberships": folder / "u.npy", "bases": folder / "b.safetensors"}
    command(source, n_clusters=3, labels=classes, json=True, report=folder / "report.json", **places, **options)
    told = json.loads((folder / "report.json").read_text())
    assert ("scores" in told) == (classes is not None)
    kept = load_fitted(places["bases"], "FoundSubspaces")
    labels = np.array(places["out"].read_text().splitlines())
    arrays = {"labels": labels, "memberships": read_array(places["memberships"]), **kept.arrays}
    return arrays, {name: value for name, value in told.items() if name not in SCORES}


def assert_classes_only_score(command, source, truth, folder, **options):
    shuffled = np.random.default_rng(1).permutation(truth)
    write_array(folder / "y.npy", truth)
    write_array(folder / "z.npy", shuffled)
    runs = [
        outcome(command, source, folder / name, classes, **options)
        for name, classes in (("none", None), ("true", folder / "y.npy"), ("shuffled", folder / "z.npy"))
    ]
    for arrays, told in runs[1:]:
        assert told == runs[0][1]
        assert arrays.keys() == runs[0][0].keys()
        for name, value in runs[0][0].items():
            np.testing.assert_array_equal(arrays[name], value, err_msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_classes_only_score_points(method, tmp_path):
    world = planted_subspaces(0, n_per=20, d=8, k=2, n_subspaces=3, noise=0.05)
    write_array(tmp_path / "x.npy", world.points.astype(np.float32))
    option = QUICK.get(method)
    assert_classes_only_score(points, tmp_path / "x.npy", world.labels, tmp_path, method=method, option=option)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["mlc", "lhdsc", "franca", "ensc"])
def test_classes_only_score_images(method, tmp_path):
    rng = np.random.default_rng(0)
    truth = np.arange(45) % 3
    pixels = np.clip(rng.random((3, 8, 8))[truth] + 0.1 * rng.normal(size=(45, 8, 8)), 0, 1).astype(np.float32)
    write_array(tmp_path / "x.npy", pixels)
    options = {"tcr_epochs": 1, "epochs": 1, "batch_size": 45} if method == "mlc" else {}
    options |= {"option": QUICK[method]} if method in ("lhdsc", "franca") else {}
    assert_classes_only_score(images, tmp_path / "x.npy", truth, tmp_path, method=method, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["s2cag", "m-s2cag"])
@pytest.mark.parametrize("select", [False, True])
def test_classes_only_score_graphs(method, select, tmp_path):
    world = planted_graph(0, n=60, n_clusters=3, d=30, degree=8.0, mixing=0.1, words=20.0, topic_share=0.5)
    sp.save_npz(tmp_path / "graph.npz", sp.csr_array(world.adjacency.astype(np.float64)))
    write_array(tmp_path / "words.npy", world.attributes.toarray().astype(np.float64))
    options = {"attributes": tmp_path / "words.npy", "method": method, "select": select}
    assert_classes_only_score(graph, tmp_path / "graph.npz", world.labels, tmp_path, **options)
