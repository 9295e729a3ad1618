import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyspan.align import OrthogonalMap, RidgeMap
from polyspan.errors import CorruptFile, FileError, MissingExtra, UnreadableFile, WrongContent
from polyspan.integrations import (
    FaissTable,
    FileTable,
    LanceTable,
    PostgresTable,
    QdrantTable,
    TableBatch,
    VectorTable,
    _lance_fill,
    lance_tables,
    open_vector_table,
    wrap_queries,
)
from polyspan.io import EmbeddingReader, read_array, read_members, write_array, write_members

N, D, NEW = 300, 8, 5
RNG = np.random.default_rng(0)
OLD = RNG.normal(size=(N, D)).astype(np.float32)
OLD /= np.linalg.norm(OLD, axis=1, keepdims=True)
MAP = RNG.normal(size=(D, NEW)).astype(np.float32)
TEXTS = [f"text {i}" for i in range(N)]
SPACE = {"model": "new", "dim": NEW, "normalized": False}
WORK = {"map": "m"}
FILES = (".npy", ".npz", ".safetensors", ".parquet", ".arrow", ".fvecs")
INDEXES = ("flat.faiss", "ip.faiss", "ivf.faiss", "hnsw.faiss", "ids.faiss")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def make_file(path):
    if path.suffix in (".parquet", ".arrow"):
        lists = pa.FixedSizeListArray.from_arrays(pa.array(OLD.ravel()), D)
        table = pa.table(
            {"id": [f"k{i}" for i in range(N)], "text": TEXTS, "vector": lists, "n": np.arange(N)},
        ).replace_schema_metadata({"owner": "me"})
        if path.suffix == ".parquet":
            pq.write_table(table, path, row_group_size=70)
        else:
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=64)
    else:
        write_array(path, OLD)
    return path


def make_index(path):
    faiss = pytest.importorskip("faiss")
    kind = path.stem
    if kind == "ivf":
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(D), D, 4, faiss.METRIC_INNER_PRODUCT)
        index.train(OLD)
        index.nprobe = 4
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(D, 12)
    elif kind == "ids":
        index = faiss.IndexIDMap2(faiss.IndexFlatL2(D))
    else:
        index = faiss.IndexFlatIP(D) if kind == "ip" else faiss.IndexFlatL2(D)
    if kind == "ids":
        index.add_with_ids(OLD, np.arange(N) * 7)
    else:
        index.add(OLD)
    faiss.write_index(index, str(path))
    return path


def make_lance(folder):
    lancedb = pytest.importorskip("lancedb")
    lists = pa.FixedSizeListArray.from_arrays(pa.array(OLD.ravel()), D)
    table = pa.table({"id": [f"k{i}" for i in range(N)], "text": TEXTS, "vector": lists})
    lancedb.connect(str(folder)).create_table("docs", table)
    return folder


def make_qdrant(folder, distance="Dot"):
    qdrant = pytest.importorskip("qdrant_client")
    m = qdrant.models
    client = qdrant.QdrantClient(path=str(folder))
    client.create_collection("docs", vectors_config=m.VectorParams(size=D, distance=m.Distance[distance.upper()]))
    points = [m.PointStruct(id=i, vector=OLD[i].tolist(), payload={"text": TEXTS[i]}) for i in range(N)]
    client.upsert("docs", points)
    alias = m.CreateAliasOperation(create_alias=m.CreateAlias(collection_name="docs", alias_name="live"))
    client.update_collection_aliases([alias])
    client.close()
    return folder


STORES = [f"x{suffix}" for suffix in FILES] + [*INDEXES, "lance", "qdrant", "postgres", "pgvector"]


@pytest.fixture
def opened(request, tmp_path):
    name = request.param
    if name == "lance":
        yield (
            lambda: (
                LanceTable(tmp_path, text_column="text")
                if (tmp_path / "docs.lance").exists()
                else LanceTable(make_lance(tmp_path), text_column="text")
            )
        )
    elif name == "qdrant":
        make_qdrant(tmp_path / "q")
        open_tables = []

        def again():
            for table in open_tables:
                table.close()
            open_tables[:] = [QdrantTable(str(tmp_path / "q"), "live", text_field="text")]
            return open_tables[0]

        yield again
        open_tables[0].close()
    elif name in ("postgres", "pgvector"):
        kind = "real[]" if name == "postgres" else f"vector({D})"
        request.getfixturevalue("postgres_docs")([f"k{i:03}" for i in range(N)], TEXTS, OLD, kind)
        address, tables = request.getfixturevalue("postgres"), []

        def fresh():
            tables.append(PostgresTable(address, "docs", text_column="body"))
            return tables[-1]

        yield fresh
        for table in tables:
            table.close()
    else:
        path = tmp_path / name
        make_index(path) if name in INDEXES else make_file(path)
        yield lambda: open_vector_table(path, text_column="text" if path.suffix in (".parquet", ".arrow") else None)


def all_rows(table):
    keys, rows = [], []
    for batch in table.rows(64):
        keys += batch.keys.tolist()
        rows.append(batch.rows)
    return dict(zip(keys, np.concatenate(rows), strict=True))


def fill_all(table, batches=None):
    for number, batch in enumerate(table.pending(64)):
        if batches is not None and number == batches:
            break
        table.fill(batch, batch.rows @ MAP)
    table.sync()


every_store = pytest.mark.parametrize("opened", STORES, indirect=True)


