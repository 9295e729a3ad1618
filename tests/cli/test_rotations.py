import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cyclopts import App, CycloptsError
from scipy.spatial.transform import Rotation

from polyspan import nn
from polyspan.cli.rotations import WIDTHS, breaks, convert
from polyspan.errors import UnreadableFile, WrongContent

KINDS = tuple(WIDTHS)
CONVENTIONS = {"order": "wxyz", "sequence": "XYZ"}
OWN = {"quaternion": ("order",), "euler": ("sequence",)}


def options(*kinds):
    return {name: CONVENTIONS[name] for kind in kinds for name in OWN.get(kind, ())}


@pytest.fixture
def rotations():
    return nn.random_rotation(rng=np.random.default_rng(0), batch=(30,))


def numbers(R, kind):
    if kind == "matrix":
        return R.reshape(-1, 9)
    return getattr(nn, f"matrix_to_{kind.replace('-', '_')}")(R, **options(kind))


@pytest.mark.parametrize(("kind", "to"), list(itertools.permutations(KINDS, 2)))
def test_every_pair_gives_what_the_library_gives_and_goes_back(tmp_path, rotations, kind, to):
    np.save(tmp_path / "a.npy", numbers(rotations, kind))
    how = options(kind, to)
    convert(tmp_path / "a.npy", from_=kind, to=to, out=tmp_path / "b.npy", batch_rows=7, **how)
    made = np.load(tmp_path / "b.npy")
    np.testing.assert_allclose(made, numbers(rotations, to), atol=1e-12)
    if "matrix" not in (kind, to):
        grid = getattr(nn, f"{kind}_to_{to}".replace("-", "_"))
        np.testing.assert_allclose(made, grid(np.load(tmp_path / "a.npy"), **how), atol=1e-12)
    convert(tmp_path / "b.npy", from_=to, to=kind, out=tmp_path / "c.npy", **how)
    np.testing.assert_allclose(np.load(tmp_path / "c.npy"), np.load(tmp_path / "a.npy"), atol=1e-10)


def test_conventions_are_those_of_scipy(tmp_path, rotations):
    theirs = Rotation.from_matrix(rotations)
    np.save(tmp_path / "q.npy", theirs.as_quat(scalar_first=False))
    convert(
        tmp_path / "q.npy", from_="quaternion", to="euler", out=tmp_path / "e.npy", order="xyzw", sequence="zyx",
        degrees=True,
    )  # fmt: skip
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), theirs.as_euler("zyx", degrees=True), atol=1e-9)
    how = {"from_": "euler", "to": "euler", "sequence": "zyx", "degrees": True}
    convert(tmp_path / "e.npy", out=tmp_path / "f.npy", to_sequence="XYZ", to_degrees=False, **how)
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), theirs.as_euler("XYZ"), atol=1e-11)
    convert(tmp_path / "e.npy", out=tmp_path / "g.npy", to_sequence="XYZ", **how)
    np.testing.assert_allclose(np.load(tmp_path / "g.npy"), theirs.as_euler("XYZ", degrees=True), atol=1e-9)
    convert(
        tmp_path / "q.npy", from_="quaternion", to="quaternion", out=tmp_path / "w.npy", order="xyzw", to_order="wxyz"
    )
    expected = theirs.as_quat(scalar_first=True, canonical=True)
    np.testing.assert_allclose(np.load(tmp_path / "w.npy"), expected, atol=1e-12)
    np.save(tmp_path / "six.npy", rotations[:, :2].reshape(-1, 6))
    convert(
        tmp_path / "six.npy", from_="rotation6d", to="rotation6d", out=tmp_path / "c.npy", convention="rows",
        to_convention="columns",
    )  # fmt: skip
    np.testing.assert_allclose(
        np.load(tmp_path / "c.npy"), rotations[:, :, :2].swapaxes(1, 2).reshape(-1, 6), atol=1e-12
    )


