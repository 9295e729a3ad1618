"""Race functions against one another in one process, in turns, and keep the ratios.

A benchmark calls :func:`race` once a size. Arms run in turn, so that a slow minute of the machine falls on all of them;
each arm is warmed up once. The ratio is the other arm's time over ours, paired round by round.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyspan.run import machine_facts

RESULTS = Path(__file__).parent / "results"


def race(
    name: str, arms: Mapping[str, Callable[[], Any]], *, size: Mapping[str, int], repeats: int = 5, warmup: int = 1
) -> dict:
    """Time every arm ``repeats`` times in turns; the first arm is ours. Print and return one record.

    ``size`` says how large the input is, such as ``{"n": 1000, "edges": 20000}``.
    """
    for function in arms.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm, function in arms.items():
            start = time.perf_counter()
            function()
            times[arm].append(time.perf_counter() - start)
    ours = next(iter(arms))
    ratios = {
        arm: sorted(theirs / own for theirs, own in zip(times[arm], times[ours], strict=True))
        for arm in arms
        if arm != ours
    }
    record = {
        "name": name,
        "size": dict(size),
        "ours": ours,
        "seconds": {arm: {"min": min(t), "median": statistics.median(t), "max": max(t)} for arm, t in times.items()},
        "ratio": {arm: {"min": r[0], "median": statistics.median(r), "max": r[-1]} for arm, r in ratios.items()},
    }
    print(f"{name} {_words(size)}: {ours} {record['seconds'][ours]['median']:.4g} s", flush=True)
    for arm, r in record["ratio"].items():
        seconds = record["seconds"][arm]["median"]
        print(f"  {arm}: {seconds:.4g} s, {r['median']:.2f} times ours ({r['min']:.2f} to {r['max']:.2f})", flush=True)
    return record


def _words(size: Mapping[str, int]) -> str:
    return " ".join(f"{key}={value:,}" for key, value in size.items())


def growth(records: Sequence[Mapping[str, Any]], key: str, arm: str | None = None) -> float:
    """Exponent p of time ~ size[key]^p between the smallest and the largest record of an arm (ours by default)."""
    import math

    ordered = sorted(records, key=lambda record: record["size"][key])
    first, last = ordered[0], ordered[-1]
    arm = arm or first["ours"]
    steps = math.log(last["size"][key] / first["size"][key])
    return math.log(last["seconds"][arm]["median"] / first["seconds"][arm]["median"]) / steps


def save(stem: str, records: Sequence[Mapping[str, Any]], **notes: Any) -> Path:
    """Write ``results/<stem>.json`` with the machine that it was measured on."""
    from polyspan.io import write_json

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{stem}.json"
    facts = machine_facts()
    write_json(
        path, {"races": list(records), "notes": notes, "machine": facts["machine"], "versions": facts["versions"]}
    )
    print(json.dumps(notes, indent=2, default=str) if notes else "", f"saved {path.name}", flush=True)
    return path


def peaks(source: str) -> dict[str, int]:
    """Return the bytes that a call of each arm takes above its inputs and weights, each in a process of its own.

    ``source`` defines a mapping ``arms``. In these processes the C library gives nothing back while an arm runs, so
    that the shortest peak is seen, and everything before: what arms were made with is not used again unseen.
    """
    told = subprocess.run(
        [sys.executable, "-c", f"{source}\nimport json\nprint(json.dumps(list(arms)))"],
        stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    made = {}
    for arm in json.loads(told.stdout.splitlines()[-1]):
        code = f"import ctypes\n{source}\nmain = arms[{arm!r}]\nctypes.CDLL(None).malloc_trim(0)"
        made[arm] = peak_in_child(code, MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**40))
        print(f"peak of {arm}: {made[arm] / 2**20:.1f} MiB", flush=True)
    return made


def peak_in_child(code: str, **environment: str) -> int:
    """Run Python source in a fresh process and return its peak of anonymous memory in bytes, above its start.

    The source may print whatever it likes. It must define ``main()``; imports before it are not counted.
    """
    probe = f"""
{code}
from polyspan.run import measure_peak
print(measure_peak(main).peak_bytes)
"""
    # From this folder the source can import a benchmark; what it says of an error is not kept back.
    command = [sys.executable, "-c", probe]
    own = os.environ | environment
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent, env=own)
    return int(done.stdout.strip().splitlines()[-1])
