"""Each reader is tried on tiny files of the set's own format; the sets themselves where POLYSPAN_DATA has them."""

import gzip
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from polyspan.data import AttributedGraph, CrossModal, Images, Intents, ShapesText, Texts, data_folder, dataset
from polyspan.errors import FileError, UnreadableFile, WrongContent

FOLDERS = {
    "acm": "acm-attributed-graph",
    "citeseer": "citeseer-attributed-graph",
    "mnist-t10k": "mnist-t10k",
    "orl": "orl-faces-32",
    "coil20": "coil20-32",
    "yaleb": "extended-yaleb-32",
    "banking77": "banking77",
    "clinc150": "clinc150",
    "wikipedia-crossmodal": "wikipedia-crossmodal",
    "shapes3d-text": "shapes3d-text",
    "wikitext-2": "wikitext-2",
}
LABELLED = sorted(set(FOLDERS) - {"wikitext-2"})


def ring(n):
    return np.roll(np.eye(n), 1, axis=1) + np.roll(np.eye(n), -1, axis=1)


def pictures(n, dtype):
    return np.random.default_rng(0).integers(0, 255, size=(n, 32, 32)).astype(dtype)


def unit_rows(n, d):
    rows = np.random.default_rng(1).normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write_acm(folder, n=8):
    X = sp.random_array((n, 5), density=0.5, rng=np.random.default_rng(0)).astype(bool).astype(np.uint8)
    W = sp.csc_array(ring(n) + np.eye(n)).astype(np.uint8)
    scipy.io.savemat(folder / "acm.mat", {"W": W, "fea": sp.csc_array(X), "gnd": np.arange(n)[None] % 3})


def write_citeseer(folder, n=8):
    X = np.zeros((n, 30), np.uint8)
    X[np.arange(n - 1), np.arange(n - 1)] = 1
    labels = (np.arange(n) % 6 + 1).astype(np.uint8)[:, None]
    scipy.io.savemat(folder / "citeseer.mat", {"W": ring(n).astype(np.uint8), "fea": X, "gnd": labels})


def write_mnist(folder, n=3, labelled=3):
    pixels = np.arange(n * 28 * 28, dtype=np.uint8).tobytes()
    images = struct.pack(">IIII", 2051, n, 28, 28) + pixels
    labels = struct.pack(">II", 2049, labelled) + bytes([7, 2, 9][:labelled])
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def flattened_as_matlab_does(images):
    return np.stack([image.ravel(order="F") for image in images])