def test_ids_of_a_table_and_the_width_of_floats_are_kept(tmp_path, rotations, capsys):
    q = numbers(rotations, "quaternion").astype(np.float32)
    ids = [f"frame {i}" for i in range(len(q))]
    table = pa.table({"id": ids, "pose": pa.FixedSizeListArray.from_arrays(q.ravel(), 4)})
    pq.write_table(table, tmp_path / "a.parquet")
    how = {"from_": "quaternion", "to": "rotation6d", "order": "wxyz", "batch_rows": 7, "json": True}
    convert(tmp_path / "a.parquet", out=tmp_path / "b.parquet", **how)
    said = json.loads(capsys.readouterr().out)
    assert (said["rows"], said["from"], said["to"], said["warnings"]) == (30, "quaternion", "rotation6d", [])
    found = pq.read_table(tmp_path / "b.parquet")
    assert found.column("id").to_pylist() == ids
    made = np.array(found.column("pose").to_pylist())
    np.testing.assert_array_equal(made, nn.quaternion_to_rotation6d(q, order="wxyz").astype(np.float64))
    assert found.schema.field("pose").type.value_type == pa.float32()


def test_text_tables_come_in_and_go_out(tmp_path, rotations, capsys):
    q = numbers(rotations, "quaternion")
    text = "w,x,y,z\n" + "".join(",".join(map(repr, row)) + "\n" for row in q.tolist())
    (tmp_path / "a.csv").write_text(text)
    convert(tmp_path / "a.csv", from_="quaternion", to="matrix", order="wxyz", out=tmp_path / "b.csv")
    assert capsys.readouterr().out.splitlines() == [
        f"out\t{tmp_path / 'b.csv'}",
        "rows\t30",
        "from\tquaternion",
        "to\tmatrix",
    ]
    lines = (tmp_path / "b.csv").read_text().splitlines()
    made = np.array([[float(cell) for cell in line.split(",")] for line in lines])
    np.testing.assert_allclose(made, rotations.reshape(-1, 9), atol=1e-12)
    convert(tmp_path / "b.csv", from_="matrix", to="quaternion", order="wxyz", out=tmp_path / "c.npz")
    np.testing.assert_allclose(np.load(tmp_path / "c.npz")["vector"], q, atol=1e-12)


def test_rows_that_are_wrong_are_named_as_in_the_file_and_nothing_is_written(tmp_path, rotations):
    def refused(array, message, kind=ValueError, **how):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(kind, match=message):
            convert(tmp_path / "a.npy", out=tmp_path / "b.npy", batch_rows=8, **how)
        assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]

    q = numbers(rotations, "quaternion")
    how = {"from_": "quaternion", "to": "rotation6d", "order": "wxyz"}
    zero, unknown = q.copy(), q.copy()
    zero[[21, 23]], unknown[17, 2] = 0, np.nan
    refused(zero, r"a\.npy must hold rows that determine a rotation, got a quaternion of length 0 at row 21", **how)
    refused(unknown, "row 17", WrongContent, **how)
    refused(rotations.reshape(-1, 9), r"--from quaternion is for rows of 4 numbers, got 9 in .*a\.npy", **how)
    refused(rotations, r"shape \(30, 3, 3\)", WrongContent, from_="matrix", to="rotation6d")
    mirrored = rotations.copy()
    mirrored[19] *= -1
    refused(
        mirrored.reshape(-1, 9),
        r"a\.npy must hold rotations for --from matrix, got another matrix at row 19; --from rotation9d takes the near",
        from_="matrix", to="rotation6d",
    )  # fmt: skip
    six = numbers(rotations, "rotation6d")
    six[11, 3:] = 2 * six[11, :3]
    refused(six, "two parallel vectors, or a zero one at row 11", from_="rotation6d", to="axis-angle")


def test_rows_that_determine_no_rotation_are_completed_where_asked(tmp_path, rotations, capsys):
    q = numbers(rotations, "quaternion")
    q[[21, 23]] = 0
    np.save(tmp_path / "a.npy", q)
    how = {"from_": "quaternion", "to": "rotation6d", "order": "wxyz", "batch_rows": 8}
    convert(tmp_path / "a.npy", out=tmp_path / "b.npy", complete=True, **how)
    assert "2 quaternions have length 0 and became the identity, the first at row 21" in capsys.readouterr().err
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy")[[21, 23]], [[1, 0, 0, 0, 1, 0]] * 2)


