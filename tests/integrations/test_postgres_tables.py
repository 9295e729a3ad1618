"""PostgreSQL as a store: what it refuses, what of its types it keeps, and what it sees of others that write."""

import numpy as np
import pytest

from polyspan.errors import UnreadableFile, WrongContent
from polyspan.integrations import Encoder, PostgresTable, Upgrade

N, D, WIDER = 120, 6, 9
RNG = np.random.default_rng(0)
OLD = RNG.normal(size=(N, D)).astype(np.float32)
NEW = (OLD @ RNG.normal(size=(D, WIDER))).astype(np.float32)
TEXTS = [f"text {i}" for i in range(N)]
SPACE, WORK = {"model": "new", "dim": WIDER, "normalized": False}, {"map": "m"}


def encoder():
    return Encoder("new-model", lambda texts: NEW[[int(text.split()[1]) for text in texts]])


@pytest.fixture
def docs(postgres, postgres_docs):
    """Make the table ``docs`` with vectors of a kind and open it; ``run`` is what others do to it."""
    tables = []

    def opened(name="docs", address=postgres):
        tables.append(PostgresTable(address, name, text_column="body"))
        return tables[-1]

    def made(kind="real[]"):
        made.run = postgres_docs(range(N), TEXTS, OLD, kind).execute
        return opened()

    made.again, made.address = opened, postgres
    yield made
    for table in tables:
        table.close()


def begun(folder, table, strategy="re-embed"):
    upgrade = Upgrade(folder, table, encoder=encoder())
    upgrade.plan(n_anchors=60, k=3, old_model="old-model")
    upgrade.begin(strategy)
    upgrade.fill(verbose=False)
    return upgrade


CHANGES = {
    "vector": "UPDATE docs SET v[2] = 9 WHERE id = 3",
    "text": "UPDATE docs SET body = 'text 9' WHERE id = 3",
}


@pytest.mark.parametrize("what", [*CHANGES, "next"])
def test_a_row_that_changes_after_the_check_is_refused_at_the_cut_over(tmp_path, docs, what):
    upgrade = begun(tmp_path, docs())
    assert upgrade.check().ok
    docs.run(CHANGES.get(what, "UPDATE docs SET v__next[1] = 9 WHERE id = 3"))
    with pytest.raises(ValueError, match="must not change between check and cut-over"):
        upgrade.cut_over()


