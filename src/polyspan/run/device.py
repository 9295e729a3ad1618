"""What the machine offers: devices, cores, memory, threads."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

CGROUP = "/sys/fs/cgroup"


def pick_device(device: Any = "auto") -> Any:
    """Return a torch device: ``"auto"`` takes CUDA, then Apple's MPS, then the CPU.

    Raises
    ------
    ValueError
        No such device is known to torch, or it is not in this machine.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be 'auto' or one that torch knows, such as 'cuda:0', got {device!r}") from None
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    there = counts.get(chosen.type, 1)
    if chosen.type != "cpu" and (chosen.index or 0) >= there:
        raise ValueError(f"device must be in this machine, which has {there} of {chosen.type!r}, got {device!r}")
    return chosen


def n_cores() -> int:
    """Return how many cores this process may use: affinity and container limits count, hyper-threads too."""
    from joblib import cpu_count

    return cpu_count()


def available_memory_bytes() -> int:
    """Return the memory that can be taken without swapping, in bytes: Linux's MemAvailable, or a container's rest.

    Elsewhere, where the system does not say how much is free, the whole memory.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _table("/proc/meminfo").get("MemAvailable:", total // 1024) * 1024
    limit = _first_number(f"{CGROUP}/memory.max")
    used = _first_number(f"{CGROUP}/memory.current")
    if limit is None or used is None:
        return free
    # Cached pages of files count as used there but are given back on demand.
    cached = _table(f"{CGROUP}/memory.stat").get("inactive_file", 0)
    return max(0, min(free, limit - used + cached))


def _table(path: str) -> dict[str, int]:
    """Read lines of a name and a number from a file of the system; a file that is not there has none."""
    from polyspan.io import read_text

    if not os.path.exists(path):
        return {}
    rows = (line.split() for line in read_text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _first_number(path: str) -> int | None:
    from polyspan.io import read_text

    if not os.path.exists(path):
        return None
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


@contextmanager
def thread_limits(n: int) -> Generator[None]:
    """Use at most ``n`` threads in BLAS, OpenMP and (where it is loaded) torch inside the block.

    Limits only go down: what runs with fewer threads already, by ``OMP_NUM_THREADS`` for instance, keeps its number.

    Raises
    ------
    ValueError
        ``n`` is below 1.
    """
    from threadpoolctl import ThreadpoolController

    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    pools = [(pool, pool.num_threads) for pool in ThreadpoolController().lib_controllers]
    pools = [(pool, before) for pool, before in pools if before is not None and before > n]
    torch: Any = sys.modules.get("torch")
    torch_before = torch.get_num_threads() if torch else n
    try:
        for pool, _ in pools:
            pool.set_num_threads(n)
        if torch_before > n:
            torch.set_num_threads(n)
        yield
    finally:
        for pool, before in pools:
            pool.set_num_threads(before)
        if torch_before > n:
            torch.set_num_threads(torch_before)
