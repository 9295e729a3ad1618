import json
import os
import platform

import numpy as np
import pytest

from polyspan.run import anonymous_bytes, machine_facts, measure_peak, n_cores

MIB = 2**20
linux_only = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell")


def test_facts_are_plain_json_and_say_what_this_machine_is():
    facts = machine_facts()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    machine = facts["machine"]
    assert machine.keys() == {"python", "platform", "cpu", "cores", "threads", "memory_bytes", "gpu"}
    assert machine["python"] == platform.python_version()
    assert machine["cores"] == n_cores()
    assert machine["threads"] >= 1
    assert machine["cpu"]
    assert facts["versions"]["numpy"] == np.__version__
    assert "polyspan" in facts["versions"]


@linux_only
def test_the_peak_is_what_was_held_at_once_not_what_is_left():
    def work():
        for _ in range(2):
            held = np.ones(100 * MIB // 8)
            total = held.sum()
            del held
        return total

    measured = measure_peak(work)
    assert measured.result == 100 * MIB // 8
    assert 80 * MIB < measured.peak_bytes < 130 * MIB
    assert 0 < measured.wall_s < 60


@linux_only
def test_pages_of_a_mapped_file_do_not_count(tmp_path):
    path = tmp_path / "big.npy"
    np.save(path, np.ones(64 * MIB // 8))
    measured = measure_peak(lambda: float(np.load(path, mmap_mode="r").sum()))
    assert measured.result == 64 * MIB // 8
    assert measured.peak_bytes < 16 * MIB


@linux_only
def test_memory_grows_with_what_is_touched():
    before = anonymous_bytes()
    held = np.ones(50 * MIB // 8)
    assert anonymous_bytes() - before == pytest.approx(held.nbytes, rel=0.2)


def test_an_error_passes_and_the_watching_thread_ends():
    import threading

    with pytest.raises(ZeroDivisionError):
        measure_peak(lambda: 1 / 0)
    assert not [t for t in threading.enumerate() if t.name == "polyspan-memory"]