def write_orl(folder, n=4, labelled=4):
    fea = flattened_as_matlab_does(pictures(n, np.uint8))
    labels = (np.arange(labelled) // 2 + 1).astype(np.uint8)[:, None]
    scipy.io.savemat(folder / "ORL_32x32.mat", {"fea": fea, "gnd": labels})


def write_coil(folder):
    fea = flattened_as_matlab_does(pictures(4, np.float64) / 255)
    scipy.io.savemat(folder / "COIL20.mat", {"fea": fea, "gnd": np.array([[1], [1], [2], [20]], np.uint8)})


def write_yaleb(folder):
    features = flattened_as_matlab_does(pictures(4, np.uint8)).T
    scipy.io.savemat(folder / "YaleB_32x32.mat", {"features": features, "Label": np.array([[1, 1, 2, 38]], np.uint8)})


def write_banking(folder, train=3):
    (folder / "train.csv").write_text('text,category\n"Where, please?",card\nHow?,fee\n"Say ""no""",card\n')
    (folder / "test.csv").write_text("text,category\nWhen?,age\nWhat?,fee\n")
    np.savez(folder / "minilm_l6_384_f16.npz", train=unit_rows(train, 384), test=unit_rows(2, 384))


def write_clinc(folder, structure=None):
    pairs = {"test": [["say hi", "hello"], ["fly me", "flight"], ["hey", "hello"]]}
    (folder / "test.json").write_text(json.dumps(structure or pairs))
    np.savez(folder / "minilm_l6_384_f16.npz", test=unit_rows(3, 384))


def write_wikipedia(folder, last=3):
    rng = np.random.default_rng(0)
    np.savez(
        folder / "features.npz",
        image=rng.normal(size=(4, 128)).astype(np.float32),
        text=rng.normal(size=(4, 100)).astype(np.float32),
        label=np.array([0, 9, 4, 4], np.uint8),
        train_index=np.array([0, 2], np.int32),
        test_index=np.array([1, last], np.int32),
    )


def write_shapes(folder, lines=3):
    np.savez(
        folder / "features.npz",
        pointnet128=np.random.default_rng(0).normal(size=(3, 128)).astype(np.float16),
        minilm384=unit_rows(3, 384),
        attributes=np.array([[0, 2, 1, 1], [19, 0, 0, 0], [3, 1, 1, 0]], np.uint8),
    )
    (folder / "captions.txt").write_text("a table\na shelf; tall\na mug\n"[: 8 if lines == 1 else None])


def write_wikitext(folder, lines=20):
    (folder / "test.txt").write_text("".join(f" = Title {i} =\n" for i in range(2100)))
    (folder / "valid.txt").write_text("".join(f"line {i} .\n" for i in range(lines)))


WRITERS = {
    "acm": write_acm,
    "citeseer": write_citeseer,
    "mnist-t10k": write_mnist,
    "orl": write_orl,
    "coil20": write_coil,
    "yaleb": write_yaleb,
    "banking77": write_banking,
    "clinc150": write_clinc,
    "wikipedia-crossmodal": write_wikipedia,
    "shapes3d-text": write_shapes,
    "wikitext-2": write_wikitext,
}


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_set_is_found_by_its_path_and_by_the_environment_alike(name, tmp_path, monkeypatch):
    folder = tmp_path / FOLDERS[name]
    folder.mkdir()
    WRITERS[name](folder)
    monkeypatch.setenv("POLYSPAN_DATA", str(tmp_path))
    by_name = dataset(name)
    monkeypatch.delenv("POLYSPAN_DATA")
    by_path = dataset(name, folder)
    assert type(by_name) is type(by_path)
    for a, b in zip(by_name, by_path, strict=True):
        same = (a != b).nnz == 0 if sp.issparse(a) else np.array_equal(a, b)
        assert same
    if isinstance(by_name, Texts):
        return
    labels = by_name.attributes if name == "shapes3d-text" else by_name.labels
    assert labels.dtype == np.int64
    assert labels.min() >= 0


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_set_that_is_not_there_is_unreadable_and_both_ways_are_told(name, tmp_path, monkeypatch):
    monkeypatch.delenv("POLYSPAN_DATA", raising=False)
    with pytest.raises(UnreadableFile, match=rf"pass path=, or set POLYSPAN_DATA .*{FOLDERS[name]}/"):
        dataset(name)
    monkeypatch.setenv("POLYSPAN_DATA", str(tmp_path))
    with pytest.raises(UnreadableFile, match=str(tmp_path / FOLDERS[name])):
        dataset(name)
    (tmp_path / FOLDERS[name]).mkdir()
    with pytest.raises(UnreadableFile, match=FOLDERS[name]):
        dataset(name)


def test_a_name_that_is_not_known_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(ValueError, match=r"name must be one of .*'acm'.*got 'imagenet'"):
        dataset("imagenet", tmp_path)


def test_an_explicit_path_goes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYSPAN_DATA", str(tmp_path / "elsewhere"))
    assert data_folder("orl-faces-32", tmp_path) == tmp_path


def test_graphs_become_sparse_and_keep_their_loops_and_empty_rows(tmp_path):
    write_acm(tmp_path)
    write_citeseer(tmp_path)
    acm, citeseer = dataset("acm", tmp_path), dataset("citeseer", tmp_path)
    for found in (acm, citeseer):
        assert isinstance(found, AttributedGraph)
        assert isinstance(found.adjacency, sp.csr_array)
        assert isinstance(found.attributes, sp.csr_array)
    np.testing.assert_array_equal(acm.adjacency.toarray(), ring(8) + np.eye(8))
    np.testing.assert_array_equal(acm.labels, np.arange(8) % 3)
    np.testing.assert_array_equal(citeseer.adjacency.toarray(), ring(8))
    np.testing.assert_array_equal(citeseer.labels, np.arange(8) % 6)
    assert citeseer.attributes[[7]].nnz == 0


@pytest.mark.parametrize(
    ("name", "dtype", "scale", "labels"),
    [
        ("orl", np.uint8, 255, [0, 0, 1, 1]),
        ("coil20", np.float64, 1, [0, 0, 1, 2]),
        ("yaleb", np.uint8, 255, [0, 0, 1, 2]),
    ],
)
def test_pictures_stand_upright_whichever_way_the_file_lays_them(tmp_path, name, dtype, scale, labels):
    WRITERS[name](tmp_path)
    found = dataset(name, tmp_path)
    assert isinstance(found, Images)
    np.testing.assert_allclose(found.images, pictures(4, np.float64) * scale / 255, rtol=1e-12)
    assert (found.images.dtype, found.scale) == (dtype, scale)
    assert found.images.flags.c_contiguous
    assert found.labels.tolist() == labels


def test_mnist_is_read_as_stored(tmp_path):
    write_mnist(tmp_path)
    found = dataset("mnist-t10k", tmp_path)
    np.testing.assert_array_equal(found.images.ravel(), np.arange(3 * 28 * 28, dtype=np.uint8))
    assert found.images.shape == (3, 28, 28)
    assert found.labels.tolist() == [7, 2, 9]


def test_intents_of_gallery_and_queries_share_their_numbers_and_rows_are_unit(tmp_path):
    write_banking(tmp_path)
    found = dataset("banking77", tmp_path)
    assert isinstance(found, Intents)
    assert found.texts == ["Where, please?", "How?", 'Say "no"']
    assert [found.intents[i] for i in found.labels] == ["card", "fee", "card"]
    assert [found.intents[i] for i in found.query_labels] == ["age", "fee"]
    for rows in (found.embeddings, found.query_embeddings):
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found.embeddings, unit_rows(3, 384), atol=1e-3)