def test_what_makes_one_doubt_is_counted_over_batches(tmp_path, capsys):
    angles = np.zeros((20, 3))
    angles[[9, 18], 0], angles[19, 1] = 20, np.pi / 2
    np.save(tmp_path / "a.npy", angles)
    how = {"from_": "euler", "sequence": "XYZ", "batch_rows": 8, "json": True}
    convert(tmp_path / "a.npy", to="euler", to_sequence="XYX", out=tmp_path / "b.npy", **how)
    assert json.loads(capsys.readouterr().out)["warnings"] == [
        "19 rotations are in gimbal lock; their third angle is set to 0, the first at row 0",
        "2 triples hold an angle above 4 pi, the first at row 9; radians are expected, or --degrees",
    ]
    convert(tmp_path / "a.npy", to="rotation6d", out=tmp_path / "b.npy", degrees=True, **how)
    assert json.loads(capsys.readouterr().out)["warnings"] == []


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"to": "rotation6d"}, "--order must be given for quaternion: wxyz or xyzw"),
        ({"to": "euler", "order": "wxyz"}, "--sequence must be given for euler: such as XYZ"),
        ({"to": "euler", "order": "wxyz", "sequence": "XXY"}, "--sequence must be three of the letters .* got 'XXY'"),
        (
            {"to": "rotation5d", "order": "wxyz", "degrees": True},
            "--degrees is for euler, got it",
        ),
        ({"to": "euler", "order": "wxyz", "convention": "rows", "sequence": "xyz"}, "--convention is for rotation6d"),
        ({"to": "rotation6d", "order": "wxyz", "to_order": "xyzw"}, "--to-order is for quaternion on both sides"),
        ({"to": "quaternion", "order": "wxyz"}, "--to must be another form than --from, or another convention"),
        ({"to": "quaternion", "order": "wxyz", "to_order": "wxyz"}, "--to must be another form than --from"),
        ({"to": "rotation6d", "order": "wxyz", "to_sequence": "XYZ"}, "--to-sequence is for euler on both sides"),
        ({"to": "rotation6d", "order": "wxyz", "batch_rows": 0}, "--batch-rows must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, rotations, how, message):
    np.save(tmp_path / "a.npy", numbers(rotations, "quaternion"))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.npy", from_="quaternion", out=tmp_path / "b.npy", **how)
    assert not (tmp_path / "b.npy").exists()


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("rotation6d", {"to_convention": "columns"}),
        ("euler", {"sequence": "XYZ", "to_degrees": False}),
        ("euler", {"sequence": "XYZ", "to_sequence": "XYZ", "to_degrees": False}),
    ],
)
def test_a_convention_that_is_the_one_left_out_is_no_other(tmp_path, rotations, kind, how):
    np.save(tmp_path / "a.npy", numbers(rotations, kind))
    with pytest.raises(
        ValueError, match=f"--to must be another form .*, or another convention of it, got {kind} twice"
    ):
        convert(tmp_path / "a.npy", from_=kind, to=kind, out=tmp_path / "b.npy", **how)
    assert not (tmp_path / "b.npy").exists()


def test_places_that_do_not_fit_are_named_before_any_work(tmp_path, rotations):
    source, how = tmp_path / "a.npy", {"from_": "quaternion", "to": "rotation6d", "order": "wxyz"}
    with pytest.raises(UnreadableFile, match=r"missing\.npy"):
        convert(tmp_path / "missing.npy", out=tmp_path / "b.npy", **how)
    np.save(source, numbers(rotations, "quaternion"))
    before = source.read_bytes()
    with pytest.raises(ValueError, match="--out must be another file than a file that is read"):
        convert(source, out=source, **how)
    with pytest.raises(ValueError, match=r"--out must end in \.npy or .*, got 'b\.txt'"):
        convert(source, out=tmp_path / "b.txt", **how)
    with pytest.raises(ValueError, match="--out must be a file in a folder that is there"):
        convert(source, out=tmp_path / "none" / "b.npy", **how)
    with pytest.raises(ValueError, match="--id-column is for tables and not for text"):
        convert(source, out=tmp_path / "b.csv", id_column="id", **how)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    assert source.read_bytes() == before


@pytest.fixture
def turn():
    """A slow full turn and a little more about a slanted axis: 0 to 400 degrees in steps of one."""
    axis = np.array([0.36, 0.48, 0.8])
    return nn.axis_angle_to_matrix(np.deg2rad(np.arange(401.0))[:, None] * axis)


