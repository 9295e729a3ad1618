"""Point clouds for a shape encoder: read, sample, bring to one size, and compare."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyspan.errors import CorruptFile, WrongContent
from polyspan.io import read_array, read_bytes, read_text

SUFFIXES = (".ply", ".off", ".obj", ".xyz", ".npy", ".npz")
PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip
PLY_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">"}


class Mesh(NamedTuple):
    """Vertices (n, 3) float64 and triangles (m, 3) int64 into them; a cloud has none."""

    vertices: np.ndarray
    triangles: np.ndarray


def read_shape(path: Path | str) -> Mesh:
    """Read a cloud or a mesh; polygons become fans of triangles.

    Parameters
    ----------
    path : path
        .ply (ASCII or binary; triangles where it is binary), .off, .obj, .xyz (three numbers a line, more are
        ignored), .npy or .npz with one array (n, 3).

    Raises
    ------
    FileError
        One of its kinds: the file is broken, or holds no finite points in three dimensions.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise WrongContent(path, found=f"suffix {suffix!r}", expected=f"one of {', '.join(SUFFIXES)}")
    if suffix in (".npy", ".npz"):
        vertices, polygons = np.asarray(read_array(path), dtype=np.float64), []
    elif suffix == ".ply":
        vertices, polygons = _ply(path, read_bytes(path))
    else:
        lines = [line.split("#")[0].split() for line in read_text(path).splitlines()]
        try:
            vertices, polygons = {".off": _off, ".obj": _obj, ".xyz": _xyz}[suffix]([line for line in lines if line])
        except (ValueError, IndexError) as error:
            raise CorruptFile(path, found=str(error), expected=f"a whole {suffix} file") from None
    if vertices.ndim != 2 or vertices.shape[1] != 3 or not len(vertices):
        raise WrongContent(path, found=f"points of shape {vertices.shape}", expected="at least one point of 3 numbers")
    if not np.isfinite(vertices).all():
        row = int(np.argmin(np.isfinite(vertices).all(axis=1)))
        raise WrongContent(path, found="NaN or infinity", expected="finite points", where=f"point {row}")
    triangles = np.array(
        [(p[0], p[i], p[i + 1]) for p in polygons for i in range(1, len(p) - 1)], dtype=np.int64
    ).reshape(-1, 3)
    if triangles.size and not (triangles.min() >= 0 and triangles.max() < len(vertices)):
        wrong = triangles.min() if triangles.min() < 0 else triangles.max()
        raise CorruptFile(path, found=f"a face with point {wrong}", expected=f"points 0 to {len(vertices) - 1}")
    return Mesh(vertices, triangles)


def _table(rows: list[list[float]]) -> np.ndarray:
    """Return rows of one length as an array, of no rows as (0, 3)."""
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(f"lines of {lengths[0]} and of {lengths[-1]} numbers")
    return np.array(rows, dtype=np.float64) if rows else np.zeros((0, 3))


def _xyz(lines: list[list[str]]) -> tuple[np.ndarray, list]:
    return _table([[float(cell) for cell in line[:3]] for line in lines]), []


def _off(lines: list[list[str]]) -> tuple[np.ndarray, list]:
    if not lines or not lines[0][0].upper().startswith("OFF"):
        raise ValueError("no OFF in the first line")
    head = [lines[0][0][3:], *lines[0][1:]] if len(lines[0][0]) > 3 else lines[0][1:]
    rest = lines[1:]
    if not head:
        head, rest = rest[0], rest[1:]
    n, m = int(head[0]), int(head[1])
    if not 0 <= n + m <= len(rest) or min(n, m) < 0:
        raise ValueError(f"{len(rest)} lines for {n} points and {m} faces")
    faces = [[int(cell) for cell in line[1 : 1 + int(line[0])]] for line in rest[n : n + m]]
    return _xyz(rest[:n])[0], faces


def _obj(lines: list[list[str]]) -> tuple[np.ndarray, list]:
    vertices, faces = [], []
    for line in lines:
        if line[0] == "v":
            vertices.append([float(cell) for cell in line[1:4]])
        elif line[0] == "f":
            # Indices count from 1; below 0 they count back from the last point so far.
            found = [int(cell.split("/")[0]) for cell in line[1:]]
            if 0 in found:
                raise ValueError("a face with point 0, where points count from 1")
            faces.append([i - 1 if i > 0 else len(vertices) + i for i in found])
    return _table(vertices), faces


def _ply(path: Path, data: bytes) -> tuple[np.ndarray, list]:
    end = data.find(b"end_header")
    if not data.startswith(b"ply") or end < 0:
        raise CorruptFile(path, found="no header", expected="ply ... end_header")
    try:
        head = [line.split() for line in data[:end].decode("ascii").splitlines() if line.strip()]
        body = data[data.index(b"\n", end) + 1 :]
        layout = next(line[1] for line in head if line[0] == "format")
        elements: list[tuple[str, int, list[list[str]]]] = []
        for line in head:
            if line[0] == "element":
                elements.append((line[1], int(line[2]), []))
            elif line[0] == "property":
                elements[-1][2].append(line[1:])
        if min((count for _, count, _ in elements), default=-1) < 0:
            raise ValueError("an element with a negative count, or none")
        if layout == "ascii":
            return _ply_ascii(elements, [line.split() for line in body.decode("ascii").splitlines() if line.strip()])
        return _ply_binary(elements, body, PLY_ORDERS[layout])
    except (ValueError, IndexError, KeyError, StopIteration, UnicodeDecodeError) as error:
        raise CorruptFile(path, found=f"{type(error).__name__}: {error}", expected="a whole .ply file") from None


