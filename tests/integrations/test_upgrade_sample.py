"""Which text belongs to which vector, when a sample is embedded anew, and rows and disks that cannot be used."""

import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import ortho_group

from polyspan.errors import UnreadableFile, WrongContent
from polyspan.integrations import Encoder, FaissTable, FileTable, LanceTable, QdrantTable, Upgrade
from polyspan.io import write_array

N, D = 120, 8
RNG = np.random.default_rng(0)
OLD = RNG.normal(size=(N, D)).astype(np.float32)
NEW = OLD @ ortho_group.rvs(D, random_state=0).astype(np.float32)
IDS = np.random.default_rng(1).permutation(N)
"""Ids that are row numbers too, but of other rows."""
TEXTS = [f"text {i}" for i in range(N)]
BY_ID = {int(key): TEXTS[row] for row, key in enumerate(IDS)}


def encoder(calls=None, name="new", turn=1.0):
    def encode(texts):
        if calls is not None:
            calls.append(len(texts))
        return turn * NEW[[int(text.split()[1]) for text in texts]]

    return Encoder(name, encode)


def with_ids(kind, folder):
    if kind == "parquet":
        lists = pa.FixedSizeListArray.from_arrays(pa.array(OLD.ravel()), D)
        pq.write_table(pa.table({"id": IDS, "vector": lists}), folder / "x.parquet")
        return FileTable(folder / "x.parquet")
    faiss = pytest.importorskip("faiss")
    if kind == "ivf":
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(D), D, 3)
        index.train(OLD)
    else:
        index = faiss.IndexIDMap2(faiss.IndexFlatL2(D))
    index.add_with_ids(OLD, IDS)
    faiss.write_index(index, str(folder / "x.faiss"))
    return FaissTable(folder / "x.faiss")


@pytest.mark.parametrize("kind", ["parquet", "ids", "ivf"])
@pytest.mark.parametrize("strategy", ["backfill", "re-embed"])
def test_texts_by_id_belong_to_the_vectors_of_these_ids(tmp_path, kind, strategy):
    table = with_ids(kind, tmp_path)
    upgrade = Upgrade(tmp_path / "state", table, encoder=encoder(), texts=BY_ID)
    made = upgrade.plan(n_anchors=60, k=3)
    assert not any("belong together" in warning for warning in made.warnings)
    upgrade.begin(strategy, share=0.5 if strategy == "backfill" else None)
    upgrade.fill(verbose=False)
    assert upgrade.check().ok
    old = np.concatenate([batch.rows for batch in table.rows()])
    new = np.concatenate([rows for _, rows in table.pairs()])
    place = [int(np.flatnonzero((row == OLD).all(axis=1))[0]) for row in old]
    np.testing.assert_allclose(new, NEW[place], atol=1e-3)


def test_a_list_of_texts_has_one_a_row_of_a_file(tmp_path):
    path = write_array(tmp_path / "x.npy", OLD)
    Upgrade(tmp_path / "s", FileTable(path), encoder=encoder(), texts=TEXTS).plan(n_anchors=60, k=3)
    with pytest.raises(ValueError, match="texts must have one a row, 120, got 121"):
        Upgrade(tmp_path / "s", FileTable(path), encoder=encoder(), texts=["head", *TEXTS]).plan(n_anchors=60, k=3)
    lancedb = pytest.importorskip("lancedb")
    lists = pa.FixedSizeListArray.from_arrays(pa.array(OLD.ravel()), D)
    lancedb.connect(str(tmp_path)).create_table("docs", pa.table({"id": range(N), "vector": lists}))
    with pytest.raises(ValueError, match="texts must be a mapping by id"):
        Upgrade(tmp_path / "t", LanceTable(tmp_path, "docs"), encoder=encoder(), texts=TEXTS).plan(n_anchors=60)


def test_a_sample_is_embedded_anew_where_texts_or_the_encoder_changed(tmp_path):
    path, calls = write_array(tmp_path / "x.npy", OLD), []

    def planned(texts, **options):
        calls.clear()
        upgrade = Upgrade(tmp_path / "s", FileTable(path), encoder=encoder(calls, **options), texts=texts)
        return upgrade.plan(n_anchors=60, k=3), sum(calls)

    wrong = [TEXTS[i] for i in np.random.default_rng(2).permutation(N)]
    made, n = planned(wrong)
    assert n == 60
    assert any("belong together" in warning for warning in made.warnings)
    made, n = planned(TEXTS)
    assert n == 60, "texts that were mended count"
    assert not any("belong together" in warning for warning in made.warnings)
    assert planned(TEXTS)[1] == 4, "of a sample that is the same a few are asked again"
    assert planned(TEXTS, turn=-1.0)[1] == 64, "an encoder of the same name that is another"
    assert planned(TEXTS, turn=-1.0)[1] == 4


