import numpy as np
import pytest
from scipy.stats import ortho_group

from polyspan.align import IdentityMap, OrthogonalMap, RidgeMap, plan_upgrade
from polyspan.align.upgrade_plan import StrategyRow, recommend
from polyspan.align.upgrade_plots import plot_upgrade_plan
from polyspan.linalg import recall_at_k, top_k


def world(seed=0, n=240, d=12, noise=0.0):
    rng = np.random.default_rng(seed)
    old = rng.normal(size=(n, d))
    return old, old @ ortho_group.rvs(d, random_state=seed) + noise * rng.normal(size=(n, d))


def by(plan, strategy, aligner=None):
    return next(r for r in plan.table if r.strategy == strategy and aligner in (None, r.aligner))


def test_a_rotated_space_needs_no_embedding_and_queries_are_carried():
    plan = plan_upgrade(*world(), n_rows=10_000, seconds_per_item=0.01, price_per_item=0.5)
    best = plan.table[plan.recommended]
    assert best.strategy == "query"
    assert best.recall > 0.999
    assert best.n_written == 0
    assert best.cost == 0
    assert by(plan, "re-embed").cost == 5000
    assert by(plan, "re-embed").seconds == 100
    carrying = by(plan, "gallery").seconds
    assert 0 < carrying < 10, "reading, mapping and writing 10,000 short rows"
    assert by(plan, "backfill").seconds == pytest.approx(100 * by(plan, "backfill").share + carrying)
    assert by(plan, "query").seconds == 0
    assert plan.warnings == []
    source, target = world(1)
    assert plan.aligners["query"].transform(target).shape == source.shape


def test_unrelated_spaces_are_embedded_again_and_the_rows_are_doubted():
    rng = np.random.default_rng(0)
    plan = plan_upgrade(rng.normal(size=(200, 8)), rng.normal(size=(200, 6)), n_rows=200)
    assert plan.table[plan.recommended].strategy == "re-embed"
    assert "no cheaper way" in plan.reason
    assert any("do not seem to belong together" in said for said in plan.warnings)


def test_recall_is_that_of_a_literal_leave_one_out_over_the_folds():
    old, new = world(2, n=60, noise=0.4)
    candidates = {"ridge": RidgeMap(1.0)}
    plan = plan_upgrade(old, new, n_rows=60, k=5, candidates=candidates, backfill_shares=(0.25,), random_state=3)
    from sklearn.model_selection import KFold

    found = {"query": [], "gallery": [], "backfill": [], "stay": []}
    rng = np.random.default_rng(3)
    for fitting, held in KFold(3, shuffle=True, random_state=3).split(old):
        own, order = np.arange(len(held)), rng.permutation(len(held))
        true = top_k(new[held], new[held], 5, exclude=own).indices
        back = RidgeMap(1.0).fit(new[fitting], old[fitting]).transform(new[held])
        forth = RidgeMap(1.0).fit(old[fitting], new[fitting]).transform(old[held])
        mixed = forth.copy()
        mixed[order[: round(0.25 * len(held))]] = new[held][order[: round(0.25 * len(held))]]
        sides = {"query": (back, old[held]), "gallery": (new[held], forth), "backfill": (new[held], mixed)}
        sides["stay"] = (old[held], old[held])
        for name, (queries, gallery) in sides.items():
            hits = top_k(queries, gallery, 5, exclude=own).indices
            found[name] += [recall_at_k(hits[i : i + 1], true[i : i + 1]) for i in range(len(held))]
    for name, scores in found.items():
        assert by(plan, name).recall == pytest.approx(np.mean(scores))
        low, high = by(plan, name).interval
        assert low < np.mean(scores) < high


def test_more_embedded_again_never_predicts_less_by_much_and_all_is_one():
    plan = plan_upgrade(*world(4, noise=1.5), n_rows=500, backfill_shares=(0.2, 0.8), candidates={"r": RidgeMap()})
    shares = {row.share: row.recall for row in plan.table if row.strategy in ("gallery", "backfill", "re-embed")}
    assert shares[0.0] < shares[0.8] < shares[1.0] == 1.0


def test_labels_make_recall_a_hit_of_the_same_class():
    rng = np.random.default_rng(5)
    labels = rng.integers(4, size=160)
    centres = 6 * rng.normal(size=(4, 10))
    old = centres[labels] + rng.normal(size=(160, 10))
    new = old @ ortho_group.rvs(10, random_state=5)
    plan = plan_upgrade(old, new, n_rows=160, labels=labels, k=1)
    assert by(plan, "re-embed").recall > 0.95
    assert by(plan, "query", "orthogonal").recall > 0.95