def test_a_set_without_a_split_is_its_own_gallery(tmp_path):
    write_clinc(tmp_path)
    found = dataset("clinc150", tmp_path)
    assert [found.intents[i] for i in found.labels] == ["hello", "flight", "hello"]
    np.testing.assert_array_equal(found.embeddings, found.query_embeddings)
    assert found.texts == found.query_texts == ["say hi", "fly me", "hey"]


def test_pairs_of_modalities_keep_their_rows(tmp_path):
    for name, write in (("w", write_wikipedia), ("s", write_shapes)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    wiki, shapes = dataset("wikipedia-crossmodal", tmp_path / "w"), dataset("shapes3d-text", tmp_path / "s")
    assert isinstance(wiki, CrossModal)
    assert isinstance(shapes, ShapesText)
    np.testing.assert_array_equal(wiki.image, np.load(tmp_path / "w" / "features.npz")["image"])
    assert (wiki.train.tolist(), wiki.test.tolist(), wiki.labels.tolist()) == ([0, 2], [1, 3], [0, 2, 1, 1])
    assert shapes.captions == ["a table", "a shelf; tall", "a mug"]
    assert shapes.attributes[1].tolist() == [19, 0, 0, 0]
    np.testing.assert_allclose(np.linalg.norm(shapes.texts, axis=1), 1, rtol=1e-6)
    assert shapes.shapes.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "spoil", "match"),
    [
        ("mnist-t10k", lambda folder: write_mnist(folder, labelled=2), "2 labels.*as many as images, 3"),
        ("orl", lambda folder: write_orl(folder, labelled=3), "3 gnd.*as many as images, 4"),
        ("banking77", lambda folder: write_banking(folder, train=2), "2 rows of train.*texts in train.csv, 3"),
        ("clinc150", lambda folder: write_clinc(folder, {"test": [["a", "b"]]}), "3 rows of test.*1"),
        ("clinc150", lambda folder: write_clinc(folder, {"test": [["a"]]}), "another structure"),
        ("clinc150", lambda folder: write_clinc(folder, [1]), "another structure"),
        ("wikipedia-crossmodal", lambda folder: write_wikipedia(folder, last=4), "row 4 in the split"),
        ("shapes3d-text", lambda folder: write_shapes(folder, lines=1), "3 rows of .*lines of captions.txt, 1"),
        ("wikitext-2", lambda folder: write_wikitext(folder, lines=9), "2100 and 9 lines of test and valid"),
    ],
)
def test_parts_that_do_not_fit_together_are_wrong_content(tmp_path, name, spoil, match):
    spoil(tmp_path)
    with pytest.raises(WrongContent, match=match):
        dataset(name, tmp_path)


