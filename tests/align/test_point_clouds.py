import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from polyspan.align import (
    PointNetEncoder,
    chamfer_distance,
    normalize_points,
    read_shape,
    sample_points,
    train_point_encoder,
)
from polyspan.errors import CorruptFile, WrongContent
from polyspan.io import write_array

CORNERS = np.array([[0, 0, 0], [2, 0, 0], [2, 2, 0], [0, 2, 0.5]])
TRIANGLES = [[0, 1, 2], [0, 2, 3]]


def ply_header(layout, points, faces):
    lines = [
        "ply", f"format {layout} 1.0", "comment made by hand", f"element vertex {points}", "property float x",
        "property uchar red", "property float y", "property float z", f"element face {faces}",
        "property list uchar int vertex_indices", "end_header\n",
    ]  # fmt: skip
    return "\n".join(lines).encode()


def ply(layout):
    if layout == "ascii":
        rows = "".join(f"{x} 7 {y} {z}\n" for x, y, z in CORNERS)
        return ply_header(layout, 4, 1) + (rows + "4 0 1 2 3\n").encode()
    order = "<" if "little" in layout else ">"
    points = np.zeros(4, dtype=[("x", order + "f4"), ("r", "u1"), ("y", order + "f4"), ("z", order + "f4")])
    points["x"], points["y"], points["z"] = CORNERS.T
    faces = np.array([(3, t) for t in TRIANGLES], dtype=[("n", "u1"), ("i", order + "i4", 3)])
    return ply_header(layout, 4, 2) + points.tobytes() + faces.tobytes()


FILES = {
    "a.off": b"OFF\n# a square\n4 1 0\n0 0 0\n2 0 0\n2 2 0\n0 2 0.5\n4 0 1 2 3\n",
    "b.off": b"OFF 4 2 0\n0 0 0\n2 0 0\n2 2 0\n0 2 .5\n3 0 1 2\n3 0 2 3\n",
    "a.obj": b"o square\nv 0 0 0\nv 2 0 0\nv 2 2 0\nv 0 2 0.5\nvn 0 0 1\nf 1//1 2//1 3//1 4//1\n",
    "b.obj": b"v 0 0 0\nv 2 0 0\nv 2 2 0\nv 0 2 0.5\nf -4 -3 -2 -1\n",
    "a.ply": ply("ascii"),
    "b.ply": ply("binary_little_endian"),
    "c.ply": ply("binary_big_endian"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_mesh(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    vertices, triangles = read_shape(tmp_path / name)
    np.testing.assert_array_equal(vertices, CORNERS)
    np.testing.assert_array_equal(triangles, TRIANGLES)


def test_clouds_have_no_triangles(tmp_path):
    (tmp_path / "a.xyz").write_text("0 0 0 255\n2 0 0 255\n2 2 0 255\n0 2 0.5 255\n")
    write_array(tmp_path / "a.npy", CORNERS)
    for name in ("a.xyz", "a.npy"):
        found = read_shape(tmp_path / name)
        np.testing.assert_array_equal(found.vertices, CORNERS)
        assert found.triangles.shape == (0, 3)


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("a.stl", b"solid", WrongContent, "suffix '.stl'"),
        ("a.xyz", b"", WrongContent, "at least one point"),
        ("a.xyz", b"1 2\n", WrongContent, r"shape \(1, 2\)"),
        ("a.xyz", b"1 2 three\n", CorruptFile, "three"),
        ("a.xyz", b"0 0 0\n1 nan 3\n", WrongContent, "point 1"),
        ("a.off", b"4 1 0\n", CorruptFile, "no OFF"),
        ("a.off", b"OFF\n4 1 0\n0 0 0\n", CorruptFile, "1 lines for 4 points and 1 faces"),
        ("a.off", b"OFF\n-4 1 0\n0 0 0\n", CorruptFile, "for -4 points"),
        ("a.off", b"OFF\n1 1 0\n0 0 0\n3 0 1 2\n", CorruptFile, "points 0 to 0"),
        ("a.ply", b"not a ply", CorruptFile, "no header"),
        ("a.ply", ply("ascii")[:-30], CorruptFile, "of face|of vertex|index"),
        ("a.ply", ply("binary_little_endian")[:-3], CorruptFile, "bytes for 2 of face"),
        ("a.ply", ply_header("ascii", -3, 0), CorruptFile, "negative count"),
        ("a.ply", ply("ascii").replace(b"float z", b"float w"), CorruptFile, "'z'"),
        ("a.ply", ply_header("binary_middle_endian", 4, 0), CorruptFile, "binary_middle_endian"),
    ],
)
def test_a_broken_shape_is_one_of_the_five_errors(name, data, error, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message):
        read_shape(tmp_path / name)


def test_points_of_a_mesh_are_even_by_area_and_lie_on_it(tmp_path):
    (tmp_path / "a.off").write_bytes(FILES["a.off"].replace(b"0.5", b"0"))
    points = sample_points(read_shape(tmp_path / "a.off"), 4000, np.random.default_rng(0))
    np.testing.assert_array_equal(points[:, 2], 0.0)
    counts = np.histogram2d(points[:, 0], points[:, 1], bins=4, range=[[0, 2], [0, 2]])[0]
    assert np.sum((counts - 250) ** 2 / 250) < 37  # chi square, 15 degrees of freedom, p = 0.001
    cloud = read_shape(tmp_path / "a.off")._replace(triangles=np.zeros((0, 3), dtype=int))
    few = sample_points(cloud, 4, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(few, axis=0), np.sort(cloud.vertices, axis=0))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        sample_points(cloud, 0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="triangles of some area"):
        sample_points(read_shape(tmp_path / "a.off")._replace(vertices=np.ones((4, 3))), 4, np.random.default_rng(0))


def test_normalised_points_know_neither_unit_nor_place():
    points = np.random.default_rng(0).normal(size=(50, 3))
    found = normalize_points(points)
    np.testing.assert_allclose(normalize_points(25.4 * points + 7), found, atol=1e-12)
    assert np.linalg.norm(found, axis=1).max() == pytest.approx(1.0)
    np.testing.assert_allclose(found.mean(axis=0), 0.0, atol=1e-12)
    assert normalize_points(points.astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((0, 3)), r"n at least 2, got \(0, 3\)"),
        (np.zeros((1, 3)), r"n at least 2, got \(1, 3\)"),
        (np.zeros((5, 2)), r"got \(5, 2\)"),
        (np.ones((5, 3)), "must not all be equal"),
        (np.full((5, 3), np.inf), "must be finite"),
    ],
)
def test_points_that_cannot_be_normalised_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        normalize_points(points)


