"""Files and folders that are either the old ones or the new ones, whole, whenever the machine stops."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Generator
from pathlib import Path

from polyspan.errors import CorruptFile, UnreadableFile

from ._door import PathLike, file_size, read_limited, told

MANIFEST = "manifest.json"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_swept: set[str] = set()


@contextlib.contextmanager
def atomic_path(path: PathLike, *, durable: bool = True) -> Generator[Path]:
    """Yield a sibling path to write to; at the end it replaces ``path`` durably, on any failure nothing is left.

    Data are synced to the disk before the rename and the folder after it. A new file gets the permissions that the
    umask leaves, a replaced one keeps its own. A symbolic link is followed and stays. Two writers at once: the last
    wins, both are whole. Temporaries that a killed process left are swept after a day.

    Parameters
    ----------
    path : path-like
    durable : bool
        Wait for the disk. Scratch files that no one needs after a power cut can do without.

    Raises
    ------
    UnreadableFile
        The folder is missing or may not be written to, ``path`` is a folder, or the disk is full.
    """
    target = real_target(path)
    temp, mode = _sibling(target, path)
    try:
        with _named(path, temp):
            yield temp
            settle(temp, target, mode, durable)
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def real_target(path: PathLike) -> Path:
    """Return the file that a write to ``path`` replaces: where a link points; a folder is ``UnreadableFile``."""
    target = Path(path)
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    if target.is_dir():
        raise UnreadableFile(path, found="a folder", expected="the name of a file to write")
    if not target.parent.is_dir():
        raise UnreadableFile(path, found=f"no folder {target.parent}", expected="a folder that exists")
    return target


def _sibling(target: Path, path: PathLike) -> tuple[Path, int]:
    """Make an empty temporary beside the target, and return the permissions that the target shall have."""
    _sweep_once(target.parent)
    temp = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    with told(path, "a folder that can be written to"):
        descriptor = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            mode = stat.S_IMODE(os.stat(target).st_mode)
    return temp, mode


@contextlib.contextmanager
def _named(path: PathLike, temp: Path) -> Generator[None]:
    """Name the target in errors about the temporary, whose name the user never gave; leave other errors alone."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(temp)):
            raise
        raise UnreadableFile(
            path, found=error.strerror or str(error), expected="a place that can be written to"
        ) from error


def settle(temp: Path, target: Path, mode: int, durable: bool = True) -> None:
    """Sync a finished temporary, give it its permissions, put it in the target's place and sync the folder."""
    if durable:
        sync(temp)
    os.chmod(temp, mode)
    os.replace(temp, target)
    if durable:
        sync_folder(target.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk; file systems that cannot sync a folder need none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _sweep_once(folder: Path) -> None:
    """Sweep a folder the first time that this process writes to it; listing it at every write would be dear."""
    key = str(folder.absolute())
    if key not in _swept:
        _swept.add(key)
        with contextlib.suppress(OSError, UnreadableFile):
            sweep_temporaries(folder)


def sweep_temporaries(folder: PathLike, older_than_s: int | float = 86400) -> list[Path]:
    """Remove the temporaries that killed processes left in a folder, and return their paths.

    Only names that :func:`atomic_path` and :func:`atomic_directory` make are touched, and only where they are older
    than ``older_than_s`` seconds: a younger one may belong to a run that is still going.
    """
    with told(folder, "a folder that can be listed"):
        candidates = [Path(entry.path) for entry in os.scandir(folder) if _TEMPORARY.fullmatch(entry.name)]
    removed, now = [], time.time()
    for path in sorted(candidates):
        with contextlib.suppress(OSError):
            if now - path.lstat().st_mtime <= older_than_s:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path)
    return removed


@contextlib.contextmanager
def atomic_directory(path: PathLike, *, replace: bool = False) -> Generator[Path]:
    """Yield a sibling folder to fill; at the end it becomes ``path``, with ``manifest.json`` written last.

    The manifest holds the size and the SHA-256 of each file; :func:`check_directory` reads it. On any failure the
    folder that was there is there still and nothing else is left.

    Parameters
    ----------
    path : path-like
        The folder to make. Its parent must exist.
    replace : bool
        Replace a folder that is there. Two renames do it: a machine that stops between them leaves the old folder
        under its temporary name and none under ``path``.

    Raises
    ------
    UnreadableFile
        The folder exists and ``replace`` is false, or the place may not be written to.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise UnreadableFile(path, found=f"no folder {target.parent}", expected="a folder that exists")
    if (target.exists() or target.is_symlink()) and not replace:
        raise UnreadableFile(path, found="something of that name", expected="a new name, or replace=True")
    _sweep_once(target.parent)
    temp, old = (target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp") for _ in range(2))
    with told(path, "a folder that can be written to"):
        temp.mkdir()
    try:
        with _named(path, temp):
            yield temp
            _seal(temp)
            if target.exists():
                os.rename(target, old)
            try:
                os.rename(temp, target)
            except OSError:
                if old.exists():
                    os.rename(old, target)
                raise
            sync_folder(target.parent)
    finally:
        for leftover in (temp, old):
            if leftover.exists() and (leftover == temp or target.exists()):
                shutil.rmtree(leftover, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Sync every file and folder, then write the manifest as the last file."""
    files = {}
    for parent, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            path = Path(parent, name)
            sync(path)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
        sync_folder(Path(parent))
    manifest = folder / MANIFEST
    with open(manifest, "w", encoding="utf-8") as file:
        json.dump({"schema": 1, "files": files}, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def check_directory(path: PathLike) -> list[str]:
    """Return the names in a folder's manifest after seeing that every file is there with its size and digest.

    Raises
    ------
    CorruptFile
        There is no manifest, or a file is missing or differs.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise CorruptFile(path, found=f"no {MANIFEST}", expected="a folder that was written to its end")
    try:
        files = json.loads(read_limited(folder / MANIFEST, 64 * 2**20))["files"]
        wanted = {str(name): (int(facts["bytes"]), str(facts["sha256"])) for name, facts in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFile(folder / MANIFEST, found="no manifest", expected="names, sizes and digests") from error
    for name, (n_bytes, digest) in wanted.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CorruptFile(path, found=f"a name outside the folder: {name}", expected="names inside", where=MANIFEST)
        inside = folder / name
        if not inside.is_file():
            raise CorruptFile(path, found=f"no file {name}", expected="every file of the manifest", where=name)
        if file_size(inside) != n_bytes:
            raise CorruptFile(path, found=f"{file_size(inside):,} bytes", expected=f"{n_bytes:,} bytes", where=name)
        with open(inside, "rb") as file, told(inside):
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise CorruptFile(path, found="other bytes", expected=f"SHA-256 {digest}", where=name)
    return sorted(wanted)


def make_folder(path: PathLike) -> Path:
    """Make a folder and its parents where they are missing, and return it."""
    with told(path, "a place where a folder can be made"):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def remove_folder(path: PathLike) -> None:
    """Remove a folder and all in it, where there is one, and sync the folder that held it."""
    with told(path, "a folder that can be removed"):
        if Path(path).is_dir():
            shutil.rmtree(path)
            sync_folder(Path(path).parent)


def remove_file(path: PathLike) -> None:
    """Remove a file where there is one, and sync its folder."""
    with told(path, "a file that can be removed"):
        Path(path).unlink(missing_ok=True)
        sync_folder(Path(path).parent)