@every_store
def test_a_store_answers_to_the_protocol_and_tells_what_it_holds(opened):
    table = opened()
    assert isinstance(table, VectorTable)
    facts = table.facts()
    assert (facts.n_rows, facts.dim, facts.space, facts.next_dim, facts.has_before) == (N, D, None, None, False)
    held = all_rows(table)
    assert len(held) == N
    np.testing.assert_allclose(np.array(list(held.values())), OLD, atol=1e-6)
    table.stamp({"model": "old", "dim": D, "normalized": True})
    assert opened().facts().space == {"model": "old", "dim": D, "normalized": True}


@every_store
def test_five_verbs_carry_a_store_over_and_back(opened):
    table = opened()
    before = all_rows(table)
    table.stamp({"model": "old", "dim": D, "normalized": True})
    table.prepare(NEW, SPACE, WORK)
    fill_all(table, batches=2)
    table = opened()
    assert table.facts().n_pending == N - 128, "what was filled is known to the store"
    with pytest.raises(ValueError, match="every row must have a next vector"):
        table.seal()
    table = opened()
    fill_all(table)
    table.seal()
    for batch, rows in table.pairs(50):
        np.testing.assert_allclose(rows, batch.rows @ MAP, atol=1e-5)
    assert all_rows(opened()).keys() == before.keys(), "vectors in use stay in use"
    facts = opened().facts()
    assert facts.next_space == SPACE
    assert facts.dim == D
    table = opened()
    table.switch("cut over")
    table = opened()
    facts = table.facts()
    assert (facts.dim, facts.n_rows, facts.space, facts.next_dim, facts.has_before) == (NEW, N, SPACE, None, True)
    after = all_rows(table)
    for key, row in before.items():
        np.testing.assert_allclose(after[key], row @ MAP, atol=1e-5)
    table.switch("cut over")
    assert opened().facts().dim == NEW, "said twice, done once"
    with pytest.raises(ValueError, match="cut over and not forgotten"):
        opened().prepare(3, SPACE, WORK)
    table = opened()
    table.switch("roll back")
    table = opened()
    assert table.facts().space == {"model": "old", "dim": D, "normalized": True}
    for key, row in all_rows(table).items():
        np.testing.assert_array_equal(row, before[key])


@every_store
def test_forgetting_frees_the_old_and_lets_the_next_upgrade_come(opened):
    table = opened()
    for round_, width in enumerate((NEW, 3)):
        table = opened()
        table.prepare(width, SPACE | {"dim": width}, {"round": round_})
        for batch in table.pending(100):
            table.fill(batch, np.ascontiguousarray((batch.rows @ np.ones((batch.rows.shape[1], width))), np.float32))
        table.sync()
        table.seal()
        table.switch("cut over")
        table = opened()
        assert table.facts().has_before
        table.switch("forget")
        facts = opened().facts()
        assert not facts.has_before
        assert facts.dim == width
    with pytest.raises(ValueError, match="must have been cut over and not forgotten"):
        opened().switch("roll back")


@every_store
def test_an_upgrade_under_way_is_forgotten_without_a_trace_in_the_vectors(opened):
    table = opened()
    before = all_rows(table)
    table.prepare(NEW, SPACE, WORK)
    fill_all(table, batches=1)
    with pytest.raises(ValueError, match="another way"):
        opened().prepare(NEW, SPACE, {"map": "other"})
    with pytest.raises(ValueError, match="verb must be one of"):
        table.switch("commit")
    table = opened()
    table.switch("forget")
    facts = opened().facts()
    assert facts.next_dim is None
    assert facts.n_pending is None
    for key, row in all_rows(opened()).items():
        np.testing.assert_array_equal(row, before[key])


@every_store
def test_rows_may_be_filled_anew(opened):
    table = opened()
    table.prepare(NEW, SPACE, WORK)
    fill_all(table)
    first = next(iter(table.rows(64)))
    picked = TableBatch(first.keys[5:9], first.rows[5:9])
    table.fill(picked, np.full((4, NEW), 2.5, np.float32))
    table.seal()
    made = {key: row for batch, rows in table.pairs(64) for key, row in zip(batch.keys.tolist(), rows, strict=True)}
    for i, key in enumerate(first.keys.tolist()):
        expected = np.full(NEW, 2.5) if 5 <= i < 9 else first.rows[i] @ MAP
        np.testing.assert_allclose(made[key], expected, atol=1e-5)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_other_columns_order_and_metadata_of_a_table_are_kept(tmp_path, suffix):
    path = make_file(tmp_path / f"x{suffix}")
    table = FileTable(path, text_column="text")
    assert next(iter(table.rows(64))).texts == TEXTS[:64]
    table.prepare(NEW, SPACE, WORK)
    fill_all(table)
    table.seal()
    table.switch("cut over")
    found = pq.read_table(path) if suffix == ".parquet" else pa.ipc.open_file(str(path)).read_all()
    assert found.schema.names == ["id", "text", "vector", "n"]
    assert found.column("text").to_pylist() == TEXTS
    assert found.column("n").to_pylist() == list(range(N))
    assert found.schema.metadata[b"owner"] == b"me"
    assert found.schema.field("vector").type.list_size == NEW


def test_a_whole_file_stands_at_the_path_whenever_the_swap_is_cut_off(tmp_path, monkeypatch):
    """The n-th rename, link and sync fail in turn; then the same verb is said again."""
    from polyspan.io import partial

    calls = ("link", "replace")
    for verb in ("cut over", "roll back"):
        for failing in calls:
            path = tmp_path / f"{verb}-{failing}.npy".replace(" ", "")
            write_array(path, OLD)
            table = FileTable(path)
            table.prepare(NEW, SPACE, WORK)
            fill_all(table)
            table.seal()
            if verb == "roll back":
                table.switch("cut over")

            def broken(*_, **__):
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(partial.os, failing, broken)
                with pytest.raises(UnreadableFile):
                    table.switch(verb)
            assert read_array(path).shape == ((N, D) if verb == "cut over" else (N, NEW))
            table = FileTable(path)
            table.switch(verb)
            assert read_array(path).shape == ((N, NEW) if verb == "cut over" else (N, D))