@pytest.mark.parametrize("kind", ["real[]", "double precision[]", f"vector({D})", f"halfvec({D})"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_row_that_changes_after_the_fill_is_pending_again(tmp_path, docs, kind, what):
    upgrade = begun(tmp_path, docs(kind))
    assert upgrade.table.facts().n_pending == 0
    other = "[" + ",".join("9" * D) + "]"
    vector = other if "[" not in kind else other.replace("[", "{").replace("]", "}")
    docs.run(CHANGES["text"] if what == "text" else f"UPDATE docs SET v = '{vector}', body = 'text 9' WHERE id = 3")
    assert upgrade.table.facts().n_pending == 1
    seen = upgrade.check()
    assert seen.n_missing == 1
    assert not seen.ok
    assert upgrade.fill(verbose=False) == 1
    assert upgrade.check().ok
    upgrade.cut_over()
    found = dict(docs.run("SELECT id, v::real[] FROM docs").fetchall())
    np.testing.assert_allclose(found[3], NEW[9], rtol=2e-3, atol=2e-3)


def test_a_vector_that_changes_between_reading_and_filling_is_still_pending(docs):
    table = docs()
    table.prepare(WIDER, SPACE, WORK)
    batch = next(iter(table.pending()))
    docs.run(CHANGES["vector"])
    table.fill(batch, NEW)
    assert table.facts().n_pending == 1
    assert [list(b.keys) for b in table.pending()] == [[3]]
    with pytest.raises(ValueError, match="got 1 rows without one of theirs"):
        table.seal()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("v = NULL", "at id 3: found a null vector"),
        ("body = NULL", "at body of id 3: found a null text"),
        ("v[2] = 'NaN'", "at the vector of 3: found NaN or infinity"),
        ("v[2] = '-Infinity'", "at the vector of 3: found NaN or infinity"),
        ("v = v || 1::real", "at v of id 3: found a vector of 7 numbers; expected 6"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_id(docs, change, message):
    table = docs()
    docs.run(f"UPDATE docs SET {change} WHERE id = 3")
    with pytest.raises(WrongContent, match=message):
        list(table.rows())


def test_what_the_server_refuses_is_said_in_one_line(docs):
    docs()
    docs.run("CREATE VIEW seen AS SELECT * FROM docs")
    with pytest.raises(UnreadableFile, match=r"seen: found ALTER action ADD COLUMN .* that this user may read and"):
        docs.again("seen").prepare(WIDER, SPACE, WORK)
    docs.run("DROP ROLE IF EXISTS reader")
    docs.run("CREATE ROLE reader LOGIN")
    docs.run("GRANT SELECT ON docs TO reader")
    try:
        table = docs.again(address=docs.address.replace("postgres@", "reader@"))
        assert table.facts().n_rows == N
        for write in (lambda: table.stamp(SPACE), lambda: table.prepare(WIDER, SPACE, WORK)):
            with pytest.raises(UnreadableFile, match=r"docs: found must be owner of \w+ docs;"):
                write()
    finally:
        docs.run("DROP OWNED BY reader")
        docs.run("DROP ROLE reader")


def test_numbers_of_double_precision_keep_their_digits(docs):
    table = docs("double precision[]")
    docs.run("UPDATE docs SET v[1] = 0.1::double precision, v[2] = 1e-60")
    table.prepare(WIDER, SPACE, WORK)
    for batch in table.pending():
        assert batch.rows.dtype == np.float64
        assert batch.rows[0, 0] == 0.1
        table.fill(batch, np.tile(batch.rows, 2)[:, :WIDER])
    table.seal()
    assert next(table.pairs())[1][5, 6] == 0.1


def test_forgetting_leaves_the_columns_of_the_user(docs):
    table = docs()
    named = "SELECT attname FROM pg_attribute WHERE attrelid = 'docs'::regclass AND attnum > 0 AND NOT attisdropped"
    for verbs in (["forget"], ["cut over", "forget"], ["cut over", "roll back", "forget"]):
        table.prepare(WIDER, SPACE, WORK)
        for batch in table.pending():
            table.fill(batch, NEW)
        for verb in verbs:
            table.switch(verb)
        assert [name for (name,) in docs.run(named)] == ["id", "body", "v"]


def test_what_postgres_cannot_serve_is_named(docs):
    docs()
    with pytest.raises(WrongContent, match="a column nothing"):
        PostgresTable(docs.address, "docs", text_column="nothing")
    with pytest.raises(WrongContent, match="a table that this user may read"):
        PostgresTable(docs.address, "none")
    with pytest.raises(UnreadableFile, match="a server that answers") as caught:
        PostgresTable("postgresql://me:secret@/postgres?host=/nowhere", "docs")
    assert "secret" not in str(caught.value)
    docs.run("DROP TABLE IF EXISTS twins")
    docs.run("CREATE TABLE twins AS SELECT 'a' AS id, body, v FROM docs LIMIT 2")
    with pytest.raises(WrongContent, match="1 ids missing or repeated"):
        docs.again("twins").prepare(WIDER, SPACE, WORK)


@pytest.mark.parametrize(("kind", "operators"), [("vector", "vector_l2_ops"), ("halfvec", "halfvec_cosine_ops")])
def test_vectors_of_pgvector_and_the_metric_of_their_index_are_known(docs, kind, operators):
    table = docs(f"{kind}({D})")
    docs.run(f"CREATE INDEX ON docs USING hnsw (v {operators})")
    assert table.facts().metric == operators.split("_")[1]
    table.prepare(WIDER, SPACE, WORK)
    for batch in table.pending():
        table.fill(batch, NEW)
    table.seal()
    for _, rows in table.pairs():
        np.testing.assert_allclose(rows, NEW, rtol=2e-3, atol=2e-3)
    table.switch("cut over")
    assert table.facts().dim == WIDER
    assert docs.run(
        "SELECT atttypmod FROM pg_attribute WHERE attrelid = 'docs'::regclass AND attname = 'v'"
    ).fetchone() == (WIDER,)


def test_an_item_that_changes_after_it_was_embedded_again_is_embedded_once_more(tmp_path, docs):
    upgrade = Upgrade(tmp_path, docs(), encoder=encoder())
    upgrade.plan(n_anchors=60, k=3, old_model="old-model")
    upgrade.begin("backfill", share=0.9)
    upgrade.fill(verbose=False)

    def embedded(row, new):
        return np.allclose(docs.run("SELECT v__next FROM docs WHERE id = %s", [row]).fetchone()[0], new, atol=1e-4)

    row = next(i for i in range(N) if embedded(i, NEW[i]))
    docs.run(f"UPDATE docs SET v = ARRAY(SELECT unnest(v) FROM docs WHERE id = 9), body = 'text 9' WHERE id = {row}")
    assert upgrade.fill(verbose=False) == 2, "carried, then embedded"
    assert embedded(row, NEW[9])
    seen = upgrade.check()
    assert (seen.n_missing, seen.n_wrong) == (0, 0)


def test_what_is_filled_while_rows_are_read_is_there_to_stay(docs):
    table = docs()
    table.prepare(WIDER, SPACE, WORK)
    rows = table.rows(40)
    for _ in range(2):
        table.fill(next(rows), NEW[:40])
    filled = "SELECT count(*) FROM docs WHERE v__next IS NOT NULL"
    assert docs.run(filled).fetchone() == (80,), "as others see it, whatever becomes of the reader"
    assert [len(batch.keys) for batch in rows] == [40]
