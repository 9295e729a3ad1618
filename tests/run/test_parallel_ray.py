"""A real ray, where it is installed: it starts two workers here and ends them."""

import pytest

from polyspan.run import Journal, map_tasks

ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [
    pytest.mark.slow,
    # Ray leaves its own sockets and log files to the garbage collector, and announces coming changes of its own.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_ray_gives_the_same_results_in_order_records_them_and_names_what_failed(tmp_path):
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)

    def square(i):
        return {"square": i * i}

    def fail(i):
        raise LookupError("no such layer")

    try:
        journal = Journal(tmp_path / "work.jsonl", {})
        assert map_tasks(square, range(6), engine="ray", journal=journal) == [{"square": i * i} for i in range(6)]
        assert len(Journal(journal.path, {}).done) == 6
        with pytest.raises(LookupError, match="no such layer") as caught:
            map_tasks(fail, ["layer.3"], engine="ray")
        assert "in task 'layer.3'" in caught.value.__notes__
        assert ray.is_initialized()
    finally:
        ray.shutdown()