def test_text_is_scored_that_is_neither_trained_on_nor_calibrated_with(tmp_path):
    write_wikitext(tmp_path)
    found = dataset("wikitext-2", tmp_path)
    assert found.test == "line 18 .\nline 19 .\n"
    assert found.train.splitlines() == [f" = Title {i} =" for i in range(2100)] + [f"line {i} ." for i in range(18)]
    assert found.train.startswith(found.calibration)
    assert found.calibration.count("\n") == 2000


def test_other_columns_and_other_picture_sizes_are_wrong_content(tmp_path):
    write_banking(tmp_path)
    (tmp_path / "test.csv").write_text("question,intent\nWhen?,age\n")
    with pytest.raises(WrongContent, match="columns text and category"):
        dataset("banking77", tmp_path)
    scipy.io.savemat(tmp_path / "ORL_32x32.mat", {"fea": np.ones((2, 100), np.uint8), "gnd": np.ones((2, 1), np.uint8)})
    with pytest.raises(WrongContent, match=r"fea of shape \(2, 100\)"):
        dataset("orl", tmp_path)


@pytest.mark.parametrize("name", LABELLED)
def test_a_truncated_file_ends_in_a_file_error(tmp_path, name):
    WRITERS[name](tmp_path)
    largest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(FileError, match=largest.name):
        dataset(name, tmp_path)


FACTS = {
    "acm": (3025, 3),
    "citeseer": (3327, 6),
    "mnist-t10k": (10_000, 10),
    "orl": (400, 40),
    "coil20": (1440, 20),
    "yaleb": (2414, 38),
    "banking77": (10_003, 77),
    "clinc150": (4500, 150),
    "wikipedia-crossmodal": (2866, 10),
    "shapes3d-text": (6000, 20),
}


@pytest.mark.parametrize("name", LABELLED)
def test_the_set_itself_has_the_size_and_the_classes_that_are_known(name):
    root = os.environ.get("POLYSPAN_DATA")
    if not root or not (Path(root) / FOLDERS[name]).is_dir():
        pytest.skip(f"POLYSPAN_DATA does not hold {FOLDERS[name]}")
    found = dataset(name)
    labels = found.attributes[:, 0] if isinstance(found, ShapesText) else found.labels
    assert (len(labels), len(np.unique(labels))) == FACTS[name]
    if isinstance(found, Images):
        faces = found.images / found.scale
        # Neighbouring rows of an upright picture differ less than rows of a scrambled one.
        assert np.abs(np.diff(faces, axis=1)).mean() < 0.15


def test_the_text_itself_is_split_at_the_lines_that_are_known():
    root = os.environ.get("POLYSPAN_DATA")
    if not root or not (Path(root) / "wikitext-2").is_dir():
        pytest.skip("POLYSPAN_DATA does not hold wikitext-2")
    found = dataset("wikitext-2")
    whole = len((Path(root) / "wikitext-2" / "test.txt").read_text())
    assert len(found.train) > whole > len(found.calibration) > len(found.test) > 50_000
    assert found.test not in found.train