def file_calls(monkeypatch, cut_at):
    """Let the calls that change a folder raise from call number ``cut_at`` on, as a kill would; return their count."""
    done = []

    def counted(real):
        def call(*arguments, **options):
            if len(done) >= cut_at:
                raise KeyboardInterrupt
            done.append(real.__name__)
            return real(*arguments, **options)

        return call

    for name in ("replace", "link", "unlink"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return done


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("verb", ["cut over", "roll back", "forget"])
def test_every_verb_of_a_file_ends_when_said_again_wherever_it_was_cut_off(tmp_path, monkeypatch, suffix, verb):
    cut, whole = 0, False
    while not whole:
        folder = tmp_path / str(cut)
        folder.mkdir()
        path = folder / f"v{suffix}"
        make_file(path)
        before = all_rows(FileTable(path))
        table = FileTable(path)
        table.prepare(NEW, SPACE, WORK)
        fill_all(table)
        table.seal()
        if verb != "cut over":
            table.switch("cut over")
        with monkeypatch.context() as patch:
            done = file_calls(patch, cut)
            try:
                FileTable(path).switch(verb)
                whole = True
            except KeyboardInterrupt:
                assert len(done) == cut
        again = FileTable(path)
        if verb == "roll back" and not again.facts().has_before:
            with pytest.raises(ValueError, match="must have been cut over"):
                again.switch(verb)
        else:
            again.switch(verb)
        again = FileTable(path)
        facts = again.facts()
        assert (facts.dim == NEW) == (verb != "roll back")
        assert facts.next_dim is None
        assert facts.has_before == (verb == "cut over")
        if verb == "roll back":
            assert all(np.array_equal(row, before[key]) for key, row in all_rows(again).items())
        if verb == "cut over":
            again.switch("forget")
        again.prepare(3, SPACE | {"dim": 3}, {"round": 2})
        again.switch("forget")
        assert {entry.name for entry in folder.iterdir()} == {path.name, again.work.name}
        cut += 1
    assert cut > 3


def test_files_of_the_users_beside_a_store_are_neither_in_the_way_nor_touched(tmp_path):
    path = make_file(tmp_path / "v.npy")
    old = path.read_bytes()
    own = {tmp_path / f"v.{word}.npy": np.full((3, 3), i) for i, word in enumerate(("before", "after", "next"))}
    for place, rows in own.items():
        np.save(place, rows)
    assert not FileTable(path).facts().has_before
    with pytest.raises(ValueError, match="must have been cut over"):
        FileTable(path).switch("roll back")
    FileTable(path).switch("forget")
    assert path.read_bytes() == old
    for ending in ("roll back", "forget"):
        table = FileTable(path)
        table.prepare(NEW, SPACE, WORK)
        fill_all(table)
        table.seal()
        table.switch("cut over")
        FileTable(path).switch(ending)
        assert (path.read_bytes() == old) == (ending == "roll back")
    for place, rows in own.items():
        np.testing.assert_array_equal(np.load(place), rows)


def test_a_roll_back_that_was_cut_off_is_not_in_the_way_of_a_later_upgrade(tmp_path, monkeypatch):
    path = make_file(tmp_path / "v.npy")
    table = FileTable(path)
    for number in range(2):
        table.prepare(NEW, SPACE, WORK | {"round": number})
        fill_all(table)
        table.seal()
        table.switch("cut over")
        with monkeypatch.context() as patch:
            real = os.replace

            def killed(*arguments, real=real):
                real(*arguments)
                raise KeyboardInterrupt

            patch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                table.switch("roll back")
        table = FileTable(path)
        np.testing.assert_array_equal(read_array(path), OLD)
    table.switch("roll back")
    assert not table.facts().has_before


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("member", ["a", None])
@pytest.mark.parametrize("width", [NEW, D])
def test_arrays_beside_the_vectors_of_a_file_are_kept_by_every_verb(tmp_path, suffix, member, width):
    path = tmp_path / f"x{suffix}"
    kept = {"ids": np.arange(N) + 2**53, "weights": OLD[:, 0].astype(np.float64)}
    if member is not None:
        kept["b"] = OLD * 2
    write_members(path, {"a": OLD, **kept})
    before = path.read_bytes()
    carry = np.ascontiguousarray(np.eye(D, width, dtype=np.float32)[::-1])
    table = FileTable(path, member=member)
    table.stamp({"model": "old", "dim": D, "normalized": True})
    space = SPACE | {"dim": width}
    table.prepare(width, space, WORK)
    for batch in table.pending(64):
        table.fill(batch, batch.rows @ carry)
    table.seal()
    for batch, rows in table.pairs(50):
        np.testing.assert_allclose(rows, batch.rows @ carry, atol=1e-6)
    table.switch("cut over")
    found = read_members(path)
    assert found.keys() == {"a", *kept}
    np.testing.assert_allclose(found["a"], OLD @ carry, atol=1e-6)
    for name, array in kept.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()
    assert FileTable(path, member=member).facts().space == space
    FileTable(path, member=member).switch("roll back")
    assert path.read_bytes() == before
    assert FileTable(path, member=member).facts().space["model"] == "old"


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet"])
@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_next_vectors_of_a_file_have_the_stored_width_of_the_old_ones(tmp_path, suffix, kind):
    path = tmp_path / f"x{suffix}"
    write_array(path, OLD.astype(kind))
    table = FileTable(path)
    table.prepare(NEW, SPACE, WORK)
    fill_all(table)
    table.seal()
    table.switch("cut over")
    stored = EmbeddingReader(path).stored_dtype
    FileTable(path).switch("roll back")
    assert stored == EmbeddingReader(path).stored_dtype


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_of_several_arrays_that_may_be_the_vectors_names_them(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write_members(path, {"a": OLD, "b": OLD, "ids": np.arange(N)})
    with pytest.raises(WrongContent, match=r"2 arrays of floats \(n, d\): a, b; expected one, or member= naming it"):
        FileTable(path)
    with pytest.raises(WrongContent, match=r"no member 'c'"):
        FileTable(path, member="c")


def test_the_file_that_a_link_names_is_upgraded_and_the_link_stays(tmp_path):
    (tmp_path / "real").mkdir()
    real, link = make_file(tmp_path / "real" / "v.npy"), tmp_path / "link.npy"
    link.symlink_to(real)
    table = FileTable(link)
    table.prepare(NEW, SPACE, WORK)
    fill_all(table)
    table.seal()
    table.switch("cut over")
    assert link.is_symlink()
    assert read_array(real).shape == (N, NEW)
    FileTable(link).switch("roll back")
    assert link.is_symlink()
    np.testing.assert_array_equal(read_array(real), OLD)


@pytest.mark.parametrize("kind", ["IVF", "IndexIDMap", "IndexIDMap2"])
def test_ids_and_kind_of_an_index_are_kept(tmp_path, kind):
    faiss = pytest.importorskip("faiss")
    path, ids = tmp_path / "own.faiss", np.random.default_rng(3).permutation(N) * 7 + 5
    if kind == "IVF":
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(D), D, 4, faiss.METRIC_L2)
        index.train(OLD)
        index.nprobe = 4
    else:
        index = getattr(faiss, kind)(faiss.IndexFlatL2(D))
    index.add_with_ids(OLD, ids)
    faiss.write_index(index, str(path))
    table = FaissTable(path)
    order = np.argsort(ids) if kind == "IVF" else np.arange(N)
    np.testing.assert_array_equal(np.concatenate([batch.rows for batch in table.rows(64)]), OLD[order])
    table.prepare(NEW, SPACE, WORK)
    fill_all(table)
    table.seal()
    for batch, rows in table.pairs(50):
        np.testing.assert_allclose(rows, batch.rows @ MAP, atol=1e-5)
    table.switch("cut over")
    found = faiss.read_index(str(path))
    assert type(faiss.downcast_index(found)) is type(index)
    np.testing.assert_array_equal(found.search(OLD[:40] @ MAP, 1)[1][:, 0], ids[:40])


def test_a_file_that_changes_while_it_is_filled_is_refused(tmp_path):
    path = make_file(tmp_path / "x.npy")
    table = FileTable(path)
    table.prepare(NEW, SPACE, WORK)
    fill_all(table, batches=1)
    changed = OLD.copy()
    changed[150] += 1
    write_array(path, changed)
    with pytest.raises(ValueError, match="must not change while it is upgraded"):
        list(FileTable(path).pending())
    table.switch("forget")
    table = FileTable(path)
    table.prepare(NEW, SPACE, WORK)
    fill_all(table)
    write_array(path, OLD)
    with pytest.raises(ValueError, match="must not change while it is upgraded"):
        table.seal()


def test_bad_addresses_and_contents_are_named(tmp_path):
    with pytest.raises(UnreadableFile):
        open_vector_table(tmp_path / "none.npy")
    for suffix in (".bvecs", ".ivecs"):
        np.hstack([np.full((3, 4 if suffix == ".bvecs" else 1), 0)]).tofile(tmp_path / f"x{suffix}")
        with pytest.raises(FileError):
            open_vector_table(tmp_path / f"x{suffix}")
    with pytest.raises(ValueError, match="table must be given"):
        open_vector_table("postgresql://localhost/nowhere")
    (tmp_path / "broken.faiss").write_bytes(b"IxF2 no index")
    with pytest.raises(WrongContent, match="whole FAISS index"):
        FaissTable(tmp_path / "broken.faiss")


def test_codes_are_refused_for_rewriting_and_wrapped_instead(tmp_path):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexPQ(D, 4, 4)
    index.train(OLD)
    index.add(OLD)
    faiss.write_index(index, str(tmp_path / "pq.faiss"))
    table = FaissTable(tmp_path / "pq.faiss")
    assert (table.rewritable, table.facts().exact) == (False, False)
    with pytest.raises(ValueError, match="carry the queries"):
        table.prepare(NEW, SPACE, WORK)
    new = OLD @ np.linalg.qr(RNG.normal(size=(D, D)))[0].astype(np.float32) + 0.1
    for aligner in (RidgeMap(), OrthogonalMap(), OrthogonalMap(normalize=True)):
        back = aligner.fit(new, OLD)
        wrap_queries(tmp_path / "pq.faiss", back, tmp_path / "asks.faiss")
        wrapped = faiss.read_index(str(tmp_path / "asks.faiss"))
        direct = index.search(np.ascontiguousarray(back.transform(new[:40])), 5)[1]
        agreed = (wrapped.search(np.ascontiguousarray(new[:40]), 5)[1] == direct).mean()
        assert agreed > 0.97, "rounding may swap a tie of codes"
    with pytest.raises(ValueError, match="8 dimensions"):
        wrap_queries(tmp_path / "pq.faiss", RidgeMap().fit(new, OLD[:, :5]), tmp_path / "asks.faiss")


@pytest.mark.parametrize(
    "address", ["PQ4x4", "SQ8", "IVF4,PQ4x4", "IVF4,SQ8", "IDMap,SQ8", "OPQ4,IVF4,PQ4x4", "HNSW8_SQ8"]
)
def test_codes_are_read_as_the_vectors_that_they_stand_for(tmp_path, address):
    faiss = pytest.importorskip("faiss")
    index, ids = faiss.index_factory(D, address), np.random.default_rng(4).permutation(N) * 3
    index.train(OLD)
    if "I" in address:
        index.add_with_ids(OLD, ids)
    else:
        index.add(OLD)
    faiss.write_index(index, str(tmp_path / "c.faiss"))
    table = FaissTable(tmp_path / "c.faiss")
    assert not table.rewritable
    got = np.concatenate([batch.rows for batch in table.rows(64)])
    expected = OLD[np.argsort(ids)] if "IVF" in address else OLD
    assert np.linalg.norm(got - expected) < 0.6 * np.linalg.norm(OLD)
    table.stamp({"model": "old", "dim": D, "normalized": True})
    assert FaissTable(tmp_path / "c.faiss").facts().space["model"] == "old"


@pytest.mark.parametrize("address", ["IVF4,PQ4x4fs", "OPQ4,IVF4,PQ4x4fs"])
def test_an_index_that_gives_no_vectors_back_is_refused_by_name(tmp_path, address):
    faiss = pytest.importorskip("faiss")
    index = faiss.index_factory(D, address)
    index.train(OLD)
    index.add(OLD)
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    with pytest.raises(WrongContent, match=r"Index\w+, which gives no vectors back.*wrap_queries"):
        FaissTable(tmp_path / "x.faiss")


def test_a_roll_back_removes_nothing_that_came_after_the_cut_over(tmp_path):
    path = make_file(tmp_path / "v.npy")
    old = path.read_bytes()
    made = FileTable(path)
    made.prepare(NEW, SPACE, WORK)
    fill_all(made)
    made.seal()
    made.switch("cut over")
    own = np.random.default_rng(9).normal(size=(7, 3))
    np.save(path, own)
    with pytest.raises(ValueError, match=r"must hold what the cut-over put there, got other contents.*before\.npy"):
        FileTable(path).switch("roll back")
    np.testing.assert_array_equal(np.load(path), own)
    assert made.before.read_bytes() == old


def test_ids_of_an_index_stay_with_their_vectors(tmp_path):
    faiss = pytest.importorskip("faiss")
    table = FaissTable(make_index(tmp_path / "ids.faiss"))
    table.prepare(NEW, SPACE, WORK)
    fill_all(table)
    table.seal()
    table.switch("cut over")
    found = faiss.read_index(str(tmp_path / "ids.faiss"))
    np.testing.assert_array_equal(found.search(OLD[:20] @ MAP, 1)[1][:, 0], np.arange(20) * 7)


def lance_rows(ids, rows, kind=None):
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).ravel()), rows.shape[1])
    return pa.table({"id": ids, "vector": lists if kind is None else lists.cast(pa.list_(kind, rows.shape[1]))})


