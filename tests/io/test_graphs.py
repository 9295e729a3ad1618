from types import SimpleNamespace

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyspan.errors import CorruptFile, TooLarge, UntrustedFile, WrongContent
from polyspan.io import Graph, as_graph, check_sparse, read_graph, read_mat, write_array, write_members

A = np.array([[0, 1, 0, 2.0], [1, 0, 0, 0], [0, 0, 3, 0], [2, 0, 0, 0]])
FEATURES = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def dense(graph):
    return graph.adjacency.toarray()


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9), kind=st.sampled_from(["csr", "csc", "coo", "bsr", "dia"]))
@settings(max_examples=25)
def test_matrices_of_scipy_come_back_equal(tmp_path_factory, seed, n, kind):
    M = sp.random(n, n, 0.4, random_state=np.random.default_rng(seed))
    M = (M + M.T).asformat(kind)
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    sp.save_npz(path, M, compressed=bool(seed % 2))
    found = read_graph(path)
    np.testing.assert_array_equal(dense(found), M.toarray())
    assert found.adjacency.has_canonical_format


def parts(**changes):
    M = sp.csr_array(A)
    return {"data": M.data, "indices": M.indices, "indptr": M.indptr, "shape": np.array(M.shape), **changes}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"indptr": np.array([0, 3, 1, 4, 5])}, CorruptFile),
        ({"indptr": np.array([0, 2**40, 0, 0, 0])}, CorruptFile),
        ({"indptr": np.array([1, 2, 3, 4, 5])}, CorruptFile),
        ({"indptr": np.array([0, 2, 3, 4, 500])}, CorruptFile),
        ({"indptr": np.array([0, 5])}, CorruptFile),
        ({"indices": np.array([1, 3, 0, 2, 9])}, CorruptFile),
        ({"indices": np.array([1, 3, 0, 2, -1])}, CorruptFile),
        ({"indices": np.array([1, 3])}, CorruptFile),
        ({"indices": np.array([1.0, 3, 0, 2, 0])}, WrongContent),
        ({"shape": np.array([4, 4, 4])}, WrongContent),
        ({"shape": np.array([-4, 4])}, WrongContent),
        ({"shape": np.array([2**62, 2**62])}, CorruptFile),
        ({"shape": np.array([4, 5])}, WrongContent),
        ({"data": np.array([1, 2, 1, 3, np.nan])}, WrongContent),
        ({"data": np.array([1, 2, 1, 3, -2.0])}, WrongContent),
        ({"data": np.array([1, 2, 1, 3, 2j])}, WrongContent),
        ({"data": np.array(["a"] * 5)}, WrongContent),
        ({"format": np.array("dia")}, WrongContent),
        ({"format": np.array("coo")}, WrongContent),
    ],
)
def test_broken_sparse_files_are_refused_before_any_product(tmp_path, changes, kind):
    np.savez(tmp_path / "a.npz", **parts(**changes))
    with pytest.raises(kind):
        read_graph(tmp_path / "a.npz")


def test_coordinates_outside_the_shape_are_corrupt(tmp_path):
    for row in ([0, 9], [0, -1]):
        np.savez(tmp_path / "a.npz", data=np.ones(2), row=np.array(row), col=np.array([1, 0]), shape=np.array([2, 2]))
        with pytest.raises(CorruptFile):
            read_graph(tmp_path / "a.npz")
    huge = np.array([2**39, 2**39])
    np.savez(tmp_path / "a.npz", data=np.ones(1), row=np.array([0]), col=np.array([0]), shape=huge)
    with pytest.raises(TooLarge):
        read_graph(tmp_path / "a.npz")


def test_other_archives_are_told(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    with pytest.raises(WrongContent, match="no member 'col'"):
        read_graph(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", **parts(data=np.array([None] * 5)))
    with pytest.raises(UntrustedFile):
        read_graph(tmp_path / "a.npz")


def test_the_prefixes_of_attributed_graphs_are_known(tmp_path):
    X = sp.csr_array(FEATURES)
    write_members(
        tmp_path / "a.npz",
        {f"adj_{k}": v for k, v in parts().items()}
        | {"attr_data": X.data, "attr_indices": X.indices, "attr_indptr": X.indptr, "attr_shape": np.array(X.shape)}
        | {"labels": np.array([2, 0, 1, 0])},
    )
    found = read_graph(tmp_path / "a.npz")
    np.testing.assert_array_equal(dense(found), A)
    np.testing.assert_array_equal(found.attributes.toarray(), FEATURES)
    assert found.labels.tolist() == [2, 0, 1, 0]


def test_stored_zeros_are_dropped_duplicates_summed_and_loops_kept():
    M = sp.coo_array(([1.0, 1, 2, 0, 5], ([0, 0, 1, 2, 2], [1, 1, 0, 1, 2])), shape=(3, 3))
    found = check_sparse(M)
    assert found.nnz == 3
    np.testing.assert_array_equal(found.toarray(), [[0, 2, 0], [2, 0, 0], [0, 0, 5]])
    np.testing.assert_array_equal(dense(as_graph(M)), found.toarray())


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("max", [[1, 4], [4, 0]]), ("min", [[1, 2], [2, 0]]), ("mean", [[1, 3], [3, 0]]), ("sum", [[1, 6], [6, 0]])],
)
def test_what_is_not_symmetric_is_refused_or_made_so_by_a_stated_rule(tmp_path, rule, expected):
    sp.save_npz(tmp_path / "a.npz", sp.csr_array([[1.0, 4], [2, 0]]))
    with pytest.raises(WrongContent, match=r"row 0, column 1: found 2 entries that differ"):
        read_graph(tmp_path / "a.npz")
    np.testing.assert_array_equal(dense(read_graph(tmp_path / "a.npz", symmetrize=rule)), expected)


