"""What stores see of changes that others make while an upgrade is under way, and what they carry along."""

import uuid

import numpy as np
import pyarrow as pa
import pytest

from polyspan.errors import WrongContent
from polyspan.integrations import Encoder, LanceTable, QdrantTable, Upgrade

N, D = 120, 6
OLD = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
NEW = OLD @ np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0].astype(np.float32)
OTHER = np.random.default_rng(2).normal(size=(N, 3)).astype(np.float32)
TEXTS = [f"text {i}" for i in range(N)]


def encoder():
    return Encoder("new-model", lambda texts: NEW[[int(text.split()[1]) for text in texts]])


def make_lance(folder, texts=TEXTS):
    lancedb = pytest.importorskip("lancedb")
    lists = pa.FixedSizeListArray.from_arrays(pa.array(OLD.ravel()), D)
    table = pa.table({"id": [f"k{i}" for i in range(N)], "text": texts, "vector": lists})
    return lancedb.connect(str(folder)).create_table("docs", table)


def make_qdrant(named=True):
    qdrant = pytest.importorskip("qdrant_client")
    m, client = qdrant.models, qdrant.QdrantClient(":memory:")
    dense = m.VectorParams(size=D, distance=m.Distance.DOT, on_disk=True, hnsw_config=m.HnswConfigDiff(m=7))
    other = m.VectorParams(size=3, distance=m.Distance.EUCLID)
    client.create_collection(
        "docs",
        vectors_config={"text": dense, "image": other} if named else dense,
        sparse_vectors_config={"words": m.SparseVectorParams()},
    )
    points = []
    for i in range(N):
        vector = {"words": m.SparseVector(indices=[i, i + 3], values=[1.0, 0.5])}
        vector |= {"text": OLD[i].tolist(), "image": OTHER[i].tolist()} if named else {"": OLD[i].tolist()}
        points.append(m.PointStruct(id=i, vector=vector, payload={"text": TEXTS[i], "n": i}))
    client.upsert("docs", points)
    alias = m.CreateAliasOperation(create_alias=m.CreateAlias(collection_name="docs", alias_name="live"))
    client.update_collection_aliases([alias])
    return client


def checked(folder, table):
    upgrade = Upgrade(folder, table, encoder=encoder())
    upgrade.plan(n_anchors=60, k=3, old_model="old-model")
    upgrade.begin("gallery")
    upgrade.fill(verbose=False)
    assert upgrade.check(n_embedded=0).ok
    return upgrade


@pytest.mark.parametrize("what", ["vector", "vector__next"])
def test_a_lance_vector_that_changes_after_the_check_is_refused_at_the_cut_over(tmp_path, what):
    other = make_lance(tmp_path / "db")
    upgrade = checked(tmp_path / "state", LanceTable(tmp_path / "db", text_column="text"))
    other.checkout_latest()
    other.update(where="id = 'k3'", values={what: [9.0] * D})
    with pytest.raises(ValueError, match="must not change between check and cut-over"):
        upgrade.cut_over()


def test_notes_other_columns_and_indexes_are_no_change_of_lance_vectors(tmp_path):
    other = make_lance(tmp_path / "db")
    table = LanceTable(tmp_path / "db", text_column="text")
    first = table.facts().state
    upgrade = checked(tmp_path / "state", table)
    other.checkout_latest()
    other.add_columns({"twice": "1 + 1"})
    upgrade.cut_over()
    upgrade.roll_back()
    upgrade.forget()
    assert table.facts().state == first


def test_a_null_text_of_lance_is_refused_with_its_row(tmp_path):
    make_lance(tmp_path, [*TEXTS[:7], None, *TEXTS[8:]])
    with pytest.raises(WrongContent, match=r"id 'k7': found a null text") as caught:
        list(LanceTable(tmp_path, text_column="text").rows())
    assert caught.value.expected == "a text in every row"


@pytest.mark.parametrize("named", [True, False])
def test_other_vectors_of_qdrant_and_settings_are_carried(tmp_path, named):
    client = make_qdrant(named)
    table = QdrantTable("", "live", vector="text" if named else None, text_field="text", client=client)
    before = {p.id: p for p in client.scroll("live", limit=N, with_vectors=True)[0]}
    upgrade = checked(tmp_path, table)
    upgrade.cut_over()
    after = client.scroll("live", limit=N, with_vectors=True)[0]
    assert len(after) == N
    own = "text" if named else ""
    for point in after:
        assert point.payload == before[point.id].payload
        assert {k: v for k, v in point.vector.items() if k != own} == {
            k: v for k, v in before[point.id].vector.items() if k != own
        }
    made = np.array([point.vector[own] for point in sorted(after, key=lambda p: p.id)])
    np.testing.assert_allclose(made, NEW, atol=0.05)
    params = client.get_collection("live").config.params
    assert list(params.sparse_vectors) == ["words"]
    dense = params.vectors["text"] if named else params.vectors
    assert (dense.on_disk, dense.hnsw_config.m) == (True, 7)


@pytest.mark.parametrize("what", ["vector", "payload", "image"])
def test_a_qdrant_point_that_changes_after_the_check_is_refused_at_the_cut_over(tmp_path, what):
    client = make_qdrant()
    upgrade = checked(tmp_path, QdrantTable("", "live", vector="text", text_field="text", client=client))
    m = pytest.importorskip("qdrant_client").models
    if what == "payload":
        client.set_payload("docs", {"n": -1}, points=[5])
    else:
        vector = {"text": [9.0] * D} if what == "vector" else {"image": [9.0] * 3}
        client.update_vectors("docs", [m.PointVectors(id=5, vector=vector)])
    with pytest.raises(ValueError, match="must not change between check and cut-over"):
        upgrade.cut_over()


