import io
import json
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from polyspan.errors import CorruptFile, TooLarge, UnreadableFile, UntrustedFile, WrongContent
from polyspan.io import read_array, read_members, write_array, write_members, write_tensor_blocks

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text, data=b"", version=b"\x01\x00"):
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text.encode() + data


def shaped(shape, data=b"\0" * 64, descr="<f4"):
    return header(f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n", data)


class Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


@given(
    array=hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.uint8, np.int32, ">f4", ">i2"]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=5),
        elements=st.integers(0, 9),
    ),
    fortran=st.booleans(),
)
@settings(max_examples=25)
def test_npy_of_any_layout_is_read_equal(tmp_path_factory, array, fortran):
    path = tmp_path_factory.mktemp("npy") / "a.npy"
    np.save(path, np.asfortranarray(array) if fortran else array)
    for mmap in (True, False):
        found = read_array(path, mmap=mmap)
        np.testing.assert_array_equal(found, array)
        assert found.dtype in (np.float32, np.float64)
        assert found.dtype.isnative


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet", ".arrow", ".feather", ".csv", ".fvecs"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_written_is_read_back_equal_and_twice_the_same_bytes(tmp_path, suffix, dtype):
    array = X.astype(dtype)
    path = write_array(tmp_path / f"a{suffix}", array)
    found = read_array(path)
    np.testing.assert_array_equal(found, array)
    if suffix not in (".csv", ".fvecs"):
        assert found.dtype == dtype
    assert path.read_bytes() == write_array(tmp_path / f"b{suffix}", array).read_bytes()


def test_others_read_what_is_written(tmp_path):
    np.testing.assert_array_equal(np.load(write_array(tmp_path / "a.npy", X)), X)
    with np.load(write_members(tmp_path / "a.npz", {"x": X, "y": np.arange(3)})) as found:
        np.testing.assert_array_equal(found["x"], X)
        np.testing.assert_array_equal(found["y"], np.arange(3))
    members = {"a": X, "b": np.arange(3, dtype=np.int8), "c": np.array(2.0), "d": np.array([True, False])}
    path = write_members(tmp_path / "a.safetensors", members, metadata={"note": "x"})
    found = safetensors.numpy.load_file(path)
    mine = read_members(path)
    for name, value in members.items():
        np.testing.assert_array_equal(found[name], value)
        np.testing.assert_array_equal(mine[name], value)
        assert mine[name].dtype == value.dtype


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_numpy_is_read_by_member(tmp_path, save):
    save(tmp_path / "a.npz", x=X, y=np.arange(3), z=np.float16(X))
    np.testing.assert_array_equal(read_array(tmp_path / "a.npz", member="x"), X)
    np.testing.assert_array_equal(read_array(tmp_path / "a.npz", member="y", ndim=1, dtype=np.int64), np.arange(3))
    with pytest.raises(WrongContent, match="3 arrays: x, y, z; expected one, or member="):
        read_array(tmp_path / "a.npz")
    with pytest.raises(WrongContent, match="no member 'q'; expected one of: x, y, z"):
        read_array(tmp_path / "a.npz", member="q")
    found = read_members(tmp_path / "a.npz", ["z", "y"])
    assert {k: v.dtype for k, v in found.items()} == {"z": np.float32, "y": np.int64}
    with pytest.raises(WrongContent, match="no member 'q'"):
        read_members(tmp_path / "a.npz", ["x", "q"])


def test_maps_are_made_where_the_bytes_are_the_result_and_are_never_writable(tmp_path):
    np.savez(tmp_path / "a.npz", x=X)
    write_array(tmp_path / "a.npy", X)
    write_array(tmp_path / "a.safetensors", X)
    write_array(tmp_path / "a.fvecs", X)
    for name in ("a.npz", "a.npy", "a.safetensors", "a.fvecs"):
        mapped, own = read_array(tmp_path / name), read_array(tmp_path / name, mmap=False)
        assert type(mapped) is np.ndarray
        assert not mapped.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            mapped[0, 0] = 1
        own[0, 0] = 1
        np.testing.assert_array_equal(read_array(tmp_path / name), X)


