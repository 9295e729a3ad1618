import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import ortho_group

from polyspan.align import load_aligner
from polyspan.cli import run
from polyspan.cli.upgrade import apply, check, cutover, plan, rollback
from polyspan.errors import UnreadableFile, WrongContent
from polyspan.io import read_array, write_array

N, D = 300, 10
RNG = np.random.default_rng(0)
OLD = RNG.normal(size=(N, D)).astype(np.float32)
NEW = OLD @ ortho_group.rvs(D, random_state=0).astype(np.float32) + 0.2 * RNG.normal(size=(N, D)).astype(np.float32)
MODULE = """
from polyspan.io import read_array
NEW = read_array({path!r})
def encode(texts):
    return NEW[[int(text.split()[1]) for text in texts]]
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    write_array(tmp_path / "new.npy", NEW)
    (tmp_path / "upgrade_encoder.py").write_text(MODULE.format(path=str(tmp_path / "new.npy")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "upgrade_encoder", raising=False)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(OLD.ravel()), D)
    texts = [f"text {i}" for i in range(N)]
    pq.write_table(pa.table({"id": range(N), "text": texts, "vector": lists}), tmp_path / "x.parquet")
    return tmp_path


def planned(files, **options):
    plan(str(files / "x.parquet"), encoder="upgrade_encoder:encode", text_column="text", sample=150, k=5, **options)
    return files / "x.parquet.upgrade"


def test_a_store_is_planned_filled_checked_cut_over_and_rolled_back(files, capsys):
    state = planned(files, old_model="old", price=2.0, json=True, plot=files / "plan.svg")
    told = json.loads(capsys.readouterr().out)
    assert {row["strategy"] for row in told["table"]} == {"stay", "query", "gallery", "backfill", "re-embed"}
    assert (files / "plan.svg").stat().st_size > 1000
    before = (files / "x.parquet").read_bytes()
    apply(state, strategy="gallery")
    assert "polyspan upgrade apply" in capsys.readouterr().out
    assert not (state / "next.parquet").exists(), "nothing is written before --apply"
    apply(state, strategy="gallery", apply=True)
    assert (files / "x.parquet").read_bytes() == before
    capsys.readouterr()
    assert check(state, json=True) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    cutover(state)
    assert "in use\t300 vectors of upgrade_encoder:encode, 10 wide" in capsys.readouterr().out
    assert (files / "x.parquet").read_bytes() != before
    rollback(state, json=True)
    assert json.loads(capsys.readouterr().out)["in_use"]["model"] == "old"
    assert (files / "x.parquet").read_bytes() == before


def test_a_backfill_loads_the_encoder_by_itself_and_forgetting_is_asked_for(files, capsys):
    state = planned(files)
    apply(state, strategy="backfill", share=0.5, apply=True, batch_rows=64)
    assert check(state) == 0
    cutover(state)
    assert (state / "before.parquet").exists()
    cutover(state, forget=True)
    assert not (state / "before.parquet").exists()
    exact = np.linalg.norm(read_array(files / "x.parquet", column="vector") - NEW, axis=1) < 1e-4
    assert 0.35 < exact.mean() < 0.65
    assert "verdict\tgood" in capsys.readouterr().out


def test_a_failed_check_is_exit_code_one(files, capsys):
    state = planned(files)
    apply(state, strategy="gallery", apply=True)
    assert run(["upgrade", "check", str(state), "--bound", "0.9999"]) == 1
    assert "below the bound" in capsys.readouterr().out


def test_queries_are_carried_by_a_map_or_by_the_index_itself(files, capsys):
    state = planned(files)
    capsys.readouterr()
    apply(state, strategy="query", apply=True, json=True)
    assert json.loads(capsys.readouterr().out)["map"] == str(state / "query_map.safetensors")
    assert (state / "query_map.safetensors").exists()
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatL2(D)
    index.add(OLD)
    faiss.write_index(index, str(files / "x.faiss"))
    (files / "texts.txt").write_text("\n".join(f"text {i}" for i in range(N)))
    plan(str(files / "x.faiss"), encoder="upgrade_encoder:encode", texts=files / "texts.txt", sample=150, k=5)
    apply(files / "x.faiss.upgrade", strategy="query", apply=True)
    wrapped = faiss.read_index(str(files / "x.faiss.upgrade" / "with_queries.faiss"))
    assert (wrapped.search(NEW, 1)[1][:, 0] == np.arange(N)).mean() > 0.8


def index_file(path, kind):
    faiss = pytest.importorskip("faiss")
    if kind == "pq":
        index = faiss.IndexPQ(D, 5, 3)
    elif kind == "ivf":
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(D), D, 4)
    else:
        index = faiss.IndexHNSWFlat(D, 8) if kind == "hnsw" else faiss.IndexFlatL2(D)
    index.train(OLD)
    index.add(OLD)
    faiss.write_index(index, str(path))
    (path.parent / "texts.txt").write_text("\n".join(f"text {i}" for i in range(N)))
    return path


def plan_index(path, **options):
    plan(str(path), encoder="upgrade_encoder:encode", texts=path.parent / "texts.txt", sample=150, k=5, **options)
    return path.with_name(path.name + ".upgrade")


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_an_index_of_whole_vectors_is_filled_checked_cut_over_and_rolled_back(files, capsys, kind):
    path = index_file(files / "x.faiss", kind)
    before, state = path.read_bytes(), plan_index(path, old_model="old")
    apply(state, strategy="gallery", apply=True)
    assert path.read_bytes() == before
    assert check(state) == 0
    cutover(state)
    assert "in use\t300 vectors of upgrade_encoder:encode, 10 wide" in capsys.readouterr().out
    assert path.read_bytes() != before
    rollback(state)
    assert "in use\t300 vectors of old, 10 wide" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_an_index_of_codes_is_asked_through_the_map_and_never_written(files, capsys):
    faiss = pytest.importorskip("faiss")
    path = index_file(files / "x.faiss", "pq")
    before, state = path.read_bytes(), plan_index(path, old_model="old", json=True)
    caught = capsys.readouterr()
    told = json.loads(caught.out)
    assert {row["strategy"] for row in told["table"]} == {"stay", "query"}
    assert told["table"][told["recommended"]]["strategy"] == "query"
    assert "the index holds codes" in caught.err
    for strategy in ("gallery", "backfill", "re-embed"):
        assert run(["upgrade", "apply", str(state), "--strategy", strategy, "--apply"]) == 2
        assert "strategy must be query for an index of codes" in capsys.readouterr().err
    apply(state)
    assert not (state / "with_queries.faiss").exists(), "nothing is written before --apply"
    for _ in range(2):
        apply(state, apply=True)
        assert f"carries queries\t{state / 'with_queries.faiss'}" in capsys.readouterr().out
    for step in ("check", "cutover", "rollback"):
        assert run(["upgrade", step, str(state)]) == 2
        assert "strategy must be gallery, backfill or re-embed" in capsys.readouterr().err
    old, wrapped = faiss.read_index(str(path)), faiss.read_index(str(state / "with_queries.faiss"))
    aligner, _ = load_aligner(state / "query_map.safetensors")
    carried = old.search(np.ascontiguousarray(aligner.transform(NEW), np.float32), 5)
    np.testing.assert_array_equal(wrapped.search(NEW, 5)[1], carried[1])
    cutover(state, forget=True)
    assert "nothing: the store holds only vectors in use" in capsys.readouterr().out
    assert path.read_bytes() == before


@pytest.mark.parametrize("several", [False, True])
def test_ids_and_labels_beside_the_vectors_of_a_file_are_kept(files, capsys, several):
    path = files / "x.npz"
    kept = {"ids": np.array([f"k{i}" for i in range(N)]), "labels": np.arange(N) % 3}
    if several:
        kept["images"] = OLD[:, :4]
    np.savez(path, vectors=OLD, **kept)
    (files / "texts.txt").write_text("\n".join(f"text {i}" for i in range(N)))
    given = ["upgrade", "plan", str(path), "--encoder", "upgrade_encoder:encode", "--texts", str(files / "texts.txt")]
    given += ["--sample", "150", "-k", "5", "--old-model", "old"]
    if several:
        assert run(given) != 0
        assert "images, vectors" in capsys.readouterr().err
        given += ["--member", "vectors"]
    assert not run(given)
    before, state = path.read_bytes(), files / "x.npz.upgrade"
    apply(state, strategy="gallery", apply=True)
    assert check(state) == 0
    cutover(state)
    assert "in use\t300 vectors of upgrade_encoder:encode, 10 wide" in capsys.readouterr().out
    with np.load(path) as found:
        assert found.files == ["vectors", *kept]
        assert not np.array_equal(found["vectors"], OLD)
        for name, array in kept.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    rollback(state)
    assert path.read_bytes() == before


def test_texts_and_labels_come_from_files(files, capsys):
    write_array(files / "x.npy", OLD)
    rows = [json.dumps({"id": i, "text": f"text {i}"}) for i in range(N)]
    (files / "t.jsonl").write_text("\n".join(rows) + "\n")
    (files / "t.csv").write_text("id,text\n" + "\n".join(f"{i},text {i}" for i in range(N)) + "\n")
    write_array(files / "y.npy", np.arange(N) % 3)
    for name in ("t.jsonl", "t.csv"):
        plan(
            str(files / "x.npy"),
            encoder="upgrade_encoder:encode",
            texts=files / name,
            labels=files / "y.npy",
            sample=120,
            state=files / f"state-{name}",
        )
    assert "recommended:" in capsys.readouterr().out
    (files / "bad.csv").write_text("id,words\n1,a\n")
    with pytest.raises(WrongContent, match="a column text"):
        plan(str(files / "x.npy"), encoder="upgrade_encoder:encode", texts=files / "bad.csv")
    with pytest.raises(ValueError, match=r"--texts must end in \.jsonl"):
        plan(str(files / "x.npy"), encoder="upgrade_encoder:encode", texts=files / "t.xml")


def test_what_cannot_be_done_is_named(files, capsys):
    with pytest.raises(ValueError, match="an address without a password"):
        plan("postgresql://me:secret@host/db", encoder="upgrade_encoder:encode", table="t")
    with pytest.raises(UnreadableFile, match="the folder that polyspan upgrade plan named"):
        check(files / "nowhere")
    with pytest.raises(UnreadableFile, match="found a plan alone"):
        check(planned(files))
    assert run(["upgrade", "rollback", str(planned(files))]) == 2
    assert "must have been cut over" in capsys.readouterr().err


def test_the_query_strategy_says_that_it_has_no_next_vectors(files, capsys):
    state = planned(files)
    apply(state, strategy="query")
    assert "the store gets a stamp if it has none" in capsys.readouterr().out
    apply(state, strategy="query", apply=True)
    for step in (check, cutover, rollback):
        with pytest.raises(ValueError, match=r"it has no next vectors; carry .*query_map\.safetensors"):
            step(state)


def test_forgetting_says_whether_there_was_anything_to_remove(files, capsys):
    state = planned(files)
    apply(state, strategy="gallery", apply=True)
    capsys.readouterr()
    cutover(state, forget=True)
    assert "the vectors that are not in use" in capsys.readouterr().out
    cutover(state, forget=True)
    assert "nothing: the store holds only vectors in use" in capsys.readouterr().out