def test_cheaper_is_recommended_within_the_loss_and_not_beyond():
    old, new = world(6, noise=0.8)
    strict = plan_upgrade(old, new, n_rows=300, loss=0.0)
    loose = plan_upgrade(old, new, n_rows=300, loss=0.9)
    assert strict.table[strict.recommended].strategy == "re-embed"
    assert loose.table[loose.recommended].share == 0
    assert loose.table[loose.recommended].strategy == "query"


def test_what_is_suspicious_of_a_sample_is_said():
    old, new = world(7, noise=1.0)
    unit = new / np.linalg.norm(new, axis=1, keepdims=True)
    said = plan_upgrade(old, unit, n_rows=240, candidates={"r": RidgeMap(1.0)}).warnings
    assert "carried ones are not" in " ".join(said)
    old, new = world(7, n=24, d=40)
    said = plan_upgrade(old, new, n_rows=24, candidates={"r": RidgeMap(1.0)}).warnings
    assert "24 anchors leave part of 40 dimensions open" in " ".join(said)
    old = np.vstack([old[:12], old[:12]])
    assert "12 anchors repeat others" in " ".join(
        plan_upgrade(old, new, n_rows=24, candidates={"o": OrthogonalMap()}).warnings
    )


@pytest.mark.parametrize("k", [10, 5])
def test_recall_in_the_store_is_nearer_to_what_comes_out_than_recall_of_the_sample(k):
    """With k = 5 the share that counts is half a row of the sample: only the interval is a promise then."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(8000, 12))
    old, new = (
        (shared @ rng.normal(size=(12, d)) + 0.8 * rng.normal(size=(8000, d))).astype(np.float32) for d in (24, 32)
    )
    sample, asked = np.arange(900), np.arange(900, 1900)
    plan = plan_upgrade(old[sample], new[sample], n_rows=8000, k=k, candidates={"ridge": RidgeMap(1.0)})
    true = top_k(new[asked], new, k, exclude=asked).indices
    sides = {
        "gallery": (new[asked], plan.aligners["gallery"].transform(old)),
        "query": (plan.aligners["query"].transform(new[asked]), old),
        "stay": (old[asked], old),
    }
    for strategy, (queries, gallery) in sides.items():
        came_out = recall_at_k(top_k(queries, gallery, k, exclude=asked).indices, true)
        row = by(plan, strategy)
        assert abs(row.store_recall - came_out) < abs(row.recall - came_out)
        assert row.recall - came_out > 0.1, "a fold has fewer rows to confuse"
        if k == 10:
            assert abs(row.store_recall - came_out) < 0.06
        else:
            assert row.store_interval[0] - 0.02 < came_out < row.store_interval[1] + 0.02
    assert by(plan, "re-embed").store_recall == 1
    assert by(plan, "re-embed").store_interval == (1.0, 1.0)


def test_recall_in_a_store_of_the_sample_alone_is_that_of_held_out_rows_among_all():
    from sklearn.model_selection import KFold

    old, new = world(2, n=60, noise=0.4)
    plan = plan_upgrade(old, new, n_rows=60, k=5, candidates={"ridge": RidgeMap(1.0)}, random_state=3)
    true, scores = top_k(new, new, 5, exclude=np.arange(60)).indices, []
    for fitting, held in KFold(3, shuffle=True, random_state=3).split(old):
        carried = RidgeMap(1.0).fit(old[fitting], new[fitting]).transform(old)
        hits = top_k(new[held], carried, 5, exclude=held).indices
        scores += [recall_at_k(hits[i : i + 1], true[held[i : i + 1]]) for i in range(len(held))]
    row = by(plan, "gallery")
    assert row.store_recall == pytest.approx(np.mean(scores))
    # Percentiles of 1,000 draws stand at 1.96 standard errors of a mean but for a twentieth.
    half = 1.96 * np.std(scores) / np.sqrt(60)
    np.testing.assert_allclose(np.subtract(row.store_interval, row.store_recall), [-half, half], rtol=0.2)
    larger = plan_upgrade(old, new, n_rows=6000, k=5, candidates={"ridge": RidgeMap(1.0)}, random_state=3)
    assert by(larger, "gallery").store_recall < by(plan, "gallery").store_recall
    assert by(larger, "gallery").recall == by(plan, "gallery").recall
    labelled = plan_upgrade(old, new, n_rows=60, k=5, candidates={"ridge": RidgeMap(1.0)}, labels=np.arange(60) % 3)
    assert {(row.store_recall, row.store_interval) for row in labelled.table} == {(None, None)}


def test_recall_in_a_store_twice_the_sample_is_that_at_half_as_many_and_between_two_by_the_logarithm():
    old, new = world(2, n=61, noise=0.4)

    def stay(n_rows, k):
        return by(plan_upgrade(old, new, n_rows=n_rows, k=k, candidates={"ridge": RidgeMap(1.0)}), "stay").store_recall

    own = np.arange(61)

    def literal(k):
        return recall_at_k(top_k(old, old, k, exclude=own).indices, top_k(new, new, k, exclude=own).indices)

    assert stay(121, 8) == pytest.approx(literal(4)), "8 of 120 others are 4 of 60"
    between = literal(2) + (np.log(2.5 / 2) / np.log(3 / 2)) * (literal(3) - literal(2))
    assert stay(121, 5) == pytest.approx(between)
    below = literal(1) - (literal(2) - literal(1))
    assert stay(121, 1) == pytest.approx(max(below, 0.0)), "half a neighbour is one step below one"


def test_a_fall_that_grows_steeper_with_the_store_is_followed():
    """Rows in tight groups: as many as k of a group in the sample are its neighbours whatever the map does to them."""
    rng = np.random.default_rng(0)
    of = rng.integers(100, size=8000)
    shared = 4 * rng.normal(size=(100, 12))[of] + rng.normal(size=(8000, 12))
    old, new = (
        (shared @ rng.normal(size=(12, d)) + 1.5 * rng.normal(size=(8000, d))).astype(np.float32) for d in (24, 32)
    )
    sample = np.arange(800)
    plan = plan_upgrade(old[sample], new[sample], n_rows=8000, k=5, candidates={"ridge": RidgeMap(1.0)})
    asked = np.arange(800, 1800)
    true = top_k(new[asked], new, 5, exclude=asked).indices
    sides = {"query": (plan.aligners["query"].transform(new[asked]), old), "stay": (old[asked], old)}
    for strategy, (queries, gallery) in sides.items():
        came_out = recall_at_k(top_k(queries, gallery, 5, exclude=asked).indices, true)
        assert abs(by(plan, strategy).store_recall - came_out) < 0.06


def test_what_is_recommended_is_judged_for_the_store_where_that_is_known():
    def row(strategy, recall, share, in_store):
        return StrategyRow(strategy, "ridge", recall, (recall, recall), share, 9, 1.0, None, in_store)

    def rows(gallery):
        return [
            row("re-embed", 1.0, 1.0, 1.0),
            row("gallery", 0.97, 0.0, gallery),
            row("stay", 0.5, 0.0, 0.4),
        ]

    assert recommend(rows(0.97), 0.05)[0] == 1
    assert recommend(rows(0.80), 0.05)[0] == 0
    assert recommend(rows(None), 0.05)[0] == 1


def test_a_sample_in_which_chance_finds_much_is_said_to_be_small():
    old, new = world(3, n=60)
    said = plan_upgrade(old, new, n_rows=60, k=10, candidates={"o": OrthogonalMap()}).warnings
    assert "any 10 of the 19 others of a fold hold 53% of the true: sample more" in said
    assert plan_upgrade(old, new, n_rows=60, k=3, candidates={"o": OrthogonalMap()}).warnings == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new": np.zeros((239, 12))}, "one row an item"),
        ({"old": np.full((240, 12), np.nan)}, "old must be finite, got NaN or infinity at row 0"),
        ({"n_rows": 10}, "n_rows must be at least the sample's 240, got 10"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"backfill_shares": (0.0,)}, r"backfill_shares must lie in \(0, 1\)"),
        ({"loss": 1.0}, r"loss must lie in \[0, 1\), got 1.0"),
        ({"labels": np.zeros(3)}, r"labels must have shape \(240,\)"),
        ({"old": np.zeros((9, 12)), "new": np.zeros((9, 12))}, "at least 4 anchors a fold"),
    ],
)
def test_bad_input_is_named(change, message):
    old, new = world()
    given = {"old": old, "new": new, "n_rows": 240} | change
    with pytest.raises(ValueError, match=message):
        plan_upgrade(given.pop("old"), given.pop("new"), **given)


def test_the_picture_has_equal_bytes_for_equal_plans(tmp_path):
    plan = plan_upgrade(*world(), n_rows=240, candidates={"no map": IdentityMap(), "orthogonal": OrthogonalMap()})
    first = plot_upgrade_plan(plan, tmp_path / "a.svg").read_bytes()
    assert plot_upgrade_plan(plan, tmp_path / "b.svg").read_bytes() == first
    with pytest.raises(ValueError, match=r"must end in \.svg"):
        plot_upgrade_plan(plan, tmp_path / "a.gif")
