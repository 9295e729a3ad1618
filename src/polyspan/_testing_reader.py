"""Feed a reader broken files: only the five file errors may come out, in little time and memory, without a crash."""

import importlib
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from polyspan.errors import FileError
from polyspan.io import append_line, read_bytes, read_lines, read_text, write_bytes

MUTATIONS, SECONDS, BYTES = 500, 2.0, 200_000_000
STUCK_SECONDS = 60
"""After this the child is stopped whatever holds it up; the promise is about seconds of computing."""
FIELDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def check_reader(
    read: str,
    examples: Sequence[Path],
    *,
    mutations: int = MUTATIONS,
    seed: int = 0,
    max_seconds: int | float = SECONDS,
    max_bytes: int = BYTES,
) -> None:
    """Check a reader against broken files, in a process of its own: a segmentation fault fails one check, not the run.

    Parameters
    ----------
    read : str
        ``"module:function"``; called with one path. What is lazy must be drawn inside the function.
    examples : sequence of paths
        Valid files; a reading of each must succeed.
    mutations : int
        How many broken files, taken from the examples in turn: bits flipped, the end cut off, bytes put in, a piece
        doubled, a length field set to 0, 1, 2^31, 2^63 and their kin.
    seed : int
        The same seed gives the same broken files.
    max_seconds : float
        Computing time that one file may take.
    max_bytes : int
        Memory that one file may take on top of what the valid ones took.

    Raises
    ------
    AssertionError
        Saying which file, broken how, had which effect.
    """
    names = [str(Path(example).resolve()) for example in examples]
    if not names:
        raise ValueError("examples must hold at least one file, got none")
    order = {
        "read": read, "examples": names, "mutations": mutations, "seed": seed, "seconds": max_seconds,
        "bytes": max_bytes, "path": sys.path,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="polyspan-reader-") as folder:
        child = subprocess.run(
            [sys.executable, "-m", "polyspan._testing_reader", folder],
            input=json.dumps(order), capture_output=True, text=True, check=False,
        )  # fmt: skip
        told, _ = read_lines(Path(folder, "told")) if Path(folder, "told").exists() else ([], False)
    if told and told[-1] == "done":
        return
    what = f"{read}: {told[-1] if told else 'nothing was read'}"
    if child.returncode < 0:
        what += f"; the process ended by {signal.Signals(-child.returncode).name}"
    if told and told[-1].startswith("FAIL"):
        raise AssertionError(what)
    raise AssertionError(f"{what}\n{child.stderr[-2000:]}")


def mutate(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return broken bytes, and how they were broken."""
    kind = rng.choice(["flip", "cut", "insert", "double", "field", "field", "zeros"])
    made = bytearray(data)
    at = _place(len(data), rng)
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = _place(len(data), rng)
            if made:
                made[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del made[at:]
    elif kind == "insert":
        made[at:at] = rng.randbytes(rng.choice([1, 4, 64]))
    elif kind == "double":
        made[at:at] = made[at : at + rng.choice([1, 8, 100, 1000])]
    elif kind == "zeros":
        width = rng.choice([1, 16, 256])
        made[at : at + width] = bytes(len(made[at : at + width]))
    else:
        width, order = rng.choice([1, 2, 4, 8]), rng.choice(["little", "big"])
        value = rng.choice(FIELDS) % 256**width
        made[at : at + width] = value.to_bytes(width, order)[: max(0, len(made) - at)]
    return bytes(made), f"{kind} at byte {at}"


def _place(size: int, rng: random.Random) -> int:
    """Choose a byte: headers and footers, where the lengths stand, more often than the middle."""
    reach = rng.choice([16, 256, size, size])
    at = rng.randrange(max(1, min(reach, size)))
    return at if rng.random() < 0.7 else max(0, size - 1 - at)


def _child(folder: Path) -> None:
    order = json.loads(sys.stdin.read())
    sys.path[:] = order["path"]
    module, _, name = order["read"].partition(":")
    read: Callable[[Path], Any] = getattr(importlib.import_module(module), name)
    told = folder / "told"
    contents = []
    for example in map(Path, order["examples"]):
        append_line(told, f"the valid file {example.name}", sync=False)
        read(example)
        contents.append((example.name, read_bytes(example)))
    limit = _data_bytes() + order["bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for number in range(order["mutations"]):
        name, data = contents[number % len(contents)]
        broken, how = mutate(data, random.Random(f"{order['seed']} {number}"))
        what = f"broken file {number} of {name} ({how}, seed {order['seed']})"
        append_line(told, what, sync=False)
        path = write_bytes(folder / f"{number}-{name}", broken, durable=False)
        signal.alarm(STUCK_SECONDS)
        start = time.process_time()
        try:
            read(path)
        except FileError:
            pass
        except BaseException as error:
            append_line(told, f"FAIL {what}: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
            return
        finally:
            signal.alarm(0)
        seconds = time.process_time() - start
        if seconds > order["seconds"]:
            append_line(told, f"FAIL {what}: took {seconds:.1f} s of computing, may take {order['seconds']} s")
            return
        path.unlink()
    append_line(told, "done")


def _data_bytes() -> int:
    for line in read_text("/proc/self/status").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
