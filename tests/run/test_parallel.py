import operator
import os
import sys
import time

import numpy as np
import pytest
import threadpoolctl

from polyspan.errors import MissingExtra
from polyspan.run import Journal, map_tasks, n_cores


def test_results_come_in_order_and_equal_for_one_worker_and_two():
    def draw(seed):
        time.sleep(0.05 if seed == 0 else 0)
        A = np.random.default_rng(seed).normal(size=(40, 40))
        return np.linalg.svd(A, compute_uv=False)

    alone, together = (map_tasks(draw, range(6), workers=n, inner_threads=1) for n in (1, 2))
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(alone, [draw(seed) for seed in range(6)])


def test_two_workers_are_two_other_processes_and_one_is_this_one():
    def who(i):
        time.sleep(0.2)
        return os.getpid()

    assert set(map_tasks(who, range(3), workers=1)) == {os.getpid()}
    others = set(map_tasks(who, range(6), workers=2))
    assert len(others) == 2
    assert os.getpid() not in others


@pytest.mark.parametrize(("workers", "inner"), [(1, None), (2, None), (2, 1)])
def test_a_task_has_its_share_of_the_cores_as_threads(workers, inner):
    def threads(i):
        np.ones((4, 4)) @ np.ones((4, 4))
        return max((pool["num_threads"] for pool in threadpoolctl.threadpool_info()), default=1)

    share = inner or max(1, n_cores() // workers)
    assert max(map_tasks(threads, range(4), workers=workers, inner_threads=inner)) <= share


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_keeps_its_type_and_names_its_task(workers):
    def fail(name):
        if name == "layer.3":
            raise LookupError("no such layer")
        return name

    with pytest.raises(LookupError, match="no such layer") as caught:
        map_tasks(fail, [f"layer.{i}" for i in range(6)], workers=workers)
    assert "in task 'layer.3'" in caught.value.__notes__
    if workers > 1:
        assert "in fail" in caught.value.__notes__[1]


def test_a_journal_says_what_need_not_be_computed_again(tmp_path):
    calls = []

    def count(i):
        calls.append(i)
        return {"value": (i, i)}

    journal = Journal(tmp_path / "work.jsonl", {})
    first = map_tasks(count, [1, 2], workers=1, journal=journal, key=lambda i: f"n{i}")
    second = map_tasks(count, [0, 2, 1], workers=1, journal=journal, key=lambda i: f"n{i}")
    assert calls == [1, 2, 0]
    assert first == [{"value": [1, 1]}, {"value": [2, 2]}]
    assert second == [{"value": [0, 0]}, first[1], first[0]]


def test_results_are_recorded_as_they_arrive(tmp_path):
    journal = Journal(tmp_path / "work.jsonl", {})

    def seen_on_disk(i):
        return journal.path.read_bytes().count(b"\n") - 1

    assert map_tasks(seen_on_disk, range(4), workers=1, journal=journal) == [0, 1, 2, 3]


def test_a_worker_that_dies_leaves_the_journal_and_a_second_run_does_the_rest(tmp_path):
    flag = tmp_path / "died"

    def work(i):
        time.sleep(0.1)
        if i == 5 and not flag.exists():
            flag.touch()
            os._exit(1)
        return i * i

    journal = Journal(tmp_path / "work.jsonl", {})
    with pytest.raises(Exception, match=r"(?i)worker process|terminated"):
        map_tasks(work, range(8), workers=2, journal=journal)
    again = Journal(journal.path, {})
    assert 0 < len(again.done) < 8
    assert map_tasks(work, range(8), workers=2, journal=again) == [i * i for i in range(8)]


def test_no_items_give_no_results_and_an_item_may_be_anything():
    assert map_tasks(operator.neg, []) == []
    assert map_tasks(len, iter([(1, 2), "abc", {}]), workers=2) == [2, 3, 0]


def test_more_workers_than_items_is_no_error():
    assert map_tasks(operator.neg, [1], workers=9) == [-1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"engine": "spark"}, "engine must be one of .*got 'spark'"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"inner_threads": 0}, "inner_threads must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        map_tasks(operator.neg, [1], **options)


def test_two_items_of_one_name_are_refused_where_a_journal_is_kept(tmp_path):
    assert map_tasks(operator.neg, [1, 1], workers=1) == [-1, -1]
    with pytest.raises(ValueError, match="got '1' twice"):
        map_tasks(operator.neg, [1, 1], workers=1, journal=Journal(tmp_path / "work.jsonl", {}))


@pytest.mark.parametrize(("engine", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_an_engine_that_is_not_installed_says_how_to_install_it(monkeypatch, engine, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"polyspan\[{engine}\]"):
        map_tasks(operator.neg, [1], engine=engine)
