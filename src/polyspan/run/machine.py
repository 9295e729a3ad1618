"""Facts about the machine, and what a piece of work cost: wall time and peak of anonymous memory."""

import gc
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from .device import n_cores

PACKAGES = ("polyspan", "numpy", "scipy", "scikit-learn", "torch", "safetensors", "pyarrow", "joblib")
SAMPLE_S = 0.02


def machine_facts() -> dict[str, dict[str, Any]]:
    """Return ``machine`` (python, platform, cpu, cores, threads, memory_bytes, gpu) and ``versions`` of packages.

    ``threads`` is the most that a BLAS or OpenMP library loaded so far will use; ``gpu`` is None unless torch is loaded
    and sees one, since loading torch to ask takes seconds.
    """
    from threadpoolctl import threadpool_info

    pools = [pool["num_threads"] for pool in threadpool_info()]
    return {
        "machine": {
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_name(),
            "cores": n_cores(),
            "threads": max(pools, default=1),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpu": _gpu_name(),
        },
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    from polyspan.io import read_text

    if os.path.exists("/proc/cpuinfo"):
        for line in read_text("/proc/cpuinfo").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu_name() -> str | None:
    torch: Any = sys.modules.get("torch")
    return torch.cuda.get_device_name(0) if torch and torch.cuda.is_available() else None


class Measured(NamedTuple):
    """A result with its wall time in seconds and its peak of memory above the start, in bytes."""

    result: Any
    wall_s: float
    peak_bytes: int


def measure_peak(fn: Callable[[], Any]) -> Measured:
    """Call ``fn`` and watch this process's anonymous memory from a thread, fifty times a second.

    Anonymous memory (``RssAnon`` on Linux) leaves out mapped file pages, which the system takes back when it needs
    them. Not seen: a peak shorter than a sample, memory that the allocator held already at the start, other processes.
    Where the system does not tell (macOS, Windows), the peak is 0.
    """
    gc.collect()
    start_bytes = anonymous_bytes()
    peak, stop = [start_bytes], threading.Event()

    def watch():
        while not stop.wait(SAMPLE_S):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True, name="polyspan-memory")
    watcher.start()
    started = time.perf_counter()
    try:
        result = fn()
        wall_s = time.perf_counter() - started
    finally:
        stop.set()
        watcher.join()
    return Measured(result, wall_s, max(peak[0], anonymous_bytes()) - start_bytes)


def anonymous_bytes() -> int:
    """Return this process's anonymous resident memory in bytes, or 0 where the system does not tell."""
    from polyspan.io import read_text

    if not os.path.exists("/proc/self/status"):
        return 0
    for line in read_text("/proc/self/status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
