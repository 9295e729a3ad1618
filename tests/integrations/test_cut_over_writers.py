"""Writers that come between fill and cut-over, or during the cut-over itself: nothing that they wrote is lost."""

import threading
import time

import numpy as np
import pyarrow as pa
import pytest

from polyspan.errors import WrongContent
from polyspan.integrations import Encoder, LanceTable, PostgresTable, QdrantTable, TableBatch, Upgrade

N, D, WIDER = 120, 6, 9
RNG = np.random.default_rng(0)
OLD = RNG.normal(size=(N, D)).astype(np.float32)
NEW = (OLD @ RNG.normal(size=(D, WIDER))).astype(np.float32)
TEXTS = [f"text {i}" for i in range(N)]


def begun(folder, table):
    """An upgrade that embeds everything again, filled and sealed; no check of it asks the encoder again."""
    encoder = Encoder("new-model", lambda texts: NEW[[int(text.split()[1]) for text in texts]])
    upgrade = Upgrade(folder, table, encoder=encoder)
    upgrade.plan(n_anchors=60, k=3, old_model="old-model")
    upgrade.begin("re-embed")
    upgrade.fill(verbose=False)
    return upgrade


def lists(rows):
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).ravel()), rows.shape[1])


@pytest.fixture
def lance(tmp_path):
    lancedb = pytest.importorskip("lancedb")
    database = lancedb.connect(str(tmp_path / "db"))
    table = pa.table({"id": [f"k{i}" for i in range(N)], "text": TEXTS, "vector": lists(OLD)})
    other = database.create_table("docs", table)
    upgrade = begun(tmp_path / "state", LanceTable(tmp_path / "db", text_column="text"))
    other.checkout_latest()
    return upgrade, other


def value(other, key, column="vector"):
    other.checkout_latest()
    return other.search().where(f"id = '{key}'").to_list()[0][column]


# Between fill and check