def test_the_chamfer_distance_equals_the_full_table():
    A, B = np.random.default_rng(0).normal(size=(2, 40, 3))
    D = cdist(A, B[:30])
    assert chamfer_distance(A, B[:30]) == pytest.approx((D.min(axis=1).mean() + D.min(axis=0).mean()) / 2)
    assert chamfer_distance(A, A[::-1]) == 0.0
    with pytest.raises(ValueError, match="clouds of one width"):
        chamfer_distance(A, B[:0])
    with pytest.raises(ValueError, match="must be finite"):
        chamfer_distance(A, B * np.nan)


def test_order_does_not_matter_to_the_encoder_and_it_learns_shapes_without_labels():
    rng = np.random.default_rng(0)
    kinds = rng.integers(3, size=90)
    scales = np.array([[1, 1, 1], [1, 1, 0.05], [0.1, 0.1, 1]])
    clouds = np.stack([normalize_points(rng.normal(size=(64, 3)) * scales[kind]) for kind in kinds])
    state = torch.get_rng_state()
    encoder, same = (train_point_encoder(clouds, epochs=3, batch_size=32) for _ in range(2))
    for one, other in zip(encoder.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        found = encoder(torch.as_tensor(clouds, dtype=torch.float32))
        shuffled = encoder(torch.as_tensor(clouds[:, ::-1].copy(), dtype=torch.float32))
    torch.testing.assert_close(found, shuffled, atol=1e-5, rtol=1e-4)
    near = torch.cdist(found, found).fill_diagonal_(torch.inf).argmin(dim=1).numpy()
    assert np.mean(kinds[near] == kinds) > 0.9
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match=r"clouds must have shape \(m, n, 3\)"):
        train_point_encoder(clouds[:, :2])
    with pytest.raises(ValueError, match="clouds must be finite"):
        train_point_encoder(clouds * np.nan)
    with pytest.raises(ValueError, match="temperature and learning_rate must be positive"):
        train_point_encoder(clouds, temperature=0.0)
    with pytest.raises(ValueError, match="embedding_dim and widths must be at least 1"):
        PointNetEncoder(0)
