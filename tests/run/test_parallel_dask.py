"""A real dask cluster: a scheduler and two workers, processes of their own, over TCP on the loopback."""

import os
import socket
import subprocess
import sys
import time
import types

import pytest

from polyspan.run import Journal, map_tasks

pytest.importorskip("distributed")
pytestmark = pytest.mark.slow
NO_DASHBOARD = ["--no-dashboard"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Yield the scheduler's address and the two workers' processes."""
    folder = tmp_path_factory.mktemp("dask")
    address = f"tcp://127.0.0.1:{free_port()}"
    base = [sys.executable, "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    port = address.rsplit(":", 1)[1]
    scheduler = [*base, "distributed.cli.dask_scheduler", "--host", "tcp://127.0.0.1", "--port", port, *NO_DASHBOARD]
    worker = [*base, "distributed.cli.dask_worker", address, "--host", "tcp://127.0.0.1", "--nthreads", "1"]
    worker += ["--no-nanny", *NO_DASHBOARD, "--local-directory", str(folder)]
    processes = [subprocess.Popen(command, **options) for command in (scheduler, worker, worker)]
    import distributed

    with distributed.Client(address, set_as_default=False, timeout=30) as client:
        client.wait_for_workers(2, timeout=30)
    yield address, processes[1:]
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_cluster_gives_the_same_results_in_order(cluster):
    address, workers = cluster

    def work(i):
        time.sleep(0.05)
        return i * i, os.getpid()

    found = map_tasks(work, range(8), engine="dask", address=address)
    assert [square for square, _ in found] == [i * i for i in range(8)]
    assert {pid for _, pid in found} == {process.pid for process in workers}


def test_an_error_on_a_cluster_names_its_task_and_keeps_what_was_done(cluster, tmp_path):
    address, _ = cluster

    def fail(i):
        if i == 3:
            time.sleep(0.5)
            raise LookupError("no such layer")
        return i

    journal = Journal(tmp_path / "work.jsonl", {})
    with pytest.raises(LookupError, match="no such layer") as caught:
        map_tasks(fail, range(4), engine="dask", address=address, journal=journal, key=lambda i: f"layer.{i}")
    assert "in task 'layer.3'" in caught.value.__notes__
    assert Journal(journal.path, {}).done == {f"layer.{i}": i for i in range(3)}


def test_a_function_that_the_workers_cannot_load_is_refused_and_harms_none(cluster, monkeypatch):
    address, workers = cluster
    module = types.ModuleType("only_here")
    exec("def work(i):\n    return i", vars(module))
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(ValueError, match=r"fn must load on every worker, got from tcp://.*only_here"):
        map_tasks(module.work, [1], engine="dask", address=address)
    assert [process.poll() for process in workers] == [None, None]


def test_a_worker_killed_in_the_middle_costs_no_result(cluster, tmp_path):
    address, workers = cluster
    journal = Journal(tmp_path / "work.jsonl", {})
    victim, asked = workers[0], tmp_path / "asked"

    def work(i):
        if os.getpid() == victim_pid and i >= 4:
            # Lost while it works on this one.
            asked_file.touch()
            time.sleep(60)
        time.sleep(0.1)
        return {"square": i * i}

    victim_pid, asked_file = victim.pid, asked
    import threading

    def kill():
        while not asked.exists():
            time.sleep(0.02)
        victim.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    found = map_tasks(work, range(16), engine="dask", address=address, journal=journal)
    killer.join()
    assert victim.wait(timeout=10) != 0
    assert found == [{"square": i * i} for i in range(16)]
    assert Journal(journal.path, {}).done == {str(i): {"square": i * i} for i in range(16)}