NPY_CASES = {
    "empty": (b"", CorruptFile, "0 bytes"),
    "five bytes": (b"\x93NUMP", CorruptFile, "5 bytes"),
    "wrong magic": (b"NOTNUMPY" * 4, CorruptFile, "byte 0"),
    "version 9": (header("{}", version=b"\x09\x00"), CorruptFile, "format 9.0"),
    "header truncated": (npy(X)[:60], CorruptFile, "header"),
    "header empty": (header(""), CorruptFile, "no literal"),
    "header not a dict": (header("[1, 2]\n"), CorruptFile, "dict"),
    "header with other keys": (header("{'descr': '<f4'}\n"), CorruptFile, "dict"),
    "header of code": (header("__import__('os').getcwd()\n"), CorruptFile, "literal"),
    "header nested deep": (header("(" * 500 + "\n"), CorruptFile, "literal"),
    "negative shape": (shaped((-1, 4)), CorruptFile, "whole numbers"),
    "shape of bools": (shaped((True, 4)), CorruptFile, "whole numbers"),
    "shape of floats": (shaped((2.0, 4)), CorruptFile, "whole numbers"),
    "product beyond int64": (shaped((2**40, 2**40)), TooLarge, "2 bytes|bytes"),
    "8 PB": (shaped((2**41, 1024)), TooLarge, "bytes"),
    "data short": (npy(X)[:-4], CorruptFile, "92 bytes"),
    "data long": (npy(X) + b"\0", CorruptFile, "97 bytes"),
    "unknown dtype": (shaped((2, 2), descr="<q9"), CorruptFile, "dtype"),
    "object": (shaped((2, 2), descr="|O"), UntrustedFile, "pickled"),
    "pickle renamed": (b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00K\x01.", UntrustedFile, "pickle"),
    "old pickle renamed": (b"(lp0\nI1\naI2\na.", UntrustedFile, "pickle"),
    "complex": (npy(np.ones((2, 2), complex)), WrongContent, "complex128"),
    "string": (npy(np.array([["a"]])), WrongContent, "U1"),
    "bytes": (npy(np.array([[b"a"]])), WrongContent, "S1"),
    "void": (npy(np.zeros((2, 2), "V4")), WrongContent, "V4"),
    "structured": (npy(np.zeros(2, [("a", "f4")])), WrongContent, "structured"),
    "datetime": (npy(np.zeros((2, 2), "datetime64[s]")), WrongContent, "datetime64"),
    "timedelta": (npy(np.zeros((2, 2), "timedelta64[s]")), WrongContent, "timedelta64"),
    "bool": (npy(np.ones((2, 2), bool)), WrongContent, "bool"),
    "longdouble": (npy(np.ones((2, 2), np.longdouble)), WrongContent, "float128|longdouble"),
    "0-d": (npy(np.float32(1)), WrongContent, r"shape \(\)"),
    "1-d": (npy(np.ones(3)), WrongContent, r"shape \(3,\)"),
    "3-d": (npy(np.ones((1, 2, 3))), WrongContent, "2 dimensions"),
    "no rows": (npy(np.ones((0, 3))), WrongContent, "at least one row"),
    "no columns": (npy(np.ones((3, 0))), WrongContent, "at least one row"),
}


@pytest.mark.parametrize(("data", "kind", "message"), NPY_CASES.values(), ids=NPY_CASES.keys())
def test_broken_npy(tmp_path, data, kind, message):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(kind, match=message) as caught:
        read_array(tmp_path / "a.npy")
    assert caught.value.path == str(tmp_path / "a.npy")


@pytest.mark.parametrize("row", [0, 3, 5])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_numbers_that_are_not_finite_are_placed(tmp_path, row, value, suffix):
    array = X.copy()
    array[row, 2] = value
    if suffix == ".npy":
        np.save(tmp_path / "a.npy", array)
    elif suffix == ".npz":
        np.savez(tmp_path / "a.npz", x=array)
    else:
        safetensors.numpy.save_file({"x": array}, tmp_path / "a.safetensors")
    with pytest.raises(WrongContent, match=f"row {row}, column 2"):
        read_array(tmp_path / f"a{suffix}")
    assert np.array_equal(read_array(tmp_path / f"a{suffix}", finite=False), array, equal_nan=True)
    if suffix != ".npy":
        with pytest.raises(WrongContent, match=f"member x, row {row}"):
            read_members(tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match=f"row {row}"):
        write_array(tmp_path / "b.npy", array)


def test_extreme_scales_are_kept(tmp_path):
    array = np.array([[1e200, 1e-200], [5e-324, -1e308]])
    np.testing.assert_array_equal(read_array(write_array(tmp_path / "a.npy", array)), array)


def test_views_that_are_not_contiguous_are_written_as_they_look(tmp_path):
    array = np.arange(48.0).reshape(8, 6)[::-2, ::3]
    for suffix in (".npy", ".npz", ".safetensors", ".parquet", ".fvecs"):
        np.testing.assert_array_equal(read_array(write_array(tmp_path / f"a{suffix}", array)), array)


def test_integers_are_asked_for_by_dtype(tmp_path):
    np.save(tmp_path / "y.npy", np.array([0.0, 2.0, 5.0]))
    found = read_array(tmp_path / "y.npy", ndim=1, dtype=np.int64)
    assert found.tolist() == [0, 2, 5]
    assert found.dtype == np.int64
    np.save(tmp_path / "y.npy", np.array([0.0, 2.5]))
    with pytest.raises(WrongContent, match=r"row 1.*2\.5"):
        read_array(tmp_path / "y.npy", ndim=1, dtype=np.int64)
    np.save(tmp_path / "y.npy", np.array([1, 2**40]))
    with pytest.raises(WrongContent, match="whole numbers of int32"):
        read_array(tmp_path / "y.npy", ndim=1, dtype=np.int32)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize(("stored", "first"), [(np.float32, 2**24), (np.float64, 2**53)])
def test_floats_that_may_stand_for_their_neighbours_are_no_integers(tmp_path, suffix, stored, first):
    path = tmp_path / f"y{suffix}"
    for value in (first, -first, first * 4):
        write_array(path, np.array([1, value], dtype=stored))
        with pytest.raises(
            WrongContent, match=rf"row 1: found .*{np.dtype(stored)}.*neighbours.*integers from {first}"
        ):
            read_array(path, ndim=1, dtype=np.int64)
    write_array(path, np.array([first - 1, 1 - first], dtype=stored))
    assert read_array(path, ndim=1, dtype=np.int64).tolist() == [first - 1, 1 - first]
    write_array(path, np.array([first, first + 1, -first - 1]))
    assert read_array(path, ndim=1, dtype=np.int64).tolist() == [first, first + 1, -first - 1]


def test_integers_of_a_text_keep_all_their_digits(tmp_path):
    path = tmp_path / "ids.csv"
    path.write_text("id\n9007199254740993\n-9223372036854775808\n7\n")
    assert read_array(path, dtype=np.int64).ravel().tolist() == [9007199254740993, -9223372036854775808, 7]
    path.write_text("9007199254740993\n7.5\n")
    with pytest.raises(WrongContent, match=r"row 1: found 7\.5"):
        read_array(path, dtype=np.int64)
    path.write_text("9007199254740993\n7.0\n")
    with pytest.raises(WrongContent, match=r"row 0: .*neighbours"):
        read_array(path, dtype=np.int64)


def test_a_number_that_is_none_is_named_by_its_place_on_every_axis(tmp_path):
    array = np.zeros((4, 3, 5, 2))
    array[2, 1, 4, 0] = np.nan
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(WrongContent, match=r"row 2, index \(1, 4, 0\): found nan"):
        read_array(tmp_path / "a.npy", ndim=None)
    np.save(tmp_path / "a.npy", array[:, 1, :, 0])
    with pytest.raises(WrongContent, match="row 2, column 4: found nan"):
        read_array(tmp_path / "a.npy")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_booleans_are_numbers_where_that_is_asked_for(tmp_path, suffix):
    mask = np.array([[True, False], [False, True]])
    path = tmp_path / f"m{suffix}"
    if suffix == ".npy":
        np.save(path, mask)
    elif suffix == ".npz":
        np.savez(path, m=mask)
    else:
        safetensors.numpy.save_file({"m": mask}, path)
    with pytest.raises(WrongContent, match="bool"):
        read_array(path)
    found = read_array(path, booleans=True)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, mask)
    np.testing.assert_array_equal(read_array(path, booleans=True, dtype=np.int64), mask)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 0.5])