@pytest.mark.parametrize("kind", ["faiss", "lance", "qdrant"])
def test_a_vector_with_nan_is_named_before_anything_is_planned(tmp_path, kind):
    rows = OLD.copy()
    rows[17, 3] = np.inf if kind == "qdrant" else np.nan  # Qdrant takes no NaN
    if kind == "faiss":
        faiss = pytest.importorskip("faiss")
        index = faiss.IndexFlatL2(D)
        index.add(rows)
        faiss.write_index(index, str(tmp_path / "x.faiss"))
        table = FaissTable(tmp_path / "x.faiss")
    elif kind == "lance":
        lancedb = pytest.importorskip("lancedb")
        lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), D)
        lancedb.connect(str(tmp_path)).create_table(
            "docs", pa.table({"id": range(N), "vector": lists}), on_bad_vectors="fill", fill_value=np.inf
        )
        table = LanceTable(tmp_path)
    else:
        qdrant = pytest.importorskip("qdrant_client")
        client, m = qdrant.QdrantClient(":memory:"), qdrant.models
        client.create_collection("docs", vectors_config=m.VectorParams(size=D, distance=m.Distance.DOT))
        client.upsert("docs", [m.PointStruct(id=i, vector=rows[i].tolist()) for i in range(N)])
        table = QdrantTable("", "docs", client=client)
    with pytest.raises(WrongContent, match="the vector of 17: found NaN or infinity"):
        Upgrade(tmp_path / "s", table, encoder=encoder(), texts=dict(enumerate(TEXTS))).plan(n_anchors=60, k=3)


def test_a_text_column_that_is_not_there_is_named_at_once(tmp_path):
    with_ids("parquet", tmp_path)
    with pytest.raises(WrongContent, match="no column 'Text'"):
        FileTable(tmp_path / "x.parquet", text_column="Text")


def test_what_faiss_cannot_read_or_write_is_said_without_its_source(tmp_path):
    faiss = pytest.importorskip("faiss")
    (tmp_path / "bad.faiss").write_bytes(b"xxxx")
    with pytest.raises(WrongContent, match="found Index type 0x78787878"):
        FaissTable(tmp_path / "bad.faiss")
    index = faiss.IndexHNSWFlat(D, 8)
    index.add(OLD)
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    table = FaissTable(tmp_path / "x.faiss")
    table.prepare(D, {"model": "new", "dim": D, "normalized": False}, {"map": "m"})
    for batch in table.pending():
        table.fill(batch, batch.rows)
    table.sync()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))  # as a disk that is full; a signal that Python ignores
    try:
        with pytest.raises(UnreadableFile, match=r"next\.faiss: found write error in .*a place that can be written"):
            table.seal()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "x.faiss.upgrade").glob("*.tmp")] == []
    assert faiss.read_index(str(tmp_path / "x.faiss")).ntotal == N
    table = FaissTable(tmp_path / "x.faiss")
    with pytest.raises(
        ValueError, match="must have next vectors that are sealed, got 120 of 120 filled in; fill again"
    ):
        next(table.pairs())
    table.seal()
    assert table.facts().n_pending == 0


def test_a_fill_that_did_not_end_is_no_good_check(tmp_path, monkeypatch):
    lancedb = pytest.importorskip("lancedb")
    lists = pa.FixedSizeListArray.from_arrays(pa.array(OLD.ravel()), D)
    lancedb.connect(str(tmp_path)).create_table("docs", pa.table({"id": range(N), "vector": lists}))
    upgrade = Upgrade(tmp_path / "s", LanceTable(tmp_path), encoder=encoder(), texts=dict(enumerate(TEXTS)))
    upgrade.plan(n_anchors=60, k=3)
    upgrade.begin("gallery")
    with monkeypatch.context() as patched:
        patched.setattr(LanceTable, "seal", lambda table: (_ for _ in ()).throw(OSError("no room")))
        with pytest.raises(OSError, match="no room"):
            upgrade.fill(verbose=False)
    seen = upgrade.check()
    assert (seen.n_missing, seen.n_wrong, seen.ok) == (0, 0, False)
    assert seen.problems == ["the fill has not come to its end: fill again"]
    upgrade.fill(verbose=False)
    assert upgrade.check().ok


@pytest.mark.parametrize("suffix", [".npy", ".faiss"])
def test_what_was_embedded_for_a_file_before_the_end_came_is_not_embedded_twice(tmp_path, suffix):
    if suffix == ".npy":
        path = write_array(tmp_path / "x.npy", OLD)
    else:
        faiss, path = pytest.importorskip("faiss"), tmp_path / "x.faiss"
        index = faiss.IndexFlatL2(D)
        index.add(OLD)
        faiss.write_index(index, str(path))
    opened = FaissTable if suffix == ".faiss" else FileTable
    upgrade = Upgrade(tmp_path / "s", opened(path), encoder=encoder(), texts=TEXTS)
    upgrade.plan(n_anchors=60, k=3)
    upgrade.begin("re-embed")
    calls = []

    def cut_off(texts):
        if len(calls) == 3:
            # As after a kill: nothing more is said to the store.
            upgrade.table.sync = lambda: None
            raise KeyboardInterrupt
        calls.append(len(texts))
        return NEW[[int(text.split()[1]) for text in texts]]

    upgrade.encoder = Encoder("new", cut_off)
    with pytest.raises(KeyboardInterrupt):
        upgrade.fill(batch_rows=20, verbose=False)
    again = Upgrade(tmp_path / "s", opened(path), encoder=encoder(), texts=TEXTS)
    assert again.table.facts().n_pending == N - 60
    assert again.fill(batch_rows=20, verbose=False) == N - 60
    assert again.check().ok