def _ply_ascii(elements, lines: list[list[str]]) -> tuple[np.ndarray, list]:
    vertices, faces, at = np.zeros((0, 3)), [], 0
    for name, count, properties in elements:
        part, at = lines[at : at + count], at + count
        if len(part) < count:
            raise ValueError(f"{len(part)} of {count} lines of {name}")
        if name == "vertex":
            columns = [[p[-1] for p in properties].index(axis) for axis in "xyz"]
            vertices = _table([[float(line[c]) for c in columns] for line in part])
        elif name == "face" and properties and properties[0][0] == "list":
            faces = [[int(cell) for cell in line[1 : 1 + int(line[0])]] for line in part]
    return vertices, faces


def _ply_binary(elements, body: bytes, order: str) -> tuple[np.ndarray, list]:
    vertices, faces, at = np.zeros((0, 3)), [], 0
    for name, count, properties in elements:
        fields: list[Any] = []
        for p in properties:
            if p[0] != "list":
                fields.append((p[-1], order + PLY_TYPES[p[0]]))
            elif name == "face" and len(properties) == 1:
                fields += [("n", order + PLY_TYPES[p[1]]), ("i", order + PLY_TYPES[p[2]], 3)]
            else:
                raise ValueError(f"a list among the properties of {name}")
        kind = np.dtype(fields)
        if len(body) - at < count * kind.itemsize:
            raise ValueError(f"{len(body) - at} bytes for {count} of {name}")
        rows: Any = np.frombuffer(body, kind, count, at)
        at += count * kind.itemsize
        if name == "vertex":
            vertices = np.stack([rows[axis].astype(np.float64) for axis in "xyz"], axis=1)
        elif name == "face" and count:
            if (rows["n"] != 3).any():
                raise ValueError("a binary face that is no triangle")
            faces = rows["i"].astype(np.int64).tolist()
    return vertices, faces


def sample_points(shape: Mesh, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n points (n, 3): evenly by area from the triangles of a mesh, from the points themselves of a cloud.

    A cloud of fewer than n points repeats some.

    Raises
    ------
    ValueError
        ``n`` is below 1, or all triangles have no area.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    vertices, triangles = shape
    if not len(triangles):
        return vertices[rng.choice(len(vertices), size=n, replace=n > len(vertices))]
    a, b, c = (vertices[triangles[:, i]] for i in range(3))
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not areas.sum() > 0:
        raise ValueError("shape must have triangles of some area, got none")
    chosen = rng.choice(len(triangles), size=n, p=areas / areas.sum())
    # The square root makes points even over a triangle.
    u, v = np.sqrt(rng.random((n, 1))), rng.random((n, 1))
    return (1 - u) * a[chosen] + u * (1 - v) * b[chosen] + u * v * c[chosen]


def normalize_points(points: Any) -> np.ndarray:
    """Move points (n, 3) to their mean and scale the farthest to distance 1, whatever unit they came in.

    Raises
    ------
    ValueError
        Fewer than two points, points that are all equal, not finite, or not in three dimensions.
    """
    points = np.asarray(points)
    if points.dtype.kind not in "fiub":
        raise ValueError(f"points must hold real numbers, got {points.dtype}")
    if points.ndim != 2 or points.shape[1] != 3 or len(points) < 2:
        raise ValueError(f"points must have shape (n, 3) with n at least 2, got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("points must be finite, got NaN or infinity")
    points = points.astype(points.dtype if points.dtype in (np.float32, np.float64) else np.float64)
    size = np.abs(points).max()
    if size > 0 and not 1e-15 < size < 1e15:  # squares would leave the range of float32
        points = points / size
    centred = points - points.mean(axis=0)
    radius = np.linalg.norm(centred, axis=1).max()
    if not radius > 0:
        raise ValueError("points must not all be equal")
    return centred / radius


def chamfer_distance(A: Any, B: Any) -> float:
    """Mean distance from a point to the nearest one of the other cloud, averaged over both clouds; 0 for equal sets.

    Parameters
    ----------
    A, B : arrays of shape (n, 3) and (m, 3)
        In one unit: see :func:`normalize_points`.

    Raises
    ------
    ValueError
        A cloud is empty, not finite, or of another width.
    """
    from scipy.spatial import KDTree

    A, B = (np.asarray(points, dtype=np.float64) for points in (A, B))
    if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[1] or 0 in (*A.shape, *B.shape):
        raise ValueError(f"A and B must be clouds of one width, got shapes {A.shape} and {B.shape}")
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        raise ValueError("A and B must be finite, got NaN or infinity")
    there, back = (np.asarray(KDTree(one).query(other)[0]) for one, other in ((B, A), (A, B)))
    return float(there.mean() + back.mean()) / 2