def large_qdrant(ids):
    """A collection of one dense vector a point behind an alias, the table, and a count of what is read of it."""
    qdrant = pytest.importorskip("qdrant_client")
    m, client = qdrant.models, qdrant.QdrantClient(":memory:")
    client.create_collection("docs", vectors_config=m.VectorParams(size=2, distance=m.Distance.DOT))
    rows = np.random.default_rng(0).normal(size=(len(ids), 2)).tolist()
    points = [m.PointStruct(id=i, vector=row, payload={"text": str(i)}) for i, row in zip(ids, rows, strict=True)]
    client.upsert("docs", points)
    alias = m.CreateAliasOperation(create_alias=m.CreateAlias(collection_name="docs", alias_name="live"))
    client.update_collection_aliases([alias])
    read, scroll = [], client.scroll

    def counted(collection, **options):
        found = scroll(collection, **options)
        read.extend(point.id for point in found[0] if collection == "docs")
        return found

    client.scroll = counted
    return QdrantTable("", "live", text_field="text", client=client), read


N_LARGE = 3000
IDS = {
    "counted": list(range(N_LARGE)),
    "drawn": [int(i) for i in np.random.default_rng(0).integers(2**63, size=N_LARGE, dtype=np.uint64) * 2],
    "uuid": [str(uuid.UUID(int=int(i) << 65)) for i in np.random.default_rng(0).integers(2**62, size=N_LARGE)],
}


@pytest.mark.parametrize("kind", IDS)
def test_facts_of_qdrant_read_a_sample_spread_over_the_ids_and_see_what_changes_in_it(kind):
    ids = sorted(IDS[kind])
    table, read = large_qdrant(IDS[kind])
    table.prepare(3, {"model": "new", "dim": 3, "normalized": False}, {})
    read.clear()
    first = table.facts()
    assert len(read) <= 752, "as the docstring says"
    seen = np.sort([ids.index(i) for i in set(read)])
    assert np.diff(np.concatenate([[0], seen, [N_LARGE]])).max() < N_LARGE / 6, "no long stretch is left out"
    assert table.facts().state == first.state
    m = pytest.importorskip("qdrant_client").models
    picked = ids[seen[len(seen) // 2]]
    table.client.set_payload("docs", {"text": "other"}, points=[picked])
    second = table.facts().state
    assert second != first.state
    table.client.update_vectors("docs", [m.PointVectors(id=picked, vector=[9.0, 9.0])])
    assert table.facts().state not in (first.state, second)
    missed = next(i for i in ids if i not in set(read))
    table.client.delete("docs", points_selector=[missed])
    assert table.facts().state["n_rows"] == N_LARGE - 1, "one that is gone is seen by the count"


@pytest.mark.parametrize("what", ["vector", "payload"])
def test_a_qdrant_point_outside_the_sample_that_changes_is_seen_at_the_cut_over(tmp_path, what):
    table, read = large_qdrant(IDS["counted"])
    rows = np.random.default_rng(1).normal(size=(N_LARGE, 3)).astype(np.float32)
    upgrade = Upgrade(tmp_path, table, encoder=Encoder("new-model", lambda texts: rows[[int(t) for t in texts]]))
    upgrade.plan(n_anchors=60, k=3, old_model="old-model")
    upgrade.begin("gallery")
    read.clear()
    before = table.facts().state
    missed = next(i for i in IDS["counted"] if i not in read)
    upgrade.fill(verbose=False)
    assert upgrade.check(n_embedded=0, bound=0.0).ok
    m = pytest.importorskip("qdrant_client").models

    def change(payload, vector):
        if what == "payload":
            table.client.set_payload("docs", payload, points=[missed])
        else:
            table.client.update_vectors("docs", [m.PointVectors(id=missed, vector=vector)])

    kept = table.client.retrieve("docs", [missed], with_vectors=True)[0]
    change({"text": "7"}, [9.0, 9.0])
    assert table.facts().state == before, "facts look at the sample alone"
    with pytest.raises(ValueError, match="must not change between check and cut-over"):
        upgrade.cut_over()
    change(kept.payload, kept.vector)
    read.clear()
    upgrade.cut_over()
    assert len(read) <= 2 * N_LARGE + 3 * 752, "the whole collection is read before the switch and after it"


def test_a_qdrant_payload_that_changes_after_the_fill_is_filled_again(tmp_path):
    client = make_qdrant()
    upgrade = checked(tmp_path, QdrantTable("", "live", vector="text", text_field="text", client=client))
    client.set_payload("docs", {"n": -1}, points=[5])
    assert upgrade.check(n_embedded=0).n_missing == 1
    assert upgrade.fill(verbose=False) == 1
    assert upgrade.check(n_embedded=0).ok
    upgrade.cut_over()
    assert client.retrieve("live", [5])[0].payload["n"] == -1


def test_a_qdrant_vector_of_several_rows_a_point_is_refused_before_anything_is_written():
    qdrant = pytest.importorskip("qdrant_client")
    m, client = qdrant.models, qdrant.QdrantClient(":memory:")
    several = m.MultiVectorConfig(comparator=m.MultiVectorComparator.MAX_SIM)
    params = m.VectorParams(size=D, distance=m.Distance.DOT, multivector_config=several)
    client.create_collection("docs", vectors_config={"text": params})
    with pytest.raises(WrongContent, match="several vectors a point in text"):
        QdrantTable("", "docs", client=client).prepare(D, {"model": "new"}, {})
    assert not client.collection_exists("docs__next")
