"""Well-known public sets, read from a folder that the user has: nothing is fetched."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from polyspan.errors import UnreadableFile, WrongContent
from polyspan.io import read_csv, read_graph, read_idx, read_json, read_mat, read_members, read_text


class AttributedGraph(NamedTuple):
    """Adjacency (n, n) CSR, word counts (n, d) CSR, classes (n,) from 0."""

    adjacency: sp.csr_array
    attributes: sp.csr_array
    labels: np.ndarray


class Images(NamedTuple):
    """Images (n, h, w), upright, and labels (n,) from 0; ``scale`` is the value of white."""

    images: np.ndarray
    labels: np.ndarray
    scale: float


class Intents(NamedTuple):
    """Texts with their intent, for a gallery and for queries, and MiniLM embeddings (n, 384) float32 unit rows."""

    texts: list[str]
    labels: np.ndarray
    embeddings: np.ndarray
    query_texts: list[str]
    query_labels: np.ndarray
    query_embeddings: np.ndarray
    intents: list[str]


class CrossModal(NamedTuple):
    """Image features (n, 128), text features (n, 100), labels (n,), and the rows for training and test."""

    image: np.ndarray
    text: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray


class ShapesText(NamedTuple):
    """Shape embeddings (n, 128), caption embeddings (n, 384), attributes (n, 4), captions."""

    shapes: np.ndarray
    texts: np.ndarray
    attributes: np.ndarray
    captions: list[str]


def data_folder(name: str, path: Path | str | None = None) -> Path:
    """Return the folder of a public set: ``path`` itself, or ``$POLYSPAN_DATA/<name>``.

    Raises
    ------
    UnreadableFile
        Neither is there; the message names both ways.
    """
    root = os.environ.get("POLYSPAN_DATA")
    folder = Path(path) if path is not None else Path(root) / name if root else None
    if folder is None or not folder.is_dir():
        raise UnreadableFile(
            folder or name,
            found="no folder" if folder else "no folder given",
            expected=f"the files of {name}: pass path=, or set POLYSPAN_DATA to the folder that holds {name}/",
        )
    return folder


def dataset(name: str, path: Path | str | None = None) -> Any:
    """Read a public set into a named tuple of arrays.

    Parameters
    ----------
    name : str
        ``acm``, ``citeseer``: :class:`AttributedGraph`. ``mnist-t10k``, ``orl``, ``coil20``, ``yaleb``:
        :class:`Images`. ``banking77``, ``clinc150``: :class:`Intents`. ``wikipedia-crossmodal``:
        :class:`CrossModal`. ``shapes3d-text``: :class:`ShapesText`.
    path : path, optional
        The set's own folder; see :func:`data_folder`.

    Raises
    ------
    ValueError
        The name is not known.
    FileError
        One of its five kinds.
    """
    if name not in _READERS:
        raise ValueError(f"name must be one of {sorted(_READERS)}, got {name!r}")
    folder, read = _READERS[name]
    return read(data_folder(folder, path))


def _graph(file: str) -> Callable[[Path], AttributedGraph]:
    def read(folder: Path) -> AttributedGraph:
        found = read_graph(folder / file)
        if found.attributes is None or found.labels is None:
            raise WrongContent(folder / file, found="no attributes or labels", expected="members W, fea and gnd")
        return AttributedGraph(found.adjacency, sp.csr_array(found.attributes), _from_zero(found.labels))

    return read


def _mnist(folder: Path) -> Images:
    images = read_idx(folder / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz")
    return Images(images, labels.astype(np.int64), 255.0)


def _faces(file: str, *, features: str, labels: str, columns: bool, scale: float) -> Callable[[Path], Images]:
    """Read 32 by 32 images that MATLAB flattened down the columns, one a row or one a column."""

    def read(folder: Path) -> Images:
        found = read_mat(folder / file, [features, labels])
        rows = found[features].T if columns else found[features]
        return Images(rows.reshape(-1, 32, 32).transpose(0, 2, 1).copy(), _from_zero(found[labels].ravel()), scale)

    return read


def _banking(folder: Path) -> Intents:
    train, test = (read_csv(folder / f"{part}.csv") for part in ("train", "test"))
    intents, labels = np.unique([*train["category"], *test["category"]], return_inverse=True)
    vectors = read_members(folder / "minilm_l6_384_f16.npz", ["train", "test"])
    split = len(train["text"])
    return Intents(
        train["text"],
        labels[:split],
        _unit(vectors["train"]),
        test["text"],
        labels[split:],
        _unit(vectors["test"]),
        [str(intent) for intent in intents],
    )


def _clinc(folder: Path) -> Intents:
    pairs = read_json(folder / "test.json")["test"]
    texts = [text for text, _ in pairs]
    intents, labels = np.unique([intent for _, intent in pairs], return_inverse=True)
    vectors = _unit(read_members(folder / "minilm_l6_384_f16.npz", ["test"])["test"])
    return Intents(texts, labels, vectors, texts, labels, vectors, [str(intent) for intent in intents])


def _wikipedia(folder: Path) -> CrossModal:
    found = read_members(folder / "features.npz")
    return CrossModal(
        found["image"], found["text"], found["label"].astype(np.int64), found["train_index"], found["test_index"]
    )


def _shapes(folder: Path) -> ShapesText:
    found = read_members(folder / "features.npz")
    captions = read_text(folder / "captions.txt").splitlines()
    shapes, texts = (found[name].astype(np.float32) for name in ("pointnet128", "minilm384"))
    return ShapesText(shapes, texts, found["attributes"].astype(np.int64), captions)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Undo the rounding to float16: unit rows in float32."""
    wide = rows.astype(np.float32)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def _from_zero(labels: np.ndarray) -> np.ndarray:
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


_READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "acm": ("acm-attributed-graph", _graph("acm.mat")),
    "citeseer": ("citeseer-attributed-graph", _graph("citeseer.mat")),
    "mnist-t10k": ("mnist-t10k", _mnist),
    "orl": ("orl-faces-32", _faces("ORL_32x32.mat", features="fea", labels="gnd", columns=False, scale=255.0)),
    "coil20": ("coil20-32", _faces("COIL20.mat", features="fea", labels="gnd", columns=False, scale=1.0)),
    "yaleb": (
        "extended-yaleb-32",
        _faces("YaleB_32x32.mat", features="features", labels="Label", columns=True, scale=255.0),
    ),
    "banking77": ("banking77", _banking),
    "clinc150": ("clinc150", _clinc),
    "wikipedia-crossmodal": ("wikipedia-crossmodal", _wikipedia),
    "shapes3d-text": ("shapes3d-text", _shapes),
}