def test_breaks_are_those_of_the_library_and_the_rotation_turns_evenly(tmp_path, turn, capsys):
    np.save(tmp_path / "a.npy", numbers(turn, "rotation6d"))
    breaks(tmp_path / "a.npy", from_="rotation6d", sequence="XYZ", json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == 401
    assert said["largest step, degrees"] == pytest.approx(1)
    for kind, steps in said["breaks"].items():
        assert steps == nn.continuity_breaks(turn, kind.replace("-", "_"), **options(kind))
    assert set(said["breaks"]) == set(KINDS) - {"matrix"}
    assert said["breaks"]["quaternion"] in ([179], [180])
    assert len(said["breaks"]["euler"]) > 0
    assert said["breaks"]["rotation6d"] == said["breaks"]["rotation9d"] == []
    breaks(tmp_path / "a.npy", from_="rotation6d", to=["quaternion"], factor=1e4, json=True)
    assert json.loads(capsys.readouterr().out)["breaks"] == {"quaternion": []}


@pytest.mark.parametrize("kind", KINDS)
def test_breaks_do_not_depend_on_how_the_path_is_stored(tmp_path, turn, capsys, kind):
    np.save(tmp_path / "a.npy", numbers(turn[:360], kind))
    breaks(tmp_path / "a.npy", from_=kind, to=["axis-angle", "rotation5d"], json=True, **options(kind))
    found = json.loads(capsys.readouterr().out)["breaks"]
    assert set(found) == {"axis-angle", "rotation5d"}
    assert found["rotation5d"] == []
    assert found["axis-angle"] in ([179], [180])


def test_a_picture_shows_the_breaks_and_a_table_names_them(tmp_path, turn, capsys, monkeypatch):
    from polyspan.nn import rotation_plots

    drawn, real = {}, rotation_plots.plot_error_along_path
    monkeypatch.setattr(
        rotation_plots, "plot_error_along_path", lambda R, made, path: drawn.update(made, true=R) or real(R, made, path)
    )
    np.save(tmp_path / "a.npy", numbers(turn, "quaternion"))
    breaks(
        tmp_path / "a.npy", from_="quaternion", order="wxyz", to=["quaternion", "rotation6d"], plot=tmp_path / "p.svg"
    )  # fmt: skip
    assert (tmp_path / "p.svg").read_text().count("<svg") == 1
    errors = {
        name: np.rad2deg(nn.geodesic_distance(drawn[name], drawn["true"])) for name in ("quaternion", "rotation6d")
    }
    steps = nn.continuity_breaks(turn, "quaternion", order="wxyz")
    assert (errors["quaternion"] > 10).nonzero()[0].tolist() == steps
    assert errors["rotation6d"].max() < 0.1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "representation\tbreaks\tat rows"
    assert lines[1] == f"quaternion\t1\t{steps[0]}"
    assert lines[2] == "rotation6d\t0\t"
    assert lines[-1] == f"plot\t{tmp_path / 'p.svg'}"


def test_paths_that_cannot_be_judged_are_told(tmp_path, turn):
    def refused(array, message, **how):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(ValueError, match=message):
            breaks(tmp_path / "a.npy", **({"from_": "quaternion", "order": "wxyz"} | how))

    q = numbers(turn, "quaternion")
    refused(q[:2], r"a\.npy must hold at least 3 rotations along a path, got 2")
    refused(q, "--order must be given for quaternion", order=None)
    refused(q, "--sequence must be given for euler", to=["euler"])
    refused(q, "--sequence must be three of the letters", to=["euler"], sequence="abc")
    refused(q, "--sequence is for euler, got it for quaternion", to=["rotation6d"], sequence="XYZ")
    refused(q, "--factor must be above 1, got 1", factor=1.0)
    refused(q, r"--plot must end in \.svg or \.png or \.pdf", plot=tmp_path / "p.txt")
    refused(q[:, :3], "--from quaternion is for rows of 4 numbers, got 3")
    lost = q.copy()
    lost[50] = 0
    refused(lost, r"a quaternion of length 0 at row 50$")


def test_the_command_line_knows_the_options_by_their_names(tmp_path, rotations):
    app = App()
    app.command(convert, name="convert")
    app.command(breaks, name="breaks")

    def ran(*words):
        app(list(map(str, words)), exit_on_error=False, print_error=False, result_action="return_value")

    source, made = tmp_path / "a.npy", tmp_path / "b.npy"
    np.save(source, numbers(rotations, "quaternion"))
    how = (source, "--from", "quaternion", "--order", "wxyz")
    ran("convert", *how, "--to", "axis-angle", "-o", made)
    np.testing.assert_allclose(np.load(made), numbers(rotations, "axis-angle"), atol=1e-12)
    ran("breaks", *how, "--to", "axis-angle", "--to", "rotation6d", "--plot", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CycloptsError, match="wzyx"):
        ran("convert", source, "--from", "quaternion", "--order", "wzyx", "--to", "euler", "-o", tmp_path / "c.npy")
    assert not (tmp_path / "c.npy").exists()