def test_empty_graphs_and_single_nodes(tmp_path):
    sp.save_npz(tmp_path / "a.npz", sp.csr_array((0, 0)))
    with pytest.raises(WrongContent, match="no node"):
        read_graph(tmp_path / "a.npz")
    sp.save_npz(tmp_path / "a.npz", sp.csr_array((1, 1)))
    assert read_graph(tmp_path / "a.npz").adjacency.shape == (1, 1)


EDGE_TEXTS = {
    "header": ("a.csv", "source,target\n1,2\n2,4\n"),
    "other header": ("a.csv", "paper,cites\n1,2\n2,4\n"),
    "no header": ("a.csv", "1,2\n2,4\n"),
    "tabs": ("a.tsv", "1\t2\n2\t4\n"),
    "blanks and comments": ("a.txt", "# edges\n% more\n\n1 2\n2   4\n"),
    "both directions": ("a.csv", "1,2\n2,1\n2,4\n4,2\n"),
    "an edge twice": ("a.csv", "1,2\n1,2\n2,4\n"),
    "CRLF and BOM": ("a.csv", "\ufeff1,2\r\n2,4\r\n"),
}


@pytest.mark.parametrize(("name", "text"), EDGE_TEXTS.values(), ids=EDGE_TEXTS.keys())
def test_edge_lists_with_gaps_in_their_ids(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found = read_graph(tmp_path / name)
    assert found.ids.tolist() == [1, 2, 4]
    np.testing.assert_array_equal(dense(found), [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


def test_edges_named_twice_follow_a_stated_rule(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("u,v,weight\na,b,1\nb,a,3\na,a,5\n")
    assert read_graph(path).ids.tolist() == ["a", "b"]
    np.testing.assert_array_equal(dense(read_graph(path)), [[5, 3], [3, 0]])
    np.testing.assert_array_equal(dense(read_graph(path, duplicates="sum")), [[5, 4], [4, 0]])
    with pytest.raises(WrongContent, match="edge 1"):
        read_graph(path, duplicates="error")
    with pytest.raises(WrongContent, match="differ from their mirror"):
        read_graph(path, directed=True)
    np.testing.assert_array_equal(dense(read_graph(path, directed=True, symmetrize="mean")), [[5, 2], [2, 0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,x\n", "line 1.*a weight"),
        ("1,2,nan\n", "weight nan"),
        ("1,2,-1\n", "weight -1"),
        ("1,2\n3\n", "line 2"),
        ("1,\n", "line 1"),
        ("", "no edge"),
        ("# nothing\n", "no edge"),
    ],
)
def test_broken_edge_lists_are_placed(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(WrongContent, match=message):
        read_graph(tmp_path / "a.csv")


def test_edges_in_tables_and_in_npy(tmp_path):
    table = pa.table({"w": [1.0, 2.0], "u": ["x", "y"], "v": pa.array(["y", "z"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    found = read_graph(tmp_path / "a.parquet", columns=("u", "v"), weight_column="w")
    assert found.ids.tolist() == ["x", "y", "z"]
    np.testing.assert_array_equal(dense(found), [[0, 1, 0], [1, 0, 2], [0, 2, 0]])
    with pytest.raises(WrongContent, match="no column 'q'"):
        read_graph(tmp_path / "a.parquet", columns=("u", "q"))
    pairs = np.array([[0, 1, 1], [1, 0, 2]])
    for form in (pairs, pairs.T):
        np.save(tmp_path / "a.npy", form)
        np.testing.assert_array_equal(dense(read_graph(tmp_path / "a.npy")), [[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    np.save(tmp_path / "a.npy", A)
    np.testing.assert_array_equal(dense(read_graph(tmp_path / "a.npy")), A)
    np.save(tmp_path / "a.npy", np.ones((3, 5)))
    with pytest.raises(WrongContent, match="edge_index"):
        read_graph(tmp_path / "a.npy")


def test_attributes_and_labels_by_row(tmp_path):
    edges = tmp_path / "a.csv"
    for first, ids in ((0, [0, 1, 2, 3]), (1, [1, 2, 3, 4])):
        edges.write_text(f"{first},{first + 3}\n{first},{first + 1}\n")
        write_array(tmp_path / "x.npy", FEATURES)
        write_array(tmp_path / "y.npy", np.array([2, 1, 0, 1]))
        found = read_graph(edges, attributes=tmp_path / "x.npy", labels=tmp_path / "y.npy")
        assert found.ids.tolist() == ids
        assert found.labels.tolist() == [2, 1, 0, 1]
        np.testing.assert_array_equal(found.attributes, FEATURES)
        assert found.adjacency[[2]].nnz == 0
    edges.write_text("0,9\n")
    with pytest.raises(WrongContent, match=r"nodes that the 4 rows of .* can belong to$"):
        read_graph(edges, attributes=tmp_path / "x.npy")
    edges.write_text("0,5\n1,4\n")
    write_array(tmp_path / "x.npy", np.ones((3, 6)))
    with pytest.raises(WrongContent, match=r"the 3 rows of .*x\.npy can belong to; is it transposed\?"):
        read_graph(edges, attributes=tmp_path / "x.npy")


def test_attributes_and_labels_by_id(tmp_path):
    (tmp_path / "a.csv").write_text("c,a\na,b\n")
    write_array(tmp_path / "x.parquet", FEATURES, ids=["d", "c", "b", "a"])
    (tmp_path / "y.csv").write_text("id,label\na,blue\nb,red\nc,blue\nd,green\n")
    found = read_graph(tmp_path / "a.csv", attributes=tmp_path / "x.parquet", labels=tmp_path / "y.csv")
    assert found.ids.tolist() == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(found.attributes, FEATURES[::-1])
    assert found.labels.tolist() == [0, 2, 0, 1]
    (tmp_path / "x.csv").write_text("id,p,q\na,1,2\nb,3,4\nc,5,6\n")
    np.testing.assert_array_equal(
        read_graph(tmp_path / "a.csv", attributes=tmp_path / "x.csv").attributes, [[1, 2], [3, 4], [5, 6]]
    )
    (tmp_path / "a.csv").write_text("c,a\na,zz\n")
    with pytest.raises(WrongContent, match="1 unknown nodes: zz"):
        read_graph(tmp_path / "a.csv", attributes=tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("id,p\na,1\na,3\n")
    with pytest.raises(WrongContent, match="id a twice"):
        read_graph(tmp_path / "a.csv", attributes=tmp_path / "x.csv")


def test_rows_that_do_not_fit_a_matrix_name_both_counts(tmp_path):
    sp.save_npz(tmp_path / "a.npz", sp.csr_array(A))
    write_array(tmp_path / "x.npy", FEATURES[:3])
    with pytest.raises(WrongContent, match="3 rows; expected one a node, 4"):
        read_graph(tmp_path / "a.npz", attributes=tmp_path / "x.npy")


@pytest.mark.parametrize("packed", [False, True])
def test_matlab_graphs_agree_with_scipy(tmp_path, packed):
    path = tmp_path / "a.mat"
    labels = np.array([[1], [3], [2], [250]], np.uint8)
    scipy.io.savemat(path, {"W": sp.csc_array(A), "fea": FEATURES, "gnd": labels, "t": "text"}, do_compression=packed)
    found = read_graph(path)
    np.testing.assert_array_equal(dense(found), A)
    np.testing.assert_array_equal(found.attributes, FEATURES)
    assert found.labels.tolist() == [1, 3, 2, 250]
    assert found.labels.dtype == np.int64
    theirs = scipy.io.loadmat(path)
    for name, value in read_mat(path, dense=True).items():
        expected = theirs[name].toarray() if sp.issparse(theirs[name]) else theirs[name]
        np.testing.assert_array_equal(value, expected)
        assert value.dtype == expected.dtype
    with pytest.raises(WrongContent, match="a char"):
        read_mat(path, ["t"])
    with pytest.raises(WrongContent, match="no variable 'none'; expected one of: W, fea, gnd, t"):
        read_mat(path, ["none"])
    with pytest.raises(TooLarge):
        read_mat(path, max_bytes=20)


def test_other_matlab_files_are_told(tmp_path):
    path = tmp_path / "a.mat"
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(128) + b"\x89HDF\r\n")
    with pytest.raises(WrongContent, match=r"7\.3.*HDF5"):
        read_mat(path)
    scipy.io.savemat(path, {"z": np.array([1j])})
    with pytest.raises(WrongContent, match="complex"):
        read_mat(path)
    scipy.io.savemat(path, {"s": {"a": 1}, "x": A})
    assert list(read_mat(path)) == ["x"]
    with pytest.raises(WrongContent, match="no variable 'W'"):
        read_graph(path)
    scipy.io.savemat(path, {"x": np.zeros((4000, 4000))}, do_compression=True)
    with pytest.raises(TooLarge, match="unpack"):
        read_mat(path)
    data = path.read_bytes()
    for broken in (b"", data[:100], data[:130], data[:-3], data[:200] + b"x" + data[201:]):
        path.write_bytes(broken)
        with pytest.raises(CorruptFile):
            read_mat(path, max_bytes=2**30)


def test_graphs_of_networkx():
    G = nx.Graph()
    G.add_nodes_from(["c", "a", "b"])
    G.add_edge("a", "b", weight=2.0)
    G.add_edge("c", "c")
    found = as_graph(G)
    assert found.ids.tolist() == ["c", "a", "b"]
    np.testing.assert_array_equal(dense(found), [[1, 0, 0], [0, 0, 2], [0, 2, 0]])
    assert as_graph(nx.path_graph(3)).ids.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="differ from their mirror"):
        as_graph(nx.DiGraph([(0, 1)]))
    np.testing.assert_array_equal(dense(as_graph(nx.DiGraph([(0, 1)]), symmetrize="max")), [[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="at least one node"):
        as_graph(nx.Graph())


def test_graphs_of_pyg_and_edge_index():
    pairs = torch.tensor([[0, 1, 1], [1, 0, 2]])
    data = SimpleNamespace(edge_index=pairs, x=torch.ones(4, 2), y=torch.tensor([0, 1, 1, 0]), num_nodes=4)
    found = as_graph(data)
    expected = np.zeros((4, 4))
    expected[[0, 1, 1, 2], [1, 0, 2, 1]] = 1
    np.testing.assert_array_equal(dense(found), expected)
    assert found.labels.tolist() == [0, 1, 1, 0]
    assert found.attributes.shape == (4, 2)
    for form in (pairs, pairs.numpy()):
        np.testing.assert_array_equal(dense(as_graph(form)), expected[:3, :3])
    with pytest.raises(ValueError, match=r"lie in 0\.\.1"):
        as_graph(SimpleNamespace(edge_index=pairs, num_nodes=2))
    with pytest.raises(ValueError, match="transpose it"):
        as_graph(SimpleNamespace(edge_index=pairs.T, num_nodes=3))


def test_dense_and_sparse_matrices_and_graphs():
    for form in (A, torch.tensor(A), sp.coo_matrix(A), sp.csc_array(A), Graph(sp.csr_array(A)), A.astype(np.float32)):
        np.testing.assert_array_equal(dense(as_graph(form)), A)
    assert as_graph(A.astype(np.float32)).adjacency.dtype == np.float32
    found = as_graph(A, attributes=FEATURES, labels=np.array(["b", "a", "b", "c"]))
    assert found.labels.tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize(
    ("obj", "kind", "message"),
    [
        (np.ones((3, 4)), ValueError, "square"),
        (-A, ValueError, "weights >= 0"),
        (np.where(A == 2, np.nan, A), ValueError, "row 0"),
        (np.ones(3), ValueError, "2-d"),
        ([[0, 1]], TypeError, "got list"),
        (np.broadcast_to(np.float32(0), (20_001, 20_001)), ValueError, r"3\.0 GiB"),
        (sp.csr_array((0, 0)), ValueError, "no node"),
        (sp.csr_array(A).astype(complex), ValueError, "real numbers"),
    ],
)
def test_what_is_no_graph_is_refused(obj, kind, message):
    with pytest.raises(kind, match=message):
        as_graph(obj)


def test_arguments_are_left_alone_and_counts_are_compared():
    M = sp.csr_array(A)
    M.data[0] = 0
    M2 = M.copy()
    as_graph(M, symmetrize="max")
    assert M.nnz == M2.nnz == 5
    with pytest.raises(ValueError, match="one row a node, 4"):
        as_graph(A, attributes=FEATURES[:2])
    with pytest.raises(ValueError, match="one a node, 4"):
        as_graph(A, labels=np.zeros(3, int))


def test_rows_without_ids_do_not_go_with_nodes_that_have_names(tmp_path):
    (tmp_path / "e.csv").write_text("source,target\n" + "\n".join(f"item{i},item{i + 1}" for i in range(11)) + "\n")
    np.save(tmp_path / "x.npy", np.eye(12))
    with pytest.raises(WrongContent, match="nodes with names such as item0; expected a column id beside their rows"):
        read_graph(tmp_path / "e.csv", attributes=tmp_path / "x.npy")
    np.save(tmp_path / "y.npy", np.arange(12))
    with pytest.raises(WrongContent, match="nodes with names"):
        read_graph(tmp_path / "e.csv", labels=tmp_path / "y.npy")
