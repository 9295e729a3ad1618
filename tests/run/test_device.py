import os

import numpy as np
import pytest
import threadpoolctl
import torch

from polyspan.run import available_memory_bytes, device, n_cores, pick_device, thread_limits


def test_auto_takes_what_torch_says_is_there():
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device().type == expected
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "warp9", "cuda:x"])
def test_a_device_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"device must be .*{name}"):
        pick_device(name)


def test_cores_are_those_that_the_process_may_use():
    assert 1 <= n_cores() <= len(os.sched_getaffinity(0))


def test_free_memory_lies_between_nothing_and_all():
    assert 0 < available_memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_containers_limit_bounds_the_free_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "CGROUP", str(tmp_path))
    free = available_memory_bytes()
    (tmp_path / "memory.current").write_text(f"{80 * 2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {10 * 2**20}\n")
    (tmp_path / "memory.max").write_text(f"{100 * 2**20}\n")
    assert available_memory_bytes() == 30 * 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes() == pytest.approx(free, rel=0.2)


def blas_threads():
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]


def test_threads_are_limited_inside_and_as_before_outside_also_after_an_error():
    np.ones((8, 8)) @ np.ones((8, 8))
    # Read outside of the limits: torch gives what it is set to on to MKL, which the limits do not put back.
    torch_before = torch.get_num_threads()
    with threadpoolctl.threadpool_limits(3):
        torch.set_num_threads(3)
        try:
            before = blas_threads()
            seen = []
            with pytest.raises(ZeroDivisionError), thread_limits(2):
                seen.append((max(blas_threads()), torch.get_num_threads(), 1 / len(seen)))
            with thread_limits(2):
                seen.append((max(blas_threads()), torch.get_num_threads()))
            assert seen == [(2, 2)]
            assert (blas_threads(), torch.get_num_threads()) == (before, 3)
        finally:
            torch.set_num_threads(torch_before)


def test_a_limit_never_raises_the_number_of_threads():
    with threadpoolctl.threadpool_limits(1), thread_limits(64):
        assert max(blas_threads()) == 1


def test_less_than_one_thread_is_refused():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"), thread_limits(0):
        pass