def test_half_precision_that_is_no_whole_number_is_refused_as_integers(tmp_path, value):
    np.save(tmp_path / "h.npy", np.array([1, 2, value], np.float16))
    with pytest.raises(WrongContent, match="row 2"):
        read_array(tmp_path / "h.npy", ndim=1, dtype=np.int64)
    np.save(tmp_path / "h.npy", np.array([1, 2, -3], np.float16))
    assert read_array(tmp_path / "h.npy", ndim=1, dtype=np.int64).tolist() == [1, 2, -3]


def test_memory_is_limited_before_it_is_taken(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1000, 100), np.float16))
    assert read_array(tmp_path / "a.npy").dtype == np.float32
    with pytest.raises(TooLarge, match="400,000 bytes"):
        read_array(tmp_path / "a.npy", max_bytes=300_000)
    np.save(tmp_path / "b.npy", np.zeros((1000, 100)))
    read_array(tmp_path / "b.npy", max_bytes=10)
    with pytest.raises(TooLarge):
        read_array(tmp_path / "b.npy", max_bytes=10, mmap=False)


def test_a_zip_bomb_is_refused_unless_a_limit_is_stated(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((100, 10**6), np.uint8))
    assert (tmp_path / "a.npz").stat().st_size < 100_000
    with pytest.raises(TooLarge, match="unpack to 100,000,128"):
        read_array(tmp_path / "a.npz")
    with pytest.raises(TooLarge, match="at most 1,000 bytes"):
        read_array(tmp_path / "a.npz", max_bytes=1000)


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def test_archives_are_never_extracted_and_odd_names_are_refused(tmp_path):
    path = tmp_path / "in" / "a.npz"
    path.parent.mkdir()
    for name in ("../x.npy", "/etc/x.npy", "a/../../x.npy", "..\\x.npy", "C:\\x.npy"):
        with pytest.raises(WrongContent, match="outside the archive"):
            read_array(archive(path, {name: npy(X)}))
    with pytest.raises(WrongContent, match="no array"):
        read_array(archive(path, {"readme.txt": b"x"}))
    with pytest.raises(WrongContent, match="no array"):
        read_array(archive(path, {}))
    with pytest.raises(TooLarge, match="members"):
        read_array(archive(path, {f"{i}.npy": b"" for i in range(10_001)}))
    with pytest.raises(UntrustedFile, match="pickled"):
        read_array(archive(path, {"x.npy": shaped((2, 2), descr="|O")}))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.npz", "in"]
    np.testing.assert_array_equal(read_array(archive(path, {"x.npy": npy(X), "readme.txt": b"x"})), X)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_in_an_archive_is_corrupt(tmp_path, compression):
    data = bytearray(archive(tmp_path / "a.npz", {"x.npy": npy(X)}, compression).read_bytes())
    data[190] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(CorruptFile):
        read_array(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(data[:-30])
    with pytest.raises(CorruptFile):
        read_array(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(CorruptFile):
        read_array(tmp_path / "a.npz")


def test_a_file_whose_reading_would_run_code_leaves_no_trace(tmp_path):
    import pickle

    trace = tmp_path / "trace"
    data = pickle.dumps(Payload(trace))
    for suffix in (".npy", ".npz", ".safetensors", ".parquet", ".arrow", ".fvecs", ".mat", ".pkl", ".joblib", ".pth"):
        (tmp_path / f"a{suffix}").write_bytes(data)
        with pytest.raises(UntrustedFile, match=r"pickle|runs code"):
            read_array(tmp_path / f"a{suffix}")
    np.save(tmp_path / "b.npy", np.array([[Payload(trace)]], object), allow_pickle=True)
    with pytest.raises(UntrustedFile):
        read_array(tmp_path / "b.npy")
    torch.save({"state_dict": {"w": torch.ones(2, 2)}}, tmp_path / "m.pth")
    for name in ("m.pth", "m.npz"):
        (tmp_path / name).write_bytes((tmp_path / "m.pth").read_bytes())
        with pytest.raises(UntrustedFile, match=r"\.safetensors|pickle"):
            read_array(tmp_path / name)
    torch.save(torch.ones(2), tmp_path / "l.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "l.npy").write_bytes((tmp_path / "l.pt").read_bytes())
    with pytest.raises(UntrustedFile):
        read_array(tmp_path / "l.npy")
    assert not trace.exists()


def tensors(body, data=b"\0" * 16, length=None):
    text = json.dumps(body).encode() if isinstance(body, dict) else body
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ONE = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
TENSOR_CASES = {
    "empty": (b"", CorruptFile),
    "five bytes": (b"12345", CorruptFile),
    "truncated": (tensors({"a": ONE})[:-1], CorruptFile),
    "trailing junk": (tensors({"a": ONE}) + b"x", CorruptFile),
    "header of 2^60": (tensors({"a": ONE}, length=2**60), CorruptFile),
    "header no JSON": (tensors(b"{{{{{{{{"), CorruptFile),
    "shape against offsets": (tensors({"a": {**ONE, "shape": [2, 3]}}), CorruptFile),
    "overlap": (tensors({"a": ONE, "b": ONE}), CorruptFile),
    "hole": (tensors({"a": {**ONE, "data_offsets": [16, 32]}}, b"\0" * 32), CorruptFile),
    "unknown dtype": (tensors({"a": {**ONE, "dtype": "F99"}}), CorruptFile),
    "a tensor twice": (
        tensors(f'{{"a":{json.dumps(ONE)},"a":{json.dumps(ONE)}}}'.encode()),
        CorruptFile,
    ),
    "float8": (tensors({"a": {"dtype": "F8_E4M3", "shape": [4, 4], "data_offsets": [0, 16]}}), WrongContent),
    "bool": (tensors({"a": {"dtype": "BOOL", "shape": [4, 4], "data_offsets": [0, 16]}}), WrongContent),
    "no tensors": (tensors({}, b""), WrongContent),
}


@pytest.mark.parametrize(("data", "kind"), TENSOR_CASES.values(), ids=TENSOR_CASES.keys())
def test_broken_safetensors(tmp_path, data, kind):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(kind):
        read_array(tmp_path / "a.safetensors")


def test_bfloat16_is_widened_exactly(tmp_path):
    value = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    safetensors.torch.save_file({"w": value}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read_array(tmp_path / "a.safetensors"), value.float().numpy())
    np.testing.assert_array_equal(read_members(tmp_path / "a.safetensors")["w"], value.float().numpy())
    np.testing.assert_array_equal(read_array(write_array(tmp_path / "b.npy", value)), value.float().numpy())


def test_a_flipped_bit_in_our_own_tensors_is_corrupt(tmp_path):
    path = write_array(tmp_path / "a.safetensors", X)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    for read in (read_array, read_members):
        with pytest.raises(CorruptFile, match="SHA-256"):
            read(path)


def test_text_tables_of_numbers(tmp_path):
    path = tmp_path / "a.csv"
    for text in ("a,b\n1,2\n3,4\n", "1,2\r\n3,4", "\ufeff1,2\n\n3,4\n"):
        path.write_text(text)
        np.testing.assert_array_equal(read_array(path), [[1, 2], [3, 4]])
    for text, message in (
        ("1,2\n3\n", "line 2"),
        ("1,2\n3,x\n", "line 2, column 1"),
        ("a,b\n", "no row"),
        ("", "no row"),
        ("1,nan\n", "row 0, column 1"),
    ):
        path.write_text(text)
        with pytest.raises(WrongContent, match=message):
            read_array(path)


def test_fvecs_and_kin(tmp_path):
    raw = b"".join(struct.pack("<i3B", 3, *row) for row in ((1, 2, 3), (4, 5, 6)))
    (tmp_path / "a.bvecs").write_bytes(raw)
    np.testing.assert_array_equal(read_array(tmp_path / "a.bvecs"), [[1, 2, 3], [4, 5, 6]])
    (tmp_path / "a.ivecs").write_bytes(struct.pack("<3i", 2, 7, 8))
    np.testing.assert_array_equal(read_array(tmp_path / "a.ivecs", dtype=np.int64), [[7, 8]])
    path = write_array(tmp_path / "a.fvecs", X)
    data = path.read_bytes()
    for broken in (
        data[:-1],
        data[:4],
        b"",
        struct.pack("<i", -1) + data[4:],
        data[:20] + struct.pack("<i", 3) + data[24:],
    ):
        path.write_bytes(broken)
        with pytest.raises(CorruptFile):
            read_array(path)


def test_wrong_arguments_are_named(tmp_path):
    path = write_array(tmp_path / "a.npy", X)
    for arguments, message in (
        ({"ndim": 5}, "ndim must be"),
        ({"member": "x"}, "member is for"),
        ({"column": "x"}, "column is for"),
        ({"dtype": str}, "dtype must be"),
    ):
        with pytest.raises(ValueError, match=message):
            read_array(path, **arguments)
    with pytest.raises(WrongContent, match=r"suffix '\.xyz'"):
        read_array(path.rename(tmp_path / "a.xyz"))
    with pytest.raises(UnreadableFile, match="No such file"):
        read_array(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="ids need a table"):
        write_array(tmp_path / "b.npy", X, ids=range(6))
    with pytest.raises(ValueError, match="one a row"):
        write_array(tmp_path / "b.parquet", X, ids=range(5))
    with pytest.raises(ValueError, match="real numbers"):
        write_array(tmp_path / "b.npy", np.array(["a"]))
    with pytest.raises(ValueError, match="at least one array"):
        write_members(tmp_path / "b.npz", {})


def test_tensors_that_come_in_blocks_are_a_file_that_safetensors_reads(tmp_path):
    brain = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    facts = {"rows": ("F32", X.shape), "brain": ("BF16", (2, 3)), "none": ("I64", (0, 5)), "one": ("U8", ())}
    whole = X.tobytes() + brain.view(torch.uint8).numpy().tobytes() + b"\x07"
    for size in (1, 5, 1000):
        blocks = (memoryview(whole)[i : i + size] for i in range(0, len(whole), size))
        write_tensor_blocks(tmp_path / f"{size}.safetensors", facts, blocks, {"format": "pt"})
        found = safetensors.torch.load_file(tmp_path / f"{size}.safetensors")
        torch.testing.assert_close(found["rows"], torch.from_numpy(X), rtol=0, atol=0)
        torch.testing.assert_close(found["brain"], brain, rtol=0, atol=0)
        assert found["none"].shape == (0, 5)
        assert found["one"] == 7


@pytest.mark.parametrize(
    ("given", "told"), [(b"1234", "8 bytes in all, got 4"), (b"123456789", "8 bytes in all, got 9")]
)
def test_blocks_of_another_length_leave_the_file_that_was_there(tmp_path, given, told):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=told):
        write_tensor_blocks(path, {"a": ("F32", (2,))}, [given], {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == b"old"
