"""One upgrade, one model, one map; and recall as the store's own metric finds it."""

import numpy as np
import pytest
from scipy.stats import ortho_group
from sklearn.model_selection import KFold

from polyspan.align import OrthogonalMap, RidgeMap, plan_upgrade
from polyspan.cli import run
from polyspan.integrations import Encoder, FaissTable, FileTable, Upgrade
from polyspan.io import read_array, write_array
from polyspan.linalg import recall_at_k, top_k

N, D = 200, 6
RNG = np.random.default_rng(0)
NEW = RNG.normal(size=(N, D)).astype(np.float32)
OLD = NEW @ ortho_group.rvs(D, random_state=0).astype(np.float32) + 0.3 * RNG.normal(size=(N, D)).astype(np.float32)
TEXTS = [str(i) for i in range(N)]


def encoder(name="new-model", rows=NEW):
    return Encoder(name, lambda texts: rows[[int(text) for text in texts]])


def upgrade(tmp_path, made_by=None):
    if not (tmp_path / "x.npy").exists():
        write_array(tmp_path / "x.npy", OLD)
    return Upgrade(tmp_path / "state", FileTable(tmp_path / "x.npy"), encoder=made_by or encoder(), texts=TEXTS)


def half_filled(tmp_path, strategy):
    begun = upgrade(tmp_path)
    begun.plan(n_anchors=40, k=3, candidates={"one": OrthogonalMap()}, backfill_shares=())
    begun.begin(strategy)
    make, batch = begun._maker(strategy), next(iter(begun.table.pending(N // 2)))
    begun.table.fill(batch, make(batch))
    begun.table.sync()
    return begun


def test_another_model_does_not_go_on_with_what_one_has_begun(tmp_path):
    half_filled(tmp_path, "re-embed")
    other = encoder("other-model", NEW[:, ::-1])
    with pytest.raises(ValueError, match="encoder must be new-model, which was planned for, to fill, got other-model"):
        upgrade(tmp_path, other).fill(verbose=False)
    assert upgrade(tmp_path).fill(verbose=False) == N // 2, "what was made before is kept"
    with pytest.raises(ValueError, match="encoder must be new-model, which was planned for, to check, got other-model"):
        upgrade(tmp_path, other).check()
    assert upgrade(tmp_path).check().ok


def test_a_map_that_was_replaced_does_not_go_on_with_what_another_has_begun(tmp_path):
    begun = half_filled(tmp_path, "gallery")
    place = tmp_path / "state" / "gallery_map.safetensors"
    kept = place.read_bytes()
    RidgeMap().fit(OLD[:50], NEW[:50]).save(place)
    for step in (begun.fill, begun.check):
        with pytest.raises(ValueError, match="must hold the map that the upgrade was begun with, got another"):
            step()
    place.write_bytes(kept)
    assert begun.fill(verbose=False) == N // 2
    assert begun.check().ok


def test_a_plan_does_not_take_the_place_of_one_that_is_under_way(tmp_path):
    begun = half_filled(tmp_path, "gallery")
    kept = {path: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    with pytest.raises(ValueError, match="must hold no upgrade that is under way, got one by strategy gallery; end it"):
        begun.plan(n_anchors=40, k=3, seed=1)
    assert {path: path.read_bytes() for path in (tmp_path / "state").iterdir()} == kept
    begun.forget()
    assert begun.plan(n_anchors=40, k=3, seed=1, candidates={"one": OrthogonalMap()}).n_anchors == 40


def test_a_check_without_the_encoder_embeds_nothing(tmp_path):
    half_filled(tmp_path, "re-embed").fill(verbose=False)
    seen = Upgrade(tmp_path / "state", FileTable(tmp_path / "x.npy")).check()
    assert seen.ok, seen.problems
    assert (seen.n_rows, seen.n_missing, seen.n_compared) == (N, 0, 0)


def test_a_refused_plan_leaves_the_encoder_that_was_planned_for(tmp_path, capsys, monkeypatch):
    write_array(tmp_path / "x.npy", OLD)
    write_array(tmp_path / "new.npy", NEW)
    (tmp_path / "texts.txt").write_text("".join(f"{i}\n" for i in range(N)))
    (tmp_path / "two_models.py").write_text(
        "import numpy as np\n"
        f"NEW = np.load({str(tmp_path / 'new.npy')!r})\n"
        "def one(texts):\n    return NEW[[int(text) for text in texts]]\n"
        "def broken(texts):\n    return NEW[: len(texts)] * np.nan\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    store, state = str(tmp_path / "x.npy"), str(tmp_path / "state")
    words = [
        "upgrade",
        "plan",
        store,
        "--texts",
        str(tmp_path / "texts.txt"),
        "--sample",
        "24",
        "-k",
        "3",
        "--state",
        state,
    ]
    assert run([*words, "--encoder", "two_models:one"]) == 0
    assert run([*words, "--encoder", "two_models:broken"]) != 0
    assert run(["upgrade", "apply", state, "--strategy", "re-embed", "--apply"]) == 0
    assert run(["upgrade", "check", state]) == 0, capsys.readouterr()
    assert run(["upgrade", "cutover", state]) == 0
    np.testing.assert_allclose(read_array(store), NEW, atol=1e-6)


def lengthened():
    """Both models say of an item how often it is to be found by its length, which a cosine does not see."""
    lengths = np.exp(RNG.normal(size=(N, 1)))
    return (lengths * OLD).astype(np.float32), (lengths * NEW).astype(np.float32)


def recall_of_folds(queries, gallery, new, metric, n_splits=3, k=5):
    found, sizes = [], []
    for _, held in KFold(n_splits, shuffle=True, random_state=0).split(new):
        own = np.arange(len(held))
        sizes.append(len(held))
        ours = top_k(queries[held], gallery[held], k, metric=metric, exclude=own).indices
        found.append(recall_at_k(ours, top_k(new[held], new[held], k, metric=metric, exclude=own).indices))
    return np.average(found, weights=sizes)


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_recall_is_that_of_the_metric_that_the_store_has(metric):
    old, new = lengthened()
    options = {"k": 5, "candidates": {"one": OrthogonalMap()}, "backfill_shares": (), "n_splits": 2}
    made = plan_upgrade(old, new, n_rows=N, metric=metric, **options)
    stay = next(row for row in made.table if row.strategy == "stay").recall
    assert stay == pytest.approx(recall_of_folds(old, old, new, metric, n_splits=2), abs=1e-12)
    assert abs(stay - recall_of_folds(old, old, new, "cosine", n_splits=2)) > 0.02
    with pytest.raises(ValueError, match="metric must be one of cosine, dot, euclidean, got 'l2'"):
        plan_upgrade(old, new, n_rows=N, metric="l2", **options)


def test_vectors_that_will_be_normalised_are_measured_so():
    old, new = lengthened()
    new /= np.linalg.norm(new, axis=1, keepdims=True)
    options = {"n_rows": N, "k": 5, "candidates": {"one": RidgeMap()}, "backfill_shares": (), "renormalize": True}
    by_dot, by_cosine = (plan_upgrade(old, new, metric=m, **options) for m in ("dot", "cosine"))
    one, other = ([r.recall for r in m.table if r.strategy == "gallery"] for m in (by_dot, by_cosine))
    np.testing.assert_allclose(one, other, atol=2e-3)


def test_an_index_by_inner_product_is_planned_and_checked_by_it(tmp_path):
    faiss = pytest.importorskip("faiss")
    old, new = lengthened()
    index = faiss.IndexFlatIP(D)
    index.add(old)
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    made = Upgrade(tmp_path / "state", FaissTable(tmp_path / "x.faiss"), encoder=encoder(rows=new), texts=TEXTS)
    told = made.plan(n_anchors=N, k=5, candidates={"one": OrthogonalMap()}, backfill_shares=())
    stay = next(row for row in told.table if row.strategy == "stay").recall
    assert stay == pytest.approx(recall_of_folds(old, old, new, "dot"), abs=1e-12)
    made.begin("gallery")
    made.fill(verbose=False)
    carried = OrthogonalMap().fit(old, new).transform(old)
    assert made.check().recall == pytest.approx(recall_of_folds(new, carried, new, "dot"), abs=0.005)
    assert abs(made.check().recall - recall_of_folds(new, carried, new, "cosine")) > 0.02