def make_fragments(folder, ids, kind=None):
    """A table of three fragments, of which the second has lost two rows; returns it and the ids that are left."""
    lancedb = pytest.importorskip("lancedb")
    n = len(ids)
    made = lancedb.connect(str(folder)).create_table("docs", lance_rows(ids[: n // 2], OLD[: n // 2], kind))
    for first in (n // 2, 3 * n // 4):
        made.add(lance_rows(ids[first : first + n // 4], OLD[first : first + n // 4], kind))
    gone = ids[n // 2 + 3], ids[n // 2 + 40]
    made.delete(f"id IN {gone}")
    return made, [key for key in ids if key not in gone]


def half_filled(folder, batches=2):
    table = LanceTable(make_lance(folder))
    table.prepare(NEW, SPACE, WORK)
    fill_all(table, batches)
    return table


def sealed_rows(table):
    """What the column of next vectors holds, by id, after a look at whether each was made of the vector beside it."""
    found = {}
    for batch, rows in table.pairs(64):
        np.testing.assert_allclose(rows, batch.rows @ MAP, rtol=2e-3, atol=2e-3)
        found |= dict(zip(batch.keys.tolist(), rows, strict=True))
    return found


def column_of(table, name):
    table.table.checkout_latest()
    found = table.table.to_arrow().combine_chunks()
    return dict(zip(found["id"].to_pylist(), found[name].to_pylist(), strict=True))


def assert_nothing_is_left_beside(folder):
    assert [entry.name for entry in folder.iterdir()] == ["docs.lance"]
    assert b"polyspan:next" not in (LanceTable(folder).table.schema.field("vector").metadata or {})


def cut_off(*_, **__):
    raise ConnectionError("cut off")


def test_a_lance_table_that_grows_meanwhile_is_pending_again(tmp_path):
    table = LanceTable(make_lance(tmp_path))
    table.prepare(NEW, SPACE, WORK)
    fill_all(table)
    more = pa.table({"id": ["late"], "text": ["t"], "vector": pa.FixedSizeListArray.from_arrays(pa.array(OLD[0]), D)})
    table.table.add(more)
    with pytest.raises(ValueError, match="got 1 rows without one"):
        table.seal()
    assert [batch.keys.tolist() for batch in table.pending()] == [["late"]]
    other = LanceTable(tmp_path, column="vector")
    other.switch("forget")
    other.table.add(more)
    with pytest.raises(WrongContent, match="an id of its own"):
        other.prepare(NEW, SPACE, WORK)


@pytest.mark.parametrize("ids", ["numbers", "names"])
@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_fragments_deletions_and_compaction_keep_each_lance_vector_with_its_id(tmp_path, ids, kind):
    made, left = make_fragments(tmp_path, [i * 7 - 900 if ids == "numbers" else f"k{i}" for i in range(N)], kind)
    table = LanceTable(tmp_path)
    table.prepare(NEW, SPACE, WORK)
    fill_all(table)
    made.optimize()
    made.delete(f"id = {left.pop(5)!r}")
    table.seal()
    assert_nothing_is_left_beside(tmp_path)
    assert table.table.schema.field("vector__next").type == pa.list_(kind, NEW)
    assert sealed_rows(table).keys() == set(left)
    assert table.facts().next_space == SPACE


def test_lance_ids_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(_lance_fill, "_keys", lambda ids: np.array([len(key) for key in ids.to_pylist()]))
    table = half_filled(tmp_path)
    assert table.facts().n_pending == N - 128
    fill_all(table)
    table.seal()
    assert len(sealed_rows(table)) == N


@pytest.mark.parametrize("change", ["updated", "replaced", "upserted"])
def test_a_lance_vector_that_changes_before_the_seal_is_pending_again(tmp_path, change):
    table = half_filled(tmp_path, None)
    other = LanceTable(tmp_path).table
    new = lance_rows(["k7"], OLD[100:101] * 2)
    if change == "updated":
        other.update(where="id = 'k7'", values={"vector": (OLD[100] * 2).tolist()})
    elif change == "replaced":
        other.delete("id = 'k7'")
        other.add(new.append_column("text", pa.array(["t"])))
    else:
        other.merge_insert("id").when_matched_update_all().execute(new)
    with pytest.raises(ValueError, match="got 1 rows without one"):
        table.seal()
    assert table.facts().n_pending == 1
    fill_all(table)
    table.seal()
    np.testing.assert_allclose(sealed_rows(table)["k7"], OLD[100] * 2 @ MAP, atol=1e-5)


@pytest.mark.parametrize("act", ["compact", "delete", "add", "move"])
def test_what_others_commit_while_the_lance_column_is_written_is_never_lost(tmp_path, monkeypatch, act):
    make_fragments(tmp_path, [f"k{i}" for i in range(N)])
    table, other, take = LanceTable(tmp_path), LanceTable(tmp_path).table, _lance_fill.Held.take
    table.prepare(NEW, SPACE, WORK)
    fill_all(table)
    acts = {
        "compact": lambda: other.optimize(),
        "delete": lambda: other.delete("id = 'k3'"),
        "add": lambda: other.add(lance_rows(["late"], OLD[:1])),
        "move": lambda: (other.delete("id = 'k3'"), other.add(lance_rows(["k3"], OLD[3:4]))),
    }
    left = [acts[act]]

    def meanwhile(held, places):
        if left:
            left.pop()()
        return take(held, places)

    monkeypatch.setattr(_lance_fill.Held, "take", meanwhile)
    if act == "add":
        with pytest.raises(ValueError, match="got 1 rows without one"):
            table.seal()
        assert "vector__next" not in other.schema.names
        fill_all(table)
    table.seal()
    assert not left
    found = sealed_rows(table)
    assert len(found) == {"delete": N - 3, "add": N - 1}.get(act, N - 2)
    assert ("k3" in found) == (act != "delete")


def test_a_lance_table_that_never_stands_still_is_named(tmp_path, monkeypatch):
    table, other, take = half_filled(tmp_path, None), LanceTable(tmp_path).table, _lance_fill.Held.take

    def meanwhile(held, places):
        other.update(where="id = 'k3'", values={"text": f"{other.version}"})
        return take(held, places)

    with monkeypatch.context() as patch:
        patch.setattr(_lance_fill.Held, "take", meanwhile)
        with pytest.raises(ValueError, match="must stand still while the next vectors are written"):
            table.seal()
    assert "vector__next" not in other.schema.names
    table.seal()
    assert len(sealed_rows(table)) == N


def test_a_lance_column_that_finds_no_room_is_named_and_written_later(tmp_path, monkeypatch):
    table = half_filled(tmp_path, None)

    def full(*_, **__):
        raise OSError("LanceError(IO): No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(table._lance.LanceDataset, "add_columns", full)
        with pytest.raises(UnreadableFile, match="No space left on device"):
            table.seal()
    table.seal()
    assert len(sealed_rows(table)) == N


@pytest.mark.parametrize("then", ["seal", "forget", "cut over"])
@pytest.mark.parametrize("cut", ["while it writes", "once it has written", "once the note is gone"])
def test_a_lance_seal_that_is_cut_off_leaves_nothing_or_all(tmp_path, monkeypatch, cut, then):
    table = half_filled(tmp_path, None)
    before = column_of(table, "vector")
    with monkeypatch.context() as patch:
        if cut == "while it writes":
            take, calls = _lance_fill.Held.take, []
            patch.setattr(lance_tables, "SCANNED_ROWS", 64)
            patch.setattr(
                _lance_fill.Held, "take", lambda *a: cut_off() if len(calls) == 2 else (calls.append(0), take(*a))[1]
            )
        elif cut == "once it has written":
            patch.setattr(LanceTable, "_tidy", cut_off)
        else:
            patch.setattr(lance_tables, "remove_folder", cut_off)
        with pytest.raises(ConnectionError, match="cut off"):
            table.seal()
    table = LanceTable(tmp_path)
    facts = table.facts()
    assert (facts.next_dim, facts.n_pending, facts.next_space) == (NEW, 0, SPACE)
    assert ("vector__next" in table.table.schema.names) == (cut != "while it writes")
    assert len(sealed_rows(table)) == N
    assert list(table.pending()) == []
    table.prepare(NEW, SPACE, WORK)
    if then == "seal":
        table.seal()
        assert_nothing_is_left_beside(tmp_path)
    elif then == "cut over":
        if cut == "while it writes":
            with pytest.raises(ValueError, match="next vectors that are sealed"):
                table.switch("cut over")
            table.seal()
        table.switch("cut over")
        table.switch("roll back")
    if then != "seal":
        table.switch("forget")
        assert LanceTable(tmp_path).facts().next_dim is None
        assert_nothing_is_left_beside(tmp_path)
    assert column_of(table, "vector") == before


@pytest.mark.parametrize("sealed", [False, True])
def test_a_lance_upgrade_whose_forgetting_is_cut_off_is_not_taken_for_another(tmp_path, monkeypatch, sealed):
    table = half_filled(tmp_path, None if sealed else 2)
    if sealed:
        table.seal()
    with monkeypatch.context() as patch:
        if sealed:
            patch.setattr(type(table.table), "drop_columns", cut_off)
        else:
            patch.setattr(lance_tables, "remove_folder", cut_off)
        with pytest.raises(ConnectionError):
            table.switch("forget")
    table = LanceTable(tmp_path)
    if sealed:
        assert table.facts().n_pending == 0
        table.switch("forget")
    assert table.facts().next_dim is None
    table.prepare(NEW, SPACE, {"map": "other"})
    assert LanceTable(tmp_path).facts().n_pending == N, "what the forgotten upgrade filled does not count"
    table.switch("forget")
    table.switch("forget")
    assert_nothing_is_left_beside(tmp_path)


def test_a_lance_upgrade_whose_preparation_or_piece_is_cut_off_begins_there_again(tmp_path, monkeypatch):
    table = LanceTable(make_lance(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(LanceTable, "_write_notes", cut_off)
        with pytest.raises(ConnectionError):
            table.prepare(NEW, SPACE, WORK)
    assert LanceTable(tmp_path).facts().next_dim is None
    table.prepare(NEW, SPACE, WORK)
    assert table.facts().n_pending == N
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut_off)
        with pytest.raises(UnreadableFile):
            fill_all(table)
    assert LanceTable(tmp_path).facts().n_pending == N
    fill_all(table)
    table.seal()
    assert_nothing_is_left_beside(tmp_path)


SEAL = """
import sys, time
from polyspan.integrations import LanceTable, _lance_fill, lance_tables
lance_tables.SCANNED_ROWS = 20
take = _lance_fill.Held.take
def slow(held, places):
    print("batch", flush=True)
    time.sleep(0.02)
    return take(held, places)
_lance_fill.Held.take = slow
table = LanceTable(sys.argv[1])
print("opened", flush=True)
table.seal()
print("sealed", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_lance_seal_that_is_killed_is_ended_by_the_next(tmp_path):
    half_filled(tmp_path, None)
    for lines in (9, 10**9):
        child = subprocess.Popen([sys.executable, "-c", SEAL, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(lines):
            if child.stdout.readline() in (b"sealed\n", b""):
                break
        child.kill()
        child.wait()
        child.stdout.close()
        facts = LanceTable(tmp_path).facts()
        assert (facts.next_dim, facts.n_pending) == (NEW, 0)
        assert len(sealed_rows(LanceTable(tmp_path))) == N
    assert_nothing_is_left_beside(tmp_path)


def test_a_sealed_lance_table_is_topped_up_by_id(tmp_path):
    table = half_filled(tmp_path, None)
    table.seal()
    LanceTable(tmp_path).table.add(lance_rows(["late", "later"], OLD[:2]).append_column("text", pa.array(["a", "b"])))
    with pytest.raises(ValueError, match="got 2 rows without one"):
        table.seal()
    assert table.facts().n_pending == 2
    fill_all(table)
    table.seal()
    assert len(sealed_rows(table)) == N + 2
    assert_nothing_is_left_beside(tmp_path)


def test_of_two_lance_vectors_of_one_id_the_later_counts_whichever_run_made_it(tmp_path):
    table, other = half_filled(tmp_path, None), LanceTable(tmp_path)
    first = next(iter(table.rows(64)))
    for which, value in ((table, 1.0), (other, 2.0), (table, 3.0), (other, 4.0)):
        which.fill(TableBatch(first.keys[:4], first.rows[:4]), np.full((4, NEW), value, np.float32))
    table.fill(TableBatch(first.keys[:0], first.rows[:0]), np.empty((0, NEW), np.float32))
    table.seal()
    made = column_of(table, "vector__next")
    assert [made[key] for key in first.keys[:4].tolist()] == [[4.0] * NEW] * 4
    assert column_of(table, "vector__next").keys() == {f"k{i}" for i in range(N)}


def test_what_is_no_next_vector_of_a_lance_table_is_refused(tmp_path):
    table = LanceTable(make_lance(tmp_path))
    batch = next(iter(table.rows(4)))
    with pytest.raises(ValueError, match="must be prepared for an upgrade first"):
        table.fill(batch, np.zeros((4, NEW), np.float32))
    with pytest.raises(ValueError, match="must be prepared for an upgrade first"):
        list(table.pairs())
    table.prepare(NEW, SPACE, WORK)
    for rows, message in [
        (np.zeros((4, NEW + 1)), rf"shape \(b, {NEW}\), got \(4, {NEW + 1}\)"),
        (np.full((4, NEW), np.nan), "must be finite as float32"),
        (np.full((4, NEW), 1e300), "must be finite as float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            table.fill(batch, rows)
    with pytest.raises(WrongContent, match="an id missing"):
        table.fill(TableBatch(np.array([None]), batch.rows[:1]), np.zeros((1, NEW), np.float32))
    assert table.facts().n_pending == N
    null = pa.array([None], pa.list_(pa.float32(), D))
    table.table.add(pa.table({"id": ["null"], "text": ["t"], "vector": null}))
    fill_all(table, batches=2)
    with pytest.raises(WrongContent, match="a null vector"):
        list(table.pending())
    assert table.facts().n_pending == N + 1 - 128


def test_pieces_beside_a_lance_table_that_are_broken_or_of_other_work_are_named(tmp_path):
    table = half_filled(tmp_path)
    folder = tmp_path / "docs.vector.upgrade"
    assert len(LanceTable(tmp_path).table.schema.names) == 3
    piece = sorted(folder.iterdir())[1]
    whole = piece.read_bytes()
    piece.write_bytes(whole[:-100])
    with pytest.raises(CorruptFile, match=piece.name):
        table.facts()
    piece.write_bytes(whole)
    assert table.facts().n_pending == N - 128
    shutil.copytree(folder, tmp_path / "kept")
    table.switch("forget")
    table.prepare(NEW, SPACE, {"map": "other"})
    shutil.copytree(tmp_path / "kept", folder)
    with pytest.raises(WrongContent, match="next vectors of another upgrade"):
        table.facts()
    table.switch("forget")
    assert not folder.exists()


def test_lance_at_an_address_or_without_its_package_is_refused_for_upgrades(tmp_path, monkeypatch):
    make_lance(tmp_path)
    table = LanceTable(f"file://{tmp_path}")
    assert len(all_rows(table)) == N
    with pytest.raises(ValueError, match="must be in a local folder to be upgraded"):
        table.prepare(NEW, SPACE, WORK)
    LanceTable(tmp_path).prepare(NEW, SPACE, WORK)
    with pytest.raises(ValueError, match="must be in a local folder to be upgraded"):
        table.facts()
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(MissingExtra, match=r"a LanceDB table needs lance; run: pip install \"polyspan\[vectors\]\""):
        LanceTable(tmp_path)


def test_batches_of_lance_are_of_the_size_that_is_asked_for_whatever_the_fragments(tmp_path):
    lancedb = pytest.importorskip("lancedb")
    keys, made = (
        [f"k{i}" for i in range(40)],
        lancedb.connect(str(tmp_path)).create_table("docs", lance_rows(["k"], OLD[:1])),
    )
    for first in range(0, 40, 5):
        made.add(lance_rows(keys[first : first + 5], OLD[first : first + 5]))
    for size in (1, 7, 16, 41, 1000):
        batches = list(LanceTable(tmp_path).rows(size))
        assert {len(batch.keys) for batch in batches[:-1]} <= {size}
        assert np.concatenate([batch.keys for batch in batches]).tolist() == ["k", *keys]
        np.testing.assert_array_equal(np.concatenate([batch.rows for batch in batches])[1:], OLD[:40])


def test_lance_names_what_is_missing(tmp_path):
    make_lance(tmp_path)
    with pytest.raises(UnreadableFile, match="a table other"):
        LanceTable(tmp_path, "other")
    with pytest.raises(WrongContent, match="a column of vectors"):
        LanceTable(tmp_path, column="text")
    with pytest.raises(WrongContent, match="a column nothing"):
        LanceTable(tmp_path, text_column="nothing")


def test_a_cosine_collection_says_that_lengths_are_gone_and_a_plain_name_is_not_cut_over(tmp_path):
    pytest.importorskip("qdrant_client")
    table = QdrantTable(str(make_qdrant(tmp_path / "q", "Cosine")), "docs", text_field="text")
    try:
        facts = table.facts()
        assert facts.unit
        assert facts.metric == "cosine"
        table.prepare(NEW, SPACE, WORK)
        fill_all(table)
        table.seal()
        with pytest.raises(ValueError, match="must be an alias to be cut over"):
            table.switch("cut over")
        first = next(iter(table.pairs(32)))[0]
        payload = table.client.retrieve("docs__next", first.keys[:1].tolist())[0].payload
        assert payload == {"text": first.texts[0]}
        with pytest.raises(UnreadableFile, match="no collection other"):
            QdrantTable("", "other", client=table.client)
    finally:
        table.close()


def test_a_row_without_a_next_vector_is_nan_in_pairs(tmp_path):
    table = LanceTable(make_lance(tmp_path))
    table.prepare(NEW, SPACE, WORK)
    fill_all(table, batches=1)
    missing = sum(int(np.isnan(rows).all(axis=1).sum()) for _, rows in table.pairs())
    assert missing == N - 64
    assert json.dumps(dict(table.facts().state))


def test_a_file_that_cannot_be_written_anew_is_no_store(tmp_path):
    (tmp_path / "a.vec").write_text("a 1 2\nb 3 4\n")
    with pytest.raises(WrongContent, match=r"found suffix '\.vec'; expected one that can be written anew: \.npy"):
        FileTable(tmp_path / "a.vec")