CHANGES = {
    "a vector": lambda other: other.update(where="id = 'k3'", values={"vector": OLD[9].tolist()}),
    "a text": lambda other: other.update(where="id = 'k3'", values={"text": "text 9"}),
    "both by an upsert": lambda other: (
        other.merge_insert("id")
        .when_matched_update_all()
        .execute(pa.table({"id": ["k3"], "text": ["text 9"], "vector": lists(OLD[9:10])}))
    ),
    "a new row": lambda other: other.add(pa.table({"id": ["late"], "text": ["text 9"], "vector": lists(OLD[9:10])})),
    "a row that is replaced": lambda other: (
        other.delete("id = 'k3'"),
        other.add(pa.table({"id": ["k3"], "text": ["text 9"], "vector": lists(OLD[9:10])})),
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_lance_row_changes_after_the_seal_is_missing_at_the_check_and_made_anew(lance, what):
    upgrade, other = lance
    assert upgrade.check(n_embedded=0).ok
    CHANGES[what](other)
    assert upgrade.table.facts().n_pending == 1
    with pytest.raises(ValueError, match="must not change between check and cut-over"):
        upgrade.cut_over()
    seen = upgrade.check(n_embedded=0)
    assert seen.n_missing == 1
    assert seen.problems == ["1 rows have no next vector: fill again"]
    with pytest.raises(ValueError, match="got 1 rows without one"):
        upgrade.table.seal()
    assert upgrade.fill(verbose=False) == 1
    assert upgrade.check(n_embedded=0).ok
    upgrade.cut_over()
    key = "late" if what == "a new row" else "k3"
    made = 3 if what == "a vector" else 9
    np.testing.assert_allclose(value(other, key), NEW[made], rtol=1e-5)


def test_a_lance_row_that_is_deleted_after_the_check_is_refused_and_then_gone_from_both(lance):
    upgrade, other = lance
    assert upgrade.check(n_embedded=0).ok
    other.delete("id = 'k3'")
    with pytest.raises(ValueError, match="must not change between check and cut-over"):
        upgrade.cut_over()
    assert upgrade.check(n_embedded=0).n_rows == N - 1
    upgrade.cut_over()
    other.checkout_latest()
    assert other.count_rows() == N - 1


def test_compaction_and_other_columns_make_no_lance_row_pending(lance):
    upgrade, other = lance
    other.add_columns({"twice": "1 + 1"})
    other.update(where="id = 'k3'", values={"twice": 9})
    other.optimize()
    assert upgrade.table.facts().n_pending == 0
    assert upgrade.check(n_embedded=0).ok


def test_the_text_that_an_upgrade_of_lance_began_with_counts_whoever_opens_it(lance, tmp_path):
    upgrade, other = lance
    plain = LanceTable(tmp_path / "db")
    assert plain.facts().n_pending == 0
    other.update(where="id = 'k3'", values={"text": "text 9"})
    assert plain.facts().n_pending == 1
    batch = next(iter(plain.rows()))
    at = batch.keys.tolist().index("k3")
    plain.fill(TableBatch(batch.keys[[at]], batch.rows[[at]]), NEW[[9]])
    assert upgrade.table.facts().n_pending == 0, "as the table's own text says"
    other.checkout_latest()
    other.drop_columns(["vector__made_of"])
    with pytest.raises(WrongContent, match="vector__made_of beside it; drop both to begin anew"):
        LanceTable(tmp_path / "db").facts()


# During the cut-over


def in_between(monkeypatch, kind, name, write):
    """Let others write just before a method of a table does its work, the first time."""
    real, left = getattr(kind, name), [write]

    def method(*arguments):
        if left:
            left.pop()()
        return real(*arguments)

    monkeypatch.setattr(kind, name, method)


@pytest.mark.parametrize("what", ["a vector", "a new row", "gone"])
def test_a_commit_that_slips_into_a_cut_over_of_lance_takes_it_back(lance, monkeypatch, what):
    upgrade, other = lance
    assert upgrade.check(n_embedded=0).ok
    write = CHANGES.get(what, lambda other: other.delete("id = 'k3'"))
    in_between(monkeypatch, LanceTable, "_rename", lambda: (other.checkout_latest(), write(other)))
    with pytest.raises(ValueError, match="must stand still while it is cut over, got other commits"):
        upgrade.cut_over()
    facts = upgrade.table.facts()
    assert (facts.dim, facts.next_dim, facts.has_before) == (D, WIDER, False)
    assert facts.n_pending == (0 if what == "gone" else 1)
    assert "cut over" not in upgrade.steps
    upgrade.fill(verbose=False)
    assert upgrade.check(n_embedded=0).ok
    upgrade.cut_over()
    assert upgrade.table.facts().dim == WIDER
    upgrade.roll_back()
    assert upgrade.table.facts().dim == D


def test_a_write_to_qdrant_while_the_alias_switches_takes_the_switch_back(tmp_path, monkeypatch):
    qdrant = pytest.importorskip("qdrant_client")
    m, client = qdrant.models, qdrant.QdrantClient(":memory:")
    client.create_collection("docs", vectors_config=m.VectorParams(size=D, distance=m.Distance.DOT))
    points = [m.PointStruct(id=i, vector=OLD[i].tolist(), payload={"text": TEXTS[i]}) for i in range(N)]
    client.upsert("docs", points)
    alias = m.CreateAliasOperation(create_alias=m.CreateAlias(collection_name="docs", alias_name="live"))
    client.update_collection_aliases([alias])
    upgrade = begun(tmp_path, QdrantTable("", "live", text_field="text", client=client))
    assert upgrade.check(n_embedded=0).ok
    in_between(
        monkeypatch, QdrantTable, "_point_to", lambda: client.set_payload("docs", {"text": "text 9"}, points=[3])
    )
    with pytest.raises(ValueError, match="must not be written to while it is cut over"):
        upgrade.cut_over()
    assert upgrade.table.collection == "docs"
    assert upgrade.fill(verbose=False) == 1
    assert upgrade.check(n_embedded=0).ok
    upgrade.cut_over()
    np.testing.assert_allclose(client.retrieve("live", [3], with_vectors=True)[0].vector, NEW[9], rtol=1e-5)


@pytest.fixture
def server(postgres, postgres_docs, tmp_path):
    connection = postgres_docs(range(N), TEXTS, OLD)
    table = PostgresTable(postgres, "docs", text_column="body")
    yield begun(tmp_path, table), connection
    table.close()


def test_a_writer_waits_while_postgres_is_cut_over_and_writes_afterwards(server, monkeypatch):
    upgrade, connection = server
    assert upgrade.check(n_embedded=0).ok
    late = threading.Thread(target=connection.execute, args=("UPDATE docs SET body = 'late' WHERE id = 3",))
    waited = []

    def write():
        late.start()
        late.join(0.5)
        waited.append(late.is_alive())

    in_between(monkeypatch, PostgresTable, "_rename", write)
    upgrade.cut_over()
    late.join(20)
    assert waited == [True]
    assert not late.is_alive()
    found = connection.execute("SELECT body, v FROM docs WHERE id = 3").fetchone()
    assert found[0] == "late"
    np.testing.assert_allclose(found[1], NEW[3], rtol=1e-5)


def test_a_writer_that_was_there_first_is_waited_for_and_its_change_refused(server):
    upgrade, connection = server
    assert upgrade.check(n_embedded=0).ok
    raised = []

    def cut_over():
        try:
            upgrade.cut_over()
        except ValueError as error:
            raised.append(str(error))

    cutting = threading.Thread(target=cut_over)
    with connection.transaction():
        connection.execute("UPDATE docs SET body = 'text 9' WHERE id = 3")
        cutting.start()
        time.sleep(0.5)
        assert cutting.is_alive()
    cutting.join(20)
    assert "must not change between check and cut-over" in raised[0]
    facts = upgrade.table.facts()
    assert (facts.has_before, facts.n_pending) == (False, 1)
    assert upgrade.fill(verbose=False) == 1
    assert upgrade.check(n_embedded=0).ok
    upgrade.cut_over()
    np.testing.assert_allclose(connection.execute("SELECT v FROM docs WHERE id = 3").fetchone()[0], NEW[9], rtol=1e-5)
