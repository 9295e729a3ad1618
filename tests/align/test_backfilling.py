import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyspan.align import backfill_batches, backfill_curve, backfill_distances, backfill_order
from polyspan.align.backfilling_plots import plot_backfilling
from polyspan.errors import WrongContent
from polyspan.io import write_text
from polyspan.linalg import mean_average_precision


def gallery(n=90, d=5, n_classes=4, seed=0):
    """Lifted and renewed rows of one gallery, and labels; the lifted ones are blurred by unequal amounts."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n)
    renewed = 2 * rng.normal(size=(n_classes, d))[labels] + 0.5 * rng.normal(size=(n, d))
    return renewed + rng.exponential(size=(n, 1)) * rng.normal(size=(n, d)), renewed, labels


@given(
    n=st.integers(1, 40),
    size=st.integers(1, 50),
    metric=st.sampled_from(["euclidean", "cosine"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_distances_in_batches_are_those_of_each_row_from_the_mean_of_its_class(n, size, metric, seed):
    lifted, _, labels = gallery(n, seed=seed)
    found = backfill_distances(lambda: (lifted[i : i + size] for i in range(0, n, size)), labels, metric=metric)
    for row, label, distance in zip(lifted, labels, found, strict=True):
        mean = lifted[labels == label].mean(axis=0)
        if metric == "euclidean":
            expected = np.sqrt(np.sum((row - mean) ** 2))
        else:
            expected = 1 - row @ mean / np.linalg.norm(row) / np.linalg.norm(mean)
        assert distance == pytest.approx(expected, abs=1e-9)


def test_the_order_is_a_permutation_farthest_first_and_equal_rows_keep_their_places():
    lifted, _, labels = gallery()
    order = backfill_order(lifted, labels)
    distances = backfill_distances(lambda: [lifted], labels)
    assert sorted(order) == list(range(len(lifted)))
    assert (np.diff(distances[order]) <= 0).all()
    names = np.array([f"class {label}" for label in labels])
    np.testing.assert_array_equal(backfill_order(lifted.astype(np.float32), names), order)
    np.testing.assert_array_equal(backfill_order(np.ones((7, 3)), np.arange(7) % 2), np.arange(7))
    permuted = np.random.default_rng(1).permutation(len(lifted))
    np.testing.assert_array_equal(permuted[backfill_order(lifted[permuted], labels[permuted])], order)


def test_a_class_of_one_item_is_its_own_mean_and_comes_last():
    lifted, _, labels = gallery(n=20)
    order = backfill_order(lifted, np.r_[labels[:-1], 99])
    assert order[-1] == 19


def test_a_row_of_zeros_has_no_direction_and_stands_at_cosine_distance_one():
    rows = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.2]])
    assert backfill_distances(lambda: [rows], [0, 0, 0], metric="cosine")[0] == 1.0


def test_without_labels_clusters_serve_with_a_warning():
    lifted, _, labels = gallery(n_classes=3)
    lifted = lifted + 50 * np.eye(5)[labels]  # clusters that cannot be missed
    with pytest.warns(UserWarning, match="classes are made by k-means, and what the order gains is uncertain"):
        order = backfill_order(lifted, n_clusters=3)
    np.testing.assert_array_equal(order, backfill_order(lifted, labels))


@pytest.mark.parametrize("metric", ["map", "top1"])
@pytest.mark.parametrize("own", [True, False])
def test_a_curve_is_retrieval_on_the_gallery_as_it_is_at_each_share(metric, own):
    lifted, renewed, labels = gallery()
    queries, _, query_labels = gallery(n=30, seed=5)
    asked, wanted = (renewed, labels) if own else (queries, query_labels)
    given_queries = {} if own else {"queries": queries, "query_labels": query_labels}
    order = np.random.default_rng(2).permutation(len(lifted))
    found = backfill_curve(lifted, renewed, order, labels, shares=(0, 0.5, 1), metric=metric, **given_queries)

    def unit(A):
        return A / np.linalg.norm(A, axis=1, keepdims=True)

    for share, score in zip(found.shares, found.scores, strict=True):
        done = order[: round(share * len(order))]
        mixed = lifted.copy()
        mixed[done] = renewed[done]
        if metric == "map":
            expected = mean_average_precision(asked, mixed, wanted, labels, exclude_self=own)
        else:
            cosines = unit(asked) @ unit(mixed).T
            if own:
                np.fill_diagonal(cosines, -2)
            expected = np.mean(labels[cosines.argmax(axis=1)] == wanted)
        assert score == pytest.approx(expected)
    a, b, c = found.scores
    assert found.area == pytest.approx((a + 2 * b + c) / 4)


def test_to_mend_what_is_lifted_worst_first_is_better_than_last():
    areas = []
    for seed in range(5):
        lifted, renewed, labels = gallery(n=200, seed=seed)
        order = backfill_order(lifted, labels)
        areas.append([backfill_curve(lifted, renewed, way, labels).area for way in (order, order[::-1])])
    first, last = np.mean(areas, axis=0)
    assert first > last + 0.03


def test_interrupted_work_goes_on_with_the_batch_that_was_not_finished(tmp_path):
    order = np.random.default_rng(3).permutation(23)
    journal = tmp_path / "done.journal"
    seen = []
    for i, batch in enumerate(backfill_batches(order, journal, batch_rows=5)):
        if i == 2:
            break  # killed within the third
        seen.append(batch)
    seen += list(backfill_batches(order, journal, batch_rows=4, budget=20))
    np.testing.assert_array_equal(np.concatenate(seen), order[:20])
    assert list(backfill_batches(order, journal, budget=20)) == []
    np.testing.assert_array_equal(np.concatenate(list(backfill_batches(order, journal))), order[20:])


def test_ids_serve_as_an_order_and_a_journal_of_another_order_is_refused(tmp_path):
    ids = np.array(["b", "a", "c"])
    assert [list(batch) for batch in backfill_batches(ids, tmp_path / "j", batch_rows=2)] == [["b", "a"], ["c"]]
    with pytest.raises(ValueError, match="belongs to other work"):
        next(backfill_batches(ids[::-1], tmp_path / "j"))
    write_text(tmp_path / "no", '{"a": 1}\n')
    with pytest.raises(WrongContent, match="header"):
        next(backfill_batches(ids, tmp_path / "no"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": np.zeros(90, dtype=int)}, "order must be a permutation of 0 to 89"),
        ({"order": np.arange(80)}, "order must be a permutation"),
        ({"labels": np.zeros(3)}, "must be of the same items in one space"),
        ({"renewed": np.zeros((90, 4))}, "must be of the same items in one space"),
        ({"shares": (0.5,)}, "shares must ascend within"),
        ({"shares": (0.5, 0.2)}, "shares must ascend within"),
        ({"shares": (0, 1.1)}, "shares must ascend within"),
        ({"metric": "recall"}, "metric must be 'map' or 'top1', got 'recall'"),
        ({"queries": np.zeros((2, 5))}, "queries and query_labels must be given together"),
    ],
)
def test_a_curve_of_things_that_do_not_fit_is_refused(change, message):
    lifted, renewed, labels = gallery()
    with pytest.raises(ValueError, match=message):
        backfill_curve(**{"lifted": lifted, "renewed": renewed, "order": np.arange(90), "labels": labels, **change})


def test_rows_and_labels_that_do_not_fit_are_refused(tmp_path):
    lifted, _, labels = gallery()
    with pytest.raises(ValueError, match=r"got 91 labels for 90 rows$"):
        backfill_order(lifted, np.r_[labels, 0])
    with pytest.raises(ValueError, match="got 89 labels for 90 rows or more"):
        backfill_order(lifted, labels[:-1])
    with pytest.raises(ValueError, match="got 2 labels for 0 rows"):
        backfill_distances(lambda: [], [0, 1])
    with pytest.raises(ValueError, match="metric must be 'euclidean' or 'cosine', got 'dot'"):
        backfill_order(lifted, labels, metric="dot")
    with pytest.raises(ValueError, match="labels must have no NaN, got one at row 4"):
        backfill_order(lifted, np.where(np.arange(len(labels)) == 4, np.nan, labels))
    with pytest.raises(ValueError, match="labels must be of one kind, got NoneType, int"):
        backfill_order(lifted, [None, *labels[1:].tolist()])
    lifted[7, 1] = np.inf
    with pytest.raises(ValueError, match="got NaN or infinity at row 7"):
        backfill_distances(lambda: [lifted[:5], lifted[5:]], labels)
    with pytest.raises(ValueError, match="lifted must be 2-d"):
        backfill_order(np.zeros(4), [0, 0, 1, 1])
    for change, message in (
        ({"batch_rows": 0}, "batch_rows must be at least 1, got 0"),
        ({"budget": -1}, "budget must be at least 0, got -1"),
        ({"order": np.zeros((2, 2))}, r"order must have shape \(n,\), got \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            next(backfill_batches(**{"order": np.arange(3), "journal": tmp_path / "j", **change}))


def test_a_picture_shows_every_order_and_has_equal_bytes_for_equal_curves(tmp_path):
    lifted, renewed, labels = gallery()
    order = backfill_order(lifted, labels)
    curves = {
        name: backfill_curve(lifted, renewed, way, labels)
        for name, way in (("farthest first", order), ("nearest first", order[::-1]))
    }
    first = plot_backfilling(curves, tmp_path / "a.svg", reference=0.9)
    second = plot_backfilling(curves, tmp_path / "b.svg", reference=0.9)
    text = first.read_text()
    assert text == second.read_text()
    assert text.count('id="line2d_') > plot_backfilling(curves, tmp_path / "c.svg").read_text().count('id="line2d_')
    with pytest.raises(ValueError, match=r"must end in .svg, .png or .pdf"):
        plot_backfilling(curves, tmp_path / "a.txt")
    with pytest.raises(ValueError, match="at least one curve"):
        plot_backfilling({}, tmp_path / "a.svg")
