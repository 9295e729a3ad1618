"""Well-known public sets, read from a folder that the user has: nothing is fetched."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import scipy.sparse as sp

from polyspan.errors import UnreadableFile, WrongContent
from polyspan.io import read_csv, read_graph, read_idx, read_json, read_mat, read_members, read_text


class AttributedGraph(NamedTuple):
    """Adjacency (n, n) in CSR with its self loops, word counts (n, d) in CSR, classes (n,) int64 from 0."""

    adjacency: sp.csr_array
    attributes: sp.csr_array
    labels: np.ndarray


class Images(NamedTuple):
    """Grey images (n, h, w), upright, in the dtype of the file; labels (n,) int64 from 0; ``scale``: value of white."""

    images: np.ndarray
    labels: np.ndarray
    scale: float


class Intents(NamedTuple):
    """Short texts with their intent, int64 into ``intents``, and their MiniLM embeddings, unit rows (n, 384) float32.

    Where the set has no split, queries and gallery are the same rows: leave a query's own row out.
    """

    texts: list[str]
    labels: np.ndarray
    embeddings: np.ndarray
    query_texts: list[str]
    query_labels: np.ndarray
    query_embeddings: np.ndarray
    intents: list[str]


class CrossModal(NamedTuple):
    """Image features (n, 128) and text features (n, 100) of the same n articles, labels (n,) int64, split by row."""

    image: np.ndarray
    text: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray


class ShapesText(NamedTuple):
    """Shapes embedded by a point network (n, 128), their captions by MiniLM, unit rows (n, 384), and what they show.

    ``attributes`` (n, 4) int64: category 0..19, height 0..2, width 0..2, thickness 0..1.
    """

    shapes: np.ndarray
    texts: np.ndarray
    attributes: np.ndarray
    captions: list[str]


class Texts(NamedTuple):
    """Running text to train on and to score, and ``calibration``, a part of ``train``.

    The training part of WikiText-2 is ten times as large and is not asked for: here ``train`` is its test part and nine
    tenths of its validation part, by lines, and ``test`` the last tenth.
    """

    train: str
    test: str
    calibration: str


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


@overload
def dataset(name: Literal["acm", "citeseer"], path: Path | str | None = None) -> AttributedGraph: ...
@overload
def dataset(name: Literal["mnist-t10k", "orl", "coil20", "yaleb"], path: Path | str | None = None) -> Images: ...
@overload
def dataset(name: Literal["banking77", "clinc150"], path: Path | str | None = None) -> Intents: ...
@overload
def dataset(name: Literal["wikipedia-crossmodal"], path: Path | str | None = None) -> CrossModal: ...
@overload
def dataset(name: Literal["shapes3d-text"], path: Path | str | None = None) -> ShapesText: ...
@overload
def dataset(name: Literal["wikitext-2"], path: Path | str | None = None) -> Texts: ...
@overload
def dataset(name: str, path: Path | str | None = None) -> Any: ...
def dataset(name: str, path: Path | str | None = None) -> Any:
    """Read a public set into a named tuple of arrays.

    Parameters
    ----------
    name : str
        ``acm``, ``citeseer``: :class:`AttributedGraph`. ``mnist-t10k``, ``orl``, ``coil20``, ``yaleb``:
        :class:`Images`. ``banking77``, ``clinc150``: :class:`Intents`. ``wikipedia-crossmodal``:
        :class:`CrossModal`. ``shapes3d-text``: :class:`ShapesText`. ``wikitext-2``: :class:`Texts`.
    path : path-like, optional
        The set's own folder; left out, the folder of :func:`data_folder`.

    Raises
    ------
    ValueError
        The name is not known.
    UnreadableFile
        The folder or one of its files is not there.
    FileError
        Another of its kinds: a file is broken, or holds another thing than this set.
    """
    if name not in _READERS:
        raise ValueError(f"name must be one of {sorted(_READERS)}, got {name!r}")
    folder, read = _READERS[name]
    return read(data_folder(folder, path))


def _graph(file: str) -> Callable[[Path], AttributedGraph]:
    def read(folder: Path) -> AttributedGraph:
        found = read_graph(folder / file)
        if found.attributes is None or found.labels is None:
            raise WrongContent(folder / file, found="no attributes or labels", expected="variables W, fea and gnd")
        return AttributedGraph(found.adjacency, sp.csr_array(found.attributes), _from_zero(found.labels))

    return read


def _mnist(folder: Path) -> Images:
    images = read_idx(folder / "t10k-images-idx3-ubyte.gz", ndim=3)
    file = folder / "t10k-labels-idx1-ubyte.gz"
    labels = read_idx(file, ndim=1)
    _same_length(file, "labels", len(labels), "images", len(images))
    return Images(images, labels.astype(np.int64), 255.0)


def _faces(file: str, *, features: str, labels: str, columns: bool, scale: float) -> Callable[[Path], Images]:
    """Read 32 by 32 images that MATLAB flattened down the columns, one a row or one a column."""

    def read(folder: Path) -> Images:
        found = read_mat(folder / file, [features, labels], dense=True)
        rows = found[features].T if columns else found[features]
        if rows.ndim != 2 or rows.shape[1] != 32 * 32:
            raise WrongContent(
                folder / file, found=f"{features} of shape {found[features].shape}", expected="images of 1,024 pixels"
            )
        classes = found[labels].ravel()
        _same_length(folder / file, labels, len(classes), "images", len(rows))
        upright = np.ascontiguousarray(rows.reshape(-1, 32, 32).transpose(0, 2, 1))
        return Images(upright, _from_zero(classes), scale)

    return read


def _banking(folder: Path) -> Intents:
    texts, categories = [], []
    for part in ("train", "test"):
        table = read_csv(folder / f"{part}.csv")
        if not {"text", "category"} <= table.keys():
            raise WrongContent(
                folder / f"{part}.csv", found=f"columns {list(table)}", expected="columns text and category"
            )
        texts.append(list(table["text"]))
        categories.append(list(table["category"]))
    file = folder / "minilm_l6_384_f16.npz"
    vectors = read_members(file, ["train", "test"])
    for part, rows in zip(("train", "test"), texts, strict=True):
        _same_length(file, f"rows of {part}", len(vectors[part]), f"texts in {part}.csv", len(rows))
    intents, labels = np.unique(categories[0] + categories[1], return_inverse=True)
    gallery, queries = np.split(labels.astype(np.int64), [len(texts[0])])
    names = [str(intent) for intent in intents]
    return Intents(
        texts[0], gallery, _unit(vectors["train"]), texts[1], queries, _unit(vectors["test"]), names
    )  # fmt: skip


def _clinc(folder: Path) -> Intents:
    found = read_json(folder / "test.json")
    pairs = found.get("test") if isinstance(found, dict) else None
    if not (isinstance(pairs, list) and all(isinstance(p, list) and list(map(type, p)) == [str, str] for p in pairs)):
        raise WrongContent(
            folder / "test.json", found="another structure", expected='{"test": [[text, intent], ...]}'
        )  # fmt: skip
    file = folder / "minilm_l6_384_f16.npz"
    vectors = read_members(file, ["test"])["test"]
    _same_length(file, "rows of test", len(vectors), "texts in test.json", len(pairs))
    texts, unit = [text for text, _ in pairs], _unit(vectors)
    intents, labels = np.unique([intent for _, intent in pairs], return_inverse=True)
    labels = labels.astype(np.int64)
    return Intents(texts, labels, unit, texts, labels, unit, [str(intent) for intent in intents])


def _wikipedia(folder: Path) -> CrossModal:
    file = folder / "features.npz"
    found = read_members(file, ["image", "text", "label", "train_index", "test_index"])
    n = len(found["image"])
    for name in ("text", "label"):
        _same_length(file, f"rows of {name}", len(found[name]), "of image", n)
    train, test = (found[name].astype(np.int64) for name in ("train_index", "test_index"))
    rows = np.concatenate([train, test])
    if len(rows) and not (rows.min() >= 0 and rows.max() < n):
        raise WrongContent(file, found=f"a row {rows.max()} in the split", expected=f"rows 0 to {n - 1}")
    return CrossModal(found["image"], found["text"], _from_zero(found["label"].ravel()), train, test)


def _shapes(folder: Path) -> ShapesText:
    file = folder / "features.npz"
    found = read_members(file, ["pointnet128", "minilm384", "attributes"])
    captions = read_text(folder / "captions.txt").splitlines()
    for name, rows in found.items():
        _same_length(file, f"rows of {name}", len(rows), "lines of captions.txt", len(captions))
    return ShapesText(
        found["pointnet128"].astype(np.float32),
        _unit(found["minilm384"]),
        found["attributes"].astype(np.int64),
        captions,
    )


def _wikitext(folder: Path) -> Texts:
    test, valid = (read_text(folder / name).splitlines(keepends=True) for name in ("test.txt", "valid.txt"))
    if len(test) < 10 or len(valid) < 10:
        raise WrongContent(
            folder, found=f"{len(test)} and {len(valid)} lines of test and valid", expected="ten or more of each"
        )
    kept = int(0.9 * len(valid))
    return Texts("".join([*test, *valid[:kept]]), "".join(valid[kept:]), "".join(test[:2000]))


def _same_length(path: Path, what: str, n: int, other: str, expected: int) -> None:
    if n != expected:
        raise WrongContent(path, found=f"{n:,} {what}", expected=f"as many as {other}, {expected:,}")


def _unit(rows: np.ndarray) -> np.ndarray:
    """Make rows that were rounded to float16 unit rows again, in float32; a row of zeros stays."""
    wide = rows.astype(np.float32)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(norms > 0, norms, 1)


def _from_zero(labels: np.ndarray) -> np.ndarray:
    """Number classes from 0 in their own order."""
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
    "wikitext-2": ("wikitext-2", _wikitext),
}
