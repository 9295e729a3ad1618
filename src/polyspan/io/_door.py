"""The one place where files are opened, and where the operating system's errors get their names."""

import contextlib
import os
import pickletools
import stat
from collections.abc import Generator
from io import BufferedReader
from pathlib import Path

from polyspan.errors import CorruptFile, TooLarge, UnreadableFile, UntrustedFile, WrongContent

PathLike = str | os.PathLike[str]

MAX_RATIO = 100
"""Compressed content that grows by more than this is refused ..."""
RATIO_FLOOR = 64 * 2**20
"""... where it would come to more bytes than this; a small file of equal numbers packs well and harms nobody."""

PICKLED = (".pth", ".pt", ".pkl", ".pickle", ".joblib", ".ckpt", ".bin")
CONVERT = (
    "a file that runs no code when read; in a place you trust, load it there once and write .safetensors "
    "(safetensors.torch.save_file) or .npy"
)


@contextlib.contextmanager
def told(path: PathLike, expected: str = "a file that can be read") -> Generator[None]:
    """Give what the operating system raises inside the name and the path that the user knows."""
    try:
        yield
    except MemoryError as error:
        raise TooLarge(path, found="more than the memory holds", expected="content that fits in memory") from error
    except OSError as error:
        raise UnreadableFile(path, found=error.strerror or str(error), expected=expected) from error


def file_size(path: PathLike) -> int:
    """Return the size in bytes of a regular file; a folder, device, pipe or missing file is ``UnreadableFile``."""
    with told(path):
        facts = os.stat(path)
    if stat.S_ISDIR(facts.st_mode):
        raise UnreadableFile(path, found="a folder", expected="a file")
    if not stat.S_ISREG(facts.st_mode):
        raise UnreadableFile(path, found="a device, pipe or socket", expected="a file")
    return facts.st_size


def open_binary(path: PathLike) -> BufferedReader:
    """Open a regular file for reading."""
    file_size(path)
    with told(path):
        return open(path, "rb")


def read_limited(path: PathLike, max_bytes: int) -> bytes:
    """Return the whole file, which may hold at most ``max_bytes``; sizes of /proc files are not known before."""
    size = file_size(path)
    check_budget(path, size, max_bytes)
    with open_binary(path) as file, told(path):
        data = file.read(size + 1)
        while len(data) > size:
            # Longer than its size said; to ask for all of max_bytes at once would allocate them.
            size = len(data)
            check_budget(path, size, max_bytes)
            data += file.read(2**20)
    return data


def check_budget(path: PathLike, n_bytes: int, max_bytes: int | None, where: str = "") -> None:
    """Refuse content of ``n_bytes`` before it is allocated; without a limit the free memory is one."""
    limit = memory_budget() if max_bytes is None else max_bytes
    if n_bytes > limit:
        raise TooLarge(path, found=f"{n_bytes:,} bytes", expected=f"at most {limit:,} bytes", where=where)


def check_ratio(path: PathLike, packed: int, unpacked: int, max_bytes: int | None, where: str = "") -> None:
    """Refuse compressed content that grows out of proportion; a limit that the caller states is the only one."""
    check_budget(path, unpacked, max_bytes, where)
    if max_bytes is None and unpacked > RATIO_FLOOR and unpacked > MAX_RATIO * max(packed, 1):
        raise TooLarge(
            path,
            found=f"{packed:,} bytes that unpack to {unpacked:,}",
            expected=f"at most {MAX_RATIO} times, or a limit stated by max_bytes=",
            where=where,
        )


def memory_budget() -> int:
    """Return the bytes that can be allocated without swapping."""
    from polyspan.run import available_memory_bytes

    return available_memory_bytes()


def looks_pickled(head: bytes) -> bool:
    """Tell whether bytes begin a pickle, of any protocol, without running it."""
    if len(head) >= 2 and head[0] == 0x80 and 1 <= head[1] <= 5:
        return True
    if head[:1] not in (b"(", b"c", b"]", b"}", b"l", b"d"):
        return False
    try:
        # genops reads opcodes only; a text that is no pickle fails within a few of them.
        return any(op.name == "STOP" for op, _, _ in pickletools.genops(head))
    except Exception:
        return False


def refuse_pickle(path: PathLike, head: bytes) -> None:
    """Raise ``UntrustedFile`` where the first bytes are a pickle's, or a torch archive's, whatever the suffix says."""
    if looks_pickled(head):
        raise UntrustedFile(path, found="a pickle, which runs code when read", expected=CONVERT, where="byte 0")
    if head.startswith(b"PK\x03\x04") and b"/data.pkl" in head[:512]:
        raise UntrustedFile(path, found="a torch archive holding a pickle", expected=CONVERT, where="byte 0")


def refuse_pickled_suffix(path: PathLike) -> None:
    """Raise ``UntrustedFile`` for the suffixes whose files are pickles, after seeing that there is a file."""
    if Path(path).suffix.lower() in PICKLED:
        file_size(path)
        raise UntrustedFile(path, found=f"a {Path(path).suffix} file, which runs code when read", expected=CONVERT)


def suffix_of(path: PathLike, known: tuple[str, ...]) -> str:
    """Return the suffix in lower case; one not ``known`` is ``UntrustedFile`` or ``WrongContent``."""
    refuse_pickled_suffix(path)
    suffix = Path(path).suffix.lower()
    if suffix not in known:
        file_size(path)
        raise WrongContent(path, found=f"suffix {suffix!r}", expected=f"one of {', '.join(known)}")
    return suffix


def corrupt_if_short(path: PathLike, size: int, needed: int, what: str) -> None:
    """Raise ``CorruptFile`` where a file is shorter than its own format demands."""
    if size < needed:
        raise CorruptFile(
            path, found=f"{size:,} bytes", expected=f"at least {needed:,} for {what}", where=f"byte {size}"
        )
